mod gateway;
mod set;

use super::*;
use crate::netfilter::{Endpoint, Ports, Protocol};
use serde_json::json;

fn parse(value: Value) -> Result<Request, BadRequest> {
    match value {
        Value::Object(object) => Request::from_json(object),
        other => panic!("not an object: {other}"),
    }
}

/// The usual request with some attributes set; null takes one away.
fn with(attributes: Value) -> Result<Request, BadRequest> {
    let mut request =
        json!({"name": "W", "destination_port": 80, "backends": ["192.0.2.1", "192.0.2.2"]});
    let Value::Object(attributes) = attributes else {
        panic!("not an object")
    };
    request.as_object_mut().unwrap().extend(attributes);
    parse(request)
}

fn balancer(attributes: Value) -> Balancer {
    match with(attributes)
        .unwrap_or_else(|error| panic!("{error}"))
        .desired
    {
        Desired::Balancer(balancer) => *balancer,
        other => panic!("{other:?}"),
    }
}

fn message(attributes: Value) -> String {
    with(attributes.clone())
        .map(|_| attributes)
        .expect_err("accepted")
        .to_string()
}

#[test]
fn the_defaults_are_those_of_the_contract() {
    let request = with(json!({})).unwrap();
    assert_eq!((request.variant, request.wait), (VariantChoice::Auto, 10));
    let balancer = balancer(json!({}));
    assert_eq!(balancer.mode, Mode::Nth);
    assert_eq!(balancer.protocol, Protocol::Tcp);
    assert_eq!(balancer.destination, Destination::Any);
    assert_eq!(balancer.jump, Jump::Append);
    assert_eq!(
        balancer.pools[0].backends[0],
        Backend::new(Endpoint::parse("192.0.2.1").unwrap(), 1)
    );
}

#[test]
fn all_spellings_of_the_backends_are_the_same() {
    let expected = balancer(json!({"backends": [
        {"address": "192.0.2.1", "port": 5308, "weight": 70}, {"address": "192.0.2.2", "port": 5308, "weight": 30},
    ]})).pools[0].backends.clone();
    for backends in [
        json!("192.0.2.1:5308 weight=70, 192.0.2.2:5308 weight=30"),
        json!(["192.0.2.1:5308 weight=70", {"address": "192.0.2.2", "port": "5308", "weight": "30"}]),
        json!({"1": {"address": "192.0.2.2", "port": 5308.0, "weight": "30.0000"}, "0": "192.0.2.1:5308  weight=70.0000"}),
        json!(
            "[{\"address\": \"192.0.2.1\", \"port\": \"5308\", \"weight\": 70.0}, \"192.0.2.2:5308 weight=30\"]"
        ),
    ] {
        assert_eq!(
            balancer(json!({"backends": backends})).pools[0].backends,
            expected
        );
    }
}

#[test]
fn ipv6_backends_with_and_without_brackets_and_ports() {
    let backends = balancer(json!({"backends": "[fd00::1]:5308 weight=2, fd00::2, [fd00::3]"}))
        .pools[0]
        .backends
        .clone();
    let seen: Vec<_> = backends
        .iter()
        .map(|backend| {
            (
                backend.endpoint.address.to_string(),
                backend.endpoint.port,
                backend.weight,
            )
        })
        .collect();
    assert_eq!(
        seen,
        [
            ("fd00::1".into(), Some(5308), 2),
            ("fd00::2".into(), None, 1),
            ("fd00::3".into(), None, 1)
        ]
    );
}

#[test]
fn ports_come_as_numbers_strings_ranges_and_lists() {
    let ports = |value| balancer(json!({"destination_port": value})).destination_ports;
    assert_eq!(ports(json!("80")), ports(json!(80)));
    assert_eq!(ports(json!("80.0000")), ports(json!(80)));
    assert_eq!(
        ports(json!("80,443,1000:2000")),
        ports(json!([80, "443", "1000:2000"]))
    );
    assert_eq!(ports(json!("0:65535")), Ports::default());
}

#[test]
fn null_counts_as_left_out() {
    assert_eq!(
        balancer(json!({"mode": null, "source": null, "protocol": null})).mode,
        Mode::Nth
    );
    assert_eq!(
        message(json!({"backends": null})),
        "backends: is missing; it lists the servers"
    );
}

