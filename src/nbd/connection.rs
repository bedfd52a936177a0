//! One connection in its transmission phase.
//!
//! Enters: bytes of a socket. Leaves: replies. Invariant: what is held for a client is bounded ([`MAX_IN_FLIGHT`], [`MAX_IN_FLIGHT_BYTES`],
//! [`MAX_OUTPUT`]); when a bound is reached no more is read from it until something has left.
//!
//! Payloads of writes are used where they were received if they are there whole, else received straight into a buffer of their own.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use nbd_proto::server::{Decoded, Replies, StreamError, Transmission};
use nbd_proto::{Command, Errno, ExportFacts, Request, validate};
use tokio::io::AsyncWrite;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_util::io::poll_read_buf;
use tokio_util::sync::CancellationToken;

use super::export::Export;
use super::handshake::Chosen;
use super::listener::Stream;
use super::output::{MAX_SLICES, Output};
use super::peers::Membership;
use super::reply::{self, Outcome};
use super::request::{self, ContextKind, Rest};

/// Bytes received at a time: 64 writes of 4 KiB.
const RECEIVE_BUFFER: usize = 256 << 10;
/// Requests that wait for something, of one connection.
const MAX_IN_FLIGHT: usize = 256;
/// Bytes those requests are about.
const MAX_IN_FLIGHT_BYTES: u64 = 64 << 20;
/// Bytes of replies the client has not taken.
const MAX_OUTPUT: u64 = 8 << 20;

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
    /// The client closed the socket without saying so, with nothing under way: many do.
    Closed,
    /// The client's end of the socket is closed, and a request of it was half received, in flight or not answered yet.
    Vanished,
    /// The server stops.
    Stopped,
}

/// What the next bytes of the client are.
enum Receiving {
    Header,
    /// The payload of a valid request; `buffer` has room for all of it.
    Payload {
        request: Request,
        buffer: BytesMut,
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
}

struct Connection {
    stream: Stream,
    export: Arc<Export>,
    membership: Membership,
    shared: Handle,
    decoder: Transmission,
    replies: Replies,
    facts: ExportFacts,
    contexts: Arc<[(u32, ContextKind)]>,
    input: BytesMut,
    receiving: Receiving,
    output: Output,
    in_flight: usize,
    in_flight_bytes: u64,
    finished: mpsc::UnboundedReceiver<Finished>,
    finish: mpsc::UnboundedSender<Finished>,
    /// Bytes were received since the other connections were last looked at.
    unchecked: bool,
}

/// Serves the client until it is done, vanishes, or `stop` is called; then finishes what is in flight. Slow requests run on `shared`.
pub async fn run(
    stream: Stream,
    chosen: Chosen,
    shared: Handle,
    stop: CancellationToken,
) -> Result<End, ConnectionError> {
    let Chosen { negotiated, export, mut input } = chosen;
    let membership = export.peers().join(stream.duplicate()?);
    let decoder = negotiated.transmission();
    let contexts = negotiated
        .contexts
        .iter()
        .filter_map(|context| ContextKind::of(&context.name).map(|kind| (context.id, kind)))
        .collect();
    let (finish, finished) = mpsc::unbounded_channel();
    input.reserve(RECEIVE_BUFFER);
    let mut connection = Connection {
        replies: decoder.replies(),
        facts: negotiated.facts(),
        stream,
        export,
        membership,
        shared,
        decoder,
        contexts,
        input,
        receiving: Receiving::Header,
        output: Output::default(),
        in_flight: 0,
        in_flight_bytes: 0,
        finished,
        finish,
        unchecked: true,
    };
    connection.serve(stop).await
}

impl Connection {
    async fn serve(&mut self, stop: CancellationToken) -> Result<End, ConnectionError> {
        let mut stopped = std::pin::pin!(stop.cancelled());
        let mut end = None;
        loop {
            let broken = if end.is_none() { self.process().err() } else { None };
            if let Some(error) = broken {
                // What was answered before is still sent, if the client takes it at once.
                let _ = poll_fn(|cx| Poll::Ready(self.poll_send(cx))).await;
                return Err(error.into());
            }
            if self.decoder.is_closed() {
                end.get_or_insert(End::Disconnected);
            }
            if let Some(end) = end
                && (matches!(end, End::Closed | End::Vanished) || self.is_idle())
            {
                return Ok(end);
            }
            let wants_input = end.is_none() && self.has_room();
            let stopping = end.is_some();
            let happened = poll_fn(|cx| {
                if !stopping && stopped.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(Ok(Some(End::Stopped)));
                }
                self.poll_io(cx, wants_input)
            })
            .await?;
            end = match happened {
                // Whatever it was about to end for: nobody is left to take what is still to be sent.
                Some(End::Closed | End::Vanished) => happened,
                _ => end.or(happened),
            };
        }
    }

    /// Whether every request that came whole has been answered.
    fn is_idle(&self) -> bool {
        self.in_flight == 0 && self.output.pending() == 0
    }

    /// How the connection ended, now that the other end is closed.
    fn gone(&self) -> End {
        let between_requests = self.input.is_empty() && matches!(self.receiving, Receiving::Header);
        if between_requests && self.is_idle() { End::Closed } else { End::Vanished }
    }

    /// Whether more of the client's requests may be taken on.
    #[inline]
    fn has_room(&self) -> bool {
        self.in_flight < MAX_IN_FLIGHT
            && self.in_flight_bytes < MAX_IN_FLIGHT_BYTES
            && self.output.pending() < MAX_OUTPUT
    }

