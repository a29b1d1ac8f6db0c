"""The Triton kernels: against float64 under Triton's interpreter, on a CPU; and compiled for NVIDIA GPUs, without one. Where
there is a GPU, the same tests run on it (tests/test_gpu.py)."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"          # read when Triton is imported, and when a kernel is defined
triton = pytest.importorskip("triton", reason="the extra `parity` brings Triton")

from nanorlhf import kernels, kernels_triton  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


# ---- The interpreter's bfloat16 -------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def interpreter_with_bfloat16():
    """The interpreter holds bfloat16 as its bits and calculates with them as if they were integers. Here products widen them to
    float32, which is exact, stores round to nearest even, and any other arithmetic on them fails."""
    if DEVICE == "cuda":
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    tl, patch = triton.language, pytest.MonkeyPatch()
    dot, cast, binary, unary = (getattr(InterpreterBuilder, f) for f in ("create_dot", "cast_impl", "binary_op", "unary_op"))

    def wide(x):
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def create_dot(self, a, b, d, *rest):
        return dot(self, wide(a), wide(b), d, *rest)

    def cast_impl(self, x, dtype):
        if x.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            bits = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
            return TensorHandle(bits, tl.bfloat16)
        return cast(self, x, dtype)

    def refuse(f):
        def checked(self, *operands):
            assert not any(getattr(x, "dtype", None) and x.dtype.scalar == tl.bfloat16 for x in operands[:-1]), \
                "arithmetic on bfloat16: convert to float32 first"
            return f(self, *operands)
        return checked
    for name, f in dict(create_dot=create_dot, cast_impl=cast_impl, binary_op=refuse(binary), unary_op=refuse(unary)).items():
        patch.setattr(InterpreterBuilder, name, f)
    yield
    patch.undo()


def small_kernels():
    """A product and a sum in bfloat16, for the test of the interpreter itself."""
    import bfloat16_kernels
    return bfloat16_kernels


@pytest.mark.skipif(DEVICE == "cuda", reason="tests the interpreter")
def test_the_interpreter_rounds_and_multiplies_bfloat16_as_torch_does():
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.empty(16, 16, dtype=torch.bfloat16)
    small_kernels().product[(1,)](x, x, out)
    torch.testing.assert_close(out, (x.float() @ x.float()).bfloat16(), atol=0, rtol=2**-8)
    assert (out == (x.float() @ x.float()).bfloat16()).float().mean() > 0.95          # the same up to the products' order


@pytest.mark.skipif(DEVICE == "cuda", reason="tests the interpreter")
def test_the_interpreter_refuses_arithmetic_on_bfloat16():
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="arithmetic on bfloat16"):
        small_kernels().twice[(1,)](x, torch.empty_like(x))


# ---- Log-probabilities ----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """The Triton kernels run on this machine's tensors, whatever its device is."""
    monkeypatch.setattr(kernels, "triton_kernels", lambda x: kernels_triton)


