//! What can go wrong with a request to a device.

use crate::delta::DeltaError;
use crate::units::{ByteLen, ByteOffset};

use super::base::BaseError;

/// A request that failed; the device goes on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// It reaches past the end of the device.
    #[error("byte {end} is past the end of a device of {size} bytes")]
    OutOfRange {
        /// End of the request, exclusive.
        end: ByteOffset,
        /// Size of the device.
        size: ByteLen,
    },
    /// The device is read-only.
    #[error("the device is read-only")]
    ReadOnly,
    /// The connection it came over is gone, and its requests with it.
    #[error("the connection is gone")]
    Fenced,
    /// The delta failed.
    #[error(transparent)]
    Delta(#[from] DeltaError),
    /// The commit below could not be read.
    #[error(transparent)]
    Base(#[from] BaseError),
    /// A task of the server died or was stopped.
    #[error("the server stopped working on the request")]
    Stopped,
}

impl DeviceError {
    /// Whether it is for want of space.
    pub fn is_full(&self) -> bool {
        matches!(self, DeviceError::Delta(DeltaError::Full { .. } | DeltaError::Quota(_)))
    }
}
