//! The real cf-agent, and a strict stand-in for messages that it cannot be made
//! to send.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::lab::{Lab, Namespace, PROGRAM, VARIANTS, shown};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

// --- the real agent -------------------------------------------------------------------------------------------------

/// A work directory of cf-agent's own, with the module and a policy in it.
fn work_directory(namespace: &Namespace) -> PathBuf {
    let work = namespace.scratch().join("cfengine");
    if !work.exists() {
        for folder in ["bin", "inputs", "modules/promises"] {
            fs::create_dir_all(work.join(folder)).unwrap();
        }
        fs::set_permissions(work.join("inputs"), fs::Permissions::from_mode(0o700)).unwrap();
        symlink("/usr/bin/cf-promises", work.join("bin/cf-promises")).unwrap();
        symlink(PROGRAM, work.join("modules/promises/iptables_balance")).unwrap();
    }
    work
}

pub fn policy(namespace: &Namespace, name: &str, text: &str) -> PathBuf {
    let path = work_directory(namespace).join("inputs").join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    path
}

fn example(namespace: &Namespace, name: &str) -> PathBuf {
    let folder = Path::new(ROOT).join("examples/cfengine");
    for data in ["weights.json", "edge.json"] {
        let text = fs::read_to_string(folder.join(data)).unwrap();
        policy(namespace, data, &text);
    }
    policy(
        namespace,
        name,
        &fs::read_to_string(folder.join(name)).unwrap(),
    )
}

/// Runs the agent without its locks; returns its messages, without indentation.
/// It must never report a bug in the module.
pub fn agent(namespace: &Namespace, policy: &Path, options: &[&str]) -> Vec<String> {
    let work = work_directory(namespace);
    let arguments = [
        "cf-agent",
        "-w",
        work.to_str().unwrap(),
        "-f",
        policy.to_str().unwrap(),
    ];
    let output = namespace.feed(&[&arguments[..], options].concat(), "");
    let text = shown(&output);
    assert!(
        !text.contains("CRITICAL") && !text.contains("rogramming"),
        "{text}"
    );
    assert!(output.status.success(), "{text}");
    text.lines()
        .skip(1)
        .map(|line| line.trim_start().to_owned())
        .filter(|line| !line.is_empty())
        .collect()
}

/// A policy of these promises, which reports the outcome of each.
pub fn promises(promises: &str) -> String {
    format!(
        r#"promise agent iptables_balance {{ path => "$(sys.workdir)/modules/promises/iptables_balance"; }}
body common control {{ bundlesequence => {{ "main" }}; }}
body classes outcome(p) {{ promise_kept => {{ "$(p)_was_kept" }}; promise_repaired => {{ "$(p)_was_repaired" }}; repair_failed => {{ "$(p)_was_failed" }}; }}
body action warn_only {{ action_policy => "warn"; }}
body action nop {{ action_policy => "nop"; }}
body action misspelt(word) {{ action_policy => "$(word)"; }}
body action if_elapsed(n) {{ ifelapsed => "$(n)"; expireafter => "5"; log_string => "x"; log_level => "verbose"; }}
bundle agent main {{
{promises}
  reports:
    one_was_kept:: "one kept"; one_was_repaired:: "one repaired"; one_was_failed:: "one failed";
    two_was_kept:: "two kept"; two_was_repaired:: "two repaired"; two_was_failed:: "two failed";
    W_kept:: "class W_kept"; W_repaired:: "class W_repaired"; W_not_kept:: "class W_not_kept";
}}
"#
    )
    .replace(":: \"", "::\n      \"")
    .replace("; ", ";\n    ")
}

#[test]
fn a_dry_run_then_repaired_then_kept() {
    for variant in VARIANTS {
        let namespace = Namespace::new("f");
        let one = promises(&format!(
            r#"  iptables_balance: "W" variant => "{variant}", destination_port => "5308", backends => {{ "10.9.0.1:5308", "10.9.0.2:5308" }}, classes => outcome("one");"#
        ));
        let policy = policy(&namespace, "one.cf", &one);
        let before = namespace.dump(variant);
        for options in [
            &["-KIn"][..],
            &["-KI", "--simulate=diff"],
            &["-KI", "--simulate=manifest"],
        ] {
            let said = agent(&namespace, &policy, options);
            assert!(said.iter().any(|line| line == "warning: Should create chain 'W' in table 'nat' of ipv4, but only warning promised"), "{said:?}");
            assert_eq!(
                said.iter()
                    .filter(|line| line.contains("but only warning promised"))
                    .count(),
                4,
                "{said:?}"
            );
            assert!(
                !said.iter().any(|line| line.starts_with("info: Created")),
                "{said:?}"
            );
            assert_eq!(namespace.dump(variant), before);
        }
        let said = agent(&namespace, &policy, &["-KI"]);
        assert_eq!(
            said,
            [
                "info: Created chain 'W' in table 'nat' of ipv4",
                "info: Appended rule '-p tcp -m statistic --mode nth --every 2 --packet 0 -j DNAT --to-destination 10.9.0.1:5308' to chain 'W' in table 'nat' of ipv4",
                "info: Appended rule '-p tcp -j DNAT --to-destination 10.9.0.2:5308' to chain 'W' in table 'nat' of ipv4",
                "info: Appended rule '-p tcp -m tcp --dport 5308 -j W' to chain 'PREROUTING' in table 'nat' of ipv4",
                "R: one repaired",
                "R: class W_repaired",
            ],
            "{variant}"
        );
        assert_eq!(
            agent(&namespace, &policy, &["-KI"]),
            ["R: one kept", "R: class W_kept"],
            "{variant}"
        );
        assert_eq!(
            agent(&namespace, &policy, &["-KIn"])
                .iter()
                .filter(|line| line.starts_with("warning: Should"))
                .count(),
            0
        );
    }
}

