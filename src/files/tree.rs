//! Paths: found, followed, walked.
//!
//! Enters: paths as users write them. Leaves: inodes. Invariants: `..` ends at the root; a link is followed [`MAX_LINKS`] times at most; a walk visits each directory once, and one that is in two places
//! is damage, so no walk goes round in circles.

use std::collections::HashSet;
use std::fmt::{self, Write};

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::ext4::{DirEntry, Ext4, Inode, Kind, MAX_DIR_BYTES, ROOT};
use super::{FilesError, apart};

/// Symbolic links one path may lead through; as the kernel.
pub const MAX_LINKS: usize = 40;
/// The longest path of a file that is walked to: nothing makes such, but damage may.
pub const MAX_PATH_BYTES: usize = 16 << 10;
/// The directories on the way to a file are in memory: so large they are together at most.
const MAX_OPEN_BYTES: u64 = 2 * MAX_DIR_BYTES;

/// A path inside a filesystem, from its root, without a `/` in front. Bytes: nothing says that it is text. Shown with what a terminal would obey as escapes.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FilePath(Vec<u8>);

impl FilePath {
    /// A path as a user writes it: `/` in front and behind do not count.
    pub fn new(path: &[u8]) -> FilePath {
        let mut components = Vec::new();
        for component in path.split(|byte| *byte == b'/') {
            if !component.is_empty() && component != b"." {
                components.push(component);
            }
        }
        FilePath(components.join(&b'/'))
    }

    /// Bytes as they are: where a link leads.
    pub fn verbatim(bytes: &[u8]) -> FilePath {
        FilePath(bytes.to_vec())
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether it is the root.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The last name; of the root nothing.
    pub fn name(&self) -> &[u8] {
        let start = self.0.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
        &self.0[start..]
    }

    /// The path of something in this directory.
    pub fn join(&self, name: &[u8]) -> FilePath {
        let mut path = Vec::with_capacity(self.0.len() + 1 + name.len());
        path.extend_from_slice(&self.0);
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        FilePath(path)
    }

    /// The path from a directory above, that is not itself.
    pub fn below<'p>(&'p self, dir: &FilePath) -> &'p [u8] {
        if dir.is_root() {
            return &self.0;
        }
        self.0.strip_prefix(dir.as_bytes()).and_then(|rest| rest.strip_prefix(b"/")).unwrap_or(&[])
    }
}

impl fmt::Display for FilePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_root() { f.write_str("/") } else { f.write_str(&shown(&self.0)) }
    }
}

impl Serialize for FilePath {
    /// A string; where the path is no text, an object with its bytes in `hex`.
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match std::str::from_utf8(&self.0) {
            Ok(text) => to.serialize_str(text),
            Err(_) => Written::Bytes { hex: crate::format::ids::to_hex(&self.0) }.serialize(to),
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Written {
    Text(String),
    Bytes { hex: String },
}

impl<'de> Deserialize<'de> for FilePath {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<FilePath, D::Error> {
        match Written::deserialize(from)? {
            Written::Text(text) => Ok(FilePath(text.into_bytes())),
            Written::Bytes { hex } => {
                let digits = hex.as_bytes().as_chunks::<2>();
                let byte = |pair: &[u8; 2]| {
                    let digits = pair.iter().all(u8::is_ascii_hexdigit);
                    let text = std::str::from_utf8(pair).ok().filter(|_| digits)?;
                    u8::from_str_radix(text, 16).ok()
                };
                let bytes: Option<Vec<u8>> = digits.0.iter().map(byte).collect();
                let bytes = bytes.filter(|_| digits.1.is_empty());
                Ok(FilePath(bytes.ok_or_else(|| serde::de::Error::custom("'hex' is not hexadecimal"))?))
            }
        }
    }
}

/// A name for people: as it is, or in quotes with escapes where a terminal would obey it or it is no text. As git shows names.
pub fn shown(name: &[u8]) -> String {
    let obeyed = |c: char| {
        c.is_control()
            || matches!(c, '"' | '\\' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2028}' | '\u{2029}' | '\u{2066}'..='\u{2069}')
    };
    if let Ok(text) = std::str::from_utf8(name)
        && !text.chars().any(obeyed)
    {
        return text.to_owned();
    }
    let mut quoted = String::from("\"");
    for chunk in name.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '"' => quoted.push_str("\\\""),
                '\\' => quoted.push_str("\\\\"),
                '\n' => quoted.push_str("\\n"),
                '\t' => quoted.push_str("\\t"),
                '\r' => quoted.push_str("\\r"),
                c if obeyed(c) => {
                    for byte in c.encode_utf8(&mut [0; 4]).bytes() {
                        octal(&mut quoted, byte);
                    }
                }
                c => quoted.push(c),
            }
        }
        for byte in chunk.invalid() {
            octal(&mut quoted, *byte);
        }
    }
    quoted.push('"');
    quoted
}

