//! `log`: the versions behind a version, newest first.
//!
//! Enters: `NAME[@REF]` of a repository. Leaves: commits on standard output, as they are read; with `--graph` when all are.

use std::collections::HashMap;

use horcrux::format::{Commit, CommitId};
use horcrux::repo::history::Entry;
use horcrux::repo::{History, ImageName, RefSpec, Repository};
use renderdag::{Ancestor, GraphRowRenderer, Renderer};
use serde::Serialize;

use crate::repository::{Access, Error, SHORT, no_cache, print_json, time_of};

/// `log`.
#[derive(clap::Args)]
pub struct Log {
    #[command(flatten)]
    access: Access,
    /// Show no more than so many
    #[arg(short = 'n', long, value_name = "N")]
    max_count: Option<usize>,
    /// A line each
    #[arg(long)]
    oneline: bool,
    /// Draw how they follow one another
    #[arg(long, conflicts_with = "json")]
    graph: bool,
    /// From all branches and tags
    #[arg(long)]
    all: bool,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    /// The image and the version to begin with: NAME or NAME@REF
    name: RefSpec,
}

/// A commit, as `--json` prints it.
#[derive(Serialize)]
struct Shown {
    commit: String,
    parents: Vec<String>,
    refs: Vec<String>,
    author: String,
    /// Seconds since 1970, UTC.
    time: f64,
    message: String,
    device_bytes: u64,
    filesystem: &'static str,
}

/// Branches and tags by the commit they name.
type Names = HashMap<CommitId, Vec<String>>;

impl Log {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        self.access.run(async |repo| self.show(&repo).await)
    }

    async fn show(&self, repo: &Repository) -> Result<(), Error> {
        let image = &self.name.image;
        let names = names(repo, image).await?;
        let start = repo.resolve(image, &self.name.reference, &no_cache()).await?.commit;
        let starts: Vec<CommitId> = match self.all {
            true => names.keys().copied().collect(),
            false => vec![start],
        };
        let mut history = History::new(repo, image, starts, no_cache());
        let most = self.max_count.unwrap_or(usize::MAX);
        if self.graph {
            return self.draw(history.in_graph_order().await?, &names, most);
        }
        let mut shown = Vec::new();
        for number in 0..most {
            let Some(entry) = history.next().await? else { break };
            match self.json {
                true => shown.push(Shown::new(&entry, &names)),
                false if self.oneline => say!("{}", oneline(&entry, &names)),
                false => {
                    if number > 0 {
                        say!();
                    }
                    say!("{}", full(&entry, &names));
                }
            }
        }
        if self.json { print_json(&shown) } else { Ok(()) }
    }

    fn draw(&self, entries: Vec<Entry>, names: &Names, most: usize) -> Result<(), Error> {
        let mut renderer = GraphRowRenderer::new().output().with_min_row_height(1).build_box_drawing();
        for entry in entries.into_iter().take(most) {
            let parents = entry.commit.parents.iter().map(|parent| Ancestor::Parent(*parent)).collect();
            let text = if self.oneline { oneline(&entry, names) } else { full(&entry, names) + "\n" };
            let row = renderer.next_row(entry.id, parents, "o".to_owned(), text);
            say!("{}", row.trim_end());
        }
        Ok(())
    }
}

/// What names what. Tags are told from branches as git does.
async fn names(repo: &Repository, image: &ImageName) -> Result<Names, Error> {
    let mut names = Names::new();
    for (name, tip) in repo.branch_tips(image).await? {
        names.entry(tip.commit).or_default().push(name.to_string());
    }
    for (name, tag) in repo.tag_states(image).await? {
        names.entry(tag.commit).or_default().push(format!("tag: {name}"));
    }
    Ok(names)
}

fn decoration(id: CommitId, names: &Names) -> String {
    names.get(&id).map_or_else(String::new, |names| format!(" ({})", names.join(", ")))
}

/// What a message may do to a terminal, it does not.
fn plain(line: &str) -> String {
    line.chars().filter(|c| !c.is_control() || *c == '\t').collect()
}

fn oneline(entry: &Entry, names: &Names) -> String {
    let subject = entry.commit.message.lines().next().unwrap_or_default();
    let id = &entry.id.to_string()[..SHORT];
    format!("{id}{} {}", decoration(entry.id, names), plain(subject)).trim_end().to_owned()
}

fn full(entry: &Entry, names: &Names) -> String {
    let Entry { id, commit } = entry;
    let Commit { parents, author, time, message, size, filesystem, .. } = commit;
    let mut text = format!("commit {id}{}\n", decoration(*id, names));
    if parents.len() > 1 {
        let parents: Vec<String> = parents.iter().map(|id| id.to_string()[..SHORT].to_owned()).collect();
        text.push_str(&format!("Merge:  {}\n", parents.join(" ")));
    }
    text.push_str(&format!("Author: {}\nDate:   {} UTC\n", plain(author), time_of(time)));
    text.push_str(&format!("Disk:   {} ({filesystem})\n", size.human()));
    for line in message.trim_end().lines() {
        text.push_str(format!("\n    {}", plain(line)).trim_end());
    }
    text.trim_end().to_owned()
}

impl Shown {
    fn new(entry: &Entry, names: &Names) -> Shown {
        let Entry { id, commit } = entry;
        Shown {
            commit: id.to_string(),
            parents: commit.parents.iter().map(ToString::to_string).collect(),
            refs: names.get(id).cloned().unwrap_or_default(),
            author: commit.author.clone(),
            time: commit.time.secs as f64 + f64::from(commit.time.nanos) / 1e9,
            message: commit.message.clone(),
            device_bytes: commit.size.0,
            filesystem: commit.filesystem.as_str(),
        }
    }
}
