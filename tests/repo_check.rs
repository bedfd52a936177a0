//! verify and fsck find each object that is damaged, cut or gone, by name; and gc and squash through the command line, on every kind of store.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod harness;

use std::path::{Path, PathBuf};
use std::process::Command;

use harness::sshd::{Account, Sshd, sshd};
use harness::weed::{ACCESS_KEY, SECRET_KEY, Weed, weed, with_credentials};
use harness::{Image, cli, noise, run};
use serde_json::Value;

/// An image `disk` of two versions, 4 blocks of 1 MiB each.
fn two_versions() -> Image {
    let image = Image::of(noise(1, 4 << 20));
    let mut raw = noise(1, 4 << 20);
    raw[..70_000].fill(9);
    std::fs::write(image.raw_file(), raw).unwrap();
    image.store("disk", &image.raw_file());
    image
}

fn on(repo: &Path, args: &[&str]) -> harness::Ran {
    run(cli().arg(args[0]).arg("--access").arg(repo).args(&args[1..]))
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

/// The objects of an image by kind.
fn objects(repo: &Path, kind: &str) -> Vec<PathBuf> {
    let mut found = harness::files_below(&repo.join("images/disk").join(kind));
    found.retain(|path| !path.file_name().unwrap().to_string_lossy().starts_with('.'));
    found.sort();
    found
}

fn key_of(repo: &Path, path: &Path) -> String {
    path.strip_prefix(repo).unwrap().display().to_string()
}

#[test]
fn a_whole_repository_verifies_and_counts_what_it_has() {
    let image = two_versions();
    let repo = &image.repo();
    let verified = json(&on(repo, &["verify", "--json"]).ok());
    assert_eq!(verified["commits"], 2);
    assert_eq!(verified["objects"], objects(repo, "blocks").len());
    let len: u64 = objects(repo, "blocks").iter().map(|path| path.metadata().unwrap().len()).sum();
    assert_eq!(verified["bytes"], len);
    let one = json(&on(repo, &["verify", "disk@main~1", "--json"]).ok());
    assert_eq!((&one["commits"], &one["objects"]), (&Value::from(1), &Value::from(4)));
    let checked = json(&on(repo, &["fsck", "--json"]).ok());
    assert_eq!((&checked["commits"], &checked["unnamed_objects"]), (&Value::from(2), &Value::from(0)));
    assert!(on(repo, &["verify", "disk"]).ok().contains("are what they were"));
    for (args, words) in [
        (["verify", "nodisk"], "no image 'nodisk'"),
        (["verify", "disk@nothing"], "no branch, tag or commit 'nothing'"),
        (["fsck", "nodisk"], "no image 'nodisk'"),
        (["gc", "nodisk"], "no image 'nodisk'"),
    ] {
        let said = on(repo, &args).refused();
        assert!(said.contains(words), "{args:?}: {said}");
    }
    let said = on(image.dir(), &["fsck"]).refused();
    assert!(said.contains("is not a repository"), "{said}");
}

#[test]
fn each_object_that_is_flipped_cut_or_gone_is_named() {
    let image = two_versions();
    let repo = &image.repo();
    for kind in ["blocks", "maps", "commits", "refs/heads"] {
        for path in objects(repo, kind) {
            let good = std::fs::read(&path).unwrap();
            let key = key_of(repo, &path);
            let mut flipped = good.clone();
            flipped[good.len() / 3] ^= 1;
            for (what, bad) in
                [("flipped", Some(flipped)), ("cut", Some(good[..good.len() / 2].to_vec())), ("gone", None)]
            {
                match bad {
                    Some(bad) => std::fs::write(&path, bad).unwrap(),
                    None => std::fs::remove_file(&path).unwrap(),
                }
                if kind == "refs/heads" && what == "gone" {
                    // Nothing names it: an image without a branch is none.
                    continue;
                }
                let ran = on(repo, &["verify"]);
                assert_eq!(ran.status.code(), Some(1), "{key} {what}: {}", ran.stdout);
                assert!(ran.stdout.contains(&key), "{key} {what}: {}", ran.stdout);
                // Bytes inside an object are what fsck does not read.
                if kind != "blocks" || what != "flipped" {
                    let ran = on(repo, &["fsck"]);
                    assert!(
                        ran.status.code() == Some(1) && ran.stdout.contains(&key),
                        "{key} {what}: {}",
                        ran.stdout
                    );
                }
            }
            std::fs::write(&path, &good).unwrap();
        }
    }
    on(repo, &["verify"]).ok();
}

#[test]
fn fsck_counts_what_nobody_names_and_names_what_is_misplaced() {
    let image = two_versions();
    let repo = &image.repo();
    on(repo, &["branch", "disk", "old", "main~1"]).ok();
    let (main, old) = (repo.join("images/disk/refs/heads/main"), repo.join("images/disk/refs/heads/old"));
    std::fs::copy(&main, &old).unwrap();
    let said = on(repo, &["fsck"]);
    assert!(said.stdout.contains("refs/heads/old is damaged: it says it is heads/main"), "{}", said.stdout);
    assert!(said.stderr.contains("error: 1 thing is wrong with"), "{}", said.stderr);
    std::fs::remove_file(&old).unwrap();
    std::fs::write(repo.join("images/disk/notes.txt"), "mine").unwrap();
    std::fs::remove_file(&main).unwrap();
    let checked = json(&on(repo, &["fsck", "--json"]).ok());
    assert!(checked["unnamed_objects"].as_u64().unwrap() >= 8, "{checked}");
    assert_eq!(checked["strangers"], serde_json::json!(["images/disk/notes.txt"]));
}

/// Versions come, a branch goes, gc takes what it had, a history is squashed, all by commands; `with` gives each what it needs to reach the store.
fn story(repo: &str, with: &dyn Fn(&mut Command)) {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    let ran = |args: &[&str]| {
        let mut command = cli();
        with(command.args(args));
        run(&mut command)
    };
    let on = |args: &[&str]| {
        let mut all = vec![args[0], "--access", repo];
        all.extend(&args[1..]);
        ran(&all)
    };
    let store = |seed| {
        std::fs::write(&raw, noise(seed, 1 << 20)).unwrap();
        ran(&["image-from-file", "-s", "1M", "disk", raw.to_str().unwrap(), repo]).ok();
    };
    (0..4).for_each(store);
    let count = || json(&on(&["log", "disk", "--json"]).ok()).as_array().unwrap().len();
    assert_eq!(count(), 4);
    on(&["tag", "disk", "kept", "main~1", "--protect"]).ok();
    on(&["branch", "disk", "lost", "main"]).ok();
    assert_eq!(json(&on(&["branch", "disk", "--json"]).ok()).as_array().unwrap().len(), 2);
    // The tip is only the other branch's, and then nobody's.
    let refused = on(&["branch", "disk", "-d", "nothing"]).refused();
    assert!(refused.contains("it has: lost, main"), "{refused}");
    on(&["branch", "disk", "-d", "main"]).ok();
    on(&["branch", "disk", "main", "kept"]).ok();
    let refused = on(&["branch", "disk", "-d", "lost"]).refused();
    assert!(refused.contains("is not merged"), "{refused}");
    on(&["branch", "disk", "-d", "lost", "--force"]).ok();
    assert_eq!(count(), 3);
    let dry = json(&on(&["gc", "--dry-run", "--json"]).ok());
    // A commit, a map node, a block.
    assert_eq!(dry["condemned_objects"], 3, "{dry}");
    let kept = json(&on(&["gc", "--json"]).ok());
    assert_eq!((&kept["condemned_objects"], &kept["deleted_objects"]), (&Value::from(3), &Value::from(0)));
    let gone = json(&on(&["gc", "--grace", "0", "--json"]).ok());
    assert_eq!(gone["deleted_objects"], 3, "{gone}");
    on(&["verify"]).ok();
    assert_eq!(json(&on(&["fsck", "--json"]).ok())["unnamed_objects"], 0);

    (7..9).for_each(store);
    let plan = on(&["squash", "disk", "--keep-last", "2", "--dry-run"]).ok();
    assert_eq!((plan.matches("is left out").count(), count()), (3, 5), "{plan}");
    on(&["squash", "disk", "--keep-last", "2"]).ok();
    assert_eq!(count(), 2);
    // The tag has what is behind it; the old versions of the two that are kept go, their bytes stay.
    let gone = json(&on(&["gc", "--grace", "0", "--json"]).ok());
    assert_eq!(gone["deleted_objects"], 2, "{gone}");
    assert!(on(&["tag", "disk", "-d", "kept"]).refused().contains("is protected"));
    on(&["tag", "disk", "kept", "--unprotect"]).ok();
    on(&["tag", "disk", "-d", "kept"]).ok();
    let gone = json(&on(&["gc", "--grace", "0", "--json"]).ok());
    assert_eq!(gone["deleted_objects"], 9, "{gone}");
    on(&["verify"]).ok();
    let verified = json(&on(&["verify", "--json"]).ok());
    assert_eq!((&verified["commits"], &verified["objects"]), (&Value::from(2), &Value::from(2)));
    // What is left is a repository like any other.
    store(9);
    assert_eq!(count(), 3);
}

#[test]
fn a_history_is_cared_for_in_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    story(dir.path().join("repo").to_str().unwrap(), &|_| {});
}

