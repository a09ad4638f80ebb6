//! Answers that do not come back through the gateway: the connections fail, a warning says
//! so before, and its way out works.

use std::fs;

use serde_json::{Value, json};

use crate::fronts::Front;
use crate::lab::{Lab, Namespace, VARIANTS, add_address, link};
use crate::neighbours::warnings;

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

    /// The warnings of a check.
    fn foretold(&self, request: &Value) -> Vec<String> {
        let mut check = request.clone();
        check["check"] = json!(true);
        warnings(&self.gateway.apply(&check))
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

/// A client gets the answer of a backend, or none, in both families.
fn assert_answered(client: &Namespace, is_answered: bool, backends: [&str; 4], why: &str) {
    let lab = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/lab.py");
    for (target, backends) in BALANCED.iter().zip(backends.chunks(2)) {
        let (count, patience) = match is_answered {
            true => ("2", "10"),
            false => ("1", "0.3"),
        };
        let arguments = [lab, "ask", "tcp", target, count, "--timeout", patience];
        let answers = client.run(&[&["python3"], &arguments[..]].concat());
        let mut answers: Vec<&str> = answers.lines().collect();
        answers.sort_unstable();
        let expected = match is_answered {
            true => backends,
            false => &["TimeoutError"],
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

#[test]
fn a_default_route_through_the_gateway_is_the_other_way_out() {
    let lab = Roundabout::new();
    for variant in VARIANTS {
        let request = balancer(variant, NEAR, &json!({"source": FAR_CLIENTS}));
        default_routes(&lab.near_servers, ["10.9.0.253", "fd09::fd"]);
        assert_warned(&lab.told(&request), NEAR, THEIR_ROUTES);
        assert_answered(&lab.far_client, false, NEAR, variant);
        default_routes(&lab.near_servers, ["10.9.0.254", "fd09::fe"]);
        assert_answered(&lab.far_client, true, NEAR, variant);
        lab.forget(variant);
    }
}

#[test]
fn rules_that_rewrite_the_source_already_are_no_reason_to_warn() {
    let lab = Roundabout::new();
    for variant in VARIANTS {
        let client = &lab.near_client;
        let request = balancer(variant, FAR, &json!({}));
        for (rule, is_rewritten) in [
            ("-o edge -j MASQUERADE", true),
            ("-p tcp -j THEIRS", true),
            ("! -o edge -j MASQUERADE", false),
            ("-p tcp -m tcp --dport 5309 -j MASQUERADE", false),
        ] {
            post_routing(&lab.gateway, variant, rule);
            let told = lab.told(&request);
            match is_rewritten {
                true => assert_eq!(told, [""; 0], "{variant} {rule}"),
                false => assert_warned(&told, FAR, ROUTER),
            }
            assert_answered(client, is_rewritten, FAR, &format!("{variant} {rule}"));
            lab.forget(variant);
        }
        for (rule, may_rewrite) in [
            ("-m mark --mark 0x1 -j MASQUERADE", true),
            ("-o other -j MASQUERADE", false),
            ("-p udp -j THEIRS", false),
            ("-m addrtype --src-type LOCAL -j MASQUERADE", false),
        ] {
            post_routing(&lab.gateway, variant, rule);
            match lab.foretold(&request).as_slice() {
                [] => assert!(may_rewrite, "{variant} {rule}"),
                told => {
                    assert!(!may_rewrite, "{variant} {rule}");
                    assert_warned(told, FAR, ROUTER);
                }
            }
        }
        let near = balancer(variant, FAR, &json!({"source": NEAR_CLIENTS}));
        for (networks, rule, may_rewrite) in [
            (["10.7.0.0/24", "fd07::/64"], "-d NET -j MASQUERADE", true),
            (["10.9.0.0/24", "fd09::/64"], "! -d NET -j MASQUERADE", true),
            (["10.9.0.0/24", "fd09::/64"], "-s NET -j MASQUERADE", true),
            (["10.9.0.0/24", "fd09::/64"], "-d NET -j MASQUERADE", false),
            (
                ["10.7.0.0/24", "fd07::/64"],
                "! -d NET -j MASQUERADE",
                false,
            ),
            (["10.8.0.0/24", "fd08::/64"], "-s NET -j MASQUERADE", false),
        ] {
            for (program, network) in PROGRAMS.iter().zip(networks) {
                post_routing_of(
                    &lab.gateway,
                    program,
                    variant,
                    &rule.replace("NET", network),
                );
            }
            match lab.foretold(&near).as_slice() {
                [] => assert!(may_rewrite, "{variant} {rule} {networks:?}"),
                told => {
                    assert!(!may_rewrite, "{variant} {rule} {networks:?}");
                    assert_warned(told, FAR, ROUTER);
                }
            }
        }
        post_routing(&lab.gateway, variant, "-o other -j MASQUERADE");

        // Our own rules: everything that leaves by the interface, or by another one.
        let all = json!({"masquerade": "all", "out_interface": "edge"});
        assert_eq!(lab.told(&balancer(variant, FAR, &all)), [""; 0]);
        assert_answered(client, true, FAR, variant);
        lab.forget(variant);
        let other = json!({"masquerade": "balanced", "out_interface": "other"});
        let told = lab.told(&balancer(variant, FAR, &other));
        assert_warned(
            &told,
            FAR,
            "`masquerade` rewrites only what leaves by `other`",
        );
        assert_answered(client, false, FAR, variant);
        lab.forget(variant);

        // Rules of the other variant may do it; they are warned of themselves.
        post_routing(&lab.gateway, variant, "-j MASQUERADE");
        let mut request = request;
        request["variant"] = json!(VARIANTS.iter().find(|other| **other != variant));
        let told = warnings(&lab.gateway.apply(&request));
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(
            told[0].starts_with(&format!("there are rules of iptables-{variant} too")),
            "{told:?}"
        );
        assert_answered(client, true, FAR, variant);
        lab.forget(request["variant"].as_str().unwrap());
        post_routing(&lab.gateway, variant, "");
    }
}

const PROGRAMS: [&str; 2] = ["iptables", "ip6tables"];

/// The only rule of both families that stands in POSTROUTING, or none.
fn post_routing(gateway: &Namespace, variant: &str, rule: &str) {
    for program in PROGRAMS {
        post_routing_of(gateway, program, variant, rule);
    }
}

fn post_routing_of(gateway: &Namespace, program: &str, variant: &str, rule: &str) {
    let theirs = match rule {
        "" => "",
        _ => ":THEIRS - [0:0]\n-A THEIRS -j MASQUERADE\n",
    };
    let rule = match rule {
        "" => String::new(),
        rule => format!("-A POSTROUTING {rule}\n"),
    };
    let text = format!("*nat\n:POSTROUTING ACCEPT [0:0]\n{theirs}{rule}COMMIT\n");
    let program = format!("{program}-{variant}-restore");
    let output = gateway.feed(&[&program, "-w", "10"], &text);
    assert!(output.status.success(), "{output:?}");
}

/// Rules that `nft` made are in no dump of iptables.
#[test]
fn rules_of_nft_that_rewrite_the_source_are_no_reason_to_warn() {
    let lab = Roundabout::new();
    let own = "add table inet own; add chain inet own post { type nat hook postrouting priority srcnat; }; \
               add chain inet own pre { type nat hook prerouting priority dstnat; }; ";
    for variant in VARIANTS {
        let request = balancer(variant, FAR, &json!({}));
        for (rule, is_rewritten) in [
            ("add rule inet own post oifname edge masquerade", true),
            (
                "add rule inet own post oifname edge meta nfproto ipv4 snat ip to 10.9.0.254; \
              add rule inet own post oifname edge meta nfproto ipv6 snat ip6 to fd09::fe",
                true,
            ),
            (
                "add rule inet own pre tcp dport 81 dnat ip to 10.7.0.1; \
              add rule inet own post tcp dport 81 accept",
                false,
            ),
        ] {
            lab.gateway.run(&["nft", &format!("{own}{rule}")]);
            let told = lab.told(&request);
            match is_rewritten {
                true => assert_eq!(told, [""; 0], "{variant} {rule}"),
                false => assert_warned(&told, FAR, ROUTER),
            }
            assert_answered(
                &lab.near_client,
                is_rewritten,
                FAR,
                &format!("{variant} {rule}"),
            );
            lab.forget(variant);
            lab.gateway.run(&["nft", "delete table inet own"]);
        }
    }
}

/// Clients that come by another interface, to which the router knows the way back.
#[test]
fn between_two_networks_the_gateway_is_on_the_way_back() {
    let lab = Roundabout::new();
    let client = Namespace::new("i");
    client.forward(false);
    link(&client, "wan", &lab.gateway, "inside");
    addresses(&client, "wan", &["10.6.0.2/24", "fd06::2/64"]);
    addresses(&lab.gateway, "inside", &["10.6.0.254/24", "fd06::fe/64"]);
    default_routes(&client, ["10.6.0.254", "fd06::fe"]);
    for (network, gateway) in [("10.6.0.0/24", "10.9.0.254"), ("fd06::/64", "fd09::fe")] {
        for host in [&lab.router, &lab.near_servers] {
            host.run(&["ip", "route", "add", network, "via", gateway]);
        }
    }
    let inside = ["10.6.0.0/24", "fd06::/64"];
    for variant in VARIANTS {
        for backends in [NEAR, FAR] {
            let request = |more: &Value| balancer(variant, backends, more);
            assert_eq!(lab.told(&request(&json!({}))), [""; 0]);
            assert_answered(&client, true, backends, &format!("{variant} {backends:?}"));
            lab.forget(variant);
            for more in [
                json!({"in_interface": "inside"}),
                json!({"source": inside}),
                json!({"source": ["0.0.0.0/0", "::/0"]}),
                // Of the networks here any may be meant.
                json!({"source": ["10.0.0.0/8", "fd00::/8"]}),
                json!({"source": NEAR_CLIENTS, "in_interface": "inside"}),
            ] {
                let told = lab.foretold(&request(&more));
                assert_eq!(told, [""; 0], "{variant} {backends:?} {more}");
            }
            for more in [
                json!({"source": NEAR_CLIENTS}),
                json!({"source": FAR_CLIENTS}),
                json!({"in_interface": "edge"}),
                json!({"in_interface": "edg+"}),
                json!({"source": ["10.0.0.0/8", "fd00::/8"], "in_interface": "edge"}),
            ] {
                let told = lab.foretold(&request(&more));
                assert_warned(&told, backends, "`masquerade: balanced` brings them back");
            }
        }
    }
    // Packets that come in on the inside may use a routing table of their own.
    for family in ["-4", "-6"] {
        lab.gateway
            .run(&["ip", family, "rule", "add", "iif", "inside", "table", "100"]);
    }
    let told = lab.foretold(&balancer("nft", FAR, &json!({"in_interface": "edge"})));
    assert_eq!(told, [""; 0]);
}

#[test]
fn backends_here_or_without_weight_are_not_warned_of() {
    let lab = Roundabout::new();
    let own = ["10.9.0.254:80", "[fd09::fe]:80"];
    let drained = FAR.map(|address| format!("{address} weight=0"));
    for backends in [json!(own), json!(drained)] {
        let request = json!({
            "name": "W", "variant": "nft", "destination_port": 5308, "backends": backends,
        });
        assert_eq!(lab.told(&request), [""; 0], "{request}");
        lab.forget("nft");
    }
}

#[test]
fn in_a_set_one_warning_names_all_balancers_concerned() {
    let lab = Roundabout::new();
    let set = |more: Value| {
        let mut set = json!({"name": "W", "variant": "nft", "balancers": [
            {"name": "web", "destination_port": 80, "backends": FAR},
            {"name": "alt", "destination_port": 8080, "backends": FAR},
            {"name": "own", "destination_port": 5308, "backends": NEAR, "masquerade": "balanced"},
        ]});
        if !more.is_null() {
            set["balancers"].as_array_mut().unwrap().push(more);
        }
        set
    };
    let told = lab.told(&set(Value::Null));
    assert_eq!(told.len(), 2, "{told:?}");
    for text in &told {
        assert!(
            text.starts_with("balancers `web` and `alt`: backends: "),
            "{text}"
        );
    }
    lab.forget("nft");
    let all = json!({
        "name": "all", "destination_port": 81, "backends": FAR, "masquerade": "all", "out_interface": "edge",
    });
    assert_eq!(lab.told(&set(all)), [""; 0]);
}

#[test]
fn playbooks_and_policies_tell_it() {
    let lab = Roundabout::new();
    for front in [Front::Playbook, Front::Policy] {
        for variant in VARIANTS {
            let request = |more| {
                let mut request = balancer(variant, FAR, &more);
                request["destination_port"] = json!("5308");
                request
            };
            let done = front.ask(&lab.gateway, &request(json!({})));
            assert_eq!(done.outcome, Ok(true), "{front:?} {}", done.said);
            // Ansible breaks the lines of a warning, and cf-agent has other quotes.
            let said = |text: &str| {
                let words: Vec<&str> = text.split_whitespace().collect();
                words.join(" ").replace('`', "'")
            };
            for router in ["10.9.0.253", "fd09::fd"] {
                let expected = format!("{ROUTER}'{router}'");
                assert!(
                    said(&done.said).contains(&expected),
                    "{front:?} {}",
                    done.said
                );
            }
            assert_answered(&lab.near_client, false, FAR, variant);
            lab.forget(variant);
            let done = front.ask(&lab.gateway, &request(json!({"masquerade": "balanced"})));
            assert_eq!(done.outcome, Ok(true), "{front:?} {}", done.said);
            assert!(
                !said(&done.said).contains(ROUTER),
                "{front:?} {}",
                done.said
            );
            assert_answered(&lab.near_client, true, FAR, variant);
            lab.forget(variant);
        }
    }
}

/// Every request of the playbooks, without what comes from a template.
const REQUESTS: &str = "
import json, sys, yaml
def requests(value):
    if isinstance(value, dict):
        is_request = 'name' in value and ('balancers' in value or {'backends', 'destination_port'} <= value.keys())
        if is_request and '{{' not in value['name']:
            return [{name: of for name, of in value.items() if '{{' not in json.dumps(of)}]
        value = list(value.values())
    return sum(map(requests, value), []) if isinstance(value, list) else []
for path in sys.argv[1:]:
    for request in requests(yaml.safe_load(open(path))):
        print(json.dumps(request))
";

#[test]
fn the_examples_have_no_warnings_in_their_network() {
    let lab = Lab::new();
    let files = |folder: &str| {
        let folder = format!("{}/examples/{folder}", env!("CARGO_MANIFEST_DIR"));
        let entries = fs::read_dir(folder).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        paths.collect::<Vec<_>>()
    };
    let plain = files("json").into_iter();
    let mut requests: Vec<String> = plain
        .map(|path| fs::read_to_string(path).unwrap())
        .collect();
    let playbooks = [files("ansible"), files("ha")].concat();
    let playbooks = playbooks
        .iter()
        .filter(|path| path.extension().is_some_and(|ending| ending == "yml"));
    let playbooks = playbooks.map(|path| path.to_str().unwrap());
    let arguments: Vec<&str> = ["python3", "-c", REQUESTS]
        .into_iter()
        .chain(playbooks)
        .collect();
    let found = lab.gateway.run(&arguments);
    requests.extend(found.lines().map(str::to_owned));
    assert!(found.lines().count() > 5, "{found}");
    for request in requests {
        let mut request: Value = serde_json::from_str(&request).unwrap();
        request["check"] = json!(true);
        // No server of this lab answers checks.
        request.as_object_mut().unwrap().remove("health");
        let result = lab.gateway.ask(&request);
        assert_eq!(result["failed"], json!(false), "{request} {result}");
        assert_eq!(warnings(&result), [""; 0], "{request}");
    }
}
