//! The driver's own memory: which volumes Docker knows, and who uses them.
//!
//! Enters: changes. Leaves: the volumes and their users, also with the daemon away and after a crash. Invariants: that a volume is there, or is used, is on the disk before
//! Docker is told so; that it is used no more is never forgotten for want of space; a reboot ends every use, because it ends every container.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use horcrux::durable::replace_file;
use serde::{Deserialize, Serialize};

/// The file's layout.
const VERSION: u32 = 1;
const FILE: &str = "volumes.json";
/// Who uses a volume that is mounted though nobody noted that: of no session, and so for ever doubtful.
const UNKNOWN: &str = "unknown";

/// Why the memory can't be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    #[error("can't {action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{} is damaged: {source}; move it away, and the daemon's volumes are taken up again", path.display())]
    Damaged { path: PathBuf, source: serde_json::Error },
    #[error("{} has version {version}; this driver knows {VERSION}", path.display())]
    Version { path: PathBuf, version: u32 },
}

/// What is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Content {
    version: u32,
    /// The kernel's name for the time since it started.
    boot: String,
    /// Counts the Dockers that have greeted this driver, and its own starts.
    session: u64,
    /// The daemon's volumes are still to be taken up: there was no file, and what it knew may have been lost.
    #[serde(default)]
    is_new: bool,
    volumes: BTreeMap<String, Entry>,
}

/// What every version of the file has.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

/// A volume Docker knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// When it was made, in seconds since 1970.
    #[serde(default)]
    pub created_s: u64,
    /// Who uses it, the oldest session first.
    #[serde(default)]
    users: Vec<User>,
}

/// How often a volume is mounted for one container: what is copied in and out of it comes on top, under the same id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct User {
    id: String,
    session: u64,
    count: u64,
}

impl Entry {
    /// Whether it is to be mounted.
    pub fn is_used(&self) -> bool {
        !self.users.is_empty()
    }

    fn add(&mut self, id: &str, session: u64) {
        match self.users.iter_mut().find(|user| user.id == id && user.session == session) {
            Some(user) => user.count += 1,
            None => self.users.push(User { id: id.to_owned(), session, count: 1 }),
        }
    }

    /// Of the newest session: what an earlier one left stays doubtful.
    fn subtract(&mut self, id: &str) {
        if let Some(at) = self.users.iter().rposition(|user| user.id == id) {
            self.users[at].count = self.users[at].count.saturating_sub(1);
            if self.users[at].count == 0 {
                self.users.remove(at);
            }
        }
    }
}

/// The memory. Reading it never waits for the disk.
pub struct Ledger {
    path: PathBuf,
    content: RwLock<Arc<Content>>,
    /// Held by who changes it.
    writing: Mutex<()>,
    /// What is in memory is not on the disk.
    is_behind: AtomicBool,
}

impl Ledger {
    /// What is known in `dir`; and volumes that have something `mounted`, should the file be lost: containers may use them. Blocks on the
    /// disk, as every change does.
    pub fn open(dir: &Path, boot: &str, mounted: &[String]) -> Result<Ledger, LedgerError> {
        let path = dir.join(FILE);
        let mut content = match std::fs::read(&path) {
            Ok(bytes) => {
                let damaged = |source| LedgerError::Damaged { path: path.clone(), source };
                let Versioned { version } = serde_json::from_slice(&bytes).map_err(damaged)?;
                if version != VERSION {
                    return Err(LedgerError::Version { path, version });
                }
                serde_json::from_slice(&bytes).map_err(damaged)?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let volumes = BTreeMap::new();
                Content { version: VERSION, boot: boot.to_owned(), session: 0, is_new: true, volumes }
            }
            Err(source) => return Err(LedgerError::Io { action: "read", path, source }),
        };
        if content.boot != boot {
            content.boot = boot.to_owned();
            content.volumes.values_mut().for_each(|entry| entry.users.clear());
        }
        for name in mounted {
            if content.volumes.contains_key(name) {
                continue;
            }
            tracing::warn!(
                volume = name,
                "is mounted and was not known: whether somebody uses it, the kernel says when it is removed"
            );
            let users = vec![User { id: UNKNOWN.to_owned(), session: 0, count: 1 }];
            content.volumes.insert(name.clone(), Entry { created_s: 0, users });
        }
        let ledger = Ledger {
            path,
            content: RwLock::new(Arc::new(content)),
            writing: Mutex::new(()),
            is_behind: AtomicBool::new(false),
        };
        // What an earlier driver was about to answer when it died, Docker never heard.
        ledger.greet();
        Ok(ledger)
    }

    /// A volume.
    pub fn get(&self, name: &str) -> Option<Entry> {
        self.now().volumes.get(name).cloned()
    }

    /// Whether a volume is known.
    pub fn has(&self, name: &str) -> bool {
        self.now().volumes.contains_key(name)
    }

