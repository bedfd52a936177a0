//! The server under test as a guard: started, waited for, and ended with its test.
//!
//! In: a repository URL and the names to export; out: NBD URIs that clients can use. Its log goes to a file,
//! which is printed when the test fails.

use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::command::{POLL, end, wait};
use super::tools::horcrux_nbd;

/// A server that does not accept by then has failed.
const START_LIMIT: Duration = Duration::from_secs(30);
/// A server that outlives SIGTERM by this has failed.
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// Where a server listens.
#[derive(Clone, Debug)]
pub enum Listen {
    /// A Unix socket. Its path must fit in 107 bytes.
    Unix(PathBuf),
    /// A port on the loopback address.
    Tcp(u16),
}

impl Listen {
    /// A loopback port that nobody uses now. Another process may take it before the server does; a test that
    /// must not fail for that uses a Unix socket.
    pub fn free_port() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("the loopback address has a free port");
        Self::Tcp(listener.local_addr().expect("a bound socket has an address").port())
    }

    fn accepts(&self) -> bool {
        match self {
            Self::Unix(path) => UnixStream::connect(path).is_ok(),
            Self::Tcp(port) => TcpStream::connect(("127.0.0.1", *port)).is_ok(),
        }
    }
}

/// How to start a server. `serve` gets the repository, the names, where to listen, and `args` as they are.
#[derive(Debug)]
pub struct Serve<'a> {
    /// The repository's URL or path.
    pub repository: &'a str,
    /// `NAME` or `NAME@REF`, one export each.
    pub names: &'a [&'a str],
    /// Where it listens.
    pub listen: Listen,
    /// `--state-dir`.
    pub state: &'a Path,
    /// More arguments, such as `--read-only`.
    pub args: &'a [&'a str],
    /// More environment.
    pub env: &'a [(&'a str, &'a str)],
}

impl Serve<'_> {
    /// The command line, for tests that start the server by other means.
    pub fn command(&self) -> Command {
        let mut command = Command::new(horcrux_nbd());
        command.args(["serve", "--access", self.repository]);
        for name in self.names {
            command.args(["--name", name]);
        }
        match &self.listen {
            Listen::Unix(path) => command.arg("--unix").arg(path),
            Listen::Tcp(port) => command.args(["--listen", &format!("127.0.0.1:{port}")]),
        };
        command.arg("--state-dir").arg(self.state).args(self.args).envs(self.env.iter().copied());
        command
    }

    /// Starts the server and waits until it accepts. Panics, with its log, when it does not.
    pub fn start(&self) -> Server {
        // Beside the state directory, not in it: what the server makes of its own directory is under test.
        let log = self.state.with_extension("server.log");
        let to = File::options().create(true).append(true).open(&log);
        let to = to.unwrap_or_else(|error| panic!("{}: {error}", log.display()));
        let child = self
            .command()
            .stdin(Stdio::null())
            .stdout(to.try_clone().expect("a duplicate descriptor"))
            .stderr(to)
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", horcrux_nbd().display()));
        let mut server = Server { child, listen: self.listen.clone(), log, ended: None };
        let deadline = Instant::now() + START_LIMIT;
        while !server.listen.accepts() {
            if let Some(status) = server.poll() {
                panic!("the server ended with {status} before it accepted");
            }
            assert!(Instant::now() < deadline, "the server did not accept within {START_LIMIT:?}");
            std::thread::sleep(POLL);
        }
        server
    }
}

/// A running server. Dropped, it is killed; dropped by a panic, its log is printed.
#[derive(Debug)]
pub struct Server {
    child: Child,
    listen: Listen,
    log: PathBuf,
    ended: Option<ExitStatus>,
}

impl Server {
    /// The NBD URI of an export, as libnbd and qemu read it.
    pub fn uri(&self, export: &str) -> String {
        match &self.listen {
            Listen::Unix(path) => format!("nbd+unix:///{export}?socket={}", path.display()),
            Listen::Tcp(port) => format!("nbd://127.0.0.1:{port}/{export}"),
        }
    }

    /// Where it listens.
    pub fn listen(&self) -> &Listen {
        &self.listen
    }

    /// Its process id, for /proc.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A line of /proc/PID/status in KiB, such as `VmHWM`; none once the process has ended.
    pub fn status_kib(&self, field: &str) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse().ok()
    }

    /// Its status, if it has ended by itself.
    pub fn poll(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().expect("a child of this process can be waited for");
        }
        self.ended
    }

    /// All it has logged so far.
    pub fn log(&self) -> String {
        std::fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Sends `signal`, if it still runs.
    pub fn signal(&mut self, signal: Signal) {
        // Reaped, its id may be another's.
        if self.poll().is_none()
            && let Some(pid) = i32::try_from(self.pid()).ok().and_then(Pid::from_raw)
        {
            let _ = kill_process(pid, signal);
        }
    }

    /// Ends it as a service manager would, and returns how it ended. Panics when it does not end in time.
    pub fn stop(mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        if self.ended.is_none() {
            self.ended = wait(&mut self.child, STOP_LIMIT);
        }
        self.ended.unwrap_or_else(|| panic!("the server still runs {STOP_LIMIT:?} after SIGTERM"))
    }

    /// Ends it as a crash would.
    pub fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        if self.poll().is_none() {
            let _ = self.child.kill();
            self.ended = self.child.wait().ok();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
        if std::thread::panicking() {
            eprintln!("server {} ({:?}), its log:\n{}", self.pid(), self.ended, end(&self.log()));
        }
    }
}
