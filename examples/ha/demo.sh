#!/usr/bin/env bash
# A pair of gateways with keepalived, and no table of connections between them. 200 clients are connected through the first.
# It is killed; the second takes its addresses; and all 200 speak on with the same servers.
#
# As root, with the packages iptables, iproute2, procps, python3 and keepalived. Everything is in network namespaces.
#
#   IPTABLES_BALANCE=FILE   a built program, to spare the build
#   VARIANT=nft|legacy      of iptables; nft if left out
#   MODE=hash|random|nth    to see what becomes of the clients with the others
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH=$PATH:/usr/sbin:/sbin
IPTABLES_BALANCE=${IPTABLES_BALANCE:-$(examples/build.sh)}
variant=${VARIANT:-nft} mode=${MODE:-hash} clients=200

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

# --- a switch for the clients and one for the servers ---------------------------------------------------------------
hub=ipbh$$h client=ipbh$$c servers=ipbh$$s one=ipbh$$g two=ipbh$$t
scratch=$(mktemp -d)
started=()
clean_up() {
  for process in "${started[@]}"; do kill "$process" 2>/dev/null || true; done
  for namespace in $client $servers $one $two $hub; do ip netns del "$namespace" 2>/dev/null || true; done
  # keepalived ends its children itself, which takes a moment.
  for process in "${started[@]}"; do wait "$process" 2>/dev/null || true; done
  rm -rf "$scratch"
}
trap clean_up EXIT

in_() { ip netns exec "$@"; }

say "A client, two gateways and four servers, on two switches"
for namespace in $hub $client $servers $one $two; do
  ip netns add "$namespace"
  in_ "$namespace" ip link set lo up
done
for switch in wan lan; do
  in_ $hub ip link add $switch type bridge
  in_ $hub ip link set $switch up
done
plug() { # NAMESPACE SWITCH PORT ADDRESS...
  in_ $hub ip link add "$3" type veth peer name "$2" netns "$1"
  in_ $hub ip link set "$3" master "$2" up
  in_ "$1" ip link set "$2" up
  for address in "${@:4}"; do in_ "$1" ip address add "$address" dev "$2"; done
}
plug $client wan client 10.8.0.2/24
plug $servers lan servers 10.9.0.{1,2,3,4}/24
plug $one wan one-wan 10.8.0.11/24
plug $one lan one-lan 10.9.0.251/24
plug $two wan two-wan 10.8.0.12/24
plug $two lan two-lan 10.9.0.252/24
# The client has a whole network of addresses; the servers' default route is the address that moves.
in_ $client ip route add local 10.64.0.0/16 dev lo
in_ $client ip route add default via 10.8.0.1
in_ $servers ip route add default via 10.9.0.254

# --- the same request on both gateways, and keepalived ---------------------------------------------------------------
request='{"name": "WEB", "variant": "'$variant'", "mode": "'$mode'", "destination": "10.8.0.1", "destination_port": 80,
  "backends": ["10.9.0.1:80", "10.9.0.2:80", "10.9.0.3:80", "10.9.0.4:80"], "ip_forward": true}'
priority=200
for gateway in $one $two; do
  in_ "$gateway" ip route add 10.64.0.0/16 via 10.8.0.2
  export XTABLES_LOCKFILE=$scratch/$gateway.xtables IPTABLES_BALANCE_LOCKFILE=$scratch/$gateway.lock
  export IPTABLES_BALANCE_STATE_DIR=$scratch/$gateway.state IPTABLES_BALANCE_RUNTIME_DIR=$scratch/$gateway.run
  in_ "$gateway" "$IPTABLES_BALANCE" apply - <<<"$request" >/dev/null
  # See gateway.yml: no server speaks first in a connection that is not known.
  in_ "$gateway" "iptables-$variant" -A FORWARD -i lan -p tcp --sport 80 ! --syn -m conntrack --ctstate NEW -j DROP
  sed "s/PRIORITY/$priority/" examples/ha/keepalived.conf >"$scratch/$gateway.conf"
  in_ "$gateway" keepalived --dont-fork --vrrp --log-console --use-file "$scratch/$gateway.conf" \
    --pid "$scratch/$gateway.pid" --vrrp_pid "$scratch/$gateway.vrrp" >"$scratch/$gateway.log" 2>&1 &
  started+=($!)
  priority=100
done
has_addresses() { [[ $(in_ "$1" ip -o address | grep -cE ' (10.8.0.1|10.9.0.254)/24 ') == 2 ]]; }
until_true() {
  for _ in {1..300}; do
    "$@" && return
    sleep 0.1
  done
  echo "in vain: $*" >&2
  tail -n 20 "$scratch"/*.log >&2
  return 1
}
until_true has_addresses $one

# --- 200 clients ------------------------------------------------------------------------------------------------------
coproc SERVERS { exec ip netns exec $servers python3 examples/ha/lines.py serve 10.9.0.{1,2,3,4}:80; }
started+=("$SERVERS_PID")
read -r line <&"${SERVERS[0]}"
[[ $line == ready ]]
mkfifo "$scratch/commands" "$scratch/answers"
in_ $client python3 examples/ha/lines.py clients $clients 10.64.0.0/16 10.8.0.1:80 <"$scratch/commands" >"$scratch/answers" &
started+=($!)
exec {commands}>"$scratch/commands" {answers}<"$scratch/answers"
all() { # COMMAND: how many clients got the answer of their server
  echo "$1" >&$commands
  read -r answered <&$answers
}
all later
say "$answered clients are connected and have their answer; the servers have more to say in two seconds"

say "The first gateway dies"
[[ $answered == "$clients" ]]
kill -KILL "$(<"$scratch/$one.vrrp")" "${started[0]}"
wait "${started[0]}" 2>/dev/null || true
in_ $one ip link del wan
in_ $one ip link del lan
until_true has_addresses $two
say "The second one has its addresses"
# The servers speak first; the clients only give a sign of life, a second later.
all wait
spoken=$answered
all hello
say "Of $clients clients $spoken were spoken to by their server, and $answered then spoke on with it."
[[ $spoken == "$clients" && $answered == "$clients" ]]
