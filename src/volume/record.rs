//! `volume.json`: what a volume is (FORMAT.md, "State directory").
//!
//! Invariant: it is replaced whole and durably; a version this build does not know is refused by its number.

use std::io;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::format::{CommitId, ids};
use crate::repo::{ImageName, Reference, Repository};
use crate::units::ByteLen;

use super::history::{LayerRef, Pending, Snapshot};
use super::{Prefetch, Source, VolumeError, random_id};

/// Name of the record in a volume's directory.
pub const RECORD_FILE: &str = "volume.json";
/// A record is some hundred bytes, and some more for each layer, snapshot and commit in the making.
const MAX_RECORD_LEN: u64 = 16 << 20;

/// What a volume is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeRecord {
    /// Names the volume; random.
    pub id: [u8; 16],
    /// Where the repository is, as the user named it: one place, or copies of it in several. Never empty.
    pub access: Vec<String>,
    /// The repository's own id.
    pub repository: String,
    /// The image.
    pub image: String,
    /// What the user asked for; `None` is the default branch.
    pub reference: Option<String>,
    /// The commit its layers lie on.
    pub commit: CommitId,
    /// The branch its commits go to; `None` for a volume of a tag, a commit or a version before a branch's tip.
    pub branch: Option<String>,
    /// The last commit of its history that is known to be in the repository.
    pub pushed: CommitId,
    /// Size of the device.
    pub size: ByteLen,
    /// The size the user asked for; `None` is the image's.
    pub asked_size: Option<ByteLen>,
    /// Whether writes are refused.
    pub read_only: bool,
    /// What is fetched before it is asked for.
    pub prefetch: Prefetch,
    /// How much its own writes may take; `None` is no limit but the disk's.
    pub quota: Option<ByteLen>,
    /// When it was made, in seconds since 1970; `None` in records of version 1.
    pub created_s: Option<u64>,
    /// The volume it was made from, where it is a clone.
    pub from: Option<String>,
    /// Its layers, lowest first; the last one takes the writes. Never empty.
    pub layers: Vec<LayerRef>,
    /// Commits that were sealed and are not made yet, the oldest first.
    pub pending: Vec<Pending>,
    /// States to come back to, the oldest first.
    pub snapshots: Vec<Snapshot>,
}

/// What the user asked of a volume when it was made.
pub(super) struct Wanted {
    pub access: Vec<String>,
    pub image: String,
    pub reference: Option<String>,
    pub size: Option<ByteLen>,
    pub read_only: bool,
    pub prefetch: Prefetch,
    pub quota: Option<ByteLen>,
    pub from: Option<String>,
}

impl VolumeRecord {
    /// The record of a new volume.
    pub(super) fn new(
        wanted: Wanted,
        repository: &Repository,
        commit: CommitId,
        branch: Option<String>,
        size: ByteLen,
    ) -> VolumeRecord {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        VolumeRecord {
            id: random_id(),
            access: wanted.access,
            repository: ids::to_hex(&repository.id()),
            image: wanted.image,
            reference: wanted.reference,
            commit,
            branch,
            pushed: commit,
            size,
            asked_size: wanted.size,
            read_only: wanted.read_only,
            prefetch: wanted.prefetch,
            quota: wanted.quota,
            created_s: now.ok().map(|since| since.as_secs()),
            from: wanted.from,
            layers: vec![LayerRef::first()],
            pending: Vec::new(),
            snapshots: Vec::new(),
        }
    }

    /// The first wish that is another one than this volume was made with: its option, what that is here, and what is asked for.
    pub(super) fn differs_from(&self, wanted: &Wanted) -> Option<(&'static str, String, String)> {
        let or = |text: Option<String>, none: &str| text.unwrap_or_else(|| none.to_owned());
        let size = |size: Option<ByteLen>, none: &str| or(size.map(|size| format!("{} bytes", size.0)), none);
        let main = Reference::default().to_string();
        let from = |from: &Option<String>| from.clone().unwrap_or_else(|| "none".to_owned());
        if wanted.from.is_some() || self.from.is_some() {
            // A clone has everything else of its source.
            let (has, asked) = (from(&self.from), from(&wanted.from));
            return (has != asked).then_some(("from", has, asked));
        }
        let all = [
            ("name", self.image.clone(), wanted.image.clone()),
            ("access", self.access.join(", "), wanted.access.join(", ")),
            ("version", or(self.reference.clone(), &main), or(wanted.reference.clone(), &main)),
            ("size", size(self.asked_size, "the image's"), size(wanted.size, "the image's")),
            ("ro", self.read_only.to_string(), wanted.read_only.to_string()),
            ("prefetch", self.prefetch.to_string(), wanted.prefetch.to_string()),
            ("quota", size(self.quota, "none"), size(wanted.quota, "none")),
        ];
        all.into_iter().find(|(_, has, asked)| has != asked)
    }

