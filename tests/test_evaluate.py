"""Tests of metrics.py, evaluate.py and rewards.py: measures against direct computations, and good and bad rewards."""

import itertools
import json
import math
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sample_bon
from nanorlhf import evaluate, reviews
from nanorlhf.data import Example, collate, encode_prompt, encode_response, post_of
from nanorlhf.errors import UserError
from nanorlhf.evaluate import (Evaluation, Options, evaluate_policies, markdown_table, measure, possible_range, report,
                               response_nll, sampled_kl, swapped)
from nanorlhf.generate import generate
from nanorlhf.metrics import (across_input_diversity, best_of_n_estimate, bon_kl, difference_and_interval, distinct_n,
                              expectation_adjusted_distinct, mean_and_interval, nli_diversity, per_input_diversity,
                              perplexity, repetition, sbert_diversity, self_bleu, sequence_kl, share_interval, t_quantile,
                              win_rate, with_error, within)
from nanorlhf.model import ModelConfig, RewardModel, Transformer
from nanorlhf.rewards import load_reward
from nanorlhf.tokenizer import load_tokenizer

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_ead_of_the_first_words_does_not_depend_on_how_long_the_texts_go_on():
    """Plain EAD rises when texts are cut (a vocabulary of 50257 corrects nothing in small sets); the length-matched one does not
    change as long as the first words remain."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices("the plot cast is was not very good bad and story".split(), k=25)) + "." for _ in range(16)]
    plain, matched = [], []
    for length in (25, 15, 8):
        cut = [" ".join(t.split(" ")[:length]) for t in texts]
        plain.append(expectation_adjusted_distinct(cut))
        matched.append(expectation_adjusted_distinct(cut, first=8))
    assert plain == sorted(plain) and plain[-1] > plain[0] + 0.02
    assert matched == [plain[-1]] * 3


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
    assert sbert_diversity(["a", "b"], lambda texts: [[0.0, 0.0], [1.0, 0.0]]) == 1.0


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


# 97.5% quantiles of Student's t as printed in statistical tables
T_TABLE = dict(enumerate([12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
                          2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048,
                          2.045, 2.042], 1)) | {40: 2.021, 60: 2.000, 120: 1.980, 1e5: 1.960, math.inf: 1.960}


def test_the_quantiles_of_students_t_are_the_published_ones():
    for df, t in T_TABLE.items():
        assert t_quantile(df) == pytest.approx(t, abs=6e-4), df
    assert t_quantile(2) == pytest.approx(0.95 / math.sqrt(0.5 * 0.975 * 0.025) / 2, rel=1e-6)       # closed forms
    assert t_quantile(1) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-6)
    assert t_quantile(4) < t_quantile(3.5) < t_quantile(3)


def test_win_rate_counts_a_tie_as_half():
    assert win_rate([1, 2, 3, 4], [0, 2, 4, 3]) == share_interval(0.625, 4)
    ours, theirs = np.random.default_rng(0).normal(size=(2, 100))
    assert win_rate(ours, theirs)[0] + win_rate(theirs, ours)[0] == pytest.approx(1)


@pytest.mark.parametrize("wins, n, low, high", [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634),
                                                (81, 263, 0.2553, 0.3662), (1, 1, 0.2065, 1.0)])
def test_shares_have_wilsons_interval(wins, n, low, high):
    """Published values (Newcombe 1998; Brown 2001). All wins are no proof that a loss is impossible."""
    assert share_interval(wins / n, n) == pytest.approx((wins / n, low, high), abs=6e-5)


@pytest.mark.parametrize("n", [4, 50])
def test_the_intervals_cover_the_mean_in_95_percent_of_trials_however_few_values(n):
    """The normal's 1.96 would cover 85% of the means of 4 values."""
    rng = np.random.default_rng(n)
    one, two = [], []
    for trial in range(4000):
        x, y = rng.normal(3, 2, size=n), rng.normal(1, 0.5, size=2 * n)
        mean, half = mean_and_interval(x)
        one.append(abs(mean - 3) < half)
        if trial < 400:
            mean, half = difference_and_interval(x, y)
            two.append(abs(mean - 2) < half)
    assert 0.94 < np.mean(one) < 0.96 and 0.92 < np.mean(two) < 0.98


