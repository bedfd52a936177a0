//! Whether a host is the one we know: the known_hosts files, as sshd(8) has them.
//!
//! Enters: the files and the key a host shows. Leaves: a [`Verdict`]. Invariant: only a line that names the host and holds exactly this key makes
//! it known. Hashed names, patterns, `[host]:port` and `@revoked` are understood; `@cert-authority` lines are passed over.

use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use hmac::{Hmac, KeyInit, Mac};
use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::config::matches_host;

/// The longest file that is read: some 100,000 hosts.
const MAX_FILE_BYTES: u64 = 32 << 20;

/// One line that is about the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Known {
    /// The type the key itself names, `ssh-ed25519`.
    pub kind: String,
    key: Vec<u8>,
    revoked: bool,
    /// `file:line`.
    pub place: String,
}

/// What the files say of a key a host shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is the host's.
    Good,
    /// The host has another key of this type, says this place.
    Changed(String),
    /// The key must not be used, says this place.
    Revoked(String),
    /// The host is known by keys of other types only, here.
    OtherTypes(Vec<String>),
    /// Nothing is known of the host.
    Unknown,
}

/// All that some files say of a host. `name` is what the user calls it.
pub(super) fn lines_about(files: &[PathBuf], name: &str, port: u16) -> Vec<Known> {
    let with_port = (port != super::DEFAULT_PORT).then(|| format!("[{name}]:{port}"));
    let mut found = Vec::new();
    for wanted in with_port.as_deref().into_iter().chain([name]) {
        for file in files {
            let small = fs::metadata(file).is_ok_and(|meta| meta.is_file() && meta.len() <= MAX_FILE_BYTES);
            let Some(text) = small.then(|| fs::read(file).ok()).flatten() else { continue };
            found.extend(in_text(&String::from_utf8_lossy(&text), file, wanted));
        }
        // As OpenSSH does: what is known of the host without a port counts only where nothing is known with it.
        if found.iter().any(|line: &Known| !line.revoked) {
            break;
        }
    }
    found
}

fn in_text(text: &str, file: &Path, wanted: &str) -> Vec<Known> {
    let lines = text.lines().enumerate();
    lines.filter_map(|(at, line)| one_line(line, wanted, &format!("{}:{}", file.display(), at + 1))).collect()
}

/// A line, if it is about the host.
fn one_line(line: &str, wanted: &str, place: &str) -> Option<Known> {
    let mut words = line.split_whitespace().peekable();
    let marker = words.next_if(|word| word.starts_with('@'));
    let revoked = match marker {
        None => false,
        Some("@revoked") => true,
        Some(_) => return None,
    };
    let names = words.next().filter(|names| !names.starts_with('#'))?;
    words.next()?;
    let key = STANDARD.decode(words.next()?).ok()?;
    if !names_host(names, wanted) {
        return None;
    }
    Some(Known { kind: key_type(&key)?, key, revoked, place: place.to_owned() })
}

/// Whether the first field of a line names the host.
fn names_host(names: &str, wanted: &str) -> bool {
    if let Some(hashed) = names.strip_prefix("|1|") {
        let parts = hashed.split_once('|');
        let parts =
            parts.and_then(|(salt, hash)| Some((STANDARD.decode(salt).ok()?, STANDARD.decode(hash).ok()?)));
        let Some((salt, hash)) = parts else { return false };
        let Ok(mac) = Hmac::<Sha1>::new_from_slice(&salt) else { return false };
        return mac.chain_update(wanted.to_ascii_lowercase()).verify_slice(&hash).is_ok();
    }
    matches_host(&names.split(',').collect::<Vec<_>>(), wanted)
}

/// The type that a key names in its first field.
pub(super) fn key_type(key: &[u8]) -> Option<String> {
    let (len, rest) = key.split_first_chunk::<4>()?;
    let name = rest.get(..u32::from_be_bytes(*len) as usize)?;
    let plain = name.iter().all(|byte| byte.is_ascii_graphic());
    (plain && name.len() <= 64).then(|| String::from_utf8_lossy(name).into_owned())
}

/// Judges the key a host shows.
pub(super) fn judge(known: &[Known], key: &[u8]) -> Verdict {
    if let Some(line) = known.iter().find(|line| line.revoked && line.key == key) {
        return Verdict::Revoked(line.place.clone());
    }
    let mut good = known.iter().filter(|line| !line.revoked).peekable();
    if good.peek().is_none() {
        return Verdict::Unknown;
    }
    let kind = key_type(key);
    let (mut changed, mut others) = (None, Vec::new());
    for line in good {
        if line.key == key {
            return Verdict::Good;
        }
        if Some(&line.kind) == kind.as_ref() {
            changed.get_or_insert_with(|| line.place.clone());
        } else if !others.contains(&line.kind) {
            others.push(line.kind.clone());
        }
    }
    changed.map_or(Verdict::OtherTypes(others), Verdict::Changed)
}

