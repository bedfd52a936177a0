//! The SSH store through the commands users type, and what they are told when it can't work.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod harness;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use harness::sshd::{Account, Sshd, keygen, sshd};
use harness::{Image, Serve, cli, need, noise, run, until};

/// `image-from-file` of `raw` as `disk` into `repo`.
fn store_image(server: &Sshd, raw: &Path, repo: &str) -> harness::Ran {
    let mut cli = cli();
    cli.args(["image-from-file", "-s", "1M", "disk"]).arg(raw).arg(repo);
    server.with_home(&mut cli);
    run(&mut cli)
}

/// All files below a directory and what they hold, by their names from there.
fn files(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let (mut found, mut dirs) = (BTreeMap::new(), vec![root.to_owned()]);
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
            let path = entry.path();
            match entry.file_type().unwrap() {
                kind if kind.is_dir() => dirs.push(path),
                kind if kind.is_file() => {
                    let bytes = std::fs::read(&path).unwrap();
                    found.insert(path.strip_prefix(root).unwrap().to_owned(), bytes);
                }
                _ => {}
            }
        }
    }
    found
}

/// The objects of a repository that neither time nor an id is in, and the names of all.
fn objects(root: &Path) -> (BTreeMap<PathBuf, Vec<u8>>, Vec<String>) {
    let all = files(root);
    let visible = all.into_iter().filter(|(name, _)| !name.to_string_lossy().contains("/."));
    let (lasting, other): (BTreeMap<_, _>, BTreeMap<_, _>) = visible
        .partition(|(name, _)| ["blocks", "maps"].iter().any(|kind| name.iter().any(|part| part == *kind)));
    // A commit's name has its hash: its place is what can be compared.
    let parent = |name: &PathBuf| name.parent().unwrap().display().to_string();
    (lasting, other.keys().map(parent).map(|dir| dir.split("/commits").next().unwrap().to_owned()).collect())
}

#[test]
fn an_image_over_ssh_is_served_reads_as_its_source_and_is_the_one_a_directory_has() {
    if !sshd() || !need(&["nbdcopy", "qemu-io"]) {
        return;
    }
    let server = Sshd::start(Account::SftpOnly);
    let image = Image::sparse();
    let remote = image.dir().join("remote repo");
    let url = server.url(&remote).replace(' ', "%20");
    let said = store_image(&server, &image.raw_file(), &url).ok();
    assert!(said.contains("stored as"), "{said}");
    let again = store_image(&server, &image.raw_file(), &url).ok();
    assert!(again.contains("unchanged"), "{again}");
    assert_eq!(objects(&remote), objects(&image.repo()));
    assert!(objects(&remote).0.len() > 8);

    // Made over SSH and served from the directory; made in the directory and served over SSH.
    let mut logs = String::new();
    let repos = [remote.to_str().unwrap().to_owned(), server.url(&image.repo())];
    for (at, repo) in repos.iter().enumerate() {
        let state = image.dir().join(format!("state{at}"));
        let serve = || Serve::new(Path::new(repo), &state).name("disk").ssh(&server).start();
        let disk = serve();
        let copy = image.dir().join("copy");
        run(Command::new("nbdcopy").arg(disk.uri("disk")).arg(&copy)).ok();
        assert!(std::fs::read(&copy).unwrap() == image.raw, "the copy of {repo} differs");
        let write = ["-f", "raw", "-c", "write -P 0x42 1M 64k", "-c", "flush"];
        run(Command::new("qemu-io").args(write).arg(disk.uri("disk"))).ok();
        disk.stop();
        let disk = serve();
        let read = ["-f", "raw", "-c", "read -P 0x42 1M 64k"];
        run(Command::new("qemu-io").args(read).arg(disk.uri("disk"))).ok();
        logs += &disk.log();
        disk.stop();
    }

    // A directory becomes an image there too.
    let tree = image.dir().join("tree");
    std::fs::create_dir_all(tree.join("sub")).unwrap();
    std::fs::write(tree.join("sub/file"), noise(5, 300_000)).unwrap();
    let mut from_dir = cli();
    from_dir.args(["image-from-dir", "--size", "64M", "tree"]).arg(&tree).arg(&url);
    server.with_home(&mut from_dir);
    logs += &run(from_dir.env("RUST_LOG", "trace")).ok();

    // Nothing of a key is anywhere but in its own file.
    let key = std::fs::read_to_string(server.home().join(".ssh/id_ed25519")).unwrap();
    let line = key.lines().nth(2).unwrap();
    assert!(line.len() > 60 && !logs.contains(line));
    for dir in [&remote, &image.dir().join("state0")] {
        for (name, bytes) in files(dir) {
            let found = bytes.windows(line.len()).any(|window| window == line.as_bytes());
            assert!(!found, "{} holds a part of the key", name.display());
        }
    }
}

