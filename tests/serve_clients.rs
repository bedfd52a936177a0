//! Other people's clients, and one of our own for what they lack, on a running server.
//!
//! Each reads and writes through its own idea of the protocol; what they see is compared with the bytes the image was made of.

#![allow(clippy::unwrap_used)]

mod harness;

use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command as Program;
use std::time::Duration;

use harness::{Client, Image, PAGE, Serve, Server, need, noise, run, until};
use nbd_proto::client::Wish;
use nbd_proto::{Command, CommandFlags, Errno, HeaderMode, StatusQuery};
use serde_json::Value;

const MIB: usize = 1 << 20;
const NONE: CommandFlags = CommandFlags::NONE;

#[track_caller]
fn program(name: &str, args: &[&str]) -> String {
    run(Program::new(name).args(args)).ok()
}

/// Runs Python in nbdsh with a handle `h` that is connected to `uri`.
#[track_caller]
fn nbdsh(uri: &str, code: &str) -> String {
    run(harness::nbdsh().args(["-u", uri, "-c", code])).ok()
}

/// Runs Python in nbdsh with a handle `h` that is to be connected to `uri`.
#[track_caller]
fn nbdsh_unconnected(uri: &str, code: &str) -> String {
    run(harness::nbdsh().args(["-c", &format!("uri = '{uri}'\n{code}")])).ok()
}

/// The extents `nbdinfo --map` tells of a context: offset, length, flags.
#[track_caller]
fn map(uri: &str, context: &str) -> Vec<(u64, u64, u64)> {
    let json: Value =
        serde_json::from_str(&program("nbdinfo", &["--json", &format!("--map={context}"), uri])).unwrap();
    let number = |extent: &Value, field: &str| extent[field].as_u64().unwrap();
    json.as_array()
        .unwrap()
        .iter()
        .map(|extent| (number(extent, "offset"), number(extent, "length"), number(extent, "type")))
        .collect()
}

fn bytes_with(map: &[(u64, u64, u64)], flags: u64) -> u64 {
    map.iter().filter(|extent| extent.2 == flags).map(|extent| extent.1).sum()
}

/// The whole export, read by nbdcopy.
#[track_caller]
fn copy_out(uri: &str, dir: &Path) -> Vec<u8> {
    let to = dir.join("copied");
    program("nbdcopy", &[uri, to.to_str().unwrap()]);
    std::fs::read(to).unwrap()
}

#[test]
fn nbdinfo_tells_what_is_served_and_what_is_where() {
    if !need(&["nbdinfo"]) {
        return;
    }
    let image = Image::sparse();
    let server = Serve::disk(&image).start();
    let uri = server.uri("disk");
    assert!(server.said[0].starts_with("serving disk (16.0 MiB, commit "), "{:?}", server.said);
    let json: Value = serde_json::from_str(&program("nbdinfo", &["--json", &uri])).unwrap();
    let export = &json["exports"][0];
    assert_eq!(export["export-size"], 16 * MIB as u64);
    assert_eq!(export["export-name"], "disk");
    let description = export["description"].as_str().unwrap();
    assert!(description.starts_with("disk at ") && description.ends_with(image.repo().to_str().unwrap()));
    for can in ["cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"] {
        assert_eq!(export[format!("can_{can}")], true, "{can}");
    }
    assert_eq!(export["is_read_only"], false);
    assert_eq!(export["is_rotational"], false);
    assert_eq!(
        (&export["block_size_minimum"], &export["block_size_preferred"], &export["block_size_maximum"]),
        (&1.into(), &4096.into(), &(32 * MIB as u64).into())
    );
    let listed = program("nbdinfo", &["--list", &uri]);
    for context in ["base:allocation", "x-horcrux:dirty", "x-horcrux:cached"] {
        assert!(listed.contains(context), "{listed}");
    }
    // The holes it was made with, to the chunk.
    let holes: Vec<(u64, u64, u64)> =
        Image::HOLES.iter().map(|hole| (hole.start as u64, hole.len() as u64, 3)).collect();
    let told = map(&uri, "base:allocation");
    assert_eq!(told.iter().filter(|extent| extent.2 != 0).copied().collect::<Vec<_>>(), holes);
    let totals = program("nbdinfo", &["--map", "--totals", &uri]);
    assert!(totals.contains("hole,zero") && totals.contains("data"), "{totals}");
    assert_eq!(map(&uri, "x-horcrux:dirty"), [(0, 16 * MIB as u64, 0)]);
    // nbdinfo looked at the first bytes; beside these only the holes need no repository.
    let here: u64 = bytes_with(&map(&uri, "x-horcrux:cached"), 1);
    let holes: u64 = holes.iter().map(|hole| hole.1).sum();
    assert!((holes..holes + MIB as u64).contains(&here), "{here} bytes are cached");
    server.stop();
}