def test_welchs_interval_equals_its_formula_and_students_for_equal_variances():
    a, b = [1.0, 2.0, 3.0, 6.0], [0.0, 1.0, 2.0, 5.0]
    mean, half = difference_and_interval(a, b)
    assert mean == 1.0 and half == pytest.approx(T_TABLE[6] * math.sqrt(2 * np.var(a, ddof=1) / 4), abs=2e-3)
    va, vb = np.var(a, ddof=1) / 4, np.var([0.0, 9.0], ddof=1) / 2
    df = (va + vb) ** 2 / (va ** 2 / 3 + vb ** 2 / 1)
    assert difference_and_interval(a, [0.0, 9.0])[1] == pytest.approx(t_quantile(df) * math.sqrt(va + vb))
    assert difference_and_interval([1.0, 1.0], [2.0, 2.0]) == (-1.0, 0.0) and difference_and_interval([1.0], [2.0, 3.0])[1] == 0.0


def test_an_interval_stays_within_what_is_possible_and_never_has_no_width():
    assert within(1.0, 1.13, -2, 2) == (1.0, pytest.approx(-0.13), 2) and within(1.0, 0.5) == (1.0, 0.5, 1.5)
    assert within(*mean_and_interval([0.3])) == (0.3, None, None) and within(*mean_and_interval([0.1] * 3))[1:] == (None, None)
    assert difference_and_interval([0.1] * 3, [0.3] * 3)[1] == 0.0
    gold = (-2.0, 1.0)
    assert possible_range("nli_per_input") == (-2, 2) and possible_range("win_sft") == possible_range("ceiling") == (0, 1)
    assert possible_range("ead_across") == (0, math.inf)               # distinct n-grams only: a little above 1
    assert possible_range("kl") == (0, math.inf) and possible_range("gold/test", gold) == gold
    assert possible_range("gap/far", gold) == possible_range("gold/test - SFT", gold) == (-3, 3)
    assert possible_range("self_bleu_per_input - SFT") == (-1, 1) and possible_range("win/DPO") == (0, 1)
    assert possible_range("ended - SFT") == (-1, 1) and possible_range("gold/x") == (-math.inf, math.inf)


def test_a_table_prints_both_ends_of_an_interval_that_is_not_symmetric():
    rows = [{"method": "a", "x": (0.5, 0.4, 0.6), "y": (1.0, 0.72, 1.0)}, {"method": "b", "x": (0.25, None, None)}]
    assert markdown_table(rows, {"x": ("X", ".2f"), "y": ("Y", ".0%")}).splitlines() == [
        "| method | X | Y |", "|---|---:|---:|", "| a | 0.50 ± 0.10 | 100% [72%, 100%] |", "| b | 0.25 | - |"]


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


def test_sequence_kl_between_two_prompts_sees_the_same_response_after_both():
    """How far a policy heeds the prompt. The prompts differ in length, so the responses stand at other positions."""
    policy = tiny(0)
    pairs = [([1, 2], [5, 6, 3], [3, 4, 10]), ([5], [2, 1], [7, 8, 9, 10])]            # prompt, other prompt, response
    batch, other = (collate([Example(p[which] + p[2], len(p[which])) for p in pairs], 11) for which in (0, 1))
    found = sequence_kl(policy, policy, batch.tokens, batch.mask, other=(other.tokens, other.mask))
    for b, (prompt, swap, response) in enumerate(pairs):
        total = 0.0
        for t in range(len(response)):
            p, q = (policy.logits(policy(torch.tensor([start + response[:t]])))[0, -1].double().softmax(-1).tolist()
                    for start in (prompt, swap))
            total += sum(a * math.log(a / c) for a, c in zip(p, q))
        assert found[b].item() == pytest.approx(total, rel=1e-4) and total > 0
    prompts, responses = [p[0] for p in pairs], [p[2] for p in pairs]
    tokenizer = SimpleNamespace(pad_id=11)
    alike = sampled_kl(policy, policy, tokenizer, prompts, responses, 1.0, other=[p[1] for p in pairs])
    assert alike == pytest.approx(found.tolist(), rel=1e-5)
    assert sampled_kl(policy, policy, tokenizer, prompts, responses, 1.0) == [0.0, 0.0]


