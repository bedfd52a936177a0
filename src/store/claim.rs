//! The claim: what makes a compare-and-swap atomic among processes that share nothing but a directory, one of them perhaps over SFTP.
//!
//! SFTP has no locks, and a lock file with an expiry is not enough: a holder that pauses longer than that wakes up and overwrites. So the lock *is* the new
//! content. A writer makes a directory `.tmp-TOKEN` with one file `TOKEN`, which holds the new content, fsynced; the token is never used again. Then:
//!
//! 1. It renames `.tmp-TOKEN` to [`CLAIM_NAME`]. rename(2) puts a directory in the place of an empty one and refuses to replace one that holds a file, so of
//!    any number of writers one succeeds: it has the claim for as long as its file is in there.
//! 2. It reads the ref and compares. On a mismatch it removes its file, and with it the claim.
//! 3. It renames `.swap/TOKEN` to the ref. That one step swaps the content and lets go of the claim.
//!
//! Whoever waits may at any time end a claim by removing the file by its name: the holder's step 3 then fails, since a token has no second file, and nothing
//! was changed. So a ref is only ever replaced by a writer that has had the claim without a break since before it compared. That holds whatever the clocks and
//! pauses; time decides only how long a dead holder is waited for ([`CLAIM_EXPIRY`], by the waiter's own clock), never who wins.
//!
//! Processes on one machine line up at an flock before that, so that they need not poll; a claim of theirs ([`Holder::Flock`]) that is met while one holds the
//! flock was left by a process that died, and ends at once.
//!
//! What is left: a filesystem whose rename is not atomic or replaces a directory that is not empty would break this, and every store on it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::durable::{TEMP_PREFIX, sync_dir, unless_stale};

/// The directory beside the refs that has the file of who swaps one. No object has such a name.
pub(super) const CLAIM_NAME: &str = ".swap";
/// How long one and the same claim is waited for.
pub const CLAIM_EXPIRY: Duration = Duration::from_secs(10);
/// How long a process waits for claims of others, all together.
pub(super) const CLAIM_PATIENCE: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_millis(3);

/// Who has a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holder {
    /// A process that holds the flock beside the refs too.
    Flock,
    /// A client of SFTP.
    Sftp,
}

/// A name no other claim has or had.
pub(super) fn token(holder: Holder) -> String {
    let kind = match holder {
        Holder::Flock => 'd',
        Holder::Sftp => 's',
    };
    format!("{kind}-{}", uuid::Uuid::new_v4().simple())
}

/// Whether a claim is one of [`Holder::Flock`].
fn is_of_flock(token: &str) -> bool {
    token.starts_with("d-")
}

/// Decides when the claims of others have been waited for long enough. Time comes from the caller.
#[derive(Debug)]
pub(super) struct Patience {
    expiry: Duration,
    started: Instant,
    seen: Option<(Vec<String>, Instant)>,
}

/// What to do about a claim of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// End it.
    Break,
    Wait,
    GiveUp,
}

impl Patience {
    pub fn new(expiry: Duration, now: Instant) -> Patience {
        Patience { expiry, started: now, seen: None }
    }

    /// What to do, these being the files in the claim's directory now.
    pub fn judge(&mut self, holders: &[String], now: Instant) -> Verdict {
        let since = match &self.seen {
            Some((seen, since)) if seen == holders => *since,
            _ => {
                self.seen = Some((holders.to_vec(), now));
                now
            }
        };
        if now.duration_since(self.started) >= CLAIM_PATIENCE.max(2 * self.expiry) {
            Verdict::GiveUp
        } else if now.duration_since(since) >= self.expiry {
            // What could not be ended is waited for once more, and not for ever.
            self.seen = None;
            Verdict::Break
        } else {
            Verdict::Wait
        }
    }
}

/// A claim of this process, in a local directory. Dropped, it lets go.
#[derive(Debug)]
pub(super) struct Claim {
    /// The directory of the refs.
    dir: PathBuf,
    token: String,
    /// Where the file's directory is: `.tmp-TOKEN`, then `.swap`.
    holding: PathBuf,
}

impl Claim {
    /// Writes the new content, durable, where it claims nothing yet.
    pub fn prepare(dir: &Path, body: &[u8]) -> io::Result<Claim> {
        // Each time with a token of its own: what a try left goes with it.
        unless_stale(|| Claim::prepare_once(dir, body))
    }

