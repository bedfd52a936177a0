//! Branches, tags and logs of a repository: by the library where races and long histories are, by the command line where a user reads the answer.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod common;
mod harness;

use std::path::Path;
use std::sync::Arc;

use common::image;
use harness::{Image, cli, noise, run};
use horcrux::format::{BlockSize, ChunkSize, Commit, CommitId, Filesystem, MapRoot, Timestamp};
use horcrux::repo::{
    BranchName, History, HoldOptions, MetaCache, NoMetaCache, RepoError, Repository, TagName, naming,
};
use horcrux::store::counting::Method;
use horcrux::store::{CountingStore, MemStore};
use horcrux::units::ByteLen;
use serde_json::Value;

fn no_cache() -> Arc<dyn MetaCache> {
    Arc::new(NoMetaCache)
}

async fn commit(repo: &Repository, parents: &[CommitId], secs: u64, message: &str) -> CommitId {
    let commit = Commit {
        parents: parents.to_vec(),
        map: MapRoot::Zero,
        size: ByteLen(4096),
        block_size: BlockSize::DEFAULT,
        chunk_size: ChunkSize::DEFAULT,
        filesystem: Filesystem::None,
        author: "tests".into(),
        time: Timestamp { secs, nanos: 0 },
        message: message.into(),
    };
    repo.put_commit(&image("a"), &commit).await.unwrap()
}

async fn told(mut history: History) -> Vec<String> {
    let mut messages = Vec::new();
    while let Some(entry) = history.next().await.unwrap() {
        messages.push(entry.commit.message);
    }
    messages
}

async fn empty() -> (CountingStore, Repository) {
    let store = CountingStore::new(Arc::new(MemStore::new()));
    let repo = Repository::create(Arc::new(store.clone()), [7; 16]).await.unwrap();
    (store, repo)
}

#[tokio::test]
async fn a_history_is_told_newest_first_through_merges_and_wrong_clocks() {
    let (_, repo) = empty().await;
    let root = commit(&repo, &[], 100, "root").await;
    let left = commit(&repo, &[root], 300, "left").await;
    let right = commit(&repo, &[root], 200, "right").await;
    // Made by a clock that is years behind.
    let merge = commit(&repo, &[left, right], 50, "merge").await;
    let tip = commit(&repo, &[merge], 400, "tip").await;
    let history = || History::new(&repo, &image("a"), [tip], no_cache());
    assert_eq!(told(history()).await, ["tip", "merge", "left", "right", "root"]);
    let graph = history().in_graph_order().await.unwrap();
    let graph: Vec<String> = graph.into_iter().map(|entry| entry.commit.message).collect();
    assert_eq!(graph, ["tip", "merge", "left", "right", "root"]);
    assert!(history().has(right).await.unwrap());
    assert!(!History::new(&repo, &image("a"), [left], no_cache()).has(right).await.unwrap());
}

#[tokio::test]
async fn the_first_entries_of_a_long_history_cost_what_they_are_and_all_of_it_is_read_at_once() {
    let (store, repo) = empty().await;
    let mut tip = commit(&repo, &[], 0, "0").await;
    for number in 1..1000 {
        tip = commit(&repo, &[tip], number, &number.to_string()).await;
    }
    store.reset();
    let mut history = History::new(&repo, &image("a"), [tip], no_cache());
    for _ in 0..10 {
        history.next().await.unwrap().unwrap();
    }
    assert_eq!(store.requests(), 10);
    assert_eq!(told(history).await.len(), 990);
    let lists = store.count(Method::List).requests;
    assert!(lists <= 2 && store.count(Method::Get).requests <= 1100, "{lists}");
}

#[tokio::test]
async fn a_missing_parent_is_named_after_what_is_there() {
    let (_, repo) = empty().await;
    let lost = CommitId::of(b"nobody has it");
    let tip = commit(&repo, &[lost], 5, "tip").await;
    let mut history = History::new(&repo, &image("a"), [tip], no_cache());
    assert_eq!(history.next().await.unwrap().unwrap().id, tip);
    let error = history.next().await.unwrap_err().to_string();
    assert!(error.contains(&format!("images/a/commits/{lost} is missing")), "{error}");
}

