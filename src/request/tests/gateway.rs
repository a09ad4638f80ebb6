//! Tests of the gateway around the chain, of empty pools, and of names.

use super::*;

fn gateway_of(attributes: Value) -> Gateway {
    balancer(attributes).gateway
}

#[test]
fn the_gateway_is_off_by_default() {
    let gateway = gateway_of(json!({}));
    assert_eq!(
        (gateway.local_traffic, gateway.forward, gateway.ip_forward),
        (false, false, false)
    );
    assert_eq!(gateway.masquerade, None);
    assert_eq!(gateway.when_empty, WhenEmpty::Reject);
    let request = with(json!({})).unwrap();
    assert_eq!(
        (request.disconnect, request.persist),
        (Disconnect::Udp, Persist::No)
    );
    assert_eq!(gateway_of(json!({"masquerade": "no"})), gateway);
    assert_eq!(
        gateway_of(json!({"masquerade": false, "forward": "off"})),
        gateway
    );
}

#[test]
fn masquerade_comes_in_every_spelling() {
    for balanced in [json!(true), json!("yes"), json!("balanced"), json!("1")] {
        let masquerade = gateway_of(json!({"masquerade": balanced})).masquerade;
        assert!(!masquerade.unwrap().all);
    }
    let all = gateway_of(json!({
        "masquerade": "all", "out_interface": "eth0", "backends": "192.0.2.1,fd00::1", "snat_address": "198.51.100.1,fd00::fe",
    }));
    let all = all.masquerade.unwrap();
    assert!(all.all);
    assert_eq!(all.out_interface.as_deref(), Some("eth0"));
    assert_eq!(all.addresses[&Family::Ipv6].to_string(), "fd00::fe");
}

#[test]
fn persist_is_a_flag_a_path_or_a_path_for_each_family() {
    let persist = |value: Value| with(json!({"persist": value})).unwrap().persist;
    assert_eq!(persist(json!("yes")), Persist::Found);
    assert_eq!(persist(json!("no")), Persist::No);
    assert_eq!(persist(json!("/a b")), Persist::Path("/a b".into()));
    let paths = Persist::Paths([(Family::Ipv4, "/a".into())].into());
    assert_eq!(persist(json!({"ipv4": "/a", "ipv6": null})), paths);
    assert_eq!(persist(json!("{\"ipv4\": \"/a\"}")), paths);
}

#[test]
fn contradicting_attributes_are_errors() {
    let both = "192.0.2.1,fd00::1";
    for (attributes, expected) in [
        (
            json!({"snat_address": "192.0.2.9"}),
            "snat_address: is the address of `masquerade`, which is `no`; say `masquerade: balanced`, or leave it out",
        ),
        (
            json!({"out_interface": "eth0"}),
            "out_interface: restricts `masquerade`, which is `no`; say `masquerade: balanced`, or leave it out",
        ),
        (
            json!({"masquerade": "all"}),
            "out_interface: is missing; `masquerade: all` needs it",
        ),
        (
            json!({"masquerade": true, "snat_address": "fd00::9"}),
            "snat_address[0]: `fd00::9` is IPv6, but no backend is; add one or leave it out",
        ),
        (
            json!({"masquerade": true, "snat_address": "192.0.2.9", "backends": both}),
            "snat_address: names no IPv6 address, but there are IPv6 backends; name one, or leave those backends out",
        ),
        (
            json!({"masquerade": true, "snat_address": "192.0.2.9,192.0.2.8"}),
            "snat_address[1]: `192.0.2.8` is the second address of its family; one for each is used",
        ),
        (
            json!({"masquerade": true, "snat_address": "0.0.0.0"}),
            "snat_address[0]: `0.0.0.0` is no address that a connection can come from",
        ),
        (
            json!({"persist": "/a", "backends": both}),
            "persist: one path serves one family, and both are in use; give {ipv4: path, ipv6: path}",
        ),
        (
            json!({"persist": {"ipv4": "/a"}, "backends": both}),
            "persist.ipv6: is missing; IPv6 is in use too",
        ),
        (
            json!({"persist": {"ipv4": "/a", "ipv6": "/a"}}),
            "persist.ipv6: `/a` is the file of the other family too; each needs its own",
        ),
        (
            json!({"persist": {"ipv5": "/a"}}),
            "persist.ipv5: is neither `ipv4` nor `ipv6`",
        ),
        (
            json!({"persist": "rules.v4"}),
            "persist: `rules.v4` is neither a boolean, an absolute path, nor {ipv4: path, ipv6: path}",
        ),
    ] {
        assert_eq!(message(attributes), expected);
    }
}

