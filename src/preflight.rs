//! Preflight checks: requests that would do harm on this host are refused, with
//! the reason and the way out.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::effects::sysctl;
use crate::host::{Facts, Host, Questions};
use crate::netfilter::{self, Family, Protocol};
use crate::request::{
    Backend, Balancer, Destination, HashKey, Mode, Pool, Request, WhenEmpty, listed,
};

/// The facts of the host that the request depends on.
#[must_use]
pub fn facts(host: &impl Host, request: &Request) -> Facts {
    if request.balancers().is_empty() {
        return Facts::default();
    }
    let forwarding = sysctl::observe(host);
    let questions = request
        .balancers()
        .iter()
        .map(|balancer| questions(balancer, &forwarding));
    host.facts(&merged(questions))
}

/// The questions of all balancers.
fn merged(questions: impl Iterator<Item = Questions>) -> Questions {
    let mut all = Questions::default();
    for mut one in questions {
        all.addresses.append(&mut one.addresses);
        all.ssh |= one.ssh;
        all.route_localnet |= one.route_localnet;
        all.forwarding |= one.forwarding;
        all.tracking.append(&mut one.tracking);
    }
    all.addresses.sort_unstable();
    all.addresses.dedup();
    all
}

/// The facts that matter for a balancer, given which families are forwarded.
fn questions(balancer: &Balancer, forwarding: &BTreeMap<Family, bool>) -> Questions {
    let backends = || balancer.pools.iter().flat_map(|pool| &pool.backends);
    let is_off =
        |family: Family| !balancer.gateway.ip_forward && forwarding.get(&family) == Some(&false);
    let may_be_ours = |backend: &&Backend| {
        let is_balanced = |port| balancer.destination_ports.include(port);
        let matters =
            is_off(backend.endpoint.family()) || backend.endpoint.port.is_none_or(is_balanced);
        matters && !backend.endpoint.address.is_loopback()
    };
    let mut addresses: Vec<IpAddr> = backends()
        .filter(may_be_ours)
        .map(|backend| backend.endpoint.address)
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    let names_loopback = match &balancer.destination {
        Destination::Networks(networks) => {
            networks.iter().any(|network| network.addr().is_loopback())
        }
        Destination::Any | Destination::Local => false,
    };
    Questions {
        addresses,
        ssh: balancer.protocol == Protocol::Tcp,
        route_localnet: names_loopback
            || backends().any(|backend| backend.endpoint.address.is_loopback()),
        forwarding: Family::BOTH.into_iter().any(is_off),
        ..Questions::of_tracking([balancer.protocol])
    }
}

/// Checks a request against the facts. Returns warnings.
///
/// # Errors
/// The harm that the request would do, and the way out.
pub fn check(request: &Request, facts: &Facts) -> Result<Vec<String>, String> {
    let mut found = Vec::new();
    for balancer in request.balancers() {
        let warnings = check_balancer(balancer, facts);
        let warnings = warnings.map_err(|harm| named(balancer, &harm))?;
        found.extend(warnings.into_iter().map(|warning| (balancer, warning)));
    }
    let mut warnings = request.warnings.clone();
    warnings.extend(grouped(found));
    Ok(warnings)
}

/// A text about a balancer, with its name if it is one of a set.
fn named(balancer: &Balancer, text: &str) -> String {
    match &balancer.name {
        Some(name) => format!("balancer `{name}`: {text}"),
        None => text.to_owned(),
    }
}

/// Warnings, each with the names of all balancers of the set that it is about.
#[must_use]
pub fn grouped<'a>(warnings: impl IntoIterator<Item = (&'a Balancer, String)>) -> Vec<String> {
    let mut texts: Vec<(String, Vec<&str>)> = Vec::new();
    let mut places = HashMap::new();
    for (balancer, text) in warnings {
        let place = *places.entry(text.clone()).or_insert(texts.len());
        if place == texts.len() {
            texts.push((text, Vec::new()));
        }
        texts[place].1.extend(balancer.name.as_deref());
    }
    let worded = |(text, names): (String, Vec<&str>)| match names.len() {
        0 => text,
        1 => format!("balancer {}: {text}", listed(names.into_iter())),
        _ => format!("balancers {}: {text}", listed(names.into_iter())),
    };
    texts.into_iter().map(worded).collect()
}

