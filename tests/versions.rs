//! Commits, push, pull and checkout of volumes, between two daemons ("hosts") with one repository.
//!
//! Failures users of other systems reported, and the test here that would find them:
//!
//! | failure | test |
//! |---|---|
//! | a version that moves under its reader | `writes_go_on_during_commits_and_each_version_is_what_the_volume_was` |
//! | a commit lost, half made or made twice by a kill | `a_daemon_killed_in_a_commit_leaves_it_whole_or_not_at_all` |
//! | two pushers, and one's commits are gone | `of_two_who_push_one_is_told_to_pull_and_loses_nothing` |
//! | a push that was killed breaks a ref or begins anew | `a_push_that_was_killed_goes_on` |
#![allow(clippy::unwrap_used)]

mod harness;

use std::path::{Path, PathBuf};
use std::time::Duration;

use harness::{Client, Image, PAGE, PATIENCE, Ran, Serve, Server, Tmpfs, cli, noise, run, until, volume};
use nbd_proto::{Command as Nbd, CommandFlags};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;

const MIB: usize = 1 << 20;

/// `horcrux-cli ARGS` on a state directory.
fn ask(state: &Path, args: &[&str]) -> Ran {
    let mut command = cli();
    command.args(args).arg("--state-dir").arg(state).env("HORCRUX_AUTHOR", "Ada <ada@example.org>");
    run(&mut command)
}

/// What it answers as JSON.
#[track_caller]
fn json(state: &Path, args: &[&str]) -> Value {
    serde_json::from_str(&ask(state, &[args, &["--json"]].concat()).ok()).unwrap()
}

#[track_caller]
fn commit(state: &Path, name: &str, message: &str) -> String {
    ask(state, &["commit", "-m", message, "--wait", name]).ok().trim().to_owned()
}

/// A daemon, and a volume `v` of the image on it.
fn host(image: &Image, state: &Path) -> Server {
    let server = Serve::daemon(state).start();
    create(image, state, "v", "disk");
    server
}

fn create(image: &Image, state: &Path, name: &str, of: &str) {
    let repo = image.repo();
    volume(state, &["create", name, "--access", repo.to_str().unwrap(), "--name", of]).ok();
}

fn other_state(image: &Image) -> PathBuf {
    image.dir().join("state-b")
}

/// All bytes of an export.
fn read_all(server: &Server, name: &str, len: usize) -> Vec<u8> {
    let mut client = Client::open(server, name);
    let read =
        (0..len).step_by(4 * MIB).flat_map(|at| client.read(at as u64, (4 * MIB).min(len - at)).unwrap());
    let bytes = read.collect();
    client.disconnect();
    bytes
}

/// Nobody is connected any more: what wants a volume for itself would be refused.
fn let_go(state: &Path, name: &str) {
    let free = || {
        let volume: Value = serde_json::from_str(&volume(state, &["inspect", name, "--json"]).ok()).unwrap();
        volume["open"].is_null() || volume["open"]["connections"] == 0
    };
    assert!(until(PATIENCE, free), "a connection to {name} does not end");
}

/// Writes one page to an export and to the bytes it should have.
fn change(server: &Server, name: &str, bytes: &mut [u8], page: usize, value: u8) {
    let mut client = Client::open(server, name);
    client.write((page * PAGE) as u64, &[value; PAGE]).unwrap();
    bytes[page * PAGE..(page + 1) * PAGE].fill(value);
    client.disconnect();
}