#[test]
fn an_empty_pool_is_of_the_families_that_are_named() {
    let families = |attributes: Value| {
        let pools = balancer(attributes).pools;
        assert!(pools.iter().all(|pool| pool.arrangement.chains.len() == 1));
        let empty = |pool: &Pool| (pool.family, pool.is_empty());
        pools.iter().map(empty).collect::<Vec<_>>()
    };
    let (v4, v6) = (Family::Ipv4, Family::Ipv6);
    assert_eq!(families(json!({"backends": []})), [(v4, true), (v6, true)]);
    assert_eq!(
        families(json!({"backends": "", "destination": "fd00::9"})),
        [(v6, true)]
    );
    assert_eq!(
        families(json!({"backends": "192.0.2.1 weight=0"})),
        [(v4, true)]
    );
    assert_eq!(
        families(json!({"backends": "192.0.2.1, fd00::1 weight=0"})),
        [(v4, false), (v6, true)]
    );
}

/// The backends of a request with names, which have these addresses.
fn resolved(attributes: &Value) -> Result<Vec<(String, u32)>, String> {
    let lookup = |name: &str| match name {
        "one.example" => Ok(vec!["192.0.2.1".parse().unwrap()]),
        "two.example" => Ok(["192.0.2.12", "192.0.2.11"]
            .map(|text| text.parse().unwrap())
            .to_vec()),
        "both.example" => Ok(["fd00::2", "192.0.2.2", "fd00::1"]
            .map(|text| text.parse().unwrap())
            .to_vec()),
        "nowhere.example" => Ok(vec!["0.0.0.0".parse().unwrap()]),
        _ => Err("Name or service not known".to_owned()),
    };
    let mut request = json!({"name": "W", "destination_port": 80});
    let object = request.as_object_mut().unwrap();
    object.extend(attributes.as_object().unwrap().clone());
    let draft = UncheckedRequest::from_json(object.clone()).map_err(|error| error.to_string())?;
    draft.check().map_err(|error| error.to_string())?;
    let request = draft.resolve(&lookup).map_err(|error| error.to_string())?;
    let pools = &request.balancers()[0].pools;
    let backends = pools.iter().flat_map(|pool| &pool.backends);
    Ok(backends
        .map(|backend| (backend.endpoint.address.to_string(), backend.weight))
        .collect())
}

#[test]
fn a_names_weight_is_shared_among_its_addresses() {
    let pairs = |attributes: Value| resolved(&attributes).unwrap();
    let backends = |list: &[(&str, u32)]| -> Vec<(String, u32)> {
        list.iter()
            .map(|(address, weight)| ((*address).to_owned(), *weight))
            .collect()
    };
    assert_eq!(
        pairs(json!({"backends": ["two.example:80 weight=3", "One.Example."]})),
        backends(&[("192.0.2.11", 3), ("192.0.2.12", 3), ("192.0.2.1", 2)])
    );
    assert_eq!(
        pairs(json!({"backends": ["two.example weight=4", "one.example"]})),
        backends(&[("192.0.2.11", 2), ("192.0.2.12", 2), ("192.0.2.1", 1)])
    );
    assert_eq!(
        pairs(json!({"backends": "both.example"})),
        backends(&[("192.0.2.2", 1), ("fd00::1", 1), ("fd00::2", 1)])
    );
    assert_eq!(
        pairs(json!({"backends": "both.example", "destination": "192.0.2.99"})),
        backends(&[("192.0.2.2", 1)])
    );
    assert_eq!(
        pairs(json!({"backends": ["192.0.2.1", {"address": "one.example", "weight": 2}]})),
        backends(&[("192.0.2.1", 3)])
    );
}

#[test]
fn a_name_without_an_address_in_use_is_an_error() {
    for (backends, expected) in [
        (
            json!(["192.0.2.1", "none.example"]),
            "backends[1].address: `none.example` does not resolve: Name or service not known",
        ),
        (
            json!("one.example, fd00::1"),
            "backends[0].address: `one.example` has no IPv6 address, and no other is in use",
        ),
        (
            json!("nowhere.example"),
            "backends[0].address: `nowhere.example` resolves to 0.0.0.0, which is the unspecified address, to which nothing can be sent",
        ),
        (
            json!("one.example, one.example"),
            "backends[1]: is the same address and port as backends[0]; list it once, with the sum of the weights",
        ),
    ] {
        let error = resolved(&json!({"backends": backends})).err();
        let error = error.unwrap_or_default();
        assert_eq!(error, expected);
    }
    let error = resolved(
        &json!({"backends": "two.example weight=2147483647, one.example weight=2147483647"}),
    );
    assert_eq!(
        error.unwrap_err(),
        "backends[1].weight: cannot be shared evenly among the addresses of the names in the list; \
         take weights that their numbers of addresses divide"
    );
}
