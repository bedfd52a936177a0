//! PROTOCOL.md names a test for what it says is done; those tests must be there.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

fn functions(dir: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).expect("the crate's own directory") {
        let path = entry.expect("the crate's own directory").path();
        if path.is_dir() {
            functions(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            let text = fs::read_to_string(&path).expect("the crate's own source");
            let names = text.lines().filter_map(|line| line.trim_start().strip_prefix("fn "));
            found.extend(names.filter_map(|rest| rest.split('(').next()).map(str::to_owned));
        }
    }
}

#[test]
fn every_test_named_in_the_table_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut there = BTreeSet::new();
    functions(&root.join("src"), &mut there);
    functions(&root.join("tests"), &mut there);
    // What the server does with it, where the crate is in its workspace.
    let server = root.join("../tests");
    if !server.is_dir() {
        return;
    }
    functions(&server, &mut there);
    let table = fs::read_to_string(root.join("PROTOCOL.md")).expect("PROTOCOL.md is beside Cargo.toml");
    let is_test = |name: &&str| {
        name.matches('_').count() >= 3 && name.chars().all(|c| c.is_ascii_lowercase() || c == '_')
    };
    let named: Vec<&str> = table.split('`').filter(is_test).collect();
    assert!(named.len() > 40, "found only {} names", named.len());
    let missing: Vec<&&str> = named.iter().filter(|name| !there.contains(**name)).collect();
    assert!(missing.is_empty(), "PROTOCOL.md names tests that are not there: {missing:?}");
}
