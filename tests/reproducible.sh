#!/usr/bin/env bash
# Builds the packages of HEAD twice, in two directories with two target directories, and compares the files.
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for copy in one a-longer-name; do
  git clone --quiet . "$scratch/$copy"
  CARGO_TARGET_DIR=$scratch/$copy-build "$scratch/$copy/module-spec/package.sh" "$@" >&2
  (cd "$scratch/$copy/target/package" && find . -type f -exec sha256sum {} + | sort -k 2) >"$scratch/$copy.sums"
done
diff "$scratch/one.sums" "$scratch/a-longer-name.sums"
echo "$(wc -l <"$scratch/one.sums") files are identical"
