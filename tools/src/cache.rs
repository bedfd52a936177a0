//! `pin`, `unpin` and `cache`: what is here, that it is right, that it stays, and giving space back.
//!
//! Enters: a state directory. Leaves: figures on standard output; chunks fetched or freed. Looking works beside a running server; pinning is the daemon's where one runs, and
//! what else changes the cache waits for its end.

use std::collections::{BTreeMap, HashSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Subcommand;
use horcrux::cache::care::{KeptMeta, Survey, prune, survey, verify};
use horcrux::cache::{Cache, CacheError, CacheOptions};
use horcrux::control::api::{Job, JobKind, JobState};
use horcrux::control::{Client, ClientError, socket_of};
use horcrux::format::ChunkId;
use horcrux::repo::{ImageName, MetaCache, RepoError, Repository, Version, VersionOptions};
use horcrux::store::{self, RetryOptions, UrlError};
use horcrux::units::ByteLen;
use horcrux::volume::pin::{Pinning, chunks_of, is_pinned, unpin};
use horcrux::volume::{StateDir, Volume, VolumeError, VolumeName, VolumeRecord, volume_dir};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::place::{Place, PlaceError};

/// How often a running job is looked at.
const EVERY: Duration = Duration::from_millis(200);
/// How long the daemon may take to answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// `pin`.
#[derive(clap::Args)]
pub struct Pin {
    #[command(flatten)]
    place: Place,
    /// Bytes of disk the cache may take
    #[arg(long, value_name = "SIZE", default_value = "16G")]
    cache_size: ByteLen,
    /// Do not wait for the end of it: a running daemon goes on ('jobs' shows how far it is)
    #[arg(long)]
    no_wait: bool,
    /// The volume
    volume: VolumeName,
}

/// `unpin`.
#[derive(clap::Args)]
pub struct Unpin {
    #[command(flatten)]
    place: Place,
    /// The volume
    volume: VolumeName,
}

/// `cache`.
#[derive(clap::Args)]
pub struct CacheCommand {
    #[command(flatten)]
    place: Place,
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// List the volumes and how much of each is here
    Ls {
        /// Print it as JSON
        #[arg(long)]
        json: bool,
    },
    /// Say how much is here, and what it takes of the disk
    Stat {
        /// Print it as JSON
        #[arg(long)]
        json: bool,
    },
    /// Free what no volume here needs
    Prune {
        /// Free everything but what pinned volumes need
        #[arg(long)]
        all: bool,
    },
    /// Read everything that is here and throw away what is damaged
    Verify,
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
    Cache(#[from] CacheError),
    #[error(transparent)]
    Place(#[from] PlaceError),
    #[error(transparent)]
    Daemon(#[from] ClientError),
    #[error("{0}")]
    Job(String),
    #[error("volume {0} is not pinned: that was cancelled")]
    Cancelled(String),
    #[error("can't tell what volume {volume} needs: {source}")]
    Unknown { volume: String, source: Box<RepoError> },
    #[error("can't start: {0}")]
    Runtime(std::io::Error),
    #[error("can't read {}: {source}", dir.display())]
    Read { dir: PathBuf, source: std::io::Error },
    #[error("can't print: {0}")]
    Print(#[from] std::io::Error),
}

impl Error {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Place(error) => error.hint(),
            Error::Daemon(error) => error.hint(),
            Error::Volume(VolumeError::StateDirInUse { .. }) => Some(
                "stop that server first, or have it fetch everything with 'serve --prefetch all'".to_owned(),
            ),
            Error::Cache(CacheError::InUse { .. }) => Some("stop that server first".to_owned()),
            Error::Volume(VolumeError::CacheTooSmall { needed, .. }) => Some(format!(
                "give --cache-size {}M or more, here and to 'serve'",
                (needed.0 + needed.0 / 16).div_ceil(1 << 20) + 2
            )),
            Error::Unknown { .. } => {
                Some("its map is not all here: run it again when the repository can be reached".to_owned())
            }
            _ => None,
        }
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, Error> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Error::Runtime)
}

impl Pin {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        if let Some((client, runtime)) = daemon(&self.place)? {
            return runtime.block_on(self.ask(&client));
        }
        let record = self.place.volume(self.volume.as_str())?.record;
        let state = StateDir::open(&self.place.state_dir()?)?;
        let cache = Cache::open(&state.cache_dir(), CacheOptions::new(self.cache_size))?;
        let store = store::url::open_all(&record.access, RetryOptions::default())?;
        let brought = runtime()?.block_on(async {
            let repository = Repository::open(store).await?;
            let volume =
                Volume::open(&state, &cache, &repository, self.volume.as_str(), record, true).await?;
            Ok::<_, Error>(volume.pin(&cache, &Pinning::default()).await?)
        })?;
        say!("{}: all of it is here and stays ({} fetched)", self.volume, brought.human());
        Ok(())
    }

    /// Has the daemon do it, and waits for that. An interrupt cancels it.
    async fn ask(&self, client: &Client) -> Result<(), Error> {
        let mut job = client.pin(self.volume.as_str()).await?;
        if self.no_wait {
            return Ok(say!("job {}", job.id));
        }
        let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
        let bar = ProgressBar::new(0);
        if let Ok(style) =
            ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta} left")
        {
            bar.set_style(style);
        }
        while job.state == JobState::Running {
            bar.set_length(job.total_bytes);
            bar.set_position(job.done_bytes);
            tokio::select! {
                () = tokio::time::sleep(EVERY) => job = client.job(job.id).await?,
                // Its answer is that it is cancelled, or was done before.
                _ = &mut interrupted => {
                    job = cancelled(client, job.id).await?;
                    break;
                }
            }
        }
        bar.finish_and_clear();
        match job.state {
            JobState::Done => Ok(say!("{}: all of it is here and stays", self.volume)),
            JobState::Failed => Err(Error::Job(job.error.unwrap_or_default())),
            JobState::Cancelled | JobState::Running => Err(Error::Cancelled(self.volume.to_string())),
        }
    }
}

/// Cancels a job and waits until it has ended.
async fn cancelled(client: &Client, id: u64) -> Result<Job, Error> {
    let mut job = client.cancel_job(id).await?;
    let deadline = Instant::now() + PATIENCE;
    while job.state == JobState::Running && Instant::now() < deadline {
        tokio::time::sleep(EVERY).await;
        job = client.job(id).await?;
    }
    Ok(job)
}

/// The daemon of the state directory; `None` where none runs.
fn daemon(place: &Place) -> Result<Option<(Client, tokio::runtime::Runtime)>, Error> {
    let runtime = runtime()?;
    let client = Client::new(&socket_of(&place.state_dir()?), PATIENCE);
    match runtime.block_on(client.status()) {
        Err(ClientError::NoDaemon { source, .. })
            if matches!(source.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) =>
        {
            Ok(None)
        }
        Err(error) => Err(error.into()),
        Ok(_) => Ok(Some((client, runtime))),
    }
}

/// `jobs`.
#[derive(clap::Args)]
pub struct Jobs {
    #[command(flatten)]
    place: Place,
    #[command(subcommand)]
    action: Option<JobAction>,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum JobAction {
    /// Have a job end before it is done
    Cancel {
        /// Its number
        id: u64,
    },
}

impl Jobs {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        let client = Client::new(&socket_of(&self.place.state_dir()?), PATIENCE);
        let runtime = runtime()?;
        if let Some(JobAction::Cancel { id }) = self.action {
            let job = runtime.block_on(cancelled(&client, id))?;
            say!("job {id}: {}", told(&job));
            return Ok(());
        }
        let jobs = runtime.block_on(client.jobs())?;
        if self.json {
            serde_json::to_writer_pretty(std::io::stdout(), &jobs).map_err(std::io::Error::from)?;
            say!();
            return Ok(());
        }
        for job in &jobs {
            let (done, total) = (ByteLen(job.done_bytes).human(), ByteLen(job.total_bytes).human());
            let kind = match job.kind {
                JobKind::Pin => "pin",
                JobKind::Commit => "commit",
                JobKind::Push => "push",
            };
            say!("{}: {kind} {}, {done} of {total}, {}", job.id, job.volume, told(job));
        }
        Ok(())
    }
}

fn told(job: &Job) -> String {
    match (job.state, &job.error) {
        (JobState::Running, _) => format!("running for {:.0} s", job.took_s),
        (JobState::Done, _) => format!("done in {:.1} s", job.took_s),
        (JobState::Cancelled, _) => "cancelled".to_owned(),
        (JobState::Failed, error) => format!("failed: {}", error.as_deref().unwrap_or_default()),
    }
}

impl Unpin {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        if let Some((client, runtime)) = daemon(&self.place)? {
            runtime.block_on(client.unpin(self.volume.as_str()))?;
            say!("{}: may leave the cache", self.volume);
            return Ok(());
        }
        unpin(&self.place.volume(self.volume.as_str())?.dir)?;
        say!("{}: may leave the cache from the next start on", self.volume);
        Ok(())
    }
}

