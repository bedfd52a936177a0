//! Requests and answers, and what goes wrong between them.
//!
//! Enters: the client's requests out of the lane `up`, the server's answers. Leaves: the requests to the server, the answers into the lane `down`.
//! Invariant: what no fault touches passes as it came, byte for byte, interim answers and trailers too.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex};

use super::connection::Connection;
use super::http::{Framing, Head, Part, walk};
use super::rules::Fault;

const BUFFER: usize = 64 << 10;
/// A body of so many bytes is a short one.
const SHORT: u64 = 32 << 10;

/// Requests that went to the server, oldest first. They stay here until they are answered.
#[derive(Debug, Default)]
pub struct Pending {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    sent: VecDeque<Sent>,
    /// No answers will come any more.
    over: bool,
}

#[derive(Clone, Debug)]
struct Sent {
    method: String,
    fault: Option<Fault>,
}

impl Pending {
    fn push(&self, sent: Sent) {
        self.waiting.lock().unwrap().sent.push_back(sent);
    }

    fn first(&self) -> Option<Sent> {
        self.waiting.lock().unwrap().sent.front().cloned()
    }

    fn answered(&self) {
        self.waiting.lock().unwrap().sent.pop_front();
        self.changed.notify_all();
    }

    fn over(&self) {
        self.waiting.lock().unwrap().over = true;
        self.changed.notify_all();
    }

    /// Waits until all is answered: an answer of the proxy's own must not overtake the server's.
    fn wait_for_all(&self) {
        let mut waiting = self.waiting.lock().unwrap();
        while !waiting.sent.is_empty() && !waiting.over {
            waiting = self.changed.wait(waiting).unwrap();
        }
    }
}

/// Passes requests on, until the client sends no more.
pub fn requests(connection: &Connection, server: &TcpStream, pending: &Pending) {
    if pass_requests(connection, server, pending).is_err() {
        connection.up.kill();
    }
    // What is under way may still be answered.
    let _ = server.shutdown(Shutdown::Write);
}

fn pass_requests(connection: &Connection, mut server: &TcpStream, pending: &Pending) -> io::Result<()> {
    let mut from = connection.requests();
    while let Some(head) = Head::read(&mut from)? {
        connection.shared.requests.fetch_add(1, Ordering::SeqCst);
        let (method, framing) = (head.method().to_owned(), head.request_framing());
        let fault = connection.shared.rules.lock().unwrap().fault(&method, head.target());
        if let Some(answer) = fault.and_then(|fault| fault.own_answer(&method)) {
            pending.wait_for_all();
            if head.expects_continue() {
                connection.down.send(b"HTTP/1.1 100 Continue\r\n\r\n")?;
            }
            walk(&mut from, framing, |_| Ok(()))?;
            connection.down.send(&answer)?;
            continue;
        }
        // Before the head goes: the answer must find it.
        pending.push(Sent { method, fault });
        server.write_all(&head.0)?;
        walk(&mut from, framing, |part| server.write_all(part.bytes()))?;
    }
    Ok(())
}

/// Passes answers on, until the server sends no more or a fault ends the connection.
pub fn answers(connection: &Connection, server: &TcpStream, pending: &Pending) {
    match pass_answers(connection, server, pending) {
        Ok(()) => connection.down.end(),
        // Where a fault ended the connection, it has said how already, and nothing behind that is heard.
        Err(_) => connection.down.reset(),
    }
    pending.over();
    // Nobody hears what it would answer to what is still sent.
    let _ = server.shutdown(Shutdown::Both);
}

