//! One request against a device: at once where that is possible, else as a task.
//!
//! Enters: a request that was found valid, with its payload. Leaves: an [`Outcome`]. Invariant: a change is made only inside the connection's fence, and
//! one with FUA is durable when its outcome is told.

use std::sync::Arc;

use bytes::Bytes;
use nbd_proto::{Command, CommandFlags, Errno, Extent, Request, STATE_HOLE, STATE_ZERO, StatusQuery};
use smallvec::SmallVec;

use crate::device::{Allocation, Device, DeviceError, Dirty, Fence, Now, TOGETHER};
use crate::units::{ByteLen, ByteOffset, ByteRange};

use super::export::{CONTEXT_ALLOCATION, CONTEXT_CACHED, CONTEXT_DIRTY, Export};
use super::reply::Outcome;

/// Extents of one context in one reply: the client asks on from where they end.
const MAX_EXTENTS: usize = 4096;
/// Bit 0 of `x-horcrux:dirty`.
const DIRTY: u64 = 1;
/// Bit 1 of `x-horcrux:dirty`.
const DIRTY_ZERO: u64 = 2;
/// Bit 0 of `x-horcrux:cached`.
const CACHED: u64 = 1;

/// What the client asked to be told of ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContextKind {
    Allocation,
    Dirty,
    Cached,
}

impl ContextKind {
    /// The context of a name.
    pub fn of(name: &str) -> Option<ContextKind> {
        match name {
            CONTEXT_ALLOCATION => Some(ContextKind::Allocation),
            CONTEXT_DIRTY => Some(ContextKind::Dirty),
            CONTEXT_CACHED => Some(ContextKind::Cached),
            _ => None,
        }
    }
}

/// What a request that could not be done at once still needs.
#[derive(Debug)]
pub enum Rest {
    /// All of it.
    All,
    /// The change is made; it is to be durable.
    Flush,
}

/// Does what can be done of `request` without waiting.
#[inline]
pub fn try_now(export: &Export, fence: &Fence, request: &Request, payload: &[u8]) -> Result<Outcome, Rest> {
    let device = export.device();
    let Some(range) = range(request) else {
        return Ok(Outcome::Failed(Errno::Inval, "the range wraps around".to_owned()));
    };
    let mut pieces = Vec::new();
    let tried = match request.command {
        Command::Read => {
            pieces.reserve(1);
            device.read_now(range, &mut pieces)
        }
        Command::Write => device.write_now(fence, range.start, payload),
        Command::Trim => device.trim_now(fence, range),
        // Zeros that must take space cost what writing them does.
        Command::WriteZeroes if request.flags.contains(CommandFlags::NO_HOLE) => return Err(Rest::All),
        Command::WriteZeroes => device.zero_now(fence, range),
        _ => return Err(Rest::All),
    };
    match tried {
        Ok(Now::Wait) => Err(Rest::All),
        Ok(Now::Done) if request.command == Command::Read => Ok(Outcome::Read(pieces)),
        Ok(Now::Done) if request.fua() => Err(Rest::Flush),
        Ok(Now::Done) => Ok(Outcome::Done),
        Err(error) => Ok(failed(export, request, &error)),
    }
}

/// Whether `request`, a valid one, is a write that may be done together with others: a small one, of whole pages, that is done once its bytes are there.
#[inline]
pub fn may_go_together(request: &Request) -> bool {
    request.command == Command::Write
        && request.flags.without(CommandFlags::PAYLOAD_LEN).is_empty()
        && range(request).is_some_and(Device::may_go_together)
}

/// Does writes that may go together: each is told whether it is done. Those that are not lost nothing: they are to be tried each by itself.
pub fn write_together(
    export: &Export,
    fence: &Fence,
    writes: &[(ByteOffset, &[u8])],
) -> SmallVec<[bool; TOGETHER]> {
    match export.device().write_together_now(fence, writes) {
        Ok(each) => each,
        Err(error) => {
            // Which of them it was is found out one by one; a fault that is gone by then is worth knowing of too.
            if let (Some((at, _)), false) =
                (writes.first(), error.is_full() || matches!(error, DeviceError::Fenced))
            {
                let length = writes.iter().map(|(_, bytes)| bytes.len() as u64).sum();
                export.log_failure(Command::Write, at.0, length, &error);
            }
            SmallVec::from_elem(false, writes.len())
        }
    }
}