#[tokio::test]
async fn a_deleted_name_is_free_and_its_old_tip_swaps_nothing() {
    let (_, repo) = empty().await;
    let (name, main): (_, BranchName) = (image("a"), "main".parse().unwrap());
    let one = commit(&repo, &[], 1, "one").await;
    let two = commit(&repo, &[one], 2, "two").await;
    let tip = repo.update_branch(&name, &main, None, one).await.unwrap();
    let side: BranchName = "side".parse().unwrap();
    let old = repo.update_branch(&name, &side, None, one).await.unwrap();
    repo.delete_branch(&name, &side, &old).await.unwrap();
    assert_eq!(repo.branches(&name).await.unwrap(), std::slice::from_ref(&main));
    assert_eq!(repo.branch(&name, &side).await.unwrap(), None);
    let error = repo.update_branch(&name, &side, Some(&old), two).await.unwrap_err();
    assert!(matches!(error, RepoError::NotFastForward { actual: None, .. }), "{error}");
    repo.update_branch(&name, &side, None, two).await.unwrap();
    assert_eq!(repo.branch(&name, &side).await.unwrap().unwrap().commit, two);
    // Of those who delete and those who push from one tip, one wins.
    repo.update_branch(&name, &main, Some(&tip), two).await.unwrap();
    assert!(repo.delete_branch(&name, &main, &tip).await.is_err());
    assert_eq!(repo.branch(&name, &main).await.unwrap().unwrap().commit, two);
    let tag: TagName = "v1".parse().unwrap();
    repo.create_tag(&name, &tag, one).await.unwrap();
    repo.delete_tag(&name, &tag).await.unwrap();
    repo.create_tag(&name, &tag, two).await.unwrap();
    assert_eq!(repo.tag(&name, &tag).await.unwrap(), Some(two));
}

#[tokio::test]
async fn an_image_is_there_as_long_as_it_has_a_name() {
    let (_, repo) = empty().await;
    let one = commit(&repo, &[], 1, "one").await;
    let main = BranchName::default();
    naming::create_branch(&repo, &image("a"), &main, one, HoldOptions::new("t")).await.unwrap();
    assert_eq!(repo.images().await.unwrap(), [image("a")]);
    let error = naming::delete_branch(&repo, &image("a"), &main, false).await.unwrap_err();
    assert!(matches!(error, RepoError::NotMerged { .. }), "{error}");
    naming::delete_branch(&repo, &image("a"), &main, true).await.unwrap();
    assert_eq!(repo.images().await.unwrap(), []);
}

/// What `horcrux-cli ARGS --access REPO` does.
fn on(repo: &Path, args: &[&str]) -> harness::Ran {
    run(cli().arg(args[0]).arg("--access").arg(repo).args(&args[1..]))
}

/// An image `disk` of three versions.
fn three_versions() -> Image {
    let image = Image::of(noise(1, 1 << 20));
    for seed in 2..4 {
        std::fs::write(image.raw_file(), noise(seed, 1 << 20)).unwrap();
        image.store("disk", &image.raw_file());
    }
    image
}

