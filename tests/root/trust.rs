//! Trust: under load, killed, beside other programs, in odd surroundings, and
//! over a long run.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::lab::{Lab, Namespace, PROGRAM, VARIANTS, sh, shown};

/// Requests that all send port 5308 to servers 1 to 8, of both families.
fn states(variant: &str) -> Vec<Value> {
    let all = |rest: &str| {
        let v4 = (1..=8).map(|n| format!("10.9.0.{n} {rest}"));
        let v6 = (1..=8).map(|n| format!("fd09::{n} {rest}"));
        v4.chain(v6).collect::<Vec<_>>()
    };
    // By chance it takes more than eight to make a tree: each server twice.
    let twice = |rest: &str| {
        let v4 = (1..=8).map(|n| format!("10.9.0.{n}:5308 {rest}"));
        let v6 = (1..=8).map(|n| format!("[fd09::{n}]:5308 {rest}"));
        [all(rest), v4.chain(v6).collect()].concat()
    };
    let few = "10.9.0.3 weight=3,10.9.0.1,fd09::2 weight=2,fd09::7";
    let one = "10.9.0.8,fd09::8";
    // The balancer of 5308 is among others, of which some overlap with it.
    let set = |more: Value| {
        let others = (0..12).map(
            |n| json!({"name": format!("b{n}"), "destination_port": 6000 + n * 7, "backends": one}),
        );
        let mut balancers: Vec<Value> = others.collect();
        balancers.push(json!({"name": "hubs", "destination_port": 5308, "backends": all("")}));
        balancers.push(json!({"name": "rest", "destination_port": "5000:7000", "backends": few}));
        let mut set = json!({"balancers": balancers});
        set.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        set
    };
    let states = [
        json!({"backends": few}),
        json!({"backends": all(""), "layout": "tree"}),
        json!({"backends": few, "mode": "random", "forward": true}),
        json!({"backends": one, "masquerade": true}),
        json!({"backends": twice("weight=5"), "mode": "random", "layout": "tree"}),
        json!({"backends": all(""), "layout": "flat", "local_traffic": true}),
        json!({"backends": one, "destination_port": "5308,81:99", "jump": "insert"}),
        json!({"backends": few, "masquerade": "all", "out_interface": "back", "forward": true}),
        set(json!({})),
        set(json!({"masquerade": true, "forward": true, "local_traffic": true})),
    ];
    let named = |mut state: Value| {
        state["name"] = json!("W");
        state["variant"] = json!(variant);
        if state["destination_port"].is_null() && state["balancers"].is_null() {
            state["destination_port"] = json!(5308);
        }
        state
    };
    states.into_iter().map(named).collect()
}

/// Stops a thread also when the test fails, which waits for it.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A client that connects all the time, and the answers that it got.
struct Load {
    client: Child,
    answers: std::path::PathBuf,
}

impl Load {
    fn start(client: &Namespace, target: &str) -> Self {
        let lab = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/lab.py");
        let answers = client.scratch().join(target.replace([':', '['], "_"));
        let arguments = ["python3", "-u", lab, "ask", "tcp", target, "1000000"];
        let mut command = client.command(&arguments);
        command.stdout(File::create(&answers).unwrap());
        Self {
            client: command.spawn().unwrap(),
            answers,
        }
    }

    fn stop(mut self) -> Vec<String> {
        self.client.kill().unwrap();
        self.client.wait().unwrap();
        let answers = fs::read_to_string(self.answers).unwrap();
        let whole = answers.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole.lines().map(str::to_owned).collect()
    }
}

