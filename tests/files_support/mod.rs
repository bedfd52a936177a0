//! What the tests of files share: a repository with images of filesystems, the commands that look into them, and a walk to compare with.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::harness::{self, PATIENCE, Ran, cli, run};

/// A repository in a directory of its own.
pub struct Repo {
    dir: tempfile::TempDir,
}

impl Repo {
    pub fn new() -> Repo {
        Repo { dir: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn url(&self) -> PathBuf {
        self.path("repo")
    }

    /// A directory for a test's files.
    pub fn dir(&self, name: &str) -> PathBuf {
        let dir = self.path(name);
        fs::create_dir(&dir).unwrap();
        dir
    }

    /// The next version of an image from a directory.
    pub fn add_dir(&self, name: &str, dir: &Path) {
        run(cli().args(["image-from-dir", name]).arg(dir).arg(self.url())).ok();
    }

    /// The next version of an image from a raw file.
    pub fn add_file(&self, name: &str, file: &Path) {
        run(cli().args(["image-from-file", name]).arg(file).arg(self.url())).ok();
    }

    /// A command about a version.
    pub fn command(&self, verb: &str, name: &str) -> Command {
        let mut command = cli();
        command.arg(verb).arg("--access").arg(self.url()).arg(name);
        command
    }

    pub fn run(&self, verb: &str, name: &str, args: &[&str]) -> Ran {
        run(self.command(verb, name).args(args))
    }

    pub fn json(&self, verb: &str, name: &str, args: &[&str]) -> Vec<Value> {
        array(&self.run(verb, name, &[args, &["--json"]].concat()).ok())
    }

    /// What a command prints, to the byte.
    pub fn bytes(&self, verb: &str, name: &str, args: &[OsString]) -> Vec<u8> {
        bytes(self.command(verb, name).args(args))
    }
}

pub fn array(text: &str) -> Vec<Value> {
    match serde_json::from_str(text).unwrap() {
        Value::Array(items) => items,
        other => panic!("{other}"),
    }
}

/// What a command prints, to the byte.
pub fn bytes(command: &mut Command) -> Vec<u8> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut child = command.stdin(Stdio::null()).stdout(file.reopen().unwrap()).spawn().unwrap();
    let ended = harness::wait(&mut child, PATIENCE);
    if ended.is_none() {
        child.kill().unwrap();
    }
    assert!(ended.unwrap().success(), "{command:?}");
    fs::read(file.path()).unwrap()
}

/// The bytes of a path in JSON.
pub fn path_of(value: &Value) -> Vec<u8> {
    match value {
        Value::String(text) => text.clone().into_bytes(),
        other => {
            let hex = other["hex"].as_str().unwrap();
            (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
        }
    }
}

/// What a file is, for comparing two trees by looking at all of both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub kind: &'static str,
    pub mode: u32,
    pub owner: (u32, u32),
    pub size: u64,
    /// Hash of the content, target of the link, number of the device.
    pub content: String,
    pub xattrs: BTreeMap<OsString, Vec<u8>>,
}

/// Everything below a directory, and the directory itself, by path.
pub fn walk(root: &Path) -> BTreeMap<Vec<u8>, Seen> {
    let mut seen = BTreeMap::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(relative) = todo.pop() {
        let path = root.join(&relative);
        let meta = fs::symlink_metadata(&path).unwrap();
        let kind = meta.file_type();
        let (kind, content) = if kind.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|entry| relative.join(entry.unwrap().file_name())));
            ("directory", String::new())
        } else if kind.is_symlink() {
            ("link", format!("{:?}", fs::read_link(&path).unwrap()))
        } else if kind.is_file() {
            ("file", blake3::hash(&fs::read(&path).unwrap()).to_string())
        } else if kind.is_fifo() {
            ("fifo", String::new())
        } else if kind.is_socket() {
            ("socket", String::new())
        } else if kind.is_char_device() {
            ("char_device", meta.rdev().to_string())
        } else {
            ("block_device", meta.rdev().to_string())
        };
        let names = xattr::list(&path).unwrap();
        let xattrs = names.map(|name| (name.clone(), xattr::get(&path, name).unwrap().unwrap())).collect();
        let (mode, owner) = (meta.mode() & 0o7777, (meta.uid(), meta.gid()));
        let size = if kind == "file" || kind == "link" { meta.len() } else { 0 };
        seen.insert(relative.into_os_string().into_vec(), Seen { kind, mode, owner, size, content, xattrs });
    }
    seen
}

/// What became of which path, found by comparing all of both trees: letters as `diff` prints them.
pub fn brute_force(old: &BTreeMap<Vec<u8>, Seen>, new: &BTreeMap<Vec<u8>, Seen>) -> Vec<(char, Vec<u8>)> {
    let mut changes = Vec::new();
    for path in old.keys().chain(new.keys().filter(|path| !old.contains_key(*path))) {
        match (old.get(path), new.get(path)) {
            (None, _) => changes.push(('A', path.clone())),
            (_, None) => changes.push(('D', path.clone())),
            (Some(one), Some(other)) if one.kind != other.kind => {
                if one.kind == "directory" || other.kind == "directory" {
                    changes.push(('A', path.clone()));
                    changes.push(('D', path.clone()));
                } else {
                    changes.push(('T', path.clone()));
                }
            }
            (Some(one), Some(other)) if one.content != other.content => changes.push(('M', path.clone())),
            (Some(one), Some(other)) if one != other => changes.push(('P', path.clone())),
            _ => {}
        }
    }
    changes.sort_by(|one, other| (&one.1, one.0).cmp(&(&other.1, other.0)));
    changes
}

/// The same of what `diff --json` printed.
pub fn letters(changes: &[Value]) -> Vec<(char, Vec<u8>)> {
    let letter = |status: &str| match status {
        "added" => 'A',
        "removed" => 'D',
        "modified" => 'M',
        "renamed" => 'R',
        "type_changed" => 'T',
        "attributes" => 'P',
        other => panic!("{other}"),
    };
    let mut found: Vec<_> = changes
        .iter()
        .map(|change| (letter(change["status"].as_str().unwrap()), path_of(&change["path"])))
        .collect();
    found.sort_by(|one, other| (&one.1, one.0).cmp(&(&other.1, other.0)));
    found
}

/// For a message: the paths as text.
pub fn readable(changes: &[(char, Vec<u8>)]) -> Vec<String> {
    changes.iter().map(|(letter, path)| format!("{letter} {}", String::from_utf8_lossy(path))).collect()
}
