//! What users, repositories and clients can do wrong, and the words they are told. Disks have `serve_bad_disk.rs`.
//!
//! Failures users of other systems reported, and the test here that would find them:
//!
//! | failure | test |
//! |---|---|
//! | truncated, empty, all-zero or error-page bodies accepted as data | `a_damaged_object_is_named_and_never_served` |
//! | hostile bytes: options around STARTTLS | `options_around_starttls_keep_the_stream_in_step` |
//! | lengths of 2^32-1, zero lengths, unaligned status requests, 2^20 extents | `hostile_lengths_cost_their_sender_an_error_or_the_connection` |

#![allow(clippy::unwrap_used)]

mod harness;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command as Program;
use std::time::{Duration, Instant};

use harness::{
    Client, Image, PAGE, PATIENCE, Serve, Server, cli, image_refused, images, need, need_root, noise, run,
    until,
};
use nbd_proto::client::{Wish, encode_request};
use nbd_proto::{Command, CommandFlags, Errno, HeaderMode, Request, wire};

const MIB: usize = 1 << 20;
const NONE: CommandFlags = CommandFlags::NONE;

/// What the server says when it refuses to serve `name` of `repo`.
#[track_caller]
fn serve_refused(repo: &Path, name: &str) -> String {
    let state = tempfile::tempdir().unwrap();
    Serve::new(repo, state.path()).name(name).refused()
}

#[test]
fn a_directory_that_is_not_there_or_not_one_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let repo = dir.path().join("repo");
    let missing = dir.path().join("missing");
    assert_eq!(
        image_refused(&["A"], &missing, &repo),
        format!("error: {}: No such file or directory (os error 2)\n", missing.display())
    );
    fs::write(&missing, "a file").unwrap();
    assert_eq!(
        image_refused(&["A"], &missing, &repo),
        format!("error: {}: Not a directory (os error 20)\n", missing.display())
    );
    assert_eq!(images(&repo), Vec::<String>::new());
}

#[test]
fn files_that_may_not_be_read_are_all_named_and_nothing_is_stored() {
    if !need(&["setpriv"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, repo) = (dir.path().join("source"), dir.path().join("repo"));
    fs::create_dir_all(source.join("sub")).unwrap();
    fs::create_dir_all(&repo).unwrap();
    for (file, mode) in [("fine", 0o644), ("secret", 0o000), ("sub/key", 0o000)] {
        fs::write(source.join(file), "bytes").unwrap();
        fs::set_permissions(source.join(file), fs::Permissions::from_mode(mode)).unwrap();
    }
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&repo, fs::Permissions::from_mode(0o777)).unwrap();
    // Root may read everything, so it is someone else who tries: with a copy of the program, for it may not get at ours.
    let program = dir.path().join("horcrux-cli");
    fs::copy(cli().get_program(), &program).unwrap();
    let mut command = Program::new(&program);
    if rustix::process::geteuid().is_root() {
        command = Program::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&program);
    }
    let told = run(command.args(["image-from-dir", "A"]).arg(&source).arg(&repo)).refused();
    let name = |file: &str| source.join(file).display().to_string();
    assert_eq!(
        told,
        format!(
            "error: no permission to read {}, {}\n\
             hint: run as a user who may read them; nothing was stored\n",
            name("secret"),
            name("sub/key")
        )
    );
    assert_eq!(images(&repo), Vec::<String>::new());
}

#[test]
fn a_directory_too_big_for_its_size_is_told_what_it_needs() {
    let dir = tempfile::tempdir().unwrap();
    let (source, repo) = (dir.path().join("source"), dir.path().join("repo"));
    fs::create_dir(&source).unwrap();
    fs::write(source.join("data"), noise(1, 30 * MIB)).unwrap();
    let told = image_refused(&["--size", "20M", "A"], &source, &repo);
    let (needed, rest) = told
        .strip_prefix("error: the directory needs a device of ")
        .and_then(|rest| rest.split_once(" bytes, the size given is 20971520; hint: --size "))
        .unwrap_or_else(|| panic!("{told}"));
    assert!(needed.parse::<usize>().unwrap() > 30 * MIB);
    assert_eq!(images(&repo), Vec::<String>::new());
    // And that is true.
    let enough = rest.split_whitespace().next().unwrap();
    run(cli().args(["image-from-dir", "--size", enough, "A"]).arg(&source).arg(&repo)).ok();
    assert_eq!(images(&repo), ["A"]);
}

