"""Tests of options.py, files.py, training.py (seeds, learning rates, the optimizer) and run.py (run folder, checkpoints)."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_origin

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

import nanorlhf.__main__
import nanorlhf.bench
import nanorlhf.evaluate
import nanorlhf.generate
from conftest import SCRIPTS, TRAINERS, entry_of
from nanorlhf import run as run_module
from nanorlhf.errors import UserError
from nanorlhf.files import atomic_write, fingerprint, read_json, read_jsonl, require_file, require_folder, write_json, write_records
from nanorlhf.formats import checkpoints
from nanorlhf.model import ModelConfig, RewardModel, Transformer, pick_device
from nanorlhf.options import RANGES, check_options, main, metavar_of, named_files, parse_options
from nanorlhf.run import Run
from nanorlhf.tokenizer import load_tokenizer
from nanorlhf.training import learning_rate, make_optimizer, optimizer_step, seed_for


PROGRAMS = {"train_sft", "train_rm", "train_ppo", "train_dpo", "train_rrhf", "sample_bon", "evaluate", "pipeline"}


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


@dataclass
class Trainer(Options):
    micro_batch_size: int = 0  # rows in memory


@pytest.mark.parametrize(
    "error, says",
    [
        (UserError("no such thing"), "error: no such thing"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), "lower --micro_batch_size"),
        (OSError(28, "No space left on device"), "make room first; nothing of this run was saved: give the same command again"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "lower --micro_batch_size"),
        (KeyboardInterrupt(), "interrupted; nothing of this run was saved: give the same command again"),
    ],
)
def test_main_turns_errors_that_a_user_can_fix_into_one_line(error, says, monkeypatch):
    def train(config):
        raise error

    monkeypatch.setattr(sys, "argv", ["train_x.py"])
    with pytest.raises(SystemExit) as stop:
        main(Trainer, train, "")
    assert says in stop.value.code and "\n" not in stop.value.code


@pytest.mark.parametrize("module, argv, says", [
    ("nanorlhf.evaluate", ["out/x"], "lower --bon or --num_samples"), ("nanorlhf.generate", ["out/x", "--prompt", "a"], "lower --num_samples")])
def test_the_other_programs_name_an_option_that_they_have_when_memory_runs_out(module, argv, says, monkeypatch, tmp_path):
    def full(*args):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", *argv])
    monkeypatch.setattr(nanorlhf.evaluate, "evaluate_policies", full)
    monkeypatch.setattr(Transformer, "from_pretrained", full)
    with pytest.raises(SystemExit) as stop:
        sys.modules[module].main()
    assert says in stop.value.code and "\n" not in stop.value.code


@pytest.mark.parametrize("bug", [ZeroDivisionError, RuntimeError])
def test_main_does_not_hide_our_own_bugs(bug, monkeypatch):
    def train(config):
        raise bug("shapes differ")

    monkeypatch.setattr(sys, "argv", ["train_x.py"])
    with pytest.raises(bug):
        main(Options, train, "")


# ---- Numbers --------------------------------------------------------------------------------------------------------

CONFIGS = {name: module.Config for name, module in SCRIPTS.items()} | {
    "evaluate": nanorlhf.evaluate.Options, "pipeline": nanorlhf.__main__.Options}
NUMBERS = [(name, f) for name, Config in CONFIGS.items() for f in dataclasses.fields(Config) if f.type in (int, float)]


def refused(config):
    with pytest.raises(UserError) as error:
        check_options(config)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_number_has_a_range(name):
    """A new option of these programs gets its range in options.RANGES, or in `ranges` of its own Config."""
    listed = {option for options in RANGES.values() for option in options.split()} | set(getattr(CONFIGS[name], "ranges", {}))
    assert {f.name for n, f in NUMBERS if n == name and name in PROGRAMS} <= listed


def test_a_range_belongs_to_one_interval_only():
    options = [option for options in RANGES.values() for option in options.split()]
    assert len(options) == len(set(options)) and set(options) >= {f.name for n, f in NUMBERS if n in PROGRAMS if n != "evaluate"}


@pytest.mark.parametrize("name, field", NUMBERS, ids=lambda x: getattr(x, "name", x))
def test_a_number_that_means_nothing_gives_a_one_line_error_that_names_the_option(name, field):
    check_options(CONFIGS[name]())                                                     # all defaults are allowed
    bad = [math.nan, math.inf, -math.inf] if field.type is float else [10**400, 1.5]
    bad += ["3", None] + ([-1] if field.name not in ("missing_eos_penalty", "label_temperature") else [])
    for value in bad:
        assert f"--{field.name} {value}: must be " in refused(CONFIGS[name](**{field.name: value}))


@pytest.mark.parametrize("name, option, value", [
    ("train_ppo", "gamma", 1.5), ("train_ppo", "lam", 1.01), ("train_ppo", "cliprange", 0.0), ("train_ppo", "num_ppo_epochs", 0),
    ("train_ppo", "adam_eps", 0.0), ("train_ppo", "response_length", 0), ("train_ppo", "temperature", 1e-9),
    ("train_ppo", "temperature", 1e9), ("train_ppo", "seed", 2**64), ("train_dpo", "alpha", 2.0), ("train_dpo", "beta", 0.0),
    ("train_dpo", "label_smoothing", 0.5), ("train_dpo", "eval_fraction", 1.0), ("train_dpo", "epochs", 0.0),
    ("train_sft", "width", 0), ("train_sft", "width", 10**7), ("train_sft", "layers", 0), ("train_sft", "heads", 0),
    ("train_sft", "context", 0), ("train_sft", "batch_size", 0), ("train_rrhf", "num_samples", 0), ("sample_bon", "top_p", 0.0),
    ("sample_bon", "top_p", 2.0), ("sample_bon", "n", 0), ("evaluate", "num_samples", 1), ("evaluate", "num_prompts", 0),
    ("evaluate", "diversity_prompts", 0), ("pipeline", "seeds", 0), ("pipeline", "scale", 0.0)])
def test_a_number_out_of_its_range_gives_a_one_line_error(name, option, value):
    assert refused(CONFIGS[name](**{option: value})).startswith(f"--{option} {value}: must be ")


@pytest.mark.parametrize("name, option, value", [
    ("train_ppo", "gamma", 0.0), ("train_ppo", "gamma", 1), ("train_ppo", "lr", 0.0), ("train_ppo", "missing_eos_penalty", -1.0),
    ("train_dpo", "temperature", 0.0), ("train_dpo", "eval_fraction", 0.0), ("sample_bon", "label_temperature", -1.0),
    ("train_rrhf", "num_samples", 1), ("sample_bon", "top_p", 1.0), ("train_sft", "limit", 10**9), ("evaluate", "bon", 0)])
def test_the_ends_of_a_range_are_allowed(name, option, value):
    check_options(CONFIGS[name](**{option: value}))


@dataclass
class Fork:
    margin: float = 0.5
    shift: float = -1.0
    pairs: int = 4

    ranges = {"pairs": "[2, 8]"}


def test_an_option_of_a_fork_that_has_no_range_is_finite_and_not_negative_unless_its_default_is():
    check_options(Fork(margin=1e30, shift=7.0, pairs=8))
    check_options(Fork(shift=-9.0))
    for option, value in (("margin", -0.1), ("margin", math.nan), ("shift", math.inf), ("pairs", 9)):
        assert f"--{option} {value}" in refused(Fork(**{option: value}))


@pytest.mark.parametrize("module, argv, says", [
    ("nanorlhf.evaluate", ["out/x", "--num_samples", "1"], "--num_samples 1"), ("nanorlhf.__main__", ["--scale", "nan"], "--scale nan"),
    ("nanorlhf.__main__", ["--seeds", "0"], "--seeds 0"), ("nanorlhf.generate", ["out/x"], "--prompt"),
    ("nanorlhf.bench", ["speed"], "speed"), ("nanorlhf.evaluate", ["--num_prompts", "4", "out/x"], "out/x"),
    ("nanorlhf.__main__", ["--seeds", "9" * 30], "--seeds 999"),
    *(("nanorlhf.generate", ["out/x", "--prompt", "a", *words], " ".join(words) + ": must be ") for words in (
        ("--temperature", "nan"), ("--top_p", "0.0"), ("--max_new_tokens", "0"), ("--num_samples", "100001"), ("--seed", "-1")))])
def test_the_other_programs_check_their_numbers_too(module, argv, says, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", *argv])
    with pytest.raises(SystemExit) as stop:
        sys.modules[module].main()
    assert says in stop.value.code and stop.value.code.startswith("error: ") and "\n" not in stop.value.code


# ---- Files named by options -----------------------------------------------------------------------------------------


def test_named_files_splits_at_commas_and_equals_signs_that_are_not_part_of_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("run=1", "a,b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_text("")
    (tmp_path / "k=v.jsonl").write_text("")
    for text, found in {
        "": {}, "test=a.jsonl,b/c.jsonl": {"test": "a.jsonl", "c": "b/c.jsonl"}, "k=v.jsonl": {"k=v": "k=v.jsonl"},
        "run=1/x.jsonl": {"x": "run=1/x.jsonl"}, "mine=run=1/x.jsonl": {"mine": "run=1/x.jsonl"}, "k=w.jsonl": {"k": "w.jsonl"},
        "a,b/x.jsonl": {"x": "a,b/x.jsonl"}, "one=a,b/x.jsonl,two=run=1/x.jsonl": {"one": "a,b/x.jsonl", "two": "run=1/x.jsonl"},
        str(tmp_path / "run=1" / "x.jsonl"): {"x": str(tmp_path / "run=1" / "x.jsonl")}}.items():
        assert named_files(text) == found, text
    with pytest.raises(UserError, match="both be called x: name them"):
        named_files("run=1/x.jsonl,a,b/x.jsonl")


def test_an_error_about_ones_own_path_shows_similar_names_and_no_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("{}")
    for need, says in ((require_file, "pair.jsonl: no such file"), (require_folder, "pair.jsonl holds no checkpoint")):
        with pytest.raises(UserError, match=says) as error:
            need("./pair.jsonl", "python make.py", "out/pairs.jsonl")
        assert "did you mean pairs.jsonl?" in str(error.value) and "make.py" not in str(error.value)
        with pytest.raises(UserError, match="first run: python make.py"):
            need("out/pairs.jsonl", "python make.py", "out/pairs.jsonl")
        with pytest.raises(UserError) as error:
            need("./nowhere/at/all", "python make.py", "out/pairs.jsonl")
        assert "make.py" not in str(error.value) and "did you mean" not in str(error.value)


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
    assert leftovers(tmp_path) == before and not list(tmp_path.glob(".*"))            # the temporary path is gone
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
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
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
    small = make_optimizer(model.parameters(), "adafactor", 0.1)
    some_updates(model, small, 0, 1)
    assert sum(v.numel() for entry in small.state.values() for v in entry.values() if v.dim()) == 3 + 2 + 2 + 2 + 2
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


@pytest.mark.parametrize("name", ["adamw", "adam", "rmsprop", "adafactor"])
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


def begun(folder):
    """Returns (run, model, optimizer) of a new run in this folder, after one update."""
    model = torch.nn.Linear(3, 2)
    optimizer = make_optimizer(model.parameters(), "adamw", 0.01)
    run = Run(Small(str(folder)), "sft")
    run.begin(0)
    some_updates(model, optimizer, 0, 1)
    return run, model, optimizer


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_corrupt_checkpoint_is_named_and_the_previous_one_resumes(file, damage, tmp_path):
    """safetensors would load a flipped bit silently, so every file has a checksum. In state.json the flip is in kl_coef."""
    run, model, optimizer = begun(tmp_path)
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


@pytest.mark.parametrize("name", ["model", "optimizer"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_checkpoint_with_nan_or_infinity_is_never_written(name, value, tmp_path):
    run, model, optimizer = begun(tmp_path)
    run.save_checkpoint(3, {"model": model}, {"optimizer": optimizer})
    with torch.no_grad():
        (model.weight if name == "model" else optimizer.state[model.weight]["exp_avg_sq"])[1, 2] = value
    with pytest.raises(UserError, match=f"step 4, {name}: (weight|0.exp_avg_sq) holds NaN or infinity"):
        run.save_checkpoint(4, {"model": model}, {"optimizer": optimizer})
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-0000003"]


@pytest.mark.parametrize("Model", [Transformer, RewardModel])
@pytest.mark.parametrize("value, says", [(math.nan, "step 7: .*mlp.down.weight holds NaN"), (1e38, "step 7: the model's output")])
def test_a_model_that_computes_nan_is_never_saved_as_finished(Model, value, says, tmp_path, capsys):
    model = Model(ModelConfig(vocab_size=704, context=8, width=16, layers=1, heads=2, kv_heads=2, head_dim=8, ffn=32))
    run = Run(Small(str(tmp_path)), "sft")
    run.begin(0)
    run.log(7, 7, {"loss": 1.0})
    with torch.no_grad():
        getattr(model, "trunk", model).blocks[0].mlp.down.weight.fill_(value)
    with pytest.raises(UserError, match=says):
        run.finish(model, load_tokenizer("reviews"))
    assert json.loads((tmp_path / "run.json").read_text())["finished"] is False and "done" not in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.txt", "metrics.jsonl", "run.json"]


FULL = {"fsync": OSError(28, "No space left on device"),
        "save_file": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")}


@pytest.mark.parametrize("call", FULL)
def test_a_full_disk_is_one_line_and_the_run_resumes_when_there_is_room(call, tmp_path, monkeypatch):
    """safetensors has an error of its own for a full disk."""
    def training(config):
        model = torch.nn.Linear(3, 2)
        optimizer = make_optimizer(model.parameters(), "adamw", 0.01)
        run = Run(config, "sft")
        state = run.load_checkpoint({"model": model}, {"optimizer": optimizer})
        run.begin(state["step"])
        for step in range(state["step"] + 1, 4):
            some_updates(model, optimizer, step, step + 1)
            if step == 3 and not config.resume:
                def fail(*args):
                    raise FULL[call]
                monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (checkpoints, "save_file")), fail)
            run.save_checkpoint(step, {"model": model}, {"optimizer": optimizer})

    out = tmp_path / "a b"
    monkeypatch.setattr(sys, "argv", ["train_x.py", "--out", str(out)])
    with monkeypatch.context() as monkeypatch, pytest.raises(SystemExit) as stop:
        main(Small, training, "")
    assert "No space left on device" in stop.value.code and "\n" not in stop.value.code
    assert stop.value.code.endswith(f"; make room first; continue after step 2 with: python train_x.py --out '{out}' --resume")
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-0000001", "step-0000002"]
    training(Small(str(out), resume=True))
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-0000002", "step-0000003"]


# ---- Run folder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [dict(overwrite=True), dict(resume=True)], ids=["overwrite", "resume"])
def test_a_folder_that_another_process_writes_is_refused(how, tmp_path):
    out = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.path[:0] = ['tests', '.']\nfrom test_run import Small, Run\n"
         f"run = Run(Small({str(out)!r}), 'sft'); run.begin(0); print('begun', flush=True); input()"],
        cwd=Path(__file__).parents[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "begun\n"
    before = (out / "run.json").read_bytes()
    with pytest.raises(UserError, match="another process is writing .*out: wait for it"):
        Run(Small(str(out), **how), "sft").begin(0)
    assert (out / "run.json").read_bytes() == before
    child.communicate("\n")
    run = Run(Small(str(out), **how), "sft")                                            # it has ended: its lock is gone with it
    run.begin(0)
    run.done()
    assert sorted(p.name for p in out.iterdir()) == [*(["log.txt"] if "resume" in how else []), "run.json"]


def test_a_run_that_ended_while_another_one_loaded_its_inputs_is_kept(tmp_path):
    slow, fast = (Run(Small(str(tmp_path / "out"), batch_size=size), "sft") for size in (1, 2))
    fast.begin(0)
    fast.done()
    with pytest.raises(UserError, match="already holds files"):
        slow.begin(0)
    assert read_json(tmp_path / "out" / "run.json")["options"]["batch_size"] == 2


def test_interrupted_says_what_was_saved_and_the_short_command(tmp_path, monkeypatch):
    def training(config):
        run = Run(config, "sft")
        run.begin(0)
        if config.batch_size == 8:
            run.save_checkpoint(5, {"model": torch.nn.Linear(3, 2)}, {})
        raise KeyboardInterrupt

    for batch_size, says in ((4, "no checkpoint was saved yet; to start from the beginning: "), (8, "continue after step 5 with: ")):
        out = str(tmp_path / str(batch_size))
        command = f"python dir/train_x.py --out {out} --resume"
        monkeypatch.setattr(sys, "argv", ["dir/train_x.py", "--out", out, "--batch_size", str(batch_size)])
        with pytest.raises(SystemExit) as stop:
            main(Small, training, "")
        assert stop.value.code == f"interrupted; {says}{command}"
        resumed = parse_options(Small, "", command.split()[2:])                        # the command is complete
        assert resumed == Small(out, batch_size=batch_size, resume=True)


@dataclass
class Inputs(Small):
    init: str = "out/base"
    reward: str = "gold"
    eval_data: str = ""
    data: str = "reviews"
    max_length: int = 0


def checkpoint_folder(folder, weights=b"0"):
    folder.mkdir()
    for name, content in {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": weights, "samples.jsonl": b"",
                          "run.json": b"{}"}.items():
        (folder / name).write_bytes(content)
    return folder


CHANGES = {  # {a changed file: the option whose content it is}
    "init/config.json": "init", "init/tokenizer.json": "init", "init/model.safetensors": "init", "reward.py": "reward",
    "beside.py": "reward", "kit/words.py": "reward", "kit/__init__.py": "reward", "other.py": None,
    "rows.jsonl": "eval_data", "more.jsonl": "eval_data", "data.jsonl": "data", "init/run.json": None, "init/samples.jsonl": None,
    "init/metrics.jsonl": None}


@pytest.mark.parametrize("file", CHANGES)
def test_resume_notices_that_the_content_of_an_input_has_changed(file, tmp_path):
    checkpoint_folder(tmp_path / "init")
    for name in ("reward.py", "rows.jsonl", "more.jsonl", "data.jsonl"):
        (tmp_path / name).write_text("1")
    (tmp_path / "kit").mkdir()
    for name, code in {"reward.py": "import os, beside", "beside.py": "from kit import words", "kit/words.py": "from . import words",
                       "kit/__init__.py": "", "other.py": ""}.items():
        (tmp_path / name).write_text(code)
    config = Inputs(str(tmp_path / "out"), init=str(tmp_path / "init"), reward=f"{tmp_path}/reward.py:f", data=str(tmp_path / "data.jsonl"),
                    eval_data=f"a={tmp_path}/rows.jsonl,{tmp_path}/more.jsonl")
    Run(config, "rm").begin(0)
    config = dataclasses.replace(config, resume=True)
    Run(config, "rm")
    run = json.loads((tmp_path / "out/run.json").read_text())
    if CHANGES[file] and file.count("/") == 0:
        (tmp_path / file).rename(tmp_path / "elsewhere")
        with pytest.raises(UserError, match=f"^--{CHANGES[file]} .* (is gone|has changed) since the run in .*out began"):
            Run(config, "rm")
    (tmp_path / file).write_text("2")
    if CHANGES[file]:
        with pytest.raises(UserError, match=f"^--{CHANGES[file]} .* has changed since the run in .*out began; start again"):
            Run(config, "rm")
    else:
        Run(config, "rm")
    # The run.json of an older version has no hashes except --data's.
    write_json(tmp_path / "out/run.json", {k: v for k, v in run.items() if k not in ("inputs", "data_sha256")})
    Run(config, "rm")
    write_json(tmp_path / "out/run.json", run | {"finished": True})
    assert Run(config, "rm").finished                                                  # nothing is left to do with the inputs


@pytest.mark.parametrize("name", sorted(PROGRAMS & set(SCRIPTS)))
def test_every_option_that_names_an_input_is_compared_on_resume(name):
    words = {f.name for f in dataclasses.fields(SCRIPTS[name].Config) if f.type is str}
    assert words <= {*run_module.INPUTS, "data", "out", "device", "split", "family", "cut_at", "columns"}


def test_the_fingerprint_of_large_weights_sees_another_training_without_reading_all(tmp_path):
    size = 5 * 2**20
    content = bytearray(os.urandom(size))
    folder = checkpoint_folder(tmp_path / "a", content)
    seen = {fingerprint(folder)}
    for place in (0, 2**20 - 1, size - 2**20, size - 1):                               # in the first and the last MiB
        content[place] ^= 1
        (folder / "model.safetensors").write_bytes(content)
        seen.add(fingerprint(folder))
    (folder / "model.safetensors").write_bytes(content[:2**20] + content[-2**20 - 1:])
    seen.add(fingerprint(folder))
    assert len(seen) == 6 and None not in seen
    assert fingerprint(tmp_path / "nothing") is None and fingerprint(tmp_path) is None


def test_a_finished_run_refuses_more_steps_and_says_what_to_do(tmp_path):
    @dataclass
    class Steps(Small):
        max_steps: int = 3
    run = Run(Steps(str(tmp_path / "x")), "sft")
    run.begin(0)
    run.done()
    with pytest.raises(UserError, match=f"--max_steps 9: .*started with 3; .*--init {tmp_path}/x --out NEW"):
        Run(Steps(str(tmp_path / "x"), max_steps=9, resume=True), "sft")
    with pytest.raises(UserError, match="--batch_size 9: .*--resume cannot change it$"):
        Run(Steps(str(tmp_path / "x"), batch_size=9, resume=True), "sft")
    assert Run(Steps(str(tmp_path / "x"), resume=True, device="auto"), "sft").finished


def test_time_and_tokens_are_sums_over_the_parts_of_a_run(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(run_module.time, "monotonic", lambda: clock[0])
    for resume, steps in ((False, (1, 2, 3)), (True, (3, 4))):                         # killed after step 3; 2 was saved
        run = Run(Small(str(tmp_path), resume=resume), "sft")
        clock[0] += 50                                                                 # loading is not training
        run.begin(steps[0] - 1)
        for step in steps:
            clock[0] += 2
            run.log(step, 4, {"loss": 1.0}, tokens=10 * step)
        clock[0] += 1000
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["time"], r["tokens"]) for r in rows] == [(1, 2.0, 10), (2, 4.0, 30), (3, 6.0, 60), (4, 8.0, 100)]
    assert [r["tokens_per_second"] for r in rows] == [5.0, 7.5, 10.0, 12.5]


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
        (dict(batch_size=0), "--batch_size 0: must be an integer in [1, 1e9]"),
        (dict(device="abacus"), "--device abacus"),
        (dict(device="meta"), "--device meta"),
        *([] if torch.backends.mps.is_available() else [(dict(device="mps"), "--device mps: torch cannot use it here")]),
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
        optimizer_step({optimizer: 0.1}, clip, 17, [5, 3, 8], [{"loss": torch.tensor(loss)}])
    assert "step 17" in str(error.value) and "[5, 3, 8]" in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters())) and not optimizer.state


def test_optimizer_step_clips_the_norm_and_returns_the_one_before_clipping(tmp_path):
    for clip, expected in ((1.0, [-0.6, -0.8]), (0.0, [-3.0, -4.0]), (10.0, [-3.0, -4.0])):
        p = torch.nn.Parameter(torch.zeros(2))
        p.grad = torch.tensor([3.0, 4.0])
        q = torch.nn.Parameter(torch.ones(1))
        q.grad = torch.tensor([7.0])
        parts = [{"loss": torch.tensor(1.5), "n": torch.tensor(3)}, {"loss": torch.tensor(2.0)}]
        norms, sums = optimizer_step({torch.optim.SGD([p], 0.5): 1.0, torch.optim.SGD([q], 0.5): 1.0}, clip, 1, [0], parts)
        assert norms == pytest.approx([5.0, 7.0]) and sums == {"loss": 3.5, "n": 3.0} and p.tolist() == pytest.approx(expected, abs=1e-5) and p.grad is None


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


def test_deterministic_asks_torch_for_kernels_that_repeat_their_bits(tmp_path):
    @dataclass
    class Repeating(Small):
        deterministic: bool = True
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    try:
        Run(Repeating(str(tmp_path / "x")), "sft")
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"]
    finally:
        torch.use_deterministic_algorithms(False)
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    Run(Small(str(tmp_path / "y")), "sft")
    assert not torch.are_deterministic_algorithms_enabled()


# ---- What a terminal shows ------------------------------------------------------------------------------------------


def screen(written):
    """Returns the lines that a terminal shows after this text, and the cursor's column; no line may be wider than the terminal."""
    lines, column = [""], 0
    for part in re.findall(r"\r|\n|\033\[\d+m|[^\r\n\033]+|\033", written):
        assert part != "\033", "an escape code that is no colour"
        if part == "\r":
            column = 0
        elif part == "\n":
            lines.append("")
            column = 0
        elif not part.startswith("\033"):
            lines[-1] = lines[-1][:column].ljust(column) + part + lines[-1][column + len(part):]
            column += len(part)
    return [line.rstrip() for line in lines], column


