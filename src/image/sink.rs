//! Where an image goes: one sequential stream of bytes and holes.
//!
//! Enters: the image, from its first byte to its last. Leaves: whatever the sink makes of it.
//! Invariant: the calls follow one another without a gap, so a sink needs no offsets; the sum of all lengths is
//! the device size.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::units::{ByteLen, ByteOffset};

/// A sink's failure. The image stops at the first one.
#[derive(Debug)]
pub struct SinkError(Box<dyn std::error::Error + Send + Sync>);

impl SinkError {
    /// Wraps the error of whatever stands behind the sink.
    pub fn new(source: impl std::error::Error + Send + Sync + 'static) -> SinkError {
        SinkError(Box::new(source))
    }

    /// The same from an error that is boxed already.
    pub fn from_boxed(source: Box<dyn std::error::Error + Send + Sync>) -> SinkError {
        SinkError(source)
    }

    /// The wrapped error, for a caller that knows its own type.
    pub fn into_inner(self) -> Box<dyn std::error::Error + Send + Sync> {
        self.0
    }
}

impl std::fmt::Display for SinkError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for SinkError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source()
    }
}

impl From<io::Error> for SinkError {
    fn from(source: io::Error) -> SinkError {
        SinkError::new(source)
    }
}

/// Receives an image from its first byte to its last, in order.
///
/// Calls are not aligned to anything. After an error no further call is made.
pub trait ImageSink: Send {
    /// Tells the device's size, before anything else and once.
    fn begin(&mut self, device: ByteLen) -> Result<(), SinkError>;

    /// Appends bytes. They may well be zero: only [`ImageSink::hole`] promises that they are.
    fn data(&mut self, bytes: &[u8]) -> Result<(), SinkError>;

    /// Appends `len` zero bytes, which cost nothing.
    fn hole(&mut self, len: ByteLen) -> Result<(), SinkError>;
}

/// A sink that makes a sparse raw file.
#[derive(Debug)]
pub struct FileSink {
    file: File,
    at: u64,
}

impl FileSink {
    /// Creates or empties the file at `path`.
    pub fn create(path: &Path) -> io::Result<FileSink> {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
        Ok(FileSink { file, at: 0 })
    }

    /// Sets the file's length, so that a hole at the end counts, and returns the file. Nothing is synced.
    pub fn finish(self) -> io::Result<File> {
        self.file.set_len(self.at)?;
        Ok(self.file)
    }
}

impl ImageSink for FileSink {
    fn begin(&mut self, _device: ByteLen) -> Result<(), SinkError> {
        Ok(())
    }

    fn data(&mut self, bytes: &[u8]) -> Result<(), SinkError> {
        self.file.write_all_at(bytes, self.at)?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn hole(&mut self, len: ByteLen) -> Result<(), SinkError> {
        self.at += len.value();
        Ok(())
    }
}

/// A sink with its position: the one place that turns offsets into a stream.
pub(crate) struct Stream<'s> {
    sink: &'s mut dyn ImageSink,
    at: u64,
}

impl<'s> Stream<'s> {
    pub(crate) fn begin(sink: &'s mut dyn ImageSink, device: ByteLen) -> Result<Stream<'s>, SinkError> {
        sink.begin(device)?;
        Ok(Stream { sink, at: 0 })
    }

    /// Where the next byte goes.
    pub(crate) fn at(&self) -> ByteOffset {
        ByteOffset(self.at)
    }

    /// Appends bytes.
    pub(crate) fn data(&mut self, bytes: &[u8]) -> Result<(), SinkError> {
        self.sink.data(bytes)?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    /// Makes one hole up to `to`, which must not lie behind.
    pub(crate) fn hole_to(&mut self, to: ByteOffset) -> Result<(), SinkError> {
        assert!(to.value() >= self.at, "an image is emitted in order: at {} and back to {to}", self.at);
        if to.value() > self.at {
            self.sink.hole(ByteLen(to.value() - self.at))?;
            self.at = to.value();
        }
        Ok(())
    }
}
