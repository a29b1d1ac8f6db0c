"""PPO from a reward: RLHF as a Markov decision process (Ziegler 2019; Stiennon 2020; Ouyang 2022; Chaudhari 2024).

State s_t = [x, y_<t], action a_t = y_t, the next state is certain, and the reward comes at the end. Each step of the loop:

    1 roll out     y ~ pi(. | x) at a temperature which every log-probability below shares
    2 score        s = r(x, y); a response that never ended scores badly, whatever the reward model says
    3 rewards      r_t = -beta k1_t, with k1_t = log pi_old(y_t) - log pi_ref(y_t); s is added at the last real token, EOS
    4 advantages   delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  returns R_t = A_t + V_t  (GAE)
    5 update       several epochs over minibatches, rho_t = pi(y_t) / pi_old(y_t):
                   L = mean max(-A rho, -A clip(rho, 1 +- cliprange)) + vf_coef/2 mean max((V - R)^2, (clip(V, V_old +- c) - R)^2)

Done otherwise than in some public code: s is placed on EOS, not one slot after it; padding never enters a mean; no dropout,
no entropy bonus; the rollout keeps only what the policy sampled, so no EOS is forced on it. Policy and value are separate
networks, each with its own Adam and clipping (vf_coef then only scales the value's gradient before clipping).

With no option it trains out/sft on the built-in reviews against out/rm; --reward gold is PPO-GT, PPO on the true reward.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanorlhf.data import (Example, batch_indices, collate, encode_prompt, epoch_order, load_records, load_tokenizer,
                           micro_batches, need_same_ids, tokenizer_of)
from nanorlhf.evaluate import load_eval_prompts, measure
from nanorlhf.generate import generate, prompt_room
from nanorlhf.model import Transformer, ValueModel
from nanorlhf.rewards import load_reward, reads_text
from nanorlhf.run import (Run, UserError, learning_rate, main, make_optimizer, need_folder, need_same_vocabulary,
                          seed_for)


@dataclass
class Config:
    init: str = "out/sft"            # starting checkpoint folder
    reference: str = ""              # folder of the policy that KL is taken to; '' = --init
    reward: str = "out/rm"           # reward-model folder, `gold`, or file.py:function
    value_init: str = ""             # folder the value model starts from; '' = --reward if it has --init's tokenizer, else --init
    data: str = "reviews"            # prompts: record file, or `reviews`
    eval_data: str = ""              # prompts to sample on while training: record file; '' = the test prompts, if on `reviews`
    eval_reward: str = ""            # a reward that is only measured there: as --reward; '' = gold, if on `reviews`
    limit: int = 0                   # at most so many prompts; 0 = all (of `reviews`: 4000 to train on, else 500)
    skip_bad: bool = False           # skip bad rows and count them, instead of stopping at the first
    out: str = "out/ppo"             # run folder
    overwrite: bool = False          # replace a run that is there
    resume: bool = False             # continue the run in --out from its newest checkpoint
    seed: int = 0                    # of everything random
    device: str = "auto"             # cpu, cuda, cuda:1, ...; auto takes a GPU if there is one
    dtype: str = "float32"           # float32, or bfloat16 (autocast; weights stay float32)
    compile: bool = False            # torch.compile the layers

    max_prompt_length: int = 0       # longest prompt in tokens; 0 = what the context leaves beside the response
    keep: str = "end"                # what a too long prompt keeps: end, start, or tldr (Stiennon 2020's rule)
    response_length: int = 48        # longest response in tokens
    temperature: float = 1.0         # of the rollouts, and so of every log-probability
    max_steps: int = 60              # rollout batches
    batch_size: int = 128            # prompts a step, one response each
    micro_batch_size: int = 0        # rows at a time in memory; 0 = a whole minibatch
    num_ppo_epochs: int = 2          # passes over each batch of rollouts
    num_mini_batches: int = 2        # updates a pass
    lr: float = 3e-4                 # of the policy; falls linearly to 0
    value_lr: float = 1e-3           # of the value model; falls linearly to 0
    warmup_steps: int = 0            # linear warm-up
    adam_eps: float = 1e-5           # Adam's epsilon (Huang 2024)
    max_grad_norm: float = 1.0       # clip each network's gradient to this norm; 0 = off
    kl_coef: float = 0.05            # beta
    kl_estimator: str = "k1"         # per-token penalty: k1 = logratio, k2 = logratio^2/2, k3 = e^-logratio - 1 + logratio
    kl_target: float = 0.0           # adapt beta until the sequence KL is this (Ziegler 2019); 0 = fixed beta
    kl_horizon: float = 10000.0      # episodes over which beta adapts
    gamma: float = 1.0               # discount
    lam: float = 0.95                # GAE's lambda
    whiten_rewards: bool = False     # scale the per-token rewards to variance 1, keeping their mean
    cliprange: float = 0.2           # of the ratio
    cliprange_value: float = 0.2     # of the value's change
    vf_coef: float = 0.1             # weight of the value loss
    missing_eos: str = "replace"     # score of a response without EOS: replace (by -penalty), subtract (the penalty) or none
    missing_eos_penalty: float = 1.0  # how much
    num_eval_prompts: int = 128      # evaluation prompts, one sample each
    eval_every: int = 10             # steps between evaluations, the last step included; 0 = never
    save_every: int = 50             # steps between checkpoints; 0 = none


def whiten(values, mask, shift_mean=True):
    """(v - mean) / std over the mask, biased variance; with shift_mean=False the mean is kept. [B, T] -> [B, T], 0 outside."""
    n = mask.sum()
    mean = (values * mask).sum() / n
    var = (((values - mean) ** 2) * mask).sum() / n
    out = (values - mean) * torch.rsqrt(var + 1e-8)
    return (out if shift_mean else out + mean) * mask


def kl_penalty(logprobs, ref_logprobs, estimator="k1"):
    """Per-token estimate of KL(pi || pi_ref) from the sampled tokens: k1 is unbiased, k2 has low variance, k3 both."""
    k1 = logprobs - ref_logprobs
    return {"k1": k1, "k2": k1 ** 2 / 2, "k3": torch.exp(-k1) - 1 + k1}[estimator]


def token_rewards(scores, kl, mask, kl_coef):
    """r_t = -beta kl_t, plus the score at the last real token. scores [B]; kl, mask [B, T] -> [B, T]."""
    last = mask * (mask.flip(1).cumsum(1) == 1).flip(1)                                # True at the last response token
    return -kl_coef * kl * mask + scores[:, None] * last


def advantages(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation. rewards, values, mask [B, T], where values[:, t] is V before token t; a row's
    response is one run of the mask, and V after its last token is 0. Returns (advantages, returns = advantages + values)."""
    values = values * mask
    result, last = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        next_value = values[:, t + 1] if t + 1 < values.shape[1] else 0.0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        last = (delta + gamma * lam * last) * mask[:, t]
        result[:, t] = last
    return result, result + values


