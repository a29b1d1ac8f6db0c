"""What the study runs and how it measures a run: one table of runs for all experiments. `study.py` reads the results.

A run is (name, script, options), as in `__main__.stages`; "@/NAME" in an option is the folder of another run of the same seed.
A script may also be a function of this file, which trains nothing and only measures. Every run is measured once, by `measured`.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import torch

import sample_bon
import train_dpo
import train_ppo
import train_rm
import train_rrhf
import train_sft
from nanorlhf.__main__ import LABEL_TEMPERATURE, stages
from nanorlhf.data import encode_response
from nanorlhf.evaluate import Evaluation, Options, measure, response_nll, table_row
from nanorlhf.files import read_jsonl
from nanorlhf.metrics import best_of_n_estimate, bon_kl, expectation_adjusted_distinct, win_rate
from nanorlhf.model import Transformer
from nanorlhf.tokenizer import load_tokenizer
from nanorlhf.training import seed_for

SFT, RM, BASE = "@/sft", "@/rm", "@/base"
PAIRS, HELD_OUT = "@/comparisons/comparisons.jsonl", "@/comparisons_test/comparisons.jsonl"
SPLITS = ("test", "ood_near", "ood_far")
PROMPTS = 250                        # per split, of a finished policy
PATH_PROMPTS = 128                   # of the evaluations while a policy trains; they are the first of those
TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0)
FIRST_WORDS = 8                      # of the length-matched diversity: as many as 90% of SFT's texts have
PPO = "ppo_beta_0.2"                 # PPO where one run stands for it; of seed 0's two best the one of lower KL

BETAS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # of PPO with a fixed price of KL
COVERAGE = ((500, 2), (2000, 2), (500, 8), (2000, 8))  # prompts and responses of each that get feedback
MEANINGS = ("sft", "dpo_beta_0.5", "rrhf", *(f"ppo_beta_{beta}" for beta in BETAS))  # policies that SBERT measures
COMMON = ("base", "sft", "comparisons", "comparisons_test", "comparisons_ood_near", "comparisons_ood_far", "rm")  # all build on
POLICY_SCRIPTS = (train_sft, train_ppo, train_dpo, train_rrhf)

# ---- The runs -------------------------------------------------------------------------------------------------------


def runs(seed, scale=1.0):
    """Yields (name, script or function, options) of every run of one seed, each after those that it reads."""
    def steps(n):
        return max(2, round(n * scale))

    def records(n):
        return max(300, round(n * scale))

    yield from itertools.islice(stages("@", seed, scale), len(COMMON))
    path = dict(init=SFT, seed=seed, save_every=0, num_eval_prompts=PATH_PROMPTS)

    # PPO. A horizon of 100 episodes lets beta change by a quarter per step of 128, so that KL follows its target in 30 steps.
    ppo = path | dict(reward=RM, max_steps=steps(30), eval_every=steps(5))
    gold = ppo | dict(reward="gold", value_init=RM)
    adaptive = dict(kl_coef=0.2, kl_horizon=100.0)
    for beta in BETAS:
        yield f"ppo_beta_{beta}", train_ppo, ppo | dict(kl_coef=beta)
    for target in (3, 6, 9, 12):
        yield f"ppo_target_{target}", train_ppo, ppo | adaptive | dict(kl_target=float(target))
    for beta in (0.05, 0.2, 0.8):                                                      # 0.05 is the default: off the shelf
        yield f"ppo_gt_beta_{beta}", train_ppo, gold | dict(kl_coef=beta)
    for name, whiten in (("target_6", False), ("whiten", True)):
        yield f"ppo_gt_{name}", train_ppo, gold | adaptive | dict(kl_target=6.0, whiten_rewards=whiten)
    yield "ppo_sentences", train_ppo, ppo | dict(kl_coef=0.2, reward_at="sentences")

    # Losses of comparisons.
    pairwise = path | dict(data=PAIRS, share_prompts=True)
    for beta in (0.05, 0.1, 0.5, 1.0, 5.0):
        yield f"dpo_beta_{beta}", train_dpo, pairwise | dict(beta=beta, max_steps=steps(100), eval_every=steps(10))
    for beta in (0.1, 0.5):
        yield f"ipo_beta_{beta}", train_dpo, pairwise | dict(loss="ipo", beta=beta, max_steps=steps(100), eval_every=steps(10))
    for alpha in (0.05, 0.1, 0.5, 1.0):
        yield f"unlikelihood_{alpha}", train_dpo, pairwise | dict(loss="unlikelihood", alpha=alpha, lr=2e-4, max_steps=steps(60),
                                                                  eval_every=steps(10))
    yield "preferred_ft", train_sft, dict(init=SFT, data=PAIRS, seed=seed, batch_size=64, lr=2e-4, max_steps=steps(60),
                                          save_every=0)

    rrhf = path | dict(reward=RM, share_prompts=True, lr=3e-4, max_steps=steps(50), eval_every=steps(10))
    yield "rrhf", train_rrhf, rrhf | dict(num_samples=8)

    # Measurements that train nothing: functions (root, seed, scale, **options).
    yield "sft_itself", sft_itself, dict(policy=SFT, reward=RM, base=BASE)
    yield "best_of_16", best_of_16, dict(policy=SFT, reward=RM, base=BASE)
    yield "best_of_n", best_of_n, dict(policy=SFT, reward=RM, n=128)
    policies = ("sft", "preferred_ft", "dpo_beta_0.5", PPO)
    yield "temperatures", temperatures, dict(policies=",".join(f"@/{p}" for p in policies), reward=RM)
    yield "exact", exact_optimum, {}

    # RRHF's sources of candidates. The data's own responses are two samples of SFT per prompt.
    ranked = rrhf | dict(kind="ranked", data="@/comparisons/ranked.jsonl")
    sources = {"p": dict(sampling="none"), "bp": dict(sampling="beam"), "dp": dict(sampling="diverse_beam"),
               "d": dict(sampling="diverse_beam", from_data=False), "sample": dict(sampling="sample"),
               "op_10": dict(sampling="sample", resample_every=10),
               "op_10_kl": dict(sampling="sample", resample_every=10, kl_coef=0.1),    # the paper's is 0.01, at another scale
               "dp_no_rank": dict(sampling="diverse_beam", rrhf_weight=0.0),
               "dp_weight_10": dict(sampling="diverse_beam", rrhf_weight=10.0),
               "dp_weight_100": dict(sampling="diverse_beam", rrhf_weight=100.0)}
    for name, options in sources.items():
        yield f"rrhf_{name}", train_rrhf, ranked | options
    for n in (2, 3):                                                                   # IP-1 is DP
        init = "@/rrhf_dp" if n == 2 else f"@/rrhf_ip_{n - 1}"
        yield f"rrhf_ip_{n}", train_rrhf, ranked | dict(sampling="diverse_beam", init=init)

    # Reward models: the amount of feedback, its noise, its spread over prompts, and the prior on the weights.
    rm = dict(init=SFT, data=PAIRS, seed=seed, lr=1e-3, eval_every=1000, save_every=0, eval_data=f"test={HELD_OUT}")
    for n in (500, 1000, 2000, 4000):
        yield f"rm_{n}", train_rm, rm | dict(limit=records(n), max_steps=steps(240 * math.sqrt(n / 8000)))
    for precision in (1.0, 10.0):
        yield f"rm_1000_prior_{precision:g}", train_rm, rm | dict(limit=records(1000), max_steps=steps(85),
                                                                  prior_precision=precision)
    labels = dict(init=SFT, n=2, reward="gold", seed=seed, batch_size=256, split="train", keep_unfinished=scale < 0.1)
    for temperature in (0.0, 0.5, 1.0):
        yield f"comparisons_noise_{temperature}", sample_bon, labels | dict(limit=records(4000), label_temperature=temperature)
        yield f"rm_noise_{temperature}", train_rm, rm | dict(data=f"@/comparisons_noise_{temperature}/comparisons.jsonl",
                                                             max_steps=steps(170))
    for prompts, responses in COVERAGE:                                                # of a pool of 2,000 prompts x 8 responses
        name = f"{prompts}x{responses}"
        yield f"comparisons_{name}", sample_bon, labels | dict(limit=records(prompts), n=responses,
                                                               label_temperature=LABEL_TEMPERATURE)
        yield f"rm_{name}", train_rm, rm | dict(data=f"@/comparisons_{name}/comparisons.jsonl",
                                                max_steps=steps(240 * math.sqrt(prompts * responses / 16000)))
        yield f"best_of_n_{name}", best_of_n, dict(policy=SFT, reward=f"@/rm_{name}", n=16)
    yield "ppo_rm_500", train_ppo, ppo | dict(reward="@/rm_500", kl_coef=0.02)
    yield "best_of_n_rm_500", best_of_n, dict(policy=SFT, reward="@/rm_500", n=128)

    yield "sbert", sbert, dict(policies=",".join(f"@/{p}" for p in MEANINGS), reward=RM, model="all-MiniLM-L6-v2")


# ---- Measuring a finished run ---------------------------------------------------------------------------------------


def measured(script, folder, root, seed, scale):
    """Returns what is kept of a finished run, a dict of numbers. root: the folder of the seed's runs."""
    rows = read_jsonl(folder / "metrics.jsonl")
    if script is train_rm:
        found = {k.removeprefix("eval/"): v for k, v in rows[-1].items() if k.startswith("eval/")}
        for split in SPLITS:                                                           # of an oracle that knows the true reward
            pairs = read_jsonl(root / f"comparisons_{split}" / "comparisons.jsonl")
            found[f"{split}/ceiling"] = sample_bon.label_ceiling([p["score_chosen"] for p in pairs],
                                                                 [p["score_rejected"] for p in pairs], LABEL_TEMPERATURE)
        return {"held_out": found}
    if script is sample_bon or folder.name in ("base", "sft"):
        return {}
    found = policy_values(folder, root, seed, scale, path=[path_point(r["step"], r) for r in rows if "eval/kl" in r])
    if script is train_rrhf:
        found |= rrhf_values(folder, root)
    return found


