//! `git-horcrux`: what git runs for `git horcrux ...`. The same commands as `horcrux-cli`'s, under git's name.
//!
//! Enters: a command line. Leaves: this process becomes `horcrux-cli`, the one beside it or else the one in PATH.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

const PROGRAM: &str = "horcrux-cli";
/// What it calls itself in its help.
const NAME: &str = "git horcrux";

fn main() -> ExitCode {
    let beside = std::env::current_exe().ok().map(|path| path.with_file_name(PROGRAM));
    let program = beside.filter(|path| path.is_file()).unwrap_or_else(|| PathBuf::from(PROGRAM));
    let error = Command::new(&program).arg0(NAME).args(std::env::args_os().skip(1)).exec();
    eprintln!("error: can't run {}: {error}\nhint: install {PROGRAM} beside git-horcrux", program.display());
    ExitCode::FAILURE
}
