"""Tests of `python -m nanorlhf`, the README's main command, at 1/100 of its size, and of the READMEs against the code."""

import collections
import contextlib
import html
import io
import json
import re
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch

import nanorlhf.evaluate
import nanorlhf.study
from conftest import ROOT, SCRIPTS, entry_of
from nanorlhf import training
from nanorlhf.__main__ import POLICIES, main, over_seeds, reward_model_rows, stages
from nanorlhf.data import load_records
from nanorlhf.files import read_jsonl
from nanorlhf.findings import Claim, Experiment, held_out
from nanorlhf.metrics import within
from nanorlhf.options import check_options, parse_options
from nanorlhf.rewards import load_reward
from nanorlhf.tokenizer import load_tokenizer


def pipeline(out, monkeypatch):
    """Runs the command here; returns what it printed."""
    monkeypatch.setattr(sys, "argv", ["nanorlhf", "--out", str(out), "--scale", "0.01", "--processes", "1"])
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main()
    return said.getvalue()


def record_streams(monkeypatch):
    """From now on, notes who starts which random stream. Returns {(keys given to seed_for, row): [stage or policy, ...]}, where
    the keys are None if the seed does not come from seed_for."""
    started, keys_of, stage = collections.defaultdict(list), {}, ["the table"]
    seed_for, philox, generator, table_row = training.seed_for, np.random.Philox, torch.Generator, nanorlhf.evaluate.table_row

    def record_seed(seed, *keys):
        value = seed_for(seed, *keys)
        keys_of[value] = keys_of.get(seed, ()) + keys
        return value

    def record_philox(key):
        seed, row = key if isinstance(key, list) else (key, 0)
        started[keys_of.get(seed), row].append(stage[-1])
        return philox(key=key)

    class RecordGenerator(generator):
        def manual_seed(self, seed):
            started[keys_of.get(seed), 0].append(stage[-1])
            return super().manual_seed(seed)

    def within(name, function):
        def call(*args):
            stage.append(name(*args))
            try:
                return function(*args)
            finally:
                stage.pop()
        return call

    for module in [m for m in sys.modules.values() if vars(m).get("seed_for") is seed_for]:
        monkeypatch.setattr(module, "seed_for", record_seed)
    monkeypatch.setattr(np.random, "Philox", record_philox)
    monkeypatch.setattr(torch, "Generator", RecordGenerator)
    monkeypatch.setattr(nanorlhf.evaluate, "table_row", within(lambda evaluation, name, *_: name, table_row))
    for module in SCRIPTS.values():
        entry = entry_of(module)
        monkeypatch.setattr(module, entry.__name__, within(lambda config: config.out.rsplit("/", 1)[-1], entry))
    training.epoch_order.cache_clear()
    return started


@pytest.fixture(scope="module")
def run_once(tmp_path_factory):
    out = tmp_path_factory.mktemp("pipeline") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        streams = record_streams(monkeypatch)
        said = pipeline(out, monkeypatch)
    return out, said, streams


@pytest.fixture
def finished(run_once):
    return run_once[:2]


def test_the_pipeline_writes_a_table_and_samples_of_every_method(finished):
    out, said = finished
    rows = json.loads((out / "table.json").read_text(encoding="utf-8"))["rows"]
    assert [r["method"] for r in rows] == [*POLICIES, "best-of-16"]
    for row in rows:
        for column in ("gold/test", "gold/ood_near", "gold/ood_far", "reward/test", "kl", "win_sft", "win_reference",
                       "ead_per_input", "ead_across", "length", "ended", "seconds"):
            value, low, high = row[column]
            assert value == value and (low is None or low <= value <= high), (row["method"], column)
        assert row["method"] == "SFT" or {"gold/ood_far - SFT", "length - SFT", "nli_per_input - SFT"} <= set(row)
        assert {"gap/ood_near", "gap/ood_far", "repetition", "self_bleu_per_input"} <= set(row)
        others = {name for name in (*POLICIES, "best-of-16") if name != row["method"]}
        assert {c for c in row if c.startswith("win/")} == {f"win/{name}" for name in others}
    table = (out / "table.md").read_text(encoding="utf-8")
    assert table.strip() in said and "gap OOD-far" in table and "gold ID - SFT" in table
    page = (out / "report.html").read_text(encoding="utf-8")
    first = {s["method"]: s for s in reversed(read_jsonl(out / "samples.jsonl")) if s["split"] == "ood_far"}
    assert set(first) == {*POLICIES, "best-of-16"}
    for method, sample in first.items():
        assert f"<b>{method}</b>" in page and html.escape(sample["completion"].strip()) in page
    assert page.count("<section class=prompt>") == len({s["prompt"] for s in read_jsonl(out / "samples.jsonl")})
    assert all(f"<td>{folder}</td>" in page for folder in ("base", "rm", *POLICIES.values())) and "surest quarter" in page
    assert "report.html" in said and ('alt="gold reward against KL"' in page) == ("frontier.png" in said)
    assert set(json.loads((out / "table.json").read_text(encoding="utf-8"))["frontier"]) >= {"PPO", "DPO", "best-of-n"}


