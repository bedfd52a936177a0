//! A client of SFTP over any two-way stream of bytes: requests go out in a row, their answers are taken as they come.
//!
//! Enters: requests (`requests` makes them). Leaves: their answers, or [`SftpError`]. Invariant: an answer goes to who asked, in whatever order answers come, and
//! every wait has an end.
//!
//! Why not the SFTP of libssh2: it has no `posix-rename@openssh.com` in its Rust crate, and it reads four times ahead of what is asked, which a range read in
//! the middle of a block throws away.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};

use super::wire::{self, Attrs, Code, MAX_PACKET, Reply, Request};

/// Bytes taken from the stream at a time.
const TAKE: usize = 64 * 1024;
/// Requests gathered before they are sent.
const GATHER: usize = 256 * 1024;
/// How long one request may take, and how many bytes a transfer must move in a second on top of that: a server that trickles can't hold us for ever.
const PATIENCE: Duration = Duration::from_secs(60);
const SLOWEST_BYTES_A_SECOND: u64 = 16 * 1024;
/// How long an fsync may take: a disk that others keep busy needs minutes, and says nothing meanwhile.
const FSYNC_PATIENCE: Duration = Duration::from_secs(300);

/// The stream below: an SSH channel, or in tests a socket.
pub(super) trait Pipe {
    /// Sends all of it.
    fn send(&mut self, bytes: &[u8]) -> Result<()>;
    /// Receives some; none at the end of the stream.
    fn receive(&mut self, into: &mut [u8]) -> Result<usize>;
}

/// What came instead of an answer that helps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum SftpError {
    /// The server refused one request. The session goes on.
    Status { code: Code, message: String },
    /// The connection broke, with what the library says of it.
    Lost(String),
    /// Nothing came in time.
    Timeout,
    /// The server's bytes make no sense.
    Nonsense(&'static str),
}

impl SftpError {
    /// Whether the server refused with this code.
    pub fn is(&self, wanted: Code) -> bool {
        matches!(self, SftpError::Status { code, .. } if *code == wanted)
    }

    /// Whether it is an answer, after which the session can be used.
    pub fn is_answer(&self) -> bool {
        matches!(self, SftpError::Status { .. })
    }
}

/// Of one request.
pub(super) type Result<T> = std::result::Result<T, SftpError>;

/// An open file or directory at the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Handle(pub(super) Bytes);

/// A request under way.
#[derive(Debug, PartialEq, Eq)]
enum Pending {
    Awaited,
    /// Nobody waits for it any more.
    Ignored,
    /// It came before the one that was waited for.
    Came(Reply),
}

/// A request whose answer is to be taken.
#[derive(Debug)]
#[must_use]
pub(super) struct Ticket(u32);

/// A session.
pub(super) struct Sftp<P> {
    pipe: P,
    next_id: u32,
    pending: HashMap<u32, Pending>,
    outgoing: Vec<u8>,
    incoming: BytesMut,
    taken: Vec<u8>,
    extensions: Vec<String>,
    deadline: Instant,
    /// Whether silence up to the deadline is nothing bad.
    silence_is_fine: bool,
}

impl<P: Pipe> Sftp<P> {
    /// Starts a session on a stream that carries nothing yet.
    pub fn start(pipe: P) -> Result<Sftp<P>> {
        let mut sftp = Sftp {
            pipe,
            next_id: 0,
            pending: HashMap::new(),
            outgoing: wire::init(),
            incoming: BytesMut::new(),
            taken: vec![0; TAKE],
            extensions: Vec::new(),
            deadline: Instant::now() + PATIENCE,
            silence_is_fine: false,
        };
        sftp.push_out()?;
        let hello = sftp.packet()?;
        let (version, extensions) = wire::version(hello).ok_or(SftpError::Nonsense(
            "the server does not speak SFTP (does a login script print something?)",
        ))?;
        if version < wire::VERSION {
            return Err(SftpError::Nonsense("the server's SFTP is older than version 3"));
        }
        sftp.extensions = extensions;
        Ok(sftp)
    }

    /// Whether the server has an extension.
    pub fn has(&self, extension: &str) -> bool {
        self.extensions.iter().any(|name| name == extension)
    }

