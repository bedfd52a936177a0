//! The server killed, stopped, doubled, and started on what is not its own.
//!
//! Failures users of other systems reported, and the test here that would find them:
//!
//! | failure | test |
//! |---|---|
//! | kill -9 in mid-write | `a_killed_server_loses_nothing_that_was_acknowledged_and_tears_no_page` |
//! | what the kernel wrote back before a kill is gone, and it never writes it again | the same, and `fio_finds_after_a_kill_what_it_wrote` |
//! | kill -9 in mid-download | `a_server_killed_in_mid_download_never_serves_what_it_half_fetched` |
//! | kill -9 while a version is stored, in mid-manifest | `an_image_maker_killed_at_any_time_leaves_the_version_before_or_the_new_one` |
//! | a bit flip in the cache | `a_bit_flipped_in_the_cache_is_healed_and_counted` |
//! | a delta paired with the wrong base | `a_delta_of_another_base_is_refused_by_name` |
//!
//! HORCRUX_SOAK=1 kills 50 times instead of 5; HORCRUX_SEED repeats a run.

#![allow(clippy::unwrap_used)]

mod harness;

use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::process::{Command as Program, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use harness::{Client, Image, PAGE, PATIENCE, Serve, Server, cli, need, noise, run, seed, soak, until};
use nbd_proto::{Command, CommandFlags, Errno};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rustix::process::Signal;

const MIB: usize = 1 << 20;
const NONE: CommandFlags = CommandFlags::NONE;
/// Pages the crash test writes to: few enough that most are written many times.
const PAGES: usize = 1024;
const WRITERS: usize = 2;

fn rounds() -> u32 {
    if soak() { 50 } else { 5 }
}

/// What a page held at some time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// All zeros.
    Zero,
    /// The stamp of a version, all over.
    Stamp(u64),
}

/// What a page has held since it was last known for certain, oldest first.
#[derive(Clone, Debug)]
struct History {
    contents: Vec<Content>,
    /// The newest that was acknowledged: the oldest it may be after a kill.
    acknowledged: usize,
}

/// What every page may hold. Requests on one page don't overlap, so the order is known.
struct Model {
    pages: Vec<History>,
    version: u64,
}

impl Model {
    fn new() -> Model {
        let page = History { contents: vec![Content::Stamp(0)], acknowledged: 0 };
        Model { pages: vec![page; PAGES], version: 0 }
    }

    /// Notes what is about to be sent.
    fn begin(&mut self, first: usize, pages: usize, zero: bool) -> Content {
        self.version += 1;
        let content = if zero { Content::Zero } else { Content::Stamp(self.version) };
        self.pages[first..first + pages].iter_mut().for_each(|page| page.contents.push(content));
        content
    }

    /// Notes that it was acknowledged.
    fn acknowledge(&mut self, first: usize, pages: usize) {
        for page in &mut self.pages[first..first + pages] {
            page.acknowledged = page.contents.len() - 1;
        }
    }

    /// Checks what was read after a kill; from then on that is what the pages hold for certain.
    fn check(&mut self, read: &[u8]) {
        for (number, (page, bytes)) in self.pages.iter_mut().zip(read.chunks(PAGE)).enumerate() {
            let found = content_of(number, bytes);
            let allowed = &page.contents[page.acknowledged..];
            assert!(
                found.is_some_and(|found| allowed.contains(&found)),
                "page {number} holds {found:?} ({:02x?}...), may hold {allowed:?}",
                &bytes[..32]
            );
            let found = found.expect("just checked");
            *page = History { contents: vec![found], acknowledged: 0 };
        }
    }
}

/// A page full of its own number and a version.
fn stamp(page: usize, version: u64) -> Vec<u8> {
    let mut word = [0; 16];
    word[..8].copy_from_slice(&(page as u64 + 1).to_le_bytes());
    word[8..].copy_from_slice(&version.to_le_bytes());
    word.repeat(PAGE / 16)
}

