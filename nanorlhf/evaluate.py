"""Evaluation of policies: the sampler that the training loops call, and a table over checkpoint folders.

    python -m nanorlhf.evaluate RUN [RUN...] [options]      the table; --help lists the options
"""

import dataclasses
import functools
import itertools
import math
import os
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from nanorlhf import ranks, reviews
from nanorlhf.data import (Example, collate, cut_response, decode_response, encode_prompts, encode_response, length_limits,
                           load_records, marks_of, of_each, post_of)
from nanorlhf.errors import UserError
from nanorlhf.files import FolderLock, local_folder, require_folder, write_json, write_records, write_text
from nanorlhf.formats.checkpoints import tensor_index
from nanorlhf.generate import generate, repeated
from nanorlhf.metrics import (across_input_diversity, bon_kl, bootstrap_interval, difference_and_interval, distinct_n,
                              expectation_adjusted_distinct, mean_and_interval, mnli_relation, nli_diversity, perplexity,
                              repetition, sbert_diversity, self_bleu, sequence_kl, share_interval, win_matrix, win_rate,
                              with_error, within, words_of)
from nanorlhf.model import Transformer, check_fit, pick_device
from nanorlhf.options import check_options, leading_words, named_files, one_line_errors, parse_options
from nanorlhf.rewards import in_own_tokens, load_reward, reads_alike
from nanorlhf.tokenizer import check_same_ids, load_tokenizer, tokenizer_of
from nanorlhf.training import seed_for

# ---- Samples of a policy while it trains ----------------------------------------------------------------------------


def eval_sampler(config, records, tokenizer, policy, reference, rewards, run):
    """Returns the function (step) -> metrics `eval/...` that a training loop calls: it samples one response to each evaluation
    prompt, measures them, and appends a few texts to samples.jsonl.

    --eval_prompts names the prompts, and --eval_reward a reward that is only measured, beside `rewards`, {name: reward}.
    Without --eval_prompts, training on the built-in task's prompts is evaluated on its test prompts; training on other data is
    not evaluated: a line says so, and the function returns {}. Without --eval_reward, the built-in task's prompts are measured
    by the gold reward.
    """
    def on_reviews(records):
        return all(reviews.domain_of(r["prompt"]) for r in records[:10])
    if config.eval_every == 0 or config.num_eval_prompts == 0:
        return lambda step: {}
    if not (config.eval_prompts or on_reviews(records)):
        print(f"{run.name}: nothing is sampled while training; --eval_prompts FILE names prompts to sample on, and --eval_reward "
              f"a reward to measure there", flush=True)
        return lambda step: {}
    asked = load_records(config.eval_prompts or "reviews", "prompt", "test", config.num_eval_prompts, config.skip_bad,
                         tokenizer=tokenizer, columns=config.columns)
    prompts = encode_prompts(tokenizer, asked, config, policy.config.context)
    rows = getattr(config, "micro_batch_size", 0)
    if config.eval_reward or on_reviews(asked):
        name = "gold" if config.eval_reward in ("", "gold") else "eval_reward"
        rewards = rewards | {name: load_reward(config.eval_reward or "gold", tokenizer, run.device,
                                               batch_size=rows, dtype=config.dtype)}
    for reward in rewards.values():
        reward.check_columns(asked, config.eval_prompts or "reviews")

    def sample(step):
        metrics, texts = measure(policy, reference, tokenizer, prompts, rewards, config.response_length,
                                 config.temperature, config.seed, run.autocast(), asked, rows or 64)
        run.log_samples(step, texts[:8])
        return metrics
    return sample


