//! One image put in several places: each place gets all of it, and each is told of.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod harness;

use std::path::{Path, PathBuf};
use std::process::Command;

use harness::{Image, Ran, Serve, cli, need, noise, run};

fn store(image: &Image, places: &[&Path], more: &[&str]) -> Ran {
    let mut command = cli();
    command.args(["image-from-file", "-s", "1M"]).args(more).arg("disk").arg(image.raw_file());
    run(command.args(places))
}

fn read(repo: &Path, state: &Path, out: &Path) -> Vec<u8> {
    let server = Serve::new(repo, state).name("disk").start();
    run(Command::new("nbdcopy").arg(server.uri("disk")).arg(out)).ok();
    server.stop();
    std::fs::read(out).unwrap()
}

fn json(said: &str) -> serde_json::Value {
    serde_json::from_str(said).unwrap()
}

#[test]
fn an_image_is_put_in_several_places_and_each_serves_it_alone() {
    if !need(&["nbdcopy"]) {
        return;
    }
    let image = Image::of(noise(31, 4 << 20));
    let [first, second, third]: [PathBuf; 3] = ["a", "b", "c"].map(|name| image.dir().join(name));
    let said = store(&image, &[&first, &second, &third], &[]).ok();
    for copy in [&second, &third] {
        assert!(said.contains(&format!("\n  copied to     {}: ", copy.display())), "{said}");
    }
    for (number, repo) in [&first, &second, &third].into_iter().enumerate() {
        let state = image.dir().join(format!("state {number}"));
        assert!(read(repo, &state, &image.dir().join("out")) == image.raw, "{} differs", repo.display());
    }

    // The next version: what changed goes to each; a place that is new gets all of it.
    let mut changed = image.raw.clone();
    changed[1 << 20..(1 << 20) + 4096].fill(0x55);
    std::fs::write(image.raw_file(), &changed).unwrap();
    let fourth = image.dir().join("d");
    let report = json(&store(&image, &[&first, &second, &fourth], &["--json"]).ok());
    let objects = |copy: usize| report["copies"][copy]["copied_objects"].as_u64().unwrap();
    assert!(objects(0) < objects(1), "{report}");
    assert_eq!(report["copies"][1]["place"], fourth.display().to_string());
    assert!(report["copies"][0]["error"].is_null(), "{report}");
    assert!(read(&fourth, &image.dir().join("state d"), &image.dir().join("out")) == changed);
}

#[test]
fn a_place_that_can_not_be_a_copy_is_told_of_before_anything_is_made() {
    let (image, other) = (Image::of(noise(32, 1 << 20)), Image::of(noise(33, 1 << 20)));
    let new = image.dir().join("new");
    let said = store(&image, &[&image.repo(), &other.repo()], &[]).refused();
    assert!(said.contains("is another repository than"), "{said}");
    assert!(said.contains("\nhint: give a new place; nothing was made"), "{said}");

    let said = store(&image, &[&new, &image.repo()], &[]).refused();
    assert!(said.contains(&format!("error: {} is no repository yet, but", new.display())), "{said}");
    assert!(said.contains("\nhint: 'horcrux-cli sync --from "), "{said}");
    assert!(!new.exists(), "something was made");

    let said = store(&image, &[&new, Path::new("gopher://host/repo")], &[]).refused();
    assert!(said.contains("gopher") && said.contains("scp://"), "{said}");
    assert!(!new.exists(), "something was made");

    // In the directory the image is of.
    let dir = image.dir().join("data");
    std::fs::create_dir(&dir).unwrap();
    let said =
        run(cli().args(["image-from-dir", "disk"]).arg(&dir).arg(&new).arg(dir.join("repo"))).refused();
    assert!(said.contains("lies inside"), "{said}");
    assert!(!new.exists(), "something was made");
}

#[test]
fn a_place_that_fails_later_is_named_and_the_others_have_it() {
    let image = Image::of(noise(34, 1 << 20));
    let [good, moved] = ["good", "moved"].map(|name| image.dir().join(name));
    store(&image, &[&image.repo(), &good, &moved], &[]).ok();
    // Someone stored a version of their own there.
    std::fs::write(image.raw_file(), noise(35, 1 << 20)).unwrap();
    store(&image, &[&moved], &[]).ok();
    std::fs::write(image.raw_file(), noise(36, 1 << 20)).unwrap();
    let failed = store(&image, &[&image.repo(), &moved, &good], &["--json"]);
    let report = json(&failed.stdout);
    assert!(report["copies"][1]["error"].is_null(), "{report}");
    assert!(report["copies"][1]["copied_objects"].as_u64().unwrap() > 0, "{report}");
    let said = failed.refused();
    let expected = format!(
        "error: it is stored in {}, but not everywhere: {}: not a fast-forward: disk@main has moved on by itself there\n",
        image.repo().display(),
        moved.display()
    );
    assert!(said.starts_with(&expected), "{said}");
    assert!(said.contains("\nhint: ") && said.contains(" has versions of its own: bring them to "), "{said}");
}

#[test]
fn a_prefetch_list_is_kept_in_each_place() {
    if !need(&["qemu-io"]) {
        return;
    }
    let image = Image::of(noise(37, 4 << 20));
    let (copy, other) = (image.dir().join("copy"), Image::of(noise(38, 1 << 20)));
    store(&image, &[&image.repo(), &copy], &[]).ok();
    let state = image.state();
    let server = Serve::new(&image.repo(), &state).name("disk").start();
    run(Command::new("qemu-io").args(["-r", "-f", "raw", "-c", "read 1M 64k"]).arg(server.uri("disk"))).ok();
    server.stop();
    let push = |places: &[&Path]| {
        let mut command = cli();
        command.args(["prefetch", "push", "disk", "--state-dir"]).arg(&state);
        for place in places {
            command.arg("--access").arg(place);
        }
        run(&mut command)
    };
    let said = push(&[&image.repo(), &copy]).ok();
    for place in [&image.repo(), &copy] {
        assert!(said.contains(&format!(" in {}\n", place.display())), "{said}");
        let lists = place.join("images/disk/prefetch");
        let names =
            std::fs::read_dir(&lists).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        assert_eq!(names.filter(|name| !name.starts_with('.')).count(), 1, "{}", lists.display());
    }
    let failed = push(&[&other.repo(), &copy]);
    assert!(failed.stdout.contains(&format!(" in {}\n", copy.display())), "{}", failed.stdout);
    let said = failed.refused();
    let expected = format!(
        "error: not kept everywhere: {} is not the repository this volume is of",
        other.repo().display()
    );
    assert!(said.starts_with(&expected), "{said}");
}
