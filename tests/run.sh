#!/usr/bin/env bash
# Sets up what the tests need and runs them all: format, lints, the demo with and without root, and the tests.
# As root it installs packages by apt; without root it says which are missing and works in a user namespace.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/sbin:/sbin

packages=(iptables nftables iproute2 procps python3 python3-venv ansible-core cfengine3 conntrack strace util-linux)
programs=(iptables-save nft ip sysctl python3 ansible-playbook cf-agent conntrack strace script setpriv flock unshare)
missing=0
for program in "${programs[@]}"; do command -v "$program" >/dev/null || missing=1; done
python3 -c 'import ensurepip' 2>/dev/null || missing=1
if ((missing)); then
  if ((EUID != 0)); then
    echo "Something is missing. As root, type: apt-get install ${packages[*]}" >&2
    exit 1
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${packages[@]}" >/dev/null
fi
[[ -x tests/.venv/bin/ansible-playbook ]] || {
  python3 -m venv tests/.venv
  tests/.venv/bin/pip --quiet --disable-pip-version-check install ansible-core
}

cargo fmt --check
cargo clippy --locked --all-targets -- -D warnings
cargo build --release --locked
cargo test --locked --no-run

# In a fresh machine's way, and as somebody without any right. What they print matters only if they fail.
quietly() {
  local log
  log=$(mktemp)
  "$@" >"$log" 2>&1 || { cat "$log"; echo "failed: $*"; exit 1; } >&2
  rm -f "$log"
}
export IPTABLES_BALANCE=$PWD/target/release/iptables_balance
quietly examples/demo.sh
if ((EUID == 0)); then
  home=$(mktemp -d)
  chmod 777 "$home"
  cp "$IPTABLES_BALANCE" "$home/"
  cp -r examples "$home/"
  quietly setpriv --reuid=65534 --regid=65534 --clear-groups \
    env HOME="$home" LOGNAME=nobody USER=nobody IPTABLES_BALANCE="$home/iptables_balance" "$home/examples/demo.sh"
  rm -rf "$home"
  exec cargo test --locked
fi
exec unshare --map-root-user --net --mount bash -c 'mount -t tmpfs tmpfs /run && exec cargo test --locked'
