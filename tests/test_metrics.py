"""Tests of the numbers in metrics.py that need no model, against values worked out by hand. test_evaluate.py has the others."""

import math
import statistics

import numpy as np
import pytest

from nanorlhf.errors import UserError
from nanorlhf.metrics import (best_of_n_estimate, bootstrap_interval, calibration, difference_and_interval, distinct_n,
                              expectation_adjusted_distinct, mean_and_interval, perplexity, repetition, self_bleu,
                              share_interval, win_matrix, win_rate)

# ---- Diversity ------------------------------------------------------------------------------------------------------


def test_distinct_n_is_the_share_of_n_grams_that_are_distinct():
    """Words "a b a b" and "a c": of 6 words 3 are distinct; of the pairs ab, ba, ab, ac 3 of 4; of the triples both. Pairs across
    two texts do not count."""
    texts = ["a b a b.", "a c"]
    assert distinct_n(texts, 1) == 3 / 6 and distinct_n(texts, 2) == 3 / 4 and distinct_n(texts, 3) == 1.0
    assert distinct_n(texts, 2, first=2) == 1.0 and distinct_n(texts, 1, first=1) == 1 / 2   # ab, ac; and a, a
    assert distinct_n(texts, 5) == distinct_n([], 1) == distinct_n([""], 1) == 0.0


def test_repetition_is_the_share_of_n_grams_that_a_text_has_had_before():
    """"a b c a b c a" has the pairs ab, bc, ca twice each, so 3 of 6 repeat; its 4-grams are abca, bcab, cabc, abca: 1 of 4."""
    assert repetition("a b c a b c a", 2) == 1 / 2 and repetition("a b c a b c a") == 1 / 4
    assert repetition("a b c d e f.") == repetition("a a a") == repetition("") == 0.0   # too short: no 4-grams
    assert repetition(" x" * 13) == 9 / 10                                           # 10 4-grams, all the same


def test_self_bleu_of_two_texts_that_differ_in_the_last_word():
    """Of 5 words 4 match, of the pairs 3 of 4, of the triples 2 of 3, of the 4-grams 1 of 2: the product is 1/5. The lengths are
    equal, so there is no brevity penalty; the other text's BLEU is the same."""
    assert self_bleu(["a b c d e", "a b c d f"]) == pytest.approx((1 / 5) ** 0.25)
    assert self_bleu(["a b c d e", "a b c d f"], first=4) == self_bleu(["a b c d."] * 3) == self_bleu(["a"] * 2) == 1.0


def test_self_bleu_clips_counts_penalises_brevity_and_smooths_zeros():
    """All BLEUs by hand, as p1 .. p4 and the penalty."""
    long = (2 / 4 * 1 / 3 * 0.1 / 2 * 0.1 / 1) ** 0.25                               # of "a b c d" against "a b": no penalty
    assert self_bleu(["a b", "a b c d"]) == pytest.approx((math.exp(1 - 4 / 2) + long) / 2)   # "a b": p1 = p2 = 1
    # "a a" against "a b": one of two a's counts, and of the pair aa none; "a b" likewise
    assert self_bleu(["a a", "a b"]) == pytest.approx(math.sqrt(1 / 2 * 0.1 / 1))
    # Several references. "a b": p1 = 1 with an a from one and a b from another, p2 = 0.1. "a c" and "b d" have one word of two.
    assert self_bleu(["a b", "a c", "b d"]) == pytest.approx((math.sqrt(0.1) + 2 * math.sqrt(0.5 * 0.1)) / 3)
    # The nearest length is 3 and, of the lengths 1 and 5, equally near, the shorter one. The 3 words have no match.
    third = (0.1 / 3 * 0.1 / 2 * 0.1 / 1) ** (1 / 3)
    first, last = 0.1 * math.exp(1 - 3 / 1), (0.1 / 5 * 0.1 / 4 * 0.1 / 3 * 0.1 / 2) ** 0.25
    assert self_bleu(["x", "a b c", "p q r s t"]) == pytest.approx((first + third + last) / 3)
    assert self_bleu(["", ""]) == 1.0 and self_bleu(["", "a"]) == pytest.approx((0 + 0.1) / 2)


