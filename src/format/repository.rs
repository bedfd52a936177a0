//! The `format` object: what a repository is, and in which version.
//!
//! Enters: the bytes under the key `format`. Leaves: a [`RepositoryFormat`], or an error that names the version.

use super::FormatError;
use super::ids::{parse_hex, to_hex};
use super::text::{TextReader, TextWriter};

const WHAT: &str = "repository";
const KIND: &str = "horcrux-repository";
const VERSION: u64 = 1;

/// The content of a `format` object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RepositoryFormat {
    /// Random at creation; tells one repository from another at the same place.
    pub id: [u8; 16],
}

impl RepositoryFormat {
    /// The object's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = TextWriter::new(KIND, VERSION);
        writer.field("id", to_hex(&self.id));
        writer.checksum()
    }

    /// Reads the object's bytes.
    pub fn decode(bytes: &[u8]) -> Result<RepositoryFormat, FormatError> {
        let (mut reader, _) = TextReader::new(WHAT, KIND, VERSION..=VERSION, bytes)?;
        let id = reader.parsed("id", parse_hex::<16>)?;
        reader.checksum()?;
        Ok(RepositoryFormat { id })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_object_survives_its_bytes() {
        let format = RepositoryFormat { id: [0xa7; 16] };
        assert_eq!(RepositoryFormat::decode(&format.encode()), Ok(format));
    }

    #[test]
    fn a_repository_of_the_future_is_refused_by_its_number() {
        let text = format!("horcrux-repository 2\nid {}\n", "0".repeat(32));
        let error = RepositoryFormat::decode(text.as_bytes()).unwrap_err();
        assert_eq!(error.to_string(), "repository version 2, this build reads 1..=1");
    }
}
