//! Handshakes against the specification: golden bytes both ways, and the rules about what goes with what.

mod support;

use nbd_proto::client::{ConnectError, Fact, Wish};
use nbd_proto::server::{Config, StreamError, Tls};
use nbd_proto::wire::{self, opt, rep};
use nbd_proto::{BlockSizes, HeaderMode, TransmissionFlags, client};
use support::client::connect;
use support::server::{CONTEXTS, SIZE, Server};

/// An option with its header, as a client sends it.
fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// A reply with its header, as a server sends it.
fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x00, 0x03, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9];
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn text(s: &str) -> Vec<u8> {
    let mut bytes = (s.len() as u32).to_be_bytes().to_vec();
    bytes.extend_from_slice(s.as_bytes());
    bytes
}

fn info_data(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut bytes = text(name);
    bytes.extend_from_slice(&(wanted.len() as u16).to_be_bytes());
    wanted.iter().for_each(|w| bytes.extend_from_slice(&w.to_be_bytes()));
    bytes
}

fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut bytes = text(name);
    bytes.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|q| bytes.extend_from_slice(&text(q)));
    bytes
}

/// A server past its greeting and the client's flags (fixed newstyle, no zeroes), its output empty.
fn server(config: Config) -> Server {
    let mut server = Server::new(config);
    server.feed(&[0, 0, 0, 3]);
    server.output.clear();
    server
}

/// What the server answers to the bytes.
fn answer(server: &mut Server, bytes: &[u8]) -> Vec<u8> {
    server.feed(bytes);
    std::mem::take(&mut server.output)
}

/// The type of each option reply in the bytes.
fn kinds(mut bytes: &[u8]) -> Vec<u32> {
    let mut kinds = Vec::new();
    while !bytes.is_empty() {
        let number = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        kinds.push(number(12));
        bytes = &bytes[20 + number(16) as usize..];
    }
    kinds
}

#[test]
fn the_greeting_is_fixed_newstyle_with_no_zeroes() {
    let server = Server::new(Config::default());
    assert_eq!(server.output, b"NBDMAGICIHAVEOPT\x00\x03");
}

#[test]
fn export_name_answers_size_and_flags_and_zeroes_unless_told_not_to() {
    // HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES, MULTI_CONN, CACHE, FAST_ZERO; no DF without structured replies.
    let mut golden = vec![0, 0, 0, 0, 0, 4, 0, 0, 0x0d, 0x6d];
    for (flags, zeroes) in [(3, 0), (2, 0), (1, 124), (0, 124)] {
        let mut server = Server::new(Config::default());
        server.output.clear();
        server.feed(&[0, 0, 0, flags]);
        golden.truncate(10);
        golden.resize(10 + zeroes, 0);
        assert_eq!(answer(&mut server, &option(opt::EXPORT_NAME, b"vol")), golden, "client flags {flags}");
        assert_eq!(server.negotiated().unwrap().mode, HeaderMode::Simple);
    }
}

#[test]
fn go_answers_what_was_asked_and_no_zeroes() {
    for flags in [1, 3] {
        let mut server = Server::new(Config::default());
        server.output.clear();
        server.feed(&[0, 0, 0, flags]);
        let mut golden = reply(opt::GO, rep::INFO, &[0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0x0d, 0x6d]);
        golden.extend(reply(opt::GO, rep::INFO, b"\0\x01vol"));
        golden.extend(reply(opt::GO, rep::INFO, b"\0\x02a volume"));
        golden.extend(reply(opt::GO, rep::INFO, &[0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 0, 2, 0, 0]));
        golden.extend(reply(opt::GO, rep::ACK, b""));
        // Asked twice and with a type nobody knows: still one answer each.
        let asked = option(opt::GO, &info_data("", &[1, 2, 3, 3, 0, 77]));
        assert_eq!(answer(&mut server, &asked), golden);
        assert!(server.negotiated().unwrap().knows_block_sizes);
    }
}

