//! A client of the control API, for the command line and the Docker driver.
//!
//! Enters: requests. Leaves: what the daemon answers, or why there is no answer. Invariant: every wait has an end.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::api::{Attach, CreateVolume, Failure, Job, Mount, Status, Unmount, Volume};
use super::version_api::{
    Checkout, CloneTo, Commit, Force, LoggedCommit, Pulled, PushTo, TakeSnapshot, VolumeSnapshot,
    VolumeVersion,
};

/// How long the socket may take to be connected to: a daemon that lives accepts at once.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// The longest answer that is read: a list of thousands of volumes.
const MAX_ANSWER: usize = 64 << 20;

/// Why a request came to nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nobody listens there.
    #[error("no daemon answers at {}: {source}", socket.display())]
    NoDaemon {
        /// The socket.
        socket: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The daemon refused, and said why.
    #[error("{}", .0.error)]
    Refused(Failure),
    /// There was no whole answer.
    #[error("the daemon's answer was cut short: {0}")]
    Broken(#[from] hyper::Error),
    /// It took too long.
    #[error("the daemon did not answer within {} s", .0.as_secs())]
    TimedOut(Duration),
    /// What came is not what this client knows.
    #[error("the daemon's answer can't be understood: {0}")]
    Answer(String),
}

impl ClientError {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            ClientError::NoDaemon { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                Some("run this as the user the daemon runs as".to_owned())
            }
            ClientError::NoDaemon { .. } => {
                Some("start it with 'horcrux-nbd serve', or give the --state-dir it runs on".to_owned())
            }
            ClientError::Refused(failure) => failure.hint.clone(),
            ClientError::Answer(_) => Some("use a client of the daemon's release".to_owned()),
            _ => None,
        }
    }

    /// Whether the daemon is not there, or went away in the middle of it: one that is restarted can be asked again.
    pub fn is_away(&self) -> bool {
        match self {
            ClientError::NoDaemon { source, .. } => source.kind() != io::ErrorKind::PermissionDenied,
            ClientError::Broken(_) => true,
            _ => false,
        }
    }
}

/// A volume that was asked for.
#[derive(Clone, Debug)]
pub struct Made {
    /// The volume.
    pub volume: Volume,
    /// Whether it was made now.
    pub is_new: bool,
}

/// A daemon that can be asked.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    limit: Duration,
}

impl Client {
    /// The daemon that listens on this socket; each request may take as long as `limit`.
    pub fn new(socket: &Path, limit: Duration) -> Client {
        Client { socket: socket.to_owned(), limit }
    }

    /// The daemon as it is now.
    pub async fn status(&self) -> Result<Status, ClientError> {
        self.ask(Method::GET, "/v1/status", None::<&()>).await
    }

    /// Every volume, by name.
    pub async fn volumes(&self) -> Result<Vec<Volume>, ClientError> {
        self.ask(Method::GET, "/v1/volumes", None::<&()>).await
    }

    /// One volume.
    pub async fn volume(&self, name: &str) -> Result<Volume, ClientError> {
        self.ask(Method::GET, &volume_path(name), None::<&()>).await
    }

    /// Makes a volume; one that is there and was made of the same wishes is left as it is.
    pub async fn create_volume(&self, wanted: &CreateVolume) -> Result<Made, ClientError> {
        let (status, answer) = self.answered(Method::POST, "/v1/volumes", Some(wanted)).await?;
        Ok(Made { volume: parsed(&answer)?, is_new: status == StatusCode::CREATED })
    }

    /// Takes a volume away; commits that are not pushed are lost with `force` alone.
    pub async fn remove_volume(&self, name: &str, force: bool) -> Result<(), ClientError> {
        let path = format!("{}{}", volume_path(name), if force { "?force=true" } else { "" });
        self.exchange(Method::DELETE, &path, None::<&()>).await.map(drop)
    }

    /// Seals what a volume is now as a commit; the job that makes it.
    pub async fn commit(&self, name: &str, wanted: &Commit) -> Result<Job, ClientError> {
        self.ask(Method::POST, &format!("{}/commit", volume_path(name)), Some(wanted)).await
    }

