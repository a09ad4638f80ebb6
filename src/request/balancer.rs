//! One balancer: its attributes into a value, and what must fit together.

use std::collections::BTreeSet;

use ipnet::IpNet;
use serde_json::Value;

use super::backend::{BackendEntry, backends};
use super::coerce::{BadRequest, Mistakes, choice};
use super::gateway::{Gateway, gateway};
use super::hash::{Hashing, hashing};
use super::health::{Health, check_ports, health};
use super::pool::{Arranger, Arranging, Method, Pool, pools};
use super::service::Known;
use super::traffic::{destination, interface, networks, ports as ports_of};
use super::unchecked::RequestAttributes;
use super::{DesiredState, Disconnect, Jump, Layout, Lookup, Mode, given, word};
use crate::netfilter::{self, Family, Ports, Protocol};

/// A balancer that can be built: the networks and addresses named are of the
/// families in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Balancer {
    /// Its name within a set.
    pub name: Option<String>,
    /// Its chain: the name of the request, in a set followed by `/` and its own.
    pub chain: String,
    /// In turn, by chance or by a hash.
    pub mode: Mode,
    /// The hash that decides, if one does.
    pub hashing: Hashing,
    /// One chain or a tree of chains.
    pub layout: Layout,
    /// The families that have backends, in order.
    pub pools: Vec<Pool>,
    /// The health checks of the backends.
    pub health: Option<Health>,
    /// The transport protocol.
    pub protocol: Protocol,
    /// The ports that are balanced.
    pub destination_ports: Ports,
    /// The addresses that are balanced.
    pub destination: Destination,
    /// Only from these networks; from everywhere when empty.
    pub sources: Vec<IpNet>,
    /// Only from this interface.
    pub in_interface: Option<String>,
    /// The position of a new jump rule.
    pub jump: Jump,
    /// The gateway around the chain.
    pub gateway: Gateway,
    /// The protocols whose connections are ended when their backend is removed.
    pub disconnect: Disconnect,
}

/// To whom a connection must be addressed to be balanced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// To anybody.
    Any,
    /// To any address of this host.
    Local,
    /// To one of these networks.
    Networks(Vec<IpNet>),
}

/// A balancer without backends, and the list that they are made from.
#[derive(Clone, Debug)]
pub(super) struct Draft {
    pub balancer: Balancer,
    pub listed: Vec<BackendEntry>,
}

impl Draft {
    /// Reads a balancer; `None` where there is to be none. Every given attribute is
    /// checked in either state. What `absent` does not need may be missing.
    pub fn read(
        attributes: &RequestAttributes,
        state: DesiredState,
    ) -> Result<Option<Self>, BadRequest> {
        let mut mistakes = Mistakes::default();
        let backends = given("backends", &attributes.backends).map(|place| backends(&place));
        let backends = mistakes.take(backends.transpose());
        let mode = mistakes.take(mode(&attributes.mode));
        // Beside a wrong word only their values can be wrong.
        let hashing = hashing(attributes, mode.unwrap_or(Mode::Hash));
        let hashing = mistakes.take(hashing).unwrap_or_default();
        let protocol = word("protocol", &attributes.protocol, &Protocol::WORDS);
        let protocol = mistakes.take(protocol).unwrap_or_default();
        let ports = given("destination_port", &attributes.destination_port);
        let ports = mistakes.take(ports.map(|place| ports_of(&place, protocol)).transpose());
        let destination = mistakes.take(destination(attributes));
        let sources = mistakes.take(networks("source", &attributes.source));
        let in_interface = mistakes.take(interface("in_interface", &attributes.in_interface));
        let jump = mistakes.take(word("jump", &attributes.jump, Jump::WORDS));
        let gateway = mistakes.take(gateway(attributes));
        let health = mistakes.take(health(attributes));
        if let (Some(Some(health)), Some(Some(listed))) = (&health, &backends) {
            mistakes.take(check_ports(health, listed));
        }
        if state == DesiredState::Absent {
            return mistakes.or(Some(None));
        }
        if backends == Some(None) {
            let problem = "is missing; it lists the servers";
            mistakes.add(BadRequest::new("backends", problem));
        }
        if ports == Some(None) {
            let problem = "is missing; it says what is balanced, and \"0:65535\" is every port";
            mistakes.add(BadRequest::new("destination_port", problem));
        }
        let balancer = gateway.map(|gateway| Balancer {
            name: None,
            chain: String::new(),
            mode: mode.unwrap_or_default(),
            hashing,
            layout: Layout::default(),
            health: health.flatten(),
            protocol,
            destination: destination.unwrap_or(Destination::Any),
            sources: sources.unwrap_or_default(),
            in_interface: in_interface.flatten(),
            jump: jump.unwrap_or_default(),
            destination_ports: ports.flatten().unwrap_or_default(),
            pools: Vec::new(),
            gateway,
            disconnect: Disconnect::default(),
        });
        let listed = backends.flatten().unwrap_or_default();
        mistakes.or(balancer.map(|balancer| Some(Self { balancer, listed })))
    }