#[test]
fn a_history_is_cared_for_over_ssh() {
    if !sshd() {
        return;
    }
    let server = Sshd::start(Account::SftpOnly);
    let dir = tempfile::tempdir().unwrap();
    story(&server.url(&dir.path().join("repo")), &|command| server.with_home(command));
}

#[test]
fn a_history_is_cared_for_in_a_bucket() {
    if !weed() {
        return;
    }
    let server = Weed::start();
    story(&server.url("care"), &|command| with_credentials(command, ACCESS_KEY, SECRET_KEY));
}

#[test]
fn what_can_not_be_meant_is_refused() {
    let image = two_versions();
    let repo = &image.repo();
    for (args, words) in [
        (vec!["squash", "disk"], "nothing is said to be kept"),
        (vec!["squash", "disk@main~1", "--keep-last", "1"], "a branch is squashed, and nothing else"),
        (vec!["squash", "disk@nothing", "--keep-last", "1"], "no branch 'nothing' in disk; it has: main"),
    ] {
        let said = on(repo, &args).refused();
        assert!(said.contains(words), "{args:?}: {said}");
    }
    let said = on(repo, &["gc", "--grace", "soon"]);
    assert_eq!(said.status.code(), Some(2));
    assert!(said.stderr.contains("a time is a number and d, h, m or s"), "{}", said.stderr);
}
