"""What the study's runs say: claims of the papers and our figure for each, tables and plots. It only reads measurements.

`seeds` is a list with one entry per seed, {run: what was measured} (experiments.py). A figure is a function (seeds, k) -> number
for seed k, positive where the claim holds. A claim is shown if the 95% interval of the mean over the seeds (Student's t) lies
above 0, reversed if it lies below, and otherwise not shown. Differences are of runs that share their seed, so its base model,
SFT, reward model and prompts.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from nanorlhf.evaluate import markdown_table
from nanorlhf.experiments import FIRST_WORDS, PATH_PROMPTS
from nanorlhf.metrics import mean_and_interval, win_matrix, within


class Claim(NamedTuple):
    source: str                      # paper and place
    text: str                        # as the paper has it, in our words
    figure: Callable                 # (seeds, k) -> number
    unit: str                        # what the figure is
    why: dict = {}                   # {verdict: why we think so}


class Experiment(NamedTuple):
    title: str
    runs: tuple                      # how the names of its runs begin
    fast: tuple                      # those of --fast
    claims: list
    tables: Callable                 # seeds -> Markdown
    plot: Callable                   # (axes, seeds) -> None


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
    """Returns (mean over the seeds, low end, high end of its 95% interval); None if a run that it needs is missing."""
    try:
        return within(*mean_and_interval([figure(seeds, k) for k in range(len(seeds))]))
    except KeyError:
        return None


def verdict(interval, count):
    """Returns "shown", "reversed" or "not shown"; of a single seed, which has no interval, "one seed"."""
    if interval is None:
        return "not run"
    mean, low, high = interval
    if count == 1:
        return "one seed"
    return "shown" if (mean if low is None else low) > 0 else "reversed" if (mean if high is None else high) < 0 else "not shown"


# ---- The frontier ---------------------------------------------------------------------------------------------------

METHODS = {"DPO": ("dpo_",), "IPO": ("ipo_",), "Unlikelihood": ("unlikelihood_",), "Preferred-FT": ("preferred_ft",),
           "RRHF": ("rrhf",), "best-of-n": ("best_of_n_rm",), "PPO": ("ppo_target", "ppo_beta"), "PPO-GT": ("ppo_gt",)}
LEVELS = (1, 2, 4, 8)


def runs_of(method, runs):
    """Returns the names of a method's runs: RRHF and best-of-n have one, the others all that begin alike."""
    exact = method in ("RRHF", "best-of-n")
    return [name for name in runs if any(name == p if exact else name.startswith(p) for p in METHODS[method])]


def path_of(run):
    """Returns [(KL, gold reward)] of a run's evaluations; of one without any, its end, on the same prompts."""
    if run.get("path"):
        return [(p["kl"], p["gold"]) for p in run["path"]]
    return [(run["row"]["kl"], float(np.mean(run["scores"][:PATH_PROMPTS])))]


def best_within(method, level):
    """Returns the figure: gold reward of the method's best point with a KL of at most `level`, SFT itself included.

    A maximum over many noisy points is too high. So the point, a run and a step, is chosen by its mean over the other seeds, and
    the figure is the gold reward of that point in this seed. With one seed there is nothing else to choose by.
    """
    def figure(seeds, k):
        others = [s for i, s in enumerate(seeds) if i != k] or seeds
        points = {("sft_itself", 0): ([0.0] * len(others), [path_of(s["sft_itself"])[0][1] for s in others])}
        for name in runs_of(method, seeds[k]):
            for i, _ in enumerate(path_of(seeds[k][name])):
                points[name, i] = zip(*(path_of(s[name])[i] for s in others))
        if len(points) == 1:
            raise KeyError(method)
        means = {point: tuple(np.mean(list(v)) for v in values) for point, values in points.items()}
        name, i = max((p for p, (kl, _) in means.items() if kl <= level), key=lambda p: means[p][1])
        return path_of(seeds[k][name])[i][1]
    return figure


