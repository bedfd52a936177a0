//! Which inodes may differ between two filesystems of the same layout.
//!
//! Enters: the differing ranges. Leaves: the suspects: every inode whose record is another, or of whose blocks one is. Invariant: an inode that is no suspect has the same record, the same map and the
//! same bytes in both. Cost: the differing parts of the inode tables; what is known to be a suspect's, the journal's or a table's is explained and not read. Only if a differing
//! block is left that nothing explains, changed in place, are all inodes asked whose it is.

use super::super::changes::Ranges;
use super::super::ext4::{Ext4, Inode};
use super::super::source::range_at;
use super::{Comparison, FilesError, STEP};
use crate::units::ByteRange;

/// Pieces of files looked at in one comparison.
const MOST_EXTENTS: usize = 32 << 20;
/// Inodes that may differ.
const MOST_SUSPECTS: usize = 32 << 20;
/// Inode records read at once.
const TABLE_STEP: u64 = 256 << 10;

impl Comparison {
    /// Fills in `aligned` and `suspects`.
    pub(super) async fn find_suspects(&mut self) -> Result<(), FilesError> {
        let (old, new) = (self.old.superblock(), self.new.superblock());
        if !old.is_laid_out_like(new) {
            return Ok(());
        }
        let groups = old.groups().max(new.groups());
        let mut explained = Vec::new();
        for group in 0..groups {
            let number = u32::try_from(group).map_err(|_| too_many_groups())?;
            let mut tables = Vec::new();
            for filesystem in [&self.old, &self.new] {
                let superblock = filesystem.superblock();
                explained.extend(superblock.copies_in(group));
                if group >= superblock.groups() {
                    continue;
                }
                let there = filesystem.group(number).await?;
                let table = superblock.blocks_range(there.inode_table, superblock.inode_table_blocks());
                explained.extend([
                    superblock.blocks_range(there.block_bitmap, 1),
                    superblock.blocks_range(there.inode_bitmap, 1),
                    table,
                ]);
                tables.push(table);
            }
            if self.suspects.len() > MOST_SUSPECTS {
                return Err(FilesError::TooMany { what: "changed files", most: MOST_SUSPECTS });
            }
            match tables.as_slice() {
                [old, new] if old != new => {
                    // A table that was moved: by resize2fs, say.
                    self.suspects.clear();
                    return Ok(());
                }
                [both, _, ..] => self.compare_table(number, *both).await?,
                [table] => {
                    let is_new = group < self.new.superblock().groups();
                    let filesystem = if is_new { &self.new } else { &self.old };
                    let there = in_use(filesystem, number, *table).await?;
                    self.suspects.extend(there);
                }
                [] => {}
            }
        }
        explained.extend([&self.old, &self.new].iter().filter_map(|side| side.superblock().mmp()));
        self.aligned = true;
        let mut explained = Gathered { ranges: explained, joined: 0 };
        let mut left = MOST_EXTENTS;
        for number in self.suspects.iter().copied().chain(old_and_new_own(&self.old, &self.new)) {
            for filesystem in [&self.old, &self.new] {
                let taken = match taken(filesystem, number).await {
                    // The walk finds it again, if anything leads there.
                    Err(error) if error.is_of_filesystem() => continue,
                    taken => taken?,
                };
                left = left.checked_sub(taken.len()).ok_or_else(too_many_pieces)?;
                explained.add(taken);
            }
        }
        let left = self.ranges.without(&Ranges::new(explained.ranges));
        let unexplained = self.differing_blocks(&left).await?;
        if !unexplained.is_empty() {
            self.find_owners(&unexplained).await?;
        }
        Ok(())
    }

    /// Suspects the inodes of a group whose records differ.
    async fn compare_table(&mut self, group: u32, table: ByteRange) -> Result<(), FilesError> {
        let superblock = self.new.superblock();
        let len = u64::from(superblock.inode_len());
        let (per_group, inodes) = (superblock.inodes_per_group(), superblock.inodes());
        let mut suspects = Vec::new();
        for part in self.ranges.within(table) {
            // Whole records; a range may begin in the middle of one.
            let mut at = (part.start.0 - table.start.0) / len * len + table.start.0;
            let end = part.end.0.saturating_sub(table.start.0).next_multiple_of(len) + table.start.0;
            while at < end {
                let step = range_at(at, TABLE_STEP.min(end - at));
                let (old, new) = (self.old.read(step).await?, self.new.read(step).await?);
                for (index, (old, new)) in old.chunks(len as usize).zip(new.chunks(len as usize)).enumerate()
                {
                    let within = (at - table.start.0) / len + index as u64;
                    let number = u64::from(group) * u64::from(per_group) + within + 1;
                    if old != new && within < u64::from(per_group) && number <= u64::from(inodes) {
                        suspects.push(number as u32);
                    }
                }
                at = step.end.0;
            }
        }
        self.suspects.extend(suspects);
        Ok(())
    }