    fn prepare_once(dir: &Path, body: &[u8]) -> io::Result<Claim> {
        let token = token(Holder::Flock);
        let holding = dir.join(format!("{TEMP_PREFIX}{token}"));
        fs::create_dir(&holding)?;
        let claim = Claim { dir: dir.to_owned(), token, holding };
        let mut file = File::options().write(true).create_new(true).open(claim.file())?;
        file.write_all(body)?;
        file.sync_all()?;
        Ok(claim)
    }

    fn file(&self) -> PathBuf {
        self.holding.join(&self.token)
    }

    /// Takes the claim; the caller holds the flock. `Ok(false)` where others keep it.
    pub fn take(&mut self, expiry: Duration) -> io::Result<bool> {
        let place = self.dir.join(CLAIM_NAME);
        let mut patience = Patience::new(expiry, Instant::now());
        loop {
            match unless_stale(|| fs::rename(&self.holding, &place)) {
                Ok(()) => {
                    self.holding = place;
                    return Ok(true);
                }
                Err(error) if !is_held(&error) => return Err(error),
                Err(_) => {}
            }
            let holders = unless_stale(|| holders(&place))?;
            let left_by_the_dead = !holders.is_empty() && holders.iter().all(|token| is_of_flock(token));
            match patience.judge(&holders, Instant::now()) {
                _ if left_by_the_dead => end(&place, &holders)?,
                Verdict::Break => end(&place, &holders)?,
                Verdict::GiveUp => return Ok(false),
                Verdict::Wait => std::thread::sleep(RETRY),
            }
        }
    }

    /// Swaps: the content becomes `target`, durable, and the claim ends. `Ok(false)` where someone ended it before, and nothing was changed.
    pub fn publish(self, target: &Path) -> io::Result<bool> {
        // Again is no danger: the token has one file, and once it is the target it is not there.
        match unless_stale(|| fs::rename(self.file(), target)) {
            Ok(()) => unless_stale(|| sync_dir(&self.dir)).map(|()| true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // By its own name: what is there of others stays, and keeps the directory.
        let _ = fs::remove_file(self.file());
        let _ = fs::remove_dir(&self.holding);
    }
}

fn is_held(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists)
}

fn holders(place: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(place) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort_unstable();
    Ok(names)
}

fn end(place: &Path, holders: &[String]) -> io::Result<()> {
    for token in holders {
        match unless_stale(|| fs::remove_file(place.join(token))) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(50);

    fn leave(dir: &Path, token: &str) {
        fs::create_dir(dir.join(CLAIM_NAME)).unwrap();
        fs::write(dir.join(CLAIM_NAME).join(token), b"never").unwrap();
    }

    #[test]
    fn a_claim_that_was_ended_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("main");
        let mut paused = Claim::prepare(dir.path(), b"paused").unwrap();
        assert!(paused.take(SHORT).unwrap());
        let mut other = Claim::prepare(dir.path(), b"other").unwrap();
        assert!(other.take(SHORT).unwrap(), "a claim of a process that let go of the flock ends at once");
        assert!(other.publish(&target).unwrap());
        let mut third = Claim::prepare(dir.path(), b"third").unwrap();
        assert!(third.take(SHORT).unwrap());
        assert!(!paused.publish(&target).unwrap());
        assert_eq!(fs::read(&target).unwrap(), b"other");
        assert!(third.publish(&target).unwrap());
        assert_eq!(fs::read(&target).unwrap(), b"third");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside the ref");
    }

    #[test]
    fn a_claim_over_sftp_is_waited_for_and_a_dead_one_ends() {
        let dir = tempfile::tempdir().unwrap();
        leave(dir.path(), &token(Holder::Sftp));
        let started = Instant::now();
        let mut claim = Claim::prepare(dir.path(), b"new").unwrap();
        assert!(claim.take(SHORT).unwrap() && started.elapsed() >= SHORT);
        drop(claim);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn patience_is_with_one_holder_and_with_all_of_them() {
        let (expiry, now) = (Duration::from_secs(10), Instant::now());
        let mut patience = Patience::new(expiry, now);
        let holder = |name: &str| vec![name.to_owned()];
        let after = |seconds| now + Duration::from_secs(seconds);
        assert_eq!(patience.judge(&holder("a"), now), Verdict::Wait);
        assert_eq!(patience.judge(&holder("a"), after(9)), Verdict::Wait);
        assert_eq!(patience.judge(&holder("b"), after(12)), Verdict::Wait);
        assert_eq!(patience.judge(&holder("b"), after(22)), Verdict::Break);
        assert_eq!(patience.judge(&holder("c"), after(31)), Verdict::GiveUp);
    }
}
