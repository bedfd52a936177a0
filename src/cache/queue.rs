//! The bound of the write queue, in bytes of chunks that are on their way here or in memory on their way to the disk.
//!
//! Invariant: what was entered and not left is at most the bound. Entering never waits (a chunk that finds no room is
//! served and not kept); those who can wait take their room before they fetch, and what they bring is entered in it.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;

/// Room is waited for as long as any is given back within this time. Where none is, it is held by fetches from
/// stores that hang: others go on without, and what they bring is served even if it can't be kept.
const PATIENCE: Duration = Duration::from_secs(5);

/// The queue's books. Cheap to clone.
#[derive(Clone)]
pub(super) struct Queue {
    shared: Arc<Shared>,
}

struct Shared {
    used: watch::Sender<usize>,
    bound: usize,
    patience: Duration,
    /// Held by the one whose turn it is to wait for room: it is given out in the order it was asked for, so that a
    /// large piece is not passed by small ones for ever.
    turn: tokio::sync::Mutex<()>,
    /// When room was last given back, or first waited for.
    moved: Mutex<Option<Instant>>,
}

/// Room taken in the queue, for chunks that are being fetched or are queued; given back when dropped.
#[must_use = "dropping it gives the room back"]
pub struct Room {
    queue: Queue,
    bytes: usize,
}

impl Queue {
    pub(super) fn new(bound: usize) -> Queue {
        Queue::with_patience(bound, PATIENCE)
    }

    fn with_patience(bound: usize, patience: Duration) -> Queue {
        let shared = Shared {
            used: watch::Sender::new(0),
            bound,
            patience,
            turn: tokio::sync::Mutex::new(()),
            moved: Mutex::new(None),
        };
        Queue { shared: Arc::new(shared) }
    }

    /// Takes room for `bytes`, if there is.
    pub(super) fn enter(&self, bytes: usize) -> Option<Room> {
        let entered = self.shared.used.send_if_modified(|used| {
            let fits = used.checked_add(bytes).is_some_and(|sum| sum <= self.shared.bound);
            if fits {
                *used += bytes;
            }
            fits
        });
        entered.then(|| Room { queue: self.clone(), bytes })
    }

    /// Waits for room for `bytes`, but not for more than the whole queue, and not on when nothing moves any more: then
    /// the room is empty.
    pub(super) async fn reserve(&self, bytes: usize) -> Room {
        let bytes = bytes.min(self.shared.bound);
        let _turn = self.shared.turn.lock().await;
        let mut used = self.shared.used.subscribe();
        loop {
            if let Some(room) = self.enter(bytes) {
                *self.shared.moved.lock() = None;
                return room;
            }
            let give_up = *self.shared.moved.lock().get_or_insert_with(Instant::now) + self.shared.patience;
            // The error of `changed` would mean that the sender is gone; self holds it.
            if tokio::time::timeout_at(give_up, used.changed()).await.is_err() {
                return Room { queue: self.clone(), bytes: 0 };
            }
        }
    }

    /// Waits until nothing is queued or on its way.
    pub(super) async fn empties(&self) {
        // An error would mean that the sender is gone; self holds it.
        let _ = self.shared.used.subscribe().wait_for(|used| *used == 0).await;
    }
}

impl Room {
    /// Takes a part of the room for a chunk; what is not reserved is asked of the queue.
    pub(super) fn take(&mut self, bytes: usize) -> Option<Room> {
        if bytes > self.bytes {
            return self.queue.enter(bytes);
        }
        self.bytes -= bytes;
        Some(Room { queue: self.queue.clone(), bytes })
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if self.bytes > 0 {
            let shared = &self.queue.shared;
            if let Some(moved) = &mut *shared.moved.lock() {
                *moved = Instant::now();
            }
            shared.used.send_modify(|used| *used -= self.bytes);
        }
    }
}

impl std::fmt::Debug for Room {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Room({} bytes)", self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used(queue: &Queue) -> usize {
        *queue.shared.used.borrow()
    }

    #[tokio::test]
    async fn a_full_queue_takes_no_more_and_those_who_wait_get_their_room_in_turn() {
        let queue = Queue::new(100);
        let first = queue.enter(60).unwrap();
        let second = queue.enter(40).unwrap();
        assert!(queue.enter(1).is_none());
        let wait_for = |bytes| {
            let queue = queue.clone();
            tokio::spawn(async move { queue.reserve(bytes).await })
        };
        let large = wait_for(70);
        tokio::task::yield_now().await;
        let small = wait_for(10);
        drop(second);
        tokio::task::yield_now().await;
        assert!(!large.is_finished() && !small.is_finished(), "the small one waits behind the large one");
        drop(first);
        let (large, small) = (large.await.unwrap(), small.await.unwrap());
        assert_eq!(used(&queue), 80);
        drop((large, small));
        queue.empties().await;
    }

    #[tokio::test]
    async fn a_chunk_takes_its_room_out_of_what_was_reserved() {
        let queue = Queue::new(100);
        let mut room = queue.reserve(60).await;
        let chunk = room.take(50).unwrap();
        assert_eq!(used(&queue), 60);
        let unforeseen = room.take(20).unwrap();
        assert_eq!(used(&queue), 80);
        assert!(room.take(30).is_none());
        drop(room);
        assert_eq!(used(&queue), 70);
        drop((chunk, unforeseen));
        assert_eq!(used(&queue), 0);
        assert_eq!(queue.reserve(1000).await.bytes, 100, "never more than there can be");
    }

    #[tokio::test]
    async fn room_that_never_comes_back_holds_nobody_up_for_long_and_room_that_comes_slowly_is_waited_for() {
        let patience = Duration::from_millis(200);
        let queue = Queue::with_patience(100, patience);
        let _hung = queue.enter(60).unwrap();
        let slow: Vec<Room> = (0..40).map(|_| queue.enter(1).unwrap()).collect();
        let start = Instant::now();
        let giver = tokio::spawn(async move {
            for room in slow {
                tokio::time::sleep(patience / 10).await;
                drop(room);
            }
        });
        assert_eq!(queue.reserve(40).await.bytes, 40, "it came in time, piece by piece");
        assert!(start.elapsed() > 2 * patience);
        giver.await.unwrap();

        let _all = queue.enter(40);
        let start = Instant::now();
        let waiters: Vec<_> = (0..10)
            .map(|_| {
                let queue = queue.clone();
                tokio::spawn(async move { queue.reserve(50).await.bytes })
            })
            .collect();
        for waiter in waiters {
            assert_eq!(waiter.await.unwrap(), 0);
        }
        assert!(start.elapsed() < 4 * patience, "all of them together");
    }
}
