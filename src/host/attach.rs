//! Volumes as kernel devices: attaching, detaching, and keeping their sockets alive.
//!
//! Enters: a volume's name. Leaves: `/dev/nbdN`. Invariants: whose a device is stands in the kernel (its backend identifier holds the volume's id), not in a file of ours, so
//! there is no moment at which a crash could lose it; a device whose connections are dead gets new ones as long as it is attached, from this process or the next.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use nbd_proto::HeaderMode;
use nbd_proto::client::{Connect, Negotiated, Wish};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{Entry, Host, HostError, VolumeStatus};
use crate::device::{Device, DeviceError, Piece};
use crate::format::ids;
use crate::kernel::filesystem::{Filesystem, PROBE_BYTES};
use crate::kernel::netlink::{Connection, Netlink};
use crate::kernel::{KernelError, apart, device, mount};
use crate::nbd::{Connector, Ended, Export};
use crate::units::{ByteLen, ByteOffset, ByteRange};
use crate::volume::{VolumeName, VolumeRecord};

/// Sockets of a device. With one, the driver leaves a request that takes long alone as long as its socket lives (nbd_xmit_timeout); with several it takes the socket for dead
/// after the block layer's timeout, and asks again over another: a remote that is away for a minute would cost a device all its sockets, over and over.
const CONNECTIONS: usize = 1;
/// How a backend identifier of ours begins; the volume's id follows.
const BACKEND: &str = "horcrux:";
/// What the block size is where no filesystem says: every one can be mounted with it.
const SMALLEST_BLOCK: u32 = 512;
/// How long our own server may take to answer our own handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(60);
/// A new socket that ends within this was not taken by the kernel, which had none that was dead.
const TAKEN_AFTER: Duration = Duration::from_millis(200);
/// How long a device that has no live socket is waited for to get one, before it is flushed all the same.
const SOCKETS_COME: Duration = Duration::from_secs(10);
/// How long a device that was disconnected has to close its sockets.
const SOCKETS_END: Duration = Duration::from_secs(5);
/// How long it waits between two tries to give a device new sockets: from, to.
const PAUSES: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(5)];

/// A volume's device.
pub(super) struct Attached {
    pub(super) index: u32,
    /// Cancelled when it is to be detached: its sockets end on purpose then.
    stop: CancellationToken,
    /// Whether all its sockets live.
    served: watch::Receiver<bool>,
    /// Ends after that, once its sockets have.
    keeper: JoinHandle<()>,
}

impl Attached {
    /// The device.
    pub(super) fn device(&self) -> PathBuf {
        device::path_of(self.index)
    }
}

/// By what a device says that it is this volume's.
fn backend_of(record: &VolumeRecord) -> String {
    format!("{BACKEND}{}", ids::to_hex(&record.id))
}

/// One connection to our own server, in its transmission phase.
struct Socket {
    client: UnixStream,
    negotiated: Negotiated,
    ended: Ended,
}