/// The gateway itself answers on the same port: whoever gets that answer slipped
/// past the balancer.
#[test]
fn no_connection_slips_past_or_is_lost_while_rules_change() {
    for variant in VARIANTS {
        let mut lab = Lab::new();
        let servers: Vec<String> = (1..=8)
            .flat_map(|n| [format!("10.9.0.{n}:5308"), format!("[fd09::{n}]:5308")])
            .collect();
        let servers: Vec<&str> = servers.iter().map(String::as_str).collect();
        lab.servers.serve("tcp", &servers);
        lab.gateway
            .serve("tcp", &["10.8.0.1:5308", "[fd08::1]:5308"]);
        let states = states(variant);
        lab.gateway.apply(&states[0]);
        let loads = ["10.8.0.1:5308", "[fd08::1]:5308"].map(|to| Load::start(&lab.client, to));
        for round in 0..8 {
            for at in 0..states.len() {
                let state = &states[(at * (2 * round + 1)) % states.len()];
                lab.gateway.apply(state);
            }
        }
        for (load, servers) in loads.into_iter().zip(["10.9.0.", "fd09::"]) {
            let answers = load.stop();
            assert!(answers.len() > 500, "only {} connections", answers.len());
            let lost: Vec<_> = answers
                .iter()
                .filter(|one| !one.starts_with(servers))
                .collect();
            assert!(lost.is_empty(), "{variant}: {lost:?} of {}", answers.len());
        }
    }
}

/// Each family's tables, without counters, and what was saved.
fn tables(gateway: &Namespace, variant: &str) -> Vec<String> {
    let mut tables = Vec::new();
    for program in ["iptables", "ip6tables"] {
        for table in ["nat", "filter"] {
            let dump = gateway.run(&[&format!("{program}-{variant}-save"), "-t", table]);
            let lines = dump.lines().filter(|line| !line.starts_with(['#', ':']));
            tables.push(lines.map(|line| line.to_owned() + "\n").collect());
        }
    }
    // Of a file, which chain comes first depends on what was in it before.
    let saved = fs::read_to_string(gateway.scratch().join("saved")).unwrap_or_default();
    assert!(saved.is_empty() || saved.ends_with("COMMIT\n"), "{saved}");
    let mut rules: Vec<&str> = saved
        .lines()
        .filter(|line| line.starts_with("-A"))
        .collect();
    rules.sort_by_key(|rule| rule.split(' ').nth(1));
    tables.push(rules.join("\n"));
    tables
}

#[test]
fn killed_at_any_moment_each_table_is_old_or_new_and_the_next_run_converges() {
    thread::scope(|scope| {
        for variant in VARIANTS {
            scope.spawn(move || killed(variant));
        }
    });
}

fn killed(variant: &str) {
    const SIGNALS: [&str; 4] = ["KILL", "TERM", "INT", "HUP"];
    let gateway = Namespace::new("g");
    let states: Vec<Value> = states(variant)
        .into_iter()
        .map(|mut state| {
            let path = |name| gateway.scratch().join(name);
            state["persist"] = json!({"ipv4": path("saved"), "ipv6": path("saved6")});
            state
        })
        .collect();
    let known: Vec<Vec<String>> = states
        .iter()
        .map(|state| {
            gateway.apply(state);
            tables(&gateway, variant)
        })
        .collect();
    let mut now = states.len() - 1;
    for step in 0..60_usize {
        let next = (now + 3) % states.len();
        let request = gateway.scratch().join("request");
        fs::write(&request, states[next].to_string()).unwrap();
        let mut run = gateway.command(&[PROGRAM]);
        run.stdin(File::open(&request).unwrap())
            .stdout(Stdio::null());
        let mut run = run.spawn().unwrap();
        thread::sleep(Duration::from_micros(1200) * u32::try_from(step).unwrap());
        sh(&[
            "sh",
            "-c",
            &format!("kill -{} {} || true", SIGNALS[step % 4], run.id()),
        ]);
        let start = Instant::now();
        run.wait().unwrap();
        assert!(
            start.elapsed() < Duration::from_secs(2),
            "it did not end at once"
        );
        // Its child processes end by themselves.
        while !sh(&["ip", "netns", "pids", &gateway.name]).is_empty() {
            thread::sleep(Duration::from_millis(5));
        }
        let found = tables(&gateway, variant);
        for ((found, old), new) in found.iter().zip(&known[now]).zip(&known[next]) {
            assert!(
                found == old || found == new,
                "{variant}, step {step}:\n{found}\nis neither\n{old}\nnor\n{new}"
            );
        }
        gateway.apply(&states[next]);
        assert_eq!(
            tables(&gateway, variant),
            known[next],
            "{variant}, step {step}"
        );
        assert_eq!(gateway.apply(&states[next])["changed"], json!(false));
        now = next;
    }
    let left: Vec<_> = fs::read_dir(gateway.scratch()).unwrap().flatten().collect();
    let odd = left.iter().filter(|file| {
        file.file_name()
            .to_string_lossy()
            .contains(".iptables_balance")
    });
    assert_eq!(odd.count(), 0, "{left:?}");
}