#[test]
fn what_one_host_commits_and_pushes_another_pulls_and_checks_out() {
    let image = Image::sparse();
    let (a, b) = (image.state(), other_state(&image));
    let (on_a, on_b) = (host(&image, &a), host(&image, &b));
    let first = image.raw.clone();
    let mut bytes = first.clone();
    change(&on_a, "v", &mut bytes, 0, 0xa1);
    change(&on_a, "v", &mut bytes, 1500, 0xa2);
    let status = json(&a, &["status", "v"]);
    assert_eq!(
        (&status["ahead"], &status["behind"], &status["branch"]),
        (&0.into(), &0.into(), &"main".into())
    );
    assert_eq!((&status["changed_bytes"], &status["clean"]), (&(2 * PAGE).into(), &false.into()));
    let id = commit(&a, "v", "two pages");
    assert_eq!(id.len(), 64, "{id}");
    let status = json(&a, &["status", "v"]);
    assert_eq!(
        (&status["ahead"], &status["clean"], &status["commit"]),
        (&1.into(), &true.into(), &id.clone().into())
    );
    assert_eq!(read_all(&on_a, "v", bytes.len()), bytes, "it reads as before");
    let_go(&a, "v");

    let log = json(&a, &["log", "v"]);
    let logged = log.as_array().unwrap();
    assert_eq!(logged.len(), 2);
    assert_eq!((&logged[0]["id"], &logged[0]["pushed"]), (&id.clone().into(), &false.into()));
    assert_eq!(
        (&logged[0]["author"], &logged[0]["message"]),
        (&"Ada <ada@example.org>".into(), &"two pages".into())
    );
    assert_eq!((&logged[0]["parents"][0], &logged[1]["pushed"]), (&logged[1]["id"], &true.into()));
    let told = ask(&a, &["log", "-n", "1", "v"]).ok();
    assert!(
        told.starts_with(&format!("commit {id} (not pushed)\nAuthor: Ada <ada@example.org>\nDate:   ")),
        "{told}"
    );
    assert!(told.ends_with(" +0000\n\n    two pages\n"), "{told}");

    // Nobody else sees it before it is pushed.
    assert_eq!(
        ask(&b, &["pull", "v"]).ok(),
        format!("v is up to date, on {}\n", &logged[1]["id"].as_str().unwrap()[..12])
    );
    let told = ask(&a, &["push", "v"]).ok();
    assert!(told.starts_with(&format!("disk@main is at {}: 1 commit, ", &id[..12])), "{told}");
    assert_eq!(ask(&a, &["push", "v"]).ok(), "disk@main is up to date\n");
    assert_eq!(json(&a, &["status", "v"])["ahead"], 0);
    assert_eq!(json(&b, &["status", "v"])["behind"], 1);
    assert_eq!(ask(&b, &["pull", "v"]).ok(), format!("v stands on {} now\n", &id[..12]));
    assert_eq!(read_all(&on_b, "v", bytes.len()), bytes);
    let_go(&b, "v");

    // And back, and forth.
    let before = format!("v stands on {}\n", &logged[1]["id"].as_str().unwrap()[..12]);
    assert_eq!(ask(&b, &["checkout", "v", "HEAD~1"]).ok(), before);
    assert_eq!(read_all(&on_b, "v", bytes.len()), first);
    let_go(&b, "v");
    let told = ask(&b, &["push", "v"]).refused();
    assert_eq!(
        told,
        "error: volume v is on no branch: it was made of a tag, a commit, or a version before a branch's tip\n\
         hint: name one: 'horcrux-cli push v BRANCH', or 'horcrux-cli checkout v BRANCH'\n"
    );
    assert_eq!(ask(&b, &["checkout", "v", "main"]).ok(), format!("v stands on {}\n", &id[..12]));
    // What B makes now, A gets; with the repository's own bytes fetched by neither twice.
    change(&on_b, "v", &mut bytes, 77, 0xb1);
    let_go(&b, "v");
    let second = commit(&b, "v", "one more");
    ask(&b, &["push", "v"]).ok();
    assert_eq!(ask(&a, &["pull", "v"]).ok(), format!("v stands on {} now\n", &second[..12]));
    assert_eq!(read_all(&on_a, "v", bytes.len()), bytes);
    // A restart changes nothing.
    on_a.stop();
    let on_a = Serve::daemon(&a).start();
    assert_eq!(read_all(&on_a, "v", bytes.len()), bytes);
    on_a.stop();
    on_b.stop();
}

