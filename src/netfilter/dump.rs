//! The reader of `iptables-save` dumps.
//!
//! A dump is read line by line as it arrives. Of a host with 20,000 foreign
//! rules only ours stay in memory: our chains, and the rules elsewhere that
//! jump to them. The rest is neither kept nor ever written, so it stays as it
//! is, to the byte.

use std::collections::HashMap;
use std::fmt;

use memchr::{memchr, memchr2, memmem};

use super::rule::words;
use super::ruleset::{Counters, JumpRule, OwnedTable, Ruleset, SavedRule};
use super::{Name, Table};

/// Why a dump cannot be acted on.
#[derive(Debug)]
pub enum BadDump {
    /// It ends in the middle of a table.
    Truncated(Table),
    /// A line, counted from 1, that no `iptables-save` writes.
    Line(usize, String),
}

impl fmt::Display for BadDump {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated(table) => write!(
                out,
                "the dump is truncated: table `{}` has no COMMIT",
                table.as_str()
            ),
            Self::Line(number, text) => write!(
                out,
                "line {number} of the dump is not iptables-save's: `{}`",
                text.escape_debug()
            ),
        }
    }
}

impl std::error::Error for BadDump {}

impl Ruleset {
    /// Reads a dump, with or without counters, and keeps what `name` owns.
    ///
    /// # Errors
    /// When the dump is incomplete. An empty dump is complete: a host whose
    /// tables were never used prints nothing.
    pub fn read(dump: &[u8], name: &Name) -> Result<Self, BadDump> {
        let mut reader = DumpReader::new(name);
        reader.feed(dump);
        reader.finish()
    }
}

/// Reads a dump that arrives in pieces.
pub struct DumpReader<'a> {
    lines: Lines<'a>,
    /// The beginning of a line whose end has not arrived.
    rest: Vec<u8>,
    number: usize,
    bad: Option<BadDump>,
}

impl<'a> DumpReader<'a> {
    /// Keeps what `name` owns.
    #[must_use]
    pub fn new(name: &'a Name) -> Self {
        Self {
            lines: Lines::new(name),
            rest: Vec::new(),
            number: 0,
            bad: None,
        }
    }

    /// Takes the next piece. After a bad line everything is ignored.
    pub fn feed(&mut self, mut piece: &[u8]) {
        while let Some(end) = memchr(b'\n', piece) {
            let (line, rest) = (&piece[..end], &piece[end + 1..]);
            if self.rest.is_empty() {
                self.line(line);
            } else {
                let mut whole = std::mem::take(&mut self.rest);
                whole.extend_from_slice(line);
                self.line(&whole);
            }
            piece = rest;
        }
        self.rest.extend_from_slice(piece);
    }

    /// The ruleset at the end of the dump.
    ///
    /// # Errors
    /// The first line that no `iptables-save` writes, or a table without an end.
    pub fn finish(mut self) -> Result<Ruleset, BadDump> {
        if !self.rest.is_empty() {
            let last = std::mem::take(&mut self.rest);
            self.line(&last);
        }
        match self.bad {
            Some(bad) => Err(bad),
            None => self.lines.finish(),
        }
    }

    fn line(&mut self, line: &[u8]) {
        const SHOWN: usize = 80;
        if self.bad.is_some() {
            return;
        }
        self.number += 1;
        if self.lines.line(line).is_err() {
            let text = String::from_utf8_lossy(line).chars().take(SHOWN).collect();
            self.bad = Some(BadDump::Line(self.number, text));
        }
    }
}

/// A line that no `iptables-save` writes.
struct NotSaved;

/// The state between two lines.
struct Lines<'a> {
    name: &'a Name,
    finder: memmem::Finder<'a>,
    ruleset: Ruleset,
    table: Option<Table>,
    /// The chain of the last rule.
    current: Current,
    /// The number of rules of the built-in chains before. A dump has the rules
    /// of a chain in one piece; a file that a person wrote need not.
    positions: HashMap<Vec<u8>, u32>,
}

