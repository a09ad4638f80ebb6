//! The conditions of rules: every match but statistic and hash.

use std::collections::{HashMap, HashSet};

use ipnet::IpNet;

use crate::netfilter::{Family, PortRange, Ports, Protocol, network};

/// One match, with its value.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Condition {
    /// The text, as `iptables-save` writes it.
    pub text: String,
    /// The meaning, as far as it is compared.
    pub meaning: Meaning,
}

/// The meaning of a match.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Meaning {
    /// `-p`, by its number where the name is known.
    Protocol(String),
    /// `-s`
    Source(IpNet),
    /// `-d`
    Destination(IpNet),
    /// `--dport`, `--dports`
    Ports(Ports),
    /// A match that the packet alone decides: the same packet always gets the same
    /// answer.
    Packet,
    /// A match with a state of its own, such as a limit, or an unknown one.
    Other,
}

/// The options whose matches the packet, its route and its connection decide.
const OF_PACKETS: [&str; 16] = [
    "-i",
    "-o",
    "--sport",
    "--sports",
    "--src-type",
    "--dst-type",
    "--ctstate",
    "--state",
    "--mark",
    "--tcp-flags",
    "--syn",
    "--icmp-type",
    "--src-range",
    "--dst-range",
    "--physdev-in",
    "--mac-source",
];

impl Meaning {
    /// Returns true if there are other meanings that are a part of this one.
    #[must_use]
    pub fn is_wide(&self) -> bool {
        match self {
            Self::Source(network) | Self::Destination(network) => {
                network.prefix_len() < network.max_prefix_len()
            }
            Self::Ports(ports) => match ports.ranges() {
                [one] => one.first != one.last,
                _ => true,
            },
            Self::Protocol(_) | Self::Packet | Self::Other => false,
        }
    }
}

impl Condition {
    /// The condition of an option; none if it is always met.
    #[must_use]
    pub fn new(is_inverted: bool, option: &str, values: &[String]) -> Option<Self> {
        let option = match option {
            "--protocol" | "--proto" => "-p",
            "--source" | "--src" => "-s",
            "--destination" | "--dst" => "-d",
            "--in-interface" => "-i",
            "--out-interface" => "-o",
            "--destination-port" => "--dport",
            "--destination-ports" => "--dports",
            other => other,
        };
        let value = values.first().map_or("", String::as_str);
        let meaning = Self::meaning(option, value);
        let is_everything = match &meaning {
            Meaning::Source(network) | Meaning::Destination(network) => network.prefix_len() == 0,
            Meaning::Protocol(name) => name == "all" || name == "0",
            Meaning::Ports(ports) => *ports == Ports::default(),
            _ => (option == "-i" || option == "-o") && value == "+",
        };
        if is_everything && !is_inverted {
            return None;
        }
        let mut text = if is_inverted { "! " } else { "" }.to_owned() + option;
        for value in values {
            text.push(' ');
            text += &quoted(value);
        }
        let meaning = match (is_inverted, meaning) {
            (true, Meaning::Other) => Meaning::Other,
            (true, _) => Meaning::Packet,
            (false, meaning) => meaning,
        };
        Some(Self { text, meaning })
    }

    fn meaning(option: &str, value: &str) -> Meaning {
        let ports = |text: &str| {
            let ranges: Option<Vec<_>> = text.split(',').map(PortRange::parse).collect();
            ranges.map(Ports::new)
        };
        let known = match option {
            "-p" => Some(Meaning::Protocol(match Protocol::from_argument(value) {
                Some(protocol) => protocol.as_str().to_owned(),
                None => value.to_owned(),
            })),
            "-s" => network(value).map(Meaning::Source),
            "-d" => network(value).map(Meaning::Destination),
            "--dport" | "--dports" => ports(value).map(Meaning::Ports),
            _ => None,
        };
        let simple = ["-p", "-s", "-d", "--dport", "--dports"].contains(&option);
        known.unwrap_or(match simple || OF_PACKETS.contains(&option) {
            true => Meaning::Packet,
            false => Meaning::Other,
        })
    }

    /// Returns true if every packet that meets `other` meets this one too.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        match (&self.meaning, &other.meaning) {
            (Meaning::Source(wide), Meaning::Source(narrow))
            | (Meaning::Destination(wide), Meaning::Destination(narrow)) => wide.contains(narrow),
            (Meaning::Ports(wide), Meaning::Ports(narrow)) => narrow.ranges().iter().all(|range| {
                wide.within(*range)
                    .is_some_and(|cut| cut == Ports::new(vec![*range]))
            }),
            (Meaning::Protocol(one), Meaning::Protocol(same)) => one == same,
            (one, same) => one == same && self.text == other.text,
        }
    }
}

/// A word, in quotes where it needs some.
#[must_use]
pub fn quoted(word: &str) -> String {
    match word.is_empty() || word.contains([' ', '\t', '"']) {
        true => format!("\"{}\"", word.replace('\\', "\\\\").replace('"', "\\\"")),
        false => word.to_owned(),
    }
}

/// The distinct conditions of a table, each with a number.
#[derive(Debug, Default)]
pub struct Conditions {
    all: Vec<Condition>,
    numbers: HashMap<Condition, u32>,
    /// The conditions of each meaning. Where a meaning says all, their texts may differ.
    by_meaning: HashMap<Meaning, Vec<u32>>,
    /// The conditions that others can be a part of.
    wide: Vec<u32>,
}

impl Conditions {
    /// The number of a condition, which is added where it is new.
    pub fn number(&mut self, condition: Condition) -> u32 {
        if let Some(known) = self.numbers.get(&condition) {
            return *known;
        }
        let number = u32::try_from(self.all.len()).unwrap_or(u32::MAX);
        let same = self.by_meaning.entry(condition.meaning.clone());
        match condition.meaning {
            Meaning::Packet | Meaning::Other => {}
            _ => same.or_default().push(number),
        }
        if condition.meaning.is_wide() {
            self.wide.push(number);
        }
        self.all.push(condition.clone());
        self.numbers.insert(condition, number);
        number
    }

    /// The condition of a number.
    #[must_use]
    pub fn get(&self, number: u32) -> &Condition {
        &self.all[number as usize]
    }

    /// The conditions that a connection meets if it meets the given ones.
    #[must_use]
    pub fn met_by(&self, given: impl Iterator<Item = u32>) -> HashSet<u32> {
        let mut met = HashSet::new();
        for number in given {
            let condition = self.get(number);
            let same = self.by_meaning.get(&condition.meaning);
            let wide = self.wide.iter();
            met.insert(number);
            met.extend(same.into_iter().flatten());
            met.extend(wide.filter(|wide| self.get(**wide).covers(condition)));
        }
        met
    }

    /// All of them, in the order of their numbers.
    #[must_use]
    pub fn all(&self) -> &[Condition] {
        &self.all
    }

    /// Returns true if an address of IPv6 is among them.
    #[must_use]
    pub fn mention_ipv6(&self) -> bool {
        self.all.iter().any(|condition| match condition.meaning {
            Meaning::Source(network) | Meaning::Destination(network) => {
                Family::of(network.addr()) == Family::Ipv6
            }
            _ => false,
        })
    }
}
