"""What the study's runs say: claims of the papers and our figure for each, tables and plots. It only reads measurements.

`seeds` is a list with one entry per seed, {run: what was measured} (experiments.py). A figure is a function (seeds, k) -> number
for seed k, positive where the claim holds. A claim is shown if the 95% interval of the mean over the seeds (Student's t) lies
above 0, reversed if it lies below, and otherwise not shown. Differences are of runs that share their seed, so its base model,
SFT, reward model and prompts.
"""

import fnmatch
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from nanorlhf.evaluate import markdown_table
from nanorlhf.experiments import BETAS, COVERAGE, FIRST_WORDS, MEANINGS, PPO
from nanorlhf.metrics import mean_and_interval, win_matrix, within


class Claim(NamedTuple):
    source: str                      # paper and place
    text: str                        # as the paper has it, in our words
    figure: Callable                 # (seeds, k) -> number
    unit: str                        # what the figure is
    why: dict = {}                   # {verdict: why we think so}


class Experiment(NamedTuple):
    title: str
    runs: tuple                      # names of its runs; * stands for anything
    fast: tuple                      # names of those of --fast
    claims: list
    tables: Callable                 # seeds -> Markdown
    plot: Callable                   # (axes, seeds) -> None
    extra: str = ""                  # the optional extra that it needs; such an experiment is not among "all"


# ---- Figures --------------------------------------------------------------------------------------------------------


def row(run, column):
    """Returns the figure of one column of a policy's row."""
    return lambda seeds, k: seeds[k][run]["row"][column]


def minus(a, b):
    """Returns the figure a - b of two figures, or of a figure and a number."""
    return lambda seeds, k: a(seeds, k) - (b(seeds, k) if callable(b) else b)


def gain(run, other="sft_itself", column="gold/test"):
    return minus(row(run, column), row(other, column))


def held_out(run, what="accuracy", split="test"):
    return lambda seeds, k: seeds[k][run]["held_out"][f"{split}/{what}"]


def over_seeds(figure, seeds):
    """Returns (mean over the seeds, low end, high end of its 95% interval); None if a run is missing or diverged, or if it
    is a share of nothing."""
    try:
        return within(*mean_and_interval([figure(seeds, k) for k in range(len(seeds))]))
    except (KeyError, ZeroDivisionError):
        return None


def verdict(interval, count):
    """Returns "shown", "reversed" or "not shown"; "one seed" if there is no interval, "no figure" if there is no value."""
    if interval is None:
        return "no figure"
    mean, low, high = interval
    if count == 1:
        return "one seed"
    return "shown" if (mean if low is None else low) > 0 else "reversed" if (mean if high is None else high) < 0 else "not shown"


# ---- The frontier ---------------------------------------------------------------------------------------------------

METHODS = {"DPO": "dpo_*", "IPO": "ipo_*", "Unlikelihood": "unlikelihood_*", "Preferred-FT": "preferred_ft", "RRHF": "rrhf",
           "best-of-n": "best_of_n", "PPO": "ppo_[bt]*", "PPO-GT": "ppo_gt_*"}          # PPO by beta and by target
LEVELS = (1, 2, 4, 8)


def runs_of(method, runs):
    """Returns the names of a method's runs."""
    return fnmatch.filter(runs, METHODS[method])


def path_of(run):
    """Returns [(KL, gold reward)] of a run's evaluations: while it trained, or of its end."""
    return [(p["kl"], p["gold"]) for p in run["path"]]


def best_within(method, level, what="gold"):
    """Returns the figure: gold reward (or KL) of the method's best point with a KL of at most `level`.

    A maximum over many noisy points is too high. So the point, a run and a step, is chosen by its mean over the other seeds, and
    the figure is its value in this seed. That is honest but for two things: a choice by two seeds is noisy, which lowers the
    figure, most where many points are alike; and it is the other seeds' mean KL that is within the level. With one seed there is
    nothing else to choose by. A method without a point within the level has no figure.
    """
    def figure(seeds, k):
        others = [s for i, s in enumerate(seeds) if i != k] or seeds
        means = {(name, i): np.mean([path_of(s[name])[i] for s in others], axis=0)
                 for name in runs_of(method, seeds[k]) for i, _ in enumerate(path_of(seeds[k][name]))}
        name, i = max((p for p, (kl, _) in means.items() if kl <= level), key=lambda p: means[p][1], default=(None, None))
        return seeds[k][name]["path"][i][what]
    return figure


