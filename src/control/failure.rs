//! Errors as the API tells them: a status, a code for programs, words for people, and a way out.

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use super::api::Failure;
use crate::host::HostError;
use crate::kernel::KernelError;
use crate::repo::RepoError;
use crate::store::StoreError;
use crate::volume::VolumeError;

/// A refusal on its way to the client.
#[derive(Debug)]
pub struct Refused {
    status: StatusCode,
    failure: Failure,
}

impl Refused {
    /// A request nothing can be done with.
    pub fn bad_request(error: impl ToString) -> Refused {
        Self::new(StatusCode::BAD_REQUEST, "bad_request", error)
    }

    /// Nothing has this address.
    pub fn no_route(method: &str, path: &str) -> Refused {
        let error = format!("there is no {method} {path}");
        let refused = Self::new(StatusCode::NOT_FOUND, "no_route", error);
        refused.hint(
            "GET /openapi.json lists what there is; the client may be of a newer release than the daemon",
        )
    }

    /// Who asks did not say the token, or not the right one.
    pub fn no_token() -> Refused {
        let refused = Self::new(StatusCode::UNAUTHORIZED, "unauthorized", "this needs the daemon's token");
        refused.hint("send 'Authorization: Bearer TOKEN', with what is in the daemon's --control-token")
    }

    /// A bug of ours, that was logged.
    pub fn internal() -> Refused {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal",
            "the daemon failed at this; its log says how",
        )
    }

    fn new(status: StatusCode, code: &str, error: impl ToString) -> Refused {
        Refused { status, failure: Failure { code: code.to_owned(), error: error.to_string(), hint: None } }
    }

    fn hint(mut self, hint: &str) -> Refused {
        self.failure.hint = Some(hint.to_owned());
        self
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        (self.status, Json(self.failure)).into_response()
    }
}

impl From<HostError> for Refused {
    fn from(error: HostError) -> Refused {
        let (status, code) = kind(&error);
        let refused = Refused::new(status, code, &error);
        match way_out(&error) {
            Some(hint) => refused.hint(&hint),
            None => refused,
        }
    }
}

impl From<JsonRejection> for Refused {
    fn from(rejection: JsonRejection) -> Refused {
        match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => {
                Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", "the request is too large")
            }
            _ => Self::bad_request(rejection.body_text()),
        }
    }
}

/// What to do about it.
pub(super) fn way_out(error: &HostError) -> Option<String> {
    of_versions(error).or_else(|| hint(error).map(str::to_owned))
}

fn of_versions(error: &HostError) -> Option<String> {
    Some(match error {
        HostError::NothingToCommit { .. } => "'--allow-empty' makes a commit all the same".to_owned(),
        HostError::NoMessage => "give one with '-m MESSAGE'".to_owned(),
        HostError::AmendPushed { .. } => "make another commit, without '--amend'".to_owned(),
        HostError::TooManyCommits { .. } | HostError::NotStill { .. } => "try again in a moment".to_owned(),
        HostError::Dirty { volume, .. } => {
            format!("'horcrux-cli commit -m MESSAGE {volume}' keeps them; '--force' goes on without them")
        }
        HostError::Unpushed { volume, .. } => {
            format!("'horcrux-cli push {volume}' first; '--force' goes on without them")
        }
        HostError::BeingMade { volume, .. } => format!(
            "'horcrux-cli status {volume}' says how far it is; '--force' goes on without it"
        ),
        HostError::NotFastForward { volume, .. } => format!(
            "run 'horcrux-cli pull {volume}' first; commits of your own go to a branch of their own: 'horcrux-cli push {volume} NEWBRANCH'"
        ),
        HostError::Diverged { volume, .. } => format!(
            "'horcrux-cli push {volume} NEWBRANCH' keeps this volume's commits on a branch of their own; 'horcrux-cli pull --force {volume}' goes on without them"
        ),
        HostError::NoBranch { volume } => {
            format!("name one: 'horcrux-cli push {volume} BRANCH', or 'horcrux-cli checkout {volume} BRANCH'")
        }
        HostError::BranchGone { volume, .. } => {
            format!(
                "'horcrux-cli push {volume} BRANCH' makes one; 'horcrux-cli checkout {volume} REF' goes to another"
            )
        }
        HostError::NoSnapshot { volume, .. } => format!("'horcrux-cli snapshot ls {volume}' lists them"),
        HostError::SnapshotExists { volume, snapshot } => {
            format!("give another name, or 'horcrux-cli snapshot rm {volume} {snapshot}' first")
        }
        HostError::NotEverywhere { .. } => "'horcrux-cli push' again sends what is missing".to_owned(),
        HostError::Volume(VolumeError::TooManyLayers { volume, .. }) => {
            format!("'horcrux-cli commit -m MESSAGE {volume}' first, or take snapshots away")
        }
        _ => return None,
    })
}