/// A chain that is being read.
#[derive(Default)]
struct Current {
    chain: Vec<u8>,
    /// The number of its rules so far.
    position: u32,
    /// Its name and its rules in this piece, if the chain is ours.
    ours: Option<(String, Vec<SavedRule>)>,
}

impl<'a> Lines<'a> {
    fn new(name: &'a Name) -> Self {
        Self {
            name,
            finder: memmem::Finder::new(name.as_str()),
            ruleset: Ruleset::default(),
            table: None,
            current: Current::default(),
            positions: HashMap::new(),
        }
    }

    fn line(&mut self, line: &[u8]) -> Result<(), NotSaved> {
        match (line.first(), self.table) {
            (None, _) => Ok(()),
            (Some(b'#'), _) => {
                self.comment(line);
                Ok(())
            }
            (Some(b'*'), None) => self.begin(line),
            (Some(b'C'), Some(table)) if line == b"COMMIT" => {
                self.turn_to(table, b"");
                self.table = None;
                Ok(())
            }
            (Some(b':'), Some(table)) => {
                self.declaration(table, &line[1..]);
                Ok(())
            }
            (Some(b'-' | b'['), Some(table)) => self.rule(table, line),
            _ => Err(NotSaved),
        }
    }

    fn finish(self) -> Result<Ruleset, BadDump> {
        match self.table {
            Some(table) => Err(BadDump::Truncated(table)),
            None => Ok(self.ruleset),
        }
    }

    /// `# Generated by iptables-nft-save v1.8.9 (nf_tables) on ...`, and
    /// ``# Table `nat' is incompatible, use 'nft' tool.``
    fn comment(&mut self, line: &[u8]) {
        let text = String::from_utf8_lossy(line);
        let mut words = text.split(' ');
        if line.starts_with(b"# Table ") && memmem::find(line, b" is incompatible").is_some() {
            let table = words.nth(2).unwrap_or_default().trim_matches(['`', '\'']);
            self.ruleset.unreadable.push(table.to_owned());
        } else if self.ruleset.version.is_none() && line.starts_with(b"# Generated by ") {
            let digits = |rest: &&str| rest.starts_with(|letter: char| letter.is_ascii_digit());
            let version = words.find_map(|word| word.strip_prefix('v').filter(digits));
            // From 1.8.4 on it goes by the name that it is called by.
            self.ruleset.is_old_nft = text.contains(" xtables-save ")
                && matches!(version, Some("1.8.0" | "1.8.1" | "1.8.2"));
            self.ruleset.version = version.map(str::to_owned);
        }
    }

    fn begin(&mut self, line: &[u8]) -> Result<(), NotSaved> {
        let table = std::str::from_utf8(&line[1..])
            .ok()
            .and_then(Table::from_name);
        let table = table.ok_or(NotSaved)?;
        self.ruleset.shown.insert(table);
        self.table = Some(table);
        self.current = Current::default();
        self.positions.clear();
        Ok(())
    }

    /// `:CHAIN POLICY [packets:bytes]`
    fn declaration(&mut self, table: Table, line: &[u8]) {
        let (chain, _) = split_at_blank(line);
        if let Some(chain) = self.ours(chain) {
            self.owned(table).chains.entry(chain).or_default();
        }
    }

    /// `[packets:bytes] -A CHAIN ...`, the counters being optional.
    fn rule(&mut self, table: Table, line: &[u8]) -> Result<(), NotSaved> {
        let (counters, chain, text) = added(line).ok_or(NotSaved)?;
        if self.current.chain != chain {
            self.turn_to(table, chain);
        }
        self.current.position += 1;
        if let Some((_, rules)) = &mut self.current.ours {
            rules.push(SavedRule::new(table, text, counters));
            return Ok(());
        }
        let position = self.current.position;
        let may_refuse = table == Table::Filter && chain == b"FORWARD" && refuses(text);
        if may_refuse && self.ruleset.forward_refuses_at.is_none() {
            self.ruleset.forward_refuses_at = Some(position);
        }
        if self.finder.find(text).is_some() && self.leads_to_us(text) {
            let lead = JumpRule {
                chain: String::from_utf8_lossy(chain).into_owned(),
                position,
                rule: SavedRule::new(table, text, counters),
            };
            self.owned(table).jumps.push(lead);
        }
        Ok(())
    }

