//! From what a server or the connection says to the store's errors.
//!
//! Invariant: what comes out holds a server's own words at most, cut and without control characters.

use super::super::StoreError;
use super::sftp::SftpError;
use super::wire::Code;

/// Characters of a server's own words that are passed on.
const MESSAGE_CHARS: usize = 200;

/// A failed piece of work on a session.
#[derive(Debug)]
pub(super) struct Failed {
    pub error: StoreError,
    /// Whether the session is to be thrown away.
    pub lost: bool,
}

impl From<StoreError> for Failed {
    fn from(error: StoreError) -> Failed {
        Failed { error, lost: false }
    }
}

/// The store's error for what happened to `operation` on `key`, a path below the place.
pub(super) fn failed(store: &str, operation: &'static str, key: &str, error: SftpError) -> Failed {
    let lost = !error.is_answer();
    let remote = |why: String, transient| StoreError::Remote {
        store: store.into(),
        operation,
        key: key.into(),
        why,
        transient,
    };
    let error = match error {
        SftpError::Timeout => StoreError::Unavailable { store: store.into(), operation, key: key.into() },
        SftpError::Lost(why) => remote(format!("the connection broke: {}", words(&why)), true),
        SftpError::Nonsense(why) => remote(why.into(), false),
        SftpError::Status { code: Code::PermissionDenied, .. } => {
            StoreError::PermissionDenied { store: store.into(), operation, path: key.into() }
        }
        SftpError::Status { code: Code::NoSpace, .. } => {
            StoreError::NoSpace { store: store.into(), what: key.into() }
        }
        SftpError::Status { code, message } => {
            let code = match code {
                Code::Failure => "failure".to_owned(),
                Code::NoSuchFile => "no such file".to_owned(),
                Code::Unsupported => "not supported".to_owned(),
                Code::Other(number) => format!("error {number}"),
                other => format!("{other:?}"),
            };
            let message = words(&message);
            match message.eq_ignore_ascii_case(&code) || message.is_empty() {
                true => remote(format!("the server answered: {code}"), false),
                false => remote(format!("the server answered: {code} ({message})"), false),
            }
        }
    };
    Failed { error, lost }
}

/// A text from outside, fit for a line of a log.
pub(super) fn words(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(MESSAGE_CHARS).collect()
}
