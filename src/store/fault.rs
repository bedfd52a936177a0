//! A store that fails on purpose: by rules, or by a seeded schedule.
//!
//! Invariant: the same rules, or the same seed and the same order of requests, give the same faults.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;

use super::counting::Method;
use super::{Etag, Key, KeyPrefix, Listed, Page, Store, StoreError, Upload};

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The request fails and nothing is done.
    FailBefore,
    /// The request is done, then its answer is lost.
    FailAfter,
    /// A body comes back with this many bytes less, as an error-less reply. `get` hands it out; `get_range` turns it into
    /// [`StoreError::ShortBody`], as every store must.
    ShortBody(usize),
    /// A body comes back with one bit flipped.
    FlippedBit,
    /// A body comes back as zeros.
    Zeros,
    /// The request takes this much longer.
    Slow(Duration),
    /// No space is left for what the request writes.
    NoSpace,
}

/// When something goes wrong.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Of which method.
    pub method: Method,
    /// Of which keys: those that contain this. An upload's begin and writes have the empty key.
    pub key_contains: String,
    /// How many matching requests pass first.
    pub skip: u64,
    /// How many fail then.
    pub times: u64,
    /// How.
    pub fault: Fault,
}

/// Faults by chance, the same for the same seed.
#[derive(Clone, Copy, Debug)]
struct Schedule {
    state: u64,
    per_mille: u16,
}

#[derive(Debug, Default)]
struct Plan {
    rules: Vec<Rule>,
    schedule: Option<Schedule>,
    /// The state of a seed, and the longest delay.
    jitter: Option<(u64, Duration)>,
    injected: u64,
}

type SharedPlan = Arc<Mutex<Plan>>;

/// Wraps a store and fails. Clones share the plan.
#[derive(Clone, Debug)]
pub struct FaultStore {
    inner: Arc<dyn Store>,
    plan: SharedPlan,
}

impl FaultStore {
    /// Wraps a store; nothing fails until a rule or a schedule is given.
    pub fn new(inner: Arc<dyn Store>) -> FaultStore {
        FaultStore { inner, plan: SharedPlan::default() }
    }

    /// Adds a rule.
    pub fn add(&self, rule: Rule) {
        self.plan.lock().rules.push(rule);
    }

    /// Makes every request of `method` fail from now on.
    pub fn always(&self, method: Method, key_contains: &str, fault: Fault) {
        self.add(Rule { method, key_contains: key_contains.into(), skip: 0, times: u64::MAX, fault });
    }

    /// Lets `per_mille` of 1,000 requests fail, before or after they are done, by chance from `seed`.
    pub fn schedule(&self, seed: u64, per_mille: u16) {
        self.plan.lock().schedule = Some(Schedule { state: seed, per_mille });
    }

    /// Delays requests and answers by up to `most` each, half of them not at all, by chance from `seed`.
    pub fn jitter(&self, seed: u64, most: Duration) {
        self.plan.lock().jitter = Some((seed, most));
    }

    /// Lets everything pass from now on.
    pub fn heal(&self) {
        let mut plan = self.plan.lock();
        plan.rules.clear();
        plan.schedule = None;
        plan.jitter = None;
    }

    /// How many faults there were.
    pub fn injected(&self) -> u64 {
        self.plan.lock().injected
    }
}

/// SplitMix64: the next number of a seed.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Plan {
    fn decide(&mut self, method: Method, key: &str) -> Option<Fault> {
        let mut chosen = None;
        for rule in &mut self.rules {
            if rule.method != method || !key.contains(&rule.key_contains) {
                continue;
            }
            if rule.skip > 0 {
                rule.skip -= 1;
            } else if rule.times > 0 && chosen.is_none() {
                rule.times -= 1;
                chosen = Some(rule.fault);
            }
        }
        if chosen.is_none()
            && let Some(schedule) = &mut self.schedule
            && next(&mut schedule.state) % 1000 < schedule.per_mille.into()
        {
            let after = next(&mut schedule.state).is_multiple_of(2);
            chosen = Some(if after { Fault::FailAfter } else { Fault::FailBefore });
        }
        self.injected += u64::from(chosen.is_some());
        chosen
    }
}

/// Waits as the plan's jitter has it.
async fn jitter(plan: &SharedPlan) {
    let delay = plan.lock().jitter.as_mut().map(|(state, most)| {
        let chance = next(state) % 2000;
        most.mul_f64(chance.saturating_sub(1000) as f64 / 1000.0)
    });
    match delay {
        None => {}
        Some(Duration::ZERO) => tokio::task::yield_now().await,
        Some(delay) => tokio::time::sleep(delay).await,
    }
}

fn operation(method: Method) -> &'static str {
    match method {
        Method::Get | Method::GetRange => "read",
        Method::List => "list",
        Method::Delete => "delete",
        _ => "write",
    }
}

