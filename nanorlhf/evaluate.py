"""Evaluation: rewards, KL to the reference, best-of-n, win rate, OOD gap, diversity; `python -m nanorlhf.evaluate RUN...`.

The metrics are those of Kirk 2023, Rafailov 2023 (section 6) and Stiennon 2020; each function names its source.
"""

import dataclasses
import functools
import itertools
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

from nanorlhf import reviews
from nanorlhf.data import (Example, collate, decode_response, encode_prompt, encode_response, load_records, load_tokenizer,
                           micro_batches, need_same_ids)
from nanorlhf.generate import generate, prompt_room
from nanorlhf.model import Transformer
from nanorlhf.rewards import load_reward
from nanorlhf.run import (UserError, local_folder, need_fit, need_folder, parse_options, pick_device, seed_for, write_json,
                          write_records, written_whole)

# ---------------------------------------------------------------------------------------------------------------- KL

@torch.no_grad()
def sequence_kl(policy, reference, tokens, mask, temperature=1.0, chunk=1024):
    """Sum over response tokens of the exact KL(policy || reference) of the next-token distributions, [B] nats.

    On the policy's own samples its mean estimates the sequence KL (DPO section 6.1); summing over the whole vocabulary has
    a lower variance than summing log-ratios of the sampled tokens. tokens, mask [B, T] as in Transformer.logprobs.
    """
    where = mask[:, 1:]
    h, h_ref = policy(tokens)[:, :-1][where], reference(tokens)[:, :-1][where]         # [N, D]
    per_token = []
    for a, b in zip(h.split(chunk), h_ref.split(chunk)):                               # an [N, V] tensor may not fit
        logp = (policy.logits(a).float() / temperature).log_softmax(-1)
        logq = (reference.logits(b).float() / temperature).log_softmax(-1)
        per_token.append((logp.exp() * (logp - logq)).sum(-1))
    out = torch.zeros(where.shape, device=tokens.device)
    return out.masked_scatter(where, torch.cat(per_token)).sum(1) if per_token else out.sum(1)


def bon_kl(n):
    """KL(best-of-n || base) = log n - (n-1)/n nats (Stiennon 2020): exact without ties, an upper bound with them."""
    return math.log(n) - (n - 1) / n


def best_of_n_estimate(scores, n, values=None):
    """Unbiased estimate of E[value of the best of n], best by score, from a pool of len(scores) >= n samples.

    The i-th smallest of N scores is the best of C(i-1, n-1) of the C(N, n) subsets. `values` (default: the scores) is what
    is averaged: pass the true reward to see what best-of-n under a proxy really gains. Equal scores share their weight.
    """
    scores = np.asarray(scores, dtype=np.float64)
    values = scores if values is None else np.asarray(values, dtype=np.float64)
    N = len(scores)
    if not 1 <= n <= N or len(values) != N:
        raise ValueError(f"best of {n} from {N} scores and {len(values)} values")
    order = np.argsort(scores, kind="stable")
    total = math.lgamma(N + 1) - math.lgamma(n + 1) - math.lgamma(N - n + 1)
    weights = np.array([math.exp(math.lgamma(i) - math.lgamma(n) - math.lgamma(i - n + 1) - total) if i >= n else 0.0
                        for i in range(1, N + 1)])
    sorted_scores, sorted_values = scores[order], values[order]
    _, group = np.unique(sorted_scores, return_inverse=True)                           # ties: average over the tied values
    count = np.bincount(group)
    return float((np.bincount(group, weights) * np.bincount(group, sorted_values) / count).sum())


# --------------------------------------------------------------------------------------------------------- diversity

