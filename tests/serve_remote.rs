//! Serving what is elsewhere: cold starts by a list, starts with the repository away, copies in several places.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod harness;

use std::path::{Path, PathBuf};
use std::process::Command;

use harness::{Image, Ran, Serve, Server, cli, need, noise, run};

fn state_cli(state: &Path, args: &[&str]) -> Ran {
    run(cli().args(args).arg("--state-dir").arg(state))
}

/// Reads some KiB of an export as another program would.
fn qemu_read(server: &Server, at: &str, len: &str) -> Ran {
    let read = format!("read {at} {len}");
    run(Command::new("qemu-io").args(["-r", "-f", "raw", "-c", &read]).arg(server.uri("disk")))
}

/// Bytes of an export that are here.
fn cached(server: &Server) -> u64 {
    let map =
        run(Command::new("nbdinfo").args(["--map=x-horcrux:cached", "--totals"]).arg(server.uri("disk")))
            .ok();
    let here = map.lines().filter(|line| line.trim_end().ends_with("1") || line.contains("cached"));
    here.filter_map(|line| line.split_whitespace().next()?.parse::<u64>().ok()).sum()
}

fn serve(image: &Image, state: &Path) -> Serve {
    Serve::new(&image.repo(), state).name("disk")
}

#[test]
fn what_a_first_start_reads_is_listed_kept_with_the_commit_and_fetched_on_another_host() {
    if !need(&["qemu-io", "nbdinfo"]) {
        return;
    }
    let image = Image::of(noise(5, 16 << 20));
    let first = image.dir().join("first");
    let said = state_cli(&first, &["prefetch", "show", "disk"]).refused();
    assert!(said.starts_with("error: there is no volume disk in "), "{said}");
    assert!(said.contains("\nhint: 'horcrux-nbd serve' makes a volume"), "{said}");

    let server = serve(&image, &first).arg("--prefetch").arg("none").start();
    let said = state_cli(&first, &["prefetch", "show", "disk"]).refused();
    assert!(
        said.starts_with("error: the volume disk has no prefetch list yet\nhint: serve disk and use it"),
        "{said}"
    );
    qemu_read(&server, "9M", "256k").ok();
    qemu_read(&server, "1M", "4k").ok();
    server.stop();
    let shown = state_cli(&first, &["prefetch", "show", "disk"]).ok();
    assert!(shown.starts_with("disk: a start reads "), "{shown}");
    let json = state_cli(&first, &["prefetch", "show", "--json", "disk"]).ok();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let runs = json["runs"].as_array().unwrap();
    // nbd clients look at the first sectors for a partition table; then come the reads of this test, in order.
    let starts: Vec<u64> = runs.iter().map(|run| run[0].as_u64().unwrap()).collect();
    let position = |chunk: u64| starts.iter().position(|start| *start == chunk);
    assert!(position(9 << 3) < position(1 << 3) && position(9 << 3).is_some(), "{json}");
    // A start that was cut short sooner does not take the longer list's place.
    let server = serve(&image, &first).arg("--prefetch").arg("none").start();
    qemu_read(&server, "3M", "4k").ok();
    server.stop();
    let again = state_cli(&first, &["prefetch", "show", "--json", "disk"]).ok();
    assert_eq!(serde_json::from_str::<serde_json::Value>(&again).unwrap()["runs"], json["runs"]);
    let pushed = state_cli(&first, &["prefetch", "push", "disk"]).ok();
    assert!(pushed.starts_with("kept with commit "), "{pushed}");
    // Again, it is there already.
    state_cli(&first, &["prefetch", "push", "disk"]).ok();

    let second = image.dir().join("second");
    let server = serve(&image, &second).start();
    server.logs("fetched what a start reads");
    let chunks = json["chunks"].as_u64().unwrap();
    assert_eq!(cached(&server), chunks * (128 << 10), "what the list names is here, and nothing else");
    // All that the first start read is here: the repository is not needed.
    std::fs::rename(image.repo(), image.dir().join("away")).unwrap();
    qemu_read(&server, "9M", "256k").ok();
    assert!(
        !qemu_read(&server, "5M", "4k").stderr.is_empty() || !qemu_read(&server, "5M", "4k").status.success()
    );
    server.stop();
}

