#!/usr/bin/env python3
"""`status` of one balancer beside many conntrack entries, all of them its own connections, against `iptables-save -c -t nat`
and a listing by `conntrack -L`, in turn. With --others all entries are of others, whose destination was not rewritten. The last
column is the median of the ratios of `status` to `conntrack -L`, which says more than milliseconds on a busy machine. Needs root or
user namespaces, and the package conntrack.

  benches/status.py [--rounds N] [--backends N] [--others] [ENTRIES...]
"""
import argparse
import json
import subprocess

from disconnect import add_entries
from pairs import in_a_network_of_our_own, program, side_by_side

PROGRAM = program()


def main():
    in_a_network_of_our_own()
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--backends", type=int, default=1000)
    arguments.add_argument("--others", action="store_true")
    arguments.add_argument("entries", type=int, nargs="*")
    given = arguments.parse_args()
    backends = [f"10.9.{number // 250}.{number % 250 + 1}" for number in range(given.backends)]
    whose = "entries of others" if given.others else "entries"
    print(f"| {whose} | variant | `iptables-save -c -t nat` | `conntrack -L` | `status` | ratio |")
    print("|---|---|---|---|---|---|")
    there = 0
    for entries in sorted(given.entries) or [0, 20_000, 200_000]:
        # The first rule of nat makes the table of connections.
        for variant in ("nft", "legacy"):
            request = {"name": "BENCH", "variant": variant, "protocol": "udp", "destination_port": 5308, "backends": backends}
            subprocess.run([PROGRAM], input=json.dumps(request).encode(), check=True, stdout=subprocess.DEVNULL)
            clients = ((f"10.{n >> 24 & 63 | 64}.{n >> 16 & 255}.{n >> 8 & 255}", 1024 + (n & 255)) for n in range(there, entries))
            add_entries((*client, None if given.others else backends[n % len(backends)]) for n, client in enumerate(clients))
            there = entries
            save = [f"iptables-{variant}-save", "-c", "-t", "nat"]
            commands = [(["conntrack", "-L"], ""), (save, ""), ([PROGRAM, "status", "BENCH"], "")]
            (listing, _), (saving, _), (status, ratio) = side_by_side(commands, given.rounds)
            row = [f"{entries:,}", variant, *(f"{median:.0f} ms" for median in (saving, listing, status)), f"{ratio:.2f}"]
            print("| " + " | ".join(row) + " |", flush=True)
            absent = json.dumps({"name": "BENCH", "variant": variant, "state": "absent", "disconnect": "never"})
            subprocess.run([PROGRAM], input=absent.encode(), check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
