//! gc takes what nobody names, after its time, and nothing else: not from a push, not from a reader, not beside another gc.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod common;
mod gc_support;

use std::sync::Arc;
use std::time::Duration;

use common::*;
use futures_util::StreamExt;
use gc_support::*;
use horcrux::format::{Commit, CommitId};
use horcrux::repo::gc::{Amount, GRACE, GcOptions, GcReport, gc};
use horcrux::repo::verify::verify;
use horcrux::repo::{
    BranchName, BranchTip, Hold, HoldOptions, MetaCache, NoMetaCache, RepoError, Repository, Version,
    VersionOptions, naming,
};
use horcrux::store::counting::Method;
use horcrux::store::fault::Fault;
use horcrux::store::{FaultStore, Key, MemStore, Store};
use horcrux::units::BlockIndex;

fn options(grace: Duration) -> GcOptions {
    GcOptions { grace, dry_run: false, holder: "a test".into() }
}

async fn collect(repo: &Repository, grace: Duration) -> GcReport {
    gc(repo, None, &options(grace)).await.unwrap()
}

fn branch(name: &str) -> BranchName {
    name.parse().unwrap()
}

async fn with_garbage() -> (MemStore, Repository) {
    let (memory, repo, _) = with_lost_commit().await;
    (memory, repo)
}

/// A repository with `main` at two versions, and a branch `gone` with one more, deleted.
async fn with_lost_commit() -> (MemStore, Repository, CommitId) {
    let memory = MemStore::new();
    let repo = Repository::create(Arc::new(memory.clone()), [7; 16]).await.unwrap();
    let main = push(&repo, "main", &[1, 2, 0, 0], 1).await.unwrap();
    push(&repo, "main", &[1, 3, 0, 0], 2).await.unwrap();
    naming::create_branch(&repo, &image("a"), &branch("gone"), main, hold()).await.unwrap();
    let lost = push(&repo, "gone", &[1, 2, 4, 5], 3).await.unwrap();
    naming::delete_branch(&repo, &image("a"), &branch("gone"), true).await.unwrap();
    (memory, repo, lost)
}

async fn problems(repo: &Repository) -> Vec<String> {
    let image = image("a");
    let (roots, problems) = horcrux::repo::verify::roots(repo, &image).await.unwrap();
    assert!(problems.is_empty(), "{problems:?}");
    let report = verify(repo, &image, roots, true, &|_| {}).await.unwrap();
    report.problems.into_iter().map(|problem| problem.what).collect()
}

/// A commit on the tip of `main`, with the map of another.
async fn on(repo: &Repository, tip: &BranchTip, other: CommitId, message: &str) -> Commit {
    let meta: Arc<dyn MetaCache> = Arc::new(NoMetaCache);
    let other = repo.commit(&image("a"), other, &meta).await.unwrap();
    Commit { parents: vec![tip.commit], message: message.to_owned(), ..other }
}

fn keys(memory: &MemStore) -> Vec<String> {
    memory.dump().keys().map(ToString::to_string).collect()
}

#[tokio::test]
async fn what_nobody_names_goes_when_the_grace_is_over_and_not_before() {
    let (memory, repo) = with_garbage().await;
    let before = keys(&memory).len();
    let report = collect(&repo, GRACE).await;
    // A commit, a map node, two objects.
    assert_eq!((report.condemned.objects, report.deleted.objects), (4, 0), "{report:?}");
    assert_eq!(keys(&memory).len(), before + 1, "one list is added, the hold is gone");
    memory.pass(GRACE - Duration::from_secs(60));
    let report = collect(&repo, GRACE).await;
    assert_eq!((report.condemned.objects, report.waiting.objects, report.deleted.objects), (0, 4, 0));
    assert!(report.due.is_some());
    memory.pass(Duration::from_secs(61));
    let report = collect(&repo, GRACE).await;
    assert_eq!((report.waiting.objects, report.deleted.objects), (0, 4), "{report:?}");
    assert_eq!(keys(&memory).len(), before - 4);
    assert_eq!(problems(&repo).await, [""; 0]);
    let report = collect(&repo, GRACE).await;
    assert_eq!((report.condemned, report.deleted), (Amount::default(), Amount::default()));
}

