//! A request as decoded from its header.

use crate::flags::CommandFlags;

/// What a request wants (`NBD_CMD_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// Read bytes.
    Read,
    /// Write the payload.
    Write,
    /// Disconnect; has no reply.
    Disc,
    /// Make acknowledged writes durable.
    Flush,
    /// The range is no longer needed.
    Trim,
    /// Fetch the range ahead of its use.
    Cache,
    /// Make the range read as zeroes.
    WriteZeroes,
    /// Describe the range in extents.
    BlockStatus,
    /// A command this crate does not know; answered `EINVAL`.
    Unknown(u16),
}

impl Command {
    /// The command of a number on the wire.
    #[inline]
    pub const fn from_wire(value: u16) -> Command {
        match value {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disc,
            3 => Command::Flush,
            4 => Command::Trim,
            5 => Command::Cache,
            6 => Command::WriteZeroes,
            7 => Command::BlockStatus,
            other => Command::Unknown(other),
        }
    }

    /// The number on the wire.
    #[inline]
    pub const fn wire(self) -> u16 {
        match self {
            Command::Read => 0,
            Command::Write => 1,
            Command::Disc => 2,
            Command::Flush => 3,
            Command::Trim => 4,
            Command::Cache => 5,
            Command::WriteZeroes => 6,
            Command::BlockStatus => 7,
            Command::Unknown(other) => other,
        }
    }

    /// Whether it changes the export.
    #[inline]
    pub const fn is_write(self) -> bool {
        matches!(self, Command::Write | Command::Trim | Command::WriteZeroes)
    }
}

/// One request, its payload (if any) still to be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The client's name for the request; every reply repeats it.
    pub cookie: u64,
    /// First byte of the export it is about.
    pub offset: u64,
    /// How many bytes of the export it is about. Zero in the payload form of `BLOCK_STATUS` until the payload is parsed.
    pub length: u64,
    /// How many bytes follow the header. They must be moved or drained even where the request is refused.
    pub payload: u32,
    /// Flags, unknown bits included.
    pub flags: CommandFlags,
    /// The command.
    pub command: Command,
}

/// What a reply repeats of its request. The offset is only on the wire with extended headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ReplyTo {
    /// The request's cookie.
    pub cookie: u64,
    /// The request's offset.
    pub offset: u64,
}

impl Request {
    /// What a reply to this request repeats.
    #[inline]
    pub const fn reply_to(&self) -> ReplyTo {
        ReplyTo { cookie: self.cookie, offset: self.offset }
    }

    /// Whether the data must be durable before the reply.
    #[inline]
    pub const fn fua(&self) -> bool {
        self.flags.contains(CommandFlags::FUA)
    }

    /// Whether this is a `BLOCK_STATUS` whose ids and length are in a payload.
    #[inline]
    pub fn is_status_payload(&self) -> bool {
        self.command == Command::BlockStatus && self.flags.contains(CommandFlags::PAYLOAD_LEN)
    }
}
