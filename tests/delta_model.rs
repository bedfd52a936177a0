//! The delta against a reference model, with power cuts at syncs.
//!
//! The model keeps for every page each version it had since the last FLUSH that returned; after a crash the page must be one of them, whole.
//! `HORCRUX_SEQUENCES` sets how many random sequences run, `HORCRUX_SEED` the first seed; a failure prints its seed.

use std::sync::Arc;

use horcrux::delta::simulated::{Dice, SimulatedDisk};
use horcrux::delta::{Delta, DeltaError, Identity, Layer, LayerId, PageWrite, Source, VolumeId};
use horcrux::format::CommitId;
use horcrux::units::{ByteLen, PAGE_SIZE, PageIndex};

const PAGES: u64 = 1400;
const PAGE: usize = PAGE_SIZE as usize;

fn identity() -> Identity {
    Identity {
        base: CommitId::of(b"the base"),
        volume: VolumeId([1; 16]),
        device_size: ByteLen(PAGES * PAGE_SIZE),
    }
}

/// What a page holds: nothing was said of it, zeros, or the bytes stamped with a number.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Content {
    Base,
    Zero,
    Stamp(u64),
}

fn stamped(stamp: u64) -> Vec<u8> {
    // Every 8 bytes differ, so any tear shows.
    (0..PAGE as u64 / 8).flat_map(|word| (stamp << 16 | word).to_le_bytes()).collect()
}

fn read_page(delta: &Delta, page: u64) -> Result<Content, String> {
    let run = delta.run(PageIndex(page), PAGES - page);
    match run.source {
        Source::Base => Ok(Content::Base),
        Source::Zero => Ok(Content::Zero),
        Source::Data { .. } => {
            let mut bytes = vec![0; PAGE];
            delta.read(&run, 0, &mut bytes).map_err(|error| error.to_string())?;
            let stamp = u64::from_le_bytes(bytes[..8].try_into().unwrap()) >> 16;
            if bytes == stamped(stamp) { Ok(Content::Stamp(stamp)) } else { Err("torn".into()) }
        }
    }
}

struct Model {
    /// Versions since the last flush that returned, that one first.
    versions: Vec<Vec<Content>>,
}

impl Model {
    fn new() -> Model {
        Model { versions: vec![vec![Content::Base]; PAGES as usize] }
    }

    fn set(&mut self, page: u64, content: Content) {
        self.versions[page as usize].push(content);
    }

    fn flushed(&mut self) {
        for versions in &mut self.versions {
            *versions = vec![*versions.last().unwrap()];
        }
    }

    fn check_now(&self, delta: &Delta, seed: u64) {
        for (page, versions) in self.versions.iter().enumerate() {
            assert_eq!(
                read_page(delta, page as u64).as_ref(),
                Ok(versions.last().unwrap()),
                "seed {seed} page {page}"
            );
        }
    }

    /// After a kill: each page is what was acknowledged last, or what was being written: as many of its last versions as `unsure` names it.
    fn check_after_kill(&mut self, delta: &Delta, unsure: &[u64], seed: u64) {
        for (page, versions) in self.versions.iter_mut().enumerate() {
            let found = read_page(delta, page as u64)
                .unwrap_or_else(|error| panic!("seed {seed}: page {page} is {error} after a kill"));
            let being_written = unsure.iter().filter(|unsure| **unsure == page as u64).count();
            let known = &versions[versions.len() - 1 - being_written..];
            assert!(
                known.contains(&found),
                "seed {seed}: page {page} is {found:?} after a kill, not of {known:?}"
            );
            // It is no safer from a power cut than before.
            versions.push(found);
        }
    }

    /// After a crash: each page is one of its versions; from here on that is what it is.
    fn check_after_crash(&mut self, delta: &Delta, seed: u64) {
        for (page, versions) in self.versions.iter_mut().enumerate() {
            let found = read_page(delta, page as u64)
                .unwrap_or_else(|error| panic!("seed {seed}: page {page} is {error}"));
            assert!(
                versions.contains(&found),
                "seed {seed}: page {page} is {found:?}, was {versions:?} since the last flush"
            );
            *versions = vec![found];
        }
    }
}

/// Short logs and tails, so that their rewriting and their end are in the sequences too.
fn short(layer: Layer) -> Layer {
    layer.rewrite_log_above(ByteLen(400)).give_up_tails_above(ByteLen(1000))
}

