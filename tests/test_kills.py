"""Tests that a run survives SIGKILL at any moment: 50 kills of each script, and the result is that of a run without a break.

    python tests/test_kills.py [--kills 50] > results/faults/kills.md

A child process is forked for every attempt and killed after a random time, or at a random call that writes to the disk, just before
or just after it. The next attempt resumes. Runs that reach their end are compared with one that was never killed.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

KILLS = 50
TINY = dict(width=16, layers=1, heads=2, context=96, batch_size=8, max_steps=12, eval_every=5, save_every=2, eval_fraction=0.2,
            response_length=8, num_eval_prompts=4)
INPUTS = {                           # made once, without kills: name of the run: script, its options
    "base": ("train_sft", dict(init="scratch", kind="text", limit=60, max_steps=3)),
    "sft": ("train_sft", dict(limit=60, max_steps=3)),
    "comparisons": ("sample_bon", dict(split="train", n=2, reward="gold", label_temperature=0.2, limit=60, keep_unfinished=True)),
    "rm": ("train_rm", dict(max_steps=3))}
KILLED = {
    "train_sft": ("train_sft", dict(limit=60)),
    "train_sft, bfloat16": ("train_sft", dict(limit=60, dtype="bfloat16")),
    "train_sft, --overwrite": ("train_sft", dict(limit=60)),
    "train_rm": ("train_rm", {}),
    "train_ppo, adaptive KL": ("train_ppo", dict(limit=32, kl_target=6.0, whiten_rewards=True)),
    "train_dpo": ("train_dpo", {}),
    "train_rrhf, resampled": ("train_rrhf", dict(limit=16, resample_every=3)),
    "sample_bon": ("sample_bon", dict(n=4, limit=60, batch_size=4, reward="gold", keep_unfinished=True))}
TIMES = ("time", "tokens_per_second")
CALLS = ((os, "replace"), (os, "fsync"), (os, "mkdir"), (os, "unlink"), (os, "rmdir"), (os, "chmod"))   # and opening for writing


def start(name, options, out):
    """Starts a script in this process, or resumes the run if it is this one, or else overwrites it; what it prints is lost."""
    from conftest import SCRIPTS, entry_of, known_options
    module = SCRIPTS[name]
    options = known_options(module, TINY) | options
    run = json.loads((out / "run.json").read_text())["options"] if (out / "run.json").exists() else None
    ours = run and options.items() <= run.items()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        entry_of(module)(module.Config(**options, device="cpu", out=str(out), resume=bool(ours), overwrite=bool(run and not ours)))


def outcome(folder):
    """Returns {file: sha256 of what must not depend on kills}: weights, records, samples and metrics but for the times."""
    from nanorlhf.files import read_jsonl
    found = {}
    for file in sorted(p for p in folder.iterdir() if p.is_file() and p.name not in ("run.json", "metrics.jsonl")):
        found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in read_jsonl(folder / "metrics.jsonl")]
    return found | {"metrics": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_call(number, after):
    """Kills this process at its number-th call that changes the disk, before or after it."""
    count = 0

    def watched(call):
        def wrapper(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number and not after:
                die()
            result = call(*args, **kwargs)
            if count == number and after:
                die()
            return result
        return wrapper
    import builtins
    for module, name in CALLS:
        setattr(module, name, watched(getattr(module, name)))
    opened, writes = builtins.open, watched(builtins.open)
    builtins.open = lambda file, mode="r", *args, **kwargs: (opened if mode in ("r", "rb") else writes)(file, mode, *args, **kwargs)


def attempt(name, options, out, plan):
    """Forks a child that starts or resumes the run and is killed by the plan: ("time", seconds), ("call", number, after) or None.
    Returns True if it was killed; raises RuntimeError if it ended with an error."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if plan and plan[0] == "call":
                die_at_call(*plan[1:])
            start(name, options, out)
            code = 0
        except BaseException as error:
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    if plan and plan[0] == "time":
        time.sleep(plan[1])
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status):
        raise RuntimeError(f"{name} did not resume after the plan {plan}")
    return False


def torture(folder, title, kills):
    """Kills one script until it was killed `kills` times. Returns a row of the table."""
    (name, options), rng = KILLED[title], random.Random(title)
    whole, out = folder / "whole", folder / "killed"
    for path in (whole, out):
        shutil.rmtree(path, ignore_errors=True)
    began = time.monotonic()
    attempt(name, options, whole, None)
    seconds, expected = time.monotonic() - began, outcome(whole)
    row = {"script": title, "killed": 0, "while writing": 0, "runs finished": 0, "not resumed": 0, "other result": 0}
    while True:
        if title.endswith("--overwrite") and not out.exists():
            shutil.copytree("out/sft", out)
        plan = None
        if row["killed"] < kills:
            timed = rng.random() < 0.5
            plan = ("time", rng.uniform(0, seconds / 3)) if timed else ("call", rng.randint(1, 60), rng.random() < 0.5)
        try:
            killed = attempt(name, options, out, plan)
        except RuntimeError:
            row["not resumed"] += 1
            shutil.rmtree(out)
            continue
        row["killed"] += killed
        row["while writing"] += killed and plan[0] == "call"
        if not killed:
            row["runs finished"] += 1
            row["other result"] += outcome(out) != expected
            shutil.rmtree(out)
            if row["killed"] == kills:
                break
    return row


def main(kills):
    """Prints the table as Markdown and its rows as a line of JSON, in a working directory of its own."""
    import torch
    torch.set_num_threads(1)         # bits, and a forked child has no other threads
    sys.path.insert(0, str(Path(__file__).parent))
    for out, (name, options) in INPUTS.items():
        attempt(name, options, Path("out") / out, None)
    rows = [torture(Path(), title, kills) for title in KILLED]
    print("| " + " | ".join(rows[0]) + " |\n|---|" + "---:|" * (len(rows[0]) - 1))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")
    return rows


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_script_survives_kills(tmp_path):
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).parents[1]))
    child = subprocess.run([sys.executable, __file__, "--kills", str(KILLS)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    rows = [line.strip("| ").split(" | ") for line in child.stdout.splitlines()[2:]]
    assert [r[0] for r in rows] == list(KILLED)
    for _, killed, writing, finished, not_resumed, other in rows:
        assert int(killed) == KILLS and 0 < int(writing) < KILLS and int(finished) > 0
        assert (not_resumed, other) == ("0", "0"), child.stdout + child.stderr


if __name__ == "__main__":
    import tempfile
    number = int(sys.argv[sys.argv.index("--kills") + 1]) if "--kills" in sys.argv else KILLS
    with tempfile.TemporaryDirectory() as working:
        os.chdir(working)
        main(number)
