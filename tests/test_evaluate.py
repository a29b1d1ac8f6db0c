"""Tests of metrics.py, evaluate.py and rewards.py: measures against direct computations, and good and bad rewards."""

import itertools
import json
import math
import random

import numpy as np
import pytest
import torch

from nanorlhf import evaluate, reviews
from nanorlhf.data import Example, collate, encode_prompt, encode_response
from nanorlhf.errors import UserError
from nanorlhf.evaluate import measure
from nanorlhf.generate import generate
from nanorlhf.metrics import (across_input_diversity, best_of_n_estimate, bon_kl, expectation_adjusted_distinct,
                              mean_and_interval, nli_diversity, per_input_diversity, sbert_diversity, sequence_kl, win_rate)
from nanorlhf.model import ModelConfig, RewardModel, Transformer
from nanorlhf.rewards import load_reward
from nanorlhf.tokenizer import load_tokenizer

CPU = torch.device("cpu")


# ---- Best of n ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, kl", [(1, 0.0), (4, 0.64), (8, 1.20), (16, 1.84), (64, 3.17), (128, 3.86)])
def test_bon_kl_has_the_published_values(n, kl):
    assert bon_kl(n) == pytest.approx(kl, abs=0.006)
    assert bon_kl(n) == pytest.approx(math.log(n) - (n - 1) / n, abs=1e-15)


def test_bon_kl_is_the_kl_of_the_maximum_of_n_uniform_draws():
    """Without ties, the winner's density relative to the base is p = n u^(n-1); the test integrates p log p."""
    u = (np.arange(200_000) + 0.5) / 200_000
    for n in (2, 5):
        assert np.mean(n * u ** (n - 1) * np.log(n * u ** (n - 1))) == pytest.approx(bon_kl(n), abs=1e-4)


def by_enumeration(scores, n, values):
    """Returns the mean over all subsets of n and, within each, over all samples that share its best score."""
    means = []
    for subset in itertools.combinations(range(len(scores)), n):
        best = max(scores[i] for i in subset)
        winners = [values[i] for i in subset if scores[i] == best]
        means.append(sum(winners) / len(winners))
    return sum(means) / len(means)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("N", [1, 2, 5, 8])
def test_best_of_n_estimate_is_the_mean_over_all_subsets(N, ties):
    """Trap 19: not one maximum of the pool; and it takes the true reward of the proxy's choice, not the proxy's score."""
    rng = random.Random(N)
    scores = [rng.randrange(3) if ties else rng.random() for _ in range(N)]
    values = [rng.gauss(0, 1) for _ in range(N)]
    for n in range(1, N + 1):
        assert best_of_n_estimate(scores, n) == pytest.approx(by_enumeration(scores, n, scores), abs=1e-12)
        assert best_of_n_estimate(scores, n, values) == pytest.approx(by_enumeration(scores, n, values), abs=1e-12)


def test_best_of_n_estimate_has_its_closed_forms_in_large_pools():
    scores = list(np.random.default_rng(0).normal(size=2000))
    assert best_of_n_estimate(scores, 1) == pytest.approx(np.mean(scores), abs=1e-9)
    assert best_of_n_estimate(scores, 2000) == pytest.approx(max(scores), abs=1e-9)
    assert best_of_n_estimate(range(1, 1001), 10) == pytest.approx(10 * 1001 / 11, rel=1e-9)  # E max of n of 1..N
    assert best_of_n_estimate([3.0] * 50, 7, list(range(50))) == pytest.approx(24.5)


@pytest.mark.parametrize("scores, n, values", [([1, 2], 3, None), ([1, 2], 0, None), ([1, 2], 1, [1])])
def test_best_of_n_estimate_rejects_impossible_arguments(scores, n, values):
    with pytest.raises(ValueError):
        best_of_n_estimate(scores, n, values)


# ---- Diversity ------------------------------------------------------------------------------------------------------


def test_ead_of_16_identical_texts_of_6_words_is_a_sixteenth():
    assert expectation_adjusted_distinct(["the cat sat on the mat."] * 16) != pytest.approx(0.0625, abs=1e-3)  # two "the"
    assert expectation_adjusted_distinct(["a cat sat on the mat."] * 16) == pytest.approx(0.0625, abs=1e-3)


def test_ead_equals_its_formula():
    texts, V = ["a b c.", "a b\nd e f g", "", "x"], 50
    words = [["a", "b", "c"], ["a", "bd", "e", "f", "g"], [], ["x"]]
    expected = []
    for n in range(1, 6):
        grams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
        expected.append(len(set(grams)) / (V * (1 - ((V - 1) / V) ** len(grams))) if grams else 0.0)
    assert expectation_adjusted_distinct(texts, V) == pytest.approx(sum(expected) / 5, rel=1e-12)
    assert expectation_adjusted_distinct([]) == expectation_adjusted_distinct([""]) == 0.0


