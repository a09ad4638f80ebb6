#!/usr/bin/env python3
"""Taking one of four UDP backends out of a balancer, with its 10 connections, beside many conntrack entries of others:
the whole run, against `conntrack -D -p udp -r ADDRESS` alone, in turn. And against the program in --other, if given.
Needs root or user namespaces, and the package conntrack.

  benches/disconnect.py [--rounds N] [--other PROGRAM] [ENTRIES...]
"""
import argparse
import json
import socket
import statistics
import struct
import subprocess
import sys

from pairs import in_a_network_of_our_own, once, program

PROGRAM = program()
BACKENDS = [f"10.9.0.{number}" for number in range(1, 5)]
OURS = 10


def attribute(kind, *values):
    nested = isinstance(values[0], bytes) and len(values) == 1
    value = values[0] if nested else b"".join(values)
    data = struct.pack("=HH", 4 + len(value), kind) + value
    return data + bytes(-len(data) % 4)


def direction(kind, source, destination, source_port, destination_port):
    addresses = attribute(1, socket.inet_aton(source)) + attribute(2, socket.inet_aton(destination))
    ports = attribute(1, b"\x11") + attribute(2, struct.pack("!H", source_port)) + attribute(3, struct.pack("!H", destination_port))
    return attribute(kind | 0x8000, attribute(1 | 0x8000, addresses) + attribute(2 | 0x8000, ports))


def add_entries(entries):
    """Adds (client, port, backend) to the kernel's table by netlink, as `conntrack -I` does one by one. Without a backend the
    destination is not rewritten."""
    kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
    kernel.bind((0, 0))
    batch, waiting = b"", 0
    for client, port, backend in entries:
        body = struct.pack("=BBH", 2, 0, 0)
        body += direction(1, client, "10.8.0.1", port, 5308) + direction(2, "10.8.0.1", client, 5308, port)
        body += attribute(3, struct.pack("!I", 0x2 | 0x8)) + attribute(7, struct.pack("!I", 3600))
        if backend:
            body += attribute(13 | 0x8000, attribute(1, socket.inet_aton(backend)) + attribute(2, socket.inet_aton(backend)))
        batch += struct.pack("=IHHII", 16 + len(body), 0x0100, 0x0405, 1, 0) + body
        waiting += 1
        if waiting == 50:
            acknowledge(kernel, batch, waiting)
            batch, waiting = b"", 0
    if waiting:
        acknowledge(kernel, batch, waiting)


def acknowledge(kernel, batch, waiting):
    kernel.send(batch)
    while waiting:
        packet, at = kernel.recv(65_536), 0
        while at < len(packet):
            length, kind = struct.unpack_from("=IH", packet, at)
            code = struct.unpack_from("=i", packet, at + 16)[0]
            if kind == 2 and code not in (0, -17):
                sys.exit(f"netlink: error {code}")
            waiting -= 1
            at += (length + 3) & ~3


def request(variant, backends):
    return json.dumps({"name": "BENCH", "variant": variant, "protocol": "udp", "destination_port": 5308, "backends": backends})


def ours():
    add_entries((f"10.7.0.{number % 250 + 1}", 2000 + number, BACKENDS[3]) for number in range(OURS))


def left():
    listed = subprocess.run(["conntrack", "-L", "-p", "udp", "-r", BACKENDS[3]], capture_output=True, text=True, check=True)
    return len(listed.stdout.splitlines())


def take_out(tool, variant):
    subprocess.run([tool], input=request(variant, BACKENDS).encode(), check=True, stdout=subprocess.DEVNULL)
    ours()
    seconds = once([tool], request(variant, BACKENDS[:3]))
    assert left() == 0
    return seconds


def delete():
    ours()
    seconds = once(["conntrack", "-D", "-p", "udp", "-r", BACKENDS[3]])
    assert left() == 0
    return seconds


def main():
    in_a_network_of_our_own()
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--other")
    arguments.add_argument("entries", type=int, nargs="*")
    given = arguments.parse_args()
    # The table is made by the first rule that needs it.
    subprocess.run(["iptables-nft", "-t", "nat", "-A", "POSTROUTING", "-p", "udp", "--dport", "9", "-j", "ACCEPT"], check=True)
    tools = [PROGRAM, given.other] if given.other else [PROGRAM]
    heads = ["a run"] + ["the other program"] * (len(tools) - 1)
    print("| entries of others | variant | `conntrack -D` | " + " | ".join(f"{head} | ratio" for head in heads) + " |")
    print("|---" * (3 + 2 * len(tools)) + "|")
    there = 0
    for entries in sorted(given.entries) or [0, 20_000, 60_000, 150_000, 200_000]:
        add_entries((f"10.{n >> 24 & 63 | 64}.{n >> 16 & 255}.{n >> 8 & 255}", 1024 + (n & 255), BACKENDS[n % 3]) for n in range(there, entries))
        there = entries
        for variant in ("nft", "legacy"):
            rounds = []
            for _ in range(given.rounds + 1):
                rounds.append([delete()] + [take_out(tool, variant) for tool in tools])
            rounds = rounds[1:]
            bare = statistics.median(one[0] for one in rounds)
            columns = []
            for at in range(1, len(tools) + 1):
                median = statistics.median(one[at] for one in rounds)
                ratio = statistics.median(one[at] / one[0] for one in rounds)
                columns.append(f"{median * 1000:.0f} ms | {ratio:.2f}")
            print(f"| {entries:,} | {variant} | {bare * 1000:.0f} ms | " + " | ".join(columns) + " |", flush=True)
            absent = json.dumps({"name": "BENCH", "variant": variant, "state": "absent", "disconnect": "never"})
            subprocess.run([PROGRAM], input=absent.encode(), check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
