#!/usr/bin/env bash
# Film reviews with a sentiment reward. From the repository root:  DATA=folder OUT=folder bash results/imdb/run.sh [stage...]
set -euo pipefail
: "${DATA:?folder with the public files, see README.md}" "${OUT:?folder for the runs}"
export DATA OUT OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
here=$(dirname "$0") reward="$(dirname "$0")/sentiment.py:reward" judge="$(dirname "$0")/sentiment.py:judge"
common="--dtype bfloat16 --micro_batch_size 8 --seed 0"
held_out="--eval_reward $judge --response_length 48 --num_eval_prompts 64"

prepare() { python "$here/prepare.py" "$DATA" "$OUT" && python "$here/sentiment.py"; }
base() { python train_sft.py --init scratch --kind text --data "$OUT/text.jsonl" --out "$OUT/base" $common \
    --tokenizer "$DATA/tokenizers/tiktoken_small.model" --family gpt2 --width 192 --layers 4 --heads 4 --context 256 \
    --batch_size 16 --lr 2e-3 --warmup_steps 50 --eval_fraction 0.01 --eval_every 100 --save_every 200; }
sft() { python train_sft.py --init "$OUT/base" --data "$OUT/sft.jsonl" --limit 9000 --out "$OUT/sft" $common --lr 5e-4 --batch_size 64 --eval_fraction 0.02; }
comparisons() { python sample_bon.py --init "$OUT/sft" --reward "$reward" --data "$OUT/prompts.jsonl" --limit 1200 --n 4 \
    --label_temperature 0.2 --out "$OUT/comparisons" --dtype bfloat16 --seed 0; }
ppo() { python train_ppo.py --init "$OUT/sft" --reward "$reward" --data "$OUT/prompts.jsonl" --out "$OUT/ppo" --seed 0 \
    $held_out --eval_prompts $OUT/heldout.jsonl --batch_size 64 --max_steps 50 --kl_coef 0.05; }
dpo() { python train_dpo.py --init "$OUT/sft" --data "$OUT/comparisons/comparisons.jsonl" --out "$OUT/dpo" --seed 0 \
    --dtype bfloat16 --micro_batch_size 16 $held_out --eval_prompts $OUT/heldout.jsonl --max_steps 80 --beta 0.1 --lr 2e-4; }
rrhf() { python train_rrhf.py --init "$OUT/sft" --reward "$reward" --data "$OUT/prompts.jsonl" --limit 3200 --out "$OUT/rrhf" --seed 0 \
    --dtype bfloat16 --micro_batch_size 4 $held_out --eval_prompts $OUT/heldout.jsonl --num_samples 4; }
bon() { python sample_bon.py --init "$OUT/sft" --reward "$reward" --eval_reward "$judge" --data "$OUT/heldout.jsonl" --limit 200 --n 16 \
    --out "$OUT/bon" --seed 0; }
table() { python -m nanorlhf.evaluate "$OUT/ppo" "$OUT/dpo" "$OUT/rrhf" --reference "$OUT/sft" --reward "$reward" --gold "$judge" \
    --data "heldout=$OUT/heldout.jsonl" --bon 16 --num_prompts 250 --diversity_prompts 20 --out "$OUT/evaluation"
    python "$here/plot.py" "$OUT" "$OUT/frontier.png"; }

for stage in ${*:-prepare base sft comparisons ppo dpo rrhf bon table}; do
    echo "== $stage"; SECONDS=0; "$stage"; echo "$stage $SECONDS s" | tee -a "$OUT/seconds.txt"
done
