//! The volumes of a host: which there are, which are open, who uses them.
//!
//! Enters: a state directory, and requests by volume name. Leaves: volumes made, opened when they are first asked for, served, taken away. Invariants: of one volume one
//! thing is done at a time; what is asked about volumes is answered from this host alone, and never waits for a repository or another request.

mod attach;
mod error;
mod files;
mod jobs;
mod mount;
mod repositories;
mod status;

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::{Mutex, RwLock};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub use error::HostError;
pub use files::Compared;
use jobs::Jobs;
pub use jobs::{JobState, JobStatus};
use repositories::Repositories;
pub use status::{OpenStatus, RepositoryFigures, SinceOpen, VolumeFigures, VolumeStatus};

use crate::cache::Cache;
use crate::nbd::{Connector, Dormant, Export, Exports};
use crate::repo::MetaCache;
use crate::store;
use crate::units::ByteLen;
use crate::volume::{self, NewVolume, StateDir, Volume, VolumeError, VolumeName, VolumeRecord};

/// How long a volume that goes waits for what its clients have in flight.
const GRACE: Duration = Duration::from_secs(10);
/// How long a prefetch has to keep its list when its volume is closed.
const LAST_ACT: Duration = Duration::from_secs(5);
/// Names in a message: enough to see a typing error, few enough for one line.
const MOST_NAMES: usize = 8;

/// How a host behaves.
#[derive(Clone, Copy, Debug)]
pub struct HostOptions {
    /// How long a read waits for a repository that does not answer.
    pub remote_timeout: Duration,
    /// Bytes a second that may be fetched of what nobody asked for; `None` is no bound.
    pub prefetch_rate: Option<ByteLen>,
    /// How long a kernel device waits for a daemon that is gone before its requests fail.
    pub dead_timeout: Duration,
}

/// The volumes of a host.
pub struct Host {
    state: Arc<StateDir>,
    cache: Arc<Cache>,
    options: HostOptions,
    repositories: Repositories,
    exports: Arc<Exports>,
    /// Taken before any entry's `now`.
    volumes: Mutex<BTreeMap<VolumeName, Arc<Entry>>>,
    jobs: Jobs,
    /// Held by who counts what is cached of a volume.
    counting: tokio::sync::Mutex<()>,
    /// Held by who changes what the cache keeps for good, or begins a job that will.
    keeping: tokio::sync::Mutex<()>,
    /// Set once its server is there.
    connector: OnceLock<Connector>,
    stop: CancellationToken,
}

/// One volume.
#[derive(Default)]
struct Entry {
    /// Held by who makes, opens or takes away this volume, for as long as that takes.
    turn: tokio::sync::Mutex<()>,
    /// Held by who mounts or unmounts it. Taken before `turn`.
    mounting: tokio::sync::Mutex<()>,
    /// Held for moments only.
    now: RwLock<Now>,
    /// How much of it is cached, as it was counted last.
    cached: Mutex<Option<status::Cached>>,
}

/// What is known of a volume at the moment.
#[derive(Default)]
struct Now {
    /// `None`: it is not there yet, or not any more.
    record: Option<VolumeRecord>,
    open: Option<OpenVolume>,
    attached: Option<attach::Attached>,
}

struct OpenVolume {
    volume: Arc<Volume>,
    export: Arc<Export>,
    stop: CancellationToken,
    prefetch: JoinHandle<()>,
}

impl Host {
    /// The host of a state directory: finds the volumes in it, opens none. Blocks on the disk.
    pub fn open(
        state: StateDir,
        cache: Arc<Cache>,
        options: HostOptions,
        stop: CancellationToken,
    ) -> Result<Arc<Host>, VolumeError> {
        let mut volumes = BTreeMap::new();
        for name in state.volumes()? {
            match VolumeRecord::load(&state.volume_dir(name.as_str())) {
                Ok(record) => {
                    let now = RwLock::new(Now { record, ..Now::default() });
                    volumes.insert(name, Arc::new(Entry { now, ..Entry::default() }));
                }
                // The others are served all the same.
                Err(error) => tracing::error!(volume = %name, %error, "this volume can't be used"),
            }
        }
        let host = Arc::new_cyclic(|host: &Weak<Host>| Host {
            state: Arc::new(state),
            cache,
            options,
            repositories: Repositories::new(options.remote_timeout),
            exports: Arc::new(Exports::waking(Arc::new(Sleepers(host.clone())))),
            volumes: Mutex::new(volumes),
            jobs: Jobs::default(),
            counting: tokio::sync::Mutex::default(),
            keeping: tokio::sync::Mutex::default(),
            connector: OnceLock::new(),
            stop,
        });
        // Before anyone else wants their room; those that nobody asks for yet too.
        host.keep_what_is_pinned_now();
        Ok(host)
    }

    /// Tells it of the server of its exports, whose connections kernel devices are given.
    pub fn connect_through(&self, connector: Connector) {
        // A host has one server.
        let _ = self.connector.set(connector);
    }

    /// What is served, for a [`crate::nbd::Server`].
    pub fn exports(&self) -> &Arc<Exports> {
        &self.exports
    }

