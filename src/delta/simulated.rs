//! A disk in memory that forgets what was not synced: for tests of crashes.
//!
//! Enters: file operations. Leaves, after [`SimulatedDisk::crash`]: a disk as a power cut may have left it: for each 512-byte
//! sector the synced content or that of any write since, for each file a length of that time, and a prefix of the directory operations
//! since the directory's last sync. Invariant: what was synced is there. A sync that fails gives up on what it should have written, as
//! Linux does: programs still see it, no later sync writes it.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;

use super::disk::{Dir, File};

const SECTOR: usize = 512;
/// The kernel copies what is written by pages.
const PAGE: usize = 4096;

/// A small splitmix64 generator: the same seed gives the same crash.
#[derive(Clone, Debug)]
pub struct Dice(pub u64);

impl Dice {
    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

#[derive(Clone, Default)]
struct Inode {
    /// What programs see.
    current: Vec<u8>,
    /// What a crash can't take.
    durable: Vec<u8>,
    /// Writes since the last sync: (offset, bytes), in order.
    unsynced: Vec<(usize, Vec<u8>)>,
    /// Lengths since the last sync.
    lengths: Vec<usize>,
}

#[derive(Clone)]
enum DirOp {
    Link(String, usize),
    Rename(String, String),
    Remove(String),
}

fn apply(names: &mut HashMap<String, usize>, op: &DirOp) {
    match op {
        DirOp::Link(name, inode) => {
            names.insert(name.clone(), *inode);
        }
        DirOp::Rename(from, to) => {
            if let Some(inode) = names.remove(from) {
                names.insert(to.clone(), inode);
            }
        }
        DirOp::Remove(name) => {
            names.remove(name);
        }
    }
}

#[derive(Default)]
struct State {
    inodes: Vec<Inode>,
    names: HashMap<String, usize>,
    durable_names: HashMap<String, usize>,
    unsynced_ops: Vec<DirOp>,
    /// Syncs left until the power goes.
    syncs_left: Option<u64>,
    /// Bytes that may still be written before the disk is full.
    space_left: Option<u64>,
    fail_next_sync: Option<Dice>,
    kill_at_next_sync: bool,
    /// Writes left until one fails.
    writes_to_failure: Option<u64>,
    /// Writes left until the program is killed in the middle of one.
    writes_left: Option<u64>,
    /// Handles of an earlier one belong to a program that was killed.
    program: u64,
    /// Counts the runs of the kernel.
    boot: u64,
    off: bool,
    syncs: u64,
}

impl State {
    fn check_power(&self, program: u64) -> io::Result<()> {
        if self.off {
            Err(io::Error::other("the power is off"))
        } else if program != self.program {
            Err(io::Error::other("killed"))
        } else {
            Ok(())
        }
    }

    /// Counts a sync; the power may go just before it takes effect. `Some` where it is to fail.
    fn before_sync(&mut self, program: u64) -> io::Result<Option<Dice>> {
        self.check_power(program)?;
        self.syncs += 1;
        if let Some(left) = &mut self.syncs_left {
            if *left == 0 {
                self.off = true;
            } else {
                *left -= 1;
            }
        }
        if self.off {
            return self.check_power(program).map(|()| None);
        }
        let fails = self.fail_next_sync.take();
        if std::mem::take(&mut self.kill_at_next_sync) {
            self.program += 1;
            if fails.is_none() {
                return self.check_power(program).map(|()| None);
            }
        }
        Ok(fails)
    }
}

/// The disk; clones share it.
#[derive(Clone, Default)]
pub struct SimulatedDisk {
    state: Arc<Mutex<State>>,
    program: u64,
}

impl SimulatedDisk {
    /// An empty disk.
    pub fn new() -> SimulatedDisk {
        SimulatedDisk::default()
    }

    /// The disk's one directory, as a program started now sees it.
    pub fn dir(&self) -> Box<dyn Dir> {
        let program = self.state.lock().program;
        Box::new(SimulatedDisk { state: self.state.clone(), program })
    }

    /// Lets `syncs` more syncs through; at the next one the power goes, before it takes effect.
    pub fn cut_power_after(&self, syncs: u64) {
        self.state.lock().syncs_left = Some(syncs);
    }

    /// Lets `bytes` more bytes through before writes fail with ENOSPC; `None` for no limit.
    pub fn limit_space(&self, bytes: Option<u64>) {
        self.state.lock().space_left = bytes;
    }

    /// Makes the next sync fail with EIO after it wrote some of what it should have written, and forget the rest.
    pub fn fail_next_sync(&self, dice: &mut Dice) {
        self.state.lock().fail_next_sync = Some(Dice(dice.below(u64::MAX)));
    }