#[test]
fn writes_go_on_during_commits_and_each_version_is_what_the_volume_was() {
    let image = Image::sparse();
    let state = image.state();
    let server = host(&image, &state);
    let mut rng = StdRng::seed_from_u64(harness::seed());
    let mut client = Client::open(&server, "v");
    let mut bytes = image.raw.clone();
    let mut versions = Vec::new();
    let pages = bytes.len() / PAGE;
    for round in 0..8 {
        for _ in 0..60 {
            let page = rng.random_range(0..pages);
            let len = rng.random_range(1..=(pages - page).min(40));
            let at = page * PAGE;
            if rng.random_bool(0.2) {
                let call =
                    client.call(Nbd::WriteZeroes, at as u64, (len * PAGE) as u64, CommandFlags::NONE, &[]);
                call.unwrap().result.unwrap();
                bytes[at..at + len * PAGE].fill(0);
            } else {
                // Not at pages' borders.
                let (at, len) = (at + rng.random_range(0..PAGE), len * PAGE - PAGE + 1);
                let data = noise(rng.random(), len);
                client.write(at as u64, &data).unwrap();
                bytes[at..at + len].copy_from_slice(&data);
            }
        }
        // Sealed now, made while the next writes come.
        let told = ask(&state, &["commit", "-m", &format!("version {round}"), "v"]).ok();
        assert!(told.starts_with("v: sealed; job "), "{told}");
        versions.push(bytes.clone());
    }
    let all_made = || json(&state, &["status", "v"])["being_made"] == 0;
    assert!(until(PATIENCE, all_made), "{}", ask(&state, &["status", "v"]).ok());
    client.disconnect();
    assert_eq!(read_all(&server, "v", bytes.len()), bytes);
    ask(&state, &["push", "v"]).ok();
    let log = json(&state, &["log", "v"]);
    assert_eq!(log.as_array().unwrap().len(), 9);
    for (round, version) in versions.iter().enumerate() {
        let name = format!("at{round}");
        create(&image, &state, &name, &format!("disk@main~{}", 7 - round));
        assert_eq!(json(&state, &["log", "-n", "1", &name])[0]["message"], format!("version {round}"));
        assert!(read_all(&server, &name, version.len()) == *version, "version {round} is another one");
    }
    server.stop();
}

#[test]
fn a_daemon_killed_in_a_commit_leaves_it_whole_or_not_at_all() {
    let image = Image::sparse();
    let state = image.state();
    let mut rng = StdRng::seed_from_u64(harness::seed());
    let mut server = host(&image, &state);
    let mut bytes = image.raw.clone();
    let mut versions = vec![bytes.clone()];
    for round in 0..10 {
        for _ in 0..20 {
            let page = rng.random_range(0..bytes.len() / PAGE);
            change(&server, "v", &mut bytes, page, rng.random());
        }
        let mut command = cli();
        command.args(["commit", "-m", "killed", "v", "--state-dir"]).arg(&state);
        let mut asking =
            command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap();
        // Ten moments, from before it is heard of to after it is made.
        std::thread::sleep(
            Duration::from_millis(round * 4) + Duration::from_micros(rng.random_range(0..4000)),
        );
        server.kill();
        let answered = asking.wait().unwrap().success();
        server = Serve::daemon(&state).start();
        assert_eq!(read_all(&server, "v", bytes.len()), bytes, "round {round}");
        let all_made = || json(&state, &["status", "v"])["being_made"] == 0;
        assert!(until(PATIENCE, all_made), "round {round}: {}", server.log());
        let log = json(&state, &["log", "v"]);
        let is_there = log.as_array().unwrap().len() == versions.len() + 1;
        assert!(is_there || log.as_array().unwrap().len() == versions.len(), "round {round}: {log}");
        assert!(is_there || !answered, "round {round}: who asked was told that it is sealed");
        if is_there {
            versions.push(bytes.clone());
        }
        assert_eq!(read_all(&server, "v", bytes.len()), bytes, "round {round}, after");
    }
    ask(&state, &["push", "v", "kept"]).ok();
    let last = versions.len() - 1;
    for (at, version) in versions.iter().enumerate() {
        let name = format!("at{at}");
        create(&image, &state, &name, &format!("disk@kept~{}", last - at));
        assert!(read_all(&server, &name, version.len()) == *version, "version {at} is another one");
    }
    server.stop();
}

