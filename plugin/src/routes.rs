//! Docker's addresses.
//!
//! Every request is read to its end, because a client that is still sending when it is answered and left may take that for a failure.
//! Invariant: what changes something runs in a task of its own, so that a Docker that goes away in the middle leaves no half of it. What was
//! understood is answered by JSON with an `Err`, which Docker shows as it is.

use std::future::Future;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::http::{Response, StatusCode, Uri};
use axum::middleware::{self, Next};
use axum::routing::post;
use serde::de::DeserializeOwned;

use crate::driver::{Driver, DriverError};
use crate::words::{Answer, Capabilities, Create, Named, Use};

/// A request's body: a name and options.
const MAX_BODY: usize = 64 << 10;
/// What Docker calls the protocol.
const CONTENT: &str = "application/vnd.docker.plugins.v1.2+json";

type Shared = State<Arc<Driver>>;
type Answered = Response<Body>;

/// All addresses.
pub fn router(driver: Arc<Driver>) -> Router {
    Router::new()
        .route("/Plugin.Activate", post(activate))
        .route("/VolumeDriver.Capabilities", post(capabilities))
        .route("/VolumeDriver.Create", post(create))
        .route("/VolumeDriver.Remove", post(remove))
        .route("/VolumeDriver.Mount", post(mount))
        .route("/VolumeDriver.Unmount", post(unmount))
        .route("/VolumeDriver.Path", post(path))
        .route("/VolumeDriver.Get", post(get))
        .route("/VolumeDriver.List", post(list))
        .fallback(async |uri: Uri| {
            let err = format!("there is no {}: POST to /VolumeDriver.* or /Plugin.Activate", uri.path());
            answered(StatusCode::NOT_FOUND, &Answer { err, ..Answer::default() })
        })
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(middleware::from_fn(refuse_as_understood))
        .with_state(driver)
}

/// Marks an answer that refuses.
#[derive(Clone, Copy)]
struct Refusal;

/// Docker says what it accepts, and shows the words of a refusal as they are if the status is 200, else with the address before them. Podman says nothing, and
/// takes 200 for success whatever the words.
async fn refuse_as_understood(request: Request, next: Next) -> Answered {
    let is_docker = request.headers().contains_key(ACCEPT);
    let mut response = next.run(request).await;
    if response.extensions().get::<Refusal>().is_some() && !is_docker {
        *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
    }
    response
}

async fn activate(State(driver): Shared, _: Bytes) -> Answered {
    let greeted = async move {
        driver.activate().await?;
        Ok(Answer { implements: Some(["VolumeDriver"]), ..Answer::default() })
    };
    finish(greeted).await
}

async fn capabilities(_: Bytes) -> Answered {
    let capabilities = Some(Capabilities { scope: "local" });
    answered(StatusCode::OK, &Answer { capabilities, ..Answer::default() })
}

async fn create(State(driver): Shared, body: Bytes) -> Answered {
    finish(async move {
        let Create { name, opts } = read(&body)?;
        driver.create(&name, &opts.unwrap_or_default()).await?;
        Ok(Answer::default())
    })
    .await
}

async fn remove(State(driver): Shared, body: Bytes) -> Answered {
    finish(async move {
        let Named { name } = read(&body)?;
        driver.remove(&name).await?;
        Ok(Answer::default())
    })
    .await
}

async fn mount(State(driver): Shared, body: Bytes) -> Answered {
    finish(async move {
        let Use { name, id } = read(&body)?;
        let dir = driver.mount(&name, &id).await?;
        Ok(Answer { mountpoint: Some(dir.display().to_string()), ..Answer::default() })
    })
    .await
}

async fn unmount(State(driver): Shared, body: Bytes) -> Answered {
    finish(async move {
        let Use { name, id } = read(&body)?;
        driver.unmount(&name, &id).await?;
        Ok(Answer::default())
    })
    .await
}

async fn path(State(driver): Shared, body: Bytes) -> Answered {
    finish(async move {
        let Named { name } = read(&body)?;
        let dir = driver.path(&name)?;
        let mountpoint = Some(dir.map(|dir| dir.display().to_string()).unwrap_or_default());
        Ok(Answer { mountpoint, ..Answer::default() })
    })
    .await
}

async fn get(State(driver): Shared, body: Bytes) -> Answered {
    finish(async move {
        let Named { name } = read(&body)?;
        Ok(Answer { volume: Some(driver.get(&name).await?), ..Answer::default() })
    })
    .await
}

async fn list(State(driver): Shared, _: Bytes) -> Answered {
    finish(async move { Ok(Answer { volumes: Some(driver.list()), ..Answer::default() }) }).await
}

/// Docker does not call its JSON `application/json`.
fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, DriverError> {
    if body.is_empty() {
        return Err(DriverError::Empty);
    }
    serde_json::from_slice(body).map_err(DriverError::Request)
}

/// Brings something to its end whether or not Docker waits for it.
async fn finish(work: impl Future<Output = Result<Answer, DriverError>> + Send + 'static) -> Answered {
    let done = tokio::spawn(work).await.unwrap_or(Err(DriverError::Internal));
    let error = match done {
        Ok(answer) => return answered(StatusCode::OK, &answer),
        Err(error) => error,
    };
    match error {
        // Docker asks for every name it is given before it makes a volume of it.
        DriverError::NoVolume(_) => tracing::debug!(%error, "refused"),
        _ => tracing::warn!(%error, "refused"),
    }
    let mut refused = answered(StatusCode::OK, &Answer { err: error.to_string(), ..Answer::default() });
    refused.extensions_mut().insert(Refusal);
    refused
}

fn answered(status: StatusCode, answer: &Answer) -> Answered {
    let body = serde_json::to_vec(answer).unwrap_or_default();
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, axum::http::HeaderValue::from_static(CONTENT));
    response
}