@torch.no_grad()
def measure(policy, reference, tokenizer, prompts, rewards, max_new_tokens, temperature=1.0, seed=0, autocast=None,
            records=None, batch_size=64):
    """Samples one response per prompt. Returns means of each reward, sequence KL to the reference, length and the share that
    ended with EOS, as {"eval/NAME": mean, "eval/NAME_se": its standard error over the prompts}; and the texts as records.

    prompts: lists of ids; records: the records they belong to; rewards: {name: reward of load_reward}; batch_size: rows whose KL
    is measured at a time. The random numbers are the same at every step, so that two evaluations of a run differ by its weights
    only; nothing else uses them.
    """
    device = policy.embed.weight.device
    with autocast or torch.autocast(device.type, enabled=False):
        samples = generate(policy, prompts, max_new_tokens, temperature, seed=seed_for(seed, "evaluate"), tokenizer=tokenizer)
        responses = samples.responses()
        kl = sampled_kl(policy, reference, tokenizer, prompts, responses, temperature, batch_size)
    scores = {name: reward(prompts, responses, records) for name, reward in rewards.items()}
    columns = scores | {"kl": kl, "length": [len(r) for r in responses], "ended": samples.finished.float().cpu()}
    metrics = {}
    for name, values in columns.items():
        metrics |= with_error(f"eval/{name}", values, posts=records and list(map(post_of, records)))
    texts = [dict(prompt=tokenizer.decode(p), completion=tokenizer.decode(r, start=False),
                  **{n: float(s[i]) for n, s in scores.items()}) for i, (p, r) in enumerate(zip(prompts, responses))]
    return metrics, texts


def sampled_kl(policy, reference, tokenizer, prompts, responses, temperature, batch_size=64, other=None):
    """Returns sequence_kl of each of these responses of the policy, a list of numbers. At temperature 0 a policy is one text
    without a distribution: then the KL is that of temperature 1 along the text. other: prompts that the reference reads in
    place of `prompts`."""
    batch_of = functools.partial(tokens_and_mask, policy, tokenizer, responses)
    return of_each(range(len(prompts)), batch_size, lambda rows: sequence_kl(
        policy, reference, *batch_of(prompts, rows), temperature or 1.0, other=batch_of(other, rows) if other else None).tolist(),
        length=lambda i: len(prompts[i]) + len(responses[i]))


@torch.no_grad()
def response_nll(model, tokenizer, prompts, responses, batch_size=64):
    """Returns (-log p(response | prompt) in nats, number of tokens) of each response, EOS included, under a model whose ids these
    are. `perplexity` of the list is that of all of them; rows of it are independent, so bootstrap_interval takes it too."""
    nll = of_each(range(len(prompts)), batch_size, lambda rows: (
        -model.logprobs(*tokens_and_mask(model, tokenizer, responses, prompts, rows)).sum(1)).tolist(),
        length=lambda i: len(prompts[i]) + len(responses[i]))
    return list(zip(nll, map(len, responses)))


def tokens_and_mask(model, tokenizer, responses, prompts, rows):
    """Returns tokens and mask [B, T], on the model's device, of these rows of prompts and responses."""
    examples = [Example(prompts[i] + responses[i], len(prompts[i])) for i in rows]
    batch = collate(examples, tokenizer.pad_id, model.embed.weight.device)
    return batch.tokens, batch.mask


def swapped(prompts, records):
    """Returns for each prompt another one of the same list: on the built-in task the next of the same domain, if there is one,
    and on other data the next."""
    domains = [reviews.domain_of(r["prompt"]) for r in records]
    later = [itertools.chain(range(i + 1, len(prompts)), range(i)) for i in range(len(prompts))]
    return [prompts[next((j for j in later[i] if domains[j] == domains[i]), i - 1)] for i in range(len(prompts))]


# ---- A table over finished checkpoints ------------------------------------------------------------------------------


