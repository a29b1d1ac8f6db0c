"""RRHF: rank responses by the policy's own likelihood, as a reward ranks them (Yuan 2023).

    p_i    = sum_t log pi(y_i,t | x, y_i,<t) / |y_i|               Eq. 1; sum and length include EOS
    L_rank = sum over r_i < r_j of max(0, p_i - p_j)               Eq. 2; no margin, ties contribute nothing
    best   = argmax_i r_i                                          Eq. 3
    L_ft   = - sum_t log pi(y_best,t | x, y_best,<t)               Eq. 4
    L      = L_rank + L_ft                                         Eq. 5

p_i is a mean over tokens and L_ft a sum, so on long responses L_ft outweighs L_rank at the paper's
--rrhf_weight of 1. There is no reference policy, no KL penalty and no value model.

Candidates come from the data (--from_data), from the policy (--sampling), or from both. In the paper's
names, P is --sampling none, BP is beam, DP is diverse_beam, and D is diverse_beam with --from_data false.
They are drawn once, from the starting policy; --resample_every k draws them again every k steps (OP-k).
IP-n is n trainings, each with its own warm-up and decay and candidates from the policy before it:
    for n in 1 2 3; do
        python train_rrhf.py --sampling diverse_beam --init out/ip$((n-1)) --out out/ip$n
    done                             # out/ip0 is the SFT model
To train another model on such candidates, sample_bon.py writes a policy's samples as ranked.jsonl, for
--kind ranked --sampling none --reward given.

The released code differs from the paper, and --released_code reproduces it: p_i and L_ft are divided by the
padded width of the batch instead of |y_i|, because it edits the labels in place before it takes their
length. A result then depends on what else is in the batch. Its weight on L_rank is --rrhf_weight.

Without options it trains out/sft on the built-in prompts: 4 samples and the demonstration, ranked by out/rm.
"""

import itertools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from nanorlhf import ranks
from nanorlhf.data import (Example, Group, collate, describe, encode_prompts, encode_response,
                           length_limits, load_records, to_device)
from nanorlhf.errors import UserError
from nanorlhf.evaluate import eval_sampler
from nanorlhf.files import read_jsonl, require_folder, write_records
from nanorlhf.generate import beam_search, generate
from nanorlhf.model import Transformer
from nanorlhf.options import main
from nanorlhf.rewards import load_reward
from nanorlhf.run import Run
from nanorlhf.tokenizer import load_tokenizer
from nanorlhf.training import batch_indices, learning_rate, make_optimizer, optimizer_step, seed_for, steps_of


@dataclass
class Config:
    # RRHF
    rrhf_weight: float = 1.0         # weight of L_rank (10 and 100 were worse in the paper)
    length_penalty: float = 1.0      # p_i divides by |y_i| to this power
    released_code: bool = False      # use the released code's lengths (see above)
    reward: str = "out/rm"           # ranks candidates: folder, gold, file.py:function, or `given` scores
    sampling: Literal["none", "sample", "beam", "diverse_beam"] = "sample"  # how the policy draws candidates
    num_samples: int = 4             # candidates drawn per prompt
    diversity_penalty: float = 1.0   # of diverse beams
    from_data: bool = True           # the data's own responses are candidates too
    resample_every: int = 0          # draw candidates again every so many steps (OP-k); 0 = once
    kl_coef: float = 0.0             # OP-k: a candidate's score falls by this times log pi / pi_init

    # Data
    init: str = "out/sft"            # starting checkpoint: folder or hub name
    data: str = "reviews"            # record file of prompts, or `reviews` (4000 prompts)
    kind: Literal["prompt", "ranked"] = "prompt"  # of --data: prompts (also with completions), or rankings
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
    share_prompts: bool = False      # compute a prompt once for all its responses; same result up to rounding
    lr: float = 2e-4                 # peak learning rate
    warmup_steps: int = 10           # linear warm-up
    lr_schedule: Literal["cosine", "linear", "constant"] = "linear"  # after the warm-up
    optimizer: Literal["adamw", "adam", "rmsprop", "adafactor"] = "adamw"  # update rule
    weight_decay: float = 0.0        # on matrices only; apart from the loss in AdamW
    max_grad_norm: float = 1.0       # clip the gradient's norm to this; 0 = off

    # Samples, as candidates and to evaluate while training
    eval_prompts: str = ""           # record file of prompts to sample on; '' = test prompts on reviews
    eval_reward: str = ""            # measured there: folder, gold or file.py:function; '' = gold on reviews
    num_eval_prompts: int = 128      # use at most this many of the prompts, one sample each
    response_length: int = 48        # longest sampled response in tokens
    temperature: float = 1.0         # of the samples

    # Run
    eval_every: int = 20             # steps between evaluations, one after the last step included; 0 = never
    save_every: int = 100            # steps between checkpoints; 0 = none
    out: str = "out/rrhf"            # run folder
    overwrite: bool = False          # overwrite an existing run
    resume: bool = False             # continue the run in --out from its newest checkpoint
    seed: int = 0                    # of everything random
    device: str = "auto"             # cpu, cuda, cuda:1, ...; auto = a GPU if there is one
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 is autocast; weights stay float32
    compile: bool = False            # torch.compile the layers
    shard: bool = False              # with torchrun: split each model over the processes (FSDP2)
    deterministic: bool = False      # on a GPU: kernels that give the same bits every time; slower
    tensorboard: bool = False        # write the metrics for TensorBoard too, into --out/tensorboard

    renamed = {"eval_data": "eval_prompts"}  # old names that still work for one release