def path_point(step, metrics):
    return {"step": step} | {k: metrics[f"eval/{k}"] for k in ("kl", "gold", "reward") if f"eval/{k}" in metrics}


def evaluation_of(root, seed, scale, **options):
    return Evaluation(Options(**dict(reference=f"{root}/sft", reward=f"{root}/rm", seed=seed, first_words=FIRST_WORDS,
                                     num_prompts=max(8, round(PROMPTS * scale)), diversity_prompts=max(4, round(20 * scale)))
                              | options))


def row_of(e, folder, n=1):
    """Returns (the policy in the folder, {column of evaluate's table: value} of it or of best-of-n of it)."""
    model = e.load(folder, e.tokenizer)
    row, _, _ = table_row(e, folder.name, model, n)
    return model, {column: value[0] for column, value in row.items() if column not in ("method", "first_words")}


def policy_values(folder, root, seed, scale, n=1, path=()):
    """Returns {"row": {column of evaluate's table: value}, "independent": gold reward of a sample per test prompt that shares no
    random numbers with those of another policy, "path": its evaluations while it trained, or if there are none, one point that
    is measured as those are; none of best-of-n}. Perplexity is under the base model."""
    e = evaluation_of(root, seed, scale, perplexity=f"{root}/base")
    model, row = row_of(e, folder, n)
    found = {"row": row, "independent": [round(v, 3) for v in e.judged(model, n, f"opponent {folder.name}{n}").tolist()]}
    if path:
        found["path"] = path
    elif n == 1:
        few = slice(PATH_PROMPTS)
        metrics, _ = measure(model, e.reference, e.tokenizer, e.prompts[e.first][few], e.rewards, e.options.response_length,
                             seed=seed, records=e.records[e.first][few])
        found["path"] = [path_point(0, metrics)]
    return found


