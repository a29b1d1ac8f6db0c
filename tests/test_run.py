"""Tests of options.py, files.py, training.py (seeds, learning rates, the optimizer) and run.py (run folder, checkpoints)."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_origin

import numpy as np
import pytest
import torch

from conftest import SCRIPTS, TRAINERS
from nanorlhf import run as run_module
from nanorlhf.errors import UserError
from nanorlhf.files import atomic_write, read_jsonl, require_file, require_folder, write_json, write_records
from nanorlhf.model import pick_device
from nanorlhf.options import main, metavar_of, parse_options
from nanorlhf.run import Run
from nanorlhf.training import learning_rate, make_optimizer, optimizer_step, seed_for


@dataclass
class Options:
    out: str = "out/x"  # run folder
    lr: float = 1e-3  # peak rate, 50% of what it was
    steps: int = 3  # how many
    fast: bool = False  # hurry


# ---- Options --------------------------------------------------------------------------------------------------------


def test_both_spellings_of_an_option_and_all_forms_of_a_bool_work():
    assert parse_options(Options, argv=[]) == Options()
    assert parse_options(Options, argv=["--lr", "1e-5", "--steps", "7"]) == parse_options(
        Options, argv=["--lr=1e-5", "--steps=7"]
    )
    assert parse_options(Options, argv=["--lr", "1e-5"]).lr == 1e-5
    for yes in (["--fast"], ["--fast", "true"], ["--fast=True"], ["--fast", "yes"], ["--fast=1"], ["--fast", "on"]):
        assert parse_options(Options, argv=yes).fast is True
    for no in (["--fast", "false"], ["--fast=False"], ["--fast", "no"], ["--fast=0"], ["--fast=off"]):
        assert parse_options(Options, argv=no).fast is False
    assert parse_options(Options, argv=["--out", "-"]).out == "-"
    assert parse_options(Options, argv=["--lr=-1"]).lr == -1.0


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--no_such", "1"], "--no_such"),
        (["--st", "3"], "--st"),
        (["stray"], "stray"),
        (["--steps", "many"], "--steps"),
        (["--steps", "1.5"], "--steps"),
        (["--lr", "fast"], "--lr"),
        (["--fast", "maybe"], "neither true nor false"),
        (["--steps"], "--steps"),
    ],
)
def test_a_wrong_option_gives_a_one_line_error_that_names_it(argv, says, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_options(Options, argv=argv)
    assert says in stop.value.code and stop.value.code.startswith("error: ") and "\n" not in stop.value.code
    assert capsys.readouterr() == ("", "")


def test_help_lists_every_field_with_its_comment_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_options(Options, "What it does.", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "What it does." in text
    for field, comment in (
        ("out", "run folder"),
        ("lr", "peak rate, 50% of what it was"),
        ("steps", "how many"),
        ("fast", "hurry"),
    ):
        assert f"--{field}" in text and f"{comment} (default: {getattr(Options(), field)!r})" in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_every_script_lists_every_field_with_a_comment(script, capsys):
    module = SCRIPTS[script]
    with pytest.raises(SystemExit):
        parse_options(module.Config, module.__doc__, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(f" {heading}: " in text for heading in ("Data", "Lengths in tokens", "Run"))
    for field in dataclasses.fields(module.Config):
        metavar = "[BOOL]" if field.type is bool else metavar_of(field)
        comment, default = text.split(f"--{field.name} {metavar} ", 1)[1].split("(default: ", 1)
        assert comment.split(), f"{script} --{field.name} has no help"
        assert default.startswith(repr(field.default))


def test_scripts_share_the_names_and_types_of_common_options():
    """Every script has these options, and an option has the same type in every script."""
    types = {}
    for script in SCRIPTS:
        fields = {f.name: f.type for f in dataclasses.fields(SCRIPTS[script].Config)}
        assert {
            "init",
            "data",
            "out",
            "seed",
            "device",
            "dtype",
            "compile",
            "resume",
            "overwrite",
            "limit",
            "batch_size",
        } <= fields.keys()
        if script in TRAINERS:
            assert {"max_steps", "micro_batch_size", "lr"} <= fields.keys()
        for name, kind in fields.items():
            kind = str if get_origin(kind) is Literal else kind                         # allowed words may differ (--kind)
            assert types.setdefault(name, kind) is kind


@pytest.mark.parametrize(
    "error, says",
    [
        (UserError("no such thing"), "error: no such thing"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), "lower --micro_batch_size"),
        (KeyboardInterrupt(), "--resume"),
    ],
)
def test_main_turns_errors_that_a_user_can_fix_into_one_line(error, says, monkeypatch):
    def train(config):
        raise error

    monkeypatch.setattr(sys, "argv", ["train_x.py"])
    with pytest.raises(SystemExit) as stop:
        main(Options, train, "")
    assert says in stop.value.code and "\n" not in stop.value.code


def test_main_does_not_hide_our_own_bugs(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_x.py"])
    with pytest.raises(ZeroDivisionError):
        main(Options, lambda config: 1 / 0, "")


# ---- Files ----------------------------------------------------------------------------------------------------------


def leftovers(folder):
    return {
        str(p.relative_to(folder)): p.read_text() for p in Path(folder).rglob("*") if p.is_file() and ".writing" not in str(p)
    }


def write_folder(path, text):
    with atomic_write(path) as temporary:
        temporary.mkdir()
        (temporary / "a").write_text(text)
        (temporary / "b").write_text(text)


def write_file(path, text):
    with atomic_write(path) as temporary:
        temporary.write_text(text)


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_atomic_write_replaces_a_file_or_a_folder(write, tmp_path):
    target = tmp_path / "deep" / "er" / "x"
    write(target, "one")
    write(target, "two")
    assert set(leftovers(tmp_path).values()) == {"two"}
    assert [p.name for p in target.parent.iterdir()] == ["x"]


@pytest.mark.parametrize("write", [write_file, write_folder])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_fsync_or_rename_leaves_the_old_content_and_a_retry_works(write, call, tmp_path, monkeypatch):
    target = tmp_path / "x"
    if write is write_file:
        write(target, "old")
    before = leftovers(tmp_path)

    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError):
            write(target, "new")
    assert leftovers(tmp_path) == before
    write(target, "new")
    assert set(leftovers(tmp_path).values()) == {"new"} and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_failure_while_writing_leaves_the_old_content(tmp_path):
    target = tmp_path / "x.json"
    write_json(target, {"old": 1})
    with pytest.raises(ValueError):
        write_json(target, {"new": [1, float("nan")]})  # NaN is not JSON
    with pytest.raises(RuntimeError):
        with atomic_write(target) as temporary:
            temporary.write_text("half of it")
            raise RuntimeError
    assert json.loads(target.read_text()) == {"old": 1}
    write_json(target, {"new": 2})
    assert json.loads(target.read_text()) == {"new": 2}


def test_a_kill_while_writing_leaves_the_old_content(tmp_path):
    target = tmp_path / "x"
    write_file(target, "old")
    code = (
        f"import os, pathlib\nfrom nanorlhf.files import atomic_write\n"
        f"with atomic_write({str(target)!r}) as t:\n    t.write_text('half'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert target.read_text() == "old"
    write_file(target, "new")
    assert target.read_text() == "new"


def test_records_round_trip_and_a_truncated_last_line_is_dropped(tmp_path):
    rows = [{"text": 'ü\u2028\n"x'}, {"text": "", "n": 0.1}, {"text": "中", "list": [1, 2]}]
    write_records(tmp_path / "r.jsonl", rows)
    assert read_jsonl(tmp_path / "r.jsonl") == rows
    content = (tmp_path / "r.jsonl").read_bytes()
    (tmp_path / "r.jsonl").write_bytes(content[:-5])
    assert read_jsonl(tmp_path / "r.jsonl") == rows[:2]
    assert read_jsonl(tmp_path / "none.jsonl") == []


# ---- Seeds and learning rates ---------------------------------------------------------------------------------------


def test_seeds_depend_only_on_seed_purpose_and_step():
    seeds = {seed_for(s, purpose, step) for s in range(5) for purpose in ("rollout", "minibatches") for step in range(20)}
    assert len(seeds) == 200 and all(0 <= s < 2**63 for s in seeds)
    assert seed_for(3, "rollout", 7) == seed_for(3, "rollout", 7)
    again = subprocess.run(
        [sys.executable, "-c", "from nanorlhf.training import seed_for; print(seed_for(3, 'rollout', 7))"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "5"},
    )
    assert int(again.stdout) == seed_for(3, "rollout", 7)  # Python's hash() would differ


def test_importing_the_project_does_not_touch_the_global_generators():
    code = (
        "import random, numpy, torch; torch.manual_seed(1); numpy.random.seed(1); random.seed(1)\n"
        "a = torch.get_rng_state(), numpy.random.get_state()[1].copy(), random.getstate()\n"
        "import train_sft, train_rm, train_ppo, train_dpo, train_rrhf, sample_bon, nanorlhf.evaluate\n"
        "b = torch.get_rng_state(), numpy.random.get_state()[1], random.getstate()\n"
        "assert torch.equal(a[0], b[0]) and (a[1] == b[1]).all() and a[2] == b[2]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_learning_rate_equals_its_closed_form(schedule, warmup):
    total, peak = 20, 0.3
    rates = [learning_rate(step, total, peak, warmup, schedule) for step in range(total)]
    for step, rate in enumerate(rates):
        x = (step - warmup) / (total - warmup)
        after = {"constant": 1, "linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2}[schedule]
        assert rate == pytest.approx(peak * ((step + 1) / warmup if step < warmup else after), rel=1e-12)
    assert max(rates) == pytest.approx(peak) and min(rates) > 0  # no step has rate 0
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_linear_schedule_without_warmup_is_ppos_annealing():
    assert [learning_rate(s, 4, 1.0) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]


# ---- Optimizer and checkpoints --------------------------------------------------------------------------------------


def test_weight_decay_acts_only_on_matrices_and_optimizer_names_are_checked():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    matrices, others = make_optimizer(model.parameters(), "adamw", 0.1, weight_decay=0.5).param_groups
    assert (len(matrices["params"]), matrices["weight_decay"], len(others["params"]), others["weight_decay"]) == (1, 0.5, 3, 0.0)
    assert isinstance(make_optimizer(model.parameters(), "rmsprop", 0.1), torch.optim.RMSprop)
    assert make_optimizer(model.parameters(), "adam", 0.1, eps=1e-5).param_groups[0]["eps"] == 1e-5
    with pytest.raises(UserError, match="--optimizer sgd"):
        make_optimizer(model.parameters(), "sgd", 0.1)


@dataclass
class Small:
    out: str
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    overwrite: bool = False
    resume: bool = False
    batch_size: int = 4
    lr_schedule: Literal["linear", "constant"] = "linear"


def some_updates(model, optimizer, first, last):
    for step in range(first, last):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) ** 2).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "adam", "rmsprop"])
def test_weights_optimizer_and_state_survive_a_checkpoint_round_trip(name, tmp_path):
    def fresh():
        model = torch.nn.Linear(3, 2)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape))
        return model, make_optimizer(model.parameters(), name, 0.01, weight_decay=0.1)

    model, optimizer = fresh()
    run = Run(Small(str(tmp_path / "a")), "sft")
    assert run.load_checkpoint({"model": model}, {"optimizer": optimizer}) == {"step": 0}
    run.begin(0)
    some_updates(model, optimizer, 0, 5)
    run.save_checkpoint(5, {"model": model}, {"optimizer": optimizer}, {"kl_coef": 0.1 + 0.2})
    some_updates(model, optimizer, 5, 9)

    other, other_optimizer = fresh()
    again = Run(Small(str(tmp_path / "a"), resume=True), "sft")
    state = again.load_checkpoint({"model": other}, {"optimizer": other_optimizer})
    assert state == {"step": 5, "kl_coef": 0.1 + 0.2}
    some_updates(other, other_optimizer, 5, 9)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert not list((tmp_path / "a").rglob("*.p*t*")) and not list((tmp_path / "a").rglob("*.bin"))  # no pickle


def test_the_two_newest_checkpoints_stay_and_resumed_logs_end_at_the_newest(tmp_path):
    model = torch.nn.Linear(2, 1)
    run = Run(Small(str(tmp_path)), "sft")
    run.begin(0)
    for step in (9, 10, 11):
        run.log(step, 20, {"loss": step})
        run.log_samples(step, [{"text": "x"}])
        run.save_checkpoint(step, {"model": model}, {})
    run.log(12, 20, {"loss": 12})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-0000010", "step-0000011"]
    again = Run(Small(str(tmp_path), resume=True), "sft")
    state = again.load_checkpoint({"model": model}, {})
    assert state["step"] == 11
    again.begin(11)
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [9, 10, 11]
    assert [r["step"] for r in read_jsonl(tmp_path / "samples.jsonl")] == [9, 10, 11]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_corrupt_checkpoint_is_named_and_the_previous_one_resumes(file, damage, tmp_path):
    """safetensors would load a flipped bit silently, so every file has a checksum. In state.json the flip is in kl_coef."""
    model = torch.nn.Linear(3, 2)
    optimizer = make_optimizer(model.parameters(), "adamw", 0.01)
    run = Run(Small(str(tmp_path)), "sft")
    run.begin(0)
    some_updates(model, optimizer, 0, 1)
    for step in (3, 4):
        run.save_checkpoint(step, {"model": model}, {"optimizer": optimizer}, {"kl_coef": 0.25})
    newest = tmp_path / "checkpoints" / "step-0000004"
    path = newest / file
    content = bytearray(path.read_bytes())
    if damage == "flip":
        at = content.index(b"0.25") if file == "state.json" else len(content) - 2
        content[at] ^= 1
    path.write_bytes(content if damage == "flip" else content[:-7])
    if damage == "remove":
        path.unlink()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UserError) as error:
        Run(Small(str(tmp_path), resume=True), "sft").load_checkpoint({"model": model}, {"optimizer": optimizer})
    assert str(path) in str(error.value) and "damaged" in str(error.value) and "\n" not in str(error.value)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    for p in newest.iterdir():
        p.unlink()
    newest.rmdir()
    assert Run(Small(str(tmp_path), resume=True), "sft").load_checkpoint({"model": model}, {"optimizer": optimizer})["step"] == 3


# ---- Run folder -----------------------------------------------------------------------------------------------------


def test_nothing_is_written_before_the_inputs_are_loaded(tmp_path):
    """So after a bad input the same command can be run again, and --overwrite has not deleted anything yet."""
    Run(Small(str(tmp_path / "new")), "sft")
    assert not (tmp_path / "new").exists()
    run = Run(Small(str(tmp_path / "old")), "sft")
    run.begin(0)
    run.log(1, 1, {"loss": 1})
    other = Run(Small(str(tmp_path / "old"), overwrite=True), "sft")
    assert (tmp_path / "old" / "metrics.jsonl").exists()
    other.begin(0)
    assert [p.name for p in (tmp_path / "old").iterdir()] == ["run.json"]


def test_a_folder_without_a_run_or_with_other_files_is_rejected(tmp_path):
    with pytest.raises(UserError, match="holds no run to resume"):
        Run(Small(str(tmp_path), resume=True), "sft")
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="already holds files"):
        Run(Small(str(tmp_path)), "sft")
    with pytest.raises(UserError, match="not a run folder"):
        Run(Small(str(tmp_path), overwrite=True), "sft")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "fields, says",
    [
        (dict(dtype="float16"), "--dtype float16: not one of float32, bfloat16"),
        (dict(lr_schedule="step"), "--lr_schedule step"),
        (dict(batch_size=0), "--batch_size 0: must be at least 1"),
        (dict(device="abacus"), "--device abacus"),
    ],
)
def test_a_value_that_is_not_allowed_gives_a_one_line_error(fields, says, tmp_path):
    with pytest.raises(UserError) as error:
        Run(Small(str(tmp_path / "x"), **fields), "sft")
    assert says in str(error.value) and not (tmp_path / "x").exists()


def test_a_missing_input_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for need in (require_folder, require_file):
        with pytest.raises(UserError, match="first run: python train_sft.py"):
            need("out/sft", "python train_sft.py")
    with pytest.raises(UserError, match="no config.json in it.$"):                     # outside out/ no command is named
        require_folder(str(tmp_path / "sft"), "python train_sft.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_gives_a_one_line_error():
    assert pick_device("auto").type == "cpu"
    with pytest.raises(UserError, match="no GPU"):
        pick_device("cuda")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_number_never_reaches_metrics_jsonl(value, tmp_path):
    run = Run(Small(str(tmp_path)), "sft")
    run.begin(0)
    run.log(1, 3, {"loss": 1.0})
    with pytest.raises(UserError, match="step 2: eval/x not finite"):
        run.log(2, 3, {"loss": 1.0, "eval/x": value})
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1]


@pytest.mark.parametrize("loss, gradient", [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan")), (1.0, float("inf"))])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_non_finite_loss_or_gradient_stops_before_the_step_and_names_step_and_rows(loss, gradient, clip, tmp_path):
    model = torch.nn.Linear(2, 1)
    optimizer = make_optimizer(model.parameters(), "adamw", 0.1)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, gradient)
    with pytest.raises(UserError) as error:
        optimizer_step({optimizer: 0.1}, clip, 17, [5, 3, 8], loss)
    assert "step 17" in str(error.value) and "[5, 3, 8]" in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters())) and not optimizer.state


def test_optimizer_step_clips_the_norm_and_returns_the_one_before_clipping(tmp_path):
    for clip, expected in ((1.0, [-0.6, -0.8]), (0.0, [-3.0, -4.0]), (10.0, [-3.0, -4.0])):
        p = torch.nn.Parameter(torch.zeros(2))
        p.grad = torch.tensor([3.0, 4.0])
        norm = optimizer_step({torch.optim.SGD([p], 0.5): 1.0}, clip, 1, [0], 0.0)
        assert norm == pytest.approx(5.0) and p.tolist() == pytest.approx(expected, abs=1e-5) and p.grad is None


def test_due_is_true_every_n_steps_and_after_the_last():
    assert [s for s in range(1, 8) if Run.due(3, s, 7)] == [3, 6, 7]
    assert not any(Run.due(0, s, 7) for s in range(1, 8))


def test_run_json_records_options_versions_and_commit(tmp_path):
    run = Run(Small(str(tmp_path)), "sft")
    run.begin(0)
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["options"] == dataclasses.asdict(Small(str(tmp_path))) and found["finished"] is False
    assert found["torch"] == torch.__version__ and found["numpy"] == np.__version__ and "commit" in found
    run.done()
    assert json.loads((tmp_path / "run.json").read_text())["finished"] is True
    assert Run(Small(str(tmp_path), resume=True), "sft").finished
    assert run_module.git_commit() == found["commit"] or found["commit"] == ""
