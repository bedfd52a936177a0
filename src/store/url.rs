//! Repository URLs: where a repository is, as users write it.
//!
//! Enters: a string from a command line or a configuration. Leaves: a [`RepositoryUrl`], or an error that says which forms there are.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use super::ssh::Local;
use super::{DirStore, MirrorStore, RetryOptions, RetryStore, S3Place, S3Store, SshPlace, SshStore, Store};

/// The forms this build opens, for messages.
const KNOWN_FORMS: &str = "/dir, file:///dir, cp:///dir, scp://[user@]host[:port]/dir, s3://bucket[/prefix][?region=R&endpoint=URL], minio://host:port/bucket[/prefix]";

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
    /// A part of a remote store's URL that is not as it should be. Does not say the URL: what is wrong in it may be a secret.
    #[error("in a URL {scheme}://...: {problem}")]
    Part {
        /// The scheme.
        scheme: &'static str,
        /// What is wrong.
        problem: String,
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
    /// A bucket of an object store.
    S3(S3Place),
    /// A directory on an SSH host.
    Ssh(SshPlace),
}

impl RepositoryUrl {
    /// The store there, with the patience a network needs. Touches nothing yet.
    pub fn open(&self) -> Arc<dyn Store> {
        self.open_with(RetryOptions::default())
    }

    /// The same, with a patience of the caller's choice where there is a network between.
    pub fn open_with(&self, options: RetryOptions) -> Arc<dyn Store> {
        match self {
            RepositoryUrl::Dir(_) => self.open_bare(),
            _ => Arc::new(RetryStore::new(self.open_bare(), options)),
        }
    }

    /// The same, each request made once: for who tries again by itself.
    pub fn open_bare(&self) -> Arc<dyn Store> {
        match self {
            RepositoryUrl::Dir(path) => Arc::new(DirStore::new(path)),
            RepositoryUrl::S3(place) => Arc::new(S3Store::new(place.clone())),
            RepositoryUrl::Ssh(place) => Arc::new(SshStore::new(place.clone(), Local::of_this_process())),
        }
    }
}

/// The same place in words that mean it from any current directory: for who keeps a URL.
pub fn lasting(url: &str) -> Result<String, UrlError> {
    match url.parse()? {
        RepositoryUrl::Dir(path) if path.is_relative() => {
            let absolute = std::path::absolute(path).ok().and_then(|path| path.to_str().map(str::to_owned));
            Ok(absolute.unwrap_or_else(|| url.to_owned()))
        }
        _ => Ok(url.to_owned()),
    }
}

/// The place these URLs name, or the copies of one repository in several as one store: they are tried in turn, and all again while none works. Touches nothing yet.
pub fn open_all<U: AsRef<str>>(urls: &[U], options: RetryOptions) -> Result<Arc<dyn Store>, UrlError> {
    let places = urls.iter().map(|url| url.as_ref().parse()).collect::<Result<Vec<RepositoryUrl>, _>>()?;
    Ok(match places.as_slice() {
        [] => return Err(UrlError::Empty),
        [one] => one.open_with(options),
        several => {
            let copies = several.iter().map(RepositoryUrl::open_bare).collect();
            Arc::new(RetryStore::new(Arc::new(MirrorStore::new(copies)), options))
        }
    })
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
        let scheme = match lower.as_str() {
            "file" => "file",
            "cp" => "cp",
            "s3" => return s3(rest).map(RepositoryUrl::S3),
            "minio" => return minio(rest).map(RepositoryUrl::S3),
            "scp" => return SshPlace::parse("scp", rest).map(RepositoryUrl::Ssh),
            "ssh" => return SshPlace::parse("ssh", rest).map(RepositoryUrl::Ssh),
            "sftp" => return SshPlace::parse("sftp", rest).map(RepositoryUrl::Ssh),
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
            RepositoryUrl::S3(place) => place.fmt(f),
            RepositoryUrl::Ssh(place) => place.fmt(f),
        }
    }
}

