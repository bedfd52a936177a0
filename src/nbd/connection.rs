//! One connection in its transmission phase, on a thread of its own.
//!
//! Enters: bytes of a socket. Leaves: replies. Invariant: what is held for a client is bounded ([`MAX_IN_FLIGHT`], [`MAX_IN_FLIGHT_BYTES`],
//! [`MAX_OUTPUT`], and a [`Budget`] all clients share); when a bound is reached no more is read from it until something has left.
//!
//! While nothing is in flight the thread waits in the receive call itself: a warm request costs one receive and one send and no other system call. Payloads of
//! writes are used where they were received if they are there whole, else received straight into a buffer of their own; small writes of whole pages that were
//! received together are done together.

use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use nbd_proto::server::{Decoded, Replies, StreamError, Transmission};
use nbd_proto::{Command, Errno, ExportFacts, Request, validate};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno as SystemError;
use rustix::net::sockopt::{set_socket_send_buffer_size, set_socket_send_buffer_size_force};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, sendmsg};
use smallvec::SmallVec;
use tokio::runtime::Handle;

use crate::device::{Fence, TOGETHER};
use crate::units::ByteOffset;

use super::budget::{Budget, Share};
use super::counts::Batch;
use super::export::Export;
use super::handshake::Chosen;
use super::mailbox::Mailbox;
use super::output::{MAX_SLICES, Output};
use super::payload::Payload;
use super::peers::Membership;
use super::received::Received;
use super::reply::{self, Outcome};
use super::request::{self, ContextKind, Rest};

/// Requests that wait for something, of one connection.
const MAX_IN_FLIGHT: usize = 256;
/// Bytes those requests are about; one more request may go past it, or the small ones that were received at once.
const MAX_IN_FLIGHT_BYTES: u64 = 64 << 20;
/// Bytes of replies the client has not taken; one more reply may go past it, or those to the small writes that were received at once.
const MAX_OUTPUT: u64 = 8 << 20;
/// The socket takes this much before a send has to wait, if the system lets it: some whole replies to large reads.
const SEND_BUFFER: usize = 4 << 20;
/// A client that asks one thing at a time has its next request here sooner than a processor falls asleep and wakes up: so long is looked for it before
/// the thread waits in earnest,
const LOOK_FOR: Duration = Duration::from_micros(50);
/// as long as it came within this of the last one.
const BUSY: Duration = Duration::from_micros(150);
/// A payload buffer larger than this is given back after its use.
const KEEP_PAYLOAD: usize = 4 << 20;

/// Why a connection ended before its client was done.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The client broke the protocol.
    #[error(transparent)]
    Protocol(#[from] StreamError),
    /// The socket failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The client said it disconnects.
    Disconnected,
    /// The client closed the socket between requests, without saying so.
    Closed,
    /// The client closed the socket with requests in flight or half sent.
    Vanished,
    /// The server stops.
    Stopped,
}

/// What the next bytes of the client are.
enum Receiving {
    Header,
    /// The payload of a valid request: so many bytes of the payload buffer are here.
    Payload {
        request: Request,
        here: usize,
    },
    /// The payload of a refused one.
    Drain {
        request: Request,
        errno: Errno,
        left: usize,
    },
}

struct Finished {
    request: Request,
    outcome: Outcome,
    received: Instant,
    /// Until the outcome is among the output.
    _share: Share,
}

struct Connection {
    socket: OwnedFd,
    export: Arc<Export>,
    membership: Membership,
    /// Where requests that must wait are run.
    shared: Handle,
    budget: Arc<Budget>,
    decoder: Transmission,
    replies: Replies,
    facts: ExportFacts,
    contexts: Arc<[(u32, ContextKind)]>,
    input: Received,
    /// Payloads that did not come with their header; grows to the largest and is used again.
    payload: Payload,
    receiving: Receiving,
    /// Writes that may go together, whole and not begun, with where their payloads are in `input`; none is left when something else is begun.
    gathered: Vec<(Request, Range<usize>)>,
    output: Output,
    in_flight: usize,
    in_flight_bytes: u64,
    finished: Arc<Mailbox<Finished>>,
    /// When the last bytes came.
    received: Instant,
    /// What was answered since then, to be counted.
    answered: Batch,
    /// Bytes were received since the other connections were last looked at.
    unchecked: bool,
    /// The client's last request came right after the reply before.
    is_busy: bool,
    /// The client closed the socket: nobody takes replies any more. How it would end if no disconnect were among what it sent before.
    unheard: Option<End>,
}