    /// Whether somebody uses a volume.
    pub fn is_used(&self, name: &str) -> bool {
        self.now().volumes.get(name).is_some_and(Entry::is_used)
    }

    /// Every volume, by name.
    pub fn all(&self) -> Vec<(String, Entry)> {
        self.now().volumes.iter().map(|(name, entry)| (name.clone(), entry.clone())).collect()
    }

    /// Whether this Docker has it mounted: an earlier one may have gone without a word about what it had.
    pub fn is_used_in_this_session(&self, name: &str) -> bool {
        let now = self.now();
        now.volumes.get(name).is_some_and(|entry| entry.users.iter().any(|user| user.session == now.session))
    }

    /// A Docker greets: what was mounted before was mounted for an earlier one.
    pub fn greet(&self) {
        self.change_anyhow(|content| content.session += 1);
    }

    /// Adds a volume; one that is known stays as it is.
    pub fn add(&self, name: &str, created_s: u64) -> Result<(), LedgerError> {
        self.change(|content| {
            let entry = Entry { created_s, ..Entry::default() };
            content.volumes.entry(name.to_owned()).or_insert(entry);
        })
    }

    /// Whether the daemon's volumes are still to be taken up.
    pub fn is_new(&self) -> bool {
        self.now().is_new
    }

    /// Takes up the daemon's volumes, by name and the time they were made.
    pub fn take_up(&self, volumes: &[(String, u64)]) -> Result<(), LedgerError> {
        self.change(|content| {
            for (name, created_s) in volumes {
                let entry = content.volumes.entry(name.clone()).or_default();
                entry.created_s = *created_s;
            }
            content.is_new = false;
        })
    }

    /// Forgets a volume.
    pub fn remove(&self, name: &str) -> Result<(), LedgerError> {
        self.change(|content| {
            content.volumes.remove(name);
        })
    }

    /// One more mount of a volume for `id`.
    pub fn use_by(&self, name: &str, id: &str) -> Result<(), LedgerError> {
        self.change(|content| {
            let session = content.session;
            if let Some(entry) = content.volumes.get_mut(name) {
                entry.add(id, session);
            }
        })
    }

    /// One mount of a volume less for `id`; one that has none stays as it is.
    pub fn unuse_by(&self, name: &str, id: &str) {
        self.change_anyhow(|content| {
            if let Some(entry) = content.volumes.get_mut(name) {
                entry.subtract(id);
            }
        });
    }

    /// Nobody uses a volume any more.
    pub fn unuse(&self, name: &str) {
        self.change_anyhow(|content| {
            if let Some(entry) = content.volumes.get_mut(name) {
                entry.users.clear();
            }
        });
    }

    /// Whether what is in memory is not on the disk ([`Ledger::catch_up`]).
    pub fn is_behind(&self) -> bool {
        self.is_behind.load(Ordering::Acquire)
    }

    /// Writes what could not be written; `false` where it can't be yet.
    pub fn catch_up(&self) -> bool {
        !self.is_behind() || self.change(|_| {}).is_ok()
    }

    fn now(&self) -> Arc<Content> {
        self.content.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// On the disk first, then in memory: on an error in neither.
    fn change(&self, change: impl FnOnce(&mut Content)) -> Result<(), LedgerError> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.now();
        let mut content = (*now).clone();
        change(&mut content);
        if content.volumes == now.volumes
            && content.session == now.session
            && content.is_new == now.is_new
            && !self.is_behind()
        {
            return Ok(());
        }
        self.write(&content)?;
        self.show(content);
        Ok(())
    }

    /// In memory at once; on the disk now, or later ([`Ledger::catch_up`]) where there is no room.
    fn change_anyhow(&self, change: impl FnOnce(&mut Content)) {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut content = (*self.now()).clone();
        change(&mut content);
        if let Err(error) = self.write(&content) {
            tracing::warn!(%error, "noted in memory only, for now");
            self.is_behind.store(true, Ordering::Release);
        }
        self.show(content);
    }

    fn write(&self, content: &Content) -> Result<(), LedgerError> {
        let failed = |source| LedgerError::Io { action: "write", path: self.path.clone(), source };
        let bytes = serde_json::to_vec_pretty(content).map_err(|error| failed(error.into()))?;
        replace_file(&self.path, &bytes).map_err(failed)?;
        self.is_behind.store(false, Ordering::Release);
        Ok(())
    }

