//! Single flight: of all who ask for one thing at once, one does the work and all get its answer.
//!
//! Invariant: where the one who works is dropped in mid-work, another of those who wait starts over; nobody waits for nothing, and
//! nothing stays behind in the table.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::OnceCell;

/// What is under way, by key. As many entries as there are callers at most.
pub(super) struct Flights<K, V> {
    table: Mutex<HashMap<K, Arc<OnceCell<V>>>>,
}

struct Seat<'a, K: Eq + Hash, V> {
    flights: &'a Flights<K, V>,
    key: K,
    /// `None` only while dropped.
    cell: Option<Arc<OnceCell<V>>>,
}

impl<K: Eq + Hash, V> Drop for Seat<'_, K, V> {
    fn drop(&mut self) {
        let mut table = self.flights.table.lock();
        // Given up under the lock, so that of two who leave at once the second one sees that it is the last.
        self.cell = None;
        if table.get(&self.key).is_some_and(|cell| Arc::strong_count(cell) == 1) {
            table.remove(&self.key);
        }
    }
}

impl<K: Copy + Eq + Hash, V: Clone> Flights<K, V> {
    pub(super) fn new() -> Flights<K, V> {
        Flights { table: Mutex::default() }
    }

    /// Does `work`, or waits for someone who does it already and drops `work` unpolled.
    pub(super) async fn run(&self, key: K, work: impl Future<Output = V>) -> V {
        let cell = self.table.lock().entry(key).or_default().clone();
        let seat = Seat { flights: self, key, cell: Some(cell) };
        let cell = seat.cell.as_ref().expect("a seat has its cell until it is dropped");
        cell.get_or_init(|| work).await.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn one_works_and_all_get_the_answer() {
        let (flights, done) = (Flights::new(), AtomicU32::new(0));
        let ask = || {
            flights.run(7, async {
                tokio::time::sleep(Duration::from_millis(10)).await;
                done.fetch_add(1, Ordering::Relaxed)
            })
        };
        let answers = futures_util::future::join_all((0..20).map(|_| ask())).await;
        assert_eq!(answers, [0; 20]);
        assert!(flights.table.lock().is_empty());
    }

    #[tokio::test]
    async fn a_worker_that_goes_away_is_replaced_and_nothing_is_left() {
        let flights: Arc<Flights<u32, u32>> = Arc::new(Flights::new());
        let leader = {
            let flights = flights.clone();
            tokio::spawn(async move { flights.run(1, std::future::pending::<u32>()).await })
        };
        tokio::task::yield_now().await;
        let follower = {
            let flights = flights.clone();
            tokio::spawn(async move { flights.run(1, async { 5 }).await })
        };
        tokio::task::yield_now().await;
        leader.abort();
        assert_eq!(follower.await.unwrap(), 5);
        assert!(leader.await.unwrap_err().is_cancelled());
        assert!(flights.table.lock().is_empty());
    }
}
