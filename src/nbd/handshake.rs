//! The handshake of one connection: drives the protocol's state machine with a socket.
//!
//! Invariant: it ends within its limit of time, whatever the client does or does not send.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use nbd_proto::server::{Config, Event, Handshake, Negotiated, Refusal, StreamError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::export::Export;
use super::exports::{Exports, NotServed};
use super::listener::Stream;

const READ_BUFFER: usize = 4 << 10;

/// A handshake that came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The client does not speak the protocol.
    #[error(transparent)]
    Protocol(#[from] StreamError),
    /// The socket failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The client took too long.
    #[error("no export was chosen within {} s", .0.as_secs_f64())]
    Timeout(Duration),
}

/// A client that chose an export, and what it sent after that.
pub struct Chosen {
    pub negotiated: Negotiated,
    pub export: Arc<Export>,
    pub input: BytesMut,
}

/// Runs the handshake for at most `limit`; `None` where the client went away or gave up, as clients that only list do.
pub async fn run(
    stream: &mut Stream,
    exports: &Exports,
    limit: Duration,
) -> Result<Option<Chosen>, HandshakeError> {
    let conversation = converse(stream, exports);
    tokio::time::timeout(limit, conversation).await.map_err(|_| HandshakeError::Timeout(limit))?
}

async fn converse(stream: &mut Stream, exports: &Exports) -> Result<Option<Chosen>, HandshakeError> {
    let mut machine = Handshake::new(Config::default());
    let mut input = BytesMut::with_capacity(READ_BUFFER);
    let mut found: Option<(String, Arc<Export>)> = None;
    loop {
        let fed = machine.handle_input(&input);
        if let Ok(used) = fed {
            input.advance(used);
        }
        let mut done = None;
        let mut progressed = fed.as_ref().is_ok_and(|used| *used > 0);
        while let Some(event) = machine.poll_event() {
            progressed = true;
            match event {
                Event::Lookup(lookup) => match exports.find(&lookup.name).await {
                    Ok(export) => {
                        machine.accept(&export.info());
                        found = Some((lookup.name, export));
                    }
                    Err(NotServed::Unavailable(why)) => machine.refuse(Refusal::Unknown, &why)?,
                    Err(NotServed::Stopping) => {
                        machine.refuse(Refusal::Shutdown, "the server is stopping")?
                    }
                },
                Event::List => {
                    let all = exports.list();
                    machine.list(all.iter().map(|(name, description)| (name.as_str(), description.as_str())));
                }
                // Not offered in the configuration, so it can't come.
                Event::StartTls => return Ok(None),
                Event::Aborted => done = Some(None),
                Event::Done(negotiated) => {
                    // The one its facts were told of, whatever has come under its name since.
                    let export = found.take().filter(|(name, _)| *name == negotiated.name);
                    done = Some(export.map(|(_, export)| (negotiated, export)));
                }
            }
        }
        // Even where the client broke the rules: the output may say so.
        stream.write_all(machine.output()).await?;
        machine.output().clear();
        fed?;
        if let Some(done) = done {
            return Ok(done.map(|(negotiated, export)| Chosen { negotiated, export, input }));
        }
        if progressed && !input.is_empty() {
            continue;
        }
        input.reserve(READ_BUFFER);
        if stream.read_buf(&mut input).await? == 0 {
            return Ok(None);
        }
    }
}
