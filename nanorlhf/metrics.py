"""Metrics: KL to the reference, best-of-n, diversity, win rate and intervals. Each function names its source.

They are the metrics of Kirk 2023, Rafailov 2023 (section 6) and Stiennon 2020, as functions of numbers, texts or two models.
"""

import functools
import itertools
import math

import numpy as np
import torch

from nanorlhf import reviews
from nanorlhf.errors import UserError

# ---- KL and best-of-n -----------------------------------------------------------------------------------------------


@torch.no_grad()
def sequence_kl(policy, reference, tokens, mask, temperature=1.0, chunk=1024):
    """Returns the exact KL(policy || reference) of the next-token distributions, summed over response tokens, [B] nats.

    On the policy's own samples, its mean estimates the sequence KL (DPO section 6.1). Summing over the whole vocabulary has
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
    """Returns KL(best-of-n || base) = log n - (n-1)/n nats (Stiennon 2020): exact without ties, an upper bound with them."""
    return math.log(n) - (n - 1) / n


def best_of_n_estimate(scores, n, values=None):
    """Returns an unbiased estimate of E[value of the best of n], best by score, from a pool of N = len(scores) >= n samples.

    The i-th smallest of N scores is the best in C(i-1, n-1) of the C(N, n) subsets. `values` (default: the scores) are
    averaged: pass the true reward to see what best-of-n under a proxy really gains. Equal scores share their weight.
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


# ---- Diversity ------------------------------------------------------------------------------------------------------


def expectation_adjusted_distinct(texts, vocab_size=50257):
    """Returns the EAD of a set of texts (Liu 2022, as used by Kirk 2023): the number of distinct n-grams over the number
    expected from as many uniformly drawn tokens, averaged over n = 1..5. Words are split at spaces after removing '.' and
    newlines; vocab_size is the same for every n, as in Kirk's code. Texts without words give 0."""
    words = [[w for w in t.replace(".", "").replace("\n", "").split(" ") if w] for t in texts]
    scores = []
    for n in range(1, 6):
        grams = [tuple(w[i:i + n]) for w in words for i in range(len(w) - n + 1)]
        expected = -vocab_size * math.expm1(len(grams) * math.log1p(-1 / vocab_size))
        scores.append(len(set(grams)) / expected if grams else 0.0)
    return sum(scores) / len(scores)


def per_input_diversity(outputs, metric):
    """Returns the mean over inputs of the metric of one input's K outputs. outputs: list of lists of texts."""
    return sum(metric(texts) for texts in outputs) / len(outputs)


def across_input_diversity(outputs, metric):
    """Returns the metric of the first outputs of all inputs."""
    return metric([texts[0] for texts in outputs])


@functools.lru_cache
def sbert_encoder(name):
    """Loads a sentence-transformers model once; returns its function texts -> array [N, d]. Needs the extra `eval`."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError("SBERT diversity needs the extra `eval`: pip install -e '.[eval]'")
    return SentenceTransformer(name).encode


def sbert_diversity(texts, model="sentence-transformers/bert-large-nli-stsb-mean-tokens"):
    """Returns 1 - mean cosine similarity over unordered pairs of sentence embeddings (Kirk 2023). `model` is a name, which
    needs the extra `eval`, or a function texts -> array [N, d]."""
    encode = model if callable(model) else sbert_encoder(model)
    e = np.asarray(encode(texts), dtype=np.float64)
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    return float(1 - np.mean([e[i] @ e[j] for i, j in itertools.combinations(range(len(e)), 2)]))


def nli_diversity(texts, relation=reviews.relation):
    """Returns the mean over unordered pairs of the two directions' sum of +1 for contradiction, 0 for neutral and -1 for
    entailment (Stasaski & Hearst 2022; Kirk 2023). The range is [-2, 2]; higher is more diverse.

    relation(premise, hypothesis) returns one of these words, or (word, confidence). The default is exact on the built-in
    task; mnli_relation() is the papers' roberta-large-mnli. Kirk's released code returns 1 - mean, which flips the sign;
    the published numbers match the unflipped mean, as here.
    """
    values = {"contradiction": 1.0, "neutral": 0.0, "entailment": -1.0}

    def value(premise, hypothesis):
        answer = relation(premise, hypothesis)
        word, confidence = answer if isinstance(answer, tuple) else (answer, 1.0)
        return values[word] * confidence
    pairs = list(itertools.combinations(texts, 2))
    return sum(value(a, b) + value(b, a) for a, b in pairs) / len(pairs)


@functools.lru_cache
def mnli_relation(name="roberta-large-mnli"):
    """Loads a Hugging Face NLI model once: relation(premise, hypothesis) -> (word, confidence). Needs the extra `eval`."""
    try:
        from transformers import pipeline
    except ImportError:
        raise UserError("NLI diversity needs the extra `eval`: pip install -e '.[eval]'")
    classify = pipeline("text-classification", model=name)

    def relation(premise, hypothesis):
        answer = classify({"text": premise, "text_pair": hypothesis})
        answer = answer[0] if isinstance(answer, list) else answer
        return answer["label"].lower(), answer["score"]
    return relation


# ---- Means, intervals, win rates ------------------------------------------------------------------------------------


def mean_and_interval(values):
    """Returns (mean, half width of the 95% normal interval) of independent values."""
    v = np.asarray(values, dtype=np.float64)
    return float(v.mean()), float(1.96 * v.std(ddof=1) / math.sqrt(len(v))) if len(v) > 1 else 0.0


def win_rate(ours, theirs):
    """Returns (mean, half width of the 95% interval) of the share of prompts where our score beats theirs; a tie is half."""
    a, b = np.asarray(ours), np.asarray(theirs)
    return mean_and_interval((a > b) + 0.5 * (a == b))
