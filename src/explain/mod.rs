//! The true shares of any chains, and the known mistakes in them. Pure: a text in,
//! a description out.
//!
//! [`dump`] reads a whole `iptables-save`, [`mod@follow`] computes the way of the
//! connections, [`fit`] compares counters with shares, and [`lint`] names mistakes.

mod before;
mod condition;
mod counted;
mod dump;
mod equal_lines;
mod fit;
mod follow;
mod forward;
mod fraction;
mod host;
mod leads;
mod lint;
mod order;
mod rewriting;
mod roots;
mod rule;
mod selection;
mod source_nat;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use schemars::JsonSchema;
use serde::Serialize;

use crate::netfilter::statistic::Share;
use crate::netfilter::{Family, Table};
pub use before::{Traffic, taken_before};
use condition::Meaning;
pub use dump::{BadDump, Chain, WholeTable, read};
use follow::{Class, Course, Part, follow, reachable};
pub use forward::{Packet, blocks};
pub use host::this_host;
use leads::{Referrers, ending, leading, referrers};
pub use lint::Code;
pub use rewriting::is_range;
use roots::Shares;
pub use rule::{Rule, Way};
use selection::{RuleIndex, Selection};
pub use source_nat::{Leaving, Rewriting};

/// The shares of all chains that share out connections.
#[derive(Debug, Default, Serialize, JsonSchema)]
#[schemars(title = "iptables_balance explain")]
pub struct Explanation {
    /// The chains, in the order of the dump. A chain whose rules have different conditions stands here once for each.
    pub chains: Vec<ExplainedChain>,
    /// Mistakes in chains that share out nothing themselves.
    pub findings: Vec<Finding>,
}

/// One chain that shares out connections.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ExplainedChain {
    /// The family.
    pub family: Family,
    /// The table.
    pub table: Table,
    /// The chain.
    pub chain: String,
    /// The rules that lead here.
    pub jumps: Vec<String>,
    /// The conditions that the connections meet whose shares these are.
    pub conditions: Vec<String>,
    /// The kinds of choice that decide: `turn`, `chance`, `hash`.
    pub decided_by: Vec<Choice>,
    /// The share of each destination.
    pub shares: Vec<ExplainedShare>,
    /// The share that gets no destination here, 0 to 1.
    pub unmatched: f64,
    /// The rules that a connection visits on average.
    pub visits: f64,
    /// The probability that chance alone takes the counters as far from the shares as they are. Where there are
    /// counters and chance decides.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p_value: Option<f64>,
    /// The deviation of the counters. Where there are counters and turns alone decide.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deviation: Option<Deviation>,
    /// The mistakes in it.
    pub findings: Vec<Finding>,
    /// The rules on the way, for a picture.
    #[serde(skip)]
    pub steps: Vec<ShownStep>,
}

/// A kind of choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Choice {
    /// `--mode nth`
    Turn,
    /// `--mode random`
    Chance,
    /// `-m bpf` with a hash of the client.
    Hash,
}

impl Choice {
    /// The word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Turn => "turn",
            Self::Chance => "chance",
            Self::Hash => "hash",
        }
    }
}

/// The deviation of counters from the shares.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, JsonSchema)]
pub struct Deviation {
    /// The largest one, in connections.
    pub found: f64,
    /// The largest one that is possible in turn, if all counters began together.
    pub bound: f64,
    /// True if none is beyond its bound.
    pub fits: bool,
}

/// The share of one destination.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct ExplainedShare {
    /// As in `--to-destination`; `REDIRECT :PORT` for this host.
    pub destination: String,
    /// Its share, 0 to 1: the double nearest to the exact share.
    pub share: f64,
    /// The exact share, such as `27/256`, where it is short.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fraction: Option<String>,
    /// The connections that it got by the counters. Left out without counters, and where several chains lead to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packets: Option<u64>,
    /// The bytes of the first packets of these connections.
    #[serde(skip)]
    pub bytes: Option<u64>,
}

/// A mistake.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct Finding {
    /// The kind of mistake.
    pub code: Code,
    /// The rule.
    pub rule: String,
    /// Its line in the dump. Left out where the host was read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line: Option<usize>,
    /// The consequence, in figures.
    pub message: String,
    /// The way out.
    pub advice: String,
}

