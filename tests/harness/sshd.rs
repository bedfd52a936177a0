//! A real SSH server: OpenSSH's sshd on a loopback port, with keys and accounts' files of its own.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use horcrux::store::SshPlace;
use horcrux::store::ssh::Local;

use super::{can, need, run, until};

/// sshd must be started by its full path.
const PROGRAM: &str = "/usr/sbin/sshd";
/// From start to the first answer it takes some 50 ms.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the account may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Account {
    /// Anything.
    Shell,
    /// SFTP and no commands.
    SftpOnly,
    /// SFTP that refuses to write.
    ReadOnly,
}

/// Whether the server can be run here; skipped, or failed in CI.
pub fn sshd() -> bool {
    let can_chroot = !rustix::process::geteuid().is_root() || std::fs::create_dir_all("/run/sshd").is_ok();
    can(
        Path::new(PROGRAM).is_file() && can_chroot,
        "sshd is missing; `make packages` installs openssh-server",
    ) && need(&["ssh-keygen"])
}

/// A running server, and the home directory of a user it lets in. It is killed when dropped, with its sessions.
pub struct Sshd {
    child: Option<Child>,
    port: u16,
    dir: tempfile::TempDir,
}

impl Sshd {
    pub fn start(account: Account) -> Sshd {
        Sshd::start_with(account, "")
    }

    /// With more lines in its configuration.
    pub fn start_with(account: Account, more: &str) -> Sshd {
        let dir = tempfile::tempdir().unwrap();
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let sshd = Sshd { child: None, port, dir };
        let ssh = sshd.home().join(".ssh");
        std::fs::create_dir_all(&ssh).unwrap();
        for kind in ["ed25519", "ecdsa"] {
            keygen(&sshd.file(&format!("host_{kind}")), &["-t", kind, "-N", ""]);
        }
        keygen(&ssh.join("id_ed25519"), &["-t", "ed25519", "-N", ""]);
        std::fs::copy(ssh.join("id_ed25519.pub"), sshd.file("authorized_keys")).unwrap();
        sshd.know("host_ed25519");
        let in_dir = |name: &str| sshd.file(name).display().to_string();
        let account = match account {
            // Relative paths start in a directory of our own: the account's real home is the user's.
            Account::Shell => format!("Subsystem sftp internal-sftp -d {}\n", in_dir("remote")),
            Account::SftpOnly => {
                "Subsystem sftp internal-sftp\nForceCommand internal-sftp\nAllowTcpForwarding no\n".into()
            }
            Account::ReadOnly => "Subsystem sftp internal-sftp -R\n".into(),
        };
        std::fs::create_dir(sshd.file("remote")).unwrap();
        let config = format!(
            "ListenAddress 127.0.0.1:{port}\nHostKey {}\nHostKey {}\nAuthorizedKeysFile {}\nStrictModes no\n\
             UsePAM no\nUseDNS no\nPidFile none\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n\
             PermitRootLogin yes\n{account}{more}",
            in_dir("host_ed25519"),
            in_dir("host_ecdsa"),
            in_dir("authorized_keys"),
        );
        std::fs::write(sshd.file("config"), config).unwrap();
        let mut sshd = sshd;
        sshd.up();
        sshd
    }

    /// Starts it, again on the same port.
    pub fn up(&mut self) {
        let mut command = Command::new(PROGRAM);
        command.arg("-D").arg("-e").arg("-f").arg(self.file("config"));
        let log = std::fs::File::options().create(true).append(true).open(self.file("log")).unwrap();
        // A group of its own, so that its sessions can be ended with it.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        self.child = Some(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap());
        let ready = until(PATIENCE, || {
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "sshd ended:\n{}", self.log());
            TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).is_ok()
        });
        assert!(ready, "sshd takes nothing:\n{}", self.log());
    }

    /// Kills it, and the sessions it serves.
    pub fn down(&mut self) {
        use rustix::process::{Pid, Signal, kill_process};
        let Some(mut child) = self.child.take() else { return };
        let send = |pids: &[u32], signal| {
            for pid in pids.iter().filter_map(|pid| Pid::from_raw(*pid as i32)) {
                let _ = kill_process(pid, signal);
            }
        };
        // Stopped first, until no more of them come: one that is made after a look at them would outlive it.
        send(&[child.id()], Signal::STOP);
        let mut sessions = Vec::new();
        loop {
            let now = descendants(child.id());
            send(&now, Signal::STOP);
            if now == sessions {
                break;
            }
            sessions = now;
        }
        send(&sessions, Signal::KILL);
        let _ = child.kill();
        let _ = child.wait();
    }

    /// Sessions it serves now.
    pub fn sessions(&self) -> usize {
        self.child.as_ref().map_or(0, |child| children(child.id()).len())
    }

    /// Writes a host key of it into the user's known_hosts.
    pub fn know(&self, host_key: &str) {
        let key = std::fs::read_to_string(self.file(&format!("{host_key}.pub"))).unwrap();
        std::fs::write(self.known_hosts(), format!("[127.0.0.1]:{} {key}", self.port)).unwrap();
    }

    pub fn known_hosts(&self) -> PathBuf {
        self.home().join(".ssh/known_hosts")
    }

    /// A file of the server's own.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The home directory of the client.
    pub fn home(&self) -> PathBuf {
        self.dir.path().join("home")
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// A repository's URL.
    pub fn url(&self, path: &Path) -> String {
        format!("scp://127.0.0.1:{}{}", self.port, path.display())
    }

    pub fn place(&self, path: &Path) -> SshPlace {
        let path = std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()).to_vec();
        SshPlace { user: None, host: "127.0.0.1".into(), port: Some(self.port), path }
    }

    /// The client's side: its home, no agent.
    pub fn local(&self) -> Local {
        Local { home: Some(self.home()), agent: None, ..Local::of_this_process() }
    }

    /// Gives a command the client's home, and nothing else of this user's SSH.
    pub fn with_home(&self, command: &mut Command) {
        command.env("HOME", self.home()).env_remove("SSH_AUTH_SOCK");
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.file("log")).unwrap_or_default()
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        self.down();
        if std::thread::panicking() {
            let log = self.log();
            let from = log.char_indices().map(|(at, _)| at).find(|at| at + 2000 > log.len()).unwrap_or(0);
            eprintln!("sshd's log ends:\n{}", &log[from..]);
        }
    }
}

/// Makes a key pair.
pub fn keygen(file: &Path, args: &[&str]) {
    run(Command::new("ssh-keygen").args(["-q", "-C", "test", "-f"]).arg(file).args(args)).ok();
}

fn children(parent: u32) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let of_parent = |pid: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // After the name, which may hold anything, come the state and the parent. One that is dead and not waited for is no process any more.
        let mut rest = stat.rsplit(") ").next().unwrap_or_default().split(' ');
        let is_alive = rest.next().is_some_and(|state| state != "Z");
        is_alive && rest.next().and_then(|ppid| ppid.parse().ok()) == Some(parent)
    };
    pids.filter(of_parent).collect()
}

fn descendants(pid: u32) -> Vec<u32> {
    let mut found = children(pid);
    let mut at = 0;
    while at < found.len() {
        found.extend(children(found[at]));
        at += 1;
    }
    found
}
