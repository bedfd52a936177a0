//! Holds: what a push under way, or a reader of a version that no ref names, leaves in the repository, so that `gc` waits for it.
//!
//! Enters: the bytes of a hold. Leaves: a [`HoldObject`]. Invariant: equal holds have equal bytes; the turn makes each renewal another content.

use super::text::{TextReader, TextWriter, parse_decimal};
use super::{CommitId, FormatError};

const WHAT: &str = "hold";
const KIND: &str = "horcrux-hold";
const VERSION: u64 = 1;
/// The most commits one hold can name.
pub const MAX_HELD: usize = 16;

/// What a hold is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HoldKind {
    /// Objects are being written, or a ref is about to move: nothing that was found unreachable since it was taken is deleted before it ends.
    Push,
    /// The commits it names are as good as named by a ref.
    Read,
}

impl HoldKind {
    fn as_str(self) -> &'static str {
        match self {
            HoldKind::Push => "push",
            HoldKind::Read => "read",
        }
    }
}

/// The content of a hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HoldObject {
    /// The image it is in.
    pub image: String,
    /// What it is for.
    pub kind: HoldKind,
    /// The commits that are read.
    pub commits: Vec<CommitId>,
    /// Who has it: user, host and process, for people.
    pub holder: String,
    /// Seconds after its last renewal in which it counts.
    pub ttl_s: u64,
    /// How often it was renewed.
    pub turn: u64,
}

impl HoldObject {
    /// The object's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = TextWriter::new(KIND, VERSION);
        writer.field("image", &self.image).field("kind", self.kind.as_str());
        for commit in &self.commits {
            writer.field("commit", commit);
        }
        writer.field("holder", &self.holder).field("ttl", self.ttl_s).field("turn", self.turn);
        writer.checksum()
    }

    /// Reads the object's bytes.
    pub fn decode(bytes: &[u8]) -> Result<HoldObject, FormatError> {
        let (mut reader, _) = TextReader::new(WHAT, KIND, VERSION..=VERSION, bytes)?;
        let image = reader.field("image")?.to_owned();
        let kind = reader.parsed("kind", |text| {
            [HoldKind::Push, HoldKind::Read].into_iter().find(|kind| kind.as_str() == text)
        })?;
        let mut commits = Vec::new();
        while reader.next_is("commit") {
            if commits.len() == MAX_HELD {
                let value = format!("more than {MAX_HELD}");
                return Err(FormatError::Field { what: WHAT, field: "commit", value });
            }
            commits.push(reader.parsed("commit", |text| text.parse().ok())?);
        }
        let holder = reader.field("holder")?.to_owned();
        let ttl_s = reader.parsed("ttl", parse_decimal)?;
        let turn = reader.parsed("turn", parse_decimal)?;
        reader.checksum()?;
        Ok(HoldObject { image, kind, commits, holder, ttl_s, turn })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hold_survives_its_bytes_and_no_flipped_bit_does() {
        let push = HoldObject {
            image: "AMCC".into(),
            kind: HoldKind::Push,
            commits: Vec::new(),
            holder: "jo@host (17)".into(),
            ttl_s: 3600,
            turn: 3,
        };
        let read = HoldObject { kind: HoldKind::Read, commits: vec![CommitId::of(b"c")], ..push.clone() };
        for hold in [push, read] {
            let good = hold.encode();
            assert_eq!(HoldObject::decode(&good), Ok(hold));
            for at in 0..good.len() * 8 {
                let mut bad = good.clone();
                bad[at / 8] ^= 1 << (at % 8);
                assert!(HoldObject::decode(&bad).is_err(), "bit {at}");
            }
        }
    }
}
