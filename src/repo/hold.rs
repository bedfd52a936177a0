//! Holds: what keeps a `gc` from objects that no ref names yet, or no more. FORMAT.md, "What gc may take", has the argument.
//!
//! Enters: a repository somebody is about to push to, or commits somebody is about to read. Leaves: an object below `holds/` that is renewed until it is let go of.
//! Invariants: a hold is in the repository before anything is relied on; a ref moves only under a hold that was renewed less than half its time ago, by a clock that goes
//! on while the machine sleeps, and after [`Hold::rescue`] (`rescue.rs`) has found nothing condemned or gone below the new commits. Whoever lost a hold starts over.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tokio::task::JoinHandle;

use super::gc::lists;
use super::{BranchName, BranchTip, ImageName, RepoError, Repository, keys};
use crate::format::CommitId;
use crate::format::hold::{HoldKind, HoldObject};
use crate::store::{Etag, Key, StoreError};

/// How long a hold counts after its last renewal, by the store's clock. A killed push keeps `gc` waiting for so long.
pub const HOLD_TTL: Duration = Duration::from_secs(6 * 3600);
/// A hold is renewed so many times in its time.
const RENEWALS: u32 = 12;
/// How long a deletion under way is waited for.
pub const SWEEP_PATIENCE: Duration = Duration::from_secs(600);

/// How a hold is taken.
#[derive(Clone, Debug)]
pub struct HoldOptions {
    /// Who has it, for people: user, host, process.
    pub holder: String,
    /// How long it counts after a renewal.
    pub ttl: Duration,
    /// How long a deletion under way is waited for.
    pub patience: Duration,
}

impl HoldOptions {
    /// The usual ones.
    pub fn new(holder: impl Into<String>) -> HoldOptions {
        HoldOptions { holder: holder.into(), ttl: HOLD_TTL, patience: SWEEP_PATIENCE }
    }
}

/// Time since the machine was started, its sleep included.
pub(super) fn boot_clock() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// A hold. Let go of with [`Hold::release`]; dropped without, it counts until its time is over.
#[derive(Debug)]
pub struct Hold {
    pub(super) shared: Arc<Shared>,
    keeper: JoinHandle<()>,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) repo: Repository,
    pub(super) image: ImageName,
    key: Key,
    pub(super) options: HoldOptions,
    /// The condemned lists that were there just after the hold was, and their tags: what any other list has, waits for this hold.
    pub(super) seen: Mutex<BTreeMap<String, Etag>>,
    /// The object as it was written last, and its tag where that is known. Held over a renewal.
    state: tokio::sync::Mutex<(HoldObject, Option<Etag>)>,
    /// When the last renewal that went well was begun, by [`boot_clock`].
    renewed: Mutex<Duration>,
    lost: AtomicBool,
    /// A ref was asked to move, and nobody knows whether it still will.
    unsettled: AtomicBool,
}

impl Hold {
    /// For who is going to write objects or to move a ref. Taken before what is relied on is looked at.
    pub async fn push(repo: &Repository, image: &ImageName, options: HoldOptions) -> Result<Hold, RepoError> {
        Hold::take(repo, image, HoldKind::Push, Vec::new(), options).await?.look().await
    }

    /// For who is going to read commits that refs may cease to name. An error says that a commit is being deleted already.
    pub async fn read(
        repo: &Repository,
        image: &ImageName,
        commits: Vec<CommitId>,
        options: HoldOptions,
    ) -> Result<Hold, RepoError> {
        let hold = Hold::take(repo, image, HoldKind::Read, commits.clone(), options).await?.look().await?;
        match hold.rescue(&commits, None).await {
            Ok(()) => Ok(hold),
            Err(error) => {
                hold.release().await;
                Err(error)
            }
        }
    }

    pub(super) async fn take(
        repo: &Repository,
        image: &ImageName,
        kind: HoldKind,
        commits: Vec<CommitId>,
        options: HoldOptions,
    ) -> Result<Hold, RepoError> {
        let object = HoldObject {
            image: image.to_string(),
            kind,
            commits,
            holder: printable(&options.holder),
            ttl_s: options.ttl.as_secs(),
            turn: 0,
        };
        let key = keys::hold(image, &uuid::Uuid::new_v4().simple().to_string());
        let begun = boot_clock();
        // Its name is new, so making it is enough; a swap would cost a server that must be tried first more.
        repo.store().put_new(&key, object.encode().into()).await?;
        let shared = Arc::new(Shared {
            repo: repo.clone(),
            image: image.clone(),
            key,
            options,
            state: tokio::sync::Mutex::new((object, None)),
            renewed: Mutex::new(begun),
            lost: AtomicBool::new(false),
            seen: Mutex::default(),
            unsettled: AtomicBool::new(false),
        });
        let keeper = tokio::spawn(keep(shared.clone()));
        Ok(Hold { shared, keeper })
    }

