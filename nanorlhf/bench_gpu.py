"""`python -m nanorlhf.bench gpu`: the figures that need a GPU, in bfloat16, in one run and one table.

    log-probs   token_logprobs, forward + backward, at two sizes of large vocabularies, against our own torch version, plain
                log_softmax, F.linear_cross_entropy and, where they are installed, Liger's and Apple's (cut cross-entropy) kernels
    decode      tokens/s at batch 1 and 256, as it is and replayed as a graph, against transformers and the memory's bandwidth
    steps       SFT, DPO and PPO updates at 0.1, 1 and 7 billion parameters: tokens/s, peak memory, share of the matrix rate

Sizes that do not fit in memory are reported as such. Nothing here runs in the tests but with tiny sizes, on a CPU.
"""

import contextlib
import functools
import importlib
import importlib.util

import torch
import torch.nn.functional as F

from nanorlhf import kernels
from nanorlhf.generate import generate
from nanorlhf.model import ModelConfig, Transformer, ValueModel, freeze

LOGPROBS = ((16384, 2048, 128256), (8192, 4096, 151936))                               # N, D, V
SHAPES = {"0.1B": dict(width=768, layers=12, heads=12, kv_heads=12, head_dim=64, ffn=2048, vocab_size=50304),
          "1B": dict(width=2048, layers=16, heads=32, kv_heads=8, head_dim=64, ffn=8192, vocab_size=128256),
          "7B": dict(width=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab_size=32000)}
DECODE = dict(shapes=("0.1B", "1B"), batches=(1, 256), prompt=512, new=128)
STEPS = dict(rows=8, length=1024, prompt=512)


class Bench:
    """Measures functions on one device by `medians`, the function of bench.py. rate: FLOP/s of a bfloat16 product; bandwidth:
    bytes/s read."""

    def __init__(self, device, repeats, medians):
        self.device, self.repeats, self.medians = device, repeats, medians
        n = 8192 if device.type == "cuda" else 256
        a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
        long = torch.ones(2**28 if device.type == "cuda" else 2**16, device=device)
        self.rate = 2 * n**3 / self.time(lambda: a @ a)[0]
        self.bandwidth = 4 * len(long) / self.time(long.sum)[0]
        self.rows = []

    def time(self, run):
        """Returns (median seconds, peak GiB beyond what is there) of `run`."""
        cuda = self.device.type == "cuda"
        before = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        median = self.medians({"run": run}, self.repeats, self.device)["run"]
        return median, (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else 0.0

    def report(self, name, run, work=None, flops=None, bytes_read=None):
        """Measures `run` and prints one line of the table. work: (unit, amount per call); flops and bytes_read: the least that a
        call has to do, which gives its share of the hardware's limit."""
        try:
            seconds, peak = self.time(run)
            row = dict(name=name, seconds=seconds, peak_gib=peak)
            if work:
                row[f"{work[0]}_per_second"] = work[1] / seconds
            if flops:
                row["share_of_matrix_rate"] = flops / self.rate / seconds
            if bytes_read:
                row["share_of_bandwidth"] = bytes_read / self.bandwidth / seconds
        except torch.OutOfMemoryError:
            row = dict(name=name, seconds=None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.rows.append(row)
        numbers = [f"{k} {v:.4g}" for k, v in row.items() if k != "name" and v is not None]
        print(f"{name}: " + ("  ".join(numbers) or "does not fit in memory"), flush=True)


@contextlib.contextmanager
def without_triton():
    """The torch versions of the kernels run on a GPU, too."""
    found, kernels.triton_kernels = kernels.triton_kernels, lambda x: None
    try:
        yield
    finally:
        kernels.triton_kernels = found


def installed(module):
    return importlib.util.find_spec(module) is not None


def logprob_sides(hidden, weight, targets):
    """Returns {name: function}: log p(target) of every token, or minus it, by each implementation that is here."""
    def ours():
        return kernels.token_logprobs(hidden, weight, targets)

    def chunked(rows):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        return lambda: F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)
    sides = {"ours": ours, "ours in torch": ours,
             "plain": lambda: F.linear(hidden, weight).float().log_softmax(-1).gather(-1, targets[:, None])}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        sides |= {f"F.linear_cross_entropy, {rows} rows": chunked(rows) for rows in (512, 2048)}
    if installed("liger_kernel"):
        liger = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(reduction="none")
        sides["Liger"] = lambda: liger(weight, hidden, targets)
    if installed("cut_cross_entropy"):
        cut = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        sides["cut cross-entropy"] = lambda: cut(hidden, weight, targets, reduction="none")
    return sides


def bench_logprobs(bench, N, D, V):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=generator).mul(D**-0.5).to(bench.device, torch.bfloat16).requires_grad_()
                      for n in (N, V))
    targets = torch.randint(V, (N,), generator=generator).to(bench.device)
    gradient = torch.rand(N, generator=generator).to(bench.device)

    def forward_and_backward(side, context):
        hidden.grad = weight.grad = None
        with context():
            side().flatten().backward(gradient)
    for name, side in logprob_sides(hidden, weight, targets).items():
        context = without_triton if name == "ours in torch" else contextlib.nullcontext
        bench.report(f"log-probs {N},{D},{V}, {name}", functools.partial(forward_and_backward, side, context),
                     flops=8 * N * D * V)


