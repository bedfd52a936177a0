//! An upload: a stream of bytes straight into a temporary file at the server.
//!
//! Enters: pieces. Leaves: one object. Invariant: one session and one open file from the first byte to the fsync. If either breaks the upload has failed:
//! a server that was restarted meanwhile may have lost what it had answered, and a file opened anew would not tell. Memory: [`GATHER_BYTES`] being filled and
//! as many on their way.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinHandle;

use super::super::{Key, MAX_WHOLE_OBJECT, StoreError, Upload};
use super::Inner;
use super::error::Failed;
use super::files::{At, Done, join, temp_name};
use super::pool::{Leased, joined};
use super::sftp::Handle;

/// Bytes sent at a time: enough to keep a long line busy.
const GATHER_BYTES: usize = 4 << 20;
/// Bytes read at a time where an object of this name is there already.
const COMPARE_BYTES: u64 = 4 << 20;

/// An upload.
pub(super) struct SshUpload {
    inner: Arc<Inner>,
    gathered: Vec<u8>,
    state: State,
    _permit: OwnedSemaphorePermit,
}

enum State {
    /// Nothing is on its way.
    Ready(Box<Stream>),
    /// A blocking thread sends.
    Sending(JoinHandle<Done<Box<Stream>>>),
    /// A write failed.
    Broken,
}

/// The open file. Dropped, it is removed.
struct Stream {
    inner: Arc<Inner>,
    link: Option<Leased>,
    handle: Option<Handle>,
    temp: Vec<u8>,
    len: u64,
    hasher: blake3::Hasher,
}

/// Starts an upload; the permit bounds how many there are.
pub(super) async fn begin(inner: Arc<Inner>, permit: OwnedSemaphorePermit) -> Result<SshUpload, StoreError> {
    let stream = {
        let inner = inner.clone();
        joined(&inner.clone(), "write", tokio::task::spawn_blocking(move || Stream::create(inner))).await?
    };
    Ok(SshUpload { inner, gathered: Vec::new(), state: State::Ready(stream), _permit: permit })
}

impl Stream {
    fn create(inner: Arc<Inner>) -> Done<Box<Stream>> {
        let mut link = Leased::of(&inner).probed()?;
        // In the root, since the key is not known yet.
        let temp = join(&inner.place.path, &temp_name());
        let created = At { inner: &inner, link: link.link() }.create(&temp, "an object");
        match created {
            Ok(handle) => Ok(Box::new(Stream {
                inner,
                link: Some(link),
                handle: Some(handle),
                temp,
                len: 0,
                hasher: blake3::Hasher::new(),
            })),
            Err(failed) => Err(link.after(failed)),
        }
    }

    fn broken(&self) -> Failed {
        StoreError::Cancelled { store: self.inner.name.clone(), operation: "an upload" }.into()
    }

    /// Does something on the session; a session that broke is not used again.
    fn with<T>(&mut self, work: impl FnOnce(&mut At<'_>, &Handle) -> Done<T>) -> Done<T> {
        let (Some(leased), Some(handle)) = (&mut self.link, &self.handle) else { return Err(self.broken()) };
        let done = work(&mut At { inner: &self.inner, link: leased.link() }, handle);
        match done {
            Err(failed) if failed.lost => {
                let leased = self.link.take();
                Err(leased.map_or_else(|| self.broken(), |leased| leased.after(failed)))
            }
            done => done,
        }
    }

    fn send(&mut self, bytes: &[u8]) -> Done<()> {
        let at = self.len;
        self.with(|store, handle| {
            let sent = store.link.sftp.write(handle, at, bytes);
            sent.map_err(|error| store.write_error("write", "an object", error))
        })?;
        self.hasher.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    fn finish(mut self, last: &[u8], key: &Key) -> Done<()> {
        self.send(last)?;
        self.with(|store, handle| {
            let synced = store.link.sftp.fsync(handle);
            let synced = synced.map_err(|error| store.write_error("write", key, error))?;
            store.warn_unless(synced);
            store.link.sftp.close(handle.clone()).map_err(|error| store.fail("write", key, error))
        })?;
        let (temp, len, hash) = (std::mem::take(&mut self.temp), self.len, self.hasher.finalize());
        self.with(|store, _| store.publish(&temp, key, |store| holds(store, key, len, hash)))
    }
}

/// Whether an object has this length and hash.
fn holds(store: &mut At<'_>, key: &Key, len: u64, hash: blake3::Hash) -> Done<bool> {
    let path = store.path(key);
    let there = store.link.sftp.stat(&path).map_err(|error| store.fail("compare with", key, error))?;
    if there.len != Some(len) {
        return Ok(false);
    }
    let mut hasher = blake3::Hasher::new();
    if len <= MAX_WHOLE_OBJECT {
        return Ok(blake3::hash(&store.read_whole(key)?) == hash);
    }
    let mut at = 0;
    while at < len {
        let end = len.min(at + COMPARE_BYTES);
        hasher.update(&store.read_range(key, &(at..end))?);
        at = end;
    }
    Ok(hasher.finalize() == hash)
}

impl Drop for Stream {
    fn drop(&mut self) {
        let Some(mut leased) = self.link.take() else { return };
        let link = leased.link();
        if !self.temp.is_empty() {
            // It never got its name.
            if let Some(handle) = self.handle.take() {
                let _ = link.sftp.close(handle);
            }
            let _ = link.sftp.remove_later(&self.temp);
        }
        leased.give_back();
    }
}

impl SshUpload {
    /// The stream, once nothing is on its way.
    async fn ready(&mut self) -> Result<Box<Stream>, StoreError> {
        let cancelled = StoreError::Cancelled { store: self.inner.name.clone(), operation: "an upload" };
        match std::mem::replace(&mut self.state, State::Broken) {
            State::Ready(stream) => Ok(stream),
            State::Sending(sending) => joined(&self.inner, "write", sending).await,
            State::Broken => Err(cancelled),
        }
    }
}

#[async_trait]
impl Upload for SshUpload {
    async fn write(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        if matches!(self.state, State::Broken) {
            self.ready().await?;
        }
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let take = rest.len().min(GATHER_BYTES - self.gathered.len());
            self.gathered.extend_from_slice(&rest[..take]);
            rest = &rest[take..];
            if self.gathered.len() == GATHER_BYTES {
                let mut stream = self.ready().await?;
                let bytes = std::mem::replace(&mut self.gathered, Vec::with_capacity(GATHER_BYTES));
                self.state = State::Sending(tokio::task::spawn_blocking(move || {
                    stream.send(&bytes)?;
                    Ok(stream)
                }));
            }
        }
        Ok(())
    }

    async fn finish(&mut self, key: &Key) -> Result<(), StoreError> {
        let stream = self.ready().await?;
        let (key, last) = (key.clone(), std::mem::take(&mut self.gathered));
        let finishing = tokio::task::spawn_blocking(move || stream.finish(&last, &key));
        joined(&self.inner, "write", finishing).await
    }
}

impl Drop for SshUpload {
    fn drop(&mut self) {
        // One that sends is dropped on its own thread. Dropping speaks to the server, so it is not done here.
        if let State::Ready(stream) = std::mem::replace(&mut self.state, State::Broken)
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn_blocking(move || drop(stream));
        }
    }
}
