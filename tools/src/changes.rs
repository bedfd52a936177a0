//! How `diff` and `show` print.
//!
//! Enters: changes. Leaves: patches, statistics, letters and paths, or one JSON array. Names are shown with what a terminal would obey as escapes; changed lines hold nothing of the kind.

use std::io::{self, Write};

use horcrux::files::FilePath;
use horcrux::files::diff::{Attribute, Change, Facts, Status};
use horcrux::files::ext4::Kind;
use horcrux::files::tree::shown;
use horcrux::format::{self, CommitId};
use horcrux::units::{ByteLen, ByteRange};
use serde::Serialize;

use crate::json::Array;
use crate::listing::time;

/// Signs at most in one line of `--stat`.
const SIGNS: u64 = 40;

/// In which form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A line for each file, and a sum.
    Stat,
    /// The changed lines.
    Patch {
        /// They follow the statistics.
        after_stat: bool,
    },
    /// A letter and a path.
    NameStatus,
    /// A JSON array.
    Json,
}

/// Prints changes.
pub struct Printer {
    form: Form,
    json: Array,
    counts: [u64; 6],
    lines: (u64, u64),
    printed: bool,
}

impl Printer {
    /// Prints them so.
    pub fn new(form: Form) -> Printer {
        Printer { form, json: Array::default(), counts: [0; 6], lines: (0, 0), printed: false }
    }

    /// Prints one.
    pub fn print(&mut self, change: &Change) -> io::Result<()> {
        match self.form {
            Form::Json => return self.json.item(change),
            Form::NameStatus => say!("{}\t{}", change.status.letter(), names(change, "\t")),
            Form::Stat => self.stat(change)?,
            Form::Patch { after_stat } => {
                if after_stat {
                    say!();
                }
                print_patch(change)?;
            }
        }
        self.printed = true;
        Ok(())
    }

    /// Ends, with the sums where they were asked for.
    pub fn end(self) -> io::Result<()> {
        match self.form {
            Form::Json => self.json.end(),
            Form::Stat if self.printed => self.sums(),
            _ => Ok(()),
        }
    }

    fn stat(&mut self, change: &Change) -> io::Result<()> {
        let at = [
            Status::Added,
            Status::Removed,
            Status::Modified,
            Status::Renamed,
            Status::TypeChanged,
            Status::Attributes,
        ]
        .iter()
        .position(|status| *status == change.status);
        self.counts[at.unwrap_or_default()] += 1;
        let name = names(change, " => ");
        let mut what = Vec::new();
        match change.lines {
            Some((insertions, deletions)) => {
                self.lines.0 += insertions;
                self.lines.1 += deletions;
                let all = insertions + deletions;
                let signs = |lines: u64| (lines * SIGNS.min(all) / all.max(1)) as usize;
                what.push(format!("{all} {}{}", "+".repeat(signs(insertions)), "-".repeat(signs(deletions))));
            }
            None if change.content => what.push(sizes(change)),
            None => {}
        }
        what.extend(details(change));
        if what.is_empty() {
            what.push("0".to_owned());
        }
        say!(" {} {name} | {}", change.status.letter(), what.join(", ").trim_end());
        Ok(())
    }

    fn sums(&self) -> io::Result<()> {
        let words = ["added", "removed", "modified", "renamed", "of another kind", "with other attributes"];
        let counted = self.counts.iter().zip(words).filter(|(count, _)| **count > 0);
        let counted: Vec<String> = counted.map(|(count, word)| format!("{count} {word}")).collect();
        let all: u64 = self.counts.iter().sum();
        let files = if all == 1 { "file" } else { "files" };
        let (insertions, deletions) = self.lines;
        let lines = if insertions + deletions > 0 {
            format!("; {insertions} insertions(+), {deletions} deletions(-)")
        } else {
            String::new()
        };
        say!(" {all} {files}: {}{lines}", counted.join(", "));
        Ok(())
    }
}

/// A directory's name ends in a slash.
fn name(path: &FilePath, facts: Option<&Facts>) -> String {
    if facts.is_some_and(|facts| facts.kind == Kind::Directory) && !path.is_root() {
        let mut bytes = path.as_bytes().to_vec();
        bytes.push(b'/');
        return shown(&bytes);
    }
    path.to_string()
}

fn names(change: &Change, between: &str) -> String {
    let new = name(&change.path, change.new.as_ref().or(change.old.as_ref()));
    match &change.old_path {
        Some(old) => format!("{}{between}{new}", name(old, change.old.as_ref())),
        None => new,
    }
}

fn sizes(change: &Change) -> String {
    let size = |facts: &Option<Facts>| facts.as_ref().map_or(0, |facts| facts.size);
    let size = (size(&change.old), size(&change.new));
    match change.status {
        Status::Added => ByteLen(size.1).human(),
        Status::Removed => format!("{} gone", ByteLen(size.0).human()),
        _ if size.0 == size.1 => format!("{} changed", ByteLen(size.0).human()),
        _ => format!("{} -> {}", ByteLen(size.0).human(), ByteLen(size.1).human()),
    }
}