/// A rule on the way of the connections.
#[derive(Clone, Debug)]
pub struct ShownStep {
    /// Its chain.
    pub chain: String,
    /// The text after `-A CHAIN`.
    pub rule: String,
    /// Its line in the dump.
    pub line: usize,
    /// The share that reaches it.
    pub arriving: f64,
    /// The share that it takes.
    pub taken: f64,
    /// The destination or the chain that it leads to.
    pub target: String,
    /// True if it leads to a chain.
    pub is_chain: bool,
}

/// The facts of a host that mistakes depend on. Unknown ones find no mistakes.
#[derive(Clone, Debug, Default)]
pub struct HostFacts {
    /// The families that are known to be forwarded or not.
    pub forwarding: BTreeMap<Family, bool>,
    /// The addresses of the host.
    pub own: Vec<IpAddr>,
    /// The rules are those of a host, so their lines tell a user nothing.
    pub is_live: bool,
}

/// Explains the chains of the nat tables; `only` names the chains of interest, none
/// stands for all that share out connections.
#[must_use]
pub fn explain(tables: &[WholeTable], only: &[String], facts: &HostFacts) -> Explanation {
    let mut all = Explanation::default();
    for table in tables.iter().filter(|table| table.table == Table::Nat) {
        let is_filter =
            |other: &&WholeTable| other.table == Table::Filter && other.family == table.family;
        let explainer = Explainer {
            table,
            filter: tables.iter().find(is_filter),
            facts,
            referrers: referrers(table),
            leading: leading(table),
            ending: ending(table),
            index: RuleIndex::new(table),
        };
        explainer.explain(only, &mut all);
    }
    if facts.is_live {
        let findings = all.chains.iter_mut().flat_map(|chain| &mut chain.findings);
        findings
            .chain(&mut all.findings)
            .for_each(|finding| finding.line = None);
    }
    all
}

/// The addresses that rules lead to, for those who ask a host about them.
#[must_use]
pub fn addresses(tables: &[WholeTable]) -> Vec<IpAddr> {
    let chains = tables.iter().flat_map(|table| &table.chains);
    let rules = chains.flat_map(|chain| &chain.rules);
    let addresses: BTreeSet<IpAddr> = rules
        .filter_map(|rule| match &rule.way {
            Way::Destination(to) => rewriting::ends(to),
            _ => None,
        })
        .flatten()
        .map(|end| end.address)
        .collect();
    addresses.into_iter().collect()
}

/// The chains of one nat table, and what is around it.
pub(crate) struct Explainer<'a> {
    table: &'a WholeTable,
    filter: Option<&'a WholeTable>,
    facts: &'a HostFacts,
    referrers: Referrers,
    leading: Vec<bool>,
    ending: Vec<bool>,
    index: RuleIndex,
}