def rrhf_values(folder, root):
    """Returns the learned reward of the candidates that RRHF trained on, {"best", "mean", "std"}: means over their prompts; and
    its accuracy as a reward model: the share of held-out comparisons whose chosen response has the higher p_i (Eq. 1)."""
    groups = [c.get("raw_scores", c["scores"]) for file in sorted(folder.glob("candidates-*.jsonl")) for c in read_jsonl(file)]
    model, tokenizer = Transformer.from_pretrained(folder), load_tokenizer(folder)
    pairs, p = read_jsonl(root / "comparisons_test/comparisons.jsonl"), {}
    for side in ("chosen", "rejected"):
        responses = [encode_response(tokenizer, r[side], r["prompt"]) for r in pairs]
        rows = response_nll(model, tokenizer, [tokenizer.encode(r["prompt"]) for r in pairs], responses)
        p[side] = np.array([-nll / length for nll, length in rows])
    candidates = {name: float(np.mean([f(s) for s in groups])) for name, f in (("best", max), ("mean", np.mean), ("std", np.std))}
    return {"candidates": candidates, "accuracy": float(np.mean(p["chosen"] > p["rejected"]))}


# ---- Measurements that train nothing --------------------------------------------------------------------------------


def sft_itself(root, seed, scale, policy, reward, base):
    return policy_values(Path(policy), root, seed, scale)


