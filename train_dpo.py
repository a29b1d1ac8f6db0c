"""Direct preference optimisation (DPO; Rafailov 2023) and relatives that differ only in the loss.

    h = [log pi(y_w|x) - log pi(y_l|x)] - [log pi_ref(y_w|x) - log pi_ref(y_l|x)]
    dpo           L = -log sigmoid(beta h)                   Eq. 7; at the start h = 0, so L = ln 2
    cdpo          L = -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)   labels wrong with probability e
    ipo           L = (h - 1 / (2 beta))^2                   Azar 2023; at the start L = 1 / (4 beta^2)
    unlikelihood  L = -log pi(y_w|x) + alpha log pi(y_l|x)   appendix C.3; unbounded below: it can degenerate

log pi(y|x) is a sum over response tokens, EOS included, never a mean. The reference's log-probabilities are
constants: they are computed once per example before training, with the same function as the policy's. During
training the log-probability of the chosen response usually falls; what rises is the margin.

The paper's setting is --optimizer rmsprop --max_grad_norm 10 --lr 1e-6 --warmup_steps 150. Its appendix A
prints Eq. 21 with y_w and y_l exchanged; Eq. 7 is right.

Without options it trains out/sft on the comparisons that train_rm.py reads. Preferred-FT is train_sft.py on
the same file.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from nanorlhf.data import (collate, describe, load_and_hold_out, make_group, post_of,
                           to_device, with_progress)
from nanorlhf.errors import UserError
from nanorlhf.evaluate import eval_sampler
from nanorlhf.files import require_file, require_folder
from nanorlhf.metrics import with_error
from nanorlhf.model import Transformer
from nanorlhf.options import main
from nanorlhf.run import MAKE_COMPARISONS, Run
from nanorlhf.tokenizer import load_tokenizer
from nanorlhf.training import batch_indices, learning_rate, make_optimizer, optimizer_step, steps_of


@dataclass
class Config:
    # DPO
    loss: Literal["dpo", "ipo", "unlikelihood"] = "dpo"  # cDPO is dpo with --label_smoothing
    beta: float = 0.5                # strength of the pull to the reference (paper: 0.1, and 0.5 on TL;DR)
    label_smoothing: float = 0.0     # cDPO: probability e that a label is wrong, in [0, 0.5)
    reference_free: bool = False     # drop the reference from h
    alpha: float = 0.5               # unlikelihood: weight of the rejected response, in [0, 1]

    # Data
    init: str = "out/sft"            # starting checkpoint: folder or hub name
    reference: str = ""              # reference policy: folder or hub name; '' = --init
    data: str = "out/comparisons/comparisons.jsonl"  # record file of comparisons
    eval_data: str = ""              # held-out record file; '' = hold out a part of --data
    eval_fraction: float = 0.05      # share of --data to hold out if there is no --eval_data
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
    batch_size: int = 64             # rows per step
    micro_batch_size: int = 0        # rows in memory at a time; 0 = batch_size
    gradient_checkpointing: bool = False  # compute each layer again in the backward pass, to save memory
    frozen_layers: float = 0.0       # do not train this share of the layers, the lowest, and the embeddings
    share_prompts: bool = False      # compute a prompt once for all its responses; same result up to rounding
    lr: float = 4e-4                 # peak learning rate
    warmup_steps: int = 10           # linear warm-up
    lr_schedule: Literal["cosine", "linear", "constant"] = "linear"  # after the warm-up
    optimizer: Literal["adamw", "adam", "rmsprop", "adafactor"] = "adamw"  # update rule
    weight_decay: float = 0.0        # on matrices only; apart from the loss in AdamW
    max_grad_norm: float = 1.0       # clip the gradient's norm to this; 0 = off

    # Samples while training
    eval_prompts: str = ""           # record file of prompts to sample on; '' = test prompts on reviews
    eval_reward: str = ""            # measured there: folder, gold or file.py:function; '' = gold on reviews
    num_eval_prompts: int = 128      # use at most this many of the prompts, one sample each
    response_length: int = 48        # longest sampled response in tokens
    temperature: float = 1.0         # of the samples

    # Run
    eval_every: int = 20             # steps between evaluations, one after the last step included; 0 = never
    save_every: int = 100            # steps between checkpoints; 0 = none
    out: str = "out/dpo"             # run folder
    overwrite: bool = False          # overwrite an existing run
    resume: bool = False             # continue the run in --out from its newest checkpoint
    seed: int = 0                    # of everything random
    device: str = "auto"             # cpu, cuda, cuda:1, ...; auto = a GPU if there is one
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 is autocast; weights stay float32
    compile: bool = False            # torch.compile the layers
    shard: bool = False              # with torchrun: split each model over the processes (FSDP2)
    deterministic: bool = False      # on a GPU: kernels that give the same bits every time; slower
    tensorboard: bool = False        # write the metrics for TensorBoard too, into --out/tensorboard


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=Config.beta,
             label_smoothing=Config.label_smoothing, loss=Config.loss, alpha=Config.alpha,
             reference_free=Config.reference_free):
    """Losses [B] from sequence log-probabilities [B] (sums over response tokens) of policy and reference."""
    h = (chosen - rejected) - (0.0 if reference_free else ref_chosen - ref_rejected)
    if loss == "dpo":                                                              # Eq. 7; cDPO
        return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    if loss == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    if loss == "unlikelihood":                                                     # appendix C.3
        return -chosen + alpha * rejected
    raise UserError(f"--loss {loss}: not one of dpo, ipo, unlikelihood")


def to_groups(records, tokenizer, config, context):
    """Comparisons -> Groups of two examples, the chosen one first. Their numbers are the reference's
    log-probabilities, which train() fills in."""
    return [make_group(tokenizer, r["prompt"], [r["chosen"], r["rejected"]], [], config, context, post_of(r))
            for r in with_progress(records, "comparisons tokenised")]


class Forward(NamedTuple):
    chosen: torch.Tensor             # [B] log pi(y_w|x), a sum over response tokens
    rejected: torch.Tensor           # [B] log pi(y_l|x)
    chosen_lengths: torch.Tensor     # [B] |y_w| in tokens
    rejected_lengths: torch.Tensor   # [B] |y_l|


def forward(model, groups, tokenizer, run):
    """One forward pass over both responses of these groups."""
    examples = [g.examples[0] for g in groups] + [g.examples[1] for g in groups]
    shared = [(i, len(groups) + i) for i in range(len(groups))]              # examples of one prompt
    batch = collate(examples, tokenizer.pad_id, run.device, shared if run.config.share_prompts else None)
    with run.autocast():
        logprobs = model.logprobs(batch.tokens, batch.mask, where=batch.where, packed=batch.packed)
    logps = logprobs.sum(1)                                                  # [2B]
    chosen, rejected = logps.chunk(2)
    chosen_lengths, rejected_lengths = batch.mask.sum(1).chunk(2)
    return Forward(chosen, rejected, chosen_lengths, rejected_lengths)


def losses_and_stats(out, groups, config):
    """Losses [B] of these groups after their forward pass, and what is logged of each, {name: [B]}."""
    ref_chosen, ref_rejected = to_device([g.numbers for g in groups], out.chosen.device).T
    losses = dpo_loss(out.chosen, out.rejected, ref_chosen, ref_rejected, config.beta, config.label_smoothing,
                      config.loss, config.alpha, config.reference_free)
    with torch.no_grad():
        rewards_chosen = config.beta * (out.chosen - ref_chosen)             # Eq. 5: the implicit reward
        rewards_rejected = config.beta * (out.rejected - ref_rejected)
        margins = rewards_chosen - rewards_rejected
        stats = {"rewards/chosen": rewards_chosen, "rewards/rejected": rewards_rejected,
                 "rewards/margins": margins,
                 "rewards/accuracies": 0.5 + 0.5 * margins.round(decimals=4).sign(),         # a tie: 1/2
                 "logps/chosen": out.chosen, "logps/rejected": out.rejected}
    return losses, stats


@torch.no_grad()
def evaluate(model, groups, tokenizer, run, config):
    """Mean loss and accuracy of the implicit reward on held-out comparisons, and their standard errors."""
    if not groups:
        return {}
    def measured(part):
        losses, stats = losses_and_stats(forward(model, part, tokenizer, run), part, config)
        return zip(losses.tolist(), stats["rewards/accuracies"].tolist())
    losses, accuracies = zip(*run.of_each(groups, measured))
    posts = [g.post for g in groups]
    return with_error("eval/loss", losses, None, posts) | with_error("eval/accuracy", accuracies, None, posts)


def train(config):
    run = Run(config, "dpo")
    if run.finished:
        return
    init = require_folder(config.init, "python train_sft.py", Config.init)
    require_file(config.data, MAKE_COMPARISONS, Config.data)
    tokenizer = load_tokenizer(init)
    model = run.prepare(Transformer.from_pretrained(init), tokenizer)
    reference = run.load_reference(config.reference or init, tokenizer)

    records, held_out = load_and_hold_out(config, "preference", tokenizer)
    groups = to_groups(records, tokenizer, config, model.config.context)
    eval_groups = to_groups(held_out, tokenizer, config, model.config.context)
    describe(run.name, tokenizer, [e for g in groups for e in g.examples])
    evaluate_samples = eval_sampler(config, records, tokenizer, model, reference, rewards={}, run=run)

    # The reference's log-probabilities, once per example.
    def of_reference(part):
        out = forward(reference, part, tokenizer, run)
        return zip(out.chosen.tolist(), out.rejected.tolist())
    with torch.no_grad():
        for group, numbers in zip(groups + eval_groups, run.of_each(groups + eval_groups, of_reference)):
            group.numbers.extend(numbers)

    optimizer = make_optimizer(model.parameters(), config.optimizer, config.lr, config.weight_decay)
    state = run.load_checkpoint({"model": model}, {"optimizer": optimizer})
    run.begin(state["step"])
    total = config.max_steps or steps_of(config.epochs, len(records), config.batch_size)
    for step in range(state["step"], total):
        rows = batch_indices(len(records), config.batch_size, step, config.seed)
        parts, tokens = [], sum(groups[i].tokens for i in rows)
        with run.autocast():
            for part in run.micro_batches([groups[i] for i in rows]):
                out = forward(model, part, tokenizer, run)
                losses, stats = losses_and_stats(out, part, config)
                loss = losses.sum() / len(rows)
                loss.backward()
                parts.append({"loss": loss, **{k: v.sum() / len(rows) for k, v in stats.items()}})
        lr = learning_rate(step, total, config.lr, config.warmup_steps, config.lr_schedule)
        [norm], sums = optimizer_step({optimizer: lr}, config.max_grad_norm, step + 1, rows, parts)

        metrics = {**sums, "lr": lr, "grad_norm": norm}
        if run.due(config.eval_every, step + 1, total):
            metrics |= evaluate(model, eval_groups, tokenizer, run, config) | evaluate_samples(step + 1)
        run.log(step + 1, total, metrics, tokens)
        run.checkpoint(step + 1, total, {"model": model}, {"optimizer": optimizer})
    run.finish(model, tokenizer)


if __name__ == "__main__":
    main(Config, train, __doc__)
