//! Real playbooks, with Debian's ansible-core and the newest one from `PyPI`.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use serde_json::{Value, json};

use crate::collection::collections;
use crate::lab::{Lab, Namespace, PROGRAM, VARIANTS, shown};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// `bin` directories of the releases; `tests/run.sh` makes the second.
pub fn releases() -> [String; 2] {
    ["/usr/bin".to_owned(), format!("{ROOT}/tests/.venv/bin")]
}

/// A directory from which Ansible takes the module.
fn library(namespace: &Namespace) -> String {
    let library = namespace.scratch().join("library");
    if !library.exists() {
        fs::create_dir(&library).unwrap();
        symlink(PROGRAM, library.join("iptables_balance")).unwrap();
        fs::copy(
            format!("{ROOT}/module-spec/ansible/iptables_balance.yml"),
            library.join("iptables_balance.yml"),
        )
        .unwrap();
    }
    library.to_str().unwrap().to_owned()
}

pub struct Played {
    pub text: String,
    pub success: bool,
}

impl Played {
    /// The number of that name in the recap.
    pub fn recap(&self, name: &str) -> u32 {
        let after = self
            .text
            .rsplit("PLAY RECAP")
            .next()
            .unwrap()
            .split(&format!("{name}="))
            .nth(1);
        let digits: String = after
            .unwrap_or_else(|| panic!("{}", self.text))
            .chars()
            .take_while(char::is_ascii_digit)
            .collect();
        digits.parse().unwrap()
    }
}

pub fn play(namespace: &Namespace, release: &str, playbook: &Path, options: &[&str]) -> Played {
    let program = format!("{release}/ansible-playbook");
    assert!(
        Path::new(&program).exists(),
        "{program} is missing; tests/run.sh installs it"
    );
    let library = format!("ANSIBLE_LIBRARY={}", library(namespace));
    // The collection comes from a package, which only its own examples need.
    let text = fs::read_to_string(playbook).unwrap();
    let collections = match text.contains("iptables_balance.gateway") {
        true => collections().to_str().unwrap(),
        false => "/nonexistent",
    };
    let collections = format!("ANSIBLE_COLLECTIONS_PATH={collections}");
    let programs = namespace.scratch().join("programs");
    let programs = format!("iptables_balance_directory={}", programs.display());
    let home = format!("HOME={}", namespace.scratch().display());
    let inventory = format!("{ROOT}/examples/ansible/inventory.ini");
    let environment = [
        "env",
        &library,
        &collections,
        &home,
        "ANSIBLE_NOCOLOR=1",
        "ANSIBLE_NOCOWS=1",
        "ANSIBLE_LOCALHOST_WARNING=0",
        "LC_ALL=C.UTF-8",
        &program,
    ];
    let output = namespace.feed(
        &[
            &environment[..],
            &[
                "-i",
                &inventory,
                "-e",
                &programs,
                playbook.to_str().unwrap(),
            ],
            options,
        ]
        .concat(),
        "",
    );
    Played {
        text: shown(&output),
        success: output.status.success(),
    }
}

fn play_example(namespace: &Namespace, release: &str, name: &str, options: &[&str]) -> Played {
    let played = play(
        namespace,
        release,
        &Path::new(ROOT).join("examples/ansible").join(name),
        options,
    );
    assert!(played.success, "{}", played.text);
    played
}

pub fn playbook(namespace: &Namespace, tasks: &Value) -> std::path::PathBuf {
    let path = namespace.scratch().join("playbook.yml");
    let play = json!([{"hosts": "gateways", "gather_facts": false, "tasks": tasks}]);
    fs::write(&path, play.to_string()).unwrap();
    path
}

