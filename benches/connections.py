#!/usr/bin/env python3
"""A whole short connection (connect, ask, answer, close) from a client to one of four servers behind a gateway: direct,
through the balancer in both variants, and through HAProxy in tcp mode on the same gateway. In turn, round after round;
the ratio is to the direct connection of the same round. Needs root or user namespaces, and the package haproxy.

  benches/connections.py [--rounds N] [--connections N]
"""
import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time

from pairs import in_a_network_of_our_own, program

PROGRAM = program()
SERVERS = [f"10.9.0.{number}" for number in range(1, 5)]
# The way, and the address that the client connects to.
WAYS = {"direct": ("10.9.0.1", 80), "nft": ("10.8.0.1", 5308), "legacy": ("10.8.0.1", 5309), "HAProxy": ("10.8.0.1", 5310)}

HAPROXY = """defaults
  mode tcp
  balance roundrobin
  timeout connect 5s
  timeout client 5s
  timeout server 5s
listen hubs
  bind 10.8.0.1:5310
"""


def run(*command, **more):
    subprocess.run(command, check=True, **more)


def serve():
    """Answers every connection on port 80, one after the other."""
    listener = socket.create_server(("", 80), backlog=1024)
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        with connection:
            if connection.recv(64):
                connection.sendall(b"answer")


def connect(address, port, count):
    """Prints the median microseconds of a connection."""
    figures = []
    for _ in range(count):
        started = time.perf_counter()
        with socket.create_connection((address, port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(b"ask")
            assert connection.recv(64) == b"answer"
        figures.append(time.perf_counter() - started)
    print(statistics.median(figures) * 1e6)


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--connections", type=int, default=2000)
    arguments.add_argument("--serve", action="store_true")
    arguments.add_argument("--connect")
    given = arguments.parse_args()
    if given.serve:
        serve()
    if given.connect:
        address, port = given.connect.rsplit(":", 1)
        return connect(address, int(port), given.connections)
    in_a_network_of_our_own()  # This namespace is the gateway.
    client, servers = f"bcc{os.getpid()}", f"bcs{os.getpid()}"
    children = []
    try:
        for name, device, own, other, network in ((client, "front", "10.8.0.1", "10.8.0.2", 8), (servers, "back", "10.9.0.254", None, 9)):
            run("ip", "netns", "add", name)
            run("ip", "link", "add", device, "type", "veth", "peer", "name", "eth", "netns", name)
            run("ip", "address", "add", f"{own}/24", "dev", device)
            run("ip", "link", "set", device, "up")
            for address in [other] if other else SERVERS:
                run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth")
            run("ip", "-n", name, "link", "set", "eth", "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
            run("ip", "-n", name, "route", "add", "default", "via", own)
        run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        server = subprocess.Popen(["ip", "netns", "exec", servers, sys.executable, __file__, "--serve"], stdout=subprocess.PIPE)
        children.append(server)
        assert server.stdout.readline() == b"ready\n"
        for variant, port in (("nft", 5308), ("legacy", 5309)):
            backends = [f"{address}:80" for address in SERVERS]
            request = {"name": "BENCH", "variant": variant, "destination_port": port, "backends": backends}
            run(PROGRAM, input=json.dumps(request).encode(), stdout=subprocess.DEVNULL)
        with tempfile.NamedTemporaryFile("w", suffix=".cfg") as config:
            config.write(HAPROXY + "".join(f"  server s{number} {address}:80\n" for number, address in enumerate(SERVERS)))
            config.flush()
            children.append(subprocess.Popen(["haproxy", "-q", "-f", config.name]))
            time.sleep(1)
            measure(client, given)
    finally:
        for child in children:
            child.kill()
            child.wait()
        for name in (client, servers):
            subprocess.run(["ip", "netns", "del", name], check=False)
    return None


def measure(client, given):
    figures = {way: [] for way in WAYS}
    for number in range(given.rounds + 1):
        for way, (address, port) in WAYS.items():
            command = ["ip", "netns", "exec", client, sys.executable, __file__, "--connect", f"{address}:{port}", "--connections", str(given.connections)]
            median = float(subprocess.run(command, capture_output=True, check=True).stdout)
            if number:
                figures[way].append(median)
    print("| way | a short connection | ratio to direct, median (least to most) |")
    print("|---|---|---|")
    for way, medians in figures.items():
        ratios = [one / direct for one, direct in zip(medians, figures["direct"])]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {way} | {statistics.median(medians):.0f} µs | {spread} |")


if __name__ == "__main__":
    sys.exit(main())
