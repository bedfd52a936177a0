//! When to try again: after a wait that grows and is random, until the deadline.

use std::time::{Duration, Instant};

use rand::Rng;

/// The longest first wait. A lost packet or a restarted server costs a fraction of it.
const FIRST: Duration = Duration::from_millis(50);
/// The longest wait: how late a store that is back may be noticed.
const LONGEST: Duration = Duration::from_secs(5);

/// The waits of one request.
pub(super) struct Backoff {
    ends: Instant,
    longest: Duration,
}

impl Backoff {
    pub(super) fn new(deadline: Duration) -> Backoff {
        Backoff { ends: Instant::now() + deadline, longest: FIRST }
    }

    /// How long to wait before the next attempt, the last of which begins at the deadline; `None` after that.
    ///
    /// "Full jitter": anything up to a bound that doubles, so that many who failed together do not come back together.
    pub(super) fn next(&mut self) -> Option<Duration> {
        let wait = rand::rng().random_range(self.longest / 4..=self.longest);
        self.longest = (self.longest * 2).min(LONGEST);
        let left = self.ends.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(wait.min(left))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_a_bound_and_end_at_the_deadline() {
        let mut backoff = Backoff::new(Duration::from_secs(3600));
        let waits: Vec<Duration> = (0..12).map(|_| backoff.next().unwrap()).collect();
        for (n, wait) in waits.iter().enumerate() {
            let longest = (FIRST * 2u32.pow(n as u32)).min(LONGEST);
            assert!(*wait <= longest && *wait >= longest / 4, "wait {n}: {wait:?}");
        }
        let mut short = Backoff::new(Duration::from_millis(5));
        assert!(short.next().unwrap() <= Duration::from_millis(5));
        std::thread::sleep(Duration::from_millis(6));
        assert!(short.next().is_none());
    }
}