# ---- Perplexity and calibration -------------------------------------------------------------------------------------


def test_perplexity_pools_all_tokens():
    """3 tokens of probability 1/2 and one of 1/32: the mean is (3 + 5) / 4 = 2 bits, so the perplexity is 4. The mean of the two
    responses' perplexities would be 17."""
    assert perplexity([(3 * math.log(2), 3), (math.log(32), 1)]) == pytest.approx(4.0)
    assert perplexity([(0.0, 7)]) == 1.0


@pytest.mark.parametrize("nll", [math.nan, math.inf, 1e4])
def test_a_perplexity_beyond_all_numbers_is_an_error(nll):
    with pytest.raises(UserError, match="no finite number"):
        perplexity([(1.0, 2), (nll, 1)])


def test_calibration_of_four_pairs_in_two_bins():
    """sigmoid(log 3) = 3/4 and sigmoid(log 9) = 9/10. At 3/4 one of two is right, at 9/10 both: ece = (1/4 + 1/10) / 2. brier =
    (1/16 + 9/16 + 1/100 + 1/100) / 4."""
    found = calibration([math.log(3), math.log(9), -math.log(3), math.log(9)], bins=2)
    assert found["bins"] == [(pytest.approx(0.75), 0.5, 2), (pytest.approx(0.9), 1.0, 2)]
    assert found["ece"] == pytest.approx(0.175) and found["brier"] == pytest.approx(0.645 / 4)


def test_a_calibrated_model_has_no_calibration_error_however_its_pairs_are_ordered():
    """Of 12 pairs of confidence 3/4, 9 are right. In bins of 4, the first 4 would all be wrong or right in part; equal confidences
    share their rights. A margin of 0 is a coin: confidence 1/2, half right."""
    for margins in ([math.log(3)] * 9 + [-math.log(3)] * 3, [-math.log(3)] * 3 + [math.log(3)] * 9):
        found = calibration(margins, bins=3)
        assert found["ece"] == pytest.approx(0, abs=1e-12) and [n for *_, n in found["bins"]] == [4, 4, 4]
        assert found["brier"] == pytest.approx(3 / 4 * 1 / 16 + 1 / 4 * 9 / 16)
    assert calibration([0.0, 0.0], bins=1) == {"ece": 0.0, "brier": 0.25, "bins": [(0.5, 0.5, 2)]}
    extreme = calibration([-2000.0, 2000.0], bins=10)                                  # fewer pairs than bins, no overflow
    assert extreme["brier"] == 0.5 and extreme["ece"] == 0.5 and extreme["bins"] == [(1.0, 0.5, 1)] * 2


# ---- Intervals and win rates ----------------------------------------------------------------------------------------


def test_the_bootstrap_of_a_share_has_the_binomials_quantiles():
    """The share of ones among 8 rows drawn from 4 zeros and 4 ones is binomial / 8. P(X <= 0) = 1/256 < 2.5% < P(X <= 1) = 9/256,
    and the other side is its mirror image: the interval is [1/8, 7/8]."""
    assert bootstrap_interval([0, 1] * 4, statistics.fmean) == (0.5, 1 / 8, 7 / 8)
    assert all(bootstrap_interval([2.5] * n, statistics.fmean, draws=9) == (2.5, None, None) for n in (1, 5))