#[tokio::test]
async fn a_dry_run_says_what_would_go_and_writes_nothing() {
    let (memory, repo) = with_garbage().await;
    let before = memory.dump();
    let dry = GcOptions { dry_run: true, ..options(Duration::ZERO) };
    assert_eq!(gc(&repo, None, &dry).await.unwrap().condemned.objects, 4);
    assert_eq!(memory.dump(), before);
}

#[tokio::test]
async fn a_push_under_way_since_before_is_waited_for_and_a_later_one_is_not() {
    let (_memory, repo) = with_garbage().await;
    let early = Hold::push(&repo, &image("a"), HoldOptions::new("early bird")).await.unwrap();
    let report = collect(&repo, Duration::ZERO).await;
    assert_eq!((report.deleted.objects, report.pushes), (0, vec!["early bird".to_owned()]));
    let late = Hold::push(&repo, &image("a"), HoldOptions::new("latecomer")).await.unwrap();
    early.release().await;
    let report = collect(&repo, Duration::ZERO).await;
    assert_eq!((report.deleted.objects, report.pushes), (4, Vec::new()));
    late.release().await;
}

#[tokio::test]
async fn a_push_that_died_is_waited_for_until_its_time_is_over() {
    let (memory, repo) = with_garbage().await;
    drop(Hold::push(&repo, &image("a"), HoldOptions::new("dead")).await.unwrap());
    assert_eq!(collect(&repo, Duration::ZERO).await.deleted.objects, 0);
    memory.pass(Duration::from_secs(6 * 3600 + 60));
    let report = collect(&repo, Duration::ZERO).await;
    assert_eq!(report.deleted.objects, 4, "{report:?}");
    assert!(!keys(&memory).iter().any(|key| key.contains("/holds/")), "the dead hold is gone");
}

#[tokio::test]
async fn a_push_takes_what_it_needs_off_the_list() {
    let (memory, repo) = with_garbage().await;
    collect(&repo, GRACE).await;
    memory.pass(2 * GRACE);
    // The very blocks that are condemned, in a map of another shape.
    push(&repo, "main", &[4, 5, 0, 0], 5).await.unwrap();
    let report = collect(&repo, GRACE).await;
    assert_eq!(report.deleted.objects, 2, "the commit and its map went: {report:?}");
    assert_eq!(problems(&repo).await, [""; 0]);
}

#[tokio::test]
async fn a_push_finds_out_what_went_with_a_list_that_is_gone_before_it_looks() {
    let (memory, repo, lost) = with_lost_commit().await;
    collect(&repo, GRACE).await;
    // Begun when the list was there, so that it does not wait for this push.
    let hold = Hold::push(&repo, &image("a"), HoldOptions::new("a test")).await.unwrap();
    let tip = repo.branch(&image("a"), &branch("main")).await.unwrap().unwrap();
    let commit = on(&repo, &tip, lost, "the map was there").await;
    assert_eq!(collect(&repo, Duration::ZERO).await.deleted.objects, 4);
    assert!(!keys(&memory).iter().any(|key| key.contains("/condemned/")));
    let id = repo.put_commit(&image("a"), &commit).await.unwrap();
    let error = hold.move_branch(&branch("main"), Some(&tip), &[id]).await.unwrap_err();
    assert!(matches!(error, RepoError::Swept { .. }), "{error}");
    hold.release().await;
    assert_eq!(repo.branch(&image("a"), &branch("main")).await.unwrap(), Some(tip));
    collect(&repo, Duration::ZERO).await;
    assert_eq!(problems(&repo).await, [""; 0]);
}

