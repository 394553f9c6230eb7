#!/usr/bin/env bash
# Two hosts on one machine, h1 and h2 (10.77.0.1, 10.77.0.2 on a bridge): each a network, a host-name and a mount
# namespace with its own sshd. A file system is shared, unless something is mounted in one of them (on 2 mount ...).
# Usage (root): up.sh DIR    keys, configs, pids and logs go to DIR; it prints nothing when all is well. See down.sh.
#   DIR/bin/on N COMMAND...  runs a command on host N as if logged in there
#   DIR/bin/ssh              the ssh that knows both; first on PATH it serves the DeepSpeed launcher, pdsh and doctor
set -euo pipefail
dir="$(realpath -m "${1:?usage: up.sh DIR}")"
mkdir -p "$dir/bin" /run/sshd
"$(dirname "${BASH_SOURCE[0]}")/down.sh" "$dir"
ip link add br77 type bridge
ip addr add 10.77.0.254/24 dev br77
ip link set br77 up
ssh-keygen -q -t ed25519 -N '' -f "$dir/id" <<<y >/dev/null
printf '127.0.0.1 localhost\n10.77.0.1 h1 h1-net\n10.77.0.2 h2 h2-net\n' >"$dir/hosts"
for n in 1 2; do
  ip netns add "h$n"
  ip link add "veth$n" type veth peer name eth0 netns "h$n"
  ip link set "veth$n" master br77 up
  ip -n "h$n" addr add "10.77.0.$n/24" dev eth0
  ip -n "h$n" link set eth0 up
  ip -n "h$n" link set lo up
  ssh-keygen -q -t ed25519 -N '' -f "$dir/host$n" <<<y >/dev/null
  cat >"$dir/sshd$n.conf" <<EOF
ListenAddress 10.77.0.$n
Port 22
HostKey $dir/host$n
AuthorizedKeysFile $dir/id.pub
PidFile $dir/sshd$n.pid
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
AcceptEnv *
MaxStartups 100
EOF
  # nsenter, not `ip netns exec`: that would hide the cgroup mounts, without which slurmd refuses to start.
  nsenter --net="/var/run/netns/h$n" unshare --uts --mount sh -c \
    "hostname h$n && mount --bind $dir/hosts /etc/hosts && exec /usr/sbin/sshd -f $dir/sshd$n.conf -E $dir/sshd$n.log"
done
cat >"$dir/bin/on" <<EOF
#!/bin/sh
n="\$1"; shift
exec nsenter --target "\$(cat $dir/sshd\$n.pid)" --net --uts --mount --wdns="\$PWD" "\$@"
EOF
cat >"$dir/ssh_config" <<EOF
Host h1 h2 10.77.0.*
  User root
  IdentityFile $dir/id
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
EOF
printf '#!/bin/sh\nexec /usr/bin/ssh -F %s/ssh_config "$@"\n' "$dir" >"$dir/bin/ssh"
chmod +x "$dir/bin/ssh" "$dir/bin/on"
printf 'h1 slots=1\nh2 slots=1\n' >"$dir/hostfile"
for n in 1 2; do
  for _ in $(seq 100); do
    "$dir/bin/ssh" -o ConnectTimeout=2 "10.77.0.$n" true 2>/dev/null && continue 2
    sleep 0.1
  done
  echo "host h$n does not answer; see $dir/sshd$n.log" >&2
  exit 1
done
