//! The fuzz targets, as plain functions of bytes, so that an ordinary test can run them too.

use nbd_proto::client::{self, Wish};
use nbd_proto::server::{Config, Negotiated, Tls};
use nbd_proto::{Command, CommandFlags, Context, HeaderMode, StatusQuery, TransmissionFlags};

use super::Choices;
use super::client::connect;
use super::server::{CONTEXTS, Phase, SIZE, Server, volume};

fn mode(choice: u8) -> HeaderMode {
    match choice % 3 {
        0 => HeaderMode::Simple,
        1 => HeaderMode::Structured,
        _ => HeaderMode::Extended,
    }
}

/// Bytes into both handshakes: raw, or as the data of well-formed options. However they are cut, the events are the same.
pub fn handshake(data: &[u8]) {
    let mut choices = Choices(data);
    let shape = choices.byte();
    let config = Config {
        tls: [Tls::Off, Tls::Offered, Tls::Required][usize::from(shape) % 3],
        structured_replies: shape & 0x10 == 0,
        extended_headers: shape & 0x20 == 0,
    };
    let step = 1 + usize::from(choices.byte());
    let raw = shape & 0x80 != 0;
    let stream = if raw { choices.0.to_vec() } else { options(&mut choices) };
    // Where TLS may start the cut matters by design: bytes that came with STARTTLS are refused, later ones are TLS.
    let same = config.tls == Tls::Off;
    let mut whole = Server::new(config);
    whole.feed(&stream);
    let mut cut = Server::new(config);
    stream.chunks(step).for_each(|piece| cut.feed(piece));
    if same {
        assert_eq!(whole.log, cut.log);
        assert_eq!(whole.output, cut.output);
    }
    server_bytes(&stream, shape, step);
}

/// Options with well-formed headers around arbitrary data; also names and queries that exist.
fn options(choices: &mut Choices<'_>) -> Vec<u8> {
    let mut stream = vec![0, 0, 0, choices.byte() & 3];
    while !choices.is_empty() {
        let option = u32::from(choices.byte() % 14);
        let kind = choices.byte();
        let data = match kind % 4 {
            0 => Vec::new(),
            1 => {
                let name = ["", "vol", "ro", "secret", "closing", "none"][usize::from(kind / 4) % 6];
                let mut data = Vec::new();
                if option != 1 {
                    data.extend_from_slice(&(name.len() as u32).to_be_bytes());
                }
                data.extend_from_slice(name.as_bytes());
                match option {
                    6 | 7 => data.extend_from_slice(&[0, 3, 0, 1, 0, 2, 0, 3]),
                    9 | 10 => {
                        data.extend_from_slice(&[0, 0, 0, 2]);
                        for query in
                            ["base:allocation", ["x-horcrux:", CONTEXTS[1]][usize::from(kind) / 64 % 2]]
                        {
                            data.extend_from_slice(&(query.len() as u32).to_be_bytes());
                            data.extend_from_slice(query.as_bytes());
                        }
                    }
                    _ => {}
                }
                data
            }
            _ => {
                let len = usize::from(choices.byte());
                choices.take(len)
            }
        };
        stream.extend_from_slice(b"IHAVEOPT");
        stream.extend_from_slice(&option.to_be_bytes());
        // Now and then a length that is not the data's.
        let told = if kind >= 0xf0 { u32::from(kind) << 16 } else { data.len() as u32 };
        stream.extend_from_slice(&told.to_be_bytes());
        stream.extend_from_slice(&data);
    }
    stream
}

/// The same bytes as a server's, at a client that asks for everything.
fn server_bytes(stream: &[u8], shape: u8, step: usize) {
    let wish = Wish {
        name: "vol".to_owned(),
        mode: mode(shape),
        contexts: CONTEXTS.map(str::to_owned).to_vec(),
        old_style_name: shape & 0x40 != 0,
        zeroes: shape & 0x08 != 0,
    };
    let mut bytes = Vec::new();
    bytes.extend_from_slice(b"NBDMAGICIHAVEOPT");
    bytes.extend_from_slice(&[0, shape & 3]);
    bytes.extend_from_slice(stream);
    let run = |step: usize| {
        let mut connect = client::Connect::new(wish.clone());
        let mut held = Vec::new();
        for piece in bytes.chunks(step) {
            held.extend_from_slice(piece);
            match connect.handle_input(&held) {
                Ok(used) => drop(held.drain(..used)),
                Err(error) => return (Err(error), std::mem::take(connect.output())),
            }
            if let Some(negotiated) = connect.negotiated() {
                return (Ok(Some(negotiated)), std::mem::take(connect.output()));
            }
        }
        (Ok(None), std::mem::take(connect.output()))
    };
    assert_eq!(run(bytes.len()), run(step));
}

