//! A device that stands still for a moment, so that what is on it is whole.
//!
//! Enters: a device. Leaves: its filesystem written back and frozen, or, where it is mounted nowhere that can be seen, the device itself claimed and flushed. Invariants: it is never said of a
//! filesystem that it stood still when it was not this process that kept it so; whoever froze it thaws it, on every way out but SIGKILL, after which [`thaw`] does.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};

use super::{KernelError, device, mount};

/// linux/fs.h: `_IOWR('X', 119, int)`.
const FIFREEZE: libc::c_ulong = 0xC004_5877;
/// linux/fs.h: `_IOWR('X', 120, int)`.
const FITHAW: libc::c_ulong = 0xC004_5878;
/// How long others have: to thaw what they froze, to let go of the device, to come to the end of a mount.
const OTHERS_END: Duration = Duration::from_secs(1);
const OTHERS_LOOK: Duration = Duration::from_millis(20);

/// A device that stands still.
#[derive(Debug)]
pub enum Still {
    /// Its filesystem is frozen, through one of the directories it is mounted on.
    Frozen(PathBuf, OwnedFd),
    /// It is mounted nowhere, and nobody can mount it.
    Claimed(OwnedFd),
}

impl Still {
    /// Has a device stand still.
    pub fn of(index: u32) -> Result<Still, KernelError> {
        let end = Instant::now() + OTHERS_END;
        loop {
            let dirs = mount::mounts_of_index(index)?;
            let refused = if dirs.is_empty() {
                match device::claim(index) {
                    Ok(claimed) => return Self::claimed(claimed, index),
                    // Mounted since the look; or where this process does not see it, or held by another program.
                    Err(busy @ KernelError::DeviceBusy { .. }) => busy,
                    Err(error) => return Err(error),
                }
            } else {
                match root_of(index, &dirs)? {
                    Some((dir, opened)) => return Self::frozen(dir, opened, end),
                    // Unmounted since the look, or something else is mounted over each of them.
                    None => KernelError::Covered { device: device::path_of(index) },
                }
            };
            if Instant::now() >= end {
                return Err(refused);
            }
            std::thread::sleep(OTHERS_LOOK);
        }
    }

    fn claimed(claimed: OwnedFd, index: u32) -> Result<Still, KernelError> {
        match device::flush(&claimed, index)? {
            true => Ok(Still::Claimed(claimed)),
            false => {
                let dead = io::Error::from_raw_os_error(libc::EIO);
                Err(KernelError::of("flush", Some(device::path_of(index)))(dead))
            }
        }
    }

    fn frozen(dir: PathBuf, opened: OwnedFd, end: Instant) -> Result<Still, KernelError> {
        // Twice: most of it while programs go on, and again what came while that took long. What is left when they have to wait is little.
        for _ in 0..2 {
            rustix::fs::syncfs(&opened)
                .map_err(|errno| KernelError::of("write back", Some(dir.clone()))(errno.into()))?;
        }
        loop {
            match ioctl(&opened, FIFREEZE) {
                Ok(()) => return Ok(Still::Frozen(dir, opened)),
                // They may thaw it at any moment: that is not to stand still.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                    if Instant::now() >= end {
                        return Err(KernelError::FrozenByOthers { dir });
                    }
                    std::thread::sleep(OTHERS_LOOK);
                }
                Err(error) => return Err(KernelError::of("freeze", Some(dir))(error)),
            }
        }
    }

    /// Waits until standard input ends (`true`), or `limit` is over.
    pub fn until_input_ends(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let stdin = io::stdin();
            let mut polled = [PollFd::new(&stdin, PollFlags::IN)];
            let wait = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            match poll(&mut polled, Some(&wait)) {
                // Nothing is ever written to it: what can be read is its end.
                Ok(ready) if ready > 0 => return true,
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                // It can't be waited for, so it is not.
                Err(_) => return false,
            }
        }
    }

    /// Lets it go on. Whether it stood still until now: somebody else may have thawed it.
    pub fn end(self) -> Result<bool, KernelError> {
        match self {
            Still::Claimed(_) => Ok(true),
            Still::Frozen(dir, opened) => thawed(&dir, &opened),
        }
    }
}

/// Thaws a device's filesystem that a process froze that is gone; `false`: it was not frozen, or is not mounted any more.
pub fn thaw(index: u32) -> Result<bool, KernelError> {
    match root_of(index, &mount::mounts_of_index(index)?)? {
        Some((dir, opened)) => thawed(&dir, &opened),
        None => Ok(false),
    }
}

fn thawed(dir: &Path, opened: &OwnedFd) -> Result<bool, KernelError> {
    match ioctl(opened, FITHAW) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        Err(error) => Err(KernelError::of("thaw", Some(dir.to_owned()))(error)),
    }
}

/// The first of these directories on which the device's filesystem is what is found.
fn root_of(index: u32, dirs: &[PathBuf]) -> Result<Option<(PathBuf, OwnedFd)>, KernelError> {
    let path = device::path_of(index);
    let device = rustix::fs::stat(&path)
        .map_err(|errno| KernelError::of("look at", Some(path.clone()))(errno.into()))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let found = dirs.iter().find_map(|dir| {
        // One that can't be opened is covered, or a file that is mounted alone: there may be another.
        let opened = rustix::fs::open(dir, flags, Mode::empty()).ok()?;
        // What lies over it is another filesystem: that must never stand still for us.
        let is_it = rustix::fs::fstat(&opened).is_ok_and(|found| found.st_dev == device.st_rdev);
        is_it.then(|| (dir.clone(), opened))
    });
    Ok(found)
}

/// Has this process live on where those around it are ended: by Ctrl-C, by a signal to the group, for want of memory.
pub fn outlive() {
    // SAFETY: the set is made empty before anything else looks at it, and outlives the calls; no handler is installed.
    unsafe {
        let mut blocked: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut blocked);
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT] {
            libc::sigaddset(&mut blocked, signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &blocked, std::ptr::null_mut());
    }
    // What is not allowed is done without.
    let _ = rustix::process::setsid();
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
}

fn ioctl(file: &OwnedFd, request: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as `file` is borrowed; both requests take an argument they do not look at.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), request, 0) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