    /// Stores the rules of the current chain and goes on with the next.
    fn turn_to(&mut self, table: Table, chain: &[u8]) {
        let next = Current {
            chain: chain.to_vec(),
            position: self.positions.remove(chain).unwrap_or(0),
            ours: self.ours(chain).map(|name| (name, Vec::new())),
        };
        let last = std::mem::replace(&mut self.current, next);
        if is_built_in(&last.chain) {
            self.positions.insert(last.chain, last.position);
        }
        if let Some((name, mut rules)) = last.ours {
            // Of thousands of small chains the unused room would be half.
            rules.shrink_to_fit();
            let known = &mut self.owned(table).chains.entry(name).or_default().rules;
            match known.is_empty() {
                true => *known = rules,
                false => known.append(&mut rules),
            }
        }
    }

    fn ours(&self, chain: &[u8]) -> Option<String> {
        let chain = std::str::from_utf8(chain).ok()?;
        self.name.owns(chain).then(|| chain.to_owned())
    }

    /// Returns true if the target is one of our chains. Only the word after
    /// `-j` or `-g` decides: a comment may hold any text.
    fn leads_to_us(&self, text: &[u8]) -> bool {
        let text = String::from_utf8_lossy(text);
        let mut is_target = false;
        words(&text).any(|word| {
            let jumps = is_target && self.name.owns(&word);
            is_target = ["-j", "-g", "--jump", "--goto"].contains(&&*word);
            jumps
        })
    }

    fn owned(&mut self, table: Table) -> &mut OwnedTable {
        self.ruleset.tables.entry(table).or_default()
    }
}

fn is_built_in(chain: &[u8]) -> bool {
    const BUILT_IN: [&[u8]; 5] = [
        b"PREROUTING",
        b"INPUT",
        b"FORWARD",
        b"OUTPUT",
        b"POSTROUTING",
    ];
    BUILT_IN.contains(&chain)
}

/// Returns true if the target is DROP or REJECT.
fn refuses(text: &[u8]) -> bool {
    let text = String::from_utf8_lossy(text);
    let mut words = words(&text);
    words.by_ref().any(|word| word == "-j")
        && words
            .next()
            .is_some_and(|target| target == "DROP" || target == "REJECT")
}

/// The counters, the chain, and the text after `-A CHAIN` of a line that adds a
/// rule.
pub(crate) fn added(line: &[u8]) -> Option<(Counters, &[u8], &[u8])> {
    let (counters, rest) = split_counters(line)?;
    let (chain, text) = split_at_blank(rest.strip_prefix(b"-A ")?);
    Some((counters, chain, text))
}

fn split_at_blank(line: &[u8]) -> (&[u8], &[u8]) {
    let end = memchr2(b' ', b'\t', line).unwrap_or(line.len());
    line.split_at(end)
}

