//! One fetch serves all who wait, its error too, and nobody who gives up leaves others waiting.

#![allow(clippy::unwrap_used)]

mod cache_common;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use cache_common::{chunk, content, id, open, read, small};
use horcrux::cache::{Claim, FetchError, Settled};
use tokio::sync::Notify;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_waiters_share_one_fetch() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 64);
    let fetches = Arc::new(AtomicU32::new(0));
    let go = Arc::new(Notify::new());
    let mut waiters = Vec::new();
    for _ in 0..100 {
        let (cache, fetches, go) = (cache.clone(), fetches.clone(), go.clone());
        waiters.push(tokio::spawn(async move {
            cache
                .get_or_fetch(id(1, small()), small(), || async move {
                    fetches.fetch_add(1, Ordering::Relaxed);
                    go.notified().await;
                    Ok::<_, io::Error>(chunk(1, small()))
                })
                .await
        }));
    }
    while cache.stats().joined < 99 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    go.notify_one();
    for waiter in waiters {
        assert_eq!(*waiter.await.unwrap().unwrap(), *content(1, small()));
    }
    assert_eq!(fetches.load(Ordering::Relaxed), 1);
    assert_eq!(cache.stats().misses, 1);
}

#[tokio::test]
async fn an_error_goes_to_every_waiter_and_the_next_call_tries_again() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 64);
    let wanted = id(1, small());
    let Claim::Missing(flight) = cache.claim_one(&wanted) else { panic!("an empty cache has it") };
    let waiters: Vec<_> = (0..10)
        .map(|_| {
            let cache = cache.clone();
            tokio::spawn(async move {
                cache
                    .get_or_fetch(wanted, small(), || async {
                        Err::<horcrux::format::VerifiedChunk, _>(io::Error::other("fetched by a waiter"))
                    })
                    .await
            })
        })
        .collect();
    while cache.stats().joined < 10 {
        tokio::task::yield_now().await;
    }
    flight.fail(io::Error::new(io::ErrorKind::TimedOut, "the remote is away"));
    for waiter in waiters {
        let error = waiter.await.unwrap().unwrap_err();
        assert_eq!(error.cause::<io::Error>().unwrap().kind(), io::ErrorKind::TimedOut);
        assert!(error.to_string().contains(&wanted.to_string()), "{error}");
    }
    assert_eq!(*read(&cache, 1, small()).await, *content(1, small()));
}

#[tokio::test]
async fn the_fetch_goes_on_when_its_first_waiter_is_cancelled() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 64);
    let go = Arc::new(Notify::new());
    let first = {
        let (cache, go) = (cache.clone(), go.clone());
        tokio::spawn(async move {
            let fetch = || async move {
                go.notified().await;
                Ok::<_, io::Error>(chunk(1, small()))
            };
            cache.get_or_fetch(id(1, small()), small(), fetch).await
        })
    };
    while cache.stats().misses == 0 {
        tokio::task::yield_now().await;
    }
    let Claim::Pending(second) = cache.claim_one(&id(1, small())) else { panic!("a flight is under way") };
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    go.notify_one();
    let Settled::Ready(chunk) = second.settle().await.unwrap() else { panic!("the fetch was lost") };
    assert_eq!(*chunk, *content(1, small()));
}

#[tokio::test]
async fn a_dropped_flight_passes_to_one_waiter() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 64);
    let Claim::Missing(flight) = cache.claim_one(&id(1, small())) else { panic!("an empty cache has it") };
    let waiters: Vec<_> = (0..20)
        .map(|_| {
            let cache = cache.clone();
            tokio::spawn(async move { read(&cache, 1, small()).await })
        })
        .collect();
    while cache.stats().joined < 20 {
        tokio::task::yield_now().await;
    }
    drop(flight);
    for waiter in waiters {
        assert_eq!(*waiter.await.unwrap(), *content(1, small()));
    }
    assert_eq!(cache.stats().fetched.0, small().len() as u64, "fetched once");
}

#[tokio::test]
async fn a_fetch_that_panics_fails_its_caller_and_passes_to_a_waiter() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 64);
    let wanted = id(1, small());
    let error = cache
        .get_or_fetch::<_, _, io::Error>(wanted, small(), || async { panic!("part of the test") })
        .await
        .unwrap_err();
    assert!(matches!(error, FetchError::BrokenOff { .. }), "{error}");
    assert_eq!(*read(&cache, 1, small()).await, *content(1, small()));
}

#[tokio::test]
async fn a_fetch_that_brings_another_chunk_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 64);
    let error = cache
        .get_or_fetch(id(1, small()), small(), || async { Ok::<_, io::Error>(chunk(2, small())) })
        .await
        .unwrap_err();
    assert!(matches!(error, FetchError::Wrong { .. }), "{error}");
    assert!(cache.lookup(&id(1, small())).is_none());
}

#[tokio::test]
async fn a_batch_is_claimed_fetched_in_one_request_and_fulfils_the_flights_of_others() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 64);
    let ids: Vec<_> = (0..6).map(|n| id(n, small())).collect();
    cache.insert(chunk(0, small()));
    // Another reader is bringing 1, and is slow.
    let Claim::Missing(slow) = cache.claim_one(&ids[1]) else { panic!("an empty cache has it") };

    let claims = cache.claim(&[ids[0], ids[1], ids[2], ids[3], ids[2]]);
    assert!(matches!(
        claims[..],
        [Claim::Ready(_), Claim::Pending(_), Claim::Missing(_), Claim::Missing(_), Claim::Pending(_)]
    ));
    let waiter = {
        let cache = cache.clone();
        tokio::spawn(async move { read(&cache, 3, small()).await })
    };
    let mut pending = Vec::new();
    for claim in claims {
        match claim {
            Claim::Ready(chunk) => assert_eq!(*chunk, *content(0, small())),
            Claim::Pending(other) => pending.push(other),
            Claim::Missing(flight) => {
                let n = ids.iter().position(|id| *id == flight.id()).unwrap() as u64;
                flight.fulfil(chunk(n, small())).unwrap();
            }
        }
    }
    // The joined read brought 1 as well.
    cache.insert(chunk(1, small()));
    for pending in pending {
        assert!(matches!(pending.settle().await.unwrap(), Settled::Ready(_)));
    }
    assert_eq!(*waiter.await.unwrap(), *content(3, small()));
    // The slow one comes late, and harmless.
    assert_eq!(*slow.fulfil(chunk(1, small())).unwrap(), *content(1, small()));
    assert_eq!(*read(&cache, 1, small()).await, *content(1, small()));
}
