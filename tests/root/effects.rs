//! The processes that a run starts, and the state that a failure leaves.

use std::fs;
use std::io::Write;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::lab::{Namespace, PROGRAM, VARIANTS, restore_of_ipv6, shown};

fn hubs(variant: &str, backends: &str) -> Value {
    json!({"name": "W", "variant": variant, "destination_port": 80, "backends": backends})
}

/// The programs that a run starts, itself left out, in order of time.
fn started(namespace: &Namespace, request: &Value) -> Vec<String> {
    let traces = namespace.scratch().join("traces");
    fs::create_dir_all(&traces).unwrap();
    let file = traces.join("trace");
    let strace = [
        "strace",
        "-ff",
        "-s",
        "999",
        "-ttt",
        "-e",
        "trace=execve",
        "-o",
        file.to_str().unwrap(),
    ];
    let output = namespace.feed(&[&strace[..], &[PROGRAM]].concat(), &request.to_string());
    assert!(output.status.success(), "{}", shown(&output));
    let texts = fs::read_dir(&traces)
        .unwrap()
        .map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap());
    let mut lines: Vec<String> = texts
        .flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>())
        .collect();
    fs::remove_dir_all(&traces).unwrap();
    lines.retain(|line| line.contains("execve(") && line.ends_with(" = 0"));
    lines.sort_unstable();
    let command = |line: &String| {
        let arguments = line.split_once('[').unwrap().1.split_once(']').unwrap().0;
        let words: Vec<&str> = arguments
            .split(", ")
            .map(|word| word.trim_matches('"'))
            .collect();
        words
            .join(" ")
            .replace("/usr/sbin/", "")
            .replace("-nft-", "-")
            .replace("-legacy-", "-")
    };
    lines.iter().map(command).skip(1).collect()
}

/// Only iptables-legacy has a lock to wait for.
fn lock(variant: &str) -> &'static str {
    match variant {
        "legacy" => " -w 10",
        _ => "",
    }
}

#[test]
fn nothing_to_do_is_one_save_for_each_family_in_use() {
    for variant in VARIANTS {
        let namespace = Namespace::new("p");
        let ipv4 = hubs(variant, "10.9.0.1,10.9.0.2");
        let restore = format!("iptables-restore --noflush{}", lock(variant));
        assert_eq!(
            started(&namespace, &ipv4),
            [&restore, "iptables-save -t nat"],
            "{variant}: no table, no need to read it, nor to look at the rules around it"
        );
        assert_eq!(
            started(&namespace, &ipv4),
            ["iptables-save -t nat"],
            "{variant}"
        );

        let both = hubs(variant, "10.9.0.1,fd09::1");
        namespace.apply(&both);
        let mut programs = started(&namespace, &both);
        programs.sort_unstable();
        assert_eq!(
            programs,
            ["ip6tables-save -t nat", "iptables-save -t nat"],
            "{variant}"
        );
    }
}

#[test]
fn the_rules_around_a_new_balancer_are_read_before_it_is_written() {
    for variant in VARIANTS {
        let namespace = Namespace::new("p");
        let program = format!("iptables-{variant}-restore");
        namespace.restore(&program, "*nat\n-A PREROUTING -p udp -j ACCEPT\nCOMMIT\n");
        let programs = started(&namespace, &hubs(variant, "10.9.0.1"));
        let at = |is_meant: &dyn Fn(&str) -> bool| {
            let mut programs = programs.iter();
            programs.position(|program| is_meant(program))
        };
        let around = at(&|program| program == "iptables-save -c");
        let restore = at(&|program| program.starts_with("iptables-restore"));
        assert!(around.is_some() && around < restore, "{programs:?}");
        assert_eq!(
            programs.last().unwrap(),
            "iptables-save -t nat",
            "{programs:?}"
        );

        // A balancer that is there already costs none.
        let programs = started(&namespace, &hubs(variant, "10.9.0.1,10.9.0.2"));
        assert!(
            !programs.contains(&"iptables-save -c".to_owned()),
            "{programs:?}"
        );
    }
}

#[test]
fn a_change_is_one_restore_for_each_family() {
    for variant in VARIANTS {
        let namespace = Namespace::new("p");
        namespace.apply(&hubs(variant, "10.9.0.1,fd09::1"));
        let programs = started(&namespace, &hubs(variant, "10.9.0.2,fd09::2"));
        let restores: Vec<&String> = programs
            .iter()
            .filter(|program| program.contains("restore"))
            .collect();
        assert_eq!(
            restores,
            ["iptables", "ip6tables"]
                .map(|program| format!("{program}-restore --noflush{}", lock(variant)))
                .each_ref(),
            "{variant}"
        );
    }
}

