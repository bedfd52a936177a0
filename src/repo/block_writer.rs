//! Writes one base object: the new chunks of one block, streamed, then the block's chunk table.
//!
//! Enters: chunks by ascending index, stored here or known elsewhere. Leaves: the object, durable, and where its table is. Memory is one write
//! buffer and the table, whatever the block holds.

use std::collections::HashMap;

use bytes::{Bytes, BytesMut};

use super::{ImageName, RepoError, Repository, keys};
use crate::format::base_object::{self, HEADER_BYTES};
use crate::format::chunk_table::encode_table;
use crate::format::map_node::TableRef;
use crate::format::{BlockSize, ChunkEntry, ChunkId, ChunkLocation, ChunkSize, Codec, ObjectId, TableId};
use crate::store::{Key, Upload};
use crate::units::{ByteLen, ByteOffset};

/// Bytes collected before they go to the store.
const WRITE_BYTES: usize = 1 << 20;

/// Writes one base object.
pub struct BlockWriter {
    repo: Repository,
    image: ImageName,
    block_size: BlockSize,
    chunk_size: ChunkSize,
    /// Begun when there is more than one buffer full; small objects go by a single put.
    upload: Option<Box<dyn Upload>>,
    hasher: blake3::Hasher,
    buffer: BytesMut,
    /// Bytes of the object so far.
    offset: u64,
    entries: Vec<ChunkEntry>,
    others: Vec<ObjectId>,
    other_index: HashMap<ObjectId, u16>,
}

/// An object whose bytes are all known and mostly on their way; [`SealedBlock::finish`] makes it visible.
pub struct SealedBlock {
    repo: Repository,
    upload: Option<Box<dyn Upload>>,
    rest: Bytes,
    key: Key,
    table: TableRef,
    len: ByteLen,
}

impl BlockWriter {
    /// Starts an object. Nothing goes to the store yet.
    pub fn new(
        repo: &Repository,
        image: &ImageName,
        block_size: BlockSize,
        chunk_size: ChunkSize,
    ) -> BlockWriter {
        let mut writer = BlockWriter {
            repo: repo.clone(),
            image: image.clone(),
            block_size,
            chunk_size,
            upload: None,
            hasher: blake3::Hasher::new(),
            buffer: BytesMut::new(),
            offset: 0,
            entries: Vec::new(),
            others: Vec::new(),
            other_index: HashMap::new(),
        };
        writer.append(&base_object::header());
        debug_assert_eq!(writer.offset, HEADER_BYTES as u64);
        writer
    }

    fn append(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.buffer.extend_from_slice(bytes);
        self.offset += bytes.len() as u64;
    }

    /// Stores a chunk here; tells its offset. `stored` is the chunk as its codec has it.
    pub async fn store(
        &mut self,
        index: u16,
        id: ChunkId,
        codec: Codec,
        stored: &[u8],
    ) -> Result<u32, RepoError> {
        // At most 2^30 bytes of chunks to a block, so offsets fit 32 bits.
        let offset = self.offset as u32;
        let stored_len = stored.len() as u32;
        self.entries.push(ChunkEntry { id, offset, stored_len, index, object: 0, codec });
        if self.buffer.is_empty() {
            self.buffer.reserve(WRITE_BYTES + self.chunk_size.len());
        }
        self.append(stored);
        if self.buffer.len() >= WRITE_BYTES {
            let upload = match &mut self.upload {
                Some(upload) => upload,
                None => self.upload.insert(self.repo.store().begin().await?),
            };
            upload.write(self.buffer.split().freeze()).await?;
        }
        Ok(offset)
    }

    /// Names a chunk of this object again.
    pub fn repeat(&mut self, index: u16, id: ChunkId, codec: Codec, offset: u32, stored_len: u32) {
        self.entries.push(ChunkEntry { id, offset, stored_len, index, object: 0, codec });
    }

    /// Names a chunk that another object holds.
    pub fn refer(&mut self, index: u16, location: &ChunkLocation) {
        // A block has at most 16,384 chunks, so a table never names as many objects as a u16 can't count.
        let next = self.others.len() as u16 + 1;
        let object = *self.other_index.entry(location.object).or_insert_with(|| {
            self.others.push(location.object);
            next
        });
        self.entries.push(ChunkEntry {
            id: location.id,
            offset: location.offset.0 as u32,
            stored_len: location.stored_len,
            index,
            object,
            codec: location.codec,
        });
    }

    /// How many chunks the block has so far.
    pub fn chunks(&self) -> usize {
        self.entries.len()
    }

    /// Adds table and trailer. The object's id is known from here on.
    pub fn seal(mut self) -> SealedBlock {
        let table = encode_table(self.block_size, self.chunk_size, &self.others, &self.entries);
        let offset = ByteOffset(self.offset);
        self.append(&table);
        self.append(&base_object::trailer(offset, table.len() as u32));
        let object = ObjectId(*self.hasher.finalize().as_bytes());
        SealedBlock {
            key: keys::object(&self.image, &object),
            table: TableRef { object, offset, len: ByteLen(table.len() as u64), id: TableId::of(&table) },
            len: ByteLen(self.offset),
            repo: self.repo,
            upload: self.upload,
            rest: self.buffer.freeze(),
        }
    }
}

impl SealedBlock {
    /// Where the block's table will be.
    pub fn table(&self) -> TableRef {
        self.table
    }

    /// The object's length.
    pub fn object_len(&self) -> ByteLen {
        self.len
    }

    /// Makes the object visible and durable.
    pub async fn finish(self) -> Result<TableRef, RepoError> {
        match self.upload {
            None => self.repo.store().put_new(&self.key, self.rest).await?,
            Some(mut upload) => {
                upload.write(self.rest).await?;
                upload.finish(&self.key).await?;
            }
        }
        Ok(self.table)
    }
}
