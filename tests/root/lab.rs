//! A laboratory of network namespaces: a client, a gateway with iptables, and
//! servers that answer with their own address. It is gone when it is dropped.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_iptables_balance");
pub const VARIANTS: [&str; 2] = ["nft", "legacy"];
const LAB: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/lab.py");

/// A name that no other lab has, also none of another run of the tests.
fn unique(role: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!(
        "ipb{}{role}{}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    )
}

/// A network namespace with tables of its own.
pub struct Namespace {
    pub name: String,
    servers: Vec<Child>,
    scratch: tempfile::TempDir,
    /// The directory that is mounted as `/etc`.
    pub etc: Option<PathBuf>,
    /// A directory of which nothing is seen in here.
    pub hidden: Option<&'static str>,
}

impl Namespace {
    pub fn new(role: &str) -> Self {
        let name = unique(role);
        sh(&["ip", "netns", "add", &name]);
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let namespace = Self {
            name,
            servers: Vec::new(),
            scratch,
            etc: None,
            hidden: None,
        };
        namespace.run(&["ip", "link", "set", "lo", "up"]);
        namespace.forward(true);
        // No waiting for somebody else to have an address of ours.
        namespace.run(&["sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0"]);
        namespace
    }

    /// Gives the namespace a copy of `/etc`, without units that load rules at
    /// boot.
    pub fn with_etc_of_its_own(mut self) -> Self {
        let etc = self.scratch().join("etc");
        // Without root some files cannot be read; they are not needed.
        let mut copy = Command::new("cp");
        copy.args(["-a", "/etc"]).arg(&etc).stderr(Stdio::null());
        copy.status().expect("cp starts");
        for directory in ["systemd/system", "iptables", "sysctl.d"] {
            fs::create_dir_all(etc.join(directory)).expect("a directory");
        }
        self.etc = Some(etc);
        self
    }

    /// Units in Arch's manner, which load rules at boot.
    pub fn add_units(&self) {
        let etc = self.etc.as_ref().expect("an /etc of its own");
        for program in ["iptables", "ip6tables"] {
            let load = format!("/usr/sbin/{program}-restore /etc/iptables/{program}.rules");
            let unit = etc.join(format!("systemd/system/{program}.service"));
            fs::write(unit, format!("[Service]\nExecStart={load}\n")).expect("a unit");
        }
    }

    /// Switches forwarding of both families.
    pub fn forward(&self, on: bool) {
        let value = u8::from(on);
        let settings = ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"];
        let settings = settings.map(|name| format!("{name}={value}"));
        self.run(&["sysctl", "-qw", &settings[0], &settings[1]]);
    }

    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// A command in here, with an xtables lock of its own.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let etc = self.etc.as_ref();
        let etc = etc.map(|etc| format!("mount --bind {} /etc && ", etc.display()));
        let hide = |directory| format!("mount -t tmpfs nothing {directory} && ");
        let mounts = etc.into_iter().chain(self.hidden.map(hide));
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]);
        let script = mounts.collect::<String>() + "exec \"$@\"";
        if script.starts_with("mount") {
            command.args(["unshare", "--mount", "sh", "-c", &script, "-"]);
        }
        command.args(arguments);
        command.env("XTABLES_LOCKFILE", self.scratch().join("xtables.lock"));
        command.env(
            "IPTABLES_BALANCE_LOCKFILE",
            self.scratch().join("balance.lock"),
        );
        command.env("IPTABLES_BALANCE_STATE_DIR", self.scratch().join("state"));
        command.env("IPTABLES_BALANCE_RUNTIME_DIR", self.scratch().join("run"));
        command
    }

    /// Runs a command that must succeed; returns its output.
    pub fn run(&self, arguments: &[&str]) -> String {
        let output = self
            .command(arguments)
            .output()
            .expect("ip netns exec starts");
        succeeded(arguments, &output);
        String::from_utf8(output.stdout).expect("text")
    }

    pub fn feed(&self, arguments: &[&str], input: &str) -> Output {
        let mut command = self.command(arguments);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("starts");
        child
            .stdin
            .take()
            .expect("a pipe")
            .write_all(input.as_bytes())
            .ok();
        child.wait_with_output().expect("ends")
    }

    /// A request in plain JSON; returns the result.
    pub fn ask(&self, request: &Value) -> Value {
        let output = self.feed(&[PROGRAM], &request.to_string());
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", shown(&output)))
    }

    /// A request that must not fail.
    pub fn apply(&self, request: &Value) -> Value {
        let result = self.ask(request);
        assert_eq!(result["failed"], json!(false), "{request}\n{result}");
        result
    }

    /// All tables of both families with counters, without the lines that hold
    /// the time. On legacy only those that exist: asking loads the others.
    pub fn dump(&self, variant: &str) -> String {
        let programs = [
            format!("iptables-{variant}-save"),
            format!("ip6tables-{variant}-save"),
        ];
        let dumps = programs.map(|program| self.run(&[&program, "-c"]));
        let lines = dumps
            .iter()
            .flat_map(|dump| dump.lines())
            .filter(|line| !line.starts_with("# "));
        lines.map(|line| line.to_owned() + "\n").collect()
    }

    /// Adds to the rules, in words that this release of iptables takes: 1.8.4
    /// trips over what comes after a line `:CHAIN`, and 1.6.0 over `-w`.
    pub fn restore(&self, program: &str, text: &str) {
        let told = |option: &str| {
            let word = |line: &str| match line.strip_prefix(':').map(|line| line.split(' ')) {
                Some(mut words) => match (words.next(), words.next()) {
                    (Some(chain), Some("-")) => format!("{option} {chain}\n"),
                    (Some(chain), Some(policy)) => format!("-P {chain} {policy}\n"),
                    _ => panic!("{line}"),
                },
                None => format!("{line}\n"),
            };
            text.lines().map(word).collect::<String>()
        };
        let command = [program, "--noflush", "-w", "10"];
        let ways = [text, &told("-N"), &told("-F")];
        let tries = ways.map(|text| [4, 2].map(|words| (&command[..words], text)));
        let tries = tries.as_flattened().iter();
        let mut outputs = tries.map(|(command, text)| self.feed(command, text));
        let first = outputs.next().expect("the first way");
        assert!(
            first.status.success() || outputs.any(|output| output.status.success()),
            "{program} {text}: {}",
            shown(&first)
        );
    }

    /// Servers at these endpoints, until the namespace is dropped.
    pub fn serve(&mut self, kind: &str, endpoints: &[&str]) {
        self.start(&[&["python3", LAB, "serve", kind], endpoints].concat());
    }

    /// A program that says when it is ready, until the namespace is dropped.
    pub fn start(&mut self, arguments: &[&str]) {
        let mut command = self.command(arguments);
        let mut server = command.stdout(Stdio::piped()).spawn().expect("it starts");
        let mut line = String::new();
        BufReader::new(server.stdout.take().expect("a pipe"))
            .read_line(&mut line)
            .expect("a line");
        self.servers.push(server);
        assert_eq!(line, "ready\n");
    }

    /// The answers to that many connections, in order.
    pub fn connect(&self, kind: &str, target: &str, count: usize) -> Vec<String> {
        let answers = self.run(&["python3", LAB, "ask", kind, target, &count.to_string()]);
        answers.lines().map(str::to_owned).collect()
    }

    /// Feeds a program that finds these scripts before the programs of that name.
    pub fn feed_with_stand_ins(
        &self,
        stand_ins: &[(&str, &str)],
        arguments: &[&str],
        input: &str,
    ) -> Output {
        let directory = tempfile::tempdir_in(self.scratch()).expect("a directory");
        for (name, script) in stand_ins {
            let program = directory.path().join(name);
            fs::write(&program, script).expect("a script");
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("executable");
        }
        let path = std::env::var("PATH").expect("PATH");
        let path = format!("PATH={}:{path}", directory.path().display());
        self.feed(&[&["env", &path], arguments].concat(), input)
    }

    /// A request in plain JSON, with such stand-ins; returns the result.
    pub fn ask_with_stand_ins(&self, stand_ins: &[(&str, &str)], request: &Value) -> Value {
        let output = self.feed_with_stand_ins(stand_ins, &[PROGRAM], &request.to_string());
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", shown(&output)))
    }
}

