#!/usr/bin/env bash
# Sets up everything that the tests need and runs them all: format, lints, documentation, dependencies, the oldest Rust,
# the demo with and without root, and the tests.
# As root it installs packages with apt; without root it names the missing ones, and works in a user namespace.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/sbin:/sbin

oldest=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
packages=(
  iptables nftables iproute2 procps python3 python3-venv ansible-core cfengine3 conntrack strace util-linux prometheus
  openssh-server openssh-client sudo git binutils lintian rpm man-db zsh fish tcsh systemd keepalived
  qemu-user-static libc6-arm64-cross chromium poppler-utils
  "rustc-web=$oldest*" "libstd-rust-web-dev=$oldest*"
)
programs=(iptables-save nft ip sysctl python3 ansible-playbook cf-agent conntrack promtool strace script setpriv flock unshare
  sshd sudo git objdump lintian rpm man zsh fish tcsh systemd-analyze keepalived qemu-aarch64-static
  chromium pdfinfo pdftotext)
missing=0
for program in "${programs[@]}"; do command -v "$program" >/dev/null || missing=1; done
python3 -c 'import ensurepip' 2>/dev/null || missing=1
/usr/bin/rustc --version 2>/dev/null | grep -q "^rustc $oldest\." || missing=1
if ((missing)); then
  if ((EUID != 0)); then
    echo "Some packages are missing. As root, type: apt-get install ${packages[*]}" >&2
    exit 1
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --allow-downgrades "${packages[@]}" >/dev/null
fi
[[ -x tests/.venv/bin/ansible-playbook && -x tests/.venv/bin/cfbs ]] || {
  python3 -m venv tests/.venv
  tests/.venv/bin/pip --quiet --disable-pip-version-check install ansible-core cfbs
}
cargo deny --version >/dev/null 2>&1 || cargo install --quiet --locked cargo-deny

cargo fmt --check
cargo clippy --locked --all-targets -- -D warnings
RUSTDOCFLAGS="-D warnings" cargo doc --quiet --locked --no-deps --document-private-items
cargo deny --log-level error check bans licenses sources
# With a target directory of its own: two compilers do not share one.
target=$(cargo metadata --format-version=1 --no-deps --locked |
  python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')
RUSTC=/usr/bin/rustc RUSTC_WRAPPER='' CARGO_TARGET_DIR=$target/oldest cargo check --quiet --locked --lib --bins
cargo test --locked --no-run

# As on a fresh machine, and as a user without any right. The output is shown only after a failure.
quietly() {
  local log
  log=$(mktemp)
  "$@" >"$log" 2>&1 || { cat "$log"; echo "failed: $*"; exit 1; } >&2
  rm -f "$log"
}
quietly module-spec/package.sh
IPTABLES_BALANCE=$(examples/build.sh)
export IPTABLES_BALANCE
quietly examples/demo.sh
if ((EUID == 0)); then
  home=$(mktemp -d)
  chmod 777 "$home"
  cp "$IPTABLES_BALANCE" "$home/"
  cp -r examples module-spec LICENSE-MIT LICENSE-APACHE CHANGELOG.md "$home/"
  quietly setpriv --reuid=65534 --regid=65534 --clear-groups \
    env HOME="$home" LOGNAME=nobody USER=nobody IPTABLES_BALANCE="$home/iptables_balance" "$home/examples/demo.sh"
  rm -rf "$home"
  exec cargo test --locked
fi
# Several users, and a file system of its own, need more than a user namespace.
echo "Without root the tests of packages and of Ansible over ssh are left out." >&2
exec unshare --map-root-user --net --mount bash -c \
  'mount -t tmpfs tmpfs /run && exec cargo test --locked -- --skip collection:: --skip packages::'
