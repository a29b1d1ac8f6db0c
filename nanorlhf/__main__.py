"""The whole pipeline in one command: `python -m nanorlhf` trains every method on the built-in task and compares them.

    base model -> SFT -> comparisons of its samples, labelled by a noisy judge -> reward model -> PPO, PPO on the true
    reward, DPO, Unlikelihood, Preferred-FT, RRHF, best-of-16 -> one table, one plot, one page with all of it

Every stage is a call of its script's own train(Config(...)) or sample(Config(...)), and nothing else. If the command is
stopped at any moment, running it again resumes.
"""

import dataclasses
import functools
import time
from pathlib import Path

import sample_bon
import train_dpo
import train_ppo
import train_rm
import train_rrhf
import train_sft
from nanorlhf import ranks
from nanorlhf.errors import UserError
from nanorlhf.evaluate import Options as EvaluateOptions
from nanorlhf.evaluate import GOLD_RANGE, OVER_PROMPTS, evaluate_policies, markdown_table, possible_range, report
from nanorlhf.files import read_json, read_jsonl, write_json, write_records, write_text
from nanorlhf.jobs import is_finished, run_jobs, stage_jobs
from nanorlhf.metrics import mean_and_interval, share_interval, within
from nanorlhf.options import check_options, one_line_errors, parse_options
from nanorlhf.plot import can_plot, report_page, save_plot
from nanorlhf.run import git_commit


@dataclasses.dataclass
class Options:
    out: str = "out"                 # folder for everything
    seed: int = 0                    # of everything random; with --seeds, of the first run
    seeds: int = 1                   # run the whole pipeline this many times, in out/seed-N, and average the table
    scale: float = 1.0               # multiplies the steps of every stage and the sizes of evaluation; 0.02 is a quick look
    processes: int = 0               # runs at a time; 0 = one per core, and one on a GPU


LABEL_TEMPERATURE = 0.2
N = 16


def stages(out, seed, scale):
    """Yields (name, script module, options of its Config) of every run, in order: the recipe of the reference table."""
    def steps(n):
        return max(2, round(n * scale))

    sft, rm, pairs = f"{out}/sft", f"{out}/rm", f"{out}/comparisons/comparisons.jsonl"
    splits = ("test", "ood_near", "ood_far")
    labels = dict(init=sft, n=2, reward="gold", label_temperature=LABEL_TEMPERATURE, seed=seed, batch_size=256,
                  keep_unfinished=scale < 0.1)                                         # a barely trained model never ends
    yield "base", train_sft, dict(init="scratch", kind="text", packing=False, family="llama", max_steps=steps(800),
                                  batch_size=32, lr=2.5e-3, eval_every=steps(200), seed=seed)
    yield "sft", train_sft, dict(init=f"{out}/base", max_steps=steps(200), batch_size=32, lr=1e-3, seed=seed)
    yield "comparisons", sample_bon, labels | dict(split="train", limit=steps(8000))
    for split in splits:
        yield f"comparisons_{split}", sample_bon, labels | dict(split=split, limit=steps(300))
    yield "rm", train_rm, dict(init=sft, data=pairs, seed=seed, lr=1e-3, max_steps=steps(240), eval_every=steps(120),
                               eval_data=",".join(f"{s}={out}/comparisons_{s}/comparisons.jsonl" for s in splits))
    ppo = dict(init=sft, seed=seed, max_steps=steps(30))                               # beta by the study's frontier
    yield "ppo", train_ppo, ppo | dict(reward=rm, kl_coef=0.2)
    yield "ppo_gold", train_ppo, ppo | dict(reward="gold", value_init=rm, kl_coef=0.05)
    pairwise = dict(init=sft, data=pairs, seed=seed, share_prompts=True)
    yield "dpo", train_dpo, pairwise | dict(max_steps=steps(100))
    for name, alpha in (("unlikelihood", 0.5), ("unlikelihood_1", 1.0)):
        yield name, train_dpo, pairwise | dict(loss="unlikelihood", alpha=alpha, lr=2e-4, max_steps=steps(60))
    yield "preferred_ft", train_sft, dict(init=sft, data=pairs, seed=seed, batch_size=64, lr=2e-4, max_steps=steps(60))
    yield "rrhf", train_rrhf, dict(init=sft, reward=rm, seed=seed, share_prompts=True, num_samples=8, lr=3e-4,
                                   max_steps=steps(50))
    yield "bon", sample_bon, dict(init=sft, reward=rm, n=N, limit=steps(250), seed=seed, batch_size=32)


