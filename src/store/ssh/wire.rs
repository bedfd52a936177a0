//! SFTP version 3 as bytes: draft-ietf-secsh-filexfer-02, and the `@openssh.com` extensions of OpenSSH's PROTOCOL file.
//!
//! Enters: values. Leaves: packets; and the other way. Invariant: no bytes of a server panic here or make us allocate more than they are long.

use bytes::{Buf, Bytes};

/// The longest packet we take: what OpenSSH itself sends and takes at most.
pub(super) const MAX_PACKET: usize = 256 * 1024;
/// The protocol's version.
pub(super) const VERSION: u32 = 3;

pub(super) const INIT: u8 = 1;
pub(super) const OPEN: u8 = 3;
pub(super) const CLOSE: u8 = 4;
pub(super) const READ: u8 = 5;
pub(super) const WRITE: u8 = 6;
pub(super) const LSTAT: u8 = 7;
pub(super) const FSTAT: u8 = 8;
pub(super) const OPENDIR: u8 = 11;
pub(super) const READDIR: u8 = 12;
pub(super) const REMOVE: u8 = 13;
pub(super) const MKDIR: u8 = 14;
pub(super) const RMDIR: u8 = 15;
pub(super) const STAT: u8 = 17;
pub(super) const RENAME: u8 = 18;
pub(super) const EXTENDED: u8 = 200;

/// How a file is opened.
pub(super) const FOR_READING: u32 = 0x01;
/// Made, and an error if it is there; for writing.
pub(super) const NEW: u32 = 0x02 | 0x08 | 0x20;

/// What a status says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Code {
    Ok,
    Eof,
    NoSuchFile,
    PermissionDenied,
    Failure,
    Unsupported,
    NoSpace,
    /// Any other, by its number.
    Other(u32),
}

impl Code {
    fn new(number: u32) -> Code {
        match number {
            0 => Code::Ok,
            1 => Code::Eof,
            // Later versions of the protocol tell more; some servers send that in version 3 too. 10 is "no such path".
            2 | 10 => Code::NoSuchFile,
            3 | 12 => Code::PermissionDenied,
            4 | 11 => Code::Failure,
            8 => Code::Unsupported,
            14 | 15 => Code::NoSpace,
            other => Code::Other(other),
        }
    }
}

/// What a server tells of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Attrs {
    /// Its length.
    pub len: Option<u64>,
    /// Its type and permissions, as `st_mode` has them.
    pub mode: Option<u32>,
    /// When its content was last changed, in seconds since 1970 by the server's clock.
    pub modified: Option<u32>,
}

impl Attrs {
    /// Whether this is a directory; `None` where the server does not tell.
    pub fn is_dir(&self) -> Option<bool> {
        self.mode.map(|mode| mode & 0o170_000 == 0o040_000)
    }

    /// Whether this is a regular file; `None` where the server does not tell.
    pub fn is_file(&self) -> Option<bool> {
        self.mode.map(|mode| mode & 0o170_000 == 0o100_000)
    }
}

/// A server's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    Status { code: Code, message: String },
    Handle(Bytes),
    Data(Bytes),
    Names(Vec<(Bytes, Attrs)>),
    Attrs(Attrs),
    Extended(Bytes),
}

/// A request being written.
pub(super) struct Request(Vec<u8>);

impl Request {
    /// One of a type; its length and id are filled in at the end.
    pub fn new(kind: u8) -> Request {
        Request(vec![0, 0, 0, 0, kind, 0, 0, 0, 0])
    }

    /// One of an extension.
    pub fn extended(name: &str) -> Request {
        Request::new(EXTENDED).string(name.as_bytes())
    }

    pub fn u32(mut self, value: u32) -> Request {
        self.0.extend_from_slice(&value.to_be_bytes());
        self
    }

    pub fn u64(mut self, value: u64) -> Request {
        self.0.extend_from_slice(&value.to_be_bytes());
        self
    }

    pub fn string(self, bytes: &[u8]) -> Request {
        let mut request = self.u32(bytes.len() as u32);
        request.0.extend_from_slice(bytes);
        request
    }

    /// No attributes: the server's own default mode, less its umask.
    pub fn no_attrs(self) -> Request {
        self.u32(0)
    }

    /// The packet.
    pub fn finish(mut self, id: u32) -> Vec<u8> {
        let len = (self.0.len() - 4) as u32;
        self.0[..4].copy_from_slice(&len.to_be_bytes());
        self.0[5..9].copy_from_slice(&id.to_be_bytes());
        self.0
    }
}

/// The first packet of a session.
pub(super) fn init() -> Vec<u8> {
    let mut packet = vec![0, 0, 0, 5, INIT];
    packet.extend_from_slice(&VERSION.to_be_bytes());
    packet
}

fn take_u32(packet: &mut Bytes) -> Option<u32> {
    (packet.len() >= 4).then(|| packet.get_u32())
}

fn take_u64(packet: &mut Bytes) -> Option<u64> {
    (packet.len() >= 8).then(|| packet.get_u64())
}

fn take_string(packet: &mut Bytes) -> Option<Bytes> {
    let len = take_u32(packet)? as usize;
    (packet.len() >= len).then(|| packet.split_to(len))
}

