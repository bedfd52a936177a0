//! The client's handshake, one option at a time.
//!
//! Enters: a server's bytes, and calls that send an option. Leaves: bytes in [`Handshake::output`], events. An option ends with
//! [`Event::Accepted`], [`Event::Refused`], [`Event::StartTls`] or [`Event::Done`]; only then may the next one be sent.

use std::collections::VecDeque;
use std::fmt;

use crate::bytes::{Reader, string, u16_at, u32_at, u64_at};
use crate::client::{StreamError, Transmission, UsageError};
use crate::export::{BlockSizes, Context};
use crate::flags::TransmissionFlags;
use crate::mode::HeaderMode;
use crate::wire::{self, info, opt, rep};

/// The error type of an option reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OptionError(pub u32);

impl OptionError {
    /// Whether the server does not know the option.
    pub const fn is_unsupported(self) -> bool {
        self.0 == rep::ERR_UNSUP
    }
}

impl fmt::Display for OptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            rep::ERR_UNSUP => "not supported by the server",
            rep::ERR_POLICY => "forbidden by the server",
            rep::ERR_INVALID => "invalid",
            rep::ERR_PLATFORM => "not possible on the server's platform",
            rep::ERR_TLS_REQD => "TLS is required",
            rep::ERR_UNKNOWN => "no such export",
            rep::ERR_SHUTDOWN => "the server is shutting down",
            rep::ERR_BLOCK_SIZE_REQD => "block sizes must be asked for",
            rep::ERR_TOO_BIG => "too big",
            rep::ERR_EXT_HEADER_REQD => "extended headers are required",
            other => return write!(f, "option error {other:#x}"),
        })
    }
}

/// One fact about an export, from `INFO` or `GO`. Types this crate does not know are left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fact {
    /// Size and flags.
    Export {
        /// Bytes.
        size: u64,
        /// What it offers.
        flags: TransmissionFlags,
    },
    /// The canonical name.
    Name(String),
    /// A text for people.
    Description(String),
    /// Block sizes.
    BlockSizes(BlockSizes),
}

/// What came of the server's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The greeting is over; options may be sent.
    Ready {
        /// Whether options other than `EXPORT_NAME` may be.
        fixed_newstyle: bool,
    },
    /// One export of `LIST`.
    Export {
        /// Its name.
        name: String,
        /// A text for people; may be empty.
        description: String,
    },
    /// One fact of `INFO` or `GO`.
    Fact(Fact),
    /// One context of `LIST_META_CONTEXT` or `SET_META_CONTEXT`.
    Context(Context),
    /// The option succeeded.
    Accepted {
        /// The option.
        option: u32,
    },
    /// The option failed; the session goes on.
    Refused {
        /// The option.
        option: u32,
        /// Why.
        error: OptionError,
        /// The server's text for people; may be empty.
        message: String,
    },
    /// Run TLS, then call [`Handshake::tls_started`].
    StartTls,
    /// Transmission begins; input not consumed belongs to it.
    Done(Negotiated),
}

/// What the handshake agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// The name asked for.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// What the export offers.
    pub flags: TransmissionFlags,
    /// Block sizes, where the server told them.
    pub block_sizes: Option<BlockSizes>,
    /// The headers.
    pub mode: HeaderMode,
    /// The contexts selected for this export.
    pub contexts: Vec<Context>,
}

