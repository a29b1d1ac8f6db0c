"""PPO from a reward: RLHF as a Markov decision process (Ziegler 2019; Stiennon 2020; Chaudhari 2024).

State s_t = [x, y_<t], action a_t = y_t. Transitions are deterministic; the reward comes at the end (with
--reward_at sentences, at the end of each sentence). A step:

    1 roll out     y ~ pi(. | x) at a temperature that all log-probabilities below share
    2 score        s = r(x, y); a response without EOS scores badly (--missing_eos)
    3 rewards      r_t = -beta k1_t, k1_t = log pi_old(y_t) - log pi_ref(y_t); s is added at the last token
    4 advantages   delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  R_t = A_t + V_t
    5 update       several epochs over minibatches, with rho_t = pi(y_t) / pi_old(y_t):
                   L = mean max(-A rho, -A clip(rho, 1 +- cliprange))
                       + vf_coef/2 mean max((V - R)^2, (clip(V, V_old +- cliprange_value) - R)^2)

Differences from some public implementations:
  - s is placed on the last token (EOS, unless truncated), not one slot behind it.
  - Padding never enters a mean.
  - The KL estimator is k1. --kl_estimator k2 and k3 reproduce other code: in a reward they do not have the
    gradient of KL (see kl_penalty), and KL ends far higher at the same beta.
  - There is no dropout and no entropy bonus. A rollout holds only what the policy sampled; no EOS is forced.
  - Policy and value are separate networks, each with its own Adam and its own clipping. vf_coef therefore
    only scales the value's gradient before clipping.

Without options it trains out/sft on the built-in reviews against out/rm. --reward gold is PPO-GT: PPO on the
true reward.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from nanorlhf import ranks
from nanorlhf.data import Example, collate, describe, encode_prompts, load_records, to_device
from nanorlhf.errors import UserError
from nanorlhf.evaluate import eval_sampler
from nanorlhf.files import require_folder
from nanorlhf.generate import generate
from nanorlhf.model import Transformer, ValueModel
from nanorlhf.options import main
from nanorlhf.rewards import load_reward, reads_text
from nanorlhf.run import Run
from nanorlhf.tokenizer import check_same_ids, load_tokenizer, tokenizer_of
from nanorlhf.training import (batch_indices, epoch_order, learning_rate, make_optimizer, optimizer_step,
                               seed_for, totals)


@dataclass
class Config:
    # PPO
    reward: str = "out/rm"           # reward model's folder or hub name, gold, or file.py:function
    kl_coef: float = 0.05            # beta, the price of KL
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"  # only k1 has KL's gradient; k2, k3: what other code does
    kl_target: float = 0.0           # adapt beta until the sequence KL is this (Ziegler 2019); 0 = fixed beta
    kl_horizon: float = 10000.0      # episodes over which beta adapts
    gamma: float = 1.0               # discount
    lam: float = 0.95                # GAE's lambda
    num_ppo_epochs: int = 2          # passes over each batch of rollouts
    num_mini_batches: int = 2        # updates per pass
    cliprange: float = 0.2           # of the ratio
    cliprange_value: float = 0.2     # of the value's change
    vf_coef: float = 0.1             # weight of the value loss
    whiten_rewards: bool = False     # scale the per-token rewards to variance 1, keeping their mean
    reward_at: Literal["end", "sentences"] = "end"  # pay the score at the end, or sentence by sentence
    missing_eos: Literal["replace", "subtract", "none"] = "replace"  # no EOS: score = -penalty, or -= penalty
    missing_eos_penalty: float = 1.0  # penalty of a response without EOS

    # Data
    init: str = "out/sft"            # starting checkpoint: folder or hub name
    reference: str = ""              # reference policy of the KL penalty: folder or hub name; '' = --init
    value_init: str = ""             # '' = --reward if its tokenizer is --init's, else --init
    data: str = "reviews"            # record file of prompts, or `reviews` (4000 prompts)
    columns: str = ""                # other names of its columns, OURS=THEIRS: prompt=question,chosen=good
    limit: int = 0                   # use at most this many records; 0 = all
    skip_bad: bool = False           # skip bad rows and count them, instead of stopping at the first

    # Lengths in tokens
    max_length: int = 0              # longest prompt + response; 0 = the model's context
    max_prompt_length: int = 0       # cut longer prompts to this; 0 = half of max_length
    keep: Literal["end", "start", "tldr"] = "end"  # what an overlong prompt keeps (tldr: Stiennon's rule)
    response_length: int = 48        # longest sampled response

    # Optimisation
    max_steps: int = 60              # number of steps, one batch of rollouts each
    batch_size: int = 128            # prompts per step, one response each
    micro_batch_size: int = 0        # rows in memory at a time; 0 = a whole minibatch
    gradient_checkpointing: bool = False  # compute each layer again in the backward pass, to save memory
    frozen_layers: float = 0.0       # do not train this share of the layers, the lowest, and the embeddings
    lr: float = 3e-4                 # of the policy, falling linearly to 0
    value_lr: float = 1e-3           # of the value model, falling linearly to 0
    warmup_steps: int = 0            # linear warm-up
    adam_eps: float = 1e-5           # Adam's epsilon (Huang 2024)
    max_grad_norm: float = 1.0       # clip the norm of each network's gradient to this; 0 = off

    # Samples, as rollouts and to evaluate while training
    eval_prompts: str = ""           # record file of prompts to sample on; '' = test prompts on reviews
    eval_reward: str = ""            # measured there: folder, gold or file.py:function; '' = gold on reviews
    num_eval_prompts: int = 128      # use at most this many of the prompts, one sample each
    temperature: float = 1.0         # of the samples, and so of all log-probabilities

    # Run
    eval_every: int = 10             # steps between evaluations, one after the last step included; 0 = never
    save_every: int = 50             # steps between checkpoints; 0 = none
    out: str = "out/ppo"             # run folder
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


def whiten(values, mask, shift_mean=True):
    """(v - mean) / std over the mask, with the biased variance; shift_mean=False keeps the mean. values and
    mask [B, T] -> [B, T], 0 outside the mask."""
    n = mask.sum()
    mean = (values * mask).sum() / n
    var = (((values - mean) ** 2) * mask).sum() / n
    out = (values - mean) * torch.rsqrt(var + 1e-8)
    return (out if shift_mean else out + mean) * mask


def kl_penalty(logprobs, ref_logprobs, estimator=Config.kl_estimator):
    """Per-token penalty from the sampled tokens, [B, T]. k1 is the paper's (Ziegler 2019, Eq. 2).

    k1 and k3 both have the mean KL, but in a reward the penalty is a constant, and what counts is
    E[penalty grad log pi]. For k1 that is the gradient of KL(pi || ref). For k3 it is that of KL(pi || ref)
    minus that of KL(ref || pi). k3's and k2's have no first-order term at the reference, so they hardly hold
    the policy near it. Both are kept as what other public code does, not as better estimators.
    """
    k1 = logprobs - ref_logprobs
    return {"k1": k1, "k2": k1 ** 2 / 2, "k3": torch.exp(-k1) - 1 + k1}[estimator]


def token_rewards(scores, kl, mask, kl_coef):
    """r_t = -beta kl_t, plus the score at the last response token. scores [B]; kl, mask [B, T] -> [B, T]."""
    last = mask * (mask.flip(1).cumsum(1) == 1).flip(1)                      # mask 0110 -> last 0010
    return -kl_coef * kl * mask + scores[:, None] * last


@torch.no_grad()
def potentials(reward, queries, responses, records, mask, tokenizer):
    """Phi of the state before each token, [B, T]: the score of the sentences written so far, as if the
    response ended there, and 0 before the end of the first."""
    phi, rows, first, prefixes = torch.zeros(mask.shape, device=mask.device), [], [], []
    for i, (query, response) in enumerate(zip(queries, responses)):
        for t, token in enumerate(response[:-1], 1):
            if tokenizer.decode([token], start=False).rstrip().endswith((".", "!", "?")):
                rows.append(i)
                first.append(len(query) + t)
                prefixes.append(response[:t] + [tokenizer.eos_id])
    if rows:
        scores = reward([queries[i] for i in rows], prefixes, [records[i] for i in rows]).tolist()
        for i, t, score in zip(rows, first, scores):                         # a later sentence overwrites
            phi[i, t:] = score
    return phi * mask


def shaping_rewards(phi, mask, gamma=Config.gamma):
    """F_t = gamma Phi(s_{t+1}) - Phi(s_t), which changes no policy's order (Ng 1999, Theorem 1). Phi is 0 in
    the state after the last token, so with gamma = 1 a response's F sum to 0. phi, mask [B, T] -> [B, T]."""
    return (gamma * F.pad(phi[:, 1:], (0, 1)) - phi) * mask


