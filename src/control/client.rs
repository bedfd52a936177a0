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

use super::api::{
    Attach, CreateVolume, Failure, FilesRequest, Job, Mount, Status, Unmount, Volume, VolumeDiff,
};
use super::stream::Streamed;

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
            ClientError::Broken(_) => Some("if the daemon still runs, its log says why".to_owned()),
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

    /// Takes a volume away.
    pub async fn remove_volume(&self, name: &str) -> Result<(), ClientError> {
        self.exchange(Method::DELETE, &volume_path(name), None::<&()>).await.map(drop)
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

    /// Asks about files of a volume; each piece of the answer may take as long as a request.
    pub async fn files(&self, name: &str, wanted: &FilesRequest) -> Result<Streamed, ClientError> {
        self.streamed(&format!("{}/files", volume_path(name)), wanted).await
    }

    /// Asks what changed in a volume.
    pub async fn volume_diff(&self, name: &str, wanted: &VolumeDiff) -> Result<Streamed, ClientError> {
        self.streamed(&format!("{}/diff", volume_path(name)), wanted).await
    }

    async fn streamed<Q: Serialize>(&self, path: &str, body: &Q) -> Result<Streamed, ClientError> {
        let request = request(Method::POST, path, Some(body))?;
        let stream = self.connect().await?;
        let asked = async {
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
            let connection = tokio::spawn(connection);
            let answer = sender.send_request(request).await?;
            let (status, body) = (answer.status(), answer.into_body());
            if status.is_success() {
                return Ok(Streamed::new(body, self.limit, connection));
            }
            let read = Limited::new(body, MAX_ANSWER).collect().await;
            let read = read.map_err(|error| ClientError::Answer(error.to_string()))?;
            Err(refused(status, &read.to_bytes()))
        };
        tokio::time::timeout(self.limit, asked).await.map_err(|_| ClientError::TimedOut(self.limit))?
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
        let request = request(method, path, body)?;
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

fn request<Q: Serialize>(
    method: Method,
    path: &str,
    body: Option<&Q>,
) -> Result<Request<Full<Bytes>>, ClientError> {
    let body = match body {
        Some(body) => serde_json::to_vec(body).map_err(|error| ClientError::Answer(error.to_string()))?,
        None => Vec::new(),
    };
    Request::builder()
        .method(method)
        .uri(path)
        .header("host", "localhost")
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(|error| ClientError::Answer(error.to_string()))
}

fn parsed<A: DeserializeOwned>(answer: &[u8]) -> Result<A, ClientError> {
    serde_json::from_slice(answer).map_err(|error| ClientError::Answer(error.to_string()))
}

fn volume_path(name: &str) -> String {
    format!("/v1/volumes/{}", utf8_percent_encode(name, NON_ALPHANUMERIC))
}

/// What a refusal says; one that is not a daemon's is told by its status.
fn refused(status: StatusCode, answer: &[u8]) -> ClientError {
    match serde_json::from_slice(answer) {
        Ok(failure) => ClientError::Refused(failure),
        Err(_) => ClientError::Answer(format!("status {status}")),
    }
}
