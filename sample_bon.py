"""Best-of-N: draw N responses to each prompt and keep the one a reward likes best (Stiennon 2020; Kirk 2023).

    y = argmax over y_1 ... y_N ~ pi(. | x) of r(x, y_i)           KL(best-of-N || pi) = log N - (N - 1) / N

No weights change. The N samples of a prompt share one prefill. The curve over n = 1, 2, 4, ... N is the unbiased estimate
from the pool of N, under the reward that chooses and under one that only measures (--eval_reward): a single maximum of N
would overstate the first and says nothing of the second.

In --out:  best.jsonl         prompt, completion, score                           (train_sft.py reads it)
           ranked.jsonl       prompt, responses, scores                           (train_rrhf.py --kind ranked reads it)
           comparisons.jsonl  prompt, chosen, rejected, with --label_temperature  (train_rm.py and train_dpo.py read it)
           curve.json         n, reward, eval_reward, kl

--label_temperature makes comparisons as DPO's sentiment setting does: the responses of a prompt are paired, and a judge who
follows the reward only with probability sigmoid((r_a - r_b) / temperature) says which is better (0: always follows it).

With no option it draws best-of-16 from out/sft under out/rm on the built-in test prompts.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from nanorlhf.data import decode_response, encode_prompt, load_records, load_tokenizer
from nanorlhf.evaluate import best_of_n_estimate, bon_kl, mean_and_interval
from nanorlhf.generate import generate, prompt_room
from nanorlhf.model import Transformer
from nanorlhf.rewards import load_reward
from nanorlhf.run import Run, UserError, main, need_folder, seed_for, write_json, write_records


@dataclass
class Config:
    init: str = "out/sft"            # folder of the policy that is sampled
    reward: str = "out/rm"           # chooses: reward-model folder, gold, or file.py:function
    eval_reward: str = ""            # only measured: as --reward; '' = gold, if on `reviews`
    data: str = "reviews"            # prompts: record file, or `reviews`
    split: str = "test"              # of `reviews`: train, test, ood_near or ood_far
    limit: int = 0                   # at most so many prompts; 0 = all (of `reviews`: 4000 to train on, else 500)
    skip_bad: bool = False           # skip bad rows and count them, instead of stopping at the first
    out: str = "out/bon"             # folder for the records
    overwrite: bool = False          # replace a run that is there
    resume: bool = False             # continue the run in --out
    seed: int = 0                    # of everything random
    device: str = "auto"             # cpu, cuda, cuda:1, ...; auto takes a GPU if there is one
    dtype: str = "float32"           # float32, or bfloat16 (autocast)
    compile: bool = False            # torch.compile the layers

    n: int = 16                      # samples a prompt
    label_temperature: float = -1.0  # of the noisy judge who labels comparisons; negative = write none
    max_prompt_length: int = 0       # longest prompt in tokens; 0 = what the context leaves beside the response
    keep_unfinished: bool = False    # write responses cut at response_length too; read back, they end with EOS
    keep: str = "end"                # what a too long prompt keeps: end, start, or tldr (Stiennon 2020's rule)
    response_length: int = 48        # longest response in tokens
    temperature: float = 1.0         # of the samples (Kirk 2023: 0.7)
    top_k: int = 0                   # 0 = off
    top_p: float = 1.0               # 1 = off
    batch_size: int = 64             # prompts at a time


def prefers(score_a, score_b, temperature, rng):
    """Whether a judge prefers a to b: with P = sigmoid((score_a - score_b) / temperature) (Bradley & Terry 1952); at
    temperature 0 the higher score wins, and a tie is a coin's. rng: numpy Generator; one number is drawn."""
    difference = score_a - score_b
    p = 0.5 * (1 + np.tanh(difference / (2 * temperature))) if temperature > 0 else 0.5 * (1 + np.sign(difference))
    return bool(rng.random() < p)


def label_ceiling(scores_a, scores_b, temperature):
    """Expected agreement with these labels of one who knows all scores [N]: mean sigmoid(|a - b| / temperature). No reward
    model can be expected to do better."""
    gap = np.abs(np.asarray(scores_a, dtype=np.float64) - np.asarray(scores_b, dtype=np.float64))
    return float(np.mean(0.5 * (1 + np.tanh(gap / (2 * temperature))))) if temperature > 0 else 1.0


def comparisons(prompt, responses, scores, temperature, rng):
    """All pairs of a prompt's responses with a preference each: records prompt, chosen, rejected and their scores. Pairs of
    equal texts are dropped."""
    records = []
    for a, b in itertools.combinations(range(len(responses)), 2):
        if responses[a] != responses[b]:
            w, l = (a, b) if prefers(scores[a], scores[b], temperature, rng) else (b, a)
            records.append(dict(prompt=prompt, chosen=responses[w], rejected=responses[l], score_chosen=scores[w],
                                score_rejected=scores[l]))
    return records


