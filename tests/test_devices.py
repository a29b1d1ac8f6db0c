"""Tests on the pretend accelerator of pretend_device.py: no tensor is left on the host, the numbers are the CPU's, and few calls
make a GPU wait.

The device stays registered for the rest of a process, so a child process (this file as a program) runs every command, on the
CPU and on the device, and writes what it found to a file.
"""

import functools
import json
import math
import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import backend_registration

pytestmark = pytest.mark.skipif(not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
                                reason="this torch has no devices that are written in Python")
TESTS = Path(__file__).parent
PER_UPDATE = 1         # most waits of an update: forward, backward, optimizer step and all that is logged of it
PER_ROLLOUT = 15       # most waits of the rest of a PPO step: rollout, scores, advantages
TINY = dict(width=16, layers=1, heads=2, context=96, batch_size=8, micro_batch_size=4, max_steps=3, eval_every=3, save_every=0,
            eval_fraction=0.2, response_length=8, num_eval_prompts=4, num_mini_batches=2, num_ppo_epochs=2)
COMMANDS = {           # name of the run: script, its options. Later ones read what earlier ones wrote on the CPU
    "base": ("train_sft", dict(init="scratch", kind="text", limit=60)),
    "sft": ("train_sft", dict(limit=60)),
    "comparisons": ("sample_bon", dict(split="train", n=2, reward="gold", label_temperature=0.2, limit=60, keep_unfinished=True)),
    "rm": ("train_rm", dict(prior_precision=0.1)),
    "dpo": ("train_dpo", {}),
    "ppo": ("train_ppo", dict(limit=32)),
    "ppo_gold": ("train_ppo", dict(limit=32, reward="gold", whiten_rewards=True, missing_eos="subtract", kl_target=6.0)),
    "rrhf": ("train_rrhf", dict(limit=8)),
    "rrhf_beam": ("train_rrhf", dict(limit=8, sampling="beam")),
    "bon": ("sample_bon", dict(n=4, limit=6)),
}
SAMPLING = {"one": dict(num_samples=1), "three": dict(num_samples=3), "top_k": dict(num_samples=3, top_k=5),
            "top_p": dict(top_p=0.9)}
TABLE = "--bon 2 --response_length 8 --num_prompts 6 --num_samples 2 --diversity_prompts 3"
TRAINING = [name for name, (script, _) in COMMANDS.items() if script.startswith("train")]


# ---- In the child process -------------------------------------------------------------------------------------------


def run(name, device, folder="", **more):
    """Runs a command. Returns the rows of its metrics.jsonl, and the number of waits at the end of each optimizer step."""
    from pretend_device import waits              # before nanorlhf

    from conftest import SCRIPTS, entry_of, known_options
    from nanorlhf.files import read_jsonl

    script, options = COMMANDS[name]
    module, ends = SCRIPTS[script], []
    options = known_options(module, TINY) | options | more
    out = f"out/{folder}{name}" if device == "cpu" else f"out/{device}/{folder}{name}"
    step = getattr(module, "optimizer_step", None)

    def counted(*args):
        found = step(*args)
        ends.append(waits.total())
        return found
    module.optimizer_step = counted
    try:
        entry_of(module)(module.Config(**options, device=device, out=out))
    finally:
        module.optimizer_step = step
    return dict(rows=read_jsonl(f"{out}/metrics.jsonl"), ends=ends)


def resume(device):
    """Runs PPO, takes the folder back to the first checkpoint, and resumes. Returns the rows of both runs."""
    options = dict(max_steps=2, save_every=1, eval_every=0)
    whole = run("ppo_gold", device, "resumed_", **options)["rows"]
    folder = Path("out" if device == "cpu" else f"out/{device}", "resumed_ppo_gold")
    shutil.rmtree(folder / "checkpoints/step-0000002")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(dict(record, finished=False)))
    return dict(whole=whole, rows=run("ppo_gold", device, "resumed_", **options, resume=True)["rows"])