#[test]
fn warn_and_nop_change_nothing_and_other_policies_are_refused() {
    for (action, expected) in [
        ("warn_only", "Should create chain 'W'"),
        ("nop", "Should create chain 'W'"),
        (
            "misspelt(\"wran\")",
            "action_policy: \"wran\" is not one of: fix, warn, nop",
        ),
    ] {
        let namespace = Namespace::new("f");
        let text = promises(&format!(
            r#"  iptables_balance: "W" destination_port => "80", backends => {{ "10.9.0.1" }}, action => {action}, classes => outcome("one");"#
        ));
        let before = namespace.dump("nft");
        let said = agent(&namespace, &policy(&namespace, "p.cf", &text), &["-KI"]).join("\n");
        assert!(
            said.contains(expected) && said.contains("R: one failed"),
            "{said}"
        );
        assert_eq!(namespace.dump("nft"), before);
    }
    let namespace = Namespace::new("f");
    let text = promises(
        r#"  iptables_balance: "W" destination_port => "80", backends => { "10.9.0.1" }, action => misspelt("fix"), classes => outcome("one");"#,
    );
    assert!(
        agent(&namespace, &policy(&namespace, "p.cf", &text), &["-KI"])
            .contains(&"R: one repaired".to_owned())
    );
}

#[test]
fn invalid_and_failed_promises_leave_their_neighbours_alone() {
    let namespace = Namespace::new("f");
    let text = promises(
        r#"  iptables_balance:
    "BAD" destination_port => "80", backends => { "10.9.0.1", "10.9.0.2 weight=-1" }, classes => outcome("one");
    "UNKNOWN" destination_prot => "80", backends => { "10.9.0.1" };
    "NAMED" name => "OTHER", destination_port => "80", backends => { "10.9.0.1" };
    "W" destination_port => "80", backends => { "10.9.0.1" }, classes => outcome("two"), comment => "why", handle => "h", action => if_elapsed("0");"#,
    );
    let path = policy(&namespace, "p.cf", &text);
    let said = agent(&namespace, &path, &["-KI"]).join("\n");
    let place = path.display();
    for line in [
        &format!(
            "error: backends[1].weight: '-1' is not between 0 and 2147483647 for iptables_balance promise with promiser 'BAD' ({place}:"
        ),
        "error: destination_prot: there is no such attribute; the nearest is 'destination_port' for iptables_balance promise with promiser 'UNKNOWN'",
        "error: name: the promiser is the name; leave this out for iptables_balance promise with promiser 'NAMED'",
        "R: one failed",
        "R: two repaired",
    ] {
        assert!(said.contains(line), "{line}\n{said}");
    }

    // Something that fails on the host: the reason is said, and nothing is left.
    let text = promises(
        r#"  iptables_balance: "W" destination_port => "81", backends => { "10.9.0.1" }, classes => outcome("one");"#,
    );
    let path = policy(&namespace, "q.cf", &text);
    let before = namespace.dump("nft");
    let work = work_directory(&namespace);
    let refusing = (
        "iptables-restore",
        "#!/bin/sh\necho 'out of order' >&2\nexit 3\n",
    );
    let arguments = [
        "cf-agent",
        "-w",
        work.to_str().unwrap(),
        "-KI",
        "-f",
        path.to_str().unwrap(),
    ];
    let output = namespace.feed_with_stand_ins(&[refusing], &arguments, "");
    let said = shown(&output);
    assert!(
        said.contains(
            "out of order; the host is as before for iptables_balance promise with promiser 'W'"
        ) && said.contains("R: one failed")
            && said.contains("class W_not_kept"),
        "{said}"
    );
    assert!(!said.contains("CRITICAL"), "{said}");
    assert_eq!(namespace.dump("nft"), before);
}