#[test]
fn info_answers_the_same_as_go_and_the_handshake_goes_on() {
    let mut server = server(Config::default());
    let mut golden = reply(opt::INFO, rep::INFO, &[0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0x0d, 0x6d]);
    golden.extend(reply(opt::INFO, rep::ACK, b""));
    assert_eq!(answer(&mut server, &option(opt::INFO, &info_data("vol", &[]))), golden);
    assert!(server.negotiated().is_none());
    let told = answer(&mut server, &option(opt::GO, &info_data("vol", &[])));
    assert_eq!(kinds(&told), [rep::INFO, rep::ACK]);
    assert!(!server.negotiated().unwrap().knows_block_sizes);
}

#[test]
fn list_tells_names_and_descriptions() {
    let mut server = server(Config::default());
    let mut golden = reply(opt::LIST, rep::SERVER, b"\0\0\0\x03vola volume");
    golden.extend(reply(opt::LIST, rep::SERVER, b"\0\0\0\x02ro"));
    golden.extend(reply(opt::LIST, rep::ACK, b""));
    assert_eq!(answer(&mut server, &option(opt::LIST, b"")), golden);
}

#[test]
fn abort_is_acknowledged_whatever_it_carries() {
    for data in [&b""[..], b"so long", &[0; 70_000]] {
        let mut server = server(Config::default());
        assert_eq!(answer(&mut server, &option(opt::ABORT, data)), reply(opt::ABORT, rep::ACK, b""));
        assert!(server.is_closed() && server.error().is_none());
    }
}

#[test]
fn unknown_options_are_unsupported_and_the_stream_stays_in_step() {
    let mut server = server(Config::default());
    for unknown in [0, opt::PEEK_EXPORT, 12, 0x7fff_ffff, u32::MAX] {
        for len in [0, 1, 1000, wire::MAX_OPTION_DATA, wire::MAX_OPTION_DATA + 1] {
            let told = answer(&mut server, &option(unknown, &vec![0xff; len]));
            assert_eq!(told, reply(unknown, rep::ERR_UNSUP, b""), "option {unknown} of {len} bytes");
        }
    }
    assert_eq!(kinds(&answer(&mut server, &option(opt::LIST, b""))).len(), 3);
}

#[test]
fn too_much_option_data_is_drained_and_answered_too_big() {
    let mut server = server(Config::default());
    answer(&mut server, &option(opt::STRUCTURED_REPLY, b""));
    for o in [opt::INFO, opt::GO, opt::LIST_META_CONTEXT, opt::SET_META_CONTEXT] {
        let told = answer(&mut server, &option(o, &vec![0; wire::MAX_OPTION_DATA + 1]));
        assert_eq!(kinds(&told), [rep::ERR_TOO_BIG], "option {o}");
    }
    let many = vec!["base:allocation"; wire::MAX_META_QUERIES as usize + 1];
    let told = answer(&mut server, &option(opt::SET_META_CONTEXT, &meta_data("vol", &many)));
    assert_eq!(kinds(&told), [rep::ERR_TOO_BIG]);
    let told = answer(&mut server, &option(opt::GO, &info_data("vol", &[])));
    assert_eq!(kinds(&told), [rep::INFO, rep::ACK]);
}

#[test]
fn options_that_take_no_data_are_invalid_with_some() {
    let mut server = server(Config::default());
    for o in [opt::LIST, opt::STRUCTURED_REPLY, opt::EXTENDED_HEADERS] {
        assert_eq!(kinds(&answer(&mut server, &option(o, b"x"))), [rep::ERR_INVALID], "option {o}");
        let long = option(o, &vec![0; wire::MAX_OPTION_DATA + 1]);
        assert_eq!(kinds(&answer(&mut server, &long)), [rep::ERR_INVALID], "option {o}");
    }
}

