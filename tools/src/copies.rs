//! The further places a new version is put in: each gets a copy of what the first one has, and each is told of.
//!
//! Enters: the places, before anything is made. Leaves: what was copied to each, or why not. Invariant: a place that can't be reached, or holds something else, is found
//! out before the work; one that fails later keeps none of the others from getting theirs.

use std::sync::Arc;

use futures_util::future::join_all;
use horcrux::image::Target;
use horcrux::repo::sync::{SyncReport, sync};
use horcrux::repo::{ImageName, RepoError, Repository};
use horcrux::store::{self, Store, UrlError};
use horcrux::units::ByteLen;
use serde::Serialize;
use tokio::sync::watch;

use crate::sync::spinner;

/// Why a place can't be used.
#[derive(Debug, thiserror::Error)]
pub enum CopiesError {
    #[error(transparent)]
    Url(#[from] UrlError),
    #[error(transparent)]
    Repo(#[from] RepoError),
    #[error("{first} is no repository yet, but {place} is one")]
    FirstIsNew { place: String, first: String },
    #[error("it is stored in {first}, but not everywhere: {}", .failed.join("; "))]
    NotEverywhere { first: String, failed: Vec<String>, way_out: String },
}

impl CopiesError {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            CopiesError::Repo(RepoError::OtherRepository { .. }) => {
                Some("give a new place; nothing was made".to_owned())
            }
            CopiesError::FirstIsNew { place, first } => {
                Some(format!("'horcrux-cli sync --from {place} --to {first}' first, or name {place} first"))
            }
            CopiesError::NotEverywhere { way_out, .. } => Some(way_out.clone()),
            CopiesError::Url(_) | CopiesError::Repo(_) => None,
        }
    }
}

/// The places after the first.
pub struct Copies {
    places: Vec<Place>,
}

struct Place {
    /// As the user wrote it.
    url: String,
    store: Arc<dyn Store>,
}

/// What became of one copy, as `--json` prints it.
#[derive(Debug, Serialize)]
pub struct Copied {
    place: String,
    copied_objects: u64,
    copied_bytes: u64,
    present_objects: u64,
    /// Why it is not whole.
    error: Option<String>,
    /// Copying again would not help: the place has versions of its own.
    #[serde(skip)]
    diverged: bool,
}

impl Copies {
    /// Looks at each place: a copy of the one named `first`, or empty.
    pub async fn find(urls: &[String], first: &str, target: &Target) -> Result<Copies, CopiesError> {
        let (id, is_new) = match target {
            Target::Open(repository) => (repository.id(), false),
            Target::New { id, .. } => (*id, true),
        };
        let first = || first.to_owned();
        let mut places = Vec::with_capacity(urls.len());
        for url in urls {
            let store = store::url::open(url)?;
            match Target::find(store.clone(), id).await? {
                Target::Open(_) if is_new => {
                    return Err(CopiesError::FirstIsNew { place: url.clone(), first: first() });
                }
                Target::Open(there) if there.id() != id => {
                    return Err(RepoError::OtherRepository { place: url.clone(), of: first() }.into());
                }
                Target::Open(_) | Target::New { .. } => places.push(Place { url: url.clone(), store }),
            }
        }
        Ok(Copies { places })
    }

    /// Copies an image to all places at once, until it is done or interrupted.
    pub async fn make(
        &self,
        first: &Repository,
        image: &ImageName,
        interrupted: watch::Receiver<bool>,
    ) -> Vec<Copied> {
        let spinner = spinner();
        let progress = |bytes: ByteLen| spinner.inc(bytes.0);
        let copying = self.places.iter().map(|place| {
            let mut interrupted = interrupted.clone();
            async move {
                tokio::select! {
                    copied = sync(first, place.store.clone(), Some(image), &progress) => Copied::new(place, copied),
                    Ok(_) = interrupted.wait_for(|is_so| *is_so) => Copied::failed(place, "interrupted".to_owned()),
                }
            }
        });
        let copied = join_all(copying).await;
        spinner.finish_and_clear();
        copied
    }
}

impl Copied {
    fn new(place: &Place, copied: Result<SyncReport, RepoError>) -> Copied {
        let report = match copied {
            Ok(report) => report,
            Err(error) => return Copied::failed(place, error.to_string()),
        };
        let diverged = !report.diverged.is_empty();
        let error = diverged.then(|| {
            format!("not a fast-forward: {} has moved on by itself there", report.diverged.join(", "))
        });
        let SyncReport { copied, copied_bytes, present, .. } = report;
        let place = place.url.clone();
        Copied { place, copied_objects: copied, copied_bytes, present_objects: present, error, diverged }
    }

    fn failed(place: &Place, why: String) -> Copied {
        let place = place.url.clone();
        Copied {
            place,
            copied_objects: 0,
            copied_bytes: 0,
            present_objects: 0,
            error: Some(why),
            diverged: false,
        }
    }

    /// Whether the place has all of it.
    pub fn is_whole(&self) -> bool {
        self.error.is_none()
    }

    /// A line for people.
    pub fn line(&self) -> String {
        let Copied { place, copied_objects, copied_bytes, present_objects, error, .. } = self;
        match error {
            Some(why) => format!("{place}: {why}"),
            None => {
                let copied = ByteLen(*copied_bytes).human();
                format!("{place}: {copied_objects} objects ({copied}), {present_objects} were there")
            }
        }
    }
}

/// An error that names the places that did not get all.
pub fn check(first: &str, copied: &[Copied]) -> Result<(), CopiesError> {
    let failed: Vec<&Copied> = copied.iter().filter(|copy| !copy.is_whole()).collect();
    let Some(worst) = failed.first() else { return Ok(()) };
    let missing: Vec<&str> = failed.iter().filter(|copy| !copy.diverged).map(|copy| &*copy.place).collect();
    let sync = |place| format!("'horcrux-cli sync --from {first} --to {place}' copies what is missing there");
    let way_out = match missing.as_slice() {
        [place] => sync(place),
        [place, ..] => sync(place) + "; likewise the others",
        [] => format!("{} has versions of its own: bring them to {first} first", worst.place),
    };
    let failed = failed.into_iter().map(Copied::line).collect();
    Err(CopiesError::NotEverywhere { first: first.to_owned(), failed, way_out })
}
