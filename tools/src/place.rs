//! The state directory a command works on, and the volumes in it.
//!
//! Enters: what the user gave. Leaves: paths and records. Takes no lock: a server may run there.

use std::path::PathBuf;

use horcrux::volume::{VolumeError, VolumeRecord, default_state_dir, volume_dir};

/// Where the state is.
#[derive(clap::Args)]
pub struct Place {
    /// Where volumes and cache are kept [default: /var/lib/horcrux for root, else $XDG_STATE_HOME/horcrux]
    #[arg(long, value_name = "DIR", env = "HORCRUX_STATE_DIR", global = true)]
    state_dir: Option<PathBuf>,
}

/// Why there is no such place.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    #[error("no state directory: neither --state-dir, HORCRUX_STATE_DIR, XDG_STATE_HOME nor HOME is set")]
    NoStateDir,
    #[error("there is no volume {volume} in {}", state_dir.display())]
    NoVolume { volume: String, state_dir: PathBuf },
    #[error(transparent)]
    Volume(#[from] VolumeError),
}

impl PlaceError {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            PlaceError::NoVolume { .. } => {
                Some("'horcrux-nbd serve' makes a volume; check --state-dir".to_owned())
            }
            _ => None,
        }
    }
}

/// A volume that is there.
pub struct Found {
    /// Its directory.
    pub dir: PathBuf,
    /// What it is.
    pub record: VolumeRecord,
}

impl Place {
    /// The state directory.
    pub fn state_dir(&self) -> Result<PathBuf, PlaceError> {
        self.state_dir.clone().or_else(default_state_dir).ok_or(PlaceError::NoStateDir)
    }

    /// A volume in it.
    pub fn volume(&self, volume: &str) -> Result<Found, PlaceError> {
        let state_dir = self.state_dir()?;
        let dir = volume_dir(&state_dir, volume);
        match VolumeRecord::load(&dir)? {
            Some(record) => Ok(Found { dir, record }),
            None => Err(PlaceError::NoVolume { volume: volume.to_owned(), state_dir }),
        }
    }
}
