//! What the tests of the running server share: processes that end, servers, clients, images.
//!
//! Invariant: nothing a test starts outlives it, and nothing is waited for without an end.
#![allow(dead_code, unused_imports, clippy::unwrap_used)]

pub mod ceph;
mod client;
mod guest;
mod image;
pub mod proxy;
pub mod rclone;
mod server;
pub mod sshd;
mod tmpfs;
pub mod tree;
pub mod weed;
pub mod weed_cluster;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub use client::{Answer, Client, Reading};
pub use guest::{Guest, guests};
pub use image::{Image, PAGE, image_refused, images, noise};
pub use server::{Serve, Server};
pub use tmpfs::Tmpfs;

/// What a command may take unless a test says otherwise: an fsync on a disk that others keep busy can take a minute.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// Where Debian keeps commands that a user's PATH may not name.
const SYSTEM_DIRS: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];
const POLL: Duration = Duration::from_millis(5);

/// What a command printed, and how it ended.
#[derive(Debug)]
pub struct Ran {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// Standard output of a command that did well; else the test fails with all it printed.
    #[track_caller]
    pub fn ok(self) -> String {
        assert!(self.status.success(), "{}\n{}{}", self.status, self.stdout, self.stderr);
        self.stdout
    }

    /// Standard error of a command that failed with exit code 1.
    #[track_caller]
    pub fn refused(self) -> String {
        assert_eq!(self.status.code(), Some(1), "{}\n{}{}", self.status, self.stdout, self.stderr);
        self.stderr
    }
}

/// Runs a command to its end, or kills it after [`PATIENCE`] and fails.
#[track_caller]
pub fn run(command: &mut Command) -> Ran {
    run_within(command, PATIENCE)
}

/// Runs a command to its end, or kills it after `patience` and fails.
#[track_caller]
pub fn run_within(command: &mut Command, patience: Duration) -> Ran {
    let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = spawned.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let stdout = collect(child.stdout.take().unwrap());
    let stderr = collect(child.stderr.take().unwrap());
    let ended = wait(&mut child, patience);
    if ended.is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
    let (stdout, stderr) = (stdout.join().unwrap(), stderr.join().unwrap());
    let status = ended.unwrap_or_else(|| panic!("{command:?} took over {patience:?}\n{stdout}{stderr}"));
    Ran { status, stdout, stderr }
}

fn collect(mut from: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Waits for a process to end.
pub fn wait(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    let mut status = None;
    let ended = until(patience, || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    if ended { status } else { None }
}

/// Waits until something is so; `false` if it did not come about in time.
pub fn until(patience: Duration, mut is_so: impl FnMut() -> bool) -> bool {
    let started = Instant::now();
    loop {
        if is_so() {
            return true;
        }
        if started.elapsed() > patience {
            return false;
        }
        std::thread::sleep(POLL);
    }
}

/// Whether all of these programs are installed. Says so where one is not; in CI that is a failure.
pub fn need(tools: &[&str]) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs: Vec<PathBuf> = std::env::split_paths(&path).chain(SYSTEM_DIRS.map(PathBuf::from)).collect();
    let missing: Vec<_> =
        tools.iter().filter(|tool| !dirs.iter().any(|dir| dir.join(tool).is_file())).collect();
    can(missing.is_empty(), &format!("not installed: {missing:?}; `make packages` names the packages"))
}

/// Whether Debian's Python has this module. Says so where it has not; in CI that is a failure.
pub fn need_python(module: &str) -> bool {
    let import = format!("import {module}");
    let done = Command::new("/usr/bin/python3").args(["-c", &import]).stderr(Stdio::null()).status();
    can(
        done.is_ok_and(|status| status.success()),
        &format!("python3 has no {module}; `make packages` names the package"),
    )
}

/// nbdsh, with the Python its module is installed for, whatever Python comes first in PATH.
pub fn nbdsh() -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new("nbdsh");
    command.env("PATH", format!("/usr/bin:{path}"));
    command
}

/// Whether this is root. Says so where it is not; in CI that is a failure.
pub fn need_root(why: &str) -> bool {
    can(rustix::process::geteuid().is_root(), &format!("root is needed {why}"))
}

/// Whether a test can run. Says why not; in CI that is a failure.
pub fn can(possible: bool, reason: &str) -> bool {
    if !possible {
        assert!(std::env::var_os("CI").is_none(), "in CI this test must run: {reason}");
        eprintln!("SKIPPED: {reason}");
    }
    possible
}

/// The ends of the logs in a directory, for who must say why a server there did not come up.
pub fn log_ends(dir: &Path) -> String {
    let files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let logs = files.filter(|path| path.extension().is_some_and(|end| end == "log"));
    logs.map(|path| {
        let log = std::fs::read_to_string(&path).unwrap_or_default();
        let start = log.char_indices().rev().nth(1000).map_or(0, |(at, _)| at);
        format!("{}:\n{}\n", path.display(), &log[start..])
    })
    .collect()
}

/// Every file below a directory.
pub fn files_below(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    let below = entries.flat_map(|entry| match entry.file_type().unwrap() {
        kind if kind.is_dir() => files_below(&entry.path()),
        kind if kind.is_file() => vec![entry.path()],
        _ => Vec::new(),
    });
    below.collect()
}

/// A program that `make tools` fetches.
pub fn fetched(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/bin").join(name)
}

/// Where the newest PostgreSQL server installed keeps its programs.
pub fn newest_postgres() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let newest = versions.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()).max();
    let newest = newest.expect("pgbench is installed with a server: `make packages`");
    format!("/usr/lib/postgresql/{newest}/bin").into()
}

/// Whether the long form of a test is asked for.
pub fn soak() -> bool {
    std::env::var_os("HORCRUX_SOAK").is_some()
}

/// A number no two runs share, printed so that a failure can be run again with HORCRUX_SEED.
pub fn seed() -> u64 {
    let given = std::env::var("HORCRUX_SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(rand::random);
    eprintln!("HORCRUX_SEED={seed}");
    seed
}

/// The command line program: beside the server that cargo built for this test.
pub fn cli() -> Command {
    let path = Path::new(env!("CARGO_BIN_EXE_horcrux-nbd")).with_file_name("horcrux-cli");
    assert!(path.exists(), "{} is not built; run: cargo build --workspace --bins", path.display());
    Command::new(path)
}

/// What `horcrux-cli volume ARGS` does.
pub fn volume(state: &Path, args: &[&str]) -> Ran {
    run(cli().arg("volume").args(args).arg("--state-dir").arg(state))
}

/// The file `name` below `tests/`.
pub fn in_tests(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(name)
}
