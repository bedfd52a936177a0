//! One opened commit: which chunks a block has, and the chunks themselves.
//!
//! Enters: block numbers and chunk locations. Leaves: chunk tables and verified chunks. Opening reads the commit alone; the map is read node by
//! node as blocks are asked for. Invariants: a node or table is used only after it matched the hash its parent holds; memory for them is
//! bounded by [`VersionOptions`]; of many who ask for one table, one fetches it.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt, stream};

use super::clock_cache::ClockCache;
use super::fetch::{self, RangeRead};
use super::flights::Flights;
use super::meta::{MetaCache, MetaReader, REREADS, named_object_error, on_blocking_thread};
use super::{ImageName, RepoError, Repository, keys};
use crate::format::map_node::{MapNode, SLOTS_LOG2, TableRef, node_start, root_level, slot_of};
use crate::format::{ChunkLocation, ChunkTable, Commit, CommitId, MapRoot, NodeId, VerifiedChunk};
use crate::store::StoreError;
use crate::units::BlockIndex;

/// Range reads of one [`Version::fetch`] that are under way at once.
pub const PARALLEL_READS: usize = 16;
/// A fetch of no more than this is unpacked and hashed where its bytes came in, which takes some 0.1 ms: to wake another thread for it would cost half as much again.
const INLINE_BYTES: usize = 128 << 10;

/// How much memory an opened version may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VersionOptions {
    /// For chunk tables; 24 KiB hold a block of 64 MiB.
    pub table_bytes: usize,
    /// For map nodes; 20 KiB hold 16 GiB of blocks of 64 MiB.
    pub node_bytes: usize,
}

impl Default for VersionOptions {
    fn default() -> VersionOptions {
        VersionOptions { table_bytes: 32 << 20, node_bytes: 8 << 20 }
    }
}

type Table = Option<Arc<ChunkTable>>;

/// An opened commit. Clones are the same one.
#[derive(Clone)]
pub struct Version {
    inner: Arc<Inner>,
}

struct Inner {
    repo: Repository,
    image: ImageName,
    id: CommitId,
    commit: Commit,
    meta: MetaReader,
    nodes: ClockCache<NodeId, Arc<MapNode>>,
    tables: ClockCache<BlockIndex, Table>,
    node_flights: Flights<NodeId, Result<Arc<MapNode>, RepoError>>,
    table_flights: Flights<BlockIndex, Result<Table, RepoError>>,
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Version({} {:?})", self.inner.image, self.inner.id)
    }
}

impl Version {
    /// Opens a commit: reads it, from `meta` or the store, and nothing else.
    pub async fn open(
        repo: &Repository,
        image: &ImageName,
        id: CommitId,
        meta: Arc<dyn MetaCache>,
        options: VersionOptions,
    ) -> Result<Version, RepoError> {
        let commit = repo.commit(image, id, &meta).await?;
        Ok(Version::of(repo, image, id, commit, meta, options))
    }

    /// A commit that is read already.
    pub fn of(
        repo: &Repository,
        image: &ImageName,
        id: CommitId,
        commit: Commit,
        meta: Arc<dyn MetaCache>,
        options: VersionOptions,
    ) -> Version {
        let inner = Inner {
            repo: repo.clone(),
            image: image.clone(),
            id,
            commit,
            meta: repo.meta(&meta),
            nodes: ClockCache::new(options.node_bytes),
            tables: ClockCache::new(options.table_bytes),
            node_flights: Flights::new(),
            table_flights: Flights::new(),
        };
        Version { inner: Arc::new(inner) }
    }

    /// The commit's id.
    pub fn id(&self) -> CommitId {
        self.inner.id
    }

    /// The commit.
    pub fn commit(&self) -> &Commit {
        &self.inner.commit
    }

    /// The image.
    pub fn image(&self) -> &ImageName {
        &self.inner.image
    }

    /// The repository.
    pub fn repository(&self) -> &Repository {
        &self.inner.repo
    }

    /// Where its metadata is remembered.
    pub fn meta_cache(&self) -> Arc<dyn MetaCache> {
        self.inner.meta.cache.clone()
    }

    /// The table of a block, if it is in memory; `Some(None)` where the block is known to be zeros. Takes a read lock for the time of
    /// a hash lookup, for the hot path; on `None` ask [`Version::table`].
    #[inline]
    pub fn table_if_loaded(&self, block: BlockIndex) -> Option<Option<Arc<ChunkTable>>> {
        if matches!(self.inner.commit.map, MapRoot::Zero) {
            return Some(None);
        }
        self.inner.tables.get(&block)
    }