/// The signature algorithms to ask a host for, in order: those of the keys it is known by, then the others. Asked in the library's own order, a host
/// might show a key that is as good and not known here.
pub(super) fn preference(known: &[Known], supported: &[&str]) -> Option<String> {
    let of_known = |algorithm: &&&str| {
        let kind = if algorithm.starts_with("rsa-sha2-") { "ssh-rsa" } else { algorithm };
        known.iter().any(|line| !line.revoked && line.kind == kind)
    };
    let first: Vec<&str> = supported.iter().filter(of_known).copied().collect();
    if first.is_empty() {
        return None;
    }
    let rest = supported.iter().filter(|algorithm| !of_known(algorithm)).copied();
    Some(first.iter().copied().chain(rest).collect::<Vec<_>>().join(","))
}

/// A key as people compare it.
pub(super) fn fingerprint(key: &[u8]) -> String {
    format!("SHA256:{}", STANDARD_NO_PAD.encode(Sha256::digest(key)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(kind: &str, body: u8) -> Vec<u8> {
        let mut key = (kind.len() as u32).to_be_bytes().to_vec();
        key.extend_from_slice(kind.as_bytes());
        key.extend_from_slice(&[body; 32]);
        key
    }

    fn line(names: &str, kind: &str, body: u8) -> String {
        format!("{names} {kind} {} a comment\n", STANDARD.encode(key(kind, body)))
    }

    fn hashed(name: &str) -> String {
        let salt = [7; 20];
        let mac = Hmac::<Sha1>::new_from_slice(&salt).unwrap().chain_update(name).finalize().into_bytes();
        format!("|1|{}|{}", STANDARD.encode(salt), STANDARD.encode(mac))
    }

    fn verdict(text: &str, port: u16, shown: &[u8]) -> Verdict {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("known_hosts");
        fs::write(&file, text).unwrap();
        let place = format!("{}:", file.display());
        let strip = |text: String| text.replace(&place, "line ");
        match judge(&lines_about(&[dir.path().join("none"), file], "host", port), shown) {
            Verdict::Changed(place) => Verdict::Changed(strip(place)),
            Verdict::Revoked(place) => Verdict::Revoked(strip(place)),
            other => other,
        }
    }

    #[test]
    fn only_the_very_key_under_the_very_name_is_good() {
        let (ed, rsa) = ("ssh-ed25519", "ssh-rsa");
        let shown = key(ed, 1);
        for (text, port, expected) in [
            (line("host", ed, 1), 22, Verdict::Good),
            (line("other,HOST,10.0.0.1", ed, 1), 22, Verdict::Good),
            (line("ho*", ed, 1), 22, Verdict::Good),
            (line("ho*,!host", ed, 1), 22, Verdict::Unknown),
            (line(&hashed("host"), ed, 1), 22, Verdict::Good),
            (line(&hashed("[host]:2222"), ed, 1), 2222, Verdict::Good),
            (line("[host]:2222", ed, 1), 2222, Verdict::Good),
            (line("[host]:2222", ed, 1), 22, Verdict::Unknown),
            // Without the port is as good where the port is not known.
            (line("host", ed, 1), 2222, Verdict::Good),
            (line("host", ed, 1) + &line("[host]:2222", ed, 2), 2222, Verdict::Changed("line 2".into())),
            ("# x\n\n".to_owned() + &line("host", ed, 2), 22, Verdict::Changed("line 3".into())),
            (line("host", ed, 2) + &line("host", ed, 1), 22, Verdict::Good),
            (line("host", rsa, 1), 22, Verdict::OtherTypes(vec![rsa.into()])),
            (line("host", ed, 1) + "@revoked " + &line("*", ed, 1), 22, Verdict::Revoked("line 2".into())),
            ("@cert-authority ".to_owned() + &line("*", ed, 1), 22, Verdict::Unknown),
            (line("#host", ed, 1), 22, Verdict::Unknown),
            ("host ssh-ed25519 !!!\nhost\nhost x\n|1|x ssh-rsa AAAA\n".into(), 22, Verdict::Unknown),
            (String::new(), 22, Verdict::Unknown),
        ] {
            assert_eq!(verdict(&text, port, &shown), expected, "{text}");
        }
    }

    #[test]
    fn known_types_are_asked_for_first() {
        let known = |kind: &str| {
            let text = line("host", kind, 1);
            in_text(&text, Path::new("f"), "host")
        };
        let supported = ["ssh-ed25519", "ecdsa-sha2-nistp256", "rsa-sha2-512", "ssh-rsa"];
        let ask = |kind| preference(&known(kind), &supported).unwrap();
        assert_eq!(ask("ssh-rsa"), "rsa-sha2-512,ssh-rsa,ssh-ed25519,ecdsa-sha2-nistp256");
        assert_eq!(ask("ecdsa-sha2-nistp256"), "ecdsa-sha2-nistp256,ssh-ed25519,rsa-sha2-512,ssh-rsa");
        assert_eq!(preference(&known("ssh-dss"), &supported), None);
        assert_eq!(preference(&[], &supported), None);
    }

    #[test]
    fn a_fingerprint_is_the_one_ssh_keygen_shows() {
        // Of GitHub's published ed25519 host key.
        let key =
            STANDARD.decode("AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl").unwrap();
        assert_eq!(fingerprint(&key), "SHA256:+DiY3wvvV6TuJJhbpZisF/zLDA0zPMSvHdkr4UvCOqU");
        assert_eq!(key_type(&key).as_deref(), Some("ssh-ed25519"));
        assert_eq!(key_type(b"\xff\xff\xff\xffx"), None);
    }
}