fn negotiated(mode: HeaderMode) -> Negotiated {
    let chunks = mode != HeaderMode::Simple;
    let contexts = (1..).zip(CONTEXTS).map(|(id, name)| Context { id, name: name.to_owned() }).collect();
    let mut flags = volume().flags;
    if mode != HeaderMode::Extended {
        flags = flags.without(TransmissionFlags::BLOCK_STAT_PAYLOAD);
    }
    Negotiated {
        name: "vol".to_owned(),
        export: volume(),
        flags,
        mode,
        contexts: if chunks { contexts } else { Vec::new() },
        secure: false,
        knows_block_sizes: true,
    }
}

/// Bytes into a server's transmission (raw, or as the fields of requests with good magics), and into a client's.
pub fn requests(data: &[u8]) {
    let mut choices = Choices(data);
    let shape = choices.byte();
    let mode = mode(shape);
    let step = 1 + usize::from(choices.byte());
    let stream = if shape & 0x80 != 0 { choices.0.to_vec() } else { headers(&mut choices, mode) };
    let mut whole = Server::in_transmission(negotiated(mode));
    whole.feed(&stream);
    let mut cut = Server::in_transmission(negotiated(mode));
    stream.chunks(step).for_each(|piece| cut.feed(piece));
    assert!(whole.log == cut.log && whole.output == cut.output && whole.disk == cut.disk, "cut at {step}");

    // A client with a few requests in flight gets the same bytes, and bytes a server might send.
    let replies = if shape & 0x40 != 0 { stream } else { reply_headers(&mut Choices(data), mode) };
    let ids = if mode == HeaderMode::Simple { Vec::new() } else { vec![1, 2, 3] };
    let mut client = client::Transmission::new(mode, ids);
    for (cookie, command) in (0..).zip([Command::Read, Command::Write, Command::BlockStatus, Command::Read]) {
        let flags = if cookie == 3 { CommandFlags::DF } else { CommandFlags::NONE };
        let call = client::Call { cookie, command, offset: 0, length: 4096, flags };
        client.send(&mut Vec::new(), call).expect("four requests fit");
    }
    let mut rest = replies.as_slice();
    while let Ok(client::Decoded::Reply { reply, consumed }) = client.decode(rest) {
        rest = &rest[consumed..];
        let Some((payload, after)) = rest.split_at_checked(reply.payload as usize) else { break };
        if let client::Body::Status(status) = reply.body {
            let _ = status.extents(payload);
        }
        client.payload_done();
        rest = after;
    }
}

fn headers(choices: &mut Choices<'_>, mode: HeaderMode) -> Vec<u8> {
    let mut stream = Vec::new();
    let extended = mode == HeaderMode::Extended;
    while !choices.is_empty() {
        let magic: u32 = if extended { 0x21e4_1c71 } else { 0x2560_9513 };
        stream.extend_from_slice(&magic.to_be_bytes());
        // Mostly flags that exist.
        let flags = choices.byte();
        stream.extend_from_slice(&[if flags == 0xff { 1 } else { 0 }, flags & 0x3f]);
        stream.extend_from_slice(&u16::from(choices.byte() % 10).to_be_bytes());
        stream.extend_from_slice(&[0; 7]);
        stream.push(choices.byte());
        let offset = u64::from(choices.u16()) * if flags & 0x40 == 0 { 8 } else { 1 << 48 };
        stream.extend_from_slice(&offset.to_be_bytes());
        let length = u64::from(choices.u16()) << if flags & 0x80 == 0 { 0 } else { 20 };
        if extended {
            stream.extend_from_slice(&length.to_be_bytes());
        } else {
            stream.extend_from_slice(&(length as u32).to_be_bytes());
        }
        let payload = usize::from(choices.byte());
        stream.extend_from_slice(&choices.take(payload));
    }
    stream
}

