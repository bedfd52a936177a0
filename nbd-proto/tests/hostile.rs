//! Peers that break the rules, on both sides.

mod support;

use nbd_proto::client::{self, Wish};
use nbd_proto::server::{Config, StreamError, Tls};
use nbd_proto::wire::{self, opt, rep};
use nbd_proto::{Command, CommandFlags, HeaderMode, Request};
use support::client::connect;
use support::server::{CONTEXTS, SIZE, Server};

fn option_header(option: u32, length: u32) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes
}

fn greeted(config: Config) -> Server {
    let mut server = Server::new(config);
    server.feed(&[0, 0, 0, 3]);
    server.output.clear();
    server
}

fn extended_server() -> Server {
    let wish = Wish {
        name: "vol".to_owned(),
        mode: HeaderMode::Extended,
        contexts: CONTEXTS.map(str::to_owned).to_vec(),
        ..Wish::default()
    };
    connect(Config::default(), wish, 4096).server
}

fn request(command: Command, offset: u64, length: u64, flags: CommandFlags) -> Vec<u8> {
    let mut out = Vec::new();
    let request = Request { cookie: 7, offset, length, payload: 0, flags, command };
    client::encode_request(&mut out, HeaderMode::Extended, &request);
    out
}

/// The error number of a single extended error chunk.
fn errno(output: &[u8]) -> u32 {
    assert_eq!(output[..8], [0x6e, 0x8a, 0x27, 0x8c, 0, 1, 0x80, 1], "an error, and the last chunk");
    u32::from_be_bytes(output[32..36].try_into().expect("four bytes"))
}

#[test]
fn unknown_client_flags_and_garbage_options_end_the_connection() {
    let mut server = Server::new(Config::default());
    server.feed(&[0, 0, 0, 4]);
    assert_eq!(server.error(), Some(&StreamError::UnknownClientFlags { flags: 4 }));
    let mut server = greeted(Config::default());
    server.feed(b"GET / HTTP/1.1\r\n");
    assert!(matches!(server.error(), Some(StreamError::BadOptionMagic { .. })));
}

#[test]
fn options_that_announce_gigabytes_end_the_connection_before_a_byte_of_them() {
    for (option, length) in [
        (opt::GO, u32::MAX),
        (opt::EXPORT_NAME, u32::MAX),
        (opt::EXPORT_NAME, wire::MAX_STRING as u32 + 1),
        (99, wire::MAX_OPTION_DRAIN + 1),
    ] {
        let mut server = greeted(Config::default());
        server.feed(&option_header(option, length));
        assert!(
            matches!(server.error(), Some(StreamError::OptionTooLong { .. })),
            "option {option} of {length}"
        );
    }
    let mut server = greeted(Config::default());
    server.feed(&option_header(opt::EXPORT_NAME, 2));
    server.feed(b"a\0");
    assert_eq!(server.error(), Some(&StreamError::ExportNameInvalid));
}

#[test]
fn a_client_that_haggles_for_ever_is_dropped() {
    let mut server = greeted(Config::default());
    for _ in 0..wire::MAX_OPTIONS {
        server.feed(&option_header(99, 0));
        assert_eq!(server.output.len(), 20);
        server.output.clear();
    }
    assert!(!server.is_closed());
    server.feed(&option_header(99, 0));
    assert_eq!(server.error(), Some(&StreamError::TooManyOptions));
}

#[test]
fn plaintext_after_starttls_is_never_taken_for_an_option() {
    for config in [Tls::Offered, Tls::Required].map(|tls| Config { tls, ..Config::default() }) {
        let mut server = greeted(config);
        let mut bytes = option_header(opt::STARTTLS, 0);
        bytes.extend(option_header(opt::LIST, 0));
        server.feed(&bytes);
        assert_eq!(server.error(), Some(&StreamError::PlaintextAfterStartTls));
        assert_eq!(server.output.len(), 20, "nothing but the acknowledgement of STARTTLS");
        assert!(!server.log.iter().any(|event| event.contains("List")));
    }
}

#[test]
fn starttls_with_data_is_invalid_and_starts_nothing() {
    for length in [1, wire::MAX_OPTION_DATA + 1] {
        let mut server = greeted(Config { tls: Tls::Offered, ..Config::default() });
        server.feed(&option_header(opt::STARTTLS, length as u32));
        server.feed(&vec![0; length]);
        assert_eq!(server.output[12..16], rep::ERR_INVALID.to_be_bytes());
        assert!(!server.is_closed());
    }
}

