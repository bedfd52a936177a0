//! A connection that others' requests hold up.
//!
//! Enters: requests over a socket, while others have what they need. Leaves: their answers. Invariant: what was left for want of something is taken on when that is there again, whoever gave it back.

use super::*;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::BytesMut;
use nbd_proto::client::encode_request;
use nbd_proto::server::Negotiated;
use nbd_proto::{CommandFlags, HeaderMode};
use tokio::runtime::Runtime;

use crate::cache::{Cache, CacheOptions};
use crate::device::{Base, Device};
use crate::format::{Filesystem, Timestamp};
use crate::repo::{
    CommitMeta, ImageName, ImageWriter, NoMetaCache, Repository, Version, VersionOptions, WriterParams,
};
use crate::store::MemStore;
use crate::units::ByteLen;

const SIZE: ByteLen = ByteLen(1 << 20);
const REPLY_LEN: usize = 16;

/// An export of zeros.
fn export(runtime: &Runtime, cache: Arc<Cache>) -> Export {
    let repository =
        runtime.block_on(Repository::create(Arc::new(MemStore::new()), [7; 16])).expect("a repository");
    let name: ImageName = "disk".parse().expect("a name");
    let mut writer =
        ImageWriter::new(runtime.handle(), &repository, &name, WriterParams::new(SIZE)).expect("a writer");
    writer.hole(SIZE).expect("a hole");
    let meta = CommitMeta {
        filesystem: Filesystem::None,
        author: "tests".into(),
        time: Timestamp { secs: 1_750_000_000, nanos: 0 },
        message: "by a test".into(),
    };
    let commit = writer.finish(meta).expect("a commit").commit;
    let opened = Version::open(&repository, &name, commit, Arc::new(NoMetaCache), VersionOptions::default());
    let version = runtime.block_on(opened).expect("a version");
    let device = Device::new(Base::new(version, cache), None, SIZE);
    Export::new("disk".into(), String::new(), Arc::new(device))
}

/// What a client without options would have got.
fn chosen(export: Arc<Export>) -> Chosen {
    let info = export.info();
    let negotiated = Negotiated {
        name: info.name.clone(),
        flags: info.flags,
        export: info,
        mode: HeaderMode::Simple,
        contexts: Vec::new(),
        secure: false,
        knows_block_sizes: false,
    };
    Chosen { negotiated, export, input: BytesMut::new() }
}

fn flushes(count: u64) -> Vec<u8> {
    let mut sent = Vec::new();
    for cookie in 0..count {
        let flags = CommandFlags::NONE;
        let flush = Request { cookie, offset: 0, length: 0, payload: 0, flags, command: Command::Flush };
        encode_request(&mut sent, HeaderMode::Simple, &flush);
    }
    sent
}

#[test]
fn requests_left_for_want_of_room_are_taken_on_though_others_make_room_at_that_moment() {
    const ROUNDS: u32 = 3000;
    const REQUESTS: u64 = 4;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    let dir = tempfile::tempdir().expect("a directory");
    let cache = Cache::open(dir.path(), CacheOptions::new(ByteLen(64 << 20))).expect("a cache");
    let export = Arc::new(export(&runtime, cache));
    let budget = Arc::new(Budget::default());
    let (mut client, served) = UnixStream::pair().expect("sockets");
    client.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    let is_over = AtomicBool::new(false);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            // Another connection that has all of the budget, again and again.
            while !is_over.load(Ordering::Relaxed) {
                let _all = budget.take(256 << 20);
                std::hint::spin_loop();
            }
        });
        let connection = threads
            .spawn(|| run(served.into(), chosen(export.clone()), runtime.handle().clone(), budget.clone()));
        // Each of them waits for a thread, so that those behind it want room.
        let requests = flushes(REQUESTS);
        let mut replies = vec![0; REQUESTS as usize * REPLY_LEN];
        let mut answered = 0;
        while answered < ROUNDS
            && client.write_all(&requests).and_then(|()| client.read_exact(&mut replies)).is_ok()
        {
            answered += 1;
        }
        is_over.store(true, Ordering::Relaxed);
        drop(client);
        let end = connection.join().expect("no panic").expect("no error");
        assert_eq!((answered, end), (ROUNDS, End::Closed));
    });
}
