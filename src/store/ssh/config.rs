//! What ~/.ssh/config and /etc/ssh/ssh_config say of a host: the keys that a client of SFTP needs, as ssh_config(5) has them.
//!
//! Enters: the files. Leaves: a [`HostConfig`]; other keys are passed over. Known are `Host` with its patterns, `Match all`, `Match host`,
//! `Match originalhost`, and `Include`. Invariant: what would lead the connection elsewhere (a proxy) or refuse a host (revoked keys) and is not supported is
//! reported, not dropped.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::local::Local;

/// How deep files may include each other.
const INCLUDE_DEPTH: usize = 16;
/// The longest file that is read.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Files one `Include` may bring in.
const MAX_INCLUDED: usize = 256;

/// What is configured for one host. `None` and empty: nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct HostConfig {
    pub host_name: Option<String>,
    pub user: Option<String>,
    pub port: Option<u16>,
    pub identity_files: Vec<PathBuf>,
    pub identities_only: bool,
    /// Set by `UserKnownHostsFile`, empty for `none`.
    pub known_hosts: Option<Vec<PathBuf>>,
    /// Set by `GlobalKnownHostsFile`, empty for `none`.
    pub global_known_hosts: Option<Vec<PathBuf>>,
    pub host_key_alias: Option<String>,
    pub connect_timeout: Option<Duration>,
    /// The name of the key that asks for a proxy.
    pub proxy: Option<&'static str>,
}

/// What is wrong in a file, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ConfigError(pub String);

/// The configuration of the host that a URL calls `alias`.
pub(super) fn read(local: &Local, alias: &str, user: Option<&str>) -> Result<HostConfig, ConfigError> {
    let mut reader = Reader { local, alias, user, found: Found::default() };
    for file in local.dot_ssh("config").into_iter().chain([PathBuf::from("/etc/ssh/ssh_config")]) {
        reader.file(&file, true, 0)?;
    }
    reader.settle()
}

/// The first value of each key, as it was written.
#[derive(Default)]
struct Found {
    host_name: Option<String>,
    user: Option<String>,
    port: Option<u16>,
    identity_files: Vec<String>,
    identities_only: Option<bool>,
    known_hosts: Option<Vec<String>>,
    global_known_hosts: Option<Vec<String>>,
    host_key_alias: Option<String>,
    connect_timeout: Option<Duration>,
    proxy: Option<Option<&'static str>>,
    revoked_none: Option<bool>,
}

struct Reader<'a> {
    local: &'a Local,
    alias: &'a str,
    user: Option<&'a str>,
    found: Found,
}

