//! Commits and pushes where disks fill up, places lose what they had, and objects rot.
//!
//! | failure | test |
//! |---|---|
//! | a failed commit, and the next opening loses what was flushed since | `what_is_flushed_after_a_commit_that_failed_is_there_when_the_volume_opens_anew` |
//! | a check, and a write that comes after it | `what_is_written_while_a_checkout_asks_the_repository_is_not_lost_by_it` |
//! | a branch that names what is not there | `a_push_to_a_place_that_lost_what_it_had_brings_it_again_or_moves_nothing` |
//! | a clone that failed keeps its name for ever | `a_clone_that_found_the_disk_full_can_be_made_when_there_is_room` |
//! | one bad local copy beats the good one in the repository | `what_was_made_here_and_rots_is_read_from_the_repository` |
#![allow(clippy::unwrap_used)]

mod harness;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use harness::proxy::Proxy;
use harness::{
    Client, Image, PAGE, PATIENCE, Ran, Serve, Server, Tmpfs, cli, files_below, noise, run, until, volume,
    weed,
};
use serde_json::Value;

const MIB: usize = 1 << 20;

fn ask(state: &Path, args: &[&str]) -> Ran {
    run(cli().args(args).arg("--state-dir").arg(state))
}

#[track_caller]
fn json(state: &Path, args: &[&str]) -> Value {
    serde_json::from_str(&ask(state, &[args, &["--json"]].concat()).ok()).unwrap()
}

#[track_caller]
fn commit(state: &Path, name: &str) -> String {
    ask(state, &["commit", "-m", "x", "--wait", name]).ok().trim().to_owned()
}

fn create(image: &Image, state: &Path, name: &str, of: &str) {
    let repo = image.repo();
    volume(state, &["create", name, "--access", repo.to_str().unwrap(), "--name", of]).ok();
}

fn write(server: &Server, name: &str, bytes: &mut [u8], at: usize, data: &[u8]) {
    let mut client = Client::open(server, name);
    client.write(at as u64, data).unwrap();
    client.flush().unwrap();
    client.disconnect();
    bytes[at..at + data.len()].copy_from_slice(data);
}

fn read_all(server: &Server, name: &str, len: usize) -> Vec<u8> {
    let mut client = Client::open(server, name);
    let read =
        (0..len).step_by(4 * MIB).flat_map(|at| client.read(at as u64, (4 * MIB).min(len - at)).unwrap());
    let bytes = read.collect();
    client.disconnect();
    bytes
}

fn let_go(state: &Path, name: &str) {
    let free = || {
        let volume: Value = serde_json::from_str(&volume(state, &["inspect", name, "--json"]).ok()).unwrap();
        volume["open"].is_null() || volume["open"]["connections"] == 0
    };
    assert!(until(PATIENCE, free), "a connection to {name} does not end");
}

/// Puts a directory in the place of another.
fn put_back(copy: &Path, place: &Path) {
    std::fs::remove_dir_all(place).unwrap();
    run(Command::new("cp").arg("-a").args([copy, place])).ok();
}

#[test]
fn what_is_flushed_after_a_commit_that_failed_is_there_when_the_volume_opens_anew() {
    let image = Image::of(noise(4, 32 * MIB));
    let Some(disk) = Tmpfs::mount(128) else { return };
    let state = disk.path().join("state");
    let server = Serve::daemon(&state).arg("--cache-size").arg("16M").start();
    create(&image, &state, "v", "disk");
    let mut client = Client::open(&server, "v");
    // Each by itself: what the log has to say of them takes more than there will be.
    for page in (0..8192).step_by(2) {
        client.write((page * PAGE) as u64, &[7; PAGE]).unwrap();
    }
    let filler = disk.fill(40 << 10);
    let told = ask(&state, &["commit", "-m", "x", "--wait", "v"]).refused();
    assert!(told.contains("space"), "{told}");
    std::fs::remove_file(&filler).unwrap();
    client.write(PAGE as u64, &[9; PAGE]).unwrap();
    client.flush().unwrap();
    client.disconnect();
    let_go(&state, "v");
    // It is closed for this, and can't go.
    let filler = disk.fill(0);
    ask(&state, &["reset", "--force", "v"]).refused();
    std::fs::remove_file(&filler).unwrap();
    let mut client = Client::open(&server, "v");
    assert_eq!(client.read(0, 2 * PAGE).unwrap(), [[7; PAGE], [9; PAGE]].concat());
    client.disconnect();
    let_go(&state, "v");
    commit(&state, "v");
    server.stop();
}

