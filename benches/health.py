#!/usr/bin/env python3
"""A server dies under load: what clients lose behind our watcher and behind HAProxy in tcp mode with the same checks, and
what the checks cost. Needs root, and the package haproxy.

  benches/health.py failover [--rounds N]   1,000 new connections a second to four servers, of which one dies, or hangs
  benches/health.py cost [--seconds N]      1,000 backends that are checked each second; 100 balancers of a set that idle
  benches/health.py growth [--flips N]      500 backends that all die and come back, again and again
"""
import argparse
import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from pairs import program

PROGRAM = program()
SWITCHED = str(pathlib.Path(__file__).resolve().parent.parent / "tests/root/switched.py")
SERVERS = [f"10.9.0.{number}:5308" for number in range(1, 5)]
CHECKS = {"interval": 0.2, "timeout": 0.2, "fall": 2, "rise": 2}
RATE, LASTS = 1000, 3.5

HAPROXY = """global
  maxconn 4000
defaults
  mode tcp
  balance roundrobin
  timeout connect 5s
  timeout client 5s
  timeout server 5s
  timeout check {timeout}ms
  {option}
listen pool
  bind 10.8.0.1:5308
  default-server inter {interval}ms fall {fall} rise {rise}
"""


def run(*command, **more):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **more).stdout


