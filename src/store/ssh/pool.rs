//! Sessions, kept for the next request.
//!
//! Enters: work for one session. Leaves: its result. Invariant: a session is used by one piece of work at a time; at most [`MAX_SESSIONS`] serve requests and
//! [`MAX_UPLOADS`] uploads; one that failed is never used again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use super::super::StoreError;
use super::Inner;
use super::connect::{Link, connect};
use super::error::Failed;
use super::files::{At, Done};

/// Sessions that serve requests.
pub const MAX_SESSIONS: usize = 8;
/// Sessions that have an upload each; one more waits for one to finish.
pub const MAX_UPLOADS: usize = 8;
/// A session unused for so long is not used again: a firewall on the way may have forgotten it, and would let us wait.
const IDLE_MAX: Duration = Duration::from_secs(60);

/// A session that waits for work.
pub(super) struct Idle {
    link: Link,
    since: Instant,
}

/// Whether work may be done a second time, when the session it was begun on turns out to be dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Again {
    /// Doing it twice is doing it once.
    Harmless,
    /// So the session is tried first.
    Never,
}

/// A session taken from the pool.
pub(super) struct Leased {
    inner: Arc<Inner>,
    link: Link,
    /// It served before, so it may have died since.
    reused: bool,
}

impl Leased {
    /// A session that waits, or one to be made by [`Probing::probed`].
    pub fn of(inner: &Arc<Inner>) -> Probing {
        let mut idle = inner.idle.lock();
        idle.retain(|idle| idle.since.elapsed() < IDLE_MAX);
        let link = idle.pop().map(|idle| idle.link);
        Probing { inner: inner.clone(), link }
    }

    pub fn link(&mut self) -> &mut Link {
        &mut self.link
    }

    /// Puts it back, if it can be used again.
    pub fn give_back(mut self) {
        if self.link.sftp.push_out().is_ok() {
            let mut idle = self.inner.idle.lock();
            if idle.len() < MAX_SESSIONS {
                idle.push(Idle { link: self.link, since: Instant::now() });
            }
        }
    }

    /// Puts it back or throws it away, after work failed on it.
    pub fn after(self, failed: Failed) -> Failed {
        if !failed.lost {
            self.give_back();
        }
        failed
    }
}

/// A session that waited, or none.
pub(super) struct Probing {
    inner: Arc<Inner>,
    link: Option<Link>,
}

impl Probing {
    /// A session that answers now.
    pub fn probed(mut self) -> Result<Leased, StoreError> {
        while let Some(mut link) = self.link.take() {
            link.sftp.allow(0);
            match link.sftp.stat(b".") {
                Err(error) if !error.is_answer() => {
                    // The others are no younger.
                    self.inner.idle.lock().clear();
                }
                _ => return Ok(Leased { inner: self.inner, link, reused: false }),
            }
        }
        self.fresh()
    }

    /// A session that has not been used before.
    fn fresh(self) -> Result<Leased, StoreError> {
        let link = connect(&self.inner.name, &self.inner.place, &self.inner.local)?;
        Ok(Leased { inner: self.inner, link, reused: false })
    }

    fn any(mut self) -> Result<Leased, StoreError> {
        match self.link.take() {
            Some(link) => Ok(Leased { inner: self.inner, link, reused: true }),
            None => self.fresh(),
        }
    }
}

/// Runs work on a session, on a blocking thread.
pub(super) async fn run<T: Send + 'static>(
    inner: &Arc<Inner>,
    operation: &'static str,
    again: Again,
    work: impl FnMut(&mut At<'_>) -> Done<T> + Send + 'static,
) -> Result<T, StoreError> {
    let cancelled = || StoreError::Cancelled { store: inner.name.clone(), operation };
    let permit = inner.slots.clone().acquire_owned().await.map_err(|_| cancelled())?;
    let running = {
        let inner = inner.clone();
        tokio::task::spawn_blocking(move || {
            let _permit = permit;
            blocking(&inner, again, work)
        })
    };
    joined(inner, operation, running).await
}

fn blocking<T>(inner: &Arc<Inner>, again: Again, mut work: impl FnMut(&mut At<'_>) -> Done<T>) -> Done<T> {
    let mut leased = match again {
        Again::Harmless => Leased::of(inner).any()?,
        Again::Never => Leased::of(inner).probed()?,
    };
    let mut done = work(&mut At { inner, link: leased.link() });
    if leased.reused
        && let Err(failed) = &done
        && failed.lost
    {
        tracing::debug!(error = %failed.error, "a session that waited is dead; trying on a new one");
        // The others have waited as long.
        inner.idle.lock().clear();
        drop(leased);
        leased = Leased::of(inner).probed()?;
        done = work(&mut At { inner, link: leased.link() });
    }
    match done {
        Ok(value) => {
            leased.give_back();
            Ok(value)
        }
        Err(failed) => Err(leased.after(failed)),
    }
}

/// Waits for a blocking thread.
pub(super) async fn joined<T>(
    inner: &Inner,
    operation: &'static str,
    running: JoinHandle<Done<T>>,
) -> Result<T, StoreError> {
    match running.await {
        Ok(done) => done.map_err(|failed| failed.error),
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(StoreError::Cancelled { store: inner.name.clone(), operation }),
    }
}
