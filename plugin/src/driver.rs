//! Docker's requests, turned into the daemon's.
//!
//! Enters: what Docker asks. Leaves: what the daemon did of it. Invariants: of one volume one thing is done at a time; which volumes there are is answered from this
//! driver's own memory, because Docker forgets a volume whose driver says an error; what could not be let go yet is let go later.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use horcrux::control::api::{self, Mount, Unmount};
use horcrux::control::{Client, ClientError};
use horcrux::kernel::{KernelError, mount};
use horcrux::volume::{VolumeError, VolumeName};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::{Notify, OwnedMutexGuard};
use tokio_util::sync::CancellationToken;

use crate::ledger::{Entry, Ledger, LedgerError};
use crate::options::{self, OptionError};
use crate::words::Volume;

/// Docker waits two minutes for a volume to be made or mounted, and one for the rest.
const LONG: Duration = Duration::from_secs(110);
const SHORT: Duration = Duration::from_secs(50);
/// A mount is to be answered within half a minute; the daemon gives up before this.
const MOUNT_LIMIT: Duration = Duration::from_secs(28);
/// A daemon that is not there may be on its way, for so long; and how often it is looked for.
const RESTART_LIMIT: Duration = Duration::from_secs(10);
const RESTART_LOOK: Duration = Duration::from_millis(200);
/// How long an inspection waits for what only the daemon knows.
const LOOK_LIMIT: Duration = Duration::from_secs(2);
/// What is tidied up must not keep a request waiting for long.
const TIDY_LIMIT: Duration = Duration::from_secs(10);
/// Between two tries to let go what could not be let go: from, to.
const PAUSES: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(30)];

