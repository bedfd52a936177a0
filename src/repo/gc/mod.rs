//! `gc`: what no ref names any more is deleted, in two steps and a grace period between them. FORMAT.md, "What gc may take", has the argument.
//!
//! Enters: a repository. Leaves: what was deleted, and what waits for what. Invariants: nothing is deleted that a ref or a hold named when the list it is on went from
//! waiting to sweeping; that change is one compare-and-swap, which fails if a push has taken anything off the list; no push that was under way when the list was
//! published is under way any more by then. No lock, no clock but for how long one waits.

pub(super) mod lists;
mod report;
mod sweep;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::{StreamExt, TryStreamExt, stream};

use self::lists::List;
pub use self::report::{Amount, GcReport};
use super::closure::{Walk, is_damage};
use super::hold::{Hold, HoldOptions, boot_clock};
use super::meta::MemMetaCache;
use super::{ImageName, MetaCache, RepoError, Repository, keys};
use crate::format::condemned::{Condemned, CondemnedList, MAX_CONDEMNED, MAX_WAITS, Stage};
use crate::format::hold::{HoldKind, HoldObject};
use crate::format::{CommitId, FormatError};

/// How long what nobody names stays, where nothing else is said.
pub const GRACE: Duration = Duration::from_secs(14 * 86_400);
/// How often a list that others change is looked at again in one run.
const TRIES: usize = 8;
/// Refs that are read at once.
const PARALLEL: usize = 16;

/// How to collect.
#[derive(Clone, Debug)]
pub struct GcOptions {
    /// How long an object stays after it was first found unreachable.
    pub grace: Duration,
    /// Only say what would be done.
    pub dry_run: bool,
    /// Who does it, for people.
    pub holder: String,
}

/// Collects one image, or all of a repository.
pub async fn gc(
    repo: &Repository,
    only: Option<&ImageName>,
    options: &GcOptions,
) -> Result<GcReport, RepoError> {
    let images = match only {
        Some(image) => vec![image.clone()],
        // Also those that have no ref any more.
        None => repo.image_names().await?,
    };
    let mut report = GcReport::default();
    for image in images {
        report.images += 1;
        Collecting::new(repo, &image, options).run(&mut report).await?;
    }
    report.pushes.sort_unstable();
    report.pushes.dedup();
    Ok(report)
}

struct Collecting<'r> {
    repo: &'r Repository,
    image: ImageName,
    options: &'r GcOptions,
    meta: Arc<dyn MetaCache>,
    /// All that refs named while this runs. It only grows: a ref that is deleted meanwhile is for the next run.
    marked: Walk,
    /// What is there of what holds name. Walked anew each time, and by itself: what was missing may be there again, and a ref may lead to it.
    held: Walk,
    lens: BTreeMap<Condemned, u64>,
    now: SystemTime,
}