fn reopen(disk: &SimulatedDisk) -> Result<Delta, DeltaError> {
    let layer = short(Layer::open(disk.dir(), &identity())?);
    Ok(Delta::new(vec![Arc::new(layer)]))
}

fn write_together(delta: &Delta, writes: &[(u64, Vec<u8>)]) -> Result<(), DeltaError> {
    let writes: Vec<PageWrite<'_>> =
        writes.iter().map(|(first, bytes)| PageWrite { first: PageIndex(*first), bytes }).collect();
    delta.write_together(&writes)
}

fn run_sequence(seed: u64) {
    let mut dice = Dice(seed);
    let mut disk = SimulatedDisk::new();
    let layer = Layer::create(disk.dir(), &identity(), LayerId([2; 16])).unwrap();
    let mut delta = Delta::new(vec![Arc::new(short(layer))]);
    let mut model = Model::new();
    let mut stamp = 0;
    for _ in 0..=dice.below(4) {
        disk.cut_power_after(dice.below(12));
        let mut down = false;
        for _ in 0..dice.below(120) {
            let first = if dice.below(2) == 0 { dice.below(40) } else { dice.below(PAGES) };
            let longest = if dice.below(8) == 0 { 600 } else { 12 };
            let len = (1 + dice.below(longest)).min(PAGES - first);
            match dice.below(48) {
                0..=22 => {
                    let bytes: Vec<u8> = (0..len).flat_map(|page| stamped(stamp + 1 + page)).collect();
                    // Even a write that fails may have reached the disk page by page.
                    for page in 0..len {
                        model.set(first + page, Content::Stamp(stamp + 1 + page));
                    }
                    stamp += len;
                    if delta.write(PageIndex(first), &bytes).is_err() {
                        assert!(disk.is_off(), "seed {seed}");
                        break;
                    }
                }
                23..=30 => {
                    (first..first + len).for_each(|page| model.set(page, Content::Zero));
                    if delta.zero(PageIndex(first), len).is_err() {
                        break;
                    }
                }
                31..=34 => match delta.flush() {
                    Ok(()) => model.flushed(),
                    Err(_) => break,
                },
                35 => {
                    // A sync fails, or the server is killed at one; the next server goes on from what the kernel shows.
                    let failed = dice.below(3) == 0;
                    match dice.below(2) {
                        _ if failed => disk.fail_next_sync(&mut dice),
                        0 => disk.kill_at_next_sync(None),
                        _ => disk.kill_at_next_sync(Some(&mut dice)),
                    }
                    if delta.flush().is_ok() {
                        model.flushed();
                    }
                    delta = match reopen(&disk) {
                        Ok(delta) => delta,
                        // Not this one either: the sync it died at or gave up at was its own.
                        Err(_) => {
                            down = true;
                            break;
                        }
                    };
                    if failed {
                        model.check_after_crash(&delta, seed);
                    } else {
                        model.check_after_kill(&delta, &[], seed);
                    }
                }
                43..=46 => {
                    // Writes that came together, to the same pages too. Killed in the middle of them, they may be there or not, each page for itself.
                    let killed = dice.below(4) == 0;
                    let mut unsure = Vec::new();
                    let together: Vec<(u64, Vec<u8>)> = (0..2 + dice.below(30))
                        .map(|_| {
                            let first = if dice.below(3) == 0 { first } else { dice.below(PAGES - 4) };
                            let pages = first..(first + 1 + dice.below(3)).min(PAGES);
                            let bytes = pages.clone().flat_map(|page| {
                                stamp += 1;
                                model.set(page, Content::Stamp(stamp));
                                stamped(stamp)
                            });
                            let bytes = bytes.collect();
                            unsure.extend(pages);
                            (first, bytes)
                        })
                        .collect();
                    if killed {
                        disk.kill_at_write(dice.below(together.len() as u64 + 2));
                    }
                    let written = write_together(&delta, &together);
                    if !killed {
                        if written.is_err() {
                            assert!(disk.is_off(), "seed {seed}");
                            break;
                        }
                        continue;
                    }
                    disk.kill();
                    delta = match reopen(&disk) {
                        Ok(delta) => delta,
                        Err(_) if disk.is_off() => break,
                        Err(error) => panic!("seed {seed}: {error}"),
                    };
                    model.check_after_kill(&delta, if written.is_ok() { &[] } else { &unsure[..] }, seed);
                }
                41 | 42 => {
                    // Killed between two requests, or in the middle of a write.
                    let mut unsure = Vec::new();
                    if dice.below(2) == 0 {
                        let bytes: Vec<u8> = (0..len).flat_map(|page| stamped(stamp + 1 + page)).collect();
                        for page in 0..len {
                            model.set(first + page, Content::Stamp(stamp + 1 + page));
                            unsure.push(first + page);
                        }
                        stamp += len;
                        disk.kill_at_write(dice.below(4));
                        let _ = delta.write(PageIndex(first), &bytes);
                    }
                    disk.kill();
                    delta = match reopen(&disk) {
                        Ok(delta) => delta,
                        Err(_) if disk.is_off() => break,
                        Err(error) => panic!("seed {seed}: {error}"),
                    };
                    model.check_after_kill(&delta, &unsure, seed);
                }
                36 => {
                    if delta.flush().is_err() {
                        break;
                    }
                    model.flushed();
                    delta = match reopen(&disk) {
                        Ok(delta) => delta,
                        Err(_) if disk.is_off() => break,
                        Err(error) => panic!("seed {seed}: {error}"),
                    };
                    model.check_now(&delta, seed);
                }
                _ => {}
            }
        }
        if !disk.is_off() && !down && dice.below(2) == 0 {
            model.check_now(&delta, seed);
        }
        // The power goes; it may go again while the log is being repaired.
        disk = if dice.below(3) == 0 { disk.pull_out(&mut dice) } else { disk.crash(&mut dice) };
        if dice.below(3) == 0 {
            disk.cut_power_after(dice.below(3));
            let _ = reopen(&disk);
            disk = disk.crash(&mut dice);
        }
        delta = reopen(&disk).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        model.check_after_crash(&delta, seed);
    }
}

