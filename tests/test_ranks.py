"""Tests of several processes: whatever their number, the gradients, the samples, the metrics and the files are those of one.

The file is also the program that the processes run: python -m torch.distributed.run --nproc_per_node N test_ranks.py FOLDER
"""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nanorlhf import ranks
from nanorlhf.errors import UserError

TESTS = Path(__file__).parent
TINY = dict(width=16, layers=2, heads=2, context=96, batch_size=8, micro_batch_size=3, max_steps=3, eval_every=3, save_every=2,
            eval_fraction=0.2, response_length=8, num_eval_prompts=5)
INPUTS = {           # made by a single process: name of the run: script, its options
    "base": ("train_sft", dict(init="scratch", kind="text", limit=60)),
    "sft": ("train_sft", dict(limit=60)),
    "comparisons": ("sample_bon", dict(split="train", n=2, reward="gold", label_temperature=0.2, limit=60, keep_unfinished=True,
                                       batch_size=64)),
    "rm": ("train_rm", {})}
RUNS = {
    "sft": ("train_sft", dict(limit=60)),
    "rm": ("train_rm", dict(prior_precision=0.1, normalize="standard")),
    "dpo": ("train_dpo", dict(share_prompts=True)),
    "ppo": ("train_ppo", dict(limit=32, kl_target=6.0, whiten_rewards=True)),
    "ppo_gold": ("train_ppo", dict(limit=32, reward="gold", reward_at="sentences")),
    "rrhf": ("train_rrhf", dict(limit=16, resample_every=2, kl_coef=0.1)),
    "rrhf_beam": ("train_rrhf", dict(limit=16, sampling="beam")),
    "bon": ("sample_bon", dict(n=4, limit=10, batch_size=4)),
    "bon_given": ("sample_bon", dict(responses="out/comparisons/ranked.jsonl", limit=10, batch_size=4, response_length=48))}


def start(name, options, out, **more):
    from conftest import SCRIPTS, entry_of, known_options
    module = SCRIPTS[name]
    options = known_options(module, TINY) | options | known_options(module, more)
    entry_of(module)(module.Config(**options, device="cpu", out=str(out)))


def program(folder, how, until=None):
    """Runs every script in float64. The gradients go to FOLDER/NAME.pt on the first rank. how: "copies" of whole models; "shard",
    which gathers the policy to sample from it; or "layers", as if there were no memory for that. until: training goes on where
    it was, and stops after this step."""
    import torch

    from conftest import SCRIPTS
    from nanorlhf import generate, model, ranks
    from nanorlhf.run import Run
    if how == "layers":
        generate.free_memory = lambda device: 0
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    for kind in (model.Transformer, model.RewardModel, model.ValueModel):
        kind.from_pretrained = classmethod(lambda cls, *args, load=kind.from_pretrained.__func__, **more: load(cls, *args, **more).double())
    if until:
        save = Run.checkpoint

        def checkpoint(self, step, *args):
            save(self, step, *args)
            if step == int(until):
                raise KeyboardInterrupt
        Run.checkpoint = checkpoint
    for name, (script, options) in RUNS.items():
        if until and script == "sample_bon":
            continue
        if until:
            options = options | dict(save_every=1, resume=(Path(folder) / name).exists())
        module, found = SCRIPTS[script], []
        if hasattr(module, "optimizer_step"):
            step = module.optimizer_step

            def keep(rates, *args, step=step, found=found):
                clip, torch.nn.utils.clip_grad_norm_ = torch.nn.utils.clip_grad_norm_, lambda ps, norm: (
                    found.append([ranks.whole(p.grad).clone() for p in ps]), clip(ps, norm))[1]
                try:
                    return step(rates, *args)
                finally:
                    torch.nn.utils.clip_grad_norm_ = clip
            module.optimizer_step = keep
        try:
            start(script, options, Path(folder) / name, shard=how != "copies")
        except KeyboardInterrupt:
            pass
        finally:
            if hasattr(module, "optimizer_step"):
                module.optimizer_step = step
        if ranks.mine() == 0:
            torch.save(found, Path(folder) / f"{name}.pt")
        print(f"{ranks.mine()} of {ranks.count()}: {name}", file=sys.stderr, flush=True)


def launch(count, folder, *words, script=__file__):
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(TESTS.parent))
    script = script if isinstance(script, list) else [str(script)]
    python = [sys.executable] if count == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                  "--nproc_per_node", str(count)]
    done = subprocess.run([*python, *script, *map(str, words)], cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Returns the function: number of processes, how they hold the models -> the folder of what they wrote. The inputs lie beside
    it."""
    root = tmp_path_factory.mktemp("ranks")
    launch(1, root, "inputs")

    @functools.lru_cache
    def of(count, how="copies"):
        folder = root / f"{count}-{how}"
        folder.mkdir()
        launch(count, root, folder, how)
        return folder
    return of


def rows_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def alike(a, b, tolerance=1e-9):
    """True if two values of JSON differ by rounding at most."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(k in ("time", "tokens_per_second") or alike(v, b[k], tolerance) for k, v in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(alike(x, y, tolerance) for x, y in zip(a, b))
    return b == pytest.approx(a, rel=tolerance, abs=tolerance) if isinstance(a, float) else a == b


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("count, how", [(2, "copies"), (2, "shard"), *(pytest.param(*case, marks=pytest.mark.slow) for case in [
    (3, "copies"), (4, "copies"), (4, "shard"), (2, "layers"), (3, "layers")])])
def test_any_number_of_processes_does_what_one_does(folder_of, name, count, how):
    """In float64: all gradients to 1e-12, the logs to 1e-9, and the same responses."""
    import torch
    one, several = (torch.load(folder / f"{name}.pt") for folder in (folder_of(1), folder_of(count, how)))
    assert len(one) == len(several) and (name.startswith("bon") or one)
    for a, b in zip(one, several):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert (x - y).abs().max() <= 1e-12 * max(1.0, x.abs().max())
    whole, parts = folder_of(1) / name, folder_of(count, how) / name
    assert {p.name for p in whole.iterdir()} == {p.name for p in parts.iterdir()}
    for file in whole.glob("*.jsonl"):
        assert alike(rows_of(file), rows_of(parts / file.name)), file.name
    assert json.loads((parts / "run.json").read_text())["world_size"] == count


@pytest.fixture(scope="module")
def resumed(folder_of):
    """Returns the folder of runs whose three steps were made by two processes with sharded models, by one, and by four."""
    root = folder_of(1).parent
    (root / "resumed").mkdir()
    for step, (count, how) in enumerate([(2, "shard"), (1, "copies"), (4, "copies")], 1):
        launch(count, root, root / "resumed", how, step)
    launch(2, root, root / "resumed", "shard", 4)                  # what is left after the last step: the finished folder
    return root / "resumed"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if not name.startswith("bon")])
