//! The kernel's connection table: finding entries and deleting them.
//!
//! The numbers are those of `linux/netfilter/nfnetlink_conntrack.h`.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::ControlFlow;

use super::netlink::{
    self, Message, Socket, Subsystem, aligned, all_attributes, attribute, encoded, nested,
    whole_attribute,
};
use crate::netfilter::{ConntrackEntry, Endpoint, Family, Protocol};

const NFNL_SUBSYS_CTNETLINK: u16 = 1;
const IPCTNL_MSG_CT_NEW: u16 = 0;
const IPCTNL_MSG_CT_GET: u16 = 1;
const IPCTNL_MSG_CT_DELETE: u16 = 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_PROTOINFO: u16 = 4;
const CTA_TIMEOUT: u16 = 7;
const CTA_ID: u16 = 12;
const CTA_NAT_DST: u16 = 13;
const CTA_ZONE: u16 = 18;
const CTA_FILTER: u16 = 25;
const CTA_STATUS_MASK: u16 = 26;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
const CTA_NAT_V4_MINIP: u16 = 1;
const CTA_NAT_V6_MINIP: u16 = 4;
const CTA_PROTOINFO_TCP: u16 = 1;
const CTA_PROTOINFO_TCP_STATE: u16 = 1;
/// `TCP_CONNTRACK_TIME_WAIT` and `TCP_CONNTRACK_CLOSE`.
const CLOSED: [u8; 2] = [7, 8];
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
const CTA_FILTER_F_CTA_IP_SRC: u32 = 1 << 0;
const CTA_FILTER_F_CTA_PROTO_NUM: u32 = 1 << 3;
const CTA_FILTER_F_CTA_PROTO_SRC_PORT: u32 = 1 << 4;
/// The status bit of an entry that was answered: its packets are not NEW.
const IPS_SEEN_REPLY: u32 = 1 << 1;
/// The status bit of an entry that is in the table.
const IPS_CONFIRMED: u32 = 1 << 3;
/// The status bit of an entry whose destination was rewritten, of
/// `enum ip_conntrack_status`.
const IPS_DST_NAT: u32 = 1 << 5;
/// There is no such entry (any more).
const ENOENT: i32 = 2;
/// The most filters that are used one by one. For each the kernel walks its
/// whole table, which costs about a tenth of a list of the whole table
/// (`benches/disconnect.py`).
const FILTERS: usize = 8;

/// The entries that a backend answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplyFilter {
    /// The protocol of the connection.
    pub protocol: Protocol,
    /// The backend; without a port every port of its address.
    pub backend: Endpoint,
}

impl ReplyFilter {
    /// `CTA_FILTER` with the tuple that it speaks of. A kernel before 5.8
    /// ignores both and lists everything. IPv6 addresses are left out: Linux up
    /// to 6.18 at least takes equal ones for different ones
    /// (`ctnetlink_filter_match_tuple`), and would hide just what is wanted.
    fn attributes(&self) -> Vec<u8> {
        let mut flags = CTA_FILTER_F_CTA_PROTO_NUM;
        let mut addresses = Vec::new();
        if let IpAddr::V4(address) = self.backend.address {
            flags |= CTA_FILTER_F_CTA_IP_SRC;
            addresses.push(encoded(CTA_IP_V4_SRC, &address.octets()));
        }
        let mut ports = vec![encoded(CTA_PROTO_NUM, &[self.protocol.number()])];
        if let Some(port) = self.backend.port {
            flags |= CTA_FILTER_F_CTA_PROTO_SRC_PORT;
            ports.push(encoded(CTA_PROTO_SRC_PORT, &port.to_be_bytes()));
        }
        let tuple = [
            nested(CTA_TUPLE_IP, &addresses),
            nested(CTA_TUPLE_PROTO, &ports),
        ];
        let flags = encoded(CTA_FILTER_REPLY_FLAGS, &flags.to_ne_bytes());
        [
            nested(CTA_TUPLE_REPLY, &tuple),
            nested(CTA_FILTER, &[flags]),
        ]
        .concat()
    }
}

/// One direction of a connection, as far as the kernel names it.
#[derive(Default)]
struct Tuple {
    protocol: Option<u8>,
    source: Option<IpAddr>,
    source_port: Option<u16>,
    destination: Option<IpAddr>,
    destination_port: Option<u16>,
}

