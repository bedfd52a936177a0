//! Where a repository is on an SSH host, as its URL says.
//!
//! Enters: what follows `scp://`, `ssh://` or `sftp://`. Leaves: a place without a secret in it, or an error that repeats none.

use std::fmt;

use percent_encoding::{AsciiSet, CONTROLS, percent_encode, utf8_percent_encode};

use super::super::UrlError;
use super::super::url::{part, percent_decode, shown};

/// What a path is shown with as %XX, so that what is shown is a URL of the same place.
const IN_PATH: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'#').add(b'%').add(b'?').add(b'@').add(b'~');
/// The same for a user's name.
const IN_USER: &AsciiSet = &IN_PATH.add(b'/').add(b':').add(b'[').add(b']');

/// A directory on a host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SshPlace {
    /// The user, where the URL names one.
    pub user: Option<String>,
    /// The host as the URL names it: a name, an address or a `Host` of ~/.ssh/config. IPv6 without brackets.
    pub host: String,
    /// The port, where the URL names one.
    pub port: Option<u16>,
    /// The directory, absolute, or relative to the user's home. Any bytes but NUL.
    pub path: Vec<u8>,
}

impl SshPlace {
    /// Reads `[user@]host[:port]/dir`, the old form `user@host:/dir`, and `host/~/dir`.
    pub(in super::super) fn parse(scheme: &'static str, rest: &str) -> Result<SshPlace, UrlError> {
        let wrong = |problem: &str| part(scheme, problem.to_owned());
        let (authority, path) = match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, ""),
        };
        let (user, address) = match authority.rsplit_once('@') {
            Some((user, address)) => (Some(user), address),
            None => (None, authority),
        };
        // A password may have a slash in it: then the rest of it lies in what looks like the path.
        let cut = user.is_none() && authority.contains(':') && path.contains('@') && !bracketed(authority);
        if user.is_some_and(|user| user.contains(':') || user.contains('@')) || cut {
            return Err(wrong(
                "there is a password: credentials don't belong in a URL, keys come from the SSH agent and ~/.ssh; \
                 an '@' in the path is written %40",
            ));
        }
        let decode = |text| percent_decode(text).ok_or_else(|| wrong("bad percent-encoding"));
        let user = match user {
            Some("") => return Err(wrong("the user is missing before the '@'")),
            Some(user) => {
                let user = String::from_utf8(decode(user)?).ok();
                let user = user.filter(|user| !user.chars().any(char::is_control) && !user.starts_with('-'));
                Some(user.ok_or_else(|| wrong("that can't be a user's name"))?)
            }
            None => None,
        };
        let (host, port) = split_port(address).ok_or_else(|| wrong("an IPv6 address is written [::1]"))?;
        let port = match port {
            // The old form: nothing between the colon and the path.
            None | Some("") => None,
            // Not repeated: it may be a part of a password.
            Some(port) => match port.parse() {
                Ok(0) | Err(_) => return Err(wrong("the port is not a number from 1 to 65535")),
                Ok(port) => Some(port),
            },
        };
        let legal =
            |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b':' | b'%');
        if host.is_empty() {
            return Err(wrong("the host is missing"));
        }
        if host.starts_with('-') || !host.bytes().all(legal) || (host.contains('%') && !host.contains(':')) {
            return Err(part(scheme, format!("'{}' can't be a host's name", shown(host))));
        }
        if let Some(mark) = path.chars().find(|mark| matches!(mark, '?' | '#')) {
            return Err(part(scheme, format!("the path has no '{mark}'; write it as %{:02X}", mark as u32)));
        }
        let path = match path {
            "" => {
                return Err(wrong("the directory is missing: write host/dir, or host/~/dir below the home"));
            }
            "/~" | "/~/" => Vec::from("."),
            path => match path.strip_prefix("/~/") {
                Some(below_home) => decode(below_home.trim_start_matches('/'))?,
                None if path.starts_with("/~") => return Err(wrong("only ~/, the own home, is known")),
                None => decode(path)?,
            },
        };
        Ok(SshPlace { user, host: host.into(), port, path: trimmed(path) })
    }
}

fn bracketed(authority: &str) -> bool {
    authority.starts_with('[')
}

/// Host and port; `None` where colons are neither.
fn split_port(address: &str) -> Option<(&str, Option<&str>)> {
    if let Some(inside) = address.strip_prefix('[') {
        let (host, after) = inside.split_once(']')?;
        let port = if after.is_empty() { None } else { Some(after.strip_prefix(':')?) };
        return Some((host, port));
    }
    match address.split_once(':') {
        Some((_, port)) if port.contains(':') => None,
        Some((host, port)) => Some((host, Some(port))),
        None => Some((address, None)),
    }
}

