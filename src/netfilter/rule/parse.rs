//! The parser of saved rules.
//!
//! It understands the rules that this program writes, and those that people
//! write in their place. Every other rule is [`Unreadable`], and differs from
//! all that this program writes.

use std::borrow::Cow;
use std::collections::BTreeSet;

use ipnet::IpNet;

use super::render::{ESTABLISHED, UNTOUCHED};
use super::{Connection, ConnectionState, Matches, RejectWith, Rule, Target};
use crate::netfilter::bpf::HashMatch;
use crate::netfilter::statistic::{Probability, Statistic};
use crate::netfilter::{self, Endpoint, PortRange, Ports, Protocol, Table};

/// The first word that the parser does not understand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable(pub String);

/// The words of a saved line, split as `iptables-restore` does: at blanks, with
/// double quotes around a word that has some, and a backslash before a
/// character within quotes. It is not the shell's quoting.
#[must_use]
pub fn words(line: &str) -> Words<'_> {
    Words { rest: line }
}

/// See [`words`].
#[derive(Clone, Debug)]
pub struct Words<'a> {
    rest: &'a str,
}

impl<'a> Iterator for Words<'a> {
    type Item = Cow<'a, str>;

    fn next(&mut self) -> Option<Cow<'a, str>> {
        // Words are short: a loop over the bytes is faster than a search by vectors.
        let is_blank = |byte: &u8| matches!(byte, b' ' | b'\t');
        let start = self.rest.bytes().position(|byte| !is_blank(&byte))?;
        let text = &self.rest[start..];
        let end = text
            .bytes()
            .position(|byte| is_blank(&byte) || byte == b'"');
        match end.map(|end| text.split_at(end)) {
            None => {
                self.rest = "";
                Some(text.into())
            }
            Some((_, rest)) if rest.starts_with('"') => Some(self.unquoted(text).into()),
            Some((word, rest)) => {
                self.rest = rest;
                Some(word.into())
            }
        }
    }
}

impl Words<'_> {
    /// A word with quotes in it.
    fn unquoted(&mut self, text: &str) -> String {
        let mut word = String::new();
        let mut quoted = false;
        let mut characters = text.char_indices();
        let mut end = text.len();
        while let Some((at, character)) = characters.next() {
            match character {
                '\\' if quoted => word.extend(characters.next().map(|(_, next)| next)),
                '"' => quoted = !quoted,
                ' ' | '\t' if !quoted => {
                    end = at;
                    break;
                }
                other => word.push(other),
            }
        }
        self.rest = &self.rest[self.rest.len() - text.len() + end..];
        word
    }
}

impl Rule {
    /// Parses the text after `-A CHAIN` in a dump of the table.
    ///
    /// # Errors
    /// The first word that is unknown or has no meaning at its place.
    pub fn parse(table: Table, text: &str) -> Result<Self, Unreadable> {
        let mut words = words(text);
        let mut builder = RuleBuilder::default();
        while let Some(option) = words.next() {
            builder.read(table, &option, &mut words)?;
        }
        builder.finish()
    }
}

impl Words<'_> {
    /// The value of `option`, if `read` makes sense of it.
    fn value<T>(
        &mut self,
        option: &str,
        read: impl Fn(&str) -> Option<T>,
    ) -> Result<T, Unreadable> {
        let value = self.next().unwrap_or_default();
        read(&value).ok_or_else(|| Unreadable(format!("{option} {value}")))
    }
}

/// The parts of a rule that were read so far.
#[derive(Default)]
struct RuleBuilder {
    protocol: Option<Protocol>,
    matches: Option<Box<Matches>>,
    mode: Option<Mode>,
    every: Option<u32>,
    packet: Option<u32>,
    probability: Option<Probability>,
    hashes: Vec<HashMatch>,
    target: Option<Target>,
    option: Option<TargetOption>,
}

/// The option that the target takes.
#[derive(Clone, Copy, PartialEq)]
enum TargetOption {
    ToDestination,
    ToSource,
    RejectWith,
}

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Nth,
    Random,
}

