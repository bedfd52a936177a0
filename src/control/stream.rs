//! Long answers of the daemon, as they come.
//!
//! Enters: the body of an answer. Leaves: its pieces. Invariants: an answer that is cut short is an error, never an end; every wait for a piece is bounded.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::task::JoinHandle;

use super::ClientError;

/// An answer that is being read.
#[derive(Debug)]
pub struct Streamed {
    body: Incoming,
    limit: Duration,
    connection: JoinHandle<Result<(), hyper::Error>>,
}

impl Streamed {
    pub(super) fn new(
        body: Incoming,
        limit: Duration,
        connection: JoinHandle<Result<(), hyper::Error>>,
    ) -> Streamed {
        Streamed { body, limit, connection }
    }

    /// The next piece; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        loop {
            let frame = tokio::time::timeout(self.limit, self.body.frame()).await;
            match frame.map_err(|_| ClientError::TimedOut(self.limit))? {
                None => return Ok(None),
                // Trailers are nothing to us.
                Some(frame) => {
                    if let Ok(data) = frame?.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }
}

impl Drop for Streamed {
    fn drop(&mut self) {
        self.connection.abort();
    }
}