#[test]
fn what_is_wrong_with_a_host_or_a_key_is_said_in_one_line() {
    if !sshd() {
        return;
    }
    let server = Sshd::start(Account::SftpOnly);
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    std::fs::write(&raw, noise(1, 1 << 20)).unwrap();
    let url = server.url(&dir.path().join("r"));
    let port = server.port();
    let user = server.local().user.unwrap();
    let ssh = server.home().join(".ssh");
    let key = ssh.join("id_ed25519");
    let secret = std::fs::read_to_string(&key).unwrap();
    let refused = |url: &str| {
        let said = store_image(&server, &raw, url).refused();
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(!secret.lines().any(|line| said.contains(line)), "{said}");
        said
    };
    let fingerprint = |name: &str| {
        let said = run(Command::new("ssh-keygen").arg("-lf").arg(server.file(&format!("{name}.pub")))).ok();
        said.split(' ').nth(1).unwrap().to_owned()
    };

    // Another host's key is in the file.
    server.know("host_ecdsa");
    let known = std::fs::read_to_string(server.known_hosts()).unwrap();
    keygen(&server.file("other"), &["-t", "ed25519", "-N", ""]);
    let other = std::fs::read_to_string(server.file("other.pub")).unwrap();
    std::fs::write(server.known_hosts(), format!("# mine\n[127.0.0.1]:{port} {other}")).unwrap();
    assert_eq!(
        refused(&url),
        format!(
            "error: {url}: REMOTE HOST IDENTIFICATION HAS CHANGED! Someone could be listening in, or the host has a new key: \
             127.0.0.1 shows ssh-ed25519 {}, and another one is in {}:2; nothing was sent to it\n",
            fingerprint("host_ed25519"),
            server.known_hosts().display()
        )
    );
    std::fs::remove_file(server.known_hosts()).unwrap();
    let unknown = refused(&url);
    assert!(
        unknown.starts_with(&format!("error: {url}: the host key of 127.0.0.1 is not known: it shows "))
            && unknown.contains(&format!("hint: run 'ssh -p {port} {user}@127.0.0.1' once and compare it")),
        "{unknown}"
    );
    assert!(!dir.path().join("r").exists());
    // Known by one type of key, of which the host has two; and hashed, as Debian writes it.
    std::fs::write(server.known_hosts(), &known).unwrap();
    run(Command::new("ssh-keygen").arg("-q").arg("-H").arg("-f").arg(server.known_hosts())).ok();
    assert!(std::fs::read_to_string(server.known_hosts()).unwrap().starts_with("|1|"));
    store_image(&server, &raw, &url).ok();

    // Keys that don't do.
    std::fs::rename(&key, ssh.join("good")).unwrap();
    std::fs::rename(ssh.join("id_ed25519.pub"), ssh.join("good.pub")).unwrap();
    assert_eq!(
        refused(&url),
        format!(
            "error: {url}: can't log in: no key was accepted for user {user}; tried: no SSH agent (SSH_AUTH_SOCK is not set), \
             no id_ed25519, id_ecdsa, id_rsa in ~/.ssh\n"
        )
    );
    let rsa = ssh.join("id_rsa");
    keygen(&rsa, &["-t", "rsa", "-b", "2048", "-N", ""]);
    keygen(&key, &["-t", "ed25519", "-N", "a passphrase"]);
    assert_eq!(
        refused(&url),
        format!(
            "error: {url}: can't log in: no key was accepted for user {user}; tried: no SSH agent (SSH_AUTH_SOCK is not set), \
             {0}, which needs a passphrase (run 'ssh-add {0}' first), {1}\n",
            key.display(),
            rsa.display()
        )
    );

    // The configuration's own words.
    let config = |text: &str| std::fs::write(ssh.join("config"), text).unwrap();
    config(&format!(
        "Host alias\n HostName 127.0.0.1\n Port {port}\n IdentityFile ~/.ssh/good\n IdentitiesOnly yes\n"
    ));
    let by_alias = format!("scp://alias{}", dir.path().join("r").display());
    assert!(store_image(&server, &raw, &by_alias).ok().contains("unchanged"));
    config("Host *\n ProxyJump hop\n");
    assert_eq!(
        refused(&url),
        format!("error: {url}: ProxyJump is set for 127.0.0.1, and proxies are not supported yet\n")
    );
    config("Port twenty-two\n");
    let config_file = ssh.join("config");
    assert_eq!(
        refused(&url),
        format!(
            "error: {url}: {}:1: Port 'twenty-two' is not a number from 1 to 65535\n",
            config_file.display()
        )
    );
    config("ConnectTimeout 1\n");
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent_at = silent.local_addr().unwrap();
    assert_eq!(
        refused(&format!("scp://{silent_at}/r")),
        format!("error: scp://{silent_at}/r: shake hands with {silent_at}: no answer\n")
    );
    std::fs::remove_file(config_file).unwrap();
    let refuses = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert_eq!(
        refused(&format!("scp://{refuses}/r")),
        format!("error: scp://{refuses}/r: can't connect to {refuses}: Connection refused (os error 111)\n")
    );
    let said = refused(&url.replace("scp://", "ssh://user:hunter2@"));
    assert!(said.contains("credentials don't belong in a URL") && !said.contains("hunter2"), "{said}");
}

