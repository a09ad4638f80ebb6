//! The kernel, asked directly over netlink, without a process.
//!
//! Messages are a header of 16 bytes, what they are about, and attributes of
//! length, type and value, as `linux/netlink.h` has them. What they are about
//! takes 4 bytes with netfilter (`struct nfgenmsg`) and 8 with addresses
//! (`struct ifaddrmsg`), and begins with the family.

use std::io;
use std::net::IpAddr;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::net::{connect, netlink, recv, send, socket_with, sockopt};

use crate::netfilter::Family;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x001;
const NLM_F_ACK: u16 = 0x004;
const NLM_F_DUMP: u16 = 0x300;
/// The length of the header.
const HEADER: usize = 16;

/// What is wanted of the kernel.
#[derive(Clone, Copy, PartialEq)]
pub enum Kind {
    /// All there is, each in a message.
    Dump,
    /// That something is done.
    Order,
}

/// Whom a question goes to.
#[derive(Clone, Copy, PartialEq)]
pub enum Subsystem {
    /// Netfilter.
    Netfilter,
    /// Addresses and routes.
    Route,
}

impl Subsystem {
    /// How many bytes say what a message is about.
    fn subject(self) -> usize {
        match self {
            Self::Netfilter => 4,
            Self::Route => 8,
        }
    }
}

/// A conversation with the kernel.
pub struct Socket {
    subsystem: Subsystem,
    end: OwnedFd,
    buffer: Vec<u8>,
}

impl Socket {
    /// # Errors
    /// When there is no netlink here.
    pub fn open(subsystem: Subsystem) -> io::Result<Self> {
        const BUFFER: usize = 1 << 16;
        const PATIENCE: Duration = Duration::from_secs(5);
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            match subsystem {
                Subsystem::Netfilter => Some(netlink::NETFILTER),
                Subsystem::Route => None,
            },
        )?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(PATIENCE))?;
        connect(&socket, &netlink::SocketAddrNetlink::new(0, 0))?;
        Ok(Self {
            subsystem,
            end: socket,
            buffer: vec![0; BUFFER],
        })
    }

    /// Sends a message and hands the attributes of each answer to `each`, until
    /// that has enough or no more come.
    ///
    /// # Errors
    /// The kernel's own, or that an answer made no sense.
    pub fn ask(
        &mut self,
        (subsystem, message): (u16, u16),
        family: Family,
        kind: Kind,
        attributes: &[u8],
        each: &mut dyn FnMut(&[u8]) -> ControlFlow<()>,
    ) -> io::Result<()> {
        let message = question(
            self.subsystem,
            subsystem << 8 | message,
            family,
            kind,
            attributes,
        );
        send(&self.end, &message, SendFlags::empty())?;
        loop {
            let received = recv(&self.end, self.buffer.as_mut_slice(), RecvFlags::empty());
            let (length, _) = match received {
                Err(Errno::INTR) => continue,
                received => received?,
            };
            let packet = self.buffer.get(..length).ok_or_else(senseless)?;
            if answers(self.subsystem, packet, each)?.is_break() {
                return Ok(());
            }
        }
    }
}

fn question(
    subsystem: Subsystem,
    kind: u16,
    family: Family,
    wanted: Kind,
    attributes: &[u8],
) -> Vec<u8> {
    let flags = match wanted {
        Kind::Dump => NLM_F_REQUEST | NLM_F_DUMP,
        Kind::Order => NLM_F_REQUEST | NLM_F_ACK,
    };
    let start = HEADER + subsystem.subject();
    let length = u32::try_from(start + attributes.len()).unwrap_or(u32::MAX);
    let mut message = Vec::new();
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend(1_u32.to_ne_bytes());
    message.extend(0_u32.to_ne_bytes());
    message.push(protocol_family(family));
    message.resize(start, 0);
    message.extend(attributes);
    message
}

/// `AF_INET` and `AF_INET6`, which are `NFPROTO_IPV4` and `NFPROTO_IPV6` too.
fn protocol_family(family: Family) -> u8 {
    match family {
        Family::Ipv4 => 2,
        Family::Ipv6 => 10,
    }
}

fn senseless() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "the kernel's answer makes no sense",
    )
}

