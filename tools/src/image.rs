//! `image-from-dir` and `image-from-file`.
//!
//! Enters: a directory or a raw image. Leaves: a commit in a repository, and a summary.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use horcrux::format::commit::{MAX_AUTHOR_BYTES, MAX_MESSAGE_BYTES, author_ok};
use horcrux::format::{BlockSize, ChunkSize, Filesystem, FormatError, Timestamp};
use horcrux::image::{
    CommitSink, FsKind, ImageError, ImageOptions, Progress, Summary, Target, image_from_dir, image_from_file,
};
use horcrux::repo::{
    BranchName, CommitMeta, Finished, ImageName, MetaCache, NoMetaCache, RepoError, WriterParams,
};
use horcrux::store::url::RepositoryUrl;
use horcrux::store::{self, StoreError, UrlError};
use horcrux::units::ByteLen;
use serde::Serialize;
use tokio::sync::watch;

use crate::copies::{self, Copied, Copies, CopiesError};
use crate::progress::Bar;

/// What both commands take.
#[derive(clap::Args)]
struct Common {
    /// Address space one object covers, 1M to 1G
    #[arg(long, short = 's', visible_alias = "chunksize", value_name = "SIZE", default_value = "64M", value_parser = parse_block_size)]
    block_size: BlockSize,
    /// What is fetched, verified and compressed at a time, 64K to 1M: for benches, which say why it is 128K
    #[arg(long, hide = true, value_name = "SIZE", default_value = "128K", value_parser = parse_chunk_size)]
    chunk_len: ChunkSize,
    /// What this version is, for the log
    #[arg(long, short, value_name = "MSG", value_parser = parse_message)]
    message: Option<String>,
    /// Who makes it [default: the user's name at this host]
    #[arg(long, env = "HORCRUX_AUTHOR", value_parser = parse_author)]
    author: Option<String>,
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
}

/// `image-from-dir`.
#[derive(clap::Args)]
pub struct FromDir {
    #[command(flatten)]
    common: Common,
    /// Filesystem of the image; xfs needs root
    #[arg(long, default_value = "ext4", value_parser = ["ext4", "xfs"])]
    fs: String,
    /// Size of the disk; may be far more than the data takes [default: the last version's, at least the data, a quarter more and 64M]
    #[arg(long, value_name = "SIZE")]
    size: Option<ByteLen>,
    /// Keep access times too (reading the directory changes them, and with them the next image)
    #[arg(long)]
    keep_atime: bool,
    /// Where scratch files go, for images that can't be streamed [default: the system's]
    #[arg(long, value_name = "DIR")]
    scratch_dir: Option<PathBuf>,
    /// Name of the image
    name: ImageName,
    /// Directory to make an image of
    in_dir: PathBuf,
    /// Repository to store it in, made if it is not there; further ones get a copy
    #[arg(required = true, value_name = "REPO")]
    repos: Vec<String>,
}

/// `image-from-file`.
#[derive(clap::Args)]
pub struct FromFile {
    #[command(flatten)]
    common: Common,
    /// Name of the image
    name: ImageName,
    /// Raw image or block device
    file: PathBuf,
    /// Repository to store it in, made if it is not there; further ones get a copy
    #[arg(required = true, value_name = "REPO")]
    repos: Vec<String>,
}

fn parse_block_size(text: &str) -> Result<BlockSize, String> {
    let len: ByteLen = text.parse().map_err(|error: horcrux::units::SizeError| error.to_string())?;
    BlockSize::from_len(len).ok_or_else(|| format!("'{text}' is not a power of two from 1M to 1G"))
}

fn parse_message(text: &str) -> Result<String, String> {
    match text.len() {
        0..=MAX_MESSAGE_BYTES => Ok(text.to_owned()),
        len => Err(format!("a message of {len} bytes is longer than {MAX_MESSAGE_BYTES}")),
    }
}

/// Nothing is the default, as in the environment.
fn parse_author(text: &str) -> Result<String, String> {
    match text.is_empty() || author_ok(text) {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "an author is one line of at most {MAX_AUTHOR_BYTES} bytes, without blanks around it"
        )),
    }
}

