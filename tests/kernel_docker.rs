//! Docker itself uses volumes, on a real kernel: dockerd, the driver, the daemon and nbd.ko in User Mode Linux.
//!
//! Failures users of other systems reported, and the part of `docker.sh` that would find them:
//!
//! | failure | part |
//! |---|---|
//! | a server killed under a container: its filesystem goes read-only | every restart there is |
//! | `docker cp` on a running container mounts and unmounts under the container's own id | copied in and out |
//! | dockerd restarts and forgets to unmount | dockerd goes without a word |
//! | the container writes into the bare directory | the guard below every mount; `mountpoint` |

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::Duration;

mod harness;

use harness::{Guest, cli, guests, need, need_root, run, tree};

#[test]
fn docker_uses_volumes_through_every_restart() {
    if !guests()
        || !need(&["dockerd", "containerd", "runc", "docker"])
        || !need_root("for dockerd in the guest")
    {
        return;
    }
    let soak = std::env::var_os("HORCRUX_SOAK").is_some();
    let (rounds, loops, limit_s) = if soak { (50, 200, 7200) } else { (3, 1, 600) };
    let dir = tempfile::tempdir().unwrap();
    let (source, repo) = (dir.path().join("src"), dir.path().join("repo"));
    tree::make(&source, 40, 7);
    tree::manifest(&source, &dir.path().join("manifest"));
    for (fs, name) in [("ext4", "image"), ("xfs", "other")] {
        run(cli().args(["image-from-dir", "--fs", fs, "--size", "1G", name]).arg(&source).arg(&repo)).ok();
    }
    let nbd = Path::new(env!("CARGO_BIN_EXE_horcrux-nbd"));
    let console = Guest::running(Duration::from_secs(limit_s))
        .env("HORCRUX_NBD", nbd)
        .env("HORCRUX_CLI", cli().get_program())
        .env("HORCRUX_DV", nbd.with_file_name("horcrux-dv"))
        .env("REPO", &repo)
        .env("MANIFEST", dir.path().join("manifest"))
        .env("ROUNDS", rounds.to_string())
        .env("LOOPS", loops.to_string())
        .run("docker.sh");
    println!("{console}");
    assert!(console.contains("everything made, used and removed by docker"), "{console}");
}
