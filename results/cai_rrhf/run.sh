#!/usr/bin/env bash
# RRHF on ranked answers, from the base model of results/preferences (run its stages prepare and base first).
# From the repository root:  DATA=folder BASE=its_OUT/base OUT=folder bash results/cai_rrhf/run.sh [stage...]
set -euo pipefail
: "${DATA:?folder with the public files, see README.md}" "${OUT:?folder for the runs}" "${BASE:?checkpoint folder to start from}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
here=$(dirname "$0")
common="--init $BASE --data $OUT/train.jsonl --kind ranked --reward given --sampling none --dtype bfloat16 --micro_batch_size 1 --seed 0"

prepare() { python "$here/prepare.py" "$DATA" "$OUT"; }
rrhf() { python train_rrhf.py $common --out "$OUT/rrhf" --batch_size 4 --epochs 4 --lr 2e-4; }
measure() { for side in train heldout; do python "$here/measure.py" "$OUT/$side.jsonl" "$BASE" "$OUT/rrhf"; done | tee "$OUT/table.md"; }

for stage in ${*:-prepare rrhf measure}; do
    echo "== $stage"; SECONDS=0; "$stage"; echo "$stage $SECONDS s" | tee -a "$OUT/seconds.txt"
done
