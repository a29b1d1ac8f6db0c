"""The study: what the four papers found, tried on the built-in task.

    python -m nanorlhf.study [NAME...] [options]      NAME: frontier, kirk, temperature, rrhf, chaudhari; without one, all

Every finished run leaves a small file below --out (runs/seed-N/NAME.json) and is not run again while that file is there. So a
study can be stopped at any moment and continued by the same command, on another machine too: the weights below --work are made
again where another run needs them. At the end stands one page, --out/report.md: each claim as the paper states it, our figure
with its interval over the seeds, and whether it was shown.
"""

import dataclasses
import itertools
import sys
import time
from pathlib import Path

from nanorlhf.errors import UserError
from nanorlhf.experiments import measured, runs
from nanorlhf.files import read_json, write_json
from nanorlhf.jobs import Job, is_finished, run_jobs, run_stage, stages_needed
from nanorlhf.options import check_options, one_line_errors, parse_options
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
    table = {name: (script, settings) for name, script, settings in runs(seed, options.scale)}
    needs = stages_needed([(name, *rest) for name, rest in table.items()], "@")
    # A finished policy is measured against SFT and the reward model, and its perplexity is the base model's.
    needs = {name: needs[name] if name in COMMON else tuple({*needs[name], *COMMON}) for name in table}
    missing = [name for name in names if not has_result(results / f"{name}.json", table[name][1], options.scale)]
    wanted = set(missing)
    for name in reversed(table):                                                       # every run stands after those it reads
        if name in wanted:
            wanted |= set(needs[name])
    jobs = []
    for name, (_, settings) in table.items():
        file = results / f"{name}.json" if name in missing else None
        if name in wanted and not (file is None and is_finished(root / name)):
            jobs.append(Job(f"seed-{seed}/{name}", tuple(f"seed-{seed}/{n}" for n in needs[name]), str(root / f"{name}.log"),
                            run_and_measure, (name, settings, root, file, seed, options.scale)))
    return jobs


COMMON = ("base", "sft", "comparisons", "comparisons_test", "comparisons_ood_near", "comparisons_ood_far", "rm")


def has_result(file, settings, scale):
    if not file.exists():
        return False
    found = read_json(file)
    if found["options"] != settings or found["scale"] != scale:
        raise UserError(f"{file} was measured with other options or another --scale: delete it, or name another --out")
    return True


def run_and_measure(name, settings, root, file, seed, scale):
    """Trains a run unless it is finished, and writes what is kept of it to `file`; with file None it only trains."""
    script = next(script for other, script, _ in runs(seed, scale) if other == name)
    settings_here = {k: v.replace("@/", f"{root}/") if isinstance(v, str) else v for k, v in settings.items()}
    started = time.monotonic()
    if callable(script):
        found = script(root, seed, scale, **settings_here)
    else:
        if not is_finished(root / name):
            run_stage(script.__name__, settings_here, str(root / name))
        if file is None:
            return
        found = measured(script, root / name, root, seed, scale)
    seconds = dict(seconds=round(time.monotonic() - started, 1), of_training=None)
    if (root / name / "seconds.json").exists():
        seconds["of_training"] = read_json(root / name / "seconds.json")["seconds"]
    write_json(file, dict(name=name, seed=seed, scale=scale, script=script.__name__, options=settings, **seconds,
                          commit=git_commit(), measured=found))


def main():
    names = list(itertools.takewhile(lambda a: not a.startswith("-"), sys.argv[1:]))
    options = parse_options(Options, __doc__, sys.argv[1 + len(names):])
    started = time.monotonic()
    with one_line_errors(options, lambda: "the same command continues from here"):
        check_options(options)
        seeds = range(options.seed, options.seed + (1 if options.fast else options.seeds))
        wanted = [name for name, *_ in runs(options.seed) if not names or name in names]
        jobs = [job for seed in seeds for job in jobs_of(wanted, seed, options)]
        run_jobs(jobs, options.processes)
        print(f"{time.monotonic() - started:.0f} seconds")


if __name__ == "__main__":
    main()