fn parse_chunk_size(text: &str) -> Result<ChunkSize, String> {
    let len: ByteLen = text.parse().map_err(|error: horcrux::units::SizeError| error.to_string())?;
    ChunkSize::from_len(len).ok_or_else(|| format!("'{text}' is not a power of two from 64K to 1M"))
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Url(#[from] UrlError),
    #[error(transparent)]
    Repo(#[from] RepoError),
    #[error("{0}")]
    Image(ImageError),
    #[error("the repository {} lies inside {}, the directory to make an image of", repo.display(), dir.display())]
    RepoInside { repo: PathBuf, dir: PathBuf },
    #[error(transparent)]
    Copies(#[from] CopiesError),
    #[error("can't start: {0}")]
    Runtime(std::io::Error),
    #[error("can't print the summary: {0}")]
    Print(#[from] std::io::Error),
}

impl From<ImageError> for Error {
    /// A sink's failure is the repository's own error.
    fn from(error: ImageError) -> Error {
        match error {
            ImageError::Sink(sink) => match sink.into_inner().downcast::<RepoError>() {
                Ok(error) => Error::Repo(*error),
                Err(other) => Error::Image(ImageError::Sink(horcrux::image::SinkError::from_boxed(other))),
            },
            other => Error::Image(other),
        }
    }
}

impl Error {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Image(ImageError::Unreadable { .. }) => {
                Some("run as a user who may read them; nothing was stored".to_owned())
            }
            Error::Image(ImageError::Scratch { source, .. })
                if source.kind() == std::io::ErrorKind::StorageFull =>
            {
                Some("--scratch-dir names a place with more space; nothing was stored".to_owned())
            }
            Error::Repo(RepoError::Damaged { source: FormatError::Version { .. }, .. }) => {
                Some("it was written by a newer Horcrux; use that one".to_owned())
            }
            Error::Repo(RepoError::Store(StoreError::NoSpace { .. })) => Some(
                "free some space there and run it again: what was stored already is not stored twice"
                    .to_owned(),
            ),
            Error::RepoInside { .. } => Some("choose a place outside of it; nothing was made".to_owned()),
            Error::Copies(error) => error.hint(),
            _ => None,
        }
    }
}

/// Whether `path`, of which only the first directories may be there yet, lies in `dir` or is it.
fn lies_inside(path: &Path, dir: &Path) -> bool {
    let (Ok(dir), Ok(path)) = (dir.canonicalize(), std::path::absolute(path)) else { return false };
    path.ancestors().find_map(|above| above.canonicalize().ok()).is_some_and(|above| above.starts_with(dir))
}

impl FromDir {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        // Before anything is made there: an image must not hold the repository that grows while it is read.
        let mut forbidden = Vec::new();
        for repo in &self.repos {
            // Elsewhere than in a directory here is not inside of it.
            let RepositoryUrl::Dir(repo) = repo.parse()? else { continue };
            if lies_inside(&repo, &self.in_dir) {
                return Err(Error::RepoInside { repo, dir: self.in_dir });
            }
            // Mounted there under another name, it is found by what it is.
            forbidden.extend(repo.is_dir().then_some(repo));
        }
        let fs = if self.fs == "xfs" { FsKind::Xfs } else { FsKind::Ext4 };
        let options = ImageOptions {
            fs,
            size: self.size,
            keep_atime: self.keep_atime,
            forbidden,
            ..ImageOptions::new(self.name.to_string(), self.scratch_dir.unwrap_or_else(std::env::temp_dir))
        };
        let source = self.in_dir.display().to_string();
        store_image(&self.common, &self.name, &self.repos, &source, |at_least, sink, progress| {
            let options = ImageOptions { at_least, ..options };
            image_from_dir(&self.in_dir, &options, sink, progress)
        })
    }
}

impl FromFile {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        let source = self.file.display().to_string();
        store_image(&self.common, &self.name, &self.repos, &source, |_, sink, progress| {
            image_from_file(&self.file, sink, progress)
        })
    }
}

fn store_image(
    common: &Common,
    name: &ImageName,
    repos: &[String],
    source: &str,
    make: impl FnOnce(ByteLen, &mut CommitSink, &Progress) -> Result<Summary, ImageError>,
) -> Result<(), Error> {
    let started = Instant::now();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Error::Runtime)?;
    let (first, others) = repos.split_first().expect("one is required");
    let store = store::url::open(first)?;
    let id = *uuid::Uuid::new_v4().as_bytes();
    let target = runtime.block_on(Target::find(store.clone(), id))?;
    let copies = runtime.block_on(Copies::find(others, first, &target))?;
    let (block_size, chunk_size) = (common.block_size, common.chunk_len);
    let params = WriterParams { block_size, chunk_size, ..WriterParams::new(ByteLen(0)) };
    let previous = runtime.block_on(previous_size(&target, name))?;
    let mut sink = CommitSink::new(runtime.handle().clone(), target, name.clone(), params);

    let progress = Arc::new(Progress::new());
    let bar = Bar::follow(progress.clone());
    let interrupted = cancel_on_interrupt(&runtime, progress.clone());
    let summary = make(previous, &mut sink, &progress)?;
    if progress.is_cancelled() {
        return Err(ImageError::Cancelled.into());
    }
    let (finished, repository) = sink.finish(CommitMeta {
        filesystem: match summary.fs {
            Some(FsKind::Ext4) => Filesystem::Ext4,
            Some(FsKind::Xfs) => Filesystem::Xfs,
            None => Filesystem::None,
        },
        author: common.author.clone().filter(|author| !author.is_empty()).unwrap_or_else(default_author),
        time: now(),
        message: common.message.clone().unwrap_or_else(|| image_of(source)),
    })?;
    drop(bar);
    let copied = match others {
        [] => Vec::new(),
        _ => runtime.block_on(copies.make(&repository, name, interrupted)),
    };
    let report = Report::new(name, &summary, &finished, &copied, started.elapsed());
    let printed = if common.json { report.print_json() } else { report.print(&summary) };
    // Who hears nothing of the copies must at least get the exit code.
    copies::check(first, &copied)?;
    Ok(printed?)
}

