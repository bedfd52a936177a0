//! Exports: what clients see of a device.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use nbd_proto::{BlockSizes, ExportInfo, TransmissionFlags};
use tokio_util::sync::CancellationToken;

use crate::device::{Device, DeviceError};

use super::counts::{CommandCount, Counts};
use super::peers::Peers;

/// The largest read or write, and the largest payload: what every client may rely on.
pub const MAX_PAYLOAD: u32 = 32 << 20;
const BLOCK_SIZES: BlockSizes = match BlockSizes::new(1, 4096, MAX_PAYLOAD) {
    Some(sizes) => sizes,
    None => panic!("the sizes keep the protocol's rules"),
};
/// `base:allocation`, as the protocol has it.
pub const CONTEXT_ALLOCATION: &str = "base:allocation";
/// What the delta holds: bit 0, the range was changed; bit 1, to zeros.
pub const CONTEXT_DIRTY: &str = "x-horcrux:dirty";
/// What can be read without the repository: bit 0.
pub const CONTEXT_CACHED: &str = "x-horcrux:cached";

/// A device under a name.
pub struct Export {
    name: String,
    description: String,
    device: Arc<Device>,
    peers: Arc<Peers>,
    counts: Counts,
    stopping: CancellationToken,
    /// A commit nobody asked for is under way.
    committing: AtomicBool,
    /// The last one failed, and that was logged.
    commit_failed: AtomicBool,
    opened: Instant,
    /// Milliseconds after `opened` of the last failure that was logged, plus one.
    last_failure_ms: AtomicU64,
    unlogged_failures: AtomicU64,
}

impl Export {
    /// A device under a name.
    pub fn new(name: String, description: String, device: Arc<Device>) -> Export {
        Export {
            name,
            description,
            device,
            peers: Arc::default(),
            counts: Counts::default(),
            stopping: CancellationToken::new(),
            committing: AtomicBool::new(false),
            commit_failed: AtomicBool::new(false),
            opened: Instant::now(),
            last_failure_ms: AtomicU64::new(0),
            unlogged_failures: AtomicU64::new(0),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is, for people.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// Its device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// How many connections there are to it.
    pub fn connections(&self) -> usize {
        self.peers.count()
    }

    /// What was answered since it was opened, by command.
    pub fn answered(&self) -> Vec<CommandCount> {
        self.counts.all()
    }

    /// Where answers are counted.
    #[inline]
    pub(super) fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Who is connected to it.
    pub(super) fn peers(&self) -> &Arc<Peers> {
        &self.peers
    }

    /// Cancelled when it is served no more.
    pub(super) fn stopping(&self) -> &CancellationToken {
        &self.stopping
    }

    /// Serves it no more: its connections end after what they have in flight, and none begins.
    pub(super) fn stop(&self) {
        // In this order: who is woken must see why.
        self.stopping.cancel();
        self.peers.wake_all();
    }

    /// The last flush, after the last connection.
    pub(super) async fn flush_at_end(&self) -> Result<(), DeviceError> {
        let device = self.device.clone();
        let flushed = tokio::task::spawn_blocking(move || device.flush()).await;
        // One that panicked flushed nothing either.
        let flushed = flushed.unwrap_or(Err(DeviceError::Stopped));
        if let Err(error) = &flushed {
            tracing::error!(export = %self.name, %error, "the last flush failed");
        }
        flushed
    }

    /// Commits what nobody flushed, if there is any and no such commit is under way.
    pub(super) async fn commit_unflushed(&self) {
        if !self.device.delta().is_some_and(|delta| delta.has_pending())
            || self.committing.swap(true, Ordering::AcqRel)
        {
            return;
        }
        let device = self.device.clone();
        let flushed = tokio::task::spawn_blocking(move || device.flush()).await;
        self.committing.store(false, Ordering::Release);
        match flushed {
            Ok(Err(error)) if !self.commit_failed.swap(true, Ordering::Relaxed) => {
                // Once: the client is told by its own flushes.
                tracing::warn!(export = %self.name, %error, "can't commit");
            }
            Ok(Ok(())) => self.commit_failed.store(false, Ordering::Relaxed),
            _ => {}
        }
    }

    /// What the handshake tells of it.
    pub(super) fn info(&self) -> ExportInfo {
        use TransmissionFlags as Flags;
        // A cache of the kernel's or ours is behind every connection, and a FLUSH on one covers all: that is MULTI_CONN's promise.
        let common = Flags::SEND_FLUSH | Flags::SEND_DF | Flags::CAN_MULTI_CONN | Flags::SEND_CACHE;
        let writing = Flags::SEND_FUA | Flags::SEND_TRIM | Flags::SEND_WRITE_ZEROES | Flags::SEND_FAST_ZERO;
        let own = if self.device.is_read_only() { Flags::READ_ONLY } else { writing };
        ExportInfo {
            name: self.name.clone(),
            description: self.description.clone(),
            size: self.device.size().0,
            flags: common | own | Flags::BLOCK_STAT_PAYLOAD,
            block_sizes: BLOCK_SIZES,
            contexts: [CONTEXT_ALLOCATION, CONTEXT_DIRTY, CONTEXT_CACHED].map(str::to_owned).to_vec(),
        }
    }

    /// Logs a failed request, at most one a second: a disk that is gone fails thousands.
    pub(super) fn log_failure(
        &self,
        command: nbd_proto::Command,
        offset: u64,
        length: u64,
        error: &DeviceError,
    ) {
        let now_ms = self.opened.elapsed().as_millis() as u64 + 1;
        let last_ms = self.last_failure_ms.load(Ordering::Relaxed);
        if last_ms != 0 && now_ms < last_ms + 1000 {
            self.unlogged_failures.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.last_failure_ms.store(now_ms, Ordering::Relaxed);
        let more = self.unlogged_failures.swap(0, Ordering::Relaxed);
        tracing::error!(export = %self.name, ?command, offset, length, more_since = more, %error, "request failed");
    }
}