impl Host {
    /// Makes a volume a kernel device: a free one, or the one asked for. One that is a device already stays it.
    pub async fn attach(
        self: &Arc<Self>,
        name: &VolumeName,
        wanted: Option<&Path>,
    ) -> Result<VolumeStatus, HostError> {
        let wanted = match wanted {
            Some(path) => {
                let no_device = || KernelError::NoDevice { device: path.to_owned() };
                Some(device::index_of(path).ok_or_else(no_device)?)
            }
            None => None,
        };
        let entry = self.entry(name)?;
        let _turn = entry.turn.lock().await;
        let there = entry.now.read().attached.as_ref().map(|attached| (attached.index, attached.device()));
        match there {
            Some((index, _)) if wanted.is_none_or(|wanted| wanted == index) => return self.inspect(name),
            Some((_, device)) => {
                let by = format!("it is attached as {}", device.display());
                return Err(HostError::InUse { volume: name.to_string(), by });
            }
            None => {}
        }
        let export = self.serve_in_turn(name, &entry).await?;
        let record = self.record(name, &entry)?;
        let block_size = block_size(export.device()).await;
        let mut sockets = Vec::new();
        for _ in 0..CONNECTIONS {
            sockets.push(self.socket(&export).await?);
        }
        let (backend, timeout) = (backend_of(&record), self.options.dead_timeout);
        let (clients, ended): (Vec<_>, Vec<_>) =
            sockets.into_iter().map(|socket| ((socket.client, socket.negotiated), socket.ended)).unzip();
        let connecting = move || {
            let facts = &clients[0].1;
            let (size, flags) = (facts.size, facts.flags.0);
            let sockets: Vec<BorrowedFd<'_>> = clients.iter().map(|(client, _)| client.as_fd()).collect();
            let connection = Connection {
                index: wanted,
                size,
                block_size,
                flags,
                sockets: &sockets,
                dead_connection_timeout: timeout,
                backend: &backend,
            };
            let index = Netlink::open()?.connect(&connection)?;
            device::tune(index);
            Ok::<_, KernelError>(index)
        };
        let index = tokio::task::spawn_blocking(connecting).await.map_err(|_| HostError::Stopping)??;
        tracing::info!(volume = %name, device = %device::path_of(index).display(), block_size, "attached");
        self.keep(name, &entry, &record, index, ended);
        self.inspect(name)
    }

    /// Makes a volume a device no more. Nobody may have it mounted; one that is no device is left as it is.
    pub async fn detach(self: &Arc<Self>, name: &VolumeName) -> Result<(), HostError> {
        let entry = self.entry(name)?;
        // Not between the attach and the mount of one who mounts it.
        let _mounting = entry.mounting.lock().await;
        self.detach_in_turn(name).await
    }

    /// Of who has the turn to mount.
    pub(super) async fn detach_in_turn(self: &Arc<Self>, name: &VolumeName) -> Result<(), HostError> {
        let entry = self.entry(name)?;
        let attached = entry.now.read().attached.as_ref().map(|now| (now.index, now.served.clone()));
        let Some((index, mut served)) = attached else { return Ok(()) };
        // A device found at the daemon's start has a socket again once its volume is open. That takes the turn, and the flush needs it: so the turn is taken after both.
        let _ = tokio::time::timeout(SOCKETS_COME, served.wait_for(|served| *served)).await;
        let flushed = match device::is_connected(index) {
            true => Some(apart::flush(index).await.map_err(|error| in_use(name, error))?),
            false => None,
        };
        let disconnected = self.disconnect(name, &entry, index).await;
        if let Some(flushed) = flushed {
            flushed.let_go().await;
        }
        disconnected
    }

    /// Disconnects a device that nobody uses, and forgets it. One that is another by now stays.
    async fn disconnect(
        self: &Arc<Self>,
        name: &VolumeName,
        entry: &Entry,
        index: u32,
    ) -> Result<(), HostError> {
        let _turn = entry.turn.lock().await;
        let stop = match &entry.now.read().attached {
            Some(attached) if attached.index == index => attached.stop.clone(),
            _ => return Ok(()),
        };
        let record = self.record(name, entry)?;
        let stopping = stop.clone();
        let disconnecting = move || {
            if !device::is_connected(index) {
                return Ok(());
            }
            let netlink = Netlink::open()?;
            // Before: the sockets end on purpose now.
            stopping.cancel();
            netlink.disconnect(index)
        };
        let disconnected = tokio::task::spawn_blocking(disconnecting).await.map_err(|_| HostError::Stopping);
        if let Err(error) = disconnected.and_then(|done| Ok(done?)) {
            if stop.is_cancelled() && !self.stop.is_cancelled() {
                // It is a device still, so somebody has to look after its sockets.
                self.keep(name, entry, &record, index, Vec::new());
            }
            return Err(error);
        }
        let attached = entry.now.write().attached.take();
        if let Some(attached) = attached {
            attached.stop.cancel();
            // Who takes the volume away next must not find it connected.
            let _ = tokio::time::timeout(SOCKETS_END, attached.keeper).await;
        }
        tracing::info!(volume = %name, device = %device::path_of(index).display(), "detached");
        Ok(())
    }

