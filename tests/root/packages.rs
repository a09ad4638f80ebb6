//! The packages, installed and used as a user would: by apt, rpm and cfbs.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

use crate::collection::packaged;
use crate::lab::{Namespace, sh, shown};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// A throw-away copy of this machine's file system, with a network of its own.
struct Copy {
    namespace: Namespace,
    process: Child,
}

impl Copy {
    fn new() -> Self {
        let namespace = Namespace::new("p");
        let scratch = namespace.scratch().to_str().unwrap().to_owned();
        let script = format!(
            "set -e; mount -t tmpfs tmpfs {scratch}; cd {scratch}; mkdir upper work root\n\
             mount -t overlay -o lowerdir=/,upperdir=upper,workdir=work overlay root\n\
             for place in proc sys dev; do mount --rbind /$place root/$place; done\n\
             mount -t tmpfs -o mode=755 tmpfs root/run; mkdir root/run/lock; echo ready; exec sleep 1000"
        );
        let mut command = Command::new("ip");
        command.args([
            "netns",
            "exec",
            &namespace.name,
            "unshare",
            "--mount",
            "sh",
            "-c",
            &script,
        ]);
        let mut process = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        let output = process.stdout.take().unwrap();
        BufReader::new(output).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        Self { namespace, process }
    }

    fn try_shell(&self, command: &str) -> Output {
        let pid = self.process.id().to_string();
        let root = self.namespace.scratch().join("root");
        let mut shell = Command::new("nsenter");
        shell.args(["--mount", "--net", "--target", &pid, "chroot"]);
        shell.arg(root).args(["sh", "-c", command]);
        shell
            .env("HOME", "/root")
            .env("DEBIAN_FRONTEND", "noninteractive");
        shell.output().unwrap()
    }

