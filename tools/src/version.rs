//! `commit`, `push`, `pull`, `checkout`, `reset`, `log`, `snapshot`, `rollback`, `clone`, and `status` of a volume.
//!
//! Enters: what the user wants, and who he is. Leaves: what the daemon answered, as lines or as JSON.

use std::time::Duration;

use clap::{Args, Subcommand};
use horcrux::control::Client;
use horcrux::control::api::{Job, JobState};
use horcrux::control::version_api::{Checkout, CloneTo, Commit, LoggedCommit, PushTo, TakeSnapshot};
use horcrux::units::ByteLen;
use horcrux::volume::VolumeName;
use tokio::runtime::Runtime;

use crate::place::Place;
use crate::volume::{Error, daemon, print_json};

/// How often a job is looked at that is waited for.
const LOOK: Duration = Duration::from_millis(20);
/// What a log shows of an id.
const SHORT: usize = 12;

/// `commit`.
#[derive(Args)]
pub struct CommitCommand {
    #[command(flatten)]
    place: Place,
    /// Why
    #[arg(short, long, value_name = "MESSAGE")]
    message: Option<String>,
    /// The volume
    volume: VolumeName,
    /// Who [default: HORCRUX_AUTHOR, else GIT_AUTHOR_NAME and GIT_AUTHOR_EMAIL, else user@host]
    #[arg(long)]
    author: Option<String>,
    /// Make it even where nothing differs
    #[arg(long)]
    allow_empty: bool,
    /// Put it in the place of the last commit, which must not be pushed
    #[arg(long)]
    amend: bool,
    /// Wait until it is made
    #[arg(long)]
    wait: bool,
    /// Print the job as JSON
    #[arg(long)]
    json: bool,
}

/// `push`.
#[derive(Args)]
pub struct PushCommand {
    #[command(flatten)]
    place: Place,
    /// The volume
    volume: VolumeName,
    /// The branch, which is made where there is none [default: the volume's own]
    branch: Option<String>,
    /// Print the job as JSON
    #[arg(long)]
    json: bool,
}

/// `pull`.
#[derive(Args)]
pub struct PullCommand {
    #[command(flatten)]
    place: Place,
    /// The volume
    volume: VolumeName,
    /// Even where changes or commits are lost by it, one that is being made among them
    #[arg(long)]
    force: bool,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
}

/// `checkout`.
#[derive(Args)]
pub struct CheckoutCommand {
    #[command(flatten)]
    place: Place,
    /// The volume
    volume: VolumeName,
    /// A branch, tag or the start of a commit's id, or HEAD, with or without ~N
    #[arg(value_name = "REF")]
    reference: String,
    /// Even where changes or commits are lost by it, one that is being made among them
    #[arg(long)]
    force: bool,
    /// Print the volume as JSON
    #[arg(long)]
    json: bool,
}

/// `reset`.
#[derive(Args)]
pub struct ResetCommand {
    #[command(flatten)]
    place: Place,
    /// The volume
    volume: VolumeName,
    /// Drop what was written, and commits that are not made yet
    #[arg(long)]
    force: bool,
}

/// `log`.
#[derive(Args)]
pub struct LogCommand {
    #[command(flatten)]
    place: Place,
    /// The volume
    volume: VolumeName,
    /// The most commits to show
    #[arg(short, value_name = "N")]
    n: Option<usize>,
    /// Print them as JSON
    #[arg(long)]
    json: bool,
}

/// `snapshot`.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct SnapshotCommand {
    #[command(flatten)]
    place: Place,
    #[command(subcommand)]
    action: Option<SnapshotAction>,
    /// The volume
    #[arg(required = true)]
    volume: Option<VolumeName>,
    /// The snapshot's name [default: s1, s2, ...]
    name: Option<VolumeName>,
}

#[derive(Subcommand)]
enum SnapshotAction {
    /// List a volume's snapshots
    Ls {
        /// The volume
        volume: VolumeName,
        /// Print them as JSON
        #[arg(long)]
        json: bool,
    },
    /// Take snapshots away
    Rm {
        /// The volume
        volume: VolumeName,
        /// The snapshots
        #[arg(required = true)]
        snapshots: Vec<String>,
    },
}

/// `rollback`.
#[derive(Args)]
pub struct RollbackCommand {
    #[command(flatten)]
    place: Place,
    /// The volume
    volume: VolumeName,
    /// The snapshot
    snapshot: String,
    /// Even where commits are lost by it
    #[arg(long)]
    force: bool,
}

