"""Commands measured side by side: in turn, in one run, as whole processes."""
import os
import statistics
import subprocess
import sys
import time


def program():
    """The path of the program: IPTABLES_BALANCE, or where cargo builds it."""
    if "IPTABLES_BALANCE" not in os.environ:
        build = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "examples/build.sh")
        os.environ["IPTABLES_BALANCE"] = subprocess.run([build], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    return os.environ["IPTABLES_BALANCE"]


def in_a_network_of_our_own():
    """Starts the script again in a network namespace of its own, with locks and files of its own."""
    if "BENCH_INSIDE" not in os.environ:
        os.environ["BENCH_INSIDE"] = "1"
        os.environ["XTABLES_LOCKFILE"] = f"/tmp/bench-{os.getpid()}.lock"
        os.environ["IPTABLES_BALANCE_LOCKFILE"] = f"/tmp/bench-{os.getpid()}.balance.lock"
        os.environ["IPTABLES_BALANCE_STATE_DIR"] = f"/tmp/bench-{os.getpid()}.state"
        os.environ["IPTABLES_BALANCE_RUNTIME_DIR"] = f"/tmp/bench-{os.getpid()}.run"
        user = [] if os.geteuid() == 0 else ["--map-root-user"]
        os.execvp("unshare", ["unshare", *user, "--net", sys.executable, *sys.argv])
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def peak(command, text):
    """Peak resident KiB of one run, by GNU time (package `time`)."""
    timed = subprocess.run(
        ["/usr/bin/time", "-f", "%M", *command], input=text.encode(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True
    )
    return int(timed.stderr.split()[-1])


def once(command, text=None):
    """Seconds of one run, which must succeed."""
    reader, writer = os.pipe()
    started = time.perf_counter()
    child = subprocess.Popen(command, stdin=reader, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        pipe.write((text or "").encode())
    errors = child.stderr.read()
    code = child.wait()
    seconds = time.perf_counter() - started
    if code != 0:
        sys.exit(f"{command}: exit code {code}: {errors.decode()}")
    return seconds


def side_by_side(commands, runs):
    """For each (command, input) the median milliseconds, and the median of its ratio to the first, run by run."""
    results = [[] for _ in commands]
    for number in range(runs + 2):
        for result, (command, text) in zip(results, commands):
            measured = once(command, text)
            if number >= 2:
                result.append(measured)
    first = results[0]
    return [
        (
            statistics.median(result) * 1000,
            statistics.median(one / other for one, other in zip(result, first)),
        )
        for result in results
    ]
