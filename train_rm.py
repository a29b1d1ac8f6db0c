"""Reward model: fit a scalar r(x, y) to comparisons (Stiennon 2020; Ouyang 2022; Chaudhari 2024).

    P(y_w > y_l | x) = sigmoid(r(x, y_w) - r(x, y_l))   Bradley-Terry
    L = - log sigmoid(r(x, y_w) - r(x, y_l))            Stiennon 2020, section 3.4; Chaudhari 2024, section 2

Minimising the mean of L over N comparisons is maximum likelihood. With a prior on the weights it is MAP
(Chaudhari 2024, section 2.1): --prior_precision c adds c / (2 N) |weights|^2, a Gaussian of variance 1 / c.
--weight_decay is another thing: AdamW shrinks the weights beside the loss, whatever the data. Only coupled
decay (adam, rmsprop) is a prior, and a decay of w is then a precision of N w, on matrices.

A ranking of K responses gives all its pairs, in one batch and divided by C(K, 2); ties are dropped (Ouyang
2022, Eq. 1). The model is the SFT model with a scalar head, read at the last real token: EOS, unless the
text was truncated. Only differences of rewards are identified. After training, the mean and standard
deviation over held-out responses (without any, the training ones) are therefore stored as constants, and
the score is (r - mean) / std (--normalize).

Without options it reads the comparisons that this makes from the SFT model and the task's noisy judge:
    python sample_bon.py --split train --limit 8000 --n 2 --reward gold --label_temperature 0.2 \\
        --out out/comparisons
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from nanorlhf import ranks
from nanorlhf.data import (collate, describe, load_records, make_group, post_of, split_records,
                           to_device, with_progress)
from nanorlhf.errors import UserError
from nanorlhf.files import require_file, require_folder
from nanorlhf.metrics import calibration, with_error
from nanorlhf.model import RewardModel
from nanorlhf.options import main, named_files
from nanorlhf.run import MAKE_COMPARISONS, Run
from nanorlhf.tokenizer import load_tokenizer
from nanorlhf.training import batch_indices, learning_rate, make_optimizer, optimizer_step, steps_of


@dataclass
class Config:
    # Reward model
    prior_precision: float = 0.0     # of a Gaussian prior on the weights, centred at 0; 0 = none
    normalize: Literal["standard", "mean", "none"] = "standard"  # Kirk 2023: standard; Stiennon 2020: mean
    normalize_data: str = ""         # record file of completions to normalize on; '' = the held-out responses

    # Data
    init: str = "out/sft"            # starting checkpoint: folder or hub name
    data: str = "out/comparisons/comparisons.jsonl"  # record file of comparisons or rankings
    eval_data: str = ""              # more held-out record files, NAME=FILE,NAME=FILE
    eval_fraction: float = 0.1       # share of --data to hold out
    columns: str = ""                # other names of its columns, OURS=THEIRS: prompt=question,chosen=good
    limit: int = 0                   # use at most this many records; 0 = all
    skip_bad: bool = False           # skip bad rows and count them, instead of stopping at the first

    # Lengths in tokens
    max_length: int = 0              # longest prompt + response; 0 = the model's context
    max_prompt_length: int = 0       # cut longer prompts to this; 0 = half of max_length
    keep: Literal["end", "start", "tldr"] = "end"  # what an overlong prompt keeps (tldr: Stiennon's rule)

    # Optimisation
    epochs: float = 1.0              # passes over the data
    max_steps: int = 0               # number of steps; 0 = from --epochs
    batch_size: int = 32             # rows per step
    micro_batch_size: int = 0        # rows in memory at a time; 0 = batch_size
    gradient_checkpointing: bool = False  # compute each layer again in the backward pass, to save memory
    frozen_layers: float = 0.0       # do not train this share of the layers, the lowest, and the embeddings
    lr: float = 3e-4                 # peak learning rate
    warmup_steps: int = 10           # linear warm-up
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after the warm-up
    optimizer: Literal["adamw", "adam", "rmsprop", "adafactor"] = "adamw"  # update rule
    weight_decay: float = 0.0        # on matrices only; apart from the loss in AdamW
    max_grad_norm: float = 1.0       # clip the gradient's norm to this; 0 = off

    # Run
    eval_every: int = 100            # steps between evaluations, one after the last step included; 0 = never
    save_every: int = 200            # steps between checkpoints; 0 = none
    out: str = "out/rm"              # run folder
    overwrite: bool = False          # overwrite an existing run
    resume: bool = False             # continue the run in --out from its newest checkpoint
    seed: int = 0                    # of everything random
    device: str = "auto"             # cpu, cuda, cuda:1, ...; auto = a GPU if there is one
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 is autocast; weights stay float32
    compile: bool = False            # torch.compile the layers
    shard: bool = False              # with torchrun: split each model over the processes (FSDP2)
    deterministic: bool = False      # on a GPU: kernels that give the same bits every time; slower
    tensorboard: bool = False        # write the metrics for TensorBoard too, into --out/tensorboard


def preference_loss(chosen, rejected):
    """-log sigmoid(r_w - r_l) of each pair (Bradley-Terry). chosen, rejected: [N] rewards -> [N] losses."""
    return -F.logsigmoid(chosen - rejected)


def negative_log_prior(parameters, precision):
    """- log of the prior N(0, 1 / precision) of the trained weights, without its constant. Scalar."""
    return 0.5 * precision * sum((p ** 2).sum() for p in parameters if p.requires_grad)


def ranked_pairs(scores):
    """(better, worse): index lists of all pairs of a ranking that are not ties. scores: list of K numbers."""
    pairs = [(i, j) for i, a in enumerate(scores) for j, b in enumerate(scores) if a > b]
    return [i for i, _ in pairs], [j for _, j in pairs]


def to_groups(records, tokenizer, config, context):
    """Rankings -> Groups of K examples and their scores. A ranking in which all responses tie says nothing
    and is left out."""
    return [make_group(tokenizer, r["prompt"], r["responses"], r["scores"], config, context, post_of(r))
            for r in with_progress(records, "rankings tokenised") if len(set(r["scores"])) > 1]


class Forward(NamedTuple):
    rewards: torch.Tensor            # [sum of K] of all responses
    better: torch.Tensor             # [number of pairs] index of the better response
    worse: torch.Tensor              # [number of pairs] index of the other one
    weight: torch.Tensor             # [number of pairs] 1 / C(K, 2)


def forward(model, groups, tokenizer, run):
    """One forward pass over all responses of these groups, with the pairs among them."""
    examples = [e for g in groups for e in g.examples]
    batch = collate(examples, tokenizer.pad_id, run.device)
    with run.autocast():
        rewards = model.score(batch.tokens, batch.lengths)                   # [sum of K]
    better, worse, weight, first = [], [], [], 0
    for _, scores, _ in groups:
        i, j = ranked_pairs(scores)
        better += [first + k for k in i]
        worse += [first + k for k in j]
        weight += [1 / math.comb(len(scores), 2) for _ in i]                 # Ouyang 2022, Eq. 1
        first += len(scores)
    better, worse, weight = (to_device(x, run.device) for x in (better, worse, weight))
    return Forward(rewards, better, worse, weight)


@torch.no_grad()
def evaluate(model, groups, tokenizer, run, name):
    """Loss, accuracy = mean[r_w > r_l], the accuracy in quarters of the pairs by confidence |r_w - r_l|,
    least sure first, and the calibration. If confidence means anything, accuracy rises from quarter to
    quarter. If sigmoid(|r_w - r_l|) is the probability of being right, ece is near 0."""
    if not groups:
        return {}
    def measured(part):
        out = forward(model, part, tokenizer, run)
        margins = (out.rewards[out.better] - out.rewards[out.worse]).float().cpu()
        return margins.split([len(ranked_pairs(g.numbers)[0]) for g in part])
    by_group, posts = run.of_each(groups, measured), [g.post for g in groups]
    margins, pairs = torch.cat(by_group), [len(m) for m in by_group]     # pairs about one post are dependent
    metrics = {f"eval/{name}/pairs": len(margins),
               **with_error(f"eval/{name}/loss", [-F.logsigmoid(m).sum() for m in by_group], pairs, posts),
               **with_error(f"eval/{name}/accuracy", [(m > 0).sum() for m in by_group], pairs, posts)}
    if len(margins) >= 40:
        by_confidence = margins[margins.abs().argsort()]
        for k, quarter in enumerate(by_confidence.chunk(4), 1):
            metrics[f"eval/{name}/accuracy_q{k}"] = float((quarter > 0).float().mean())
        found = calibration(margins)
        metrics |= {f"eval/{name}/{k}": found[k] for k in ("ece", "brier")}
    return metrics


@torch.no_grad()
def normalize(model, groups, tokenizer, run, how):
    """Stores the mean of these groups' rewards and, with how = "standard", their standard deviation."""
    def measured(part):
        return forward(model, part, tokenizer, run).rewards.cpu().split([len(g.examples) for g in part])
    rewards = torch.cat(run.of_each(groups, measured))
    model.reward_mean = float(rewards.mean())
    if how == "standard":
        model.reward_std = float(rewards.std(correction=0)) or 1.0           # 0 if all responses score alike