fn pass_answers(connection: &Connection, server: &TcpStream, pending: &Pending) -> io::Result<()> {
    let mut from = BufReader::with_capacity(BUFFER, server);
    // A server that resets its connection is passed on as one that closes it.
    while let Ok(Some(head)) = Head::read(&mut from) {
        let Some(sent) = pending.first() else {
            // Nobody asked: a server says so before it closes, as with 408.
            connection.down.send(&head.0)?;
            let framing = head.answer_framing("GET");
            walk(&mut from, framing, |part| Ok(connection.down.send(part.bytes())?))?;
            continue;
        };
        if (100..200).contains(&head.status()) {
            connection.down.send(&head.0)?;
            continue;
        }
        let framing = head.answer_framing(&sent.method);
        let passed = match sent.fault {
            None => whole(connection, &mut from, &head, framing),
            Some(fault) => spoilt(connection, &mut from, &head, framing, fault),
        };
        match passed {
            // The server broke off in the middle of its answer.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            passed => passed?,
        }
        pending.answered();
        if framing == Framing::UntilEnd {
            return Ok(());
        }
    }
    Ok(())
}

fn whole(connection: &Connection, from: &mut impl BufRead, head: &Head, framing: Framing) -> io::Result<()> {
    if let Framing::Length(length @ 1..=SHORT) = framing {
        return short(connection, from, head, length);
    }
    connection.down.send(&head.0)?;
    walk(from, framing, |part| Ok(connection.down.send(part.bytes())?))
}

/// A short answer goes as one piece, as it would in a few packets in a row: sent in two, each costs a wake-up of every thread on the way, which on a small machine is
/// more than the line does. What came of one that broke off goes on too.
fn short(connection: &Connection, from: &mut impl BufRead, head: &Head, length: u64) -> io::Result<()> {
    let mut bytes = head.0.clone();
    let whole = bytes.len() as u64 + length;
    let read = from.take(length).read_to_end(&mut bytes);
    connection.down.send(&bytes)?;
    read?;
    if (bytes.len() as u64) < whole { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
}

/// What ended the connection was asked for.
fn ended<T>() -> io::Result<T> {
    Err(io::ErrorKind::ConnectionAborted.into())
}

/// An answer with a fault in it. An error ends the connection.
fn spoilt(
    connection: &Connection,
    from: &mut impl BufRead,
    head: &Head,
    framing: Framing,
    fault: Fault,
) -> io::Result<()> {
    let down = &connection.down;
    match (fault, framing) {
        (Fault::LostAnswer, _) => {
            // To its end: what the server still does is done then.
            walk(from, framing, |_| Ok(()))?;
            down.reset();
            return ended();
        }
        (Fault::LowerLength, Framing::Length(length)) => {
            let mut room = length / 2;
            down.send(&head.with_length(room).0)?;
            return walk(from, framing, |part| {
                let bytes = part.bytes();
                let sent = bytes.len().min(room as usize);
                room -= sent as u64;
                Ok(down.send(&bytes[..sent])?)
            });
        }
        _ => {}
    }
    let strike = || match fault {
        Fault::ResetMidBody => {
            down.reset();
            ended()
        }
        Fault::CutShort => {
            down.end();
            ended()
        }
        Fault::Stall(duration) => {
            down.pause(duration);
            Ok(())
        }
        _ => Ok(()),
    };
    if framing == Framing::Empty {
        let (first, rest) = head.0.split_at(head.0.len() / 2);
        down.send(first)?;
        strike()?;
        return Ok(down.send(rest)?);
    }
    let middle = if let Framing::Length(length) = framing { length / 2 } else { 1 };
    down.send(&head.0)?;
    let mut at = 0;
    walk(from, framing, |part| {
        let bytes = match part {
            Part::Frame(bytes) => return Ok(down.send(bytes)?),
            Part::Data(bytes) => bytes,
        };
        let start = at;
        at += bytes.len() as u64;
        if !(start..at).contains(&middle) {
            return Ok(down.send(bytes)?);
        }
        let (first, rest) = bytes.split_at_mut((middle - start) as usize);
        down.send(first)?;
        strike()?;
        if fault == Fault::WrongByte {
            rest[0] ^= 0xff;
        }
        Ok(down.send(rest)?)
    })
}
