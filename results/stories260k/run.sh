#!/usr/bin/env bash
# The whole chain from a published checkpoint. From the repository root:
#   DATA=folder OUT=folder bash results/stories260k/run.sh [stage...]
set -euo pipefail
: "${DATA:?folder with the public files, see README.md}" "${OUT:?folder for the runs}"
here=$(dirname "$0") happy="$(dirname "$0")/happy.py:reward"
base="$DATA/checkpoints/stories260K"
rollouts="--response_length 80 --num_eval_prompts 120 --eval_reward $happy"

prepare() { python "$here/prepare.py" "$base" "$OUT"; }
sft() { python train_sft.py --init "$base" --data "$OUT/demos.jsonl" --out "$OUT/sft" --lr 1e-3 --epochs 2; }
comparisons() { python sample_bon.py --init "$OUT/sft" --reward "$happy" --data "$OUT/prompts.jsonl" --n 4 --label_temperature 0.1 \
    --response_length 80 --out "$OUT/comparisons"; }
rm_() { python train_rm.py --init "$OUT/sft" --data "$OUT/comparisons/comparisons.jsonl" --out "$OUT/rm" --lr 1e-3; }
ppo() { python train_ppo.py --init "$OUT/sft" --reward "$OUT/rm" --data "$OUT/prompts.jsonl" --out "$OUT/ppo" $rollouts \
    --eval_prompts "$OUT/heldout.jsonl" --lr 3e-4 --max_steps 60 --kl_coef 0.05; }
dpo() { python train_dpo.py --init "$OUT/sft" --data "$OUT/comparisons/comparisons.jsonl" --out "$OUT/dpo" $rollouts \
    --eval_prompts "$OUT/heldout.jsonl" --lr 2e-4 --beta 0.3 --max_steps 120; }
rrhf() { python train_rrhf.py --init "$OUT/sft" --reward "$OUT/rm" --data "$OUT/prompts.jsonl" --out "$OUT/rrhf" $rollouts \
    --eval_prompts "$OUT/heldout.jsonl" --lr 3e-4; }
bon() { python sample_bon.py --init "$OUT/sft" --reward "$OUT/rm" --eval_reward "$happy" --data "$OUT/heldout.jsonl" --n 16 \
    --response_length 80 --out "$OUT/bon"; }
table() { python -m nanorlhf.evaluate "$OUT/ppo" "$OUT/dpo" "$OUT/rrhf" --reference "$OUT/sft" --reward "$OUT/rm" --gold "$happy" \
    --data "test=$OUT/heldout.jsonl,far=$OUT/far.jsonl" --bon 16 --response_length 80 --out "$OUT/evaluation"; }

for stage in ${*:-prepare sft comparisons rm_ ppo dpo rrhf bon table}; do
    echo "== $stage"; SECONDS=0; "$stage"; echo "$stage $SECONDS s" | tee -a "$OUT/seconds.txt"
done
