//! The Ansible collection as it is packaged, on hosts that real Ansible reaches
//! over a real sshd.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::SystemTime;

use serde_json::{Value, json};

use crate::ansible::{Played, releases};
use crate::lab::{Namespace, sh, shown};
use crate::ssh::SshHost;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const VERSION: &str = env!("CARGO_PKG_VERSION");
const MODULE: &str = "iptables_balance.gateway.balancer";

/// A file of `target/package`, which must be as new as what it is made from.
pub fn packaged(name: &str) -> PathBuf {
    let file = Path::new(ROOT).join("target/package").join(name);
    let made = modified(&file);
    let sources =
        ["src", "module-spec", "Cargo.toml"].map(|path| newest(&Path::new(ROOT).join(path)));
    assert!(
        made.is_some() && sources.iter().all(|source| *source <= made),
        "{} is missing or old; module-spec/package.sh makes it",
        file.display()
    );
    file
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).ok()?.modified().ok()
}

fn newest(path: &Path) -> Option<SystemTime> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let inner = entries.map(|entry| newest(&entry.path())).max().flatten();
    match path.is_dir() {
        true => inner,
        false => modified(path),
    }
}

/// The directory in which `ansible-galaxy` installed the collection.
pub fn collections() -> &'static Path {
    static INSTALLED: OnceLock<tempfile::TempDir> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_str().unwrap();
        let archive = packaged(&format!("iptables_balance-gateway-{VERSION}.tar.gz"));
        let output = Command::new("ansible-galaxy")
            .args([
                "collection",
                "install",
                archive.to_str().unwrap(),
                "-p",
                path,
            ])
            .env("HOME", path)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", shown(&output));
        directory
    });
    installed.path()
}

/// The program that the collection sends to this architecture, and its SHA-256.
fn program() -> (PathBuf, String) {
    let files = collections().join("ansible_collections/iptables_balance/gateway/files");
    let program = files.join(std::env::consts::ARCH).join("iptables_balance");
    let sum = sh(&["sha256sum", program.to_str().unwrap()]);
    (program, sum.split(' ').next().unwrap().to_owned())
}

fn play(host: &SshHost, release: &str, user: &str, tasks: &Value, options: &[&str]) -> Played {
    host.play(release, collections(), user, tasks, options)
}

fn succeeds(host: &SshHost, release: &str, user: &str, tasks: &Value, options: &[&str]) -> Played {
    let played = play(host, release, user, tasks, options);
    assert!(played.success, "{release} as {user}: {}", played.text);
    played
}

fn fails(host: &SshHost, user: &str, options: &[&str], expected: &str) {
    let played = play(host, &releases()[1], user, &json!([task("W")]), options);
    let text = played.text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(!played.success && text.contains(expected), "{text}");
}

fn task(name: &str) -> Value {
    json!({MODULE: {"name": name, "destination_port": 80, "backends": ["10.9.0.1:81", "10.9.0.2:81 weight=2"], "forward": true}})
}

const KEPT: &str = "/var/lib/iptables_balance/bin";

#[test]
fn the_program_is_sent_once_and_then_only_the_request() {
    let (_, sum) = program();
    for release in releases() {
        let host = SshHost::new("");
        let tasks = json!([task("W")]);
        let predicted = succeeds(&host, &release, "root", &tasks, &["--check", "--diff"]);
        assert_eq!(predicted.recap("changed"), 1, "{}", predicted.text);
        assert!(
            predicted.text.contains("+-A PREROUTING -p tcp"),
            "{}",
            predicted.text
        );
        assert_eq!(
            host.shell("iptables-save -t nat | grep -c :W || true"),
            "0\n"
        );
        let kept = host.shell(&format!("stat -c '%a %u %n' {KEPT} {KEPT}/*"));
        assert_eq!(
            kept,
            format!("755 0 {KEPT}\n755 0 {KEPT}/iptables_balance-{sum}\n")
        );
        let applied = succeeds(&host, &release, "root", &tasks, &["--diff"]);
        assert_eq!(applied.recap("changed"), 1);
        let before = host.received();
        let again = succeeds(&host, &release, "root", &tasks, &[]);
        let sent = host.received() - before;
        assert_eq!(again.recap("changed"), 0);
        assert!(sent <= 20 * 1024, "a converged task sent {sent} bytes");
    }
}

