//! A whole device against a reference model, with power cuts at syncs: a delta of one layer or several on a simulated disk, over a real image that is
//! read through a real cache.
//!
//! The model keeps for every page each version it had since the last FLUSH that returned; after a crash the page must be one of them, whole, and from
//! then on that is what it is. Block status is checked against the model too. `HORCRUX_SEQUENCES` sets how many random sequences run, `HORCRUX_SEED`
//! the first seed, `HORCRUX_SOAK=1` the full run; a failure prints its seed.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod common;
mod device_common;

use std::sync::Arc;

use bytes::Bytes;
use device_common::{CHUNK, Image, PAGE, cache, create_layer, from_env, identity, joined, open_layer, range};
use horcrux::cache::Cache;
use horcrux::delta::simulated::{Dice, SimulatedDisk};
use horcrux::delta::{Delta, Layer};
use horcrux::device::{Allocation, Base, Device, DeviceError, Dirty, Extent, Fence, Now};
use horcrux::repo::Version;
use horcrux::units::{BlockIndex, ByteLen, ByteOffset};

/// One block and a bit of the next, neither a multiple of chunks.
const COMMIT: usize = (1 << 20) + 2 * CHUNK as usize + 3 * PAGE as usize;
const DEFAULT_SEQUENCES: u64 = 600;
const SOAK_SEQUENCES: u64 = 10_000;
const THREADS: u64 = 2;
/// A thread starts with a cold cache again after so many sequences.
const SEQUENCES_PER_CACHE: u64 = 25;
const MOST_LAYERS: usize = 4;

/// What a page held at one time, and what the delta says of it.
#[derive(Clone)]
struct PageVersion {
    bytes: Arc<[u8]>,
    dirty: Dirty,
}

struct Model {
    /// Versions since the last flush that returned, that one first.
    pages: Vec<Vec<PageVersion>>,
    size: u64,
    /// Whether the commit holds anything in the chunk a page lies in.
    in_commit: Vec<bool>,
}

impl Model {
    fn new(image: &[u8], size: u64) -> Model {
        let page = |number: u64| {
            let (start, end) = (number * PAGE, ((number + 1) * PAGE).min(size));
            let byte = |at: u64| image.get(at as usize).copied().unwrap_or(0);
            vec![PageVersion { bytes: (start..end).map(byte).collect(), dirty: Dirty::Clean }]
        };
        let in_commit = |number: u64| {
            let chunk = (number * PAGE / CHUNK * CHUNK) as usize;
            let end = (chunk + CHUNK as usize).min(image.len());
            chunk < end && image[chunk..end].iter().any(|byte| *byte != 0)
        };
        let count = size.div_ceil(PAGE);
        Model { pages: (0..count).map(page).collect(), size, in_commit: (0..count).map(in_commit).collect() }
    }

    fn last(&self, page: u64) -> &PageVersion {
        self.pages[page as usize].last().unwrap()
    }

    /// Puts bytes into a range, or zeros.
    fn set(&mut self, at: u64, len: u64, bytes: Option<&[u8]>) {
        for page in at / PAGE..(at + len).div_ceil(PAGE) {
            let (start, end) = (at.max(page * PAGE), (at + len).min((page + 1) * PAGE));
            let mut content = self.last(page).bytes.to_vec();
            let place = &mut content[(start % PAGE) as usize..][..(end - start) as usize];
            match bytes {
                Some(bytes) => place.copy_from_slice(&bytes[(start - at) as usize..(end - at) as usize]),
                None => place.fill(0),
            }
            let dirty = if bytes.is_none() && end - start == PAGE { Dirty::Zero } else { Dirty::Data };
            self.pages[page as usize].push(PageVersion { bytes: content.into(), dirty });
        }
    }

    fn flushed(&mut self) {
        for versions in &mut self.pages {
            versions.drain(..versions.len() - 1);
        }
    }

