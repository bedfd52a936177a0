//! From a stream to a commit: the sink that stores an image in a repository.
//!
//! Enters: an image's bytes and holes. Leaves: a commit on the branch, or nothing. Invariant: the branch moves in [`CommitSink::finish`] and nowhere else; a
//! sink that is dropped leaves it where it was.

use tokio::runtime::Handle;

use crate::repo::{CommitMeta, Finished, ImageName, ImageWriter, RepoError, Repository, WriterParams};
use crate::units::ByteLen;

use super::sink::{ImageSink, SinkError};

/// Stores what it is given as the next commit of an image. Blocking, as [`ImageWriter`] is.
pub struct CommitSink {
    handle: Handle,
    repository: Repository,
    image: ImageName,
    params: WriterParams,
    writer: Option<ImageWriter>,
}

impl CommitSink {
    /// A sink for the next commit of `image`; the size in `params` is replaced by the image's own.
    pub fn new(handle: Handle, repository: Repository, image: ImageName, params: WriterParams) -> CommitSink {
        CommitSink { handle, repository, image, params, writer: None }
    }

    /// Writes the commit and moves the branch. To be called only if the whole image came.
    pub fn finish(self, meta: CommitMeta) -> Result<Finished, RepoError> {
        self.writer.ok_or(RepoError::WriterStopped { why: "no image was given to it" })?.finish(meta)
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
        let writer = ImageWriter::new(&self.handle, &self.repository, &self.image, params);
        self.writer = Some(writer.map_err(SinkError::new)?);
        Ok(())
    }

    fn data(&mut self, bytes: &[u8]) -> Result<(), SinkError> {
        self.writer()?.data(bytes).map_err(SinkError::new)
    }

    fn hole(&mut self, len: ByteLen) -> Result<(), SinkError> {
        self.writer()?.hole(len).map_err(SinkError::new)
    }
}