#[test]
fn chain_is_another_spelling_of_name() {
    assert_eq!(
        with(json!({"name": null, "chain": "CF"}))
            .unwrap()
            .name
            .as_str(),
        "CF"
    );
    assert!(message(json!({"chain": "CF"})).starts_with("chain: `name` is given too"));
}

#[test]
fn absent_needs_the_name_alone_but_what_is_given_is_checked() {
    assert_eq!(
        parse(json!({"name": "W", "state": "absent"}))
            .unwrap()
            .desired,
        Desired::Absent
    );
    assert_eq!(
        with(json!({"state": "absent", "masquerade": true}))
            .unwrap()
            .desired,
        Desired::Absent
    );
    assert!(message(json!({"state": "absent", "mode": "fair"})).starts_with("mode: `fair`"));
}

#[test]
fn an_unknown_name_gets_the_nearest_known_one() {
    assert_eq!(
        message(json!({"backend": []})),
        "backend: there is no such attribute; the nearest is `backends`"
    );
    assert_eq!(
        message(json!({"destination_ports": 1})),
        "destination_ports: there is no such attribute; the nearest is `destination_port`"
    );
    assert_eq!(
        message(json!({"Mode": "nth"})),
        "Mode: there is no such attribute; the nearest is `mode`"
    );
    assert_eq!(
        message(json!({"backends": [{"address": "192.0.2.1", "wieght": 1}]})),
        "backends[0].wieght: there is no such attribute; the nearest is `weight`"
    );
    assert_eq!(message(json!({"a\nb": 1})).lines().count(), 1);
}

