//! Extended attributes: read from any kind of file, and turned into what ext4 stores.
//!
//! Enters: a directory's descriptor and a name. Leaves: sorted attributes; POSIX ACLs in ext4's own form.
//! Invariant: no symbolic link is followed, and no more than the kernel's limits is allocated (64 KiB a value, 64 KiB
//! of names). There is no system call for attributes relative to a directory before Linux 6.13, so the path goes
//! through `/proc/self/fd`, which pins the directory just as well.

use std::ffi::{CStr, CString};
use std::io::Write;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

use super::tree::Xattr;

/// XATTR_LIST_MAX and XATTR_SIZE_MAX of linux/limits.h.
const KERNEL_MAX: usize = 65536;

/// Reads attributes, with buffers of its own.
pub(crate) struct XattrReader {
    path: Vec<u8>,
    names: Vec<u8>,
    value: Vec<u8>,
}

impl XattrReader {
    /// `None` where /proc is not mounted, so that attributes can't be read.
    pub(crate) fn new() -> Option<XattrReader> {
        rustix::fs::access("/proc/self/fd", rustix::fs::Access::EXISTS).ok()?;
        Some(XattrReader { path: Vec::new(), names: vec![0; KERNEL_MAX], value: vec![0; KERNEL_MAX] })
    }

    /// All attributes of `name` in `dir` that this user can see, sorted by name.
    ///
    /// ENOTSUP: the filesystem has none. ENODATA: one went away between being listed and read.
    pub(crate) fn read(&mut self, dir: BorrowedFd<'_>, name: &CStr) -> rustix::io::Result<Vec<Xattr>> {
        let path = path_through_proc(&mut self.path, dir, name);
        let len = rustix::fs::llistxattr(path, &mut self.names[..])?;
        let mut found = Vec::new();
        for attribute in self.names[..len].split_inclusive(|&byte| byte == 0) {
            let attribute = CStr::from_bytes_with_nul(attribute).map_err(|_| Errno::IO)?;
            let len = rustix::fs::lgetxattr(path, attribute, &mut self.value[..])?;
            found.push(Xattr { name: attribute.to_bytes().into(), value: self.value[..len].into() });
        }
        // XFS shows an ACL a second time, in its own form, to those who may see trusted attributes.
        if found.iter().any(|xattr| xattr.name.starts_with(b"system.posix_acl_")) {
            found.retain(|xattr| !xattr.name.starts_with(b"trusted.SGI_ACL_"));
        }
        found.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }
}

/// Sets attributes, the same way.
pub(crate) struct XattrWriter {
    path: Vec<u8>,
}

impl XattrWriter {
    pub(crate) fn new() -> XattrWriter {
        XattrWriter { path: Vec::new() }
    }

    /// Sets one attribute of `name` in `dir`.
    pub(crate) fn set(&mut self, dir: BorrowedFd<'_>, name: &CStr, xattr: &Xattr) -> rustix::io::Result<()> {
        let path = path_through_proc(&mut self.path, dir, name);
        let attribute = CString::new(&xattr.name[..]).map_err(|_| Errno::INVAL)?;
        rustix::fs::lsetxattr(path, &*attribute, &xattr.value, rustix::fs::XattrFlags::empty())
    }
}

/// A path to `name` in an open directory.
fn path_through_proc<'b>(buffer: &'b mut Vec<u8>, dir: BorrowedFd<'_>, name: &CStr) -> &'b CStr {
    buffer.clear();
    write!(buffer, "/proc/self/fd/{}/", dir.as_raw_fd()).expect("a Vec takes every write");
    buffer.extend_from_slice(name.to_bytes_with_nul());
    CStr::from_bytes_with_nul(buffer).expect("the name brought the only NUL")
}

/// Where an attribute goes in ext4.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ext4Xattr {
    /// Stored with this value.
    Stored(Vec<u8>),
    /// ext4 has no place for this name.
    NoPlace,
}

/// What ext4 stores for an attribute.
pub(crate) fn for_ext4(xattr: &Xattr) -> Ext4Xattr {
    match &xattr.name[..] {
        b"system.posix_acl_access" | b"system.posix_acl_default" => {
            acl_to_ext4(&xattr.value).map_or(Ext4Xattr::NoPlace, Ext4Xattr::Stored)
        }
        name if [&b"user."[..], b"trusted.", b"security."].iter().any(|space| name.starts_with(space)) => {
            Ext4Xattr::Stored(xattr.value.to_vec())
        }
        _ => Ext4Xattr::NoPlace,
    }
}