impl Explainer<'_> {
    fn explain(&self, only: &[String], all: &mut Explanation) {
        let mut explained: BTreeMap<usize, Vec<ExplainedChain>> = BTreeMap::new();
        let shares = self.sharing();
        let mut is_part = vec![false; self.table.chains.len()];
        let mut met: HashSet<(usize, usize)> = HashSet::new();
        // From the first chains down, so that parts of parts are parts too.
        for root in self.table.order.iter().rev().copied() {
            let is_root = match only.is_empty() {
                true => {
                    is_part[root] = self.is_part(root, &shares, &is_part, &met);
                    shares[root] != Shares::Nothing && !is_part[root]
                }
                false => only.iter().any(|name| name == self.name(root)),
            };
            if !is_root {
                continue;
            }
            for class in self.classes(root, &reachable(self.table, root)) {
                let course = follow(self.table, root, &self.selection(&class));
                if self.has_destination(&course) {
                    let rules = course.met.iter();
                    met.extend(rules.flat_map(|(chain, at)| at.iter().map(|at| (*chain, *at))));
                }
                if course.arrivals.is_empty() && only.is_empty() {
                    continue;
                }
                let mut chain = self.chain(root, &class, &course);
                lint::of_class(self, root, &class, &course, &mut chain);
                explained.entry(root).or_default().push(chain);
            }
        }
        all.chains.extend(explained.into_values().flatten());
        order::of_table(self, only, all);
    }

    fn selection(&self, class: &Class) -> Selection<'_> {
        Selection::new(self.table, &self.index, class)
    }

    fn name(&self, chain: usize) -> &str {
        &self.table.chains[chain].name
    }

    fn leads(&self, rule: &Rule) -> bool {
        match &rule.way {
            Way::Destination(_) => true,
            way => way.chain().is_some_and(|to| self.leading[to]),
        }
    }

    /// The classes of connections that the rules of a chain distinguish.
    fn classes(&self, root: usize, within: &[usize]) -> Vec<Class> {
        const MOST: usize = 10_000;
        let context = match self.referrers[root].as_slice() {
            [(from, at)] => self.table.chains[*from].rules[*at].conditions.clone(),
            _ => Vec::new(),
        };
        let rules = &self.table.chains[root].rules;
        let mut distinct: Vec<Vec<u32>> = Vec::new();
        let mut seen = HashSet::new();
        for rule in rules.iter().filter(|rule| self.shares_out(rule)) {
            if seen.insert(&rule.conditions) && distinct.len() < MOST {
                distinct.push(rule.conditions.clone());
            }
        }
        if distinct.is_empty() {
            distinct.push(Vec::new());
        }
        let classes = distinct.into_iter().map(|conditions| Class {
            conditions,
            context: context.clone(),
        });
        let protocols = self.protocols(within);
        // A condition of the rule that leads here is met with or without a second one in the chain.
        let mut seen: HashSet<BTreeSet<u32>> = HashSet::new();
        let all = |class: &Class| {
            let conditions = class.conditions.iter().chain(&class.context);
            conditions.copied().collect()
        };
        classes
            .flat_map(|class| self.by_protocol(class, &protocols))
            .filter(|class| seen.insert(all(class)))
            .collect()
    }

    /// The protocols that rules on the way ask for.
    fn protocols(&self, within: &[usize]) -> BTreeSet<u32> {
        let rules = within
            .iter()
            .flat_map(|chain| &self.table.chains[*chain].rules);
        let numbers = rules
            .filter(|rule| self.leads(rule))
            .flat_map(|rule| rule.conditions.iter().copied());
        let is_protocol = |number: &u32| {
            matches!(
                self.table.conditions.get(*number).meaning,
                Meaning::Protocol(_)
            )
        };
        numbers.filter(is_protocol).collect()
    }

    /// One class for each protocol, unless the class has one.
    fn by_protocol(&self, class: Class, protocols: &BTreeSet<u32>) -> Vec<Class> {
        if class.has_protocol(self.table) {
            return vec![class];
        }
        if protocols.is_empty() {
            return vec![class];
        }
        let with = |protocol: u32| {
            let mut conditions = class.conditions.clone();
            conditions.push(protocol);
            conditions.sort_unstable();
            Class {
                conditions,
                context: class.context.clone(),
            }
        };
        protocols.iter().copied().map(with).collect()
    }

    fn chain(&self, root: usize, class: &Class, course: &Course) -> ExplainedChain {
        let (shares, slacks) = self.shares(root, class, course);
        let given = class.conditions.iter();
        let texts = given.map(|number| self.table.conditions.get(*number).text.clone());
        let choices = [
            (course.has_turns, Choice::Turn),
            (course.has_chance, Choice::Chance),
            (course.has_hash, Choice::Hash),
        ];
        let decided_by: Vec<Choice> = choices
            .into_iter()
            .filter_map(|(decides, choice)| decides.then_some(choice))
            .collect();
        ExplainedChain {
            family: self.table.family,
            table: self.table.table,
            chain: self.name(root).to_owned(),
            jumps: self.referrers[root]
                .iter()
                .map(|(chain, at)| self.rule_text(*chain, *at))
                .collect(),
            conditions: texts.collect(),
            unmatched: unmatched(course),
            visits: course.visits,
            p_value: (course.has_chance && !course.has_turns && !course.has_hash)
                .then(|| fit::p_value(&shares))
                .flatten(),
            deviation: (decided_by == [Choice::Turn])
                .then(|| fit::deviation(&shares, &slacks))
                .flatten(),
            decided_by,
            steps: self.shown_steps(course),
            shares,
            findings: Vec::new(),
        }
    }

    fn shown_steps(&self, course: &Course) -> Vec<ShownStep> {
        let steps = course.steps.iter().map(|step| {
            let rule = &self.table.chains[step.chain].rules[step.at];
            ShownStep {
                chain: self.name(step.chain).to_owned(),
                rule: rule.text.clone(),
                line: rule.line,
                arriving: step.arriving.share.as_f64(),
                taken: step.taken.share.as_f64(),
                target: match &rule.way {
                    Way::Destination(to) => to.clone(),
                    Way::End(rule::Verdict::Accept) => "passes".to_owned(),
                    Way::End(rule::Verdict::Refuse) => "is refused".to_owned(),
                    Way::Return => "returns".to_owned(),
                    Way::Pass | Way::Named { .. } => "goes on".to_owned(),
                    Way::Jump(to) | Way::Goto(to) => self.name(*to).to_owned(),
                },
                is_chain: rule.way.chain().is_some(),
            }
        });
        steps.collect()
    }

    fn rule_text(&self, chain: usize, at: usize) -> String {
        format!(
            "-A {} {}",
            self.name(chain),
            self.table.chains[chain].rules[at].text
        )
    }

    /// The shares, in the order of the way, and the largest deviation of each in turn.
    fn shares(
        &self,
        root: usize,
        class: &Class,
        course: &Course,
    ) -> (Vec<ExplainedShare>, Vec<f64>) {
        let counted = self.counted(root, class, course);
        let mut places: HashMap<&str, usize> = HashMap::new();
        let mut sums: Vec<(Part, ExplainedShare, f64)> = Vec::new();
        for arrival in &course.arrivals {
            let rule = &self.table.chains[arrival.chain].rules[arrival.at];
            let Way::Destination(destination) = &rule.way else {
                continue;
            };
            let part = arrival.stream.part();
            let is_counted = counted.contains(&(arrival.chain, arrival.at));
            let packets = is_counted.then_some(rule.counters.packets);
            let bytes = is_counted.then_some(rule.counters.bytes);
            match places.get(destination.as_str()) {
                Some(place) => {
                    let (sum, share, slack) = &mut sums[*place];
                    sum.share = sum.share.and(part.share);
                    sum.exact = sum.exact.and_then(|exact| exact.and(part.exact?));
                    share.packets = share.packets.and_then(|sum| sum.checked_add(packets?));
                    share.bytes = share.bytes.and_then(|sum| sum.checked_add(bytes?));
                    *slack += arrival.slack();
                }
                None => {
                    places.insert(destination, sums.len());
                    let share = ExplainedShare {
                        destination: destination.clone(),
                        share: 0.0,
                        fraction: None,
                        packets,
                        bytes,
                    };
                    sums.push((part, share, arrival.slack()));
                }
            }
        }
        let shown = sums.into_iter().map(|(part, share, slack)| {
            let (value, fraction) = worded(part, course.has_hash);
            let share = ExplainedShare {
                share: value,
                fraction,
                ..share
            };
            (share, slack)
        });
        shown.unzip()
    }
}

