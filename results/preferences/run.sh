#!/usr/bin/env bash
# Reward model and DPO on people's comparisons. From the repository root:  DATA=folder OUT=folder bash results/preferences/run.sh [stage...]
set -euo pipefail
: "${DATA:?folder with the public files, see README.md}" "${OUT:?folder for the runs}"
export DATA OUT OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
here=$(dirname "$0")
common="--dtype bfloat16 --micro_batch_size 4 --seed 0"

prepare() { python "$here/prepare.py" "$DATA" "$OUT"; }
base() { python train_sft.py --init scratch --kind text --data "$OUT/text.jsonl" --out "$OUT/base" $common \
    --tokenizer "$DATA/tokenizers/tiktoken_small.model" --family gpt2 --width 192 --layers 4 --heads 4 --context 512 \
    --batch_size 8 --lr 2e-3 --warmup_steps 50 --epochs 1.5 --eval_fraction 0.02 --eval_every 100 --save_every 200; }
both="--epochs 1 --lr 2e-4 --batch_size 16"
hh_rm() { python train_rm.py --init "$OUT/base" --data "$OUT/hh_train.jsonl" --limit 900 --eval_fraction 0 --eval_data "$OUT/hh_heldout.jsonl" \
    --out "$OUT/hh_rm" $common $both --eval_every 1000; }
hh_dpo() { python train_dpo.py --init "$OUT/base" --data "$OUT/hh_train.jsonl" --limit 900 --eval_data "$OUT/hh_heldout.jsonl" \
    --out "$OUT/hh_dpo" $common $both --beta 0.1 --eval_every 1000; }
tldr_rm() { python train_rm.py --init "$OUT/base" --data "$OUT/tldr_train.jsonl" --limit 600 --eval_fraction 0 --eval_data "$OUT/tldr_heldout.jsonl" \
    --out "$OUT/tldr_rm" $common $both --keep tldr --max_prompt_length 420 --eval_every 1000; }
tldr_dpo() { python train_dpo.py --init "$OUT/base" --data "$OUT/tldr_train.jsonl" --limit 600 --eval_data "$OUT/tldr_heldout.jsonl" \
    --out "$OUT/tldr_dpo" $common $both --beta 0.1 --keep tldr --max_prompt_length 420 --eval_every 1000; }
table() { python "$here/measure.py" "$OUT" | tee "$OUT/table.md"; }

for stage in ${*:-prepare base hh_rm tldr_rm tldr_dpo hh_dpo table}; do
    echo "== $stage"; SECONDS=0; "$stage"; echo "$stage $SECONDS s" | tee -a "$OUT/seconds.txt"
done
