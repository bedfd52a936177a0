//! One direction of one connection: bytes go in, and come out later.
//!
//! Enters: bytes as they were read. Leaves: the same bytes in the same order, each as late as the way is long and the line is narrow.
//! Invariant: the delay is a delay line, so however long it is, as many bytes get through as the line is wide; only [`IN_FLIGHT_MAX`] bounds what is on the way.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// What one direction of one connection may hold: 160 ms of 100 MB/s.
pub const IN_FLIGHT_MAX: usize = 16 << 20;
/// What an idle line may catch up: without it, every late wake-up of a thread would be lost for good.
const BURST: Duration = Duration::from_millis(5);
/// How long before its turn a piece may be queued; what comes out waits for the exact moment.
const AHEAD: Duration = Duration::from_millis(1);
/// Where no rate asks for less.
const PIECE_MAX: usize = 64 << 10;

/// The narrow part of the line, which all connections share, in one direction.
#[derive(Debug)]
struct Link {
    /// Bytes per second; 0 is without limit.
    rate: AtomicU64,
    /// When all that was promised a place has left.
    free_at: Mutex<Instant>,
    moved: AtomicU64,
}

impl Link {
    fn new() -> Link {
        Link { rate: AtomicU64::new(0), free_at: Mutex::new(Instant::now()), moved: AtomicU64::new(0) }
    }

    /// A millisecond's worth: connections take turns by pieces, so small ones are fair.
    fn piece(&self) -> usize {
        match self.rate.load(Ordering::Relaxed) {
            0 => PIECE_MAX,
            rate => ((rate / 1000) as usize).clamp(512, PIECE_MAX),
        }
    }

    /// Gives the next `len` bytes their place; when the last of them has left.
    fn depart(&self, len: usize) -> Instant {
        self.moved.fetch_add(len as u64, Ordering::Relaxed);
        let now = Instant::now();
        let rate = self.rate.load(Ordering::Relaxed);
        if rate == 0 {
            return now;
        }
        let mut free_at = self.free_at.lock().unwrap();
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        *free_at = (*free_at).max(earliest) + Duration::from_secs_f64(len as f64 / rate as f64);
        (*free_at).max(now)
    }
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the client to the server.
    Up,
    /// From the server to the client.
    Down,
}

/// How long and how wide the way is, for all connections of a proxy; it may change while they run.
#[derive(Debug)]
pub struct Shape {
    rtt_us: AtomicU64,
    up: Link,
    down: Link,
}

impl Shape {
    pub fn new() -> Shape {
        Shape { rtt_us: AtomicU64::new(0), up: Link::new(), down: Link::new() }
    }

    pub fn set_rtt(&self, rtt: Duration) {
        self.rtt_us.store(rtt.as_micros() as u64, Ordering::Relaxed);
    }

    pub fn rtt(&self) -> Duration {
        Duration::from_micros(self.rtt_us.load(Ordering::Relaxed))
    }

    pub fn set_rate(&self, direction: Direction, bytes_per_s: Option<u64>) {
        // A rate of nothing would be a division by it; a black hole is said otherwise.
        self.link(direction).rate.store(bytes_per_s.map_or(0, |rate| rate.max(1)), Ordering::Relaxed);
    }

    pub fn moved(&self, direction: Direction) -> u64 {
        self.link(direction).moved.load(Ordering::Relaxed)
    }

    pub fn reset_moved(&self) {
        self.up.moved.store(0, Ordering::Relaxed);
        self.down.moved.store(0, Ordering::Relaxed);
    }

    fn link(&self, direction: Direction) -> &Link {
        match direction {
            Direction::Up => &self.up,
            Direction::Down => &self.down,
        }
    }
}

/// What comes out of a lane.
#[derive(Debug, PartialEq, Eq)]
pub enum Item {
    Bytes(Vec<u8>),
    /// No more follows: what a FIN says.
    End,
    /// The connection is to be reset.
    Reset,
}

/// The other end of the lane is gone.
#[derive(Debug)]
pub struct Gone;

impl From<Gone> for std::io::Error {
    fn from(_: Gone) -> Self {
        std::io::ErrorKind::BrokenPipe.into()
    }
}

/// One direction of one connection. One thread sends, another receives.
#[derive(Debug)]
pub struct Lane {
    shape: Arc<Shape>,
    direction: Direction,
    /// Nothing can leave earlier: the connection was not set up yet.
    open_at: Instant,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    queue: VecDeque<(Instant, Item)>,
    bytes: usize,
    /// When the last of the queue is due: a delay that shrinks must not let bytes overtake others.
    last: Instant,
    killed: bool,
    /// Nobody waits for the end of a pause any more.
    released: bool,
}