def test_the_bootstrap_repeats_by_seed_takes_tuples_and_agrees_with_student_where_both_hold():
    values = np.random.default_rng(0).normal(size=100).tolist()
    first = bootstrap_interval(values, statistics.fmean)
    assert first == bootstrap_interval(values, statistics.fmean) != bootstrap_interval(values, statistics.fmean, seed=1)
    mean, half = mean_and_interval(values)
    assert first == pytest.approx((mean, mean - half, mean + half), abs=0.1 * half)
    pairs = [(v + 3 + v * v / 10, v) for v in values]                                  # paired: what both share cancels
    paired = bootstrap_interval(pairs, lambda rows: statistics.fmean(a - b for a, b in rows), draws=500)
    assert paired[2] - paired[1] < 0.2 * (first[2] - first[1])


def test_the_bootstrap_does_not_fit_distinct_counts():
    """That is why the table gives no interval of EAD across inputs. The true value here is 1: no two texts share a word."""
    texts = [f"a{i} b{i} c{i}" for i in range(30)]
    value, _, high = bootstrap_interval(texts, lambda rows: distinct_n(rows, 1), draws=200)
    assert value == 1.0 and high < 0.8
    value, _, high = bootstrap_interval(texts, expectation_adjusted_distinct, draws=200)
    assert high < value - 0.1


def test_values_that_differ_by_rounding_only_have_no_interval():
    """A judge that gives every text -2: best_of_n_estimate weighs the -2s in sums that round in their own ways."""
    rng = np.random.default_rng(0)
    estimates = [best_of_n_estimate(rng.integers(0, 5, 16), 4, np.full(16, -2.0)) for _ in range(20)]
    assert len(set(estimates)) > 1 and mean_and_interval(estimates) == (pytest.approx(-2), 0.0)
    assert difference_and_interval(estimates, [0.3, 0.1 + 0.2])[1] == 0
    assert mean_and_interval([1e6, 1e6 + 1e-3])[1] > 0 and mean_and_interval([0.0, 1e-30])[1] > 0


def test_a_win_matrix_of_one_text_per_prompt_has_the_win_rates():
    """For a over b: 1 > 0 wins, 2 = 2 ties, 3 < 4 loses, 4 > 3 wins, which is 2.5 of 4. And c always wins."""
    scores = {"a": [1, 2, 3, 4], "b": [0, 2, 4, 3], "c": [9, 9, 9, 9]}
    found = win_matrix(scores)
    assert found["a", "b"] == win_rate(scores["a"], scores["b"]) == share_interval(0.625, 4)
    assert found["b", "a"] == share_interval(0.375, 4) and found["c", "a"] == share_interval(1.0, 4)
    assert found.keys() == {(x, y) for x in "abc" for y in "abc" if x != y}


def test_a_win_matrix_of_k_texts_compares_all_pairs_of_a_prompt():
    """Prompt 1: 1 > 0 wins, 1 < 2 loses, 2 > 0 wins, 2 = 2 ties: 5/8. Prompt 2: 3 = 3 ties twice, 3 < 4 loses twice: 1/4. Their mean
    is 7/16; Student's interval over two prompts is 12.7 * (3/8) / 2 wide on each side, so all of [0, 1]."""
    a, b = [[1, 2], [3, 3]], [[0, 2], [3, 4]]
    assert win_matrix({"a": a, "b": b})["a", "b"] == (7 / 16, 0, 1)
    a, b = np.random.default_rng(0).normal(size=(2, 50, 3))
    found = win_matrix({"a": a, "b": b, "one": a[:, 0]})
    shares = [np.mean([x > y for x in p for y in q]) for p, q in zip(a, b)]
    mean, half = mean_and_interval(shares)
    assert found["a", "b"] == pytest.approx((mean, mean - half, mean + half))
    low, high = found["b", "a"][1:]
    assert (1 - high, 1 - low) == pytest.approx(found["a", "b"][1:])                   # the same interval from the other side
    assert all(found[x, y][0] + found[y, x][0] == pytest.approx(1) for x, y in found)
    assert found["one", "b"][0] == pytest.approx(np.mean([a[p, 0] > y for p in range(50) for y in b[p]]))
