//! Text objects: lines of `key value` in one exact order, the form of `format`, refs and commits.
//!
//! Enters: bytes of an object, not trusted. Leaves: its values, in order, or a [`FormatError`] naming the field.
//! Invariant: what [`TextReader`] accepts is byte for byte what [`TextWriter`] would write for the same values, so an object has
//! one spelling and one hash.

use std::fmt::{Display, Write};

use super::FormatError;

/// The key of the last line of a checksummed text object.
const CHECKSUM: &str = "checksum";

/// The longest piece of a bad value that is quoted in an error.
const QUOTED_CHARS: usize = 80;

/// Builds a text object.
#[derive(Debug)]
pub struct TextWriter {
    text: String,
}

impl TextWriter {
    /// Starts with the line of kind and version.
    pub fn new(kind: &str, version: u64) -> TextWriter {
        TextWriter { text: format!("{kind} {version}\n") }
    }

    /// Adds one line.
    pub fn field(&mut self, key: &str, value: impl Display) -> &mut TextWriter {
        // Writing to a String can't fail.
        let _ = writeln!(self.text, "{key} {value}");
        self
    }

    /// Ends the object with an empty line and free text.
    pub fn body(mut self, body: &str) -> Vec<u8> {
        self.text.push('\n');
        self.text.push_str(body);
        self.text.into_bytes()
    }

    /// Ends the object with the CRC-32 of all lines so far.
    pub fn checksum(mut self) -> Vec<u8> {
        let crc = crc32fast::hash(self.text.as_bytes());
        self.field(CHECKSUM, format_args!("{crc:08x}"));
        self.text.into_bytes()
    }
}

/// Takes a text object apart, line by line.
#[derive(Debug)]
pub struct TextReader<'a> {
    what: &'static str,
    all: &'a [u8],
    at: usize,
}

impl<'a> TextReader<'a> {
    /// Reads the first line: `kind` and a version within `versions`, which is returned.
    pub fn new(
        what: &'static str,
        kind: &str,
        versions: std::ops::RangeInclusive<u64>,
        bytes: &'a [u8],
    ) -> Result<(TextReader<'a>, u64), FormatError> {
        let mut reader = TextReader { what, all: bytes, at: 0 };
        let line = reader.line("version").map_err(|_| FormatError::Magic { what })?;
        let version = line.strip_prefix(kind).and_then(|rest| rest.strip_prefix(' '));
        let found = version.and_then(parse_decimal).ok_or(FormatError::Magic { what })?;
        if !versions.contains(&found) {
            return Err(FormatError::Version { what, found, min: *versions.start(), max: *versions.end() });
        }
        Ok((reader, found))
    }

    fn bad(&self, field: &'static str, value: &str) -> FormatError {
        FormatError::Field { what: self.what, field, value: value.chars().take(QUOTED_CHARS).collect() }
    }

    /// The next line without its `\n`.
    fn line(&mut self, field: &'static str) -> Result<&'a str, FormatError> {
        let rest = &self.all[self.at..];
        let Some(len) = rest.iter().position(|&byte| byte == b'\n') else {
            return Err(self.bad(field, "cut off"));
        };
        let line = std::str::from_utf8(&rest[..len]).map_err(|_| self.bad(field, "not UTF-8"))?;
        self.at += len + 1;
        Ok(line)
    }

    /// Whether the next line has this key.
    pub fn next_is(&self, key: &str) -> bool {
        let rest = &self.all[self.at..];
        rest.strip_prefix(key.as_bytes()).is_some_and(|rest| rest.first() == Some(&b' '))
    }

    /// The value of the next line, whose key must be `key`. It is not empty and has no blank at either end.
    pub fn field(&mut self, key: &'static str) -> Result<&'a str, FormatError> {
        let line = self.line(key)?;
        let value = line.strip_prefix(key).and_then(|rest| rest.strip_prefix(' '));
        let value = value.ok_or_else(|| self.bad(key, line))?;
        if value.is_empty() || value.starts_with(' ') || value.ends_with(' ') {
            return Err(self.bad(key, value));
        }
        Ok(value)
    }

    /// The next line's value through `parse`, which answers `None` for a value that can't be.
    pub fn parsed<T>(
        &mut self,
        key: &'static str,
        parse: impl FnOnce(&'a str) -> Option<T>,
    ) -> Result<T, FormatError> {
        let value = self.field(key)?;
        parse(value).ok_or_else(|| self.bad(key, value))
    }

    /// The empty line, and all that follows it as text of at most `max` bytes.
    pub fn body(mut self, key: &'static str, max: usize) -> Result<&'a str, FormatError> {
        let line = self.line(key)?;
        if !line.is_empty() {
            return Err(self.bad(key, line));
        }
        let rest = &self.all[self.at..];
        if rest.len() > max {
            return Err(self.bad(key, &format!("{} bytes long", rest.len())));
        }
        std::str::from_utf8(rest).map_err(|_| self.bad(key, "not UTF-8"))
    }

    /// The last line: the CRC-32 of every byte before it. Nothing may follow.
    pub fn checksum(mut self) -> Result<(), FormatError> {
        let covered = &self.all[..self.at];
        let given = self.parsed(CHECKSUM, super::ids::parse_hex::<4>)?;
        if self.at != self.all.len() {
            return Err(self.bad(CHECKSUM, "followed by more bytes"));
        }
        if u32::from_be_bytes(given) != crc32fast::hash(covered) {
            return Err(FormatError::Checksum { what: self.what });
        }
        Ok(())
    }
}

/// Parses digits without sign or leading zeros.
pub fn parse_decimal(text: &str) -> Option<u64> {
    let plain = text == "0" || (!text.starts_with('0') && text.bytes().all(|byte| byte.is_ascii_digit()));
    if plain { text.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let mut writer = TextWriter::new("some-kind", 1);
        writer.field("a", 1).field("b", "two words");
        writer.checksum()
    }

    fn read(bytes: &[u8]) -> Result<(String, String), FormatError> {
        let (mut reader, _) = TextReader::new("sample", "some-kind", 1..=1, bytes)?;
        let out = (reader.field("a")?.to_owned(), reader.field("b")?.to_owned());
        reader.checksum()?;
        Ok(out)
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_refused() {
        let good = sample();
        assert!(read(&good).is_ok());
        for at in 0..good.len() {
            assert!(read(&good[..at]).is_err(), "cut at {at}");
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                assert!(read(&bad).is_err(), "byte {at} bit {bit}");
            }
        }
        assert!(read(&[good.as_slice(), b"\n"].concat()).is_err());
    }

    #[test]
    fn an_unknown_version_is_refused_by_number_before_anything_else() {
        let error = read(b"some-kind 7\ngarbage").unwrap_err();
        assert_eq!(error, FormatError::Version { what: "sample", found: 7, min: 1, max: 1 });
    }

    #[test]
    fn numbers_have_one_spelling() {
        for bad in ["", "00", "01", "+1", "-1", " 1", "1 ", "0x1", "18446744073709551616"] {
            assert_eq!(parse_decimal(bad), None, "{bad:?}");
        }
        assert_eq!(parse_decimal("18446744073709551615"), Some(u64::MAX));
        assert_eq!(parse_decimal("0"), Some(0));
    }
}
