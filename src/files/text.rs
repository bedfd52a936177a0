//! What changed in a text, line by line.
//!
//! Enters: two contents. Leaves: hunks as `diff -u` writes them, or that they are no text. Invariant: what comes out holds nothing a terminal would obey; time and memory are bounded by
//! [`MAX_TEXT`] and [`LIMIT`]: past it the hunks are right, but longer than need be.

use std::time::Duration;

use similar::TextDiff;

/// A longer file is treated as no text.
pub(super) const MAX_TEXT: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_millis(500);
/// Lines of context around a change.
const CONTEXT: usize = 3;

/// What changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lines {
    pub(super) insertions: u64,
    pub(super) deletions: u64,
    pub(super) hunks: String,
}

/// The bytes as text, if a terminal may be shown them.
fn text(bytes: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(bytes).ok()?;
    let harmless = |c: char| !c.is_control() || matches!(c, '\n' | '\t' | '\r' | '\x0c');
    text.chars().all(harmless).then_some(text)
}

/// Compares two contents; `None` where one of them is no text. Takes a while: for a blocking thread.
pub(super) fn compare(old: &[u8], new: &[u8]) -> Option<Lines> {
    let (old, new) = (text(old)?, text(new)?);
    let diff = TextDiff::configure().timeout(LIMIT).diff_lines(old, new);
    let (mut insertions, mut deletions) = (0, 0);
    for change in diff.iter_all_changes() {
        match change.tag() {
            similar::ChangeTag::Insert => insertions += 1,
            similar::ChangeTag::Delete => deletions += 1,
            similar::ChangeTag::Equal => {}
        }
    }
    let hunks = diff.unified_diff().context_radius(CONTEXT).to_string();
    Some(Lines { insertions, deletions, hunks })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_line_is_shown_with_its_neighbours() {
        let lines = compare(b"1\n2\n3\n4\n5\n6\n7\n8\n9\n", b"1\n2\n3\n4\nfive\n6\n7\n8\n9\n").unwrap();
        assert_eq!((lines.insertions, lines.deletions), (1, 1));
        assert_eq!(lines.hunks, "@@ -2,7 +2,7 @@\n 2\n 3\n 4\n-5\n+five\n 6\n 7\n 8\n");
    }

    #[test]
    fn what_a_terminal_would_obey_is_no_text() {
        for bytes in [&b"\x1b[31m"[..], b"a\0b", b"\xff", "\u{9b}".as_bytes()] {
            assert_eq!(compare(bytes, b""), None, "{bytes:?}");
        }
        assert!(compare(b"\t\r\n", "ü\n".as_bytes()).is_some());
    }
}