#[test]
fn the_examples_do_what_they_say_and_then_nothing() {
    for release in releases() {
        let namespace = Namespace::new("a");
        for (name, chain) in [
            ("nth.yml", "CFENGINE"),
            ("random.yml", "WEB"),
            ("hash.yml", "SHOP"),
        ] {
            let predicted = play_example(&namespace, &release, name, &["--check", "--diff"]);
            assert_eq!(predicted.recap("changed"), 1);
            assert!(
                predicted.text.contains("+-A PREROUTING"),
                "{}",
                predicted.text
            );
            let untouched = namespace.run(&["iptables-save", "-t", "nat"]);
            assert!(!untouched.contains(chain), "{untouched}");
            let done = play_example(&namespace, &release, name, &["--diff"]);
            assert_eq!(done.recap("changed"), 1);
            let again = play_example(&namespace, &release, name, &["--diff"]);
            assert_eq!(again.recap("changed"), 0);
            if name == "nth.yml" {
                assert!(
                    again
                        .text
                        .contains("10.9.0.1 gets 25.00 % of the new connections"),
                    "{}",
                    again.text
                );
            }
        }
        assert_eq!(
            play_example(&namespace, &release, "absent.yml", &["--check"]).recap("changed"),
            1
        );
        assert_eq!(
            play_example(&namespace, &release, "absent.yml", &[]).recap("changed"),
            1
        );
        assert_eq!(
            play_example(&namespace, &release, "absent.yml", &[]).recap("changed"),
            0
        );
    }
}

/// Four servers that also say who asks, behind a gateway that forwards nothing.
fn closed_gateway() -> Lab {
    let mut lab = Lab::new();
    let servers = (1..=4).map(|n| format!("10.9.0.{n}:5308"));
    let servers: Vec<String> = servers.collect();
    let mut arguments = vec!["--peer"];
    arguments.extend(servers.iter().map(String::as_str));
    lab.servers.serve("tcp", &arguments);
    lab.gateway.forward(false);
    let closed = "*filter\n:FORWARD DROP [0:0]\nCOMMIT\n";
    lab.gateway.restore("iptables-restore", closed);
    lab
}

/// From a gateway that lets nothing through to one that balances.
#[test]
fn the_gateway_in_one_task() {
    for release in releases() {
        let mut lab = closed_gateway();
        lab.gateway = lab.gateway.with_etc_of_its_own();
        let gateway = &lab.gateway;
        gateway.add_units();
        let etc = gateway.etc.as_ref().unwrap();
        let rules = etc.join("iptables/iptables.rules");
        let play = |more: &[&str]| play_example(gateway, &release, "gateway.yml", more);
        let predicted = play(&["--check", "--diff"]);
        assert_eq!(predicted.recap("changed"), 1, "{}", predicted.text);
        assert!(
            predicted.text.contains("+net.ipv4.ip_forward = 1"),
            "{}",
            predicted.text
        );
        assert!(!rules.exists());
        assert_eq!(play(&[]).recap("changed"), 1);
        assert_eq!(play(&[]).recap("changed"), 0);
        assert!(
            fs::read_to_string(&rules)
                .unwrap()
                .contains("-j MASQUERADE")
        );
        assert!(etc.join("sysctl.d/zz-iptables_balance.conf").exists());
        let expected = (1..=4).map(|n| format!("10.9.0.{n} from 10.9.0.254"));
        let expected: Vec<String> = expected.collect();
        assert_eq!(lab.client.connect("tcp", "10.8.0.1:5308", 4), expected);
    }
}

/// All services of a gateway in one task.
#[test]
fn the_services_of_a_gateway_in_one_task() {
    for release in releases() {
        let lab = closed_gateway();
        let gateway = &lab.gateway;
        let play = |more: &[&str]| play_example(gateway, &release, "edge.yml", more);
        let predicted = play(&["--check", "--diff"]);
        assert_eq!(predicted.recap("changed"), 1, "{}", predicted.text);
        assert!(
            predicted.text.contains("+:EDGE/games - [0:0]"),
            "{}",
            predicted.text
        );
        assert_eq!(play(&["--diff"]).recap("changed"), 1);
        assert_eq!(play(&["--diff"]).recap("changed"), 0);
        let expected = (1..=4).map(|n| format!("10.9.0.{n} from 10.9.0.254"));
        let expected: Vec<String> = expected.collect();
        assert_eq!(lab.client.connect("tcp", "10.8.0.1:5308", 4), expected);
        let web = lab.client.connect("tcp", "10.8.0.1:80", 1);
        assert!(
            web[0].starts_with("10.9.0.1") || web[0].starts_with("10.9.0.2"),
            "{web:?}"
        );
    }
}

