//! Questions to the kernel over netlink, without a process.
//!
//! A message is a header of 16 bytes, a subject, and attributes of length, type
//! and value (`linux/netlink.h`). The subject takes 4 bytes in netfilter
//! (`struct nfgenmsg`), 8 for addresses (`struct ifaddrmsg`) and 12 for routes
//! and their rules (`struct rtmsg`, `struct fib_rule_hdr`); its first byte is the
//! family.

use std::io;
use std::net::IpAddr;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::net::{connect, netdevice, netlink, recv, send, socket_with, sockopt};

use crate::netfilter::Family;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x001;
const NLM_F_ACK: u16 = 0x004;
/// The table changed while the kernel listed it.
const NLM_F_DUMP_INTR: u16 = 0x010;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
/// The length of the header.
const HEADER: usize = 16;
/// Attempts at a list that the kernel reports as interrupted. A commit of
/// nftables interrupts all of them for as long as it takes, so there are pauses
/// between them that add up to a second.
const DUMPS: u64 = 60;

/// The part of the kernel that a question goes to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Subsystem {
    /// Netfilter.
    Netfilter,
    /// Netfilter, asked about all families at once: that of a message does not count.
    NetfilterOfAllFamilies,
    /// Addresses.
    Addresses,
    /// Routes, and the rules that choose a table of routes.
    Routes,
}

impl Subsystem {
    /// The length of a message's subject in bytes.
    fn subject(self) -> usize {
        match self {
            Self::Netfilter | Self::NetfilterOfAllFamilies => 4,
            Self::Addresses => 8,
            Self::Routes => 12,
        }
    }
}

/// A question or an order.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    /// The type of the message: for netfilter the number of its subsystem times
    /// 256, plus the number of the message.
    pub kind: u16,
    /// The family that it is about.
    pub family: Family,
    /// Its attributes.
    pub attributes: &'a [u8],
}

/// One item of an answer.
#[derive(Clone, Copy, Debug)]
pub struct Item<'a> {
    /// Its subject.
    pub subject: &'a [u8],
    /// Its attributes.
    pub attributes: &'a [u8],
}

/// A conversation with the kernel.
pub struct Socket<C = Kernel> {
    subsystem: Subsystem,
    channel: C,
}

/// Carries messages to the kernel and packets of messages back.
pub trait Channel {
    /// Sends one message.
    fn send(&mut self, message: &[u8]) -> io::Result<()>;

    /// Waits for a packet of messages, a few seconds at most.
    fn receive(&mut self) -> io::Result<&[u8]>;
}

/// The real kernel.
pub struct Kernel {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl Channel for Kernel {
    fn send(&mut self, message: &[u8]) -> io::Result<()> {
        send(&self.socket, message, SendFlags::empty())?;
        Ok(())
    }

    fn receive(&mut self) -> io::Result<&[u8]> {
        loop {
            match recv(&self.socket, self.buffer.as_mut_slice(), RecvFlags::empty()) {
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
                Ok((length, _)) => return self.buffer.get(..length).ok_or_else(malformed),
            }
        }
    }
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
                Subsystem::Netfilter | Subsystem::NetfilterOfAllFamilies => {
                    Some(netlink::NETFILTER)
                }
                Subsystem::Addresses | Subsystem::Routes => None,
            },
        )?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(PATIENCE))?;
        connect(&socket, &netlink::SocketAddrNetlink::new(0, 0))?;
        Ok(Self {
            subsystem,
            channel: Kernel {
                socket,
                buffer: vec![0; BUFFER],
            },
        })
    }
}

impl Socket {
    /// The name of an interface.
    pub fn interface(&self, index: u32) -> Option<String> {
        netdevice::index_to_name(&self.channel.socket, index).ok()
    }
}

impl<C: Channel> Socket<C> {
    /// Asks for a list and folds the attributes of its items into `start`, until
    /// the list ends or `fold` breaks. A list that changed while the kernel
    /// wrote it is asked for again, and folded from the start.
    ///
    /// # Errors
    /// The kernel's own, a malformed answer, or a list that changes all the time.
    pub fn dump<T: Clone>(
        &mut self,
        message: Message,
        start: &T,
        mut fold: impl FnMut(&mut T, &[u8]) -> ControlFlow<()>,
    ) -> io::Result<T> {
        self.dump_items(message, start, |found, item| fold(found, item.attributes))
    }