def test_ead_of_distinct_words_is_about_1_and_repetition_lowers_it():
    texts = [" ".join(f"w{i}" for i in range(50 * k, 50 * k + 50)) for k in range(4)]
    assert expectation_adjusted_distinct(texts) == pytest.approx(1.0, abs=0.01)
    assert expectation_adjusted_distinct(texts[:1] * 4) < expectation_adjusted_distinct(texts[:2] * 2) < 0.6


def test_diversity_is_measured_per_input_and_across_first_outputs():
    """Across inputs, the set is that of the first outputs, not of all outputs pooled."""
    outputs = [["a", "b", "c"], ["a", "a", "a"]]
    assert per_input_diversity(outputs, lambda texts: len(set(texts))) == 2.0
    assert across_input_diversity(outputs, lambda texts: tuple(texts)) == ("a", "a")


def test_sbert_diversity_is_1_minus_the_mean_cosine_of_unordered_pairs():
    vectors = {"x": [1.0, 0.0], "y": [0.0, 2.0], "-x": [-3.0, 0.0], "xy": [1.0, 1.0]}

    def encode(texts):
        return np.array([vectors[t] for t in texts])

    assert sbert_diversity(["x", "x"], encode) == pytest.approx(0.0)
    assert sbert_diversity(["x", "y"], encode) == pytest.approx(1.0)
    assert sbert_diversity(["x", "-x"], encode) == pytest.approx(2.0)
    assert sbert_diversity(["x", "y", "xy"], encode) == pytest.approx(1 - (0 + 2 * math.sqrt(0.5)) / 3)


def test_nli_diversity_is_higher_for_contradictions():
    """Higher is more diverse: contradiction +1, entailment -1, the two directions added, unordered pairs averaged."""
    good, bad, other = " The plot is good.", " The plot is bad.", " The ending is good."
    assert nli_diversity([good, bad]) == 2.0
    assert nli_diversity([good, good]) == -2.0
    assert nli_diversity([good, other]) == 0.0
    assert nli_diversity([good, good + other]) == -1.0  # entailed in one direction only
    assert nli_diversity([good, bad, other]) == pytest.approx(2 / 3)
    answers = {("a", "b"): ("contradiction", 0.9), ("b", "a"): ("entailment", 0.4)}
    assert nli_diversity(["a", "b"], lambda p, h: answers[p, h]) == pytest.approx(0.5)


# ---- Rates and intervals --------------------------------------------------------------------------------------------


def test_win_rate_counts_a_tie_as_half():
    rate, half = win_rate([1, 2, 3, 4], [0, 2, 4, 3])
    assert rate == 0.625
    assert half == pytest.approx(1.96 * np.std([1, 0.5, 0, 1], ddof=1) / 2)
    assert win_rate([1.0], [0.0]) == (1.0, 0.0)
    ours, theirs = np.random.default_rng(0).normal(size=(2, 100))
    assert win_rate(ours, theirs)[0] + win_rate(theirs, ours)[0] == pytest.approx(1)


def test_the_interval_covers_the_mean_in_about_95_percent_of_trials():
    rng = np.random.default_rng(1)
    inside = []
    for _ in range(1000):
        mean, half = mean_and_interval(rng.normal(3, 2, size=50))
        inside.append(abs(mean - 3) < half)
    assert 0.92 < np.mean(inside) < 0.97


# ---- KL -------------------------------------------------------------------------------------------------------------


def tiny(seed, vocab=12, std=0.5):
    return Transformer(
        ModelConfig(
            vocab_size=vocab,
            context=16,
            width=8,
            layers=1,
            heads=2,
            kv_heads=2,
            head_dim=4,
            ffn=16,
            eos_id=10,
            pad_id=11,
            init_std=std,
        ),
        seed,
    )


def test_sequence_kl_is_the_sum_of_full_vocabulary_kls_over_response_tokens():
    policy, reference = tiny(0), tiny(1)
    rows = [Example([1, 2, 3, 4, 10], 2), Example([5, 6, 7, 8, 9, 1, 10], 1), Example([3, 10], 1)]
    batch = collate(rows, 11)
    for temperature in (1.0, 0.7):
        found = sequence_kl(policy, reference, batch.tokens, batch.mask, temperature, chunk=2)
        for b, row in enumerate(rows):
            total = 0.0
            for t in range(row.prompt_length, len(row.tokens)):
                p, q = (
                    (m.logits(m(torch.tensor([row.tokens[:t]])))[0, -1].double() / temperature).softmax(-1).tolist()
                    for m in (policy, reference)
                )
                total += sum(a * math.log(a / c) for a, c in zip(p, q))
            assert found[b].item() == pytest.approx(total, rel=1e-4)
    assert (found > 0).all()


