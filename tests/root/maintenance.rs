//! `hold`, `release` and `drain_timeout`, and the files that they need, on real
//! iptables with real connections.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::{Child, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::gateway::{ask, lab, settle};
use crate::lab::{Lab, Namespace, PROGRAM, VARIANTS, shown};

fn pool(variant: &str) -> Value {
    json!({
        "name": "W", "variant": variant, "destination_port": 5308,
        "backends": "10.9.0.1:5308,10.9.0.2:5308,[fd09::1]:5308,[fd09::2]:5308",
    })
}

/// Runs a subcommand; returns its output.
fn order(gateway: &Namespace, arguments: &[&str]) -> Output {
    gateway.feed(&[&[PROGRAM], arguments].concat(), "")
}

/// The same where it must succeed; returns what it said.
fn done(gateway: &Namespace, arguments: &[&str]) -> String {
    let output = order(gateway, arguments);
    assert!(output.status.success(), "{}", shown(&output));
    shown(&output)
}

/// The same where it must fail; returns the error.
fn refused(gateway: &Namespace, arguments: &[&str]) -> String {
    let output = order(gateway, arguments);
    assert!(!output.status.success(), "{}", shown(&output));
    String::from_utf8(output.stderr).unwrap()
}

fn state(gateway: &Namespace, file: &str) -> PathBuf {
    gateway.scratch().join("state").join(file)
}

fn warnings(result: &Value) -> String {
    result["warnings"].to_string()
}

