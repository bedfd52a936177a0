//! What a volume's record says of its past: its layers, commits that are being made, snapshots.
//!
//! Invariant: a layer that is named by its id may lie on any commit and be shared; one that is not was made for the record's commit and this volume, and says so itself.

use crate::format::delta::LayerId;
use crate::format::{CommitId, Timestamp};
use crate::units::ByteLen;

/// A layer, by its place below the volume's directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerRef {
    /// The directory's name: 4 to 8 digits.
    pub name: String,
    /// Which layer is in it; `None`: one that was made for the record's commit.
    pub id: Option<LayerId>,
    /// It has come to its end and is on the disk, whole: other volumes may share its files.
    pub sealed: bool,
}

/// A commit that was sealed and is not made yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pending {
    /// The last layer it has.
    pub upto: String,
    /// Why.
    pub message: String,
    /// Who.
    pub author: String,
    /// When it was sealed.
    pub time: Timestamp,
    /// It is made even where nothing differs.
    pub allow_empty: bool,
    /// It takes the place of the commit before it.
    pub amend: bool,
}

/// A state of the volume to come back to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its name.
    pub name: String,
    /// The commit its layers lie on.
    pub commit: CommitId,
    /// What was known to be in the repository.
    pub pushed: CommitId,
    /// The branch the volume was on.
    pub branch: Option<String>,
    /// Size of the device.
    pub size: ByteLen,
    /// Its layers, lowest first; all of them sealed.
    pub layers: Vec<LayerRef>,
    /// Commits that were being made.
    pub pending: Vec<Pending>,
    /// When, in seconds since 1970.
    pub created_s: u64,
}

impl LayerRef {
    /// The first layer of a new volume.
    pub fn first() -> LayerRef {
        LayerRef { name: "0001".to_owned(), id: None, sealed: false }
    }

    /// Whether this can be a layer's name.
    pub fn is_name(name: &str) -> bool {
        (4..=8).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_digit())
    }

    /// A name that comes after all of these.
    pub fn name_after<'l>(layers: impl Iterator<Item = &'l LayerRef>) -> String {
        let last = layers.filter_map(|layer| layer.name.parse::<u32>().ok()).max().unwrap_or(0);
        format!("{:04}", last + 1)
    }
}
