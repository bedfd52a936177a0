//! What went and what came may be one file under another name.
//!
//! Enters: changes. Leaves: fewer of them, some joined. A file is the same where its inode is: same number, same kind, made in the same moment and never freed between (the generation says so; where
//! nobody draws those, the content must be the same too). Else where its content is: same length, same bytes. Invariant: contents are read for at most [`MAX_READ`] bytes.

use std::collections::HashMap;

use super::super::ext4::{Ext4, Kind};
use super::{ByteLen, Comparison, FilesError, Found, Known, STEP, apart};

/// How much is read to find equal contents.
const MAX_READ: u64 = 256 << 20;

impl Comparison {
    /// Joins what was renamed.
    pub(super) async fn join_renames(&self, found: Vec<Found>) -> Result<Vec<Found>, FilesError> {
        let (mut gone, mut come, mut rest) = (Vec::new(), Vec::new(), Vec::new());
        for found in found {
            match (&found.old, &found.new) {
                (Some(_), None) => gone.push(found),
                (None, Some(_)) => come.push(found),
                _ => rest.push(found),
            }
        }
        if gone.is_empty() || come.is_empty() {
            return Ok([gone, come, rest].concat());
        }
        let sorting = move || {
            gone.sort_by(|one, other| one.path.cmp(&other.path));
            come.sort_by(|one, other| one.path.cmp(&other.path));
            (gone, come)
        };
        let (gone, come) = apart(sorting).await?;
        let mut gone: Vec<Option<Found>> = gone.into_iter().map(Some).collect();
        let mut come: Vec<Option<Found>> = come.into_iter().map(Some).collect();
        if self.aligned {
            self.by_inode(&mut gone, &mut come, &mut rest).await?;
        }
        self.by_content(&mut gone, &mut come, &mut rest).await?;
        rest.extend(gone.into_iter().chain(come).flatten());
        Ok(rest)
    }

    async fn by_inode(
        &self,
        gone: &mut [Option<Found>],
        come: &mut [Option<Found>],
        joined: &mut Vec<Found>,
    ) -> Result<(), FilesError> {
        let mut by_number: HashMap<u32, Vec<usize>> = HashMap::new();
        for (at, found) in gone.iter().enumerate().rev() {
            if let Some(Found { old: Some(old), .. }) = found {
                by_number.entry(old.number).or_default().push(at);
            }
        }
        for slot in come {
            let Some(new) = slot.as_ref().and_then(|found| found.new) else { continue };
            let Some(at) = by_number.get(&new.number).and_then(|list| list.last().copied()) else { continue };
            let Some(old) = gone[at].as_ref().and_then(|found| found.old) else { continue };
            let identity = |known: &Known| (known.kind, known.created, known.generation);
            if identity(&old) != identity(&new) {
                continue;
            }
            let (content, attributes) = if self.is_untouched(new.number) {
                (false, Vec::new())
            } else {
                self.differences(&self.old.inode(old.number).await?, &self.new.inode(new.number).await?)
                    .await?
            };
            if content && new.generation == 0 {
                continue;
            }
            if let Some(names) = by_number.get_mut(&new.number) {
                names.pop();
            }
            if let (Some(went), Some(came)) = (gone[at].take(), slot.take()) {
                joined.push(Found { old_path: Some(went.path), old: went.old, content, attributes, ..came });
            }
        }
        Ok(())
    }

    async fn by_content(
        &self,
        gone: &mut [Option<Found>],
        come: &mut [Option<Found>],
        joined: &mut Vec<Found>,
    ) -> Result<(), FilesError> {
        let file = |known: Option<Known>| {
            known.filter(|known| known.kind == Kind::File && known.size > 0 && !known.is_encrypted)
        };
        let mut by_size: HashMap<u64, Vec<usize>> = HashMap::new();
        for (at, found) in gone.iter().enumerate() {
            if let Some(old) = found.as_ref().and_then(|found| file(found.old)) {
                by_size.entry(old.size).or_default().push(at);
            }
        }
        let mut left = MAX_READ;
        // Of each file that went, what it held.
        let mut hashes: HashMap<usize, blake3::Hash> = HashMap::new();
        for slot in come {
            let Some(new) = slot.as_ref().and_then(|found| file(found.new)) else { continue };
            let Some(candidates) = by_size.get_mut(&new.size).filter(|list| !list.is_empty()) else {
                continue;
            };
            let unread = candidates.iter().filter(|at| !hashes.contains_key(at)).count() as u64;
            let cost = new.size.saturating_mul(unread + 1);
            if cost > left {
                continue;
            }
            left -= cost;
            let content = hash(&self.new, new).await?;
            for at in candidates.iter() {
                if let Some(old) = gone[*at].as_ref().and_then(|found| file(found.old))
                    && !hashes.contains_key(at)
                {
                    hashes.insert(*at, hash(&self.old, old).await?);
                }
            }
            let Some(position) = candidates.iter().position(|at| hashes.get(at) == Some(&content)) else {
                continue;
            };
            let at = candidates.remove(position);
            if let (Some(went), Some(came)) = (gone[at].take(), slot.take()) {
                let attributes = match (went.old, came.new) {
                    (Some(old), Some(new)) => {
                        let (old, new) =
                            (self.old.inode(old.number).await?, self.new.inode(new.number).await?);
                        self.attributes(&old, &new).await?
                    }
                    _ => Vec::new(),
                };
                joined.push(Found {
                    old_path: Some(went.path),
                    old: went.old,
                    content: false,
                    attributes,
                    ..came
                });
            }
        }
        Ok(())
    }
}

async fn hash(filesystem: &Ext4, known: Known) -> Result<blake3::Hash, FilesError> {
    let inode = filesystem.inode(known.number).await?;
    let layout = filesystem.layout(&inode).await?;
    let mut hasher = blake3::Hasher::new();
    let mut at = 0;
    while at < inode.size {
        let bytes = filesystem.read_file(&inode, &layout, at, ByteLen(STEP)).await?;
        hasher.update(&bytes);
        at += bytes.len() as u64;
    }
    Ok(hasher.finalize())
}