impl Negotiated {
    /// The machine for requests and replies.
    pub fn transmission(&self) -> Transmission {
        Transmission::new(self.mode, self.contexts.iter().map(|c| c.id).collect())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Greeting,
    ReplyHeader,
    ReplyData { kind: u32, length: usize },
    ExportName { length: usize },
}

impl Unit {
    const fn len(self) -> usize {
        match self {
            Unit::Greeting => 18,
            Unit::ReplyHeader => 20,
            Unit::ReplyData { length, .. } | Unit::ExportName { length } => length,
        }
    }
}

#[derive(Debug)]
enum State {
    Collect(Unit),
    Idle,
    StartingTls,
    Finished,
    Failed(StreamError),
}

/// The option being answered, and what its replies have told so far.
#[derive(Debug, Default)]
struct Asked {
    option: u32,
    name: String,
    replies: u32,
    export: Option<(u64, TransmissionFlags)>,
    block_sizes: Option<BlockSizes>,
    contexts: Vec<Context>,
}

/// The client's side of one handshake.
#[derive(Debug)]
pub struct Handshake {
    state: State,
    buffer: Vec<u8>,
    output: Vec<u8>,
    events: VecDeque<Event>,
    fixed_newstyle: bool,
    no_zeroes: bool,
    asked: Asked,
    // What STARTTLS resets:
    mode: HeaderMode,
    selected: Option<(String, Vec<Context>)>,
}

impl Handshake {
    /// A handshake that waits for the greeting. `no_zeroes` takes the server's offer to leave out padding.
    pub fn new(no_zeroes: bool) -> Self {
        Handshake {
            state: State::Collect(Unit::Greeting),
            buffer: Vec::new(),
            output: Vec::new(),
            events: VecDeque::new(),
            fixed_newstyle: false,
            no_zeroes,
            asked: Asked::default(),
            mode: HeaderMode::Simple,
            selected: None,
        }
    }