/// Every way in which CFEngine hands over the same list.
#[test]
fn all_forms_of_an_attribute_are_the_same() {
    let namespace = Namespace::new("f");
    let forms = [
        r#"backends => { "10.9.0.1:5308 weight=70", "10.9.0.2:5308 weight=30" }"#,
        r#"backends => "10.9.0.1:5308 weight=70, 10.9.0.2:5308 weight=30.000000""#,
        "backends => @(container)",
        "backends => @(reals)",
        r#"backends => parsejson('[{"address": "10.9.0.1", "port": "5308", "weight": 70}, "10.9.0.2:5308 weight=30"]')"#,
        "backends => storejson(@(container))",
        r#"backends => mergedata("arr")"#,
        "backends => @(list)",
    ];
    for (number, form) in forms.iter().enumerate() {
        let text = promises(&format!(
            r#"  vars:
    "container" data => '[{{"address": "10.9.0.1", "port": 5308, "weight": 70}}, {{"address": "10.9.0.2", "port": 5308, "weight": 30}}]';
    "reals" data => '[{{"address": "10.9.0.1", "port": 5308.0, "weight": 70.0}}, {{"address": "10.9.0.2", "port": 5308.0, "weight": 30.0}}]';
    "list" slist => {{ "10.9.0.1:5308 weight=70", "10.9.0.2:5308 weight=30" }};
    "arr[0][address]" string => "10.9.0.1";
    "arr[0][port]" string => "5308";
    "arr[0][weight]" string => "70";
    "arr[1][address]" string => "10.9.0.2";
    "arr[1][port]" string => "5308";
    "arr[1][weight]" string => "30";
  iptables_balance: "W" mode => "random", destination_port => "5308", masquerade => "no", forward => "False", wait => "5", {form}, classes => outcome("one");"#
        ));
        let said = agent(&namespace, &policy(&namespace, "p.cf", &text), &["-KI"]);
        let expected = if number == 0 {
            "R: one repaired"
        } else {
            "R: one kept"
        };
        assert!(said.contains(&expected.to_owned()), "{form}: {said:?}");
    }
}

/// A set in every way in which CFEngine hands over structured data.
#[test]
fn all_forms_of_a_set_are_the_same() {
    let namespace = Namespace::new("f");
    let forms = [
        "balancers => @(container)",
        "balancers => storejson(@(container))",
        r#"balancers => mergedata("arr")"#,
        "balancers => @(texts)",
    ];
    for (number, form) in forms.iter().enumerate() {
        let text = promises(&format!(
            r#"  vars:
    "container" data => '[{{"name": "a", "destination_port": "80", "backends": ["10.9.0.1"]}}, {{"name": "b", "destination_port": 81, "backends": "10.9.0.1,10.9.0.2"}}]';
    "texts" slist => {{ '{{"name": "a", "destination_port": 80, "backends": "10.9.0.1"}}', '{{"name": "b", "destination_port": 81.0, "backends": ["10.9.0.1", "10.9.0.2"]}}' }};
    "arr[0][name]" string => "a";
    "arr[0][destination_port]" string => "80";
    "arr[0][backends]" string => "10.9.0.1";
    "arr[1][name]" string => "b";
    "arr[1][destination_port]" string => "81";
    "arr[1][backends]" slist => {{ "10.9.0.1", "10.9.0.2" }};
  iptables_balance: "EDGE" {form}, classes => outcome("one");"#
        ));
        let said = agent(&namespace, &policy(&namespace, "p.cf", &text), &["-KI"]);
        let expected = if number == 0 {
            "R: one repaired"
        } else {
            "R: one kept"
        };
        assert!(said.contains(&expected.to_owned()), "{form}: {said:?}");
    }
}

/// The prefixes of a hash in every way in which CFEngine hands over structured data.
#[test]
fn all_forms_of_the_prefixes_of_a_hash_are_the_same() {
    let namespace = Namespace::new("f");
    let forms = [
        "hash_prefix => @(container)",
        "hash_prefix => @(reals)",
        "hash_prefix => storejson(@(container))",
        r#"hash_prefix => mergedata("arr")"#,
        r#"hash_prefix => '{"ipv6": "56", "ipv4": 24}'"#,
    ];
    for (number, form) in forms.iter().enumerate() {
        let text = promises(&format!(
            r#"  vars:
    "container" data => '{{"ipv4": 24, "ipv6": 56}}';
    "reals" data => '{{"ipv4": "24.0", "ipv6": 56.0}}';
    "arr[ipv4]" string => "24";
    "arr[ipv6]" string => "56";
  iptables_balance: "W" mode => "hash", hash_key => "source", hash_seed => "7", destination_port => "5308",
    backends => {{ "10.9.0.1", "10.9.0.2", "fd09::1", "fd09::2" }}, {form}, classes => outcome("one");"#
        ));
        let said = agent(&namespace, &policy(&namespace, "p.cf", &text), &["-KI"]);
        let expected = if number == 0 {
            "R: one repaired"
        } else {
            "R: one kept"
        };
        assert!(said.contains(&expected.to_owned()), "{form}: {said:?}");
    }
    // A & 0xffffff00: the first 24 bits of an IPv4 address; 24 bits of the second word of a /56.
    let masked = |program| {
        namespace
            .run(&[program, "-t", "nat"])
            .contains(",84 0 0 4294967040,")
    };
    assert!(masked("iptables-save") && masked("ip6tables-save"));
}

