//! A server over memory: the smallest program that can stand around the server half.

use nbd_proto::server::{Config, Decoded, Event, Handshake, Negotiated, Refusal, StreamError, Transmission};
use nbd_proto::{
    BlockSizes, Command, CommandFlags, Errno, ExportFacts, ExportInfo, Extent, Request, STATE_HOLE,
    STATE_ZERO, StatusQuery, TransmissionFlags, validate,
};

pub const SIZE: usize = 256 * 1024;
pub const PAGE: usize = 4096;
pub const CONTEXTS: [&str; 3] = ["base:allocation", "x-horcrux:dirty", "x-horcrux:cached"];

pub fn volume() -> ExportInfo {
    ExportInfo {
        name: "vol".to_owned(),
        description: "a volume".to_owned(),
        size: SIZE as u64,
        flags: TransmissionFlags::KNOWN
            .without(TransmissionFlags::READ_ONLY)
            .without(TransmissionFlags::ROTATIONAL),
        block_sizes: BlockSizes::new(1, PAGE as u32, 128 * 1024).expect("sizes by the rules"),
        contexts: CONTEXTS.map(str::to_owned).to_vec(),
    }
}

pub enum Phase {
    Handshake(Box<Handshake>),
    Transmission {
        machine: Transmission,
        facts: ExportFacts,
        negotiated: Box<Negotiated>,
        pending: Option<Request>,
    },
    Closed(Option<StreamError>),
}

pub struct Server {
    pub phase: Phase,
    pub output: Vec<u8>,
    pub log: Vec<String>,
    pub disk: Vec<u8>,
    input: Vec<u8>,
}

impl Server {
    pub fn new(config: Config) -> Self {
        let mut handshake = Handshake::new(config);
        let output = std::mem::take(handshake.output());
        Server {
            phase: Phase::Handshake(Box::new(handshake)),
            output,
            log: Vec::new(),
            disk: vec![0; SIZE],
            input: Vec::new(),
        }
    }

    /// A server whose handshake is over.
    pub fn in_transmission(negotiated: Negotiated) -> Self {
        let mut server = Server::new(Config::default());
        server.output.clear();
        server.begin(negotiated);
        server
    }

    pub fn negotiated(&self) -> Option<&Negotiated> {
        match &self.phase {
            Phase::Transmission { negotiated, .. } => Some(negotiated),
            _ => None,
        }
    }

    pub fn error(&self) -> Option<&StreamError> {
        match &self.phase {
            Phase::Closed(error) => error.as_ref(),
            _ => None,
        }
    }

    pub fn is_closed(&self) -> bool {
        matches!(self.phase, Phase::Closed(_))
    }

