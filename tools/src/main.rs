//! `horcrux-cli`: makes and versions images and volumes.

fn main() {}
