//! Files of the daemon's volumes: as they are now, with what was written to them, and in any version of their image.
#![allow(clippy::unwrap_used)]

mod files_support;
mod harness;
#[path = "image_support/mod.rs"]
mod support;

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use files_support::{array, bytes};
use harness::{Client, Image, PAGE, Ran, Serve, cli, need, run, volume};
use serde_json::Value;
use support::noise;

/// A volume's image: an ext4 filesystem with a few files.
fn image() -> Image {
    let temp = tempfile::tempdir().unwrap();
    let (source, raw) = (temp.path().join("source"), temp.path().join("raw"));
    fs::create_dir_all(source.join("conf")).unwrap();
    fs::write(source.join("conf/main"), "a\nb\n").unwrap();
    fs::write(source.join("data"), noise(300_000, 7)).unwrap();
    fs::write(source.join("other"), noise(50_000, 8)).unwrap();
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.args(["-q", "-F", "-t", "ext4", "-b", "4096", "-d"]).arg(&source).arg(&raw).arg("16M");
    support::run(mke2fs.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin"));
    Image::of(fs::read(&raw).unwrap())
}

fn command(verb: &str, state: &Path, args: &[&str]) -> Command {
    let mut command = cli();
    command.arg(verb).args(args).arg("--state-dir").arg(state);
    command
}

fn asked(verb: &str, state: &Path, args: &[&str]) -> Ran {
    run(&mut command(verb, state, args))
}

#[test]
fn files_of_a_volume_are_those_of_its_version_and_its_writes() {
    if !need(&["mke2fs"]) {
        return;
    }
    let image = image();
    let state = image.state();
    let server = Serve::daemon(&state).start();
    image.volume("v1", &[]).ok();
    assert_eq!(asked("ls", &state, &["v1"]).ok(), "conf\ndata\nlost+found\nother\n");
    assert_eq!(asked("ls", &state, &["v1", "-R", "conf"]).ok(), "conf/main\n");
    assert_eq!(asked("cat", &state, &["v1", "conf/main"]).ok(), "a\nb\n");
    assert!(bytes(&mut command("cat", &state, &["v1@main", "data"])) == noise(300_000, 7));
    assert_eq!(asked("diff", &state, &["v1", "--name-status"]).ok(), "", "nothing was written");
    assert_eq!(asked("diff", &state, &["v1", "--blocks"]).ok(), "0 ranges, 0 B\n");

    // Into the content of a file, as a filesystem would.
    let block =
        |wanted: &[u8]| image.raw.chunks(PAGE).position(|page| page.starts_with(wanted)).unwrap() as u64;
    let data = block(&noise(300_000, 7)[..PAGE]);
    let mut client = Client::open(&server, "v1");
    client.write((data + 3) * PAGE as u64, &[7; PAGE]).unwrap();
    let text = block(b"a\nb\n");
    let mut page = vec![0; PAGE];
    page[..4].copy_from_slice(b"a\nB\n");
    client.write(text * PAGE as u64, &page).unwrap();
    client.disconnect();

    assert_eq!(asked("diff", &state, &["v1", "--name-status"]).ok(), "M\tconf/main\nM\tdata\n");
    let patch = asked("diff", &state, &["v1"]).ok();
    assert!(patch.contains("@@ -1,2 +1,2 @@\n a\n-b\n+B\n"), "{patch}");
    let blocks = array(&asked("diff", &state, &["v1", "--blocks", "--json"]).ok());
    let mut pages: Vec<u64> =
        blocks.iter().map(|range| range["start"].as_u64().unwrap() / PAGE as u64).collect();
    pages.sort_unstable();
    let mut want = vec![data + 3, text];
    want.sort_unstable();
    assert_eq!(pages, want);
    assert_eq!(asked("cat", &state, &["v1", "conf/main"]).ok(), "a\nB\n");
    assert_eq!(asked("cat", &state, &["v1@main", "conf/main"]).ok(), "a\nb\n", "the version is what it was");
    assert_eq!(asked("diff", &state, &["v1", "main", "main"]).ok(), "");
    assert_eq!(asked("diff", &state, &["v1", "main", "--name-status"]).ok(), "M\tconf/main\nM\tdata\n");

    let archive = image.dir().join("archive.tar");
    asked("export", &state, &["v1", "conf", "-o", archive.to_str().unwrap()]).ok();
    let listed = support::run(Command::new("tar").arg("-tf").arg(&archive));
    assert_eq!(listed, "./\nmain\n");

    // A second version of the image; the volume keeps the first.
    let mut second = image.raw.clone();
    second[(data * PAGE as u64) as usize] ^= 1;
    let raw = image.dir().join("second");
    fs::write(&raw, &second).unwrap();
    image.store("disk", &raw);
    assert_eq!(asked("diff", &state, &["v1", "main~1", "main", "--name-status"]).ok(), "M\tdata\n");
    assert_eq!(asked("diff", &state, &["v1", "main", "--name-status"]).ok(), "M\tconf/main\nM\tdata\n");
    assert_eq!(asked("diff", &state, &["v1@main", "main~1", "--name-status"]).ok(), "M\tdata\n");
    assert_eq!(
        asked("diff", &state, &["v1@main", "main~1", "main"]).refused(),
        "error: three versions are named: main and two more; two can be compared\nhint: leave one out\n"
    );
    let shown: Value = serde_json::from_str(&asked("show", &state, &["v1@main", "--json"]).ok()).unwrap();
    assert_eq!(shown["changes"][0]["path"], "data");
    server.stop();
}

#[test]
fn what_a_volume_has_not_is_refused_with_the_reason() {
    if !need(&["mke2fs"]) {
        return;
    }
    let image = image();
    let state = image.state();
    let server = Serve::daemon(&state).start();
    image.volume("v1", &[]).ok();
    assert_eq!(asked("cat", &state, &["v1", "nothing"]).refused(), "error: v1: there is no nothing\n");
    assert_eq!(
        asked("cat", &state, &["v1", "conf"]).refused(),
        "error: v1: conf is a directory, not a file\n"
    );
    let refused = asked("ls", &state, &["v2"]).refused();
    assert!(refused.starts_with("error: there is no volume v2; there is: v1\nhint: "), "{refused}");
    let refused = asked("ls", &state, &["v1@nothing"]).refused();
    assert!(refused.contains("nothing") && refused.contains("main"), "{refused}");
    let raw = image.dir().join("noise");
    let mut xfs = vec![0; 4 << 20];
    xfs[..4].copy_from_slice(b"XFSB");
    fs::write(&raw, xfs).unwrap();
    image.store("xfs", &raw);
    let repo = image.repo();
    volume(&state, &["create", "x", "--access", repo.to_str().unwrap(), "--name", "xfs"]).ok();
    assert_eq!(
        asked("ls", &state, &["x"]).refused(),
        "error: x: this is an XFS filesystem: its files are read through a mount\nhint: 'horcrux-cli mount x DIR' mounts it, as root\n"
    );
    server.stop();
}

#[test]
fn an_answer_the_daemon_did_not_end_is_no_success() {
    if !need(&["mke2fs"]) {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let (source, raw) = (temp.path().join("source"), temp.path().join("raw"));
    fs::create_dir(&source).unwrap();
    fs::write(source.join("data"), noise(24 << 20, 7)).unwrap();
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.args(["-q", "-F", "-t", "ext4", "-d"]).arg(&source).arg(&raw).arg("48M");
    support::run(mke2fs.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin"));
    let image = Image::of(fs::read(&raw).unwrap());
    let state = image.state();
    let mut server = Serve::daemon(&state).start();
    image.volume("v1", &[]).ok();
    for verb in ["cat", "export"] {
        let mut child = command(verb, &state, &["v1", "data"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It has begun, and as nobody reads on it waits.
        let mut out = child.stdout.take().unwrap();
        out.read_exact(&mut [0; 1000]).unwrap();
        server.kill();
        let rest = std::io::copy(&mut out, &mut std::io::sink()).unwrap();
        assert!(rest < 24 << 20, "the pipes between take less than the file");
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(harness::wait(&mut child, harness::PATIENCE).unwrap().code(), Some(1), "{verb}: {said}");
        assert!(said.starts_with("error: the daemon's answer was cut short: "), "{said}");
        assert!(said.ends_with("hint: if the daemon still runs, its log says why\n"), "{said}");
        server = Serve::daemon(&state).start();
    }
    server.stop();
}

#[test]
fn damage_that_is_met_while_a_volume_is_read_is_told() {
    if !need(&["mke2fs", "debugfs"]) {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let (source, raw) = (temp.path().join("source"), temp.path().join("raw"));
    fs::create_dir_all(source.join("a/b")).unwrap();
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.args(["-q", "-F", "-t", "ext4", "-O", "^metadata_csum", "-d"]).arg(&source).arg(&raw).arg("8M");
    support::run(mke2fs.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin"));
    support::run(Command::new("/sbin/debugfs").args(["-w", "-R", "link a a/b/up"]).arg(&raw));
    let image = Image::of(fs::read(&raw).unwrap());
    let state = image.state();
    let server = Serve::daemon(&state).start();
    image.volume("v1", &[]).ok();
    let refused = asked("ls", &state, &["-R", "v1"]).refused();
    assert!(refused.starts_with("error: v1: the filesystem is damaged: directory "), "{refused}");
    assert!(refused.contains("it is in more than one place\nhint: "), "{refused}");
    server.stop();
}