fn from_env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

#[test]
fn after_a_crash_at_any_sync_every_page_is_a_version_it_had_since_the_last_flush() {
    let first = from_env("HORCRUX_SEED", 1);
    let default = if std::env::var_os("HORCRUX_SOAK").is_some() { 10_000 } else { 400 };
    for seed in first..first + from_env("HORCRUX_SEQUENCES", default) {
        run_sequence(seed);
    }
}

#[test]
fn a_full_disk_is_enospc_and_nothing_written_before_is_lost() {
    let first = from_env("HORCRUX_SEED", 0);
    for seed in first..first + if std::env::var_os("HORCRUX_SOAK").is_some() { 3000 } else { 200 } {
        let mut dice = Dice(seed);
        let disk = SimulatedDisk::new();
        let layer = Layer::create(disk.dir(), &identity(), LayerId([2; 16])).unwrap();
        // Every other time the log is so short that it has to be rewritten again and again, where there is no space for it.
        let layer = if seed % 2 == 0 { layer.rewrite_log_above(ByteLen(400)) } else { layer };
        let mut delta = Delta::new(vec![Arc::new(layer)]);
        let mut model = Model::new();
        for round in 0..40 {
            disk.limit_space(Some(dice.below(8 * PAGE_SIZE)));
            let page = dice.below(60);
            let stamp = seed * 1000 + round + 1;
            // Of several pages, so that some are written and some are not; and the same bytes again and again, as programs do.
            let len = 1 + dice.below(6);
            let same = dice.below(3) == 0;
            let bytes: Vec<u8> = (0..len).flat_map(|_| stamped(if same { 1 } else { stamp })).collect();
            let content = Content::Stamp(if same { 1 } else { stamp });
            if dice.below(4) == 0 {
                disk.limit_space(Some(dice.below(200)));
                (page..page + len).for_each(|page| model.set(page, Content::Zero));
                match delta.zero(PageIndex(page), len) {
                    Ok(()) => {}
                    Err(DeltaError::Full { .. }) => {
                        disk.limit_space(None);
                        delta.zero(PageIndex(page), len).unwrap();
                    }
                    Err(other) => panic!("seed {seed}: {other}"),
                }
            }
            // Every other time as one write for each page, that came together.
            let pages = || bytes.chunks(PAGE).zip(page..).map(|(bytes, page)| (page, bytes.to_vec()));
            let written = match dice.below(2) {
                0 => delta.write(PageIndex(page), &bytes),
                _ => write_together(&delta, &pages().collect::<Vec<_>>()),
            };
            match written {
                Ok(()) => (page..page + len).for_each(|page| model.set(page, content)),
                Err(DeltaError::Full { .. }) => {
                    // A page that was overwritten in place may be torn only until it is flushed; it is written again here.
                    disk.limit_space(None);
                    delta.write(PageIndex(page), &bytes).unwrap();
                    (page..page + len).for_each(|page| model.set(page, content));
                }
                Err(other) => panic!("seed {seed}: {other}"),
            }
            if dice.below(2) == 0 {
                disk.limit_space(Some(dice.below(8 * PAGE_SIZE)));
                match delta.flush() {
                    Ok(()) => model.flushed(),
                    Err(DeltaError::Full { .. }) => {}
                    Err(other) => panic!("seed {seed}: {other}"),
                }
            }
            model.check_now(&delta, seed);
            if dice.below(4) == 0 {
                // Killed, and opened on what space there is.
                disk.kill();
                delta = match reopen(&disk) {
                    Ok(delta) => delta,
                    Err(DeltaError::Full { .. }) => {
                        disk.limit_space(None);
                        reopen(&disk).unwrap()
                    }
                    Err(other) => panic!("seed {seed}: {other}"),
                };
                model.check_after_kill(&delta, &[], seed);
            }
        }
        disk.limit_space(None);
        delta.flush().unwrap();
        model.flushed();
        drop(delta);
        // Opened while the disk is full: what a crash left is repaired in place, or it is said that there is no space.
        let disk = disk.crash(&mut dice);
        disk.limit_space(Some(0));
        match reopen(&disk) {
            Ok(delta) => model.check_now(&delta, seed),
            Err(DeltaError::Full { .. }) => {}
            Err(other) => panic!("seed {seed}: {other}"),
        }
        disk.limit_space(None);
        model.check_now(&reopen(&disk).unwrap(), seed);
    }
}

