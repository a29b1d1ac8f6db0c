"""How a policy ranks answers: `python measure.py FILE RUN [RUN...]`, FILE with prompt, responses, scores.

For each prompt: the share of pairs with different scores that p_i, the log-probability divided by the length, orders as the
scores do; L_rank and L_ft. Means over prompts with their 95% normal intervals, since pairs of a prompt are not independent.
One baseline: the longer answer is better.
"""

import itertools
import sys

import torch

from nanorlhf.data import collate, load_records, make_examples
from nanorlhf.tokenizer import load_tokenizer
from nanorlhf.metrics import mean_and_interval
from nanorlhf.model import Transformer
from train_rrhf import rrhf_loss


def agreement(values, scores):
    pairs = [(i, j) for i, j in itertools.permutations(range(len(scores)), 2) if scores[i] > scores[j]]
    return sum((values[i] > values[j]) + 0.5 * (values[i] == values[j]) for i, j in pairs) / len(pairs)


@torch.no_grad()
def main(file, *folders):
    records, table, first = load_records(file, "ranked"), [], None
    for folder in folders:
        tokenizer, model = load_tokenizer(folder), Transformer.from_pretrained(folder)
        rows = []
        for r in records:
            context = model.config.context
            examples = make_examples(tokenizer, r["prompt"], r["responses"], context, context // 2)
            batch = collate(examples, tokenizer.pad_id)
            logps, lengths = model.logprobs(batch.tokens, batch.mask).sum(1), batch.mask.sum(1)
            _, rank, ft = rrhf_loss(logps[None], lengths[None], torch.tensor([r["scores"]]))
            best = max(range(len(r["scores"])), key=r["scores"].__getitem__)
            rows.append([agreement((logps / lengths).tolist(), r["scores"]), agreement(lengths.tolist(), r["scores"]),
                         float(rank), float(ft) / int(lengths[best])])
        first = first or rows
        change = mean_and_interval([a[0] - b[0] for a, b in zip(rows, first)])      # of the same prompts: a narrower interval
        table.append([change] + [mean_and_interval(column) for column in zip(*rows)])
    print(f"{file.rsplit('/', 1)[-1]}: {len(records)} prompts\n\n"
          "| policy | pairs ordered as scored | change | L_rank | L_ft per token |\n|---|---:|---:|---:|---:|")
    for folder, (change, accuracy, _, rank, ft) in zip(folders, table):
        print(f"| {folder.rsplit('/', 1)[-1]} | {accuracy[0]:.1%} ± {accuracy[1]:.1%} | {change[0]:+.1%} ± {change[1]:.1%} | "
              f"{rank[0]:.2f} ± {rank[1]:.2f} | {ft[0]:.3f} ± {ft[1]:.3f} |")
    longer = table[0][2]
    print(f"| the longer is better | {longer[0]:.1%} ± {longer[1]:.1%} | - | - | - |\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
