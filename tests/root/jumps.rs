//! Jump rules that iptables cannot delete by their text, on real iptables.

use std::fs;
use std::thread;

use serde_json::{Value, json};

use crate::lab::{Namespace, VARIANTS};

/// In each family and table jumps of all kinds among foreign rules, which look
/// alike and lead elsewhere.
const CROWD: &str = "*nat
:W - [0:0]
:W/old - [0:0]
:WW - [0:0]
-A PREROUTING -p udp -m recent --set --name a -j WW
-A PREROUTING -p tcp -m recent --set --name a -j W
-A PREROUTING -p tcp -m tcp --dport 80 -j W
-A PREROUTING -p udp -m connlimit --connlimit-above 3 -j WW
-A PREROUTING -p tcp -m connlimit --connlimit-above 3 -g W/old
-A PREROUTING -p tcp -m recent --set --name a -j ACCEPT
-A OUTPUT -m recent --set --name a -j W
-A WW -p tcp -m recent --rcheck --name a -j W
-A WW -p tcp -m recent --rcheck --name a -j RETURN
COMMIT
*filter
:W - [0:0]
-A FORWARD -m recent --set --name a -j ACCEPT
-A FORWARD -m recent --set --name a -j W
COMMIT
";

fn crowded(variant: &str) -> Namespace {
    let namespace = Namespace::new("j");
    for program in ["iptables", "ip6tables"] {
        namespace.restore(&format!("{program}-{variant}-restore"), CROWD);
    }
    namespace
}

fn foreign(dump: &str) -> Vec<String> {
    let is_foreign = |line: &&str| {
        !line
            .split([' ', ':'])
            .any(|word| word == "W" || word.starts_with("W/"))
    };
    dump.lines().filter(is_foreign).map(str::to_owned).collect()
}

fn request(variant: &str) -> Value {
    json!({
        "name": "W", "variant": variant, "destination_port": 80, "forward": true,
        "backends": "10.9.0.1,10.9.0.2,fd09::1",
    })
}

fn undeletable(dump: &str) -> usize {
    let leads = |line: &&str| line.contains(" -m recent ") || line.contains(" -m connlimit ");
    let ours = |line: &&str| line.ends_with(" W") || line.ends_with(" W/old");
    dump.lines().filter(leads).filter(ours).count()
}

#[test]
fn jumps_that_iptables_cannot_delete_are_deleted_and_no_foreign_rule_is() {
    for variant in VARIANTS {
        for state in ["present", "absent"] {
            let namespace = crowded(variant);
            let before = namespace.dump(variant);
            assert_eq!(undeletable(&before), 10, "{before}");
            let mut request = request(variant);
            request["state"] = json!(state);
            request["check"] = json!(true);
            let predicted = namespace.apply(&request);
            request["check"] = json!(false);
            let done = namespace.apply(&request);
            assert_eq!(done["changes"], predicted["changes"], "{variant}");
            let after = namespace.dump(variant);
            assert_eq!(undeletable(&after), 0, "{variant} {after}");
            assert_eq!(foreign(&after), foreign(&before), "{variant} {state}");
            assert_eq!(namespace.apply(&request)["changed"], json!(false));
            if state == "present" {
                // The jump that is right kept its place between the others.
                let jumps = after.lines().filter(|line| line.contains("-A PREROUTING"));
                let kept = jumps
                    .clone()
                    .position(|line| line.ends_with("--dport 80 -j W"));
                assert_eq!(kept, Some(1), "{after}");
            }
        }
    }
}

/// Others insert rules above ours all the time, so that numbers move.
#[test]
fn a_rule_number_never_hits_a_foreign_rule() {
    for variant in VARIANTS {
        let namespace = crowded(variant);
        let request = request(variant);
        let absent = json!({"name": "W", "variant": variant, "state": "absent"});
        let script = "for n in $(seq 1 150); do iptables-$1 -w 10 -t nat -I PREROUTING -p tcp --dport $((2000 + n)) -m recent --set --name a -j WW || exit; done";
        thread::scope(|threads| {
            let others = threads.spawn(|| namespace.run(&["sh", "-c", script, "-", variant]));
            while !others.is_finished() {
                let text = "*nat\n-I PREROUTING -p tcp -m recent --set --name a -j W\nCOMMIT\n";
                namespace.apply(&request);
                namespace.restore(&format!("iptables-{variant}-restore"), text);
                namespace.apply(&absent);
            }
            others.join().unwrap();
        });
        let dump = namespace.dump(variant);
        for number in 1..=150 {
            let rule = format!("--dport {} -m recent", 2000 + number);
            assert_eq!(dump.matches(&rule).count(), 1, "{variant} {rule}\n{dump}");
        }
        assert_eq!(undeletable(&dump), 0, "{variant} {dump}");
    }
}

/// Whoever holds the lock of xtables is waited for, and the rest is rolled back.
#[test]
fn a_jump_that_cannot_be_deleted_leaves_the_host_as_before() {
    let namespace = crowded("legacy");
    let before = namespace.dump("legacy");
    let lock = namespace.scratch().join("xtables.lock");
    // As an iptables that does not know of XTABLES_LOCKFILE: it waits for us.
    let script = format!(
        "#!/bin/sh\n[ \"$XTABLES_LOCKFILE\" = {0} ] || {{ echo 'Another app is currently holding the xtables lock' >&2; exit 4; }}\n\
         exec /usr/sbin/iptables-legacy-restore \"$@\"\n",
        lock.display()
    );
    let stand_in = [("iptables-legacy-restore", script.as_str())];
    let failed = namespace.ask_with_stand_ins(&stand_in, &request("legacy"));
    let message = failed["msg"].as_str().unwrap();
    assert!(
        message.contains("by which iptables cannot find its rules (-m recent, -m connlimit)")
            && message.contains("xtables lock")
            && message.ends_with("; the host is as before"),
        "{message}"
    );
    assert_eq!(namespace.dump("legacy"), before);
    assert!(fs::exists(lock).unwrap());
}