/// `clone`.
#[derive(Args)]
pub struct CloneCommand {
    #[command(flatten)]
    place: Place,
    /// The volume
    volume: VolumeName,
    /// The new one
    new: VolumeName,
    /// Print the new one as JSON
    #[arg(long)]
    json: bool,
}

impl CommitCommand {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        let (client, runtime) = daemon(&self.place)?;
        let author = self.author.clone().unwrap_or_else(author);
        let wanted = Commit {
            message: self.message.clone(),
            author,
            allow_empty: self.allow_empty,
            amend: self.amend,
        };
        let job = runtime.block_on(client.commit(self.volume.as_str(), &wanted))?;
        if !self.wait {
            if self.json {
                return print_json(&job);
            }
            return Ok(say!("{}: sealed; job {} makes the commit", self.volume, job.id));
        }
        let job = ended(&client, &runtime, job)?;
        if self.json { print_json(&job) } else { Ok(say!("{}", job.result.unwrap_or_default())) }
    }
}

/// Who makes commits here, by the words git has for that too.
fn author() -> String {
    let set = |name: &str| {
        std::env::var(name).ok().map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
    };
    if let Some(author) = set("HORCRUX_AUTHOR") {
        return author;
    }
    match (set("GIT_AUTHOR_NAME"), set("GIT_AUTHOR_EMAIL")) {
        (Some(name), Some(email)) => return format!("{name} <{email}>"),
        (Some(name), None) => return name,
        (None, Some(email)) => return email,
        (None, None) => {}
    }
    let user = set("USER").or_else(|| set("LOGNAME")).unwrap_or_else(|| "root".to_owned());
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match host.trim() {
        "" => user,
        host => format!("{user}@{host}"),
    }
}

/// Waits for the end of a job; one that failed is an error.
fn ended(client: &Client, runtime: &Runtime, job: Job) -> Result<Job, Error> {
    let waited = async {
        let mut job = job;
        while job.state == JobState::Running {
            tokio::time::sleep(LOOK).await;
            job = client.job(job.id).await?;
        }
        Ok::<Job, Error>(job)
    };
    let job = runtime.block_on(waited)?;
    match job.state {
        JobState::Failed => Err(Error::Job { what: job.error.unwrap_or_default(), hint: job.hint }),
        JobState::Cancelled => Err(Error::Cancelled),
        JobState::Done | JobState::Running => Ok(job),
    }
}

impl PushCommand {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        let (client, runtime) = daemon(&self.place)?;
        let wanted = PushTo { branch: self.branch };
        let job = runtime.block_on(client.push(self.volume.as_str(), &wanted))?;
        let job = ended(&client, &runtime, job)?;
        if self.json { print_json(&job) } else { Ok(say!("{}", job.result.unwrap_or_default())) }
    }
}

impl PullCommand {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        let (client, runtime) = daemon(&self.place)?;
        let pulled = runtime.block_on(client.pull(self.volume.as_str(), self.force))?;
        if self.json {
            return print_json(&pulled);
        }
        let commit = short(&pulled.commit);
        if pulled.moved {
            say!("{} stands on {commit} now", self.volume);
        } else {
            say!("{} is up to date, on {commit}", self.volume);
        }
        Ok(())
    }
}

impl CheckoutCommand {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        let (client, runtime) = daemon(&self.place)?;
        let wanted = Checkout { reference: self.reference, force: self.force };
        let volume = runtime.block_on(client.checkout(self.volume.as_str(), &wanted))?;
        if self.json {
            print_json(&volume)
        } else {
            Ok(say!("{} stands on {}", volume.name, short(&volume.commit)))
        }
    }
}

impl ResetCommand {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        let (client, runtime) = daemon(&self.place)?;
        let volume = runtime.block_on(client.reset(self.volume.as_str(), self.force))?;
        Ok(say!("{} is what {} has", volume.name, short(&volume.commit)))
    }
}

impl LogCommand {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        let (client, runtime) = daemon(&self.place)?;
        let commits = runtime.block_on(client.log(self.volume.as_str(), self.n))?;
        if self.json {
            return print_json(&commits);
        }
        for (at, commit) in commits.iter().enumerate() {
            if at > 0 {
                say!();
            }
            log_entry(commit)?;
        }
        Ok(())
    }
}

