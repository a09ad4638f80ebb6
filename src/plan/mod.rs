//! A request into the desired chains and rules.
//!
//! | table | chain | holds | reached from |
//! |---|---|---|---|
//! | nat | `NAME`, `NAME/...` | the choice of a backend | PREROUTING, OUTPUT |
//! | nat | `NAME/drain` | the backends that are not in service, so that they stay known | nowhere |
//! | nat | `NAME/masq` | the connections whose source is rewritten | POSTROUTING |
//! | nat | `NAME/filter` | nothing: a mark that filter has chains too | nowhere |
//! | filter | `NAME/forward` | the connections that are accepted | FORWARD |
//! | filter | `NAME/refuse` | the answer of an empty pool | INPUT, FORWARD, OUTPUT |
//!
//! In a set the chains of a balancer begin with `SET/BALANCER`, and [`set`] has the
//! chains between them and the built-in ones.

mod dispatch;
mod gateway;
mod matches;
mod set;

use std::collections::BTreeMap;

use crate::netfilter::rule::{Matches, Rule, Target};
use crate::netfilter::ruleset::{OwnedTable, SavedRule};
use crate::netfilter::{Family, Protocol, Table};
use crate::request::{Backend, Balancer, Jump, Name, Pool, Request, WhenEmpty};
use crate::schedule::{Branch, Node, To};
pub use matches::loopback;

/// The desired state: every chain and rule that a balancer is to own. Anything
/// else that it owns is removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The owner of the chains.
    pub name: Name,
    /// True for a set of balancers, in which each owns a part of the chains.
    pub is_set: bool,
    /// The tables that are not empty.
    pub tables: BTreeMap<(Family, Table), TablePlan>,
}

/// The desired chains and jump rules of one table of one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TablePlan {
    /// Our chains by name, with their rules.
    pub chains: BTreeMap<String, Vec<Rule>>,
    /// The rules in built-in chains that jump to them.
    pub jumps: Vec<PlannedJump>,
    /// The protocol of all packets that come into a chain, where it is the same
    /// for all: rules in it mean the same with it or without.
    pub protocols: BTreeMap<String, Protocol>,
}

/// A rule that jumps from a built-in chain to one of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedJump {
    /// The chain that it stands in.
    pub chain: &'static str,
    /// The rule.
    pub rule: Rule,
    /// The position of a new rule.
    pub place: JumpPosition,
}

/// The position of a new rule in a foreign chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JumpPosition {
    /// To the end.
    End,
    /// To the head.
    Head,
    /// To the head, and it is in the wrong place after a rule that drops or
    /// rejects.
    BeforeRefusals,
}

impl From<Jump> for JumpPosition {
    fn from(jump: Jump) -> Self {
        match jump {
            Jump::Append => Self::End,
            Jump::Insert => Self::Head,
        }
    }
}

impl Plan {
    /// The plan of a request.
    #[must_use]
    pub fn new(request: &Request) -> Self {
        let mut tables = BTreeMap::new();
        let mut add = |family, (mut nat, filter): (TablePlan, TablePlan), mark| {
            if filter != TablePlan::default() {
                nat.chains.insert(mark, Vec::new());
                tables.insert((family, Table::Filter), filter);
            }
            tables.insert((family, Table::Nat), nat);
        };
        if request.is_set() {
            let name = request.name.as_str();
            for family in Family::BOTH {
                let pools = request.pools();
                let of_family: Vec<_> = pools.filter(|(_, pool)| pool.family == family).collect();
                if !of_family.is_empty() {
                    add(
                        family,
                        set::tables(name, &of_family),
                        chain_of(name, "/filter"),
                    );
                }
            }
        } else {
            for (balancer, pool) in request.pools() {
                let tables = (nat(balancer, pool), gateway::filter(balancer, pool));
                add(pool.family, tables, chain_of(&balancer.chain, "filter"));
            }
        }
        Self {
            name: request.name.clone(),
            is_set: request.is_set(),
            tables,
        }
    }

