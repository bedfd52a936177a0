//! Which programs a test can use: the product's own binaries, and other people's tools.

use std::path::{Path, PathBuf};

/// Where Debian keeps commands that a user's PATH may not name.
const SYSTEM_DIRS: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// The full path of a tool, if it is installed.
pub fn find(tool: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(SYSTEM_DIRS.iter().map(PathBuf::from))
        .map(|dir| dir.join(tool))
        .find(|candidate| candidate.is_file())
}

/// Whether all `tools` are here. With one missing the caller returns: on a laptop the test prints SKIP, and where CI
/// is set it fails, so that a skipped test can't pass for a tested feature.
#[must_use]
pub fn need(tools: &[&str]) -> bool {
    let missing: Vec<_> = tools.iter().filter(|tool| find(tool).is_none()).collect();
    if missing.is_empty() {
        return true;
    }
    skip(&format!("missing {missing:?}; `make packages` names the package"))
}

/// Whether the test runs as root; otherwise skipped or failed as by [`need`].
#[must_use]
pub fn need_root() -> bool {
    rustix::process::geteuid().is_root() || skip("needs root (mounts, devices)")
}

fn skip(why: &str) -> bool {
    assert!(std::env::var_os("CI").is_none(), "{why}: CI runs every test");
    eprintln!("SKIP: {why}");
    false
}

/// Whether this is the long run (`make soak`).
pub fn soak() -> bool {
    std::env::var_os("HORCRUX_SOAK").is_some()
}

/// The server under test, as cargo names it to the tests of its own package.
pub fn horcrux_nbd() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_horcrux-nbd"))
}

/// The command line program, built from the package `tools` into the same directory as the server.
pub fn horcrux_cli() -> PathBuf {
    let path = horcrux_nbd().with_file_name("horcrux-cli");
    assert!(
        path.is_file(),
        "{} is not built: cargo builds a binary for its own package's tests alone; run `cargo build --workspace \
         --bins` first, as `make test` does",
        path.display()
    );
    path
}

/// The file `name` below `tests/`.
pub fn in_tests(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(name)
}
