//! Single flight: one fetch serves all who wait for a chunk.
//!
//! Enters: requests for chunks ([`Cache::claim`]), and what came of fetching them. Leaves: chunks, or the duty to
//! fetch them.
//! Invariant: of all who ask for a chunk that is not here, exactly one holds its [`Flight`]; if that one lets go of
//! it without a result, the duty passes to one of those who wait, so a cancelled reader never leaves others waiting.

use std::error::Error;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::watch;

use super::Cache;
use super::chunk_ref::ChunkRef;
use super::error::FetchError;
use super::index::{Channel, Found, Outcome, Shard};
use super::queue::Room;
use super::slab::VERIFIED;
use super::stats::{count, discount};
use crate::format::{ChunkId, ChunkSize, VerifiedChunk};
use crate::units::ByteLen;

/// What one asked-for chunk comes to.
#[derive(Debug)]
#[must_use = "a Missing flight that is dropped passes the fetch to someone else"]
pub enum Claim {
    /// It is here.
    Ready(ChunkRef),
    /// Someone else is fetching or verifying it.
    Pending(Pending),
    /// It is the caller's to fetch now; everyone else waits for that.
    Missing(Flight),
}

/// What a [`Pending`] chunk came to.
#[derive(Debug)]
#[must_use = "a Missing flight that is dropped passes the fetch to someone else"]
pub enum Settled {
    /// It is here.
    Ready(ChunkRef),
    /// Whoever was fetching it gave up, or it was damaged on the disk: it is the caller's to fetch now.
    Missing(Flight),
}

/// The duty to fetch one chunk. End it with [`Flight::fulfil`] or [`Flight::fail`]; dropping it hands the duty to one
/// of those who wait.
#[must_use = "dropping it passes the fetch to someone else"]
pub struct Flight {
    cache: Arc<Cache>,
    id: ChunkId,
    channel: Channel,
}

impl Flight {
    /// The chunk to be fetched.
    pub fn id(&self) -> ChunkId {
        self.id
    }

    /// Hands the chunk to everyone who waits for it, and to the cache to be kept if its write queue has room. Does not
    /// wait for the disk.
    pub fn fulfil(self, chunk: VerifiedChunk) -> Result<ChunkRef, FetchError> {
        self.land(chunk, None)
    }

    /// As [`Flight::fulfil`], into room that was taken before.
    pub fn fulfil_in(self, room: &mut Room, chunk: VerifiedChunk) -> Result<ChunkRef, FetchError> {
        self.land(chunk, Some(room))
    }

    fn land(self, chunk: VerifiedChunk, room: Option<&mut Room>) -> Result<ChunkRef, FetchError> {
        if chunk.id() != self.id {
            let expected = ByteLen(chunk.content().len() as u64);
            let error = FetchError::Wrong { id: self.id, expected, actual_id: chunk.id(), actual: expected };
            self.end(Err(error.clone()));
            return Err(error);
        }
        Ok(self.cache.take_in(chunk, room))
    }

    /// Tells everyone who waits that the fetch failed. The next to ask will be told to try again.
    pub fn fail<E: Error + Send + Sync + 'static>(self, error: E) -> FetchError {
        let error = FetchError::Fetch { id: self.id, source: Arc::new(error) };
        self.fail_as(error)
    }

    /// As [`Flight::fail`], with an error that is shared already: of one request that was to bring several chunks.
    pub fn fail_as(self, error: FetchError) -> FetchError {
        self.end(Err(error.clone()));
        error
    }

    fn end(&self, result: Result<ChunkRef, FetchError>) {
        self.cache.inner.index.shard(&self.id).end_flight(&self.id, &self.channel);
        publish(&self.channel, result);
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        // After `fulfil` and `fail` it is not there any more. Else the channel closes without a result when
        // self.channel goes, which is the signal to ask again; it must be out of the shard before, or those who ask
        // again would find it.
        self.cache.inner.index.shard(&self.id).end_flight(&self.id, &self.channel);
    }
}

impl std::fmt::Debug for Flight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Flight({:?})", self.id)
    }
}

/// A chunk someone else is bringing.
pub struct Pending {
    cache: Arc<Cache>,
    id: ChunkId,
    receiver: watch::Receiver<Outcome>,
}

impl std::fmt::Debug for Pending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pending({:?})", self.id)
    }
}

impl Pending {
    /// The chunk waited for.
    pub fn id(&self) -> ChunkId {
        self.id
    }

