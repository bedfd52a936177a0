//! Snapshots, rollback and clones of volumes, against a model and through restarts and kills.
#![allow(clippy::unwrap_used)]

mod harness;

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use harness::{
    Client, Image, PAGE, PATIENCE, Ran, Serve, Server, cli, files_below, noise, run, until, volume,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;

const MIB: usize = 1 << 20;

fn ask(state: &Path, args: &[&str]) -> Ran {
    run(cli().args(args).arg("--state-dir").arg(state))
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

fn write(server: &Server, name: &str, bytes: &mut [u8], at: usize, data: &[u8]) {
    let mut client = Client::open(server, name);
    client.write(at as u64, data).unwrap();
    client.disconnect();
    bytes[at..at + data.len()].copy_from_slice(data);
}

/// A volume of the model: what it reads, and what it did when its snapshots were taken.
#[derive(Clone, Default)]
struct Modelled {
    bytes: Vec<u8>,
    snapshots: BTreeMap<String, Vec<u8>>,
}

#[test]
fn snapshots_and_clones_read_what_the_model_has_through_kills_and_commits() {
    let image = Image::sparse();
    let state = image.state();
    let mut rng = StdRng::seed_from_u64(harness::seed());
    let mut server = Serve::daemon(&state).start();
    image.volume("v0", &[]).ok();
    let mut model =
        BTreeMap::from([("v0".to_owned(), Modelled { bytes: image.raw.clone(), ..Modelled::default() })]);
    let mut made = 1;
    for step in 0..60 {
        let names: Vec<String> = model.keys().cloned().collect();
        let name = names[rng.random_range(0..names.len())].clone();
        let volume_now = model.get_mut(&name).unwrap();
        match rng.random_range(0..12) {
            0..5 => {
                let at = rng.random_range(0..image.raw.len() - 300_000);
                let data = noise(rng.random(), rng.random_range(1..300_000));
                write(&server, &name, &mut volume_now.bytes, at, &data);
            }
            5..7 => {
                let called = ask(&state, &["snapshot", &name]).ok().trim().to_owned();
                volume_now.snapshots.insert(called, volume_now.bytes.clone());
            }
            7 => {
                let Some(called) = volume_now.snapshots.keys().next().cloned() else { continue };
                let_go(&state, &name);
                // Commits may be lost by it: that is tested elsewhere.
                ask(&state, &["rollback", "--force", &name, &called]).ok();
                volume_now.bytes = volume_now.snapshots[&called].clone();
            }
            8 if made < 5 => {
                let new = format!("v{made}");
                made += 1;
                let copy = Modelled { bytes: volume_now.bytes.clone(), ..Modelled::default() };
                ask(&state, &["clone", &name, &new]).ok();
                model.insert(new, copy);
            }
            9 => {
                let _ = ask(&state, &["commit", "-m", "model", &name]);
            }
            10 => {
                let Some(called) = volume_now.snapshots.keys().next_back().cloned() else { continue };
                ask(&state, &["snapshot", "rm", &name, &called]).ok();
                volume_now.snapshots.remove(&called);
            }
            11 => {
                server.kill();
                server = Serve::daemon(&state).start();
            }
            _ => {}
        }
        let Modelled { bytes, .. } = &model[&name];
        assert!(
            read_all(&server, &name, bytes.len()) == *bytes,
            "step {step}: {name} is not what the model has"
        );
    }
    for (name, Modelled { bytes, snapshots }) in &model {
        assert!(read_all(&server, name, bytes.len()) == *bytes, "{name}");
        for (called, then) in snapshots {
            let_go(&state, name);
            let made = || {
                let status: Value =
                    serde_json::from_str(&ask(&state, &["status", name, "--json"]).ok()).unwrap();
                status["being_made"] == 0
            };
            assert!(until(PATIENCE, made));
            ask(&state, &["rollback", "--force", name, called]).ok();
            assert!(read_all(&server, name, then.len()) == *then, "{name} at {called}");
        }
    }
    server.stop();
}

#[test]
fn a_clone_is_made_at_once_shares_all_bytes_and_outlives_its_source() {
    let image = Image::sparse();
    let state = image.state();
    let server = Serve::daemon(&state).start();
    image.volume("v", &["--quota", "200M"]).ok();
    let mut bytes = image.raw.clone();
    write(&server, "v", &mut bytes, 0, &noise(7, 10 * MIB));
    let mut client = Client::open(&server, "v");
    client.flush().unwrap();
    let began = Instant::now();
    assert_eq!(ask(&state, &["clone", "v", "w"]).ok(), "w\n");
    let took = began.elapsed();
    // Not by its bytes: by a few fsyncs, on a disk that others keep busy too.
    assert!(took < Duration::from_secs(5), "{took:?}");
    println!("a clone of 10 MiB of changes took {took:?}");
    assert_eq!(ask(&state, &["clone", "v", "w"]).ok(), "w\n", "asked again it is that one");
    let data = |name: &str| {
        let files = files_below(&state.join("volumes").join(name).join("layers"));
        files.into_iter().filter(|path| path.ends_with("data")).map(|path| std::fs::metadata(path).unwrap())
    };
    assert!(
        data("w").any(|file| file.nlink() >= 2 && file.len() > 10 * MIB as u64),
        "its bytes are the source's"
    );
    assert!(
        data("w").all(|file| file.nlink() >= 2 || file.len() <= 2 * PAGE as u64),
        "and nothing is copied"
    );
    let mut of_w = bytes.clone();
    write(&server, "w", &mut of_w, 5 * MIB, &[9; 3 * PAGE]);
    write(&server, "v", &mut bytes, 5 * MIB, &[8; 2 * PAGE]);
    client.disconnect();
    assert_eq!(read_all(&server, "v", bytes.len()), bytes);
    assert_eq!(read_all(&server, "w", of_w.len()), of_w);
    let_go(&state, "v");
    volume(&state, &["rm", "v"]).ok();
    assert_eq!(read_all(&server, "w", of_w.len()), of_w);
    server.stop();
    let server = Serve::daemon(&state).start();
    assert_eq!(read_all(&server, "w", of_w.len()), of_w, "after a restart, without its source");
    let told = ask(&state, &["clone", "w", "w"]).refused();
    assert!(told.starts_with("error: there is a volume w already, with from v, not w\n"), "{told}");
    server.stop();
}

#[test]
fn a_rollback_drops_what_came_after_and_keeps_unpushed_commits_unless_forced() {
    let image = Image::sparse();
    let state = image.state();
    let server = Serve::daemon(&state).start();
    image.volume("v", &[]).ok();
    let mut bytes = image.raw.clone();
    write(&server, "v", &mut bytes, 0, &[1; PAGE]);
    assert_eq!(ask(&state, &["snapshot", "v", "before"]).ok(), "before\n");
    assert_eq!(ask(&state, &["snapshot", "v"]).ok(), "s1\n");
    let told = ask(&state, &["snapshot", "v", "before"]).refused();
    assert_eq!(
        told,
        "error: volume v has a snapshot before already\n\
         hint: give another name, or 'horcrux-cli snapshot rm v before' first\n"
    );
    let then = bytes.clone();
    write(&server, "v", &mut bytes, 0, &[2; 3 * PAGE]);
    let mut client = Client::open(&server, "v");
    let told = ask(&state, &["rollback", "v", "before"]).refused();
    assert!(told.starts_with("error: volume v is in use: 1 NBD connection\n"), "{told}");
    client.disconnect();
    let_go(&state, "v");
    assert_eq!(ask(&state, &["rollback", "v", "before"]).ok(), "v is what it was in before\n");
    assert_eq!(read_all(&server, "v", then.len()), then);
    write(&server, "v", &mut bytes, 0, &[3; PAGE]);
    ask(&state, &["commit", "-m", "after", "--wait", "v"]).ok();
    let_go(&state, "v");
    let told = ask(&state, &["rollback", "v", "before"]).refused();
    assert_eq!(
        told,
        "error: volume v has commits that are not pushed: a rollback would lose them\n\
         hint: 'horcrux-cli push v' first; '--force' goes on without them\n"
    );
    ask(&state, &["push", "v"]).ok();
    ask(&state, &["rollback", "v", "before"]).ok();
    assert_eq!(read_all(&server, "v", then.len()), then);
    let told = ask(&state, &["rollback", "v", "never"]).refused();
    assert_eq!(
        told,
        "error: volume v has no snapshot never; there is: before, s1\n\
         hint: 'horcrux-cli snapshot ls v' lists them\n"
    );
    assert_eq!(ask(&state, &["snapshot", "ls", "v"]).ok().lines().count(), 2);
    ask(&state, &["snapshot", "rm", "v", "before", "s1"]).ok();
    assert_eq!(ask(&state, &["snapshot", "ls", "v"]).ok(), "");
    server.stop();
}
