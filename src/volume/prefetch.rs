//! Fetching before anyone asks: by the list of what a start reads, or everything; and making that list.
//!
//! Enters: an open volume. Leaves: chunks in the cache, and a list in the volume's directory. Invariant: it is help and no more: what fails here is logged, and
//! comes again as an error only if a read needs it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::{Volume, VolumeError};
use crate::device::{Base, BaseError};
use crate::format::PrefetchList;
use crate::units::{ByteLen, ByteOffset, ChunkIndex};

/// Name of the list in a volume's directory.
pub const LIST_FILE: &str = "prefetch";
/// Name of the mark that asks for a new list.
pub const RECORD_MARK: &str = "prefetch.record";
/// How long a start is: what is read later is work.
const START: Duration = Duration::from_secs(300);
/// How often a growing list is kept, for servers that are killed.
const KEEP_EVERY: Duration = Duration::from_secs(10);
/// How far back lists of older commits are looked for: most of an image stays where it is.
const ANCESTORS: usize = 8;
/// The longest list that is read from a volume's directory.
const MAX_FILE: u64 = 4 << 20;
/// How long everything else waits after a part that could not be fetched.
const AFTER_FAILURE: Duration = Duration::from_secs(5);
/// Chunks asked for together when everything is fetched.
const SHARE: usize = 32;

/// What is fetched before it is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Prefetch {
    /// Nothing but what a sequential reader will ask for next.
    None,
    /// What an earlier start read, where a list of that is known.
    #[default]
    Learned,
    /// That, and then everything else.
    All,
}

impl std::fmt::Display for Prefetch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Prefetch::None => "none",
            Prefetch::Learned => "learned",
            Prefetch::All => "all",
        })
    }
}

impl Volume {
    /// The list in the volume's directory; `None` where there is none that can be used.
    fn own_list(&self) -> Option<PrefetchList> {
        let dir = self.dir.as_ref()?;
        match load_list(dir) {
            Ok(list) => {
                list.filter(|list| list.chunk_size == self.device().base().version().commit().chunk_size)
            }
            Err(error) => {
                tracing::warn!(volume = self.name(), %error, "the prefetch list can't be used");
                None
            }
        }
    }

    /// The list to go by: the volume's own, else the commit's, else that of the nearest commit before it.
    async fn list(&self) -> Option<PrefetchList> {
        let base = self.device().base();
        let version = base.version();
        let fits = |list: &PrefetchList| list.chunk_size == version.commit().chunk_size;
        if let Some(list) = self.own_list().or_else(|| self.list.clone().filter(fits)) {
            return Some(list);
        }
        let (repository, image) = (version.repository(), version.image());
        let (mut id, mut commit) = (version.id(), version.commit().clone());
        for _ in 0..ANCESTORS {
            match repository.prefetch_list(image, id).await {
                Ok(Some(list)) if fits(&list) => return Some(list),
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(volume = self.name(), %error, "no prefetch list");
                    return None;
                }
            }
            id = *commit.parents.first()?;
            commit = match repository.commit(image, id, &version.meta_cache()).await {
                Ok(commit) => commit,
                Err(error) => {
                    tracing::warn!(volume = self.name(), %error, "no prefetch list");
                    return None;
                }
            };
        }
        None
    }

    /// Fetches ahead as `mode` says and makes a list where there is none, until all is done or `stop` is called. `rate` bounds, in bytes a second, what is fetched
    /// only because everything is to be here.
    pub async fn prefetch(self: Arc<Self>, mode: Prefetch, rate: Option<ByteLen>, stop: CancellationToken) {
        // From the first read on, for what is read while a list is looked for is what matters most.
        self.device().base().start_list();
        let list = match mode {
            Prefetch::None => self.own_list(),
            _ => tokio::select! { list = self.list() => list, () = stop.cancelled() => return },
        };
        let recording = self.recording(list.is_none());
        let fetching = async {
            if let (Some(list), true) = (&list, mode != Prefetch::None) {
                self.fetch_listed(list).await;
            }
            if mode == Prefetch::All {
                self.fetch_all(rate).await;
            }
        };
        let fetching = async {
            tokio::select! { () = fetching => {}, () = stop.cancelled() => {} }
        };
        tokio::join!(fetching, self.watch(recording, &stop));
    }

    async fn fetch_listed(&self, list: &PrefetchList) {
        let began = Instant::now();
        match self.device().base().fetch_early(list.chunks()).await {
            Ok(brought) => {
                let (chunks, took) = (list.len(), began.elapsed());
                tracing::info!(volume = self.name(), chunks, brought = %brought.human(), ?took, "fetched what a start reads");
            }
            Err(error) => {
                tracing::warn!(volume = self.name(), %error, "not all that a start reads was fetched")
            }
        }
    }

    async fn fetch_all(&self, rate: Option<ByteLen>) {
        let base = &self.device().base();
        let began = Instant::now();
        let mut failed = 0u64;
        let go_on = |error| {
            tracing::warn!(volume = self.name(), %error, "a part of the image was not fetched");
            failed += 1;
            Ok(())
        };
        let brought = fetch_everything(base, rate, |_| (), go_on).await.unwrap_or_default();
        let (volume, brought, took) = (self.name(), brought.human(), began.elapsed());
        match failed {
            0 => tracing::info!(volume, %brought, ?took, "all of it is here"),
            failed => tracing::warn!(volume, %brought, ?took, failed, "not all of it was fetched"),
        }
    }

    /// Whether, and where, the list that was begun is to be kept; else ends it.
    fn recording(&self, is_new: bool) -> Option<PathBuf> {
        let dir = self.dir.clone().filter(|dir| is_new || dir.join(RECORD_MARK).exists());
        if dir.is_none() {
            self.device().base().end_list();
        }
        dir
    }

    async fn watch(&self, dir: Option<PathBuf>, stop: &CancellationToken) {
        let Some(dir) = dir else { return };
        let base = self.device().base();
        // As long as it is there, the list is not all of a start, and the next start is listed anew.
        let marking = dir.clone();
        self.on_disk("mark the prefetch list as unfinished", move || ask_for_list(&marking)).await;
        let (mut first_read, mut kept) = (None, 0);
        while first_read.is_none_or(|at: Instant| at.elapsed() < START) && !stop.is_cancelled() {
            tokio::select! { () = tokio::time::sleep(KEEP_EVERY) => {}, () = stop.cancelled() => {} }
            let len = base.list_len();
            if len > 0 {
                first_read.get_or_insert_with(Instant::now);
            }
            if len > kept && !stop.is_cancelled() {
                self.keep(&dir, base.list_so_far(), false).await;
                kept = len;
            }
        }
        let is_whole = first_read.is_some_and(|at| at.elapsed() >= START);
        self.keep(&dir, base.end_list().unwrap_or_default(), is_whole).await;
    }

    /// Runs what blocks on the disk; help that fails is logged.
    async fn on_disk(&self, what: &str, work: impl FnOnce() -> Result<(), VolumeError> + Send + 'static) {
        if let Ok(Err(error)) = tokio::task::spawn_blocking(work).await {
            tracing::warn!(volume = self.name(), %error, "can't {what}");
        }
    }

    /// Keeps a list. One that is not a whole start's does not replace a longer one; one that is takes the mark away, after it is kept.
    async fn keep(&self, dir: &Path, chunks: Vec<ChunkIndex>, is_whole: bool) {
        if chunks.is_empty() {
            return;
        }
        let base = self.device().base();
        let version = base.version();
        let list =
            PrefetchList::new(version.image().to_string(), version.id(), version.commit().chunk_size, chunks);
        let dir = dir.to_owned();
        let keeping = move || {
            let longer = |there: PrefetchList| there.commit == list.commit && there.len() > list.len();
            if !is_whole && load_list(&dir).ok().flatten().is_some_and(longer) {
                return Ok(());
            }
            let path = dir.join(LIST_FILE);
            let failed = |path| move |source| VolumeError::Io { action: "write", path, source };
            crate::durable::replace_file(&path, &list.encode()).map_err(failed(path))?;
            let mark = dir.join(RECORD_MARK);
            if is_whole { std::fs::remove_file(&mark).map_err(failed(mark)) } else { Ok(()) }
        };
        self.on_disk("keep the prefetch list", keeping).await;
    }
}

