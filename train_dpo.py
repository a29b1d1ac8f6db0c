"""Direct preference optimisation, and its relatives that differ only in the loss (Rafailov 2023, Eq. 7; appendix C.3).

    h = [log pi(y_w|x) - log pi(y_l|x)] - [log pi_ref(y_w|x) - log pi_ref(y_l|x)]     sums over response tokens, EOS included
    dpo           L = -log sigmoid(beta h)                          Eq. 7;   at the start h = 0, L = ln 2
    cdpo          L = -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)           labels flipped with probability e
    ipo           L = (h - 1 / (2 beta))^2                          Azar 2023; at the start L = 1 / (4 beta^2)
    unlikelihood  L = -log pi(y_w|x) + alpha log pi(y_l|x)          unbounded below: a baseline that degenerates

log pi(y|x) is a sum, never a mean over tokens. The reference's log-probabilities are constants: taken once an example,
before training, by the same function as the policy's. (The paper's appendix A prints Eq. 21 with y_w and y_l exchanged;
Eq. 7 is right.) The log-probability of the chosen response usually falls in training; the margin is what rises.

With no option it trains out/sft on the comparisons that train_rm.py reads; Preferred-FT is train_sft.py on the same file.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanorlhf.data import (batch_indices, collate, load_records, load_tokenizer, make_examples, micro_batches, need_same_ids,
                           split_records, steps_of)
from nanorlhf.evaluate import load_eval_prompts, measure
from nanorlhf.model import Transformer
from nanorlhf.run import (MAKE_COMPARISONS, Run, UserError, learning_rate, main, make_optimizer, need_file, need_folder,
                          need_same_vocabulary)


@dataclass
class Config:
    init: str = "out/sft"            # starting checkpoint folder
    reference: str = ""              # folder of the reference policy; '' = --init
    data: str = "out/comparisons/comparisons.jsonl"  # prompt, chosen, rejected
    eval_data: str = ""              # held-out comparisons; '' holds out a part of --data
    eval_prompts: str = ""           # prompts to sample on while training: record file; '' = the test prompts, if on `reviews`
    eval_reward: str = ""            # a reward only measured there: folder, gold or file.py:function; '' = gold, if on `reviews`
    limit: int = 0                   # at most so many records; 0 = all
    skip_bad: bool = False           # skip bad rows and count them, instead of stopping at the first
    out: str = "out/dpo"             # run folder
    overwrite: bool = False          # replace a run that is there
    resume: bool = False             # continue the run in --out from its newest checkpoint
    seed: int = 0                    # of everything random
    device: str = "auto"             # cpu, cuda, cuda:1, ...; auto takes a GPU if there is one
    dtype: str = "float32"           # float32, or bfloat16 (autocast; weights stay float32)
    compile: bool = False            # torch.compile the layers

    loss: str = "dpo"                # dpo (cdpo with label_smoothing > 0), ipo or unlikelihood
    beta: float = 0.5                # strength of the pull to the reference (paper: 0.1, and 0.5 on TL;DR)
    label_smoothing: float = 0.0     # e of cDPO, in [0, 0.5)
    reference_free: bool = False     # drop the reference from h
    alpha: float = 0.5               # of unlikelihood, in [0, 1]
    max_length: int = 0              # longest prompt + response in tokens; 0 = the model's context
    max_prompt_length: int = 0       # a row that is too long has its prompt cut to this first; 0 = half of max_length
    keep: str = "end"                # what a too long prompt keeps: end, start, or tldr (Stiennon 2020's rule)
    response_length: int = 48        # longest sampled response in tokens
    temperature: float = 1.0         # of the samples
    epochs: float = 1.0              # passes over the data
    max_steps: int = 0               # train for so many steps, whatever --epochs; 0 = as many as they make
    batch_size: int = 64             # pairs a step
    micro_batch_size: int = 0        # pairs at a time in memory; 0 = batch_size
    lr: float = 4e-4                 # peak learning rate
    warmup_steps: int = 10           # linear warm-up
    lr_schedule: str = "linear"      # cosine, linear or constant
    optimizer: str = "adamw"         # adamw, adam, or rmsprop (the paper's)
    weight_decay: float = 0.0        # on matrices
    max_grad_norm: float = 1.0       # clip to this norm (paper: 10); 0 = off
    eval_fraction: float = 0.05      # share of --data held out when there is no --eval_data
    num_eval_prompts: int = 128      # evaluation prompts, one sample each
    eval_every: int = 20             # steps between evaluations, the last step included; 0 = never
    save_every: int = 100            # steps between checkpoints; 0 = none


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, label_smoothing=0.0, loss="dpo", alpha=0.5,
             reference_free=False):
    """Losses [B] of sequence log-probabilities [B] (sums over response tokens) of policy and reference."""
    h = (chosen - rejected) - (0.0 if reference_free else ref_chosen - ref_rejected)
    if loss == "dpo":
        return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)   # Eq. 7; cDPO
    if loss == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    if loss == "unlikelihood":
        return -chosen + alpha * rejected
    raise UserError(f"--loss {loss}: not one of dpo, ipo, unlikelihood")


def pair_logprobs(model, pairs, tokenizer, run):
    """log pi(y|x) of these pairs, one forward pass: (chosen [B], rejected [B], number of tokens)."""
    batch = collate([p.chosen for p in pairs] + [p.rejected for p in pairs], tokenizer.pad_id, run.device)
    with run.autocast():
        logprobs = model.logprobs(batch.tokens, batch.mask).sum(1)                     # [2B]
    return *logprobs.chunk(2), int(batch.lengths.sum())


class Pair:
    """A tokenised comparison, and the reference's log-probabilities of its two responses."""

    def __init__(self, examples):
        self.chosen, self.rejected = examples
        self.reference = None

    @property
    def length(self):
        return max(len(self.chosen.tokens), len(self.rejected.tokens))