fn take_attrs(packet: &mut Bytes) -> Option<Attrs> {
    let flags = take_u32(packet)?;
    let mut attrs = Attrs::default();
    if flags & 1 != 0 {
        attrs.len = Some(take_u64(packet)?);
    }
    if flags & 2 != 0 {
        take_u64(packet)?;
    }
    if flags & 4 != 0 {
        attrs.mode = Some(take_u32(packet)?);
    }
    if flags & 8 != 0 {
        // When it was read last, then when it was changed.
        take_u32(packet)?;
        attrs.modified = Some(take_u32(packet)?);
    }
    if flags & 0x8000_0000 != 0 {
        for _ in 0..take_u32(packet)? {
            take_string(packet)?;
            take_string(packet)?;
        }
    }
    Some(attrs)
}

/// Takes apart the answer to [`init`]: the version and the names of the extensions. `None` if it is none.
pub(super) fn version(mut packet: Bytes) -> Option<(u32, Vec<String>)> {
    if packet.is_empty() || packet.get_u8() != 2 {
        return None;
    }
    let version = take_u32(&mut packet)?;
    let mut extensions = Vec::new();
    while !packet.is_empty() {
        extensions.push(String::from_utf8_lossy(&take_string(&mut packet)?).into_owned());
        take_string(&mut packet)?;
    }
    Some((version, extensions))
}

/// Takes apart an answer (without its length): the request's id, and what it says. `None` if it makes no sense.
pub(super) fn reply(mut packet: Bytes) -> Option<(u32, Reply)> {
    if packet.is_empty() {
        return None;
    }
    let kind = packet.get_u8();
    let id = take_u32(&mut packet)?;
    let reply = match kind {
        101 => {
            let code = Code::new(take_u32(&mut packet)?);
            // Very old servers send no message.
            let message = take_string(&mut packet).unwrap_or_default();
            Reply::Status { code, message: String::from_utf8_lossy(&message).into_owned() }
        }
        102 => Reply::Handle(take_string(&mut packet)?),
        103 => Reply::Data(take_string(&mut packet)?),
        104 => {
            let count = take_u32(&mut packet)?;
            let mut names = Vec::new();
            for _ in 0..count {
                let name = take_string(&mut packet)?;
                take_string(&mut packet)?;
                names.push((name, take_attrs(&mut packet)?));
            }
            Reply::Names(names)
        }
        105 => Reply::Attrs(take_attrs(&mut packet)?),
        201 => Reply::Extended(packet),
        _ => return None,
    };
    Some((id, reply))
}

/// What `statvfs@openssh.com` tells of the room on a filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Room {
    /// No block or no inode is left for this user.
    pub full: bool,
    /// It is mounted read-only.
    pub read_only: bool,
}

/// Takes apart the answer to `statvfs@openssh.com`: eleven numbers.
pub(super) fn room(mut answer: Bytes) -> Option<Room> {
    let mut numbers = [0; 11];
    for number in &mut numbers {
        *number = take_u64(&mut answer)?;
    }
    let [_, _, blocks, _, free_blocks, inodes, _, free_inodes, _, flags, _] = numbers;
    // A filesystem that does not count its inodes says zero of zero.
    let full = (blocks > 0 && free_blocks == 0) || (inodes > 0 && free_inodes == 0);
    Some(Room { full, read_only: flags & 1 != 0 })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_request_is_its_length_type_id_and_fields() {
        let packet = Request::new(OPEN).string(b"/a").u32(FOR_READING).no_attrs().finish(7);
        assert_eq!(packet, b"\0\0\0\x13\x03\0\0\0\x07\0\0\0\x02/a\0\0\0\x01\0\0\0\0");
        assert_eq!(init(), b"\0\0\0\x05\x01\0\0\0\x03");
    }

    #[test]
    fn answers_are_taken_apart_and_cut_ones_refused() {
        let mut names = b"\x68\0\0\0\x05\0\0\0\x01\0\0\0\x01x\0\0\0\x02ll".to_vec();
        names.extend_from_slice(b"\0\0\0\x05\0\0\0\0\0\0\0\x09\0\0\x81\xa4");
        let attrs = Attrs { len: Some(9), mode: Some(0o100_644), modified: None };
        let expected = Reply::Names(vec![(Bytes::from_static(b"x"), attrs)]);
        assert_eq!(reply(names.clone().into()), Some((5, expected)));
        assert_eq!((attrs.is_file(), attrs.is_dir()), (Some(true), Some(false)));
        for cut in 0..names.len() {
            assert_eq!(reply(names[..cut].to_vec().into()), None, "cut at {cut}");
        }
        let status = b"\x65\0\0\0\x01\0\0\0\x04\0\0\0\x04nope\0\0\0\0".to_vec();
        let expected = Reply::Status { code: Code::Failure, message: "nope".into() };
        assert_eq!(reply(status.into()), Some((1, expected)));
        let hello = b"\x02\0\0\0\x03\0\0\0\x01e\0\0\0\x011".to_vec();
        assert_eq!(version(hello.into()), Some((3, vec!["e".into()])));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 95u8..110) {
            let mut packet = vec![kind];
            packet.extend_from_slice(&bytes);
            let _ = reply(packet.into());
            let mut packet = vec![2];
            packet.extend_from_slice(&bytes);
            let _ = version(packet.into());
            let _ = room(bytes.into());
        }
    }
}
