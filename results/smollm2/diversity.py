"""SBERT diversity of the texts of `run.sh texts`: `python diversity.py $OUT MODEL`, MODEL a sentence-transformers folder or name.

16 samples of each of 50 prompts per run. Per input: 1 - mean cosine over the pairs of a prompt's samples, ± half of a 95%
interval over the prompts. Across: over the first samples of all prompts, of which there is one value.
"""

import sys
from pathlib import Path

from nanorlhf.files import read_jsonl
from nanorlhf.metrics import mean_and_interval, sbert_diversity, sbert_encoder

RUNS = {"SFT": "texts_sft", "PPO": "texts_ppo", "DPO, beta 0.1": "texts_dpo_0.1", "RRHF": "texts_rrhf"}


def main(out, model):
    encode = sbert_encoder(model)
    print("| method | SBERT per input | SBERT across |\n|---|---:|---:|")
    for name, run in RUNS.items():
        texts = [row["responses"] for row in read_jsonl(Path(out) / run / "ranked.jsonl")]
        mean, half = mean_and_interval([sbert_diversity(t, encode) for t in texts])
        print(f"| {name} | {mean:.3f} ± {half:.3f} | {sbert_diversity([t[0] for t in texts], encode):.3f} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
