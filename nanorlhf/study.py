"""The study: what the four papers found, tried on the built-in task.

    python -m nanorlhf.study [NAME...] [options]      NAME: frontier, kirk, temperature, rrhf or chaudhari; none means all.
                                                      sbert, which is not among all, needs the extra `eval`

Every finished run leaves a small file below --out (runs/seed-N/NAME.json) and is not run again while that file is there. So a
study can be stopped at any moment and continued by the same command, on another machine too: the weights below --work are made
again where another run needs them. At the end stands one page, --out/report.md: each claim as the paper states it, our figure
with its interval over the seeds, and whether it was shown.
"""

import dataclasses
import fnmatch
import functools
import sys
import time
from pathlib import Path

from nanorlhf import ranks
from nanorlhf.errors import NotFinite, UserError
from nanorlhf.evaluate import cell
from nanorlhf.experiments import COMMON, POLICY_SCRIPTS, PPO, measured, runs
from nanorlhf.files import read_json, write_json, write_text
from nanorlhf.findings import EXPERIMENTS, over_seeds, verdict
from nanorlhf.jobs import Job, is_finished, run_jobs, run_stage, stages_needed
from nanorlhf.options import check_options, leading_words, one_line_errors, parse_options
from nanorlhf.plot import can_plot, save_plot
from nanorlhf.run import git_commit


@dataclasses.dataclass
class Options:
    seeds: int = 3                   # seeds, from --seed on
    seed: int = 0                    # the first seed
    fast: bool = False               # one seed and a part of the runs
    scale: float = 1.0               # multiplies the steps of every run; 0.02 shows that everything runs
    processes: int = 0               # runs at a time; 0 = one per core, and one on a GPU
    work: str = "out/study"          # folder of the weights; what is measured is in --out
    out: str = "results/study"       # folder of the measurements, the plots and the page


def jobs_of(names, seed, options):
    """Returns the Jobs that are still to be done for these runs of one seed: to train and measure each that has no file yet, and
    to train again those whose weights such a run needs."""
    root, results = Path(options.work) / f"seed-{seed}", Path(options.out) / "runs" / f"seed-{seed}"
    table = list(runs(seed, options.scale))
    needs = stages_needed(table, "@")
    for name, script, _ in table:                                  # a policy is measured against SFT, by the reward model, ...
        if script in POLICY_SCRIPTS and name not in COMMON:
            needs[name] = tuple({*needs[name], *COMMON})
    missing = {name for name, _, settings in table
               if name in names and not has_result(results / f"{name}.json", settings, options.scale)}
    wanted = set(missing)
    for name, *_ in reversed(table):                               # every run stands after those that it reads
        if name in wanted:
            wanted |= {n for n in needs[name] if not is_finished(root / n)}
    return [Job(f"seed-{seed}/{name}", tuple(f"seed-{seed}/{n}" for n in needs[name]), str(root / f"{name}.log"), run_and_measure,
                (name, settings, root, results / f"{name}.json" if name in missing else None, seed, options.scale))
            for name, _, settings in table if name in wanted]


def has_result(file, settings, scale):
    if not file.exists():
        return False
    found = read_json(file)
    if found["options"] != settings or found["scale"] != scale:
        raise UserError(f"{file} was measured with other options or another --scale: delete it and the run's folder in --work, "
                        f"or name another --out and --work")
    return True


def check_same(folder, settings):
    """Raises UserError if the finished run in the folder had other options; paths are not compared, for the folder may move."""
    had = read_json(folder / "run.json")["options"]
    if other := [name for name, value in settings.items() if "@/" not in str(value) and had.get(name) != value]:
        raise UserError(f"{folder} was trained with another --{other[0]}: delete it, or name another --work")


def run_and_measure(name, settings, root, file, seed, scale):
    """Trains a run unless it is finished, and writes what is kept of it to `file`; with file None it only trains."""
    script = next(script for other, script, _ in runs(seed, scale) if other == name)
    settings_here = {k: v.replace("@/", f"{root}/") if isinstance(v, str) else v for k, v in settings.items()}
    started = time.monotonic()
    if callable(script):
        found = script(root, seed, scale, **settings_here)
    else:
        found = {}
        if is_finished(root / name):
            check_same(root / name, settings)
        else:
            try:
                run_stage(script.__name__, settings_here, str(root / name))
            except NotFinite as error:                             # a result too: the others go on
                found = {"diverged": str(error)}
        if file is None:
            return
        found = found or measured(script, root / name, root, seed, scale)
    seconds = dict(seconds=round(time.monotonic() - started, 1), of_training=None)
    if (root / name / "seconds.json").exists():
        seconds["of_training"] = read_json(root / name / "seconds.json")["seconds"]
    write_json(file, dict(name=name, seed=seed, scale=scale, script=script.__name__, options=settings, **seconds,
                          commit=git_commit(), measured=found))


