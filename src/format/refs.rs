//! Refs: the names that move. A branch or a tag of an image, and the commit it names.
//!
//! Enters: the bytes under a ref's key. Leaves: a [`RefObject`] that says whose ref it is; the caller compares that with the key it read,
//! so a ref copied over another is found.

use super::text::{TextReader, TextWriter};
use super::{CommitId, FormatError};

const WHAT: &str = "ref";
const KIND: &str = "horcrux-ref";
const VERSION: u64 = 1;

/// The content of a ref.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefObject {
    /// The image it belongs to.
    pub image: String,
    /// Its name below `refs/`: `heads/main`, `tags/v1`.
    pub name: String,
    /// The commit it names.
    pub commit: CommitId,
}

impl RefObject {
    /// The object's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = TextWriter::new(KIND, VERSION);
        writer.field("image", &self.image).field("name", &self.name).field("commit", self.commit);
        writer.checksum()
    }

    /// Reads the object's bytes.
    pub fn decode(bytes: &[u8]) -> Result<RefObject, FormatError> {
        let (mut reader, _) = TextReader::new(WHAT, KIND, VERSION..=VERSION, bytes)?;
        let image = reader.field("image")?.to_owned();
        let name = reader.field("name")?.to_owned();
        let commit = reader.parsed("commit", |text| text.parse().ok())?;
        reader.checksum()?;
        Ok(RefObject { image, name, commit })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ref_survives_its_bytes_and_no_flipped_bit_does() {
        let object =
            RefObject { image: "AMCC".into(), name: "heads/main".into(), commit: CommitId::of(b"a commit") };
        let good = object.encode();
        assert_eq!(RefObject::decode(&good), Ok(object));
        for at in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[at / 8] ^= 1 << (at % 8);
            assert!(RefObject::decode(&bad).is_err(), "bit {at}");
        }
    }
}
