#!/usr/bin/env bash
# Ends what up.sh started in DIR: the hosts' processes, sshd included, their namespaces and the bridge.
set -u
for n in 1 2; do
  if ip netns pids "h$n" >/dev/null 2>&1; then
    ip netns pids "h$n" | xargs -r kill -9 2>/dev/null
    ip netns del "h$n" 2>/dev/null
  fi
  ip link del "veth$n" 2>/dev/null
done
ip link del br77 2>/dev/null
rm -f "${1:?usage: down.sh DIR}"/*.pid
exit 0
