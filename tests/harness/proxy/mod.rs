//! A proxy in front of a server on this machine, that makes it as far away, as slow and as faulty as a test wants.
//!
//! Enters: connections for an HTTP/1.1 server, or for any server that speaks TCP. Leaves: what the server says, later, slower, counted, or
//! spoilt on purpose. Invariant: nothing of it outlives its [`Proxy`].
//!
//! What it does not do: it has no congestion control, so a new connection is as fast as an old one, and it loses nothing.
//! A round trip is split evenly. A message is as late as its last byte, so a request of 16 KiB at 1 MB/s takes 16 ms more.
#![allow(dead_code, unused_imports, clippy::unwrap_used)]

mod connection;
mod exchange;
mod http;
mod lane;
mod rules;

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use connection::Connection;
pub use lane::Direction;
use lane::Shape;
pub use rules::{Fault, Hits, Rule};

const BACKLOG: i32 = 1024;
const TRIES: usize = 100;
const POLL: Duration = Duration::from_millis(10);

/// What the proxy takes a connection for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Requests and answers: [`Rule`]s apply.
    Http,
    /// Bytes: [`TcpFault`]s apply.
    Tcp,
}

/// Whether the server can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    Here,
    /// Connections are refused, as with no server on the port.
    Refusing,
    /// Connections open, as a kernel does for a server that hangs, and nothing is ever answered.
    Silent,
}

/// What goes wrong with connections in TCP mode, by the bytes each has moved in both directions together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcpFault {
    /// Once it has moved so many, it is reset.
    ResetAfter(u64),
    /// Once it has moved so many, no more comes until the fault is taken away.
    StallAfter(u64),
}

/// What went through a proxy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub connections: u64,
    /// In HTTP mode.
    pub requests: u64,
    /// From clients, heads of requests included.
    pub up: u64,
    /// To clients, heads of answers included.
    pub down: u64,
}

impl Counts {
    /// One line of JSON.
    pub fn json(&self) -> String {
        let Counts { connections, requests, up, down } = self;
        format!(r#"{{"connections":{connections},"requests":{requests},"up":{up},"down":{down}}}"#)
    }
}

/// A running proxy. Everything about it may be changed while it runs; it ends when dropped.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    address: SocketAddr,
    accepting: Option<JoinHandle<()>>,
}

/// What all connections of a proxy share.
#[derive(Debug)]
struct Shared {
    mode: Mode,
    server: SocketAddr,
    listener: TcpListener,
    shape: Arc<Shape>,
    connections: AtomicU64,
    requests: AtomicU64,
    rules: Mutex<rules::Rules>,
    tcp_fault: Mutex<Option<TcpFault>>,
    /// Guarded together, so that no connection slips in while the server goes away. Taken before `live`.
    reach: Mutex<Reach>,
    reach_changed: Condvar,
    live: Mutex<Vec<(Weak<Connection>, JoinHandle<()>)>>,
    /// Connections that a silent server took.
    held: Mutex<Vec<TcpStream>>,
    stopping: AtomicBool,
}

impl Shared {
    fn tcp_fault(&self) -> Option<TcpFault> {
        *self.tcp_fault.lock().unwrap()
    }
}

impl Proxy {
    /// In front of an HTTP/1.1 server, on a free port of the loopback.
    pub fn http(server: SocketAddr) -> Proxy {
        Proxy::start(Mode::Http, server, (Ipv4Addr::LOCALHOST, 0).into()).expect("a free port")
    }

    /// In front of a server that speaks whatever it likes over TCP.
    pub fn tcp(server: SocketAddr) -> Proxy {
        Proxy::start(Mode::Tcp, server, (Ipv4Addr::LOCALHOST, 0).into()).expect("a free port")
    }

