//! Horcrux: git for data volumes, on plain storage.
//!
//! The layers, each importing only what is below it (see ARCHITECTURE.md):
//! `nbd` (server shell) > `volume` > `device` > `delta`, `cache` > `repo` > `store` > `format` > `units`;
//! `image` makes images and stands on `repo`.

pub mod image;
pub mod units;
