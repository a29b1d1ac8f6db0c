"""Metrics: KL to the reference, best-of-n, diversity, calibration, win rates and intervals. Each function names its source.

They are the metrics of Kirk 2023, Rafailov 2023 (section 6) and Stiennon 2020, and a few that are common elsewhere, as functions
of numbers, texts or two models.
"""

import collections
import functools
import itertools
import math

import numpy as np
import torch

from nanorlhf import reviews
from nanorlhf.errors import UserError
from nanorlhf.training import seed_for

# ---- KL, best-of-n, perplexity --------------------------------------------------------------------------------------


@torch.no_grad()
def sequence_kl(policy, reference, tokens, mask, temperature=1.0, chunk=1024, other=None):
    """Returns the exact KL(policy || reference) of the next-token distributions, summed over response tokens, [B] nats.

    On the policy's own samples, its mean estimates the sequence KL (DPO section 6.1). Summing over the whole vocabulary has
    a lower variance than summing log-ratios of the sampled tokens. tokens, mask [B, T] as in Transformer.logprobs; other:
    tokens and mask of the same responses after other prompts, which the reference reads in their place.
    """
    where = mask[:, 1:]
    tokens_ref, mask_ref = other or (tokens, mask)
    h, h_ref = policy(tokens)[:, :-1][where], reference(tokens_ref)[:, :-1][mask_ref[:, 1:]]        # [N, D]
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


def perplexity(rows):
    """Returns exp of the mean negative log-likelihood per token. rows: (sum over tokens in nats, number of tokens) of each
    response; all tokens are pooled, so long responses weigh more. It counts how many equally likely tokens would be as hard to
    guess, from 1 up, and it says nothing across tokenizers. UserError if it is beyond all numbers."""
    if not sum(nll for nll, _ in rows) < 700 * sum(tokens for _, tokens in rows):      # NaN too
        raise UserError("the perplexity is no finite number: the model that reads the texts has diverged in training")
    return math.exp(sum(nll for nll, _ in rows) / sum(tokens for _, tokens in rows))


# ---- Diversity ------------------------------------------------------------------------------------------------------


def words_of(text):
    """Returns the words that EAD counts, as Kirk's code splits them: at spaces, after removing '.' and newlines."""
    return [w for w in text.replace(".", "").replace("\n", "").split(" ") if w]


def ngrams(words, n):
    """Returns all runs of n words, a list of tuples; [] if there are fewer words."""
    return [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]


def expectation_adjusted_distinct(texts, vocab_size=50257, first=None):
    """Returns the EAD of a set of texts (Liu 2022, as used by Kirk 2023): the number of distinct n-grams over the number
    expected from as many uniformly drawn tokens, averaged over n = 1..5. vocab_size is the same for every n, as in Kirk's
    code. Texts without words give 0.

    With that vocab_size EAD corrects no length: sets of shorter texts score higher, because fewer n-grams repeat less. `first`
    counts only the first so many words of each text, which makes policies of different lengths comparable.
    """
    words = [words_of(t)[:first] for t in texts]
    scores = []
    for n in range(1, min(5, first or 5) + 1):
        grams = [gram for w in words for gram in ngrams(w, n)]
        expected = -vocab_size * math.expm1(len(grams) * math.log1p(-1 / vocab_size))
        scores.append(len(set(grams)) / expected if grams else 0.0)
    return sum(scores) / len(scores)