def frontier_tables(seeds):
    best, kls, gaps = [], [], []
    for method in METHODS:
        best.append({"method": method} | {kl: over_seeds(best_within(method, kl), seeds) for kl in LEVELS})
        found = {kl: over_seeds(best_within(method, kl, "kl"), seeds) for kl in LEVELS}
        kls.append({"method": method} | {kl: cell and (cell[0], None, None) for kl, cell in found.items()})
        gaps.append({"method": method} | {kl: over_seeds(minus(best_within(method, kl), best_within("PPO", kl)), seeds)
                                          for kl in LEVELS})
    columns = {kl: (f"KL ≤ {kl}", ".2f") for kl in LEVELS}
    gaps = [g for g in gaps if g["method"] != "PPO"]
    return ("Gold reward of each method's best point within a KL. The point, a run and a step, is chosen on the other seeds.\n\n"
            f"{markdown_table(best, columns)}\n\nThe same minus PPO's, paired by seed.\n\n{markdown_table(gaps, columns)}\n\n"
            f"Mean KL of these points.\n\n{markdown_table(kls, columns)}\n")


def frontier_plot(axes, seeds):
    for i, method in enumerate(METHODS):
        points = [p for s in seeds for name in runs_of(method, s) for p in path_of(s[name])]
        if points:
            axes.scatter(*zip(*points), s=6, color=f"C{i}", alpha=0.35)
            best = [(kl, over_seeds(best_within(method, kl), seeds)) for kl in (0.25, 0.5, 1, 2, 3, 4, 6, 8, 12, 16)]
            axes.plot(*zip(*((kl, cell[0]) for kl, cell in best if cell)), color=f"C{i}", label=method)
    axes.set(xlabel="KL(policy || SFT), nats per response", ylabel="gold reward", xscale="symlog", xlim=(0, 20), ylim=(-1.1, 1))
    axes.legend(fontsize=7)


# ---- Kirk: generalisation and diversity -----------------------------------------------------------------------------

KIRK_RUNS = {"SFT": "sft_itself", "DPO 0.5": "dpo_beta_0.5", "RRHF": "rrhf", "best-of-16": "best_of_16",
             **{f"PPO β {beta}": f"ppo_beta_{beta}" for beta in reversed(BETAS)}}
DIVERSITY = {"ead_per_input": "EAD", "ead_first_per_input": f"EAD, {FIRST_WORDS} words", "nli_per_input": "NLI",
             "self_bleu_per_input": "Self-BLEU", "ead_across": "EAD across",
             "ead_first_across": f"EAD across, {FIRST_WORDS} words", "nli_across": "NLI across"}


def lost_diversity(run, column):
    """Returns the figure: how much less diverse than SFT the run is, as a share of SFT's diversity."""
    return lambda seeds, k: 1 - row(run, column)(seeds, k) / row("sft_itself", column)(seeds, k)


def ceiling_share(split):
    """Returns the figure: the reward model's accuracy above chance as a share of what an oracle reaches on these noisy labels."""
    def figure(seeds, k):
        found = seeds[k]["rm"]["held_out"]
        return (found[f"{split}/accuracy"] - 0.5) / (found[f"{split}/ceiling"] - 0.5)
    return figure


def kirk_tables(seeds):
    of_row = ("kl", "gold/test", "gold/ood_near", "gold/ood_far", "gap/ood_near", "gap/ood_far", *DIVERSITY)
    rows = [{"method": name} | {column: over_seeds(row(run, column), seeds) for column in of_row}
            for name, run in KIRK_RUNS.items()]
    rows = [r for r in rows if r["kl"]]
    scores = {"kl": ("KL", ".1f"), "gold/test": ("gold ID", ".2f"), "gold/ood_near": ("OOD-near", ".2f"),
              "gold/ood_far": ("OOD-far", ".2f"), "gap/ood_near": ("gap near", ".2f"), "gap/ood_far": ("gap far", ".2f")}
    texts = {"kl": ("KL", ".1f")} | {column: (name, ".2f") for column, name in DIVERSITY.items()}
    names = {"accuracy": ("accuracy", ".0%"), "ceiling": ("an oracle's", ".0%"), "share": ("share of the oracle's", ".0%")}
    judge = [{"method": name, "share": over_seeds(ceiling_share(split), seeds)}
             | {c: over_seeds(held_out("rm", c, split), seeds) for c in ("accuracy", "ceiling")}
             for split, name in (("test", "ID"), ("ood_near", "OOD-near"), ("ood_far", "OOD-far"))]
    here = {name: run for name, run in KIRK_RUNS.items() if all(run in s for s in seeds)}
    wins = [win_matrix({name: s[run]["independent"] for name, run in here.items()}) for s in seeds]
    matrix = [{"method": a} | {b: within(*mean_and_interval([w[a, b][0] for w in wins]), 0, 1) for b in here if b != a}
              for a in here]
    return (f"{markdown_table(rows, scores)}\n\n{markdown_table(judge, names, 'reward model on')}\n\nThe labels are noisy, so an "
            f"oracle that knows the true reward agrees with them only so far; the share is of its accuracy above one half.\n\n"
            f"{markdown_table(rows, texts)}\n\nWin rate of the row over the column, by gold reward on ID prompts; the two texts "
            f"share no random numbers.\n\n{markdown_table(matrix, {n: (n, '.0%') for n in here}, 'win rate over')}\n")


