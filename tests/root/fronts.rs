//! One life of a pool by a playbook and by a policy: names that change,
//! connections that end, clients that are refused, files for the next boot.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::lab::{Namespace, VARIANTS};
use crate::{ansible, cfengine, gateway};

/// The frontend that is used.
#[derive(Clone, Copy, Debug)]
pub enum Front {
    Playbook,
    Policy,
}

/// The result of a run: changed or failed, and all messages.
pub struct Told {
    pub outcome: Result<bool, ()>,
    pub said: String,
}

impl Front {
    pub fn ask(self, namespace: &Namespace, request: &Value) -> Told {
        match self {
            Self::Playbook => {
                let tasks = json!([{"iptables_balance": request, "diff": true}]);
                let playbook = ansible::playbook(namespace, &tasks);
                let played = ansible::play(namespace, "/usr/bin", &playbook, &["-v"]);
                Told {
                    outcome: match played.recap("failed") {
                        0 => Ok(played.recap("changed") == 1),
                        _ => Err(()),
                    },
                    said: played.text,
                }
            }
            Self::Policy => {
                let attributes = request.as_object().unwrap().iter();
                let attributes = attributes.filter(|(name, _)| *name != "name");
                let worded =
                    attributes.map(|(name, value)| format!("{name} => {},", worded(value)));
                let promise = format!(
                    "  iptables_balance: \"{}\" {} classes => outcome(\"one\");",
                    request["name"].as_str().unwrap(),
                    worded.collect::<Vec<_>>().join(" ")
                );
                let policy = cfengine::policy(namespace, "one.cf", &cfengine::promises(&promise));
                let said = cfengine::agent(namespace, &policy, &["-KI"]);
                let is = |line: &str| said.iter().any(|said| said == line);
                Told {
                    outcome: match (is("R: one repaired"), is("R: one kept")) {
                        (true, _) => Ok(true),
                        (_, true) => Ok(false),
                        _ => Err(()),
                    },
                    said: said.join("\n"),
                }
            }
        }
    }

    /// Runs twice: the second run has nothing to do. Returns the messages of
    /// the first.
    fn settle(self, namespace: &Namespace, request: &Value) -> String {
        let done = self.ask(namespace, request);
        assert_eq!(done.outcome, Ok(true), "{self:?} {request}\n{}", done.said);
        let again = self.ask(namespace, request);
        assert_eq!(
            again.outcome,
            Ok(false),
            "{self:?} {request}\n{}",
            again.said
        );
        done.said
    }
}

/// As a policy writes it.
fn worded(value: &Value) -> String {
    match value {
        Value::String(text) => format!("\"{text}\""),
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(worded).collect();
            format!("{{ {} }}", items.join(", "))
        }
        other => format!("\"{other}\""),
    }
}