#[test]
fn of_two_who_push_one_is_told_to_pull_and_loses_nothing() {
    let image = Image::sparse();
    let (a, b) = (image.state(), other_state(&image));
    let (on_a, on_b) = (host(&image, &a), host(&image, &b));
    let (mut of_a, mut of_b) = (image.raw.clone(), image.raw.clone());
    change(&on_a, "v", &mut of_a, 3, 0xa1);
    change(&on_b, "v", &mut of_b, 4, 0xb1);
    let (one, other) = (commit(&a, "v", "of A"), commit(&b, "v", "of B"));
    ask(&a, &["push", "v"]).ok();
    let told = ask(&b, &["push", "v"]).refused();
    assert_eq!(
        told,
        format!(
            "error: not a fast-forward: disk@main has moved on to {}, which volume v does not have\n\
             hint: run 'horcrux-cli pull v' first; commits of your own go to a branch of their own: 'horcrux-cli push v NEWBRANCH'\n",
            &one[..12]
        )
    );
    let_go(&b, "v");
    let told = ask(&b, &["pull", "v"]).refused();
    assert!(
        told.starts_with(
            "error: volume v and disk@main have diverged: each has commits the other has not\nhint: "
        ),
        "{told}"
    );
    assert!(
        told.contains("'horcrux-cli push v NEWBRANCH'") && told.contains("'horcrux-cli pull --force v'"),
        "{told}"
    );
    let told = ask(&b, &["push", "v", "mine"]).ok();
    assert!(told.starts_with(&format!("disk@mine is at {}", &other[..12])), "{told}");
    assert_eq!(json(&b, &["status", "v"])["branch"], "mine");
    assert_eq!(ask(&b, &["checkout", "v", "main"]).ok(), format!("v stands on {}\n", &one[..12]));
    assert_eq!(read_all(&on_b, "v", of_a.len()), of_a);
    create(&image, &a, "theirs", "disk@mine");
    assert_eq!(read_all(&on_a, "theirs", of_b.len()), of_b);
    on_a.stop();
    on_b.stop();
}

#[test]
fn a_push_that_was_killed_goes_on() {
    let image = Image::sparse();
    let state = image.state();
    let mut server = host(&image, &state);
    let mut bytes = image.raw.clone();
    for round in 0..6u64 {
        let data = noise(100 + round, 6 * MIB);
        let mut client = Client::open(&server, "v");
        client.write(0, &data).unwrap();
        client.disconnect();
        bytes[..data.len()].copy_from_slice(&data);
        commit(&state, "v", "much");
        let mut command = cli();
        command.args(["push", "v", "--state-dir"]).arg(&state);
        let mut asking =
            command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(5 + round * 9));
        server.kill();
        asking.wait().unwrap();
        server = Serve::daemon(&state).start();
        let told = ask(&state, &["push", "v"]).ok();
        assert!(told.starts_with("disk@main is "), "{told}");
        assert_eq!(json(&state, &["status", "v"])["ahead"], 0);
        let name = format!("at{round}");
        create(&image, &state, &name, "disk");
        assert!(read_all(&server, &name, bytes.len()) == bytes, "round {round}");
    }
    server.stop();
}

