"""`python -m nanorlhf`, the README's main command, at a hundredth of its size; and the README against the code."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanorlhf.__main__ import POLICIES, over_seeds, stages

ROOT = Path(__file__).parents[1]


def story(out, *options):
    return subprocess.run([sys.executable, "-m", "nanorlhf", "--out", str(out), "--scale", "0.01", *options], cwd=ROOT,
                          capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("story") / "out"
    found = story(out)
    assert found.returncode == 0, found.stderr
    return out, found.stdout


def test_the_story_ends_with_a_table_of_every_method_and_its_files(finished):
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


def test_the_story_goes_on_where_it_stopped(finished):
    out, _ = finished
    before = (out / "ppo" / "model.safetensors").read_bytes(), (out / "base" / "model.safetensors").stat().st_mtime_ns
    record = json.loads((out / "ppo" / "run.json").read_text(encoding="utf-8"))
    (out / "ppo" / "run.json").write_text(json.dumps({**record, "finished": False}), encoding="utf-8")     # as if killed at its end
    found = story(out)
    assert found.returncode == 0, found.stderr
    assert "] ppo\n" in found.stdout and "] base\n" not in found.stdout
    assert before == ((out / "ppo" / "model.safetensors").read_bytes(), (out / "base" / "model.safetensors").stat().st_mtime_ns)


def test_a_folder_holds_one_recipe(finished):
    """A quick look must not be taken for the real thing: its stages are finished, so they would be passed over."""
    found = subprocess.run([sys.executable, "-m", "nanorlhf", "--out", str(finished[0])], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 1 and "another --seed or --scale" in found.stderr and found.stderr.count("\n") == 1


def test_stages_come_after_what_they_read(tmp_path):
    seen = set()
    for name, _, options in stages(tmp_path, 0, 1.0):
        for value in options.values():
            for used in re.findall(rf"{re.escape(str(tmp_path))}/(\w+)", str(value)):
                assert used in seen, f"{name} reads {used}"
        seen.add(name)
    assert set(POLICIES.values()) <= seen


def test_a_table_over_seeds_has_the_mean_and_students_interval():
    rows = over_seeds([[{"method": "a", "x": (v, 0.1), "seconds": (1.0, None)}] for v in (1.0, 2.0, 3.0)])
    assert rows[0]["x"] == pytest.approx((2.0, 4.30 / 3 ** 0.5)) and rows[0]["seconds"][1] is None


README = (ROOT / "README.md").read_text(encoding="utf-8")
EQUATIONS = re.findall(r"^\| .*\| `([\w/]+\.py):(\d+)` \| `(.+)` \|$", README, re.MULTILINE)


def test_the_readme_points_at_the_line_of_each_equation():
    assert len(EQUATIONS) >= 20
    for file, line, code in EQUATIONS:
        text = (ROOT / file).read_text(encoding="utf-8").split("\n")[int(line) - 1]
        assert code.replace("\\|", "|") in text, f"{file}:{line} is {text.strip()!r}, the README says {code!r}"


def test_the_readmes_commands_name_options_that_exist():
    import importlib
    from dataclasses import fields
    commands = re.findall(r"^python ((?:train|sample)_\w+)\.py ?(.*)$", README, re.MULTILINE)
    assert len(commands) >= 10
    for script, words in commands:
        known = {f.name for f in fields(importlib.import_module(script).Config)}
        used = set(re.findall(r"--(\w+)", words.split("#")[0]))
        assert used <= known, f"{script}.py: {used - known}"


def test_the_readmes_files_exist():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r"`(results/[\w/.-]+)`", README):
        assert (ROOT / path).exists(), path