fn check_balancer(balancer: &Balancer, facts: &Facts) -> Result<Vec<String>, String> {
    check_loopback_destination(balancer, facts)?;
    let mut warnings = Vec::new();
    let backends = balancer.pools.iter().flat_map(|pool| &pool.backends);
    for backend in backends.filter(|backend| backend.weight > 0) {
        check_loopback(balancer, backend, facts)?;
        warnings.extend(to_itself(balancer, backend, facts));
    }
    warnings.extend(check_ssh(balancer, facts)?);
    warnings.extend(untracked(balancer, facts));
    if balancer.mode == Mode::Hash {
        warnings.extend(tied_to_this_gateway(balancer));
        warnings.extend(all_of_one_client(balancer));
    }
    Ok(warnings)
}

/// The warning that another gateway cannot take connections over.
fn tied_to_this_gateway(balancer: &Balancer) -> Option<String> {
    balancer.gateway.masquerade.as_ref().map(|_| {
        "masquerade: connections whose source address is rewritten end with this gateway, also if another one has the \
         same rules; to have them go on there, leave it out, and let the backends' routes lead through the gateways"
            .to_owned()
    })
}

/// Warnings about connections that all count as one client's, so that one
/// backend gets them all.
fn all_of_one_client(balancer: &Balancer) -> Vec<String> {
    let has_choice = |pool: &&Pool| {
        let with_weight = pool.backends.iter().filter(|backend| backend.weight > 0);
        with_weight.count() > 1
    };
    let mut pools = balancer.pools.iter().filter(has_choice);
    if balancer.hashing.key == HashKey::Connection {
        return Vec::new();
    }
    let way_out = "one backend gets all of them; `hash_key: connection` spreads them";
    let mut warnings = Vec::new();
    if balancer.gateway.local_traffic && pools.clone().next().is_some() {
        warnings.push(format!(
            "local_traffic: this host's connections come from one address, so {way_out}"
        ));
    }
    if let Some(pool) = pools.find(|pool| is_one_client(balancer, pool.family)) {
        warnings.push(format!(
            "source: all {} connections come from one client, of whose address {} bits count, so {way_out}",
            pool.family.title(),
            balancer.hashing.prefix(pool.family)
        ));
    }
    warnings
}

/// Returns true if all sources of the family agree in the bits that count.
fn is_one_client(balancer: &Balancer, family: Family) -> bool {
    let prefix = balancer.hashing.prefix(family);
    let of_family = |source: &&IpNet| Family::of(source.addr()) == family;
    let client = |source: &IpNet| match source.prefix_len() >= prefix {
        true => IpNet::new(source.addr(), prefix)
            .ok()
            .map(|client| client.trunc()),
        false => None,
    };
    let mut clients = balancer.sources.iter().filter(of_family).map(client);
    match clients.next() {
        Some(Some(first)) => clients.all(|client| client == Some(first)),
        Some(None) | None => false,
    }
}

/// The warning about a protocol that the kernel does not track: without a
/// conntrack entry a client's packets have no ports, and are one connection.
#[must_use]
pub fn untracked(balancer: &Balancer, facts: &Facts) -> Option<String> {
    facts.untracked.contains(&balancer.protocol).then(|| {
        format!(
            "protocol: this kernel does not track {0} connections, so all that a client sends goes to one server, \
             and to the port that it was addressed to; it takes a kernel that does, or its module nf_conntrack_proto_{0}",
            balancer.protocol.as_str()
        )
    })
}

/// The families that are not forwarded although a backend is on another host.
#[must_use]
pub fn not_forwarding(
    balancer: &Balancer,
    facts: &Facts,
    forwarding: &BTreeMap<Family, bool>,
) -> Vec<Family> {
    let elsewhere = |backend: &Backend| {
        backend.weight > 0
            && !facts.own.contains(&backend.endpoint.address)
            && !backend.endpoint.address.is_loopback()
    };
    let pools = balancer
        .pools
        .iter()
        .filter(|pool| pool.backends.iter().any(elsewhere));
    pools
        .map(|pool| pool.family)
        .filter(|family| forwarding.get(family) == Some(&false))
        .filter(|family| !facts.forwarding_somewhere.contains(family))
        .collect()
}

