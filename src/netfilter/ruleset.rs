//! Rulesets: the part of a host's rules that a balancer owns, its chains and
//! the rules elsewhere that jump to them.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use crate::netfilter::Table;
use crate::netfilter::rule::Rule;

/// Packets and bytes that a rule has matched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// In the nat table: connections.
    pub packets: u64,
    /// The sum of their lengths.
    pub bytes: u64,
}

impl Counters {
    /// Both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            packets: self.packets.saturating_add(other.packets),
            bytes: self.bytes.saturating_add(other.bytes),
        }
    }
}

/// A rule as the dump has it.
#[derive(Clone, Debug)]
pub struct SavedRule {
    /// The text after `-A CHAIN`, beginning with a blank, to the byte.
    pub text: Vec<u8>,
    /// Its counters; zero in a dump without counters.
    pub counters: Counters,
    /// Its meaning, if it can be parsed.
    pub meaning: Option<Rule>,
    /// True for a rule that this run has written.
    pub fresh: bool,
}

/// Rules without regard to their counters: the same text is the same rule.
impl PartialEq for SavedRule {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl SavedRule {
    /// Parses the text after `-A CHAIN`.
    #[must_use]
    pub fn new(table: Table, text: &[u8], counters: Counters) -> Self {
        let meaning = std::str::from_utf8(text).ok();
        Self {
            text: text.to_vec(),
            counters,
            meaning: meaning.and_then(|text| Rule::parse(table, text).ok()),
            fresh: false,
        }
    }

    /// The text for people: without the blank, and with invalid UTF-8 replaced.
    #[must_use]
    pub fn shown(&self) -> Cow<'_, str> {
        match String::from_utf8_lossy(&self.text) {
            Cow::Borrowed(text) => text.trim_start().into(),
            Cow::Owned(text) => text.trim_start().to_owned().into(),
        }
    }
}

/// A jump rule: it stands in a foreign chain and jumps to one of ours.
#[derive(Clone, Debug, PartialEq)]
pub struct JumpRule {
    /// The chain that it stands in.
    pub chain: String,
    /// Its place in that chain when the dump was made, from 1.
    pub position: u32,
    /// The rule.
    pub rule: SavedRule,
}

/// One of our chains.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chain {
    /// Its rules in order.
    pub rules: Vec<SavedRule>,
}

/// The chains and jump rules of a balancer in one table.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OwnedTable {
    /// By name.
    pub chains: BTreeMap<String, Chain>,
    /// In the order of the dump.
    pub jumps: Vec<JumpRule>,
}

impl OwnedTable {
    /// Returns true if nothing is owned.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.chains.is_empty() && self.jumps.is_empty()
    }
}

/// The rules of a balancer in one family.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ruleset {
    /// The tables in which something is owned.
    pub tables: BTreeMap<Table, OwnedTable>,
    /// The version of iptables that made the dump, such as `1.8.9`.
    pub version: Option<String>,
    /// True if iptables-nft 1.8.0 to 1.8.2 made the dump.
    pub is_old_nft: bool,
    /// The tables that the dump shows.
    pub shown: BTreeSet<Table>,
    /// Tables that are there and not in the dump, since `nft` made them in a
    /// way that iptables cannot show.
    pub unreadable: Vec<String>,
    /// The position in filter's FORWARD, from 1, of the first rule that drops
    /// or rejects.
    pub forward_refuses_at: Option<u32>,
}

impl Ruleset {
    /// Merges the rulesets of two dumps of the same family.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.tables.extend(other.tables);
        self.version = self.version.or(other.version);
        self.is_old_nft |= other.is_old_nft;
        self.shown.extend(other.shown);
        self.unreadable.extend(other.unreadable);
        self.unreadable.sort();
        self.unreadable.dedup();
        self.forward_refuses_at = self.forward_refuses_at.or(other.forward_refuses_at);
        self
    }

    /// The rules that are owned in a table, perhaps none.
    #[must_use]
    pub fn owned(&self, table: Table) -> &OwnedTable {
        static NOTHING: OwnedTable = OwnedTable {
            chains: BTreeMap::new(),
            jumps: Vec::new(),
        };
        self.tables.get(&table).unwrap_or(&NOTHING)
    }

    /// Returns true if both own the same rules, at any position of foreign
    /// chains.
    #[must_use]
    pub fn reads_like(&self, other: &Self) -> bool {
        let texts = |ruleset: &Self| {
            let owned = ruleset.tables.iter().filter(|(_, owned)| !owned.is_empty());
            let table = |(table, owned): (&Table, &OwnedTable)| {
                let lead = |lead: &JumpRule| (lead.chain.clone(), lead.rule.text.clone());
                let mut jumps: Vec<_> = owned.jumps.iter().map(lead).collect();
                jumps.sort();
                (*table, owned.chains.clone(), jumps)
            };
            owned.map(table).collect::<Vec<_>>()
        };
        texts(self) == texts(other)
    }

    /// Returns true if the table exists, but the dump omits it.
    #[must_use]
    pub fn hides(&self, table: Table) -> bool {
        self.unreadable.iter().any(|name| name == table.as_str())
    }

    /// Returns true if nothing is owned in any table.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tables.values().all(OwnedTable::is_empty)
    }
}
