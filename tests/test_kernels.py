"""The kernels against closed forms: values, gradients, memory, the distribution of samples, attention over a split cache."""

import io
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanorlhf import kernels
from nanorlhf.kernels import decode_attention, filter_logits, sample, token_logprobs

BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))


def problem(N, D, V, dtype=torch.float64, bias=True):
    """Returns (hidden, weight, targets, bias). The first targets are at the edges of tiles of 1024, as far as N allows."""
    g = torch.Generator().manual_seed(N + D + V)
    hidden, weight, b = (torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in ((N, D), (V, D), (V,)))
    targets = torch.randint(V, (N,), generator=g)
    edges = torch.tensor([0, V - 1] + [e for e in (1023, 1024, 2047, 2048) if e < V])[:N]
    targets[:len(edges)] = edges
    return hidden, weight, targets, b if bias else None


def plain(hidden, weight, targets, bias=None, temperature=1.0):
    return (F.linear(hidden, weight, bias) / temperature).log_softmax(-1).gather(-1, targets[..., None])[..., 0]


# ---- Log-probabilities ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("V", [7, 1023, 1024, 1025, 2048, 2500])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_logprobs_and_gradients_equal_log_softmax_at_every_tile_boundary(monkeypatch, V, dtype, tolerance):
    monkeypatch.setattr(kernels, "TILE", 1024 * 9)      # 9 tokens: tiles of 1024 ids; V is below, at and above the edges
    values = problem(9, 5, V, dtype)
    results = []
    for function in (token_logprobs, plain):
        hidden, weight, bias = (t.clone().requires_grad_() for t in (values[0], values[1], values[3]))
        logp = function(hidden, weight, values[2], bias, temperature=0.7)
        (logp * torch.arange(1, 10).to(dtype)).sum().backward()
        results.append((logp.detach(), hidden.grad, weight.grad, bias.grad))
    assert results[0][0].dtype == dtype
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradients_equal_finite_differences_across_tiles(monkeypatch, temperature):
    monkeypatch.setattr(kernels, "TILE", 1)             # the narrowest tiles: 1024 ids
    hidden, weight, targets, bias = problem(4, 2, 1030)
    assert torch.autograd.gradcheck(lambda h: token_logprobs(h, weight, targets, bias, temperature), [hidden.requires_grad_()])
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]                      # thousands: use random directions
    assert torch.autograd.gradcheck(lambda h, w, b: token_logprobs(h, w, targets, b, temperature), inputs, fast_mode=True)


