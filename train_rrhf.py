"""RRHF: rank responses by the policy's own likelihood, as a reward ranks them (Yuan 2023).

    p_i    = sum_t log pi(y_i,t | x, y_i,<t) / |y_i|                        Eq. 1, EOS included in sum and length
    L_rank = sum over r_i < r_j of max(0, p_i - p_j)                        Eq. 2, no margin; ties contribute nothing
    L_ft   = - sum_t log pi(y_best,t | x, y_best,<t),  best = argmax_i r_i  Eq. 3
    L      = L_rank + L_ft                                                  Eq. 4

L_ft sums over tokens while p_i is a mean over them: on long responses L_ft outweighs L_rank at --rrhf_weight 1, the paper's.
No reference policy, no KL, no value model. Candidates come from the data, from the policy, or both (--sampling): P is the
data alone, BP and DP add beams and diverse beams, D is diverse beams alone (--from_data false). They are drawn once, from
the starting policy; --resample_every k draws anew every k steps: OP-k, and with k the steps of an epoch, IP.

The released code differs from the paper, and --released_code does as it does: it divides by the padded width of the batch
instead of |y_i|, in p_i and in L_ft alike (an in-place edit of the labels comes before the length is taken), so a result
depends on what else is in the batch. Its weight on L_rank is --rrhf_weight.

With no option it trains out/sft on the built-in prompts: 4 samples and the demonstration, ranked by out/rm.
"""

from dataclasses import dataclass

import torch

from nanorlhf.data import (Example, batch_indices, collate, encode_prompt, encode_response, load_records, load_tokenizer,
                           micro_batches, steps_of)
from nanorlhf.evaluate import load_eval_prompts, measure
from nanorlhf.generate import beam_search, generate, prompt_room
from nanorlhf.model import Transformer
from nanorlhf.rewards import load_reward
from nanorlhf.run import Run, UserError, learning_rate, main, make_optimizer, need_folder, read_jsonl, seed_for, write_records


@dataclass
class Config:
    init: str = "out/sft"            # starting checkpoint folder
    data: str = "reviews"            # record file, or `reviews`
    kind: str = "prompt"             # of --data: prompt (its completion, if any, is a candidate), or ranked (responses, scores)
    reward: str = "out/rm"           # ranks the candidates: reward-model folder, gold, file.py:function, or `given` scores
    sampling: str = "sample"         # candidates drawn from the policy: none (P), sample, beam (BP) or diverse_beam (DP)
    num_samples: int = 4             # how many a prompt
    from_data: bool = True           # the data's own responses are candidates too
    resample_every: int = 0          # draw candidates anew from the policy every so many steps (OP-k, IP); 0 = once
    eval_data: str = ""              # prompts to sample on while training: record file; '' = the test prompts, if on `reviews`
    eval_reward: str = ""            # a reward that is only measured there: as --reward; '' = gold, if on `reviews`
    limit: int = 0                   # at most so many records; 0 = all (of `reviews`: 4000 to train on, else 500)
    skip_bad: bool = False           # skip bad rows and count them, instead of stopping at the first
    out: str = "out/rrhf"            # run folder
    overwrite: bool = False          # replace a run that is there
    resume: bool = False             # continue the run in --out from its newest checkpoint
    seed: int = 0                    # of everything random
    device: str = "auto"             # cpu, cuda, cuda:1, ...; auto takes a GPU if there is one
    dtype: str = "float32"           # float32, or bfloat16 (autocast; weights stay float32)
    compile: bool = False            # torch.compile the layers

    rrhf_weight: float = 1.0         # of L_rank (10 and 100 were worse in the paper)
    length_penalty: float = 1.0      # p_i divides by |y_i| to this power
    released_code: bool = False      # the released code's lengths (see above)
    max_length: int = 0              # longest prompt + response in tokens; 0 = the model's context
    max_prompt_length: int = 0       # a row that is too long has its prompt cut to this first; 0 = half of max_length
    keep: str = "end"                # what a too long prompt keeps: end, start, or tldr (Stiennon 2020's rule)
    response_length: int = 48        # longest sampled response in tokens
    temperature: float = 1.0         # of the sampled candidates (0.8 in the paper's diverse beams)
    diversity_penalty: float = 1.0   # of diverse beams
    epochs: float = 1.0              # passes over the data
    max_steps: int = 0               # train for so many steps, whatever --epochs; 0 = as many as they make
    batch_size: int = 32             # prompts a step
    micro_batch_size: int = 0        # prompts at a time in memory; 0 = batch_size
    lr: float = 2e-4                 # peak learning rate
    warmup_steps: int = 10           # linear warm-up
    lr_schedule: str = "linear"      # cosine, linear or constant
    optimizer: str = "adamw"         # adamw, adam or rmsprop
    weight_decay: float = 0.0        # on matrices
    max_grad_norm: float = 1.0       # clip to this norm; 0 = off
    num_eval_prompts: int = 128      # evaluation prompts, one sample each
    eval_every: int = 20             # steps between evaluations, the last step included; 0 = never
    save_every: int = 100            # steps between checkpoints; 0 = none


