//! A scratch file as a mounted filesystem that nobody else sees and that nothing can leave behind.
//!
//! Enters: an open file with a filesystem in it. Leaves: a directory descriptor. Invariant: the mount lives in a mount
//! namespace of the calling thread, and the loop device clears itself on its last close; so when the thread ends, or the
//! process is killed by any signal, the kernel takes both down.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::UnshareFlags;

use super::error::ImageError;

/// How often a free loop device may be taken by somebody else first.
const ATTEMPTS_MAX: usize = 32;

/// From linux/loop.h.
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4c82;
const LOOP_CONFIGURE: libc::Ioctl = 0x4c0a;
const LO_FLAGS_AUTOCLEAR: u32 = 4;

/// `struct loop_info64` of linux/loop.h.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of linux/loop.h.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// A mount in a namespace of this thread. Not `Send`: another thread would not see it.
pub(crate) struct PrivateMount {
    at: PathBuf,
    mounted: bool,
    _this_thread: std::marker::PhantomData<*const ()>,
}

impl PrivateMount {
    /// Mounts the filesystem in `file` over `at`, for this thread, which must be one that ends soon.
    pub(crate) fn new(file: &File, at: &Path, fs: &str, options: &CStr) -> Result<PrivateMount, ImageError> {
        let refused = |what| {
            move |source: Errno| match source {
                Errno::PERM | Errno::ACCESS => ImageError::NeedsRoot { what, source: source.into() },
                other => ImageError::Mount { what, source: other.into() },
            }
        };
        // "." and "/" are looked up without stepping onto what is mounted there.
        let at = at.canonicalize().map_err(ImageError::scratch("find its directory", at))?;
        if at.parent().is_none() {
            let source = io::Error::other("nothing can be mounted on the root; choose a directory below it");
            return Err(ImageError::scratch("mount it", &at)(source));
        }
        // SAFETY: only FILES would make descriptors mean different things in different threads; NEWNS and FS give
        // this thread mounts, a root and a working directory of its own.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }
            .map_err(refused("make a mount namespace"))?;
        // Without this, a shared root would pass the mount on to the machine.
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).map_err(refused("make mounts private"))?;
        let (device, open) = attach(file)?;
        let flags = MountFlags::NOATIME | MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC;
        rustix::mount::mount(&device, &at, fs, flags, options).map_err(refused("mount the image"))?;
        let mount = PrivateMount { at, mounted: true, _this_thread: std::marker::PhantomData };
        // Whatever is written goes where this leads: it must be the image and nothing else.
        let top = mount.open().and_then(rustix::fs::fstat).map_err(refused("open the mounted image"))?;
        let disk = rustix::fs::fstat(&open).map_err(refused("look at the loop device"))?;
        match top.st_dev == disk.st_rdev {
            true => Ok(mount),
            false => Err(refused("find the mounted image")(Errno::XDEV)),
        }
    }

    /// The mounted filesystem's top directory.
    pub(crate) fn open(&self) -> rustix::io::Result<OwnedFd> {
        rustix::fs::open(&self.at, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
    }

    /// Unmounts: everything written is in the file then. All descriptors into it must be closed.
    pub(crate) fn unmount(mut self) -> rustix::io::Result<()> {
        rustix::mount::unmount(&self.at, UnmountFlags::empty())?;
        self.mounted = false;
        Ok(())
    }
}

impl Drop for PrivateMount {
    fn drop(&mut self) {
        if self.mounted {
            // After an error, descriptors may still be open: the kernel ends the mount with the last of them.
            let _ = rustix::mount::unmount(&self.at, UnmountFlags::DETACH);
        }
    }
}

/// Makes a loop device of an open file; it lasts until the last user, at first the returned descriptor, is gone.
fn attach(file: &File) -> Result<(PathBuf, OwnedFd), ImageError> {
    let failed = |what| move |source: Errno| ImageError::NoLoopDevice { what, source: source.into() };
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let control = rustix::fs::open("/dev/loop-control", flags, Mode::empty())
        .map_err(failed("open /dev/loop-control"))?;
    let mut last = Errno::BUSY;
    for _ in 0..ATTEMPTS_MAX {
        // SAFETY: LOOP_CTL_GET_FREE takes no argument and returns a number or -1.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        if number < 0 {
            return Err(failed("find a free one")(errno()));
        }
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = rustix::fs::open(&path, flags, Mode::empty()).map_err(failed("open one"))?;
        let config = LoopConfig {
            fd: file.as_raw_fd().unsigned_abs(),
            block_size: 0,
            info: LoopInfo {
                device: 0,
                inode: 0,
                rdevice: 0,
                offset: 0,
                size_limit: 0,
                number: 0,
                encrypt_type: 0,
                encrypt_key_size: 0,
                flags: LO_FLAGS_AUTOCLEAR,
                file_name: [0; 64],
                crypt_name: [0; 64],
                encrypt_key: [0; 32],
                init: [0; 2],
            },
            reserved: [0; 8],
        };
        // SAFETY: `config` is a whole `struct loop_config` that lives through the call; the kernel only reads it.
        let configured = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
        if configured == 0 {
            return Ok((path, device));
        }
        last = errno();
        // EBUSY: somebody was faster between the two calls.
        if last != Errno::BUSY {
            break;
        }
    }
    Err(failed("set one up")(last))
}

fn errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_kernels_sizes() {
        assert_eq!((size_of::<LoopInfo>(), size_of::<LoopConfig>()), (232, 304));
    }
}