/// What follows `s3://`: `bucket[/prefix][?region=R&endpoint=URL]`.
fn s3(rest: &str) -> Result<S3Place, UrlError> {
    const SCHEME: &str = "s3";
    // In all of it: a secret may have a slash or a question mark in it.
    if rest.contains('@') {
        return Err(secret(SCHEME));
    }
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
    let (mut region, mut endpoint) = (None, None);
    for (key, value) in pairs(SCHEME, query)? {
        match key.as_str() {
            "region" => region = Some(value),
            "endpoint" => endpoint = Some(value),
            _ => {
                return Err(part(
                    SCHEME,
                    format!("unknown option '{}'; there are region and endpoint", shown(&key)),
                ));
            }
        }
    }
    if let Some(endpoint) = &endpoint {
        let host = endpoint.strip_prefix("http://").or_else(|| endpoint.strip_prefix("https://"));
        match host {
            // It came as %40.
            Some(host) if host.contains('@') => return Err(secret(SCHEME)),
            Some(host) if !host.is_empty() => {}
            _ => {
                return Err(part(
                    SCHEME,
                    "the endpoint is written http://host:port or https://host:port".into(),
                ));
            }
        }
    }
    Ok(S3Place {
        bucket: bucket_name(SCHEME, bucket)?,
        prefix: key_prefix(SCHEME, prefix)?,
        region,
        endpoint,
    })
}

/// What follows `minio://`: `host[:port]/bucket[/prefix][?tls=1]`.
fn minio(rest: &str) -> Result<S3Place, UrlError> {
    const SCHEME: &str = "minio";
    if rest.contains('@') {
        return Err(secret(SCHEME));
    }
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (host, path) = place.split_once('/').unwrap_or((place, ""));
    let port = host.rsplit_once(':').filter(|(_, port)| !port.ends_with(']')).map(|(_, port)| port);
    if host.is_empty() || port.is_some_and(|port| port.parse::<u16>().is_err()) {
        return Err(part(SCHEME, format!("'{}' is not host:port", shown(host))));
    }
    let (mut tls, mut region) = (false, None);
    for (key, value) in pairs(SCHEME, query)? {
        match (key.as_str(), value.as_str()) {
            ("tls", "0" | "1") => tls = value == "1",
            ("tls", _) => return Err(part(SCHEME, "tls is 0 or 1".into())),
            ("region", _) => region = Some(value),
            _ => {
                return Err(part(
                    SCHEME,
                    format!("unknown option '{}'; there are tls and region", shown(&key)),
                ));
            }
        }
    }
    let (bucket, prefix) = path.split_once('/').unwrap_or((path, ""));
    let endpoint = Some(format!("{}://{host}", if tls { "https" } else { "http" }));
    Ok(S3Place {
        bucket: bucket_name(SCHEME, bucket)?,
        prefix: key_prefix(SCHEME, prefix)?,
        region,
        endpoint,
    })
}

pub(super) fn part(scheme: &'static str, problem: String) -> UrlError {
    UrlError::Part { scheme, problem }
}

fn secret(scheme: &'static str) -> UrlError {
    part(
        scheme,
        "there is an '@': credentials don't belong in a URL, they come from where the AWS tools keep them"
            .into(),
    )
}

/// As much of a user's text as an error repeats.
pub(super) fn shown(text: &str) -> String {
    text.chars().take(40).collect()
}

fn text(scheme: &'static str, encoded: &str) -> Result<String, UrlError> {
    percent_decode(encoded)
        .and_then(|bytes| String::from_utf8(bytes).ok())
        .ok_or_else(|| part(scheme, "bad percent-encoding".into()))
}

fn pairs(scheme: &'static str, query: &str) -> Result<Vec<(String, String)>, UrlError> {
    let options = query.split('&').filter(|option| !option.is_empty());
    options
        .map(|option| {
            let (key, value) = option.split_once('=').unwrap_or((option, ""));
            Ok((text(scheme, key)?, text(scheme, value)?))
        })
        .collect()
}

/// 3 to 63 lower-case letters, digits, dots and dashes; older buckets have upper case and underlines too.
fn bucket_name(scheme: &'static str, encoded: &str) -> Result<String, UrlError> {
    let name = text(scheme, encoded)?;
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    match (3..=255).contains(&name.len()) && name.bytes().all(legal) {
        true => Ok(name),
        false if name.is_empty() => Err(part(scheme, "the bucket is missing".into())),
        false => Err(part(scheme, format!("'{}' can't be a bucket's name", shown(&name)))),
    }
}