/// With hundreds of balancers a message says what changes in which one.
#[test]
fn a_large_set_is_reported_balancer_by_balancer() {
    let namespace = Namespace::new("f");
    let mut agent = StandIn::greeted(&namespace);
    let set = |backends: &str| {
        let balancer = |number: u16| json!({"name": format!("b{number}"), "destination_port": 1000 + number, "backends": backends});
        json!({"balancers": (0..150).map(balancer).collect::<Vec<_>>()})
    };
    let reply = agent.promise("evaluate_promise", "EDGE", &set("10.9.0.1"));
    assert_eq!(reply["result"], "repaired");
    let logs = reply["log"].as_array().unwrap();
    let infos = logs.iter().filter(|log| log["level"] == "info");
    let infos: Vec<&str> = infos.map(|log| log["message"].as_str().unwrap()).collect();
    assert!(infos.len() <= 101, "{}", infos.len());
    assert!(
        infos.contains(&"Changed balancer 'b0' of set 'EDGE', with 3 changes"),
        "{infos:?}"
    );
    assert!(
        infos
            .last()
            .unwrap()
            .starts_with("Changed 50 more balancers"),
        "{infos:?}"
    );
    let mut dry = set("10.9.0.2");
    dry["action_policy"] = json!("warn");
    let reply = agent.promise("evaluate_promise", "EDGE", &dry);
    assert_eq!(reply["result"], "not_kept");
    let text = reply["log"].to_string();
    assert!(
        text.contains(
            "Should change balancer 'b0' of set 'EDGE', with 1 change, but only warning promised"
        ),
        "{text}"
    );
}

#[test]
fn the_examples_do_what_they_say_and_balance_real_connections() {
    let mut lab = Lab::new();
    let gateway = &lab.gateway;
    lab.servers.serve(
        "tcp",
        &[
            "10.9.0.1:5308",
            "10.9.0.2:5308",
            "10.9.0.3:5308",
            "10.9.0.4:5308",
        ],
    );
    let warned = agent(gateway, &example(gateway, "warn.cf"), &["-KI"]);
    assert!(
        warned
            .iter()
            .all(|line| line.starts_with("warning: Should "))
            && warned.len() == 4,
        "{warned:?}"
    );
    let done = agent(gateway, &example(gateway, "hubs.cf"), &["-KI"]);
    assert!(
        done.contains(&"R: The balancer was set up".to_owned()),
        "{done:?}"
    );
    assert_eq!(
        agent(gateway, &example(gateway, "hubs.cf"), &["-KI"]),
        [""; 0]
    );
    let answers = lab.client.connect("tcp", "10.8.0.1:5308", 8);
    let expected: Vec<String> = (0..8).map(|n| format!("10.9.0.{}", n % 4 + 1)).collect();
    assert_eq!(answers, expected);

    let done = agent(gateway, &example(gateway, "weights.cf"), &["-KI"]);
    assert!(
        done.iter()
            .any(|line| line.contains("--probability 0.42857142864")),
        "{done:?}"
    );
    assert_eq!(
        agent(gateway, &example(gateway, "weights.cf"), &["-KI"]),
        [""; 0]
    );
    gateway.forward(false);
    let dry = agent(gateway, &example(gateway, "gateway.cf"), &["-KIn"]);
    let expected = "warning: Should set 'net.ipv4.ip_forward = 1', which was 'net.ipv4.ip_forward = 0', but only warning promised";
    assert!(dry.contains(&expected.to_owned()), "{dry:?}");
    let done = agent(gateway, &example(gateway, "gateway.cf"), &["-KI"]);
    let expected = "info: Set 'net.ipv4.ip_forward = 1', which was 'net.ipv4.ip_forward = 0'";
    assert_eq!(done.last().map(String::as_str), Some(expected), "{done:?}");
    assert_eq!(
        agent(gateway, &example(gateway, "gateway.cf"), &["-KI"]),
        [""; 0]
    );
    gateway.forward(true);
    let dry = agent(gateway, &example(gateway, "edge.cf"), &["-KIn"]);
    assert!(
        dry.iter().all(|line| line.starts_with("warning: Should ")),
        "{dry:?}"
    );
    let done = agent(gateway, &example(gateway, "edge.cf"), &["-KI"]);
    let expected = "info: Created chain 'EDGE/web' in table 'nat' of ipv4";
    assert!(done.contains(&expected.to_owned()), "{done:?}");
    assert_eq!(
        agent(gateway, &example(gateway, "edge.cf"), &["-KI"]),
        [""; 0]
    );
    let web = lab.client.connect("tcp", "10.8.0.1:443", 4);
    assert!(
        web.iter()
            .all(|one| ["10.9.0.1", "10.9.0.2"].contains(&one.as_str())),
        "{web:?}"
    );
    let gone = agent(gateway, &example(gateway, "absent.cf"), &["-KI"]);
    let (told, deleted): (Vec<_>, Vec<_>) = gone
        .iter()
        .partition(|line| line.contains("forwarding was left on"));
    assert_eq!(told.len(), 2, "{gone:?}");
    assert!(deleted.iter().all(|line| line.starts_with("info: Deleted")));
    assert_eq!(
        agent(gateway, &example(gateway, "absent.cf"), &["-KI"]),
        [""; 0]
    );
    assert!(!gateway.dump("nft").contains("CFENGINE"));
}

