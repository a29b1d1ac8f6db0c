"""The sentiment of a text, in [-1, 1]: what the policies are trained on, and another judge that none of them is trained on.

    reward(prompts, completions)   fitted on the 6,000 labelled IMDb training reviews
    judge(prompts, completions)    fitted on the 10,662 Rotten Tomatoes sentences: other people's words, other labels

Both see the completion alone and are logistic regressions on which words and word pairs occur in it. The value is
2 p(positive) - 1, so that a response that never ends, which PPO scores with -1, is worth as much as the worst one.
They are fitted at first use from the files in $DATA and kept in $OUT. `python sentiment.py` prints their accuracies.
"""

import functools
import gzip
import json
import os
import re
from pathlib import Path

import torch

FEATURES, LEAST, SHORT = 20000, 4, 40


def words_and_pairs(text):
    words = re.findall(r"[a-z']+|[!?]", text.lower().replace("<br />", " "))
    return set(words) | {f"{a} {b}" for a, b in zip(words, words[1:])}


def norm(n):
    """Square root of the number of known features, at least SHORT: or else one strong word alone would be the best text."""
    return max(n, SHORT) ** 0.5


def matrix(texts, index):
    """[N, F] of 0 and 1 / norm, sparse: a row has length 1 whatever the text's length, less if it is very short."""
    rows = [[index[w] for w in words_and_pairs(t) if w in index] for t in texts]
    places = torch.tensor([[i, j] for i, row in enumerate(rows) for j in row]).view(-1, 2).T
    values = torch.tensor([1 / norm(len(row)) for row in rows for _ in row])
    return torch.sparse_coo_tensor(places, values, (len(texts), len(index)), check_invariants=False).coalesce()


def fit(texts, labels, decay=3e-5):
    """L2-regularised logistic regression by L-BFGS. Returns {feature: weight} and the bias."""
    count = {}
    for text in texts:
        for w in words_and_pairs(text):
            count[w] = count.get(w, 0) + 1
    kept = sorted((w for w in count if count[w] >= LEAST), key=lambda w: (-count[w], w))[:FEATURES]
    index = {w: i for i, w in enumerate(kept)}
    X, y = matrix(texts, index), torch.tensor(labels, dtype=torch.float32)
    w, b = torch.zeros(len(index), requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        z = (X @ w[:, None])[:, 0] + b
        loss = torch.nn.functional.binary_cross_entropy_with_logits(z, y) + decay / 2 * (w ** 2).sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    return dict(zip(kept, w.tolist())), b.item()


def read(name):
    """(texts, labels) of a data set in $DATA."""
    folder = Path(os.environ["DATA"]) / "sentiment"
    if name == "rotten_tomatoes":
        parts = [(folder / f"rt-polarity.{s}").read_text(encoding="utf-8").strip().split("\n") for s in ("neg", "pos")]
        return parts[0] + parts[1], [0] * len(parts[0]) + [1] * len(parts[1])
    rows = [json.loads(r) for r in gzip.decompress((folder / f"{name}.jsonl.gz").read_bytes()).split(b"\n") if r.strip()]
    return [r["text"] for r in rows], [int(r["label"] == "pos") for r in rows]


@functools.lru_cache
def classifier(name):
    cache = Path(os.environ["OUT"]) / f"{name}.json"
    if not cache.exists():
        cache.write_text(json.dumps(fit(*read(name))))
    return json.loads(cache.read_text())


def scores(name, texts):
    weights, bias = classifier(name)
    out = []
    for text in texts:
        known = [weights[w] for w in words_and_pairs(text) if w in weights]
        out.append(bias + sum(known) / norm(len(known)))
    return (2 * torch.sigmoid(torch.tensor(out)) - 1).tolist()


def reward(prompts, completions):
    return scores("imdb_train_6000", completions)


def judge(prompts, completions):
    return scores("rotten_tomatoes", completions)


if __name__ == "__main__":
    test, labels = read("imdb_test_2000")
    first = [" ".join(t.replace("<br />", " ").split()[:25]) for t in test]
    rotten, rotten_labels = read("rotten_tomatoes")
    heldout = [json.loads(r) for r in open(Path(os.environ["OUT"]) / "heldout.jsonl")]
    short, short_labels = [r["completion"] for r in heldout], [int(r["label"] == "pos") for r in heldout]

    def line(name, on, texts, labels):
        right = [(s > 0) == bool(y) for s, y in zip(scores(name, texts), labels)]
        p, n = sum(right) / len(right), len(right)
        print(f"{name} on {n} {on}: {p:.1%} ± {1.96 * (p * (1 - p) / n) ** 0.5:.1%}")
    for name in ("imdb_train_6000", "rotten_tomatoes"):
        line(name, "test reviews", test, labels)
        line(name, "first 25 words of test reviews", first, labels)
        line(name, "held-out completions, labelled as their review", short, short_labels)
    line("imdb_train_6000", "Rotten Tomatoes sentences", rotten, rotten_labels)
    a, b = torch.tensor([scores("imdb_train_6000", short), scores("rotten_tomatoes", short)])
    print(f"correlation of the two on held-out completions: {torch.corrcoef(torch.stack([a, b]))[0, 1]:.2f}; "
          f"means {a.mean():.2f} and {b.mean():.2f}, standard deviations {a.std():.2f} and {b.std():.2f}")