/// One volume and what of it is here.
#[derive(Serialize)]
struct Held {
    volume: String,
    pinned: bool,
    chunks: u64,
    chunks_here: u64,
    bytes_here: u64,
}

impl CacheCommand {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        let state_dir = self.place.state_dir()?;
        let cache_dir = state_dir.join("cache");
        match self.action {
            Action::Stat { json } => stat(&survey(&cache_dir)?, json),
            Action::Ls { json } => ls(&state_dir, &survey(&cache_dir)?, json),
            Action::Prune { all } => {
                let needed = needed(&state_dir, |dir| !all || is_pinned(dir))?;
                let freed = prune(&cache_dir, |id| needed.values().any(|chunks| chunks.contains(id)))?;
                say!("{} chunks freed, {} given back", freed.chunks, freed.bytes.human());
                Ok(())
            }
            Action::Verify => {
                let bar = bar();
                let verified = verify(&cache_dir, |bytes| bar.inc(bytes.0))?;
                bar.finish_and_clear();
                say!("{} chunks are good, {} were damaged and are gone", verified.good, verified.damaged);
                Ok(())
            }
        }
    }
}

/// On a terminal; indicatif shows nothing elsewhere.
fn bar() -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {bytes} read, {binary_bytes_per_sec}") {
        bar.set_style(style);
    }
    bar
}