    /// Its state directory.
    pub fn state_dir(&self) -> &std::path::Path {
        self.state.root()
    }

    /// The host's cache.
    pub fn cache(&self) -> &Arc<Cache> {
        &self.cache
    }

    /// Every volume, by name. Looks at the kernel's table of mounts: for a blocking thread.
    pub fn list(&self) -> Vec<VolumeStatus> {
        self.entries().iter().filter_map(|(name, entry)| self.status(name, entry)).collect()
    }

    fn entries(&self) -> Vec<(VolumeName, Arc<Entry>)> {
        self.volumes.lock().iter().map(|(name, entry)| (name.clone(), entry.clone())).collect()
    }

    /// One volume. Looks at the kernel's table of mounts where it is attached.
    pub fn inspect(&self, name: &VolumeName) -> Result<VolumeStatus, HostError> {
        let entry = self.entry(name)?;
        self.status(name, &entry).ok_or_else(|| self.no_volume(name))
    }

    /// Makes a volume. One that is there and was made of the same wishes is left as it is. Whether it was made now.
    pub async fn create(&self, new: &NewVolume) -> Result<(VolumeStatus, bool), HostError> {
        let entry = self.volumes.lock().entry(new.name.clone()).or_default().clone();
        let turn = entry.turn.lock().await;
        let made = self.create_in_turn(new, &entry).await;
        drop(turn);
        if made.is_err() {
            self.forget_what_is_not_there(entry);
        }
        let is_new = made?;
        Ok((self.inspect(&new.name)?, is_new))
    }

    async fn create_in_turn(&self, new: &NewVolume, entry: &Entry) -> Result<bool, HostError> {
        let recorded = entry.now.read().record.clone();
        let mut new = new.clone();
        new.access = new.access.iter().map(|url| store::url::lasting(url)).collect::<Result<_, _>>()?;
        if let Some(record) = recorded {
            new.check_same(&record)?;
            return Ok(false);
        }
        if self.stop.is_cancelled() {
            return Err(HostError::Stopping);
        }
        let repository = self.repositories.open(&new.access).await?;
        let meta: Arc<dyn MetaCache> = self.cache.clone();
        let record = new.create(&self.state, &repository, &meta).await?;
        tracing::info!(volume = %new.name, image = %new.image, commit = %record.commit, "made");
        entry.now.write().record = Some(record);
        Ok(true)
    }

    /// Takes a volume away, with its writes. Nobody may use it.
    pub async fn remove(self: &Arc<Self>, name: &VolumeName) -> Result<(), HostError> {
        let entry = self.entry(name)?;
        let turn = entry.turn.lock().await;
        let record = self.record(name, &entry)?;
        if let Some(attached) = &entry.now.read().attached {
            let by = format!("it is attached as {}", attached.device().display());
            return Err(HostError::InUse { volume: name.to_string(), by });
        }
        let clients = entry.now.read().open.as_ref().map_or(0, |open| open.export.connections());
        if clients > 0 {
            let by = format!("{clients} NBD connection{}", if clients == 1 { "" } else { "s" });
            return Err(HostError::InUse { volume: name.to_string(), by });
        }
        self.refuse_with_a_job(name)?;
        self.close_in_turn(name, &entry).await?;
        let (state, removed) = (self.state.clone(), name.clone());
        let removing = move || {
            let was_pinned = volume::pin::is_pinned(&state.volume_dir(removed.as_str()));
            volume::remove(&state, &removed).map(|_| was_pinned)
        };
        let was_pinned = tokio::task::spawn_blocking(removing).await.map_err(|_| HostError::Stopping)??;
        entry.now.write().record = None;
        drop(turn);
        self.forget_what_is_not_there(entry);
        tracing::info!(volume = %name, "taken away");
        if was_pinned {
            self.keep_what_is_pinned().await;
        }
        self.free_what_is_left_of(&record).await;
        Ok(())
    }

    /// What every volume is, by its name.
    fn records(&self) -> Vec<(VolumeName, VolumeRecord)> {
        let with_record = |(name, entry): (VolumeName, Arc<Entry>)| {
            let record = entry.now.read().record.clone();
            record.map(|record| (name, record))
        };
        self.entries().into_iter().filter_map(with_record).collect()
    }

    /// Frees what the cache holds for nobody, if this was the last volume of its image: while there is one, the next may need the same.
    async fn free_what_is_left_of(&self, gone: &VolumeRecord) {
        let records = self.records();
        let of = |record: &VolumeRecord| (record.repository_id(), record.image.clone());
        if records.iter().any(|(_, record)| of(record) == of(gone)) {
            return;
        }
        // What it brought last may be on its way to the disk still.
        let _ = tokio::time::timeout(LAST_ACT, self.cache.written()).await;
        let (cache, state) = (self.cache.clone(), self.state.clone());
        let looking = move || volume::unused_chunks(&cache, &state, &records);
        let Ok(unused) = tokio::task::spawn_blocking(looking).await else { return };
        let freed = self.cache.free(unused).await;
        tracing::info!(
            image = gone.image,
            chunks = freed.chunks,
            bytes = freed.bytes.0,
            "its last volume is gone: freed what nobody needs"
        );
    }

