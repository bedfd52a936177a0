//! Where tasks leave what they finished for the thread of a connection.
//!
//! Invariant: after [`Mailbox::post`] the bell is readable until [`Mailbox::take`] was called, so a thread that polls the bell misses nothing.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};

/// A list with a bell.
pub struct Mailbox<T> {
    posted: Mutex<Vec<T>>,
    bell: OwnedFd,
}

impl<T> Mailbox<T> {
    /// An empty one.
    pub fn new() -> io::Result<Mailbox<T>> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Mailbox { posted: Mutex::new(Vec::new()), bell })
    }

    /// Leaves something and rings. How much can be left is bounded by those who leave it.
    pub fn post(&self, item: T) {
        let mut posted = self.posted.lock();
        posted.push(item);
        if posted.len() == 1 {
            // Can't fail: the counter is at most 1.
            let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
        }
    }

    /// Takes all there is, oldest first, in the place of what `taken` held.
    pub fn take(&self, taken: &mut Vec<T>) {
        taken.clear();
        let mut posted = self.posted.lock();
        if !posted.is_empty() {
            std::mem::swap(&mut *posted, taken);
            // Under the lock: whoever posts next rings again.
            let _ = rustix::io::read(&self.bell, &mut [0; 8]);
        }
    }

    /// What to poll for reading.
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    fn rings(mailbox: &Mailbox<u32>) -> bool {
        let bell = mailbox.bell();
        let mut asked = [PollFd::from_borrowed_fd(bell, PollFlags::IN)];
        poll(&mut asked, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() > 0
    }

    #[test]
    fn the_bell_rings_from_the_first_post_until_all_is_taken() {
        let mailbox = Mailbox::new().unwrap();
        assert!(!rings(&mailbox));
        mailbox.post(1);
        mailbox.post(2);
        assert!(rings(&mailbox));
        let mut taken = Vec::new();
        mailbox.take(&mut taken);
        assert_eq!(taken, [1, 2]);
        assert!(!rings(&mailbox));
        mailbox.post(3);
        assert!(rings(&mailbox));
    }
}
