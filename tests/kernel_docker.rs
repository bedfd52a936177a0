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

use std::path::{Path, PathBuf};
use std::time::Duration;

mod harness;

use harness::{Guest, cli, guests, in_tests, need, need_root, run, tree};

/// The images both tests use, in a repository.
fn images(dir: &Path) -> PathBuf {
    let (source, repo) = (dir.join("src"), dir.join("repo"));
    tree::make(&source, 40, 7);
    tree::manifest(&source, &dir.join("manifest"));
    for (fs, name) in [("ext4", "image"), ("xfs", "other")] {
        run(cli().args(["image-from-dir", "--fs", fs, "--size", "1G", name]).arg(&source).arg(&repo)).ok();
    }
    repo
}

fn guest(limit: Duration, repo: &Path) -> Guest {
    let nbd = Path::new(env!("CARGO_BIN_EXE_horcrux-nbd"));
    Guest::running(limit)
        .env("HORCRUX_NBD", nbd)
        .env("HORCRUX_CLI", cli().get_program())
        .env("HORCRUX_DV", nbd.with_file_name("horcrux-dv"))
        .env("REPO", repo)
}

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
    let repo = images(dir.path());
    let console = guest(Duration::from_secs(limit_s), &repo)
        .env("MANIFEST", dir.path().join("manifest"))
        .env("ROUNDS", rounds.to_string())
        .env("LOOPS", loops.to_string())
        .run("docker.sh");
    println!("{console}");
    assert!(console.contains("everything made, used and removed by docker"), "{console}");
}

const TRANSCRIPT: &str = "dockerd-20.10.jsonl";

#[test]
fn dockerd_s_calls_made_again_are_answered_as_they_were() {
    if !guests() || !need_root("for mounts and devices in the guest") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let repo = images(dir.path());
    let console =
        guest(Duration::from_secs(120), &repo).env("TRANSCRIPT", in_tests(TRANSCRIPT)).run("replay.sh");
    println!("{console}");
    assert!(console.contains("every call was answered as before"), "{console}");
}

#[test]
#[ignore = "writes the transcript anew: `cargo nextest run --run-ignored only -E 'test(written_down)'`"]
fn dockerd_s_calls_are_written_down() {
    let dir = tempfile::tempdir().unwrap();
    let (repo, calls) = (images(dir.path()), dir.path().join("calls"));
    let console = guest(Duration::from_secs(600), &repo).env("RECORD", &calls).run("record.sh");
    assert!(console.contains("Docker's calls are written down"), "{console}");
    std::fs::copy(&calls, in_tests(TRANSCRIPT)).unwrap();
}
