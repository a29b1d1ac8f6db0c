"""Tests of the scripts, run as a user runs them, on a tiny model: what they write, what they reject, how they resume.

A numbered "trap" is a known bug of public RLHF code; each test says which bug it excludes.
"""

import hashlib
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import sample_bon
import train_dpo
import train_ppo
import train_rm
import train_rrhf
import train_sft
from conftest import ROOT, SCRIPTS, TRAINERS, entry_of, known_options, loss_of
from nanorlhf.files import read_jsonl
from nanorlhf.model import RewardModel, Transformer
from nanorlhf.options import main, parse_options
from nanorlhf.run import Run
from nanorlhf.tokenizer import load_tokenizer

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
SHORT = "--response_length 8 --num_eval_prompts 4"
PIPELINE = (  # other options keep their defaults, so each script finds what earlier ones made
    "train_sft --init scratch --kind text --out out/base --width 16 --layers 1 --heads 2 --context 96 --limit 60 --max_steps 3 "
    "--batch_size 4",
    "train_sft --limit 40 --max_steps 3 --batch_size 8",
    "sample_bon --split train --n 2 --reward gold --label_temperature 0.2 --out out/comparisons --limit 60 --response_length 8 "
    "--keep_unfinished",
    "train_rm --max_steps 3 --batch_size 8 --eval_fraction 0.2",
    f"train_ppo --max_steps 2 --batch_size 8 --limit 32 {SHORT}",
    f"train_dpo --max_steps=2 --batch_size=8 {SHORT}",
    f"train_rrhf --max_steps 2 --batch_size 4 --limit 8 {SHORT}",
    "sample_bon --n 4 --limit 6 --response_length 8 --keep_unfinished",
)


KNOWN = {command.split()[0] for command in PIPELINE}
FOUND = [f"{name} --max_steps 2 --batch_size 8 " + " ".join(f"--{k} {v}" for k, v in known_options(
    module, dict(response_length=8, num_eval_prompts=4)).items()) for name, module in TRAINERS.items() if name not in KNOWN]


def start(cwd, command, *more):
    script, *options = [*command.split(), *map(str, more)]
    return subprocess.Popen(
        [sys.executable, str(ROOT / f"{script}.py"), *options],
        cwd=cwd,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c if os.name == "posix" else None,
    )


def heed_ctrl_c():
    """A shell lets what it starts in the background ignore SIGINT, and so these tests, if it started them there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def done(process):
    out, err = process.communicate(timeout=300)
    return SimpleNamespace(code=process.returncode, out=out, err=err)


pytestmark = pytest.mark.usefixtures("one_thread")
TIMES = ("time", "tokens_per_second")                                                  # all that a resumed run may log otherwise


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Runs the whole pipeline in one folder, each script in its own process; returns the folder."""
    folder = tmp_path_factory.mktemp("pipeline")
    for command in PIPELINE[:4]:
        found = done(start(folder, command))
        assert found.code == 0, found.err
    for found in [done(p) for p in [start(folder, command) for command in [*PIPELINE[4:], *FOUND]]]:
        assert found.code == 0, found.err
        assert "done: out/" in found.out and "\r" not in found.out and "\033" not in found.out
    return folder


@pytest.fixture
def here(root, monkeypatch):
    """Makes the pipeline's folder the working directory; returns it."""
    monkeypatch.chdir(root)
    return root


SMALL = dict(init="out/sft", max_steps=4, batch_size=8, response_length=8, num_eval_prompts=3, eval_every=2)
OWN = {
    train_sft: dict(init="out/base", limit=40, eval_every=0),
    train_rm: dict(eval_fraction=0.2),
    train_ppo: dict(limit=32),
    train_rrhf: dict(batch_size=4, limit=8),
    sample_bon: dict(limit=6, n=4, keep_unfinished=True, batch_size=64),
}
COMMON = {module: known_options(module, SMALL) | OWN.get(module, {}) for module in SCRIPTS.values()}


def go(module, out, **options):
    """Runs the script with these options in this process; returns the rows of metrics.jsonl."""
    entry_of(module)(module.Config(**{**COMMON[module], "device": "cpu", "out": str(out), **options}))
    return read_jsonl(Path(out) / "metrics.jsonl")


def weights(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def snapshot(folder):
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(folder).rglob("*") if p.is_file()}


def like_ppo(module):
    """True for train_ppo.py and copies of it."""
    return hasattr(module.Config, "num_ppo_epochs")


# ---- What the scripts write -----------------------------------------------------------------------------------------


METRICS = {
    "base": {"loss", "lr", "grad_norm", "eval/loss"},
    "sft": {"loss", "lr", "grad_norm", "eval/loss"},
    "rm": {"loss", "accuracy", "lr", "grad_norm", "eval/held_out/loss", "eval/held_out/accuracy"},
    "ppo": {
        "objective/kl",
        "objective/scores",
        "objective/rlhf_reward",
        "objective/entropy",
        "objective/ended",
        "objective/length",
        "policy/approxkl",
        "policy/clipfrac",
        "val/ratio",
        "loss/policy",
        "loss/value",
        "eval/kl",
        "eval/reward",
        "eval/gold",
    },
    "dpo": {
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "eval/loss",
        "eval/accuracy",
        "eval/kl",
        "eval/gold",
    },
    "rrhf": {"loss", "loss/rank", "loss/ft", "scores/best", "scores/mean", "eval/reward", "eval/kl", "eval/gold"},
}


ON_COMPARISONS = [module for module in TRAINERS.values() if module.Config.data.endswith("comparisons.jsonl")]
FOLDERS = [*METRICS, *(Path(TRAINERS[command.split()[0]].Config.out).name for command in FOUND)]


@pytest.mark.parametrize("name", FOLDERS)
def test_every_run_folder_is_a_checkpoint_with_its_metrics_options_and_tokenizer(root, name):
    folder = root / "out" / name
    run = json.loads((folder / "run.json").read_text())
    assert run["finished"] and run["options"]["seed"] == 0 and run["torch"] == torch.__version__
    architecture = json.loads((folder / "config.json").read_text())["architectures"]
    load = Transformer if architecture == ["GPT2LMHeadModel"] else RewardModel
    model, tokenizer = load.from_pretrained(folder), load_tokenizer(folder)
    assert model.config.vocab_size == tokenizer.vocab_size == load_tokenizer("reviews").vocab_size
    assert model.config.eos_id == tokenizer.eos_id != tokenizer.pad_id  # trap 1
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, len(rows) + 1))
    copy_of_ppo = "num_ppo_epochs" in json.loads((folder / "run.json").read_text())["options"]
    assert METRICS.get(name, METRICS["ppo"] if copy_of_ppo else {"loss", "lr", "grad_norm"}) <= set().union(*rows)
    assert all(math.isfinite(v) for r in rows for v in r.values())
    assert not [p for p in folder.rglob("*") if p.suffix in (".pt", ".pth", ".bin", ".pkl") or ".writing" in p.name]


@pytest.mark.parametrize("name", ["ppo", "dpo", "rrhf"])
def test_samples_are_texts_with_their_step_and_reward(root, name):
    rows = read_jsonl(root / "out" / name / "samples.jsonl")
    assert rows and all(
        r["prompt"].startswith("Review of the") and isinstance(r["completion"], str) and "gold" in r for r in rows
    )
    assert {r["step"] for r in rows} == {2}


def test_checkpoints_load_in_transformers_and_give_the_same_numbers(root):
    transformers = pytest.importorskip("transformers", reason="needs transformers (the `parity` extra)")
    tokens = torch.tensor([[5, 9, 100, 33, 2]])
    with torch.no_grad():
        ours = Transformer.from_pretrained(root / "out/ppo")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(root / "out/ppo").eval()
        assert torch.allclose(ours.logits(ours(tokens)), theirs(tokens).logits, atol=1e-5)
        rm = RewardModel.from_pretrained(root / "out/rm")
        classifier = transformers.AutoModelForSequenceClassification.from_pretrained(root / "out/rm").eval()
        assert torch.allclose(rm(tokens)[:, -1], classifier(tokens).logits[:, 0], atol=1e-5)


