//! What a client asks of an SFTP server, request by request.
//!
//! Enters: paths, handles and bytes. Leaves: what the server said, or [`SftpError`]. Invariant: a read gives the bytes asked for, less at the end of the file only,
//! or an error; never more than [`IN_FLIGHT`] requests of one transfer are under way.

use std::collections::VecDeque;

use bytes::Bytes;

use super::sftp::{Handle, Pipe, Result, Sftp, SftpError, Ticket, unexpected};
use super::wire::{self, Attrs, Code, Reply, Request, Room};

/// Bytes of one read or write. Every server takes 32 KiB.
const PIECE: usize = 32 * 1024;
/// Reads or writes of one transfer under way at once: 2 MiB, what an SSH channel's window takes.
const IN_FLIGHT: usize = 64;
/// Entries of one directory.
const MAX_ENTRIES: usize = 1 << 20;

pub(super) const POSIX_RENAME: &str = "posix-rename@openssh.com";
pub(super) const FSYNC: &str = "fsync@openssh.com";
const HARDLINK: &str = "hardlink@openssh.com";
const STATVFS: &str = "statvfs@openssh.com";

impl<P: Pipe> Sftp<P> {
    /// Opens a file; `flags` are those of [`wire`].
    pub fn open(&mut self, path: &[u8], flags: u32) -> Result<Handle> {
        let ticket = self.ask(Request::new(wire::OPEN).string(path).u32(flags).no_attrs())?;
        self.handle(ticket)
    }

    /// Closes a handle, and waits for no answer: it says nothing that fsync has not said.
    pub fn close(&mut self, handle: Handle) -> Result<()> {
        let ticket = self.ask(Request::new(wire::CLOSE).string(&handle.0))?;
        self.ignore(ticket);
        Ok(())
    }

    /// Asks what is at a path, links followed.
    pub fn stat(&mut self, path: &[u8]) -> Result<Attrs> {
        let ticket = self.ask(Request::new(wire::STAT).string(path))?;
        self.attrs(ticket)
    }

    /// Asks what is at a path, links not followed.
    pub fn lstat(&mut self, path: &[u8]) -> Result<Attrs> {
        let ticket = self.ask(Request::new(wire::LSTAT).string(path))?;
        self.attrs(ticket)
    }

    /// Asks for the length and type of an open file in the same flight as the reads that follow.
    pub fn ask_fstat(&mut self, handle: &Handle) -> Result<Ticket> {
        self.ask(Request::new(wire::FSTAT).string(&handle.0))
    }

    /// Asks for the attributes of `path` in the same flight as the reads that follow.
    pub fn ask_stat(&mut self, path: &[u8]) -> Result<Ticket> {
        self.ask(Request::new(wire::STAT).string(path))
    }

    /// Takes the answer to [`Sftp::ask_stat`] or [`Sftp::ask_fstat`].
    pub fn take_stat(&mut self, ticket: Ticket) -> Result<Attrs> {
        self.attrs(ticket)
    }

    fn ask_read(&mut self, handle: &Handle, at: u64, len: usize) -> Result<Ticket> {
        self.ask(Request::new(wire::READ).string(&handle.0).u64(at).u32(len as u32))
    }

    /// Reads `len` bytes from `at` on, or less where the file ends before. The caller knows the file has them, or that `len` is small.
    pub fn read(&mut self, handle: &Handle, at: u64, len: usize) -> Result<Vec<u8>> {
        self.read_pieces(handle, at, len, true)
    }

    /// The same in one flight: what a server did not give at once is missing from its end, be it the end of the file or not.
    pub fn read_at_once(&mut self, handle: &Handle, at: u64, len: usize) -> Result<Vec<u8>> {
        self.read_pieces(handle, at, len, false)
    }

    fn read_pieces(&mut self, handle: &Handle, at: u64, len: usize, insist: bool) -> Result<Vec<u8>> {
        self.allow(len as u64);
        let mut body = vec![0; len];
        // Pieces under way, in the order they were asked: where they go, how long they are.
        let mut flight = VecDeque::with_capacity(IN_FLIGHT);
        let (mut asked, mut end) = (0, len);
        let mut failed = None;
        loop {
            while failed.is_none() && asked < end && flight.len() < IN_FLIGHT {
                let piece = PIECE.min(end - asked);
                flight.push_back((self.ask_read(handle, at + asked as u64, piece)?, asked, piece));
                asked += piece;
            }
            let Some((ticket, from, piece)) = flight.pop_front() else { break };
            if failed.is_some() {
                self.ignore(ticket);
                continue;
            }
            match self.take(ticket)? {
                Reply::Data(data) if data.len() > piece => {
                    return Err(SftpError::Nonsense("more bytes came than were asked for"));
                }
                Reply::Data(data) if data.is_empty() => {
                    return Err(SftpError::Nonsense("a read gave no bytes and no end"));
                }
                Reply::Data(data) => {
                    body[from..from + data.len()].copy_from_slice(&data);
                    // A server may give less than was asked for; the rest is asked for again.
                    if data.len() < piece && from + data.len() < end {
                        if !insist {
                            end = from + data.len();
                            continue;
                        }
                        let (from, piece) = (from + data.len(), piece - data.len());
                        flight.push_front((self.ask_read(handle, at + from as u64, piece)?, from, piece));
                    }
                }
                Reply::Status { code: Code::Eof, .. } => end = end.min(from),
                other => failed = Some(unexpected(other)),
            }
        }
        body.truncate(end);
        failed.map_or(Ok(body), Err)
    }