#[test]
fn become_works_with_sudo_and_su_with_a_password_and_at_a_terminal() {
    for release in releases() {
        let host = SshHost::new("");
        let tasks = json!([task("W")]);
        // A request in a file is a file that Ansible transfers.
        let with = |user: &str, options: &str, changed: u32, in_a_file: bool| {
            let options = ["--become", "-e", options, "-vvv"];
            let played = succeeds(&host, &release, user, &tasks, &options);
            assert_eq!(played.recap("changed"), changed, "{}", played.text);
            let is_transferred = played.text.contains("/stdin");
            assert_eq!(is_transferred, in_a_file, "{}", played.text);
        };
        with("deploy", "ansible_become_password=secret", 1, false);
        with("deploy", "ansible_become_password=secret", 0, false);
        host.shell(&format!("rm -r {KEPT}"));
        let su = "ansible_become_method=su ansible_become_password=secret";
        with("deploy", su, 0, true);
        host.shell(&format!("rm -r {KEPT}"));
        with("tight", "", 0, true);
        assert_eq!(
            host.shell(&format!("stat -c %u {KEPT}/iptables_balance-*")),
            "0\n"
        );
        assert_eq!(
            host.shell("ls -A /home/deploy /home/tight | grep -c '^.iptables_balance' || true"),
            "0\n"
        );
    }
}

#[test]
fn a_user_who_is_not_root_keeps_the_program_at_home() {
    let (_, sum) = program();
    let host = SshHost::new("");
    fails(&host, "deploy", &[], "needs the capability CAP_NET_ADMIN");
    let kept = host.shell("stat -c '%a %U %n' /home/deploy/.iptables_balance/bin/*");
    let expected =
        format!("755 deploy /home/deploy/.iptables_balance/bin/iptables_balance-{sum}\n");
    assert_eq!(kept, expected);
    let other = [
        "--become",
        "-e",
        "ansible_become_user=tight ansible_become_password=secret",
    ];
    fails(
        &host,
        "deploy",
        &other,
        "needs the capability CAP_NET_ADMIN",
    );
    let kept = host.shell("stat -c %U /home/tight/.iptables_balance/bin/*");
    assert_eq!(kept, "tight\n");
}

#[test]
fn keywords_work_as_with_any_module() {
    for release in releases() {
        let host = SshHost::new("");
        let balancer = |more: Value| {
            let mut arguments = json!({"destination_port": 80, "backends": ["10.9.0.1"]});
            arguments
                .as_object_mut()
                .unwrap()
                .extend(more.as_object().unwrap().clone());
            arguments
        };
        let tasks = json!([
            {MODULE: balancer(json!({"name": "{{ item }}"})), "loop": ["ONE", "TWO", "ONE"], "register": "looped"},
            {"ansible.builtin.assert": {"that": [
                "looped.results | map(attribute='changed') | list == [true, true, false]",
                "looped.results[0].distribution[0].share == 1.0",
            ]}},
            {MODULE: {"name": "DEFAULTS", "destination_port": 82, "backends": ["10.9.0.3"]}, "register": "defaults"},
            {"ansible.builtin.assert": {"that": ["defaults.changes | selectattr('table', 'equalto', 'filter') | list | length > 0"]}},
            {MODULE: balancer(json!({"name": "SECRET"})), "no_log": true, "register": "hidden"},
            {"ansible.builtin.assert": {"that": ["hidden.changed and 'changes' in hidden"]}},
            {MODULE: balancer(json!({"name": "OTHER"})), "delegate_to": "deploy", "become": true, "register": "delegated",
             "vars": {"ansible_become_password": "secret"}},
            {"ansible.builtin.assert": {"that": ["delegated.changed"]}},
            {MODULE: balancer(json!({"name": "LOCKED"})), "environment": {"IPTABLES_BALANCE_LOCKFILE": "/run/with a space"}},
            {"ansible.builtin.command": "stat '/run/with a space'", "changed_when": false},
            {MODULE: balancer(json!({"name": "CHECKED"})), "check_mode": true, "diff": true, "register": "checked"},
            {"ansible.builtin.assert": {"that": ["checked.changed", "'-A PREROUTING' in checked.diff.after"]}},
            {MODULE: balancer(json!({"name": "BAD", "wieght": 2})), "register": "bad", "ignore_errors": true},
            {"ansible.builtin.assert": {"that": [
                "bad.failed and not bad.changed",
                "bad.msg is match('wieght: there is no such attribute')",
            ]}},
            {MODULE: balancer(json!({"name": "LATER"})), "async": 30, "poll": 1, "register": "later"},
            {"ansible.builtin.assert": {"that": ["later.changed and later.distribution[0].address == '10.9.0.1'"]}},
            {MODULE: balancer(json!({"name": "LATER"})), "async": 30, "poll": 0, "register": "started"},
            {"ansible.builtin.async_status": {"jid": "{{ started.ansible_job_id }}"}, "register": "ended", "until": "ended.finished",
             "retries": 30, "delay": 1},
            {"ansible.builtin.assert": {"that": ["not ended.changed and 'is as it should be' in ended.msg"]}},
        ]);
        let defaults = json!({MODULE: {"forward": true}});
        let more = ["-e", "ansible_python_interpreter=/usr/bin/python3"];
        let played =
            host.play_with_defaults(&release, collections(), "root", &tasks, &defaults, &more);
        assert!(played.success, "{release}: {}", played.text);
        let rules = host.shell("iptables-save -t nat");
        for name in ["ONE", "TWO", "SECRET", "OTHER", "LOCKED", "LATER"] {
            assert!(rules.contains(&format!("-j {name}\n")), "{name}\n{rules}");
        }
        assert!(
            !rules.contains("CHECKED") && !rules.contains("BAD"),
            "{rules}"
        );
    }
}

