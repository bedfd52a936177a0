//! The usual sequence of options: the best headers both sides know, the contexts, then `GO`, or `EXPORT_NAME` where the
//! server is too old for it.

use std::fmt;

use crate::client::{Event, Handshake, Negotiated, OptionError, StreamError, UsageError};
use crate::mode::HeaderMode;
use crate::wire::opt;

/// What a client would like to have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// The export; empty for the default one.
    pub name: String,
    /// The best headers to ask for. Less is accepted.
    pub mode: HeaderMode,
    /// The contexts to select, by full name. Fewer are accepted.
    pub contexts: Vec<String>,
    /// Use `EXPORT_NAME` without trying `GO`, as old clients do.
    pub old_style_name: bool,
    /// Leave the 124 zeroes in, as old clients do.
    pub zeroes: bool,
}

/// Why no connection came about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConnectError {
    /// The server broke the rules.
    Stream(StreamError),
    /// The wish can't be sent.
    Usage(UsageError),
    /// The server refused the export.
    Refused {
        /// The option.
        option: u32,
        /// Why.
        error: OptionError,
        /// The server's text; may be empty.
        message: String,
    },
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConnectError::Stream(error) => error.fmt(f),
            ConnectError::Usage(error) => error.fmt(f),
            ConnectError::Refused { error, message, .. } if message.is_empty() => error.fmt(f),
            ConnectError::Refused { error, message, .. } => write!(f, "{error}: {message}"),
        }
    }
}

impl std::error::Error for ConnectError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ConnectError::Stream(error) => Some(error),
            ConnectError::Usage(error) => Some(error),
            ConnectError::Refused { .. } => None,
        }
    }
}

impl From<StreamError> for ConnectError {
    fn from(error: StreamError) -> Self {
        ConnectError::Stream(error)
    }
}

impl From<UsageError> for ConnectError {
    fn from(error: UsageError) -> Self {
        ConnectError::Usage(error)
    }
}

/// A handshake that knows what it wants.
#[derive(Debug)]
pub struct Connect {
    handshake: Handshake,
    wish: Wish,
    done: Option<Negotiated>,
}

impl Connect {
    /// A connection to be made.
    pub fn new(wish: Wish) -> Self {
        Connect { handshake: Handshake::new(!wish.zeroes), wish, done: None }
    }

    /// Bytes for the server.
    pub fn output(&mut self) -> &mut Vec<u8> {
        self.handshake.output()
    }

    /// What was agreed on, once it is.
    pub fn negotiated(&mut self) -> Option<Negotiated> {
        self.done.take()
    }

    /// Takes bytes of the server, and returns how many; what is left over belongs to the transmission phase.
    pub fn handle_input(&mut self, input: &[u8]) -> Result<usize, ConnectError> {
        let mut used = 0;
        loop {
            let taken = self.handshake.handle_input(&input[used..])?;
            used += taken;
            while let Some(event) = self.handshake.poll_event() {
                self.handle_event(event)?;
            }
            if taken == 0 || self.done.is_some() {
                return Ok(used);
            }
        }
    }

    fn handle_event(&mut self, event: Event) -> Result<(), ConnectError> {
        match event {
            Event::Ready { fixed_newstyle: false } => self.handshake.export_name(&self.wish.name)?,
            Event::Ready { fixed_newstyle: true } => self.headers(self.wish.mode)?,
            Event::Accepted { option: opt::STRUCTURED_REPLY | opt::EXTENDED_HEADERS } => self.contexts()?,
            Event::Refused { option: opt::EXTENDED_HEADERS, .. } => self.headers(HeaderMode::Structured)?,
            Event::Refused { option: opt::STRUCTURED_REPLY, .. } => self.choose()?,
            // Contexts are a wish: without them the export can still be used. Whether it is there at all, GO says.
            Event::Accepted { option: opt::SET_META_CONTEXT }
            | Event::Refused { option: opt::SET_META_CONTEXT, .. } => self.choose()?,
            Event::Refused { option: opt::GO, error, .. }
                if error.is_unsupported() && self.handshake.mode() != HeaderMode::Extended =>
            {
                self.handshake.export_name(&self.wish.name)?;
            }
            Event::Refused { option, error, message } => {
                return Err(ConnectError::Refused { option, error, message });
            }
            Event::Done(negotiated) => self.done = Some(negotiated),
            Event::Accepted { .. }
            | Event::Fact(_)
            | Event::Context(_)
            | Event::Export { .. }
            | Event::StartTls => {}
        }
        Ok(())
    }

    fn headers(&mut self, best: HeaderMode) -> Result<(), UsageError> {
        match best {
            HeaderMode::Simple => self.choose(),
            HeaderMode::Structured => self.handshake.structured_reply(),
            HeaderMode::Extended => self.handshake.extended_headers(),
        }
    }

    fn contexts(&mut self) -> Result<(), UsageError> {
        if self.wish.contexts.is_empty() {
            return self.choose();
        }
        let queries: Vec<&str> = self.wish.contexts.iter().map(String::as_str).collect();
        self.handshake.set_meta_contexts(&self.wish.name, &queries)
    }

    fn choose(&mut self) -> Result<(), UsageError> {
        if self.wish.old_style_name {
            self.handshake.export_name(&self.wish.name)
        } else {
            self.handshake.go(&self.wish.name)
        }
    }
}
