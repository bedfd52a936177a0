//! What the API answers, address by address.
//!
//! Invariant: what changes something runs in a task of its own, so that a client that goes away in the middle leaves no half of it.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderName, Method, StatusCode, Uri};
use axum::routing::get;
use axum::{Json, Router};
use tokio::sync::Semaphore;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::api::{Attach, CacheStatus, CreateVolume, Failure, Job, Mount, Status, Unmount, Volume};
use super::failure::Refused;
use super::{files, metrics};
use crate::host::{Host, HostError};
use crate::units::ByteLen;
use crate::volume::{NewVolume, VolumeName};

/// A request's body: names, URLs and numbers.
const MAX_BODY: usize = 64 << 10;

#[derive(OpenApi)]
#[openapi(info(
    title = "Horcrux control API",
    description = "Volumes of a Horcrux daemon: made, looked at, taken away."
))]
struct Document;

/// What every handler may use.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) host: Arc<Host>,
    /// Who reads files; others wait.
    pub(super) readers: Arc<Semaphore>,
    started: Instant,
}

/// All routes, and the document that describes them.
pub fn router(host: Arc<Host>) -> Router {
    let (router, document) = OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(status))
        .routes(routes!(list, create))
        .routes(routes!(inspect, remove))
        .routes(routes!(attach))
        .routes(routes!(detach))
        .routes(routes!(mount))
        .routes(routes!(unmount))
        .routes(routes!(pin))
        .routes(routes!(unpin))
        .routes(routes!(files::files))
        .routes(routes!(files::diff))
        .routes(routes!(jobs))
        .routes(routes!(job, cancel))
        .routes(routes!(figures))
        .split_for_parts();
    router
        .route("/openapi.json", get(move || async move { Json(document) }))
        .fallback(async |method: Method, uri: Uri| Refused::no_route(method.as_str(), uri.path()))
        .method_not_allowed_fallback(async |method: Method, uri: Uri| {
            Refused::no_route(method.as_str(), uri.path())
        })
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(Shared {
            host,
            readers: Arc::new(Semaphore::new(files::MOST_READERS)),
            started: Instant::now(),
        })
}

/// Brings something to its end whether or not the client waits for it.
async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, HostError>> + Send + 'static,
) -> Result<T, Refused> {
    match tokio::spawn(work).await {
        Ok(done) => done.map_err(Refused::from),
        // It panicked, which was logged where it did.
        Err(_) => Err(Refused::internal()),
    }
}

/// Looks at something on a thread that may wait for the kernel. Never an empty answer for want of a true one: who asks would forget his volumes.
async fn looked_at<T: Send + 'static>(look: impl FnOnce() -> T + Send + 'static) -> Result<T, Refused> {
    tokio::task::spawn_blocking(look).await.map_err(|_| Refused::internal())
}

pub(super) fn name_of(text: &str) -> Result<VolumeName, Refused> {
    text.parse().map_err(Refused::bad_request)
}

/// The daemon as it is now
#[utoipa::path(get, path = "/v1/status", responses((status = 200, body = Status)))]
async fn status(State(shared): State<Shared>) -> Result<Json<Status>, Refused> {
    let host = shared.host.clone();
    let volumes = looked_at(move || host.list()).await?;
    let cache = shared.host.cache().stats();
    Ok(Json(Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        up_s: shared.started.elapsed().as_secs(),
        state_dir: shared.host.state_dir().display().to_string(),
        volumes: volumes.len() as u64,
        open: volumes.iter().filter(|volume| volume.open.is_some()).count() as u64,
        cache: CacheStatus {
            used_bytes: cache.used.0,
            limit_bytes: cache.limit.0,
            fetched_bytes: cache.fetched.0,
            hits: cache.hits,
            misses: cache.misses,
            healed: cache.healed,
        },
    }))
}

/// Every volume, by name
#[utoipa::path(get, path = "/v1/volumes", responses((status = 200, body = Vec<Volume>)))]
async fn list(State(shared): State<Shared>) -> Result<Json<Vec<Volume>>, Refused> {
    let listing = move || shared.host.list().into_iter().map(Volume::from).collect();
    Ok(Json(looked_at(listing).await?))
}

/// One volume
#[utoipa::path(get, path = "/v1/volumes/{name}", params(("name" = String, Path, description = "The volume's name")),
    responses((status = 200, body = Volume), (status = 404, body = Failure)))]
