//! The connections of one export, and which of them are dead.
//!
//! Enters: sockets. Leaves: a fence for each, closed before anything newer than its requests is executed.
//! Invariant: once [`Peers::fence_the_dead`] returns, no request of a connection whose other end was closed before the call changes the device any more.
//! The other end's close must have reached this host: it has on Unix sockets and on loopback; across a network the kernel client sends it before it re-sends.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::sync::Notify;

use crate::device::Fence;

/// One connection, as others of its export see it.
pub struct Peer {
    /// A descriptor of its own for the socket, so that it can be asked about until the connection is forgotten.
    socket: OwnedFd,
    fence: Arc<Fence>,
    /// The server stops, and has shut the socket for reading itself.
    woken: AtomicBool,
}

/// The connections of one export.
#[derive(Default)]
pub struct Peers {
    all: Mutex<Vec<Arc<Peer>>>,
    count: AtomicUsize,
    emptied: Notify,
}

/// A connection's place among the peers; leaves it when dropped.
pub struct Membership {
    peers: Arc<Peers>,
    peer: Arc<Peer>,
}

impl Peers {
    /// Enters a connection.
    pub fn join(self: &Arc<Self>, socket: OwnedFd) -> Membership {
        let peer = Arc::new(Peer { socket, fence: Arc::new(Fence::new()), woken: AtomicBool::new(false) });
        let mut all = self.all.lock();
        all.push(peer.clone());
        self.count.store(all.len(), Ordering::Release);
        Membership { peers: self.clone(), peer }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Waits until there are none.
    pub async fn empty(&self) {
        loop {
            let mut emptied = std::pin::pin!(self.emptied.notified());
            // From here on no notification is missed, so the count may be looked at.
            emptied.as_mut().enable();
            if self.count() == 0 {
                return;
            }
            emptied.await;
        }
    }

    /// Closes every fence: what is still under way changes nothing any more. Blocks for as long as one write to the delta takes.
    pub fn fence_all(&self) {
        let all: Vec<_> = self.all.lock().clone();
        all.iter().for_each(|peer| peer.fence.close());
    }

    /// Ends every connection's wait for its client: for a stop, after everyone can see that it is one.
    pub fn wake_all(&self) {
        for peer in self.all.lock().iter() {
            peer.woken.store(true, Ordering::Release);
            // If the client has closed it already there is nothing to wake.
            let _ = rustix::net::shutdown(&peer.socket, rustix::net::Shutdown::Read);
        }
    }

    fn fence_the_dead(&self, me: &Arc<Peer>) {
        if self.count() < 2 {
            return;
        }
        let others: Vec<Arc<Peer>> =
            self.all.lock().iter().filter(|peer| !Arc::ptr_eq(peer, me)).cloned().collect();
        let mut asked: Vec<PollFd<'_>> = others
            .iter()
            .map(|peer| PollFd::from_borrowed_fd(peer.socket.as_fd(), PollFlags::RDHUP))
            .collect();
        // Zero time: it only asks. If it fails, nothing is known of anybody, and all others are taken for dead rather than trusted.
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        // A signal is no answer: it must not fence connections that live.
        let known = rustix::io::retry_on_intr(|| poll(&mut asked, Some(&at_once))).is_ok();
        let closed = PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL;
        for (peer, asked) in others.iter().zip(&asked) {
            // Of a socket we shut for reading ourselves, RDHUP says nothing.
            let gone = if peer.woken.load(Ordering::Acquire) { closed } else { closed | PollFlags::RDHUP };
            if (!known || asked.revents().intersects(gone)) && !peer.fence.is_closed() {
                peer.fence.close();
            }
        }
    }
}

impl Membership {
    /// This connection's own fence.
    pub fn fence(&self) -> &Arc<Fence> {
        &self.peer.fence
    }

    /// Closes the fences of all other connections whose other end is closed. To be called after bytes were received and before the first change they ask for.
    #[inline]
    pub fn fence_the_dead(&self) {
        self.peers.fence_the_dead(&self.peer);
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        // Requests that are still under way in tasks of their own end here.
        self.peer.fence.close();
        let mut all = self.peers.all.lock();
        all.retain(|peer| !Arc::ptr_eq(peer, &self.peer));
        self.peers.count.store(all.len(), Ordering::Release);
        if all.is_empty() {
            self.peers.emptied.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_connection_whose_other_end_is_closed_is_fenced_by_the_next_write_of_another() {
        let peers = Arc::new(Peers::default());
        let (client_a, server_a) = UnixStream::pair().unwrap();
        let (_client_b, server_b) = UnixStream::pair().unwrap();
        let a = peers.join(server_a.into());
        let b = peers.join(server_b.into());
        b.fence_the_dead();
        assert!(!a.fence().is_closed(), "it lives");
        drop(client_a);
        b.fence_the_dead();
        assert!(a.fence().is_closed());
        assert!(!b.fence().is_closed());
        drop(a);
        assert_eq!(peers.count(), 1);
    }
}