    fn show(&self, content: Content) {
        *self.content.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(content);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn open(dir: &tempfile::TempDir, boot: &str) -> Ledger {
        Ledger::open(dir.path(), boot, &[]).unwrap()
    }

    #[test]
    fn users_are_counted_by_id_and_a_reopened_ledger_knows_them() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = open(&dir, "boot-1");
        ledger.add("v1", 5).unwrap();
        ledger.add("v1", 6).unwrap();
        // `docker cp` into a running container mounts under the container's own id.
        for id in ["a", "a", "b"] {
            ledger.use_by("v1", id).unwrap();
        }
        ledger.unuse_by("v1", "a");
        drop(ledger);
        let ledger = open(&dir, "boot-1");
        assert_eq!(ledger.get("v1").unwrap().created_s, 5);
        ledger.unuse_by("v1", "b");
        assert!(ledger.is_used("v1"));
        for _ in 0..2 {
            ledger.unuse_by("v1", "a");
        }
        ledger.unuse_by("v1", "never seen");
        assert!(!ledger.is_used("v1"));
        ledger.remove("v1").unwrap();
        ledger.remove("v1").unwrap();
        assert!(!open(&dir, "boot-1").has("v1"));
    }

    /// Docker keeps a container's mount id over its own restarts, and may forget that it had mounted.
    #[test]
    fn what_an_earlier_docker_or_driver_had_mounted_stays_and_is_doubtful() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = open(&dir, "boot-1");
        ledger.add("v1", 5).unwrap();
        ledger.use_by("v1", "a").unwrap();
        assert!(ledger.is_used_in_this_session("v1"));
        ledger.greet();
        assert!(ledger.is_used("v1") && !ledger.is_used_in_this_session("v1"));
        ledger.use_by("v1", "a").unwrap();
        assert!(ledger.is_used_in_this_session("v1"));
        ledger.unuse_by("v1", "a");
        assert!(ledger.is_used("v1") && !ledger.is_used_in_this_session("v1"));
        ledger.use_by("v1", "b").unwrap();
        drop(ledger);
        let ledger = open(&dir, "boot-1");
        assert!(ledger.is_used("v1") && !ledger.is_used_in_this_session("v1"));
        ledger.unuse("v1");
        assert!(!ledger.is_used("v1"));
    }

    #[test]
    fn a_reboot_ends_every_use() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = open(&dir, "boot-1");
        ledger.add("v1", 5).unwrap();
        ledger.use_by("v1", "a").unwrap();
        drop(ledger);
        assert!(!open(&dir, "boot-2").is_used("v1"));
    }

    #[test]
    fn what_is_mounted_and_not_known_is_taken_up_and_doubtful() {
        let dir = tempfile::tempdir().unwrap();
        open(&dir, "boot-1").add("known", 5).unwrap();
        let mounted = ["known", "lost"].map(str::to_owned);
        let ledger = Ledger::open(dir.path(), "boot-1", &mounted).unwrap();
        assert!(!ledger.is_used("known"), "that nobody uses it is known");
        assert!(ledger.is_used("lost") && !ledger.is_used_in_this_session("lost"));
        drop(ledger);
        assert!(open(&dir, "boot-1").is_used("lost"));
    }

    #[test]
    fn a_new_one_takes_up_the_daemon_s_volumes_once() {
        let dir = tempfile::tempdir().unwrap();
        let mounted = ["used".to_owned()];
        let ledger = Ledger::open(dir.path(), "boot-1", &mounted).unwrap();
        assert!(ledger.is_new() && open(&dir, "boot-1").is_new());
        ledger.take_up(&[("used".to_owned(), 7), ("idle".to_owned(), 8)]).unwrap();
        drop(ledger);
        let ledger = open(&dir, "boot-1");
        assert!(!ledger.is_new() && ledger.is_used("used") && !ledger.is_used("idle"));
        assert_eq!(["used", "idle"].map(|name| ledger.get(name).unwrap().created_s), [7, 8]);
    }

    #[test]
    fn an_end_of_use_that_can_t_be_written_is_known_and_written_later() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = open(&dir, "boot-1");
        ledger.add("v1", 5).unwrap();
        ledger.use_by("v1", "a").unwrap();
        // A directory can't be replaced by a file: as good as a full disk, and for root too.
        let file = dir.path().join(FILE);
        std::fs::remove_file(&file).unwrap();
        std::fs::create_dir(&file).unwrap();
        ledger.unuse_by("v1", "a");
        assert!(!ledger.is_used("v1") && !ledger.catch_up());
        assert!(ledger.use_by("v1", "b").is_err() && !ledger.is_used("v1"));
        std::fs::remove_dir(&file).unwrap();
        assert!(ledger.catch_up());
        drop(ledger);
        let ledger = open(&dir, "boot-1");
        assert!(ledger.has("v1") && !ledger.is_used("v1"));
    }

    #[test]
    fn one_that_can_t_be_understood_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(FILE);
        for (bytes, words) in
            [("{", "is damaged"), (r#"{"version":2,"hosts":[]}"#, "has version 2; this driver knows 1")]
        {
            std::fs::write(&file, bytes).unwrap();
            let told = Ledger::open(dir.path(), "b", &[]).err().unwrap().to_string();
            assert!(told.contains(words), "{told}");
            assert_eq!(std::fs::read_to_string(&file).unwrap(), bytes);
        }
    }
}