    /// Finds devices that an earlier daemon attached, and gives them new sockets: what their programs asked meanwhile is answered then.
    pub async fn adopt(self: &Arc<Self>) {
        let found = tokio::task::spawn_blocking(|| device::connected(|backend| backend.starts_with(BACKEND)));
        let found = match found.await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => return tracing::debug!(%error, "no block devices to be seen"),
            Err(_) => return,
        };
        for (name, entry) in self.entries() {
            let Some(record) = entry.now.read().record() else { continue };
            let backend = backend_of(&record);
            // Two of one volume there can't be, but for somebody's hand: each is kept alive.
            for (index, _) in found.iter().filter(|(_, whose)| *whose == backend) {
                tracing::info!(volume = %name, device = %device::path_of(*index).display(), "found attached");
                self.keep(&name, &entry, &record, *index, Vec::new());
                self.thaw_what_was_frozen(&record, *index);
            }
        }
    }

    /// Notes that a volume is a device, and looks after its sockets from now on.
    fn keep(
        self: &Arc<Self>,
        name: &VolumeName,
        entry: &Entry,
        record: &VolumeRecord,
        index: u32,
        ended: Vec<Ended>,
    ) {
        let stop = self.stop.child_token();
        let (serving, served) = watch::channel(!ended.is_empty());
        let mut keeper = Keeper {
            host: Arc::downgrade(self),
            name: name.clone(),
            backend: backend_of(record),
            index,
            serving,
            live: ended.into_iter().collect(),
        };
        let stopping = stop.clone();
        let keeping = async move {
            tokio::select! { () = stopping.cancelled() => {}, () = keeper.run() => {} }
            while keeper.live.next().await.is_some() {}
        };
        entry.now.write().attached = Some(Attached { index, stop, served, keeper: tokio::spawn(keeping) });
    }

    /// A new connection to our own server.
    async fn socket(&self, export: &Arc<Export>) -> Result<Socket, HostError> {
        let connector: &Connector = self.connector.get().ok_or(HostError::Stopping)?;
        let system = |action: &'static str| {
            move |source| KernelError::System { action: action.into(), path: None, source }
        };
        let (client, server) = UnixStream::pair().map_err(system("make a pair of sockets"))?;
        let ended = connector.serve(server).map_err(system("serve a socket"))?;
        let name = export.name().to_owned();
        let handshake = move || converse(client, name);
        let (client, negotiated) = tokio::task::spawn_blocking(handshake)
            .await
            .map_err(|_| HostError::Stopping)?
            .map_err(system("connect to the daemon's own server"))?;
        Ok(Socket { client, negotiated, ended })
    }
}

/// Looks after the sockets of one device.
struct Keeper {
    host: Weak<Host>,
    name: VolumeName,
    backend: String,
    index: u32,
    serving: watch::Sender<bool>,
    live: FuturesUnordered<Ended>,
}

impl Keeper {
    async fn run(&mut self) {
        let mut pause = PAUSES[0];
        let mut lost: Option<Instant> = None;
        loop {
            while self.live.len() >= CONNECTIONS {
                self.serving.send_replace(true);
                self.live.next().await;
            }
            self.serving.send_replace(false);
            if !self.is_ours().await {
                return self.forget();
            }
            let since = *lost.get_or_insert_with(Instant::now);
            match self.reconnect().await {
                Ok(true) if self.live.len() >= CONNECTIONS => {
                    let device = device::path_of(self.index);
                    tracing::info!(volume = %self.name, device = %device.display(), after = ?since.elapsed(), "its sockets are new");
                    (pause, lost) = (PAUSES[0], None);
                    continue;
                }
                Ok(true) => continue,
                // Either all the kernel has are alive, or it has not seen yet that one is dead.
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(volume = %self.name, device = %device::path_of(self.index).display(), %error, "can't give the device new sockets yet");
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSES[1]);
        }
    }

