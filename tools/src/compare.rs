//! `diff` and `show`: which files changed, in a volume or between two versions.
//!
//! Enters: a version or a volume, and what to compare it with. Leaves: patches, statistics, letters and paths, ranges, JSON.

use horcrux::files::changes::Ranges;
use horcrux::files::diff::{Change, DiffOptions};
use horcrux::files::request::compare;
use horcrux::repo::{Reference, Version};
use horcrux::units::ByteRange;

use crate::changes;
use crate::files::{Error, Which, run};
use crate::sources::{Answer, Places, Target};

/// `diff`.
#[derive(clap::Args)]
pub struct DiffCommand {
    #[command(flatten)]
    which: Which,
    /// The older version [default: of a volume what it stands on, of an image the version before]
    old: Option<Reference>,
    /// The newer version [default: of a volume its own state, of an image the one named, or its tip]
    new: Option<Reference>,
    #[command(flatten)]
    how: How,
}

/// How changes are shown.
#[derive(clap::Args)]
#[group(multiple = true)]
struct How {
    /// How much of each file changed, and of all
    #[arg(long)]
    stat: bool,
    /// A letter and a path: A added, D removed, M modified, R renamed, T another kind, P mode, owner or attributes
    #[arg(long, conflicts_with = "stat")]
    name_status: bool,
    /// The changed lines of texts (the default)
    #[arg(short, long)]
    patch: bool,
    /// The ranges of the disk that differ, not the files: of versions in whole chunks, of a volume in pages of 4 KiB
    #[arg(long, conflicts_with_all = ["stat", "name_status", "patch"])]
    blocks: bool,
    /// A file that was renamed is one that went and one that came
    #[arg(long)]
    no_renames: bool,
    /// Print it as JSON (with --patch: the changed lines too)
    #[arg(long)]
    json: bool,
}

/// `show`.
#[derive(clap::Args)]
pub struct ShowCommand {
    #[command(flatten)]
    which: Which,
    /// Only the commit, not what changed
    #[arg(long)]
    no_stat: bool,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
}

impl How {
    /// What is asked, and how the answer is printed. Statistics and patches are two answers: patches may be larger than memory.
    fn passes(&self) -> Vec<(DiffOptions, changes::Form)> {
        let renames = !self.no_renames;
        let patch = self.patch || !(self.stat || self.name_status || self.json);
        let options = DiffOptions { renames, lines: self.stat || patch, patch };
        if self.json {
            return vec![(options, changes::Form::Json)];
        }
        if self.name_status {
            return vec![(DiffOptions { lines: false, patch: false, ..options }, changes::Form::NameStatus)];
        }
        let mut passes = Vec::new();
        if self.stat {
            passes.push((DiffOptions { patch: false, ..options }, changes::Form::Stat));
        }
        if patch {
            passes.push((options, changes::Form::Patch { after_stat: self.stat }));
        }
        passes
    }
}

async fn print_changes(mut answer: Answer, form: changes::Form) -> Result<(), Error> {
    let mut printer = changes::Printer::new(form);
    while let Some(change) = answer.line::<Change>().await? {
        printer.print(&change)?;
    }
    Ok(printer.end()?)
}

fn print_blocks(ranges: impl Iterator<Item = ByteRange>, json: bool) -> Result<(), Error> {
    changes::print_blocks(ranges, json).map_err(Error::Print)
}

impl DiffCommand {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        run(async {
            let (old, new, how) = (self.old, self.new, self.how);
            match self.which.target().await? {
                Target::Version(places) => {
                    let new = match new {
                        Some(new) => places.resolve(&new).await?,
                        None => places.tip().await?,
                    };
                    let old = match old {
                        Some(old) => places.resolve(&old).await?,
                        None => places.parent(&new).await?,
                    };
                    if how.blocks {
                        let ranges = places.ranges(&old, &new).await?;
                        return print_blocks(ranges.iter(), how.json);
                    }
                    for (options, form) in how.passes() {
                        print_changes(places.compare(&old, &new, options).await?, form).await?;
                    }
                    Ok(())
                }
                Target::Volume { daemon, reference } => {
                    // 'diff VOL@A B' is B and A, as of an image; 'diff VOL@A' is A and what the volume is now.
                    let (old, new) = match (reference, old, new) {
                        (Some(reference), Some(_), Some(_)) => {
                            return Err(Error::ThreeVersions { what: reference.to_string() });
                        }
                        (Some(newer), Some(old), None) => (Some(old), Some(newer)),
                        (reference, old, new) => (old.or(reference), new),
                    };
                    if how.blocks {
                        let ranges = daemon.blocks(old.as_ref(), new.as_ref()).await?;
                        return print_blocks(ranges.into_iter(), how.json);
                    }
                    for (options, form) in how.passes() {
                        let answer = daemon.compare(old.as_ref(), new.as_ref(), options).await?;
                        print_changes(answer, form).await?;
                    }
                    Ok(())
                }
            }
        })
    }
}

impl ShowCommand {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        run(async {
            let places = match self.which.target().await? {
                Target::Version(places) => places,
                Target::Volume { daemon, reference } => daemon.places(reference).await?,
            };
            let version = places.tip().await?;
            let commit = version.commit().clone();
            let mut found: Vec<Change> = Vec::new();
            let stat = !self.no_stat && !commit.parents.is_empty();
            if stat {
                let old = places.parent(&version).await?;
                let options = DiffOptions { lines: !self.json, ..DiffOptions::default() };
                let mut answer = places.compare(&old, &version, options).await?;
                while let Some(change) = answer.line::<Change>().await? {
                    found.push(change);
                }
            }
            let shown = changes::Commit::new(version.id(), &commit, places.image().as_str());
            if self.json {
                return Ok(shown.print_json(stat.then_some(found.as_slice()))?);
            }
            shown.print()?;
            if !stat {
                return Ok(());
            }
            say!();
            let mut printer = changes::Printer::new(changes::Form::Stat);
            for change in &found {
                printer.print(change)?;
            }
            Ok(printer.end()?)
        })
    }
}

impl Places {
    async fn ranges(&self, old: &Version, new: &Version) -> Result<Ranges, Error> {
        Ranges::between(old, new).await.map_err(|error| self.failed(error))
    }

    async fn compare(&self, old: &Version, new: &Version, options: DiffOptions) -> Result<Answer, Error> {
        let ranges = self.ranges(old, new).await?;
        let (old, new) = (self.filesystem(old).await?, self.filesystem(new).await?);
        Ok(self.answer(compare(old, new, ranges, options)))
    }
}
