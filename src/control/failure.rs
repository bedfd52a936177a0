//! Errors as the API tells them: a status, a code for programs, words for people, and a way out.

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use super::api::Failure;
use crate::files::FilesError;
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

    /// So many answers about files are under way that there was no turn.
    pub fn busy(most: usize) -> Refused {
        let error = format!("{most} answers about files are being read, and none ended within a minute");
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "busy", error)
            .hint("end one: a pager may hold it; or read a version with --access")
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
        if let HostError::Files { volume, source } = &error
            && let Some(hint) = source.hint(&format!("horcrux-cli mount {volume} DIR"))
        {
            return refused.hint(&hint);
        }
        match hint(&error) {
            Some(hint) => refused.hint(hint),
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

fn kind(error: &HostError) -> (StatusCode, &'static str) {
    match error {
        HostError::NoVolume { .. } => (StatusCode::NOT_FOUND, "no_volume"),
        HostError::InUse { .. } => (StatusCode::CONFLICT, "in_use"),
        HostError::Url(_) => (StatusCode::BAD_REQUEST, "bad_url"),
        HostError::Stopping => (StatusCode::SERVICE_UNAVAILABLE, "stopping"),
        HostError::Repo(error) | HostError::Volume(VolumeError::Repo(error)) => of_repository(error),
        HostError::Volume(error) => of_volume(error),
        HostError::Files { source, .. } => of_files(source),
        HostError::NoFilesystem { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "no_filesystem"),
        HostError::NoJob { .. } => (StatusCode::NOT_FOUND, "no_job"),
        HostError::NotMounted { .. } => (StatusCode::CONFLICT, "not_mounted"),
        HostError::Read { .. } => (StatusCode::BAD_GATEWAY, "repository"),
        HostError::TooSlow { .. } => (StatusCode::GATEWAY_TIMEOUT, "repository_away"),
        HostError::Kernel(error) => of_kernel(error),
        HostError::Serve(_) | HostError::Flush { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "failed"),
    }
}

fn of_files(error: &FilesError) -> (StatusCode, &'static str) {
    match error {
        FilesError::Repo(error) => of_repository(error),
        FilesError::NotFound { .. } => (StatusCode::NOT_FOUND, "no_file"),
        FilesError::NotADirectory { .. }
        | FilesError::NotAFile { .. }
        | FilesError::TooManyLinks { .. }
        | FilesError::Encrypted { .. } => (StatusCode::BAD_REQUEST, "bad_path"),
        FilesError::Xfs | FilesError::NoFilesystem | FilesError::Unsupported { .. } => {
            (StatusCode::UNPROCESSABLE_ENTITY, "no_filesystem")
        }
        FilesError::Damaged { .. } | FilesError::OutOfRange { .. } => {
            (StatusCode::UNPROCESSABLE_ENTITY, "damaged")
        }
        FilesError::TooMany { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "too_many"),
        FilesError::Device(_) => (StatusCode::BAD_GATEWAY, "repository"),
        _ => (StatusCode::INTERNAL_SERVER_ERROR, "failed"),
    }
}

fn of_kernel(error: &KernelError) -> (StatusCode, &'static str) {
    match error {
        KernelError::NoDriver => (StatusCode::SERVICE_UNAVAILABLE, "no_driver"),
        KernelError::NotAllowed(_) => (StatusCode::FORBIDDEN, "not_allowed"),
        KernelError::DeviceBusy { .. } | KernelError::MountBusy { .. } => (StatusCode::CONFLICT, "in_use"),
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
        VolumeError::Away { .. } => (StatusCode::GATEWAY_TIMEOUT, "repository_away"),
        VolumeError::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
            (StatusCode::INSUFFICIENT_STORAGE, "no_space")
        }
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
            error if error.is_transient() => "try again when the repository can be reached",
            _ => return None,
        },
        _ => return None,
    })
}
