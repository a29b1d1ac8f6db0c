"""Tests of the study: its table of runs, what is run again, its figures against values worked out by hand, and the exact optimum."""

import fnmatch
import json
import math
import sys

import numpy as np
import pytest

from conftest import ROOT
from nanorlhf import findings, study
from nanorlhf.errors import NotFinite, UserError
from nanorlhf.experiments import COMMON, MEANINGS, PPO, exact_optimum, runs
from nanorlhf.findings import EXPERIMENTS, best_within, over_seeds, verdict
from nanorlhf.jobs import stages_needed
from nanorlhf.options import check_options
from nanorlhf.study import Options, chosen_runs, jobs_of, main, measurements, report

# ---- The table of runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_every_run_has_valid_options_and_stands_after_those_that_it_reads(scale):
    table, seen = list(runs(3, scale)), set()
    needs = stages_needed(table, "@")
    for name, script, options in table:
        assert name not in seen and set(needs[name]) <= seen, name
        if not callable(script):
            check_options(script.Config(**options))
        if "init" in options and name != "base":
            assert needs[name], name
        seen.add(name)
    assert set(COMMON) <= seen
    for experiment in EXPERIMENTS.values():
        assert set(experiment.fast) <= seen
        assert all(fnmatch.filter(seen, pattern) for pattern in experiment.runs)


def test_the_fast_study_is_a_part_of_the_whole_and_the_whole_is_all_runs():
    fast, whole = (chosen_runs([n for n in EXPERIMENTS if n != "sbert"], fast) for fast in (True, False))
    assert [n for n, experiment in EXPERIMENTS.items() if experiment.extra] == ["sbert"]
    assert set(fast) < set(whole) == {name for name, *_ in runs(0)} - {"sbert"}


