//! One connection through the proxy: the client's socket, the way, the server's socket.
//!
//! Enters: an accepted socket. Leaves: when [`Connection::run`] returns, no thread of it is left, and both sockets are shut.
//! Invariant: what comes to the client came through `down`, and what comes to the server through `up`, so nothing is faster than the way.

use std::io::{self, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use super::exchange;
use super::lane::{Direction, Item, Lane};
use super::{Mode, Shared, TcpFault};

const CONNECT_LIMIT: Duration = Duration::from_secs(10);
const BUFFER: usize = 64 << 10;
/// How often a stalled connection looks whether it still is.
const STALL_POLL: Duration = Duration::from_millis(10);

#[derive(Debug)]
pub struct Connection {
    pub shared: Arc<Shared>,
    client: TcpStream,
    server: OnceLock<TcpStream>,
    pub up: Lane,
    pub down: Lane,
    /// Bytes in both directions, for faults after so many.
    moved: AtomicU64,
    aborted: AtomicBool,
}

impl Connection {
    pub fn new(client: TcpStream, shared: Arc<Shared>) -> Connection {
        let _ = client.set_nodelay(true);
        Connection {
            client,
            server: OnceLock::new(),
            up: Lane::new(&shared.shape, Direction::Up),
            down: Lane::new(&shared.shape, Direction::Down),
            moved: AtomicU64::new(0),
            aborted: AtomicBool::new(false),
            shared,
        }
    }

    /// Carries bytes until the connection has ended.
    pub fn run(&self) {
        let Ok(server) = TcpStream::connect_timeout(&self.shared.server, CONNECT_LIMIT) else {
            self.abort();
            return;
        };
        let _ = server.set_nodelay(true);
        let server = self.server.get_or_init(|| server);
        if self.aborted.load(Ordering::SeqCst) {
            // It came before there was a server to shut.
            return;
        }
        thread::scope(|scope| {
            scope.spawn(|| self.read_client());
            scope.spawn(|| self.write_client());
            match self.shared.mode {
                Mode::Tcp => {
                    scope.spawn(|| self.write_server(server));
                    self.read_server(server);
                }
                Mode::Http => {
                    let pending = exchange::Pending::default();
                    let answers = || exchange::answers(self, server, &pending);
                    thread::scope(|inner| {
                        inner.spawn(answers);
                        exchange::requests(self, server, &pending);
                    });
                }
            }
        });
        let _ = self.client.shutdown(Shutdown::Both);
        let _ = server.shutdown(Shutdown::Both);
    }

    /// Resets the client's connection now, and ends everything.
    pub fn abort(&self) {
        self.aborted.store(true, Ordering::SeqCst);
        reset(&self.client);
        if let Some(server) = self.server.get() {
            let _ = server.shutdown(Shutdown::Both);
        }
        self.up.kill();
        self.down.kill();
    }

    fn read_client(&self) {
        let _ = self.pump(&self.client, &self.up);
        // The client sends no more. If it waits for nothing either, nothing needs to be held back from it.
        self.down.release();
        self.up.end();
    }

    fn read_server(&self, server: &TcpStream) {
        let _ = self.pump(server, &self.down);
        self.down.end();
    }

    /// From a socket into a lane, until the socket ends or either is gone.
    fn pump(&self, mut from: &TcpStream, lane: &Lane) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER];
        loop {
            let got = from.read(&mut buffer)?;
            if got == 0 {
                return Ok(());
            }
            if !self.pass(lane, &buffer[..got])? {
                return Ok(());
            }
        }
    }

    /// Sends what the fault of the day lets pass; `false` when it ended the connection.
    fn pass(&self, lane: &Lane, bytes: &[u8]) -> io::Result<bool> {
        let before = self.moved.fetch_add(bytes.len() as u64, Ordering::SeqCst);
        let room = |limit: u64| (limit.saturating_sub(before) as usize).min(bytes.len());
        match self.shared.tcp_fault() {
            Some(TcpFault::ResetAfter(limit)) if before + bytes.len() as u64 >= limit => {
                lane.send(&bytes[..room(limit)])?;
                lane.reset();
                return Ok(false);
            }
            Some(TcpFault::StallAfter(limit)) if before + bytes.len() as u64 > limit => {
                let (first, rest) = bytes.split_at(room(limit));
                lane.send(first)?;
                while matches!(self.shared.tcp_fault(), Some(TcpFault::StallAfter(_)))
                    && lane.pause(Some(STALL_POLL))
                {}
                lane.send(rest)?;
            }
            _ => lane.send(bytes)?,
        }
        Ok(true)
    }

    fn write_client(&self) {
        self.deliver(&self.down, &self.client);
        // Whoever still sends to this client may stop.
        self.down.kill();
    }

    fn write_server(&self, server: &TcpStream) {
        self.deliver(&self.up, server);
        self.up.kill();
    }

    /// Out of a lane into a socket, until the end of either.
    fn deliver(&self, lane: &Lane, mut to: &TcpStream) {
        loop {
            match lane.receive() {
                Some(Item::Bytes(bytes)) => {
                    if to.write_all(&bytes).is_err() {
                        return;
                    }
                }
                Some(Item::End) => {
                    let _ = to.shutdown(Shutdown::Write);
                    return;
                }
                Some(Item::Reset) => return self.abort(),
                None => return,
            }
        }
    }

    /// The client's bytes as the server would see them.
    pub fn requests(&self) -> BufReader<FromLane<'_>> {
        BufReader::with_capacity(BUFFER, FromLane { connection: self, rest: Vec::new(), at: 0 })
    }
}

/// A lane's bytes to read.
pub struct FromLane<'a> {
    connection: &'a Connection,
    rest: Vec<u8>,
    at: usize,
}

impl Read for FromLane<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        if self.at == self.rest.len() {
            match self.connection.up.receive() {
                Some(Item::Bytes(bytes)) => (self.rest, self.at) = (bytes, 0),
                Some(Item::End) | None => return Ok(0),
                Some(Item::Reset) => {
                    self.connection.abort();
                    return Ok(0);
                }
            }
        }
        let got = to.len().min(self.rest.len() - self.at);
        to[..got].copy_from_slice(&self.rest[self.at..self.at + got]);
        self.at += got;
        Ok(got)
    }
}

/// Sends a RST, even where other threads still hold the socket.
pub fn reset(socket: &TcpStream) {
    // For the close, should the call below not be possible.
    let _ = rustix::net::sockopt::set_socket_linger(socket, Some(Duration::ZERO));
    // Dissolving a connection resets it at once; a close does so only when the last holder of the socket is gone.
    if rustix::net::connect_unspec(socket).is_err() {
        let _ = socket.shutdown(Shutdown::Both);
    }
}