def distinct_n(texts, n, first=None):
    """Returns distinct-n (Li 2016): the number of distinct n-grams of a set of texts over the number of all of them, 0 if there
    are none. The words are those that EAD counts. It falls with the number and the length of the texts: compare sets of equally
    many, and with `first` only the first so many words of each."""
    grams = [gram for text in texts for gram in ngrams(words_of(text)[:first], n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(text, n=4):
    """Returns seq-rep-n (Welleck 2020): the share of a text's n-grams that repeat earlier ones, 0 if it has none. The n-grams are
    of words, where the paper has tokens."""
    return 1 - distinct_n([text], n) if ngrams(words_of(text), n) else 0.0


def self_bleu(texts, first=None):
    """Returns Self-BLEU (Zhu 2018): the mean over two or more texts of the BLEU-4 of a text with all others as its references.
    It lies in [0, 1]; higher is LESS diverse. first: count only the first so many words of each text.

    BLEU is exp(mean over n = 1..4 of log p_n) times the brevity penalty (Papineni 2002). p_n is the share of the text's n-grams
    that are also in a reference, each at most as often as in the reference that has it most. The penalty of a text of c words is
    exp(1 - r / c), at most 1, where r is the length of the reference of the nearest length, the shorter of two. A number of
    matches of 0 becomes 0.1, as in NLTK's method 1. Orders that a text is too short for are left out.
    """
    words, scores = [words_of(t)[:first] for t in texts], []
    counts = [[collections.Counter(ngrams(w, n)) for n in range(1, 5)] for w in words]
    for i, w in enumerate(words):
        others, logs = [j for j in range(len(words)) if j != i], []
        for n in range(min(4, len(w))):
            matches = sum(min(count, max(counts[j][n][gram] for j in others)) for gram, count in counts[i][n].items())
            logs.append(math.log((matches or 0.1) / (len(w) - n)))
        r = min((len(words[j]) for j in others), key=lambda length: (abs(length - len(w)), length))
        penalty = math.exp(min(0.0, 1 - r / len(w))) if w else float(r == 0)
        scores.append(penalty * math.exp(sum(logs) / max(1, len(logs))))
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
    """Returns 1 - mean cosine similarity over unordered pairs of sentence embeddings (Kirk 2023). `model` is a name or a folder,
    which needs the extra `eval`, or a function texts -> array [N, d]. The default is Kirk's."""
    encode = model if callable(model) else sbert_encoder(model)
    e = np.asarray(encode(texts), dtype=np.float64)
    e /= np.maximum(np.linalg.norm(e, axis=1, keepdims=True), 1e-12)                   # a vector of zeros is like no other
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


# ---- Calibration ----------------------------------------------------------------------------------------------------


def calibration(margins, bins=10):
    """Returns how well a reward model's confidence says how often it is right, {"ece", "brier", "bins"}. margins: reward of the
    chosen response minus that of the rejected one, of each pair.

    Bradley-Terry's probability that the response of higher reward is the chosen one is the confidence, sigmoid(|margin|) from 1/2
    to 1. A margin of 0 is half right. Pairs are sorted by confidence into bins of equal counts (Nguyen 2015), pairs of equal
    confidence sharing their rights; bins: [(mean confidence, share right, number of pairs)]. ece: expected calibration error, the
    mean over pairs of |confidence - share right| of their bin (Guo 2017). Noise in the bins alone keeps it above 0 if pairs are
    few. brier: mean of (1 - sigmoid(margin))^2 (Brier 1950), 1/4 if all margins are 0.
    """
    margins = np.asarray(margins, dtype=np.float64)
    confidence = 1 / (1 + np.exp(-abs(margins)))
    order = np.argsort(confidence, kind="stable")
    _, group = np.unique(confidence, return_inverse=True)
    right = (np.bincount(group, (margins > 0) + 0.5 * (margins == 0)) / np.bincount(group))[group]
    parts = [part for part in np.array_split(order, bins) if len(part)]
    table = [(float(confidence[part].mean()), float(right[part].mean()), len(part)) for part in parts]
    return {"ece": sum(count * abs(sure - share) for sure, share, count in table) / len(margins),
            "brier": float(np.mean(np.where(margins > 0, 1 - confidence, confidence) ** 2)), "bins": table}


# ---- Means, intervals, win rates ------------------------------------------------------------------------------------


@functools.lru_cache
def t_quantile(df):
    """Returns the 97.5% quantile of Student's t with df >= 1 degrees of freedom, which need not be a whole number.

    With t = sqrt(df) tan(a) the density of the angle a is proportional to cos(a)^(df-1); the trapezoidal rule integrates it.
    """
    if df > 1e6:
        return 1.959964                                                                # the normal distribution's
    angle = np.linspace(0, min(math.pi / 2, 40 / math.sqrt(df)), 20001)
    density = np.cos(angle) ** (df - 1)
    share = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(df) * math.tan(np.interp(0.95 * share[-1], share, angle))


def alike(values):
    """Returns whether the numbers of an array are the same, or differ by rounding only."""
    return bool(np.ptp(values) <= 1e-12 * abs(values).max())


def mean_and_interval(values):
    """Returns (mean, half width of its 95% interval by Student's t) of independent values. The half width is 0 if the values are
    all the same or a single one: then they do not say how uncertain their mean is."""
    v = np.asarray(values, dtype=np.float64)
    half = t_quantile(len(v) - 1) * v.std(ddof=1) / math.sqrt(len(v)) if not alike(v) else 0.0
    return float(v.mean()), float(half)


def with_error(name, sums, counts=None, posts=None):
    """Returns {name: mean, name_se: its standard error} as evaluations log them. sums: one value per example; with counts the
    mean is that of sum / count over all that is counted (tokens, say), and its error the ratio estimator's. posts: what each
    example is about; examples of one post are not independent, so their sums are one value (None: all are independent). No
    error for a single value."""
    sums = np.asarray(sums, dtype=np.float64)
    counts = np.ones(len(sums)) if counts is None else np.asarray(counts, dtype=np.float64)
    if posts is not None:
        _, rows = np.unique(posts, return_inverse=True)
        sums, counts = np.bincount(rows, sums), np.bincount(rows, counts)
    mean, n = sums.sum() / counts.sum(), len(sums)
    metrics = {name: float(mean)}
    if n > 1:
        spread = math.sqrt((((sums - mean * counts) ** 2).sum()) * n / (n - 1))
        metrics[f"{name}_se"] = float(spread / counts.sum())
    return metrics


def difference_and_interval(a, b):
    """Returns (mean of a - mean of b, half width of its 95% interval by Welch's t) of two independent sets of values; the half
    width is 0 as in mean_and_interval. For values that belong together in pairs, take mean_and_interval of their differences."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    mean, half = float(a.mean() - b.mean()), 0.0
    if min(len(a), len(b)) > 1 and not (alike(a) and alike(b)):
        va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
        df = (va + vb) ** 2 / (va ** 2 / (len(a) - 1) + vb ** 2 / (len(b) - 1))        # Welch 1947
        half = float(t_quantile(df) * math.sqrt(va + vb))
    return mean, half


def within(mean, half, lowest=-math.inf, highest=math.inf):
    """Returns (mean, low end, high end) of the interval mean +- half, cut at the quantity's possible values. A half width of 0
    means that none is known: the ends are None."""
    return (mean, max(min(lowest, mean), mean - half), min(max(highest, mean), mean + half)) if half else (mean, None, None)


def bootstrap_interval(rows, statistic, draws=2000, seed=0):
    """Returns (statistic(rows), low end, high end) of its 95% percentile interval by the bootstrap (Efron 1979): the statistic of
    as many rows, drawn with replacement, `draws` times. The ends are None if all draws agree, as in `within`. rows: a list whose
    entries are independent; statistic: a function list of rows -> number. A paired comparison has pairs as rows.

    It fits sums, means and their ratios, such as perplexity. It does not fit counts of distinct things, such as EAD: a row that
    is drawn twice adds nothing new, so the draws lie below the value and their interval may not even hold it.
    """
    rng = np.random.Generator(np.random.Philox(key=seed_for(seed, "bootstrap")))
    drawn = rng.integers(0, len(rows), size=(draws, len(rows)))
    low, high = np.quantile([statistic([rows[i] for i in draw]) for draw in drawn], [0.025, 0.975]).tolist()
    return (float(statistic(rows)), low, high) if low < high else (float(statistic(rows)), None, None)


def share_interval(share, n):
    """Returns (share, low end, high end) of a share of n independent cases: Wilson's 95% interval (1927). It stays within [0, 1]
    and keeps a width at 0 and 1. For values between 0 and 1, such as wins with ties as 1/2, it is at most too wide."""
    z2 = 1.959964 ** 2
    middle, half = share + z2 / (2 * n), math.sqrt(z2 * (share * (1 - share) + z2 / (4 * n)) / n)
    return share, max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n))


def win_rate(ours, theirs):
    """Returns (share of prompts where our score beats theirs, low end, high end of its 95% interval); a tie is half a win."""
    a, b = np.asarray(ours), np.asarray(theirs)
    return share_interval(float(np.mean((a > b) + 0.5 * (a == b))), len(a))


def win_matrix(scores):
    """Returns {(a, b): (win rate of a over b, low end, high end of its 95% interval)} for all ordered pairs of names.

    scores: {name: [P] or [P, K] scores of one or K texts for each of the same P prompts}. The texts of two names must be drawn
    independently, because with the same random numbers equal policies write equal texts. A prompt's share is that of its K x K
    pairs of texts that a wins; a tie is half a win. win(a, b) + win(b, a) = 1. The interval is Wilson's if both have one text per
    prompt, as in win_rate, and otherwise Student's over the prompts' shares.
    """
    def win(a, b):
        a, b = (np.asarray(x, dtype=np.float64).reshape(len(x), -1) for x in (a, b))
        a, b = a[:, :, None], b[:, None, :]
        shares = ((a > b) + 0.5 * (a == b)).mean((1, 2))                               # [P]
        if a.size == b.size == len(shares):
            return share_interval(float(shares.mean()), len(shares))
        return within(*mean_and_interval(shares), 0, 1)
    return {(a, b): win(scores[a], scores[b]) for a, b in itertools.permutations(scores, 2)}
