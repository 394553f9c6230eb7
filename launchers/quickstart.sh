#!/usr/bin/env bash
# From nothing to a pretrained sparse encoder on a laptop CPU: installs, gets Fashion-MNIST, shards it, pretrains CR-MoE
# with two expert-parallel ranks through the DeepSpeed launcher, evaluates, writes a report. A second start skips what is done.
#
#   bash launchers/quickstart.sh [--out DIR] [--epochs N] [--data fashion-mnist|digits] [--data-from DIR] [key=value ...]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# Given paths are taken from where you stand; what is not given lies in the checkout.
[ "$PWD" = "$root" ] && home="" || home="$root/"
usage() { sed -n '2,5p' "$0" | sed 's/^# \{0,1\}//'; }

out="" data=fashion-mnist from=() pass=()
need() { [ $# -ge 2 ] && [ -n "$2" ] || { echo "quickstart: $1 needs a value" >&2; exit 2; }; }
while [ $# -gt 0 ]; do
  case "$1" in
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
    out=*) out="${1#out=}"; shift; continue ;;
  esac
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --out) need "$@"; out="$2"; shift 2 ;;
    --data) need "$@"; data="$2"; shift 2 ;;
    --data-from) need "$@"; from=(--from "$2"); shift 2 ;;
    --epochs) need "$@"; pass+=("schedule.epochs=$2"); shift 2 ;;
    *=*) pass+=("$1"); shift ;;
    *) echo "quickstart: unknown option $1 (see --help)" >&2; exit 2 ;;
  esac
done
case "$data" in
  fashion-mnist) recipe=crmoe_vit_micro_fmnist ;;
  digits) recipe=crmoe_vit_micro_digits ;;
  *) echo "quickstart: --data is fashion-mnist or digits, not '$data'" >&2; exit 2 ;;
esac
if [ -z "$out" ]; then
  out="${home}runs/quickstart"
  [ "$data" = fashion-mnist ] || out="${home}runs/quickstart-$data"
fi

. "$root/launchers/install.sh"
export DS_ACCELERATOR=cpu
say() { printf '\n== %s\n' "$*"; }

python -m moe_cl recipes "$recipe" ${pass[@]+"${pass[@]}"} >/dev/null # settings that cannot be are said before any work

say "Data: $data"
shards="${home}data/$data" raw="${home}data/raw/$data"
python -m data_prep fetch "$data" --out "$raw" ${from[@]+"${from[@]}"}
for split in train test; do
  python -m data_prep shard "$data:$raw" --split "$split" --out "$shards"
done

run=(--recipe "$recipe" --out "$out" "data.train=$shards/train" "eval.bank=$shards/train" "eval.test=$shards/test" ${pass[@]+"${pass[@]}"})
python -m moe_cl pretrain --check 2 --resume "${run[@]}"

say "Pretraining: CR-MoE, 2 ranks, experts spread over both"
deepspeed --quiet --num_accelerators 2 --module moe_cl pretrain --resume "${run[@]}"

# Each of these is made again only if what it is made from is newer.
say "Evaluation"
if [ "$out/summary.json" -nt "$out/checkpoints/latest" ]; then
  echo "$out/summary.json is there already"
else
  python -m moe_cl eval summary --checkpoint "$out" --which teacher
fi

say "Report"
if [ "$out/report.html" -nt "$out/summary.json" ]; then
  echo "$out/report.html is there already"
else
  python -m moe_cl report "$out"
fi

say "Done in $SECONDS s, $MOE_CL_INSTALL_SECONDS s of them installation. Everything is in $out"
cat <<EOF
  figures of this run      $out/summary.json
  report (open offline)    $out/report.html
  every step               $out/journal.jsonl
  checkpoints              $out/checkpoints/
  MLflow                   ${home}.venv/bin/mlflow ui --backend-store-uri sqlite:///$out/mlflow.db
EOF
