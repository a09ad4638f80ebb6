#!/usr/bin/env python3
"""`mode: hash`: what a new flow costs, and how many clients move when a backend leaves. Needs root, or user namespaces.

  benches/hash.py flows [--rounds N] [SIZE...]   a new flow, against one DNAT rule and against random and nth in turn; every
                                                 flow comes from a client of its own
  benches/hash.py movement [--clients N]         clients that move, in units of the unavoidable 1/N, and the largest error of a
                                                 share: this program, other ways that iptables rules could have, and
                                                 HAProxy itself (package haproxy) with real connections
"""
import argparse
import collections
import ipaddress
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import flows
from pairs import in_a_network_of_our_own, program

PROGRAM = program()
# More programs of BPF than about a thousand can hang the kernel when they are freed at once.
SIZES = [4, 64, 1024]
WORD = 0xFFFF_FFFF


# --- flows ----------------------------------------------------------------------------------------------------------

def many_clients(number):
    return f"10.8.{1 + number % 120_000 // 512}.{number % 250 + 1}"


def measure(size, rounds):
    setups = []
    try:
        for variant in ("nft", "legacy"):
            setups.append(flows.Setup((variant, "single"), flows.single(variant)))
            for mode in ("nth", "random", "hash"):
                setups.append(flows.Setup((variant, mode), flows.balanced(variant, mode, "auto", size)))
        figures = {setup.label: [] for setup in setups}
        for number in range(rounds + 2):
            random.shuffle(setups)
            for setup in setups:
                nanoseconds = setup.send()
                if number >= 2:
                    figures[setup.label].append(nanoseconds)
        return figures
    finally:
        for setup in setups:
            setup.end()


def ratio(figures, one, other):
    return statistics.median(a / b for a, b in zip(figures[one], figures[other]))


def cost(sizes, rounds):
    flows.Setup.script = __file__
    print("| backends | variant | single DNAT | nth | random | hash | hash against random |")
    print("|---" * 7 + "|")
    for size in sizes or SIZES:
        figures = measure(size, rounds)
        for variant in ("nft", "legacy"):
            base = (variant, "single")
            ratios = [f"{ratio(figures, (variant, mode), base):.2f}" for mode in ("nth", "random", "hash")]
            beside = ratio(figures, (variant, "hash"), (variant, "random"))
            single = statistics.median(figures[base]) / 1000
            print(f"| {size:,} | {variant} | {single:.1f} µs | {' | '.join(ratios)} | {beside:.2f} |", flush=True)


# --- ways to choose, in software ------------------------------------------------------------------------------------

def mix(a, seed):
    """The hash of `-m bpf`, of an IPv4 address."""
    a = (a ^ seed) * 0x9E3779B1 & WORD
    a = (a ^ a >> 16) * 0x85EBCA6B & WORD
    a = (a ^ a >> 13) * 0xC2B2AE35 & WORD
    return a ^ a >> 16


def seeds(*key):
    return random.Random(repr(key)).getrandbits(32)


class Ours:
    """What `plan` prints, followed by hand."""
    name = "this program (a tree of decisions)"

    def __init__(self, servers, _):
        request = {"name": "W", "mode": "hash", "destination_port": 80, "layout": "flat", "backends": servers}
        planned = subprocess.run([PROGRAM, "plan", "-"], input=json.dumps(request), capture_output=True, text=True, check=True)
        self.rules = []
        for line in planned.stdout.splitlines():
            if line.startswith("-A W "):
                tests = [piece.split('"')[0].split(",") for piece in line.split('--bytecode "')[1:]]
                decisions = [(int(test[2].split()[3]), int(test[-3].split()[3])) for test in tests]
                self.rules.append((decisions, line.split()[-1]))
        self.cost = len(self.rules)

    def choose(self, client):
        known = {}
        for decisions, server in self.rules:
            for seed, below in decisions:
                if seed not in known:
                    known[seed] = mix(client, seed)
                if known[seed] >= below:
                    break
            else:
                return server


class Cascade:
    """One rule for each server, with a seed of its own: a share of what is left."""
    name = "a cascade, one decision for each server"

    def __init__(self, servers, _):
        self.servers = sorted((seeds(server), server) for server in servers)
        self.cost = len(servers)

    def choose(self, client):
        for left, (seed, server) in zip(range(len(self.servers), 0, -1), self.servers):
            if mix(client, seed) * left < 1 << 32:
                return server
        raise AssertionError("the last one takes everything")


class Slices:
    """One hash, cut into equal slices in listed order: HAProxy's map-based hash, nginx's `ip_hash`, nft's `jhash mod`."""
    name = "one hash cut into slices"

    def __init__(self, servers, _):
        self.servers = servers
        self.cost = len(servers)

    def choose(self, client):
        return self.servers[mix(client, 1) * len(self.servers) >> 32]


class Buckets:
    """A tree of halves leads to a bucket, whose server is the one that scores highest there (rendezvous)."""
    name = "32 N buckets, each given to a server by rendezvous"

    def __init__(self, servers, count):
        self.bits = (32 * count - 1).bit_length()
        self.owners = [max(servers, key=lambda server: seeds(bucket, server)) for bucket in range(1 << self.bits)]
        self.cost = len(self.owners)

    def choose(self, client):
        return self.owners[mix(client, 1) >> 32 - self.bits]


