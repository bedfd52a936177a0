//! Horcrux: git for data volumes, on plain storage.
//!
//! The layers, each importing only what is below it (see ARCHITECTURE.md):
//! `control` (HTTP API) > `host` (the volumes here) > `nbd` (server shell) > `volume` > `device` > `delta`, `cache` > `repo` > `store` > `durable`, `format` > `units`;
//! `image` makes images and stands on `repo`.
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

pub mod cache;
pub mod control;
pub mod delta;
pub mod device;
pub mod durable;
pub mod files;
pub mod format;
pub mod host;
pub mod image;
pub mod kernel;
pub mod lock;
pub mod manual;
pub mod nbd;
pub mod repo;
pub mod store;
pub mod units;
pub mod volume;