/// Serves the client until it is done, vanishes, or the export is stopped; then finishes what is in flight. Requests that must wait run on `shared`, within `budget`.
/// Blocks: for a thread of its own.
pub fn run(
    socket: OwnedFd,
    chosen: Chosen,
    shared: Handle,
    budget: Arc<Budget>,
) -> Result<End, ConnectionError> {
    let Chosen { negotiated, export, input } = chosen;
    let membership = export.peers().join(socket.try_clone()?);
    if export.stopping().is_cancelled() {
        // Whoever stopped it may not have seen this one join: it must not begin.
        return Ok(End::Stopped);
    }
    // Only root may have more than the system's limit; whatever it is, it works.
    let _ = set_socket_send_buffer_size_force(&socket, SEND_BUFFER)
        .or_else(|_| set_socket_send_buffer_size(&socket, SEND_BUFFER));
    let decoder = negotiated.transmission();
    let contexts = negotiated
        .contexts
        .iter()
        .filter_map(|context| ContextKind::of(&context.name).map(|kind| (context.id, kind)))
        .collect();
    let mut connection = Connection {
        socket,
        export,
        membership,
        shared,
        budget,
        replies: decoder.replies(),
        facts: negotiated.facts(),
        decoder,
        contexts,
        input: Received::starting_with(&input),
        payload: Payload::default(),
        receiving: Receiving::Header,
        gathered: Vec::new(),
        output: Output::default(),
        in_flight: 0,
        in_flight_bytes: 0,
        finished: Arc::new(Mailbox::new()?),
        received: Instant::now(),
        answered: Batch::default(),
        unchecked: true,
        is_busy: false,
        unheard: None,
    };
    connection.serve()
}

