//! Files of volumes that a real kernel has mounted.
#![allow(clippy::unwrap_used)]

mod harness;

use std::time::Duration;

use harness::{Guest, cli, guests, need_root, run, tree};

#[test]
fn files_of_a_mounted_volume_are_those_the_kernel_shows() {
    if !guests() || !need_root("for mounts and devices in the guest") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, repo) = (dir.path().join("src"), dir.path().join("repo"));
    tree::make(&source, 40, 7);
    for (fs, name) in [("ext4", "image"), ("xfs", "other")] {
        run(cli().args(["image-from-dir", "--fs", fs, "--size", "1G", name]).arg(&source).arg(&repo)).ok();
    }
    let console = Guest::running(Duration::from_secs(300))
        .env("HORCRUX_NBD", env!("CARGO_BIN_EXE_horcrux-nbd"))
        .env("HORCRUX_CLI", cli().get_program())
        .env("REPO", &repo)
        .run("files.sh");
    println!("{console}");
    assert!(console.contains("files of volumes are read"), "{console}");
}
