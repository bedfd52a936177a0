//! What to do about an error: the line after it.
//!
//! Invariant: a hint names a way out that keeps what the user has.

use std::io;

use horcrux::cache::CacheError;
use horcrux::control::TokenError;
use horcrux::delta::DeltaError;
use horcrux::format::FormatError;
use horcrux::nbd::{Endpoint, ServeError};
use horcrux::repo::RepoError;
use horcrux::store::StoreError;
use horcrux::volume::VolumeError;

use super::serve::Error;

const FREE_SPACE: &str = "free some space on that disk, or use a --state-dir on another";
const NEWER: &str = "it was written by a newer Horcrux; serve it with that one";

/// What to do about `error`, where something can be said.
pub fn hint(error: &Error) -> Option<String> {
    match error {
        Error::Repo(error) | Error::Volume(VolumeError::Repo(error)) => of_repository(error),
        Error::Volume(error) => of_volume(error),
        Error::Serve(error) => of_server(error),
        Error::Cache(error) => of_cache(error),
        Error::Token(TokenError::Open { path, .. }) => {
            Some(format!("chmod 600 {}; and it must be root's, or the daemon's own", path.display()))
        }
        Error::Token(TokenError::Content { path }) => {
            Some(format!("'(umask 077; openssl rand -hex 32 >{})' makes one", path.display()))
        }
        _ => None,
    }
}

fn of_repository(error: &RepoError) -> Option<String> {
    let hint = match error {
        RepoError::NotARepository { place } | RepoError::Store(StoreError::NoPlace { store: place }) => {
            format!(
                "check --access; \
                 'horcrux-cli image-from-dir NAME DIR {place}' makes a repository in an empty place"
            )
        }
        RepoError::NoImage { image, .. } => {
            format!("check --name; 'horcrux-cli image-from-dir {image} DIR REPO' makes an image")
        }
        RepoError::Damaged { source: FormatError::Version { .. }, .. } => NEWER.to_owned(),
        RepoError::Damaged { .. } | RepoError::Missing { .. } | RepoError::RefMisplaced { .. } => {
            "put this object back from a copy of the repository; \
             versions and images that do not need it can be served"
                .to_owned()
        }
        _ => return None,
    };
    Some(hint)
}

fn of_volume(error: &VolumeError) -> Option<String> {
    let hint = match error {
        VolumeError::StateDirInUse { .. } | VolumeError::Locked { .. } => {
            "serve more images from one server (--name can be repeated), \
             or give this one its own --state-dir"
                .to_owned()
        }
        VolumeError::OtherBase { volume, .. } => format!(
            "leave out @REF to go on with the volume's changes, \
             or use another --state-dir for another version of {volume}"
        ),
        VolumeError::OtherImage { .. } => {
            "'horcrux-nbd serve' without a name serves that volume; use another --state-dir for this image"
                .to_owned()
        }
        VolumeError::OtherRepository { .. } => "use another --state-dir for another repository".to_owned(),
        VolumeError::Record { .. } => "if a newer Horcrux wrote it, serve it with that one; \
             another --state-dir starts without the volume's changes"
            .to_owned(),
        VolumeError::Delta(DeltaError::Format { source: FormatError::Version { .. }, .. }) => {
            NEWER.to_owned()
        }
        VolumeError::Delta(DeltaError::WrongBase { .. } | DeltaError::Foreign { .. }) => {
            "put the volume's own files back; another --state-dir starts without its changes".to_owned()
        }
        VolumeError::Delta(DeltaError::Format { .. } | DeltaError::Damaged { .. }) => {
            "put the file back from a copy; another --state-dir starts without the volume's changes"
                .to_owned()
        }
        VolumeError::Delta(DeltaError::Full { .. }) => FREE_SPACE.to_owned(),
        VolumeError::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
            FREE_SPACE.to_owned()
        }
        _ => return None,
    };
    Some(hint)
}

fn of_cache(error: &CacheError) -> Option<String> {
    match error {
        CacheError::Limit { min, .. } => {
            Some(format!("give --cache-size {}M or more", min.0.div_ceil(1 << 20)))
        }
        CacheError::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
            Some(FREE_SPACE.to_owned())
        }
        _ => None,
    }
}

fn of_server(error: &ServeError) -> Option<String> {
    let hint = match error {
        ServeError::SocketInUse { .. } => "stop that server, or listen elsewhere with --unix or --listen",
        ServeError::NotASocket { .. } => "give --unix a path where nothing is",
        ServeError::NameTwice { .. } => {
            "for two versions of an image use two servers, each with its own --state-dir"
        }
        ServeError::Bind { endpoint, source } => match (endpoint, source.kind()) {
            (_, io::ErrorKind::AddrInUse) => "stop what listens there, or listen elsewhere",
            (Endpoint::Unix(_), io::ErrorKind::InvalidInput) => {
                "a Unix socket's path has at most 107 bytes: give a shorter one with --unix"
            }
            _ => return None,
        },
        _ => return None,
    };
    Some(hint.to_owned())
}
