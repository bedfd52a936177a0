//! A real power cut: kernel, page cache and server of a writing machine vanish at a random moment; what was flushed is
//! there after the next boot, and the filesystem is clean.

use std::time::Duration;

mod harness;

use harness::{Guest, cli, guests, need_root, run, soak, tree};

/// For one boot: the server starts, the filesystem mounts, files are written or read back.
const BOOT_LIMIT: Duration = Duration::from_secs(180);

fn cut_with(fs: &str, rounds: u32) {
    if !guests() || !need_root("for mounts and devices in the guest") {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    tree::make(&dir.path().join("src"), 4, 3);
    tree::manifest(&dir.path().join("src"), &dir.path().join("manifest"));
    let repo = dir.path().join("repo");
    let mut cli = cli();
    cli.args(["image-from-dir", "--fs", fs, "--size", "512M", "image"])
        .arg(dir.path().join("src"))
        .arg(&repo);
    run(&mut cli).ok();
    let rounds = if soak() { rounds * 10 } else { rounds };
    let told = Guest::serving(&repo, "image", BOOT_LIMIT)
        .env("FS", fs)
        // XFS has sectors of 512 bytes here.
        .env("BLOCK", if fs == "xfs" { "512" } else { "4096" })
        .env("MANIFEST", dir.path().join("manifest"))
        .power_cuts(rounds);
    assert!(told.contains(&format!("{rounds} power cuts")), "{told}");
}

#[test]
fn flushed_files_on_ext4_are_there_after_every_power_cut() {
    cut_with("ext4", 3);
}

#[test]
fn flushed_files_on_xfs_are_there_after_every_power_cut() {
    cut_with("xfs", 2);
}
