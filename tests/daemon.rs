//! The daemon: volumes are made, served when they are asked for, kept over restarts and taken away, by the command line and by others' HTTP clients.
//!
//! Failures users of other systems reported, and the test here that would find them:
//!
//! | failure | test |
//! |---|---|
//! | a volume is dropped because the daemon answers an error at start | `volumes_are_there_after_a_restart_with_the_repository_away` |
//! | Create is not idempotent, or begins anew | `asking_again_for_a_volume_changes_nothing_and_other_wishes_are_refused` |
//! | a request retried after a crash | `a_daemon_killed_while_volumes_come_and_go_leaves_whole_ones_only` |

#![allow(clippy::unwrap_used)]

mod harness;

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command as Program;
use std::time::{Duration, Instant};

use harness::proxy::{Proxy, Reach};
use harness::weed::{self, Weed};
use harness::{Client, Image, PAGE, PATIENCE, Serve, cli, files_below, need, noise, run, until, volume};
use nbd_proto::Errno;
use nbd_proto::client::Wish;
use rand::Rng;
use serde_json::Value;

const MIB: usize = 1 << 20;

fn wish(name: &str) -> Wish {
    Wish { name: name.to_owned(), mode: nbd_proto::HeaderMode::Structured, ..Wish::default() }
}

/// Another image beside `disk`.
fn add(image: &Image, name: &str, content: &[u8]) {
    let file = image.dir().join(name);
    std::fs::write(&file, content).unwrap();
    image.store(name, &file);
}

fn inspected(state: &Path, name: &str) -> Value {
    serde_json::from_str(&volume(state, &["inspect", name, "--json"]).ok()).unwrap()
}

fn names(state: &Path) -> Vec<String> {
    let volumes: Value = serde_json::from_str(&volume(state, &["ls", "--json"]).ok()).unwrap();
    volumes.as_array().unwrap().iter().map(|volume| volume["name"].as_str().unwrap().to_owned()).collect()
}