    /// Begins to push a volume's commits.
    pub async fn push(&self, name: &str, wanted: &PushTo) -> Result<Job, ClientError> {
        self.ask(Method::POST, &format!("{}/push", volume_path(name)), Some(wanted)).await
    }

    /// Has a volume stand on its branch's tip.
    pub async fn pull(&self, name: &str, force: bool) -> Result<Pulled, ClientError> {
        self.ask(Method::POST, &format!("{}/pull", volume_path(name)), Some(&Force { force })).await
    }

    /// Has a volume stand on another version.
    pub async fn checkout(&self, name: &str, wanted: &Checkout) -> Result<Volume, ClientError> {
        self.ask(Method::POST, &format!("{}/checkout", volume_path(name)), Some(wanted)).await
    }

    /// Has a volume be what its commit is.
    pub async fn reset(&self, name: &str, force: bool) -> Result<Volume, ClientError> {
        self.ask(Method::POST, &format!("{}/reset", volume_path(name)), Some(&Force { force })).await
    }

    /// A volume in git's words.
    pub async fn version(&self, name: &str) -> Result<VolumeVersion, ClientError> {
        self.ask(Method::GET, &format!("{}/version", volume_path(name)), None::<&()>).await
    }

    /// The newest commits of a volume's history.
    pub async fn log(&self, name: &str, most: Option<usize>) -> Result<Vec<LoggedCommit>, ClientError> {
        let most = most.map(|most| format!("?n={most}")).unwrap_or_default();
        self.ask(Method::GET, &format!("{}/log{most}", volume_path(name)), None::<&()>).await
    }

    /// A volume's snapshots.
    pub async fn snapshots(&self, name: &str) -> Result<Vec<VolumeSnapshot>, ClientError> {
        self.ask(Method::GET, &format!("{}/snapshots", volume_path(name)), None::<&()>).await
    }

    /// Takes a snapshot of what a volume is now.
    pub async fn snapshot(&self, name: &str, wanted: &TakeSnapshot) -> Result<VolumeSnapshot, ClientError> {
        self.ask(Method::POST, &format!("{}/snapshots", volume_path(name)), Some(wanted)).await
    }

    /// Forgets a snapshot.
    pub async fn remove_snapshot(&self, name: &str, snapshot: &str) -> Result<(), ClientError> {
        self.exchange(Method::DELETE, &snapshot_path(name, snapshot), None::<&()>).await.map(drop)
    }

    /// Makes a volume what it was in a snapshot.
    pub async fn rollback(&self, name: &str, snapshot: &str, force: bool) -> Result<Volume, ClientError> {
        let path = format!("{}/rollback", snapshot_path(name, snapshot));
        self.ask(Method::POST, &path, Some(&Force { force })).await
    }

    /// Makes another volume that is what this one is now.
    pub async fn clone_volume(&self, name: &str, wanted: &CloneTo) -> Result<Volume, ClientError> {
        self.ask(Method::POST, &format!("{}/clone", volume_path(name)), Some(wanted)).await
    }

    /// Makes a volume a kernel device.
    pub async fn attach(&self, name: &str, wanted: &Attach) -> Result<Volume, ClientError> {
        self.ask(Method::POST, &format!("{}/attach", volume_path(name)), Some(wanted)).await
    }

    /// Makes a volume a kernel device no more.
    pub async fn detach(&self, name: &str) -> Result<(), ClientError> {
        self.exchange(Method::POST, &format!("{}/detach", volume_path(name)), None::<&()>).await.map(drop)
    }

    /// Mounts a volume on a directory, by its absolute path.
    pub async fn mount(&self, name: &str, wanted: &Mount) -> Result<Volume, ClientError> {
        self.ask(Method::POST, &format!("{}/mount", volume_path(name)), Some(wanted)).await
    }

