//! The tables of nftables, and if one holds a rule. It saves a process for a
//! family that is not in use, and finds rules of iptables-nft on a host that
//! uses legacy. The generation of the rules tells if a dump is still true.
//!
//! The numbers are those of `linux/netfilter/nf_tables.h`.

use std::ops::ControlFlow;

use super::netlink::{Item, Message, Socket, Subsystem, all_attributes, attribute};
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

/// Returns true if a rule that `nft` made rewrites sources, in a table that iptables does
/// not show; `None` when the kernel does not say.
pub fn rewrites_sources() -> Option<bool> {
    let message = Message {
        kind: NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETRULE,
        family: Family::Ipv4,
        attributes: &[],
    };
    let mut socket = Socket::open(Subsystem::NetfilterOfAllFamilies).ok()?;
    let found = socket.dump_items(message, &false, |found, item| {
        *found = !is_of_iptables(item) && rewrites_source(item.attributes);
        match *found {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    found.ok()
}

/// Returns true for a rule of a table that iptables-nft shows.
fn is_of_iptables(rule: Item) -> bool {
    const OF_BOTH: [u8; 2] = [2, 10];
    let is_shown = table_name(rule.attributes).is_some_and(|name| Table::from_name(name).is_some());
    is_shown
        && rule
            .subject
            .first()
            .is_some_and(|family| OF_BOTH.contains(family))
}

fn rewrites_source(rule: &[u8]) -> bool {
    const NFTA_RULE_EXPRESSIONS: u16 = 4;
    const NFTA_EXPR_NAME: u16 = 1;
    const NFTA_EXPR_DATA: u16 = 2;
    const NFTA_NAT_TYPE: u16 = 1;
    const NFT_NAT_SNAT: [u8; 4] = [0; 4];
    let expressions = attribute(rule, NFTA_RULE_EXPRESSIONS).unwrap_or_default();
    let mut expressions = all_attributes(expressions).filter_map(|(_, item)| item.get(4..));
    expressions.any(|item| match attribute(item, NFTA_EXPR_NAME) {
        Some(b"masq\0") => true,
        Some(b"nat\0") => {
            let data = attribute(item, NFTA_EXPR_DATA).unwrap_or_default();
            attribute(data, NFTA_NAT_TYPE) == Some(&NFT_NAT_SNAT)
        }
        _ => false,
    })
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