def made_up(seed=0):
    """Returns made-up measurements of every run, of the shape that experiments.py writes."""
    rng = np.random.default_rng(seed)
    columns = ["kl", "gold/test", "gold/ood_near", "gold/ood_far", "gap/ood_near", "gap/ood_far", "reward/test", *findings.DIVERSITY, "ppl"]
    found = {}
    for name, _, _ in runs(seed):
        policy = {"row": {c: float(rng.random()) for c in columns}, "independent": rng.random(50).tolist(),
                  "path": [{"step": s, "kl": s / 10, "gold": float(rng.random()), "reward": float(rng.random())}
                           for s in range(5, 31, 5)],
                  "candidates": {"best": 1.0, "mean": 0.0, "std": 1.0}, "accuracy": 0.5}
        found[name] = policy | {"held_out": {f"{s}/{c}": float(rng.random()) for s in ("test", "ood_near", "ood_far")
                                             for c in ("accuracy", "loss", "ece", "ceiling")}}
        if name.startswith("best_of_n"):
            found[name]["path"] = [{"n": 2 ** k, "kl": k / 2, "gold": k / 10, "reward": k / 5} for k in range(8)]
    found["temperatures"] = {p: [{"temperature": t, "gold": 0.0, "win": float(rng.random())} for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
                             for p in ("sft", "dpo_beta_0.5", PPO, "best_of_16")}
    found["sbert"] = {p: {c: float(rng.random()) for c in ("kl", "sbert_per_input", "sbert_across")}
                      for p in (*MEANINGS, "best_of_16")}
    found["exact"] = {m: {"share": 0.9, "kl": 0.1} for m in ("ppo", "dpo", "dpo_20000")}
    return found


def test_every_claim_and_table_finds_the_runs_it_names(tmp_path):
    seeds = [made_up(k) for k in range(3)]
    for name, experiment in EXPERIMENTS.items():
        for claim in experiment.claims:
            assert verdict(over_seeds(claim.figure, seeds), 3) in ("shown", "reversed", "not shown"), claim.text
        only = [{run: s[run] for run in chosen_runs([name], False)} for s in seeds]      # no experiment borrows another's runs
        assert "no figure" not in report([name], only, tmp_path, False), name
        fast = [{run: seeds[0][run] for run in chosen_runs([name], True)}]
        page = report([name], fast, tmp_path, False)
        assert page.count("| one seed |") >= len(experiment.claims) / 2, name


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    report(list(EXPERIMENTS), [made_up(k) for k in range(2)], tmp_path, True)
    assert {p.stem for p in tmp_path.glob("*.png")} == set(EXPERIMENTS)


# ---- Figures by hand ------------------------------------------------------------------------------------------------


def test_verdicts():
    assert verdict((0.3, 0.1, 0.5), 3) == "shown" and verdict((-0.3, -0.5, -0.1), 3) == "reversed"
    assert verdict((0.3, -0.1, 0.7), 3) == "not shown" and verdict(None, 3) == "no figure" and verdict((0.3, None, None), 1) == "one seed"
    assert verdict((0.3, None, None), 3) == "shown"                                    # the same in all seeds


def policy(*path):
    return {"path": [{"step": i + 1, "kl": kl, "gold": gold, "reward": gold} for i, (kl, gold) in enumerate(path)]}


def test_the_best_point_within_a_kl_is_chosen_on_the_other_seeds():
    """Seeds 1 and 2 agree that step 2 is best within KL 2; in seed 0 it is worth 0.1, although step 1 is worth 0.9 there."""
    seeds = [{"dpo_a": policy((1, 0.9), (1.5, 0.1), (3, 2.0))}, {"dpo_a": policy((1, 0.2), (1.7, 0.6), (3, 2.0))},
             {"dpo_a": policy((1, 0.2), (1.9, 0.8), (3, 2.0))}]
    assert best_within("DPO", 2)(seeds, 0) == 0.1 and best_within("DPO", 4)(seeds, 0) == 2.0
    assert best_within("DPO", 2)(seeds, 1) == 0.2 and best_within("DPO", 2, "kl")(seeds, 1) == 1      # 0.55 at step 1, 0.45 at 2
    assert best_within("DPO", 2)(seeds[:1], 0) == 0.9                                  # a single seed has no others
    assert over_seeds(best_within("DPO", 0.5), seeds) is None and over_seeds(best_within("PPO", 2), seeds) is None


def test_where_gold_turns_down_and_how_fast_it_comes():
    sft = policy((0, -0.5))
    seeds = [{"a": policy((1, 0.0), (2, 0.5), (3, 0.3)), "sft_itself": sft}, {"a": policy((1, 0.0), (2, 0.4), (3, 0.6)), "sft_itself": sft}]
    down = findings.turns_down("a")
    assert down(seeds, 0) == 0.0 and down(seeds, 1) == pytest.approx(0.4 - 0.6)        # peak of the other seed: step 3; step 2
    assert findings.at_step("a", 2 / 3)(seeds, 0) == 1.0
    assert findings.early_gain("a", 2 / 3, 0.8)(seeds, 0) == pytest.approx(1.0 - 0.8 * 0.8)
    assert findings.still_rises("a")(seeds, 1) == pytest.approx(0.2)


def test_shares_by_hand():
    one = [{"a": {"row": {"x": 0.3}}, "b": {"row": {"x": 0.5}}, "sft_itself": {"row": {"x": 0.4}},
            "rm": {"held_out": {"test/accuracy": 0.7, "test/ceiling": 0.9}},
            "best_of_n": {"path": [{"n": n, "gold": g} for n, g in ((1, 0.0), (64, 0.9), (128, 1.0))]}}]
    assert findings.lost_diversity("a", "x")(one, 0) == pytest.approx(0.25)
    assert findings.ceiling_share("test")(one, 0) == pytest.approx(0.5)
    assert findings.last_doubling(one, 0) == pytest.approx(0.05 - 0.1)
    assert findings.as_good("a", "b", "x", 0.9)(one, 0) == pytest.approx(-0.1 - 0.9 * 0.1)


@pytest.mark.parametrize("log", [True, False])
def test_gaos_forms_are_recovered_from_exact_data(log):
    path = [{"kl": d * d, "gold": 0.5 + d * (0.7 - 0.2 * (math.log(d) if log else d))} for d in (0.0, 0.5, 1.0, 2.0, 3.0) if d or log is None]
    alpha, beta, error = findings.fit(path, 0.5, log)
    assert (alpha, beta, error) == pytest.approx((0.7, 0.2, 0.0), abs=1e-12)
    assert findings.fit(path, 0.5, not log)[2] > 0.01


def test_ppo_and_dpo_reach_the_exact_optimum():
    """Eq. 4 of Rafailov 2023, with a table per prefix: both get all of the possible gain; with 20,000 comparisons DPO does not."""
    found = exact_optimum(None, 0, 1.0, vocabulary=4)
    assert found["ppo"]["share"] > 0.995 and found["dpo"]["share"] > 0.995
    assert found["dpo_20000"]["kl"] > 10 * found["dpo"]["kl"] > 0 and found["ppo"]["kl"] < 0.01


def test_the_committed_page_follows_from_the_committed_measurements(tmp_path):
    """Without its plots. A run that the table no longer has, or has with other options, is not counted as measured."""
    committed = ROOT / "results" / "study"
    assert jobs_of([name for name, *_ in runs(0)], 0, Options(work=str(tmp_path), out=str(committed))) == []
    found = measurements(range(len(list((committed / "runs").iterdir()))), [name for name, *_ in runs(0)], committed)
    page = (committed / "report.md").read_text(encoding="utf-8")
    for name in EXPERIMENTS:
        page = page.replace(f"![{EXPERIMENTS[name].title}]({name}.png)\n\n", "")
    assert report(list(EXPERIMENTS), found, tmp_path, False) == page


# ---- What is run again ----------------------------------------------------------------------------------------------


def write_result(out, name, seed=0, **changes):
    options = next(o for n, _, o in runs(seed) if n == name)
    file = out / "runs" / f"seed-{seed}" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dict(options=options, scale=1.0, measured={}) | changes))


