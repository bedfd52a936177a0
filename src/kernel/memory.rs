//! This process while memory is short: who serves a kernel device must not wait for memory that only its own writes can free.
//!
//! Enters: the start of the process. Leaves: the process, held in memory and known to the kernel as one that writeback goes through. Invariant: what is mapped from files for
//! the cache's sake is not held: the kernel may take it back.

use std::io;

use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::{Resource, Rlimit, configure_io_flusher_behavior, getrlimit, setrlimit};

/// What of it could not be had.
#[derive(Debug, Default)]
pub struct Missing {
    /// It may be swapped out, for this reason.
    pub lock: Option<io::Error>,
    /// Its memory may be made free by writes that it must serve, for this reason.
    pub flusher: Option<io::Error>,
}

/// Holds this process in memory, what it will allocate included, and marks it as an I/O flusher (PR_SET_IO_FLUSHER): its allocations start no writeback, and its writes
/// are not held up for the sake of others'. Threads inherit the mark from who starts them, so this comes first. Needs CAP_SYS_RESOURCE and CAP_IPC_LOCK.
pub fn hold() -> Missing {
    let flusher = configure_io_flusher_behavior(true).err().map(io::Error::from);
    Missing { lock: lock().err().map(io::Error::from), flusher }
}

fn lock() -> rustix::io::Result<()> {
    // With a limit, an allocation past it would fail.
    let unlimited = Rlimit { current: None, maximum: None };
    if getrlimit(Resource::Memlock) != unlimited {
        setrlimit(Resource::Memlock, unlimited)?;
    }
    // The program itself now; of what comes later, what is used of it.
    mlockall(MlockAllFlags::CURRENT)?;
    mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT)
}