    /// The table of a block, `None` where the block is zeros; fetched and verified where it is not in memory.
    pub async fn table(&self, block: BlockIndex) -> Result<Option<Arc<ChunkTable>>, RepoError> {
        if let Some(table) = self.table_if_loaded(block) {
            return Ok(table);
        }
        self.inner.table_flights.run(block, self.load_table(block)).await
    }

    async fn load_table(&self, block: BlockIndex) -> Result<Table, RepoError> {
        // Someone may have landed between our look and our take-off.
        if let Some(table) = self.inner.tables.get(&block) {
            return Ok(table);
        }
        let table = match self.table_ref(block).await? {
            Some(table) => Some(Arc::new(self.read_table(&table).await?)),
            None => None,
        };
        let bytes = table.as_ref().map_or(0, |table| table.memory());
        self.inner.tables.insert(block, table.clone(), bytes);
        Ok(table)
    }

    async fn read_table(&self, table: &TableRef) -> Result<ChunkTable, RepoError> {
        let TableRef { object, offset, len, id } = *table;
        let (block_size, chunk_size) = (self.inner.commit.block_size, self.inner.commit.chunk_size);
        let check = move |bytes: &[u8]| {
            id.check(bytes)?;
            ChunkTable::decode(bytes, object, block_size, chunk_size)
        };
        let range = offset.0..offset.0 + len.0;
        self.inner.meta.read(id.0, &keys::object(&self.inner.image, &object), Some(range), check).await
    }

    async fn node(&self, id: NodeId, level: u8) -> Result<Arc<MapNode>, RepoError> {
        if let Some(node) = self.inner.nodes.get(&id) {
            return Ok(node);
        }
        let load = async {
            let node = Arc::new(read_node(&self.inner.meta, &self.inner.image, id, level).await?);
            let bytes = match &*node {
                MapNode::Leaf(entries) => size_of_val(entries.as_slice()),
                MapNode::Inner { entries, .. } => size_of_val(entries.as_slice()),
            };
            self.inner.nodes.insert(id, node.clone(), bytes);
            Ok(node)
        };
        self.inner.node_flights.run(id, load).await
    }

    /// Where a block's table is; `None` where the block is zeros.
    pub async fn table_ref(&self, block: BlockIndex) -> Result<Option<TableRef>, RepoError> {
        let blocks = self.inner.commit.blocks();
        if block.0 >= blocks {
            return Err(RepoError::NoBlock { image: self.inner.image.to_string(), block, blocks });
        }
        Ok(self.next_block(block, BlockIndex(block.0 + 1)).await?.map(|(_, table)| table))
    }

