//! The SSH store on a real sshd: the contract, races with directory stores, and a server that goes away.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

#[path = "common/store_contract.rs"]
mod contract;
mod harness;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::join_all;
use harness::sshd::{Account, Sshd, sshd};
use harness::{Tmpfs, noise, until};
use horcrux::store::ssh::{MAX_SESSIONS, SshStore};
use horcrux::store::{DirStore, Key, Store, StoreError};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap()
}

fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

fn store(server: &Sshd, path: &Path) -> SshStore {
    SshStore::new(server.place(path), server.local())
}

/// Names below a directory that are no objects.
fn hidden(dir: &Path) -> Vec<PathBuf> {
    let (mut found, mut dirs) = (Vec::new(), vec![dir.to_owned()]);
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
            if entry.file_name().to_string_lossy().starts_with('.') {
                found.push(entry.path());
            } else if entry.file_type().unwrap().is_dir() {
                dirs.push(entry.path());
            }
        }
    }
    found
}

fn keeps_the_contract(account: Account) {
    if !sshd() {
        return;
    }
    let server = Sshd::start(account);
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("made/by the/first 'write' $(x)");
    runtime().block_on(contract::run(|| async { Arc::new(store(&server, &root)) as Arc<dyn Store> }));
    // What was dropped is removed behind our back.
    assert!(until(Duration::from_secs(20), || hidden(&root).is_empty()), "{:?}", hidden(&root));
}

#[test]
fn a_store_of_an_account_with_a_shell_keeps_the_contract() {
    keeps_the_contract(Account::Shell);
}

#[test]
fn a_store_of_an_account_with_sftp_only_keeps_the_contract() {
    keeps_the_contract(Account::SftpOnly);
}

