//! The nbd driver's netlink family (linux/nbd-netlink.h, drivers/block/nbd.c): connecting devices, giving them new sockets, disconnecting them.
//!
//! Enters: what a device is to be. Leaves: its index. The driver works in the sender's own context, so a request blocks until it is done: for a blocking thread, and
//! never for one that serves a device.

use std::fmt::Debug;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, NLA_F_NESTED, NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload, Nla, NlasIterator, Parseable, ParseableParametrized,
};
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};
use netlink_packet_generic::{GenlFamily, GenlHeader, GenlMessage};
use netlink_sys::protocols::NETLINK_GENERIC;
use netlink_sys::{Socket, SocketAddr};

use super::KernelError;
use super::device::path_of;

/// Commands of the family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Command {
    Connect = 1,
    Disconnect = 2,
    Reconfigure = 3,
}

/// Attributes of the family.
mod attr {
    pub const INDEX: u16 = 1;
    pub const SIZE_BYTES: u16 = 2;
    pub const BLOCK_SIZE_BYTES: u16 = 3;
    pub const TIMEOUT: u16 = 4;
    pub const SERVER_FLAGS: u16 = 5;
    pub const SOCKETS: u16 = 7;
    pub const DEAD_CONN_TIMEOUT: u16 = 8;
    pub const BACKEND_IDENTIFIER: u16 = 10;
    /// Inside `SOCKETS`.
    pub const SOCK_ITEM: u16 = 1;
    /// Inside `SOCK_ITEM`.
    pub const SOCK_FD: u16 = 1;
}

/// A message of the family.
#[derive(Clone, Debug)]
struct Nbd {
    command: u8,
    attributes: Vec<DefaultNla>,
}

impl GenlFamily for Nbd {
    fn family_name() -> &'static str {
        "nbd"
    }

    fn command(&self) -> u8 {
        self.command
    }

    fn version(&self) -> u8 {
        1
    }
}

impl Emitable for Nbd {
    fn buffer_len(&self) -> usize {
        self.attributes.as_slice().buffer_len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        self.attributes.as_slice().emit(buffer);
    }
}

impl ParseableParametrized<[u8], GenlHeader> for Nbd {
    fn parse_with_param(bytes: &[u8], header: GenlHeader) -> Result<Nbd, DecodeError> {
        let attributes = NlasIterator::new(bytes).map(|found| DefaultNla::parse(&found?));
        Ok(Nbd { command: header.cmd, attributes: attributes.collect::<Result<_, _>>()? })
    }
}

fn of_u32(kind: u16, value: u32) -> DefaultNla {
    DefaultNla::new(kind, value.to_ne_bytes().to_vec())
}

fn of_u64(kind: u16, value: u64) -> DefaultNla {
    DefaultNla::new(kind, value.to_ne_bytes().to_vec())
}

fn nested(kind: u16, inside: &[DefaultNla]) -> DefaultNla {
    let mut bytes = vec![0; inside.buffer_len()];
    inside.emit(&mut bytes);
    DefaultNla::new(kind | NLA_F_NESTED, bytes)
}

fn sockets(fds: &[BorrowedFd<'_>]) -> DefaultNla {
    let items: Vec<_> = fds
        .iter()
        .map(|fd| nested(attr::SOCK_ITEM, &[of_u32(attr::SOCK_FD, fd.as_raw_fd() as u32)]))
        .collect();
    nested(attr::SOCKETS, &items)
}

/// The name by which a device says whose it is; it ends with a NUL on the wire.
fn backend(identifier: &str) -> DefaultNla {
    let mut bytes = identifier.as_bytes().to_vec();
    bytes.push(0);
    DefaultNla::new(attr::BACKEND_IDENTIFIER, bytes)
}

/// A device to be connected.
#[derive(Debug)]
pub struct Connection<'a> {
    /// Which device; `None`: a free one, that the driver chooses or makes.
    pub index: Option<u32>,
    /// Its bytes.
    pub size: u64,
    /// Its block size: a power of two from 512 to the page size.
    pub block_size: u32,
    /// The export's transmission flags.
    pub flags: u16,
    /// One connection each, in its transmission phase; the driver keeps them.
    pub sockets: &'a [BorrowedFd<'a>],
    /// How long requests wait for a new socket when every one is dead.
    pub dead_connection_timeout: Duration,
    /// Whose it is.
    pub backend: &'a str,
}

/// The family, over a socket of its own.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    family: u16,
}