def test_a_shortened_pipeline_says_that_its_numbers_mean_nothing(finished):
    out, said = finished
    note = json.loads((out / "table.json").read_text(encoding="utf-8"))["note"]
    assert note in said and note in (out / "table.md").read_text(encoding="utf-8")
    assert "shortened to 0.01 of its length" in note and "say nothing" in note


def test_no_two_purposes_share_random_numbers(run_once):
    """Held-out comparisons drawn with the training comparisons' numbers repeat 4 to 5% of their texts. Only methods that are
    compared may share: PPO's and PPO-GT's rollouts, the order of rows, and the policies' samples for the evaluations."""
    streams = run_once[2]
    assert all(keys for keys, _ in streams), "a generator's seed does not come from seed_for"
    of = collections.defaultdict(dict)
    for (keys, row), users in streams.items():
        of[keys[0]][keys, row] = users
    assert set(of) == {"model", "head", "order", "bon", "labels", "rollout", "minibatches", "candidates", "evaluate", "table",
                       "bootstrap"}
    for purpose in ("model", "head", "bon", "labels", "candidates"):
        assert all(len(users) == 1 for users in of[purpose].values()), purpose
    for purpose in ("rollout", "minibatches"):
        assert all(users == ["ppo", "ppo_gold"] for users in of[purpose].values()), purpose
    assert not [users for users in of["order"].values() if {"base", "sft"} <= set(users)]
    policies = [*POLICIES, "best-of-16"]
    for (keys, _), users in of["table"].items():
        alone = [["the table"], ["best-of-16"]] if keys[1].startswith("opponent") or keys[-1] == 16 else []
        assert users in (alone or [policies[:-1]]), keys
    opponents = ["opponent", *(f"opponent {name}" for name in policies[1:])]           # each policy meets the others with its own
    assert {keys[1] for keys, _ in of["table"]} == {"samples", "diversity", *opponents}
    assert {u for users in of["bon"].values() for u in users} == {
        "comparisons", "comparisons_test", "comparisons_ood_near", "comparisons_ood_far", "bon"}


def test_the_pipeline_resumes_where_it_stopped_and_lists_no_plot_that_it_did_not_make(finished, monkeypatch):
    out, said = finished
    assert "frontier.png" in said or not (out / "frontier.png").exists()
    before = (out / "ppo" / "model.safetensors").read_bytes(), (out / "base" / "model.safetensors").stat().st_mtime_ns
    record = json.loads((out / "ppo" / "run.json").read_text(encoding="utf-8"))
    killed = json.dumps({**record, "finished": False})                                 # as if it had been killed at its end
    (out / "ppo" / "run.json").write_text(killed, encoding="utf-8")
    monkeypatch.setitem(sys.modules, "matplotlib", None)                               # as if it were not installed
    said = pipeline(out, monkeypatch)
    assert "] ppo\n" in said and "] base\n" not in said
    assert before == ((out / "ppo" / "model.safetensors").read_bytes(), (out / "base" / "model.safetensors").stat().st_mtime_ns)
    assert "no plot: it needs the extra" in said and "frontier.png" not in said
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<img" not in page and "matplotlib is missing" in page and "<b>PPO</b>" in page


def test_a_folder_cannot_mix_two_recipes(finished):
    """A full run would skip the finished stages of a quick look and report their results as its own."""
    found = subprocess.run([sys.executable, "-m", "nanorlhf", "--out", str(finished[0])], cwd=ROOT, capture_output=True,
                           text=True)
    assert found.returncode == 1 and "another --seed or --scale" in found.stderr and found.stderr.count("\n") == 1


