//! Other releases of iptables: stand-ins that have their ways, seen with the
//! releases themselves (`tests/releases.sh`), and dumps that they made.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::kernel::{crowded, ours, states};
use crate::lab::{Namespace, PROGRAM, VARIANTS, shown};

/// iptables-nft 1.8.2 by its dump.
const OLD_SAVE: (&str, &str) = (
    "iptables-save",
    "#!/bin/sh\n/usr/sbin/iptables-save \"$@\" | sed 's/iptables-save v1[.0-9]*/xtables-save v1.8.2/'\n",
);

/// iptables-nft 1.8.2 as it takes a transaction: it takes a number for a file,
/// crashes at a `-F` that is not first, knows no options after a `-D` by text,
/// heeds the first `-R`, puts an `-I` just below another to the top, and one at
/// the same place as another below it.
const OLD_RESTORE: (&str, &str) = (
    "iptables-restore",
    r#"#!/bin/bash
for word; do [[ $word = -w ]] && { echo "Can't open 10: No such file or directory" >&2; exit 1; }; done
set -o pipefail
awk '
/^[*]/ { begun = 0; replaced = 0; split("", last); split("", same) }
/^-F/ && begun { exit 139 }
/^-[AIRD]/ { begun = 1; if (searched) { print "Extension does not know id 63" > "/dev/stderr"; exit 1 } }
/^-D/ && $3 !~ /^[0-9]+$/ { searched = 1 }
/^-R/ && replaced++ { next }
/^-I/ && $3 ~ /^[0-9]+$/ {
  at = $3
  if (last[$2] == at - 1) $3 = ""; else $3 = at + same[$2, at]++
  last[$2] = at
}
{ print }
' >"$0.text" || exit
exec /usr/sbin/iptables-restore "$@" <"$0.text"
"#,
);

#[test]
fn an_old_nft_gets_from_every_state_to_the_next() {
    let states = states("nft");
    let fresh = states.iter().map(|state| {
        let namespace = crowded("nft");
        namespace.apply(state);
        ours(&ipv4(&namespace))
    });
    let fresh: Vec<_> = fresh.collect();
    let namespace = crowded("nft");
    let plain = |state: &Value| {
        let mut state = state.clone();
        // By the plain names, so that it is the stand-ins that are found.
        state.as_object_mut().unwrap().remove("variant");
        state
    };
    // Every step from one to the next, and from one to the one after that.
    let order = (0..states.len()).chain((0..2 * states.len()).step_by(2));
    for at in order.map(|at| at % states.len()) {
        let done = namespace.ask_with_stand_ins(&[OLD_SAVE, OLD_RESTORE], &plain(&states[at]));
        assert_eq!(done["failed"], json!(false), "{done}");
        assert_eq!(ours(&ipv4(&namespace)), fresh[at], "{done}");
        let again = namespace.ask_with_stand_ins(&[OLD_SAVE, OLD_RESTORE], &plain(&states[at]));
        assert_eq!(again["changed"], json!(false), "{again}");
    }
}

fn ipv4(namespace: &Namespace) -> String {
    namespace.run(&["iptables-nft-save"])
}