    /// The same for items whose subjects matter too.
    ///
    /// # Errors
    /// As [`Self::dump`].
    pub fn dump_items<T: Clone>(
        &mut self,
        message: Message,
        start: &T,
        mut fold: impl FnMut(&mut T, Item) -> ControlFlow<()>,
    ) -> io::Result<T> {
        for attempt in 0..DUMPS {
            thread::sleep(Duration::from_millis(attempt.min(20)));
            let mut found = start.clone();
            let each = &mut |item: Item| fold(&mut found, item);
            if self.ask(message, NLM_F_DUMP, each)? == Answer::Whole {
                return Ok(found);
            }
        }
        Err(io::Error::other(format!(
            "the kernel's list changed during each of {DUMPS} attempts to read it"
        )))
    }

    /// Asks for one item; returns its attributes.
    ///
    /// # Errors
    /// The kernel's own, or a malformed answer.
    pub fn get(&mut self, message: Message) -> io::Result<Vec<u8>> {
        let mut found = Vec::new();
        let each = &mut |item: Item| {
            found = item.attributes.to_vec();
            ControlFlow::Continue(())
        };
        self.ask(message, NLM_F_ACK, each)?;
        Ok(found)
    }

    /// Gives an order and waits until the kernel has carried it out.
    ///
    /// # Errors
    /// The kernel's own, or a malformed answer.
    pub fn order(&mut self, message: Message) -> io::Result<()> {
        let ignore = &mut |_: Item| ControlFlow::Continue(());
        self.ask(message, NLM_F_ACK, ignore).map(|_| ())
    }

    /// Orders something new, which must not exist yet.
    ///
    /// # Errors
    /// As [`Self::order`].
    pub fn create(&mut self, message: Message) -> io::Result<()> {
        let ignore = &mut |_: Item| ControlFlow::Continue(());
        self.ask(message, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, ignore)
            .map(|_| ())
    }

    /// Gives an order in a batch of its own, as nftables wants its changes.
    ///
    /// # Errors
    /// As [`Self::order`].
    pub fn order_in_batch(&mut self, subsystem: u16, message: Message) -> io::Result<()> {
        const NFNL_MSG_BATCH_BEGIN: u16 = 16;
        const NFNL_MSG_BATCH_END: u16 = 17;
        let mark = |kind| {
            let mark = Message {
                kind,
                attributes: &[],
                ..message
            };
            let mut bytes = encode(self.subsystem, mark, NLM_F_REQUEST);
            // `struct nfgenmsg`: no family, version 0, and the subsystem's number.
            bytes[HEADER] = 0;
            bytes[HEADER + 2..].copy_from_slice(&subsystem.to_be_bytes());
            bytes
        };
        let order = encode(self.subsystem, message, NLM_F_REQUEST | NLM_F_ACK);
        let batch = [mark(NFNL_MSG_BATCH_BEGIN), order, mark(NFNL_MSG_BATCH_END)];
        self.channel.send(&batch.concat())?;
        let ignore = &mut |_: Item| ControlFlow::Continue(());
        self.answer(ignore).map(|_| ())
    }

    fn ask(
        &mut self,
        message: Message,
        flags: u16,
        each: &mut dyn FnMut(Item) -> ControlFlow<()>,
    ) -> io::Result<Answer> {
        let request = encode(self.subsystem, message, NLM_F_REQUEST | flags);
        self.channel.send(&request)?;
        self.answer(each)
    }

    fn answer(&mut self, each: &mut dyn FnMut(Item) -> ControlFlow<()>) -> io::Result<Answer> {
        let mut answer = Answer::Whole;
        loop {
            let packet = self.channel.receive()?;
            match read_packet(self.subsystem, packet, &mut answer, each)? {
                Progress::More => {}
                Progress::Done => return Ok(answer),
                Progress::Enough => return Ok(Answer::Whole),
            }
        }
    }
}

/// The quality of a list.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Answer {
    Whole,
    Interrupted,
}

