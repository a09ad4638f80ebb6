//! The tables of nftables, and if one holds a rule. It saves a process for a
//! family that is not in use, and finds rules of iptables-nft on a host that
//! uses legacy. The generation of the rules tells if a dump is still true.
//!
//! The numbers are those of `linux/netfilter/nf_tables.h`.

use std::ops::ControlFlow;

use super::netlink::{Message, Socket, Subsystem, attribute};
use crate::netfilter::{Family, Table};

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_GETTABLE: u16 = 1;
const NFT_MSG_GETRULE: u16 = 7;
const NFT_MSG_GETGEN: u16 = 16;
const NFTA_GEN_ID: u16 = 1;
/// The first attribute of both tables and rules is the name of the table.
const NFTA_TABLE: u16 = 1;

/// Returns true if there is such a table; `None` when the kernel does not say.
pub fn has_table(family: Family, table: Table) -> Option<bool> {
    any_in_table(family, NFT_MSG_GETTABLE, &|name| name == table.as_str())
}

/// Returns true if any table that iptables-nft uses holds a rule; `None` when
/// the kernel does not say.
pub fn has_iptables_rules(family: Family) -> Option<bool> {
    any_in_table(family, NFT_MSG_GETRULE, &|name| {
        Table::from_name(name).is_some()
    })
}

/// The generation of the rules of this network namespace: each commit, by whatever
/// program and in whatever family, adds one. `None` when the kernel does not say.
pub fn generation() -> Option<u32> {
    let message = Message {
        kind: NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETGEN,
        family: Family::Ipv4,
        attributes: &[],
    };
    let answer = Socket::open(Subsystem::Netfilter).ok()?.get(message).ok()?;
    let number = attribute(&answer, NFTA_GEN_ID)?;
    Some(u32::from_be_bytes(number.try_into().ok()?))
}

/// Searches the kernel's list of tables, or of rules, for an item whose table
/// has a `wanted` name.
fn any_in_table(family: Family, message: u16, wanted: &dyn Fn(&str) -> bool) -> Option<bool> {
    let message = Message {
        kind: NFNL_SUBSYS_NFTABLES << 8 | message,
        family,
        attributes: &[],
    };
    let mut socket = Socket::open(Subsystem::Netfilter).ok()?;
    let found = socket.dump(message, &false, |found, attributes| {
        *found = table_name(attributes).is_some_and(wanted);
        match *found {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    found.ok()
}

fn table_name(attributes: &[u8]) -> Option<&str> {
    let name = attribute(attributes, NFTA_TABLE)?;
    std::str::from_utf8(name.strip_suffix(&[0])?).ok()
}
