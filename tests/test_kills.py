"""Tests that a run survives SIGKILL and a failing disk at any moment, and then comes to the result of a run without a break.

    python tests/test_kills.py [--kills 50] > results/faults/kills.md

Every attempt is a forked child. It is killed after a random time, or at a random call that changes the disk, just before or just
after it; or each such call in turn fails; or each file may only grow to a random size. The next attempt resumes. Runs that
reach their end are compared with one that was left alone.
"""

import contextlib
import errno
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
    "train_ppo, bfloat16": ("train_ppo", dict(limit=32, dtype="bfloat16")),
    "train_ppo, adaptive KL": ("train_ppo", dict(limit=32, kl_target=6.0, whiten_rewards=True)),
    "train_dpo": ("train_dpo", {}),
    "train_rrhf, resampled": ("train_rrhf", dict(limit=16, resample_every=3)),
    "sample_bon": ("sample_bon", dict(n=4, limit=60, batch_size=4, reward="gold", keep_unfinished=True))}
FAILING = ("train_sft", "train_ppo, adaptive KL", "train_rrhf, resampled", "sample_bon")
SHORT = dict(max_steps=4, eval_every=2)        # of the runs whose every call fails in turn
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
    for file in sorted(p for p in folder.iterdir() if p.is_file() and p.name not in ("run.json", "metrics.jsonl", "log.txt")):
        found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in read_jsonl(folder / "metrics.jsonl")]
    return found | {"metrics": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def no_space():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def at_call(number, before=None, after=None):
    """Calls `before` or `after` at this process's number-th call that changes the disk. Returns a function that tells whether it
    came to that."""
    count = 0

    def watched(call):
        def wrapper(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number and before:
                before()
            result = call(*args, **kwargs)
            if count == number and after:
                after()
            return result
        return wrapper
    import builtins
    for module, name in CALLS:
        setattr(module, name, watched(getattr(module, name)))
    opened, writes = builtins.open, watched(builtins.open)
    builtins.open = lambda file, mode="r", *args, **kwargs: (opened if mode in ("r", "rb") else writes)(file, mode, *args, **kwargs)
    return lambda: count >= number


def attempt(name, options, out, plan=("nothing",)):
    """Forks a child that starts or resumes the run, under a plan: ("time", seconds) or ("call", number, "before" or "after") kill it,
    ("fail", number) lets a call fail, ("limit", bytes) the writing of longer files. Returns "finished", "killed", "refused" (one
    line, as a user gets it), "error", or "survived" if a call failed and the run reached its end all the same."""
    from nanorlhf.errors import UserError
    child = os.fork()
    if child == 0:
        answer, reached = 3, bool
        try:
            if plan[0] == "call":
                at_call(plan[1], **{plan[2]: die})
            if plan[0] == "fail":
                reached = at_call(plan[1], before=no_space)
            if plan[0] == "limit":
                import resource
                resource.setrlimit(resource.RLIMIT_FSIZE, (plan[1], plan[1]))
            start(name, options, out)
            answer = 4 if reached() else 0
        except (UserError, OSError) as error:
            answer = 2 if "\n" not in str(error) else 3
        except BaseException as error:
            print(f"{name}, {plan}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(answer)
    if plan[0] == "time":
        time.sleep(plan[1])
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return "killed" if os.WIFSIGNALED(status) else ("finished", "", "refused", "error", "survived")[os.WEXITSTATUS(status)]


def left_alone(name, options):
    """Returns (seconds, outcome) of the run that nothing happens to."""
    whole, began = Path("whole"), time.monotonic()
    shutil.rmtree(whole, ignore_errors=True)
    assert attempt(name, options, whole) == "finished"
    return time.monotonic() - began, outcome(whole)


def killed(title, kills):
    """Kills a run, and the runs after it, until this many attempts were killed. Returns a row of the table."""
    (name, options), rng, out = KILLED[title], random.Random(title), Path("killed")
    seconds, expected = left_alone(name, options)
    row = {"script": title, "killed": 0, "of these at a call": 0, "runs finished": 0, "not resumed": 0, "other result": 0}
    while row["killed"] < kills or out.exists():
        if title.endswith("--overwrite") and not out.exists():
            shutil.copytree("out/sft", out)
        plan = ("time", rng.uniform(0, seconds / 3))
        if rng.random() < 0.5:
            plan = ("call", rng.randint(1, 60), rng.choice(("before", "after")))
        answer = attempt(name, options, out, plan if row["killed"] < kills else ("nothing",))
        row["killed"] += answer == "killed"
        row["of these at a call"] += answer == "killed" and plan[0] == "call"
        row["not resumed"] += answer in ("refused", "error")
        if answer == "finished":
            row["runs finished"] += 1
            row["other result"] += outcome(out) != expected
        if answer != "killed":
            shutil.rmtree(out, ignore_errors=True)
    return row


def failed(title, sizes=20):
    """Lets each call that changes the disk fail in turn, and then files be longer than a random number of bytes. Returns a row."""
    (name, options), rng, out = KILLED[title], random.Random(title), Path("failed")
    options = options | {k: v for k, v in SHORT.items() if name != "sample_bon"}
    _, expected = left_alone(name, options)
    largest = max(p.stat().st_size for p in Path("whole").rglob("*") if p.is_file())
    row = {"script": title, "calls that failed": 0, "files too long": 0, "in one line": 0, "all the same": 0, "not resumed": 0, "other result": 0}

    def one(plan, column):
        shutil.rmtree(out, ignore_errors=True)
        answer = attempt(name, options, out, plan)
        if answer != "finished":
            row[column] += 1
            row["in one line"] += answer == "refused"
            row["all the same"] += answer == "survived"
            row["not resumed"] += answer != "survived" and attempt(name, options, out) != "finished"
        row["other result"] += not out.exists() or outcome(out) != expected
        return answer
    for number in range(1, 10000):
        if one(("fail", number), "calls that failed") == "finished":
            break
    for _ in range(sizes):
        one(("limit", rng.randint(1, largest)), "files too long")
    shutil.rmtree(out)
    return row


def main(kills):
    """Prints two tables as Markdown. Works in the working directory."""
    import torch
    torch.set_num_threads(1)         # bits, and a forked child has no other threads
    sys.path.insert(0, str(Path(__file__).parent))
    for out, (name, options) in INPUTS.items():
        assert attempt(name, options, Path("out") / out) == "finished"
    for rows in ([killed(title, kills) for title in KILLED], [failed(title) for title in FAILING]):
        print("| " + " | ".join(rows[0]) + " |\n|---|" + "---:|" * (len(rows[0]) - 1))
        print("\n".join("| " + " | ".join(map(str, row.values())) + " |" for row in rows) + "\n", flush=True)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_script_survives_kills_and_a_failing_disk(tmp_path):
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).parents[1]))
    child = subprocess.run([sys.executable, __file__, "--kills", str(KILLS)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    rows = [line.strip("| ").split(" | ") for line in child.stdout.splitlines() if line.startswith(("| train", "| sample"))]
    assert [r[0] for r in rows] == [*KILLED, *FAILING], child.stdout
    assert all(row[-2:] == ["0", "0"] for row in rows), child.stdout + child.stderr
    for title, *numbers in rows[:len(KILLED)]:
        assert int(numbers[0]) == KILLS and 0 < int(numbers[1]) < KILLS and int(numbers[2]) > 0, title
    for title, *numbers in rows[len(KILLED):]:
        calls, sizes, one_line, survived, _, _ = map(int, numbers)
        assert calls > 20 and calls + sizes == one_line + survived, title


if __name__ == "__main__":
    import tempfile
    number = int(sys.argv[sys.argv.index("--kills") + 1]) if "--kills" in sys.argv else KILLS
    with tempfile.TemporaryDirectory() as working:
        os.chdir(working)
        main(number)