def expectation_adjusted_distinct(texts, vocab_size=50257):
    """EAD of a set of texts (Liu 2022, as Kirk 2023 uses it): the number of distinct n-grams over the number expected of
    as many uniformly drawn tokens, averaged over n = 1..5. Words are split at spaces after removing '.' and newlines;
    vocab_size is the same for every n (Kirk's code). 0 for texts without words."""
    words = [[w for w in t.replace(".", "").replace("\n", "").split(" ") if w] for t in texts]
    scores = []
    for n in range(1, 6):
        grams = [tuple(w[i:i + n]) for w in words for i in range(len(w) - n + 1)]
        expected = -vocab_size * math.expm1(len(grams) * math.log1p(-1 / vocab_size))
        scores.append(len(set(grams)) / expected if grams else 0.0)
    return sum(scores) / len(scores)


def per_input_diversity(outputs, metric):
    """Mean over inputs of the metric over the K outputs of one input. outputs: list of lists of texts."""
    return sum(metric(texts) for texts in outputs) / len(outputs)


def across_input_diversity(outputs, metric):
    """The metric over the first output of every input."""
    return metric([texts[0] for texts in outputs])


@functools.lru_cache
def sbert_encoder(name):
    """The function texts -> array [N, d] of a sentence-transformers model; loaded once. Extra: eval."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError("SBERT diversity needs the extra `eval`: pip install -e '.[eval]'")
    return SentenceTransformer(name).encode


def sbert_diversity(texts, model="sentence-transformers/bert-large-nli-stsb-mean-tokens"):
    """1 - mean cosine similarity over unordered pairs of sentence embeddings (Kirk 2023). Extra: eval. `model` may be a
    name, or a function texts -> array [N, d]."""
    encode = model if callable(model) else sbert_encoder(model)
    e = np.asarray(encode(texts), dtype=np.float64)
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    return float(1 - np.mean([e[i] @ e[j] for i, j in itertools.combinations(range(len(e)), 2)]))


def nli_diversity(texts, relation=reviews.relation):
    """Mean over unordered pairs of the two directions' sum of +1 for contradiction, 0 for neutral, -1 for entailment
    (Stasaski & Hearst 2022; Kirk 2023): range [-2, 2], higher is more diverse.

    relation(premise, hypothesis) returns one of these words, or (word, confidence). The default is exact on the built-in
    task; mnli_relation() is the papers' roberta-large-mnli. Kirk's released code wraps the value in 1 - mean, which flips
    its sign; the published numbers match the unflipped mean, as here.
    """
    worth = {"contradiction": 1.0, "neutral": 0.0, "entailment": -1.0}

    def one(a, b):
        found = relation(a, b)
        word, confidence = found if isinstance(found, tuple) else (found, 1.0)
        return worth[word] * confidence
    pairs = list(itertools.combinations(texts, 2))
    return sum(one(a, b) + one(b, a) for a, b in pairs) / len(pairs)


@functools.lru_cache
def mnli_relation(name="roberta-large-mnli"):
    """relation(premise, hypothesis) -> (word, confidence) by a Hugging Face NLI model; loaded once. Extra: eval."""
    try:
        from transformers import pipeline
    except ImportError:
        raise UserError("NLI diversity needs the extra `eval`: pip install -e '.[eval]'")
    classify = pipeline("text-classification", model=name)

    def relation(premise, hypothesis):
        found = classify({"text": premise, "text_pair": hypothesis})
        found = found[0] if isinstance(found, list) else found
        return found["label"].lower(), found["score"]
    return relation


# ------------------------------------------------------------------------------------------------- samples of a policy

def mean_and_interval(values):
    """(mean, half width of the 95% normal interval) of independent values."""
    v = np.asarray(values, dtype=np.float64)
    return float(v.mean()), float(1.96 * v.std(ddof=1) / math.sqrt(len(v))) if len(v) > 1 else 0.0


def win_rate(ours, theirs):
    """Share of prompts where our score beats theirs, a tie counting half: (mean, half width of the 95% interval)."""
    a, b = np.asarray(ours), np.asarray(theirs)
    return mean_and_interval((a > b) + 0.5 * (a == b))


def sampled_kl(policy, reference, tokenizer, prompts, responses, temperature, batch_size=64):
    """sequence_kl of these responses of the policy, a list of numbers (not in the prompts' order)."""
    kl, examples = [], [Example(p + r, len(p)) for p, r in zip(prompts, responses)]
    for part in micro_batches(examples, batch_size):
        batch = collate(part, tokenizer.pad_id, policy.embed.weight.device)
        kl += sequence_kl(policy, reference, batch.tokens, batch.mask, temperature).tolist()
    return kl


@torch.no_grad()
def measure(policy, reference, tokenizer, prompts, rewards, max_new_tokens, temperature=1.0, seed=0, autocast=None):
    """One sample a prompt: means of each reward, sequence KL to the reference, length, share ended by EOS; and the texts.

    prompts: lists of ids; rewards: {name: function of load_reward}. What scripts log as eval/... while they train.
    """
    device = policy.embed.weight.device
    with autocast or torch.autocast(device.type, enabled=False):
        samples = generate(policy, prompts, max_new_tokens, temperature, seed=seed_for(seed, "evaluate"), tokenizer=tokenizer)
        responses = samples.responses()
        kl = sampled_kl(policy, reference, tokenizer, prompts, responses, temperature)
    scores = {name: reward(prompts, responses) for name, reward in rewards.items()}
    metrics = {f"eval/{name}": float(s.mean()) for name, s in scores.items()}
    metrics |= {"eval/kl": float(np.mean(kl)), "eval/length": float(np.mean([len(r) for r in responses])),
                "eval/ended": float(samples.finished.float().mean())}
    texts = [dict(prompt=tokenizer.decode(p), completion=tokenizer.decode(r, start=False),
                  **{n: float(s[i]) for n, s in scores.items()}) for i, (p, r) in enumerate(zip(prompts, responses))]
    return metrics, texts


def load_eval_prompts(file, config, records, tokenizer, model, rewards, run):
    """Prompts to sample on while training, as ids, and the rewards to measure there: (prompts, {name: function}).

    `file` holds them, and --eval_reward names a reward that is only measured. Without them, training on the built-in task's
    prompts is evaluated on its test prompts under the gold reward, and training on other data is not.
    """
    on_reviews = all(reviews.domain_of(r["prompt"]) for r in records[:10])
    if not (file or on_reviews) or config.num_eval_prompts == 0:
        return [], {}
    found = load_records(file or "reviews", "prompt", "test", config.num_eval_prompts, tokenizer=tokenizer)
    room = prompt_room(model, config.response_length)
    texts = [r["prompt"] for r in found]
    prompts = [encode_prompt(tokenizer, text, config.max_prompt_length or room, config.keep) for text in texts]
    if config.eval_reward or on_reviews:
        name = "gold" if config.eval_reward in ("", "gold") else "eval_reward"
        rewards = rewards | {name: load_reward(config.eval_reward or "gold", tokenizer, run.device)}
    return prompts, {name: functools.partial(reward, texts=texts) for name, reward in rewards.items()}


# ------------------------------------------------------------------------------------- a table over finished checkpoints

@dataclasses.dataclass
class Options:
    reference: str = "out/sft"       # folder that KL and win rate are taken against, and that best-of-N samples
    reward: str = "out/rm"           # learned reward: folder, gold or file.py:function; chooses in best-of-N
    gold: str = ""                   # the true reward, or the nearest thing; '' = gold on `reviews`, else none: --reward judges
    data: str = "reviews"            # prompts: `reviews` (its ID, OOD-near and OOD-far splits), or files NAME=FILE,NAME=FILE
    bon: int = 0                     # add a row for best-of-N of the reference, N = this
    skip_bad: bool = False           # skip bad rows and count them, instead of stopping at the first
    num_prompts: int = 250           # prompts a split, one sample each
    diversity_prompts: int = 50      # of the first split, with num_samples samples each (Kirk 2023: 500)
    num_samples: int = 16            # samples a prompt for per-input diversity (Kirk 2023: 16)
    sbert: bool = False              # SBERT diversity too (extra `eval`, downloads a model)
    nli: bool = False                # NLI diversity by roberta-large-mnli (likewise) instead of the exact one of `reviews`
    response_length: int = 48        # longest response in tokens
    temperature: float = 1.0         # of all samples
    seed: int = 0                    # of the samples
    device: str = "auto"             # cpu, cuda, cuda:1, ...; auto takes a GPU if there is one
    out: str = "out/evaluation"      # folder for table.md, table.json and samples.jsonl


class Setting:
    """What all policies of a table share: prompts by split, the reference, the rewards, the data's own answers' scores."""

    def __init__(self, options):
        self.options, device = options, pick_device(options.device)
        self.tokenizer = tokenizer = load_tokenizer(local_folder(options.reference))
        self.reference = Transformer.from_pretrained(options.reference).to(device)
        need_fit(self.reference, tokenizer)
        self.on_reviews = options.data == "reviews"
        learned = load_reward(options.reward, tokenizer, device)
        gold = options.gold or ("gold" if self.on_reviews else "")
        self.rewards = {"reward": learned} | ({"gold": load_reward(gold, tokenizer, device)} if gold else {})
        self.judge = "gold" if gold else "reward"                                      # who says which of two texts wins
        if self.on_reviews:
            sources = {split: ("reviews", split) for split in ("test", "ood_near", "ood_far")}
        else:
            sources = {name: (file, "") for name, file in named_files(options.data).items()}
        records = {name: load_records(file, "prompt", split, options.num_prompts, options.skip_bad, tokenizer=tokenizer)
                   for name, (file, split) in sources.items()}
        self.texts = {name: [r["prompt"] for r in own] for name, own in records.items()}
        room = prompt_room(self.reference, options.response_length)
        self.prompts = {name: [encode_prompt(tokenizer, text, room) for text in texts] for name, texts in self.texts.items()}
        self.first = next(iter(sources))                                               # in distribution
        written = [r.get("completion") for r in records[self.first]]
        self.written_scores = None
        if all(written):
            asked = self.texts[self.first]
            written = [encode_response(tokenizer, w, text) for w, text in zip(written, asked)]
            self.written_scores = self.rewards[self.judge](self.prompts[self.first], written, asked)

    def draw(self, model, split, K, n, purpose, limit=None):
        """K responses to each of a split's prompts, [P][K] lists of ids; with n > 1 each is the best of n of its own under the
        learned reward."""
        o, prompts = self.options, self.prompts[split][:limit]
        found = generate(model, prompts, o.response_length, o.temperature, num_samples=K * n, tokenizer=self.tokenizer,
                         seed=seed_for(o.seed, purpose)).responses()
        if n > 1:
            asked, texts = ([p for p in each for _ in range(K * n)] for each in (prompts, self.texts[split][:limit]))
            scores = self.rewards["reward"](asked, found, texts).view(-1, n)
            found = [found[i * n + int(best)] for i, best in enumerate(scores.argmax(1))]
        return [found[i:i + K] for i in range(0, len(found), K)]


def named_files(text):
    """"NAME=FILE,NAME=FILE" -> {name: file}; a file without a name is called by its stem."""
    pairs = [part.rpartition("=") for part in text.split(",") if part]
    return {name or Path(file).stem: file for name, _, file in pairs}


def table_row(setting, name, model, n=1):
    """(row, texts) of one policy, or of best-of-n of it: row {"method": name, column: (value, half width of its 95% interval
    over prompts, or None)}; "scores" holds the first split's rewards by the judge, prompt by prompt."""
    row, texts = {"method": name}, []
    for split, prompts in setting.prompts.items():
        responses = [own[0] for own in setting.draw(model, split, 1, n, split)]
        scores = {k: reward(prompts, responses, setting.texts[split]) for k, reward in setting.rewards.items()}
        row |= {f"{k}/{split}": mean_and_interval(s) for k, s in scores.items()}
        texts += [dict(method=name, split=split, prompt=x, completion=decode_response(setting.tokenizer, y, x),
                       **{k: float(s[i]) for k, s in scores.items()})
                  for i, (x, y) in enumerate(zip(setting.texts[split], responses))]
        if split == setting.first:
            row["scores"] = scores[setting.judge]
            row["kl"] = (bon_kl(n), None) if n > 1 else mean_and_interval(
                sampled_kl(model, setting.reference, setting.tokenizer, prompts, responses, setting.options.temperature))
            if setting.written_scores is not None:
                row["win_reference"] = win_rate(scores[setting.judge], setting.written_scores)
            row["ead_across"] = (across_input_diversity([[setting.tokenizer.decode(y, start=False)] for y in responses],
                                                        expectation_adjusted_distinct), None)
            row["length"] = mean_and_interval([len(y) for y in responses])
            row["ended"] = mean_and_interval([y[-1] == setting.tokenizer.eos_id for y in responses])
        else:
            ours, there = row[f"{setting.judge}/{setting.first}"][0], row[f"{setting.judge}/{split}"][0]
            row[f"gap/{split}"] = (ours - there, None)                                 # OOD gap: ID - OOD
    o = setting.options
    outputs = setting.draw(model, setting.first, o.num_samples, n, "diversity", o.diversity_prompts)
    outputs = [[setting.tokenizer.decode(y, start=False) for y in own] for own in outputs]
    metrics = {"ead": expectation_adjusted_distinct}
    if o.nli or setting.on_reviews:
        metrics["nli"] = functools.partial(nli_diversity, relation=mnli_relation() if o.nli else reviews.relation)
    if o.sbert:
        metrics["sbert"] = sbert_diversity
    row |= {f"{k}_per_input": mean_and_interval([metric(own) for own in outputs]) for k, metric in metrics.items()}
    return row, texts


def evaluate_policies(folders, options):
    """Evaluates checkpoint folders {name: folder}, the reference first, as "SFT", and best-of-N of it last, if asked for.
    Returns (rows of markdown_table, all sampled texts as records)."""
    for folder in [options.reference, *folders.values()]:
        need_folder(folder, "the script that makes it")
    setting = Setting(options)
    for folder in folders.values():
        need_same_ids("the policy", folder, setting.tokenizer)
    todo = [("SFT", options.reference, 1)] + [(name, f, 1) for name, f in folders.items() if Path(f) != Path(options.reference)]
    if options.bon:
        todo.append((f"best-of-{options.bon}", options.reference, options.bon))
    rows, samples = [], []
    for name, folder, n in todo:
        start = time.monotonic()
        model = setting.reference
        if folder != options.reference:
            model = Transformer.from_pretrained(folder).to(setting.reference.embed.weight.device)
            need_fit(model, setting.tokenizer)
        row, texts = table_row(setting, name, model, n)
        row["win_sft"] = win_rate(row["scores"], rows[0]["scores"]) if rows else (0.5, None)
        rows.append(row)
        samples += texts
        print(f"evaluated {name} in {time.monotonic() - start:.0f} s: "
              f"{setting.judge} {row[f'{setting.judge}/{setting.first}'][0]:.3f}, "
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


def columns_of(rows):
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
    folders = [a for a in itertools.takewhile(lambda a: not a.startswith("--"), sys.argv[1:])]
    options = parse_options(Options, "python -m nanorlhf.evaluate RUN [RUN...] [options]: a table over checkpoint folders.",
                            sys.argv[1 + len(folders):])
    try:
        names = [Path(f).name for f in folders]
        rows, samples = evaluate_policies({name if names.count(name) == 1 else f: f for name, f in zip(names, folders)}, options)
    except UserError as error:
        raise SystemExit(f"error: {error}")
    table = markdown_table(rows, columns_of(rows))
    print(table)
    write_json(Path(options.out) / "table.json", rows)
    write_records(Path(options.out) / "samples.jsonl", samples)
    with written_whole(Path(options.out) / "table.md") as temporary:
        temporary.write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