def test_the_reward_model_has_mean_0_and_std_1_over_its_held_out_responses(here, tmp_path):
    from nanorlhf.data import load_records, make_examples, split_records
    from nanorlhf.rewards import load_reward

    tokenizer = load_tokenizer("out/rm")
    _, held_out = split_records(load_records("out/comparisons/comparisons.jsonl", "ranked"), 0.2, 0)
    rows = [e for r in held_out for e in make_examples(tokenizer, r["prompt"], r["responses"])]
    reward = load_reward("out/rm", tokenizer, torch.device("cpu"))
    scores = reward([e.tokens[: e.prompt_length] for e in rows], [e.tokens[e.prompt_length :] for e in rows])
    assert scores.mean().item() == pytest.approx(0, abs=1e-4) and scores.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    # Training that starts from this reward model computes the constants again, not on top of the old ones.
    go(train_rm, tmp_path / "again", init="out/rm", max_steps=1, lr=0.0)
    old, new = (RewardModel.from_pretrained(f) for f in ("out/rm", tmp_path / "again"))
    assert (new.reward_mean, new.reward_std) == pytest.approx((old.reward_mean, old.reward_std), abs=1e-5)
    go(train_rm, tmp_path / "none", max_steps=1, normalize="none")
    go(train_rm, tmp_path / "mean", max_steps=1, normalize="mean", normalize_data="out/comparisons/best.jsonl")
    none, mean = (RewardModel.from_pretrained(tmp_path / f) for f in ("none", "mean"))
    assert (none.reward_mean, none.reward_std, mean.reward_std) == (0.0, 1.0, 1.0) and mean.reward_mean != 0


# ---- DPO and PPO ----------------------------------------------------------------------------------------------------


def test_the_first_dpo_loss_is_ln_2_with_margin_0(root):
    """Trap 12: reference and policy go through the same function in the same precision."""
    first = read_jsonl(root / "out/dpo/metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    for name in ("rewards/margins", "rewards/chosen", "rewards/rejected"):
        assert first[name] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    "options, first",
    [
        (dict(loss="ipo", beta=0.2), 1 / (4 * 0.2**2)),
        (dict(label_smoothing=0.2), math.log(2)),
        (dict(loss="unlikelihood"), None),
        (dict(reference_free=True), None),
        (dict(optimizer="rmsprop", max_grad_norm=10.0), math.log(2)),
        (dict(dtype="bfloat16"), math.log(2)),
        (dict(reference="out/base"), None),
    ],
    ids=str,
)
def test_dpo_variants_start_at_their_closed_form(here, tmp_path, options, first):
    rows = go(train_dpo, tmp_path / "x", max_steps=2, eval_every=0, **options)
    assert first is None or rows[0]["loss"] == pytest.approx(first, rel=1e-4)
    if options.get("loss") == "unlikelihood":
        assert rows[0]["loss"] == pytest.approx(-rows[0]["logps/chosen"] + 0.5 * rows[0]["logps/rejected"], rel=1e-5)


def test_the_first_ppo_update_has_ratio_1_and_the_rollout_has_kl_0(here, tmp_path):
    """Traps 7 and 8. One minibatch is the whole whitened batch, so L_pi, approxkl and clipfrac are 0 as well."""
    for i, options in enumerate((dict(), dict(temperature=0.7, micro_batch_size=3), dict(temperature=1.5))):
        first = go(train_ppo, tmp_path / str(i), max_steps=1, num_ppo_epochs=1, num_mini_batches=1, eval_every=1, **options)[0]
        assert first["val/ratio"] == pytest.approx(1, abs=1e-5) and first["policy/approxkl"] == pytest.approx(0, abs=1e-9)
        assert first["objective/kl"] == pytest.approx(0, abs=1e-4) and first["policy/clipfrac"] == 0 == first["val/clipfrac"]
        assert first["loss/policy"] == pytest.approx(0, abs=1e-5)
        assert first["objective/length"] <= 8


REWARD = (
    "def length(prompts, completions):\n    return [len(c) / 10 for c in completions]\n"
    "def halves(prompts, completions):\n    return [float(len(c) % 2) for c in completions]\n"
    "def bad(prompts, completions):\n    return [float('nan') for c in completions]\n"
    "def broken(prompts, completions):\n    return 1 / 0\n"
)


@pytest.fixture
def reward_file(tmp_path):
    (tmp_path / "mine.py").write_text(REWARD)
    return f"{tmp_path / 'mine.py'}:"


@pytest.mark.parametrize(
    "options",
    [
        dict(kl_estimator="k2"),
        dict(kl_estimator="k3"),
        dict(whiten_rewards=True),
        dict(missing_eos="subtract", missing_eos_penalty=3.0),
        dict(missing_eos="none"),
        dict(reward="gold"),
        dict(micro_batch_size=3, num_mini_batches=3),
        dict(dtype="bfloat16"),
        dict(value_init="out/sft", reference="out/base"),
        dict(num_mini_batches=20, gamma=0.9, lam=1.0),
        dict(data="out/comparisons/best.jsonl"),
    ],
    ids=str,
)
def test_ppo_variants_run(here, tmp_path, options):
    rows = go(train_ppo, tmp_path / "x", max_steps=2, **options)
    assert len(rows) == 2 and rows[0]["val/ratio"] == pytest.approx(1, abs=0.1)
    if "reference" in options:
        assert rows[0]["objective/kl"] != 0


def test_ppo_scores_responses_without_eos_as_missing_eos_says(here, tmp_path, reward_file):
    """Trap 5: here no response of 2 tokens ends. Its score becomes -penalty, is lowered by the penalty, or stays."""
    scores = {}
    for word in ("none", "subtract", "replace"):
        row = go(
            train_ppo,
            tmp_path / word,
            max_steps=1,
            response_length=2,
            reward=reward_file + "length",
            missing_eos=word,
            missing_eos_penalty=2.5,
            eval_every=0,
        )[0]
        assert row["objective/ended"] == 0
        scores[word] = row["objective/scores"]
    assert scores["none"] > 0 and scores["replace"] == -2.5
    assert scores["subtract"] == pytest.approx(scores["none"] - 2.5, abs=1e-5)


def test_ppo_kl_target_adapts_beta_by_zieglers_formula(here, tmp_path, reward_file):
    rows = go(train_ppo, tmp_path / "x", reward=reward_file + "length", kl_target=6.0, kl_horizon=16.0, eval_every=0)
    assert rows[0]["objective/kl_coef"] == 0.05
    for a, b in zip(rows, rows[1:]):
        error = min(max(a["objective/kl"] / 6 - 1, -0.2), 0.2)
        assert b["objective/kl_coef"] == pytest.approx(a["objective/kl_coef"] * (1 + error * 8 / 16), rel=1e-5)


def test_ppo_learns_an_easy_reward(here, tmp_path, reward_file):
    """Checks all signs end to end: the mean of an easy reward (long texts) rises clearly within 25 steps."""
    rows = go(
        train_ppo,
        tmp_path / "x",
        reward=reward_file + "length",
        missing_eos="none",
        max_steps=25,
        batch_size=32,
        lr=1e-2,
        value_lr=1e-2,
        kl_coef=0.0,
        eval_every=0,
    )
    scores = [r["objective/scores"] for r in rows]
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 0.2
    assert rows[-1]["objective/kl"] > 0.1


def test_dpo_learns_its_preferences(here, tmp_path):
    rows = go(train_dpo, tmp_path / "x", max_steps=20, lr=1e-2, beta=0.5, eval_every=0)
    assert rows[-1]["rewards/margins"] > 0.5 and rows[-1]["rewards/accuracies"] > 0.8 and rows[-1]["loss"] < 0.5


# ---- Data and candidates --------------------------------------------------------------------------------------------


def test_sample_bon_writes_what_the_trainers_read(here, tmp_path, reward_file):
    go(
        sample_bon,
        tmp_path / "bon",
        reward=reward_file + "length",
        data="reviews",
        split="train",
        limit=16,
        label_temperature=0.0,
    )
    best, ranked, comparisons = (
        [json.loads(line) for line in open(tmp_path / "bon" / f"{n}.jsonl", encoding="utf-8")]
        for n in ("best", "ranked", "comparisons")
    )
    for b, r in zip(best, ranked):
        assert b["score"] == max(r["scores"]) and r["responses"][r["scores"].index(b["score"])] == b["completion"]
        assert r["scores"] == pytest.approx([len(t) / 10 for t in r["responses"]])
    assert len(best) == len(ranked) == 16 and all(len(r["responses"]) == 4 for r in ranked)
    assert all(c["score_chosen"] >= c["score_rejected"] for c in comparisons)
    curve = json.loads((tmp_path / "bon" / "curve.json").read_text())
    assert [c["n"] for c in curve] == [1, 2, 4] and curve[2]["kl"] == pytest.approx(math.log(4) - 0.75)
    assert curve[0]["reward"] < curve[1]["reward"] < curve[2]["reward"] == pytest.approx(sum(b["score"] for b in best) / 16)
    bon = str(tmp_path / "bon")
    go(train_sft, tmp_path / "sft", init="out/sft", data=f"{bon}/best.jsonl", max_steps=1, eval_fraction=0.0)
    go(train_rm, tmp_path / "rm", data=f"{bon}/comparisons.jsonl", max_steps=1)
    go(train_dpo, tmp_path / "dpo", data=f"{bon}/comparisons.jsonl", max_steps=1, eval_fraction=0.2, eval_every=0)
    go(
        train_rrhf,
        tmp_path / "rrhf",
        data=f"{bon}/ranked.jsonl",
        kind="ranked",
        reward="given",
        sampling="none",
        max_steps=1,
        eval_every=0,
    )