/// Several rules that lead in change among those of others, and are put back
/// to their places when the other family fails.
#[test]
fn with_an_old_nft_what_leads_in_keeps_its_place() {
    let namespace = Namespace::new("o");
    namespace.run(&[
        "sh",
        "-c",
        "iptables-nft -t nat -A PREROUTING -p udp -j ACCEPT",
    ]);
    // More ports than go into one rule.
    let request = |first: u16, backends: &str| {
        let range = |n: u16| format!("{}:{}", first + 10 * n, first + 10 * n + 1);
        let ports: Vec<String> = (0..15).map(range).collect();
        json!({"name": "W", "destination_port": ports, "backends": backends})
    };
    let old = [OLD_SAVE, OLD_RESTORE];
    let done = namespace.ask_with_stand_ins(&old, &request(80, "10.9.0.1"));
    assert_eq!(done["failed"], json!(false), "{done}");
    namespace.run(&[
        "sh",
        "-c",
        "iptables-nft -t nat -A PREROUTING -p sctp -j ACCEPT",
    ]);
    let leads = || {
        let dump = ipv4(&namespace);
        let leads = dump
            .lines()
            .filter(|line| line.starts_with("-A PREROUTING"));
        leads.map(str::to_owned).collect::<Vec<_>>()
    };
    let before = leads();
    let refusing = ("ip6tables-restore", "#!/bin/sh\ncat >/dev/null\nexit 1\n");
    let [save, restore] = old;
    let failed = namespace.ask_with_stand_ins(
        &[save, restore, refusing],
        &request(1080, "10.9.0.1,fd09::1"),
    );
    let message = failed["msg"].to_string();
    assert!(message.contains("the host is as before"), "{message}");
    assert_eq!(leads(), before);
    let done = namespace.ask_with_stand_ins(&old, &request(1080, "10.9.0.1"));
    assert_eq!(done["failed"], json!(false), "{done}");
    let ours = |leads: Vec<String>| {
        let ours = leads.into_iter().map(|line| line.ends_with("-j W"));
        ours.collect::<Vec<_>>()
    };
    assert_eq!(ours(leads()), ours(before));
}

/// There chains are filled anew when an undo changes something in them: also
/// rules that were never touched keep what they counted, even if somebody else
/// wrote into the chain meanwhile.
#[test]
fn with_an_old_nft_an_undo_loses_no_counters() {
    const REFUSES: &str = "#!/bin/sh\ncat >/dev/null\nexit 1\n";
    const SPOILS: &str =
        "#!/bin/sh\ncat >/dev/null\niptables-nft -t nat -I W -p tcp -j RETURN\nexit 1\n";
    let namespace = Namespace::new("o");
    let request =
        |backends: &str| json!({"name": "W", "destination_port": 80, "backends": backends});
    namespace.apply(&request("10.9.0.1,10.9.0.2,10.9.0.3"));
    let counted = || {
        let dump = namespace.run(&["iptables-nft-save", "-c", "-t", "nat"]);
        let ours = dump.lines().filter(|line| line.contains("-A W "));
        ours.map(str::to_owned).collect::<Vec<_>>()
    };
    let rules = counted().into_iter().enumerate().map(|(at, line)| {
        let rule = line.split_once("-A W ").unwrap().1.to_owned();
        format!("-A W -c {at}7 {at}700 {rule}\n")
    });
    let rules: String = rules.collect();
    namespace.restore(
        "iptables-nft-restore",
        &format!("*nat\n-F W\n{rules}COMMIT\n"),
    );
    let before = counted();
    assert!(before[2].starts_with("[27:2700]"), "{before:?}");
    for other_family in [REFUSES, SPOILS] {
        let stand_ins = [OLD_SAVE, OLD_RESTORE, ("ip6tables-restore", other_family)];
        let failed = namespace
            .ask_with_stand_ins(&stand_ins, &request("10.9.0.1,10.9.0.2,10.9.0.4,fd09::1"));
        let message = failed["msg"].to_string();
        assert!(message.contains("the host is as before"), "{message}");
        assert_eq!(counted(), before);
    }
}

/// An old version that calls itself a new one: what it leaves out is noticed,
/// and done then.
#[test]
fn an_omitted_change_is_retried() {
    let namespace = Namespace::new("o");
    let request =
        |backends: &str| json!({"name": "W", "destination_port": 80, "backends": backends});
    let heeds_one = (
        "iptables-restore",
        "#!/bin/bash\nawk '/^-R/ && seen++ {next} {print}' | exec /usr/sbin/iptables-restore \"$@\"\n",
    );
    namespace.apply(&request("10.9.0.1,10.9.0.2,10.9.0.3,10.9.0.4,10.9.0.5"));
    let other = request("10.9.0.1,10.9.0.6,10.9.0.3,10.9.0.7,10.9.0.5");
    let done = namespace.ask_with_stand_ins(&[heeds_one], &other);
    assert_eq!(done["failed"], json!(false), "{done}");
    assert_eq!(namespace.apply(&other)["changed"], json!(false));
}

