#!/usr/bin/env python3
"""`explain` of large dumps, against `iptables-restore --test`, which reads the same text. Both sides in turn in one
run. Needs root, or user namespaces.

  benches/explain.py [--rounds N]
"""
import argparse
import statistics
import tempfile

from pairs import in_a_network_of_our_own, once, program

PROGRAM = program()
HEAD = "*nat\n:PREROUTING ACCEPT [0:0]\n:INPUT ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:POSTROUTING ACCEPT [0:0]\n"


def address(number):
    return f"10.{9 + (number >> 16)}.{(number >> 8) & 255}.{number & 255}:80"


def flat(count, statistic):
    lines = [":W - [0:0]", "-A PREROUTING -p tcp -m tcp --dport 80 -j W"]
    for number in range(count):
        match = statistic(count - number) if number < count - 1 else ""
        lines.append(f"-A W -p tcp{match} -j DNAT --to-destination {address(number + 1)}")
    return HEAD + "\n".join(lines) + "\nCOMMIT\n"


def in_turn(left):
    return f" -m statistic --mode nth --every {left} --packet 0"


def by_chance(left):
    return f" -m statistic --mode random --probability {1 / left:.11f}"


def kube_proxy(services, servers):
    chains, rules = [":KUBE-SERVICES - [0:0]"], ["-A PREROUTING -j KUBE-SERVICES"]
    for service in range(services):
        chains.append(f":KUBE-SVC-{service} - [0:0]")
        rules.append(f"-A KUBE-SERVICES -d 10.96.{service >> 8}.{service & 255}/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-{service}")
        for server in range(servers):
            name = f"KUBE-SEP-{service}-{server}"
            chains.append(f":{name} - [0:0]")
            match = by_chance(servers - server) if server < servers - 1 else ""
            rules.append(f"-A KUBE-SVC-{service}{match} -j {name}")
            rules.append(f"-A {name} -p tcp -m tcp -j DNAT --to-destination {address(service * servers + server + 1)}")
    return HEAD + "\n".join(chains + rules) + "\nCOMMIT\n"


def ports(count):
    """Four servers for each of many ports, all rules in PREROUTING."""
    lines = []
    for port in range(1, count + 1):
        for left in (4, 3, 2, 1):
            match = in_turn(left) if left > 1 else ""
            lines.append(f"-A PREROUTING -p tcp -m tcp --dport {port}{match} -j DNAT --to-destination {address(4 * port + left)}")
    return HEAD + "\n".join(lines) + "\nCOMMIT\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    in_a_network_of_our_own()
    dumps = {
        "10,000 servers in turn, one chain": flat(10_000, in_turn),
        "10,000 servers by chance, one chain": flat(10_000, by_chance),
        "kube-proxy's layout, 1,000 services of 5": kube_proxy(1000, 5),
        "1,000 ports of 4 servers in PREROUTING": ports(1000),
        "2,500 ports of 4 servers in PREROUTING": ports(2500),
    }
    print("| rules | `iptables-nft-restore --test` | `explain` | ratio | as a page |")
    print("|---" * 5 + "|")
    for words, dump in dumps.items():
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write(dump)
            file.flush()
            measured = []
            for _ in range(rounds + 1):
                bare = once(["iptables-nft-restore", "--test"], dump)
                ours = once([PROGRAM, "explain", file.name, "--format", "json"])
                page = once([PROGRAM, "explain", file.name, "--format", "html"])
                measured.append((bare, ours, page))
            bare, ours, page = (statistics.median(column) * 1000 for column in zip(*measured[1:]))
            ratio = statistics.median(one[1] / one[0] for one in measured[1:])
            print(f"| {words} ({dump.count('-A ')}) | {bare:.0f} ms | {ours:.0f} ms | {ratio:.2f} | {page:.0f} ms |")


if __name__ == "__main__":
    main()