    /// The first block at or after `from` and before `end` that is not all zeros, and where its table is. Subtrees that are absent
    /// cost nothing.
    pub async fn next_block(
        &self,
        from: BlockIndex,
        end: BlockIndex,
    ) -> Result<Option<(BlockIndex, TableRef)>, RepoError> {
        let MapRoot::Node(root) = self.inner.commit.map else { return Ok(None) };
        let blocks = self.inner.commit.blocks();
        let end = end.0.min(blocks);
        let top = root_level(blocks);
        let mut at = from.0;
        'from_the_root: while at < end {
            let (mut id, mut level) = (root, top);
            loop {
                let node = self.node(id, level).await?;
                let start = node_start(BlockIndex(at), level).0;
                let slot_bits = SLOTS_LOG2 * level;
                match next_slot(&node, slot_of(BlockIndex(at), level)) {
                    None => {
                        at = start + (1 << (slot_bits + SLOTS_LOG2));
                        continue 'from_the_root;
                    }
                    Some((slot, child)) => {
                        at = at.max(start + (u64::from(slot) << slot_bits));
                        if at >= end {
                            return Ok(None);
                        }
                        match child {
                            Child::Table(table) => return Ok(Some((BlockIndex(at), table))),
                            Child::Node(below) => (id, level) = (below, level - 1),
                        }
                    }
                }
            }
        }
        Ok(None)
    }

    /// Fetches chunks, whose locations come from this version's tables; the answers are in their order, one for each.
    ///
    /// Neighbours in one object come by one read. Unpacking and hashing of more than `INLINE_BYTES` run on blocking threads.
    pub async fn fetch(&self, locations: &[ChunkLocation]) -> Vec<Result<VerifiedChunk, RepoError>> {
        let mut answers: Vec<Option<Result<VerifiedChunk, RepoError>>> = vec![None; locations.len()];
        let reads = fetch::plan(locations).into_iter().map(|read| self.fetch_range(read, locations));
        let mut reads = stream::iter(reads).buffer_unordered(PARALLEL_READS);
        while let Some(fetched) = reads.next().await {
            for (at, answer) in fetched {
                answers[at] = Some(answer);
            }
        }
        answers.into_iter().map(|answer| answer.expect("the plan holds every location once")).collect()
    }

    async fn fetch_range(
        &self,
        read: RangeRead,
        locations: &[ChunkLocation],
    ) -> Vec<(usize, Result<VerifiedChunk, RepoError>)> {
        match self.read_chunks(&read, locations).await {
            Ok(mut answers) => {
                for (at, answer) in &mut answers {
                    self.read_damaged_again(&read, &locations[*at], answer).await;
                }
                answers
            }
            // A truncated object must not take the chunks before its end with it.
            Err(RepoError::Store(StoreError::ShortBody { .. })) if read.chunks.len() > 1 => {
                let mut answers = Vec::with_capacity(read.chunks.len());
                for &at in &read.chunks {
                    let range = fetch::range_of(&locations[at]);
                    let alone = RangeRead { object: read.object, range, chunks: vec![at] };
                    match self.read_chunks(&alone, locations).await {
                        Ok(answer) => answers.extend(answer),
                        Err(error) => answers.push((at, Err(error))),
                    }
                }
                answers
            }
            Err(error) => read.chunks.iter().map(|&at| (at, Err(error.clone()))).collect(),
        }
    }

    /// Bytes that came wrong may have been spoilt on the way: they are asked for again, alone, [`REREADS`] times.
    async fn read_damaged_again(
        &self,
        read: &RangeRead,
        location: &ChunkLocation,
        answer: &mut Result<VerifiedChunk, RepoError>,
    ) {
        for _ in 0..REREADS {
            let Err(damage @ RepoError::Damaged { .. }) = &*answer else { return };
            tracing::warn!(%damage, "reading it again");
            let alone = RangeRead { object: read.object, range: fetch::range_of(location), chunks: vec![0] };
            *answer = match self.read_chunks(&alone, std::slice::from_ref(location)).await {
                Ok(mut read) => read.pop().expect("one was asked for").1,
                Err(error) => Err(error),
            };
        }
    }

    /// Those of `read`; `locations` are all of the fetch.
    async fn read_chunks(
        &self,
        read: &RangeRead,
        locations: &[ChunkLocation],
    ) -> Result<Vec<(usize, Result<VerifiedChunk, RepoError>)>, RepoError> {
        let store = self.inner.repo.store();
        let key = keys::object(&self.inner.image, &read.object);
        let body = store
            .get_range(&key, read.range.clone())
            .await
            .map_err(|error| named_object_error(&**store, error, &key))?;
        let wanted: Vec<(usize, ChunkLocation)> = read.chunks.iter().map(|&at| (at, locations[at])).collect();
        let (start, size) = (read.range.start, self.inner.commit.chunk_size);
        let unpack = move || {
            let unpack = |(at, location): (usize, ChunkLocation)| {
                let range = fetch::range_of(&location);
                let stored = body.slice((range.start - start) as usize..(range.end - start) as usize);
                // A chunk that outlives this call must not keep its neighbours' bytes alive.
                let lone = stored.len() == body.len();
                let stored = if lone { stored } else { Bytes::copy_from_slice(&stored) };
                (at, fetch::unpack(&location, size, stored))
            };
            wanted.into_iter().map(unpack).collect::<Vec<_>>()
        };
        let short = locations.len() * size.len() <= INLINE_BYTES;
        let unpacked = if short { unpack() } else { on_blocking_thread(&**store, unpack).await? };
        let place = || store.describe();
        let name = |source| RepoError::Damaged { place: place(), key: key.clone(), source };
        Ok(unpacked.into_iter().map(|(at, answer)| (at, answer.map_err(name))).collect())
    }
}

/// Reads and verifies a map node.
pub(super) async fn read_node(
    meta: &MetaReader,
    image: &ImageName,
    id: NodeId,
    level: u8,
) -> Result<MapNode, RepoError> {
    let check = move |bytes: &[u8]| {
        id.check(bytes)?;
        MapNode::decode(bytes, level)
    };
    meta.read(id.0, &keys::node(image, &id), None, check).await
}

enum Child {
    Table(TableRef),
    Node(NodeId),
}

/// The first entry at or after a slot.
fn next_slot(node: &MapNode, slot: u8) -> Option<(u8, Child)> {
    match node {
        MapNode::Leaf(entries) => {
            let at = entries.partition_point(|(there, _)| *there < slot);
            entries.get(at).map(|&(slot, table)| (slot, Child::Table(table)))
        }
        MapNode::Inner { entries, .. } => {
            let at = entries.partition_point(|(there, _)| *there < slot);
            entries.get(at).map(|&(slot, node)| (slot, Child::Node(node)))
        }
    }
}