/// Reads one packet of the kernel's. Breaks when no more is to be read.
fn answers(
    subsystem: Subsystem,
    mut packet: &[u8],
    each: &mut dyn FnMut(&[u8]) -> ControlFlow<()>,
) -> io::Result<ControlFlow<()>> {
    while !packet.is_empty() {
        let length = number(packet, 0).ok_or_else(senseless)? as usize;
        let kind = packet.get(4..6).and_then(|two| two.try_into().ok());
        let kind = u16::from_ne_bytes(kind.ok_or_else(senseless)?);
        let message = packet.get(..length).ok_or_else(senseless)?;
        match kind {
            NLMSG_DONE => return Ok(ControlFlow::Break(())),
            NLMSG_ERROR => {
                let code = number(message, 16).ok_or_else(senseless)?.cast_signed();
                return match code {
                    0 => Ok(ControlFlow::Break(())),
                    error => Err(io::Error::from_raw_os_error(error.saturating_neg())),
                };
            }
            _ => {
                let attributes = message
                    .get(HEADER + subsystem.subject()..)
                    .ok_or_else(senseless)?;
                if each(attributes).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
        }
        packet = packet.get(aligned(length)..).unwrap_or_default();
    }
    Ok(ControlFlow::Continue(()))
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at + 4)?.try_into().ok()?;
    Some(u32::from_ne_bytes(four))
}

/// The value of the first attribute of a type. The flags in the two highest
/// bits of a type, that it is nested and in which byte order, are passed over.
pub fn attribute(attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    whole_attribute(attributes, wanted).and_then(|whole| whole.get(4..))
}

/// The same with its header.
pub fn whole_attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    const FLAGS: u16 = 0xc000;
    loop {
        let length = usize::from(u16::from_ne_bytes(attributes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?);
        let whole = attributes.get(..length).filter(|_| length >= 4)?;
        if kind & !FLAGS == wanted {
            return Some(whole);
        }
        attributes = attributes.get(aligned(length)..)?;
    }
}

/// The address that these bytes are, which tell by their number of which family.
pub fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        _ => Some(IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?)),
    }
}

/// Messages and attributes begin at multiples of four bytes.
pub fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn message(kind: u16, attributes: &[u8]) -> Vec<u8> {
        question(
            Subsystem::Netfilter,
            kind,
            Family::Ipv4,
            Kind::Dump,
            attributes,
        )
    }

    pub fn encoded(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(4 + value.len()).unwrap();
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(value);
        bytes.resize(aligned(bytes.len()), 0);
        bytes
    }

    fn seen(packet: &[u8]) -> (Vec<Vec<u8>>, io::Result<ControlFlow<()>>) {
        let mut seen = Vec::new();
        let ended = answers(Subsystem::Netfilter, packet, &mut |attributes| {
            seen.push(attribute(attributes, 1).unwrap_or_default().to_vec());
            ControlFlow::Continue(())
        });
        (seen, ended)
    }

    #[test]
    fn every_answer_of_a_packet_is_seen() {
        let table = |name: &[u8]| {
            message(
                0x0a00,
                &[encoded(2, b"\0\0\0\0"), encoded(1, name)].concat(),
            )
        };
        let both = [table(b"filter\0"), table(b"nat\0")].concat();
        let (names, ended) = seen(&both);
        assert_eq!(names, [b"filter\0".to_vec(), b"nat\0".to_vec()]);
        assert!(ended.unwrap().is_continue());
        let (names, ended) = seen(&[table(b"raw\0"), message(NLMSG_DONE, &[])].concat());
        assert_eq!(names.len(), 1);
        assert!(ended.unwrap().is_break());
    }

    #[test]
    fn errors_are_the_kernels_own_and_zero_is_none() {
        let acknowledged = |code: i32| {
            let mut packet = message(NLMSG_ERROR, &[0; 16]);
            packet[16..20].copy_from_slice(&code.to_ne_bytes());
            seen(&packet).1
        };
        assert!(acknowledged(0).unwrap().is_break());
        assert_eq!(acknowledged(-2).unwrap_err().raw_os_error(), Some(2));
        assert!(acknowledged(i32::MIN).is_err());
    }

    #[test]
    fn a_packet_cut_anywhere_is_not_believed() {
        let whole = message(0x0a00, &encoded(1, b"nat\0"));
        for cut in 1..whole.len() {
            assert!(seen(&whole[..cut]).1.is_err(), "{cut}");
        }
        for cut in 0..12 {
            attribute(&encoded(1, b"12345678")[..cut], 1);
        }
    }
}