def test_only_the_required_gradients_are_computed():
    hidden, weight, targets, bias = problem(4, 3, 1500)
    hidden.requires_grad_()
    token_logprobs(hidden, weight, targets, bias).sum().backward()
    assert hidden.grad is not None and weight.grad is None and bias.grad is None
    hidden, weight = hidden.detach(), weight.requires_grad_()
    token_logprobs(hidden, weight, targets, bias).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_entropy_is_that_of_the_softmax_and_has_no_gradient(monkeypatch, temperature):
    monkeypatch.setattr(kernels, "TILE", 1)
    hidden, weight, targets, bias = problem(6, 4, 2500)
    hidden.requires_grad_()
    logp, entropy = token_logprobs(hidden, weight, targets, bias, temperature, entropy=True)
    everything = (F.linear(hidden, weight, bias) / temperature).log_softmax(-1)
    torch.testing.assert_close(entropy, -(everything.exp() * everything).sum(-1).detach(), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(logp, token_logprobs(hidden, weight, targets, bias, temperature), atol=1e-13, rtol=0)
    assert logp.requires_grad and not entropy.requires_grad
    uniform = token_logprobs(torch.zeros(2, 4), weight.float(), targets[:2], entropy=True)
    torch.testing.assert_close(uniform[1], torch.full((2,), math.log(2500)), atol=1e-5, rtol=0)
    torch.testing.assert_close(uniform[0], torch.full((2,), -math.log(2500)), atol=1e-5, rtol=0)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns, in the backward pass too."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel] + [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)])
        return out


def test_no_tensor_of_tokens_times_vocabulary_is_made(monkeypatch):
    N, D, V = 64, 8, 5000
    monkeypatch.setattr(kernels, "TILE", 1024 * N)
    largest = {}
    for function in (token_logprobs, plain):
        hidden, weight, targets, _ = problem(N, D, V, torch.float32)
        with LargestTensor() as mode:
            function(hidden.requires_grad_(), weight.requires_grad_(), targets).sum().backward()
        largest[function] = mode.numel
    assert largest[plain] == N * V                                                     # so the measurement works
    assert largest[token_logprobs] == 1024 * N


def test_bfloat16_autocast_stays_close_and_accumulates_in_float32():
    hidden, weight, targets, _ = problem(32, 64, 3000, torch.float32, bias=False)
    weight, results = weight / 8, []
    for enabled in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logp = token_logprobs(h, w, targets)
        logp.sum().backward()
        results.append((logp.detach(), h.grad, w.grad))
    (exact, dh, dw), (rounded, dh16, dw16) = results
    assert rounded.dtype == dh16.dtype == dw16.dtype == torch.float32
    assert (rounded - exact).abs().max() < 0.03
    for a, b in ((dh, dh16), (dw, dw16)):
        assert (a - b).norm() < 0.02 * a.norm()
    again = plain(hidden.bfloat16().float(), weight.bfloat16().float(), targets)       # only the inputs are rounded
    torch.testing.assert_close(rounded, again, atol=1e-5, rtol=0)


def test_leading_dimensions_are_kept():
    hidden, weight, targets, bias = problem(12, 3, 1100)
    flat = token_logprobs(hidden, weight, targets, bias)
    assert torch.equal(token_logprobs(hidden.view(3, 4, 3), weight, targets.view(3, 4), bias), flat.view(3, 4))
    logp, entropy = token_logprobs(hidden.view(3, 4, 3), weight, targets.view(3, 4), bias, entropy=True)
    assert logp.shape == entropy.shape == (3, 4)


def test_zero_tokens_are_allowed():
    hidden, weight = torch.zeros(0, 3, requires_grad=True), torch.randn(1100, 3, requires_grad=True)
    logp, entropy = token_logprobs(hidden, weight, torch.zeros(0, dtype=torch.long), entropy=True)
    assert logp.shape == entropy.shape == (0,)
    logp.sum().backward()
    assert weight.grad.abs().sum() == 0 and hidden.grad.shape == (0, 3)


def test_logprobs_are_never_positive_and_stay_finite_for_huge_logits():
    weight = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0)) * 300
    hidden = weight[[5, 1999]]                                                         # each target wins by far
    logp = token_logprobs(hidden, weight, torch.tensor([5, 1999]))
    assert logp.isfinite().all() and (logp <= 0).all()
    assert token_logprobs(hidden, weight, torch.tensor([6, 0])).isfinite().all()


def test_temperature_is_applied_exactly_once():
    """Trap 6: without it the values are those at temperature 1; applied twice, those at the temperature squared."""
    hidden, weight, targets, bias = problem(6, 4, 1300)
    at = {t: token_logprobs(hidden, weight, targets, bias, t) for t in (1.0, 0.5, 0.25)}
    torch.testing.assert_close(at[0.5], plain(2 * hidden, weight, targets, 2 * bias), atol=1e-12, rtol=0)
    assert (at[0.5] - at[1.0]).abs().max() > 0.1 and (at[0.5] - at[0.25]).abs().max() > 0.1


# ---- Sampling -------------------------------------------------------------------------------------------------------


SETTINGS = [dict(temperature=1.0), dict(temperature=0.5), dict(temperature=1.5, top_k=7), dict(temperature=0.9, top_p=0.8),
            dict(temperature=1.2, top_k=20, top_p=0.6)]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_sampled_frequencies_pass_a_chi_square_test(options):
    draws, V = 40000, 60
    logits = 2 * torch.randn(1, V, generator=torch.Generator().manual_seed(3))
    uniform = torch.from_numpy(np.random.Generator(np.random.Philox(key=[0, 1])).random(draws, dtype=np.float32))
    tokens, logp = sample(logits.expand(draws, V), uniform, **options)
    p = filter_logits(logits.double(), **options).softmax(-1)[0]
    torch.testing.assert_close(logp, p.log()[tokens].float(), atol=2e-6, rtol=0)       # of the filtered distribution
    expected, seen = draws * p, torch.bincount(tokens, minlength=V).double()
    assert seen[p == 0].sum() == 0
    common = expected >= 5
    pairs = [(expected[common], seen[common])]
    if (rest := (~common) & (p > 0)).any():
        pairs.append((expected[rest].sum()[None], seen[rest].sum()[None]))
    e, s = (torch.cat(x) for x in zip(*pairs))
    chi2 = ((s - e) ** 2 / e).sum()
    assert torch.special.gammaincc(torch.tensor((len(e) - 1) / 2, dtype=torch.float64), chi2 / 2) > 1e-3