#[test]
fn what_is_written_while_a_checkout_asks_the_repository_is_not_lost_by_it() {
    if !weed::weed() {
        return;
    }
    let (image, weed) = (Image::sparse(), weed::Weed::start());
    weed.store(&image, "repo");
    let proxy = Proxy::http(weed.address());
    let state = image.state();
    let server = Serve::daemon(&state).credentials(weed::ACCESS_KEY, weed::SECRET_KEY).start();
    let url = weed::url_at(proxy.address(), "repo");
    volume(&state, &["create", "v", "--access", &url, "--name", "disk"]).ok();
    let mut bytes = image.raw.clone();
    write(&server, "v", &mut bytes, 0, &[1; PAGE]);
    let_go(&state, "v");
    commit(&state, "v");
    ask(&state, &["push", "v"]).ok();
    // Now each question takes long.
    proxy.set_rtt(Duration::from_secs(3));
    let before = proxy.counts().requests;
    let mut command = cli();
    command.args(["checkout", "v", "HEAD~1", "--state-dir"]).arg(&state);
    let asking = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    assert!(until(PATIENCE, || proxy.counts().requests > before), "it asks nothing");
    write(&server, "v", &mut bytes, PAGE, &[2; PAGE]);
    let told = asking.wait_with_output().unwrap();
    let told = (told.status.success(), String::from_utf8_lossy(&told.stderr).into_owned());
    proxy.set_rtt(Duration::ZERO);
    let_go(&state, "v");
    assert!(!told.0 && (told.1.contains("not committed") || told.1.contains("in use")), "{told:?}");
    assert!(read_all(&server, "v", bytes.len()) == bytes, "{told:?}");
    server.stop();
}

#[test]
fn a_push_to_a_place_that_lost_what_it_had_brings_it_again_or_moves_nothing() {
    let image = Image::sparse();
    let (a, b) = (image.state(), image.dir().join("state-b"));
    let (on_a, on_b) = (Serve::daemon(&a).start(), Serve::daemon(&b).start());
    create(&image, &a, "v", "disk");
    let backup = image.dir().join("backup");
    run(Command::new("cp").arg("-a").args([&image.repo(), &backup])).ok();
    let mut bytes = image.raw.clone();
    write(&on_a, "v", &mut bytes, MIB, &noise(3, 3 * MIB));
    let_go(&a, "v");
    commit(&a, "v");
    ask(&a, &["push", "v"]).ok();
    create(&image, &b, "w", "disk");
    // Brought to B, but not made there.
    assert!(read_all(&on_b, "w", bytes.len()) == bytes);
    let_go(&b, "w");

    put_back(&backup, &image.repo());
    let told = ask(&b, &["push", "w", "elsewhere"]).refused();
    assert!(told.contains("is missing"), "{told}");
    assert!(!image.repo().join("images/disk/refs/heads/elsewhere").exists());

    write(&on_a, "v", &mut bytes, 0, &[1; PAGE]);
    let_go(&a, "v");
    commit(&a, "v");
    ask(&a, &["push", "v"]).ok();
    let c = image.dir().join("state-c");
    let on_c = Serve::daemon(&c).start();
    create(&image, &c, "u", "disk");
    assert!(read_all(&on_c, "u", bytes.len()) == bytes, "what was lost is there again");
    assert_eq!(json(&c, &["log", "u"]).as_array().unwrap().len(), 3);
    for server in [on_a, on_b, on_c] {
        server.stop();
    }
}