/// The counters of a line, if it has some, and the rest.
fn split_counters(line: &[u8]) -> Option<(Counters, &[u8])> {
    let Some(inner) = line.strip_prefix(b"[") else {
        return Some((Counters::default(), line));
    };
    let (head, rest) = inner.split_at(memmem::find(inner, b"] ")?);
    let (packets, bytes) = std::str::from_utf8(head).ok()?.split_once(':')?;
    let counters = Counters {
        packets: packets.parse().ok()?,
        bytes: bytes.parse().ok()?,
    };
    Some((counters, &rest[2..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DUMP: &str = r#"# Generated by iptables-nft-save v1.8.9 (nf_tables) on Mon Nov 23 05:47:36 2026
*nat
:PREROUTING ACCEPT [7:420]
:CF - [0:0]
:CF/0 - [0:0]
:CFX - [0:0]
[1:60] -A PREROUTING -p tcp -m tcp --dport 80 -j CFX
[2:120] -A PREROUTING -p tcp -m tcp --dport 5308 -j CF
[0:0] -A PREROUTING -m comment --comment "not -j CF" -j CFX
[0:0] -A PREROUTING -m comment --comment "-j" -g CF/0
[3:180] -A CF -p tcp -j DNAT --to-destination 192.0.2.1:5308
-A CFX -j RETURN
COMMIT
# Completed on Mon Nov 23 05:47:36 2026
"#;

    fn read(dump: &str) -> Result<Ruleset, BadDump> {
        Ruleset::read(dump.as_bytes(), &Name::new("CF").unwrap())
    }

    #[test]
    fn a_ruleset_keeps_only_owned_rules_with_counters_and_positions() {
        let ruleset = read(DUMP).unwrap();
        let owned = ruleset.owned(Table::Nat);
        assert_eq!(owned.chains.keys().collect::<Vec<_>>(), ["CF", "CF/0"]);
        let places: Vec<_> = owned
            .jumps
            .iter()
            .map(|lead| (lead.position, lead.rule.shown()))
            .collect();
        assert_eq!(
            places,
            [
                (2, "-p tcp -m tcp --dport 5308 -j CF".into()),
                (4, "-m comment --comment \"-j\" -g CF/0".into())
            ]
        );
        assert_eq!(
            owned.chains["CF"].rules[0].counters,
            Counters {
                packets: 3,
                bytes: 180
            }
        );
        assert_eq!(ruleset.version.as_deref(), Some("1.8.9"));
    }

    #[test]
    fn without_counters_it_is_the_same_ruleset() {
        let plain: String = DUMP
            .lines()
            .map(|line| {
                line.rsplit_once("] ")
                    .map_or(line, |(_, rest)| rest)
                    .to_owned()
                    + "\n"
            })
            .collect();
        assert_eq!(read(&plain).unwrap(), read(DUMP).unwrap());
    }

    #[test]
    fn an_empty_dump_is_an_empty_host() {
        assert!(read("").unwrap().is_empty());
    }

    #[test]
    fn a_dump_that_is_not_whole_is_refused() {
        let message = |dump: &str| read(dump).unwrap_err().to_string();
        let cut = DUMP.split("COMMIT").next().unwrap();
        assert_eq!(
            message(cut),
            "the dump is truncated: table `nat` has no COMMIT"
        );
        let unreadable = read(
            "# Table `nat' is incompatible, use 'nft' tool.
",
        )
        .unwrap()
        .unreadable;
        assert_eq!(unreadable, ["nat"]);
        assert_eq!(
            message("*nat\nhello\n"),
            "line 2 of the dump is not iptables-save's: `hello`"
        );
        for bad in [
            "*nut\n",
            "-A CF -j ACCEPT\n",
            "COMMIT\n",
            "*nat\n*nat\n",
            "*nat\n[1] -A CF\n",
            "*nat\n[x:1] -A CF\n",
            "*nat\n-I CF\n",
            "table ip nat {\n",
        ] {
            assert!(read(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn invalid_utf8_is_kept_to_the_byte() {
        let mut dump =
            b"*nat\n:CF - [0:0]\n-A CF -m comment --comment \"\xff\" -j RETURN\nCOMMIT\n".to_vec();
        let ruleset = Ruleset::read(&dump, &Name::new("CF").unwrap()).unwrap();
        let rule = &ruleset.tables[&Table::Nat].chains["CF"].rules[0];
        assert_eq!(rule.text, b" -m comment --comment \"\xff\" -j RETURN");
        assert_eq!(rule.meaning, None);
        dump.truncate(20);
        assert!(Ruleset::read(&dump, &Name::new("CF").unwrap()).is_err());
    }

    proptest! {
        #[test]
        fn a_dump_in_pieces_is_the_same_dump(cuts in prop::collection::vec(0..DUMP.len(), 0..9)) {
            let name = Name::new("CF").unwrap();
            let mut cuts = cuts;
            cuts.extend([0, DUMP.len()]);
            cuts.sort_unstable();
            let mut reader = DumpReader::new(&name);
            cuts.windows(2).for_each(|ends| reader.feed(&DUMP.as_bytes()[ends[0]..ends[1]]));
            prop_assert_eq!(reader.finish().unwrap(), read(DUMP).unwrap());
        }
    }
}