    fn bytes(&self, at: u64, len: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len as usize);
        while (bytes.len() as u64) < len {
            let here = at + bytes.len() as u64;
            let page = &self.last(here / PAGE).bytes;
            let part = &page[(here % PAGE) as usize..];
            bytes.extend_from_slice(&part[..part.len().min((len - bytes.len() as u64) as usize)]);
        }
        bytes
    }

    /// The extents of a range by what `state` says of its pages, at most so many.
    fn extents<T: PartialEq>(
        &self,
        at: u64,
        len: u64,
        most: usize,
        state: impl Fn(u64) -> T,
    ) -> Vec<Extent<T>> {
        let mut found: Vec<Extent<T>> = Vec::new();
        for page in at / PAGE..(at + len).div_ceil(PAGE) {
            let part = (at + len).min((page + 1) * PAGE) - at.max(page * PAGE);
            let state = state(page);
            match found.last_mut() {
                Some(last) if last.state == state => last.len.0 += part,
                _ => found.push(Extent { len: ByteLen(part), state }),
            }
        }
        found.truncate(most);
        found
    }
}

/// Names the seed of the sequence that fails, whatever fails.
struct Named(u64);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("failed in the sequence of HORCRUX_SEED={} (run it with HORCRUX_SEQUENCES=1)", self.0);
        }
    }
}

/// The disks of the layers, lowest first, and what is opened from them.
struct World<'a> {
    image: &'a Image,
    cache: &'a Arc<Cache>,
    disks: Vec<SimulatedDisk>,
    size: u64,
}

impl World<'_> {
    async fn version(&self) -> Version {
        self.image.version(None).await
    }

    /// Opens everything anew: chunk tables are not loaded then. `Err` only where the power is off.
    async fn open(&self, fresh_top: bool) -> Option<Arc<Device>> {
        let version = self.version().await;
        let identity = identity(&version, self.size);
        let mut layers: Vec<Arc<Layer>> = Vec::new();
        for (number, disk) in self.disks.iter().enumerate() {
            let opened = if fresh_top && number + 1 == self.disks.len() {
                create_layer(disk.dir(), &identity, number as u8 + 1)
            } else {
                open_layer(disk.dir(), &identity)
            };
            match opened {
                Ok(layer) => layers.push(Arc::new(layer)),
                Err(_) if disk.is_off() => return None,
                Err(error) => panic!("layer {number} can't be opened: {error}"),
            }
        }
        let base = Base::new(version, self.cache.clone());
        Some(Arc::new(Device::new(base, Some(Delta::new(layers)), ByteLen(self.size))))
    }

    fn top(&self) -> &SimulatedDisk {
        self.disks.last().unwrap()
    }
}

/// A range: tiny, about a page, about a chunk, or several; anywhere, at borders, at the end.
fn any_range(dice: &mut Dice, size: u64) -> (u64, u64) {
    let longest = [16, PAGE, 3 * PAGE, CHUNK, 4 * CHUNK][dice.below(5) as usize];
    let mut len = (1 + dice.below(longest)).min(size);
    let unit = [1, 512, PAGE, PAGE, CHUNK][dice.below(5) as usize];
    if dice.below(2) == 0 {
        len = len.next_multiple_of(unit).min(size);
    }
    let at = match dice.below(8) {
        0 => size - len,
        1 => (COMMIT as u64).saturating_sub(dice.below(2 * PAGE)).min(size - len),
        // A few pages that are written again and again.
        2..=4 => (dice.below(6) * PAGE / unit * unit).min(size - len),
        _ => (dice.below(size - len + 1) / unit * unit).min(size - len),
    };
    (at, len)
}

fn noise(dice: &mut Dice, len: u64) -> Vec<u8> {
    let mut state = dice.below(u64::MAX) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| next().to_le_bytes()).collect();
    bytes.truncate(len as usize);
    bytes
}