def usable(scored, keep_unfinished):
    """The record (prompt, responses, scores) of those of a prompt's samples that can be written as text."""
    kept = [i for i, y in enumerate(scored["responses"]) if y.strip() and (keep_unfinished or scored["finished"][i])]
    return dict(prompt=scored["prompt"], **{k: [scored[k][i] for i in kept] for k in ("responses", "scores")})


def train(config):
    run = Run(config, "bon")
    if run.finished:
        return
    init = need_folder(config.init, "python train_sft.py")
    if config.reward == "out/rm":
        need_folder(config.reward, "python train_rm.py")
    if config.n < (2 if config.label_temperature >= 0 else 1):
        raise UserError(f"--n {config.n}: at least one sample a prompt, and two to compare")
    tokenizer = load_tokenizer(init)
    policy = run.prepare(Transformer.from_pretrained(init), tokenizer)
    reward = load_reward(config.reward, tokenizer, run.device)
    measured = config.eval_reward or ("gold" if config.data == "reviews" else "")
    eval_reward = load_reward(measured, tokenizer, run.device) if measured else None
    records = load_records(config.data, "prompt", config.split, config.limit or None, config.skip_bad, tokenizer=tokenizer)
    room = prompt_room(policy, config.response_length)
    prompts = [encode_prompt(tokenizer, r["prompt"], config.max_prompt_length or room, config.keep) for r in records]

    # Each batch of prompts is drawn from its own seed. --resume begins anew: the same seeds draw the same samples.
    run.load_checkpoint({}, {})
    scored = []
    for first in range(0, len(prompts), config.batch_size):
        part = prompts[first:first + config.batch_size]
        with run.autocast():
            samples = generate(policy, part, config.response_length, config.temperature, config.top_k, config.top_p, config.n,
                               seed_for(config.seed, "bon", first), tokenizer=tokenizer)
        responses = samples.responses()
        queries, texts = ([p for p in each for _ in range(config.n)] for each in (
            part, [r["prompt"] for r in records[first:first + config.batch_size]]))
        scores = reward(queries, responses, texts).view(-1, config.n)
        values = eval_reward(queries, responses, texts).view(-1, config.n) if eval_reward else None
        for i in range(len(part)):
            own = slice(i * config.n, (i + 1) * config.n)
            prompt = texts[i * config.n]
            scored.append(dict(prompt=prompt, responses=[decode_response(tokenizer, r, prompt) for r in responses[own]],
                               finished=samples.finished[own].tolist(), scores=scores[i].tolist(),
                               values=values[i].tolist() if eval_reward else None))
        metrics = {"scores/mean": scores.mean(), "scores/best": scores.max(1).values.mean()}
        if eval_reward:
            metrics["eval_reward/of_best"] = values.gather(1, scores.argmax(1, keepdim=True)).mean()
        run.log(len(scored), len(prompts), metrics, tokens=sum(map(len, responses)))

    # Records are text, which a reader ends with EOS: a response that was cut, or is empty, would be taught as what it is not.
    records = [usable(s, config.keep_unfinished) for s in scored]
    if dropped := sum(len(s["responses"]) for s in scored) - sum(len(r["responses"]) for r in records):
        print(f"{dropped} of {len(scored) * config.n} responses are unfinished or empty and not written"
              + ("" if config.keep_unfinished else " (--keep_unfinished writes the unfinished)"))
    best = [(r["prompt"], *max(zip(r["scores"], r["responses"]), key=lambda pair: pair[0])) for r in records if r["responses"]]
    write_records(run.out / "best.jsonl", [dict(prompt=x, completion=y, score=s) for x, s, y in best])
    if config.n > 1:
        write_records(run.out / "ranked.jsonl", [r for r in records if len(r["responses"]) > 1])
    if config.label_temperature >= 0:
        rng = np.random.Generator(np.random.Philox(key=seed_for(config.seed, "labels")))
        pairs = [pair for r in records for pair in comparisons(**r, temperature=config.label_temperature, rng=rng)]
        write_records(run.out / "comparisons.jsonl", pairs)
        if pairs:
            ceiling = label_ceiling([p["score_chosen"] for p in pairs], [p["score_rejected"] for p in pairs],
                                    config.label_temperature)
            print(f"{len(pairs)} comparisons; a perfect judge would agree with {ceiling:.1%} of their labels")

    curve = []
    for n in [2 ** k for k in range(config.n.bit_length()) if 2 ** k < config.n] + [config.n]:
        row = {"n": n, "kl": bon_kl(n)}
        for name, values in (("reward", "scores"), ("eval_reward", "values")):
            if scored[0][values] is not None:
                row[name], row[f"{name}_interval"] = mean_and_interval(
                    [best_of_n_estimate(s["scores"], n, s[values]) for s in scored])
        curve.append(row)
        print("  ".join(f"{k} {v:.4g}" for k, v in row.items()))
    write_json(run.out / "curve.json", curve)
    run.done()


if __name__ == "__main__":
    main(Config, train, __doc__)
