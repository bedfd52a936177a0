//! The fuzz targets on seeded random bytes. An input that a fuzzer breaks one with becomes a test by its name in `hostile.rs`.

mod support;

use support::{Rng, targets};

fn run(name: &str, rounds: u64, longest: u64, target: fn(&[u8])) {
    let first = std::env::var("NBD_PROTO_SEED").ok().and_then(|s| s.parse().ok());
    let seeds = first.map_or(0..rounds, |seed| seed..seed + 1);
    for seed in seeds {
        let mut rng = Rng::new(seed);
        let len = rng.next() % longest;
        let data = rng.bytes(len as usize);
        let result = std::panic::catch_unwind(|| target(&data));
        assert!(result.is_ok(), "{name} broke: run again with NBD_PROTO_SEED={seed}");
    }
}

#[test]
fn random_bytes_never_break_a_handshake() {
    run("handshake", 20_000, 400, targets::handshake);
}

#[test]
fn random_bytes_never_break_a_transmission() {
    run("requests", 20_000, 400, targets::requests);
}

#[test]
fn random_sessions_read_what_was_written_however_they_are_cut() {
    run("session", 5_000, 600, targets::session);
}