/// The warning about a backend that is the balanced address itself. A program
/// on this host may answer there, so it is not refused.
fn to_itself(balancer: &Balancer, backend: &Backend, facts: &Facts) -> Option<String> {
    let address = backend.endpoint.address;
    let is_balanced_address = match &balancer.destination {
        Destination::Any | Destination::Local => facts.own.contains(&address),
        Destination::Networks(networks) => {
            let covered = networks.iter().any(|network| network.contains(&address));
            networks.contains(&IpNet::from(address)) || (covered && facts.own.contains(&address))
        }
    };
    let is_balanced_port = backend
        .endpoint
        .port
        .is_none_or(|port| balancer.destination_ports.include(port));
    (is_balanced_address && is_balanced_port).then(|| {
        format!(
            "backends: `{}` is the balanced address itself, so its share stays where it came to, and is answered only if a \
             program there does; otherwise give it a port that is not balanced, or leave it out",
            backend.endpoint
        )
    })
}

fn check_loopback(balancer: &Balancer, backend: &Backend, facts: &Facts) -> Result<(), String> {
    if !backend.endpoint.address.is_loopback() {
        return Ok(());
    }
    if backend.endpoint.address.is_ipv6() {
        return Err(format!(
            "backends: `{}` is the loopback address, which no connection from elsewhere can be sent to; \
             name another address of this host",
            backend.endpoint
        ));
    }
    let lets_in = |name: &String| match &balancer.in_interface {
        None => true,
        Some(interface) => name == "all" || fits(interface, name),
    };
    match facts.route_localnet.iter().any(lets_in) {
        true => Ok(()),
        false => Err(format!(
            "backends: `{}` is a loopback address, to which the kernel lets nothing in from elsewhere; name another address \
             of this host, or switch that on with `sysctl net.ipv4.conf.{}.route_localnet=1`",
            backend.endpoint,
            balancer.in_interface.as_deref().unwrap_or("all")
        )),
    }
}

/// Refuses a loopback destination whose replies would have to arrive from
/// outside.
fn check_loopback_destination(balancer: &Balancer, facts: &Facts) -> Result<(), String> {
    let Destination::Networks(networks) = &balancer.destination else {
        return Ok(());
    };
    let mut loopback = networks
        .iter()
        .filter(|network| network.addr().is_loopback());
    let Some(network) =
        loopback.find(|network| network.addr().is_ipv6() || facts.route_localnet.is_empty())
    else {
        return Ok(());
    };
    let way_out = match network {
        IpNet::V4(_) => {
            ", or switch that on with `sysctl net.ipv4.conf.INTERFACE.route_localnet=1` where the backends are"
        }
        IpNet::V6(_) => "",
    };
    Err(format!(
        "destination: `{}` is a loopback address, to which the kernel lets no answer in from elsewhere; name another \
         address of this host{way_out}",
        netfilter::shortest(network)
    ))
}

/// Returns true if an interface has the name; a trailing `+` stands for any
/// ending.
fn fits(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('+') {
        Some(stem) => name.starts_with(stem),
        None => name == pattern,
    }
}

