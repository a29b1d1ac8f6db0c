"""Reward against KL of every evaluation of every run: `python plot.py $OUT frontier.png [RUN...]`. Needs matplotlib."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(out, file, *names):
    table = json.loads(Path(out, "evaluation", "table.json").read_text())
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True)
    for axis, key, title in zip(axes, ("reward", "eval_reward"), ("reward trained on", "judge never trained on")):
        for name in names or ("ppo", "dpo", "rrhf"):
            rows = [json.loads(r) for r in open(Path(out, name, "metrics.jsonl"))]
            points = [(r["eval/kl"], r[f"eval/{key}"]) for r in rows if f"eval/{key}" in r]
            if not points:                                    # train_dpo.py logs the judge alone
                points = [(t["kl"][0], t["reward/heldout"][0]) for t in table if t["method"] == name]
            axis.plot(*zip(*points), marker="o", markersize=3, label=name.upper())
        curve = json.loads(Path(out, "bon", "curve.json").read_text())
        axis.plot([r["kl"] for r in curve], [r[key] for r in curve], "k--", label=f"best of 1, 2, ... {curve[-1]['n']}")
        axis.set(xlabel="KL to SFT, nats a response", title=f"{title} (held-out prompts)", ylabel="mean reward")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