/// Brings all of a commit here, giving way to whoever waits for the repository. `on_share` is told the bytes that came so far. Of a part that fails `on_failure` says whether to go on without it.
pub(super) async fn fetch_everything(
    base: &Arc<Base>,
    rate: Option<ByteLen>,
    on_share: impl Fn(ByteLen),
    mut on_failure: impl FnMut(BaseError) -> Result<(), BaseError>,
) -> Result<ByteLen, BaseError> {
    let end = base.len();
    let (began, mut brought, mut at) = (Instant::now(), 0u64, ByteOffset(0));
    while at.0 < end.0 {
        match base.hole_end(at).await {
            Ok(hole_end) if hole_end > at => {
                at = hole_end;
                continue;
            }
            Ok(_) => {}
            Err(error) => {
                on_failure(error)?;
                at = base.block_end(at);
                tokio::time::sleep(AFTER_FAILURE).await;
                continue;
            }
        }
        let (first, _) = base.chunk_at(at);
        let share = (0..SHARE as u64).map(|n| ChunkIndex(first.0 + n));
        at = ByteOffset((first.0 + SHARE as u64) * base.chunk_len());
        base.quiet().await;
        match base.fetch_early(share).await {
            Ok(bytes) => {
                brought += bytes.0;
                on_share(ByteLen(brought));
            }
            Err(error) => {
                on_failure(error)?;
                tokio::time::sleep(AFTER_FAILURE).await;
            }
        }
        if let Some(rate) = rate {
            let due = Duration::from_secs_f64(brought as f64 / rate.0.max(1) as f64);
            tokio::time::sleep_until((began + due).into()).await;
        }
    }
    Ok(ByteLen(brought))
}

/// The list in a volume's directory.
pub fn load_list(dir: &Path) -> Result<Option<PrefetchList>, VolumeError> {
    let path = dir.join(LIST_FILE);
    let bytes = match std::fs::metadata(&path) {
        Ok(found) if found.len() > MAX_FILE => {
            return Err(VolumeError::Record { path, problem: "far too long for a prefetch list".to_owned() });
        }
        Ok(_) => std::fs::read(&path),
        Err(error) => Err(error),
    };
    match bytes {
        Ok(bytes) => PrefetchList::decode(&bytes)
            .map(Some)
            .map_err(|problem| VolumeError::Record { path, problem: problem.to_string() }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(VolumeError::Io { action: "read", path, source }),
    }
}

/// Asks for a new list when the volume is served next.
pub fn ask_for_list(dir: &Path) -> Result<(), VolumeError> {
    let path = dir.join(RECORD_MARK);
    crate::durable::replace_file(&path, b"").map_err(|source| VolumeError::Io {
        action: "write",
        path,
        source,
    })
}