    fn shell(&self, command: &str) -> String {
        let output = self.try_shell(command);
        assert!(output.status.success(), "{command}: {}", shown(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    fn write(&self, path: &str, text: &str) {
        self.shell(&format!(
            "mkdir -p $(dirname {path}); cat >{path} <<'END'\n{text}\nEND"
        ));
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// The name of this architecture in a package of Debian.
fn debian_architecture() -> String {
    sh(&["dpkg", "--print-architecture"]).trim().to_owned()
}

fn deb() -> String {
    let file = packaged(&format!(
        "iptables-balance_{VERSION}_{}.deb",
        debian_architecture()
    ));
    file.to_str().unwrap().to_owned()
}

#[test]
fn the_deb_installs_upgrades_works_and_goes() {
    let copy = Copy::new();
    copy.shell("rm -f /etc/apt/apt.conf.d/99* ; dpkg --audit");
    // An older version, to upgrade from. It has a file that the new one has not.
    copy.shell(&format!(
        "dpkg-deb -R {} /tmp/old && sed -i 's/^Version: .*/Version: 0.1.9/' /tmp/old/DEBIAN/control \
         && touch /tmp/old/usr/share/iptables_balance/old && dpkg-deb -b /tmp/old /tmp/old.deb",
        deb()
    ));
    copy.shell("apt-get install -y /tmp/old.deb");
    copy.shell(&format!(
        "cp {} /tmp/new.deb && apt-get install -y /tmp/new.deb",
        deb()
    ));
    assert_eq!(
        copy.shell("iptables_balance --version"),
        format!("iptables_balance {VERSION}\n")
    );
    let listed = copy.shell("dpkg -L iptables-balance; dpkg --verify iptables-balance");
    assert!(
        !listed.contains("/usr/share/iptables_balance/old"),
        "{listed}"
    );
    uses(&copy);
    copy.write(
        "/etc/iptables_balance/W.json",
        r#"{"name": "W", "state": "absent"}"#,
    );
    copy.shell("systemd-analyze verify --man=yes iptables_balance@W.service");
    copy.shell("apt-get remove -y iptables-balance");
    assert!(
        !copy
            .try_shell("iptables_balance --version")
            .status
            .success()
    );
    copy.shell("apt-get install -y /tmp/new.deb && apt-get purge -y iptables-balance");
    let left = copy.shell("find /etc /lib /usr /var/lib -xdev -name 'iptables[_-]balance*'");
    assert_eq!(
        left, "/etc/iptables_balance\n",
        "the user's own directory stays"
    );
}

/// Program, man pages, completions, Ansible and CFEngine, by their usual paths.
fn uses(copy: &Copy) {
    let documented = copy.shell("ansible-doc -j iptables_balance");
    let documented: Value = serde_json::from_str(&documented).unwrap();
    assert_eq!(
        documented["iptables_balance"]["doc"]["module"],
        "iptables_balance"
    );
    let examples = "/usr/share/doc/iptables-balance/examples";
    copy.shell(&format!(
        "cd {examples}/ansible && ansible-playbook -i inventory.ini nth.yml"
    ));
    assert!(copy.shell("iptables-save -t nat").contains("-j CFENGINE\n"));
    copy.shell("mkdir -p /tmp/w/bin /tmp/w/inputs; chmod 700 /tmp/w/inputs; ln -s /usr/bin/cf-promises /tmp/w/bin/");
    let agent = "cf-agent -w /tmp/w -KI -f";
    let kept = copy.shell(&format!("{agent} {examples}/cfengine/hubs.cf"));
    assert!(
        !kept.contains("info:") && !kept.contains("The balancer"),
        "{kept}"
    );
    copy.write("/tmp/policy/main.cf", "body common control { inputs => { \"/usr/share/iptables_balance/cfengine/enable.cf\" }; bundlesequence => { \"main\" }; }\n\
        bundle agent main\n{\n  iptables_balance:\n    \"CFENGINE\" state => \"absent\";\n}");
    let said = copy.shell(&format!("{agent} /tmp/policy/main.cf"));
    assert!(said.contains("info: Deleted chain 'CFENGINE'"), "{said}");
    assert!(!copy.shell("iptables-save -t nat").contains(":CFENGINE "));
    for page in [
        "8 iptables_balance",
        "5 iptables_balance",
        "8 iptables_balance-check",
    ] {
        let complaints = copy.shell(&format!(
            "zcat $(man -w {page}) | man --warnings -l - 2>&1 >/dev/null"
        ));
        assert_eq!(complaints, "", "{page}");
    }
    // Bash completes the subcommands; the other shells read their files.
    let completed = copy.shell(
        "bash -c '. /usr/share/bash-completion/completions/iptables_balance; COMP_WORDS=(iptables_balance pl); COMP_CWORD=1; \
         _iptables_balance iptables_balance pl iptables_balance; echo ${COMPREPLY[*]}'",
    );
    assert_eq!(completed, "plan\n");
    copy.shell("zsh -n /usr/share/zsh/vendor-completions/_iptables_balance");
    copy.shell("fish -n /usr/share/fish/vendor_completions.d/iptables_balance.fish");
}

#[test]
fn lintian_finds_no_error() {
    let output = Command::new("lintian")
        .args(["--allow-root", "--fail-on", "error,warning", &deb()])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", shown(&output));
}

#[test]
fn the_rpm_installs_verifies_and_goes() {
    let file = packaged(&format!(
        "iptables-balance-{VERSION}-1.{}.rpm",
        std::env::consts::ARCH
    ));
    let root = tempfile::tempdir().unwrap();
    let rpm = |arguments: &[&str]| {
        let root = root.path().to_str().unwrap();
        sh(&[
            &["rpm", "--root", root, "--dbpath", "/var/lib/rpm"],
            arguments,
        ]
        .concat())
    };
    let file = file.to_str().unwrap();
    // Debian has no database of rpm packages in which its requirements could be found.
    rpm(&["-i", "--nodeps", file]);
    assert_eq!(
        rpm(&["-q", "iptables-balance"]),
        format!("iptables-balance-{VERSION}-1.{}\n", std::env::consts::ARCH)
    );
    rpm(&["-V", "--nodeps", "iptables-balance"]);
    assert!(rpm(&["-q", "--requires", "iptables-balance"]).contains("glibc >= 2.17"));
    let program = root.path().join("usr/sbin/iptables_balance");
    assert_eq!(
        sh(&[program.to_str().unwrap(), "--version"]),
        format!("iptables_balance {VERSION}\n")
    );
    rpm(&["-e", "iptables-balance"]);
    assert!(!program.exists());
}

/// The program of the other architecture makes the same plan.
#[test]
fn the_programs_of_both_architectures_agree() {
    let plans = ["x86_64", "aarch64"].map(|arch| {
        let archive = packaged(&format!("iptables_balance-{VERSION}-{arch}.tar.gz"));
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_str().unwrap();
        sh(&[
            "tar",
            "-xzf",
            archive.to_str().unwrap(),
            "-C",
            path,
            "--strip-components=1",
        ]);
        for file in [
            "man/iptables_balance.8",
            "completions/iptables_balance.bash",
            "systemd/iptables_balance@.service",
            "LICENSE-MIT",
        ] {
            assert!(directory.path().join(file).exists(), "{file}");
        }
        let program = format!("{path}/iptables_balance");
        let emulator = format!("qemu-{arch}-static");
        let emulated = [emulator.as_str(), "-L", "/usr/aarch64-linux-gnu"];
        let native: &[&str] = if arch == std::env::consts::ARCH {
            &[]
        } else {
            &emulated
        };
        let request = format!("{ROOT}/examples/json/random.json");
        sh(&[native, &[&program, "plan", &request]].concat())
    });
    assert!(plans[0].contains("--mode random") && plans[0] == plans[1]);
}

/// A project of cfbs in a directory, with an index of its own, since the usual
/// one is on the network.
struct Project {
    namespace: Namespace,
}

impl Project {
    fn new() -> Self {
        let project = Self {
            namespace: Namespace::new("b"),
        };
        project.cfbs("--non-interactive --git no init --masterfiles no");
        project.run("echo '{\"name\": \"i\", \"description\": \"i\", \"type\": \"index\", \"index\": {}}' >index.json; sed -i '2i \"index\": \"./index.json\",' cfbs.json");
        project
    }

    fn run(&self, script: &str) -> String {
        let script = format!(
            "set -e; cd {}; {script}",
            self.namespace.scratch().display()
        );
        let home = format!("HOME={}", self.namespace.scratch().display());
        let git = [
            "GIT_AUTHOR_NAME=a",
            "GIT_AUTHOR_EMAIL=a@b",
            "GIT_COMMITTER_NAME=a",
            "GIT_COMMITTER_EMAIL=a@b",
        ];
        self.namespace
            .run(&[&["env", &home], &git[..], &["sh", "-c", &script]].concat())
    }

    fn cfbs(&self, arguments: &str) -> String {
        self.run(&format!("{ROOT}/tests/.venv/bin/cfbs {arguments}"))
    }

    /// Runs the policy set of the build beside Debian's, as `cf-agent` would on a host.
    fn agent(&self) -> String {
        self.run(
            "mkdir -p w/bin w/inputs; chmod 700 w/inputs; ln -sf /usr/bin/cf-promises w/bin/\n\
             cp -r /usr/share/cfengine3/masterfiles/. out/masterfiles/. w/inputs/; chmod -R go-w w/inputs\n\
             cf-agent -w $PWD/w -KI 2>&1",
        )
    }

    fn keeps_the_balancer(&self) {
        let said = self.agent();
        assert!(
            said.contains("info: Created chain 'CFENGINE' in table 'nat' of ipv4"),
            "{said}"
        );
        let rules = self.namespace.run(&["iptables-save", "-t", "nat"]);
        assert!(
            rules.contains("--dport 5308 -j CFENGINE\n") && rules.contains("CFENGINE/masq"),
            "{rules}"
        );
        let again = self.agent();
        assert!(
            !again.contains("chain 'CFENGINE'") && !again.contains("rule '"),
            "{again}"
        );
        let mode = self.run("stat -c %a w/modules/promises/iptables_balance");
        assert_eq!(mode, "755\n");
    }
}

#[test]
fn cfbs_adds_the_module_from_a_directory_and_the_agent_runs_it() {
    let project = Project::new();
    let module = packaged("cfbs");
    project.run(&format!(
        "cp -r {} iptables_balance; cp iptables_balance/example.json iptables_balance/def.json",
        module.display()
    ));
    project.cfbs("--non-interactive --git no add ./iptables_balance/");
    project.cfbs("build");
    project.keeps_the_balancer();
}

/// The same module in a Git repository, with the answers to its questions.
#[test]
fn cfbs_adds_the_module_by_its_address_and_asks_for_balancers() {
    let project = Project::new();
    let module = packaged("cfbs");
    project.run(&format!("mkdir repositories; cp -r {} repositories/module; cd repositories/module; git init -q .; git add -A; git commit -qm module", module.display()));
    let base = format!(
        "--base-path={}",
        project.namespace.scratch().join("repositories").display()
    );
    // The daemon itself: `git daemon` would stay beside it as its parent.
    let program = sh(&["git", "--exec-path"]).trim().to_owned() + "/git-daemon";
    let mut daemon = project.namespace.command(&[
        &program,
        &base,
        "--export-all",
        "--listen=127.0.0.1",
        "--reuseaddr",
        "--verbose",
    ]);
    let mut daemon = daemon.stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    let mut said = BufReader::new(daemon.stderr.take().unwrap());
    said.read_line(&mut line).unwrap();
    assert!(line.contains("Ready to rumble"), "{line}");
    let added = project.run(&format!(
        "{ROOT}/tests/.venv/bin/cfbs --non-interactive --git no add git://127.0.0.1/module"
    ));
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    drop(said);
    assert!(added.contains("promise-type-iptables-balance"), "{added}");
    project.run(&format!(
        "printf 'CFENGINE\\n5308\\n10.9.0.1:5308,10.9.0.2:5308\\n\\n\\nno\\n' | {ROOT}/tests/.venv/bin/cfbs --git no input promise-type-iptables-balance"
    ));
    project.cfbs("build");
    project.keeps_the_balancer();
    assert!(
        !Path::new(
            &project
                .namespace
                .scratch()
                .join("out/masterfiles/services/cfbs/iptables_balance/.git")
        )
        .exists()
    );
    fs::metadata(
        project
            .namespace
            .scratch()
            .join("out/masterfiles/services/cfbs/iptables_balance/iptables_balance.cf"),
    )
    .unwrap();
}
