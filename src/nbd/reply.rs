//! What came of a request, and how it is said on the wire: the one place that maps errors to the protocol's.

use nbd_proto::server::Replies;
use nbd_proto::{Command, CommandFlags, Errno, Extent, Request};

use crate::delta::DeltaError;
use crate::device::{DeviceError, Piece};
use crate::units::ByteLen;

use super::output::Output;

/// What came of a request.
#[derive(Debug)]
pub enum Outcome {
    /// It is done.
    Done,
    /// The bytes of a read.
    Read(Vec<Piece>),
    /// The extents of each context, by its id.
    Status(Vec<(u32, Vec<Extent>)>),
    /// It failed.
    Failed(Errno, String),
    /// It is a read that failed because of what is at this offset.
    FailedAt(Errno, String, u64),
    /// Its connection was declared dead: nobody waits for a reply.
    Dropped,
}

impl Outcome {
    /// What a request's failure is told as.
    pub fn failed(request: &Request, error: &DeviceError) -> Outcome {
        let errno = match error {
            DeviceError::OutOfRange { .. } => Errno::Inval,
            DeviceError::ReadOnly => Errno::Perm,
            DeviceError::Fenced => return Outcome::Dropped,
            DeviceError::Delta(DeltaError::Full { .. } | DeltaError::Quota(_)) => Errno::NoSpc,
            DeviceError::Stopped => Errno::Shutdown,
            DeviceError::Delta(_) | DeviceError::Base(_) => Errno::Io,
        };
        match error {
            DeviceError::Base(base) if request.command == Command::Read && request.length > 0 => {
                // What can't be read starts before the range as a rule.
                let at = base.at().0.clamp(request.offset, request.offset + request.length - 1);
                Outcome::FailedAt(errno, error.to_string(), at)
            }
            _ => Outcome::Failed(errno, error.to_string()),
        }
    }
}

/// Puts the reply to `request` into the output.
#[inline]
pub fn put(output: &mut Output, replies: Replies, request: &Request, outcome: Outcome) {
    match outcome {
        Outcome::Done => output.append(|out| replies.success(out, request.reply_to())),
        Outcome::Read(pieces) => put_read(output, replies, request, pieces),
        Outcome::Status(contexts) => put_status(output, replies, request, contexts),
        Outcome::Failed(errno, message) => {
            output.append(|out| replies.error(out, request.reply_to(), errno, &message));
        }
        Outcome::FailedAt(errno, message, at) => output.append(|out| match replies.chunks() {
            Some(chunks) => chunks.error_offset(out, request.reply_to(), errno, at, &message, true),
            None => replies.error(out, request.reply_to(), errno, &message),
        }),
        Outcome::Dropped => {}
    }
}

#[inline]
fn put_read(output: &mut Output, replies: Replies, request: &Request, pieces: Vec<Piece>) {
    let to = request.reply_to();
    let whole = request.flags.contains(CommandFlags::DF);
    let (Some(chunks), false) = (replies.chunks(), whole) else {
        // A read is at most MAX_PAYLOAD bytes, so its length fits.
        output.append(|out| replies.data(out, to, request.offset, request.length as u32, true));
        pieces.into_iter().for_each(|piece| output.push(piece));
        return;
    };
    // Neighbouring pieces with bytes share a chunk; zeros between them are a hole.
    let mut at = request.offset;
    let end = request.offset + request.length;
    let mut pieces = pieces.into_iter().peekable();
    while let Some(piece) = pieces.next() {
        if let Piece::Zero(ByteLen(len)) = piece {
            output.append(|out| chunks.hole(out, to, at, len as u32, at + len == end));
            at += len;
            continue;
        }
        let mut group = smallvec::SmallVec::<[Piece; 4]>::from_iter([piece]);
        while let Some(next) = pieces.next_if(|next| !matches!(next, Piece::Zero(_))) {
            group.push(next);
        }
        let len: u64 = group.iter().map(Piece::len).sum();
        output.append(|out| chunks.data(out, to, at, len as u32, at + len == end));
        group.into_iter().for_each(|piece| output.push(piece));
        at += len;
    }
}

fn put_status(output: &mut Output, replies: Replies, request: &Request, contexts: Vec<(u32, Vec<Extent>)>) {
    let to = request.reply_to();
    let Some(chunks) = replies.chunks() else {
        // Validation refuses a status request on such a connection.
        return output.append(|out| replies.error(out, to, Errno::Inval, "status needs structured replies"));
    };
    if contexts.is_empty() {
        return output.append(|out| chunks.none(out, to));
    }
    let last = contexts.len() - 1;
    for (number, (id, extents)) in contexts.into_iter().enumerate() {
        output.append(|out| {
            chunks.block_status(out, request, id, extents, number == last);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nbd_proto::HeaderMode;

    fn sent(mode: HeaderMode, flags: CommandFlags, pieces: Vec<Piece>) -> Vec<u8> {
        let length = pieces.iter().map(Piece::len).sum();
        let request = Request { cookie: 7, offset: 4096, length, payload: 0, flags, command: Command::Read };
        let mut output = Output::default();
        put(&mut output, Replies::new(mode), &request, Outcome::Read(pieces));
        let mut bytes = Vec::new();
        while output.pending() > 0 {
            let mut slices: [std::io::IoSlice<'_>; 64] = std::array::from_fn(|_| std::io::IoSlice::new(&[]));
            let count = output.slices(&mut slices);
            let taken: Vec<u8> = slices[..count].iter().flat_map(|slice| slice.iter().copied()).collect();
            output.advance(taken.len());
            bytes.extend(taken);
        }
        bytes
    }

    fn pieces() -> Vec<Piece> {
        let bytes = |byte: u8, len| Piece::Bytes(vec![byte; len].into());
        vec![bytes(1, 100), bytes(2, 50), Piece::Zero(ByteLen(30)), bytes(3, 20)]
    }

    #[test]
    fn a_simple_reply_is_one_header_and_every_byte() {
        let bytes = sent(HeaderMode::Simple, CommandFlags::NONE, pieces());
        assert_eq!(bytes.len(), 16 + 200);
        assert_eq!(&bytes[16 + 150..16 + 180], [0; 30]);
    }

    #[test]
    fn a_structured_reply_has_a_chunk_for_data_and_one_for_each_hole() {
        let bytes = sent(HeaderMode::Structured, CommandFlags::NONE, pieces());
        assert_eq!(bytes.len(), (28 + 150) + (20 + 12) + (28 + 20));
        assert_eq!(bytes[5], 0, "more chunks follow the first");
        assert_eq!(bytes[178 + 7], 2, "a hole");
        assert_eq!(bytes[178 + 32 + 5], 1, "the last one says so");
    }

    #[test]
    fn a_df_read_is_one_chunk_holes_and_all() {
        let bytes = sent(HeaderMode::Structured, CommandFlags::DF, pieces());
        assert_eq!(bytes.len(), 28 + 200);
    }
}
