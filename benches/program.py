#!/usr/bin/env python3
"""The program on thousands of backends: from nothing, against bare save + restore + save of the same text; one
backend more; and nothing to do, against the bare save. Both variants and modes. Needs root, or user namespaces.

  benches/program.py [--rounds N] [SIZE...]
"""
import argparse
import json
import os
import statistics
import subprocess
import sys

from pairs import in_a_network_of_our_own, once, peak, program

PROGRAM = program()


def request(variant, mode, count, **more):
    servers = [f"10.{9 + (n >> 16)}.{(n >> 8) & 255}.{n & 255}:5308" for n in range(1, count + 1)]
    return json.dumps({"name": "BENCH", "variant": variant, "mode": mode, "destination_port": 5308, "backends": servers, **more})


def round_of(variant, mode, count):
    """Seconds of each step of one round."""
    save, restore = f"iptables-{variant}-save", f"iptables-{variant}-restore"
    absent = json.dumps({"name": "BENCH", "variant": variant, "state": "absent"})
    text = subprocess.run([PROGRAM, "plan", "-"], input=request(variant, mode, count), capture_output=True, text=True, check=True).stdout
    figures = {}
    once([PROGRAM], absent)
    figures["bare"] = once([save, "-t", "nat"]) + once([restore, "--noflush"], text) + once([save, "-t", "nat"])
    once([PROGRAM], absent)
    figures["from nothing"] = once([PROGRAM], request(variant, mode, count))
    figures["bare save"] = once([save, "-t", "nat"])
    figures["nothing to do"] = once([PROGRAM], request(variant, mode, count))
    figures["one more"] = once([PROGRAM], request(variant, mode, count + 1))
    return figures


def main():
    in_a_network_of_our_own()
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("sizes", type=int, nargs="*")
    arguments = arguments.parse_args()
    print("| backends | variant, mode | bare save + restore + save | from nothing | ratio | bare save | nothing to do | ratio | one more | peak memory |")
    print("|---" * 10 + "|")
    for count in arguments.sizes or [100, 1000, 10_000]:
        for variant in ("nft", "legacy"):
            for mode in ("nth", "random"):
                rounds = [round_of(variant, mode, count) for _ in range(arguments.rounds + 1)][1:]
                middle = {step: statistics.median(figures[step] for figures in rounds) * 1000 for step in rounds[0]}
                ratio = {
                    step: statistics.median(figures[step] / figures[base] for figures in rounds)
                    for step, base in (("from nothing", "bare"), ("nothing to do", "bare save"))
                }
                memory = peak([PROGRAM], request(variant, mode, count, check=True)) / 1024
                print(
                    f"| {count:,} | {variant}, {mode} | {middle['bare']:.0f} ms | {middle['from nothing']:.0f} ms "
                    f"| {ratio['from nothing']:.2f} | {middle['bare save']:.0f} ms | {middle['nothing to do']:.0f} ms "
                    f"| {ratio['nothing to do']:.2f} | {middle['one more']:.0f} ms | {memory:.0f} MiB |",
                    flush=True,
                )


if __name__ == "__main__":
    sys.exit(main())