def test_sequence_kl_is_0_at_the_reference_and_ignores_padding():
    policy, reference = tiny(0), tiny(1)
    rows = [Example([1, 2, 3, 4, 10], 2), Example([5, 6, 7, 8, 9, 1, 10], 1)]
    batch = collate(rows, 11)
    assert torch.equal(sequence_kl(policy, policy, batch.tokens, batch.mask), torch.zeros(2))
    other = collate(rows, 10)
    assert torch.equal(
        sequence_kl(policy, reference, batch.tokens, batch.mask), sequence_kl(policy, reference, other.tokens, other.mask)
    )
    nothing = torch.zeros_like(batch.mask)
    assert torch.equal(sequence_kl(policy, reference, batch.tokens, nothing), torch.zeros(2))


@torch.no_grad()
def test_mean_sequence_kl_on_samples_agrees_with_the_k1_estimate():
    """Both estimate the same number, k1 with more noise. Neither may have the wrong sign or direction."""
    policy, reference = tiny(0, std=0.3), tiny(1, std=0.3)
    prompt = [1, 2, 3]
    samples = generate(policy, [prompt], 8, num_samples=1500, seed=0)
    batch = collate([Example(prompt + r, 3) for r in samples.responses()], 11)
    exact = sequence_kl(policy, reference, batch.tokens, batch.mask)
    k1 = (policy.logprobs(batch.tokens, batch.mask) - reference.logprobs(batch.tokens, batch.mask)).sum(1)
    error = float((exact - k1).std() / math.sqrt(len(k1)))
    assert float(exact.mean()) == pytest.approx(float(k1.mean()), abs=4 * error)
    assert exact.mean() > 8 * error and exact.std() < k1.std()


# ---- Rewards --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("reviews")


@pytest.fixture(scope="module")
def texts(tokenizer):
    """Returns (prompts, completions, prompt ids, completion ids). The last completion is truncated before its EOS."""
    rows = reviews.records("train", 6)
    prompts, completions = [r["prompt"] for r in rows], [r["completion"] for r in rows]
    responses = [encode_response(tokenizer, c) for c in completions]
    responses[-1] = responses[-1][:-4]
    completions[-1] = tokenizer.decode(responses[-1])
    return prompts, completions, [encode_prompt(tokenizer, p) for p in prompts], responses


def test_gold_reward_of_ids_is_the_gold_reward_of_their_text(tokenizer, texts):
    prompts, completions, prompt_ids, responses = texts
    found = load_reward("gold", tokenizer, CPU)(prompt_ids, responses)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([reviews.gold_reward(p, c) for p, c in zip(prompts, completions)], abs=1e-6)


def test_a_user_function_gets_texts_without_eos(tokenizer, texts, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "seen = []\ndef score(prompts, completions):\n    seen.append((prompts, completions))\n"
        "    return [len(c) + 0.5 for c in completions]\n"
    )
    prompts, completions, prompt_ids, responses = texts
    found = load_reward(f"{file}:score", tokenizer, CPU)(prompt_ids, responses)
    assert found.tolist() == [len(c) + 0.5 for c in completions]
    file.write_text(
        "def score(prompts, completions):\n    assert prompts[0].startswith('Review of the')\n"
        "    assert not any('<|' in c for c in completions)\n    return [1] * len(prompts)\n"
    )
    assert load_reward(f"{file}:score", tokenizer, CPU)(prompt_ids, responses).tolist() == [1.0] * 6


@pytest.mark.parametrize(
    "code, says",
    [
        ("def score(p, c): return [1.0]", "6 finite numbers expected, got 1"),
        ("def score(p, c): return [float('nan')] * len(p)", "finite numbers expected"),
        ("def score(p, c): return [float('inf')] * len(p)", "finite numbers expected"),
        ("def score(p, c): return None", "did not return a list of numbers"),
        ("def score(p, c): return ['good'] * len(p)", "did not return a list of numbers"),
        ("def score(p, c):\n    x = 1\n    raise RuntimeError('two\\nlines')", "RuntimeError: two lines (mine.py:3)"),
        ("def score(p): return [1.0]", "TypeError"),
        ("def other(p, c): return [1.0]", "has no function score"),
        ("score = 3", "has no function score"),
        ("def score(p, c) return", "SyntaxError"),
        ("import no_such_module_anywhere", "ModuleNotFoundError"),
    ],
)
def test_a_failing_user_function_gives_a_one_line_error_that_names_it(tokenizer, texts, tmp_path, code, says):
    file = tmp_path / "mine.py"
    file.write_text(code)
    with pytest.raises(UserError) as error:
        load_reward(f"{file}:score", tokenizer, CPU)(*texts[2:])
    assert says in str(error.value) and f"{file}:score" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("spec, says", [("./nowhere/rm", "not a reward-model folder"), ("nowhere.py:score", "no file nowhere.py")])
