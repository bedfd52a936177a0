//! `verify` and `fsck`: whether a repository has what it names, and whether that is what it was.
//!
//! Enters: a repository. Leaves: counts, and each damaged or missing object by name; exit code 1 where there is one.

use horcrux::repo::fsck::{FsckReport, fsck};
use horcrux::repo::verify::{Problem, VerifyReport, verify};
use horcrux::repo::{ImageName, RefSpec, Repository};
use horcrux::units::ByteLen;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::repository::{Access, Error, check_image, no_cache, print_json};

/// `verify`.
#[derive(clap::Args)]
pub struct Verify {
    #[command(flatten)]
    access: Access,
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
    /// NAME: an image with all its versions; NAME@REF: one version [default: every image]
    name: Option<String>,
}

/// `fsck`.
#[derive(clap::Args)]
pub struct Fsck {
    #[command(flatten)]
    access: Access,
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
    /// The only image to look at
    name: Option<ImageName>,
}

/// What is wrong with one object, as `--json` prints it.
#[derive(Serialize)]
struct Wrong {
    object: String,
    what: String,
}

/// The summary of `verify`.
#[derive(Serialize)]
struct Verified {
    commits: u64,
    map_nodes: u64,
    chunk_tables: u64,
    objects: u64,
    bytes: u64,
    problems: Vec<Wrong>,
}

/// The summary of `fsck`.
#[derive(Serialize)]
struct Checked<'r> {
    images: u64,
    refs: u64,
    deleted_refs: u64,
    commits: u64,
    map_nodes: u64,
    chunk_tables: u64,
    objects: u64,
    unnamed_objects: u64,
    unnamed_bytes: u64,
    strangers: &'r [String],
    problems: Vec<Wrong>,
}

impl Verify {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        self.access.run(async |repo| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {bytes} read, {binary_bytes_per_sec}")
            {
                bar.set_style(style);
            }
            let progress = |bytes: ByteLen| bar.inc(bytes.0);
            let mut total = VerifyReport::default();
            for (image, commits, history) in self.what(&repo, &mut total).await? {
                let report = verify(&repo, &image, commits, history, &progress).await?;
                total.commits += report.commits;
                total.nodes += report.nodes;
                total.tables += report.tables;
                total.objects += report.objects;
                total.bytes += report.bytes;
                total.problems.extend(report.problems);
            }
            bar.finish_and_clear();
            self.print(&repo, &total)
        })
    }

    /// Which commits of which images, and whether with all that is behind them. Refs that are damaged are problems.
    async fn what(
        &self,
        repo: &Repository,
        total: &mut VerifyReport,
    ) -> Result<Vec<(ImageName, Vec<horcrux::format::CommitId>, bool)>, Error> {
        if let Some(name) = self.name.as_deref().filter(|name| name.contains('@')) {
            let RefSpec { image, reference } = name.parse()?;
            let commit = repo.resolve(&image, &reference, &no_cache()).await?.commit;
            return Ok(vec![(image, vec![commit], false)]);
        }
        let images = match &self.name {
            Some(name) => {
                let image = name.parse()?;
                check_image(repo, &image).await?;
                vec![image]
            }
            None => repo.images().await?,
        };
        let mut what = Vec::new();
        for image in images {
            let (commits, problems) = horcrux::repo::verify::roots(repo, &image).await?;
            total.problems.extend(problems);
            what.push((image, commits, true));
        }
        Ok(what)
    }

    fn print(&self, repo: &Repository, report: &VerifyReport) -> Result<(), Error> {
        let VerifyReport { commits, nodes, tables, objects, bytes, problems } = report;
        if self.json {
            print_json(&Verified {
                commits: *commits,
                map_nodes: *nodes,
                chunk_tables: *tables,
                objects: *objects,
                bytes: *bytes,
                problems: wrong(problems),
            })?;
        } else {
            print_problems(problems)?;
            say!(
                "{commits} commits, {nodes} map nodes, {tables} chunk tables and {objects} objects ({}) are what they were",
                ByteLen(*bytes).human()
            );
        }
        end(repo, problems)
    }
}

impl Fsck {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        self.access.run(async |repo| {
            if let Some(image) = &self.name
                && !repo.has_anything_of(image).await?
            {
                check_image(&repo, image).await?;
            }
            let report = fsck(&repo, self.name.as_ref()).await?;
            let FsckReport { images, refs, commits, nodes, tables, objects, .. } = report;
            let (unnamed, bytes) = (report.unnamed, report.unnamed_bytes);
            if self.json {
                print_json(&Checked {
                    images,
                    refs,
                    deleted_refs: report.deleted_refs,
                    commits,
                    map_nodes: nodes,
                    chunk_tables: tables,
                    objects,
                    unnamed_objects: unnamed,
                    unnamed_bytes: bytes,
                    strangers: &report.strangers,
                    problems: wrong(&report.problems),
                })?;
            } else {
                print_problems(&report.problems)?;
                for stranger in &report.strangers {
                    say!("note: {stranger} is no part of a repository");
                }
                say!(
                    "{images} images, {refs} branches and tags, {commits} commits, {nodes} map nodes, {tables} chunk tables, {objects} objects"
                );
                if unnamed > 0 {
                    say!("{unnamed} objects ({}) that no branch or tag leads to", ByteLen(bytes).human());
                }
            }
            end(&repo, &report.problems)
        })
    }
}

fn wrong(problems: &[Problem]) -> Vec<Wrong> {
    problems
        .iter()
        .map(|problem| Wrong { object: problem.key.to_string(), what: problem.what.clone() })
        .collect()
}

fn print_problems(problems: &[Problem]) -> Result<(), Error> {
    for problem in problems {
        say!("{}", problem.what);
    }
    Ok(())
}

fn end(repo: &Repository, problems: &[Problem]) -> Result<(), Error> {
    match problems.len() {
        0 => Ok(()),
        problems => Err(Error::Damaged { problems, place: repo.describe() }),
    }
}
