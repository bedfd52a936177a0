//! An HTTP server on a socket: the API's, and the Docker driver's.
//!
//! Invariant: what clients may hold is bounded: so many connections, so long for a request's head and body; after a stop nobody is waited for longer than the grace.

use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, Response};
use bytes::Bytes;
use hyper::body::{Body as _, Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::listener::{Accepted, Listener, Stream};

/// Clients at a time; more wait to be accepted.
const MAX_CONNECTIONS: usize = 128;
/// A client has this long for the head of a request, and so an idle connection between two.
const HEAD_LIMIT: Duration = Duration::from_secs(30);
/// After a stop, requests in flight have this long.
const GRACE: Duration = Duration::from_secs(10);
/// So much of a request that is answered already is read, and for so long.
const MOST_LEFT: usize = 1 << 20;
const LEFT_LIMIT: Duration = Duration::from_secs(5);
/// An answer that is ready has this long to be sent.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// After a failed accept (as a rule for want of descriptors) the next one waits.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves these routes until `stop` is cancelled.
pub async fn serve(listener: Listener, router: Router, stop: CancellationToken) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let connections = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = next(&listener, &places) => accepted,
        };
        match accepted {
            Ok((accepted, place)) => {
                let (router, stop) = (router.clone(), stop.clone());
                connections.spawn(async move {
                    if let Some(stream) = greeted(accepted, &stop).await {
                        converse(stream, router, stop).await;
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "can't accept a control connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    connections.close();
    let _ = tokio::time::timeout(GRACE, connections.wait()).await;
}

async fn next(
    listener: &Listener,
    places: &Arc<Semaphore>,
) -> io::Result<(Accepted, tokio::sync::OwnedSemaphorePermit)> {
    let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
    Ok((listener.accept().await?, place))
}

/// The client, once it has said who it is; `None` where it does not, or not in time.
async fn greeted(accepted: Accepted, stop: &CancellationToken) -> Option<Box<dyn Stream>> {
    let greeting = tokio::time::timeout(HEAD_LIMIT, accepted.greeted());
    let greeted = tokio::select! { greeted = greeting => greeted, () = stop.cancelled() => return None };
    match greeted.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
        Ok(stream) => Some(stream),
        Err(error) => {
            tracing::debug!(%error, "a client was not let in");
            None
        }
    }
}

async fn converse(stream: Box<dyn Stream>, router: Router, stop: CancellationToken) {
    let (busy, mut is_busy) = watch::channel(0usize);
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        let (router, under_way) = (router.clone(), UnderWay::new(busy.clone()));
        async move {
            let answered = answer(router, request).await;
            drop(under_way);
            answered
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                ended = connection.as_mut() => ended,
                // One that has asked for nothing, or not yet to the end, is not waited for; an answer is sent out.
                () = async { drop(is_busy.wait_for(|requests| *requests == 0).await) } => {
                    tokio::time::timeout(LAST_WORDS, connection).await.unwrap_or(Ok(()))
                }
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "control connection lost");
    }
}

/// Counts a request that is being answered.
struct UnderWay(watch::Sender<usize>);

impl UnderWay {
    fn new(count: watch::Sender<usize>) -> UnderWay {
        count.send_modify(|requests| *requests += 1);
        UnderWay(count)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.send_modify(|requests| *requests -= 1);
    }
}

/// A request's body, of which more can be read once its answer is known: a router keeps none of it.
struct Shared(Arc<Mutex<Incoming>>);

impl hyper::body::Body for Shared {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut *self.0.lock()).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.0.lock().is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.lock().size_hint()
    }
}

async fn answer(router: Router, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let mut router = router;
    let (head, body) = request.into_parts();
    let body = Arc::new(Mutex::new(body));
    let shared = Body::new(Shared(body.clone()));
    let answered = tower_service::Service::call(&mut router, Request::from_parts(head, shared)).await;
    // Who is still sending would find the connection closed, and not hear why.
    let rest = async {
        let mut left = MOST_LEFT;
        while left > 0
            && let Some(Ok(frame)) = poll_fn(|context| Pin::new(&mut *body.lock()).poll_frame(context)).await
        {
            left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
        }
    };
    let _ = tokio::time::timeout(LEFT_LIMIT, rest).await;
    answered
}
