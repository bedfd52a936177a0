//! Listings: a directory tree as objects in order, the hidden names left out.
//!
//! Enters: prefixes. Leaves: objects and segments. Invariant: the order is that of the directory store (`dir.rs` walks the same way), links are not followed, and
//! names that can't be parts of keys are not seen.

use std::time::{Duration, SystemTime};

use super::super::dir::LOST_FOUND;
use super::super::{Key, KeyPrefix, Listed, Page, StoreError};
use super::files::{At, Done, join};
use super::wire::Code;
use crate::durable::TEMP_PREFIX;

/// An entry that can be a part of a key.
struct Entry {
    name: String,
    is_dir: bool,
    len: u64,
    modified: Option<SystemTime>,
}

impl At<'_> {
    fn entries(&mut self, dir: &[u8], shown: &str) -> Done<Vec<Entry>> {
        let listed = match self.link.sftp.entries(dir) {
            Ok(listed) => listed,
            Err(error) if error.is(Code::NoSuchFile) => {
                return match self.link.sftp.stat(&self.inner.place.path) {
                    Ok(_) => Ok(Vec::new()),
                    Err(error) if error.is(Code::NoSuchFile) => {
                        Err(StoreError::NoPlace { store: self.inner.name.clone() }.into())
                    }
                    Err(error) => Err(self.fail("list", shown, error)),
                };
            }
            Err(error) => return Err(self.fail("list", shown, error)),
        };
        let mut entries = Vec::with_capacity(listed.len());
        for (name, mut attrs) in listed {
            let Ok(name) = String::from_utf8(name.into()) else { continue };
            if name.contains('/') || Key::new(&name).is_err() {
                continue;
            }
            if attrs.mode.is_none() || attrs.len.is_none() {
                // A server that tells no attributes with the names.
                attrs = match self.link.sftp.lstat(&join(dir, &name)) {
                    Ok(attrs) => attrs,
                    Err(error) if error.is(Code::NoSuchFile) => continue,
                    Err(error) => return Err(self.fail("list", &name, error)),
                };
            }
            let (is_dir, is_file) = (attrs.is_dir() == Some(true), attrs.is_file() == Some(true));
            if is_dir || is_file {
                let modified =
                    attrs.modified.map(|secs| SystemTime::UNIX_EPOCH + Duration::from_secs(secs.into()));
                entries.push(Entry { name, is_dir, len: attrs.len.unwrap_or(0), modified });
            }
        }
        Ok(entries)
    }

    fn below(&mut self, above: &str) -> Done<Vec<Entry>> {
        let dir = match above.trim_end_matches('/') {
            "" => self.inner.place.path.clone(),
            below => join(&self.inner.place.path, below),
        };
        self.entries(&dir, above)
    }

    /// Appends the objects below `above`, in order, until there is one more than `limit`.
    fn walk(
        &mut self,
        above: &str,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
        out: &mut Vec<Listed>,
    ) -> Done<()> {
        let mut entries = self.below(above)?;
        for entry in &mut entries {
            entry.name.insert_str(0, above);
            if entry.is_dir {
                // With its slash a directory sorts where its objects do: "a-b" < "a/b" < "ab".
                entry.name.push('/');
            }
        }
        entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        for Entry { name, is_dir, len, modified } in entries {
            if out.len() > limit {
                break;
            }
            let inside = name.starts_with(prefix) || (is_dir && prefix.starts_with(&name));
            let passed =
                after.is_some_and(|after| name.as_str() <= after && !(is_dir && after.starts_with(&name)));
            if !inside || passed {
                continue;
            }
            // A path too long to be a key has no objects below it, and a server that makes them up without end is not followed.
            match Key::new(name.trim_end_matches('/')) {
                Ok(_) if is_dir => self.walk(&name, prefix, after, limit, out)?,
                Ok(key) => out.push(Listed { key, len, modified }),
                Err(_) => {}
            }
        }
        Ok(())
    }

    pub fn list(&mut self, prefix: &KeyPrefix, after: Option<&Key>, limit: usize) -> Done<Page<Listed>> {
        let mut items = Vec::new();
        let above = prefix.split().0.map_or(String::new(), |dir| format!("{dir}/"));
        self.walk(&above, prefix.as_str(), after.map(Key::as_str), limit, &mut items)?;
        let more = items.len() > limit;
        items.truncate(limit);
        Ok(Page { items, more })
    }

    pub fn children(&mut self, dir: &KeyPrefix, after: Option<&str>, limit: usize) -> Done<Page<String>> {
        let names = self.below(dir.as_str())?.into_iter().map(|entry| entry.name);
        let mut items: Vec<String> =
            names.filter(|name| after.is_none_or(|after| name.as_str() > after)).collect();
        items.sort_unstable();
        let more = items.len() > limit;
        items.truncate(limit);
        Ok(Page { items, more })
    }

    pub fn occupant(&mut self) -> Done<Option<String>> {
        let listed = match self.link.sftp.entries(&self.inner.place.path) {
            Ok(listed) => listed,
            Err(error) if error.is(Code::NoSuchFile) => return Ok(None),
            Err(error) => return Err(self.fail("list", ".", error)),
        };
        let mut names = listed.into_iter().map(|(name, _)| name);
        let found =
            names.find(|name| !name.starts_with(TEMP_PREFIX.as_bytes()) && name != LOST_FOUND.as_bytes());
        Ok(found.map(|name| super::error::words(&String::from_utf8_lossy(&name))))
    }
}
