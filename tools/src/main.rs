//! `horcrux-cli`: makes and versions images and volumes.
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

fn main() {}
