//! Pinning volumes, and looking after the cache with the commands users type.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod harness;

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use harness::{Image, Ran, Serve, cli, need, noise, run};

fn care(state: &Path, args: &[&str]) -> Ran {
    run(cli().args(args).arg("--state-dir").arg(state))
}

fn json(state: &Path, args: &[&str]) -> serde_json::Value {
    serde_json::from_str(&care(state, args).ok()).unwrap()
}

/// Makes a volume of each of these images.
fn volumes(image: &Image, names: &[&str]) {
    for name in names {
        Serve::new(&image.repo(), &image.state()).name(name).arg("--prefetch").arg("none").start().stop();
    }
}

fn slab_bytes(state: &Path) -> u64 {
    let slabs = std::fs::read_dir(state.join("cache/slabs")).unwrap();
    slabs.map(|entry| entry.unwrap().metadata().unwrap().blocks() * 512).sum()
}

#[test]
fn a_pinned_volume_is_here_whole_and_stays_though_others_want_the_space() {
    if !need(&["nbdcopy"]) {
        return;
    }
    let image = Image::of(noise(31, 10 << 20));
    std::fs::write(image.raw_file(), noise(32, 24 << 20)).unwrap();
    image.store("big", &image.raw_file());
    volumes(&image, &["disk", "big"]);
    let state = image.state();
    let said = care(&state, &["pin", "--cache-size", "17M", "big"]).refused();
    assert!(said.starts_with("error: volume big needs 24.0 MiB of the cache, which holds 16.0 MiB\nhint: give --cache-size 28M or more"), "{said}");
    assert_eq!(care(&state, &["pin", "nosuch"]).refused().lines().count(), 2);
    let said = care(&state, &["pin", "--cache-size", "20M", "disk"]).ok();
    assert!(said.starts_with("disk: all of it is here and stays"), "{said}");

    // Everything else goes by: what is pinned stays.
    let server =
        Serve::new(&image.repo(), &state).name("disk").name("big").arg("--cache-size").arg("20M").start();
    let copy = image.dir().join("copy");
    for _ in 0..2 {
        run(Command::new("nbdcopy").arg(server.uri("big")).arg(&copy)).ok();
    }
    let said = care(&state, &["pin", "disk"]).refused();
    assert!(said.contains("is in use") && said.contains("\nhint: stop that server first"), "{said}");
    server.stop();
    let held = json(&state, &["cache", "ls", "--json"]);
    let of =
        |name: &str| held.as_array().unwrap().iter().find(|held| held["volume"] == name).unwrap().clone();
    assert_eq!(of("disk")["chunks_here"], of("disk")["chunks"], "{held}");
    assert_eq!(of("disk")["pinned"], true);
    assert!(of("big")["chunks_here"].as_u64() < of("big")["chunks"].as_u64(), "{held}");

    std::fs::rename(image.repo(), image.dir().join("away")).unwrap();
    let server = Serve::new(&image.repo(), &state).name("disk").arg("--cache-size").arg("20M").start();
    run(Command::new("nbdcopy").arg(server.uri("disk")).arg(&copy)).ok();
    assert!(std::fs::read(&copy).unwrap() == image.raw);
    server.stop();
    care(&state, &["unpin", "disk"]).ok();
    assert_eq!(json(&state, &["cache", "ls", "--json"])[1]["pinned"], false);
}

#[test]
fn what_no_volume_needs_is_freed_and_what_is_damaged_is_found() {
    if !need(&["nbdcopy"]) {
        return;
    }
    let image = Image::of(noise(41, 6 << 20));
    std::fs::write(image.raw_file(), noise(42, 6 << 20)).unwrap();
    image.store("other", &image.raw_file());
    let state = image.state();
    let server =
        Serve::new(&image.repo(), &state).name("disk").name("other").arg("--prefetch").arg("all").start();
    // Looking needs no lock. What was fetched is written behind the backs of those who wait.
    let all = || json(&state, &["cache", "stat", "--json"])["chunks"] == 96;
    assert!(harness::until(harness::PATIENCE, all), "{}", care(&state, &["cache", "stat"]).ok());
    let told = || server.lines("all of it is here").len() == 2;
    assert!(harness::until(harness::PATIENCE, told), "{}", server.log());
    let said = care(&state, &["cache", "prune"]).refused();
    assert!(said.contains("is in use"), "{said}");
    server.stop();
    let before = slab_bytes(&state);
    assert!(care(&state, &["cache", "prune"]).ok().starts_with("0 chunks freed"));
    std::fs::remove_dir_all(state.join("volumes/other")).unwrap();
    let said = care(&state, &["cache", "prune"]).ok();
    assert!(said.starts_with("48 chunks freed, 6.0 MiB given back"), "{said}");
    // Less a block or two for the map of what is left.
    assert!(slab_bytes(&state) <= before - (6 << 20) + (64 << 10), "{before} then {}", slab_bytes(&state));
    assert_eq!(care(&state, &["cache", "verify"]).ok(), "48 chunks are good, 0 were damaged and are gone\n");

    // One flipped bit in what is used.
    let slab = std::fs::read_dir(state.join("cache/slabs")).unwrap().next().unwrap().unwrap().path();
    let bytes = std::fs::read(&slab).unwrap();
    let at = (0..bytes.len()).rev().find(|at| bytes[*at] != 0).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&slab).unwrap();
    file.write_all_at(&[bytes[at] ^ 1], at as u64).unwrap();
    assert_eq!(care(&state, &["cache", "verify"]).ok(), "47 chunks are good, 1 were damaged and are gone\n");
    let server = Serve::disk(&image).start();
    let copy = image.dir().join("copy");
    run(Command::new("nbdcopy").arg(server.uri("disk")).arg(&copy)).ok();
    assert!(std::fs::read(&copy).unwrap() == image.raw);
    server.stop();
    let said = care(&state, &["cache", "prune", "--all"]).ok();
    assert!(said.starts_with("48 chunks freed"), "{said}");
    assert_eq!(slab_bytes(&state), 0);
}
