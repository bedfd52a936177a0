//! The headers of a tar archive: POSIX ustar, with pax records for all that does not fit.
//!
//! Enters: facts about a file. Leaves: header bytes. Sources: POSIX.1-2024 "pax", "ustar Interchange Format" and "pax Header Block"; for sparse files GNU tar's format 1.0; for ACLs and attributes
//! the records SCHILY.acl and SCHILY.xattr, which GNU tar, bsdtar and star read.

use super::ext4::{Time, Xattr};

/// Everything in an archive is in blocks of this.
pub(super) const BLOCK: usize = 512;

/// What a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Member<'m> {
    File,
    /// A file in pieces; the bytes that follow are the map and the pieces.
    Sparse {
        size: u64,
    },
    /// Another name of a member before.
    HardLink {
        of: &'m [u8],
    },
    Link {
        to: &'m [u8],
    },
    CharDevice((u32, u32)),
    BlockDevice((u32, u32)),
    Directory,
    Fifo,
}

/// The facts about a member.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts<'m> {
    pub(super) name: &'m [u8],
    pub(super) member: Member<'m>,
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Bytes that follow.
    pub(super) len: u64,
    pub(super) modified: Time,
    pub(super) xattrs: &'m [Xattr],
}

const NAME_BYTES: usize = 100;
/// The largest number in 7 octal digits, and in 11.
const MAX_SHORT: u64 = 0o7_777_777;
const MAX_LONG: u64 = 0o77_777_777_777;

/// The header, with a pax header before it where it needs one.
pub(super) fn header(facts: &Facts<'_>) -> Vec<u8> {
    let records = records(facts);
    let mut bytes = Vec::new();
    if !records.is_empty() {
        let facts = Facts {
            name: b"pax",
            member: Member::File,
            mode: 0o600,
            uid: 0,
            gid: 0,
            len: records.len() as u64,
            modified: Time::default(),
            xattrs: &[],
        };
        bytes.extend_from_slice(&plain(&facts, b'x'));
        bytes.extend_from_slice(&records);
        pad(&mut bytes);
    }
    let kind = match facts.member {
        Member::File | Member::Sparse { .. } => b'0',
        Member::HardLink { .. } => b'1',
        Member::Link { .. } => b'2',
        Member::CharDevice(_) => b'3',
        Member::BlockDevice(_) => b'4',
        Member::Directory => b'5',
        Member::Fifo => b'6',
    };
    bytes.extend_from_slice(&plain(facts, kind));
    bytes
}

/// Zeros up to a whole block.
pub(super) fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
}

/// The map of a sparse file: pieces as offset and length.
pub(super) fn sparse_map(pieces: &[std::ops::Range<u64>], size: u64) -> Vec<u8> {
    // The last one says where the file ends.
    let ends_in_a_hole = pieces.last().is_none_or(|last| last.end < size);
    let mut text = format!("{}\n", pieces.len() + usize::from(ends_in_a_hole));
    for piece in pieces {
        text.push_str(&format!("{}\n{}\n", piece.start, piece.end - piece.start));
    }
    if ends_in_a_hole {
        text.push_str(&format!("{size}\n0\n"));
    }
    let mut bytes = text.into_bytes();
    pad(&mut bytes);
    bytes
}

fn plain(facts: &Facts<'_>, kind: u8) -> [u8; BLOCK] {
    let mut bytes = [0; BLOCK];
    // Who does not know of sparse files extracts the pieces, and not over the file.
    let of_pieces = [&b"GNUSparseFile.0/"[..], last_name(facts.name)].concat();
    let is_sparse = matches!(facts.member, Member::Sparse { .. });
    put(&mut bytes[..NAME_BYTES], if is_sparse { &of_pieces } else { facts.name });
    octal(&mut bytes[100..108], facts.mode.into());
    octal(&mut bytes[108..116], u64::from(facts.uid).min(MAX_SHORT));
    octal(&mut bytes[116..124], u64::from(facts.gid).min(MAX_SHORT));
    octal(&mut bytes[124..136], facts.len.min(MAX_LONG));
    octal(&mut bytes[136..148], facts.modified.seconds.clamp(0, MAX_LONG as i64) as u64);
    bytes[156] = kind;
    match facts.member {
        Member::HardLink { of: name } | Member::Link { to: name } => put(&mut bytes[157..257], name),
        Member::CharDevice((major, minor)) | Member::BlockDevice((major, minor)) => {
            octal(&mut bytes[329..337], u64::from(major).min(MAX_SHORT));
            octal(&mut bytes[337..345], u64::from(minor).min(MAX_SHORT));
        }
        _ => {}
    }
    bytes[257..265].copy_from_slice(b"ustar\x0000");
    bytes[148..156].fill(b' ');
    let sum: u64 = bytes.iter().map(|byte| u64::from(*byte)).sum();
    octal(&mut bytes[148..155], sum);
    bytes[154] = 0;
    bytes
}

fn last_name(path: &[u8]) -> &[u8] {
    let end = path.strip_suffix(b"/").unwrap_or(path);
    let start = end.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
    &end[start..]
}

/// As much of a name as there is room for; the whole one is in a record.
fn put(field: &mut [u8], name: &[u8]) {
    let len = name.len().min(field.len());
    field[..len].copy_from_slice(&name[..len]);
}

