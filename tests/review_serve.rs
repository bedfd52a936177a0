//! A volume and a server in this process, for what no client of others does: bursts, and state directories that were tampered with.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod common;

use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use horcrux::cache::{Cache, CacheOptions, MIN_LIMIT};
use horcrux::nbd::{Endpoint, Export, Exports, Listener, Server, ServerOptions};
use horcrux::repo::Repository;
use horcrux::store::counting::Method;
use horcrux::store::fault::Fault;
use horcrux::store::{FaultStore, MemStore, Store};
use horcrux::volume::{Source, StateDir, Volume, VolumeError};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

fn repository(runtime: &Runtime) -> Repository {
    repository_on(runtime, Arc::new(MemStore::new()))
}

fn repository_on(runtime: &Runtime, store: Arc<dyn Store>) -> Repository {
    let repo = common::create(runtime, store);
    let bytes = common::random_image(1, 1 << 20);
    common::write(runtime, &repo, &common::image("A"), &bytes, common::small_params(1 << 20)).unwrap();
    repo
}

fn volume(runtime: &Runtime, repo: &Repository, state: &Path) -> Result<Volume, VolumeError> {
    let state = StateDir::open(state)?;
    let cache = Cache::open(&state.cache_dir(), CacheOptions::new(MIN_LIMIT)).unwrap();
    let source = Source { access: vec!["mem".into()], image: common::image("A"), reference: None };
    runtime.block_on(Volume::of_image(&state, &cache, repo, &source, false))
}

#[test]
fn what_a_volume_holds_is_its_owners_alone_to_read() {
    let (runtime, state) = (common::runtime(), tempfile::tempdir().unwrap());
    let repo = repository(&runtime);
    volume(&runtime, &repo, state.path()).unwrap();
    for file in ["map", "data"] {
        let path = state.path().join("volumes/A/layers/0001").join(file);
        assert_eq!(std::fs::metadata(path).unwrap().mode() & 0o077, 0, "{file}");
    }
}

#[test]
fn a_layer_with_writes_whose_record_is_gone_is_refused_and_left_alone() {
    let (runtime, state) = (common::runtime(), tempfile::tempdir().unwrap());
    let repo = repository(&runtime);
    let opened = volume(&runtime, &repo, state.path()).unwrap();
    let delta = opened.device().delta().unwrap();
    delta.write(horcrux::units::PageIndex(0), &[7; 4096]).unwrap();
    delta.flush().unwrap();
    drop(opened);
    let dir = state.path().join("volumes/A");
    let (record, kept) = (dir.join("volume.json"), dir.join("kept"));
    std::fs::rename(&record, &kept).unwrap();
    let Err(error) = volume(&runtime, &repo, state.path()) else { panic!("the writes were overwritten") };
    assert!(error.to_string().contains("holds writes"), "{error}");
    std::fs::rename(&kept, &record).unwrap();
    let opened = volume(&runtime, &repo, state.path()).unwrap();
    assert_eq!(opened.device().delta().unwrap().data_pages(), 1);
}

#[test]
fn a_volume_whose_making_was_cut_short_before_its_record_is_made_anew() {
    let (runtime, state) = (common::runtime(), tempfile::tempdir().unwrap());
    let repo = repository(&runtime);
    drop(volume(&runtime, &repo, state.path()).unwrap());
    std::fs::remove_file(state.path().join("volumes/A/volume.json")).unwrap();
    volume(&runtime, &repo, state.path()).unwrap();
}

/// Connects, chooses export `A` in the oldest way, and is in transmission.
fn connect(socket: &Path) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut hello = [0; 18];
    stream.read_exact(&mut hello).unwrap();
    stream.write_all(&3u32.to_be_bytes()).unwrap();
    stream.write_all(b"IHAVEOPT").unwrap();
    stream.write_all(&1u32.to_be_bytes()).unwrap();
    stream.write_all(&1u32.to_be_bytes()).unwrap();
    stream.write_all(b"A").unwrap();
    stream.read_exact(&mut [0; 10]).unwrap();
    stream
}

/// A request as it is on the wire, without its payload.
fn request(command: u8, number: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut header = Vec::from(0x2560_9513u32.to_be_bytes());
    header.extend([0, 0, 0, command]);
    header.extend(number.to_be_bytes());
    header.extend(offset.to_be_bytes());
    header.extend(length.to_be_bytes());
    header
}

const WRITE: u8 = 1;
const DISCONNECT: u8 = 2;
const FLUSH: u8 = 3;

/// Serves a volume as export `A` until `stop`; the result is the number of connections that had to be left.
fn serve(
    runtime: &Runtime,
    volume: &Volume,
    socket: &Path,
    stop: &CancellationToken,
) -> tokio::task::JoinHandle<usize> {
    // Listening needs the runtime's own poller.
    let entered = runtime.enter();
    let listener = Listener::bind(&Endpoint::Unix(socket.to_owned())).unwrap();
    drop(entered);
    let export = Arc::new(Export::new("A".into(), String::new(), volume.device().clone()));
    let server = {
        let exports = Arc::new(Exports::default());
        exports.add(export).unwrap();
        Server::new(exports, vec![listener], ServerOptions::default(), stop.clone())
    };
    runtime.spawn(server.run())
}

