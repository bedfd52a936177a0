//! A real kernel uses the disk: nbd.ko in User Mode Linux attaches the volume, mounts it, compares the tree with the
//! directory the image was made of, writes, detaches, and finds the writes when it is served again.

use std::path::Path;
use std::time::Duration;

mod harness;

use harness::{Guest, cli, guests, need_root, run, tree};

/// One boot with all its work takes some 20 s on an idle machine of two cores.
const GUEST_LIMIT: Duration = Duration::from_secs(240);

/// An image of a tree with everything in it, in a repository below `dir`; its manifest is `dir/manifest`.
fn image(dir: &Path, fs: &str) {
    tree::make(&dir.join("src"), 40, 7);
    tree::manifest(&dir.join("src"), &dir.join("manifest"));
    let mut cli = cli();
    cli.args(["image-from-dir", "--fs", fs, "--size", "1G", "image"])
        .arg(dir.join("src"))
        .arg(dir.join("repo"));
    run(&mut cli).ok();
}

fn mounted_by_the_kernel(fs: &str, transport: &str, connections: &str, block: &str) {
    if !guests() || !need_root("for mounts and devices in the guest") {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    image(dir.path(), fs);
    let console = Guest::serving(&dir.path().join("repo"), "image", GUEST_LIMIT)
        .env("FS", fs)
        .env("MANIFEST", dir.path().join("manifest"))
        .env("TRANSPORT", transport)
        .env("CONNECTIONS", connections)
        .env("BLOCK", block)
        .run("mount.sh");
    assert!(console.contains("the second serving has the writes"), "{console}");
}

#[test]
fn ext4_over_four_connections_is_its_source_and_keeps_what_was_written() {
    mounted_by_the_kernel("ext4", "unix", "4", "4096");
}

#[test]
fn xfs_over_tcp_in_sectors_of_512_is_its_source_and_keeps_what_was_written() {
    mounted_by_the_kernel("xfs", "tcp", "1", "512");
}