def test_a_run_resumes_on_another_number_of_processes(folder_of, resumed, name):
    """In float64: the rows of all steps and the weights are those of one process that was not interrupted."""
    import torch
    whole, parts = folder_of(1) / name, resumed / name
    assert json.loads((parts / "run.json").read_text())["finished"]
    assert alike(rows_of(whole / "metrics.jsonl"), rows_of(parts / "metrics.jsonl"))
    a, b = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert a.keys() == b.keys() and all((a[k] - b[k]).abs().max() < 1e-9 for k in a) and a[next(iter(a))].dtype == torch.float64


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("script", ["train_sft", "train_dpo", "train_ppo"])
def test_sharded_models_in_bfloat16_do_what_copies_do(folder_of, tmp_path, script, device):
    """With layers that are frozen, computed again, and gathered rounded: the same numbers but for the order of sums."""
    import torch

    from conftest import SCRIPTS, known_options
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    options = known_options(SCRIPTS[script], dict(
        init="out/base" if script == "train_sft" else "out/sft", limit=40, max_steps=3, batch_size=8, micro_batch_size=2,
        response_length=8, num_eval_prompts=5, eval_every=3, eval_fraction=0.2, dtype="bfloat16", gradient_checkpointing=True,
        frozen_layers=0.5))
    words = [word for option, value in options.items() for word in (f"--{option}", value)]
    for name, more in (("copies", []), ("shard", ["--shard"])):
        launch(2, folder_of(1).parent, *words, *more, "--device", device, "--out", tmp_path / name,
               script=TESTS.parent / f"{script}.py")
    copies, shard = (rows_of(tmp_path / name / "metrics.jsonl") for name in ("copies", "shard"))
    assert len(copies) == 3 and alike(copies, shard, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("number, says", [(signal.SIGKILL, "Signal 9 (SIGKILL)"), (signal.SIGSTOP, "has shown no life for 16 seconds")])
def test_a_rank_that_dies_or_stalls_ends_the_job_within_about_a_minute(folder_of, tmp_path, number, says):
    root = folder_of(1).parent
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(TESTS.parent))
    job = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                            str(TESTS.parent / "train_sft.py"), "--init", "out/base", "--max_steps", "100000", "--eval_every", "0",
                            "--out", str(tmp_path / "x"), "--device", "cpu"], cwd=root, env=env, stderr=subprocess.PIPE,
                           stdout=subprocess.DEVNULL, text=True)
    while not (tmp_path / "x/metrics.jsonl").exists():
        assert job.poll() is None
        time.sleep(0.1)
    children = [int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
    os.kill(children[1], number)
    began = time.monotonic()
    _, said = job.communicate(timeout=90)
    assert job.returncode != 0 and says in said and time.monotonic() - began < 60


@pytest.mark.slow
def test_evaluate_gives_the_same_table(folder_of, tmp_path):
    words = ["-m", "nanorlhf.evaluate"]
    options = ["out/sft", "--reference", "out/base", "--reward", "out/rm", "--bon", 2, "--response_length", 8, "--num_prompts", 6,
               "--num_samples", 2, "--diversity_prompts", 3, "--device", "cpu"]
    for count, more in ((1, []), (2, []), (3, ["--shard"])):
        launch(count, folder_of(1).parent, *options, *more, "--out", tmp_path / str(count), script=words)
    one, two, shards = (json.loads((tmp_path / name / "table.json").read_text()) for name in "123")
    for a, b, c in zip(one, two, shards):
        assert a.keys() == b.keys() == c.keys()
        assert all(alike(a[k], b[k], 1e-3) and alike(a[k], c[k], 1e-3) for k in a), a["method"]


@pytest.mark.parametrize("items, count", [(range(8), 2), ([5, 1, 9, 9, 2, 7, 3], 3), (range(3), 4), ([], 2)])
def test_items_are_dealt_evenly(monkeypatch, items, count):
    """Each goes to one rank, the numbers differ by one at most, and the loads by no more than the longest item."""
    monkeypatch.setattr(ranks, "count", lambda: count)
    shares = []
    for rank in range(count):
        monkeypatch.setattr(ranks, "mine", lambda rank=rank: rank)
        shares.append(ranks.deal(items, lambda i: i))
    assert sorted(i for share in shares for i in share) == sorted(items)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert max(map(sum, shares)) - min(map(sum, shares)) <= max(items, default=0)


def test_the_pipeline_refuses_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--processes"):
        ranks.refuse()


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    if sys.argv[1] == "inputs":
        shutil.rmtree("out", ignore_errors=True)
        for out, (script, options) in INPUTS.items():
            start(script, options, Path("out") / out)
    else:
        program(*sys.argv[1:])
