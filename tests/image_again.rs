//! Making an image again: through the command, as users do.

use std::path::Path;

mod harness;

use harness::{cli, run};

fn make(dir: &Path, more: &[&str]) -> serde_json::Value {
    let mut cli = cli();
    cli.args(["image-from-dir", "--json"]).args(more);
    cli.arg("again").arg(dir.join("src")).arg(dir.join("repo"));
    serde_json::from_str(&run(&mut cli).ok()).expect("the summary is JSON")
}

#[test]
fn an_image_made_again_without_a_size_keeps_its_size_and_stores_nothing() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    std::fs::create_dir(dir.path().join("src")).expect("a directory");
    std::fs::write(dir.path().join("src/file"), vec![7; 300_000]).expect("a file");
    let first = make(dir.path(), &["--size", "3G"]);
    assert_eq!(first["device_bytes"], 3u64 << 30);
    let again = make(dir.path(), &[]);
    assert_eq!(again["device_bytes"], 3u64 << 30);
    assert_eq!((&again["unchanged"], &again["stored_bytes"]), (&true.into(), &0.into()));
    assert_eq!(again["commit"], first["commit"]);
    let smaller = make(dir.path(), &["--size", "1G"]);
    assert_eq!(smaller["device_bytes"], 1u64 << 30, "asked for, it shrinks");
}