#[test]
fn malformed_info_and_meta_data_is_invalid_and_the_stream_stays_in_step() {
    let mut server = server(Config::default());
    answer(&mut server, &option(opt::STRUCTURED_REPLY, b""));
    let long_name = "n".repeat(wire::MAX_STRING + 1);
    for o in [opt::INFO, opt::GO, opt::LIST_META_CONTEXT, opt::SET_META_CONTEXT] {
        for data in
            [&b""[..], b"\0\0\0\x09vol\0\0", b"\xff\xff\xff\xffvol\0\0", b"\0\0\0\x01\xff\0\0\0\0", b"\0\0\0"]
        {
            assert_eq!(
                kinds(&answer(&mut server, &option(o, data))),
                [rep::ERR_INVALID],
                "option {o}: {data:?}"
            );
        }
        let data = if o < 8 { info_data(&long_name, &[]) } else { meta_data(&long_name, &[]) };
        assert_eq!(kinds(&answer(&mut server, &option(o, &data))), [rep::ERR_INVALID], "option {o}");
    }
}

#[test]
fn refusals_carry_their_reason_and_keep_the_session() {
    let mut server = server(Config::default());
    let told = answer(&mut server, &option(opt::GO, &info_data("none", &[])));
    assert_eq!(told, reply(opt::GO, rep::ERR_UNKNOWN, b"not today"));
    let told = answer(&mut server, &option(opt::INFO, &info_data("closing", &[])));
    assert_eq!(told, reply(opt::INFO, rep::ERR_SHUTDOWN, b"not today"));
    // Without TLS on offer the server must not ask for it.
    let told = answer(&mut server, &option(opt::GO, &info_data("secret", &[])));
    assert_eq!(told, reply(opt::GO, rep::ERR_POLICY, b"not today"));
    let told = answer(&mut server, &option(opt::GO, &info_data("vol", &[])));
    assert_eq!(kinds(&told), [rep::INFO, rep::ACK]);
}

#[test]
fn export_name_of_a_refused_export_ends_the_connection() {
    let mut server = server(Config::default());
    assert!(answer(&mut server, &option(opt::EXPORT_NAME, b"none")).is_empty());
    assert_eq!(server.error(), Some(&StreamError::ExportRefused { name: "none".to_owned() }));
}

#[test]
fn meta_contexts_need_chunks_first() {
    let mut server = server(Config::default());
    for o in [opt::LIST_META_CONTEXT, opt::SET_META_CONTEXT] {
        let told = answer(&mut server, &option(o, &meta_data("vol", &["base:allocation"])));
        assert_eq!(kinds(&told), [rep::ERR_INVALID]);
    }
}

#[test]
fn listing_contexts_knows_wildcards_and_setting_them_does_not() {
    let mut server = server(Config::default());
    answer(&mut server, &option(opt::EXTENDED_HEADERS, b""));
    let count = |server: &mut Server, o, queries: &[&str]| {
        kinds(&answer(server, &option(o, &meta_data("vol", queries)))).len() - 1
    };
    let list = opt::LIST_META_CONTEXT;
    assert_eq!(count(&mut server, list, &[]), 3);
    assert_eq!(count(&mut server, list, &["base:"]), 1);
    assert_eq!(count(&mut server, list, &["x-horcrux:"]), 2);
    assert_eq!(count(&mut server, list, &["x-horcrux:", "x-horcrux:dirty"]), 2);
    assert_eq!(count(&mut server, list, &["qemu:dirty-bitmap:b0", "nocolon", "base:none"]), 0);
    let set = opt::SET_META_CONTEXT;
    assert_eq!(count(&mut server, set, &[]), 0);
    assert_eq!(count(&mut server, set, &["base:", "x-horcrux:"]), 0);
    assert_eq!(count(&mut server, set, &["x-horcrux:cached", "base:allocation", "base:allocation"]), 2);

    let golden = |o, id| {
        let mut bytes = reply(o, rep::META_CONTEXT, format!("\0\0\0{id}base:allocation").as_bytes());
        bytes.extend(reply(o, rep::ACK, b""));
        bytes
    };
    let told = answer(&mut server, &option(list, &meta_data("vol", &["base:"])));
    assert_eq!(told, golden(list, '\0'));
    let told = answer(&mut server, &option(set, &meta_data("vol", &["base:allocation"])));
    assert_eq!(told, golden(set, '\u{1}'));
}