class Maglev:
    """Google's table: each server in turn takes the next free slot of its own permutation (Eisenbud et al. 2016, 3.4)."""
    name = "Maglev's table of about 100 N slots"

    def __init__(self, servers, count):
        size = 100 * count
        size = next(n for n in range(size, 2 * size) if all(n % d for d in range(2, int(n ** 0.5) + 1)))
        ways = {server: (seeds("offset", server) % size, seeds("skip", server) % (size - 1) + 1) for server in servers}
        table, places, filled = [None] * size, dict.fromkeys(servers, 0), 0
        while filled < size:
            for server in sorted(servers):
                offset, skip = ways[server]
                while table[(offset + places[server] * skip) % size]:
                    places[server] += 1
                table[(offset + places[server] * skip) % size] = server
                filled += 1
                if filled == size:
                    break
        self.table, self.cost = table, size

    def choose(self, client):
        return self.table[mix(client, 1) * len(self.table) >> 32]


def shares_error(counts, servers):
    total = sum(counts.values())
    return max(abs(counts[server] / total * len(servers) - 1) for server in servers)


def moved(way, servers, clients):
    """Mean and worst over which server leaves, in units of 1/N; the largest error of a share; rules."""
    first = way(servers, len(servers))
    before = [first.choose(client) for client in clients]
    times = []
    for gone in servers if len(servers) <= 16 else servers[::len(servers) // 16]:
        after = way([server for server in servers if server != gone], len(servers))
        count = sum(one != after.choose(client) for one, client in zip(before, clients))
        times.append(count / len(clients) * len(servers))
    return statistics.mean(times), max(times), shares_error(collections.Counter(before), servers), first.cost


# --- HAProxy --------------------------------------------------------------------------------------------------------

class Haproxy:
    """`balance source`, asked by real connections from addresses of their own, in a network of our own."""

    def __init__(self, servers, kind):
        self.servers = servers
        self.scratch = tempfile.TemporaryDirectory()
        self.socket = f"{self.scratch.name}/socket"
        lines = "".join(f"  server s{n} {server}:80\n" for n, server in enumerate(servers))
        config = f"{self.scratch.name}/haproxy.cfg"
        with open(config, "w") as file:
            file.write(f"global\n  stats socket {self.socket} level admin\ndefaults\n  mode tcp\n  timeout connect 5s\n"
                       f"  timeout client 5s\n  timeout server 5s\nfrontend f\n  bind 10.8.0.1:80\n  default_backend b\n"
                       f"backend b\n  balance source\n  hash-type {kind}\n{lines}")
        self.process = subprocess.Popen(["haproxy", "-db", "-f", config], stderr=subprocess.DEVNULL)
        while not os.path.exists(self.socket):
            time.sleep(0.01)

    def say(self, command):
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(self.socket)
            control.sendall(command.encode() + b"\n")
            control.recv(1000)

    def choose(self, client):
        with socket.socket() as asking:
            asking.setsockopt(socket.SOL_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT
            asking.bind((str(ipaddress.ip_address(client)), 0))
            asking.connect(("10.8.0.1", 80))
            return asking.recv(100).decode()

    def end(self):
        self.process.terminate()
        self.process.wait()
        self.scratch.cleanup()


def moved_by_haproxy(kind, servers, clients):
    run = flows.run
    for address in ("10.8.0.1", *servers):
        run("ip", "address", "replace", f"{address}/32", "dev", "lo")
    run("ip", "route", "replace", "local", "10.64.0.0/10", "dev", "lo")
    lab = os.path.join(os.path.dirname(__file__), "..", "examples", "lab.py")
    answering = subprocess.Popen([sys.executable, lab, "serve", "tcp", *(f"{server}:80" for server in servers)],
                                 stdout=subprocess.PIPE, text=True)
    answering.stdout.readline()
    proxy = Haproxy(servers, kind)
    try:
        before = [proxy.choose(client) for client in clients]
        times = []
        for number in range(len(servers)):
            proxy.say(f"disable server b/s{number}")
            count = sum(one != proxy.choose(client) for one, client in zip(before, clients))
            proxy.say(f"enable server b/s{number}")
            times.append(count / len(clients) * len(servers))
        return statistics.mean(times), max(times), shares_error(collections.Counter(before), servers), None
    finally:
        proxy.end()
        answering.terminate()
        answering.wait()


def movement(count):
    in_a_network_of_our_own()
    dice = random.Random(1)
    clients = [0x0A40_0000 + dice.getrandbits(22) for _ in range(count)]
    print("| backends | way | moved, times 1/N: mean | worst | largest error of a share | rules |")
    print("|---" * 6 + "|")

    def row(size, name, found):
        mean, worst, error, rules = found
        cost = "-" if rules is None else f"{rules:,}"
        print(f"| {size} | {name} | {mean:.2f} | {worst:.2f} | {100 * error:.0f} % | {cost} |", flush=True)

    for size in (4, 10, 50):
        servers = [f"10.9.0.{number}" for number in range(1, size + 1)]
        for way in (Ours, Cascade, Buckets, Maglev, Slices):
            row(size, way.name, moved(way, servers, clients))
        if size <= 10:
            for kind in ("consistent", "map-based"):
                found = moved_by_haproxy(kind, servers, clients[:2000])
                row(size, f"HAProxy, `balance source`, `hash-type {kind}`", found)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=25)
    arguments.add_argument("--clients", type=int, default=20_000)
    arguments.add_argument("--client", help=argparse.SUPPRESS)
    arguments.add_argument("part", nargs="?")
    arguments.add_argument("sizes", type=int, nargs="*")
    arguments = arguments.parse_intermixed_args()
    if arguments.client:
        return flows.client(arguments.client, int(arguments.part), many_clients)
    if arguments.part == "movement":
        return movement(arguments.clients)
    if os.geteuid() != 0:
        os.execvp("unshare", ["unshare", "--map-root-user", "--net", "--mount", "sh", "-c",
                              'mount -t tmpfs tmpfs /run && exec "$0" "$@"', sys.executable, *sys.argv])
    return cost(arguments.sizes, arguments.rounds)


if __name__ == "__main__":
    main()
