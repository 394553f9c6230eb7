#!/usr/bin/env bash
# Pretrain on this machine with N ranks through the DeepSpeed launcher; settings are checked before any rank starts.
#
#   bash launchers/local.sh N --recipe NAME [--out DIR] [--resume] [key=value ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in '' | *[!0-9]*) sed -n '2,4p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2 ;; esac
ranks="$1"; shift
. launchers/install.sh
python -m moe_cl pretrain --check "$ranks" "$@"
exec deepspeed --quiet --num_accelerators "$ranks" --module moe_cl pretrain "$@"