@dataclasses.dataclass
class Options:
    reference: str = "out/sft"       # policy that KL and win rate compare with, and that best-of-N samples
    reward: str = "out/rm"           # learned reward, which chooses in best-of-N: folder, gold or file.py:function
    gold: str = ""                   # true reward, or the nearest thing, which judges; '' = gold on reviews, else --reward
    data: str = "reviews"            # `reviews` (ID, OOD-near and OOD-far), or record files NAME=FILE,NAME=FILE
    columns: str = ""                # other names of the files' columns, OURS=THEIRS: prompt=question,answer=solution
    bon: int = 0                     # add a row for best-of-N of the reference with this N; 0 = none
    skip_bad: bool = False           # skip bad rows and count them, instead of stopping at the first
    num_prompts: int = 250           # prompts per split, one sample each
    diversity_prompts: int = 50      # prompts of the first split for per-input diversity (Kirk 2023: 500)
    num_samples: int = 16            # samples for each of them (Kirk 2023: 16)
    first_words: int = 0             # words that length-matched EAD and distinct-2 read; 0 = as many as 90% of SFT's texts have
    sbert: str = ""                  # SBERT diversity too, by this sentence-transformers model (extra `eval`)
    nli: str = ""                    # NLI diversity by this model (extra `eval`), on reviews instead of the exact relation
    perplexity: str = ""             # model under which the texts' perplexity is measured: folder or hub name; '' = none
    max_length: int = 0              # longest prompt + response in tokens; 0 = the model's context
    max_prompt_length: int = 0       # cut longer prompts to this; 0 = half of max_length
    keep: Literal["end", "start", "tldr"] = "end"  # what an overlong prompt keeps (tldr: Stiennon's rule)
    response_length: int = 48        # longest sampled response in tokens
    temperature: float = 1.0         # of all samples
    cut_at: str = ""                 # end responses before the first of these texts, comma-separated; \n is a newline
    seed: int = 0                    # of the samples
    device: str = "auto"             # cpu, cuda, cuda:1, ...; auto = a GPU if there is one
    shard: bool = False              # with torchrun: split each model over the processes (FSDP2)
    out: str = "out/evaluation"      # folder for table.md, table.json and samples.jsonl
    overwrite: bool = False          # overwrite the table in --out

    ranges = {"num_samples": "[2, 1e5]"}  # diversity compares pairs


ANY, GOLD_RANGE = (-math.inf, math.inf), (reviews.REWARD_MIN, reviews.REWARD_MAX)
RANGES = {"win": (0, 1), "ended": (0, 1), "accuracy": (0, 1), "ceiling": (0, 1), "ead": (0, math.inf), "nli": (-2, 2),
          "sbert": (0, 2), "kl": (0, math.inf), "heed": (0, math.inf), "length": (0, math.inf), "distinct": (0, 1),
          "self_bleu": (0, 1), "repetition": (0, 1), "ppl": (1, math.inf)}                       # by how a column begins
MINUS_SFT = " - SFT"                                                    # ends the names of columns of paired differences


def possible_range(column, gold_range=ANY):
    """Returns (lowest, highest) possible value of a column of the table; gold_range: of the true reward."""
    if column.endswith(MINUS_SFT) or column.startswith("gap/"):
        lowest, highest = possible_range(column.removesuffix(MINUS_SFT).replace("gap/", "gold/"), gold_range)
        return lowest - highest, highest - lowest
    return next((r for start, r in (RANGES | {"gold": gold_range}).items() if column.startswith(start)), ANY)


def judge_of(options):
    """Returns (column, reward) of the judge, which decides which of two texts wins: "gold" or "reward", and what it names."""
    gold = options.gold or ("gold" if options.data == "reviews" else "")
    return ("gold", gold) if gold else ("reward", options.reward)


