//! A server as a process.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::{Image, PATIENCE, Ran, run, until, wait};

/// A server to be started.
pub struct Serve {
    command: Command,
    names: Vec<String>,
    endpoints: usize,
}

/// A server that serves. It is killed when dropped, and what it logged is shown if the test fails.
pub struct Server {
    child: Child,
    /// The socket it listens on, where that is a Unix one.
    pub socket: PathBuf,
    /// Where it listens on TCP.
    pub tcp: Option<SocketAddr>,
    /// What it said on standard output.
    pub said: Vec<String>,
    log: Arc<Mutex<String>>,
    /// Ends when the log does.
    logging: Option<JoinHandle<()>>,
}

impl Serve {
    /// A server of the image `disk`.
    pub fn disk(image: &Image) -> Serve {
        Serve::new(&image.repo(), &image.state()).name("disk")
    }

    /// With credentials for an object store, and nothing else the AWS tools keep.
    pub fn credentials(mut self, access: &str, secret: &str) -> Serve {
        super::weed::with_credentials(&mut self.command, access, secret);
        self
    }

    /// With another home directory, and no SSH agent.
    pub fn ssh(mut self, sshd: &super::sshd::Sshd) -> Serve {
        sshd.with_home(&mut self.command);
        self
    }

    /// A server of a repository; what it serves is to be added.
    pub fn new(repo: &Path, state: &Path) -> Serve {
        let mut command = Command::new(env!("CARGO_BIN_EXE_horcrux-nbd"));
        command.arg("serve").arg("--access").arg(repo).arg("--state-dir").arg(state);
        command.env_remove("RUST_LOG");
        Serve { command, names: Vec::new(), endpoints: 1 }
    }

    /// The daemon of a state directory: it serves what volumes there are.
    pub fn daemon(state: &Path) -> Serve {
        let mut command = Command::new(env!("CARGO_BIN_EXE_horcrux-nbd"));
        command.arg("serve").arg("--state-dir").arg(state);
        command.env_remove("RUST_LOG");
        Serve { command, names: vec!["every volume".to_owned()], endpoints: 1 }
    }

    pub fn name(mut self, name: &str) -> Serve {
        self.command.args(["--name", name]);
        self.names.push(name.to_owned());
        self
    }

    pub fn arg(mut self, arg: impl AsRef<std::ffi::OsStr>) -> Serve {
        self.command.arg(arg);
        self
    }

    /// Runs it in this directory.
    pub fn within(mut self, dir: &Path) -> Serve {
        self.command.current_dir(dir);
        self
    }

    /// Listens on a TCP port of the system's choice too.
    pub fn tcp(mut self, socket: &Path) -> Serve {
        self.command.arg("--unix").arg(socket).args(["--listen", "127.0.0.1:0"]);
        self.endpoints += 1;
        self
    }

    /// Starts it and waits until it serves.
    #[track_caller]
    pub fn start(mut self) -> Server {
        let spawned = self.command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = spawned.unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let kept = log.clone();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let logging = std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let mut kept = kept.lock().unwrap();
                kept.push_str(&line);
                kept.push('\n');
            }
        });
        let (lines, stdout) = mpsc::channel();
        let out = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || out.lines().map_while(Result::ok).try_for_each(|line| lines.send(line)));
        let mut server = Server {
            child,
            socket: PathBuf::new(),
            tcp: None,
            said: Vec::new(),
            log,
            logging: Some(logging),
        };
        server.await_announcement(&stdout, self.names.len() * self.endpoints);
        server
    }

    /// Runs it, expecting that it refuses to start; what it says on standard error.
    #[track_caller]
    pub fn refused(mut self) -> String {
        self.run().refused()
    }

    /// Runs it to its end.
    #[track_caller]
    pub fn run(&mut self) -> Ran {
        run(&mut self.command)
    }
}

impl Server {
    #[track_caller]
    fn await_announcement(&mut self, stdout: &Receiver<String>, attachments: usize) {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = 0;
        while seen < attachments {
            match stdout.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    // A daemon says last where it is told what to do.
                    let is_last =
                        ["attach:", "control:"].iter().any(|word| line.trim_start().starts_with(word));
                    seen += usize::from(is_last);
                    if let Some((_, path)) = line.split_once("?socket=") {
                        self.socket = path.into();
                    }
                    if let Some(rest) = line.trim_start().strip_prefix("nbd://") {
                        self.tcp = rest.split('/').next().unwrap().parse().ok();
                    }
                    self.said.push(line);
                }
                Err(RecvTimeoutError::Timeout) => panic!("the server does not say that it serves"),
                Err(RecvTimeoutError::Disconnected) => panic!("the server ended\n{}", self.log()),
            }
        }
    }

    /// What it logs, to be read after its end too.
    pub fn kept_log(&self) -> Arc<Mutex<String>> {
        self.log.clone()
    }

    /// What it logged so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Waits until it has logged something.
    #[track_caller]
    pub fn logs(&self, text: &str) {
        assert!(
            until(PATIENCE, || self.log().contains(text)),
            "the log does not say {text:?}:\n{}",
            self.log()
        );
    }

    /// Lines it logged that hold a text.
    pub fn lines(&self, text: &str) -> Vec<String> {
        self.log().lines().filter(|line| line.contains(text)).map(str::to_owned).collect()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// An NBD URI of an export over the Unix socket.
    pub fn uri(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.socket.display())
    }

    /// An NBD URI of an export over TCP.
    pub fn tcp_uri(&self, name: &str) -> String {
        format!("nbd://{}/{name}", self.tcp.expect("it was told to listen on TCP"))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// kill -9.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM; how it ended.
    #[track_caller]
    pub fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.ended(PATIENCE)
    }

    /// Waits for its end.
    #[track_caller]
    pub fn ended(&mut self, patience: Duration) -> ExitStatus {
        let status =
            wait(&mut self.child, patience).unwrap_or_else(|| panic!("still runs after {patience:?}"));
        if let Some(logging) = self.logging.take() {
            logging.join().unwrap();
        }
        status
    }

    /// SIGTERM, and it must end well, and not only because it lost patience with a client.
    #[track_caller]
    pub fn stop(mut self) {
        let status = self.terminate();
        assert!(status.success(), "{status}");
        assert!(!self.log().contains("did not end in time"), "a connection hangs");
    }

    /// Processor time the process has used, in hundredths of a second.
    pub fn cpu_ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }

    /// Memory the process has of its own, in KiB: the cache's mapped files don't count.
    pub fn resident_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().split(' ').next().unwrap().parse().unwrap()
    }

    /// Open descriptors of the process.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// Threads of the process.
    pub fn threads(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap().count()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("the server logged:\n{}", self.log());
        }
    }
}