/// Why a request of Docker's was not done.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    #[error(
        "there is no volume {0}: 'docker volume create -d horcrux-nbd -o name=IMAGE -o access=REPO {0}' makes one"
    )]
    NoVolume(String),
    #[error("volume {0} is in use: a container has it mounted")]
    InUse(String),
    #[error("volume {0} is busy with an earlier request; try again")]
    Busy(String),
    #[error(
        "volume {0} is mounted where this driver does not see it: daemon and driver must run in one mount namespace"
    )]
    ElsewhereMounted(String),
    #[error(transparent)]
    Name(#[from] VolumeError),
    #[error(transparent)]
    Options(#[from] OptionError),
    #[error("{}{}", .0, hinted(.0.hint().as_deref()))]
    Daemon(#[from] ClientError),
    #[error("{}{}", .0, hinted(.0.hint()))]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error("the request can't be understood: {0}")]
    Request(serde_json::Error),
    #[error("the request came without its body, as Docker's second tries do; try again")]
    Empty,
    #[error("the driver failed at this; its log says how")]
    Internal,
}

/// Docker shows one line.
fn hinted(hint: Option<&str>) -> String {
    hint.map(|hint| format!(" ({hint})")).unwrap_or_default()
}

/// The driver.
pub struct Driver {
    /// Where the daemon listens.
    daemon: PathBuf,
    /// Volumes are mounted below it, by their names. Without symbolic links.
    mounts: PathBuf,
    ledger: Ledger,
    turns: Mutex<HashMap<String, Weak<Turn>>>,
    untidy: Notify,
}

/// Who holds it alone does something about a volume.
type Turn = tokio::sync::Mutex<()>;

impl Driver {
    /// A driver that asks the daemon at this socket.
    pub fn new(daemon: PathBuf, mounts: PathBuf, ledger: Ledger) -> Driver {
        Driver { daemon, mounts, ledger, turns: Mutex::default(), untidy: Notify::new() }
    }

    /// A Docker begins to use this driver. Never refused: Docker would take that for a driver that can do nothing, for as long as it runs.
    pub async fn activate(self: &Arc<Self>) -> Result<(), DriverError> {
        self.on_disk(|ledger| ledger.greet()).await
    }

    /// Takes up what the daemon has, where this driver's own memory is new: perhaps it was lost, and Docker makes an empty volume of its own in the place of one that is not known here.
    pub async fn take_up(self: &Arc<Self>) -> bool {
        if !self.ledger.is_new() {
            return true;
        }
        let deadline = Instant::now() + LOOK_LIMIT;
        let volumes = match self.daemon(deadline).volumes().await {
            Ok(volumes) => volumes,
            Err(error) => {
                tracing::warn!(%error, "can't take up the daemon's volumes yet");
                return false;
            }
        };
        let known = volumes.into_iter().map(|volume| (volume.name, volume.created.unwrap_or_default()));
        let known: Vec<_> = known.collect();
        if !known.is_empty() {
            tracing::info!(volumes = known.len(), "taken up from the daemon");
        }
        matches!(self.in_ledger(move |ledger| ledger.take_up(&known)).await, Ok(Ok(())))
    }

    /// `docker volume create`. Asked again for what is there it changes nothing.
    pub async fn create(
        self: &Arc<Self>,
        name: &str,
        options: &BTreeMap<String, String>,
    ) -> Result<(), DriverError> {
        name.parse::<VolumeName>()?;
        let deadline = Instant::now() + LONG;
        let _turn = self.turn(name, deadline).await?;
        let made = if options.is_empty() {
            if self.ledger.has(name) {
                return Ok(());
            }
            // The daemon may have it: made by the command line.
            match self.daemon(deadline).volume(name).await {
                Err(error) if is_refusal(&error, "no_volume") => {
                    return Err(OptionError::Missing("name").into());
                }
                found => found?,
            }
        } else {
            self.daemon(deadline).create_volume(&options::wanted(name, options)?).await?.volume
        };
        let (name, created_s) = (name.to_owned(), made.created.unwrap_or_default());
        Ok(self.on_disk(move |ledger| ledger.add(&name, created_s)).await??)
    }

    /// `docker volume rm`. One that is gone already is as good.
    pub async fn remove(self: &Arc<Self>, name: &str) -> Result<(), DriverError> {
        let deadline = Instant::now() + SHORT;
        let _turn = self.turn(name, deadline).await?;
        if !self.ledger.has(name) {
            return Ok(());
        }
        if self.ledger.is_used_in_this_session(name) {
            return Err(DriverError::InUse(name.to_owned()));
        }
        // An earlier Docker may have gone without a word about what it had mounted: whether someone uses it, the kernel says.
        if let Err(error) = self.let_go(name, deadline).await {
            if self.ledger.is_used(name)
                && let Err(error) = self.bring(name, Instant::now() + TIDY_LIMIT).await
            {
                tracing::warn!(volume = name, %error, "unmounted under someone who uses it");
            }
            return Err(error);
        }
        let volume = name.to_owned();
        self.on_disk(move |ledger| ledger.unuse(&volume)).await?;
        match self.daemon(deadline).remove_volume(name, false).await {
            Err(error) if !is_refusal(&error, "no_volume") => return Err(error.into()),
            _ => {}
        }
        let name = name.to_owned();
        Ok(self.on_disk(move |ledger| ledger.remove(&name)).await??)
    }

    /// A container starts, or something is copied in or out of one. Returns where the volume is.
    pub async fn mount(self: &Arc<Self>, name: &str, id: &str) -> Result<PathBuf, DriverError> {
        let deadline = Instant::now() + MOUNT_LIMIT;
        let _turn = self.turn(name, deadline).await?;
        if !self.ledger.has(name) {
            return Err(DriverError::NoVolume(name.to_owned()));
        }
        let brought = match self.bring(name, deadline).await {
            Ok(()) => {
                let (volume, id) = (name.to_owned(), id.to_owned());
                self.on_disk(move |ledger| ledger.use_by(&volume, &id)).await?.map_err(DriverError::from)
            }
            error => error,
        };
        if let Err(error) = brought {
            // Docker does not unmount what could not be mounted. The daemon undoes what it was too slow for, so as a rule the guard is all there is.
            if matches!(error, DriverError::ElsewhereMounted(_)) || !self.unguarded(name).await {
                self.let_go_or_later(name, Instant::now() + TIDY_LIMIT).await;
            }
            return Err(error);
        }
        Ok(self.dir(name))
    }

    /// A container has ended, or a copy. What can't be let go now is let go later: Docker asks once.
    pub async fn unmount(self: &Arc<Self>, name: &str, id: &str) -> Result<(), DriverError> {
        let deadline = Instant::now() + SHORT;
        let _turn = self.turn(name, deadline).await?;
        if !self.ledger.has(name) {
            return Err(DriverError::NoVolume(name.to_owned()));
        }
        let (volume, id) = (name.to_owned(), id.to_owned());
        self.on_disk(move |ledger| ledger.unuse_by(&volume, &id)).await?;
        self.let_go_or_later(name, deadline).await;
        Ok(())
    }

    /// Where a volume is mounted; `None` while it is not.
    pub fn path(&self, name: &str) -> Result<Option<PathBuf>, DriverError> {
        if !self.ledger.has(name) {
            return Err(DriverError::NoVolume(name.to_owned()));
        }
        Ok(self.ledger.is_used(name).then(|| self.dir(name)))
    }

    /// A volume, with what the daemon says of it if it answers at once.
    pub async fn get(&self, name: &str) -> Result<Volume, DriverError> {
        let entry = self.ledger.get(name).ok_or_else(|| DriverError::NoVolume(name.to_owned()))?;
        let mut volume = self.shown(name.to_owned(), &entry);
        let daemon = Client::new(&self.daemon, LOOK_LIMIT);
        // All of it: a client alone has time to connect on top.
        let asked = tokio::time::timeout(LOOK_LIMIT, daemon.volume(name));
        volume.status = match asked.await.unwrap_or(Err(ClientError::TimedOut(LOOK_LIMIT))) {
            Ok(status) => described(&status),
            Err(error) => BTreeMap::from([("daemon", error.to_string().into())]),
        };
        Ok(volume)
    }

    /// Every volume, without a question to anyone.
    pub fn list(&self) -> Vec<Volume> {
        self.ledger.all().into_iter().map(|(name, entry)| self.shown(name, &entry)).collect()
    }

    fn shown(&self, name: String, entry: &Entry) -> Volume {
        let mountpoint = if entry.is_used() { self.dir(&name).display().to_string() } else { String::new() };
        Volume { name, mountpoint, created_at: rfc3339(entry.created_s), status: BTreeMap::new() }
    }

    /// Lets go what nobody uses, as often as something is left, until `stop` is cancelled.
    pub async fn tidy(self: Arc<Self>, stop: CancellationToken) {
        let mut pause = PAUSES[0];
        loop {
            let all_well = self.tidy_once().await;
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.untidy.notified() => pause = PAUSES[0],
                // What fails is tried again, less and less often.
                () = tokio::time::sleep(pause), if !all_well => pause = (pause * 2).min(PAUSES[1]),
            }
        }
    }

    async fn tidy_once(self: &Arc<Self>) -> bool {
        let mounts = self.mounts.clone();
        let Ok(here) = tokio::task::spawn_blocking(move || names_in(&mounts)).await else { return false };
        let mut all_well = self.in_ledger(Ledger::catch_up).await.unwrap_or(false);
        all_well &= self.take_up().await;
        for name in here {
            let deadline = Instant::now() + TIDY_LIMIT;
            let done = match self.turn(&name, deadline).await {
                Ok(_turn) if !self.ledger.is_used(&name) => self.let_go(&name, deadline).await,
                Ok(_) => Ok(()),
                Err(error) => Err(error),
            };
            if let Err(error) = done {
                tracing::warn!(volume = name, %error, "can't be unmounted yet");
                all_well = false;
            }
        }
        all_well
    }

    /// Has the volume mounted where Docker looks for it. What is there stays.
    async fn bring(&self, name: &str, deadline: Instant) -> Result<(), DriverError> {
        let dir = self.dir(name);
        let guarded = dir.clone();
        blocking(move || mount::guard(&guarded)).await??;
        let wanted = Mount { directory: dir.display().to_string() };
        let mut since = None;
        // It may be being restarted: Docker would not start the container again.
        while let Err(error) = self.daemon(deadline).mount(name, &wanted).await {
            let away = *since.get_or_insert_with(Instant::now) + RESTART_LIMIT;
            let is_away = error.is_away() || is_refusal(&error, "stopping");
            if !is_away || Instant::now() >= deadline.min(away) {
                return Err(error.into());
            }
            tokio::time::sleep(RESTART_LOOK).await;
        }
        // A container must never get the bare directory for its data.
        if !blocking(move || mount::is_above_guard(&dir)).await?? {
            return Err(DriverError::ElsewhereMounted(name.to_owned()));
        }
        Ok(())
    }

    /// Takes away the guard of a volume that nobody uses; `false` where more than that is to be done.
    async fn unguarded(&self, name: &str) -> bool {
        let dir = self.dir(name);
        !self.ledger.is_used(name)
            && blocking(move || mount::unguard(&dir)).await.is_ok_and(|done| done.is_ok())
    }

    /// Lets go what nobody uses any more, at the latest when it can be.
    async fn let_go_or_later(&self, name: &str, deadline: Instant) {
        if !self.ledger.is_used(name)
            && let Err(error) = self.let_go(name, deadline).await
        {
            tracing::warn!(volume = name, %error, "can't be unmounted yet");
            self.untidy.notify_one();
        }
    }

    /// Has the volume mounted there no more.
    async fn let_go(&self, name: &str, deadline: Instant) -> Result<(), DriverError> {
        let dir = self.dir(name);
        let wanted = Unmount { directory: Some(dir.display().to_string()) };
        let asked = self.daemon(deadline).unmount(name, &wanted).await;
        // A guard alone can go without the daemon; below a mount it stays.
        let unguarded = blocking(move || mount::unguard(&dir)).await?;
        match asked {
            Err(error) if !is_refusal(&error, "no_volume") && !is_refusal(&error, "not_mounted") => {
                Err(error.into())
            }
            _ => Ok(unguarded?),
        }
    }

    fn dir(&self, name: &str) -> PathBuf {
        self.mounts.join(name)
    }

    fn daemon(&self, deadline: Instant) -> Client {
        Client::new(&self.daemon, deadline.saturating_duration_since(Instant::now()))
    }

    /// Changes the memory, on a thread that may wait for the disk.
    async fn in_ledger<T: Send + 'static>(
        self: &Arc<Self>,
        change: impl FnOnce(&Ledger) -> T + Send + 'static,
    ) -> Result<T, DriverError> {
        let driver = self.clone();
        blocking(move || change(&driver.ledger)).await
    }

    /// The same for who can't wait until the disk takes it: what it does not take now is written when things are tidied up.
    async fn on_disk<T: Send + 'static>(
        self: &Arc<Self>,
        change: impl FnOnce(&Ledger) -> T + Send + 'static,
    ) -> Result<T, DriverError> {
        let done = self.in_ledger(change).await;
        if self.ledger.is_behind() {
            self.untidy.notify_one();
        }
        done
    }

    /// The volume's turn, once whoever has it is done.
    async fn turn(&self, name: &str, deadline: Instant) -> Result<OwnedMutexGuard<()>, DriverError> {
        let turn = {
            let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
            let known = turns.get(name).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                turns.retain(|_, turn| turn.strong_count() > 0);
                let turn = Arc::<Turn>::default();
                turns.insert(name.to_owned(), Arc::downgrade(&turn));
                turn
            })
        };
        let waiting = tokio::time::timeout_at(deadline.into(), turn.lock_owned());
        waiting.await.map_err(|_| DriverError::Busy(name.to_owned()))
    }
}