#[test]
fn a_program_that_others_could_have_changed_is_never_run() {
    let (_, sum) = program();
    let host = SshHost::new("");
    let release = &releases()[0];
    let tasks = json!([task("W")]);
    succeeds(&host, release, "root", &tasks, &[]);
    let file = format!("{KEPT}/iptables_balance-{sum}");
    let whole = format!("{sum}  {file}\n");
    let marked = "#!/bin/sh\ntouch /run/was-run\n";
    for spoil in [
        format!("printf '{marked}' >{file}"),
        format!("printf '{marked}' >/root/evil; chmod 755 /root/evil; ln -sf /root/evil {file}"),
        format!("chmod 777 {file}"),
        format!("chown deploy {file}"),
        format!("rm {file}"),
    ] {
        host.shell(&spoil);
        assert_eq!(
            succeeds(&host, release, "root", &tasks, &[]).recap("changed"),
            0
        );
        assert_eq!(
            host.shell(&format!("sha256sum {file}; stat -c %a,%U,%F {file}")),
            format!("{whole}755,root,regular file\n")
        );
        assert_eq!(
            host.shell("ls /run/was-run 2>/dev/null || true"),
            "",
            "{spoil}"
        );
    }
    for (spoil, mend, place) in [
        (
            format!("chmod 777 {KEPT}"),
            format!("chmod 755 {KEPT}"),
            KEPT,
        ),
        (
            "chmod g+w /var/lib".to_owned(),
            "chmod g-w /var/lib".to_owned(),
            "/var/lib",
        ),
        (
            "chown deploy /var/lib/iptables_balance".to_owned(),
            "chown root /var/lib/iptables_balance".to_owned(),
            "/var/lib/iptables_balance",
        ),
    ] {
        host.shell(&spoil);
        fails(
            &host,
            "root",
            &[],
            &format!("because others may write to `{place}`"),
        );
        host.shell(&mend);
        succeeds(&host, release, "root", &tasks, &[]);
    }
    host.shell(&format!(
        "install -d -m 777 /home/open && install -d /home/open/bin && rm -r {KEPT} && ln -s /home/open/bin {KEPT}"
    ));
    fails(
        &host,
        "root",
        &[],
        "because others may write to `/home/open`",
    );
    host.shell(&format!("rm {KEPT}"));
    let named = [
        "-e",
        "iptables_balance_directory=/home/deploy/../shared/programs",
    ];
    host.shell("install -d -m 1777 /home/shared");
    succeeds(&host, release, "root", &tasks, &named);
    assert_eq!(
        host.shell("stat -c %a,%U /home/shared/programs/*"),
        "755,root\n"
    );
    fails(
        &host,
        "root",
        &["-e", "iptables_balance_directory=programs"],
        "`programs` is not an absolute path",
    );
}

