#!/usr/bin/env bash
# Puts the collection together: collection.sh DIRECTORY ARCH=PROGRAM...
# DIRECTORY/ansible_collections/iptables_balance/gateway is then what Ansible finds with ANSIBLE_COLLECTIONS_PATH=DIRECTORY.
set -euo pipefail
directory=$1/ansible_collections/iptables_balance/gateway
shift
source=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$directory"
cp -r "$source/collection/." "$directory"
find "$directory" -name __pycache__ -exec rm -r {} +
cp "$source/../../LICENSE-MIT" "$source/../../LICENSE-APACHE" "$source/../../CHANGELOG.md" "$directory"
for pair in "$@"; do
  install -D -m 755 "${pair#*=}" "$directory/files/${pair%%=*}/iptables_balance"
done
(cd "$directory/files" && sha256sum -- */iptables_balance >SHA256SUMS)
