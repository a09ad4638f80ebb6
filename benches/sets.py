#!/usr/bin/env python3
"""Sets of balancers, against what a user would pick instead. Each part measures its columns in turn in one run, in
both variants. Needs root, or user namespaces.

  benches/sets.py runs    [--rounds N]    500 balancers of 10: nothing to do, from nothing, one backend less;
                                          also the same rules from a template, and as requests of their own
  benches/sets.py session [--rounds N]    a kept promise among 200 in one session of cf-agent's protocol
  benches/sets.py flows   [--rounds N]    a new flow to 2,000 balancers, against one DNAT rule; kube-proxy's layout too
  benches/sets.py memory                  5,000 balancers of 10: the peak of a run
  benches/sets.py loop                    ansible.builtin.iptables in a loop over 10 services; needs ansible-core
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from pairs import in_a_network_of_our_own, once, peak, program

PROGRAM = program()
VARIANTS = ("nft", "legacy")


def balancers(count, backends, protocol="tcp"):
    def servers(number):
        return [f"10.{9 + (n >> 16)}.{(n >> 8) & 255}.{n & 255}:80" for n in range(number * backends + 1, (number + 1) * backends + 1)]
    return [{"name": f"b{n}", "protocol": protocol, "destination_port": 1024 + n * 29 % 60_000, "backends": servers(n)} for n in range(count)]


def request(variant, listed, **more):
    return json.dumps({"name": "EDGE", "variant": variant, "balancers": listed, **more})


def planned(text):
    return subprocess.run([PROGRAM, "plan", "-"], input=text, capture_output=True, text=True, check=True).stdout


def median_ratio(rounds, one, other):
    return statistics.median(figures[one] / figures[other] for figures in rounds)


def runs(rounds):
    listed = balancers(500, 10)
    fewer = json.loads(json.dumps(listed))
    del fewer[250]["backends"][9]
    print("| variant | step | against | bare | ours | ratio |")
    print("|---" * 6 + "|")
    for variant in VARIANTS:
        save = [f"iptables-{variant}-save", "-t", "nat"]
        restore = [f"iptables-{variant}-restore", "--noflush"]
        whole, less = request(variant, listed), request(variant, fewer)
        absent = json.dumps({"name": "EDGE", "variant": variant, "state": "absent"})
        template = planned(whole)
        # A line that changes nothing that is compared: one rule of a chain of its own.
        line = "*nat\n:OTHER - [0:0]\n-A OTHER -j RETURN\nCOMMIT\n"
        measured = []
        for _ in range(rounds + 2):
            figures = {}
            once([PROGRAM], absent)
            figures["bare build"] = once(save) + once(restore, template) + once(save)
            once([PROGRAM], absent)
            figures["build"] = once([PROGRAM], whole)
            figures["bare save"] = once(save)
            figures["noop"] = once([PROGRAM], whole)
            figures["bare line"] = once(save) + once(restore, line) + once(save)
            figures["less"] = once([PROGRAM], less)
            figures["template"] = once(restore, template)
            measured.append(figures)
            subprocess.run([f"iptables-{variant}", "-t", "nat", "-F", "OTHER"], check=True)
            subprocess.run([f"iptables-{variant}", "-t", "nat", "-X", "OTHER"], check=True)
        measured = measured[2:]
        middle = {step: statistics.median(figures[step] for figures in measured) * 1000 for step in measured[0]}
        for step, ours, bare, words in (
            ("nothing to do", "noop", "bare save", "save"),
            ("from nothing", "build", "bare build", "save + restore + save"),
            ("one backend leaves", "less", "bare line", "save + restore of a line + save"),
            ("the template again, every time", "template", "bare save", "save"),
        ):
            print(f"| {variant} | {step} | {words} | {middle[bare]:.0f} ms | {middle[ours]:.0f} ms | {median_ratio(measured, ours, bare):.2f} |", flush=True)
        once([PROGRAM], absent)


class Agent:
    """The program as a promise module."""

    def __init__(self):
        self.child = subprocess.Popen([PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.child.stdin.write(b"cf-agent 3.21.0 v1\n\n")
        self.child.stdin.flush()
        self.answer()

    def answer(self):
        line = self.child.stdout.readline()
        self.child.stdout.readline()
        return line

    def evaluate(self, promiser, attributes):
        message = {"operation": "evaluate_promise", "log_level": "info", "promise_type": "iptables_balance", "promiser": promiser,
                   "attributes": attributes, "line_number": 1, "filename": "bench"}
        self.child.stdin.write(json.dumps(message).encode() + b"\n\n")
        self.child.stdin.flush()
        return json.loads(self.answer())["result"]

    def end(self):
        self.child.stdin.close()
        self.child.wait()


def session(rounds):
    promises = balancers(200, 10)
    print("| variant | bare save | a kept promise of 200 | ratio |")
    print("|---" * 4 + "|")
    for variant in VARIANTS:
        attributes = [{"variant": variant, "destination_port": str(one["destination_port"]), "backends": one["backends"]} for one in promises]
        agent = Agent()
        for one, given in zip(promises, attributes):
            assert agent.evaluate(one["name"], given) == "repaired"
        agent.end()
        measured = []
        for _ in range(rounds + 1):
            bare = once([f"iptables-{variant}-save", "-t", "nat"])
            agent = Agent()
            started = time.perf_counter()
            for one, given in zip(promises, attributes):
                assert agent.evaluate(one["name"], given) == "kept"
            measured.append({"bare": bare, "kept": (time.perf_counter() - started) / len(promises)})
            agent.end()
        measured = measured[1:]
        middle = {step: statistics.median(figures[step] for figures in measured) * 1000 for step in measured[0]}
        print(f"| {variant} | {middle['bare']:.1f} ms | {middle['kept']:.2f} ms | {median_ratio(measured, 'kept', 'bare'):.2f} |", flush=True)
        for one in promises:
            once([PROGRAM], json.dumps({"name": one["name"], "variant": variant, "state": "absent"}))


def kube_proxy(variant, listed):
    """kube-proxy's layout: a rule for each service in one chain, and chains of services and of endpoints."""
    services, chains, rules = [], [], []
    for number, one in enumerate(listed):
        services.append(f"-A KUBE-SERVICES -d 10.8.0.1/32 -p udp -m udp --dport {one['destination_port']} -j KUBE-SVC-{number}")
        chains.append(f":KUBE-SVC-{number} - [0:0]")
        for at, backend in enumerate(one["backends"]):
            left = len(one["backends"]) - at
            chance = f" -m statistic --mode random --probability {1 / left:.11f}" if left > 1 else ""
            chains.append(f":KUBE-SEP-{number}-{at} - [0:0]")
            rules.append(f"-A KUBE-SVC-{number}{chance} -j KUBE-SEP-{number}-{at}")
            rules.append(f"-A KUBE-SEP-{number}-{at} -p udp -j DNAT --to-destination {backend}")
    text = ["*nat", ":KUBE-SERVICES - [0:0]", *chains, "-A PREROUTING -j KUBE-SERVICES", *services, *rules, "COMMIT", ""]
    return lambda setup: setup.inside(f"iptables-{variant}-restore", "--noflush", text="\n".join(text))


