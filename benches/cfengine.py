#!/usr/bin/env python3
"""What one converged promise adds to a run of cf-agent with an empty policy, on an empty host; both variants.
Needs cf-agent, and root or user namespaces.

  benches/cfengine.py [PROGRAM] [RUNS]
"""
import os
import sys
import tempfile

from pairs import in_a_network_of_our_own, once, program, side_by_side

PROGRAM = sys.argv[1] if len(sys.argv) > 1 else program()
RUNS = int(sys.argv[2]) if len(sys.argv) > 2 else 31

EMPTY = 'body common control { bundlesequence => { "main" }; }\nbundle agent main\n{\n%s}\n'
BLOCK = 'promise agent iptables_balance\n{\n  path => "%s";\n}\n'
PROMISE = """  iptables_balance:
    "CFENGINE"
      variant => "%s", destination_port => "5308",
      backends => { "10.9.0.1:5308", "10.9.0.2:5308", "10.9.0.3:5308", "10.9.0.4:5308" };
"""


def main():
    in_a_network_of_our_own()
    print("| variant | empty policy | one promise, kept | it adds | ratio |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        for folder in ("bin", "inputs", "modules"):
            os.mkdir(f"{work}/{folder}", 0o700)
        os.symlink("/usr/bin/cf-promises", f"{work}/bin/cf-promises")
        os.symlink(PROGRAM, f"{work}/modules/iptables_balance")
        for variant in ("nft", "legacy"):
            commands = []
            for name, text in (
                ("empty", EMPTY % ""),
                ("promise", BLOCK % f"{work}/modules/iptables_balance" + EMPTY % (PROMISE % variant)),
            ):
                policy = f"{work}/inputs/{name}.cf"
                with open(policy, "w", encoding="ascii") as file:
                    file.write(text)
                os.chmod(policy, 0o600)
                commands.append((["cf-agent", "-w", work, "-K", "-f", policy], None))
            once(commands[1][0])
            empty, promise = side_by_side(commands, RUNS)
            print(
                f"| {variant} | {empty[0]:.1f} ms | {promise[0]:.1f} ms | {promise[0] - empty[0]:.1f} ms | {promise[1]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