impl Reader<'_> {
    /// Reads a file; one that is not there or not ours to read says nothing.
    fn file(&mut self, path: &Path, mut active: bool, depth: usize) -> Result<(), ConfigError> {
        if depth > INCLUDE_DEPTH {
            return Err(ConfigError(format!("{}: files include each other too deeply", path.display())));
        }
        let Ok(meta) = fs::metadata(path) else { return Ok(()) };
        if !meta.is_file() || meta.len() > MAX_CONFIG_BYTES {
            return Ok(());
        }
        let Ok(bytes) = fs::read(path) else { return Ok(()) };
        for (number, line) in String::from_utf8_lossy(&bytes).lines().enumerate() {
            let wrong = |why: &str| ConfigError(format!("{}:{}: {why}", path.display(), number + 1));
            let words = words(line).ok_or_else(|| wrong("a quote is not closed"))?;
            let Some((key, values)) = words.split_first() else { continue };
            let key = key.to_ascii_lowercase();
            let values: Vec<&str> = values.iter().map(String::as_str).collect();
            match (key.as_str(), values.as_slice()) {
                (_, []) => return Err(wrong(&format!("{key} has no value"))),
                ("host", patterns) => active = matches_host(patterns, self.alias),
                ("match", criteria) => active = self.matches(criteria),
                _ if !active => {}
                ("include", patterns) => {
                    let files: Vec<PathBuf> =
                        patterns.iter().flat_map(|pattern| self.included(pattern)).collect();
                    for file in files {
                        self.file(&file, true, depth + 1)?;
                    }
                }
                (key, values) => self.set(key, values).map_err(|why| wrong(&why))?,
            }
        }
        Ok(())
    }

    fn set(&mut self, key: &str, values: &[&str]) -> Result<(), String> {
        let found = &mut self.found;
        let value = values.first().copied().unwrap_or_default();
        let owned = |values: &[&str]| values.iter().map(|value| (*value).to_owned()).collect::<Vec<_>>();
        let proxy = |name| (!value.eq_ignore_ascii_case("none")).then_some(name);
        match key {
            "hostname" => _ = found.host_name.get_or_insert_with(|| value.into()),
            "user" => _ = found.user.get_or_insert_with(|| value.into()),
            "port" => {
                let port = value.parse().ok().filter(|port| *port > 0);
                let port = port.ok_or_else(|| format!("Port '{value}' is not a number from 1 to 65535"))?;
                found.port.get_or_insert(port);
            }
            // The one key that adds up.
            "identityfile" => found.identity_files.push(value.into()),
            "identitiesonly" => _ = found.identities_only.get_or_insert(value.eq_ignore_ascii_case("yes")),
            "userknownhostsfile" => _ = found.known_hosts.get_or_insert_with(|| owned(values)),
            "globalknownhostsfile" => _ = found.global_known_hosts.get_or_insert_with(|| owned(values)),
            "hostkeyalias" => _ = found.host_key_alias.get_or_insert_with(|| value.into()),
            "connecttimeout" if value.eq_ignore_ascii_case("none") => {}
            "connecttimeout" => {
                let seconds = value.parse().ok().filter(|seconds| *seconds > 0);
                let seconds =
                    seconds.ok_or_else(|| format!("ConnectTimeout '{value}' is not a number of seconds"))?;
                found.connect_timeout.get_or_insert(Duration::from_secs(seconds));
            }
            "proxyjump" => _ = found.proxy.get_or_insert(proxy("ProxyJump")),
            "proxycommand" => _ = found.proxy.get_or_insert(proxy("ProxyCommand")),
            "revokedhostkeys" => {
                // As with all others the first one counts: a user's `none` is stronger than the machine's.
                let is_none = *found.revoked_none.get_or_insert(value.eq_ignore_ascii_case("none"));
                if !is_none {
                    return Err(
                        "RevokedHostKeys is not supported: a key that was revoked would be taken".into()
                    );
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Whether a `Match` line holds; what it asks beyond the host can't be known here, so it does not.
    fn matches(&self, criteria: &[&str]) -> bool {
        let host = self.found.host_name.as_deref().unwrap_or(self.alias);
        let mut words = criteria.iter();
        while let Some(word) = words.next() {
            let (negated, word) = word.strip_prefix('!').map_or((false, *word), |word| (true, word));
            let holds = match (word.to_ascii_lowercase().as_str(), word) {
                ("all", _) => true,
                (kind @ ("host" | "originalhost"), _) => {
                    let patterns: Vec<&str> =
                        words.next().map_or(Vec::new(), |list| list.split(',').collect());
                    matches_host(&patterns, if kind == "host" { host } else { self.alias })
                }
                _ => return false,
            };
            if holds == negated {
                return false;
            }
        }
        true
    }

    /// The files an `Include` names: relative to ~/.ssh, with wildcards in the last part.
    fn included(&self, pattern: &str) -> Vec<PathBuf> {
        let path = match self.local.expand(pattern) {
            Some(path) if path.is_absolute() => Some(path),
            Some(path) => self.local.dot_ssh(path),
            None => None,
        };
        let Some(path) = path else { return Vec::new() };
        let (Some(dir), Some(last)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
            return Vec::new();
        };
        if !last.contains(['*', '?']) {
            return vec![path];
        }
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let mut names: Vec<String> =
            names.filter(|name| !name.starts_with('.') && matches_pattern(last, name)).collect();
        names.sort();
        names.into_iter().take(MAX_INCLUDED).map(|name| dir.join(name)).collect()
    }

    /// Fills in the tokens.
    fn settle(self) -> Result<HostConfig, ConfigError> {
        let Reader { local, alias, user, found } = self;
        let fill = |text: &str, host: &str| {
            let home = local.home.as_ref().map(|home| home.to_string_lossy());
            let tokens = [
                ('h', host),
                ('n', alias),
                ('r', user.or(found.user.as_deref()).or(local.user.as_deref()).unwrap_or("")),
                ('u', local.user.as_deref().unwrap_or("")),
                ('d', home.as_deref().unwrap_or("")),
            ];
            let port = found.port.unwrap_or(super::DEFAULT_PORT).to_string();
            filled(text, &tokens, &port).ok_or_else(|| {
                ConfigError(format!("'{text}' in ~/.ssh/config has a % that is not known here"))
            })
        };
        let host_name = found.host_name.as_deref().map(|name| fill(name, alias)).transpose()?;
        let host = host_name.as_deref().unwrap_or(alias).to_owned();
        let paths = |texts: &[String]| -> Result<Vec<PathBuf>, ConfigError> {
            let named = texts.iter().filter(|text| !text.eq_ignore_ascii_case("none"));
            let paths = named.map(|text| fill(text, &host).map(|text| local.expand(&text)));
            Ok(paths.collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect())
        };
        Ok(HostConfig {
            user: found.user.clone(),
            port: found.port,
            identity_files: paths(&found.identity_files)?,
            identities_only: found.identities_only.unwrap_or(false),
            known_hosts: found.known_hosts.as_deref().map(paths).transpose()?,
            global_known_hosts: found.global_known_hosts.as_deref().map(paths).transpose()?,
            host_key_alias: found.host_key_alias.clone(),
            connect_timeout: found.connect_timeout,
            proxy: found.proxy.flatten(),
            host_name,
        })
    }
}

fn filled(text: &str, tokens: &[(char, &str)], port: &str) -> Option<String> {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(next) = chars.next() {
        match (next, if next == '%' { chars.next() } else { None }) {
            ('%', Some('%')) => out.push('%'),
            ('%', Some('p')) => out.push_str(port),
            ('%', Some(token)) => out.push_str(tokens.iter().find(|(name, _)| *name == token)?.1),
            ('%', None) => return None,
            (other, _) => out.push(other),
        }
    }
    Some(out)
}

/// The words of a line: `key value...`, `key=value`, quotes around a word with spaces. `None` where a quote is open.
fn words(line: &str) -> Option<Vec<String>> {
    let mut words = Vec::new();
    let mut rest = line.trim();
    while !rest.is_empty() && !rest.starts_with('#') {
        let (word, after) = match rest.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"')?,
            None => {
                let is_end = |c: char| c.is_whitespace() || (words.is_empty() && c == '=');
                rest.split_at(rest.find(is_end).unwrap_or(rest.len()))
            }
        };
        words.push(word.to_owned());
        rest = after.trim_start();
        if words.len() == 1 {
            rest = rest.strip_prefix('=').unwrap_or(rest).trim_start();
        }
    }
    Some(words)
}

/// Whether a list of patterns names a host: one that is negated and fits excludes it, whatever the others say.
pub(super) fn matches_host(patterns: &[&str], host: &str) -> bool {
    let host = host.to_ascii_lowercase();
    let fits = |pattern: &str| matches_pattern(&pattern.to_ascii_lowercase(), &host);
    let excluded = patterns.iter().filter_map(|pattern| pattern.strip_prefix('!')).any(fits);
    !excluded && patterns.iter().filter(|pattern| !pattern.starts_with('!')).any(|pattern| fits(pattern))
}

/// `*` is any run of characters, `?` is any one.
fn matches_pattern(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut p, mut t) = (0, 0);
    // Where to go on when what follows the last star did not fit: one character later.
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p + 1, t));
                p += 1;
            }
            Some(&byte) if byte == b'?' || byte == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match star {
                Some((after, from)) => {
                    (p, t) = (after, from + 1);
                    star = Some((after, from + 1));
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home(config: &str) -> (tempfile::TempDir, Local) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join(".ssh/conf.d")).unwrap();
        fs::write(dir.path().join(".ssh/config"), config).unwrap();
        let local = Local { home: Some(dir.path().to_owned()), user: Some("me".into()), ..Local::default() };
        (dir, local)
    }

    #[test]
    fn the_first_value_of_a_matching_host_counts_and_identities_add_up() {
        let (dir, local) = home(
            "# a comment\nHost back* !backup2\n  HostName = %h.example.org\n Port 2222\n IdentityFile ~/.ssh/a\n\
             Host backup?\n Port 99\n User \"bob\"\n IdentityFile %d/k_%r_%n\n IdentitiesOnly yes\n ConnectTimeout=7\n\
             Host *\n User other\n UserKnownHostsFile ~/kh /etc/kh2\n GlobalKnownHostsFile none\n Ciphers x y z\n",
        );
        let one = read(&local, "backup1", None).unwrap();
        assert_eq!(one.host_name.as_deref(), Some("backup1.example.org"));
        assert_eq!((one.port, one.user.as_deref()), (Some(2222), Some("bob")));
        assert_eq!(one.identity_files, [dir.path().join(".ssh/a"), dir.path().join("k_bob_backup1")]);
        assert!(one.identities_only && one.connect_timeout == Some(Duration::from_secs(7)));
        assert_eq!(one.known_hosts, Some(vec![dir.path().join("kh"), "/etc/kh2".into()]));
        assert_eq!(one.global_known_hosts, Some(vec![]));
        let two = read(&local, "BACKUP2", None).unwrap();
        assert_eq!((two.host_name, two.port), (None, Some(99)));
        let three = read(&local, "elsewhere", None).unwrap();
        assert_eq!((three.user.as_deref(), three.port), (Some("other"), None));
    }

    #[test]
    fn included_files_and_matches_are_followed() {
        let (dir, local) = home(
            "Include conf.d/*.conf\nMatch originalhost other\n Port 7\nMatch all\n User last\n\
             Match exec true\n Port 8\n",
        );
        fs::write(dir.path().join(".ssh/conf.d/a.conf"), "Host x\n User first\n ProxyJump hop\n").unwrap();
        fs::write(dir.path().join(".ssh/conf.d/b.txt"), "Port 1\n").unwrap();
        let x = read(&local, "x", None).unwrap();
        assert_eq!((x.user.as_deref(), x.port, x.proxy), (Some("first"), None, Some("ProxyJump")));
        let other = read(&local, "other", None).unwrap();
        assert_eq!((other.user.as_deref(), other.port, other.proxy), (Some("last"), Some(7), None));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (config, part) in [
            ("Host *\n Port x\n", "config:2: Port 'x'"),
            ("User \"x\n", "config:1: a quote"),
            ("User\n", "config:1: user has no value"),
            ("ConnectTimeout never\n", "config:1: ConnectTimeout"),
            ("Host *\n RevokedHostKeys /etc/ssh/revoked\n", "config:2: RevokedHostKeys is not supported"),
            ("Include config\n", "too deeply"),
            ("IdentityFile %q\n", "'%q'"),
        ] {
            let (_dir, local) = home(config);
            let error = read(&local, "h", None).unwrap_err().0;
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn patterns_are_those_of_ssh_config() {
        for (pattern, text, fits) in [
            ("*", "", true),
            ("*.b", "a.b", true),
            ("*.b", "b", false),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("a*b*c", "axxbyybzc", true),
            ("a*b*c", "axxbyybz", false),
            ("", "", true),
            ("", "a", false),
        ] {
            assert_eq!(matches_pattern(pattern, text), fits, "{pattern} {text}");
        }
        assert!(!matches_host(&["!a", "*"], "a") && matches_host(&["!a", "*"], "b"));
        assert!(!matches_host(&["!a"], "b"));
    }
}