fn damage(body: Bytes, fault: Fault) -> Bytes {
    match fault {
        Fault::ShortBody(less) => body.slice(..body.len().saturating_sub(less)),
        Fault::FlippedBit if !body.is_empty() => {
            let mut bytes = body.to_vec();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x10;
            bytes.into()
        }
        Fault::Zeros => vec![0; body.len()].into(),
        _ => body,
    }
}

/// Runs one request under a plan.
async fn faulty<T>(
    plan: &SharedPlan,
    store: &str,
    method: Method,
    key: &str,
    request: impl Future<Output = Result<T, StoreError>> + Send,
) -> Result<(T, Option<Fault>), StoreError> {
    let fault = plan.lock().decide(method, key);
    let lost = || StoreError::Unavailable {
        store: store.to_owned(),
        operation: operation(method),
        key: key.to_owned(),
    };
    match fault {
        Some(Fault::FailBefore) => return Err(lost()),
        Some(Fault::NoSpace) => {
            return Err(StoreError::NoSpace { store: store.to_owned(), what: key.to_owned() });
        }
        Some(Fault::Slow(delay)) => tokio::time::sleep(delay).await,
        _ => {}
    }
    jitter(plan).await;
    let value = request.await?;
    jitter(plan).await;
    if fault == Some(Fault::FailAfter) { Err(lost()) } else { Ok((value, fault)) }
}

impl FaultStore {
    async fn run<T>(
        &self,
        method: Method,
        key: &str,
        request: impl Future<Output = Result<T, StoreError>> + Send,
    ) -> Result<(T, Option<Fault>), StoreError> {
        faulty(&self.plan, &self.inner.describe(), method, key, request).await
    }
}

#[async_trait]
impl Store for FaultStore {
    async fn get(&self, key: &Key) -> Result<(Bytes, Etag), StoreError> {
        let ((body, etag), fault) = self.run(Method::Get, key.as_str(), self.inner.get(key)).await?;
        Ok((fault.map_or(body.clone(), |fault| damage(body, fault)), etag))
    }

    async fn get_range(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> {
        let expected = range.end.saturating_sub(range.start);
        let (body, fault) =
            self.run(Method::GetRange, key.as_str(), self.inner.get_range(key, range)).await?;
        let body = fault.map_or(body.clone(), |fault| damage(body, fault));
        if body.len() as u64 != expected {
            return Err(StoreError::ShortBody {
                store: self.describe(),
                key: key.clone(),
                expected,
                actual: body.len() as u64,
            });
        }
        Ok(body)
    }

    async fn put_new(&self, key: &Key, body: Bytes) -> Result<(), StoreError> {
        self.run(Method::PutNew, key.as_str(), self.inner.put_new(key, body)).await.map(|_| ())
    }

    async fn begin(&self) -> Result<Box<dyn Upload>, StoreError> {
        let (inner, _) = self.run(Method::Begin, "", self.inner.begin()).await?;
        Ok(Box::new(FaultUpload { inner, store: self.describe(), plan: self.plan.clone() }))
    }

    async fn compare_and_swap(
        &self,
        key: &Key,
        expected: Option<&Etag>,
        new: Bytes,
    ) -> Result<Etag, StoreError> {
        let swap = self.inner.compare_and_swap(key, expected, new);
        self.run(Method::CompareAndSwap, key.as_str(), swap).await.map(|(etag, _)| etag)
    }

    async fn list(
        &self,
        prefix: &KeyPrefix,
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Page<Listed>, StoreError> {
        let list = self.inner.list(prefix, after, limit);
        self.run(Method::List, prefix.as_str(), list).await.map(|(page, _)| page)
    }

    async fn children(
        &self,
        dir: &KeyPrefix,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Page<String>, StoreError> {
        let list = self.inner.children(dir, after, limit);
        self.run(Method::List, dir.as_str(), list).await.map(|(page, _)| page)
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.run(Method::Delete, key.as_str(), self.inner.delete(key)).await.map(|_| ())
    }

    async fn occupant(&self) -> Result<Option<String>, StoreError> {
        self.inner.occupant().await
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }

    fn expect_reads(&self, at_once: usize) {
        self.inner.expect_reads(at_once);
    }
}

struct FaultUpload {
    inner: Box<dyn Upload>,
    store: String,
    plan: SharedPlan,
}

#[async_trait]
impl Upload for FaultUpload {
    async fn write(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        faulty(&self.plan, &self.store, Method::Write, "", self.inner.write(bytes)).await.map(|_| ())
    }

    async fn finish(&mut self, key: &Key) -> Result<(), StoreError> {
        faulty(&self.plan, &self.store, Method::Finish, key.as_str(), self.inner.finish(key))
            .await
            .map(|_| ())
    }
}