impl RuleBuilder {
    fn read(
        &mut self,
        table: Table,
        option: &str,
        words: &mut Words<'_>,
    ) -> Result<(), Unreadable> {
        match option {
            "-p" => once(
                option,
                &mut self.protocol,
                words.value(option, Protocol::from_argument)?,
            ),
            "-m" => words.value(option, known_match),
            "--comment" => words.value(option, |_| Some(())),
            "--mode" => once(option, &mut self.mode, words.value(option, mode)?),
            "--every" => once(
                option,
                &mut self.every,
                words.value(option, |text| text.parse().ok())?,
            ),
            "--packet" => once(
                option,
                &mut self.packet,
                words.value(option, |text| text.parse().ok())?,
            ),
            "--probability" => once(
                option,
                &mut self.probability,
                words.value(option, Probability::parse)?,
            ),
            "--bytecode" => {
                let hash = words.value(option, HashMatch::parse)?;
                self.hashes.push(hash);
                Ok(())
            }
            "!" => self.read_inverted(words),
            "-j" | "--jump" => self.read_target(words),
            "-g" | "--goto" => once(
                option,
                &mut self.target,
                Target::Goto(words.value(option, name)?),
            ),
            "--to-destination" if self.option == Some(TargetOption::ToDestination) => {
                once(option, &mut self.target, words.value(option, backend)?)
            }
            "--to-source" if self.option == Some(TargetOption::ToSource) => {
                once(option, &mut self.target, words.value(option, snat)?)
            }
            "--reject-with" if self.option == Some(TargetOption::RejectWith) => {
                once(option, &mut self.target, words.value(option, reject)?)
            }
            other => self.matches().read(table, other, words),
        }
    }

    fn matches(&mut self) -> &mut Matches {
        self.matches.get_or_insert_default()
    }

    /// Not matching with one chance is matching with the rest to certainty.
    fn read_inverted(&mut self, words: &mut Words<'_>) -> Result<(), Unreadable> {
        let option = words.next().unwrap_or_default();
        if option != "--probability" {
            return self.matches().read_inverted(&option, words);
        }
        let chance = words.value(&option, Probability::parse)?;
        once(&option, &mut self.probability, chance.complement())
    }

    fn read_target(&mut self, words: &mut Words<'_>) -> Result<(), Unreadable> {
        let word = words.next().unwrap_or_default();
        let target = match &*word {
            "DNAT" => return once("-j", &mut self.option, TargetOption::ToDestination),
            "SNAT" => return once("-j", &mut self.option, TargetOption::ToSource),
            "REJECT" => return once("-j", &mut self.option, TargetOption::RejectWith),
            "ACCEPT" => Target::Accept,
            "DROP" => Target::Drop,
            "MASQUERADE" => Target::Masquerade,
            other => match name(other) {
                Some(chain) => Target::Jump(chain),
                None => return Err(Unreadable(format!("-j {other}"))),
            },
        };
        once("-j", &mut self.target, target)
    }

    fn finish(self) -> Result<Rule, Unreadable> {
        let absent = |what: &str| Unreadable(format!("no {what}"));
        let statistic = match (self.mode, self.every, self.packet, self.probability) {
            (None, None, None, None) => Statistic::Always,
            (Some(Mode::Nth), Some(every), packet, None) if packet.unwrap_or(0) < every => {
                Statistic::Nth {
                    every,
                    packet: packet.unwrap_or(0),
                }
            }
            (Some(Mode::Random), None, None, Some(chance)) => Statistic::Random(chance),
            _ => return Err(absent("statistic that makes sense")),
        };
        let rule = Rule {
            protocol: self.protocol,
            statistic: statistic.simplest(),
            hashes: self.hashes,
            ..Rule::to(self.target.ok_or_else(|| absent("target"))?)
        };
        let Some(matches) = self.matches else {
            return Ok(rule);
        };
        let has_ports = matches.destination_ports != Ports::default();
        match has_ports && self.protocol.is_none() {
            true => Err(absent("protocol of the ports")),
            false => Ok(rule.matching(matches.simplest())),
        }
    }
}

