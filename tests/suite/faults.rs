//! Every single system call that matters made to fail, or to say that it did
//! what it did not, on real iptables: the host is as before or as asked for, and
//! the result says which.

use std::fs;
use std::process::Output;
use std::thread;

use serde_json::{Value, json};

use crate::lab::{Namespace, PROGRAM, VARIANTS, shown};

/// Back to a balancer with a UDP client of its only backend, and forwarding off.
const RESET: &str = "
printf %s \"$1\" | \"$2\" >/dev/null || exit
echo 0 > /proc/sys/net/ipv4/ip_forward
rm -f \"$3\" /etc/sysctl.d/zz-iptables_balance.conf
conntrack -L 2>/dev/null | grep -q sport=4000 && exit
conntrack -I -p udp -s 10.8.0.2 -d 10.8.0.1 --sport 4000 --dport 5308 --dst-nat 10.9.0.1 -t 600 2>/dev/null >&2";

/// All that the request changes.
const STATE: &str = "
iptables-$1-save -c | grep W
cat /proc/sys/net/ipv4/ip_forward
cat /etc/sysctl.d/zz-* \"$2\" 2>&1
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
            "backends": "10.9.0.2,10.9.0.3", "disconnect": "always", "ip_forward": true, "forward": true,
            "persist": self.file(),
        })
    }

    /// Under strace, which follows the main thread alone: it does all that is
    /// written.
    fn traced(&self, options: &[&str]) -> Output {
        let strace = [&["strace", "-o", "/dev/null"], options, &[PROGRAM]].concat();
        self.namespace.feed(&strace, &self.request().to_string())
    }

    /// How often the program makes a call.
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

    /// Runs the program with a fault, and sees that it told the truth.
    fn spoil(&self, options: &[&str]) {
        let output = self.traced(options);
        // What was said to be renamed is still there under its first name.
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
                // Where connections cannot be listed, it says that they stay.
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
                let no_thread = message.ends_with("Resource temporarily unavailable\" }");
                let says = says.iter().any(|said| message.ends_with(said));
                assert!(says || no_thread, "{what}");
                // That a connection has ended cannot be undone.
                let mut before = vec![self.before.clone()];
                if message.contains("but for connections that have ended already") {
                    before.push(self.before.trim_end_matches("1\n").to_owned() + "0\n");
                }
                assert!(before.contains(&now), "{what}\n{now}");
                assert_eq!(result["changed"], json!(false), "{what}");
            }
            // It could not start, or nobody heard it.
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

    /// All calls of a name on a file.
    fn spoil_on(&self, path: &str, call: &str, fault: &str) {
        let inject = format!("inject={call}:{fault}");
        self.spoil(&["-P", path, "-e", &format!("trace={call}"), "-e", &inject]);
    }
}

#[test]
fn whatever_goes_wrong_the_host_is_as_before_or_as_asked_for() {
    const EACH: [(&str, &str); 5] = [
        ("flock", "ENOLCK"),
        ("sendto", "EPERM"),
        ("recvfrom", "ENOBUFS"),
        ("pipe2", "EMFILE"),
        ("clone3", "EAGAIN"),
    ];
    // What fails, or only says that it was done.
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