/// Stands in for systemd: it starts the command of the unit, and sends it SIGHUP.
const SYSTEMCTL: &str = r#"#!/bin/sh
unit=$(echo "$*" | grep -o "iptables_balance@[A-Z]*" | head -1); name=${unit#*@}; pid=$HERE/$name.pid
running() { [ -s "$pid" ] && kill -0 "$(cat "$pid")" 2>/dev/null; }
case "$*" in
  *show*) echo "Id=$unit.service"; echo LoadState=loaded; if running; then echo ActiveState=active; else echo ActiveState=inactive; fi;;
  *is-enabled*) [ -e "$HERE/enabled" ] && echo enabled || { echo disabled; exit 1; };;
  *enable*) touch "$HERE/enabled";;
  *daemon-reload*|*--version*) echo "systemd 252";;
  *reload*) kill -HUP "$(cat "$pid")";;
  *start*)
    command=$(sed -n "s|^ExecStart=/usr/sbin/|$HERE/|p" /etc/systemd/system/iptables_balance@.service | sed "s/%i/$name/")
    setsid $command >"$HERE/log" 2>&1 </dev/null & echo $! >"$pid";;
esac
"#;

#[test]
fn the_example_with_health_installs_a_watcher_and_reloads_it() {
    for release in releases() {
        let mut lab = Lab::new();
        lab.gateway = lab.gateway.with_etc_of_its_own();
        lab.servers
            .serve("tcp", &["10.9.0.1:5308", "10.9.0.3:5308"]);
        let gateway = &lab.gateway;
        let here = gateway.scratch().join("host");
        fs::create_dir(&here).unwrap();
        let systemctl = here.join("systemctl");
        fs::write(&systemctl, SYSTEMCTL).unwrap();
        fs::set_permissions(&systemctl, PermissionsExt::from_mode(0o755)).unwrap();
        let sbin = here.display();
        let options = format!(
            "{{\"program\": \"{PROGRAM}\", \"sbin\": \"{sbin}\", \"ansible_remote_tmp\": \"{sbin}\", \"ansible_python_interpreter\": \"/usr/bin/python3\"}}"
        );
        let path = format!("{sbin}:{}", std::env::var("PATH").unwrap());
        let environment =
            format!("{{\"play_environment\": {{\"PATH\": \"{path}\", \"HERE\": \"{sbin}\"}}}}");
        let text = fs::read_to_string(Path::new(ROOT).join("examples/ansible/health.yml")).unwrap();
        let text = text.replace("../../module-spec", &format!("{ROOT}/module-spec"));
        let text = text.replace(
            "  become: true\n",
            "  environment: \"{{ play_environment }}\"\n",
        );
        let playbook = gateway.scratch().join("health.yml");
        fs::write(&playbook, text).unwrap();
        let play_it = |more: &[&str]| {
            let played = play(
                gateway,
                &release,
                &playbook,
                &[&["-e", &options, "-e", &environment], more].concat(),
            );
            assert!(played.success, "{}", played.text);
            played
        };
        let kill = || {
            let pid = fs::read_to_string(here.join("EDGE.pid")).unwrap_or_default();
            std::process::Command::new("kill")
                .arg(pid.trim())
                .status()
                .ok();
        };
        assert!(play_it(&[]).recap("changed") >= 4);
        std::thread::sleep(std::time::Duration::from_millis(2500));
        let log = || fs::read_to_string(here.join("log")).unwrap();
        let answers = lab.client.connect("tcp", "10.8.0.1:5308", 2);
        let again = play_it(&[]);
        // Another request: the service reads it again.
        play_it(&[
            "-e",
            "{\"edge\": {\"name\": \"EDGE\", \"destination_port\": 5308, \"masquerade\": true, \"forward\": true, \"backends\": [\"10.9.0.3:5308\"]}}",
        ]);
        std::thread::sleep(std::time::Duration::from_millis(700));
        let moved = lab.client.connect("tcp", "10.8.0.1:5308", 1);
        kill();
        assert_eq!(answers, ["10.9.0.1", "10.9.0.1"], "{}", log());
        assert_eq!(again.recap("changed"), 0, "{}", again.text);
        assert_eq!(moved, ["10.9.0.3"], "{}", log());
        assert!(
            log().contains("backend `10.9.0.2:5308` is down"),
            "{}",
            log()
        );
    }
}

