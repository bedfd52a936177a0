//! A client over a socket that can do what real ones don't: extended headers, many requests in flight, nonsense.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nbd_proto::client::{Body, Call, Connect, ConnectError, Decoded, Negotiated, Transmission, Wish};
use nbd_proto::{Command, CommandFlags, Errno, Extent, StatusQuery};

use super::Server;

/// An answer that does not come within this is a failure.
const TIMEOUT: Duration = Duration::from_secs(40);
const NONE: CommandFlags = CommandFlags::NONE;

trait Socket: Read + Write + Send {}
impl<T: Read + Write + Send> Socket for T {}

/// A connection in its transmission phase.
pub struct Client {
    socket: Box<dyn Socket>,
    wire: Transmission,
    input: Vec<u8>,
    next_cookie: u64,
    partial: HashMap<u64, (u64, Answer)>,
    /// What was agreed on.
    pub negotiated: Negotiated,
}

/// The whole reply to a request.
#[derive(Debug)]
pub struct Answer {
    pub cookie: u64,
    pub result: Result<(), Errno>,
    /// What the server said of an error.
    pub message: String,
    /// Where it said the error is.
    pub failed_at: Option<u64>,
    /// The bytes of a read, holes filled in.
    pub data: Vec<u8>,
    /// How many bytes came as holes.
    pub holes: u64,
    /// Chunks with data.
    pub chunks: usize,
    /// Extents by context id.
    pub extents: Vec<(u32, Vec<Extent>)>,
}

/// Bytes, or why there are none.
pub type Reading = Result<Vec<u8>, (Errno, String)>;

impl Client {
    /// Connects over the server's Unix socket.
    pub fn connect(server: &Server, wish: Wish) -> io::Result<Client> {
        let socket = UnixStream::connect(&server.socket)?;
        socket.set_read_timeout(Some(TIMEOUT))?;
        socket.set_write_timeout(Some(TIMEOUT))?;
        Client::over(socket, wish)
    }