@pytest.mark.parametrize("u", [0.0, 2.0**-24, 0.5, BELOW_ONE])
def test_a_token_of_probability_zero_is_never_drawn(u):
    g = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(200, 501, generator=g)
    logits[:, torch.randperm(501, generator=g)[:100]] = -torch.inf
    logits[:100, 400:] = -torch.inf                                                    # impossible ids at the very end
    logits[:100, :50] = -torch.inf                                                     # and at the very beginning
    for options in (dict(), dict(temperature=0.05), dict(top_k=5), dict(top_p=0.5)):
        tokens, logp = sample(logits, torch.full((200,), u), **options)
        kept = filter_logits(logits, **options)
        assert kept.gather(1, tokens[:, None]).isfinite().all() and logp.isfinite().all()
        assert (kept.softmax(-1).gather(1, tokens[:, None]) > 0).all()                 # nor one whose p underflowed


def test_greedy_sampling_takes_the_largest_logit_with_logprob_zero():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(2))
    tokens, logp = sample(logits, torch.rand(5), temperature=0)
    assert torch.equal(tokens, logits.argmax(-1)) and (logp == 0).all()


def test_a_draw_depends_on_its_own_row_only():
    logits, uniform = torch.randn(8, 300, generator=torch.Generator().manual_seed(4)), torch.linspace(0, 0.99, 8)
    tokens, logp = sample(logits, uniform, 0.8, top_k=50, top_p=0.9)
    for i in range(8):
        token, one = sample(logits[i:i + 1], uniform[i:i + 1], 0.8, top_k=50, top_p=0.9)
        assert token == tokens[i] and abs(one - logp[i]) < 1e-6


def test_sample_does_not_modify_the_logits():
    logits = torch.randn(3, 50)
    before = logits.clone()
    sample(logits, torch.rand(3), 1.0, 0, 1.0)
    sample(logits, torch.rand(3), 0.7, 5, 0.5)
    assert torch.equal(logits, before)


def test_filters_keep_the_expected_tokens():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()

    def kept(**options):
        return filter_logits(logits, **options).isfinite()[0].tolist()
    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_k=0) == kept(top_k=4) == kept(top_k=9) == kept(top_p=1.0) == [True] * 4
    assert kept(top_p=0.49) == [True, False, False, False]
    assert kept(top_p=0.6) == [True, True, False, False]                               # the token that crosses top_p stays
    assert kept(top_p=0.0) == kept(top_k=1) == [True, False, False, False]             # one token always stays
    assert kept(temperature=100.0, top_p=0.6) == [True, True, True, False]             # temperature comes before top_p


def test_filters_keep_all_ties_at_the_border():
    """Equal logits differ in nothing but their ids: keeping some of them would make the log-probability depend on the order."""
    def kept(logits, **options):
        return filter_logits(torch.tensor([logits]), **options).isfinite()[0].tolist()
    assert kept([1.0, 3.0, 3.0, 0.0], top_k=1) == [False, True, True, False]
    assert kept([1.0, 3.0, 3.0, 0.0], top_p=0.0) == kept([1.0, 3.0, 3.0, 0.0], top_p=0.3) == [False, True, True, False]
    assert kept([2.0, 1.0, 1.0, 1.0], top_p=0.6) == [True] * 4                         # the second is needed, and its ties stay
    coarse = (2 * torch.randn(20, 300, generator=torch.Generator().manual_seed(0))).bfloat16().float()   # many ties
    for options in (dict(top_k=9), dict(top_p=0.7), dict(top_k=40, top_p=0.5)):
        filtered = filter_logits(coarse, **options)
        for row, left in zip(coarse, filtered):
            assert row[left.isfinite()].min() > row[~left.isfinite()].max()
        shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(1))
        assert torch.equal(filter_logits(coarse[:, shuffled], **options), filtered[:, shuffled])


def test_filters_agree_with_transformers():
    process = pytest.importorskip("transformers.generation.logits_process", reason="needs transformers (the `parity` extra)")
    logits = 2 * torch.randn(50, 200, generator=torch.Generator().manual_seed(5))
    for k, p, t in ((10, 0.9, 0.7), (0, 0.5, 1.3), (3, 1.0, 1.0), (150, 0.99, 2.0), (200, 0.2, 1.0)):
        theirs = process.TemperatureLogitsWarper(t)(None, logits) if t != 1.0 else logits
        theirs = process.TopKLogitsWarper(k)(None, theirs) if k else theirs
        theirs = process.TopPLogitsWarper(p)(None, theirs) if p < 1 else theirs
        torch.testing.assert_close(filter_logits(logits, t, k, p), theirs, atol=1e-6, rtol=0)


