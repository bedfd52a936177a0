//! Volumes in this process whose seals, commits and clones are cut short where no daemon can be made to stop.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod common;

use std::path::Path;
use std::sync::Arc;

use horcrux::cache::{Cache, CacheOptions, MIN_LIMIT};
use horcrux::format::Timestamp;
use horcrux::repo::Repository;
use horcrux::store::MemStore;
use horcrux::units::PageIndex;
use horcrux::volume::commit::{Made, Making};
use horcrux::volume::travel::clone_volume;
use horcrux::volume::{Pending, Source, StateDir, Volume, VolumeError, VolumeName};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

const PAGE: usize = 4096;

struct Host {
    runtime: Runtime,
    state: StateDir,
    cache: Arc<Cache>,
    repo: Repository,
    _dir: tempfile::TempDir,
}

impl Host {
    fn new() -> Host {
        let (runtime, dir) = (common::runtime(), tempfile::tempdir().unwrap());
        let repo = common::create(&runtime, Arc::new(MemStore::new()));
        let bytes = common::random_image(1, 4 << 20);
        let params = common::small_params(bytes.len());
        common::write(&runtime, &repo, &common::image("A"), &bytes, params).unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let cache = Cache::open(&state.cache_dir(), CacheOptions::new(MIN_LIMIT)).unwrap();
        Host { runtime, state, cache, repo, _dir: dir }
    }

    /// The volume `A`.
    fn open(&self) -> Arc<Volume> {
        let source = Source { access: vec!["mem".into()], image: common::image("A"), reference: None };
        let opening = Volume::of_image(&self.state, &self.cache, &self.repo, &source, false);
        Arc::new(self.runtime.block_on(opening).unwrap())
    }

    fn dir(&self, volume: &str) -> std::path::PathBuf {
        self.state.volume_dir(volume)
    }
}

fn write(volume: &Volume, page: u64, value: u8) {
    volume.device().delta().unwrap().write(PageIndex(page), &[value; PAGE]).unwrap();
}

fn first_byte(volume: &Volume, page: u64) -> u8 {
    let delta = volume.device().delta().unwrap();
    let mut bytes = [0; PAGE];
    delta.read(&delta.run(PageIndex(page), 1), 0, &mut bytes).unwrap();
    bytes[0]
}

fn pending(upto: &str, message: &str, amend: bool) -> Pending {
    Pending {
        upto: upto.to_owned(),
        message: message.to_owned(),
        author: "me".to_owned(),
        time: Timestamp { secs: 1, nanos: 0 },
        allow_empty: false,
        amend,
    }
}

/// Seals what there is as a commit that is to be made.
fn seal(volume: &Volume, message: &str) {
    volume.seal(volume.prepare_layer(true).unwrap()).unwrap();
    let add = |record: &mut horcrux::volume::VolumeRecord| {
        let upto = record.layers[record.layers.len() - 2].name.clone();
        record.pending.push(pending(&upto, message, false));
        Ok(())
    };
    volume.settle(add).unwrap();
}

fn name(text: &str) -> VolumeName {
    text.parse().unwrap()
}

#[test]
fn a_volume_opens_by_the_record_on_the_disk_and_keeps_what_was_written_last() {
    let host = Host::new();
    let volume = host.open();
    write(&volume, 0, 1);
    // A commit that gets no further than this: who asked for it is told that it failed.
    volume.seal(volume.prepare_layer(true).unwrap()).unwrap();
    write(&volume, 1, 2);
    volume.device().flush().unwrap();
    drop(volume);
    let again = host.open();
    assert_eq!((first_byte(&again, 0), first_byte(&again, 1)), (1, 2));
    assert_eq!(again.record().layers.len(), 2);
}

