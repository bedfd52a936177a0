//! `volume`, `attach`, `detach`, `mount`, `umount` and `status`: asks the daemon for volumes.
//!
//! Enters: what the user wants. Leaves: what the daemon answered, as lines or as JSON.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Subcommand;
use horcrux::control::api::{Attach, CreateVolume, Mount, PrefetchMode, Unmount, Volume};
use horcrux::control::{Client, ClientError, socket_of};
use horcrux::repo::RefSpec;
use horcrux::units::ByteLen;
use horcrux::volume::{VolumeError, VolumeName};
use serde::Serialize;

use crate::place::{Place, PlaceError};

/// A repository that does not answer is given up by the daemon before this.
const PATIENCE: Duration = Duration::from_secs(180);

/// `volume`.
#[derive(clap::Args)]
pub struct VolumeCommand {
    #[command(flatten)]
    place: Place,
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Make a volume: a writable disk of a version of an image
    Create(Create),
    /// List the volumes
    Ls {
        /// Print it as JSON
        #[arg(long)]
        json: bool,
    },
    /// Show all that is known of a volume
    Inspect {
        /// The volume
        volume: VolumeName,
        /// Print it as JSON
        #[arg(long)]
        json: bool,
    },
    /// Take volumes away, with what was written to them
    Rm {
        /// The volumes
        #[arg(required = true)]
        volumes: Vec<VolumeName>,
        /// Even where commits are lost by it that are not pushed
        #[arg(long)]
        force: bool,
    },
}

#[derive(clap::Args)]
struct Create {
    /// The volume's name
    volume: VolumeName,
    /// Repository the image is in; may be given more than once, for copies of one repository in several places
    #[arg(long, value_name = "REPO", required = true)]
    access: Vec<String>,
    /// Image, and which version of it
    #[arg(long, value_name = "NAME[@REF]")]
    name: RefSpec,
    /// Size of the disk [default: the image's]
    #[arg(long, value_name = "SIZE")]
    size: Option<ByteLen>,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    /// Bytes its own writes may take: past that a write fails for want of space [default: no limit but the disk's]
    #[arg(long, value_name = "SIZE")]
    quota: Option<ByteLen>,
    /// What to fetch before it is asked for: nothing, what an earlier start read, or everything
    #[arg(long, value_enum, default_value = "learned")]
    prefetch: Prefetch,
    /// Print the volume as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Prefetch {
    All,
    None,
    Learned,
}

/// `status`.
#[derive(clap::Args)]
pub struct StatusCommand {
    #[command(flatten)]
    place: Place,
    /// A volume: on which version it stands, and what it has of its own [default: how the daemon is]
    volume: Option<VolumeName>,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
}

/// Why it did not work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Place(#[from] PlaceError),
    #[error(transparent)]
    Daemon(#[from] ClientError),
    #[error(transparent)]
    Name(#[from] VolumeError),
    #[error("not all were taken away: {}", .0.join("; "))]
    NotAll(Vec<String>),
    #[error("not all were unmounted: {}", .0.join("; "))]
    NotUnmounted(Vec<String>),
    #[error("{} is not a path the daemon can be told: it is not UTF-8", .0.display())]
    NotText(OsString),
    #[error("which volume? 'mount VOLUME DIR', or 'mount --access REPO --name NAME DIR'")]
    NoVolume,
    #[error("which? 'umount VOLUME DIR', or 'umount DIR'")]
    TwoDirectories,
    #[error("{what}")]
    Job { what: String, hint: Option<String> },
    #[error("the job was cancelled")]
    Cancelled,
    #[error("no volume is mounted on {dir}")]
    NothingMounted { dir: String },
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
            Error::Daemon(error) => error.hint(),
            Error::Job { hint, .. } => hint.clone(),
            Error::Cancelled => Some("the same command again goes on with it".to_owned()),
            _ => None,
        }
    }
}

pub(crate) fn daemon(place: &Place) -> Result<(Client, tokio::runtime::Runtime), Error> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Runtime)?;
    Ok((Client::new(&socket_of(&place.state_dir()?), PATIENCE), runtime))
}