def test_a_missing_reward_gives_a_one_line_error(tokenizer, spec, says):
    with pytest.raises(UserError, match=says):
        load_reward(spec, tokenizer, CPU)


def reward_folder(folder, tokenizer, seed=0):
    model = RewardModel(
        ModelConfig(
            vocab_size=tokenizer.vocab_size,
            context=128,
            width=16,
            layers=1,
            heads=2,
            kv_heads=2,
            head_dim=8,
            ffn=32,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            init_std=0.3,
        ),
        seed,
    )
    model.reward_mean, model.reward_std = 0.3, 1.7
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return model


@torch.no_grad()
def test_a_reward_model_with_the_policys_tokenizer_reads_its_ids_unchanged(tokenizer, texts, tmp_path):
    """Trap 4: even ids that no encoder would choose (a word spelt in bytes), with or without EOS, at any batch size."""
    model = reward_folder(tmp_path, tokenizer)
    _, _, prompt_ids, responses = texts
    spelt = [i for byte in b" The plot" for i in tokenizer.encode(chr(byte))] + [tokenizer.eos_id]
    assert tokenizer.decode(spelt) == " The plot" and len(spelt) > len(encode_response(tokenizer, " The plot"))
    responses = responses[:-1] + [spelt]
    expected = [(model(torch.tensor([p + r]))[0, -1].item() - 0.3) / 1.7 for p, r in zip(prompt_ids, responses)]
    for size in (128, 2):
        found = load_reward(str(tmp_path), tokenizer, CPU, batch_size=size)(prompt_ids, responses)
        assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert not found.requires_grad


@torch.no_grad()
def test_a_reward_model_with_another_tokenizer_reads_the_text_in_its_own_tokens(tokenizer, texts, tmp_path):
    from nanorlhf.tokenizer import train_bpe

    own = train_bpe(["the plot is good and the film was not bad ; review of the book"] * 20, 300)
    model = reward_folder(tmp_path, own)
    prompts, completions, prompt_ids, responses = texts
    found = load_reward(str(tmp_path), tokenizer, CPU)(prompt_ids, responses)
    for i in range(6):
        row = own.encode(prompts[i]) + own.encode(completions[i]) + ([] if i == 5 else [own.eos_id])  # truncated
        assert found[i].item() == pytest.approx((model(torch.tensor([row]))[0, -1].item() - 0.3) / 1.7, abs=1e-5)


def test_a_language_model_is_rejected_as_a_reward_model(tokenizer, tmp_path):
    tiny(0, vocab=tokenizer.vocab_size).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no reward model"):
        load_reward(str(tmp_path), tokenizer, CPU)


# ---- Measuring a policy ---------------------------------------------------------------------------------------------


def test_measure_reports_the_rewards_of_its_texts_and_0_kl_at_the_reference(tokenizer, texts):
    policy = Transformer(
        ModelConfig(
            vocab_size=tokenizer.vocab_size,
            context=64,
            width=16,
            layers=1,
            heads=2,
            kv_heads=2,
            head_dim=8,
            ffn=32,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
        ),
        0,
    )
    rewards = {"gold": load_reward("gold", tokenizer, CPU), "length": lambda p, r, records: torch.tensor([float(len(x)) for x in r])}
    metrics, found = measure(policy, policy, tokenizer, texts[2], rewards, 12)
    assert metrics["eval/kl"] == 0.0 and metrics.keys() == {"eval/gold", "eval/length", "eval/kl", "eval/ended"}
    assert [f["prompt"] for f in found] == texts[0]
    assert metrics["eval/gold"] == pytest.approx(
        np.mean([reviews.gold_reward(f["prompt"], f["completion"]) for f in found]), abs=1e-6
    )
    assert json.dumps(found) and measure(policy, policy, tokenizer, texts[2], rewards, 12)[1] == found  # same seed
    assert measure(policy, policy, tokenizer, texts[2], rewards, 12, seed=1)[1] != found


def test_a_missing_extra_is_named_in_the_error(monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name in ("sentence_transformers", "transformers"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="extra `eval`"):
        sbert_diversity(["a", "b"])
    with pytest.raises(UserError, match="extra `eval`"):
        evaluate.mnli_relation()