#[test]
fn a_place_that_is_no_repository_is_told_apart_from_one_of_another_version() {
    let image = Image::of(noise(1, MIB));
    let dir = image.dir();
    let (nothing, other, source) = (dir.join("nothing"), dir.join("other"), dir.join("source"));
    let told = serve_refused(&nothing, "disk");
    let at = nothing.display();
    assert_eq!(
        told,
        format!(
            "error: {at}: no such directory\n\
             hint: check --access; 'horcrux-cli image-from-dir NAME DIR {at}' makes a repository in an empty place\n"
        )
    );
    fs::create_dir(&other).unwrap();
    fs::create_dir(&source).unwrap();
    fs::write(other.join("letter.txt"), "not ours").unwrap();
    let at = other.display();
    assert_eq!(
        serve_refused(&other, "disk"),
        format!(
            "error: {at} is not a repository: it has no object 'format'\n\
             hint: check --access; 'horcrux-cli image-from-dir NAME DIR {at}' makes a repository in an empty place\n"
        )
    );
    assert_eq!(
        image_refused(&["A"], &source, &other),
        format!(
            "error: {at} is not empty and not a repository: it holds 'letter.txt'; a new repository needs an empty place\n"
        )
    );
    assert_eq!(fs::read_dir(&other).unwrap().count(), 1, "nothing was put beside it");
    let format = image.repo().join("format");
    let good = fs::read_to_string(&format).unwrap();
    fs::write(&format, good.replace("repository 1", "repository 9")).unwrap();
    let at = image.repo();
    let error = format!("error: {}: format: repository version 9, this build reads 1..=1\n", at.display());
    assert_eq!(
        serve_refused(&at, "disk"),
        format!("{error}hint: it was written by a newer Horcrux; serve it with that one\n")
    );
    assert_eq!(
        image_refused(&["A"], &source, &at),
        format!("{error}hint: it was written by a newer Horcrux; use that one\n")
    );
    let url = |access: &str| {
        let state = tempfile::tempdir().unwrap();
        Serve::new(Path::new(access), state.path()).name("disk").refused()
    };
    assert_eq!(
        url("http://host/x"),
        "error: unknown scheme 'http'; known forms: /dir, file:///dir, cp:///dir, scp://[user@]host[:port]/dir, s3://bucket[/prefix][?region=R&endpoint=URL], minio://host:port/bucket[/prefix]\n"
    );
}

#[test]
fn names_and_refs_that_are_not_there_are_told_which_are() {
    let image = Image::of(noise(1, MIB));
    for name in ["AMCC", "zeta"] {
        image.store(name, &image.raw_file());
    }
    let repo = image.repo();
    let at = repo.display();
    assert_eq!(
        serve_refused(&repo, "dsk"),
        format!(
            "error: no image 'dsk' in {at}; it has: AMCC, disk, zeta\n\
             hint: check --name; 'horcrux-cli image-from-dir dsk DIR REPO' makes an image\n"
        )
    );
    assert_eq!(
        serve_refused(&repo, "disk@v2"),
        "error: no branch, tag or commit 'v2' in disk; it has: main\n"
    );
    assert_eq!(
        serve_refused(&repo, "disk@main~3"),
        "error: disk@main~3 is not there: the history goes back 0 commits only\n"
    );
    let twice = Serve::new(&repo, &image.state()).name("disk").name("disk@main").refused();
    assert_eq!(
        twice,
        "error: disk is to be served twice\n\
         hint: for two versions of an image use two servers, each with its own --state-dir\n"
    );
    assert!(!image.state().exists(), "refused before anything was touched");
}

