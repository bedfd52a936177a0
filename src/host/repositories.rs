//! The repositories a host reads from: one connection to each, however many volumes come from there.
//!
//! Enters: the URLs of a volume. Leaves: a repository over a store that all volumes of the same URLs share, so that its sessions, its limits and what is known of its
//! health are one. Invariant: what nobody uses any more is let go, after a while: a volume is seldom made to be left alone, and a new session takes long over a long line.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;

use super::{HostError, RepositoryFigures};
use crate::repo::Repository;
use crate::store::{self, CountingStore, RetryOptions, Store, UrlError};
use crate::units::ByteLen;

/// What a start reads at once as soon as it knows what to read.
const FIRST_READS: usize = 32;

/// How long a store is kept for a volume that was made from it.
const KEPT: Duration = Duration::from_secs(60);

/// The stores that are open, by the URLs they were opened by.
pub struct Repositories {
    options: RetryOptions,
    open: Mutex<HashMap<Vec<String>, Weak<CountingStore>>>,
}

impl Repositories {
    /// None yet; a read waits `deadline` for a repository that does not answer.
    pub fn new(deadline: Duration) -> Repositories {
        let options = RetryOptions { deadline, ..RetryOptions::default() };
        Repositories { options, open: Mutex::default() }
    }

    /// The repository of these places; asks it who it is.
    pub async fn open(&self, access: &[String]) -> Result<Repository, HostError> {
        // Not one that is in use: that waits long for a repository that is away, and here somebody waits to be told so.
        let store = Arc::new(CountingStore::new(store::url::open_all(access, self.options)?));
        let repository = Repository::open(store.clone()).await?;
        let mut open = self.open.lock();
        if open.get(access).is_none_or(|store| store.strong_count() == 0) {
            store.expect_reads(FIRST_READS);
            open.insert(access.to_vec(), Arc::downgrade(&store));
            tokio::spawn(async move {
                tokio::time::sleep(KEPT).await;
                drop(store);
            });
        }
        Ok(repository)
    }

    /// The repository a volume on this host was made from, whether it can be reached now or not.
    pub fn opened_before(&self, access: &[String], id: [u8; 16]) -> Result<Repository, UrlError> {
        let mut open = self.open.lock();
        if let Some(store) = open.get(access).and_then(Weak::upgrade) {
            return Ok(Repository::opened_before(store, id));
        }
        open.retain(|_, store| store.strong_count() > 0);
        // It has answered on another day.
        let options = RetryOptions { first_contact: self.options.deadline, ..self.options };
        let store = Arc::new(CountingStore::new(store::url::open_all(access, options)?));
        store.expect_reads(FIRST_READS);
        open.insert(access.to_vec(), Arc::downgrade(&store));
        Ok(Repository::opened_before(store, id))
    }

    /// What was asked of each that is in use.
    pub fn figures(&self) -> Vec<RepositoryFigures> {
        let open = self.open.lock();
        let in_use = open.iter().filter_map(|(access, store)| Some((access.clone(), store.upgrade()?)));
        let figures = in_use.map(|(access, store)| RepositoryFigures {
            access,
            requests: store.requests(),
            read: ByteLen(store.bytes_read()),
            attempts: store.attempts(),
        });
        let mut figures: Vec<_> = figures.collect();
        figures.sort_by(|one, other| one.access.cmp(&other.access));
        figures
    }
}
