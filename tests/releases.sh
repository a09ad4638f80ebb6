#!/usr/bin/env bash
# The tests that use iptables, with another iptables: that of a release of Debian, fetched as packages and unpacked below
# tests/.releases, or one that was built from source (./configure --prefix=PREFIX --disable-shared --enable-static). Wrappers that
# come first in PATH start it. Nothing is installed. Needs root, or user namespaces, and apt for a release.
#
#   tests/releases.sh bullseye|trixie|...|PREFIX [FILTER...]
set -euo pipefail
cd "$(dirname "$0")/.."
release=$1
shift
home=$PWD/tests/.releases/${release//\//_}

# The wrappers of one variant: `wrap nft|legacy COMMAND...`, where COMMAND takes the name of the tool as its first argument.
wrap() {
  local variant=$1 family tool name
  shift
  for family in iptables ip6tables; do
    for tool in "" -save -restore; do
      for name in "$family-$variant$tool" "$family$tool"; do
        [[ $variant == legacy && -e $home/bin/$name ]] && continue
        printf '#!/bin/sh\n%s %s "$@"\n' "$*" "$family$tool" >"$home/bin/$name"
        chmod +x "$home/bin/$name"
      done
    done
  done
}

packages=(iptables libip4tc2 libip6tc2 libxtables12 libnftnl11 libmnl0 libnetfilter-conntrack3 libnfnetlink0 libc6)

if [[ -d $release ]]; then
  rm -rf "$home"
  mkdir -p "$home/bin"
  # Before 1.8 there was one variant, and no name for it.
  for variant in nft legacy; do
    for multi in "$release/sbin/xtables-$variant-multi" "$release/sbin/xtables-multi"; do
      [[ -x $multi && ! ($variant == nft && $multi == */xtables-multi) ]] && wrap $variant "exec $multi"
    done
  done
elif [[ ! -e $home/done ]]; then
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
    wrap $variant "XTABLES_LIBDIR=$extensions exec $loader --library-path $libraries $multi"
  done
  touch "$home/done"
fi
"$home/bin/iptables" --version
(($#)) || set -- kernel:: connections:: gateway:: host:: long_run::
PATH=$home/bin:$PATH exec cargo test --locked --test root -- "$@"
