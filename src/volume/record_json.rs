//! The bytes of `volume.json`.
//!
//! Enters: a record, or bytes from a disk. Leaves: JSON, or a record whose sizes and names are allowed ones. Invariant: every version up to today's is read; today's is written.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::history::{LayerRef, Pending, Snapshot};
use super::record::VolumeRecord;
use super::{Prefetch, VolumeName};
use crate::format::commit::MAX_DEVICE_SIZE;
use crate::format::delta::LayerId;
use crate::format::{CommitId, FormatError, Timestamp, ids};
use crate::units::ByteLen;

const VERSION: u32 = 3;
const OLDEST: u32 = 1;

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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    branch: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pushed: Option<String>,
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    from: Option<String>,
    layers: Vec<LayerJson>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pending: Vec<PendingJson>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    snapshots: Vec<SnapshotJson>,
}

/// Version 1 has one place, version 2 a list of them.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Access {
    One(String),
    Several(Vec<String>),
}

/// Versions 1 and 2 have names alone; so has a layer of version 3 that was made for the record's commit.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum LayerJson {
    Name(String),
    Whole {
        name: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        id: Option<String>,
        #[serde(default)]
        sealed: bool,
    },
}

#[derive(Serialize, Deserialize)]
struct PendingJson {
    upto: String,
    message: String,
    author: String,
    time: TimeJson,
    #[serde(default)]
    allow_empty: bool,
    #[serde(default)]
    amend: bool,
}

#[derive(Serialize, Deserialize)]
struct TimeJson {
    secs: u64,
    nanos: u32,
}

#[derive(Serialize, Deserialize)]
struct SnapshotJson {
    name: String,
    commit: String,
    pushed: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    branch: Option<String>,
    size: u64,
    layers: Vec<LayerJson>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pending: Vec<PendingJson>,
    created: u64,
}

#[derive(Deserialize)]
struct JustVersion {
    version: u32,
}

impl VolumeRecord {
    pub(super) fn encode(&self) -> String {
        let json = Json {
            version: VERSION,
            id: ids::to_hex(&self.id),
            access: Access::Several(self.access.clone()),
            repository: self.repository.clone(),
            image: self.image.clone(),
            reference: self.reference.clone(),
            commit: self.commit.to_string(),
            branch: self.branch.clone(),
            pushed: Some(self.pushed.to_string()),
            size: self.size.0,
            asked_size: self.asked_size.map(|size| size.0),
            read_only: self.read_only,
            prefetch: self.prefetch,
            quota: self.quota.map(|quota| quota.0),
            created_s: self.created_s,
            from: self.from.clone(),
            layers: self.layers.iter().map(layer_json).collect(),
            pending: self.pending.iter().map(pending_json).collect(),
            snapshots: self.snapshots.iter().map(snapshot_json).collect(),
        };
        let mut text = serde_json::to_string_pretty(&json).expect("strings and numbers have a JSON form");
        text.push('\n');
        text
    }

    pub(super) fn decode(text: &[u8]) -> Result<VolumeRecord, String> {
        let JustVersion { version } = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        if !(OLDEST..=VERSION).contains(&version) {
            return Err(format!("volume record version {version}, this build reads {OLDEST}..={VERSION}"));
        }
        let json: Json = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        let access = match json.access {
            Access::One(place) => vec![place],
            Access::Several(places) => places,
        };
        if access.is_empty() {
            return Err("it has no place to access".to_owned());
        }
        let layers = layers_of(json.layers)?;
        if layers.is_empty() {
            return Err("layers can't be []".to_owned());
        }
        let commit = commit_of(&json.commit)?;
        let record = VolumeRecord {
            id: ids::parse_hex(&json.id).ok_or_else(|| format!("id can't be {:?}", json.id))?,
            access,
            repository: json.repository,
            image: json.image,
            // A branch is what most are made of; whether it is one is found out when that matters.
            branch: if version < 3 { branch_of(json.reference.as_deref()) } else { json.branch },
            reference: json.reference,
            commit,
            pushed: match json.pushed {
                Some(pushed) => commit_of(&pushed)?,
                None => commit,
            },
            size: size_of(json.size)?,
            asked_size: json.asked_size.map(ByteLen),
            read_only: json.read_only,
            prefetch: json.prefetch,
            quota: json.quota.map(ByteLen),
            created_s: json.created_s,
            from: json.from,
            pending: pending_of(json.pending, &layers)?,
            layers,
            snapshots: json.snapshots.into_iter().map(snapshot_of).collect::<Result<_, _>>()?,
        };
        record.check_layers()?;
        Ok(record)
    }