#[test]
fn every_error_names_the_attribute_the_item_and_the_way_out() {
    for (attributes, expected) in [
        (
            json!({"name": null}),
            "name: is missing; it names the chain",
        ),
        (
            json!({"name": "A B"}),
            "name: `A B` is not 1 to 20 of A-Z a-z 0-9 _ . -",
        ),
        (
            json!({"name": "A/B"}),
            "name: `A/B` is not 1 to 20 of A-Z a-z 0-9 _ . -",
        ),
        (
            json!({"name": "ABCDEFGHIJKLMNOPQRSTU"}),
            "name: `ABCDEFGHIJKLMNOPQRSTU` is not 1 to 20 of A-Z a-z 0-9 _ . -",
        ),
        (
            json!({"name": "-j"}),
            "name: `-j` begins with `-`, which iptables takes for an option",
        ),
        (
            json!({"name": "DNAT"}),
            "name: `DNAT` is a built-in chain or a target of iptables; take another name",
        ),
        (json!({"name": ["W"]}), "name: `[\"W\"]` is not a string"),
        (
            json!({"name": ""}),
            "name: is empty; leave the attribute out instead",
        ),
        (
            json!({"state": "gone"}),
            "state: `gone` is not one of: present, absent",
        ),
        (
            json!({"mode": true}),
            "mode: `true` is not one of: nth, random, hash",
        ),
        (
            json!({"hash_seed": 7}),
            "hash_seed: is for `mode: hash`, and the mode is `nth`; say `mode: hash`, or leave it out",
        ),
        (
            json!({"mode": "random", "hash_key": "source", "hash_prefix": {"ipv4": 24}}),
            "hash_key: is for `mode: hash`, and the mode is `random`; say `mode: hash`, or leave it out; \
             hash_prefix: is for `mode: hash`, and the mode is `random`; say `mode: hash`, or leave it out",
        ),
        (
            json!({"mode": "hash", "hash_key": "port", "hash_seed": -1, "hash_prefix": {"ipv4": 0, "ipv6": 129, "ipv5": 1}}),
            "hash_key: `port` is not one of: source, connection; hash_seed: `-1` is not between 0 and 4294967295; \
             hash_prefix.ipv4: `0` is not between 1 and 32; hash_prefix.ipv5: is neither `ipv4` nor `ipv6`; \
             hash_prefix.ipv6: `129` is not between 1 and 128",
        ),
        (
            json!({"mode": "hash", "hash_prefix": 24}),
            "hash_prefix: `24` is not {ipv4: 1 to 32, ipv6: 1 to 128}",
        ),
        (
            json!({"destination_port": null}),
            "destination_port: is missing; it says what is balanced, and \"0:65535\" is every port",
        ),
        (
            json!({"destination_port": 0}),
            "destination_port[0]: `0` is not between 1 and 65535",
        ),
        (
            json!({"destination_port": [80, "htttp"]}),
            "destination_port[1]: `htttp` is neither a port, 1 to 65535, nor a range a:b of ports, ascending, nor a service in /etc/services",
        ),
        (
            json!({"destination_port": "9:1"}),
            "destination_port[0]: `9:1` is neither a port, 1 to 65535, nor a range a:b of ports, ascending, nor a service in /etc/services",
        ),
        (
            json!({"destination_port": []}),
            "destination_port: is empty; \"0:65535\" is every port",
        ),
        (
            json!({"destination_port": (1..=16).collect::<Vec<u32>>()}),
            "destination_port: has 16 items, more than 15",
        ),
        (
            json!({"backends": ["192.0.2.1", {"address": "192.0.2.2"}, {"address": "192.0.2.3", "weight": -1}]}),
            "backends[2].weight: `-1` is not between 0 and 2147483647",
        ),
        (
            json!({"backends": [{"address": "192.0.2.1", "port": "99999"}]}),
            "backends[0].port: `99999` is not between 1 and 65535",
        ),
        (
            json!({"backends": [{"port": 1}]}),
            "backends[0].address: is missing",
        ),
        (
            json!({"backends": [{"address": "192.0.2.1:80"}]}),
            "backends[0].address: `192.0.2.1:80` has a port in it; give that as `port`",
        ),
        (
            json!({"backends": ["192.0.2.1 80"]}),
            "backends[0]: `192.0.2.1 80` is not of the form HOST[:PORT] [weight=N] [backup]",
        ),
        (
            json!({"backends": ["192.0.2.1 weight=1 weight=2"]}),
            "backends[0]: `192.0.2.1 weight=1 weight=2` is not of the form HOST[:PORT] [weight=N] [backup]",
        ),
        (
            json!({"backends": ["192.0.2.300"]}),
            "backends[0].address: `192.0.2.300` is neither an IP address nor a hostname",
        ),
        (
            json!({"backends": ["0.0.0.0"]}),
            "backends[0].address: `0.0.0.0` is the unspecified address, to which nothing can be sent",
        ),
        (
            json!({"backends": ["ff02::1"]}),
            "backends[0].address: `ff02::1` is a multicast address, not a server's",
        ),
        (
            json!({"backends": ["::ffff:192.0.2.1"]}),
            "backends[0].address: `::ffff:192.0.2.1` is an IPv4 address in IPv6 form; write it as IPv4",
        ),
        (
            json!({"backends": ["192.0.2.1:80", "192.0.2.2", "192.0.2.1:80 weight=3"]}),
            "backends[2]: is the same address and port as backends[0]; list it once, with the sum of the weights",
        ),
        (
            json!({"backends": [7]}),
            "backends[0]: `7` is neither an object {address, port, weight, backup} nor a string HOST[:PORT] [weight=N] [backup]",
        ),
        (
            json!({"backends": true}),
            "backends[0]: `true` is neither an object {address, port, weight, backup} nor a string HOST[:PORT] [weight=N] [backup]",
        ),
        (
            json!({"source": "10.0.0.0/33"}),
            "source[0]: `10.0.0.0/33` is not an IP address or network such as 192.0.2.0/24",
        ),
        (
            json!({"source": "2001:db8::/32"}),
            "source[0]: `2001:db8::/32` is IPv6, but no backend is; add one or leave it out",
        ),
        (
            json!({"destination": ["192.0.2.9", "local"]}),
            "destination[1]: `local` stands alone, not beside other addresses",
        ),
        (
            json!({"destination": "192.0.2.9", "backends": "192.0.2.1,fd00::1"}),
            "destination: names no IPv6 address, but there are IPv6 backends; name one, or leave those backends out",
        ),
        (
            json!({"in_interface": "+"}),
            "in_interface: `+` is every interface; leave the attribute out instead",
        ),
        (
            json!({"snat_address": "192.0.2.9"}),
            "snat_address: is the address of `masquerade`, which is `no`; say `masquerade: balanced`, or leave it out",
        ),
        (
            json!({"masquerade": "all"}),
            "out_interface: is missing; `masquerade: all` needs it",
        ),
        (
            json!({"variant": "ebtables"}),
            "variant: `ebtables` is not one of: auto, nft, legacy",
        ),
        (
            json!({"wait": "soon"}),
            "wait: `soon` is not a whole number",
        ),
        (
            json!({"wait": 3601}),
            "wait: `3601` is not between 0 and 3600",
        ),
        (
            json!({"persist": "rules.v4"}),
            "persist: `rules.v4` is neither a boolean, an absolute path, nor {ipv4: path, ipv6: path}",
        ),
    ] {
        assert_eq!(message(attributes), expected);
    }
    assert!(
        message(json!({"in_interface": "eth0 -j ACCEPT"}))
            .starts_with("in_interface: `eth0 -j ACCEPT` is not the name of an interface")
    );
}