#[test]
fn playbooks_and_policies_run_a_gateway_alike() {
    for front in [Front::Playbook, Front::Policy] {
        for variant in VARIANTS {
            let mut lab = gateway::lab("udp");
            lab.gateway = lab.gateway.with_etc_of_its_own();
            let (client, gateway) = (&lab.client, &lab.gateway);
            let etc = gateway.etc.clone().unwrap();
            let hosts = |text: &str| fs::write(etc.join("hosts"), text).unwrap();
            fs::write(
                etc.join("nsswitch.conf"),
                "passwd: files\ngroup: files\nhosts: files\n",
            )
            .unwrap();
            // Where rules of the plain names' variant are loaded at boot, and a file of one's own for the other.
            gateway.add_units();
            let own = gateway.scratch().join("saved");
            let persist = match variant {
                "nft" => json!(true),
                _ => json!(own.to_str().unwrap()),
            };
            let saved = || match variant {
                "nft" => fs::read_to_string(etc.join("iptables/iptables.rules")).unwrap(),
                _ => fs::read_to_string(&own).unwrap(),
            };
            let request = |backends: Value, more: Value| {
                let mut request = json!({
                    "name": "W", "variant": variant, "protocol": "udp", "destination_port": 5308,
                    "backends": backends, "persist": persist,
                });
                request
                    .as_object_mut()
                    .unwrap()
                    .extend(more.as_object().unwrap().clone());
                request
            };
            let answer =
                || gateway::ask(client, "udp", "10.8.0.1:5308", &["--from", "4000"])[1].clone();

            hosts("10.9.0.1 hub.test\n");
            let named = request(json!(["hub.test"]), json!({"disconnect": "udp"}));
            front.settle(gateway, &named);
            assert_eq!(answer(), "10.9.0.1 from 10.8.0.2", "{front:?} {variant}");
            assert!(saved().contains("--to-destination 10.9.0.1"));

            // The name moves on, and the old server's clients with it.
            hosts("10.9.0.2 hub.test\n");
            let said = front.settle(gateway, &named);
            assert!(said.contains("10.9.0.1"), "{said}");
            let ended = ["delete_connections", "Deleted connections"];
            assert!(ended.iter().any(|word| said.contains(word)), "{said}");
            assert_eq!(answer(), "10.9.0.2 from 10.8.0.2", "{front:?} {variant}");
            assert!(saved().contains("--to-destination 10.9.0.2"));

            // The name is gone, and nothing changes.
            hosts("");
            let before = gateway.dump(variant);
            let failed = front.ask(gateway, &named);
            assert_eq!(failed.outcome, Err(()), "{}", failed.said);
            assert!(failed.said.contains("hub.test"), "{}", failed.said);
            assert_eq!(gateway.dump(variant), before);

            // Nobody is left: clients are told so, or not.
            let refuses = request(
                json!(["10.9.0.2 weight=0"]),
                json!({"when_empty": "reject"}),
            );
            front.settle(gateway, &refuses);
            let asked = gateway::ask(client, "udp", "10.8.0.1:5308", &["--from", "4001"]);
            assert_eq!(asked[1], "ConnectionRefusedError", "{front:?} {variant}");
            let drops = request(json!(["10.9.0.2 weight=0"]), json!({"when_empty": "drop"}));
            front.settle(gateway, &drops);
            let asked = gateway::ask(client, "udp", "10.8.0.1:5308", &["--from", "4002"]);
            assert_eq!(asked[1], "TimeoutError", "{front:?} {variant}");

            // A file that cannot be: it says which, and nothing changes.
            let nowhere = Path::new("/nowhere/saved");
            let before = gateway.dump(variant);
            let unsaved = request(json!(["10.9.0.3"]), json!({"persist": nowhere}));
            let failed = front.ask(gateway, &unsaved);
            assert_eq!(failed.outcome, Err(()), "{}", failed.said);
            assert!(failed.said.contains("/nowhere/saved"), "{}", failed.said);
            assert_eq!(gateway.dump(variant), before);

            let absent =
                json!({"name": "W", "variant": variant, "state": "absent", "persist": persist});
            front.settle(gateway, &absent);
            let ours = |text: &str| text.contains(":W") || text.contains("-j W");
            assert!(!ours(&gateway.dump(variant)) && !ours(&saved()));
        }
    }
}

#[test]
fn playbooks_and_policies_tell_alike_why_they_had_to_give_up() {
    for front in [Front::Playbook, Front::Policy] {
        for variant in VARIANTS {
            let mut host = Namespace::new("u");
            let request = json!({
                "name": "W", "variant": variant, "destination_port": 5308, "backends": "10.9.0.1", "wait": 1,
                "ip_forward": true,
            });
            let gives_up = |host: &Namespace, reason: &str| {
                let before = host.dump(variant);
                let failed = front.ask(host, &request);
                assert_eq!(failed.outcome, Err(()), "{front:?} {}", failed.said);
                assert!(failed.said.contains(reason), "{front:?} {}", failed.said);
                assert_eq!(host.dump(variant), before);
            };
            let locked = |name: &str| {
                let lock = fs::File::create(host.scratch().join(name)).unwrap();
                lock.lock().unwrap();
                lock
            };

            let lock = locked("balance.lock");
            gives_up(&host, "another run held the lock");
            drop(lock);

            if variant == "legacy" {
                let lock = locked("xtables.lock");
                gives_up(&host, "another program held the xtables lock");
                drop(lock);
            }

            host.hidden = Some("/proc/sys/net/ipv4");
            gives_up(
                &host,
                "ip_forward: cannot tell whether this host forwards IPv4",
            );
            host.hidden = None;
            front.settle(&host, &request);
        }
    }
}