impl Netlink {
    /// Finds the family.
    pub fn open() -> Result<Netlink, KernelError> {
        let system = |action| KernelError::of(action, None);
        let mut socket = Socket::new(NETLINK_GENERIC).map_err(system("open a netlink socket"))?;
        socket.bind_auto().map_err(system("bind a netlink socket"))?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(system("connect a netlink socket"))?;
        let ask = GenlCtrl {
            cmd: GenlCtrlCmd::GetFamily,
            nlas: vec![GenlCtrlAttrs::FamilyName(Nbd::family_name().to_owned())],
        };
        let answers: Vec<GenlCtrl> = match exchange(&socket, GenlMessage::from_payload(ask)) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Err(KernelError::NoDriver),
            other => other.map_err(system("ask for the nbd driver"))?,
        };
        let family = answers.iter().flat_map(|answer| &answer.nlas).find_map(|attribute| match attribute {
            GenlCtrlAttrs::FamilyId(id) => Some(*id),
            _ => None,
        });
        let family = family.ok_or_else(|| KernelError::Answer("the nbd family has no id".to_owned()))?;
        Ok(Netlink { socket, family })
    }

    /// Connects a device; its index. It is there when this returns.
    pub fn connect(&self, wanted: &Connection<'_>) -> Result<u32, KernelError> {
        let mut attributes = vec![
            of_u64(attr::SIZE_BYTES, wanted.size),
            of_u64(attr::BLOCK_SIZE_BYTES, wanted.block_size.into()),
            // No bound for one request: the daemon fetches what it has not, and that may take as long as a remote is away.
            of_u64(attr::TIMEOUT, 0),
            of_u64(attr::SERVER_FLAGS, wanted.flags.into()),
            of_u64(attr::DEAD_CONN_TIMEOUT, wanted.dead_connection_timeout.as_secs()),
            backend(wanted.backend),
            sockets(wanted.sockets),
        ];
        attributes.extend(wanted.index.map(|index| of_u32(attr::INDEX, index)));
        let answers = self.ask(Command::Connect, attributes).map_err(|error| {
            match (error.raw_os_error(), wanted.index) {
                (Some(libc::EBUSY), Some(index)) => KernelError::DeviceBusy { device: path_of(index) },
                (Some(libc::ENOENT | libc::EINVAL | libc::ENODEV), Some(index)) => {
                    KernelError::NoDevice { device: path_of(index) }
                }
                _ => KernelError::of("connect an nbd device", None)(error),
            }
        })?;
        let index = answers.iter().flat_map(|answer| &answer.attributes).find_map(|attribute| {
            let mut value = [0; 4];
            (attribute.kind() & !NLA_F_NESTED == attr::INDEX && attribute.value_len() == 4).then(|| {
                attribute.emit_value(&mut value);
                u32::from_ne_bytes(value)
            })
        });
        index.ok_or_else(|| KernelError::Answer("a connected device has no index".to_owned()))
    }

    /// Gives a device new sockets in the place of dead ones. It succeeds, too, where no socket was dead: then the driver lets go of the new ones at once, which
    /// their other ends see.
    pub fn reconfigure(
        &self,
        index: u32,
        identifier: &str,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), KernelError> {
        let attributes = vec![of_u32(attr::INDEX, index), backend(identifier), sockets(fds)];
        self.ask(Command::Reconfigure, attributes)
            .map(drop)
            .map_err(KernelError::of("give new sockets to", Some(path_of(index))))
    }

    /// Disconnects a device. What is in flight fails: nobody may use it any more.
    pub fn disconnect(&self, index: u32) -> Result<(), KernelError> {
        self.ask(Command::Disconnect, vec![of_u32(attr::INDEX, index)])
            .map(drop)
            .map_err(KernelError::of("disconnect", Some(path_of(index))))
    }

    fn ask(&self, command: Command, attributes: Vec<DefaultNla>) -> io::Result<Vec<Nbd>> {
        let mut message = GenlMessage::from_payload(Nbd { command: command as u8, attributes });
        message.set_resolved_family_id(self.family);
        exchange(&self.socket, message)
    }
}

/// Sends a request and takes the answers up to its acknowledgement.
fn exchange<F>(socket: &Socket, message: GenlMessage<F>) -> io::Result<Vec<F>>
where
    F: GenlFamily + Emitable + ParseableParametrized<[u8], GenlHeader> + Clone + Debug,
{
    let invalid = |error: DecodeError| io::Error::new(io::ErrorKind::InvalidData, error.to_string());
    let mut request = NetlinkMessage::from(message);
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK;
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let mut answers = Vec::new();
    loop {
        let (received, _) = socket.recv_from_full()?;
        let mut rest = received.as_slice();
        while !rest.is_empty() {
            let answer = NetlinkMessage::<GenlMessage<F>>::deserialize(rest).map_err(invalid)?;
            let len = (answer.header.length as usize).next_multiple_of(4).max(4);
            rest = rest.get(len..).unwrap_or_default();
            match answer.payload {
                NetlinkPayload::Error(told) => match told.code {
                    None => return Ok(answers),
                    Some(code) => return Err(io::Error::from_raw_os_error(code.get().saturating_neg())),
                },
                NetlinkPayload::InnerMessage(inner) => answers.push(inner.into_parts().1),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn sockets_are_nested_twice_as_the_driver_reads_them() {
        let file = tempfile::tempfile().unwrap();
        let attribute = sockets(&[file.as_fd(), file.as_fd()]);
        let mut bytes = vec![0; attribute.buffer_len()];
        attribute.emit(&mut bytes);
        let fd = (file.as_raw_fd() as u32).to_ne_bytes();
        let mut wanted = Vec::new();
        for (len, kind) in [(28u16, 0x8007u16), (12, 0x8001), (8, 1)] {
            wanted.extend(len.to_ne_bytes());
            wanted.extend(kind.to_ne_bytes());
        }
        wanted.extend(fd);
        for (len, kind) in [(12u16, 0x8001u16), (8, 1)] {
            wanted.extend(len.to_ne_bytes());
            wanted.extend(kind.to_ne_bytes());
        }
        wanted.extend(fd);
        assert_eq!(bytes, wanted);
    }
}
