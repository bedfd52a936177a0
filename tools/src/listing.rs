//! How `ls` prints.
//!
//! Enters: entries. Leaves: lines, or one JSON array. Names are shown with what a terminal would obey as escapes.

use std::io;

use horcrux::files::ext4::Kind;
use horcrux::files::list::Entry;
use horcrux::files::tree::shown;

use crate::json::Array;

/// Prints entries.
pub struct Printer {
    long: bool,
    /// Whole paths, not names alone.
    paths: bool,
    json: Option<Array>,
}

impl Printer {
    /// Prints them so.
    pub fn new(long: bool, paths: bool, json: bool) -> Printer {
        Printer { long, paths, json: json.then(Array::default) }
    }

    /// Prints one.
    pub fn print(&mut self, entry: &Entry) -> io::Result<()> {
        if let Some(json) = &mut self.json {
            return json.item(entry);
        }
        let name = if self.paths || entry.path.is_root() {
            entry.path.to_string()
        } else {
            shown(entry.path.name())
        };
        match &entry.details {
            Some(details) if self.long => {
                let size = match details.device {
                    Some((major, minor)) => format!("{major}, {minor}"),
                    None => details.size.to_string(),
                };
                let mode = entry.kind.map_or_else(String::new, |kind| letters(kind, &details.mode));
                let target = match &details.target {
                    Some(target) => format!(" -> {}", shown(target.as_bytes())),
                    None => String::new(),
                };
                let (links, uid, gid) = (details.links, details.uid, details.gid);
                let time = time(details.modified_s);
                say!("{mode} {links:>3} {uid:>6} {gid:>6} {size:>12} {time} {name}{target}");
            }
            _ => say!("{name}"),
        }
        Ok(())
    }

    /// Ends.
    pub fn end(self) -> io::Result<()> {
        match self.json {
            Some(json) => json.end(),
            None => Ok(()),
        }
    }
}

/// `drwxr-xr-x`.
fn letters(kind: Kind, octal: &str) -> String {
    let mode = u16::from_str_radix(octal, 8).unwrap_or_default();
    let mut text = String::from(kind.letter());
    for (shift, special, set, unset) in [(6, 0o4000, 's', 'S'), (3, 0o2000, 's', 'S'), (0, 0o1000, 't', 'T')]
    {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (bits & 1 != 0, mode & special != 0) {
            (true, true) => set,
            (false, true) => unset,
            (true, false) => 'x',
            (false, false) => '-',
        });
    }
    text
}

/// A moment in UTC, as `2026-11-23 16:05:09`.
pub fn time(seconds: i64) -> String {
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = date(days);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", second / 3600, second / 60 % 60, second % 60)
}

/// The date of a day counted from 1970-01-01, in the Gregorian calendar. The year is taken to begin in March: a leap day is then its last.
fn date(days: i64) -> (i64, i64, i64) {
    const OF_400_YEARS: i64 = 146_097;
    const TO_MARCH_0000: i64 = 719_468;
    let days = days + TO_MARCH_0000;
    let (era, day) = (days.div_euclid(OF_400_YEARS), days.rem_euclid(OF_400_YEARS));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (era * 400 + year + next, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, expected) in [
            (0, "1970-01-01 00:00:00"),
            (-1, "1969-12-31 23:59:59"),
            (951_782_400, "2000-02-29 00:00:00"),
            (1_709_251_199, "2024-02-29 23:59:59"),
            (4_107_542_400, "2100-03-01 00:00:00"),
            (1_795_449_909, "2026-11-23 16:05:09"),
        ] {
            assert_eq!(time(seconds), expected);
        }
    }

    #[test]
    fn modes_are_written_as_ls_writes_them() {
        for (kind, octal, expected) in [
            (Kind::File, "0644", "-rw-r--r--"),
            (Kind::Directory, "1777", "drwxrwxrwt"),
            (Kind::File, "4755", "-rwsr-xr-x"),
            (Kind::File, "2644", "-rw-r-Sr--"),
            (Kind::Link, "0777", "lrwxrwxrwx"),
        ] {
            assert_eq!(letters(kind, octal), expected);
        }
    }
}