@pytest.fixture
def terminal(monkeypatch):
    """Returns the function that makes stdout and stderr a terminal of 60 columns, which pytest would undo before the test; it
    returns the function that returns what was written since its last call."""
    pty = pytest.importorskip("pty", reason="needs POSIX terminals")
    ours, theirs = pty.openpty()
    stream = open(theirs, "w", encoding="utf-8")

    def written():
        os.write(theirs, b"\0")                   # so that reading has an end
        found = b""
        while not found.endswith(b"\0"):
            found += os.read(ours, 4096)
        return found[:-1].decode().replace("\r\n", "\n")

    def begin(**variables):
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, stream)
        for name, value in (dict(COLUMNS="60", TERM="xterm", NO_COLOR="") | variables).items():
            monkeypatch.setenv(name, value)
        return written
    yield begin
    stream.close()
    os.close(ours)


def test_a_terminal_shows_progress_in_one_line_and_the_log_has_full_ones(terminal, tmp_path):
    written, run = terminal(), Run(Small(str(tmp_path)), "ppo")
    run.begin(0)
    row = {"objective/scores": 0.125, "objective/kl": 2.0, "objective/length": 48.0, "lr": 1e-3}
    run.log(1, 4, row, tokens=1000)
    shown = written()
    assert shown.count("\033[36mppo 1/4\033[0m") == 1 and "\n" not in shown
    [line], column = screen(shown)
    assert line.startswith("ppo 1/4  0:00 left  reward 0.125  kl 2  length 48  ") and len(line) <= 59 and column == 0
    run.log(2, 4, row | {"eval/reward": 0.5, "eval/reward_se": 0.1}, tokens=1000)
    print("a warning", file=sys.stderr)                                                # whose end the line must not show
    run.log(3, 4, row, tokens=1000)
    print("from a reward")
    run.log(4, 4, row, tokens=1000)
    run.done()
    lines, column = screen(shown + written())
    assert lines[:3] == ["ppo 2/4  eval/reward 0.5", "a warning", "from a reward"] and lines[3].startswith("ppo 4/4  0:00 left  reward")
    assert lines[4:] == [f"ppo done: {tmp_path}", ""] and column == 0
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert re.fullmatch(r"ppo 1/4  objective/scores 0.125  objective/kl 2  objective/length 48  lr 0.001  [\d,]+ tokens/s  0:00 left", log[0])
    assert log[1] == "ppo 2/4  eval/reward 0.5" and log[2].startswith("ppo 4/4  objective/scores") and len(log) == 3


