//! The exports of a server, by name, while they come and go.
//!
//! Enters: exports to serve, names that clients ask for. Leaves: the export of a name, opened for the purpose where it sleeps. Invariant: once
//! [`Exports::remove`] has returned, no connection to the export is left and none begins.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::RwLock;

use super::error::ServeError;
use super::export::Export;
use crate::device::DeviceError;

/// Volumes that are known and not open: who opens one when a client asks for it.
#[async_trait]
pub trait Dormant: Send + Sync {
    /// Names and descriptions of all that can be asked for, open or not. Never waits for anything.
    fn list(&self) -> Vec<(String, String)>;

    /// Opens the one of this name and returns its export, which it has added to the server's. `Ok(None)`: there is none of this name; an error is told to the client.
    async fn wake(&self, name: &str) -> Result<Option<Arc<Export>>, String>;
}

/// The exports of a server.
#[derive(Default)]
pub struct Exports {
    open: RwLock<Open>,
    dormant: Option<Arc<dyn Dormant>>,
}

#[derive(Default)]
struct Open {
    by_name: BTreeMap<String, Arc<Export>>,
    /// The server stops: none is added any more.
    closed: bool,
}

/// Why a client does not get the export it asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NotServed {
    /// There is none, or it can't be opened; with words for the client.
    Unavailable(String),
    /// The server stops.
    Stopping,
}

impl Exports {
    /// None yet; those that `dormant` knows are opened when they are asked for.
    pub fn waking(dormant: Arc<dyn Dormant>) -> Exports {
        Exports { dormant: Some(dormant), ..Exports::default() }
    }

    /// Serves one more.
    pub fn add(&self, export: Arc<Export>) -> Result<(), ServeError> {
        let name = export.name().to_owned();
        let mut open = self.open.write();
        if open.closed {
            return Err(ServeError::Stopping);
        }
        if open.by_name.contains_key(&name) {
            return Err(ServeError::NameTwice { name });
        }
        open.by_name.insert(name, export);
        Ok(())
    }

    /// Serves one no more: ends its connections, each after what it has in flight, and flushes it. After `grace` it no longer waits for them; their fences are closed.
    /// `Ok(false)`: there was none of this name.
    pub async fn remove(&self, name: &str, grace: Duration) -> Result<bool, DeviceError> {
        let Some(export) = self.open.write().by_name.remove(name) else { return Ok(false) };
        export.stop();
        if tokio::time::timeout(grace, export.peers().empty()).await.is_err() {
            tracing::warn!(export = name, left = export.peers().count(), "connections did not end in time");
            export.peers().fence_all();
        }
        export.flush_at_end().await.map(|()| true)
    }

    /// The open export of this name.
    pub fn open(&self, name: &str) -> Option<Arc<Export>> {
        self.open.read().by_name.get(name).cloned()
    }

    /// All that are open.
    pub fn all_open(&self) -> Vec<Arc<Export>> {
        self.open.read().by_name.values().cloned().collect()
    }

    /// Adds none any more and stops all; those that were open.
    pub(super) fn close(&self) -> Vec<Arc<Export>> {
        self.open.write().closed = true;
        let all = self.all_open();
        all.iter().for_each(|export| export.stop());
        all
    }

    /// Names and descriptions.
    pub(super) fn list(&self) -> Vec<(String, String)> {
        let mut all: BTreeMap<String, String> =
            self.dormant.iter().flat_map(|dormant| dormant.list()).collect();
        let open = self.open.read();
        all.extend(
            open.by_name.values().map(|export| (export.name().to_owned(), export.description().to_owned())),
        );
        all.into_iter().collect()
    }

    /// The export of a name; the empty name is the only one there is, if there is only one.
    pub(super) async fn find(&self, name: &str) -> Result<Arc<Export>, NotServed> {
        if let Some(export) = self.open(name) {
            return Ok(export);
        }
        let names = || self.list().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        let mut name = name.to_owned();
        if name.is_empty()
            && let [only] = names().as_mut_slice()
        {
            name = std::mem::take(only);
        }
        if let Some(export) = self.open(&name) {
            return Ok(export);
        }
        if self.open.read().closed {
            return Err(NotServed::Stopping);
        }
        let woken = match &self.dormant {
            Some(dormant) => dormant.wake(&name).await.map_err(NotServed::Unavailable)?,
            None => None,
        };
        woken.ok_or_else(|| NotServed::Unavailable(unknown(&name, &names())))
    }
}

fn unknown(asked: &str, names: &[String]) -> String {
    /// Names in a message: enough to see a typing error, few enough for one line.
    const MOST: usize = 8;
    let more = if names.len() > MOST { ", ..." } else { "" };
    let names = names[..names.len().min(MOST)].join(", ");
    if names.is_empty() {
        return format!("no export '{asked}'; there is none");
    }
    format!("no export '{asked}'; there is: {names}{more}")
}