class Evaluation:
    """What all policies of a table share: prompts by split, the reference, the rewards, the scores of the data's own answers and
    of the reference's texts that a policy's texts have to beat."""

    def __init__(self, options):
        self.options, self.marks = options, marks_of(options.cut_at)
        self.device = device = ranks.join(pick_device(options.device), options.shard)
        self.tokenizer = tokenizer = load_tokenizer(local_folder(options.reference))
        self.reference = self.load(options.reference, tokenizer)
        self.on_reviews = options.data == "reviews"
        self.judge, judge = judge_of(options)
        self.rewards = {"reward": load_reward(options.reward, tokenizer, device)}
        if self.judge == "gold":
            self.rewards["gold"] = load_reward(judge, tokenizer, device)
        self.gold_range = GOLD_RANGE if judge == "gold" else ANY
        if options.perplexity:
            self.reader_tokenizer = tokenizer_of(options.perplexity, tokenizer)
            self.reader = self.load(options.perplexity, self.reader_tokenizer)
        if self.on_reviews:
            sources = {split: ("reviews", split) for split in ("test", "ood_near", "ood_far")}
        else:
            sources = {name: (file, "") for name, file in named_files(options.data).items()}
        self.records = {name: load_records(file, "prompt", split, options.num_prompts, options.skip_bad,
                                           tokenizer=tokenizer, columns=options.columns)
                        for name, (file, split) in sources.items()}
        for name, records in self.records.items():
            for reward in self.rewards.values():
                reward.check_columns(records, sources[name][0])
        self.prompts = {name: encode_prompts(tokenizer, records, options, self.reference.config.context)
                        for name, records in self.records.items()}
        self.first = next(iter(sources))                                # the split in distribution
        asked, self.written_scores = self.records[self.first], None
        if all(r.get("completion") for r in asked):
            max_length, _ = length_limits(options, self.reference.config.context)
            written = [encode_response(tokenizer, r["completion"], r["prompt"])[:max_length - len(p)]
                       for r, p in zip(asked, self.prompts[self.first])]
            self.written_scores = self.rewards[self.judge](self.prompts[self.first], written, asked)
        self.opponent_scores = self.judged(self.reference, 1, "opponent")
        self.first_words = options.first_words or None                  # None: set by the first row, the reference's

    def load(self, folder, tokenizer):
        """Returns the policy of a folder, on the device."""
        model = Transformer.from_pretrained(folder)
        check_fit(model, tokenizer)
        return ranks.place(model, self.device)

    def cut(self, responses, records):
        """Returns responses, lists of ids, as --cut_at leaves them."""
        if not self.marks:
            return responses
        return [cut_response(self.tokenizer, y, self.marks, r["prompt"], self.options.response_length)
                for y, r in zip(responses, records)]

    def draw(self, model, split, K, n, purpose, limit=None, whole=False):
        """Draws K responses to each of a split's prompts, [P][K] lists of ids, and cuts them unless `whole`. With n > 1 each is
        the best of n samples of its own under the learned reward. All policies get the same random numbers for a purpose, so
        that their differences are less noisy."""
        o, prompts, records = self.options, self.prompts[split][:limit], self.records[split][:limit]
        responses = generate(model, prompts, o.response_length, o.temperature, num_samples=K * n, tokenizer=self.tokenizer,
                             seed=seed_for(o.seed, "table", purpose, split, n)).responses()
        responses = responses if whole else self.cut(responses, repeated(records, K * n))
        if n > 1:
            scores = self.rewards["reward"](repeated(prompts, K * n), responses, repeated(records, K * n)).view(-1, n)
            responses = [responses[i * n + int(best)] for i, best in enumerate(scores.argmax(1))]
        return [responses[i:i + K] for i in range(0, len(responses), K)]

    def judged(self, model, n, purpose):
        """Returns the judge's scores [P] of one text per prompt of the first split. Texts that meet each other in a win rate are
        drawn for purposes of their own: with the same random numbers equal policies would write equal texts."""
        texts = [drawn[0] for drawn in self.draw(model, self.first, 1, n, purpose)]
        return self.rewards[self.judge](self.prompts[self.first], texts, self.records[self.first])

    def nll(self, responses):
        """Returns response_nll of responses to the first split's prompts under the model of --perplexity, in its own tokens."""
        prompts, own = self.prompts[self.first], self.reader_tokenizer
        if not reads_alike(own, self.tokenizer):
            context, records = self.reader.config.context, self.records[self.first]
            prompts, responses = in_own_tokens(own, context, self.tokenizer, prompts, responses, records)
        return response_nll(self.reader, own, prompts, responses)

    def interval(self, column, mean, half):
        return within(mean, half, *possible_range(column, self.gold_range))