#[test]
fn concurrent_writers_lose_no_rule() {
    for variant in VARIANTS {
        let gateway = Namespace::new("g");
        let states = states(variant);
        let done = AtomicBool::new(false);
        let iptables = format!("iptables-{variant}");
        thread::scope(|scope| {
            let others = scope.spawn(|| {
                let mut count = 0;
                while !done.load(Ordering::Relaxed) {
                    let port = (1000 + count).to_string();
                    let chain = ["PREROUTING", "POSTROUTING"][count % 2];
                    let option = ["-A", "-I"][count / 2 % 2];
                    let rule = ["-p", "tcp", "--dport", &port, "-j", "ACCEPT"];
                    let command = [
                        &[&iptables, "-w", "10", "-t", "nat", option, chain],
                        &rule[..],
                    ]
                    .concat();
                    gateway.run(&command);
                    count += 1;
                }
                count
            });
            let stop = StopOnDrop(&done);
            for round in 0..4 {
                for at in 0..states.len() {
                    let state = &states[(at + round) % states.len()];
                    let result = gateway.ask(state);
                    assert_eq!(result["failed"], json!(false), "{variant} {result}");
                }
            }
            drop(stop);
            let count = others.join().unwrap();
            let dump = gateway.dump(variant);
            for port in 1000..1000 + count {
                let rule = format!("--dport {port} -j ACCEPT");
                assert_eq!(dump.matches(&rule).count(), 1, "{variant} {rule}");
            }
            assert!(count > 20, "only {count}");
        });
        let last = &states[(states.len() - 1 + 3) % states.len()];
        assert_eq!(gateway.apply(last)["changed"], json!(false));
        let dump = gateway.dump(variant);
        let jumps: Vec<&str> = dump.lines().filter(|line| line.ends_with("-j W")).collect();
        let distinct: BTreeSet<&str> = jumps
            .iter()
            .map(|line| line.rsplit_once(']').unwrap().1)
            .collect();
        assert_eq!(jumps.len(), distinct.len() * 2, "{jumps:?}");
    }
}

/// Runs the program by a shell that first does something odd.
fn oddly(gateway: &Namespace, prelude: &str, request: &Value) -> std::process::Output {
    let script = format!("{prelude}\nexec {PROGRAM}");
    gateway.feed(
        &["unshare", "--mount", "sh", "-c", &script],
        &request.to_string(),
    )
}

