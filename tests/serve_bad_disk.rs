//! Disks that are full or fail under the repository, the cache and the delta: what is told, and that nothing is lost.
//!
//! Failures users of other systems reported, and the test here that would find them:
//!
//! | failure | test |
//! |---|---|
//! | disk full on cache or delta | `a_full_disk_under_the_delta_is_told_and_loses_nothing`, `a_full_disk_under_the_cache_only_costs_fetches` |
//! | an fsync error swallowed | `a_sync_that_fails_fails_the_flush_and_every_write_until_the_volume_is_opened_anew` |

#![allow(clippy::unwrap_used)]

mod harness;

use std::fs;
use std::process::Command as Program;

use harness::{
    Client, Image, PAGE, PATIENCE, Serve, Tmpfs, cli, image_refused, images, need, need_root, noise, run,
    until,
};
use nbd_proto::{Command, CommandFlags, Errno};

const MIB: usize = 1 << 20;
const NONE: CommandFlags = CommandFlags::NONE;

#[test]
fn a_full_disk_under_the_repository_is_told_and_the_image_is_not_there() {
    let Some(disk) = Tmpfs::mount(8) else { return };
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("data"), noise(1, 20 * MIB)).unwrap();
    let repo = disk.path().join("repo");
    let told = image_refused(&["A"], &source, &repo);
    assert!(told.starts_with(&format!("error: {}: no space left while writing ", repo.display())), "{told}");
    assert!(told.ends_with(
        "hint: free some space there and run it again: what was stored already is not stored twice\n"
    ));
    assert_eq!(images(&repo), Vec::<String>::new());
    // With space it comes out whole, over what the first try left.
    run(Program::new("mount").args(["-o", "remount,size=64m"]).arg(disk.path())).ok();
    run(cli().args(["image-from-dir", "A"]).arg(&source).arg(&repo)).ok();
    assert_eq!(images(&repo), ["A"]);
    let server = Serve::new(&repo, &dir.path().join("state")).name("A").start();
    let copied = dir.path().join("copied");
    if need(&["nbdcopy", "e2fsck"]) {
        run(Program::new("nbdcopy").arg(server.uri("A")).arg(&copied)).ok();
        run(Program::new("e2fsck").arg("-fn").arg(&copied)).ok();
    }
    server.stop();
}

#[test]
fn a_full_disk_under_the_delta_is_told_and_loses_nothing() {
    let Some(disk) = Tmpfs::mount(24) else { return };
    let image = Image::of(noise(1, 32 * MIB));
    let state = disk.path().join("state");
    let serve = || Serve::new(&image.repo(), &state).name("disk").arg("--cache-size").arg("16M");
    let mut server = serve().start();
    let mut client = Client::open(&server, "disk");
    client.write(0, &[1; 64 << 10]).unwrap();
    client.flush().unwrap();
    let filler = disk.fill(256 << 10);
    let mut written = 0;
    let full = loop {
        // Away from what was flushed.
        match client.write((16 * MIB + written * PAGE) as u64, &[2; PAGE]) {
            Ok(()) => written += 1,
            Err(errno) => break errno,
        }
        assert!(written < 8 * MIB / PAGE, "the disk does not fill up");
    };
    assert_eq!(full, Errno::NoSpc);
    let told = client.call(Command::Write, 30 * MIB as u64, PAGE as u64, NONE, &[3; PAGE]).unwrap();
    assert_eq!(told.result, Err(Errno::NoSpc));
    assert!(told.message.starts_with("no space left for the delta in "), "{}", told.message);
    // What can't be promised is not: the flush says so, or has room for its frames.
    let flushed = client.flush();
    assert!(matches!(flushed, Ok(()) | Err(Errno::NoSpc)), "{flushed:?}");
    assert_eq!(client.read(0, 64 << 10).unwrap(), [1; 64 << 10]);
    assert!(client.read(30 * MIB as u64, PAGE).unwrap() == image.raw[30 * MIB..30 * MIB + PAGE]);
    assert!(server.runs());
    server.logs("no space left for the delta");
    assert!(server.lines("request failed").len() < 4, "one line, not one for each request");
    // Killed on a full disk: it comes up there, with what was flushed.
    server.kill();
    let server = serve().start();
    let mut client = Client::open(&server, "disk");
    assert_eq!(client.read(0, 64 << 10).unwrap(), [1; 64 << 10]);
    fs::remove_file(filler).unwrap();
    client.write(30 * MIB as u64, &[4; PAGE]).unwrap();
    client.flush().unwrap();
    client.disconnect();
    server.stop();
    let server = serve().start();
    let mut client = Client::open(&server, "disk");
    assert_eq!(client.read(30 * MIB as u64, PAGE).unwrap(), [4; PAGE]);
    assert_eq!(client.read(0, 64 << 10).unwrap(), [1; 64 << 10]);
    client.disconnect();
    server.stop();
}