/// `None`: torn, or of another page.
fn content_of(page: usize, bytes: &[u8]) -> Option<Content> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Some(Content::Zero);
    }
    let version = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
    (bytes == stamp(page, version)).then_some(Content::Stamp(version))
}

/// Writes and zeroes a part of the pages until the server is gone.
fn write_until_killed(mut client: Client, model: &Mutex<Model>, writer: usize, seed: u64) -> u64 {
    let mut random = SmallRng::seed_from_u64(seed);
    let of_writer = PAGES / WRITERS;
    let mut done = 0;
    loop {
        let pages = random.random_range(1..=16);
        let first = writer * of_writer + random.random_range(0..=of_writer - pages);
        let (zero, fua) = (random.random_ratio(1, 8), random.random_ratio(1, 32));
        let content = model.lock().unwrap().begin(first, pages, zero);
        let data: Vec<u8> = match content {
            Content::Zero => Vec::new(),
            Content::Stamp(version) => (first..first + pages).flat_map(|page| stamp(page, version)).collect(),
        };
        let command = match (zero, random.random_bool(0.5)) {
            (false, _) => Command::Write,
            (true, true) => Command::Trim,
            (true, false) => Command::WriteZeroes,
        };
        let flags = if fua { CommandFlags::FUA } else { NONE };
        let (offset, length) = ((first * PAGE) as u64, (pages * PAGE) as u64);
        match client.call(command, offset, length, flags, &data) {
            Ok(answer) => assert_eq!(answer.result, Ok(()), "{}", answer.message),
            Err(_) => return done,
        }
        model.lock().unwrap().acknowledge(first, pages);
        done += 1;
    }
}

/// Flushes until the server is gone, over a connection that writes nothing: some kills come while a commit is made.
fn flush_until_killed(mut client: Client, seed: u64) {
    let mut random = SmallRng::seed_from_u64(seed);
    loop {
        std::thread::sleep(Duration::from_micros(random.random_range(0..20_000)));
        match client.call(Command::Flush, 0, 0, NONE, &[]) {
            Ok(answer) => assert_eq!(answer.result, Ok(()), "{}", answer.message),
            Err(_) => return,
        }
    }
}

#[test]
fn a_killed_server_loses_nothing_that_was_acknowledged_and_tears_no_page() {
    let seed = seed();
    let mut random = SmallRng::seed_from_u64(seed);
    let image = Image::of((0..PAGES).flat_map(|page| stamp(page, 0)).collect());
    let model = Arc::new(Mutex::new(Model::new()));
    let mut writes = 0;
    for round in 0..rounds() {
        let mut server = Serve::disk(&image).start();
        let mut reader = Client::open(&server, "disk");
        model.lock().unwrap().check(&reader.read(0, PAGES * PAGE).unwrap());
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let (client, model) = (Client::open(&server, "disk"), model.clone());
                let seed = random.random();
                std::thread::spawn(move || write_until_killed(client, &model, writer, seed))
            })
            .collect();
        let flusher = {
            let (client, seed) = (Client::open(&server, "disk"), random.random());
            std::thread::spawn(move || flush_until_killed(client, seed))
        };
        std::thread::sleep(Duration::from_micros(random.random_range(1_000..400_000)));
        server.kill();
        flusher.join().unwrap();
        for writer in writers {
            writes += writer.join().unwrap();
        }
        eprintln!("round {round}: {writes} writes so far");
    }
    assert!(writes > 0, "nothing was written before any kill");
    let server = Serve::disk(&image).start();
    model.lock().unwrap().check(&Client::open(&server, "disk").read(0, PAGES * PAGE).unwrap());
    server.stop();
}

