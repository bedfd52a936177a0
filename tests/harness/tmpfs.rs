//! A small filesystem of a test's own, to fill up.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{need_root, run};

/// A mounted tmpfs, unmounted when dropped.
pub struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    /// `None`, loudly, for who is not root.
    pub fn mount(mib: u64) -> Option<Tmpfs> {
        if !need_root("to mount a small filesystem") {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={mib}m");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "none"]).arg(dir.path())).ok();
        Some(Tmpfs(dir))
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Takes all space there is but `leave` bytes; removing the file gives it back.
    pub fn fill(&self, leave: u64) -> PathBuf {
        let path = self.path().join("filler");
        let mut file = File::create(&path).unwrap();
        let page = [0x5a; 4096];
        while file.write_all(&page).is_ok() {}
        let len = file.metadata().unwrap().len();
        file.set_len(len.saturating_sub(leave)).unwrap();
        path
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}
