"""Tests of the memory estimate: what a layer keeps, tensor by tensor; the counts; and measured peaks.

The file is also the program whose peak is measured: python test_memory.py OPTIONS, with the options as JSON.
"""

import dataclasses
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from conftest import ROOT, SCRIPTS, entry_of, known_options
from nanorlhf.errors import UserError
from nanorlhf.formats.checkpoints import FAMILIES
from nanorlhf.memory import SHAPES, Options, config_of, count, estimate, kept_by_layer, peak, report, table, what_would_fit
from nanorlhf.model import ModelConfig, RewardModel, Transformer, ValueModel, freeze, freeze_layers


def kept(c, dtype):
    """Returns the bytes of the tensors that a forward pass over 2 x 20 tokens keeps, weights and their rounded copies aside."""
    model, found = Transformer(c), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {shape for p in model.parameters() for shape in (tuple(p.shape), tuple(p.shape[::-1]))}

    def keep(t):
        rounded = t.dtype == torch.bfloat16 and tuple(t.shape) in shapes
        if t.untyped_storage().data_ptr() not in weights and not rounded:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            model(torch.zeros(2, 20, dtype=torch.long))
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_layer_keeps_is_counted_to_the_byte(family, dtype):
    grouped = "kv_heads" in FAMILIES[family].keys
    c = ModelConfig.for_family(family, width=72, vocab_size=50, context=32, layers=1, heads=6, kv_heads=2 if grouped else 6, head_dim=12)
    two = kept(dataclasses.replace(c, layers=2), dtype) - kept(c, dtype)
    assert two == 2 * 20 * kept_by_layer(c, 2 if dtype == "bfloat16" else 4)


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "stablelm"])
def test_the_counts_are_those_of_the_models(family, share):
    c = ModelConfig.for_family(family, width=16, vocab_size=50, context=32, layers=4, heads=2, kv_heads=2, head_dim=8)
    for kind, model in (("policy", Transformer(c)), ("reward", RewardModel(c)),
                        ("value", ValueModel(Transformer(c, head=False), torch.zeros(1, 16)))):
        trunk = getattr(model, "trunk", model)
        freeze_layers(trunk, share)
        matrices = [p for m in trunk.blocks.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters()]
        sizes = (list(model.parameters()), matrices, [p for p in model.parameters() if p.requires_grad],
                 [p for p in matrices if p.requires_grad])
        assert count(c, share, kind) == tuple(sum(p.numel() for p in part) for part in sizes)


def test_a_remedy_is_named_and_helps():
    c = config_of("", "7b")
    o = Options(script="dpo", ranks=8)
    names, changed = what_would_fit(c, o)
    assert peak(c, o) > 0.9 * 80 * 2**30 >= peak(c, changed) and f"It fits with {names}" in report(c, o)
    assert "--frozen_layers" not in names and "--shard" in names
    assert what_would_fit(c, Options(ranks=1)) is None and "more processes" in report(c, Options(ranks=1))
    assert what_would_fit(config_of("", "0.1b"), Options(script="sft"))[0] == ""
    with pytest.raises(UserError, match="--shape 0.1b"):
        config_of("", "")


@pytest.mark.parametrize("script", ["bon", "dpo"])
def test_frozen_weights_are_those_that_freeze_rounds(script):
    """The policy that best-of-n samples from is held whole; a reference and a reward model are held rounded."""
    c = ModelConfig.for_family("llama", width=16, vocab_size=50, context=32, layers=2, heads=2, kv_heads=2, head_dim=8)
    models = [Transformer(c), freeze(RewardModel(c), "bfloat16")] if script == "bon" else [freeze(Transformer(c), "bfloat16")]
    held = sum(p.numel() * p.element_size() for model in models for p in model.parameters())
    assert estimate(c, Options(script=script, dtype="bfloat16"))[0]["frozen weights"] == held


def test_sharding_divides_what_stays():
    c = config_of("", "1b")
    whole, part = (sum(estimate(c, Options(ranks=8, shard=shard))[0].values()) for shard in (False, True))
    assert part == whole / 8


def test_the_table_of_the_readme_is_what_the_program_prints():
    text = (ROOT / "nanorlhf/README.md").read_text(encoding="utf-8")
    for script in ("sft", "dpo", "ppo"):
        assert table(script) in text
    assert list(SHAPES) == ["0.1b", "1b", "7b", "70b"]


# ---- Measured peaks -------------------------------------------------------------------------------------------------