def table_row(evaluation, name, model, n=1):
    """Returns (row, values, texts) of one policy, or of best-of-n of it. row: {"method": name, column: (value, low end, high end
    of its 95% interval over prompts)}, the ends None where there is no interval; values: {column: one number per prompt}."""
    e, row, values, texts = evaluation, {"method": name}, {}, []
    values |= per_input_values(e, model, n)
    row["first_words"] = e.first_words, None, None
    for split, prompts in e.prompts.items():
        records = e.records[split]
        sampled = [drawn[0] for drawn in e.draw(model, split, 1, n, "samples", whole=n == 1)]
        responses = e.cut(sampled, records)
        scores = {k: reward(prompts, responses, records) for k, reward in e.rewards.items()}
        values |= {f"{k}/{split}": s.tolist() for k, s in scores.items()}
        if split == e.first:
            values["length"] = [len(y) for y in responses]
            values["repetition"] = [repetition(e.tokenizer.decode(y, start=False)) for y in responses]
            if n == 1:
                kl = functools.partial(sampled_kl, model, tokenizer=e.tokenizer, prompts=prompts, responses=sampled,
                                       temperature=e.options.temperature)
                values["kl"], values["heed"] = kl(e.reference), kl(model, other=swapped(prompts, records))
            row |= first_split_columns(e, n, responses, scores[e.judge])
        else:                                                           # OOD gap: ID - OOD
            gap = difference_and_interval(values[f"{e.judge}/{e.first}"], values[f"{e.judge}/{split}"])
            row[f"gap/{split}"] = e.interval(f"gap/{split}", *gap)
        texts += [dict(method=name, split=split, prompt=r["prompt"], completion=decode_response(e.tokenizer, y, r["prompt"]),
                       **{k: float(s[i]) for k, s in scores.items()}) for i, (r, y) in enumerate(zip(records, responses))]
    row |= {column: e.interval(column, *mean_and_interval(v)) for column, v in values.items()}
    return row, values, texts


def per_input_values(evaluation, model, n):
    """Returns {column: diversity of the K samples of each of the first prompts}. The reference comes first and sets how many
    words the length-matched EAD counts."""
    e = evaluation
    outputs = e.draw(model, e.first, e.options.num_samples, n, "diversity", e.options.diversity_prompts)
    outputs = [[e.tokenizer.decode(y, start=False) for y in drawn] for drawn in outputs]
    if e.first_words is None:
        e.first_words = max(1, int(np.percentile([len(words_of(text)) for drawn in outputs for text in drawn], 10)))
    metrics = {"ead": expectation_adjusted_distinct,
               "ead_first": functools.partial(expectation_adjusted_distinct, first=e.first_words),
               "self_bleu": self_bleu}
    if e.first_words > 1:                                               # a single word has no pairs
        metrics["distinct2"] = functools.partial(distinct_n, n=2, first=e.first_words)
    metrics |= meaning_metrics(e.options, e.on_reviews)
    return {f"{k}_per_input": list(map(metric, outputs)) for k, metric in metrics.items()}


def meaning_metrics(options, on_reviews):
    """Returns {column: metric of a set of texts} of the diversity of their meaning."""
    metrics = {}
    if options.nli or on_reviews:
        relation = mnli_relation(options.nli) if options.nli else reviews.relation
        metrics["nli"] = functools.partial(nli_diversity, relation=relation)
    if options.sbert:
        metrics["sbert"] = functools.partial(sbert_diversity, model=options.sbert)
    return metrics


ACROSS_PAIRED = 50                   # texts whose meanings are compared pair by pair across inputs: 1,225 pairs


def first_split_columns(evaluation, n, responses, scores):
    """Columns of a row that are measured on the first split only and are no means over prompts."""
    e, columns = evaluation, {}
    if n > 1:
        columns["kl"] = bon_kl(n), None, None
    columns["win_sft"] = win_rate(scores, e.opponent_scores)
    if e.written_scores is not None:
        columns["win_reference"] = win_rate(scores, e.written_scores)
    outputs = [[e.tokenizer.decode(y, start=False)] for y in responses]
    # Diversity across inputs gets no interval. The bootstrap would repeat texts, which lowers every count of distinct n-grams,
    # and smaller sets drawn without replacement have another EAD.
    for column, first in (("ead_across", None), ("ead_first_across", e.first_words)):
        ead = across_input_diversity(outputs, functools.partial(expectation_adjusted_distinct, first=first))
        columns[column] = ead, None, None
    for name, metric in meaning_metrics(e.options, e.on_reviews).items() if len(outputs) > 1 else ():   # it compares pairs
        columns[f"{name}_across"] = across_input_diversity(outputs[:ACROSS_PAIRED], metric), None, None
    columns["ended"] = share_interval(float(np.mean([y[-1] in e.tokenizer.end_ids for y in responses])), len(responses))
    if e.options.perplexity:
        columns["ppl"] = bootstrap_interval(e.nll(responses), perplexity)
    return columns