def test_a_study_runs_writes_its_page_and_goes_on_where_it_stopped(finished, tmp_path, monkeypatch, capsys):
    """It begins with the base model, SFT, comparisons and reward model of the pipeline, whose recipe and scale it shares."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "seed-0").symlink_to(finished[0])
    small = Experiment("Small", runs=("rm_500", "best_of_n_rm_500"), fast=("rm_500", "best_of_n_rm_500"), tables=lambda seeds: "no table",
                       plot=lambda axes, seeds: None, claims=[Claim("here", "a reward model is fitted", held_out("rm_500"), "accuracy")])
    monkeypatch.setattr(nanorlhf.study, "EXPERIMENTS", {"small": small})
    monkeypatch.setattr(sys, "argv", ["study", "small", "--fast", "--scale", "0.01", "--processes", "1", "--work",
                                      str(tmp_path / "work"), "--out", str(tmp_path / "out")])
    nanorlhf.study.main()
    said = capsys.readouterr().out
    assert "[10/10] seed-0/best_of_n_rm_500" in said and "report.md" in said and "sft done" not in said
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| a reward model is fitted | here | accuracy |" in page and "| one seed |" in page
    result = json.loads((tmp_path / "out" / "runs" / "seed-0" / "best_of_n_rm_500.json").read_text())
    assert [p["n"] for p in result["measured"]["path"]] == [1, 2, 4, 8, 16, 32, 64, 128] and result["commit"]
    learned = [p["reward"] for p in result["measured"]["path"]]
    assert learned == sorted(learned) and result["options"]["reward"] == "@/rm_500"
    sft = json.loads((tmp_path / "out" / "runs" / "seed-0" / "sft_itself.json").read_text())["measured"]
    assert sft["row"]["kl"] == sft["path"][0]["kl"] == 0 and len(sft["independent"]) == 8 and sft["row"]["ppl"] > 1
    nanorlhf.study.main()
    assert "seed-0/" not in capsys.readouterr().out                                    # no job
    (tmp_path / "out" / "runs" / "seed-0" / "rm_500.json").unlink()                    # its weights are still there
    nanorlhf.study.main()
    said = capsys.readouterr().out
    assert "[1/1] seed-0/rm_500" in said and "rm done" not in said


def test_a_stage_comes_after_the_stages_that_it_reads(tmp_path):
    seen = set()
    for name, _, options in stages(tmp_path, 0, 1.0):
        for value in options.values():
            for used in re.findall(rf"{re.escape(str(tmp_path))}/(\w+)", str(value)):
                assert used in seen, f"{name} reads {used}"
        seen.add(name)
    assert set(POLICIES.values()) <= seen


def test_a_table_over_seeds_has_means_and_students_t_intervals():
    """For any number of seeds, cut at the possible values; the same value in every seed says nothing about the next seed."""
    def over(column, *values):
        return over_seeds([[{"method": "a", column: (v, v - 0.1, v + 0.1)}] for v in values])[0][column]
    assert over("x", 1.0, 2.0, 3.0) == pytest.approx((2.0, 2.0 - 4.3027 / 3 ** 0.5, 2.0 + 4.3027 / 3 ** 0.5), abs=1e-4)
    half = 2.0860 * np.std(range(21), ddof=1) / 21 ** 0.5
    assert over("x", *map(float, range(21))) == pytest.approx((10.0, 10 - half, 10 + half), abs=1e-3)
    assert over("ended", 0.0, 1.0, 0.5) == (0.5, 0.0, 1.0) and within(-3.0, 0.5, -2.0, 2.0) == (-3.0, -3.0, -2.5)
    assert over("gold/test", -2.0, -1.9) == pytest.approx((-1.95, -2.0, -1.95 + 12.7062 * 0.05), abs=1e-3)
    assert over("x", 0.5, 0.5) == (0.5, None, None) and over("seconds", 1.0, 2.0) == (1.5, None, None)
    assert over_seeds([[{"method": "a", "x": (1.0, 0.5, 2.0)}]])[0]["x"] == (1.0, 0.5, 2.0)


def test_the_reward_models_accuracy_has_wilson_intervals(tmp_path):
    """Every pair of a prompt is the only one, so a split's cases are independent."""
    (tmp_path / "rm").mkdir()
    row = {f"eval/{s}/{k}": v for s in ("test", "ood_near", "ood_far") for k, v in
           {"accuracy": 1.0, "pairs": 40, "accuracy_q1": 0.5}.items()}
    (tmp_path / "rm" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    for split in ("test", "ood_near", "ood_far"):
        (tmp_path / f"comparisons_{split}").mkdir()
        (tmp_path / f"comparisons_{split}" / "comparisons.jsonl").write_text('{"score_chosen": 1.0, "score_rejected": 1.0}\n')
    test = reward_model_rows(tmp_path)[0]
    assert test["accuracy"] == pytest.approx((1.0, 0.9124, 1.0), abs=1e-4) and test["ceiling"] == (0.5, None, None)
    assert test["accuracy_q1"] == pytest.approx((0.5, 0.2366, 0.7634), abs=1e-4) and "accuracy_q2" not in test


# ---- The READMEs against the code -----------------------------------------------------------------------------------
READMES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "nanorlhf").rglob("README.md")),
           *sorted((ROOT / "results").rglob("README.md"))]