/// The identifiers of the entries that have a rewritten destination and are
/// `wanted`. The filters spare the kernel the rest of its table; `wanted`
/// decides.
///
/// # Errors
/// Without the capability, or without the module `nf_conntrack_netlink`.
pub fn translated(
    family: Family,
    filters: &[ReplyFilter],
    wanted: &dyn Fn(&ConntrackEntry) -> bool,
) -> io::Result<Vec<Vec<u8>>> {
    let mut socket = Socket::open(Subsystem::Netfilter)?;
    let mut list = |attributes: &[u8]| {
        let message = Message {
            kind: NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET,
            family,
            attributes,
        };
        socket.dump(message, &Vec::new(), |found, attributes| {
            if read(attributes).is_some_and(|entry| wanted(&entry)) {
                found.push(identifier(attributes));
            }
            ControlFlow::Continue(())
        })
    };
    let filters: BTreeSet<Vec<u8>> = filters.iter().map(ReplyFilter::attributes).collect();
    let rewritten = rewritten();
    if filters.len() > FILTERS {
        return list(&rewritten);
    }
    let mut found = Vec::new();
    for filter in filters {
        match list(&filter) {
            Ok(entries) => found.extend(entries),
            // A kernel that knows filters, but not this one.
            Err(error) if is_unsupported(&error) => return list(&rewritten),
            Err(error) => return Err(error),
        }
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// The filter for entries whose destination was rewritten. A kernel that does not know
/// it lists everything.
fn rewritten() -> Vec<u8> {
    let status = IPS_DST_NAT.to_be_bytes();
    [
        encoded(CTA_STATUS, &status),
        encoded(CTA_STATUS_MASK, &status),
    ]
    .concat()
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported
    )
}

/// Deletes entries. One that is gone already counts as deleted.
///
/// # Errors
/// When the kernel refuses.
pub fn delete(family: Family, identifiers: &[Vec<u8>]) -> io::Result<()> {
    if identifiers.is_empty() {
        return Ok(());
    }
    let mut socket = Socket::open(Subsystem::Netfilter)?;
    for attributes in identifiers {
        let deleted = socket.order(Message {
            kind: NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE,
            family,
            attributes,
        });
        match deleted {
            Err(error) if error.raw_os_error() != Some(ENOENT) => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Makes the entry of a TCP connection that is about to begin, as one that keeps
/// its addresses and was answered already. It lasts for some seconds if the
/// connection does not come.
///
/// # Errors
/// Without the capability, without the module `nf_conntrack_netlink`, or when there
/// is such an entry.
pub fn enter(
    socket: &mut Socket,
    from: SocketAddr,
    to: SocketAddr,
    seconds: u32,
) -> io::Result<()> {
    let status = IPS_SEEN_REPLY | IPS_CONFIRMED;
    // To the same address: then the kernel asks no rule of nat.
    let same = match to.ip() {
        IpAddr::V4(address) => encoded(CTA_NAT_V4_MINIP, &address.octets()),
        IpAddr::V6(address) => encoded(CTA_NAT_V6_MINIP, &address.octets()),
    };
    let attributes = [
        direction(CTA_TUPLE_ORIG, from, to),
        direction(CTA_TUPLE_REPLY, to, from),
        encoded(CTA_TIMEOUT, &seconds.to_be_bytes()),
        encoded(CTA_STATUS, &status.to_be_bytes()),
        nested(CTA_NAT_DST, &[same]),
    ];
    socket.create(Message {
        kind: NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_NEW,
        family: Family::of(to.ip()),
        attributes: &attributes.concat(),
    })
}

/// One direction of a TCP connection.
fn direction(kind: u16, from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let address = |address: SocketAddr, v4, v6| match address.ip() {
        IpAddr::V4(address) => encoded(v4, &address.octets()),
        IpAddr::V6(address) => encoded(v6, &address.octets()),
    };
    let addresses = [
        address(from, CTA_IP_V4_SRC, CTA_IP_V6_SRC),
        address(to, CTA_IP_V4_DST, CTA_IP_V6_DST),
    ];
    let ports = [
        encoded(CTA_PROTO_NUM, &[Protocol::Tcp.number()]),
        encoded(CTA_PROTO_SRC_PORT, &from.port().to_be_bytes()),
        encoded(CTA_PROTO_DST_PORT, &to.port().to_be_bytes()),
    ];
    let tuple = [
        nested(CTA_TUPLE_IP, &addresses),
        nested(CTA_TUPLE_PROTO, &ports),
    ];
    nested(kind, &tuple)
}

/// An entry with ports whose destination was rewritten.
///
/// A table may have hundreds of thousands of entries (`benches/status.py`), so each attribute is
/// looked at once.
fn read(attributes: &[u8]) -> Option<ConntrackEntry> {
    let (mut original, mut reply, mut status) = (None, None, None);
    let mut is_closed = false;
    for (kind, whole) in all_attributes(attributes) {
        match kind {
            CTA_TUPLE_ORIG => original = Some(tuple(&whole[4..])),
            CTA_TUPLE_REPLY => reply = Some(tuple(&whole[4..])),
            CTA_STATUS => {
                let bits = u32::from_be_bytes(whole[4..].try_into().ok()?);
                status = Some(bits).filter(|bits| bits & IPS_DST_NAT != 0);
            }
            CTA_PROTOINFO => is_closed = says_closed(&whole[4..]).unwrap_or(false),
            _ => {}
        }
    }
    let (_, original, reply) = (status?, original?, reply?);
    Some(ConntrackEntry {
        protocol: original.protocol?,
        source: original.source?,
        source_port: original.source_port?,
        destination: original.destination?,
        port: original.destination_port?,
        reply_source: (reply.source?, reply.source_port?),
        is_closed,
    })
}

fn says_closed(protocol: &[u8]) -> Option<bool> {
    let tcp = attribute(protocol, CTA_PROTOINFO_TCP)?;
    let state = attribute(tcp, CTA_PROTOINFO_TCP_STATE)?.first()?;
    Some(CLOSED.contains(state))
}

fn tuple(attributes: &[u8]) -> Tuple {
    let mut tuple = Tuple::default();
    let port = |value: &[u8]| Some(u16::from_be_bytes(value.try_into().ok()?));
    for (kind, whole) in all_attributes(attributes) {
        for (part, whole) in all_attributes(&whole[4..]) {
            let value = &whole[4..];
            match (kind, part) {
                (CTA_TUPLE_IP, CTA_IP_V4_SRC | CTA_IP_V6_SRC) => {
                    tuple.source = netlink::address(value);
                }
                (CTA_TUPLE_IP, CTA_IP_V4_DST | CTA_IP_V6_DST) => {
                    tuple.destination = netlink::address(value);
                }
                (CTA_TUPLE_PROTO, CTA_PROTO_NUM) => tuple.protocol = value.first().copied(),
                (CTA_TUPLE_PROTO, CTA_PROTO_SRC_PORT) => tuple.source_port = port(value),
                (CTA_TUPLE_PROTO, CTA_PROTO_DST_PORT) => tuple.destination_port = port(value),
                _ => {}
            }
        }
    }
    tuple
}

/// The attributes that identify this entry, also against a later one between
/// the same ends.
fn identifier(attributes: &[u8]) -> Vec<u8> {
    let mut identifier = Vec::new();
    for kind in [CTA_TUPLE_ORIG, CTA_ZONE, CTA_ID] {
        identifier.extend(whole_attribute(attributes, kind).unwrap_or_default());
        identifier.resize(aligned(identifier.len()), 0);
    }
    identifier
}

#[cfg(test)]
mod tests {
    use super::*;

    fn udp(kind: u16, from: ([u8; 4], u16), to: ([u8; 4], u16)) -> Vec<u8> {
        let addresses = [encoded(1, &from.0), encoded(2, &to.0)];
        let ports = [
            encoded(CTA_PROTO_NUM, &[17]),
            encoded(CTA_PROTO_SRC_PORT, &from.1.to_be_bytes()),
            encoded(CTA_PROTO_DST_PORT, &to.1.to_be_bytes()),
        ];
        let tuple = [
            nested(CTA_TUPLE_IP, &addresses),
            nested(CTA_TUPLE_PROTO, &ports),
        ];
        nested(kind, &tuple)
    }

    fn entry(status: u32) -> Vec<u8> {
        [
            udp(CTA_TUPLE_ORIG, ([10, 8, 0, 2], 4000), ([10, 8, 0, 1], 53)),
            udp(
                CTA_TUPLE_REPLY,
                ([10, 9, 0, 1], 5353),
                ([10, 8, 0, 2], 4000),
            ),
            encoded(CTA_STATUS, &status.to_be_bytes()),
            encoded(CTA_ID, &[1, 2, 3, 4]),
        ]
        .concat()
    }

    #[test]
    fn an_entry_with_dnat_is_read() {
        let connection = read(&entry(IPS_DST_NAT | 8)).unwrap();
        assert_eq!(
            connection,
            ConntrackEntry {
                protocol: 17,
                source: [10, 8, 0, 2].into(),
                source_port: 4000,
                destination: [10, 8, 0, 1].into(),
                port: 53,
                reply_source: ([10, 9, 0, 1].into(), 5353),
                is_closed: false,
            }
        );
        for (state, is_closed) in [(3, false), (6, false), (7, true), (8, true)] {
            let state = encoded(CTA_PROTOINFO_TCP_STATE, &[state]);
            let tcp = nested(CTA_PROTOINFO_TCP, &[state]);
            let with_state = [entry(IPS_DST_NAT), nested(CTA_PROTOINFO, &[tcp])].concat();
            assert_eq!(read(&with_state).unwrap().is_closed, is_closed);
        }
        assert_eq!(read(&entry(8)), None);
        let named = identifier(&entry(0));
        assert_eq!(attribute(&named, CTA_ID), Some(&[1, 2, 3, 4][..]));
        assert!(attribute(&named, CTA_TUPLE_ORIG).is_some());
        assert_eq!(attribute(&named, CTA_TUPLE_REPLY), None);
    }

    #[test]
    fn a_message_cut_anywhere_is_no_entry() {
        let whole = entry(IPS_DST_NAT);
        let status_ends = whole.len() - 8;
        for cut in 0..status_ends {
            assert_eq!(read(&whole[..cut]), None, "{cut}");
        }
    }
}
