//! A request into the chains and rules there should be.

use std::collections::BTreeMap;

use ipnet::IpNet;

use crate::net::{Family, Protocol, Table};
use crate::request::{Backend, Balancer, Destination, Jump, Name, Pool, Request, Wanted};
use crate::rule::{Rule, Target};
use crate::schedule::{Branch, Node, To};

/// All that a balancer is to own, in every family and table. What is not in
/// it is not to be there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Whose chains these are.
    pub name: Name,
    /// The parts that are not empty.
    pub parts: BTreeMap<(Family, Table), Part>,
}

/// What is to be in one table of one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// Our chains by name, with their rules.
    pub chains: BTreeMap<String, Vec<Rule>>,
    /// The rules elsewhere that lead into them.
    pub leads: Vec<Lead>,
    /// The protocol of all packets that come into our chains, if it is the
    /// same for all: rules in them mean the same with it or without.
    pub protocol: Option<Protocol>,
}

/// A rule that leads from a built-in chain into one of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lead {
    /// The chain that it stands in.
    pub chain: &'static str,
    /// The rule.
    pub rule: Rule,
    /// Where it goes if it is not there yet.
    pub jump: Jump,
}

impl Plan {
    /// What the request asks for.
    #[must_use]
    pub fn new(request: &Request) -> Self {
        let mut parts = BTreeMap::new();
        if let Wanted::Present(balancer) = &request.wanted {
            for pool in &balancer.pools {
                let part = nat(&request.name, balancer, pool);
                parts.insert((pool.family, Table::Nat), part);
            }
        }
        Self {
            name: request.name.clone(),
            parts,
        }
    }

    /// Whether anything is to be there for that family.
    #[must_use]
    pub fn uses(&self, family: Family) -> bool {
        self.parts.keys().any(|(used, _)| *used == family)
    }
}

fn nat(name: &Name, balancer: &Balancer, pool: &Pool) -> Part {
    let jump = Target::Jump(name.as_str().to_owned());
    let lead = |rule| Lead {
        chain: "PREROUTING",
        rule,
        jump: balancer.jump,
    };
    let nodes = pool.arrangement.chains.iter();
    let chain = |node: &Node| (chain_name(name, node), servers(name, balancer, pool, node));
    Part {
        chains: nodes.map(chain).collect(),
        leads: entries(balancer, pool.family, &jump)
            .into_iter()
            .map(lead)
            .collect(),
        protocol: Some(balancer.protocol),
    }
}

/// `NAME`, or `NAME/ID`
fn chain_name(name: &Name, node: &Node) -> String {
    match node.id.is_empty() {
        true => name.as_str().to_owned(),
        false => format!("{}/{}", name.as_str(), node.id),
    }
}

/// A rule for each branch of the arrangement. DNAT to a port needs the protocol
/// in the same rule, although nothing else gets here.
fn servers(name: &Name, balancer: &Balancer, pool: &Pool, node: &Node) -> Vec<Rule> {
    let rule = |branch: &Branch| {
        let (protocol, target) = match branch.to {
            To::Chain(next) => (
                None,
                Target::Goto(chain_name(name, &pool.arrangement.chains[next])),
            ),
            To::Backend(at) => {
                let Backend { address, port, .. } = pool.backends[at];
                (Some(balancer.protocol), Target::Dnat { address, port })
            }
        };
        Rule {
            protocol,
            statistic: branch.takes,
            ..Rule::to(target)
        }
    };
    node.branches.iter().map(rule).collect()
}

/// One rule for every combination of source, destination and set of ports that
/// fits into a rule. They lead into the same chain, so that whichever matches,
/// its connections take turns with those of the others.
fn entries(balancer: &Balancer, family: Family, target: &Target) -> Vec<Rule> {
    let destinations = match &balancer.destination {
        Destination::Networks(networks) => of_family(networks, family),
        Destination::Any | Destination::Local => vec![None],
    };
    let sources = of_family(&balancer.sources, family);
    let ports = balancer.destination_ports.split_for_multiport();
    let mut rules = Vec::new();
    for destination in &destinations {
        for source in &sources {
            for ports in &ports {
                rules.push(Rule {
                    source: *source,
                    destination: *destination,
                    in_interface: balancer.in_interface.clone(),
                    protocol: Some(balancer.protocol),
                    destination_ports: ports.clone(),
                    to_local: balancer.destination == Destination::Local,
                    ..Rule::to(target.clone())
                });
            }
        }
    }
    rules
}

/// The networks of that family; `None` is everywhere, and takes in the others.
fn of_family(networks: &[IpNet], family: Family) -> Vec<Option<IpNet>> {
    let ours = networks
        .iter()
        .filter(|network| Family::of(network.addr()) == family);
    let found: Vec<_> = ours
        .map(|network| Some(*network).filter(|network| network.prefix_len() > 0))
        .collect();
    match found.is_empty() || found.contains(&None) {
        true => vec![None],
        false => found,
    }
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
        let part = &plan.parts[&(Family::Ipv4, Table::Nat)];
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
            texts(part.leads.iter().map(|lead| &lead.rule)),
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
        let leads = |family| {
            texts(
                plan.parts[&(family, Table::Nat)]
                    .leads
                    .iter()
                    .map(|lead| &lead.rule),
            )
        };
        assert_eq!(
            leads(Family::Ipv4),
            [
                " -s 10.0.0.0/8 -d 192.0.2.1/32 -i eth0 -p tcp -m multiport --dports 80,443,8000:8010 -j W",
                " -s 10.0.0.0/8 -d 192.0.2.2/32 -i eth0 -p tcp -m multiport --dports 80,443,8000:8010 -j W",
            ]
        );
        assert_eq!(
            leads(Family::Ipv6),
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
                plan.parts[&(Family::Ipv4, Table::Nat)]
                    .leads
                    .iter()
                    .map(|lead| &lead.rule)
            ),
            [" -p tcp -m tcp --dport 80 -j W"]
        );
    }

    #[test]
    fn absent_is_an_empty_plan() {
        assert_eq!(plan(json!({"name": "W", "state": "absent"})).parts.len(), 0);
    }
}
