//! A JSON array that is printed item by item, so that a long one takes no memory.

use std::io::{self, Write};

use serde::Serialize;

/// An array on standard output.
#[derive(Default)]
pub struct Array {
    begun: bool,
}

impl Array {
    /// One more item, on a line of its own.
    pub fn item(&mut self, item: &impl Serialize) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(if self.begun { b",\n" } else { b"[\n" })?;
        self.begun = true;
        serde_json::to_writer(&mut out, item).map_err(io::Error::from)
    }

    /// Its end.
    pub fn end(self) -> io::Result<()> {
        io::stdout().write_all(if self.begun { b"\n]\n" } else { b"[]\n" })
    }
}