    /// Kills the program just before its next sync takes effect: whatever it has open fails from then on. With `lose`, that sync failed too, as
    /// [`SimulatedDisk::fail_next_sync`] has it, and nobody was left to be told.
    pub fn kill_at_next_sync(&self, lose: Option<&mut Dice>) {
        let mut state = self.state.lock();
        state.kill_at_next_sync = true;
        state.fail_next_sync = lose.map(|dice| Dice(dice.below(u64::MAX)));
    }

    /// Lets `writes` more writes through; the next one fails with EIO, and writes nothing.
    pub fn fail_write_after(&self, writes: u64) {
        self.state.lock().writes_to_failure = Some(writes);
    }

    /// Lets `writes` more writes through; in the middle of the next one the program is killed, somewhere between two pages.
    pub fn kill_at_write(&self, writes: u64) {
        self.state.lock().writes_left = Some(writes);
    }

    /// Kills the program: whatever it has open fails from now on.
    pub fn kill(&self) {
        let mut state = self.state.lock();
        state.program += 1;
        state.writes_left = None;
    }

    /// Whether the power has gone.
    pub fn is_off(&self) -> bool {
        self.state.lock().off
    }

    /// Syncs so far.
    pub fn syncs(&self) -> u64 {
        self.state.lock().syncs
    }

    /// Flips a bit of a file, durably.
    pub fn flip(&self, name: &str, byte: usize, bit: u8) {
        let mut state = self.state.lock();
        let inode = state.names[name];
        state.inodes[inode].current[byte] ^= 1 << bit;
        state.inodes[inode].durable[byte] ^= 1 << bit;
    }

    /// Length of a file.
    pub fn file_len(&self, name: &str) -> usize {
        let state = self.state.lock();
        state.inodes[state.names[name]].current.len()
    }

    /// Cuts the power now and gives one of the disks that may be found afterwards.
    pub fn crash(&self, dice: &mut Dice) -> SimulatedDisk {
        self.gone(dice, 1)
    }

    /// Cuts the disk off now, and gives one of those that may be found when it is back under the same run of the kernel.
    pub fn pull_out(&self, dice: &mut Dice) -> SimulatedDisk {
        self.gone(dice, 0)
    }