def rrhf_loss(logps, lengths, scores, rrhf_weight=Config.rrhf_weight, length_penalty=Config.length_penalty,
              released_width=None):
    """Losses [B] = rrhf_weight * L_rank + L_ft, and the two terms.

    logps [B, K]: sums of response log-probabilities; lengths [B, K]: their numbers of tokens, 0 where a
    prompt has fewer than K candidates; scores [B, K]. released_width: the width of the padded batch, which
    the released code takes for every length, and by which it divides L_ft; None: the paper's loss.
    """
    real = lengths > 0
    if released_width:
        lengths = torch.where(real, released_width, 0)
    p = logps / lengths.clamp(min=1) ** length_penalty                       # Eq. 1
    worse = (scores[:, :, None] < scores[:, None, :]) & real[:, :, None] & real[:, None, :]
    rank = ((p[:, :, None] - p[:, None, :]).clamp(min=0) * worse).sum((1, 2))   # Eq. 2: r_i < r_j, p_i > p_j
    best = scores.masked_fill(~real, -torch.inf).argmax(1, keepdim=True)     # Eq. 3
    ft = -logps.gather(1, best)[:, 0] / (released_width or 1)                # Eq. 4
    return rrhf_weight * rank + ft, rank, ft                                 # Eq. 5


def to_groups(candidates):
    """Candidates (prompt and K responses as ids, K scores) -> Groups of K examples and their scores."""
    return [Group([Example(c["prompt"] + y, len(c["prompt"])) for y in c["responses"]], c["scores"])
            for c in candidates]


class Forward(NamedTuple):
    logps: torch.Tensor              # [B, K] log pi(y|x), sums over tokens; 0 where there is no candidate
    lengths: torch.Tensor            # [B, K] |y| in tokens, likewise
    scores: torch.Tensor             # [B, K] likewise
    width: int                       # of the padded batch


def forward(model, groups, tokenizer, run):
    """One forward pass over all candidates of these groups."""
    examples = [e for g in groups for e in g.examples]
    ends = itertools.accumulate(len(g.examples) for g in groups)
    shared = [range(end - len(g.examples), end) for g, end in zip(groups, ends)]   # examples of one prompt
    batch = collate(examples, tokenizer.pad_id, run.device, shared if run.config.share_prompts else None)
    with run.autocast():
        logprobs = model.logprobs(batch.tokens, batch.mask, where=batch.where, packed=batch.packed)
    logps = logprobs.sum(1)                                                  # [sum of K]
    scores = to_device([s for g in groups for s in g.numbers], run.device)
    B, K = len(groups), max(len(g.examples) for g in groups)
    place = [b * K + k for b, g in enumerate(groups) for k in range(len(g.examples))]
    place = to_device(place, run.device)                                     # [sum of K] in a flat [B, K]

    def by_group(flat):                                                      # [sum of K] -> [B, K]
        zeros = torch.zeros(B * K, dtype=flat.dtype, device=run.device)
        return zeros.scatter(0, place, flat).view(B, K)
    return Forward(by_group(logps), by_group(batch.mask.sum(1)), by_group(scores), batch.tokens.shape[1])


def losses_and_stats(out, groups, config):
    """Losses [B] of these groups after their forward pass, and what is logged of each, {name: [B]}."""
    losses, rank, ft = rrhf_loss(out.logps, out.lengths, out.scores, config.rrhf_weight,
                                 config.length_penalty, out.width if config.released_code else None)
    best, mean = [max(g.numbers) for g in groups], [sum(g.numbers) / len(g.numbers) for g in groups]
    best, mean = to_device([best, mean], losses.device)
    return losses, {"loss/rank": rank, "loss/ft": ft, "scores/best": best, "scores/mean": mean}


