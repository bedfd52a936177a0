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

#[test]
fn the_older_words_mean_the_same_and_sizes_out_of_bounds_are_usage_errors() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (src, repo) = (dir.path().join("src"), dir.path().join("repo"));
    std::fs::create_dir(&src).expect("a directory");
    std::fs::write(src.join("file"), vec![7; 300_000]).expect("a file");
    let make = |command: &str, more: &[&str]| {
        let mut cli = cli();
        cli.arg(command).args(more).arg("words").arg(&src).arg(&repo);
        run(&mut cli)
    };
    let said = make("generate", &["--chunksize", "1M", "--size", "64M"]).ok();
    assert!(said.starts_with("words: stored as "), "{said}");
    for part in [
        "  disk          64.0 MiB (ext4)\n",
        "  files         1 in 1 directories\n",
        "  read          293.0 KiB in ",
    ] {
        assert!(said.contains(part), "{said}");
    }
    for (command, option) in
        [("image-from-dir", "--block-size"), ("generate", "-s"), ("image-from-dir", "--chunksize")]
    {
        let said = make(command, &[option, "1M", "--size", "64M"]).ok();
        assert!(said.starts_with("words: unchanged, still "), "{command} {option}: {said}");
    }
    for wrong in ["512K", "2G", "3M", "x", ""] {
        let ran = make("image-from-dir", &["--block-size", wrong]);
        assert_eq!(ran.status.code(), Some(2), "{ran:?}");
        assert!(ran.stderr.contains("--block-size"), "{}", ran.stderr);
    }
    let ran = make("image-from-dir", &["--block-size", "3M"]);
    assert!(ran.stderr.contains("'3M' is not a power of two from 1M to 1G"), "{}", ran.stderr);
    // Before anything is read, not after.
    for (option, wrong, why) in [
        ("--author", "two\nlines", "an author is one line of at most 1024 bytes, without blanks around it"),
        ("--message", &*"x".repeat(65_537), "a message of 65537 bytes is longer than 65536"),
    ] {
        let ran = make("image-from-dir", &[option, wrong]);
        assert_eq!(ran.status.code(), Some(2), "{}", ran.stderr);
        assert!(ran.stderr.contains(why), "{}", ran.stderr);
    }
    let mut cli = cli();
    cli.arg("image-from-dir").arg("words").arg(&src).arg(&repo).env("HORCRUX_AUTHOR", "");
    run(&mut cli).ok();
}

#[test]
fn a_reader_of_the_summary_that_went_away_is_an_error_and_no_panic() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    std::fs::create_dir(dir.path().join("src")).expect("a directory");
    for (command, place) in [("image-from-dir", "src"), ("cache", "")] {
        let mut cli = cli();
        match command {
            "cache" => cli.args(["cache", "stat", "--state-dir"]).arg(dir.path()),
            _ => cli.args([command, "words"]).arg(dir.path().join(place)).arg(dir.path().join("repo")),
        };
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let ran = cli.stdout(writer).output().expect("the program runs");
        let said = String::from_utf8_lossy(&ran.stderr);
        assert_eq!(ran.status.code(), Some(1), "{command}: {said}");
        assert!(said.starts_with("error: can't print"), "{command}: {said}");
    }
}

#[test]
fn memory_does_not_grow_with_the_bytes() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    std::fs::create_dir(dir.path().join("src")).expect("a directory");
    // Twice what the image maker may take.
    let mut file = std::fs::File::create(dir.path().join("src/file")).expect("a file");
    for number in 0..512u64 {
        std::io::Write::write_all(&mut file, &harness::noise(number, 1 << 20)).expect("space");
    }
    let mut command = std::process::Command::new("/usr/bin/time");
    command.args(["-f", "%M"]).arg(cli().get_program());
    command.args(["image-from-dir", "big"]).arg(dir.path().join("src")).arg(dir.path().join("repo"));
    if !harness::need(&["time"]) {
        return;
    }
    let ran = run(&mut command);
    let peak = ran.stderr.lines().last().and_then(|line| line.parse::<u64>().ok()).expect("its peak in KiB");
    ran.ok();
    assert!(peak < 128 << 10, "{peak} KiB for 512 MiB");
}
