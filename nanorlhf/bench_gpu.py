"""`python -m nanorlhf.bench gpu`: the figures that need a GPU, in bfloat16, in one run and one table.

    log-probs   token_logprobs, forward + backward, at two sizes of large vocabularies, against our own torch version, plain
                log_softmax, F.linear_cross_entropy and, where they are installed, Liger's and Apple's (cut cross-entropy) kernels
    decode      tokens/s for 1 and 256 prompts and for 16 x 16 samples, with and without a graph, against transformers
                and the memory's bandwidth
    steps       SFT, DPO and PPO updates at 0.1, 1 and 7 billion parameters: tokens/s, peak memory, share of the matrix rate

Sizes that do not fit in memory are reported as such. Nothing here runs in the tests but with tiny sizes, on a CPU.
"""

import contextlib
import functools
import gc
import importlib
import importlib.util

import torch
import torch.nn.functional as F

from nanorlhf import generate as generating
from nanorlhf import kernels
from nanorlhf.model import ModelConfig, Transformer, ValueModel, freeze

PARTS = ("log-probs", "decode", "steps")
LOGPROBS = ((16384, 2048, 128256), (8192, 4096, 151936))                               # N, D, V
SHAPES = {"0.1B": dict(width=768, layers=12, heads=12, kv_heads=12, head_dim=64, ffn=2048, vocab_size=50304),
          "1B": dict(width=2048, layers=16, heads=32, kv_heads=8, head_dim=64, ffn=8192, vocab_size=128256),
          "7B": dict(width=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab_size=32000)}
DECODE = dict(shapes=("0.1B", "1B"), batches=((1, 1), (256, 1), (16, 16)), prompt=512, new=64)
STEPS = dict(rows=8, length=1024, prompt=512)


class Bench:
    """Measures functions on one device by `medians`, the function of bench.py. rate: FLOP/s of a bfloat16 product; bandwidth:
    bytes/s read."""

    def __init__(self, device, repeats, medians):
        self.device, self.repeats, self.medians = device, repeats, medians
        n = 8192 if device.type == "cuda" else 256
        a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
        long = torch.ones(2**28 if device.type == "cuda" else 2**16, device=device)
        self.rate = 2 * n**3 / self.time(lambda: lambda: a @ a)[0]
        self.bandwidth = 4 * len(long) / self.time(lambda: long.sum)[0]
        self.rows = []

    def time(self, make):
        """make() prepares and returns the function to measure. Returns (median seconds, peak GiB beyond what was there before
        make)."""
        cuda = self.device.type == "cuda"
        before = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        median = self.medians({"run": make()}, self.repeats, self.device)["run"]
        return median, (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else 0.0

    def report(self, name, make, work=None, flops=0, bytes_read=0):
        """Measures what make() returns and prints one line of the table. work: (unit, amount per call); flops: the least
        matrix products of a call; bytes_read: the least that its other part has to read. They give its share of the limit."""
        try:
            seconds, peak = self.time(make)
            row = dict(name=name, seconds=seconds, peak_gib=peak)
            if work:
                row[f"{work[0]}_per_second"] = work[1] / seconds
            row["share_of_limit"] = (flops / self.rate + bytes_read / self.bandwidth) / seconds
        except torch.OutOfMemoryError:
            row = dict(name=name, seconds=None)
        if self.device.type == "cuda":
            gc.collect()
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
        # By default it leaves out gradients of tokens that are improbable, and with random weights those are all of them.
        sides["cut cross-entropy"] = lambda: cut(hidden, weight, targets, reduction="none", filter_eps=None)
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
        bench.report(f"log-probs {N},{D},{V}, {name}", lambda: functools.partial(forward_and_backward, side, context),
                     flops=8 * N * D * V)


def model_of(shape, context, device):
    """Returns a model of random weights, drawn on the device: 7 billion of them would take minutes on a CPU."""
    with torch.device("meta"):
        model = Transformer(ModelConfig.for_family("llama", context=context, tied=True, **shape))
    model.to_empty(device=device)
    model.make_rope()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02) if p.dim() > 1 else p.fill_(1.0)
    return model.to(device)


