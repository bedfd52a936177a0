//! `branch` and `tag`: the names of an image's versions, listed, made and deleted.
//!
//! Enters: names. Leaves: a list, or a repository with one name more or less. Every change is a compare-and-swap.

use horcrux::repo::{BranchName, ImageName, Reference, Repository, TagName, naming};
use serde::Serialize;

use crate::repository::{Access, Error, SHORT, check_image, hold, no_cache, print_json};

/// `branch`.
#[derive(clap::Args)]
pub struct BranchCommand {
    #[command(flatten)]
    access: Access,
    /// Delete this branch
    #[arg(short = 'd', long, value_name = "BRANCH", conflicts_with_all = ["branch", "reference"])]
    delete: Option<BranchName>,
    /// Delete it though no other branch or tag has its commits
    #[arg(long, requires = "delete")]
    force: bool,
    /// Print the list as JSON
    #[arg(long, conflicts_with_all = ["branch", "delete"])]
    json: bool,
    /// The image
    name: ImageName,
    /// A branch to make
    branch: Option<BranchName>,
    /// Where: a branch, a tag, the start of a commit's id, each with ~N [default: HEAD, which is main]
    reference: Option<Reference>,
}

/// `tag`.
#[derive(clap::Args)]
pub struct TagCommand {
    #[command(flatten)]
    access: Access,
    /// Delete this tag
    #[arg(short = 'd', long, value_name = "TAG", conflicts_with_all = ["tag", "reference", "protect", "unprotect"])]
    delete: Option<TagName>,
    /// Protect the tag, a new one or one that is there: it is not deleted then
    #[arg(long, requires = "tag", conflicts_with = "unprotect")]
    protect: bool,
    /// Let a protected tag be deleted again
    #[arg(long, requires = "tag", conflicts_with = "reference")]
    unprotect: bool,
    /// Print the list as JSON
    #[arg(long, conflicts_with_all = ["tag", "delete"])]
    json: bool,
    /// The image
    name: ImageName,
    /// A tag to make
    tag: Option<TagName>,
    /// Of what: a branch, a tag, the start of a commit's id, each with ~N [default: HEAD, which is main]
    reference: Option<Reference>,
}

/// A name, as `--json` prints it.
#[derive(Serialize)]
struct Named {
    name: String,
    commit: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    protected: Option<bool>,
}

impl BranchCommand {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        self.access.run(async |repo| {
            check_image(&repo, &self.name).await?;
            match (&self.delete, &self.branch) {
                (Some(branch), _) => {
                    let was = naming::delete_branch(&repo, &self.name, branch, self.force).await?;
                    say!("{}: deleted branch {branch} (was {})", self.name, &was.to_string()[..SHORT]);
                    Ok(())
                }
                (None, Some(branch)) => {
                    let commit = resolve(&repo, &self.name, self.reference.as_ref()).await?;
                    naming::create_branch(&repo, &self.name, branch, commit, hold()).await?;
                    say!("{}: branch {branch} at {}", self.name, &commit.to_string()[..SHORT]);
                    Ok(())
                }
                (None, None) => {
                    let tips = repo.branch_tips(&self.name).await?.into_iter();
                    let named = tips.map(|(name, tip)| (name.to_string(), tip.commit.to_string(), None));
                    list(named, self.json)
                }
            }
        })
    }
}

impl TagCommand {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        self.access.run(async |repo| {
            check_image(&repo, &self.name).await?;
            match (&self.delete, &self.tag) {
                (Some(tag), _) => {
                    let was = repo.delete_tag(&self.name, tag).await?;
                    say!("{}: deleted tag {tag} (was {})", self.name, &was.to_string()[..SHORT]);
                    Ok(())
                }
                (None, Some(tag)) => self.make(&repo, tag).await,
                (None, None) => {
                    let tags = repo.tag_states(&self.name).await?.into_iter();
                    let named = tags
                        .map(|(name, tag)| (name.to_string(), tag.commit.to_string(), Some(tag.protected)));
                    list(named, self.json)
                }
            }
        })
    }

    async fn make(&self, repo: &Repository, tag: &TagName) -> Result<(), Error> {
        if self.unprotect {
            repo.protect_tag(&self.name, tag, false).await?;
            say!("{}: tag {tag} may be deleted", self.name);
            return Ok(());
        }
        // Of one that is there only the protection is asked for, unless it is said what it should name.
        let there = repo.tag(&self.name, tag).await?.filter(|_| self.protect && self.reference.is_none());
        let commit = match there {
            Some(commit) => commit,
            None => {
                let commit = resolve(repo, &self.name, self.reference.as_ref()).await?;
                naming::create_tag(repo, &self.name, tag, commit, hold()).await?;
                commit
            }
        };
        if self.protect {
            repo.protect_tag(&self.name, tag, true).await?;
        }
        let protected = if self.protect { ", protected" } else { "" };
        say!("{}: tag {tag} is {}{protected}", self.name, &commit.to_string()[..SHORT]);
        Ok(())
    }
}

async fn resolve(
    repo: &Repository,
    image: &ImageName,
    reference: Option<&Reference>,
) -> Result<horcrux::format::CommitId, Error> {
    let default = Reference::default();
    Ok(repo.resolve(image, reference.unwrap_or(&default), &no_cache()).await?.commit)
}

fn list(named: impl Iterator<Item = (String, String, Option<bool>)>, json: bool) -> Result<(), Error> {
    let named: Vec<Named> =
        named.map(|(name, commit, protected)| Named { name, commit, protected }).collect();
    if json {
        return print_json(&named);
    }
    for Named { name, commit, protected } in &named {
        let protected = if *protected == Some(true) { "  protected" } else { "" };
        say!("{name}  {}{protected}", &commit[..SHORT]);
    }
    Ok(())
}