pub(crate) fn print_json(what: &impl Serialize) -> Result<(), Error> {
    serde_json::to_writer_pretty(std::io::stdout(), what).map_err(std::io::Error::from)?;
    say!();
    Ok(())
}

impl VolumeCommand {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        let (client, runtime) = daemon(&self.place)?;
        match self.action {
            Action::Create(create) => {
                let json = create.json;
                let made = runtime.block_on(client.create_volume(&create.wanted()))?;
                if json { print_json(&made.volume) } else { Ok(say!("{}", made.volume.name)) }
            }
            Action::Ls { json } => {
                let volumes = runtime.block_on(client.volumes())?;
                if json { print_json(&volumes) } else { table(&volumes) }
            }
            Action::Inspect { volume, json } => {
                let volume = runtime.block_on(client.volume(volume.as_str()))?;
                if json { print_json(&volume) } else { inspect(&volume) }
            }
            Action::Rm { volumes, force } => {
                let mut failed = Vec::new();
                for volume in &volumes {
                    match runtime.block_on(client.remove_volume(volume.as_str(), force)) {
                        Ok(()) => say!("{volume}"),
                        Err(error) if volumes.len() == 1 => return Err(error.into()),
                        Err(error) => failed.push(error.to_string()),
                    }
                }
                if failed.is_empty() { Ok(()) } else { Err(Error::NotAll(failed)) }
            }
        }
    }
}

impl Create {
    fn wanted(&self) -> CreateVolume {
        CreateVolume {
            size: self.size.map(|size| size.0),
            prefetch: match self.prefetch {
                Prefetch::All => PrefetchMode::All,
                Prefetch::None => PrefetchMode::None,
                Prefetch::Learned => PrefetchMode::Learned,
            },
            quota: self.quota.map(|quota| quota.0),
            ..plain(&self.volume, &self.access, &self.name, self.read_only)
        }
    }
}

/// A volume with no wishes but where it comes from.
fn plain(volume: &VolumeName, access: &[String], name: &RefSpec, read_only: bool) -> CreateVolume {
    CreateVolume {
        name: volume.to_string(),
        access: access.iter().map(|place| lasting(place)).collect(),
        image: name.image.to_string(),
        from: None,
        reference: Some(name.reference.to_string()),
        size: None,
        filesystem: None,
        read_only,
        prefetch: PrefetchMode::default(),
        quota: None,
    }
}

/// A relative directory is meant from here, not from where the daemon runs; what can't be understood is for the daemon to say.
fn lasting(place: &str) -> String {
    horcrux::store::url::lasting(place).unwrap_or_else(|_| place.to_owned())
}

fn version(volume: &Volume) -> String {
    match &volume.reference {
        Some(reference) => format!("{}@{reference}", volume.image),
        None => volume.image.clone(),
    }
}

fn table(volumes: &[Volume]) -> Result<(), Error> {
    let rows = volumes.iter().map(|volume| {
        let dirty = volume.open.as_ref().map_or("-".to_owned(), |open| ByteLen(open.dirty_bytes).human());
        let used = volume.open.as_ref().map_or(0, |open| open.connections);
        let size = ByteLen(volume.size).human();
        [volume.name.clone(), version(volume), volume.commit[..12].to_owned(), size, dirty, used.to_string()]
    });
    let head = ["VOLUME", "IMAGE", "COMMIT", "SIZE", "CHANGED", "CLIENTS"].map(str::to_owned);
    let rows: Vec<[String; 6]> = std::iter::once(head).chain(rows).collect();
    let widths: Vec<usize> =
        (0..6).map(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0)).collect();
    for row in &rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        say!("{}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
    Ok(())
}

