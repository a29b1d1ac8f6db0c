"""Speed and memory against a peer: `python -m nanorlhf.bench {logprob,generate,linear,step,tokenize,data,gpu} [--out file.json]`.

    logprob   token_logprobs against torch's F.linear_cross_entropy in its best chunks, or, with an older torch, log_softmax +
              gather: forward + backward, and the memory each needs beyond its inputs
    generate  tokens/s against transformers' generate with the same weights, on ragged prompts and on best-of-n of one prompt
    linear    a decoding step's products of few rows plain and packed: the table that kernels.packing_rule chooses by
    step      one SFT step against transformers + AdamW, and one DPO step against TRL's trainer, on the same tokens
    gpu       the figures that need a GPU, in bfloat16 (bench_gpu.py)
    tokenize  tokens/s of --text against the `tokenizers` library on one thread, and how many texts get different ids
    data      seconds and memory from a file of 200,000 comparisons to the first update of a reward model; there is no peer

Machines drift, so the two sides take turns within one process, and the ratio is that of their medians. Each figure but those
of linear, tokenize and data comes with its share of the hardware's limit (matrix products and reading memory), measured in the
same run.
"""

import os

os.environ.setdefault("OMP_PROC_BIND", "true")     # unbound threads sometimes make a decode step 20 times slower

import argparse
import functools
import gzip
import json
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

from nanorlhf.bench_gpu import PARTS, bench_gpu
from nanorlhf.errors import UserError
from nanorlhf.files import parse_json, write_json
from nanorlhf.formats.sources import rows_in
from nanorlhf.generate import generate
from nanorlhf.kernels import pack, token_logprobs
from nanorlhf.model import ModelConfig, Transformer, pick_device
from nanorlhf.options import OneLineParser
from nanorlhf.run import git_commit
from nanorlhf.tokenizer import load_tokenizer


def seconds(run, device):
    """Returns the seconds that one call takes, the device's work included."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def medians(sides, repeats, device):
    """Returns {name: median seconds} of functions that take turns, after one unmeasured call of each."""
    times = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, run in sides.items():
            t = seconds(run, device)
            if repeat:
                times[name].append(t)
    return {name: statistics.median(t) for name, t in times.items()}


def hardware_limits(device):
    """Measures the best that this machine can do in float32: FLOP/s of a matrix product and bytes/s read."""
    a, b = torch.randn(2, 2048, 2048, device=device)
    long = torch.ones(2**27, device=device)         # 512 MiB, beyond any cache
    best = {name: min(seconds(run, device) for _ in range(5))
            for name, run in (("product", lambda: a @ b), ("read", lambda: long.sum()))}
    return dict(flops=2 * 2048**3 / best["product"], bytes_per_second=4 * 2**27 / best["read"])


def processor():
    """Returns the CPU's name, family and model (family 25, model 1 of AMD is Zen 3), and the widest vectors that torch uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        info = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        return (f"{info['model name']} (family {info['cpu family']}, model {info['model']}), "
                f"{torch.backends.cpu.get_cpu_capability()}")
    except (OSError, KeyError):
        return f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def cpu_seconds():
    """Returns (CPU seconds of all processes, of this one and its children, stolen by the host) so far, from Linux's /proc/stat;
    None elsewhere."""
    try:
        user, nice, system, _, _, irq, softirq, steal = map(int, open("/proc/stat").readline().split()[1:9])
    except (OSError, ValueError):
        return None
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / tick, sum(os.times()[:4]), steal / tick


def warn_if_busy(before, elapsed):
    """Prints a warning if others used more than a twentieth of the cores since `before`, a result of cpu_seconds. Returns the
    shares, {others, stolen}."""
    after = cpu_seconds()
    if not before or not after:
        return {}
    everybody, ours, stolen = (b - a for a, b in zip(before, after))
    cores = elapsed * os.cpu_count()
    shares = dict(others=max(0.0, everybody - ours) / cores, stolen=stolen / cores)
    if sum(shares.values()) > 0.05:
        print(f"warning: other processes took {shares['others']:.0%} of the cores while this ran, and the host "
              f"{shares['stolen']:.0%} (steal): threads wait for each other, so times can be many times too long", flush=True)
    return shares