/// New ssh connections to this host would go to the backends.
fn check_ssh(balancer: &Balancer, facts: &Facts) -> Result<Vec<String>, String> {
    let Some(ssh) = facts.ssh else {
        return Ok(Vec::new());
    };
    let has = |networks: &[IpNet], address: IpAddr| {
        networks.iter().any(|network| network.contains(&address))
    };
    let (is_named, is_chosen) = match &balancer.destination {
        Destination::Any | Destination::Local => (true, false),
        Destination::Networks(networks) => (has(networks, ssh.server), true),
    };
    let taken = balancer.protocol == Protocol::Tcp
        && balancer.destination_ports.include(ssh.port)
        && is_named
        && (balancer.sources.is_empty() || has(&balancer.sources, ssh.client))
        && balancer.pools.iter().any(|pool| {
            let lets_pass = pool.is_empty() && balancer.gateway.when_empty == WhenEmpty::Pass;
            pool.family == Family::of(ssh.server) && !lets_pass
        });
    if !taken {
        return Ok(Vec::new());
    }
    let what = format!(
        "destination_port: takes port {} too, over which {} is connected to {} by ssh just now",
        ssh.port, ssh.client, ssh.server
    );
    match (is_chosen, &balancer.in_interface) {
        (_, Some(interface)) => Ok(vec![format!(
            "{what}; new connections of that kind that come in by `{interface}` are the balancer's"
        )]),
        (true, None) => Ok(vec![format!(
            "{what}; new connections of that kind are the balancer's"
        )]),
        (false, None) => Err(format!(
            "{what}, so you could not come back; leave it out, or name with `destination` or `in_interface` what is balanced \
             (`destination: {}` if that is what you want)",
            ssh.server
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::{Value, json};

    use super::*;
    use crate::host::Ssh;

    fn example() -> Facts {
        Facts {
            forwarding_somewhere: BTreeSet::new(),
            own: vec!["192.0.2.254".parse().unwrap(), "fd00::fe".parse().unwrap()],
            ssh: Some(Ssh {
                client: "198.51.100.7".parse().unwrap(),
                server: "192.0.2.254".parse().unwrap(),
                port: 22,
            }),
            route_localnet: vec!["eth1".to_owned()],
            ..Facts::default()
        }
    }

    fn checked(more: &Value) -> Result<Vec<String>, String> {
        let mut object = json!({"name": "W", "destination_port": 80, "backends": "192.0.2.1"});
        for (name, value) in more.as_object().unwrap() {
            object[name] = value.clone();
        }
        let Value::Object(object) = object else {
            panic!()
        };
        check(&Request::from_json(object).unwrap(), &example())
    }

    #[track_caller]
    fn refused(more: &Value, why: &str) {
        let error = checked(more).unwrap_err();
        assert!(error.contains(why), "{error}");
    }

    fn hash_warnings(more: &Value) -> Vec<String> {
        let mut request = json!({"mode": "hash", "backends": "192.0.2.1, 192.0.2.2"});
        let attributes = request.as_object_mut().unwrap();
        attributes.extend(more.as_object().unwrap().clone());
        checked(&request).unwrap()
    }

    #[test]
    fn connections_that_end_with_their_gateway_are_warned_of() {
        let warnings = hash_warnings(&json!({"masquerade": true}));
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(warnings[0].starts_with("masquerade: connections whose source"));
        let by_chance = json!({"mode": "random", "masquerade": true});
        assert_eq!(hash_warnings(&by_chance), Vec::<String>::new());
    }

    #[test]
    fn a_crowd_that_counts_as_one_client_is_warned_of() {
        for (more, warned) in [
            (json!({}), false),
            (json!({"source": "198.51.100.7"}), true),
            (
                json!({"source": "198.51.100.7", "hash_key": "connection"}),
                false,
            ),
            (
                json!({"source": "198.51.100.7", "backends": "192.0.2.1, 192.0.2.2 weight=0"}),
                false,
            ),
            (json!({"source": "198.51.100.7, 198.51.100.8"}), false),
            (json!({"source": "198.51.100.0/24"}), false),
            (
                json!({"source": "198.51.100.0/24", "hash_prefix": {"ipv4": 24}}),
                true,
            ),
            (
                json!({"source": "198.51.100.7, 198.51.100.8", "hash_prefix": {"ipv4": 24}}),
                true,
            ),
            (
                json!({"source": "198.51.100.7, 198.51.0.0/16", "hash_prefix": {"ipv4": 24}}),
                false,
            ),
            (
                json!({"source": "2001:db8::/64", "backends": "2001:db8:1::1, 2001:db8:1::2"}),
                true,
            ),
            (
                json!({"source": "2001:db8::/63", "backends": "2001:db8:1::1, 2001:db8:1::2"}),
                false,
            ),
            (json!({"local_traffic": true}), true),
            (
                json!({"local_traffic": true, "hash_key": "connection"}),
                false,
            ),
        ] {
            let warnings = hash_warnings(&more);
            assert_eq!(warnings.len(), usize::from(warned), "{more}: {warnings:?}");
            assert!(
                warnings
                    .iter()
                    .all(|text| text.contains("`hash_key: connection`"))
            );
        }
    }

    #[test]
    fn mostly_little_has_to_be_known() {
        let asked = |more: Value| {
            let mut object = json!({"name": "W", "destination_port": 80, "backends": "192.0.2.1:81, 192.0.2.2:81"});
            object
                .as_object_mut()
                .unwrap()
                .extend(more.as_object().unwrap().clone());
            let request = Request::from_json(object.as_object().unwrap().clone()).unwrap();
            let forwarding = BTreeMap::from([(Family::Ipv4, true), (Family::Ipv6, false)]);
            let asked = questions(&request.balancers()[0], &forwarding);
            (
                asked.addresses.len(),
                asked.ssh,
                asked.route_localnet,
                asked.forwarding,
            )
        };
        let on = json!({"ip_forward": true});
        assert_eq!(asked(on.clone()), (0, true, false, false));
        assert_eq!(
            asked(json!({"ip_forward": true, "protocol": "udp"})),
            (0, false, false, false)
        );
        assert_eq!(
            asked(json!({"backends": "fd00::1,192.0.2.1:81"})),
            (1, true, false, true)
        );
        assert_eq!(
            asked(json!({"backends": "127.0.0.1:80", "ip_forward": true})),
            (0, true, true, false)
        );
    }

    #[test]
    fn a_backend_that_is_the_balanced_address_is_warned_of() {
        for (more, shown) in [
            (
                json!({"backends": "192.0.2.254"}),
                "`192.0.2.254` is the balanced address itself",
            ),
            (
                json!({"backends": "[fd00::fe]:80", "destination": "local"}),
                "`[fd00::fe]:80` is the",
            ),
            (
                json!({"backends": "192.0.2.9:80", "destination": "192.0.2.9"}),
                "`192.0.2.9:80` is the",
            ),
            (
                json!({"backends": "192.0.2.254", "destination": "192.0.2.0/24"}),
                "`192.0.2.254` is the",
            ),
        ] {
            let warnings = checked(&more).unwrap();
            assert!(
                warnings.len() == 1 && warnings[0].contains(shown),
                "{warnings:?}"
            );
        }
        for fine in [
            json!({"backends": "192.0.2.254:8080"}),
            json!({"backends": "192.0.2.254 weight=0, 192.0.2.1"}),
            json!({"backends": "192.0.2.254:80", "destination": "192.0.2.253"}),
            json!({"backends": "192.0.2.9:80", "destination": "192.0.2.0/24"}),
        ] {
            assert_eq!(checked(&fine), Ok(vec![]), "{fine}");
        }
    }

    #[test]
    fn loopback_takes_route_localnet() {
        refused(
            &json!({"backends": "127.0.0.1:8080", "in_interface": "eth0"}),
            "sysctl net.ipv4.conf.eth0.route_localnet=1",
        );
        refused(
            &json!({"backends": "[::1]:8080"}),
            "name another address of this host",
        );
        for fine in [
            json!({"in_interface": "eth1"}),
            json!({"in_interface": "eth+"}),
            json!({}),
        ] {
            let mut request = fine.clone();
            request["backends"] = json!("127.0.0.1:8080");
            assert_eq!(checked(&request), Ok(vec![]), "{fine}");
        }
    }

    #[test]
    fn loopback_is_balanced_only_where_answers_get_in() {
        let local = |destination: &str, backends: &str| {
            checked(
                &json!({"local_traffic": true, "destination": destination, "backends": backends}),
            )
        };
        assert_eq!(local("127.0.0.0/8", "192.0.2.1"), Ok(vec![]));
        refused(
            &json!({"destination": "::1", "backends": "fd00::1"}),
            "destination: `::1` is a loopback address",
        );
    }

    #[test]
    fn ssh_is_taken_only_from_those_who_say_so() {
        refused(
            &json!({"destination_port": "1:1024"}),
            "over which 198.51.100.7 is connected to 192.0.2.254 by ssh",
        );
        refused(
            &json!({"destination_port": 22, "destination": "local"}),
            "`destination: 192.0.2.254` if that is what you want",
        );
        for warned in [
            json!({"destination": "192.0.2.254"}),
            json!({"in_interface": "eth0"}),
            json!({"destination": "0.0.0.0/0"}),
        ] {
            let mut request = warned.clone();
            request["destination_port"] = json!(22);
            assert_eq!(checked(&request).unwrap().len(), 1, "{warned}");
        }
        for fine in [
            json!({"protocol": "udp"}),
            json!({"source": "203.0.113.0/24"}),
            json!({"destination": "192.0.2.253"}),
            json!({"backends": "fd00::1"}),
            json!({"backends": [], "when_empty": "pass"}),
        ] {
            let mut request = fine.clone();
            request["destination_port"] = json!(22);
            assert_eq!(checked(&request), Ok(vec![]), "{fine}");
        }
    }

    #[test]
    fn forwarding_is_needed_for_what_is_elsewhere() {
        let off = BTreeMap::from([(Family::Ipv4, false), (Family::Ipv6, true)]);
        let missing = |backends: &str| {
            let Value::Object(object) =
                json!({"name": "W", "destination_port": 80, "backends": backends})
            else {
                panic!()
            };
            let request = Request::from_json(object).unwrap();
            not_forwarding(&request.balancers()[0], &example(), &off)
        };
        assert_eq!(missing("192.0.2.1,fd00::1"), [Family::Ipv4]);
        assert_eq!(
            missing("192.0.2.254:81,127.0.0.1:82,192.0.2.1 weight=0,fd00::1"),
            []
        );
    }
}