# ---- Attention while decoding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("H, K, n", [(4, 4, 1), (4, 4, 3), (6, 2, 1), (6, 2, 4), (4, 1, 2)])
def test_decode_attention_equals_plain_attention_on_ragged_prompts(H, K, n):
    g = torch.Generator().manual_seed(6)
    P, S, T, E = 3, 7, 4, 8
    lengths = [7, 1, 4]

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)
    q, prefix_k, prefix_v, suffix_k, suffix_v = (
        randn(P * n, H, E), randn(P, K, S, E), randn(P, K, S, E), randn(P * n, K, T, E), randn(P * n, K, T, E))
    bias = torch.zeros(P, 1, 1, 1, S, dtype=torch.float64)
    for p, length in enumerate(lengths):
        bias[p, ..., length:] = -torch.inf
        prefix_k[p, :, length:] = 1e6                                                  # garbage in the padding
    if n == 1:                                                                         # prompt and new tokens in one buffer
        own_bias = torch.cat([bias[:, 0], torch.zeros(P, 1, 1, T, dtype=torch.float64)], -1)
        got = decode_attention(q, torch.cat([prefix_k, suffix_k], 2), torch.cat([prefix_v, suffix_v], 2), own_bias)
    else:
        got = decode_attention(q, suffix_k, suffix_v, prefix=(prefix_k, prefix_v, None, bias))
    for r in range(P * n):
        for h in range(H):
            k = h // (H // K)
            real = slice(0, lengths[r // n])
            keys = torch.cat([prefix_k[r // n, k, real], suffix_k[r, k]])
            values = torch.cat([prefix_v[r // n, k, real], suffix_v[r, k]])
            want = (keys @ q[r, h] / math.sqrt(E)).softmax(0) @ values
            torch.testing.assert_close(got[r, h * E:(h + 1) * E], want, atol=1e-6, rtol=1e-6)   # its softmax is float32


# ---- Packed weights -------------------------------------------------------------------------------------------------

packs = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@packs
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_weight_gives_the_same_product(monkeypatch, bias):
    monkeypatch.setattr(kernels, "packing_rule", lambda: (range(3, 50), 2**18))
    generator = torch.Generator().manual_seed(0)
    weight, b = torch.randn(1100, 300, generator=generator), torch.randn(1100, generator=generator) if bias else None
    packed = kernels.pack(weight)
    for shape in ((1, 300), (3, 300), (40, 1, 300), (49, 300), (5, 20, 300)):          # 1 and 100 rows are outside the range
        x = torch.randn(shape, generator=generator)
        exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
        torch.testing.assert_close(kernels.packed_linear(x, weight, b, packed), exact.float(), atol=1e-4, rtol=1e-5)
    zero = torch.zeros_like(weight)                                                    # only the packed copy is read
    assert [bool(kernels.packed_linear(torch.ones(n, 300), zero, None, packed).any()) for n in (2, 3, 49, 50)] == [
        False, True, True, False]


def test_small_weights_and_other_dtypes_are_not_packed(monkeypatch):
    monkeypatch.setattr(kernels, "packing_rule", lambda: (range(1, 2**31), 2**18))
    assert kernels.pack(torch.zeros(511, 512)) is None and kernels.pack(torch.zeros(512, 512, dtype=torch.float64)) is None
    assert kernels.pack(torch.zeros(512, 512)) is not None or not torch.backends.mkldnn.is_available()


@pytest.mark.parametrize("maker, rows, least", [
    ("AuthenticAMD", [1, 3, 4, 64], 2**18), ("GenuineIntel", [4, 64], 2**24), ("Somebody", [], 0), (None, [], 0)])
def test_what_is_packed_depends_on_the_processor_only(monkeypatch, maker, rows, least):
    def cpuinfo(path, encoding):
        if maker is None:
            raise FileNotFoundError(path)
        return io.StringIO(f"processor\t: 0\nvendor_id\t: {maker}\ncpu family\t: 25\n")
    monkeypatch.setattr(kernels, "open", cpuinfo, raising=False)
    found, size = kernels.packing_rule.__wrapped__()
    assert [n for n in (1, 3, 4, 64) if n in found] == rows and size == least


@packs
def test_packing_pays_from_some_steps_and_rows(monkeypatch):
    monkeypatch.setattr(kernels, "packing_rule", lambda: (range(3, 33), 2**18))
    eighth = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8
    large = [torch.empty(2**18, device="meta")]
    for rows, steps, weights, pays in ((3, 16, large, True), (500, 16, large, True), (2, 16, large, False), (3, 15, large, False),
                                       (3, 16, [torch.empty(eighth // 4, device="meta")], True),
                                       (3, 16, [torch.empty(eighth // 4 + 1, device="meta")], False),
                                       (3, 16, [torch.empty(2**18 - 1, device="meta")], False)):
        assert kernels.packing_pays(rows, steps, weights) == pays
    monkeypatch.setattr(kernels, "packing_rule", lambda: (range(0), 0))
    assert not kernels.packing_pays(16, 16, large)
