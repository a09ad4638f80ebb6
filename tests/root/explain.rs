//! `explain` of the rules of a real kernel, held against real connections.

use serde_json::{Value, json};

use crate::lab::{Lab, Namespace, PROGRAM, VARIANTS, shown};

fn explained(gateway: &Namespace, variant: &str, arguments: &[&str]) -> Vec<u8> {
    let output = gateway.feed(
        &[&[PROGRAM, "explain", "--variant", variant], arguments].concat(),
        "",
    );
    assert!(output.status.success(), "{}", shown(&output));
    output.stdout
}

fn chain(gateway: &Namespace, variant: &str) -> Value {
    let text = explained(gateway, variant, &["--chain", "W", "--format", "json"]);
    let found: Value = serde_json::from_slice(&text).unwrap();
    found["chains"][0].clone()
}

fn codes(chain: &Value) -> Vec<&str> {
    let findings = chain["findings"].as_array().unwrap().iter();
    findings
        .filter_map(|finding| finding["code"].as_str())
        .collect()
}

const SERVERS: [&str; 4] = [
    "10.9.0.1:5308",
    "10.9.0.2:5308",
    "10.9.0.3:5308",
    "10.9.0.4:5308",
];

/// The shares of a chain that is right and of one that is wrong are those that the kernel gives.
#[test]
fn the_kernel_shares_out_as_explained() {
    const COUNT: u32 = 64;
    for variant in VARIANTS {
        let mut lab = Lab::new();
        lab.servers.serve("tcp", &SERVERS);
        let gateway = &lab.gateway;
        gateway.apply(&json!({
            "name": "W", "variant": variant, "destination_port": 5308, "backends": SERVERS,
        }));
        lab.client.connect("tcp", "10.8.0.1:5308", 10);
        let right = chain(gateway, variant);
        assert!(codes(&right).is_empty(), "{right}");
        assert_eq!(right["deviation"]["fits"], json!(true), "{right}");
        let packets: Vec<_> = right["shares"]
            .as_array()
            .unwrap()
            .iter()
            .map(|share| &share["packets"])
            .collect();
        assert_eq!(packets, [3, 3, 2, 2], "{right}");

        // The same --every on each line; the rest meets a port on which nobody listens.
        let rules: String = SERVERS
            .iter()
            .map(|to| format!("-A W -p tcp -m statistic --mode nth --every 4 --packet 0 -j DNAT --to-destination {to}\n"))
            .collect();
        let text = format!("*nat\n-F W\n{rules}COMMIT\n");
        gateway.restore(&format!("iptables-{variant}-restore"), &text);
        let connect = "import socket,sys\nfor _ in range(int(sys.argv[1])):\n  \
             socket.socket().connect_ex(('10.8.0.1', 5308))";
        lab.client
            .run(&["python3", "-c", connect, &COUNT.to_string()]);
        let wrong = chain(gateway, variant);
        assert_eq!(codes(&wrong), ["same-every", "falls-through"], "{wrong}");
        for share in wrong["shares"].as_array().unwrap() {
            let expected = share["share"].as_f64().unwrap() * f64::from(COUNT);
            let got = share["packets"].as_f64().unwrap();
            assert!((got - expected).abs() <= 1.6, "{variant} {share}");
        }
    }
}

/// Facts that only the host knows: forwarding, its own addresses, FORWARD.
#[test]
fn mistakes_of_the_host_around_the_chain_are_found() {
    for variant in VARIANTS {
        let lab = Lab::new();
        let gateway = &lab.gateway;
        gateway.apply(&json!({
            "name": "W", "variant": variant, "destination_port": 5308, "backends": SERVERS,
        }));
        gateway.forward(false);
        gateway.run(&[&format!("iptables-{variant}"), "-P", "FORWARD", "DROP"]);
        let found = chain(gateway, variant);
        assert_eq!(
            codes(&found),
            ["forward-blocks", "forwarding-off"],
            "{found}"
        );
        gateway.apply(&json!({
            "name": "W", "variant": variant, "destination_port": 5308, "backends": SERVERS, "forward": true, "ip_forward": true,
        }));
        let found = chain(gateway, variant);
        assert!(codes(&found).is_empty(), "{found}");
    }
}

/// Prometheus' own tool accepts the metrics.
#[test]
fn promtool_accepts_the_metrics() {
    let gateway = Namespace::new("g");
    gateway.apply(&json!({
        "name": "W", "variant": "nft", "destination_port": [80, 443], "mode": "random", "backends": SERVERS,
    }));
    for command in [vec!["explain", "--variant", "nft"], vec!["status"]] {
        let arguments = [&[PROGRAM], &command[..], &["--format", "prometheus"]].concat();
        let output = gateway.feed(&arguments, "");
        let metrics = String::from_utf8(output.stdout).unwrap();
        assert!(metrics.contains("share_ratio{"), "{metrics}");
        let checked = gateway.feed(&["promtool", "check", "metrics"], &metrics);
        assert!(checked.status.success(), "{}\n{metrics}", shown(&checked));
    }
}
