//! `volume.json`: what a volume is (FORMAT.md, "State directory").
//!
//! Invariant: it is replaced whole and durably; a version this build does not know is refused by its number.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::format::commit::MAX_DEVICE_SIZE;
use crate::format::{CommitId, ids};
use crate::repo::{Reference, Repository};
use crate::units::ByteLen;

use super::{Source, VolumeError, random_id};

/// Name of the record in a volume's directory.
pub const RECORD_FILE: &str = "volume.json";
const VERSION: u32 = 1;
/// A record is some hundred bytes and 5 for each layer.
const MAX_RECORD_LEN: u64 = 1 << 20;

/// What a volume is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeRecord {
    /// Names the volume; random.
    pub id: [u8; 16],
    /// The repository, as the user named it.
    pub access: String,
    /// The repository's own id.
    pub repository: String,
    /// The image.
    pub image: String,
    /// What the user asked for; `None` is the default branch.
    pub reference: Option<String>,
    /// What that was when the volume was made.
    pub commit: CommitId,
    /// Size of the device.
    pub size: ByteLen,
    /// Its layers, lowest first; the last one takes the writes. Never empty.
    pub layers: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct Json {
    version: u32,
    id: String,
    access: String,
    repository: String,
    image: String,
    #[serde(rename = "ref", skip_serializing_if = "Option::is_none")]
    reference: Option<String>,
    commit: String,
    size: u64,
    layers: Vec<String>,
}

#[derive(Deserialize)]
struct JustVersion {
    version: u32,
}

impl VolumeRecord {
    /// The record of a new volume.
    pub(super) fn new(
        source: &Source,
        repository: &Repository,
        commit: CommitId,
        size: ByteLen,
    ) -> VolumeRecord {
        VolumeRecord {
            id: random_id(),
            access: source.access.clone(),
            repository: ids::to_hex(&repository.id()),
            image: source.image.to_string(),
            reference: source.reference.as_ref().map(ToString::to_string),
            commit,
            size,
            layers: vec!["0001".to_owned()],
        }
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
            recorded: self.access.clone(),
            asked: source.access.clone(),
        })
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
        if self.commit == asked {
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

    fn encode(&self) -> String {
        let json = Json {
            version: VERSION,
            id: ids::to_hex(&self.id),
            access: self.access.clone(),
            repository: self.repository.clone(),
            image: self.image.clone(),
            reference: self.reference.clone(),
            commit: self.commit.to_string(),
            size: self.size.0,
            layers: self.layers.clone(),
        };
        let mut text = serde_json::to_string_pretty(&json).expect("strings and numbers have a JSON form");
        text.push('\n');
        text
    }

    fn decode(text: &[u8]) -> Result<VolumeRecord, String> {
        let JustVersion { version } = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        if version != VERSION {
            return Err(format!("volume record version {version}, this build reads {VERSION}..={VERSION}"));
        }
        let json: Json = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        let is_layer_name = |name: &String| name.len() == 4 && name.bytes().all(|byte| byte.is_ascii_digit());
        if json.layers.is_empty() || !json.layers.iter().all(is_layer_name) {
            return Err(format!("layers can't be {:?}", json.layers));
        }
        if json.size > MAX_DEVICE_SIZE.0 {
            return Err(format!("size can't be {}: a device has at most {MAX_DEVICE_SIZE} bytes", json.size));
        }
        Ok(VolumeRecord {
            id: ids::parse_hex(&json.id).ok_or_else(|| format!("id can't be {:?}", json.id))?,
            access: json.access,
            repository: json.repository,
            image: json.image,
            reference: json.reference,
            commit: json.commit.parse().map_err(|error: crate::format::FormatError| error.to_string())?,
            size: ByteLen(json.size),
            layers: json.layers,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> VolumeRecord {
        VolumeRecord {
            id: [5; 16],
            access: "/srv/repository".to_owned(),
            repository: "00".repeat(16),
            image: "AMCC".to_owned(),
            reference: Some("v1".to_owned()),
            commit: CommitId::of(b"commit"),
            size: ByteLen(1 << 30),
            layers: vec!["0001".to_owned(), "0002".to_owned()],
        }
    }

    #[test]
    fn a_record_survives() {
        assert_eq!(VolumeRecord::decode(record().encode().as_bytes()), Ok(record()));
    }

    #[test]
    fn a_newer_record_a_torn_one_and_a_layer_outside_are_refused() {
        let text = record().encode();
        let newer = text.replace("\"version\": 1", "\"version\": 7");
        assert_eq!(
            VolumeRecord::decode(newer.as_bytes()),
            Err("volume record version 7, this build reads 1..=1".to_owned())
        );
        assert!(VolumeRecord::decode(&text.as_bytes()[..text.len() / 2]).is_err());
        assert!(VolumeRecord::decode(text.replace("0002", "../x").as_bytes()).is_err());
        let huge = text.replace(&(1u64 << 30).to_string(), &u64::MAX.to_string());
        assert!(VolumeRecord::decode(huge.as_bytes()).unwrap_err().starts_with("size can't be"));
    }
}