/// What is below the directory of volumes.
fn on_disk(state: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(state.join("volumes")).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn control(server_state: &Path) -> PathBuf {
    server_state.join("run/control.sock")
}

/// A request by curl; its status and what was answered.
fn curl(state: &Path, args: &[&str]) -> (u16, String) {
    let mut curl = Program::new("curl");
    curl.args(["-sS", "--max-time", "60", "-w", "\n%{http_code}", "--unix-socket"])
        .arg(control(state))
        .args(args);
    let said = run(&mut curl).ok();
    let (body, status) = said.trim_end().rsplit_once('\n').unwrap();
    (status.parse().unwrap(), body.to_owned())
}

#[test]
fn a_volume_is_made_served_when_asked_for_and_taken_away() {
    let image = Image::sparse();
    let state = image.state();
    let server = Serve::daemon(&state).start();
    assert!(server.said[0].starts_with("serving 0 volumes of "), "{:?}", server.said);
    assert_eq!(volume(&state, &["ls"]).ok(), "VOLUME  IMAGE  COMMIT  SIZE  CHANGED  CLIENTS\n");
    assert_eq!(image.volume("one", &[]).ok(), "one\n");
    assert_eq!(image.volume("two", &["--size", "1G", "--read-only"]).ok(), "two\n");
    assert_eq!(names(&state), ["one", "two"]);
    assert_eq!(inspected(&state, "one")["open"], Value::Null, "nobody has asked for it");
    assert_eq!(inspected(&state, "two")["size"], 1 << 30);
    assert_eq!(inspected(&state, "two")["read_only"], true);

    let mut client = Client::open(&server, "one");
    assert_eq!(client.read(MIB as u64, PAGE).unwrap(), image.raw[MIB..MIB + PAGE]);
    client.write(0, &[7; 3 * PAGE]).unwrap();
    assert_eq!(inspected(&state, "one")["open"]["connections"], 1);
    assert_eq!(inspected(&state, "one")["open"]["dirty_bytes"], 3 * PAGE);
    let table = volume(&state, &["ls"]).ok();
    assert!(table.contains("16.0 MiB  12.0 KiB  1\n"), "{table}");

    let mut grown = Client::open(&server, "two");
    assert_eq!(grown.read((1 << 30) - PAGE as u64, PAGE).unwrap(), [0; PAGE]);
    assert_eq!(grown.write(0, &[1; PAGE]), Err(Errno::Perm));
    grown.disconnect();

    let told = volume(&state, &["rm", "one"]).refused();
    assert_eq!(told, "error: volume one is in use: 1 NBD connection\nhint: stop who uses it first\n");
    assert_eq!(client.read(0, PAGE).unwrap(), [7; PAGE], "and it goes on");
    client.disconnect();
    assert!(until(PATIENCE, || inspected(&state, "one")["open"]["connections"] == 0));
    assert_eq!(volume(&state, &["rm", "one", "two"]).ok(), "one\ntwo\n");
    assert_eq!(names(&state), Vec::<String>::new());
    assert_eq!(on_disk(&state), Vec::<String>::new());
    let told = volume(&state, &["rm", "one"]).refused();
    assert!(told.starts_with("error: there is no volume one; there is none yet\n"), "{told}");

    // A new one of the name has nothing of the old one.
    image.volume("one", &[]).ok();
    assert_eq!(Client::open(&server, "one").read(0, PAGE).unwrap(), image.raw[..PAGE]);
    server.stop();
}

#[test]
fn asking_again_for_a_volume_changes_nothing_and_other_wishes_are_refused() {
    let image = Image::sparse();
    let state = image.state();
    let server = Serve::daemon(&state).start();
    image.volume("v", &["--quota", "64M"]).ok();
    let mut client = Client::open(&server, "v");
    client.write(0, &[7; PAGE]).unwrap();
    let before = inspected(&state, "v");
    // A new version, and then no repository at all: the volume stays on what it was made of.
    std::fs::write(image.raw_file(), noise(9, 16 * MIB)).unwrap();
    image.store("disk", &image.raw_file());
    assert_eq!(image.volume("v", &["--quota", "64M"]).ok(), "v\n");
    std::fs::rename(image.repo(), image.dir().join("away")).unwrap();
    assert_eq!(image.volume("v", &["--quota", "64M"]).ok(), "v\n");
    assert_eq!(inspected(&state, "v"), before);
    assert_eq!(client.read(0, PAGE).unwrap(), [7; PAGE]);
    std::fs::rename(image.dir().join("away"), image.repo()).unwrap();

    let repo = image.repo().display().to_string();
    for (wishes, what) in [
        (vec!["--quota", "65M"], "quota 67108864 bytes, not 68157440 bytes".to_owned()),
        (vec![], "quota 67108864 bytes, not none".to_owned()),
        (vec!["--quota", "64M", "--size", "1G"], "size the image's, not 1073741824 bytes".to_owned()),
        (vec!["--quota", "64M", "--read-only"], "ro false, not true".to_owned()),
        (vec!["--quota", "64M", "--prefetch", "all"], "prefetch learned, not all".to_owned()),
        (vec!["--quota", "64M", "--access", "/else"], format!("access {repo}, not {repo}, /else")),
    ] {
        let told = image.volume("v", &wishes).refused();
        assert_eq!(
            told,
            format!(
                "error: there is a volume v already, with {what}\n\
                 hint: remove that volume first, or give this one another name\n"
            )
        );
    }
    client.disconnect();
    server.stop();
}

#[test]
fn volumes_are_there_after_a_restart_with_the_repository_away() {
    let image = Image::sparse();
    let state = image.state();
    let server = Serve::daemon(&state).start();
    image.volume("kept", &[]).ok();
    // Of another version: not even its map is here.
    std::fs::write(image.raw_file(), noise(9, 16 * MIB)).unwrap();
    image.store("disk", &image.raw_file());
    image.volume("never-opened", &[]).ok();
    let mut client = Client::open(&server, "kept");
    client.read(0, 4 * MIB).unwrap();
    client.write(MIB as u64, &[8; PAGE]).unwrap();
    client.flush().unwrap();
    // A stop writes out what the cache has; a kill may not.
    client.disconnect();
    server.stop();
    std::fs::rename(image.repo(), image.dir().join("away")).unwrap();

    let server = Serve::daemon(&state).arg("--remote-timeout").arg("1").start();
    assert!(server.said[0].starts_with("serving 2 volumes of "), "{:?}", server.said);
    assert_eq!(names(&state), ["kept", "never-opened"]);
    let mut client = Client::open(&server, "kept");
    assert_eq!(client.read(0, PAGE).unwrap(), image.raw[..PAGE]);
    assert_eq!(client.read(MIB as u64, PAGE).unwrap(), [8; PAGE]);
    // What is not here can't be read now, and is there all the same.
    let mut unread = Client::open(&server, "never-opened");
    assert_eq!(unread.read(0, PAGE).unwrap_err().0, Errno::Io);
    assert_eq!(names(&state), ["kept", "never-opened"]);
    std::fs::rename(image.dir().join("away"), image.repo()).unwrap();
    assert_eq!(unread.read(0, PAGE).unwrap(), noise(9, 16 * MIB)[..PAGE]);
    unread.disconnect();
    client.disconnect();
    server.stop();
}

#[test]
fn a_volume_with_the_name_of_another_image_is_never_served_as_that_image() {
    let image = Image::sparse();
    let other = image.dir().join("other");
    std::fs::write(&other, noise(5, 4 * MIB)).unwrap();
    image.store("other", &other);
    let state = image.state();
    let server = Serve::daemon(&state).start();
    let repo = image.repo().display().to_string();
    volume(&state, &["create", "disk", "--access", &repo, "--name", "other"]).ok();
    server.stop();
    for more in [[].as_slice(), &["--read-only"]] {
        let mut serve = Serve::disk(&image);
        for arg in more {
            serve = serve.arg(arg);
        }
        assert_eq!(
            serve.refused().lines().filter(|line| !line.contains("INFO")).collect::<Vec<_>>(),
            [
                "error: volume disk is one of the image other, not of the image disk",
                "hint: 'horcrux-nbd serve' without a name serves that volume; use another --state-dir for this image",
            ]
        );
    }
    // Pinning goes by the volume, whatever its image is called.
    run(cli().args(["pin", "disk", "--state-dir"]).arg(&state)).ok();
    std::fs::rename(image.repo(), image.dir().join("away")).unwrap();
    let server = Serve::daemon(&state).start();
    assert_eq!(Client::open(&server, "disk").read(0, 4 * MIB).unwrap(), noise(5, 4 * MIB));
    server.stop();
}

#[test]
fn what_can_t_be_made_is_refused_with_words_and_leaves_nothing() {
    let image = Image::sparse();
    let state = image.state();
    let server = Serve::daemon(&state).start();
    let repo = image.repo();
    let (repo, nowhere) = (repo.to_str().unwrap(), image.dir().join("nowhere"));
    let nowhere = nowhere.to_str().unwrap();
    let file = image.raw_file();
    for (args, told) in [
        (
            ["--access", repo, "--name", "dusk"].as_slice(),
            format!("error: no image 'dusk' in {repo}; it has: disk\nhint: check the name; 'horcrux-cli image-from-dir NAME DIR REPO' makes an image\n"),
        ),
        (&["--access", repo, "--name", "disk@v9"], "error: no branch, tag or commit 'v9' in disk; ".to_owned()),
        (&["--access", nowhere, "--name", "disk"], format!("error: {nowhere}: no such directory\nhint: check the place;")),
        (&["--access", "ftp://host/dir", "--name", "disk"], "error: unknown scheme 'ftp'; known forms: ".to_owned()),
        (&["--access", file.to_str().unwrap(), "--name", "disk"], "error: ".to_owned()),
        (
            &["--access", repo, "--name", "disk", "--size", "15M"],
            "error: volume v can't have 15.0 MiB: its image has 16.0 MiB\nhint: leave the size out, or give a larger one\n".to_owned(),
        ),
    ] {
        let mut all = vec!["create", "v"];
        all.extend(args);
        let said = volume(&state, &all).refused();
        assert!(said.starts_with(&told), "{args:?}: {said}");
    }
    assert_eq!(names(&state), Vec::<String>::new());
    assert_eq!(on_disk(&state), Vec::<String>::new());
    // The command line itself knows what can't be a name.
    let said = volume(&state, &["create", "a/b", "--access", repo, "--name", "disk"]);
    assert_eq!(said.status.code(), Some(2));
    assert!(
        said.stderr.contains("'a/b' can't be a volume's name: only A-Z a-z 0-9 . _ - are allowed"),
        "{}",
        said.stderr
    );
    server.stop();
}

#[test]
fn a_daemon_that_is_down_is_named_and_a_second_one_is_refused() {
    let image = Image::sparse();
    let state = image.state();
    let socket = control(&state).display().to_string();
    let told = volume(&state, &["ls"]).refused();
    assert_eq!(
        told,
        format!(
            "error: no daemon answers at {socket}: No such file or directory (os error 2)\n\
             hint: start it with 'horcrux-nbd serve', or give the --state-dir it runs on\n"
        )
    );
    let mut server = Serve::daemon(&state).start();
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let told = Serve::daemon(&state).refused();
    assert!(told.contains(&format!("is in use by process {}", server.pid())), "{told}");
    image.volume("v", &[]).ok();
    // A socket that a dead daemon left is in nobody's way.
    server.kill();
    assert!(volume(&state, &["ls"]).refused().contains("Connection refused"));
    let server = Serve::daemon(&state).start();
    assert_eq!(names(&state), ["v"]);
    let status: Value =
        serde_json::from_str(&run(cli().args(["status", "--json", "--state-dir"]).arg(&state)).ok()).unwrap();
    assert_eq!(status["pid"], server.pid());
    assert_eq!(status["volumes"], 1);
    server.stop();
    assert!(!Path::new(&socket).exists(), "it goes with its daemon");
}

#[test]
fn who_sends_too_much_is_told_so_while_sending() {
    let image = Image::sparse();
    let state = image.state();
    let server = Serve::daemon(&state).start();
    let mut client = UnixStream::connect(control(&state)).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let half = vec![b' '; MIB / 2];
    write!(client, "POST /v1/volumes HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {MIB}\r\n\r\n").unwrap();
    client.write_all(&half).unwrap();
    // By now it is known that this is too much.
    std::thread::sleep(Duration::from_millis(300));
    client.write_all(&half).expect("the rest is taken");
    let mut told = [0; 12];
    client.read_exact(&mut told).unwrap();
    assert_eq!(&told, b"HTTP/1.1 413");
    server.stop();
}

#[test]
fn others_clients_are_answered_in_json_and_refused_with_words() {
    if !need(&["curl"]) {
        return;
    }
    let image = Image::sparse();
    let state = image.state();
    let server = Serve::daemon(&state).start();
    let repo = image.repo().display().to_string();
    let wanted = format!(r#"{{"name":"v","access":["{repo}"],"image":"disk","ref":"main~0"}}"#);
    let (status, made) =
        curl(&state, &["-H", "content-type: application/json", "-d", &wanted, "http://x/v1/volumes"]);
    assert_eq!(status, 201, "{made}");
    let (again, _) =
        curl(&state, &["-H", "content-type: application/json", "-d", &wanted, "http://x/v1/volumes"]);
    assert_eq!(again, 200, "it was there");
    let made: Value = serde_json::from_str(&made).unwrap();
    assert_eq!(
        (&made["name"], &made["image"], &made["size"]),
        (&"v".into(), &"disk".into(), &(16 * MIB).into())
    );
    let (status, there) = curl(&state, &["http://x/v1/volumes/v"]);
    let mut there: Value = serde_json::from_str(&there).unwrap();
    assert_eq!(there.as_object_mut().unwrap().remove("cached_bytes"), Some(0.into()));
    assert_eq!((status, there), (200, made));

    let huge = image.dir().join("huge");
    std::fs::write(&huge, vec![b' '; MIB]).unwrap();
    let huge = format!("@{}", huge.display());
    let typo = wanted.replace("\"ref\"", "\"reff\"");
    for (args, status, code, words) in [
        (vec!["-d", "{\"name\":", "http://x/v1/volumes"], 400, "bad_request", "EOF while parsing"),
        (vec!["-d", &typo, "http://x/v1/volumes"], 400, "bad_request", "unknown field `reff`"),
        (vec!["-d", "{}", "http://x/v1/volumes"], 400, "bad_request", "missing field `name`"),
        (vec!["--data-binary", &huge, "http://x/v1/volumes"], 413, "too_large", "too large"),
        (vec!["http://x/v1/volumes/no"], 404, "no_volume", "there is no volume no; there is: v"),
        (vec!["http://x/v1/volumes/..%2F..%2Fetc"], 400, "bad_request", "can't be a volume's name"),
        (vec!["http://x/v2/volumes"], 404, "no_route", "there is no GET /v2/volumes"),
        (vec!["-X", "PATCH", "http://x/v1/volumes"], 404, "no_route", "there is no PATCH /v1/volumes"),
        (vec!["-d", "{}", "http://x/v1/volumes/no/attach"], 404, "no_volume", "there is no volume no"),
        (
            vec!["-d", "{\"directory\":\"mnt\"}", "http://x/v1/volumes/v/mount"],
            400,
            "bad_request",
            "must be absolute",
        ),
        (vec!["-X", "DELETE", "http://x/v1/volumes/no"], 404, "no_volume", "there is no volume no"),
    ] {
        let mut all = vec!["-H", "content-type: application/json"];
        all.extend(&args);
        let (was, body) = curl(&state, &all);
        assert_eq!(was, status, "{args:?}: {body}");
        let failure: Value =
            serde_json::from_str(&body).unwrap_or_else(|error| panic!("{args:?}: {error}: {body}"));
        assert_eq!(failure["code"], code, "{args:?}");
        assert!(failure["error"].as_str().unwrap().contains(words), "{args:?}: {body}");
    }

    // The document names every address there is, and what it names is there.
    let (status, document) = curl(&state, &["http://x/openapi.json"]);
    assert_eq!(status, 200);
    let document: Value = serde_json::from_str(&document).unwrap();
    assert!(document["openapi"].as_str().unwrap().starts_with("3."));
    let mut described: Vec<String> = Vec::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        described.extend(methods.as_object().unwrap().keys().map(|method| format!("{method} {path}")));
    }
    described.sort();
    assert_eq!(
        described,
        [
            "delete /v1/jobs/{id}",
            "delete /v1/volumes/{name}",
            "get /metrics",
            "get /v1/jobs",
            "get /v1/jobs/{id}",
            "get /v1/status",
            "get /v1/volumes",
            "get /v1/volumes/{name}",
            "post /v1/volumes",
            "post /v1/volumes/{name}/attach",
            "post /v1/volumes/{name}/detach",
            "post /v1/volumes/{name}/mount",
            "post /v1/volumes/{name}/pin",
            "post /v1/volumes/{name}/unmount",
            "post /v1/volumes/{name}/unpin",
        ]
    );
    assert_eq!(curl(&state, &["-X", "DELETE", "http://x/v1/volumes/v"]), (204, String::new()));
    server.stop();
}

#[test]
fn clients_that_stall_hold_up_nobody_and_a_stop_does_not_wait_for_them() {
    let image = Image::sparse();
    let state = image.state();
    let server = Serve::daemon(&state).start();
    let mut stalled: Vec<UnixStream> = (0..32)
        .map(|_| {
            let mut stream = UnixStream::connect(control(&state)).unwrap();
            stream.write_all(b"POST /v1/volumes HTTP/1.1\r\nhost: x\r\ncontent-le").unwrap();
            stream
        })
        .collect();
    // And one that sends no HTTP at all.
    let mut garbage = UnixStream::connect(control(&state)).unwrap();
    garbage.write_all(&noise(3, 4096)).unwrap();
    garbage.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = Vec::new();
    let _ = garbage.read_to_end(&mut answer);
    assert!(answer.starts_with(b"HTTP/1.1 400"), "{}", String::from_utf8_lossy(&answer));
    image.volume("v", &[]).ok();
    assert_eq!(names(&state), ["v"]);
    let began = Instant::now();
    server.stop();
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    let mut rest = Vec::new();
    stalled.iter_mut().for_each(|stream| drop(stream.read_to_end(&mut rest)));
}

#[test]
fn a_client_that_goes_away_leaves_a_whole_volume_or_none() {
    let image = Image::sparse();
    let state = image.state();
    if !weed::weed() {
        return;
    }
    let weed = Weed::start();
    let proxy = Proxy::http(weed.address());
    let far = weed::url_at(proxy.address(), "repo");
    weed.store(&image, "repo");
    let server = Serve::daemon(&state).credentials(weed::ACCESS_KEY, weed::SECRET_KEY).start();
    proxy.set_reach(Reach::Silent);
    let wanted = format!(r#"{{"name":"v","access":["{far}"],"image":"disk"}}"#);
    let mut client = UnixStream::connect(control(&state)).unwrap();
    let head = format!(
        "POST /v1/volumes HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        wanted.len()
    );
    client.write_all((head + &wanted).as_bytes()).unwrap();
    // It is in the middle of it: others are answered meanwhile.
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(names(&state), Vec::<String>::new());
    drop(client);
    proxy.set_reach(Reach::Here);
    assert!(until(PATIENCE, || names(&state) == ["v"]), "{}", server.log());
    assert_eq!(Client::open(&server, "v").read(0, PAGE).unwrap(), image.raw[..PAGE]);
    server.stop();
}

#[test]
fn many_who_ask_for_one_volume_at_once_get_one() {
    let image = Image::sparse();
    let state = image.state();
    let server = Serve::daemon(&state).start();
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| assert_eq!(image.volume("v", &[]).ok(), "v\n"));
        }
    });
    assert_eq!(server.lines("made volume=v").len(), 1, "{}", server.log());
    // Some take it away, some make it, some open it: each is told something true, and at the end all is whole.
    std::thread::scope(|scope| {
        for turn in 0..24 {
            let (image, state, server) = (&image, &state, &server);
            scope.spawn(move || match turn % 3 {
                0 => drop(image.volume("v", &[])),
                1 => drop(volume(state, &["rm", "v"])),
                _ => drop(Client::connect(server, wish("v"))),
            });
        }
    });
    image.volume("v", &[]).ok();
    assert_eq!(names(&state), ["v"]);
    assert_eq!(on_disk(&state), ["v"]);
    assert_eq!(Client::open(&server, "v").read(0, PAGE).unwrap(), image.raw[..PAGE]);
    server.stop();
}