/// What a version is called that nobody has said anything about. A path may be longer than a message.
fn image_of(source: &str) -> String {
    let text = format!("image of {source}");
    let end =
        (0..=MAX_MESSAGE_BYTES.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    text[..end].to_owned()
}

/// The size of the version this one follows; 0 where there is none.
async fn previous_size(target: &Target, image: &ImageName) -> Result<ByteLen, RepoError> {
    let Target::Open(repository) = target else { return Ok(ByteLen(0)) };
    let Some(tip) = repository.branch(image, &BranchName::default()).await? else { return Ok(ByteLen(0)) };
    let no_cache: Arc<dyn MetaCache> = Arc::new(NoMetaCache);
    Ok(repository.commit(image, tip.commit, &no_cache).await?.size)
}

/// The first Ctrl-C lets the image put away what it made (mounts, scratch files) and is told of by what is returned; the second ends at once.
fn cancel_on_interrupt(runtime: &tokio::runtime::Runtime, progress: Arc<Progress>) -> watch::Receiver<bool> {
    let (tell, told) = watch::channel(false);
    runtime.spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            progress.cancel();
            let _ = tell.send(true);
            if tokio::signal::ctrl_c().await.is_ok() {
                std::process::exit(1);
            }
        }
    });
    told
}

pub(crate) fn default_author() -> String {
    let user =
        std::env::var("USER").or_else(|_| std::env::var("LOGNAME")).unwrap_or_else(|_| "unknown".to_owned());
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let clean = |text: &str| text.chars().filter(|c| !c.is_control()).collect::<String>();
    format!("{}@{}", clean(&user), clean(host.trim()))
}

fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp { secs: since.as_secs(), nanos: since.subsec_nanos() }
}

/// The summary, as `--json` prints it. Bytes are bytes.
#[derive(Serialize)]
struct Report<'c> {
    image: String,
    commit: String,
    unchanged: bool,
    device_bytes: u64,
    filesystem: &'static str,
    files: u64,
    directories: u64,
    read_bytes: u64,
    stored_bytes: u64,
    deduplicated_bytes: u64,
    seconds: f64,
    notes: Vec<String>,
    copies: &'c [Copied],
}

impl<'c> Report<'c> {
    fn new(
        name: &ImageName,
        summary: &Summary,
        finished: &Finished,
        copies: &'c [Copied],
        took: Duration,
    ) -> Report<'c> {
        Report {
            image: name.to_string(),
            commit: finished.commit.to_string(),
            unchanged: finished.unchanged,
            device_bytes: summary.device_size.0,
            filesystem: summary.fs.map_or("none", FsKind::name),
            files: summary.files,
            directories: summary.dirs,
            read_bytes: summary.bytes_read.0,
            stored_bytes: finished.stats.stored_bytes,
            deduplicated_bytes: finished.stats.deduplicated_bytes,
            seconds: took.as_secs_f64(),
            notes: summary.notes.iter().map(ToString::to_string).collect(),
            copies,
        }
    }

    fn print_json(&self) -> Result<(), std::io::Error> {
        let mut out = std::io::stdout().lock();
        serde_json::to_writer_pretty(&mut out, self)?;
        writeln!(out)
    }

    fn print(&self, summary: &Summary) -> Result<(), std::io::Error> {
        let mut out = std::io::stdout().lock();
        for note in &self.notes {
            eprintln!("note: {note}");
        }
        let verb = if self.unchanged { "unchanged, still" } else { "stored as" };
        writeln!(out, "{}: {verb} {}", self.image, self.commit)?;
        writeln!(out, "  disk          {} ({})", summary.device_size.human(), self.filesystem)?;
        if summary.dirs > 0 {
            writeln!(out, "  files         {} in {} directories", self.files, self.directories)?;
        }
        let rate = ByteLen((self.read_bytes as f64 / self.seconds.max(0.001)) as u64);
        writeln!(
            out,
            "  read          {} in {:.1} s ({}/s)",
            summary.bytes_read.human(),
            self.seconds,
            rate.human()
        )?;
        writeln!(out, "  stored        {}", ByteLen(self.stored_bytes).human())?;
        writeln!(out, "  deduplicated  {}", ByteLen(self.deduplicated_bytes).human())?;
        for copy in self.copies.iter().filter(|copy| copy.is_whole()) {
            writeln!(out, "  copied to     {}", copy.line())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repository_that_is_not_there_yet_is_seen_to_lie_inside() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR"));
        for inside in [dir.to_owned(), dir.join("src"), dir.join("none/repo"), dir.join("../tools/none")] {
            assert!(lies_inside(&inside, dir), "{}", inside.display());
        }
        for outside in [dir.join("../none"), dir.join("../tools-repo"), PathBuf::from("/none/repo")] {
            assert!(!lies_inside(&outside, dir), "{}", outside.display());
        }
    }
}