    /// Returns true if a backend is a name that must be looked up.
    pub fn has_names(&self) -> bool {
        self.listed.iter().any(|listed| listed.host.is_name())
    }

    /// The balancer, with addresses in the place of names. What is inherited may
    /// have networks of families that are not in use.
    pub fn resolve(
        self,
        inherited: Inherited,
        lookup: Lookup,
        arranger: &mut Arranger,
    ) -> Result<Balancer, BadRequest> {
        let mut balancer = self.balancer;
        let named = balancer.families_named();
        let method = balancer.method();
        let arranging = Arranging { method, arranger };
        balancer.pools = pools(&self.listed, &named, lookup, arranging)?;
        balancer.keep_used(inherited);
        balancer.check_networks()?;
        balancer.check_snat()?;
        Ok(balancer)
    }
}

/// The attributes that a balancer of a set has from the set.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Inherited {
    pub destination: bool,
    pub source: bool,
    pub snat_address: bool,
}

/// The mode. The names of other balancers' methods lead to the one that fits.
fn mode(value: &Option<Value>) -> Result<Mode, BadRequest> {
    let Some(place) = given("mode", value) else {
        return Ok(Mode::default());
    };
    choice(&place, Mode::WORDS).map_err(|bad| {
        let word = place.value.as_str().unwrap_or_default().to_lowercase();
        let word = word.replace(['-', '_', ' '], "");
        let hint = match word.as_str() {
            "roundrobin" | "rr" | "wrr" | "staticrr" | "weightedroundrobin" | "turn" => {
                "round robin, with weights, is `nth`"
            }
            "chance" | "probability" | "rand" => "that is `random`",
            "source" | "sourcehash" | "sourceip" | "iphash" | "sticky" | "persistent"
            | "consistent" | "consistenthash" | "maglev" | "mh" | "ringhash" => {
                "the same backend for the same client is `hash`"
            }
            "leastconn" | "leastconnections" | "lc" | "wlc" | "leastrequest" => {
                "iptables does not count a backend's connections; the nearest is `nth`"
            }
            _ => return bad,
        };
        place.refuse(format_args!("is not one of: nth, random, hash; {hint}"))
    })
}

impl Balancer {
    /// The families of `destination`, `source` and `snat_address`.
    fn families_named(&self) -> BTreeSet<Family> {
        let destinations = match &self.destination {
            Destination::Networks(networks) => networks.as_slice(),
            Destination::Any | Destination::Local => &[],
        };
        let networks = destinations.iter().chain(&self.sources);
        let mut named: BTreeSet<Family> =
            networks.map(|network| Family::of(network.addr())).collect();
        if let Some(masquerade) = &self.gateway.masquerade {
            named.extend(masquerade.addresses.keys());
        }
        named
    }

