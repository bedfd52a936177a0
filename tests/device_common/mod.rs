//! What the device tests share: an image in a repository, a cache before it, a delta over it.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]
#![allow(dead_code, reason = "each test binary uses its part")]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use horcrux::cache::{Cache, CacheError, CacheOptions};
use horcrux::delta::disk::Dir;
use horcrux::delta::{Delta, DeltaError, Identity, Layer, LayerId, VolumeId};
use horcrux::device::{Base, Device, Piece};
use horcrux::repo::{MetaCache, NoMetaCache, Reference, Repository, Version, VersionOptions, WriterParams};
use horcrux::store::{FaultStore, MemStore, Store};
use horcrux::units::{ByteLen, ByteOffset, ByteRange, PAGE_SIZE};
use tokio::runtime::Runtime;

use crate::common;

pub const PAGE: u64 = PAGE_SIZE;
pub const CHUNK: u64 = 64 << 10;
pub const BLOCK: u64 = 1 << 20;

/// A repository with one image, behind a store that fails on demand.
pub struct Image {
    pub store: FaultStore,
    pub repository: Repository,
    pub bytes: Vec<u8>,
}

impl Image {
    /// Blocks of 1 MiB, chunks of 64 KiB.
    pub fn new(runtime: &Runtime, bytes: Vec<u8>) -> Image {
        let params = common::small_params(bytes.len());
        Image::with(runtime, bytes, params)
    }

    pub fn with(runtime: &Runtime, bytes: Vec<u8>, params: WriterParams) -> Image {
        let store = FaultStore::new(Arc::new(MemStore::new()));
        let repository = common::create(runtime, Arc::new(store.clone()) as Arc<dyn Store>);
        common::write(runtime, &repository, &common::image("disk"), &bytes, params).unwrap();
        Image { store, repository, bytes }
    }

    /// Opens the version; its map and tables are kept in `meta`, or nowhere.
    pub async fn version(&self, meta: Option<&Arc<Cache>>) -> Version {
        let meta: Arc<dyn MetaCache> = match meta {
            Some(cache) => cache.clone(),
            None => Arc::new(NoMetaCache),
        };
        let name = common::image("disk");
        let resolved = self.repository.resolve(&name, &Reference::default(), &meta).await.unwrap();
        Version::open(&self.repository, &name, resolved.commit, meta, VersionOptions::default())
            .await
            .unwrap()
    }

    pub async fn base(&self, cache: &Arc<Cache>) -> Base {
        Base::new(self.version(None).await, cache.clone())
    }
}

/// Opens a cache; what an earlier one of this process still has under way is waited for.
pub fn cache(dir: &Path, mib: u64) -> Arc<Cache> {
    let options = CacheOptions { keep_free: Some(ByteLen(0)), ..CacheOptions::new(ByteLen(mib << 20)) };
    let patience = Instant::now() + Duration::from_secs(10);
    loop {
        match Cache::open(dir, options) {
            Err(CacheError::InUse { .. }) if Instant::now() < patience => {
                std::thread::sleep(Duration::from_millis(2));
            }
            opened => return opened.unwrap(),
        }
    }
}

pub fn identity(version: &Version, size: u64) -> Identity {
    Identity {
        base: version.id(),
        volume: VolumeId([1; 16]),
        device_size: ByteLen(size.next_multiple_of(PAGE)),
    }
}

/// A new layer, whose log is rewritten soon.
pub fn create_layer(dir: Box<dyn Dir>, identity: &Identity, id: u8) -> Result<Layer, DeltaError> {
    Ok(Layer::create(dir, identity, LayerId([id; 16]))?.rewrite_log_above(ByteLen(400)))
}

pub fn open_layer(dir: Box<dyn Dir>, identity: &Identity) -> Result<Layer, DeltaError> {
    Ok(Layer::open(dir, identity)?.rewrite_log_above(ByteLen(400)))
}

/// A device over layers, lowest first.
pub fn device(base: Base, layers: Vec<Layer>, size: u64) -> Arc<Device> {
    let delta = Delta::new(layers.into_iter().map(Arc::new).collect());
    Arc::new(Device::new(base, Some(delta), ByteLen(size)))
}

pub fn range(at: u64, len: u64) -> ByteRange {
    ByteRange::at(ByteOffset(at), ByteLen(len)).unwrap()
}

/// The bytes of pieces.
pub fn joined(pieces: &[Piece]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(pieces.iter().map(Piece::len).sum::<u64>() as usize);
    for piece in pieces {
        match piece {
            Piece::Zero(len) => bytes.resize(bytes.len() + len.0 as usize, 0),
            Piece::Chunk(slice) => bytes.extend_from_slice(slice),
            Piece::Bytes(part) => bytes.extend_from_slice(part),
        }
    }
    bytes
}

pub async fn read(device: &Arc<Device>, at: u64, len: u64) -> Vec<u8> {
    let bytes = joined(&device.read(range(at, len)).await.unwrap());
    assert_eq!(bytes.len() as u64, len, "a read is as long as it was asked to be");
    bytes
}

pub fn from_env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

/// A page that says which page it is and what was written there, in every 8 bytes, so that any tear shows.
pub fn stamped(page: u64, stamp: u64) -> Vec<u8> {
    let head = page << 40 | stamp << 16;
    (0..PAGE / 8).flat_map(|word| (head | word).to_le_bytes()).collect()
}

/// The stamp of a whole page; `Err` tells what is wrong with it.
pub fn stamp_of(page: u64, bytes: &[u8]) -> Result<u64, String> {
    let head = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    let stamp = head >> 16 & 0xff_ffff;
    if bytes == stamped(page, stamp) {
        Ok(stamp)
    } else if head >> 40 != page {
        Err(format!("page {page} has bytes of page {}", head >> 40))
    } else {
        Err(format!("page {page} is torn: it starts with stamp {stamp}"))
    }
}