def draw_candidates(model, records, prompts, tokenizer, reward, config, seed):
    """Candidates of each record: dicts of prompt (ids), responses (K lists of ids) and scores (K numbers).
    prompts: the records' prompts as ids."""
    max_length, _ = length_limits(config, model.config.context)
    length, n, temperature = config.response_length, config.num_samples, config.temperature
    if config.sampling == "none":
        drawn = [[] for _ in records]
    elif config.sampling == "sample":
        responses = generate(model, prompts, length, temperature, num_samples=n, seed=seed,
                             tokenizer=tokenizer).responses()
        drawn = [responses[i:i + n] for i in range(0, len(responses), n)]
    else:
        groups, penalty = (n, config.diversity_penalty) if config.sampling == "diverse_beam" else (1, 0.0)
        drawn = beam_search(model, prompts, length, n, groups, penalty, temperature, tokenizer=tokenizer)
    candidates = []
    for record, prompt, responses in zip(records, prompts, drawn):
        if config.from_data:
            texts = record.get("responses") or ([record["completion"]] if "completion" in record else [])
            room = max_length - len(prompt)
            responses = responses + [encode_response(tokenizer, y, record["prompt"])[:room] for y in texts]
        if not responses:
            raise UserError(f"no candidate for the prompt {record['prompt'][-60:]!r}: --kind {config.kind} "
                            f"gives none and --sampling is {config.sampling}")
        candidates.append(dict(prompt=prompt, responses=responses, scores=record.get("scores")))
    if config.reward != "given":
        counts = [len(c["responses"]) for c in candidates]
        scores = reward([c["prompt"] for c in candidates for _ in c["responses"]],
                        [y for c in candidates for y in c["responses"]],
                        [r for r, count in zip(records, counts) for _ in range(count)])
        for c, own in zip(candidates, scores.split(counts)):
            c["scores"] = own.tolist()
    return candidates


@torch.no_grad()
def subtract_kl(candidates, policy, reference, tokenizer, config, run):
    """Lowers each candidate's score by kl_coef * (log pi(y|x) - log pi_ref(y|x)), where pi is the policy that
    draws now, and keeps the score before as "raw_scores". Then sampling again and again does not run after
    the reward alone (OP-k with KL in Yuan 2023)."""
    def log_ratios(part):
        logps, ref_logps = (forward(m, part, tokenizer, run).logps for m in (policy, reference))
        return (logps - ref_logps).tolist()                                  # [B][K]
    for c, ratios in zip(candidates, run.of_each(to_groups(candidates), log_ratios)):
        c["raw_scores"] = c["scores"]
        c["scores"] = [score - config.kl_coef * ratio for score, ratio in zip(c["scores"], ratios)]


def train(config):
    run = Run(config, "rrhf")
    if run.finished:
        return
    init = require_folder(config.init, "python train_sft.py", Config.init)
    own_responses_only = config.kind == "ranked" and config.sampling == "none" and config.from_data
    if config.reward == "given" and not own_responses_only:
        raise UserError("--reward given ranks the data's own responses by their scores: it needs --kind "
                        "ranked --sampling none")
    if config.kl_coef > 0 and not config.resample_every:
        raise UserError(f"--kl_coef {config.kl_coef:g} does nothing without --resample_every: the first "
                        f"candidates come from --init itself")
    if config.temperature == 0 and config.sampling in ("beam", "diverse_beam"):
        raise UserError(f"--temperature 0: --sampling {config.sampling} needs one above 0")
    tokenizer = load_tokenizer(init)
    model = run.prepare(Transformer.from_pretrained(init), tokenizer)
    reference = run.load_reference(init, tokenizer)                          # of KL: measured, and --kl_coef

    records = load_records(config.data, config.kind, limit=config.limit or None, skip_bad=config.skip_bad,
                           tokenizer=tokenizer, columns=config.columns)
    prompts = encode_prompts(tokenizer, records, config, model.config.context,
                             response_length=1 if config.sampling == "none" else config.response_length)
    describe(run.name, tokenizer, [Example(p, len(p)) for p in prompts])
    rewards = {}
    if config.reward != "given":
        rewards["reward"] = load_reward(config.reward, tokenizer, run.device, records, config.data,
                                        config.micro_batch_size, config.dtype)
    evaluate_samples = eval_sampler(config, records, tokenizer, model, reference, rewards, run)

    optimizer = make_optimizer(model.parameters(), config.optimizer, config.lr, config.weight_decay)
    state = run.load_checkpoint({"model": model}, {"optimizer": optimizer})
    run.begin(state["step"])
    total = config.max_steps or steps_of(config.epochs, len(records), config.batch_size)
    every, groups = config.resample_every or total, None
    for step in range(state["step"], total):
        # Candidates for the prompts of the next `every` steps. They are saved to a file, because on --resume
        # the policy that sampled them no longer exists.
        if groups is None or step % every == 0:
            first = step - step % every
            needed = sorted({i for s in range(first, min(first + every, total))
                             for i in batch_indices(len(records), config.batch_size, s, config.seed)})
            file = run.out / f"candidates-{first:06d}.jsonl"
            candidates = ranks.on_first(read_jsonl, file)
            if not candidates:
                asked, queries = [records[i] for i in needed], [prompts[i] for i in needed]
                seed = seed_for(config.seed, "candidates", first)
                with run.autocast():
                    candidates = draw_candidates(model, asked, queries, tokenizer, rewards.get("reward"),
                                                 config, seed)
                    if config.kl_coef > 0:
                        subtract_kl(candidates, model, reference, tokenizer, config, run)
                write_records(file, candidates)
            groups = dict(zip(needed, to_groups(candidates)))

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
            metrics |= evaluate_samples(step + 1)
        run.log(step + 1, total, metrics, tokens)
        run.checkpoint(step + 1, total, {"model": model}, {"optimizer": optimizer})
    run.finish(model, tokenizer)


if __name__ == "__main__":
    main(Config, train, __doc__)