#[test]
fn the_uri_it_prints_is_one_a_client_takes_wherever_the_socket_is() {
    if !need(&["nbdinfo"]) {
        return;
    }
    let image = Image::sparse();
    let state = image.dir().join("a state & more?#%41");
    let server = Serve::new(&image.repo(), &state).name("disk").start();
    let uri = server.said[1].trim();
    assert!(uri.starts_with("nbd+unix:///disk?socket=/"), "{uri}");
    assert_eq!(program("nbdinfo", &["--size", uri]).trim(), (16 << 20).to_string());
    server.stop();
}

#[test]
fn nbdcopy_copies_out_what_went_in_and_in_what_it_is_given() {
    if !need(&["nbdcopy", "nbdinfo"]) {
        return;
    }
    let image = Image::sparse();
    let server = Serve::disk(&image).start();
    let uri = server.uri("disk");
    assert!(copy_out(&uri, image.dir()) == image.raw, "another image came out");
    assert_eq!(bytes_with(&map(&uri, "x-horcrux:cached"), 1), 16 * MIB as u64, "all of it was read");
    let mut other = noise(7, 16 * MIB);
    other[4 * MIB..6 * MIB].fill(0);
    let from = image.dir().join("other");
    std::fs::write(&from, &other).unwrap();
    program("nbdcopy", &["--flush", from.to_str().unwrap(), &uri]);
    assert!(copy_out(&uri, image.dir()) == other);
    let dirty = map(&uri, "x-horcrux:dirty");
    assert_eq!(bytes_with(&dirty, 1), 14 * MIB as u64, "{dirty:?}");
    assert_eq!(bytes_with(&dirty, 3), 2 * MIB as u64, "{dirty:?}");
    server.stop();
}

#[test]
fn serving_again_continues_the_delta_and_says_the_same() {
    if !need(&["nbdinfo", "nbdsh", "nbdcopy"]) {
        return;
    }
    let image = Image::sparse();
    let server = Serve::disk(&image).start();
    let uri = server.uri("disk");
    nbdsh(
        &uri,
        "h.pwrite(b'x' * 10000, 5 * 2**20 - 3000)\nh.zero(2**20, 12 * 2**20)\nh.trim(4096, 0)\nh.shutdown()",
    );
    let mut expected = image.raw.clone();
    expected[5 * MIB - 3000..5 * MIB + 7000].fill(b'x');
    expected[12 * MIB..13 * MIB].fill(0);
    expected[..4096].fill(0);
    let said = |server: &Server| {
        let uri = server.uri("disk");
        let contexts = ["base:allocation", "x-horcrux:dirty"].map(|context| map(&uri, context));
        (program("nbdinfo", &["--json", &uri]).replace(&uri, ""), contexts)
    };
    assert!(copy_out(&uri, image.dir()) == expected);
    let before = said(&server);
    server.stop();
    let again = Serve::disk(&image).start();
    assert_eq!(said(&again), before);
    assert!(copy_out(&again.uri("disk"), image.dir()) == expected);
    // Read only now: the same bytes, and no writes.
    again.stop();
    let read_only = Serve::disk(&image).arg("--read-only").start();
    assert!(copy_out(&read_only.uri("disk"), image.dir()) == expected);
    let fresh_state = image.dir().join("fresh");
    let fresh = Serve::new(&image.repo(), &fresh_state).name("disk").start();
    assert!(copy_out(&fresh.uri("disk"), image.dir()) == image.raw, "the repository was not touched");
}