#[test]
fn a_client_is_not_fooled_by_plaintext_before_tls_either() {
    let mut c = client::Handshake::new(true);
    c.handle_input(b"NBDMAGICIHAVEOPT\x00\x03").unwrap();
    c.start_tls().unwrap();
    let mut bytes = wire::REP_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&opt::STARTTLS.to_be_bytes());
    bytes.extend_from_slice(&rep::ACK.to_be_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.push(1);
    assert_eq!(c.handle_input(&bytes), Err(client::StreamError::PlaintextAfterStartTls));
}

#[test]
fn a_refused_write_is_drained_and_the_next_request_is_heard() {
    let mut server = extended_server();
    for (offset, length, expected) in [(SIZE as u64, 512, 28), (u64::MAX - 1, 512, 28), (0, 129 * 1024, 22)] {
        let mut bytes = request(Command::Write, offset, length, CommandFlags::PAYLOAD_LEN);
        // The payload is full of things that look like requests.
        let bait = request(Command::Trim, 0, SIZE as u64, CommandFlags::NONE);
        bytes.extend(bait.iter().cycle().take(length as usize));
        server.disk.fill(1);
        server.feed(&bytes);
        assert_eq!(errno(&std::mem::take(&mut server.output)), expected);
        assert!(server.disk.iter().all(|&b| b == 1), "nothing of the payload was obeyed");
    }
    server.feed(&request(Command::Flush, 0, 0, CommandFlags::NONE));
    assert_eq!(server.output.len(), 32);
}

#[test]
fn a_payload_on_a_command_that_takes_none_is_drained_and_einval() {
    let mut server = extended_server();
    for command in [Command::Read, Command::Trim, Command::Flush, Command::Cache, Command::Unknown(77)] {
        let mut bytes = request(command, 0, 40, CommandFlags::PAYLOAD_LEN);
        bytes.extend(request(Command::Disc, 0, 0, CommandFlags::NONE));
        bytes.extend([0; 8]);
        server.feed(&bytes);
        assert_eq!(errno(&std::mem::take(&mut server.output)), 22, "{command:?}");
    }
    assert!(!server.is_closed());
}

#[test]
fn payloads_too_long_to_drain_end_the_connection() {
    for length in [u64::from(wire::MAX_DRAIN) + 1, u64::from(u32::MAX), u64::MAX] {
        for command in [Command::Write, Command::Read, Command::BlockStatus, Command::Unknown(9)] {
            let mut server = extended_server();
            server.feed(&request(command, 0, length, CommandFlags::PAYLOAD_LEN));
            assert!(matches!(server.error(), Some(StreamError::PayloadTooLong { .. })), "{command:?}");
        }
    }
}

#[test]
fn lengths_of_all_ones_and_zero_are_refused_by_an_error_only() {
    let mut server = extended_server();
    for length in [0, u64::from(u32::MAX), u64::MAX] {
        for command in
            [Command::Read, Command::Trim, Command::WriteZeroes, Command::Cache, Command::BlockStatus]
        {
            server.feed(&request(command, 8, length, CommandFlags::NONE));
            let past_end = if command == Command::WriteZeroes && length > 0 { 28 } else { 22 };
            assert_eq!(errno(&std::mem::take(&mut server.output)), past_end, "{command:?} of {length}");
        }
    }
    server.feed(&request(Command::Write, 0, 0, CommandFlags::PAYLOAD_LEN));
    assert_eq!(errno(&std::mem::take(&mut server.output)), 22);
    assert!(!server.is_closed());
}

#[test]
fn status_payloads_that_make_no_sense_are_einval_and_drained() {
    let mut server = extended_server();
    let length = (SIZE as u64).to_be_bytes();
    let ids =
        |ids: &[u32]| [&length[..], &ids.iter().flat_map(|id| id.to_be_bytes()).collect::<Vec<_>>()].concat();
    for payload in [
        ids(&[9]),
        ids(&[1, 1]),
        ids(&[0]),
        length[..7].to_vec(),
        [&length[..], &[1]].concat(),
        vec![0xff; 16],
        ids(&vec![1; 257]),
    ] {
        let mut bytes = request(Command::BlockStatus, 0, payload.len() as u64, CommandFlags::PAYLOAD_LEN);
        bytes.extend(&payload);
        server.feed(&bytes);
        assert_eq!(errno(&std::mem::take(&mut server.output)), 22, "{payload:?}");
    }
    let mut bytes = request(Command::BlockStatus, 0, 12, CommandFlags::PAYLOAD_LEN);
    bytes.extend(ids(&[2]));
    server.feed(&bytes);
    assert_eq!(server.output.len(), 32 + 8 + 16);
}

