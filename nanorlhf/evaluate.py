"""Evaluation of policies: the sampler that the training loops call, and a table over checkpoint folders.

    python -m nanorlhf.evaluate RUN [RUN...] [options]      the table; --help lists the options
"""

import dataclasses
import functools
import itertools
import sys
import time
from pathlib import Path

import numpy as np
import torch

from nanorlhf import reviews
from nanorlhf.data import (Example, collate, decode_response, encode_prompt, encode_response, load_records,
                           micro_batches)
from nanorlhf.errors import UserError
from nanorlhf.files import local_folder, require_folder, write_json, write_records, write_text
from nanorlhf.generate import encode_prompts, generate, prompt_room, repeated
from nanorlhf.metrics import (across_input_diversity, bon_kl, expectation_adjusted_distinct, mean_and_interval,
                              mnli_relation, nli_diversity, sbert_diversity, sequence_kl, win_rate)
from nanorlhf.model import Transformer, check_fit, pick_device
from nanorlhf.options import check_options, named_files, parse_options
from nanorlhf.rewards import load_reward
from nanorlhf.tokenizer import check_same_ids, load_tokenizer
from nanorlhf.training import seed_for

# ---- Samples of a policy while it trains ----------------------------------------------------------------------------


def eval_sampler(config, records, tokenizer, policy, reference, rewards, run):
    """Returns the function (step) -> metrics `eval/...` that a training loop calls: it samples one response to each evaluation
    prompt, measures them, and appends a few texts to samples.jsonl.

    --eval_prompts names the prompts, and --eval_reward a reward that is only measured, beside `rewards`, {name: reward}.
    Without --eval_prompts, training on the built-in task's prompts is evaluated on its test prompts under the gold reward;
    training on other data is not evaluated, and the function returns {}.
    """
    on_reviews = all(reviews.domain_of(r["prompt"]) for r in records[:10])
    if not (config.eval_prompts or on_reviews) or config.num_eval_prompts == 0:
        return lambda step: {}
    asked = load_records(config.eval_prompts or "reviews", "prompt", "test", config.num_eval_prompts, tokenizer=tokenizer)
    prompts = encode_prompts(tokenizer, asked, policy, config)
    if config.eval_reward or on_reviews:
        name = "gold" if config.eval_reward in ("", "gold") else "eval_reward"
        rewards = rewards | {name: load_reward(config.eval_reward or "gold", tokenizer, run.device)}
    for reward in rewards.values():
        reward.check_columns(asked, config.eval_prompts or "reviews")

    def sample(step):
        metrics, texts = measure(policy, reference, tokenizer, prompts, rewards, config.response_length,
                                 config.temperature, config.seed, run.autocast(), asked)
        run.log_samples(step, texts[:8])
        return metrics
    return sample


@torch.no_grad()
def measure(policy, reference, tokenizer, prompts, rewards, max_new_tokens, temperature=1.0, seed=0, autocast=None,
            records=None):
    """Samples one response per prompt. Returns means of each reward, sequence KL to the reference, length and the share that
    ended with EOS, as {"eval/...": number}; and the texts as records.

    prompts: lists of ids; records: the records they belong to; rewards: {name: reward of load_reward}.
    """
    device = policy.embed.weight.device
    with autocast or torch.autocast(device.type, enabled=False):
        samples = generate(policy, prompts, max_new_tokens, temperature, seed=seed_for(seed, "evaluate"), tokenizer=tokenizer)
        responses = samples.responses()
        kl = sampled_kl(policy, reference, tokenizer, prompts, responses, temperature)
    scores = {name: reward(prompts, responses, records) for name, reward in rewards.items()}
    metrics = {f"eval/{name}": float(s.mean()) for name, s in scores.items()}
    metrics |= {"eval/kl": float(np.mean(kl)), "eval/length": float(np.mean([len(r) for r in responses])),
                "eval/ended": float(samples.finished.float().mean())}
    texts = [dict(prompt=tokenizer.decode(p), completion=tokenizer.decode(r, start=False),
                  **{n: float(s[i]) for n, s in scores.items()}) for i, (p, r) in enumerate(zip(prompts, responses))]
    return metrics, texts


