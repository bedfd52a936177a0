//! The handshake of one connection: drives the protocol's state machine with a socket.
//!
//! Invariant: it ends within its limit of time, whatever the client does or does not send.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use nbd_proto::server::{Config, Event, Handshake, Negotiated, Refusal, StreamError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::export::Export;
use super::listener::Stream;

const READ_BUFFER: usize = 4 << 10;

/// The exports of a server, by name.
pub type Exports = BTreeMap<String, Arc<Export>>;

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

/// The export of a name; the empty name is the only one there is, if there is only one.
fn find<'a>(exports: &'a Exports, name: &str) -> Option<&'a Arc<Export>> {
    match exports.get(name) {
        None if name.is_empty() && exports.len() == 1 => exports.values().next(),
        found => found,
    }
}

async fn converse(stream: &mut Stream, exports: &Exports) -> Result<Option<Chosen>, HandshakeError> {
    let mut machine = Handshake::new(Config::default());
    let mut input = BytesMut::with_capacity(READ_BUFFER);
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
                Event::Lookup(lookup) => match find(exports, &lookup.name) {
                    Some(export) => machine.accept(&export.info()),
                    None => machine.refuse(Refusal::Unknown, &unknown(exports, &lookup.name))?,
                },
                Event::List => {
                    machine.list(exports.values().map(|export| (export.name(), export.description())));
                }
                // Not offered in the configuration, so it can't come.
                Event::StartTls => return Ok(None),
                Event::Aborted => done = Some(None),
                Event::Done(negotiated) => {
                    let export = find(exports, &negotiated.name).cloned();
                    done = Some(export.map(|export| (negotiated, export)));
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

fn unknown(exports: &Exports, name: &str) -> String {
    /// Names in a message: enough to see a typing error, few enough for one line.
    const MOST: usize = 8;
    let names: Vec<&str> = exports.keys().map(String::as_str).take(MOST).collect();
    let more = if exports.len() > MOST { ", ..." } else { "" };
    format!("no export '{name}'; there is: {}{more}", names.join(", "))
}