#[test]
fn a_daemon_killed_while_volumes_come_and_go_leaves_whole_ones_only() {
    let image = Image::sparse();
    let state = image.state();
    let mut rng = rand::rng();
    for round in 0..12 {
        let mut server = Serve::daemon(&state).start();
        let delay = Duration::from_millis(rng.random_range(1..120));
        std::thread::scope(|scope| {
            for number in 0..4 {
                let (image, state) = (&image, &state);
                scope.spawn(move || {
                    let name = format!("v{number}");
                    image.volume(&name, &[]);
                    volume(state, &["rm", &name]);
                    image.volume(&name, &[]);
                });
            }
            std::thread::sleep(delay);
            server.kill();
        });
        let server = Serve::daemon(&state).start();
        let there = names(&state);
        for name in &there {
            assert_eq!(
                Client::open(&server, name).read(0, PAGE).unwrap(),
                image.raw[..PAGE],
                "round {round}"
            );
        }
        // What a removal left is gone, what a making left is made into a volume.
        assert!(on_disk(&state).iter().all(|name| !name.starts_with('.')), "{:?}", on_disk(&state));
        for number in 0..4 {
            image.volume(&format!("v{number}"), &[]).ok();
        }
        for name in names(&state) {
            // The clients above are gone; the server may still be about to see it.
            assert!(until(PATIENCE, || volume(&state, &["rm", &name]).status.success()), "round {round}");
        }
        server.stop();
    }
}

