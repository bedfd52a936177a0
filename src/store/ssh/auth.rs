//! Logging in: with the agent's keys, then with key files that need no passphrase. Nobody is asked for anything.
//!
//! Enters: a session after its handshake. Leaves: one that is logged in, or an error that names what was tried. Invariant: of a key nothing but its file's
//! name and its public fingerprint leaves this file.

use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ssh2::Session;

use super::super::StoreError;
use super::config::HostConfig;
use super::connect::is_broken;
use super::known_hosts::fingerprint;
use super::local::Local;

/// What OpenSSH tries where nothing is configured.
const DEFAULT_KEYS: [&str; 3] = ["id_ed25519", "id_ecdsa", "id_rsa"];
/// The longest key file that is read.
const MAX_KEY_BYTES: u64 = 1 << 20;
/// Keys of an agent that are tried. Servers hang up after some six.
const MAX_AGENT_KEYS: usize = 32;
/// How long an agent may take to say which keys it has.
const AGENT_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);

/// One login.
pub(super) struct Login<'a> {
    pub session: &'a Session,
    pub store: &'a str,
    pub user: &'a str,
    pub config: &'a HostConfig,
    pub local: &'a Local,
}

impl Login<'_> {
    /// Tries what there is, in order.
    pub fn run(&self) -> Result<(), StoreError> {
        match self.session.auth_methods(self.user) {
            // The server wants no proof.
            _ if self.session.authenticated() => return Ok(()),
            Ok(methods) if !methods.split(',').any(|method| method == "publickey") => {
                return Err(self.refused(format!(
                    "the server takes only {}, and Horcrux logs in with keys only",
                    shown(methods)
                )));
            }
            Ok(_) => {}
            Err(error) => return Err(self.broken(&error)),
        }
        let mut tried = Vec::new();
        let files = self.key_files();
        if self.with_agent(&files, &mut tried)? || self.with_files(&files, &mut tried)? {
            return Ok(());
        }
        Err(self.refused(format!("no key was accepted for user {}; tried: {}", self.user, tried.join(", "))))
    }

    fn refused(&self, why: String) -> StoreError {
        StoreError::NotLoggedIn { store: self.store.into(), why }
    }

    fn broken(&self, error: &ssh2::Error) -> StoreError {
        super::connect::session_error(self.store, "log in as", self.user, error)
    }

    /// The files to try: what is configured, else the usual ones.
    fn key_files(&self) -> Vec<PathBuf> {
        if !self.config.identity_files.is_empty() {
            return self.config.identity_files.clone();
        }
        DEFAULT_KEYS.iter().filter_map(|name| self.local.dot_ssh(name)).collect()
    }

    fn with_agent(&self, files: &[PathBuf], tried: &mut Vec<String>) -> Result<bool, StoreError> {
        let Some(socket) = &self.local.agent else {
            tried.push("no SSH agent (SSH_AUTH_SOCK is not set)".into());
            return Ok(false);
        };
        if !answers(socket) {
            tried.push("the SSH agent, which does not answer".into());
            return Ok(false);
        }
        let listed = self.session.agent().and_then(|mut agent| {
            agent.set_identity_path(socket)?;
            agent.connect()?;
            agent.list_identities()?;
            let keys = agent.identities()?;
            Ok((agent, keys))
        });
        let Ok((agent, mut keys)) = listed else {
            tried.push("the SSH agent, which does not answer".into());
            return Ok(false);
        };
        // As OpenSSH: the configured ones first, since servers hang up after a few wrong ones.
        let wanted: Vec<Vec<u8>> = files.iter().filter_map(|file| public_key(file)).collect();
        keys.sort_by_key(|key| !wanted.iter().any(|wanted| wanted == key.blob()));
        if self.config.identities_only {
            keys.retain(|key| wanted.iter().any(|wanted| wanted == key.blob()));
        }
        if keys.is_empty() {
            tried.push("the SSH agent, which has no key for this".into());
        }
        for key in keys.iter().take(MAX_AGENT_KEYS) {
            match agent.userauth(self.user, key) {
                Ok(()) => return Ok(true),
                Err(error) => tried.push(self.rejected(
                    format!("the agent's {}", fingerprint(key.blob())),
                    &error,
                    tried,
                )?),
            }
        }
        Ok(false)
    }

    fn with_files(&self, files: &[PathBuf], tried: &mut Vec<String>) -> Result<bool, StoreError> {
        for file in files {
            let name = file.display().to_string();
            match key_file(file) {
                KeyFile::Absent if self.config.identity_files.is_empty() => {}
                KeyFile::Absent => tried.push(format!("{name}, which is not there")),
                KeyFile::Unreadable(why) => tried.push(format!("{name}, which can't be read ({why})")),
                KeyFile::Encrypted => {
                    tried.push(format!("{name}, which needs a passphrase (run 'ssh-add {name}' first)"));
                }
                KeyFile::Plain => match self.session.userauth_pubkey_file(self.user, None, file, None) {
                    Ok(()) => return Ok(true),
                    Err(error) => tried.push(self.rejected(name, &error, tried)?),
                },
            }
        }
        if tried.len() == 1 && self.config.identity_files.is_empty() {
            tried.push(format!("no {} in ~/.ssh", DEFAULT_KEYS.join(", ")));
        }
        Ok(false)
    }

    /// A key that did not do, for the list; or the end, where the server hung up.
    fn rejected(&self, what: String, error: &ssh2::Error, tried: &[String]) -> Result<String, StoreError> {
        if is_broken(error) {
            let before = if tried.is_empty() { String::new() } else { format!("{}, ", tried.join(", ")) };
            return Err(self.refused(format!(
                "the server hung up on user {}; tried: {before}{what}; servers take a few keys only: \
                 'IdentitiesOnly yes' and an IdentityFile in ~/.ssh/config choose one",
                self.user
            )));
        }
        Ok(what)
    }
}