def chosen_runs(names, fast):
    """Returns the names of the runs of these experiments, or of their fast parts."""
    patterns = [*COMMON, "sft_itself"]
    for name in names:
        patterns += EXPERIMENTS[name].fast if fast else EXPERIMENTS[name].runs
    return [run for run, *_ in runs(0) if any(fnmatch.fnmatchcase(run, p) for p in patterns)]


def has_runs(name, seeds):
    """True if all runs of an experiment's fast part are measured, whoever asked for them."""
    return all(run in s for s in seeds for run in EXPERIMENTS[name].fast)


def measurements(seeds, names, out):
    """Returns [{run: what was measured}] of the seeds, as far as there are files."""
    folders = [Path(out) / "runs" / f"seed-{seed}" for seed in seeds]
    return [{name: read_json(folder / f"{name}.json")["measured"] for name in names if (folder / f"{name}.json").exists()}
            for folder in folders]


def claims_table(experiment, seeds):
    rows = ["| claim | source | our figure | value | verdict | why, as far as we see |", "|---|---|---|---:|---|---|"]
    for claim in experiment.claims:
        found = over_seeds(claim.figure, seeds)
        answer = verdict(found, len(seeds))
        why = claim.why.get(answer, "")
        rows.append(f"| {claim.text} | {claim.source} | {claim.unit} | {cell(found, '.3f')} | {answer} | {why} |")
    return "\n".join(rows)


def report(names, seeds, out, plots):
    """Returns the page as Markdown and, if `plots`, draws its plots."""
    count = f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed, so without intervals"
    parts = [f"# What the papers found, tried on the built-in task\n\nMeans over {count}; ± is half of a 95% interval over the "
             f"seeds by Student's t. A claim is *shown* if the whole interval of its figure is above 0, *reversed* if it is "
             f"below, and otherwise *not shown*. The claims are in our words. Of as many as stand here, three or so would come "
             f"out shown or reversed if nothing were true. Gold is the true reward. Where one run stands for PPO, it is that "
             f"with β = {PPO.removeprefix('ppo_beta_')}."]
    for name in names:
        experiment = EXPERIMENTS[name]
        parts.append(f"## {experiment.title}\n\n{claims_table(experiment, seeds)}")
        if plots:
            save_plot([functools.partial(experiment.plot, seeds=seeds)], Path(out) / f"{name}.png")
            parts.append(f"![{experiment.title}]({name}.png)")
        parts.append(experiment.tables(seeds))
    return "\n\n".join(parts)


def main():
    names = leading_words()
    options = parse_options(Options, __doc__, sys.argv[1 + len(names):])
    started = time.monotonic()
    with one_line_errors(options, lambda: "the same command continues from here"):
        check_options(options)
        ranks.refuse()
        if unknown := [name for name in names if name not in EXPERIMENTS]:
            raise UserError(f"{unknown[0]}: not one of {', '.join(EXPERIMENTS)}")
        names = names or [name for name, experiment in EXPERIMENTS.items() if not experiment.extra]
        wanted = chosen_runs(names, options.fast)
        seeds = range(options.seed, options.seed + (1 if options.fast else options.seeds))
        order = [name for name, *_ in runs(0)]
        jobs = [job for seed in seeds for job in jobs_of(wanted, seed, options)]
        run_jobs(sorted(jobs, key=lambda job: order.index(job.arguments[0])), options.processes)     # the same run of all seeds
        found = measurements(seeds, order, options.out)
        page = report([name for name in EXPERIMENTS if name in names or has_runs(name, found)], found, options.out, can_plot())
        write_text(Path(options.out) / "report.md", page)
        print(f"{options.out}/report.md; {time.monotonic() - started:.0f} seconds")


if __name__ == "__main__":
    main()
