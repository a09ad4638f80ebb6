//! One rule of a whole dump.

use super::condition::{Condition, Conditions, quoted};
use crate::netfilter::bpf::HashMatch;
use crate::netfilter::rule::words;
use crate::netfilter::ruleset::Counters;
use crate::netfilter::statistic::{Probability, Statistic};

/// A rule, as far as it decides about the way of a connection.
#[derive(Debug)]
pub struct Rule {
    /// Its line in the dump.
    pub line: usize,
    /// The text after `-A CHAIN`.
    pub text: String,
    /// Its counters.
    pub counters: Counters,
    /// `-m statistic`
    pub statistic: Statistic,
    /// `-m bpf` with programs of this program.
    pub hashes: Vec<HashMatch>,
    /// The numbers of its conditions, ascending.
    pub conditions: Vec<u32>,
    /// The target.
    pub way: Way,
}

/// The way on after a rule.
#[derive(Clone, Debug, PartialEq)]
pub enum Way {
    /// The connection gets this destination: `--to-destination`, or `REDIRECT`.
    Destination(String),
    /// The table is done with the connection.
    End(Verdict),
    /// Back to the chain before.
    Return,
    /// On with the next rule.
    Pass,
    /// Into a chain, and back when that has no answer.
    Jump(usize),
    /// Into a chain, and not back.
    Goto(usize),
    /// A chain by name, before the whole table is read.
    Named {
        /// Its name, or that of a target.
        name: String,
        /// `-j`
        back: bool,
    },
}

/// The end of the way in a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It passes.
    Accept,
    /// It is dropped or refused.
    Refuse,
}

impl Way {
    /// The chain that it leads to.
    #[must_use]
    pub fn chain(&self) -> Option<usize> {
        match self {
            Self::Jump(chain) | Self::Goto(chain) => Some(*chain),
            _ => None,
        }
    }
}

/// The questions of `-m recent`. `--set` remembers the client, and always matches.
const RECENT: [&str; 4] = ["--set", "--rcheck", "--update", "--remove"];

#[derive(Default)]
struct Builder {
    mode: Option<String>,
    every: Option<u32>,
    packet: Option<u32>,
    probability: Option<Probability>,
    hashes: Vec<HashMatch>,
    conditions: Vec<Condition>,
    target: Option<(String, bool)>,
    arguments: Vec<(String, Vec<String>)>,
    /// The match that options belong to.
    module: String,
    recent: Vec<String>,
    /// `-m recent` decides, and does not only remember.
    recent_decides: bool,
}

impl Rule {
    /// Reads the text after `-A CHAIN`.
    ///
    /// # Errors
    /// A statistic that no kernel accepts.
    pub fn read(text: &str, known: &mut Conditions) -> Result<Self, String> {
        let mut builder = Builder::default();
        let mut words = words(text).peekable();
        let mut is_inverted = false;
        while let Some(word) = words.next() {
            if word == "!" {
                is_inverted = true;
                continue;
            }
            let mut values = Vec::new();
            while let Some(value) = words.next_if(|next| next != "!" && !is_option(next)) {
                values.push(value.into_owned());
            }
            builder.option(is_inverted, &word, values)?;
            is_inverted = false;
        }
        builder.finish(text, known)
    }

    /// Returns true if all connections that meet the conditions are meant.
    #[must_use]
    pub fn is_certain(&self) -> bool {
        self.statistic == Statistic::Always && self.hashes.is_empty()
    }
}

/// An option begins with a minus sign and goes on with a letter or another one.
fn is_option(word: &str) -> bool {
    let rest = word.strip_prefix('-').unwrap_or_default();
    rest.starts_with(|next: char| next == '-' || next.is_ascii_alphabetic())
}

