//! Errors of the client half: of the stream (the server broke the rules; close) and of usage (the program did; nothing was
//! sent). A failed command is neither: it is an [`crate::Errno`] in a reply.

use std::fmt;

/// Why a client must drop the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamError {
    /// Not an NBD server.
    BadGreeting {
        /// The first eight bytes.
        got: u64,
    },
    /// An oldstyle server, or one of no known style.
    UnknownStyle {
        /// The second eight bytes.
        got: u64,
    },
    /// Bytes nobody asked for.
    Unsolicited,
    /// Bytes between the acknowledgement of `STARTTLS` and TLS.
    PlaintextAfterStartTls,
    /// A reply to an option did not begin with its magic.
    BadOptionReply {
        /// What it began with.
        got: u64,
    },
    /// A reply to another option than the one asked.
    WrongOption {
        /// What it answers.
        got: u32,
        /// What was asked.
        asked: u32,
    },
    /// A type of reply that doesn't answer the option.
    UnexpectedReply {
        /// The option.
        option: u32,
        /// The type.
        kind: u32,
    },
    /// A reply to an option that is malformed, or misses what it must hold.
    MalformedReply {
        /// The option.
        option: u32,
        /// The type.
        kind: u32,
    },
    /// A reply too long, or too many of them.
    TooMuch {
        /// What was counted.
        what: &'static str,
        /// How much of it came.
        got: u64,
        /// The limit.
        limit: u64,
    },
    /// A transmission reply did not begin with a magic that was agreed on.
    BadReplyMagic {
        /// What it began with.
        got: u32,
    },
    /// A reply to no request in flight: never sent, or answered already.
    UnknownCookie {
        /// The cookie.
        cookie: u64,
    },
    /// A chunk that can't be: of an unknown type, a wrong length, outside the request, overlapping, repeated.
    BadChunk {
        /// The cookie.
        cookie: u64,
        /// The chunk's type.
        kind: u16,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A reply was to be decoded while data was still in the way.
    PayloadOutstanding {
        /// Its length.
        length: u32,
    },
}

impl fmt::Display for StreamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StreamError::BadGreeting { got } => write!(f, "not an NBD server: it begins with {got:#018x}"),
            StreamError::UnknownStyle { got } => write!(f, "not a newstyle NBD server: {got:#018x}"),
            StreamError::Unsolicited => f.write_str("bytes from the server that answer nothing"),
            StreamError::PlaintextAfterStartTls => f.write_str("plaintext bytes after STARTTLS"),
            StreamError::BadOptionReply { got } => write!(f, "option reply begins with {got:#018x}"),
            StreamError::WrongOption { got, asked } => write!(f, "reply to option {got}, asked was {asked}"),
            StreamError::UnexpectedReply { option, kind } => {
                write!(f, "reply of type {kind:#x} to option {option}")
            }
            StreamError::MalformedReply { option, kind } => {
                write!(f, "malformed reply of type {kind:#x} to option {option}")
            }
            StreamError::TooMuch { what, got, limit } => write!(f, "{got} {what}, the limit is {limit}"),
            StreamError::BadReplyMagic { got } => write!(f, "reply begins with {got:#010x}"),
            StreamError::UnknownCookie { cookie } => {
                write!(f, "reply to {cookie:#x}, which is not in flight")
            }
            StreamError::BadChunk { cookie, kind, why } => {
                write!(f, "chunk of type {kind:#x} for request {cookie:#x}: {why}")
            }
            StreamError::PayloadOutstanding { length } => {
                write!(f, "{length} bytes of data have not been moved")
            }
        }
    }
}

impl std::error::Error for StreamError {}

/// What the program did wrong; nothing was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UsageError {
    /// Options go one at a time, between the greeting and the end of the handshake.
    NotNow,
    /// The server does not speak fixed newstyle, so it only knows `EXPORT_NAME`.
    NotFixedNewstyle,
    /// A name or query is not a string of the protocol.
    BadString,
    /// More queries than one option may hold.
    TooManyQueries,
    /// `EXPORT_NAME` can't follow extended headers.
    ExtendedHeaders,
    /// The cookie is in flight.
    CookieInUse,
    /// Too many requests in flight.
    TooManyInFlight,
    /// The length does not fit the header agreed on, or is more than one request can carry.
    TooLong,
    /// Nothing may follow a disconnect.
    Disconnected,
}

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            UsageError::NotNow => "no option can be sent now",
            UsageError::NotFixedNewstyle => "the server does not speak fixed newstyle",
            UsageError::BadString => "the name is too long or holds a NUL",
            UsageError::TooManyQueries => "too many queries for one option",
            UsageError::ExtendedHeaders => "EXPORT_NAME can't follow extended headers",
            UsageError::CookieInUse => "the cookie is in flight",
            UsageError::TooManyInFlight => "too many requests in flight",
            UsageError::TooLong => "the request is too long for its header",
            UsageError::Disconnected => "disconnected",
        })
    }
}

impl std::error::Error for UsageError {}