def frontier_tables(seeds):
    rows, gaps = [], []
    for method in METHODS:
        rows.append({"method": method} | {kl: over_seeds(best_within(method, kl), seeds) for kl in LEVELS})
        gaps.append({"method": method} | {kl: over_seeds(minus(best_within(method, kl), best_within("PPO", kl)), seeds)
                                          for kl in LEVELS if method != "PPO"})
    columns = {kl: (f"KL ≤ {kl}", ".2f") for kl in LEVELS}
    return ("Gold reward of each method's best point within a KL; the point is chosen on the other seeds.\n\n"
            f"{markdown_table(rows, columns)}\n\nThe same minus PPO's, paired by seed.\n\n{markdown_table(gaps, columns)}\n")


def frontier_plot(axes, seeds):
    for i, method in enumerate(METHODS):
        points = [p for s in seeds for name in runs_of(method, s) for p in path_of(s[name])]
        if points:
            axes.scatter(*zip(*points), s=6, color=f"C{i}", alpha=0.35)
            best = [(kl, over_seeds(best_within(method, kl), seeds)[0]) for kl in (0.5, 1, 2, 3, 4, 6, 8, 12, 16)]
            axes.plot(*zip(*best), color=f"C{i}", label=method)
    axes.set(xlabel="KL(policy || SFT), nats per response", ylabel="gold reward", xscale="symlog", xlim=(0, 40), ylim=(-1.6, 1))
    axes.legend(fontsize=7)


# ---- Kirk: generalisation and diversity -----------------------------------------------------------------------------

KIRK_RUNS = {"SFT": "sft_itself", "DPO 0.5": "dpo_beta_0.5", "RRHF": "rrhf", "best-of-16": "best_of_16",
        "PPO β 0.4": "ppo_beta_0.4", "PPO β 0.2": "ppo_beta_0.2", "PPO β 0.1": "ppo_beta_0.1", "PPO β 0.05": "ppo_beta_0.05",
        "PPO β 0.02": "ppo_beta_0.02", "PPO target 6": "ppo_target_6"}
DIVERSITY = {"ead_per_input": "EAD", "ead_first_per_input": f"EAD, {FIRST_WORDS} words", "nli_per_input": "NLI",
             "ead_first_across": f"EAD across, {FIRST_WORDS} words", "self_bleu_per_input": "Self-BLEU"}


def lost_diversity(run, column):
    """Returns the figure: how much less diverse than SFT the run is, as a share of SFT's diversity."""
    def figure(seeds, k):
        sft = seeds[k]["sft_itself"]["row"][column]
        return 1 - seeds[k][run]["row"][column] / sft
    return figure


def kirk_tables(seeds):
    rows = []
    of_row = ("kl", "gold/test", "gold/ood_near", "gold/ood_far", "gap/ood_near", "gap/ood_far", *DIVERSITY)
    for name, run in KIRK_RUNS.items():
        rows.append({"method": name} | {column: over_seeds(row(run, column), seeds) for column in of_row})
    rows = [r for r in rows if r["kl"]]
    scores = {"kl": ("KL", ".1f"), "gold/test": ("gold ID", ".2f"), "gold/ood_near": ("OOD-near", ".2f"),
              "gold/ood_far": ("OOD-far", ".2f"), "gap/ood_near": ("gap near", ".2f"), "gap/ood_far": ("gap far", ".2f")}
    texts = {"kl": ("KL", ".1f")} | {column: (name, ".2f") for column, name in DIVERSITY.items()}
    here = {name: run for name, run in KIRK_RUNS.items() if all(run in s for s in seeds)}
    wins = [win_matrix({name: s[run]["independent"] for name, run in here.items()}) for s in seeds]
    matrix = [{"method": a} | {b: within(*mean_and_interval([w[a, b][0] for w in wins]), 0, 1) for b in here if b != a}
              for a in here]
    return (f"{markdown_table(rows, scores)}\n\n{markdown_table(rows, texts)}\n\nWin rate of the row over the column, by gold "
            f"reward on ID prompts; the two texts share no random numbers.\n\n"
            f"{markdown_table(matrix, {name: (name, '.0%') for name in here}, 'win rate over')}\n")