def private_memory():
    """Bytes of this process that belong to no file."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


def measured(script, options):
    """Runs a script in this process. Returns the peak of its memory beyond what it had before."""
    torch.set_num_threads(1)
    found, before, running = [0], private_memory(), True

    def watch():
        while running:
            found[0] = max(found[0], private_memory())
            time.sleep(0.0005)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    module = SCRIPTS[script]
    entry_of(module)(module.Config(**known_options(module, options), device="cpu"))
    running = False
    watcher.join()
    return found[0] - before


def run(folder, script, count=1, **options):
    """Runs a script in processes of their own. Returns the first one's peak."""
    # A block of more than 64 KiB goes back to the system as soon as it is free.
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    python = [sys.executable] if count == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                  "--nproc_per_node", str(count)]
    done = subprocess.run([*python, __file__, json.dumps([script, options])], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.rsplit("peak ", 1)[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of texts, comparisons, prompts, and policies with reward models: `small`, which takes next to nothing, and
    `base`."""
    folder, rng = tmp_path_factory.mktemp("memory"), random.Random(0)

    def text(n):
        return " ".join(rng.choices("the cat sat on a mat and one dog too nice film plot music actors long short".split(), k=n))

    def write(name, rows):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write("text.jsonl", [dict(text=text(300)) for _ in range(100)])
    write("pairs.jsonl", [dict(prompt=text(8), chosen=" " + text(600), rejected=" " + text(600)) for _ in range(16)])
    write("prompts.jsonl", [dict(prompt=text(60)) for _ in range(16)])
    quick = dict(max_steps=1, max_length=64, eval_every=0, save_every=0, eval_fraction=0.0, batch_size=2)
    new = dict(init="scratch", family="llama", heads=4, kv_heads=2, context=512, kind="text", data="text.jsonl", packing=True, **quick)
    for name, width, layers in (("small", 16, 2), ("base", 256, 8)):
        run(folder, "train_sft", out=name, width=width, layers=layers, **new)
        run(folder, "train_rm", init=name, out=f"{name}-rm", data="pairs.jsonl", normalize="none", **quick)
    return folder


DATA = {"sft": dict(data="text.jsonl", kind="text", packing=True), "rm": dict(data="pairs.jsonl", normalize="none"),
        "dpo": dict(data="pairs.jsonl"), "ppo": dict(data="prompts.jsonl", num_mini_batches=1, num_ppo_epochs=1),
        "rrhf": dict(data="prompts.jsonl", num_samples=4), "bon": dict(data="prompts.jsonl", n=4)}


def compared(folder, number, script, count=1, **options):
    """Returns (measured, estimated) peak of two steps over rows of 256 tokens. What Python and its libraries take falls out: both
    are the difference between a model and one of next to nothing."""
    answer = 192 if script in ("ppo", "rrhf", "bon") else 240
    common = dict(max_length=256, max_prompt_length=256 - answer, response_length=answer, max_steps=2, limit=16, lr=1e-5, eval_every=0,
                  save_every=0, num_eval_prompts=0, eval_fraction=0.0, **DATA[script], **options)
    name = {"bon": "sample_bon"}.get(script, f"train_{script}")
    o = Options(script=script, ranks=count, length=256, response_length=answer, **options)
    pairs = [(run(folder, name, count, init=model, reward=f"{model}-rm", out=f"{model}-{number}", **common),
              peak(config_of(folder / model, ""), o)) for model in ("base", "small")]
    return pairs[0][0] - pairs[1][0], pairs[0][1] - pairs[1][1]


CASES = [("sft", dict(batch_size=8, micro_batch_size=4)),
         ("sft", dict(batch_size=4, micro_batch_size=4, gradient_checkpointing=True)),
         ("sft", dict(batch_size=4, micro_batch_size=4, frozen_layers=0.5)),
         ("sft", dict(batch_size=8, micro_batch_size=4, dtype="bfloat16")),
         ("sft", dict(batch_size=8, micro_batch_size=4, optimizer="adafactor")),
         ("rm", dict(batch_size=4, micro_batch_size=2)),
         ("dpo", dict(batch_size=4, micro_batch_size=2)),
         ("dpo", dict(batch_size=4, micro_batch_size=2, gradient_checkpointing=True)),
         ("dpo", dict(batch_size=4, micro_batch_size=2, optimizer="rmsprop")),
         ("ppo", dict(batch_size=8, micro_batch_size=4)),
         ("ppo", dict(batch_size=8, micro_batch_size=4, dtype="bfloat16", gradient_checkpointing=True)),
         ("rrhf", dict(batch_size=4, micro_batch_size=1)),
         ("bon", dict(batch_size=8))]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("shard", [False, True])
def test_the_estimate_is_within_a_tenth_of_the_measured_peak_of_two_processes(folder, request, shard):
    took, estimated = compared(folder, request.node.name, "sft", count=2, shard=shard, batch_size=16, micro_batch_size=4)
    assert abs(estimated / took - 1) < 0.1, (took, estimated)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("script, options", CASES)
def test_the_estimate_is_within_a_tenth_of_the_measured_peak(folder, request, script, options):
    took, estimated = compared(folder, request.node.name, script, **options)
    assert abs(estimated / took - 1) < 0.1, (took, estimated)


if __name__ == "__main__":
    print("peak", measured(*json.loads(sys.argv[1])), flush=True)