/// The servers that answer four connections, without their clients' addresses.
fn answering(lab: &Lab, target: &str) -> Vec<String> {
    let mut found: Vec<String> = [0, 1]
        .iter()
        .flat_map(|_| ask(&lab.client, "tcp", target, &[]))
        .map(|answer| answer.split(' ').next().unwrap_or_default().to_owned())
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

#[test]
fn a_held_backend_gets_nothing_until_it_is_released() {
    for variant in VARIANTS {
        let lab = lab("tcp");
        let gateway = &lab.gateway;
        gateway.apply(&pool(variant));
        assert_eq!(answering(&lab, "10.8.0.1:5308"), ["10.9.0.1", "10.9.0.2"]);
        let told = done(
            gateway,
            &[
                "hold",
                "W",
                "10.9.0.2:5308",
                "--for",
                "2h",
                "--reason",
                "disk",
            ],
        );
        let held = "(disk); `iptables_balance release W 10.9.0.2:5308` ends that";
        assert!(told.contains(held), "{told}");
        assert_eq!(answering(&lab, "10.8.0.1:5308"), ["10.9.0.1"], "{variant}");
        // The other family goes on.
        assert_eq!(answering(&lab, "[fd08::1]:5308"), ["fd09::1", "fd09::2"]);

        // A later run leaves it so, and says so; with another request too.
        let again = gateway.apply(&pool(variant));
        assert_eq!(again["changed"], json!(false), "{variant} {again}");
        assert!(warnings(&again).contains("is held for another"), "{again}");
        let share = &again["distribution"][1];
        assert_eq!(
            (&share["in_service"], &share["share"]),
            (&json!(false), &json!(0.0))
        );
        let mut more = pool(variant);
        more["backends"] = json!("10.9.0.1:5308,10.9.0.2:5308,10.9.0.3:5308");
        settle(gateway, &more);
        assert_eq!(answering(&lab, "10.8.0.1:5308"), ["10.9.0.1", "10.9.0.3"]);

        done(gateway, &["release", "W", "10.9.0.2"]);
        assert_eq!(
            answering(&lab, "10.8.0.1:5308"),
            ["10.9.0.1", "10.9.0.2", "10.9.0.3"],
            "{variant}"
        );
        assert!(!state(gateway, "W.holds.json").exists());
    }
}

#[test]
fn a_hold_ends_by_itself() {
    let gateway = Namespace::new("g");
    gateway.apply(&pool("nft"));
    // Long enough for a busy machine.
    done(&gateway, &["hold", "W", "10.9.0.2:5308", "--for", "8s"]);
    let held = Instant::now();
    assert_eq!(gateway.apply(&pool("nft"))["changed"], json!(false));
    thread::sleep(Duration::from_millis(9100).saturating_sub(held.elapsed()));
    let result = gateway.apply(&pool("nft"));
    assert_eq!(result["changed"], json!(true), "{result}");
    assert_eq!(result["distribution"][1]["share"], json!(0.5));
    assert!(!warnings(&result).contains("held"), "{result}");
}

#[test]
fn in_a_set_a_hold_is_of_one_balancer() {
    for variant in VARIANTS {
        let gateway = Namespace::new("g");
        let set = json!({"name": "EDGE", "variant": variant, "balancers": [
            {"name": "web", "destination_port": 80, "backends": ["10.9.0.1:80", "10.9.0.2:80"]},
            {"name": "alt", "destination_port": 81, "backends": ["10.9.0.2:80", "10.9.0.3:80"]},
        ]});
        gateway.apply(&set);
        let error = refused(&gateway, &["hold", "EDGE", "10.9.0.2:80"]);
        assert!(
            error.contains(
                "`10.9.0.2:80` is a backend of `web` and `alt`; say which with `--balancer NAME`"
            ),
            "{error}"
        );
        done(
            &gateway,
            &["hold", "EDGE", "10.9.0.2:80", "--balancer", "alt"],
        );
        let result = settle(&gateway, &set);
        let served: Vec<bool> = result["distribution"]
            .as_array()
            .unwrap()
            .iter()
            .map(|share| share["in_service"] == json!(true))
            .collect();
        assert_eq!(served, [true, true, false, true], "{variant} {result}");
        assert!(
            warnings(&result).contains("balancer `alt`: backend `10.9.0.2:80` is held until it is released; `iptables_balance release EDGE 10.9.0.2:80 --balancer alt` ends that"),
            "{result}"
        );
        // A backend of one balancer alone needs no name.
        done(&gateway, &["hold", "EDGE", "10.9.0.3"]);
        done(
            &gateway,
            &["release", "EDGE", "10.9.0.2:80", "--balancer", "alt"],
        );
    }
}

#[test]
fn a_wrong_order_changes_nothing_and_names_the_way_out() {
    let gateway = Namespace::new("g");
    let error = refused(&gateway, &["hold", "W", "10.9.0.2"]);
    assert!(
        error.contains(
            "no request for `W` is known on this host; name its file with `--request FILE`"
        ),
        "{error}"
    );
    let mut request = pool("nft");
    request["backends"] = json!("10.9.0.1:80,10.9.0.1:81,10.9.0.2:80");
    gateway.apply(&request);
    let before = gateway.dump("nft");
    for (arguments, wanted) in [
        (
            &["10.9.0.9"][..],
            "`10.9.0.9` is no backend of `W`; its backends are `10.9.0.1:80`, `10.9.0.1:81` and `10.9.0.2:80`",
        ),
        (
            &["10.9.0.1"],
            "`10.9.0.1` stands for `10.9.0.1:80` and `10.9.0.1:81`; name its port",
        ),
        (&["web1"], "is neither ADDRESS nor ADDRESS:PORT"),
        (&["10.9.0.2", "--for", "2"], "time unit needed"),
        (
            &["10.9.0.2", "--reason", "a\u{7}b"],
            "has a control character in it",
        ),
        (
            &["10.9.0.2", "--balancer", "web"],
            "`W` is a single balancer; leave it out",
        ),
        (
            &["10.9.0.2", "--request", "/nowhere"],
            "cannot read `/nowhere`",
        ),
    ] {
        let error = refused(&gateway, &[&["hold", "W"], arguments].concat());
        assert!(error.contains(wanted), "{error}");
    }
    assert_eq!(gateway.dump("nft"), before);
    assert!(!state(&gateway, "W.holds.json").exists());
    // A broken list of holds is not overwritten.
    fs::write(state(&gateway, "W.holds.json"), "{\"holds\": 7}").unwrap();
    let error = refused(&gateway, &["hold", "W", "10.9.0.2"]);
    assert!(
        error.contains("W.holds.json` cannot be read, so no backend is held"),
        "{error}"
    );
    let kept = fs::read_to_string(state(&gateway, "W.holds.json")).unwrap();
    assert_eq!(kept, "{\"holds\": 7}");
}

#[test]
fn a_hold_that_cannot_be_applied_is_not_kept() {
    let gateway = Namespace::new("g");
    gateway.apply(&pool("nft"));
    let failing = ("iptables-restore", "#!/bin/sh\nexit 1\n");
    let output = gateway.feed_with_stand_ins(
        &[failing, ("iptables-nft-restore", failing.1)],
        &[PROGRAM, "hold", "W", "10.9.0.2:5308"],
        "",
    );
    assert!(!output.status.success(), "{}", shown(&output));
    assert!(
        shown(&output).contains("the list of holds is as before"),
        "{}",
        shown(&output)
    );
    assert!(!state(&gateway, "W.holds.json").exists());
    assert_eq!(gateway.apply(&pool("nft"))["changed"], json!(false));
}

#[test]
fn each_run_keeps_its_request_and_absent_removes_it() {
    let gateway = Namespace::new("g");
    let file = state(&gateway, "W.json");
    let mut check = pool("nft");
    check["check"] = json!(true);
    gateway.apply(&check);
    assert!(!file.exists(), "a check keeps nothing");
    gateway.apply(&pool("nft"));
    let kept: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    assert_eq!(kept, pool("nft"));
    let found = fs::metadata(&file).unwrap();
    assert_eq!(found.permissions().mode() & 0o7777, 0o600);
    // The same request is not written again, another one is.
    assert_eq!(gateway.apply(&pool("nft"))["changed"], json!(false));
    assert_eq!(fs::metadata(&file).unwrap().ino(), found.ino());
    let mut other = pool("nft");
    other["wait"] = json!(20);
    assert_eq!(gateway.apply(&other)["changed"], json!(false));
    assert_ne!(fs::metadata(&file).unwrap().ino(), found.ino());
    done(&gateway, &["hold", "W", "10.9.0.2:5308"]);
    gateway.apply(&json!({"name": "W", "state": "absent", "variant": "nft"}));
    assert!(!file.exists() && !state(&gateway, "W.holds.json").exists());
}

#[test]
fn broken_files_are_told_and_unsafe_directories_refused() {
    let gateway = Namespace::new("g");
    gateway.apply(&pool("nft"));
    let directory = gateway.scratch().join("state");
    for broken in ["", "[]", "{\"holds\": [{\"address\": 7}]}", "\u{0}"] {
        fs::write(state(&gateway, "W.holds.json"), broken).unwrap();
        let result = gateway.apply(&pool("nft"));
        assert!(
            warnings(&result).contains("W.holds.json` cannot be read, so no backend is held"),
            "{result}"
        );
        assert_eq!(result["changed"], json!(false));
    }
    fs::remove_file(state(&gateway, "W.holds.json")).unwrap();
    // A request that is kept in a broken file is kept anew.
    fs::write(state(&gateway, "W.json"), "broken").unwrap();
    assert_eq!(gateway.apply(&pool("nft"))["warnings"], json!([]));
    // Where it cannot be kept, the run succeeds with a warning.
    fs::remove_file(state(&gateway, "W.json")).unwrap();
    fs::create_dir(state(&gateway, "W.json")).unwrap();
    let result = gateway.apply(&pool("nft"));
    assert!(
        warnings(&result)
            .contains("the request could not be kept for `hold`, `release` and `watch`"),
        "{result}"
    );
    fs::remove_dir(state(&gateway, "W.json")).unwrap();

    for name in ["state", "run"] {
        let directory = gateway.scratch().join(name);
        fs::create_dir_all(&directory).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o777)).unwrap();
        let before = gateway.dump("nft");
        let mut other = pool("nft");
        other["backends"] = json!("10.9.0.7");
        let result = gateway.ask(&other);
        assert_eq!(result["failed"], json!(true), "{result}");
        let message = result["msg"].as_str().unwrap();
        assert!(
            message.contains("may be written by others (mode 0777)"),
            "{message}"
        );
        assert!(
            message.ends_with("`chmod go-w` it; nothing was changed"),
            "{message}"
        );
        assert_eq!(gateway.dump("nft"), before);
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o700)).unwrap();
    }
    assert!(directory.exists());
}