/// A request that is not the kept one is expected to change something, so the first
/// dump has the counters, and is the only one before the write.
#[test]
fn an_expected_change_reads_once_before_and_once_after() {
    for variant in VARIANTS {
        let namespace = Namespace::new("p").with_etc_of_its_own();
        let etc = namespace.scratch().join("etc");
        fs::write(etc.join("nsswitch.conf"), "hosts: files\n").unwrap();
        fs::write(etc.join("hosts"), "10.9.0.6 hub.test\n").unwrap();
        let restore = format!("iptables-restore --noflush{}", lock(variant));
        let save = "iptables-save -t nat".to_owned();
        let with_counters = "iptables-save -c -t nat".to_owned();
        let expected = [&with_counters, &restore, &save];
        let unexpected = [&save, &with_counters, &restore, &save];
        let old_counters = [&with_counters, &with_counters, &restore, &save];
        let started = |request: &Value| started(&namespace, request);

        namespace.apply(&hubs(variant, "10.9.0.1,10.9.0.2"));
        let other = hubs(variant, "10.9.0.1,10.9.0.3");
        assert_eq!(
            started(&other).iter().collect::<Vec<_>>(),
            expected,
            "{variant}"
        );

        namespace.run(&[&format!("iptables-{variant}"), "-t", "nat", "-D", "W", "1"]);
        let again = started(&other);
        assert_eq!(
            again.iter().collect::<Vec<_>>(),
            unexpected,
            "{variant}: others wrote"
        );

        // Nobody waits for the lock, and counters do not grow old, while a backend is
        // probed or a name looked up.
        let mut probed = hubs(variant, "10.9.0.1,10.9.0.4");
        probed["health"] = json!({"port": 9, "timeout": 0.1, "fall": 1});
        let named = hubs(variant, "10.9.0.1,hub.test");
        for slow in [probed, named] {
            let programs = started(&slow);
            assert_eq!(
                programs.iter().collect::<Vec<_>>(),
                old_counters,
                "{variant} {slow}"
            );
        }
    }
}

/// A run keeps nobody waiting while it looks up a name.
#[test]
fn nobody_waits_for_a_run_that_looks_up_a_name() {
    for variant in VARIANTS {
        let mut namespace = Namespace::new("p").with_etc_of_its_own();
        let etc = namespace.scratch().join("etc");
        fs::write(etc.join("nsswitch.conf"), "hosts: dns\n").unwrap();
        fs::write(
            etc.join("resolv.conf"),
            "nameserver 127.0.0.1\noptions timeout:4 attempts:1\n",
        )
        .unwrap();
        // It takes the questions and never answers.
        let silent = "import socket, time; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); \
             s.bind(('127.0.0.1', 53)); print('ready', flush=True); time.sleep(60)";
        namespace.start(&["python3", "-c", silent]);
        let mut slow = namespace
            .command(&[PROGRAM])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let request = hubs(variant, "hub.test").to_string();
        slow.stdin
            .take()
            .unwrap()
            .write_all(request.as_bytes())
            .unwrap();
        thread::sleep(Duration::from_millis(500));
        let mut quick = hubs(variant, "10.9.0.1");
        quick["name"] = json!("Q");
        quick["wait"] = json!(1);
        namespace.apply(&quick);
        assert!(
            slow.try_wait().unwrap().is_none(),
            "{variant}: it still waits for the answer"
        );
        let output = slow.wait_with_output().unwrap();
        let message = String::from_utf8(output.stdout).unwrap();
        assert!(message.contains("`hub.test` does not resolve"), "{message}");
    }
}