def rrhf_loss(logps, lengths, scores, rrhf_weight=1.0, length_penalty=1.0):
    """Losses [B] = rrhf_weight * L_rank + L_ft, and the two terms.

    logps [B, K]: sums of response log-probabilities; lengths [B, K]: their numbers of tokens, 0 where a prompt has fewer
    than K candidates; scores [B, K].
    """
    real = lengths > 0
    p = logps / lengths.clamp(min=1) ** length_penalty                                 # Eq. 1
    worse = (scores[:, :, None] < scores[:, None, :]) & real[:, :, None] & real[:, None, :]
    rank = ((p[:, :, None] - p[:, None, :]).clamp(min=0) * worse).sum((1, 2))          # Eq. 2: r_i < r_j, p_i > p_j
    best = scores.masked_fill(~real, -torch.inf).argmax(1, keepdim=True)
    ft = -logps.gather(1, best)[:, 0]                                                  # Eq. 3
    return rrhf_weight * rank + ft, rank, ft                                           # Eq. 4


def rrhf_loss_released(logps, lengths, scores, width, rrhf_weight=1.0, length_penalty=1.0):
    """The same with the released code's lengths: every one is the batch's padded width, and L_ft is a mean over it."""
    widths = torch.where(lengths > 0, width, 0)
    _, rank, ft = rrhf_loss(logps, widths, scores, rrhf_weight, length_penalty)
    return rrhf_weight * rank + ft / width, rank, ft / width


def candidate_logprobs(model, part, tokenizer, run):
    """One forward pass over all candidates of these prompts: log pi(y|x), |y| and the score of each, [B, K] with zeros where a
    prompt has fewer than K; then the padded width and the number of tokens."""
    examples = [Example(c["prompt"] + y, len(c["prompt"])) for c in part for y in c["responses"]]
    batch = collate(examples, tokenizer.pad_id, run.device)
    with run.autocast():
        logprobs = model.logprobs(batch.tokens, batch.mask).sum(1)                     # [sum of K]
    K = max(len(c["responses"]) for c in part)
    real = torch.tensor([[k < len(c["responses"]) for k in range(K)] for c in part], device=run.device)
    flat_scores = torch.tensor([s for c in part for s in c["scores"]], device=run.device)
    logps, lengths, scores = (torch.zeros(real.shape, dtype=flat.dtype, device=run.device).masked_scatter(real, flat)
                              for flat in (logprobs, batch.mask.sum(1), flat_scores))
    return logps, lengths, scores, batch.tokens.shape[1], int(batch.lengths.sum())


def draw_candidates(model, records, tokenizer, reward, config, seed):
    """Candidates of each record: dicts of prompt (ids), responses (K lists of ids) and scores (K)."""
    max_length = config.max_length or model.config.context
    room = prompt_room(model, 1 if config.sampling == "none" else config.response_length, max_length)
    prompts = [encode_prompt(tokenizer, r["prompt"], config.max_prompt_length or room, config.keep) for r in records]
    if (longest := max(map(len, prompts))) >= max_length:
        raise UserError(f"a prompt of {longest} tokens leaves no room for a response in {max_length}: lower --max_prompt_length")
    drawn = [[] for _ in records]
    if config.sampling == "sample":
        flat = generate(model, prompts, config.response_length, config.temperature, num_samples=config.num_samples, seed=seed,
                        tokenizer=tokenizer).responses()
        drawn = [flat[i:i + config.num_samples] for i in range(0, len(flat), config.num_samples)]
    elif config.sampling in ("beam", "diverse_beam"):
        groups, penalty = (config.num_samples, config.diversity_penalty) if config.sampling == "diverse_beam" else (1, 0.0)
        drawn = beam_search(model, prompts, config.response_length, config.num_samples, groups, penalty, config.temperature,
                            tokenizer=tokenizer)
    candidates = []
    for record, prompt, responses in zip(records, prompts, drawn):
        if config.from_data:
            own = record.get("responses") or [record[k] for k in ("completion",) if k in record]
            responses = responses + [encode_response(tokenizer, y, record["prompt"])[:max_length - len(prompt)] for y in own]
        if not responses:
            raise UserError(f"no candidate for the prompt {record['prompt'][-60:]!r}: --kind {config.kind} gives none and "
                            f"--sampling is {config.sampling}")
        candidates.append(dict(prompt=prompt, responses=responses, scores=record.get("scores")))
    if config.reward != "given":
        pairs = [(c["prompt"], y, r["prompt"]) for r, c in zip(records, candidates) for y in c["responses"]]
        flat = reward(*map(list, zip(*pairs)))
        for c, scores in zip(candidates, flat.split([len(c["responses"]) for c in candidates])):
            c["scores"] = scores.tolist()
    return candidates


