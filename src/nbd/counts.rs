//! What an export counts: requests, failures, bytes and times, by command.
//!
//! Enters: each request that was answered. Leaves: sums since the export was opened. Invariant: counting takes no lock and orders nothing; what was done at once is
//! counted together, with one look at the clock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nbd_proto::{Command, Request};

use super::reply::Outcome;

/// Where the classes of times end; the last class has no end.
pub const TIMES: [Duration; 12] = [
    Duration::from_micros(100),
    Duration::from_micros(300),
    Duration::from_millis(1),
    Duration::from_millis(3),
    Duration::from_millis(10),
    Duration::from_millis(30),
    Duration::from_millis(100),
    Duration::from_millis(300),
    Duration::from_secs(1),
    Duration::from_secs(3),
    Duration::from_secs(10),
    Duration::from_secs(30),
];
/// Commands that are counted, by the names they are counted under.
const COMMANDS: [&str; 7] = ["read", "write", "flush", "trim", "write_zeroes", "cache", "block_status"];

/// Where a command is counted. A disconnect has no answer, and an unknown command no name.
#[inline]
fn place_of(command: Command) -> Option<usize> {
    match command {
        Command::Read => Some(0),
        Command::Write => Some(1),
        Command::Flush => Some(2),
        Command::Trim => Some(3),
        Command::WriteZeroes => Some(4),
        Command::Cache => Some(5),
        Command::BlockStatus => Some(6),
        Command::Disc | Command::Unknown(_) => None,
    }
}

/// What one command came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandCount {
    /// Its name.
    pub command: &'static str,
    /// Requests that were answered, failed ones included.
    pub requests: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Bytes that those which did not fail were about.
    pub bytes: u64,
    /// The time of all of them together, each from when it was received whole until its answer was sent or waits for the client to take it.
    pub took: Duration,
    /// How many took how long: up to each of [`TIMES`], and longer.
    pub times: [u64; TIMES.len() + 1],
}

/// The counters.
#[derive(Debug, Default)]
pub struct Counts {
    commands: [Counter; COMMANDS.len()],
}

#[derive(Debug, Default)]
struct Counter {
    failed: AtomicU64,
    bytes: AtomicU64,
    took_ns: AtomicU64,
    times: [AtomicU64; TIMES.len() + 1],
}

/// Requests that were answered at about the same time.
#[derive(Debug, Default)]
pub(super) struct Batch {
    any: bool,
    commands: [Few; COMMANDS.len()],
}

#[derive(Clone, Copy, Debug, Default)]
struct Few {
    requests: u64,
    failed: u64,
    bytes: u64,
}

impl Batch {
    /// Adds a request.
    #[inline]
    pub(super) fn add(&mut self, request: &Request, outcome: &Outcome) {
        let Some(place) = place_of(request.command) else { return };
        let few = &mut self.commands[place];
        match outcome {
            // Nobody was answered.
            Outcome::Dropped => return,
            Outcome::Failed(..) | Outcome::FailedAt(..) => few.failed += 1,
            Outcome::Done | Outcome::Read(_) | Outcome::Status(_) => few.bytes += request.length,
        }
        few.requests += 1;
        self.any = true;
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        !self.any
    }
}

impl Counts {
    /// Counts what is in a batch, each of which took so long, and empties it.
    pub(super) fn add(&self, batch: &mut Batch, took: Duration) {
        let class = TIMES.iter().position(|end| took <= *end).unwrap_or(TIMES.len());
        for (counter, few) in self.commands.iter().zip(&batch.commands).filter(|(_, few)| few.requests > 0) {
            let add = |to: &AtomicU64, more: u64| {
                if more > 0 {
                    to.fetch_add(more, Ordering::Relaxed);
                }
            };
            add(&counter.times[class], few.requests);
            add(&counter.took_ns, few.requests * took.as_nanos() as u64);
            add(&counter.failed, few.failed);
            add(&counter.bytes, few.bytes);
        }
        *batch = Batch::default();
    }

    /// Counts one request.
    pub(super) fn add_one(&self, request: &Request, outcome: &Outcome, took: Duration) {
        let mut batch = Batch::default();
        batch.add(request, outcome);
        self.add(&mut batch, took);
    }

    /// The sums of each command that was ever answered.
    pub fn all(&self) -> Vec<CommandCount> {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let of = |(command, counter): (&&'static str, &Counter)| {
            let times = std::array::from_fn(|class| value(&counter.times[class]));
            CommandCount {
                command,
                requests: times.iter().sum(),
                failed: value(&counter.failed),
                bytes: value(&counter.bytes),
                took: Duration::from_nanos(value(&counter.took_ns)),
                times,
            }
        };
        COMMANDS.iter().zip(&self.commands).map(of).filter(|count| count.requests > 0).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn request(command: Command, length: u64) -> Request {
        let flags = nbd_proto::CommandFlags::NONE;
        Request { cookie: 0, offset: 0, length, payload: 0, flags, command }
    }

    #[test]
    fn requests_are_counted_by_command_in_the_class_of_their_time() {
        let (counts, mut batch) = (Counts::default(), Batch::default());
        assert!(batch.is_empty() && counts.all().is_empty());
        batch.add(&request(Command::Read, 4096), &Outcome::Read(Vec::new()));
        batch.add(&request(Command::Read, 8192), &Outcome::Failed(nbd_proto::Errno::Io, String::new()));
        batch.add(&request(Command::Disc, 0), &Outcome::Done);
        batch.add(&request(Command::Write, 512), &Outcome::Dropped);
        counts.add(&mut batch, Duration::from_micros(100));
        assert!(batch.is_empty());
        batch.add(&request(Command::Read, 1), &Outcome::Read(Vec::new()));
        counts.add(&mut batch, Duration::from_secs(31));
        let all = counts.all();
        let [reads] = &all[..] else { panic!("{all:?}") };
        assert_eq!((reads.command, reads.requests, reads.failed, reads.bytes), ("read", 3, 1, 4097));
        assert_eq!(reads.took, Duration::from_secs(31) + 2 * Duration::from_micros(100));
        assert_eq!((reads.times[0], reads.times[12], reads.times.iter().sum::<u64>()), (2, 1, 3));
    }
}
