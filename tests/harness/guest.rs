//! Runs a guest script in User Mode Linux, a real kernel with nbd that needs nothing of the machine's own.
//!
//! In: a script of `tests/uml/guest` and its environment; out: its console. `tests/uml/run.sh` and `lib.sh` say what
//! the guest sees. Paths given to a guest must not lie under /run, /mnt or /dev: it has its own.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::{in_tests, need, run_within};

/// What run.sh adds to a guest's own bound: boot, the kill, the copy of the console.
const OVERHEAD: Duration = Duration::from_secs(30);

/// How much of a log is shown, in bytes.
const LOG_SHOWN: usize = 8192;

/// Whether a guest can be run here; skipped or failed as by [`need`].
#[must_use]
pub fn guests() -> bool {
    need(&["linux.uml", "busybox", "insmod", "nbd-client", "nbdinfo", "e2fsck", "setsid"])
}

/// One boot, or with [`Guest::power_cuts`] a series of them.
#[derive(Debug)]
pub struct Guest {
    args: Vec<OsString>,
    disks: Vec<PathBuf>,
    limit: Duration,
}

impl Guest {
    /// A guest with `serve` set up to start the server under test on `repository`, its state on tmpfs.
    pub fn serving(repository: &Path, name: &str, limit: Duration) -> Self {
        Self { args: Vec::new(), disks: Vec::new(), limit }
            .env("SERVER", "horcrux")
            .env("HORCRUX_NBD", env!("CARGO_BIN_EXE_horcrux-nbd"))
            .env("REPO", repository)
            .env("NAME", name)
    }

    /// A guest that serves nothing.
    pub fn running(limit: Duration) -> Self {
        Self { args: Vec::new(), disks: Vec::new(), limit }
    }

    /// Sets a variable of the guest script.
    #[must_use]
    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        let mut pair = OsString::from(format!("{key}="));
        pair.push(value);
        self.args.push("-e".into());
        self.args.push(pair);
        self
    }

    /// Gives the guest so much memory, as `640M`.
    #[must_use]
    pub fn memory(mut self, size: &str) -> Self {
        self.args.extend(["-m".into(), size.into()]);
        self
    }

    /// Gives the guest a raw image as its next disk, `/dev/ubda` and so on.
    #[must_use]
    pub fn disk(mut self, image: &Path) -> Self {
        self.disks.push(image.to_owned());
        self
    }

    /// Boots, runs `tests/uml/guest/SCRIPT`, and returns the console. Panics with it when the script fails.
    pub fn run(self, script: &str) -> String {
        let out = tempfile::tempdir().expect("a temporary directory");
        let mut command = Command::new(in_tests("uml/run.sh"));
        command.arg("-o").arg(out.path()).args(["-t", &self.limit.as_secs().to_string()]).args(&self.args);
        command.arg(in_tests("uml/guest").join(script)).args(&self.disks);
        self.finish(&mut command, out.path(), 1)
    }

    /// Cuts the power of a machine that writes to the volume `rounds` times, and checks after each that all that was
    /// flushed is there. `limit` is for one boot.
    pub fn power_cuts(self, rounds: u32) -> String {
        let out = tempfile::tempdir().expect("a temporary directory");
        let mut command = Command::new(in_tests("uml/powercut.sh"));
        command.arg("-o").arg(out.path()).args(["-r", &rounds.to_string()]).args(&self.args);
        self.finish(&mut command, out.path(), 2 * rounds)
    }

    fn finish(&self, command: &mut Command, out: &Path, boots: u32) -> String {
        let finished = run_within(command, (self.limit + OVERHEAD) * boots);
        let server = std::fs::read(out.join("server.log")).unwrap_or_default();
        assert!(
            finished.status.success(),
            "{command:?}: {}\n{}\n{}\nserver's log:\n{}",
            finished.status,
            end(&finished.stdout),
            end(&finished.stderr),
            end(&String::from_utf8_lossy(&server)),
        );
        let console = std::fs::read(out.join("console")).unwrap_or_default();
        finished.stdout + &String::from_utf8_lossy(&console)
    }
}

/// The last lines of a long text.
fn end(text: &str) -> &str {
    let start = text.len().saturating_sub(LOG_SHOWN);
    let start = (start..).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
    &text[start..]
}
