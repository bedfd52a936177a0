//! Refs: the names that move. A branch or a tag of an image, and the commit it names.
//!
//! Enters: the bytes under a ref's key. Leaves: a [`RefObject`] that says whose ref it is; the caller compares that with the key it read,
//! so a ref copied over another is found. A deleted ref is an object too, which names nothing: stores can replace an object on a condition, but not remove it on one.

use super::text::{TextReader, TextWriter};
use super::{CommitId, FormatError};

const WHAT: &str = "ref";
const KIND: &str = "horcrux-ref";
/// What a plain ref is written as.
const PLAIN: u64 = 1;
/// What one that is protected or deleted is written as.
const MARKED: u64 = 2;
/// What a deleted ref names.
const NONE: &str = "none";

/// The content of a ref.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefObject {
    /// The image it belongs to.
    pub image: String,
    /// Its name below `refs/`: `heads/main`, `tags/v1`.
    pub name: String,
    /// The commit it names; `None` for a ref that was deleted.
    pub commit: Option<CommitId>,
    /// It is not deleted before it is let go of.
    pub protected: bool,
}

impl RefObject {
    /// A ref that names a commit.
    pub fn new(image: impl ToString, name: impl ToString, commit: CommitId) -> RefObject {
        RefObject { image: image.to_string(), name: name.to_string(), commit: Some(commit), protected: false }
    }

    /// The object's bytes. A plain ref is one of version 1, which every build reads.
    pub fn encode(&self) -> Vec<u8> {
        let RefObject { image, name, commit, protected } = self;
        if let (Some(commit), false) = (commit, protected) {
            let mut writer = TextWriter::new(KIND, PLAIN);
            writer.field("image", image).field("name", name).field("commit", commit);
            return writer.checksum();
        }
        let mut writer = TextWriter::new(KIND, MARKED);
        writer.field("image", image).field("name", name);
        match commit {
            Some(commit) => writer.field("commit", commit),
            None => writer.field("commit", NONE),
        };
        writer.field("protected", if *protected { "yes" } else { "no" });
        writer.checksum()
    }

    /// Reads the object's bytes.
    pub fn decode(bytes: &[u8]) -> Result<RefObject, FormatError> {
        let (mut reader, version) = TextReader::new(WHAT, KIND, PLAIN..=MARKED, bytes)?;
        let image = reader.field("image")?.to_owned();
        let name = reader.field("name")?.to_owned();
        let commit = reader.parsed("commit", |text| match text {
            NONE if version == MARKED => Some(None),
            _ => text.parse().ok().map(Some),
        })?;
        let protected = version == MARKED
            && reader.parsed("protected", |text| match text {
                "yes" => Some(true),
                "no" => Some(false),
                _ => None,
            })?;
        let object = RefObject { image, name, commit, protected };
        reader.checksum()?;
        // One spelling for each ref: a plain one is never of version 2, and what is deleted is protected by nothing.
        if version == MARKED && object.commit.is_some() != object.protected {
            return Err(FormatError::Field { what: WHAT, field: "protected", value: protected.to_string() });
        }
        Ok(object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain() -> RefObject {
        RefObject::new("AMCC", "heads/main", CommitId::of(b"a commit"))
    }

    #[test]
    fn a_ref_survives_its_bytes_and_no_flipped_bit_does() {
        for object in
            [plain(), RefObject { protected: true, ..plain() }, RefObject { commit: None, ..plain() }]
        {
            let good = object.encode();
            assert_eq!(RefObject::decode(&good), Ok(object));
            for at in 0..good.len() * 8 {
                let mut bad = good.clone();
                bad[at / 8] ^= 1 << (at % 8);
                assert!(RefObject::decode(&bad).is_err(), "bit {at}");
            }
        }
    }

    #[test]
    fn a_plain_ref_is_what_every_build_reads() {
        assert!(plain().encode().starts_with(b"horcrux-ref 1\n"));
        let mut writer = TextWriter::new(KIND, MARKED);
        writer.field("image", "a").field("name", "heads/a").field("commit", CommitId::of(b"c"));
        writer.field("protected", "no");
        assert!(RefObject::decode(&writer.checksum()).is_err(), "a second spelling");
    }
}