#[test]
fn odd_surroundings_make_no_difference() {
    for variant in VARIANTS {
        for (what, prelude) in [
            ("an empty environment", "exec env -i"),
            (
                "other languages",
                "export LANG=de_DE.UTF-8 LC_ALL=tr_TR LANGUAGE=xx",
            ),
            ("a umask of 0", "umask 0"),
            ("a umask of 777", "umask 777"),
            ("no standard error", "exec 2>&-"),
            ("little memory", "ulimit -v 200000"),
            ("few files", "ulimit -n 24"),
            ("no /proc", "mount -t tmpfs none /proc"),
            (
                "programs in the working directory",
                "cd $(mktemp -d); for p in save restore; do printf '#!/bin/sh\\nexit 0\\n' > iptables-$p; chmod +x iptables-$p; done; PATH=.::$PATH; export PATH",
            ),
        ] {
            let gateway = Namespace::new("g");
            let saved = gateway.scratch().join("saved");
            let request = json!({
                "name": "W", "variant": variant, "destination_port": 80, "backends": "10.9.0.1", "persist": saved,
            });
            let prelude = if prelude.starts_with("exec env") {
                format!(
                    "XTABLES_LOCKFILE= ; exec env -i IPTABLES_BALANCE_LOCKFILE={0}/lock IPTABLES_BALANCE_STATE_DIR={0}/state \
                     IPTABLES_BALANCE_RUNTIME_DIR={0}/run {PROGRAM}",
                    gateway.scratch().display()
                )
            } else {
                prelude.to_owned()
            };
            let output = oddly(&gateway, &prelude, &request);
            let result: Value = serde_json::from_slice(&output.stdout)
                .unwrap_or_else(|_| panic!("{what}: {}", shown(&output)));
            assert_eq!(result["failed"], json!(false), "{what}: {result}");
            assert!(
                gateway.dump(variant).contains("-A W -p tcp -j DNAT"),
                "{what}"
            );
            let mode = std::os::unix::fs::PermissionsExt::mode(
                &fs::metadata(&saved).unwrap().permissions(),
            );
            assert_eq!(mode & 0o7777, 0o640, "{what}");
            assert_eq!(gateway.apply(&request)["changed"], json!(false), "{what}");
        }
    }
}

#[test]
fn a_full_disk_or_closed_output_fails_cleanly() {
    let gateway = Namespace::new("g");
    let small = gateway.scratch().join("small");
    fs::create_dir(&small).unwrap();
    let request = |path: &std::path::Path| {
        json!({
            "name": "W", "destination_port": 80, "persist": path,
            "backends": (1..=200).map(|n| format!("10.9.0.{n}")).collect::<Vec<_>>(),
        })
    };
    // A full disk: the file there stays as it is, and all that was done before goes back.
    let gateway = gateway.with_etc_of_its_own();
    gateway.run(&[
        "ip", "link", "add", "front", "type", "veth", "peer", "name", "back",
    ]);
    let settings = ["net.ipv4.ip_forward=0", "net.ipv4.conf.front.forwarding=1"];
    settings
        .iter()
        .for_each(|setting| drop(gateway.run(&["sysctl", "-qw", setting])));
    let full = "mount -t tmpfs -o size=8k none $0 && echo '# old' > $0/rules; $1; cat $0/rules >&2; ls -A $0 >&2; cat /proc/sys/net/ipv4/conf/front/forwarding >&2";
    let mut forwarding = request(&small.join("rules"));
    forwarding["ip_forward"] = json!(true);
    let output = gateway.feed(
        &[
            "unshare",
            "--mount",
            "sh",
            "-c",
            full,
            small.to_str().unwrap(),
            PROGRAM,
        ],
        &forwarding.to_string(),
    );
    let result: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", shown(&output)));
    let message = result["msg"].as_str().unwrap();
    assert!(
        message.contains("No space left on device") && message.ends_with("the host is as before"),
        "{message}"
    );
    assert_eq!(String::from_utf8_lossy(&output.stderr), "# old\nrules\n1\n");
    assert!(!gateway.dump("nft").contains('W'));
    assert_eq!(
        gateway.run(&["cat", "/proc/sys/net/ipv4/ip_forward"]),
        "0\n"
    );
    assert!(
        !gateway
            .etc
            .as_ref()
            .unwrap()
            .join("sysctl.d/zz-iptables_balance.conf")
            .exists()
    );

    // Nobody hears the answer: what was asked for is done all the same, and told by the exit code.
    let saved = gateway.scratch().join("saved");
    for (prelude, code) in [("exec >/dev/full", 1), ("exec >&-", 0)] {
        let output = oddly(&gateway, prelude, &request(&saved));
        assert_eq!(
            output.status.code(),
            Some(code),
            "{prelude}: {}",
            shown(&output)
        );
        assert_eq!(
            gateway.apply(&request(&saved))["changed"],
            json!(false),
            "{prelude}"
        );
        gateway.apply(&json!({"name": "W", "state": "absent"}));
    }
    let output = oddly(&gateway, "exec <&-", &request(&saved));
    assert_ne!(output.status.code(), Some(0), "{}", shown(&output));

    // The lock cannot be had.
    let output = gateway.feed(
        &["env", "IPTABLES_BALANCE_LOCKFILE=/nowhere/lock", PROGRAM],
        &request(&saved).to_string(),
    );
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(
        result["msg"]
            .as_str()
            .unwrap()
            .starts_with("cannot open the lock `/nowhere/lock`"),
        "{result}"
    );
    assert!(!gateway.dump("nft").contains('W'));
}