/// What else is another.
fn details(change: &Change) -> Vec<String> {
    let (Some(old), Some(new)) = (&change.old, &change.new) else { return Vec::new() };
    let mut details = Vec::new();
    if old.kind != new.kind {
        details.push(format!("{} -> {}", old.kind.words(), new.kind.words()));
    }
    for attribute in &change.attributes {
        details.push(match attribute {
            Attribute::Mode => format!("mode {} -> {}", old.mode, new.mode),
            Attribute::Owner => format!("owner {}:{} -> {}:{}", old.uid, old.gid, new.uid, new.gid),
            Attribute::Xattrs => "extended attributes".to_owned(),
        });
    }
    details
}

/// As git writes it, but for what git does not know: owners and attributes.
fn print_patch(change: &Change) -> io::Result<()> {
    let old_path = change.old_path.as_ref().unwrap_or(&change.path);
    let side = |side: &str, path: &FilePath| shown(&[side.as_bytes(), path.as_bytes()].concat());
    let (a, b) = (side("a/", old_path), side("b/", &change.path));
    say!("diff --git {a} {b}");
    match (&change.old, &change.new) {
        (None, Some(new)) => say!("new {} mode {}", new.kind.words().trim_start_matches("a "), new.mode),
        (Some(old), None) => say!("deleted {} mode {}", old.kind.words().trim_start_matches("a "), old.mode),
        _ => {}
    }
    if change.old_path.is_some() {
        say!("rename from {old_path}");
        say!("rename to {}", change.path);
    }
    for detail in details(change) {
        say!("{detail}");
    }
    let gone = "/dev/null".to_owned();
    let a = if change.old.is_some() { a } else { gone.clone() };
    let b = if change.new.is_some() { b } else { gone };
    match &change.hunks {
        Some(hunks) if !hunks.is_empty() => {
            say!("--- {a}");
            say!("+++ {b}");
            io::stdout().write_all(hunks.as_bytes())?;
        }
        _ if change.binary => {
            say!("Binary files {a} and {b} differ ({})", sizes(change));
        }
        _ => {}
    }
    Ok(())
}

/// Prints ranges of a disk.
pub fn print_blocks(ranges: impl Iterator<Item = ByteRange>, json: bool) -> io::Result<()> {
    #[derive(Serialize)]
    struct Range {
        start: u64,
        len: u64,
    }
    let mut array = Array::default();
    let (mut count, mut bytes) = (0u64, 0);
    for range in ranges {
        let (start, len) = (range.start.0, range.len().0);
        (count, bytes) = (count + 1, bytes + len);
        if json {
            array.item(&Range { start, len })?;
        } else {
            say!("{start:>16} {len:>12}");
        }
    }
    if json {
        return array.end();
    }
    say!("{count} {}, {}", if count == 1 { "range" } else { "ranges" }, ByteLen(bytes).human());
    Ok(())
}

/// A commit, as `show` prints it.
#[derive(Serialize)]
pub struct Commit {
    commit: String,
    image: String,
    parents: Vec<String>,
    author: String,
    /// Seconds since 1970, UTC.
    time: f64,
    message: String,
    size: u64,
    filesystem: &'static str,
    #[serde(skip)]
    seconds: i64,
}

impl Commit {
    /// A commit of an image.
    pub fn new(id: CommitId, commit: &format::Commit, image: &str) -> Commit {
        let seconds = i64::try_from(commit.time.secs).unwrap_or(i64::MAX);
        Commit {
            commit: id.to_string(),
            image: image.to_owned(),
            parents: commit.parents.iter().map(CommitId::to_string).collect(),
            author: commit.author.clone(),
            time: commit.time.secs as f64 + f64::from(commit.time.nanos) / 1e9,
            message: commit.message.clone(),
            size: commit.size.0,
            filesystem: commit.filesystem.as_str(),
            seconds,
        }
    }

    /// Prints it, as git does.
    pub fn print(&self) -> io::Result<()> {
        say!("commit {}", self.commit);
        for parent in &self.parents {
            say!("parent {parent}");
        }
        say!("Image:  {}, {} of {}", self.image, ByteLen(self.size).human(), self.filesystem);
        say!("Author: {}", harmless(&self.author));
        // Past the year 9999 only by a wrong clock, or on purpose.
        const FURTHEST: i64 = 253_402_300_799;
        say!("Date:   {} UTC", time(self.seconds.min(FURTHEST)));
        say!();
        for line in self.message.lines() {
            say!("    {}", harmless(line));
        }
        Ok(())
    }

    /// Prints it as JSON, with what changed.
    pub fn print_json(&self, changes: Option<&[Change]>) -> io::Result<()> {
        #[derive(Serialize)]
        struct Shown<'c> {
            #[serde(flatten)]
            commit: &'c Commit,
            #[serde(skip_serializing_if = "Option::is_none")]
            changes: Option<&'c [Change]>,
        }
        serde_json::to_writer_pretty(io::stdout(), &Shown { commit: self, changes })?;
        say!();
        Ok(())
    }
}

/// Text of somebody else's without what a terminal would obey.
fn harmless(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\t' { '\u{fffd}' } else { c }).collect()
}
