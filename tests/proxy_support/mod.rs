//! Servers and a client for the proxy's tests, as simple as can be: what they see is what was on the wire.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// What a client waits for at most.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// What a server may send that it was not asked for by the byte: distinguishable, and the same each time.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8).collect()
}

/// Serves each connection with `serve` on a thread of its own. They end with their connections, the listener with the process.
pub fn server(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let serve = Arc::new(serve);
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            stream.set_nodelay(true).unwrap();
            let serve = serve.clone();
            thread::spawn(move || serve(stream));
        }
    });
    address
}

/// Sends back what comes.
pub fn echo() -> SocketAddr {
    server(|stream| {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(got @ 1..) = (&stream).read(&mut buffer) {
            if (&stream).write_all(&buffer[..got]).is_err() {
                return;
            }
        }
    })
}

/// Reads a request for so many bytes (eight, little-endian), and sends them.
pub fn source() -> SocketAddr {
    server(|stream| {
        let mut asked = [0; 8];
        while (&stream).read_exact(&mut asked).is_ok() {
            if (&stream).write_all(&vec![7; u64::from_le_bytes(asked) as usize]).is_err() {
                return;
            }
        }
    })
}

/// Reads so many bytes (eight, little-endian), and sends one when it has them.
pub fn sink() -> SocketAddr {
    server(|stream| {
        let mut announced = [0; 8];
        while (&stream).read_exact(&mut announced).is_ok() {
            let mut body = (&stream).take(u64::from_le_bytes(announced));
            if io::copy(&mut body, &mut io::sink()).is_err() || (&stream).write_all(&[1]).is_err() {
                return;
            }
        }
    })
}

/// An HTTP/1.1 server: GET /N answers N bytes of [`pattern`], /chunked the same in chunks with a trailer, /nothing with 204; PUT answers the length of
/// the body it took. It notes what it carried out.
pub fn http(done: Arc<Mutex<Vec<String>>>) -> SocketAddr {
    server(move |stream| {
        let mut from = BufReader::new(&stream);
        while let Some((head, body)) = request(&mut from, &stream) {
            let mut words = head.split(' ');
            let (method, target) = (words.next().unwrap().to_owned(), words.next().unwrap().to_owned());
            done.lock().unwrap().push(format!("{method} {target}"));
            let last = target.rsplit('/').next().unwrap();
            let answer: Vec<u8> = match (method.as_str(), last) {
                ("PUT", _) => whole(format!("took {}", body.len()).as_bytes()),
                (_, "nothing") => b"HTTP/1.1 204 No Content\r\n\r\n".into(),
                (_, "chunked") => {
                    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n6\r\n world\r\n0\r\nSum: 1\r\n\r\n".into()
                }
                (_, "until-end") => b"HTTP/1.1 200 OK\r\n\r\nuntil the end".into(),
                ("HEAD", len) => format!("HTTP/1.1 200 OK\r\nContent-Length: {len}\r\n\r\n").into(),
                (_, len) => whole(&pattern(len.parse().unwrap())),
            };
            if (&stream).write_all(&answer).is_err() || last == "until-end" {
                return;
            }
        }
    })
}

fn whole(body: &[u8]) -> Vec<u8> {
    [format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len()).as_bytes(), body].concat()
}

fn request(from: &mut impl BufRead, stream: &TcpStream) -> Option<(String, Vec<u8>)> {
    let (mut head, mut length, mut expects) = (String::new(), 0, false);
    loop {
        let mut line = String::new();
        if from.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let lower = line.to_ascii_lowercase();
        if let Some(value) = lower.strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
        expects |= lower.starts_with("expect:");
        if line.trim().is_empty() {
            break;
        }
        head += &line;
    }
    if expects {
        let mut to = stream;
        to.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").ok()?;
    }
    let mut body = vec![0; length];
    from.read_exact(&mut body).ok()?;
    Some((head, body))
}

/// An answer as it came.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
    /// How the reading of the body ended, where it ended too early.
    pub error: Option<io::ErrorKind>,
}

/// A client that sees the wire.
pub struct Client(BufReader<TcpStream>);

impl Client {
    pub fn connect(address: SocketAddr) -> Client {
        let stream = TcpStream::connect_timeout(&address, PATIENCE).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Client(BufReader::new(stream))
    }

    pub fn patience(&self, patience: Duration) {
        self.0.get_ref().set_read_timeout(Some(patience)).unwrap();
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).unwrap();
    }

    /// Exactly so many bytes, or why not.
    pub fn receive(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// All that still comes, and how it ended.
    pub fn rest(&mut self) -> (Vec<u8>, Option<io::ErrorKind>) {
        let mut bytes = Vec::new();
        let error = self.0.read_to_end(&mut bytes).err().map(|error| error.kind());
        (bytes, error)
    }

    pub fn ask(&mut self, method: &str, target: &str) -> io::Result<Answer> {
        self.send(format!("{method} {target} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes());
        self.answer(method == "HEAD")
    }

    /// The head, and as much of the body as its Content-Length says or as comes.
    pub fn answer(&mut self, no_body: bool) -> io::Result<Answer> {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if self.0.read_line(&mut head)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let length = head.to_ascii_lowercase().split("content-length:").nth(1).map(|rest| {
            let value = rest.split("\r\n").next().unwrap().trim();
            value.parse::<usize>().unwrap()
        });
        let mut answer = Answer { status, head, body: Vec::new(), error: None };
        let mut left = if no_body || matches!(status, 100 | 204) { 0 } else { length.unwrap_or(0) };
        while left > 0 {
            let mut buffer = vec![0; left];
            match self.0.read(&mut buffer) {
                Ok(0) => answer.error = Some(io::ErrorKind::UnexpectedEof),
                Err(error) => answer.error = Some(error.kind()),
                Ok(got) => {
                    answer.body.extend_from_slice(&buffer[..got]);
                    left -= got;
                    continue;
                }
            }
            break;
        }
        Ok(answer)
    }
}