    /// Opens a volume, if it is not open, and serves it.
    pub async fn serve(&self, name: &VolumeName) -> Result<Arc<Export>, HostError> {
        let entry = self.entry(name)?;
        let _turn = entry.turn.lock().await;
        self.serve_in_turn(name, &entry).await
    }

    async fn serve_in_turn(&self, name: &VolumeName, entry: &Entry) -> Result<Arc<Export>, HostError> {
        let open = entry.now.read().open.as_ref().map(|open| open.export.clone());
        if let Some(export) = open {
            return Ok(export);
        }
        let record = self.record(name, entry)?;
        if self.stop.is_cancelled() {
            return Err(HostError::Stopping);
        }
        let id = record.repository_id().unwrap_or_default();
        let repository = self.repositories.opened_before(&record.access, id)?;
        let (prefetch, read_only) = (record.prefetch, record.read_only);
        let volume =
            Volume::open(&self.state, &self.cache, &repository, name.as_str(), record, read_only).await?;
        let volume = Arc::new(volume);
        let export =
            Arc::new(Export::new(name.to_string(), volume.record().describe(), volume.device().clone()));
        self.exports.add(export.clone())?;
        let stop = self.stop.child_token();
        let prefetch = volume.clone().prefetch(prefetch, self.options.prefetch_rate, stop.clone());
        let prefetch = tokio::spawn(prefetch);
        tracing::info!(volume = %name, commit = %volume.record().commit, "open");
        entry.now.write().open = Some(OpenVolume { volume, export: export.clone(), stop, prefetch });
        Ok(export)
    }

    /// Closes a volume: its clients' connections end, its writes are flushed. It opens again when it is asked for.
    async fn close_in_turn(&self, name: &VolumeName, entry: &Entry) -> Result<(), HostError> {
        let Some(open) = entry.now.write().open.take() else { return Ok(()) };
        open.stop.cancel();
        let flushed = self.exports.remove(name.as_str(), GRACE).await;
        // Its last act is to keep a list.
        let _ = tokio::time::timeout(LAST_ACT, open.prefetch).await;
        flushed
            .map(drop)
            .map_err(|source| HostError::Flush { volume: name.to_string(), source: Box::new(source) })
    }

    /// Waits, bounded, until what runs beside the volumes has ended, after the host's stop.
    pub async fn stopped(&self) {
        let entries: Vec<_> = self.volumes.lock().values().cloned().collect();
        for entry in entries {
            let open = entry.now.write().open.take();
            if let Some(open) = open {
                let _ = tokio::time::timeout(LAST_ACT, open.prefetch).await;
            }
        }
    }

    fn entry(&self, name: &VolumeName) -> Result<Arc<Entry>, HostError> {
        let found = self.volumes.lock().get(name).cloned();
        found.ok_or_else(|| self.no_volume(name))
    }

    /// What the volume is. Lets go of the entry before it says that there is none: entries are locked under the map, never the other way round.
    fn record(&self, name: &VolumeName, entry: &Entry) -> Result<VolumeRecord, HostError> {
        let record = entry.now.read().record.clone();
        record.ok_or_else(|| self.no_volume(name))
    }

    fn no_volume(&self, name: &VolumeName) -> HostError {
        let volumes = self.volumes.lock();
        let there = volumes.iter().filter(|(_, entry)| entry.now.read().record.is_some());
        let known = there.map(|(known, _)| known.to_string()).take(MOST_NAMES).collect();
        HostError::NoVolume { volume: name.to_string(), known }
    }

    /// Forgets entries of volumes that are not there: they would stay for ever. One that somebody else has is left to the next time.
    fn forget_what_is_not_there(&self, entry: Arc<Entry>) {
        drop(entry);
        // One: the map's. Whoever has another one found it in the map, under this lock.
        let is_there = |entry: &Arc<Entry>| Arc::strong_count(entry) > 1 || entry.now.read().record.is_some();
        self.volumes.lock().retain(|_, entry| is_there(entry));
    }
}

/// The host, as its server asks for what is not open.
struct Sleepers(Weak<Host>);

#[async_trait]
impl Dormant for Sleepers {
    fn list(&self) -> Vec<(String, String)> {
        let Some(host) = self.0.upgrade() else { return Vec::new() };
        let volumes = host.volumes.lock();
        let described = |(name, entry): (&VolumeName, &Arc<Entry>)| {
            Some((name.to_string(), entry.now.read().record.as_ref()?.describe()))
        };
        volumes.iter().filter_map(described).collect()
    }

    async fn wake(&self, name: &str) -> Result<Option<Arc<Export>>, String> {
        let (Some(host), Ok(name)) = (self.0.upgrade(), name.parse::<VolumeName>()) else { return Ok(None) };
        match host.serve(&name).await {
            Ok(export) => Ok(Some(export)),
            Err(HostError::NoVolume { .. }) => Ok(None),
            Err(error) => {
                tracing::warn!(volume = %name, %error, "can't open");
                Err(error.to_string())
            }
        }
    }
}
