//! A volume in this process, in state directories that were cut short or tampered with.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod common;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use horcrux::cache::{Cache, CacheOptions, MIN_LIMIT};
use horcrux::repo::Repository;
use horcrux::store::MemStore;
use horcrux::volume::{Source, StateDir, Volume, VolumeError};
use tokio::runtime::Runtime;

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