def best_of_16(root, seed, scale, policy, reward, base):
    return policy_values(Path(policy), root, seed, scale, n=16)


def best_of_n(root, seed, scale, policy, reward, n):
    """Returns {"path": [{"n", "kl", "gold", "reward"}]}: best of 1, 2, 4, ..., n, from one pool of n samples per prompt."""
    e = evaluation_of(root, seed, 0.0, reward=reward, num_prompts=max(8, round(PATH_PROMPTS * scale)))
    prompts, records = e.prompts[e.first], e.records[e.first]
    pools = e.draw(e.reference, e.first, n, 1, "pool")                                 # [P][n]
    scores = {k: [r(([p] * n), pool, [record] * n).tolist() for p, pool, record in zip(prompts, pools, records)]
              for k, r in e.rewards.items()}
    path = []
    for m in (2 ** k for k in range(n.bit_length())):
        means = {k: float(np.mean([best_of_n_estimate(choose, m, value) for choose, value in zip(scores["reward"], values)]))
                 for k, values in scores.items()}
        path.append({"n": m, "kl": bon_kl(m)} | means)
    return {"path": path}


def temperatures(root, seed, scale, policies, reward):
    """Returns {policy: [{"temperature", "gold", "win": against the data's own answers, "ead_first"}]}: every policy sampled at
    each temperature, and best-of-16 of the first."""
    found = {}
    for t in TEMPERATURES:
        e = evaluation_of(root, seed, scale, temperature=t)
        prompts, records = e.prompts[e.first], e.records[e.first]
        rows = [(Path(p).name, Path(p), 1) for p in policies.split(",")] + [("best_of_16", root / "sft", 16)]
        for name, folder, n in rows:
            model = e.load(folder, e.tokenizer)
            texts = [drawn[0] for drawn in e.draw(model, e.first, 1, n, f"temperature {t}")]
            gold = e.rewards["gold"](prompts, texts, records)
            words = [e.tokenizer.decode(y, start=False) for y in texts]
            found.setdefault(name, []).append({
                "temperature": t, "gold": float(gold.mean()), "win": win_rate(gold, e.written_scores)[0],
                "ead_first": expectation_adjusted_distinct(words, first=FIRST_WORDS)})
    return found


def sbert(root, seed, scale, policies, reward, model):
    """Returns {policy: {"kl", "sbert_per_input", "sbert_across"}} of the policies and of best-of-16 of the first. Needs the extra
    `eval`; `model` is a name, or a folder of that name in the working directory."""
    e = evaluation_of(root, seed, scale, sbert=model)
    rows = [(Path(p).name, Path(p), 1) for p in policies.split(",")] + [("best_of_16", root / "sft", 16)]
    found = {name: row_of(e, folder, n)[1] for name, folder, n in rows}
    return {name: {c: row[c] for c in ("kl", "sbert_per_input", "sbert_across")} for name, row in found.items()}


