//! What the API answers about commits, branches and snapshots of volumes.
//!
//! Invariant: as in `routes.rs`: what changes something runs in a task of its own.

use std::time::SystemTime;

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use serde::Deserialize;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::api::{Failure, Job, Volume};
use super::failure::Refused;
use super::routes::{Shared, looked_at, name_of, to_its_end};
use super::version_api::{
    Checkout, CloneTo, Commit, Force, LoggedCommit, Pulled, PushTo, TakeSnapshot, VolumeSnapshot,
    VolumeVersion,
};
use crate::format::Timestamp;
use crate::host::NewCommit;
use crate::repo::{BranchName, Reference};

/// Commits of one answer, where the client does not say.
const LOG_DEFAULT: usize = 1000;
/// And at most.
const LOG_MOST: usize = 100_000;

/// The routes.
pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new()
        .routes(routes!(commit))
        .routes(routes!(push))
        .routes(routes!(pull))
        .routes(routes!(checkout))
        .routes(routes!(reset))
        .routes(routes!(version))
        .routes(routes!(log))
        .routes(routes!(snapshots, snapshot))
        .routes(routes!(remove_snapshot))
        .routes(routes!(rollback))
        .routes(routes!(clone_volume))
}

/// Seal what a volume is now as a commit; the job makes it
#[utoipa::path(post, path = "/v1/volumes/{name}/commit", params(("name" = String, Path, description = "The volume's name")),
    request_body = Commit, responses((status = 202, body = Job), (status = 404, body = Failure), (status = 409, body = Failure), (status = 507, body = Failure)))]
async fn commit(
    State(shared): State<Shared>,
    Path(name): Path<String>,
    wanted: Result<Json<Commit>, JsonRejection>,
) -> Result<(StatusCode, Json<Job>), Refused> {
    let (name, Json(wanted)) = (name_of(&name)?, wanted?);
    check_commit(&wanted)?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let new = NewCommit {
        message: wanted.message,
        author: wanted.author,
        time: Timestamp { secs: now.as_secs(), nanos: now.subsec_nanos() },
        allow_empty: wanted.allow_empty,
        amend: wanted.amend,
    };
    let job = to_its_end(async move { shared.host.commit(&name, new).await }).await?;
    Ok((StatusCode::ACCEPTED, Json(job.into())))
}

/// What could not be written as a commit later is refused now.
fn check_commit(wanted: &Commit) -> Result<(), Refused> {
    if !crate::format::commit::author_ok(&wanted.author) {
        return Err(Refused::bad_request(
            "the author must be 1 to 1024 bytes, without control characters or blanks at either end",
        ));
    }
    let most = crate::format::commit::MAX_MESSAGE_BYTES;
    match &wanted.message {
        Some(message) if message.len() > most => {
            Err(Refused::bad_request(format!("the message has {} bytes; it may have {most}", message.len())))
        }
        Some(message) if message.trim().is_empty() => Err(Refused::bad_request("a commit needs a message")),
        _ => Ok(()),
    }
}

/// Begin to push a volume's commits to its branch, or another one: a job; where that is under way already, it is that one
#[utoipa::path(post, path = "/v1/volumes/{name}/push", params(("name" = String, Path, description = "The volume's name")),
    request_body = PushTo, responses((status = 202, body = Job), (status = 404, body = Failure), (status = 409, body = Failure)))]
async fn push(
    State(shared): State<Shared>,
    Path(name): Path<String>,
    wanted: Result<Json<PushTo>, JsonRejection>,
) -> Result<(StatusCode, Json<Job>), Refused> {
    let (name, Json(wanted)) = (name_of(&name)?, wanted?);
    let branch: Option<BranchName> = match &wanted.branch {
        Some(branch) => Some(branch.parse().map_err(Refused::bad_request)?),
        None => None,
    };
    let job = to_its_end(async move { shared.host.push(&name, branch).await }).await?;
    Ok((StatusCode::ACCEPTED, Json(job.into())))
}