def flows(rounds, variants):
    from flows import Setup

    print("| variant | backends of each | layout | first | middle | last | nobody's |")
    print("|---" * 7 + "|")
    for variant in variants:
        for backends in (1, 10):
            listed = balancers(2000, backends, "udp")
            ours = request(variant, listed)
            single = "*nat\n-A PREROUTING -p udp -m udp --dport 5308 -j DNAT --to-destination 10.9.0.1\nCOMMIT\n"
            idle = "*nat\n-A PREROUTING -p udp -m udp --dport 9 -j DNAT --to-destination 10.9.0.1\nCOMMIT\n"
            places = {"first": listed[0], "middle": listed[999], "last": listed[1999]}
            ports = {place: one["destination_port"] for place, one in places.items()}
            taken = {one["destination_port"] for one in listed}
            nobody = next(port for port in range(30_000, 60_000) if port not in taken)
            plain = lambda text: lambda setup: setup.inside(f"iptables-{variant}-restore", "--noflush", text=text)
            set_ = lambda setup: setup.inside(PROGRAM, text=ours)
            kube = kube_proxy(variant, listed)
            setups = [Setup("single", plain(single)), Setup("idle", plain(idle), nobody)]
            try:
                for name, rules in (("ours", set_), ("kube", kube)):
                    setups += [Setup(f"{name} {place}", rules, port) for place, port in ports.items()]
                    setups.append(Setup(f"{name} nobody", rules, nobody))
                measured = []
                for number in range(rounds + 2):
                    figures = {setup.label: setup.send() for setup in setups}
                    if number >= 2:
                        measured.append(figures)
            finally:
                for setup in setups:
                    setup.end()
            for name, words in (("ours", "a set"), ("kube", "kube-proxy's")):
                columns = [median_ratio(measured, f"{name} {place}", "single") for place in ports]
                columns.append(median_ratio(measured, f"{name} nobody", "idle"))
                print(f"| {variant} | {backends} | {words} | " + " | ".join(f"{one:.2f}" for one in columns) + " |", flush=True)


