//! Commits: one version of an image, for ever.
//!
//! Enters: the bytes of a commit object whose id was checked. Leaves: a [`Commit`] whose sizes are allowed ones.
//! Invariant: a commit has one spelling, so equal commits have equal ids.

use std::fmt;
use std::str::FromStr;

use super::text::{TextReader, TextWriter, parse_decimal};
use super::{ChunkSize, CommitId, FormatError, NodeId};
use crate::units::{BlockIndex, ByteLen, ByteOffset, PAGE_SIZE};

const WHAT: &str = CommitId::WHAT;
const KIND: &str = "horcrux-commit";
const VERSION: u64 = 1;

/// The largest device: 2^50 bytes.
pub const MAX_DEVICE_SIZE: ByteLen = ByteLen(1 << 50);
/// The longest message, in bytes, that a commit can have.
pub const MAX_MESSAGE_BYTES: usize = 64 << 10;
/// The longest author, in bytes.
pub const MAX_AUTHOR_BYTES: usize = 1024;
/// The most parents a commit may have.
pub const MAX_PARENTS: usize = 16;

/// The size of the blocks of an image: a power of two from 1 MiB to 1 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockSize(u8);

impl BlockSize {
    /// Smallest log2.
    pub const MIN_LOG2: u8 = 20;
    /// Largest log2.
    pub const MAX_LOG2: u8 = 30;
    /// 64 MiB.
    pub const DEFAULT: BlockSize = BlockSize(26);

    /// The block size of 2^`log2` bytes, where that is allowed.
    pub const fn from_log2(log2: u8) -> Option<BlockSize> {
        if log2 < Self::MIN_LOG2 || log2 > Self::MAX_LOG2 { None } else { Some(BlockSize(log2)) }
    }

    /// The block size of `len` bytes, where that is allowed.
    pub const fn from_len(len: ByteLen) -> Option<BlockSize> {
        if len.0.is_power_of_two() { Self::from_log2(len.0.trailing_zeros() as u8) } else { None }
    }

    /// log2 of the size in bytes.
    pub const fn log2(self) -> u8 {
        self.0
    }

    /// The size in bytes.
    pub const fn len(self) -> ByteLen {
        ByteLen(1 << self.0)
    }

    /// The block that holds the byte at `at`.
    #[inline]
    pub const fn block_of(self, at: ByteOffset) -> BlockIndex {
        BlockIndex(at.0 >> self.0)
    }

    /// How many blocks a device of `size` bytes has.
    pub const fn blocks(self, size: ByteLen) -> u64 {
        size.0.div_ceil(1 << self.0)
    }

    /// How many chunks of `chunk` bytes one block has: 1 to 16,384.
    pub const fn chunks(self, chunk: ChunkSize) -> u32 {
        1 << (self.0 - chunk.log2())
    }
}

/// The filesystem a device holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Filesystem {
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
    /// None, or one nobody named.
    None,
}

impl Filesystem {
    /// The word in a commit.
    pub const fn as_str(self) -> &'static str {
        match self {
            Filesystem::Ext4 => "ext4",
            Filesystem::Xfs => "xfs",
            Filesystem::None => "none",
        }
    }
}

impl fmt::Display for Filesystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Filesystem {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Filesystem, FormatError> {
        match text {
            "ext4" => Ok(Filesystem::Ext4),
            "xfs" => Ok(Filesystem::Xfs),
            "none" => Ok(Filesystem::None),
            _ => Err(FormatError::Field {
                what: WHAT,
                field: "filesystem",
                value: text.chars().take(80).collect(),
            }),
        }
    }
}

/// A moment: seconds and nanoseconds since 1970, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp {
    /// Whole seconds.
    pub secs: u64,
    /// Nanoseconds, under 1,000,000,000.
    pub nanos: u32,
}

