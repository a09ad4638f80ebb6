//! Edits of a saved rules file. The same changes are made to it as to the
//! running rules; every other line stays as it is, to the byte.
//!
//! The file is the output of `iptables-save`, perhaps edited by hand. A new
//! rule goes after the last one of its chain, with zero counters if the file
//! has counters.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};

use crate::diff::change::{Action, Change};
use crate::netfilter::Table;
use crate::netfilter::dump::added;
use crate::netfilter::ruleset::SavedRule;

/// The mode of a new file, as Debian gives its own.
pub const MODE: u32 = 0o640;

/// Why a file cannot be edited, if so: `iptables-restore` takes the last of two
/// sections of one table, where a reader would take both.
#[must_use]
pub fn table_twice(text: &[u8]) -> Option<String> {
    let heads = text
        .split(|byte| *byte == b'\n')
        .filter(|line| line.starts_with(b"*"));
    let mut seen = BTreeSet::new();
    let mut twice = heads
        .map(<[u8]>::trim_ascii_end)
        .filter(|head| !seen.insert(*head));
    let table = twice.next()?.get(1..)?;
    Some(String::from_utf8_lossy(table).into_owned())
}

/// The text after the changes, which were computed for this text.
#[must_use]
pub fn edited(text: &[u8], changes: &[Change]) -> Vec<u8> {
    let mut lines: Vec<Line> = text
        .split_inclusive(|byte| *byte == b'\n')
        .map(Cow::Borrowed)
        .collect();
    if let Some(last) = lines.last_mut().filter(|last| !last.ends_with(b"\n")) {
        last.to_mut().push(b'\n');
    }
    let counted = lines.iter().any(|line| line.starts_with(b"["));
    let mut page = Page::new(lines);
    for change in changes {
        let section = page.section(change.table);
        section.change(&change.chain, &change.action, counted);
    }
    let sections = page.0.into_iter();
    let lines: Vec<Line> = sections.flat_map(Section::into_lines).collect();
    lines.concat()
}

/// A line, with its end.
type Line<'a> = Cow<'a, [u8]>;

/// A file: the lines between tables, and the lines of each table from `*TABLE`
/// up to its COMMIT, in turn.
struct Page<'a>(Vec<Section<'a>>);

impl<'a> Page<'a> {
    fn new(lines: Vec<Line<'a>>) -> Self {
        let mut sections = vec![Section::default()];
        let mut is_table = false;
        for line in lines {
            let begins = line.starts_with(b"*") && !is_table;
            let ends = is_table && line.trim_ascii_end() == b"COMMIT";
            if begins || ends {
                sections.push(Section::default());
                is_table = begins;
            }
            if let Some(section) = sections.last_mut() {
                section.take_in(line);
            }
        }
        Self(sections)
    }

    /// The section of a table; one that is not there is added at the end.
    fn section(&mut self, table: Table) -> &mut Section<'a> {
        let head = format!("*{}", table.as_str());
        let is_wanted = |section: &Section| {
            let first = section.lines.first();
            first.is_some_and(|line| line.trim_ascii_end() == head.as_bytes())
        };
        let at = self.0.iter().position(is_wanted).unwrap_or_else(|| {
            for line in [format!("{head}\n"), "COMMIT\n".to_owned()] {
                let mut section = Section::default();
                section.take_in(line.into_bytes().into());
                self.0.push(section);
            }
            self.0.len() - 2
        });
        &mut self.0[at]
    }
}

/// A part of the file: its lines, and the rules of each chain among them.
#[derive(Default)]
struct Section<'a> {
    /// A deleted line is empty.
    lines: Vec<Line<'a>>,
    /// The declarations of new chains.
    created: Vec<Vec<u8>>,
    chains: Vec<Vec<Entry>>,
    /// The place of each chain among them, by name.
    places: HashMap<Vec<u8>, usize>,
}

/// A rule of a chain.
enum Entry {
    /// A rule of the file, by the index of its line.
    Old(usize),
    /// A new rule.
    New(Vec<u8>),
}

impl<'a> Section<'a> {
    fn take_in(&mut self, line: Line<'a>) {
        if let Some((chain, _)) = rule(&line) {
            let at = self.lines.len();
            let chain = chain.to_vec();
            self.rules(chain).push(Entry::Old(at));
        }
        self.lines.push(line);
    }

    fn rules(&mut self, chain: Vec<u8>) -> &mut Vec<Entry> {
        let place = *self.places.entry(chain).or_insert(self.chains.len());
        if place == self.chains.len() {
            self.chains.push(Vec::new());
        }
        &mut self.chains[place]
    }