def kirk_plot(axes, seeds):
    groups = {"PPO": ("ppo_target", "ppo_beta"), "PPO-GT": ("ppo_gt",), "DPO": ("dpo_",), "RRHF": ("rrhf",),
              "best-of-16": ("best_of_16",)}
    for i, (label, starts) in enumerate(groups.items()):
        points = [(r["row"]["kl"], r["row"]["ead_first_per_input"]) for s in seeds for name, r in s.items()
                  if name.startswith(starts) and "row" in r]
        if points:
            axes.scatter(*zip(*points), s=14, color=f"C{i}", label=label)
    axes.axhline(over_seeds(row("sft_itself", "ead_first_per_input"), seeds)[0], color="grey", linestyle=":", label="SFT")
    axes.set(xlabel="KL(policy || SFT), nats per response", xscale="symlog", xlim=(0, 40),
             ylabel=f"EAD per input, {FIRST_WORDS} words")
    axes.legend(fontsize=7)


# ---- Temperature and time -------------------------------------------------------------------------------------------


def at_temperature(policy, temperature, what="win"):
    def figure(seeds, k):
        return next(r[what] for r in seeds[k]["temperatures"][policy] if r["temperature"] == temperature)
    return figure


def lost_by_heat(policy):
    """Returns the figure: the win rate at temperature 0 minus that at 1."""
    return minus(at_temperature(policy, 0.0), at_temperature(policy, 1.0))


def share_of_gain(run, share):
    """Returns the figure: the share of the final gain in gold reward over SFT that is there after this share of the steps."""
    def figure(seeds, k):
        path, start = seeds[k][run]["path"], path_of(seeds[k]["sft_itself"])[0][1]
        early = min(path, key=lambda p: abs(p["step"] - share * path[-1]["step"]))
        final = path[-1]["gold"] - start
        return (early["gold"] - start) / final if final else math.nan
    return figure


def temperature_tables(seeds):
    if not all("temperatures" in s for s in seeds):
        return ""
    heats = [r["temperature"] for r in seeds[0]["temperatures"]["sft"]]
    names = seeds[0]["temperatures"]
    rows = [{"method": name} | {t: over_seeds(at_temperature(name, t), seeds) for t in heats} for name in names]
    runs = [name for name in ("dpo_beta_0.5", "ppo_target_6", "rrhf") if name in seeds[0]]
    shares = (0.2, 0.4, 0.6, 0.8)
    times = [{"method": name} | {share: over_seeds(share_of_gain(name, share), seeds) for share in shares} for name in runs]
    return ("Win rate against the data's own answers, by gold reward.\n\n"
            f"{markdown_table(rows, {t: (f'temperature {t:g}', '.0%') for t in heats})}\n\n"
            "Share of the final gain in gold reward after a share of the steps.\n\n"
            f"{markdown_table(times, {share: (f'{share:.0%} of the steps', '.0%') for share in shares})}\n")


def temperature_plot(axes, seeds):
    for i, name in enumerate(seeds[0].get("temperatures", {})):
        heats = [r["temperature"] for r in seeds[0]["temperatures"][name]]
        axes.plot(heats, [over_seeds(at_temperature(name, t), seeds)[0] for t in heats], "o-", color=f"C{i}", label=name)
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
    return lambda seeds, k: seeds[k][run]["perplexity"]


def rrhf_tables(seeds):
    rows = []
    for name, run in ({"SFT": "sft_itself"} | SOURCES).items():
        found = {"learned": learned(run), "gold": row(run, "gold/test"), "kl": row(run, "kl"), "perplexity": perplexity(run)}
        if name != "SFT":
            found |= {"mean": candidates(run, "mean"), "best": candidates(run), "std": candidates(run, "std"),
                      "accuracy": lambda seeds, k, run=run: seeds[k][run]["accuracy"]}
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
            "1,500, two responses per prompt": "rm_wide", "1,500, four responses per prompt": "rm_deep",
            "1,000, prior precision 1": "rm_1000_prior_1", "1,000, prior precision 10": "rm_1000_prior_10"}
