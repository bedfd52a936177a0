//! Runs mke2fs or mkfs.xfs on a scratch file that has no name.
//!
//! Enters: a program with its arguments. Leaves: its success, or an error with the end of what it said.
//! Invariant: the program's output is bounded, it ends with us, cancelled or killed, and a scratch file needs no cleaning
//! up, whatever kills this process: it was never linked into a directory, tools reach it through /proc.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;

use super::error::ImageError;
use super::progress::Progress;

/// How much of a program's complaint is kept.
const STDERR_BYTES_MAX: u64 = 4096;
/// How often a running program is looked after.
const POLL: Duration = Duration::from_millis(20);
/// A disk with less space left has none.
const FULL_BELOW: u64 = 1 << 20;
/// Where filesystem tools live; a user's PATH often lacks these.
const SBIN: [&str; 2] = ["/usr/sbin", "/sbin"];

/// A program and the package it comes in.
pub(crate) struct Tool {
    pub(crate) name: &'static str,
    pub(crate) package: &'static str,
    /// The highest exit code that means success.
    pub(crate) good: i32,
}

impl Tool {
    /// Runs the program; `arguments` adds to its command line and environment. `why` completes "is needed ...".
    pub(crate) fn run(
        &self,
        why: &str,
        arguments: impl Fn(&mut Command),
        progress: &Progress,
    ) -> Result<(), ImageError> {
        let failed =
            |status: String, stderr: String| ImageError::ToolFailed { tool: self.name, status, stderr };
        let cannot = |error: io::Error| failed("not run".into(), error.to_string());
        let mut stderr = tempfile::tempfile().map_err(cannot)?;
        let candidates =
            [PathBuf::from(self.name)].into_iter().chain(SBIN.map(|dir| Path::new(dir).join(self.name)));
        for program in candidates {
            let mut command = Command::new(program);
            command.env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::null());
            command.stderr(stderr.try_clone().map_err(cannot)?);
            arguments(&mut command);
            // Not the terminal's: an interrupt is ours to pass on. It ends with us even so.
            command.process_group(0);
            // SAFETY: a system call and nothing else happens between fork and exec.
            unsafe {
                command.pre_exec(|| Ok(rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?))
            };
            let mut child = match command.spawn() {
                Ok(child) => child,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(cannot(error)),
            };
            let status = loop {
                if progress.is_cancelled() {
                    // It may have ended meanwhile, which is as good.
                    let _ = child.kill();
                    child.wait().map_err(cannot)?;
                    return Err(ImageError::Cancelled);
                }
                if let Some(status) = child.try_wait().map_err(cannot)? {
                    break status;
                }
                std::thread::sleep(POLL);
            };
            if status.code().is_some_and(|code| code <= self.good) {
                return Ok(());
            }
            return Err(failed(status.to_string(), tail(&mut stderr).unwrap_or_default()));
        }
        Err(ImageError::ToolMissing { tool: self.name, why: why.to_string(), package: self.package })
    }
}

fn tail(file: &mut File) -> io::Result<String> {
    let len = file.seek(io::SeekFrom::End(0))?;
    file.seek(io::SeekFrom::Start(len.saturating_sub(STDERR_BYTES_MAX)))?;
    let mut text = Vec::new();
    file.take(STDERR_BYTES_MAX).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).trim().to_string())
}

/// A nameless file of `len` zero bytes in `dir`.
pub(crate) fn scratch_file(dir: &Path, len: u64) -> Result<File, ImageError> {
    let file = tempfile::tempfile_in(dir).map_err(ImageError::scratch("make one", dir))?;
    file.set_len(len).map_err(ImageError::scratch("make it as big as the image", dir))?;
    Ok(file)
}

/// The error of something that wrote into a scratch file in `dir`: where there is no space left that is why, whatever it looked like there.
pub(crate) fn or_full(error: ImageError, dir: &Path) -> ImageError {
    match error {
        ImageError::Io { .. } | ImageError::Scratch { .. } | ImageError::ToolFailed { .. }
            if is_full(dir) =>
        {
            full(dir)
        }
        other => other,
    }
}

/// Refuses what was written while the space ran out: the kernel tells nobody of what it could not write at the end.
pub(crate) fn check_not_full(dir: &Path) -> Result<(), ImageError> {
    if is_full(dir) { Err(full(dir)) } else { Ok(()) }
}

fn full(dir: &Path) -> ImageError {
    ImageError::scratch("write it", dir)(io::Error::from_raw_os_error(libc::ENOSPC))
}

/// Asked by taking some: what statvfs says is free may be kept back by the filesystem, and some say nothing.
fn is_full(dir: &Path) -> bool {
    let taken = reserve(dir, FULL_BELOW);
    matches!(taken, Err(ImageError::Scratch { source, .. }) if is_no_space(&source))
}

fn is_no_space(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Space in `dir` kept back until this is dropped.
pub(crate) fn reserve(dir: &Path, len: u64) -> Result<File, ImageError> {
    let file = tempfile::tempfile_in(dir).map_err(ImageError::scratch("make one", dir))?;
    match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, len) {
        // What can't be reserved is found missing later.
        Ok(()) | Err(rustix::io::Errno::NOTSUP) => Ok(file),
        Err(error) => Err(ImageError::scratch("write it", dir)(error.into())),
    }
}

/// A path by which a child process reaches an open file of ours, named or not.
pub(crate) fn path_of_open(fd: impl AsFd) -> PathBuf {
    format!("/proc/{}/fd/{}", std::process::id(), fd.as_fd().as_raw_fd()).into()
}