@torch.no_grad()
def test_response_nll_is_the_sum_over_response_tokens_and_keeps_the_order():
    """From the full softmax after every prefix. EOS (10) counts, the prompt does not."""
    model, prompts, responses = tiny(0), [[1, 2, 3], [4], [5, 6]], [[4, 10], [5, 6, 7, 8, 9, 1, 10], [10]]
    found = response_nll(model, SimpleNamespace(pad_id=11), prompts, responses, batch_size=2)
    for prompt, response, (nll, tokens) in zip(prompts, responses, found):
        logp = [model.logits(model(torch.tensor([prompt + response[:t]])))[0, -1].double().log_softmax(-1)[y].item()
                for t, y in enumerate(response)]
        assert nll == pytest.approx(-sum(logp), rel=1e-5) and tokens == len(response)
    assert perplexity(found) == pytest.approx(math.exp(sum(nll for nll, _ in found) / 10))
    for p in model.parameters():
        p.zero_()                                                                      # now all 12 tokens are equally likely
    assert perplexity(response_nll(model, SimpleNamespace(pad_id=11), prompts, responses)) == pytest.approx(12)


def test_a_swapped_prompt_is_another_one_of_the_same_domain():
    texts = ["Review of the film A B: plot.", "Review of the book A B: hero.", "Review of the film C D: music.", "?"]
    assert swapped([[0], [1], [2], [3]], [{"prompt": t} for t in texts]) == [[2], [0], [0], [2]]   # alone in it: the one before
    assert swapped([[0], [1]], [{"prompt": "a"}, {"prompt": "b"}]) == [[1], [0]]


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
    names = {f"eval/{name}{end}" for name in ("gold", "length", "kl", "ended") for end in ("", "_se")}
    assert metrics["eval/kl"] == 0.0 and metrics.keys() == names
    assert [f["prompt"] for f in found] == texts[0]
    gold = [reviews.gold_reward(f["prompt"], f["completion"]) for f in found]
    lengths = [f["length"] for f in found]
    assert metrics["eval/gold"] == pytest.approx(np.mean(gold), abs=1e-6)
    assert metrics["eval/length_se"] == pytest.approx(np.std(lengths, ddof=1) / math.sqrt(len(lengths)), abs=1e-6)
    assert json.dumps(found) and measure(policy, policy, tokenizer, texts[2], rewards, 12)[1] == found  # same seed
    assert measure(policy, policy, tokenizer, texts[2], rewards, 12, seed=1)[1] != found
    assert not any(k.endswith("_se") for k in measure(policy, policy, tokenizer, texts[2][:1], rewards, 12)[0])


def test_sampled_kl_keeps_the_order_and_a_greedy_policys_is_that_of_temperature_1():
    policy, reference, tokenizer = tiny(0), tiny(1), SimpleNamespace(pad_id=11)
    prompts, responses = [[1, 2, 3], [4], [5, 6]], [[4, 10], [5, 6, 7, 8, 9, 1, 10], [10]]
    found = sampled_kl(policy, reference, tokenizer, prompts, responses, 1.0, batch_size=2)
    alone = [sampled_kl(policy, reference, tokenizer, [p], [r], 1.0)[0] for p, r in zip(prompts, responses)]
    assert found == pytest.approx(alone, rel=1e-5) and found[0] != pytest.approx(found[1])
    assert sampled_kl(policy, reference, tokenizer, prompts, responses, 0.0) == pytest.approx(found, rel=1e-5)


