//! An object store that loses one of its servers, while an image is read and while one is stored.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod harness;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use harness::weed::{ACCESS_KEY, SECRET_KEY, url_at, weed, with_credentials};
use harness::weed_cluster::Cluster;
use harness::{Serve, cli, need, noise, run, until};

const MIB: usize = 1 << 20;

#[test]
fn a_volume_server_killed_under_reads_and_under_a_push_loses_nothing() {
    if !weed() || !need(&["nbdcopy"]) {
        return;
    }
    let mut cluster = Cluster::start();
    let dir = tempfile::tempdir().unwrap();
    let raw_file = dir.path().join("raw");
    let raw = noise(1, 48 * MIB);
    std::fs::write(&raw_file, &raw).unwrap();
    let url = url_at(cluster.address(), "r");
    let push = |name: &str| {
        let mut cli = cli();
        cli.args(["image-from-file", "-s", "4M", name]).arg(&raw_file).arg(&url);
        with_credentials(&mut cli, ACCESS_KEY, SECRET_KEY);
        cli
    };
    run(&mut push("disk")).ok();
    let read = |name: &str, state: &str| {
        let server = Serve::new(Path::new(&url), &dir.path().join(state))
            .name(name)
            .credentials(ACCESS_KEY, SECRET_KEY)
            .start();
        let copy = dir.path().join("copy");
        let reading = Command::new("nbdcopy").arg(server.uri(name)).arg(&copy).spawn().unwrap();
        (server, reading, copy)
    };

    // Under reads: cold, so each chunk comes from one of the three.
    let (server, mut reading, copy) = read("disk", "reading");
    std::thread::sleep(Duration::from_millis(50));
    cluster.kill_volume_server(0);
    assert!(until(Duration::from_secs(110), || reading.try_wait().unwrap().is_some()), "{}", server.log());
    assert!(reading.wait().unwrap().success(), "{}", server.log());
    assert!(std::fs::read(&copy).unwrap() == raw);
    server.stop();

    // Under a push, on what is left: another one goes, of two copies of anything one stays readable.
    drop(cluster);
    let mut cluster = Cluster::start();
    let url = url_at(cluster.address(), "r");
    let mut pushing = {
        let mut cli = cli();
        cli.args(["image-from-file", "-s", "4M", "disk"]).arg(&raw_file).arg(&url);
        with_credentials(&mut cli, ACCESS_KEY, SECRET_KEY);
        cli.stdout(Stdio::null()).spawn().unwrap()
    };
    std::thread::sleep(Duration::from_millis(700));
    cluster.kill_volume_server(1);
    assert!(
        until(Duration::from_secs(110), || pushing.try_wait().unwrap().is_some()),
        "the push does not end"
    );
    assert!(pushing.wait().unwrap().success(), "the push failed");
    let server = Serve::new(Path::new(&url), &dir.path().join("pushed"))
        .name("disk")
        .credentials(ACCESS_KEY, SECRET_KEY)
        .start();
    let copy = dir.path().join("pushed copy");
    run(Command::new("nbdcopy").arg(server.uri("disk")).arg(&copy)).ok();
    assert!(std::fs::read(&copy).unwrap() == raw);
    server.stop();
}