#[test]
fn while_a_layer_waits_to_be_put_on_nothing_below_it_is_taken_for_sealed() {
    let host = Host::new();
    let volume = host.open();
    volume.prepare_layer(false).unwrap();
    // The freeze failed: the record names a layer that takes no writes yet.
    assert!(volume.has_layer_waiting());
    let Err(VolumeError::NotSealed { layer, .. }) = volume.settle(|_| Ok(())) else {
        panic!("the layer that takes the writes was called sealed")
    };
    assert_eq!(layer, "0002");
    let Err(VolumeError::NotSealed { .. }) = volume.record().snapshot(&name("A"), &name("s")) else {
        panic!("a snapshot has a layer that takes writes")
    };
    let Err(VolumeError::NotSealed { .. }) =
        volume.holding(|record| clone_volume(&host.state, &name("A"), record, &name("w")))
    else {
        panic!("a clone shares a layer that takes writes")
    };
    assert!(!host.dir("w").exists());
    // Put on, it is as ever, and the one that waited is it.
    volume.seal(volume.prepare_layer(false).unwrap()).unwrap();
    let record = volume.settle(|_| Ok(())).unwrap();
    assert_eq!(record.layers.len(), 2);
    volume.holding(|record| clone_volume(&host.state, &name("A"), record, &name("w"))).unwrap();
    assert!(host.dir("w").join("volume.json").exists());
}

