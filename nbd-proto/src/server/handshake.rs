//! The handshake: from the greeting to a chosen export.
//!
//! Enters: a client's bytes through [`Handshake::handle_input`], the program's answers through [`Handshake::accept`],
//! [`Handshake::refuse`], [`Handshake::list`] and [`Handshake::tls_started`]. Leaves: bytes in [`Handshake::output`], events from
//! [`Handshake::poll_event`].
//!
//! Invariant: one question at a time. While one is open no input is consumed, so what is held of a client is one option of
//! at most [`wire::MAX_OPTION_DATA`] bytes, and the answers come in the order of the questions.

use std::collections::VecDeque;

use crate::bytes::{clip, string, u32_at, u64_at};
use crate::export::{BlockSizes, Context, ExportInfo};
use crate::flags::TransmissionFlags;
use crate::mode::HeaderMode;
use crate::server::option::{self, MetaError};
use crate::server::{Config, Event, Lookup, Negotiated, Purpose, Refusal, StreamError, Tls};
use crate::wire::{self, info, opt, rep};

/// A question put to the program and not answered yet.
#[derive(Debug)]
enum Question {
    List,
    ExportName { name: String },
    Info { option: u32, name: String, wants: Wants },
    Meta { option: u32, name: String, queries: Vec<String> },
}

#[derive(Clone, Copy, Debug)]
struct Wants {
    name: bool,
    description: bool,
    block_size: bool,
}

/// A unit of input collected before it is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    ClientFlags,
    OptionHeader,
    OptionData { option: u32, length: usize },
}

impl Unit {
    const fn len(self) -> usize {
        match self {
            Unit::ClientFlags => 4,
            Unit::OptionHeader => 16,
            Unit::OptionData { length, .. } => length,
        }
    }
}

#[derive(Debug)]
enum State {
    Collect(Unit),
    Drain { option: u32, left: usize },
    Asked(Question),
    StartingTls,
    Finished,
    Failed(StreamError),
}

/// The server's side of one handshake.
#[derive(Debug)]
pub struct Handshake {
    config: Config,
    state: State,
    buffer: Vec<u8>,
    output: Vec<u8>,
    events: VecDeque<Event>,
    options_left: u32,
    no_zeroes: bool,
    secure: bool,
    // What STARTTLS resets:
    mode: HeaderMode,
    selected: Option<Selected>,
}

/// The result of the last `SET_META_CONTEXT`, valid for the export it named.
#[derive(Debug)]
struct Selected {
    name: String,
    contexts: Vec<Context>,
}

impl Handshake {
    /// A handshake whose greeting is in the output already.
    pub fn new(config: Config) -> Self {
        let mut output = Vec::with_capacity(256);
        output.extend_from_slice(&wire::INIT_PASSWD.to_be_bytes());
        output.extend_from_slice(&wire::IHAVEOPT.to_be_bytes());
        output.extend_from_slice(&(wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES).to_be_bytes());
        Handshake {
            config,
            state: State::Collect(Unit::ClientFlags),
            buffer: Vec::new(),
            output,
            events: VecDeque::new(),
            options_left: wire::MAX_OPTIONS,
            no_zeroes: false,
            secure: false,
            mode: HeaderMode::Simple,
            selected: None,
        }
    }

    /// Bytes for the client; the program takes them out as it sends them.
    pub fn output(&mut self) -> &mut Vec<u8> {
        &mut self.output
    }

    /// The next event. Poll after every call that feeds or answers.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Whether a question is open; no input is consumed until it is answered.
    pub fn is_waiting(&self) -> bool {
        matches!(self.state, State::Asked(_))
    }