impl Timestamp {
    fn parse(text: &str) -> Option<Timestamp> {
        let (secs, nanos) = text.split_once('.')?;
        let digits = nanos.len() == 9 && nanos.bytes().all(|byte| byte.is_ascii_digit());
        if !digits {
            return None;
        }
        Some(Timestamp { secs: parse_decimal(secs)?, nanos: nanos.parse().ok()? })
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:09}", self.secs, self.nanos)
    }
}

/// The root of a block map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MapRoot {
    /// The whole device is zeros; there is no node.
    Zero,
    /// The root node.
    Node(NodeId),
}

impl fmt::Display for MapRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MapRoot::Zero => f.write_str("zero"),
            MapRoot::Node(id) => id.fmt(f),
        }
    }
}

/// One version of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// The commits it follows: none for the first, more than one for a merge.
    pub parents: Vec<CommitId>,
    /// The root of its block map.
    pub map: MapRoot,
    /// The device's size.
    pub size: ByteLen,
    /// How the device is cut into blocks.
    pub block_size: BlockSize,
    /// How a block is cut into chunks.
    pub chunk_size: ChunkSize,
    /// What the device holds.
    pub filesystem: Filesystem,
    /// Who made it.
    pub author: String,
    /// When.
    pub time: Timestamp,
    /// Why.
    pub message: String,
}

impl Commit {
    /// Checks what [`Commit::decode`] would refuse.
    pub fn validate(&self) -> Result<(), FormatError> {
        let bad = |field, value: String| Err(FormatError::Field { what: WHAT, field, value });
        if self.parents.len() > MAX_PARENTS {
            return bad("parent", format!("{} of them", self.parents.len()));
        }
        if !size_ok(self.size.0) {
            return bad("size", self.size.to_string());
        }
        if !author_ok(&self.author) {
            return bad("author", self.author.chars().take(80).collect());
        }
        if self.message.len() > MAX_MESSAGE_BYTES {
            return bad("message", format!("{} bytes long", self.message.len()));
        }
        if self.time.nanos >= 1_000_000_000 {
            return bad("time", self.time.to_string());
        }
        Ok(())
    }

    /// The object's bytes, of a valid commit.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        self.validate()?;
        let mut writer = TextWriter::new(KIND, VERSION);
        for parent in &self.parents {
            writer.field("parent", parent);
        }
        writer
            .field("map", self.map)
            .field("size", self.size)
            .field("block-size", self.block_size.len())
            .field("chunk-size", self.chunk_size.len())
            .field("filesystem", self.filesystem)
            .field("author", &self.author)
            .field("time", self.time);
        Ok(writer.body(&self.message))
    }

    /// Reads the object's bytes. Whether they are those of a given id is for the caller to check first.
    pub fn decode(bytes: &[u8]) -> Result<Commit, FormatError> {
        let (mut reader, _) = TextReader::new(WHAT, KIND, VERSION..=VERSION, bytes)?;
        let mut parents = Vec::new();
        while reader.next_is("parent") {
            if parents.len() == MAX_PARENTS {
                return Err(FormatError::Field {
                    what: WHAT,
                    field: "parent",
                    value: format!("more than {MAX_PARENTS}"),
                });
            }
            parents.push(reader.parsed("parent", |text| text.parse().ok())?);
        }
        let map = reader.parsed("map", |text| match text {
            "zero" => Some(MapRoot::Zero),
            _ => text.parse().ok().map(MapRoot::Node),
        })?;
        let size = reader.parsed("size", |text| parse_decimal(text).filter(|&size| size_ok(size)))?;
        let block_size =
            reader.parsed("block-size", |text| BlockSize::from_len(ByteLen(parse_decimal(text)?)))?;
        let chunk_size =
            reader.parsed("chunk-size", |text| ChunkSize::from_len(ByteLen(parse_decimal(text)?)))?;
        let filesystem = reader.parsed("filesystem", |text| text.parse().ok())?;
        let author = reader.parsed("author", |text| author_ok(text).then(|| text.to_owned()))?;
        let time = reader.parsed("time", Timestamp::parse)?;
        let message = reader.body("message", MAX_MESSAGE_BYTES)?.to_owned();
        Ok(Commit {
            parents,
            map,
            size: ByteLen(size),
            block_size,
            chunk_size,
            filesystem,
            author,
            time,
            message,
        })
    }

    /// How many blocks the device has.
    pub fn blocks(&self) -> u64 {
        self.block_size.blocks(self.size)
    }
}