@pytest.mark.parametrize("variables", [dict(NO_COLOR="1"), dict(TERM="dumb"), dict(TERM=""), dict(COLUMNS="20"), dict(COLUMNS="7")])
def test_the_line_has_no_colour_where_none_is_wanted_and_fits_a_narrow_terminal(terminal, tmp_path, variables):
    written, run = terminal(**variables), Run(Small(str(tmp_path)), "sft")
    run.begin(0)
    for step in (1, 2, 3):
        run.log(step, 3, {"loss": 1 / step}, tokens=1000)
    shown, width = written(), int(os.environ["COLUMNS"])
    assert ("\033" in shown) == ("COLUMNS" in variables)
    assert {len(part) for part in re.split(r"[\r\n]+", re.sub(r"\033\[\d+m", "", shown))} == {0, width - 1}
    line, rest = screen(shown)[0]
    assert rest == "" and line.startswith("sft 3/3  0:00 left  loss 0.3333  "[:width - 1].rstrip())


def test_a_pipe_gets_full_lines_and_the_log_of_a_resumed_run_goes_on(tmp_path, capsys):
    for resume, steps in ((False, (1, 2, 3)), (True, (3, 4))):
        run = Run(Small(str(tmp_path), resume=resume), "sft")
        run.begin(steps[0] - 1)
        for step in steps:
            run.log(step, 4, {"loss": 1.0, "eval/loss": 0.5})
    assert capsys.readouterr() == (said := (tmp_path / "log.txt").read_text(), "")
    assert said.splitlines() == [
        "sft 1/4  loss 1  0:00 left", *(f"sft {step}/4  eval/loss 0.5" for step in (1, 2, 3)),
        f"sft resumes {tmp_path} after step 2", "sft 3/4  loss 1  0:00 left", "sft 3/4  eval/loss 0.5", "sft 4/4  loss 1  0:00 left",
        "sft 4/4  eval/loss 0.5"]


