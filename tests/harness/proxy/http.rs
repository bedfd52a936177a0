//! As much of HTTP/1.1 as a relay needs: heads, and where bodies end (RFC 9112).
//!
//! Enters: a stream of messages. Leaves: each head as it was, and each body in parts that can be sent on as they are.

use std::io::{self, BufRead, Read};

/// The longest head that is taken.
const HEAD_MAX: usize = 64 << 10;
const BUFFER: usize = 64 << 10;

/// The first line and the headers of a message, as they came, with the empty line.
#[derive(Clone, Debug)]
pub struct Head(pub Vec<u8>);

/// Where a body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    Empty,
    Length(u64),
    Chunked,
    /// With the connection.
    UntilEnd,
}

/// A part of a body.
#[derive(Debug)]
pub enum Part<'a> {
    /// Bytes of the body itself.
    Data(&'a mut [u8]),
    /// What stands between them: chunk sizes, line ends, trailers.
    Frame(&'a [u8]),
}

impl Part<'_> {
    /// As they are sent.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Part::Data(bytes) => bytes,
            Part::Frame(bytes) => bytes,
        }
    }
}

impl Head {
    /// The next message's head; `None` when the stream ended before it.
    pub fn read(from: &mut impl BufRead) -> io::Result<Option<Head>> {
        let mut bytes = Vec::new();
        loop {
            let start = bytes.len();
            let room = (HEAD_MAX - start) as u64;
            from.by_ref().take(room).read_until(b'\n', &mut bytes)?;
            match &bytes[start..] {
                [] if start == 0 => return Ok(None),
                // Some clients put an empty line before a request.
                b"\r\n" if start == 0 => bytes.clear(),
                b"\r\n" | b"\n" => return Ok(Some(Head(bytes))),
                [.., b'\n'] => {}
                _ => return Err(io::ErrorKind::InvalidData.into()),
            }
        }
    }

    fn lines(&self) -> impl Iterator<Item = &str> {
        self.0.split(|byte| *byte == b'\n').map(|line| std::str::from_utf8(line).unwrap_or("").trim_end())
    }

    fn word(&self, at: usize) -> &str {
        self.lines().next().and_then(|line| line.split(' ').nth(at)).unwrap_or("")
    }

    /// Of a request.
    pub fn method(&self) -> &str {
        self.word(0)
    }

    /// Of a request: path and query.
    pub fn target(&self) -> &str {
        self.word(1)
    }

    /// Of an answer.
    pub fn status(&self) -> u16 {
        self.word(1).parse().unwrap_or(0)
    }

    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.lines().skip(1).find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then_some(value.trim())
        })
    }

    /// Whether the client waits for `100 Continue` before it sends the body.
    pub fn expects_continue(&self) -> bool {
        self.header("expect").is_some_and(|value| value.eq_ignore_ascii_case("100-continue"))
    }

    /// Of a request.
    pub fn request_framing(&self) -> Framing {
        self.framing().unwrap_or(Framing::Empty)
    }

    /// Of the answer to a request of this method.
    pub fn answer_framing(&self, method: &str) -> Framing {
        if method == "HEAD" || matches!(self.status(), 100..=199 | 204 | 304) {
            return Framing::Empty;
        }
        self.framing().unwrap_or(Framing::UntilEnd)
    }

    fn framing(&self) -> Option<Framing> {
        let chunked = self.header("transfer-encoding").is_some_and(|v| v.to_lowercase().contains("chunked"));
        if chunked {
            return Some(Framing::Chunked);
        }
        match self.header("content-length")?.parse() {
            Ok(0) | Err(_) => Some(Framing::Empty),
            Ok(length) => Some(Framing::Length(length)),
        }
    }

    /// The same head with another Content-Length.
    pub fn with_length(&self, length: u64) -> Head {
        let mut bytes = Vec::with_capacity(self.0.len());
        for line in self.0.split_inclusive(|byte| *byte == b'\n') {
            if line.len() > 15 && line[..15].eq_ignore_ascii_case(b"content-length:") {
                bytes.extend_from_slice(format!("Content-Length: {length}\r\n").as_bytes());
            } else {
                bytes.extend_from_slice(line);
            }
        }
        Head(bytes)
    }
}

/// Reads a body to its end, part by part.
pub fn walk(
    from: &mut impl BufRead,
    framing: Framing,
    mut part: impl FnMut(Part<'_>) -> io::Result<()>,
) -> io::Result<()> {
    match framing {
        Framing::Empty => Ok(()),
        Framing::Length(length) => data(from, length, &mut part),
        Framing::UntilEnd => {
            let mut buffer = vec![0; BUFFER];
            loop {
                match from.read(&mut buffer)? {
                    0 => return Ok(()),
                    got => part(Part::Data(&mut buffer[..got]))?,
                }
            }
        }
        Framing::Chunked => {
            loop {
                let line = line(from)?;
                part(Part::Frame(&line))?;
                let size =
                    std::str::from_utf8(&line).ok().and_then(|line| line.split([';', '\r', '\n']).next());
                let size = size.and_then(|size| u64::from_str_radix(size.trim(), 16).ok());
                match size.ok_or(io::ErrorKind::InvalidData)? {
                    0 => break,
                    size => data(from, size, &mut part)?,
                }
                part(Part::Frame(&self::line(from)?))?;
            }
            // Trailers, and the empty line behind them.
            loop {
                let line = line(from)?;
                part(Part::Frame(&line))?;
                if line == b"\r\n" || line == b"\n" {
                    return Ok(());
                }
            }
        }
    }
}

fn data(
    from: &mut impl BufRead,
    mut length: u64,
    part: &mut impl FnMut(Part<'_>) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER.min(length as usize)];
    while length > 0 {
        let room = (buffer.len() as u64).min(length) as usize;
        match from.read(&mut buffer[..room])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            got => {
                part(Part::Data(&mut buffer[..got]))?;
                length -= got as u64;
            }
        }
    }
    Ok(())
}

fn line(from: &mut impl BufRead) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    from.by_ref().take(HEAD_MAX as u64).read_until(b'\n', &mut line)?;
    if line.last() == Some(&b'\n') { Ok(line) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}