const NBDSH_STATUS: &str = r#"
def status(offset, length, flags=0):
    found = {}
    def extents(context, at, entries, error):
        found[context] = entries
    h.block_status(length, offset, extents, flags)
    return found
"#;

#[test]
fn nbdsh_reads_whole_and_in_pieces_and_is_told_of_holes() {
    if !need(&["nbdsh"]) {
        return;
    }
    let image = Image::sparse();
    let server = Serve::disk(&image).start();
    let code = r#"
raw = open('RAW', 'rb').read()
M = 2**20
# Across an edge of data and hole: pieces of both kinds, and with DF one.
for flags in (0, nbd.CMD_FLAG_DF):
    for offset, length in ((0, 1), (5 * M - 100, 300), (4 * M, 8 * M), (11 * M + 2**19 - 1, 2), (16 * M - 5, 5)):
        kinds = []
        def chunk(data, at, kind, error):
            kinds.append(kind)
        got = h.pread_structured(length, offset, chunk, flags)
        assert got == raw[offset:offset + length], (offset, length)
        if flags:
            assert kinds == [nbd.READ_DATA], kinds
        elif length == 300:
            assert sorted(kinds) == [nbd.READ_DATA, nbd.READ_HOLE], kinds
try:
    h.pread(10, 16 * M - 5)
    assert False
except nbd.Error as error:
    assert error.errno == 'EINVAL', error
h.pwrite(b'fua' * 1000, 123, nbd.CMD_FLAG_FUA)
h.flush()
assert h.pread(3000, 123) == b'fua' * 1000
assert h.pread(123, 0) == raw[:123]
# Several requests in flight on one connection.
buffers = [nbd.Buffer(4096) for _ in range(64)]
cookies = [h.aio_pread(buffer, 12 * M + 4096 * i) for i, buffer in enumerate(buffers)]
while h.aio_in_flight():
    h.poll(1000)
for i, buffer in enumerate(buffers):
    assert buffer.to_bytearray() == raw[12 * M + 4096 * i:12 * M + 4096 * (i + 1)]
h.shutdown()
"#;
    nbdsh(&server.uri("disk"), &code.replace("RAW", image.raw_file().to_str().unwrap()));
    server.stop();
}

#[test]
fn nbdsh_zeroes_and_trims_as_flags_say_and_sees_it_in_the_contexts() {
    if !need(&["nbdsh"]) {
        return;
    }
    let image = Image::sparse();
    let server = Serve::disk(&image).start();
    let code = NBDSH_STATUS.to_owned()
        + r#"
h.add_meta_context('base:allocation')
h.add_meta_context('x-horcrux:dirty')
h.connect_uri(uri)
M = 2**20
A, D = 'base:allocation', 'x-horcrux:dirty'
one = nbd.CMD_FLAG_REQ_ONE
assert status(0, 16 * M)[A] == [5 * M, 0, 6 * M + 2**19, 3, 2 * M + 2**19, 0, 2 * M, 3]
assert status(0, 16 * M, one)[A] == [5 * M, 0]
assert status(4 * M, 2**16, one)[A] == [2**16, 0], 'REQ_ONE tells no more than was asked'
h.zero(2**16, M)
assert status(M, 2**16)[A] == [2**16, 3] and status(M, 2**16)[D] == [2**16, 3]
h.zero(2**16, 2 * M, nbd.CMD_FLAG_NO_HOLE)
assert status(2 * M, 2**16)[A] == [2**16, 0] and status(2 * M, 2**16)[D] == [2**16, 1]
h.trim(2**16, 3 * M, nbd.CMD_FLAG_FUA)
assert status(3 * M, 2**16)[A] == [2**16, 3] and status(3 * M, 2**16)[D] == [2**16, 3]
h.zero(8 * M, 0, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_FUA)
assert h.pread(8 * M, 0) == bytearray(8 * M)
# Not on a page's edge: what is beside it stays.
h.pwrite(b'y' * 12288, 12 * M)
h.zero(5000, 12 * M + 100)
assert h.pread(12288, 12 * M) == b'y' * 100 + bytearray(5000) + b'y' * (12288 - 5100)
h.trim(1, 16 * M - 1)
h.shutdown()
"#;
    nbdsh_unconnected(&server.uri("disk"), &code);
    server.stop();
}

