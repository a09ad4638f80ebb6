#!/usr/bin/env python3
"""Against what people do today: a shell loop with `iptables -C || iptables -A` for each rule; a template with the whole
chain and `iptables-restore --noflush`; ferm; and with what starts them, Ansible's loop over the same command, Ansible with
our module, and Puppet with puppetlabs-firewall. First run, nothing to do, one backend more, and whether the rules are then
right. Needs root or user namespaces, and the Debian packages ferm, ansible-core, puppet-agent,
puppet-module-puppetlabs-firewall and puppet-module-puppetlabs-stdlib. The last three ways take minutes with many rules, and
are left out beyond --patience rules.

  benches/peers.py [--rounds N] [--patience RULES] [SIZE...]
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile

from pairs import in_a_network_of_our_own, once, program

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAM = program()
SCRATCH = tempfile.mkdtemp(prefix="peers-")


def servers(count):
    return [f"10.9.{n >> 8}.{n & 255}:5308" for n in range(1, count + 1)]


def rules(count):
    """As a user's template would compute them: every N, N - 1, ..., and the rest."""
    for left, server in zip(range(count, 0, -1), servers(count)):
        turn = f"-m statistic --mode nth --every {left} --packet 0 " if left > 1 else ""
        yield f"-p tcp {turn}-j DNAT --to-destination {server}"


JUMP = "-p tcp -m tcp --dport 5308 -j CFENGINE"


def ours(count, variant):
    request = {"name": "CFENGINE", "variant": variant, "layout": "flat", "destination_port": 5308, "backends": servers(count)}
    return [PROGRAM], json.dumps(request)


def loop(count, variant):
    iptables = f"iptables-{variant} -t nat"
    lines = [f"{iptables} -N CFENGINE 2>/dev/null"]
    for chain, rule in [*(("CFENGINE", rule) for rule in rules(count)), ("PREROUTING", JUMP)]:
        lines.append(f"{iptables} -C {chain} {rule} 2>/dev/null || {iptables} -A {chain} {rule}")
    return ["sh"], "\n".join(lines) + "\n"


def template(count, variant):
    chain = "".join(f"-A CFENGINE {rule}\n" for rule in rules(count))
    iptables = f"iptables-{variant}"
    script = (f"{iptables}-restore --noflush <<'END'\n*nat\n:CFENGINE - [0:0]\n{chain}COMMIT\nEND\n"
              f"{iptables} -t nat -C PREROUTING {JUMP} 2>/dev/null || {iptables} -t nat -A PREROUTING {JUMP}\n")
    return ["sh"], script


def ferm(count, _variant):
    chain = ""
    for left, server in zip(range(count, 0, -1), servers(count)):
        turn = f"mod statistic mode nth every {left} packet 0 " if left > 1 else ""
        chain += f"    proto tcp {turn}DNAT to {server};\n"
    text = (f"domain ip table nat {{\n  chain CFENGINE {{\n{chain}  }}\n"
            "  chain PREROUTING proto tcp dport 5308 jump CFENGINE;\n}\n")
    return ["ferm", "--fast", "-"], text


def written(name, text):
    """A file of that text, which the command then reads."""
    path = os.path.join(SCRATCH, name)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return path


def playbook(name, task):
    play = [{"hosts": "gateways", "gather_facts": False, "tasks": [task]}]
    inventory = f"{ROOT}/examples/ansible/inventory.ini"
    library = os.path.join(SCRATCH, "library")
    if not os.path.isdir(library):
        os.mkdir(library)
        os.symlink(PROGRAM, f"{library}/iptables_balance")
    return ["ansible-playbook", "-M", library, "-i", inventory, written(name, json.dumps(play))], ""


def ansible(count, variant):
    return playbook("ours.yml", {"iptables_balance": json.loads(ours(count, variant)[1])})


def ansible_loop(count, variant):
    iptables = f"iptables-{variant} -t nat"
    items = [*(f"CFENGINE {rule}" for rule in rules(count)), f"PREROUTING {JUMP}"]
    subprocess.run(f"{iptables} -N CFENGINE", shell=True, stderr=subprocess.DEVNULL, check=False)
    command = f"{iptables} -C {{{{ item }}}} 2>/dev/null || {iptables} -A {{{{ item }}}}"
    return playbook("loop.yml", {"ansible.builtin.shell": command, "loop": items})


def puppet(count, _variant):
    lines = ["firewallchain { 'CFENGINE:nat:IPv4': ensure => present }"]
    for number, (left, server) in enumerate(zip(range(count, 0, -1), servers(count))):
        turn = f"stat_mode => 'nth', stat_every => '{left}', stat_packet => '0', " if left > 1 else ""
        lines.append(
            f"firewall {{ '{number + 10000} {server}': table => 'nat', chain => 'CFENGINE', proto => 'tcp', {turn}jump => 'DNAT', "
            f"todest => '{server}', require => Firewallchain['CFENGINE:nat:IPv4'] }}"
        )
    lines.append("firewall { '99999 jump': table => 'nat', chain => 'PREROUTING', proto => 'tcp', dport => '5308', jump => 'CFENGINE' }")
    return ["puppet", "apply", "--modulepath", "/usr/share/puppet/modules", written("rules.pp", "\n".join(lines))], ""


def is_right(count, variant):
    command, request = ours(count, variant)
    result = subprocess.run(command, input=json.dumps({**json.loads(request), "check": True}), capture_output=True, text=True, check=True)
    return not json.loads(result.stdout)["changed"]


NAMES = {
    "ours": "iptables_balance",
    "loop": "`-C \\|\\| -A` for each rule",
    "template": "template and restore",
    "ansible": "Ansible, iptables_balance",
    "ansible_loop": "Ansible, loop of `-C \\|\\| -A`",
    "puppet": "Puppet, puppetlabs-firewall",
}


def clean(variant):
    for option in ("-F", "-X"):
        subprocess.run([f"iptables-{variant}", "-t", "nat", option], check=True)


def main():
    in_a_network_of_our_own()
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--patience", type=int, default=100)
    arguments.add_argument("sizes", type=int, nargs="*")
    arguments = arguments.parse_args()
    print("| backends | variant | way | first run | nothing to do | one more | right then |")
    print("|---|---|---|---|---|---|---|")
    for size in arguments.sizes or [4, 32, 100, 1000]:
        for variant in ("nft", "legacy"):
            # Debian's ferm takes iptables-legacy wherever that is installed, and Puppet the plain names.
            ways = [ours, template, loop, ansible, ansible_loop, puppet] if variant == "nft" else [ours, template, ferm, loop, ansible, ansible_loop]
            slow = [loop, ansible_loop, puppet]
            for way in (way for way in ways if size <= arguments.patience or way not in slow[1:]):
                figures, right = [], True
                for _ in range(arguments.rounds if way not in slow or size < 100 else 1):
                    clean(variant)
                    figures.append([once(*way(count, variant)) * 1000 for count in (size, size, size + 1)])
                    right &= is_right(size + 1, variant)
                first, again, more = (statistics.median(column) for column in zip(*figures))
                name = NAMES.get(way.__name__, way.__name__)
                print(f"| {size:,} | {variant} | {name} | {first:.0f} ms | {again:.0f} ms | {more:.0f} ms | {'yes' if right else 'no'} |", flush=True)
    clean("nft")
    shutil.rmtree(SCRATCH)


if __name__ == "__main__":
    sys.exit(main())