/// A client that connects through the gateway and stays until it is killed.
fn staying_client(lab: &Lab) -> Child {
    let script = "import socket,sys\nc=socket.create_connection(('10.8.0.1',5308))\nprint(c.recv(99).decode().split()[0],flush=True)\nsys.stdin.read()\n";
    let mut client = lab.client.command(&["python3", "-c", script]);
    let mut client = client
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut answer = [0; 8];
    client
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut answer)
        .unwrap();
    assert_eq!(&answer, b"10.9.0.1");
    client
}

#[test]
fn drain_timeout_waits_for_the_connections_and_tells_what_is_left() {
    for variant in VARIANTS {
        let mut lab = Lab::new();
        lab.servers
            .serve("tcp", &["10.9.0.1:5308", "10.9.0.2:5308"]);
        let gateway = &lab.gateway;
        let mut request = pool(variant);
        request["drain_timeout"] = json!(1.5);
        let first = gateway.apply(&request);
        assert_eq!(first["draining"], json!([]), "{first}");
        let mut client = staying_client(&lab);

        // Weight 0: the connection stays, so the run waits to the end.
        request["backends"] = json!("10.9.0.1:5308 weight=0,10.9.0.2:5308");
        let begun = Instant::now();
        let result = gateway.apply(&request);
        let took = begun.elapsed();
        let left = json!([{"address": "10.9.0.1", "port": 5308, "connections": 1}]);
        assert_eq!(result["draining"], left, "{variant} {result}");
        assert!(took >= Duration::from_millis(1500), "{took:?}");
        // Nothing to change: it tells, and does not wait.
        let begun = Instant::now();
        let result = gateway.apply(&request);
        assert_eq!(
            (&result["changed"], &result["draining"]),
            (&json!(false), &left)
        );
        assert!(
            begun.elapsed() < Duration::from_millis(1400),
            "{:?}",
            begun.elapsed()
        );

        // Removed: the wait ends when the connection has ended.
        request["drain_timeout"] = json!(30);
        request["backends"] = json!("10.9.0.2:5308");
        let ending = thread::spawn(move || {
            thread::sleep(Duration::from_millis(800));
            client.kill().unwrap();
            client.wait().unwrap();
        });
        let begun = Instant::now();
        let result = gateway.apply(&request);
        ending.join().unwrap();
        assert_eq!(result["draining"], json!([]), "{variant} {result}");
        let took = begun.elapsed();
        assert!(
            (Duration::from_millis(700)..Duration::from_secs(20)).contains(&took),
            "{took:?}"
        );
    }
}

