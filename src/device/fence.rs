//! Fences: writes of a connection that is gone must not land on top of newer ones.
//!
//! The kernel re-sends a write over another socket when one dies. If the first copy were still under way here, it could execute after its
//! replacement and after newer writes to the same place. So every write enters its connection's fence for the moment in which it changes the
//! delta, and whoever finds a connection dead closes its fence before he executes anything of his own.
//! Invariant: after [`Fence::close`] returns, nothing that entered is still running and nothing enters again.

use parking_lot::{RwLock, RwLockReadGuard};

/// The gate of one connection.
#[derive(Debug, Default)]
pub struct Fence {
    closed: RwLock<bool>,
}

/// Held while a write changes the delta.
pub struct Passage<'a>(#[expect(dead_code, reason = "held for its lock")] RwLockReadGuard<'a, bool>);

impl Fence {
    /// An open one.
    pub fn new() -> Fence {
        Fence::default()
    }

    /// Lets a write through, unless the fence is closed.
    #[inline]
    pub fn enter(&self) -> Option<Passage<'_>> {
        let closed = self.closed.read();
        if *closed { None } else { Some(Passage(closed)) }
    }

    /// Closes it, once what is inside has left. Blocks for as long as one write to the delta takes.
    pub fn close(&self) {
        *self.closed.write() = true;
    }

    /// Whether it is closed.
    pub fn is_closed(&self) -> bool {
        *self.closed.read()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    #[test]
    fn closing_waits_for_who_is_inside_and_lets_nobody_in_after() {
        let fence = Arc::new(Fence::new());
        let left = Arc::new(AtomicBool::new(false));
        let (entered, wait_entered) = std::sync::mpsc::channel();
        let writer = {
            let (fence, left) = (fence.clone(), left.clone());
            std::thread::spawn(move || {
                let passage = fence.enter().unwrap();
                entered.send(()).unwrap();
                std::thread::sleep(Duration::from_millis(50));
                left.store(true, Ordering::SeqCst);
                drop(passage);
            })
        };
        wait_entered.recv().unwrap();
        fence.close();
        assert!(left.load(Ordering::SeqCst), "closed while a write was inside");
        assert!(fence.enter().is_none());
        writer.join().unwrap();
    }
}