fn octal(to: &mut String, byte: u8) {
    // Writing to a string can't fail.
    let _ = write!(to, "\\{byte:03o}");
}

impl Ext4 {
    /// What has this path. Links on the way are followed, one at its end if asked for.
    pub async fn find(&self, path: &FilePath, follow: bool) -> Result<Inode, FilesError> {
        // The directories from the root on, each with the path it is really at.
        let mut way = vec![(FilePath::default(), self.inode(ROOT).await?)];
        // From the last to the first: what is next is at the end.
        let mut names: Vec<Bytes> = split(path.as_bytes());
        let mut links = 0;
        while let Some(name) = names.pop() {
            let (walked, dir) = way.last().expect("the root stays");
            if dir.kind != Kind::Directory {
                return Err(FilesError::NotADirectory { path: walked.clone() });
            }
            if *name == b".."[..] {
                way.truncate(way.len().saturating_sub(1).max(1));
                continue;
            }
            let walked = walked.join(&name);
            let layout = self.layout(dir).await?;
            let entries = self.read_dir(dir, &layout).await?;
            let found = entries.into_iter().find(|entry| entry.name == name);
            let found = found.ok_or_else(|| FilesError::NotFound { path: walked.clone() })?;
            let inode = self.inode(found.inode).await?;
            if inode.kind == Kind::Link && (follow || !names.is_empty()) {
                if inode.is_encrypted() {
                    return Err(FilesError::Encrypted { path: walked });
                }
                links += 1;
                if links > MAX_LINKS {
                    return Err(FilesError::TooManyLinks { path: path.clone() });
                }
                let target = self.link_target(&inode).await?;
                if target.first() == Some(&b'/') {
                    way.truncate(1);
                }
                names.extend(split(&target));
                continue;
            }
            way.push((walked, inode));
        }
        Ok(way.pop().expect("the root stays").1)
    }

    /// A directory's entries by name. A name that is there twice is damage: in an archive the second one would go through the first.
    pub async fn sorted_dir(&self, inode: &Inode) -> Result<Vec<DirEntry>, FilesError> {
        const FEW_BLOCKS: u64 = 1000;
        let layout = self.layout(inode).await?;
        let mut entries = self.read_dir(inode, &layout).await?;
        let sorted = move || {
            entries.sort_unstable_by(|one, other| one.name.cmp(&other.name));
            let is_twice = entries.windows(2).any(|pair| pair[0].name == pair[1].name);
            (entries, is_twice)
        };
        let (entries, is_twice) = if layout.blocks() > FEW_BLOCKS { apart(sorted).await? } else { sorted() };
        if is_twice {
            return Err(FilesError::damaged(format!("directory {}", inode.number), "it has a name twice"));
        }
        Ok(entries)
    }
}

fn split(path: &[u8]) -> Vec<Bytes> {
    let names = path.split(|byte| *byte == b'/').filter(|name| !name.is_empty() && *name != b".");
    let mut names: Vec<Bytes> = names.map(Bytes::copy_from_slice).collect();
    names.reverse();
    names
}

/// Directories that were visited: none is visited twice.
#[derive(Debug, Default)]
pub(super) struct Visited(HashSet<u32>);

