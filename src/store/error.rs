//! What can go wrong at a store.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::{Key, KeyError};

/// An error of a store. Cheap to clone: one failed request may have many waiters.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// There is no such object.
    #[error("{store}: no object {key}")]
    NotFound {
        /// The store.
        store: String,
        /// The object.
        key: Key,
    },
    /// The place itself is not there.
    #[error("{store}: no such directory")]
    NoPlace {
        /// The store.
        store: String,
    },
    /// Someone else changed the object first.
    #[error("{store}: {key} was changed by someone else")]
    Conflict {
        /// The store.
        store: String,
        /// The object.
        key: Key,
    },
    /// A write-once object exists and has other content.
    #[error("{store}: {key} exists with other content; one of the two is damaged")]
    AlreadyExists {
        /// The store.
        store: String,
        /// The object.
        key: Key,
    },
    /// The object ends before the range does, or the reply did.
    #[error("{store}: {key} is cut short: {actual} bytes where {expected} were asked for")]
    ShortBody {
        /// The store.
        store: String,
        /// The object.
        key: Key,
        /// Bytes asked for.
        expected: u64,
        /// Bytes there.
        actual: u64,
    },
    /// An object that is read whole is longer than any should be.
    #[error("{store}: {key} has {len} bytes, at most {max} are read")]
    TooLong {
        /// The store.
        store: String,
        /// The object.
        key: Key,
        /// Its length.
        len: u64,
        /// The bound.
        max: u64,
    },
    /// A range whose end lies before its start.
    #[error("{store}: {key}: no range from {start} to {end}")]
    BadRange {
        /// The store.
        store: String,
        /// The object.
        key: Key,
        /// First byte.
        start: u64,
        /// One past the last.
        end: u64,
    },
    /// A name that can't be a key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// No space, or over quota.
    #[error("{store}: no space left while writing {what}")]
    NoSpace {
        /// The store.
        store: String,
        /// What was being written.
        what: String,
    },
    /// Not allowed, or read-only.
    #[error("{store}: not allowed to {operation} {path}", path = .path.display())]
    PermissionDenied {
        /// The store.
        store: String,
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
    },
    /// Someone holds the lock of a ref and does not let go.
    #[error("{store}: {key} stays locked by another process")]
    Locked {
        /// The store.
        store: String,
        /// The object.
        key: Key,
    },
    /// The store can't be reached, or did not answer in time.
    #[error("{store}: {operation} {key}: no answer")]
    Unavailable {
        /// The store.
        store: String,
        /// What was tried.
        operation: &'static str,
        /// On what.
        key: String,
    },
    /// The store has too much to do, and says so.
    #[error("{store}: can't {operation} {key}: the server asks for fewer requests")]
    Busy {
        /// The store.
        store: String,
        /// What was tried.
        operation: &'static str,
        /// On what.
        key: String,
    },
    /// There is no such bucket.
    #[error("{store}: there is no such bucket; hint: make it, or look at the name and the region")]
    NoBucket {
        /// The store.
        store: String,
    },
    /// No credentials were found where they are looked for.
    #[error(
        "{store}: no credentials; hint: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run 'aws configure'"
    )]
    NoCredentials {
        /// The store.
        store: String,
    },
    /// The server knows the credentials as wrong or as no longer good.
    #[error("{store}: the server does not take these credentials ({code})")]
    WrongCredentials {
        /// The store.
        store: String,
        /// The server's word for why.
        code: String,
    },
    /// The clocks here and there are too far apart for signatures.
    #[error(
        "{store}: the clocks of this machine and of the server are too far apart; hint: set this one right"
    )]
    ClockSkew {
        /// The store.
        store: String,
    },
    /// The server does not keep the conditions writes need.
    #[error(
        "{store}: the server does not keep {condition}, so writers could overwrite each other unseen; nothing is written there"
    )]
    NoConditions {
        /// The store.
        store: String,
        /// The condition.
        condition: &'static str,
    },
    /// What ~/.ssh/config says can't be followed.
    #[error("{store}: {why}")]
    SshConfig {
        /// The store.
        store: String,
        /// What, and where it is said.
        why: String,
    },
    /// Nothing is known of a host, so it may be anyone.
    #[error(
        "{store}: the host key of {host} is not known: it shows {key}; hint: run '{command}' once and compare it, or add it to ~/.ssh/known_hosts with ssh-keyscan"
    )]
    UnknownHost {
        /// The store.
        store: String,
        /// The host.
        host: String,
        /// Type and fingerprint of the key it shows.
        key: String,
        /// What asks the user about it.
        command: String,
    },
    /// A host is not the one that is known.
    #[error(
        "{store}: REMOTE HOST IDENTIFICATION HAS CHANGED! Someone could be listening in, or the host has a new key: {host} shows {key}, and {place}; nothing was sent to it"
    )]
    HostKeyChanged {
        /// The store.
        store: String,
        /// The host.
        host: String,
        /// Type and fingerprint of the key it shows.
        key: String,
        /// What is known instead, with its file and line.
        place: String,
    },
    /// An SSH server takes none of the keys there are.
    #[error("{store}: can't log in: {why}")]
    NotLoggedIn {
        /// The store.
        store: String,
        /// What was tried; names and public fingerprints of keys at most.
        why: String,
    },
    /// A server's refusal, or an answer that makes no sense.
    #[error("{store}: can't {operation} {key}: {why}")]
    Remote {
        /// The store.
        store: String,
        /// What was tried.
        operation: &'static str,
        /// On what.
        key: String,
        /// What the server or the network said.
        why: String,
        /// Whether it may go better later.
        transient: bool,
    },
    /// Any other error of the operating system.
    #[error("{store}: can't {operation} {path}: {source}", path = .path.display())]
    Io {
        /// The store.
        store: String,
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// The runtime is shutting down and took the blocking thread with it.
    #[error("{store}: {operation} was cancelled: the program is shutting down")]
    Cancelled {
        /// The store.
        store: String,
        /// What was under way.
        operation: &'static str,
    },
}

impl StoreError {
    /// Whether the same request may succeed later without anyone doing something about it.
    pub fn is_transient(&self) -> bool {
        match self {
            StoreError::Unavailable { .. } | StoreError::Busy { .. } | StoreError::Locked { .. } => true,
            StoreError::Remote { transient, .. } => *transient,
            StoreError::Io { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::Interrupted
                    | io::ErrorKind::TimedOut
                    | io::ErrorKind::WouldBlock
                    | io::ErrorKind::StaleNetworkFileHandle
                    | io::ErrorKind::ResourceBusy
            ),
            _ => false,
        }
    }

    /// Whether it may go better later with a store that has worked before: a host that boots, an agent or a service of credentials that is away, look from here
    /// like a user who is not let in.
    pub fn is_transient_once_known(&self) -> bool {
        self.is_transient()
            || matches!(
                self,
                StoreError::NotLoggedIn { .. }
                    | StoreError::NoCredentials { .. }
                    | StoreError::WrongCredentials { .. }
            )
    }

    /// Whether the store answered that there is no such object.
    pub fn is_not_found(&self) -> bool {
        matches!(self, StoreError::NotFound { .. })
    }
}