def oracle(hidden, weight, targets, bias, temperature):
    """(log p, entropy) in float64 by torch's own functions."""
    z = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    logp = (z / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("N, V, tile, scale, shift", [
    (5, 97, 32, 1.0, 0.0), (1, 129, 64, 1.0, 0.0), (4, 65, 64, 30.0, 0.0), (3, 64, 64, 1.0, -1e4), (3, 200, 200, 5.0, 1e4)],
    ids=["last tile of one", "one row", "peaked", "all near -1e4", "all near 1e4"])
@pytest.mark.parametrize("with_bias, temperature", [(False, 1.0), (True, 0.7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_token_logprobs_and_gradients_equal_float64(dtype, N, V, tile, scale, shift, with_bias, temperature, monkeypatch):
    """V is no multiple of the tile; targets lie at every tile's edge and at the end; gradients differ from token to token."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, 7, generator=generator).to(dtype)
    weight = (scale * torch.randn(V, 7, generator=generator)).to(dtype).float()
    bias = torch.randn(V, generator=generator) + shift if with_bias or shift else None
    targets = torch.tensor([V - 1, 0, tile - 1, min(tile, V - 1), V // 2])[:N]
    grad = torch.randn(N, generator=generator)
    leaves = [x.clone().to(DEVICE).requires_grad_() for x in (hidden, weight, bias) if x is not None]
    tiles = kernels._TokenLogprobs.tiles
    monkeypatch.setattr(kernels._TokenLogprobs, "tiles", staticmethod(lambda *a: small_tiles(tiles, tile, *a)))
    logp, entropy = kernels.token_logprobs(leaves[0], leaves[1], targets.to(DEVICE), *leaves[2:], temperature=temperature,
                                           entropy=True)
    logp.backward(grad.to(DEVICE))
    exact = [x.double().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    wanted, wanted_entropy = oracle(*exact[:2], targets, exact[2] if bias is not None else None, temperature)
    wanted.backward(grad.double())
    rounding = 1e-5 * max(1.0, abs(shift), scale)                                      # of the float32 logits themselves
    of_gradients = 20 * rounding if dtype == torch.float32 else 2**-7 * max(1.0, scale)   # which are bfloat16, too
    torch.testing.assert_close(logp.cpu().double(), wanted.detach(), atol=rounding, rtol=1e-5)
    torch.testing.assert_close(entropy.cpu().double(), wanted_entropy.detach(), atol=20 * rounding, rtol=1e-4)
    for leaf, x in zip(leaves, exact):
        assert leaf.grad.dtype == leaf.dtype
        torch.testing.assert_close(leaf.grad.cpu().double(), x.grad, atol=of_gradients, rtol=1e-3 if dtype == torch.float32 else 0.01)


def small_tiles(tiles, width, hidden, weight, bias, targets):
    """`tiles` in tiles of this width, so that a small vocabulary has several."""
    for first in range(0, len(weight), width):
        w = weight[first:first + width].to(hidden.dtype)
        yield (slice(first, first + width), w, kernels.matmul32(hidden, w.T), None if bias is None else bias[first:first + width],
               targets - first)


def test_a_token_without_gradient_takes_none_and_the_entropy_is_computed_only_if_asked():
    z = torch.randn(3, 50, device=DEVICE)
    state = torch.zeros(4, 3, device=DEVICE)
    state[0] = -torch.inf
    kernels_triton.absorb(z, None, 1.0, torch.tensor([1, 2, 77], device=DEVICE), state, False)
    assert (state[2] == 0).all() and state[3, 2] == 0                                  # 77 lies in another tile
    dz = kernels_triton.logits_gradient(z, None, 1.0, torch.tensor([1, 2, 3], device=DEVICE), z.logsumexp(1),
                                        torch.tensor([1.0, 0.0, -2.0], device=DEVICE), torch.float32)
    assert (dz[1] == 0).all() and torch.allclose(dz.sum(1), torch.zeros(3, device=DEVICE), atol=1e-5)


# ---- Sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("V", [1, 50, 129])
@pytest.mark.parametrize("options", [dict(), dict(temperature=0.6), dict(top_k=5), dict(top_p=0.8), dict(top_k=20, top_p=0.5),
                                     dict(top_k=1), dict(top_p=0.0), dict(top_k=1000, top_p=0.999)], ids=str)
def test_draws_equal_the_torch_versions(V, options):
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(4, V, generator=generator)
    uniform = torch.tensor([0.0, 0.3, 0.77, 0.999])
    options = dict(temperature=1.0, top_k=0, top_p=1.0) | options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "triton_kernels", lambda x: None)
        wanted = kernels.sample(logits, uniform, **options)
    tokens, logprobs = kernels_triton.sample(logits.to(DEVICE), uniform.to(DEVICE), **options)
    assert tokens.tolist() == wanted[0].tolist()
    torch.testing.assert_close(logprobs.cpu(), wanted[1], atol=2e-6, rtol=1e-5)


def test_all_ties_at_the_border_stay_in():
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, -5.0, 1.0]]).expand(4, -1).contiguous()
    for options in (dict(top_k=2, top_p=1.0), dict(top_k=0, top_p=0.5)):
        tokens, logprobs = kernels_triton.sample(logits.to(DEVICE), torch.tensor([0.05, 0.5, 0.7, 0.999], device=DEVICE), 1.0, **options)
        kept = torch.tensor([2.0, 1, 1, 1, 1]).log_softmax(0)
        assert tokens.tolist()[0] == 0 and tokens.tolist()[-1] == 5
        torch.testing.assert_close(logprobs.cpu()[[0, 3]], kept[[0, 1]])


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.full((2, 70), -torch.inf)
    logits[:, 3], logits[:, 10] = 0.0, -1.0
    tokens, logprobs = kernels_triton.sample(logits.to(DEVICE), torch.tensor([0.0, 1 - 2**-24], device=DEVICE), 1.0, 0, 1.0)
    assert tokens.tolist() == [3, 10] and torch.isfinite(logprobs).all()


def test_a_row_is_bitwise_independent_of_its_neighbours():
    generator = torch.Generator().manual_seed(2)
    logits, uniform = torch.randn(3, 90, generator=generator).to(DEVICE), torch.rand(3, generator=generator).to(DEVICE)
    together = kernels_triton.sample(logits, uniform, 0.9, 30, 0.9)
    for row in range(3):
        alone = kernels_triton.sample(logits[row:row + 1], uniform[row:row + 1], 0.9, 30, 0.9)
        assert all(torch.equal(a[row:row + 1], b) for a, b in zip(together, alone))


# ---- Attention of a decoding step -----------------------------------------------------------------------------------


def attention_case(P, n, K, G, E, S, T, used, dtype=torch.float32, seed=0):
    """(q, k, v, last, prefix) with prompts of several lengths, and NaN wherever no key is."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(P * n, *shape, generator=generator).to(dtype) for shape in ((K * G, E), (K, T, E), (K, T, E)))
    keys, values = (torch.randn(P, K, S, E, generator=generator).to(dtype) for _ in "kv")
    lengths = torch.tensor([max(1, S - 37 * p) for p in range(P)])
    for p, length in enumerate(lengths.tolist()):
        keys[p, :, length:], values[p, :, length:] = torch.nan, torch.nan
    k[:, :, used:], v[:, :, used:] = torch.nan, torch.nan
    place = [x.to(DEVICE) for x in (q, k, v, torch.tensor([used - 1]), keys, values, lengths)]
    return *place[:4], (*place[4:], None)


def exact_attention(q, k, v, last, prefix):
    """The same in float64, row by row."""
    keys, values, lengths, _ = prefix
    (R, H, E), K, rows = q.shape, k.shape[1], []
    for row in range(R):
        p = row // (R // len(keys))
        all_k = torch.cat([keys[p, :, :lengths[p]], k[row, :, :last + 1]], 1).double().repeat_interleave(H // K, 0)
        all_v = torch.cat([values[p, :, :lengths[p]], v[row, :, :last + 1]], 1).double().repeat_interleave(H // K, 0)
        weights = (all_k @ q[row].double()[:, :, None])[..., 0].mul(E**-0.5).softmax(-1)
        rows.append((weights[:, None] @ all_v)[:, 0].flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("P, n, K, G, E, S, T, used", [
    (2, 3, 2, 2, 16, 70, 20, 7), (3, 1, 1, 1, 8, 40, 9, 1), (1, 5, 1, 3, 20, 1, 5, 5), (2, 1, 2, 1, 16, 300, 270, 260),
    (1, 70, 1, 1, 16, 20, 3, 2)], ids=["grouped", "n = 1, narrow heads", "odd width, prompt of one", "two splits", "two tiles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_equals_float64(P, n, K, G, E, S, T, used, dtype):
    case = attention_case(P, n, K, G, E, S, T, used, dtype)
    out = kernels_triton.decode_attention(*case)
    assert out.dtype == dtype
    tolerance = dict(atol=1e-5, rtol=1e-5) if dtype == torch.float32 else dict(atol=0.02, rtol=0.01)
    torch.testing.assert_close(out.double(), exact_attention(*case), **tolerance)


def test_attention_of_a_row_is_bitwise_independent_of_neighbours_capacity_and_compaction():
    q, k, v, last, (keys, values, lengths, _) = attention_case(P=2, n=3, K=1, G=2, E=16, S=60, T=10, used=6)
    out = kernels_triton.decode_attention(q, k, v, last, (keys, values, lengths, None)).view(6, -1)
    for row in range(6):                                                               # alone: neither neighbours nor n
        p = slice(row // 3, row // 3 + 1)
        alone = kernels_triton.decode_attention(q[row:row + 1], k[row:row + 1], v[row:row + 1], last,
                                                (keys[p].contiguous(), values[p].contiguous(), lengths[p].contiguous(), None))
        assert torch.equal(alone[0], out[row])

    def larger(x):                                                                     # by a whole split and more
        return torch.cat([x, torch.full((*x.shape[:2], 300, x.shape[3]), torch.nan, device=x.device)], 2)
    roomy = kernels_triton.decode_attention(q, larger(k), larger(v), last, (larger(keys), larger(values), lengths, None))
    assert torch.equal(roomy.view(6, -1), out)


def test_attention_equals_the_torch_version():
    q, k, v, last, (keys, values, lengths, _) = attention_case(P=2, n=3, K=2, G=2, E=16, S=60, T=10, used=6)
    empty = torch.arange(60, device=DEVICE) >= lengths[:, None]
    bias = torch.zeros(2, 60, device=DEVICE).masked_fill_(empty, -torch.inf)[:, None, None, None]
    keys, values = keys.nan_to_num(), values.nan_to_num()                              # NaN * 0 is NaN in a plain product
    k, v = k.nan_to_num(), v.nan_to_num()
    ours = kernels_triton.decode_attention(q, k, v, last, (keys, values, lengths, bias))
    kernels.triton_kernels = lambda x: None                                            # `everywhere` restores it
    torch.testing.assert_close(ours, kernels.decode_attention(q, k, v, last=last, prefix=(keys, values, lengths, bias)))
    torch.testing.assert_close(ours, kernels.decode_attention(q, k[:, :, :6], v[:, :, :6], prefix=(keys, values, lengths, bias)))


# ---- All of it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, n, options", [("gpt2", 1, dict(max_new_tokens=20)),
                                                ("llama", 2, dict(max_new_tokens=7, top_k=20, top_p=0.95))])
def test_generate_draws_the_same_tokens_with_the_triton_kernels(family, n, options, monkeypatch):
    """The whole decoding step; in gpt2 rows end and leave the batch after 16 steps, llama has grouped-query attention."""
    from nanorlhf.generate import generate
    from nanorlhf.model import ModelConfig, Transformer
    config = ModelConfig.for_family(family, 24, vocab_size=40, context=40, layers=1, heads=4, kv_heads=2 if family ==
                                               "llama" else 4, head_dim=6, end_ids=(1, 2, 3), pad_id=0, init_std=0.3)
    model, prompts = Transformer(config).to(DEVICE), [[5, 9, 3, 22, 17], [4], [11, 2, 19]]
    options |= dict(num_samples=n, seed=2)
    monkeypatch.setattr("nanorlhf.generate.static_shapes", lambda device: True)
    ours = generate(model, prompts, **options)
    assert ours.finished.any() and not ours.finished.all()
    kernels.triton_kernels = lambda x: None                                            # `everywhere` restores it
    wanted = generate(model, prompts, **options)
    assert ours.tokens.tolist() == wanted.tokens.tolist() and ours.mask.tolist() == wanted.mask.tolist()
    torch.testing.assert_close(ours.logprobs, wanted.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_model_trains_with_the_triton_kernels_as_without(temperature):
    from nanorlhf.model import ModelConfig, Transformer
    config = ModelConfig.for_family("gptj", 16, vocab_size=40, context=12, layers=1, heads=2, kv_heads=2, head_dim=8, rotary_dim=4)
    tokens = torch.randint(40, (3, 12), generator=torch.Generator().manual_seed(0), device="cpu").to(DEVICE)
    mask = (torch.arange(12, device=DEVICE) > 3).expand(3, -1)
    results = []
    for kernel in (lambda x: kernels_triton, lambda x: None):
        kernels.triton_kernels = kernel
        model = Transformer(config).to(DEVICE)
        logprobs = model.logprobs(tokens, mask, temperature)
        (logprobs ** 2).sum().backward()
        results.append([logprobs.detach(), *(p.grad for p in model.parameters())])
    for ours, wanted in zip(*results):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4)


# ---- Compilation ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
def test_every_kernel_compiles_for_gpus_at_its_tiles_without_spills():
    """In a child process: one process cannot both interpret and compile. 99 KiB is the shared memory of the smallest GPUs."""
    script = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"})
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line.split() for line in run.stdout.splitlines()]
    assert {line[0] for line in lines} == {"_absorb", "_logits_gradient", "_sample", "_attend", "_combine"}
    for name, case, capability, registers, spills, shared, products in lines:
        assert int(spills) == 0 and int(shared) <= 99 * 1024, (name, case, capability, registers, spills, shared)
        assert (int(products) > 0) == (name == "_attend" and case.startswith("bf16")), (name, case, capability, products)
