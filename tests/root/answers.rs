//! Answers that do not come back through the gateway: the connections fail, a warning says
//! so before, and its way out works.

use serde_json::{Value, json};

use crate::fronts::Front;
use crate::gateway::ask;
use crate::lab::{Namespace, VARIANTS, add_address, link};

/// A gateway with one interface in the network 10.9.0.0/24, where a router, a client and
/// servers are too, and clients and servers behind the router.
///
/// ```text
/// client 10.8.0.2 -- router -- servers 10.7.0.1, 10.7.0.2
///                      |
///   10.9.0.0/24: router .253, gateway .254, client .100, servers .1, .2
/// ```
struct Roundabout {
    router: Namespace,
    gateway: Namespace,
    near_client: Namespace,
    far_client: Namespace,
    near_servers: Namespace,
    far_servers: Namespace,
}

const NEAR: [&str; 4] = ["10.9.0.1", "10.9.0.2", "fd09::1", "fd09::2"];
const FAR: [&str; 4] = ["10.7.0.1", "10.7.0.2", "fd07::1", "fd07::2"];
const BALANCED: [&str; 2] = ["10.9.0.254:5308", "[fd09::fe]:5308"];
const NEAR_CLIENTS: [&str; 2] = ["10.9.0.0/24", "fd09::/64"];
const FAR_CLIENTS: [&str; 2] = ["10.8.0.0/24", "fd08::/64"];

impl Roundabout {
    fn new() -> Self {
        let mut lab = Self {
            router: Namespace::new("r"),
            gateway: Namespace::new("g"),
            near_client: Namespace::new("n"),
            far_client: Namespace::new("f"),
            near_servers: Namespace::new("s"),
            far_servers: Namespace::new("t"),
        };
        let router = &lab.router;
        router.run(&["ip", "link", "add", "net", "type", "bridge"]);
        router.run(&["ip", "link", "set", "net", "up"]);
        addresses(router, "net", &["10.9.0.253/24", "fd09::fd/64"]);
        for (namespace, device, port) in [
            (&lab.gateway, "edge", "gateway"),
            (&lab.near_client, "wan", "client"),
            (&lab.near_servers, "lan", "servers"),
        ] {
            link(namespace, device, router, port);
            router.run(&["ip", "link", "set", port, "master", "net"]);
        }
        link(&lab.far_client, "wan", router, "clients");
        link(&lab.far_servers, "lan", router, "farm");
        addresses(router, "clients", &["10.8.0.1/24", "fd08::1/64"]);
        addresses(router, "farm", &["10.7.0.254/24", "fd07::fe/64"]);
        addresses(&lab.gateway, "edge", &["10.9.0.254/24", "fd09::fe/64"]);
        addresses(&lab.near_client, "wan", &["10.9.0.100/24", "fd09::100/64"]);
        addresses(&lab.far_client, "wan", &["10.8.0.2/24", "fd08::2/64"]);
        for (servers, all) in [(&lab.near_servers, NEAR), (&lab.far_servers, FAR)] {
            let with_length = |address: &str| match address.contains(':') {
                true => format!("{address}/64"),
                false => format!("{address}/24"),
            };
            all.map(with_length)
                .iter()
                .for_each(|address| add_address(servers, "lan", address));
        }
        for (namespace, routers) in [
            (&lab.gateway, ["10.9.0.253", "fd09::fd"]),
            (&lab.near_client, ["10.9.0.253", "fd09::fd"]),
            (&lab.near_servers, ["10.9.0.253", "fd09::fd"]),
            (&lab.far_client, ["10.8.0.1", "fd08::1"]),
            (&lab.far_servers, ["10.7.0.254", "fd07::fe"]),
        ] {
            default_routes(namespace, routers);
        }
        for host in [
            &lab.near_client,
            &lab.far_client,
            &lab.near_servers,
            &lab.far_servers,
        ] {
            host.forward(false);
        }
        let endpoints = |all: [&str; 4]| {
            all.map(|address| match address.contains(':') {
                true => format!("[{address}]:5308"),
                false => format!("{address}:5308"),
            })
        };
        for (servers, all) in [(&mut lab.near_servers, NEAR), (&mut lab.far_servers, FAR)] {
            let endpoints = endpoints(all);
            servers.serve("tcp", &endpoints.each_ref().map(String::as_str));
        }
        lab
    }