/// Adds one to a counter, `times` times.
async fn add(store: Arc<dyn Store>, times: u32) {
    for _ in 0..times {
        loop {
            let (body, etag) = store.get(&key("refs/counter")).await.unwrap();
            let count: u32 = std::str::from_utf8(&body).unwrap().parse().unwrap();
            let next = Bytes::from((count + 1).to_string());
            match store.compare_and_swap(&key("refs/counter"), Some(&etag), next).await {
                Ok(_) => break,
                Err(StoreError::Conflict { .. } | StoreError::Locked { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }
}

#[test]
fn no_swap_is_lost_between_directory_stores_and_ssh_clients() {
    if !sshd() {
        return;
    }
    const EACH: u32 = 12;
    let server = Sshd::start(Account::SftpOnly);
    let dir = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let local = DirStore::new(dir.path());
        local.compare_and_swap(&key("refs/counter"), None, Bytes::from_static(b"0")).await.unwrap();
        let mut stores: Vec<Arc<dyn Store>> = Vec::new();
        for _ in 0..3 {
            stores.push(Arc::new(DirStore::new(dir.path())));
            stores.push(Arc::new(store(&server, dir.path())));
        }
        let adders: Vec<_> = stores.into_iter().map(|store| tokio::spawn(add(store, EACH))).collect();
        join_all(adders).await.into_iter().for_each(Result::unwrap);
        let (count, _) = local.get(&key("refs/counter")).await.unwrap();
        assert_eq!(count, (6 * EACH).to_string().as_bytes());
    });
}

#[test]
fn a_claim_left_by_a_dead_client_is_ended_in_bounded_time_and_then_fails() {
    if !sshd() {
        return;
    }
    let server = Sshd::start(Account::SftpOnly);
    let dir = tempfile::tempdir().unwrap();
    let refs = dir.path().join("refs");
    let expiry = Duration::from_millis(600);
    runtime().block_on(async {
        let object = key("refs/main");
        DirStore::new(dir.path()).compare_and_swap(&object, None, Bytes::from_static(b"0")).await.unwrap();
        let store = SshStore::with_claim_expiry(server.place(dir.path()), server.local(), expiry);
        let (_, zero) = store.get(&object).await.unwrap();
        std::fs::create_dir(refs.join(".swap")).unwrap();
        std::fs::write(refs.join(".swap/s-dead"), b"never").unwrap();
        let started = Instant::now();
        store.compare_and_swap(&object, Some(&zero), Bytes::from_static(b"1")).await.unwrap();
        assert!(started.elapsed() >= expiry && started.elapsed() < Duration::from_secs(8));
        // The dead client's last step, had it only been asleep.
        let late = std::fs::rename(refs.join(".swap/s-dead"), refs.join("main"));
        assert_eq!(late.unwrap_err().kind(), std::io::ErrorKind::NotFound);
        assert_eq!(store.get(&object).await.unwrap().0, &b"1"[..]);
    });
}

#[test]
fn sessions_are_bounded_and_a_server_that_comes_back_is_used_again() {
    if !sshd() {
        return;
    }
    // New keys every 4 MiB: a server may ask for them in the middle of anything.
    let mut server = Sshd::start_with(Account::SftpOnly, "RekeyLimit 4M\n");
    let dir = tempfile::tempdir().unwrap();
    let body = noise(7, 24 << 20);
    runtime().block_on(async {
        let store = Arc::new(store(&server, dir.path()));
        let mut upload = store.begin().await.unwrap();
        for piece in body.chunks(3_000_001) {
            upload.write(piece.to_vec().into()).await.unwrap();
        }
        upload.finish(&key("big")).await.unwrap();
        assert!(std::fs::read(dir.path().join("big")).unwrap() == body);
        let read_all = async |at_once: u64| {
            let reads = (0..at_once).map(|n| {
                let (store, from) = (store.clone(), (n * 13 % 20) << 20);
                tokio::spawn(async move { (from, store.get_range(&key("big"), from..from + 300_000).await) })
            });
            join_all(reads).await.into_iter().map(Result::unwrap).collect::<Vec<_>>()
        };
        for (from, got) in read_all(64).await {
            assert!(got.unwrap() == body[from as usize..][..300_000]);
        }
        let open = server.sessions();
        assert!((1..=MAX_SESSIONS).contains(&open), "{open} sessions");

        // An open file of a session must not serve what was deleted, nor what took its place.
        store.put_new(&key("gone"), Bytes::from_static(b"12345")).await.unwrap();
        for _ in 0..2 * MAX_SESSIONS {
            store.get_range(&key("gone"), 0..5).await.unwrap();
        }
        std::fs::remove_file(dir.path().join("gone")).unwrap();
        for _ in 0..2 * MAX_SESSIONS {
            assert!(store.get_range(&key("gone"), 0..5).await.unwrap_err().is_not_found());
        }

        // Gone in the middle of a read: an error that passes.
        let whole = {
            let store = store.clone();
            tokio::spawn(async move {
                loop {
                    store.get_range(&key("big"), 0..24 << 20).await?;
                }
                #[expect(unreachable_code, reason = "says what the block gives")]
                Ok::<(), StoreError>(())
            })
        };
        tokio::time::sleep(Duration::from_millis(150)).await;
        let mut upload = store.begin().await.unwrap();
        server.down();
        let error = whole.await.unwrap().unwrap_err();
        assert!(error.is_transient(), "{error}");
        let error = store.get(&key("big")).await.unwrap_err();
        assert!(error.is_transient() && error.to_string().contains("refused"), "{error}");
        // An upload does not outlive its session.
        server.up();
        assert!(upload.finish(&key("half")).await.unwrap_err().is_transient());
        for (from, got) in read_all(16).await {
            assert!(got.unwrap() == body[from as usize..][..300_000]);
        }
        // Sessions that died while they waited cost a read nothing.
        server.down();
        server.up();
        for (_, got) in read_all(16).await {
            got.unwrap();
        }
        store.compare_and_swap(&key("refs/x"), None, Bytes::from_static(b"x")).await.unwrap();
    });
}

#[test]
fn what_a_user_may_not_write_is_said_to_be_so() {
    if !sshd() {
        return;
    }
    let server = Sshd::start(Account::ReadOnly);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("there"), b"x").unwrap();
    runtime().block_on(async {
        let store = store(&server, dir.path());
        assert_eq!(store.get(&key("there")).await.unwrap().0, &b"x"[..]);
        let denied = |error: StoreError| {
            assert!(matches!(error, StoreError::PermissionDenied { .. }), "{error}");
            assert!(!error.is_transient());
        };
        denied(store.put_new(&key("a/b"), Bytes::from_static(b"x")).await.unwrap_err());
        denied(store.delete(&key("there")).await.unwrap_err());
        denied(store.compare_and_swap(&key("refs/x"), None, Bytes::new()).await.unwrap_err());
        denied(store.begin().await.err().unwrap());
    });
}

#[test]
fn a_full_disk_is_told_from_other_failures() {
    if !sshd() {
        return;
    }
    let Some(disk) = Tmpfs::mount(8) else { return };
    let server = Sshd::start(Account::SftpOnly);
    runtime().block_on(async {
        let store = store(&server, &disk.path().join("repo"));
        store.put_new(&key("first"), Bytes::from_static(b"x")).await.unwrap();
        let filler = disk.fill(64 << 10);
        let full = |error: StoreError| assert!(matches!(error, StoreError::NoSpace { .. }), "{error}");
        full(store.put_new(&key("more"), noise(1, 1 << 20).into()).await.unwrap_err());
        let mut upload = store.begin().await.unwrap();
        upload.write(noise(2, 5 << 20).into()).await.unwrap();
        full(upload.finish(&key("most")).await.unwrap_err());
        std::fs::remove_file(filler).unwrap();
        store.put_new(&key("more"), noise(1, 1 << 20).into()).await.unwrap();
        let names = |page: horcrux::store::Page<horcrux::store::Listed>| {
            page.items.into_iter().map(|listed| listed.key.to_string()).collect::<Vec<_>>()
        };
        let listed = store.list(&horcrux::store::KeyPrefix::new("").unwrap(), None, 10).await.unwrap();
        assert_eq!(names(listed), ["first", "more"]);
    });
}

#[test]
fn a_server_that_turns_away_a_crowd_is_asked_again() {
    if !sshd() {
        return;
    }
    // Of those that are not logged in yet, sshd drops every one after the third.
    let server = Sshd::start_with(Account::SftpOnly, "MaxStartups 3:100:3\n");
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("object"), b"12345").unwrap();
    runtime().block_on(async {
        let store = store(&server, dir.path());
        let reads = (0..MAX_SESSIONS).map(|_| {
            let store = store.clone();
            tokio::spawn(async move { store.get(&key("object")).await })
        });
        for read in join_all(reads).await {
            assert_eq!(read.unwrap().unwrap().0, &b"12345"[..]);
        }
    });
}