#[test]
fn of_writes_that_came_together_those_before_a_failure_are_there_and_the_others_never_were() {
    for killed in [false, true] {
        for failing in 0..=8 {
            let disk = SimulatedDisk::new();
            let layer = Layer::create(disk.dir(), &identity(), LayerId([2; 16])).unwrap();
            let mut delta = Delta::new(vec![Arc::new(layer)]);
            // Pages that are written in place, such that are not because a commit has them, and such that were never written; one of them twice.
            (20..24).for_each(|page| delta.write(PageIndex(page), &stamped(page)).unwrap());
            delta.flush().unwrap();
            (10..12).for_each(|page| delta.write(PageIndex(page), &stamped(page)).unwrap());
            let pages = [10, 1, 2, 20, 21, 11, 2, 3];
            let writes: Vec<(u64, Vec<u8>)> =
                (100..).zip(pages).map(|(n, page)| (page, stamped(n))).collect();
            // The first write of the disk says where they go.
            disk.fail_write_after(failing);
            let written = write_together(&delta, &writes);
            assert!(written.is_err(), "{failing}");
            if killed {
                disk.kill();
                delta = reopen(&disk).unwrap();
            }
            for page in [1, 2, 3, 10, 11, 20, 21, 22] {
                let before = if page < 10 { Content::Base } else { Content::Stamp(page) };
                let its = pages.iter().zip(100..).zip(1..=8).filter(|((at, _), _)| **at == page);
                let last = its.filter(|(_, nth)| *nth < failing.max(1));
                let expected = last.last().map_or(before, |((_, n), _)| Content::Stamp(n));
                assert_eq!(read_page(&delta, page), Ok(expected), "{failing} {killed} page {page}");
            }
            // All of it once more.
            write_together(&delta, &writes).unwrap();
            delta.flush().unwrap();
            assert_eq!(read_page(&delta, 2), Ok(Content::Stamp(106)));
        }
    }
}

#[test]
fn a_failed_fsync_fails_the_flush_and_everything_after_until_reopened() {
    let disk = SimulatedDisk::new();
    let layer = Layer::create(disk.dir(), &identity(), LayerId([2; 16])).unwrap();
    let delta = Delta::new(vec![Arc::new(layer)]);
    delta.write(PageIndex(3), &stamped(1)).unwrap();
    delta.flush().unwrap();
    delta.write(PageIndex(3), &stamped(2)).unwrap();
    disk.fail_next_sync(&mut Dice(1));
    assert!(delta.flush().is_err());
    let poisoned = delta.flush().unwrap_err().to_string();
    assert!(poisoned.contains("read-only since an fsync failed"), "{poisoned}");
    assert!(delta.write(PageIndex(4), &stamped(3)).is_err());
    drop(delta);
    let delta = reopen(&disk.crash(&mut Dice(1))).unwrap();
    assert_eq!(read_page(&delta, 3), Ok(Content::Stamp(1)));
}