/// The dump serves a change only as long as it is true, or else the verification
/// notices: the outcome is right, and foreign rules stay.
#[test]
fn rules_that_others_change_after_the_dump_are_noticed() {
    let save_of = |variant| match variant {
        "nft" => "iptables-save",
        _ => "iptables-legacy-save",
    };
    let before = "-I PREROUTING -s 192.0.2.7 -j RETURN";
    let others = [
        "-F W",
        "-I W -s 192.0.2.9 -p tcp -j RETURN",
        "-D PREROUTING -p tcp -m tcp --dport 80 -j W",
        before,
    ];
    for (variant, other) in VARIANTS
        .into_iter()
        .flat_map(|variant| others.map(|other| (variant, other)))
    {
        let namespace = Namespace::new("o");
        namespace.apply(&hubs(variant, "10.9.0.1,10.9.0.2"));
        let once = namespace.scratch().join("once");
        let asked_for = namespace.scratch().join("dumps");
        let save = save_of(variant);
        let script = format!(
            "#!/bin/sh\n/usr/sbin/{save} \"$@\" || exit\n[ \"$1\" = --version ] && exit\n\
             echo \"$@\" >>{}; mkdir {} 2>/dev/null && /usr/sbin/iptables-{variant} -t nat {other}\nexit 0\n",
            asked_for.display(),
            once.display()
        );
        let wanted = hubs(variant, "10.9.0.3,10.9.0.2,10.9.0.4");
        let mut asked = wanted.clone();
        if variant == "nft" {
            // The plain names are those of nft.
            asked.as_object_mut().unwrap().remove("variant");
        }
        let result = namespace.ask_with_stand_ins(&[(save, &script)], &asked);
        assert_eq!(
            result["failed"],
            json!(false),
            "{variant} {other}: {result}"
        );
        assert!(once.exists());
        if variant == "nft" {
            // The kernel has counted a change, so the dump is not believed.
            let dumps = fs::read_to_string(&asked_for).unwrap();
            let dumps: Vec<&str> = dumps.lines().collect();
            assert_eq!(dumps, ["-c -t nat", "-c -t nat", "-t nat"], "{other}");
        }
        let again = namespace.apply(&wanted);
        assert_eq!(again["changed"], json!(false), "{variant} {other}: {again}");
        if other == before {
            let dump = namespace.dump(variant);
            assert!(
                dump.contains("-A PREROUTING -s 192.0.2.7/32 -j RETURN"),
                "{dump}"
            );
        }
    }
}

#[test]
fn when_the_second_family_fails_the_first_is_put_back() {
    for variant in VARIANTS {
        let namespace = Namespace::new("u");
        let program = format!("iptables-{variant}-restore");
        namespace.restore(&program, "*nat\n-A PREROUTING -p udp -j ACCEPT\nCOMMIT\n");
        namespace.apply(&hubs(variant, "10.9.0.1,10.9.0.2,fd09::1"));
        namespace.restore(&program, "*nat\n-A PREROUTING -p sctp -j ACCEPT\n-R W 1 -c 5 300 -p tcp -m statistic --mode nth --every 2 --packet 0 -j DNAT --to-destination 10.9.0.1\nCOMMIT\n");
        let before = namespace.dump(variant);
        let mut other = hubs(variant, "10.9.0.3,10.9.0.1,fd09::2");
        other["destination_port"] = json!("81:90");
        for (script, expected) in [
            (
                "#!/bin/sh\necho 'out of order' >&2\nexit 3\n",
                "(exit code 3): out of order; the host is as before",
            ),
            (
                "#!/bin/sh\ncat > /dev/null\nexit 0\n",
                "reading them again shows something else",
            ),
            (
                "#!/bin/sh\nkill -9 $$\n",
                "(ended by a signal); the host is as before",
            ),
        ] {
            let result =
                namespace.ask_with_stand_ins(&[(restore_of_ipv6(variant), script)], &other);
            let msg = result["msg"].as_str().unwrap();
            assert!(
                msg.contains(expected) && msg.ends_with("; the host is as before"),
                "{variant}: {msg}"
            );
            assert_eq!(
                (&result["failed"], &result["changed"], &result["changes"]),
                (&json!(true), &json!(false), &json!([]))
            );
            assert_eq!(namespace.dump(variant), before, "{variant}");
        }
        assert_eq!(namespace.apply(&other)["changed"], json!(true));
    }
}

#[test]
fn a_refused_line_is_quoted() {
    let namespace = Namespace::new("q");
    let mut request = hubs("legacy", "10.9.0.1");
    request["destination_port"] = json!(80);
    let script =
        "#!/bin/sh\nsed 's/-m tcp/-m nonesuch/' | exec /usr/sbin/iptables-legacy-restore \"$@\"\n";
    let result = namespace.ask_with_stand_ins(&[("iptables-legacy-restore", script)], &request);
    let msg = result["msg"].as_str().unwrap();
    assert!(
        msg.contains("at `-A PREROUTING -p tcp -m tcp --dport 80 -j W`"),
        "{msg}"
    );
}