/// What each volume needs, by its map, which is in the cache or comes from the repository.
fn needed(state_dir: &Path, of: impl Fn(&Path) -> bool) -> Result<BTreeMap<String, HashSet<ChunkId>>, Error> {
    let dir = state_dir.join("volumes");
    let mut needed = BTreeMap::new();
    let listed = match std::fs::read_dir(&dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(needed),
        other => other.map_err(|source| Error::Read { dir: dir.clone(), source })?,
    };
    let runtime = runtime()?;
    for entry in listed {
        let entry = entry.map_err(|source| Error::Read { dir: dir.clone(), source })?;
        // What is being taken away has no volume's name.
        let Some(volume) = entry.file_name().to_str().and_then(|name| name.parse::<VolumeName>().ok()) else {
            continue;
        };
        let Some(record) = VolumeRecord::load(&entry.path())?.filter(|_| of(&entry.path())) else { continue };
        let volume = volume.to_string();
        let chunks = runtime.block_on(chunks_of_record(state_dir, &record));
        let chunks = chunks.map_err(|source| match source {
            Error::Repo(source) => Error::Unknown { volume: volume.clone(), source: Box::new(source) },
            other => other,
        })?;
        needed.insert(volume, chunks);
    }
    Ok(needed)
}

async fn chunks_of_record(state_dir: &Path, record: &VolumeRecord) -> Result<HashSet<ChunkId>, Error> {
    let meta: Arc<dyn MetaCache> = Arc::new(KeptMeta::open(&state_dir.join("cache")));
    let repository = Repository::opened_before(
        store::url::open_all(&record.access, RetryOptions::default())?,
        record.repository_id().unwrap_or_default(),
    );
    let image: ImageName = record.image.parse()?;
    let version = Version::open(&repository, &image, record.commit, meta, VersionOptions::default()).await?;
    Ok(chunks_of(&version).await?)
}

fn ls(state_dir: &Path, survey: &Survey, json: bool) -> Result<(), Error> {
    let held: Vec<Held> = needed(state_dir, |_| true)?
        .into_iter()
        .map(|(volume, chunks)| {
            let here: Vec<u64> =
                chunks.iter().filter_map(|id| survey.chunks.get(id)).map(|len| len.0).collect();
            Held {
                pinned: is_pinned(&volume_dir(state_dir, &volume)),
                volume,
                chunks: chunks.len() as u64,
                chunks_here: here.len() as u64,
                bytes_here: here.iter().sum(),
            }
        })
        .collect();
    if json {
        serde_json::to_writer_pretty(std::io::stdout(), &held).map_err(std::io::Error::from)?;
        say!();
        return Ok(());
    }
    for held in &held {
        let pinned = if held.pinned { ", pinned" } else { "" };
        let here = ByteLen(held.bytes_here).human();
        say!("{}: {} of {} chunks are here ({here}{pinned})", held.volume, held.chunks_here, held.chunks);
    }
    Ok(())
}

/// The figures, as `--json` prints them.
#[derive(Serialize)]
struct Figures {
    chunks: u64,
    chunk_bytes: u64,
    slab_files: u64,
    slab_bytes_on_disk: u64,
    map_bytes: u64,
}

fn stat(survey: &Survey, json: bool) -> Result<(), Error> {
    let figures = Figures {
        chunks: survey.chunks.len() as u64,
        chunk_bytes: survey.chunks.values().map(|len| len.0).sum(),
        slab_files: survey.slabs,
        slab_bytes_on_disk: survey.slab_bytes.0,
        map_bytes: survey.blob_bytes.0,
    };
    if json {
        serde_json::to_writer_pretty(std::io::stdout(), &figures).map_err(std::io::Error::from)?;
        say!();
        return Ok(());
    }
    say!(
        "{} chunks ({}) in {} files that take {} of the disk; {} of maps",
        figures.chunks,
        ByteLen(figures.chunk_bytes).human(),
        figures.slab_files,
        survey.slab_bytes.human(),
        survey.blob_bytes.human()
    );
    Ok(())
}