#[test]
fn the_cache_command_fetches_for_real() {
    if !need(&["nbdsh"]) {
        return;
    }
    let image = Image::sparse();
    let server = Serve::disk(&image).start();
    let code = NBDSH_STATUS.to_owned()
        + r#"
h.add_meta_context('x-horcrux:cached')
h.connect_uri(uri)
M = 2**20
assert status(M, 4 * M)['x-horcrux:cached'] == [4 * M, 0]
h.cache(2 * M, M)
assert status(M, 4 * M)['x-horcrux:cached'] == [2 * M, 1, 2 * M, 0]
h.shutdown()
"#;
    nbdsh_unconnected(&server.uri("disk"), &code);
    // It is in the cache, not only said to be: without the repository it still reads.
    std::fs::rename(image.repo(), image.dir().join("away")).unwrap();
    let mut client = Client::open(&server, "disk");
    assert!(client.read(MIB as u64, 2 * MIB).unwrap() == image.raw[MIB..3 * MIB]);
    let (errno, message) = client.read(4 * MIB as u64, PAGE).unwrap_err();
    assert_eq!(errno, Errno::Io, "{message}");
    std::fs::rename(image.dir().join("away"), image.repo()).unwrap();
    assert!(client.read(4 * MIB as u64, PAGE).unwrap() == image.raw[4 * MIB..4 * MIB + PAGE], "it is back");
    client.disconnect();
    server.stop();
}

#[test]
fn libnbd_without_structured_replies_and_without_no_zeroes_is_served_too() {
    if !need(&["nbdsh"]) {
        return;
    }
    let image = Image::sparse();
    let server = Serve::disk(&image).start();
    let code = r#"
raw = open('RAW', 'rb').read()
flags = nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE | nbd.HANDSHAKE_FLAG_NO_ZEROES
def check(structured, handshake):
    h = nbd.NBD()
    h.set_request_structured_replies(structured)
    h.set_handshake_flags(handshake)
    h.connect_uri(uri)
    assert h.get_structured_replies_negotiated() == structured
    assert h.get_size() == len(raw)
    assert h.pread(3 * 2**20, 4 * 2**20) == raw[4 * 2**20:7 * 2**20]
    h.pwrite(b'z' * 5000, 3000)
    h.flush()
    assert h.pread(5000, 3000) == b'z' * 5000
    if not structured:
        assert not h.can_df()
    h.shutdown()
check(True, flags)
check(False, flags)
check(True, nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE)
check(False, nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE)
# Not even fixed newstyle: EXPORT_NAME with its 124 zeroes.
check(False, 0)
"#;
    nbdsh_unconnected(&server.uri("disk"), &code.replace("RAW", image.raw_file().to_str().unwrap()));
    server.stop();
}

#[test]
fn a_flush_on_one_connection_covers_what_another_was_told_is_written() {
    if !need(&["nbdsh"]) {
        return;
    }
    let image = Image::sparse();
    let mut server = Serve::disk(&image).start();
    let code = r#"
others = []
for i in range(4):
    other = nbd.NBD()
    other.connect_uri(uri)
    assert other.can_multi_conn()
    other.pwrite(bytes([i + 1]) * 8192, i * 2**20)
    others.append(other)
h.connect_uri(uri)
for i in range(4):
    assert h.pread(8192, i * 2**20) == bytes([i + 1]) * 8192
h.flush()
"#;
    nbdsh_unconnected(&server.uri("disk"), code);
    server.kill();
    let server = Serve::disk(&image).start();
    let mut client = Client::open(&server, "disk");
    for i in 0..4 {
        assert!(client.read((i * MIB) as u64, 8192).unwrap() == [i as u8 + 1; 8192], "connection {i}");
    }
    client.disconnect();
    server.stop();
}

