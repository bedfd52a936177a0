//! A second request for the same bytes where the first is slower than nearly all before it.
//!
//! Enters: reads. Leaves: the first answer. Invariant: at most one read in [`EVERY`] is sent twice over time, so a store that is slow for everybody is not
//! asked for twice as much.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::limit::Limit;
use crate::store::StoreError;

/// A read earns the right to a 1/20 of a second request.
const EVERY: f64 = 20.0;
/// Rights that can gather.
const MOST_RIGHTS: f64 = 8.0;
/// No read is called slow before this.
const SLOW_AT_LEAST: Duration = Duration::from_millis(250);
/// Before this many answers nothing is known.
const KNOWN_AFTER: u32 = 16;

/// How long reads take, and what may be spent on those that take longer.
#[derive(Debug, Default)]
pub(super) struct Hedge {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    answers: u32,
    /// Mean and mean deviation in seconds, as TCP keeps them (RFC 6298).
    mean: f64,
    deviation: f64,
    rights: f64,
}

impl State {
    fn note(&mut self, took: Duration) {
        let took = took.as_secs_f64();
        if self.answers == 0 {
            (self.mean, self.deviation) = (took, took / 2.0);
        } else {
            self.deviation += ((took - self.mean).abs() - self.deviation) / 4.0;
            self.mean += (took - self.mean) / 8.0;
        }
        self.answers = self.answers.saturating_add(1);
        self.rights = (self.rights + 1.0 / EVERY).min(MOST_RIGHTS);
    }

    fn slow_after(&self) -> Option<Duration> {
        let slow = Duration::from_secs_f64((self.mean + 4.0 * self.deviation).min(60.0));
        (self.answers >= KNOWN_AFTER).then_some(slow.max(SLOW_AT_LEAST))
    }

    fn take_right(&mut self) -> bool {
        let may = self.rights >= 1.0;
        if may {
            self.rights -= 1.0;
        }
        may
    }
}

impl Hedge {
    /// Reads, twice where the first time is slow. A second read that fails leaves the first one running.
    pub(super) async fn race<T, F>(&self, limit: &Limit, read: impl Fn() -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let began = Instant::now();
        let answer = self.race_untimed(limit, read).await;
        if answer.is_ok() {
            self.state.lock().note(began.elapsed());
        }
        answer
    }

    async fn race_untimed<T, F>(&self, limit: &Limit, read: impl Fn() -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let slow_after = self.state.lock().slow_after();
        let first = read();
        let Some(slow_after) = slow_after else { return first.await };
        tokio::pin!(first);
        tokio::select! {
            answer = &mut first => return answer,
            () = tokio::time::sleep(slow_after) => {}
        }
        let permit = limit.try_enter();
        if permit.is_none() || !self.state.lock().take_right() {
            return first.await;
        }
        let second = read();
        tokio::pin!(second);
        tokio::select! {
            answer = &mut first => match answer {
                Err(error) if error.is_transient() => second.await,
                answer => answer,
            },
            answer = &mut second => match answer {
                Ok(value) => Ok(value),
                Err(_) => first.await,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test]
    async fn a_read_that_hangs_is_asked_again_and_the_second_answer_taken() {
        let (hedge, limit, asked) = (Hedge::default(), Limit::new(8), AtomicU32::new(0));
        for _ in 0..40 {
            hedge.race(&limit, || async { Ok::<_, StoreError>(1) }).await.unwrap();
        }
        let began = Instant::now();
        let read = || async {
            if asked.fetch_add(1, Ordering::Relaxed) == 0 {
                tokio::time::sleep(Duration::from_secs(3600)).await;
            }
            Ok::<_, StoreError>(2)
        };
        assert_eq!(hedge.race(&limit, read).await.unwrap(), 2);
        assert!(began.elapsed() < Duration::from_secs(1));
        assert_eq!(asked.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn where_all_reads_are_slow_few_are_sent_twice() {
        let mut state = State::default();
        let mut twice = 0;
        for _ in 0..400 {
            twice += u32::from(state.take_right());
            state.note(Duration::from_secs(5));
        }
        assert!((10..=400 / EVERY as u32).contains(&twice), "{twice} of 400 were sent twice");
        assert!(state.slow_after().unwrap() < Duration::from_secs(8));
    }
}