    /// Writes bytes at a place of an open file.
    pub fn write(&mut self, handle: &Handle, at: u64, bytes: &[u8]) -> Result<()> {
        self.allow(bytes.len() as u64);
        let mut flight = VecDeque::with_capacity(IN_FLIGHT);
        let mut failed = None;
        let mut pieces = bytes.chunks(PIECE).enumerate();
        loop {
            while failed.is_none() && flight.len() < IN_FLIGHT {
                let Some((index, piece)) = pieces.next() else { break };
                let at = at + (index * PIECE) as u64;
                flight
                    .push_back(self.ask(Request::new(wire::WRITE).string(&handle.0).u64(at).string(piece))?);
            }
            let Some(ticket) = flight.pop_front() else { break };
            if failed.is_some() {
                self.ignore(ticket);
            } else if let Err(error) = self.done(ticket) {
                if !error.is_answer() {
                    return Err(error);
                }
                failed = Some(error);
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Makes what was written to a file durable. `Ok(false)` where the server can't.
    pub fn fsync(&mut self, handle: &Handle) -> Result<bool> {
        if !self.has(FSYNC) {
            return Ok(false);
        }
        self.allow_fsync();
        self.act(Request::extended(FSYNC).string(&handle.0)).map(|()| true)
    }

    /// Makes a directory.
    pub fn mkdir(&mut self, path: &[u8]) -> Result<()> {
        self.act(Request::new(wire::MKDIR).string(path).no_attrs())
    }

    /// Removes a file.
    pub fn remove(&mut self, path: &[u8]) -> Result<()> {
        self.act(Request::new(wire::REMOVE).string(path))
    }

    /// Removes a file with the requests that follow, and waits for no answer.
    pub fn remove_later(&mut self, path: &[u8]) -> Result<()> {
        let ticket = self.ask(Request::new(wire::REMOVE).string(path))?;
        self.ignore(ticket);
        Ok(())
    }

    /// Removes a directory, if it is empty, with the requests that follow, and waits for no answer.
    pub fn rmdir_later(&mut self, path: &[u8]) -> Result<()> {
        let ticket = self.ask(Request::new(wire::RMDIR).string(path))?;
        self.ignore(ticket);
        Ok(())
    }

    /// Gives a file another name, which must not be taken.
    pub fn publish(&mut self, from: &[u8], to: &[u8]) -> Result<()> {
        if self.has(HARDLINK) {
            match self.act(Request::extended(HARDLINK).string(from).string(to)) {
                // A second name that stays is garbage by its name, and harms nobody.
                Ok(()) => return self.remove_later(from),
                Err(error) if error.is(Code::Failure) || error.is(Code::Unsupported) => {
                    // Taken, or a filesystem without links. Asked, because some servers' rename replaces in spite of the standard.
                    match self.lstat(to) {
                        Err(absent) if absent.is(Code::NoSuchFile) => {}
                        Err(other) => return Err(other),
                        Ok(_) => return Err(error),
                    }
                }
                Err(error) => return Err(error),
            }
        }
        // Version 3 refuses to replace.
        self.act(Request::new(wire::RENAME).string(from).string(to))
    }

    /// Gives a file or directory another name as rename(2) does. Only where [`Sftp::has`] says so.
    pub fn posix_rename(&mut self, from: &[u8], to: &[u8]) -> Result<()> {
        self.act(Request::extended(POSIX_RENAME).string(from).string(to))
    }

    /// The entries of a directory as the server gives them, `.` and `..` left out.
    pub fn entries(&mut self, path: &[u8]) -> Result<Vec<(Bytes, Attrs)>> {
        self.allow(0);
        let ticket = self.ask(Request::new(wire::OPENDIR).string(path))?;
        let handle = self.handle(ticket)?;
        let mut entries = Vec::new();
        let ended = loop {
            self.allow(0);
            let ticket = self.ask(Request::new(wire::READDIR).string(&handle.0))?;
            match self.take(ticket)? {
                // The end is said by EOF; this could go on for ever.
                Reply::Names(names) if names.is_empty() => {
                    break Err(SftpError::Nonsense("a listing that goes on with nothing"));
                }
                Reply::Names(names) => {
                    // Copied: a name must not keep the packet it came in.
                    let names = names.into_iter().map(|(name, attrs)| (Bytes::copy_from_slice(&name), attrs));
                    entries.extend(names.filter(|(name, _)| !matches!(&name[..], b"." | b"..")));
                    if entries.len() > MAX_ENTRIES {
                        break Err(SftpError::Nonsense("a directory has too many entries"));
                    }
                }
                Reply::Status { code: Code::Eof, .. } => break Ok(()),
                other => break Err(unexpected(other)),
            }
        };
        self.close(handle)?;
        ended.map(|()| entries)
    }

    /// How much room there is where `path` lies; `None` where the server can't tell.
    pub fn room(&mut self, path: &[u8]) -> Result<Option<Room>> {
        if !self.has(STATVFS) {
            return Ok(None);
        }
        let ticket = self.ask(Request::extended(STATVFS).string(path))?;
        match self.take(ticket)? {
            Reply::Extended(answer) => Ok(wire::room(answer)),
            Reply::Status { .. } => Ok(None),
            other => Err(unexpected(other)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    /// A server that has its answers ready.
    struct Canned {
        sent: Vec<u8>,
        answers: VecDeque<Vec<u8>>,
    }

    impl Pipe for Canned {
        fn send(&mut self, bytes: &[u8]) -> Result<()> {
            self.sent.extend_from_slice(bytes);
            Ok(())
        }

        fn receive(&mut self, into: &mut [u8]) -> Result<usize> {
            let Some(answer) = self.answers.front_mut() else { return Ok(0) };
            let len = answer.len().min(into.len()).min(7);
            into[..len].copy_from_slice(&answer[..len]);
            answer.drain(..len);
            if answer.is_empty() {
                self.answers.pop_front();
            }
            Ok(len)
        }
    }

    fn packet(kind: u8, id: u32, rest: &[u8]) -> Vec<u8> {
        let mut packet = ((5 + rest.len()) as u32).to_be_bytes().to_vec();
        packet.push(kind);
        packet.extend_from_slice(&id.to_be_bytes());
        packet.extend_from_slice(rest);
        packet
    }

    fn data(id: u32, bytes: &[u8]) -> Vec<u8> {
        packet(103, id, &[&(bytes.len() as u32).to_be_bytes(), bytes].concat())
    }

    fn status(id: u32, code: u32) -> Vec<u8> {
        packet(101, id, &[&code.to_be_bytes()[..], &[0; 8]].concat())
    }

    fn session(answers: Vec<Vec<u8>>) -> Sftp<Canned> {
        let hello = packet(2, 3, b"");
        Sftp::start(Canned { sent: Vec::new(), answers: [vec![hello], answers].concat().into() }).unwrap()
    }

    fn handle() -> Handle {
        Handle(Bytes::from_static(b"h"))
    }

    #[test]
    fn answers_out_of_order_and_in_pieces_are_put_together() {
        let len = 2 * PIECE + 10;
        let expected: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
        let piece = |from: usize, to: usize| &expected[from..to];
        let answers = vec![
            data(2, piece(2 * PIECE, len)),
            data(0, piece(0, 100)),
            data(1, piece(PIECE, 2 * PIECE)),
            data(3, piece(100, PIECE)),
        ];
        assert_eq!(session(answers).read(&handle(), 0, len).unwrap(), expected);
    }

    #[test]
    fn the_end_of_a_file_cuts_a_read_and_a_refusal_fails_it() {
        let answers = vec![data(0, &[1; 50]), status(1, 1), status(2, 1)];
        assert_eq!(session(answers).read(&handle(), 0, PIECE + 1).unwrap(), [1; 50]);
        let mut sftp = session(vec![status(0, 4), data(1, &[1]), status(2, 0)]);
        assert!(sftp.read(&handle(), 0, PIECE + 1).unwrap_err().is(Code::Failure));
        // The answer nobody waited for is passed over, and the session goes on.
        sftp.mkdir(b"/d").unwrap();
    }

    #[test]
    fn one_flight_ends_where_a_server_gives_less() {
        let answers = vec![data(0, &[1; 50]), data(1, &[2; 10])];
        let mut sftp = session(answers);
        assert_eq!(sftp.read_at_once(&handle(), 0, PIECE + 10).unwrap(), [1; 50]);
        assert_eq!(session(vec![data(0, &[3; 20])]).read_at_once(&handle(), 0, 20).unwrap(), [3; 20]);
    }

    #[test]
    fn nonsense_is_told_from_refusals() {
        let huge = 0x7fff_ffffu32.to_be_bytes().to_vec();
        for answers in [
            vec![data(0, &[1; 11])],
            vec![data(0, &[])],
            vec![data(9, &[1])],
            vec![status(0, 0)],
            vec![packet(102, 0, b"\0\0\0\x01h")],
            vec![packet(99, 0, b"")],
            vec![huge],
        ] {
            let error = session(answers).read(&handle(), 0, 10).unwrap_err();
            assert!(matches!(error, SftpError::Nonsense(_)), "{error:?}");
        }
        assert!(matches!(session(vec![]).read(&handle(), 0, 10), Err(SftpError::Lost(_))));
        let shell =
            Canned { sent: Vec::new(), answers: VecDeque::from([b"Welcome to the machine\n".to_vec()]) };
        assert!(matches!(Sftp::start(shell).map(|_| ()), Err(SftpError::Nonsense(_))));
    }
}