#[test]
fn qemu_img_reads_maps_compares_and_converts() {
    if !need(&["qemu-img"]) {
        return;
    }
    let image = Image::sparse();
    let server = Serve::disk(&image).start();
    let (uri, raw) = (server.uri("disk"), image.raw_file());
    let info: Value =
        serde_json::from_str(&program("qemu-img", &["info", "--output=json", "-f", "raw", &uri])).unwrap();
    assert_eq!(info["virtual-size"], 16 * MIB as u64);
    let map: Value =
        serde_json::from_str(&program("qemu-img", &["map", "--output=json", "-f", "raw", &uri])).unwrap();
    let holes: Vec<(u64, u64)> = map
        .as_array()
        .unwrap()
        .iter()
        .filter(|extent| extent["zero"] == true)
        .map(|extent| (extent["start"].as_u64().unwrap(), extent["length"].as_u64().unwrap()))
        .collect();
    assert_eq!(holes, Image::HOLES.map(|hole| (hole.start as u64, hole.len() as u64)));
    let raw = raw.to_str().unwrap();
    program("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, raw]);
    let qcow2 = image.dir().join("copy.qcow2");
    let qcow2 = qcow2.to_str().unwrap();
    program("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, qcow2]);
    program("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", raw, qcow2]);
    // And into the export: -n, it is there already.
    let other = image.dir().join("other");
    std::fs::write(&other, noise(3, 16 * MIB)).unwrap();
    let other = other.to_str().unwrap();
    program("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", other, &uri]);
    program("qemu-img", &["compare", "-f", "raw", "-F", "raw", other, &uri]);
    server.stop();
}

#[test]
fn qemu_io_finds_the_patterns_it_wrote() {
    if !need(&["qemu-io", "nbdinfo"]) {
        return;
    }
    let image = Image::sparse();
    let server = Serve::disk(&image).start();
    let uri = server.uri("disk");
    let commands = [
        "write -P 0x5a 1000 100000",
        "write -f -P 0x5b 5M 3M",
        "write -z -u 12M 256k",
        "write -z 13M 256k",
        "discard 1M 128k",
        "flush",
        "read -P 0x5a 1000 100000",
        "read -P 0x5b 5M 3M",
        "read -P 0 12M 256k",
        "read -P 0 13M 256k",
        "read -P 0 1M 128k",
        "aio_write -P 0x77 4M 64k",
        "aio_write -P 0x78 4160k 64k",
        "aio_flush",
        "read -P 0x77 4M 64k",
        "read -P 0x78 4160k 64k",
    ];
    let mut args = vec!["-f", "raw"];
    commands.iter().for_each(|command| args.extend(["-c", command]));
    args.push(&uri);
    let printed = program("qemu-io", &args);
    assert!(!printed.contains("failed"), "{printed}");
    // With unmap a hole, without it space that is taken.
    let allocation = map(&uri, "base:allocation");
    let at = |offset: usize| {
        let offset = offset as u64;
        allocation.iter().find(|extent| (extent.0..extent.0 + extent.1).contains(&offset)).unwrap().2
    };
    assert_eq!((at(12 * MIB), at(13 * MIB), at(MIB)), (3, 0, 3));
    assert_eq!(at(6 * MIB), 0, "a hole was written to");
    server.stop();
}

#[test]
fn the_nbd_crate_reads_and_writes() {
    let image = Image::sparse();
    let server = Serve::disk(&image).start();
    let mut socket = UnixStream::connect(&server.socket).unwrap();
    socket.set_read_timeout(Some(harness::PATIENCE)).unwrap();
    let export = nbd::client::handshake(&mut socket, b"disk").unwrap();
    assert_eq!(export.size, 16 * MIB as u64);
    let mut client = nbd::client::NbdClient::new(&mut socket, &export);
    let mut block = vec![0; MIB];
    client.seek(SeekFrom::Start(4 * MIB as u64 + 512 * 1024)).unwrap();
    client.read_exact(&mut block).unwrap();
    assert!(block == image.raw[4 * MIB + 512 * 1024..5 * MIB + 512 * 1024]);
    client.seek(SeekFrom::Start(7000)).unwrap();
    client.write_all(&noise(9, 9000)).unwrap();
    client.seek(SeekFrom::Start(0)).unwrap();
    client.read_exact(&mut block).unwrap();
    assert!(block[..7000] == image.raw[..7000] && block[7000..16000] == noise(9, 9000));
    drop(socket);
    server.logs("connection closed");
    assert!(server.lines("WARN").is_empty(), "closing the socket is no reason to warn: {}", server.log());
    server.stop();
}

