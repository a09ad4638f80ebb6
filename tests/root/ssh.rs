//! A host that Ansible reaches over a real sshd, and the controller beside it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};

use serde_json::{Value, json};

use crate::ansible::Played;
use crate::lab::{Namespace, add_address, link, sh, shown};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The users are those of `tests/sshd.sh`.
pub struct SshHost {
    controller: Namespace,
    host: Namespace,
    sshd: Child,
}

impl SshHost {
    /// Starts sshd, after commands that prepare the host.
    pub fn new(prepare: &str) -> Self {
        let (controller, host) = (Namespace::new("a"), Namespace::new("h"));
        link(&controller, "wan", &host, "lan");
        add_address(&controller, "wan", "10.8.0.2/24");
        add_address(&host, "lan", "10.8.0.1/24");
        fs::write(host.scratch().join("prepare"), prepare).unwrap();
        let script = format!("{ROOT}/tests/sshd.sh");
        let mut command = host.command(&[
            "unshare",
            "--mount",
            &script,
            host.scratch().to_str().unwrap(),
        ]);
        // On the host the locks are where they are for a user.
        command
            .env_remove("XTABLES_LOCKFILE")
            .env_remove("IPTABLES_BALANCE_LOCKFILE");
        let mut sshd = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(sshd.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert_eq!(line, "ready\n");
        Self {
            controller,
            host,
            sshd,
        }
    }

    /// Runs a command as root on the host; returns its output.
    pub fn shell(&self, command: &str) -> String {
        let pid = self.sshd.id().to_string();
        sh(&[
            "nsenter", "--mount", "--net", "--target", &pid, "sh", "-c", command,
        ])
    }

    /// The bytes that the host has received since it exists.
    pub fn received(&self) -> u64 {
        let text = self.host.run(&["ip", "-s", "-j", "link", "show", "lan"]);
        let links: Value = serde_json::from_str(&text).unwrap();
        links[0]["stats64"]["rx"]["bytes"].as_u64().unwrap()
    }

    /// Runs tasks on the host, as one of its users.
    pub fn play(
        &self,
        release: &str,
        collections: &Path,
        user: &str,
        tasks: &Value,
        options: &[&str],
    ) -> Played {
        self.play_with_defaults(release, collections, user, tasks, &json!({}), options)
    }

    /// The same with `module_defaults`.
    pub fn play_with_defaults(
        &self,
        release: &str,
        collections: &Path,
        user: &str,
        tasks: &Value,
        defaults: &Value,
        options: &[&str],
    ) -> Played {
        let scratch = self.controller.scratch();
        let playbook = scratch.join("playbook.yml");
        let play = json!([{"hosts": user, "gather_facts": false, "module_defaults": defaults, "tasks": tasks}]);
        fs::write(&playbook, play.to_string()).unwrap();
        let inventory = scratch.join("inventory.ini");
        let hosts = ["root", "deploy", "tight"];
        let hosts = hosts
            .map(|user| format!("{user} ansible_host=10.8.0.1 ansible_user={user}\n"))
            .concat();
        let key = self.host.scratch().join("key");
        let arguments = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null";
        let variables = format!(
            "[all:vars]\nansible_ssh_private_key_file={}\nansible_ssh_common_args={arguments}\n",
            key.display()
        );
        fs::write(&inventory, hosts + &variables).unwrap();
        let home = format!("HOME={}", scratch.display());
        let collections = format!("ANSIBLE_COLLECTIONS_PATH={}", collections.display());
        let program = format!("{release}/ansible-playbook");
        let command = [
            "env",
            &home,
            &collections,
            "ANSIBLE_NOCOLOR=1",
            "ANSIBLE_NOCOWS=1",
            // The shared connection ends soon after the play.
            "ANSIBLE_SSH_ARGS=-C -o ControlMaster=auto -o ControlPersist=2s",
            "LC_ALL=C.UTF-8",
            &program,
            "-i",
            inventory.to_str().unwrap(),
            playbook.to_str().unwrap(),
        ];
        let output = self.controller.feed(&[&command[..], options].concat(), "");
        Played {
            text: shown(&output),
            success: output.status.success(),
        }
    }
}

impl Drop for SshHost {
    fn drop(&mut self) {
        self.sshd.kill().ok();
        self.sshd.wait().ok();
    }
}