#[test]
fn fio_finds_after_a_kill_what_it_wrote() {
    if !need(&["fio"]) {
        return;
    }
    let image = Image::of(noise(1, 16 * MIB));
    for kill in [true, false] {
        let mut server = Serve::disk(&image).start();
        let fio = |server: &Server, more: &[&str]| {
            let mut fio = Program::new("fio");
            // The engine first: only it knows the option uri.
            fio.args(["--name=crash", "--ioengine=nbd"]).arg(format!("--uri={}", server.uri("disk")));
            fio.args(["--rw=randwrite", "--bs=4k", "--size=16m", "--iodepth=16"]);
            fio.args(["--verify=crc32c", "--verify_fatal=1", "--randseed=99"]).args(more);
            run(fio.current_dir(image.dir())).ok()
        };
        fio(&server, &["--do_verify=0"]);
        if kill {
            server.kill();
        } else {
            server.stop();
        }
        let server = Serve::disk(&image).start();
        fio(&server, &["--verify_only=1"]);
        server.stop();
    }
}

/// fio reads back and checks what it wrote while it goes on writing; the server is killed under it, and the next one goes on with what is there.
#[test]
fn fio_reads_nothing_wrong_from_any_server_until_it_is_killed_and_from_the_last_all_it_wrote() {
    if !need(&["fio"]) {
        return;
    }
    let mut random = SmallRng::seed_from_u64(seed());
    let image = Image::of(noise(1, 16 * MIB));
    let fio = |server: &Server, more: &[&str]| {
        let mut fio = Program::new("fio");
        fio.args(["--name=kill", "--ioengine=nbd"]).arg(format!("--uri={}", server.uri("disk")));
        fio.args(["--rw=randwrite", "--bs=4k", "--size=16m", "--iodepth=16", "--fsync=64"]);
        fio.args(["--verify=crc32c", "--verify_fatal=1"]).args(more).current_dir(image.dir());
        fio
    };
    let mut server = Serve::disk(&image).start();
    let mut cut_off = 0;
    for round in 0..rounds() {
        let mut load = fio(&server, &["--verify_backlog=128", "--time_based", "--runtime=60"]);
        load.arg(format!("--randseed={round}"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let load = load.spawn().unwrap();
        assert!(until(PATIENCE, || server.log().contains("connected")), "{}", server.log());
        std::thread::sleep(Duration::from_millis(random.random_range(0..500)));
        server.kill();
        let said = load.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&[said.stdout, said.stderr].concat()).into_owned();
        assert!(!said.contains("verify:"), "round {round}: {said}");
        cut_off += u32::from(!said.contains("err= 0"));
        server = Serve::disk(&image).start();
    }
    assert!(cut_off * 2 > rounds(), "only {cut_off} kills came while fio was at work");
    run(&mut fio(&server, &[])).ok();
    server.stop();
}

#[test]
fn a_server_killed_in_mid_download_never_serves_what_it_half_fetched() {
    let seed = seed();
    let mut random = SmallRng::seed_from_u64(seed);
    let image = Image::of(noise(seed, 24 * MIB));
    for _ in 0..rounds() {
        // A cold cache each time, or what the kill before left in it.
        if random.random_ratio(1, 3) {
            fs::remove_dir_all(image.state().join("cache")).ok();
        }
        let mut server = Serve::disk(&image).start();
        let mut client = Client::open(&server, "disk");
        for block in 0..24 {
            client.submit(Command::Read, (block * MIB) as u64, MIB as u64, NONE, &[]).unwrap();
        }
        std::thread::sleep(Duration::from_micros(random.random_range(0..60_000)));
        server.kill();
        let server = Serve::disk(&image).start();
        let mut client = Client::open(&server, "disk");
        for block in 0..24 {
            let read = client.read((block * MIB) as u64, MIB).unwrap();
            assert!(read == image.raw[block * MIB..(block + 1) * MIB], "block {block} is not what it was");
        }
        client.disconnect();
        server.stop();
    }
}

#[test]
fn an_image_maker_killed_at_any_time_leaves_the_version_before_or_the_new_one() {
    let seed = seed();
    let mut random = SmallRng::seed_from_u64(seed);
    let image = Image::of(noise(seed, 8 * MIB));
    let mut before = image.raw.clone();
    let next = image.dir().join("next");
    for round in 0..rounds() {
        let raw = noise(random.random(), 8 * MIB);
        fs::write(&next, &raw).unwrap();
        let mut maker = cli();
        maker.args(["image-from-file", "-s", "1M", "disk"]).arg(&next).arg(image.repo());
        let mut maker = maker.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(random.random_range(0..80_000)));
        let _ = maker.kill();
        maker.wait().unwrap();
        let state = tempfile::tempdir().unwrap();
        let server = Serve::new(&image.repo(), state.path()).name("disk").arg("--read-only").start();
        let mut client = Client::open(&server, "disk");
        let read = client.read(0, 8 * MIB).unwrap();
        assert!(read == before || read == raw, "round {round}: neither the version before nor the new one");
        client.disconnect();
        server.stop();
        before = read;
    }
    // And it can be made again, over whatever was left.
    image.store("disk", &next);
}

