//! One request in flight, and what its reply has told so far.
//!
//! Invariant: a request is only reported as done well when every byte (or context) it asked for came, once.

use std::collections::BTreeMap;

use crate::command::Command;
use crate::errno::Errno;
use crate::flags::CommandFlags;
use crate::wire;

#[derive(Debug)]
pub(super) struct Pending {
    pub command: Command,
    pub flags: CommandFlags,
    pub offset: u64,
    /// The effect length.
    pub length: u64,
    /// Contexts of a status request not answered yet.
    pub contexts: Vec<u32>,
    pub failed: Option<Errno>,
    chunks: u32,
    content: bool,
    covered: BTreeMap<u64, u64>,
}

impl Pending {
    pub fn new(command: Command, flags: CommandFlags, offset: u64, length: u64, contexts: Vec<u32>) -> Self {
        Pending {
            command,
            flags,
            offset,
            length,
            contexts,
            failed: None,
            chunks: 0,
            content: false,
            covered: BTreeMap::new(),
        }
    }

    /// Counts a chunk.
    pub fn chunk(&mut self) -> Result<(), &'static str> {
        self.chunks += 1;
        if self.chunks > wire::MAX_REPLY_CHUNKS { Err("too many chunks") } else { Ok(()) }
    }

    /// Takes a content chunk: inside the request, over nothing that came before, and alone under `DF`.
    pub fn cover(&mut self, offset: u64, length: u64) -> Result<(), &'static str> {
        if self.command != Command::Read {
            return Err("data for a request that reads none");
        }
        let start = offset.checked_sub(self.offset).ok_or("outside the request")?;
        let end = start.checked_add(length).filter(|&end| end <= self.length).ok_or("outside the request")?;
        if self.flags.contains(CommandFlags::DF) && self.content {
            return Err("a second content chunk under DF");
        }
        self.content = true;
        let (mut start, mut end) = (start, end);
        if let Some((&before, &before_end)) = self.covered.range(..end).next_back() {
            if before_end > start {
                return Err("overlaps an earlier chunk");
            }
            if before_end == start {
                self.covered.remove(&before);
                start = before;
            }
        }
        if let Some(after_end) = self.covered.remove(&end) {
            end = after_end;
        }
        self.covered.insert(start, end);
        Ok(())
    }

    /// Takes the status chunk of a context.
    pub fn context(&mut self, id: u32) -> Result<(), &'static str> {
        if self.command != Command::BlockStatus {
            return Err("status for a request that asks none");
        }
        let at = self.contexts.iter().position(|&c| c == id).ok_or("a context not asked, or told twice")?;
        self.contexts.swap_remove(at);
        Ok(())
    }

    /// How the request ended, now that its last chunk came.
    pub fn outcome(&self) -> Result<Result<(), Errno>, &'static str> {
        if let Some(errno) = self.failed {
            return Ok(Err(errno));
        }
        match self.command {
            Command::Read if self.length > 0 && self.covered.get(&0) != Some(&self.length) => {
                Err("success, but not all data came")
            }
            Command::BlockStatus if !self.contexts.is_empty() => Err("success, but not all contexts came"),
            _ => Ok(Ok(())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(flags: CommandFlags) -> Pending {
        Pending::new(Command::Read, flags, 1000, 100, Vec::new())
    }

    #[test]
    fn chunks_in_any_order_cover_a_read_once() {
        let mut p = read(CommandFlags::NONE);
        for (offset, length) in [(1050, 10), (1000, 50), (1090, 10), (1060, 30)] {
            assert!(p.outcome().is_err());
            p.cover(offset, length).unwrap();
        }
        assert_eq!(p.outcome(), Ok(Ok(())));
        assert!(p.cover(1099, 1).is_err());
    }

    #[test]
    fn chunks_outside_or_over_each_other_are_refused() {
        let mut p = read(CommandFlags::NONE);
        p.cover(1010, 10).unwrap();
        for (offset, length) in
            [(1010, 10), (1000, 11), (1019, 1), (1005, 50), (999, 1), (1099, 2), (u64::MAX, 1)]
        {
            assert!(p.cover(offset, length).is_err(), "{offset}+{length}");
        }
        p.cover(1000, 10).unwrap();
        p.cover(1020, 80).unwrap();
        assert_eq!(p.outcome(), Ok(Ok(())));
    }

    #[test]
    fn df_takes_one_content_chunk() {
        let mut p = read(CommandFlags::DF);
        p.cover(1000, 50).unwrap();
        assert!(p.cover(1050, 50).is_err());
    }
}