/// iptables-nft-restore 1.8.4 takes what follows a chain's name for another line.
#[test]
fn chains_are_made_in_words_that_every_release_takes() {
    let trips = "#!/bin/bash\ntee \"$0.text\" | grep -q '^:' && { echo \"Bad argument '-'\" >&2; exit 2; }\nexec /usr/sbin/{} \"$@\" <\"$0.text\"\n";
    let stand_ins = ["iptables-restore", "ip6tables-restore"];
    let scripts = stand_ins.map(|name| (name, trips.replace("{}", name)));
    let stand_ins = scripts
        .each_ref()
        .map(|(name, script)| (*name, script.as_str()));
    let namespace = Namespace::new("o");
    for state in states("nft") {
        let mut state = state;
        state.as_object_mut().unwrap().remove("variant");
        let done = namespace.ask_with_stand_ins(&stand_ins, &state);
        assert_eq!(done["failed"], json!(false), "{done}");
    }
}

/// Until 1.8.4 iptables-nft-save crashes when rules change meanwhile.
#[test]
fn a_save_that_crashes_is_begun_again() {
    let namespace = Namespace::new("o");
    let request = json!({"name": "W", "destination_port": 80, "backends": "10.9.0.1"});
    namespace.apply(&request);
    let log = namespace.scratch().join("log");
    let crashes = |times: u32| {
        format!(
            "#!/bin/bash\n[[ $1 = --version ]] && exec /usr/sbin/iptables-save --version\n\
             echo . >>{0}; (($(wc -l <{0}) > {times})) || kill -SEGV $$\nexec /usr/sbin/iptables-save \"$@\"\n",
            log.display()
        )
    };
    let ask = |times| {
        fs::remove_file(&log).ok();
        let result = namespace.ask_with_stand_ins(&[("iptables-save", &crashes(times))], &request);
        (result, fs::read_to_string(&log).unwrap().len() / 2)
    };
    let (kept, started) = ask(2);
    assert_eq!(
        (&kept["failed"], &kept["changed"]),
        (&json!(false), &json!(false)),
        "{kept}"
    );
    assert_eq!(started, 3);
    let (failed, started) = ask(1000);
    let message = failed["msg"].to_string();
    assert!(
        message.contains("(ended by a signal); nothing was changed"),
        "{message}"
    );
    assert_eq!(started, 3, "it is not tried for ever");
}

/// Until 1.8.3 iptables-nft-save passes over a table that it cannot show.
#[test]
fn a_table_that_is_passed_over_is_refused() {
    let namespace = Namespace::new("o");
    namespace.run(&["nft", "table ip nat { chain PREROUTING { type nat hook prerouting priority -100; tcp dport { 80, 81 } dnat to numgen inc mod 2 map { 0 : 10.9.0.1, 1 : 10.9.0.2 }; }; }"]);
    let before = namespace.run(&["nft", "list", "ruleset"]);
    let silent = (
        "iptables-save",
        "#!/bin/bash\n/usr/sbin/iptables-save \"$@\" | sed '/incompatible/d'\n",
    );
    let request = json!({"name": "W", "destination_port": 80, "backends": "10.9.0.1"});
    let refused = namespace.ask_with_stand_ins(&[silent], &request);
    let message = refused["msg"].to_string();
    assert!(
        message.contains("the IPv4 table `nat` has rules that `nft` made"),
        "{message}"
    );
    assert_eq!(namespace.run(&["nft", "list", "ruleset"]), before);
}

