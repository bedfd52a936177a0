//! Directory trees with everything a data directory can hold, and their comparison, through `tests/tree.py`.

use std::path::Path;
use std::process::Command;

use super::{in_tests, run};

/// Debian's own python3, which has libnbd's bindings, whatever else a PATH puts first.
pub fn python() -> Command {
    Command::new("/usr/bin/python3")
}

/// Makes a tree of about `mb` MiB in `dir`, which is created; the same seed gives the same tree.
pub fn make(dir: &Path, mb: u32, seed: u64) {
    let (mb, seed) = (mb.to_string(), seed.to_string());
    run(python().arg(in_tests("tree.py")).arg("make").arg(dir).args(["--mb", &mb, "--seed", &seed])).ok();
}

/// Writes the manifest of `dir` to `to`: one line per entry, with owner, mode, times, xattrs and content hash.
pub fn manifest(dir: &Path, to: &Path) {
    let lines = run(python().arg(in_tests("tree.py")).arg("list").arg(dir)).ok();
    std::fs::write(to, lines).unwrap_or_else(|error| panic!("{}: {error}", to.display()));
}

/// Panics with the differences unless `copy` is `source` in all that a manifest holds.
pub fn assert_same(source: &Path, copy: &Path) {
    run(python().arg(in_tests("tree.py")).arg("compare").arg(source).arg(copy)).ok();
}