/// The lines of a transaction are ours alone, for any request.
#[test]
fn no_string_of_a_request_becomes_a_rule_an_option_or_a_line() {
    let hostile = [
        "\n-A INPUT -j ACCEPT",
        "x\r\nCOMMIT",
        "eth0\" -j DROP \"",
        "a b",
        "--help",
        "$(id)",
        "`id`",
        "\0",
        "é",
        "\u{202e}",
        "' -j X",
        "\\",
        "*nat",
        "#",
    ];
    for attribute in super::names_of::<RequestAttributes>() {
        for value in hostile {
            assert!(
                with(json!({attribute.as_str(): value})).is_err(),
                "{attribute} {value:?}"
            );
            assert!(
                with(json!({attribute.as_str(): [value]})).is_err(),
                "{attribute} [{value:?}]"
            );
        }
    }
    for part in ["address", "port", "weight"] {
        for value in hostile {
            let mut backend = json!({"address": "192.0.2.1"});
            backend[part] = json!(value);
            assert!(
                with(json!({"backends": [backend]})).is_err(),
                "{part} {value:?}"
            );
        }
    }
}

#[test]
fn the_attributes_are_those_of_the_contract() {
    let mut names = super::names_of::<RequestAttributes>();
    names.sort_unstable();
    let contract = "backends balancers chain destination destination_port disconnect drain_timeout forward hash_key hash_prefix hash_seed \
         health in_interface ip_forward jump layout local_traffic masquerade mode name out_interface persist protocol \
         snat_address source state variant wait when_empty";
    assert_eq!(names, contract.split_whitespace().collect::<Vec<_>>());
}

/// Ansible and CFEngine hand over numbers as strings, and CFEngine an object as text.
#[test]
fn the_hash_of_a_client_comes_in_many_spellings() {
    let hashing = |more: Value| {
        let mut object =
            json!({"name": "W", "destination_port": 80, "backends": "192.0.2.1", "mode": "hash"});
        let attributes = object.as_object_mut().unwrap();
        attributes.extend(more.as_object().unwrap().clone());
        let request = Request::from_json(attributes.clone()).unwrap();
        request.balancers()[0].hashing
    };
    let given = hashing(json!({}));
    assert_eq!(
        (
            given.key,
            given.seed,
            given.prefix(Family::Ipv4),
            given.prefix(Family::Ipv6)
        ),
        (HashKey::Source, 0, 32, 64)
    );
    let given = hashing(
        json!({"hash_key": "connection", "hash_seed": "4294967295", "hash_prefix": "{\"ipv4\": \"24\"}"}),
    );
    assert_eq!(
        (
            given.key,
            given.seed,
            given.prefix(Family::Ipv4),
            given.prefix(Family::Ipv6)
        ),
        (HashKey::Connection, u32::MAX, 24, 64)
    );
    let given = hashing(json!({"hash_prefix": {"ipv4": null, "ipv6": 48}}));
    assert_eq!(
        (given.prefix(Family::Ipv4), given.prefix(Family::Ipv6)),
        (32, 48)
    );
}