def test_a_log_that_cannot_be_written_stops_the_run_as_metrics_do(tmp_path):
    run = Run(Small(str(tmp_path)), "sft")
    run.begin(0)
    (tmp_path / "log.txt").mkdir()
    with pytest.raises(OSError, match="log.txt"):
        run.log(1, 2, {"loss": 1.0})
    (tmp_path / "log.txt").rmdir()
    again = Run(Small(str(tmp_path), resume=True), "sft")
    again.begin(0)
    again.log(1, 2, {"loss": 1.0})
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1]


# ---- TensorBoard ----------------------------------------------------------------------------------------------------


@dataclass
class Watched(Small):
    tensorboard: bool = True


def events_of(folder):
    """Returns {name: [(step, value)]} as TensorBoard reads it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0}).Reload()
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_tensorboard_has_the_rows_of_metrics_jsonl_also_of_a_killed_and_resumed_run(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra `tensorboard`")
    for resume, steps in ((False, (1, 2, 3)), (True, (3, 4))):                         # killed after step 3; 2 was saved
        run = Run(Watched(str(tmp_path), resume=resume), "sft")
        run.begin(steps[0] - 1)
        for step in steps:
            run.log(step, 4, {"loss": 0.1 * step + resume, "objective/kl": 2.0} | ({"eval/gold": -0.3} if step % 2 else {}), tokens=10)
        time.sleep(1)                             # TensorBoard orders its files by the second of their beginning
    run.done()
    rows, found = read_jsonl(tmp_path / "metrics.jsonl"), {}
    for row in rows:
        for name in row.keys() - {"step"}:
            found.setdefault(name, []).append((row["step"], float(np.float32(row[name]))))
    assert events_of(tmp_path) == found and [r["step"] for r in rows] == [1, 2, 3, 4] and rows[2]["loss"] == 0.1 * 3 + 1


def test_tensorboard_may_be_added_on_resume_and_overwrite_removes_it(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra `tensorboard`")
    Run(Watched(str(tmp_path), tensorboard=False), "sft").begin(0)
    run = Run(Watched(str(tmp_path), resume=True), "sft")
    run.begin(0)
    run.log(1, 2, {"loss": 1.0})
    assert events_of(tmp_path)["loss"] == [(1, 1.0)]
    Run(Watched(str(tmp_path), tensorboard=False, overwrite=True), "sft").begin(0)
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_a_full_disk_under_tensorboard_is_an_error_of_the_run_and_no_traceback_of_a_thread(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard", reason="needs the extra `tensorboard`")
    from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)             # pytest has one of its own
    run = Run(Watched(str(tmp_path)), "sft")
    run.begin(0)
    run.log(1, 50, {"loss": 1.0})
    monkeypatch.setattr(LocalFileSystem, "append", full)
    with pytest.raises(OSError, match="No space left"):
        for step in range(2, 50):
            run.log(step, 50, {"loss": 1.0})
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_without_the_package_says_so_before_it_reads_anything(name, tmp_path, monkeypatch):
    for module in [m for m in sys.modules if m.split(".")[0] == "tensorboard" or m.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "tensorboard", None)                              # as if it were not installed
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--tensorboard", "--init", "nowhere", "--out", str(tmp_path / "x")])
    with pytest.raises(SystemExit) as stop:
        main(SCRIPTS[name].Config, entry_of(SCRIPTS[name]), "")
    assert stop.value.code == "error: --tensorboard needs the extra `tensorboard` (pip install -e '.[tensorboard]')"
    assert not (tmp_path / "x").exists()


def test_a_run_that_ended_before_its_first_step_does_not_stand_in_the_way(tmp_path):
    """Its folder holds options alone: after a mistake in a reward function, say, the same command goes through."""
    out = tmp_path / "x"
    run = Run(Small(str(out)), "sft")
    run.begin(0)
    run.say("a first line")
    run.asked_to_stop.restore()
    del run
    again = Run(Small(str(out)), "sft")
    again.begin(0)
    assert "a first line" not in ((out / "log.txt").read_text() if (out / "log.txt").exists() else "")
    again.log(1, 2, {"loss": 1.0})
    again.asked_to_stop.restore()
    del again
    with pytest.raises(UserError, match="already holds files"):                        # a step has been logged
        Run(Small(str(out)), "sft")


def test_a_misspelt_option_and_a_word_out_of_place_are_named(monkeypatch):
    @dataclass
    class Many(Small):
        response_length: int = 3
    with pytest.raises(SystemExit, match=r"--reponse_lenght 3; did you mean --response_length\? \(--help lists"):
        parse_options(Many, argv=["--out", "x", "--reponse_lenght", "3"])
    with pytest.raises(SystemExit, match=r"unrecognized arguments: --limit 3 \(--help lists"):
        parse_options(Many, argv=["--out", "x", "--limit", "3"])
    with pytest.raises(SystemExit, match=r"unrecognized arguments: a; want python -m x RUN \[RUN ...\] \[options\] \("):
        parse_options(Many, argv=["--out", "x", "a"], prog="python -m x RUN [RUN ...]")
