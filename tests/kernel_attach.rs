//! The daemon attaches volumes to a real kernel: nbd.ko in User Mode Linux, over netlink.
//!
//! Failures users of other systems reported, and the part of `attach.sh` that would find them:
//!
//! | failure | part |
//! |---|---|
//! | a server killed or restarted under a database: the filesystem goes read-only | daemons end under fio |
//! | devices leak, or are taken from each other | devices come and go; attached and detached many times |
//! | a mount that timed out comes about later, and nobody unmounts it | a repository that hangs |
//! | reconfigure with I/O in flight, twice, and while the old socket is alive | daemons end under fio |

#![allow(clippy::unwrap_used)]

use std::time::Duration;

mod harness;

use harness::{Guest, cli, guests, need, need_root, run, tree};

#[test]
fn volumes_are_kernel_devices_through_every_end_of_the_daemon() {
    if !guests() || !need(&["fio"]) || !need_root("for mounts and devices in the guest") {
        return;
    }
    let soak = std::env::var_os("HORCRUX_SOAK").is_some();
    let (rounds, loops, limit_s) = if soak { (50, 1000, 1800) } else { (4, 20, 420) };
    let dir = tempfile::tempdir().unwrap();
    let (source, repo) = (dir.path().join("src"), dir.path().join("repo"));
    tree::make(&source, 40, 7);
    tree::manifest(&source, &dir.path().join("manifest"));
    for (fs, name) in [("ext4", "image"), ("xfs", "other")] {
        run(cli().args(["image-from-dir", "--fs", fs, "--size", "1G", name]).arg(&source).arg(&repo)).ok();
    }
    run(cli().args(["image-from-dir", "--size", "64M", "third", "tests/harness"]).arg(&repo)).ok();
    let console = Guest::running(Duration::from_secs(limit_s))
        .env("HORCRUX_NBD", env!("CARGO_BIN_EXE_horcrux-nbd"))
        .env("HORCRUX_CLI", cli().get_program())
        .env("REPO", &repo)
        .env("MANIFEST", dir.path().join("manifest"))
        .env("ROUNDS", rounds.to_string())
        .env("LOOPS", loops.to_string())
        .run("attach.sh");
    println!("{console}");
    assert!(console.contains("everything attached and detached"), "{console}");
}