impl Connection {
    fn serve(&mut self) -> Result<End, ConnectionError> {
        let mut end = None;
        let mut finished = Vec::new();
        loop {
            let processed = if end.is_none() { self.process() } else { Ok(false) };
            let held_up = match processed {
                Ok(held_up) => held_up || !self.has_room(),
                Err(error) => {
                    // What was answered before is still sent, if the client takes it at once.
                    let _ = self.send();
                    return Err(error.into());
                }
            };
            self.finished.take(&mut finished);
            for Finished { request, outcome, received, _share } in finished.drain(..) {
                self.in_flight -= 1;
                self.in_flight_bytes -= request::weight(&request);
                self.export.counts().add_one(&request, &outcome, received.elapsed());
                reply::put(&mut self.output, self.replies, &request, outcome);
            }
            match self.send() {
                Err(error) if is_gone(&error) => self.gone(),
                other => other?,
            }
            if !self.answered.is_empty() {
                self.export.counts().add(&mut self.answered, self.received.elapsed());
            }
            if self.decoder.is_closed() {
                end.get_or_insert(End::Disconnected);
            } else if self.export.stopping().is_cancelled() {
                end.get_or_insert(End::Stopped);
            }
            if let Some(end) = end
                && self.in_flight == 0
                && self.output.pending() == 0
            {
                return Ok(end);
            }
            let wants_input = end.is_none() && self.has_room();
            if held_up && wants_input {
                // What the client sent before may be waiting in `input`, and the client for its answer.
                continue;
            }
            match self.wait(wants_input) {
                Ok(true) => {}
                // A stop shuts the socket for reading; that is not the client.
                Ok(false) if self.export.stopping().is_cancelled() => {}
                Ok(false) => return Ok(self.closed()),
                Err(error) if is_gone(&error) && wants_input && self.unheard.is_some() => {
                    return Ok(self.closed());
                }
                Err(error) if is_gone(&error) => self.gone(),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The client has closed the socket both ways. What it sent before is still taken on, for there may be a disconnect behind it, which
    /// asks for everything before it to be done (NBD spec, "NBD_CMD_DISC"); it is, unless another connection's write fences it.
    fn gone(&mut self) {
        let end = self.closed();
        self.unheard.get_or_insert(end);
        self.output = Output::default();
    }

    /// How it ends where the client closed the socket.
    fn closed(&self) -> End {
        let idle = self.unheard != Some(End::Vanished)
            && self.in_flight == 0
            && self.output.pending() == 0
            && self.input.is_empty()
            && matches!(self.receiving, Receiving::Header);
        if idle { End::Closed } else { End::Vanished }
    }

    /// Whether more of the client's requests may be taken on.
    #[inline]
    fn has_room(&self) -> bool {
        self.in_flight < MAX_IN_FLIGHT
            && self.in_flight_bytes < MAX_IN_FLIGHT_BYTES
            && self.output.pending() < MAX_OUTPUT
            // What this one has under way wakes it, so it need not be told when others are done.
            && (self.in_flight == 0 || !self.budget.is_spent())
    }

    /// Waits until something can be done, and receives if that is it; `false` where the client has closed its end.
    fn wait(&mut self, wants_input: bool) -> io::Result<bool> {
        if wants_input && self.in_flight == 0 && self.output.pending() == 0 {
            return self.wait_for_request();
        }
        let mut events = PollFlags::empty();
        if wants_input {
            events |= PollFlags::IN;
        }
        if self.output.pending() > 0 {
            events |= PollFlags::OUT;
        }
        let mut asked = [
            PollFd::new(&self.socket, events),
            PollFd::from_borrowed_fd(self.finished.bell(), PollFlags::IN),
        ];
        // A socket that is closed would be told of again and again, where nothing is wanted of it.
        let only_the_bell = self.unheard.is_some() && !wants_input;
        match poll(&mut asked[usize::from(only_the_bell)..], None) {
            Ok(_) | Err(SystemError::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if only_the_bell {
            return Ok(true);
        }
        let happened = asked[0].revents();
        if happened.intersects(PollFlags::HUP | PollFlags::ERR)
            && !(wants_input && happened.contains(PollFlags::IN))
        {
            // Closed both ways: whatever is still to be done, nobody is left to be told. It would be told again at once, too.
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        if wants_input && happened.contains(PollFlags::IN) {
            return self.receive(RecvFlags::DONTWAIT);
        }
        Ok(true)
    }

    /// Waits for the client alone: in the receive call, but for a client in the middle of one request after another, which is looked out for first.
    fn wait_for_request(&mut self) -> io::Result<bool> {
        let began = Instant::now();
        while self.is_busy && began.elapsed() < LOOK_FOR {
            match self.try_receive(RecvFlags::DONTWAIT)? {
                Some(open) => return Ok(open),
                None => std::hint::spin_loop(),
            }
        }
        let received = self.try_receive(RecvFlags::empty());
        self.is_busy =
            matches!(received, Ok(Some(_))) && self.received.saturating_duration_since(began) < BUSY;
        Ok(received?.unwrap_or(true))
    }

    /// As [`Connection::try_receive`]; that there was nothing is no end.
    #[inline]
    fn receive(&mut self, flags: RecvFlags) -> io::Result<bool> {
        Ok(self.try_receive(flags)?.unwrap_or(true))
    }

    /// Receives what there is, into the payload that is waited for or the input; `false` at the end of the stream, `None` where there is nothing.
    #[inline]
    fn try_receive(&mut self, flags: RecvFlags) -> io::Result<Option<bool>> {
        let target = match &mut self.receiving {
            Receiving::Payload { request, here } => {
                &mut self.payload.bytes()[*here..request.payload as usize]
            }
            Receiving::Header | Receiving::Drain { .. } => self.input.room(),
        };
        let received = match recv(&self.socket, target, flags) {
            Ok((received, _)) => received,
            Err(SystemError::INTR | SystemError::AGAIN) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        match &mut self.receiving {
            Receiving::Payload { here, .. } => *here += received,
            Receiving::Header | Receiving::Drain { .. } => self.input.add(received),
        }
        self.received = Instant::now();
        self.unchecked = true;
        Ok(Some(received > 0))
    }

    /// Sends as much as the socket takes without waiting.
    #[inline]
    fn send(&mut self) -> io::Result<()> {
        while self.output.pending() > 0 {
            let mut slices: [IoSlice<'_>; MAX_SLICES] = std::array::from_fn(|_| IoSlice::new(&[]));
            let count = self.output.slices(&mut slices);
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match sendmsg(&self.socket, &slices[..count], &mut SendAncillaryBuffer::default(), flags) {
                Ok(sent) => self.output.advance(sent),
                Err(SystemError::AGAIN) => break,
                Err(SystemError::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Does what the bytes received so far ask for; `true` where it stopped before their end for want of room. There may be room again by now.
    fn process(&mut self) -> Result<bool, StreamError> {
        let taken_on = self.take_on_all();
        self.begin_gathered();
        taken_on
    }

    fn take_on_all(&mut self) -> Result<bool, StreamError> {
        while self.has_room() {
            match self.receiving {
                Receiving::Header => {
                    let request = match self.decoder.decode(self.input.bytes())? {
                        Decoded::Need(_) => return Ok(false),
                        Decoded::Request(request) => request,
                    };
                    self.input.consume(self.decoder.header_len());
                    if request.command == Command::Disc {
                        return Ok(false);
                    }
                    self.take_on(request);
                }
                Receiving::Payload { request, here } => {
                    if here < request.payload as usize {
                        return Ok(false);
                    }
                    self.receiving = Receiving::Header;
                    self.decoder.payload_done();
                    let (payload, len) = (std::mem::take(&mut self.payload), request.payload as usize);
                    match self.begin(&request, &payload.as_ref()[..len]) {
                        Some(Rest::All) => self.begin_task(request, payload.into_bytes(len), Rest::All),
                        done => {
                            if payload.len() <= KEEP_PAYLOAD {
                                self.payload = payload;
                            }
                            // What is written already needs no payload.
                            if let Some(rest) = done {
                                self.begin_task(request, Bytes::new(), rest);
                            }
                        }
                    }
                }
                Receiving::Drain { request, errno, ref mut left } => {
                    let here = self.input.bytes().len().min(*left);
                    self.input.consume(here);
                    *left -= here;
                    if *left > 0 {
                        return Ok(false);
                    }
                    self.receiving = Receiving::Header;
                    self.decoder.payload_done();
                    self.refuse(&request, errno);
                }
            }
        }
        Ok(true)
    }

    /// A new request, its header consumed.
    #[inline]
    fn take_on(&mut self, request: Request) {
        let payload_len = request.payload as usize;
        let validated = validate(&request, &self.facts);
        let is_here = payload_len <= self.input.bytes().len();
        if validated.is_ok() && is_here && request::may_go_together(&request) {
            self.decoder.payload_done();
            let payload = self.input.take(payload_len);
            self.gathered.push((request, payload));
            if self.in_flight + self.gathered.len() >= MAX_IN_FLIGHT {
                // Any of them may have to wait.
                self.begin_gathered();
            }
            return;
        }
        self.begin_gathered();
        match validated {
            Err(errno) if payload_len == 0 => self.refuse(&request, errno),
            Err(errno) => self.receiving = Receiving::Drain { request, errno, left: payload_len },
            Ok(()) if is_here => {
                // Taken out for the call, which needs the rest of the connection too.
                let mut input = std::mem::take(&mut self.input);
                if payload_len > 0 {
                    self.decoder.payload_done();
                }
                let payload = input.take(payload_len);
                self.begin_or_task(request, input.taken(payload));
                self.input = input;
            }
            Ok(()) => {
                // Validation bounds it. What is here moves over, the rest is received into its place.
                self.payload.hold(payload_len);
                let here = self.input.bytes().len();
                self.payload.bytes()[..here].copy_from_slice(self.input.bytes());
                self.input.consume(here);
                self.receiving = Receiving::Payload { request, here };
            }
        }
    }

    /// Begins the writes that were gathered: together, and those that can't be each by itself.
    fn begin_gathered(&mut self) {
        if self.gathered.is_empty() {
            return;
        }
        let (input, mut gathered) = (std::mem::take(&mut self.input), std::mem::take(&mut self.gathered));
        let writes: SmallVec<[(ByteOffset, &[u8]); TOGETHER]> = gathered
            .iter()
            .map(|(request, payload)| (ByteOffset(request.offset), input.taken(payload.clone())))
            .collect();
        let done = match writes.len() {
            1 => SmallVec::from_elem(false, 1),
            _ => self.change(|export, fence| request::write_together(export, fence, &writes)),
        };
        for (((request, _), (_, payload)), is_done) in gathered.iter().zip(&writes).zip(done) {
            if is_done {
                self.answer(request, Outcome::Done);
            } else {
                self.begin_or_task(*request, payload);
            }
        }
        drop(writes);
        gathered.clear();
        (self.input, self.gathered) = (input, gathered);
    }

    /// Begins a request whose payload is here; where it must wait, as a task with a copy of that.
    #[inline]
    fn begin_or_task(&mut self, request: Request, payload: &[u8]) {
        if let Some(rest) = self.begin(&request, payload) {
            // What is left of a request that is written already needs no payload.
            let needed = if matches!(rest, Rest::All) { payload } else { &[] };
            self.begin_task(request, Bytes::copy_from_slice(needed), rest);
        }
    }

    fn refuse(&mut self, request: &Request, errno: Errno) {
        self.answer(request, Outcome::Failed(errno, errno.to_string()));
    }

    /// Answers a request that had not to wait.
    #[inline]
    fn answer(&mut self, request: &Request, outcome: Outcome) {
        self.answered.add(request, &outcome);
        reply::put(&mut self.output, self.replies, request, outcome);
    }

    /// Does at once what can be done at once; tells what is left for a task.
    #[inline]
    fn begin(&mut self, request: &Request, payload: &[u8]) -> Option<Rest> {
        let tried = if request.command.is_write() {
            self.change(|export, fence| request::try_now(export, fence, request, payload))
        } else {
            request::try_now(&self.export, self.membership.fence(), request, payload)
        };
        match tried {
            Ok(outcome) => {
                self.answer(request, outcome);
                None
            }
            Err(rest) => Some(rest),
        }
    }

    /// Does something that changes the device.
    #[inline]
    fn change<T>(&mut self, work: impl FnOnce(&Export, &Fence) -> T) -> T {
        if self.unchecked {
            // The client may have sent this again after another of its connections died: what that one still has must not come after it.
            self.membership.fence_the_dead();
            self.unchecked = false;
        }
        let done = work(&self.export, self.membership.fence());
        if self.export.device().claim_unasked_commit() {
            self.commit_unasked();
        }
        done
    }

    fn begin_task(&mut self, request: Request, payload: Bytes, rest: Rest) {
        self.in_flight += 1;
        self.in_flight_bytes += request::weight(&request);
        let (export, fence) = (self.export.clone(), self.membership.fence().clone());
        let received = self.received;
        let (contexts, finished) = (self.contexts.clone(), self.finished.clone());
        let share = self.budget.take(request::weight(&request));
        self.shared.spawn(async move {
            let outcome = request::run(export, fence, contexts, request, payload, rest).await;
            finished.post(Finished { request, outcome, received, _share: share });
        });
    }

    fn commit_unasked(&self) {
        let export = self.export.clone();
        self.shared.spawn_blocking(move || {
            if let Err(error) = export.device().commit_unasked() {
                tracing::warn!(export = export.name(), %error, "can't commit writes that were not flushed yet");
            }
        });
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // The peers list has a descriptor of this socket until the membership goes: the client is told now.
        let _ = rustix::net::shutdown(self.socket.as_fd(), rustix::net::Shutdown::Both);
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted
    )
}

#[cfg(test)]
mod tests;