#[test]
fn names_that_could_leave_a_directory_are_wrong_usage() {
    let image = Image::of(noise(1, MIB));
    let names = [
        ("a/b", "it has a '/'"),
        ("a..b", "it has '..'"),
        ("..", "it must start with a letter or digit"),
        ("../x", "it must start with a letter or digit"),
        ("", "it is empty"),
        ("a b", "only A-Z a-z 0-9 . _ - are allowed"),
        (&"x".repeat(200), "it is longer than 128 characters"),
    ];
    for (name, why) in names {
        for ran in [
            run(cli().args(["image-from-file", name]).arg(image.raw_file()).arg(image.repo())),
            Serve::new(&image.repo(), &image.state()).name(name).run(),
            Serve::new(&image.repo(), &image.state()).name(&format!("{name}@main")).run(),
        ] {
            assert_eq!(ran.status.code(), Some(2), "{ran:?}");
            assert!(ran.stderr.contains("can't be an image's name") && ran.stderr.contains(why), "{ran:?}");
        }
        let reference = Serve::new(&image.repo(), &image.state()).name(&format!("disk@{name}")).run();
        assert_eq!(reference.status.code(), Some(2), "{reference:?}");
    }
    assert_eq!(images(&image.repo()), ["disk"]);
}

/// What can happen to an object's bytes.
const DAMAGES: [&str; 5] = ["cut", "empty", "zeroed", "flipped", "an error page"];

fn damage(kind: &str, good: &[u8]) -> Vec<u8> {
    let mut bytes = good.to_vec();
    match kind {
        "cut" => bytes.truncate(bytes.len() / 3),
        "empty" => bytes.clear(),
        "zeroed" => bytes.fill(0),
        "flipped" => {
            let at = bytes.len() / 3;
            bytes[at] ^= 0x20;
        }
        _ => bytes = b"<html><body><h1>503 Service Unavailable</h1></body></html>".to_vec(),
    }
    bytes
}

#[test]
fn a_read_over_a_damaged_chunk_is_told_where_it_is() {
    if !need(&["nbdsh"]) {
        return;
    }
    let image = Image::of(noise(6, 2 * MIB));
    let state = tempfile::tempdir().unwrap();
    let server = Serve::new(&image.repo(), state.path()).name("disk").start();
    // In the middle of the fourth of a block's eight chunks; noise is stored as it is, in order.
    const CHUNK: usize = 128 << 10;
    let mut damaged = None;
    for path in image.objects("blocks") {
        let good = fs::read(&path).unwrap();
        let mut bad = good.clone();
        bad[3 * CHUNK + CHUNK / 2] ^= 1;
        fs::write(&path, &bad).unwrap();
        let found = image.raw.windows(64).position(|window| window == &good[3 * CHUNK + CHUNK / 2..][..64]);
        damaged = damaged.or(found.map(|at| at / CHUNK * CHUNK));
        fs::write(&path, if damaged.is_some() { &bad } else { &good }).unwrap();
        if damaged.is_some() {
            break;
        }
    }
    let damaged = damaged.expect("a block holds what the image holds") as u64;
    let mut client = Client::open(&server, "disk");
    let mut read = |at: u64, len: u64| client.call(Command::Read, at, len, CommandFlags::NONE, &[]).unwrap();
    let start = damaged / MIB as u64 * MIB as u64;
    for (at, len, expected) in [
        (start, MIB as u64, Some(damaged)),
        (damaged, 4096, Some(damaged)),
        (damaged + 8192, 4096, Some(damaged + 8192)),
        (damaged - 4096, 8192, Some(damaged)),
        (start, damaged - start, None),
    ] {
        let answer = read(at, len);
        assert_eq!(answer.result.is_err(), expected.is_some(), "{at}+{len}: {answer:?}");
        assert_eq!(answer.failed_at, expected, "{at}+{len}");
    }
    client.disconnect();
    // A client of others' making keeps in step.
    let script = format!(
        "h.connect_uri({:?})\ntry:\n h.pread({MIB}, {start})\n print('read')\nexcept nbd.Error as e:\n print(e.errno)\nprint(len(h.pread(4096, {start})))\n",
        server.uri("disk")
    );
    let said = run(harness::nbdsh().args(["-c", &script])).ok();
    assert_eq!(said.split_whitespace().collect::<Vec<_>>(), ["EIO", "4096"]);
    server.stop();
}