    /// Whether the device is still this volume's. One that was disconnected by somebody else is nobody's.
    async fn is_ours(&self) -> bool {
        let (index, backend) = (self.index, self.backend.clone());
        let asking = move || device::backend_of(index).is_some_and(|whose| whose == backend);
        tokio::task::spawn_blocking(asking).await.unwrap_or(true)
    }

    fn forget(&self) {
        let Some(host) = self.host.upgrade() else { return };
        let Ok(entry) = host.entry(&self.name) else { return };
        let mut now = entry.now.write();
        if now.attached.as_ref().is_some_and(|attached| attached.index == self.index) {
            let device = device::path_of(self.index);
            tracing::warn!(volume = %self.name, device = %device.display(), "somebody else has detached it");
            now.attached = None;
        }
    }

    /// Gives the device one new socket; `false` where the kernel did not take it.
    async fn reconnect(&mut self) -> Result<bool, HostError> {
        let host = self.host.upgrade().ok_or(HostError::Stopping)?;
        let export = host.serve(&self.name).await?;
        let Socket { client, mut ended, .. } = host.socket(&export).await?;
        drop(host);
        let (index, backend) = (self.index, self.backend.clone());
        // On a thread that serves nothing: the driver may wait for requests that only our server can answer.
        let giving = move || Netlink::open()?.reconfigure(index, &backend, &[client.as_fd()]);
        tokio::task::spawn_blocking(giving).await.map_err(|_| HostError::Stopping)??;
        if tokio::time::timeout(TAKEN_AFTER, &mut ended).await.is_ok() {
            return Ok(false);
        }
        self.live.push(ended);
        Ok(true)
    }
}

/// The block size the filesystem on a device needs.
async fn block_size(device: &Arc<Device>) -> u32 {
    // What can't be read now is read, or fails, when it is mounted.
    let Ok(start) = first_bytes(device).await else { return SMALLEST_BLOCK };
    Filesystem::probe(&start).map_or(SMALLEST_BLOCK, |filesystem| filesystem.block_size())
}

/// As much of a device's start as says which filesystem is on it.
pub(super) async fn first_bytes(device: &Arc<Device>) -> Result<Vec<u8>, DeviceError> {
    let len = device.size().0.min(PROBE_BYTES as u64);
    let mut start = Vec::with_capacity(PROBE_BYTES);
    for piece in device.read(ByteRange { start: ByteOffset(0), end: ByteOffset(len) }).await? {
        match piece {
            Piece::Zero(ByteLen(len)) => start.resize(start.len() + len as usize, 0),
            Piece::Chunk(slice) => start.extend_from_slice(&slice),
            Piece::Bytes(bytes) => start.extend_from_slice(&bytes),
        }
    }
    Ok(start)
}

/// Who has the volume's device, where the kernel says that somebody does.
pub(super) fn in_use(volume: &VolumeName, error: KernelError) -> HostError {
    let KernelError::DeviceBusy { device } = error else { return error.into() };
    let by = match mount::mounts_of(&device).unwrap_or_default().as_slice() {
        [] => format!("{} is held by another program", device.display()),
        [dir, ..] => format!("{} is mounted on {}", device.display(), dir.display()),
    };
    HostError::InUse { volume: volume.to_string(), by }
}

/// The handshake as a kernel needs it: simple replies. Blocks, bounded.
fn converse(mut socket: UnixStream, name: String) -> io::Result<(UnixStream, Negotiated)> {
    socket.set_read_timeout(Some(HANDSHAKE_LIMIT))?;
    socket.set_write_timeout(Some(HANDSHAKE_LIMIT))?;
    let mut connect = Connect::new(Wish { name, mode: HeaderMode::Simple, ..Wish::default() });
    let (mut input, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let used = connect.handle_input(&input).map_err(io::Error::other)?;
        input.drain(..used);
        socket.write_all(connect.output())?;
        connect.output().clear();
        if let Some(negotiated) = connect.negotiated() {
            // The kernel has its own patience.
            socket.set_read_timeout(None)?;
            socket.set_write_timeout(None)?;
            return Ok((socket, negotiated));
        }
        match socket.read(&mut buffer)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => input.extend_from_slice(&buffer[..read]),
        }
    }
}
