"""Reward model: fit a scalar r(x, y) to comparisons of responses (Stiennon 2020; Ouyang 2022; Chaudhari 2024, section 2).

    P(y_w > y_l | x) = sigmoid(r(x, y_w) - r(x, y_l))           Bradley-Terry
    L = - log sigmoid(r(x, y_w) - r(x, y_l))

A ranking of K responses gives all its pairs, in one batch and divided by C(K, 2); ties are dropped (Ouyang 2022). The model
is the SFT model with a scalar head, read at the last real token, which is EOS unless the text was cut. Only differences of
rewards are identified: afterwards mean and standard deviation are stored as constants (--normalize). Weight decay is the
Gaussian prior of the MAP estimate (Chaudhari 2024, section 2.1).

With no option it reads the comparisons which this makes from the SFT model and the built-in task's noisy judge:
    python sample_bon.py --split train --limit 8000 --n 2 --reward gold --label_temperature 0.2 --out out/comparisons
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanorlhf.data import (batch_indices, collate, load_records, load_tokenizer, make_examples, micro_batches, split_records,
                           steps_of)
from nanorlhf.evaluate import named_files
from nanorlhf.model import RewardModel
from nanorlhf.run import MAKE_COMPARISONS, Run, UserError, learning_rate, main, make_optimizer, need_file, need_folder


@dataclass
class Config:
    init: str = "out/sft"            # starting checkpoint folder
    data: str = "out/comparisons/comparisons.jsonl"  # prompt, chosen, rejected; or prompt, responses, scores
    eval_data: str = ""              # held-out record files NAME=FILE,NAME=FILE; besides a held-out part of --data
    limit: int = 0                   # at most so many records; 0 = all
    skip_bad: bool = False           # skip bad rows and count them, instead of stopping at the first
    out: str = "out/rm"              # run folder
    overwrite: bool = False          # replace a run that is there
    resume: bool = False             # continue the run in --out from its newest checkpoint
    seed: int = 0                    # of everything random, the scalar head included
    device: str = "auto"             # cpu, cuda, cuda:1, ...; auto takes a GPU if there is one
    dtype: str = "float32"           # float32, or bfloat16 (autocast; weights stay float32)
    compile: bool = False            # torch.compile the layers

    max_length: int = 0              # longest prompt + response in tokens; 0 = the model's context
    max_prompt_length: int = 0       # a row that is too long has its prompt cut to this first; 0 = half of max_length
    keep: str = "end"                # what a too long prompt keeps: end, start, or tldr (Stiennon 2020's rule)
    epochs: float = 1.0              # passes over the data; more than one overfits
    max_steps: int = 0               # train for so many steps, whatever --epochs; 0 = as many as they make
    batch_size: int = 32             # prompts a step
    micro_batch_size: int = 0        # prompts at a time in memory; 0 = batch_size
    lr: float = 3e-4                 # peak learning rate
    warmup_steps: int = 10           # linear warm-up
    lr_schedule: str = "cosine"      # cosine, linear or constant
    optimizer: str = "adamw"         # adamw, adam or rmsprop
    weight_decay: float = 0.0        # on matrices: the precision of the Gaussian prior
    max_grad_norm: float = 1.0       # clip to this norm; 0 = off
    normalize: str = "standard"      # stored constants: standard (mean 0, std 1: Kirk 2023), mean (Stiennon 2020) or none
    normalize_data: str = ""         # completions to take them from, such as demonstrations; '' = the held-out responses
    eval_fraction: float = 0.1       # share of --data held out (all responses of a prompt together)
    eval_every: int = 100            # steps between evaluations, the last step included; 0 = never
    save_every: int = 200            # steps between checkpoints; 0 = none


def preference_loss(chosen, rejected):
    """-log sigmoid(r_w - r_l), one a pair (Bradley-Terry). chosen, rejected [N] rewards -> [N]."""
    return -F.logsigmoid(chosen - rejected)


def ranked_pairs(scores):
    """(better, worse): index lists of all pairs of a ranking that are not ties. scores: list of K numbers."""
    pairs = [(i, j) for i, a in enumerate(scores) for j, b in enumerate(scores) if a > b]
    return [i for i, _ in pairs], [j for _, j in pairs]


def rewards_of(model, rankings, tokenizer, run):
    """Rewards [sum of K] of all responses of these rankings in one forward pass, with the pairs among them:
    (rewards, better, worse, weight 1/C(K, 2) of each pair, number of tokens)."""
    batch = collate([e for examples, _ in rankings for e in examples], tokenizer.pad_id, run.device)
    with run.autocast():
        rewards = model.score(batch.tokens, batch.lengths)
    better, worse, weight, first = [], [], [], 0
    for examples, scores in rankings:
        i, j = ranked_pairs(scores)
        better += [first + k for k in i]
        worse += [first + k for k in j]
        weight += [1 / math.comb(len(scores), 2) for _ in i]
        first += len(scores)
    return rewards, better, worse, torch.tensor(weight, device=run.device), int(batch.lengths.sum())


def train(config):
    run = Run(config, "rm", normalize=("standard", "mean", "none"))
    if run.finished:
        return
    init = need_folder(config.init, "python train_sft.py")
    need_file(config.data, MAKE_COMPARISONS)
    tokenizer, model = load_tokenizer(init), RewardModel.from_pretrained(init, fresh_head=True, seed=config.seed)
    model.reward_mean, model.reward_std = 0.0, 1.0      # of an --init that is a reward model: they are taken anew below
    run.prepare(model, tokenizer)

    # A ranking: the tokenised responses of one prompt, and their scores.
    max_length = config.max_length or model.config.context

    def to_rankings(records):
        return [(make_examples(tokenizer, r["prompt"], r["responses"], max_length, config.max_prompt_length or max_length // 2,
                               config.keep), r["scores"])
                for r in records if len(set(r["scores"])) > 1]
    records = load_records(config.data, "ranked", limit=config.limit or None, skip_bad=config.skip_bad, tokenizer=tokenizer)
    records, held_out = split_records(records, config.eval_fraction, config.seed)
    rankings, held_out = to_rankings(records), {"held_out": to_rankings(held_out)}
    for name, file in named_files(config.eval_data).items():
        held_out[name] = to_rankings(load_records(file, "ranked", skip_bad=config.skip_bad, tokenizer=tokenizer))

    if not rankings:
        raise UserError(f"{config.data}: no two responses of a prompt differ in score")

    optimizer = make_optimizer(model.parameters(), config.optimizer, config.lr, config.weight_decay)
    state = run.load_checkpoint({"model": model}, {"optimizer": optimizer})
    total = config.max_steps or steps_of(config.epochs, len(rankings), config.batch_size)
    for step in range(state["step"], total):
        rows = batch_indices(len(rankings), config.batch_size, step, config.seed)
        loss_sum, correct, pairs, tokens = 0.0, 0, 0, 0
        for part in micro_batches([rankings[i] for i in rows], config.micro_batch_size or config.batch_size,
                                  length=lambda r: max(len(e.tokens) for e in r[0])):
            rewards, better, worse, weight, n = rewards_of(model, part, tokenizer, run)
            loss = (weight * preference_loss(rewards[better], rewards[worse])).sum() / len(rows)
            loss.backward()
            loss_sum += loss.item()
            correct += int((rewards[better] > rewards[worse]).sum())
            pairs, tokens = pairs + len(better), tokens + n
        lr = learning_rate(step, total, config.lr, config.warmup_steps, config.lr_schedule)
        norm = run.step({optimizer: lr}, config.max_grad_norm, step + 1, rows, loss_sum)

        metrics = {"loss": loss_sum, "accuracy": correct / pairs, "lr": lr, "grad_norm": norm}
        if run.every(config.eval_every, step + 1, total):
            for name, part in held_out.items():
                metrics |= evaluate(model, part, tokenizer, run, config, f"eval/{name}")
        run.log(step + 1, total, metrics, tokens=tokens)
        if run.every(config.save_every, step + 1, total):
            run.save_checkpoint(step + 1, {"model": model}, {"optimizer": optimizer})

    if config.normalize != "none":
        if config.normalize_data:
            texts = load_records(config.normalize_data, "completion", limit=1000, tokenizer=tokenizer)
            scored = [(make_examples(tokenizer, r["prompt"], [r["completion"]], max_length, config.max_prompt_length
                                     or max_length // 2, config.keep), [0.0]) for r in texts]
        else:
            scored = held_out["held_out"] or rankings
        rewards = torch.cat([r for r, *_ in each_rewards(model, scored, tokenizer, run, config)])
        model.reward_mean = float(rewards.mean())
        model.reward_std = float(rewards.std(correction=0)) or 1.0 if config.normalize == "standard" else 1.0
    run.finish(model, tokenizer)


@torch.no_grad()
def each_rewards(model, rankings, tokenizer, run, config):
    return [rewards_of(model, part, tokenizer, run)
            for part in micro_batches(rankings, config.micro_batch_size or config.batch_size,
                                      length=lambda r: max(len(e.tokens) for e in r[0]))]


def evaluate(model, rankings, tokenizer, run, config, name):
    """Loss, accuracy = mean[r_w > r_l], and accuracy in quarters of the pairs by confidence |r_w - r_l|, least sure first.
    Where confidence means anything, the quarters rise."""
    if not rankings:
        return {}
    margins = torch.cat([(r[better] - r[worse]).float().cpu()
                         for r, better, worse, *_ in each_rewards(model, rankings, tokenizer, run, config)])
    found = {f"{name}/loss": float(-F.logsigmoid(margins).mean()), f"{name}/accuracy": float((margins > 0).float().mean()),
             f"{name}/pairs": len(margins)}
    if len(margins) >= 40:
        by_confidence = margins[margins.abs().argsort()]
        for k, quarter in enumerate(by_confidence.chunk(4), 1):
            found[f"{name}/accuracy_q{k}"] = float((quarter > 0).float().mean())
    return found


if __name__ == "__main__":
    main(Config, train, __doc__)