#[test]
fn extended_headers_carry_every_command_over_unix_and_tcp() {
    let image = Image::sparse();
    let server = Serve::disk(&image).tcp(&image.dir().join("sock")).start();
    let contexts = ["base:allocation", "x-horcrux:dirty", "x-horcrux:cached"];
    let wish = Wish {
        name: "disk".to_owned(),
        mode: HeaderMode::Extended,
        contexts: contexts.map(str::to_owned).to_vec(),
        ..Wish::default()
    };
    let over_unix = Client::connect(&server, wish.clone()).unwrap();
    let over_tcp = Client::connect_tcp(&server, wish).unwrap();
    for mut client in [over_unix, over_tcp] {
        assert_eq!(client.negotiated.mode, HeaderMode::Extended);
        let selected = &client.negotiated.contexts;
        let ids = contexts.map(|name| selected.iter().find(|context| context.name == name).unwrap().id);
        let len = 16 * MIB as u64;
        let read = client.call(Command::Read, 4 * MIB as u64, 4 * MIB as u64, NONE, &[]).unwrap();
        assert!(read.result.is_ok() && read.data == image.raw[4 * MIB..8 * MIB]);
        assert_eq!(read.holes, 3 * MIB as u64);
        let status = client.call(Command::BlockStatus, 0, len, NONE, &[]).unwrap();
        assert_eq!(status.extents.len(), 3, "all contexts that were selected");
        let some = client.query(0, &StatusQuery { length: len, ids: vec![ids[1]] }).unwrap();
        assert_eq!(some.extents.len(), 1);
        assert_eq!(some.extents[0].0, ids[1]);
        let unknown = client.query(0, &StatusQuery { length: len, ids: vec![ids[1], 999] }).unwrap();
        assert_eq!(unknown.result, Err(Errno::Inval));
        client.write(5000, b"extended").unwrap();
        assert_eq!(client.read(5000, 8).unwrap(), b"extended");
        for (command, flags) in [
            (Command::Trim, CommandFlags::FUA),
            (Command::WriteZeroes, CommandFlags::NO_HOLE),
            (Command::WriteZeroes, CommandFlags::FAST_ZERO),
            (Command::Cache, NONE),
        ] {
            let answer = client.call(command, 0, MIB as u64, flags, &[]).unwrap();
            assert_eq!(answer.result, Ok(()), "{command:?}");
        }
        assert_eq!(client.read(0, MIB).unwrap(), vec![0; MIB]);
        client.write(0, &image.raw[..MIB]).unwrap();
        client.flush().unwrap();
        let unknown = client.call(Command::Unknown(77), 0, 1, NONE, &[]).unwrap();
        assert_eq!(unknown.result, Err(Errno::Inval), "and the stream stays in step:");
        assert!(client.read(0, MIB).unwrap() == image.raw[..MIB]);
        client.disconnect();
    }
    server.stop();
}

#[test]
fn many_requests_of_one_connection_are_answered_whatever_their_order() {
    let image = Image::sparse();
    let server = Serve::disk(&image).start();
    let mut client = Client::open(&server, "disk");
    // Cold and warm: what must wait does not hold up what need not.
    let mut expected = std::collections::HashMap::new();
    for i in 0..300usize {
        let at = (i * 7919 * PAGE) % (15 * MIB);
        let cookie = client.submit(Command::Read, at as u64, 2 * PAGE as u64, NONE, &[]).unwrap();
        expected.insert(cookie, at);
    }
    for _ in 0..300 {
        let answer = client.answer().unwrap();
        let at = expected.remove(&answer.cookie).unwrap();
        assert!(answer.data == image.raw[at..at + 2 * PAGE]);
    }
    client.disconnect();
    server.stop();
}