#[test]
fn contexts_hold_only_for_the_export_they_were_set_for_and_until_set_again() {
    let selected = |steps: &[Vec<u8>], go: &str| {
        let mut server = server(Config::default());
        answer(&mut server, &option(opt::EXTENDED_HEADERS, b""));
        steps.iter().for_each(|s| drop(answer(&mut server, s)));
        answer(&mut server, &option(opt::GO, &info_data(go, &[])));
        let negotiated = server.negotiated().unwrap();
        let payload = negotiated.flags.contains(TransmissionFlags::BLOCK_STAT_PAYLOAD);
        assert_eq!(payload, !negotiated.contexts.is_empty());
        negotiated.contexts.len()
    };
    let set = |name: &str, queries: &[&str]| option(opt::SET_META_CONTEXT, &meta_data(name, queries));
    assert_eq!(selected(&[], "vol"), 0);
    assert_eq!(selected(&[set("vol", &CONTEXTS)], "vol"), 3);
    assert_eq!(selected(&[set("ro", &CONTEXTS)], "vol"), 0);
    assert_eq!(selected(&[set("vol", &CONTEXTS), set("vol", &["base:allocation"])], "vol"), 1);
    assert_eq!(selected(&[set("vol", &CONTEXTS), set("none", &CONTEXTS)], "vol"), 0, "a failed SET clears");
    let malformed = option(opt::SET_META_CONTEXT, b"x");
    assert_eq!(selected(&[set("vol", &CONTEXTS), malformed], "vol"), 0, "a malformed SET clears");
    let oversized = option(opt::SET_META_CONTEXT, &vec![0; wire::MAX_OPTION_DATA + 1]);
    assert_eq!(selected(&[set("vol", &CONTEXTS), oversized], "vol"), 0, "an oversized SET clears");
    let list = option(opt::LIST_META_CONTEXT, &meta_data("vol", &[]));
    assert_eq!(selected(&[set("vol", &CONTEXTS), list], "vol"), 3, "a LIST does not");
}

#[test]
fn extended_headers_outrank_structured_replies_and_forbid_export_name() {
    let mut server = server(Config::default());
    assert_eq!(kinds(&answer(&mut server, &option(opt::STRUCTURED_REPLY, b""))), [rep::ACK]);
    assert_eq!(kinds(&answer(&mut server, &option(opt::EXTENDED_HEADERS, b""))), [rep::ACK]);
    assert_eq!(kinds(&answer(&mut server, &option(opt::STRUCTURED_REPLY, b""))), [rep::ERR_EXT_HEADER_REQD]);
    server.feed(&option(opt::EXPORT_NAME, b"vol"));
    assert_eq!(server.error(), Some(&StreamError::ExportNameAfterExtendedHeaders));
}

#[test]
fn what_is_not_configured_is_unsupported() {
    let mut server = server(Config { tls: Tls::Off, structured_replies: false, extended_headers: false });
    for o in [opt::STRUCTURED_REPLY, opt::EXTENDED_HEADERS, opt::STARTTLS] {
        assert_eq!(answer(&mut server, &option(o, b"")), reply(o, rep::ERR_UNSUP, b""));
    }
}

