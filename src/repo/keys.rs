//! Where things are in a repository: the layout of keys in FORMAT.md.

use super::{BranchName, ImageName, TagName};
use crate::format::condemned::Condemned;
use crate::format::{CommitId, NodeId, ObjectId};
use crate::store::{Key, KeyPrefix};

fn key(text: &str) -> Key {
    Key::new(text)
        .expect("names and ids are plain segments, and the longest layout is far below the longest key")
}

fn prefix(text: &str) -> KeyPrefix {
    KeyPrefix::new(text)
        .expect("names and ids are plain segments, and the longest layout is far below the longest key")
}

pub(super) fn format() -> Key {
    key("format")
}

pub(super) fn images() -> KeyPrefix {
    prefix("images/")
}

/// A ref's name below `refs/`.
pub(super) fn branch_name(branch: &BranchName) -> String {
    format!("heads/{branch}")
}

/// A ref's name below `refs/`.
pub(super) fn tag_name(tag: &TagName) -> String {
    format!("tags/{tag}")
}

/// `name` is what [`branch_name`] or [`tag_name`] made.
pub(super) fn reference(image: &ImageName, name: &str) -> Key {
    key(&format!("images/{image}/refs/{name}"))
}

pub(super) fn heads(image: &ImageName) -> KeyPrefix {
    prefix(&format!("images/{image}/refs/heads/"))
}

pub(super) fn tags(image: &ImageName) -> KeyPrefix {
    prefix(&format!("images/{image}/refs/tags/"))
}

pub(super) fn commit(image: &ImageName, id: &CommitId) -> Key {
    key(&format!("images/{image}/commits/{id}"))
}

/// `digits` are plain.
pub(super) fn commits(image: &ImageName, digits: &str) -> KeyPrefix {
    prefix(&format!("images/{image}/commits/{digits}"))
}

pub(super) fn prefetch(image: &ImageName, id: &CommitId) -> Key {
    key(&format!("images/{image}/prefetch/{id}"))
}

/// All of an image.
pub(super) fn image(image: &ImageName) -> KeyPrefix {
    prefix(&format!("images/{image}/"))
}

/// `name` is plain.
pub(super) fn hold(image: &ImageName, name: &str) -> Key {
    key(&format!("images/{image}/holds/{name}"))
}

pub(super) fn holds(image: &ImageName) -> KeyPrefix {
    prefix(&format!("images/{image}/holds/"))
}

/// `name` is plain.
pub(super) fn condemned_list(image: &ImageName, name: &str) -> Key {
    key(&format!("images/{image}/condemned/{name}"))
}

pub(super) fn condemned_lists(image: &ImageName) -> KeyPrefix {
    prefix(&format!("images/{image}/condemned/"))
}

/// Where an object that can be condemned is.
pub(super) fn of(image: &ImageName, object: &Condemned) -> Key {
    match object {
        Condemned::Commit(id) => commit(image, id),
        Condemned::Prefetch(id) => prefetch(image, id),
        Condemned::Node(id) => node(image, id),
        Condemned::Object(id) => self::object(image, id),
    }
}

/// Which object a key of an image is; `None` for what can't be condemned.
pub(super) fn parse(image: &ImageName, key: &Key) -> Option<Condemned> {
    let mut segments = key.as_str().strip_prefix(&format!("images/{image}/"))?.split('/');
    let found = match (segments.next()?, segments.next()?) {
        ("commits", id) => Condemned::Commit(id.parse().ok()?),
        ("prefetch", id) => Condemned::Prefetch(id.parse().ok()?),
        ("maps", id) => Condemned::Node(id.parse().ok()?),
        ("blocks", _) => Condemned::Object(segments.next()?.parse().ok()?),
        _ => return None,
    };
    // Only what is exactly where it belongs.
    (of(image, &found) == *key).then_some(found)
}

pub(super) fn node(image: &ImageName, id: &NodeId) -> Key {
    key(&format!("images/{image}/maps/{id}"))
}

pub(super) fn nodes(image: &ImageName) -> KeyPrefix {
    prefix(&format!("images/{image}/maps/"))
}

pub(super) fn blocks(image: &ImageName) -> KeyPrefix {
    prefix(&format!("images/{image}/blocks/"))
}

pub(super) fn object(image: &ImageName, id: &ObjectId) -> Key {
    let id = id.to_string();
    key(&format!("images/{image}/blocks/{}/{id}", &id[..2]))
}
