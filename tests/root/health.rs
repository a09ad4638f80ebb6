//! Health checks in a run: real servers that die, hang, or answer badly.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::gateway::{ask, lab, settle};
use crate::lab::{Lab, Namespace, VARIANTS, add_address};

/// Checks that take a fraction of a second.
fn quick() -> Value {
    json!({"interval": 0.1, "timeout": 0.2, "fall": 2})
}

fn pool(variant: &str, backends: &Value, health: &Value) -> Value {
    json!({
        "name": "W", "variant": variant, "destination_port": 5308, "backends": backends, "health": health,
    })
}

/// The letters of the backends in the order of the request: `U` up and in service,
/// `D` down, `d` down and in service all the same, `u` up and not in service, `-` not
/// checked.
fn letters(result: &Value) -> String {
    let shares = result["distribution"].as_array().unwrap();
    let letter = |share: &Value| match (&share["health"], &share["in_service"]) {
        (Value::Null, _) => '-',
        (health, Value::Bool(true)) if health == "up" => 'U',
        (health, _) if health == "up" => 'u',
        (_, Value::Bool(true)) => 'd',
        _ => 'D',
    };
    shares.iter().map(letter).collect()
}

fn warnings(result: &Value) -> String {
    result["warnings"].to_string()
}

/// A server that never answers: packets to it are dropped.
fn hang(servers: &Namespace, address: &str) {
    let program = match address.contains(':') {
        true => "ip6tables",
        false => "iptables",
    };
    servers.run(&[program, "-A", "INPUT", "-d", address, "-j", "DROP"]);
}

#[test]
fn a_dead_or_hanging_backend_gets_no_connection() {
    for variant in VARIANTS {
        let lab = lab("tcp");
        let gateway = &lab.gateway;
        // Nobody listens on port 1, and the last one hangs.
        hang(&lab.servers, "10.9.0.3");
        hang(&lab.servers, "fd09::3");
        let backends = json!([
            "10.9.0.1:5308",
            "10.9.0.2:1",
            "10.9.0.3:5308",
            "[fd09::1]:5308",
            "[fd09::2]:1",
            "[fd09::3]:5308",
        ]);
        let begun = Instant::now();
        let result = settle(gateway, &pool(variant, &backends, &quick()));
        // A check, and two runs.
        assert!(
            begun.elapsed() < Duration::from_secs(6),
            "{:?}",
            begun.elapsed()
        );
        assert_eq!(letters(&result), "UDDUDD", "{variant} {result}");
        let told = warnings(&result);
        assert!(
            told.contains("4 of 6 backends are down: `10.9.0.2:1` (connection refused), `10.9.0.3:5308` (no answer within 0.2 s)"),
            "{told}"
        );
        for (target, server) in [("10.8.0.1:5308", "10.9.0.1"), ("[fd08::1]:5308", "fd09::1")] {
            for answer in ask(&lab.client, "tcp", target, &[]) {
                assert!(answer.starts_with(server), "{variant} {answer}");
            }
        }
    }
}

/// A server of HTTP that answers each path with the status that the path names, or with
/// garbage, or for ever.
const HTTP: &str = r#"
import socket, sys, threading
server = socket.create_server((sys.argv[1], 80))
print("ready", flush=True)
def serve(client):
    head = client.recv(4096).decode()
    path = head.split()[1].strip("/")
    try:
        if path == "garbage": client.sendall(b"hello\r\n\r\n")
        elif path == "closed": client.close()
        elif path == "endless":
            client.sendall(b"HTTP/1.1 200 OK\r\n")
            while True: client.sendall(b"x: " + b"y" * 1000 + b"\r\n")
        elif path == "host": client.sendall(f"HTTP/1.1 {200 if 'Host: example.org' in head else 400} x\r\n\r\n".encode())
        else: client.sendall(f"HTTP/1.1 {path} x\r\n\r\n".encode())
    except OSError: pass
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"#;

