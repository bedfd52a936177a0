//! How many requests a store takes at once: as many as it answers without complaint.
//!
//! Additive increase, multiplicative decrease (Chiu and Jain, 1989): every answer allows a little more, a "slow down" or a request without an answer a third less,
//! once in [`CALM`] so that what was under way at the time does not count again.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;

/// Requests allowed at first: what a queue of 32 needs.
const AT_FIRST: f64 = 48.0;
const LESS: f64 = 0.7;
/// However a store complains, so many are let in: else those who wait would outlast their time.
const FLOOR: f64 = 4.0;
const CALM: Duration = Duration::from_millis(200);

/// The bound and who is inside it.
#[derive(Debug)]
pub(super) struct Limit {
    state: Mutex<State>,
    freed: Notify,
}

#[derive(Debug)]
struct State {
    allowed: f64,
    most: f64,
    inside: usize,
    lowered: Option<Instant>,
}

/// The right to have one request under way.
pub(super) struct Permit<'l> {
    limit: &'l Limit,
}

impl Limit {
    pub(super) fn new(most: usize) -> Limit {
        let most = most.max(1) as f64;
        let state = State { allowed: AT_FIRST.min(most), most, inside: 0, lowered: None };
        Limit { state: Mutex::new(state), freed: Notify::new() }
    }

    /// Waits until one more request may be under way.
    pub(super) async fn enter(&self) -> Permit<'_> {
        loop {
            // Before the look, so that a permit given back between look and wait is not missed.
            let freed = self.freed.notified();
            if let Some(permit) = self.try_enter() {
                return permit;
            }
            freed.await;
        }
    }

    /// A permit if there is one now.
    pub(super) fn try_enter(&self) -> Option<Permit<'_>> {
        let mut state = self.state.lock();
        if (state.inside as f64) < state.allowed.max(1.0) {
            state.inside += 1;
            return Some(Permit { limit: self });
        }
        None
    }

    pub(super) fn answered(&self) {
        let mut state = self.state.lock();
        let before = state.allowed.floor();
        state.allowed = (state.allowed + 1.0 / state.allowed).min(state.most);
        let grown = state.allowed.floor() > before;
        drop(state);
        if grown {
            self.freed.notify_one();
        }
    }

    pub(super) fn overloaded(&self) {
        let mut state = self.state.lock();
        if state.lowered.is_none_or(|at| at.elapsed() > CALM) {
            state.allowed = (state.allowed * LESS).max(FLOOR.min(state.most));
            state.lowered = Some(Instant::now());
        }
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        self.limit.state.lock().inside -= 1;
        self.limit.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn no_more_are_inside_than_allowed_and_all_get_in() {
        let limit = std::sync::Arc::new(Limit::new(3));
        let tasks: Vec<_> = (0..50)
            .map(|_| {
                let limit = limit.clone();
                tokio::spawn(async move {
                    let _permit = limit.enter().await;
                    assert!(limit.state.lock().inside <= 3);
                    tokio::time::sleep(Duration::from_millis(1)).await;
                })
            })
            .collect();
        for task in tasks {
            tokio::time::timeout(Duration::from_secs(10), task).await.unwrap().unwrap();
        }
        assert_eq!(limit.state.lock().inside, 0);
    }

    #[test]
    fn complaints_lower_it_once_at_a_time_and_answers_raise_it() {
        let limit = Limit::new(100);
        limit.overloaded();
        limit.overloaded();
        assert!((limit.state.lock().allowed - AT_FIRST * LESS).abs() < 0.01);
        for _ in 0..20_000 {
            limit.answered();
        }
        assert!(limit.state.lock().allowed > 99.0);
        for _ in 0..100 {
            limit.state.lock().lowered = None;
            limit.overloaded();
        }
        assert!(limit.try_enter().is_some(), "one is always let in");
    }
}