    fn text<'b>(&'b self, entry: &'b Entry) -> &'b [u8] {
        let line = match entry {
            Entry::Old(at) => &self.lines[*at],
            Entry::New(line) => line.as_slice(),
        };
        rule(line).map_or(b"", |(_, text)| text)
    }

    fn change(&mut self, chain: &str, action: &Action, counted: bool) {
        let name = chain.as_bytes().to_vec();
        let line = |rule: &SavedRule| {
            let counters = if counted { "[0:0] " } else { "" };
            let head = format!("{counters}-A {chain}").into_bytes();
            [head.as_slice(), &rule.text, b"\n"].concat()
        };
        match action {
            Action::CreateChain => self.created.push(declaration(chain)),
            Action::Append(rule) => self.rules(name).push(Entry::New(line(rule))),
            Action::Insert(at, rule) => {
                let rules = self.rules(name);
                let at = (*at as usize - 1).min(rules.len());
                rules.insert(at, Entry::New(line(rule)));
            }
            Action::Replace { at, rule, .. } => match self.rules(name).get_mut(*at as usize - 1) {
                Some(Entry::New(earlier)) => *earlier = line(rule),
                Some(Entry::Old(at)) => {
                    let at = *at;
                    self.lines[at] = line(rule).into();
                }
                None => {}
            },
            Action::DeleteAt(at, _) => self.delete(name, *at as usize - 1),
            Action::DeleteFirst(rule) | Action::DeleteJump(rule) => {
                let rules = self.places.get(&name).map(|place| &self.chains[*place]);
                let mut rules = rules.into_iter().flatten();
                if let Some(at) = rules.position(|entry| self.text(entry) == rule.text) {
                    self.delete(name, at);
                }
            }
            Action::DeleteChain => {
                for entry in std::mem::take(self.rules(name)) {
                    self.take_out(&entry);
                }
                self.created.retain(|line| !declares(line, chain));
                let declarations = self.lines.iter_mut().filter(|line| declares(line, chain));
                declarations.for_each(|line| *line = Cow::default());
            }
        }
    }

    fn delete(&mut self, chain: Vec<u8>, at: usize) {
        let rules = self.rules(chain);
        if at < rules.len() {
            let entry = rules.remove(at);
            self.take_out(&entry);
        }
    }

    fn take_out(&mut self, entry: &Entry) {
        if let Entry::Old(at) = entry {
            self.lines[*at] = Cow::default();
        }
    }

    /// A new rule stands right before the next old one of its chain, or else
    /// after the last; at the end of the table, if there is none. A chain has to
    /// be declared before a rule jumps to it.
    fn into_lines(self) -> Vec<Line<'a>> {
        let end = self.lines.len();
        let is_head = |line: &Line| line.starts_with(b":") || line.starts_with(b"#");
        let first = self.lines.iter().skip(1).position(|line| !is_head(line));
        let mut before: Vec<Vec<Vec<u8>>> = vec![Vec::new(); end + 1];
        before[first.map_or(end, |first| first + 1)] = self.created;
        for rules in self.chains {
            let mut new = Vec::new();
            let mut after = end;
            for entry in rules {
                match entry {
                    Entry::New(line) => new.push(line),
                    Entry::Old(at) => {
                        before[at].append(&mut new);
                        after = at + 1;
                    }
                }
            }
            before[after].append(&mut new);
        }
        let lines = self.lines.into_iter().map(Some).chain([None]);
        let lines = lines.zip(before);
        lines
            .flat_map(|(line, before)| before.into_iter().map(Cow::Owned).chain(line))
            .collect()
    }
}

/// The chain of a line that adds a rule, and the text after `-A CHAIN`.
fn rule(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let (_, chain, text) = added(line.strip_suffix(b"\n").unwrap_or(line))?;
    Some((chain, text))
}

fn declaration(chain: &str) -> Vec<u8> {
    format!(":{chain} - [0:0]\n").into_bytes()
}

