//! The daemon and the device it serves on one machine that is short of memory.
//!
//! Failures users of other systems reported, and the test here that would find them:
//!
//! | failure | test |
//! |---|---|
//! | writeback to a device waits for its server, and the server for memory: the machine stands still, or the server is killed | `far_more_dirty_data_than_memory_neither_stops_the_machine_nor_kills_the_daemon` |

#![allow(clippy::unwrap_used)]

use std::time::Duration;

mod harness;

use harness::{Guest, cli, guests, need, need_root, run, tree};

/// Megabytes that are free, and a quarter of what is written.
const FREE_MIB: u64 = 256;

#[test]
fn far_more_dirty_data_than_memory_neither_stops_the_machine_nor_kills_the_daemon() {
    if !guests() || !need(&["fio", "mke2fs"]) || !need_root("for mounts and devices in the guest") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, repo, disk) = (dir.path().join("src"), dir.path().join("repo"), dir.path().join("disk"));
    tree::make(&source, 10, 7);
    run(cli().args(["image-from-dir", "--size", "2G", "image"]).arg(&source).arg(&repo)).ok();
    std::fs::File::create(&disk).unwrap().set_len(3 << 30).unwrap();
    let console = Guest::running(Duration::from_secs(300))
        .memory("640M")
        .disk(&disk)
        .env("HORCRUX_NBD", env!("CARGO_BIN_EXE_horcrux-nbd"))
        .env("HORCRUX_CLI", cli().get_program())
        .env("REPO", &repo)
        .env("FREE_MIB", FREE_MIB.to_string())
        .run("squeeze.sh");
    println!("{console}");
    assert!(console.contains("written and read back through a memory a quarter its size"), "{console}");
}