    /// The part of the plan that a chain belongs to: a balancer of the set, or the
    /// only one; `None` for the set's own chains.
    #[must_use]
    pub fn part<'a>(&self, chain: &'a str) -> Option<&'a str> {
        match self.is_set {
            true => self.name.member(chain),
            false => Some(""),
        }
    }

    /// Returns true if something is planned for the family.
    #[must_use]
    pub fn uses(&self, family: Family) -> bool {
        self.tables.keys().any(|(used, _)| *used == family)
    }
}

/// Returns true if an empty chain in nat tells that the balancer, or the set, has
/// rules in filter, so that table need not be read to learn that there are none.
#[must_use]
pub fn is_marked(name: &Name, nat: &OwnedTable) -> bool {
    ["filter", "/filter"].into_iter().any(|id| {
        let mark = nat.chains.get(&chain_of(name.as_str(), id));
        mark.is_some_and(|chain| !chain.rules.iter().any(is_of_a_balancer))
    })
}

/// Returns true for a rule that a balancer's chain in nat may have.
fn is_of_a_balancer(rule: &SavedRule) -> bool {
    let meaning = rule.meaning.as_ref();
    meaning.is_some_and(|rule| matches!(rule.target, Target::Dnat(_) | Target::Goto(_)))
}

/// Returns true for a name that such a mark may have. A balancer of a set may have
/// it too; its chain is not empty.
#[must_use]
pub fn may_be_filter_mark(chain: &str) -> bool {
    chain.ends_with("/filter")
}

fn nat(balancer: &Balancer, pool: &Pool) -> TablePlan {
    let mut part = TablePlan::default();
    choice(balancer, pool, &mut part);
    let mut lead = |chain, entries: Vec<Matches>| {
        let jump = Target::Jump(balancer.chain.clone());
        part.jumps
            .extend(entries.into_iter().map(|matches| PlannedJump {
                chain,
                rule: Rule {
                    protocol: Some(balancer.protocol),
                    ..Rule::to(jump.clone()).matching(matches)
                },
                place: balancer.jump.into(),
            }));
    };
    lead("PREROUTING", matches::from_outside(balancer, pool.family));
    if balancer.gateway.local_traffic {
        lead("OUTPUT", matches::from_here(balancer, pool.family));
    }
    gateway::masquerade(balancer, pool, &mut part);
    part
}

/// Adds the chains that choose a backend.
fn choice(balancer: &Balancer, pool: &Pool, part: &mut TablePlan) {
    let nodes = pool.arrangement.chains.iter();
    for (name, rules) in nodes
        .map(|node| (chain_name(balancer, node), servers(balancer, pool, node)))
        .chain(drained(balancer, pool))
    {
        part.protocols.insert(name.clone(), balancer.protocol);
        part.chains.insert(name, rules);
    }
}

fn chain_of(chain: &str, id: &str) -> String {
    format!("{chain}/{id}")
}

/// `NAME`, or `NAME/ID`
fn chain_name(balancer: &Balancer, node: &Node) -> String {
    match node.id.is_empty() {
        true => balancer.chain.clone(),
        false => chain_of(&balancer.chain, &node.id),
    }
}

/// One rule for each branch of the arrangement. The chain of an empty pool that
/// refuses accepts the connection, so that no later nat rule sends it
/// elsewhere.
fn servers(balancer: &Balancer, pool: &Pool, node: &Node) -> Vec<Rule> {
    if pool.is_empty() && balancer.gateway.when_empty != WhenEmpty::Pass {
        return vec![Rule::to(Target::Accept)];
    }
    let rule = |branch: &Branch| match branch.to {
        To::Chain(next) => {
            let next = chain_name(balancer, &pool.arrangement.chains[next]);
            Rule {
                statistic: branch.takes,
                hashes: branch.hashes.clone(),
                ..Rule::to(Target::Goto(next))
            }
        }
        To::Backend(at) => Rule {
            statistic: branch.takes,
            hashes: branch.hashes.clone(),
            ..server(balancer, &pool.backends[at])
        },
    };
    node.branches.iter().map(rule).collect()
}

/// DNAT to a port needs the protocol in the same rule, although nothing else
/// gets here.
fn server(balancer: &Balancer, backend: &Backend) -> Rule {
    Rule {
        protocol: Some(balancer.protocol),
        ..Rule::to(Target::Dnat(backend.endpoint))
    }
}

