//! A long run: random steps on real iptables, after each of which the promises
//! hold. `SEED` repeats one, `STEPS` makes it longer.

use std::fs::File;
use std::process::Stdio;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::dice::Dice;
use crate::lab::{Namespace, PROGRAM, VARIANTS};

impl Dice {
    pub fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.throw(all.len())]
    }

    fn once_in(&mut self, times: usize) -> bool {
        self.throw(times) == 0
    }

    fn request(&mut self, variant: &str) -> Value {
        if self.once_in(12) {
            return json!({"name": "W", "variant": variant, "state": "absent"});
        }
        if self.once_in(3) {
            return self.set(variant);
        }
        self.balancer(variant)
    }

    /// A set of balancers that differ at least in a port.
    fn set(&mut self, variant: &str) -> Value {
        let count = *self.pick(&[1, 2, 5, 12]);
        let mut balancers = Vec::new();
        for number in 0..count {
            let mut balancer = self.balancer(variant);
            let attributes = balancer.as_object_mut().unwrap();
            attributes.retain(|name, _| !["variant", "jump"].contains(&name.as_str()));
            balancer["name"] = json!(format!("b{}", self.throw(40) * 12 + number));
            balancer["destination_port"] = match self.throw(3) {
                0 => json!(1000 + number),
                1 => json!([
                    2000 + number * 7,
                    format!("{}:{}", 3000 + number, 4000 + number)
                ]),
                _ => json!(format!("{}:{}", self.throw(900), 1000 + number)),
            };
            balancers.push(balancer);
        }
        json!({"name": "W", "variant": variant, "jump": self.pick(&["append", "insert"]), "balancers": balancers})
    }

    fn balancer(&mut self, variant: &str) -> Value {
        let mut backends = Vec::new();
        for network in ["10.9.0.", "fd09::"] {
            let count = *self.pick(&[0, 1, 2, 4, 9, 30]);
            for number in 1..=count {
                backends.push(
                    json!({"address": format!("{network}{number}"), "weight": self.throw(5)}),
                );
            }
        }
        let mut request = json!({
            "name": "W", "variant": variant, "backends": backends,
            "destination_port": self.pick(&[json!(80), json!("80,443,1000:2000"), json!("0:65535")]),
            "mode": self.pick(&["nth", "random", "hash"]), "layout": self.pick(&["auto", "flat", "tree"]),
            "protocol": self.pick(&["tcp", "udp", "sctp"]), "jump": self.pick(&["append", "insert"]),
            "when_empty": self.pick(&["reject", "drop", "pass"]),
        });
        if request["mode"] == "hash" && self.once_in(2) {
            request["hash_key"] = json!(self.pick(&["source", "connection"]));
            request["hash_seed"] = json!(self.throw(3));
            request["hash_prefix"] = json!({"ipv4": 24, "ipv6": 1 + self.throw(128)});
        }
        for (name, value) in [
            ("local_traffic", json!(true)),
            ("forward", json!(true)),
            ("masquerade", json!(true)),
            ("in_interface", json!("eth+")),
            ("destination", json!("local")),
        ] {
            if self.once_in(3) {
                request[name] = value;
            }
        }
        request
    }

    /// A change by somebody else, to foreign chains or to ours.
    fn foreign(&mut self) -> String {
        let port = 3000 + self.throw(50);
        let rule = format!("-p tcp --dport {port} -j ACCEPT");
        match self.throw(7) {
            0 => format!("*nat\n-A PREROUTING {rule}\nCOMMIT\n"),
            1 => format!("*nat\n-I PREROUTING {rule}\nCOMMIT\n"),
            2 => format!("*filter\n-I FORWARD {rule}\nCOMMIT\n"),
            3 => "*nat\n:W - [0:0]\nCOMMIT\n".to_owned(),
            4 => format!(
                "*nat\n:W - [0:0]\n-A W {rule}\n-I PREROUTING -p tcp --dport 80 -j W\nCOMMIT\n"
            ),
            5 => "*nat\n:W - [0:0]\n-I W -j RETURN\n-A OUTPUT -p tcp -j W\nCOMMIT\n".to_owned(),
            _ => "*filter\n-I FORWARD -m conntrack --ctstate INVALID -j DROP\nCOMMIT\n".to_owned(),
        }
    }
}

fn is_ours(line: &str) -> bool {
    let mut words = line.split([' ', ':']);
    words.any(|word| word == "W" || word.starts_with("W/"))
}

fn foreign(dump: &str) -> Vec<String> {
    dump.lines()
        .filter(|line| !is_ours(line))
        .map(str::to_owned)
        .collect()
}