def kirk_plot(axes, seeds):
    for i, (label, pattern) in enumerate((METHODS | {"best-of-n": "best_of_16"}).items()):
        rows = [s[name]["row"] for s in seeds for name in fnmatch.filter(s, pattern) if "row" in s[name]]
        points = [(r["kl"], r["ead_first_per_input"]) for r in rows]
        if points:
            axes.scatter(*zip(*points), s=14, color=f"C{i}", label=label)
    axes.axhline(over_seeds(row("sft_itself", "ead_first_per_input"), seeds)[0], color="grey", linestyle=":", label="SFT")
    axes.set(xlabel="KL(policy || SFT), nats per response", xscale="symlog", xlim=(0, 40),
             ylabel=f"EAD per input, {FIRST_WORDS} words")
    axes.legend(fontsize=7)


# ---- Temperature and time -------------------------------------------------------------------------------------------


def at_temperature(policy, temperature):
    """Returns the figure: win rate against the data's own answers at this temperature."""
    def figure(seeds, k):
        return next(r["win"] for r in seeds[k]["temperatures"][policy] if r["temperature"] == temperature)
    return figure


def lost_by_temperature(policy):
    """Returns the figure: the win rate at temperature 0 minus that at 1."""
    return minus(at_temperature(policy, 0.0), at_temperature(policy, 1.0))


def at_step(run, share, what="gold"):
    """Returns the figure: gold or learned reward after this share of the steps, minus SFT's."""
    def figure(seeds, k):
        path = seeds[k][run]["path"]
        return min(path, key=lambda p: abs(p["step"] - share * path[-1]["step"]))[what] - seeds[k]["sft_itself"]["path"][0][what]
    return figure


def early_gain(run, share, part):
    """Returns the figure: the gain in gold reward over SFT after this share of the steps minus this part of the final one."""
    return lambda seeds, k: at_step(run, share)(seeds, k) - part * at_step(run, 1.0)(seeds, k)


def temperature_tables(seeds):
    if not all("temperatures" in s for s in seeds):
        return ""
    grid = [r["temperature"] for r in seeds[0]["temperatures"]["sft"]]
    names = seeds[0]["temperatures"]
    rows = [{"method": name} | {t: over_seeds(at_temperature(name, t), seeds) for t in grid} for name in names]
    shares = (0.2, 0.4, 0.6, 0.8, 1.0)
    times = [{"method": name} | {share: over_seeds(at_step(name, share), seeds) for share in shares}
             for name in ("dpo_beta_0.5", PPO, "rrhf")]
    return ("Win rate against the data's own answers, by gold reward.\n\n"
            f"{markdown_table(rows, {t: (f'temperature {t:g}', '.0%') for t in grid})}\n\n"
            "Gain in gold reward over SFT after a share of the steps.\n\n"
            f"{markdown_table(times, {share: (f'{share:.0%} of the steps', '.2f') for share in shares})}\n")


def temperature_plot(axes, seeds):
    for i, name in enumerate(seeds[0].get("temperatures", {})):
        grid = [r["temperature"] for r in seeds[0]["temperatures"][name]]
        axes.plot(grid, [over_seeds(at_temperature(name, t), seeds)[0] for t in grid], "o-", color=f"C{i}", label=name)
    axes.set(xlabel="sampling temperature", ylabel="win rate against the data's answers")
    axes.legend(fontsize=7)


# ---- RRHF -----------------------------------------------------------------------------------------------------------

SOURCES = {"P: the data's own": "rrhf_p", "BP: + beams": "rrhf_bp", "DP = IP-1: + diverse beams": "rrhf_dp",
           "D: diverse beams alone": "rrhf_d", "+ samples": "rrhf_sample", "IP-2": "rrhf_ip_2", "IP-3": "rrhf_ip_3",
           "OP-10": "rrhf_op_10", "OP-10, KL in the reward": "rrhf_op_10_kl", "DP without L_rank": "rrhf_dp_no_rank",
           "DP, L_rank × 10": "rrhf_dp_weight_10", "DP, L_rank × 100": "rrhf_dp_weight_100"}


def learned(run):
    return row(run, "reward/test")


def candidates(run, what="best"):
    return lambda seeds, k: seeds[k][run]["candidates"][what]


def nearer_to_the_best(run):
    """Returns the figure: the trained policy's distance to its candidates' mean reward minus that to their best."""
    def figure(seeds, k):
        reward, found = learned(run)(seeds, k), seeds[k][run]["candidates"]
        return abs(reward - found["mean"]) - abs(reward - found["best"])
    return figure


def perplexity(run):
    return row(run, "ppl")


def accuracy(run):
    """Returns the figure: accuracy of RRHF's p_i as a reward model."""
    return lambda seeds, k: seeds[k][run]["accuracy"]