#[test]
fn http_checks_ask_for_an_expected_status() {
    let mut gateway = Namespace::new("g");
    add_address(&gateway, "lo", "10.9.0.1/32");
    gateway.start(&["python3", "-c", HTTP, "10.9.0.1"]);
    let check = |more: Value| {
        let mut health = quick();
        health["type"] = json!("http");
        health
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        health["panic_threshold"] = json!("never");
        let mut request = pool("nft", &json!(["10.9.0.1:80"]), &health);
        request["destination"] = json!("10.8.0.9");
        gateway.apply(&request)
    };
    for (more, wanted, why) in [
        (json!({"path": "/200"}), "U", ""),
        (json!({"path": "/302"}), "U", ""),
        (
            json!({"path": "/503"}),
            "D",
            "status 503 instead of 200-399",
        ),
        (json!({"path": "/404", "status": [200, "404-405"]}), "U", ""),
        (
            json!({"path": "/204", "status": 200}),
            "D",
            "status 204 instead of 200",
        ),
        (json!({"path": "/garbage"}), "D", "the answer is not HTTP"),
        (
            json!({"path": "/closed"}),
            "D",
            "connection closed before an answer",
        ),
        (
            json!({"path": "/endless"}),
            "D",
            "the head of the answer does not end",
        ),
        (json!({"path": "/host"}), "D", "status 400"),
        (json!({"path": "/host", "host": "example.org"}), "U", ""),
        (
            json!({"path": "/200", "port": 81}),
            "D",
            "connection refused",
        ),
    ] {
        let result = check(more.clone());
        assert_eq!(letters(&result), wanted, "{more} {result}");
        assert!(warnings(&result).contains(why), "{more} {result}");
    }
}

#[test]
fn backups_serve_and_panic_threshold_fails_open() {
    for variant in VARIANTS {
        let mut lab = Lab::new();
        lab.servers
            .serve("tcp", &["10.9.0.1:5308", "10.9.0.3:5308"]);
        let gateway = &lab.gateway;
        let with = |backends: Value, more: Value| {
            let mut health = quick();
            health
                .as_object_mut()
                .unwrap()
                .extend(more.as_object().unwrap().clone());
            settle(gateway, &pool(variant, &backends, &health))
        };
        let one = |first: &str| json!([first, "10.9.0.2:1", "10.9.0.3:5308 backup"]);
        assert_eq!(letters(&with(one("10.9.0.1:5308"), json!({}))), "UDu");
        assert_eq!(letters(&with(one("10.9.0.1:1"), json!({}))), "DDU");
        assert_eq!(
            ask(&lab.client, "tcp", "10.8.0.1:5308", &[]),
            ["10.9.0.3", "10.9.0.3"]
        );
        let dead = json!(["10.9.0.1:1", "10.9.0.2:1", "10.9.0.3:1 backup"]);
        let result = with(dead.clone(), json!({}));
        assert_eq!(letters(&result), "ddD", "{variant} {result}");
        assert!(
            warnings(&result).contains("health is ignored (`panic_threshold`)"),
            "{result}"
        );
        let half = json!(["10.9.0.1:5308", "10.9.0.2:1"]);
        assert_eq!(
            letters(&with(half.clone(), json!({"panic_threshold": 49}))),
            "UD"
        );
        assert_eq!(letters(&with(half, json!({"panic_threshold": 50}))), "Ud");
        // An unhealthy pool is an empty one: refused at once, never half.
        let result = with(dead, json!({"panic_threshold": "never"}));
        assert_eq!(letters(&result), "DDD", "{variant} {result}");
        let answers = ask(&lab.client, "tcp", "10.8.0.1:5308", &[]);
        assert!(
            answers
                .iter()
                .all(|answer| answer.contains("ConnectionRefused")),
            "{answers:?}"
        );
    }
}

/// A UDP client that keeps its port moves on when its backend dies.
#[test]
fn the_connections_of_a_backend_that_goes_down_are_ended() {
    for variant in VARIANTS {
        let mut lab = lab("udp");
        // The checks are of TCP.
        lab.servers
            .serve("tcp", &["10.9.0.1:7000", "10.9.0.2:7000"]);
        let (client, gateway) = (&lab.client, &lab.gateway);
        let mut health = quick();
        health["port"] = json!(7000);
        let mut request = pool(variant, &json!(["10.9.0.1:5308", "10.9.0.2:5308"]), &health);
        request["protocol"] = json!("udp");
        settle(gateway, &request);
        let from = ["--from", "4000"];
        let first = ask(client, "udp", "10.8.0.1:5308", &from);
        let server = first[0].split(' ').next().unwrap().to_owned();
        assert!(first[1].starts_with(&server), "it stays: {first:?}");
        hang(&lab.servers, &server);
        let mut check = request.clone();
        check["check"] = json!(true);
        let predicted = gateway.apply(&check);
        let result = gateway.apply(&request);
        assert_eq!(result["changes"], predicted["changes"], "{variant}");
        let ended = result["changes"].to_string();
        assert!(
            ended.contains(&format!(
                "-p udp --reply-src {server} --reply-port-src 5308"
            )),
            "{ended}"
        );
        let moved = ask(client, "udp", "10.8.0.1:5308", &from);
        assert!(
            !moved[0].starts_with(&server) && moved[0].starts_with("10.9.0."),
            "{moved:?}"
        );
        assert_eq!(gateway.apply(&request)["changed"], json!(false));
    }
}