fn inspect(volume: &Volume) -> Result<(), Error> {
    say!("{}: {} of {}", volume.name, version(volume), volume.access.join(", "));
    say!("  commit {}", volume.commit);
    let access = if volume.read_only { ", read-only" } else { "" };
    say!("  {}{access}", ByteLen(volume.size).human());
    if let Some(device) = &volume.device {
        let on = if volume.mounts.is_empty() {
            String::new()
        } else {
            format!(", mounted on {}", volume.mounts.join(", "))
        };
        say!("  attached as {device}{on}");
    }
    if let Some(cached) = volume.cached_bytes {
        let stays = if volume.pinned { ", pinned" } else { "" };
        say!("  {} of it in the cache{stays}", ByteLen(cached).human());
    }
    match &volume.open {
        Some(open) => {
            let dirty = ByteLen(open.dirty_bytes).human();
            let connections = if open.connections == 1 { "connection" } else { "connections" };
            say!("  open: {} NBD {connections}, {dirty} changed", open.connections);
        }
        None => say!("  not open: it is when it is asked for"),
    }
    Ok(())
}

impl StatusCommand {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        let (client, runtime) = daemon(&self.place)?;
        if let Some(volume) = &self.volume {
            return crate::version::status(&client, &runtime, volume, self.json);
        }
        let status = runtime.block_on(client.status())?;
        if self.json {
            return print_json(&status);
        }
        say!("horcrux-nbd {} runs as process {}, for {} s", status.version, status.pid, status.up_s);
        say!("  state directory {}", status.state_dir);
        say!("  {} volumes, {} of them open", status.volumes, status.open);
        let cache = &status.cache;
        let (used, limit) = (ByteLen(cache.used_bytes).human(), ByteLen(cache.limit_bytes).human());
        say!("  cache: {used} of {limit}, {} fetched", ByteLen(cache.fetched_bytes).human());
        Ok(())
    }
}

/// `attach`.
#[derive(clap::Args)]
pub struct AttachCommand {
    #[command(flatten)]
    place: Place,
    /// The volume
    volume: VolumeName,
    /// The device, /dev/nbdN [default: a free one]
    device: Option<String>,
    /// Print the volume as JSON
    #[arg(long)]
    json: bool,
}

/// `detach`.
#[derive(clap::Args)]
pub struct DetachCommand {
    #[command(flatten)]
    place: Place,
    /// The volume
    volume: VolumeName,
}

impl AttachCommand {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        let (client, runtime) = daemon(&self.place)?;
        let wanted = Attach { device: self.device };
        let volume = runtime.block_on(client.attach(self.volume.as_str(), &wanted))?;
        if self.json { print_json(&volume) } else { Ok(say!("{}", volume.device.unwrap_or_default())) }
    }
}

impl DetachCommand {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        let (client, runtime) = daemon(&self.place)?;
        runtime.block_on(client.detach(self.volume.as_str()))?;
        Ok(say!("{}", self.volume))
    }
}

/// `mount`.
#[derive(clap::Args)]
#[command(allow_missing_positional = true)]
pub struct MountCommand {
    #[command(flatten)]
    place: Place,
    /// The volume [default, with --name: one with the image's name]
    volume: Option<VolumeName>,
    /// A directory that is there
    #[arg(required = true)]
    dir: PathBuf,
    /// Make the volume first, if it is not there: repository the image is in; may be given more than once
    #[arg(long, value_name = "REPO", requires = "name")]
    access: Vec<String>,
    /// Image, and which version of it
    #[arg(long, value_name = "NAME[@REF]", requires = "access")]
    name: Option<RefSpec>,
    /// Refuse writes
    #[arg(long, requires = "name")]
    read_only: bool,
    /// Print the volume as JSON
    #[arg(long)]
    json: bool,
}

/// `umount`.
#[derive(clap::Args)]
pub struct UmountCommand {
    #[command(flatten)]
    place: Place,
    /// The volume, or a directory one is mounted on
    #[arg(value_name = "VOLUME|DIR", required_unless_present = "all")]
    what: Option<Mounted>,
    /// The directory [default: everywhere it is mounted]
    dir: Option<PathBuf>,
    /// Every volume, wherever it is mounted: before the host goes down
    #[arg(long, conflicts_with_all = ["what", "dir", "rm"])]
    all: bool,
    /// Then take the volume away, with what was written to it
    #[arg(long)]
    rm: bool,
}