#[test]
fn loops_registered_results_and_strings_for_everything() {
    for (release, variant) in releases().iter().zip(VARIANTS) {
        let namespace = Namespace::new("a");
        let tasks = json!([
            {"name": "Strings", "iptables_balance": {
                "name": "{{ item }}", "variant": variant, "destination_port": "{{ 5300 + 8 }}", "wait": "{{ '7' }}", "mode": "random",
                "backends": "{{ hubs | map('regex_replace', '$', ':5308 weight=70') | list }}",
                "masquerade": "{{ 'no' }}", "forward": "False", "source": "{{ nothing | default(omit) }}", "in_interface": "{{ none }}" }
             , "loop": ["ONE", "TWO"], "vars": {"hubs": ["10.9.0.1", "10.9.0.2"]}, "register": "made", "when": "'2.14' not in ansible_version.full"},
            {"name": "Strings", "iptables_balance": {
                "name": "{{ item }}", "variant": variant, "destination_port": "{{ 5300 + 8 }}", "mode": "random",
                "backends": "{{ hubs | map('regex_replace', '$', ':5308 weight=70') | list }}" }
             , "loop": ["ONE", "TWO"], "vars": {"hubs": ["10.9.0.1", "10.9.0.2"]}, "register": "again"},
            {"name": "Key and value", "iptables_balance": format!("name=THREE variant={variant} destination_port=80 backends='10.9.0.1:81 weight=2,10.9.0.2:81' wait=5"), "register": "three"},
            {"ansible.builtin.assert": {"that": [
                "three.changed and not three.failed",
                "three.changes | map(attribute='action') | list == ['create_chain', 'append_rule', 'append_rule', 'append_rule']",
                "three.distribution[0].weight == 2 and (three.distribution[0].share - 2 / 3) | abs < 1e-9",
                "again.results | length == 2",
                "again.results[1].distribution[1].share == 0.5",
                format!("three.variant == '{variant}' and three.iptables_version is match('1[.]')"),
            ]}},
            {"name": "Nothing to do", "iptables_balance": {"chain": "THREE", "variant": variant, "destination_port": [80], "backends": {"0": "10.9.0.1:81 weight=2", "1": "10.9.0.2:81"}}, "register": "same"},
            {"ansible.builtin.assert": {"that": ["not same.changed", "same.changes == []", "same.diff is not defined"]}},
        ]);
        let played = play(&namespace, release, &playbook(&namespace, &tasks), &[]);
        assert!(played.success, "{}", played.text);
    }
}

#[test]
fn a_failure_says_what_and_where_and_changes_nothing() {
    for release in releases() {
        let namespace = Namespace::new("a");
        let tasks = json!([
            {"iptables_balance": {"name": "W", "destination_port": 80, "backends": [{"address": "10.9.0.1", "weigth": 2}]}, "register": "unknown", "ignore_errors": true},
            {"iptables_balance": {"name": "W", "destination_port": 80, "backends": ["10.9.0.1", {"address": "10.9.0.2", "weight": -1}]}, "register": "weight", "ignore_errors": true},
            {"ansible.builtin.assert": {"that": [
                "unknown.failed and unknown.msg == 'backends[0].weigth: there is no such attribute; the nearest is `weight`'",
                "weight.failed and weight.msg == 'backends[1].weight: `-1` is not between 0 and 2147483647'",
                "not weight.changed",
            ]}},
            {"iptables_balance": {"name": "W", "destination_port": 80, "backends": ["not an address"]}},
        ]);
        let played = play(&namespace, &release, &playbook(&namespace, &tasks), &[]);
        assert!(
            !played.success
                && played.text.contains(
                    "backends[0]: `not an address` is not of the form HOST[:PORT] [weight=N]"
                ),
            "{}",
            played.text
        );
        assert!(!namespace.dump("nft").contains(":W "));
    }
}