fn ids(repo: &Path) -> Vec<String> {
    let log: Value = serde_json::from_str(&on(repo, &["log", "disk", "--json"]).ok()).unwrap();
    log.as_array().unwrap().iter().map(|entry| entry["commit"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn the_log_of_an_image_is_told_in_every_form() {
    let image = three_versions();
    let repo = &image.repo();
    let ids = ids(repo);
    assert_eq!(ids.len(), 3);
    on(repo, &["tag", "disk", "v1", "HEAD~2"]).ok();
    let lines = on(repo, &["log", "disk", "--oneline"]).ok();
    let lines: Vec<&str> = lines.lines().collect();
    assert!(lines[0].starts_with(&format!("{} (main)", &ids[0][..12])), "{lines:?}");
    assert!(lines[2].starts_with(&format!("{} (tag: v1)", &ids[2][..12])), "{lines:?}");
    assert_eq!(on(repo, &["log", "disk@main~1", "-n", "1", "--oneline"]).ok().lines().count(), 1);
    let full = on(repo, &["log", "disk@v1"]).ok();
    assert!(full.starts_with(&format!("commit {} (tag: v1)\nAuthor: ", ids[2])), "{full}");
    assert!(full.contains("\nDate:   20") && full.contains(" UTC\n"), "{full}");
    let graph = on(repo, &["log", "disk", "--graph", "--oneline"]).ok();
    for id in &ids {
        assert!(graph.contains(&format!("o  {}", &id[..12])), "{graph}");
    }
}

#[test]
fn branches_and_tags_come_and_go_and_what_would_be_lost_is_kept() {
    let image = three_versions();
    let repo = &image.repo();
    let ids = ids(repo);
    let refused = |args: &[&str], words: &str| {
        let said = on(repo, args).refused();
        assert!(said.contains(words), "{args:?}: {said}");
    };
    on(repo, &["branch", "disk", "old", "main~1"]).ok();
    on(repo, &["tag", "disk", "v1", &ids[2][..8]]).ok();
    let list = on(repo, &["branch", "disk"]).ok();
    assert_eq!(list, format!("main  {}\nold  {}\n", &ids[0][..12], &ids[1][..12]));
    refused(&["branch", "disk", "old"], "disk has a branch 'old' already");
    refused(&["branch", "disk", "v1"], "disk has a tag 'v1' already");
    refused(&["tag", "disk", "old"], "disk has a branch 'old' already");
    refused(&["tag", "disk", "v1", "main"], "exists and names");
    refused(&["branch", "disk", "HEAD"], "it stands for the default branch");
    refused(
        &["branch", "disk", "new", "nothing"],
        "no branch, tag or commit 'nothing' in disk; it has: main, old, v1",
    );
    refused(&["branch", "disk", "new", "main~9"], "the history goes back 2 commits only");
    refused(&["branch", "nodisk"], "no image 'nodisk' in");
    refused(&["branch", "disk", "-d", "nothing"], "no branch 'nothing' in disk; it has: main, old");
    refused(&["tag", "disk", "-d", "nothing"], "no tag 'nothing' in disk; it has: v1");
    // Behind main: nothing is lost with it.
    on(repo, &["branch", "disk", "-d", "old"]).ok();
    refused(&["branch", "disk", "-d", "main"], "is not merged");
    refused(&["branch", "disk", "-d", "main"], "hint: '-d main --force'");
    on(repo, &["branch", "disk", "spare"]).ok();
    on(repo, &["branch", "disk", "-d", "main"]).ok();
    on(repo, &["branch", "disk", "main", "spare"]).ok();
    on(repo, &["branch", "disk", "-d", "main", "--force"]).ok();
    on(repo, &["branch", "disk", "main", &ids[0]]).ok();

    on(repo, &["tag", "disk", "v1", "--protect"]).ok();
    let tags: Value = serde_json::from_str(&on(repo, &["tag", "disk", "--json"]).ok()).unwrap();
    assert_eq!((tags[0]["name"].as_str(), tags[0]["protected"].as_bool()), (Some("v1"), Some(true)));
    refused(
        &["tag", "disk", "-d", "v1"],
        "tag 'v1' of disk is protected\nhint: 'tag --unprotect NAME v1' first",
    );
    on(repo, &["tag", "disk", "v1", "--unprotect"]).ok();
    on(repo, &["tag", "disk", "-d", "v1"]).ok();
    assert_eq!(on(repo, &["tag", "disk"]).ok(), "");
    on(repo, &["tag", "disk", "v2", "main", "--protect"]).ok();
    assert!(on(repo, &["tag", "disk"]).ok().ends_with("protected\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_of_two_things_is_refused_and_said_which_is_taken() {
    let (_, repo) = empty().await;
    let (name, main) = (image("a"), BranchName::default());
    let one = commit(&repo, &[], 1, "one").await;
    let two = commit(&repo, &[one], 2, "two").await;
    repo.update_branch(&name, &main, None, two).await.unwrap();
    // By hand: the commands refuse to make it so.
    repo.create_tag(&name, &"main".parse().unwrap(), one).await.unwrap();
    let error = common::open(&repo, &name, "main").await.unwrap_err().to_string();
    assert!(error.starts_with("'main' of a is two things: a branch at"), "{error}");
    assert!(error.ends_with("hint: say 'heads/main' or 'tags/main'"), "{error}");
    for (said, commit) in [("heads/main", two), ("tags/main", one), ("HEAD", two), ("heads/main~1", one)] {
        assert_eq!(common::open(&repo, &name, said).await.unwrap().id(), commit, "{said}");
    }
    let hex = two.to_string();
    assert_eq!(common::open(&repo, &name, &hex[..10]).await.unwrap().id(), two);
}

#[test]
fn git_horcrux_is_the_same_commands() {
    let image = three_versions();
    let git = Path::new(env!("CARGO_BIN_EXE_horcrux-nbd")).with_file_name("git-horcrux");
    assert!(git.exists(), "{} is not built; run: cargo build --workspace --bins", git.display());
    let log = |command: &mut std::process::Command| {
        run(command.args(["log", "disk", "--oneline", "--access"]).arg(image.repo())).ok()
    };
    let ours = log(&mut cli());
    assert_eq!(log(&mut std::process::Command::new(&git)), ours);
    let usage = run(std::process::Command::new(&git).args(["log", "--help"])).ok();
    assert!(usage.contains("Usage: git horcrux log"), "{usage}");
    if harness::need(&["git"]) {
        let path = format!("{}:{}", git.parent().unwrap().display(), std::env::var("PATH").unwrap());
        assert_eq!(log(std::process::Command::new("git").env("PATH", path).arg("horcrux")), ours);
    }
}