def evaluate_policies(folders, options):
    """Evaluates checkpoint folders {name: folder}, the reference first, as "SFT", and best-of-N of it last, if asked for.
    Returns (rows of `report`, all sampled texts as records). For each column that is a mean over prompts, a policy's row also
    has "COLUMN - SFT": the mean difference to SFT on the same prompts with its own interval. With several policies each row has
    "win/NAME", its win rate against each of the others."""
    check_options(options)
    for folder in filter(None, [options.reference, *folders.values(), options.perplexity]):
        made_by = "python train_sft.py" if folder == Options.reference else "the script that makes it"
        if "score.weight" in tensor_index(require_folder(folder, made_by)):
            raise UserError(f"{folder} is a reward model, not a language model: name it as --reward or --gold")
    evaluation = Evaluation(options)
    for folder in folders.values():
        check_same_ids("the policy", folder, evaluation.tokenizer)
    todo = [("SFT", options.reference, 1)] + [(name, f, 1) for name, f in folders.items() if Path(f) != Path(options.reference)]
    if options.bon:
        todo.append((f"best-of-{options.bon}", options.reference, options.bon))
    rows, samples, scores, of_sft = [], [], {}, None
    for name, folder, n in todo:
        start = time.monotonic()
        model = evaluation.reference
        if folder != options.reference:
            model = evaluation.load(folder, evaluation.tokenizer)
        row, values, texts = table_row(evaluation, name, model, n)
        if of_sft is None:
            of_sft, row["win_sft"], scores[name] = values, (0.5, None, None), evaluation.opponent_scores
        else:
            scores[name] = evaluation.judged(model, n, f"opponent {name}")
            for column in values:
                difference = mean_and_interval(np.subtract(values[column], of_sft[column]))
                row[column + MINUS_SFT] = evaluation.interval(column + MINUS_SFT, *difference)
        rows.append(row)
        samples += texts
        print(f"evaluated {name} in {time.monotonic() - start:.0f} s: "
              f"{evaluation.judge} {row[f'{evaluation.judge}/{evaluation.first}'][0]:.3f}, "
              f"KL {row['kl'][0]:.2f}", flush=True)
    row_of = {row["method"]: row for row in rows}
    for (a, b), rate in win_matrix(scores).items():
        row_of[a][f"win/{b}"] = rate
    return rows, samples


def cell(value, spec):
    """Returns a table's cell: value (number, low end, high end) with its interval, or None, in this format."""
    if value is None:
        return "-"
    mean, low, high = value
    if low is None:
        return format(mean, spec)
    below, above = format(mean - low, spec), format(high - mean, spec)
    return f"{mean:{spec}} ± {above}" if below == above else f"{mean:{spec}} [{low:{spec}}, {high:{spec}}]"


def markdown_table(rows, columns, first="method"):
    """Returns a Markdown table of rows {column: (value, low end, high end)}, the ends None if there are none. columns: {column:
    (heading, format, ...)}; first: the heading of the rows' names."""
    lines = [f"| {first} | " + " | ".join(c[0] for c in columns.values()) + " |", "|---" + "|---:" * len(columns) + "|"]
    lines += [f"| {r['method']} | " + " | ".join(cell(r.get(c), v[1]) for c, v in columns.items()) + " |" for r in rows]
    return "\n".join(lines)


