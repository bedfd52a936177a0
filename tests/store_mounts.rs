//! Repositories in directories of network filesystems, GlusterFS and NFS: a plain path is as good there. In the soak: their packages are large.
//!
//! The filesystem is mounted in namespaces, or in a guest kernel, of its own; this program runs itself there again with [`INSIDE`] as its only test.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

#[path = "common/store_contract.rs"]
mod contract;
mod harness;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use harness::{Guest, Serve, cli, guests, in_tests, need, need_root, noise, run, run_within, soak, until};
use horcrux::store::{DirStore, Store};

const INSIDE: &str = "on_the_mount_helper";
const LIMIT: Duration = Duration::from_secs(300);

/// The contract, and an image that is stored twice and read. Run by the tests below, on the mount they make; on its own it has nothing to do.
#[test]
fn on_the_mount_helper() {
    let Some(mount) = std::env::var_os("HORCRUX_MOUNT").map(PathBuf::from) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap();
    let root = mount.join("contract");
    runtime.block_on(contract::run(|| async { Arc::new(DirStore::new(&root)) as Arc<dyn Store> }));
    println!("the contract is kept");

    let dir = tempfile::tempdir().unwrap();
    let (raw_file, repo) = (dir.path().join("raw"), mount.join("repo"));
    let mut raw = noise(1, 24 << 20);
    for version in 0..2u8 {
        raw[5 << 20..(5 << 20) + 4096].fill(version);
        std::fs::write(&raw_file, &raw).unwrap();
        let said = run(cli().args(["image-from-file", "-s", "4M", "disk"]).arg(&raw_file).arg(&repo)).ok();
        assert!(said.contains("stored as"), "{said}");
    }
    let server = Serve::new(&repo, &dir.path().join("state")).name("disk").start();
    let copy = dir.path().join("copy");
    let mut reading = Command::new("nbdcopy").arg(server.uri("disk")).arg(&copy).spawn().unwrap();
    if let Ok(brick) = std::env::var("HORCRUX_BRICK") {
        let brick = rustix::process::Pid::from_raw(brick.parse().unwrap()).unwrap();
        rustix::process::kill_process(brick, rustix::process::Signal::KILL).unwrap();
    }
    assert!(until(LIMIT, || reading.try_wait().unwrap().is_some()), "{}", server.log());
    assert!(reading.wait().unwrap().success(), "{}", server.log());
    assert!(std::fs::read(&copy).unwrap() == raw, "what came back is not what went up");
    server.stop();
    println!("an image is kept");
}

fn wanted() -> bool {
    if !soak() {
        eprintln!("skipped: only in the soak");
    }
    soak()
}

fn check(said: &str) {
    for kept in ["the contract is kept", "an image is kept"] {
        assert!(said.contains(kept), "{said}");
    }
}

#[test]
fn a_repository_on_glusterfs_keeps_the_contract_and_outlives_a_brick() {
    if !wanted() || !need(&["glusterd", "gluster", "mount.glusterfs", "nbdcopy", "ip", "unshare"]) {
        return;
    }
    if !need_root("to mount GlusterFS") {
        return;
    }
    // Bricks need extended attributes, which a tmpfs may not keep.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut command = Command::new("unshare");
    command.args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    command.arg(in_tests("mounts/gluster.sh")).arg(dir.path());
    command.arg(std::env::current_exe().unwrap()).args(["--exact", INSIDE, "--nocapture"]);
    let ran = run_within(&mut command, LIMIT);
    let log = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap_or_default();
    assert!(ran.status.success(), "{}{}\n{}", ran.stdout, ran.stderr, log("mount.log"));
    check(&ran.ok());
}

#[test]
fn a_repository_on_nfs_keeps_the_contract() {
    if !wanted() || !guests() || !need(&["exportfs", "rpc.nfsd", "rpc.mountd", "mount.nfs4", "nbdcopy"]) {
        return;
    }
    let program = std::env::current_exe().unwrap();
    let command = format!("{} --exact {INSIDE} --nocapture", quoted(&program));
    check(&Guest::running(LIMIT).env("COMMAND", command).run("nfs.sh"));
}

fn quoted(path: &Path) -> String {
    format!("'{}'", path.to_str().unwrap())
}