#[test]
fn a_bit_flipped_in_the_cache_is_healed_and_counted() {
    let image = Image::of(noise(5, 4 * MIB));
    let server = Serve::disk(&image).start();
    let mut client = Client::open(&server, "disk");
    client.read(0, 4 * MIB).unwrap();
    client.disconnect();
    server.stop();
    // Any bit, of the bytes that are the first page's.
    let slab = image.state().join("cache/slabs/00000000.slab");
    let bytes = fs::read(&slab).unwrap();
    let at = bytes.windows(PAGE).position(|window| window == &image.raw[..PAGE]).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&slab).unwrap();
    file.write_all_at(&[bytes[at + 1000] ^ 4], at as u64 + 1000).unwrap();
    let mut server = Serve::disk(&image).start();
    let mut client = Client::open(&server, "disk");
    assert!(client.read(0, 4 * MIB).unwrap() == image.raw);
    client.disconnect();
    assert!(server.terminate().success());
    server.logs("stopped");
    assert!(server.log().contains("healed=1"), "{}", server.log());
}

#[test]
fn sigterm_under_load_finishes_what_is_in_flight_and_flushes() {
    let image = Image::of(vec![7; 16 * MIB]);
    let mut server = Serve::disk(&image).start();
    let socket = server.socket.clone();
    let writers: Vec<_> = (0..4usize)
        .map(|writer| {
            let mut client = Client::open(&server, "disk");
            std::thread::spawn(move || {
                let mut written = 0;
                while let Ok(answer) = client.call(
                    Command::Write,
                    (writer * 4 * MIB + written % 1000 * PAGE) as u64,
                    PAGE as u64,
                    NONE,
                    &stamp(writer, written as u64 + 1),
                ) {
                    assert_eq!(answer.result, Ok(()));
                    written += 1;
                }
                written
            })
        })
        .collect();
    let mut idle = Client::open(&server, "disk");
    std::thread::sleep(Duration::from_millis(300));
    let status = server.terminate();
    assert!(status.success(), "{status}");
    assert!(!server.log().contains("did not end in time"), "within the grace");
    assert!(!socket.exists(), "its socket is gone with it");
    assert!(idle.call(Command::Read, 0, 1, NONE, &[]).is_err());
    let written: Vec<usize> = writers.into_iter().map(|writer| writer.join().unwrap()).collect();
    let server = Serve::disk(&image).start();
    let mut client = Client::open(&server, "disk");
    for (writer, &written) in written.iter().enumerate() {
        assert!(written > 0, "writer {writer} did nothing");
        // Without a flush of the client's: the server's own. The oldest may hold the write that was not acknowledged any more.
        for number in written.saturating_sub(1000)..written {
            let at = writer * 4 * MIB + number % 1000 * PAGE;
            let read = client.read(at as u64, PAGE).unwrap();
            assert!(read == stamp(writer, number as u64 + 1) || read == stamp(writer, number as u64 + 1001));
        }
    }
    client.disconnect();
    server.stop();
}

#[test]
fn a_client_that_takes_no_replies_does_not_keep_the_server_from_stopping() {
    let image = Image::of(noise(1, 16 * MIB));
    let mut server = Serve::disk(&image).start();
    let mut stuck = Client::open(&server, "disk");
    for _ in 0..8 {
        stuck.submit(Command::Read, 0, 8 * MIB as u64, NONE, &[]).unwrap();
    }
    // The server has them all by the time it answers one.
    stuck.answer().unwrap();
    let mut other = Client::open(&server, "disk");
    assert!(other.read(0, MIB).unwrap() == image.raw[..MIB], "nobody else waits for it");
    let status = server.terminate();
    assert!(status.success(), "{status}");
    server.logs("connections did not end in time");
}