/// Have a volume without changes of its own stand on its branch's tip
#[utoipa::path(post, path = "/v1/volumes/{name}/pull", params(("name" = String, Path, description = "The volume's name")),
    request_body = Force, responses((status = 200, body = Pulled), (status = 404, body = Failure), (status = 409, body = Failure), (status = 504, body = Failure)))]
async fn pull(
    State(shared): State<Shared>,
    Path(name): Path<String>,
    wanted: Result<Json<Force>, JsonRejection>,
) -> Result<Json<Pulled>, Refused> {
    let (name, Json(Force { force })) = (name_of(&name)?, wanted?);
    let pulled = to_its_end(async move { shared.host.pull(&name, force).await }).await?;
    Ok(Json(Pulled { moved: pulled.moved, commit: pulled.volume.record.commit.to_string() }))
}

/// Have a volume stand on another version
#[utoipa::path(post, path = "/v1/volumes/{name}/checkout", params(("name" = String, Path, description = "The volume's name")),
    request_body = Checkout, responses((status = 200, body = Volume), (status = 404, body = Failure), (status = 409, body = Failure),
        (status = 422, body = Failure), (status = 504, body = Failure)))]
async fn checkout(
    State(shared): State<Shared>,
    Path(name): Path<String>,
    wanted: Result<Json<Checkout>, JsonRejection>,
) -> Result<Json<Volume>, Refused> {
    let (name, Json(Checkout { reference, force })) = (name_of(&name)?, wanted?);
    let reference: Reference = reference.parse().map_err(Refused::bad_request)?;
    Ok(Json(to_its_end(async move { shared.host.checkout(&name, &reference, force).await }).await?.into()))
}

/// Have a volume be what its commit is
#[utoipa::path(post, path = "/v1/volumes/{name}/reset", params(("name" = String, Path, description = "The volume's name")),
    request_body = Force, responses((status = 200, body = Volume), (status = 404, body = Failure), (status = 409, body = Failure)))]
async fn reset(
    State(shared): State<Shared>,
    Path(name): Path<String>,
    wanted: Result<Json<Force>, JsonRejection>,
) -> Result<Json<Volume>, Refused> {
    let (name, Json(Force { force })) = (name_of(&name)?, wanted?);
    Ok(Json(to_its_end(async move { shared.host.reset(&name, force).await }).await?.into()))
}

/// A volume in git's words
#[utoipa::path(get, path = "/v1/volumes/{name}/version", params(("name" = String, Path, description = "The volume's name")),
    responses((status = 200, body = VolumeVersion), (status = 404, body = Failure)))]
async fn version(
    State(shared): State<Shared>,
    Path(name): Path<String>,
) -> Result<Json<VolumeVersion>, Refused> {
    let name = name_of(&name)?;
    let status = shared.host.version_status(&name).await?;
    Ok(Json(VolumeVersion::of(name.as_str(), status)))
}

/// How much of a history is wanted.
#[derive(Deserialize)]
struct Most {
    n: Option<usize>,
}

/// The commits of a volume's history, the newest first
#[utoipa::path(get, path = "/v1/volumes/{name}/log", params(("name" = String, Path, description = "The volume's name"),
    ("n" = Option<usize>, Query, description = "The most of them")),
    responses((status = 200, body = Vec<LoggedCommit>), (status = 404, body = Failure)))]
async fn log(
    State(shared): State<Shared>,
    Path(name): Path<String>,
    Query(Most { n }): Query<Most>,
) -> Result<Json<Vec<LoggedCommit>>, Refused> {
    let name = name_of(&name)?;
    let entries = shared.host.log(&name, n.unwrap_or(LOG_DEFAULT).min(LOG_MOST)).await?;
    Ok(Json(entries.into_iter().map(LoggedCommit::from).collect()))
}