/// The examples, the reference and the module for cfbs agree on the program's place.
#[test]
fn the_module_definition_is_that_of_the_examples() {
    let read = |path: &str| fs::read_to_string(Path::new(ROOT).join(path)).unwrap();
    let reference = read("module-spec/REFERENCE.md");
    let path = reference
        .lines()
        .find(|line| line.contains("path =>"))
        .unwrap();
    assert!(read("module-spec/cfengine/cfbs/iptables_balance.cf").contains(path));
    for entry in fs::read_dir(Path::new(ROOT).join("examples/cfengine")).unwrap() {
        let text = fs::read_to_string(entry.unwrap().path()).unwrap();
        assert!(text.contains(path) || text.starts_with('['), "{text}");
    }
}

// --- a strict stand-in ----------------------------------------------------------------------------------------------

#[test]
fn the_example_with_health_gives_a_dead_server_nothing() {
    let mut lab = Lab::new();
    lab.servers
        .serve("tcp", &["10.9.0.1:5308", "10.9.0.3:5308"]);
    let gateway = &lab.gateway;
    let run = |options: &[&str]| agent(gateway, &example(gateway, "health.cf"), options);
    let dry = run(&["-KIn"]);
    assert!(
        dry.iter().any(|line| line.contains("Should append")),
        "{dry:?}"
    );
    let done = run(&["-KI"]);
    let dead = "warning: 1 of 3 backends is down: '10.9.0.2:5308' (connection refused)";
    assert!(done.iter().any(|line| line.contains(dead)), "{done:?}");
    assert_eq!(
        lab.client.connect("tcp", "10.8.0.1:5308", 2),
        ["10.9.0.1", "10.9.0.1"]
    );
    // Kept, and the operator's order is heeded and told.
    let ordered = gateway.run(&[PROGRAM, "hold", "EDGE", "10.9.0.1:5308", "--reason", "disk"]);
    assert!(ordered.contains("was updated"), "{ordered}");
    let held = run(&["-KI"]);
    let told = "backend '10.9.0.1:5308' is held until it is released (disk)";
    assert!(held.iter().any(|line| line.contains(told)), "{held:?}");
    assert!(!held.iter().any(|line| line.contains("info: ")), "{held:?}");
    assert_eq!(
        lab.client.connect("tcp", "10.8.0.1:5308", 2),
        ["10.9.0.3", "10.9.0.3"]
    );
}

/// Holds the module to every rule that cf-agent has, and to some more.
struct StandIn {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl StandIn {
    fn start(namespace: &Namespace) -> Self {
        Self::start_with(namespace.command(&[PROGRAM]))
    }

    fn start_with(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self {
            child,
            input,
            output,
        }
    }

    fn greeted(namespace: &Namespace) -> Self {
        Self::start(namespace).greet()
    }

    fn greet(self) -> Self {
        let mut agent = self;
        agent.send(b"cf-agent 3.21.0 v1\n\n");
        assert_eq!(
            agent.message(),
            concat!(
                "iptables_balance ",
                env!("CARGO_PKG_VERSION"),
                " v1 json_based action_policy"
            )
        );
        agent
    }

    fn send(&mut self, bytes: &[u8]) {
        let input = self.input.as_mut().unwrap();
        input.write_all(bytes).unwrap();
        input.flush().unwrap();
    }

    /// One line and the empty one after it.
    fn message(&mut self) -> String {
        let (mut line, mut empty) = (String::new(), String::new());
        self.output.read_line(&mut line).unwrap();
        self.output.read_line(&mut empty).unwrap();
        assert_eq!(empty, "\n", "after {line}");
        line.trim_end_matches('\n').to_owned()
    }

    fn ask(&mut self, bytes: &[u8]) -> Value {
        self.send(&[bytes, b"\n\n"].concat());
        let reply: Value = serde_json::from_str(&self.message()).unwrap();
        lawful(&reply, bytes);
        reply
    }

    fn promise(&mut self, operation: &str, promiser: &str, attributes: &Value) -> Value {
        let request = json!({
            "operation": operation, "promiser": promiser, "attributes": attributes, "filename": "p.cf", "line_number": 7,
            "log_level": "notice", "promise_type": "iptables_balance",
        });
        self.ask(request.to_string().as_bytes())
    }

    /// The input ends; so must the module, having said nothing more.
    fn end(mut self) -> (String, String, Option<i32>) {
        drop(self.input.take());
        let (mut rest, mut errors) = (String::new(), String::new());
        self.output.read_to_string(&mut rest).unwrap();
        self.child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut errors)
            .unwrap();
        (rest, errors, self.child.wait().unwrap().code())
    }
}

