//! The prefetch list of a commit: which chunks a first start reads, in order.
//!
//! Enters: the bytes under a list's key, or of a volume's file. Leaves: a [`PrefetchList`]. Invariant: it is a hint; whatever it says, only verified chunks of the
//! commit are fetched by it, at most [`MAX_CHUNKS`].

use super::text::{TextReader, TextWriter, parse_decimal};
use super::{ChunkSize, CommitId, FormatError};
use crate::units::{ByteLen, ChunkIndex};

const WHAT: &str = "prefetch list";
const KIND: &str = "horcrux-prefetch";
const VERSION: u64 = 1;
/// The most chunks of a list.
pub const MAX_CHUNKS: u64 = 1 << 16;

/// A list of chunks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefetchList {
    /// The image it belongs to.
    pub image: String,
    /// The commit that was read.
    pub commit: CommitId,
    /// The commit's chunk size.
    pub chunk_size: ChunkSize,
    /// Runs of chunks that follow each other, in the order of their first use: the first chunk, and how many.
    runs: Vec<(u64, u64)>,
}

impl PrefetchList {
    /// A list of `chunks`, in this order; what is over [`MAX_CHUNKS`] is left out.
    pub fn new(
        image: String,
        commit: CommitId,
        chunk_size: ChunkSize,
        chunks: impl IntoIterator<Item = ChunkIndex>,
    ) -> PrefetchList {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for chunk in chunks.into_iter().take(MAX_CHUNKS as usize) {
            match runs.last_mut() {
                Some((start, len)) if *start + *len == chunk.0 => *len += 1,
                _ => runs.push((chunk.0, 1)),
            }
        }
        PrefetchList { image, commit, chunk_size, runs }
    }

    /// The chunks, in order.
    pub fn chunks(&self) -> impl Iterator<Item = ChunkIndex> + Send + use<> {
        self.runs.clone().into_iter().flat_map(|(start, len)| start..start + len).map(ChunkIndex)
    }

    /// How many chunks.
    pub fn len(&self) -> u64 {
        self.runs.iter().map(|(_, len)| len).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Runs of neighbours: the first chunk, and how many.
    pub fn runs(&self) -> &[(u64, u64)] {
        &self.runs
    }

    /// Bytes of the device it covers.
    pub fn bytes(&self) -> ByteLen {
        ByteLen(self.len() * self.chunk_size.len() as u64)
    }

    /// The object's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = TextWriter::new(KIND, VERSION);
        writer.field("image", &self.image).field("commit", self.commit);
        writer.field("chunk-size", self.chunk_size.len()).field("runs", self.runs.len());
        for (start, len) in &self.runs {
            writer.field("run", format_args!("{start} {len}"));
        }
        writer.checksum()
    }

    /// Reads the object's bytes.
    pub fn decode(bytes: &[u8]) -> Result<PrefetchList, FormatError> {
        let (mut reader, _) = TextReader::new(WHAT, KIND, VERSION..=VERSION, bytes)?;
        let image = reader.field("image")?.to_owned();
        let commit = reader.parsed("commit", |text| text.parse().ok())?;
        let chunk_size =
            reader.parsed("chunk-size", |text| ChunkSize::from_len(ByteLen(parse_decimal(text)?)))?;
        let count = reader.parsed("runs", |text| parse_decimal(text).filter(|count| *count <= MAX_CHUNKS))?;
        let (mut runs, mut chunks) = (Vec::new(), 0u64);
        for _ in 0..count {
            let run = reader.parsed("run", |text| {
                let (start, len) = text.split_once(' ')?;
                let (start, len) = (parse_decimal(start)?, parse_decimal(len)?);
                start.checked_add(len)?;
                chunks = chunks.checked_add(len)?;
                (len > 0 && chunks <= MAX_CHUNKS).then_some((start, len))
            })?;
            runs.push(run);
        }
        reader.checksum()?;
        Ok(PrefetchList { image, commit, chunk_size, runs })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list() -> PrefetchList {
        let chunks = [5, 6, 7, 100, 3, 4, 9].map(ChunkIndex);
        let size = ChunkSize::from_log2(17).unwrap();
        PrefetchList::new("AMCC".into(), CommitId::of(b"a commit"), size, chunks)
    }

    #[test]
    fn a_list_survives_its_bytes_and_no_flipped_bit_does() {
        let good = list().encode();
        assert_eq!(PrefetchList::decode(&good), Ok(list()));
        for at in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[at / 8] ^= 1 << (at % 8);
            assert!(PrefetchList::decode(&bad).is_err(), "bit {at}");
        }
    }

    #[test]
    fn the_order_is_kept_and_neighbours_are_one_run() {
        assert_eq!((list().runs().len(), list().len(), list().bytes()), (4, 7, ByteLen(7 << 17)));
        assert_eq!(list().chunks().map(|chunk| chunk.0).collect::<Vec<_>>(), [5, 6, 7, 100, 3, 4, 9]);
    }

    #[test]
    fn a_list_of_too_many_chunks_is_refused_and_never_made() {
        let many =
            PrefetchList::new("a".into(), CommitId::of(b""), list().chunk_size, (0..100_000).map(ChunkIndex));
        assert_eq!(many.len(), MAX_CHUNKS);
        let mut writer = TextWriter::new(KIND, VERSION);
        writer.field("image", "a").field("commit", CommitId::of(b"")).field("chunk-size", 1 << 17);
        writer.field("runs", 1).field("run", format_args!("0 {}", u64::MAX));
        assert!(PrefetchList::decode(&writer.checksum()).is_err());
    }
}