#[tokio::test]
async fn a_push_looks_for_what_another_took_off_a_list_that_had_been_swept_in_part() {
    let (memory, repo) = with_garbage().await;
    let (name, side) = (image("a"), branch("side"));
    let tip = repo.branch(&name, &branch("main")).await.unwrap().unwrap();
    naming::create_branch(&repo, &name, &side, tip.commit, hold()).await.unwrap();
    push(&repo, "side", &[0, 0, 0, 4], 11).await.unwrap();
    // Its object has a chunk of its own, and names one of the version before: only that name leads to the other object.
    let lost = push(&repo, "side", &[0, 0, 0, 5], 12).await.unwrap();
    naming::delete_branch(&repo, &name, &side, true).await.unwrap();
    let version = Version::open(&repo, &name, lost, Arc::new(NoMetaCache), VersionOptions::default());
    let table = version.await.unwrap().table(BlockIndex(3)).await.unwrap().unwrap();
    let block = table.location(&table.entries()[1]).object.to_string();
    collect(&repo, GRACE).await;
    let early = Hold::push(&repo, &name, HoldOptions::new("early")).await.unwrap();
    let first = on(&repo, &tip, lost, "first").await;
    let first = repo.put_commit(&name, &first).await.unwrap();
    // A sweep takes one object, and ends for good.
    let broken = FaultStore::new(Arc::new(memory.clone()));
    broken.always(Method::Delete, "/commits/", Fault::FailBefore);
    let cut = Repository::open(Arc::new(broken)).await.unwrap();
    assert!(gc(&cut, None, &options(Duration::ZERO)).await.is_err());
    let key = Key::new(&format!("images/a/blocks/{}/{block}", &block[..2])).unwrap();
    assert!(memory.dump().contains_key(&key));
    memory.delete(&key).await.unwrap();
    memory.pass(Duration::from_secs(601));
    // Another takes it off the list, finds out, and gives up.
    let late = Hold::push(&repo, &name, HoldOptions::new("late")).await.unwrap();
    let second = on(&repo, &tip, lost, "second").await;
    let second = repo.put_commit(&name, &second).await.unwrap();
    let error = late.move_branch(&branch("main"), Some(&tip), &[second]).await.unwrap_err();
    assert!(matches!(error, RepoError::Swept { .. }), "{error}");
    late.release().await;
    let lists = memory.dump().into_iter().filter(|(key, _)| key.as_str().contains("/condemned/"));
    let lists: Vec<String> = lists.map(|(_, body)| String::from_utf8(body.to_vec()).unwrap()).collect();
    assert!(lists.len() == 1 && !lists[0].contains(&block), "{lists:?}");
    let error = early.move_branch(&branch("main"), Some(&tip), &[first]).await.unwrap_err();
    assert!(matches!(error, RepoError::Swept { .. }), "{error}");
    early.release().await;
    assert_eq!(problems(&repo).await, [""; 0]);
}

#[tokio::test]
async fn a_hold_stays_when_nobody_knows_whether_its_ref_will_move() {
    let (memory, repo) = with_garbage().await;
    let broken = FaultStore::new(Arc::new(memory.clone()));
    broken.always(Method::CompareAndSwap, "/refs/", Fault::FailBefore);
    let away = Repository::open(Arc::new(broken)).await.unwrap();
    assert!(push(&away, "main", &[3, 3, 3, 3], 9).await.unwrap_err().is_transient());
    let report = collect(&repo, Duration::ZERO).await;
    assert_eq!((report.deleted.objects, report.pushes), (0, vec!["a test".to_owned()]));
    memory.pass(Duration::from_secs(6 * 3600 + 60));
    assert!(collect(&repo, Duration::ZERO).await.deleted.objects > 4);
    assert_eq!(problems(&repo).await, [""; 0]);
}

#[tokio::test]
async fn a_commit_that_is_named_again_is_off_the_list() {
    let (memory, repo) = with_garbage().await;
    let gone = memory.dump().into_keys().filter(|key| key.as_str().contains("/commits/"));
    let all: Vec<horcrux::format::CommitId> =
        gone.map(|key| key.segments().next_back().unwrap().parse().unwrap()).collect();
    collect(&repo, GRACE).await;
    for (at, id) in all.iter().enumerate() {
        let name = branch(&format!("again-{at}"));
        naming::create_branch(&repo, &image("a"), &name, *id, hold()).await.unwrap();
    }
    memory.pass(2 * GRACE);
    let report = collect(&repo, GRACE).await;
    assert_eq!(report.deleted.objects, 0, "{report:?}");
    assert_eq!(problems(&repo).await, [""; 0]);
}