async fn inspect(State(shared): State<Shared>, Path(name): Path<String>) -> Result<Json<Volume>, Refused> {
    let name = name_of(&name)?;
    let cached = shared.host.cached(&name).await?.map(|ByteLen(bytes)| bytes);
    let status = looked_at(move || shared.host.inspect(&name)).await??;
    Ok(Json(Volume { cached_bytes: cached, ..status.into() }))
}

/// Make a volume; one that is there and was made of the same wishes is left as it is
#[utoipa::path(post, path = "/v1/volumes", request_body = CreateVolume,
    responses((status = 200, body = Volume, description = "It was there"), (status = 201, body = Volume), (status = 400, body = Failure),
        (status = 409, body = Failure), (status = 422, body = Failure), (status = 504, body = Failure)))]
async fn create(
    State(shared): State<Shared>,
    wanted: Result<Json<CreateVolume>, JsonRejection>,
) -> Result<(StatusCode, Json<Volume>), Refused> {
    let Json(wanted) = wanted?;
    let new = new_volume(wanted)?;
    let (volume, is_new) = to_its_end(async move { shared.host.create(&new).await }).await?;
    Ok((if is_new { StatusCode::CREATED } else { StatusCode::OK }, Json(volume.into())))
}

/// Take a volume away, with what was written to it
#[utoipa::path(delete, path = "/v1/volumes/{name}", params(("name" = String, Path, description = "The volume's name")),
    responses((status = 204), (status = 404, body = Failure), (status = 409, body = Failure)))]
async fn remove(State(shared): State<Shared>, Path(name): Path<String>) -> Result<StatusCode, Refused> {
    let name = name_of(&name)?;
    to_its_end(async move { shared.host.remove(&name).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Make a volume a kernel device; one that is a device stays it
#[utoipa::path(post, path = "/v1/volumes/{name}/attach", params(("name" = String, Path, description = "The volume's name")),
    request_body = Attach, responses((status = 200, body = Volume), (status = 403, body = Failure), (status = 404, body = Failure),
        (status = 409, body = Failure), (status = 503, body = Failure)))]
async fn attach(
    State(shared): State<Shared>,
    Path(name): Path<String>,
    wanted: Result<Json<Attach>, JsonRejection>,
) -> Result<Json<Volume>, Refused> {
    let (name, Json(wanted)) = (name_of(&name)?, wanted?);
    let attaching = async move {
        let device = wanted.device.map(PathBuf::from);
        shared.host.attach(&name, device.as_deref()).await
    };
    Ok(Json(to_its_end(attaching).await?.into()))
}

/// Make a volume a kernel device no more; nobody may have it mounted
#[utoipa::path(post, path = "/v1/volumes/{name}/detach", params(("name" = String, Path, description = "The volume's name")),
    responses((status = 204), (status = 404, body = Failure), (status = 409, body = Failure)))]
async fn detach(State(shared): State<Shared>, Path(name): Path<String>) -> Result<StatusCode, Refused> {
    let name = name_of(&name)?;
    to_its_end(async move { shared.host.detach(&name).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Mount a volume on a directory of the daemon's mount namespace, attaching it if it is no device yet
#[utoipa::path(post, path = "/v1/volumes/{name}/mount", params(("name" = String, Path, description = "The volume's name")),
    request_body = Mount, responses((status = 200, body = Volume), (status = 400, body = Failure), (status = 403, body = Failure),
        (status = 404, body = Failure), (status = 409, body = Failure), (status = 422, body = Failure), (status = 503, body = Failure),
        (status = 504, body = Failure)))]
async fn mount(
    State(shared): State<Shared>,
    Path(name): Path<String>,
    wanted: Result<Json<Mount>, JsonRejection>,
) -> Result<Json<Volume>, Refused> {
    let (name, Json(wanted)) = (name_of(&name)?, wanted?);
    let dir = absolute(wanted.directory)?;
    Ok(Json(to_its_end(async move { shared.host.mount(&name, &dir).await }).await?.into()))
}

/// Unmount a volume, and make it a kernel device no more where no mount is left
#[utoipa::path(post, path = "/v1/volumes/{name}/unmount", params(("name" = String, Path, description = "The volume's name")),
    request_body = Unmount, responses((status = 204), (status = 400, body = Failure), (status = 404, body = Failure), (status = 409, body = Failure)))]
