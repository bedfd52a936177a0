//! Closures: all that some commits name, and what those name.
//!
//! Enters: commits. Leaves: the ids of every commit, map node, table and base object below them, each looked at once. Commits, nodes and tables are read and verified;
//! base objects are only named. Invariants: nothing that was reached is left out unless [`Walk::tolerate`] was told of it; reads are bounded by [`PARALLEL`].

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use futures_util::{StreamExt, stream};

use super::commits::CommitReader;
use super::meta::MetaReader;
use super::version::read_node;
use super::{ImageName, MetaCache, RepoError, Repository, keys};
use crate::format::condemned::Condemned;
use crate::format::map_node::{MapNode, TableRef, root_level};
use crate::format::{ChunkTable, Commit, CommitId, MapRoot, NodeId, ObjectId, TableId};

/// Nodes, or tables, that are read at once.
const PARALLEL: usize = 16;
/// Tables that are known to be read before some are: they come by leaves, 256 at a time.
const TABLES_AT_ONCE: usize = 4096;

/// What is below some commits.
#[derive(Debug, Default)]
pub(super) struct Closure {
    pub commits: HashSet<CommitId>,
    pub nodes: HashSet<NodeId>,
    pub tables: HashSet<TableId>,
    /// And how many bytes each must have at least.
    pub objects: HashMap<ObjectId, u64>,
}

impl Closure {
    /// Whether an object is in it. Prefetch lists belong to their commits.
    pub fn has(&self, object: &Condemned) -> bool {
        match object {
            Condemned::Commit(id) | Condemned::Prefetch(id) => self.commits.contains(id),
            Condemned::Node(id) => self.nodes.contains(id),
            Condemned::Object(id) => self.objects.contains_key(id),
        }
    }

    /// All that is in it and can be condemned.
    pub fn all(&self) -> impl Iterator<Item = Condemned> {
        let commits = self.commits.iter().map(|id| Condemned::Commit(*id));
        let nodes = self.nodes.iter().map(|id| Condemned::Node(*id));
        commits.chain(nodes).chain(self.objects.keys().map(|id| Condemned::Object(*id)))
    }

    fn name(&mut self, object: ObjectId, end: u64) {
        let known = self.objects.entry(object).or_default();
        *known = end.max(*known);
    }
}

/// Walks closures of one image into one [`Closure`].
pub(super) struct Walk {
    meta: MetaReader,
    image: ImageName,
    reader: CommitReader,
    pub closure: Closure,
    /// What was damaged or missing; `None` where the first such thing ends the walk.
    tolerated: Option<Vec<RepoError>>,
}

/// A node to read, and the node of the other map in its place.
type Pair = (NodeId, u8, Option<NodeId>);

impl Walk {
    pub fn new(repo: &Repository, image: &ImageName, meta: &Arc<dyn MetaCache>) -> Walk {
        Walk {
            meta: repo.meta(meta),
            image: image.clone(),
            reader: CommitReader::new(repo, image, meta.clone()),
            closure: Closure::default(),
            tolerated: None,
        }
    }

    /// Goes on past what is damaged or missing, and keeps it for [`Walk::problems`].
    pub fn tolerate(mut self) -> Walk {
        self.tolerated = Some(Vec::new());
        self
    }

    /// What was passed over since it was last asked.
    pub fn problems(&mut self) -> Vec<RepoError> {
        self.tolerated.as_mut().map(std::mem::take).unwrap_or_default()
    }

    fn pass_over(&mut self, error: RepoError) -> Result<(), RepoError> {
        match &mut self.tolerated {
            Some(problems) if is_damage(&error) => {
                problems.push(error);
                Ok(())
            }
            _ => Err(error),
        }
    }

    /// Adds commits with all their history.
    pub async fn history(&mut self, starts: impl IntoIterator<Item = CommitId>) -> Result<(), RepoError> {
        let mut next: Vec<CommitId> = starts.into_iter().collect();
        while let Some(id) = next.pop() {
            if let Some(commit) = self.commit(id, None).await? {
                next.extend(commit.parents);
            }
        }
        Ok(())
    }

    /// Adds what is there of commits and their history, past what is damaged or missing.
    pub async fn what_is_there_of(
        &mut self,
        starts: impl IntoIterator<Item = CommitId>,
    ) -> Result<(), RepoError> {
        let before = self.tolerated.replace(Vec::new());
        let walked = self.history(starts).await;
        self.tolerated = before;
        walked
    }

    /// Adds one commit without its parents; the commit, if it was not known. What its map has in common with that of `base` is left out.
    pub async fn commit(&mut self, id: CommitId, base: Option<&Commit>) -> Result<Option<Commit>, RepoError> {
        if !self.closure.commits.insert(id) {
            return Ok(None);
        }
        let commit = match self.reader.take(id).await {
            Ok(commit) => commit,
            Err(error) => {
                self.pass_over(error)?;
                return Ok(None);
            }
        };
        self.map(&commit, base).await?;
        Ok(Some(commit))
    }