def sampled_kl(policy, reference, tokenizer, prompts, responses, temperature, batch_size=64):
    """sequence_kl of these responses of the policy: a list of numbers, not in the prompts' order."""
    kl, examples = [], [Example(p + r, len(p)) for p, r in zip(prompts, responses)]
    for part in micro_batches(examples, batch_size):
        batch = collate(part, tokenizer.pad_id, policy.embed.weight.device)
        kl += sequence_kl(policy, reference, batch.tokens, batch.mask, temperature or 1.0).tolist()    # greedy: at 1
    return kl


# ---- A table over finished checkpoints ------------------------------------------------------------------------------


@dataclasses.dataclass
class Options:
    reference: str = "out/sft"       # policy that KL and win rate compare with, and that best-of-N samples
    reward: str = "out/rm"           # learned reward, which chooses in best-of-N: folder, gold or file.py:function
    gold: str = ""                   # true reward, or the nearest thing, which judges; '' = gold on reviews, else --reward
    data: str = "reviews"            # `reviews` (ID, OOD-near and OOD-far), or record files NAME=FILE,NAME=FILE
    bon: int = 0                     # add a row for best-of-N of the reference with this N; 0 = none
    skip_bad: bool = False           # skip bad rows and count them, instead of stopping at the first
    num_prompts: int = 250           # prompts per split, one sample each
    diversity_prompts: int = 50      # prompts of the first split for per-input diversity (Kirk 2023: 500)
    num_samples: int = 16            # samples for each of them (Kirk 2023: 16)
    sbert: bool = False              # SBERT diversity too (extra `eval`, downloads a model)
    nli: bool = False                # NLI diversity by roberta-large-mnli (extra `eval`), also on reviews
    response_length: int = 48        # longest sampled response in tokens
    temperature: float = 1.0         # of all samples
    seed: int = 0                    # of the samples
    device: str = "auto"             # cpu, cuda, cuda:1, ...; auto = a GPU if there is one
    out: str = "out/evaluation"      # folder for table.md, table.json and samples.jsonl

    ranges = {"num_samples": "[2, 1e9]"}  # diversity compares pairs


class Evaluation:
    """What all policies of a table share: prompts by split, the reference, the rewards, the scores of the data's own answers."""

    def __init__(self, options):
        self.options, device = options, pick_device(options.device)
        self.tokenizer = tokenizer = load_tokenizer(local_folder(options.reference))
        self.reference = Transformer.from_pretrained(options.reference).to(device)
        check_fit(self.reference, tokenizer)
        self.on_reviews = options.data == "reviews"
        gold = options.gold or ("gold" if self.on_reviews else "")
        self.rewards = {"reward": load_reward(options.reward, tokenizer, device)}
        self.rewards |= {"gold": load_reward(gold, tokenizer, device)} if gold else {}
        self.judge = "gold" if gold else "reward"                       # decides which of two texts wins
        if self.on_reviews:
            sources = {split: ("reviews", split) for split in ("test", "ood_near", "ood_far")}
        else:
            sources = {name: (file, "") for name, file in named_files(options.data).items()}
        self.records = {name: load_records(file, "prompt", split, options.num_prompts, options.skip_bad, tokenizer=tokenizer)
                        for name, (file, split) in sources.items()}
        for name, records in self.records.items():
            for reward in self.rewards.values():
                reward.check_columns(records, sources[name][0])
        room = prompt_room(self.reference, options.response_length)
        self.prompts = {name: [encode_prompt(tokenizer, r["prompt"], room) for r in records]
                        for name, records in self.records.items()}
        self.first = next(iter(sources))                                # the split in distribution
        asked, self.written_scores = self.records[self.first], None
        if all(r.get("completion") for r in asked):
            written = [encode_response(tokenizer, r["completion"], r["prompt"]) for r in asked]
            self.written_scores = self.rewards[self.judge](self.prompts[self.first], written, asked)

    def draw(self, model, split, K, n, purpose, limit=None):
        """Draws K responses to each of a split's prompts, [P][K] lists of ids. With n > 1 each is the best of n samples of its
        own under the learned reward."""
        o, prompts, records = self.options, self.prompts[split][:limit], self.records[split][:limit]
        responses = generate(model, prompts, o.response_length, o.temperature, num_samples=K * n, tokenizer=self.tokenizer,
                             seed=seed_for(o.seed, purpose)).responses()
        if n > 1:
            scores = self.rewards["reward"](repeated(prompts, K * n), responses, repeated(records, K * n)).view(-1, n)
            responses = [responses[i * n + int(best)] for i, best in enumerate(scores.argmax(1))]
        return [responses[i:i + K] for i in range(0, len(responses), K)]


