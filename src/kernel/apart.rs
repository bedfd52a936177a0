//! What waits for a device, done by another process: mounting, unmounting, flushing.
//!
//! Enters: a task, which is done by this same program, started anew. Leaves: what came of it. Invariant: the process that serves a device never waits in the kernel for that device. Killed while it did, it
//! could not end: the thread that waits can't be woken, and would hold open the very sockets whose end the device must see before another server can answer it. The other process has no
//! descriptor of this one.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use super::filesystem::Kind;
use super::{KernelError, device, mount};

/// What this program is started with to do a task: this word, and the task.
pub const WORD: &str = "apart";
/// This same program, though its file was replaced meanwhile.
const PROGRAM: &str = "/proc/self/exe";

/// How long somebody else may have a device that is mounted nowhere; how often it is tried.
const OTHERS_END: Duration = Duration::from_secs(5);
const OTHERS_LOOK: Duration = Duration::from_millis(100);

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Task {
    Mount { device: PathBuf, kind: Kind, dir: PathBuf, read_only: bool },
    Unmount { dir: PathBuf },
    Flush { index: u32 },
    Sync { dir: PathBuf },
}

/// What the other process says, in one line: for a mount nothing, else whether there was something to do it to.
type Answer = Result<bool, KernelError>;

/// Mounts a device on a directory.
pub async fn mount_device(
    device: PathBuf,
    kind: Kind,
    dir: PathBuf,
    read_only: bool,
) -> Result<(), KernelError> {
    done(&Task::Mount { device, kind, dir, read_only }).await.map(drop)
}

/// Unmounts what is on top of a directory; `false` where nothing is mounted there.
pub async fn unmount_dir(dir: &Path) -> Result<bool, KernelError> {
    done(&Task::Unmount { dir: dir.to_owned() }).await
}

/// Has what is mounted on a directory bring to its device what it holds in memory.
pub async fn sync_dir(dir: &Path) -> Result<(), KernelError> {
    done(&Task::Sync { dir: dir.to_owned() }).await.map(drop)
}

/// A device that is flushed, and that nobody can mount until this is let go.
#[derive(Debug)]
pub struct Flushed {
    holder: Child,
}

/// Claims a device and brings to it what was written past any filesystem and is in the kernel's memory still. One that is dead (its last socket was gone for too long) takes nothing any more: that is
/// no error here, what it had is lost, and its programs were told.
pub async fn flush(index: u32) -> Result<Flushed, KernelError> {
    let (holder, answer) = begun(&Task::Flush { index }).await?;
    let flushed = Flushed { holder };
    match answer {
        Ok(is_alive) => {
            if !is_alive {
                let device = device::path_of(index);
                tracing::warn!(device = %device.display(), "the device is dead: what was not flushed is lost");
            }
            Ok(flushed)
        }
        Err(error) => {
            flushed.let_go().await;
            Err(error)
        }
    }
}

impl Flushed {
    /// Lets go of the device.
    pub async fn let_go(mut self) {
        // The end of its input is what it waits for.
        drop(self.holder.stdin.take());
        if let Err(error) = self.holder.wait().await {
            tracing::warn!(%error, "can't wait for the process that held a device");
        }
    }
}

async fn done(task: &Task) -> Answer {
    let (mut child, answer) = begun(task).await?;
    child.wait().await.map_err(KernelError::of("wait for", Some(PROGRAM.into())))?;
    answer
}

/// The other process, and its answer. It is never killed: what it waits for would not end by that.
async fn begun(task: &Task) -> Result<(Child, Answer), KernelError> {
    let answer = |problem: String| KernelError::Answer(format!("the process that was to {problem}"));
    let words = serde_json::to_string(task).map_err(|error| answer(error.to_string()))?;
    let mut command = Command::new(PROGRAM);
    // What this one was told in confidence is not for others.
    command.env_clear().arg(WORD).arg(words).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().map_err(KernelError::of("start", Some(PROGRAM.into())))?;
    let mut line = String::new();
    if let Some(output) = child.stdout.take() {
        let mut output = BufReader::new(output);
        output.read_line(&mut line).await.map_err(KernelError::of("read from", Some(PROGRAM.into())))?;
    }
    let said = serde_json::from_str(&line)
        .map_err(|error| answer(format!("{} said: {line:?} ({error})", task.verb())))?;
    Ok((child, said))
}

impl Task {
    fn verb(&self) -> &'static str {
        match self {
            Task::Mount { .. } => "mount",
            Task::Unmount { .. } => "unmount",
            Task::Flush { .. } => "flush",
            Task::Sync { .. } => "sync",
        }
    }
}

/// Does the task this program was started for, and says what came of it on standard output. What is claimed stays so until standard input ends.
pub fn perform(task: &str) -> ExitCode {
    let Ok(task) = serde_json::from_str(task) else { return ExitCode::from(2) };
    let mut claimed = None;
    let answer: Answer = match task {
        Task::Mount { device, kind, dir, read_only } => {
            while_busy(&device, || mount::mount_device(&device, kind, &dir, read_only)).map(|()| true)
        }
        Task::Unmount { dir } => mount::unmount_dir(&dir),
        Task::Sync { dir } => mount::sync_dir(&dir).map(|()| true),
        Task::Flush { index } => {
            while_busy(&device::path_of(index), || device::claim(index)).and_then(|device| {
                let flushed = device::flush(&device, index);
                claimed = Some(device);
                flushed
            })
        }
    };
    match serde_json::to_string(&answer) {
        // Who asked may have been killed meanwhile.
        Ok(line) => drop(writeln!(std::io::stdout(), "{line}")),
        Err(_) => return ExitCode::FAILURE,
    }
    if claimed.is_some() {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
    }
    ExitCode::SUCCESS
}

/// Tries again while a device is busy that is mounted nowhere: a process like this one, of a daemon that was killed, may still have it.
fn while_busy<T>(device: &Path, mut tried: impl FnMut() -> Result<T, KernelError>) -> Result<T, KernelError> {
    let end = Instant::now() + OTHERS_END;
    loop {
        match tried() {
            Err(KernelError::DeviceBusy { .. })
                if Instant::now() < end && mount::mounts_of(device).is_ok_and(|mounts| mounts.is_empty()) =>
            {
                std::thread::sleep(OTHERS_LOOK);
            }
            done => return done,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn what_failed_over_there_reads_the_same_here() {
        let dir = PathBuf::from("/mnt/with a\nline");
        for error in [
            KernelError::MountBusy { dir: dir.clone() },
            KernelError::NotAllowed("mount".into()),
            KernelError::Damaged { device: device::path_of(3), kind: Kind::Xfs },
            KernelError::of("unmount", Some(dir))(io::Error::from_raw_os_error(5)),
        ] {
            let (words, hint) = (error.to_string(), error.hint());
            let line = serde_json::to_string(&Answer::Err(error)).unwrap();
            assert!(!line.contains('\n'), "{line}");
            let again: Answer = serde_json::from_str(&line).unwrap();
            let again = again.unwrap_err();
            assert_eq!((again.to_string(), again.hint()), (words, hint));
        }
    }
}
