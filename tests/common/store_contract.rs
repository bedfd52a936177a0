//! The contract of `Store` as tests: every store runs all of it.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::future::join_all;
use horcrux::store::{Key, KeyPrefix, MAX_WHOLE_OBJECT, Store, StoreError};

fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

fn prefix(text: &str) -> KeyPrefix {
    KeyPrefix::new(text).unwrap()
}

/// Runs the contract. `open` opens the same empty place again each time it is called, as another process would.
pub async fn run<F: Future<Output = Arc<dyn Store>>>(open: impl Fn() -> F) {
    absent_objects_are_not_found(&*open().await).await;
    ranges_are_exact_or_an_error(&*open().await).await;
    a_put_object_is_never_changed_by_another_put(&*open().await).await;
    an_upload_is_visible_whole_or_not_at_all(&*open().await).await;
    a_swap_needs_the_tag_that_is_there(&*open().await).await;
    let many = join_all((0..16).map(|_| open())).await;
    one_of_sixteen_swaps_wins(&many).await;
    no_swap_is_lost(&many).await;
    racing_puts_have_one_content(&many).await;
    readers_of_a_moving_object_see_it_whole(&many).await;
    listings_keep_an_order_and_pages_join(&*open().await).await;
    a_listing_tells_when_an_object_was_written_last(&*open().await).await;
    an_object_too_long_to_read_whole_is_refused(&*open().await).await;
}

async fn absent_objects_are_not_found(store: &dyn Store) {
    assert_eq!(store.occupant().await.unwrap(), None);
    // Something must be there, so that the place itself is.
    store.put_new(&key("first"), Bytes::from_static(b"x")).await.unwrap();
    assert!(store.occupant().await.unwrap().is_some());
    for absent in ["nothing", "no/where", "first/below"] {
        assert!(store.get(&key(absent)).await.unwrap_err().is_not_found(), "{absent}");
        assert!(store.get_range(&key(absent), 0..1).await.unwrap_err().is_not_found(), "{absent}");
        store.delete(&key(absent)).await.unwrap();
    }
    store.put_new(&key("gone/soon"), Bytes::from_static(b"x")).await.unwrap();
    store.delete(&key("gone/soon")).await.unwrap();
    assert!(store.get(&key("gone/soon")).await.unwrap_err().is_not_found());
    store.delete(&key("gone/soon")).await.unwrap();
    assert!(!store.describe().is_empty());
}

#[expect(clippy::reversed_empty_ranges)]
async fn ranges_are_exact_or_an_error(store: &dyn Store) {
    let body: Vec<u8> = (0..=255).collect();
    let object = key("ranges/object");
    store.put_new(&object, body.clone().into()).await.unwrap();
    for range in [0..0, 0..1, 0..256, 255..256, 256..256, 17..203] {
        let got = store.get_range(&object, range.clone()).await.unwrap();
        assert_eq!(got, &body[range.start as usize..range.end as usize], "{range:?}");
    }
    for range in [0..257, 256..257, 255..u64::MAX, 300..400, u64::MAX - 1..u64::MAX] {
        let error = store.get_range(&object, range.clone()).await.unwrap_err();
        assert!(matches!(error, StoreError::ShortBody { .. }), "{range:?}: {error}");
    }
    let error = store.get_range(&object, 3..2).await.unwrap_err();
    assert!(matches!(error, StoreError::BadRange { .. }), "{error}");
}

async fn a_put_object_is_never_changed_by_another_put(store: &dyn Store) {
    let object = key("put/object");
    store.put_new(&object, Bytes::from_static(b"one")).await.unwrap();
    store.put_new(&object, Bytes::from_static(b"one")).await.unwrap();
    for other in [&b"two"[..], b"on", b"ones", b""] {
        let error = store.put_new(&object, Bytes::from_static(other)).await.unwrap_err();
        assert!(matches!(error, StoreError::AlreadyExists { .. }), "{error}");
    }
    assert_eq!(store.get(&object).await.unwrap().0, &b"one"[..]);
    store.put_new(&key("put/empty"), Bytes::new()).await.unwrap();
    assert_eq!(store.get(&key("put/empty")).await.unwrap().0, &b""[..]);
    assert_eq!(store.get_range(&key("put/empty"), 0..0).await.unwrap(), &b""[..]);
}

