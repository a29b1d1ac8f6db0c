"""Held-out and out-of-distribution accuracy of the reward models: `python measure.py $OUT`, beside "the longer is better".

The table's columns and intervals are those of results/preferences/measure.py.
"""

import sys
from pathlib import Path

import torch
from prepare import RESULTS, module

from nanorlhf.data import collate, load_records, make_examples
from nanorlhf.model import RewardModel, pick_device
from nanorlhf.tokenizer import load_tokenizer

TESTS = {"hh_rm": ("hh_heldout", "tldr_heldout", "cnndm"), "tldr_rm": ("tldr_heldout", "cnndm", "hh_heldout"),
         "sentiment_rm": ("sentiment_pieces", "sentiment_imdb", "sentiment_sst2", "sentiment_rotten_tomatoes"),
         "judge_rm": ("sentiment_pieces", "sentiment_imdb")}


@torch.no_grad()
def scores(model, tokenizer, records, device, size=16):
    """Returns the rewards of the chosen and the rejected responses, [N, 2]; `size` pairs of about one length at once."""
    pairs = [make_examples(tokenizer, r["prompt"], [r["chosen"], r["rejected"]], 2048) for r in records]
    order, found = sorted(range(len(pairs)), key=lambda i: max(len(e.tokens) for e in pairs[i])), torch.zeros(len(pairs), 2)
    for i in range(0, len(order), size):
        chunk = order[i:i + size]
        batch = collate([example for j in chunk for example in pairs[j]], tokenizer.pad_id, device)
        found[chunk] = model.score(batch.tokens, batch.lengths).view(-1, 2).cpu()
    return found


def main(out):
    out, device, share = Path(out), pick_device("auto"), module(RESULTS / "preferences" / "measure.py").share
    print("| reward model | data | accuracy | the longer is better | prefers the longer | right where the longer was chosen | "
          "right where the shorter was |\n|---|---|---:|---:|---:|---:|---:|")
    for run, tests in TESTS.items():
        model, tokenizer = RewardModel.from_pretrained(out / run).to(device), load_tokenizer(out / run)
        for name in tests:
            records = load_records(out / f"{name}.jsonl", "preference")
            chosen, rejected = scores(model, tokenizer, records, device).unbind(1)
            longer = [len(r["chosen"]) - len(r["rejected"]) for r in records]
            groups = [r.get("group", i) for i, r in enumerate(records)]
            p, half = share([float(a > b) for a, b in zip(chosen, rejected)], groups)
            ruler, ruler_half = share([(d > 0) + 0.5 * (d == 0) for d in longer], groups)
            picks = [(a > b) == (d > 0) for a, b, d in zip(chosen, rejected, longer) if d]
            right = [[a > b for a, b, d in zip(chosen, rejected, longer) if d * sign > 0] for sign in (1, -1)]
            print(f"| {run} | {name}, {len(records)} pairs | {p:.1%} ± {half:.1%} | {ruler:.1%} ± {ruler_half:.1%} | "
                  f"{sum(picks) / len(picks):.1%} | " + " | ".join(f"{sum(r) / len(r):.1%}" for r in right) + " |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
