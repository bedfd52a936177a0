//! The server of the crate `nbd` as a rival for benches/compare.sh: `nbd_crate_server FILE SOCKET`.
//!
//! In: a raw file; out: one NBD export, whatever name a client asks for, a thread per connection. It is given what a
//! fair user would give it: buffers around the socket (the crate writes its headers field by field) and a file
//! in the page cache. What it can't do (parallel commands, FUA, trim) is the crate's.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use nbd::server::{Export, handshake, transmission};

/// Both halves of one socket, buffered: the crate flushes after each reply.
struct Buffered {
    reader: BufReader<UnixStream>,
    writer: BufWriter<UnixStream>,
}

impl Read for Buffered {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.reader.read(into)
    }
}

impl Write for Buffered {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.writer.write(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

/// A file whose flush reaches the disk, as an NBD client expects of FLUSH.
struct Durable(File);

impl Read for Durable {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.read(into)
    }
}

impl Write for Durable {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.0.write(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.sync_data()
    }
}

impl Seek for Durable {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.0.seek(to)
    }
}

fn serve(stream: UnixStream, path: &PathBuf) -> io::Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let size = file.metadata()?.len();
    let mut both = Buffered { reader: BufReader::new(stream.try_clone()?), writer: BufWriter::new(stream) };
    let file = handshake(&mut both, |_name| {
        Ok(Export {
            size,
            readonly: false,
            resizeable: false,
            rotational: false,
            send_trim: false,
            send_flush: true,
            data: file,
        })
    })?;
    transmission(&mut both, Durable(file))
}

fn main() -> io::Result<()> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(file), Some(socket)) = (args.next(), args.next()) else {
        eprintln!("usage: nbd_crate_server FILE SOCKET");
        std::process::exit(2);
    };
    for stream in UnixListener::bind(socket)?.incoming() {
        let (stream, file) = (stream?, file.clone());
        std::thread::spawn(move || {
            if let Err(error) = serve(stream, &file)
                // A client that hangs up without DISC is no failure of the server.
                && error.kind() != io::ErrorKind::UnexpectedEof
            {
                eprintln!("nbd_crate_server: {error}");
            }
        });
    }
    Ok(())
}