impl Matches {
    fn read(
        &mut self,
        table: Table,
        option: &str,
        words: &mut Words<'_>,
    ) -> Result<(), Unreadable> {
        match option {
            "-s" => once(option, &mut self.source, words.value(option, network)?),
            "-d" => once(option, &mut self.destination, words.value(option, network)?),
            "-i" => once(option, &mut self.in_interface, words.value(option, name)?),
            "-o" => once(option, &mut self.out_interface, words.value(option, name)?),
            "--dport" => self.read_ports(option, words.value(option, port)?),
            "--dports" => self.read_ports(option, words.value(option, ports)?),
            "--dst-type" => {
                self.to_local = true;
                words.value(option, |kind| (kind == "LOCAL").then_some(()))
            }
            "--ctstate" | "--state" => self.read_state(table, words),
            "--ctproto" | "--ctorigsrc" | "--ctorigdst" | "--ctorigdstport" | "--ctreplsrc" => {
                self.connection.read(option, words)
            }
            other => Err(Unreadable(other.to_owned())),
        }
    }

    fn read_ports(&mut self, option: &str, ports: Ports) -> Result<(), Unreadable> {
        let earlier = std::mem::replace(&mut self.destination_ports, ports);
        match earlier == Ports::default() {
            true => Ok(()),
            false => Err(Unreadable(format!("{option} twice"))),
        }
    }

    /// The nat table sees only new connections, so asking for them there is
    /// asking for nothing.
    fn read_state(&mut self, table: Table, words: &mut Words<'_>) -> Result<(), Unreadable> {
        let option = "--ctstate";
        let state = words.value(option, |states| match states {
            "DNAT" => Some(Some(ConnectionState::Translated)),
            _ if same_states(states, ESTABLISHED) => Some(Some(ConnectionState::Established)),
            _ if table == Table::Nat && includes_new(states) => Some(None),
            _ => None,
        })?;
        match state {
            Some(state) => once(option, &mut self.connection.state, state),
            None => Ok(()),
        }
    }

    /// Reads the match after `!`.
    fn read_inverted(&mut self, option: &str, words: &mut Words<'_>) -> Result<(), Unreadable> {
        match option {
            "-d" => {
                let network = words.value("! -d", network)?;
                once("! -d", &mut self.not_destination, network)
            }
            "-i" => {
                let name = words.value("! -i", name)?;
                once("! -i", &mut self.not_in_interface, name)
            }
            "--ctstate" => {
                words.value("! --ctstate", is_untouched)?;
                let state = ConnectionState::Untouched;
                once("--ctstate", &mut self.connection.state, state)
            }
            other => Err(Unreadable(format!("! {other}"))),
        }
    }

    /// The matches without those that match everything.
    fn simplest(mut self) -> Self {
        let everything = |network: &IpNet| network.prefix_len() == 0;
        self.source = self.source.filter(|network| !everything(network));
        self.destination = self.destination.filter(|network| !everything(network));
        self.in_interface = self.in_interface.filter(|name| name != "+");
        self.out_interface = self.out_interface.filter(|name| name != "+");
        self
    }
}

impl Connection {
    fn read(&mut self, option: &str, words: &mut Words<'_>) -> Result<(), Unreadable> {
        let place = match option {
            "--ctorigsrc" => &mut self.original_source,
            "--ctorigdst" => &mut self.original_destination,
            "--ctreplsrc" => &mut self.reply_source,
            "--ctproto" => {
                let protocol = words.value(option, Protocol::from_argument)?;
                return once(option, &mut self.protocol, protocol);
            }
            _ => {
                let range = words.value(option, PortRange::parse)?;
                return once(option, &mut self.original_port, range);
            }
        };
        once(option, place, words.value(option, network)?)
    }
}

/// Sets a value that must not be given twice.
fn once<T>(option: &str, place: &mut Option<T>, value: T) -> Result<(), Unreadable> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(Unreadable(format!("{option} twice"))),
    }
}

