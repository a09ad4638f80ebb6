//! A long run of a watcher: random events, after each of which the rules become what a
//! plain model says. `SEED` repeats one, `STEPS` makes it longer.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::dice::Dice;
use crate::lab::{Lab, Namespace, PROGRAM, VARIANTS, shown};
use crate::watch::{Switch, Watcher, write_request};

const SERVERS: [&str; 6] = [
    "10.9.0.1:5308",
    "10.9.0.2:5308",
    "10.9.0.3:5308",
    "10.9.0.4:5308",
    "[fd09::1]:5308",
    "[fd09::2]:5308",
];

/// A backend of the request.
#[derive(Clone, Copy, Default)]
struct Backend {
    weight: u64,
    backup: bool,
    is_listed: bool,
}

/// The contract in a few lines.
struct Model {
    variant: &'static str,
    alive: [bool; 6],
    held: [bool; 6],
    backends: [Backend; 6],
    /// Per cent; `None` is `never`.
    panic_threshold: Option<u64>,
}

impl Model {
    fn new(variant: &'static str) -> Self {
        Self {
            variant,
            alive: [true; 6],
            held: [false; 6],
            backends: [Backend {
                weight: 1,
                backup: false,
                is_listed: true,
            }; 6],
            panic_threshold: Some(0),
        }
    }

    fn request(&self) -> Value {
        let listed = (0..6).filter(|at| self.backends[*at].is_listed);
        let backends: Vec<Value> = listed
            .map(|at| {
                let (backend, (address, port)) =
                    (self.backends[at], SERVERS[at].rsplit_once(':').unwrap());
                json!({
                    "address": address.trim_matches(['[', ']']), "port": port, "weight": backend.weight,
                    "backup": backend.backup,
                })
            })
            .collect();
        let threshold = self
            .panic_threshold
            .map_or(json!("never"), |per_cent| json!(per_cent));
        json!({
            "name": "W", "variant": self.variant, "destination": ["10.8.0.1", "fd08::1"], "destination_port": 5308,
            "backends": backends,
            "health": {"interval": 0.1, "timeout": 0.2, "fall": 2, "rise": 2, "panic_threshold": threshold},
        })
    }

    /// The backends that get new connections.
    fn in_service(&self) -> BTreeSet<String> {
        let families = [0..4, 4..6];
        families
            .into_iter()
            .flat_map(|family| self.in_service_of(&family.collect::<Vec<_>>()))
            .map(|at| SERVERS[at].to_owned())
            .collect()
    }

    fn in_service_of(&self, family: &[usize]) -> Vec<usize> {
        let chosen = |from: &[usize], wanted: &dyn Fn(usize) -> bool| -> Vec<usize> {
            from.iter().copied().filter(|at| wanted(*at)).collect()
        };
        let is_backup = |at: usize| self.backends[at].backup;
        let can_serve = |at: usize| {
            self.backends[at].is_listed && self.backends[at].weight > 0 && !self.held[at]
        };
        let weight = |of: &[usize]| -> u64 { of.iter().map(|at| self.backends[*at].weight).sum() };
        let all = chosen(family, &can_serve);
        let healthy = chosen(&all, &|at| self.alive[at]);
        let regular = |of: &[usize]| chosen(of, &|at| !is_backup(at));
        let is_panic = self
            .panic_threshold
            .is_some_and(|limit| weight(&healthy) * 100 <= weight(&all) * limit);
        if regular(&healthy).is_empty() && !healthy.is_empty() {
            return healthy;
        }
        let candidates = if is_panic { all } else { healthy };
        match regular(&candidates) {
            none if none.is_empty() => candidates,
            regular => regular,
        }
    }
}

/// The backends that new connections are led to.
fn led_to(gateway: &Namespace, variant: &str) -> BTreeSet<String> {
    let dump = ["iptables", "ip6tables"]
        .map(|program| gateway.run(&[&format!("{program}-{variant}-save"), "-t", "nat"]))
        .concat();
    let lines = dump.lines().filter(|line| !line.contains("W/drain"));
    let led = lines.filter_map(|line| line.split("--to-destination ").nth(1));
    led.map(str::to_owned).collect()
}

struct Run<'a> {
    gateway: &'a Namespace,
    switch: Switch,
    watcher: Option<Watcher<'a>>,
    model: Model,
    dice: Dice,
}

