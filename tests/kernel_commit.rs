//! A database in a real kernel is committed while it works: PostgreSQL under pgbench, its filesystem frozen for a moment each time.

use std::process::Command;
use std::time::Duration;

mod harness;

use harness::{
    Guest, cli, guests, in_tests, need, need_root, newest_postgres, run, run_within, soak, tree,
};

#[test]
fn a_database_under_load_is_committed_and_each_version_of_it_starts_and_checks_out() {
    if !guests() || !need_root("for mounts and devices in the guest") || !need(&["pgbench", "setpriv"]) {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (cluster, repo) = (dir.path().join("cluster"), dir.path().join("repo"));
    let mut fill = Command::new(in_tests("uml/postgres-cluster.sh"));
    run_within(fill.arg(&cluster).arg("3"), Duration::from_secs(180)).ok();
    run(cli().args(["image-from-dir", "--size", "1G", "AMCC"]).arg(&cluster).arg(&repo)).ok();
    let owner = run(Command::new("stat").args(["-c", "%u"]).arg(cluster.join("PG_VERSION"))).ok();
    let (commits, limit_s) = if soak() { ("20", 1800) } else { ("3", 420) };
    let console = Guest::running(Duration::from_secs(limit_s))
        .memory("1500M")
        .env("HORCRUX_NBD", env!("CARGO_BIN_EXE_horcrux-nbd"))
        .env("HORCRUX_CLI", cli().get_program())
        .env("REPO", &repo)
        .env("PGBIN", newest_postgres())
        .env("PGUID", owner.trim())
        .env("COMMITS", commits)
        .run("commit.sh");
    println!("{console}");
    assert!(console.contains("every version holds what it should"), "{console}");
}

#[test]
fn a_device_stands_still_wherever_it_is_mounted_or_the_commit_is_refused() {
    if !guests() || !need_root("for mounts and devices in the guest") || !need(&["fsfreeze", "unshare"]) {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (source, repo) = (dir.path().join("src"), dir.path().join("repo"));
    tree::make(&source, 10, 7);
    run(cli().args(["image-from-dir", "--size", "64M", "image"]).arg(&source).arg(&repo)).ok();
    let console = Guest::running(Duration::from_secs(240))
        .env("HORCRUX_NBD", env!("CARGO_BIN_EXE_horcrux-nbd"))
        .env("HORCRUX_CLI", cli().get_program())
        .env("REPO", &repo)
        .run("stand.sh");
    println!("{console}");
    assert!(console.contains("it stands still or it is refused"), "{console}");
}
