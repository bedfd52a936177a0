//! Where files are read: a version from its repository, here; a volume by the daemon.
//!
//! Enters: what the user named. Leaves: streams that answer, the same from both. Invariant: a stream is read as it comes; a line of it is never longer than [`MAX_LINE`].

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use horcrux::control::api::{FilesRequest, VolumeDiff};
use horcrux::control::{Client, ClientError, Streamed, socket_of};
use horcrux::files::diff::DiffOptions;
use horcrux::files::ext4::Ext4;
use horcrux::files::request::Request;
use horcrux::files::{ChunkMemory, FilesError, Stream, VersionSource};
use horcrux::format::CommitId;
use horcrux::repo::{
    ImageName, MetaCache, NoMetaCache, RefSpec, Reference, Repository, Version, VersionOptions,
};
use horcrux::store::{self, RetryOptions};
use horcrux::units::{ByteLen, ByteRange};
use horcrux::volume::VolumeName;
use serde::de::DeserializeOwned;

use crate::files::Error;
use crate::place::Place;

/// Chunks kept in memory: what directories, inodes and small files near each other need again.
const MEMORY: ByteLen = ByteLen(64 << 20);
/// A daemon that says nothing for so long is given up.
const PATIENCE: Duration = Duration::from_secs(180);
/// The longest line of an answer: the changed lines of a text, which is a MiB at most, in JSON.
const MAX_LINE: usize = 32 << 20;

/// What is looked at.
pub enum Target {
    /// A version in a repository.
    Version(Places),
    /// A volume of the daemon, or a version of its image.
    Volume {
        /// The daemon, which has it.
        daemon: Daemon,
        /// The version.
        reference: Option<Reference>,
    },
}

/// An image in a repository.
pub struct Places {
    access: Vec<String>,
    repository: Repository,
    spec: RefSpec,
    memory: Arc<ChunkMemory>,
}

impl Places {
    /// Opens the repository.
    pub async fn open(access: Vec<String>, spec: RefSpec) -> Result<Places, Error> {
        let store = store::url::open_all(&access, RetryOptions::default())?;
        let repository = Repository::open(store).await?;
        Ok(Places { access, repository, spec, memory: ChunkMemory::new(MEMORY) })
    }

    /// The image.
    pub fn image(&self) -> &ImageName {
        &self.spec.image
    }

    /// A version of the image.
    pub async fn resolve(&self, reference: &Reference) -> Result<Version, Error> {
        let meta: Arc<dyn MetaCache> = Arc::new(NoMetaCache);
        let resolved = self.repository.resolve(&self.spec.image, reference, &meta).await?;
        self.version(resolved.commit).await
    }

    async fn version(&self, id: CommitId) -> Result<Version, Error> {
        let (meta, options) = (Arc::new(NoMetaCache), VersionOptions::default());
        Ok(Version::open(&self.repository, &self.spec.image, id, meta, options).await?)
    }

    /// The version that was named.
    pub async fn tip(&self) -> Result<Version, Error> {
        self.resolve(&self.spec.reference).await
    }

    /// The version before another.
    pub async fn parent(&self, of: &Version) -> Result<Version, Error> {
        match of.commit().parents.first() {
            Some(parent) => self.version(*parent).await,
            None => Err(Error::FirstVersion { what: self.spec.to_string() }),
        }
    }

    /// The filesystem of a version.
    pub async fn filesystem(&self, version: &Version) -> Result<Ext4, Error> {
        let source = VersionSource::new(version.clone(), self.memory.clone());
        Ext4::open(Arc::new(source)).await.map_err(|error| self.failed(error))
    }

    /// How this version is mounted.
    fn mount(&self) -> String {
        let access: Vec<String> = self.access.iter().map(|place| format!("--access {place}")).collect();
        format!("horcrux-cli mount --read-only {} --name {} DIR", access.join(" "), self.spec)
    }

    /// An error, with what it is about.
    pub fn failed(&self, source: FilesError) -> Error {
        Error::Files { what: self.spec.to_string(), source: Box::new(source), mount: self.mount() }
    }

