//! `ls`, `cat` and `export`: files of versions and volumes, without mounting.
//!
//! Enters: a version in a repository (`--access REPO NAME[@REF]`) or a volume of the daemon (`VOL[@REF]`). Leaves: listings, contents, archives. Versions are read here, from the repository;
//! volumes by the daemon, which has their writes.

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use bytes::Bytes;
use horcrux::control::ClientError;
use horcrux::files::list::{Entry, ListOptions};
use horcrux::files::request::{Request, answer};
use horcrux::files::{FilePath, FilesError};
use horcrux::repo::{RefSpec, Reference, RepoError};
use horcrux::store::UrlError;
use horcrux::volume::VolumeError;

use crate::listing;
use crate::place::{Place, PlaceError};
use crate::sources::{Answer, Daemon, Places, Target};

/// `ls`.
#[derive(clap::Args)]
pub struct LsCommand {
    #[command(flatten)]
    which: Which,
    /// Files and directories in it [default: its root]
    paths: Vec<OsString>,
    /// Modes, owners, sizes and times too
    #[arg(short = 'l', long)]
    long: bool,
    /// Everything below, with its path
    #[arg(short = 'R', long)]
    recursive: bool,
    /// A directory itself, not what is in it
    #[arg(short = 'd', long)]
    directory: bool,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
}

/// `cat`.
#[derive(clap::Args)]
pub struct CatCommand {
    #[command(flatten)]
    which: Which,
    /// Files in it
    #[arg(required = true)]
    paths: Vec<OsString>,
}

/// `export`.
#[derive(clap::Args)]
pub struct ExportCommand {
    #[command(flatten)]
    which: Which,
    /// A file or directory in it [default: its root]
    path: Option<OsString>,
    /// Where to write the archive [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// A version or a volume.
#[derive(clap::Args)]
pub struct Which {
    #[command(flatten)]
    place: Place,
    /// The repository NAME is an image of; may be given more than once, for copies of one repository in several places
    #[arg(long, value_name = "REPO")]
    access: Vec<String>,
    /// A volume of the daemon, or with --access an image; and which version of it
    #[arg(value_name = "VOLUME[@REF]|NAME[@REF]")]
    what: What,
}

/// A name, and which version of it.
#[derive(Clone, Debug)]
struct What {
    name: String,
    reference: Option<Reference>,
}

impl std::str::FromStr for What {
    type Err = RepoError;

