//! Which filesystem is on a device, by its superblock: what block size the device needs, and how it is mounted.
//!
//! Enters: the first bytes of the device. Leaves: facts, or that it is none we know. Sources: the ext4 disk layout (kernel documentation, "Super Block"), the XFS algorithms and
//! data structures document ("Superblocks").

use serde::{Deserialize, Serialize};

/// How many bytes of the device's start tell.
pub const PROBE_BYTES: usize = 2048;

/// A filesystem that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filesystem {
    /// Its kind.
    pub kind: Kind,
    /// The smallest unit it reads and writes: the device's blocks may not be larger.
    pub sector: u32,
    /// It was not unmounted: its journal has to be played when it is mounted.
    pub dirty: bool,
}

/// A kind of filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// ext4, and ext2 and ext3, which the same driver mounts.
    Ext4,
    /// XFS.
    Xfs,
}

impl Kind {
    /// The name mount knows it by.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Ext4 => "ext4",
            Kind::Xfs => "xfs",
        }
    }

    /// What it is mounted with besides read-only or not. Two versions of an image have one UUID, which XFS minds; a read-only device can't take a journal's replay.
    pub fn options(self, read_only: bool) -> &'static str {
        match (self, read_only) {
            (Kind::Ext4, false) => "",
            (Kind::Ext4, true) => "noload",
            (Kind::Xfs, false) => "nouuid",
            (Kind::Xfs, true) => "nouuid,norecovery",
        }
    }
}

impl Filesystem {
    /// What the device's first bytes say; `None`: no filesystem we know.
    pub fn probe(start: &[u8]) -> Option<Filesystem> {
        xfs(start).or_else(|| ext4(start))
    }

    /// The device's block size: pages where the filesystem allows.
    pub fn block_size(&self) -> u32 {
        self.sector.min(4096)
    }
}

fn xfs(start: &[u8]) -> Option<Filesystem> {
    const SECTOR_SIZE_AT: usize = 102;
    if start.get(..4)? != b"XFSB" {
        return None;
    }
    let sector = u16::from_be_bytes([*start.get(SECTOR_SIZE_AT)?, *start.get(SECTOR_SIZE_AT + 1)?]);
    let valid = sector.is_power_of_two() && sector >= 512;
    // Whether its log is clean is known only to who reads the log.
    valid.then_some(Filesystem { kind: Kind::Xfs, sector: sector.into(), dirty: false })
}

fn ext4(start: &[u8]) -> Option<Filesystem> {
    const SUPERBLOCK_AT: usize = 1024;
    const NEEDS_RECOVERY: u32 = 0x4;
    let field = |at: usize| {
        let bytes = start.get(SUPERBLOCK_AT + at..SUPERBLOCK_AT + at + 4)?;
        bytes.try_into().ok().map(u32::from_le_bytes)
    };
    if field(0x38)? as u16 != 0xEF53 {
        return None;
    }
    let log_block_size = field(0x18)?;
    let incompatible = field(0x60)?;
    let dirty = incompatible & NEEDS_RECOVERY != 0;
    // 1 KiB to 64 KiB.
    (log_block_size <= 6).then(|| Filesystem { kind: Kind::Ext4, sector: 1024 << log_block_size, dirty })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn made_by(tool: &str, args: &[&str]) -> Option<Vec<u8>> {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        std::fs::File::create(&image).unwrap().set_len(512 << 20).unwrap();
        let path = std::env::var("PATH").unwrap_or_default();
        let made =
            Command::new(tool).args(args).arg(&image).env("PATH", format!("{path}:/usr/sbin:/sbin")).output();
        let made = made.ok()?;
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let mut bytes = vec![0; PROBE_BYTES];
        use std::os::unix::fs::FileExt;
        std::fs::File::open(&image).unwrap().read_exact_at(&mut bytes, 0).unwrap();
        Some(bytes)
    }

    #[test]
    fn what_mkfs_made_is_found_with_the_block_size_it_needs() {
        for (tool, args, kind, block_size) in [
            ("mke2fs", ["-q", "-t", "ext4", "-b", "4096"].as_slice(), Kind::Ext4, 4096),
            ("mke2fs", &["-q", "-t", "ext4", "-b", "1024"], Kind::Ext4, 1024),
            ("mkfs.xfs", &["-q", "-f"], Kind::Xfs, 512),
            ("mkfs.xfs", &["-q", "-f", "-s", "size=4096"], Kind::Xfs, 4096),
        ] {
            let Some(start) = made_by(tool, args) else {
                assert!(std::env::var_os("CI").is_none(), "{tool} is missing");
                continue;
            };
            let found = Filesystem::probe(&start).unwrap();
            assert_eq!(
                (found.kind, found.block_size(), found.dirty),
                (kind, block_size, false),
                "{tool} {args:?}"
            );
            for len in 0..PROBE_BYTES {
                // No length of what is there panics.
                Filesystem::probe(&start[..len]);
            }
        }
        assert_eq!(Filesystem::probe(&[0; PROBE_BYTES]), None);
        assert_eq!(Filesystem::probe(&[0xff; PROBE_BYTES]), None);
    }
}