/// A share as the nearest double, and as a short fraction.
fn worded(part: Part, has_hash: bool) -> (f64, Option<String>) {
    let exact = match (part.exact, has_hash) {
        (Some(exact), _) => Some(exact),
        (None, true) => Some(fraction::Fraction::of_share(part.share)),
        (None, false) => None,
    };
    let short = exact.filter(|exact| exact.is_short());
    let value = match short {
        #[allow(clippy::cast_precision_loss)]
        Some(exact) => exact.part as f64 / exact.whole as f64,
        None => part.share.as_f64(),
    };
    (value, short.map(|exact| exact.to_string()))
}

/// The share without a destination.
fn unmatched(course: &Course) -> f64 {
    let mut exact = Some(fraction::Fraction::NONE);
    let mut sum = Share::NONE;
    for arrival in &course.arrivals {
        let part = arrival.stream.part();
        exact = exact.and_then(|exact| exact.and(part.exact?));
        sum = sum.and(part.share);
    }
    let rest = match exact {
        Some(exact) => {
            worded(
                Part {
                    share: Share::ALL.without(sum),
                    exact: Some(exact.rest()),
                },
                false,
            )
            .0
        }
        None => Share::ALL.without(sum).as_f64(),
    };
    // Units of 2^-127 that were lost on the way are nobody's.
    if rest < 1e-30 { 0.0 } else { rest }
}
