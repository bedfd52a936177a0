//! An object whose name is known only at its end.
//!
//! Enters: pieces. Leaves: one object. S3 wants the name first, so the pieces wait here: in memory as long as the store's [`Budget`] lasts, else in a
//! nameless file.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::{Bytes, BytesMut};

use super::super::StoreError;

/// Memory that several share. Clones are the same one.
#[derive(Clone, Debug)]
pub(super) struct Budget {
    left: Arc<AtomicUsize>,
}

impl Budget {
    pub(super) fn new(bytes: usize) -> Budget {
        Budget { left: Arc::new(AtomicUsize::new(bytes)) }
    }

    fn take(&self, bytes: usize) -> bool {
        let take = |left: usize| left.checked_sub(bytes);
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    fn give_back(&self, bytes: usize) {
        self.left.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Bytes that wait for their name.
#[derive(Debug)]
pub(super) struct Spool {
    budget: Budget,
    pieces: Vec<Bytes>,
    in_memory: usize,
    file: Option<Arc<File>>,
    in_file: u64,
}

impl Spool {
    pub(super) fn new(budget: Budget) -> Spool {
        Spool { budget, pieces: Vec::new(), in_memory: 0, file: None, in_file: 0 }
    }

    /// Appends bytes.
    pub(super) async fn push(&mut self, bytes: Bytes) -> std::io::Result<()> {
        let fits = self.budget.take(bytes.len());
        if fits {
            self.in_memory += bytes.len();
            self.pieces.push(bytes);
            return Ok(());
        }
        self.spill(bytes).await
    }

    /// Writes what is in memory, and `last` behind it.
    async fn spill(&mut self, last: Bytes) -> std::io::Result<()> {
        let mut pieces = std::mem::take(&mut self.pieces);
        self.budget.give_back(std::mem::take(&mut self.in_memory));
        pieces.push(last);
        let (file, mut at) = (self.file.clone(), self.in_file);
        let spilled = tokio::task::spawn_blocking(move || {
            let file = match file {
                Some(file) => file,
                None => Arc::new(tempfile::tempfile()?),
            };
            for piece in pieces {
                file.write_all_at(&piece, at)?;
                at += piece.len() as u64;
            }
            Ok::<_, std::io::Error>((file, at))
        });
        let (file, at) = spilled.await.map_err(std::io::Error::other)??;
        (self.file, self.in_file) = (Some(file), at);
        Ok(())
    }

    pub(super) fn len(&self) -> u64 {
        self.in_file + self.in_memory as u64
    }

    /// The bytes from `at` on, `len` of them, which must be there.
    pub(super) async fn read(&self, at: u64, len: usize) -> std::io::Result<Bytes> {
        if let Some(file) = &self.file
            && at < self.in_file
        {
            let (file, from_file) = (file.clone(), len.min((self.in_file - at) as usize));
            let read = tokio::task::spawn_blocking(move || {
                let mut bytes = vec![0; from_file];
                file.read_exact_at(&mut bytes, at).map(|()| bytes)
            });
            let mut bytes = BytesMut::from(Bytes::from(read.await.map_err(std::io::Error::other)??));
            if from_file < len {
                bytes.extend_from_slice(&self.in_pieces(0, len - from_file));
            }
            return Ok(bytes.freeze());
        }
        Ok(self.in_pieces((at - self.in_file) as usize, len))
    }

    fn in_pieces(&self, mut at: usize, len: usize) -> Bytes {
        let mut out = BytesMut::with_capacity(len);
        for piece in &self.pieces {
            if at >= piece.len() {
                at -= piece.len();
                continue;
            }
            let take = (piece.len() - at).min(len - out.len());
            if take == len {
                return piece.slice(at..at + take);
            }
            out.extend_from_slice(&piece[at..at + take]);
            at = 0;
            if out.len() == len {
                break;
            }
        }
        out.freeze()
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        self.budget.give_back(self.in_memory);
    }
}

/// A spool's failure as the store's.
pub(super) fn spool_error(store: &str, source: std::io::Error) -> StoreError {
    if source.kind() == std::io::ErrorKind::StorageFull {
        return StoreError::NoSpace {
            store: "the temporary directory".into(),
            what: format!("an object for {store}"),
        };
    }
    StoreError::Io {
        store: store.into(),
        operation: "keep an object before it is sent in",
        path: std::env::temp_dir(),
        source: Arc::new(source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_went_in_comes_out_in_pieces_and_from_the_file() {
        let budget = Budget::new(20_000_000);
        let mut spool = Spool::new(budget.clone());
        let piece: Vec<u8> = (0..1_000_003u32).map(|n| (n % 251) as u8).collect();
        let count = 2 * 20_000_000 / piece.len() + 7;
        for _ in 0..count {
            spool.push(piece.clone().into()).await.unwrap();
        }
        assert_eq!(spool.len(), (count * piece.len()) as u64);
        assert!(spool.file.is_some() && spool.in_memory > 0);
        for at in [0, 1, 999_999, spool.in_file - 5, spool.in_file, spool.len() - 3_000_000] {
            let got = spool.read(at, 3_000_000).await.unwrap();
            let expected = (at..at + 3_000_000).map(|n| piece[(n % 1_000_003) as usize]);
            assert!(got.iter().copied().eq(expected), "at {at}");
        }
        drop(spool);
        assert!(budget.take(20_000_000), "all of it was given back");
    }
}
