"""Evaluation: rewards, KL to the reference, best-of-n, win rate, OOD gap, diversity; `python -m nanorlhf.evaluate RUN...`.

A reward here is a function (prompts, responses) -> float32 tensor [N], over lists of token ids; load_reward makes one from
a reward-model folder, from `gold` (the built-in task's exact reward) or from `file.py:function`.
"""

import importlib.util
import itertools
import math
from pathlib import Path

import numpy as np
import torch

from nanorlhf import reviews
from nanorlhf.data import Example, collate, encode_prompt, encode_response, load_records, load_tokenizer, micro_batches
from nanorlhf.generate import generate
from nanorlhf.model import RewardModel
from nanorlhf.run import UserError, seed_for

# ----------------------------------------------------------------------------------------------------------- rewards


def load_reward(spec, tokenizer, device, batch_size=128):
    """The function reward(prompts, responses) -> float32 tensor [N] that `spec` names.

    `gold`; `file.py:function` with function(prompts: list[str], completions: list[str]) -> list[float]; or a reward-model
    folder, whose tokens are reused where the tokenizers agree, so that it reads exactly what the policy wrote.
    """
    if spec == "gold":
        return _text_reward(lambda ps, cs: [reviews.gold_reward(p, c) for p, c in zip(ps, cs)], tokenizer, spec)
    if ".py:" in spec:
        return _text_reward(_user_function(spec), tokenizer, spec)
    if not (Path(spec) / "config.json").exists():
        raise UserError(f"--reward {spec}: not a reward-model folder (train_rm.py makes one), `gold` or file.py:function")
    model, own = RewardModel.from_pretrained(spec).to(device).eval(), load_tokenizer(spec)
    same = own.ranks == tokenizer.ranks and own.eos_id == tokenizer.eos_id

    @torch.no_grad()
    def reward(prompts, responses):
        if not same:
            ended = [r[-1:] == [tokenizer.eos_id] for r in responses]
            responses = [encode_response(own, tokenizer.decode(r))[:None if e else -1] for r, e in zip(responses, ended)]
            prompts = [encode_prompt(own, tokenizer.decode(p)) for p in prompts]
        examples = [Example(p + r, len(p)) for p, r in zip(prompts, responses)]
        out = torch.empty(len(examples))
        order = iter(micro_batches(range(len(examples)), batch_size, length=lambda i: len(examples[i].tokens)))
        for rows in order:
            batch = collate([examples[i] for i in rows], own.pad_id, device)
            out[list(rows)] = model.score(batch.tokens, batch.lengths).cpu()
        return out
    return reward


def _text_reward(function, tokenizer, spec):
    def reward(prompts, responses):
        values = function([tokenizer.decode(p) for p in prompts], [tokenizer.decode(r) for r in responses])
        try:
            values = torch.tensor([float(v) for v in values])
        except (TypeError, ValueError):
            raise UserError(f"--reward {spec}: did not return a list of numbers")
        if len(values) != len(prompts) or not torch.isfinite(values).all():
            raise UserError(f"--reward {spec}: {len(prompts)} finite numbers expected, got {len(values)}: {values.tolist()[:4]}")
        return values
    return reward


def _user_function(spec):
    file, name = spec.rsplit(":", 1)
    if not Path(file).is_file():
        raise UserError(f"--reward {spec}: no file {file}")
    module_spec = importlib.util.spec_from_file_location("user_reward", file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise UserError(f"--reward {spec}: {file} has no function {name}")
    return getattr(module, name)


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


def sbert_diversity(texts, model="sentence-transformers/bert-large-nli-stsb-mean-tokens"):
    """1 - mean cosine similarity over unordered pairs of sentence embeddings (Kirk 2023). Extra: eval. `model` may be a
    name, or a function texts -> array [N, d]."""
    if not callable(model):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise UserError("SBERT diversity needs the extra `eval`: pip install -e '.[eval]'")
        model = SentenceTransformer(model).encode
    e = np.asarray(model(texts), dtype=np.float64)
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


def mnli_relation(name="roberta-large-mnli"):
    """relation(premise, hypothesis) -> (word, confidence) by a Hugging Face NLI model. Extra: eval."""
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


@torch.no_grad()
def measure(policy, reference, tokenizer, prompts, rewards, max_new_tokens, temperature=1.0, seed=0, autocast=None,
            batch_size=128):
    """One sample a prompt: means of each reward, sequence KL to the reference, length, share ended by EOS; and the texts.

    prompts: lists of ids; rewards: {name: function of load_reward}. What scripts log as eval/... while they train.
    """
    device = policy.embed.weight.device
    with autocast or torch.autocast(device.type, enabled=False):
        samples = generate(policy, prompts, max_new_tokens, temperature, seed=seed_for(seed, "evaluate"), tokenizer=tokenizer)
        responses = samples.responses()
        examples = [Example(p + r, len(p)) for p, r in zip(prompts, responses)]
        kl = []
        for part in micro_batches(examples, batch_size):
            batch = collate(part, tokenizer.pad_id, device)
            kl += sequence_kl(policy, reference, batch.tokens, batch.mask, temperature).tolist()
    scores = {name: reward(prompts, responses) for name, reward in rewards.items()}
    metrics = {f"eval/{name}": float(s.mean()) for name, s in scores.items()}
    metrics |= {"eval/kl": float(np.mean(kl)), "eval/length": float(np.mean([len(r) for r in responses])),
                "eval/ended": float(samples.finished.float().mean())}
    texts = [dict(prompt=tokenizer.decode(p), completion=tokenizer.decode(r), **{n: float(s[i]) for n, s in scores.items()})
             for i, (p, r) in enumerate(zip(prompts, responses))]
    return metrics, texts


def load_eval_prompts(config, records, tokenizer, model, rewards, run):
    """Prompts to sample on while training, as ids, and the rewards to measure there: (prompts, {name: function}).

    --eval_prompts names them and --eval_reward a reward that is only measured. Without them, training on the built-in
    task's prompts is evaluated on its test prompts under the gold reward, and training on other data is not.
    """
    on_reviews = all(reviews.domain_of(r["prompt"]) for r in records[:10])
    if not (config.eval_prompts or on_reviews) or config.num_eval_prompts == 0:
        return [], {}
    found = load_records(config.eval_prompts or "reviews", "prompt", "test", config.num_eval_prompts)
    room = model.config.context - config.response_length
    prompts = [encode_prompt(tokenizer, r["prompt"], config.max_prompt_length or room, config.keep) for r in found]
    if config.eval_reward or on_reviews:
        name = "gold" if config.eval_reward in ("", "gold") else "eval_reward"
        rewards = rewards | {name: load_reward(config.eval_reward or "gold", tokenizer, run.device)}
    return prompts, rewards