#[test]
fn a_lock_held_too_long_is_an_error_of_its_own() {
    let namespace = Namespace::new("w");
    let lock = namespace.scratch().join("xtables.lock");
    let mut request = hubs("legacy", "10.9.0.1");
    request["wait"] = json!(1);
    let script = format!("exec 9>{0}; flock 9; {PROGRAM} 9>&-", lock.display());
    let output = namespace.feed(&["sh", "-c", &script], &request.to_string());
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    let msg = result["msg"].as_str().unwrap();
    assert!(
        msg.contains("another program held the xtables lock for more than 1 s (attribute `wait`)"),
        "{msg}"
    );
}

#[test]
fn a_dump_that_is_cut_off_is_not_acted_on() {
    for variant in VARIANTS {
        let namespace = Namespace::new("z");
        namespace.apply(&hubs(variant, "10.9.0.1"));
        let before = namespace.dump(variant);
        let name = format!("iptables-{variant}-save");
        let script = format!(
            "#!/bin/sh\n[ \"$1\" = --version ] && exec /usr/sbin/{name} --version\n/usr/sbin/{name} \"$@\" | head -n 5\n"
        );
        let name = if variant == "nft" {
            "iptables-save"
        } else {
            name.as_str()
        };
        let result = namespace.ask_with_stand_ins(&[(name, &script)], &hubs(variant, "10.9.0.2"));
        assert!(
            result["msg"]
                .as_str()
                .unwrap()
                .contains("the dump is truncated: table `nat` has no COMMIT; nothing was changed"),
            "{result}"
        );
        assert_eq!(namespace.dump(variant), before);
    }
}

/// As an ordinary user, and as root in a container that may do little.
#[test]
fn without_the_right_it_says_so_and_changes_nothing() {
    const USER: &[&str] = &["setpriv", "--reuid=65534", "--clear-groups"];
    const CONTAINER: &[&str] = &[
        "unshare",
        "--mount",
        "sh",
        "-c",
        "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && exec \"$@\"",
        "-",
        "setpriv",
    ];
    for variant in VARIANTS {
        let namespace = Namespace::new("y");
        for changed in [json!(true), json!(false)] {
            let before = namespace.dump(variant);
            for (surroundings, rights) in [(USER, "-all"), (CONTAINER, "-net_admin")] {
                let (bounds, inherited) = (
                    format!("--bounding-set={rights}"),
                    format!("--inh-caps={rights}"),
                );
                let command = [surroundings, &[&bounds, &inherited, PROGRAM]].concat();
                let request = hubs(variant, "10.9.0.1,10.9.0.2");
                let output = namespace.feed(&command, &request.to_string());
                let result: Value = serde_json::from_slice(&output.stdout)
                    .unwrap_or_else(|_| panic!("{}", shown(&output)));
                assert_eq!(
                    (&result["failed"], &result["changed"]),
                    (&json!(true), &json!(false)),
                    "{result}"
                );
                let message = result["msg"].as_str().unwrap();
                assert!(
                    message.contains("needs the capability CAP_NET_ADMIN")
                        && message.contains("does not have CAP_NET_ADMIN"),
                    "{message}"
                );
                assert_eq!(namespace.dump(variant), before);
            }
            // Then the same where there are rules already.
            let other = namespace.apply(&hubs(variant, "10.9.0.3"));
            assert_eq!(other["changed"], changed);
        }
    }
}

/// Rules that others write right after a run are corrected, and reported too.
#[test]
fn the_report_merges_all_attempts() {
    let namespace = Namespace::new("o");
    let script = format!(
        "#!/bin/sh\n/usr/sbin/iptables-restore \"$@\" || exit\n\
         mkdir {}/once 2>/dev/null && /usr/sbin/iptables -t nat -I W -s 192.0.2.9 -p tcp -j RETURN\nexit 0\n",
        namespace.scratch().display()
    );
    let mut request = hubs("nft", "10.9.0.1,10.9.0.2");
    request.as_object_mut().unwrap().remove("variant");
    let result = namespace.ask_with_stand_ins(&[("iptables-restore", &script)], &request);
    assert_eq!(result["failed"], json!(false), "{result}");
    let changes = result["changes"].as_array().unwrap();
    let actions: Vec<&str> = changes
        .iter()
        .map(|change| change["action"].as_str().unwrap())
        .collect();
    assert_eq!(
        actions,
        [
            "create_chain",
            "append_rule",
            "append_rule",
            "append_rule",
            "delete_rule"
        ]
    );
    assert_eq!(
        changes[4]["rule"],
        json!("-s 192.0.2.9/32 -p tcp -j RETURN")
    );
    let message = result["msg"].as_str().unwrap();
    assert!(message.ends_with("with 5 changes"), "{message}");
    assert_eq!(namespace.apply(&request)["changed"], json!(false));
}

