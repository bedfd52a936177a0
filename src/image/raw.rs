//! An existing raw image, or a block device, goes to the sink as it is.
//!
//! Enters: a path. Leaves: its bytes, holes as holes, padded to whole blocks; and which filesystem they are.
//! Invariant: a regular file that changes meanwhile is an error, a block device in use is refused.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use rustix::fs::{Advice, OFlags, SeekFrom};
use rustix::io::Errno;

use super::dirs::stamp_of;
use super::error::ImageError;
use super::note::{NoteKind, Notes};
use super::progress::{Phase, Progress};
use super::sink::{ImageSink, Stream};
use super::tree::BLOCK;
use super::{FsKind, Summary};
use crate::units::{ByteLen, ByteOffset};

/// The size of the one buffer.
const BUFFER_BYTES: usize = 1 << 20;
/// What is read to tell the filesystem.
const HEAD_BYTES: usize = 4096;

/// Emits the raw image or block device at `path` into `sink`.
///
/// A size that is no multiple of 4096 is filled up with zeros, and a note says so.
pub fn image_from_file(
    path: &Path,
    sink: &mut dyn ImageSink,
    progress: &Progress,
) -> Result<Summary, ImageError> {
    let source = |source: io::Error| ImageError::Source { path: path.to_path_buf(), source };
    let read = |source: io::Error| ImageError::Io { what: "read it", path: path.to_path_buf(), source };
    // O_NONBLOCK: a fifo is refused below instead of waited for.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let found = std::fs::metadata(path).map_err(source)?.file_type();
    let is_device = found.is_block_device();
    if !is_device && !found.is_file() {
        let what = io::Error::new(io::ErrorKind::InvalidInput, "neither a file nor a block device");
        return Err(source(what));
    }
    // O_EXCL on a block device: EBUSY where it is mounted or part of something, and so may change under our hands.
    let flags = if is_device { flags | OFlags::EXCL } else { flags };
    let fd =
        rustix::fs::open(path, flags, rustix::fs::Mode::empty()).map_err(|error| source(error.into()))?;
    let before = stamp_of(fd.as_fd()).map_err(|error| source(error.into()))?;
    let file = File::from(fd);
    let len = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|error| source(error.into()))?;
    if len == 0 {
        return Err(source(io::Error::new(io::ErrorKind::InvalidInput, "is empty")));
    }
    let mut notes = Notes::default();
    let device_size = ByteLen(len.next_multiple_of(BLOCK));
    if device_size.value() != len {
        notes.about_image(NoteKind::Padded { from: ByteLen(len) });
    }
    let fs = detect(&file, len).map_err(read)?;

    progress.to_read(len);
    progress.enter(Phase::Read);
    let mut stream = Stream::begin(sink, device_size)?;
    copy(&file, len, &mut stream, progress, |bytes| progress.read(bytes), read)?;
    stream.hole_to(ByteOffset(device_size.value()))?;
    let after = stamp_of(file.as_fd()).map_err(|error| read(error.into()))?;
    if !is_device && let Some(what) = before.difference(&after) {
        return Err(ImageError::Changed { path: path.to_path_buf(), what });
    }
    progress.file_done();
    progress.enter(Phase::Done);
    let bytes_read = progress.bytes_done();
    Ok(Summary { files: 0, dirs: 0, bytes_read, device_size, fs, notes: notes.into_vec() })
}

/// Emits the first `len` bytes of `file`, holes as holes. `read` makes an error of what reading answers.
pub(crate) fn copy(
    file: &File,
    len: u64,
    stream: &mut Stream<'_>,
    progress: &Progress,
    mut count: impl FnMut(u64),
    read: impl Fn(io::Error) -> ImageError,
) -> Result<(), ImageError> {
    // Advice: where it is not taken, reading is slower and still right.
    let _ = rustix::fs::fadvise(file, 0, None, Advice::Sequential);
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut at = 0;
    while at < len {
        let (start, end) = next_data(file, at, len).map_err(|error| read(error.into()))?;
        stream.hole_to(ByteOffset(start))?;
        at = start;
        while at < end {
            if progress.is_cancelled() {
                return Err(ImageError::Cancelled);
            }
            let want = buffer.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
            file.read_exact_at(&mut buffer[..want], at).map_err(&read)?;
            stream.data(&buffer[..want])?;
            at += want as u64;
            count(want as u64);
        }
    }
    Ok(())
}

/// The next range with data from `at` on; (`len`, `len`) where there is none. All of the rest, where holes are not told.
fn next_data(file: &File, at: u64, len: u64) -> rustix::io::Result<(u64, u64)> {
    match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(start) if start < len => Ok((start, rustix::fs::seek(file, SeekFrom::Hole(start))?.min(len))),
        Ok(_) | Err(Errno::NXIO) => Ok((len, len)),
        Err(Errno::INVAL) => Ok((at, len)),
        Err(error) => Err(error),
    }
}

/// Which filesystem an image holds, by its magic.
fn detect(file: &File, len: u64) -> io::Result<Option<FsKind>> {
    let mut head = [0; HEAD_BYTES];
    let have = usize::try_from(len).unwrap_or(HEAD_BYTES).min(HEAD_BYTES);
    file.read_exact_at(&mut head[..have], 0)?;
    Ok(filesystem_of(&head))
}

/// XFS starts with its magic; ext4's superblock is at 1024, its magic 0x38 further on. The version of XFS, or a log
/// device of ext4 (which can't be mounted), are told apart by the mount, not here.
fn filesystem_of(head: &[u8; HEAD_BYTES]) -> Option<FsKind> {
    if head.starts_with(b"XFSB") {
        Some(FsKind::Xfs)
    } else if head[1024 + 0x38..][..2] == [0x53, 0xef] {
        Some(FsKind::Ext4)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filesystems_are_told_by_their_magic() {
        let mut head = [0; HEAD_BYTES];
        assert_eq!(filesystem_of(&head), None);
        head[1080..1082].copy_from_slice(&[0x53, 0xef]);
        assert_eq!(filesystem_of(&head), Some(FsKind::Ext4));
        head[..4].copy_from_slice(b"XFSB");
        assert_eq!(filesystem_of(&head), Some(FsKind::Xfs));
    }
}
