"""Best-of-N: draw N responses to each prompt, keep the one a reward likes best (Stiennon 2020; Kirk 2023).

    y = argmax over y_1 ... y_N ~ pi(. | x) of r(x, y_i)          KL(best-of-N || pi) = log N - (N - 1) / N

No weights change. The N samples of a prompt share one prefill. The curve over n = 1, 2, 4, ..., N is the
unbiased estimate from the pool of N samples, under the reward that chooses and under one that is only
measured (--eval_reward): taking one maximum of N would overestimate the first and ignore the second.

In --out:  best.jsonl         prompt, completion, score                      for train_sft.py
           ranked.jsonl       prompt, responses, scores                      for train_rrhf.py --kind ranked
           comparisons.jsonl  prompt, chosen, rejected (--label_temperature) for train_rm.py and train_dpo.py
           curve.json         n, reward, eval_reward, kl; reward_interval: half of its 95% interval, if known
The group and other columns of the data are written along.

The samples depend on --seed, --n and the data (a file's content, or the split), but on neither the reward nor
--batch_size. So another reward ranks the same samples, and other prompts never get the same random numbers.

--responses FILE scores what another engine has drawn: rows with prompt, responses, and perhaps finished, a
list of true or false (not given: all are). Of each row the first --n count, or as many as the rows have; a
row with fewer than the others is bad. Nothing is sampled: --init gives the tokenizer and the context, its
weights are not read, and options of sampling are refused. The rest is as with own samples: --cut_at ends a
response, one that leaves --max_length is truncated, and truncated ones are not written.

--label_temperature makes comparisons as in DPO's sentiment setting: the responses to a prompt are paired,
and a noisy judge prefers a to b with probability sigmoid((r_a - r_b) / temperature). At 0 the higher score
always wins, and a tie is a coin toss.

Without options it draws best-of-16 from out/sft under out/rm on the built-in test prompts.
"""

import itertools
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np

from nanorlhf import ranks
from nanorlhf.data import (Example, cut_response, cut_text, decode_response, describe, encode_prompts,
                           encode_response, length_limits, load_candidates, load_records, marks_of)
from nanorlhf.errors import UserError
from nanorlhf.files import append_records, read_jsonl, remove, require_folder, write_json, write_records
from nanorlhf.formats.checkpoints import read_config
from nanorlhf.formats.records import other_columns
from nanorlhf.formats.sources import data_sha256
from nanorlhf.generate import generate, repeated
from nanorlhf.metrics import best_of_n_estimate, bon_kl, mean_and_interval
from nanorlhf.model import Transformer
from nanorlhf.options import main
from nanorlhf.rewards import load_reward
from nanorlhf.run import Run
from nanorlhf.tokenizer import load_tokenizer
from nanorlhf.training import seed_for


