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
use horcrux::nbd::{Endpoint, Export, Listener, Server, ServerOptions};
use horcrux::repo::Repository;
use horcrux::store::MemStore;
use horcrux::volume::{Source, StateDir, Volume, VolumeError};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

fn repository(runtime: &Runtime) -> Repository {
    let repo = common::create(runtime, Arc::new(MemStore::new()));
    let bytes = common::random_image(1, 1 << 20);
    common::write(runtime, &repo, &common::image("A"), &bytes, common::small_params(1 << 20)).unwrap();
    repo
}

fn volume(runtime: &Runtime, repo: &Repository, state: &Path) -> Result<Volume, VolumeError> {
    let state = StateDir::open(state)?;
    let cache = Cache::open(&state.cache_dir(), CacheOptions::new(MIN_LIMIT)).unwrap();
    let source = Source { access: "mem".into(), image: common::image("A"), reference: None };
    runtime.block_on(Volume::open(&state, &cache, repo, &source, false))
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

/// More requests in one burst than are taken on at once: those that wait in the server's buffer must be gone on with when the others are
/// done, though the client sends nothing more.
#[test]
fn a_burst_of_more_requests_than_are_taken_on_at_once_is_answered_to_the_last() {
    let (runtime, state) = (common::runtime(), tempfile::tempdir().unwrap());
    let repo = repository(&runtime);
    let opened = volume(&runtime, &repo, state.path()).unwrap();
    let socket = state.path().join("sock");
    let stop = CancellationToken::new();
    // Listening needs the runtime's own poller.
    let entered = runtime.enter();
    let listener = Listener::bind(&Endpoint::Unix(socket.clone())).unwrap();
    drop(entered);
    let export = Arc::new(Export::new("A".into(), String::new(), opened.device().clone()));
    let server = Server::new(vec![export], vec![listener], ServerOptions::default()).unwrap();
    let running = runtime.spawn(server.run(stop.clone()));
    let mut stream = connect(&socket);
    let mut flush = [0; 28];
    flush[..4].copy_from_slice(&0x2560_9513u32.to_be_bytes());
    flush[7] = 3;
    const BURST: usize = 256 * 8 + 1;
    let mut answers = vec![0; BURST * 16];
    for round in 0..60 {
        stream.write_all(&flush.repeat(BURST)).unwrap();
        stream.read_exact(&mut answers).unwrap_or_else(|error| panic!("round {round}: {error}"));
    }
    stop.cancel();
    assert_eq!(runtime.block_on(running).unwrap(), 0);
}
