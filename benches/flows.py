#!/usr/bin/env python3
"""What a new flow costs on its way through the gateway, over the number of backends: one chain, a tree of chains,
and nft's own `numgen` map as the limit; both variants, both modes. Needs root, or user namespaces.

Each setup is a client, a gateway and a server's network, in namespaces of their own. All setups of one size send in
turn, round after round; each packet is a new flow, which goes the whole way: sent, routed, tracked, translated,
forwarded, and dropped where the server would be. The ratio is to a single DNAT rule in the same round.

  benches/flows.py [--plot FILE.svg] [--rounds N] [SIZE...]       the plot needs gnuplot
"""
import argparse
import itertools
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import time

from pairs import program

PROGRAM = program()
SIZES = [1, 4, 16, 64, 256, 1024, 4096, 10_000]
SHORT = 0.02  # seconds that a setup sends in a round


def run(*command, text=None):
    subprocess.run(command, check=True, input=text, text=True, stdout=subprocess.DEVNULL)


def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def few_clients(number):
    return f"10.8.1.{number // 60_000 + 1}"


def frame(mac, number, port, source=few_clients):
    """A UDP packet from a client and port of its own to a port of 10.8.0.1, without a UDP checksum."""
    udp = struct.pack("!HHHH", 1024 + number % 60_000, port, 9, 0) + b"?"
    source = socket.inet_aton(source(number))
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, source, socket.inet_aton("10.8.0.1"))
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    return mac + b"\x02\0\0\0\0\x02" + b"\x08\x00" + head + udp


def client(mac, port, source=few_clients):
    """Sends for as long as it is told to, and says how long a packet took."""
    sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    sender.bind(("wan", 0))
    frames = itertools.cycle([frame(bytes.fromhex(mac.replace(":", "")), number, port, source) for number in range(120_000)])
    print("ready", flush=True)
    for line in sys.stdin:
        count, end = 0, time.perf_counter() + float(line)
        started = time.perf_counter()
        while time.perf_counter() < end:
            for packet in itertools.islice(frames, 8):
                sender.send(packet)
            count += 8
        print((time.perf_counter() - started) / count * 1e9, flush=True)


