//! The bound of the write queue, in bytes of chunks that are in memory on their way to the disk.
//!
//! Invariant: what was entered and not left is at most the bound. Entering never waits (a chunk that finds no room is
//! served and not kept); those who can wait do so before they fetch.

use std::sync::Arc;

use tokio::sync::watch;

/// The queue's books. Cheap to clone.
#[derive(Clone)]
pub(super) struct Queue {
    used: Arc<watch::Sender<usize>>,
    bound: usize,
}

/// Room taken in the queue; given back when dropped.
pub(super) struct Room {
    queue: Queue,
    bytes: usize,
}

impl Queue {
    pub(super) fn new(bound: usize) -> Queue {
        Queue { used: Arc::new(watch::Sender::new(0)), bound }
    }

    /// Takes room for `bytes`, if there is.
    pub(super) fn enter(&self, bytes: usize) -> Option<Room> {
        let entered = self.used.send_if_modified(|used| {
            let fits = used.checked_add(bytes).is_some_and(|sum| sum <= self.bound);
            if fits {
                *used += bytes;
            }
            fits
        });
        entered.then(|| Room { queue: self.clone(), bytes })
    }

    /// Waits until at most `bytes` are queued.
    pub(super) async fn falls_to(&self, bytes: usize) {
        // An error would mean that the sender is gone; self holds it.
        let _ = self.used.subscribe().wait_for(|used| *used <= bytes).await;
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.queue.used.send_modify(|used| *used -= self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_full_queue_takes_no_more_and_tells_when_it_has_room_again() {
        let queue = Queue::new(100);
        let first = queue.enter(60).unwrap();
        let second = queue.enter(40).unwrap();
        assert!(queue.enter(1).is_none());
        let waiter = {
            let queue = queue.clone();
            tokio::spawn(async move { queue.falls_to(50).await })
        };
        tokio::task::yield_now().await;
        drop(second);
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        // One who waits takes nothing away from those who enter.
        let third = queue.enter(40).unwrap();
        drop(first);
        waiter.await.unwrap();
        drop(third);
        queue.falls_to(0).await;
    }
}