#[test]
fn a_client_that_vanishes_with_writes_in_flight_leaves_the_others_served() {
    let image = Image::of(vec![9; 8 * MIB]);
    let server = Serve::disk(&image).start();
    let mut other = Client::open(&server, "disk");
    for round in 0..20u64 {
        let mut client = Client::open(&server, "disk");
        for page in 0..50 {
            client
                .submit(Command::Write, page * 8192, 4096, CommandFlags::FUA, &stamp(1, round + 1))
                .unwrap();
        }
        // The last one half sent.
        let mut header = Vec::new();
        let request = nbd_proto::Request {
            cookie: 999,
            offset: 0,
            length: 65536,
            payload: 65536,
            flags: NONE,
            command: Command::Write,
        };
        nbd_proto::client::encode_request(&mut header, client.negotiated.mode, &request);
        client.send_raw(&header).unwrap();
        client.send_raw(&[0xee; 5000]).unwrap();
        drop(client);
        other.write(4096, &stamp(0, round + 1)).unwrap();
        assert_eq!(other.read(4096, PAGE).unwrap(), stamp(0, round + 1));
    }
    for page in 0..50 {
        let read = other.read(page * 8192, PAGE).unwrap();
        let version = u64::from_le_bytes(read[8..16].try_into().unwrap());
        assert!(read == stamp(1, version) || read == [9; PAGE], "page {page} is torn");
    }
    server.logs("the client vanished with requests under way");
    assert!(!server.log().contains("ERROR"), "{}", server.log());
    other.disconnect();
    server.stop();
}

#[test]
fn a_client_that_says_goodbye_and_takes_no_replies_is_let_go() {
    let image = Image::of(noise(1, 8 * MIB));
    let server = Serve::disk(&image).start();
    for _ in 0..10 {
        let mut client = Client::open(&server, "disk");
        for block in 0..8 {
            client.submit(Command::Read, (block * MIB) as u64, MIB as u64, NONE, &[]).unwrap();
        }
        client.disconnect();
    }
    let ended =
        || server.log().matches("the client vanished").count() + server.log().matches("closed").count();
    assert!(until(PATIENCE, || ended() == 10), "{}", server.log());
    let before = server.cpu_ticks();
    std::thread::sleep(Duration::from_millis(300));
    let spent = server.cpu_ticks() - before;
    assert!(spent < 10, "{spent} of 30 ticks were spent on nobody");
    server.stop();
}

#[test]
fn a_second_server_on_a_state_dir_is_refused_and_told_who_has_it() {
    let image = Image::of(noise(1, MIB));
    let mut server = Serve::disk(&image).start();
    let refused = Serve::disk(&image).arg("--unix").arg(image.dir().join("other")).refused();
    assert_eq!(
        refused,
        format!(
            "error: the state directory {} is in use by process {}\n\
             hint: serve more images from one server (--name can be repeated), or give this one its own --state-dir\n",
            image.state().display(),
            server.pid()
        )
    );
    assert!(server.runs());
    let mut client = Client::open(&server, "disk");
    assert!(client.read(0, MIB).unwrap() == image.raw);
    // Its lock goes with it, however it goes.
    server.kill();
    Serve::disk(&image).start().stop();
}

