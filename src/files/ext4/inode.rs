//! Inodes: what a file is, whose, when, and where its map begins.
//!
//! Enters: the bytes of a record. Leaves: an [`Inode`]; no number in it is checked against the device yet.

use bytes::Bytes;

use super::bytes::{joined, u16_at, u32_at};
use crate::files::FilesError;
use crate::files::source::range_at;
use crate::units::ByteRange;

/// The part of the record that every filesystem has.
const GOOD_OLD: usize = 128;
const I_BLOCK: std::ops::Range<usize> = 0x28..0x64;

const FLAG_ENCRYPT: u32 = 0x800;
const FLAG_EXTENTS: u32 = 0x8_0000;
const FLAG_INLINE_DATA: u32 = 0x1000_0000;

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A plain file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Link,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

impl Kind {
    pub(super) fn of_mode(mode: u16) -> Option<Kind> {
        Some(match mode >> 12 {
            0x1 => Kind::Fifo,
            0x2 => Kind::CharDevice,
            0x4 => Kind::Directory,
            0x6 => Kind::BlockDevice,
            0x8 => Kind::File,
            0xa => Kind::Link,
            0xc => Kind::Socket,
            _ => return None,
        })
    }

    pub(super) fn of_entry(byte: u8) -> Option<Kind> {
        Some(match byte {
            1 => Kind::File,
            2 => Kind::Directory,
            3 => Kind::CharDevice,
            4 => Kind::BlockDevice,
            5 => Kind::Fifo,
            6 => Kind::Socket,
            7 => Kind::Link,
            _ => return None,
        })
    }

    /// For sentences.
    pub fn words(self) -> &'static str {
        match self {
            Kind::File => "a file",
            Kind::Directory => "a directory",
            Kind::Link => "a symbolic link",
            Kind::CharDevice => "a character device",
            Kind::BlockDevice => "a block device",
            Kind::Fifo => "a named pipe",
            Kind::Socket => "a socket",
        }
    }

    /// The letter `ls -l` begins a line with.
    pub fn letter(self) -> char {
        match self {
            Kind::File => '-',
            Kind::Directory => 'd',
            Kind::Link => 'l',
            Kind::CharDevice => 'c',
            Kind::BlockDevice => 'b',
            Kind::Fifo => 'p',
            Kind::Socket => 's',
        }
    }
}

/// A moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time {
    /// Seconds since 1970.
    pub seconds: i64,
    /// And so many billionths.
    pub nanoseconds: u32,
}

impl Time {
    /// The low half is signed; two bits of the other extend it, the rest are nanoseconds.
    fn of(low: u32, extra: u32) -> Time {
        let seconds = i64::from(low as i32) + (i64::from(extra & 3) << 32);
        Time { seconds, nanoseconds: (extra >> 2).min(999_999_999) }
    }
}

/// A file's record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inode {
    /// Its number.
    pub number: u32,
    /// What it is.
    pub kind: Kind,
    /// Permissions, with set-uid, set-gid and sticky bits.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes.
    pub size: u64,
    /// Names it has.
    pub links: u16,
    /// When its content was changed last.
    pub modified: Time,
    /// When it was made; zero where the record is too short to say.
    pub created: Time,
    /// Changes when the number is used for another file.
    pub generation: u32,
    /// The block of its attributes; 0: none.
    pub(super) xattr_block: u64,
    pub(super) flags: u32,
    pub(super) map: [u8; 60],
    /// What follows the fixed part: attributes.
    pub(super) tail: Bytes,
}

impl Inode {
    /// Reads a record.
    pub(super) fn parse(number: u32, bytes: &Bytes) -> Result<Inode, FilesError> {
        let mode = u16_at(bytes, 0);
        let kind = Kind::of_mode(mode).ok_or_else(|| {
            FilesError::damaged(
                format!("inode {number}"),
                "it is no kind of file, though a name is given to it",
            )
        })?;
        let extra = if bytes.len() > GOOD_OLD { usize::from(u16_at(bytes, 0x80)) } else { 0 };
        let fixed = GOOD_OLD.saturating_add(extra).min(bytes.len());
        // Fields beyond the fixed part that this file has are attributes.
        let late = |at: usize| if at + 4 <= fixed { u32_at(bytes, at) } else { 0 };
        let high = if matches!(kind, Kind::File | Kind::Directory) { u32_at(bytes, 0x6c) } else { 0 };
        let mut map = [0; 60];
        map.copy_from_slice(bytes.get(I_BLOCK).unwrap_or(&[0; 60]));
        Ok(Inode {
            number,
            kind,
            permissions: mode & 0o7777,
            uid: u32::from(u16_at(bytes, 2)) | u32::from(u16_at(bytes, 0x78)) << 16,
            gid: u32::from(u16_at(bytes, 0x18)) | u32::from(u16_at(bytes, 0x7a)) << 16,
            size: joined(u32_at(bytes, 4), high),
            links: u16_at(bytes, 0x1a),
            modified: Time::of(u32_at(bytes, 0x10), late(0x88)),
            created: Time::of(late(0x90), late(0x94)),
            generation: u32_at(bytes, 0x64),
            xattr_block: joined(u32_at(bytes, 0x68), u16_at(bytes, 0x76).into()),
            flags: u32_at(bytes, 0x20),
            map,
            // A copy: an inode that is kept must not keep a chunk in memory.
            tail: Bytes::copy_from_slice(&bytes[fixed..]),
        })
    }

    /// Whether this record is a file's at all: what is deleted has no links, what was never used no kind.
    pub(in crate::files) fn is_in_use(bytes: &[u8]) -> bool {
        Kind::of_mode(u16_at(bytes, 0)).is_some() && u16_at(bytes, 0x1a) > 0
    }

    /// Whether the filesystem has its content encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.flags & FLAG_ENCRYPT != 0
    }

    /// What of the device its attributes take.
    pub(in crate::files) fn xattr_block_range(&self, block_len: u64) -> Option<ByteRange> {
        let at = self.xattr_block.saturating_mul(block_len);
        (at != 0).then(|| range_at(at, block_len))
    }

    pub(super) fn has_extents(&self) -> bool {
        self.flags & FLAG_EXTENTS != 0
    }

    pub(super) fn is_inline(&self) -> bool {
        self.flags & FLAG_INLINE_DATA != 0
    }

    /// The target of a short symbolic link, which is in the record.
    pub(super) fn fast_link(&self) -> Option<Bytes> {
        // Some writers say of every file that it has extents.
        let has_map = self.has_extents() && u16_at(&self.map, 0) == super::extents::MAGIC;
        let fits = self.kind == Kind::Link && self.size < 60 && !has_map && !self.is_inline();
        fits.then(|| Bytes::copy_from_slice(&self.map[..self.size as usize]))
    }

    /// Whether it has no blocks whatever its map says: devices, pipes, sockets, short links.
    pub(super) fn has_no_map(&self) -> bool {
        !matches!(self.kind, Kind::File | Kind::Directory | Kind::Link) || self.fast_link().is_some()
    }

    /// Major and minor number of a device.
    pub fn device(&self) -> Option<(u32, u32)> {
        if !matches!(self.kind, Kind::CharDevice | Kind::BlockDevice) {
            return None;
        }
        let (old, new) = (u32_at(&self.map, 0), u32_at(&self.map, 4));
        Some(match old {
            0 => ((new & 0xf_ff00) >> 8, new & 0xff | new >> 12 & 0xf_ff00),
            old => (old >> 8 & 0xff, old & 0xff),
        })
    }
}
