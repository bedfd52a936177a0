//! Every store keeps the contract written on the trait.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

#[path = "common/store_contract.rs"]
mod contract;

use std::sync::Arc;

use bytes::Bytes;
use horcrux::store::counting::Method;
use horcrux::store::fault::Fault;
use horcrux::store::{CountingStore, DirStore, FaultStore, Key, MemStore, Store, StoreError};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_store_in_memory_keeps_the_contract() {
    let store: Arc<dyn Store> = Arc::new(MemStore::new());
    contract::run(|| async { store.clone() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_store_in_a_directory_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("made/by the/first write");
    contract::run(|| async { Arc::new(DirStore::new(&root)) as Arc<dyn Store> }).await;
    let left: Vec<_> = std::fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().starts_with(".tmp")), "{left:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn counting_and_healthy_fault_stores_keep_the_contract() {
    let store: Arc<dyn Store> = Arc::new(MemStore::new());
    contract::run(|| async {
        let counting = Arc::new(CountingStore::new(store.clone()));
        Arc::new(FaultStore::new(counting)) as Arc<dyn Store>
    })
    .await;
}

#[tokio::test]
async fn faults_are_what_they_say() {
    let memory = MemStore::new();
    let store = FaultStore::new(Arc::new(memory.clone()));
    let key = Key::new("a/b").unwrap();
    store.always(Method::PutNew, "a/", Fault::FailBefore);
    assert!(store.put_new(&key, Bytes::from_static(b"12345678")).await.unwrap_err().is_transient());
    assert!(memory.dump().is_empty());
    store.heal();
    store.always(Method::PutNew, "", Fault::FailAfter);
    assert!(store.put_new(&key, Bytes::from_static(b"12345678")).await.is_err());
    assert_eq!(memory.dump().len(), 1);
    store.always(Method::GetRange, "", Fault::ShortBody(3));
    let error = store.get_range(&key, 0..8).await.unwrap_err();
    assert!(matches!(error, StoreError::ShortBody { actual: 5, .. }), "{error}");
    store.always(Method::Get, "", Fault::FlippedBit);
    assert_ne!(store.get(&key).await.unwrap().0, &b"12345678"[..]);
    store.always(Method::CompareAndSwap, "", Fault::NoSpace);
    let error = store.compare_and_swap(&key, None, Bytes::new()).await.unwrap_err();
    assert!(matches!(error, StoreError::NoSpace { .. }) && !error.is_transient());
    assert_eq!(store.injected(), 5);
}

#[tokio::test]
async fn a_schedule_repeats_for_its_seed() {
    let mut runs = Vec::new();
    for _ in 0..2 {
        let store = FaultStore::new(Arc::new(MemStore::new()));
        store.schedule(42, 300);
        let mut outcomes = Vec::new();
        for n in 0..100 {
            let key = Key::new(&format!("k{n}")).unwrap();
            outcomes.push(store.put_new(&key, Bytes::from_static(b"x")).await.is_ok());
        }
        assert!(store.injected() > 10 && store.injected() < 60);
        runs.push(outcomes);
    }
    assert_eq!(runs[0], runs[1]);
}
