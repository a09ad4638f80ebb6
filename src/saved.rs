//! Changes to a file of saved rules: the same changes that are made to the
//! running ones, while all other lines stay as they are, to the byte.
//!
//! The file is what `iptables-save` wrote, or what a person made of it. New
//! rules stand after the last one of their chain, with zero counters where the
//! file has some.

use std::collections::BTreeSet;

use crate::change::{Action, Change};
use crate::net::Table;
use crate::ruleset::SavedRule;

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

/// The text with the changes made, which were computed for what is in it.
#[must_use]
pub fn edited(text: &[u8], changes: &[Change]) -> Vec<u8> {
    let mut lines: Vec<Vec<u8>> = text
        .split_inclusive(|byte| *byte == b'\n')
        .map(<[u8]>::to_vec)
        .collect();
    if let Some(last) = lines.last_mut().filter(|last| !last.ends_with(b"\n")) {
        last.push(b'\n');
    }
    let counted = lines.iter().any(|line| line.starts_with(b"["));
    let mut page = Page { lines, counted };
    for change in changes {
        page.change(change);
    }
    page.lines.concat()
}

struct Page {
    lines: Vec<Vec<u8>>,
    /// Whether rules have counters in front.
    counted: bool,
}

impl Page {
    fn change(&mut self, change: &Change) {
        let Change {
            table,
            chain,
            action,
            ..
        } = change;
        let (start, end) = self.section(*table);
        let rules = self.rules(start, end, chain);
        let place = |at: &u32| rules.get(*at as usize - 1).copied();
        match action {
            Action::CreateChain => {
                // A chain has to be declared before a rule leads to it.
                let is_head = |line: &Vec<u8>| line.starts_with(b":") || line.starts_with(b"#");
                let mut rest = start + 1..end;
                let first = rest.find(|at| !is_head(&self.lines[*at]));
                let line = format!(":{chain} - [0:0]\n").into_bytes();
                self.lines.insert(first.unwrap_or(end), line);
            }
            Action::Append(rule) => {
                let after_last = rules.last().map_or(end, |last| last + 1);
                self.lines.insert(after_last, self.line(chain, rule));
            }
            Action::Insert(at, rule) => {
                let after_last = rules.last().map_or(end, |last| last + 1);
                let line = self.line(chain, rule);
                self.lines.insert(place(at).unwrap_or(after_last), line);
            }
            Action::Replace { at, rule, .. } => {
                if let Some(at) = place(at) {
                    self.lines[at] = self.line(chain, rule);
                }
            }
            Action::DeleteAt(at, _) => {
                if let Some(at) = place(at) {
                    self.lines.remove(at);
                }
            }
            Action::DeleteFirst(rule) => {
                let same = |at: &&usize| rule_text(&self.lines[**at], chain) == Some(&rule.text);
                if let Some(at) = rules.iter().find(same).copied() {
                    self.lines.remove(at);
                }
            }
            Action::DeleteChain => {
                let mut at = 0;
                self.lines.retain(|line| {
                    let gone = (start..end).contains(&at)
                        && (declares(line, chain) || rule_text(line, chain).is_some());
                    at += 1;
                    !gone
                });
            }
        }
    }

    /// The lines from `*TABLE` up to its COMMIT; a table that is not there is
    /// added at the end.
    fn section(&mut self, table: Table) -> (usize, usize) {
        let head = format!("*{}", table.as_str());
        let reads = |line: &Vec<u8>, text: &str| line.trim_ascii_end() == text.as_bytes();
        let start = match self.lines.iter().position(|line| reads(line, &head)) {
            Some(start) => start,
            None => {
                self.lines
                    .extend([format!("{head}\n").into_bytes(), b"COMMIT\n".to_vec()]);
                self.lines.len() - 2
            }
        };
        let mut rest = start..self.lines.len();
        let end = rest.find(|at| reads(&self.lines[*at], "COMMIT"));
        (start, end.unwrap_or(self.lines.len()))
    }

    /// Where the rules of a chain stand.
    fn rules(&self, start: usize, end: usize, chain: &str) -> Vec<usize> {
        let of_chain = |at: &usize| rule_text(&self.lines[*at], chain).is_some();
        (start..end).filter(of_chain).collect()
    }

    fn line(&self, chain: &str, rule: &SavedRule) -> Vec<u8> {
        let counters = if self.counted { "[0:0] " } else { "" };
        let mut line = format!("{counters}-A {chain}").into_bytes();
        line.extend(&rule.text);
        line.push(b'\n');
        line
    }
}

/// What stands after `-A CHAIN`, in a line that adds a rule to that chain.
fn rule_text<'a>(line: &'a [u8], chain: &str) -> Option<&'a [u8]> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let line = match line.strip_prefix(b"[") {
        Some(counted) => &counted[counted.windows(2).position(|two| two == b"] ")? + 2..],
        None => line,
    };
    let text = line.strip_prefix(b"-A ")?.strip_prefix(chain.as_bytes())?;
    (text.is_empty() || text.starts_with(b" ") || text.starts_with(b"\t")).then_some(text)
}

/// Whether a line is `:CHAIN POLICY [packets:bytes]`.
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
    use crate::net::Family;
    use crate::plan::Plan;
    use crate::request::Request;
    use crate::ruleset::Ruleset;

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
    fn what_comes_and_goes_leaves_the_rest_to_the_byte() {
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
    fn what_a_person_wrote_is_edited_so_that_it_loads() {
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