/// Checks a reply as strictly as cf-agent, and for the replies that make it
/// abort.
fn lawful(reply: &Value, request: &[u8]) {
    let context = format!(
        "{reply} to {}",
        String::from_utf8_lossy(&request[..request.len().min(300)])
    );
    let logs = reply["log"]
        .as_array()
        .unwrap_or_else(|| panic!("no log: {context}"));
    let has = |levels: &[&str]| {
        logs.iter()
            .any(|log| levels.contains(&log["level"].as_str().unwrap()))
    };
    for log in logs {
        assert!(
            [
                "critical", "error", "warning", "notice", "info", "verbose", "debug"
            ]
            .contains(&log["level"].as_str().unwrap()),
            "{context}"
        );
        let message = log["message"].as_str().unwrap();
        assert!(
            !message.is_empty()
                && !message.ends_with('.')
                && !message.contains('\n')
                && !message.contains('`'),
            "{context}"
        );
    }
    let text = String::from_utf8_lossy(request);
    let warned =
        text.contains("\"action_policy\":\"warn\"") || text.contains("\"action_policy\":\"nop\"");
    match (
        reply["operation"].as_str().unwrap(),
        reply["result"].as_str().unwrap(),
    ) {
        ("validate_promise", "valid") | ("terminate", "success") => {
            assert!(logs.is_empty(), "{context}");
        }
        ("evaluate_promise", "kept") => assert!(!has(&["info", "error"]), "{context}"),
        ("evaluate_promise", "repaired") => assert!(has(&["info"]) && !warned, "{context}"),
        ("evaluate_promise", "not_kept") => assert!(
            has(&["error", "critical"]) || (warned && has(&["warning"])),
            "{context}"
        ),
        ("validate_promise", "invalid") | (_, "error") => {
            assert!(has(&["error", "critical"]), "{context}");
        }
        _ => panic!("{context}"),
    }
    if let Some(classes) = reply.get("result_classes") {
        assert!(
            classes.as_array().unwrap().iter().all(Value::is_string),
            "{context}"
        );
    }
}

fn hubs() -> Value {
    json!({"destination_port": "80", "backends": "10.9.0.1,10.9.0.2"})
}

#[test]
fn one_process_serves_many_promises_and_none_leaks_into_the_next() {
    let namespace = Namespace::new("f");
    let mut agent = StandIn::greeted(&namespace);
    let mut random = hubs();
    random["mode"] = json!("random");
    random["wait"] = json!("3");
    for (promiser, attributes) in [("ONE", &random), ("TWO", &hubs())] {
        assert_eq!(
            agent.promise("validate_promise", promiser, attributes)["result"],
            "valid"
        );
        let reply = agent.promise("evaluate_promise", promiser, attributes);
        assert_eq!(
            (&reply["result"], &reply["result_classes"]),
            (&json!("repaired"), &json!([format!("{promiser}_repaired")]))
        );
        assert_eq!(
            agent.promise("evaluate_promise", promiser, attributes)["result"],
            "kept"
        );
    }
    let dump = namespace.dump("nft");
    assert!(
        dump.contains("-A ONE -p tcp -m statistic --mode random")
            && dump.contains("-A TWO -p tcp -m statistic --mode nth"),
        "{dump}"
    );
    // After a promise that is wrong, and after nonsense, the next is right.
    let wrong = agent.promise(
        "evaluate_promise",
        "ONE",
        &json!({"mode": "random", "backends": []}),
    );
    assert_eq!(
        (&wrong["result"], agent.ask(b"nonsense")["result"].as_str()),
        (&json!("not_kept"), Some("error"))
    );
    assert_eq!(
        agent.promise("evaluate_promise", "TWO", &hubs())["result"],
        "kept"
    );
    assert_eq!(
        agent.promise("evaluate_promise", "TWO", &json!({"state": "absent"}))["result"],
        "repaired"
    );
    assert_eq!(
        agent.ask(b"{\"operation\":\"terminate\"}")["result"],
        "success"
    );
    assert_eq!(agent.end(), (String::new(), String::new(), Some(0)));
}

