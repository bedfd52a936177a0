//! Condemned lists: the objects that one `gc` found unreachable, and how far their end is.
//!
//! Enters: the bytes of a list. Leaves: a [`CondemnedList`]. Invariants: an object is in it once; a list is at most [`MAX_CONDEMNED`] objects long, so it is read whole.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use super::text::{TextReader, TextWriter, parse_decimal};
use super::{CommitId, FormatError, NodeId, ObjectId};

const WHAT: &str = "condemned list";
const KIND: &str = "horcrux-condemned";
const VERSION: u64 = 1;
/// The most objects of one list; a `gc` makes as many lists as it needs.
pub const MAX_CONDEMNED: usize = 50_000;
/// The most pushes one list waits for.
pub const MAX_WAITS: usize = 1024;
/// The longest name of a hold that is waited for.
const MAX_HOLD_NAME: usize = 128;

/// One object that can be condemned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Condemned {
    /// A commit. Commits come first, here and when they are deleted: what is left of a deletion cut short has no head.
    Commit(CommitId),
    /// The prefetch list of a commit.
    Prefetch(CommitId),
    /// A node of a map.
    Node(NodeId),
    /// A base object.
    Object(ObjectId),
}

impl fmt::Display for Condemned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Condemned::Commit(id) => write!(f, "commit {id}"),
            Condemned::Prefetch(id) => write!(f, "prefetch {id}"),
            Condemned::Node(id) => write!(f, "map {id}"),
            Condemned::Object(id) => write!(f, "block {id}"),
        }
    }
}

impl FromStr for Condemned {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Condemned, FormatError> {
        let bad =
            || FormatError::Field { what: WHAT, field: "object", value: text.chars().take(80).collect() };
        let (kind, id) = text.split_once(' ').ok_or_else(bad)?;
        Ok(match kind {
            "commit" => Condemned::Commit(id.parse()?),
            "prefetch" => Condemned::Prefetch(id.parse()?),
            "map" => Condemned::Node(id.parse()?),
            "block" => Condemned::Object(id.parse()?),
            _ => return Err(bad()),
        })
    }
}

/// How far the end of a list's objects is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Published; which pushes were under way then is not known yet.
    Listed,
    /// The pushes that were under way, by the names of their holds: until they have ended nothing of it is deleted.
    Waiting(BTreeSet<String>),
    /// Being deleted, by one who renews it: the turn, one more each time. The first is a random number, so that no two sweeps write the same bytes.
    Sweeping(u64),
}

/// The content of a condemned list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CondemnedList {
    /// The image.
    pub image: String,
    /// When it was published, in seconds since 1970 by the clock of whoever keeps the store.
    pub since_s: u64,
    /// How far it is.
    pub stage: Stage,
    /// What it condemns.
    pub objects: BTreeSet<Condemned>,
}

impl CondemnedList {
    /// The object's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = TextWriter::new(KIND, VERSION);
        writer.field("image", &self.image).field("since", self.since_s);
        match &self.stage {
            Stage::Listed => writer.field("stage", "listed"),
            Stage::Waiting(holds) => {
                writer.field("stage", "waiting");
                for hold in holds {
                    writer.field("hold", hold);
                }
                &mut writer
            }
            Stage::Sweeping(turn) => writer.field("stage", "sweeping").field("turn", turn),
        };
        for object in &self.objects {
            writer.field("object", object);
        }
        writer.checksum()
    }

    /// Reads the object's bytes.
    pub fn decode(bytes: &[u8]) -> Result<CondemnedList, FormatError> {
        let too_many =
            |field, max: usize| FormatError::Field { what: WHAT, field, value: format!("more than {max}") };
        let (mut reader, _) = TextReader::new(WHAT, KIND, VERSION..=VERSION, bytes)?;
        let image = reader.field("image")?.to_owned();
        let since_s = reader.parsed("since", parse_decimal)?;
        let stage = match reader.field("stage")? {
            "listed" => Stage::Listed,
            "waiting" => {
                let mut holds = BTreeSet::new();
                while reader.next_is("hold") {
                    let hold = reader.parsed("hold", |text| (text.len() <= MAX_HOLD_NAME).then_some(text))?;
                    holds.insert(hold.to_owned());
                    if holds.len() > MAX_WAITS {
                        return Err(too_many("hold", MAX_WAITS));
                    }
                }
                Stage::Waiting(holds)
            }
            "sweeping" => Stage::Sweeping(reader.parsed("turn", parse_decimal)?),
            other => {
                let value = other.chars().take(80).collect();
                return Err(FormatError::Field { what: WHAT, field: "stage", value });
            }
        };
        let mut objects = BTreeSet::new();
        while reader.next_is("object") {
            objects.insert(reader.parsed("object", |text| text.parse().ok())?);
            if objects.len() > MAX_CONDEMNED {
                return Err(too_many("object", MAX_CONDEMNED));
            }
        }
        reader.checksum()?;
        Ok(CondemnedList { image, since_s, stage, objects })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_survives_its_bytes_in_each_stage() {
        let objects: BTreeSet<Condemned> = [
            Condemned::Commit(CommitId::of(b"c")),
            Condemned::Prefetch(CommitId::of(b"c")),
            Condemned::Node(NodeId::of(b"n")),
            Condemned::Object(ObjectId::of(b"o")),
        ]
        .into();
        for stage in [Stage::Listed, Stage::Waiting(["h-1".to_owned()].into()), Stage::Sweeping(4)] {
            let list = CondemnedList { image: "a".into(), since_s: 5, stage, objects: objects.clone() };
            let good = list.encode();
            assert_eq!(CondemnedList::decode(&good), Ok(list));
            for at in 0..good.len() {
                assert!(CondemnedList::decode(&good[..at]).is_err(), "cut at {at}");
                let mut bad = good.clone();
                bad[at] ^= 4;
                assert!(CondemnedList::decode(&bad).is_err(), "byte {at}");
            }
        }
    }

    #[test]
    fn the_longest_list_is_read_whole() {
        let line = format!("object prefetch {}\n", CommitId::of(b"c")).len();
        let hold = MAX_WAITS * (MAX_HOLD_NAME + 6);
        assert!(((line * MAX_CONDEMNED + hold + 1000) as u64) < crate::units::ByteLen(16 << 20).0);
    }
}