#[test]
fn a_flush_that_finds_no_space_is_told_and_succeeds_when_there_is_some() {
    let Some(disk) = Tmpfs::mount(24) else { return };
    let image = Image::of(noise(1, 16 * MIB));
    let state = disk.path().join("state");
    let serve = || Serve::new(&image.repo(), &state).name("disk").arg("--cache-size").arg("16M");
    let mut server = serve().start();
    let mut client = Client::open(&server, "disk");
    // Scattered, so that each page is a record of its own in the map's log, which has no space to grow.
    let pages: Vec<u64> = (0..1500).map(|page| (page * 2 * PAGE) as u64).collect();
    for at in &pages {
        client.write(*at, &[7; PAGE]).unwrap();
    }
    let filler = disk.fill(0);
    for _ in 0..2 {
        assert_eq!(client.flush(), Err(Errno::NoSpc));
    }
    assert_eq!(client.read(pages[9], PAGE).unwrap(), [7; PAGE], "what was acknowledged is still read");
    fs::remove_file(filler).unwrap();
    client.flush().unwrap();
    server.kill();
    let server = serve().start();
    let mut client = Client::open(&server, "disk");
    for at in &pages {
        assert_eq!(client.read(*at, PAGE).unwrap(), [7; PAGE], "{at}");
    }
    client.disconnect();
    server.stop();
}

/// The disk fails under the real server: strace answers its syncs with EIO.
#[test]
fn a_sync_that_fails_fails_the_flush_and_every_write_until_the_volume_is_opened_anew() {
    if !need(&["strace"]) || !need_root("to trace a server that runs") {
        return;
    }
    let image = Image::of(noise(1, 4 * MIB));
    let serve = || Serve::new(&image.repo(), &image.state()).name("disk");
    let mut server = serve().start();
    let mut client = Client::open(&server, "disk");
    client.write(0, &[1; PAGE]).unwrap();
    client.flush().unwrap();
    let mut strace = Program::new("strace");
    strace.args(["-f", "-p", &server.pid().to_string(), "-e", "trace=fsync,fdatasync"]);
    strace.args(["-e", "inject=fsync,fdatasync:error=EIO"]);
    let log = image.dir().join("strace");
    let mut strace = strace.stderr(fs::File::create(&log).unwrap()).spawn().unwrap();
    let attached = until(PATIENCE, || fs::read_to_string(&log).unwrap().contains(" attached"));
    assert!(attached, "{}", fs::read_to_string(&log).unwrap());
    client.write(PAGE as u64, &[2; PAGE]).unwrap();
    let told = client.call(Command::Flush, 0, 0, NONE, &[]).unwrap();
    assert_eq!(told.result, Err(Errno::Io), "{told:?}");
    assert!(told.message.contains("sync"), "{}", told.message);
    // It stays failed though the disk is well again: what the kernel dropped would be missing behind a flush that succeeds.
    strace.kill().unwrap();
    strace.wait().unwrap();
    for _ in 0..2 {
        assert_eq!(client.flush(), Err(Errno::Io));
        assert_eq!(client.write(2 * PAGE as u64, &[3; PAGE]), Err(Errno::Io));
        let fua = client.call(Command::Write, 0, PAGE as u64, CommandFlags::FUA, &[3; PAGE]).unwrap();
        assert_eq!(fua.result, Err(Errno::Io));
    }
    assert_eq!(client.read(0, PAGE).unwrap(), [1; PAGE], "what is there is still read");
    server.logs("request failed");
    drop(client);
    server.kill();

    let server = serve().start();
    let mut client = Client::open(&server, "disk");
    assert_eq!(client.read(0, PAGE).unwrap(), [1; PAGE], "what was flushed");
    let second = client.read(PAGE as u64, PAGE).unwrap();
    assert!(second == [2; PAGE] || second == image.raw[PAGE..2 * PAGE], "neither the old nor the new");
    client.write(2 * PAGE as u64, &[3; PAGE]).unwrap();
    client.flush().unwrap();
    client.disconnect();
    server.stop();
}

#[test]
fn a_full_disk_under_the_cache_only_costs_fetches() {
    let Some(disk) = Tmpfs::mount(24) else { return };
    let image = Image::of(noise(1, 16 * MIB));
    let server = Serve::new(&image.repo(), &disk.path().join("state")).name("disk").start();
    let filler = disk.fill(0);
    let mut client = Client::open(&server, "disk");
    for _ in 0..2 {
        for block in 0..16 {
            assert!(
                client.read((block * MIB) as u64, MIB).unwrap() == image.raw[block * MIB..(block + 1) * MIB]
            );
        }
    }
    fs::remove_file(filler).unwrap();
    assert!(client.read(0, MIB).unwrap() == image.raw[..MIB]);
    client.disconnect();
    server.stop();
}

#[test]
fn a_server_that_starts_on_a_full_disk_says_so() {
    let Some(disk) = Tmpfs::mount(4) else { return };
    let image = Image::of(noise(1, MIB));
    let filler = disk.fill(0);
    let state = disk.path().join("state");
    let told = Serve::new(&image.repo(), &state).name("disk").refused();
    assert!(told.contains(state.to_str().unwrap()), "{told}");
    assert!(told.to_lowercase().contains("no space left"), "{told}");
    assert!(
        told.ends_with("hint: free some space on that disk, or use a --state-dir on another\n"),
        "{told}"
    );
    fs::remove_file(filler).unwrap();
    Serve::new(&image.repo(), &state).name("disk").start().stop();
}
