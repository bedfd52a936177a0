//! Directories: their entries, in the order of the device.
//!
//! Enters: a directory's inode. Leaves: names and inode numbers, without `.` and `..`. Invariant: a name has no `/` and no NUL, and is 1 to 255 bytes; an encrypted one, which may be any bytes, is
//! told in hexadecimal. The hash index of a large directory looks to a reader of entries like empty blocks, so it is not needed.

use bytes::Bytes;

use super::bytes::{u16_at, u32_at};
use super::{Ext4, Inode, Kind, Layout};
use crate::files::FilesError;
use crate::units::ByteLen;

/// The largest directory that is read.
pub const MAX_DIR_BYTES: u64 = 256 << 20;
/// The most names of one: a directory of this size could have three times as many, of one letter each.
const MAX_NAMES: usize = 8 << 20;

/// A name in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// The name.
    pub name: Bytes,
    /// What has it.
    pub inode: u32,
    /// What that is, where the directory says.
    pub kind: Option<Kind>,
}

impl Ext4 {
    /// The entries of a directory.
    pub async fn read_dir(&self, inode: &Inode, layout: &Layout) -> Result<Vec<DirEntry>, FilesError> {
        let damaged = |why| FilesError::damaged(format!("directory {}", inode.number), why);
        if inode.kind != Kind::Directory {
            return Err(damaged("it is none"));
        }
        let mut entries = Vec::new();
        let form = Form { kinds: self.superblock.entries_have_kinds(), encrypted: inode.is_encrypted() };
        if let Some(inline) = &layout.inline {
            // First the number of its parent; the part in the attributes begins anew.
            const PARENT: usize = 4;
            let (first, rest) = inline.split_at(inline.len().min(inode.map.len()));
            for part in [first.get(PARENT..).unwrap_or_default(), rest] {
                parse(&Bytes::copy_from_slice(part), form, &mut entries).map_err(damaged)?;
            }
            return Ok(entries);
        }
        let block_len = self.block_len();
        if layout.blocks().saturating_mul(block_len) > MAX_DIR_BYTES {
            return Err(damaged("it is too large"));
        }
        for range in layout.data(inode.size, block_len) {
            let mut at = range.start;
            while at < range.end {
                let piece = ByteLen((range.end - at).min(1 << 20));
                // A copy: a name must not keep a whole chunk in memory.
                let bytes = Bytes::copy_from_slice(&self.read_file(inode, layout, at, piece).await?);
                for start in (0..bytes.len()).step_by(block_len as usize) {
                    let end = bytes.len().min(start + block_len as usize);
                    parse(&bytes.slice(start..end), form, &mut entries).map_err(damaged)?;
                }
                if entries.len() > MAX_NAMES {
                    return Err(damaged("it has too many names"));
                }
                at += piece.0;
            }
        }
        Ok(entries)
    }
}

/// How entries are to be read.
#[derive(Clone, Copy)]
struct Form {
    kinds: bool,
    encrypted: bool,
}

/// The entries of one block.
fn parse(block: &Bytes, form: Form, entries: &mut Vec<DirEntry>) -> Result<(), &'static str> {
    const HEADER: usize = 8;
    let mut at = 0;
    while at + HEADER <= block.len() {
        let record = &block[at..];
        let inode = u32_at(record, 0);
        // In blocks of 64 KiB the whole block does not fit the field.
        let len = match u16_at(record, 4) {
            0 | 0xffff if block.len() == 1 << 16 => block.len(),
            len => usize::from(len),
        };
        let name_len = usize::from(record[6]);
        if len < HEADER || len % 4 != 0 || len > record.len() {
            return Err("an entry of impossible length");
        }
        if inode != 0 {
            if name_len == 0 || HEADER + name_len > len {
                return Err("a name longer than its entry");
            }
            let mut name = block.slice(at + HEADER..at + HEADER + name_len);
            if form.encrypted && *name != b"."[..] && *name != b".."[..] {
                name = crate::format::ids::to_hex(&name).into();
            }
            if name.contains(&b'/') || name.contains(&0) {
                return Err("a name that can't be one");
            }
            if *name != b"."[..] && *name != b".."[..] {
                // Else the byte is the upper half of a length.
                let kind = if form.kinds { Kind::of_entry(record[7]) } else { None };
                entries.push(DirEntry { name, inode, kind });
            }
        }
        at += len;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PLAIN: Form = Form { kinds: true, encrypted: false };

    fn entry(inode: u32, len: u16, name: &[u8], kind: u8) -> Vec<u8> {
        let mut bytes = inode.to_le_bytes().to_vec();
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&[name.len() as u8, kind]);
        bytes.extend_from_slice(name);
        bytes.resize(usize::from(len), 0);
        bytes
    }

    #[test]
    fn deleted_names_and_the_checksum_at_the_end_are_passed_over() {
        let block = [
            entry(2, 12, b".", 2),
            entry(2, 12, b"..", 2),
            entry(0, 16, b"gone", 1),
            entry(12, 12, b"here", 1),
            entry(0, 12, b"", 0xde),
        ]
        .concat();
        let mut entries = Vec::new();
        parse(&block.into(), PLAIN, &mut entries).unwrap();
        let found: Vec<_> = entries.iter().map(|entry| (&entry.name[..], entry.inode, entry.kind)).collect();
        assert_eq!(found, [(&b"here"[..], 12, Some(Kind::File))]);
    }

    #[test]
    fn encrypted_names_are_told_in_hexadecimal() {
        let mut entries = Vec::new();
        let form = Form { encrypted: true, ..PLAIN };
        let block = [entry(12, 12, b".", 2), entry(13, 16, b"a/\0\xff", 1)].concat();
        parse(&block.into(), form, &mut entries).unwrap();
        assert_eq!(entries.iter().map(|entry| &entry.name[..]).collect::<Vec<_>>(), [&b"612f00ff"[..]]);
    }

    #[test]
    fn names_that_leave_a_directory_are_damage() {
        for name in [&b"a/b"[..], b"a\0b", b"/"] {
            assert!(parse(&entry(12, 16, name, 1).into(), PLAIN, &mut Vec::new()).is_err(), "{name:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes.into(), PLAIN, &mut Vec::new());
        }
    }
}