    /// Takes bytes of the client, and returns how many. It stops at a question, after `ABORT`, and where the transmission phase
    /// begins; what is left over must be offered again (or to the transmission). After an error the connection is to be
    /// closed; the output may still hold bytes worth sending.
    pub fn handle_input(&mut self, input: &[u8]) -> Result<usize, StreamError> {
        let mut used = 0;
        loop {
            let rest = &input[used..];
            match &mut self.state {
                State::Asked(_) | State::Finished => return Ok(used),
                State::Failed(error) => return Err(error.clone()),
                State::StartingTls if rest.is_empty() => return Ok(used),
                State::StartingTls => return Err(self.fail(StreamError::PlaintextAfterStartTls)),
                State::Drain { option, left } => {
                    let taken = rest.len().min(*left);
                    *left -= taken;
                    used += taken;
                    if *left > 0 {
                        return Ok(used);
                    }
                    let option = *option;
                    self.state = State::Collect(Unit::OptionHeader);
                    self.oversized(option);
                }
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

    /// Answers a lookup: there is such an export.
    ///
    /// # Panics
    /// Where no lookup is open: a bug of the program, which no bytes of a client can bring about.
    pub fn accept(&mut self, export: &ExportInfo) {
        match self.take_question() {
            Question::ExportName { name } => self.accept_export_name(name, export),
            Question::Info { option, name, wants } => self.accept_info(option, name, wants, export),
            Question::Meta { option, name, queries } => self.accept_meta(option, name, &queries, export),
            Question::List => panic!("LIST is answered by list(), not accept()"),
        }
    }

    /// Answers a lookup or a `LIST` with a refusal; the message is for people, and may be empty. Refusing `EXPORT_NAME` ends the
    /// connection: that option has no error reply.
    ///
    /// # Panics
    /// Where no question is open: a bug of the program, which no bytes of a client can bring about.
    pub fn refuse(&mut self, refusal: Refusal, message: &str) -> Result<(), StreamError> {
        let option = match self.take_question() {
            Question::ExportName { name } => return Err(self.fail(StreamError::ExportRefused { name })),
            Question::Info { option, .. } | Question::Meta { option, .. } => option,
            Question::List => opt::LIST,
        };
        let may_ask_for_tls =
            self.config.tls != Tls::Off && !self.secure && matches!(option, opt::INFO | opt::GO);
        let kind = match refusal {
            Refusal::Unknown => rep::ERR_UNKNOWN,
            Refusal::TlsRequired if may_ask_for_tls => rep::ERR_TLS_REQD,
            Refusal::Policy | Refusal::TlsRequired => rep::ERR_POLICY,
            Refusal::Shutdown => rep::ERR_SHUTDOWN,
            Refusal::Platform => rep::ERR_PLATFORM,
            Refusal::TooBig => rep::ERR_TOO_BIG,
        };
        self.error(option, kind, message);
        Ok(())
    }

    /// Answers `LIST`: names and descriptions (empty for none).
    ///
    /// # Panics
    /// Where no `LIST` is open: a bug of the program, which no bytes of a client can bring about.
    pub fn list<'a>(&mut self, exports: impl IntoIterator<Item = (&'a str, &'a str)>) {
        let question = self.take_question();
        assert!(matches!(question, Question::List), "list() answers {question:?}");
        for (name, description) in exports {
            let (name, description) = (clip(name), clip(description));
            self.reply(opt::LIST, rep::SERVER, 4 + name.len() + description.len());
            self.output.extend_from_slice(&(name.len() as u32).to_be_bytes());
            self.output.extend_from_slice(name.as_bytes());
            self.output.extend_from_slice(description.as_bytes());
        }
        self.ack(opt::LIST);
    }

    /// TLS is up. All that was negotiated before it is forgotten.
    ///
    /// # Panics
    /// Where no [`Event::StartTls`] came before: a bug of the program, which no bytes of a client can bring about.
    pub fn tls_started(&mut self) {
        assert!(matches!(self.state, State::StartingTls), "TLS started in {:?}", self.state);
        self.secure = true;
        self.mode = HeaderMode::Simple;
        self.selected = None;
        self.state = State::Collect(Unit::OptionHeader);
    }

    fn fail(&mut self, error: StreamError) -> StreamError {
        self.state = State::Failed(error.clone());
        error
    }

    fn ask(&mut self, question: Question, event: Event) {
        self.state = State::Asked(question);
        self.events.push_back(event);
    }

    fn take_question(&mut self) -> Question {
        match std::mem::replace(&mut self.state, State::Collect(Unit::OptionHeader)) {
            State::Asked(question) => question,
            other => panic!("an answer, but no question: {other:?}"),
        }
    }

    fn handle_unit(&mut self, unit: Unit, data: &[u8]) -> Result<(), StreamError> {
        match unit {
            Unit::ClientFlags => self.client_flags(data),
            Unit::OptionHeader => self.option_header(data),
            Unit::OptionData { option, .. } => {
                self.state = State::Collect(Unit::OptionHeader);
                self.option(option, data)
            }
        }
    }

    fn client_flags(&mut self, data: &[u8]) -> Result<(), StreamError> {
        let flags = u32_at::<4>(data.try_into().expect("a unit is collected to its length"), 0);
        if flags & !(wire::FLAG_C_FIXED_NEWSTYLE | wire::FLAG_C_NO_ZEROES) != 0 {
            return Err(StreamError::UnknownClientFlags { flags });
        }
        if flags & wire::FLAG_C_FIXED_NEWSTYLE == 0 {
            // TLS needs fixed newstyle: without it a server "MUST operate in NOTLS mode".
            match self.config.tls {
                Tls::Required => return Err(StreamError::TlsRequired),
                Tls::Off | Tls::Offered => self.config.tls = Tls::Off,
            }
        }
        self.no_zeroes = flags & wire::FLAG_C_NO_ZEROES != 0;
        self.state = State::Collect(Unit::OptionHeader);
        Ok(())
    }

    fn option_header(&mut self, data: &[u8]) -> Result<(), StreamError> {
        let h: &[u8; 16] = data.try_into().expect("a unit is collected to its length");
        let got = u64_at(h, 0);
        if got != wire::IHAVEOPT {
            return Err(StreamError::BadOptionMagic { got });
        }
        let option = u32_at(h, 8);
        let length = u32_at(h, 12);
        self.options_left = self.options_left.checked_sub(1).ok_or(StreamError::TooManyOptions)?;
        let limit = if option == opt::EXPORT_NAME { wire::MAX_STRING as u32 } else { wire::MAX_OPTION_DRAIN };
        if length > limit {
            return Err(StreamError::OptionTooLong { option, length, limit });
        }
        let length = length as usize;
        self.state = if length > wire::MAX_OPTION_DATA {
            State::Drain { option, left: length }
        } else {
            State::Collect(Unit::OptionData { option, length })
        };
        Ok(())
    }

    fn must_have_tls(&self, option: u32) -> bool {
        self.config.tls == Tls::Required && !self.secure && !matches!(option, opt::STARTTLS | opt::ABORT)
    }

    /// An option whose data was too long to keep.
    fn oversized(&mut self, option: u32) {
        if self.must_have_tls(option) {
            return self.error(option, rep::ERR_TLS_REQD, "");
        }
        match option {
            opt::ABORT => self.abort(),
            opt::LIST | opt::STRUCTURED_REPLY | opt::EXTENDED_HEADERS => {
                self.error(option, rep::ERR_INVALID, "this option takes no data");
            }
            opt::STARTTLS => self.start_tls(false),
            opt::INFO | opt::GO | opt::LIST_META_CONTEXT => self.too_big(option),
            opt::SET_META_CONTEXT => {
                self.selected = None;
                self.too_big(option);
            }
            _ => self.unsupported(option),
        }
    }

    fn option(&mut self, option: u32, data: &[u8]) -> Result<(), StreamError> {
        if self.must_have_tls(option) {
            if option == opt::EXPORT_NAME {
                return Err(StreamError::TlsRequired);
            }
            self.error(option, rep::ERR_TLS_REQD, "");
            return Ok(());
        }
        match option {
            opt::EXPORT_NAME => return self.export_name(data),
            opt::ABORT => self.abort(),
            opt::STARTTLS => self.start_tls(data.is_empty()),
            opt::LIST if data.is_empty() => self.ask(Question::List, Event::List),
            opt::STRUCTURED_REPLY if data.is_empty() => self.structured_reply(),
            opt::EXTENDED_HEADERS if data.is_empty() => self.extended_headers(),
            opt::LIST | opt::STRUCTURED_REPLY | opt::EXTENDED_HEADERS => {
                self.error(option, rep::ERR_INVALID, "this option takes no data");
            }
            opt::INFO | opt::GO => self.info_or_go(option, data),
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => self.meta_context(option, data),
            _ => self.unsupported(option),
        }
        Ok(())
    }

    fn export_name(&mut self, data: &[u8]) -> Result<(), StreamError> {
        if self.mode == HeaderMode::Extended {
            return Err(StreamError::ExportNameAfterExtendedHeaders);
        }
        let name = string(data).ok_or(StreamError::ExportNameInvalid)?.to_owned();
        let event = self.lookup(&name, Purpose::ExportName);
        self.ask(Question::ExportName { name }, event);
        Ok(())
    }

    fn abort(&mut self) {
        self.ack(opt::ABORT);
        self.state = State::Finished;
        self.events.push_back(Event::Aborted);
    }

    fn start_tls(&mut self, without_data: bool) {
        if self.config.tls == Tls::Off {
            self.unsupported(opt::STARTTLS);
        } else if self.secure {
            self.error(opt::STARTTLS, rep::ERR_INVALID, "TLS is up already");
        } else if !without_data {
            self.error(opt::STARTTLS, rep::ERR_INVALID, "this option takes no data");
        } else {
            self.ack(opt::STARTTLS);
            self.state = State::StartingTls;
            self.events.push_back(Event::StartTls);
        }
    }

    fn structured_reply(&mut self) {
        if !self.config.structured_replies {
            return self.unsupported(opt::STRUCTURED_REPLY);
        }
        if self.mode == HeaderMode::Extended {
            return self.error(
                opt::STRUCTURED_REPLY,
                rep::ERR_EXT_HEADER_REQD,
                "extended headers are in force",
            );
        }
        self.mode = HeaderMode::Structured;
        self.ack(opt::STRUCTURED_REPLY);
    }

    fn extended_headers(&mut self) {
        if !self.config.extended_headers {
            return self.unsupported(opt::EXTENDED_HEADERS);
        }
        self.mode = HeaderMode::Extended;
        self.ack(opt::EXTENDED_HEADERS);
    }

    fn info_or_go(&mut self, option: u32, data: &[u8]) {
        let Some(query) = option::info(data) else {
            return self.error(option, rep::ERR_INVALID, "malformed");
        };
        let name = query.name.to_owned();
        let purpose = if option == opt::GO { Purpose::Go } else { Purpose::Info };
        let wants = Wants {
            name: query.wants_name,
            description: query.wants_description,
            block_size: query.wants_block_size,
        };
        let event = self.lookup(&name, purpose);
        self.ask(Question::Info { option, name, wants }, event);
    }

    fn meta_context(&mut self, option: u32, data: &[u8]) {
        if option == opt::SET_META_CONTEXT {
            // "replaces all previously-set metadata contexts (including when this command fails)"
            self.selected = None;
        }
        if !self.mode.has_chunks() {
            return self.error(option, rep::ERR_INVALID, "structured replies or extended headers come first");
        }
        let (name, queries) = match option::meta(data) {
            Ok((name, queries)) => (name.to_owned(), queries),
            Err(MetaError::Invalid) => return self.error(option, rep::ERR_INVALID, "malformed"),
            Err(MetaError::TooMany) => return self.too_big(option),
        };
        let purpose = if option == opt::SET_META_CONTEXT { Purpose::SetMeta } else { Purpose::ListMeta };
        let event = self.lookup(&name, purpose);
        self.ask(Question::Meta { option, name, queries }, event);
    }

    fn lookup(&self, name: &str, purpose: Purpose) -> Event {
        Event::Lookup(Lookup { name: name.to_owned(), purpose, secure: self.secure })
    }

    fn accept_export_name(&mut self, name: String, export: &ExportInfo) {
        let negotiated = self.negotiated(name, export, false);
        self.output.extend_from_slice(&export.size.to_be_bytes());
        self.output.extend_from_slice(&negotiated.flags.bits().to_be_bytes());
        if !self.no_zeroes {
            self.output.extend_from_slice(&[0; wire::EXPORT_NAME_PADDING]);
        }
        self.finish(negotiated);
    }

    fn accept_info(&mut self, option: u32, name: String, wants: Wants, export: &ExportInfo) {
        let negotiated = self.negotiated(name, export, wants.block_size);
        let mut fact = [0; 12];
        fact[..2].copy_from_slice(&info::EXPORT.to_be_bytes());
        fact[2..10].copy_from_slice(&export.size.to_be_bytes());
        fact[10..].copy_from_slice(&negotiated.flags.bits().to_be_bytes());
        self.reply(option, rep::INFO, fact.len());
        self.output.extend_from_slice(&fact);
        if wants.name {
            self.text_info(option, info::NAME, &export.name);
        }
        if wants.description && !export.description.is_empty() {
            self.text_info(option, info::DESCRIPTION, &export.description);
        }
        if wants.block_size {
            self.block_size_info(option, export.block_sizes);
        }
        self.ack(option);
        if option == opt::GO {
            self.finish(negotiated);
        }
    }

    fn text_info(&mut self, option: u32, kind: u16, text: &str) {
        let text = clip(text);
        self.reply(option, rep::INFO, 2 + text.len());
        self.output.extend_from_slice(&kind.to_be_bytes());
        self.output.extend_from_slice(text.as_bytes());
    }

    fn block_size_info(&mut self, option: u32, sizes: BlockSizes) {
        self.reply(option, rep::INFO, 14);
        self.output.extend_from_slice(&info::BLOCK_SIZE.to_be_bytes());
        for size in [sizes.minimum(), sizes.preferred(), sizes.maximum()] {
            self.output.extend_from_slice(&size.to_be_bytes());
        }
    }

    fn accept_meta(&mut self, option: u32, name: String, queries: &[String], export: &ExportInfo) {
        let set = option == opt::SET_META_CONTEXT;
        let mut contexts = Vec::new();
        for (id, context) in (1..).zip(&export.contexts) {
            let found = match set {
                true => queries.iter().any(|q| q == context),
                false => queries.is_empty() || queries.iter().any(|q| option::list_matches(q, context)),
            };
            if !found {
                continue;
            }
            self.reply(option, rep::META_CONTEXT, 4 + context.len());
            // The id of a listed context "is reserved and SHOULD be set to zero".
            let told: u32 = if set { id } else { 0 };
            self.output.extend_from_slice(&told.to_be_bytes());
            self.output.extend_from_slice(context.as_bytes());
            contexts.push(Context { id, name: context.clone() });
        }
        if set {
            self.selected = Some(Selected { name, contexts });
        }
        self.ack(option);
    }

    fn negotiated(&self, name: String, export: &ExportInfo, knows_block_sizes: bool) -> Negotiated {
        // Contexts hold for the export they were set for, named the same way, and only while it still offers them.
        let contexts: Vec<Context> = match &self.selected {
            Some(s) if s.name == name => {
                s.contexts.iter().filter(|c| export.contexts.contains(&c.name)).cloned().collect()
            }
            _ => Vec::new(),
        };
        let mut flags = TransmissionFlags(export.flags.bits() & TransmissionFlags::KNOWN.bits())
            | TransmissionFlags::HAS_FLAGS;
        if !self.mode.has_chunks() {
            flags = flags.without(TransmissionFlags::SEND_DF);
        }
        if self.mode != HeaderMode::Extended || contexts.is_empty() {
            flags = flags.without(TransmissionFlags::BLOCK_STAT_PAYLOAD);
        }
        if !flags.contains(TransmissionFlags::SEND_WRITE_ZEROES) {
            flags = flags.without(TransmissionFlags::SEND_FAST_ZERO);
        }
        let (mode, secure) = (self.mode, self.secure);
        Negotiated { name, export: export.clone(), flags, mode, contexts, secure, knows_block_sizes }
    }

    fn finish(&mut self, negotiated: Negotiated) {
        self.state = State::Finished;
        self.events.push_back(Event::Done(negotiated));
    }

    fn reply(&mut self, option: u32, kind: u32, length: usize) {
        self.output.extend_from_slice(&wire::REP_MAGIC.to_be_bytes());
        self.output.extend_from_slice(&option.to_be_bytes());
        self.output.extend_from_slice(&kind.to_be_bytes());
        // Every reply is a few clipped strings long.
        self.output.extend_from_slice(&(length as u32).to_be_bytes());
    }

    fn ack(&mut self, option: u32) {
        self.reply(option, rep::ACK, 0);
    }

    fn error(&mut self, option: u32, kind: u32, message: &str) {
        let message = clip(message);
        self.reply(option, kind, message.len());
        self.output.extend_from_slice(message.as_bytes());
    }

    fn too_big(&mut self, option: u32) {
        self.error(option, rep::ERR_TOO_BIG, "more than this server takes in one option");
    }

    fn unsupported(&mut self, option: u32) {
        self.error(option, rep::ERR_UNSUP, "");
    }
}