fn known_match(name: &str) -> Option<()> {
    const KNOWN: [&str; 11] = [
        "statistic",
        "bpf",
        "tcp",
        "udp",
        "sctp",
        "dccp",
        "multiport",
        "addrtype",
        "conntrack",
        "state",
        "comment",
    ];
    KNOWN.contains(&name).then_some(())
}

/// Of a chain, a target or an interface: these have nothing in them that would
/// have to be quoted.
fn name(text: &str) -> Option<String> {
    let odd =
        |letter: char| letter.is_whitespace() || letter.is_control() || "\"'\\".contains(letter);
    (!text.is_empty() && !text.contains(odd)).then(|| text.to_owned())
}

/// Also with a netmask: `10.0.0.0/255.0.0.0`
fn network(text: &str) -> Option<IpNet> {
    let with_netmask = || {
        let (address, mask) = text.split_once('/')?;
        let network = IpNet::with_netmask(address.parse().ok()?, mask.parse().ok()?);
        network.ok().map(|network| network.trunc())
    };
    netfilter::network(text).or_else(with_netmask)
}

fn port(text: &str) -> Option<Ports> {
    PortRange::parse(text).map(|range| Ports::new(vec![range]))
}

fn ports(text: &str) -> Option<Ports> {
    let ranges: Option<Vec<_>> = text.split(',').map(PortRange::parse).collect();
    ranges.map(Ports::new)
}

fn includes_new(states: &str) -> bool {
    states.split(',').any(|state| state == "NEW")
}

fn is_untouched(states: &str) -> Option<()> {
    same_states(states, UNTOUCHED).then_some(())
}

/// Returns true if two lists name the same states, in any order.
fn same_states(one: &str, other: &str) -> bool {
    let set = |states| str::split(states, ',').collect::<BTreeSet<_>>();
    set(one) == set(other)
}

fn snat(text: &str) -> Option<Target> {
    text.parse().ok().map(Target::Snat)
}

fn reject(text: &str) -> Option<Target> {
    let mut all = RejectWith::ALL.into_iter();
    all.find(|with| with.as_str() == text).map(Target::Reject)
}

fn mode(text: &str) -> Option<Mode> {
    match text {
        "nth" => Some(Mode::Nth),
        "random" => Some(Mode::Random),
        _ => None,
    }
}