/// The name that the variant's IPv6 restore is found by, where plain names are
/// those of nft.
pub fn restore_of_ipv6(variant: &str) -> &'static str {
    match variant {
        "nft" => "ip6tables-restore",
        _ => "ip6tables-legacy-restore",
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        for server in &mut self.servers {
            server.kill().ok();
            server.wait().ok();
        }
        Command::new("ip")
            .args(["netns", "del", &self.name])
            .status()
            .ok();
    }
}

/// Client 10.8.0.2 and `fd08::2`, gateway 10.8.0.1 and `fd08::1`, servers
/// 10.9.0.1 to 10.9.0.8 and `fd09::1` to `fd09::8` behind it.
pub struct Lab {
    pub client: Namespace,
    pub gateway: Namespace,
    pub servers: Namespace,
}

impl Lab {
    pub fn new() -> Self {
        let lab = Self {
            client: Namespace::new("c"),
            gateway: Namespace::new("g"),
            servers: Namespace::new("s"),
        };
        let (client, gateway, servers) = (&lab.client, &lab.gateway, &lab.servers);
        client.forward(false);
        servers.forward(false);
        link(client, "wan", gateway, "front");
        link(servers, "lan", gateway, "back");
        for (namespace, device, addresses) in [
            (client, "wan", ["10.8.0.2/24", "fd08::2/64"]),
            (gateway, "front", ["10.8.0.1/24", "fd08::1/64"]),
            (gateway, "back", ["10.9.0.254/24", "fd09::fe/64"]),
        ] {
            addresses
                .iter()
                .for_each(|address| add_address(namespace, device, address));
        }
        for number in 1..=8 {
            add_address(servers, "lan", &format!("10.9.0.{number}/24"));
            add_address(servers, "lan", &format!("fd09::{number}/64"));
        }
        for (namespace, gateway) in [
            (client, ["10.8.0.1", "fd08::1"]),
            (servers, ["10.9.0.254", "fd09::fe"]),
        ] {
            gateway.iter().for_each(|address| {
                drop(namespace.run(&["ip", "route", "add", "default", "via", address]));
            });
        }
        lab
    }
}

pub fn link(one: &Namespace, device: &str, other: &Namespace, other_device: &str) {
    one.run(&[
        "ip",
        "link",
        "add",
        device,
        "type",
        "veth",
        "peer",
        "name",
        other_device,
        "netns",
        &other.name,
    ]);
    one.run(&["ip", "link", "set", device, "up"]);
    other.run(&["ip", "link", "set", other_device, "up"]);
}

pub fn add_address(namespace: &Namespace, device: &str, address: &str) {
    let mut arguments = vec!["ip", "address", "add", address, "dev", device];
    if address.contains("::") {
        arguments.push("nodad");
    }
    namespace.run(&arguments);
}

pub fn sh(arguments: &[&str]) -> String {
    let output = Command::new(arguments[0])
        .args(&arguments[1..])
        .output()
        .expect("starts");
    succeeded(arguments, &output);
    String::from_utf8(output.stdout).expect("text")
}

fn succeeded(arguments: &[&str], output: &Output) {
    assert!(
        output.status.success(),
        "{}: {}",
        arguments.join(" "),
        shown(output)
    );
}

pub fn shown(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!(
        "{}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    )
}
