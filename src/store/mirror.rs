//! One repository in several places: reads go to the fastest place that works and fail over in mid-read.
//!
//! Enters: stores that hold copies of one repository, in the user's order. Leaves: one store to read. Invariants: a place whose `format` object differs from the
//! others' is not read; an object that one place lacks is asked of the others, and is missing only where all that answer say so. Refs and listings, which may
//! differ between copies, come from the first place that answers, in the user's order. It is not written through: a copy is written by itself.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;

use super::{Etag, Key, KeyPrefix, Listed, Page, Store, StoreError, Upload};

/// How long a place may take while there are others to ask.
const TURN: Duration = Duration::from_secs(4);
/// How long a place that failed is asked last; doubles each time, up to [`LONGEST_REST`].
const REST: Duration = Duration::from_secs(2);
const LONGEST_REST: Duration = Duration::from_secs(60);
/// Every so many reads the places change turns, so that one that got faster is noticed.
const EXPLORE: u64 = 64;
/// Says which repository it is.
const FORMAT: &str = "format";
/// What may differ between copies is below a segment of this name.
const REFS: &str = "refs";

/// Copies of one repository. Clones are the same one.
#[derive(Clone, Debug)]
pub struct MirrorStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    places: Vec<Place>,
    /// How long a place may take while there are others to ask.
    turn: Duration,
    /// The `format` object all places must have.
    format: Mutex<Option<Bytes>>,
}

#[derive(Debug)]
struct Place {
    store: Arc<dyn Store>,
    health: Mutex<Health>,
}

#[derive(Debug, Default)]
struct Health {
    /// Seconds a read takes, as a running mean.
    takes: Option<f64>,
    reads: u64,
    failures: u32,
    rests_until: Option<Instant>,
    /// It lacked something lately.
    lacks_until: Option<Instant>,
    /// Whether it holds the same repository; `None` is not known yet.
    is_copy: Option<bool>,
}

impl Health {
    fn rests(&self) -> bool {
        self.rests_until.is_some_and(|until| Instant::now() < until)
    }

    fn answered(&mut self, took: Duration) {
        let took = took.as_secs_f64();
        self.takes = Some(self.takes.map_or(took, |mean| mean + (took - mean) / 8.0));
        self.reads += 1;
        (self.failures, self.rests_until) = (0, None);
    }

    fn lacks(&mut self, took: Duration) {
        self.takes.get_or_insert(took.as_secs_f64());
        self.lacks_until = Some(Instant::now() + REST);
    }

    fn failed(&mut self) {
        // Others that failed together with it are one failure.
        if self.rests() {
            return;
        }
        let rest = (REST * 2u32.saturating_pow(self.failures.min(16))).min(LONGEST_REST);
        self.failures += 1;
        self.rests_until = Some(Instant::now() + rest);
    }
}

impl MirrorStore {
    /// Several copies, in the user's order. At least one.
    pub fn new(stores: Vec<Arc<dyn Store>>) -> MirrorStore {
        MirrorStore::with_turn(stores, TURN)
    }

    fn with_turn(stores: Vec<Arc<dyn Store>>, turn: Duration) -> MirrorStore {
        let places = stores.into_iter().map(|store| Place { store, health: Mutex::default() }).collect();
        MirrorStore { inner: Arc::new(Inner { places, turn, format: Mutex::default() }) }
    }

    /// The places in the order they are asked: those at rest last; else by speed where that matters, or as the user has them.
    fn order(&self, by_speed: bool) -> Vec<&Place> {
        let mut places: Vec<(bool, f64, &Place)> = self
            .inner
            .places
            .iter()
            .map(|place| {
                let health = place.health.lock();
                // One that was never read is tried at once.
                let takes = if by_speed { health.takes.unwrap_or(0.0) } else { 0.0 };
                let lacks = by_speed && health.lacks_until.is_some_and(|until| Instant::now() < until);
                (health.rests() || lacks, takes, place)
            })
            .collect();
        // Stable: equals stay in the user's order.
        places.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
        let explore = by_speed
            && places.len() > 1
            && !places[1].0
            && places[0].2.health.lock().reads % EXPLORE == EXPLORE - 1;
        if explore {
            places[0].2.health.lock().reads += 1;
            places.swap(0, 1);
        }
        places.into_iter().map(|(_, _, place)| place).collect()
    }

    /// Whether the place holds the repository the others hold.
    async fn is_copy(&self, place: &Place) -> Result<bool, StoreError> {
        if let Some(known) = place.health.lock().is_copy {
            return Ok(known);
        }
        let there = match place.store.get(&Key::new(FORMAT)?).await {
            Ok((body, _)) => body,
            // A copy that is not there yet is no other repository; there is nothing to read in it either.
            Err(error) => return Err(error),
        };
        let is_copy = {
            let mut format = self.inner.format.lock();
            *format.get_or_insert_with(|| there.clone()) == there
        };
        place.health.lock().is_copy = Some(is_copy);
        if !is_copy {
            let place = place.store.describe();
            tracing::error!(%place, "holds another repository than the place that answered first: it is not read");
        }
        Ok(is_copy)
    }

