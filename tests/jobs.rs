//! Pinning through the daemon: a job that tells how far it is, ends early where it is told to, and leaves nothing kept that is not pinned.
#![allow(clippy::unwrap_used)]

mod harness;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use harness::proxy::{Proxy, Reach};
use harness::weed::{self, Weed};
use harness::{Client, Image, PATIENCE, Ran, Serve, cli, noise, run, until, wait};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const MIB: usize = 1 << 20;
/// So slow that a pin of all takes longer than the test looks at it.
const NARROW: u64 = 2_000_000;

fn ask(state: &Path, args: &[&str]) -> Ran {
    run(command(state, args).stdin(Stdio::null()))
}

fn command(state: &Path, args: &[&str]) -> Command {
    let mut command = cli();
    command.args(args).arg("--state-dir").arg(state);
    command
}

fn json(state: &Path, args: &[&str]) -> Value {
    serde_json::from_str(&ask(state, args).ok()).unwrap()
}

/// The newest job.
fn job(state: &Path) -> Value {
    json(state, &["jobs", "--json"]).as_array().unwrap().last().unwrap().clone()
}

#[test]
fn a_pin_is_a_job_that_can_be_watched_and_cancelled() {
    if !weed::weed() {
        return;
    }
    let weed = Weed::start();
    let proxy = Proxy::http(weed.address());
    let image = Image::of(noise(71, 24 * MIB));
    let far = weed::url_at(proxy.address(), "repo");
    weed.store(&image, "repo");
    let state = image.state();
    let daemon = || {
        let serve = Serve::daemon(&state).credentials(weed::ACCESS_KEY, weed::SECRET_KEY);
        serve.arg("--remote-timeout").arg("3").start()
    };
    let server = daemon();
    ask(&state, &["volume", "create", "v", "--access", &far, "--name", "disk"]).ok();
    assert_eq!(ask(&state, &["jobs"]).ok(), "");

    proxy.set_bandwidth(Some(NARROW));
    assert_eq!(ask(&state, &["pin", "v", "--no-wait"]).ok(), "job 1\n");
    assert_eq!(ask(&state, &["pin", "v", "--no-wait"]).ok(), "job 1\n", "it is under way");
    assert!(until(PATIENCE, || job(&state)["done_bytes"].as_u64().unwrap() > 0));
    let running = job(&state);
    assert_eq!(
        (&running["kind"], &running["state"]),
        (&Value::from("pin"), &Value::from("running")),
        "{running}"
    );
    assert_eq!(running["total_bytes"], 24 * MIB);
    assert!(running["done_bytes"].as_u64().unwrap() < 24 * MIB as u64, "{running}");
    assert_eq!(json(&state, &["volume", "inspect", "v", "--json"])["pinned"], false);
    for args in [&["volume", "rm", "v"][..], &["unpin", "v"]] {
        let said = ask(&state, args).refused();
        assert!(said.starts_with("error: volume v is in use: job 1 fetches all of it\nhint: "), "{said}");
    }
    assert_eq!(ask(&state, &["jobs", "cancel", "1"]).ok(), "job 1: cancelled\n");
    let said = ask(&state, &["jobs", "cancel", "99"]).refused();
    assert_eq!(said, "error: there is no job 99\nhint: 'horcrux-cli jobs' lists them\n");
    assert_eq!(json(&state, &["volume", "inspect", "v", "--json"])["pinned"], false);

    // Whoever waits for it and is interrupted cancels it.
    let mut waiting = command(&state, &["pin", "v"]).stderr(Stdio::piped()).spawn().unwrap();
    assert!(until(PATIENCE, || job(&state)["id"] == 2 && job(&state)["state"] == "running"));
    // It has to have asked before it listens for the signal.
    std::thread::sleep(Duration::from_millis(500));
    kill_process(Pid::from_child(&waiting), Signal::INT).unwrap();
    assert_eq!(wait(&mut waiting, PATIENCE).unwrap().code(), Some(1));
    assert_eq!(job(&state)["state"], "cancelled");

    // One that fails says why.
    proxy.set_reach(Reach::Refusing);
    let said = ask(&state, &["pin", "v"]).refused();
    assert!(said.contains("repo/ at") && job(&state)["state"] == "failed", "{said}");
    proxy.set_reach(Reach::Here);
    proxy.set_bandwidth(None);
    assert_eq!(ask(&state, &["pin", "v"]).ok(), "v: all of it is here and stays\n");
    assert_eq!(json(&state, &["volume", "inspect", "v", "--json"])["pinned"], true);
    let cached = || json(&state, &["volume", "inspect", "v", "--json"])["cached_bytes"].as_u64();
    assert!(until(PATIENCE, || cached() == Some(24 * MIB as u64)), "{:?}", cached());
    let lines = ask(&state, &["jobs"]).ok();
    assert!(lines.starts_with("1: pin v, ") && lines.contains("24.0 MiB of 24.0 MiB, done in "), "{lines}");
    server.stop();

    proxy.set_reach(Reach::Refusing);
    let server = daemon();
    assert_eq!(Client::open(&server, "v").read(0, 24 * MIB).unwrap(), image.raw);
    assert_eq!(ask(&state, &["unpin", "v"]).ok(), "v: may leave the cache\n");
    assert_eq!(json(&state, &["volume", "inspect", "v", "--json"])["pinned"], false);
    server.stop();
}

