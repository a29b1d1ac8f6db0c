"""What only a GPU shows. `python -m pytest -m gpu` runs these tests, and with Triton also those of tests/test_triton.py on the
GPU instead of the interpreter."""

import json

import pytest
import torch

from conftest import SCRIPTS, TRAINERS, entry_of, known_options
from nanorlhf import generate as generating
from nanorlhf import kernels
from nanorlhf.bench_gpu import SHAPES, Bench, bench_decode, bench_logprobs, bench_steps, without_triton
from nanorlhf.generate import generate
from nanorlhf.model import ModelConfig, Transformer

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
TINY = dict(width=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=64, vocab_size=96)


def on_gpu(f):
    for mark in gpu:
        f = mark(f)
    return f


def random(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_probs_are_the_same_to_the_bit_from_run_to_run_and_close_to_the_torch_versions(dtype):
    N, D, V = 2000, 256, 50257
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1)).cuda()
    results = []
    for torch_only in (False, False, True):
        hidden, weight = random(N, D, dtype=dtype).requires_grad_(), random(V, D, dtype=torch.float32, seed=1).requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            if torch_only:
                patch.setattr(kernels, "triton_kernels", lambda x: None)
            logp, entropy = kernels.token_logprobs(hidden, weight, targets, temperature=0.7, entropy=True)
            logp.backward(torch.linspace(-1, 1, N, device="cuda"))
        results.append((logp.detach(), entropy, hidden.grad, weight.grad))
    for a, b, c in zip(*results):
        assert torch.equal(a, b)
        assert (a.float() - c.float()).norm() <= (1e-4 if dtype == torch.float32 else 0.01) * c.float().norm()


@on_gpu
def test_log_probs_hold_no_matrix_of_tokens_by_vocabulary():
    N, D, V = 16384, 512, 128256
    hidden, weight = random(N, D).requires_grad_(), random(V, D, seed=1).requires_grad_()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kernels.token_logprobs(hidden, weight, torch.zeros(N, dtype=torch.long, device="cuda")).sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < N * 4096 * 12 + 4 * (hidden.numel() + weight.numel()) * 2            # tiles and gradients; the matrix has 8 GiB