    /// The image's name; `dir` is where the record is.
    pub(super) fn image(&self, dir: &Path) -> Result<ImageName, VolumeError> {
        let problem = |error: crate::repo::RepoError| VolumeError::Record {
            path: dir.join(RECORD_FILE),
            problem: error.to_string(),
        };
        self.image.parse().map_err(problem)
    }

    /// Refuses a volume of another image: volumes may have names of their own.
    pub(super) fn check_image(&self, volume: &str, source: &Source) -> Result<(), VolumeError> {
        if self.image == source.image.as_str() {
            return Ok(());
        }
        Err(VolumeError::OtherImage { volume: volume.to_owned(), recorded: self.image.clone() })
    }

    /// Refuses a volume of another repository. The same repository may be named in another way.
    pub(super) fn check_repository(
        &self,
        volume: &str,
        source: &Source,
        repository: &Repository,
    ) -> Result<(), VolumeError> {
        if self.repository == ids::to_hex(&repository.id()) {
            return Ok(());
        }
        Err(VolumeError::OtherRepository {
            volume: volume.to_owned(),
            recorded: self.access.join(", "),
            asked: source.access.join(", "),
        })
    }

    /// The layers it needs, those of its snapshots too.
    pub(super) fn all_layers(&self) -> impl Iterator<Item = &LayerRef> {
        self.layers.iter().chain(self.snapshots.iter().flat_map(|snapshot| &snapshot.layers))
    }

    /// How many of its layers belong to commits that are being made.
    pub(super) fn committed_layers(&self) -> usize {
        let last = self.pending.last().map(|pending| &pending.upto);
        last.and_then(|upto| self.layers.iter().position(|layer| layer.name == *upto)).map_or(0, |at| at + 1)
    }

    /// Whether it has commits that are not known to be in the repository, made or in the making.
    pub fn has_unpushed(&self) -> bool {
        self.commit != self.pushed || !self.pending.is_empty()
    }

    /// What it is, for people.
    pub fn describe(&self) -> String {
        let commit = self.commit.to_string();
        format!("{} at {}, from {}", self.image, &commit[..12], self.access.join(", "))
    }

    /// The repository's id; `None` where the record has none that can be.
    pub fn repository_id(&self) -> Option<[u8; 16]> {
        ids::parse_hex(&self.repository)
    }

    /// Whether the volume was made of this reference.
    pub(super) fn is_of(&self, reference: &Reference) -> bool {
        self.reference.as_deref().unwrap_or(Reference::default().name()) == reference.to_string()
    }

    /// Refuses a volume of another version than the one asked for.
    pub(super) fn check_base(
        &self,
        volume: &str,
        reference: &Reference,
        asked: CommitId,
    ) -> Result<(), VolumeError> {
        // Its own commits come after what was asked for.
        if self.commit == asked || self.pushed == asked {
            return Ok(());
        }
        Err(VolumeError::OtherBase {
            volume: volume.to_owned(),
            recorded: self.commit,
            reference: reference.to_string(),
            asked,
        })
    }