/// A volume's snapshots, the oldest first
#[utoipa::path(get, path = "/v1/volumes/{name}/snapshots", params(("name" = String, Path, description = "The volume's name")),
    responses((status = 200, body = Vec<VolumeSnapshot>), (status = 404, body = Failure)))]
async fn snapshots(
    State(shared): State<Shared>,
    Path(name): Path<String>,
) -> Result<Json<Vec<VolumeSnapshot>>, Refused> {
    let name = name_of(&name)?;
    let snapshots = looked_at(move || shared.host.snapshots(&name)).await??;
    Ok(Json(snapshots.into_iter().map(VolumeSnapshot::from).collect()))
}

/// Take a snapshot of what a volume is now
#[utoipa::path(post, path = "/v1/volumes/{name}/snapshots", params(("name" = String, Path, description = "The volume's name")),
    request_body = TakeSnapshot, responses((status = 201, body = VolumeSnapshot), (status = 404, body = Failure), (status = 409, body = Failure)))]
async fn snapshot(
    State(shared): State<Shared>,
    Path(name): Path<String>,
    wanted: Result<Json<TakeSnapshot>, JsonRejection>,
) -> Result<(StatusCode, Json<VolumeSnapshot>), Refused> {
    let (name, Json(wanted)) = (name_of(&name)?, wanted?);
    let called = wanted.name.as_deref().map(name_of).transpose()?;
    let taken = to_its_end(async move { shared.host.snapshot(&name, called.as_ref()).await }).await?;
    Ok((StatusCode::CREATED, Json(taken.into())))
}

/// Forget a snapshot
#[utoipa::path(delete, path = "/v1/volumes/{name}/snapshots/{snapshot}", params(("name" = String, Path, description = "The volume's name"),
    ("snapshot" = String, Path, description = "The snapshot's name")), responses((status = 204), (status = 404, body = Failure)))]
async fn remove_snapshot(
    State(shared): State<Shared>,
    Path((name, snapshot)): Path<(String, String)>,
) -> Result<StatusCode, Refused> {
    let name = name_of(&name)?;
    to_its_end(async move { shared.host.remove_snapshot(&name, &snapshot).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Make a volume what it was in a snapshot
#[utoipa::path(post, path = "/v1/volumes/{name}/snapshots/{snapshot}/rollback", params(("name" = String, Path, description = "The volume's name"),
    ("snapshot" = String, Path, description = "The snapshot's name")), request_body = Force,
    responses((status = 200, body = Volume), (status = 404, body = Failure), (status = 409, body = Failure)))]
async fn rollback(
    State(shared): State<Shared>,
    Path((name, snapshot)): Path<(String, String)>,
    wanted: Result<Json<Force>, JsonRejection>,
) -> Result<Json<Volume>, Refused> {
    let (name, Json(Force { force })) = (name_of(&name)?, wanted?);
    let rolled = to_its_end(async move { shared.host.rollback(&name, &snapshot, force).await }).await?;
    Ok(Json(rolled.into()))
}

/// Make another volume that is what this one is now, and shares all its bytes
#[utoipa::path(post, path = "/v1/volumes/{name}/clone", params(("name" = String, Path, description = "The volume's name")),
    request_body = CloneTo, responses((status = 200, body = Volume, description = "It was there"), (status = 201, body = Volume),
        (status = 404, body = Failure), (status = 409, body = Failure)))]
async fn clone_volume(
    State(shared): State<Shared>,
    Path(name): Path<String>,
    wanted: Result<Json<CloneTo>, JsonRejection>,
) -> Result<(StatusCode, Json<Volume>), Refused> {
    let (name, Json(wanted)) = (name_of(&name)?, wanted?);
    let new = name_of(&wanted.name)?;
    let (volume, is_new) = to_its_end(async move { shared.host.clone_volume(&name, &new).await }).await?;
    Ok((if is_new { StatusCode::CREATED } else { StatusCode::OK }, Json(volume.into())))
}