#[test]
fn a_clone_that_was_cut_short_leaves_its_name_free_and_nothing_behind() {
    let host = Host::new();
    let volume = host.open();
    write(&volume, 0, 1);
    write(&volume, 1, 1);
    seal(&volume, "x");
    // One file of a layer of two is gone: the second link fails.
    let data = host.dir("A").join("layers/0001/data");
    let away = host.dir("A").join("away");
    std::fs::rename(&data, &away).unwrap();
    let clone = || volume.holding(|record| clone_volume(&host.state, &name("A"), record, &name("w")));
    let error = clone().unwrap_err();
    assert!(error.to_string().contains("can't link a layer into"), "{error}");
    std::fs::rename(&away, &data).unwrap();
    let volumes = || {
        let entries = std::fs::read_dir(host.dir("A").parent().unwrap()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(volumes(), ["A"]);
    clone().unwrap();
    // One that was killed is deleted by the next server.
    drop(volume);
    let Host { state, _dir, .. } = host;
    std::fs::rename(state.volume_dir("w"), state.volume_dir(".making-w-00")).unwrap();
    drop(state);
    let state = StateDir::open(_dir.path()).unwrap();
    assert!(!state.volume_dir(".making-w-00").exists());
}

#[test]
fn of_two_who_make_one_commit_one_makes_it_and_none_takes_what_came_after_its_seal() {
    let host = Host::new();
    let volume = host.open();
    write(&volume, 0, 1);
    seal(&volume, "one");
    write(&volume, 0, 2);
    let (making, stop) = (Making::default(), CancellationToken::new());
    let both = async { tokio::join!(volume.make_commit(&making, &stop), volume.make_commit(&making, &stop)) };
    let (one, other) = host.runtime.block_on(both);
    assert!(matches!(one.unwrap(), Some(Made::Commit(_))));
    assert_eq!(other.unwrap(), None, "there is one, and it is made");
    assert_eq!(volume.record().layers.len(), 1);
    assert_eq!(first_byte(&volume, 0), 2);
    assert!(!volume.is_clean());
}

#[test]
fn a_commit_that_is_stopped_is_as_if_it_had_not_been_begun() {
    let host = Host::new();
    let volume = host.open();
    write(&volume, 0, 1);
    seal(&volume, "one");
    let (making, stop) = (Making::default(), CancellationToken::new());
    stop.cancel();
    let before = volume.record();
    let stopped = host.runtime.block_on(volume.make_commit(&making, &stop));
    assert!(matches!(stopped, Err(VolumeError::Stopped)), "{stopped:?}");
    assert_eq!(volume.record(), before);
    let made = host.runtime.block_on(volume.make_commit(&making, &CancellationToken::new()));
    assert!(matches!(made, Ok(Some(Made::Commit(_)))), "{made:?}");
    assert!(volume.record().pending.is_empty());
}

#[test]
fn what_was_to_replace_a_commit_that_is_pushed_by_now_follows_it() {
    let host = Host::new();
    let volume = host.open();
    write(&volume, 0, 1);
    volume.seal(volume.prepare_layer(true).unwrap()).unwrap();
    let add = |record: &mut horcrux::volume::VolumeRecord| {
        record.pending.push(pending("0001", "instead", true));
        Ok(())
    };
    let pushed = volume.settle(add).unwrap().pushed;
    let (making, stop) = (Making::default(), CancellationToken::new());
    host.runtime.block_on(volume.make_commit(&making, &stop)).unwrap();
    let base = volume.device().base();
    assert_eq!(base.version().commit().parents, [pushed]);
}

#[test]
fn a_commit_leaves_a_full_quota_to_write_the_same_pages_again() {
    let host = Host::new();
    let volume = host.open();
    // A quota is given when a volume is made: here the record gets it later.
    drop(volume);
    let path = host.dir("A").join("volume.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let with_quota = text.replace("\"layers\"", "\"quota\": 8192,\n  \"layers\"");
    assert_ne!(text, with_quota);
    std::fs::write(&path, with_quota).unwrap();
    let volume = host.open();
    let again = |page: u64| {
        let write = || volume.device().delta().unwrap().write(PageIndex(page), &[9; PAGE]);
        write().map_err(|error| error.to_string())
    };
    again(0).unwrap();
    again(1).unwrap();
    assert!(again(2).is_err(), "the quota is two pages");
    seal(&volume, "one");
    // What is sealed for a commit is about to go: the database goes on over the same pages.
    again(0).unwrap();
    again(1).unwrap();
    assert!(again(2).is_err());
    let (making, stop) = (Making::default(), CancellationToken::new());
    host.runtime.block_on(volume.make_commit(&making, &stop)).unwrap();
    again(1).unwrap();
    assert!(again(2).is_err());
}

#[test]
fn a_layer_whose_record_may_have_reached_the_disk_is_not_made_over() {
    let host = Host::new();
    let volume = host.open();
    let path = host.dir("A").join("volume.json");
    let before = std::fs::read_to_string(&path).unwrap();
    volume.prepare_layer(true).unwrap();
    let with_it = std::fs::read_to_string(&path).unwrap();
    drop(volume);
    // As after a store that failed past its rename: the disk names 0002, the volume that is open does not.
    std::fs::write(&path, &before).unwrap();
    let volume = host.open();
    std::fs::write(&path, &with_it).unwrap();
    volume.prepare_layer(true).unwrap();
    assert_eq!(volume.record().layers[1].name, "0003");
}

#[test]
fn what_was_made_here_stays_as_long_as_a_record_that_can_t_be_read_may_need_it() {
    let host = Host::new();
    let volume = host.open();
    write(&volume, 0, 1);
    seal(&volume, "one");
    let (making, stop) = (Making::default(), CancellationToken::new());
    host.runtime.block_on(volume.make_commit(&making, &stop)).unwrap();
    let repository = volume.record().repository;
    let made = host.state.made_dir(&repository);
    assert!(made.exists());
    drop(volume);
    assert_eq!(host.state.take_away_made(&repository).unwrap(), None, "its volume is here");
    let record = host.dir("A").join("volume.json");
    let text = std::fs::read_to_string(&record).unwrap();
    std::fs::write(&record, text.replace("\"version\": 3", "\"version\": 9")).unwrap();
    assert_eq!(host.state.take_away_made(&repository).unwrap(), None, "nobody knows what it needs");
    std::fs::remove_file(&record).unwrap();
    let gone = host.state.take_away_made(&repository).unwrap().unwrap();
    assert!(gone.exists() && !made.exists());
    // Whoever does not come to delete it leaves it to the next server, with uploads that were cut short.
    let left = Path::new(&made).join(".tmp-1-1");
    std::fs::create_dir_all(&made).unwrap();
    std::fs::write(&left, b"half").unwrap();
    let Host { state, _dir, .. } = host;
    drop(state);
    StateDir::open(_dir.path()).unwrap();
    assert!(!gone.exists() && !left.exists());
}
