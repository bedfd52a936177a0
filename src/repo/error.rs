//! What can go wrong with a repository. Every message says where, and names what there is instead where that helps.

use crate::format::{CommitId, FormatError};
use crate::store::{Key, StoreError};
use crate::units::{BlockIndex, ByteLen};

/// The most names a message lists.
const LISTED_NAMES: usize = 20;

/// An error of a repository. Cheap to clone: one failed load may have many waiters.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RepoError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There is no `format` object.
    #[error("{place} is not a repository: it has no object 'format'")]
    NotARepository {
        /// The store.
        place: String,
    },
    /// There is something else where a repository should be made.
    #[error(
        "{place} is not empty and not a repository: it holds '{occupant}'; a new repository needs an empty place"
    )]
    Occupied {
        /// The store.
        place: String,
        /// Something in it.
        occupant: String,
    },
    /// There is a repository already.
    #[error("{place} is a repository already")]
    Exists {
        /// The store.
        place: String,
    },
    /// A copy was to be made in another repository.
    #[error("{place} is another repository than {of}: only copies of one repository can be kept the same")]
    OtherRepository {
        /// Where the copy was to be.
        place: String,
        /// Of what.
        of: String,
    },
    /// An object is not what its name or its parent says.
    #[error("{place}: {key}: {source}")]
    Damaged {
        /// The store.
        place: String,
        /// The object.
        key: Key,
        /// What is wrong.
        source: FormatError,
    },
    /// An object that another one names is not there.
    #[error("{place}: {key} is missing, though another object names it: the repository is damaged")]
    Missing {
        /// The store.
        place: String,
        /// The object.
        key: Key,
    },
    /// A ref says it is another one.
    #[error("{place}: {key} is damaged: it says it is {says}")]
    RefMisplaced {
        /// The store.
        place: String,
        /// Where it was read.
        key: Key,
        /// What it says.
        says: String,
    },
    /// A value that can't be written.
    #[error("{source}")]
    Unwritable {
        /// What is wrong.
        #[from]
        source: FormatError,
    },
    /// A string that is no name.
    #[error("'{text}' can't be {kind}: {why}")]
    BadName {
        /// What it should be.
        kind: &'static str,
        /// The string.
        text: String,
        /// The rule it breaks.
        why: &'static str,
    },
    /// No such image.
    #[error("no image '{image}' in {place}; {}", there_are(.has))]
    NoImage {
        /// The store.
        place: String,
        /// The name asked for.
        image: String,
        /// The images there are.
        has: Vec<String>,
    },
    /// No such branch, tag or commit.
    #[error("no branch, tag or commit '{reference}' in {image}; {}", there_are(.has))]
    NoRef {
        /// The image.
        image: String,
        /// The name asked for.
        reference: String,
        /// The branches and tags there are.
        has: Vec<String>,
    },
    /// A prefix that more than one commit's id has.
    #[error("'{prefix}' is the start of more than one commit of {image}: {}", list(.matches))]
    Ambiguous {
        /// The image.
        image: String,
        /// The prefix.
        prefix: String,
        /// The commits.
        matches: Vec<String>,
    },
    /// A name that a branch and a tag have.
    #[error(
        "'{name}' of {image} is two things: a branch at {branch} and a tag of {tag}; hint: say 'heads/{name}' or 'tags/{name}'"
    )]
    TwoThings {
        /// The image.
        image: String,
        /// The name.
        name: String,
        /// Where the branch is.
        branch: CommitId,
        /// What the tag names.
        tag: CommitId,
    },
    /// No such branch.
    #[error("no branch '{branch}' in {image}; {}", there_are(.has))]
    NoBranch {
        /// The image.
        image: String,
        /// The name asked for.
        branch: String,
        /// The branches there are.
        has: Vec<String>,
    },
    /// No such tag.
    #[error("no tag '{tag}' in {image}; {}", there_are(.has))]
    NoTag {
        /// The image.
        image: String,
        /// The name asked for.
        tag: String,
        /// The tags there are.
        has: Vec<String>,
    },
    /// A new name that is taken.
    #[error("{image} has a {kind} '{name}' already, at {commit}")]
    NameTaken {
        /// The image.
        image: String,
        /// What it is the name of.
        kind: &'static str,
        /// The name.
        name: String,
        /// What it names.
        commit: CommitId,
    },
    /// A branch that no other ref has the commits of.
    #[error("{image}@{branch} is not merged: no other branch or tag has its commit {commit}")]
    NotMerged {
        /// The image.
        image: String,
        /// The branch.
        branch: String,
        /// Where it is.
        commit: CommitId,
    },
    /// A tag that is protected from deletion.
    #[error("tag '{tag}' of {image} is protected")]
    Protected {
        /// The image.
        image: String,
        /// The tag.
        tag: String,
    },
    /// What was relied on was deleted by a gc before it was known to be needed.
    #[error("{place}: {key} was deleted by a gc while it was needed again; nothing was named")]
    Swept {
        /// The store.
        place: String,
        /// The object.
        key: Key,
    },
    /// A gc that is deleting what is needed does not come to its end.
    #[error("{place}: a gc is deleting what is needed here ({key}), and is not done")]
    SweepUnderWay {
        /// The store.
        place: String,
        /// The condemned list.
        key: Key,
    },
    /// A hold was not renewed in time, or was taken away.
    #[error(
        "{place}: the hold {key} lapsed, so a gc may have taken what was written since; nothing was named"
    )]
    HoldLapsed {
        /// The store.
        place: String,
        /// The hold.
        key: Key,
    },
    /// A history longer than is looked at.
    #[error("the history of {image} has more than {max} commits")]
    TooLong {
        /// The image.
        image: String,
        /// The bound.
        max: usize,
    },
    /// `REF~N` goes further back than the history.
    #[error("{image}@{reference} is not there: the history goes back {depth} commits only")]
    NoAncestor {
        /// The image.
        image: String,
        /// The reference.
        reference: String,
        /// How far one can go back.
        depth: u32,
    },
    /// The branch moved since it was read.
    #[error("not a fast-forward: {image}@{branch} is at {}, expected {}", commit(.actual), commit(.expected))]
    NotFastForward {
        /// The image.
        image: String,
        /// The branch.
        branch: String,
        /// Where it was thought to be; `None`: not to exist.
        expected: Option<CommitId>,
        /// Where it is.
        actual: Option<CommitId>,
    },
    /// The tag exists.
    #[error("tag '{tag}' of {image} exists and names {commit}; tags do not move")]
    TagExists {
        /// The image.
        image: String,
        /// The tag.
        tag: String,
        /// What it names.
        commit: CommitId,
    },
    /// A block past the device's end.
    #[error("{image}: block {block} is past the end, the device has {blocks}")]
    NoBlock {
        /// The image.
        image: String,
        /// The block asked for.
        block: BlockIndex,
        /// How many there are.
        blocks: u64,
    },
    /// Blocks were given to a map out of order.
    #[error("block {block} was given to the map after block {last}")]
    BlockOrder {
        /// The block.
        block: BlockIndex,
        /// The one before.
        last: BlockIndex,
    },
    /// A map can't be built on one of a larger device.
    #[error("a map of {blocks} blocks can't stand on one of {base}")]
    MapShrinks {
        /// Blocks of the new device.
        blocks: u64,
        /// Blocks of the old one.
        base: u64,
    },
    /// More bytes than the device holds.
    #[error("the image is bigger than its size of {size} bytes")]
    TooMuchData {
        /// The device's size.
        size: ByteLen,
    },
    /// A thread of the writer ended, or the runtime it uses did.
    #[error("the image writer was stopped: {why}")]
    WriterStopped {
        /// How.
        why: &'static str,
    },
    /// A thread or its compressor could not be started.
    #[error("the image writer can't {operation}: {source}")]
    WriterSystem {
        /// What it tried.
        operation: &'static str,
        /// What the system said.
        source: std::sync::Arc<std::io::Error>,
    },
}

impl RepoError {
    /// Whether the same request may succeed later without anyone doing something about it.
    pub fn is_transient(&self) -> bool {
        matches!(self, RepoError::Store(error) if error.is_transient())
    }

    /// Whether it says that the repository is out of reach rather than wrong: a place that is not mounted now counts.
    pub fn is_away(&self) -> bool {
        self.is_transient() || matches!(self, RepoError::Store(StoreError::NoPlace { .. }))
    }
}

fn list(names: &[String]) -> String {
    let mut text = names.iter().take(LISTED_NAMES).map(String::as_str).collect::<Vec<_>>().join(", ");
    if names.len() > LISTED_NAMES {
        text.push_str(&format!(" and {} more", names.len() - LISTED_NAMES));
    }
    text
}

fn there_are(names: &[String]) -> String {
    if names.is_empty() { "it has none".into() } else { format!("it has: {}", list(names)) }
}

fn commit(id: &Option<CommitId>) -> String {
    id.map_or_else(|| "no commit".into(), |id| id.to_string())
}
