#!/bin/sh
# Makes the picture of the README: the page of `explain` about a real chain, that of a known tutorial.
# Needs chromium and pngquant. IPTABLES_BALANCE=FILE uses a program that is built already.
set -eu
cd "$(dirname "$0")/.."
program=${IPTABLES_BALANCE:-$(examples/build.sh)}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$program" explain tests/explained/tutorial-nth.txt --format html > "$scratch/page.html"
HOME=$scratch timeout 60 chromium --headless --no-sandbox --disable-gpu --hide-scrollbars \
    --user-data-dir="$scratch/chromium" --window-size=960,1400 --screenshot="$scratch/page.png" \
    "$scratch/page.html" 2> "$scratch/log" || {
    cat "$scratch/log" >&2
    exit 1
}
pngquant --force --nofs --output examples/explain.png 128 "$scratch/page.png"
echo examples/explain.png
