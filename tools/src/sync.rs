//! `sync`: a repository, or one image of it, copied to another place.
//!
//! Enters: two repositories. Leaves: the second with all the first has, and a summary. It can be stopped and run again.

use std::time::{Duration, Instant};

use horcrux::repo::sync::{SyncReport, sync};
use horcrux::repo::{ImageName, RepoError, Repository};
use horcrux::store::{self, UrlError};
use horcrux::units::ByteLen;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// `sync`.
#[derive(clap::Args)]
pub struct Sync {
    /// Repository to copy
    #[arg(long, value_name = "REPO")]
    from: String,
    /// Repository to copy it to; made, as the same repository, if it is not there
    #[arg(long, value_name = "REPO")]
    to: String,
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
    /// The only image to copy
    name: Option<ImageName>,
}

/// Why it did not work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Url(#[from] UrlError),
    #[error(transparent)]
    Repo(#[from] RepoError),
    #[error("not a fast-forward: {} has moved on by itself there", .0.join(", "))]
    Diverged(Vec<String>),
    #[error("can't start: {0}")]
    Runtime(std::io::Error),
    #[error("can't print the summary: {0}")]
    Print(#[from] std::io::Error),
}

impl Error {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Repo(RepoError::OtherRepository { .. }) => Some("sync to a new place".to_owned()),
            Error::Diverged(_) => Some("everything else was copied; bring that branch here first".to_owned()),
            Error::Repo(RepoError::Store(error)) if error.is_transient() => {
                Some("run it again: what was copied already is not copied twice".to_owned())
            }
            _ => None,
        }
    }
}

impl Sync {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        let began = Instant::now();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Error::Runtime)?;
        let spinner = spinner();
        let progress = |bytes: ByteLen| spinner.inc(bytes.0);
        let report = runtime.block_on(async {
            let from = Repository::open(store::url::open(&self.from)?).await?;
            let to = store::url::open(&self.to)?;
            Ok::<_, Error>(sync(&from, to, self.name.as_ref(), &progress).await?)
        })?;
        spinner.finish_and_clear();
        print(&report, began.elapsed(), self.json)?;
        if report.diverged.is_empty() { Ok(()) } else { Err(Error::Diverged(report.diverged)) }
    }
}

/// On a terminal; indicatif shows nothing elsewhere.
pub(crate) fn spinner() -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {bytes} copied, {binary_bytes_per_sec}") {
        bar.set_style(style);
    }
    bar
}

/// The summary, as `--json` prints it.
#[derive(Serialize)]
struct Summary<'r> {
    images: u64,
    copied_objects: u64,
    copied_bytes: u64,
    present_objects: u64,
    refs_moved: u64,
    diverged: &'r [String],
    seconds: f64,
}

fn print(report: &SyncReport, took: Duration, json: bool) -> Result<(), Error> {
    if json {
        let summary = Summary {
            images: report.images,
            copied_objects: report.copied,
            copied_bytes: report.copied_bytes,
            present_objects: report.present,
            refs_moved: report.refs,
            diverged: &report.diverged,
            seconds: took.as_secs_f64(),
        };
        serde_json::to_writer_pretty(std::io::stdout(), &summary).map_err(std::io::Error::from)?;
        say!();
    } else {
        say!(
            "{} images: {} objects ({}) copied, {} were there, {} refs moved, in {:.1} s",
            report.images,
            report.copied,
            ByteLen(report.copied_bytes).human(),
            report.present,
            report.refs,
            took.as_secs_f64()
        );
    }
    Ok(())
}
