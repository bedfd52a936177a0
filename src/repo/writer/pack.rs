//! Chunks hashed and packed a few at a time, for who has them already.
//!
//! Enters: the bytes of chunks, and the id each had before. Leaves: which are zeros, which are what they were, and the others as they are stored.

use std::sync::Arc;

use bytes::Bytes;

use super::pipeline::{Buffers, Packer, is_zero};
use crate::format::{ChunkId, Codec};
use crate::repo::RepoError;

/// A chunk as it is stored.
pub(in crate::repo) struct Packed {
    pub(in crate::repo) codec: Codec,
    pub(in crate::repo) bytes: Vec<u8>,
}

/// A chunk's place in its block, its bytes (`None` is zeros; a chunk at the device's end may be short), and the id it had.
pub(in crate::repo) type Unpacked = (u16, Option<Bytes>, Option<ChunkId>);

/// For each its id, `None` for zeros; and its stored form, `None` where it is what it was. Blocks: hashing and compression.
pub(in crate::repo) fn pack_all(
    chunks: Vec<Unpacked>,
    chunk_len: usize,
    level: i32,
) -> Result<Vec<(u16, Option<(ChunkId, Option<Packed>)>)>, RepoError> {
    let mut packer: Option<Packer> = None;
    let mut done = Vec::with_capacity(chunks.len());
    for (index, bytes, was) in chunks {
        let Some(bytes) = bytes.filter(|bytes| !is_zero(bytes)) else {
            done.push((index, None));
            continue;
        };
        let mut content = Vec::from(bytes);
        // Past the device's end a chunk is filled with zeros.
        content.resize(chunk_len, 0);
        let id = ChunkId::of(&content);
        if was == Some(id) {
            done.push((index, Some((id, None))));
            continue;
        }
        let packer = match &mut packer {
            Some(packer) => packer,
            None => {
                let system =
                    |error| RepoError::WriterSystem { operation: "start zstd", source: Arc::new(error) };
                packer.insert(Packer::new(level).map_err(system)?)
            }
        };
        let mut buffers = Buffers { content, packed: Vec::new() };
        let codec = packer.pack(&mut buffers);
        let bytes = match codec {
            Codec::Raw => buffers.content,
            Codec::Zstd => buffers.packed,
        };
        done.push((index, Some((id, Some(Packed { codec, bytes })))));
    }
    Ok(done)
}