#[test]
fn an_obstacle_on_the_host_is_named_and_leaves_nothing() {
    let (path, sum) = program();
    let stand_in = |program: &str, script: &str| {
        format!(
            "mkdir -p /home/bin && printf '#!/bin/sh\\n{script}\\n' >/home/bin/{program} && chmod 755 /home/bin/{program}"
        )
    };
    let host = SshHost::new(
        "sed -i '1s|^|SetEnv PATH=/home/bin:/usr/bin:/bin:/usr/sbin:/sbin\\n|' $directory/sshd_config",
    );
    let nothing = || assert_eq!(host.shell(&format!("ls -A {KEPT} 2>/dev/null || true")), "");
    host.shell(&stand_in("uname", "echo riscv64"));
    fails(
        &host,
        "root",
        &[],
        "has programs for Linux on aarch64 and x86_64",
    );
    fails(&host, "root", &[], "but the host is riscv64 riscv64");
    host.shell("rm /home/bin/uname");
    nothing();
    host.shell(&stand_in("cat", "head -c 1000"));
    fails(&host, "root", &[], "the transfer was incomplete");
    host.shell("rm /home/bin/cat");
    nothing();
    let half = fs::metadata(&path).unwrap().len() / 2;
    host.shell(&format!(
        "mkdir -p {KEPT}; mount -t tmpfs -o mode=755,size={half} tmpfs {KEPT}"
    ));
    fails(&host, "root", &[], "No space left on device");
    nothing();
    host.shell(&format!("mount -o remount,ro {KEPT}"));
    fails(&host, "root", &[], "Read-only file system");
    host.shell(&format!(
        "umount {KEPT}; mount -t tmpfs -o mode=755,noexec tmpfs {KEPT}"
    ));
    fails(
        &host,
        "root",
        &[],
        "a file system that is not mounted noexec",
    );
    host.shell(&format!("umount {KEPT}"));
    host.shell("mount -o remount,ro /home");
    fails(
        &host,
        "deploy",
        &[],
        "cannot create directory '/home/deploy/.iptables_balance': Read-only file system",
    );
    host.shell("mount -o remount,rw /home");
    // Files of a killed transfer, of a running one, of another version, and of the user.
    let at_work = host.shell("sleep 60 >/dev/null 2>&1 & echo $!");
    let (killed, at_work) = (u32::MAX, at_work.trim());
    let (other, own) = ("0".repeat(64), "0.2.0-x86_64.tar.gz");
    host.shell(&format!(
        "mkdir -p {KEPT}; cd {KEPT}; touch .iptables_balance-new-{killed} .iptables_balance-new-{at_work} \
         iptables_balance-{other} iptables_balance-{own} iptables_balance-2026"
    ));
    succeeds(&host, &releases()[0], "root", &json!([task("W")]), &[]);
    let listed = host.shell(&format!("LC_ALL=C ls -A {KEPT} | sort"));
    let mut expected = [
        format!(".iptables_balance-new-{at_work}\n"),
        format!("iptables_balance-{own}\n"),
        "iptables_balance-2026\n".to_owned(),
        format!("iptables_balance-{sum}\n"),
    ];
    expected.sort();
    assert_eq!(listed, expected.concat());
    host.shell(&format!("kill {at_work}"));
}

/// Gives root a login shell that runs these lines first.
fn with_shell(lines: &str) -> String {
    format!(
        "cat >/home/shell <<'END'\n#!/bin/bash\n{lines}\nexec bash \"$@\"\nEND\nchmod 755 /home/shell\n\
         sed -i 's|^\\(root:.*\\):[^:]*$|\\1:/home/shell|' /etc/passwd"
    )
}

/// A host has no say on the control node, whatever it answers.
#[test]
fn a_host_decides_on_its_own_result_only() {
    let answer = r#"{"changed": true, "msg": "{{ 6 * 7 }}", "add_host": {"host_name": "planted", "groups": [], "host_vars": {}}}"#;
    for release in releases() {
        let host = SshHost::new(&with_shell(&format!("echo '{answer}'; exit")));
        let mut balance = task("W");
        balance["register"] = json!("answered");
        let tasks = json!([balance, {"ansible.builtin.assert": {"that": [
            "'planted' not in groups['all']",
            "answered.msg | length > 4",
        ]}}]);
        succeeds(&host, &release, "root", &tasks, &[]);
        let host = SshHost::new(&with_shell(
            "echo 'iptables_balance: missing ../../plugins'; exit",
        ));
        fails(
            &host,
            "root",
            &[],
            "the host asks for a program for `../../plugins`",
        );
    }
}

/// Separators of lines that JSON does not escape, in a rule that the program
/// shows before it replaces it.
#[test]
fn text_in_foreign_rules_is_not_taken_for_an_answer() {
    for release in releases() {
        let host = SshHost::new("");
        let comment = "x\u{2028}iptables_balance: missing x86_64 y";
        host.shell(&format!(
            "iptables -t nat -N W; iptables -t nat -A W -m comment --comment '{comment}' -j RETURN"
        ));
        let tasks = json!([task("W")]);
        let played = succeeds(&host, &release, "root", &tasks, &["--diff"]);
        assert_eq!(played.recap("changed"), 1, "{}", played.text);
    }
}