def exact_optimum(root, seed, scale, vocabulary=6, length=3, beta=0.5):
    """Trains a table of logits per prefix by PPO and by DPO where every response can be listed, and compares it with the exact
    optimum pi*(y) = pi_ref(y) exp(r(y) / beta) / Z of E[r] - beta KL(pi || pi_ref) (Rafailov 2023, Eq. 4).

    Returns {method: {"share": (J - J_ref) / (J* - J_ref), "kl": KL(pi || pi*)}}, where J is the objective, and J_ref that of
    pi_ref. A response is `length` of `vocabulary` tokens with a reward drawn from N(0, 1). "dpo" minimises the expected loss over
    all pairs of pi_ref's samples with Bradley-Terry labels, "dpo_20000" the mean loss of 20,000 such comparisons.
    """
    generator = torch.Generator().manual_seed(seed_for(seed, "exact"))
    V, T = vocabulary, length
    responses = torch.cartesian_prod(*[torch.arange(V)] * T)                           # [V^T, T]
    states = torch.zeros(V ** T, T, dtype=torch.long)                                  # the table's row of each prefix
    for t in range(1, T):
        states[:, t] = 1 + V * states[:, t - 1] + responses[:, t - 1]
    reference = torch.randn(int(states.max()) + 1, V, generator=generator)
    reward = torch.randn(V ** T, generator=generator)

    def logprobs(table):                                                               # [V^T, T] of all responses
        return table.log_softmax(-1)[states].gather(2, responses[:, :, None])[:, :, 0]
    ref = logprobs(reference).sum(1)
    best = (ref + reward / beta).log_softmax(0)

    def compared(table):
        logp = logprobs(table.detach()).sum(1)
        objective = [(p.exp() * (reward - beta * (p - ref))).sum() for p in (logp, ref, best)]
        return {"share": float((objective[0] - objective[1]) / (objective[2] - objective[1])),
                "kl": float((logp.exp() * (logp - best)).sum())}
    n = max(2, round(400 * scale))

    table, values = reference.clone().requires_grad_(), torch.zeros(len(reference), requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [table], "lr": 0.05}, {"params": [values], "lr": 0.1}])
    mask = torch.ones(512, T, dtype=torch.bool)
    for step in range(n):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / n)
        rows = torch.multinomial(logprobs(table.detach()).sum(1).exp(), 512, replacement=True, generator=generator)
        old, v = logprobs(table.detach())[rows], values.detach()[states][rows]
        rewards = train_ppo.token_rewards(reward[rows], old - logprobs(reference)[rows], mask, beta)
        adv, returns = train_ppo.advantages(rewards, v, mask)
        adv = train_ppo.whiten(adv, mask)
        for _ in range(2):
            loss, _ = train_ppo.ppo_loss(logprobs(table)[rows], old, adv, values[states][rows], v, returns, mask, mask.sum())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    found = {"ppo": compared(table)}

    def fitted_by_dpo(chosen, rejected, weight):
        table = reference.clone().requires_grad_()
        optimizer = torch.optim.Adam([table], lr=0.05)
        for step in range(n):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / n)
            logp = logprobs(table).sum(1)
            losses = train_dpo.dpo_loss(logp[chosen], logp[rejected], ref[chosen], ref[rejected], beta)
            optimizer.zero_grad()
            (weight * losses).sum().backward()
            optimizer.step()
        return compared(table)
    prefer = torch.sigmoid(reward[:, None] - reward[None, :])                          # Bradley-Terry
    everything = torch.cartesian_prod(torch.arange(V ** T), torch.arange(V ** T)).T
    found["dpo"] = fitted_by_dpo(*everything, (ref.exp()[:, None] * ref.exp()[None, :] * prefer).flatten())
    a, b = torch.multinomial(ref.exp(), 40000, replacement=True, generator=generator).view(2, -1)
    wins = torch.rand(len(a), generator=generator) < prefer[a, b]
    found["dpo_20000"] = fitted_by_dpo(torch.where(wins, a, b), torch.where(wins, b, a), torch.tensor(1 / len(a)))
    return found