README = READMES[0].read_text(encoding="utf-8")


def test_the_commands_in_the_readmes_use_existing_options():
    texts = "\n".join(p.read_text(encoding="utf-8") for p in READMES)
    commands = re.findall(r"^python ((?:train|sample)_\w+)\.py ?(.*)$", texts, re.MULTILINE)
    assert len(commands) >= 14
    for script, words in commands:
        known = {f.name for f in fields(SCRIPTS[script].Config)}
        used = set(re.findall(r"--(\w+)", words.split("#")[0]))
        assert used <= known, f"{script}.py: {used - known}"


@pytest.mark.parametrize("readme", READMES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_existing_files(readme):
    for path in re.findall(r"\]\((?!http)([^)#]+)(?:#[\w-]+)?\)", readme.read_text(encoding="utf-8")):
        assert (readme.parent / path).exists(), path


def test_the_sample_texts_are_verbatim_from_the_committed_run():
    samples = (ROOT / "results/reviews/samples.md").read_text(encoding="utf-8")
    section = samples.split("## Review of the book Paper Road: style and ending.")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([\w -]+) \| (.+) \| (-?\d\.\d\d) \|$", README.split("## Run it")[0], re.MULTILINE)
    assert len(rows) == 5
    for method, text, reward in rows:
        assert f"- **{method}** [{reward}] {text.removesuffix(' ...')}" in section, method


def test_the_readmes_table_is_part_of_the_committed_one():
    whole = (ROOT / "results/reviews/table.md").read_text(encoding="utf-8")
    cells = {line.split(" | ")[0]: line for line in reversed(whole.splitlines()) if line.startswith("| ")}   # the first table's
    rows = re.findall(r"^\| ([\w -]+) " + r"\| ([^|]+) " * 6 + r"\|$", README, re.MULTILINE)
    rows = [row for row in rows if f"| {row[0]}" in cells and row[0] != "method"]
    assert len(rows) == 7
    for method, *values in rows:
        full = [c.strip() for c in cells[f"| {method}"].split("|")[2:]]
        assert values == full[:6], method                                   # gold on the three splits, learned, KL, heed
    in_results = (ROOT / "results/README.md").read_text(encoding="utf-8")
    assert all(line in in_results for line in whole.splitlines() if line.startswith("|"))


def test_the_readmes_verdicts_are_part_of_the_committed_report():
    report = (ROOT / "results/study/report.md").read_text(encoding="utf-8")
    section = README.split("## What the papers found")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| claim")]
    assert len(rows) >= 10
    for line in rows:
        assert any(full.startswith(line) for full in report.splitlines()), line


def test_the_code_in_the_readme_is_the_code_of_train_dpo():
    shown = re.search(r"```python\n(    h = .*?)```", README, re.DOTALL)[1]
    assert shown in (ROOT / "train_dpo.py").read_text(encoding="utf-8")


def test_the_reward_function_in_the_readme_works(tmp_path):
    code = re.search(r"```python\n(# check\.py.*?)```", README, re.DOTALL)[1]
    (tmp_path / "check.py").write_text(code)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "What is 3 + 4?", "answer": 7}\n{"prompt": "And 2 + 2?", "answer": 4}\n')
    tokenizer, records = load_tokenizer("reviews"), load_records(tmp_path / "rows.jsonl", "prompt")
    reward = load_reward(f"{tmp_path}/check.py:correct", tokenizer, torch.device("cpu"), records)
    responses = [tokenizer.encode(t) for t in (" 3 + 4 is 7.", " It is 5.")]
    assert reward([tokenizer.encode(r["prompt"]) for r in records], responses, records).tolist() == [1.0, 0.0]


def test_every_experiment_in_the_readme_has_valid_options(tmp_path):
    """Each script accepts its commands under "Try this": all options and values are valid."""
    section = README.split("## Try this")[1].split("\n## ")[0]
    commands = re.findall(r"`python ((?:train|sample)_\w+)\.py ([^`]*)`", section)
    assert len(commands) >= 7
    for script, words in commands:
        config = parse_options(SCRIPTS[script].Config, "", words.split())
        check_options(config)