fn kind(error: &HostError) -> (StatusCode, &'static str) {
    match error {
        HostError::NoVolume { .. } => (StatusCode::NOT_FOUND, "no_volume"),
        HostError::InUse { .. } => (StatusCode::CONFLICT, "in_use"),
        HostError::Url(_) => (StatusCode::BAD_REQUEST, "bad_url"),
        HostError::Stopping => (StatusCode::SERVICE_UNAVAILABLE, "stopping"),
        HostError::Repo(error) | HostError::Volume(VolumeError::Repo(error)) => of_repository(error),
        HostError::Volume(error) => of_volume(error),
        HostError::NoFilesystem { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "no_filesystem"),
        HostError::NoJob { .. } => (StatusCode::NOT_FOUND, "no_job"),
        HostError::NotMounted { .. } => (StatusCode::CONFLICT, "not_mounted"),
        HostError::Read { .. } => (StatusCode::BAD_GATEWAY, "repository"),
        HostError::TooSlow { .. } => (StatusCode::GATEWAY_TIMEOUT, "repository_away"),
        HostError::Kernel(error) => of_kernel(error),
        HostError::NothingToCommit { .. } => (StatusCode::CONFLICT, "nothing_to_commit"),
        HostError::NoMessage => (StatusCode::BAD_REQUEST, "bad_request"),
        HostError::AmendPushed { .. } => (StatusCode::CONFLICT, "pushed"),
        HostError::TooManyCommits { .. } => (StatusCode::TOO_MANY_REQUESTS, "too_many"),
        HostError::NotStill { .. } => (StatusCode::CONFLICT, "not_still"),
        HostError::Dirty { .. } => (StatusCode::CONFLICT, "dirty"),
        HostError::Unpushed { .. } => (StatusCode::CONFLICT, "unpushed"),
        HostError::BeingMade { .. } => (StatusCode::CONFLICT, "being_made"),
        HostError::NotFastForward { .. } => (StatusCode::CONFLICT, "not_fast_forward"),
        HostError::Diverged { .. } => (StatusCode::CONFLICT, "diverged"),
        HostError::NoBranch { .. } => (StatusCode::CONFLICT, "no_branch"),
        HostError::BranchGone { .. } => (StatusCode::CONFLICT, "branch_gone"),
        HostError::NoSnapshot { .. } => (StatusCode::NOT_FOUND, "no_snapshot"),
        HostError::SnapshotExists { .. } => (StatusCode::CONFLICT, "snapshot_exists"),
        HostError::NotEverywhere { .. } => (StatusCode::BAD_GATEWAY, "not_everywhere"),
        HostError::Serve(_) | HostError::Flush { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "failed"),
    }
}

fn of_kernel(error: &KernelError) -> (StatusCode, &'static str) {
    match error {
        KernelError::NoDriver => (StatusCode::SERVICE_UNAVAILABLE, "no_driver"),
        KernelError::NotAllowed(_) => (StatusCode::FORBIDDEN, "not_allowed"),
        KernelError::DeviceBusy { .. } | KernelError::MountBusy { .. } => (StatusCode::CONFLICT, "in_use"),
        KernelError::Covered { .. } | KernelError::FrozenByOthers { .. } => (StatusCode::CONFLICT, "not_still"),
        KernelError::NoDevice { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "no_device"),
        _ => (StatusCode::INTERNAL_SERVER_ERROR, "failed"),
    }
}

fn of_volume(error: &VolumeError) -> (StatusCode, &'static str) {
    match error {
        VolumeError::NameTaken { .. } => (StatusCode::CONFLICT, "name_taken"),
        VolumeError::BadName { .. }
        | VolumeError::SmallerThanImage { .. }
        | VolumeError::TooLarge { .. }
        | VolumeError::OtherFilesystem { .. } => (StatusCode::BAD_REQUEST, "bad_request"),
        VolumeError::Locked { .. } => (StatusCode::CONFLICT, "in_use"),
        VolumeError::ReadOnly { .. } => (StatusCode::CONFLICT, "read_only"),
        VolumeError::TooManyLayers { .. } => (StatusCode::CONFLICT, "too_many"),
        error if error.is_full() => (StatusCode::INSUFFICIENT_STORAGE, "no_space"),
        VolumeError::Away { .. } => (StatusCode::GATEWAY_TIMEOUT, "repository_away"),
        VolumeError::Stopped => (StatusCode::SERVICE_UNAVAILABLE, "stopping"),
        _ => (StatusCode::INTERNAL_SERVER_ERROR, "failed"),
    }
}

fn of_repository(error: &RepoError) -> (StatusCode, &'static str) {
    match error {
        RepoError::BadName { .. } => (StatusCode::BAD_REQUEST, "bad_request"),
        RepoError::NoImage { .. } | RepoError::NoRef { .. } => {
            (StatusCode::UNPROCESSABLE_ENTITY, "no_version")
        }
        RepoError::NotARepository { .. } | RepoError::Store(StoreError::NoPlace { .. }) => {
            (StatusCode::UNPROCESSABLE_ENTITY, "no_repository")
        }
        error if error.is_transient() => (StatusCode::GATEWAY_TIMEOUT, "repository_away"),
        _ => (StatusCode::BAD_GATEWAY, "repository"),
    }
}

fn hint(error: &HostError) -> Option<&'static str> {
    Some(match error {
        HostError::NoVolume { .. } => {
            "'horcrux-cli volume ls' lists the volumes; 'horcrux-cli volume create' makes one"
        }
        HostError::InUse { .. } => "stop who uses it first",
        HostError::NoJob { .. } => "'horcrux-cli jobs' lists them",
        HostError::TooSlow { .. } => "try again when the repository can be reached",
        HostError::Kernel(error) => return error.hint(),
        HostError::Volume(VolumeError::NameTaken { .. }) => {
            "remove that volume first, or give this one another name"
        }
        HostError::Volume(VolumeError::SmallerThanImage { .. }) => "leave the size out, or give a larger one",
        HostError::Volume(VolumeError::Repo(error)) | HostError::Repo(error) => match error {
            RepoError::NotARepository { .. } | RepoError::Store(StoreError::NoPlace { .. }) => {
                "check the place; 'horcrux-cli image-from-dir NAME DIR REPO' makes a repository in an empty one"
            }
            RepoError::NoImage { .. } => {
                "check the name; 'horcrux-cli image-from-dir NAME DIR REPO' makes an image"
            }
            RepoError::Missing { .. } => {
                "'horcrux-cli sync --from A --to B' brings what a place lacks from a copy that has it"
            }
            error if error.is_transient() => "try again when the repository can be reached",
            _ => return None,
        },
        _ => return None,
    })
}