    /// Asks one place. The last one has all the time its caller gives it.
    async fn take_turn<'p, T, F>(
        &'p self,
        place: &'p Place,
        is_last: bool,
        request: &impl Fn(&'p Arc<dyn Store>) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let began = Instant::now();
        let asking = async {
            match self.is_copy(place).await? {
                true => request(&place.store).await,
                false => Err(self.other_repository(place)),
            }
        };
        let answer = match is_last {
            true => asking.await,
            false => tokio::time::timeout(self.inner.turn, asking)
                .await
                .unwrap_or_else(|_| Err(self.too_slow(place))),
        };
        let mut health = place.health.lock();
        match &answer {
            Ok(_) => health.answered(began.elapsed()),
            // It answers, but not with what is wanted: others first, for a while.
            Err(error) if is_missing(error) => health.lacks(began.elapsed()),
            Err(_) => health.failed(),
        }
        drop(health);
        answer
    }

    /// Asks one place after the other. Where `first_decides`, the user's first place is believed that something is not there; else all must say so.
    async fn ask<'p, T, F>(
        &'p self,
        by_speed: bool,
        first_decides: bool,
        request: impl Fn(&'p Arc<dyn Store>) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let (mut failed, mut missing) = (None, None);
        let places = self.order(by_speed);
        let last = places.len() - 1;
        for (turn, place) in places.into_iter().enumerate() {
            let is_first = std::ptr::eq(place, &self.inner.places[0]);
            match self.take_turn(place, turn == last, &request).await {
                Ok(value) => {
                    if first_decides && !is_first {
                        let (place, first) = (place.store.describe(), self.first().describe());
                        tracing::warn!("what refs say comes from {place}: {first} does not answer");
                    }
                    return Ok(value);
                }
                Err(error) if first_decides && is_first && error.is_not_found() => return Err(error),
                Err(error) if is_missing(&error) => missing = Some(error),
                Err(error) => {
                    tracing::debug!(place = %place.store.describe(), %error, "asking the next place");
                    if failed.as_ref().is_none_or(|known: &StoreError| !known.is_transient()) {
                        failed = Some(error);
                    }
                }
            }
        }
        // That one place lacks it proves nothing while another can't be asked.
        Err(failed.or(missing).expect("there is at least one place"))
    }

    /// Pages of one listing come from one place: another may have another order.
    async fn paged<'p, T, F>(
        &'p self,
        is_first_page: bool,
        request: impl Fn(&'p Arc<dyn Store>) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        match is_first_page {
            true => self.ask(false, true, request).await,
            false => self.take_turn(self.order(false)[0], true, &request).await,
        }
    }

    fn too_slow(&self, place: &Place) -> StoreError {
        StoreError::Unavailable { store: place.store.describe(), operation: "read", key: String::new() }
    }

    fn other_repository(&self, place: &Place) -> StoreError {
        StoreError::Remote {
            store: place.store.describe(),
            operation: "read",
            key: FORMAT.into(),
            why: "it holds another repository than the other places".into(),
            transient: false,
        }
    }

    fn first(&self) -> &Arc<dyn Store> {
        &self.inner.places[0].store
    }

    fn read_only<T>(&self) -> Result<T, StoreError> {
        Err(StoreError::Remote {
            store: self.describe(),
            operation: "write to",
            key: "several places at once".into(),
            why: "each place is written by itself".into(),
            transient: false,
        })
    }
}

/// The place answered, and has not got it, or not all of it.
fn is_missing(error: &StoreError) -> bool {
    matches!(error, StoreError::NotFound { .. } | StoreError::NoPlace { .. } | StoreError::ShortBody { .. })
}

#[async_trait]
impl Store for MirrorStore {
    async fn get(&self, key: &Key) -> Result<(Bytes, Etag), StoreError> {
        // A ref that was deleted must not come back from an older copy.
        let is_ref = key.segments().any(|segment| segment == REFS);
        self.ask(false, is_ref, |store| store.get(key)).await
    }

    async fn get_range(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.ask(true, false, |store| store.get_range(key, range.clone())).await
    }

    async fn put_new(&self, _key: &Key, _body: Bytes) -> Result<(), StoreError> {
        self.read_only()
    }

    async fn begin(&self) -> Result<Box<dyn Upload>, StoreError> {
        self.read_only()
    }

    async fn compare_and_swap(
        &self,
        _key: &Key,
        _expected: Option<&Etag>,
        _new: Bytes,
    ) -> Result<Etag, StoreError> {
        self.read_only()
    }

