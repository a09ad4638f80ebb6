//! Sets of balancers.

use super::*;

fn set(attributes: &Value, balancers: &Value) -> Result<Request, BadRequest> {
    let mut request = json!({"name": "EDGE", "balancers": balancers});
    let Value::Object(attributes) = attributes.clone() else {
        panic!("not an object")
    };
    request.as_object_mut().unwrap().extend(attributes);
    parse(request)
}

fn web() -> Value {
    json!({"name": "web", "destination_port": [80, 443], "backends": ["10.9.0.1", "10.9.0.2 weight=2"]})
}

fn dns() -> Value {
    json!({"name": "dns", "protocol": "udp", "destination_port": 53, "backends": ["10.9.0.5"]})
}

/// Defaults about a hash are for the balancers that decide by one.
#[test]
fn a_hash_may_be_a_default_and_serve_some_balancers() {
    let mut dns = dns();
    dns["mode"] = json!("hash");
    dns["hash_seed"] = json!(9);
    let defaults = json!({"hash_key": "connection", "hash_seed": 3});
    let request = set(&defaults, &json!([web(), dns])).unwrap();
    let hashing = |at: usize| request.balancers()[at].hashing;
    assert_eq!(hashing(0), Hashing::default());
    assert_eq!((hashing(1).key, hashing(1).seed), (HashKey::Connection, 9));
    refused(
        &json!({"hash_seed": "x"}),
        &json!([web()]),
        "hash_seed: `x` is not a whole number",
    );
    let mut web = web();
    web["hash_seed"] = json!(1);
    refused(
        &json!({}),
        &json!([web]),
        "balancers[0].hash_seed: is for `mode: hash`, and the mode is `nth`; say `mode: hash`, or leave it out",
    );
}

#[track_caller]
fn refused(attributes: &Value, balancers: &Value, expected: &str) {
    let error = set(attributes, balancers)
        .expect_err("accepted")
        .to_string();
    assert_eq!(error, expected);
}

#[test]
fn a_balancer_has_its_own_attributes_and_the_defaults_of_the_set() {
    let mut dns = dns();
    dns["forward"] = json!("no");
    dns["disconnect"] = json!("never");
    let defaults = json!({
        "mode": "random", "forward": true, "masquerade": "balanced", "disconnect": "always",
        "ip_forward": true, "jump": "insert",
    });
    let request = set(&defaults, &json!([web(), dns])).unwrap();
    let [web, dns] = request.balancers() else {
        panic!("{request:?}")
    };
    assert_eq!(
        (web.chain.as_str(), dns.chain.as_str()),
        ("EDGE/web", "EDGE/dns")
    );
    assert_eq!(web.name.as_deref(), Some("web"));
    assert_eq!((web.mode, dns.mode), (Mode::Random, Mode::Random));
    assert_eq!((web.protocol, dns.protocol), (Protocol::Tcp, Protocol::Udp));
    assert!(web.gateway.forward && !dns.gateway.forward);
    assert!(web.gateway.masquerade.is_some() && dns.gateway.ip_forward);
    assert_eq!(
        (web.disconnect, dns.disconnect),
        (Disconnect::Always, Disconnect::Never)
    );
    assert_eq!((web.jump, dns.jump), (Jump::Insert, Jump::Insert));
    assert_eq!(web.pools[0].backends[1].weight, 2);
}

#[test]
fn all_forms_of_the_list_are_the_same_set() {
    let list = json!([web(), dns()]);
    let expected = set(&json!({}), &list).unwrap();
    let texts = json!([web().to_string(), dns().to_string()]);
    for form in [
        json!(list.to_string()),
        json!({"1": dns(), "0": web()}),
        json!(json!({"1": dns(), "0": web()}).to_string()),
        texts,
    ] {
        assert_eq!(set(&json!({}), &form).unwrap(), expected, "{form}");
    }
    assert!(set(&json!({}), &json!([])).unwrap().balancers().is_empty());
}

