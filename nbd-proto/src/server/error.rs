//! Errors of the stream: they end the connection. (An error of a command is an [`crate::Errno`] and keeps it.)

use std::fmt;

use crate::wire;

/// Why a server must drop the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamError {
    /// The client set handshake flags that were not offered.
    UnknownClientFlags {
        /// What it sent.
        flags: u32,
    },
    /// An option did not begin with `IHAVEOPT`.
    BadOptionMagic {
        /// What it began with.
        got: u64,
    },
    /// An option is longer than is drained, or an export name longer than a name can be.
    OptionTooLong {
        /// The option.
        option: u32,
        /// Its announced length.
        length: u32,
        /// The limit it broke.
        limit: u32,
    },
    /// More options than one session may send.
    TooManyOptions,
    /// `EXPORT_NAME` with a name that is not a string of the protocol.
    ExportNameInvalid,
    /// `EXPORT_NAME` of an export the program refused; the option has no way to say so.
    ExportRefused {
        /// The name.
        name: String,
    },
    /// `EXPORT_NAME` after extended headers were agreed on.
    ExportNameAfterExtendedHeaders,
    /// The client can't or doesn't use TLS where it must.
    TlsRequired,
    /// Bytes between `STARTTLS` and TLS: sent early, or slipped in by someone on the way.
    PlaintextAfterStartTls,
    /// A request did not begin with the agreed magic.
    BadRequestMagic {
        /// What it began with.
        got: u32,
        /// What was agreed on.
        expected: u32,
    },
    /// A payload too long even to drain.
    PayloadTooLong {
        /// The request's cookie.
        cookie: u64,
        /// Its announced length.
        length: u64,
        /// The limit it broke.
        limit: u32,
    },
    /// A header was to be decoded while a payload was still in the way.
    PayloadOutstanding {
        /// Its length.
        length: u32,
    },
    /// Bytes after `DISC`.
    AfterDisconnect,
}

impl fmt::Display for StreamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StreamError::UnknownClientFlags { flags } => write!(f, "unknown client flags {flags:#x}"),
            StreamError::BadOptionMagic { got } => write!(f, "option begins with {got:#018x}, not IHAVEOPT"),
            StreamError::OptionTooLong { option, length, limit } => {
                write!(f, "option {option} announces {length} bytes, the limit is {limit}")
            }
            StreamError::TooManyOptions => {
                write!(f, "more than {} options in one session", wire::MAX_OPTIONS)
            }
            StreamError::ExportNameInvalid => {
                f.write_str("EXPORT_NAME with a name that is not UTF-8 or holds a NUL")
            }
            StreamError::ExportRefused { name } => write!(f, "EXPORT_NAME of {name:?}, which was refused"),
            StreamError::ExportNameAfterExtendedHeaders => f.write_str("EXPORT_NAME after EXTENDED_HEADERS"),
            StreamError::TlsRequired => f.write_str("client tried to go on without TLS, which is required"),
            StreamError::PlaintextAfterStartTls => f.write_str("plaintext bytes after STARTTLS"),
            StreamError::BadRequestMagic { got, expected } => {
                write!(f, "request begins with {got:#010x}, not {expected:#010x}")
            }
            StreamError::PayloadTooLong { cookie, length, limit } => {
                write!(f, "request {cookie:#x} announces a payload of {length} bytes, the limit is {limit}")
            }
            StreamError::PayloadOutstanding { length } => {
                write!(f, "a payload of {length} bytes has not been moved")
            }
            StreamError::AfterDisconnect => f.write_str("bytes after DISC"),
        }
    }
}

impl std::error::Error for StreamError {}
