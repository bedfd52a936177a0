//! `prefetch`: the list of what a volume's start reads.
//!
//! Enters: a volume of a state directory. Leaves: the list on standard output, kept with its commit, or a mark that asks the server for a new one. Works beside a
//! running server.

use clap::Subcommand;
use horcrux::format::PrefetchList;
use horcrux::repo::{RepoError, Repository};
use horcrux::store::{self, UrlError};
use horcrux::volume::prefetch::{ask_for_list, load_list};
use horcrux::volume::{VolumeError, VolumeName, VolumeRecord};
use serde::Serialize;

use crate::place::{Found, Place, PlaceError};

/// `prefetch`.
#[derive(clap::Args)]
pub struct Prefetch {
    #[command(subcommand)]
    action: Action,
    #[command(flatten)]
    place: Place,
}

#[derive(Subcommand)]
enum Action {
    /// Have the next 'serve' list anew what the volume's first five minutes read (it does so by itself where there is no list)
    Record {
        /// The volume
        volume: VolumeName,
    },
    /// Show the volume's list
    Show {
        /// The volume
        volume: VolumeName,
        /// Print it as JSON, all runs of chunks included
        #[arg(long)]
        json: bool,
    },
    /// Keep the volume's list with its commit in the repository: starts on other hosts fetch by it
    Push {
        /// The volume
        volume: VolumeName,
        /// Where to keep it; may be given more than once [default: the place the volume was made from]
        #[arg(long, value_name = "REPO")]
        access: Vec<String>,
    },
}

/// Why it did not work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Url(#[from] UrlError),
    #[error(transparent)]
    Repo(#[from] RepoError),
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error(transparent)]
    Place(#[from] PlaceError),
    #[error("the volume {volume} has no prefetch list yet")]
    NoList { volume: String },
    #[error("{place} is not the repository this volume is of")]
    OtherRepository { place: String },
    #[error("not kept everywhere: {}", .0.join("; "))]
    NotEverywhere(Vec<String>),
    #[error("can't start: {0}")]
    Runtime(std::io::Error),
    #[error("can't print: {0}")]
    Print(#[from] std::io::Error),
}

impl Error {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Place(error) => error.hint(),
            Error::NoList { volume } => {
                Some(format!("serve {volume} and use it: the server lists what its first five minutes read"))
            }
            _ => None,
        }
    }
}

impl Prefetch {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        let (Action::Record { volume } | Action::Show { volume, .. } | Action::Push { volume, .. }) =
            &self.action;
        let Found { dir, record } = self.place.volume(volume.as_str())?;
        let list = || load_list(&dir)?.ok_or_else(|| Error::NoList { volume: volume.to_string() });
        match &self.action {
            Action::Record { .. } => {
                ask_for_list(&dir)?;
                say!("the next start of {volume} is listed");
            }
            Action::Show { json, .. } => show(volume, &list()?, *json)?,
            Action::Push { access, .. } => push(&record, access, &list()?)?,
        }
        Ok(())
    }
}

/// The list, as `--json` prints it.
#[derive(Serialize)]
struct Shown<'l> {
    volume: &'l str,
    image: &'l str,
    commit: String,
    chunk_bytes: usize,
    chunks: u64,
    bytes: u64,
    /// First chunk, and how many.
    runs: Vec<(u64, u64)>,
}

fn show(volume: &VolumeName, list: &PrefetchList, json: bool) -> Result<(), Error> {
    if json {
        let shown = Shown {
            volume: volume.as_str(),
            image: &list.image,
            commit: list.commit.to_string(),
            chunk_bytes: list.chunk_size.len(),
            chunks: list.len(),
            bytes: list.bytes().0,
            runs: list.runs().to_vec(),
        };
        serde_json::to_writer_pretty(std::io::stdout(), &shown).map_err(std::io::Error::from)?;
        say!();
        return Ok(());
    }
    let commit = list.commit.to_string();
    say!(
        "{volume}: a start reads {} chunks ({}) in {} runs, seen at commit {}",
        list.len(),
        list.bytes().human(),
        list.runs().len(),
        &commit[..12]
    );
    Ok(())
}

/// Keeps the list in each place, and says so of each.
fn push(record: &VolumeRecord, access: &[String], list: &PrefetchList) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Error::Runtime)?;
    let places = if access.is_empty() { &record.access[..] } else { access };
    let commit = list.commit.to_string();
    let (mut kept, mut failed) = (Vec::new(), Vec::new());
    for place in places {
        match runtime.block_on(push_to(place, record, list)) {
            Ok(place) => kept.push(place),
            Err(error) if places.len() == 1 => return Err(error),
            Err(error) => failed.push(error.to_string()),
        }
    }
    for place in kept {
        say!("kept with commit {} of {} in {place}", &commit[..12], list.image);
    }
    if failed.is_empty() { Ok(()) } else { Err(Error::NotEverywhere(failed)) }
}

async fn push_to(place: &str, record: &VolumeRecord, list: &PrefetchList) -> Result<String, Error> {
    let repository = Repository::open(store::url::open(place)?).await?;
    if record.repository_id() != Some(repository.id()) {
        return Err(Error::OtherRepository { place: repository.describe() });
    }
    repository.put_prefetch_list(list).await?;
    Ok(repository.describe())
}
