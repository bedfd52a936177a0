//! Crashes of a delta that need more than one failure, or two threads, to do harm.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

use std::sync::Arc;

use horcrux::delta::simulated::{Dice, SimulatedDisk};
use horcrux::delta::{Delta, DeltaError, Identity, Layer, LayerId, Source, VolumeId};
use horcrux::format::CommitId;
use horcrux::units::{ByteLen, PAGE_SIZE, PageIndex};

const PAGE: usize = PAGE_SIZE as usize;

fn identity() -> Identity {
    Identity {
        base: CommitId::of(b"the base"),
        volume: VolumeId([1; 16]),
        device_size: ByteLen(4096 * PAGE_SIZE),
    }
}

fn create(dir: Box<dyn horcrux::delta::disk::Dir>) -> Delta {
    Delta::new(vec![Arc::new(Layer::create(dir, &identity(), LayerId([2; 16])).unwrap())])
}

fn open(disk: &SimulatedDisk) -> Delta {
    Delta::new(vec![Arc::new(Layer::open(disk.dir(), &identity()).unwrap())])
}

/// The first byte of a page of equal bytes; 0 for a page that is zeros.
fn read(delta: &Delta, page: u64) -> u8 {
    let run = delta.run(PageIndex(page), 1);
    match run.source {
        Source::Base => panic!("page {page} was written"),
        Source::Zero => 0,
        Source::Data { .. } => {
            let mut bytes = vec![0; PAGE];
            delta.read(&run, 0, &mut bytes).unwrap();
            assert!(bytes.iter().all(|byte| *byte == bytes[0]), "page {page} is torn");
            bytes[0]
        }
    }
}

/// A server is killed after it wrote a commit and before it synced it. The next one finds the commit, because the kernel still has it; then the power goes.
#[test]
fn a_commit_that_only_the_page_cache_has_is_made_durable_before_its_slots_are_used_again() {
    for seed in 0..200 {
        let disk = SimulatedDisk::new();
        let delta = create(disk.dir());
        delta.write(PageIndex(0), &[1; PAGE]).unwrap();
        delta.flush().unwrap();
        delta.zero(PageIndex(0), 1).unwrap();
        // The frame is in the file, the sync does not happen: as with a kill between the two.
        disk.fail_next_sync();
        delta.flush().unwrap_err();
        drop(delta);

        let delta = open(&disk);
        assert_eq!(read(&delta, 0), 0);
        delta.write(PageIndex(1), &[2; PAGE]).unwrap();
        drop(delta);
        let disk = disk.crash(&mut Dice(seed));
        let found = read(&open(&disk), 0);
        assert!(found <= 1, "seed {seed}: page 0 reads as page 1 did");
    }
}

/// With the disk full, trims go on being acknowledged while no commit succeeds.
#[test]
fn records_that_no_commit_takes_are_bounded_however_often_a_flush_fails() {
    let disk = SimulatedDisk::new();
    let delta = create(disk.dir());
    disk.limit_space(Some(0));
    let mut refused = false;
    for round in 0..200 {
        for page in 0..50_000u64 {
            // Every other page, so that no two records join.
            match delta.zero(PageIndex((2 * page + round % 2) % 4096), 1) {
                Ok(()) => {}
                Err(DeltaError::Full { .. }) => refused = true,
                Err(other) => panic!("{other}"),
            }
        }
        if refused {
            break;
        }
        assert!(matches!(delta.flush(), Err(DeltaError::Full { .. })), "round {round}");
    }
    assert!(refused, "10 million records were taken");
    disk.limit_space(None);
    delta.flush().unwrap();
    delta.zero(PageIndex(0), 1).unwrap();
}