@dataclass
class Config:
    # Best-of-N
    n: int = 16                      # samples per prompt; of --responses, at most this many
    reward: str = "out/rm"           # chooses: reward model's folder or hub name, gold, or file.py:function
    eval_reward: str = ""            # only measured: likewise; '' = gold, if on reviews
    label_temperature: float = -1.0  # of the judge who labels comparisons (ties: a coin); negative = none
    keep_unfinished: bool = False    # also write truncated responses; they end with EOS when read back

    # Data
    responses: str = ""              # score the responses of this file, instead of sampling; replaces --data
    init: str = "out/sft"            # policy to sample: folder or hub name
    data: str = "reviews"            # record file of prompts, or `reviews` (4000 for train, else 500)
    split: str = "test"              # of reviews: train, test, ood_near or ood_far
    columns: str = ""                # other names of its columns, OURS=THEIRS: prompt=question,chosen=good
    limit: int = 0                   # use at most this many records; 0 = all
    skip_bad: bool = False           # skip bad rows and count them, instead of stopping at the first

    # Lengths in tokens
    max_length: int = 0              # longest prompt + response; 0 = the model's context
    max_prompt_length: int = 0       # cut longer prompts to this; 0 = half of max_length
    keep: Literal["end", "start", "tldr"] = "end"  # what an overlong prompt keeps (tldr: Stiennon's rule)
    response_length: int = 48        # longest sampled response

    # Samples
    temperature: float = 1.0         # of the samples (Kirk 2023: 0.7)
    top_k: int = 0                   # 0 = off
    top_p: float = 1.0               # 1 = off
    cut_at: str = ""                 # end responses before the first of these, comma-separated (\n: newline)
    batch_size: int = 64             # prompts at a time

    # Run
    out: str = "out/bon"             # folder for the records
    overwrite: bool = False          # overwrite an existing run
    resume: bool = False             # continue the run in --out
    seed: int = 0                    # of everything random
    device: str = "auto"             # cpu, cuda, cuda:1, ...; auto = a GPU if there is one
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 is autocast
    compile: bool = False            # torch.compile the layers
    shard: bool = False              # with torchrun: split each model over the processes (FSDP2)
    deterministic: bool = False      # on a GPU: kernels that give the same bits every time; slower
    tensorboard: bool = False        # write the metrics for TensorBoard too, into --out/tensorboard


def prefers(score_a, score_b, temperature, rng):
    """True if a noisy judge prefers a: P = sigmoid((score_a - score_b) / temperature) (Bradley, Terry 1952).

    At temperature 0 the higher score wins, and a tie is a coin toss. rng: numpy Generator; draws one number.
    """
    difference = score_a - score_b
    if temperature > 0:
        p = 0.5 * (1 + np.tanh(difference / (2 * temperature)))
    else:
        p = 0.5 * (1 + np.sign(difference))
    return bool(rng.random() < p)


def label_ceiling(scores_a, scores_b, temperature):
    """Expected agreement with these labels of an oracle that knows the scores [N]: mean sigmoid(|a - b| /
    temperature); at temperature 0, 1 for a difference and 1/2 for a tie. No reward model can be expected to
    do better."""
    gap = np.abs(np.asarray(scores_a, dtype=np.float64) - np.asarray(scores_b, dtype=np.float64))
    return float(np.mean(0.5 * (1 + (np.tanh(gap / (2 * temperature)) if temperature > 0 else np.sign(gap)))))


def comparisons(record, temperature, rng):
    """All pairs of a record's responses, each with a preference: records prompt, chosen, rejected and their
    scores. Pairs of equal texts are dropped."""
    responses, scores, pairs = record["responses"], record["scores"], []
    for a, b in itertools.combinations(range(len(responses)), 2):
        if responses[a] != responses[b]:
            w, l = (a, b) if prefers(scores[a], scores[b], temperature, rng) else (b, a)
            pairs.append(dict(prompt=record["prompt"], chosen=responses[w], rejected=responses[l],
                              score_chosen=scores[w], score_rejected=scores[l], **record["columns"]))
    return pairs


def usable(scored, keep_unfinished):
    """A prompt's samples without those that cannot be written as text: readers append EOS, so a truncated or
    empty response would teach stopping where the model did not stop."""
    kept = [i for i, y in enumerate(scored["responses"])
            if y.strip() and (keep_unfinished or scored["finished"][i])]
    return scored | {k: [scored[k][i] for i in kept] for k in ("responses", "scores")}


def stream_of(config):
    """What the random numbers depend on besides the seed: the data's content, wherever it lies, and n.
    Held-out comparisons with the random numbers of the training comparisons would repeat some texts."""
    source = config.responses or config.data
    data = ("reviews", config.split) if source == "reviews" else ("file", data_sha256(source))
    return *data, config.n


def check_unused(config):
    """Refuses options that --responses leaves without effect."""
    for field in fields(config):
        if field.name in ("data", "split", "response_length", "temperature", "top_k", "top_p", "compile"):
            if (value := getattr(config, field.name)) != field.default:
                raise UserError(f"--{field.name} {value} has no effect with --responses: leave it out")