    fn from_str(text: &str) -> Result<What, RepoError> {
        // Names of volumes and of images are of one form.
        let RefSpec { image, reference } = text.parse()?;
        Ok(What { name: image.to_string(), reference: text.contains('@').then_some(reference) })
    }
}

/// Why it did not work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Url(#[from] UrlError),
    #[error(transparent)]
    Repo(#[from] RepoError),
    #[error("{what}: {source}")]
    Files { what: String, source: Box<FilesError>, mount: String },
    #[error(transparent)]
    Daemon(#[from] ClientError),
    #[error(transparent)]
    Place(#[from] PlaceError),
    #[error(transparent)]
    Name(#[from] VolumeError),
    #[error("{what} is the first version: there is none before it to compare with")]
    FirstVersion { what: String },
    #[error("three versions are named: {what} and two more; two can be compared")]
    ThreeVersions { what: String },
    #[error("the answer can't be understood: {0}")]
    Answer(String),
    #[error("can't write {}: {source}", path.display())]
    Output { path: PathBuf, source: std::io::Error },
    #[error("an archive is not for a terminal")]
    Terminal,
    #[error("can't start: {0}")]
    Runtime(std::io::Error),
    #[error("can't print: {0}")]
    Print(#[from] std::io::Error),
}

impl Error {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Files { source, mount, .. } => source.hint(mount),
            Error::Daemon(error) => error.hint(),
            Error::Place(error) => error.hint(),
            Error::FirstVersion { .. } => Some("name two versions, or 'ls' it".to_owned()),
            Error::ThreeVersions { .. } => Some("leave one out".to_owned()),
            Error::Terminal => Some("send it on, '| tar -tv', or write it with '--output FILE'".to_owned()),
            Error::Repo(RepoError::NoImage { .. } | RepoError::NotARepository { .. }) => Some(
                "check --access and the name; without --access a volume of the daemon is meant".to_owned(),
            ),
            _ => None,
        }
    }

    /// Whether the reader of standard output went away, which is no failure: `ls ... | head`.
    fn is_nobody_reads(&self) -> bool {
        matches!(self, Error::Print(error) if error.kind() == std::io::ErrorKind::BrokenPipe)
    }
}

fn path_of(text: OsString) -> FilePath {
    FilePath::new(&text.into_vec())
}

fn paths_of(texts: Vec<OsString>) -> Vec<FilePath> {
    if texts.is_empty() { vec![FilePath::default()] } else { texts.into_iter().map(path_of).collect() }
}

/// Runs to the end; that nobody reads what is printed is one.
pub fn run(work: impl Future<Output = Result<(), Error>>) -> Result<(), Error> {
    match run_to_its_end(work) {
        Err(error) if error.is_nobody_reads() => Ok(()),
        done => done,
    }
}

/// Runs to the end. What nobody reads is not whole.
fn run_to_its_end(work: impl Future<Output = Result<(), Error>>) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Error::Runtime)?;
    runtime.block_on(work)
}

impl Which {
    /// What is looked at.
    pub async fn target(self) -> Result<Target, Error> {
        let What { name, reference } = self.what;
        if self.access.is_empty() {
            return Ok(Target::Volume { daemon: Daemon::new(&self.place, &name)?, reference });
        }
        let image = RefSpec { image: name.parse()?, reference: reference.unwrap_or_default() };
        Ok(Target::Version(Places::open(self.access, image).await?))
    }
}

impl Target {
    async fn ask(&self, request: Request) -> Result<Answer, Error> {
        match self {
            Target::Version(places) => {
                let filesystem = places.filesystem(&places.tip().await?).await?;
                Ok(places.answer(answer(filesystem, request)))
            }
            Target::Volume { daemon, reference } => daemon.ask(reference.as_ref(), &request).await,
        }
    }
}

impl LsCommand {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        run(async {
            let target = self.which.target().await?;
            let options = ListOptions {
                long: self.long || self.json,
                recursive: self.recursive,
                directory: self.directory,
            };
            let mut printer = listing::Printer::new(self.long, self.recursive, self.json);
            for path in paths_of(self.paths) {
                let mut answer = target.ask(Request::List { path, options }).await?;
                while let Some(entry) = answer.line::<Entry>().await? {
                    printer.print(&entry)?;
                }
            }
            Ok(printer.end()?)
        })
    }
}

impl CatCommand {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        run(async {
            let target = self.which.target().await?;
            let mut out = std::io::stdout().lock();
            for path in paths_of(self.paths) {
                let mut answer = target.ask(Request::Content { path }).await?;
                while let Some(piece) = answer.next().await? {
                    out.write_all(&piece)?;
                }
            }
            Ok(out.flush()?)
        })
    }
}

impl ExportCommand {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        use std::io::IsTerminal;
        if self.output.is_none() && std::io::stdout().is_terminal() {
            return Err(Error::Terminal);
        }
        run_to_its_end(async {
            let target = self.which.target().await?;
            let path = self.path.map(path_of).unwrap_or_default();
            let mut answer = target.ask(Request::Archive { path }).await?;
            let Some(output) = self.output else {
                let mut out = std::io::stdout().lock();
                while let Some(piece) = answer.next().await? {
                    out.write_all(&piece)?;
                }
                return Ok(out.flush()?);
            };
            // Not before there is something to write: a wrong name must not cost the archive that is there.
            let first = answer.next().await?;
            let failed = |source: std::io::Error| Error::Output { path: output.clone(), source };
            let mut file = std::fs::File::create(&output).map_err(failed)?;
            let is_file = file.metadata().map_err(failed)?.is_file();
            let written = write_all(&mut file, first, &mut answer, failed).await;
            // Cut short between two members, tar would take it for a whole one.
            if written.is_err() && is_file {
                let _ = std::fs::remove_file(&output);
            }
            written
        })
    }
}

async fn write_all(
    file: &mut std::fs::File,
    first: Option<Bytes>,
    answer: &mut Answer,
    failed: impl Fn(std::io::Error) -> Error,
) -> Result<(), Error> {
    let mut next = first;
    while let Some(piece) = next {
        file.write_all(&piece).map_err(&failed)?;
        next = answer.next().await?;
    }
    match file.sync_all() {
        // A pipe or a device has nothing to sync.
        Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => Ok(()),
        done => done.map_err(failed),
    }
}
