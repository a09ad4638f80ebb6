#!/usr/bin/env bash
# Records `iptables-save -c` of what ferm, FireHOL and Shorewall make of the configurations below, after some hundred
# connections: tests/explained/{ferm,firehol,shorewall}.txt. Needs root, and Debian's packages ferm, firehol and shorewall.
# The tools run in a network namespace and a mount namespace of their own, where /etc, /var and /sys cannot be written.
set -euo pipefail
folder=$(cd "$(dirname "$0")" && pwd)

configure_ferm() { # FILE
  cat >"$1" <<'CONFIGURATION'
@def $DOOR = eth0;
@def &SHARE($port, $part, $server) = {
  domain ip table nat chain PREROUTING interface $DOOR proto tcp dport $port
    mod statistic mode random probability $part DNAT to $server;
}
domain ip {
  table filter chain FORWARD {
    policy DROP;
    mod state state INVALID DROP;
    mod state state (ESTABLISHED RELATED) ACCEPT;
    interface $DOOR outerface eth1 proto tcp dport (http 8443) ACCEPT;
  }
  table nat chain PREROUTING {
    # Three servers in turn, each for two ports.
    interface $DOOR proto tcp dport (http https) {
      mod statistic mode nth every 3 packet 0 DNAT to 10.0.0.1;
      mod statistic mode nth every 2 packet 0 DNAT to 10.0.0.2;
      DNAT to 10.0.0.3;
    }
    # A range: the kernel chooses by the client.
    interface $DOOR proto tcp dport 81 DNAT to 10.0.0.1-10.0.0.4 persistent;
    interface $DOOR proto tcp dport 82 DNAT to 10.0.0.1-10.0.0.4:8080 random;
  }
}
# The percentages of the whole, where each rule sees the rest.
&SHARE(83, 0.33, 10.0.0.1);
&SHARE(83, 0.33, 10.0.0.2);
&SHARE(83, 0.33, 10.0.0.3);
# By chance, and right.
&SHARE(84, 0.25, 10.0.0.1:8443);
&SHARE(84, 0.33333333, 10.0.0.2:8443);
&SHARE(84, 0.5, 10.0.0.3:8443);
domain ip table nat chain PREROUTING interface $DOOR proto tcp dport 84 DNAT to 10.0.0.4:8443;
CONFIGURATION
}

configure_firehol() { # FILE
  cat >"$1" <<'CONFIGURATION'
version 6
# Four servers: "round robin".
ipv4 dnat to 10.0.0.1,10.0.0.2,10.0.0.3,10.0.0.4 inface eth0 proto tcp dport 80
ipv4 dnat to 10.0.0.1,10.0.0.2,10.0.0.3 inface eth0 proto tcp dport 86
# Weights.
ipv4 dnat to 10.0.0.1/50,10.0.0.2/30,10.0.0.3/20 inface eth0 proto tcp dport 81
ipv4 dnat to 10.0.0.1/25,10.0.0.2/25,10.0.0.3/25,10.0.0.4/25 inface eth0 proto tcp dport 82
# Clients keep their server.
ipv4 dnat to 10.0.0.1,10.0.0.2,10.0.0.3,10.0.0.4 id shop persistent inface eth0 proto tcp dport 83
# A range, and this host.
ipv4 dnat to 10.0.0.1-10.0.0.4 random inface eth0 proto tcp dport 84
ipv4 redirect to 8080,8081,8082,8083 inface eth0 proto tcp dport 85
interface eth0 world
  policy drop
router inside inface eth0 outface eth1
  server http accept
CONFIGURATION
}