#[test]
fn a_socket_in_use_is_refused_and_a_stale_one_taken_over() {
    let image = Image::of(noise(1, MIB));
    let socket = image.dir().join("sock");
    let mut server = Serve::disk(&image).arg("--unix").arg(&socket).start();
    let other = || Serve::new(&image.repo(), &image.dir().join("state2")).name("disk");
    let refused = other().arg("--unix").arg(&socket).refused();
    assert_eq!(
        refused,
        format!(
            "error: the socket {} is in use by a running server\n\
             hint: stop that server, or listen elsewhere with --unix or --listen\n",
            socket.display()
        )
    );
    assert!(socket.exists(), "it is still the first one's");
    Client::open(&server, "disk").read(0, PAGE).unwrap();
    server.kill();
    assert!(socket.exists(), "kill -9 leaves it behind");
    let server = other().arg("--unix").arg(&socket).start();
    assert!(Client::open(&server, "disk").read(0, MIB).unwrap() == image.raw);
    server.stop();
    assert!(!socket.exists());
    // What is not a socket is nobody's to take.
    fs::write(&socket, "a file").unwrap();
    let refused = other().arg("--unix").arg(&socket).refused();
    assert_eq!(
        refused,
        format!(
            "error: {} is there and is not a socket\nhint: give --unix a path where nothing is\n",
            socket.display()
        )
    );
    assert_eq!(fs::read_to_string(&socket).unwrap(), "a file");
    // Nor a port somebody has.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let refused = other().arg("--listen").arg(&address).refused();
    assert_eq!(
        refused,
        format!(
            "error: can't listen on tcp:{address}: Address already in use (os error 98)\n\
             hint: stop what listens there, or listen elsewhere\n"
        )
    );
    let deep = image.dir().join("d".repeat(120));
    let refused = other().arg("--unix").arg(&deep).refused();
    assert!(refused.ends_with("at most 107 bytes: give a shorter one with --unix\n"), "{refused}");
    drop(UnixListener::bind(image.dir().join("stale")).unwrap());
    other().arg("--unix").arg(image.dir().join("stale")).start().stop();
}

/// A state directory with a changed volume of the image `disk`.
fn with_a_delta(image: &Image) {
    let server = Serve::disk(image).start();
    let mut client = Client::open(&server, "disk");
    client.write(0, &stamp(0, 1)).unwrap();
    client.flush().unwrap();
    client.disconnect();
    server.stop();
}

/// Does something to a file, sees that the server refuses to start with some words, and puts the file back.
#[track_caller]
fn refuses_with(image: &Image, file: &str, change: impl FnOnce(Vec<u8>) -> Vec<u8>, words: &[&str]) {
    let path = image.state().join("volumes/disk").join(file);
    let good = fs::read(&path).unwrap();
    fs::write(&path, change(good.clone())).unwrap();
    let refused = Serve::disk(image).refused();
    assert!(refused.contains(path.to_str().unwrap()), "it does not name the file: {refused}");
    for word in words {
        assert!(refused.contains(word), "no '{word}' in: {refused}");
    }
    fs::write(&path, good).unwrap();
    let server = Serve::disk(image).start();
    let read = Client::open(&server, "disk").read(0, PAGE).unwrap();
    assert!(read == stamp(0, 1), "the refusal changed what is there");
    server.stop();
}

