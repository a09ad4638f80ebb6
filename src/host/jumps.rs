//! Jump rules that iptables cannot delete by their text.
//!
//! `-m recent` and `-m connlimit` keep kernel pointers in the data that
//! `iptables -D` compares, so it never finds such a rule (seen with 1.8.9, both
//! variants). Deleting by number is not safe in a chain that others edit too:
//! it could hit a foreign rule. There are two ways that cannot:
//!
//! - **nft**: every rule has a handle, which the kernel never gives to another
//!   rule of the table. A rule whose verdict jumps to one of our chains is ours
//!   by definition, and its handle names it and nothing else.
//! - **legacy**: we hold the lock of xtables, find the numbers, and delete them,
//!   so that no iptables can write in between. The programs that we start get a
//!   lock file of their own (`XTABLES_LOCKFILE`). One that does not know this
//!   variable waits for us and gives up: the error stays then. A writer that
//!   takes no lock is noticed by the kernel if it changed the number of rules.

use std::io;
use std::ops::ControlFlow;

use super::netlink::{
    Message, Socket, Subsystem, all_attributes, attribute, encoded, whole_attribute,
};
use crate::netfilter::rule::{UNDELETABLE, is_undeletable, words};
use crate::netfilter::{Family, Name, Table};

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_GETRULE: u16 = 7;
const NFT_MSG_DELRULE: u16 = 8;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_HANDLE: u16 = 3;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_MATCH_NAME: u16 = 1;
const NFTA_IMMEDIATE_DATA: u16 = 2;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CHAIN: u16 = 2;

/// Deletes the undeletable jump rules of a table in nft that lead into chains of
/// `name`, by their handles.
///
/// # Errors
/// The kernel's own.
pub fn delete_by_handle(family: Family, table: Table, name: &Name) -> io::Result<()> {
    let mut socket = Socket::open(Subsystem::Netfilter)?;
    let table_attribute = encoded(NFTA_RULE_TABLE, &terminated(table.as_str()));
    let message = Message {
        kind: NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETRULE,
        family,
        attributes: &table_attribute,
    };
    let rules = socket.dump(message, &Vec::new(), |found, attributes| {
        let is_in_table = text(attributes, NFTA_RULE_TABLE) == Some(table.as_str());
        if is_in_table && is_undeletable_jump(attributes, name) {
            let names = [NFTA_RULE_TABLE, NFTA_RULE_CHAIN, NFTA_RULE_HANDLE];
            let names = names.map(|kind| whole_attribute(attributes, kind).unwrap_or_default());
            let padded = names.map(|name| {
                let mut bytes = name.to_vec();
                bytes.resize(bytes.len().next_multiple_of(4), 0);
                bytes
            });
            found.push(padded.concat());
        }
        ControlFlow::Continue(())
    })?;
    for attributes in &rules {
        socket.order_in_batch(
            NFNL_SUBSYS_NFTABLES,
            Message {
                kind: NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_DELRULE,
                family,
                attributes,
            },
        )?;
    }
    Ok(())
}

/// Returns true for a rule of a foreign chain that has one of the matches, and
/// whose verdict is a jump to a chain of `name`.
fn is_undeletable_jump(rule: &[u8], name: &Name) -> bool {
    let is_foreign = text(rule, NFTA_RULE_CHAIN).is_some_and(|chain| !name.owns(chain));
    let expressions = attribute(rule, NFTA_RULE_EXPRESSIONS).unwrap_or_default();
    let expressions = || {
        let items = all_attributes(expressions).filter_map(|(_, item)| item.get(4..));
        items.filter_map(|item| {
            Some((
                text(item, NFTA_EXPR_NAME)?,
                attribute(item, NFTA_EXPR_DATA)?,
            ))
        })
    };
    let has_match = expressions().any(|(expression, data)| match expression {
        "match" => text(data, NFTA_MATCH_NAME).is_some_and(|name| UNDELETABLE.contains(&name)),
        other => other == "connlimit",
    });
    let jumps = expressions().any(|(expression, data)| {
        expression == "immediate" && verdict_chain(data).is_some_and(|chain| name.owns(chain))
    });
    is_foreign && has_match && jumps
}

fn verdict_chain(immediate: &[u8]) -> Option<&str> {
    let data = attribute(immediate, NFTA_IMMEDIATE_DATA)?;
    text(attribute(data, NFTA_DATA_VERDICT)?, NFTA_VERDICT_CHAIN)
}

/// A string attribute, without its final NUL.
fn text(attributes: &[u8], kind: u16) -> Option<&str> {
    let value = attribute(attributes, kind)?;
    std::str::from_utf8(value.strip_suffix(&[0]).unwrap_or(value)).ok()
}

fn terminated(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

/// The transaction that deletes the undeletable jump rules of a table in a dump
/// of iptables-legacy, by number; `None` if there are none.
#[must_use]
pub fn deletion_by_number(dump: &[u8], table: Table, name: &Name) -> Option<Vec<u8>> {
    let dump = String::from_utf8_lossy(dump);
    let lines = dump
        .lines()
        .skip_while(|line| line.strip_prefix('*') != Some(table.as_str()))
        .take_while(|line| *line != "COMMIT");
    let mut number = 0;
    let mut last = "";
    let mut deletions = Vec::new();
    for line in lines {
        let Some((chain, rule)) = line
            .strip_prefix("-A ")
            .and_then(|rest| rest.split_once(' '))
        else {
            continue;
        };
        number = if chain == last { number + 1 } else { 1 };
        last = chain;
        if !name.owns(chain) && is_undeletable(rule) && jumps_to(rule, name) {
            deletions.push(format!("-D {chain} {number}\n"));
        }
    }
    if deletions.is_empty() {
        return None;
    }
    // From the last to the first, so that the numbers stay true.
    deletions.reverse();
    Some(format!("*{}\n{}COMMIT\n", table.as_str(), deletions.concat()).into_bytes())
}

fn jumps_to(rule: &str, name: &Name) -> bool {
    let mut is_target = false;
    words(rule).any(|word| {
        let found = is_target && name.owns(&word);
        is_target = word == "-j" || word == "-g";
        found
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_jumps_into_our_chains_are_deleted_by_number() {
        let dump = "*filter\n-A FORWARD -m recent --set -j W\nCOMMIT\n*nat\n:W - [0:0]\n\
            -A PREROUTING -m recent --set -j OTHER\n-A PREROUTING -m recent --set -j W/a\n-A PREROUTING -p tcp -j W\n\
            -A PREROUTING -m comment --comment \"-m recent -j W\" -j ACCEPT\n-A PREROUTING -m connlimit --connlimit-above 3 -g W\n\
            -A MINE -m recent --set -j WW\n-A MINE -m recent --set -j W\n-A W -m recent --set -j W/a\nCOMMIT\n";
        let name = Name::new("W").unwrap();
        let text = deletion_by_number(dump.as_bytes(), Table::Nat, &name).unwrap();
        assert_eq!(
            String::from_utf8(text).unwrap(),
            "*nat\n-D MINE 2\n-D PREROUTING 5\n-D PREROUTING 2\nCOMMIT\n"
        );
        let mangle = deletion_by_number(dump.as_bytes(), Table::Mangle, &name);
        assert_eq!(mangle, None);
    }
}
