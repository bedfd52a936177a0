//! `volume.json`: what a volume is (FORMAT.md, "State directory").
//!
//! Invariant: it is replaced whole and durably; a version this build does not know is refused by its number.

use std::io;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::format::commit::MAX_DEVICE_SIZE;
use crate::format::{CommitId, ids};
use crate::repo::{ImageName, Reference, Repository};
use crate::units::ByteLen;

use super::{Prefetch, Source, VolumeError, random_id};

/// Name of the record in a volume's directory.
pub const RECORD_FILE: &str = "volume.json";
const VERSION: u32 = 2;
const OLDEST: u32 = 1;
/// A record is some hundred bytes and 5 for each layer.
const MAX_RECORD_LEN: u64 = 1 << 20;

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
    /// What that was when the volume was made.
    pub commit: CommitId,
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
    /// Its layers, lowest first; the last one takes the writes. Never empty.
    pub layers: Vec<String>,
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
}

#[derive(Serialize, Deserialize)]
struct Json {
    version: u32,
    id: String,
    access: Access,
    repository: String,
    image: String,
    #[serde(rename = "ref", skip_serializing_if = "Option::is_none")]
    reference: Option<String>,
    commit: String,
    size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    asked_size: Option<u64>,
    #[serde(default)]
    read_only: bool,
    #[serde(default)]
    prefetch: Prefetch,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    quota: Option<u64>,
    #[serde(default, rename = "created", skip_serializing_if = "Option::is_none")]
    created_s: Option<u64>,
    layers: Vec<String>,
}

/// Version 1 has one place, version 2 a list of them.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Access {
    One(String),
    Several(Vec<String>),
}

#[derive(Deserialize)]
struct JustVersion {
    version: u32,
}

impl VolumeRecord {
    /// The record of a new volume.
    pub(super) fn new(
        wanted: Wanted,
        repository: &Repository,
        commit: CommitId,
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
            size,
            asked_size: wanted.size,
            read_only: wanted.read_only,
            prefetch: wanted.prefetch,
            quota: wanted.quota,
            created_s: now.ok().map(|since| since.as_secs()),
            layers: vec!["0001".to_owned()],
        }
    }

    /// The first wish that is another one than this volume was made with: its option, what that is here, and what is asked for.
    pub(super) fn differs_from(&self, wanted: &Wanted) -> Option<(&'static str, String, String)> {
        let or = |text: Option<String>, none: &str| text.unwrap_or_else(|| none.to_owned());
        let size = |size: Option<ByteLen>, none: &str| or(size.map(|size| format!("{} bytes", size.0)), none);
        let main = Reference::default().to_string();
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
            access: Access::Several(self.access.clone()),
            repository: self.repository.clone(),
            image: self.image.clone(),
            reference: self.reference.clone(),
            commit: self.commit.to_string(),
            size: self.size.0,
            asked_size: self.asked_size.map(|size| size.0),
            read_only: self.read_only,
            prefetch: self.prefetch,
            quota: self.quota.map(|quota| quota.0),
            created_s: self.created_s,
            layers: self.layers.clone(),
        };
        let mut text = serde_json::to_string_pretty(&json).expect("strings and numbers have a JSON form");
        text.push('\n');
        text
    }

    fn decode(text: &[u8]) -> Result<VolumeRecord, String> {
        let JustVersion { version } = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        if !(OLDEST..=VERSION).contains(&version) {
            return Err(format!("volume record version {version}, this build reads {OLDEST}..={VERSION}"));
        }
        let json: Json = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        let is_layer_name = |name: &String| name.len() == 4 && name.bytes().all(|byte| byte.is_ascii_digit());
        if json.layers.is_empty() || !json.layers.iter().all(is_layer_name) {
            return Err(format!("layers can't be {:?}", json.layers));
        }
        if json.size > MAX_DEVICE_SIZE.0 {
            return Err(format!("size can't be {}: a device has at most {MAX_DEVICE_SIZE} bytes", json.size));
        }
        let access = match json.access {
            Access::One(place) => vec![place],
            Access::Several(places) => places,
        };
        if access.is_empty() {
            return Err("it has no place to access".to_owned());
        }
        Ok(VolumeRecord {
            id: ids::parse_hex(&json.id).ok_or_else(|| format!("id can't be {:?}", json.id))?,
            access,
            repository: json.repository,
            image: json.image,
            reference: json.reference,
            commit: json.commit.parse().map_err(|error: crate::format::FormatError| error.to_string())?,
            size: ByteLen(json.size),
            asked_size: json.asked_size.map(ByteLen),
            read_only: json.read_only,
            prefetch: json.prefetch,
            quota: json.quota.map(ByteLen),
            created_s: json.created_s,
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
        let newer = text.replace("\"version\": 2", "\"version\": 7");
        assert_eq!(
            VolumeRecord::decode(newer.as_bytes()),
            Err("volume record version 7, this build reads 1..=2".to_owned())
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
