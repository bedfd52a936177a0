//! Whole sessions, client and server joined in memory.

mod support;

use nbd_proto::client::Wish;
use nbd_proto::server::{Config, Tls};
use nbd_proto::{Command, CommandFlags, HeaderMode, STATE_HOLE, STATE_ZERO, StatusQuery, TransmissionFlags};
use support::client::{Pair, connect};
use support::server::{CONTEXTS, SIZE};

const NONE: CommandFlags = CommandFlags::NONE;

fn pair(mode: HeaderMode) -> Pair {
    let contexts = CONTEXTS.map(str::to_owned).to_vec();
    connect(Config::default(), Wish { name: "vol".to_owned(), mode, contexts, ..Wish::default() }, 4096)
}

/// A bit of everything, all in flight at once.
fn script(pair: &mut Pair) -> usize {
    let start = pair.finished;
    pair.send(Command::Write, 5000, 3000, NONE, &[7; 3000]);
    pair.send(Command::Write, 100_000, 65_536, CommandFlags::FUA, &[9; 65_536]);
    pair.send(Command::Read, 0, 128 * 1024, NONE, &[]);
    pair.send(Command::Read, 4096, 65_536, CommandFlags::DF, &[]);
    pair.send(Command::Read, 0, 65_537, CommandFlags::DF, &[]);
    pair.send(Command::WriteZeroes, 101_000, 5000, CommandFlags::NO_HOLE | CommandFlags::FUA, &[]);
    pair.send(Command::WriteZeroes, 0, 512, CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO, &[]);
    pair.send(Command::WriteZeroes, 0, 512, CommandFlags::FAST_ZERO, &[]);
    pair.send(Command::Trim, 110_000, 20_000, CommandFlags::FUA, &[]);
    pair.send(Command::Cache, 0, SIZE as u64, NONE, &[]);
    pair.send(Command::Flush, 0, 0, NONE, &[]);
    pair.send(Command::BlockStatus, 0, SIZE as u64, NONE, &[]);
    pair.send(Command::BlockStatus, 4096, 100, CommandFlags::REQ_ONE, &[]);
    pair.send(Command::Read, SIZE as u64 - 1, 2, NONE, &[]);
    pair.send(Command::Write, SIZE as u64 - 1, 2, NONE, &[1, 2]);
    pair.send(Command::Unknown(9), 0, 0, NONE, &[]);
    pair.send(Command::Read, 90_000, 100_000, NONE, &[]);
    start
}

#[test]
fn every_command_works_with_every_header_and_many_in_flight() {
    for mode in [HeaderMode::Simple, HeaderMode::Structured, HeaderMode::Extended] {
        let mut pair = pair(mode);
        script(&mut pair);
        pair.settle();
        assert_eq!(pair.finished, 17);
    }
}

#[test]
fn a_session_cut_at_every_size_is_the_same_session() {
    for mode in [HeaderMode::Simple, HeaderMode::Structured, HeaderMode::Extended] {
        let mut whole = pair(mode);
        script(&mut whole);
        whole.settle();
        for step in [1, 2, 3, 7, 13, 27, 28, 29, 31, 32, 33, 1000] {
            let mut cut = pair(mode);
            script(&mut cut);
            while !cut.to_server.is_empty() {
                cut.deliver_to_server(step);
                cut.deliver_to_client(step * 3);
            }
            cut.settle();
            assert_eq!(cut.server.log, whole.server.log, "{mode:?} in steps of {step}");
            assert_eq!(cut.extents, whole.extents);
        }
    }
}

#[test]
fn block_status_tells_each_selected_context_once() {
    for mode in [HeaderMode::Structured, HeaderMode::Extended] {
        let mut pair = pair(mode);
        pair.send(Command::Write, 4096, 4096, NONE, &[1; 4096]);
        pair.send(Command::BlockStatus, 0, SIZE as u64, NONE, &[]);
        pair.settle();
        assert_eq!(pair.extents.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 2, 3]);
        for (_, extents) in &pair.extents {
            let told: Vec<_> = extents.iter().map(|e| (e.length, e.flags)).collect();
            let hole = STATE_HOLE | STATE_ZERO;
            assert_eq!(told, [(4096, hole), (4096, 0), (SIZE as u64 - 8192, hole)]);
        }
    }
}

#[test]
fn the_payload_form_of_block_status_tells_the_contexts_asked_for() {
    let mut pair = pair(HeaderMode::Extended);
    for ids in [&[3, 1][..], &[2], &[]] {
        pair.extents.clear();
        pair.send_query(4096, &StatusQuery { length: 8192, ids: ids.to_vec() });
        pair.settle();
        assert_eq!(pair.extents.iter().map(|(id, _)| *id).collect::<Vec<_>>(), ids);
    }
    pair.send_query(0, &StatusQuery { length: 4096, ids: vec![4] });
    pair.send_query(0, &StatusQuery { length: 0, ids: vec![1] });
    pair.send_query(0, &StatusQuery { length: u64::MAX, ids: vec![1] });
    pair.settle();
    assert_eq!(pair.finished, 6);
}

#[test]
fn flags_that_need_chunks_or_contexts_are_only_told_with_them() {
    let df = TransmissionFlags::SEND_DF;
    let payload = TransmissionFlags::BLOCK_STAT_PAYLOAD;
    for (mode, has_df, has_payload) in [
        (HeaderMode::Simple, false, false),
        (HeaderMode::Structured, true, false),
        (HeaderMode::Extended, true, true),
    ] {
        let flags = pair(mode).server.negotiated().unwrap().flags;
        assert!(flags.contains(TransmissionFlags::HAS_FLAGS | TransmissionFlags::CAN_MULTI_CONN));
        assert_eq!((flags.contains(df), flags.contains(payload)), (has_df, has_payload), "{mode:?}");
        assert!(!flags.contains(TransmissionFlags::ROTATIONAL));
    }
    let wish = Wish { name: "vol".to_owned(), mode: HeaderMode::Extended, ..Wish::default() };
    let pair = connect(Config { tls: Tls::Off, ..Config::default() }, wish, 4096);
    assert!(!pair.server.negotiated().unwrap().flags.contains(payload), "no context, no payload form");
}