    /// Waits. Whoever holds flights of their own ends these first: two who wait for each other's would wait for ever.
    pub async fn settle(mut self) -> Result<Settled, FetchError> {
        // Each round but the last means that an owner gave up, so there are no more rounds than owners.
        loop {
            let outcome = match self.receiver.wait_for(Option::is_some).await {
                Ok(outcome) => outcome.clone(),
                Err(_closed) => None,
            };
            if let Some(result) = outcome {
                return result.map(Settled::Ready);
            }
            match self.cache.claim_one(&self.id) {
                Claim::Ready(chunk) => return Ok(Settled::Ready(chunk)),
                Claim::Missing(flight) => return Ok(Settled::Missing(flight)),
                Claim::Pending(next) => self.receiver = next.receiver,
            }
            // A runtime that is shutting down drops blocking work unrun: let it drop this task too.
            tokio::task::yield_now().await;
        }
    }
}

/// Sets the result of a flight, once.
fn publish(channel: &Channel, result: Result<ChunkRef, FetchError>) {
    channel.send_if_modified(|outcome| {
        let first = outcome.is_none();
        if first {
            *outcome = Some(result);
        }
        first
    });
}

impl Cache {
    /// Asks for chunks, in order: those that are here, those that others are bringing, and those that are now the
    /// caller's to fetch, in one request or several. Does no I/O: chunks on the disk that this process has not
    /// verified yet are being verified on a blocking thread when it returns, and `Pending`.
    ///
    /// End your own flights before you settle a `Pending` one. A chunk named twice is `Missing` once and `Pending`
    /// once.
    pub fn claim(self: &Arc<Self>, ids: &[ChunkId]) -> Vec<Claim> {
        ids.iter().map(|id| self.claim_one(id)).collect()
    }

    /// Asks for one chunk, as [`Cache::claim`].
    pub fn claim_one(self: &Arc<Self>, id: &ChunkId) -> Claim {
        let mut shard = self.inner.index.shard(id);
        match shard.find(id) {
            Found::Verified(chunk) => {
                shard.hits += 1;
                Claim::Ready(chunk)
            }
            Found::Unverified(chunk) => {
                if let Some(pending) = self.join(&mut shard, id) {
                    return Claim::Pending(pending);
                }
                let (flight, receiver) = self.take_off(&mut shard, id);
                drop(shard);
                self.spawn_check(flight, chunk);
                Claim::Pending(Pending { cache: self.clone(), id: *id, receiver })
            }
            Found::Nothing => {
                if let Some(pending) = self.join(&mut shard, id) {
                    return Claim::Pending(pending);
                }
                shard.misses += 1;
                Claim::Missing(self.take_off(&mut shard, id).0)
            }
        }
    }

