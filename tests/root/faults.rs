//! Each system call that matters fails, or reports a success that it did not
//! have, on real iptables. The host is then as before or as requested, and the
//! result tells which.

use std::fs;
use std::process::Output;
use std::thread;

use serde_json::{Value, json};

use crate::lab::{Namespace, PROGRAM, VARIANTS, shown};

/// Back to a balancer with a UDP client of its only backend, and forwarding off.
const RESET: &str = "
printf %s \"$1\" | \"$2\" >/dev/null || exit
echo 0 > /proc/sys/net/ipv4/ip_forward
echo 0 > /proc/sys/net/ipv6/conf/all/forwarding
rm -f \"$3\" \"$3\"6 /etc/sysctl.d/zz-iptables_balance.conf
conntrack -L 2>/dev/null | grep -q sport=4000 && exit
conntrack -I -p udp -s 10.8.0.2 -d 10.8.0.1 --sport 4000 --dport 5308 --dst-nat 10.9.0.1 -t 600 2>/dev/null >&2";

/// The state that the request changes.
const STATE: &str = "
iptables-$1-save -c | grep '^[^#].*W'
ip6tables-$1-save -c | grep '^[^#].*W'
cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding
cat /etc/sysctl.d/zz-* \"$2\" \"$2\"6 2>&1
ls -A /etc/sysctl.d $(dirname \"$2\")
conntrack -L 2>/dev/null | grep -c sport=4000
true";

struct Host {
    namespace: Namespace,
    variant: &'static str,
    before: String,
    after: String,
}

impl Host {
    fn new(variant: &'static str) -> Self {
        let namespace = Namespace::new("f").with_etc_of_its_own();
        let mut host = Self {
            namespace,
            variant,
            before: String::new(),
            after: String::new(),
        };
        host.reset();
        host.namespace.apply(&host.request());
        host.after = host.state();
        host.reset();
        host.before = host.state();
        assert_ne!(host.before, host.after);
        host
    }

    fn reset(&self) {
        let first = json!({
            "name": "W", "variant": self.variant, "protocol": "udp", "destination_port": 5308, "backends": "10.9.0.1",
        });
        let script = ["sh", "-c", RESET, "-", &first.to_string(), PROGRAM];
        self.namespace.run(&[&script[..], &[&self.file()]].concat());
    }

    fn file(&self) -> String {
        self.namespace.scratch().join("rules").display().to_string()
    }

    fn state(&self) -> String {
        let script = ["sh", "-c", STATE, "-", self.variant, &self.file()];
        self.namespace.run(&script)
    }

    fn request(&self) -> Value {
        json!({
            "name": "W", "variant": self.variant, "protocol": "udp", "destination_port": 5308,
            "backends": "10.9.0.2,10.9.0.3,fd09::2", "disconnect": "always", "ip_forward": true, "forward": true,
            "persist": {"ipv4": self.file(), "ipv6": self.file() + "6"},
        })
    }

    /// Runs the program under strace, which follows the main thread alone: it
    /// writes everything.
    fn traced(&self, options: &[&str]) -> Output {
        let strace = [&["strace", "-o", "/dev/null"], options, &[PROGRAM]].concat();
        self.namespace.feed(&strace, &self.request().to_string())
    }

    /// The number of times that the program makes a call.
    fn count(&self, call: &str) -> usize {
        let log = self.namespace.scratch().join("calls");
        let trace = format!("trace={call}");
        let output = self.traced(&["-e", &trace, "-o", log.to_str().unwrap()]);
        assert!(output.status.success(), "{}", shown(&output));
        let text = fs::read_to_string(&log).unwrap();
        fs::remove_file(log).unwrap();
        self.reset();
        text.lines().filter(|line| line.starts_with(call)).count()
    }

    /// Runs the program with a fault, and checks that its report is true.
    fn spoil(&self, options: &[&str]) {
        let output = self.traced(options);
        // The rename was only reported: the temporary file is still there.
        if options
            .last()
            .is_some_and(|fault| fault.contains("renameat:retval=0"))
        {
            fs::remove_file(options[1]).ok();
            fs::remove_file(
                self.namespace
                    .etc
                    .as_ref()
                    .unwrap()
                    .join(options[1].trim_start_matches("/etc/")),
            )
            .ok();
        }
        let now = self.state();
        let what = format!("{} {options:?}: {}", self.variant, shown(&output));
        match serde_json::from_slice::<Value>(&output.stdout) {
            Ok(result) if result["failed"] == json!(false) => {
                // Connections that cannot be listed stay, and the warning says
                // so.
                let stay = result["warnings"]
                    .to_string()
                    .contains("cannot be ended here");
                let after = self.after.trim_end_matches("0\n").to_owned();
                let after = after + if stay { "1\n" } else { "0\n" };
                assert_eq!(now, after, "{what}");
            }
            Ok(result) => {
                let message = result["msg"].as_str().unwrap();
                let says = ["the host is as before", "nothing was changed"];
                assert!(says.iter().any(|said| message.ends_with(said)), "{what}");
                // The end of a connection cannot be rolled back.
                let mut before = vec![self.before.clone()];
                if message.contains("but for connections that have ended already") {
                    before.push(self.before.trim_end_matches("1\n").to_owned() + "0\n");
                }
                assert!(before.contains(&now), "{what}\n{now}");
                assert_eq!(result["changed"], json!(false), "{what}");
            }
            // The program could not start, or its reply was lost.
            Err(_) => {
                assert!(
                    output.stdout.is_empty() && !output.status.success(),
                    "{what}"
                );
                assert!(now == self.before || now == self.after, "{what}\n{now}");
            }
        }
        if now != self.before {
            self.reset();
            assert_eq!(self.state(), self.before, "{what}");
        }
    }

    /// Each call of a name in turn.
    fn spoil_each(&self, call: &str, error: &str) {
        let count = self.count(call);
        assert!(count > 0, "{call} is not made any more");
        for number in 1..=count {
            let inject = format!("inject={call}:error={error}:when={number}");
            self.spoil(&["-e", &format!("trace={call}"), "-e", &inject]);
        }
    }

    /// The processes that the program starts, by the call that starts each, and
    /// the number of those up to the first that writes.
    fn process_starts(&self) -> (Vec<(&'static str, usize)>, usize) {
        let log = self.namespace.scratch().join("starts");
        let log = log.to_str().unwrap();
        let calls = "trace=clone3,clone,fork,vfork,execve";
        let output = self.traced(&["-f", "-e", calls, "-o", log]);
        assert!(output.status.success(), "{}", shown(&output));
        let text = fs::read_to_string(log).unwrap();
        fs::remove_file(log).unwrap();
        self.reset();
        assert!(!text.contains("CLONE_THREAD"), "a thread was started");
        // strace pads short numbers of processes with blanks.
        let calls = text.lines().filter_map(|line| line.split_once(' '));
        let calls: Vec<_> = calls
            .map(|(process, call)| (process, call.trim_start()))
            .collect();
        let main = calls[0].0;
        let starts = |name: &str| {
            let start = format!("{name}(");
            let made = calls
                .iter()
                .filter(|(process, call)| *process == main && call.starts_with(&start));
            made.count()
        };
        let writes =
            |(_, call): &&(&str, &str)| call.starts_with("execve(") && call.contains("-restore\"");
        let before_write = calls.iter().take_while(|call| !writes(call));
        let before_write = before_write.filter(|(process, call)| {
            let is_start = ["clone", "fork", "vfork"]
                .iter()
                .any(|name| call.starts_with(name));
            *process == main && is_start
        });
        let names = ["clone3", "clone", "fork", "vfork"];
        let found = names.map(|name| (name, starts(name)));
        let found = found.into_iter().filter(|(_, count)| *count > 0).collect();
        (found, before_write.count())
    }

    /// All calls of a name on a file.
    fn spoil_on(&self, path: &str, call: &str, fault: &str) {
        let inject = format!("inject={call}:{fault}");
        self.spoil(&["-P", path, "-e", &format!("trace={call}"), "-e", &inject]);
    }
}

#[test]
fn a_failing_system_call_leaves_the_host_as_before_or_as_asked_for() {
    const EACH: [(&str, &str); 4] = [
        ("flock", "ENOLCK"),
        ("sendto", "EPERM"),
        ("recvfrom", "ENOBUFS"),
        ("pipe2", "EMFILE"),
    ];
    // Calls on files that fail, or only report success.
    const ON_FILES: [(&str, &str); 9] = [
        ("openat", "error=EMFILE"),
        ("write", "error=ENOSPC"),
        ("fchmod", "error=EPERM"),
        ("fchmod", "retval=0"),
        ("fsync", "error=EIO"),
        ("fsync", "retval=0"),
        ("unlink", "error=EIO"),
        ("renameat", "error=EIO"),
        ("renameat", "retval=0"),
    ];
    thread::scope(|threads| {
        for variant in VARIANTS {
            threads.spawn(move || {
                let host = Host::new(variant);
                for (call, error) in EACH {
                    host.spoil_each(call, error);
                }
                let saved = host.namespace.scratch().join(".rules.iptables_balance");
                let settings = "/etc/sysctl.d/.zz-iptables_balance.conf.iptables_balance";
                for path in [saved.to_str().unwrap(), settings] {
                    for (call, fault) in ON_FILES {
                        host.spoil_on(path, call, fault);
                    }
                }
                let forwarding = "/proc/sys/net/ipv4/ip_forward";
                for (call, fault) in [
                    ("openat", "error=EACCES"),
                    ("write", "error=EIO"),
                    ("write", "retval=1"),
                ] {
                    host.spoil_on(forwarding, call, fault);
                }
                // The kernel never hears that the connection is to end, and so never answers.
                let last = host.count("sendto");
                let inject = format!("inject=sendto:retval=80:when={last}");
                host.spoil(&["-e", "trace=sendto", "-e", &inject]);
            });
        }
    });
}

/// A change of both families, both tables, a file and a connection, where each
/// process in turn cannot be started: alone, and with the eight after it, which
/// are those of the rollback. No thread is started at all.
/// `FAULT_RUNS=20` repeats it that often.
#[test]
fn a_process_that_cannot_be_started_leaves_the_host_as_before_or_as_asked_for() {
    let runs = std::env::var("FAULT_RUNS").map_or(3, |runs| runs.parse().unwrap());
    thread::scope(|threads| {
        for variant in VARIANTS {
            threads.spawn(move || {
                let host = Host::new(variant);
                let (starts, _) = host.process_starts();
                assert!(!starts.is_empty());
                for (call, count) in starts {
                    assert!(count > 8, "{variant} {call} {count}");
                    for (number, last) in (1..=count).flat_map(|at| [(at, at), (at, at + 8)]) {
                        for _ in 0..runs {
                            let when = format!("inject={call}:error=EAGAIN:when={number}..{last}");
                            host.spoil(&["-e", &format!("trace={call}"), "-e", &when]);
                        }
                    }
                }
            });
        }
    });
}

/// No process can be started any more after the first write: the message says
/// that the rollback failed, and the next run completes the change.
#[test]
fn a_rollback_that_cannot_start_a_process_says_so() {
    for variant in VARIANTS {
        let host = Host::new(variant);
        let (starts, before_write) = host.process_starts();
        let call = starts[0].0;
        let inject = format!("inject={call}:error=EAGAIN:when={}+", before_write + 1);
        let output = host.traced(&["-e", &format!("trace={call}"), "-e", &inject]);
        let result: Value = serde_json::from_slice(&output.stdout).unwrap();
        let message = result["msg"].as_str().unwrap();
        assert!(
            message.contains("undoing it failed too (")
                && message.contains("what is left cannot be read ("),
            "{message}"
        );
        assert_eq!(result["changed"], json!(true), "{result}");
        assert_ne!(host.state(), host.before);
        host.namespace.apply(&host.request());
        // The connection stays until it expires: no rule names its backend any more.
        let state = host.state();
        assert_eq!(
            state.trim_end_matches("1\n"),
            host.after.trim_end_matches("0\n")
        );
    }
}