def ppo_loss(logprobs, old_logprobs, advantages, values, old_values, returns, mask, count, cliprange=0.2, cliprange_value=0.2,
             vf_coef=0.1):
    """Clipped surrogate and clipped value loss, summed over the mask and divided by `count`, the minibatch's tokens.

    All tensors [B, T]. Returns (policy loss + vf_coef * value loss, dict of detached sums / count for logging).
    """
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
    return pg_loss + vf_coef * vf_loss, {k: v.item() for k, v in stats.items()}


def adapt_kl_coef(kl_coef, kl, target, episodes, horizon):
    """Ziegler 2019: raise beta when the sequence KL is above its target, by at most 20% per horizon."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


def values_before(value_model, tokens):
    """V of the state before each token, [B, T]: the value model's output one position earlier."""
    return F.pad(value_model(tokens)[:, :-1], (1, 0))


def train(config):
    run = Run(config, "ppo", kl_estimator=("k1", "k2", "k3"), missing_eos=("replace", "subtract", "none"))
    if run.finished:
        return
    init = need_folder(config.init, "python train_sft.py")
    if config.reward == "out/rm":
        need_folder(config.reward, "python train_rm.py")
    tokenizer = load_tokenizer(init)
    need_same_ids("--reference", config.reference or init, tokenizer)
    policy = run.prepare(Transformer.from_pretrained(init), tokenizer)
    reference = run.prepare(Transformer.from_pretrained(config.reference or init), tokenizer).requires_grad_(False)
    need_same_vocabulary(f"--reference {config.reference}", reference, policy)
    reward = load_reward(config.reward, tokenizer, run.device)
    by_model = not reads_text(config.reward) and tokenizer_of(config.reward, tokenizer).same_ids(tokenizer)
    value_init = config.value_init or (config.reward if by_model else init)
    need_same_ids("--value_init", value_init, tokenizer)
    value_model = run.prepare(ValueModel.from_pretrained(value_init), tokenizer)
    need_same_vocabulary(f"--value_init {value_init}", value_model.trunk, policy)
    if config.temperature <= 0:
        raise UserError(f"--temperature {config.temperature}: PPO needs samples, so it must be above 0")
    room = prompt_room(policy, config.response_length)
    records = load_records(config.data, "prompt", limit=config.limit or None, skip_bad=config.skip_bad, tokenizer=tokenizer)
    prompts = [encode_prompt(tokenizer, r["prompt"], config.max_prompt_length or room, config.keep) for r in records]
    eval_prompts, eval_rewards = load_eval_prompts(config.eval_data, config, records, tokenizer, policy, {"reward": reward}, run)

    policy_optimizer = make_optimizer(policy.parameters(), "adam", config.lr, eps=config.adam_eps)
    value_optimizer = make_optimizer(value_model.parameters(), "adam", config.value_lr, eps=config.adam_eps)
    modules = {"policy": policy, "value": value_model}
    optimizers = {"policy_optimizer": policy_optimizer, "value_optimizer": value_optimizer}
    state = run.load_checkpoint(modules, optimizers)
    kl_coef = state.get("kl_coef", config.kl_coef)
    for step in range(state["step"], config.max_steps):
        # 1. Roll out: the policy answers the batch's prompts.
        rows = batch_indices(len(prompts), config.batch_size, step, config.seed)
        queries = [prompts[i] for i in rows]
        with run.autocast():
            samples = generate(policy, queries, config.response_length, config.temperature,
                               seed=seed_for(config.seed, "rollout", step), tokenizer=tokenizer)
        responses = samples.responses()
        batch = collate([Example(q + r, len(q)) for q, r in zip(queries, responses)], tokenizer.pad_id, run.device)
        tokens, mask = batch.tokens, batch.mask                                        # [B, T]

        # 2. Score: the reward of each whole response.
        scores = reward(queries, responses, [records[i]["prompt"] for i in rows]).to(run.device)   # [B]
        if step == 0 and not samples.finished.any():
            print(f"ppo: no response ended within --response_length {config.response_length}: raise it, or train --init to end",
                  flush=True)
        elif step == 0 and config.missing_eos == "replace" and scores[samples.finished].mean() < -config.missing_eos_penalty:
            print(f"ppo: scores average {scores[samples.finished].mean():.3g}, so a response that never ends would do better "
                  f"with its {-config.missing_eos_penalty:g}: raise --missing_eos_penalty, or center the reward", flush=True)
        if config.missing_eos == "replace":
            scores = torch.where(samples.finished, scores, -config.missing_eos_penalty)
        elif config.missing_eos == "subtract":
            scores = scores - config.missing_eos_penalty * ~samples.finished

        # 3. Per-token rewards, frozen for all inner epochs.
        old_logprobs, ref_logprobs, entropy, old_values = frozen(policy, reference, value_model, tokens, mask, config, run)
        kl = kl_penalty(old_logprobs, ref_logprobs, config.kl_estimator) * mask        # [B, T]
        rewards = token_rewards(scores, kl, mask, kl_coef)
        if config.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)

        # 4. Advantages; whitened after the returns are taken.
        adv, returns = advantages(rewards, old_values, mask, config.gamma, config.lam)
        adv = whiten(adv, mask)

        # 5. Update.
        stats, updates = {}, 0
        decay = learning_rate(step, config.max_steps, 1.0, config.warmup_steps, "linear")
        for epoch in range(config.num_ppo_epochs):
            order = epoch_order(len(rows), seed_for(config.seed, "minibatches", step), epoch)
            for minibatch in torch.from_numpy(order.copy()).tensor_split(min(config.num_mini_batches, len(rows))):
                count, losses = mask[minibatch].sum(), 0.0
                for part in micro_batches(minibatch.tolist(), config.micro_batch_size or len(minibatch),
                                          length=lambda i: int(batch.lengths[i])):
                    T = int(batch.lengths[part].max())                                 # no more padding than this part needs
                    with run.autocast():
                        logprobs = policy.logprobs(tokens[part, :T], mask[part, :T], config.temperature)
                        values = values_before(value_model, tokens[part, :T])
                    loss, found = ppo_loss(logprobs, old_logprobs[part, :T], adv[part, :T], values, old_values[part, :T],
                                           returns[part, :T], mask[part, :T], count, config.cliprange,
                                           config.cliprange_value, config.vf_coef)
                    loss.backward()
                    losses += loss.item()
                    stats = {k: stats.get(k, 0.0) + v for k, v in found.items()}
                if config.dtype == "float32":                                          # nothing has been updated yet: rho = 1
                    assert updates > 0 or abs(stats["val/ratio"] - 1) < 1e-3, stats
                run.step({policy_optimizer: config.lr * decay, value_optimizer: config.value_lr * decay}, config.max_grad_norm,
                         step + 1, rows, losses)
                updates += 1

        count = mask.sum()
        sequence_kl = float(((old_logprobs - ref_logprobs) * mask).sum(1).mean())      # sum of k1 over a response
        metrics = {"objective/scores": scores.mean(), "objective/kl": sequence_kl,
                   "objective/rlhf_reward": scores.mean() - kl_coef * kl.sum(1).mean(),
                   "objective/entropy": entropy.sum() / count, "objective/ended": samples.finished.float().mean(),
                   "objective/length": count / len(rows), "objective/kl_coef": kl_coef, "lr": config.lr * decay,
                   "val/mean": (old_values * mask).sum() / count, **{k: v / updates for k, v in stats.items()}}
        if config.kl_target > 0:
            kl_coef = adapt_kl_coef(kl_coef, sequence_kl, config.kl_target, len(rows), config.kl_horizon)
        if eval_prompts and run.every(config.eval_every, step + 1, config.max_steps):
            found, texts = measure(policy, reference, tokenizer, eval_prompts, eval_rewards, config.response_length,
                                   config.temperature, config.seed, run.autocast())
            metrics |= found
            run.samples(step + 1, texts[:8])
        run.log(step + 1, config.max_steps, metrics, tokens=int(batch.lengths.sum()))
        if run.every(config.save_every, step + 1, config.max_steps):
            run.save_checkpoint(step + 1, modules, optimizers, {"kl_coef": kl_coef})
    run.finish(policy, tokenizer)


@torch.no_grad()
def frozen(policy, reference, value_model, tokens, mask, config, run):
    """(log pi_old, log pi_ref, entropy of pi_old, V_old), each [B, T]: what the rollout's policy and critic said."""
    found = []
    for part in torch.arange(len(tokens)).split(config.micro_batch_size or len(tokens)):
        with run.autocast():
            logprobs, entropy = policy.logprobs(tokens[part], mask[part], config.temperature, entropy=True)
            found.append((logprobs, reference.logprobs(tokens[part], mask[part], config.temperature), entropy,
                          values_before(value_model, tokens[part])))
    return [torch.cat(column) for column in zip(*found)]


if __name__ == "__main__":
    main(Config, train, __doc__)
