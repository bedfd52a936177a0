//! Man pages and shell completions, from the command line a program understands.
//!
//! Enters: a program's command line. Leaves: files for packages to install. Invariant: what a page says is what the program takes.

use std::io;
use std::path::Path;

use clap_complete::Shell;

/// Writes a page for the program and each of its subcommands to `DIR/man`, and completions to `DIR/bash`, `DIR/zsh` and `DIR/fish`.
pub fn write(command: clap::Command, dir: &Path) -> io::Result<()> {
    let name = command.get_name().to_owned();
    write_pages(command.clone(), dir)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        let scripts = dir.join(shell.to_string());
        std::fs::create_dir_all(&scripts)?;
        clap_complete::generate_to(shell, &mut command.clone(), &name, &scripts)?;
    }
    Ok(())
}

/// Writes the pages alone: for a program by another name.
pub fn write_pages(command: clap::Command, dir: &Path) -> io::Result<()> {
    let pages = dir.join("man");
    std::fs::create_dir_all(&pages)?;
    clap_mangen::generate_to(command, &pages)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_program_and_its_subcommands_have_pages_and_completions() {
        let dir = tempfile::tempdir().unwrap();
        let sub = clap::Command::new("make").about("Makes it");
        write(clap::Command::new("it").about("Does it").subcommand(sub), dir.path()).unwrap();
        for (file, words) in [
            ("man/it.1", "Does it"),
            ("man/it-make.1", "Makes it"),
            ("bash/it.bash", "make"),
            ("zsh/_it", "Makes it"),
            ("fish/it.fish", "Makes it"),
        ] {
            let text = std::fs::read_to_string(dir.path().join(file)).unwrap();
            assert!(text.contains(words), "{file}: {text}");
        }
    }
}
