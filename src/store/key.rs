//! Keys: names of objects that can't leave the place they are in.
//!
//! Enters: any string. Leaves: a [`Key`] of plain segments, or an error that says what is wrong with it.
//! Invariant: no segment is empty, starts with `.`, or has a character with a meaning to a filesystem or a URL.

use std::fmt;
use std::sync::Arc;

/// The longest segment.
pub const MAX_SEGMENT_BYTES: usize = 128;
/// The longest key. Object stores take 1,024 bytes, and a place's own prefix comes out of that.
pub const MAX_KEY_BYTES: usize = 768;

/// Why a string is not a key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} can't be an object's key: {why}")]
pub struct KeyError {
    text: String,
    why: &'static str,
}

/// The name of an object: segments joined by `/`, as FORMAT.md says.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(Arc<str>);

/// The start of keys, for listings: whole segments, then perhaps a part of one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct KeyPrefix(Arc<str>);

fn bad_char(text: &str) -> bool {
    text.bytes().any(|byte| !(byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-')))
}

fn check_segment(segment: &str) -> Option<&'static str> {
    if segment.is_empty() { Some("a segment is empty") } else { check_partial(segment) }
}

fn check_partial(segment: &str) -> Option<&'static str> {
    if segment.len() > MAX_SEGMENT_BYTES {
        Some("a segment is too long")
    } else if segment.starts_with('.') {
        Some("a segment starts with a dot")
    } else if bad_char(segment) {
        Some("a character is not one of A-Z a-z 0-9 . _ -")
    } else {
        None
    }
}

fn error(text: &str, why: &'static str) -> KeyError {
    KeyError { text: text.chars().take(MAX_SEGMENT_BYTES).collect(), why }
}

impl Key {
    /// Checks a string.
    pub fn new(text: &str) -> Result<Key, KeyError> {
        if text.len() > MAX_KEY_BYTES {
            return Err(error(text, "it is too long"));
        }
        match text.split('/').find_map(check_segment) {
            Some(why) => Err(error(text, why)),
            None => Ok(Key(text.into())),
        }
    }

    /// The whole key.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Its segments.
    pub fn segments(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.0.split('/')
    }
}

impl KeyPrefix {
    /// Checks a string. The empty one is the prefix of all keys.
    pub fn new(text: &str) -> Result<KeyPrefix, KeyError> {
        if text.len() > MAX_KEY_BYTES {
            return Err(error(text, "it is too long"));
        }
        let (dir, partial) =
            text.rsplit_once('/').map_or((None, text), |(dir, partial)| (Some(dir), partial));
        let why =
            dir.and_then(|dir| dir.split('/').find_map(check_segment)).or_else(|| check_partial(partial));
        match why {
            Some(why) => Err(error(text, why)),
            None => Ok(KeyPrefix(text.into())),
        }
    }

    /// The whole prefix.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The whole segments of it, and the part after the last `/`.
    pub fn split(&self) -> (Option<&str>, &str) {
        self.0.rsplit_once('/').map_or((None, &self.0), |(dir, partial)| (Some(dir), partial))
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn hostile_keys_are_refused() {
        let long = "x".repeat(129);
        let deep = "x/".repeat(500) + "x";
        for bad in [
            "", "/", "a/", "/a", "a//b", "..", "a/../b", "./a", ".hidden", "a/.tmp-1", "a b", "a\0b", "a\\b",
            "a\nb", "ä", "%2e%2e", "a:b", "~", &long, &deep,
        ] {
            assert!(Key::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn keys_of_the_layout_are_taken() {
        for good in ["format", "images/AMCC/refs/heads/main", "a..b", "x_1.2-3", &"y".repeat(128)] {
            assert_eq!(Key::new(good).unwrap().as_str(), good);
        }
    }

    #[test]
    fn a_prefix_is_whole_segments_and_perhaps_a_part_of_one() {
        for good in ["", "images/", "images/AM", "a/b/c.."] {
            assert!(KeyPrefix::new(good).is_ok(), "{good:?}");
        }
        for bad in ["/", "a//", "..", "../", "a/../b", "a/.", "é"] {
            assert!(KeyPrefix::new(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn no_key_leaves_the_directory_it_is_joined_to(text in "\\PC{0,40}") {
            if let Ok(key) = Key::new(&text) {
                let path = std::path::Path::new("/root").join(key.as_str());
                prop_assert!(path.components().skip(2).all(|part| matches!(part, std::path::Component::Normal(_))));
                prop_assert_eq!(path.components().count(), 2 + key.segments().count());
            }
            let _ = KeyPrefix::new(&text);
        }
    }
}