def train(config):
    run = Run(config, "dpo", loss=("dpo", "ipo", "unlikelihood"))
    if run.finished:
        return
    init = need_folder(config.init, "python train_sft.py")
    need_file(config.data, MAKE_COMPARISONS)
    if not 0 <= config.label_smoothing < 0.5:
        raise UserError(f"--label_smoothing {config.label_smoothing}: must lie in [0, 0.5)")
    tokenizer = load_tokenizer(init)
    need_same_ids("--reference", config.reference or init, tokenizer)
    model = run.prepare(Transformer.from_pretrained(init), tokenizer)
    reference = run.prepare(Transformer.from_pretrained(config.reference or init), tokenizer).requires_grad_(False)
    need_same_vocabulary(f"--reference {config.reference}", reference, model)

    max_length = config.max_length or model.config.context

    def to_pairs(records):
        return [Pair(make_examples(tokenizer, r["prompt"], [r["chosen"], r["rejected"]], max_length,
                                   config.max_prompt_length or max_length // 2, config.keep)) for r in records]
    records = load_records(config.data, "preference", limit=config.limit or None, skip_bad=config.skip_bad,
                           tokenizer=tokenizer)
    if config.eval_data:
        held_out = load_records(config.eval_data, "preference", skip_bad=config.skip_bad, tokenizer=tokenizer)
    else:
        records, held_out = split_records(records, config.eval_fraction, config.seed)
    pairs, eval_pairs = to_pairs(records), to_pairs(held_out)
    eval_prompts, eval_rewards = load_eval_prompts(config.eval_prompts, config, records, tokenizer, model, {}, run)

    # The reference's log-probabilities, once an example.
    micro_batch_size = config.micro_batch_size or config.batch_size
    with torch.no_grad():
        for part in micro_batches(pairs + eval_pairs, micro_batch_size, length=lambda p: p.length):
            chosen, rejected, _ = pair_logprobs(reference, part, tokenizer, run)
            for pair, *logprobs in zip(part, chosen.tolist(), rejected.tolist()):
                pair.reference = logprobs

    def losses_of(part):
        chosen, rejected, tokens = pair_logprobs(model, part, tokenizer, run)
        ref_chosen, ref_rejected = torch.tensor([p.reference for p in part], device=run.device).T
        losses = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, config.beta, config.label_smoothing, config.loss,
                          config.alpha, config.reference_free)
        with torch.no_grad():                                                          # implicit rewards: beta log pi / pi_ref
            rewards_chosen, rewards_rejected = config.beta * (chosen - ref_chosen), config.beta * (rejected - ref_rejected)
            stats = {"rewards/chosen": rewards_chosen, "rewards/rejected": rewards_rejected,
                     "rewards/margins": rewards_chosen - rewards_rejected,
                     "rewards/accuracies": (rewards_chosen > rewards_rejected).float(),
                     "logps/chosen": chosen, "logps/rejected": rejected}
            return losses, {k: v.sum().item() for k, v in stats.items()}, tokens

    optimizer = make_optimizer(model.parameters(), config.optimizer, config.lr, config.weight_decay)
    state = run.load_checkpoint({"model": model}, {"optimizer": optimizer})
    total = config.max_steps or steps_of(config.epochs, len(pairs), config.batch_size)
    for step in range(state["step"], total):
        rows = batch_indices(len(pairs), config.batch_size, step, config.seed)
        loss_sum, tokens, sums = 0.0, 0, {}
        for part in micro_batches([pairs[i] for i in rows], micro_batch_size, length=lambda p: p.length):
            losses, stats, n = losses_of(part)
            loss = losses.sum() / len(rows)
            loss.backward()
            loss_sum, tokens = loss_sum + loss.item(), tokens + n
            sums = {k: sums.get(k, 0.0) + v for k, v in stats.items()}
        lr = learning_rate(step, total, config.lr, config.warmup_steps, config.lr_schedule)
        norm = run.step({optimizer: lr}, config.max_grad_norm, step + 1, rows, loss_sum)

        metrics = {"loss": loss_sum, "lr": lr, "grad_norm": norm, **{k: v / len(rows) for k, v in sums.items()}}
        if run.every(config.eval_every, step + 1, total):
            if eval_pairs:
                with torch.no_grad():
                    found = [losses_of(part) for part in micro_batches(eval_pairs, micro_batch_size, length=lambda p: p.length)]
                metrics["eval/loss"] = sum(float(losses.sum()) for losses, *_ in found) / len(eval_pairs)
                metrics["eval/accuracy"] = sum(stats["rewards/accuracies"] for _, stats, _ in found) / len(eval_pairs)
            if eval_prompts:
                found, texts = measure(model, reference, tokenizer, eval_prompts, eval_rewards, config.response_length,
                                       config.temperature, config.seed, run.autocast())
                metrics |= found
                run.samples(step + 1, texts[:8])
        run.log(step + 1, total, metrics, tokens=tokens)
        if run.every(config.save_every, step + 1, total):
            run.save_checkpoint(step + 1, {"model": model}, {"optimizer": optimizer})
    run.finish(model, tokenizer)


if __name__ == "__main__":
    main(Config, train, __doc__)