    fn gone(&self, dice: &mut Dice, boots: u64) -> SimulatedDisk {
        let mut state = self.state.lock();
        state.off = true;
        let mut names = state.durable_names.clone();
        let kept = dice.below(state.unsynced_ops.len() as u64 + 1) as usize;
        for op in &state.unsynced_ops[..kept] {
            apply(&mut names, op);
        }
        let inodes = state
            .inodes
            .iter()
            .map(|inode| {
                let content = torn(inode, dice);
                Inode { current: content.clone(), durable: content, ..Inode::default() }
            })
            .collect();
        let boot = state.boot + boots;
        let state = State { inodes, durable_names: names.clone(), names, boot, ..State::default() };
        SimulatedDisk { state: Arc::new(Mutex::new(state)), program: 0 }
    }
}

fn torn(inode: &Inode, dice: &mut Dice) -> Vec<u8> {
    let mut content = inode.durable.clone();
    let longest = inode.lengths.iter().copied().max().unwrap_or(0).max(content.len());
    let choice = dice.below(inode.lengths.len() as u64 + 1) as usize;
    let len = if choice == 0 { content.len() } else { inode.lengths[choice - 1] };
    content.resize(longest, 0);
    write_some(&mut content, &inode.unsynced, dice);
    content.truncate(len);
    content
}

/// Does to `content` what some of `writes` do, in one of three moods: all are lost, all are there, or sector by sector.
fn write_some(content: &mut [u8], writes: &[(usize, Vec<u8>)], dice: &mut Dice) {
    let mood = dice.below(3);
    for (at, bytes) in writes {
        let mut done = 0;
        while done < bytes.len() {
            let sector_end = ((at + done) / SECTOR + 1) * SECTOR;
            let stop = bytes.len().min(sector_end - at);
            if mood == 1 || mood == 2 && dice.below(2) == 0 {
                overlay(content, at + done, &bytes[done..stop]);
            }
            done = stop;
        }
    }
}

/// Writes what lies inside `content`: the rest was cut off by a later `set_len`.
fn overlay(content: &mut [u8], at: usize, bytes: &[u8]) {
    let end = content.len().min(at + bytes.len());
    if at < end {
        content[at..end].copy_from_slice(&bytes[..end - at]);
    }
}

impl Dir for SimulatedDisk {
    fn create(&self, name: &str) -> io::Result<Box<dyn File>> {
        let mut state = self.state.lock();
        state.check_power(self.program)?;
        // A new inode even where the name was taken: what truncation leaves after a crash is then never the old content under
        // the new name, which journalling file systems promise too.
        let inode = state.inodes.len();
        state.inodes.push(Inode::default());
        let op = DirOp::Link(name.to_owned(), inode);
        apply(&mut state.names, &op);
        state.unsynced_ops.push(op);
        Ok(Box::new(SimulatedFile { disk: self.clone(), inode }))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn File>> {
        let state = self.state.lock();
        state.check_power(self.program)?;
        let inode = *state.names.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(SimulatedFile { disk: self.clone(), inode }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.state.lock();
        state.check_power(self.program)?;
        let op = DirOp::Rename(from.to_owned(), to.to_owned());
        apply(&mut state.names, &op);
        state.unsynced_ops.push(op);
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = self.state.lock();
        state.check_power(self.program)?;
        let op = DirOp::Remove(name.to_owned());
        apply(&mut state.names, &op);
        state.unsynced_ops.push(op);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        if state.before_sync(self.program)?.is_some() {
            // A directory is the journal's, which tries again or stops for good.
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        state.durable_names = state.names.clone();
        state.unsynced_ops.clear();
        Ok(())
    }

    fn boot(&self) -> [u8; 16] {
        u128::from(self.state.lock().boot).to_le_bytes()
    }

    fn describe(&self, name: &str) -> PathBuf {
        PathBuf::from("simulated").join(name)
    }
}

struct SimulatedFile {
    disk: SimulatedDisk,
    inode: usize,
}

impl File for SimulatedFile {
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        let state = self.disk.state.lock();
        state.check_power(self.disk.program)?;
        let content = &state.inodes[self.inode].current;
        let found = content.get(at as usize..at as usize + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(found);
        Ok(())
    }

    fn read_at_nowait(&self, buf: &mut [u8], at: u64) -> io::Result<bool> {
        self.read_at(buf, at).map(|()| true)
    }

    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        let mut state = self.disk.state.lock();
        state.check_power(self.disk.program)?;
        match &mut state.writes_to_failure {
            Some(0) => {
                state.writes_to_failure = None;
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            Some(left) => *left -= 1,
            None => {}
        }
        let mut room = bytes.len();
        match &mut state.writes_left {
            Some(0) => {
                state.writes_left = None;
                state.program += 1;
                room = room / 2 / PAGE * PAGE;
            }
            Some(left) => *left -= 1,
            None => {}
        }
        if let Some(left) = &mut state.space_left {
            room = room.min(*left as usize);
            *left -= room as u64;
        }
        let inode = &mut state.inodes[self.inode];
        let end = at as usize + room;
        if inode.current.len() < end {
            inode.current.resize(end, 0);
            inode.lengths.push(end);
        }
        inode.current[at as usize..end].copy_from_slice(&bytes[..room]);
        inode.unsynced.push((at as usize, bytes[..room].to_vec()));
        if room < bytes.len() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.disk.state.lock();
        let failing = state.before_sync(self.disk.program)?;
        let inode = &mut state.inodes[self.inode];
        let unsynced = std::mem::take(&mut inode.unsynced);
        inode.lengths.clear();
        // The length is the journal's, and is kept even where the bytes are not.
        inode.durable.resize(inode.current.len(), 0);
        if let Some(mut dice) = failing {
            write_some(&mut inode.durable, &unsynced, &mut dice);
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        for (at, bytes) in unsynced {
            overlay(&mut inode.durable, at, &bytes);
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        let state = self.disk.state.lock();
        state.check_power(self.disk.program)?;
        Ok(state.inodes[self.inode].current.len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.disk.state.lock();
        state.check_power(self.disk.program)?;
        let inode = &mut state.inodes[self.inode];
        let old = inode.current.len();
        inode.current.resize(len as usize, 0);
        inode.lengths.push(len as usize);
        if (len as usize) < old {
            // What was cut off must not come back when the file grows again.
            inode.unsynced.push((len as usize, vec![0; old - len as usize]));
        }
        Ok(())
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        let mut state = self.disk.state.lock();
        state.check_power(self.disk.program)?;
        let inode = &mut state.inodes[self.inode];
        let end = (at + len).min(inode.current.len() as u64) as usize;
        if (at as usize) < end {
            inode.current[at as usize..end].fill(0);
            inode.unsynced.push((at as usize, vec![0; end - at as usize]));
        }
        Ok(())
    }
}