def rrhf_tables(seeds):
    rows = []
    for name, run in ({"SFT": "sft_itself"} | SOURCES).items():
        found = {"learned": learned(run), "gold": row(run, "gold/test"), "kl": row(run, "kl"), "perplexity": perplexity(run)}
        if name != "SFT":
            found |= {"mean": candidates(run, "mean"), "best": candidates(run), "std": candidates(run, "std"),
                      "accuracy": accuracy(run)}
        rows.append({"method": name} | {c: over_seeds(figure, seeds) for c, figure in found.items()})
    columns = {"mean": ("candidates' mean", ".2f"), "best": ("their best", ".2f"), "std": ("their spread", ".2f"),
               "learned": ("learned reward", ".2f"), "gold": ("gold", ".2f"), "kl": ("KL", ".2f"),
               "perplexity": ("perplexity", ".2f"), "accuracy": ("accuracy as a reward model", ".0%")}
    return (f"{markdown_table([r for r in rows if r['learned']], columns, 'candidates')}\n\nThe rewards of candidates are the "
            f"learned one, on training prompts; the policy's are on test prompts. Perplexity is that of its texts under the base "
            f"model.\n")


def rrhf_plot(axes, seeds):
    runs = {name: run for name, run in SOURCES.items() if all(run in s for s in seeds)}
    for i, run in enumerate(runs.values()):
        for figure, marker, label in ((candidates(run), "_", "candidates' best"), (learned(run), "o", "trained policy"),
                                      (candidates(run, "mean"), "x", "candidates' mean")):
            axes.plot(i, over_seeds(figure, seeds)[0], marker, color="C0", label=None if i else label)
    axes.set_xticks(range(len(runs)), runs, rotation=40, ha="right", fontsize=7)
    axes.set(ylabel="learned reward")
    axes.legend(fontsize=7)


# ---- Chaudhari: imperfect reward models -----------------------------------------------------------------------------

FEEDBACK = {"500": "rm_500", "1,000": "rm_1000", "2,000": "rm_2000", "4,000": "rm_4000", "8,000": "rm",
            "4,000, labels without noise": "rm_noise_0.0", "4,000, noise 0.5": "rm_noise_0.5", "4,000, noise 1": "rm_noise_1.0",
            "1,000, prior precision 1": "rm_1000_prior_1", "1,000, prior precision 10": "rm_1000_prior_10"}
OPTIMISED = {"PPO, β 0.02": "ppo_beta_0.02", "PPO, β 0.02, weak reward model": "ppo_rm_500", "best-of-n": "best_of_n",
             "best-of-n, weak reward model": "best_of_n_rm_500"}


def turns_down(run):
    """Returns the figure: gold reward at the evaluation where it is highest on the other seeds, minus that at the last."""
    def figure(seeds, k):
        others = [s for i, s in enumerate(seeds) if i != k] or seeds
        mean = np.mean([[p["gold"] for p in s[run]["path"]] for s in others], axis=0)
        path = seeds[k][run]["path"]
        return path[int(mean.argmax())]["gold"] - path[-1]["gold"]
    return figure