#[test]
fn a_hundred_volumes_are_one_small_process() {
    let image = Image::sparse();
    let state = image.state();
    let server = Serve::daemon(&state).start();
    let all: Vec<String> = (0..100).map(|number| format!("v{number}")).collect();
    for name in &all {
        image.volume(name, &[]).ok();
    }
    let mut clients: Vec<Client> = all.iter().map(|name| Client::open(&server, name)).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        client.write(0, &[number as u8; PAGE]).unwrap();
        client.read(MIB as u64, PAGE).unwrap();
    }
    for (number, client) in clients.iter_mut().enumerate() {
        assert_eq!(client.read(0, PAGE).unwrap(), [number as u8; PAGE]);
        client.flush().unwrap();
    }
    let mib = server.resident_kib() >> 10;
    assert!(mib < 300, "{mib} MiB");
    std::thread::sleep(Duration::from_secs(6));
    let before = server.cpu_ticks();
    std::thread::sleep(Duration::from_secs(10));
    let ticks = server.cpu_ticks() - before;
    println!(
        "100 volumes, open and connected: {mib} MiB, {ticks} hundredths of a second of processor in 10 s"
    );
    assert!(ticks < 10, "{ticks} ticks in 10 s is over 1%");
    drop(clients);
    server.stop();
}

