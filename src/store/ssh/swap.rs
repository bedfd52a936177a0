//! Compare-and-swap over SFTP: the [`claim`](super::super::claim) with SFTP's requests.
//!
//! Enters: a key, the tag expected, the new content. Leaves: the new tag, or `Conflict`. Invariant: the ref is replaced only by the rename that ends our own
//! claim, so never by a client that was paused, cut off or given up since it compared.
//!
//! Why not a command over an exec channel, such as `flock .lock sh -c ...`: accounts confined to SFTP have none, the login shell may be anything, flock(1) is not
//! everywhere, and a connection that breaks leaves the command running or the lock held. Two ways would also have to keep each other out. This one is the
//! same for every account and needs one thing of a server, `posix-rename@openssh.com`; one that lacks it takes no swaps.

use std::time::{Duration, Instant};

use super::super::claim::{self, CLAIM_NAME, Holder, Patience, Verdict};
use super::super::dir::etag_of;
use super::super::{Etag, Key, StoreError};
use super::error::Failed;
use super::files::{At, Done, join, parent_of};
use super::jittered;
use super::requests::POSIX_RENAME;
use super::wire::Code;
use crate::durable::TEMP_PREFIX;

/// Between two tries to take a claim; spread, so that many who wait don't come at once.
const RETRY: Duration = Duration::from_millis(5);

impl At<'_> {
    pub fn compare_and_swap(&mut self, key: &Key, expected: Option<&Etag>, new: &[u8]) -> Done<Etag> {
        self.expect(key, expected)?;
        let path = self.path(key);
        let dir = parent_of(&path);
        self.make_dirs(dir)?;
        let token = claim::token(Holder::Sftp);
        let prepared = join(dir, &format!("{TEMP_PREFIX}{token}"));
        self.link.sftp.allow(0);
        self.link.sftp.mkdir(&prepared).map_err(|error| self.write_error("write", key, error))?;
        // Not before something was made: a server that takes no writes at all does not offer it either, and that is another trouble.
        if !self.link.sftp.has(POSIX_RENAME) {
            self.tidy(&prepared);
            let (store, condition) = (self.inner.name.clone(), POSIX_RENAME);
            return Err(StoreError::NoConditions { store, condition }.into());
        }
        let (waiting, holding) = (join(&prepared, &token), join(dir, CLAIM_NAME));
        let claimed = join(&holding, &token);
        let swapped = self
            .write_bare(&waiting, key, new)
            .and_then(|()| self.take(key, expected, &prepared, &holding))
            .and_then(|()| self.expect(key, expected))
            .and_then(|()| self.replace(key, &claimed, &path));
        match swapped {
            Ok(()) => {
                self.tidy(&holding);
                Ok(etag_of(new))
            }
            Err(failed) => {
                // By its own name, wherever it is by now: what is there of others stays.
                if !failed.lost {
                    self.discard(&claimed);
                    self.discard(&waiting);
                    self.tidy(&prepared);
                    self.tidy(&holding);
                }
                Err(failed)
            }
        }
    }

    /// Removes a directory unless someone's claim is in it, and waits for no answer.
    fn tidy(&mut self, dir: &[u8]) {
        let _ = self.link.sftp.rmdir_later(dir);
    }

    fn expect(&mut self, key: &Key, expected: Option<&Etag>) -> Done<()> {
        match self.current(key)?.as_ref() == expected {
            true => Ok(()),
            false => Err(StoreError::Conflict { store: self.inner.name.clone(), key: key.clone() }.into()),
        }
    }

    fn locked(&self, key: &Key) -> Failed {
        StoreError::Locked { store: self.inner.name.clone(), key: key.clone() }.into()
    }

    /// Takes the claim, or ends one whose holder does not come back.
    fn take(&mut self, key: &Key, expected: Option<&Etag>, prepared: &[u8], holding: &[u8]) -> Done<()> {
        let mut patience = Patience::new(self.inner.claim_expiry, Instant::now());
        loop {
            self.link.sftp.allow(0);
            let refused = match self.link.sftp.posix_rename(prepared, holding) {
                Ok(()) => return Ok(()),
                // All that SFTP says of a directory that is not empty.
                Err(error) if error.is(Code::Failure) => error,
                Err(error) => return Err(self.write_error("lock", key, error)),
            };
            let holders = match self.link.sftp.entries(holding) {
                Ok(entries) => entries,
                Err(error) if error.is(Code::NoSuchFile) => Vec::new(),
                Err(error) => return Err(self.fail("lock", key, error)),
            };
            let mut holders: Vec<String> =
                holders.iter().map(|(name, _)| String::from_utf8_lossy(name).into_owned()).collect();
            holders.sort_unstable();
            match patience.judge(&holders, Instant::now()) {
                // Nobody has it, and still: it is something else, such as a full disk.
                Verdict::Break if holders.is_empty() => return Err(self.write_error("lock", key, refused)),
                Verdict::Break => {
                    tracing::warn!(store = %self.inner.name, %key, "ending the claim of a writer that does not come back");
                    for holder in holders.iter().filter(|holder| !holder.contains('/')) {
                        match self.link.sftp.remove(&join(holding, holder)) {
                            Err(error) if !error.is(Code::NoSuchFile) => {
                                return Err(self.write_error("unlock", key, error));
                            }
                            _ => {}
                        }
                    }
                }
                Verdict::GiveUp => return Err(self.locked(key)),
                Verdict::Wait => {
                    // Servers in some languages refuse to replace even an empty directory.
                    if holders.is_empty() {
                        self.tidy(holding);
                    }
                    std::thread::sleep(jittered(RETRY));
                    // Whoever had it has likely swapped: then there is nothing to wait for.
                    self.expect(key, expected)?;
                }
            }
        }
    }

    fn replace(&mut self, key: &Key, claimed: &[u8], path: &[u8]) -> Done<()> {
        self.link.sftp.allow(0);
        match self.link.sftp.posix_rename(claimed, path) {
            Ok(()) => self.sync_dir(parent_of(path)),
            // Someone lost patience with us and ended the claim. Nothing was changed.
            Err(error) if error.is(Code::NoSuchFile) => Err(self.locked(key)),
            Err(error) => Err(self.write_error("write", key, error)),
        }
    }
}