    /// Takes bytes of the client and does all that follows from them.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
        while self.step() {}
    }

    fn step(&mut self) -> bool {
        match &mut self.phase {
            Phase::Closed(_) => {
                self.input.clear();
                false
            }
            Phase::Handshake(_) => self.shake(),
            Phase::Transmission { .. } => self.serve(),
        }
    }

    fn close(&mut self, error: Option<StreamError>) -> bool {
        self.log.push(format!("closed {error:?}"));
        self.phase = Phase::Closed(error);
        true
    }

    fn begin(&mut self, negotiated: Negotiated) {
        let mut facts = negotiated.facts();
        facts.df_limit = nbd_proto::wire::MIN_DF_LIMIT;
        let machine = negotiated.transmission();
        self.phase = Phase::Transmission { machine, facts, negotiated: Box::new(negotiated), pending: None };
    }

    fn shake(&mut self) -> bool {
        let Phase::Handshake(handshake) = &mut self.phase else { unreachable!() };
        let result = handshake.handle_input(&self.input);
        if let Ok(used) = result {
            self.input.drain(..used);
        }
        let mut progress = matches!(result, Ok(used) if used > 0);
        let mut next = None;
        let mut refused = None;
        while let Some(event) = handshake.poll_event() {
            progress = true;
            self.log.push(format!("{event:?}"));
            match event {
                Event::Lookup(lookup) => {
                    let answer = match lookup.name.as_str() {
                        "" | "vol" => Ok(volume()),
                        "ro" => {
                            let flags = TransmissionFlags::READ_ONLY | TransmissionFlags::SEND_FLUSH;
                            Ok(ExportInfo { name: "ro".to_owned(), flags, ..volume() })
                        }
                        "secret" if !lookup.secure => Err(Refusal::TlsRequired),
                        "secret" => Ok(ExportInfo { name: "secret".to_owned(), ..volume() }),
                        "closing" => Err(Refusal::Shutdown),
                        _ => Err(Refusal::Unknown),
                    };
                    match answer {
                        Ok(export) => handshake.accept(&export),
                        Err(refusal) => refused = handshake.refuse(refusal, "not today").err(),
                    }
                }
                Event::List => handshake.list([("vol", "a volume"), ("ro", "")]),
                // The test's TLS changes no byte.
                Event::StartTls if result.is_ok() => handshake.tls_started(),
                Event::StartTls => {}
                Event::Aborted => next = Some(None),
                Event::Done(negotiated) => next = Some(Some(negotiated)),
            }
        }
        self.output.append(handshake.output());
        match (result, refused, next) {
            (Err(error), _, _) | (_, Some(error), _) => self.close(Some(error)),
            (_, _, Some(None)) => self.close(None),
            (_, _, Some(Some(negotiated))) => {
                self.begin(negotiated);
                true
            }
            (_, _, None) => progress,
        }
    }

    fn serve(&mut self) -> bool {
        let Phase::Transmission { machine, facts, pending, .. } = &mut self.phase else { unreachable!() };
        let facts = *facts;
        let request = match pending.take() {
            Some(request) => request,
            None => match machine.decode(&self.input) {
                Err(error) => return self.close(Some(error)),
                Ok(Decoded::Need(_)) => return false,
                Ok(Decoded::Request(request)) => {
                    self.input.drain(..machine.header_len());
                    self.log.push(format!("{request:?}"));
                    request
                }
            },
        };
        let payload = request.payload as usize;
        if self.input.len() < payload {
            *pending = Some(request);
            return false;
        }
        machine.payload_done();
        let payload: Vec<u8> = self.input.drain(..payload).collect();
        if request.command == Command::Disc {
            return self.close(None);
        }
        let replies = machine.replies();
        if let Err(errno) = validate(&request, &facts).and_then(|()| self.execute(&request, &payload, &facts))
        {
            replies.error(&mut self.output, request.reply_to(), errno, "refused");
        }
        true
    }

    fn execute(&mut self, request: &Request, payload: &[u8], facts: &ExportFacts) -> Result<(), Errno> {
        let Phase::Transmission { machine, negotiated, .. } = &self.phase else { unreachable!() };
        let (replies, to) = (machine.replies(), request.reply_to());
        let range = request.offset as usize..(request.offset + request.length) as usize;
        match request.command {
            Command::Read => {
                let whole = request.flags.contains(CommandFlags::DF);
                let (Some(chunks), false) = (replies.chunks(), whole) else {
                    replies.data(&mut self.output, to, request.offset, request.length as u32, true);
                    self.output.extend_from_slice(&self.disk[range]);
                    return Ok(());
                };
                let mut at = range.start;
                while at < range.end {
                    let end = (at / PAGE * PAGE + PAGE).min(range.end);
                    let (offset, length) = (at as u64, (end - at) as u32);
                    let page = &self.disk[at..end];
                    if page.iter().all(|&b| b == 0) {
                        chunks.hole(&mut self.output, to, offset, length, end == range.end);
                    } else {
                        chunks.data(&mut self.output, to, offset, length, end == range.end);
                        self.output.extend_from_slice(page);
                    }
                    at = end;
                }
                return Ok(());
            }
            Command::BlockStatus => {
                let selected: Vec<u32> = negotiated.contexts.iter().map(|c| c.id).collect();
                let (request, ids) = if request.is_status_payload() {
                    let query = StatusQuery::parse(payload, |id| selected.contains(&id))?;
                    let request = query.apply(request);
                    validate(&request, facts)?;
                    (request, query.ids)
                } else {
                    (*request, selected)
                };
                let chunks = replies.chunks().expect("validated");
                let extents = extents(&self.disk, request.offset as usize);
                for (n, &id) in ids.iter().enumerate() {
                    let last = n + 1 == ids.len();
                    let told =
                        chunks.block_status(&mut self.output, &request, id, extents.iter().copied(), last);
                    assert_ne!(told, 0);
                }
                if ids.is_empty() {
                    replies.success(&mut self.output, to);
                }
                return Ok(());
            }
            Command::Write => self.disk[range].copy_from_slice(payload),
            Command::WriteZeroes | Command::Trim => self.disk[range].fill(0),
            Command::Flush | Command::Cache => {}
            Command::Disc | Command::Unknown(_) => unreachable!("validated"),
        }
        replies.success(&mut self.output, to);
        Ok(())
    }
}

/// Runs of zero and other pages from `start` to the end of the disk.
fn extents(disk: &[u8], start: usize) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    let mut at = start;
    while at < disk.len() {
        let end = (at / PAGE * PAGE + PAGE).min(disk.len());
        let zero = disk[at..end].iter().all(|&b| b == 0);
        let flags = if zero { STATE_HOLE | STATE_ZERO } else { 0 };
        match extents.last_mut() {
            Some(last) if last.flags == flags => last.length += (end - at) as u64,
            _ => extents.push(Extent { length: (end - at) as u64, flags }),
        }
        at = end;
    }
    extents
}