def train(config):
    run = Run(config, "rm")
    if run.finished:
        return
    init = require_folder(config.init, "python train_sft.py", Config.init)
    require_file(config.data, MAKE_COMPARISONS, Config.data)
    tokenizer = load_tokenizer(init)
    model = RewardModel.from_pretrained(init, fresh_head=True, seed=config.seed)
    model.reward_mean, model.reward_std = 0.0, 1.0  # if --init is a reward model: recomputed below
    run.prepare(model, tokenizer)

    records = load_records(config.data, "ranked", limit=config.limit or None, skip_bad=config.skip_bad,
                           tokenizer=tokenizer, columns=config.columns, rows=False)
    records, held_out = split_records(records, config.eval_fraction, config.seed)
    groups = to_groups(records, tokenizer, config, model.config.context)
    eval_groups = {"held_out": to_groups(held_out, tokenizer, config, model.config.context)}
    for name, file in named_files(config.eval_data).items():
        held_out = load_records(file, "ranked", skip_bad=config.skip_bad, tokenizer=tokenizer,
                                columns=config.columns, rows=False)
        eval_groups[name] = to_groups(held_out, tokenizer, config, model.config.context)
    if not groups:
        raise UserError(f"{config.data}: no two responses of a prompt differ in score")
    scored = eval_groups["held_out"] or groups
    if config.normalize_data:
        texts = load_records(config.normalize_data, "completion", skip_bad=config.skip_bad,
                             tokenizer=tokenizer, columns=config.columns)
        scored = [make_group(tokenizer, r["prompt"], [r["completion"]], [0.0], config, model.config.context)
                  for r in texts]

    describe(run.name, tokenizer, [e for g in groups for e in g.examples])

    optimizer = make_optimizer(model.parameters(), config.optimizer, config.lr, config.weight_decay)
    state = run.load_checkpoint({"model": model}, {"optimizer": optimizer})
    run.begin(state["step"])
    total = config.max_steps or steps_of(config.epochs, len(groups), config.batch_size)
    for step in range(state["step"], total):
        rows = batch_indices(len(groups), config.batch_size, step, config.seed)
        parts, tokens = [], sum(groups[i].tokens for i in rows)
        with run.autocast():
            for part in run.micro_batches([groups[i] for i in rows]):
                out = forward(model, part, tokenizer, run)
                chosen, rejected = out.rewards[out.better], out.rewards[out.worse]   # [number of pairs]
                loss = (out.weight * preference_loss(chosen, rejected)).sum() / len(rows)
                loss.backward()
                parts.append({"loss": loss, "correct": (chosen > rejected).sum()})
        if config.prior_precision > 0:
            weights = [ranks.own_share(p) for p in model.parameters()]
            prior = negative_log_prior(weights, config.prior_precision) / len(groups)
            prior.backward()
            parts.append({"loss": prior})
        lr = learning_rate(step, total, config.lr, config.warmup_steps, config.lr_schedule)
        [norm], sums = optimizer_step({optimizer: lr}, config.max_grad_norm, step + 1, rows, parts)

        pairs = sum(len(ranked_pairs(groups[i].numbers)[0]) for i in rows)
        metrics = {"loss": sums["loss"], "accuracy": sums["correct"] / pairs, "lr": lr, "grad_norm": norm}
        if run.due(config.eval_every, step + 1, total):
            for name, part in eval_groups.items():
                metrics |= evaluate(model, part, tokenizer, run, name)
        run.log(step + 1, total, metrics, tokens)
        run.checkpoint(step + 1, total, {"model": model}, {"optimizer": optimizer})

    if config.normalize != "none":
        normalize(model, scored, tokenizer, run, config.normalize)
    run.finish(model, tokenizer)


if __name__ == "__main__":
    main(Config, train, __doc__)