/// A POSIX ACL from the form of the system call (linux/posix_acl_xattr.h: version 2, entries of 8 bytes) to ext4's
/// (fs/ext4/acl.h: version 1, an id only where the entry names a user or a group). `None` where it is neither.
fn acl_to_ext4(value: &[u8]) -> Option<Vec<u8>> {
    const USER: u16 = 0x02;
    const GROUP: u16 = 0x08;
    let (version, entries) = value.split_first_chunk::<4>()?;
    if u32::from_le_bytes(*version) != 2 || entries.len() % 8 != 0 {
        return None;
    }
    let mut out = 1u32.to_le_bytes().to_vec();
    for entry in entries.chunks_exact(8) {
        out.extend_from_slice(&entry[..4]);
        let tag = u16::from_le_bytes([entry[0], entry[1]]);
        if tag == USER || tag == GROUP {
            out.extend_from_slice(&entry[4..]);
        }
    }
    Some(out)
}

/// Attribute bytes of an inode of 256 bytes with 32 bytes of extra fields: magic, entries and values.
const INODE_XATTR_BYTES: usize = 96 - 4;
/// Attribute bytes of a block after its header.
const BLOCK_XATTR_BYTES: usize = 4096 - 32;

/// Where a file's attributes go, by the writer's rule: in order into the inode while they fit, the rest into a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ext4Room {
    /// The inode is enough.
    Inode,
    /// One block more.
    Block,
    /// Neither is enough.
    TooBig,
}

/// How much room attributes take, given as (on-disk sort key, name length without prefix, value length).
pub(crate) fn room(xattrs: &[(u8, &[u8], usize)]) -> Ext4Room {
    let mut sorted: Vec<_> = xattrs.to_vec();
    sorted.sort_unstable_by(|a, b| (a.0, a.1.len(), a.1).cmp(&(b.0, b.1.len(), b.1)));
    let size = |&(_, name, value): &(u8, &[u8], usize)| {
        16 + name.len().next_multiple_of(4) + value.next_multiple_of(4)
    };
    // 4 bytes end the list.
    let mut used = 4;
    let inside = sorted
        .iter()
        .take_while(|xattr| {
            used += size(xattr);
            used <= INODE_XATTR_BYTES
        })
        .count();
    let rest: usize = sorted[inside..].iter().map(size).sum();
    match rest {
        0 => Ext4Room::Inode,
        bytes if bytes + 4 <= BLOCK_XATTR_BYTES => Ext4Room::Block,
        _ => Ext4Room::TooBig,
    }
}

/// ext4's number for an attribute's prefix, and the name after it (fs/ext4/xattr.h).
pub(crate) fn ext4_name(name: &[u8]) -> (u8, &[u8]) {
    for (prefix, index) in [(&b"user."[..], 1), (b"trusted.", 4), (b"security.", 6)] {
        if let Some(rest) = name.strip_prefix(prefix) {
            return (index, rest);
        }
    }
    match name {
        b"system.posix_acl_access" => (2, b""),
        b"system.posix_acl_default" => (3, b""),
        _ => (7, name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_acl_keeps_ids_only_for_named_users_and_groups() {
        let entry = |tag: u16, perm: u16, id: u32| {
            [&tag.to_le_bytes()[..], &perm.to_le_bytes()[..], &id.to_le_bytes()[..]].concat()
        };
        let value = [
            2u32.to_le_bytes().to_vec(),
            entry(1, 7, u32::MAX),
            entry(2, 5, 1000),
            entry(4, 0, u32::MAX),
            entry(8, 4, 2000),
            entry(16, 7, u32::MAX),
            entry(32, 0, u32::MAX),
        ]
        .concat();
        let stored = acl_to_ext4(&value).unwrap();
        assert_eq!(stored.len(), 4 + 4 * 4 + 2 * 8);
        assert_eq!(stored[..12], [1, 0, 0, 0, 1, 0, 7, 0, 2, 0, 5, 0]);
        assert_eq!(stored[12..16], 1000u32.to_le_bytes());
    }

    #[test]
    fn an_acl_of_another_version_or_length_is_refused() {
        assert_eq!(acl_to_ext4(&[3, 0, 0, 0]), None);
        assert_eq!(acl_to_ext4(&[2, 0, 0, 0, 1]), None);
        assert_eq!(acl_to_ext4(&[2, 0]), None);
    }

    #[test]
    fn attributes_spill_from_the_inode_to_a_block_and_then_to_nowhere() {
        assert_eq!(room(&[]), Ext4Room::Inode);
        assert_eq!(room(&[(1, b"a", 60)]), Ext4Room::Inode);
        assert_eq!(room(&[(1, b"a", 72)]), Ext4Room::Block);
        assert_eq!(room(&[(1, b"a", 4040)]), Ext4Room::Block);
        assert_eq!(room(&[(1, b"a", 4044)]), Ext4Room::TooBig);
    }
}
