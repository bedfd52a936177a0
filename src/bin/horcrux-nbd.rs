//! `horcrux-nbd`: serves volumes as NBD exports.

fn main() {}