/// After a failure the shares are those that the rules give which are there.
#[test]
fn after_a_failure_shares_are_of_what_is_left() {
    for variant in VARIANTS {
        let namespace = Namespace::new("u");
        namespace.apply(&hubs(variant, "10.9.0.1,10.9.0.2"));
        let other = hubs(variant, "10.9.0.2,10.9.0.3,10.9.0.4,10.9.0.5,fd09::1");
        let shares = |result: &Value| {
            let shares = result["distribution"].as_array().unwrap().iter();
            shares
                .map(|one| one["share"].as_f64().unwrap())
                .collect::<Vec<_>>()
        };
        let refuses = "#!/bin/sh\ncat >/dev/null\nexit 1\n";
        let ipv6 = (restore_of_ipv6(variant), refuses);
        let undone = namespace.ask_with_stand_ins(&[ipv6], &other);
        let message = undone["msg"].to_string();
        assert!(message.contains("the host is as before"), "{message}");
        assert_eq!(shares(&undone), [0.5, 0.0, 0.0, 0.0, 0.0], "{undone}");

        // The first is written, and from then on nothing.
        let name = restore_of_ipv6(variant).replace("ip6tables", "iptables");
        let once = format!(
            "#!/bin/bash\nmkdir {}/once 2>/dev/null || exit 1\nexec /usr/sbin/{name} \"$@\"\n",
            namespace.scratch().display()
        );
        let left = namespace.ask_with_stand_ins(&[ipv6, (&name, &once)], &other);
        let message = left["msg"].to_string();
        assert!(message.contains("undoing it failed too"), "{message}");
        assert_eq!(shares(&left), [0.25, 0.25, 0.25, 0.25, 0.0], "{left}");
    }
}

/// Beside 300 entries of others, one filtered list is enough to end the
/// connection of a removed backend.
#[test]
fn ending_connections_lists_only_those_of_the_removed_backend_and_once() {
    for variant in VARIANTS {
        let namespace = Namespace::new("d");
        let request = |backends: &str| json!({"name": "W", "variant": variant, "protocol": "udp", "destination_port": 53, "backends": backends});
        namespace.apply(&request("10.9.0.1,10.9.0.2"));
        let script = "for n in $(seq $1 $2); do conntrack -I -p udp -s 10.8.0.2 -d 10.8.0.1 --sport $((4000 + n)) \
            --dport 53 --dst-nat $3 -t 600 >/dev/null 2>&1 || exit; done";
        namespace.run(&["sh", "-c", script, "-", "1", "300", "10.9.0.1"]);
        namespace.run(&["sh", "-c", script, "-", "301", "301", "10.9.0.2"]);
        let log = namespace.scratch().join("netlink");
        let calls = ["-e", "trace=sendto,recvfrom", "-o", log.to_str().unwrap()];
        let strace = [&["strace"], &calls[..], &[PROGRAM]].concat();
        let output = namespace.feed(&strace, &request("10.9.0.1").to_string());
        let result: Value = serde_json::from_slice(&output.stdout).unwrap();
        let ended = result["changes"].as_array().unwrap().last().unwrap();
        assert_eq!(
            ended["rule"],
            json!("-p udp --reply-src 10.9.0.2"),
            "{result}"
        );
        let listed = namespace.run(&["conntrack", "-L", "-p", "udp"]);
        assert_eq!(listed.lines().count(), 300);
        let trace = fs::read_to_string(&log).unwrap();
        let lists = trace
            .matches("IPCTNL_MSG_CT_GET, nlmsg_flags=NLM_F_REQUEST|0x300")
            .count()
            + trace
                .matches("IPCTNL_MSG_CT_GET, nlmsg_flags=NLM_F_REQUEST|NLM_F_DUMP")
                .count();
        assert_eq!(lists, 1, "{trace}");
        let received = trace.lines().filter(|line| line.starts_with("recvfrom"));
        let bytes = received.filter_map(|line| line.rsplit_once("= ")?.1.parse::<usize>().ok());
        let bytes: usize = bytes.sum();
        assert!(bytes < 10_000, "{bytes} bytes were read\n{trace}");
    }
}
