//! The program as it is started: by a person, by a script, by plain JSON.

use std::fs;
use std::io::Write;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use crate::lab::{Namespace, PROGRAM, VARIANTS, shown};

const NTH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/json/nth.json");

/// Without any right, and where there is no iptables.
fn started(arguments: &[&str], input: &str) -> Output {
    let mut command = Command::new(PROGRAM);
    command
        .args(arguments)
        .env("PATH", "/nonexistent")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).ok();
    child.wait_with_output().unwrap()
}

fn texts(output: &Output) -> (i32, &str, &str) {
    let text = |bytes| std::str::from_utf8(bytes).unwrap();
    (
        output.status.code().unwrap(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

#[test]
fn plan_needs_neither_root_nor_iptables() {
    let output = started(&["plan", NTH], "");
    let expected = "*nat\n:CFENGINE - [0:0]\n\
        -A CFENGINE -p tcp -m statistic --mode nth --every 4 --packet 0 -j DNAT --to-destination 10.9.0.1:5308\n\
        -A CFENGINE -p tcp -m statistic --mode nth --every 3 --packet 0 -j DNAT --to-destination 10.9.0.2:5308\n\
        -A CFENGINE -p tcp -m statistic --mode nth --every 2 --packet 0 -j DNAT --to-destination 10.9.0.3:5308\n\
        -A CFENGINE -p tcp -j DNAT --to-destination 10.9.0.4:5308\n\
        -A PREROUTING -p tcp -m tcp --dport 5308 -j CFENGINE\nCOMMIT\n";
    assert_eq!(texts(&output), (0, expected, ""));
}

#[test]
fn plan_with_a_dump_is_the_difference_and_nothing_when_there_is_none() {
    let scratch = tempfile::tempdir().unwrap();
    let dump = scratch.path().join("dump");
    let (_, text, _) = {
        let output = started(&["plan", NTH], "");
        (0, String::from_utf8(output.stdout).unwrap(), 0)
    };
    fs::write(&dump, text.replace("10.9.0.2", "10.9.0.9")).unwrap();
    let output = started(&["plan", NTH, "--current", dump.to_str().unwrap()], "");
    assert_eq!(
        texts(&output).1,
        "*nat\n-R CFENGINE 2 -p tcp -m statistic --mode nth --every 3 --packet 0 -j DNAT --to-destination 10.9.0.2:5308\nCOMMIT\n"
    );
    fs::write(&dump, &text).unwrap();
    assert_eq!(
        texts(&started(
            &["plan", NTH, "--current", dump.to_str().unwrap()],
            ""
        )),
        (0, "", "")
    );
    fs::write(&dump, text.replace("COMMIT\n", "")).unwrap();
    let output = started(&["plan", NTH, "--current", dump.to_str().unwrap()], "");
    assert_eq!(
        texts(&output),
        (
            2,
            "",
            "iptables_balance: the dump is truncated: table `nat` has no COMMIT\n"
        )
    );
}

#[test]
fn plan_of_both_families_says_which_is_which() {
    let request = r#"{"name": "W", "destination_port": 80, "backends": "192.0.2.1,2001:db8::1"}"#;
    let output = started(&["plan", "-"], request);
    let (_, both, _) = texts(&output);
    assert!(
        both.starts_with("# ipv4\n*nat\n") && both.contains("COMMIT\n# ipv6\n*nat\n"),
        "{both}"
    );
    let output = started(&["plan", "-", "--family", "ipv6"], request);
    assert!(
        texts(&output)
            .1
            .starts_with("*nat\n:W - [0:0]\n-A W -p tcp -j DNAT --to-destination 2001:db8::1\n")
    );
    let output = started(&["plan", "-", "--current", "/dev/null"], request);
    assert_eq!(
        texts(&output),
        (
            2,
            "",
            "iptables_balance: both families are in use; say with --family whose dump --current is\n"
        )
    );
}

#[test]
fn bad_usage_and_bad_requests_are_exit_code_2_on_standard_error() {
    for (arguments, input, expected) in [
        (
            &["plann", "x"][..],
            "",
            "unrecognized subcommand 'plann'; some similar subcommands exist: 'explain', 'plan'",
        ),
        (&["plan"], "", "arguments were not provided: <REQUEST>"),
        (
            &["plan", "-", "-"],
            r#"{"name": "W", "state": "absent"}"#,
            "unexpected argument",
        ),
        (
            &["apply", "-", "--exit-code"],
            r#"{"name": "W", "state": "absent"}"#,
            "unexpected argument '--exit-code'",
        ),
        (&["plan", "missing.json"], "", "cannot read `missing.json`"),
        (
            &["plan", "-", "--family", "ipx"],
            r#"{"name": "W", "state": "absent"}"#,
            "invalid value 'ipx' for '--family <FAMILY>'; [possible values: ipv4, ipv6]",
        ),
        (&["check", "-"], "[]", "the request is not a JSON object"),
        (
            &["check", "-"],
            "{\"name\": \"W\", \"name\": \"V\"}",
            "the key `name` is there twice",
        ),
        (
            &["apply", "-"],
            r#"{"name": "W", "destination_port": 80, "backends": [{"address": "192.0.2.1", "weight": -1}]}"#,
            "backends[0].weight: `-1` is not between 0 and 2147483647",
        ),
        (
            &["schema", "both"],
            "",
            "invalid value 'both' for '<KIND>'; [possible values: request, result, ",
        ),
        (&["--frobnicate"], "", "unexpected argument '--frobnicate'"),
    ] {
        let output = started(arguments, input);
        let (code, out, errors) = texts(&output);
        assert_eq!((code, out), (2, ""), "{arguments:?}: {}", shown(&output));
        assert!(
            errors.contains(expected) && errors.lines().count() == 1,
            "{errors}"
        );
    }
}

#[test]
fn help_and_version() {
    let output = started(&["--version"], "");
    assert_eq!(
        texts(&output),
        (
            0,
            concat!("iptables_balance ", env!("CARGO_PKG_VERSION"), "\n"),
            ""
        )
    );
    for (arguments, expected) in [
        (&["--help"][..], "Exit codes: 0 done"),
        (&["-h"], "Show the changes that `apply` would make"),
        (&["help"], "Usage: iptables_balance <COMMAND>"),
        (&["plan", "--help"], "--current <DUMP>"),
        (&["check", "-h"], "--exit-code"),
    ] {
        let output = started(arguments, "");
        let (code, out, errors) = texts(&output);
        assert!(
            code == 0 && out.contains(expected) && errors.is_empty(),
            "{out}{errors}"
        );
    }
}

#[test]
fn without_iptables_it_says_what_to_install() {
    let namespace = Namespace::new("e");
    // /usr/sbin is always searched, so it is hidden behind an empty directory.
    let empty = namespace.scratch().join("empty");
    fs::create_dir(&empty).unwrap();
    let script = format!(
        "mount --bind {0} /usr/sbin && mount --bind {0} /sbin && exec {PROGRAM}",
        empty.display()
    );
    let output = namespace.feed(
        &[
            "env",
            "PATH=/usr/bin:/bin",
            "unshare",
            "--mount",
            "sh",
            "-c",
            &script,
        ],
        &fs::read_to_string(NTH).unwrap(),
    );
    let result: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", shown(&output)));
    let msg = result["msg"].as_str().unwrap();
    assert!(
        msg.starts_with("there is no `iptables-save` in PATH")
            && msg.contains("install the package `iptables`"),
        "{msg}"
    );
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn check_exits_3_only_when_asked_to_and_changes_nothing() {
    for variant in VARIANTS {
        let namespace = Namespace::new("a");
        let request = namespace.scratch().join("request.json");
        fs::write(&request, json!({"name": "W", "variant": variant, "destination_port": 80, "backends": "10.9.0.1,10.9.0.2"}).to_string()).unwrap();
        let file = request.to_str().unwrap();
        let code = |arguments: &[&str]| namespace.feed(arguments, "").status.code().unwrap();
        let before = namespace.dump(variant);
        assert_eq!(
            (
                code(&[PROGRAM, "check", file]),
                code(&[PROGRAM, "check", file, "--exit-code"])
            ),
            (0, 3)
        );
        assert_eq!(namespace.dump(variant), before);
        let output = namespace.feed(&[PROGRAM, "apply", file], "");
        let (exit, out, errors) = texts(&output);
        assert_eq!((exit, errors), (0, ""));
        for line in [
            "--- W (before)\n",
            "+-A PREROUTING -p tcp -m tcp --dport 80 -j W\n",
            "10.9.0.1       1   50.0000 %\n",
            "the balancer `W` was set up over 2 backends, with 4 changes\n",
        ] {
            assert!(out.contains(line), "{line}{out}");
        }
        assert!(!out.contains('\x1b'), "a pipe gets no colours");
        assert_eq!(
            (
                code(&[PROGRAM, "check", file]),
                code(&[PROGRAM, "check", file, "--exit-code"])
            ),
            (0, 0)
        );
    }
}

#[test]
fn at_a_terminal_there_are_colours_and_bars() {
    let namespace = Namespace::new("t");
    let command = format!("{PROGRAM} check {NTH}");
    let typed = |environment: &[&str]| {
        let arguments = [
            &["env", "TERM=xterm"],
            environment,
            &["script", "-qec", &command, "/dev/null"],
        ]
        .concat();
        namespace.run(&arguments)
    };
    let coloured = typed(&[]);
    assert!(
        coloured.contains("\x1b[32m+-A PREROUTING") && coloured.contains('█'),
        "{coloured}"
    );
    assert!(!typed(&["NO_COLOR=1"]).contains('\x1b'));
    let help = namespace.run(&["script", "-qec", PROGRAM, "/dev/null"]);
    assert!(help.contains("Usage:"), "{help}");
}

#[test]
fn plain_json_answers_with_one_line_and_exit_code_1_when_it_failed() {
    for (input, expected) in [
        ("", "the request is not JSON: EOF"),
        ("{\"name\": NaN}", "the request is not JSON"),
        ("nonsense", "the request is not JSON"),
        (
            "{\"name\": \"W\", \"check\": \"perhaps\"}",
            "check: `perhaps` is neither true nor false",
        ),
        (
            "{\"name\": \"W\", \"_ansible_check_mode\": true}",
            "_ansible_check_mode: there is no such attribute",
        ),
    ] {
        let output = started(&[], input);
        let result: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(
            result["msg"].as_str().unwrap().contains(expected),
            "{result}"
        );
        assert_eq!(
            (
                result["failed"].clone(),
                result["changed"].clone(),
                output.status.code()
            ),
            (json!(true), json!(false), Some(1))
        );
        assert_eq!(
            output.stdout.iter().filter(|byte| **byte == b'\n').count(),
            1
        );
        assert!(output.stderr.is_empty());
    }
    let deep = format!("{}{}", "{\"name\":".repeat(50_000), "}".repeat(50_000));
    assert_eq!(started(&[], &deep).status.code(), Some(1));
}

#[test]
fn results_match_the_schema() {
    let schema = serde_json::from_str(&iptables_balance::frontend::schema::text(
        iptables_balance::frontend::schema::Kind::Result,
    ));
    let results = jsonschema::validator_for(&schema.unwrap()).unwrap();
    let namespace = Namespace::new("x");
    for request in [
        json!({"name": "W", "destination_port": 80, "backends": "10.9.0.1,[fd09::1]:80", "diff": true}),
        json!({"name": "W", "destination_port": 80, "mode": "random", "backends": "10.9.0.2,10.9.0.1", "check": true}),
        json!({"name": "W", "state": "absent"}),
        json!({"name": "W", "state": "gone"}),
        json!({}),
    ] {
        let result = namespace.ask(&request);
        let errors: Vec<String> = results
            .iter_errors(&result)
            .map(|error| error.to_string())
            .collect();
        assert_eq!(errors, [""; 0], "{result}");
    }
}