POLICIES = {"SFT": "sft", "Preferred-FT": "preferred_ft", "Unlikelihood 0.5": "unlikelihood",
            "Unlikelihood 1": "unlikelihood_1", "DPO": "dpo", "RRHF": "rrhf", "PPO": "ppo",
            "PPO-GT": "ppo_gold"}                                                      # Unlikelihood's number is its alpha


def train_all(folders, seed, scale, processes):
    """Runs every stage below the folder of each seed, except those already finished."""
    todo = {folder: list(stages(folder, seed + k, scale)) for k, folder in enumerate(folders)}
    for k, folder in enumerate(folders):
        recipe, own = folder / "recipe.json", dict(seed=seed + k, scale=scale)
        if recipe.exists() and read_json(recipe) != own:
            raise UserError(f"{folder} was made with another --seed or --scale ({recipe}): name another --out")
        for _, script, options in todo[folder]:
            check_options(script.Config(**options))
        write_json(recipe, own)
    jobs = [job for folder in folders for job in stage_jobs(folder, todo[folder], f"{folder.name}/" if len(folders) > 1 else "")]
    run_jobs([job for job in jobs if not is_finished(job.arguments[-1])], processes)


def reward_model_rows(out):
    """Returns one table row per split about the reward model: its accuracy on noisy labels, overall and in quarters by its
    own confidence, and as a ceiling the accuracy of an oracle that knows the gold reward."""
    last = [r for r in read_jsonl(out / "rm" / "metrics.jsonl") if "eval/test/accuracy" in r][-1]
    rows = []
    for split in ("test", "ood_near", "ood_far"):
        pairs = read_jsonl(out / f"comparisons_{split}" / "comparisons.jsonl")
        accuracy, n = last[f"eval/{split}/accuracy"], last[f"eval/{split}/pairs"]
        ceiling = sample_bon.label_ceiling([p["score_chosen"] for p in pairs], [p["score_rejected"] for p in pairs],
                                           LABEL_TEMPERATURE)
        row = {"method": split, "accuracy": share_interval(accuracy, n), "ceiling": (ceiling, None, None)}
        quarters = {k: last.get(f"eval/{split}/accuracy_q{k}") for k in range(1, 5)}
        row |= {f"accuracy_q{k}": share_interval(v, n / 4) for k, v in quarters.items() if v is not None}
        rows.append(row)
    return rows


REWARD_MODEL_COLUMNS = {
    "accuracy": ("accuracy", ".0%"), "ceiling": ("ceiling", ".0%"), "accuracy_q1": ("least sure quarter", ".0%"),
    "accuracy_q2": ("second", ".0%"), "accuracy_q3": ("third", ".0%"), "accuracy_q4": ("surest quarter", ".0%")}
REWARD_MODEL_LEGEND = """- accuracy: share of held-out comparisons that the reward model orders as their noisy labels do
- ceiling: what an oracle with the true reward would reach
- quarters: the accuracy in quarters of the comparisons, by the reward model's own confidence
"""


def evaluate_seed(out, seed, scale, first_words):
    """Evaluates every method below `out`. Returns the table's rows and the sampled texts. first_words: as in evaluate."""
    seconds = {file.parent.name: read_json(file)["seconds"] for file in out.glob("*/seconds.json")}
    print(f"\nevaluation of seed {seed}", flush=True)
    rows, samples = evaluate_policies({name: f"{out}/{folder}" for name, folder in POLICIES.items()}, EvaluateOptions(
        reference=f"{out}/sft", reward=f"{out}/rm", bon=N, seed=seed, num_prompts=max(8, round(250 * scale)),
        diversity_prompts=max(4, round(30 * scale)), first_words=first_words, perplexity=f"{out}/base"))
    for row in rows:
        row["seconds"] = (seconds.get(POLICIES.get(row["method"], "bon"), 0.0), None, None)
    return rows, samples