#[test]
fn a_pin_ends_though_another_volume_waits_for_its_repository() {
    if !weed::weed() {
        return;
    }
    let weed = Weed::start();
    let proxy = Proxy::http(weed.address());
    let (image, other) = (Image::of(noise(74, 8 * MIB)), Image::of(noise(75, 8 * MIB)));
    let (near, far) = (image.repo().display().to_string(), weed::url_at(proxy.address(), "repo"));
    weed.store(&other, "repo");
    let state = image.state();
    let serve = Serve::daemon(&state).credentials(weed::ACCESS_KEY, weed::SECRET_KEY);
    let server = serve.arg("--remote-timeout").arg("60").start();
    ask(&state, &["volume", "create", "v", "--access", &near, "--name", "disk"]).ok();
    ask(&state, &["volume", "create", "w", "--access", &far, "--name", "disk"]).ok();
    let mut reader = Client::open(&server, "w");
    reader.read(0, 4096).unwrap();
    proxy.set_reach(Reach::Silent);
    std::thread::scope(|scope| {
        let reading = scope.spawn(move || reader.read(4 * MIB as u64, MIB));
        std::thread::sleep(Duration::from_millis(500));
        let pin = wait(&mut command(&state, &["pin", "v"]).spawn().unwrap(), Duration::from_secs(20));
        assert!(pin.is_some_and(|status| status.success()), "it did not end: {}", job(&state));
        assert!(!reading.is_finished(), "nothing was waited for");
        proxy.set_reach(Reach::Here);
        let _ = reading.join().unwrap();
    });
    server.stop();
}

#[test]
fn a_pinned_volume_that_nobody_opened_yet_keeps_its_chunks() {
    let image = Image::of(noise(72, 10 * MIB));
    std::fs::write(image.raw_file(), noise(73, 24 * MIB)).unwrap();
    image.store("big", &image.raw_file());
    let state = image.state();
    let repo = image.repo().display().to_string();
    let daemon = || Serve::daemon(&state).arg("--cache-size").arg("20M").start();
    let server = daemon();
    ask(&state, &["volume", "create", "small", "--access", &repo, "--name", "disk"]).ok();
    ask(&state, &["volume", "create", "big", "--access", &repo, "--name", "big"]).ok();
    let said = ask(&state, &["pin", "big"]).refused();
    assert!(said.contains("volume big needs 24.0 MiB of the cache"), "{said}");
    ask(&state, &["pin", "small"]).ok();
    server.stop();
    // The other one goes by twice, and `small` was not asked for.
    let server = daemon();
    for _ in 0..2 {
        assert_eq!(Client::open(&server, "big").read(0, 24 * MIB).unwrap().len(), 24 * MIB);
    }
    std::fs::rename(image.repo(), image.dir().join("away")).unwrap();
    assert_eq!(Client::open(&server, "small").read(0, 10 * MIB).unwrap(), image.raw);
    server.stop();
}