/// Returns true for a line `:CHAIN POLICY [packets:bytes]`.
fn declares(line: &[u8], chain: &str) -> bool {
    let rest = line
        .strip_prefix(b":")
        .and_then(|rest| rest.strip_prefix(chain.as_bytes()));
    rest.is_some_and(|rest| rest.starts_with(b" ") || rest.starts_with(b"\t"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::diff;
    use crate::netfilter::Family;
    use crate::netfilter::ruleset::Ruleset;
    use crate::plan::Plan;
    use crate::request::Request;

    /// The file after the request, and that nothing is left to do then.
    fn saved(text: &str, request: Value) -> String {
        let Value::Object(object) = request else {
            panic!()
        };
        let request = Request::from_json(object).unwrap();
        let plan = Plan::new(&request);
        let changes = |text: &[u8]| {
            diff::to_plan(
                &plan,
                Family::Ipv4,
                &Ruleset::read(text, &request.name).unwrap(),
            )
        };
        let edited = edited(text.as_bytes(), &changes(text.as_bytes()));
        assert_eq!(changes(&edited), []);
        String::from_utf8(edited).unwrap()
    }

    const OTHERS: &str = "# by hand\n*filter\n:INPUT DROP [5:300]\n[1:2] -A INPUT -i lo  -j ACCEPT\nCOMMIT\n\
        *nat\n:PREROUTING ACCEPT [7:420]\n:DOCKER - [0:0]\n[3:4] -A PREROUTING -j DOCKER\n[0:0] -A DOCKER -j RETURN\nCOMMIT\n# end";

    #[test]
    fn edits_keep_every_foreign_line_to_the_byte() {
        let with = saved(
            OTHERS,
            json!({"name": "W", "destination_port": 80, "backends": "192.0.2.1,192.0.2.2"}),
        );
        assert_eq!(
            with,
            "# by hand\n*filter\n:INPUT DROP [5:300]\n[1:2] -A INPUT -i lo  -j ACCEPT\nCOMMIT\n\
            *nat\n:PREROUTING ACCEPT [7:420]\n:DOCKER - [0:0]\n:W - [0:0]\n[3:4] -A PREROUTING -j DOCKER\n\
            [0:0] -A PREROUTING -p tcp -m tcp --dport 80 -j W\n[0:0] -A DOCKER -j RETURN\n\
            [0:0] -A W -p tcp -m statistic --mode nth --every 2 --packet 0 -j DNAT --to-destination 192.0.2.1\n\
            [0:0] -A W -p tcp -j DNAT --to-destination 192.0.2.2\nCOMMIT\n# end\n"
        );
        let other = saved(
            &with,
            json!({"name": "W", "destination_port": 81, "jump": "insert", "forward": true, "mode": "random",
                "backends": "192.0.2.2,192.0.2.3,192.0.2.4"}),
        );
        assert_eq!(other.matches(" W").count(), 8, "{other}");
        assert_eq!(
            saved(&other, json!({"name": "W", "state": "absent"})),
            format!("{OTHERS}\n")
        );
    }

    #[test]
    fn a_hand_written_file_is_edited_so_that_it_loads() {
        let request =
            |port: u16| json!({"name": "W", "destination_port": port, "backends": "192.0.2.1"});
        let late = "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -j MINE\n:MINE - [0:0]\n-A MINE -j RETURN\nCOMMIT\n";
        let text = saved(late, request(80));
        assert!(
            text.find(":W").unwrap() < text.find("-j W").unwrap(),
            "{text}"
        );

        let mixed = "*nat\n-A PREROUTING -s 10.0.0.1 -j ACCEPT\n-A POSTROUTING -j ACCEPT\n-A PREROUTING -s 10.0.0.2 -j ACCEPT\nCOMMIT\n";
        let moved = saved(&saved(mixed, request(80)), request(81));
        assert!(
            moved.find("10.0.0.2").unwrap() < moved.find("--dport 81").unwrap(),
            "{moved}"
        );

        let odd = "*nat\n:W\t- [0:0]\n-A PREROUTING -p tcp --dport 80 --jump W\n-A W\t-p tcp -j DNAT --to-destination 192.0.2.1\nCOMMIT\n";
        assert_eq!(saved(odd, request(80)), odd);
        assert_eq!(
            saved(odd, json!({"name": "W", "state": "absent"})),
            "*nat\nCOMMIT\n"
        );
        assert_eq!(table_twice(b"*nat\nCOMMIT\n*filter\nCOMMIT\n"), None);
        assert_eq!(
            table_twice(b"*nat\nCOMMIT\n*nat \nCOMMIT\n").unwrap(),
            "nat"
        );
    }

    #[test]
    fn an_empty_file_becomes_a_whole_one() {
        let text = saved(
            "",
            json!({"name": "W", "destination_port": 80, "backends": "192.0.2.1"}),
        );
        assert_eq!(
            text,
            "*nat\n:W - [0:0]\n-A W -p tcp -j DNAT --to-destination 192.0.2.1\n\
            -A PREROUTING -p tcp -m tcp --dport 80 -j W\nCOMMIT\n"
        );
    }
}
