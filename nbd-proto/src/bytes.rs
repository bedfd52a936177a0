//! Big-endian numbers in and out of byte slices.
//!
//! Enters: a slice of a message already bounded. Leaves: numbers and sub-slices, or `None` where it is too short.
//! Invariant: nothing here panics on a short slice; the fixed-offset readers take arrays, so their offsets are checked
//! against a length the compiler knows.

/// Reads a `u16` at a fixed place of a header.
#[inline(always)]
pub(crate) fn u16_at<const N: usize>(b: &[u8; N], at: usize) -> u16 {
    u16::from_be_bytes([b[at], b[at + 1]])
}

/// Reads a `u32` at a fixed place of a header.
#[inline(always)]
pub(crate) fn u32_at<const N: usize>(b: &[u8; N], at: usize) -> u32 {
    u32::from_be_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

/// Reads a `u64` at a fixed place of a header.
#[inline(always)]
pub(crate) fn u64_at<const N: usize>(b: &[u8; N], at: usize) -> u64 {
    u64::from_be_bytes([b[at], b[at + 1], b[at + 2], b[at + 3], b[at + 4], b[at + 5], b[at + 6], b[at + 7]])
}

/// Takes numbers and slices off the front of a message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Reader(bytes)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Option<&'a [u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(head)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(|b| u16::from_be_bytes(*b))
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(|b| u32::from_be_bytes(*b))
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(|b| u64::from_be_bytes(*b))
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }

    pub(crate) fn rest(self) -> &'a [u8] {
        self.0
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A string of the protocol: UTF-8, no NUL, at most [`crate::wire::MAX_STRING`] bytes.
pub(crate) fn string(bytes: &[u8]) -> Option<&str> {
    if bytes.len() > crate::wire::MAX_STRING || bytes.contains(&0) {
        return None;
    }
    std::str::from_utf8(bytes).ok()
}

/// The part of our own `text` that fits a string of the protocol.
pub(crate) fn clip(text: &str) -> &str {
    let text = text.split('\0').next().unwrap_or_default();
    let mut end = text.len().min(crate::wire::MAX_STRING);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clipped_text_ends_on_a_character_and_before_a_nul() {
        let long = "é".repeat(3000);
        assert_eq!(clip(&long).len(), 4096);
        let odd = format!("x{long}");
        assert_eq!(clip(&odd).len(), 4095);
        assert_eq!(clip("ab\0cd"), "ab");
    }

    #[test]
    fn a_reader_gives_nothing_past_its_end() {
        let mut r = Reader::new(&[0, 1, 2]);
        assert_eq!(r.u32(), None);
        assert_eq!(r.u16(), Some(1));
        assert_eq!(r.bytes(2), None);
        assert_eq!(r.bytes(1), Some(&[2u8][..]));
        assert!(r.is_empty());
    }
}