#[test]
fn an_unaligned_status_request_is_einval_where_blocks_have_a_size() {
    let mut facts = extended_server().negotiated().unwrap().facts();
    facts.block_sizes = nbd_proto::BlockSizes::new(512, 4096, 1 << 20).unwrap();
    let flags = CommandFlags::NONE;
    let command = Command::BlockStatus;
    let mut r = Request { cookie: 1, offset: 1, length: 512, payload: 0, flags, command };
    assert_eq!(nbd_proto::validate(&r, &facts), Err(nbd_proto::Errno::Inval));
    (r.offset, r.length) = (512, 511);
    assert_eq!(nbd_proto::validate(&r, &facts), Err(nbd_proto::Errno::Inval));
    r.length = 512;
    assert_eq!(nbd_proto::validate(&r, &facts), Ok(()));
}

#[test]
fn a_server_that_lies_in_its_handshake_is_dropped() {
    let asked = |bytes: &[u8]| {
        let mut c = client::Handshake::new(true);
        c.handle_input(b"NBDMAGICIHAVEOPT\x00\x03").unwrap();
        c.go("vol").unwrap();
        c.handle_input(bytes)
    };
    let reply = |option: u32, kind: u32, length: u32, data: &[u8]| {
        let mut bytes = wire::REP_MAGIC.to_be_bytes().to_vec();
        [option, kind, length].iter().for_each(|n| bytes.extend_from_slice(&n.to_be_bytes()));
        bytes.extend_from_slice(data);
        bytes
    };
    use client::StreamError as E;
    assert!(matches!(asked(&[0; 20]), Err(E::BadOptionReply { got: 0 })));
    assert!(matches!(asked(&reply(opt::LIST, rep::ACK, 0, b"")), Err(E::WrongOption { .. })));
    assert!(matches!(asked(&reply(opt::GO, rep::INFO, u32::MAX, b"")), Err(E::TooMuch { .. })));
    assert!(matches!(asked(&reply(opt::GO, rep::SERVER, 0, b"")), Err(E::UnexpectedReply { .. })));
    assert!(matches!(asked(&reply(opt::GO, 77, 0, b"")), Err(E::UnexpectedReply { .. })));
    // Success without the facts, with data, with facts cut short, with block sizes of zero.
    assert!(matches!(asked(&reply(opt::GO, rep::ACK, 0, b"")), Err(E::MalformedReply { .. })));
    assert!(matches!(asked(&reply(opt::GO, rep::ACK, 1, b"x")), Err(E::MalformedReply { .. })));
    assert!(matches!(asked(&reply(opt::GO, rep::INFO, 2, &[0, 0])), Err(E::MalformedReply { .. })));
    assert!(matches!(asked(&reply(opt::GO, rep::INFO, 1, &[0])), Err(E::MalformedReply { .. })));
    let mut zero = vec![0; 14];
    zero[1] = 3;
    assert!(matches!(asked(&reply(opt::GO, rep::INFO, 14, &zero)), Err(E::MalformedReply { .. })));

    let mut c = client::Handshake::new(true);
    assert!(matches!(c.handle_input(b"HTTP/1.1 400 Bad Request"), Err(E::BadGreeting { .. })));
    let mut c = client::Handshake::new(true);
    let old = [b"NBDMAGIC".as_slice(), &wire::CLISERV_MAGIC.to_be_bytes(), &[0; 136]].concat();
    assert_eq!(c.handle_input(&old), Err(E::UnknownStyle { got: wire::CLISERV_MAGIC }));
    let mut c = client::Handshake::new(true);
    assert_eq!(c.handle_input(b"NBDMAGICIHAVEOPT\x00\x03x"), Ok(18));
    assert_eq!(c.handle_input(b"x"), Err(E::Unsolicited));
}

#[test]
fn a_server_that_repeats_a_context_id_is_dropped() {
    let mut c = client::Handshake::new(true);
    c.handle_input(b"NBDMAGICIHAVEOPT\x00\x03").unwrap();
    c.set_meta_contexts("vol", &CONTEXTS).unwrap();
    let mut one = wire::REP_MAGIC.to_be_bytes().to_vec();
    [opt::SET_META_CONTEXT, rep::META_CONTEXT, 7, 5]
        .iter()
        .for_each(|n| one.extend_from_slice(&n.to_be_bytes()));
    one.extend_from_slice(b"a:b");
    assert_eq!(c.handle_input(&one), Ok(one.len()));
    assert!(matches!(c.handle_input(&one), Err(client::StreamError::MalformedReply { .. })));
}