#[test]
fn starttls_forgets_what_was_agreed_before() {
    let config = Config { tls: Tls::Offered, ..Config::default() };
    let mut server = server(config);
    answer(&mut server, &option(opt::EXTENDED_HEADERS, b""));
    answer(&mut server, &option(opt::SET_META_CONTEXT, &meta_data("secret", &CONTEXTS)));
    let told = answer(&mut server, &option(opt::GO, &info_data("secret", &[])));
    assert_eq!(kinds(&told), [rep::ERR_TLS_REQD]);
    assert_eq!(answer(&mut server, &option(opt::STARTTLS, b"")), reply(opt::STARTTLS, rep::ACK, b""));
    assert_eq!(kinds(&answer(&mut server, &option(opt::STARTTLS, b""))), [rep::ERR_INVALID]);
    let told = answer(&mut server, &option(opt::GO, &info_data("secret", &[])));
    assert_eq!(kinds(&told), [rep::INFO, rep::ACK]);
    let negotiated = server.negotiated().unwrap();
    assert_eq!(
        (negotiated.mode, negotiated.contexts.len(), negotiated.secure),
        (HeaderMode::Simple, 0, true)
    );
}

#[test]
fn a_server_that_requires_tls_answers_nothing_else_without_it() {
    let config = Config { tls: Tls::Required, ..Config::default() };
    let mut plain = server(config);
    let info = info_data("vol", &[]);
    for (o, data) in
        [(opt::LIST, &b""[..]), (opt::INFO, &info), (opt::GO, &info), (opt::STRUCTURED_REPLY, b""), (99, b"")]
    {
        assert_eq!(kinds(&answer(&mut plain, &option(o, data))), [rep::ERR_TLS_REQD], "option {o}");
    }
    let long = option(opt::GO, &vec![0; wire::MAX_OPTION_DATA + 1]);
    assert_eq!(kinds(&answer(&mut plain, &long)), [rep::ERR_TLS_REQD]);
    assert_eq!(kinds(&answer(&mut plain, &option(opt::STARTTLS, b""))), [rep::ACK]);
    assert_eq!(kinds(&answer(&mut plain, &option(opt::GO, &info))), [rep::INFO, rep::ACK]);

    let mut old = server(config);
    old.feed(&option(opt::EXPORT_NAME, b"vol"));
    assert_eq!(old.error(), Some(&StreamError::TlsRequired));
    let mut not_fixed = Server::new(config);
    not_fixed.feed(&[0, 0, 0, 0]);
    assert_eq!(not_fixed.error(), Some(&StreamError::TlsRequired));
    let mut gone = server(config);
    assert_eq!(kinds(&answer(&mut gone, &option(opt::ABORT, b""))), [rep::ACK]);
}

#[test]
fn a_client_gets_the_best_headers_both_know_at_every_cut() {
    use HeaderMode::{Extended, Simple, Structured};
    for (wanted, structured_replies, extended_headers, expected) in [
        (Extended, true, true, Extended),
        (Extended, true, false, Structured),
        (Extended, false, false, Simple),
        (Structured, true, true, Structured),
        (Structured, false, true, Simple),
        (Simple, true, true, Simple),
    ] {
        let config = Config { tls: Tls::Off, structured_replies, extended_headers };
        for old_style_name in [false, true] {
            for step in [1, 2, 3, 5, 7, 16, 20, 1000] {
                let wish = Wish {
                    name: "vol".to_owned(),
                    mode: wanted,
                    contexts: CONTEXTS.map(str::to_owned).to_vec(),
                    old_style_name: old_style_name && expected != Extended,
                    zeroes: step % 2 == 0,
                };
                let pair = connect(config, wish, step);
                assert_eq!(pair.mode, expected);
                assert_eq!(pair.contexts.len(), if expected == Simple { 0 } else { 3 });
            }
        }
    }
}

