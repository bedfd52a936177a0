//! A PostgreSQL data directory becomes a volume, and PostgreSQL runs on it inside a real kernel.

use std::process::Command;
use std::time::Duration;

mod harness;

use harness::{Guest, cli, guests, in_tests, need, need_root, newest_postgres, run, run_within, soak};

/// `pgbench -i -s 20`: about 300 MiB in 1,000 files.
const SCALE: &str = "20";

#[test]
fn postgres_runs_on_an_image_of_its_data_directory_and_its_pages_check_out() {
    if !guests() || !need_root("for mounts and devices in the guest") || !need(&["pgbench", "setpriv"]) {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (cluster, repo) = (dir.path().join("cluster"), dir.path().join("repo"));
    let mut fill = Command::new(in_tests("uml/postgres-cluster.sh"));
    run_within(fill.arg(&cluster).arg(SCALE), Duration::from_secs(180)).ok();
    let mut cli = cli();
    cli.args(["image-from-dir", "--size", "2G", "AMCC"]).arg(&cluster).arg(&repo);
    run(&mut cli).ok();
    let owner = run(Command::new("stat").args(["-c", "%u"]).arg(cluster.join("PG_VERSION"))).ok();
    let console = Guest::serving(&repo, "AMCC", Duration::from_secs(if soak() { 900 } else { 300 }))
        .env("FS", "ext4")
        .env("PGBIN", newest_postgres())
        .env("PGUID", owner.trim())
        .env("SECONDS_RUN", if soak() { "300" } else { "10" })
        .run("postgres.sh");
    assert!(console.contains("pg_amcheck: clean"), "{console}");
}