#[test]
fn the_documentation_is_shown_by_ansible_doc() {
    for release in releases() {
        let namespace = Namespace::new("a");
        let module_path = library(&namespace);
        let home = format!("HOME={}", namespace.scratch().display());
        let text = namespace.run(&[
            "env",
            &home,
            "LC_ALL=C.UTF-8",
            &format!("{release}/ansible-doc"),
            "-M",
            &module_path,
            "-j",
            "iptables_balance",
        ]);
        let documented: Value = serde_json::from_str(&text).unwrap();
        let module = &documented["iptables_balance"];
        let options = module["doc"]["options"].as_object().unwrap();
        assert_eq!(
            (options.len(), &options["wait"]["default"]),
            (28, &json!(10)),
            "{text}"
        );
        assert_eq!(options["mode"]["choices"], json!(["nth", "random", "hash"]));
        assert_eq!(
            options["backends"]["suboptions"].as_object().unwrap().len(),
            4
        );
        assert_eq!(
            module["return"]["changes"]["contains"]
                .as_object()
                .unwrap()
                .len(),
            6
        );
        assert!(
            module["examples"]
                .as_str()
                .unwrap()
                .contains("- name: Balance port 5308")
        );
    }
}

#[test]
fn a_playbook_balances_real_connections() {
    let mut lab = Lab::new();
    lab.servers.serve(
        "tcp",
        &[
            "10.9.0.1:5308",
            "10.9.0.2:5308",
            "10.9.0.3:5308",
            "10.9.0.4:5308",
        ],
    );
    play_example(&lab.gateway, &releases()[0], "nth.yml", &[]);
    let answers = lab.client.connect("tcp", "10.8.0.1:5308", 40);
    let expected: Vec<String> = (0..40).map(|n| format!("10.9.0.{}", n % 4 + 1)).collect();
    assert_eq!(answers, expected);
}

/// The protocol itself, without Ansible: one line, nothing on standard error,
/// and only the exit codes 0 and 1.
#[test]
fn the_module_protocol() {
    let namespace = Namespace::new("a");
    let file = namespace.scratch().join("args");
    let answer = |text: &[u8]| {
        fs::write(&file, text).unwrap();
        let output = namespace.feed(&[PROGRAM, file.to_str().unwrap()], "");
        assert!(
            output.stderr.is_empty()
                && output.stdout.iter().filter(|byte| **byte == b'\n').count() == 1,
            "{}",
            shown(&output)
        );
        let reply: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(
            output.status.code(),
            Some(i32::from(reply["failed"] == json!(true)))
        );
        reply
    };
    let mut arguments = json!({
        "name": "W", "destination_port": 80, "backends": ["10.9.0.1"], "_ansible_check_mode": true, "_ansible_diff": true,
        "_ansible_no_log": false, "_ansible_version": "2.99.0", "_ansible_something_new": {"a": [1]}, "_ansible_tmpdir": null,
    });
    let predicted = answer(arguments.to_string().as_bytes());
    assert_eq!(
        (&predicted["changed"], predicted["diff"]["before"].as_str()),
        (&json!(true), Some(""))
    );
    assert!(
        !namespace.dump("nft").contains(":W "),
        "check mode changes nothing"
    );
    arguments["_ansible_check_mode"] = json!(false);
    arguments["_ansible_diff"] = json!(false);
    let done = answer(arguments.to_string().as_bytes());
    assert_eq!(
        (&done["changes"], done.get("diff")),
        (&predicted["changes"], None)
    );
    for (text, expected) in [
        (&b"not json"[..], "the arguments are not JSON"),
        (b"[]", "the arguments are not a JSON object"),
        (
            b"{\"name\": \"W\", \"x\": Infinity}",
            "the arguments are not JSON",
        ),
        (b"{\"name\": \"\xff\"}", "the arguments are not JSON"),
        (
            b"{\"check\": true, \"name\": \"W\", \"state\": \"absent\"}",
            "check: there is no such attribute",
        ),
    ] {
        let reply = answer(text);
        assert!(reply["msg"].as_str().unwrap().contains(expected), "{reply}");
    }
    fs::remove_file(&file).unwrap();
    let output = namespace.feed(&[PROGRAM, file.to_str().unwrap()], "");
    assert!(
        String::from_utf8(output.stdout)
            .unwrap()
            .contains("cannot read the arguments in")
    );
}
