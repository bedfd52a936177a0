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

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

mod harness;

use harness::{
    Guest, cli, fetched, guests, in_tests, need, need_root, newest_postgres, run, run_within, soak, sshd,
    tree, weed,
};

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

/// Where the programs under test are.
fn programs() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_horcrux-nbd")).parent().unwrap()
}

fn guest(limit: Duration, repo: &Path) -> Guest {
    Guest::running(limit)
        .env("HORCRUX_NBD", programs().join("horcrux-nbd"))
        .env("HORCRUX_CLI", cli().get_program())
        .env("HORCRUX_DV", programs().join("horcrux-dv"))
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
    let (rounds, loops, cold, limit_s) = if soak() { (50, 200, 5, 7200) } else { (3, 1, 1, 600) };
    let dir = tempfile::tempdir().unwrap();
    let repo = images(dir.path());
    run(cli().args(["image-from-dir", "--size", "1T", "big"]).arg(dir.path().join("src")).arg(&repo)).ok();
    let console = guest(Duration::from_secs(limit_s), &repo)
        .env("MANIFEST", dir.path().join("manifest"))
        .env("ROUNDS", rounds.to_string())
        .env("LOOPS", loops.to_string())
        .env("COLD", cold.to_string())
        .run("docker.sh");
    println!("{console}");
    assert!(console.contains("everything made, used and removed by docker"), "{console}");
}

/// A home as JIRA keeps one: settings, and attachments by project, by thousand and by issue.
fn jira_home(dir: &Path, issues: u32) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("dbconfig.xml"), "<jira-database-config/>").unwrap();
    for issue in 0..issues {
        let at = dir.join(format!("data/attachments/PRJ{}/10000/PRJ{}-{issue}", issue % 5, issue % 5));
        std::fs::create_dir_all(&at).unwrap();
        for (number, length) in [(1, 300), (2, 4096), (3, 20_000)] {
            let text = format!("attachment {number} of issue {issue}; ").repeat(length / 20);
            std::fs::write(at.join(format!("{}", 10_000 + issue * 3 + number)), text).unwrap();
        }
    }
}

#[test]
fn a_database_on_seaweedfs_and_a_home_on_an_ssh_host_are_used_by_containers() {
    if !guests()
        || !need(&["dockerd", "containerd", "runc", "docker", "docker-compose", "curl", "pgbench", "setpriv"])
        || !weed::weed()
        || !sshd::sshd()
        || !need_root("for dockerd in the guest")
    {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (cluster, home) = (dir.path().join("cluster"), dir.path().join("home"));
    run_within(
        Command::new(in_tests("uml/postgres-cluster.sh")).arg(&cluster).arg("1"),
        Duration::from_secs(180),
    )
    .ok();
    let owner = std::fs::metadata(cluster.join("PG_VERSION")).unwrap().uid();
    jira_home(&home, 500);
    tree::manifest(&home, &dir.path().join("manifest"));
    let console = guest(Duration::from_secs(600), Path::new("none"))
        .env("WEED", fetched("weed"))
        .env("FAULT_PROXY", programs().join("examples/fault_proxy"))
        .env("PG", &cluster)
        .env("PGUID", owner.to_string())
        .env("PGBIN", newest_postgres())
        .env("HOME_DIR", &home)
        .env("MANIFEST", dir.path().join("manifest"))
        .run("story.sh");
    println!("{console}");
    assert!(console.contains("the story is over, and nothing is left"), "{console}");
}

#[test]
fn podman_uses_volumes_by_the_same_driver() {
    if !guests() || !need(&["podman", "conmon", "runc"]) || !need_root("for podman in the guest") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let repo = images(dir.path());
    let console = guest(Duration::from_secs(300), &repo).run("podman.sh");
    println!("{console}");
    assert!(console.contains("used a volume"), "{console}");
}

#[test]
fn a_managed_plugin_is_the_driver_and_the_daemon_in_one() {
    if !guests()
        || !need(&["dockerd", "containerd", "runc", "docker", "strip"])
        || !need_root("for dockerd in the guest")
    {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (repo, plugin) = (images(dir.path()), dir.path().join("plugin"));
    let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("plugin/managed/build.sh");
    run(Command::new(build).arg(programs()).arg(&plugin)).ok();
    let console = guest(Duration::from_secs(300), &repo)
        .env("PLUGIN", &plugin)
        .env("REPOSITORIES", repo.parent().unwrap())
        .run("managed.sh");
    println!("{console}");
    assert!(console.contains("the managed plugin came and went"), "{console}");
}

/// With `HORCRUX_RECORD` set, what dockerd calls is written down anew first.
#[test]
fn dockerd_s_calls_made_again_are_answered_as_they_were() {
    if !guests() || !need_root("for mounts and devices in the guest") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (repo, transcript) = (images(dir.path()), in_tests("dockerd-20.10.jsonl"));
    if std::env::var_os("HORCRUX_RECORD").is_some() {
        let calls = dir.path().join("calls");
        let console = guest(Duration::from_secs(600), &repo).env("RECORD", &calls).run("record.sh");
        assert!(console.contains("Docker's calls are written down"), "{console}");
        std::fs::copy(&calls, &transcript).unwrap();
    }
    let console = guest(Duration::from_secs(120), &repo).env("TRANSCRIPT", transcript).run("replay.sh");
    println!("{console}");
    assert!(console.contains("every call was answered as before"), "{console}");
}
