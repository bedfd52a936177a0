//! The store that tries again: the contract is kept whatever the store below it does, and what can't be known is said.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

#[path = "common/store_contract.rs"]
mod contract;

use std::sync::Arc;
use std::time::{Duration, Instant};

use horcrux::store::counting::Method;
use horcrux::store::fault::{Fault, Rule};
use horcrux::store::{CountingStore, FaultStore, Key, MemStore, RetryOptions, RetryStore, Store, StoreError};

fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

fn patient(store: Arc<dyn Store>) -> RetryStore {
    RetryStore::new(store, RetryOptions::default())
}

/// Not at writes into an upload (they can't be made again) and not at swaps (a lost answer is passed on, and the contract's callers don't expect one).
fn fails_now_and_then(store: &FaultStore) {
    let methods = [
        Method::Get,
        Method::GetRange,
        Method::PutNew,
        Method::Begin,
        Method::Finish,
        Method::List,
        Method::Delete,
    ];
    for method in methods {
        for round in 0..200 {
            let fault = if round % 2 == 0 { Fault::FailBefore } else { Fault::FailAfter };
            // Each takes the third request that is left to it: one in three fails.
            store.add(Rule { method, key_contains: String::new(), skip: 3 * round + 2, times: 1, fault });
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_contract_is_kept_on_a_store_that_loses_one_request_in_three() {
    let faults = FaultStore::new(Arc::new(MemStore::new()));
    fails_now_and_then(&faults);
    contract::run(|| async { Arc::new(patient(Arc::new(faults.clone()))) as Arc<dyn Store> }).await;
    assert!(faults.injected() > 50, "{} faults", faults.injected());
}

#[tokio::test]
async fn a_swap_whose_request_was_lost_is_made_again_and_one_whose_answer_was_lost_is_not_known() {
    let faults = FaultStore::new(Arc::new(MemStore::new()));
    let store = patient(Arc::new(faults.clone()));
    let first = store.compare_and_swap(&key("ref"), None, "one".into()).await.unwrap();

    let rule = |fault| Rule {
        method: Method::CompareAndSwap,
        key_contains: String::new(),
        skip: 0,
        times: 1,
        fault,
    };
    faults.add(rule(Fault::FailBefore));
    let second = store.compare_and_swap(&key("ref"), Some(&first), "two".into()).await.unwrap();

    faults.add(rule(Fault::FailAfter));
    let error = store.compare_and_swap(&key("ref"), Some(&second), "three".into()).await.unwrap_err();
    assert!(error.is_transient(), "neither a success nor a conflict: {error}");
    let (body, third) = store.get(&key("ref")).await.unwrap();
    assert_eq!(body, "three");

    let error = store.compare_and_swap(&key("ref"), Some(&second), "four".into()).await.unwrap_err();
    assert!(matches!(error, StoreError::Conflict { .. }), "{error}");
    store.compare_and_swap(&key("ref"), Some(&third), "five".into()).await.unwrap();
}

#[tokio::test]
async fn an_error_that_stays_is_passed_on_at_once_and_one_that_passes_when_time_is_up() {
    let counts = CountingStore::new(Arc::new(MemStore::new()));
    let store = patient(Arc::new(counts.clone()));
    assert!(store.get(&key("nothing")).await.unwrap_err().is_not_found());
    assert_eq!(counts.requests(), 1);

    let faults = FaultStore::new(Arc::new(MemStore::new()));
    faults.always(Method::Get, "", Fault::FailBefore);
    let options = RetryOptions { deadline: Duration::from_millis(700), ..RetryOptions::default() };
    let store = RetryStore::new(Arc::new(faults.clone()), options);
    let began = Instant::now();
    let error = store.get(&key("away")).await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    assert!((3..12).contains(&faults.injected()), "{} attempts", faults.injected());
}

#[tokio::test]
async fn a_request_that_hangs_is_given_up_and_made_again() {
    let mem = MemStore::new();
    mem.put_new(&key("object"), "content".into()).await.unwrap();
    let faults = FaultStore::new(Arc::new(mem));
    let hang = Fault::Slow(Duration::from_secs(3600));
    faults.add(Rule {
        method: Method::GetRange,
        key_contains: String::new(),
        skip: 0,
        times: 1,
        fault: hang,
    });
    let store = RetryStore::new(
        Arc::new(faults),
        RetryOptions { attempt: Duration::from_millis(300), ..RetryOptions::default() },
    );
    let began = Instant::now();
    assert_eq!(store.get_range(&key("object"), 0..7).await.unwrap(), "content");
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
}
