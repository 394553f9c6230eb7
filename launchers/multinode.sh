#!/usr/bin/env bash
# Pretrain on the hosts of a hostfile ("HOST slots=N" a line), started through pdsh, Open MPI, or without ssh.
# Started again with the same out dir it continues there, also on other hosts (resume=false: it refuses to).
#
#   bash launchers/multinode.sh HOSTFILE --recipe NAME [--out DIR] [key=value ...]
#   LAUNCHER=openmpi bash launchers/multinode.sh ...        # pdsh (default), openmpi, mpich, impi: DeepSpeed's names
#   NODE_RANK=0 MASTER_ADDR=HOST bash launchers/multinode.sh ...   # no ssh: the same command on every host, its number each
#
# Every host needs this checkout and .venv at the same path, and the data and the out dir under the same names. Relative
# names in the settings are taken from the checkout, the one place that all hosts have; HOSTFILE from where you stand.
set -euo pipefail
hostfile="${1:-}"
[ -n "$hostfile" ] && [ -f "$hostfile" ] || { sed -n '2,10p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2; }
hostfile="$(realpath "$hostfile")"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
shift
. launchers/resume.sh
. launchers/install.sh
. launchers/timeouts.sh
checked="$(python -m moe_cl.planning.start multinode "$hostfile")"
read -r ranks _ _ node_rank address port <<<"$checked"
python -m moe_cl pretrain --check "$ranks" "$@"
launcher="${LAUNCHER:-pdsh}" launcher="${launcher,,}" more="${LAUNCHER_ARGS:-}"
options=(--hostfile "$hostfile" --master_addr "$address" --master_port "$port")
if [ -n "${NODE_RANK:-}" ]; then
  options+=(--no_ssh --node_rank "$node_rank")
else
  # A host whose link is gone must not hold the launcher for ever: ssh gives it up after 15 seconds.
  export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o ServerAliveInterval=5 -o ServerAliveCountMax=3"
  # mpirun tells the ranks no address of the first one, and would bind a rank with all its workers to one core.
  [ "$launcher" = openmpi ] && more="-x MASTER_ADDR=$address -x MASTER_PORT=$port --bind-to none $more"
  options+=(--launcher "$launcher" --launcher_args="$more")
  # DeepSpeed's launcher carries no variables of this shell to the other hosts but those of its environment file: ours
  # first, then the user's own, which win. The file has no name any more when the launcher reads it.
  variables="$(mktemp)"
  compgen -e | grep -E '^(PATH|DS_ACCELERATOR|OMP_NUM_THREADS|GLOO_SOCKET_IFNAME|NCCL_.*|TORCH_NCCL_.*|TORCH_FR_.*|MOE_CL_.*)$' |
    while read -r name; do printf '%s=%s\n' "$name" "${!name}"; done >"$variables"
  for file in "$HOME/${DS_ENV_FILE:-.deepspeed_env}" "${DS_ENV_FILE:-.deepspeed_env}"; do
    [ -f "$file" ] && grep -E '^[A-Za-z_][A-Za-z_0-9]*=' "$file" >>"$variables" || true
  done
  exec 8<"$variables"
  rm "$variables"
  export DS_ENV_FILE=/proc/self/fd/8
fi
exec deepspeed "${options[@]}" --module moe_cl pretrain "$@"