    /// Refuses layers by which a write would go where none may go. One below the top may not be called sealed yet: a kill came before that.
    fn check_layers(&self) -> Result<(), String> {
        let Some(top) = self.layers.last().filter(|top| !top.sealed) else {
            return Err("the top layer can't be sealed: it takes the writes".to_owned());
        };
        let mut ids = BTreeMap::new();
        for layer in self.all_layers() {
            if *ids.entry(layer.name.as_str()).or_insert(layer.id) != layer.id {
                return Err(format!("there can't be two layers {}", layer.name));
            }
        }
        if self.layers.iter().map(|layer| &layer.name).collect::<BTreeSet<_>>().len() < self.layers.len() {
            return Err("no layer can lie on itself".to_owned());
        }
        let unsealed = |layers: &[LayerRef], upto: &str| {
            !layers.iter().any(|layer| layer.sealed && layer.name == upto && layer.name != top.name)
        };
        if let Some(pending) = self.pending.iter().find(|pending| unsealed(&self.layers, &pending.upto)) {
            return Err(format!("a commit can't end with layer {:?}, which is not sealed", pending.upto));
        }
        for snapshot in &self.snapshots {
            let taking = snapshot.layers.iter().find(|layer| unsealed(&snapshot.layers, &layer.name));
            if let Some(layer) = taking {
                let (snapshot, layer) = (&snapshot.name, &layer.name);
                return Err(format!("snapshot {snapshot} can't have layer {layer}: it takes writes"));
            }
        }
        Ok(())
    }
}

fn branch_of(reference: Option<&str>) -> Option<String> {
    let named = reference.unwrap_or(crate::repo::names::DEFAULT_BRANCH);
    (!named.contains('~')).then(|| named.to_owned())
}

fn commit_of(text: &str) -> Result<CommitId, String> {
    text.parse().map_err(|error: FormatError| error.to_string())
}

fn size_of(size: u64) -> Result<ByteLen, String> {
    if size > MAX_DEVICE_SIZE.0 {
        return Err(format!("size can't be {size}: a device has at most {MAX_DEVICE_SIZE} bytes"));
    }
    Ok(ByteLen(size))
}

fn layer_json(layer: &LayerRef) -> LayerJson {
    match layer {
        LayerRef { name, id: None, sealed: false } => LayerJson::Name(name.clone()),
        LayerRef { name, id, sealed } => {
            LayerJson::Whole { name: name.clone(), id: id.map(|id| ids::to_hex(&id.0)), sealed: *sealed }
        }
    }
}

fn layers_of(layers: Vec<LayerJson>) -> Result<Vec<LayerRef>, String> {
    let layer = |json| {
        let (name, id, sealed) = match json {
            LayerJson::Name(name) => (name, None, false),
            LayerJson::Whole { name, id, sealed } => (name, id, sealed),
        };
        if !LayerRef::is_name(&name) {
            return Err(format!("layers can't be {name:?}"));
        }
        let id = match id {
            Some(id) => {
                Some(LayerId(ids::parse_hex(&id).ok_or_else(|| format!("layer id can't be {id:?}"))?))
            }
            None => None,
        };
        if sealed && id.is_none() {
            return Err(format!("layer {name} is sealed and has no id"));
        }
        Ok(LayerRef { name, id, sealed })
    };
    layers.into_iter().map(layer).collect()
}

fn pending_json(pending: &Pending) -> PendingJson {
    PendingJson {
        upto: pending.upto.clone(),
        message: pending.message.clone(),
        author: pending.author.clone(),
        time: TimeJson { secs: pending.time.secs, nanos: pending.time.nanos },
        allow_empty: pending.allow_empty,
        amend: pending.amend,
    }
}

/// Each has its last layer among these, in their order, and none the top.
fn pending_of(pending: Vec<PendingJson>, layers: &[LayerRef]) -> Result<Vec<Pending>, String> {
    let mut after = None;
    let checked = |json: PendingJson| {
        let at = layers.iter().position(|layer| layer.name == json.upto);
        if at.is_none() || at <= after {
            return Err(format!("a commit can't end with layer {:?}", json.upto));
        }
        after = at;
        let time = Timestamp { secs: json.time.secs, nanos: json.time.nanos };
        let PendingJson { upto, message, author, allow_empty, amend, .. } = json;
        Ok(Pending { upto, message, author, time, allow_empty, amend })
    };
    pending.into_iter().map(checked).collect()
}

fn snapshot_json(snapshot: &Snapshot) -> SnapshotJson {
    SnapshotJson {
        name: snapshot.name.clone(),
        commit: snapshot.commit.to_string(),
        pushed: snapshot.pushed.to_string(),
        branch: snapshot.branch.clone(),
        size: snapshot.size.0,
        layers: snapshot.layers.iter().map(layer_json).collect(),
        pending: snapshot.pending.iter().map(pending_json).collect(),
        created: snapshot.created_s,
    }
}

fn snapshot_of(json: SnapshotJson) -> Result<Snapshot, String> {
    let layers = layers_of(json.layers)?;
    json.name.parse::<VolumeName>().map_err(|error| error.to_string())?;
    Ok(Snapshot {
        name: json.name,
        commit: commit_of(&json.commit)?,
        pushed: commit_of(&json.pushed)?,
        branch: json.branch,
        size: size_of(json.size)?,
        pending: pending_of(json.pending, &layers)?,
        layers,
        created_s: json.created,
    })
}
