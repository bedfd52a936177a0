//! From the SDK's errors to the store's.
//!
//! Invariant: what comes out holds a server's code and message at most; no header, no signature, no credential.

use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

use super::super::{Key, StoreError};

/// Characters of a server's own words that are passed on.
const MESSAGE_CHARS: usize = 200;

/// What the server answered, for those who want more than one error of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    NotFound,
    NoBucket,
    /// A condition did not hold.
    Precondition,
    /// The range starts past the end.
    Range,
    Other,
}

/// What kind of answer an error is.
pub(super) fn answer<E: ProvideErrorMetadata>(error: &SdkError<E>) -> Answer {
    let status = error.raw_response().map(|response| response.status().as_u16());
    match (error.code(), status) {
        (Some("NoSuchBucket"), _) => Answer::NoBucket,
        (Some("NoSuchKey" | "NotFound"), _) => Answer::NotFound,
        (Some("PreconditionFailed"), _) | (_, Some(412)) => Answer::Precondition,
        (Some("InvalidRange"), _) | (_, Some(416)) => Answer::Range,
        (None, Some(404)) => Answer::NotFound,
        _ => Answer::Other,
    }
}

/// The store's error for what the SDK says of `operation` on `key`.
pub(super) fn store_error<E: ProvideErrorMetadata + std::error::Error + 'static>(
    store: &str,
    operation: &'static str,
    key: &Key,
    error: &SdkError<E>,
) -> StoreError {
    let remote = |why: String, transient| StoreError::Remote {
        store: store.into(),
        operation,
        key: key.to_string(),
        why,
        transient,
    };
    match answer(error) {
        Answer::NotFound => return StoreError::NotFound { store: store.into(), key: key.clone() },
        Answer::NoBucket => return StoreError::NoBucket { store: store.into() },
        Answer::Precondition => return StoreError::Conflict { store: store.into(), key: key.clone() },
        Answer::Range | Answer::Other => {}
    }
    match error {
        SdkError::TimeoutError(_) => remote("no answer in time".into(), true),
        SdkError::DispatchFailure(failure) if failure.is_user() => remote(root_cause(error), false),
        SdkError::DispatchFailure(failure) => {
            let no_credentials = failure.is_other() && chain(error).any(|text| text.contains("redentials"));
            match no_credentials {
                true => StoreError::NoCredentials { store: store.into() },
                false => remote(root_cause(error), true),
            }
        }
        SdkError::ConstructionFailure(_) => match chain(error).any(|text| text.contains("redentials")) {
            true => StoreError::NoCredentials { store: store.into() },
            false => remote(root_cause(error), false),
        },
        _ => {
            let status = error.raw_response().map_or(0, |response| response.status().as_u16());
            let code = error.code().unwrap_or("no code");
            let message: String = error.message().unwrap_or("").chars().take(MESSAGE_CHARS).collect();
            match code {
                "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "InvalidToken" | "ExpiredToken" => {
                    StoreError::WrongCredentials { store: store.into(), code: code.into() }
                }
                "RequestTimeTooSkewed" => StoreError::ClockSkew { store: store.into() },
                "AccessDenied" => {
                    StoreError::PermissionDenied { store: store.into(), operation, path: key.as_str().into() }
                }
                "SlowDown" | "TooManyRequests" | "ServiceUnavailable" => {
                    StoreError::Busy { store: store.into(), operation, key: key.to_string() }
                }
                _ if matches!(status, 429 | 503) => {
                    StoreError::Busy { store: store.into(), operation, key: key.to_string() }
                }
                _ => {
                    // 409: another conditional request on the key is under way.
                    let transient = status >= 500 || matches!(status, 0 | 408 | 409);
                    remote(
                        format!("the server answered {status} {code} {message}").trim_end().into(),
                        transient,
                    )
                }
            }
        }
    }
}

/// An error and its sources, as text.
fn chain<'e>(error: &'e (dyn std::error::Error + 'static)) -> impl Iterator<Item = String> + 'e {
    std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string)
}

fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let text = chain(error).last().unwrap_or_default();
    text.chars().take(MESSAGE_CHARS).collect()
}
