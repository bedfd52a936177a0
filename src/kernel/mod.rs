//! The kernel's side of a volume: block devices of the nbd driver, and mounts of what is on them.
//!
//! Enters: sockets whose other ends are served, directories to mount on. Leaves: `/dev/nbdN`, mounts. Invariants: the process that serves a device does
//! not wait for it (`apart`); the driver itself chooses a free device, so nobody's is taken;
//! a device says whose it is (its backend identifier), so that it is found again after a crash without any record of ours.

pub mod apart;
pub mod device;
mod error;
pub mod filesystem;
mod freeze;
pub mod memory;
pub mod mount;
pub mod netlink;

pub use error::KernelError;