    /// Starts the clock of what comes next, which moves this many bytes.
    pub fn allow(&mut self, bytes: u64) {
        self.deadline = Instant::now() + PATIENCE + Duration::from_secs(bytes / SLOWEST_BYTES_A_SECOND);
        self.silence_is_fine = false;
    }

    /// Starts the clock of an fsync.
    pub fn allow_fsync(&mut self) {
        self.deadline = Instant::now() + FSYNC_PATIENCE;
        self.silence_is_fine = true;
    }

    /// Sends what was gathered and not sent.
    pub(super) fn push_out(&mut self) -> Result<()> {
        if !self.outgoing.is_empty() {
            self.pipe.send(&self.outgoing)?;
            self.outgoing.clear();
        }
        Ok(())
    }

    /// The next packet, without its length.
    fn packet(&mut self) -> Result<Bytes> {
        loop {
            if let Some(head) = self.incoming.first_chunk::<4>() {
                let len = u32::from_be_bytes(*head) as usize;
                if len == 0 || len > MAX_PACKET {
                    return Err(SftpError::Nonsense("a packet of impossible length came"));
                }
                if self.incoming.len() >= 4 + len {
                    return Ok(self.incoming.split_to(4 + len).freeze().slice(4..));
                }
                self.incoming.reserve(4 + len - self.incoming.len());
            }
            if Instant::now() > self.deadline {
                return Err(SftpError::Timeout);
            }
            let got = match self.pipe.receive(&mut self.taken) {
                Err(SftpError::Timeout) if self.silence_is_fine => continue,
                got => got?,
            };
            match got {
                0 => return Err(SftpError::Lost("the server ended the session".into())),
                got => self.incoming.extend_from_slice(&self.taken[..got]),
            }
        }
    }

    /// Sends a request, or gathers it with others.
    pub fn ask(&mut self, request: Request) -> Result<Ticket> {
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        self.outgoing.extend_from_slice(&request.finish(id));
        self.pending.insert(id, Pending::Awaited);
        if self.outgoing.len() >= GATHER {
            self.push_out()?;
        }
        Ok(Ticket(id))
    }

    /// Nobody will take this answer.
    pub fn ignore(&mut self, ticket: Ticket) {
        match self.pending.get_mut(&ticket.0) {
            Some(pending @ Pending::Awaited) => *pending = Pending::Ignored,
            _ => _ = self.pending.remove(&ticket.0),
        }
    }

    /// Waits for an answer.
    pub fn take(&mut self, ticket: Ticket) -> Result<Reply> {
        if let Some(Pending::Came(reply)) = self.pending.remove(&ticket.0) {
            return Ok(reply);
        }
        self.push_out()?;
        loop {
            let packet = self.packet()?;
            let (id, reply) = wire::reply(packet).ok_or(SftpError::Nonsense("an answer makes no sense"))?;
            if id == ticket.0 {
                return Ok(reply);
            }
            match self.pending.get_mut(&id) {
                Some(pending @ Pending::Awaited) => *pending = Pending::Came(reply),
                Some(Pending::Ignored) => _ = self.pending.remove(&id),
                _ => return Err(SftpError::Nonsense("an answer to nothing that was asked came")),
            }
        }
    }

    /// Takes an answer that is a bare yes or no.
    pub fn done(&mut self, ticket: Ticket) -> Result<()> {
        match self.take(ticket)? {
            Reply::Status { code: Code::Ok, .. } => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    pub(super) fn handle(&mut self, ticket: Ticket) -> Result<Handle> {
        match self.take(ticket)? {
            Reply::Handle(handle) => Ok(Handle(handle)),
            other => Err(unexpected(other)),
        }
    }

    pub(super) fn attrs(&mut self, ticket: Ticket) -> Result<Attrs> {
        match self.take(ticket)? {
            Reply::Attrs(attrs) => Ok(attrs),
            other => Err(unexpected(other)),
        }
    }

    pub(super) fn act(&mut self, request: Request) -> Result<()> {
        let ticket = self.ask(request)?;
        self.done(ticket)
    }
}

/// A refusal, or an answer of the wrong kind.
pub(super) fn unexpected(reply: Reply) -> SftpError {
    match reply {
        Reply::Status { code: Code::Ok, .. } => SftpError::Nonsense("an answer lacks what was asked for"),
        Reply::Status { code, message } => SftpError::Status { code, message },
        _ => SftpError::Nonsense("an answer is of the wrong kind"),
    }
}