def given_samples(tokenizer, queries, records, longest, marks):
    """The responses of records as if they had been sampled: (lists of ids, whether each is finished), for all
    rows in order. A response ends before the first mark. One that leaves `longest` tokens is cut there."""
    found, finished = [], []
    for query, record in zip(queries, records):
        for text, ended in zip(record["responses"], record["finished"]):
            kept = cut_text(text, marks)
            ids, room = encode_response(tokenizer, kept, record["prompt"]), longest - len(query)
            ended = ended or kept != text
            found.append(ids[:room] if ended else ids[:-1][:room])      # ids end with EOS
            finished.append(ended and len(ids) <= room)
    return found, finished


def sample(config):
    run = Run(config, "bon")
    drawn = run.out / "drawn.jsonl"              # what there is so far
    if run.finished:
        remove(drawn)                            # a kill may have left it
        return
    init = require_folder(config.init, "python train_sft.py", Config.init)
    least, source = 2 if config.label_temperature >= 0 else 1, config.responses or config.data
    if config.n < least:
        raise UserError(f"--n {config.n}: at least one sample per prompt, and two to compare")
    tokenizer, limit, skip_bad = load_tokenizer(init), config.limit or None, config.skip_bad
    marks = marks_of(config.cut_at)
    if config.responses:
        check_unused(config)
        records = load_candidates(source, config.n, limit, skip_bad, tokenizer, config.columns)
        config = replace(config, n=len(records[0]["responses"]))
        if config.n < least:
            raise UserError(f"{source}: one response to each prompt, and it takes two to compare")
        context = read_config(init)[0]["context"]
        longest = length_limits(config, context)[0]
        prompts = encode_prompts(tokenizer, records, config, context, response_length=1)
        shown, _ = given_samples(tokenizer, prompts[:1], records[:1], longest, marks)
    else:
        policy, shown = run.prepare(Transformer.from_pretrained(init), tokenizer), [[]]
        records = load_records(source, "prompt", config.split, limit, skip_bad, tokenizer=tokenizer,
                               columns=config.columns)
        prompts = encode_prompts(tokenizer, records, config, policy.config.context)
    describe(run.name, tokenizer, [Example(prompts[0] + shown[0], len(prompts[0]))])
    reward = load_reward(config.reward, tokenizer, run.device, records, source, dtype=config.dtype)
    measured = config.eval_reward or ("gold" if source == "reviews" else "")
    eval_reward = None
    if measured:
        eval_reward = load_reward(measured, tokenizer, run.device, records, source, dtype=config.dtype)
    columns = other_columns(records)

    # A row's samples depend on the seed and its number only, so --resume goes on after the rows that exist.
    n, stream = config.n, stream_of(config)
    scored = ranks.on_first(read_jsonl, drawn) if config.resume else []
    if len(scored) < len(prompts):               # a kill may have left a part of a batch
        del scored[len(scored) // config.batch_size * config.batch_size:]
    run.begin(len(scored))
    write_records(drawn, scored)
    for first in range(len(scored), len(prompts), config.batch_size):
        queries, asked = (items[first:first + config.batch_size] for items in (prompts, records))
        if config.responses:
            responses, finished = given_samples(tokenizer, queries, asked, longest, marks)
        else:
            with run.autocast():
                samples = generate(policy, queries, config.response_length, config.temperature, config.top_k,
                                   config.top_p, n, seed_for(config.seed, "bon", *stream), marks, tokenizer,
                                   first_row=first * n)
            responses, finished = samples.responses(), samples.finished.tolist()
            if marks:
                responses = [cut_response(tokenizer, y, marks, r["prompt"], config.response_length)
                             for y, r in zip(responses, repeated(asked, n))]
        scores = reward(repeated(queries, n), responses, repeated(asked, n)).view(-1, n)            # [P, n]
        if eval_reward:
            values = eval_reward(repeated(queries, n), responses, repeated(asked, n)).view(-1, n)   # [P, n]
        for i, record in enumerate(asked):
            rows = slice(i * n, (i + 1) * n)
            texts = [decode_response(tokenizer, r, record["prompt"]) for r in responses[rows]]
            scored.append(dict(prompt=record["prompt"], responses=texts, scores=scores[i].tolist(),
                               values=values[i].tolist() if eval_reward else None,
                               finished=finished[rows], columns=columns[first + i]))
        metrics = {"scores/mean": scores.mean(), "scores/best": scores.max(1).values.mean()}
        if eval_reward:
            metrics["eval_reward/of_best"] = values.gather(1, scores.argmax(1, keepdim=True)).mean()
        run.log(len(scored), len(prompts), metrics, tokens=sum(map(len, responses)))
        append_records(drawn, scored[first:])    # after the metrics: begin() drops their rows beyond these
        run.stop_if_asked(len(scored), len(prompts))

    write_outputs(run, scored, config, stream)
    write_curve(run, scored, config)
    run.done()
    remove(drawn)


def write_outputs(run, scored, config, stream):
    """best.jsonl, ranked.jsonl and comparisons.jsonl."""
    records = [usable(s, config.keep_unfinished) for s in scored]
    if dropped := len(scored) * config.n - sum(len(r["responses"]) for r in records):
        run.say(f"{dropped} of {len(scored) * config.n} responses are unfinished or empty and not written"
                + ("" if config.keep_unfinished else " (--keep_unfinished writes the unfinished)"))
    best = []
    for r in records:
        if r["responses"]:
            top = int(np.argmax(r["scores"]))                                      # the first of equals
            best.append(dict(prompt=r["prompt"], completion=r["responses"][top], score=r["scores"][top],
                             **r["columns"]))
    write_records(run.out / "best.jsonl", best)
    if config.n > 1:
        ranked = [dict(prompt=r["prompt"], responses=r["responses"], scores=r["scores"], **r["columns"])
                  for r in records if len(r["responses"]) > 1]
        write_records(run.out / "ranked.jsonl", ranked)
    if config.label_temperature >= 0:
        temperature, pairs = config.label_temperature, []
        for i, r in enumerate(records):                                  # a stream for each prompt
            rng = np.random.Generator(np.random.Philox(key=[seed_for(config.seed, "labels", *stream), i]))
            pairs += comparisons(r, temperature, rng)
        write_records(run.out / "comparisons.jsonl", pairs)
        if pairs:
            ceiling = label_ceiling([p["score_chosen"] for p in pairs], [p["score_rejected"] for p in pairs],
                                    temperature)
            run.say(f"{len(pairs)} comparisons; a perfect judge would agree with {ceiling:.1%} of their "
                    f"labels")
    else:
        run.say("comparisons.jsonl is not written: that takes --label_temperature (0 or more) and --n "
                "above 1")


def write_curve(run, scored, config):
    """curve.json: the unbiased estimate of best-of-n for n = 1, 2, 4, ..., N, under both rewards."""
    curve = []
    for n in [2 ** k for k in range(config.n.bit_length()) if 2 ** k < config.n] + [config.n]:
        row = {"n": n, "kl": bon_kl(n)}
        for name, values in (("reward", "scores"), ("eval_reward", "values")):
            if scored[0][values] is not None:
                estimates = [best_of_n_estimate(s["scores"], n, s[values]) for s in scored]
                row[name], half = mean_and_interval(estimates)
                row |= {f"{name}_interval": half} if half else {}        # 0: unknown, as with one prompt
        curve.append(row)
        run.say("  ".join(f"{k} {v:.4g}" for k, v in row.items()))
    write_json(run.out / "curve.json", curve)


if __name__ == "__main__":
    main(Config, sample, __doc__)
