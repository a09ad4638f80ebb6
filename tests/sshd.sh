#!/usr/bin/env bash
# A host for Ansible, with sshd: sshd.sh DIRECTORY. Run it as root in a network namespace and a mount namespace of its own.
#
# Its /etc is a copy; its /root, /home, /run, /srv and /var/lib are empty. The key DIRECTORY/key opens root, deploy and tight. deploy may
# use sudo with the password `secret`, which is also root's. tight may use sudo without a password, but only at a terminal.
# DIRECTORY/prepare, where it exists, is run as root before sshd starts.
set -euo pipefail
directory=$1
umask 022
cp -a /etc "$directory/etc"
mount --bind "$directory/etc" /etc
for place in /root /home /run /srv /var/lib; do mount -t tmpfs -o mode=755 tmpfs $place; done
mkdir -p /run/sshd /run/lock /var/lib/sudo
# `secret`, by openssl passwd -6
hash='$6$iptables$x1AcMCtFVG12wzouus/Be.wDttr.00udt61Xhrngo5n0elYrSHUQY5p1Snh7fANbYXhgxboymtq3NS7zOsmcq1'
sed -i "s|^root:[^:]*:|root:$hash:|" /etc/shadow
number=2000
for user in deploy tight; do
  number=$((number + 1))
  echo "$user:x:$number:$number::/home/$user:/bin/sh" >>/etc/passwd
  echo "$user:x:$number:" >>/etc/group
  echo "$user:$hash:19000:0:99999:7:::" >>/etc/shadow
  install -d -m 755 -o $number -g $number /home/$user
done
printf '%s\n' 'deploy ALL=(ALL) ALL' 'tight ALL=(ALL) NOPASSWD: ALL' 'Defaults:tight requiretty' >/etc/sudoers.d/lab
chmod 440 /etc/sudoers.d/lab
[[ -e $directory/key ]] || ssh-keygen -q -t ed25519 -N '' -f "$directory/key"
for home in /root /home/deploy /home/tight; do
  owner=$(stat -c %u:%g $home)
  install -d -m 700 -o "${owner%:*}" -g "${owner#*:}" $home/.ssh
  install -m 600 -o "${owner%:*}" -g "${owner#*:}" "$directory/key.pub" $home/.ssh/authorized_keys
done
ssh-keygen -q -t ed25519 -N '' -f "$directory/host"
printf '%s\n' 'Port 22' "HostKey $directory/host" 'UsePAM no' 'PermitRootLogin prohibit-password' 'MaxSessions 50' 'MaxStartups 200' \
  "PidFile $directory/pid" 'Subsystem sftp internal-sftp' 'AcceptEnv LANG LC_*' >"$directory/sshd_config"
[[ ! -e $directory/prepare ]] || . "$directory/prepare"
echo ready
exec /usr/sbin/sshd -D -e -f "$directory/sshd_config" 2>"$directory/log"
