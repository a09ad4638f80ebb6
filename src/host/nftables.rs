//! What nftables has: which tables there are and whether one holds a rule. It
//! spares a process for a family that is not in use, and tells whether
//! iptables-nft has rules on a host that uses legacy.
//!
//! The numbers are those of `linux/netfilter/nf_tables.h`.

use std::ops::ControlFlow;

use super::netlink::{Kind, Socket, Subsystem, attribute};
use crate::netfilter::{Family, Table};

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_GETTABLE: u16 = 1;
const NFT_MSG_GETRULE: u16 = 7;
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
    let mut found = false;
    let mut look = |attributes: &[u8]| match table_name(attributes).is_some_and(wanted) {
        true => {
            found = true;
            ControlFlow::Break(())
        }
        false => ControlFlow::Continue(()),
    };
    let question = (NFNL_SUBSYS_NFTABLES, request);
    let mut socket = Socket::open(Subsystem::Netfilter).ok()?;
    let asked = socket.ask(question, family, Kind::Dump, &[], &mut look);
    asked.ok().map(|()| found)
}

fn table_name(attributes: &[u8]) -> Option<&str> {
    let name = attribute(attributes, NFTA_TABLE)?;
    std::str::from_utf8(name.strip_suffix(&[0])?).ok()
}