    /// Has a chunk checked on a blocking thread; without a runtime the caller is one.
    fn spawn_check(&self, flight: Flight, chunk: ChunkRef) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return flight.verify(chunk) };
        let checks = self.checks.clone();
        runtime.spawn(async move {
            let permit = checks.acquire_owned().await;
            let check = tokio::task::spawn_blocking(move || {
                flight.verify(chunk);
                drop(permit);
            });
            // Its result goes to those who wait.
            drop(check);
        });
    }

    fn join(self: &Arc<Self>, shard: &mut Shard, id: &ChunkId) -> Option<Pending> {
        let receiver = shard.flights.get(id)?.subscribe();
        shard.joined += 1;
        Some(Pending { cache: self.clone(), id: *id, receiver })
    }

    fn take_off(self: &Arc<Self>, shard: &mut Shard, id: &ChunkId) -> (Flight, watch::Receiver<Outcome>) {
        let (sender, receiver) = watch::channel(None);
        let channel = Arc::new(sender);
        shard.flights.insert(*id, channel.clone());
        (Flight { cache: self.clone(), id: *id, channel }, receiver)
    }

    /// The chunk: from here, or by `fetch`. One fetch serves all who wait for it, and goes on when they are gone. Its
    /// error goes to everyone who waits at that time; the next call tries again. `fetch` runs as a task of its own,
    /// so call this within a tokio runtime.
    pub async fn get_or_fetch<F, Fut, E>(
        self: &Arc<Self>,
        id: ChunkId,
        size: ChunkSize,
        fetch: F,
    ) -> Result<ChunkRef, FetchError>
    where
        F: FnOnce() -> Fut,
        Fut: Future<Output = Result<VerifiedChunk, E>> + Send + 'static,
        E: Error + Send + Sync + 'static,
    {
        let settled = match self.claim_one(&id) {
            Claim::Ready(chunk) => Settled::Ready(chunk),
            Claim::Missing(flight) => Settled::Missing(flight),
            Claim::Pending(pending) => pending.settle().await?,
        };
        let flight = match settled {
            Settled::Ready(chunk) => return Ok(chunk),
            Settled::Missing(flight) => flight,
        };
        let fetch = fetch();
        let cache = self.clone();
        let fetched = tokio::spawn(async move {
            let mut room = cache.room(ByteLen(size.len() as u64)).await;
            match fetch.await {
                Ok(chunk) if chunk.id() == id && chunk.content().len() == size.len() => {
                    flight.fulfil_in(&mut room, chunk)
                }
                Ok(chunk) => Err(flight.fail_as(FetchError::Wrong {
                    id,
                    expected: ByteLen(size.len() as u64),
                    actual_id: chunk.id(),
                    actual: ByteLen(chunk.content().len() as u64),
                })),
                Err(error) => Err(flight.fail(error)),
            }
        });
        fetched.await.unwrap_or(Err(FetchError::BrokenOff { id }))
    }

    /// Brings a chunk whose pages have left memory ([`ChunkRef::is_resident`] said `false`) back in, on a blocking
    /// thread, and checks it again: the disk may have changed it meanwhile. All who ask at that time share one
    /// reading. `Missing`: it was damaged and is thrown away; fetch it.
    pub async fn reload(self: &Arc<Self>, chunk: ChunkRef) -> Result<Settled, FetchError> {
        let Some((slab, slot)) = chunk.slot() else { return Ok(Settled::Ready(chunk)) };
        let id = slab.id(slot);
        {
            // Under the lock, as every change of VERIFIED.
            let _shard = self.inner.index.shard(&id);
            slab.slot(slot).state.fetch_and(!VERIFIED, Ordering::Relaxed);
        }
        match self.claim_one(&id) {
            Claim::Ready(chunk) => Ok(Settled::Ready(chunk)),
            Claim::Missing(flight) => Ok(Settled::Missing(flight)),
            Claim::Pending(pending) => pending.settle().await,
        }
    }

    /// Keeps a verified chunk, and hands it to those who wait for it, whoever was to fetch it. Does not wait for the
    /// disk: until it is written it is served from memory, and if the write queue is full, memory is all it gets.
    /// Those who fetch ask for [`Cache::room`] before, and land in it.
    pub fn insert(&self, chunk: VerifiedChunk) -> ChunkRef {
        self.take_in(chunk, None)
    }

    fn take_in(&self, chunk: VerifiedChunk, room: Option<&mut Room>) -> ChunkRef {
        let id = chunk.id();
        count(&self.inner.counters.fetched, chunk.content().len() as u64);
        let mut shard = self.inner.index.shard(&id);
        let landed = match shard.find(&id) {
            Found::Verified(kept) => kept,
            // Being verified, or will be at its first use: nothing to write.
            Found::Unverified(_) => ChunkRef::heap(chunk.content().clone()),
            Found::Nothing => self.stage(&mut shard, chunk, room),
        };
        let flight = shard.flights.remove(&id);
        drop(shard);
        if let Some(channel) = flight {
            publish(&channel, Ok(landed.clone()));
        }
        landed
    }
}

impl Flight {
    /// Checks a chunk found on the disk. Runs on a blocking thread. Damaged: dropping the flight makes those who wait
    /// ask again, and one of them fetches it.
    fn verify(self, chunk: ChunkRef) {
        let inner = &self.cache.inner;
        let Some((slab, slot)) = chunk.slot() else { return };
        if slab.check(slot) {
            let mut shard = inner.index.shard(&self.id);
            // It may have been thrown away meanwhile: good for those who hold it, but no entry any more.
            if shard
                .place(&self.id)
                .is_some_and(|place| place.slab == slab.number && u32::from(place.slot) == slot)
            {
                slab.slot(slot).state.fetch_or(VERIFIED, Ordering::Relaxed);
            }
            shard.end_flight(&self.id, &self.channel);
            drop(shard);
            count(&inner.counters.verified, 1);
            publish(&self.channel, Ok(chunk));
            return;
        }
        if !inner.index.shard(&self.id).forget(&self.id, slab.number, slot) {
            return;
        }
        count(&inner.counters.healed, 1);
        discount(&inner.counters.used, slab.geometry.chunk().len() as u64);
        tracing::warn!(chunk = %self.id, slab = slab.number, slot, "damaged chunk in the cache, thrown away");
        // Our pin still keeps the writer off the slot. If this fails, the next process finds the damage again.
        if let Err(error) = slab.clear_record(slot) {
            tracing::warn!(slab = slab.number, slot, %error, "can't mark the cache slot free");
        }
    }
}
