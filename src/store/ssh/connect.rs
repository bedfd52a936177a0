//! From a place to a session: configuration, address, handshake, host key, login, SFTP.
//!
//! Enters: a place and who we are. Leaves: a [`Link`] on which every call has an end. Invariant: nothing is sent to a host, no name and no key, before it has
//! shown a host key that known_hosts has for it.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ssh2::{Channel, ErrorCode, ExtendedData, MethodType, Session};

use super::super::StoreError;
use super::auth::Login;
use super::config::{self, HostConfig};
use super::error::words;
use super::files::Handles;
use super::known_hosts::{self, Verdict};
use super::local::Local;
use super::place::SshPlace;
use super::sftp::{Pipe, Sftp, SftpError};

/// For a host to take a connection, unless ~/.ssh/config says otherwise.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A stream on which nothing moves for so long is given up.
const STALL_TIMEOUT: Duration = Duration::from_secs(20);
/// Attempts at a handshake that the server breaks off: sshd refuses some where many begin at once (`MaxStartups`).
const ATTEMPTS: u32 = 5;
/// Before the second attempt; doubled before each later one.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// What a channel may receive before we have read it: four times libssh2's own, for long lines.
const WINDOW_BYTES: u32 = 8 << 20;
const PACKET_BYTES: u32 = 32 * 1024;
/// Where known hosts are, unless ~/.ssh/config says otherwise.
const KNOWN_HOSTS: [&str; 2] = ["known_hosts", "known_hosts2"];
const GLOBAL_KNOWN_HOSTS: [&str; 2] = ["/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2"];

/// A session that is logged in and speaks SFTP.
pub(super) struct Link {
    pub sftp: Sftp<Wire>,
    pub handles: Handles,
    socket: TcpStream,
    _session: Session,
}

impl Drop for Link {
    fn drop(&mut self) {
        // First: without it libssh2 would say goodbye and wait for an answer, which a broken connection never gives.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// The channel of the SFTP subsystem.
pub(super) struct Wire(Channel);

impl Pipe for Wire {
    fn send(&mut self, bytes: &[u8]) -> Result<(), SftpError> {
        // No flush after it: libssh2's throws away what was received and not read.
        self.0.write_all(bytes).map_err(pipe_error)
    }

    fn receive(&mut self, into: &mut [u8]) -> Result<usize, SftpError> {
        self.0.read(into).map_err(pipe_error)
    }
}

fn pipe_error(error: std::io::Error) -> SftpError {
    match error.kind() {
        std::io::ErrorKind::TimedOut | std::io::ErrorKind::WouldBlock => SftpError::Timeout,
        _ => SftpError::Lost(error.to_string()),
    }
}

/// Connects and logs in.
pub(super) fn connect(store: &str, place: &SshPlace, local: &Local) -> Result<Link, StoreError> {
    let config = config::read(local, &place.host, place.user.as_deref())
        .map_err(|error| StoreError::SshConfig { store: store.into(), why: error.0 })?;
    if let Some(proxy) = config.proxy {
        let why = format!("{proxy} is set for {}, and proxies are not supported yet", place.host);
        return Err(StoreError::SshConfig { store: store.into(), why });
    }
    let user = place.user.as_ref().or(config.user.as_ref()).or(local.user.as_ref()).ok_or_else(|| {
        let why = "no user's name is known; write it into the URL, scp://user@host/dir".into();
        StoreError::SshConfig { store: store.into(), why }
    })?;
    let port = place.port.or(config.port).unwrap_or(super::DEFAULT_PORT);
    let target = Target { store, place, local, config: &config, user, port };
    let (mut attempt, mut pause) = (1, FIRST_PAUSE);
    loop {
        match target.session() {
            Err(Dropped::BySshd(error)) if attempt < ATTEMPTS => {
                tracing::debug!(%error, attempt, "the server broke off the handshake; trying again");
                std::thread::sleep(super::jittered(pause));
                pause *= 2;
                attempt += 1;
            }
            Err(Dropped::BySshd(error) | Dropped::ForGood(error)) => return Err(error),
            Ok((session, socket)) => return target.sftp(session, socket),
        }
    }
}

/// Why there is no session.
enum Dropped {
    /// The server took the connection and broke it off before it said who it is.
    BySshd(StoreError),
    ForGood(StoreError),
}

impl From<StoreError> for Dropped {
    fn from(error: StoreError) -> Dropped {
        Dropped::ForGood(error)
    }
}

struct Target<'a> {
    store: &'a str,
    place: &'a SshPlace,
    local: &'a Local,
    config: &'a HostConfig,
    user: &'a str,
    port: u16,
}

impl Target<'_> {
    fn host(&self) -> &str {
        self.config.host_name.as_deref().unwrap_or(&self.place.host)
    }

    fn address(&self) -> String {
        match self.host().contains(':') {
            true => format!("[{}]:{}", self.host(), self.port),
            false => format!("{}:{}", self.host(), self.port),
        }
    }