# ---- A table over checkpoints, and best-of-n ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sft(tokenizer, tmp_path_factory):
    """A folder with a random policy, and a judge that never scores two texts alike."""
    folder = tmp_path_factory.mktemp("table")
    for name, seed in (("sft", 0), ("other", 1)):
        Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, context=64, width=16, layers=1, heads=2, kv_heads=2, head_dim=8,
                                ffn=32, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id), seed).save_pretrained(folder / name)
        tokenizer.save(folder / name)
    shutil.copytree(folder / "sft", folder / "copy")
    (folder / "judge.py").write_text(
        "import zlib\ndef score(prompts, completions): return [zlib.crc32(c.encode()) / 2**32 for c in completions]\n")
    return folder


def options_for(sft, **changed):
    judge = f"{sft}/judge.py:score"
    return Options(**dict(reference=f"{sft}/sft", reward=judge, gold=judge, num_prompts=6, diversity_prompts=2, num_samples=2,
                          response_length=8, device="cpu") | changed)


@pytest.fixture(scope="module")
def rows(sft):
    found, _ = evaluate_policies({"copy": f"{sft}/copy", "other": f"{sft}/other"}, options_for(sft, bon=3))
    return {row["method"]: row for row in found}


def test_a_policy_meets_texts_of_sft_that_are_drawn_apart_from_its_own(rows):
    """The same weights and random numbers would give the same texts and nothing but ties; for means they are what makes the
    difference of equal policies exactly 0."""
    assert rows["copy"]["win_sft"][0] not in (0.5, 1.0)
    assert all(v == (0.0, None, None) for c, v in rows["copy"].items() if c.endswith(" - SFT"))
    assert rows["SFT"]["win_sft"] == (0.5, None, None)


def test_differences_to_sft_are_paired_by_prompt(sft):
    evaluation = Evaluation(options_for(sft))
    _, ours, _ = evaluate.table_row(evaluation, "SFT", evaluation.reference)
    _, theirs, _ = evaluate.table_row(evaluation, "other", Transformer.from_pretrained(sft / "other"))
    (row,) = [r for r in evaluate_policies({"other": f"{sft}/other"}, options_for(sft))[0] if r["method"] == "other"]
    assert any(row[f"{column} - SFT"][1] is not None for column in ("gold/test", "gold/ood_far"))
    for column in ("gold/test", "gold/ood_far", "length", "ead_first_per_input"):
        paired = mean_and_interval(np.subtract(theirs[column], ours[column]))
        assert row[f"{column} - SFT"] == within(*paired)
    mean, half = difference_and_interval(theirs["gold/test"], theirs["gold/ood_far"])
    assert row["gap/ood_far"] == pytest.approx((mean, mean - half, mean + half))
    assert row["gap/ood_far"][0] == pytest.approx(row["gold/test"][0] - row["gold/ood_far"][0])


def test_a_report_explains_every_column_and_has_both_kinds_of_difference(rows):
    text = report(list(rows.values()), "The judge is X.", "over prompts")
    headings = [h for line in text.splitlines() if line.startswith("| method") for h in line.strip("| ").split(" | ")[1:]]
    assert {"gold ID - SFT", "gap OOD-near", "gap OOD-far", "KL to SFT", "NLI per input", "ended"} <= set(headings)
    assert text.startswith("The judge is X.") and all(f"\n- {h}: " in text for h in headings) and "\n- ±: " in text


def test_policies_meet_each_other_with_texts_drawn_apart(rows, sft):
    """"copy" has SFT's weights. With the same random numbers all its texts would tie with SFT's."""
    assert all({c for c in row if c.startswith("win/")} == {f"win/{n}" for n in rows if n != name} for name, row in rows.items())
    for a, b in itertools.combinations(rows, 2):
        assert rows[a][f"win/{b}"][0] + rows[b][f"win/{a}"][0] == pytest.approx(1)
    e, copy = Evaluation(options_for(sft)), Transformer.from_pretrained(sft / "copy")
    ours, theirs = e.judged(copy, 1, "opponent copy"), e.opponent_scores
    assert rows["copy"]["win/SFT"] == win_rate(ours, theirs) and not (ours == theirs).any()
    assert torch.equal(e.judged(copy, 1, "opponent"), theirs)
    table = report(list(rows.values()), "", "").split("\n\n")[3]
    assert table.startswith("| win rate over | SFT | copy | other | best-of-3 |") and "\n| SFT | - | " in table
    alone, _ = evaluate_policies({}, options_for(sft))
    assert "win rate over" not in report(alone, "", "")