fn log_entry(commit: &LoggedCommit) -> Result<(), Error> {
    match &commit.id {
        Some(id) if commit.pushed => say!("commit {id}"),
        Some(id) => say!("commit {id} (not pushed)"),
        None => say!("commit (being made)"),
    }
    say!("Author: {}", plain(&commit.author));
    say!("Date:   {}", date(commit.time));
    say!();
    for line in commit.message.lines() {
        say!("    {}", plain(line));
    }
    Ok(())
}

/// Without what a terminal would take for a command.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\t' { '\u{fffd}' } else { c }).collect()
}

/// A moment in UTC, as `2026-11-23 16:05:49 +0000`. Days to a date: Howard Hinnant, "chrono-compatible low-level date algorithms".
fn date(secs: u64) -> String {
    let (days, rest) = (secs / 86_400, secs % 86_400);
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02} +0000", rest / 3600, rest / 60 % 60, rest % 60)
}

impl SnapshotCommand {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        let (client, runtime) = daemon(&self.place)?;
        match self.action {
            Some(SnapshotAction::Ls { volume, json }) => {
                let snapshots = runtime.block_on(client.snapshots(volume.as_str()))?;
                if json {
                    return print_json(&snapshots);
                }
                for snapshot in &snapshots {
                    say!("{}  {}  {}", snapshot.name, date(snapshot.created), short(&snapshot.commit));
                }
            }
            Some(SnapshotAction::Rm { volume, snapshots }) => {
                for snapshot in &snapshots {
                    runtime.block_on(client.remove_snapshot(volume.as_str(), snapshot))?;
                    say!("{snapshot}");
                }
            }
            None => {
                let volume = self.volume.ok_or(Error::NoVolume)?;
                let wanted = TakeSnapshot { name: self.name.map(|name| name.to_string()) };
                let taken = runtime.block_on(client.snapshot(volume.as_str(), &wanted))?;
                say!("{}", taken.name);
            }
        }
        Ok(())
    }
}

impl RollbackCommand {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        let (client, runtime) = daemon(&self.place)?;
        let volume = runtime.block_on(client.rollback(self.volume.as_str(), &self.snapshot, self.force))?;
        Ok(say!("{} is what it was in {}", volume.name, self.snapshot))
    }
}

impl CloneCommand {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        let (client, runtime) = daemon(&self.place)?;
        let wanted = CloneTo { name: self.new.to_string() };
        let volume = runtime.block_on(client.clone_volume(self.volume.as_str(), &wanted))?;
        if self.json { print_json(&volume) } else { Ok(say!("{}", volume.name)) }
    }
}

/// `status VOLUME`.
pub fn status(client: &Client, runtime: &Runtime, volume: &VolumeName, json: bool) -> Result<(), Error> {
    let status = runtime.block_on(client.version(volume.as_str()))?;
    if json {
        return print_json(&status);
    }
    let branch = status.branch.as_ref().map_or("no branch".to_owned(), |branch| format!("branch {branch}"));
    say!("{}: {} at {}, {branch}", status.name, status.image, short(&status.commit));
    let behind = match status.behind {
        Some(0) => "nothing new there".to_owned(),
        Some(behind) => format!("{behind} behind"),
        None => "what is new there is not known".to_owned(),
    };
    say!("  {} ahead of the repository, {behind}", status.ahead);
    match (status.clean, status.changed_bytes) {
        (true, _) => say!("  nothing changed since"),
        (false, changed) => say!("  {} changed since", ByteLen(changed).human()),
    }
    if status.being_made > 0 {
        let failed = status.failed.as_ref().map(|why| format!("; it failed and is tried again: {why}"));
        say!("  {} being made{}", status.being_made, failed.unwrap_or_default());
    }
    if status.snapshots > 0 {
        say!("  {} snapshots", status.snapshots);
    }
    Ok(())
}

fn short(id: &str) -> &str {
    id.get(..SHORT).unwrap_or(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_reads_as_a_date() {
        assert_eq!(date(0), "1970-01-01 00:00:00 +0000");
        assert_eq!(date(951_782_400), "2000-02-29 00:00:00 +0000");
        assert_eq!(date(1_795_449_949), "2026-11-23 16:05:49 +0000");
    }

    #[test]
    fn a_terminal_is_told_nothing_by_a_message() {
        assert_eq!(plain("a\u{1b}[31mb\tc"), "a\u{fffd}[31mb\tc");
    }
}
