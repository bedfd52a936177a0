//! Runs a command to its end within a bound. In: a `Command`; out: status and output. On a timeout or (with
//! [`run_ok`]) a failure the panic shows the command and what it printed.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

/// How often a waiting loop looks again.
pub const POLL: Duration = Duration::from_millis(10);
/// A panic message shows this much of each stream's end.
const SHOWN_BYTES: usize = 16 << 10;

/// What a finished command left behind.
#[derive(Debug)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// All of its standard output; bytes that are not UTF-8 are replaced.
    pub stdout: String,
    /// All of its standard error.
    pub stderr: String,
}

impl Finished {
    /// The exit code, or 128 + signal as a shell reports it.
    pub fn code(&self) -> i32 {
        use std::os::unix::process::ExitStatusExt;
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }
}

/// Runs `command` to its end, whatever its status. Panics when it can't start or outlives `limit`.
///
/// The command gets a process group of its own, so that a timeout takes its children too; its output goes through
/// files, so that a grandchild which keeps a pipe open can't hold the test.
pub fn run(command: &mut Command, limit: Duration) -> Finished {
    let mut out = tempfile::tempfile().expect("a temporary file for stdout");
    let mut err = tempfile::tempfile().expect("a temporary file for stderr");
    let shown = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(out.try_clone().expect("a duplicate descriptor"))
        .stderr(err.try_clone().expect("a duplicate descriptor"))
        .process_group(0)
        .spawn()
        .unwrap_or_else(|error| panic!("{shown}: {error}"));
    let status = match wait(&mut child, limit) {
        Some(status) => status,
        None => {
            kill_group(&child);
            let _ = child.wait();
            let (stdout, stderr) = (read_back(&mut out), read_back(&mut err));
            panic!(
                "{shown}: still running after {limit:?}\nstdout:\n{}\nstderr:\n{}",
                end(&stdout),
                end(&stderr)
            );
        }
    };
    Finished { status, stdout: read_back(&mut out), stderr: read_back(&mut err) }
}

/// [`run`], and the command must succeed. Returns its standard output.
pub fn run_ok(command: &mut Command, limit: Duration) -> String {
    let finished = run(command, limit);
    assert!(
        finished.status.success(),
        "{command:?}: {}\nstdout:\n{}\nstderr:\n{}",
        finished.status,
        end(&finished.stdout),
        end(&finished.stderr),
    );
    finished.stdout
}

/// Polls `child` until it ends or `limit` is over.
pub fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().expect("a child of this process can be waited for") {
            return Some(status);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(POLL);
    }
}

/// Kills the process group that `child` leads.
fn kill_group(child: &Child) {
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // It may be gone already; then there is nothing to kill.
        let _ = kill_process_group(pid, Signal::KILL);
    }
}

fn read_back(file: &mut File) -> String {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0)).expect("a temporary file can be rewound");
    file.read_to_end(&mut bytes).expect("a temporary file can be read");
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The last part of `text`, cut at a character.
pub fn end(text: &str) -> &str {
    let mut from = text.len().saturating_sub(SHOWN_BYTES);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    &text[from..]
}