def bench_decode(bench, name, shape, batches=DECODE["batches"], prompt=DECODE["prompt"], new=DECODE["new"]):
    """batches: (prompts, samples of each)."""
    generator = torch.Generator().manual_seed(0)
    model = model_of(shape, prompt + new, bench.device)
    c, weights = model.config, sum(p.numel() for p in model.parameters())
    peer = transformers_twin(model) if installed("transformers") else None
    freeze(model, "bfloat16")

    def ours(prompts, n, graphs):
        generating.GRAPHS = graphs
        with torch.autocast(bench.device.type, torch.bfloat16):
            generating.generate(model, prompts.tolist(), new, num_samples=n)
        generating.GRAPHS = True

    @torch.no_grad()
    def theirs(prompts, n):
        ids = prompts.to(bench.device)
        peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=True, top_k=0,
                      num_return_sequences=n, pad_token_id=0)
    for P, n in batches:
        prompts = torch.randint(c.vocab_size, (P, prompt), generator=generator)
        token = 2 * 2 * c.layers * c.kv_heads * c.head_dim                             # bytes of its keys and values
        step = 2 * weights + token * (P * prompt + P * n * new / 2)                    # bytes read in a step
        prefill = 2 * (weights - model.embed.weight.numel()) * P * prompt              # FLOPs
        sides = {"ours": functools.partial(ours, prompts, n, True),
                 "ours, without a graph": functools.partial(ours, prompts, n, False)}
        if peer is not None:
            sides["transformers"] = functools.partial(theirs, prompts, n)
        for side, run in sides.items():
            bench.report(f"decode {name}, {P} prompts x {n}, {side}", lambda: run, ("tokens", P * n * new),
                         flops=prefill, bytes_read=new * step)


def transformers_twin(model):
    """Returns the same weights as transformers' model, in bfloat16."""
    import tempfile

    from transformers import AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(model.embed.weight.device).eval()


def bench_steps(bench, name, shape, rows=STEPS["rows"], length=STEPS["length"], prompt=STEPS["prompt"]):
    """Each method makes the models that it needs, and no more: at 7 B not every method fits."""
    from train_dpo import dpo_loss
    from train_ppo import advantages, ppo_loss, token_rewards, values_before
    from train_sft import sft_loss
    device, checkpointing = bench.device, name == "7B"
    tokens = torch.randint(shape["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(0)).to(device)
    mask = (torch.arange(length, device=device) >= prompt).expand(rows, -1)
    where, count = mask.flatten().nonzero()[:, 0], rows * (length - prompt)

    def trained():
        model = model_of(shape, length, device)
        model.checkpointing = checkpointing
        return model

    def logprobs(model):
        return model.logprobs(tokens, mask, where=where)

    def step(loss, *models):
        """Returns an update by loss() -> scalar."""
        optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-6, fused=device.type == "cuda") for m in models]

        def update():
            with torch.autocast(device.type, torch.bfloat16):
                loss().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return update

    def sft():
        model = trained()
        return step(lambda: sft_loss(logprobs(model), mask, count), model)

    def dpo():
        model, reference = trained(), freeze(model_of(shape, length, device), "bfloat16")

        def loss():
            with torch.no_grad():
                before = logprobs(reference).sum(1).chunk(2)
            return dpo_loss(*logprobs(model).sum(1).chunk(2), *before).mean()
        return step(loss, model)

    def ppo():
        model, reference = trained(), freeze(model_of(shape, length, device), "bfloat16")
        value = ValueModel(trained(), torch.zeros(1, shape["width"], device=device))

        def loss():
            with torch.no_grad():
                old, before, old_values = logprobs(model), logprobs(reference), values_before(value, tokens)
                rewards = token_rewards(torch.zeros(rows, device=device), old - before, mask, 0.05)
                adv, returns = advantages(rewards, old_values, mask)
            return ppo_loss(logprobs(model), old, adv, values_before(value, tokens), old_values, returns, mask, count)[0]
        return step(loss, model, value)
    with torch.device("meta"):
        body = sum(p.numel() for p in Transformer(ModelConfig.for_family("llama", **shape)).blocks.parameters())
    head, again = shape["vocab_size"] * shape["width"], 2 * checkpointing               # layers are computed once more
    # FLOPs per weight and token: 2 in a forward pass, 4 in a backward pass, 2 to compute logits again.
    for method, make, of_body, of_head in (("SFT", sft, 6 + again, 8), ("DPO", dpo, 8 + again, 10),
                                           ("PPO update", ppo, 18 + 2 * again, 12)):
        bench.report(f"{method} {name}, {rows} x {length}", make, ("tokens", rows * length),
                     flops=of_body * rows * length * body + of_head * count * head)


def bench_gpu(device, repeats, medians, parts=PARTS):
    """Runs these parts. Returns (limits, rows)."""
    bench = Bench(device, repeats, medians)
    print(f"bfloat16 products {bench.rate / 1e12:.0f} TFLOP/s, memory {bench.bandwidth / 1e12:.2f} TB/s", flush=True)
    for size in LOGPROBS if "log-probs" in parts else ():
        bench_logprobs(bench, *size)
    for name in DECODE["shapes"] if "decode" in parts else ():
        bench_decode(bench, name, SHAPES[name])
    for name, shape in SHAPES.items() if "steps" in parts else ():
        bench_steps(bench, name, shape)
    return dict(flops=bench.rate, bytes_per_second=bench.bandwidth), bench.rows