/// What the cache holds, as the daemon says.
fn cached(state: &Path) -> u64 {
    let status: Value =
        serde_json::from_str(&run(cli().args(["status", "--json", "--state-dir"]).arg(state)).ok()).unwrap();
    status["cache"]["used_bytes"].as_u64().unwrap()
}

#[test]
fn the_last_volume_of_an_image_takes_what_nobody_else_needs_out_of_the_cache() {
    let image = Image::of(noise(51, 6 * MIB));
    // Half of it is the first image's.
    let other = [&image.raw[..3 * MIB], &noise(52, 3 * MIB)].concat();
    add(&image, "other", &other);
    let state = image.state();
    let server = Serve::daemon(&state).start();
    let repo = image.repo().display().to_string();
    for name in ["a1", "a2"] {
        image.volume(name, &["--prefetch", "all"]).ok();
    }
    volume(&state, &["create", "b", "--access", &repo, "--name", "other", "--prefetch", "all"]).ok();
    for name in ["a1", "b"] {
        Client::open(&server, name).disconnect();
    }
    let all = 9 * MIB as u64;
    assert!(until(PATIENCE, || cached(&state) == all), "{} of {all}", cached(&state));
    // There is another one of it, which may want the same.
    volume(&state, &["rm", "a1"]).ok();
    assert_eq!(cached(&state), all);
    volume(&state, &["rm", "a2"]).ok();
    assert_eq!(cached(&state), 6 * MIB as u64);
    assert_eq!(server.lines("freed what nobody needs").len(), 1, "{}", server.log());
    // What is left serves alone.
    std::fs::rename(image.repo(), image.dir().join("away")).unwrap();
    assert_eq!(Client::open(&server, "b").read(0, 6 * MIB).unwrap(), other);
    // Once its client is gone.
    assert!(until(PATIENCE, || volume(&state, &["rm", "b"]).status.success()));
    assert_eq!(cached(&state), 0);
    let slabs = std::fs::read_dir(state.join("cache/slabs")).unwrap();
    assert_eq!(slabs.count(), 0);
    server.stop();
}