impl Visited {
    pub(super) fn visit(&mut self, directory: u32) -> Result<(), FilesError> {
        if self.0.insert(directory) {
            return Ok(());
        }
        Err(FilesError::damaged(format!("directory {directory}"), "it is in more than one place"))
    }
}

/// Everything below a directory, parents first, by name.
#[derive(Debug)]
pub struct Walk<'f> {
    filesystem: &'f Ext4,
    /// What is still to come of each directory on the way, the next at the end; and how large the directory is.
    open: Vec<(FilePath, Vec<DirEntry>, u64)>,
    /// The sizes of these together.
    bytes: u64,
    visited: Visited,
}

impl<'f> Walk<'f> {
    /// A walk below `dir`, which is at `path`. The directory itself is not in it.
    pub async fn new(filesystem: &'f Ext4, path: FilePath, dir: &Inode) -> Result<Walk<'f>, FilesError> {
        let mut walk = Walk { filesystem, open: Vec::new(), bytes: 0, visited: Visited::default() };
        walk.enter(path, dir).await?;
        Ok(walk)
    }

    async fn enter(&mut self, path: FilePath, dir: &Inode) -> Result<(), FilesError> {
        self.visited.visit(dir.number)?;
        self.bytes = self.bytes.saturating_add(dir.size);
        if self.bytes > MAX_OPEN_BYTES {
            return Err(FilesError::damaged("the tree of directories", "too much of it is open at once"));
        }
        let mut entries = self.filesystem.sorted_dir(dir).await?;
        entries.reverse();
        self.open.push((path, entries, dir.size));
        Ok(())
    }

    /// What comes next.
    pub async fn next(&mut self) -> Result<Option<(FilePath, Inode)>, FilesError> {
        while let Some((dir, entries, bytes)) = self.open.last_mut() {
            let Some(entry) = entries.pop() else {
                self.bytes = self.bytes.saturating_sub(*bytes);
                self.open.pop();
                continue;
            };
            let path = dir.join(&entry.name);
            if path.as_bytes().len() > MAX_PATH_BYTES {
                return Err(FilesError::damaged("the tree of directories", "it is too deep"));
            }
            let inode = self.filesystem.inode(entry.inode).await?;
            if inode.kind == Kind::Directory {
                self.enter(path.clone(), &inode).await?;
            }
            return Ok(Some((path, inode)));
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_a_terminal_would_obey_are_shown_in_quotes() {
        for (name, expected) in [
            (&b"plain name"[..], "plain name"),
            ("日本語 ü".as_bytes(), "日本語 ü"),
            (b"a\x1b[31mred", "\"a\\033[31mred\""),
            (b"new\nline\t\"q\" \\", "\"new\\nline\\t\\\"q\\\" \\\\\""),
            (b"\xff\xfe", "\"\\377\\376\""),
            ("\u{202e}evil".as_bytes(), "\"\\342\\200\\256evil\""),
            ("\u{9b}31m".as_bytes(), "\"\\302\\23331m\""),
        ] {
            assert_eq!(shown(name), expected);
        }
    }

    #[test]
    fn a_path_is_the_same_however_its_slashes_are() {
        for text in ["a/b", "/a/b", "a//b/", "./a/./b"] {
            assert_eq!(FilePath::new(text.as_bytes()).as_bytes(), b"a/b", "{text}");
        }
        let path = FilePath::new(b"a/b");
        assert_eq!(
            (path.name(), path.below(&FilePath::new(b"a")), path.below(&FilePath::default())),
            (&b"b"[..], &b"b"[..], &b"a/b"[..])
        );
    }

    #[test]
    fn any_path_survives_json() {
        for bytes in [&b"plain"[..], b"\xff/\x00x", b"", "ü".as_bytes()] {
            let path = FilePath(bytes.to_vec());
            let text = serde_json::to_string(&path).unwrap();
            assert_eq!(serde_json::from_str::<FilePath>(&text).unwrap(), path, "{text}");
        }
        assert!(serde_json::from_str::<FilePath>(r#"{"hex":"0"}"#).is_err());
        assert!(serde_json::from_str::<FilePath>(r#"{"hex":"+1"}"#).is_err());
    }
}