/// The backends that are not in service, in a chain that nothing jumps to. It is the
/// record that their connections belong to this balancer, for the time when they
/// are removed.
fn drained(balancer: &Balancer, pool: &Pool) -> Option<(String, Vec<Rule>)> {
    let backends = pool.backends.iter();
    let drained = backends.filter(|backend| !backend.is_in_service());
    let rules: Vec<Rule> = drained.map(|backend| server(balancer, backend)).collect();
    (!rules.is_empty()).then(|| (drain_chain(&balancer.chain), rules))
}

/// The chain of the backends that are not in service.
#[must_use]
pub fn drain_chain(balancer: &str) -> String {
    chain_of(balancer, "drain")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn plan(request: Value) -> Plan {
        let Value::Object(object) = request else {
            panic!("not an object")
        };
        Plan::new(&Request::from_json(object).unwrap())
    }

    fn texts<'a>(rules: impl IntoIterator<Item = &'a Rule>) -> Vec<String> {
        rules.into_iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_case_of_four_hubs() {
        let plan = plan(json!({
            "name": "CFENGINE", "destination_port": 5308,
            "backends": ["192.0.2.1:5308", "192.0.2.2:5308", "192.0.2.3:5308", "192.0.2.4:5308"],
        }));
        let part = &plan.tables[&(Family::Ipv4, Table::Nat)];
        assert_eq!(
            texts(&part.chains["CFENGINE"]),
            [
                " -p tcp -m statistic --mode nth --every 4 --packet 0 -j DNAT --to-destination 192.0.2.1:5308",
                " -p tcp -m statistic --mode nth --every 3 --packet 0 -j DNAT --to-destination 192.0.2.2:5308",
                " -p tcp -m statistic --mode nth --every 2 --packet 0 -j DNAT --to-destination 192.0.2.3:5308",
                " -p tcp -j DNAT --to-destination 192.0.2.4:5308",
            ]
        );
        assert_eq!(
            texts(part.jumps.iter().map(|lead| &lead.rule)),
            [" -p tcp -m tcp --dport 5308 -j CFENGINE"]
        );
        assert!(!plan.uses(Family::Ipv6));
    }

    #[test]
    fn every_combination_leads_into_the_chain() {
        let plan = plan(json!({
            "name": "W", "destination_port": ["80", 443, "8000:8010"], "protocol": "tcp", "in_interface": "eth0",
            "destination": "192.0.2.1,192.0.2.2,2001:db8::1", "source": ["10.0.0.0/8", "2001:db8:1::/48"],
            "backends": "10.1.1.1, fd00::1",
        }));
        let jumps = |family| {
            texts(
                plan.tables[&(family, Table::Nat)]
                    .jumps
                    .iter()
                    .map(|lead| &lead.rule),
            )
        };
        assert_eq!(
            jumps(Family::Ipv4),
            [
                " -s 10.0.0.0/8 -d 192.0.2.1/32 -i eth0 -p tcp -m multiport --dports 80,443,8000:8010 -j W",
                " -s 10.0.0.0/8 -d 192.0.2.2/32 -i eth0 -p tcp -m multiport --dports 80,443,8000:8010 -j W",
            ]
        );
        assert_eq!(
            jumps(Family::Ipv6),
            [
                " -s 2001:db8:1::/48 -d 2001:db8::1/128 -i eth0 -p tcp -m multiport --dports 80,443,8000:8010 -j W"
            ]
        );
    }

    #[test]
    fn everywhere_takes_in_every_other_network() {
        let plan = plan(
            json!({"name": "W", "destination_port": 80, "source": "0.0.0.0/0,10.0.0.0/8", "backends": "10.1.1.1"}),
        );
        assert_eq!(
            texts(
                plan.tables[&(Family::Ipv4, Table::Nat)]
                    .jumps
                    .iter()
                    .map(|lead| &lead.rule)
            ),
            [" -p tcp -m tcp --dport 80 -j W"]
        );
    }

    #[test]
    fn absent_is_an_empty_plan() {
        assert_eq!(
            plan(json!({"name": "W", "state": "absent"})).tables.len(),
            0
        );
    }
}