/// Does the rest of a request, waiting for what must be waited for.
pub async fn run(
    export: Arc<Export>,
    fence: Arc<Fence>,
    contexts: Arc<[(u32, ContextKind)]>,
    request: Request,
    payload: Bytes,
    rest: Rest,
) -> Outcome {
    match execute(&export, &fence, &contexts, &request, payload, rest).await {
        Ok(outcome) => outcome,
        Err(error) => failed(&export, &request, &error),
    }
}

fn failed(export: &Export, request: &Request, error: &DeviceError) -> Outcome {
    if !matches!(error, DeviceError::Fenced) {
        export.log_failure(request.command, request.offset, request.length, error);
    }
    Outcome::failed(request, error)
}

fn range(request: &Request) -> Option<ByteRange> {
    ByteRange::at(ByteOffset(request.offset), ByteLen(request.length))
}

async fn execute(
    export: &Arc<Export>,
    fence: &Arc<Fence>,
    contexts: &[(u32, ContextKind)],
    request: &Request,
    payload: Bytes,
    rest: Rest,
) -> Result<Outcome, DeviceError> {
    let device = export.device();
    let Some(range) = range(request) else {
        return Ok(Outcome::Failed(Errno::Inval, "the range wraps around".to_owned()));
    };
    if matches!(rest, Rest::All) {
        match request.command {
            Command::Read => return device.read(range).await.map(Outcome::Read),
            Command::BlockStatus => return status(export, contexts, request, &payload).await,
            Command::Cache => return device.prefetch(range).await.map(|()| Outcome::Done),
            Command::Write => device.write(fence, range.start, payload).await?,
            Command::Trim => device.trim(fence, range).await?,
            Command::WriteZeroes if request.flags.contains(CommandFlags::NO_HOLE) => {
                device.zero_allocated(fence, range).await?;
            }
            Command::WriteZeroes => device.zero(fence, range).await?,
            Command::Flush | Command::Disc | Command::Unknown(_) => {}
        }
    }
    if request.fua() || request.command == Command::Flush {
        let device = device.clone();
        tokio::task::spawn_blocking(move || device.flush()).await.map_err(|_| DeviceError::Stopped)??;
    }
    Ok(Outcome::Done)
}

async fn status(
    export: &Arc<Export>,
    contexts: &[(u32, ContextKind)],
    request: &Request,
    payload: &[u8],
) -> Result<Outcome, DeviceError> {
    let (request, wanted) = if request.is_status_payload() {
        let known = |id| contexts.iter().any(|(context, _)| *context == id);
        match StatusQuery::parse(payload, known) {
            Ok(query) => (query.apply(request), Some(query.ids)),
            Err(errno) => return Ok(Outcome::Failed(errno, "not a status query".to_owned())),
        }
    } else {
        (*request, None)
    };
    let device = export.device();
    let range = match range(&request) {
        Some(range) if !range.is_empty() && range.end.0 <= device.size().0 => range,
        _ => return Ok(Outcome::Failed(Errno::Inval, "the range is not inside the export".to_owned())),
    };
    let most = if request.flags.contains(CommandFlags::REQ_ONE) { 1 } else { MAX_EXTENTS };
    let mut found = Vec::new();
    for (id, kind) in contexts {
        if wanted.as_ref().is_some_and(|wanted| !wanted.contains(id)) {
            continue;
        }
        let extents = match kind {
            ContextKind::Allocation => wire(device.allocation(range, most).await?, |state| match state {
                Allocation::Data => 0,
                Allocation::Hole => STATE_HOLE | STATE_ZERO,
            }),
            ContextKind::Cached => {
                wire(device.cached(range, most).await?, |here| if here { CACHED } else { 0 })
            }
            ContextKind::Dirty => wire(device.dirty(range, most)?, |state| match state {
                Dirty::Clean => 0,
                Dirty::Data => DIRTY,
                Dirty::Zero => DIRTY | DIRTY_ZERO,
            }),
        };
        found.push((*id, extents));
    }
    Ok(Outcome::Status(found))
}

fn wire<T>(extents: Vec<crate::device::Extent<T>>, flags: impl Fn(T) -> u64) -> Vec<Extent> {
    extents.into_iter().map(|extent| Extent { length: extent.len.0, flags: flags(extent.state) }).collect()
}

/// How much memory a request can take while it is under way.
#[inline]
pub fn weight(request: &Request) -> u64 {
    match request.command {
        Command::Read => request.length,
        _ => u64::from(request.payload),
    }
}