    async fn list(
        &self,
        prefix: &KeyPrefix,
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Page<Listed>, StoreError> {
        self.paged(after.is_none(), |store| store.list(prefix, after, limit)).await
    }

    async fn children(
        &self,
        dir: &KeyPrefix,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Page<String>, StoreError> {
        self.paged(after.is_none(), |store| store.children(dir, after, limit)).await
    }

    async fn delete(&self, _key: &Key) -> Result<(), StoreError> {
        self.read_only()
    }

    async fn occupant(&self) -> Result<Option<String>, StoreError> {
        self.first().occupant().await
    }

    fn describe(&self) -> String {
        let others = self.inner.places.len() - 1;
        let first = self.first().describe();
        if others == 0 { first } else { format!("{first} (and {others} more)") }
    }

    fn expect_reads(&self, at_once: usize) {
        self.inner.places.iter().for_each(|place| place.store.expect_reads(at_once));
    }
}

#[cfg(test)]
mod tests {
    use super::super::counting::Method;
    use super::super::fault::Fault;
    use super::super::{CountingStore, FaultStore, MemStore};
    use super::*;

    fn key(text: &str) -> Key {
        Key::new(text).unwrap()
    }

    struct Copy {
        faults: FaultStore,
        counts: CountingStore,
    }

    async fn copy(format: &'static str) -> Copy {
        let store = MemStore::new();
        store.put_new(&key(FORMAT), format.into()).await.unwrap();
        store.put_new(&key("block"), vec![7; 1000].into()).await.unwrap();
        let faults = FaultStore::new(Arc::new(store));
        Copy { counts: CountingStore::new(Arc::new(faults.clone())), faults }
    }

    fn mirror(copies: &[&Copy]) -> MirrorStore {
        MirrorStore::new(copies.iter().map(|copy| Arc::new(copy.counts.clone()) as Arc<dyn Store>).collect())
    }

    #[tokio::test]
    async fn reads_go_to_the_faster_place_and_over_to_the_other_when_it_fails() {
        let (slow, fast) = (copy("a").await, copy("a").await);
        slow.faults.always(Method::GetRange, "", Fault::Slow(Duration::from_millis(20)));
        let mirror = mirror(&[&slow, &fast]);
        let read = async || assert_eq!(mirror.get_range(&key("block"), 0..10).await.unwrap(), vec![7; 10]);
        for _ in 0..100 {
            read().await;
        }
        let (of_slow, of_fast) = (slow.counts.count(Method::GetRange), fast.counts.count(Method::GetRange));
        assert!(of_slow.requests <= 4 && of_fast.requests >= 96, "{of_slow:?} {of_fast:?}");
        fast.faults.always(Method::GetRange, "", Fault::FailBefore);
        for _ in 0..20 {
            read().await;
        }
        assert!(fast.faults.injected() <= 2, "a place that fails is left alone for a while");
        fast.faults.heal();
        read().await;
    }

    #[tokio::test]
    async fn what_one_place_lacks_comes_from_the_other_and_is_missing_only_where_all_say_so() {
        let (first, second) = (copy("a").await, copy("a").await);
        first.counts.delete(&key("block")).await.unwrap();
        let mirror = mirror(&[&first, &second]);
        assert_eq!(mirror.get(&key("block")).await.unwrap().0, vec![7; 1000]);
        assert!(mirror.get(&key("other")).await.unwrap_err().is_not_found());
        second.faults.always(Method::Get, "", Fault::FailBefore);
        let error = mirror.get(&key("block")).await.unwrap_err();
        assert!(error.is_transient(), "{error}");
    }

    #[tokio::test]
    async fn a_ref_that_the_first_place_lacks_does_not_come_back_from_another() {
        let (first, second) = (copy("a").await, copy("a").await);
        let refs = key("images/a/refs/heads/main");
        second.counts.put_new(&refs, "old".into()).await.unwrap();
        let mirror = mirror(&[&first, &second]);
        assert!(mirror.get(&refs).await.unwrap_err().is_not_found());
        // While the first can't be asked, what the second has is better than nothing, and what it lacks proves nothing.
        first.faults.always(Method::Get, "", Fault::FailBefore);
        assert_eq!(mirror.get(&refs).await.unwrap().0, "old");
        let error = mirror.get(&key("images/a/refs/heads/other")).await.unwrap_err();
        assert!(error.is_transient(), "{error}");
    }

    #[tokio::test]
    async fn a_place_with_another_repository_is_never_read() {
        let (first, other) = (copy("a").await, copy("b").await);
        let mirror = mirror(&[&first, &other]);
        mirror.get(&key("block")).await.unwrap();
        first.counts.delete(&key("block")).await.unwrap();
        assert!(mirror.get(&key("block")).await.is_err());
        assert_eq!(other.counts.count(Method::GetRange).requests, 0);
    }

    #[tokio::test]
    async fn a_place_that_hangs_costs_a_turn_and_then_nothing() {
        let (hung, well) = (copy("a").await, copy("a").await);
        hung.faults.always(Method::Get, "block", Fault::Slow(Duration::from_secs(3600)));
        let copies = [&hung, &well].map(|copy| Arc::new(copy.counts.clone()) as Arc<dyn Store>);
        let turn = Duration::from_millis(200);
        let mirror = MirrorStore::with_turn(copies.to_vec(), turn);
        let began = Instant::now();
        mirror.get(&key("block")).await.unwrap();
        assert!(began.elapsed() < 2 * turn);
        mirror.get(&key("block")).await.unwrap();
        assert!(began.elapsed() < 2 * turn);
    }
}