def over_seeds(tables):
    """Averages rows over the seeds, with 95% intervals (Student's t) over the seeds. A single seed's rows do not change."""
    if len(tables) == 1:
        return tables[0]
    rows = []
    for same in zip(*tables):
        row = {"method": same[0]["method"]}
        for column in same[0]:
            if column != "method" and all(column in r for r in same):
                mean, half = mean_and_interval([r[column][0] for r in same])
                row[column] = within(mean, 0.0 if column == "seconds" else half, *possible_range(column, GOLD_RANGE))
        rows.append(row)
    return rows


def frontier(folders):
    """Returns {method: one list per seed of (KL, gold reward) at each evaluation in training, or at each n of best-of-n}."""
    lines = {}
    for folder in folders:
        for method, stage in POLICIES.items():
            rows = [r for r in read_jsonl(folder / stage / "metrics.jsonl") if "eval/kl" in r]
            lines.setdefault(method, []).append([(r["eval/kl"], r["eval/gold"]) for r in rows])
        curve = read_json(folder / "bon" / "curve.json")
        lines.setdefault("best-of-n", []).append([(r["kl"], r["eval_reward"]) for r in curve])
    return {m: ls for m, ls in lines.items() if any(ls)}


def draw_frontier(axes, lines, sft_gold):
    """Plots gold reward against KL to SFT (Rafailov 2023, Figure 2): one point per evaluation, one colour per method."""
    axes.axhline(sft_gold, color="grey", linestyle=":", label="SFT")
    for i, (method, seeds) in enumerate(lines.items()):
        for k, line in enumerate(seeds):
            axes.plot(*zip(*line), "o-", color=f"C{i}", markersize=3, linewidth=0.8, alpha=0.8, label=None if k else method)
    axes.set(xlabel="KL(policy || SFT), nats per sequence", ylabel="gold reward on held-out prompts", xscale="symlog")
    axes.set(xlim=(0, None), ylim=(-2.05, 1))
    axes.legend(fontsize=8)


def main():
    options, started = parse_options(Options, __doc__), time.monotonic()
    root = Path(options.out)
    with one_line_errors(options, lambda: "the same command resumes from here"):
        check_options(options)
        ranks.refuse()
        folders = [root / f"seed-{options.seed + k}" for k in range(options.seeds)] if options.seeds > 1 else [root]
        train_all(folders, options.seed, options.scale, options.processes)
        results, first_words = [], 0
        for k, folder in enumerate(folders):
            results.append(evaluate_seed(folder, options.seed + k, options.scale, first_words))
            first_words = results[0][0][0]["first_words"][0]            # the first seed's, in every seed's table
        tables, samples = zip(*results)
        rows, lines = over_seeds(tables), frontier(folders)
        judge = over_seeds([reward_model_rows(folder) for folder in folders])
        note = "" if options.scale >= 1 else (
            f"A run shortened to {options.scale:.3g} of its length (--scale): it shows that every stage runs. Its numbers say "
            f"nothing about the methods.")
        intervals = f"over the {options.seeds} seeds, by Student's t" if options.seeds > 1 else OVER_PROMPTS
        judged_by = "The judge is `gold`, the true reward of the built-in task. Perplexity is under the base model."
        table = report(rows, f"{note} {judged_by}".strip(), intervals)
        table += f"\n{markdown_table(judge, REWARD_MODEL_COLUMNS, 'reward model on')}\n\n{REWARD_MODEL_LEGEND}"
        write_text(root / "table.md", table)
        write_json(root / "table.json", dict(rows=rows, judge=judge, seeds=tables, commit=git_commit(), frontier=lines, note=note,
                                             options=dataclasses.asdict(options), seconds=round(time.monotonic() - started)))
        write_records(root / "samples.jsonl", [s for one_seed in samples for s in one_seed])
        draw = functools.partial(draw_frontier, lines=lines, sft_gold=rows[0]["gold/test"][0])
        if plot := can_plot():
            save_plot([draw], root / "frontier.png")
        trained = [folder / name for name in ("base", "rm", *POLICIES.values()) for folder in folders]
        page = report_page([root, *trained], plots=plot, draws={"gold reward against KL": draw}, of_runs=False)
        write_text(root / "report.html", page)
        print(f"\n{table}\n{root}/table.md, table.json, report.html{', frontier.png' if plot else ''}; "
              f"{time.monotonic() - started:.0f} seconds")


if __name__ == "__main__":
    main()