impl Lane {
    /// A lane of a connection that a client began to open now.
    pub fn new(shape: &Arc<Shape>, direction: Direction) -> Lane {
        let now = Instant::now();
        // The kernel has answered the client's SYN at once. Over a real way the client sends after one round trip,
        // and a server that speaks first does after one and a half.
        let set_up = match direction {
            Direction::Up => shape.rtt(),
            Direction::Down => shape.rtt() * 3 / 2,
        };
        let state = State { queue: VecDeque::new(), bytes: 0, last: now, killed: false, released: false };
        Lane {
            shape: shape.clone(),
            direction,
            open_at: now + set_up,
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    /// Puts bytes on the way; waits while the line is taken or too much is on it.
    pub fn send(&self, bytes: &[u8]) -> Result<(), Gone> {
        let link = self.shape.link(self.direction);
        drop(self.wait_till(self.open_at)?);
        for piece in bytes.chunks(link.piece()) {
            let departs = link.depart(piece.len());
            let mut state = self.wait_till(departs.checked_sub(AHEAD).unwrap_or(departs))?;
            while state.bytes + piece.len() > IN_FLIGHT_MAX && !state.killed {
                state = self.changed.wait(state).unwrap();
            }
            state.bytes += piece.len();
            self.put(state, departs, Item::Bytes(piece.to_vec()));
        }
        Ok(())
    }

    fn wait_till(&self, when: Instant) -> Result<MutexGuard<'_, State>, Gone> {
        let mut state = self.state.lock().unwrap();
        loop {
            let wait = when.saturating_duration_since(Instant::now());
            state = match wait {
                _ if state.killed => return Err(Gone),
                Duration::ZERO => return Ok(state),
                wait => self.changed.wait_timeout(state, wait).unwrap().0,
            };
        }
    }

    /// Ends the lane behind what is on the way.
    pub fn end(&self) {
        self.put(self.state.lock().unwrap(), Instant::now(), Item::End);
    }

    /// Resets the connection behind what is on the way.
    pub fn reset(&self) {
        self.put(self.state.lock().unwrap(), Instant::now(), Item::Reset);
    }

    fn put(&self, mut state: MutexGuard<'_, State>, departs: Instant, item: Item) {
        let due = (departs.max(self.open_at) + self.shape.rtt() / 2).max(state.last);
        state.last = due;
        state.queue.push_back((due, item));
        drop(state);
        self.changed.notify_all();
    }

    /// The next of what was sent, when it is due; `None` when the lane was killed.
    pub fn receive(&self) -> Option<Item> {
        let mut state = self.state.lock().unwrap();
        loop {
            if state.killed {
                return None;
            }
            let due = state.queue.front().map(|(due, _)| due.saturating_duration_since(Instant::now()));
            state = match due {
                None => self.changed.wait(state).unwrap(),
                Some(wait) if !wait.is_zero() => self.changed.wait_timeout(state, wait).unwrap().0,
                Some(_) => break,
            };
        }
        let (_, item) = state.queue.pop_front()?;
        if let Item::Bytes(bytes) = &item {
            state.bytes -= bytes.len();
        }
        drop(state);
        self.changed.notify_all();
        Some(item)
    }

    /// Waits without sending, for ever if no duration is given; ends early when the lane is released or killed, and
    /// says so with `false`.
    pub fn pause(&self, duration: Option<Duration>) -> bool {
        let until = duration.map(|duration| Instant::now() + duration);
        let mut state = self.state.lock().unwrap();
        while !state.killed && !state.released {
            state = match until.map(|until| until.saturating_duration_since(Instant::now())) {
                None => self.changed.wait(state).unwrap(),
                Some(wait) if wait.is_zero() => return true,
                Some(wait) => self.changed.wait_timeout(state, wait).unwrap().0,
            };
        }
        false
    }

    /// Ends pauses: the client they are meant for has gone.
    pub fn release(&self) {
        self.state.lock().unwrap().released = true;
        self.changed.notify_all();
    }

    /// Ends everything at once, whatever is on the way.
    pub fn kill(&self) {
        let mut state = self.state.lock().unwrap();
        state.killed = true;
        state.queue.clear();
        drop(state);
        self.changed.notify_all();
    }
}
