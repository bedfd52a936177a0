//! The numbers of the wire: magics, option, reply, information and chunk types, and the limits this crate keeps.
//!
//! Source: "Values" in the specification; the extended forms are from its `extension-ext-header` branch.
//! Invariant: every bound on what a peer can make us hold or do has its name here.

/// `NBDMAGIC`, the first eight bytes of every server.
pub const INIT_PASSWD: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, which follows it in the newstyle handshake and begins every option.
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// What an oldstyle server sends in the place of `IHAVEOPT`.
pub const CLISERV_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Begins every reply to an option.
pub const REP_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Begins a compact request (28 bytes).
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Begins an extended request (32 bytes).
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Begins a simple reply (16 bytes).
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Begins a structured reply chunk (20 bytes).
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Begins an extended reply chunk (32 bytes).
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Handshake flag: the server speaks fixed newstyle.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag: the server can leave out the 124 zeroes after `EXPORT_NAME`.
pub const FLAG_NO_ZEROES: u16 = 1 << 1;
/// Client flag: the client speaks fixed newstyle.
pub const FLAG_C_FIXED_NEWSTYLE: u32 = 1 << 0;
/// Client flag: the client wants no 124 zeroes.
pub const FLAG_C_NO_ZEROES: u32 = 1 << 1;

/// Option types.
pub mod opt {
    /// Choose an export and enter transmission; can't report an error.
    pub const EXPORT_NAME: u32 = 1;
    /// End the session.
    pub const ABORT: u32 = 2;
    /// List the exports.
    pub const LIST: u32 = 3;
    /// Withdrawn by the specification.
    pub const PEEK_EXPORT: u32 = 4;
    /// Upgrade to TLS.
    pub const STARTTLS: u32 = 5;
    /// Ask about an export.
    pub const INFO: u32 = 6;
    /// Choose an export and enter transmission.
    pub const GO: u32 = 7;
    /// Replies in chunks.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Which metadata contexts are there?
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Select metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// 32-byte headers with 64-bit lengths.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Option reply types.
pub mod rep {
    /// Accepted, or the end of a list.
    pub const ACK: u32 = 1;
    /// One export of a list.
    pub const SERVER: u32 = 2;
    /// One fact about an export.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// The bit every error reply has set.
    pub const ERROR_BIT: u32 = 1 << 31;
    /// The option is not known here.
    pub const ERR_UNSUP: u32 = ERROR_BIT + 1;
    /// Forbidden by the server's policy.
    pub const ERR_POLICY: u32 = ERROR_BIT + 2;
    /// Malformed, or makes no sense now.
    pub const ERR_INVALID: u32 = ERROR_BIT + 3;
    /// Not possible on this platform.
    pub const ERR_PLATFORM: u32 = ERROR_BIT + 4;
    /// TLS must come first.
    pub const ERR_TLS_REQD: u32 = ERROR_BIT + 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR_BIT + 6;
    /// The server is going down.
    pub const ERR_SHUTDOWN: u32 = ERROR_BIT + 7;
    /// The client must ask for the block sizes first.
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR_BIT + 8;
    /// The request or its reply is too large.
    pub const ERR_TOO_BIG: u32 = ERROR_BIT + 9;
    /// Extended headers are needed, or are in force already.
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR_BIT + 10;
}

/// Information types of `INFO` and `GO`.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// The canonical name.
    pub const NAME: u16 = 1;
    /// A description for people.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred and maximum block size.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Types of reply chunks, structured and extended.
pub mod chunk {
    /// The flag of the last chunk of a reply.
    pub const FLAG_DONE: u16 = 1;
    /// Nothing but the end.
    pub const NONE: u16 = 0;
    /// Bytes of the export.
    pub const OFFSET_DATA: u16 = 1;
    /// Bytes of the export that are all zero.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents with 32-bit lengths.
    pub const BLOCK_STATUS: u16 = 5;
    /// Extents with 64-bit lengths.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// The bit every error chunk has set.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// An error.
    pub const ERROR: u16 = ERROR_BIT + 1;
    /// An error at an offset.
    pub const ERROR_OFFSET: u16 = ERROR_BIT + 2;
}

/// Bytes of a compact request header.
pub const REQUEST_LEN: usize = 28;
/// Bytes of an extended request header.
pub const EXTENDED_REQUEST_LEN: usize = 32;
/// Bytes of a simple reply.
pub const SIMPLE_REPLY_LEN: usize = 16;
/// Bytes of a structured chunk header.
pub const STRUCTURED_REPLY_LEN: usize = 20;
/// Bytes of an extended chunk header.
pub const EXTENDED_REPLY_LEN: usize = 32;
/// The zeroes an old client gets after `EXPORT_NAME`.
pub const EXPORT_NAME_PADDING: usize = 124;

/// The longest string of the protocol: names, descriptions, queries, messages ("Conventions").
pub const MAX_STRING: usize = 4096;
/// The most option data a server collects; more is drained and answered `ERR_TOO_BIG`.
pub const MAX_OPTION_DATA: usize = 64 * 1024;
/// The most option data a server drains; a longer option ends the session.
pub const MAX_OPTION_DRAIN: u32 = 16 * 1024 * 1024;
/// The most options of one session; a client that lists thousands of exports one by one still fits.
pub const MAX_OPTIONS: u32 = 65_536;
/// The most queries in one `LIST_META_CONTEXT` or `SET_META_CONTEXT`.
pub const MAX_META_QUERIES: u32 = 256;
/// The most context ids in the payload form of `BLOCK_STATUS`.
pub const MAX_STATUS_IDS: usize = 256;
/// The most data one read or write moves: the length every peer may rely on ("Block size constraints").
pub const MAX_PAYLOAD: u32 = 32 * 1024 * 1024;
/// The most payload of a refused request that is drained; a longer one ends the connection.
pub const MAX_DRAIN: u32 = 2 * MAX_PAYLOAD;
/// The most extents of one status chunk, sent or accepted ("SHOULD NOT send more than 2^20").
pub const MAX_EXTENTS: usize = 1 << 20;
/// The longest `DF` read every server must answer in one piece.
pub const MIN_DF_LIMIT: u64 = 65_536;
/// The most replies a client accepts to one option: the exports of a large server.
pub const MAX_OPTION_REPLIES: u32 = 1 << 20;
/// The most requests a client half keeps in flight.
pub const MAX_IN_FLIGHT: usize = 4096;
/// The most chunks a client accepts in one reply.
pub const MAX_REPLY_CHUNKS: u32 = 1 << 20;