def advantages(rewards, values, mask, gamma=Config.gamma, lam=Config.lam):
    """Generalised advantage estimation (Schulman 2016). Returns (advantages, returns = advantages + values).

    rewards, values, mask [B, T], where values[:, t] is V before token t. A row's response is one run of the
    mask, and V after its last token is 0.
    """
    values = values * mask
    result, last = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        next_value = values[:, t + 1] if t + 1 < values.shape[1] else 0.0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        last = (delta + gamma * lam * last) * mask[:, t]
        result[:, t] = last
    return result, result + values


def ppo_loss(logprobs, old_logprobs, advantages, values, old_values, returns, mask, count,
             cliprange=Config.cliprange, cliprange_value=Config.cliprange_value, vf_coef=Config.vf_coef):
    """Clipped surrogate and clipped value loss, summed over the mask and divided by `count`, the minibatch's
    tokens. All tensors [B, T]. Returns (policy loss + vf_coef * value loss, dict of sums / count to log), all
    of them scalar tensors."""
    logratio = (logprobs - old_logprobs) * mask
    ratio = logratio.exp()
    pg_loss1 = -advantages * ratio
    pg_loss2 = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    pg_loss = (torch.max(pg_loss1, pg_loss2) * mask).sum() / count
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    vf_loss1, vf_loss2 = (values - returns) ** 2, (clipped - returns) ** 2
    vf_loss = 0.5 * (torch.max(vf_loss1, vf_loss2) * mask).sum() / count
    with torch.no_grad():
        stats = {"loss/policy": pg_loss, "loss/value": vf_loss,
                 "policy/approxkl": 0.5 * (logratio ** 2).sum() / count,
                 "policy/clipfrac": ((pg_loss2 > pg_loss1) * mask).sum() / count,
                 "val/clipfrac": ((vf_loss2 > vf_loss1) * mask).sum() / count,
                 "val/ratio": (ratio * mask).sum() / count}
    return pg_loss + vf_coef * vf_loss, {k: v.detach() for k, v in stats.items()}