def report(name, ours, peer, limit, **more):
    """Prints one line and returns its JSON row. ours, peer and limit are in seconds."""
    row = dict(name=name, ours_seconds=ours, peer_seconds=peer, speedup=peer / ours, share_of_limit=limit / ours, **more)
    shown = "  ".join(f"{k} {v:.4g}" for k, v in more.items() if v is not None)
    print(f"{name}: ours {ours:.4g} s, peer {peer:.4g} s: {peer / ours:.2f} times as fast, {100 * limit / ours:.0f}% of the "
          f"hardware's limit  {shown}", flush=True)
    return row


# ---- logprob --------------------------------------------------------------------------------------------------------

def plain_logprobs(hidden, weight, targets):
    return F.linear(hidden, weight).log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def logprob_call(side, N, D, V, device):
    """Returns a function that runs forward and backward once, on inputs made here."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=generator).to(device).requires_grad_() for n in (N, V))
    targets = torch.randint(V, (N,), generator=generator).to(device)
    gradient, function = torch.rand(N, generator=generator).to(device), token_logprobs     # another one for each token
    if side == "plain":
        function = plain_logprobs
    elif side != "ours":                                                               # rows per chunk
        function = functools.partial(F.linear_cross_entropy, reduction="none", options=torch.nn.LinearCrossEntropyOptions(
            batch_chunk_size=int(side)))

    def run():
        hidden.grad = weight.grad = None
        function(hidden, weight, targets).backward(gradient)
    return run


def extra_memory(side, N, D, V, device):
    """Returns the peak MiB beyond the inputs, gradients included. On a CPU: of a separate process, from Linux's /proc."""
    if device.type == "cuda":
        run = logprob_call(side, N, D, V, device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not Path("/proc/self/status").exists():
        return None
    code = f"from nanorlhf.bench import peak_of_this_process as p; p({side!r}, {N}, {D}, {V}, {torch.get_num_threads()})"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def peak_of_this_process(side, N, D, V, threads):
    def mib(field):
        return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(field))
    torch.set_num_threads(threads)
    logprob_call(side, 16, D, 64, torch.device("cpu"))()                               # libraries load, with their buffers
    run = logprob_call(side, N, D, V, torch.device("cpu"))
    before = mib("VmRSS")
    run()
    print(mib("VmHWM") - before)


def bench_logprob(o, device, limits):
    N, D, V = o.tokens, o.width or 256, o.vocab or 50257
    chunks = ("256", "512", "1024") if hasattr(torch.nn, "LinearCrossEntropyOptions") else ()
    t = medians({side: logprob_call(side, N, D, V, device) for side in ("ours", "plain", *chunks)}, o.repeats, device)
    peer = min(chunks or ["plain"], key=t.get)
    ours_mib, peer_mib = (extra_memory(side, N, D, V, device) for side in ("ours", peer))
    return [report(f"logprob {N},{D},{V}", t["ours"], t[peer], 8 * N * D * V / limits["flops"],    # 6NDV + 2NDV recomputed
                   plain_seconds=t["plain"], chunk_rows=int(peer) if chunks else None, ours_mib=ours_mib, peer_mib=peer_mib,
                   memory_share=ours_mib and ours_mib / peer_mib)]


# ---- generate -------------------------------------------------------------------------------------------------------

def require_package(module):
    try:
        return __import__(module)
    except ImportError:
        raise UserError(f"this benchmark compares with {module}: install the extra `parity` (pip install -e .[parity])")