/// One change in one of its two forms; `Ok(false)` is a change that is no change.
async fn change(device: &Arc<Device>, model: &mut Model, dice: &mut Dice) -> Result<(), DeviceError> {
    let fence = Fence::new();
    let (at, len) = any_range(dice, model.size);
    let target = range(at, len);
    let now = dice.below(3) > 0;
    let kind = dice.below(10);
    // The model first: a change that fails may have happened page by page.
    let done = match kind {
        0..=5 => {
            let bytes = noise(dice, len);
            model.set(at, len, Some(&bytes));
            if now && device.write_now(&fence, ByteOffset(at), &bytes)? == Now::Done {
                return Ok(());
            }
            device.write(&fence, ByteOffset(at), Bytes::from(bytes)).await
        }
        6 => {
            model.set(at, len, Some(&vec![0; len as usize]));
            device.zero_allocated(&fence, target).await
        }
        7 => {
            model.set(at, len, None);
            if now && device.zero_now(&fence, target)? == Now::Done {
                return Ok(());
            }
            device.zero(&fence, target).await
        }
        _ => {
            let (first, end) = (at.next_multiple_of(PAGE), (at + len) / PAGE * PAGE);
            if first < end {
                model.set(first, end - first, None);
            }
            if now && device.trim_now(&fence, target)? == Now::Done {
                return Ok(());
            }
            device.trim(&fence, target).await
        }
    };
    done
}

async fn check_read(device: &Arc<Device>, model: &Model, dice: &mut Dice) {
    let (at, len) = any_range(dice, model.size);
    let mut pieces = Vec::new();
    if dice.below(2) == 0 || device.read_now(range(at, len), &mut pieces).unwrap() == Now::Wait {
        pieces = device.read(range(at, len)).await.unwrap();
    }
    assert!(joined(&pieces) == model.bytes(at, len), "{len} bytes from {at} on differ");
}

async fn check_status(world: &World<'_>, device: &Arc<Device>, model: &Model, dice: &mut Dice) {
    let (at, len) = if dice.below(2) == 0 { (0, model.size) } else { any_range(dice, model.size) };
    let most = if dice.below(2) == 0 { 1 + dice.below(5) as usize } else { 1000 };
    let wanted = range(at, len);
    assert_eq!(
        device.dirty(wanted, most).unwrap(),
        model.extents(at, len, most, |page| model.last(page).dirty),
        "dirty"
    );
    let allocation = |page: u64| match model.last(page).dirty {
        Dirty::Data => Allocation::Data,
        Dirty::Clean if model.in_commit[page as usize] => Allocation::Data,
        Dirty::Clean | Dirty::Zero => Allocation::Hole,
    };
    assert_eq!(
        device.allocation(wanted, most).await.unwrap(),
        model.extents(at, len, most, allocation),
        "allocation"
    );
    let version = world.version().await;
    let mut cached = vec![true; model.pages.len()];
    for block in 0..version.commit().blocks() {
        let Some(table) = version.table(BlockIndex(block)).await.unwrap() else { continue };
        for entry in table.entries() {
            let first = (block * (1 << 20) + u64::from(entry.index) * CHUNK) / PAGE;
            for page in (first..first + CHUNK / PAGE).take_while(|page| *page < model.pages.len() as u64) {
                let clean = model.last(page).dirty == Dirty::Clean;
                cached[page as usize] = !clean || world.cache.contains(&entry.id);
            }
        }
    }
    assert_eq!(
        device.cached(wanted, most).await.unwrap(),
        model.extents(at, len, most, |page| cached[page as usize]),
        "cached"
    );
}

async fn check_all(device: &Arc<Device>, model: &Model) {
    let found = joined(&device.read(range(0, model.size)).await.unwrap());
    for (page, found) in found.chunks(PAGE as usize).enumerate() {
        assert!(*found == *model.last(page as u64).bytes, "page {page} differs");
    }
}