#[test]
fn a_thousand_backends_of_which_a_hundred_hang_take_no_longer_than_one() {
    let gateway = Namespace::new("g");
    // Two hosts: all ports of one are refused, and packets to the other are lost.
    gateway.run(&["ip", "address", "add", "10.9.0.1/32", "dev", "lo"]);
    gateway.run(&["ip", "address", "add", "10.9.0.2/32", "dev", "lo"]);
    hang(&gateway, "10.9.0.2");
    let backends: Vec<String> = (0..1000)
        .map(|number| match number % 10 {
            0 => format!("10.9.0.2:{}", 1000 + number),
            _ => format!("10.9.0.1:{}", 1000 + number),
        })
        .collect();
    let health = json!({"interval": 2, "timeout": 0.5, "fall": 3});
    let mut request = pool("nft", &json!(backends), &health);
    request["destination"] = json!("10.8.0.9");
    let timed = |request: &Value| {
        let begun = Instant::now();
        let result = gateway.apply(request);
        (result, begun.elapsed())
    };
    let (result, took) = timed(&request);
    assert_eq!(letters(&result), "d".repeat(1000));
    // The same run without checks: the part of the time that a busy machine takes.
    request.as_object_mut().unwrap().remove("health");
    let (_, bare) = timed(&request);
    let longest = Duration::from_millis(3 * 500 + 1000) + 2 * bare;
    assert!(
        (Duration::from_secs(1)..longest).contains(&took),
        "{took:?}, {bare:?}"
    );
}

#[test]
fn a_run_believes_fresh_verdicts_of_a_watcher_and_no_others() {
    let mut lab = Lab::new();
    lab.servers
        .serve("tcp", &["10.9.0.1:5308", "10.9.0.2:5308"]);
    let gateway = &lab.gateway;
    let request = pool("nft", &json!(["10.9.0.1:5308", "10.9.0.2:5308"]), &quick());
    assert_eq!(letters(&gateway.apply(&request)), "UU");
    let uptime = fs::read_to_string("/proc/uptime").unwrap();
    let uptime = uptime.split(' ').next().unwrap().replace('.', "");
    let uptime: u64 = uptime.parse().unwrap();
    let file = gateway.scratch().join("run/W.json");
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    let write = |age_ms: u64| {
        // A watcher that knows only one of the backends.
        let verdicts = json!({
            "written_ms": uptime * 10 - age_ms, "interval_ms": 100_000,
            "backends": [{
                "balancer": null, "address": "10.9.0.2", "port": 5308, "health": "down", "reason": "it said so",
                "since": 1,
            }],
        });
        fs::write(&file, verdicts.to_string()).unwrap();
    };
    write(1000);
    let result = settle(gateway, &request);
    assert_eq!(letters(&result), "UD", "{result}");
    assert!(
        warnings(&result).contains("`10.9.0.2:5308` (it said so)"),
        "{result}"
    );
    write(301_000);
    assert_eq!(letters(&gateway.apply(&request)), "UU");
    for broken in ["", "{}", "[1]", "{\"written_ms\": \"x\"}"] {
        fs::write(&file, broken).unwrap();
        let result = gateway.apply(&request);
        assert_eq!(letters(&result), "UU", "{broken}");
        assert!(
            warnings(&result).contains("W.json` cannot be read, so the backends are probed"),
            "{result}"
        );
    }
}

/// With `local_traffic` the rules in OUTPUT would balance a probe of a balanced port.
#[test]
fn a_probe_does_not_go_through_the_balancer() {
    for variant in VARIANTS {
        let mut lab = Lab::new();
        lab.servers.serve("tcp", &["10.9.0.1:5308"]);
        let gateway = &lab.gateway;
        let mut request = pool(
            variant,
            &json!(["10.9.0.1:5308", "10.9.0.2:5308"]),
            &quick(),
        );
        request["local_traffic"] = json!(true);
        for _ in 0..4 {
            let result = gateway.apply(&request);
            assert_eq!(letters(&result), "UD", "{variant} {result}");
        }
        // An empty pool refuses everything but the probe.
        request["health"]["panic_threshold"] = json!("never");
        hang(&lab.servers, "10.9.0.1");
        assert_eq!(letters(&gateway.apply(&request)), "DD", "{variant}");
        lab.servers.run(&["iptables", "-F", "INPUT"]);
        assert_eq!(letters(&gateway.apply(&request)), "UD", "{variant}");
    }
}