#[test]
fn an_empty_commit_is_refused_unless_asked_for_and_the_last_one_can_be_amended() {
    let image = Image::sparse();
    let state = image.state();
    let server = host(&image, &state);
    let mut bytes = image.raw.clone();
    let nothing = "error: nothing to commit: volume v is as its commit has it\n\
                   hint: '--allow-empty' makes a commit all the same\n";
    assert_eq!(ask(&state, &["commit", "-m", "x", "v"]).refused(), nothing);
    assert_eq!(
        ask(&state, &["commit", "v"]).refused(),
        "error: a commit needs a message\nhint: give one with '-m MESSAGE'\n"
    );
    assert_eq!(ask(&state, &["commit", "-m", " ", "v"]).refused(), "error: a commit needs a message\n");
    let told = ask(&state, &["commit", "--amend", "-m", "x", "v"]).refused();
    assert_eq!(
        told,
        "error: the last commit of volume v is pushed: it can't be replaced\n\
         hint: make another commit, without '--amend'\n"
    );
    assert_eq!(json(&state, &["log", "v"]).as_array().unwrap().len(), 1);
    let empty = ask(&state, &["commit", "--allow-empty", "-m", "empty", "--wait", "v"]).ok();
    assert_eq!(json(&state, &["status", "v"])["commit"], empty.trim());
    // Changed, and changed back: nothing is stored, and there is no commit.
    let was = bytes[9 * PAGE];
    let mut client = Client::open(&server, "v");
    client.write((9 * PAGE) as u64, &[was ^ 1; PAGE]).unwrap();
    client.write((9 * PAGE) as u64, &bytes[9 * PAGE..10 * PAGE]).unwrap();
    client.disconnect();
    assert_eq!(ask(&state, &["commit", "-m", "back", "--wait", "v"]).ok(), "nothing to commit\n");
    assert_eq!(json(&state, &["status", "v"])["clean"], true);
    change(&server, "v", &mut bytes, 20, 1);
    let replaced = commit(&state, "v", "first try");
    change(&server, "v", &mut bytes, 21, 2);
    let last = ask(&state, &["commit", "--amend", "--wait", "v"]).ok();
    assert_ne!(last.trim(), replaced);
    let log = json(&state, &["log", "v"]);
    let messages: Vec<&str> =
        log.as_array().unwrap().iter().map(|entry| entry["message"].as_str().unwrap()).collect();
    assert_eq!(messages[..2], ["first try", "empty"]);
    ask(&state, &["push", "v"]).ok();
    create(&image, &state, "w", "disk");
    assert_eq!(read_all(&server, "w", bytes.len()), bytes, "with what the replaced one had stored");
    server.stop();
}

#[test]
fn what_would_be_lost_is_refused_and_force_is_named() {
    let image = Image::sparse();
    let state = image.state();
    let server = host(&image, &state);
    let mut bytes = image.raw.clone();
    change(&server, "v", &mut bytes, 5, 5);
    let_go(&state, "v");
    for (args, action) in [(vec!["checkout", "v", "main"], "a checkout"), (vec!["reset", "v"], "a reset")] {
        let told = ask(&state, &args).refused();
        assert_eq!(
            told,
            format!(
                "error: volume v has changes that are not committed (4.0 KiB): {action} would lose them\n\
                 hint: 'horcrux-cli commit -m MESSAGE v' keeps them; '--force' goes on without them\n"
            )
        );
    }
    let mut client = Client::open(&server, "v");
    let told = ask(&state, &["reset", "--force", "v"]).refused();
    assert_eq!(told, "error: volume v is in use: 1 NBD connection\nhint: stop who uses it first\n");
    assert_eq!(client.read((5 * PAGE) as u64, PAGE).unwrap(), [5; PAGE]);
    client.disconnect();
    let_go(&state, "v");
    let told = ask(&state, &["reset", "--force", "v"]).ok();
    assert!(told.starts_with("v is what "), "{told}");
    assert_eq!(read_all(&server, "v", image.raw.len()), image.raw);

    // A changed volume may be taken away, as ever; one with commits that are nowhere else may not.
    create(&image, &state, "changed", "disk");
    change(&server, "changed", &mut bytes, 1, 1);
    let_go(&state, "changed");
    volume(&state, &["rm", "changed"]).ok();
    change(&server, "v", &mut bytes, 6, 6);
    let_go(&state, "v");
    commit(&state, "v", "only here");
    let told = volume(&state, &["rm", "v"]).refused();
    assert_eq!(
        told,
        "error: volume v has commits that are not pushed: taking it away would lose them\n\
         hint: 'horcrux-cli push v' first; '--force' goes on without them\n"
    );
    let told = ask(&state, &["checkout", "v", "HEAD~1"]).refused();
    assert!(
        told.starts_with("error: volume v has commits that are not pushed: a checkout would lose them\n"),
        "{told}"
    );
    // Somebody deletes the branch.
    std::fs::remove_file(image.repo().join("images/disk/refs/heads/main")).unwrap();
    let told = ask(&state, &["pull", "v"]).refused();
    assert!(
        told.starts_with(
            "error: disk has no branch main any more\nhint: 'horcrux-cli push v BRANCH' makes one"
        ),
        "{told}"
    );
    ask(&state, &["push", "v", "main"]).ok();
    volume(&state, &["rm", "v"]).ok();

    create(&image, &state, "w", "disk");
    let told = ask(&state, &["checkout", "w", "nowhere"]).refused();
    assert!(told.starts_with("error: no branch, tag or commit 'nowhere' in disk; it has: main\n"), "{told}");
    let told = ask(&state, &["checkout", "w", "main~9"]).refused();
    assert!(told.contains("the history goes back"), "{told}");
    let told = ask(&state, &["commit", "-m", "x", "nobody"]).refused();
    assert!(told.starts_with("error: there is no volume nobody; there is: w\n"), "{told}");
    create(&image, &state, "old", "disk@main~1");
    let told = ask(&state, &["pull", "old"]).refused();
    assert!(told.starts_with("error: volume old is on no branch"), "{told}");
    server.stop();
    let told = ask(&state, &["commit", "-m", "x", "w"]).refused();
    assert!(told.starts_with("error: no daemon answers at "), "{told}");
    assert!(told.contains("hint: start it with 'horcrux-nbd serve'"), "{told}");
}