def both_models(o, device, context):
    """Returns the same random model twice, as ours and as transformers'."""
    transformers = require_package("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    D, H = o.width or 384, o.heads or 6
    config = ModelConfig.for_family(o.family, D, vocab_size=o.vocab or 8192, context=context, layers=o.layers or 6, heads=H,
                                    kv_heads=o.kv_heads or H, head_dim=D // H)
    ours = Transformer(config).to(device)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    return ours, theirs


def bench_generate(o, device, limits):
    ours, theirs = both_models(o, device, 1024)
    V, T = ours.config.vocab_size, o.new_tokens
    weights = sum(p.numel() for name, p in ours.named_parameters() if name != "positions.weight")
    generator = torch.Generator().manual_seed(0)

    def prompt(length):
        return torch.randint(V, (length,), generator=generator).tolist()
    cases = [(f"batch {b}", [prompt(16 + 48 * i // max(1, b - 1)) for i in range(b)], 1) for b in o.batch]
    cases += [(f"best of {o.best_of}, one prompt of 512", [prompt(512)], o.best_of)] if o.best_of else []
    rows = []
    for name, prompts, n in cases:
        longest = max(map(len, prompts))
        padding = [[0] * (longest - len(p)) for p in prompts]                          # transformers pads on the left
        ids = torch.tensor([pad + p for pad, p in zip(padding, prompts)], device=device)
        attend = torch.tensor([pad + [1] * len(p) for pad, p in zip(padding, prompts)], device=device)

        def transformers_generate():
            with torch.no_grad():
                out = theirs.generate(ids, attention_mask=attend, max_new_tokens=T, do_sample=True, temperature=1.0, top_k=0,
                                      top_p=1.0, num_return_sequences=n, pad_token_id=0)
            assert out.shape[1] == longest + T
        t = medians({"ours": lambda: generate(ours, prompts, T, num_samples=n), "peer": transformers_generate},
                    o.repeats, device)
        R = len(prompts) * n
        # A decoding step costs 2 FLOPs per weight and row and reads every weight once; prompts, 2 per weight and token.
        limit = (T * max(2 * weights * R / limits["flops"], 4 * weights / limits["bytes_per_second"])
                 + 2 * weights * sum(map(len, prompts)) / limits["flops"])
        size = f"{o.family} {o.layers or 6}/{ours.config.width}/{ours.config.heads}/{V}"
        rows.append(report(f"generate {size} {name}", t["ours"], t["peer"], limit, ours_tokens_per_second=R * T / t["ours"],
                           peer_tokens_per_second=R * T / t["peer"]))
    return rows


# ---- linear -----------------------------------------------------------------------------------------------------------

def bench_linear(o, device, limits):
    """Times both by weight [out, in] and rows. Copies of a weight take turns that together exceed the cache, as a model's weights
    do: with one weight, which stays in the cache, another variant can look better. `pack_us`: what packing takes, once."""
    rows = []
    for out, width in ((1152, 384), (384, 1536), (1536, 384), (8192, 384), (960, 576), (576, 576), (3072, 576), (576, 1536),
                       (49152, 576), (2304, 768), (768, 3072), (50257, 768)):
        weights = torch.randn(max(2, 2**24 // (out * width)), out, width)
        packed = [pack(w, least=0) for w in weights]
        pack_us = 1e6 * min(seconds(lambda: [pack(w, least=0) for w in weights], device) for _ in range(3)) / len(weights)
        for R in (1, 2, 4, 8, 16, 32, 64, 512):
            x = torch.randn(R, width)
            t = medians({"plain": lambda: [F.linear(x, w) for w in weights],
                         "packed": lambda: [torch.ops.mkldnn._linear_pointwise(x, p, None, "none", [], "") for p in packed]},
                        o.repeats, device)
            plain_us, packed_us = (1e6 * t[k] / len(weights) for k in ("plain", "packed"))
            rows.append(dict(out=out, width=width, rows=R, plain_us=plain_us, packed_us=packed_us, pack_us=pack_us))
            print(f"[{out}, {width}], {R} rows: F.linear {plain_us:.0f} us, packed {packed_us:.0f} us: "
                  f"{packed_us / plain_us:.2f}; packing takes {pack_us:.0f} us", flush=True)
    return rows


# ---- step -----------------------------------------------------------------------------------------------------------

def bench_step(o, device, limits):
    from train_dpo import dpo_loss
    from train_sft import sft_loss
    rows, P, length = [], o.prompt, o.length
    B = o.batch[0]
    generator = torch.Generator().manual_seed(0)
    ours, theirs = both_models(o, device, length)
    tokens = torch.randint(1, ours.config.vocab_size, (B, length), generator=generator).to(device)
    mask = (torch.arange(length, device=device) >= P).expand(B, -1)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-5, fused=True) for m in (ours, theirs)]
    body = sum(p.numel() for name, p in ours.named_parameters() if name.startswith("blocks."))
    head, count = ours.head_weight.numel(), int(mask.sum())

    def update(optimizer, loss):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())
    t = medians({"ours": lambda: update(optimizers[0], sft_loss(ours.logprobs(tokens, mask), mask, count)),
                 "peer": lambda: update(optimizers[1], theirs(tokens, labels=tokens.masked_fill(~mask, -100)).loss)},
                o.repeats, device)
    size = f"{o.layers or 6}/{ours.config.width}/{ours.config.heads}/{ours.config.vocab_size}, {B} x {length}"
    limit = (6 * B * length * body + 8 * count * head) / limits["flops"]
    rows.append(report(f"SFT step {size}", t["ours"], t["peer"], limit, ours_tokens_per_second=B * length / t["ours"],
                       peer_tokens_per_second=B * length / t["peer"]))
    try:
        peer_loss, reference = trl_dpo(theirs, tokens, mask), Transformer(ours.config).to(device).requires_grad_(False)
    except ImportError:
        print("DPO step: skipped, TRL is not installed (the extra `parity`)")
        return rows

    def our_dpo():      # the first half of the rows is chosen, the second rejected; both sides run the reference in the step
        chosen, rejected = ours.logprobs(tokens, mask).sum(1).chunk(2)
        with torch.no_grad():
            ref_chosen, ref_rejected = reference.logprobs(tokens, mask).sum(1).chunk(2)
        return update(optimizers[0], dpo_loss(chosen, rejected, ref_chosen, ref_rejected).mean())
    t = medians({"ours": our_dpo, "peer": lambda: update(optimizers[1], peer_loss())}, o.repeats, device)
    limit = (8 * B * length * body + 10 * count * head) / limits["flops"]
    rows.append(report(f"DPO step {size}", t["ours"], t["peer"], limit, ours_tokens_per_second=B * length / t["ours"],
                       peer_tokens_per_second=B * length / t["peer"]))
    return rows


def trl_dpo(model, tokens, mask):
    """Returns a function for TRL's DPO loss of a batch. TRL's trainer needs a data set and a tokenizer, which go unused."""
    import copy
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer
    disable_progress_bars()
    blank = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}, unk_token="a")),
                                    eos_token="<eos>", pad_token="<eos>")
    with tempfile.TemporaryDirectory() as folder:
        options = DPOConfig(output_dir=folder, report_to="none", bf16=False, gradient_checkpointing=False, max_length=None,
                            per_device_train_batch_size=len(tokens) // 2, use_cpu=tokens.device.type == "cpu")
        trainer = DPOTrainer(model, copy.deepcopy(model), options, processing_class=blank,
                             train_dataset=Dataset.from_list([dict(prompt="a", chosen=" a", rejected=" a")]))
    inputs = dict(input_ids=tokens, attention_mask=torch.ones_like(tokens), completion_mask=mask.long())
    model.train()
    return lambda: trainer.compute_loss(model, inputs)


# ---- tokenize -------------------------------------------------------------------------------------------------------

def texts_of(path):
    """Returns every string field of a .jsonl or .jsonl.gz file, or the paragraphs of a text file."""
    try:
        content = Path(path).read_bytes()
        content = gzip.decompress(content) if path.endswith(".gz") else content
        if ".jsonl" not in Path(path).name:
            return [t for t in content.decode().split("\n\n") if t]
        rows = [json.loads(line) for line in content.split(b"\n") if line.strip()]
        return [v for row in rows for v in row.values() if isinstance(v, str)]
    except (OSError, EOFError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: neither UTF-8 text nor JSON lines ({error})")


def varied_strings(n, added=(), seed=0):
    """Returns n strings that are hard for tokenizers: words, scripts, emoji, combining marks, control characters, runs of
    spaces, arbitrary code points; some with `added` tokens in them."""
    rng = random.Random(seed)
    parts = ["the", "don't", "WE'VE", "I\u2019ll", "naïve", "12,345.67", "x=1;", "def f(a):", "https://a.b/c?d=1", "e\u0301",
             "\u212b", "\u1112\u1161\u11ab", "한국어", "中文", "日本語", "\u0627\u0644\u0639\u0631\u0628", "\u05e9\u05dc\u05d5",
             "ไทย", "\u0939\u093f\u0928", "Привет", "😀", "👨\u200d👩\u200d👧", "🇩🇪", "👍🏽", "\u00a0", "\u2003", "\u2028",
             "\u0085", "\ufeff", "\u200b", "▁", "\0", "\x1b[0m",
             "\t", "\r\n", "\n", "\n\n\n", " ", " ", " ", "  ", " " * 17, "!!!", "...", "<|", "|>",
             "½\u0660\uff11", "0000", "aaaa", "\u0130\u017f", "</s>", *added]

    def code_point():
        low, high = rng.choice([(1, 0x250), (1, 0xd800), (0xe000, 0x110000)])
        return chr(rng.randrange(low, high))
    made = ["".join(rng.choices(parts, k=rng.randrange(1, 16))) for _ in range(n // 2)]
    made += ["".join(code_point() for _ in range(rng.randrange(30))) for _ in range(n // 5)]
    made += [rng.choice(parts) * rng.randrange(60) + "".join(rng.choices(parts, k=3)) for _ in range(n // 10)]
    return made + [" ".join(rng.choices(parts, k=rng.randrange(25))) for _ in range(n - len(made))]


def bench_tokenize(o, device, limits):
    """Times one call per text; for the library also one encode_batch_fast, and the faster of the two counts."""
    os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    library, rows = require_package("tokenizers"), []
    if not o.tokenizer or not o.text:
        raise UserError("tokenize needs --tokenizer and --text")
    texts = [t for path in o.text for t in texts_of(path)]
    for path in o.tokenizer:
        ours = load_tokenizer(path)
        with tempfile.TemporaryDirectory() as folder:
            ours.save(folder)
            theirs = library.Tokenizer.from_file(f"{folder}/tokenizer.json")

        def differ(strings, encode, special):
            theirs.encode_special_tokens = not special
            peers = theirs.encode_batch_fast(strings, add_special_tokens=False)
            return sum(encode(s) != p.ids for s, p in zip(strings, peers))
        plain = varied_strings(10_000)
        marked = varied_strings(10_000, sorted(ours.special)[:20] * 2, seed=1)
        counts = dict(texts=len(texts), texts_differ=differ(texts, ours.encode, False),
                      strings_differ=differ(plain, ours.encode, False),
                      marked_differ=differ(marked, ours.encode_marked, True),
                      ids_differ=sum(ours.decode([i]) != theirs.decode([i]) for i in range(ours.vocab_size)))
        theirs.encode_special_tokens = True
        t = medians({"ours": lambda: [ours.encode(s) for s in texts],
                     "peer": lambda: [theirs.encode(s, add_special_tokens=False).ids for s in texts],
                     "batch": lambda: [e.ids for e in theirs.encode_batch_fast(texts, add_special_tokens=False)]},
                    o.repeats, device)
        peer, n = min(t["peer"], t["batch"]), sum(len(ours.encode(s)) for s in texts)
        rows.append(dict(name=f"tokenize {path}", ours_seconds=t["ours"], peer_seconds=peer, speedup=peer / t["ours"],
                         tokens=n, ours_tokens_per_second=n / t["ours"], peer_tokens_per_second=n / peer, **counts))
        print(f"{path}: ours {n / t['ours'] / 1e6:.2f}, tokenizers {n / peer / 1e6:.2f} million tokens/s: "
              f"{peer / t['ours']:.2f} times as fast; ids differ in {counts['texts_differ']} of {len(texts)} texts, "
              f"{counts['strings_differ']} of 10000 strings, {counts['marked_differ']} of 10000 with added tokens; "
              f"{counts['ids_differ']} of {ours.vocab_size} ids decode otherwise", flush=True)
    return rows


# ---- data -----------------------------------------------------------------------------------------------------------


def bench_data(o, device, limits):
    """Seconds and memory of a process that reads --rows comparisons, tokenises them and makes the first update of a tiny reward
    model. The comparisons are those of --text over and over, each with a number in its first turn, so that no two are alike."""
    if not o.tokenizer or not o.text:
        raise UserError("data needs --tokenizer and --text, a file of transcripts chosen, rejected")
    lines = [line for path in o.text for _, line in rows_in(path)]
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/rows.jsonl", "w", encoding="utf-8") as f:
            for i in range(o.rows):
                row = parse_json(lines[i % len(lines)].decode())
                row = {k: v.replace("\n\nAssistant:", f" (No. {i})\n\nAssistant:", 1) for k, v in row.items()}
                f.write(json.dumps(row) + "\n")
        common = ["--device", "cpu", "--batch_size", "8", "--eval_every", "0", "--save_every", "0", "--max_steps", "1"]
        tiny = ["--width", "32", "--layers", "1", "--heads", "2", "--context", "2048", "--eval_fraction", "0", "--limit", "100"]

        def run(script, *options):
            begin = time.monotonic()
            subprocess.run([sys.executable, "-m", script, *options, *common], check=True, stdout=subprocess.DEVNULL)
            return time.monotonic() - begin
        run("train_sft", "--init", "scratch", "--tokenizer", o.tokenizer[0], "--kind", "text", *tiny, "--out", f"{folder}/model")
        seconds = run("train_rm", "--init", f"{folder}/model", "--data", f"{folder}/rows.jsonl", "--skip_bad",
                      "--eval_fraction", "0", "--normalize", "none", "--out", f"{folder}/rm")
        size = os.path.getsize(f"{folder}/rows.jsonl") / 2**20
    mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"{o.rows:,} comparisons, {size:.0f} MiB: the first update after {seconds:.1f} s, in at most {mib:.0f} MiB", flush=True)
    return [dict(name="data", rows=o.rows, file_mib=size, seconds=seconds, peak_mib=mib)]


def main():
    parser = OneLineParser(prog="python -m nanorlhf.bench", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=["logprob", "generate", "linear", "step", "tokenize", "data", "gpu"])
    parser.add_argument("--layers", type=int, default=0, help="default 6")
    parser.add_argument("--width", type=int, default=0, help="default 384; logprob 256")
    parser.add_argument("--heads", type=int, default=0, help="default 6")
    parser.add_argument("--kv_heads", type=int, default=0, help="default: as many as heads")
    parser.add_argument("--family", choices=["gpt2", "llama"], default="gpt2", help="generate, step: default gpt2")
    parser.add_argument("--vocab", type=int, default=0, help="default 8192; logprob 50257")
    parser.add_argument("--batch", type=int, nargs="+", default=[], help="default 1 16 64 (each in turn); step 16")
    parser.add_argument("--tokens", type=int, default=4096, help="logprob: number of tokens")
    parser.add_argument("--new_tokens", type=int, default=128, help="generate: tokens per sample; EOS is ignored")
    parser.add_argument("--best_of", type=int, default=16, help="generate: samples of one long prompt; 0 skips it")
    parser.add_argument("--length", type=int, default=256, help="step: tokens per row")
    parser.add_argument("--prompt", type=int, default=64, help="step: how many of them are the prompt")
    parser.add_argument("--tokenizer", nargs="+", help="tokenize, data: anything that load_tokenizer takes")
    parser.add_argument("--text", nargs="+", help="tokenize: .jsonl, .jsonl.gz (every string field) or text (paragraphs); data: "
                                                      "transcripts chosen, rejected")
    parser.add_argument("--rows", type=int, default=200_000, help="data: comparisons")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="gpu: which of its figures")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", help="JSON file to write the figures to")
    o = parser.parse_args()
    o.batch = o.batch or ([16] if o.benchmark == "step" else [1, 16, 64])
    try:
        if o.threads:
            torch.set_num_threads(o.threads)
        device = torch.device("cpu") if o.benchmark in ("linear", "tokenize", "data") else pick_device(o.device)
        limits = hardware_limits(device)
        name = torch.cuda.get_device_name() if device.type == "cuda" else f"{processor()}, {os.cpu_count()} cores"
        print(f"{name}, torch {torch.__version__}: {limits['flops'] / 1e9:.0f} GFLOP/s, "
              f"{limits['bytes_per_second'] / 1e9:.1f} GB/s", flush=True)
        before, started = cpu_seconds(), time.monotonic()
        if o.benchmark == "gpu":
            if device.type != "cuda":
                raise UserError("gpu: torch sees no NVIDIA GPU here")
            limits, rows = bench_gpu(device, o.repeats, medians, o.parts)
        else:
            rows = {"logprob": bench_logprob, "generate": bench_generate, "linear": bench_linear, "step": bench_step,
                    "tokenize": bench_tokenize, "data": bench_data}[o.benchmark](o, device, limits)
        busy = warn_if_busy(before, time.monotonic() - started)
    except UserError as error:
        raise SystemExit(f"error: {error}")
    if o.out:
        modules = ("torch", "transformers", "trl", "tokenizers")
        settings = {k: os.environ[k] for k in ("LD_PRELOAD", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA") if k in os.environ}
        versions = {m: sys.modules[m].__version__ for m in modules if m in sys.modules}
        write_json(o.out, dict(benchmark=o.benchmark, device=name, threads=torch.get_num_threads(), commit=git_commit(),
                               python=platform.python_version(), **versions, settings=settings, limits=limits, busy=busy,
                               options=vars(o), results=rows))


if __name__ == "__main__":
    main()