#[test]
fn a_branch_that_somebody_deleted_comes_back_only_if_it_is_named() {
    let image = Image::sparse();
    let state = image.state();
    let server = Serve::daemon(&state).start();
    create(&image, &state, "v", "disk");
    let mut bytes = image.raw.clone();
    write(&server, "v", &mut bytes, 0, &[1; PAGE]);
    commit(&state, "v");
    std::fs::remove_file(image.repo().join("images/disk/refs/heads/main")).unwrap();
    let told = ask(&state, &["push", "v"]).refused();
    assert!(told.starts_with("error: disk has no branch main any more\n"), "{told}");
    ask(&state, &["push", "v", "main"]).ok();
    server.stop();
}

#[test]
fn a_clone_that_found_the_disk_full_can_be_made_when_there_is_room() {
    let image = Image::sparse();
    let Some(disk) = Tmpfs::mount(64) else { return };
    let state = disk.path().join("state");
    let server = Serve::daemon(&state).arg("--cache-size").arg("16M").start();
    create(&image, &state, "v", "disk");
    let mut bytes = image.raw.clone();
    write(&server, "v", &mut bytes, 0, &noise(7, 2 * MIB));
    let_go(&state, "v");
    ask(&state, &["snapshot", "v"]).ok();
    let filler = disk.fill(0);
    let told = ask(&state, &["clone", "v", "w"]).refused();
    assert!(told.contains("space"), "{told}");
    std::fs::remove_file(&filler).unwrap();
    assert_eq!(ask(&state, &["clone", "v", "w"]).ok(), "w\n");
    assert!(read_all(&server, "w", bytes.len()) == bytes);
    server.stop();
}

#[test]
fn a_commit_that_can_t_be_made_is_given_up_by_force() {
    let image = Image::of(noise(4, 8 * MIB));
    let Some(disk) = Tmpfs::mount(96) else { return };
    let state = disk.path().join("state");
    let server = Serve::daemon(&state).arg("--cache-size").arg("16M").start();
    create(&image, &state, "v", "disk");
    let mut bytes = image.raw.clone();
    write(&server, "v", &mut bytes, 0, &noise(5, 6 * MIB));
    let_go(&state, "v");
    let _filler = disk.fill(3 << 20);
    ask(&state, &["commit", "-m", "much", "--wait", "v"]).refused();
    let told = ask(&state, &["reset", "v"]).refused();
    assert!(told.contains("a commit of volume v is being made") && told.contains("'--force'"), "{told}");
    ask(&state, &["reset", "--force", "v"]).ok();
    assert_eq!(json(&state, &["status", "v"])["being_made"], 0);
    assert!(read_all(&server, "v", image.raw.len()) == image.raw);
    server.stop();
}

#[test]
fn what_was_made_here_and_rots_is_read_from_the_repository() {
    let image = Image::sparse();
    let state = image.state();
    let server = Serve::daemon(&state).start();
    create(&image, &state, "v", "disk");
    let mut bytes = image.raw.clone();
    write(&server, "v", &mut bytes, 0, &noise(8, MIB));
    let_go(&state, "v");
    commit(&state, "v");
    ask(&state, &["push", "v"]).ok();
    server.stop();
    let objects = files_below(&state.join("made"));
    let objects = objects.iter().filter(|path| path.components().any(|part| part.as_os_str() == "blocks"));
    let mut spoilt = 0;
    for object in objects {
        let mut there = std::fs::read(object).unwrap();
        let half = there.len() / 2;
        there[half - 64..half].fill(0x5a);
        std::fs::write(object, there).unwrap();
        spoilt += 1;
    }
    assert!(spoilt > 0);
    std::fs::remove_dir_all(state.join("cache")).unwrap();
    let server = Serve::daemon(&state).start();
    assert!(read_all(&server, "v", bytes.len()) == bytes);
    server.stop();
}
