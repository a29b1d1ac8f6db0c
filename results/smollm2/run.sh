#!/usr/bin/env bash
# SmolLM2-135M-Instruct through every method. From the repository root, after  python results/smollm2/prepare.py GGUF $DATA $OUT:
#     DATA=folder OUT=folder bash results/smollm2/run.sh [stage...]
# QUICK=1 does two steps of each stage; DTYPE=float32 for a CPU.
set -euo pipefail
: "${DATA:?folder with the public files, see README.md}" "${OUT:?folder of prepare.py, for the runs too}"
export DATA OUT
here=$(dirname "$0") model="$OUT/smollm2" judge="$OUT/judge_rm" reward="$OUT/sentiment_rm" forms="$(dirname "$0")/forms.py:reward"
common="--dtype ${DTYPE:-bfloat16} --seed 0" steps=${QUICK:+--max_steps 2 --limit 40 --batch_size 8} some=${QUICK:+--limit 8 --keep_unfinished} part=${QUICK:+--eval_fraction 0.4}
prompts=${QUICK:+8} held_out="--eval_prompts $OUT/heldout.jsonl --eval_reward $judge --response_length 48 --num_eval_prompts ${QUICK:-128}"

# ---- Reward models on people's comparisons, and on sentiment
rm() { python train_rm.py --init "$model" --eval_fraction 0 --epochs 1 --warmup_steps 5 --eval_every 1000 $common "$@" $steps; }
hh_rm() { rm --data "$OUT/hh_train.jsonl" --eval_data "$OUT/hh_heldout.jsonl" --lr 2e-5 --batch_size 16 --micro_batch_size 4 --out "$OUT/hh_rm"; }
tldr_rm() { rm --data "$OUT/tldr_train.jsonl" --eval_data "$OUT/tldr_heldout.jsonl" --lr 2e-5 --batch_size 16 --micro_batch_size 4 --out "$OUT/tldr_rm"; }
sentiment_rm() { rm --data "$OUT/sentiment_train.jsonl" --eval_data "$OUT/sentiment_pieces.jsonl" --lr 3e-5 --batch_size 64 --out "$reward"; }
judge_rm() { rm --data "$OUT/sentiment_rotten_tomatoes.jsonl" --eval_data "$OUT/sentiment_pieces.jsonl" --lr 3e-5 --batch_size 64 --out "$judge"; }
accuracy() { python "$here/measure.py" "$OUT" | tee "$OUT/accuracy.md"; }

# ---- Controlled sentiment: continue the first words of a review
sft() { python train_sft.py --init "$model" --data "$OUT/sft.jsonl" --limit 9000 --lr 5e-5 --batch_size 64 --warmup_steps 5 --eval_fraction 0.02 \
    --out "$OUT/sft" $common $steps $part; }
comparisons() { python sample_bon.py --init "$OUT/sft" --reward "$reward" --data "$OUT/prompts.jsonl" --limit 1600 --n 4 --label_temperature 1 \
    --response_length 48 --batch_size 64 --out "$OUT/comparisons" $common $some; }
ppo() { python train_ppo.py --init "$OUT/sft" --reward "$reward" --data "$OUT/prompts.jsonl" $held_out --eval_every 10 --batch_size 64 --max_steps 60 \
    --lr 1e-5 --value_lr 3e-5 --kl_coef 0.1 --out "$OUT/ppo" $common $steps; }
dpo() { for beta in ${BETAS:-0.05 0.1 0.5}; do
    python train_dpo.py --init "$OUT/sft" --data "$OUT/comparisons/comparisons.jsonl" --eval_fraction 0.05 $held_out --eval_every 20 --batch_size 32 \
        --lr 1e-5 --warmup_steps 5 --beta $beta --out "$OUT/dpo_$beta" $common $steps $part; done; }
rrhf() { python train_rrhf.py --init "$OUT/sft" --reward "$reward" --data "$OUT/prompts.jsonl" --limit 1600 $held_out --eval_every 20 --batch_size 32 \
    --micro_batch_size 16 --lr 1e-5 --num_samples 4 --out "$OUT/rrhf" $common $steps; }
bon() { python sample_bon.py --init "$OUT/sft" --reward "$reward" --eval_reward "$judge" --data "$OUT/heldout.jsonl" --limit 128 --n 64 \
    --response_length 48 --batch_size 8 --keep_unfinished --out "$OUT/bon" $common $some; }
table() { python -m nanorlhf.evaluate "$OUT/ppo" "$OUT"/dpo_* "$OUT/rrhf" --reference "$OUT/sft" --reward "$reward" --gold "$judge" \
    --data "heldout=$OUT/heldout.jsonl" --bon 16 --num_prompts ${prompts:-250} --diversity_prompts ${prompts:-50} --out "$OUT/evaluation"; }
texts() { for run in ${RUNS:-sft ppo dpo_0.1 rrhf}; do                 # for SBERT and for reading
    python sample_bon.py --init "$OUT/$run" --reward "$reward" --eval_reward "$judge" --data "$OUT/heldout.jsonl" --limit ${prompts:-50} --n 16 \
        --response_length 48 --keep_unfinished --out "$OUT/texts_$run" $common; done; }

# ---- A chat that does what the prompt asks for
asked() { python sample_bon.py --init "$1" --reward "$forms" --response_length 96 --batch_size 50 --keep_unfinished $common "${@:2}"; }
chat_ppo() { python train_ppo.py --init "$model" --reward "$forms" --data "$OUT/chat_train.jsonl" --eval_prompts "$OUT/chat_heldout.jsonl" \
    --eval_reward "$forms" --response_length 96 --eval_every 15 --batch_size 64 --max_steps 60 --lr 1e-5 --value_lr 3e-5 --kl_coef 0.05 \
    --out "$OUT/chat_ppo" $common $steps; }
chat_bon() { asked "$model" --data "$OUT/chat_train.jsonl" --n 16 --out "$OUT/chat_bon" $some
    python train_sft.py --init "$model" --data "$OUT/chat_bon/best.jsonl" --eval_fraction 0.05 --lr 2e-5 --batch_size 16 --epochs 2 \
        --out "$OUT/chat_bon_sft" $common $steps $part; }
chat_texts() { for run in smollm2 chat_ppo chat_bon_sft; do
    asked "$OUT/$run" --data "$OUT/chat_heldout.jsonl" --n 2 --out "$OUT/texts_$run" $some; done; }

for stage in ${*:-hh_rm tldr_rm sentiment_rm judge_rm accuracy sft comparisons ppo dpo rrhf bon table texts chat_ppo chat_bon chat_texts}; do
    echo "== $stage"; SECONDS=0; "$stage"; echo "$stage $SECONDS s" | tee -a "$OUT/seconds.txt"
done
