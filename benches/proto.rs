//! What the server does with each request beside moving its bytes, and with each chunk beside storing it: `cargo bench --bench proto`.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use horcrux::format::{ChunkId, ChunkSize, VerifiedChunk};
use nbd_proto::client::encode_request;
use nbd_proto::server::{Decoded, Replies, Transmission};
use nbd_proto::{Command, CommandFlags, Extent, HeaderMode, Request};

fn request(cookie: u64) -> Request {
    let offset = cookie.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (1 << 30) / 4096 * 4096;
    Request { cookie, offset, length: 4096, payload: 0, flags: CommandFlags::NONE, command: Command::Read }
}

fn wire(c: &mut Criterion) {
    const REQUESTS: u64 = 32;
    for (name, mode) in [("compact", HeaderMode::Structured), ("extended", HeaderMode::Extended)] {
        let mut group = c.benchmark_group(format!("wire, {name}"));
        group.throughput(Throughput::Elements(REQUESTS));
        let mut sent = Vec::new();
        (0..REQUESTS).for_each(|cookie| encode_request(&mut sent, mode, &request(cookie)));
        group.bench_function("decode 32 requests", |b| {
            let mut transmission = Transmission::new(mode);
            b.iter(|| {
                let mut rest = sent.as_slice();
                while !rest.is_empty() {
                    let Ok(Decoded::Request(request)) = transmission.decode(rest) else {
                        panic!("a request")
                    };
                    rest = &rest[transmission.header_len()..];
                    black_box(request);
                }
            });
        });
        let replies = Replies::new(mode);
        let mut out = Vec::with_capacity(4096);
        group.bench_function("encode 32 data replies' heads", |b| {
            b.iter(|| {
                out.clear();
                for cookie in 0..REQUESTS {
                    let request = request(cookie);
                    replies.data(&mut out, request.reply_to(), request.offset, 4096, true);
                }
                black_box(&out);
            });
        });
        let extents: Vec<Extent> = (0..64).map(|n| Extent { length: 65_536, flags: n % 2 }).collect();
        let status = Request { length: 64 * 65_536, command: Command::BlockStatus, ..request(1) };
        let chunks = replies.chunks().expect("status needs chunks");
        group.throughput(Throughput::Elements(extents.len() as u64));
        group.bench_function("encode a status of 64 extents", |b| {
            b.iter(|| {
                out.clear();
                black_box(chunks.block_status(&mut out, &status, 1, extents.iter().copied(), true))
            });
        });
        group.finish();
    }
}

fn chunk(c: &mut Criterion) {
    let size = ChunkSize::DEFAULT;
    // A third of it noise, as a database's pages compress to.
    let content: Vec<u8> = (0..size.len() as u32)
        .map(
            |at| if at % 4096 < 1365 { (at.wrapping_mul(0x9e37_79b9) >> 13) as u8 } else { (at >> 12) as u8 },
        )
        .collect();
    let id = ChunkId::of(&content);
    let packed = zstd::bulk::compress(&content, 1).expect("it compresses");
    let mut group = c.benchmark_group("chunk of 128 KiB");
    group.throughput(Throughput::Bytes(size.len() as u64));
    group.bench_function("name it (BLAKE3)", |b| b.iter(|| black_box(ChunkId::of(black_box(&content)))));
    let bytes = bytes::Bytes::from(content.clone());
    group.bench_function("verify it", |b| {
        b.iter(|| black_box(VerifiedChunk::verify(id, size, bytes.clone()).expect("it is what it says")));
    });
    group.bench_function("compress it (zstd -1)", |b| {
        let mut packer = zstd::bulk::Compressor::new(1).expect("memory");
        b.iter(|| black_box(packer.compress(black_box(&content)).expect("it compresses")));
    });
    group.bench_function("decompress it", |b| {
        let mut opener = zstd::bulk::Decompressor::new().expect("memory");
        b.iter(|| black_box(opener.decompress(black_box(&packed), size.len()).expect("it was compressed")));
    });
    group.finish();
}

criterion_group!(benches, wire, chunk);
criterion_main!(benches);