def table(device):
    """Runs evaluate.py. Returns the rows of its table."""
    from nanorlhf.evaluate import main

    sys.argv[1:] = f"out/dpo --device {device} --out out/table_{device} {TABLE}".split()
    main()
    return dict(rows=json.loads(Path(f"out/table_{device}/table.json").read_text()))


def sampling(device, options):
    """Returns samples of 40 tokens with log-probabilities, and the number of waits at the beginning of each decoding step."""
    from nanorlhf.generate import generate
    from nanorlhf.model import Transformer
    from nanorlhf.tokenizer import load_tokenizer
    from pretend_device import waits

    model, tokenizer, begins = Transformer.from_pretrained("out/sft").to(device), load_tokenizer("out/sft"), []
    model.register_forward_pre_hook(lambda _, args: begins.append(waits.total()) if args[0].shape[1] == 1 else None)
    prompts = [tokenizer.encode(f"Review of the {x}:") for x in ("film", "game Northern Circle", "book")]
    samples = generate(model, prompts, 40, seed=3, tokenizer=tokenizer, **options)
    return dict(rows=[samples.tokens.tolist(), samples.logprobs.tolist()], begins=begins)


def control(device):
    """Returns the names of the lines below that fail, and how often each of the others waits."""
    import torch

    from pretend_device import waits

    host, x = torch.ones(2, 3), torch.ones(2, 3).to(device)
    mask, index = x > 0, torch.tensor([1], device=device)
    lines = {
        "x + x": lambda: x + x, "x + host": lambda: x + host, "host * x": lambda: host * x, "x @ host.T": lambda: x @ host.T,
        "host[index]": lambda: host[index], "numpy": lambda: x.numpy(), "cat": lambda: torch.cat([x, host]),
        "scalar": lambda: x * torch.tensor(2.0), "float": lambda: float(x.sum()), "if": lambda: bool(mask.all()),
        "tolist": lambda: x.tolist(), "cpu": lambda: x.cpu(), "x[mask]": lambda: x[mask], "x[list]": lambda: x[[0, 1]],
        "x[index]": lambda: x[index], "x[host]": lambda: x[torch.tensor([1])], "nonzero": lambda: mask.nonzero(),
        "to": lambda: host.to(device), "non_blocking": lambda: host.to(device, non_blocking=True),
        "zeros": lambda: torch.zeros(2, device=device), "slice": lambda: x[:, 1:],
        "backward": lambda: x.clone().requires_grad_().sum().backward()}
    failed, waited = [], {}
    for name, line in lines.items():
        before = waits.total()
        try:
            line()
            waited[name] = waits.total() - before
        except (RuntimeError, TypeError):
            failed.append(name)
    return dict(failed=failed, waited=waited)


def main(file):
    jobs = {}
    for device in ("cpu", "pretend"):
        jobs |= {(name, device): functools.partial(run, name, device) for name in COMMANDS}
        jobs |= {("resume", device): functools.partial(resume, device), ("table", device): functools.partial(table, device)}
        jobs |= {(name, device): functools.partial(sampling, device, options) for name, options in SAMPLING.items()}
    jobs["control", "pretend"] = functools.partial(control, "pretend")
    found = {}
    for (name, device), job in jobs.items():
        try:
            with sdpa_kernel(SDPBackend.MATH):    # as on the device: other rounding would draw another token now and then
                found[f"{name} {device}"] = job()
        except (Exception, SystemExit):           # the commands after it run, too
            found[f"{name} {device}"] = dict(error=traceback.format_exc())
    Path(file).write_text(json.dumps(found))


# ---- In the parent --------------------------------------------------------------------------------------------------