/// Whether an agent answers at all. libssh2 waits for one without end: a forwarded one whose other end sleeps would take the session with it.
fn answers(socket: &Path) -> bool {
    use std::io::{Read, Write};
    // SSH_AGENTC_REQUEST_IDENTITIES (draft-miller-ssh-agent, 4.4).
    const ASK: [u8; 5] = [0, 0, 0, 1, 11];
    let Ok(mut agent) = std::os::unix::net::UnixStream::connect(socket) else { return false };
    let timed = agent.set_read_timeout(Some(AGENT_TIMEOUT)).and(agent.set_write_timeout(Some(AGENT_TIMEOUT)));
    timed.is_ok() && agent.write_all(&ASK).is_ok() && agent.read_exact(&mut [0; 5]).is_ok()
}

fn shown(text: &str) -> String {
    text.chars().filter(|c| c.is_ascii_graphic()).take(100).collect()
}

/// The public half beside a private key, if it is there.
fn public_key(private: &Path) -> Option<Vec<u8>> {
    let mut name = private.as_os_str().to_owned();
    // An IdentityFile may name the public half of a key that only the agent has.
    if private.extension().is_none_or(|extension| extension != "pub") {
        name.push(".pub");
    }
    let meta = fs::metadata(&name).ok().filter(|meta| meta.is_file() && meta.len() <= MAX_KEY_BYTES);
    let text = meta.and_then(|_| fs::read_to_string(&name).ok())?;
    STANDARD.decode(text.split_whitespace().nth(1)?).ok()
}

#[derive(Debug, PartialEq, Eq)]
enum KeyFile {
    Absent,
    Unreadable(std::io::ErrorKind),
    Encrypted,
    Plain,
}

/// What a private key's file is. Its content does not leave this function.
fn key_file(path: &Path) -> KeyFile {
    let too_long = fs::metadata(path).is_ok_and(|meta| meta.len() > MAX_KEY_BYTES);
    if too_long {
        return KeyFile::Unreadable(std::io::ErrorKind::FileTooLarge);
    }
    match fs::read(path) {
        Ok(key) if is_encrypted(&String::from_utf8_lossy(&key)) => KeyFile::Encrypted,
        Ok(_) => KeyFile::Plain,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => KeyFile::Absent,
        Err(error) => KeyFile::Unreadable(error.kind()),
    }
}

/// Whether a private key needs a passphrase: OpenSSH's own format names its cipher first, PEM says so in words.
fn is_encrypted(key: &str) -> bool {
    let Some((_, body)) = key.split_once("-----BEGIN OPENSSH PRIVATE KEY-----") else {
        return key.contains("BEGIN ENCRYPTED PRIVATE KEY") || key.contains("Proc-Type: 4,ENCRYPTED");
    };
    let start: String = body.chars().filter(|c| !c.is_whitespace()).take(64).collect();
    let Ok(start) = STANDARD.decode(start) else { return false };
    let unencrypted = b"openssh-key-v1\0\0\0\0\x04none";
    start.starts_with(b"openssh-key-v1\0") && !start.starts_with(unencrypted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_needs_a_passphrase_is_told_from_one_that_does_not() {
        let openssh = |start: &[u8]| {
            let body = STANDARD.encode([start, &[0; 64]].concat());
            format!("-----BEGIN OPENSSH PRIVATE KEY-----\n{body}\n-----END OPENSSH PRIVATE KEY-----\n")
        };
        assert!(!is_encrypted(&openssh(b"openssh-key-v1\0\0\0\0\x04none\0\0\0\x04none")));
        assert!(is_encrypted(&openssh(b"openssh-key-v1\0\0\0\0\x0aaes256-ctr\0\0\0\x06bcrypt")));
        assert!(is_encrypted("-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n"));
        assert!(is_encrypted("-----BEGIN ENCRYPTED PRIVATE KEY-----\n"));
        assert!(!is_encrypted("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n"));
        assert_eq!(key_file(Path::new("/nonexistent/key")), KeyFile::Absent);
    }
}