def model_of(shape, context, device):
    return Transformer(ModelConfig.for_family("llama", context=context, tied=True, **shape)).to(device)


def bench_decode(bench, name, shape, batches=DECODE["batches"], prompt=DECODE["prompt"], new=DECODE["new"]):
    generator, cuda = torch.Generator().manual_seed(0), bench.device.type == "cuda"
    model = model_of(shape, prompt + new, bench.device)
    c, weights = model.config, sum(p.numel() for p in model.parameters())
    peer = transformers_twin(model) if installed("transformers") else None
    freeze(model, "bfloat16")

    def ours(prompts, graph):
        model.compiled = graph and cuda
        with torch.autocast(bench.device.type, torch.bfloat16):
            generate(model, prompts.tolist(), new)

    @torch.no_grad()
    def theirs(prompts):
        ids = prompts.to(bench.device)
        peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=True, top_k=0,
                      pad_token_id=0)
    for batch in batches:
        prompts = torch.randint(c.vocab_size, (batch, prompt), generator=generator)
        cache = 2 * 2 * c.layers * c.kv_heads * c.head_dim * batch * (prompt + new / 2)        # bytes read in a step
        sides = {"ours": functools.partial(ours, prompts, False), "ours, one GPU graph": functools.partial(ours, prompts, True)}
        if peer is not None:
            sides["transformers"] = functools.partial(theirs, prompts)
        for side, run in sides.items():
            bench.report(f"decode {name}, batch {batch}, {side}", run, ("tokens", batch * new),
                         bytes_read=new * (2 * weights + cache))


def transformers_twin(model):
    """Returns the same weights as transformers' model, in bfloat16."""
    import tempfile

    from transformers import AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(model.embed.weight.device).eval()


def bench_steps(bench, name, shape, rows=STEPS["rows"], length=STEPS["length"], prompt=STEPS["prompt"]):
    from train_dpo import dpo_loss
    from train_ppo import advantages, ppo_loss, token_rewards, values_before
    from train_sft import sft_loss
    device = bench.device
    tokens = torch.randint(shape["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(0)).to(device)
    mask = (torch.arange(length, device=device) >= prompt).expand(rows, -1)
    count = rows * (length - prompt)
    try:
        model, reference = model_of(shape, length, device), freeze(model_of(shape, length, "cpu"), "bfloat16").to(device)
        value = ValueModel(model_of(shape, length, "cpu"), torch.zeros(1, shape["width"])).to(device)
    except torch.OutOfMemoryError:
        print(f"steps {name}: the weights do not fit", flush=True)
        return
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-6, fused=device.type == "cuda") for m in (model, value)]
    model.checkpointing = value.trunk.checkpointing = name == "7B"

    def update(loss, optimizers):
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def sft():
        update(sft_loss(model.logprobs(tokens, mask), mask, count), optimizers[:1])

    def dpo():
        with torch.no_grad():
            before = reference.logprobs(tokens, mask).sum(1).chunk(2)
        update(dpo_loss(*model.logprobs(tokens, mask).sum(1).chunk(2), *before).mean(), optimizers[:1])

    def ppo():
        with torch.no_grad():
            old, before = model.logprobs(tokens, mask), reference.logprobs(tokens, mask)
            old_values = values_before(value, tokens)
            rewards = token_rewards(torch.zeros(rows, device=device), old - before, mask, 0.05)
            adv, returns = advantages(rewards, old_values, mask)
        values = values_before(value, tokens)
        update(ppo_loss(model.logprobs(tokens, mask), old, adv, values, old_values, returns, mask, count)[0], optimizers)

    def in_bfloat16(method):
        with torch.autocast(device.type, torch.bfloat16):
            method()
    body, head = sum(p.numel() for p in model.blocks.parameters()), shape["vocab_size"] * shape["width"]
    again = 2 if model.checkpointing else 0                                            # layers are computed once more
    # FLOPs per weight and token: 2 in a forward pass, 4 in a backward pass, 2 to compute logits again.
    for method, run, of_body, of_head in (("SFT", sft, 6 + again, 8), ("DPO", dpo, 8 + again, 10),
                                          ("PPO update", ppo, 18 + 2 * again, 12)):
        bench.report(f"{method} {name}, {rows} x {length}", functools.partial(in_bfloat16, run), ("tokens", rows * length),
                     flops=of_body * rows * length * body + of_head * count * head)


def bench_gpu(device, repeats, medians):
    """Runs all of it. Returns (limits, rows)."""
    bench = Bench(device, repeats, medians)
    print(f"bfloat16 products {bench.rate / 1e12:.0f} TFLOP/s, memory {bench.bandwidth / 1e12:.2f} TB/s", flush=True)
    for size in LOGPROBS:
        bench_logprobs(bench, *size)
    for name in DECODE["shapes"]:
        bench_decode(bench, name, SHAPES[name])
    for name, shape in SHAPES.items():
        bench_steps(bench, name, shape)
    return dict(flops=bench.rate, bytes_per_second=bench.bandwidth), bench.rows