/// The empty prefix, or one that ends in a slash.
fn key_prefix(scheme: &'static str, encoded: &str) -> Result<String, UrlError> {
    let prefix = text(scheme, encoded.trim_end_matches('/'))?;
    if prefix.starts_with('/')
        || prefix.split('/').any(|segment| matches!(segment, "." | ".."))
        || prefix.contains("//")
    {
        return Err(part(scheme, "the prefix has an empty part, a '.' or a '..'".into()));
    }
    Ok(if prefix.is_empty() { prefix } else { prefix + "/" })
}

pub(super) fn percent_decode(text: &str) -> Option<Vec<u8>> {
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
        let RepositoryUrl::Dir(path) = url.parse().unwrap() else { panic!("{url} is a bucket") };
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
    fn buckets_are_read_in_all_their_forms() {
        let place = |bucket: &str, prefix: &str, region: Option<&str>, endpoint: Option<&str>| S3Place {
            bucket: bucket.into(),
            prefix: prefix.into(),
            region: region.map(Into::into),
            endpoint: endpoint.map(Into::into),
        };
        for (url, expected) in [
            ("s3://data", place("data", "", None, None)),
            ("s3://data/", place("data", "", None, None)),
            ("s3://data/a/b%20c/", place("data", "a/b c/", None, None)),
            ("S3://data/a?region=eu-west-1", place("data", "a/", Some("eu-west-1"), None)),
            (
                "s3://data/a?region=r&endpoint=https%3A%2F%2F[::1]:9000",
                place("data", "a/", Some("r"), Some("https://[::1]:9000")),
            ),
            ("minio://10.0.0.1:9000/data/x", place("data", "x/", None, Some("http://10.0.0.1:9000"))),
            ("minio://[fd00::1]/data?tls=1", place("data", "", None, Some("https://[fd00::1]"))),
        ] {
            assert_eq!(url.parse(), Ok(RepositoryUrl::S3(expected)), "{url}");
        }
    }

    #[test]
    fn the_schemes_of_ssh_are_one() {
        let place = SshPlace { user: Some("u".into()), host: "h".into(), port: None, path: b"/d".to_vec() };
        for url in ["scp://u@h/d", "ssh://u@h:/d", "SFTP://u@h/d/"] {
            assert_eq!(url.parse(), Ok(RepositoryUrl::Ssh(place.clone())), "{url}");
        }
        assert_eq!(RepositoryUrl::Ssh(place).to_string(), "scp://u@h/d");
    }

    #[test]
    fn a_secret_in_a_url_is_refused_and_not_repeated() {
        for url in [
            "s3://AKIAKEY:hunter2@data/x",
            "s3://AKIAKEY:hunt/hunter2@data/x",
            "minio://user:hunter2@host:9000/data",
            "minio://user:hunter2/more@host:9000/data",
            "s3://data?endpoint=http://user:hunter2%40host:9000",
            "s3://data?endpoint=http://user:hunter2@host:9000",
            "scp://user:hunter2@host/dir",
            "sftp://user:hunter2/more@host/dir",
        ] {
            let error = url.parse::<RepositoryUrl>().unwrap_err().to_string();
            assert!(error.contains("credentials don't belong in a URL"), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn what_this_build_can_not_open_is_said_plainly() {
        for (url, part) in [
            ("", "is empty"),
            ("s3://", "the bucket is missing"),
            ("s3://no such/x", "can't be a bucket's name"),
            ("s3://bucket/a/../b", "'..'"),
            ("s3://bucket?regoin=x", "unknown option 'regoin'; there are region and endpoint"),
            ("s3://bucket?endpoint=host:80", "http://host:port"),
            ("s3://bucket/%zz", "percent-encoding"),
            ("minio://h:9000", "the bucket is missing"),
            ("minio://h:port/bucket", "'h:port' is not host:port"),
            ("minio://h:9000/bucket?tls=yes", "tls is 0 or 1"),
            ("scp://host", "in a URL scp://...: the directory is missing"),
            ("ssh:///dir", "in a URL ssh://...: the host is missing"),
            ("sftp://host:x/dir", "in a URL sftp://...: the port is not a number from 1 to 65535"),
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
            let _ = format!("s3://{tail}/{tail}?endpoint={tail}&{tail}").parse::<RepositoryUrl>();
            let _ = format!("minio://{tail}/{tail}?{tail}").parse::<RepositoryUrl>();
            let _ = format!("scp://{tail}@[{tail}]:{tail}/{tail}").parse::<RepositoryUrl>();
        }
    }
}