/// What is to be unmounted.
#[derive(Clone)]
enum Mounted {
    Volume(VolumeName),
    On(PathBuf),
}

impl std::str::FromStr for Mounted {
    type Err = VolumeError;

    fn from_str(text: &str) -> Result<Mounted, VolumeError> {
        if text.contains('/') { Ok(Mounted::On(text.into())) } else { text.parse().map(Mounted::Volume) }
    }
}

/// The daemon has another current directory.
fn absolute(dir: &Path) -> Result<String, Error> {
    let dir = std::path::absolute(dir).map_err(Error::Runtime)?;
    dir.into_os_string().into_string().map_err(Error::NotText)
}

impl MountCommand {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        let (client, runtime) = daemon(&self.place)?;
        let wanted = Mount { directory: absolute(&self.dir)? };
        let volume = runtime.block_on(self.mount(&client, &wanted))?;
        if self.json { print_json(&volume) } else { Ok(say!("{}", wanted.directory)) }
    }

    async fn mount(&self, client: &Client, wanted: &Mount) -> Result<Volume, Error> {
        let named = match &self.name {
            Some(name) => Some(name.image.to_string().parse::<VolumeName>()?),
            None => None,
        };
        let volume = self.volume.as_ref().or(named.as_ref()).ok_or(Error::NoVolume)?;
        let Some(name) = &self.name else { return Ok(client.mount(volume.as_str(), wanted).await?) };
        let made = client.create_volume(&plain(volume, &self.access, name, self.read_only)).await?;
        let mounted = client.mount(volume.as_str(), wanted).await;
        // It was made for this alone, and nothing was written to it.
        if mounted.is_err()
            && made.is_new
            && let Err(error) = client.remove_volume(volume.as_str(), false).await
        {
            tracing::warn!(%volume, %error, "a volume that was made for this is left");
        }
        Ok(mounted?)
    }
}

impl UmountCommand {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        let (client, runtime) = daemon(&self.place)?;
        runtime.block_on(self.unmount(&client))
    }

    async fn unmount(&self, client: &Client) -> Result<(), Error> {
        let (volume, dir) = match (&self.what, &self.dir) {
            (None, _) => return unmount_all(client).await,
            (Some(Mounted::Volume(volume)), dir) => {
                (volume.to_string(), dir.as_deref().map(absolute).transpose()?)
            }
            (Some(Mounted::On(dir)), None) => (mounted_on(client, dir).await?, Some(absolute(dir)?)),
            (Some(Mounted::On(_)), Some(_)) => return Err(Error::TwoDirectories),
        };
        client.unmount(&volume, &Unmount { directory: dir }).await?;
        if self.rm {
            client.remove_volume(&volume, false).await?;
        }
        Ok(say!("{volume}"))
    }
}

/// The volume that is mounted on a directory.
async fn mounted_on(client: &Client, dir: &Path) -> Result<String, Error> {
    // As the kernel names it, where that can be asked without touching what is mounted there.
    let dir = absolute(&match (dir.parent().map(Path::canonicalize), dir.file_name()) {
        (Some(Ok(parent)), Some(name)) => parent.join(name),
        _ => dir.to_owned(),
    })?;
    // As paths: with and without a slash at the end they are the same.
    let is_there = |at: &String| Path::new(at) == Path::new(&dir);
    let there = client.volumes().await?.into_iter().find(|volume| volume.mounts.iter().any(is_there));
    there.map(|volume| volume.name).ok_or(Error::NothingMounted { dir })
}

/// Goes on past those that fail.
async fn unmount_all(client: &Client) -> Result<(), Error> {
    let mut failed = Vec::new();
    for volume in client.volumes().await?.iter().filter(|volume| !volume.mounts.is_empty()) {
        match client.unmount(&volume.name, &Unmount::default()).await {
            Ok(()) => say!("{}", volume.name),
            Err(error) => failed.push(error.to_string()),
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(Error::NotUnmounted(failed)) }
}