#[test]
fn a_damaged_object_is_named_and_never_served() {
    let image = Image::of(noise(3, 4 * MIB));
    let other = image.dir().join("other");
    fs::write(&other, noise(4, 4 * MIB)).unwrap();
    image.store("other", &other);
    for kind in ["refs", "commits", "maps", "blocks"] {
        let objects = image.objects(kind);
        let path = &objects[0];
        let name = path.file_name().unwrap().to_str().unwrap();
        let good = fs::read(path).unwrap();
        let swapped = {
            let theirs = path.to_str().unwrap().replace("/images/disk/", "/images/other/");
            let dir = Path::new(&theirs).ancestors().find(|dir| dir.ends_with(kind)).unwrap().to_owned();
            fs::read(first_file(&dir)).unwrap()
        };
        let damaged = DAMAGES.iter().map(|damage_of| (*damage_of, damage(damage_of, &good)));
        for (how, bytes) in damaged.chain([("swapped", swapped)]) {
            fs::write(path, &bytes).unwrap();
            let state = tempfile::tempdir().unwrap();
            let serve = Serve::new(&image.repo(), state.path()).name("disk");
            if matches!(kind, "refs" | "commits") {
                let told = serve.refused();
                assert!(told.contains(name), "{kind} {how}: does not name {name}: {told}");
                assert!(told.contains("hint: put this object back from a copy"), "{kind} {how}: {told}");
                continue;
            }
            let server = serve.start();
            let mut client = Client::open(&server, "disk");
            let mut failed = 0;
            for page in 0..4 * MIB / PAGE / 16 {
                let at = page * PAGE * 16;
                match client.read(at as u64, PAGE) {
                    Ok(read) => assert!(read == image.raw[at..at + PAGE], "{kind} {how}: wrong bytes"),
                    Err((errno, message)) => {
                        assert_eq!(errno, Errno::Io, "{message}");
                        failed += 1;
                    }
                }
            }
            assert!(failed > 0, "{kind} {how}: nothing failed");
            if kind == "blocks" {
                assert!(failed <= MIB / PAGE / 16, "{kind} {how}: other blocks failed with it");
            }
            // Once and by name, not once for each request.
            server.logs("request failed");
            let lines = server.lines("request failed");
            assert!(lines.len() < 4, "{lines:?}");
            assert!(lines[0].contains("ERROR") && lines[0].contains(name), "{kind} {how}: {lines:?}");
            client.disconnect();
            server.stop();
        }
        fs::write(path, &good).unwrap();
        fs::remove_file(path).unwrap();
        let state = tempfile::tempdir().unwrap();
        let serve = Serve::new(&image.repo(), state.path()).name("disk");
        match kind {
            "refs" => assert!(serve.refused().contains("no image 'disk'")),
            "commits" => {
                let told = serve.refused();
                assert!(told.contains(name) && told.contains("missing"), "{told}");
            }
            _ => {
                let server = serve.start();
                let mut client = Client::open(&server, "disk");
                let failed = (0..4).filter(|block| client.read(block * MIB as u64, PAGE).is_err()).count();
                assert!(failed > 0);
                server.logs(name);
                // Back from a copy, it reads without a restart.
                fs::write(path, &good).unwrap();
                assert!(client.read(0, 4 * MIB).unwrap() == image.raw);
                client.disconnect();
                server.stop();
            }
        }
        fs::write(path, &good).unwrap();
    }
}

fn first_file(dir: &Path) -> std::path::PathBuf {
    let mut entries: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    let first = entries.swap_remove(0);
    if first.is_dir() { first_file(&first) } else { first }
}