fn size_ok(size: u64) -> bool {
    size.is_multiple_of(PAGE_SIZE) && size <= MAX_DEVICE_SIZE.0
}

/// Whether this can be a commit's author: no more than [`MAX_AUTHOR_BYTES`] of one line, without blanks around it.
/// Whether this can be a commit's author.
pub fn author_ok(author: &str) -> bool {
    !author.is_empty()
        && author.len() <= MAX_AUTHOR_BYTES
        && !author.starts_with(' ')
        && !author.ends_with(' ')
        && !author.chars().any(char::is_control)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> Commit {
        Commit {
            parents: vec![CommitId::of(b"parent")],
            map: MapRoot::Node(NodeId::of(b"root")),
            size: ByteLen(20 << 30),
            block_size: BlockSize::DEFAULT,
            chunk_size: ChunkSize::DEFAULT,
            filesystem: Filesystem::Ext4,
            author: "Zoë <zoe@example.org>".into(),
            time: Timestamp { secs: 1_750_000_000, nanos: 7 },
            message: "Quarter's end\n\nAfter the audit.\n".into(),
        }
    }

    #[test]
    fn a_commit_survives_its_bytes() {
        for commit in [
            sample(),
            Commit { parents: vec![], map: MapRoot::Zero, message: String::new(), ..sample() },
            Commit { parents: vec![CommitId([1; 32]), CommitId([2; 32])], ..sample() },
        ] {
            assert_eq!(Commit::decode(&commit.encode().unwrap()), Ok(commit));
        }
    }

    #[test]
    fn values_that_would_not_read_back_are_not_written() {
        for bad in [
            Commit { author: String::new(), ..sample() },
            Commit { author: "a\nmap zero".into(), ..sample() },
            Commit { author: " a".into(), ..sample() },
            Commit { size: ByteLen(4097), ..sample() },
            Commit { size: ByteLen((1 << 50) + 4096), ..sample() },
            Commit { message: "x".repeat(MAX_MESSAGE_BYTES + 1), ..sample() },
            Commit { time: Timestamp { secs: 0, nanos: 1_000_000_000 }, ..sample() },
            Commit { parents: vec![CommitId([0; 32]); MAX_PARENTS + 1], ..sample() },
        ] {
            assert!(bad.encode().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn sizes_that_are_not_allowed_are_refused_by_name() {
        let text = String::from_utf8(sample().encode().unwrap()).unwrap();
        for (from, to, field) in [
            ("block-size 67108864", "block-size 67108865", "block-size"),
            ("block-size 67108864", "block-size 524288", "block-size"),
            ("chunk-size 131072", "chunk-size 4096", "chunk-size"),
            ("size 21474836480", "size 21474836481", "size"),
            ("filesystem ext4", "filesystem fat", "filesystem"),
            ("time 1750000000.000000007", "time 1750000000.7", "time"),
        ] {
            let error = Commit::decode(text.replace(from, to).as_bytes()).unwrap_err();
            assert!(error.to_string().contains(field), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic_and_what_reads_writes_the_same(tail in proptest::collection::vec(any::<u8>(), 0..400), at in 0usize..400) {
            let mut bytes = sample().encode().unwrap();
            let at = at.min(bytes.len());
            let end = (at + tail.len()).min(bytes.len());
            bytes[at..end].copy_from_slice(&tail[..end - at]);
            if let Ok(commit) = Commit::decode(&bytes) {
                prop_assert_eq!(commit.encode().unwrap(), bytes);
            }
            let _ = Commit::decode(&tail);
        }
    }
}