def still_rises(run):
    """Returns the figure: the learned reward at the last evaluation minus that at the middle one."""
    def figure(seeds, k):
        path = seeds[k][run]["path"]
        return path[-1]["reward"] - path[(len(path) - 1) // 2]["reward"]
    return figure


def fit(path, start, log):
    """Fits gold(d) = start + d (α - β f(d)) to a path by least squares, where d = sqrt(KL), and f(d) = log d for RL or d for
    best-of-n (Gao 2022). Returns (α, β, root of the mean squared error)."""
    d = np.sqrt([p["kl"] for p in path if p["kl"] > 0])
    gold = np.array([p["gold"] for p in path if p["kl"] > 0]) - start
    design = np.stack([d, -d * (np.log(d) if log else d)], 1)
    (alpha, beta), *_ = np.linalg.lstsq(design, gold, rcond=None)
    return float(alpha), float(beta), float(np.sqrt(np.mean((design @ [alpha, beta] - gold) ** 2)))


def fitted(run, log, what):
    """Returns the figure: one number of `fit` for a run's path. Best-of-n starts at its n = 1, PPO at SFT."""
    def figure(seeds, k):
        path = seeds[k][run]["path"]
        start = (path if "n" in path[0] else seeds[k]["sft_itself"]["path"])[0]["gold"]
        return fit(path, start, log)[("α", "β", "error").index(what)]
    return figure


def exact(method, what="share"):
    return lambda seeds, k: seeds[k]["exact"][method][what]


def at_the_end(run, what):
    return lambda seeds, k: seeds[k][run]["path"][-1][what]


def best_of_16_by(coverage):
    """Returns the figure: gold reward of best-of-16 by the reward model of this coverage."""
    return lambda seeds, k: seeds[k][f"best_of_n_{coverage}"]["path"][-1]["gold"]


def mean_of(*figures):
    return lambda seeds, k: float(np.mean([figure(seeds, k) for figure in figures]))


def chaudhari_tables(seeds):
    feedback = [{"method": name} | {c: over_seeds(held_out(run, c), seeds) for c in ("accuracy", "loss", "ece")}
                for name, run in FEEDBACK.items()]
    held_out_columns = {"accuracy": ("accuracy", ".1%"), "loss": ("loss", ".3f"), "ece": ("calibration error", ".3f")}

    coverage = [{"method": f"{prompts:,}", "responses": (responses, None, None), "labelled": (prompts * responses, None, None)}
                | {c: over_seeds(held_out(f"rm_{prompts}x{responses}", c), seeds) for c in held_out_columns}
                | {"gold": over_seeds(best_of_16_by(f"{prompts}x{responses}"), seeds)} for prompts, responses in COVERAGE]
    coverage_columns = {"responses": ("responses to each", ".0f"), "labelled": ("responses in all", ",.0f"), **held_out_columns,
                        "gold": ("gold of best-of-16 by it", ".2f")}

    sweep = [{"method": f"{beta}", "kl": over_seeds(at_the_end(f"ppo_beta_{beta}", "kl"), seeds)}
             | {c: over_seeds(at_step(f"ppo_beta_{beta}", 1.0, c), seeds) for c in ("reward", "gold")}
             for beta in reversed(BETAS)]
    sweep_columns = {"kl": ("KL", ".1f"), "reward": ("gain in learned reward", ".2f"), "gold": ("gain in gold", ".2f")}

    forms, shown = [], {"log": "d(α − β log d)", "linear": "d(α − βd)"}
    for name, run in OPTIMISED.items():
        figures = {f"last {c}": at_the_end(run, c) for c in ("kl", "reward", "gold")} | {"down": turns_down(run)} | {
            f"{form} {what}": fitted(run, form == "log", what) for form in shown for what in ("α", "β", "error")}
        forms.append({"method": name} | {c: over_seeds(figure, seeds) for c, figure in figures.items()})
    columns = {"last kl": ("KL at the end", ".1f"), "last reward": ("learned reward", ".2f"), "last gold": ("gold", ".2f"),
               "down": ("gold lost since its peak", ".2f")}
    columns |= {f"{form} {what}": (f"{what}, {text}", ".2f") for form, text in shown.items() for what in ("α", "β", "error")}

    optimum = [{"method": name, "share": over_seeds(exact(m), seeds), "kl": over_seeds(exact(m, "kl"), seeds)}
               for name, m in (("PPO", "ppo"), ("DPO, all comparisons", "dpo"), ("DPO, 20,000 comparisons", "dpo_20000"))]
    optimum_columns = {"share": ("share of the gain", ".3f"), "kl": ("KL to the optimum", ".4f")}
    return ("Reward models on 300 held-out comparisons per seed. Noise is the temperature of the judge who labels; it is 0.2 "
            "where nothing is said, and in the held-out labels.\n\n"
            f"{markdown_table([r for r in feedback if r['accuracy']], held_out_columns, 'comparisons')}\n\n"
            "Feedback on a share of 2,000 prompts and of 8 responses to each; all pairs of a prompt are compared.\n\n"
            f"{markdown_table([r for r in coverage if r['accuracy']], coverage_columns, 'prompts')}\n\n"
            f"PPO against the price of KL.\n\n{markdown_table([r for r in sweep if r['kl']], sweep_columns, 'β')}\n\n"
            "Gold reward along KL, with Gao 2022's two forms fitted to its gain over SFT, d = √KL; the error is the root of the "
            f"mean squared one.\n\n{markdown_table([r for r in forms if r['last kl']], columns, 'optimised')}\n\n"
            "A language of 216 responses, where π* can be written down: the share of the possible gain in E[r] − β KL that is "
            f"reached, and KL(π ‖ π*).\n\n{markdown_table([r for r in optimum if r['share']], optimum_columns)}\n")


def chaudhari_plot(axes, seeds):
    for i, (name, run) in enumerate((n, r) for n, r in OPTIMISED.items() if all(r in s for s in seeds)):
        for what, style in (("gold", "o-"), ("reward", "x:")):
            length = min(len(s[run]["path"]) for s in seeds)
            kl, y = ([np.mean([s[run]["path"][j][c] for s in seeds]) for j in range(length)] for c in ("kl", what))
            label = f"{name}: {'gold' if what == 'gold' else 'learned'}"
            axes.plot(np.sqrt(kl), y, style, color=f"C{i}", markersize=4, label=label)
    axes.set(xlabel="√KL(policy || SFT)", ylabel="reward")
    axes.legend(fontsize=6)


# ---- SBERT ----------------------------------------------------------------------------------------------------------


def meaning(policy, over="per_input"):
    """Returns the figure: SBERT diversity of a policy's samples of one prompt, or "across" prompts."""
    return lambda seeds, k: seeds[k]["sbert"][policy][f"sbert_{over}"]


def lost_meaning(policy, over="per_input"):
    return lambda seeds, k: 1 - meaning(policy, over)(seeds, k) / meaning("sft", over)(seeds, k)


def sbert_tables(seeds):
    rows = [{"method": name, "kl": over_seeds(lambda seeds, k, name=name: seeds[k]["sbert"][name]["kl"], seeds)}
            | {over: over_seeds(meaning(name, over), seeds) for over in ("per_input", "across")}
            for name in ("sft", "best_of_16", *MEANINGS[1:])]
    columns = {"kl": ("KL", ".1f"), "per_input": ("SBERT per input", ".3f"), "across": ("SBERT across", ".3f")}
    return (f"{markdown_table(rows, columns)}\n\nThe model is all-MiniLM-L6-v2; Kirk's is another, and these texts are reviews "
            f"of one form, so only differences mean something.\n")


def sbert_plot(axes, seeds):
    names = seeds[0]["sbert"]
    for over, marker in (("per_input", "o"), ("across", "x")):
        points = [(s["sbert"][name]["kl"], s["sbert"][name][f"sbert_{over}"]) for s in seeds for name in names]
        axes.scatter(*zip(*points), marker=marker, s=14, label=over.replace("_", " "))
    axes.set(xlabel="KL(policy || SFT), nats per response", xscale="symlog", xlim=(-0.05, 40), ylabel="SBERT diversity")
    axes.legend(fontsize=7)


# ---- The experiments ------------------------------------------------------------------------------------------------


def rafailov(place, *claim):
    return Claim(f"Rafailov 2023, {place}", *claim)


def kirk(*claim):
    return Claim("Kirk 2023", *claim)


def yuan(*claim):
    return Claim("Yuan 2023", *claim)


def last_doubling(seeds, k):
    """5% of best-of-n's whole gain in gold reward minus the gain of the last doubling, 64 to 128."""
    gold = {p["n"]: p["gold"] for p in seeds[k]["best_of_n"]["path"]}
    return 0.05 * (gold[128] - gold[1]) - (gold[128] - gold[64])


def as_good(run, other, column, part):
    """Returns the figure: the run's gain over SFT minus this part of the other's. Above 0 it loses less than the rest of it."""
    return minus(gain(run, column=column), lambda seeds, k: part * gain(other, column=column)(seeds, k))


FAST_PPO = ("ppo_beta_0.05", PPO, "ppo_beta_0.8")

EXPERIMENTS = {
    "frontier": Experiment(
        "Reward against KL",
        runs=tuple(METHODS.values()),
        fast=(*FAST_PPO, "ppo_gt_beta_0.2", "ppo_gt_beta_0.8", "dpo_beta_0.1", "dpo_beta_0.5", "unlikelihood_1.0", "preferred_ft",
              "rrhf", "best_of_n"),
        claims=[
            *(rafailov("§6.1", f"DPO earns more true reward than PPO within a KL of {kl}",
                       minus(best_within("DPO", kl), best_within("PPO", kl)), f"gold within KL {kl}, DPO − PPO",
                       {"reversed": "DPO stops gaining at a KL of about 2: all it sees is 8,000 comparisons of SFT's texts; PPO "
                                    "has its new texts scored at every step"}) for kl in LEVELS),
            *(rafailov("§6.1", f"DPO earns more than even PPO on the true reward within a KL of {kl}",
                       minus(best_within("DPO", kl), best_within("PPO-GT", kl)), f"gold within KL {kl}, DPO − PPO-GT",
                       {"reversed": "as above, and the true reward has no faults to find"}) for kl in LEVELS),
            rafailov("§6.1", "PPO on the true reward does better with normalised rewards",
                     gain("ppo_gt_whiten", "ppo_gt_target_6"), "gold, rewards whitened − not, both with target KL 6"),
            rafailov("§6", "DPO is better than Preferred-FT", gain("dpo_beta_0.5", "preferred_ft"), "gold, DPO − Preferred-FT"),
            rafailov("App. C.3", "Unlikelihood's texts degenerate",
                     minus(perplexity("unlikelihood_1.0"), perplexity("dpo_beta_0.5")),
                     "perplexity under the base model, Unlikelihood α 1 − DPO"),
            rafailov("§6.2", "best-of-n levels off at n = 64 to 128", last_doubling,
                     "gold, 5% of the whole gain − the last doubling's")],
        tables=frontier_tables, plot=frontier_plot),
    "kirk": Experiment(
        "Generalisation and diversity",
        runs=("best_of_16", "ppo_beta_*", "dpo_beta_0.5", "rrhf"),
        fast=("best_of_16", *FAST_PPO, "dpo_beta_0.5", "rrhf"),
        claims=[
            kirk("RLHF generalises better than SFT", gain(PPO, column="gold/ood_far"), "gold OOD-far, PPO − SFT"),
            kirk("RLHF's lead over SFT grows with the shift", minus(gain(PPO, column="gold/ood_far"), gain(PPO)),
                 "PPO − SFT, OOD-far − ID",
                 {"reversed": "the far domains have aspects and adjectives that no comparison contains"}),
            *(kirk(f"best-of-16 is better than RLHF on {name} prompts", gain("best_of_16", PPO, f"gold/{split}"),
                   f"gold {name}, best-of-16 − PPO") for split, name in (("test", "ID"), ("ood_far", "OOD-far"))),
            kirk("the reward model is less accurate out of distribution", minus(ceiling_share("test"), ceiling_share("ood_far")),
                 "share of an oracle's accuracy, ID − OOD-far"),
            kirk("RLHF lowers the diversity of words per input", lost_diversity(PPO, "ead_first_per_input"),
                 f"share of SFT's EAD ({FIRST_WORDS} words) lost",
                 {"not shown": "it falls with KL, and the same β ends at a different KL in each seed"}),
            kirk("RLHF lowers the diversity of meaning per input", gain("sft_itself", PPO, "nli_per_input"), "NLI, SFT − PPO",
                 {"not shown": "likewise"}),
            kirk("RLHF lowers diversity per input more than across inputs",
                 minus(lost_diversity(PPO, "ead_first_per_input"), lost_diversity(PPO, "ead_first_across")),
                 "share of EAD lost, per input − across",
                 {"reversed": "all prompts get the same few favourite phrases; by embeddings it is as Kirk says"}),
            kirk("a larger KL coefficient lowers performance", gain("ppo_beta_0.05", "ppo_beta_0.8"), "gold, β 0.05 − β 0.8",
                 {"not shown": "in the mean, the true reward is best at 0.1, and lower on both sides"}),
            kirk("a larger KL coefficient lowers diversity per input",
                 gain("ppo_beta_0.05", "ppo_beta_0.8", "ead_first_per_input"), "EAD, β 0.05 − β 0.8",
                 {"reversed": "KL holds the policy near SFT, which is the most diverse"})],
        tables=kirk_tables, plot=kirk_plot),
    "temperature": Experiment(
        "Temperature and time",
        runs=("temperatures", "preferred_ft", "dpo_beta_0.5", PPO, "rrhf"),
        fast=("temperatures", "preferred_ft", "dpo_beta_0.5", PPO, "rrhf"),
        claims=[
            rafailov("§6.2", "DPO depends less on the temperature than PPO",
                     minus(lost_by_temperature(PPO), lost_by_temperature("dpo_beta_0.5")),
                     "win rate lost from temperature 0 to 1, PPO − DPO"),
            rafailov("§6.2", "DPO wins more than PPO at temperature 0",
                     minus(at_temperature("dpo_beta_0.5", 0.0), at_temperature(PPO, 0.0)), "win rate, DPO − PPO"),
            rafailov("§6.2", "DPO is near its best early in training", early_gain("dpo_beta_0.5", 0.4, 0.8),
                     "gain in gold after 40% of the steps − 80% of the final one")],
        tables=temperature_tables, plot=temperature_plot),
    "rrhf": Experiment(
        "RRHF and its candidates",
        runs=("rrhf_*", PPO),
        fast=("rrhf_p", "rrhf_dp", "rrhf_d", "rrhf_op_10", "rrhf_sample", "rrhf_dp_no_rank", PPO),
        claims=[
            yuan("candidates of the policy, beside the data's, raise the reward", gain("rrhf_dp", "rrhf_p", "reward/test"),
                 "learned reward, DP − P"),
            yuan("the data's responses raise it too", gain("rrhf_dp", "rrhf_d", "reward/test"), "learned reward, DP − D"),
            yuan("a second and third round raise it", gain("rrhf_ip_3", "rrhf_dp", "reward/test"), "learned reward, IP-3 − IP-1"),
            yuan("the ranking loss raises it", gain("rrhf_dp", "rrhf_dp_no_rank", "reward/test"),
                 "learned reward, with − without L_rank"),
            *(yuan(f"a weight of {w} on the ranking loss is worse", gain("rrhf_dp", f"rrhf_dp_weight_{w}", "reward/test"),
                   f"learned reward, weight 1 − {w}") for w in (10, 100)),
            yuan("RRHF learns the best of n: its reward is nearer to its candidates' best than to their mean",
                 nearer_to_the_best("rrhf_dp"), "learned reward, distance to the mean − distance to the best",
                 {"shown": "L_ft copies the best candidate and L_rank pushes the others down; without L_rank the reward falls "
                           "short of it"}),
            yuan("drawing candidates online (OP-k) reaches the highest reward", gain("rrhf_op_10", "rrhf_ip_3", "reward/test"),
                 "learned reward, OP-10 − IP-3"),
            yuan("KL in the reward keeps OP-k's texts likely", minus(perplexity("rrhf_op_10"), perplexity("rrhf_op_10_kl")),
                 "perplexity under the base model, OP-10 − with KL"),
            yuan("as a reward model RRHF is weaker than the reward model",
                 minus(held_out("rm"), accuracy("rrhf_dp")), "accuracy, reward model − RRHF"),
            yuan("RRHF is as good as PPO", as_good("rrhf_dp", PPO, "reward/test", 0.9),
                 "gain in learned reward, DP − 90% of PPO's",
                 {"reversed": "PPO draws anew at every step; further rounds (IP-3, OP-10) come nearer"})],
        tables=rrhf_tables, plot=rrhf_plot),
    "chaudhari": Experiment(
        "Imperfect reward models",
        runs=("rm_*", "comparisons_*", "ppo_rm_500", "ppo_sentences", "ppo_[bt]*", "best_of_n*", "exact"),
        fast=("rm_500", "rm_2000", "comparisons_noise_1.0", "rm_noise_1.0", "ppo_rm_500",
              *(f"{what}_{share}" for share in ("2000x2", "500x8") for what in ("comparisons", "rm", "best_of_n")),
              "ppo_sentences", *FAST_PPO, "best_of_n", "best_of_n_rm_500", "exact"),
        claims=[
            Claim("Stiennon 2020", "more feedback makes a better reward model", minus(held_out("rm"), held_out("rm_500")),
                  "accuracy, 8,000 − 500 comparisons"),
            Claim("Chaudhari 2024", "noisy feedback makes a worse one", minus(held_out("rm_noise_0.0"), held_out("rm_noise_1.0")),
                  "accuracy, labels without noise − with noise 1"),
            *(Claim("Chaudhari 2024", f"feedback on a larger share of the {what} makes a better reward model",
                    mean_of(*(minus(held_out(f"rm_{a}"), held_out(f"rm_{b}")) for a, b in pairs)), f"accuracy, {unit}")
              for what, pairs, unit in (
                  ("prompts", (("2000x2", "500x2"), ("2000x8", "500x8")), "2,000 − 500 prompts, mean over 2 and 8 responses"),
                  ("responses", (("500x8", "500x2"), ("2000x8", "2000x2")), "8 − 2 responses, mean over 500 and 2,000 prompts"))),
            Claim("Chaudhari 2024", "with feedback on more of both, the policy earns more of the true reward",
                  minus(best_of_16_by("2000x8"), best_of_16_by("500x2")), "gold of best-of-16, 2,000 x 8 − 500 x 2 responses"),
            Claim("ours", "more prompts are worth more than more responses to each",
                  minus(held_out("rm_2000x2"), held_out("rm_500x8")), "accuracy, 4,000 responses: two per prompt − eight"),
            Claim("ours", "a prior on the weights helps where feedback is little",
                  minus(held_out("rm_1000_prior_1"), held_out("rm_1000")), "accuracy, prior precision 1 − none"),
            Claim("Gao 2022", "further from the reference the learned reward is higher",
                  gain("ppo_target_12", "ppo_target_3", "reward/test"), "learned reward, PPO with target KL 12 − 3"),
            Claim("Gao 2022", "further from the reference the true reward is lower", gain("ppo_target_3", "ppo_target_12"),
                  "gold, PPO with target KL 3 − 12"),
            Claim("Gao 2022", "under optimisation a weak reward model's reward goes on rising", still_rises("ppo_rm_500"),
                  "learned reward, second half of PPO"),
            Claim("Gao 2022", "the true reward turns down meanwhile", turns_down("ppo_rm_500"), "gold, peak − end"),
            Claim("Gao 2022", "it falls less with a better reward model",
                  minus(turns_down("ppo_rm_500"), turns_down("ppo_beta_0.02")),
                  "gold lost since the peak, 500 − 8,000 comparisons"),
            Claim("ours", "a reward paid sentence by sentence is learned faster",
                  minus(at_step("ppo_sentences", 1 / 3, "reward"), at_step(PPO, 1 / 3, "reward")),
                  "learned reward after a third of the steps, sentences − end"),
            *(Claim("Rafailov 2023, Eq. 4", f"{name} gets at least 95% of the possible gain", minus(exact(m), 0.95),
                    "share of the possible gain − 95%")
              for name, m in (("PPO", "ppo"), ("DPO on all comparisons", "dpo"), ("DPO on 20,000 comparisons", "dpo_20000")))],
        tables=chaudhari_tables, plot=chaudhari_plot),
    "sbert": Experiment(
        "Diversity of meaning by SBERT",
        runs=("sbert", *MEANINGS[1:]),
        fast=("sbert", *MEANINGS[1:]),
        claims=[
            kirk("RLHF lowers the diversity of sentence embeddings per input", minus(meaning("sft"), meaning(PPO)),
                 "SBERT, SFT − PPO"),
            kirk("RLHF lowers it across inputs too", minus(meaning("sft", "across"), meaning(PPO, "across")),
                 "SBERT across inputs, SFT − PPO"),
            kirk("it lowers it more per input than across inputs", minus(lost_meaning(PPO), lost_meaning(PPO, "across")),
                 "share of SFT's SBERT lost, per input − across"),
            kirk("RLHF's texts are less diverse than best-of-16's", minus(meaning("best_of_16"), meaning(PPO)),
                 "SBERT, best-of-16 − PPO"),
            kirk("a larger KL coefficient lowers it",
                 minus(meaning("ppo_beta_0.05"), meaning("ppo_beta_0.8")), "SBERT, β 0.05 − β 0.8")],
        tables=sbert_tables, plot=sbert_plot, extra="eval"),
}