#[tokio::test]
async fn a_reader_with_a_hold_reads_on_after_its_branch_is_gone() {
    let memory = MemStore::new();
    let repo = Repository::create(Arc::new(memory.clone()), [7; 16]).await.unwrap();
    push(&repo, "main", &[1, 0, 0, 0], 1).await.unwrap();
    let other = push(&repo, "other", &[4, 5, 0, 0], 2).await.unwrap();
    let hold = Hold::read(&repo, &image("a"), vec![other], HoldOptions::new("reader")).await.unwrap();
    naming::delete_branch(&repo, &image("a"), &branch("other"), true).await.unwrap();
    assert_eq!(collect(&repo, Duration::ZERO).await.deleted.objects, 0);
    assert_eq!(read(&repo, other).await.unwrap(), [4, 5, 0, 0]);
    hold.release().await;
    assert!(collect(&repo, Duration::ZERO).await.deleted.objects > 0);
    let error = read(&repo, other).await.unwrap_err();
    assert!(error.to_string().contains("commits/"), "{error}");
}

#[tokio::test]
async fn a_sweep_that_was_cut_short_is_taken_over_and_holds_up_who_needs_it_until_then() {
    let (memory, repo) = with_garbage().await;
    let broken = FaultStore::new(Arc::new(memory.clone()));
    broken.always(Method::Delete, "/blocks/", Fault::FailBefore);
    let cut = Repository::open(Arc::new(broken)).await.unwrap();
    assert!(gc(&cut, None, &options(Duration::ZERO)).await.unwrap_err().is_transient());
    // What is being deleted can't be relied on, as long as who deletes may still be at it.
    let error = push(&repo, "main", &[4, 0, 0, 0], 5).await.unwrap_err();
    assert!(matches!(error, RepoError::SweepUnderWay { .. }), "{error}");
    assert_eq!(collect(&repo, Duration::ZERO).await.others, 1);
    memory.pass(Duration::from_secs(601));
    push(&repo, "main", &[4, 0, 0, 0], 7).await.unwrap();
    collect(&repo, Duration::ZERO).await;
    collect(&repo, Duration::ZERO).await;
    assert_eq!(problems(&repo).await, [""; 0]);
    assert!(!keys(&memory).iter().any(|key| key.contains("/condemned/")));
}

#[tokio::test]
async fn a_hold_that_lapsed_moves_no_branch() {
    let (_memory, repo) = with_garbage().await;
    let short = HoldOptions { ttl: Duration::ZERO, ..HoldOptions::new("slow") };
    let hold = Hold::push(&repo, &image("a"), short).await.unwrap();
    let tip = repo.branch(&image("a"), &branch("main")).await.unwrap().unwrap();
    let error = hold.move_branch(&branch("main"), Some(&tip), &[tip.commit]).await.unwrap_err();
    assert!(matches!(error, RepoError::HoldLapsed { .. }), "{error}");
}

#[tokio::test]
async fn a_damaged_repository_loses_nothing_to_gc() {
    let (memory, repo) = with_garbage().await;
    let node = memory.dump().into_keys().find(|key| key.as_str().contains("/maps/")).unwrap();
    let all: Vec<_> = memory.dump().into_keys().filter(|key| key.as_str().contains("/maps/")).collect();
    let mut refused = 0;
    for node in all {
        let body = memory.dump()[&node].clone();
        memory.delete(&node).await.unwrap();
        let before: Vec<_> =
            memory.dump().into_keys().filter(|key| key.as_str().contains("/blocks/")).collect();
        if let Err(error) = gc(&repo, None, &options(Duration::ZERO)).await {
            assert!(error.to_string().contains(node.as_str()), "{error}");
            let after: Vec<_> =
                memory.dump().into_keys().filter(|key| key.as_str().contains("/blocks/")).collect();
            assert_eq!(before, after);
            refused += 1;
        }
        memory.overwrite(&node, body);
    }
    assert!(refused >= 2, "{node}");
}

#[test]
fn nothing_that_is_named_is_lost_in_any_schedule() {
    let first = seed(1);
    let schedules = if std::env::var_os("HORCRUX_SOAK").is_some() { 200 } else { 40 };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    // Most of a schedule's time is waiting: many of them run at once.
    let all = futures_util::stream::iter(first..first + schedules).map(schedule).buffer_unordered(10);
    runtime.block_on(all.collect::<()>());
}