fn backend(text: &str) -> Option<Target> {
    Endpoint::parse(text).map(Target::Dnat)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nat(text: &str) -> Rule {
        Rule::parse(Table::Nat, text).unwrap_or_else(|word| panic!("{text}: {word:?}"))
    }

    fn assert_same(spellings: &[&str]) {
        for spelling in spellings {
            assert_eq!(nat(spelling), nat(spellings[0]), "{spelling}");
        }
    }

    #[test]
    fn many_spellings_have_one_meaning() {
        assert_same(&[
            " -p tcp -m statistic --mode nth --every 4 --packet 0 -j DNAT --to-destination 192.0.2.1:5308",
            "-p 6 -m conntrack --ctstate NEW -m statistic --mode nth --every 4 --packet 0 -j DNAT --to-destination 192.0.2.1:5308",
            "-m statistic --mode nth --every 4 --packet 0 -p tcp -m tcp -j DNAT --to-destination 192.0.2.1:5308",
            "-s 0.0.0.0/0 -i + -p tcp -m state --state NEW,RELATED -m statistic --mode nth --every 4 -j DNAT --to-destination 192.0.2.1:5308",
            "-p tcp -m comment --comment \"it's -j \\\"ACCEPT\\\" \\\\\" -m statistic --mode nth --every 4 --packet 0 -j DNAT --to-destination 192.0.2.1:5308",
        ]);
        assert_same(&[
            "-d 10.0.0.0/8 -p tcp -m tcp --dport 80 -j CF",
            "-p tcp -m multiport --dports 80 -d 10.0.0.9/255.0.0.0 -j CF",
            "-p tcp -m multiport --dports 80:80 -d 10.1.2.3/8 -j CF",
        ]);
        assert_same(&["-p tcp -j CF", "-p tcp -m tcp --dport 0:65535 -j CF"]);
        assert_same(&[
            "-m statistic --mode random --probability 0.7 -j CF",
            "-m statistic --mode random ! --probability 0.3 -j CF",
            "-m statistic --mode random --probability 0.70000000019 -j CF",
        ]);
        assert_same(&[
            "-j CF",
            "-m statistic --mode random --probability 1.0 -j CF",
            "-m statistic --mode nth --every 1 --packet 0 -j CF",
        ]);
    }

    #[test]
    fn rules_with_different_meanings_differ() {
        let rules = [
            "-p tcp -m statistic --mode nth --every 4 --packet 0 -j DNAT --to-destination 192.0.2.1:80",
            "-p tcp -m statistic --mode nth --every 4 --packet 1 -j DNAT --to-destination 192.0.2.1:80",
            "-p tcp -m statistic --mode nth --every 3 --packet 0 -j DNAT --to-destination 192.0.2.1:80",
            "-p tcp -m statistic --mode random --probability 0.25 -j DNAT --to-destination 192.0.2.1:80",
            "-p tcp -m statistic --mode random --probability 0.25000000047 -j DNAT --to-destination 192.0.2.1:80",
            "-p tcp -j DNAT --to-destination 192.0.2.1:80",
            "-p udp -j DNAT --to-destination 192.0.2.1:80",
            "-p tcp -j DNAT --to-destination 192.0.2.1",
            "-p tcp -j DNAT --to-destination 192.0.2.2:80",
            "-p tcp -j CF",
            "-p tcp -g CF",
            "-p tcp -m addrtype --dst-type LOCAL -j CF",
            "-i eth0 -p tcp -j CF",
            "-o eth0 -p tcp -j CF",
            "! -i eth0 -p tcp -j CF",
            "-p tcp -m conntrack --ctstate RELATED,ESTABLISHED -j CF",
            "! -d 127.0.0.0/8 -p tcp -j CF",
            "-d 127.0.0.0/8 -p tcp -j CF",
            "-p tcp -m conntrack --ctstate DNAT -j CF",
            "-p tcp -m conntrack ! --ctstate INVALID,RELATED,ESTABLISHED,UNTRACKED,DNAT -j CF",
            "-m conntrack --ctproto 6 -j CF",
            "-p tcp -m conntrack --ctorigsrc 192.0.2.1 -j CF",
            "-p tcp -m conntrack --ctorigdst 192.0.2.1 -j CF",
            "-p tcp -m conntrack --ctreplsrc 192.0.2.1 -j CF",
            "-p tcp -m conntrack --ctorigdstport 80 -j CF",
            "-p tcp -m conntrack --ctorigdstport 80:81 -j CF",
            "-p tcp -j ACCEPT",
            "-p tcp -j DROP",
            "-p tcp -j REJECT --reject-with tcp-reset",
            "-p tcp -j REJECT --reject-with icmp-port-unreachable",
            "-p tcp -j MASQUERADE",
            "-p tcp -j SNAT --to-source 192.0.2.1",
        ];
        for (at, rule) in rules.iter().enumerate() {
            for other in &rules[..at] {
                assert_ne!(nat(rule), nat(other));
            }
        }
    }

    #[test]
    fn unknown_rules_are_unreadable() {
        for text in [
            "",
            "-p tcp",
            "-j",
            "! -s 10.0.0.0/8 -j CF",
            "-m conntrack ! --ctstate NEW -j CF",
            "-m conntrack --ctstate ESTABLISHED -j CF",
            "-m limit --limit 1/sec -j CF",
            "-m mark --mark 0x1 -j CF",
            "-m tcp --dport 80 -j CF",
            "-p icmp -j CF",
            "-j DNAT --to-destination 192.0.2.1-192.0.2.9",
            "-j DNAT --to-destination 192.0.2.1:80-90",
            "-j DNAT --to-destination 192.0.2.1 --random",
            "-j DNAT",
            "-j CF -j CF",
            "-j CF --to-destination 192.0.2.1",
            "-j DNAT --to-source 192.0.2.1",
            "-j SNAT --to-source 192.0.2.1-192.0.2.9",
            "-j SNAT --to-source 192.0.2.1:1024",
            "-j MASQUERADE --random",
            "-j REJECT --reject-with icmp-host-unreachable",
            "-j DNAT -j SNAT --to-source 192.0.2.1",
            "-j \"CF -p tcp\"",
            "-i \"eth 0\" -j CF",
            "-m conntrack --ctreplsrc 192.0.2.1 --ctreplsrc 192.0.2.2 -j CF",
            "-m conntrack ! --ctorigdstport 80 -j CF",
            "-m conntrack --ctdir REPLY -j CF",
            "-m addrtype --dst-type LOCAL,UNICAST -j CF",
            "-m statistic --mode nth --every 3 --packet 3 -j CF",
            "-m statistic --mode nth -j CF",
            "-m statistic --mode random --every 3 -j CF",
            "-m statistic --mode nth ! --every 3 -j CF",
            "-s 10.0.0.0/255.0.255.0 -j CF",
            "-m bpf --bytecode \"4,32 0 0 12,53 0 1 5,6 0 0 0,6 0 0 1\" -j CF",
            "-m bpf --object-pinned /sys/fs/bpf/x -j CF",
        ] {
            assert!(Rule::parse(Table::Nat, text).is_err(), "{text}");
        }
        let filter = Rule::parse(Table::Filter, "-m conntrack --ctstate NEW -j CF");
        assert_eq!(filter, Err(Unreadable("--ctstate NEW".into())));
    }

    #[test]
    fn words_are_split_as_iptables_restore_splits_them() {
        assert_eq!(
            words(r#"a  "b c"	"\"d\\" e"f g"h """#).collect::<Vec<_>>(),
            ["a", "b c", "\"d\\", "ef gh", ""]
        );
    }

    #[test]
    fn rendered_rules_parse_back() {
        for text in [
            " -s 192.0.2.0/24 -d 10.0.0.0/8 -i eth+ -p tcp -m multiport --dports 80,443,1000:2000 -m addrtype --dst-type LOCAL -j CF",
            " -p udp -m udp --dport 53:54 -g CF/0",
            " -p tcp -m statistic --mode nth --every 3 --packet 2 -j DNAT --to-destination [fd00::1]:80",
            " -p tcp -m statistic --mode random --probability 0.29999999981 -j DNAT --to-destination fd00::1",
            " -p tcp -m bpf --bytecode \"17,32 0 0 12,164 0 0 7,36 0 0 2654435761,7 0 0 0,116 0 0 16,172 0 0 0,36 0 0 2246822507,7 0 0 0,116 0 0 13,172 0 0 0,36 0 0 3266489909,7 0 0 0,116 0 0 16,172 0 0 0,53 0 1 5,6 0 0 0,6 0 0 1\" -j DNAT --to-destination 192.0.2.9",
            " -o eth0 -m conntrack --ctstate DNAT --ctproto 6 --ctorigsrc 10.0.0.0/8 --ctorigdst 192.0.2.1 --ctreplsrc 192.0.2.9 --ctorigdstport 53:54 -j CF/masq",
            " -i eth0 -p udp -m udp --dport 53 -m conntrack ! --ctstate INVALID,RELATED,ESTABLISHED,UNTRACKED,DNAT -j CF",
            " ! -d ::1/128 -p tcp -m tcp --dport 80 -j CF",
            " ! -i lo -p tcp -m tcp --dport 80 -j CF",
            " -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            " -j ACCEPT",
            " -j DROP",
            " -j MASQUERADE",
            " -j SNAT --to-source fd00::1",
            " -p tcp -j REJECT --reject-with tcp-reset",
            " -j REJECT --reject-with icmp6-port-unreachable",
        ] {
            assert_eq!(nat(text).to_string(), text);
        }
        assert_eq!(
            nat("-p dccp -m dccp --dport 9 -j CF").to_string(),
            " -p 33 -m dccp --dport 9 -j CF"
        );
    }
}
