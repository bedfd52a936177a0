//! Files inside versions and volumes, without mounting and without root: listed, read, exported, compared.
//!
//! Enters: bytes of a device, whoever wrote them, and paths. Leaves: entries, contents, tar archives, and what changed between two devices. Invariant: no bytes of an image can
//! make it panic, loop for ever or take memory without bound: every count is checked against what the filesystem can hold, every walk visits a directory once.
//!
//! - [`Source`]: bytes at an offset: of a commit, or of a volume.
//! - [`ext4`]: the filesystem. [`tree`]: paths in it.
//! - [`list`], [`content`], [`archive`]: what `ls`, `cat` and `export` send.
//! - [`request`]: these as streams.
//! - [`changes`]: where two devices differ, at the cost of what differs. [`diff`]: which files that are.

pub mod archive;
pub mod changes;
pub mod content;
pub mod diff;
mod error;
pub mod ext4;
pub mod list;
pub mod request;
mod source;
mod tar;
mod text;
pub mod tree;

pub use error::FilesError;
pub use source::{ChunkMemory, DeviceSource, Source, VersionSource};
pub use tree::FilePath;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Pieces of a stream that wait for their reader.
pub const PIECES: usize = 8;
/// The longest piece of a stream.
pub const PIECE_BYTES: usize = 256 << 10;

/// An answer as it is made: bytes in order, and at last the error if there was one. Invariant: work that did not come to its end is an error too, never an end; and nobody works for a stream
/// that was dropped.
#[derive(Debug)]
pub struct Stream {
    from: mpsc::Receiver<Result<Bytes, FilesError>>,
    work: Option<JoinHandle<()>>,
}

impl Stream {
    /// The stream of a task of its own, which sends to the [`Outlet`] of `from` and ends it.
    pub fn new(
        from: mpsc::Receiver<Result<Bytes, FilesError>>,
        work: impl Future<Output = ()> + Send + 'static,
    ) -> Stream {
        Stream { from, work: Some(tokio::spawn(work)) }
    }

    /// The next piece; `None` at the end. May be given up and asked again.
    pub async fn recv(&mut self) -> Option<Result<Bytes, FilesError>> {
        if let Some(piece) = self.from.recv().await {
            return Some(piece);
        }
        // The pieces end with the task; whether it came to its end only its handle knows.
        let ended = self.work.as_mut()?.await;
        self.work = None;
        ended.err().map(|_| Err(FilesError::Stopped))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(work) = &self.work {
            work.abort();
        }
    }
}

/// Does what takes long without waiting, on a thread that may.
pub(crate) async fn apart<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, FilesError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| FilesError::Stopped)
}

/// Where a stream goes: the receiver sees bytes in order, and at last the error if there was one.
#[derive(Debug)]
pub struct Outlet {
    to: mpsc::Sender<Result<Bytes, FilesError>>,
    gathered: Vec<u8>,
    begun: bool,
}

impl Outlet {
    /// A stream, and its reader.
    pub fn new() -> (Outlet, mpsc::Receiver<Result<Bytes, FilesError>>) {
        let (to, from) = mpsc::channel(PIECES);
        (Outlet { to, gathered: Vec::new(), begun: false }, from)
    }

    /// Sends bytes; small ones are gathered first. Fails when nobody reads any more.
    pub async fn send(&mut self, bytes: &[u8]) -> Result<(), FilesError> {
        for part in bytes.chunks(PIECE_BYTES) {
            self.gathered.extend_from_slice(part);
            if self.gathered.len() >= PIECE_BYTES {
                self.flush().await?;
            }
        }
        Ok(())
    }

    /// Sends a line of JSON.
    pub async fn send_line(&mut self, line: &impl serde::Serialize) -> Result<(), FilesError> {
        let mut text = serde_json::to_vec(line).map_err(|error| FilesError::Answer(error.to_string()))?;
        text.push(b'\n');
        self.send(&text).await
    }

    /// Sends what was gathered.
    pub async fn flush(&mut self) -> Result<(), FilesError> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        let piece = Bytes::from(std::mem::take(&mut self.gathered));
        self.begun = true;
        self.to.send(Ok(piece)).await.map_err(|_| FilesError::NobodyReads)
    }

    /// Ends the stream, with the error where there is one: alone if nothing was sent before, so that who asked is refused with the reason.
    pub async fn end(mut self, result: Result<(), FilesError>) {
        let result = match result {
            Ok(()) => self.flush().await,
            Err(error) => {
                // What came before the error is true.
                if self.begun {
                    let _ = self.flush().await;
                }
                Err(error)
            }
        };
        if let Err(error) = result {
            let _ = self.to.send(Err(error)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_that_dies_is_no_end_of_a_stream() {
        let (mut out, from) = Outlet::new();
        let mut stream = Stream::new(from, async move {
            out.send(&[7; PIECE_BYTES]).await.unwrap();
            panic!("as a bug would have it");
        });
        assert_eq!(stream.recv().await.unwrap().unwrap().len(), PIECE_BYTES);
        assert!(matches!(stream.recv().await, Some(Err(FilesError::Stopped))));
        assert!(stream.recv().await.is_none());
    }

    #[tokio::test]
    async fn nobody_works_for_a_stream_that_was_dropped() {
        let (out, from) = Outlet::new();
        let (works, mut ended) = mpsc::channel::<()>(1);
        let stream = Stream::new(from, async move {
            let _held = (out, works);
            std::future::pending::<()>().await;
        });
        drop(stream);
        assert_eq!(ended.recv().await, None, "what the work held is let go");
    }

    #[tokio::test]
    async fn an_error_before_anything_was_sent_is_told_alone() {
        let (mut out, from) = Outlet::new();
        let mut stream = Stream::new(from, async move {
            out.send(b"a little").await.unwrap();
            out.end(Err(FilesError::Stopped)).await;
        });
        assert!(matches!(stream.recv().await, Some(Err(FilesError::Stopped))));
    }
}