/// Digits and a NUL.
fn octal(field: &mut [u8], number: u64) {
    let digits = format!("{number:0width$o}", width = field.len() - 1);
    field[..digits.len()].copy_from_slice(digits.as_bytes());
}

fn records(facts: &Facts<'_>) -> Vec<u8> {
    let mut records = Vec::new();
    match facts.member {
        Member::Sparse { size } => {
            record(&mut records, b"GNU.sparse.major", b"1");
            record(&mut records, b"GNU.sparse.minor", b"0");
            record(&mut records, b"GNU.sparse.name", facts.name);
            record(&mut records, b"GNU.sparse.realsize", size.to_string().as_bytes());
        }
        _ if facts.name.len() > NAME_BYTES => record(&mut records, b"path", facts.name),
        _ => {}
    }
    if let Member::HardLink { of: name } | Member::Link { to: name } = facts.member
        && name.len() > NAME_BYTES
    {
        record(&mut records, b"linkpath", name);
    }
    if facts.len > MAX_LONG {
        record(&mut records, b"size", facts.len.to_string().as_bytes());
    }
    if u64::from(facts.uid) > MAX_SHORT {
        record(&mut records, b"uid", facts.uid.to_string().as_bytes());
    }
    if u64::from(facts.gid) > MAX_SHORT {
        record(&mut records, b"gid", facts.gid.to_string().as_bytes());
    }
    let Time { seconds, nanoseconds } = facts.modified;
    if nanoseconds > 0 || !(0..=MAX_LONG as i64).contains(&seconds) {
        record(&mut records, b"mtime", time(seconds, nanoseconds).as_bytes());
    }
    for xattr in facts.xattrs {
        match xattr.name.as_slice() {
            b"system.posix_acl_access" => {
                record(&mut records, b"SCHILY.acl.access", acl_text(&xattr.value).as_bytes())
            }
            b"system.posix_acl_default" => {
                record(&mut records, b"SCHILY.acl.default", acl_text(&xattr.value).as_bytes())
            }
            // The content of a file that is in its inode.
            b"system.data" => {}
            name => {
                let mut key = b"SCHILY.xattr.".to_vec();
                for byte in name {
                    match byte {
                        // It would end the key.
                        b'=' => key.extend_from_slice(b"%3D"),
                        b'%' => key.extend_from_slice(b"%25"),
                        byte => key.push(*byte),
                    }
                }
                record(&mut records, &key, &xattr.value);
            }
        }
    }
    records
}

/// Decimal, also before 1970.
fn time(seconds: i64, nanoseconds: u32) -> String {
    if seconds < 0 && nanoseconds > 0 {
        return format!("-{}.{:09}", (seconds + 1).unsigned_abs(), 1_000_000_000 - nanoseconds);
    }
    format!("{seconds}.{nanoseconds:09}")
}

/// A record says its own length, its digits included.
fn record(to: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while len != rest + len.to_string().len() {
        len = rest + len.to_string().len();
    }
    to.extend_from_slice(format!("{len} ").as_bytes());
    to.extend_from_slice(key);
    to.push(b'=');
    to.extend_from_slice(value);
    to.push(b'\n');
}

/// An ACL in the words of `setfacl`, with numbers for names.
fn acl_text(acl: &[u8]) -> String {
    let (entries, _) = acl.get(4..).unwrap_or_default().as_chunks::<8>();
    let words = entries.iter().filter_map(|[tag, _, permissions, _, id @ ..]| {
        let id = u32::from_le_bytes(*id);
        let who = match tag {
            0x01 => "user:".to_owned(),
            0x02 => format!("user:{id}"),
            0x04 => "group:".to_owned(),
            0x08 => format!("group:{id}"),
            0x10 => "mask:".to_owned(),
            0x20 => "other:".to_owned(),
            _ => return None,
        };
        let letter = |bit: u8, letter: char| if permissions & bit != 0 { letter } else { '-' };
        Some(format!("{who}:{}{}{}", letter(4, 'r'), letter(2, 'w'), letter(1, 'x')))
    });
    words.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_counts_its_own_digits() {
        for len in [1, 5, 6, 90, 91, 92, 93, 990, 991, 992] {
            let mut bytes = Vec::new();
            record(&mut bytes, b"k", &vec![b'v'; len]);
            let text = String::from_utf8(bytes).unwrap();
            let (said, _) = text.split_once(' ').unwrap();
            assert_eq!(said.parse::<usize>().unwrap(), text.len(), "{len}");
        }
    }

    #[test]
    fn a_moment_before_1970_is_what_it_was() {
        assert_eq!(time(-1, 500_000_000), "-0.500000000");
        assert_eq!(time(-2, 0), "-2.000000000");
        assert_eq!(time(-2, 250_000_000), "-1.750000000");
        assert_eq!(time(3, 1), "3.000000001");
    }

    #[test]
    fn a_sparse_map_ends_where_the_file_does() {
        let (inside, to_the_end) = (4096..8192, 4096..10_000);
        let map = |piece| sparse_map(std::slice::from_ref(piece), 10_000);
        assert!(map(&inside).starts_with(b"2\n4096\n4096\n10000\n0\n"));
        assert!(map(&to_the_end).starts_with(b"1\n4096\n5904\n\0"));
        assert_eq!(sparse_map(&[], 0).len(), BLOCK);
    }
}
