//! Who and where we are: what a client takes from the machine it runs on.

use std::path::{Path, PathBuf};

/// The user of this process, for `~/.ssh` and the name to log in with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Local {
    /// The home directory; without one there is no `~/.ssh`.
    pub home: Option<PathBuf>,
    /// The user's name; without one the URL or ~/.ssh/config must have it.
    pub user: Option<String>,
    /// The socket of the SSH agent, if there is one.
    pub agent: Option<PathBuf>,
}

impl Local {
    /// Of this process. The one place of the SSH store that reads the environment.
    pub fn of_this_process() -> Local {
        let text = |name| std::env::var(name).ok().filter(|text| !text.is_empty());
        let home = std::env::var_os("HOME").map(PathBuf::from).filter(|home| home.is_absolute());
        let passwd = passwd_entry(&std::fs::read_to_string("/etc/passwd").unwrap_or_default());
        let (user, home_there) = passwd.map_or((None, None), |(user, home)| (Some(user), Some(home)));
        Local {
            home: home.or(home_there),
            user: user.or_else(|| text("USER")).or_else(|| text("LOGNAME")),
            agent: std::env::var_os("SSH_AUTH_SOCK").filter(|path| !path.is_empty()).map(PathBuf::from),
        }
    }

    /// A path that may start with `~/`.
    pub(super) fn expand(&self, path: &str) -> Option<PathBuf> {
        match path.strip_prefix("~/") {
            Some(below) => Some(self.home.as_ref()?.join(below)),
            None => Some(path.into()),
        }
    }

    /// A file of `~/.ssh`.
    pub(super) fn dot_ssh(&self, name: impl AsRef<Path>) -> Option<PathBuf> {
        Some(self.home.as_ref()?.join(".ssh").join(name))
    }
}

/// Name and home of this process's user.
fn passwd_entry(passwd: &str) -> Option<(String, PathBuf)> {
    let uid = rustix::process::getuid().as_raw().to_string();
    passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        (fields.len() >= 6 && fields[2] == uid).then(|| (fields[0].to_owned(), fields[5].into()))
    })
}
