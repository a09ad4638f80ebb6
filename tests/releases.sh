#!/usr/bin/env bash
# The tests that use iptables, with the iptables of another release of Debian: fetched as packages, unpacked below tests/.releases,
# started by wrappers that come first in PATH. Nothing is installed. Needs apt and root, or user namespaces.
#
#   tests/releases.sh bullseye|trixie|... [FILTER...]
set -euo pipefail
cd "$(dirname "$0")/.."
release=$1
shift
home=$PWD/tests/.releases/$release
packages=(iptables libip4tc2 libip6tc2 libxtables12 libnftnl11 libmnl0 libnetfilter-conntrack3 libnfnetlink0 libc6)

if [[ ! -e $home/done ]]; then
  mkdir -p "$home"/{lists/partial,cache/archives/partial,debs,root,bin}
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian $release main" >"$home/sources"
  touch "$home/status"
  apt=(-o "Dir::Etc::SourceList=$home/sources" -o "Dir::State::Status=$home/status" -o Dir::Etc::SourceParts=- -o "Dir::State::Lists=$home/lists" -o "Dir::Cache=$home/cache" -qq)
  apt-get "${apt[@]}" update
  (cd "$home/debs" && apt-get "${apt[@]}" download "${packages[@]}")
  for deb in "$home"/debs/*.deb; do dpkg-deb -x "$deb" "$home/root"; done
  loader=$(find "$home/root" -name 'ld-linux*.so.2' | head -1)
  libraries=$(find "$home/root" -name '*.so*' -not -path '*/xtables/*' -not -path '*/gconv/*' -printf '%h\n' | sort -u | paste -sd:)
  extensions=$(find "$home/root" -type d -name xtables | head -1)
  for variant in nft legacy; do
    multi=$(find "$home/root" -name "xtables-$variant-multi")
    for family in iptables ip6tables; do
      for tool in "" -save -restore; do
        for name in "$family-$variant$tool" "$family$tool"; do
          [[ $variant == legacy && $name == "$family$tool" ]] && continue
          printf '#!/bin/sh\nXTABLES_LIBDIR=%s exec %s --library-path %s %s %s "$@"\n' \
            "$extensions" "$loader" "$libraries" "$multi" "$family$tool" >"$home/bin/$name"
          chmod +x "$home/bin/$name"
        done
      done
    done
  done
  touch "$home/done"
fi
"$home/bin/iptables-save" --version
(($#)) || set -- kernel:: connections:: gateway:: host:: long_run::
PATH=$home/bin:$PATH exec cargo test --locked --test suite -- "$@"