def table_columns(rows):
    """Returns {column: (heading, format, meaning)} of the columns to print that these rows have, in reading order."""
    names = {"test": "ID"} | {s: s.replace("ood_", "OOD-") for s in ("ood_near", "ood_far")}
    splits = [c.removeprefix("reward/") for c in rows[0] if c.startswith("reward/") and not c.endswith(MINUS_SFT)]
    judge, names = "gold" if f"gold/{splits[0]}" in rows[0] else "reward", {s: names.get(s, s) for s in splits}
    first, words = names[splits[0]], f"{rows[0]['first_words'][0]:.3g}"
    columns = {f"{judge}/{s}": (f"{judge} {name}", ".2f", f"likewise, on the split {s}") for s, name in names.items()}
    columns[f"{judge}/{splits[0]}"] = (f"{judge} {first}", ".2f", f"the judge's mean score of one sample per prompt of the split "
                                       f"{splits[0]}; columns that name no split are of this one")
    columns.setdefault(f"reward/{splits[0]}", ("learned reward", ".2f", "mean score by the reward that best-of-N chooses by"))
    columns |= {
        "kl": ("KL to SFT", ".2f", "KL(policy || SFT) in nats per response, exact at every token of the policy's samples; of "
                                   "best-of-N the formula, an upper bound"),
        "heed": ("heed", ".2f", "how far the policy heeds the prompt: KL to the same policy under another prompt of the split "
                                "(on reviews: of the domain) in nats per response; 0 = the prompt does not matter"),
        "win_sft": ("win vs SFT", ".0%", "share of prompts where the judge prefers the policy's text to one that SFT drew with "
                                         "random numbers of its own; a tie is half a win"),
        "win_reference": ("win vs reference", ".0%", "likewise, against the answer in the data"),
        f"{judge}/{splits[0]}{MINUS_SFT}": (f"{judge} {first} - SFT", ".2f", "mean difference to SFT's score on the same prompt; "
                                            "compare policies by it, as it has less noise than two columns have")}
    columns |= {f"gap/{s}": (f"gap {name}", ".2f", f"{judge} {first} - {judge} {name} of the same policy")
                for s, name in names.items()}
    columns |= {
        "ead_per_input": ("EAD per input", ".2f", "distinct n-grams in the samples of a prompt, relative to those expected, "
                                                  "mean over n = 1 to 5 and prompts; higher for shorter texts"),
        "ead_first_per_input": (f"EAD per input, {words} words", ".2f", "the same of the first words of each text, as many as "
                                "90% of SFT's texts have, so that a text's length matters less"),
        "ead_across": ("EAD across", ".2f", "EAD of the set of one sample per prompt"),
        "ead_first_across": (f"EAD across, {words} words", ".2f", "likewise"),
        "distinct2_per_input": (f"distinct-2 per input, {words} words", ".2f", "distinct pairs of neighbouring words over all "
                                "such pairs, in the same first words of a prompt's samples"),
        "self_bleu_per_input": ("Self-BLEU per input", ".2f", "mean BLEU-4 of a sample against the prompt's other samples; lower "
                                                              "is more diverse"),
        "nli_per_input": ("NLI per input", ".2f", "contradictions minus entailments between two samples of a prompt, both "
                                                  "directions, -2 to 2; higher is more diverse"),
        "nli_across": ("NLI across", ".2f", f"likewise, of samples of different prompts, the first {ACROSS_PAIRED}"),
        "sbert_per_input": ("SBERT per input", ".2f", "1 - mean cosine of the embeddings of two samples of a prompt"),
        "sbert_across": ("SBERT across", ".2f", "likewise, of samples of different prompts"),
        "length": ("tokens", ".1f", "mean length of a response, EOS included"),
        "ended": ("ended", ".0%", "share of responses that ended with EOS"),
        "repetition": ("repetition", ".1%", "share of a text's runs of 4 words that it has had before, mean over texts"),
        "ppl": ("perplexity", ".2f", "of the texts under the model that --perplexity names, per token of that model, EOS "
                                     "included; all tokens pooled, the interval by the bootstrap over prompts"),
        "seconds": ("seconds", ".0f", "training time")}
    return {c: v for c, v in columns.items() if any(c in r for r in rows)}