configure_shorewall() { # DIRECTORY
  cp /usr/share/doc/shorewall/examples/two-interfaces/shorewall.conf "$1"
  sed -i 's/^STARTUP_ENABLED=.*/STARTUP_ENABLED=Yes/' "$1/shorewall.conf"
  printf '%s\n' 'fw firewall' 'net ipv4' 'loc ipv4' >"$1/zones"
  printf '%s\n' '?FORMAT 2' 'net eth0 tcpflags,nosmurfs' 'loc eth1 tcpflags' >"$1/interfaces"
  printf '%s\n' 'loc net ACCEPT' 'net all DROP' 'all all REJECT' >"$1/policy"
  cat >"$1/rules" <<'CONFIGURATION'
?SECTION NEW
?COMMENT a range
DNAT net loc:10.0.0.1-10.0.0.4:8080 tcp 80
?COMMENT ports of one server
DNAT net loc:10.0.0.1:8080-8083 tcp 81
?COMMENT in turn
DNAT net loc:10.0.0.1 tcp 82 ;; -m statistic --mode nth --every 3 --packet 0
DNAT net loc:10.0.0.2 tcp 82 ;; -m statistic --mode nth --every 2 --packet 0
DNAT net loc:10.0.0.3 tcp 82
?COMMENT by chance, without the rules of the filter table
DNAT- net 10.0.0.1 tcp 83 ;; -m statistic --mode random --probability 0.33333333
DNAT- net 10.0.0.2 tcp 83 ;; -m statistic --mode random --probability 0.50000000
DNAT- net 10.0.0.3 tcp 83
ACCEPT net loc tcp 83
?COMMENT this host
REDIRECT net 8081-8090:random tcp 84
CONFIGURATION
  printf '%s\n' 'SNAT(192.0.2.1) 10.0.0.0/24 eth0 { probability=0.50 }' 'MASQUERADE 10.0.0.0/24 eth0' >"$1/snat"
}

# The gateway 192.0.2.1, a client at eth0, and the servers' network at eth1.
lab() {
  ip link set lo up
  unshare --net sleep 600 &
  client=$!
  trap 'kill $client' EXIT
  until [ "$(readlink "/proc/$client/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
  for link in "eth0 192.0.2.1 192.0.2.2" "eth1 10.0.0.254 10.0.0.1"; do
    read -r name here there <<<"$link"
    ip link add "$name" type veth peer name "$name" netns "$client"
    ip address add "$here/24" dev "$name"
    ip link set "$name" up
    nsenter --target "$client" --net ip address add "$there/24" dev "$name"
    nsenter --target "$client" --net ip link set "$name" up
  done
}

connect() { # PORT...
  nsenter --target "$client" --net python3 - "$@" <<'PYTHON'
import socket, sys
for port in sys.argv[1:]:
    for _ in range(240):
        with socket.socket() as one:
            one.setblocking(False)
            one.connect_ex(("192.0.2.1", int(port)))
PYTHON
}

inside() {
  tool=$1
  version="$tool $(dpkg-query --show --showformat '${Version}' "$tool") of Debian $(cat /etc/debian_version)"
  mount --make-rprivate /
  mount --types tmpfs none /tmp
  mount --types tmpfs none /var
  mkdir -p /var/lib/shorewall /var/spool/firehol /var/lib/firehol /var/cache/ferm /var/lock/subsys /var/log /var/tmp
  mount --types tmpfs none /run
  mount --types sysfs --options ro none /sys
  mount --types tmpfs none "/etc/$tool"
  mount --options remount,bind,ro /
  lab
  case $tool in
    ferm)
      configure_ferm /etc/ferm/ferm.conf
      ferm /etc/ferm/ferm.conf
      ports="80 443 81 82 83 84"
      ;;
    firehol)
      echo START_FIREHOL=YES >/tmp/start
      mount --bind /tmp/start /etc/default/firehol
      mkdir /etc/firehol/services
      configure_firehol /etc/firehol/firehol.conf
      firehol /etc/firehol/firehol.conf start
      ports="80 81 82 83 84 85 86"
      ;;
    shorewall)
      configure_shorewall /etc/shorewall
      shorewall start
      ports="80 81 82 83 84"
      ;;
  esac >&2
  # shellcheck disable=SC2086
  connect $ports
  echo "# Recorded by tests/explained/record.sh, which has the configuration: $version."
  # ferm and FireHOL take the legacy variant where both are installed.
  case $tool in shorewall) variant=nft ;; *) variant=legacy ;; esac
  "iptables-$variant-save" -c
}

if [ "${1:-}" = --inside ]; then
  inside "$2"
  exit
fi
for tool in ${*:-ferm firehol shorewall}; do
  recording=$(unshare --net --mount "$0" --inside "$tool")
  printf '%s\n' "$recording" >"$folder/$tool.txt"
done