/// A directory with an `iptables-save` that counts its starts, in both variants and
/// families.
fn counting_programs(namespace: &Namespace) -> PathBuf {
    let directory = namespace.scratch().join("counting");
    fs::create_dir_all(&directory).unwrap();
    for program in ["iptables", "ip6tables"] {
        for name in [
            format!("{program}-save"),
            format!("{program}-nft-save"),
            format!("{program}-legacy-save"),
        ] {
            let path = directory.join(&name);
            let counter = directory.join("count");
            let script = format!(
                "#!/bin/sh\n[ \"$1\" = --version ] || echo {name} \"$@\" >>{}\nexec /usr/sbin/{name} \"$@\"\n",
                counter.display()
            );
            fs::write(&path, script).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
    }
    directory
}

/// The dumps since the last time.
fn dumps(directory: &Path) -> Vec<String> {
    let counter = directory.join("count");
    let text = fs::read_to_string(&counter).unwrap_or_default();
    fs::write(&counter, "").unwrap();
    text.lines().map(str::to_owned).collect()
}

/// On nft kept promises cost no dump, and a change by somebody else between two
/// promises is seen. On legacy nothing tells that a dump is still true.
#[test]
fn a_dump_serves_the_session_until_somebody_changes_the_rules() {
    for variant in VARIANTS {
        let namespace = Namespace::new("n");
        let directory = counting_programs(&namespace);
        let path = std::env::var("PATH").unwrap();
        let path = format!("PATH={}:{path}", directory.display());
        let attributes = |number: usize| {
            json!({
                "variant": variant, "destination_port": (80 + number).to_string(), "forward": "yes",
                "backends": "10.9.0.1,10.9.0.2,fd09::1",
            })
        };
        let mut agent = StandIn::start_with(namespace.command(&["env", &path, PROGRAM])).greet();
        let mut result = |number: usize| {
            let reply = agent.promise(
                "evaluate_promise",
                &format!("W{number}"),
                &attributes(number),
            );
            reply["result"].as_str().unwrap().to_owned()
        };
        for number in 0..6 {
            assert_eq!(result(number), "repaired");
        }
        dumps(&directory);
        for number in 0..6 {
            assert_eq!(result(number), "kept");
        }
        // Of both families, and of the tables nat and filter.
        let count = dumps(&directory).len();
        let expected = if variant == "nft" { 0 } else { 6 * 4 };
        assert_eq!(count, expected, "{variant}");

        let restore = format!("iptables-{variant}-restore");
        for (number, change) in [
            (3, "*nat\n-F W3\nCOMMIT\n"),
            (4, "*filter\n-F W4/forward\nCOMMIT\n"),
            (
                5,
                "*nat\n-D PREROUTING -p tcp -m tcp --dport 85 -j W5\nCOMMIT\n",
            ),
        ] {
            assert_eq!(result(number), "kept");
            namespace.restore(&restore, change);
            assert_eq!(result(number), "repaired", "{variant} {change}");
            assert_eq!(result(number), "kept", "{variant} {change}");
        }
        // A foreign change that touches nothing of ours is no reason to write.
        namespace.restore(
            &restore,
            "*nat\n-A PREROUTING -p tcp --dport 9 -j ACCEPT\nCOMMIT\n",
        );
        dumps(&directory);
        assert_eq!(result(0), "kept");
        assert!(!dumps(&directory).is_empty(), "{variant}");
        let saved = namespace.dump(variant);
        assert!(saved.contains("--dport 9 -j ACCEPT"), "{saved}");
    }
}

/// However many balancers: one dump and at most one restore for each family.
#[test]
fn a_set_takes_one_dump_and_one_restore_for_each_family() {
    for variant in VARIANTS {
        let namespace = Namespace::new("n");
        let directory = counting_programs(&namespace);
        for (name, real) in [
            ("iptables-restore", "iptables-nft-restore"),
            ("ip6tables-restore", "ip6tables-nft-restore"),
            ("iptables-legacy-restore", "iptables-legacy-restore"),
            ("ip6tables-legacy-restore", "ip6tables-legacy-restore"),
        ] {
            let counter = directory.join("count");
            let script = format!(
                "#!/bin/sh\necho {real} >>{}\nexec /usr/sbin/{real} \"$@\"\n",
                counter.display()
            );
            fs::write(directory.join(name), script).unwrap();
            fs::set_permissions(directory.join(name), fs::Permissions::from_mode(0o755)).unwrap();
        }
        let path = format!(
            "PATH={}:{}",
            directory.display(),
            std::env::var("PATH").unwrap()
        );
        let balancer = |number: u16, odd: &str| json!({"name": format!("b{number}"), "destination_port": 1000 + number, "backends": format!("10.9.0.1,10.9.0.{odd},fd09::1,fd09::{odd}")});
        let set = |odd: &str| {
            let balancers: Vec<Value> = (0..50).map(|number| balancer(number, odd)).collect();
            json!({"name": "EDGE", "variant": variant, "forward": true, "balancers": balancers})
                .to_string()
        };
        let started = |request: &str| {
            dumps(&directory);
            let output = namespace.feed(&["env", &path, PROGRAM], request);
            assert!(output.status.success(), "{}", shown(&output));
            let all = dumps(&directory);
            let (restores, saves): (Vec<_>, Vec<_>) =
                all.into_iter().partition(|line| line.contains("restore"));
            (saves.len(), restores.len())
        };
        started(&set("2"));
        assert_eq!(started(&set("2")), (2, 0), "{variant}");
        // Each family is read once before, with counters, and once afterwards.
        let (saves, restores) = started(&set("3"));
        assert_eq!(restores, 2, "{variant}");
        assert_eq!(saves, 4, "{variant}");
    }
}

#[test]
fn every_message_gets_exactly_one_reply() {
    let namespace = Namespace::new("f");
    let mut agent = StandIn::greeted(&namespace);
    let long = "x".repeat(1_000_000);
    let deep = "[".repeat(200_000);
    for request in [
        &b"{}"[..],
        b"[]",
        b"null",
        b"\"\"",
        b"}",
        b"{\"operation\":7}",
        b"{\"operation\":\"evaluate_promise\"}",
        b"{\"operation\":\"evaluate_promise\",\"promiser\":\"W\"}",
        b"{\"operation\":\"evaluate_promise\",\"promiser\":\"W\",\"attributes\":{}}",
        b"{\"operation\":\"evaluate_promise\",\"promiser\":\"W\",\"attributes\":null}",
        b"{\"operation\":\"evaluate_promise\",\"promiser\":\"W\",\"attributes\":\"x\"}",
        b"{\"operation\":\"evaluate_promise\",\"promiser\":\"W\",\"attributes\":{\"mode\":\"\x01\x07\"}}",
        b"{\"operation\":\"evaluate_promise\",\"promiser\":\"W\",\"attributes\":{\"mode\":\"caf\xe9\"}}",
        b"{\"operation\":\"evaluate_promise\",\"promiser\":\"\xff\x00\"}",
        b"{\"operation\":\"evaluate_promise\",\"promiser\":\"W\",\"attributes\":{\"mode\":\"nth\",\"mode\":\"nth\"}}",
        b"{\"operation\":\"evaluate_promise\",\"promiser\":\"W\",\"attributes\":{\"action_policy\":7}}",
        b"{\"operation\":\"validate_promise\",\"promiser\":\"W\",\"attributes\":{\"state\":\"gone\"}}",
        b"{\"operation\":\"frobnicate\"}",
        b"{\"operation\":\"\xf0\x9f\x92\xa9 `x` 'y'.\"}",
        b"line one\nline two",
        b"{\"operation\":\"validate_promise\"}\r",
        deep.as_bytes(),
        format!("{{\"operation\":\"{long}\"}}").as_bytes(),
        format!("{{\"operation\":\"evaluate_promise\",\"promiser\":\"W\",\"attributes\":{{\"mode\":\"{long}\"}}}}").as_bytes(),
        format!("{{\"operation\":\"evaluate_promise\",\"promiser\":\"{long}\"}}").as_bytes(),
    ] {
        let reply = agent.ask(request);
        assert!(["error", "invalid", "not_kept"].contains(&reply["result"].as_str().unwrap()), "{reply}");
    }
    let backends: Vec<Value> = (0..10_000).map(|n| json!({"address": format!("10.{}.{}.{}", n >> 14, (n >> 7) & 127, (n & 127) + 1), "port": "80", "weight": "1.0000"})).collect();
    let reply = agent.promise(
        "validate_promise",
        "W",
        &json!({"mode": "random", "destination_port": "80", "backends": backends}),
    );
    assert_eq!(reply["result"], "valid", "{reply}");
    assert_eq!(
        agent.promise("evaluate_promise", "W", &hubs())["result"],
        "repaired"
    );
    assert_eq!(agent.end(), (String::new(), String::new(), Some(0)));
}

#[test]
fn requests_that_come_in_pieces_are_put_together() {
    let namespace = Namespace::new("f");
    let mut agent = StandIn::start(&namespace);
    let request = json!({"operation": "validate_promise", "promiser": "W", "attributes": {"state": "absent"}}).to_string();
    for piece in [
        "cf-",
        "agent 3.24.1 v1",
        "\n",
        "\n",
        &request[..20],
        &request[20..],
        "\n",
        "\n",
    ] {
        agent.send(piece.as_bytes());
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(agent.message().starts_with("iptables_balance "));
    assert!(agent.message().contains("\"result\":\"valid\""));
    assert_eq!(agent.end(), (String::new(), String::new(), Some(0)));
}

#[test]
fn the_end_of_the_input_and_a_closed_output_end_it_quietly() {
    let namespace = Namespace::new("f");
    for beginning in [
        "cf-agent 3.21.0 v1",
        "cf-agent 3.21.0 v1\n",
        "cf-agent 3.21.0 v1\n\n",
        "cf-agent 3.21.0 v1\n\n{\"operation\":",
        "cf-agent 3.21.0 v1\n\n{\"operation\":\"terminate\"}\n",
    ] {
        let mut agent = StandIn::start(&namespace);
        agent.send(beginning.as_bytes());
        let (rest, errors, code) = agent.end();
        assert!(
            rest.lines().count() <= 2 && errors.is_empty() && code == Some(0),
            "{beginning:?}: {rest}{errors}{code:?}"
        );
    }
    let StandIn {
        mut child,
        input,
        output,
    } = StandIn::greeted(&namespace);
    drop(output);
    let mut input = input.unwrap();
    input.write_all(b"{}\n\n{}\n\n").ok();
    drop(input);
    let mut errors = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut errors)
        .unwrap();
    assert_eq!(
        (child.wait().unwrap().code(), errors.as_str()),
        (Some(0), "")
    );
}

/// Verbose messages go only to an agent that asked for them.
#[test]
fn log_levels() {
    let namespace = Namespace::new("f");
    let mut agent = StandIn::greeted(&namespace);
    let mut ask = |level: &str| {
        let mut request =
            json!({"operation": "evaluate_promise", "promiser": "W", "attributes": hubs()});
        request["log_level"] = json!(level);
        let reply = agent.ask(request.to_string().as_bytes());
        reply["log"]
            .as_array()
            .unwrap()
            .iter()
            .map(|log| log["level"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(ask("error"), ["info"; 4]);
    assert_eq!(ask("info"), [""; 0]);
    assert_eq!(ask("verbose"), ["verbose"]);
    assert_eq!(ask("debug"), ["verbose"]);
}