def test_a_resumed_sample_bon_draws_the_same_samples(here, tmp_path):
    go(sample_bon, tmp_path / "x", reward="gold")
    before = {p.name: p.read_bytes() for p in (tmp_path / "x").iterdir() if p.name not in ("metrics.jsonl", "run.json", "log.txt")}
    run = json.loads((tmp_path / "x" / "run.json").read_text())
    (tmp_path / "x" / "run.json").write_text(json.dumps(dict(run, finished=False)))  # as if killed
    (tmp_path / "x" / "best.jsonl").unlink()
    rows = go(sample_bon, tmp_path / "x", reward="gold", resume=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "x").iterdir() if p.name not in ("metrics.jsonl", "run.json", "log.txt")} == before
    assert len(rows) == 1


@pytest.mark.parametrize(
    "options, count",
    [
        (dict(sampling="none"), 1),
        (dict(sampling="sample"), 5),
        (dict(sampling="beam"), 5),
        (dict(sampling="diverse_beam"), 5),
        (dict(sampling="diverse_beam", from_data=False), 4),
        (dict(sampling="sample", resample_every=1), 5),
        (dict(sampling="sample", resample_every=1, kl_coef=0.5), 5),
        (dict(released_code=True, rrhf_weight=100.0), 5),
        (dict(micro_batch_size=2, dtype="bfloat16"), 5),
        (dict(reward="gold", length_penalty=0.5), 5),
    ],
    ids=str,
)
def test_rrhf_scores_the_right_number_of_candidates(here, tmp_path, options, count):
    rows = go(train_rrhf, tmp_path / "x", max_steps=2, **options)
    files = sorted((tmp_path / "x").glob("candidates-*.jsonl"))
    assert len(files) == (2 if "resample_every" in options else 1)
    for c in read_jsonl(files[0]):
        assert len(c["responses"]) == len(c["scores"]) == count and all(c["responses"])
        assert (c["responses"][-1][-1] == load_tokenizer("out/sft").eos_id) == options.get("from_data", True)
    if options.get("sampling") == "none":
        assert all(r["loss/rank"] == 0 for r in rows)  # one candidate: only L_ft
    if "released_code" not in options:
        assert rows[0]["loss"] == pytest.approx(rows[0]["loss/rank"] + rows[0]["loss/ft"], rel=1e-4)


def test_rrhf_lowers_scores_by_the_kl_of_the_policy_that_drew_the_candidates(here, tmp_path):
    """At step 0 that policy is the reference: no change. After step 1 the log-ratios are no longer 0."""
    for name, coef in (("a", 0.0), ("b", 10.0)):
        go(train_rrhf, tmp_path / name, max_steps=2, resample_every=1, kl_coef=coef, lr=1e-2, eval_every=0, save_every=1)
    first, other = ([read_jsonl(tmp_path / n / f"candidates-{k:06d}.jsonl") for n in "ab"] for k in (0, 1))
    assert first[0] == [{k: v for k, v in c.items() if k != "raw_scores"} for c in first[1]] and [c["responses"] for c in other[0]] == [c["responses"] for c in other[1]]
    policy, reference = (Transformer.from_pretrained("out/sft") for _ in range(2))
    policy.load_state_dict(load_file(sorted((tmp_path / "a" / "checkpoints").glob("*"))[0] / "model.safetensors"))
    for c, lowered in zip(*other):
        assert lowered["raw_scores"] == c["scores"]
        for k, y in enumerate(c["responses"]):
            tokens, mask = torch.tensor([c["prompt"] + y]), torch.tensor([[False] * len(c["prompt"]) + [True] * len(y)])
            with torch.no_grad():
                ratio = (policy.logprobs(tokens, mask) - reference.logprobs(tokens, mask)).sum().item()
            assert lowered["scores"][k] == pytest.approx(c["scores"][k] - 10.0 * ratio, abs=2e-3)
    assert any(abs(a["scores"][0] - b["scores"][0]) > 0.1 for a, b in zip(*other))


def test_rrhf_responses_respect_max_length(here, tmp_path):
    go(train_rrhf, tmp_path / "x", max_steps=1, max_length=24, eval_every=0)
    assert (
        max(len(c["prompt"]) + len(y) for c in read_jsonl(tmp_path / "x" / "candidates-000000.jsonl") for y in c["responses"])
        == 24
    )


@pytest.mark.parametrize(
    "options",
    [
        dict(kind="text"),
        dict(train_on_prompt=True),
        dict(data="out/comparisons/comparisons.jsonl", eval_fraction=0.2, eval_every=1),
        dict(data="out/comparisons/best.jsonl", eval_data="out/comparisons/best.jsonl", eval_every=1),
        dict(family="llama", init="scratch", width=16, heads=2, kv_heads=1, layers=1),
        dict(dtype="bfloat16", micro_batch_size=3),
        dict(lr_schedule="constant", optimizer="adam", weight_decay=0.1),
    ],
    ids=str,
)
def test_sft_variants_run(here, tmp_path, options):
    """Trains on texts, completions and chosen responses (Preferred-FT), and with another family."""
    rows = go(train_sft, tmp_path / "x", max_steps=2, **options)
    assert len(rows) == 2 and 0 < rows[-1]["loss"] < 8
    assert ("eval/loss" in rows[-1]) == bool(options.get("eval_every"))


def test_preferred_ft_trains_on_the_chosen_responses(here, tmp_path, monkeypatch):
    from nanorlhf.data import load_records

    seen = []
    monkeypatch.setattr(
        train_sft,
        "make_example",
        lambda t, p, y, *rest: seen.append(y) or importlib.import_module("nanorlhf.data").make_example(t, p, y, *rest),
    )
    go(train_sft, tmp_path / "x", data="out/comparisons/comparisons.jsonl", max_steps=1, limit=20, eval_fraction=0.0)
    assert seen == [r["chosen"] for r in load_records("out/comparisons/comparisons.jsonl", "preference", limit=20)]


def test_the_reward_model_learns_rankings_of_k_with_ties(here, tmp_path, reward_file):
    go(sample_bon, tmp_path / "bon", reward=reward_file + "halves", split="train", limit=24)
    rows = go(
        train_rm,
        tmp_path / "x",
        data=str(tmp_path / "bon/ranked.jsonl"),
        max_steps=30,
        lr=3e-3,
        eval_data=str(tmp_path / "bon/ranked.jsonl"),
    )
    assert rows[-1]["accuracy"] > 0.7 and "eval/ranked/accuracy" in rows[-1]
    assert {f"eval/ranked/{k}" for k in ("accuracy_q1", "accuracy_q2", "accuracy_q3", "accuracy_q4", "ece", "brier")} <= rows[-1].keys()
    assert 0 <= rows[-1]["eval/ranked/ece"] <= 0.5 and 0 < rows[-1]["eval/ranked/brier"] < 0.25