/// Each page is one of its versions; from here on that is what it is.
async fn settle_after_crash(device: &Arc<Device>, model: &mut Model) {
    let found = joined(&device.read(range(0, model.size)).await.unwrap());
    for (page, found) in found.chunks(PAGE as usize).enumerate() {
        let at = page as u64 * PAGE;
        let dirty = device.dirty(range(at, found.len() as u64), 1).unwrap()[0].state;
        let versions = &mut model.pages[page];
        let allowed =
            versions.iter().rfind(|version| *version.bytes == *found && version.dirty == dirty).cloned();
        *versions = vec![allowed.unwrap_or_else(|| {
            panic!("page {page} ({dirty:?}) is none of the {} versions since the last flush", versions.len())
        })];
    }
}

async fn sequence(seed: u64, image: &Image, cache: &Arc<Cache>) {
    let _named = Named(seed);
    let mut dice = Dice(seed);
    let size = match dice.below(3) {
        0 => COMMIT as u64,
        1 => COMMIT as u64 + 50 * PAGE + 777,
        _ => COMMIT as u64 + (1 << 20) + 512,
    };
    let mut world = World { image, cache, disks: vec![SimulatedDisk::new()], size };
    let mut model = Model::new(&image.bytes, size);
    let mut device = world.open(true).await.unwrap();
    for _ in 0..=dice.below(4) {
        if world.disks.len() < MOST_LAYERS && dice.below(3) == 0 {
            // What is there is sealed, and a new layer takes the writes.
            device.flush().unwrap();
            model.flushed();
            world.disks.push(SimulatedDisk::new());
            device = world.open(true).await.unwrap();
        }
        world.top().cut_power_after(dice.below(12));
        for _ in 0..dice.below(60) {
            let went_on = match dice.below(12) {
                0..=6 => change(&device, &mut model, &mut dice).await.is_ok(),
                7 => device.flush().is_ok_and(|()| {
                    model.flushed();
                    true
                }),
                8 | 9 if !world.top().is_off() => {
                    check_read(&device, &model, &mut dice).await;
                    true
                }
                10 if !world.top().is_off() => {
                    check_status(&world, &device, &model, &mut dice).await;
                    true
                }
                11 if dice.below(3) == 0 => {
                    let flushed = device.flush().is_ok();
                    if flushed {
                        model.flushed();
                        if let Some(opened) = world.open(false).await {
                            device = opened;
                            check_all(&device, &model).await;
                        }
                    }
                    flushed
                }
                _ => true,
            };
            if !went_on {
                assert!(world.top().is_off(), "a request failed with the power on");
                break;
            }
        }
        if !world.top().is_off() && dice.below(2) == 0 {
            check_all(&device, &model).await;
        }
        // The power goes; it may go again while the logs are being repaired.
        world.disks = world.disks.iter().map(|disk| disk.crash(&mut dice)).collect();
        if dice.below(3) == 0 {
            world.top().cut_power_after(dice.below(3));
            drop(world.open(false).await);
            world.disks = world.disks.iter().map(|disk| disk.crash(&mut dice)).collect();
        }
        device = world.open(false).await.expect("the power is on");
        settle_after_crash(&device, &mut model).await;
    }
    check_status(&world, &device, &model, &mut dice).await;
}

#[test]
fn a_device_is_its_model_and_after_a_crash_each_page_is_a_version_since_the_last_flush() {
    let soak = std::env::var("HORCRUX_SOAK").is_ok_and(|value| value == "1");
    let default = if soak { SOAK_SEQUENCES } else { DEFAULT_SEQUENCES };
    let first = from_env("HORCRUX_SEED", 1);
    let seeds = first..first + from_env("HORCRUX_SEQUENCES", default);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let seeds = seeds.clone();
            scope.spawn(move || {
                let runtime = common::runtime();
                let image = Image::new(&runtime, common::random_image(7, COMMIT));
                let mine: Vec<u64> = seeds.filter(|seed| seed % THREADS == thread).collect();
                for seeds in mine.chunks(SEQUENCES_PER_CACHE as usize) {
                    let dir = tempfile::tempdir().unwrap();
                    let cache = cache(dir.path(), 16);
                    for &seed in seeds {
                        runtime.block_on(sequence(seed, &image, &cache));
                    }
                }
            });
        }
    });
}