/// Without slashes at the end; the root keeps its own.
fn trimmed(mut path: Vec<u8>) -> Vec<u8> {
    while path.len() > 1 && path.last() == Some(&b'/') {
        path.pop();
    }
    path
}

impl fmt::Display for SshPlace {
    /// As a URL of it: nothing here is secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("scp://")?;
        if let Some(user) = &self.user {
            write!(f, "{}@", utf8_percent_encode(user, IN_USER))?;
        }
        match self.host.contains(':') {
            true => write!(f, "[{}]", self.host)?,
            false => f.write_str(&self.host)?,
        }
        if let Some(port) = self.port {
            write!(f, ":{port}")?;
        }
        let path = percent_encode(&self.path, IN_PATH);
        match self.path.as_slice() {
            [b'/', ..] => path.fmt(f),
            b"." => f.write_str("/~"),
            _ => write!(f, "/~/{path}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(rest: &str) -> Result<SshPlace, String> {
        SshPlace::parse("scp", rest).map_err(|error| error.to_string())
    }

    #[test]
    fn places_are_read_in_all_their_forms() {
        for (rest, user, host, port, path, shown) in [
            ("host/srv/r", None, "host", None, "/srv/r", "scp://host/srv/r"),
            ("u@host:22/srv/r/", Some("u"), "host", Some(22), "/srv/r", "scp://u@host:22/srv/r"),
            ("u@host:/srv/r", Some("u"), "host", None, "/srv/r", "scp://u@host/srv/r"),
            ("host/~/r/x", None, "host", None, "r/x", "scp://host/~/r/x"),
            ("host/~", None, "host", None, ".", "scp://host/~"),
            ("host/", None, "host", None, "/", "scp://host/"),
            ("a%40b@h/a%20b%2fc", Some("a@b"), "h", None, "/a b/c", "scp://a%40b@h/a%20b/c"),
            ("h:7/%7ex/%0a%c3%a4", None, "h", Some(7), "/~x/\n\u{e4}", "scp://h:7/%7Ex/%0A%C3%A4"),
            ("[fd00::1]:2222/r", None, "fd00::1", Some(2222), "/r", "scp://[fd00::1]:2222/r"),
            ("u@[::1]/r@x", Some("u"), "::1", None, "/r@x", "scp://u@[::1]/r%40x"),
            ("h/r@x", None, "h", None, "/r@x", "scp://h/r%40x"),
        ] {
            let place = parse(rest).unwrap();
            let expected = SshPlace {
                user: user.map(Into::into),
                host: host.into(),
                port,
                path: path.as_bytes().to_vec(),
            };
            assert_eq!(place, expected, "{rest}");
            assert_eq!(place.to_string(), shown);
            assert_eq!(parse(shown.strip_prefix("scp://").unwrap()).unwrap(), place);
        }
        assert_eq!(parse("h/%ff'\"").unwrap().path, b"/\xff'\"");
    }

    #[test]
    fn what_is_wrong_is_said_and_a_password_is_not() {
        for (rest, part) in [
            ("u:hunter2@h/r", "credentials don't belong in a URL"),
            ("u:hunt/hunter2@h/r", "credentials don't belong in a URL"),
            ("u:12/hunter2@h/r", "credentials don't belong in a URL"),
            ("u@x:hunter2@h/r", "credentials don't belong in a URL"),
            ("u@h:hunter2/r", "the port is not a number"),
            ("h:0/r", "the port is not a number"),
            ("h:65536/r", "the port is not a number"),
            ("@h/r", "the user is missing"),
            ("u%0a@h/r", "can't be a user's name"),
            ("/r", "the host is missing"),
            ("", "the host is missing"),
            ("-oProxyCommand=x/r", "can't be a host's name"),
            ("h%41/r", "can't be a host's name"),
            ("::1/r", "an IPv6 address is written [::1]"),
            ("[::1/r", "an IPv6 address is written [::1]"),
            ("h", "the directory is missing"),
            ("h:22", "the directory is missing"),
            ("h/~bob/r", "only ~/"),
            ("h/r?x=1", "%3F"),
            ("h/r#x", "%23"),
            ("h/%zz", "bad percent-encoding"),
            ("h/%00", "bad percent-encoding"),
        ] {
            let error = parse(rest).unwrap_err();
            assert!(error.starts_with("in a URL scp://...: ") && error.contains(part), "{rest}: {error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }
}