impl Builder {
    fn option(
        &mut self,
        is_inverted: bool,
        option: &str,
        values: Vec<String>,
    ) -> Result<(), String> {
        let first = values.first().map_or("", String::as_str);
        let number = || -> Result<Option<u32>, String> {
            first
                .parse()
                .map(Some)
                .map_err(|_| format!("{option}: `{first}` is not a number"))
        };
        match option {
            "-m" | "--match" => first.clone_into(&mut self.module),
            "--comment" => {}
            _ if self.module == "recent" && option.starts_with("--") && self.target.is_none() => {
                self.recent_decides |= is_inverted || option != "--set" && RECENT.contains(&option);
                self.recent.push(option.to_owned());
                self.recent.extend(values);
            }
            "--mode" => self.mode = Some(first.to_owned()),
            "--every" => self.every = number()?,
            "--packet" if self.mode.is_some() => self.packet = number()?,
            "--probability" => {
                let chance = Probability::parse(first)
                    .ok_or_else(|| format!("--probability: `{first}` is not between 0 and 1"))?;
                self.probability = Some(if is_inverted {
                    chance.complement()
                } else {
                    chance
                });
            }
            "--bytecode" if !is_inverted => match HashMatch::parse(first) {
                Some(hash) => self.hashes.push(hash),
                None => self
                    .conditions
                    .extend(Condition::new(false, option, &values)),
            },
            "-j" | "--jump" => self.target = Some((first.to_owned(), true)),
            "-g" | "--goto" => self.target = Some((first.to_owned(), false)),
            _ if self.target.is_some() && option.starts_with("--") && !is_inverted => {
                self.arguments.push((option.to_owned(), values));
            }
            _ => self
                .conditions
                .extend(Condition::new(is_inverted, option, &values)),
        }
        Ok(())
    }

    fn statistic(&self) -> Result<Statistic, String> {
        let statistic = match (self.mode.as_deref(), self.every, self.probability) {
            (None, _, _) => Statistic::Always,
            (Some("nth"), Some(every), _) => {
                let packet = self.packet.unwrap_or(0);
                if packet >= every {
                    return Err(format!(
                        "--every {every} --packet {packet}: --packet must be below --every, so the kernel refuses it"
                    ));
                }
                Statistic::Nth { every, packet }
            }
            (Some("random"), _, Some(chance)) => Statistic::Random(chance),
            (Some(mode), _, _) => {
                return Err(format!("-m statistic --mode {mode} without its number"));
            }
        };
        Ok(statistic.simplest())
    }

    fn finish(self, text: &str, known: &mut Conditions) -> Result<Rule, String> {
        let statistic = self.statistic()?;
        let way = self.way();
        let recent = self
            .recent_decides
            .then(|| Condition::new(false, "-m recent", &self.recent));
        let numbers = self.conditions.into_iter().chain(recent.flatten());
        let mut conditions: Vec<u32> = numbers.map(|one| known.number(one)).collect();
        conditions.sort_unstable();
        conditions.dedup();
        Ok(Rule {
            line: 0,
            text: text.trim_start().to_owned(),
            counters: Counters::default(),
            statistic,
            hashes: self.hashes,
            conditions,
            way,
        })
    }

    fn argument(&self, option: &str) -> Option<String> {
        let found = self.arguments.iter().find(|(name, _)| name == option);
        found.and_then(|(_, values)| values.first()).cloned()
    }

    fn way(&self) -> Way {
        let Some((target, back)) = &self.target else {
            return Way::Pass;
        };
        match target.as_str() {
            "DNAT" => Way::Destination(self.argument("--to-destination").unwrap_or_default()),
            "NETMAP" => Way::Destination(format!(
                "NETMAP {}",
                quoted(&self.argument("--to").unwrap_or_default())
            )),
            "REDIRECT" => Way::Destination(match self.argument("--to-ports") {
                Some(ports) => format!("REDIRECT :{ports}"),
                None => "REDIRECT".to_owned(),
            }),
            "ACCEPT" | "SNAT" | "MASQUERADE" | "SAME" | "QUEUE" | "NFQUEUE" | "TPROXY" => {
                Way::End(Verdict::Accept)
            }
            "DROP" | "REJECT" | "TARPIT" | "DELUDE" => Way::End(Verdict::Refuse),
            "RETURN" => Way::Return,
            name => Way::Named {
                name: name.to_owned(),
                back: *back,
            },
        }
    }
}
