"""Tests of `python -m nanorlhf`, the README's main command, at 1/100 of its size, and of the READMEs against the code."""

import json
import re
import subprocess
import sys
from dataclasses import fields

import pytest
import torch

from conftest import ROOT, SCRIPTS
from nanorlhf.__main__ import POLICIES, over_seeds, stages
from nanorlhf.data import load_records
from nanorlhf.options import check_options, parse_options
from nanorlhf.rewards import load_reward
from nanorlhf.tokenizer import load_tokenizer


def pipeline(out, *options):
    return subprocess.run([sys.executable, "-m", "nanorlhf", "--out", str(out), "--scale", "0.01", *options], cwd=ROOT,
                          capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("pipeline") / "out"
    found = pipeline(out)
    assert found.returncode == 0, found.stderr
    return out, found.stdout


def test_the_pipeline_writes_a_table_and_samples_of_every_method(finished):
    out, said = finished
    rows = json.loads((out / "table.json").read_text(encoding="utf-8"))["rows"]
    assert [r["method"] for r in rows] == [*POLICIES, "best-of-16"]
    for row in rows:
        for column in ("gold/test", "gold/ood_near", "gold/ood_far", "reward/test", "kl", "win_sft", "win_reference",
                       "ead_per_input", "ead_across", "length", "ended", "seconds"):
            value, half = row[column]
            assert value == value and (half is None or half >= 0), (row["method"], column)
    assert (out / "table.md").read_text(encoding="utf-8").strip() in said
    assert all(name in (out / "samples.md").read_text(encoding="utf-8") for name in POLICIES)
    assert set(json.loads((out / "table.json").read_text(encoding="utf-8"))["frontier"]) >= {"PPO", "DPO", "best-of-n"}


def test_the_pipeline_resumes_where_it_stopped(finished):
    out, _ = finished
    before = (out / "ppo" / "model.safetensors").read_bytes(), (out / "base" / "model.safetensors").stat().st_mtime_ns
    record = json.loads((out / "ppo" / "run.json").read_text(encoding="utf-8"))
    killed = json.dumps({**record, "finished": False})                                 # as if it had been killed at its end
    (out / "ppo" / "run.json").write_text(killed, encoding="utf-8")
    found = pipeline(out)
    assert found.returncode == 0, found.stderr
    assert "] ppo\n" in found.stdout and "] base\n" not in found.stdout
    assert before == ((out / "ppo" / "model.safetensors").read_bytes(), (out / "base" / "model.safetensors").stat().st_mtime_ns)


def test_a_folder_cannot_mix_two_recipes(finished):
    """A full run would skip the finished stages of a quick look and report their results as its own."""
    found = subprocess.run([sys.executable, "-m", "nanorlhf", "--out", str(finished[0])], cwd=ROOT, capture_output=True,
                           text=True)
    assert found.returncode == 1 and "another --seed or --scale" in found.stderr and found.stderr.count("\n") == 1


def test_a_stage_comes_after_the_stages_that_it_reads(tmp_path):
    seen = set()
    for name, _, options in stages(tmp_path, 0, 1.0):
        for value in options.values():
            for used in re.findall(rf"{re.escape(str(tmp_path))}/(\w+)", str(value)):
                assert used in seen, f"{name} reads {used}"
        seen.add(name)
    assert set(POLICIES.values()) <= seen


def test_a_table_over_seeds_has_means_and_students_t_intervals():
    rows = over_seeds([[{"method": "a", "x": (v, 0.1), "seconds": (1.0, None)}] for v in (1.0, 2.0, 3.0)])
    assert rows[0]["x"] == pytest.approx((2.0, 4.30 / 3 ** 0.5)) and rows[0]["seconds"][1] is None


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
    section = samples.split("## Review of the game Northern Circle:")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([\w -]+) \| (.+) \| (-?\d\.\d\d) \|$", README.split("## Run it")[0], re.MULTILINE)
    assert len(rows) == 4
    for method, text, reward in rows:
        assert f"- **{method}** [{reward}] {text.removesuffix(' ...')}" in section, method


def test_the_readmes_table_is_part_of_the_committed_one():
    whole = (ROOT / "results/reviews/table.md").read_text(encoding="utf-8")
    cells = {line.split(" | ")[0]: line for line in whole.splitlines() if line.startswith("| ")}
    rows = re.findall(r"^\| ([\w -]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", README, re.MULTILINE)
    rows = [row for row in rows if f"| {row[0]}" in cells and row[0] != "method"]
    assert len(rows) == 7
    for method, *values in rows:
        full = [c.strip() for c in cells[f"| {method}"].split("|")[2:]]
        assert values == [full[0], full[2], full[3], full[4]], method                  # gold ID, gold OOD-far, learned, KL
    in_results = (ROOT / "results/README.md").read_text(encoding="utf-8")
    assert all(line in in_results for line in whole.splitlines() if line.startswith("|"))


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