/// Before 1.6.2 `iptables-restore` knows no `-w` and takes no lock, and
/// `iptables-save` knows no `--version`.
#[test]
fn a_restore_that_takes_no_lock_runs_under_ours() {
    let namespace = Namespace::new("o");
    let lock = namespace.scratch().join("xtables.lock");
    let theirs = namespace.scratch().join("other.lock");
    let restore = format!(
        "#!/bin/bash\nfor word; do [[ $word = -w ]] && {{ echo \"iptables-restore: invalid option -- 'w'\" >&2; echo \"Can't open 10: No such file or directory\" >&2; exit 1; }}; done\n\
         flock -n {lock} true && {{ echo 'nobody holds the lock' >&2; exit 1; }}\n\
         XTABLES_LOCKFILE={theirs} exec /usr/sbin/iptables-legacy-restore \"$@\"\n",
        lock = lock.display(),
        theirs = theirs.display()
    );
    let save = "#!/bin/bash\n[[ $1 = --version ]] && { echo \"iptables-save: unrecognized option '--version'\" >&2; exit 1; }\n\
                exec /usr/sbin/iptables-legacy-save \"$@\"\n";
    let stand_ins = [
        ("iptables-save", save),
        ("iptables-restore", restore.as_str()),
    ];
    let named = format!("XTABLES_LOCKFILE={}", lock.display());
    let ask = |backends: &str| -> Value {
        let request = json!({"name": "W", "destination_port": 80, "backends": backends, "wait": 1});
        let output = namespace.feed_with_stand_ins(
            &stand_ins,
            &["env", &named, PROGRAM],
            &request.to_string(),
        );
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", shown(&output)))
    };
    let done = ask("10.9.0.1");
    assert_eq!(
        (&done["failed"], &done["variant"]),
        (&json!(false), &json!("legacy")),
        "{done}"
    );
    let before = namespace.dump("legacy");

    let held = fs::File::create(&lock).unwrap();
    held.lock().unwrap();
    let message = ask("10.9.0.2")["msg"].to_string();
    assert!(
        message
            .contains("another program held the xtables lock for more than 1 s (attribute `wait`)"),
        "{message}"
    );
    assert_eq!(namespace.dump("legacy"), before);
    drop(held);
    assert_eq!(ask("10.9.0.2")["changed"], json!(true));
}

/// One of each kind of rule that we write, side by side.
fn requests(variant: &str) -> Vec<Value> {
    let named = |(at, mut state): (usize, Value)| {
        state["name"] = json!(format!("R{at}"));
        state
    };
    let states = states(variant)
        .into_iter()
        .filter(|state| state["state"] != "absent");
    states.enumerate().map(named).collect()
}

/// Dumps of other releases after these requests show nothing to do.
/// `RECORD=NAME tests/releases.sh RELEASE releases::dumps` records those of a
/// release.
#[test]
fn dumps_of_other_releases_read_as_nothing_to_do() {
    let recorded = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/recorded");
    let record = std::env::var("RECORD");
    for variant in VARIANTS {
        if let Ok(name) = &record {
            let namespace = Namespace::new("o");
            for request in requests(variant) {
                namespace.apply(&request);
            }
            for (family, program) in [("ipv4", "iptables"), ("ipv6", "ip6tables")] {
                let dump = namespace.run(&[&format!("{program}-{variant}-save"), "-c"]);
                let file = format!("{name}-{variant}.{family}");
                // Where there is no such variant of it, that is another's.
                if dump.contains(&format!("save v{name} ")) {
                    fs::write(recorded.join(file), dump).unwrap();
                }
            }
        }
    }
    let mut dumps: Vec<PathBuf> = fs::read_dir(&recorded)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    dumps.sort_unstable();
    assert!(dumps.len() >= 20, "{dumps:?}");
    let namespace = Namespace::new("o");
    for dump in &dumps {
        let file = dump.to_str().unwrap();
        let family = dump.extension().unwrap().to_str().unwrap();
        let text = fs::read_to_string(dump).unwrap();
        for request in requests("nft") {
            let plan = [PROGRAM, "plan", "-", "--family", family, "--current", file];
            let planned = namespace.feed(&plan, &request.to_string());
            assert!(
                planned.status.success() && planned.stdout.is_empty(),
                "{file} {request}: {}",
                shown(&planned)
            );
            // It does not come from seeing nothing at all.
            let name = request["name"].as_str().unwrap();
            let emptied = text.replace(&format!("-j {name}\n"), "-j ACCEPT\n");
            let other = namespace.scratch().join("dump");
            fs::write(&other, &emptied).unwrap();
            let plan = [
                PROGRAM,
                "plan",
                "-",
                "--family",
                family,
                "--current",
                other.to_str().unwrap(),
            ];
            let planned = namespace.feed(&plan, &request.to_string());
            let differs = emptied != text;
            assert_eq!(
                differs,
                !planned.stdout.is_empty(),
                "{file} {request}: {}",
                shown(&planned)
            );
        }
    }
}
