#!/usr/bin/env bash
# Pretrain on this machine with N ranks through the DeepSpeed launcher; settings are checked before any rank starts.
# Started again with the same out dir it continues there (resume=false: it refuses to).
#
#   bash launchers/local.sh N --recipe NAME [--out DIR] [key=value ...]     # relative paths: from where you stand
#   MASTER_PORT=29501 bash launchers/local.sh ...     # a second run on the same machine
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
case "${1:-}" in '' | *[!0-9]*) sed -n '2,6p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2 ;; esac
ranks="$1"; shift
. "$root/launchers/resume.sh"
. "$root/launchers/install.sh"
checked="$(python -m moe_cl.planning.start local "$ranks")"
read -r ranks _ _ _ _ port <<<"$checked"
python -m moe_cl pretrain --check "$ranks" "$@"
exec deepspeed --quiet --num_accelerators "$ranks" --master_port "$port" --module moe_cl pretrain "$@"