def train(config):
    run = Run(config, "rrhf", kind=("prompt", "ranked"), sampling=("none", "sample", "beam", "diverse_beam"))
    if run.finished:
        return
    init = need_folder(config.init, "python train_sft.py")
    if config.reward == "out/rm":
        need_folder(config.reward, "python train_rm.py")
    if config.reward == "given" and (config.kind != "ranked" or config.sampling != "none" or not config.from_data):
        raise UserError("--reward given ranks the data's own responses by their scores: it needs --kind ranked --sampling none")
    tokenizer = load_tokenizer(init)
    model = run.prepare(Transformer.from_pretrained(init), tokenizer)
    reference = run.prepare(Transformer.from_pretrained(init), tokenizer).requires_grad_(False)   # only to measure KL
    reward = load_reward(config.reward, tokenizer, run.device) if config.reward != "given" else None
    records = load_records(config.data, config.kind, limit=config.limit or None, skip_bad=config.skip_bad, tokenizer=tokenizer)
    rewards = {"reward": reward} if reward else {}
    eval_prompts, eval_rewards = load_eval_prompts(config.eval_data, config, records, tokenizer, model, rewards, run)

    optimizer = make_optimizer(model.parameters(), config.optimizer, config.lr, config.weight_decay)
    state = run.load_checkpoint({"model": model}, {"optimizer": optimizer})
    total = config.max_steps or steps_of(config.epochs, len(records), config.batch_size)
    every, candidates = config.resample_every or total, None
    for step in range(state["step"], total):
        # Candidates for the prompts of the next `every` steps; kept in a file, since the policy that drew them will be gone.
        if candidates is None or step % every == 0:
            first = step - step % every
            needed = sorted({i for s in range(first, min(first + every, total))
                             for i in batch_indices(len(records), config.batch_size, s, config.seed)})
            file = run.out / f"candidates-{first:06d}.jsonl"
            if not file.exists():
                with run.autocast():
                    drawn = draw_candidates(model, [records[i] for i in needed], tokenizer, reward, config,
                                            seed_for(config.seed, "candidates", first))
                write_records(file, drawn)
            candidates = dict(zip(needed, read_jsonl(file)))

        rows = batch_indices(len(records), config.batch_size, step, config.seed)
        loss_sum, tokens, sums = 0.0, 0, {}
        for part in micro_batches([candidates[i] for i in rows], config.micro_batch_size or config.batch_size,
                                  length=lambda c: len(c["prompt"]) + max(map(len, c["responses"]))):
            logps, lengths, scores, width, n = candidate_logprobs(model, part, tokenizer, run)
            if config.released_code:
                losses, rank, ft = rrhf_loss_released(logps, lengths, scores, width, config.rrhf_weight, config.length_penalty)
            else:
                losses, rank, ft = rrhf_loss(logps, lengths, scores, config.rrhf_weight, config.length_penalty)
            loss = losses.sum() / len(rows)
            loss.backward()
            loss_sum, tokens = loss_sum + loss.item(), tokens + n
            found = {"loss/rank": rank.sum().item(), "loss/ft": ft.sum().item(),
                     "scores/best": sum(max(c["scores"]) for c in part),
                     "scores/mean": sum(sum(c["scores"]) / len(c["scores"]) for c in part)}
            sums = {k: sums.get(k, 0.0) + v for k, v in found.items()}
        lr = learning_rate(step, total, config.lr, config.warmup_steps, config.lr_schedule)
        norm = run.step({optimizer: lr}, config.max_grad_norm, step + 1, rows, loss_sum)

        metrics = {"loss": loss_sum, "lr": lr, "grad_norm": norm, **{k: v / len(rows) for k, v in sums.items()}}
        if eval_prompts and run.every(config.eval_every, step + 1, total):
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
