#!/bin/sh
# Makes a page and a picture of a real chain: the known wrong recipe, and what this program writes instead.
# Needs chromium. IPTABLES_BALANCE=FILE uses a program that is built already.
set -eu
cd "$(dirname "$0")/.."
program=${IPTABLES_BALANCE:-$(examples/build.sh)}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
printf '%s' '{"name": "CFENGINE", "destination_port": 5308, "backends":
    ["10.9.0.1:5308", "10.9.0.2:5308", "10.9.0.3:5308", "10.9.0.4:5308"]}' > "$scratch/request.json"
# The plan, as iptables-save shows it.
{ "$program" plan "$scratch/request.json"; cat tests/explained/firehol.txt; } |
    sed 's/^-I \([A-Z]*\) 1 /-A \1 /' > "$scratch/dump.txt"
"$program" explain "$scratch/dump.txt" --format html > "$scratch/page.html"
chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir="$scratch/chromium" \
    --window-size=1000,2050 --screenshot="$PWD/examples/explain.png" "$scratch/page.html" 2> "$scratch/log" || {
    cat "$scratch/log" >&2
    exit 1
}
echo examples/explain.png
