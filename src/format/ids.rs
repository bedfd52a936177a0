//! Ids are types, one per kind: a chunk's id can't be looked up as a commit's.
//!
//! Every id is the BLAKE3 of exact bytes; as text it is 64 lower-case hex digits.

use std::fmt;
use std::str::FromStr;

use super::FormatError;

fn hex_digit(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    }
}

/// Parses exactly `2 * N` lower-case hex digits.
pub fn parse_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let mut out = [0; N];
    for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = hex_digit(pair[0])? << 4 | hex_digit(pair[1])?;
    }
    Some(out)
}

/// Writes bytes as lower-case hex digits.
pub fn to_hex(bytes: &[u8]) -> String {
    use fmt::Write;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a String can't fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 32]);

        impl $name {
            /// What this names, for messages.
            pub const WHAT: &'static str = $what;

            /// The id of these bytes.
            pub fn of(bytes: &[u8]) -> $name {
                $name(*blake3::hash(bytes).as_bytes())
            }

            /// Checks that `bytes` are what this id names.
            pub fn check(&self, bytes: &[u8]) -> Result<(), FormatError> {
                let actual = $name::of(bytes);
                if actual == *self {
                    return Ok(());
                }
                Err(FormatError::Hash { what: $what, expected: self.to_string(), actual: actual.to_string() })
            }

            /// The 32 bytes.
            pub const fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&to_hex(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), &to_hex(&self.0[..6]))
            }
        }

        impl FromStr for $name {
            type Err = FormatError;

            fn from_str(text: &str) -> Result<$name, FormatError> {
                parse_hex(text).map($name).ok_or_else(|| FormatError::Field {
                    what: $what,
                    field: "id",
                    value: text.chars().take(80).collect(),
                })
            }
        }
    };
}

id! {
    /// Names a chunk's content, zero-padded to the chunk size.
    ChunkId, "chunk"
}
id! {
    /// Names a base object.
    ObjectId, "base object"
}
id! {
    /// Names a block's chunk table.
    TableId, "chunk table"
}
id! {
    /// Names a node of a block map.
    NodeId, "block map node"
}
id! {
    /// Names a commit.
    CommitId, "commit"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_survives_its_text_form() {
        let id = ChunkId::of(b"some bytes");
        assert_eq!(id.to_string().parse::<ChunkId>(), Ok(id));
    }

    #[test]
    fn upper_case_short_and_long_hex_are_refused() {
        for bad in ["", "AB", &"A".repeat(64), &"a".repeat(63), &"a".repeat(65), &"é".repeat(32)] {
            assert!(bad.parse::<CommitId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn bytes_of_another_id_are_named_in_the_error() {
        let error = NodeId::of(b"one").check(b"two").unwrap_err();
        assert!(error.to_string().contains(&NodeId::of(b"two").to_string()), "{error}");
    }
}
