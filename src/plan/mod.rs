//! A request into the desired chains and rules.
//!
//! | table | chain | holds | reached from |
//! |---|---|---|---|
//! | nat | `NAME`, `NAME/...` | the choice of a backend | PREROUTING, OUTPUT |
//! | nat | `NAME/drain` | the backends of weight 0, so that they stay known | nowhere |
//! | nat | `NAME/masq` | the connections whose source is rewritten | POSTROUTING |
//! | nat | `NAME/filter` | nothing: a mark that filter has chains too | nowhere |
//! | filter | `NAME/forward` | the connections that are accepted | FORWARD |
//! | filter | `NAME/refuse` | the answer of an empty pool | INPUT, FORWARD, OUTPUT |

mod gateway;
mod matches;

use std::collections::BTreeMap;

use crate::netfilter::rule::{Matches, Rule, Target};
use crate::netfilter::{Family, Protocol, Table};
use crate::request::{Backend, Balancer, Jump, Name, Pool, Request, WhenEmpty};
use crate::schedule::{Branch, Node, To};

/// The desired state: every chain and rule that a balancer is to own. Anything
/// else that it owns is removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The owner of the chains.
    pub name: Name,
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
        for (balancer, pool) in request
            .balancer()
            .into_iter()
            .flat_map(|balancer| balancer.pools.iter().map(move |pool| (balancer, pool)))
        {
            let mut nat = nat(&request.name, balancer, pool);
            let filter = gateway::filter(&request.name, balancer, pool);
            if filter != TablePlan::default() {
                nat.chains.insert(filter_mark(&request.name), Vec::new());
                tables.insert((pool.family, Table::Filter), filter);
            }
            tables.insert((pool.family, Table::Nat), nat);
        }
        Self {
            name: request.name.clone(),
            tables,
        }
    }

    /// Returns true if something is planned for the family.
    #[must_use]
    pub fn uses(&self, family: Family) -> bool {
        self.tables.keys().any(|(used, _)| *used == family)
    }
}

/// The empty chain in nat that tells that the balancer has rules in filter, so
/// that table need not be read to learn that there are none.
#[must_use]
pub fn filter_mark(name: &Name) -> String {
    chain_of(name, "filter")
}

/// Returns true for the name of such a mark.
#[must_use]
pub fn is_filter_mark(chain: &str) -> bool {
    chain.ends_with("/filter")
}

fn nat(name: &Name, balancer: &Balancer, pool: &Pool) -> TablePlan {
    let mut part = TablePlan::default();
    let nodes = pool.arrangement.chains.iter();
    for (name, rules) in nodes
        .map(|node| (chain_name(name, node), servers(name, balancer, pool, node)))
        .chain(drained(name, balancer, pool))
    {
        part.protocols.insert(name.clone(), balancer.protocol);
        part.chains.insert(name, rules);
    }
    let mut lead = |chain, entries: Vec<Matches>| {
        let jump = Target::Jump(name.as_str().to_owned());
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
    gateway::masquerade(name, balancer, pool, &mut part);
    part
}

fn chain_of(name: &Name, id: &str) -> String {
    format!("{}/{id}", name.as_str())
}

/// `NAME`, or `NAME/ID`
fn chain_name(name: &Name, node: &Node) -> String {
    match node.id.is_empty() {
        true => name.as_str().to_owned(),
        false => chain_of(name, &node.id),
    }
}

/// One rule for each branch of the arrangement. The chain of an empty pool that
/// refuses accepts the connection, so that no later nat rule sends it
/// elsewhere.
fn servers(name: &Name, balancer: &Balancer, pool: &Pool, node: &Node) -> Vec<Rule> {
    if pool.is_empty() && balancer.gateway.when_empty != WhenEmpty::Pass {
        return vec![Rule::to(Target::Accept)];
    }
    let rule = |branch: &Branch| match branch.to {
        To::Chain(next) => {
            let next = chain_name(name, &pool.arrangement.chains[next]);
            Rule {
                statistic: branch.takes,
                ..Rule::to(Target::Goto(next))
            }
        }
        To::Backend(at) => Rule {
            statistic: branch.takes,
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

/// The backends of weight 0, in a chain that nothing jumps to. It is the record
/// that their connections belong to this balancer, for the time when they are
/// removed.
fn drained(name: &Name, balancer: &Balancer, pool: &Pool) -> Option<(String, Vec<Rule>)> {
    let drained = pool.backends.iter().filter(|backend| backend.weight == 0);
    let rules: Vec<Rule> = drained.map(|backend| server(balancer, backend)).collect();
    (!rules.is_empty()).then(|| (chain_of(name, "drain"), rules))
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