def test_a_table_has_repetition_self_bleu_distinct_2_and_on_request_the_perplexity_of_the_texts(rows, sft, tokenizer):
    found, samples = evaluate_policies({}, options_for(sft, perplexity=f"{sft}/other"))
    assert "ppl" not in rows["SFT"] and "| perplexity |" in report(found, "", "")
    e, (row,) = Evaluation(options_for(sft, perplexity=f"{sft}/other")), found
    responses = [drawn[0] for drawn in e.draw(e.reference, "test", 1, 1, "samples")]
    nll = response_nll(Transformer.from_pretrained(sft / "other"), tokenizer, e.prompts["test"], responses)
    value, low, high = row["ppl"]
    assert value == pytest.approx(perplexity(nll)) and 1 < low < value < high
    texts = [tokenizer.decode(y, start=False) for y in responses]
    assert texts == [s["completion"] for s in samples if s["split"] == "test"]
    assert row["repetition"][0] == np.mean([repetition(text) for text in texts])
    drawn = [[tokenizer.decode(y, start=False) for y in ys] for ys in e.draw(e.reference, "test", 2, 1, "diversity", 2)]
    assert row["self_bleu_per_input"][0] == pytest.approx(np.mean([self_bleu(ys) for ys in drawn]))
    for first in (1, 3):                                                               # a single word has no pairs
        (row,), _ = evaluate_policies({}, options_for(sft, first_words=first))
        found = [distinct_n(ys, 2, first) for ys in drawn]
        assert row.get("distinct2_per_input", [None])[0] == (None if first == 1 else pytest.approx(np.mean(found)))


def test_perplexity_under_a_model_with_another_tokenizer_is_that_of_the_text_in_its_tokens(sft, tokenizer, tmp_path):
    from nanorlhf.tokenizer import train_bpe

    own = train_bpe(["the plot is good and the film was not bad ; review of the book"] * 20, 300)
    model = Transformer(ModelConfig(vocab_size=own.vocab_size, context=256, width=16, layers=1, heads=2, kv_heads=2, head_dim=8,
                                    ffn=32, eos_id=own.eos_id, pad_id=own.pad_id, init_std=0.3), 5)
    model.save_pretrained(tmp_path)
    own.save(tmp_path)
    e = Evaluation(options_for(sft, perplexity=str(tmp_path)))
    texts = [" The plot is good.", " Bad film"] * 3
    responses = [encode_response(tokenizer, text) for text in texts]
    responses[1] = responses[1][:-1]                                                   # truncated before its EOS
    ids = [encode_response(own, text) for text in texts]
    ids[1] = ids[1][:-1]
    prompts = [own.encode(r["prompt"]) for r in e.records["test"]]
    found, expected = e.nll(responses), response_nll(model, own, prompts, ids)
    assert [n for _, n in found] == list(map(len, ids)) and [x for x, _ in found] == pytest.approx([x for x, _ in expected])


def test_a_folder_called_like_the_reference_s_row_keeps_its_path(monkeypatch):
    seen = []

    def stop(folders, options):
        seen.append(folders)
        raise UserError("enough")

    monkeypatch.setattr(evaluate, "check_unused", lambda options: None)
    monkeypatch.setattr(evaluate, "evaluate_policies", stop)
    monkeypatch.setattr(sys, "argv", ["evaluate", "a/SFT", "a/x", "a/best-of-4", "a/y", "b/y", "--bon", "4"])
    with pytest.raises(SystemExit, match="enough"):
        evaluate.main()
    assert seen == [{"a/SFT": "a/SFT", "x": "a/x", "a/best-of-4": "a/best-of-4", "a/y": "a/y", "b/y": "b/y"}]


def test_a_single_prompt_has_no_diversity_across_prompts_of_meaning(sft):
    (row,), _ = evaluate_policies({}, options_for(sft, data="reviews", num_prompts=1))
    assert "nli_per_input" in row and "ead_across" in row and "nli_across" not in row
    assert "| NLI across |" not in report([row], "", "")


