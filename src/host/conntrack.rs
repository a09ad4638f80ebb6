//! The connections that the kernel has on record, and ending them.
//!
//! The numbers are those of `linux/netfilter/nfnetlink_conntrack.h`.

use std::io;
use std::net::IpAddr;
use std::ops::ControlFlow;

use super::netlink::{self, Kind, Socket, Subsystem, aligned, attribute, whole_attribute};
use crate::effects::ConntrackEntry;
use crate::netfilter::Family;

const NFNL_SUBSYS_CTNETLINK: u16 = 1;
const IPCTNL_MSG_CT_GET: u16 = 1;
const IPCTNL_MSG_CT_DELETE: u16 = 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
/// That the destination was rewritten, of `enum ip_conntrack_status`.
const IPS_DST_NAT: u32 = 1 << 5;
/// There is no such connection (any more).
const ENOENT: i32 = 2;

/// One of the two directions.
struct Tuple {
    protocol: u8,
    from: (IpAddr, u16),
    to: (IpAddr, u16),
}

/// The connections whose destination was rewritten and that are wanted, each
/// with what names it to the kernel.
///
/// # Errors
/// When the kernel does not tell: without the right to, or without the module
/// `nf_conntrack_netlink`.
pub fn translated(
    family: Family,
    wanted: &dyn Fn(&ConntrackEntry) -> bool,
) -> io::Result<Vec<Vec<u8>>> {
    let mut found = Vec::new();
    let mut look = |attributes: &[u8]| {
        if read(attributes).is_some_and(|connection| wanted(&connection)) {
            found.push(name(attributes));
        }
        ControlFlow::Continue(())
    };
    let question = (NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET);
    Socket::open(Subsystem::Netfilter)?.ask(question, family, Kind::Dump, &[], &mut look)?;
    Ok(found)
}

/// Ends connections; one that is not there any more has ended.
///
/// # Errors
/// When the kernel refuses.
pub fn end(family: Family, names: &[Vec<u8>]) -> io::Result<()> {
    let order = (NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_DELETE);
    let mut socket = Socket::open(Subsystem::Netfilter)?;
    for name in names {
        let ended = socket.ask(order, family, Kind::Order, name, &mut |_| {
            ControlFlow::Continue(())
        });
        match ended {
            Err(error) if error.raw_os_error() != Some(ENOENT) => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// A connection with ports whose destination was rewritten.
fn read(attributes: &[u8]) -> Option<ConntrackEntry> {
    let status = attribute(attributes, CTA_STATUS)?.try_into().ok()?;
    if u32::from_be_bytes(status) & IPS_DST_NAT == 0 {
        return None;
    }
    let original = tuple(attribute(attributes, CTA_TUPLE_ORIG)?)?;
    let reply = tuple(attribute(attributes, CTA_TUPLE_REPLY)?)?;
    Some(ConntrackEntry {
        protocol: original.protocol,
        source: original.from.0,
        destination: original.to.0,
        port: original.to.1,
        answers: reply.from,
    })
}

fn tuple(nested: &[u8]) -> Option<Tuple> {
    let addresses = attribute(nested, CTA_TUPLE_IP)?;
    let ports = attribute(nested, CTA_TUPLE_PROTO)?;
    let port = |kind| Some(u16::from_be_bytes(attribute(ports, kind)?.try_into().ok()?));
    Some(Tuple {
        protocol: *attribute(ports, CTA_PROTO_NUM)?.first()?,
        from: (address(addresses, [1, 3])?, port(CTA_PROTO_SRC_PORT)?),
        to: (address(addresses, [2, 4])?, port(CTA_PROTO_DST_PORT)?),
    })
}

/// An address, in the attribute for IPv4 or in that for IPv6.
fn address(addresses: &[u8], [v4, v6]: [u16; 2]) -> Option<IpAddr> {
    let bytes = attribute(addresses, v4).or_else(|| attribute(addresses, v6))?;
    netlink::address(bytes)
}

/// The attributes that tell this connection from all others, also from a later
/// one between the same ends.
fn name(attributes: &[u8]) -> Vec<u8> {
    let mut name = Vec::new();
    for kind in [CTA_TUPLE_ORIG, CTA_ZONE, CTA_ID] {
        name.extend(whole_attribute(attributes, kind).unwrap_or_default());
        name.resize(aligned(name.len()), 0);
    }
    name
}

#[cfg(test)]
mod tests {
    use super::super::netlink::tests::encoded;
    use super::*;

    const NESTED: u16 = 0x8000;

    fn direction(kind: u16, from: ([u8; 4], u16), to: ([u8; 4], u16)) -> Vec<u8> {
        let addresses = [encoded(1, &from.0), encoded(2, &to.0)].concat();
        let ports = [
            encoded(CTA_PROTO_NUM, &[17]),
            encoded(CTA_PROTO_SRC_PORT, &from.1.to_be_bytes()),
            encoded(CTA_PROTO_DST_PORT, &to.1.to_be_bytes()),
        ];
        let nested = [
            encoded(CTA_TUPLE_IP | NESTED, &addresses),
            encoded(CTA_TUPLE_PROTO | NESTED, &ports.concat()),
        ];
        encoded(kind | NESTED, &nested.concat())
    }

    fn entry(status: u32) -> Vec<u8> {
        [
            direction(CTA_TUPLE_ORIG, ([10, 8, 0, 2], 4000), ([10, 8, 0, 1], 53)),
            direction(
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
    fn a_rewritten_connection_is_read() {
        let connection = read(&entry(IPS_DST_NAT | 8)).unwrap();
        assert_eq!(
            connection,
            ConntrackEntry {
                protocol: 17,
                source: [10, 8, 0, 2].into(),
                destination: [10, 8, 0, 1].into(),
                port: 53,
                answers: ([10, 9, 0, 1].into(), 5353),
            }
        );
        assert_eq!(read(&entry(8)), None);
        let named = name(&entry(0));
        assert_eq!(attribute(&named, CTA_ID), Some(&[1, 2, 3, 4][..]));
        assert!(attribute(&named, CTA_TUPLE_ORIG).is_some());
        assert_eq!(attribute(&named, CTA_TUPLE_REPLY), None);
    }

    #[test]
    fn a_message_cut_anywhere_is_no_connection() {
        let whole = entry(IPS_DST_NAT);
        let status_ends = whole.len() - 8;
        for cut in 0..status_ends {
            assert_eq!(read(&whole[..cut]), None, "{cut}");
        }
    }
}
