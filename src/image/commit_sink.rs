//! From a stream to a commit: the sink that stores an image in a repository.
//!
//! Enters: an image's bytes and holes. Leaves: a commit on the branch, or nothing. Invariant: the branch moves in [`CommitSink::finish`] and nowhere else; a
//! sink that is dropped leaves it where it was.

use std::sync::Arc;

use tokio::runtime::Handle;

use crate::repo::{CommitMeta, Finished, ImageName, ImageWriter, RepoError, Repository, WriterParams};
use crate::store::{Store, StoreError};
use crate::units::ByteLen;

use super::sink::{ImageSink, SinkError};

/// Where the image goes.
#[derive(Clone, Debug)]
pub enum Target {
    /// Into a repository.
    Open(Repository),
    /// Into one that is made once there is an image to put in it, and gets this id.
    New {
        /// Where it is made.
        store: Arc<dyn Store>,
        /// Its id, which should be random.
        id: [u8; 16],
    },
}

impl Target {
    /// The repository on `store`, or that there is to be one.
    pub async fn find(store: Arc<dyn Store>, id: [u8; 16]) -> Result<Target, RepoError> {
        match Repository::open(store.clone()).await {
            Ok(repository) => Ok(Target::Open(repository)),
            Err(RepoError::NotARepository { .. } | RepoError::Store(StoreError::NoPlace { .. })) => {
                // Said now rather than after the directory was walked.
                match store.occupant().await? {
                    Some(occupant) => Err(RepoError::Occupied { place: store.describe(), occupant }),
                    None => Ok(Target::New { store, id }),
                }
            }
            Err(error) => Err(error),
        }
    }

    async fn open(self) -> Result<Repository, RepoError> {
        match self {
            Target::Open(repository) => Ok(repository),
            Target::New { store, id } => Repository::open_or_create(store, id).await,
        }
    }
}

/// Stores what it is given as the next commit of an image. Blocking, as [`ImageWriter`] is.
pub struct CommitSink {
    handle: Handle,
    target: Target,
    image: ImageName,
    params: WriterParams,
    writer: Option<ImageWriter>,
    repository: Option<Repository>,
}

impl CommitSink {
    /// A sink for the next commit of `image`; the size in `params` is replaced by the image's own.
    pub fn new(handle: Handle, target: Target, image: ImageName, params: WriterParams) -> CommitSink {
        CommitSink { handle, target, image, params, writer: None, repository: None }
    }

    /// Writes the commit and moves the branch of the repository that comes back too. To be called only if the whole image came.
    pub fn finish(self, meta: CommitMeta) -> Result<(Finished, Repository), RepoError> {
        let empty = || RepoError::WriterStopped { why: "no image was given to it" };
        let (writer, repository) = self.writer.zip(self.repository).ok_or_else(empty)?;
        Ok((writer.finish(meta)?, repository))
    }

    fn writer(&mut self) -> Result<&mut ImageWriter, SinkError> {
        self.writer
            .as_mut()
            .ok_or_else(|| SinkError::new(RepoError::WriterStopped { why: "the image had no beginning" }))
    }
}

impl ImageSink for CommitSink {
    fn begin(&mut self, device: ByteLen) -> Result<(), SinkError> {
        let params = WriterParams { size: device, ..self.params.clone() };
        let repository = self.handle.block_on(self.target.clone().open()).map_err(SinkError::new)?;
        let writer = ImageWriter::new(&self.handle, &repository, &self.image, params);
        self.writer = Some(writer.map_err(SinkError::new)?);
        self.repository = Some(repository);
        Ok(())
    }

    fn data(&mut self, bytes: &[u8]) -> Result<(), SinkError> {
        self.writer()?.data(bytes).map_err(SinkError::new)
    }

    fn hole(&mut self, len: ByteLen) -> Result<(), SinkError> {
        self.writer()?.hole(len).map_err(SinkError::new)
    }
}