def test_a_second_evaluation_into_a_folder_is_refused_while_the_first_runs(sft, tmp_path, monkeypatch):
    out, errors = tmp_path / "table", []
    monkeypatch.setattr(sys, "argv", ["evaluate", "--reference", f"{sft}/sft", "--out", str(out), "--device", "cpu"])

    def running(folders, options):
        child = subprocess.run([sys.executable, "-m", "nanorlhf.evaluate", *sys.argv[1:]], capture_output=True, text=True)
        errors.append(child.stderr)
        raise UserError("enough")
    monkeypatch.setattr(evaluate, "evaluate_policies", running)
    with pytest.raises(SystemExit, match="enough"):
        evaluate.main()
    assert errors == [f"error: another process is writing {out}: wait for it, or name another --out\n"]


def test_the_folder_in_which_one_stands_has_its_name_in_the_table(sft, monkeypatch, tmp_path):
    monkeypatch.chdir(sft / "other")
    monkeypatch.setattr(sys, "argv", ["evaluate", ".", "--reference", "../sft", "--out", str(tmp_path), "--device", "cpu"])

    def found(folders, options):
        raise UserError(str(folders))
    monkeypatch.setattr(evaluate, "evaluate_policies", found)
    with pytest.raises(SystemExit, match=r"\{'other': '.'\}"):
        evaluate.main()


def test_each_of_k_winners_is_the_best_of_n_samples_of_its_own(sft):
    e = Evaluation(options_for(sft))
    drawn = e.draw(e.reference, "test", 2, 3, "diversity", limit=2)
    pool = generate(e.reference, e.prompts["test"][:2], 8, num_samples=6, tokenizer=e.tokenizer,
                    seed=evaluate.seed_for(0, "table", "diversity", "test", 3)).responses()
    for p in range(2):
        for k in range(2):
            own = pool[p * 6 + k * 3:p * 6 + k * 3 + 3]
            scores = e.rewards["reward"]([e.prompts["test"][p]] * 3, own, [e.records["test"][p]] * 3)
            assert drawn[p][k] == own[int(scores.argmax())]


def test_prompts_are_cut_as_the_options_say(sft):
    whole, end, start = (Evaluation(options_for(sft, **cut)).prompts["test"][0] for cut in (
        {}, dict(max_prompt_length=3), dict(max_prompt_length=3, keep="start")))
    assert len(whole) > 3 and end == whole[-3:] and start == whole[:3]


def test_the_command_names_the_judge_and_overwrites_only_a_table_and_only_if_asked(sft, monkeypatch, capsys):
    judge, out = f"{sft}/judge.py:score", sft / "out"

    def table(*more):
        """Runs the command here; returns what it printed, or its error."""
        monkeypatch.setattr(sys, "argv", [
            "evaluate", f"{sft}/other", "--reference", f"{sft}/sft", "--num_prompts", "4", "--reward", judge, "--diversity_prompts",
            "1", "--num_samples", "2", "--response_length", "6", "--device", "cpu", "--out", str(out), *more])
        try:
            evaluate.main()
        except SystemExit as error:
            return str(error)
        return capsys.readouterr().out

    first = table("--temperature", "0")
    assert f"The judge is `gold` = the true reward of the built-in task. The learned reward is {judge}." in first
    written = (out / "table.md").read_text(encoding="utf-8")
    assert written.strip() in first
    again = table()
    assert again.startswith("error: ") and "already holds files" in again and "--overwrite" in again and "\n" not in again
    assert (out / "table.md").read_text(encoding="utf-8") == written
    assert f"The judge is `gold` = {judge}." in table("--overwrite", "--gold", judge)
    assert "holds no table" in table("--out", f"{sft}/sft", "--overwrite") and not (sft / "sft" / "table.json").exists()
    assert table("--keep", "middle", "--overwrite").startswith("error: --keep middle")


