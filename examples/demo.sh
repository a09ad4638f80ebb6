#!/usr/bin/env bash
# The main job on a fresh machine: a client, a gateway and four servers in network namespaces, the example
# playbook on the gateway with real Ansible, a thousand connections, and who got how many.
#
# As root it installs what is missing; without root it needs the packages and works in a user namespace.
# It touches none of the host's own rules, and cleans up after itself.
#
#   IPTABLES_BALANCE=FILE   a built program, to spare the build
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

# --- what is needed -------------------------------------------------------------------------------------------------
declare -A package=(
  [iptables]=iptables [ip]=iproute2 [python3]=python3 [ansible-playbook]=ansible-core [sysctl]=procps
)
PATH=$PATH:/usr/sbin:/sbin
missing=()
for program in "${!package[@]}"; do
  command -v "$program" >/dev/null || missing+=("${package[$program]}")
done
# Debian's compiler of the web browsers is new enough, the usual one of Debian 12 is not.
[[ -n ${IPTABLES_BALANCE:-} ]] || command -v cargo >/dev/null || missing+=(cargo-web rustc-web)
if ((${#missing[@]})); then
  if ((EUID == 0)); then
    say "Installing ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null
  else
    echo "These packages are missing. As root, type: apt-get install ${missing[*]}" >&2
    exit 1
  fi
fi

if [[ -z ${IPTABLES_BALANCE:-} ]]; then
  say "Building"
  IPTABLES_BALANCE=$(examples/build.sh)
fi
export IPTABLES_BALANCE

# --- without root: a user namespace in which we are root, with a network and a /run of our own -----------------------
if ((EUID != 0)); then
  exec unshare --map-root-user --net --mount bash -c 'mount -t tmpfs tmpfs /run && exec "$0"' "$0"
fi

# --- the laboratory -------------------------------------------------------------------------------------------------
client=ipbd$$c gateway=ipbd$$g servers=ipbd$$s
scratch=$(mktemp -d)
server_pid=
clean_up() {
  [[ -z $server_pid ]] || kill "$server_pid" 2>/dev/null || true
  for namespace in $client $gateway $servers; do ip netns del "$namespace" 2>/dev/null || true; done
  rm -rf "$scratch"
}
trap clean_up EXIT

in_() { ip netns exec "$@"; }

say "A client, a gateway and four servers, in network namespaces"
for namespace in $client $gateway $servers; do
  ip netns add "$namespace"
  in_ "$namespace" ip link set lo up
done
in_ $client ip link add wan type veth peer name front netns $gateway
in_ $servers ip link add lan type veth peer name back netns $gateway
in_ $client ip address add 10.8.0.2/24 dev wan
in_ $gateway ip address add 10.8.0.1/24 dev front
in_ $gateway ip address add 10.9.0.254/24 dev back
in_ $client ip link set wan up
in_ $gateway ip link set front up
in_ $gateway ip link set back up
for number in 1 2 3 4; do in_ $servers ip address add 10.9.0.$number/24 dev lan; done
in_ $servers ip link set lan up
in_ $client ip route add default via 10.8.0.1
in_ $servers ip route add default via 10.9.0.254
in_ $gateway sysctl -qw net.ipv4.ip_forward=1
coproc SERVERS { exec ip netns exec $servers python3 examples/lab.py serve tcp 10.9.0.{1,2,3,4}:5308; }
server_pid=$SERVERS_PID
read -r line <&"${SERVERS[0]}"
[[ $line == ready ]]

# --- the main job ---------------------------------------------------------------------------------------------------
# The collection with this program, as package.sh builds it with those of all architectures.
module-spec/ansible/collection.sh "$scratch/collections" "$(uname -m)=$IPTABLES_BALANCE"
export IPTABLES_BALANCE_LOCKFILE=$scratch/lock IPTABLES_BALANCE_STATE_DIR=$scratch/state IPTABLES_BALANCE_RUNTIME_DIR=$scratch/run
# Who we are in here: root, so that the playbook's `become` has nothing to do.
export LOGNAME=root USER=root
export ANSIBLE_COLLECTIONS_PATH=$scratch/collections ANSIBLE_NOCOWS=1 HOME=$scratch LC_ALL=C.UTF-8
# The gateway shares this machine's files. So the program is kept in the scratch directory, not in /var.
play() {
  in_ $gateway ansible-playbook -i examples/ansible/inventory.ini -e iptables_balance_directory="$scratch/programs" \
    examples/ansible/nth.yml "$@" | tee "$scratch/play"
}

say "The playbook on the gateway: ansible-playbook examples/ansible/nth.yml --diff"
play --diff
grep -q 'changed=1 .*failed=0' "$scratch/play"

say "The rules that it made"
in_ $gateway iptables-save -t nat | grep CFENGINE

say "1,000 connections from the client to 10.8.0.1:5308"
in_ $client python3 examples/lab.py ask tcp 10.8.0.1:5308 1000 >"$scratch/answers"
sort "$scratch/answers" | uniq -c

say "The playbook again: nothing to do"
play
grep -q 'changed=0 .*failed=0' "$scratch/play"

expected=$(printf '    250 10.9.0.%s\n' 1 2 3 4)
if [[ $(sort "$scratch/answers" | uniq -c) == "$expected" ]]; then
  say "Each server got 250 of 1,000 connections, and the second run changed nothing."
else
  say "The servers did not get 250 connections each."
  exit 1
fi