    /// Does what the bytes received so far ask for.
    fn process(&mut self) -> Result<(), StreamError> {
        while self.has_room() {
            match &mut self.receiving {
                Receiving::Header => {
                    let request = match self.decoder.decode(&self.input)? {
                        Decoded::Need(_) => return Ok(()),
                        Decoded::Request(request) => request,
                    };
                    self.input.advance(self.decoder.header_len());
                    if request.command == Command::Disc {
                        return Ok(());
                    }
                    let verdict = validate(&request, &self.facts);
                    let payload = request.payload as usize;
                    match verdict {
                        Err(errno) if payload == 0 => self.refuse(&request, errno),
                        Err(errno) => self.receiving = Receiving::Drain { request, errno, left: payload },
                        Ok(()) if payload <= self.input.len() => {
                            let payload = self.input.split_to(payload);
                            self.decoder.payload_done();
                            self.begin(request, payload);
                        }
                        Ok(()) => {
                            // Validation bounds it. What is here moves over, the rest is received into its place.
                            let mut buffer = BytesMut::with_capacity(payload);
                            buffer.put(self.input.split());
                            self.receiving = Receiving::Payload { request, buffer };
                        }
                    }
                }
                Receiving::Payload { request, buffer } => {
                    if buffer.len() < request.payload as usize {
                        return Ok(());
                    }
                    let (request, buffer) = (*request, std::mem::take(buffer));
                    self.receiving = Receiving::Header;
                    self.decoder.payload_done();
                    self.begin(request, buffer);
                }
                Receiving::Drain { request, errno, left } => {
                    let here = self.input.len().min(*left);
                    self.input.advance(here);
                    *left -= here;
                    if *left > 0 {
                        return Ok(());
                    }
                    let (request, errno) = (*request, *errno);
                    self.receiving = Receiving::Header;
                    self.decoder.payload_done();
                    self.refuse(&request, errno);
                }
            }
        }
        Ok(())
    }

    fn refuse(&mut self, request: &Request, errno: Errno) {
        let outcome = Outcome::Failed(errno, errno.to_string());
        reply::put(&mut self.output, self.replies, request, outcome);
    }

    #[inline]
    fn begin(&mut self, request: Request, payload: BytesMut) {
        if request.command.is_write() && self.unchecked {
            // The client may have sent this again after another of its connections died: what that one still has must not come after it.
            self.membership.fence_the_dead();
            self.unchecked = false;
        }
        let fence = self.membership.fence();
        match request::try_now(&self.export, fence, &request, &payload) {
            Ok(outcome) => reply::put(&mut self.output, self.replies, &request, outcome),
            Err(rest) => self.begin_task(request, payload.freeze(), rest),
        }
        if request.command.is_write() && self.export.device().claim_unasked_commit() {
            self.commit_unasked();
        }
    }

    fn begin_task(&mut self, request: Request, payload: Bytes, rest: Rest) {
        self.in_flight += 1;
        self.in_flight_bytes += request::weight(&request);
        let (export, fence) = (self.export.clone(), self.membership.fence().clone());
        let (contexts, finish) = (self.contexts.clone(), self.finish.clone());
        self.shared.spawn(async move {
            let outcome = request::run(export, fence, contexts, request, payload, rest).await;
            // Nobody waits any more if the connection is gone.
            let _ = finish.send(Finished { request, outcome });
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

    /// Waits until something happened; `Some` if the client went away.
    fn poll_io(&mut self, cx: &mut Context<'_>, wants_input: bool) -> Poll<io::Result<Option<End>>> {
        let mut happened = false;
        while let Poll::Ready(Some(Finished { request, outcome })) = self.finished.poll_recv(cx) {
            self.in_flight -= 1;
            self.in_flight_bytes -= request::weight(&request);
            reply::put(&mut self.output, self.replies, &request, outcome);
            happened = true;
        }
        happened |= match self.poll_send(cx) {
            Ok(sent) => sent,
            // The other end is closed for writing; what it sent before does not count either.
            Err(error) if is_gone(&error) => return Poll::Ready(Ok(Some(self.gone()))),
            Err(error) => return Poll::Ready(Err(error)),
        };
        if wants_input {
            match self.poll_receive(cx) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Ok(Some(self.gone()))),
                Poll::Ready(Ok(_)) => happened = true,
                Poll::Ready(Err(error)) if is_gone(&error) => return Poll::Ready(Ok(Some(self.gone()))),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {}
            }
        }
        if happened { Poll::Ready(Ok(None)) } else { Poll::Pending }
    }

    /// Sends as much as the socket takes; tells whether that was anything.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        let mut sent = false;
        while self.output.pending() > 0 {
            let mut slices = Vec::with_capacity(MAX_SLICES.min(8));
            self.output.slices(&mut slices);
            match Pin::new(&mut self.stream).poll_write_vectored(cx, &slices) {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(written)) => {
                    drop(slices);
                    self.output.advance(written);
                    sent = true;
                }
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => break,
            }
        }
        Ok(sent)
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let Connection { stream, receiving, input, .. } = self;
        let stream = Pin::new(stream);
        let received = match receiving {
            Receiving::Payload { request, buffer } => {
                let missing = request.payload as usize - buffer.len();
                std::task::ready!(poll_read_buf(stream, cx, &mut buffer.limit(missing)))?
            }
            Receiving::Header | Receiving::Drain { .. } => {
                input.reserve(RECEIVE_BUFFER / 2);
                std::task::ready!(poll_read_buf(stream, cx, input))?
            }
        };
        self.unchecked = true;
        Poll::Ready(Ok(received))
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted
    )
}