@on_gpu
def test_offsets_beyond_31_bits_are_right():
    """R * V = 2.4e9 logits, and N * W = 2.5e9 numbers of a tile."""
    R, V = 18_500, 131_072
    logits = torch.zeros(R, V, device="cuda")
    logits[-1, 77] = 30.0
    tokens, logprobs = kernels.sample(logits, torch.full((R,), 0.5, device="cuda"))
    assert int(tokens[-1]) == 77 and abs(int(tokens[0]) - V // 2) <= 1 and float(logprobs[-1]) == pytest.approx(0.0, abs=1e-4)
    del logits
    N = 600_000
    hidden, weight = random(N, 8), random(4096, 8, seed=1)
    logp = kernels.token_logprobs(hidden, weight, torch.full((N,), 4095, device="cuda"))
    wanted = (hidden[-3:].float() @ weight.float().T).log_softmax(-1)[:, -1]
    torch.testing.assert_close(logp[-3:], wanted, atol=1e-4, rtol=1e-4)


@on_gpu
@pytest.mark.parametrize("n", [1, 4])
def test_a_step_replayed_as_a_graph_draws_what_the_step_draws(n, monkeypatch):
    model = Transformer(ModelConfig.for_family("llama", 256, vocab_size=1000, context=256, layers=3, heads=4, kv_heads=2,
                                               head_dim=64, end_ids=tuple(range(20)), init_std=0.2)).cuda()
    prompts, results = [[5, 9, 3], [4] * 70, [11, 2]], []
    for graphs in (False, True, True):
        monkeypatch.setattr(generating, "GRAPHS", graphs)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            results.append(generate(model, prompts, 100, top_k=50, top_p=0.95, num_samples=n, seed=3))
    for other in results[1:]:
        assert other.tokens.tolist() == results[0].tokens.tolist() and torch.equal(other.logprobs, results[0].logprobs)


@on_gpu
def test_generate_with_and_without_triton_draws_the_same_tokens():
    model = Transformer(ModelConfig.for_family("llama", 256, vocab_size=1000, context=256, layers=2, heads=4, kv_heads=2,
                                               head_dim=64, init_std=0.1)).cuda()
    prompts, options = [[5, 9, 3], [4] * 70], dict(max_new_tokens=40, top_k=50, num_samples=3, seed=3)
    ours = generate(model, prompts, **options)
    with without_triton():
        wanted = generate(model, prompts, **options)
    assert (ours.tokens == wanted.tokens).float().mean() > 0.95                        # a draw at a border may round otherwise
    same = (ours.tokens == wanted.tokens).cumprod(1).bool()
    torch.testing.assert_close(ours.logprobs[same], wanted.logprobs[same], atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / "sft"
    train = TRAINERS["train_sft"]
    train.train(train.Config(init="scratch", kind="text", out=str(out), max_steps=2, limit=200, eval_every=0, dtype="bfloat16"))
    return out


def start(name, sft, tmp_path, out="out", **options):
    """Two steps of the script; returns the run's folder."""
    module = SCRIPTS[name]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(dict(prompt=f"Review of the film {i}:", chosen=" I liked it.", rejected=" Bad.",
                                             completion=" Good.")) + "\n" for i in range(40)))
    options = known_options(module, dict(init=str(sft), reward="gold", max_steps=2, batch_size=8, response_length=8, limit=16,
                                         num_eval_prompts=4, eval_every=2, eval_fraction=0.2, n=2, device="cuda",
                                         keep_unfinished=True) | options)
    if module.Config.data != "reviews":
        options["data"] = str(pairs)
    entry_of(module)(module.Config(**options, out=str(tmp_path / out)))
    assert json.loads((tmp_path / out / "run.json").read_text())["finished"]
    return tmp_path / out


@on_gpu
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("compile", [False, True])
def test_a_step_of_each_script_in_bfloat16(name, compile, sft, tmp_path):
    start(name, sft, tmp_path, dtype="bfloat16", compile=compile, gradient_checkpointing=True, share_prompts=True)


@on_gpu
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_deterministic_run_repeats_its_bytes(name, dtype, sft, tmp_path):
    try:
        a, b = (start(name, sft, tmp_path, out, dtype=dtype, deterministic=True) for out in "ab")
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    file = "ranked.jsonl" if name == "sample_bon" else "model.safetensors"
    assert (a / file).read_bytes() == (b / file).read_bytes()


# ---- The benchmark itself, with tiny sizes, on a CPU ----------------------------------------------------------------


def test_the_gpu_benchmark_runs():
    def medians(sides, repeats, device):
        for run in sides.values():
            run()
        return dict.fromkeys(sides, 1.0)
    bench = Bench(torch.device("cpu"), 1, medians)
    bench_logprobs(bench, 20, 8, 50)
    bench_decode(bench, "tiny", TINY, batches=((1, 1), (2, 2)), prompt=5, new=3)
    bench_steps(bench, "tiny", TINY, rows=2, length=12, prompt=4)
    names = [row["name"] for row in bench.rows]
    assert any(n.startswith("log-probs 20,8,50, ours") for n in names) and "decode tiny, 2 prompts x 2, ours, without a graph" in names
    assert {"SFT tiny, 2 x 12", "DPO tiny, 2 x 12", "PPO update tiny, 2 x 12"} <= set(names)
    assert all(row["seconds"] == 1.0 for row in bench.rows)


def test_the_sizes_of_the_gpu_benchmark_are_what_their_names_say():
    for name, shape in SHAPES.items():
        with torch.device("meta"):
            model = Transformer(ModelConfig.for_family("llama", context=64, tied=True, **shape))
        billions = sum(p.numel() for p in model.parameters()) / 1e9
        assert billions == pytest.approx(float(name[:-1]), rel=0.3), (name, billions)