    /// A request that is carried out; returns its warnings, which a check gives too, and a
    /// run with nothing to do does not.
    fn told(&self, request: &Value) -> Vec<String> {
        let mut check = request.clone();
        check["check"] = json!(true);
        let checked = warnings(&self.gateway.apply(&check));
        let applied = self.gateway.apply(request);
        assert_eq!(applied["changed"], json!(true), "{applied}");
        assert_eq!(warnings(&applied), checked, "{request}");
        assert_eq!(warnings(&self.gateway.apply(request)), [""; 0], "{request}");
        assert_eq!(warnings(&self.gateway.apply(&check)), checked, "{request}");
        checked
    }

    fn forget(&self, variant: &str) {
        let absent = json!({"name": "W", "variant": variant, "state": "absent"});
        self.gateway.apply(&absent);
    }
}

fn addresses(namespace: &Namespace, device: &str, all: &[&str]) {
    all.iter()
        .for_each(|address| add_address(namespace, device, address));
}

fn default_routes(namespace: &Namespace, routers: [&str; 2]) {
    routers.iter().for_each(|router| {
        namespace.run(&["ip", "route", "replace", "default", "via", router]);
    });
}

fn balancer(variant: &str, backends: [&str; 4], more: &Value) -> Value {
    let mut request = json!({
        "name": "W", "variant": variant, "destination_port": 5308, "backends": backends,
    });
    let object = request.as_object_mut().unwrap();
    object.extend(more.as_object().unwrap().clone());
    request
}

fn warnings(result: &Value) -> Vec<String> {
    let warnings = result["warnings"].as_array().unwrap().iter();
    warnings
        .map(|text| text.as_str().unwrap().to_owned())
        .collect()
}

/// Clients get an answer of a backend, or none, in both families.
fn assert_answered(client: &Namespace, is_answered: bool, backends: [&str; 4], why: &str) {
    for (target, backends) in BALANCED.iter().zip(backends.chunks(2)) {
        let answers = ask(client, "tcp", target, &[]);
        let expected = match is_answered {
            true => backends.to_vec(),
            false => vec!["TimeoutError"; 2],
        };
        assert_eq!(answers, expected, "{why} {target}");
    }
}

/// One warning for each family, about both backends.
fn assert_warned(told: &[String], backends: [&str; 4], part: &str) {
    assert_eq!(told.len(), 2, "{told:?}");
    for (text, backends) in told.iter().zip(backends.chunks(2)) {
        let listed = format!("`{}` and `{}`", backends[0], backends[1]);
        assert!(text.starts_with("backends: "), "{text}");
        assert!(text.contains(&listed), "{text}");
        assert!(text.contains(part), "{text}");
    }
}

const NEIGHBOURS: &str = "are neighbours in ";
const THEIR_ROUTES: &str = "unless the default route of the backends leads here";
const ROUTER: &str = " answer over the router ";

#[test]
fn answers_that_pass_the_gateway_by_are_warned_of_and_the_way_out_works() {
    let lab = Roundabout::new();
    for variant in VARIANTS {
        for (client, backends, more, part) in [
            (
                &lab.near_client,
                NEAR,
                json!({"source": NEAR_CLIENTS}),
                NEIGHBOURS,
            ),
            (&lab.near_client, NEAR, json!({}), THEIR_ROUTES),
            (
                &lab.far_client,
                NEAR,
                json!({"source": FAR_CLIENTS}),
                THEIR_ROUTES,
            ),
            (
                &lab.far_client,
                NEAR,
                json!({"in_interface": "edge"}),
                THEIR_ROUTES,
            ),
            (&lab.far_client, FAR, json!({"source": FAR_CLIENTS}), ROUTER),
            (&lab.near_client, FAR, json!({}), ROUTER),
        ] {
            let why = format!("{variant} {more} {backends:?}");
            let told = lab.told(&balancer(variant, backends, &more));
            assert_warned(&told, backends, part);
            assert_warned(&told, backends, "`masquerade: balanced` brings them back");
            assert_answered(client, false, backends, &why);

            lab.forget(variant);
            let mut with = more.clone();
            with["masquerade"] = json!("balanced");
            let told = lab.told(&balancer(variant, backends, &with));
            assert_eq!(told, [""; 0], "{why}");
            assert_answered(client, true, backends, &why);
            lab.forget(variant);
        }
    }
}