#[test]
fn damage_in_the_middle_of_the_log_is_refused_and_named() {
    let disk = SimulatedDisk::new();
    let layer = Layer::create(disk.dir(), &identity(), LayerId([2; 16])).unwrap();
    let delta = Delta::new(vec![Arc::new(layer)]);
    for page in 0..5 {
        delta.write(PageIndex(page * 2), &stamped(page)).unwrap();
        delta.flush().unwrap();
    }
    drop(delta);
    disk.flip("map", 128 + 48 + 30, 3);
    let error = reopen(&disk).err().expect("damage must be refused").to_string();
    assert_eq!(
        error,
        "simulated/map is damaged at byte 176: a frame is damaged, and later commits follow it"
    );
}

#[test]
fn a_delta_of_another_base_volume_or_size_is_refused() {
    let disk = SimulatedDisk::new();
    Layer::create(disk.dir(), &identity(), LayerId([2; 16])).unwrap();
    let open = |identity: &Identity| Layer::open(disk.dir(), identity).err().map(|error| error.to_string());
    assert_eq!(open(&identity()), None);
    let other = CommitId::of(b"another");
    assert_eq!(
        open(&Identity { base: other, ..identity() }).unwrap(),
        format!("simulated/map is a delta of commit {}, not of {other}", identity().base)
    );
    assert!(open(&Identity { volume: VolumeId([9; 16]), ..identity() }).unwrap().contains("volume id"));
    assert!(open(&Identity { device_size: ByteLen(4096), ..identity() }).unwrap().contains("device size"));
}

#[test]
fn overwriting_for_ever_reuses_slots() {
    let disk = SimulatedDisk::new();
    let layer = Layer::create(disk.dir(), &identity(), LayerId([2; 16])).unwrap();
    let delta = Delta::new(vec![Arc::new(layer)]);
    let mut dice = Dice(7);
    for round in 0..20_000 {
        delta.write(PageIndex(dice.below(1000)), &stamped(round)).unwrap();
        if round % 50 == 0 {
            delta.flush().unwrap();
        }
    }
    let bound = 2 * 1000 * PAGE;
    assert!(disk.file_len("data") < bound, "{} bytes for 1000 pages", disk.file_len("data"));
}

#[test]
fn a_reader_keeps_its_bytes_while_others_overwrite() {
    let disk = SimulatedDisk::new();
    let layer = Layer::create(disk.dir(), &identity(), LayerId([2; 16])).unwrap();
    let delta = Delta::new(vec![Arc::new(layer)]);
    delta.write(PageIndex(0), &stamped(1)).unwrap();
    delta.flush().unwrap();
    let run = delta.run(PageIndex(0), 1);
    for stamp in 2..500 {
        delta.write(PageIndex(0), &stamped(stamp)).unwrap();
        delta.write(PageIndex(stamp), &stamped(stamp)).unwrap();
        delta.flush().unwrap();
    }
    let mut bytes = vec![0; PAGE];
    delta.read(&run, 0, &mut bytes).unwrap();
    assert!(bytes == stamped(1), "the slot was used again under a reader");
}

#[test]
fn a_lower_layer_shows_through_and_a_zero_hides_it() {
    let (lower_disk, upper_disk) = (SimulatedDisk::new(), SimulatedDisk::new());
    let lower = Layer::create(lower_disk.dir(), &identity(), LayerId([2; 16])).unwrap();
    let lower_delta = Delta::new(vec![Arc::new(lower)]);
    (0..10).for_each(|page| lower_delta.write(PageIndex(page), &stamped(page + 1)).unwrap());
    lower_delta.flush().unwrap();
    drop(lower_delta);
    let lower = Arc::new(Layer::open(lower_disk.dir(), &identity()).unwrap());
    let upper = Arc::new(Layer::create(upper_disk.dir(), &identity(), LayerId([3; 16])).unwrap());
    let delta = Delta::new(vec![lower, upper]);
    delta.zero(PageIndex(2), 2).unwrap();
    delta.write(PageIndex(4), &stamped(100)).unwrap();
    let found: Vec<_> = (0..12).map(|page| read_page(&delta, page).unwrap()).collect();
    use Content::{Base, Stamp, Zero};
    assert_eq!(
        found,
        [
            Stamp(1),
            Stamp(2),
            Zero,
            Zero,
            Stamp(100),
            Stamp(6),
            Stamp(7),
            Stamp(8),
            Stamp(9),
            Stamp(10),
            Base,
            Base
        ]
    );
}