def adapt_kl_coef(kl_coef, kl, target, episodes, horizon):
    """Raises beta if the sequence KL is above its target, by at most 20% per horizon (Ziegler 2019, section
    2.2), and lowers it likewise."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


def scores_without_eos(scores, finished, config):
    """Scores [B] after the rule --missing_eos for responses that did not end. finished: [B] bool."""
    if config.missing_eos == "replace":
        return torch.where(finished, scores, -config.missing_eos_penalty)
    if config.missing_eos == "subtract":
        return scores - config.missing_eos_penalty * ~finished
    return scores


def warn_if_ending_does_not_pay(scores, finished, config):
    """Two reasons why a policy would learn nothing, or never to end; said once, at the first step."""
    if not finished.any():
        counts = (f", and each counts as {-config.missing_eos_penalty:g}, not its reward (--missing_eos)"
                  if config.missing_eos == "replace" else "")
        print(f"ppo: no response ended within --response_length {config.response_length}{counts}: raise it, "
              f"or start from a model that has learned to stop", flush=True)
    elif config.missing_eos == "replace" and scores[finished].mean() < -config.missing_eos_penalty:
        print(f"ppo: scores average {scores[finished].mean():.3g}, so a response that never ends would do "
              f"better with its {-config.missing_eos_penalty:g}: raise --missing_eos_penalty, or center the "
              f"reward", flush=True)


def values_before(value_model, tokens):
    """V of the state before each token, [B, T]: the value model's output one position earlier."""
    return F.pad(value_model(tokens)[:, :-1], (1, 0))