TEXT_COLUMNS = ("ead", "distinct", "self_bleu", "nli", "sbert", "length", "ended", "repetition", "ppl", "seconds")
WINS = "win rate over"
MEANING_OF_WINS = ("share of prompts where the judge prefers the text of the row's method to that of the column's; a tie is half "
                   "a win. The texts are drawn for this table, each method's with random numbers of its own. About one in 20 of "
                   "these intervals misses its rate")


def report(rows, judged_by, intervals):
    """Returns Markdown: who judges, a table of scores, one about the texts, one of win rates if there are several methods, and
    what each column and the intervals mean."""
    columns = table_columns(rows)
    about_texts = {c: v for c, v in columns.items() if c.startswith(TEXT_COLUMNS)}
    scores = {c: v for c, v in columns.items() if c not in about_texts}
    wins = {f"win/{r['method']}": (r["method"], ".0%") for r in rows if any(f"win/{r['method']}" in row for row in rows)}
    tables = [markdown_table(rows, scores), markdown_table(rows, about_texts)]
    legend = "\n".join(f"- {heading}: {meaning}" for heading, _, meaning in columns.values())
    if wins:
        tables.append(markdown_table(rows, wins, WINS))
        legend += f"\n- {WINS}: {MEANING_OF_WINS}"
    tables = "\n\n".join(tables)
    return (f"{judged_by}\n\n{tables}\n\n{legend}\n"
            f"- ±: half of a 95% interval {intervals}. Where it is not symmetric, its two ends stand in brackets. A number "
            f"without one is a formula's or a single value's, or all its values are the same.\n")


OVER_PROMPTS = ("over the prompts, by Student's t (the gap: Welch's), of shares by Wilson; how much another seed of training "
                "would change is not in it")


def check_unused(options):
    """Raises UserError if --out holds files, unless --overwrite and an older table are there."""
    out = Path(options.out)
    if out.exists() and any(out.iterdir()):
        if not options.overwrite:
            raise UserError(f"{out} already holds files: name another --out, or replace its table with --overwrite")
        if not (out / "table.md").exists():       # the first file to be written
            raise UserError(f"{out} holds no table of an evaluation, so --overwrite does not touch it")
    out.mkdir(parents=True, exist_ok=True)        # what cannot be written shall be known before the work


def main():
    folders = leading_words()
    description = ("python -m nanorlhf.evaluate RUN [RUN...] [options]: a table over checkpoint folders. They come before the "
                   "options.")
    options = parse_options(Options, description, sys.argv[1 + len(folders):],
                            prog="python -m nanorlhf.evaluate RUN [RUN ...]")
    with one_line_errors(options, lambda: "nothing was saved: give the same command again"):
        check_options(options)
        ranks.join(pick_device(options.device), options.shard)
        ranks.on_first(check_unused, options)
        lock = FolderLock.of(Path(options.out)) if ranks.mine() == 0 else None         # until the table is written
        names = [Path(os.path.abspath(f)).name for f in folders]        # of "." too
        taken = [*names, "SFT", f"best-of-{options.bon}"]
        rows, samples = evaluate_policies({name if taken.count(name) == 1 else f: f for name, f in zip(names, folders)}, options)
        column, judge = judge_of(options)
        judged_by = f"The judge is `{column}` = {'the true reward of the built-in task' if judge == 'gold' else judge}."
        judged_by += (f" The learned reward is {options.reward}." if column == "gold" else
                      " It is also the learned reward: no --gold was given.")
        if options.sbert:
            judged_by += f" SBERT is {options.sbert}."
        if options.nli:
            judged_by += f" NLI is {options.nli}."
        if marks := marks_of(options.cut_at):
            judged_by += (f" A response ends before the first of {', '.join(map(repr, marks))} (--cut_at) and has "
                          f"ended then; KL and heed are of whole samples.")
        table = report(rows, judged_by, OVER_PROMPTS)
        print(table)
        write_text(Path(options.out) / "table.md", table)
        write_records(Path(options.out) / "samples.jsonl", samples)
        write_json(Path(options.out) / "table.json", rows)
        del lock


if __name__ == "__main__":
    main()