def test_prompts_longer_than_the_context_are_truncated_and_leave_room_for_responses(here, tmp_path):
    rows = [dict(prompt="The plot is good. " * 60, chosen=" good." * (3 + i), rejected=" bad." * 60) for i in range(8)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for module in (train_sft, train_rm, train_dpo, train_ppo, train_rrhf):
        options = dict(eval_fraction=0.0) if module in (train_sft, train_rm, train_dpo) else {}
        found = go(
            module,
            tmp_path / module.__name__,
            data=str(tmp_path / "long.jsonl"),
            max_steps=1,
            batch_size=4,
            eval_every=0,
            **options,
        )
        assert len(found) == 1


# ---- Invariances ----------------------------------------------------------------------------------------------------


def first_gradient(module, out, monkeypatch, double=False, **options):
    """Returns the gradients that reach the first optimizer step: one float64 vector per optimizer."""

    class Stop(Exception):
        pass

    found = []

    def step(rates, max_grad_norm, step, rows, parts):  # PPO has two networks, policy and value
        found.extend(torch.cat([p.grad.flatten().double() for g in o.param_groups for p in g["params"]]) for o in rates)
        raise Stop

    prepare = Run.prepare
    with monkeypatch.context() as patch:
        patch.setattr(module, "optimizer_step", step)
        if double:
            patch.setattr(
                Run,
                "prepare",
                lambda self, model, tokenizer: prepare(
                    self, model.double() if isinstance(model, Transformer) else model, tokenizer
                ),
            )
        with pytest.raises(Stop):
            go(module, out, eval_every=0, **options)
    return found


@pytest.mark.parametrize(
    "module, double",
    [
        (train_sft, True),
        (train_dpo, True),
        (train_ppo, True),
        *((module, False) for module in TRAINERS.values()),
    ],
    ids=lambda x: getattr(x, "__name__", "float64" if x else "float32"),
)
def test_the_gradient_does_not_depend_on_micro_batches_checkpoints_and_shared_prompts(here, tmp_path, monkeypatch, module, double):
    """Trap 16: the gradient of a step does not depend on how the batch was divided, nor on the padding that this adds; nor on
    options that save time or memory."""
    options = dict(num_mini_batches=1) if like_ppo(module) else {}
    ways = [dict(micro_batch_size=size) for size in (0, 1, 3)] + [dict(gradient_checkpointing=True)]
    ways += [dict(share_prompts=True, micro_batch_size=size) for size in (0, 3) if known_options(module, {"share_prompts": True})]
    results = [
        first_gradient(module, tmp_path / str(i), monkeypatch, double, batch_size=8, **way, **options)
        for i, way in enumerate(ways)
    ]
    for other in results[1:]:
        for i, (a, b) in enumerate(zip(results[0], other)):
            tolerance = 1e-12 if double and i == 0 and not like_ppo(module) else 1e-6 if double else 1e-5
            assert a.norm() > 0 and (a - b).norm() / a.norm() < tolerance


@pytest.mark.parametrize("module", TRAINERS.values(), ids=lambda m: m.__name__)
def test_frozen_layers_and_embeddings_do_not_change_and_the_rest_does(here, tmp_path, monkeypatch, module):
    """The models have one layer."""
    before = weights(COMMON[module]["init"])
    go(module, tmp_path / "x", frozen_layers=1.0, eval_every=0, save_every=2)
    frozen, after = ("embed", "wte", "wpe", "h.0.", "layers.0."), weights(tmp_path / "x")
    changed = {k for k in before.keys() & after.keys() if not torch.equal(before[k], after[k])}
    assert changed and not [k for k in changed if any(part in k for part in frozen)]
    assert any(part in k for k in before.keys() & after.keys() for part in frozen[-2:])
    saved = load_file(next((tmp_path / "x/checkpoints").glob(f"step-*/{'policy_' if like_ppo(module) else ''}optimizer.safetensors")))
    trained = [k for k in after if not any(part in k for part in frozen)]
    assert len({k.split(".")[0] for k in saved}) == len(trained) < len(after)          # no optimizer state of the others
    assert "0.5 of 1 layers is none" in stops(monkeypatch, module, "--out", tmp_path / "y", "--frozen_layers", 0.5)


@pytest.mark.parametrize("module", SCRIPTS.values(), ids=lambda m: m.__name__)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(here, tmp_path, module):
    options = known_options(module, dict(max_steps=2, eval_every=0, save_every=0))
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        go(module, tmp_path / name, seed=seed, **options)
    file = "model.safetensors" if module in TRAINERS.values() else "best.jsonl"
    a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
    assert a == b != c


# ---- Resuming -------------------------------------------------------------------------------------------------------


HARDER = {  # options with more state to restore
    train_rrhf: dict(resample_every=3, reward="out/rm"),
    train_ppo: dict(kl_target=6.0, whiten_rewards=True),
}


@pytest.fixture(scope="module")
def resumed(root):
    """Runs each trainer for 6 steps: once without a break, and once killed after step 3 (step 2 was saved) and resumed in a
    fresh process. Returns {script module: finished process}."""

    class Killed(BaseException):
        pass

    log, processes = Run.log, {}
    back = os.getcwd()
    os.chdir(root)
    try:
        for name, module in TRAINERS.items():
            options = dict(HARDER.get(module, {}), max_steps=6, save_every=2, eval_every=3)
            go(module, f"whole/{name}", **options)

            def dying(self, step, *args, **kwargs):
                log(self, step, *args, **kwargs)
                if step == 3:
                    raise Killed

            Run.log = dying
            with pytest.raises(Killed):
                go(module, f"parts/{name}", **options)
            Run.log = log
            assert [r["step"] for r in read_jsonl(f"parts/{name}/metrics.jsonl")] == [1, 2, 3]
            with open(f"parts/{name}/metrics.jsonl", "a", encoding="utf-8") as f:
                f.write('{"step": 4, "lo')  # the kill came in the middle of a line
            words = [w for k, v in {**COMMON[module], "device": "cpu", **options}.items() for w in (f"--{k}", v)]
            processes[module] = start(root, f"{name} --out parts/{name} --resume", *words)
        return {module: done(process) for module, process in processes.items()}
    finally:
        Run.log = log
        os.chdir(back)


@pytest.mark.parametrize("module", TRAINERS.values(), ids=lambda m: m.__name__)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(root, resumed, module):
    found, name = resumed[module], module.__name__
    assert found.code == 0 and "resumes" in found.out and "after step 2" in found.out, found.err
    assert same(weights(root / f"whole/{name}"), weights(root / f"parts/{name}"))
    whole, parts = (read_jsonl(root / f"{kind}/{name}/metrics.jsonl") for kind in ("whole", "parts"))
    assert [r["step"] for r in parts] == [1, 2, 3, 4, 5, 6]  # each step once
    assert [{k: v for k, v in r.items() if k not in TIMES} for r in parts] == [
        {k: v for k, v in r.items() if k not in TIMES} for r in whole
    ]
    samples = [read_jsonl(root / f"{kind}/{name}/samples.jsonl") for kind in ("whole", "parts")]
    assert samples[0] == samples[1]
    assert (root / f"whole/{name}/config.json").read_bytes() == (root / f"parts/{name}/config.json").read_bytes()


@pytest.mark.parametrize("module", TRAINERS.values(), ids=lambda m: m.__name__)
def test_a_run_in_bfloat16_resumes_bit_for_bit(here, tmp_path, monkeypatch, module):
    class Killed(BaseException):
        pass
    options = dict(HARDER.get(module, {}), max_steps=3, save_every=1, eval_every=0, dtype="bfloat16")
    whole, log = go(module, tmp_path / "whole", **options), Run.log

    def dying(self, step, *args, **kwargs):
        log(self, step, *args, **kwargs)
        if step == 2:                             # step 1 was saved
            raise Killed
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "log", dying)
        go(module, tmp_path / "parts", **options)
    parts = go(module, tmp_path / "parts", resume=True, **options)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    whole, parts = ([{k: v for k, v in row.items() if k not in TIMES} for row in rows] for rows in (whole, parts))
    assert whole == parts and len(parts) == 3


def test_a_killed_process_resumes(root, tmp_path):
    """After a SIGKILL at an arbitrary moment, --resume gives the weights of an uninterrupted run."""
    options = dict(init=str(root / "out/base"), max_steps=120, save_every=2)
    words = [w for k, v in {**COMMON[train_sft], **options}.items() for w in (f"--{k}", v)]
    process = start(root, "train_sft --device cpu --out", tmp_path / "x", *words)
    metrics = tmp_path / "x" / "metrics.jsonl"
    while process.poll() is None and len(read_jsonl(metrics)) < 7:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (tmp_path / "x" / "model.safetensors").exists()
    rows = go(train_sft, tmp_path / "x", resume=True, **options)
    assert [r["step"] for r in rows] == list(range(1, 121))
    go(train_sft, tmp_path / "whole", **{**options, "save_every": 0})
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "x"))


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("module, how, length", [
    (train_sft, "SIGINT", dict(max_steps=400)), (train_ppo, "SIGUSR1", dict(max_steps=40, kl_target=6.0)),
    (sample_bon, "SIGTERM", dict(limit=300, batch_size=2, reward="gold"))], ids=lambda x: getattr(x, "__name__", ""))