#[test]
fn a_parent_that_is_gone_is_named_and_the_sealed_commit_waits_for_it() {
    let image = Image::sparse();
    let state = image.state();
    let server = host(&image, &state);
    let mut bytes = image.raw.clone();
    change(&server, "v", &mut bytes, 5, 5);
    // The block's table is in its object, and has not been read yet.
    let blocks = image.repo().join("images/disk/blocks");
    let away = image.dir().join("blocks-away");
    std::fs::rename(&blocks, &away).unwrap();
    let told = ask(&state, &["commit", "-m", "x", "--wait", "v"]);
    if told.status.success() {
        // Its table was here already.
        std::fs::rename(&away, &blocks).unwrap();
    } else {
        assert!(told.stderr.contains("is missing, though another object names it"), "{}", told.stderr);
        assert_eq!(json(&state, &["status", "v"])["being_made"], 1);
        std::fs::rename(&away, &blocks).unwrap();
        let all_made = || json(&state, &["status", "v"])["being_made"] == 0;
        assert!(until(PATIENCE, all_made), "it is tried again");
    }
    assert_eq!(json(&state, &["log", "v"]).as_array().unwrap().len(), 2);
    assert_eq!(read_all(&server, "v", bytes.len()), bytes);
    server.stop();
}

#[test]
fn a_disk_that_is_full_while_a_commit_is_made_leaves_it_sealed_until_there_is_room() {
    let image = Image::of(noise(4, 8 * MIB));
    let Some(disk) = Tmpfs::mount(96) else { return };
    let state = disk.path().join("state");
    let server = Serve::daemon(&state).arg("--cache-size").arg("16M").start();
    create(&image, &state, "v", "disk");
    let data = noise(5, 6 * MIB);
    let mut client = Client::open(&server, "v");
    client.write(0, &data).unwrap();
    client.flush().unwrap();
    let filler = disk.fill(3 << 20);
    let told = ask(&state, &["commit", "-m", "much", "--wait", "v"]).refused();
    assert!(told.contains("no space") || told.contains("space left"), "{told}");
    let status = json(&state, &["status", "v"]);
    assert_eq!(status["being_made"], 1, "{status}");
    assert!(status["failed"].as_str().unwrap().contains("space"), "{status}");
    assert_eq!(client.read(0, data.len()).unwrap(), data, "and it goes on");
    std::fs::remove_file(filler).unwrap();
    let all_made = || json(&state, &["status", "v"])["being_made"] == 0;
    assert!(until(PATIENCE, all_made), "{}", ask(&state, &["status", "v"]).ok());
    assert_eq!(json(&state, &["log", "v"]).as_array().unwrap().len(), 2);
    assert_eq!(client.read(0, data.len()).unwrap(), data);
    client.disconnect();
    server.stop();
}