/// The words of other programs lead to ours.
#[test]
fn familiar_words_of_other_programs_lead_to_the_way_out() {
    let refused = |more: Value, message: &str| {
        let mut object = json!({"name": "W", "destination_port": 80, "backends": "192.0.2.1"});
        object
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        let error = Request::from_json(object.as_object().unwrap().clone()).unwrap_err();
        assert_eq!(error.to_string(), message);
    };
    refused(
        json!({"port": 80}),
        "port: there is no such attribute; it is called `destination_port` here",
    );
    refused(
        json!({"servers": []}),
        "servers: there is no such attribute; it is called `backends` here",
    );
    refused(
        json!({"backends": [{"host": "192.0.2.1", "address": "192.0.2.1"}]}),
        "backends[0].host: there is no such attribute; it is called `address` here",
    );
    for word in ["round-robin", "roundrobin", "rr", "WRR", "round robin"] {
        refused(
            json!({"mode": word}),
            &format!(
                "mode: `{word}` is not one of: nth, random, hash; round robin, with weights, is `nth`"
            ),
        );
    }
    refused(
        json!({"mode": "source"}),
        "mode: `source` is not one of: nth, random, hash; the same backend for the same client is `hash`",
    );
    refused(
        json!({"mode": "least_conn"}),
        "mode: `least_conn` is not one of: nth, random, hash; iptables does not count a backend's connections; the nearest is `nth`",
    );
    refused(
        json!({"backends": ["http://192.0.2.1"]}),
        "backends[0]: `http://192.0.2.1` is a URL; a backend is HOST[:PORT]",
    );
    refused(
        json!({"backends": [{"address": "tcp://192.0.2.1"}]}),
        "backends[0].address: `tcp://192.0.2.1` is a URL; give its host here, and its port as `port`",
    );
    let whole = "the same proportions in whole weights are";
    refused(
        json!({"backends": ["192.0.2.1 weight=0.5", "192.0.2.2"]}),
        &format!("backends[0].weight: `0.5` is not a whole number; {whole} 1, 2"),
    );
    refused(
        json!({"backends": [{"address": "192.0.2.1", "weight": 0.25}, {"address": "192.0.2.2", "weight": "1.5"}, "192.0.2.3 weight=0"]}),
        &format!(
            "backends[0].weight: `0.25` is not a whole number; {whole} 1, 6, 0; backends[1].weight: `1.5` is not a whole number"
        ),
    );
    refused(
        json!({"backends": ["192.0.2.1 weight=1e3"]}),
        "backends[0].weight: `1e3` is not a whole number",
    );
}

#[test]
fn several_mistakes_are_named_at_once_up_to_five() {
    let error = |request: Value| {
        let object = request.as_object().unwrap().clone();
        Request::from_json(object).unwrap_err().to_string()
    };
    assert_eq!(
        error(
            json!({"name": "W", "prot": "tcp", "mode": "fair", "destination_port": [80, 0, "x"], "backends": ["192.0.2.300", "192.0.2.1:0 weight=-1"]})
        ),
        "prot: there is no such attribute; the nearest is `protocol`; \
         backends[0].address: `192.0.2.300` is neither an IP address nor a hostname; \
         backends[1].weight: `-1` is not between 0 and 2147483647; mode: `fair` is not one of: nth, random, hash; \
         destination_port[1]: `0` is not between 1 and 65535; and 1 more"
    );
    assert_eq!(
        error(json!({"state": "present"})),
        "name: is missing; it names the chain; backends: is missing; it lists the servers; \
         destination_port: is missing; it says what is balanced, and \"0:65535\" is every port"
    );
    let many: Vec<String> = (0..9).map(|n| format!("192.0.2.{n}:0")).collect();
    let message = error(json!({"name": "W", "destination_port": 80, "backends": many}));
    assert_eq!(message.matches("backends[").count(), 5, "{message}");
    assert!(message.ends_with("; and 4 more"), "{message}");
}

/// `fd00::1:80` is an address without a port.
#[test]
fn an_ipv6_address_that_ends_like_a_port_is_warned_of() {
    let warnings = |backends: Value| {
        let object = json!({"name": "W", "destination_port": 80, "backends": backends});
        let request = Request::from_json(object.as_object().unwrap().clone()).unwrap();
        request.warnings
    };
    assert_eq!(
        warnings(json!(["[fd00::2]:80", "fd00::1:80 weight=2"])),
        [
            "backends[1]: `fd00::1:80` is an address without a port; if 80 is meant as its port, write `[fd00::1]:80`"
        ]
    );
    for fine in [
        json!(["fd00::1:80", "fd00::2"]),
        json!(["[fd00::1:80]", "[fd00::2]:80"]),
        json!(["fd00::80", "[fd00::2]:80"]),
        json!(["fd00::1:ab", "[fd00::2]:80"]),
        json!(["2001:db8:0:0:0:0:1:80", "[fd00::2]:80"]),
        json!([{"address": "fd00::1:80", "port": 80}]),
    ] {
        assert_eq!(warnings(fine.clone()), [""; 0], "{fine}");
    }
}