/// NBD spec, NBD_CMD_DISC: "The server MUST handle all outstanding requests". `cp image /dev/fuse; exit` is such a client.
#[test]
fn writes_that_had_to_wait_are_done_though_their_client_disconnects_and_closes_at_once() {
    let (runtime, state) = (common::runtime(), tempfile::tempdir().unwrap());
    let faults = FaultStore::new(Arc::new(MemStore::new()));
    let repo = repository_on(&runtime, Arc::new(faults.clone()));
    let opened = volume(&runtime, &repo, state.path()).unwrap();
    let socket = state.path().join("sock");
    let stop = CancellationToken::new();
    let running = serve(&runtime, &opened, &socket, &stop);
    // Parts of pages: what is around them must be fetched first.
    faults.always(Method::GetRange, "", Fault::Slow(Duration::from_millis(300)));
    let mut stream = connect(&socket);
    // More than are taken on at once, so that the disconnect is not seen before the client is gone.
    const WRITES: u64 = 300;
    const STEP: u64 = 3400;
    for number in 0..WRITES {
        let mut write = request(WRITE, number, number * STEP, 3);
        write.extend(b"new");
        stream.write_all(&write).unwrap();
    }
    stream.write_all(&request(DISCONNECT, 0, 0, 0)).unwrap();
    drop(stream);
    let delta = opened.device().delta().unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    let pages = ((WRITES - 1) * STEP + 2) / 4096 + 1;
    while delta.data_pages() < pages {
        let done = delta.data_pages();
        assert!(std::time::Instant::now() < deadline, "{done} of {pages} pages were written");
        std::thread::sleep(Duration::from_millis(10));
    }
    stop.cancel();
    assert_eq!(runtime.block_on(running).unwrap(), 0);
}

/// More requests in one burst than are taken on at once: those that wait in the server's buffer must be gone on with when the others are
/// done, though the client sends nothing more.
#[test]
fn a_burst_of_more_requests_than_are_taken_on_at_once_is_answered_to_the_last() {
    let (runtime, state) = (common::runtime(), tempfile::tempdir().unwrap());
    let repo = repository(&runtime);
    let opened = volume(&runtime, &repo, state.path()).unwrap();
    let socket = state.path().join("sock");
    let stop = CancellationToken::new();
    let running = serve(&runtime, &opened, &socket, &stop);
    let mut stream = connect(&socket);
    let flush = request(FLUSH, 0, 0, 0);
    const BURST: usize = 256 * 8 + 1;
    let mut answers = vec![0; BURST * 16];
    for round in 0..60 {
        stream.write_all(&flush.repeat(BURST)).unwrap();
        stream.read_exact(&mut answers).unwrap_or_else(|error| panic!("round {round}: {error}"));
    }
    stop.cancel();
    assert_eq!(runtime.block_on(running).unwrap(), 0);
}

/// The most memory this process has had.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// Each connection alone may have 64 MiB under way: without a bound for all, 24 of them had 1.5 GiB while a repository was slow.
#[test]
fn many_clients_with_all_they_may_have_under_way_stay_within_one_bound_and_are_all_answered() {
    const CLIENTS: u64 = 24;
    const WRITES: u64 = 70;
    const LEN: u32 = (1 << 20) - 2;
    let (runtime, state) = (common::runtime(), tempfile::tempdir().unwrap());
    let faults = FaultStore::new(Arc::new(MemStore::new()));
    let repo = repository_on(&runtime, Arc::new(faults.clone()));
    let opened = volume(&runtime, &repo, state.path()).unwrap();
    let socket = state.path().join("sock");
    let stop = CancellationToken::new();
    let running = serve(&runtime, &opened, &socket, &stop);
    // The first and the last page are changed in part: they must be fetched.
    faults.always(Method::GetRange, "", Fault::Slow(Duration::from_secs(3)));
    let before = peak_memory();
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let socket = &socket;
            scope.spawn(move || {
                let mut stream = connect(socket);
                stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
                let mut answers = stream.try_clone().unwrap();
                let reader = std::thread::spawn(move || {
                    let mut all = vec![0; WRITES as usize * 16];
                    answers.read_exact(&mut all).unwrap();
                    all.chunks(16).all(|answer| answer[4..8] == [0; 4])
                });
                let payload = vec![client as u8; LEN as usize];
                for number in 0..WRITES {
                    stream.write_all(&request(WRITE, number, 1, LEN)).unwrap();
                    stream.write_all(&payload).unwrap();
                }
                assert!(reader.join().unwrap());
            });
        }
    });
    let grown = (peak_memory() - before) >> 20;
    // The budget; and of each client what it is sending, what is received of it, and one request more.
    assert!(grown < 256 + CLIENTS * 4, "{grown} MiB");
    stop.cancel();
    assert_eq!(runtime.block_on(running).unwrap(), 0);
}