    /// Looks which condemned lists are there, before anything is relied on.
    async fn look(self) -> Result<Hold, RepoError> {
        match lists::tags(&self.shared.repo, &self.shared.image).await {
            Ok(seen) => {
                *self.shared.seen.lock() = seen;
                Ok(self)
            }
            Err(error) => {
                self.release().await;
                Err(error)
            }
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.shared.key.segments().next_back().unwrap_or_default()
    }

    /// Whether it still counts: what happens now is seen by every `gc`.
    pub fn check(&self) -> Result<(), RepoError> {
        self.shared.check()
    }

    /// Renews it, whether that is due or not.
    pub async fn renew(&self) -> Result<(), RepoError> {
        self.shared.renew().await
    }

    /// What the store's clock says now: the time of a renewal. `None` where the store does not tell.
    pub(super) async fn store_time(&self) -> Result<Option<SystemTime>, RepoError> {
        self.renew().await?;
        let mut found = None;
        self.shared
            .repo
            .listed(&keys::holds(&self.shared.image), |listed| {
                if listed.key == self.shared.key {
                    found = listed.modified;
                }
            })
            .await?;
        Ok(found)
    }

    /// Moves a branch to the last of `commits`, which are written, parents first, and stand on `expected`: after a rescue, and only while the hold counts.
    pub async fn move_branch(
        &self,
        branch: &BranchName,
        expected: Option<&BranchTip>,
        commits: &[CommitId],
    ) -> Result<BranchTip, RepoError> {
        self.rescue(commits, expected.map(|tip| tip.commit)).await?;
        self.shared.renew_if_due().await?;
        self.check()?;
        let Some(new) = commits.last() else {
            return Err(RepoError::HoldLapsed {
                place: self.shared.repo.describe(),
                key: self.shared.key.clone(),
            });
        };
        self.settled(self.shared.repo.update_branch(&self.shared.image, branch, expected, *new).await)
    }

    /// Hands on what came of moving a ref. Where the answer was lost, the store may carry it out later: the hold then stays until its time is over.
    pub(super) fn settled<T>(&self, moved: Result<T, RepoError>) -> Result<T, RepoError> {
        if moved.as_ref().is_err_and(RepoError::is_transient) {
            self.shared.unsettled.store(true, Ordering::Release);
        }
        moved
    }

    /// Lets go of it. A hold that can't be removed now is only in the way of `gc` until its time is over.
    pub async fn release(self) {
        self.keeper.abort();
        if self.shared.unsettled.load(Ordering::Acquire) {
            tracing::debug!("a hold stays until its time is over: a ref may move yet");
            return;
        }
        // Not while a renewal is under way: it would come back.
        let _state = self.shared.state.lock().await;
        if let Err(error) = self.shared.repo.store().delete(&self.shared.key).await {
            tracing::debug!(%error, "a hold stays until its time is over");
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

impl Shared {
    fn lapsed(&self) -> RepoError {
        RepoError::HoldLapsed { place: self.repo.describe(), key: self.key.clone() }
    }

    fn age(&self) -> Duration {
        boot_clock().saturating_sub(*self.renewed.lock())
    }

    fn check(&self) -> Result<(), RepoError> {
        // Half: the other half is for a request that is on its way when this is asked.
        if self.lost.load(Ordering::Acquire) || self.age() >= self.options.ttl / 2 {
            self.lost.store(true, Ordering::Release);
            return Err(self.lapsed());
        }
        Ok(())
    }

    async fn renew_if_due(&self) -> Result<(), RepoError> {
        if self.age() >= self.options.ttl / RENEWALS { self.renew().await } else { Ok(()) }
    }

    async fn renew(&self) -> Result<(), RepoError> {
        let mut state = self.state.lock().await;
        // One that lapsed is not taken up again: what happened meanwhile, nobody knows.
        self.check()?;
        let begun = boot_clock();
        let (object, etag) = &mut *state;
        let expected = match etag.take() {
            Some(etag) => etag,
            None => match self.repo.store().get(&self.key).await {
                Ok((body, etag)) => {
                    // An earlier renewal whose answer was lost.
                    if let Ok(there) = HoldObject::decode(&body) {
                        object.turn = object.turn.max(there.turn);
                    }
                    etag
                }
                Err(error) if error.is_not_found() => return Err(self.lose()),
                Err(error) => return Err(error.into()),
            },
        };
        let next = HoldObject { turn: object.turn + 1, ..object.clone() };
        match self.repo.store().compare_and_swap(&self.key, Some(&expected), next.encode().into()).await {
            Ok(new) => {
                *object = next;
                *etag = Some(new);
                *self.renewed.lock() = begun;
                self.check()
            }
            Err(StoreError::Conflict { .. }) => Err(self.lose()),
            Err(error) => Err(error.into()),
        }
    }

    fn lose(&self) -> RepoError {
        self.lost.store(true, Ordering::Release);
        self.lapsed()
    }
}

/// Renews a hold for as long as it is there.
async fn keep(shared: Arc<Shared>) {
    let every = (shared.options.ttl / RENEWALS).max(Duration::from_millis(10));
    loop {
        tokio::time::sleep(every).await;
        match shared.renew().await {
            Ok(()) => {}
            Err(error @ RepoError::HoldLapsed { .. }) => {
                tracing::debug!(%error, "no longer renewed");
                return;
            }
            Err(error) => tracing::debug!(%error, "a hold could not be renewed, and is again soon"),
        }
    }
}

/// One line that is no trouble in a text object.
fn printable(text: &str) -> String {
    let clean: String = text.chars().filter(|c| !c.is_control()).take(200).collect();
    let clean = clean.trim();
    if clean.is_empty() { "unknown".to_owned() } else { clean.to_owned() }
}
