//! An ext4 image by mke2fs, for what the streaming writer can't hold.
//!
//! Enters: a scanned tree. Leaves: the image, streamed from a scratch file. Invariant: what the scan saw is what is in
//! the image; mke2fs reads the directory by itself, so afterwards every file is compared with the scan again, and
//! every inode gets its owner, mode and times from it (mke2fs 1.47.0 keeps whole seconds only).

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use mkext4::reader::{Fs, ReadAt};

use super::error::ImageError;
use super::ext4::{Times, epoch, times};
use super::geometry::{Plan, STREAMING_MAX, xattr_room};
use super::identity::{Identity, uuid_text};
use super::note::{Mke2fsReason, NoteKind, Notes};
use super::progress::{Phase, Progress};
use super::scan::Scan;
use super::sink::{ImageSink, Stream};
use super::tool::{Tool, or_full, path_of_open, scratch_file};
use super::tree::{BLOCK, Entry, EntryId, Kind, ROOT, Tree};
use super::xattrs::Ext4Room;
use super::{ImageOptions, raw, reader};
use crate::units::ByteOffset;

const MKE2FS: Tool = Tool { name: "mke2fs", package: "e2fsprogs", good: 0 };
/// Ends with 1 where it found and corrected something.
const E2FSCK: Tool = Tool { name: "e2fsck", package: "e2fsprogs", good: 1 };

/// What the streaming writer emits too, so that both kinds of image behave alike.
const FEATURES: &str = "none,has_journal,ext_attr,dir_index,filetype,extent,flex_bg,sparse_super,large_file,huge_file,\
                        dir_nlink,extra_isize,metadata_csum";
/// The superblock's offset, length, and where its incompatible features and checksum are.
const SUPERBLOCK: std::ops::Range<u64> = 1024..2048;
const FEATURE_INCOMPAT: usize = 0x60;
const CHECKSUM: usize = 0x3fc;
/// Big attribute values in inodes of their own.
const EA_INODE: u32 = 0x400;
const INODE_BYTES: usize = 256;
const ROOT_INODE: u32 = 2;

/// Makes and emits the image.
pub(crate) fn emit(
    scan: Scan,
    plan: Plan,
    reason: Mke2fsReason,
    options: &ImageOptions,
    sink: &mut dyn ImageSink,
    progress: &Progress,
    notes: &mut Notes,
) -> Result<(), ImageError> {
    progress.enter(Phase::Layout);
    let tree = &scan.tree;
    let dir = &options.scratch_dir;
    let file = scratch_file(dir, plan.device.value())?;
    let identity = Identity::of(&options.image_name);
    let mut features = FEATURES.to_string();
    if plan.filesystem.value() > STREAMING_MAX {
        features += ",64bit";
    }
    let big_values = tree.iter().any(|(id, _)| xattr_room(tree, id) == Ext4Room::TooBig);
    if big_values {
        features += ",ea_inode";
    }
    let time = epoch(tree).to_string();
    let why = format!("for {reason}");
    let made = MKE2FS.run(
        &why,
        |command| {
            // The machine's configuration must not change the bytes; so no -t either, which would look it up.
            command.env("MKE2FS_CONFIG", "/dev/null");
            command.env("E2FSPROGS_FAKE_TIME", &time).env("SOURCE_DATE_EPOCH", &time);
            command.args(["-q", "-F", "-b", "4096", "-I", "256", "-m", "0", "-O", &features]);
            command.arg("-N").arg(plan.inodes.to_string()).arg("-U").arg(uuid_text(&identity.uuid));
            // Tables written now are tables the kernel does not write into every volume's delta later.
            let seed = uuid_text(&identity.hash_seed);
            command.arg("-E").arg(format!("hash_seed={seed},lazy_itable_init=0,lazy_journal_init=0"));
            command.arg("-d").arg(path_of_open(&scan.root)).arg(path_of_open(&file));
            command.arg((plan.filesystem.value() / BLOCK).to_string());
        },
        progress,
    );
    if let Err(error) = made {
        // What it stumbled over may be that the directory is not what it was.
        return match error {
            ImageError::ToolFailed { .. } => {
                reader::check_unchanged(tree, scan.root, progress)?;
                Err(or_full(error, dir))
            }
            other => Err(other),
        };
    }
    if big_values {
        // mke2fs 1.47.0 forgets the blocks of big values in the count of their owner's.
        let fix = |command: &mut std::process::Command| {
            command
                .env("E2FSCK_TIME", &time)
                .env("E2FSPROGS_FAKE_TIME", &time)
                .env("E2FSCK_CONFIG", "/dev/null");
            command.args(["-f", "-y"]).arg(path_of_open(&file));
        };
        E2FSCK.run(&why, fix, progress).map_err(|error| or_full(error, dir))?;
    }
    reader::check_unchanged(tree, scan.root, progress)?;
    progress.read(progress.bytes_total().value());
    adjust(&file, tree, options, notes)?;

    progress.enter(Phase::Read);
    let mut stream = Stream::begin(sink, plan.device)?;
    let failed = |error| ImageError::scratch("read it", dir)(error);
    raw::copy(&file, plan.device.value(), &mut stream, progress, |_| {}, failed)?;
    stream.hole_to(ByteOffset(plan.device.value()))?;
    Ok(())
}

