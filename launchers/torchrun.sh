#!/usr/bin/env bash
# Pretrain through torchrun, on one machine or (with the same command on each) on several. Started again with the same
# out dir it continues there (resume=false: it refuses to).
#
#   NPROC=8 bash launchers/torchrun.sh --recipe NAME [--out DIR] [key=value ...]
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=HOST NPROC=8 bash launchers/torchrun.sh ...
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[ $# -gt 0 ] || { sed -n '2,6p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2; }
. "$root/launchers/resume.sh"
. "$root/launchers/install.sh"
. "$root/launchers/timeouts.sh"
checked="$(python -m moe_cl.planning.start torchrun)"
read -r ranks nodes here node_rank address port <<<"$checked"
python -m moe_cl pretrain --check "$ranks" "$@"
# torchrun would give each of several ranks one thread: on a CPU they share the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((here < $(nproc) ? $(nproc) / here : 1))}"
exec torchrun --nnodes "$nodes" --node-rank "$node_rank" --nproc-per-node "$here" \
  --master-addr "$address" --master-port "$port" -m moe_cl pretrain "$@"