def memory():
    print("| variant | 5,000 balancers of 10 | peak memory |")
    print("|---" * 3 + "|")
    listed = balancers(5000, 10)
    for variant in VARIANTS:
        text = request(variant, listed)
        print(f"| {variant} | from nothing | {peak([PROGRAM], text) / 1024:.0f} MiB |", flush=True)
        print(f"| {variant} | nothing to do | {peak([PROGRAM], text) / 1024:.0f} MiB |", flush=True)
        once([PROGRAM], json.dumps({"name": "EDGE", "variant": variant, "state": "absent"}))


PLAYBOOK = """- hosts: localhost
  connection: local
  gather_facts: false
  tasks:
    - ansible.builtin.iptables:
        table: nat
        chain: "{{ item.chain }}"
        protocol: "{{ 'tcp' if item.jump is defined else omit }}"
        destination_port: "{{ item.port | default(omit) }}"
        jump: "{{ item.jump | default(omit) }}"
        to_destination: "{{ item.to | default(omit) }}"
        chain_management: true
      loop: "{{ rules }}"
"""


def loop():
    """Rules of 10 services with 10 backends each; without the statistic match, which the module does not know."""
    listed = balancers(10, 10)
    rules = []
    for one in listed:
        rules.append({"chain": one["name"]})
        rules += [{"chain": one["name"], "jump": "DNAT", "to": backend} for backend in one["backends"]]
        rules.append({"chain": "PREROUTING", "port": str(one["destination_port"]), "jump": one["name"]})
    with tempfile.TemporaryDirectory() as work:
        with open(f"{work}/play.yml", "w", encoding="ascii") as file:
            file.write(PLAYBOOK)
        with open(f"{work}/rules.json", "w", encoding="ascii") as file:
            json.dump({"rules": rules}, file)
        command = ["ansible-playbook", "-i", "localhost,", "-e", f"@{work}/rules.json", "-e", f"ansible_python_interpreter={sys.executable}", f"{work}/play.yml"]
        first, again = once(command), once(command)
    print(f"10 services: {first:.1f} s, again {again:.1f} s; 500 services, extrapolated: {first * 50:.0f} s, again {again * 50:.0f} s")


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("part", choices=["runs", "session", "flows", "memory", "loop"])
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--variants", nargs="*", default=VARIANTS, help="of flows alone")
    arguments = arguments.parse_args()
    if arguments.part == "flows":
        return flows(arguments.rounds, arguments.variants)
    in_a_network_of_our_own()
    parts = {"runs": lambda: runs(arguments.rounds), "session": lambda: session(arguments.rounds), "memory": memory, "loop": loop}
    return parts[arguments.part]()


if __name__ == "__main__":
    main()