def table_row(evaluation, name, model, n=1):
    """Returns (row, texts) of one policy, or of best-of-n of it. row: {"method": name, column: (value, half width of its 95%
    interval over prompts, or None)}; its "scores" are the first split's rewards by the judge, one per prompt."""
    e, row, texts = evaluation, {"method": name}, []
    for split, prompts in e.prompts.items():
        records = e.records[split]
        responses = [drawn[0] for drawn in e.draw(model, split, 1, n, split)]
        scores = {k: reward(prompts, responses, records) for k, reward in e.rewards.items()}
        row |= {f"{k}/{split}": mean_and_interval(s) for k, s in scores.items()}
        if split == e.first:
            row |= first_split_columns(e, model, n, responses, scores[e.judge])
        else:
            here, there = row[f"{e.judge}/{e.first}"][0], row[f"{e.judge}/{split}"][0]
            row[f"gap/{split}"] = (here - there, None)                  # OOD gap: ID - OOD
        texts += [dict(method=name, split=split, prompt=r["prompt"], completion=decode_response(e.tokenizer, y, r["prompt"]),
                       **{k: float(s[i]) for k, s in scores.items()}) for i, (r, y) in enumerate(zip(records, responses))]
    outputs = e.draw(model, e.first, e.options.num_samples, n, "diversity", e.options.diversity_prompts)
    outputs = [[e.tokenizer.decode(y, start=False) for y in drawn] for drawn in outputs]
    metrics = {"ead": expectation_adjusted_distinct}
    if e.options.nli or e.on_reviews:
        relation = mnli_relation() if e.options.nli else reviews.relation
        metrics["nli"] = functools.partial(nli_diversity, relation=relation)
    if e.options.sbert:
        metrics["sbert"] = sbert_diversity
    return row | {f"{k}_per_input": mean_and_interval(list(map(metric, outputs))) for k, metric in metrics.items()}, texts


def first_split_columns(evaluation, model, n, responses, scores):
    """Columns of a row that are measured on the first split only."""
    e, columns = evaluation, {"scores": scores}
    if n > 1:
        columns["kl"] = bon_kl(n), None
    else:
        columns["kl"] = mean_and_interval(sampled_kl(model, e.reference, e.tokenizer, e.prompts[e.first], responses,
                                                     e.options.temperature))
    if e.written_scores is not None:
        columns["win_reference"] = win_rate(scores, e.written_scores)
    outputs = [[e.tokenizer.decode(y, start=False)] for y in responses]
    columns["ead_across"] = across_input_diversity(outputs, expectation_adjusted_distinct), None
    columns["length"] = mean_and_interval([len(y) for y in responses])
    columns["ended"] = mean_and_interval([y[-1] == e.tokenizer.eos_id for y in responses])
    return columns