#[test]
fn a_user_who_may_not_write_is_told_what_and_where() {
    if !sshd() {
        return;
    }
    let server = Sshd::start(Account::ReadOnly);
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    std::fs::write(&raw, noise(1, 1 << 20)).unwrap();
    let root = dir.path().join("r");
    let url = server.url(&root);
    assert_eq!(
        store_image(&server, &raw, &url).refused(),
        format!("error: {url}: not allowed to make the directory {}\n", root.display())
    );
}

/// An agent that is killed when dropped.
struct Agent(Child, PathBuf);

impl Agent {
    fn start(dir: &Path) -> Agent {
        let socket = dir.join("agent");
        let mut command = Command::new("ssh-agent");
        command.arg("-D").arg("-a").arg(&socket).stdin(Stdio::null()).stdout(Stdio::null());
        let agent = Agent(command.spawn().unwrap(), socket.clone());
        assert!(until(Duration::from_secs(20), || socket.exists()));
        agent
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_key_that_only_the_agent_has_logs_in_and_a_home_is_where_relative_paths_start() {
    if !sshd() || !need(&["ssh-agent", "ssh-add"]) {
        return;
    }
    let server = Sshd::start(Account::Shell);
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    std::fs::write(&raw, noise(1, 1 << 20)).unwrap();
    let agent = Agent::start(dir.path());
    let key = server.home().join(".ssh/id_ed25519");
    let other = dir.path().join("other");
    keygen(&other, &["-t", "ecdsa", "-N", ""]);
    for key in [&other, &key] {
        run(Command::new("ssh-add").arg("-q").arg(key).env("SSH_AUTH_SOCK", &agent.1)).ok();
    }
    std::fs::remove_file(&key).unwrap();
    let store = |url: &str| {
        let mut cli = cli();
        cli.args(["image-from-file", "-s", "1M", "disk"]).arg(&raw).arg(url);
        server.with_home(&mut cli);
        run(cli.env("SSH_AUTH_SOCK", &agent.1))
    };
    let below_home = format!("scp://127.0.0.1:{}/~/team/repo", server.port());
    store(&below_home).ok();
    assert!(server.file("remote/team/repo/format").is_file());
    let socket = agent.1.clone();
    drop(agent);
    let said = {
        let mut cli = cli();
        cli.args(["image-from-file", "-s", "1M", "disk"]).arg(&raw).arg(&below_home);
        server.with_home(&mut cli);
        run(cli.env("SSH_AUTH_SOCK", &socket)).refused()
    };
    assert!(said.contains("tried: the SSH agent, which does not answer"), "{said}");
}