/// A stand-in that refuses, does nothing, or does it and says that it did not.
fn fault(dice: &mut Dice, program: &str) -> (String, String) {
    let real = format!("/usr/sbin/{program}");
    let script = *dice.pick(&[
        "exit 1",
        "cat >/dev/null",
        "REAL \"$@\"; exit 1",
        "kill -9 $$",
    ]);
    (
        program.to_owned(),
        format!("#!/bin/sh\n{}\n", script.replace("REAL", &real)),
    )
}

/// Legacy zeroes the policies' counters, so they are not compared; and before
/// 1.8.5 chains came in the order in which they were made.
fn quiet(dump: &str) -> String {
    let line = |line: &str| match line.starts_with(':') {
        true => line.split(" [").next().unwrap_or_default().to_owned(),
        false => line.to_owned(),
    };
    let mut lines: Vec<String> = dump.lines().map(line).collect();
    for table in lines.split_mut(|line| line.starts_with('*')) {
        table.sort_by_cached_key(|line| {
            let chain = line.split(" -A ").nth(1).unwrap_or_default();
            chain.split(' ').next().unwrap_or_default().to_owned()
        });
        let declared = table.partition_point(|line| !line.contains(" -A "));
        table[..declared].sort_unstable();
    }
    lines.join("\n")
}

fn run(variant: &str, seed: u64, steps: usize) {
    let mut dice = Dice(seed);
    let gateway = Namespace::new("l");
    for program in ["iptables", "ip6tables"] {
        let theirs = "*nat\n:MINE - [0:0]\n-A PREROUTING -j MINE\n-A MINE -p tcp --dport 99 -j RETURN\nCOMMIT\n*filter\n-A FORWARD -j DROP\nCOMMIT\n";
        gateway.restore(&format!("{program}-{variant}-restore"), theirs);
    }
    for step in 0..steps {
        let context = format!("{variant}, SEED={seed}, step {step}");
        if step % 500 == 499 {
            println!("{context}");
        }
        if dice.once_in(4) {
            let edit = dice.foreign();
            gateway.restore(&format!("iptables-{variant}-restore"), &edit);
        }
        let request = dice.request(variant);
        let before = quiet(&gateway.dump(variant));
        let kind = dice.throw(10);
        if kind == 0 {
            let family = *dice.pick(&["iptables", "ip6tables"]);
            let name = match variant {
                "nft" => format!("{family}-restore"),
                _ => format!("{family}-legacy-restore"),
            };
            let (name, script) = fault(&mut dice, &name);
            let result = gateway.ask_with_stand_ins(&[(&name, &script)], &request);
            let message = result["msg"].as_str().unwrap();
            if result["failed"] == json!(true) && message.ends_with("the host is as before") {
                assert_eq!(
                    quiet(&gateway.dump(variant)),
                    before,
                    "{context}: {message}"
                );
            }
        } else if kind == 1 {
            let path = gateway.scratch().join("request");
            std::fs::write(&path, request.to_string()).unwrap();
            let mut command = gateway.command(&[PROGRAM]);
            command
                .stdin(File::open(&path).unwrap())
                .stdout(Stdio::null());
            let mut child = command.spawn().unwrap();
            std::thread::sleep(Duration::from_micros(dice.throw(20_000) as u64));
            child.kill().unwrap();
            child.wait().unwrap();
            while !crate::lab::sh(&["ip", "netns", "pids", &gateway.name]).is_empty() {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        assert_eq!(
            foreign(&quiet(&gateway.dump(variant))),
            foreign(&before),
            "{context}"
        );
        let result = gateway.ask(&request);
        assert_eq!(
            result["failed"],
            json!(false),
            "{context}: {request}\n{result}"
        );
        let after = gateway.dump(variant);
        assert_eq!(
            foreign(&quiet(&after)),
            foreign(&before),
            "{context}: {request}"
        );
        let again = gateway.ask(&request);
        assert_eq!(
            again["changed"],
            json!(false),
            "{context}: {request}\n{again}"
        );
        assert_eq!(gateway.dump(variant), after, "{context}");
        if request["state"] == "absent" {
            assert!(!after.lines().any(is_ours), "{context}\n{after}");
        }
    }
}

#[test]
fn random_steps_break_no_promise() {
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .map(|text| text.parse::<u64>().unwrap())
    };
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let seed = number("SEED").unwrap_or(now);
    let steps = usize::try_from(number("STEPS").unwrap_or(60)).unwrap();
    println!("SEED={seed} STEPS={steps}");
    std::thread::scope(|scope| {
        for variant in VARIANTS {
            scope.spawn(move || run(variant, seed, steps));
        }
    });
}