impl Run<'_> {
    fn step(&mut self) -> String {
        let at = self.dice.throw(6);
        let server = SERVERS[at];
        match self.dice.throw(12) {
            0..=2 => {
                self.model.alive[at] = !self.model.alive[at];
                self.turn(at);
                format!("{server} alive: {}", self.model.alive[at])
            }
            3 => {
                let alive = self.dice.throw(3) > 0;
                self.model.alive = [alive; 6];
                (0..6).for_each(|at| self.turn(at));
                format!("all alive: {alive}")
            }
            4 => {
                let result = self.gateway.apply(&self.model.request());
                format!("a run, changed: {}", result["changed"])
            }
            5 => {
                let mut request = self.model.request();
                request["check"] = json!(true);
                self.gateway.apply(&request);
                "a check".to_owned()
            }
            6 | 7 if self.model.backends[at].is_listed => {
                self.model.held[at] = !self.model.held[at];
                let word = ["release", "hold"][usize::from(self.model.held[at])];
                let output = self.gateway.feed(&[PROGRAM, word, "W", server], "");
                assert!(
                    output.status.success(),
                    "{word} {server}: {}",
                    shown(&output)
                );
                format!("{word} {server}")
            }
            8 => {
                self.change_request();
                match &self.watcher {
                    Some(watcher) => {
                        watcher.signal("-HUP");
                        self.wait_until_applied();
                    }
                    None => drop(self.gateway.apply(&self.model.request())),
                }
                format!("another request: {}", self.model.request())
            }
            9 => {
                self.stop("-KILL");
                self.start();
                "killed and started again".to_owned()
            }
            10 => {
                self.stop("-TERM");
                // Verdicts are old after three intervals. Then a run finds out by itself.
                std::thread::sleep(Duration::from_millis(350));
                self.gateway.apply(&self.model.request());
                let is = led_to(self.gateway, self.model.variant);
                assert_eq!(is, self.model.in_service(), "a run alone");
                self.start();
                "stopped, a run, and started".to_owned()
            }
            _ => {
                let family = ["iptables", "ip6tables"][self.dice.throw(2)];
                let program = format!("{family}-{}", self.model.variant);
                let chain = ["W", "PREROUTING"][self.dice.throw(2)];
                self.gateway
                    .run(&[&program, "-w", "-t", "nat", "-F", chain]);
                format!("{program} -F {chain}")
            }
        }
    }

    fn turn(&mut self, at: usize) {
        let word = ["down", "up"][usize::from(self.model.alive[at])];
        self.switch.turn(word, &[SERVERS[at]]);
    }

    fn change_request(&mut self) {
        for at in 0..6 {
            let is_listed = self.dice.throw(5) > 0;
            // A backend that is not listed cannot be held or released by name.
            self.model.backends[at] = Backend {
                weight: [1, 1, 1, 2, 0][self.dice.throw(5)],
                backup: self.dice.throw(4) == 0,
                is_listed: is_listed || self.model.held[at] || at == 0 || at == 4,
            };
        }
        self.model.panic_threshold = [Some(0), Some(50), None][self.dice.throw(3)];
        write_request(self.gateway, &self.model.request());
    }

    /// `hold` and `release` know the backends of the request that was applied.
    fn wait_until_applied(&self) {
        let kept = self.gateway.scratch().join("state/W.json");
        let is_kept = || {
            let text = fs::read(&kept).ok()?;
            Some(serde_json::from_slice::<Value>(&text).ok()? == self.model.request())
        };
        let end = Instant::now() + Duration::from_secs(20);
        while is_kept() != Some(true) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn start(&mut self) {
        self.watcher = Some(Watcher::again(self.gateway, &[]));
    }

    fn stop(&mut self, signal: &str) {
        if let Some(mut watcher) = self.watcher.take() {
            watcher.signal(signal);
            watcher.end();
        }
    }

    /// Waits until the rules are those of the model, and a run would change nothing.
    fn settle(&self, context: &str) {
        let end = Instant::now() + Duration::from_secs(20);
        let wanted = self.model.in_service();
        let mut is = led_to(self.gateway, self.model.variant);
        while is != wanted {
            let log = || fs::read_to_string(self.gateway.scratch().join("log")).unwrap();
            assert!(
                Instant::now() < end,
                "{context}: {is:?} instead of {wanted:?}, alive {:?}, held {:?}, {}\n{}",
                self.model.alive,
                self.model.held,
                self.model.request(),
                log()
            );
            std::thread::sleep(Duration::from_millis(20));
            is = led_to(self.gateway, self.model.variant);
        }
    }

    /// Nothing changes any more, whoever looks.
    fn is_settled(&self, context: &str) {
        // The verdicts are as they will be, and the rules are mended.
        std::thread::sleep(Duration::from_millis(500));
        let result = self.gateway.apply(&self.model.request());
        assert_eq!(result["changed"], json!(false), "{context}: {result}");
        let is = led_to(self.gateway, self.model.variant);
        assert_eq!(is, self.model.in_service(), "{context}");
    }
}

fn run(variant: &'static str, seed: u64, steps: usize) {
    let lab = Lab::new();
    let mut run = Run {
        gateway: &lab.gateway,
        switch: Switch::new(&lab.servers),
        watcher: None,
        model: Model::new(variant),
        dice: Dice(seed),
    };
    run.switch.turn("up", &SERVERS);
    write_request(run.gateway, &run.model.request());
    run.start();
    run.settle("start");
    // The request is kept after the rules are there.
    run.is_settled("start");
    for step in 0..steps {
        let mut context = format!("{variant}, SEED={seed}, step {step}");
        for _ in 0..=run.dice.throw(3) {
            context = format!("{context}; {}", run.step());
        }
        if step % 100 == 99 {
            println!("{context}");
        }
        run.settle(&context);
        if step % 4 == 3 {
            run.is_settled(&context);
            run.settle(&context);
        }
    }
    run.stop("-TERM");
}

#[test]
fn after_random_events_the_rules_become_what_the_contract_says() {
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .map(|text| text.parse::<u64>().unwrap())
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let seed = number("SEED").unwrap_or(now.as_secs());
    let steps = usize::try_from(number("STEPS").unwrap_or(12)).unwrap();
    println!("SEED={seed} STEPS={steps}");
    std::thread::scope(|scope| {
        for variant in VARIANTS {
            scope.spawn(move || run(variant, seed, steps));
        }
    });
}
