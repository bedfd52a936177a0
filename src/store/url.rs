//! Repository URLs: where a repository is, as users write it.
//!
//! Enters: a string from a command line or a configuration. Leaves: a [`RepositoryUrl`], or an error that says which forms there are.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use super::{DirStore, Store};

/// The forms this build opens, for messages.
const KNOWN_FORMS: &str = "/dir, file:///dir, cp:///dir";
/// Schemes that are part of the language but have no store in this build.
const UNBUILT_SCHEMES: [&str; 5] = ["s3", "minio", "scp", "ssh", "sftp"];

/// Why a string is not a repository's URL.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UrlError {
    /// The empty string.
    #[error("the repository's URL is empty; known forms: {KNOWN_FORMS}")]
    Empty,
    /// A scheme nobody knows.
    #[error("unknown scheme '{scheme}'; known forms: {KNOWN_FORMS}")]
    UnknownScheme {
        /// The scheme.
        scheme: String,
    },
    /// A scheme that has no store in this build.
    #[error("this build has no {scheme} store; it opens {KNOWN_FORMS}")]
    NotInThisBuild {
        /// The scheme.
        scheme: &'static str,
    },
    /// A directory's URL that names a host.
    #[error("'{scheme}://{rest}' names a host; a directory is written {scheme}:///dir")]
    Host {
        /// The scheme.
        scheme: &'static str,
        /// What followed it.
        rest: String,
    },
    /// A query or fragment where there can be none.
    #[error("'{url}': a directory's URL has no '{mark}'; write it as %{code:02X}", code = *mark as u32)]
    Query {
        /// The URL.
        url: String,
        /// The mark found.
        mark: char,
    },
    /// A `%` that is not followed by two hex digits, or gives a NUL.
    #[error("'{url}': bad percent-encoding")]
    Encoding {
        /// The URL.
        url: String,
    },
}

/// Where a repository is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RepositoryUrl {
    /// A directory; a relative one is relative to the current directory.
    Dir(PathBuf),
}

impl RepositoryUrl {
    /// The store there. Touches nothing yet.
    pub fn open(&self) -> Arc<dyn Store> {
        match self {
            RepositoryUrl::Dir(path) => Arc::new(DirStore::new(path)),
        }
    }
}

/// The store that a URL names. Touches nothing yet.
pub fn open(url: &str) -> Result<Arc<dyn Store>, UrlError> {
    Ok(url.parse::<RepositoryUrl>()?.open())
}

impl FromStr for RepositoryUrl {
    type Err = UrlError;

    fn from_str(url: &str) -> Result<RepositoryUrl, UrlError> {
        if url.is_empty() {
            return Err(UrlError::Empty);
        }
        if url.contains('\0') {
            return Err(UrlError::Encoding { url: url.into() });
        }
        let Some((scheme, rest)) = url.split_once("://") else {
            return Ok(RepositoryUrl::Dir(url.into()));
        };
        let lower = scheme.to_ascii_lowercase();
        if let Some(scheme) = UNBUILT_SCHEMES.into_iter().find(|&unbuilt| unbuilt == lower) {
            return Err(UrlError::NotInThisBuild { scheme });
        }
        let scheme = match lower.as_str() {
            "file" => "file",
            "cp" => "cp",
            _ => return Err(UrlError::UnknownScheme { scheme: scheme.chars().take(40).collect() }),
        };
        if !rest.starts_with('/') {
            return Err(UrlError::Host { scheme, rest: rest.into() });
        }
        if let Some(mark) = rest.chars().find(|mark| matches!(mark, '?' | '#')) {
            return Err(UrlError::Query { url: url.into(), mark });
        }
        let path = percent_decode(rest).ok_or_else(|| UrlError::Encoding { url: url.into() })?;
        Ok(RepositoryUrl::Dir(OsString::from_vec(path).into()))
    }
}

impl fmt::Display for RepositoryUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RepositoryUrl::Dir(path) => path.display().fmt(f),
        }
    }
}

fn percent_decode(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let high = char::from(bytes.next()?).to_digit(16)?;
        let low = char::from(bytes.next()?).to_digit(16)?;
        match (high << 4 | low) as u8 {
            0 => return None,
            byte => out.push(byte),
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn dir(url: &str) -> PathBuf {
        let RepositoryUrl::Dir(path) = url.parse().unwrap();
        path
    }

    #[test]
    fn directories_are_read_in_all_their_forms() {
        for (url, path) in [
            ("/srv/images", "/srv/images"),
            ("images", "images"),
            ("./a b%20c", "./a b%20c"),
            ("file:///srv/images", "/srv/images"),
            ("cp:///srv/images/", "/srv/images/"),
            ("FILE:///srv/a%20b%2Fc", "/srv/a b/c"),
        ] {
            assert_eq!(dir(url), PathBuf::from(path), "{url}");
        }
        assert_eq!(dir("file:///%ff").into_os_string().into_vec(), b"/\xff");
    }

    #[test]
    fn what_this_build_can_not_open_is_said_plainly() {
        for (url, part) in [
            ("", "is empty"),
            ("s3://bucket/x", "no s3 store"),
            ("minio://h:9000/b", "no minio store"),
            ("scp://user@host:/dir", "no scp store"),
            ("sftp://host/dir", "no sftp store"),
            ("gopher://x", "unknown scheme 'gopher'; known forms: /dir, file:///dir"),
            ("file://host/dir", "names a host"),
            ("cp://dir", "names a host"),
            ("file:///a?b", "%3F"),
            ("file:///a%2", "percent-encoding"),
            ("file:///a%zz", "percent-encoding"),
            ("file:///a%00", "percent-encoding"),
            ("/a\0b", "percent-encoding"),
        ] {
            let error = url.parse::<RepositoryUrl>().unwrap_err().to_string();
            assert!(error.contains(part), "{url}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_string_panics(url in "\\PC{0,60}", tail in "[%0-9a-fA-F/é]{0,20}") {
            let _ = url.parse::<RepositoryUrl>();
            let _ = format!("file:///{tail}").parse::<RepositoryUrl>();
        }
    }
}