    /// Listens at `listen`; port 0 is a free one. The server is looked for when a client comes.
    pub fn start(mode: Mode, server: SocketAddr, listen: SocketAddr) -> io::Result<Proxy> {
        let listener = bind(listen)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            mode,
            server,
            listener,
            shape: Arc::new(Shape::new()),
            connections: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            rules: Mutex::default(),
            tcp_fault: Mutex::new(None),
            reach: Mutex::new(Reach::Here),
            reach_changed: Condvar::new(),
            live: Mutex::default(),
            held: Mutex::default(),
            stopping: AtomicBool::new(false),
        });
        let accepting = thread::spawn({
            let shared = shared.clone();
            move || accept(&shared)
        });
        Ok(Proxy { shared, address, accepting: Some(accepting) })
    }

    /// Where clients find it.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Makes a round trip take this much more, and opening a connection with it. Half of it is on each way.
    pub fn set_rtt(&self, rtt: Duration) {
        self.shared.shape.set_rtt(rtt);
    }

    /// What all connections together may move, in each direction by itself; `None` is without limit.
    pub fn set_bandwidth(&self, bytes_per_s: Option<u64>) {
        self.set_bandwidth_of(Direction::Up, bytes_per_s);
        self.set_bandwidth_of(Direction::Down, bytes_per_s);
    }

    /// The same for one direction.
    pub fn set_bandwidth_of(&self, direction: Direction, bytes_per_s: Option<u64>) {
        self.shared.shape.set_rate(direction, bytes_per_s);
    }

    /// What went through since the start or the last reset.
    pub fn counts(&self) -> Counts {
        Counts {
            connections: self.shared.connections.load(Ordering::SeqCst),
            requests: self.shared.requests.load(Ordering::SeqCst),
            up: self.shared.shape.moved(Direction::Up),
            down: self.shared.shape.moved(Direction::Down),
        }
    }

    pub fn reset_counts(&self) {
        self.shared.connections.store(0, Ordering::SeqCst);
        self.shared.requests.store(0, Ordering::SeqCst);
        self.shared.shape.reset_moved();
    }

    /// Adds a rule behind those there are; the first that a request meets counts. HTTP mode.
    pub fn rule(&self, rule: Rule) -> Hits {
        self.shared.rules.lock().unwrap().add(rule)
    }

    pub fn clear_rules(&self) {
        self.shared.rules.lock().unwrap().clear();
    }

    /// What goes wrong from now on, on connections that are open too. TCP mode.
    pub fn set_tcp_fault(&self, fault: Option<TcpFault>) {
        *self.shared.tcp_fault.lock().unwrap() = fault;
    }

    /// Takes the server away, or brings it back. Connections that are open are reset when it goes, and those that a
    /// silent server took when it comes back.
    pub fn set_reach(&self, reach: Reach) {
        let mut now = self.shared.reach.lock().unwrap();
        let before = std::mem::replace(&mut *now, reach);
        if before == reach {
            return;
        }
        let listener = &self.shared.listener;
        if reach == Reach::Refusing {
            // The kernel refuses, and the port stays ours: it is bound, only nobody listens.
            rustix::net::shutdown(listener, rustix::net::Shutdown::Read).unwrap();
        } else if before == Reach::Refusing {
            rustix::net::listen(listener, BACKLOG).unwrap();
        }
        self.reset_connections();
        drop(now);
        self.shared.reach_changed.notify_all();
    }

    /// Resets every connection there is.
    pub fn reset_connections(&self) {
        for (connection, _) in &*self.shared.live.lock().unwrap() {
            if let Some(connection) = connection.upgrade() {
                connection.abort();
            }
        }
        self.shared.held.lock().unwrap().drain(..).for_each(|socket| connection::reset(&socket));
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        let _ = rustix::net::shutdown(&self.shared.listener, rustix::net::Shutdown::Both);
        self.shared.reach_changed.notify_all();
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
        self.reset_connections();
        let live = std::mem::take(&mut *self.shared.live.lock().unwrap());
        live.into_iter().for_each(|(_, thread)| drop(thread.join()));
    }
}

/// A listener whose port stays bound when it stops to listen: the kernel gives a port back that it chose itself.
fn bind(listen: SocketAddr) -> io::Result<TcpListener> {
    if listen.port() != 0 {
        return TcpListener::bind(listen);
    }
    let mut tries = 0;
    loop {
        let chosen = TcpListener::bind(listen)?.local_addr()?;
        match TcpListener::bind(chosen) {
            // Somebody else took it in between.
            Err(_) if tries < TRIES => tries += 1,
            bound => return bound,
        }
    }
}

fn accept(shared: &Arc<Shared>) {
    while !shared.stopping.load(Ordering::SeqCst) {
        let accepted = shared.listener.accept();
        let mut reach = shared.reach.lock().unwrap();
        if shared.stopping.load(Ordering::SeqCst) {
            return;
        }
        match (accepted, *reach) {
            (Ok((socket, _)), Reach::Here) => open(shared, socket),
            (Ok((socket, _)), Reach::Silent) => shared.held.lock().unwrap().push(socket),
            (Ok((socket, _)), Reach::Refusing) => connection::reset(&socket),
            // Also when the machine is out of descriptors: then it goes on when some are free again.
            (Err(_), _) => {
                reach = shared.reach_changed.wait_timeout(reach, POLL).unwrap().0;
            }
        }
        drop(reach);
    }
}

fn open(shared: &Arc<Shared>, socket: TcpStream) {
    shared.connections.fetch_add(1, Ordering::SeqCst);
    let connection = Arc::new(Connection::new(socket, shared.clone()));
    let weak = Arc::downgrade(&connection);
    let thread = thread::spawn(move || connection.run());
    let mut live = shared.live.lock().unwrap();
    live.retain(|(_, thread)| !thread.is_finished());
    live.push((weak, thread));
}
