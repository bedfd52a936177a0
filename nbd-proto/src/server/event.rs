//! What a handshake is told, asks and comes to: the types between [`crate::server::Handshake`] and the program.

use crate::export::{Context, ExportFacts, ExportInfo};
use crate::flags::TransmissionFlags;
use crate::mode::HeaderMode;
use crate::server::Transmission;
use crate::wire;

/// How a server stands to TLS ("Server-side requirements").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tls {
    /// `NOTLS`: `STARTTLS` is answered `ERR_UNSUP`.
    #[default]
    Off,
    /// `SELECTIVETLS`: the client may, and the program may require it of an export ([`Refusal::TlsRequired`]).
    Offered,
    /// `FORCEDTLS`: nothing goes on without it.
    Required,
}

/// What a server offers in its handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// TLS.
    pub tls: Tls,
    /// Whether `STRUCTURED_REPLY` is accepted.
    pub structured_replies: bool,
    /// Whether `EXTENDED_HEADERS` is accepted.
    pub extended_headers: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config { tls: Tls::Off, structured_replies: true, extended_headers: true }
    }
}

/// Why an export is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// To use it (`EXPORT_NAME`: a refusal ends the connection).
    ExportName,
    /// To know about it (`INFO`).
    Info,
    /// To use it (`GO`).
    Go,
    /// To list its contexts (`LIST_META_CONTEXT`).
    ListMeta,
    /// To select its contexts (`SET_META_CONTEXT`).
    SetMeta,
}

/// An export asked for by name; the empty name is the default export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// The name as the client gave it.
    pub name: String,
    /// What for.
    pub purpose: Purpose,
    /// Whether the connection is under TLS.
    pub secure: bool,
}

/// Why an export (or the list of them) is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// There is none of that name.
    Unknown,
    /// Forbidden.
    Policy,
    /// The server is going down.
    Shutdown,
    /// Only under TLS. Counts as [`Refusal::Policy`] where the specification forbids that answer.
    TlsRequired,
    /// Not on this platform.
    Platform,
    /// The answer would be too large.
    TooBig,
}

/// What the program must do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Answer with [`crate::server::Handshake::accept`] or [`crate::server::Handshake::refuse`].
    Lookup(Lookup),
    /// Answer with [`crate::server::Handshake::list`] or [`crate::server::Handshake::refuse`].
    List,
    /// Send the output, run TLS, then call [`crate::server::Handshake::tls_started`]. Bytes already read must not be fed to either.
    StartTls,
    /// The client gave up: send the output, and close.
    Aborted,
    /// Send the output, and go on with [`Negotiated::transmission`]; input not consumed belongs to it.
    Done(Negotiated),
}

/// What the handshake agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// The name the client asked for.
    pub name: String,
    /// The export the program answered with.
    pub export: ExportInfo,
    /// The flags the client was told.
    pub flags: TransmissionFlags,
    /// The headers.
    pub mode: HeaderMode,
    /// The contexts selected, and offered by this export.
    pub contexts: Vec<Context>,
    /// Whether the connection is under TLS.
    pub secure: bool,
    /// Whether the client asked for the block sizes, and so promised to keep them.
    pub knows_block_sizes: bool,
}

impl Negotiated {
    /// The decoder of the requests that follow.
    pub fn transmission(&self) -> Transmission {
        Transmission::new(self.mode)
    }

    /// What requests are judged by; the program may sharpen it (`df_limit`, `fast_zero`).
    pub fn facts(&self) -> ExportFacts {
        ExportFacts {
            size: self.export.size,
            flags: self.flags,
            block_sizes: self.export.block_sizes,
            mode: self.mode,
            has_contexts: !self.contexts.is_empty(),
            df_limit: u64::from(self.export.block_sizes.maximum()).max(wire::MIN_DF_LIMIT),
            fast_zero: self.flags.contains(TransmissionFlags::SEND_FAST_ZERO),
            fast_zero_no_hole: false,
        }
    }
}