    /// Connects over TCP.
    pub fn connect_tcp(server: &Server, wish: Wish) -> io::Result<Client> {
        let socket = TcpStream::connect(server.tcp.expect("it listens on TCP"))?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(TIMEOUT))?;
        Client::over(socket, wish)
    }

    /// An export with structured replies.
    #[track_caller]
    pub fn open(server: &Server, name: &str) -> Client {
        let mode = nbd_proto::HeaderMode::Structured;
        Client::connect(server, Wish { name: name.to_owned(), mode, ..Wish::default() }).unwrap()
    }

    fn over(mut socket: impl Read + Write + Send + 'static, wish: Wish) -> io::Result<Client> {
        let mut connect = Connect::new(wish);
        let mut input = Vec::new();
        loop {
            let used = connect.handle_input(&input).map_err(refused)?;
            input.drain(..used);
            socket.write_all(connect.output())?;
            connect.output().clear();
            if let Some(negotiated) = connect.negotiated() {
                let wire = negotiated.transmission();
                let socket = Box::new(socket);
                return Ok(Client {
                    socket,
                    wire,
                    input,
                    next_cookie: 1,
                    partial: HashMap::new(),
                    negotiated,
                });
            }
            receive(&mut socket, &mut input)?;
        }
    }

    /// Sends a request; its cookie.
    pub fn submit(
        &mut self,
        command: Command,
        offset: u64,
        length: u64,
        flags: CommandFlags,
        data: &[u8],
    ) -> io::Result<u64> {
        let mut out = Vec::with_capacity(32 + data.len());
        let cookie = self.put(&mut out, command, offset, length, flags, data)?;
        self.socket.write_all(&out)?;
        Ok(cookie)
    }

    fn put(
        &mut self,
        out: &mut Vec<u8>,
        command: Command,
        offset: u64,
        length: u64,
        flags: CommandFlags,
        data: &[u8],
    ) -> io::Result<u64> {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let call = Call { cookie, command, offset, length, flags };
        self.wire.send(out, call).map_err(io::Error::other)?;
        out.extend_from_slice(data);
        let read = if command == Command::Read { length as usize } else { 0 };
        self.partial.insert(cookie, (offset, Answer::new(cookie, read)));
        Ok(cookie)
    }

    /// Sends writes all at once; their cookies.
    pub fn submit_writes(&mut self, writes: &[(u64, &[u8])], flags: CommandFlags) -> io::Result<Vec<u64>> {
        let mut out = Vec::new();
        let mut put = |(at, data): &(u64, &[u8])| {
            self.put(&mut out, Command::Write, *at, data.len() as u64, flags, data)
        };
        let cookies = writes.iter().map(&mut put).collect::<io::Result<_>>()?;
        self.socket.write_all(&out)?;
        Ok(cookies)
    }

    /// Sends writes all at once; what became of each.
    #[track_caller]
    pub fn write_together(&mut self, writes: &[(u64, &[u8])]) -> Vec<Result<(), Errno>> {
        let cookies = self.submit_writes(writes, NONE).unwrap();
        let mut answers: HashMap<u64, _> = HashMap::new();
        for _ in writes {
            let answer = self.answer().unwrap();
            answers.insert(answer.cookie, answer.result);
        }
        cookies.iter().map(|cookie| answers[cookie]).collect()
    }

    /// Sends bytes as they are.
    pub fn send_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.write_all(bytes)
    }

    /// Waits for the next reply that is whole.
    pub fn answer(&mut self) -> io::Result<Answer> {
        loop {
            let decoded = self.wire.decode(&self.input).map_err(io::Error::other)?;
            let Decoded::Reply { reply, consumed } = decoded else {
                receive(&mut self.socket, &mut self.input)?;
                continue;
            };
            self.input.drain(..consumed);
            let payload = reply.payload as usize;
            while self.input.len() < payload {
                receive(&mut self.socket, &mut self.input)?;
            }
            let bytes: Vec<u8> = self.input.drain(..payload).collect();
            self.wire.payload_done();
            let (offset, answer) = self.partial.get_mut(&reply.cookie).expect("it was sent");
            match reply.body {
                Body::Data { offset: at, .. } => {
                    let at = (at - *offset) as usize;
                    answer.data[at..at + payload].copy_from_slice(&bytes);
                    answer.chunks += 1;
                }
                Body::Hole { length, .. } => answer.holes += u64::from(length),
                Body::Status(status) => {
                    let extents = status.extents(&bytes).map_err(io::Error::other)?;
                    answer.extents.push((status.context, extents));
                }
                Body::Error { message, offset, .. } => (answer.message, answer.failed_at) = (message, offset),
                Body::None => {}
            }
            if let Some(result) = reply.outcome {
                let (_, mut answer) = self.partial.remove(&reply.cookie).expect("it was sent");
                answer.result = result;
                return Ok(answer);
            }
        }
    }

    /// One request, and its reply.
    pub fn call(
        &mut self,
        command: Command,
        offset: u64,
        length: u64,
        flags: CommandFlags,
        data: &[u8],
    ) -> io::Result<Answer> {
        self.submit(command, offset, length, flags, data)?;
        self.answer()
    }

    /// A status request of the payload form.
    pub fn query(&mut self, offset: u64, query: &StatusQuery) -> io::Result<Answer> {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let mut out = Vec::new();
        self.wire.send_status_query(&mut out, cookie, offset, query).map_err(io::Error::other)?;
        self.partial.insert(cookie, (offset, Answer::new(cookie, 0)));
        self.socket.write_all(&out)?;
        self.answer()
    }

    /// Reads.
    #[track_caller]
    pub fn read(&mut self, offset: u64, length: usize) -> Reading {
        let answer = self.call(Command::Read, offset, length as u64, NONE, &[]).unwrap();
        answer.result.map(|()| answer.data).map_err(|errno| (errno, answer.message))
    }

    /// Writes.
    #[track_caller]
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.call(Command::Write, offset, data.len() as u64, NONE, data).unwrap().result
    }

    /// Makes what was acknowledged durable.
    #[track_caller]
    pub fn flush(&mut self) -> Result<(), Errno> {
        self.call(Command::Flush, 0, 0, NONE, &[]).unwrap().result
    }

    /// Says goodbye.
    pub fn disconnect(mut self) {
        let mut out = Vec::new();
        self.wire.disconnect(&mut out);
        let _ = self.socket.write_all(&out);
    }
}

impl Answer {
    fn new(cookie: u64, read: usize) -> Answer {
        Answer {
            cookie,
            result: Ok(()),
            message: String::new(),
            failed_at: None,
            data: vec![0; read],
            holes: 0,
            chunks: 0,
            extents: Vec::new(),
        }
    }
}

fn refused(error: ConnectError) -> io::Error {
    io::Error::other(error.to_string())
}

fn receive(socket: &mut impl Read, input: &mut Vec<u8>) -> io::Result<()> {
    let mut buffer = [0; 64 << 10];
    match socket.read(&mut buffer)? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        len => {
            input.extend_from_slice(&buffer[..len]);
            Ok(())
        }
    }
}