/// On a thread that may wait.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, DriverError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| DriverError::Internal)
}

fn is_refusal(error: &ClientError, code: &str) -> bool {
    matches!(error, ClientError::Refused(failure) if failure.code == code)
}

/// The volumes that have, or had, something mounted.
fn names_in(mounts: &Path) -> Vec<String> {
    let names = std::fs::read_dir(mounts).into_iter().flatten().flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.parse::<VolumeName>().is_ok()).collect()
}

fn described(volume: &api::Volume) -> BTreeMap<&'static str, serde_json::Value> {
    let version = volume.reference.as_deref().unwrap_or("main");
    let mut status = BTreeMap::from([
        ("image", format!("{}@{version}", volume.image).into()),
        ("commit", volume.commit.clone().into()),
        ("size", volume.size.into()),
        ("read_only", volume.read_only.into()),
    ]);
    if let Some(device) = &volume.device {
        status.insert("device", device.clone().into());
    }
    if let Some(quota) = volume.quota {
        status.insert("quota", quota.into());
    }
    if let Some(cached) = volume.cached_bytes {
        status.insert("cached_bytes", cached.into());
    }
    if let Some(open) = &volume.open {
        status.insert("dirty_bytes", open.dirty_bytes.into());
    }
    status
}

fn rfc3339(secs: u64) -> String {
    let moment = i64::try_from(secs).ok().and_then(|secs| OffsetDateTime::from_unix_timestamp(secs).ok());
    moment.and_then(|moment| moment.format(&Rfc3339).ok()).unwrap_or_default()
}