/// The state of an answer after one packet.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Progress {
    /// More packets follow.
    More,
    /// It was the last packet.
    Done,
    /// The reader wants no more of it.
    Enough,
}

fn encode(subsystem: Subsystem, message: Message, flags: u16) -> Vec<u8> {
    let start = HEADER + subsystem.subject();
    let length = u32::try_from(start + message.attributes.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::new();
    bytes.extend(length.to_ne_bytes());
    bytes.extend(message.kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(1_u32.to_ne_bytes());
    bytes.extend(0_u32.to_ne_bytes());
    bytes.push(match subsystem {
        Subsystem::NetfilterOfAllFamilies => 0,
        _ => protocol_family(message.family),
    });
    bytes.resize(start, 0);
    bytes.extend(message.attributes);
    bytes
}

/// `AF_INET` or `AF_INET6`, equal to `NFPROTO_IPV4` and `NFPROTO_IPV6`.
fn protocol_family(family: Family) -> u8 {
    match family {
        Family::Ipv4 => 2,
        Family::Ipv6 => 10,
    }
}

fn malformed() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "the kernel's answer is malformed",
    )
}

fn read_packet(
    subsystem: Subsystem,
    mut packet: &[u8],
    answer: &mut Answer,
    each: &mut dyn FnMut(Item) -> ControlFlow<()>,
) -> io::Result<Progress> {
    while !packet.is_empty() {
        let length = u32_at(packet, 0).ok_or_else(malformed)? as usize;
        let kind = u16_at(packet, 4).ok_or_else(malformed)?;
        let flags = u16_at(packet, 6).ok_or_else(malformed)?;
        let message = packet.get(..length).ok_or_else(malformed)?;
        if flags & NLM_F_DUMP_INTR != 0 {
            *answer = Answer::Interrupted;
        }
        match kind {
            // Both carry an error number: 0 or negative.
            NLMSG_DONE | NLMSG_ERROR => {
                let code = match u32_at(message, HEADER) {
                    None if kind == NLMSG_DONE => 0,
                    code => i32::from_ne_bytes(code.ok_or_else(malformed)?.to_ne_bytes()),
                };
                return match code {
                    0 => Ok(Progress::Done),
                    error => Err(io::Error::from_raw_os_error(error.saturating_neg())),
                };
            }
            _ => {
                let start = HEADER + subsystem.subject();
                let item = Item {
                    subject: message.get(HEADER..start).ok_or_else(malformed)?,
                    attributes: message.get(start..).ok_or_else(malformed)?,
                };
                if each(item).is_break() {
                    return Ok(Progress::Enough);
                }
            }
        }
        packet = packet.get(aligned(length)..).unwrap_or_default();
    }
    Ok(Progress::More)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at + 4)?.try_into().ok()?;
    Some(u32::from_ne_bytes(four))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let two = bytes.get(at..at + 2)?.try_into().ok()?;
    Some(u16::from_ne_bytes(two))
}

/// The value of the first attribute of a type. The two highest bits of a type
/// are flags (nested, byte order) and are ignored.
pub fn attribute(attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    whole_attribute(attributes, wanted).and_then(|whole| whole.get(4..))
}

/// The first attribute of a type with its header.
pub fn whole_attribute(attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    all_attributes(attributes).find_map(|(kind, whole)| (kind == wanted).then_some(whole))
}

/// All attributes up to the first malformed one: type and bytes with header.
pub fn all_attributes(mut attributes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    const FLAGS: u16 = 0xc000;
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(attributes, 0)?);
        let kind = u16_at(attributes, 2)? & !FLAGS;
        let whole = attributes.get(..length).filter(|_| length >= 4)?;
        attributes = attributes.get(aligned(length)..).unwrap_or_default();
        Some((kind, whole))
    })
}

/// An attribute as the kernel reads it, padded to a multiple of four bytes.
pub fn encoded(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(aligned(bytes.len()), 0);
    bytes
}

/// An attribute that holds attributes.
pub fn nested(kind: u16, attributes: &[Vec<u8>]) -> Vec<u8> {
    const NLA_F_NESTED: u16 = 0x8000;
    encoded(kind | NLA_F_NESTED, &attributes.concat())
}

