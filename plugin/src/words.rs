//! The words of Docker's volume plugin protocol (docs.docker.com, "Docker volume plugins"): what goes over the wire as JSON, both ways.
//!
//! Invariant: what a newer Docker says beyond this is passed over, not refused.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// `VolumeDriver.Create`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Create {
    /// The volume.
    pub name: String,
    /// The options, `docker volume create -o KEY=VALUE`.
    #[serde(default)]
    pub opts: Option<BTreeMap<String, String>>,
}

/// `Remove`, `Path` and `Get`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Named {
    /// The volume.
    pub name: String,
}

/// `Mount` and `Unmount`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Use {
    /// The volume.
    pub name: String,
    /// Who uses it: the same for one container's mount and unmount, and for what is copied in and out of it meanwhile.
    #[serde(rename = "ID", default)]
    pub id: String,
}

/// Every answer: what was asked for, or why not.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Answer {
    /// To `Plugin.Activate`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub implements: Option<[&'static str; 1]>,
    /// To `Capabilities`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capabilities: Option<Capabilities>,
    /// To `Mount` and `Path`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mountpoint: Option<String>,
    /// To `Get`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volume: Option<Volume>,
    /// To `List`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volumes: Option<Vec<Volume>>,
    /// Empty where all went well.
    pub err: String,
}

/// What the driver can.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Capabilities {
    /// `local`: a volume is this host's.
    pub scope: &'static str,
}

/// A volume as Docker sees it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// Where it is mounted; empty while it is not.
    pub mountpoint: String,
    /// When it was made, as RFC 3339 has it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub created_at: String,
    /// What `docker volume inspect` shows of it.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub status: BTreeMap<&'static str, serde_json::Value>,
}