def test_a_run_with_a_file_is_not_run_again_unless_its_weights_are_needed(tmp_path):
    options = Options(work=str(tmp_path / "work"), out=str(tmp_path / "out"))
    for name in COMMON:
        write_result(tmp_path / "out", name)
    assert jobs_of(COMMON, 0, options) == []
    jobs = {job.name.removeprefix("seed-0/"): job for job in jobs_of([*COMMON, "rrhf_ip_3"], 0, options)}
    assert set(jobs) == {*COMMON, "rrhf_dp", "rrhf_ip_2", "rrhf_ip_3"} - {"sft_itself"}
    assert "seed-0/rrhf_ip_2" in jobs["rrhf_ip_3"].needs and "seed-0/base" in jobs["rrhf_ip_3"].needs
    assert [name for name, job in jobs.items() if job.arguments[3] is not None] == ["rrhf_ip_3"]      # the others only train


def test_a_file_of_other_options_is_an_error_and_not_a_result(tmp_path):
    options = Options(work=str(tmp_path / "work"), out=str(tmp_path / "out"))
    write_result(tmp_path / "out", "sft", options={"lr": 1.0})
    with pytest.raises(UserError, match="measured with other options"):
        jobs_of(["sft"], 0, options)
    write_result(tmp_path / "out", "sft")
    with pytest.raises(UserError, match="another --scale"):
        jobs_of(["sft"], 0, Options(work=str(tmp_path / "work"), out=str(tmp_path / "out"), scale=0.5))


def test_an_unknown_experiment_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["study", "forntier"])
    with pytest.raises(SystemExit, match="forntier: not one of frontier, kirk"):
        main()


def test_a_run_that_diverges_is_a_result_and_the_others_go_on(tmp_path, monkeypatch):
    def diverge(*args):
        raise NotFinite("step 7: loss nan")
    monkeypatch.setattr(study, "run_stage", diverge)
    settings = next(o for n, _, o in runs(0) if n == "unlikelihood_1.0")
    study.run_and_measure("unlikelihood_1.0", settings, tmp_path / "seed-0", tmp_path / "a.json", 0, 1.0)
    assert json.loads((tmp_path / "a.json").read_text())["measured"] == {"diverged": "step 7: loss nan"}
    assert over_seeds(findings.row("a", "kl"), [{"a": {"diverged": "step 7: loss nan"}}]) is None


def test_weights_that_were_trained_with_other_options_are_not_measured(tmp_path):
    settings = next(o for n, _, o in runs(0) if n == "dpo_beta_0.1")
    folder = tmp_path / "seed-0" / "dpo_beta_0.1"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(dict(finished=True, options=settings | {"max_steps": 2, "init": "elsewhere/sft"})))
    with pytest.raises(UserError, match="trained with another --max_steps"):
        study.run_and_measure("dpo_beta_0.1", settings, tmp_path / "seed-0", tmp_path / "a.json", 0, 1.0)