#[test]
fn any_number_of_writes_in_one_burst_is_answered_and_done_before_a_disconnect_behind_them() {
    let image = Image::sparse();
    let server = Serve::disk(&image).start();
    for (len, fua) in [(512, 0), (PAGE, 0), (PAGE, 200), (512, 200)] {
        // Each write has its own number, all over.
        let content = |salt: usize| -> Vec<u8> {
            (0..600).flat_map(|n| (salt * 600 + n).to_ne_bytes()[..4].repeat(len / 4)).collect()
        };
        let places = (MIB as u64..).step_by(len);
        let mut client = Client::open(&server, "disk");
        let data = content(fua);
        let writes: Vec<(u64, &[u8])> = places.clone().zip(data.chunks(len)).collect();
        // Those with FUA wait for a commit while the others come.
        client.submit_writes(&writes[..fua], CommandFlags::FUA).unwrap();
        client.submit_writes(&writes[fua..], NONE).unwrap();
        writes.iter().for_each(|_| client.answer().unwrap().result.unwrap());
        assert!(client.read(MIB as u64, data.len()).unwrap() == data);

        // Once more with other bytes, and nobody waits for an answer.
        let data = content(99);
        let writes: Vec<(u64, &[u8])> = places.zip(data.chunks(len)).collect();
        let mut leaving = Client::open(&server, "disk");
        leaving.submit_writes(&writes[..fua], CommandFlags::FUA).unwrap();
        leaving.submit_writes(&writes[fua..], NONE).unwrap();
        leaving.disconnect();
        let is_done = until(Duration::from_secs(30), || client.read(MIB as u64, data.len()).unwrap() == data);
        assert!(is_done, "writes before a disconnect were not done: {len} {fua}");
        client.disconnect();
    }
    server.stop();
}

fn fio(uri: &str, more: &[&str]) {
    let uri = format!("--uri={uri}");
    let mut args = vec!["--name=verify", "--ioengine=nbd", &uri, "--size=16m", "--output-format=terse"];
    args.extend(["--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--randseed=4711"]);
    args.extend(more);
    let dir = tempfile::tempdir().unwrap();
    run(Program::new("fio").args(&args).current_dir(dir.path())).ok();
}

#[test]
fn fio_verifies_what_it_wrote_over_unix_and_over_tcp() {
    if !need(&["fio"]) {
        return;
    }
    let image = Image::sparse();
    let server = Serve::disk(&image).tcp(&image.dir().join("sock")).start();
    fio(&server.uri("disk"), &["--rw=randwrite", "--bs=4k", "--iodepth=32"]);
    fio(
        &server.tcp_uri("disk"),
        &["--rw=randwrite", "--bsrange=512-96k", "--bs_unaligned=1", "--iodepth=16"],
    );
    fio(&server.uri("disk"), &["--rw=write", "--bs=1m", "--iodepth=8", "--fsync=4"]);
    // Four connections, each with its own quarter.
    let quarters = ["--rw=randwrite", "--bs=4k", "--iodepth=8", "--numjobs=4", "--offset_increment=4m"];
    let quarters = [&quarters[..], &["--size=4m"]].concat();
    fio(&server.uri("disk"), &quarters);
    let vanished = server.lines("WARN");
    assert!(vanished.is_empty(), "fio just closes its sockets: {vanished:?}");
    server.stop();
}

#[test]
fn several_exports_of_one_server_keep_apart() {
    if !need(&["nbdinfo", "nbdcopy", "nbdsh", "qemu-img"]) {
        return;
    }
    let image = Image::sparse();
    let other = image.dir().join("other");
    let bytes = noise(77, 3 * MIB);
    std::fs::write(&other, &bytes).unwrap();
    image.store("other", &other);
    image.store("third", &other);
    let serve = || Serve::disk(&image).name("other").name("third");
    let server = serve().start();
    let listed: Value =
        serde_json::from_str(&program("nbdinfo", &["--list", "--json", &server.uri("")])).unwrap();
    let names: Vec<&str> = listed["exports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|export| export["export-name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["disk", "other", "third"]);
    nbdsh(&server.uri("other"), "h.pwrite(b'o' * 4096, 0)\nh.flush()");
    assert!(copy_out(&server.uri("disk"), image.dir()) == image.raw);
    assert!(copy_out(&server.uri("third"), image.dir()) == bytes);
    let changed = [&[b'o'; 4096][..], &bytes[4096..]].concat();
    assert!(copy_out(&server.uri("other"), image.dir()) == changed);
    // A name that is not served, and no name where there are several.
    let wish = |name: &str| Wish { name: name.to_owned(), ..Wish::default() };
    let told = Client::connect(&server, wish("dsk")).map(|_| ()).unwrap_err().to_string();
    assert_eq!(told, "no such export: no export 'dsk'; there is: disk, other, third");
    let told = run(Program::new("qemu-img").args(["info", &server.uri("dsk")])).refused();
    assert!(told.contains("no export 'dsk'; there is: disk, other, third"), "{told}");
    assert!(Client::connect(&server, wish("")).is_err());
    server.stop();
    assert!(copy_out(&serve().start().uri("other"), image.dir()) == changed);
}