def evaluate_policies(folders, options):
    """Evaluates checkpoint folders {name: folder}, the reference first, as "SFT", and best-of-N of it last, if asked for.
    Returns (rows of markdown_table, all sampled texts as records)."""
    check_options(options)
    for folder in [options.reference, *folders.values()]:
        require_folder(folder, "the script that makes it")
    evaluation = Evaluation(options)
    for folder in folders.values():
        check_same_ids("the policy", folder, evaluation.tokenizer)
    todo = [("SFT", options.reference, 1)] + [(name, f, 1) for name, f in folders.items() if Path(f) != Path(options.reference)]
    if options.bon:
        todo.append((f"best-of-{options.bon}", options.reference, options.bon))
    rows, samples = [], []
    for name, folder, n in todo:
        start = time.monotonic()
        model = evaluation.reference
        if folder != options.reference:
            model = Transformer.from_pretrained(folder).to(evaluation.reference.embed.weight.device)
            check_fit(model, evaluation.tokenizer)
        row, texts = table_row(evaluation, name, model, n)
        row["win_sft"] = win_rate(row["scores"], rows[0]["scores"]) if rows else (0.5, None)
        rows.append(row)
        samples += texts
        print(f"evaluated {name} in {time.monotonic() - start:.0f} s: "
              f"{evaluation.judge} {row[f'{evaluation.judge}/{evaluation.first}'][0]:.3f}, "
              f"KL {row['kl'][0]:.2f}", flush=True)
    for row in rows:
        del row["scores"]
    return rows, samples


def markdown_table(rows, columns):
    """A Markdown table of rows {column: (value, half width or None)}; columns: {column: (heading, format)}."""
    def cell(value, spec):
        if value is None:
            return "-"
        return format(value[0], spec) + (f" ± {value[1]:{spec}}" if value[1] else "")
    lines = ["| method | " + " | ".join(h for h, _ in columns.values()) + " |", "|---" + "|---:" * len(columns) + "|"]
    lines += [f"| {r['method']} | " + " | ".join(cell(r.get(c), spec) for c, (_, spec) in columns.items()) + " |" for r in rows]
    return "\n".join(lines)


def table_columns(rows):
    """Headings and formats of the columns that these rows have, in reading order."""
    names = {"test": "ID"} | {s: s.replace("ood_", "OOD-") for s in ("ood_near", "ood_far")}
    splits = [c.removeprefix("reward/") for c in rows[0] if c.startswith("reward/")]
    judge = "gold" if f"gold/{splits[0]}" in rows[0] else "reward"
    columns = {f"{judge}/{s}": (f"{judge} {names.get(s, s)}", ".2f") for s in splits} | (
        {f"reward/{splits[0]}": ("learned reward", ".2f")} if judge == "gold" else {}) | {
        "kl": ("KL to SFT", ".2f"), "win_sft": ("win vs SFT", ".0%"),
        "win_reference": ("win vs reference", ".0%"), "ead_per_input": ("EAD per input", ".2f"),
        "ead_across": ("EAD across", ".2f"), "nli_per_input": ("NLI per input", ".2f"),
        "sbert_per_input": ("SBERT per input", ".2f"), "length": ("tokens", ".0f"), "ended": ("ended", ".0%"),
        "seconds": ("seconds", ".0f")}
    return {c: v for c, v in columns.items() if any(c in r for r in rows)}


def main():
    folders = list(itertools.takewhile(lambda a: not a.startswith("--"), sys.argv[1:]))
    options = parse_options(Options, "python -m nanorlhf.evaluate RUN [RUN...] [options]: a table over checkpoint folders.",
                            sys.argv[1 + len(folders):])
    try:
        names = [Path(f).name for f in folders]
        rows, samples = evaluate_policies({name if names.count(name) == 1 else f: f for name, f in zip(names, folders)}, options)
    except UserError as error:
        raise SystemExit(f"error: {error}")
    table = markdown_table(rows, table_columns(rows))
    print(table)
    write_json(Path(options.out) / "table.json", rows)
    write_records(Path(options.out) / "samples.jsonl", samples)
    write_text(Path(options.out) / "table.md", table + "\n")


if __name__ == "__main__":
    main()