    fn tcp(&self) -> Result<TcpStream, StoreError> {
        let unreachable = |error: std::io::Error| StoreError::Remote {
            store: self.store.into(),
            operation: "connect to",
            key: self.address(),
            why: words(&error.to_string()),
            transient: true,
        };
        let addresses = (self.host(), self.port).to_socket_addrs().map_err(unreachable)?;
        let deadline = Instant::now() + self.config.connect_timeout.unwrap_or(CONNECT_TIMEOUT);
        let mut last = std::io::Error::other("the name has no address");
        for address in addresses {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                last = std::io::ErrorKind::TimedOut.into();
                break;
            }
            match TcpStream::connect_timeout(&address, left) {
                Ok(socket) => return socket.set_nodelay(true).map(|()| socket).map_err(unreachable),
                Err(error) => last = error,
            }
        }
        Err(unreachable(last))
    }

    fn error(&self, operation: &'static str, error: &ssh2::Error) -> StoreError {
        session_error(self.store, operation, &self.address(), error)
    }

    /// A session with a host that is the one we know.
    fn session(&self) -> Result<(Session, TcpStream), Dropped> {
        let socket = self.tcp()?;
        let fail = |error: ssh2::Error| self.error("talk to", &error);
        let ours = socket.try_clone().map_err(|error| StoreError::Remote {
            store: self.store.into(),
            operation: "connect to",
            key: self.address(),
            why: error.to_string(),
            transient: true,
        })?;
        let mut session = Session::new().map_err(fail)?;
        let patience =
            self.config.connect_timeout.map_or(STALL_TIMEOUT, |timeout| timeout.min(STALL_TIMEOUT));
        session.set_timeout(patience.as_millis() as u32);
        session.set_tcp_stream(socket);
        let name = self.config.host_key_alias.as_deref().unwrap_or(self.host());
        let known = known_hosts::lines_about(&self.known_hosts_files(), name, self.port);
        let supported = session.supported_algs(MethodType::HostKey).map_err(fail)?;
        if let Some(preference) = known_hosts::preference(&known, &supported) {
            session.method_pref(MethodType::HostKey, &preference).map_err(fail)?;
        }
        if let Err(error) = session.handshake() {
            let told = self.error("shake hands with", &error);
            // KEX_FAILURE is what a connection that breaks in the middle of it looks like.
            let broken = is_broken(&error) || error.code() == ErrorCode::Session(-5);
            return Err(if broken { Dropped::BySshd(told) } else { Dropped::ForGood(told) });
        }
        self.check_host(&session, &known)?;
        session.set_timeout(STALL_TIMEOUT.as_millis() as u32);
        Ok((session, ours))
    }

    fn known_hosts_files(&self) -> Vec<PathBuf> {
        let users = self.config.known_hosts.clone();
        let users =
            users.unwrap_or_else(|| KNOWN_HOSTS.iter().filter_map(|name| self.local.dot_ssh(name)).collect());
        let global = self.config.global_known_hosts.clone();
        let global = global.unwrap_or_else(|| GLOBAL_KNOWN_HOSTS.map(PathBuf::from).to_vec());
        users.into_iter().chain(global).collect()
    }

    fn check_host(&self, session: &Session, known: &[known_hosts::Known]) -> Result<(), StoreError> {
        let key = session.host_key().map_or(&[][..], |(key, _)| key);
        let kind = known_hosts::key_type(key).unwrap_or_else(|| "no key".into());
        let shown = format!("{kind} {}", known_hosts::fingerprint(key));
        let unknown = |but: String| {
            let port =
                if self.port == super::DEFAULT_PORT { String::new() } else { format!("-p {} ", self.port) };
            StoreError::UnknownHost {
                store: self.store.into(),
                host: self.host().into(),
                key: format!("{shown}{but}"),
                command: format!("ssh {port}{}@{}", self.user, self.host()),
            }
        };
        let changed = |place| StoreError::HostKeyChanged {
            store: self.store.into(),
            host: self.host().into(),
            key: shown.clone(),
            place,
        };
        match known_hosts::judge(known, key) {
            Verdict::Good => Ok(()),
            Verdict::Changed(place) => Err(changed(format!("another one is in {place}"))),
            Verdict::Revoked(place) => Err(changed(format!("that key is revoked in {place}"))),
            Verdict::OtherTypes(kinds) => Err(unknown(format!("; known are only {}", kinds.join(", ")))),
            Verdict::Unknown => Err(unknown(String::new())),
        }
    }

    /// Logs in and starts SFTP.
    fn sftp(&self, session: Session, socket: TcpStream) -> Result<Link, StoreError> {
        let login = Login {
            session: &session,
            store: self.store,
            user: self.user,
            config: self.config,
            local: self.local,
        };
        login.run()?;
        let fail = |error: ssh2::Error| self.error("start SFTP at", &error);
        let mut channel = session.channel_open("session", WINDOW_BYTES, PACKET_BYTES, None).map_err(fail)?;
        // Unread words of the server's standard error would fill the window.
        channel.handle_extended_data(ExtendedData::Ignore).map_err(fail)?;
        channel.subsystem("sftp").map_err(fail)?;
        let sftp = Sftp::start(Wire(channel)).map_err(|error| {
            super::error::failed(self.store, "start SFTP at", &self.address(), error).error
        })?;
        Ok(Link { sftp, handles: Handles::default(), socket, _session: session })
    }
}

/// Whether the connection is gone, rather than one request refused.
pub(super) fn is_broken(error: &ssh2::Error) -> bool {
    // SOCKET_NONE, BANNER_RECV, BANNER_SEND, SOCKET_SEND, SOCKET_DISCONNECT, SOCKET_RECV, BAD_SOCKET of libssh2.h.
    matches!(error.code(), ErrorCode::Session(-1 | -2 | -3 | -7 | -13 | -43 | -45))
}

/// The store's error for what libssh2 says of a session.
pub(super) fn session_error(
    store: &str,
    operation: &'static str,
    with: &str,
    error: &ssh2::Error,
) -> StoreError {
    // TIMEOUT and SOCKET_TIMEOUT.
    if matches!(error.code(), ErrorCode::Session(-9 | -30)) {
        return StoreError::Unavailable { store: store.into(), operation, key: with.into() };
    }
    StoreError::Remote {
        store: store.into(),
        operation,
        key: with.into(),
        why: words(error.message()),
        transient: is_broken(error),
    }
}