class Setup:
    """A gateway with those rules, and a client that sends to it."""

    count = 0
    script = __file__  # the client's program

    def __init__(self, label, rules, port=5308):
        Setup.count += 1
        self.label = label
        self.client, self.gateway, self.server = (f"ipbf{os.getpid()}{role}{Setup.count}" for role in "cgs")
        for name in (self.client, self.gateway, self.server):
            run("ip", "netns", "add", name)
        client_, gateway, server = (["ip", "-n", name] for name in (self.client, self.gateway, self.server))
        run(*client_, "link", "add", "wan", "type", "veth", "peer", "name", "front", "netns", self.gateway)
        run(*server, "link", "add", "lan", "type", "veth", "peer", "name", "back", "netns", self.gateway)
        run(*client_, "link", "set", "wan", "up")
        run(*server, "link", "set", "lan", "up")
        for device, address in (("front", "10.8.0.1/16"), ("back", "10.9.255.254/16")):
            run(*gateway, "link", "set", device, "up")
            run(*gateway, "address", "add", address, "dev", device)
        # One neighbour for all servers; what arrives there has no address to go to.
        mac = self.mac(server, "lan")
        run(*gateway, "route", "add", "10.9.0.0/17", "via", "10.9.255.253", "dev", "back")
        run(*gateway, "route", "add", "10.9.128.0/17", "via", "10.9.255.253", "dev", "back")
        run(*gateway, "neighbour", "add", "10.9.255.253", "lladdr", mac, "dev", "back")
        self.inside("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.front.rp_filter=0")
        rules(self)
        # From here on connections are tracked; they are forgotten again at once.
        self.inside("sysctl", "-qw", "net.netfilter.nf_conntrack_udp_timeout=1")
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", self.client, sys.executable, self.script, "--client", self.mac(gateway, "front"), str(port)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process.stdout.readline()

    @staticmethod
    def mac(inside, device):
        return json.loads(subprocess.check_output([*inside, "-j", "link", "show", device]))[0]["address"]

    def inside(self, *command, text=None):
        run("ip", "netns", "exec", self.gateway, "env", f"XTABLES_LOCKFILE=/tmp/{self.gateway}.lock",
            f"IPTABLES_BALANCE_LOCKFILE=/tmp/{self.gateway}.balance.lock",
            f"IPTABLES_BALANCE_STATE_DIR=/tmp/{self.gateway}.state", f"IPTABLES_BALANCE_RUNTIME_DIR=/tmp/{self.gateway}.run",
            *command, text=text)

    def send(self):
        self.process.stdin.write(f"{SHORT}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def end(self):
        self.process.stdin.close()
        self.process.wait()
        for name in (self.client, self.gateway, self.server):
            run("ip", "netns", "del", name)
        for lock in ("lock", "balance.lock"):
            if os.path.exists(f"/tmp/{self.gateway}.{lock}"):
                os.remove(f"/tmp/{self.gateway}.{lock}")


def servers(count):
    return [f"10.9.{n >> 8}.{n & 255}" for n in range(1, count + 1)]


def single(variant):
    rule = "-A PREROUTING -p udp -m udp --dport 5308 -j DNAT --to-destination 10.9.0.1"
    return lambda setup: setup.inside(f"iptables-{variant}-restore", "--noflush", text=f"*nat\n{rule}\nCOMMIT\n")


def balanced(variant, mode, layout, count):
    request = {"name": "BENCH", "variant": variant, "mode": mode, "layout": layout, "protocol": "udp",
               "destination_port": 5308, "backends": servers(count)}
    return lambda setup: setup.inside(PROGRAM, text=json.dumps(request))


def numgen(mode, count):
    servers_ = ", ".join(f"{n} : {server}" for n, server in enumerate(servers(count)))
    how = {"nth": "inc", "random": "random"}[mode]
    rule = f"udp dport 5308 dnat to numgen {how} mod {count} map {{ {servers_} }}"
    table = f"table ip bench {{ chain in {{ type nat hook prerouting priority -100; {rule}; }}; }}"
    return lambda setup: setup.inside("nft", "-f", "-", text=table)


def measure(size, rounds):
    setups = []
    try:
        for variant in ("nft", "legacy"):
            setups.append(Setup((variant, "single", ""), single(variant)))
            for mode in ("nth", "random"):
                for layout in ("flat", "tree"):
                    setups.append(Setup((variant, layout, mode), balanced(variant, mode, layout, size)))
        for mode in ("nth", "random"):
            setups.append(Setup(("nft", "numgen", mode), numgen(mode, size)))
        figures = {setup.label: [] for setup in setups}
        for number in range(rounds + 2):
            for setup in setups:
                nanoseconds = setup.send()
                if number >= 2:
                    figures[setup.label].append(nanoseconds)
        return figures
    finally:
        for setup in setups:
            setup.end()


def ratio(figures, label):
    base = figures[(label[0], "single", "")]
    return statistics.median(one / other for one, other in zip(figures[label], base))


def table(sizes, results):
    columns = [(variant, layout, mode) for variant in ("legacy", "nft") for layout in ("flat", "tree")
               for mode in ("nth", "random")] + [("nft", "numgen", "nth"), ("nft", "numgen", "random")]
    print("| backends | single DNAT, legacy / nft | " + " | ".join(" ".join(column) for column in columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for size, figures in zip(sizes, results):
        base = " / ".join(f"{statistics.median(figures[(variant, 'single', '')]) / 1000:.1f} µs" for variant in ("legacy", "nft"))
        print(f"| {size:,} | {base} | " + " | ".join(f"{ratio(figures, column):.2f}" for column in columns) + " |")


def plot(file, sizes, results):
    lines = [("legacy", "flat"), ("nft", "flat"), ("legacy", "tree"), ("nft", "tree"), ("nft", "numgen")]
    data = "".join(
        "\n".join(f"{size} {ratio(figures, (*line, 'nth'))}" for size, figures in zip(sizes, results)) + "\ne\n" for line in lines)
    curves = ", ".join(f"'-' with linespoints lw 2 title '{layout}, {variant}'" for variant, layout in lines)
    script = (f"set terminal svg size 800,480 font 'sans-serif,13' background '#ffffff'\nset output '{file}'\nset logscale xy\n"
              "set xlabel 'backends'\nset ylabel 'cost of a new flow, single DNAT rule = 1'\nset yrange [0.7:*]\nset grid\n"
              f"set key top left\nplot {curves}\n{data}")
    run("gnuplot", text=script)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--plot")
    arguments.add_argument("--rounds", type=int, default=25)
    arguments.add_argument("--client", help=argparse.SUPPRESS)
    arguments.add_argument("sizes", type=int, nargs="*")
    arguments = arguments.parse_args()
    if arguments.client:
        return client(arguments.client, *arguments.sizes)
    if os.geteuid() != 0:
        os.execvp("unshare", ["unshare", "--map-root-user", "--net", "--mount", "sh", "-c",
                              'mount -t tmpfs tmpfs /run && exec "$0" "$@"', sys.executable, *sys.argv])
    sizes = arguments.sizes or SIZES
    results = []
    for size in sizes:
        results.append(measure(size, arguments.rounds))
        print(f"measured {size:,}", file=sys.stderr)
    table(sizes, results)
    if arguments.plot:
        plot(arguments.plot, sizes, results)


if __name__ == "__main__":
    main()
