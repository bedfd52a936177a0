//! A client that knows what to expect of each request, joined to the server in memory.

use std::collections::HashMap;

use nbd_proto::client::{Body, Call, Connect, Decoded, Status, Transmission, Wish};
use nbd_proto::server::Config;
use nbd_proto::{Command, CommandFlags, Errno, Extent, HeaderMode, StatusQuery};

use super::server::{SIZE, Server};

pub struct Pair {
    pub server: Server,
    pub client: Transmission,
    pub mode: HeaderMode,
    pub contexts: Vec<u32>,
    /// What the disk holds if the server does as told.
    pub model: Vec<u8>,
    pub to_server: Vec<u8>,
    pub to_client: Vec<u8>,
    expected: HashMap<u64, Expected>,
    next_cookie: u64,
    moving: Option<Moving>,
    pub finished: usize,
    /// Extents as they came, by context.
    pub extents: Vec<(u32, Vec<Extent>)>,
}

struct Expected {
    outcome: Result<(), Errno>,
    offset: u64,
    want: Vec<u8>,
    got: Vec<u8>,
}

struct Moving {
    cookie: u64,
    left: usize,
    what: What,
    outcome: Option<Result<(), Errno>>,
}

enum What {
    Data(u64),
    Status(Status),
}

/// Runs a handshake, delivering `step` bytes at a time, to its end.
pub fn connect(config: Config, wish: Wish, step: usize) -> Pair {
    let mut server = Server::new(config);
    let mode = wish.mode;
    let mut client = Connect::new(wish);
    let mut held = Vec::new();
    for _ in 0..100_000 {
        held.append(&mut server.output);
        let n = held.len().min(step);
        let used = client.handle_input(&held[..n]).expect("the server keeps the rules");
        held.drain(..used);
        let out = std::mem::take(client.output());
        out.chunks(step).for_each(|piece| server.feed(piece));
        if let Some(negotiated) = client.negotiated() {
            assert!(held.is_empty() && server.output.is_empty());
            assert_eq!(negotiated.mode, server.negotiated().expect("both are done").mode);
            assert!(negotiated.mode == mode || negotiated.mode != HeaderMode::Extended);
            let contexts = negotiated.contexts.iter().map(|c| c.id).collect();
            return Pair {
                server,
                client: negotiated.transmission(),
                mode: negotiated.mode,
                contexts,
                model: vec![0; SIZE],
                to_server: Vec::new(),
                to_client: Vec::new(),
                expected: HashMap::new(),
                next_cookie: 1,
                moving: None,
                finished: 0,
                extents: Vec::new(),
            };
        }
    }
    panic!("the handshake does not end");
}

impl Pair {
    /// Sends a request, with its data if it writes, and notes what must come of it.
    pub fn send(&mut self, command: Command, offset: u64, length: u64, flags: CommandFlags, data: &[u8]) {
        let cookie = self.next_cookie;
        let call = Call { cookie, command, offset, length, flags };
        if self.client.send(&mut self.to_server, call).is_err() {
            return;
        }
        self.next_cookie += 1;
        if command == Command::Write {
            assert_eq!(data.len() as u64, length);
            self.to_server.extend_from_slice(data);
        }
        let outcome = self.outcome(command, offset, length, flags);
        let mut want = Vec::new();
        if outcome.is_ok() {
            let range = offset as usize..(offset + length) as usize;
            match command {
                Command::Write => self.model[range].copy_from_slice(data),
                Command::Trim | Command::WriteZeroes => self.model[range].fill(0),
                Command::Read => want = self.model[range].to_vec(),
                _ => {}
            }
        }
        let got = vec![0; want.len()];
        self.expected.insert(cookie, Expected { outcome, offset, want, got });
    }

    /// Asks for the status of some contexts only.
    pub fn send_query(&mut self, offset: u64, query: &StatusQuery) {
        let cookie = self.next_cookie;
        if self.client.send_status_query(&mut self.to_server, cookie, offset, query).is_err() {
            return;
        }
        self.next_cookie += 1;
        let known = query.ids.iter().all(|id| self.contexts.contains(id));
        let inside = offset.checked_add(query.length).is_some_and(|end| end <= SIZE as u64);
        let fine = !self.contexts.is_empty() && known && inside && query.length > 0;
        let outcome = if fine { Ok(()) } else { Err(Errno::Inval) };
        self.expected.insert(cookie, Expected { outcome, offset, want: Vec::new(), got: Vec::new() });
    }