impl<'r> Collecting<'r> {
    fn new(repo: &'r Repository, image: &ImageName, options: &'r GcOptions) -> Collecting<'r> {
        let meta: Arc<dyn MetaCache> = Arc::new(MemMetaCache::default());
        Collecting {
            repo,
            image: image.clone(),
            options,
            marked: Walk::new(repo, image, &meta),
            held: Walk::new(repo, image, &meta),
            meta,
            lens: BTreeMap::new(),
            now: SystemTime::UNIX_EPOCH,
        }
    }

    async fn run(mut self, report: &mut GcReport) -> Result<(), RepoError> {
        if self.options.dry_run {
            self.now = SystemTime::now();
            return self.collect(report).await;
        }
        // It holds nothing: it is how the store's clock is read, and it says that someone is here.
        let hold = Hold::take(
            self.repo,
            &self.image,
            HoldKind::Read,
            Vec::new(),
            HoldOptions::new(self.options.holder.clone()),
        )
        .await?;
        let collected = async {
            self.now = hold.store_time().await?.unwrap_or_else(SystemTime::now);
            self.collect(report).await
        }
        .await;
        hold.release().await;
        collected
    }

    async fn collect(&mut self, report: &mut GcReport) -> Result<(), RepoError> {
        let mut names = lists::names(self.repo, &self.image).await?;
        self.list_objects().await?;
        if self.lens.is_empty() && names.is_empty() {
            return Ok(());
        }
        self.mark().await?;
        let mut listed: HashSet<Condemned> = HashSet::new();
        names.sort_unstable();
        for name in names {
            if let Some(left) = self.advance(&name, report).await? {
                listed.extend(left);
            }
        }
        let new: Vec<Condemned> = self
            .lens
            .keys()
            .filter(|object| !self.is_named(object) && !listed.contains(object))
            .copied()
            .collect();
        for (object, len) in &self.lens {
            if self.is_named(object) {
                report.reachable.add(*len);
            }
        }
        for part in new.chunks(MAX_CONDEMNED) {
            let amount = self.amount(part);
            if self.options.dry_run {
                report.condemned.add_all(amount);
                continue;
            }
            let list = CondemnedList {
                image: self.image.to_string(),
                since_s: seconds(self.now),
                stage: Stage::Listed,
                objects: part.iter().copied().collect(),
            };
            let published = lists::publish(self.repo, &self.image, list).await?;
            let before = report.waiting;
            self.advance(&published.name, report).await?;
            // What waits since now is told of once, as what was found now.
            if report.waiting != before {
                report.waiting = before;
                report.condemned.add_all(amount);
            }
        }
        Ok(())
    }

    fn is_named(&self, object: &Condemned) -> bool {
        self.marked.closure.has(object) || self.held.closure.has(object)
    }

    fn amount<'o>(&self, objects: impl IntoIterator<Item = &'o Condemned>) -> Amount {
        let mut amount = Amount::default();
        for object in objects {
            // One that is gone already takes no room.
            self.lens.get(object).into_iter().for_each(|len| amount.add(*len));
        }
        amount
    }

    /// Before anything is marked: what is written after that is on no list of this run.
    async fn list_objects(&mut self) -> Result<(), RepoError> {
        let (image, lens) = (&self.image, &mut self.lens);
        self.repo
            .listed(&keys::image(image), |listed| {
                if let Some(object) = keys::parse(image, &listed.key) {
                    lens.insert(object, listed.len);
                }
            })
            .await
    }

    /// Marks all that refs and holds name now. Damage ends it: what can't be read can't be known to be unneeded.
    async fn mark(&mut self) -> Result<(), RepoError> {
        for tries in 1.. {
            // Looked at first: a reader lets go of its hold only after a ref names what it read, or it reads no more.
            let holds = self.holds(None).await?;
            let roots = self.roots().await?;
            match self.marked.history(roots.iter().copied()).await {
                Ok(()) => {
                    // What a hold names may be gone: its reader came too late. Whatever is there of it stays.
                    let held = holds.into_values().flat_map(|hold| hold.commits);
                    let alone = held.filter(|id| !self.marked.closure.commits.contains(id));
                    self.held = Walk::new(self.repo, &self.image, &self.meta);
                    return self.held.what_is_there_of(alone).await;
                }
                // A ref may have gone while it was read, and another gc took what it had.
                Err(error) if tries < TRIES && is_damage(&error) && self.roots().await? != roots => {
                    self.marked = Walk::new(self.repo, &self.image, &self.meta);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// What refs name. Whatever their names: what this build would not call a branch keeps what it names, too.
    async fn roots(&self) -> Result<BTreeSet<CommitId>, RepoError> {
        let (repo, image) = (self.repo, &self.image);
        let mut roots = BTreeSet::new();
        for (dir, kind) in [(keys::heads(image), "heads"), (keys::tags(image), "tags")] {
            let names = stream::iter(repo.names_below(&dir).await?);
            let read =
                names.map(|name| async move { repo.ref_target(image, &format!("{kind}/{name}")).await });
            let read: Vec<Option<CommitId>> = read.buffered(PARALLEL).try_collect().await?;
            roots.extend(read.into_iter().flatten());
        }
        Ok(roots)
    }

    /// The holds that count, by name. Those whose time is over are removed.
    async fn holds(&self, report: Option<&mut GcReport>) -> Result<BTreeMap<String, HoldObject>, RepoError> {
        let mut found = Vec::new();
        self.repo.listed(&keys::holds(&self.image), |listed| found.push(listed)).await?;
        let mut holds = BTreeMap::new();
        let mut expired = 0;
        for listed in found {
            let (body, _) = match self.repo.store().get(&listed.key).await {
                Ok(read) => read,
                Err(error) if error.is_not_found() => continue,
                Err(error) => return Err(error.into()),
            };
            let hold = HoldObject::decode(&body).map_err(|source: FormatError| RepoError::Damaged {
                place: self.repo.describe(),
                key: listed.key.clone(),
                source,
            })?;
            let age = listed.modified.and_then(|modified| self.now.duration_since(modified).ok());
            if age.is_some_and(|age| age.as_secs() > hold.ttl_s) {
                expired += 1;
                if !self.options.dry_run {
                    self.repo.store().delete(&listed.key).await?;
                }
                continue;
            }
            let name = listed.key.segments().next_back().unwrap_or_default().to_owned();
            holds.insert(name, hold);
        }
        if let Some(report) = report {
            report.expired += expired;
        }
        Ok(holds)
    }

    /// The pushes under way, by the names of their holds, with who they are.
    async fn pushes(&self, report: &mut GcReport) -> Result<BTreeMap<String, String>, RepoError> {
        let holds = self.holds(Some(report)).await?.into_iter();
        let pushes = holds.filter(|(_, hold)| hold.kind == HoldKind::Push);
        Ok(pushes.map(|(name, hold)| (name, hold.holder)).collect())
    }

    /// Takes a list one or more steps on; what is still on it afterwards.
    async fn advance(
        &mut self,
        name: &str,
        report: &mut GcReport,
    ) -> Result<Option<BTreeSet<Condemned>>, RepoError> {
        for _ in 0..TRIES {
            let Some(list) = lists::read(self.repo, &self.image, name).await? else { return Ok(None) };
            if self.options.dry_run {
                return self.foretell(list, report).map(Some);
            }
            match self.step(&list, report).await? {
                Step::Again => {}
                Step::Stays => return Ok(Some(list.object.objects)),
                Step::Done => return Ok(None),
            }
        }
        // Others are busy with it: they, or the next run, go on.
        report.others += 1;
        Ok(lists::read(self.repo, &self.image, name).await?.map(|list| list.object.objects))
    }

    async fn step(&mut self, list: &List, report: &mut GcReport) -> Result<Step, RepoError> {
        let next = |stage| CondemnedList { stage, ..list.object.clone() };
        match &list.object.stage {
            Stage::Sweeping(_) if lists::is_abandoned(list, Some(self.now)) => {
                let waiting = next(Stage::Waiting(BTreeSet::new()));
                lists::swap(self.repo, &self.image, list, &waiting).await?;
                Ok(Step::Again)
            }
            Stage::Sweeping(_) => {
                report.others += 1;
                Ok(Step::Stays)
            }
            Stage::Listed => {
                // Listed after the list was published: a push that can't have seen it is among these, or has ended.
                let pushes: BTreeSet<String> = self.pushes(report).await?.into_keys().collect();
                if pushes.len() > MAX_WAITS {
                    return Ok(Step::Stays);
                }
                lists::swap(self.repo, &self.image, list, &next(Stage::Waiting(pushes))).await?;
                Ok(Step::Again)
            }
            Stage::Waiting(_) if list.object.objects.is_empty() => {
                lists::remove(self.repo, &self.image, list).await?;
                Ok(Step::Done)
            }
            Stage::Waiting(holds) => {
                let age = self.age(&list.object);
                if age < self.options.grace {
                    report.waiting.add_all(self.amount(&list.object.objects));
                    let due = self.now + (self.options.grace - age);
                    report.due = Some(report.due.map_or(due, |known| known.min(due)));
                    return Ok(Step::Stays);
                }
                let pushes = self.pushes(report).await?;
                let live: Vec<&String> = holds.iter().filter_map(|hold| pushes.get(hold)).collect();
                if !live.is_empty() {
                    report.waiting.add_all(self.amount(&list.object.objects));
                    report.pushes.extend(live.into_iter().cloned());
                    return Ok(Step::Stays);
                }
                // After the pushes were seen to have ended, so that where their refs moved to is marked.
                self.mark().await?;
                let mut sweeping = next(Stage::Sweeping(sweep::first_turn()));
                sweeping.objects.retain(|object| !self.is_named(object));
                let begun = boot_clock();
                let spared = (list.object.objects.len() - sweeping.objects.len()) as u64;
                match lists::swap(self.repo, &self.image, list, &sweeping).await? {
                    None => Ok(Step::Again),
                    Some(list) => {
                        report.spared += spared;
                        let mut gone = list.object.objects.clone();
                        let left = sweep::sweep(self.repo, &self.image, list, begun).await?;
                        gone.retain(|object| !left.contains(object));
                        report.deleted.add_all(self.amount(&gone));
                        // They were listed before they went: nothing of them is found once more in this run.
                        self.lens.retain(|object, _| !gone.contains(object));
                        if left.is_empty() {
                            return Ok(Step::Done);
                        }
                        // Someone else is at it, or takes it up when this one's time is over.
                        report.others += 1;
                        Ok(Step::Stays)
                    }
                }
            }
        }
    }

    fn age(&self, list: &CondemnedList) -> Duration {
        Duration::from_secs(seconds(self.now).saturating_sub(list.since_s))
    }

    /// What a run would make of a list.
    fn foretell(&self, list: List, report: &mut GcReport) -> Result<BTreeSet<Condemned>, RepoError> {
        let unneeded: Vec<&Condemned> =
            list.object.objects.iter().filter(|object| !self.is_named(object)).collect();
        let amount = self.amount(unneeded);
        match self.age(&list.object) < self.options.grace {
            true => report.waiting.add_all(amount),
            false => report.deleted.add_all(amount),
        }
        Ok(list.object.objects)
    }
}

enum Step {
    Again,
    Stays,
    Done,
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