/// Sets every inode's owner, mode and times to what the scan saw.
fn adjust(file: &File, tree: &Tree, options: &ImageOptions, notes: &mut Notes) -> Result<(), ImageError> {
    let fs = Fs::open(Unmarked(file)).map_err(ImageError::Ext4)?;
    let inos = inode_numbers(&fs, tree)?;
    for (id, entry) in tree.iter() {
        let ino = inos[id.0 as usize];
        match entry.kind {
            Kind::HardLink { to } if inos[to.0 as usize] == ino => continue,
            // mke2fs keeps the names of regular files together, not those of anything else.
            Kind::HardLink { .. } => notes.about(NoteKind::LinkSplit, || tree.relative_path(id)),
            _ => {}
        }
        adjust_inode(file, &fs, ino, entry, options)?;
    }
    Ok(())
}

/// Which inode each entry of the tree has become.
fn inode_numbers(fs: &Fs<Unmarked<'_>>, tree: &Tree) -> Result<Vec<u32>, ImageError> {
    let children = children(tree);
    let mut inos = vec![0; tree.entries.len()];
    inos[ROOT.0 as usize] = ROOT_INODE;
    // Parents come before their children.
    for (dir, _) in tree.iter().filter(|(_, entry)| matches!(entry.kind, Kind::Dir)) {
        let listed = fs.read_dir(inos[dir.0 as usize]).map_err(ImageError::Ext4)?;
        let found: HashMap<Vec<u8>, u32> =
            listed.into_iter().map(|entry| (entry.name, entry.inode)).collect();
        for &id in children.get(&dir).into_iter().flatten() {
            let ino = found.get(tree.name(id).to_bytes()).ok_or_else(|| ImageError::ToolFailed {
                tool: MKE2FS.name,
                status: "incomplete".into(),
                stderr: format!("{} is not in the image", tree.path(id).display()),
            })?;
            inos[id.0 as usize] = *ino;
        }
    }
    Ok(inos)
}

/// The entries of each directory that has any.
fn children(tree: &Tree) -> HashMap<EntryId, Vec<EntryId>> {
    let mut children: HashMap<EntryId, Vec<EntryId>> = HashMap::new();
    for (id, entry) in tree.iter().skip(1) {
        children.entry(entry.parent).or_default().push(id);
    }
    children
}

fn adjust_inode(
    file: &File,
    fs: &Fs<Unmarked<'_>>,
    ino: u32,
    entry: &Entry,
    options: &ImageOptions,
) -> Result<(), ImageError> {
    let mut raw = fs.inode_raw(ino).map_err(ImageError::Ext4)?;
    let per_group = fs.superblock().inodes_per_group;
    let group = fs.group_desc(u64::from((ino - 1) / per_group)).map_err(ImageError::Ext4)?;
    let at = group.inode_table * BLOCK + u64::from((ino - 1) % per_group) * INODE_BYTES as u64;
    if raw.len() != INODE_BYTES {
        return Err(ImageError::Ext4(mkext4::Error::Unsupported(format!("inodes of {} bytes", raw.len()))));
    }
    let Times { atime, mtime } = times(entry, options.keep_atime);
    let stamp = |time: super::tree::Time| mkext4::spec::Inode::encode_timestamp(time.sec, time.nsec);
    let ((atime, atime_extra), (mtime, mtime_extra)) = (stamp(atime), stamp(mtime));
    // The fields of struct ext4_inode, fs/ext4/ext4.h.
    let mode = u16::from_le_bytes([raw[0], raw[1]]) & 0o170_000 | entry.mode;
    put(&mut raw, 0x00, &mode.to_le_bytes());
    put(&mut raw, 0x02, &entry.uid.to_le_bytes()[..2]);
    put(&mut raw, 0x78, &entry.uid.to_le_bytes()[2..]);
    put(&mut raw, 0x18, &entry.gid.to_le_bytes()[..2]);
    put(&mut raw, 0x7a, &entry.gid.to_le_bytes()[2..]);
    let [access, change, modify, birth] = [(0x08, 0x8c), (0x0c, 0x84), (0x10, 0x88), (0x90, 0x94)];
    put(&mut raw, access.0, &atime.to_le_bytes());
    put(&mut raw, access.1, &atime_extra.to_le_bytes());
    for (seconds, extra) in [change, modify, birth] {
        put(&mut raw, seconds, &mtime.to_le_bytes());
        put(&mut raw, extra, &mtime_extra.to_le_bytes());
    }
    let generation = u32::from_le_bytes(raw[0x64..0x68].try_into().expect("four bytes"));
    let checksum = mkext4::csum::inode(fs.fs_seed(), ino, generation, &raw).to_le_bytes();
    put(&mut raw, 0x7c, &checksum[..2]);
    put(&mut raw, 0x82, &checksum[2..]);
    file.write_all_at(&raw, at).map_err(ImageError::scratch("write it", &options.scratch_dir))
}

fn put(raw: &mut [u8], at: usize, bytes: &[u8]) {
    raw[at..at + bytes.len()].copy_from_slice(bytes);
}

/// The image as the reader wants it: it refuses big attribute values (`ea_inode`), which are none of its business
/// here, so it does not get to see that feature.
struct Unmarked<'f>(&'f File);

impl ReadAt for Unmarked<'_> {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        FileExt::read_exact_at(self.0, buf, offset)?;
        if (offset..offset + buf.len() as u64) == SUPERBLOCK {
            let word: [u8; 4] = buf[FEATURE_INCOMPAT..][..4].try_into().expect("four bytes");
            let features = u32::from_le_bytes(word) & !EA_INODE;
            put(buf, FEATURE_INCOMPAT, &features.to_le_bytes());
            let checksum = mkext4::csum::superblock(buf);
            put(buf, CHECKSUM, &checksum.to_le_bytes());
        }
        Ok(())
    }
}
