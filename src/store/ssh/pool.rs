//! Sessions, kept for the next request.
//!
//! Enters: work for one session. Leaves: its result. Invariants: a session is used by one piece of work at a time; about [`MAX_SESSIONS`] serve requests and
//! [`MAX_UPLOADS`] uploads; one that failed is never used again. A new one takes ten round trips, so who finds none idle waits for whichever comes first: a new one, or one
//! that another gives back.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
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

/// How long who waits for a session goes without looking whether one is still on its way.
const LOOK: Duration = Duration::from_secs(1);

/// A session that waits for work.
struct Idle {
    link: Link,
    since: Instant,
}

/// Sessions without work, and work without sessions.
#[derive(Default)]
pub(super) struct Pool {
    now: Mutex<Now>,
    /// A session became idle, or could not be made.
    came: Condvar,
}

#[derive(Default)]
struct Now {
    idle: Vec<Idle>,
    /// Pieces of work that wait for a session.
    waiting: usize,
    /// Sessions being made, for whoever waits then.
    coming: usize,
    /// Why some were not made, for one who waits each.
    failed: Vec<StoreError>,
}

impl Pool {
    /// An idle session that nobody waits for.
    fn take(&self) -> Option<Idle> {
        let mut now = self.now.lock();
        now.idle.retain(|idle| idle.since.elapsed() < IDLE_MAX);
        if now.idle.len() > now.waiting { now.idle.pop() } else { None }
    }

    fn put(&self, link: Link) {
        let mut now = self.now.lock();
        if now.idle.len() < MAX_SESSIONS {
            now.idle.push(Idle { link, since: Instant::now() });
        }
        self.came.notify_one();
    }

    /// None of those that waited is used again.
    fn clear(&self) {
        self.now.lock().idle.clear();
    }
}

/// Whichever comes first: a session that is given back, or a new one. Blocks.
fn soonest(inner: &Arc<Inner>) -> Result<Idle, StoreError> {
    let mut now = inner.pool.now.lock();
    now.waiting += 1;
    let got = loop {
        if let Some(idle) = now.idle.pop() {
            break Ok(idle);
        }
        if let Some(error) = now.failed.pop() {
            break Err(error);
        }
        if now.coming < now.waiting && begin(inner, &mut now).is_err() {
            break Err(not_made(inner));
        }
        inner.pool.came.wait_for(&mut now, LOOK);
    };
    now.waiting -= 1;
    // Why something failed is for those who waited for it, not for who comes in an hour.
    let waiting = now.waiting;
    now.failed.truncate(waiting);
    got
}

fn not_made(inner: &Inner) -> StoreError {
    StoreError::Cancelled { store: inner.name.clone(), operation: "connect" }
}

/// Begins to make a session, on a thread of its own: who wants it may be served by another before, and this one be for the next.
fn begin(inner: &Arc<Inner>, now: &mut MutexGuard<'_, Now>) -> std::io::Result<()> {
    let maker = inner.clone();
    let making = move || {
        // A panic was logged; it must not leave anyone waiting.
        let made = catch_unwind(AssertUnwindSafe(|| connect(&maker.name, &maker.place, &maker.local)));
        let made = made.unwrap_or_else(|_| Err(not_made(&maker)));
        let pool = &maker.pool;
        {
            let mut now = pool.now.lock();
            now.coming -= 1;
            match made {
                Ok(link) => now.idle.push(Idle { link, since: Instant::now() }),
                // Nobody needs to know who need not wait for it.
                Err(error) if now.waiting > now.coming + now.idle.len() + now.failed.len() => {
                    now.failed.push(error)
                }
                Err(_) => {}
            }
        }
        pool.came.notify_one();
    };
    std::thread::Builder::new().name("ssh-connect".to_owned()).spawn(making)?;
    now.coming += 1;
    Ok(())
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
    /// It was idle, so it may have died since.
    reused: bool,
}

impl Leased {
    /// A session that waits, or one to be made by [`Probing::probed`].
    pub fn of(inner: &Arc<Inner>) -> Probing {
        Probing { inner: inner.clone(), idle: inner.pool.take() }
    }

    pub fn link(&mut self) -> &mut Link {
        &mut self.link
    }

    /// Puts it back, if it can be used again.
    pub fn give_back(mut self) {
        if self.link.sftp.push_out().is_ok() {
            self.inner.pool.put(self.link);
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
    idle: Option<Idle>,
}

impl Probing {
    /// A session that answers now.
    pub fn probed(mut self) -> Result<Leased, StoreError> {
        while let Some(Idle { mut link, .. }) = self.idle.take() {
            link.sftp.allow(0);
            match link.sftp.stat(b".") {
                Err(error) if !error.is_answer() => {
                    // The others are no younger.
                    self.inner.pool.clear();
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

    fn any(self) -> Result<Leased, StoreError> {
        let began = Instant::now();
        let Idle { link, since } = match self.idle {
            Some(idle) => idle,
            None => soonest(&self.inner)?,
        };
        Ok(Leased { inner: self.inner, link, reused: since < began })
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
        inner.pool.clear();
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
