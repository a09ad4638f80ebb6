//! What nftables has, asked of the kernel directly: which tables there are and
//! whether one holds a rule. It spares a process for a family that is not in
//! use, and tells whether iptables-nft has rules on a host that uses legacy.
//!
//! The messages are those of `linux/netfilter/nf_tables.h`: a header of 16
//! bytes, `struct nfgenmsg` of 4, and attributes of length, type and value.

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::net::{connect, netlink, recv, send, socket_with, sockopt};

use crate::net::{Family, Table};

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_GETTABLE: u16 = 1;
const NFT_MSG_GETRULE: u16 = 7;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x001;
const NLM_F_DUMP: u16 = 0x300;
/// The first attribute of both tables and rules is the name of the table.
const NFTA_TABLE: u16 = 1;

/// Whether there is such a table. `None` when the kernel does not say.
pub fn has_table(family: Family, table: Table) -> Option<bool> {
    tables_named(family, NFT_MSG_GETTABLE, &|name| name == table.as_str())
}

/// Whether any table that iptables-nft uses holds a rule. `None` when the
/// kernel does not say.
pub fn has_iptables_rules(family: Family) -> Option<bool> {
    tables_named(family, NFT_MSG_GETRULE, &|name| {
        Table::from_name(name).is_some()
    })
}

/// Whether the kernel's list of tables, or of rules, has one whose table is
/// named so.
fn tables_named(family: Family, request: u16, wanted: &dyn Fn(&str) -> bool) -> Option<bool> {
    const BUFFER: usize = 1 << 15;
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        Some(netlink::NETFILTER),
    )
    .ok()?;
    sockopt::set_socket_timeout(
        &socket,
        sockopt::Timeout::Recv,
        Some(std::time::Duration::from_secs(5)),
    )
    .ok()?;
    connect(&socket, &netlink::SocketAddrNetlink::new(0, 0)).ok()?;
    send(&socket, &question(family, request), SendFlags::empty()).ok()?;
    let mut buffer = vec![0; BUFFER];
    loop {
        let (length, _) = match recv(&socket, buffer.as_mut_slice(), RecvFlags::empty()) {
            Err(Errno::INTR) => continue,
            received => received.ok()?,
        };
        match answer(buffer.get(..length)?, wanted)? {
            Answer::Found => return Some(true),
            Answer::End => return Some(false),
            Answer::More => {}
        }
    }
}

fn question(family: Family, request: u16) -> Vec<u8> {
    const LENGTH: u32 = 20;
    let mut message = Vec::new();
    message.extend(LENGTH.to_ne_bytes());
    message.extend((NFNL_SUBSYS_NFTABLES << 8 | request).to_ne_bytes());
    message.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    message.extend(1_u32.to_ne_bytes());
    message.extend(0_u32.to_ne_bytes());
    message.extend([protocol_family(family), 0, 0, 0]);
    message
}

/// `NFPROTO_IPV4` and `NFPROTO_IPV6`
fn protocol_family(family: Family) -> u8 {
    match family {
        Family::Ipv4 => 2,
        Family::Ipv6 => 10,
    }
}

#[derive(Debug, PartialEq)]
enum Answer {
    Found,
    More,
    End,
}

/// Reads one packet of the kernel's; `None` when it is an error or makes no
/// sense.
fn answer(mut packet: &[u8], wanted: &dyn Fn(&str) -> bool) -> Option<Answer> {
    while !packet.is_empty() {
        let length = u32::from_ne_bytes(packet.get(..4)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(packet.get(4..6)?.try_into().ok()?);
        let message = packet.get(..length)?;
        match kind {
            NLMSG_DONE => return Some(Answer::End),
            NLMSG_ERROR => return None,
            _ if table_name(message.get(20..)?).is_some_and(wanted) => return Some(Answer::Found),
            _ => {}
        }
        packet = packet.get(aligned(length)..).unwrap_or_default();
    }
    Some(Answer::More)
}

fn table_name(mut attributes: &[u8]) -> Option<&str> {
    loop {
        let length = usize::from(u16::from_ne_bytes(attributes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?);
        let value = attributes.get(4..length)?;
        if kind == NFTA_TABLE {
            return std::str::from_utf8(value.strip_suffix(&[0])?).ok();
        }
        attributes = attributes.get(aligned(length)..)?;
    }
}

/// Messages and attributes begin at multiples of four bytes.
fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, attributes: &[u8]) -> Vec<u8> {
        let mut message = question(Family::Ipv4, 0);
        message.extend(attributes);
        let length = u32::try_from(message.len()).unwrap();
        message[..4].copy_from_slice(&length.to_ne_bytes());
        message[4..6].copy_from_slice(&kind.to_ne_bytes());
        message
    }

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(4 + value.len()).unwrap();
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(value);
        bytes.resize(aligned(bytes.len()), 0);
        bytes
    }

    #[test]
    fn a_table_is_found_among_others() {
        let table = |name: &[u8]| {
            message(
                0x0a00,
                &[attribute(2, b"\0\0\0\0"), attribute(NFTA_TABLE, name)].concat(),
            )
        };
        let is_nat = |name: &str| name == "nat";
        let both = [table(b"filter\0"), table(b"nat\0")].concat();
        assert_eq!(answer(&both, &is_nat), Some(Answer::Found));
        assert_eq!(answer(&table(b"filter\0"), &is_nat), Some(Answer::More));
        let done = [table(b"filter\0"), message(NLMSG_DONE, &[])].concat();
        assert_eq!(answer(&done, &is_nat), Some(Answer::End));
        assert_eq!(answer(&message(NLMSG_ERROR, &[]), &is_nat), None);
    }

    #[test]
    fn a_packet_cut_anywhere_is_not_believed() {
        let whole = message(0x0a00, &attribute(NFTA_TABLE, b"nat\0"));
        for cut in 1..whole.len() {
            assert_eq!(answer(&whole[..cut], &|_| true), None, "{cut}");
        }
    }
}
