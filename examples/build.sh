#!/usr/bin/env bash
# Builds the program and prints its path: cargo knows the target directory, which may be configured.
set -euo pipefail
cd "$(dirname "$0")/.."
messages=$(cargo build --release --locked --message-format=json-render-diagnostics)
python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message["reason"] == "compiler-artifact" and message.get("executable"):
        print(message["executable"])
' <<<"$messages"