async fn an_upload_is_visible_whole_or_not_at_all(store: &dyn Store) {
    let before = store.list(&prefix("up/"), None, 100).await.unwrap();
    let object = key("up/object");
    let mut upload = store.begin().await.unwrap();
    let piece = Bytes::from(vec![7; 700_001]);
    for _ in 0..3 {
        upload.write(piece.clone()).await.unwrap();
        assert!(store.get(&object).await.is_err());
        assert_eq!(store.list(&prefix("up/"), None, 100).await.unwrap(), before);
    }
    upload.finish(&object).await.unwrap();
    assert_eq!(store.get(&object).await.unwrap().0, vec![7; 2_100_003]);

    let mut dropped = store.begin().await.unwrap();
    dropped.write(piece.clone()).await.unwrap();
    drop(dropped);

    let mut again = store.begin().await.unwrap();
    again.write(vec![7; 2_100_003].into()).await.unwrap();
    again.finish(&object).await.unwrap();

    let mut other = store.begin().await.unwrap();
    let mut body = vec![7; 2_100_003];
    body[2_000_000] = 8;
    other.write(body.into()).await.unwrap();
    let error = other.finish(&object).await.unwrap_err();
    assert!(matches!(error, StoreError::AlreadyExists { .. }), "{error}");
    assert_eq!(store.get(&object).await.unwrap().0, vec![7; 2_100_003]);

    store.begin().await.unwrap().finish(&key("up/empty")).await.unwrap();
    assert_eq!(store.get(&key("up/empty")).await.unwrap().0, &b""[..]);
    let listed = store.list(&prefix("up/"), None, 100).await.unwrap();
    assert_eq!(listed.items.len(), 2, "an abandoned upload is listed");
}

async fn a_swap_needs_the_tag_that_is_there(store: &dyn Store) {
    let object = key("swap/object");
    let swap = |expected, new: &'static [u8]| {
        let object = object.clone();
        async move { store.compare_and_swap(&object, expected, Bytes::from_static(new)).await }
    };
    let one = swap(None, b"one").await.unwrap();
    assert_eq!(store.get(&object).await.unwrap(), (Bytes::from_static(b"one"), one.clone()));
    assert!(matches!(swap(None, b"x").await.unwrap_err(), StoreError::Conflict { .. }));
    let two = swap(Some(&one), b"two").await.unwrap();
    assert_ne!(one, two);
    assert!(matches!(swap(Some(&one), b"x").await.unwrap_err(), StoreError::Conflict { .. }));
    assert_eq!(store.get(&object).await.unwrap(), (Bytes::from_static(b"two"), two.clone()));
    store.delete(&object).await.unwrap();
    assert!(matches!(swap(Some(&two), b"x").await.unwrap_err(), StoreError::Conflict { .. }));
    assert!(store.get(&object).await.unwrap_err().is_not_found());
}

async fn one_of_sixteen_swaps_wins(stores: &[Arc<dyn Store>]) {
    let object = key("race/object");
    let mut expected = None;
    for round in 0..6 {
        let swaps = stores.iter().enumerate().map(|(who, store)| {
            let (store, object, expected) = (store.clone(), object.clone(), expected.clone());
            tokio::spawn(async move {
                let body = format!("round {round} by {who}");
                let swapped = store.compare_and_swap(&object, expected.as_ref(), body.clone().into()).await;
                (swapped, body)
            })
        });
        let mut winners = Vec::new();
        for (swapped, body) in join_all(swaps).await.into_iter().map(Result::unwrap) {
            match swapped {
                Ok(etag) => winners.push((etag, body)),
                Err(StoreError::Conflict { .. }) => {}
                // No answer that says so, but it did not win either: the one winner's content is checked below.
                Err(error) if error.is_transient() => {}
                Err(error) => panic!("{error}"),
            }
        }
        let [(etag, body)] = winners.as_slice() else { panic!("{} winners", winners.len()) };
        let (there, tag) = stores[0].get(&object).await.unwrap();
        assert_eq!((there, &tag), (Bytes::from(body.clone()), etag));
        expected = Some(tag);
    }
}