    /// Unmounts a volume.
    pub async fn unmount(&self, name: &str, wanted: &Unmount) -> Result<(), ClientError> {
        self.exchange(Method::POST, &format!("{}/unmount", volume_path(name)), Some(wanted)).await.map(drop)
    }

    /// Begins to pin a volume.
    pub async fn pin(&self, name: &str) -> Result<Job, ClientError> {
        self.ask(Method::POST, &format!("{}/pin", volume_path(name)), None::<&()>).await
    }

    /// Lets a volume leave the cache again.
    pub async fn unpin(&self, name: &str) -> Result<(), ClientError> {
        self.exchange(Method::POST, &format!("{}/unpin", volume_path(name)), None::<&()>).await.map(drop)
    }

    /// Every job.
    pub async fn jobs(&self) -> Result<Vec<Job>, ClientError> {
        self.ask(Method::GET, "/v1/jobs", None::<&()>).await
    }

    /// One job.
    pub async fn job(&self, id: u64) -> Result<Job, ClientError> {
        self.ask(Method::GET, &format!("/v1/jobs/{id}"), None::<&()>).await
    }

    /// Has a job end.
    pub async fn cancel_job(&self, id: u64) -> Result<Job, ClientError> {
        self.ask(Method::DELETE, &format!("/v1/jobs/{id}"), None::<&()>).await
    }

    async fn ask<Q: Serialize, A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&Q>,
    ) -> Result<A, ClientError> {
        parsed(&self.exchange(method, path, body).await?)
    }

    async fn exchange<Q: Serialize>(
        &self,
        method: Method,
        path: &str,
        body: Option<&Q>,
    ) -> Result<Bytes, ClientError> {
        Ok(self.answered(method, path, body).await?.1)
    }

    async fn answered<Q: Serialize>(
        &self,
        method: Method,
        path: &str,
        body: Option<&Q>,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let body = match body {
            Some(body) => serde_json::to_vec(body).map_err(|error| ClientError::Answer(error.to_string()))?,
            None => Vec::new(),
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| ClientError::Answer(error.to_string()))?;
        let stream = self.connect().await?;
        let exchanged = async {
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
            let asked = async {
                let answer = sender.send_request(request).await?;
                let status = answer.status();
                let read = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
                let read = read.map_err(|error| ClientError::Answer(error.to_string()))?;
                Ok::<_, ClientError>((status, read.to_bytes()))
            };
            let mut asked = std::pin::pin!(asked);
            tokio::select! {
                asked = asked.as_mut() => asked,
                // It ends first where the daemon closes the connection with its answer.
                ended = connection => { ended?; asked.await }
            }
        };
        let (status, answer) = tokio::time::timeout(self.limit, exchanged)
            .await
            .map_err(|_| ClientError::TimedOut(self.limit))??;
        if status.is_success() { Ok((status, answer)) } else { Err(refused(status, &answer)) }
    }

    async fn connect(&self) -> Result<UnixStream, ClientError> {
        let failed = |source| ClientError::NoDaemon { socket: self.socket.clone(), source };
        let connecting = tokio::time::timeout(CONNECT_LIMIT, UnixStream::connect(&self.socket));
        connecting.await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map_err(failed)
    }
}

fn parsed<A: DeserializeOwned>(answer: &[u8]) -> Result<A, ClientError> {
    serde_json::from_slice(answer).map_err(|error| ClientError::Answer(error.to_string()))
}

fn volume_path(name: &str) -> String {
    format!("/v1/volumes/{}", utf8_percent_encode(name, NON_ALPHANUMERIC))
}

fn snapshot_path(name: &str, snapshot: &str) -> String {
    format!("{}/snapshots/{}", volume_path(name), utf8_percent_encode(snapshot, NON_ALPHANUMERIC))
}

/// What a refusal says; one that is not a daemon's is told by its status.
fn refused(status: StatusCode, answer: &[u8]) -> ClientError {
    match serde_json::from_slice(answer) {
        Ok(failure) => ClientError::Refused(failure),
        Err(_) => ClientError::Answer(format!("status {status}")),
    }
}