#[test]
fn an_error_names_the_balancer_and_its_item() {
    let mut wrong = web();
    wrong["backends"][0] = json!({"address": "10.9.0.1", "weight": -1});
    refused(
        &json!({}),
        &json!([dns(), wrong]),
        "balancers[1].backends[0].weight: `-1` is not between 0 and 2147483647",
    );
    let mut unknown = web();
    unknown["port"] = json!(80);
    unknown["state"] = json!("absent");
    refused(
        &json!({}),
        &json!([unknown]),
        "balancers[0].state: belongs to the whole set; give it beside `balancers`; \
         balancers[0].port: there is no such attribute; it is called `destination_port` here",
    );
    refused(
        &json!({}),
        &json!([web(), web()]),
        "balancers[1].name: `web` is the name of balancers[0] too",
    );
    refused(
        &json!({}),
        &json!([{"destination_port": 80, "backends": []}]),
        "balancers[0].name: is missing; each balancer of a set has a name",
    );
    refused(
        &json!({}),
        &json!([{"name": "a-name-of-16-chars", "destination_port": 80, "backends": []}]),
        "balancers[0].name: `a-name-of-16-chars` is not 1 to 15 of A-Z a-z 0-9 _ . -; `EDGE/` and the name have at most 20 characters",
    );
    refused(
        &json!({}),
        &json!([{"name": "web"}, 7]),
        "balancers[0].backends: is missing; it lists the servers; balancers[0].destination_port: is missing; it says what is balanced, \
         and \"0:65535\" is every port; balancers[1]: is not an object {name, destination_port, backends, ...}",
    );
    refused(
        &json!({"backends": "10.9.0.1"}),
        &json!([web()]),
        "backends: stands beside `balancers`; give it to each balancer instead",
    );
}

#[test]
fn a_wrong_default_is_named_once() {
    refused(
        &json!({"mode": "fair"}),
        &json!([web(), dns()]),
        "mode: `fair` is not one of: nth, random, hash",
    );
    refused(
        &json!({"disconnect": "maybe", "layout": "round"}),
        &json!([web()]),
        "disconnect: `maybe` is not one of: udp, always, never; layout: `round` is not one of: auto, flat, tree",
    );
}

#[test]
fn defaults_need_not_fit_a_balancer_that_does_not_use_them() {
    let mut own = web();
    own["masquerade"] = json!(true);
    let defaults = json!({"snat_address": ["10.8.0.1", "fd08::1"], "out_interface": "lan0"});
    let request = set(&defaults, &json!([own, dns()])).unwrap();
    let masquerade = request.balancers()[0].gateway.masquerade.as_ref().unwrap();
    assert_eq!(masquerade.addresses.len(), 1);
    assert_eq!(masquerade.out_interface.as_deref(), Some("lan0"));
    assert_eq!(request.balancers()[1].gateway.masquerade, None);
    let both = json!({"destination": ["192.0.2.1", "2001:db8::1"]});
    let request = set(&both, &json!([web()])).unwrap();
    let Destination::Networks(networks) = &request.balancers()[0].destination else {
        panic!("{request:?}")
    };
    assert_eq!(networks.len(), 1);
}

#[test]
fn equal_claims_are_an_error_and_partial_ones_a_warning() {
    let named = |name: &str, more: &Value| {
        let mut balancer = web();
        balancer["name"] = json!(name);
        balancer
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        balancer
    };
    refused(
        &json!({}),
        &json!([
            web(),
            dns(),
            named("shop", &json!({"destination_port": "443,80"}))
        ]),
        "balancers[2]: `shop` claims the same traffic as `web`, balancers[0]; say with `destination_port`, `destination`, \
         `source` or `in_interface` which is whose",
    );
    let warnings = |balancers: Value| set(&json!({}), &balancers).unwrap().warnings;
    let wide = named("rest", &json!({"destination_port": "1:65535"}));
    assert_eq!(
        warnings(json!([
            web(),
            named("api", &json!({"destination_port": 8080})),
            wide
        ])),
        [
            "balancer `rest`: it claims traffic that `web` and `api` claim too; the first one listed gets it"
        ]
    );
    for apart in [
        json!({"destination_port": 81}),
        json!({"protocol": "udp"}),
        json!({"backends": "fd09::1"}),
    ] {
        assert_eq!(
            warnings(json!([web(), named("b", &apart)])),
            Vec::<String>::new(),
            "{apart}"
        );
    }
    let at = |name: &str, more: Value| named(name, &more);
    for pair in [
        json!([
            at("a", json!({"destination": "192.0.2.1"})),
            at("b", json!({"destination": "192.0.2.2"}))
        ]),
        json!([
            at("a", json!({"in_interface": "eth0"})),
            at("b", json!({"in_interface": "eth1"}))
        ]),
        json!([
            at("a", json!({"source": "10.0.0.0/9"})),
            at("b", json!({"source": "10.128.0.0/9"}))
        ]),
    ] {
        assert_eq!(warnings(pair.clone()), Vec::<String>::new(), "{pair}");
    }
}

#[test]
fn absent_checks_the_balancers_too() {
    let request = set(&json!({"state": "absent"}), &json!([web()])).unwrap();
    assert!(request.is_absent());
    refused(
        &json!({"state": "absent"}),
        &json!([{"name": "web", "mode": "fair"}]),
        "balancers[0].mode: `fair` is not one of: nth, random, hash",
    );
}