async fn no_swap_is_lost(stores: &[Arc<dyn Store>]) {
    const EACH: u32 = 5;
    let object = key("race/counter");
    stores[0].compare_and_swap(&object, None, Bytes::from_static(b"0")).await.unwrap();
    let adders = stores.iter().take(8).map(|store| {
        let (store, object) = (store.clone(), object.clone());
        tokio::spawn(async move {
            for _ in 0..EACH {
                loop {
                    let (body, etag) = store.get(&object).await.unwrap();
                    let count: u32 = std::str::from_utf8(&body).unwrap().parse().unwrap();
                    let next = (count + 1).to_string();
                    match store.compare_and_swap(&object, Some(&etag), next.into()).await {
                        Ok(_) => break,
                        // A server that answers 500 to the loser of a race has changed nothing; one that had would count too far.
                        Err(error) if error.is_transient() => {}
                        Err(StoreError::Conflict { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            }
        })
    });
    join_all(adders).await.into_iter().for_each(Result::unwrap);
    assert_eq!(stores[0].get(&object).await.unwrap().0, (8 * EACH).to_string().as_bytes());
}

async fn racing_puts_have_one_content(stores: &[Arc<dyn Store>]) {
    for same in [true, false] {
        let object = key(&format!("race/put-{same}"));
        let puts = stores.iter().enumerate().map(|(who, store)| {
            let (store, object) = (store.clone(), object.clone());
            let body = if same { vec![1; 5000] } else { vec![who as u8; 5000] };
            tokio::spawn(async move { store.put_new(&object, body.into()).await })
        });
        let done: Vec<_> = join_all(puts).await.into_iter().map(Result::unwrap).collect();
        let won = done.iter().filter(|done| done.is_ok()).count();
        assert_eq!(won, if same { stores.len() } else { 1 });
        let body = stores[0].get(&object).await.unwrap().0;
        assert!(body.len() == 5000 && body.iter().all(|&byte| byte == body[0]));
    }
}

async fn readers_of_a_moving_object_see_it_whole(stores: &[Arc<dyn Store>]) {
    let object = key("race/moving");
    let mut tag = stores[0].compare_and_swap(&object, None, vec![0; 9000].into()).await.unwrap();
    let readers = stores[1..5].iter().map(|store| {
        let (store, object) = (store.clone(), object.clone());
        tokio::spawn(async move {
            for _ in 0..40 {
                let (body, _) = store.get(&object).await.unwrap();
                assert!(body.len() == 9000 && body.iter().all(|&byte| byte == body[0]));
            }
        })
    });
    let readers: Vec<_> = readers.collect();
    for turn in 1..20u8 {
        tag = stores[0].compare_and_swap(&object, Some(&tag), vec![turn; 9000].into()).await.unwrap();
    }
    join_all(readers).await.into_iter().for_each(Result::unwrap);
}

async fn listings_keep_an_order_and_pages_join(store: &dyn Store) {
    let mut names: Vec<String> =
        ["a-b/x", "a/b/c", "a/b-c", "a.b/z", "ab/c", "a/b.c", "b/1", "a/bb/1", "Z/9", "a/b/a/a/a"]
            .iter()
            .map(|name| format!("ls/{name}"))
            .collect();
    for name in &names {
        store.put_new(&key(name), Bytes::from(name.clone())).await.unwrap();
    }
    names.sort();
    for start in ["ls/", "ls/a", "ls/a/", "ls/a/b", "ls/a/b/", "ls/nothing", "ls/a/b/c"] {
        let expected: Vec<&String> = names.iter().filter(|name| name.starts_with(start)).collect();
        for limit in [1, 2, 3, 7, 1000] {
            let mut got: Vec<Key> = Vec::new();
            loop {
                let page = store.list(&prefix(start), got.last(), limit).await.unwrap();
                assert!(page.items.len() <= limit);
                for listed in &page.items {
                    assert_eq!(listed.len, listed.key.as_str().len() as u64);
                }
                got.extend(page.items.into_iter().map(|listed| listed.key));
                if !page.more {
                    break;
                }
            }
            let mut sorted: Vec<&str> = got.iter().map(Key::as_str).collect();
            sorted.sort_unstable();
            assert_eq!(sorted, expected, "from {start:?} by {limit}");
        }
    }
    let all = store.list(&prefix("ls/"), None, 1000).await.unwrap().items;
    for at in 0..all.len() {
        let after = store.list(&prefix("ls/"), Some(&all[at].key), 1000).await.unwrap();
        assert_eq!(after.items, all[at + 1..], "the order stays the same");
    }

    for limit in [1, 2, 100] {
        let mut got: Vec<String> = Vec::new();
        loop {
            let after = got.last().cloned();
            let page = store.children(&prefix("ls/"), after.as_deref(), limit).await.unwrap();
            got.extend(page.items);
            if !page.more {
                break;
            }
        }
        assert_eq!(got, ["Z", "a", "a-b", "a.b", "ab", "b"]);
    }
    assert!(store.children(&prefix("ls/none/"), None, 10).await.unwrap().items.is_empty());
}

async fn modified(store: &dyn Store, object: &Key) -> SystemTime {
    let page = store.list(&prefix("times/"), None, 10).await.unwrap();
    let listed = page.items.into_iter().find(|listed| listed.key == *object).unwrap();
    listed.modified.expect("the store's clock says when")
}

async fn a_listing_tells_when_an_object_was_written_last(store: &dyn Store) {
    let (still, moving) = (key("times/still"), key("times/moving"));
    store.put_new(&still, Bytes::from_static(b"still")).await.unwrap();
    let mut tag = store.compare_and_swap(&moving, None, Bytes::from_static(b"0")).await.unwrap();
    let (written, first) = (modified(store, &still).await, modified(store, &moving).await);
    assert!(first.duration_since(written).unwrap_or_default() < Duration::from_secs(60));
    // Swapped until its time shows it: with a store that tells seconds, when the one of the first write is over.
    for turn in 1..200 {
        let new = Bytes::from(turn.to_string());
        tag = store.compare_and_swap(&moving, Some(&tag), new).await.unwrap();
        let last = modified(store, &moving).await;
        assert!(last >= first, "{last:?} is before {first:?}");
        if last > first {
            // Reading and putting it once more do not change when it was written.
            store.get(&still).await.unwrap();
            store.put_new(&still, Bytes::from_static(b"still")).await.unwrap();
            assert_eq!(modified(store, &still).await, written);
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("an object that is swapped keeps the time it had: {first:?}");
}

async fn an_object_too_long_to_read_whole_is_refused(store: &dyn Store) {
    let mut upload = store.begin().await.unwrap();
    upload.write(vec![1; MAX_WHOLE_OBJECT as usize].into()).await.unwrap();
    upload.write(vec![2; 1].into()).await.unwrap();
    upload.finish(&key("long")).await.unwrap();
    let error = store.get(&key("long")).await.unwrap_err();
    assert!(matches!(error, StoreError::TooLong { .. }), "{error}");
    let end = MAX_WHOLE_OBJECT;
    assert_eq!(store.get_range(&key("long"), end - 1..end + 1).await.unwrap(), &[1, 2][..]);
    store.delete(&key("long")).await.unwrap();
}