#[test]
fn everything_can_be_fetched_and_then_a_start_needs_no_repository() {
    if !need(&["nbdcopy", "nbdinfo"]) {
        return;
    }
    let image = Image::sparse();
    let state = image.state();
    let server = serve(&image, &state).arg("--prefetch").arg("all").start();
    server.logs("all of it is here");
    assert_eq!(cached(&server), image.raw.len() as u64);
    server.stop();
    std::fs::rename(image.repo(), image.dir().join("away")).unwrap();

    let server = serve(&image, &state).start();
    server.logs("the repository is out of reach: serving what is here");
    let copy = image.dir().join("copy");
    run(Command::new("nbdcopy").arg(server.uri("disk")).arg(&copy)).ok();
    assert!(std::fs::read(&copy).unwrap() == image.raw);
    server.stop();

    // One that was never here can't be.
    let said = Serve::new(&image.repo(), &state).name("other").refused();
    assert!(said.contains("no such directory"), "{said}");
}

#[test]
fn a_repository_that_comes_back_is_used_without_a_restart() {
    if !need(&["qemu-io"]) {
        return;
    }
    let image = Image::of(noise(6, 8 << 20));
    let server = serve(&image, &image.state()).start();
    qemu_read(&server, "1M", "4k").ok();
    server.stop();
    let away = image.dir().join("away");
    std::fs::rename(image.repo(), &away).unwrap();
    let server = serve(&image, &image.state()).start();
    qemu_read(&server, "1M", "4k").ok();
    assert!(!qemu_read(&server, "6M", "4k").status.success(), "what is not here can't be read");
    std::fs::rename(&away, image.repo()).unwrap();
    qemu_read(&server, "6M", "4k").ok();
    server.stop();
}

