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

#[test]
fn an_image_that_is_refused_leaves_no_repository_behind() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (src, repo) = (dir.path().join("src"), dir.path().join("repo"));
    let refused = |more: &[&str]| {
        let mut cli = cli();
        let said = run(cli.arg("image-from-dir").args(more).arg("again").arg(&src).arg(&repo)).refused();
        assert!(!repo.exists(), "{said}");
        said
    };
    let src_shown = src.display();
    assert_eq!(refused(&[]), format!("error: {src_shown}: No such file or directory (os error 2)\n"));
    std::fs::create_dir(&src).expect("a directory");
    std::fs::write(src.join("file"), vec![7; 30_000_000]).expect("a file");
    let said = refused(&["--size", "16M"]);
    assert_eq!(
        said,
        "error: the directory needs a device of 36700160 bytes, the size given is 16777216; hint: --size 35M or more\n"
    );
}
