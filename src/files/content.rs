//! What `cat` sends: the bytes of a file, holes as zeros.

use super::ext4::{Ext4, Inode, Kind};
use super::{FilePath, FilesError, Outlet};
use crate::units::ByteLen;

/// Read at once.
pub(super) const STEP: ByteLen = ByteLen(1 << 20);

/// The plain file at `path`, links followed.
pub async fn file_at(filesystem: &Ext4, path: &FilePath) -> Result<Inode, FilesError> {
    let inode = filesystem.find(path, true).await?;
    if inode.kind != Kind::File {
        return Err(FilesError::NotAFile { path: path.clone(), kind: inode.kind.words() });
    }
    if inode.is_encrypted() {
        return Err(FilesError::Encrypted { path: path.clone() });
    }
    Ok(inode)
}

/// Sends a file's bytes.
pub async fn cat(filesystem: &Ext4, path: &FilePath, out: &mut Outlet) -> Result<(), FilesError> {
    let inode = file_at(filesystem, path).await?;
    let layout = filesystem.layout(&inode).await?;
    let mut at = 0;
    while at < inode.size {
        let bytes = filesystem.read_file(&inode, &layout, at, STEP).await?;
        out.send(&bytes).await?;
        at += bytes.len() as u64;
    }
    Ok(())
}
