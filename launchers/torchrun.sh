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
nproc="${NPROC:-1}" nodes="${NNODES:-1}"
python -m moe_cl pretrain --check $((nproc * nodes)) "$@"
exec torchrun --nnodes "$nodes" --node-rank "${NODE_RANK:-0}" --nproc-per-node "$nproc" \
  --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" -m moe_cl pretrain "$@"
