//! What the commands on a repository have in common: opening it, its errors and their hints, who one is, times and durations as people write them.
//!
//! Enters: what the user gave. Leaves: an open repository, or an error that says what to do.

use std::time::Duration;

use horcrux::format::{FormatError, Timestamp};
use horcrux::repo::{HoldOptions, ImageName, MetaCache, NoMetaCache, RepoError, Repository};
use horcrux::store::{self, StoreError, UrlError};
use serde::Serialize;
use time::OffsetDateTime;

/// Digits of a commit's id where it is for people.
pub const SHORT: usize = 12;

/// Which repository.
#[derive(clap::Args)]
pub struct Access {
    /// The repository: a directory, file:///dir, scp://..., s3://... or minio://...
    #[arg(long, value_name = "REPO")]
    pub access: String,
}

/// Why it did not work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Url(#[from] UrlError),
    #[error(transparent)]
    Repo(#[from] RepoError),
    #[error("{0}")]
    Usage(&'static str),
    #[error("{problems} {} wrong with {place}", if *.problems == 1 { "thing is" } else { "things are" })]
    Damaged { problems: usize, place: String },
    #[error("can't start: {0}")]
    Runtime(std::io::Error),
    #[error("can't print: {0}")]
    Print(#[from] std::io::Error),
}

impl Error {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Error::Repo(error) => return repo_hint(error),
            Error::Damaged { .. } => {
                "'horcrux-cli sync' from a copy of the repository brings back what is missing; what is damaged must be deleted there first"
            }
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

/// What to do about an error of a repository.
pub fn repo_hint(error: &RepoError) -> Option<String> {
    Some(match error {
        RepoError::NotMerged { branch, .. } => format!(
            "'-d {branch} --force' deletes it all the same; a tag or another branch at its commit keeps what it has"
        ),
        RepoError::Protected { tag, .. } => format!("'tag --unprotect NAME {tag}' first"),
        RepoError::Swept { .. } | RepoError::HoldLapsed { .. } => {
            "run it again: what is missing is written again".to_owned()
        }
        RepoError::SweepUnderWay { .. } => "run it again when that gc is done".to_owned(),
        RepoError::NameTaken { kind: "branch", name, .. } => {
            format!("'branch -d {name}' deletes it first; a push moves it")
        }
        RepoError::NameTaken { .. } | RepoError::TagExists { .. } => "choose another name".to_owned(),
        RepoError::NotFastForward { .. } => {
            "someone moved it in the meantime: look at 'log', and run it again".to_owned()
        }
        RepoError::Missing { .. } => "'horcrux-cli fsck --access REPO' says what else is missing".to_owned(),
        RepoError::Damaged { source: FormatError::Version { .. }, .. } => {
            "it was written by a newer Horcrux; use that one".to_owned()
        }
        RepoError::Store(StoreError::Conflict { .. }) => {
            "someone changed it in the meantime: run it again".to_owned()
        }
        _ => return None,
    })
}

impl Access {
    /// Opens it, and does something with it.
    pub fn run<T>(&self, work: impl AsyncFnOnce(Repository) -> Result<T, Error>) -> Result<T, Error> {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Error::Runtime)?;
        runtime.block_on(async {
            let repository = Repository::open(store::url::open(&self.access)?).await?;
            work(repository).await
        })
    }
}

/// Remembers nothing: a command reads each thing once.
pub fn no_cache() -> std::sync::Arc<dyn MetaCache> {
    std::sync::Arc::new(NoMetaCache)
}

/// That an image is there; else an error that names those that are.
pub async fn check_image(repo: &Repository, image: &ImageName) -> Result<(), RepoError> {
    if repo.branches(image).await?.is_empty() && repo.tags(image).await?.is_empty() {
        let has = repo.images().await?.iter().map(ToString::to_string).collect();
        return Err(RepoError::NoImage { place: repo.describe(), image: image.to_string(), has });
    }
    Ok(())
}

/// Who this is, for whoever waits for it.
pub fn holder() -> String {
    format!("{} (process {})", crate::image::default_author(), std::process::id())
}

/// How a hold is taken here.
pub fn hold() -> HoldOptions {
    HoldOptions::new(holder())
}

/// Prints a value as JSON.
pub fn print_json(value: &impl Serialize) -> Result<(), Error> {
    serde_json::to_writer_pretty(std::io::stdout(), value).map_err(std::io::Error::from)?;
    say!();
    Ok(())
}

/// A moment in UTC, `2026-01-31 23:59:59`.
pub fn at(secs: u64) -> String {
    let time = i64::try_from(secs).ok().and_then(|secs| OffsetDateTime::from_unix_timestamp(secs).ok());
    let Some(time) = time else { return format!("{secs} s after 1970") };
    let (date, (hour, minute, second)) = (time.date(), time.time().as_hms());
    let (year, month, day) = (date.year(), u8::from(date.month()), date.day());
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
}

/// When a commit was made.
pub fn time_of(time: &Timestamp) -> String {
    at(time.secs)
}

/// `14d`, `36h`, `90m`, `30s` or `0`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let units = [("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)];
    let parsed = units.iter().find_map(|(unit, secs)| {
        let number: u64 = text.strip_suffix(unit)?.parse().ok()?;
        number.checked_mul(*secs).filter(|secs| *secs <= 100 * 366 * 86_400)
    });
    match parsed {
        Some(secs) => Ok(Duration::from_secs(secs)),
        None if text == "0" => Ok(Duration::ZERO),
        None => Err("a time is a number and d, h, m or s: 14d, 36h".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_durations_are_as_people_write_them() {
        assert_eq!(at(1_735_689_600), "2025-01-01 00:00:00");
        assert_eq!(duration("14d"), Ok(Duration::from_secs(14 * 86_400)));
        assert_eq!(duration("0"), Ok(Duration::ZERO));
        for bad in ["", "14", "d", "-1d", "1.5h", "99999999999d", "1w"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