    /// Reads the record in `dir`; `None` where there is none.
    pub fn load(dir: &Path) -> Result<Option<VolumeRecord>, VolumeError> {
        let path = dir.join(RECORD_FILE);
        let failed = |source| VolumeError::Io { action: "read", path: path.clone(), source };
        match std::fs::metadata(&path) {
            Ok(metadata) if metadata.len() > MAX_RECORD_LEN => {
                return Err(VolumeError::Record {
                    path,
                    problem: "far too long for a volume record".to_owned(),
                });
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        }
        let text = std::fs::read(&path).map_err(failed)?;
        Self::decode(&text).map(Some).map_err(|problem| VolumeError::Record { path, problem })
    }

    /// Writes the record in `dir`, durably.
    pub(super) fn store(&self, dir: &Path) -> Result<(), VolumeError> {
        let path = dir.join(RECORD_FILE);
        crate::durable::replace_file(&path, self.encode().as_bytes()).map_err(|source| VolumeError::Io {
            action: "write",
            path,
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Timestamp;
    use crate::format::delta::LayerId;

    fn record() -> VolumeRecord {
        VolumeRecord {
            id: [5; 16],
            access: vec!["/srv/repository".to_owned(), "s3://copy".to_owned()],
            repository: "00".repeat(16),
            image: "AMCC".to_owned(),
            reference: Some("v1".to_owned()),
            commit: CommitId::of(b"commit"),
            size: ByteLen(1 << 30),
            asked_size: Some(ByteLen(1 << 30)),
            read_only: true,
            prefetch: Prefetch::All,
            quota: Some(ByteLen(1 << 20)),
            created_s: Some(1_700_000_000),
            branch: Some("main".to_owned()),
            pushed: CommitId::of(b"pushed"),
            from: Some("v0".to_owned()),
            layers: vec![
                LayerRef { id: Some(LayerId([1; 16])), sealed: true, ..LayerRef::first() },
                LayerRef { name: "0002".to_owned(), id: None, sealed: false },
            ],
            pending: vec![Pending {
                upto: "0001".to_owned(),
                message: "a \"message\"\nof two lines".to_owned(),
                author: "me".to_owned(),
                time: Timestamp { secs: 1, nanos: 2 },
                allow_empty: true,
                amend: false,
            }],
            snapshots: vec![Snapshot {
                name: "before".to_owned(),
                commit: CommitId::of(b"commit"),
                pushed: CommitId::of(b"pushed"),
                branch: None,
                size: ByteLen(1 << 30),
                layers: vec![LayerRef { id: Some(LayerId([1; 16])), sealed: true, ..LayerRef::first() }],
                pending: Vec::new(),
                created_s: 1_700_000_000,
            }],
        }
    }

    #[test]
    fn a_record_survives() {
        assert_eq!(VolumeRecord::decode(record().encode().as_bytes()), Ok(record()));
    }

    #[test]
    fn layers_by_which_a_write_would_go_where_none_may_are_refused() {
        let refused = |change: &dyn Fn(&mut VolumeRecord)| {
            let mut bad = record();
            change(&mut bad);
            VolumeRecord::decode(bad.encode().as_bytes()).unwrap_err()
        };
        let no_top = |record: &mut VolumeRecord| {
            record.layers.pop();
        };
        assert_eq!(refused(&no_top), "the top layer can't be sealed: it takes the writes");
        let ends_at_top = |record: &mut VolumeRecord| record.pending[0].upto = "0002".to_owned();
        assert_eq!(refused(&ends_at_top), "a commit can't end with layer \"0002\", which is not sealed");
        let unsealed = |record: &mut VolumeRecord| record.layers[0].sealed = false;
        assert_eq!(refused(&unsealed), "a commit can't end with layer \"0001\", which is not sealed");
        let two = |record: &mut VolumeRecord| record.snapshots[0].layers[0].id = Some(LayerId([9; 16]));
        assert_eq!(refused(&two), "there can't be two layers 0001");
        let twice = |record: &mut VolumeRecord| record.layers.insert(0, record.layers[0].clone());
        assert_eq!(refused(&twice), "no layer can lie on itself");
        let taking = |record: &mut VolumeRecord| record.snapshots[0].layers[0].sealed = false;
        assert_eq!(refused(&taking), "snapshot before can't have layer 0001: it takes writes");
        // A kill came after a new layer was named, and before the one below was called sealed.
        let mut killed = record();
        killed.pending.clear();
        killed.snapshots.clear();
        killed.layers[0].sealed = false;
        assert_eq!(VolumeRecord::decode(killed.encode().as_bytes()), Ok(killed));
    }

    #[test]
    fn a_newer_record_a_torn_one_and_a_layer_outside_are_refused() {
        let text = record().encode();
        let newer = text.replace("\"version\": 3", "\"version\": 7");
        assert_eq!(
            VolumeRecord::decode(newer.as_bytes()),
            Err("volume record version 7, this build reads 1..=3".to_owned())
        );
        assert!(VolumeRecord::decode(&text.as_bytes()[..text.len() / 2]).is_err());
        assert!(VolumeRecord::decode(text.replace("0002", "../x").as_bytes()).is_err());
        assert!(
            VolumeRecord::decode(
                text.replace("\"/srv/repository\",", "").replace("\"s3://copy\"", "").as_bytes()
            )
            .is_err()
        );
        let huge = text.replace(&(1u64 << 30).to_string(), &u64::MAX.to_string());
        assert!(VolumeRecord::decode(huge.as_bytes()).unwrap_err().starts_with("size can't be"));
    }
}