    /// A stream of this program's own.
    pub fn answer(&self, stream: Stream) -> Answer {
        Answer::of(Origin::Here { stream, what: self.spec.to_string(), mount: self.mount() })
    }
}

/// The daemon, asked about one volume.
pub struct Daemon {
    client: Client,
    volume: VolumeName,
}

impl Daemon {
    /// The daemon of the state directory.
    pub fn new(place: &Place, volume: &str) -> Result<Daemon, Error> {
        Ok(Daemon { client: Client::new(&socket_of(&place.state_dir()?), PATIENCE), volume: volume.parse()? })
    }

    /// Asks about files.
    pub async fn ask(&self, reference: Option<&Reference>, request: &Request) -> Result<Answer, Error> {
        let request = FilesRequest::new(reference, request);
        let stream = self.client.files(self.volume.as_str(), &request).await?;
        Ok(Answer::of(Origin::Daemon(stream)))
    }

    /// Asks what changed.
    pub async fn compare(
        &self,
        old: Option<&Reference>,
        new: Option<&Reference>,
        options: DiffOptions,
    ) -> Result<Answer, Error> {
        let request = VolumeDiff::new(old, new, options);
        let stream = self.client.volume_diff(self.volume.as_str(), &request).await?;
        Ok(Answer::of(Origin::Daemon(stream)))
    }

    /// Asks where the disks differ.
    pub async fn blocks(
        &self,
        old: Option<&Reference>,
        new: Option<&Reference>,
    ) -> Result<Vec<ByteRange>, Error> {
        let request = VolumeDiff::blocks(old, new);
        let stream = self.client.volume_diff(self.volume.as_str(), &request).await?;
        let mut answer = Answer::of(Origin::Daemon(stream));
        let mut ranges = Vec::new();
        while let Some((start, len)) = answer.line::<(u64, u64)>().await? {
            let range = ByteRange::at(horcrux::units::ByteOffset(start), ByteLen(len));
            ranges.push(range.ok_or_else(|| Error::Answer("a range past 2^64".to_owned()))?);
        }
        Ok(ranges)
    }

    /// The repository its image is in; a version of it, or the one it stands on.
    pub async fn places(&self, reference: Option<Reference>) -> Result<Places, Error> {
        let volume = self.client.volume(self.volume.as_str()).await?;
        let reference = match reference {
            Some(reference) => reference,
            None => volume.commit.parse()?,
        };
        let spec = RefSpec { image: volume.image.parse()?, reference };
        Places::open(volume.access, spec).await
    }
}

enum Origin {
    Here { stream: Stream, what: String, mount: String },
    Daemon(Streamed),
}

/// A stream that answers.
pub struct Answer {
    from: Origin,
    gathered: BytesMut,
    /// How much of what was gathered has no line's end.
    searched: usize,
}

impl Answer {
    fn of(from: Origin) -> Answer {
        Answer { from, gathered: BytesMut::new(), searched: 0 }
    }

    /// The next piece; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        match &mut self.from {
            Origin::Here { stream, what, mount } => match stream.recv().await {
                Some(Err(source)) => {
                    let (what, mount) = (what.clone(), mount.clone());
                    Err(Error::Files { what, source: Box::new(source), mount })
                }
                Some(Ok(piece)) => Ok(Some(piece)),
                None => Ok(None),
            },
            Origin::Daemon(stream) => Ok(stream.next().await?),
        }
    }

    /// The next line, read as JSON; `None` at the end.
    pub async fn line<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Error> {
        loop {
            if let Some(at) = self.gathered[self.searched..].iter().position(|byte| *byte == b'\n') {
                let line = self.gathered.split_to(self.searched + at + 1);
                self.searched = 0;
                let parsed = serde_json::from_slice(&line);
                return parsed.map(Some).map_err(|error| Error::Answer(error.to_string()));
            }
            self.searched = self.gathered.len();
            if self.searched > MAX_LINE {
                return Err(Error::Answer("a line has no end".to_owned()));
            }
            match self.next().await? {
                Some(piece) => self.gathered.extend_from_slice(&piece),
                None if self.gathered.is_empty() => return Ok(None),
                None => return Err(ClientError::Answer("it ends in the middle of a line".to_owned()).into()),
            }
        }
    }
}