#[test]
fn a_read_only_export_refuses_every_change_and_leaves_nothing_behind() {
    if !need(&["nbdinfo", "qemu-io"]) {
        return;
    }
    let image = Image::sparse();
    let server = Serve::disk(&image).arg("--read-only").start();
    assert!(server.said[0].contains(", read-only, "), "{:?}", server.said);
    let uri = server.uri("disk");
    assert!(program("nbdinfo", &[&uri]).contains("is_read_only: true"));
    let refused = run(Program::new("qemu-io").args(["-f", "raw", "-c", "write 0 4k", &uri])).refused();
    assert!(refused.contains("Permission denied"), "{refused}");
    let mut client = Client::open(&server, "disk");
    assert_eq!(client.write(0, &[1; 4096]), Err(Errno::Perm));
    for command in [Command::Trim, Command::WriteZeroes] {
        assert_eq!(client.call(command, 0, 4096, NONE, &[]).unwrap().result, Err(Errno::Perm));
    }
    client.flush().unwrap();
    assert!(client.read(0, MIB).unwrap() == image.raw[..MIB]);
    client.disconnect();
    server.stop();
    assert!(!image.state().join("volumes/disk").exists(), "only looking at an image makes no volume");
}

#[test]
fn two_tebibytes_are_trimmed_and_zeroed_in_a_moment() {
    if !need(&["qemu-io"]) {
        return;
    }
    let image = Image::of(noise(1, MIB));
    let huge = image.dir().join("huge");
    std::fs::File::create(&huge).unwrap().set_len(2 << 40).unwrap();
    let mut cli = harness::cli();
    run(cli.args(["image-from-file", "huge"]).arg(&huge).arg(image.repo())).ok();
    let server = Serve::new(&image.repo(), &image.state()).name("huge").start();
    let wish = Wish {
        name: "huge".to_owned(),
        mode: HeaderMode::Extended,
        contexts: vec!["base:allocation".to_owned()],
        ..Wish::default()
    };
    let mut client = Client::connect(&server, wish).unwrap();
    client.write(1 << 40, b"in the middle").unwrap();
    let started = std::time::Instant::now();
    for command in [Command::Trim, Command::WriteZeroes] {
        assert_eq!(client.call(command, 0, 2 << 40, NONE, &[]).unwrap().result, Ok(()));
    }
    let took = started.elapsed();
    client.flush().unwrap();
    let status = client.call(Command::BlockStatus, 0, 2 << 40, NONE, &[]).unwrap();
    assert_eq!(status.extents[0].1.len(), 1);
    assert_eq!(client.read(1 << 40, 13).unwrap(), [0; 13]);
    assert!(took.as_secs_f64() < 1.0, "{took:?}");
    client.disconnect();
    server.stop();
}

#[test]
fn logs_are_text_or_json() {
    let image = Image::sparse();
    let mut server = Serve::disk(&image).arg("--log-format").arg("json").start();
    let mut client = Client::open(&server, "disk");
    client.read(0, PAGE).unwrap();
    client.disconnect();
    server.logs("connection closed");
    assert!(server.terminate().success());
    server.logs("stopped");
    let log = server.log();
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let connected = lines.iter().find(|line| line["fields"]["message"] == "connected").unwrap();
    assert_eq!(connected["level"], "INFO");
    assert_eq!(connected["fields"]["export"], "disk");
    let mut text = Serve::disk(&image).start();
    assert!(text.terminate().success());
    text.logs("INFO stopping");
}