#[test]
fn a_program_that_hangs_is_ended() {
    const HANGS: &str = "#!/bin/sh\n[ \"$1\" = --version ] && echo 'iptables-save v1.8.9 (nf_tables)' && exit\nexec sleep 600\n";
    const NEVER_STOPS: &str = "#!/bin/sh\n[ \"$1\" = --version ] && echo 'iptables-save v1.8.9 (nf_tables)' && exit\nwhile :; do echo '# and so on'; done\n";
    thread::scope(|scope| {
        for (name, program) in [
            ("iptables-save", HANGS),
            ("iptables-restore", HANGS),
            ("iptables-save", NEVER_STOPS),
        ] {
            scope.spawn(move || {
                let gateway = Namespace::new("g");
                let request =
                    json!({"name": "W", "destination_port": 80, "backends": "10.9.0.1", "wait": 1});
                gateway
                    .apply(&json!({"name": "X", "destination_port": 81, "backends": "10.9.0.1"}));
                let before = gateway.dump("nft");
                let start = Instant::now();
                let result = gateway.ask_with_stand_ins(&[(name, program)], &request);
                let message = result["msg"].as_str().unwrap();
                assert!(
                    message.contains("took longer than 61 seconds and was killed"),
                    "{message}"
                );
                assert!(start.elapsed() < Duration::from_secs(90));
                assert_eq!(result["changed"], json!(false));
                assert_eq!(gateway.dump("nft"), before);
            });
        }
    });
}

/// A process of a killed run may still write, so until it ends no other run
/// does.
#[test]
fn the_lock_outlives_a_killed_run_as_long_as_what_it_started() {
    let gateway = Namespace::new("g");
    let bin = gateway.scratch().join("bin");
    fs::create_dir(&bin).unwrap();
    let slow = bin.join("iptables-restore");
    fs::write(
        &slow,
        "#!/bin/sh\nsleep 3\nexec /usr/sbin/iptables-restore \"$@\"\n",
    )
    .unwrap();
    sh(&["chmod", "755", slow.to_str().unwrap()]);
    let path = format!("PATH={}:{}", bin.display(), std::env::var("PATH").unwrap());
    let request = json!({"name": "W", "destination_port": 80, "backends": "10.9.0.1", "wait": 1});
    let file = gateway.scratch().join("request");
    fs::write(&file, request.to_string()).unwrap();
    let mut run = gateway.command(&["env", &path, PROGRAM]);
    run.stdin(File::open(&file).unwrap()).stdout(Stdio::null());
    let mut run = run.spawn().unwrap();
    thread::sleep(Duration::from_secs(1));
    run.kill().unwrap();
    run.wait().unwrap();
    let message = gateway.ask(&request)["msg"].to_string();
    assert!(message.contains("another run held the lock"), "{message}");
    thread::sleep(Duration::from_secs(3));
    assert_eq!(gateway.ask(&request)["failed"], json!(false));
}