def test_a_signal_lets_the_step_end_and_saves_it(root, tmp_path, monkeypatch, module, how, length):
    """Although no checkpoint was due; and what follows is what would have followed."""
    options = {**COMMON[module], **length} | known_options(module, dict(save_every=0, eval_every=0, device="cpu"))
    words = [w for k, v in options.items() for w in (f"--{k}", v)]
    process = start(root, f"{module.__name__} --out", tmp_path / "x", *words)
    while process.poll() is None and len(read_jsonl(tmp_path / "x/metrics.jsonl")) < 3:
        time.sleep(0.01)
    process.send_signal(getattr(signal, how))
    found, last = done(process), read_jsonl(tmp_path / "x/metrics.jsonl")[-1]["step"]
    assert found.code == 1 and f"{how}: stops after this step and saves" in found.out
    unit = f"{last} prompts" if module is sample_bon else f"step {last}"
    assert found.err.startswith(f"interrupted; continue after {unit} with: python ") and len(found.err.splitlines()) == 1
    again = done(start(root, found.err.split("with: python ")[1].replace(".py", "").strip()))
    assert again.code == 0 and f"resumes {tmp_path / 'x'} after step {last}" in again.out, again.err
    monkeypatch.chdir(root)
    whole, parts = go(module, tmp_path / "whole", **options), read_jsonl(tmp_path / "x/metrics.jsonl")
    assert 3 <= last < parts[-1]["step"]
    assert [{k: v for k, v in r.items() if k not in TIMES} for r in parts] == [
        {k: v for k, v in r.items() if k not in TIMES} for r in whole]
    for file in ("ranked.jsonl", "curve.json") if module is sample_bon else ("model.safetensors",):
        assert (tmp_path / "x" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_second_signal_stops_at_once(root, tmp_path):
    """As one before the first step does, when nothing is lost."""
    process = start(root, "train_ppo --out", tmp_path / "x", *[w for k, v in COMMON[train_ppo].items() for w in (f"--{k}", v)],
                    "--max_steps", 1, "--limit", 4000, "--batch_size", 4000, "--response_length", 48)
    while process.poll() is None and not (tmp_path / "x/run.json").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    found = done(process)
    assert found.code == 1 and found.err.startswith("interrupted; no checkpoint was saved yet"), found.err
    assert not (tmp_path / "x/checkpoints").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX terminals")
def test_ctrl_c_in_a_terminal_leaves_whole_lines_and_the_cursor_on_a_fresh_one(root, tmp_path):
    import fcntl
    import pty
    import struct
    import termios
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0))         # 24 lines of 50 columns
    env = {k: v for k, v in ENV.items() if k not in ("COLUMNS", "LINES")} | {"NO_COLOR": "1", "TERM": "xterm"}

    def take_the_terminal():
        heed_ctrl_c()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    options = [str(w) for k, v in {**COMMON[train_sft], "max_steps": 400, "out": tmp_path / "x"}.items() for w in (f"--{k}", v)]
    process = subprocess.Popen([sys.executable, str(ROOT / "train_sft.py"), *options], cwd=root, env=env, stdin=theirs, stdout=theirs,
                               stderr=theirs, start_new_session=True, preexec_fn=take_the_terminal)
    os.close(theirs)
    shown, pressed = b"", False
    while True:
        try:
            more = os.read(ours, 4096)
        except OSError:                           # how Linux says that it has ended
            more = b""
        if not more:
            break
        shown += more
        if not pressed and b"sft 3/400" in shown:
            os.write(ours, b"\x03")
            pressed = True
    os.close(ours)
    shown, last = shown.decode(), read_jsonl(tmp_path / "x/metrics.jsonl")[-1]["step"]
    assert process.wait() == 1 and "\033" not in shown and shown.count("\r\n") == 3      # first example, SIGINT, interrupted
    drawn = [part for part in re.split(r"\r\n|\r", shown) if re.match(r"sft \d+/400  ", part)]
    assert len(drawn) == last >= 3 and {len(part) for part in drawn} == {49}
    assert f"\r{' ' * 49}\rsft: SIGINT: stops after this step and saves" in shown
    assert re.search(rf"[\r\n]interrupted; continue after step {last} with: python .*--resume\r\n$", shown)


RENAMED = [(module, old, new) for module in SCRIPTS.values() for old, new in getattr(module.Config, "renamed", {}).items()]


@pytest.mark.parametrize("module, old, new", RENAMED, ids=lambda x: getattr(x, "__name__", x))
def test_an_old_option_name_works_and_prints_the_new_one(module, old, new, capsys):
    given = getattr(parse_options(module.Config, "", [f"--{old}", "x"]), new)
    assert given == "x" and capsys.readouterr().err == f"--{old} is now --{new}\n"
    with pytest.raises(SystemExit, match="give one of them"):
        parse_options(module.Config, "", [f"--{old}=x", f"--{new}", "y"])
    with pytest.raises(SystemExit):
        parse_options(module.Config, "", ["--help"])
    assert f"--{old}" not in capsys.readouterr().out


@pytest.mark.parametrize("module, old, new", RENAMED, ids=lambda x: getattr(x, "__name__", x))
def test_a_run_folder_with_an_old_option_name_resumes(here, tmp_path, module, old, new):
    go(module, tmp_path / "x", save_every=2, **{new: "out/comparisons/best.jsonl"})
    whole, rows = weights(tmp_path / "x"), read_jsonl(tmp_path / "x/metrics.jsonl")
    run = json.loads((tmp_path / "x/run.json").read_text())
    run["options"][old] = run["options"].pop(new)
    (tmp_path / "x/run.json").write_text(json.dumps(dict(run, finished=False)))
    (tmp_path / "x/model.safetensors").unlink()
    shutil.rmtree(tmp_path / "x/checkpoints/step-0000004")
    entry_of(module)(parse_options(module.Config, "", ["--out", str(tmp_path / "x"), "--resume"]))
    assert same(weights(tmp_path / "x"), whole)
    again = read_jsonl(tmp_path / "x/metrics.jsonl")
    assert [{k: v for k, v in r.items() if k not in TIMES} for r in again] == [
        {k: v for k, v in r.items() if k not in TIMES} for r in rows]


def test_resuming_a_finished_run_changes_nothing(here, capsys):
    before = snapshot("out/dpo")
    train_dpo.train(parse_options(train_dpo.Config, "", ["--out", "out/dpo", "--resume"]))
    assert "out/dpo is finished already" in capsys.readouterr().out and snapshot("out/dpo") == before


def test_a_finished_run_is_not_made_longer_and_the_error_says_what_to_do(here, monkeypatch):
    """The learning rate of every step depends on the number of steps, so the longer run would have been another one."""
    before = snapshot("out/dpo")
    message = stops(monkeypatch, train_dpo, "--out", "out/dpo", "--resume", "--max_steps", 9)
    assert "--max_steps 9: the run in out/dpo was started with 2" in message and "--init out/dpo --out NEW" in message
    assert "--beta 0.1" in stops(monkeypatch, train_dpo, "--out", "out/dpo", "--resume", "--beta", 0.1)
    assert snapshot("out/dpo") == before


def test_a_damaged_checkpoint_is_named(here, tmp_path, monkeypatch):
    go(train_sft, tmp_path / "x", max_steps=2, save_every=1)
    run = json.loads((tmp_path / "x/run.json").read_text())
    (tmp_path / "x/run.json").write_text(json.dumps(dict(run, finished=False)))
    file = tmp_path / "x/checkpoints/step-0000002/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 16
    file.write_bytes(content)
    before = snapshot(tmp_path)
    assert f"{file} is damaged" in stops(monkeypatch, train_sft, "--resume", "--out", tmp_path / "x", "--init", "out/base")
    assert snapshot(tmp_path) == before


# ---- What the scripts reject ----------------------------------------------------------------------------------------


def stops(monkeypatch, module, *argv):
    """Runs the script's main in this process; returns its error, which must be one line. Nothing else may be on stderr."""
    import contextlib
    import io

    stderr = io.StringIO()
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(stderr):
        main(module.Config, entry_of(module), module.__doc__)
    assert isinstance(stop.value.code, str) and stop.value.code.startswith("error: ") and "\n" not in stop.value.code
    assert stderr.getvalue() == ""
    return stop.value.code