/// Whoever waits for the lock goes on from what the one before left.
#[test]
fn a_hold_that_waited_applies_the_request_of_the_run_that_it_waited_for() {
    let gateway = Namespace::new("g");
    let request =
        |backends: &str| json!({"name": "W", "destination_port": 5308, "backends": backends});
    gateway.apply(&request("10.9.0.1,10.9.0.2"));
    let kept = state(&gateway, "W.json");
    let old = fs::read(&kept).unwrap();
    gateway.apply(&request("10.9.0.1,10.9.0.2,10.9.0.3"));
    let new = fs::read(&kept).unwrap();
    fs::write(&kept, old).unwrap();
    let lock = gateway.scratch().join("balance.lock");
    let lock = fs::File::open(lock).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let mut command = gateway.command(&[PROGRAM, "hold", "W", "10.9.0.2"]);
    let mut hold = command.stdout(Stdio::null()).spawn().unwrap();
    thread::sleep(Duration::from_millis(400));
    fs::write(&kept, &new).unwrap();
    drop(lock);
    assert!(hold.wait().unwrap().success());
    let rules = gateway.run(&["iptables-save", "-t", "nat"]);
    assert!(
        rules.contains("-A W -p tcp -j DNAT --to-destination 10.9.0.3"),
        "{rules}"
    );
    assert_eq!(fs::read(&kept).unwrap(), new);
}

/// A run that looked at the holds before an operator's order came must not undo it.
#[test]
fn a_hold_that_comes_during_a_run_is_heeded_by_it() {
    for variant in VARIANTS {
        let gateway = Namespace::new("g");
        gateway.apply(&pool(variant));
        let mut more = pool(variant);
        more["backends"] = json!("10.9.0.1:5308,10.9.0.2:5308,10.9.0.3:5308");
        // Each dump takes a while, and the order comes during the first.
        let begun = gateway.scratch().join("begun");
        let slow = |program: &str| {
            let begun = begun.display();
            format!(
                "#!/bin/sh\n[ \"$1\" = --version ] || {{ touch {begun}; sleep 1; }}\nexec /usr/sbin/{program} \"$@\"\n"
            )
        };
        let names = [
            "iptables-save",
            "ip6tables-save",
            "iptables-nft-save",
            "ip6tables-nft-save",
            "iptables-legacy-save",
            "ip6tables-legacy-save",
        ];
        let scripts = names.map(|name| (name, slow(name)));
        let stand_ins: Vec<(&str, &str)> = scripts
            .iter()
            .map(|(name, text)| (*name, text.as_str()))
            .collect();
        let result = thread::scope(|scope| {
            let run = scope.spawn(|| gateway.ask_with_stand_ins(&stand_ins, &more));
            let deadline = Instant::now() + Duration::from_secs(20);
            while !begun.exists() && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(10));
            }
            thread::sleep(Duration::from_millis(300));
            done(&gateway, &["hold", "W", "10.9.0.1:5308"]);
            run.join().unwrap()
        });
        assert_eq!(result["failed"], json!(false), "{variant} {result}");
        let heeds = |result: &Value| {
            assert!(
                warnings(result).contains("`10.9.0.1:5308` is held"),
                "{variant} {result}"
            );
            let served: Vec<_> = result["distribution"]
                .as_array()
                .unwrap()
                .iter()
                .map(|one| one["in_service"].clone())
                .collect();
            let expected = [json!(false), json!(true), json!(true)];
            assert_eq!(served, expected, "{variant} {result}");
        };
        // On legacy the run has the lock before it reads, so the order waits for its end.
        if variant == "nft" {
            heeds(&result);
        }
        let again = gateway.apply(&more);
        heeds(&again);
        assert_eq!(again["changed"], json!(false), "{variant}");
    }
}