async fn unmount(
    State(shared): State<Shared>,
    Path(name): Path<String>,
    wanted: Result<Json<Unmount>, JsonRejection>,
) -> Result<StatusCode, Refused> {
    let (name, Json(wanted)) = (name_of(&name)?, wanted?);
    let dir = wanted.directory.map(absolute).transpose()?;
    to_its_end(async move { shared.host.unmount(&name, dir.as_deref()).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Begin to fetch all of a volume, which then stays here: a job; where that is under way already, it is that one
#[utoipa::path(post, path = "/v1/volumes/{name}/pin", params(("name" = String, Path, description = "The volume's name")),
    responses((status = 202, body = Job), (status = 404, body = Failure), (status = 504, body = Failure)))]
async fn pin(
    State(shared): State<Shared>,
    Path(name): Path<String>,
) -> Result<(StatusCode, Json<Job>), Refused> {
    let name = name_of(&name)?;
    let job = to_its_end(async move { shared.host.pin(&name).await }).await?;
    Ok((StatusCode::ACCEPTED, Json(job.into())))
}

/// Let a pinned volume leave the cache again
#[utoipa::path(post, path = "/v1/volumes/{name}/unpin", params(("name" = String, Path, description = "The volume's name")),
    responses((status = 204), (status = 404, body = Failure), (status = 409, body = Failure)))]
async fn unpin(State(shared): State<Shared>, Path(name): Path<String>) -> Result<StatusCode, Refused> {
    let name = name_of(&name)?;
    to_its_end(async move { shared.host.unpin(&name).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Every job that runs, and the last that ended
#[utoipa::path(get, path = "/v1/jobs", responses((status = 200, body = Vec<Job>)))]
async fn jobs(State(shared): State<Shared>) -> Json<Vec<Job>> {
    Json(shared.host.jobs().into_iter().map(Job::from).collect())
}

/// One job
#[utoipa::path(get, path = "/v1/jobs/{id}", params(("id" = u64, Path, description = "The job's number")),
    responses((status = 200, body = Job), (status = 404, body = Failure)))]
async fn job(State(shared): State<Shared>, Path(id): Path<String>) -> Result<Json<Job>, Refused> {
    Ok(Json(shared.host.job(job_id(&id)?)?.into()))
}

/// Have a job end before it is done; one that has ended stays as it is
#[utoipa::path(delete, path = "/v1/jobs/{id}", params(("id" = u64, Path, description = "The job's number")),
    responses((status = 202, body = Job), (status = 404, body = Failure)))]
async fn cancel(
    State(shared): State<Shared>,
    Path(id): Path<String>,
) -> Result<(StatusCode, Json<Job>), Refused> {
    Ok((StatusCode::ACCEPTED, Json(shared.host.cancel(job_id(&id)?)?.into())))
}

fn job_id(text: &str) -> Result<u64, Refused> {
    text.parse().map_err(|_| Refused::bad_request(format!("'{text}' is no job's number")))
}

/// Everything in figures, for Prometheus (OpenMetrics text)
#[utoipa::path(get, path = "/metrics", responses((status = 200, body = String, content_type = "application/openmetrics-text")))]
async fn figures(State(shared): State<Shared>) -> Result<([(HeaderName, &'static str); 1], String), Refused> {
    let text = metrics::text(&shared.host, shared.started.elapsed()).await;
    Ok(([(CONTENT_TYPE, metrics::CONTENT)], text.map_err(|_| Refused::internal())?))
}

fn absolute(directory: String) -> Result<PathBuf, Refused> {
    let dir = PathBuf::from(directory);
    if dir.is_absolute() {
        Ok(dir)
    } else {
        Err(Refused::bad_request("the directory's path must be absolute"))
    }
}

fn new_volume(wanted: CreateVolume) -> Result<NewVolume, Refused> {
    if wanted.access.is_empty() {
        return Err(Refused::bad_request("a volume needs at least one place to access"));
    }
    Ok(NewVolume {
        name: name_of(&wanted.name)?,
        image: wanted.image.parse().map_err(Refused::bad_request)?,
        reference: match &wanted.reference {
            Some(reference) => Some(reference.parse().map_err(Refused::bad_request)?),
            None => None,
        },
        access: wanted.access,
        size: wanted.size.map(ByteLen),
        filesystem: wanted.filesystem.map(Into::into),
        read_only: wanted.read_only,
        prefetch: wanted.prefetch.into(),
        quota: wanted.quota.map(ByteLen),
    })
}