fn reply_headers(choices: &mut Choices<'_>, mode: HeaderMode) -> Vec<u8> {
    let mut stream = Vec::new();
    while !choices.is_empty() {
        let shape = choices.byte();
        let kind = [0u16, 1, 2, 5, 6, 0x8001, 0x8002, 0x8009][usize::from(shape & 7)];
        let cookie = u64::from(choices.byte() % 5);
        let payload = usize::from(choices.byte() % 48);
        let body = choices.take(payload);
        let told = body.len() as u64 + u64::from(shape >= 0xfc);
        let magic: u32 = match mode {
            _ if shape & 0x20 != 0 => 0x6744_6698,
            HeaderMode::Simple => 0x6744_6698,
            HeaderMode::Structured => 0x668e_33ef,
            HeaderMode::Extended => 0x6e8a_278c,
        };
        stream.extend_from_slice(&magic.to_be_bytes());
        if magic == 0x6744_6698 {
            stream.extend_from_slice(&u32::from(shape & 1).to_be_bytes());
            stream.extend_from_slice(&cookie.to_be_bytes());
        } else {
            stream.extend_from_slice(&u16::from(shape >> 4 & 1).to_be_bytes());
            stream.extend_from_slice(&kind.to_be_bytes());
            stream.extend_from_slice(&cookie.to_be_bytes());
            if mode == HeaderMode::Extended {
                stream.extend_from_slice(&[0; 8]);
                stream.extend_from_slice(&told.to_be_bytes());
            } else {
                stream.extend_from_slice(&(told as u32).to_be_bytes());
            }
        }
        stream.extend_from_slice(&body);
    }
    stream
}

/// Client and server joined: every request comes out as the rules say, every read as written, however the streams are cut.
pub fn session(data: &[u8]) {
    let mut choices = Choices(data);
    let shape = choices.byte();
    let best = mode(shape);
    let config =
        Config { tls: Tls::Off, structured_replies: shape & 0x10 == 0, extended_headers: shape & 0x20 == 0 };
    let wish = Wish {
        name: if shape & 0x40 == 0 { "vol".to_owned() } else { String::new() },
        mode: best,
        contexts: CONTEXTS[..usize::from(shape >> 2 & 3)].iter().map(|&c| c.to_owned()).collect(),
        old_style_name: shape & 0x80 != 0 && best != HeaderMode::Extended,
        zeroes: choices.byte() & 1 == 0,
    };
    let step = 1 + usize::from(choices.byte());
    let mut pair = connect(config, wish, step);
    while !choices.is_empty() {
        match choices.byte() {
            n @ 0..=0x3f => pair.deliver_to_server(usize::from(n) * 37),
            n @ 0x40..=0x7f => pair.deliver_to_client(usize::from(n - 0x40) * 61),
            0x80..=0x8f => {
                let ids = (0..choices.byte() % 4).map(u32::from).collect();
                let query = StatusQuery { length: u64::from(choices.u16()) * 5, ids };
                pair.send_query(u64::from(choices.u16()), &query);
            }
            what => {
                let command = Command::from_wire(u16::from(what % 9));
                if command == Command::Disc {
                    continue;
                }
                let flags = choices.byte();
                let flags = CommandFlags(u16::from(if flags & 0x80 == 0 { 0 } else { flags & 0x1f }));
                let (mut offset, mut length) = (u64::from(choices.u16()) * 5, u64::from(choices.u16()) / 3);
                match what {
                    0xf0..=0xf7 => (offset, length) = (0, 0),
                    0xf8..=0xfb => length *= 8,
                    0xfc => offset = u64::MAX - offset,
                    _ => {}
                }
                if command == Command::Write {
                    length = length.min(SIZE as u64);
                }
                let seed = choices.byte();
                let data: Vec<u8> = match command {
                    Command::Write => (0..length).map(|n| (n as u8).wrapping_mul(seed)).collect(),
                    _ => Vec::new(),
                };
                pair.send(command, offset, length, flags, &data);
            }
        }
    }
    pair.settle();
    pair.client.disconnect(&mut pair.to_server);
    let goodbye = std::mem::take(&mut pair.to_server);
    pair.server.feed(&goodbye);
    assert!(matches!(pair.server.phase, Phase::Closed(None)));
}