OPTIMISED = {"PPO, β 0.02": "ppo_beta_0.02", "PPO, β 0.02, weak reward model": "ppo_rm_500", "best-of-n": "best_of_n_rm",
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
    """Returns the figure: the learned reward at the last evaluation minus that at the one before half of it."""
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
        start = path[0]["gold"] if "n" in path[0] else path_of(seeds[k]["sft_itself"])[0][1]
        return fit(path, start, log)[("α", "β", "error").index(what)]
    return figure


def exact(method, what="share"):
    return lambda seeds, k: seeds[k]["exact"][method][what]


def at_step(run, share):
    """Returns the figure: gold reward after this share of the steps."""
    def figure(seeds, k):
        path = seeds[k][run]["path"]
        return min(path, key=lambda p: abs(p["step"] - share * path[-1]["step"]))["gold"]
    return figure


def at_the_end(run, what):
    return lambda seeds, k: seeds[k][run]["path"][-1][what]


def chaudhari_tables(seeds):
    feedback = [{"method": name} | {c: over_seeds(held_out(run, c), seeds) for c in ("accuracy", "loss", "ece")}
                for name, run in FEEDBACK.items()]
    held_out_columns = {"accuracy": ("accuracy", ".1%"), "loss": ("loss", ".3f"), "ece": ("calibration error", ".3f")}

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


# ---- The experiments ------------------------------------------------------------------------------------------------

DPO, KIRK, RRHF, MDP = "Rafailov 2023, §6", "Kirk 2023", "Yuan 2023", "Chaudhari 2024"
COMMON = ("base", "sft", "comparisons", "comparisons_test", "comparisons_ood_near", "comparisons_ood_far", "rm", "sft_itself")

EXPERIMENTS = {
    "frontier": Experiment(
        "Reward against KL",
        runs=("ppo_target", "ppo_beta", "ppo_gt", "dpo_", "ipo_", "unlikelihood_", "preferred_ft", "rrhf", "best_of_n_rm"),
        fast=("ppo_target_6", "ppo_beta_0.05", "ppo_gt_target_6", "dpo_beta_0.1", "dpo_beta_0.5", "unlikelihood_1.0",
              "preferred_ft", "rrhf", "best_of_n_rm"),
        claims=[
            *(Claim(DPO, f"DPO earns more reward than PPO at the same KL ({kl} nats)",
                    minus(best_within("DPO", kl), best_within("PPO", kl)), f"gold within KL {kl}, DPO − PPO") for kl in (2, 8)),
            *(Claim(DPO, f"... even than PPO on the true reward ({kl} nats)",
                    minus(best_within("DPO", kl), best_within("PPO-GT", kl)), f"gold within KL {kl}, DPO − PPO-GT")
              for kl in (2, 8)),
            Claim(DPO, "PPO on the true reward is better with normalised rewards", gain("ppo_gt_whiten", "ppo_gt_target_6"),
                  "gold, whitened − not"),
            Claim(DPO, "Preferred-FT is the weaker baseline", gain("dpo_beta_0.5", "preferred_ft"), "gold, DPO − Preferred-FT"),
            Claim(DPO, "Unlikelihood with α = 1 degenerates", gain("unlikelihood_0.5", "unlikelihood_1.0"),
                  "gold, α 0.5 − α 1"),
            Claim(DPO, "best-of-n is near its ceiling at n = 64 to 128",
                  lambda seeds, k: (lambda g: (g[64] - g[1]) / 6 - (g[128] - g[64]))(
                      {p["n"]: p["gold"] for p in seeds[k]["best_of_n_rm"]["path"]}),
                  "gold, mean doubling up to 64 − the doubling to 128")],
        tables=frontier_tables, plot=frontier_plot),
    "kirk": Experiment(
        "Generalisation and diversity",
        runs=("best_of_16", "ppo_", "dpo_beta_0.5", "rrhf"),
        fast=("best_of_16", "ppo_target_6", "ppo_beta_0.05", "ppo_beta_0.4", "dpo_beta_0.5", "rrhf"),
        claims=[
            Claim(KIRK, "RLHF is better than SFT out of distribution", gain("ppo_target_6", column="gold/ood_far"),
                  "gold OOD-far, PPO − SFT"),
            Claim(KIRK, "RLHF's lead grows with the shift",
                  minus(gain("ppo_target_6", column="gold/ood_far"), gain("ppo_target_6")), "PPO − SFT, OOD-far − ID"),
            *(Claim(KIRK, f"best-of-16 is better than RLHF ({name})", gain("best_of_16", "ppo_target_6", f"gold/{split}"),
                    f"gold {name}, best-of-16 − PPO") for split, name in (("test", "ID"), ("ood_far", "OOD-far"))),
            Claim(KIRK, "the reward model is worse out of distribution", minus(held_out("rm"), held_out("rm", split="ood_far")),
                  "accuracy, ID − OOD-far"),
            Claim(KIRK, "RLHF lowers diversity per input", lost_diversity("ppo_target_6", "ead_first_per_input"),
                  f"share of SFT's EAD ({FIRST_WORDS} words) lost"),
            Claim(KIRK, "... by meaning too", gain("sft_itself", "ppo_target_6", "nli_per_input"), "NLI, SFT − PPO"),
            Claim(KIRK, "... and more than across inputs", minus(lost_diversity("ppo_target_6", "ead_first_per_input"),
                  lost_diversity("ppo_target_6", "ead_first_across")), "share of EAD lost, per input − across"),
            Claim(KIRK, "a larger KL coefficient lowers performance", gain("ppo_beta_0.05", "ppo_beta_0.4"),
                  "gold, β 0.05 − β 0.4"),
            Claim(KIRK, "... and diversity per input as well", gain("ppo_beta_0.05", "ppo_beta_0.4", "ead_first_per_input"),
                  "EAD, β 0.05 − β 0.4")],
        tables=kirk_tables, plot=kirk_plot),
    "temperature": Experiment(
        "Temperature and time",
        runs=("temperatures", "preferred_ft", "dpo_beta_0.5", "ppo_target_6", "rrhf"),
        fast=("temperatures", "preferred_ft", "dpo_beta_0.5", "ppo_target_6", "rrhf"),
        claims=[
            Claim(DPO, "DPO is less sensitive to the temperature than PPO",
                  minus(lost_by_heat("ppo_target_6"), lost_by_heat("dpo_beta_0.5")),
                  "win rate lost from temperature 0 to 1, PPO − DPO"),
            Claim(DPO, "DPO wins more than PPO at temperature 0",
                  minus(at_temperature("dpo_beta_0.5", 0.0), at_temperature("ppo_target_6", 0.0)), "win rate, DPO − PPO"),
            Claim(DPO, "DPO is near its best early in training", minus(share_of_gain("dpo_beta_0.5", 0.4), 0.8),
                  "share of the final gain after 40% of the steps − 80%")],
        tables=temperature_tables, plot=temperature_plot),
    "rrhf": Experiment(
        "RRHF and its candidates",
        runs=("rrhf", "ppo_target_6"),
        fast=("rrhf_p", "rrhf_dp", "rrhf_d", "rrhf_op_10", "rrhf_dp_no_rank", "ppo_target_6"),
        claims=[
            Claim(RRHF, "candidates of the policy beside the data's help", minus(learned("rrhf_dp"), learned("rrhf_p")),
                  "learned reward, DP − P"),
            Claim(RRHF, "diverse beams are better than plain ones", minus(learned("rrhf_dp"), learned("rrhf_bp")),
                  "learned reward, DP − BP"),
            Claim(RRHF, "the data's responses help too", minus(learned("rrhf_dp"), learned("rrhf_d")), "learned reward, DP − D"),
            Claim(RRHF, "iterating helps", minus(learned("rrhf_ip_3"), learned("rrhf_dp")), "learned reward, IP-3 − IP-1"),
            Claim(RRHF, "the ranking loss matters", minus(learned("rrhf_dp"), learned("rrhf_dp_no_rank")),
                  "learned reward, with − without L_rank"),
            *(Claim(RRHF, f"a weight of {w} on it is worse", minus(learned("rrhf_dp"), learned(f"rrhf_dp_weight_{w}")),
                    f"learned reward, weight 1 − {w}") for w in (10, 100)),
            Claim(RRHF, "RRHF learns the best of n: its reward is nearer to its candidates' best than to their mean",
                  nearer_to_the_best("rrhf_dp"), "distance to the mean − distance to the best"),
            Claim(RRHF, "sampling online (OP-k) reaches the highest reward", minus(learned("rrhf_op_10"), learned("rrhf_dp")),
                  "learned reward, OP-10 − DP"),
            Claim(RRHF, "... with odd texts, which KL in the reward prevents",
                  minus(perplexity("rrhf_op_10"), perplexity("rrhf_op_10_kl")), "perplexity, OP-10 − with KL"),
            Claim(RRHF, "as a reward model it is weaker than the reward model",
                  minus(held_out("rm"), lambda seeds, k: seeds[k]["rrhf_dp"]["accuracy"]), "accuracy, reward model − RRHF"),
            Claim(RRHF, "RRHF does as well as PPO", minus(learned("rrhf_dp"), learned("ppo_target_6")),
                  "learned reward, DP − PPO")],
        tables=rrhf_tables, plot=rrhf_plot),
    "chaudhari": Experiment(
        "Imperfect reward models",
        runs=("rm_", "comparisons_", "ppo_rm_500", "ppo_sentences", "ppo_target_6", "ppo_beta", "best_of_n", "exact"),
        fast=("rm_500", "rm_2000", "comparisons_noise_1.0", "rm_noise_1.0", "comparisons_deep", "rm_wide", "rm_deep",
              "ppo_rm_500", "ppo_sentences", "ppo_target_6", "ppo_beta_0.02", "best_of_n_rm", "best_of_n_rm_500", "exact"),
        claims=[
            Claim(MDP, "more feedback, a better reward model", minus(held_out("rm"), held_out("rm_500")),
                  "accuracy, 8,000 − 500 comparisons"),
            Claim(MDP, "noisy feedback, a worse one", minus(held_out("rm_noise_0.0"), held_out("rm_noise_1.0")),
                  "accuracy, no noise − noise 1"),
            Claim(MDP, "more prompts are better than more responses to each", minus(held_out("rm_wide"), held_out("rm_deep")),
                  "accuracy, 1,500 pairs: two responses per prompt − four"),
            Claim(MDP, "a prior on the weights helps where feedback is little",
                  minus(held_out("rm_1000_prior_1"), held_out("rm_1000")), "accuracy, prior precision 1 − none"),
            Claim(MDP, "optimised against a weak reward model, the learned reward goes on rising", still_rises("ppo_rm_500"),
                  "learned reward, second half of PPO"),
            Claim(MDP, "... while the true one turns down", turns_down("ppo_rm_500"), "gold, peak − end"),
            Claim(MDP, "... later with a better reward model", minus(turns_down("ppo_rm_500"), turns_down("ppo_beta_0.02")),
                  "gold lost since the peak, weak − better"),
            Claim(MDP, "reward paid sentence by sentence is learned faster",
                  minus(at_step("ppo_sentences", 1 / 3), at_step("ppo_target_6", 1 / 3)),
                  "gold after a third of the steps, sentences − end"),
            *(Claim(DPO, f"{name} reaches the exact optimum", minus(exact(m), 0.95), "share of the possible gain − 95%")
              for name, m in (("PPO", "ppo"), ("DPO on all comparisons", "dpo"), ("DPO on 20,000 comparisons", "dpo_20000")))],
        tables=chaudhari_tables, plot=chaudhari_plot),
}