#[test]
fn a_pinned_volume_that_is_removed_lets_its_chunks_go_and_one_that_stays_keeps_all_of_its_own() {
    let image = Image::of(noise(53, 6 * MIB));
    let other = [&image.raw[..3 * MIB], &noise(54, 3 * MIB)].concat();
    add(&image, "other", &other);
    add(&image, "third", &noise(55, MIB));
    let state = image.state();
    let repo = image.repo().display().to_string();
    let server = Serve::daemon(&state).start();
    image.volume("a", &[]).ok();
    for (name, of) in [("b", "other"), ("c", "third")] {
        volume(&state, &["create", name, "--access", &repo, "--name", of, "--prefetch", "all"]).ok();
    }
    server.stop();
    for name in ["a", "b"] {
        run(cli().args(["pin", name, "--state-dir"]).arg(&state)).ok();
    }
    let server = Serve::daemon(&state).start();
    for name in ["a", "b", "c"] {
        Client::open(&server, name).disconnect();
    }
    let mib = MIB as u64;
    assert!(until(PATIENCE, || cached(&state) == 10 * mib), "{}", cached(&state));
    volume(&state, &["rm", "a"]).ok();
    assert_eq!(cached(&state), 7 * mib);
    // What b needs can't be told any more, so that nothing is freed.
    for file in files_below(&state.join("cache/meta")) {
        std::fs::remove_file(file).unwrap();
    }
    assert!(until(PATIENCE, || volume(&state, &["rm", "c"]).status.success()));
    assert_eq!(cached(&state), 7 * mib);
    let said = server.lines("can't tell what a pinned volume needs: nothing is freed");
    assert_eq!(said.len(), 1, "{}", server.log());
    assert_eq!(Client::open(&server, "b").read(0, 6 * MIB).unwrap(), other);
    server.stop();
}