#[test]
fn any_login_shell_will_do() {
    for release in releases() {
        let host = SshHost::new("sed -i 's|^\\(root:.*\\):[^:]*$|\\1:/bin/tcsh|' /etc/passwd");
        let played = succeeds(&host, &release, "root", &json!([task("W")]), &[]);
        assert_eq!(played.recap("changed"), 1, "{}", played.text);
    }
    // A complaint about the terminal that is not sudo's, beside an error of the program.
    let host = SshHost::new(&with_shell("echo 'stty: not a tty' >&2"));
    let tasks = json!([{MODULE: {"name": "W", "destination_port": 80, "backends": [{}]}}]);
    let played = play(&host, &releases()[1], "root", &tasks, &["-vvv"]);
    assert!(
        !played.success && !played.text.contains("/stdin"),
        "{}",
        played.text
    );
}

#[test]
fn the_named_directory_is_that_of_the_host_and_taken_as_it_is() {
    for release in releases() {
        let host = SshHost::new("");
        let mut delegated = task("W");
        delegated["delegate_to"] = json!("deploy");
        delegated["become"] = json!(true);
        delegated["vars"] = json!({"ansible_become_password": "secret"});
        let mut later = task("W");
        later["async"] = json!(30);
        later["poll"] = json!(1);
        let own = "/srv/it's $HOME ü";
        let tasks = json!([
            {"ansible.builtin.set_fact": {"iptables_balance_directory": own}},
            delegated,
            later,
        ]);
        let more = ["-e", "ansible_python_interpreter=/usr/bin/python3"];
        succeeds(&host, &release, "root", &tasks, &more);
        assert_eq!(host.shell(&format!("ls {KEPT} | wc -l")), "1\n");
        assert_eq!(host.shell("ls \"/srv/it's \\$HOME ü\" | wc -l"), "1\n");
    }
}

/// A connection that cannot carry data on standard input, as some plugins are.
#[test]
fn a_connection_without_pipelining_gets_the_request_in_a_file() {
    for release in releases() {
        let namespace = Namespace::new("a");
        let plugins = namespace.scratch().join("connection_plugins");
        fs::create_dir(&plugins).unwrap();
        let plugin = "from ansible.plugins.connection.local import Connection as Local\n\
            DOCUMENTATION = 'name: plain\\nshort_description: local without pipelining\\nextends_documentation_fragment: [connection_pipelining]'\n\
            class Connection(Local):\n    transport = 'plain'\n    has_pipelining = False\n\
            \x20   def exec_command(self, cmd, in_data=None, sudoable=True):\n        assert not in_data\n\
            \x20       return super().exec_command(cmd, in_data=None, sudoable=sudoable)\n";
        fs::write(plugins.join("plain.py"), plugin).unwrap();
        let tasks = json!([task("W")]);
        let options = ["-e", "ansible_connection=plain"];
        for changed in [1, 0] {
            let played = crate::ansible::play(
                &namespace,
                &release,
                &crate::ansible::playbook(&namespace, &tasks),
                &options,
            );
            assert!(played.success, "{}", played.text);
            assert_eq!(played.recap("changed"), changed, "{}", played.text);
        }
    }
}

#[test]
fn the_collection_is_documented_and_verified() {
    let home = tempfile::tempdir().unwrap();
    for release in releases() {
        let run = |program: &str, arguments: &[&str]| {
            let output = Command::new(format!("{release}/{program}"))
                .args(arguments)
                .env("HOME", home.path())
                .env("ANSIBLE_COLLECTIONS_PATH", collections())
                .env("LC_ALL", "C.UTF-8")
                .output()
                .unwrap();
            assert!(output.status.success(), "{}", shown(&output));
            String::from_utf8(output.stdout).unwrap()
        };
        let documented: Value = serde_json::from_str(&run("ansible-doc", &["-j", MODULE])).unwrap();
        let module = &documented[MODULE];
        assert_eq!(module["doc"]["options"]["backends"]["type"], "list");
        assert_eq!(module["doc"]["has_action"], true);
        assert!(
            module["examples"]
                .as_str()
                .unwrap()
                .contains(&format!("{MODULE}:"))
        );
        assert!(run("ansible-doc", &["-l", "iptables_balance.gateway"]).contains(MODULE));
        let archive = packaged(&format!("iptables_balance-gateway-{VERSION}.tar.gz"));
        let path = collections().to_str().unwrap();
        run(
            "ansible-galaxy",
            &[
                "collection",
                "install",
                "--force",
                archive.to_str().unwrap(),
                "-p",
                &format!("{path}/../again"),
            ],
        );
        run(
            "ansible-galaxy",
            &[
                "collection",
                "verify",
                "--offline",
                "-p",
                path,
                "iptables_balance.gateway",
            ],
        );
    }
}