def test_a_script_stops_with_a_one_line_error_and_exit_code_1(root, tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    cases = [
        (root, "train_sft --lerning_rate 1", "--lerning_rate"),
        (tmp_path, "train_ppo", "python train_sft.py"),
        (root, f"train_ppo --out x --reward {tmp_path / 'reward.py'}:broken --limit 8 --response_length 4", "ZeroDivisionError"),
    ]
    for process, (_, _, says) in zip([start(cwd, command) for cwd, command, _ in cases], cases):
        found = done(process)
        assert found.code == 1 and says in found.err
        assert len(found.err.splitlines()) == 1 and "Traceback" not in found.err


@pytest.mark.parametrize(
    "module, argv, says",
    [
        (train_dpo, ["--batch_size", "many"], "--batch_size"),
        (train_rm, ["--resume=maybe"], "--resume"),
        (train_rrhf, ["--sampling", "beams"], "--sampling beams: not one of none, sample, beam, diverse_beam"),
        (train_ppo, ["--kl_estimator", "k4"], "--kl_estimator k4"),
        (train_ppo, ["--missing_eos", "drop"], "--missing_eos drop"),
        (train_sft, ["--lr_schedule", "step"], "--lr_schedule step"),
        (train_sft, ["--optimizer", "sgd"], "--optimizer sgd"),
        (train_rm, ["--normalize", "max"], "--normalize max"),
        (train_dpo, ["--loss", "kto"], "--loss kto"),
        (train_dpo, ["--label_smoothing", "0.5"], "--label_smoothing 0.5"),
        (train_ppo, ["--batch_size", "0"], "--batch_size 0"),
        (train_sft, ["--micro_batch_size", "-1"], "--micro_batch_size -1"),
        (train_ppo, ["--num_mini_batches", "0"], "--num_mini_batches 0"),
        (train_sft, ["--kind", "poem"], "poem"),
        (train_sft, ["--init", "scratch", "--heads", "3", "--width", "16"], "--heads 3"),
        (train_sft, ["--init", "scratch", "--family", "gpt5"], "--family gpt5"),
        (train_sft, ["--dtype", "int8"], "--dtype int8"),
        (train_sft, ["--device", "tpu9x"], "--device tpu9x"),
        (train_ppo, ["--response_length", "96"], "leaves no room"),
        (sample_bon, ["--n", "0"], "--n 0"),
        (sample_bon, ["--n", "1", "--label_temperature", "0.2"], "two to compare"),
        (sample_bon, ["--split", "validation"], "validation"),
        (sample_bon, ["--response_length", "96"], "leaves no room"),
        (train_rrhf, ["--reward", "given"], "--kind ranked"),
        (train_sft, ["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (train_sft, ["--eval_data", "nowhere.jsonl"], "nowhere.jsonl"),
        (train_rm, ["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (train_dpo, ["--data", "out/comparisons/comparison.jsonl"], "no such file; did you mean out/comparisons/comparisons.jsonl?"),
        (train_ppo, ["--reward", "./nowhere"], "--reward ./nowhere"),
        (train_ppo, ["--reference", "./nowhere"], "nowhere: no such folder"),
        (train_ppo, ["--value_init", "./nowhere"], "nowhere: no such folder"),
        (train_ppo, ["--eval_prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (train_dpo, ["--eval_reward", "nowhere.py:f", "--eval_fraction", "0.2"], "nowhere.py"),
        (sample_bon, ["--reward", "out/sft"], "no reward model"),
        (train_sft, ["--init", "scratch", "--tokenizer", "./nowhere"], "./nowhere"),
        (train_sft, ["--init", "./nowhere"], "nowhere holds no checkpoint (no config.json in it)"),
        (train_rm, ["--init", "out/sftt"], "out/sftt holds no checkpoint (no config.json in it); did you mean out/sft?"),
        (train_dpo, ["--init", "out/sftt"], "out/sftt holds no checkpoint (no config.json in it); did you mean out/sft?"),
        (train_rrhf, ["--init", "out/sftt"], "out/sftt holds no checkpoint (no config.json in it); did you mean out/sft?"),
        (sample_bon, ["--init", "out/sftt"], "out/sftt holds no checkpoint (no config.json in it); did you mean out/sft?"),
        (train_sft, ["--resume"], "holds no run to resume"),
        (train_sft, ["--kind", "preference"], "--kind preference"),
        (train_rrhf, ["--kind", "completion"], "--kind completion"),
        (train_rm, ["--data", "reviews"], "reviews"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else getattr(x, "__name__", ""),
)
def test_bad_options_and_inputs_give_a_one_line_error_and_leave_no_folder(here, tmp_path, monkeypatch, module, argv, says):
    extra = ["--limit", "8"] if "--limit" not in argv else []
    assert says in stops(monkeypatch, module, *argv, *extra, "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "module, command",
    [
        (train_ppo, "python train_rm.py"),
        (train_rrhf, "python train_rm.py"),
        (sample_bon, "python train_rm.py"),
        (train_rm, "python sample_bon.py"),
        (train_dpo, "python sample_bon.py"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_missing_input_names_the_command_that_makes_it(root, tmp_path, monkeypatch, module, command):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(root / "out/sft", tmp_path / "out/sft")
    assert command in stops(monkeypatch, module)


@pytest.mark.parametrize(
    "row, says",
    [
        ("not json", "bad JSON"),
        ("[1, 2]", "not a JSON object"),
        ('{"prompt": 3, "chosen": "a", "rejected": "b"}', "not a string"),
        ('{"question": "a"}', "no known record"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "chosen equals rejected"),
        ('{"prompt": "a", "chosen": "", "rejected": "b"}', "empty chosen"),
        ('{"prompt": "a", "responses": ["x"], "scores": [1, 2]}', "differ"),
    ],
)
@pytest.mark.parametrize("module", ON_COMPARISONS, ids=lambda m: m.__name__)
def test_malformed_rows_are_named_by_file_and_line_or_skipped(here, tmp_path, monkeypatch, capsys, module, row, says):
    good = [json.dumps(dict(prompt=f"p{i}", chosen=" good.", rejected=" bad.")) for i in range(9)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([*good[:4], row, *good[4:]]))
    message = stops(monkeypatch, module, "--data", file, "--out", tmp_path / "x")
    assert f"{file}:5: " in message and says in message and not (tmp_path / "x").exists()
    assert go(module, tmp_path / "x", data=str(file), skip_bad=True, eval_fraction=0.0, max_steps=1, eval_every=0)
    assert "skipped 1 of 10 rows" in capsys.readouterr().err


def test_data_with_nothing_to_learn_give_a_one_line_error(here, tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(dict(prompt=f"p{i}", responses=["a", "b"], scores=[1, 1])) + "\n" for i in range(20)))
    assert "differ in score" in stops(monkeypatch, train_rm, "--data", file, "--out", tmp_path / "x")
    file.write_text("")
    assert "no preference records" in stops(monkeypatch, train_dpo, "--data", file, "--out", tmp_path / "x")
    file.write_text('{"prompt": "a"}\n')
    assert "no candidate" in stops(monkeypatch, train_rrhf, "--data", file, "--out", tmp_path / "y", "--sampling", "none")
    assert "too few" in stops(monkeypatch, train_sft, "--data", "reviews", "--limit", "1", "--out", tmp_path / "x")


def test_a_prompt_that_leaves_no_room_gives_a_one_line_error(here, tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(dict(prompt="The plot is good. " * 60, chosen=" good.", rejected=" bad.")) + "\n")
    for module in (train_sft, train_rm, train_dpo):
        message = stops(
            monkeypatch, module, "--data", file, "--max_prompt_length", "96", "--eval_fraction", "0", "--out", tmp_path / "x"
        )
        assert "leaves no room" in message
    for module in (train_ppo, train_rrhf, sample_bon):
        options = ("--data", file, "--response_length", "8", "--out", tmp_path / "x")
        assert "leaves no room" in stops(monkeypatch, module, *options, "--max_prompt_length", "96")
        assert "leaves no room for --response_length" in stops(monkeypatch, module, *options, "--max_prompt_length", "89")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("options", [{}, dict(keep="start"), dict(keep="tldr", max_prompt_length=60),
                                     dict(max_length=64, keep="tldr")], ids=str)
def test_every_script_and_evaluate_read_the_same_part_of_an_overlong_prompt(here, tmp_path, monkeypatch, options):
    """A post of 946 tokens: the policy must be asked what it was trained on, and the reward model must see the same."""
    from nanorlhf import evaluate
    from nanorlhf.data import encode_prompt

    tokenizer, post = load_tokenizer("out/sft"), ["The plot is good."]
    frame = "SUBREDDIT: r/films\n\nTITLE: A film\n\nPOST: {}\n\nTL;DR:"
    while len(tokenizer.encode(frame.format("\n".join(post)))) < 946:
        post.append(f"The cast is bad, {len(post)} times.")
    prompt = frame.format("\n".join(post))
    pair = dict(prompt=prompt, chosen=" It is good.", rejected=" It is bad, and the plot is bad too, and so is the cast.")
    rows = [pair, dict(pair, chosen=" Short."), dict(pair, rejected=" The film is dull.", chosen=" Long. " * 12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    limit = options.get("max_prompt_length", options.get("max_length", 96) // 2)
    want = encode_prompt(tokenizer, prompt, limit, options.get("keep", "end"))
    assert 30 < len(want) <= limit

    fed, forward = [], Transformer.forward
    def recorded(self, tokens, cache=None):
        fed.extend(tokens.tolist() if tokens.shape[1] > 2 else [])          # 1: a decoding step; 2: finish() tries the model
        return forward(self, tokens, cache)
    monkeypatch.setattr(Transformer, "forward", recorded)
    shared = dict(data=str(tmp_path / "rows.jsonl"), response_length=8, **options)
    for name, module in SCRIPTS.items():
        given = known_options(module, dict(shared, max_steps=1, eval_fraction=0.0, eval_every=0, batch_size=3, num_samples=2))
        fed.clear()
        entry_of(module)(module.Config(**given, out=str(tmp_path / name)))
        assert len(fed) >= 3 and all(row[:len(want)] == want for row in fed), name
    fed.clear()
    evaluate.evaluate_policies({"dpo": "out/dpo"}, evaluate.Options(
        **dict(shared, data=f"posts={shared['data']}"), num_samples=2, out=str(tmp_path / "evaluation")))
    assert len(fed) >= 3 and all(row[:len(want)] == want for row in fed)


def test_the_prior_adds_its_share_to_the_reward_model_s_loss(here, tmp_path):
    from nanorlhf.data import load_records, split_records

    plain, prior = (go(train_rm, tmp_path / f"x{c}", max_steps=1, eval_every=0, prior_precision=c) for c in (0.0, 30.0))
    records, _ = split_records(load_records(train_rm.Config.data, "ranked"), 0.2)
    N = sum(len(set(r["scores"])) > 1 for r in records)
    square = sum((p.double() ** 2).sum().item() for p in RewardModel.from_pretrained("out/sft", fresh_head=True).parameters())
    assert prior[0]["loss"] - plain[0]["loss"] == pytest.approx(30 / (2 * N) * square, rel=1e-4)
    assert prior[0]["grad_norm"] != plain[0]["grad_norm"]


def test_a_length_beyond_the_context_is_refused_before_anything_is_written(here, tmp_path, monkeypatch):
    for module in SCRIPTS.values():
        message = stops(monkeypatch, module, "--max_length", 97, "--out", tmp_path / "x", "--limit", 40)
        assert "--max_length 97: the model's context is 96" in message and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda f: f.write_text(f.read_text().replace('"n_layer": 1', '"n_layer": 2')), "missing"),
        (lambda f: f.write_text(f.read_text().replace('"n_embd": 16', '"n_embd": 32')), "shape"),
        (lambda f: f.write_text(f.read_text().replace('"gpt2"', '"mamba"')), "model_type 'mamba'"),
        (lambda f: f.write_text("{"), "not JSON"),
        (lambda f: (f.parent / "model.safetensors").write_bytes((f.parent / "model.safetensors").read_bytes()[:5000]), "damaged"),
        (lambda f: (f.parent / "model.safetensors").unlink(), "missing"),
        (lambda f: (f.parent / "tokenizer.json").unlink(), "tokenizer"),
    ],
    ids=["layers", "width", "family", "json", "cut", "no weights", "no tokenizer"],
)
def test_an_unusable_checkpoint_gives_a_one_line_error(here, tmp_path, monkeypatch, damage, says):
    shutil.copytree("out/sft", tmp_path / "sft")
    damage(tmp_path / "sft" / "config.json")
    for module in (train_sft, train_ppo):
        assert says in stops(monkeypatch, module, "--init", tmp_path / "sft", "--out", tmp_path / "x", "--limit", "40")
    assert not (tmp_path / "x").exists()


def test_a_model_with_another_vocabulary_gives_a_one_line_error(here, tmp_path, monkeypatch):
    import dataclasses

    config, other = Transformer.from_pretrained("out/sft").config, tmp_path / "other"
    Transformer(dataclasses.replace(config, vocab_size=config.vocab_size - 1)).save_pretrained(other)
    load_tokenizer("reviews").save(other)
    says = f"of {config.vocab_size - 1} tokens does not fit the tokenizer of {config.vocab_size}"
    for module in SCRIPTS.values():
        assert says in stops(monkeypatch, module, "--init", other, "--out", tmp_path / "x", "--limit", "40")
    for module, option in ((train_ppo, "--reference"), (train_dpo, "--reference"), (train_ppo, "--value_init")):
        assert says in stops(monkeypatch, module, option, other, "--out", tmp_path / "x", "--limit", "40")
    assert not (tmp_path / "x").exists()


def padded_copy(folder, out, rows=64):
    """Copies a checkpoint with `rows` more rows in the embedding, which the tokenizer does not know: as published models have."""
    import dataclasses

    model = Transformer.from_pretrained(folder)
    wider = Transformer(dataclasses.replace(model.config, vocab_size=model.config.vocab_size + rows), seed=5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            dict(wider.named_parameters())[name][:len(p)] = p
        wider.embed.weight[model.config.vocab_size:] *= 50                  # a row that would win every softmax
    wider.save_pretrained(out)
    load_tokenizer(folder).save(out)
    return str(out)


def test_padding_of_the_embedding_changes_no_number(here, tmp_path):
    """Policy, reference and value model of one tokenizer work together, whatever the number of rows, and give the same
    metrics: sampling and log-probabilities range over the tokenizer's ids."""
    wide = padded_copy("out/sft", tmp_path / "wide")
    cases = dict(narrow=dict(init="out/sft"), init=dict(init=wide), reference=dict(reference=wide, value_init=wide))
    for module in (train_ppo, train_dpo, train_rrhf, sample_bon, train_sft):
        shared = dict(max_steps=2, batch_size=4, limit=12, response_length=8, num_eval_prompts=4, eval_every=1,
                      value_init="out/sft", n=2, eval_fraction=0.0)
        runs = {}
        for name, options in cases.items():
            if known_options(module, options):
                runs[name] = go(module, tmp_path / f"{module.__name__}-{name}", **known_options(module, shared | options))
        assert len(runs) >= 2
        for rows in runs.values():
            for a, b in zip(rows, runs["narrow"]):
                a, b = ({k: v for k, v in row.items() if k not in ("time", "tokens_per_second")} for row in (a, b))
                assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("module", COMMON, ids=lambda m: m.__name__)
def test_a_folder_that_holds_a_run_is_not_overwritten(here, tmp_path, monkeypatch, module):
    before = snapshot("out")
    assert "already holds files" in stops(monkeypatch, module, "--out", "out/sft")
    # --overwrite deletes it only after all inputs have been loaded.
    stops(monkeypatch, module, "--out", "out/sft", "--overwrite", "--init", "./nowhere")
    stops(monkeypatch, module, "--out", "out/sft", "--overwrite", "--data", "nowhere.jsonl")
    if {"response_length", "num_eval_prompts"} <= known_options(module, dict(response_length=0, num_eval_prompts=0)).keys():
        long = ("--init", "out/base", "--response_length", 999, "--max_prompt_length", 8, "--limit", 40)
        assert "leaves no room for --response_length" in stops(monkeypatch, module, "--out", "out/sft", "--overwrite", *long)
    assert snapshot("out") == before


@pytest.mark.parametrize("module", COMMON, ids=lambda m: m.__name__)
def test_overwrite_never_deletes_an_input(here, tmp_path, monkeypatch, module):
    shutil.copytree("out/sft", tmp_path / "sft")
    shutil.copy("out/comparisons/comparisons.jsonl", tmp_path / "sft/mine.jsonl")
    before = snapshot(tmp_path / "sft")
    (tmp_path / "link").symlink_to(tmp_path / "sft")
    for option, value in (("init", "sft"), ("data", "sft/mine.jsonl"), ("data", "link/mine.jsonl")):
        said = stops(monkeypatch, module, "--out", tmp_path / "sft", "--overwrite", f"--{option}", tmp_path / value)
        assert f"--{option} {tmp_path / value} lies in --out" in said
    assert snapshot(tmp_path / "sft") == before


def test_data_of_many_answers_per_prompt_have_one_value_per_prompt(here, tmp_path):
    """Three answers to each prompt, all alike: the standard error is that of the prompts, so repeating them does not lower it."""
    rows = [json.loads(line) for line in open("out/comparisons/comparisons.jsonl", encoding="utf-8")][:20]
    for n in (1, 3):
        (tmp_path / f"{n}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows for _ in range(n)))
    for module, name, options in ((train_rm, "held/accuracy", {}), (train_rm, "held/loss", {}), (train_dpo, "loss", {}),
                                  (train_sft, "loss", dict(kind="completion"))):
        held = {n: f"held={tmp_path}/{n}.jsonl" if module is train_rm else f"{tmp_path}/{n}.jsonl" for n in (1, 3)}
        found = [go(module, tmp_path / f"{module.__name__}-{name.replace('/', '-')}-{n}", data="out/comparisons/comparisons.jsonl",
                    eval_data=held[n], max_steps=1, lr=1e-2, eval_every=1, **options)[-1] for n in (1, 3)]
        assert found[0][f"eval/{name}_se"] == pytest.approx(found[1][f"eval/{name}_se"], rel=1e-4) != 0


def test_the_gold_reward_measures_reviews_only(here, tmp_path):
    """--eval_prompts of another kind, beside training prompts of the built-in task, are measured by no reward."""
    (tmp_path / "mine.jsonl").write_text('{"prompt": "What is 2 + 2?"}\n{"prompt": 7}\n' * 3)
    short = dict(max_steps=1, eval_every=1, response_length=4, num_eval_prompts=4)
    last = go(train_dpo, tmp_path / "mine", eval_prompts=str(tmp_path / "mine.jsonl"), skip_bad=True, **short)[-1]
    assert "eval/kl" in last and "eval/gold" not in last
    assert "eval/gold" in go(train_dpo, tmp_path / "built_in", **short)[-1]


def test_normalize_data_are_read_before_training_and_whole(here, tmp_path, monkeypatch):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n')
    argv = ("--out", tmp_path / "x", "--normalize_data", tmp_path / "bad.jsonl")
    assert "bad.jsonl:1: " in stops(monkeypatch, train_rm, *argv) and not (tmp_path / "x").exists()
    rows = '{"prompt": "Review:", "completion": " good film"}\n' * 1500 + '{"prompt": "Review:", "completion": " bad film"}\n'
    (tmp_path / "many.jsonl").write_text(rows + '{"prompt": 3}\n')
    go(train_rm, tmp_path / "many", max_steps=1, lr=0.0, normalize_data=str(tmp_path / "many.jsonl"), skip_bad=True)
    assert 1e-4 < RewardModel.from_pretrained(tmp_path / "many").reward_std != 1.0     # about 0 or 1: the last row was not read


@pytest.mark.parametrize("module", TRAINERS.values(), ids=lambda m: m.__name__)
def test_a_non_finite_loss_stops_before_the_step_and_changes_no_saved_file(here, tmp_path, monkeypatch, module):
    """The message names the step and the rows of its batch. The run can be resumed from its last checkpoint."""
    from nanorlhf.training import batch_indices

    real, states, steps = getattr(module, loss_of(module)), [], []

    def poisoned(*args, **kwargs):
        found = real(*args, **kwargs)
        if len(steps) < 2:
            return found
        if not states:
            states.append(snapshot(tmp_path))
        return (found[0] * math.nan, *found[1:]) if isinstance(found, tuple) else found * math.nan

    guard = module.optimizer_step

    def counted(rates, max_grad_norm, step, rows, parts):
        found = guard(rates, max_grad_norm, step, rows, parts)
        steps.append(step)
        return found

    options = dict(num_ppo_epochs=1, num_mini_batches=1, max_steps=3) if like_ppo(module) else dict(max_steps=4)
    bad = 3
    options |= dict(eval_every=0, save_every=1)
    words = [w for k, v in {**COMMON[module], **options}.items() for w in (f"--{k}", v)]
    with monkeypatch.context() as patch:
        patch.setattr(module, loss_of(module), poisoned)
        patch.setattr(module, "optimizer_step", counted)
        message = stops(monkeypatch, module, *words, "--device", "cpu", "--out", tmp_path / "x")
    rows = message.split("[", 1)[1].split("]", 1)[0]
    assert f"step {bad}: loss nan" in message and "weights were not changed" in message
    size = COMMON[module]["batch_size"]
    batches = [batch_indices(n, size, bad - 1, 0)[:8] for n in range(4, 61)]  # only the script knows n
    assert [int(r) for r in rows.split(",")] in batches
    assert snapshot(tmp_path) == states[0] and not (tmp_path / "x/model.safetensors").exists()
    assert [r["step"] for r in read_jsonl(tmp_path / "x/metrics.jsonl")] == list(range(1, bad))
    rows = go(module, tmp_path / "x", resume=True, **options)
    assert [r["step"] for r in rows] == list(range(1, options["max_steps"] + 1))


def test_a_non_finite_reward_stops_ppo(here, tmp_path, monkeypatch, reward_file):
    message = stops(
        monkeypatch, train_ppo, "--reward", reward_file + "bad", "--response_length", 8, "--limit", 8, "--out", tmp_path / "x"
    )
    assert "finite numbers expected" in message and not (tmp_path / "x/model.safetensors").exists()


def test_resume_rejects_another_script_and_changed_data(here, tmp_path, monkeypatch):
    """Otherwise one method could overwrite another's run, or a run could continue with other batches."""
    data = tmp_path / "pairs.jsonl"
    data.write_bytes(Path("out/comparisons/comparisons.jsonl").read_bytes())
    go(train_dpo, tmp_path / "x", data=str(data), save_every=2, max_steps=4)
    run = json.loads((tmp_path / "x/run.json").read_text())
    (tmp_path / "x/run.json").write_text(json.dumps(dict(run, finished=False)))
    assert "another script, dpo" in stops(monkeypatch, train_sft, "--resume", "--out", tmp_path / "x")
    data.write_bytes(b"\n".join(data.read_bytes().split(b"\n")[:-5]))
    assert "has changed since" in stops(monkeypatch, train_dpo, "--resume", "--out", tmp_path / "x")


def test_a_checkpoint_with_other_token_ids_may_only_be_the_reward(here, tmp_path, monkeypatch):
    """Two tokenizers of the same size may still give a text different ids."""
    from nanorlhf.reviews import corpus
    from nanorlhf.tokenizer import train_bpe
    other = train_bpe([text.upper() for text in corpus(400, seed=1)], load_tokenizer("out/sft").vocab_size)
    model = Transformer.from_pretrained("out/sft")
    rm = RewardModel(model.config)
    for name, saved in (("policy", model), ("rm", rm)):
        saved.save_pretrained(tmp_path / name)
        other.save(tmp_path / name)
    for module in (train_ppo, train_dpo):
        message = stops(monkeypatch, module, "--reference", tmp_path / "policy", "--out", tmp_path / "x", "--limit", "40")
        assert "other ids" in message
    assert "other ids" in stops(monkeypatch, train_ppo, "--value_init", tmp_path / "rm", "--out", tmp_path / "x")
    rows = go(train_ppo, tmp_path / "y", reward=str(tmp_path / "rm"))      # here the value model starts from --init
    assert len(rows) == 4


@pytest.mark.parametrize("words, part", [
    (["--beta", "0"], "--beta"), (["--eval_fraction", "1"], "--eval_fraction"), (["--epochs", "-1"], "--epochs"),
    (["--keep", "middle"], "--keep")])
def test_meaningless_options_are_rejected(here, tmp_path, monkeypatch, words, part):
    assert part in stops(monkeypatch, train_dpo, *words, "--out", tmp_path / "x")


def test_a_short_run_is_not_all_warmup():
    from nanorlhf.training import learning_rate
    assert learning_rate(0, 1, 1.0, warmup=20) == 1.0 and learning_rate(2, 10, 1.0, warmup=20, schedule="constant") == 1.0
