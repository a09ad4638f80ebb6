#!/usr/bin/env python3
"""Against what people do today, by itself and without Ansible's own 0.3 s for each task: a shell loop with
`iptables -C || iptables -A` for each rule; a template with the whole chain and `iptables-restore --noflush`; ferm.
First run, nothing to do, one backend more, and whether the rules are then right. Needs ferm (Debian package), and root or
user namespaces.

  benches/peers.py [--rounds N] [SIZE...]
"""
import argparse
import json
import os
import statistics
import subprocess
import sys

from pairs import in_a_network_of_our_own, once

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAM = f"{ROOT}/target/release/iptables_balance"


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


def is_right(count, variant):
    command, request = ours(count, variant)
    result = subprocess.run(command, input=json.dumps({**json.loads(request), "check": True}), capture_output=True, text=True, check=True)
    return not json.loads(result.stdout)["changed"]


def clean(variant):
    for option in ("-F", "-X"):
        subprocess.run([f"iptables-{variant}", "-t", "nat", option], check=True)


def main():
    in_a_network_of_our_own()
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("sizes", type=int, nargs="*")
    arguments = arguments.parse_args()
    print("| backends | variant | way | first run | nothing to do | one more | right then |")
    print("|---|---|---|---|---|---|---|")
    for size in arguments.sizes or [4, 32, 100, 1000]:
        for variant in ("nft", "legacy"):
            # Debian's ferm takes iptables-legacy wherever that is installed.
            for way in (ours, template, loop) if variant == "nft" else (ours, template, ferm, loop):
                figures, right = [], True
                for _ in range(arguments.rounds if size * (way is loop) < 1000 else 1):
                    clean(variant)
                    figures.append([once(*way(count, variant)) * 1000 for count in (size, size, size + 1)])
                    right &= is_right(size + 1, variant)
                first, again, more = (statistics.median(column) for column in zip(*figures))
                name = {"ours": "iptables_balance", "loop": "`-C \\|\\| -A` for each rule", "template": "template and restore"}.get(way.__name__, way.__name__)
                print(f"| {size:,} | {variant} | {name} | {first:.0f} ms | {again:.0f} ms | {more:.0f} ms | {'yes' if right else 'no'} |", flush=True)
    clean("nft")


if __name__ == "__main__":
    sys.exit(main())