/// What a server fetched in its life, as its last line says.
fn fetched(server: Server) -> u64 {
    let log = {
        let kept = server.kept_log();
        server.stop();
        kept.lock().unwrap().clone()
    };
    let number = log.split("fetched_bytes=").nth(1).unwrap_or_else(|| panic!("{log}"));
    number.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn versions_and_images_share_what_is_here() {
    if !need(&["nbdcopy"]) {
        return;
    }
    let image = Image::of(noise(11, 4 << 20));
    let mut changed = image.raw.clone();
    changed[1 << 20..(1 << 20) + 4096].fill(0x11);
    std::fs::write(image.raw_file(), &changed).unwrap();
    image.store("disk", &image.raw_file());
    // The first version again, as an image of its own.
    let same = image.dir().join("same");
    std::fs::write(&same, &image.raw).unwrap();
    image.store("other", &same);
    let state = image.state();
    let read = |name: &str, export: &str, expected: &[u8]| {
        let server =
            Serve::new(&image.repo(), &state).name(name).arg("--read-only").arg("--prefetch").arg("none");
        let server = server.start();
        let out = image.dir().join("out");
        run(Command::new("nbdcopy").arg(server.uri(export)).arg(&out)).ok();
        assert!(std::fs::read(&out).unwrap() == expected, "{name} differs");
        fetched(server)
    };
    assert!(read("disk@main~1", "disk", &image.raw) >= 4 << 20);
    let second = read("disk", "disk", &changed);
    assert!(second > 0 && second < 256 << 10, "{second} bytes for one changed chunk");
    assert_eq!(read("other", "other", &image.raw), 0, "all of it is here");
}

#[test]
fn a_relative_path_means_the_same_from_anywhere_later() {
    let image = Image::of(noise(7, 1 << 20));
    let state = image.state();
    Serve::new(Path::new("repo"), &state).within(image.dir()).name("disk").start().stop();
    // It fetches from the recorded place, wherever this runs.
    state_cli(&state, &["pin", "disk"]).ok();
}

fn sync(from: &Path, to: &Path, more: &[&str]) -> Ran {
    run(cli().arg("sync").arg("--from").arg(from).arg("--to").arg(to).args(more))
}

#[test]
fn a_copy_has_what_was_missing_and_serves_alone_or_beside_the_first() {
    if !need(&["nbdcopy", "qemu-io"]) {
        return;
    }
    let image = Image::sparse();
    let copy: PathBuf = image.dir().join("copy of it");
    let report: serde_json::Value =
        serde_json::from_str(&sync(&image.repo(), &copy, &["--json"]).ok()).unwrap();
    assert!(report["copied_objects"].as_u64().unwrap() >= 9 && report["refs_moved"] == 1, "{report}");
    let report: serde_json::Value =
        serde_json::from_str(&sync(&image.repo(), &copy, &["--json"]).ok()).unwrap();
    assert!(report["copied_objects"] == 0 && report["refs_moved"] == 0, "{report}");

    // A new version: only what changed goes over.
    let mut changed = image.raw.clone();
    changed[4 << 20..(4 << 20) + 4096].fill(0x77);
    std::fs::write(image.raw_file(), &changed).unwrap();
    image.store("disk", &image.raw_file());
    let report: serde_json::Value =
        serde_json::from_str(&sync(&image.repo(), &copy, &["--json", "disk"]).ok()).unwrap();
    let copied = report["copied_objects"].as_u64().unwrap();
    assert!((3..=5).contains(&copied) && report["refs_moved"] == 1, "{report}");

    let state = image.dir().join("copied");
    let server = Serve::new(&copy, &state).name("disk").start();
    let out = image.dir().join("out");
    run(Command::new("nbdcopy").arg(server.uri("disk")).arg(&out)).ok();
    assert!(std::fs::read(&out).unwrap() == changed, "the copy differs");
    server.stop();

    // Two places: one goes away under the reader.
    let state = image.dir().join("two");
    let server = Serve::new(&image.repo(), &state)
        .arg("--access")
        .arg(&copy)
        .name("disk")
        .arg("--prefetch")
        .arg("none")
        .start();
    qemu_read(&server, "0", "64k").ok();
    std::fs::rename(image.repo(), image.dir().join("gone")).unwrap();
    run(Command::new("nbdcopy").arg(server.uri("disk")).arg(&out)).ok();
    assert!(std::fs::read(&out).unwrap() == changed, "what was read from two places differs");
    server.stop();
}

#[test]
fn a_copy_is_refused_where_it_would_mix_or_hide_something() {
    let (image, other) = (Image::of(noise(8, 1 << 20)), Image::of(noise(9, 1 << 20)));
    let said = sync(&image.repo(), &other.repo(), &[]).refused();
    assert!(
        said.contains("is another repository than") && said.contains("\nhint: sync to a new place"),
        "{said}"
    );
    let said = sync(&image.repo(), &image.dir().join("new"), &["nosuch"]).refused();
    assert!(said.contains("no image nosuch") || said.contains("nosuch"), "{said}");

    // A damaged object is named and not copied.
    let block = image.objects("blocks").pop().unwrap();
    let good = std::fs::read(&block).unwrap();
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 1;
    std::fs::remove_file(&block).unwrap();
    std::fs::write(&block, &bad).unwrap();
    let to = image.dir().join("half");
    let said = sync(&image.repo(), &to, &[]).refused();
    assert!(said.contains(block.file_name().unwrap().to_str().unwrap()), "{said}");
    assert!(!to.join("images/disk/refs").exists(), "no name without its objects");
    std::fs::write(&block, &good).unwrap();
    sync(&image.repo(), &to, &[]).ok();

    // Both move on by themselves.
    for (repo, seed) in [(image.repo(), 21), (to.clone(), 22)] {
        std::fs::write(image.raw_file(), noise(seed, 1 << 20)).unwrap();
        run(cli().args(["image-from-file", "-s", "1M", "disk"]).arg(image.raw_file()).arg(&repo)).ok();
    }
    let said = sync(&image.repo(), &to, &[]).refused();
    assert!(
        said.starts_with("error: not a fast-forward: disk@main has moved on by itself there\n"),
        "{said}"
    );
}