    /// The blocks of `ranges` that are not the same in both.
    async fn differing_blocks(&self, ranges: &Ranges) -> Result<Ranges, FilesError> {
        let block_len = self.new.block_len();
        let both = self.old.superblock().blocks().min(self.new.superblock().blocks()) * block_len;
        let mut differing = Vec::new();
        for range in ranges.iter() {
            // What only one of them has belongs to inodes that are not the same, or to nobody.
            let end = range.end.0.min(both);
            let mut at = range.start.0;
            while at < end {
                let step = range_at(at, STEP.min(end - at));
                let (old, new) = (self.old.read(step).await?, self.new.read(step).await?);
                if old != new {
                    for (index, (old, new)) in
                        old.chunks(block_len as usize).zip(new.chunks(block_len as usize)).enumerate()
                    {
                        if old != new {
                            differing.push(range_at(at + index as u64 * block_len, new.len() as u64));
                        }
                    }
                }
                at = step.end.0;
            }
        }
        Ok(Ranges::new(differing))
    }

    /// Suspects every inode that has one of these blocks.
    async fn find_owners(&mut self, blocks: &Ranges) -> Result<(), FilesError> {
        let superblock = self.new.superblock().clone();
        let mut left = MOST_EXTENTS;
        for group in 0..superblock.groups() {
            let number = u32::try_from(group).map_err(|_| too_many_groups())?;
            let there = self.new.group(number).await?;
            let table = superblock.blocks_range(there.inode_table, superblock.inode_table_blocks());
            for inode in in_use(&self.new, number, table).await? {
                // The same record in both, so it is asked of one. Whose map can't be read may have any block: where a name leads to it, that is an error then.
                let is_owner = match taken(&self.new, inode).await {
                    Err(error) if error.is_of_filesystem() => true,
                    taken => {
                        let taken = taken?;
                        left = left.checked_sub(taken.len()).ok_or_else(too_many_pieces)?;
                        taken.iter().any(|range| blocks.touches(*range))
                    }
                };
                if is_owner {
                    self.suspects.insert(inode);
                }
            }
        }
        Ok(())
    }
}

/// The inodes of a group that are in use, by their records in `table`.
async fn in_use(filesystem: &Ext4, group: u32, table: ByteRange) -> Result<Vec<u32>, FilesError> {
    let superblock = filesystem.superblock();
    let (len, per_group) = (superblock.inode_len(), superblock.inodes_per_group());
    let mut found = Vec::new();
    if filesystem.group(group).await?.is_unused {
        return Ok(found);
    }
    let mut at = table.start.0;
    while at < table.end.0 {
        let step = range_at(at, TABLE_STEP.min(table.end.0 - at));
        let records = filesystem.read(step).await?;
        for (index, record) in records.chunks(len.into()).enumerate() {
            let within = (at - table.start.0) / u64::from(len) + index as u64;
            let number = u64::from(group) * u64::from(per_group) + within + 1;
            if Inode::is_in_use(record)
                && within < u64::from(per_group)
                && let Ok(number) = u32::try_from(number)
            {
                found.push(number);
            }
        }
        at = step.end.0;
    }
    Ok(found)
}

/// Ranges that are joined now and then: those of many files may be the same ones, where somebody made it so.
struct Gathered {
    ranges: Vec<ByteRange>,
    joined: usize,
}

impl Gathered {
    fn add(&mut self, ranges: Vec<ByteRange>) {
        const FEW: usize = 1 << 20;
        self.ranges.extend(ranges);
        if self.ranges.len() > FEW.max(2 * self.joined) {
            self.ranges = Ranges::new(std::mem::take(&mut self.ranges)).iter().collect();
            self.joined = self.ranges.len();
        }
    }
}

fn too_many_pieces() -> FilesError {
    FilesError::damaged("the files", "they are in more pieces than can be compared")
}

fn too_many_groups() -> FilesError {
    FilesError::damaged("the superblock", "more groups than there can be")
}

/// Files of the filesystems' own, whose changes nobody sees.
fn old_and_new_own(old: &Ext4, new: &Ext4) -> Vec<u32> {
    old.superblock().own_files().chain(new.superblock().own_files()).collect()
}

/// What of the device an inode takes: contents, map, attributes. Nothing where it is not in use.
async fn taken(filesystem: &Ext4, number: u32) -> Result<Vec<ByteRange>, FilesError> {
    let record = filesystem.read(filesystem.inode_range(number).await?).await?;
    if !Inode::is_in_use(&record) {
        return Ok(Vec::new());
    }
    let inode = filesystem.inode(number).await?;
    let layout = filesystem.layout(&inode).await?;
    let mut taken: Vec<ByteRange> = layout.taken(filesystem.block_len()).collect();
    taken.extend(inode.xattr_block_range(filesystem.block_len()));
    Ok(taken)
}