def bon(sft, out, **changed):
    """Runs sample_bon.py and returns {prompt: responses} and the comparisons."""
    config = dict(init=f"{sft}/sft", reward=f"{sft}/judge.py:score", out=str(out), n=3, limit=6, response_length=6, device="cpu",
                  keep_unfinished=True, label_temperature=0.5)
    sample_bon.sample(sample_bon.Config(**config | changed))
    ranked, pairs = (list(map(json.loads, open(out / f"{name}.jsonl", encoding="utf-8"))) for name in ("ranked", "comparisons"))
    return [(r["prompt"], r["responses"]) for r in ranked], pairs


def test_best_of_ns_samples_depend_on_seed_n_and_data_and_on_nothing_else(sft, tmp_path):
    """Not on the batch size, the reward or where the file lies; but other data never gets the same random numbers."""
    prompts = [{"prompt": r["prompt"]} for r in reviews.records("test", 6)]
    for name, rows in (("a.jsonl", prompts), ("b.jsonl", prompts), ("c.jsonl", [*prompts, {"prompt": "Review:"}])):
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    samples, pairs = bon(sft, tmp_path / "1")
    again, same_pairs = bon(sft, tmp_path / "2", batch_size=4)
    assert again == samples and same_pairs == pairs
    assert bon(sft, tmp_path / "3", reward="gold")[0] == samples
    a, b, c = (bon(sft, tmp_path / f"out_{f}", data=str(tmp_path / f"{f}.jsonl"))[0] for f in "abc")
    assert a == b
    other, seed = bon(sft, tmp_path / "4", split="ood_near")[0], bon(sft, tmp_path / "5", seed=1)[0]
    drawn = [{y for _, ys in found for y in ys} for found in (samples, a, c, other, seed)]
    assert not any(x & y for x, y in itertools.combinations(drawn, 2))


def test_the_labels_of_a_prompt_do_not_depend_on_how_many_pairs_the_others_have(sft, tmp_path, monkeypatch):
    _, pairs = bon(sft, tmp_path / "1")
    comparisons, fewer = sample_bon.comparisons, []
    monkeypatch.setattr(sample_bon, "comparisons", lambda record, *rest: fewer.append(record) or comparisons(
        record if len(fewer) > 1 else record | {"responses": record["responses"][:2]}, *rest))
    _, changed = bon(sft, tmp_path / "2")
    first = pairs[0]["prompt"]
    assert [p for p in changed if p["prompt"] != first] == [p for p in pairs if p["prompt"] != first]
    assert len(changed) < len(pairs)


def test_without_labels_the_missing_file_is_explained(sft, tmp_path, capsys):
    judge = f"{sft}/judge.py:score"
    sample_bon.sample(sample_bon.Config(init=f"{sft}/sft", reward=judge, out=str(tmp_path / "x"), n=2, limit=1, response_length=6,
                                        device="cpu", keep_unfinished=True))
    assert "comparisons.jsonl is not written: that takes --label_temperature" in capsys.readouterr().out
    assert not (tmp_path / "x" / "comparisons.jsonl").exists()


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


def test_with_error_is_the_mean_s_standard_error_and_the_ratio_estimator_s():
    values = np.random.default_rng(0).normal(size=30)
    found = with_error("x", values)
    assert found == {"x": pytest.approx(values.mean()), "x_se": pytest.approx(values.std(ddof=1) / math.sqrt(30))}
    assert with_error("x", [2.0]) == {"x": 2.0}
    thrice = with_error("x", np.repeat(values, 3), posts=np.repeat(np.arange(30), 3))   # three equal answers to each prompt
    assert thrice == pytest.approx(found)
    assert post_of({"group": [1, {"a": 0}], "prompt": "x"}) == "[1, {'a': 0}]" and post_of({"group": 0, "text": "x"}) == "0"
    # Sums of unequal numbers of tokens: the error agrees with the spread of the mean over many resamples of the examples.
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 40, size=200)
    sums = np.array([rng.normal(1 + 0.02 * c, 1, size=c).sum() for c in counts])
    found = with_error("x", sums, counts)
    assert found["x"] == pytest.approx(sums.sum() / counts.sum())
    drawn = rng.integers(0, 200, size=(4000, 200))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    assert found["x_se"] == pytest.approx(means.std(), rel=0.05)
