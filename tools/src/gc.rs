//! `gc` and `squash`: what nobody names goes; a history with fewer versions.
//!
//! Enters: a repository. Leaves: the same with less in it, and what was done. Both are safe beside pushes, readers and each other.

use std::time::{Duration, SystemTime};

use horcrux::repo::gc::{Amount, GcOptions, GcReport, gc};
use horcrux::repo::names::{HEAD, RefKind};
use horcrux::repo::squash::{Keep, Planned, squash};
use horcrux::repo::{BranchName, ImageName, RefSpec};
use serde::Serialize;

use crate::repository::{Access, Error, SHORT, at, check_image, duration, hold, holder, print_json, time_of};

/// `gc`.
#[derive(clap::Args)]
pub struct Gc {
    #[command(flatten)]
    access: Access,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
    /// How long an object stays after a gc first found that nothing names it
    #[arg(long, value_name = "TIME", default_value = "14d", value_parser = duration)]
    grace: Duration,
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
    /// The only image to look at
    name: Option<ImageName>,
}

/// `squash`.
#[derive(clap::Args)]
pub struct Squash {
    #[command(flatten)]
    access: Access,
    /// Keep the newest N versions
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_last: usize,
    /// Keep the newest version of each of N days (UTC) that have one
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_daily: usize,
    /// Keep the newest version of each of N weeks
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_weekly: usize,
    /// Keep the newest version of each of N months
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_monthly: usize,
    /// Only say what would become of each version
    #[arg(long)]
    dry_run: bool,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    /// The image, or one branch of it: NAME or NAME@BRANCH
    name: RefSpec,
}

/// The summary of `gc`. Times are seconds since 1970.
#[derive(Serialize)]
struct Collected<'r> {
    dry_run: bool,
    images: u64,
    reachable_objects: u64,
    reachable_bytes: u64,
    condemned_objects: u64,
    condemned_bytes: u64,
    waiting_objects: u64,
    waiting_bytes: u64,
    due: Option<u64>,
    deleted_objects: u64,
    deleted_bytes: u64,
    spared_objects: u64,
    waits_for: &'r [String],
    other_gcs: u64,
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn amount(amount: &Amount) -> String {
    format!("{} objects ({})", amount.objects, amount.len().human())
}

impl Gc {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        self.access.run(async |repo| {
            if let Some(image) = &self.name
                && !repo.has_anything_of(image).await?
            {
                check_image(&repo, image).await?;
            }
            let options = GcOptions { grace: self.grace, dry_run: self.dry_run, holder: holder() };
            let report = gc(&repo, self.name.as_ref(), &options).await?;
            if self.json { self.print_json(&report) } else { self.print(&report) }
        })
    }

    fn print(&self, report: &GcReport) -> Result<(), Error> {
        say!("{} are named", amount(&report.reachable));
        let would = if self.dry_run { "would be " } else { "" };
        if report.condemned.objects > 0 {
            let days = self.grace.as_secs() as f64 / 86_400.0;
            let found = amount(&report.condemned);
            say!(
                "{found} are named by nobody; they {}go at a gc {days} days from now or later",
                if self.dry_run { "would " } else { "" }
            );
        }
        if report.waiting.objects > 0 {
            let waiting = amount(&report.waiting);
            match report.due {
                Some(due) => say!("{waiting} wait for their end, the first until {} UTC", at(seconds(due))),
                None => say!("{waiting} wait for their end"),
            }
        }
        for push in &report.pushes {
            say!("a push is under way since before they were found: {push}");
        }
        if report.others > 0 {
            say!("another gc is at work on {} lists", report.others);
        }
        if report.spared > 0 {
            say!("{} objects are named again and stay", report.spared);
        }
        say!("{} {would}deleted", amount(&report.deleted));
        Ok(())
    }

    fn print_json(&self, report: &GcReport) -> Result<(), Error> {
        print_json(&Collected {
            dry_run: self.dry_run,
            images: report.images,
            reachable_objects: report.reachable.objects,
            reachable_bytes: report.reachable.bytes,
            condemned_objects: report.condemned.objects,
            condemned_bytes: report.condemned.bytes,
            waiting_objects: report.waiting.objects,
            waiting_bytes: report.waiting.bytes,
            due: report.due.map(seconds),
            deleted_objects: report.deleted.objects,
            deleted_bytes: report.deleted.bytes,
            spared_objects: report.spared,
            waits_for: &report.pushes,
            other_gcs: report.others,
        })
    }
}

/// What became of a version, as `--json` prints it.
#[derive(Serialize)]
struct Became {
    commit: String,
    new: Option<String>,
    time: u64,
    message: String,
}

impl Squash {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        let Squash { keep_last, keep_daily, keep_weekly, keep_monthly, .. } = self;
        let keep = Keep { last: keep_last, daily: keep_daily, weekly: keep_weekly, monthly: keep_monthly };
        if keep == Keep::default() {
            return Err(Error::Usage(
                "nothing is said to be kept: give --keep-last, --keep-daily, --keep-weekly or --keep-monthly",
            ));
        }
        let reference = &self.name.reference;
        if reference.back() > 0 || reference.kind() == Some(RefKind::Tag) {
            return Err(Error::Usage("a branch is squashed, and nothing else: NAME or NAME@BRANCH"));
        }
        let branch = match reference.name() {
            HEAD => BranchName::default(),
            name => name.parse()?,
        };
        self.access.run(async |repo| {
            let image = &self.name.image;
            check_image(&repo, image).await?;
            let planned = squash(&repo, image, &branch, keep, self.dry_run, hold()).await?;
            self.print(&branch, &planned)
        })
    }

    fn print(&self, branch: &BranchName, planned: &[Planned]) -> Result<(), Error> {
        if self.json {
            let became = planned.iter().map(|Planned { old, commit, new }| Became {
                commit: old.to_string(),
                new: new.map(|new| new.to_string()),
                time: commit.time.secs,
                message: commit.message.clone(),
            });
            return print_json(&became.collect::<Vec<_>>());
        }
        for Planned { old, commit, new } in planned {
            let became = match new {
                Some(new) if new == old => "stays".to_owned(),
                Some(new) => format!("is {} now", &new.to_string()[..SHORT]),
                None => "is left out".to_owned(),
            };
            say!("{}  {}  {became}", &old.to_string()[..SHORT], time_of(&commit.time));
        }
        let left_out = planned.iter().filter(|planned| planned.new.is_none()).count();
        let would = if self.dry_run { " would be" } else { "" };
        say!(
            "{}@{branch}: {} versions, {left_out}{would} left out",
            self.name.image,
            planned.len() - left_out
        );
        if left_out > 0 && !self.dry_run {
            say!(
                "what only those had goes with 'horcrux-cli gc'; tags keep what they name, with all behind it"
            );
        }
        Ok(())
    }
}