    /// Bytes for the server; the program takes them out as it sends them.
    pub fn output(&mut self) -> &mut Vec<u8> {
        &mut self.output
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// The headers agreed on so far.
    pub fn mode(&self) -> HeaderMode {
        self.mode
    }

    /// Takes bytes of the server, and returns how many. It stops where an option is answered and where transmission begins.
    pub fn handle_input(&mut self, input: &[u8]) -> Result<usize, StreamError> {
        if matches!(self.state, State::Idle) && !input.is_empty() {
            return Err(self.fail(StreamError::Unsolicited));
        }
        let mut used = 0;
        loop {
            let rest = &input[used..];
            match &self.state {
                State::Idle | State::Finished => return Ok(used),
                State::Failed(error) => return Err(error.clone()),
                State::StartingTls if rest.is_empty() => return Ok(used),
                State::StartingTls => return Err(self.fail(StreamError::PlaintextAfterStartTls)),
                State::Collect(unit) => {
                    let unit = *unit;
                    let missing = unit.len() - self.buffer.len();
                    let taken = rest.len().min(missing);
                    self.buffer.extend_from_slice(&rest[..taken]);
                    used += taken;
                    if taken < missing {
                        return Ok(used);
                    }
                    let mut data = std::mem::take(&mut self.buffer);
                    let result = self.handle_unit(unit, &data);
                    data.clear();
                    self.buffer = data;
                    result.map_err(|error| self.fail(error))?;
                }
            }
        }
    }

    /// Sends `STRUCTURED_REPLY`.
    pub fn structured_reply(&mut self) -> Result<(), UsageError> {
        self.send(opt::STRUCTURED_REPLY, "", &[])
    }

    /// Sends `EXTENDED_HEADERS`.
    pub fn extended_headers(&mut self) -> Result<(), UsageError> {
        self.send(opt::EXTENDED_HEADERS, "", &[])
    }

    /// Sends `STARTTLS`.
    pub fn start_tls(&mut self) -> Result<(), UsageError> {
        self.send(opt::STARTTLS, "", &[])
    }

    /// TLS is up; what was negotiated before it is forgotten.
    pub fn tls_started(&mut self) -> Result<(), UsageError> {
        if !matches!(self.state, State::StartingTls) {
            return Err(UsageError::NotNow);
        }
        self.mode = HeaderMode::Simple;
        self.selected = None;
        self.state = State::Idle;
        Ok(())
    }

    /// Sends `LIST`.
    pub fn list(&mut self) -> Result<(), UsageError> {
        self.send(opt::LIST, "", &[])
    }

    /// Sends `ABORT`.
    pub fn abort(&mut self) -> Result<(), UsageError> {
        self.send(opt::ABORT, "", &[])
    }

    /// Sends `INFO`, asking for every fact there is.
    pub fn info(&mut self, name: &str) -> Result<(), UsageError> {
        self.send(opt::INFO, name, &info_data(name))
    }

    /// Sends `GO`, asking for every fact there is.
    pub fn go(&mut self, name: &str) -> Result<(), UsageError> {
        self.send(opt::GO, name, &info_data(name))
    }

    /// Sends `LIST_META_CONTEXT`; no query asks for all.
    pub fn list_meta_contexts(&mut self, name: &str, queries: &[&str]) -> Result<(), UsageError> {
        let data = meta_data(name, queries)?;
        self.send(opt::LIST_META_CONTEXT, name, &data)
    }

    /// Sends `SET_META_CONTEXT`, in place of all set before.
    pub fn set_meta_contexts(&mut self, name: &str, queries: &[&str]) -> Result<(), UsageError> {
        let data = meta_data(name, queries)?;
        self.send(opt::SET_META_CONTEXT, name, &data)?;
        self.selected = None;
        Ok(())
    }

    /// Sends `EXPORT_NAME`. A server that refuses it closes the connection.
    pub fn export_name(&mut self, name: &str) -> Result<(), UsageError> {
        if self.mode == HeaderMode::Extended {
            return Err(UsageError::ExtendedHeaders);
        }
        self.send(opt::EXPORT_NAME, name, name.as_bytes())
    }

    fn send(&mut self, option: u32, name: &str, data: &[u8]) -> Result<(), UsageError> {
        if !matches!(self.state, State::Idle) {
            return Err(UsageError::NotNow);
        }
        if !self.fixed_newstyle && option != opt::EXPORT_NAME {
            return Err(UsageError::NotFixedNewstyle);
        }
        if string(name.as_bytes()).is_none() {
            return Err(UsageError::BadString);
        }
        self.output.extend_from_slice(&wire::IHAVEOPT.to_be_bytes());
        self.output.extend_from_slice(&option.to_be_bytes());
        // A name and 256 queries of 4 KiB each at the most.
        self.output.extend_from_slice(&(data.len() as u32).to_be_bytes());
        self.output.extend_from_slice(data);
        self.asked = Asked { option, name: name.to_owned(), ..Asked::default() };
        self.state = State::Collect(if option == opt::EXPORT_NAME {
            Unit::ExportName { length: if self.no_zeroes { 10 } else { 10 + wire::EXPORT_NAME_PADDING } }
        } else {
            Unit::ReplyHeader
        });
        Ok(())
    }

    fn fail(&mut self, error: StreamError) -> StreamError {
        self.state = State::Failed(error.clone());
        error
    }

    fn handle_unit(&mut self, unit: Unit, data: &[u8]) -> Result<(), StreamError> {
        match unit {
            Unit::Greeting => self.greeting(data),
            Unit::ReplyHeader => self.reply_header(data),
            Unit::ReplyData { kind, .. } => self.reply(kind, data),
            Unit::ExportName { .. } => {
                let mut r = Reader::new(data);
                let (size, flags) = r
                    .u64()
                    .zip(r.u16())
                    .ok_or(StreamError::MalformedReply { option: opt::EXPORT_NAME, kind: 0 })?;
                self.asked.export = Some((size, TransmissionFlags(flags)));
                self.finish(0)
            }
        }
    }

    fn greeting(&mut self, data: &[u8]) -> Result<(), StreamError> {
        let h: &[u8; 18] = data.try_into().expect("a unit is collected to its length");
        match (u64_at(h, 0), u64_at(h, 8)) {
            (wire::INIT_PASSWD, wire::IHAVEOPT) => {}
            (wire::INIT_PASSWD, got) => return Err(StreamError::UnknownStyle { got }),
            (got, _) => return Err(StreamError::BadGreeting { got }),
        }
        let offered = u16_at(h, 16);
        self.fixed_newstyle = offered & wire::FLAG_FIXED_NEWSTYLE != 0;
        self.no_zeroes &= offered & wire::FLAG_NO_ZEROES != 0;
        let mut flags = 0;
        if self.fixed_newstyle {
            flags |= wire::FLAG_C_FIXED_NEWSTYLE;
        }
        if self.no_zeroes {
            flags |= wire::FLAG_C_NO_ZEROES;
        }
        self.output.extend_from_slice(&flags.to_be_bytes());
        self.state = State::Idle;
        self.events.push_back(Event::Ready { fixed_newstyle: self.fixed_newstyle });
        Ok(())
    }

    fn reply_header(&mut self, data: &[u8]) -> Result<(), StreamError> {
        let h: &[u8; 20] = data.try_into().expect("a unit is collected to its length");
        let got = u64_at(h, 0);
        if got != wire::REP_MAGIC {
            return Err(StreamError::BadOptionReply { got });
        }
        let (got, asked) = (u32_at(h, 8), self.asked.option);
        if got != asked {
            return Err(StreamError::WrongOption { got, asked });
        }
        let (kind, length) = (u32_at(h, 12), u32_at(h, 16) as usize);
        if length > wire::MAX_OPTION_DATA {
            let (got, limit) = (length as u64, wire::MAX_OPTION_DATA as u64);
            return Err(StreamError::TooMuch { what: "bytes in an option reply", got, limit });
        }
        self.asked.replies += 1;
        if self.asked.replies > wire::MAX_OPTION_REPLIES {
            let (got, limit) = (self.asked.replies.into(), wire::MAX_OPTION_REPLIES.into());
            return Err(StreamError::TooMuch { what: "replies to one option", got, limit });
        }
        self.state = State::Collect(Unit::ReplyData { kind, length });
        Ok(())
    }

    fn reply(&mut self, kind: u32, data: &[u8]) -> Result<(), StreamError> {
        let option = self.asked.option;
        self.state = State::Collect(Unit::ReplyHeader);
        let malformed = || StreamError::MalformedReply { option, kind };
        match (kind, option) {
            (rep::ACK, _) if !data.is_empty() => Err(malformed()),
            (rep::ACK, _) => self.accepted(option),
            (rep::SERVER, opt::LIST) => {
                let mut r = Reader::new(data);
                let len = r.u32().ok_or_else(malformed)? as usize;
                let name = r.bytes(len).and_then(string).ok_or_else(malformed)?.to_owned();
                let description = string(r.rest()).unwrap_or_default().to_owned();
                self.events.push_back(Event::Export { name, description });
                Ok(())
            }
            (rep::INFO, opt::INFO | opt::GO) => {
                if let Some(fact) = fact(data).ok_or_else(malformed)? {
                    match &fact {
                        Fact::Export { size, flags } => self.asked.export = Some((*size, *flags)),
                        Fact::BlockSizes(sizes) => self.asked.block_sizes = Some(*sizes),
                        Fact::Name(_) | Fact::Description(_) => {}
                    }
                    self.events.push_back(Event::Fact(fact));
                }
                Ok(())
            }
            (rep::META_CONTEXT, opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT) => {
                let mut r = Reader::new(data);
                let id = r.u32().ok_or_else(malformed)?;
                let name = string(r.rest()).ok_or_else(malformed)?.to_owned();
                let context = Context { id, name };
                if option == opt::SET_META_CONTEXT {
                    let full = self.asked.contexts.len() == wire::MAX_STATUS_IDS;
                    if full || self.asked.contexts.iter().any(|c| c.id == id) {
                        return Err(malformed());
                    }
                    self.asked.contexts.push(context.clone());
                }
                self.events.push_back(Event::Context(context));
                Ok(())
            }
            _ if kind & rep::ERROR_BIT != 0 => {
                let message = String::from_utf8_lossy(data).into_owned();
                self.state = State::Idle;
                self.events.push_back(Event::Refused { option, error: OptionError(kind), message });
                Ok(())
            }
            _ => Err(StreamError::UnexpectedReply { option, kind }),
        }
    }

    fn accepted(&mut self, option: u32) -> Result<(), StreamError> {
        self.state = State::Idle;
        match option {
            opt::GO => return self.finish(rep::ACK),
            opt::INFO if self.asked.export.is_none() => {
                return Err(StreamError::MalformedReply { option, kind: rep::ACK });
            }
            opt::STARTTLS => {
                self.state = State::StartingTls;
                self.events.push_back(Event::StartTls);
                return Ok(());
            }
            opt::ABORT => self.state = State::Finished,
            opt::STRUCTURED_REPLY => self.mode = HeaderMode::Structured,
            opt::EXTENDED_HEADERS => self.mode = HeaderMode::Extended,
            opt::SET_META_CONTEXT => {
                let asked = std::mem::take(&mut self.asked);
                self.selected = Some((asked.name, asked.contexts));
            }
            _ => {}
        }
        self.events.push_back(Event::Accepted { option });
        Ok(())
    }

    fn finish(&mut self, kind: u32) -> Result<(), StreamError> {
        let asked = std::mem::take(&mut self.asked);
        let (size, flags) = asked.export.ok_or(StreamError::MalformedReply { option: asked.option, kind })?;
        let contexts = match self.selected.take() {
            Some((name, contexts)) if name == asked.name => contexts,
            _ => Vec::new(),
        };
        self.state = State::Finished;
        self.events.push_back(Event::Done(Negotiated {
            name: asked.name,
            size,
            flags,
            block_sizes: asked.block_sizes,
            mode: self.mode,
            contexts,
        }));
        Ok(())
    }
}

fn info_data(name: &str) -> Vec<u8> {
    let mut data = Vec::with_capacity(12 + name.len());
    data.extend_from_slice(&(name.len() as u32).to_be_bytes());
    data.extend_from_slice(name.as_bytes());
    let wanted = [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE];
    data.extend_from_slice(&(wanted.len() as u16).to_be_bytes());
    for kind in wanted {
        data.extend_from_slice(&kind.to_be_bytes());
    }
    data
}

fn meta_data(name: &str, queries: &[&str]) -> Result<Vec<u8>, UsageError> {
    if queries.len() > wire::MAX_META_QUERIES as usize {
        return Err(UsageError::TooManyQueries);
    }
    if queries.iter().any(|q| string(q.as_bytes()).is_none()) {
        return Err(UsageError::BadString);
    }
    let mut data = Vec::new();
    data.extend_from_slice(&(name.len() as u32).to_be_bytes());
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend_from_slice(&(query.len() as u32).to_be_bytes());
        data.extend_from_slice(query.as_bytes());
    }
    Ok(data)
}

/// `None`: malformed. `Some(None)`: of a type that must be ignored.
fn fact(data: &[u8]) -> Option<Option<Fact>> {
    let mut r = Reader::new(data);
    let fact = match r.u16()? {
        info::EXPORT => {
            let fact = Fact::Export { size: r.u64()?, flags: TransmissionFlags(r.u16()?) };
            if !r.is_empty() {
                return None;
            }
            fact
        }
        info::NAME => Fact::Name(string(r.rest())?.to_owned()),
        info::DESCRIPTION => Fact::Description(string(r.rest())?.to_owned()),
        info::BLOCK_SIZE => {
            let (minimum, preferred, maximum) = (r.u32()?, r.u32()?, r.u32()?);
            if !r.is_empty() {
                return None;
            }
            Fact::BlockSizes(BlockSizes::new(minimum, preferred, maximum)?)
        }
        _ => return Some(None),
    };
    Some(Some(fact))
}
