#!/usr/bin/env python3
"""What a task of Ansible costs over ssh: time, and bytes that the host receives.

  ansible.py [--rounds 7] [--hosts 20] [--ansible DIRECTORY]

The hosts are network namespaces, each with a real sshd (tests/sshd.sh). Each round measures all ways in turn, each with a new
connection. Nothing is to be done in any of them. Needs root, and the packages of module-spec/package.sh for this architecture.
"""
import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BRIDGE = "10.8.0.254"
BACKENDS = ["10.9.0.1:5308", "10.9.0.2:5308"]


def run(*words, **options):
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, **options).stdout


class Lab:
    """A controller and hosts behind a bridge."""

    def __init__(self, count, directory):
        self.prefix = f"ipbb{os.getpid()}"
        self.controller = self.prefix + "c"
        self.scratch = directory
        self.hosts, self.daemons = [], []
        run("ip", "netns", "add", self.controller)
        self.inside(self.controller, "ip", "link", "add", "bridge", "type", "bridge")
        self.inside(self.controller, "ip", "address", "add", f"{BRIDGE}/24", "dev", "bridge")
        self.inside(self.controller, "ip", "link", "set", "bridge", "up")
        for number in range(1, count + 1):
            self.add_host(number)

    def add_host(self, number):
        name = f"{self.prefix}h{number}"
        run("ip", "netns", "add", name)
        self.hosts.append(name)
        self.inside(name, "ip", "link", "set", "lo", "up")
        run("ip", "-n", self.controller, "link", "add", f"port{number}", "type", "veth", "peer", "name", "lan", "netns", name)
        self.inside(self.controller, "ip", "link", "set", f"port{number}", "master", "bridge", "up")
        self.inside(name, "ip", "address", "add", f"10.8.0.{number}/24", "dev", "lan")
        self.inside(name, "ip", "link", "set", "lan", "up")
        self.inside(name, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        directory = os.path.join(self.scratch, name)
        os.mkdir(directory)
        for key in ("key", "key.pub"):
            if self.daemons:
                shutil.copy(os.path.join(self.scratch, self.hosts[0], key), directory)
        words = ["ip", "netns", "exec", name, "unshare", "--mount", f"{ROOT}/tests/sshd.sh", directory]
        daemon = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        self.daemons.append(daemon)
        assert daemon.stdout.readline() == "ready\n"

    def inside(self, namespace, *words, **options):
        return run("ip", "netns", "exec", namespace, *words, **options)

    def received(self):
        """Bytes that the first host has received."""
        text = self.inside(self.hosts[0], "ip", "-s", "-j", "link", "show", "lan")
        return json.loads(text)[0]["stats64"]["rx"]["bytes"]

    def close(self):
        for daemon in self.daemons:
            daemon.kill()
            daemon.wait()
        for name in [self.controller, *self.hosts]:
            subprocess.run(["ip", "netns", "del", name], check=False)


class Player:
    """Runs plays from the controller."""

    def __init__(self, lab, ansible):
        self.lab, self.ansible = lab, ansible
        inventory = [f"h{n} ansible_host=10.8.0.{n}" for n in range(1, len(lab.hosts) + 1)]
        key = os.path.join(lab.scratch, lab.hosts[0], "key")
        inventory += ["[all:vars]", f"ansible_ssh_private_key_file={key}", "ansible_user=root",
                      "ansible_ssh_common_args=-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null",
                      "ansible_python_interpreter=/usr/bin/python3"]
        self.inventory = os.path.join(lab.scratch, "inventory.ini")
        with open(self.inventory, "w", encoding="utf-8") as file:
            file.write("\n".join(inventory) + "\n")
        home = os.path.join(lab.scratch, "home")
        collections = os.path.join(home, "collections")
        os.mkdir(home)
        archive = sorted(os.listdir(f"{ROOT}/target/package"))
        archive = next(name for name in archive if name.startswith("iptables_balance-gateway-"))
        run(f"{ansible}/ansible-galaxy", "collection", "install", f"{ROOT}/target/package/{archive}", "-p", collections,
            env={**os.environ, "HOME": home})
        library = os.path.join(home, "library")
        os.mkdir(library)
        program = f"{collections}/ansible_collections/iptables_balance/gateway/files/{platform.machine()}/iptables_balance"
        shutil.copy(program, library)
        self.environment = {
            **os.environ, "HOME": home, "ANSIBLE_COLLECTIONS_PATH": collections, "ANSIBLE_LIBRARY": library, "LC_ALL": "C.UTF-8",
            "ANSIBLE_LOCALHOST_WARNING": "0", "ANSIBLE_HOST_KEY_CHECKING": "False", "ANSIBLE_NOCOWS": "1",
        }

    def play(self, tasks, hosts="h1", pipelining=False, forks=5):
        """Runs a play; returns seconds, bytes that the first host received, and the recap."""
        playbook = os.path.join(self.lab.scratch, "playbook.yml")
        with open(playbook, "w", encoding="utf-8") as file:
            json.dump([{"hosts": hosts, "gather_facts": False, "tasks": tasks}], file)
        # A new connection for each play.
        sockets = tempfile.mkdtemp(dir=self.lab.scratch)
        environment = {**self.environment, "ANSIBLE_PIPELINING": str(pipelining), "ANSIBLE_SSH_CONTROL_PATH_DIR": sockets,
                       "ANSIBLE_SSH_ARGS": "-C -o ControlMaster=auto -o ControlPersist=1s"}
        words = [f"{self.ansible}/ansible-playbook", "-i", self.inventory, "-f", str(forks), playbook]
        before, start = self.lab.received(), time.monotonic()
        try:
            text = self.lab.inside(self.lab.controller, *words, env=environment)
        except subprocess.CalledProcessError as error:
            sys.exit(error.stdout)
        seconds = time.monotonic() - start
        return seconds, self.lab.received() - before, text.rsplit("PLAY RECAP", 1)[1]


COLLECTION, MODULE, IPTABLES = "iptables_balance.gateway.balancer", "iptables_balance", "ansible.builtin.iptables"


def balancer(module, name):
    return {module: {"name": name, "destination_port": 5308, "backends": BACKENDS}}


def items(count):
    """Ways to keep that many services, with the name of each."""
    loop = [f"B{n}" for n in range(count)]
    rule = {IPTABLES: {"table": "nat", "chain": "PREROUTING", "protocol": "tcp", "destination_port": "{{ 6000 + item }}", "jump": "DNAT",
                       "to_destination": "10.9.0.1:5308"}, "loop": list(range(count))}
    return {
        "collection": ([{**balancer(COLLECTION, "{{ item }}"), "loop": loop}], False),
        "module alone, sent each time": ([{**balancer(MODULE, "{{ item }}"), "loop": loop}], False),
        "ansible.builtin.iptables, pipelining": ([rule], True),
        "ansible.builtin.iptables": ([rule], False),
    }


def table(title, rows, reference):
    """Medians, and the median of the ratios of each round to the reference."""
    print(f"\n{title}\n\n| way | seconds | ratio of time | bytes received by the host |\n|---|---|---|---|")
    for name, results in rows.items():
        ratio = statistics.median(one[0] / other[0] for one, other in zip(results, rows[reference]))
        seconds = statistics.median(one[0] for one in results)
        received = statistics.median(one[1] for one in results)
        print(f"| {name} | {seconds:.2f} | {ratio:.2f} | {received:,.0f} |")


def measure(player, ways, rounds, **options):
    rows = {name: [] for name in ways}
    for tasks, pipelining in ways.values():
        player.play(tasks, pipelining=pipelining, **options)
    for _ in range(rounds):
        for name, (tasks, pipelining) in ways.items():
            seconds, received, recap = player.play(tasks, pipelining=pipelining, **options)
            assert "changed=0" in recap and "changed=1" not in recap, recap
            rows[name].append((seconds, received))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--hosts", type=int, default=20)
    parser.add_argument("--ansible", default=f"{ROOT}/tests/.venv/bin", help="the bin directory of a release of Ansible")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        lab = Lab(arguments.hosts, scratch)
        try:
            player = Player(lab, arguments.ansible)
            for count in (1, 11):
                rows = measure(player, items(count), arguments.rounds)
                table(f"{count} loop items in one task, nothing to do", rows, "ansible.builtin.iptables, pipelining")
            command = {"ansible.builtin.command": "true", "changed_when": False}
            ways = {"collection": ([balancer(COLLECTION, "B0")], False), "ansible.builtin.command": ([command], False),
                    "ansible.builtin.command, pipelining": ([command], True)}
            rows = measure(player, ways, arguments.rounds, hosts="all", forks=10)
            table(f"{arguments.hosts} hosts, 10 forks, nothing to do", rows, "ansible.builtin.command")
        finally:
            lab.close()


if __name__ == "__main__":
    main()