#[test]
fn a_pinned_volume_that_nobody_asked_for_since_the_start_keeps_its_chunks() {
    let image = Image::of(noise(56, 6 * MIB));
    add(&image, "big", &noise(57, 24 * MIB));
    let state = image.state();
    let repo = image.repo().display().to_string();
    let daemon = || Serve::daemon(&state).arg("--cache-size").arg("20M").start();
    let server = daemon();
    image.volume("small", &[]).ok();
    volume(&state, &["create", "big", "--access", &repo, "--name", "big"]).ok();
    server.stop();
    run(cli().args(["pin", "--cache-size", "20M", "small", "--state-dir"]).arg(&state)).ok();
    // The other one goes by twice.
    let server = daemon();
    for _ in 0..2 {
        assert_eq!(Client::open(&server, "big").read(0, 24 * MIB).unwrap().len(), 24 * MIB);
    }
    std::fs::rename(image.repo(), image.dir().join("away")).unwrap();
    assert_eq!(Client::open(&server, "small").read(0, 6 * MIB).unwrap(), image.raw);
    server.stop();
}

#[test]
fn credentials_of_a_store_are_in_no_answer_no_file_and_no_log() {
    let image = Image::sparse();
    let state = image.state();
    if !weed::weed() || !need(&["curl"]) {
        return;
    }
    let weed = Weed::start();
    let (near, denied) = (weed.url("repo"), weed.url("elsewhere"));
    weed.store(&image, "repo");
    let server = Serve::daemon(&state).credentials(weed::ACCESS_KEY, weed::SECRET_KEY).start();
    volume(&state, &["create", "v", "--access", &near, "--name", "disk"]).ok();
    let mut client = Client::open(&server, "v");
    assert_eq!(client.read(0, PAGE).unwrap(), image.raw[..PAGE]);
    client.write(0, &[1; PAGE]).unwrap();
    client.flush().unwrap();
    let mut seen = String::new();
    let asked = format!(r#"{{"name":"w","access":["{denied}"],"image":"disk"}}"#);
    let json = "content-type: application/json";
    for args in [
        vec!["http://localhost/v1/status"],
        vec!["http://localhost/v1/volumes"],
        vec!["http://localhost/v1/volumes/v"],
        vec!["http://localhost/openapi.json"],
        // An error of the store's.
        vec!["-H", json, "--data", &asked, "http://localhost/v1/volumes"],
    ] {
        seen += &curl(&state, &args).1;
    }
    assert!(seen.contains(&near) && seen.contains("elsewhere/ at"), "{seen}");
    client.disconnect();
    let log = server.kept_log();
    server.stop();
    seen += &log.lock().unwrap();
    for secret in [weed::ACCESS_KEY, weed::SECRET_KEY] {
        assert!(!seen.contains(secret), "{seen}");
        for file in files_below(&state) {
            let bytes = std::fs::read(&file).unwrap();
            let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!found, "{} holds {secret}", file.display());
        }
    }
}