class Lab:
    """A client, a gateway, and the servers' network."""

    count = 0

    def __init__(self):
        Lab.count += 1
        self.names = [f"ipbh{os.getpid()}{role}{Lab.count}" for role in "cgs"]
        self.client, self.gateway, self.servers = self.names
        self.children = []
        self.scratch = tempfile.TemporaryDirectory()

    def __enter__(self):
        for name in self.names:
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        for name, device, other in ((self.client, "wan", "front"), (self.servers, "lan", "back")):
            run("ip", "-n", name, "link", "add", device, "type", "veth", "peer", "name", other, "netns", self.gateway)
            run("ip", "-n", name, "link", "set", device, "up")
            run("ip", "-n", self.gateway, "link", "set", other, "up")
        run("ip", "-n", self.client, "address", "add", "10.8.0.2/24", "dev", "wan")
        run("ip", "-n", self.gateway, "address", "add", "10.8.0.1/24", "dev", "front")
        run("ip", "-n", self.gateway, "address", "add", "10.9.255.254/16", "dev", "back")
        run("ip", "-n", self.servers, "address", "add", "10.9.255.253/16", "dev", "lan")
        # Every address of the network is a server.
        run("ip", "-n", self.servers, "route", "add", "local", "10.9.0.0/17", "dev", "lo")
        run("ip", "-n", self.client, "route", "add", "default", "via", "10.8.0.1")
        run("ip", "-n", self.servers, "route", "add", "default", "via", "10.9.255.254")
        run(*self.inside(self.gateway, "sysctl", "-qw", "net.ipv4.ip_forward=1"))
        # One neighbour stands for them all: the kernel's table of neighbours is short.
        run("ip", "-n", self.gateway, "route", "add", "10.9.0.0/17", "via", "10.9.255.253")
        self.switch = self.start(self.servers, sys.executable, SWITCHED, "serve", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self

    def __exit__(self, *_):
        for child in self.children:
            child.kill()
            child.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False)
        self.scratch.cleanup()

    def inside(self, name, *command):
        return ["ip", "netns", "exec", name, *command]

    def start(self, name, *command, **more):
        child = subprocess.Popen(self.inside(name, *command), text=True, **more)
        self.children.append(child)
        return child

    def turn(self, word, servers):
        """Switches servers; returns the time at which it was done."""
        self.switch.stdin.write(f"{word} {' '.join(servers)}\n")
        self.switch.stdin.flush()
        return float(self.switch.stdout.readline())

    def watch(self, request):
        """Starts a watcher, and waits until it is ready."""
        path = pathlib.Path(self.scratch.name)
        (path / "request.json").write_text(json.dumps(request))
        environment = {
            **os.environ, "XTABLES_LOCKFILE": f"{path}/xtables.lock", "IPTABLES_BALANCE_LOCKFILE": f"{path}/lock",
            "IPTABLES_BALANCE_STATE_DIR": f"{path}/state", "IPTABLES_BALANCE_RUNTIME_DIR": f"{path}/run",
        }
        log = open(path / "log", "w")
        watcher = self.start(self.gateway, PROGRAM, "watch", f"{path}/request.json", stderr=log, env=environment)
        table = ["iptables-legacy-save" if request.get("variant") == "legacy" else "iptables-save", "-t", "nat"]
        end = time.monotonic() + 60
        while ":5308" not in run(*self.inside(self.gateway, *table)) or "--to-destination" not in run(*self.inside(self.gateway, *table)):
            assert watcher.poll() is None and time.monotonic() < end, (path / "log").read_text()
            time.sleep(0.1)
        return watcher

    def haproxy(self, servers, option, checks):
        path = pathlib.Path(self.scratch.name)
        times = {key: int(checks[key] * 1000) for key in ("interval", "timeout")}
        text = HAPROXY.format(option=option, fall=checks["fall"], rise=checks["rise"], **times)
        text += "".join(f"  server s{number} {server} check\n" for number, server in enumerate(servers))
        (path / "haproxy.cfg").write_text(text)
        return self.start(self.gateway, "haproxy", "-db", "-f", f"{path}/haproxy.cfg", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def pool(variant, servers, health):
    return {"name": "W", "variant": variant, "destination": "10.8.0.1", "destination_port": 5308, "backends": servers, "health": health}


def failover(way, death):
    """One death under load: milliseconds until the last connection that was lost began, lost connections, late ones."""
    with Lab() as lab:
        lab.turn("up", SERVERS)
        if way.startswith("HAProxy"):
            lab.haproxy(SERVERS, "option redispatch" if "redispatch" in way else "retries 3", CHECKS)
        else:
            lab.watch(pool(way, SERVERS, CHECKS))
        time.sleep(1)
        load = lab.start(lab.client, sys.executable, SWITCHED, "load", "10.8.0.1:5308", str(RATE), str(LASTS), stdout=subprocess.PIPE)
        time.sleep(1 + random.random() / 2)
        victim = random.choice(SERVERS)
        if death == "dies":
            died = lab.turn("down", [victim])
        else:
            drop = ["iptables", "-A", "INPUT", "-d", victim.split(":")[0], "-j", "DROP"]
            run(*lab.inside(lab.servers, *drop))
            died = time.monotonic()
        lines = [line.split() for line in load.communicate()[0].splitlines()]
        assert len(lines) == int(RATE * LASTS), len(lines)
        lost = [float(began) for began, _, answer in lines if ":" not in answer]
        late = [took for _, took, answer in lines if ":" in answer and float(took) > 0.5]
        return max((began - died) * 1000 for began in lost) if lost else 0, len(lost), len(late)


def compare_failovers(rounds):
    ways = ["nft", "legacy", "HAProxy", "HAProxy, redispatch"]
    for death in ("dies", "hangs"):
        found = {way: [] for way in ways}
        for _ in range(rounds):
            for way in ways:
                found[way].append(failover(way, death))
        print(f"a server {death}: ms to the last lost connection (median, most), connections lost (median, most), answers later than 0.5 s (median)")
        for way, figures in found.items():
            last, lost, late = zip(*figures)
            print(f"  {way:20} {statistics.median(last):6.0f} {max(last):6.0f} {statistics.median(lost):8.0f} {max(lost):6} {statistics.median(late):8.0f}", flush=True)


def used(child):
    """Seconds of CPU that a process and its ended children have used, and its resident and peak KiB."""
    # The scheduler's nanoseconds: ticks are too coarse for a process that works for microseconds.
    own = int(pathlib.Path(f"/proc/{child.pid}/schedstat").read_text().split()[0]) / 1e9
    fields = pathlib.Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
    children = sum(map(int, fields[13:15])) / os.sysconf("SC_CLK_TCK")
    status = pathlib.Path(f"/proc/{child.pid}/status").read_text().splitlines()
    memory = {line.split(":")[0]: line.split()[1] for line in status if line.startswith("Vm")}
    return own + children, int(memory["VmRSS"]), int(memory["VmHWM"])


def cost_of(start, seconds):
    with Lab() as lab:
        child = start(lab)
        time.sleep(5)
        before, began = used(child)[0], time.monotonic()
        time.sleep(seconds)
        after, resident, peak = used(child)
        return (after - before) / (time.monotonic() - began) * 100, resident, peak


def thousand(lab):
    servers = [f"10.9.{number // 250}.{number % 250 + 1}:5308" for number in range(1000)]
    lab.turn("up", ["0.0.0.0:5308"])
    return servers


def costs(seconds):
    checks = {"interval": 1, "timeout": 1, "fall": 3, "rise": 2}

    def hundred(lab):
        lab.turn("up", ["0.0.0.0:5308"])
        balancers = [
            {"name": f"b{number}", "destination_port": 6000 + number, "backends": [f"10.9.0.{number % 250 + 1}:5308", f"10.9.1.{number % 250 + 1}:5308"]}
            for number in range(100)
        ]
        return lab.watch({"name": "W", "destination": "10.8.0.1", "balancers": balancers, "health": {}})

    ways = {
        "1,000 backends, TCP, each second": lambda lab: lab.watch(pool("nft", thousand(lab), checks)),
        "the same on legacy": lambda lab: lab.watch(pool("legacy", thousand(lab), checks)),
        "the same by HAProxy": lambda lab: lab.haproxy(thousand(lab), "", checks),
        "100 balancers of two backends in a set, defaults": hundred,
    }
    print("per cent of a core, resident KiB, peak KiB")
    for way, start in ways.items():
        share, resident, peak = cost_of(start, seconds)
        print(f"  {way:50} {share:6.2f} {resident:8} {peak:8}", flush=True)


def growth(flips):
    """Memory over transitions: each flip is one for each of 500 backends."""
    with Lab() as lab:
        servers = [f"10.9.{number // 250}.{number % 250 + 1}:5308" for number in range(500)]
        lab.turn("up", ["0.0.0.0:5308"])
        watcher = lab.watch(pool("nft", servers, {"interval": 0.2, "timeout": 0.2, "fall": 1, "rise": 1, "panic_threshold": "never"}))
        log = pathlib.Path(lab.scratch.name) / "log"
        print("transitions, resident KiB, peak KiB")
        for flip in range(flips):
            lab.turn("down" if flip % 2 == 0 else "up", ["0.0.0.0:5308"])
            end = time.monotonic() + 60
            while (count := log.read_text().count("checks in a row")) < 500 * (flip + 1):
                assert time.monotonic() < end, count
                time.sleep(0.1)
            time.sleep(0.5)
            if flip in (0, 1, 3) or flip % 5 == 4:
                print(f"  {count:6} {used(watcher)[1]:8} {used(watcher)[2]:8}", flush=True)
        watcher.send_signal(signal.SIGTERM)
        watcher.wait(10)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("what", choices=["failover", "cost", "growth"])
    arguments.add_argument("--rounds", type=int, default=11)
    arguments.add_argument("--seconds", type=int, default=30)
    arguments.add_argument("--flips", type=int, default=20)
    given = arguments.parse_args()
    if given.what == "failover":
        compare_failovers(given.rounds)
    elif given.what == "cost":
        costs(given.seconds)
    else:
        growth(given.flips)


if __name__ == "__main__":
    main()