    /// The rules once more, written for the export of the test, so that the two must agree.
    fn outcome(&self, command: Command, offset: u64, length: u64, flags: CommandFlags) -> Result<(), Errno> {
        let chunks = self.mode != HeaderMode::Simple;
        let flag = |f| flags.contains(f);
        let ok = flags.without(CommandFlags::FUA).without(match command {
            Command::Read if chunks => CommandFlags::DF,
            Command::Write if self.mode == HeaderMode::Extended => CommandFlags::PAYLOAD_LEN,
            Command::WriteZeroes => CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO,
            Command::BlockStatus => CommandFlags::REQ_ONE,
            _ => CommandFlags::NONE,
        });
        if !ok.is_empty() || matches!(command, Command::Unknown(_)) {
            return Err(Errno::Inval);
        }
        if command == Command::Flush {
            return if offset == 0 && length == 0 { Ok(()) } else { Err(Errno::Inval) };
        }
        if length == 0 || (command == Command::BlockStatus && (self.contexts.is_empty() || !chunks)) {
            return Err(Errno::Inval);
        }
        if command == Command::Read && flag(CommandFlags::DF) && length > 65_536 {
            return Err(Errno::Overflow);
        }
        if matches!(command, Command::Read | Command::Write) && length > 128 * 1024 {
            return Err(Errno::Inval);
        }
        if offset.checked_add(length).is_none_or(|end| end > SIZE as u64) {
            let full = matches!(command, Command::Write | Command::WriteZeroes);
            return Err(if full { Errno::NoSpc } else { Errno::Inval });
        }
        if flag(CommandFlags::FAST_ZERO | CommandFlags::NO_HOLE) {
            return Err(Errno::NotSup);
        }
        Ok(())
    }

    /// Gives the server up to `n` bytes.
    pub fn deliver_to_server(&mut self, n: usize) {
        let n = n.min(self.to_server.len());
        self.server.feed(&self.to_server[..n]);
        self.to_server.drain(..n);
        self.to_client.append(&mut self.server.output);
        assert!(!self.server.is_closed(), "{:?}", self.server.error());
    }

    /// Lets the client look at up to `n` bytes. Less than a header's worth is looked at again, with more.
    pub fn deliver_to_client(&mut self, n: usize) {
        let mut window = n.min(self.to_client.len());
        while let Some(used) = self.receive(window) {
            self.to_client.drain(..used);
            window -= used;
        }
    }

    fn receive(&mut self, window: usize) -> Option<usize> {
        if let Some(moving) = &self.moving {
            if window < moving.left {
                return None;
            }
            let Moving { cookie, left, what, outcome } = self.moving.take().expect("just seen");
            self.client.payload_done();
            let payload = &self.to_client[..left];
            match what {
                What::Data(offset) => {
                    let expected = self.expected.get_mut(&cookie).expect("sent");
                    let at = (offset - expected.offset) as usize;
                    expected.got[at..at + left].copy_from_slice(payload);
                }
                What::Status(status) => {
                    let extents = status.extents(payload).expect("the server keeps the rules");
                    self.extents.push((status.context, extents));
                }
            }
            self.finish(cookie, outcome);
            return Some(left);
        }
        match self.client.decode(&self.to_client[..window]).expect("the server keeps the rules") {
            Decoded::Need(need) => {
                assert!(need > window);
                None
            }
            Decoded::Reply { reply, consumed } => {
                let what = match reply.body {
                    Body::Data { offset, .. } => Some(What::Data(offset)),
                    Body::Status(status) => Some(What::Status(status)),
                    Body::None | Body::Hole { .. } | Body::Error { .. } => None,
                };
                match what {
                    Some(what) if reply.payload > 0 => {
                        let left = reply.payload as usize;
                        self.moving =
                            Some(Moving { cookie: reply.cookie, left, what, outcome: reply.outcome });
                    }
                    _ => self.finish(reply.cookie, reply.outcome),
                }
                Some(consumed)
            }
        }
    }

    fn finish(&mut self, cookie: u64, outcome: Option<Result<(), Errno>>) {
        let Some(outcome) = outcome else { return };
        let expected = self.expected.remove(&cookie).expect("sent once");
        assert_eq!(outcome, expected.outcome, "request {cookie}");
        assert!(expected.got == expected.want, "request {cookie} read other bytes");
        self.finished += 1;
    }

    /// Delivers all there is, and checks that nothing is left over.
    pub fn settle(&mut self) {
        self.deliver_to_server(usize::MAX);
        self.deliver_to_client(usize::MAX);
        assert_eq!(self.client.in_flight(), 0);
        assert!(self.expected.is_empty() && self.to_client.is_empty() && self.moving.is_none());
        assert!(self.server.disk == self.model, "the disk is not what was written");
    }
}
