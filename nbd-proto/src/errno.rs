//! Errors of a command: they fail one request and keep the connection.
//!
//! This is the one place that maps errors to the wire and back ("Error values").

use std::fmt;
use std::io;

/// An error value of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Errno {
    /// `NBD_EPERM`: the export is read-only.
    Perm,
    /// `NBD_EIO`: the storage failed.
    Io,
    /// `NBD_ENOMEM`: no memory.
    NoMem,
    /// `NBD_EINVAL`: the request makes no sense here.
    Inval,
    /// `NBD_ENOSPC`: no space, or a write past the end.
    NoSpc,
    /// `NBD_EOVERFLOW`: a `DF` read too long for one chunk.
    Overflow,
    /// `NBD_ENOTSUP`: a `FAST_ZERO` that would be slow.
    NotSup,
    /// `NBD_ESHUTDOWN`: the server is going down.
    Shutdown,
}

impl Errno {
    /// The number on the wire.
    #[inline]
    pub const fn wire(self) -> u32 {
        match self {
            Errno::Perm => 1,
            Errno::Io => 5,
            Errno::NoMem => 12,
            Errno::Inval => 22,
            Errno::NoSpc => 28,
            Errno::Overflow => 75,
            Errno::NotSup => 95,
            Errno::Shutdown => 108,
        }
    }

    /// The error a peer sent; an unexpected value counts as `EINVAL`, as the specification asks. Zero is no error.
    pub const fn from_wire(value: u32) -> Option<Errno> {
        match value {
            0 => None,
            1 => Some(Errno::Perm),
            5 => Some(Errno::Io),
            12 => Some(Errno::NoMem),
            28 => Some(Errno::NoSpc),
            75 => Some(Errno::Overflow),
            95 => Some(Errno::NotSup),
            108 => Some(Errno::Shutdown),
            _ => Some(Errno::Inval),
        }
    }
}

/// What a failed system call tells the client. `ENOTSUP` and `EOVERFLOW` never come out of here: the specification keeps
/// them for `FAST_ZERO` and `DF`.
impl From<&io::Error> for Errno {
    fn from(error: &io::Error) -> Errno {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                Errno::NoSpc
            }
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Errno::Perm,
            io::ErrorKind::OutOfMemory => Errno::NoMem,
            io::ErrorKind::InvalidInput => Errno::Inval,
            _ => Errno::Io,
        }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Errno::Perm => "operation not permitted",
            Errno::Io => "input/output error",
            Errno::NoMem => "out of memory",
            Errno::Inval => "invalid request",
            Errno::NoSpc => "no space left on the export",
            Errno::Overflow => "too long for one chunk",
            Errno::NotSup => "not supported",
            Errno::Shutdown => "server is shutting down",
        })
    }
}

impl std::error::Error for Errno {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_comes_back_from_the_wire_and_an_odd_value_is_einval() {
        use Errno::*;
        for e in [Perm, Io, NoMem, Inval, NoSpc, Overflow, NotSup, Shutdown] {
            assert_eq!(Errno::from_wire(e.wire()), Some(e));
        }
        assert_eq!(Errno::from_wire(0), None);
        assert_eq!(Errno::from_wire(0xdead), Some(Inval));
    }

    #[test]
    fn a_full_disk_or_quota_is_enospc() {
        for raw in [28, 122, 27] {
            assert_eq!(Errno::from(&io::Error::from_raw_os_error(raw)), Errno::NoSpc, "errno {raw}");
        }
        assert_eq!(Errno::from(&io::Error::from_raw_os_error(5)), Errno::Io);
        assert_eq!(Errno::from(&io::Error::from_raw_os_error(95)), Errno::Io);
    }
}
