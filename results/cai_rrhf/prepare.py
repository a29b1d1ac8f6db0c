"""Ranked answers -> two sides of a split by prompt: `python prepare.py $DATA $OUT`. The files are sorted by score: shuffled here.

train.jsonl, heldout.jsonl    prompt, responses (17), scores
"""

import json
import random
import sys
from pathlib import Path

from nanorlhf.data import load_records, split_records

HELD_OUT = 0.2


def main(data, out):
    records = [r for name in ("PALMS", "INSTRUCTGPT")
               for r in load_records(f"{data}/ranked/cai_samples_{name}_HHRLHF.jsonl", "ranked")]
    rng = random.Random(0)
    for r in records:
        order = rng.sample(range(len(r["scores"])), len(r["scores"]))
        r["responses"], r["scores"] = [r["responses"][i] for i in order], [r["scores"][i] for i in order]
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, side in zip(("train", "heldout"), split_records(records, HELD_OUT, seed=0)):
        Path(out, f"{name}.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in side), encoding="utf-8")
        print(name, len(side), "prompts")


if __name__ == "__main__":
    main(*sys.argv[1:])