#[test]
fn a_delta_of_another_base_is_refused_by_name() {
    let image = Image::of(noise(1, 4 * MIB));
    with_a_delta(&image);
    let second = image.dir().join("second");
    fs::write(&second, noise(2, 4 * MIB)).unwrap();
    image.store("disk", &second);
    // Asked for by name, where the volume stands on the version before.
    let refused = Serve::new(&image.repo(), &image.state()).name("disk@main").refused();
    assert!(refused.contains("error: volume disk stands on commit "), "{refused}");
    assert!(refused.contains("hint: leave out @REF to go on with the volume's changes"), "{refused}");
    // Without a name it goes on where it is, and says that there is something newer.
    let server = Serve::disk(&image).start();
    assert!(server.said[1].contains("its branch has moved on"), "{:?}", server.said);
    let mut client = Client::open(&server, "disk");
    assert!(client.read(PAGE as u64, PAGE).unwrap() == image.raw[PAGE..2 * PAGE]);
    client.disconnect();
    server.stop();
    // A record that was edited to the other commit: the delta itself knows better.
    let commit_of = |text: &str| {
        let after = text.split_once("\"commit\": \"").unwrap().1;
        after[..64].to_owned()
    };
    let record = image.state().join("volumes/disk/volume.json");
    let first = commit_of(&fs::read_to_string(&record).unwrap());
    let other = image.dir().join("state2");
    Serve::new(&image.repo(), &other).name("disk").start().stop();
    // Only a volume that is not read-only has a record.
    let second = commit_of(&fs::read_to_string(other.join("volumes/disk/volume.json")).unwrap());
    assert_ne!(first, second);
    let good = fs::read_to_string(&record).unwrap();
    fs::write(&record, good.replace(&first, &second)).unwrap();
    let refused = Serve::disk(&image).refused();
    let map = image.state().join("volumes/disk/layers/0001/map");
    assert_eq!(
        refused,
        format!(
            "error: {} is a delta of commit {first}, not of {second}\n\
             hint: put the volume's own files back; another --state-dir starts without its changes\n",
            map.display()
        )
    );
    fs::write(&record, &good).unwrap();
    // The layer of another volume under this one's record.
    let layers = |state: &std::path::Path| state.join("volumes/disk/layers");
    fs::rename(layers(&image.state()), image.dir().join("kept")).unwrap();
    run(Program::new("cp").arg("-r").arg(layers(&other)).arg(layers(&image.state()))).ok();
    let refused = Serve::disk(&image).refused();
    assert!(
        refused.contains(map.to_str().unwrap()) && refused.contains("hint: put the volume's own"),
        "{refused}"
    );
    // A map and data that are not a pair.
    fs::remove_dir_all(layers(&image.state())).unwrap();
    fs::rename(image.dir().join("kept"), layers(&image.state())).unwrap();
    let data = fs::read(layers(&other).join("0001/data")).unwrap();
    refuses_with(&image, "layers/0001/data", |_| data, &["does not belong here", "hint: "]);
}

#[test]
fn state_of_a_newer_version_or_damaged_is_refused_by_file_and_number() {
    let image = Image::of(noise(1, 4 * MIB));
    with_a_delta(&image);
    let replace = |from: &'static str, to: &'static str| {
        move |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().replace(from, to).into_bytes()
    };
    refuses_with(
        &image,
        "volume.json",
        replace("\"version\": 3", "\"version\": 7"),
        &["volume record version 7, this build reads 1..=3", "hint: if a newer Horcrux wrote it"],
    );
    refuses_with(&image, "volume.json", |bytes| bytes[..100].to_vec(), &["hint: "]);
    refuses_with(&image, "volume.json", replace("0001", "../../x"), &["layers can't be"]);
    let newer = |bytes: Vec<u8>| {
        let mut bytes = bytes;
        bytes[8] = 9;
        bytes
    };
    for file in ["layers/0001/map", "layers/0001/data"] {
        refuses_with(
            &image,
            file,
            newer,
            &["version 9, this build reads 1..=1", "hint: it was written by a newer Horcrux"],
        );
        refuses_with(&image, file, |bytes| bytes[..20].to_vec(), &["hint: put the file back from a copy"]);
        refuses_with(
            &image,
            file,
            |mut bytes| {
                bytes[20] ^= 1;
                bytes
            },
            &["checksum does not match, the bytes are damaged", "hint: put the file back from a copy"],
        );
    }
}

#[test]
fn a_stopped_server_that_goes_on_has_lost_nothing() {
    // A pause as by a debugger or a full host, not a crash: clients wait, and nothing is answered twice.
    let image = Image::of(noise(1, MIB));
    let server = Serve::disk(&image).start();
    let mut client = Client::open(&server, "disk");
    server.signal(Signal::STOP);
    client.submit(Command::Write, 0, 4096, CommandFlags::FUA, &stamp(0, 5)).unwrap();
    client.submit(Command::Read, 0, 4096, NONE, &[]).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    server.signal(Signal::CONT);
    for _ in 0..2 {
        assert_eq!(client.answer().unwrap().result, Ok::<(), Errno>(()));
    }
    assert_eq!(client.read(0, PAGE).unwrap(), stamp(0, 5));
    client.disconnect();
    server.stop();
}
