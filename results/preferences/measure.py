"""Held-out accuracy of reward models and DPO policies: `python measure.py $OUT`, beside "the longer answer is better".

A DPO policy's reward is its implicit one, log pi(y|x) - log pi_ref(y|x). Intervals are 95% normal ones in which the rows of one
post or conversation count as one cluster. The last columns say what a model does beside length: how often it prefers the longer
answer, and its accuracy where people chose the longer and where they chose the shorter.
"""

import sys
from pathlib import Path

import torch

from nanorlhf.data import collate, load_records, make_examples
from nanorlhf.tokenizer import load_tokenizer
from nanorlhf.model import RewardModel, Transformer


def share(values, groups):
    """(mean, half width) of 0/1 values in clusters."""
    p, sums = sum(values) / len(values), {}
    for v, g in zip(values, groups):
        sums[g] = sums.get(g, 0.0) + v - p
    return p, 1.96 * sum(s ** 2 for s in sums.values()) ** 0.5 / len(values)


@torch.no_grad()
def margins(out, run, records, max_prompt_length, keep):
    """Reward of the chosen minus that of the rejected response, one a record."""
    tokenizer, found = load_tokenizer(out / run), []
    models = [RewardModel.from_pretrained(out / run)] if run.endswith("rm") else [
        Transformer.from_pretrained(out / run), Transformer.from_pretrained(out / "base")]
    for r in records:
        pair = make_examples(tokenizer, r["prompt"], [r["chosen"], r["rejected"]], 512, max_prompt_length, keep)
        batch = collate(pair, tokenizer.pad_id)
        rewards = [m.score(batch.tokens, batch.lengths) if run.endswith("rm") else m.logprobs(batch.tokens, batch.mask).sum(1)
                   for m in models]
        r = rewards[0] - rewards[1] if len(rewards) > 1 else rewards[0]
        found.append(float(r[0] - r[1]))
    return found


def main(out):
    print("| data | judge | accuracy | prefers the longer | right where the longer was chosen | right where the shorter was |\n"
          "|---|---|---:|---:|---:|---:|")
    for name, cut in (("hh", (256, "end")), ("tldr", (420, "tldr"))):
        records = load_records(f"{out}/{name}_heldout.jsonl", "preference")
        groups, longer = [r["group"] for r in records], [len(r["chosen"]) - len(r["rejected"]) for r in records]
        p, half = share([(d > 0) + 0.5 * (d == 0) for d in longer], groups)
        print(f"| {name}, {len(records)} pairs | the longer is better | {p:.1%} ± {half:.1%} | 100% | 100% | 0% |")
        for run in (f"{name}_rm", f"{name}_dpo"):
            m = margins(Path(out), run, records, *cut)
            p, half = share([float(x > 0) for x in m], groups)
            picks = [(x > 0) == (d > 0) for x, d in zip(m, longer) if d]
            right = [[x > 0 for x, d in zip(m, longer) if d * sign > 0] for sign in (1, -1)]
            print(f"| {name} | {run} | {p:.1%} ± {half:.1%} | {sum(picks) / len(picks):.1%} | "
                  + " | ".join(f"{sum(r) / len(r):.1%}" for r in right) + " |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
