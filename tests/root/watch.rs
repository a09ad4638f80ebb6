//! `watch` on real iptables, with real servers that die, hang, flap and come back.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::lab::{Lab, Namespace, PROGRAM, VARIANTS, add_address, shown};

const SWITCHED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/root/switched.py");
const UNIT: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/module-spec/systemd/iptables_balance@.service"
);
pub const SERVERS: [&str; 4] = [
    "10.9.0.1:5308",
    "10.9.0.2:5308",
    "10.9.0.3:5308",
    "10.9.0.4:5308",
];
/// Long enough for anything that happens at all.
const PATIENCE: Duration = Duration::from_secs(20);

/// Servers that die and come back at a word.
pub struct Switch {
    child: Child,
    words: ChildStdin,
    times: BufReader<ChildStdout>,
}

impl Switch {
    pub fn new(servers: &Namespace) -> Self {
        let mut command = servers.command(&["python3", SWITCHED, "serve"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        Self {
            words: child.stdin.take().unwrap(),
            times: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    /// Switches servers; returns the time at which that was done, in seconds of
    /// `CLOCK_MONOTONIC`.
    pub fn turn(&mut self, word: &str, servers: &[&str]) -> f64 {
        writeln!(self.words, "{word} {}", servers.join(" ")).unwrap();
        let mut line = String::new();
        self.times.read_line(&mut line).unwrap();
        line.trim().parse().unwrap()
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// A watcher in a network namespace.
pub struct Watcher<'a> {
    gateway: &'a Namespace,
    child: Child,
}

fn file(gateway: &Namespace, name: &str) -> PathBuf {
    gateway.scratch().join(name)
}

/// Writes the request that a watcher reads.
pub fn write_request(gateway: &Namespace, request: &Value) {
    fs::write(file(gateway, "request.json"), request.to_string()).unwrap();
}

impl<'a> Watcher<'a> {
    /// Starts one that reads the request as it was written last.
    pub fn again(gateway: &'a Namespace, environment: &[(&str, &str)]) -> Self {
        let request = file(gateway, "request.json");
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(file(gateway, "log"))
            .unwrap();
        let mut command = gateway.command(&[PROGRAM, "watch", request.to_str().unwrap()]);
        command.envs(environment.iter().copied()).stderr(log);
        let mut child = command.stdin(Stdio::null()).spawn().unwrap();
        // SIGHUP ends a program that does not heed signals yet.
        wait_until(|| heeds_sighup(child.id()) || child.try_wait().unwrap().is_some());
        Self { gateway, child }
    }

    pub fn start(gateway: &'a Namespace, request: &Value) -> Self {
        write_request(gateway, request);
        Self::again(gateway, &[])
    }

    pub fn log(&self) -> String {
        fs::read_to_string(file(self.gateway, "log")).unwrap()
    }

    #[track_caller]
    pub fn waits_for(&self, text: &str) {
        let is_there = wait_until(|| self.log().contains(text));
        assert!(is_there, "no `{text}` in\n{}", self.log());
    }

    pub fn signal(&self, signal: &str) {
        let status = Command::new("kill")
            .args([signal, &self.child.id().to_string()])
            .status();
        assert!(status.unwrap().success(), "{}", self.log());
    }

    /// Waits for its end; returns its exit code.
    #[track_caller]
    pub fn end(&mut self) -> Option<i32> {
        let mut code = None;
        let is_over = wait_until(|| match self.child.try_wait().unwrap() {
            Some(status) => {
                code = status.code();
                true
            }
            None => false,
        });
        assert!(is_over, "it does not end:\n{}", self.log());
        code
    }
}

impl Drop for Watcher<'_> {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn heeds_sighup(process: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let caught = caught.map(|mask| u64::from_str_radix(mask.trim(), 16).unwrap());
    caught.is_some_and(|mask| mask & 1 != 0)
}

fn wait_until(mut is_so: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + PATIENCE;
    loop {
        if is_so() {
            return true;
        }
        if Instant::now() > end {
            return false;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// The servers that new connections are led to, by their last number. The chain
/// `W/drain` has those that keep their old ones; nothing leads there.
pub fn targets(gateway: &Namespace, variant: &str) -> BTreeSet<String> {
    let dump = gateway.run(&[&format!("iptables-{variant}-save"), "-t", "nat"]);
    let lines = dump.lines().filter(|line| !line.contains("W/drain"));
    let led = lines.filter_map(|line| line.split("--to-destination ").nth(1));
    led.map(|to| to.trim_start_matches("10.9.0.").replace(":5308", ""))
        .collect()
}

#[track_caller]
fn becomes(gateway: &Namespace, variant: &str, wanted: &str) {
    let wanted: BTreeSet<String> = wanted.split_whitespace().map(str::to_owned).collect();
    let is_so = wait_until(|| targets(gateway, variant) == wanted);
    assert!(
        is_so,
        "{variant}: {:?} instead of {wanted:?}\n{}",
        targets(gateway, variant),
        fs::read_to_string(file(gateway, "log")).unwrap_or_default()
    );
}

/// Checks that take a fraction of a second.
fn quick() -> Value {
    json!({"interval": 0.2, "timeout": 0.2, "fall": 2, "rise": 2})
}

fn pool(variant: &str, backends: &[&str], health: &Value) -> Value {
    json!({
        "name": "W", "variant": variant, "destination": "10.8.0.1", "destination_port": 5308, "backends": backends,
        "health": health,
    })
}

fn with(mut object: Value, key: &str, value: Value) -> Value {
    object[key] = value;
    object
}

/// Does it for each variant, both at the same time.
fn for_each_variant(test: impl Fn(&'static str) + Sync) {
    thread::scope(|scope| {
        for variant in VARIANTS {
            scope.spawn(|| test(variant));
        }
    });
}

fn order(gateway: &Namespace, arguments: &[&str]) -> Output {
    gateway.feed(&[&[PROGRAM], arguments].concat(), "")
}

/// A run beside a watcher.
fn apply(gateway: &Namespace) -> Value {
    let path = file(gateway, "request.json");
    let text = fs::read_to_string(path).unwrap();
    gateway.apply(&serde_json::from_str(&text).unwrap())
}

/// A server to which packets are lost.
fn hang(servers: &Namespace, address: &str, does: bool) {
    let action = if does { "-A" } else { "-D" };
    servers.run(&["iptables", action, "INPUT", "-d", address, "-j", "DROP"]);
}

struct Attempt {
    began: f64,
    answer: String,
}

/// Connections at a steady rate, until they are waited for.
struct Load(Child);

impl Load {
    fn start(client: &Namespace, rate: u32, seconds: f64) -> Self {
        let (rate, seconds) = (rate.to_string(), seconds.to_string());
        let arguments = [
            "python3",
            SWITCHED,
            "load",
            "10.8.0.1:5308",
            &rate,
            &seconds,
        ];
        let mut command = client.command(&arguments);
        Self(command.stdout(Stdio::piped()).spawn().unwrap())
    }

    fn attempts(mut self) -> Vec<Attempt> {
        let mut text = String::new();
        let mut output = self.0.stdout.take().unwrap();
        output.read_to_string(&mut text).unwrap();
        assert!(self.0.wait().unwrap().success());
        let attempt = |line: &str| {
            let words: Vec<&str> = line.split(' ').collect();
            Attempt {
                began: words[0].parse().unwrap(),
                answer: words[2].to_owned(),
            }
        };
        text.lines().map(attempt).collect()
    }
}

/// Seconds from the death of a server under load to the last new connection that was
/// sent to it. Then it comes back.
fn failover(lab: &Lab, switch: &mut Switch, watcher: &Watcher) -> f64 {
    let load = Load::start(&lab.client, 1000, 3.0);
    thread::sleep(Duration::from_millis(700));
    let deaths = |log: &str| log.matches("is down, after").count();
    let before = deaths(&watcher.log());
    let died = switch.turn("down", &SERVERS[1..2]);
    assert!(wait_until(|| deaths(&watcher.log()) > before));
    thread::sleep(Duration::from_millis(300));
    let back = switch.turn("up", &SERVERS[1..2]);
    let attempts = load.attempts();
    assert_eq!(attempts.len(), 3000);
    let lost = attempts.iter().filter(|one| !one.answer.contains(':'));
    let lost: Vec<f64> = lost.map(|one| one.began - died).collect();
    assert!(lost.iter().all(|after| *after > -0.1), "{lost:?}");
    let returned = |one: &&Attempt| one.began > back && one.answer == SERVERS[1];
    assert!(attempts.iter().filter(returned).count() > 100);
    lost.iter().copied().fold(0.0, f64::max)
}

/// Other tests take the processors now and then, so one of three deaths counts.
#[test]
fn a_server_that_dies_under_load_gets_nothing_after_700_ms() {
    for variant in VARIANTS {
        let lab = Lab::new();
        let mut switch = Switch::new(&lab.servers);
        switch.turn("up", &SERVERS);
        let watcher = Watcher::start(&lab.gateway, &pool(variant, &SERVERS, &quick()));
        becomes(&lab.gateway, variant, "1 2 3 4");
        let mut times = Vec::new();
        while times.len() < 3 && times.iter().all(|time| *time > 0.7) {
            times.push(failover(&lab, &mut switch, &watcher));
            becomes(&lab.gateway, variant, "1 2 3 4");
        }
        assert!(
            times.iter().any(|time| *time <= 0.7),
            "{variant} {times:?}\n{}",
            watcher.log()
        );
        let log = watcher.log();
        for line in [
            "W: backend `10.9.0.2:5308` is down, after 2 failed checks in a row: connection refused",
            "W: backend `10.9.0.2:5308` is up, after 2 good checks in a row",
        ] {
            assert_eq!(log.matches(line).count(), times.len(), "{log}");
        }
    }
}

#[test]
fn a_server_that_resets_hangs_or_answers_badly_is_down_and_one_that_is_back_is_up() {
    for_each_variant(|variant| {
        let lab = Lab::new();
        let mut switch = Switch::new(&lab.servers);
        switch.turn("up", &SERVERS);
        let http = with(quick(), "type", json!("http"));
        let watcher = Watcher::start(&lab.gateway, &pool(variant, &SERVERS[..3], &quick()));
        becomes(&lab.gateway, variant, "1 2 3");
        hang(&lab.servers, "10.9.0.1", true);
        becomes(&lab.gateway, variant, "2 3");
        watcher.waits_for(
            "`10.9.0.1:5308` is down, after 2 failed checks in a row: no answer within 0.2 s",
        );
        hang(&lab.servers, "10.9.0.1", false);
        becomes(&lab.gateway, variant, "1 2 3");
        // These servers do not speak HTTP. All are unhealthy then, so health is ignored.
        write_request(&lab.gateway, &pool(variant, &SERVERS[..3], &http));
        watcher.signal("-HUP");
        watcher.waits_for("the answer is not HTTP");
        watcher.waits_for("health is ignored");
        becomes(&lab.gateway, variant, "1 2 3");
        switch.turn("reset", &["10.9.0.3:5308"]);
        thread::sleep(Duration::from_millis(500));
        assert_eq!(targets(&lab.gateway, variant).len(), 3);
    });
}

#[test]
fn flaps_that_are_shorter_than_fall_change_nothing() {
    for_each_variant(|variant| {
        let lab = Lab::new();
        let mut switch = Switch::new(&lab.servers);
        switch.turn("up", &SERVERS);
        let health = json!({"interval": 0.15, "timeout": 0.15, "fall": 3, "rise": 2});
        let watcher = Watcher::start(&lab.gateway, &pool(variant, &SERVERS, &health));
        becomes(&lab.gateway, variant, "1 2 3 4");
        let rules = || {
            lab.gateway
                .run(&[&format!("iptables-{variant}-save"), "-t", "nat"])
        };
        let quiet = |dump: String| -> Vec<String> {
            let lines = dump.lines().filter(|line| !line.starts_with(['#', ':']));
            lines.map(str::to_owned).collect()
        };
        thread::sleep(Duration::from_millis(300));
        let before = (quiet(rules()), watcher.log());
        for _ in 0..15 {
            switch.turn("down", &["10.9.0.2:5308"]);
            thread::sleep(Duration::from_millis(100));
            switch.turn("up", &["10.9.0.2:5308"]);
            thread::sleep(Duration::from_millis(200));
        }
        assert_eq!((quiet(rules()), watcher.log()), before);
    });
}

#[test]
fn when_all_are_down_every_backend_gets_connections_or_none_as_was_asked() {
    for_each_variant(|variant| {
        let lab = Lab::new();
        let mut switch = Switch::new(&lab.servers);
        switch.turn("up", &SERVERS);
        let watcher = Watcher::start(&lab.gateway, &pool(variant, &SERVERS[..2], &quick()));
        becomes(&lab.gateway, variant, "1 2");
        switch.turn("down", &SERVERS);
        watcher.waits_for("2 of 2 backends are down");
        watcher.waits_for("health is ignored");
        becomes(&lab.gateway, variant, "1 2");
        switch.turn("up", &["10.9.0.2:5308"]);
        becomes(&lab.gateway, variant, "2");
        let never = with(quick(), "panic_threshold", json!("never"));
        write_request(&lab.gateway, &pool(variant, &SERVERS[..2], &never));
        watcher.signal("-HUP");
        switch.turn("down", &SERVERS);
        becomes(&lab.gateway, variant, "");
        let begun = Instant::now();
        let answer = lab.client.connect("tcp", "10.8.0.1:5308", 1);
        assert_eq!(answer, ["ConnectionRefusedError"], "{variant}");
        assert!(begun.elapsed() < Duration::from_secs(2));
        switch.turn("up", &["10.9.0.1:5308"]);
        becomes(&lab.gateway, variant, "1");
        assert_eq!(
            lab.client.connect("tcp", "10.8.0.1:5308", 1),
            ["10.9.0.1:5308"]
        );
    });
}

#[test]
fn a_backup_serves_while_nobody_else_can() {
    for_each_variant(|variant| {
        let lab = Lab::new();
        let mut switch = Switch::new(&lab.servers);
        switch.turn("up", &SERVERS);
        let backends = ["10.9.0.1:5308", "10.9.0.2:5308", "10.9.0.3:5308 backup"];
        let _watcher = Watcher::start(&lab.gateway, &pool(variant, &backends, &quick()));
        becomes(&lab.gateway, variant, "1 2");
        switch.turn("down", &SERVERS[..2]);
        becomes(&lab.gateway, variant, "3");
        switch.turn("up", &SERVERS[..1]);
        becomes(&lab.gateway, variant, "1");
    });
}

#[test]
fn a_server_that_dies_leaves_every_balancer_of_a_set_that_has_it() {
    for_each_variant(|variant| {
        let lab = Lab::new();
        let gateway = &lab.gateway;
        let mut switch = Switch::new(&lab.servers);
        switch.turn("up", &SERVERS);
        let request = json!({
            "name": "W", "variant": variant, "destination": "10.8.0.1", "health": quick(),
            "balancers": [
                {"name": "web", "destination_port": 80, "backends": SERVERS[..2]},
                {"name": "db", "destination_port": 81, "backends": SERVERS[1..3]},
                {"name": "plain", "destination_port": 82, "backends": SERVERS[1..2], "health": {"panic_threshold": "never"}},
            ],
        });
        let watcher = Watcher::start(gateway, &request);
        watcher.waits_for("was set up");
        let targets_of = |balancer: &str| {
            let dump = gateway.run(&[&format!("iptables-{variant}-save"), "-t", "nat"]);
            let prefix = format!("-A W/{balancer} ");
            let lines = dump.lines().filter(|line| line.starts_with(&prefix));
            let led = lines.filter_map(|line| line.split("10.9.0.").nth(1));
            led.map(|to| to.replace(":5308", ""))
                .collect::<Vec<_>>()
                .join(" ")
        };
        let all = || ["web", "db", "plain"].map(targets_of);
        assert_eq!(all(), ["1 2", "2 3", "2"], "{variant}");
        switch.turn("down", &SERVERS[1..2]);
        assert!(wait_until(|| all() == ["1", "3", ""]), "{:?}", all());
        for line in [
            "balancer `web`: backend `10.9.0.2:5308` is down",
            "balancer `plain`: backend `10.9.0.2:5308` is down",
        ] {
            watcher.waits_for(line);
        }
        switch.turn("up", &SERVERS[1..2]);
        assert!(wait_until(|| all() == ["1 2", "2 3", "2"]), "{:?}", all());
    });
}

#[test]
fn holds_are_honoured_at_once_and_end_by_themselves() {
    for_each_variant(|variant| {
        let lab = Lab::new();
        let gateway = &lab.gateway;
        let mut switch = Switch::new(&lab.servers);
        switch.turn("up", &SERVERS);
        let watcher = Watcher::start(gateway, &pool(variant, &SERVERS, &quick()));
        becomes(gateway, variant, "1 2 3 4");
        // The request is kept after the rules are there.
        watcher.waits_for("was set up");
        let hold = ["hold", "W", "10.9.0.2:5308", "--reason", "disk"];
        let output = order(gateway, &hold);
        assert!(output.status.success(), "{}", shown(&output));
        becomes(gateway, variant, "1 3 4");
        watcher.waits_for("`10.9.0.2:5308` is held until it is released (disk)");
        // A transition of another backend does not end it, and neither does a run.
        switch.turn("down", &["10.9.0.1:5308"]);
        becomes(gateway, variant, "3 4");
        assert_eq!(apply(gateway)["changed"], json!(false));
        let released = order(gateway, &["release", "W", "10.9.0.2:5308"]);
        assert!(released.status.success(), "{}", shown(&released));
        becomes(gateway, variant, "2 3 4");
        let short = ["hold", "W", "10.9.0.3:5308", "--for", "2s"];
        assert!(order(gateway, &short).status.success());
        becomes(gateway, variant, "2 4");
        becomes(gateway, variant, "2 3 4");
    });
}

#[test]
fn a_run_beside_a_watcher_never_undoes_its_verdicts() {
    for_each_variant(|variant| {
        let lab = Lab::new();
        let gateway = &lab.gateway;
        let mut switch = Switch::new(&lab.servers);
        switch.turn("up", &SERVERS);
        // Down after two checks, and up after very many.
        let health = with(quick(), "rise", json!(100));
        let request = pool(variant, &SERVERS, &health);
        let watcher = Watcher::start(gateway, &request);
        becomes(gateway, variant, "1 2 3 4");
        switch.turn("down", &["10.9.0.2:5308"]);
        becomes(gateway, variant, "1 3 4");
        switch.turn("up", &["10.9.0.2:5308"]);
        for _ in 0..5 {
            let result = apply(gateway);
            assert_eq!(result["changed"], json!(false), "{variant} {result}");
            let told = result["warnings"].to_string();
            assert!(
                told.contains("`10.9.0.2:5308` (connection refused)"),
                "{told}"
            );
        }
        // A run with another request: the watcher goes on from there.
        let mut other = request.clone();
        other["backends"] = json!(SERVERS[..3]);
        gateway.apply(&other);
        watcher.waits_for("a run applied another request");
        becomes(gateway, variant, "1 3");
        switch.turn("down", &["10.9.0.3:5308"]);
        becomes(gateway, variant, "1");
        // A run that removes the balancer is not undone either.
        gateway.apply(&json!({"name": "W", "variant": variant, "state": "absent"}));
        watcher.waits_for("a run removed the balancer");
        thread::sleep(Duration::from_millis(600));
        assert_eq!(targets(gateway, variant), BTreeSet::new());
    });
}

#[test]
fn a_second_watcher_of_the_same_name_refuses() {
    let lab = Lab::new();
    let gateway = &lab.gateway;
    let mut switch = Switch::new(&lab.servers);
    switch.turn("up", &SERVERS);
    let mut first = Watcher::start(gateway, &pool("nft", &SERVERS, &quick()));
    becomes(gateway, "nft", "1 2 3 4");
    let mut second = Watcher::again(gateway, &[]);
    assert_eq!(second.end(), Some(1));
    first.waits_for("another watcher of `W` is running; stop it first");
    assert!(first.child.try_wait().unwrap().is_none());
    // After a kill its place is free.
    first.signal("-KILL");
    first.end();
    let third = Watcher::again(gateway, &[]);
    switch.turn("down", &SERVERS[..1]);
    becomes(gateway, "nft", "2 3 4");
    drop(third);
}

#[test]
fn a_wrong_request_at_sighup_is_refused_and_the_old_one_goes_on() {
    let lab = Lab::new();
    let gateway = &lab.gateway;
    let mut switch = Switch::new(&lab.servers);
    switch.turn("up", &SERVERS);
    let request = pool("nft", &SERVERS, &quick());
    let watcher = Watcher::start(gateway, &request);
    becomes(gateway, "nft", "1 2 3 4");
    let wrong = [
        ("{".to_owned(), "refused"),
        (
            with(request.clone(), "name", json!("V")).to_string(),
            "it is `V` now",
        ),
        (
            with(request.clone(), "state", json!("absent")).to_string(),
            "it is `absent` now",
        ),
        (
            with(request.clone(), "health", json!({"fall": 0})).to_string(),
            "health.fall: `0`",
        ),
    ];
    for (text, words) in wrong {
        fs::write(file(gateway, "request.json"), text).unwrap();
        let refusals = |log: &str| log.matches("the old request stays in force").count();
        let before = refusals(&watcher.log());
        watcher.signal("-HUP");
        assert!(
            wait_until(|| refusals(&watcher.log()) == before + 1),
            "{words}"
        );
        watcher.waits_for(words);
    }
    switch.turn("down", &SERVERS[..1]);
    becomes(gateway, "nft", "2 3 4");
    write_request(
        gateway,
        &with(request, "backends", json!([SERVERS[1], SERVERS[2]])),
    );
    watcher.signal("-HUP");
    becomes(gateway, "nft", "2 3");
}

#[test]
fn sigterm_leaves_the_rules_and_a_kill_loses_no_verdict() {
    for_each_variant(|variant| {
        let lab = Lab::new();
        let gateway = &lab.gateway;
        let mut switch = Switch::new(&lab.servers);
        switch.turn("up", &SERVERS);
        let mut watcher = Watcher::start(gateway, &pool(variant, &SERVERS, &quick()));
        becomes(gateway, variant, "1 2 3 4");
        switch.turn("down", &SERVERS[..1]);
        becomes(gateway, variant, "2 3 4");
        let rules = || targets(gateway, variant);
        let before = rules();
        for (signal, code) in [("-TERM", Some(0)), ("-INT", Some(0)), ("-KILL", None)] {
            watcher.signal(signal);
            assert_eq!(watcher.end(), code, "{signal}");
            assert_eq!(rules(), before, "{signal}");
            watcher = Watcher::again(gateway, &[]);
            // The dead one gets nothing meanwhile.
            for _ in 0..10 {
                assert_eq!(rules(), before, "{signal}");
                thread::sleep(Duration::from_millis(20));
            }
        }
        switch.turn("up", &SERVERS[..1]);
        becomes(gateway, variant, "1 2 3 4");
        assert_eq!(
            watcher.log().matches("is down, after").count(),
            1,
            "{}",
            watcher.log()
        );
    });
}

#[test]
fn rules_that_others_break_are_mended() {
    for_each_variant(|variant| {
        let lab = Lab::new();
        let gateway = &lab.gateway;
        let mut switch = Switch::new(&lab.servers);
        switch.turn("up", &SERVERS);
        let interval = if variant == "nft" { 2.0 } else { 0.5 };
        let health = json!({"interval": interval, "timeout": 0.2});
        let _watcher = Watcher::start(gateway, &pool(variant, &SERVERS, &health));
        becomes(gateway, variant, "1 2 3 4");
        let program = format!("iptables-{variant}");
        let rules = || {
            let dump = gateway.run(&[&format!("{program}-save"), "-t", "nat"]);
            let lines = dump.lines().filter(|line| line.starts_with("-A"));
            lines.map(str::to_owned).collect::<Vec<_>>()
        };
        let whole = rules();
        // It hears of its own changes too, and looks at them once.
        thread::sleep(Duration::from_secs_f64(interval * 2.0 + 0.3));
        for breaking in [&["-F", "W"][..], &["-F", "PREROUTING"], &["-D", "W", "2"]] {
            gateway.run(&[&[&program, "-w", "-t", "nat"], breaking].concat());
            let begun = Instant::now();
            assert!(wait_until(|| rules() == whole), "{variant} {breaking:?}");
            let took = begun.elapsed();
            // On nft it hears of that, and does not wait for its next look; but it does
            // not fight with others more often than once an interval.
            let is_first = breaking == ["-F", "W"];
            let most = if variant == "nft" && is_first {
                1500
            } else {
                6000
            };
            assert!(took.as_millis() < most, "{variant} {breaking:?} {took:?}");
        }
    });
}

#[test]
fn broken_files_of_its_own_do_not_stop_it_and_directories_of_others_do() {
    let lab = Lab::new();
    let gateway = &lab.gateway;
    let mut switch = Switch::new(&lab.servers);
    switch.turn("up", &SERVERS);
    let request = pool("nft", &SERVERS, &quick());
    fs::create_dir_all(file(gateway, "run")).unwrap();
    fs::create_dir_all(file(gateway, "state")).unwrap();
    for broken in ["run/W.json", "state/W.json", "state/W.holds.json"] {
        fs::write(file(gateway, broken), "{\"holds\": 7, \u{0}").unwrap();
    }
    let mut watcher = Watcher::start(gateway, &request);
    becomes(gateway, "nft", "1 2 3 4");
    switch.turn("down", &SERVERS[..1]);
    becomes(gateway, "nft", "2 3 4");
    fs::write(file(gateway, "run/W.json"), "broken").unwrap();
    let is_whole = || {
        let text = fs::read_to_string(file(gateway, "run/W.json")).unwrap();
        serde_json::from_str::<Value>(&text).is_ok_and(|verdicts| verdicts["backends"].is_array())
    };
    assert!(wait_until(is_whole));
    watcher.signal("-TERM");
    assert_eq!(watcher.end(), Some(0));
    let directory = file(gateway, "run");
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o777)).unwrap();
    let mut refused = Watcher::again(gateway, &[]);
    assert_eq!(refused.end(), Some(1));
    refused.waits_for("may be written by others (mode 0777)");
}

#[test]
fn the_service_manager_hears_of_everything() {
    let lab = Lab::new();
    let gateway = &lab.gateway;
    let mut switch = Switch::new(&lab.servers);
    switch.turn("up", &SERVERS);
    let path = file(gateway, "notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let hear = |wanted: &str| {
        let end = Instant::now() + PATIENCE;
        let mut heard = Vec::new();
        while Instant::now() < end {
            let mut buffer = [0; 4096];
            let length = match manager.recv(&mut buffer) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                length => length.unwrap(),
            };
            let message = String::from_utf8(buffer[..length].to_vec()).unwrap();
            if message.contains(wanted) {
                return message;
            }
            heard.push(message);
        }
        panic!("no {wanted} in {heard:?}");
    };
    write_request(gateway, &pool("nft", &SERVERS, &quick()));
    let environment = [
        ("NOTIFY_SOCKET", path.to_str().unwrap()),
        ("WATCHDOG_USEC", "400000"),
    ];
    let mut watcher = Watcher::again(gateway, &environment);
    hear("READY=1");
    // Ready means that the rules are there.
    assert_eq!(targets(gateway, "nft").len(), 4);
    hear("STATUS=4 of 4 backends are up");
    hear("WATCHDOG=1");
    switch.turn("down", &SERVERS[..1]);
    hear("STATUS=3 of 4 backends are up");
    watcher.signal("-HUP");
    let reloading = hear("RELOADING=1");
    let microseconds = reloading.split("MONOTONIC_USEC=").nth(1).unwrap();
    assert!(microseconds.trim().parse::<u64>().unwrap() > 0);
    hear("READY=1");
    let begun = Instant::now();
    (0..5).for_each(|_| drop(hear("WATCHDOG=1")));
    assert!(begun.elapsed() < Duration::from_secs(3));
    watcher.signal("-TERM");
    hear("STOPPING=1");
    assert_eq!(watcher.end(), Some(0));
}

/// A manager that nobody reads from, or that is gone, does not stop the checks.
#[test]
fn a_service_manager_that_does_not_listen_stops_nothing() {
    let lab = Lab::new();
    let gateway = &lab.gateway;
    let mut switch = Switch::new(&lab.servers);
    switch.turn("up", &SERVERS);
    let path = file(gateway, "notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    write_request(gateway, &pool("nft", &SERVERS, &quick()));
    // More than one message for each check, so that the queue is full at once.
    let environment = [
        ("NOTIFY_SOCKET", path.to_str().unwrap()),
        ("WATCHDOG_USEC", "2000"),
    ];
    let _watcher = Watcher::again(gateway, &environment);
    becomes(gateway, "nft", "1 2 3 4");
    thread::sleep(Duration::from_secs(1));
    switch.turn("down", &SERVERS[..1]);
    becomes(gateway, "nft", "2 3 4");
    drop(manager);
    switch.turn("up", &SERVERS[..1]);
    becomes(gateway, "nft", "1 2 3 4");
}

#[test]
fn names_may_not_resolve_for_a_while() {
    let gateway = Namespace::new("g").with_etc_of_its_own();
    for address in ["10.9.0.1/32", "10.9.0.2/32"] {
        add_address(&gateway, "lo", address);
    }
    let mut switch = Switch::new(&gateway);
    switch.turn("up", &SERVERS[..2]);
    let backends = ["server.invalid:5308", "10.9.0.2:5308"];
    let watcher = Watcher::start(&gateway, &pool("nft", &backends, &quick()));
    watcher.waits_for("`server.invalid` does not resolve");
    let hosts = gateway.etc.as_ref().unwrap().join("hosts");
    let text = fs::read_to_string(&hosts).unwrap();
    fs::write(&hosts, text + "10.9.0.1 server.invalid\n").unwrap();
    becomes(&gateway, "nft", "1 2");
    watcher.waits_for("recovered");
    switch.turn("down", &SERVERS[..1]);
    becomes(&gateway, "nft", "2");
}

/// The socket has a name without a file, as in a container.
#[test]
fn the_service_manager_may_listen_on_an_abstract_socket() {
    const MANAGER: &str = r#"
import socket, sys
manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
manager.bind("\0ipb-manager")
print("ready", flush=True)
while True:
    open(sys.argv[1], "ab", 0).write(manager.recv(4096) + b"\n")
"#;
    let mut gateway = Namespace::new("g");
    let heard = file(&gateway, "heard");
    gateway.start(&["python3", "-c", MANAGER, heard.to_str().unwrap()]);
    write_request(&gateway, &pool("nft", &SERVERS[..1], &quick()));
    let _watcher = Watcher::again(&gateway, &[("NOTIFY_SOCKET", "@ipb-manager")]);
    let has_heard = || fs::read_to_string(&heard).is_ok_and(|text| text.contains("READY=1\n"));
    assert!(wait_until(has_heard));
}

#[test]
fn iptables_may_fail_for_a_while() {
    let lab = Lab::new();
    let gateway = &lab.gateway;
    let mut switch = Switch::new(&lab.servers);
    switch.turn("up", &SERVERS);
    let bin = file(gateway, "bin");
    fs::create_dir(&bin).unwrap();
    let stand_in = bin.join("iptables-restore");
    write_request(gateway, &pool("nft", &SERVERS, &quick()));
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let watcher = Watcher::again(gateway, &[("PATH", &path)]);
    becomes(gateway, "nft", "1 2 3 4");
    fs::write(&stand_in, "#!/bin/sh\nexit 4\n").unwrap();
    fs::set_permissions(&stand_in, fs::Permissions::from_mode(0o755)).unwrap();
    switch.turn("down", &SERVERS[..1]);
    watcher.waits_for("is down");
    watcher.waits_for("the host is as before");
    thread::sleep(Duration::from_secs(1));
    assert_eq!(targets(gateway, "nft").len(), 4);
    // It is told once, however often it is tried.
    assert_eq!(watcher.log().matches("the host is as before").count(), 1);
    fs::remove_file(&stand_in).unwrap();
    becomes(gateway, "nft", "2 3 4");
    watcher.waits_for("recovered");
}

#[test]
fn the_unit_is_well_formed_and_confined() {
    let analyze = |arguments: &[&str]| {
        let mut command = Command::new("systemd-analyze");
        let output = command.args(arguments).output().unwrap();
        (output.status.success(), shown(&output))
    };
    // Of ten points of exposure, in tenths.
    let (is_confined, told) = analyze(&["security", "--offline=true", "--threshold=30", UNIT]);
    assert!(is_confined, "{told}");
}