def start(folder, *words):
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(TESTS.parent))
    return subprocess.run([sys.executable, *map(str, words)], cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Runs all commands in a folder. Returns {"name device": what was found}, and the folder as "folder"."""
    folder = tmp_path_factory.mktemp("devices")
    child = start(folder, __file__, folder / "found.json")
    assert child.returncode == 0, child.stderr
    return json.loads((folder / "found.json").read_text()) | {"folder": folder}


@pytest.fixture
def found(results):
    """Returns the function name -> what the command found on the CPU and on the device; it fails with the command's error."""
    def both(name):
        cpu, pretend = (results[f"{name} {device}"] for device in ("cpu", "pretend"))
        assert "error" not in cpu and "error" not in pretend, cpu.get("error", "") + pretend.get("error", "")
        return cpu, pretend
    return both


def differing(a, b, tolerance=1e-5, path="rows"):
    """Returns what differs between two JSON values, times aside: a list of "path: value, other value"."""
    if isinstance(a, (dict, list)) and type(a) is type(b) and len(a) == len(b):
        pairs = a.items() if isinstance(a, dict) else enumerate(a)
        return [x for k, v in pairs if k not in ("time", "tokens_per_second")
                for x in (differing(v, b[k], tolerance, f"{path}.{k}") if isinstance(b, list) or k in b else [f"{path}.{k}"])]
    numbers = isinstance(a, (int, float)) and isinstance(b, (int, float))
    same = math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance / 10) if numbers else a == b
    return [] if same else [f"{path}: {a}, {b}"]


@pytest.mark.parametrize("name", [*COMMANDS, "resume", "table", *SAMPLING])
def test_the_device_gives_the_numbers_of_the_cpu(found, name):
    cpu, pretend = found(name)
    assert cpu["rows"] and differing(cpu["rows"], pretend["rows"]) == []


def test_a_resumed_run_equals_an_uninterrupted_one_on_the_device(found):
    _, pretend = found("resume")
    assert len(pretend["rows"]) == 2 and differing(pretend["whole"], pretend["rows"], tolerance=0) == []


@pytest.mark.parametrize("name", TRAINING)
def test_an_update_hardly_waits(found, name):
    _, pretend = found(name)
    waits = [b - a for a, b in zip(pretend["ends"], pretend["ends"][1:])]    # of all updates but the first
    rollouts = [waits.pop(i) for i in (7, 3)] if "ppo" in name else []       # 4 updates a step: these hold a rollout as well
    assert len(waits) >= 2 and max(waits) <= PER_UPDATE
    assert max(rollouts, default=0) <= PER_ROLLOUT + PER_UPDATE


@pytest.mark.parametrize("name", SAMPLING)
def test_a_decoding_step_does_not_wait_except_every_sixteenth(found, name):
    _, pretend = found(name)
    waited = [i for i, (a, b) in enumerate(zip(pretend["begins"], pretend["begins"][1:])) if a != b]
    assert len(pretend["begins"]) > 32 and len(waited) <= 2 and all(i % 16 == 14 for i in waited)


def test_the_pretend_device_keeps_its_tensors_apart_and_counts_waits(results):
    """The control: without it, a device that notices nothing would pass every test above."""
    found = results["control pretend"]
    assert found["failed"] == ["x + host", "host * x", "x @ host.T", "host[index]", "numpy", "cat"]
    waits = ["float", "if", "tolist", "cpu", "x[mask]", "x[list]", "x[host]", "nonzero", "to"]
    assert {k: v for k, v in found["waited"].items() if v} == dict.fromkeys(waits, 1)
    assert {"x + x", "scalar", "x[index]", "non_blocking", "zeros", "slice", "backward"} <= found["waited"].keys()


def test_a_script_runs_on_the_device_from_the_command_line(results):
    child = start(results["folder"], TESTS / "pretend_device.py", TESTS.parent / "train_sft.py", "--device", "pretend", "--out",
                  "out/by_hand", "--limit", 60, "--max_steps", 1, "--eval_every", 0)
    assert child.returncode == 0 and "sft done: out/by_hand" in child.stdout, child.stderr
    assert child.stdout.splitlines()[-1].startswith("waits: {")


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS.parent))
    main(sys.argv[1])
