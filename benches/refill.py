#!/usr/bin/env python3
"""A long chain in which every rule becomes another: each replaced by its number, against emptying the chain and filling
it again in the same transaction, which is what the program does then. Both carry counters; both variants. Needs root, or
user namespaces.

  benches/refill.py [--rounds N] [SIZE...]
"""
import argparse
import subprocess

from pairs import in_a_network_of_our_own, side_by_side


def rule(turn, number):
    return f"-m statistic --mode nth --every {number + 2} --packet {turn} -j DNAT --to-destination 10.9.{number >> 8}.{number & 255}"


def texts(size):
    """The two transactions, each of which leaves the same."""
    by_number = "".join(f"-R LONG {at + 1} -c 7 420 -p tcp {rule(1, at)}\n" for at in range(size))
    filled = "".join(f"[7:420] -A LONG -p tcp {rule(1, at)}\n" for at in range(size))
    return f"*nat\n{by_number}COMMIT\n", f"*nat\n-F LONG\n{filled}COMMIT\n"


def main():
    in_a_network_of_our_own()
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("sizes", type=int, nargs="*")
    arguments = arguments.parse_args()
    print("| rules | variant | emptied and filled | replaced by number | ratio |")
    print("|---|---|---|---|---|")
    for size in arguments.sizes or [100, 1000, 10_000]:
        for variant in ("nft", "legacy"):
            restore = [f"iptables-{variant}-restore", "--noflush"]
            first = "".join(f"-A LONG -p tcp {rule(0, at)}\n" for at in range(size))
            subprocess.run(restore, input=f"*nat\n:LONG - [0:0]\n{first}COMMIT\n".encode(), check=True)
            by_number, filled = texts(size)
            fill, number = side_by_side([(restore, filled), (restore, by_number)], arguments.rounds)
            print(f"| {size:,} | {variant} | {fill[0]:.0f} ms | {number[0]:.0f} ms | {number[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
