#!/usr/bin/env python3
"""Two builds of the program in turn: backends from nothing, and nothing to do. Median milliseconds, and the ratio new to old
run by run. Needs root or user namespaces.

  benches/versions.py [--rounds N] OLD [SIZE...]
"""
import argparse
import statistics

from pairs import in_a_network_of_our_own, once, program
from program import request

NEW = program()


def round_of(programs, variant, mode, count):
    """Seconds from nothing and with nothing to do, of each program."""
    figures = {}
    for tool in programs:
        once([tool], f'{{"name": "BENCH", "variant": "{variant}", "state": "absent"}}')
        figures[tool] = [once([tool], request(variant, mode, count)) for _ in range(2)]
    return figures


def main():
    in_a_network_of_our_own()
    arguments = argparse.ArgumentParser()
    arguments.add_argument("old")
    arguments.add_argument("--rounds", type=int, default=21)
    arguments.add_argument("sizes", type=int, nargs="*")
    given = arguments.parse_args()
    print("| backends | variant, mode | from nothing, old | new | ratio | nothing to do, old | new | ratio |")
    print("|---" * 8 + "|")
    for count in given.sizes or [4, 10_000]:
        for variant in ("nft", "legacy"):
            for mode in ("nth", "random"):
                rounds = []
                for number in range(given.rounds + 1):
                    order = (given.old, NEW) if number % 2 else (NEW, given.old)
                    rounds.append(round_of(order, variant, mode, count))
                columns = []
                for step in range(2):
                    old, new = ([one[tool][step] * 1000 for one in rounds[1:]] for tool in (given.old, NEW))
                    ratio = statistics.median(after / before for before, after in zip(old, new))
                    columns.append(f"{statistics.median(old):.1f} ms | {statistics.median(new):.1f} ms | {ratio:.2f}")
                print(f"| {count:,} | {variant}, {mode} | " + " | ".join(columns) + " |", flush=True)


if __name__ == "__main__":
    main()