/// The address in 4 or 16 bytes.
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

    fn message(kind: u16, flags: u16, attributes: &[u8]) -> Vec<u8> {
        let message = Message {
            kind,
            family: Family::Ipv4,
            attributes,
        };
        encode(Subsystem::Netfilter, message, flags)
    }

    /// A kernel that gives these answers, one packet each.
    pub struct Scripted {
        pub sent: Vec<Vec<u8>>,
        packets: Vec<Vec<u8>>,
        packet: Vec<u8>,
    }

    impl Channel for Scripted {
        fn send(&mut self, message: &[u8]) -> io::Result<()> {
            self.sent.push(message.to_vec());
            Ok(())
        }

        fn receive(&mut self) -> io::Result<&[u8]> {
            if self.packets.is_empty() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.packet = self.packets.remove(0);
            Ok(&self.packet)
        }
    }

    fn scripted(packets: Vec<Vec<u8>>) -> Socket<Scripted> {
        Socket {
            subsystem: Subsystem::Netfilter,
            channel: Scripted {
                sent: Vec::new(),
                packets,
                packet: Vec::new(),
            },
        }
    }

    fn names(socket: &mut Socket<Scripted>) -> io::Result<Vec<String>> {
        let message = Message {
            kind: 0x0a01,
            family: Family::Ipv4,
            attributes: &[],
        };
        socket.dump(message, &Vec::new(), |found, attributes| {
            let name = attribute(attributes, 1).unwrap_or_default();
            found.push(String::from_utf8_lossy(name).into_owned());
            ControlFlow::Continue(())
        })
    }

    fn item(flags: u16, name: &str) -> Vec<u8> {
        let attributes = [encoded(2, b"\0\0\0\0"), encoded(1, name.as_bytes())];
        message(0x0a00, flags, &attributes.concat())
    }

    fn done(flags: u16) -> Vec<u8> {
        let mut packet = message(NLMSG_DONE, flags, &[]);
        packet[HEADER..].copy_from_slice(&[0; 4]);
        packet
    }

    #[test]
    fn every_item_of_every_packet_is_read() {
        let packets = vec![
            [item(2, "filter"), item(2, "nat")].concat(),
            [item(2, "raw"), done(2)].concat(),
        ];
        let mut socket = scripted(packets);
        assert_eq!(names(&mut socket).unwrap(), ["filter", "nat", "raw"]);
        assert_eq!(socket.channel.sent.len(), 1);
    }

    #[test]
    fn an_interrupted_dump_is_repeated() {
        let intr = 2 | NLM_F_DUMP_INTR;
        // The flag may stand on an item, or on the end alone.
        for interrupted in [
            vec![item(2, "old"), item(intr, "half"), done(2)],
            vec![item(2, "old"), done(intr)],
        ] {
            let whole = vec![[item(2, "new"), done(2)].concat()];
            let mut socket = scripted([interrupted, whole].concat());
            assert_eq!(names(&mut socket).unwrap(), ["new"]);
            assert_eq!(socket.channel.sent.len(), 2);
        }
        let all = vec![done(intr); 100];
        let error = names(&mut scripted(all)).unwrap_err().to_string();
        assert!(error.contains("during each of 60 attempts"), "{error}");
    }

    #[test]
    fn errors_are_the_kernels_own_and_zero_is_an_acknowledgement() {
        let ordered = |code: i32| {
            let mut packet = message(NLMSG_ERROR, 0, &[0; 16]);
            packet[16..20].copy_from_slice(&code.to_ne_bytes());
            let message = Message {
                kind: 0x0102,
                family: Family::Ipv4,
                attributes: &[],
            };
            scripted(vec![packet]).order(message)
        };
        assert!(ordered(0).is_ok());
        assert_eq!(ordered(-2).unwrap_err().raw_os_error(), Some(2));
        assert!(ordered(i32::MIN).is_err());
    }

    #[test]
    fn a_packet_cut_anywhere_is_refused() {
        let whole = item(2, "nat");
        for cut in 1..whole.len() {
            assert!(
                names(&mut scripted(vec![whole[..cut].to_vec()])).is_err(),
                "{cut}"
            );
        }
        for cut in 0..12 {
            attribute(&encoded(1, b"12345678")[..cut], 1);
        }
    }
}
