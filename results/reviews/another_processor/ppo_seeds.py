"""PPO of the pipeline's recipe for many seeds, and the stages it needs: `python ppo_seeds.py FIRST COUNT OUT`. Prints a table of
the last evaluation, on 128 prompts, ± half of a 95% interval over them."""

import sys
from pathlib import Path

from nanorlhf.__main__ import stages
from nanorlhf.files import read_jsonl
from nanorlhf.jobs import is_finished, run_jobs, stage_jobs
from nanorlhf.metrics import t_quantile

NEEDED = ("base", "sft", "comparisons", "comparisons_test", "comparisons_ood_near", "comparisons_ood_far", "rm", "ppo")


def main(first, count, out):
    folders = {seed: Path(out) / f"seed-{seed}" for seed in range(first, first + count)}
    jobs = [job for seed, folder in folders.items()
            for job in stage_jobs(folder, [s for s in stages(folder, seed, 1.0) if s[0] in NEEDED], f"seed-{seed}/")]
    run_jobs([job for job in jobs if not is_finished(job.arguments[-1])])
    print("| seed | KL to SFT | learned reward | gold |\n|---:|---:|---:|---:|")
    for seed, folder in folders.items():
        last = [row for row in read_jsonl(folder / "ppo" / "metrics.jsonl") if "eval/kl" in row][-1]
        cells = (f"{last['eval/' + name]:.2f} ± {t_quantile(127) * last[f'eval/{name}_se']:.2f}"
                 for name in ("kl", "reward", "gold"))
        print(f"| {seed} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