#[test]
fn a_client_sends_what_the_specification_asks_and_reads_what_it_tells() {
    let mut c = client::Handshake::new(true);
    let greeting = b"NBDMAGICIHAVEOPT\x00\x03";
    for cut in 0..greeting.len() {
        assert_eq!(c.handle_input(&greeting[cut..=cut]), Ok(1));
    }
    assert_eq!(c.poll_event(), Some(client::Event::Ready { fixed_newstyle: true }));
    assert_eq!(std::mem::take(c.output()), [0, 0, 0, 3]);

    c.list().unwrap();
    assert_eq!(c.list(), Err(client::UsageError::NotNow));
    assert_eq!(std::mem::take(c.output()), option(opt::LIST, b""));
    let mut bytes = reply(opt::LIST, rep::SERVER, b"\0\0\0\x03vola volume");
    bytes.extend(reply(opt::LIST, rep::ACK, b""));
    assert_eq!(c.handle_input(&bytes), Ok(bytes.len()));
    let (name, description) = ("vol".to_owned(), "a volume".to_owned());
    assert_eq!(c.poll_event(), Some(client::Event::Export { name, description }));
    assert_eq!(c.poll_event(), Some(client::Event::Accepted { option: opt::LIST }));

    c.go("vol").unwrap();
    assert_eq!(std::mem::take(c.output()), option(opt::GO, &info_data("vol", &[1, 2, 3])));
    let mut bytes = reply(opt::GO, rep::INFO, &[0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 1]);
    bytes.extend(reply(opt::GO, rep::INFO, &[0, 99, 1, 2, 3]));
    bytes.extend(reply(opt::GO, rep::INFO, &[0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 0, 2, 0, 0]));
    bytes.extend(reply(opt::GO, rep::ACK, b""));
    assert_eq!(c.handle_input(&bytes), Ok(bytes.len()));
    let flags = TransmissionFlags::HAS_FLAGS;
    assert_eq!(c.poll_event(), Some(client::Event::Fact(Fact::Export { size: SIZE as u64, flags })));
    let sizes = BlockSizes::new(1, 4096, 128 * 1024).unwrap();
    assert_eq!(c.poll_event(), Some(client::Event::Fact(Fact::BlockSizes(sizes))));
    let Some(client::Event::Done(negotiated)) = c.poll_event() else { panic!("not done") };
    assert_eq!((negotiated.size, negotiated.block_sizes), (SIZE as u64, Some(sizes)));
}

#[test]
fn a_client_falls_back_to_export_name_where_go_is_unknown() {
    let mut c = client::Connect::new(Wish { name: "vol".to_owned(), ..Wish::default() });
    c.handle_input(b"NBDMAGICIHAVEOPT\x00\x03").unwrap();
    c.output().clear();
    c.handle_input(&reply(opt::GO, rep::ERR_UNSUP, b"what?")).unwrap();
    assert_eq!(std::mem::take(c.output()), option(opt::EXPORT_NAME, b"vol"));
    c.handle_input(&[0, 0, 0, 0, 0, 4, 0, 0, 0, 1]).unwrap();
    assert_eq!(c.negotiated().unwrap().size, SIZE as u64);

    // A server of plain newstyle knows nothing else.
    let mut c = client::Connect::new(Wish { name: "vol".to_owned(), ..Wish::default() });
    c.handle_input(b"NBDMAGICIHAVEOPT\x00\x00").unwrap();
    assert_eq!(c.output()[..4], [0, 0, 0, 0]);
    assert_eq!(c.output()[4..], option(opt::EXPORT_NAME, b"vol"));
    let mut told = vec![0; 134];
    told[9] = 1;
    assert_eq!(c.handle_input(&told), Ok(134));
    assert!(c.negotiated().is_some());
}

#[test]
fn a_client_tells_why_an_export_was_refused() {
    let mut c = client::Connect::new(Wish { name: "vol".to_owned(), ..Wish::default() });
    c.handle_input(b"NBDMAGICIHAVEOPT\x00\x03").unwrap();
    let error = c.handle_input(&reply(opt::GO, rep::ERR_UNKNOWN, b"try AMCC")).unwrap_err();
    assert!(matches!(error, ConnectError::Refused { .. }));
    assert_eq!(error.to_string(), "no such export: try AMCC");
}
