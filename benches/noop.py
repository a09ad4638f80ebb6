#!/usr/bin/env python3
"""A run with nothing to do, against a bare `iptables-save -t nat`, on an empty host and on one with 20,000
rules of others in the nat table; both variants. Then the peak memory, with a stand-in for `iptables-save` that
prints the same dump and needs next to none itself. Needs root, or user namespaces.

  benches/noop.py [PROGRAM] [RUNS]
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile

from pairs import in_a_network_of_our_own, peak, program, side_by_side

PROGRAM = sys.argv[1] if len(sys.argv) > 1 else program()
RUNS = int(sys.argv[2]) if len(sys.argv) > 2 else 31
OTHERS = 20_000


def request(variant, backends):
    servers = [f"10.9.{n >> 8}.{n & 255}:5308" for n in range(1, backends + 1)]
    return json.dumps({"name": "BENCH", "variant": variant, "destination_port": 5308, "backends": servers})


def restore(variant, text):
    subprocess.run([f"iptables-{variant}-restore", "--noflush"], input=text.encode(), check=True)


def others():
    rules = "".join(
        f"-A OTHERS -s 10.{n >> 14}.{(n >> 7) & 127}.{n & 127}/32 -p tcp -m tcp --dport {n % 60000 + 1} "
        f'-m comment --comment "rule {n} of others" -j DNAT --to-destination 10.1.{(n >> 7) & 127}.{n & 127}:80\n'
        for n in range(OTHERS)
    )
    return f"*nat\n:OTHERS - [0:0]\n{rules}COMMIT\n"


def peak_memory(variant, text):
    """Of a run that reads this host's dump from a file."""
    with tempfile.TemporaryDirectory() as directory:
        save = f"iptables-{variant}-save"
        real = shutil.which(save)
        dump = subprocess.run([save, "-t", "nat"], check=True, capture_output=True).stdout
        with open(f"{directory}/dump", "wb") as file:
            file.write(dump)
        for name in (save, "iptables-save"):
            with open(f"{directory}/{name}", "w", encoding="ascii") as file:
                file.write(f"#!/bin/sh\n[ $1 = --version ] && exec {real} --version\nexec cat {directory}/dump\n")
            os.chmod(f"{directory}/{name}", 0o755)
        return peak(["env", f"PATH={directory}:{os.environ['PATH']}", PROGRAM], text), len(dump)


def main():
    in_a_network_of_our_own()
    print("| others' rules | variant | our backends | bare save | nothing to do | ratio | dump | our peak memory |")
    print("|---|---|---|---|---|---|---|---|")
    for variant in ("nft", "legacy"):
        for others_there in (0, OTHERS):
            if others_there:
                restore(variant, others())
            for backends in (4, 1000):
                text = request(variant, backends)
                subprocess.run([PROGRAM], input=text.encode(), check=True, stdout=subprocess.DEVNULL)
                save = [f"iptables-{variant}-save", "-t", "nat"]
                bare, ours = side_by_side([(save, None), ([PROGRAM], text)], RUNS)
                memory, size = peak_memory(variant, text)
                print(
                    f"| {others_there:,} | {variant} | {backends:,} | {bare[0]:.1f} ms | {ours[0]:.1f} ms | {ours[1]:.2f} "
                    f"| {size / 1048576:.2f} MiB | {memory / 1024:.1f} MiB |",
                    flush=True,
                )
        for option in ("-F", "-X"):
            subprocess.run([f"iptables-{variant}", "-t", "nat", option], check=True)


if __name__ == "__main__":
    main()