@torch.no_grad()
def rollout_logprobs_and_values(policy, reference, value_model, examples, tokenizer, config, run):
    """(log pi_old, log pi_ref, entropy of pi_old, V_old) of the rollouts, each [B, T]."""
    parts, T = [], max(e.length for e in examples)
    own = ranks.deal(range(len(examples)), lambda i: examples[i].length)
    with run.autocast():
        for part in ranks.split(own, len(examples), run.micro_batch_size):
            batch = collate([examples[i] for i in part], tokenizer.pad_id, run.device)
            tokens, mask, where = batch.tokens, batch.mask, batch.where
            logprobs, entropy = policy.logprobs(tokens, mask, config.temperature, entropy=True, where=where)
            ref_logprobs = reference.logprobs(tokens, mask, config.temperature, where=where)
            columns = logprobs, ref_logprobs, entropy, values_before(value_model, tokens)
            parts.append([F.pad(column, (0, T - tokens.shape[1])) for column in columns])
    return ranks.rows_of_all([torch.cat(column) for column in zip(*parts)], own, len(examples))


def train(config):
    run = Run(config, "ppo")
    if run.finished:
        return
    init = require_folder(config.init, "python train_sft.py", Config.init)
    if config.temperature <= 0:
        raise UserError(f"--temperature {config.temperature}: PPO needs samples, so it must be above 0")
    tokenizer = load_tokenizer(init)
    policy = run.prepare(Transformer.from_pretrained(init), tokenizer)
    reference = run.load_reference(config.reference or init, tokenizer)

    records = load_records(config.data, "prompt", limit=config.limit or None, skip_bad=config.skip_bad,
                           tokenizer=tokenizer, columns=config.columns)
    prompts = encode_prompts(tokenizer, records, config, policy.config.context)
    describe(run.name, tokenizer, [Example(p, len(p)) for p in prompts])
    reward = load_reward(config.reward, tokenizer, run.device, records, config.data, config.micro_batch_size,
                         config.dtype)
    value_init = config.value_init or init
    if not config.value_init and not reads_text(config.reward):
        if tokenizer_of(config.reward, tokenizer).same_ids(tokenizer):
            value_init = config.reward
    check_same_ids("--value_init", value_init, tokenizer)
    value_model = run.prepare(ValueModel.from_pretrained(value_init), tokenizer)
    evaluate_samples = eval_sampler(config, records, tokenizer, policy, reference, {"reward": reward}, run)

    policy_optimizer = make_optimizer(policy.parameters(), "adam", config.lr, eps=config.adam_eps)
    value_optimizer = make_optimizer(value_model.parameters(), "adam", config.value_lr, eps=config.adam_eps)
    modules = {"policy": policy, "value": value_model}
    optimizers = {"policy_optimizer": policy_optimizer, "value_optimizer": value_optimizer}
    state = run.load_checkpoint(modules, optimizers)
    run.begin(state["step"])
    kl_coef = state.get("kl_coef", config.kl_coef)
    for step in range(state["step"], config.max_steps):
        # 1. Roll out: the policy answers the batch's prompts.
        rows = batch_indices(len(prompts), config.batch_size, step, config.seed)
        queries, asked = [prompts[i] for i in rows], [records[i] for i in rows]
        with run.autocast():
            samples = generate(policy, queries, config.response_length, config.temperature,
                               seed=seed_for(config.seed, "rollout", step), tokenizer=tokenizer)
        responses = samples.responses()
        examples = [Example(q + r, len(q)) for q, r in zip(queries, responses)]
        lengths = [e.length for e in examples]
        mask = collate(examples, tokenizer.pad_id, run.device).mask          # [B, T]

        # 2. Score: the reward of each whole response.
        raw_scores = reward(queries, responses, asked)                       # [B]
        if step == 0:
            warn_if_ending_does_not_pay(raw_scores, samples.finished.cpu(), config)
        raw_scores = to_device(raw_scores, run.device)
        scores = scores_without_eos(raw_scores, samples.finished, config)

        # 3. Rewards: the KL penalty at every token, the score at the last. The log-probabilities and values
        # at rollout time stay fixed during the inner epochs.
        old_logprobs, ref_logprobs, entropy, old_values = rollout_logprobs_and_values(
            policy, reference, value_model, examples, tokenizer, config, run)
        kl = kl_penalty(old_logprobs, ref_logprobs, config.kl_estimator) * mask   # [B, T]
        rewards = token_rewards(scores, kl, mask, kl_coef)
        if config.reward_at == "sentences":
            phi = potentials(reward, queries, responses, asked, mask, tokenizer)
            rewards = rewards + shaping_rewards(phi, mask, config.gamma)
        if config.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)

        # 4. Advantages, whitened after the returns are taken.
        adv, returns = advantages(rewards, old_values, mask, config.gamma, config.lam)
        adv = whiten(adv, mask)

        # 5. Update.
        stats, updates, size = Counter(), 0, len(rows)
        decay = learning_rate(step, config.max_steps, 1.0, config.warmup_steps, "linear")    # from 1 to 0
        rates = {policy_optimizer: config.lr * decay, value_optimizer: config.value_lr * decay}
        for epoch in range(config.num_ppo_epochs):
            order = epoch_order(size, seed_for(config.seed, "minibatches", step), epoch)
            for minibatch in np.array_split(order, min(config.num_mini_batches, size)):
                count, parts = sum(len(responses[i]) for i in minibatch), []
                with run.autocast():
                    for part in run.micro_batches(minibatch.tolist(), lengths.__getitem__):
                        batch = collate([examples[i] for i in part], tokenizer.pad_id, run.device)
                        at, T = to_device(part, run.device), batch.tokens.shape[1]   # its rows and its width
                        logprobs = policy.logprobs(batch.tokens, batch.mask, config.temperature,
                                                   where=batch.where)
                        values = values_before(value_model, batch.tokens)
                        loss, part_stats = ppo_loss(
                            logprobs, old_logprobs[at, :T], adv[at, :T], values, old_values[at, :T],
                            returns[at, :T], batch.mask, count, config.cliprange, config.cliprange_value,
                            config.vf_coef)
                        loss.backward()
                        parts.append({"loss": loss, **part_stats})
                norms, sums = optimizer_step(rates, config.max_grad_norm, step + 1, rows, parts)
                if config.dtype == "float32":                               # before the first update rho is 1
                    assert updates > 0 or abs(sums["val/ratio"] - 1) < 1e-3, sums
                stats.update(sums | {"grad_norm/policy": norms[0], "grad_norm/value": norms[1]})
                updates += 1

        count = sum(map(len, responses))
        sequence_kl = ((old_logprobs - ref_logprobs) * mask).sum(1).mean()   # sum of k1 over a response
        metrics = totals([{"objective/scores": scores.mean(), "objective/raw_scores": raw_scores.mean(),
                           "objective/kl": sequence_kl,
                           "objective/rlhf_reward": scores.mean() - kl_coef * kl.sum(1).mean(),
                           "objective/entropy": entropy.sum() / count,
                           "objective/ended": samples.finished.float().mean(),
                           "val/mean": (old_values * mask).sum() / count}])
        metrics |= {"objective/length": count / len(rows), "objective/kl_coef": kl_coef,
                    "lr": config.lr * decay}
        metrics |= {k: v / updates for k, v in stats.items() if k != "loss"}
        if config.kl_target > 0:
            kl_coef = adapt_kl_coef(kl_coef, metrics["objective/kl"], config.kl_target, len(rows),
                                    config.kl_horizon)
        if run.due(config.eval_every, step + 1, config.max_steps):
            metrics |= evaluate_samples(step + 1)
        run.log(step + 1, config.max_steps, metrics, tokens=sum(lengths))
        run.checkpoint(step + 1, config.max_steps, modules, optimizers, {"kl_coef": kl_coef})
    run.finish(policy, tokenizer)


if __name__ == "__main__":
    main(Config, train, __doc__)