    async fn map(&mut self, commit: &Commit, base: Option<&Commit>) -> Result<(), RepoError> {
        let MapRoot::Node(root) = commit.map else { return Ok(()) };
        let top = root_level(commit.blocks());
        let beside = base.filter(|base| root_level(base.blocks()) == top).and_then(|base| match base.map {
            MapRoot::Node(node) => Some(node),
            MapRoot::Zero => None,
        });
        let mut level_up = vec![(root, top, beside)];
        let mut tables = Vec::new();
        while !level_up.is_empty() {
            level_up = self.level(level_up, &mut tables, commit).await?;
        }
        self.tables(std::mem::take(&mut tables), commit).await
    }

    /// Reads the nodes of one level that are new; the next level, and the tables of leaves.
    async fn level(
        &mut self,
        mut pairs: Vec<Pair>,
        tables: &mut Vec<TableRef>,
        commit: &Commit,
    ) -> Result<Vec<Pair>, RepoError> {
        pairs.retain(|(node, _, beside)| Some(*node) != *beside && self.closure.nodes.insert(*node));
        let (meta, image) = (self.meta.clone(), self.image.clone());
        let reads = stream::iter(pairs).map(|(node, level, beside)| {
            let (meta, image) = (&meta, &image);
            async move {
                let node = read_node(meta, image, node, level).await?;
                let beside = match beside {
                    Some(beside) => Some(read_node(meta, image, beside, level).await?),
                    None => None,
                };
                Ok::<_, RepoError>((node, beside))
            }
        });
        let mut reads = reads.buffer_unordered(PARALLEL);
        let mut below = Vec::new();
        while let Some(read) = reads.next().await {
            let (node, beside) = match read {
                Ok(nodes) => nodes,
                Err(error) => {
                    self.pass_over(error)?;
                    continue;
                }
            };
            match (node, beside) {
                (MapNode::Inner { level, entries }, beside) => {
                    let old: HashMap<u8, NodeId> = match beside {
                        Some(MapNode::Inner { entries, .. }) => entries.into_iter().collect(),
                        _ => HashMap::new(),
                    };
                    let pair = |(slot, id): (u8, NodeId)| (id, level - 1, old.get(&slot).copied());
                    below.extend(entries.into_iter().map(pair));
                }
                (MapNode::Leaf(entries), beside) => {
                    let old: HashMap<u8, TableRef> = match beside {
                        Some(MapNode::Leaf(entries)) => entries.into_iter().collect(),
                        _ => HashMap::new(),
                    };
                    let new = entries.into_iter().filter(|(slot, table)| old.get(slot) != Some(table));
                    tables.extend(new.map(|(_, table)| table));
                    if tables.len() >= TABLES_AT_ONCE {
                        self.tables(std::mem::take(tables), commit).await?;
                    }
                }
            }
        }
        Ok(below)
    }

    /// Reads the tables that are new, and takes the objects they name.
    async fn tables(&mut self, mut tables: Vec<TableRef>, commit: &Commit) -> Result<(), RepoError> {
        for table in &tables {
            self.closure.name(table.object, table.offset.0 + table.len.0);
        }
        tables.retain(|table| self.closure.tables.insert(table.id));
        let (meta, image) = (self.meta.clone(), self.image.clone());
        let (block_size, chunk_size) = (commit.block_size, commit.chunk_size);
        let reads = stream::iter(tables).map(|table| {
            let (meta, image) = (&meta, &image);
            async move {
                let TableRef { object, offset, len, id } = table;
                let check = move |bytes: &[u8]| {
                    id.check(bytes)?;
                    ChunkTable::decode(bytes, object, block_size, chunk_size)
                };
                let range = offset.0..offset.0 + len.0;
                meta.read(id.0, &keys::object(image, &object), Some(range), check).await
            }
        });
        let mut reads = reads.buffer_unordered(PARALLEL);
        while let Some(table) = reads.next().await {
            match table {
                Ok(table) => {
                    for object in table.objects() {
                        self.closure.name(object, 0);
                    }
                    for entry in table.entries() {
                        let location = table.location(entry);
                        self.closure
                            .name(location.object, location.offset.0 + u64::from(location.stored_len));
                    }
                }
                Err(error) => self.pass_over(error)?,
            }
        }
        Ok(())
    }
}

/// Whether an error says that an object is not what it should be, rather than that the store can't be asked.
pub(super) fn is_damage(error: &RepoError) -> bool {
    use crate::store::StoreError;
    match error {
        RepoError::Damaged { .. } | RepoError::Missing { .. } | RepoError::RefMisplaced { .. } => true,
        RepoError::Store(error) => matches!(
            error,
            StoreError::NotFound { .. } | StoreError::ShortBody { .. } | StoreError::TooLong { .. }
        ),
        _ => false,
    }
}