#[test]
fn a_state_dir_that_can_t_be_made_is_named() {
    let image = Image::of(noise(1, MIB));
    let file = image.dir().join("file");
    fs::write(&file, "").unwrap();
    let state = file.join("state");
    let told = Serve::new(&image.repo(), &state).name("disk").refused();
    assert_eq!(
        told,
        format!("error: can't make the state directory {}: Not a directory (os error 20)\n", state.display())
    );
    if need_root("to be somebody else") && need(&["setpriv"]) {
        let source = image.dir().join("source");
        fs::create_dir(&source).unwrap();
        let told = image_refused(&["A"], &source, &state);
        assert!(told.contains("Not a directory"), "the cause is told: {told}");
    }
}

/// A raw connection whose reads end.
fn raw(server: &Server) -> UnixStream {
    let socket = UnixStream::connect(&server.socket).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// Reads until the server closes the connection.
fn until_closed(socket: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match socket.read(&mut buffer) {
            Ok(0) => return bytes,
            Ok(len) => bytes.extend_from_slice(&buffer[..len]),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return bytes,
            Err(error) => panic!("the connection stays open: {error}"),
        }
    }
}

fn option(kind: u32, data: &[u8]) -> Vec<u8> {
    let mut out = wire::IHAVEOPT.to_be_bytes().to_vec();
    out.extend(kind.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    out
}

#[test]
fn garbage_in_the_handshake_ends_that_connection_alone() {
    let image = Image::of(noise(1, MIB));
    let server = Serve::disk(&image).start();
    let mut good = Client::open(&server, "disk");
    for seed in 0..20 {
        let mut socket = raw(&server);
        // It may be closed before all of it is sent.
        let _ = socket.write_all(&noise(seed, 4096));
        until_closed(&mut socket);
    }
    let mut http = raw(&server);
    http.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    until_closed(&mut http);
    // An option that announces 4 GiB, and one cut short.
    let mut huge = raw(&server);
    huge.write_all(&3u32.to_be_bytes()).unwrap();
    let mut announced = option(wire::opt::GO, &[]);
    let length = announced.len() - 4;
    announced[length..].copy_from_slice(&u32::MAX.to_be_bytes());
    huge.write_all(&announced).unwrap();
    let _ = huge.write_all(&[0; 100_000]);
    drop(huge);
    server.logs("handshake failed");
    assert!(good.read(0, MIB).unwrap() == image.raw);
    assert!(server.lines("panicked").is_empty(), "{}", server.log());
    good.disconnect();
    server.stop();
}

#[test]
fn options_around_starttls_keep_the_stream_in_step() {
    let image = Image::of(noise(1, MIB));
    let server = Serve::disk(&image).start();
    let mut socket = raw(&server);
    let mut greeting = [0; 18];
    socket.read_exact(&mut greeting).unwrap();
    let mut sent = 3u32.to_be_bytes().to_vec();
    // What is selected before STARTTLS, unknown options, one with data that is too short: all in one packet.
    sent.extend(option(wire::opt::STRUCTURED_REPLY, &[]));
    sent.extend(option(wire::opt::STARTTLS, &[]));
    sent.extend(option(wire::opt::STARTTLS, b"data"));
    sent.extend(option(77, &noise(1, 500)));
    sent.extend(option(wire::opt::PEEK_EXPORT, &[]));
    sent.extend(option(wire::opt::SET_META_CONTEXT, &[0, 0]));
    sent.extend(option(wire::opt::GO, &[0xff; 6]));
    sent.extend(option(wire::opt::LIST, &[]));
    sent.extend(option(wire::opt::ABORT, &[]));
    socket.write_all(&sent).unwrap();
    let replies = until_closed(&mut socket);
    let mut kinds = Vec::new();
    let mut rest = &replies[..];
    while !rest.is_empty() {
        assert_eq!(rest[..8], wire::REP_MAGIC.to_be_bytes());
        let field = |at: usize| u32::from_be_bytes(rest[at..at + 4].try_into().unwrap());
        kinds.push((field(8), field(12)));
        rest = &rest[20 + field(16) as usize..];
    }
    use wire::{opt, rep};
    assert_eq!(
        kinds,
        [
            (opt::STRUCTURED_REPLY, rep::ACK),
            (opt::STARTTLS, rep::ERR_UNSUP),
            (opt::STARTTLS, rep::ERR_UNSUP),
            (77, rep::ERR_UNSUP),
            (opt::PEEK_EXPORT, rep::ERR_UNSUP),
            (opt::SET_META_CONTEXT, rep::ERR_INVALID),
            (opt::GO, rep::ERR_INVALID),
            (opt::LIST, rep::SERVER),
            (opt::LIST, rep::ACK),
            (opt::ABORT, rep::ACK),
        ]
    );
    server.stop();
}

#[test]
fn hostile_lengths_cost_their_sender_an_error_or_the_connection() {
    let image = Image::of(noise(1, 4 * MIB));
    let server = Serve::disk(&image).start();
    let mut good = Client::open(&server, "disk");
    let wish = |mode| Wish {
        name: "disk".to_owned(),
        mode,
        contexts: vec!["base:allocation".to_owned()],
        ..Wish::default()
    };
    let long = u64::from(u32::MAX);
    for mode in [HeaderMode::Structured, HeaderMode::Extended] {
        let mut client = Client::connect(&server, wish(mode)).unwrap();
        let end = 4 * MIB as u64;
        for (command, offset, length) in [
            (Command::Read, 0, long),
            (Command::Read, u64::MAX, 1),
            (Command::Read, u64::MAX - 10, long),
            (Command::Read, end, 1),
            (Command::Read, 0, 0),
            (Command::Trim, end - 1, 2),
            (Command::Trim, u64::MAX, long),
            (Command::WriteZeroes, 1, long),
            (Command::Cache, 0, long),
            (Command::BlockStatus, 0, 0),
            (Command::BlockStatus, 3, long),
            (Command::BlockStatus, u64::MAX, 1),
            (Command::Unknown(0xffff), u64::MAX, long),
        ] {
            let answer = client.call(command, offset, length, NONE, &[]).unwrap();
            assert!(answer.result.is_err(), "{command:?} {offset} {length}");
        }
        // Unaligned, and still told.
        let status = client.call(Command::BlockStatus, 4097, 12_345, NONE, &[]).unwrap();
        assert_eq!((status.result, status.extents[0].1[0].length), (Ok(()), 12_345));
        assert!(client.read(0, MIB).unwrap() == image.raw[..MIB], "it is still in step");
        client.disconnect();
    }
    // Payloads that are announced and never come take no memory.
    let rss = server.resident_kib();
    let mut hungry = Vec::new();
    // Too long to be a payload, too long for a write here, and as long as one may be.
    for payload in [u32::MAX, 60 << 20, 32 << 20].into_iter().cycle().take(60) {
        let mut client = Client::connect(&server, wish(HeaderMode::Structured)).unwrap();
        let mut header = Vec::new();
        let request = Request {
            cookie: 1,
            offset: 0,
            length: payload.into(),
            payload,
            flags: NONE,
            command: Command::Write,
        };
        encode_request(&mut header, HeaderMode::Structured, &request);
        client.send_raw(&header).unwrap();
        // The connection may be closed by then.
        let _ = client.send_raw(&[7; 10_000]);
        hungry.push(client);
    }
    assert!(good.read(0, MIB).unwrap() == image.raw[..MIB]);
    let grown = server.resident_kib().saturating_sub(rss);
    assert!(grown < 64 << 10, "{grown} KiB for announcements");
    drop(hungry);
    assert!(good.read(0, 4 * MIB).unwrap() == image.raw, "nothing of it was written");
    // A header that is none.
    let mut client = Client::connect(&server, wish(HeaderMode::Structured)).unwrap();
    client.send_raw(&[0x13; 64]).unwrap();
    assert!(client.answer().is_err());
    server.logs("the client broke the protocol, connection closed");
    good.disconnect();
    server.stop();
}

#[test]
fn a_map_of_very_many_extents_is_told_in_bounded_pieces() {
    let image = Image::of(vec![5; 64 * MIB]);
    let server = Serve::disk(&image).start();
    let wish = Wish {
        name: "disk".to_owned(),
        mode: HeaderMode::Structured,
        contexts: vec!["x-horcrux:dirty".to_owned()],
        ..Wish::default()
    };
    let mut client = Client::connect(&server, wish).unwrap();
    // Every other page, so 8192 extents each way.
    for page in (0..64 * MIB / PAGE).step_by(2) {
        client.submit(Command::Trim, (page * PAGE) as u64, PAGE as u64, NONE, &[]).unwrap();
        client.answer().unwrap();
    }
    let (mut at, mut extents, mut asked) = (0u64, 0, 0);
    while at < 64 * MIB as u64 {
        let answer = client.call(Command::BlockStatus, at, 64 * MIB as u64 - at, NONE, &[]).unwrap();
        let told = &answer.extents[0].1;
        assert!(told.len() <= 4096 && !told.is_empty());
        at += told.iter().map(|extent| extent.length).sum::<u64>();
        extents += told.len();
        asked += 1;
    }
    assert_eq!((at, extents), (64 * MIB as u64, 64 * MIB / PAGE));
    assert!(asked <= 5, "{asked} requests");
    client.disconnect();
    server.stop();
}

#[test]
fn a_client_that_stalls_in_its_handshake_is_cut_off_and_one_in_mid_header_holds_only_itself() {
    let image = Image::of(noise(1, MIB));
    let server = Serve::disk(&image).arg("--handshake-limit").arg("1").start();
    let started = Instant::now();
    let mut silent = raw(&server);
    let mut halfway = raw(&server);
    halfway.write_all(&3u32.to_be_bytes()).unwrap();
    halfway.write_all(&option(wire::opt::GO, b"half")[..9]).unwrap();
    // After its handshake a client may take its time.
    let mut stalled = Client::open(&server, "disk");
    stalled.send_raw(&wire::REQUEST_MAGIC.to_be_bytes()).unwrap();
    let mut good = Client::open(&server, "disk");
    assert!(good.read(0, MIB).unwrap() == image.raw, "nobody waits for them");
    until_closed(&mut silent);
    until_closed(&mut halfway);
    let took = started.elapsed();
    assert!((Duration::from_millis(900)..Duration::from_secs(20)).contains(&took), "{took:?}");
    server.logs("no export was chosen within 1 s");
    good.write(0, &[1; 4096]).unwrap();
    // The rest of the header, late.
    let mut rest = Vec::new();
    let request =
        Request { cookie: 5, offset: 0, length: 4096, payload: 0, flags: NONE, command: Command::Flush };
    encode_request(&mut rest, HeaderMode::Structured, &request);
    stalled.send_raw(&rest[4..20]).unwrap();
    drop(stalled);
    server.logs("the client vanished with requests under way");
    good.disconnect();
    server.stop();
}

#[test]
fn a_thousand_connections_leave_no_descriptor_and_no_thread_behind() {
    let image = Image::of(noise(1, MIB));
    let server = Serve::disk(&image).start();
    let visit = |number: usize| match number % 4 {
        0 => Client::open(&server, "disk").disconnect(),
        1 => drop(Client::open(&server, "disk")),
        2 => drop(raw(&server)),
        _ => {
            let mut client = Client::open(&server, "disk");
            client.submit(Command::Read, 0, 4096, NONE, &[]).unwrap();
        }
    };
    (0..20).for_each(visit);
    let quiet = |threads: usize, descriptors: usize| {
        until(PATIENCE, || server.threads() <= threads && server.descriptors() <= descriptors)
    };
    std::thread::sleep(Duration::from_millis(300));
    let (threads, descriptors) = (server.threads(), server.descriptors());
    (0..1000).for_each(visit);
    // The runtime may keep a few threads for blocking work; connections may not.
    assert!(
        quiet(threads + 4, descriptors + 4),
        "{} threads, {threads} before; {} descriptors, {descriptors} before",
        server.threads(),
        server.descriptors()
    );
    Client::open(&server, "disk").disconnect();
    server.stop();
}