    /// Leaves out inherited networks of families that have no backends.
    fn keep_used(&mut self, inherited: Inherited) {
        let used: BTreeSet<Family> = self.pools.iter().map(|pool| pool.family).collect();
        let keep = |networks: &mut Vec<IpNet>| {
            let is_used = |network: &IpNet| used.contains(&Family::of(network.addr()));
            if networks.iter().any(is_used) {
                networks.retain(is_used);
            }
        };
        match &mut self.destination {
            Destination::Networks(networks) if inherited.destination => keep(networks),
            _ => {}
        }
        if inherited.source {
            keep(&mut self.sources);
        }
        let masquerade = self.gateway.masquerade.as_mut();
        if let Some(masquerade) = masquerade.filter(|_| inherited.snat_address) {
            let addresses = &mut masquerade.addresses;
            if addresses.keys().any(|family| used.contains(family)) {
                addresses.retain(|family, _| used.contains(family));
            }
        }
    }

    fn method(&self) -> Method {
        Method {
            mode: self.mode,
            layout: self.layout,
            hashing: self.hashing,
        }
    }

    /// Decides which backends are in service; returns true where that needs other
    /// weights, see [`Pool::decide`].
    pub(super) fn decide(&mut self, known: &Known, arranger: &mut Arranger) -> bool {
        let method = self.method();
        let mut arranging = Arranging { method, arranger };
        let threshold = self.health.as_ref().map(|health| health.panic_threshold);
        let mut is_changed = false;
        for pool in &mut self.pools {
            is_changed |= pool.decide(known, threshold, &mut arranging);
        }
        is_changed
    }

    /// A warning with the name of the balancer, if it is of a set.
    #[must_use]
    pub fn worded(&self, warning: &str) -> String {
        match &self.name {
            None => warning.to_owned(),
            Some(name) => format!("balancer `{name}`: {warning}"),
        }
    }

    fn check_snat(&self) -> Result<(), BadRequest> {
        let Some(masquerade) = &self.gateway.masquerade else {
            return Ok(());
        };
        let addresses: Vec<IpNet> = masquerade
            .addresses
            .values()
            .map(|address| IpNet::from(*address))
            .collect();
        self.check_families("snat_address", &addresses)
    }

    /// A network of a family without backends, or backends of a family that no
    /// network is of, would silently get nothing.
    fn check_networks(&self) -> Result<(), BadRequest> {
        if let Destination::Networks(networks) = &self.destination {
            self.check_families("destination", networks)?;
        }
        self.check_families("source", &self.sources)?;
        self.check_combinations()
    }

    /// One rule jumps into the chain for each combination of the networks.
    fn check_combinations(&self) -> Result<(), BadRequest> {
        const MOST: usize = 4096;
        let destinations = match &self.destination {
            Destination::Networks(networks) => networks.len(),
            Destination::Any | Destination::Local => 1,
        };
        let combinations = destinations.saturating_mul(self.sources.len().max(1));
        if combinations <= MOST {
            return Ok(());
        }
        let problem = format!(
            "with `destination` these are {combinations} combinations, more than {MOST}; name larger networks"
        );
        Err(BadRequest::new("source", problem))
    }

    fn check_families(&self, path: &str, networks: &[IpNet]) -> Result<(), BadRequest> {
        let family_of = |network: &IpNet| Family::of(network.addr());
        for (at, network) in networks.iter().enumerate() {
            let family = family_of(network);
            if !self.pools.iter().any(|pool| pool.family == family) {
                let problem = format!(
                    "`{}` is {}, but no backend is; add one or leave it out",
                    netfilter::shortest(network),
                    family.title()
                );
                return Err(BadRequest::new(format!("{path}[{at}]"), problem));
            }
        }
        for family in self.pools.iter().map(|pool| pool.family) {
            if !networks.is_empty() && !networks.iter().any(|network| family_of(network) == family)
            {
                let problem = format!(
                    "names no {0} address, but there are {0} backends; name one, or leave those backends out",
                    family.title()
                );
                return Err(BadRequest::new(path, problem));
            }
        }
        Ok(())
    }
}
