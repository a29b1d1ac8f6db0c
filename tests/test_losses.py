"""Tests of the losses against float64 loops written from the papers, finite differences, closed forms and other code.

A numbered "trap" is a known bug of public RLHF code; each test says which bug it excludes.
"""

import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch

import train_dpo
import train_rm
from nanorlhf.data import Example, Group, collate, encode_prompt, encode_response, make_examples, pack_texts
from nanorlhf.model import ModelConfig, RewardModel, Transformer, ValueModel
from nanorlhf.tokenizer import load_tokenizer
from train_dpo import dpo_loss
from train_ppo import (adapt_kl_coef, advantages, kl_penalty, potentials, ppo_loss, shaping_rewards, token_rewards,
                       values_before, whiten)
from train_rm import preference_loss, ranked_pairs
from train_rrhf import rrhf_loss
from train_sft import sft_loss

F64 = torch.float64


def randn(*shape, seed=0, grad=False):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def response_mask(spans, T):
    """Returns [B, T] bool, True on [start, end) of each row."""
    return torch.tensor([[a <= t < b for t in range(T)] for a, b in spans])


SPANS, T = [(1, 3), (2, 7), (3, 4), (1, 8)], 8
MASK = response_mask(SPANS, T)


TINY = ModelConfig(vocab_size=13, context=16, width=8, layers=1, heads=2, kv_heads=2, head_dim=4, ffn=16, eos_id=11, pad_id=12,
                   init_std=0.4)


@pytest.fixture(scope="module")
def model():
    """A float64 decoder of about a thousand parameters, with weights large enough that every token matters."""
    made = Transformer(
        TINY,
        seed=3,
    )
    return made.double()


@pytest.fixture
def run():
    return SimpleNamespace(device=torch.device("cpu"), autocast=lambda: torch.autocast("cpu", enabled=False),
                           config=SimpleNamespace(share_prompts=False))


TOKENIZER = SimpleNamespace(pad_id=12, eos_id=11)


def make_rows(n, seed=0):
    rng = random.Random(seed)
    made = []
    for _ in range(n):
        prompt, response = [[rng.randrange(11) for _ in range(rng.randrange(1, 6))] for _ in range(2)]
        made.append(Example(prompt + response + [11], len(prompt)))
    return made


def logprobs_by_hand(model, example):
    """Returns log p of every response token, from the full softmax of a row on its own."""
    tokens = torch.tensor([example.tokens])
    logp = model.logits(model(tokens)).log_softmax(-1)[0]
    return [logp[t - 1, example.tokens[t]] for t in range(example.prompt_length, len(example.tokens))]


# ---- SFT ------------------------------------------------------------------------------------------------------------


def test_sft_loss_is_minus_the_mean_of_masked_logprobs():
    logp = randn(4, T, grad=True)
    expected = -sum(logp[b, t].item() for b, (a, e) in enumerate(SPANS) for t in range(a, e)) / int(MASK.sum())
    assert sft_loss(logp, MASK, int(MASK.sum())).item() == pytest.approx(expected, abs=1e-14)
    assert torch.autograd.gradcheck(lambda x: sft_loss(x, MASK, 15), logp)


def test_the_sft_gradient_matches_finite_differences(model):
    batch = collate(make_rows(3), 12)
    weight = model.blocks[0].mlp.up.weight

    def loss():
        return sft_loss(model.logprobs(batch.tokens, batch.mask), batch.mask, int(batch.mask.sum()))

    (gradient,) = torch.autograd.grad(loss(), weight)
    for i, j in ((0, 0), (5, 3), (15, 7)):
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                weight[i, j] += sign * 1e-6
                values.append(loss().item())
                weight[i, j] -= sign * 1e-6
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(gradient[i, j].item(), rel=1e-6, abs=1e-9)


def test_logprobs_are_read_one_position_earlier_and_summed_over_the_response_with_eos(model):
    """log p(y_t) comes from logits[P-1+t], and the sum runs over the response and its EOS."""
    rows = make_rows(5)
    batch = collate(rows, 12)
    logp = model.logprobs(batch.tokens, batch.mask)
    for b, row in enumerate(rows):
        expected = logprobs_by_hand(model, row)
        assert len(expected) == int(batch.mask[b].sum()) == len(row.tokens) - row.prompt_length
        assert torch.allclose(logp[b][batch.mask[b]], torch.stack(expected), rtol=0, atol=1e-12)
        assert logp[b].sum().item() == pytest.approx(sum(e.item() for e in expected), abs=1e-12)  # trap 11: not a mean
    assert (logp[~batch.mask] == 0).all()


def test_temperature_divides_logits_once(model):
    """Trap 6: the temperature is neither missing nor applied twice."""
    batch = collate(make_rows(3), 12)
    logp = model.logprobs(batch.tokens, batch.mask, temperature=0.7)
    full = (model.logits(model(batch.tokens)) / 0.7).log_softmax(-1)[:, :-1].gather(2, batch.tokens[:, 1:, None])[..., 0]
    assert torch.allclose(logp[:, 1:], full * batch.mask[:, 1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("garbage", [0, 5, 11, 12])
def test_padding_never_counts_whatever_its_id(model, garbage):
    """Traps 1 and 10: neither EOS nor any other token in the padding changes a log-probability or a gradient."""
    rows = make_rows(6)
    results = []
    for pad in (12, garbage):
        batch = collate(rows, pad)
        model.zero_grad()
        logp = model.logprobs(batch.tokens, batch.mask)
        (logp.sum(1) * torch.arange(1.0, 7.0, dtype=F64)).sum().backward()
        results.append((logp.detach(), model.embed.weight.grad.clone()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.allclose(results[0][1], results[1][1], rtol=0, atol=1e-13)


def test_no_gradient_flows_into_padding(model):
    """Trap 10: the input embeddings at padded positions get no gradient."""
    rows = [Example([1, 2, 3, 11], 2), Example([4, 5, 6, 7, 8, 9, 11], 3)]
    embedded = []

    def keep(module, inputs, output):
        output.retain_grad()
        embedded.append(output)

    hook = model.embed.register_forward_hook(keep)
    batch = collate(rows, 12)
    model.logprobs(batch.tokens, batch.mask).sum().backward()
    hook.remove()
    assert (embedded[0].grad[0, 4:] == 0).all() and (embedded[0].grad[0, :3] != 0).any()


def test_the_sft_gradient_does_not_depend_on_micro_batches(model):
    """Trap 16: sums are divided by one common count; there is no mean of means."""
    rows = make_rows(8)
    gradients = []
    for size in (8, 3, 1):
        model.zero_grad()
        parts = [collate(rows[i : i + size], 12) for i in range(0, 8, size)]
        count = sum(int(p.mask.sum()) for p in parts)
        for part in parts:
            sft_loss(model.logprobs(part.tokens, part.mask), part.mask, count).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for other in gradients[1:]:
        assert all(torch.allclose(a, b, rtol=0, atol=1e-14) for a, b in zip(gradients[0], other))


def test_packed_texts_train_on_every_token_but_the_first():
    """Trap 1: each document's EOS is a target, so the model learns to stop."""
    tokenizer = load_tokenizer("reviews")
    batch = collate(pack_texts(tokenizer, ["The plot is good.", "The film is bad."], 64), tokenizer.pad_id)
    assert batch.mask.sum() == batch.lengths.sum() - 1
    assert (batch.tokens[batch.mask] == tokenizer.eos_id).sum() == 2
    assert tokenizer.pad_id != tokenizer.eos_id


def test_prompt_and_response_are_tokenised_separately():
    """Trap 14: if joint tokenisation would merge across the border, the response still starts with its own tokens."""
    tokenizer = load_tokenizer("reviews")
    prompt, response = "The fi", "lm is good."
    (row,) = make_examples(tokenizer, prompt, [response])
    assert row.tokens[: row.prompt_length] == encode_prompt(tokenizer, prompt) == tokenizer.encode(prompt)
    assert (
        row.tokens[row.prompt_length :] == encode_response(tokenizer, response) == tokenizer.encode(response) + [tokenizer.eos_id]
    )
    assert tokenizer.encode(prompt + response) != row.tokens[:-1]  # so joint tokens do differ here


# ---- Reward model ---------------------------------------------------------------------------------------------------


def test_preference_loss_is_minus_log_sigmoid_of_the_difference():
    chosen, rejected = randn(7, seed=1, grad=True), randn(7, seed=2, grad=True)
    expected = [-log_sigmoid(a - b) for a, b in zip(chosen.tolist(), rejected.tolist())]
    assert preference_loss(chosen, rejected).tolist() == pytest.approx(expected, abs=1e-14)
    assert torch.autograd.gradcheck(preference_loss, (chosen, rejected))
    (gradient,) = torch.autograd.grad(preference_loss(chosen, rejected).sum(), chosen)
    assert torch.allclose(gradient, -torch.sigmoid(rejected - chosen), rtol=0, atol=1e-14)


def test_preference_loss_has_its_closed_forms_and_ignores_a_shift():
    zero, chosen, rejected = torch.zeros(1, dtype=F64), randn(5), randn(5, seed=9)
    assert preference_loss(zero, zero).item() == pytest.approx(math.log(2), abs=1e-15)
    assert torch.allclose(preference_loss(chosen + 3.7, rejected + 3.7), preference_loss(chosen, rejected), atol=1e-13)
    assert preference_loss(zero - 1000, zero).item() == 1000  # no overflow


@pytest.mark.parametrize("scores", [[1, 2, 3, 4], [2, 2, 2], [1, 3, 1, 2], [5], [0.5, -0.5], [1, 1, 2, 2]])
def test_ranked_pairs_are_all_pairs_without_ties(scores):
    found = set(zip(*ranked_pairs(scores)))
    assert found == {(i, j) for i, j in itertools.product(range(len(scores)), repeat=2) if scores[i] > scores[j]}


def reward_model(seed=0):
    return RewardModel(
        TINY,
        seed,
    )


def test_k_way_ranking_divides_by_k_choose_2_and_drops_ties(run):
    """Ouyang 2022: all pairs of a prompt together weigh as much as one pair. Ties leave the sum, not the divisor."""
    rm = reward_model()
    rows = make_rows(6)
    rankings = [Group(rows[:4], [3.0, 1.0, 2.0, 1.0]), Group(rows[4:], [0.0, 1.0])]
    rewards, better, worse, weight = train_rm.forward(rm, rankings, TOKENIZER, run)
    loss = (weight * preference_loss(rewards[better], rewards[worse])).sum() / 2
    r = [rm.score(torch.tensor([row.tokens]), torch.tensor([len(row.tokens)])).item() for row in rows]
    first = sum(-log_sigmoid(r[i] - r[j]) for i, j in ((0, 1), (0, 2), (0, 3), (2, 1), (2, 3))) / 6
    second = -log_sigmoid(r[5] - r[4])
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-5)
    assert len(better) == 6 and sum(g.tokens for g in rankings) == sum(len(row.tokens) for row in rows)


def test_reward_is_read_at_the_last_real_token_and_padding_does_not_matter():
    """Trap 3: the reward is not read at the padding."""
    rm = reward_model()
    rows = make_rows(6)
    for pad in (12, 11, 4):
        batch = collate(rows, pad)
        together = rm.score(batch.tokens, batch.lengths)
        alone = torch.stack([rm(torch.tensor([row.tokens]))[0, -1] for row in rows])
        assert torch.allclose(together, alone, rtol=0, atol=1e-6)
    rm.reward_mean, rm.reward_std = 0.5, 2.0
    assert torch.allclose(rm.score(batch.tokens, batch.lengths), (alone - 0.5) / 2, atol=1e-6)


def test_the_rm_gradient_does_not_depend_on_order_or_micro_batches(run):
    """Trap 16: there is no mean of means."""
    rows, rng = make_rows(16), random.Random(0)
    rankings = [Group(rows[2 * i : 2 * i + 2], [float(i % 2), 0.5]) for i in range(8)]
    gradients = []
    for size, order in ((8, range(8)), (1, range(8)), (3, rng.sample(range(8), 8))):
        rm = reward_model()
        shuffled = [rankings[i] for i in order]
        for i in range(0, 8, size):
            rewards, better, worse, weight = train_rm.forward(rm, shuffled[i : i + size], TOKENIZER, run)
            ((weight * preference_loss(rewards[better], rewards[worse])).sum() / 8).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in rm.parameters()]))
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)
    assert torch.allclose(gradients[0], gradients[2], rtol=1e-4, atol=1e-7)


# ---- DPO ------------------------------------------------------------------------------------------------------------


def dpo_by_hand(c, r, rc, rr, beta, e=0.0, loss="dpo", alpha=0.5, reference_free=False):
    h = (c - r) - (0.0 if reference_free else rc - rr)
    return {
        "dpo": -(1 - e) * log_sigmoid(beta * h) - e * log_sigmoid(-beta * h),
        "ipo": (h - 1 / (2 * beta)) ** 2,
        "unlikelihood": -c + alpha * r,
    }[loss]


DPO_CASES = [
    dict(),
    dict(label_smoothing=0.2),
    dict(loss="ipo"),
    dict(loss="unlikelihood", alpha=0.3),
    dict(reference_free=True),
    dict(loss="ipo", reference_free=True),
]


@pytest.mark.parametrize("options", DPO_CASES, ids=str)
@pytest.mark.parametrize("beta", [0.05, 0.5, 3.0])
def test_dpo_loss_equals_a_scalar_loop_and_passes_gradcheck(options, beta):
    values = [5 * randn(6, seed=s) for s in range(4)]
    found = dpo_loss(*values, beta=beta, **options)
    by_hand = {"e" if k == "label_smoothing" else k: v for k, v in options.items()}
    assert found.tolist() == pytest.approx(
        [dpo_by_hand(*row, beta, **by_hand) for row in zip(*[v.tolist() for v in values])], abs=1e-11
    )
    values = [v.requires_grad_() for v in values]
    assert torch.autograd.gradcheck(lambda *v: dpo_loss(*v, beta=beta, **options), values)


def test_dpo_loss_has_its_closed_forms_at_the_start():
    """Trap 12: if the policy is the reference, h = 0 and L = ln 2 (IPO: 1/(4 beta^2)), whatever the log-probabilities."""
    c, r = -30 + 5 * randn(9), -40 + 5 * randn(9, seed=1)
    for beta in (0.1, 0.5):
        assert dpo_loss(c, r, c, r, beta).tolist() == pytest.approx([math.log(2)] * 9, abs=1e-15)
        assert dpo_loss(c, r, c, r, beta, label_smoothing=0.3).tolist() == pytest.approx([math.log(2)] * 9, abs=1e-15)
        assert dpo_loss(c, r, c, r, beta, loss="ipo").tolist() == pytest.approx([1 / (4 * beta**2)] * 9, rel=1e-14)


def test_dpo_gradient_is_minus_beta_sigmoid_of_minus_beta_h():
    """This is the paper's gradient. With the typo of Eq. 21 (y_w and y_l exchanged), its sign would be reversed."""
    c, r, rc, rr = [randn(6, seed=s, grad=s < 2) for s in range(4)]
    h = (c - r - rc + rr).detach()
    for beta in (0.1, 2.0):
        to_c, to_r = torch.autograd.grad(dpo_loss(c, r, rc, rr, beta).sum(), (c, r))
        assert torch.allclose(to_c, -beta * torch.sigmoid(-beta * h), rtol=0, atol=1e-14)
        assert torch.allclose(to_r, -to_c, rtol=0, atol=1e-14)
        e = 0.1
        (to_c,) = torch.autograd.grad(dpo_loss(c, r, rc, rr, beta, label_smoothing=e).sum(), c)
        assert torch.allclose(to_c, -beta * ((1 - e) * torch.sigmoid(-beta * h) - e * torch.sigmoid(beta * h)), atol=1e-14)


def test_dpo_loss_ignores_a_prompt_dependent_constant():
    """Only differences count: r + f(x) is an equivalent reward (log Z(x) cancels)."""
    c, r, rc, rr = [randn(6, seed=s) for s in range(4)]
    assert torch.allclose(dpo_loss(c + 2, r + 2, rc, rr), dpo_loss(c, r, rc, rr), atol=1e-14)
    assert torch.allclose(dpo_loss(c + 2, r - 1, rc + 2, rr - 1), dpo_loss(c, r, rc, rr), atol=1e-14)


def test_dpo_forward_sums_logprobs_whatever_the_batch(model, run):
    """Traps 10 and 11: these are sums over response tokens, with EOS, without prompt and padding."""
    rows = make_rows(8)
    pairs = [Group([rows[i], rows[i + 4]]) for i in range(4)]
    chosen, rejected, chosen_lengths, rejected_lengths = train_dpo.forward(model, pairs, TOKENIZER, run)
    for i, pair in enumerate(pairs):
        assert chosen[i].item() == pytest.approx(sum(x.item() for x in logprobs_by_hand(model, pair.examples[0])), abs=1e-12)
        assert rejected[i].item() == pytest.approx(sum(x.item() for x in logprobs_by_hand(model, pair.examples[1])), abs=1e-12)
        assert [chosen_lengths[i].item(), rejected_lengths[i].item()] == [e.count for e in pair.examples]
    assert sum(pair.tokens for pair in pairs) == sum(len(row.tokens) for row in rows)


def test_the_dpo_gradient_does_not_depend_on_order_or_micro_batches(model, run):
    """Trap 16, in float64."""
    rows = make_rows(16, seed=4)
    pairs = [Group([rows[i], rows[i + 8]]) for i in range(8)]
    gradients = []
    for size, order in ((8, range(8)), (1, range(8)), (3, random.Random(0).sample(range(8), 8))):
        model.zero_grad()
        for i in range(0, 8, size):
            chosen, rejected, *_ = train_dpo.forward(model, [pairs[k] for k in list(order)[i : i + size]], TOKENIZER, run)
            (dpo_loss(chosen, rejected, torch.tensor(-7.0), torch.tensor(-9.0)).sum() / 8).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(gradients[0], gradients[1], rtol=0, atol=1e-13)
    assert torch.allclose(gradients[0], gradients[2], rtol=0, atol=1e-13)


# ---- RRHF -----------------------------------------------------------------------------------------------------------


def rrhf_by_hand(logps, lengths, scores, weight=1.0):
    """Returns (L, L_rank, L_ft) of one prompt, computed with scalars."""
    p = [s / n for s, n in zip(logps, lengths)]
    rank = sum(max(0.0, p[i] - p[j]) for i in range(len(p)) for j in range(len(p)) if scores[i] < scores[j])
    ft = -logps[max(range(len(p)), key=lambda i: scores[i])]
    return weight * rank + ft, rank, ft


def rrhf_case(B=5, K=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (B, K), generator=generator)
    scores = torch.randint(0, 4, (B, K), generator=generator).to(F64)  # small range: many ties
    return -3 * lengths * randn(B, K, seed=seed).abs(), lengths, scores


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weight", [1.0, 10.0])
def test_rrhf_loss_equals_equations_1_to_4_of_the_paper(seed, weight):
    logps, lengths, scores = rrhf_case(seed=seed)
    found = rrhf_loss(logps, lengths, scores, weight)
    for b in range(len(logps)):
        expected = rrhf_by_hand(logps[b].tolist(), lengths[b].tolist(), scores[b].tolist(), weight)
        assert [f[b].item() for f in found] == pytest.approx(expected, abs=1e-10)


def test_rrhf_loss_passes_gradcheck():
    logps, lengths, scores = rrhf_case()
    assert torch.autograd.gradcheck(lambda x: rrhf_loss(x, lengths, scores)[0], logps.requires_grad_())


def test_rrhf_ties_add_nothing_and_a_correct_order_leaves_only_the_sft_term():
    logps, lengths = torch.tensor([[-8.0, -4.0, -6.0]], dtype=F64), torch.tensor([[4, 4, 4]])
    assert rrhf_loss(logps, lengths, torch.ones(1, 3))[1].item() == 0
    loss, rank, ft = rrhf_loss(logps, lengths, torch.tensor([[0.0, 2.0, 1.0]]))
    assert (loss.item(), rank.item(), ft.item()) == (4.0, 0.0, 4.0)
    assert rrhf_loss(logps, lengths, torch.tensor([[2.0, 0.0, 1.0]]))[1].item() == pytest.approx((2 - 1) + (2 - 1.5) + (1.5 - 1))


def test_rrhf_ignores_padded_candidates():
    """One prompt has 3 candidates and the other 6. The padded columns change nothing, even with garbage in them."""
    logps, lengths, scores = rrhf_case(B=2, K=6)
    lengths[0, 3:] = 0
    alone = rrhf_loss(logps[:1, :3], lengths[:1, :3], scores[:1, :3])
    for garbage_score in (-9.0, 99.0):
        padded_logps, padded_scores = logps.clone(), scores.clone()
        padded_logps[0, 3:], padded_scores[0, 3:] = 5.0, garbage_score
        together = rrhf_loss(padded_logps, lengths, padded_scores)
        assert [t[0].item() for t in together] == pytest.approx([a[0].item() for a in alone], abs=1e-12)


def test_rrhf_does_not_depend_on_the_order_of_candidates():
    logps, lengths, scores = rrhf_case(K=6)
    scores = scores + 0.01 * torch.arange(6)  # no tie for the best
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for a, b in zip(rrhf_loss(logps, lengths, scores), rrhf_loss(logps[:, order], lengths[:, order], scores[:, order])):
        assert torch.allclose(a, b, atol=1e-12)


def test_rrhf_released_code_depends_on_padded_width_and_the_paper_does_not():
    """Trap 15 (GanjinZero/RRHF issues 37, 51): the released code takes the padded width as every length, in p_i and L_ft."""
    logps, lengths, scores = rrhf_case()
    for width in (12, 20):
        loss, rank, ft = rrhf_loss(logps, lengths, scores, released_width=width)
        for b in range(len(logps)):
            _, r, f = rrhf_by_hand(logps[b].tolist(), [width] * 6, scores[b].tolist())
            assert (rank[b].item(), ft[b].item(), loss[b].item()) == pytest.approx((r, f / width, r + f / width), abs=1e-12)
    narrow, wide = (rrhf_loss(logps, lengths, scores, released_width=w)[0] for w in (12, 20))
    assert not torch.allclose(narrow, wide)


def test_rrhf_p_is_a_mean_over_the_response_with_eos_in_sum_and_length(model):
    """Eq. 1, computed with the model. A longer row in the batch (more padding) does not change it."""
    rows = make_rows(4, seed=2)
    wide = Example([1] * 3 + [2] * 12 + [11], 3)
    for others in ([], [wide]):
        batch = collate(rows + others, 12)
        p = (model.logprobs(batch.tokens, batch.mask).sum(1) / batch.mask.sum(1))[:4]
        expected = [sum(x.item() for x in found) / len(found) for found in (logprobs_by_hand(model, row) for row in rows)]
        assert p.tolist() == pytest.approx(expected, abs=1e-12)


# ---- The reward model's prior ---------------------------------------------------------------------------------------


def test_the_mean_loss_and_the_prior_s_share_are_minimal_at_the_map():
    """A linear reward on N comparisons: sum of losses + precision/2 |w|^2 (MAP, found by Newton's method) and the mean loss +
    prior / N of train_rm.py have the same minimum; maximum likelihood is elsewhere."""
    N, precision = 40, 3.0
    difference = randn(N, 3, seed=1) * torch.tensor([2.0, 1.0, 0.3], dtype=F64) + 0.4   # of the two responses' features
    w = torch.zeros(3, dtype=F64)
    for _ in range(50):
        p = torch.sigmoid(difference @ w)
        gradient = -(difference * (1 - p)[:, None]).sum(0) + precision * w
        hessian = (difference.T * (p * (1 - p))) @ difference + precision * torch.eye(3, dtype=F64)
        w = w - torch.linalg.solve(hessian, gradient)
    w.requires_grad_()
    loss = preference_loss(difference @ w, torch.zeros(N, dtype=F64)).mean()
    assert torch.autograd.grad(loss, w, retain_graph=True)[0].norm() > 1e-2
    assert torch.autograd.grad(loss + train_rm.negative_log_prior([w], precision) / N, w)[0].norm() < 1e-12


def test_a_tie_counts_half_in_dpo_s_accuracy():
    """At the start the policy is the reference, so every pair ties, and an accuracy of 0 would be wrong."""
    groups = [Group([], [-5.0, -7.0]) for _ in range(3)]
    out = train_dpo.Forward(torch.tensor([-5.0, -4.0, -6.0]), torch.tensor([-7.0] * 3), None, None)
    _, stats = train_dpo.losses_and_stats(out, groups, train_dpo.Config())
    assert stats["rewards/accuracies"].tolist() == [0.5, 1.0, 0.0]


# ---- PPO ------------------------------------------------------------------------------------------------------------


def test_kl_penalties_k1_k2_k3_equal_their_formulas():
    logp, ref = -randn(4, T).abs(), -randn(4, T, seed=1).abs()
    for b, t in itertools.product(range(4), range(T)):
        k1 = logp[b, t].item() - ref[b, t].item()
        expected = {"k1": k1, "k2": k1 * k1 / 2, "k3": math.exp(-k1) - 1 + k1}
        for name, value in expected.items():
            assert kl_penalty(logp, ref, name)[b, t].item() == pytest.approx(value, abs=1e-14)
    assert (kl_penalty(logp, ref, "k3") >= 0).all()


def test_k1_and_k3_are_unbiased_for_the_kl_of_policy_from_reference():
    """The mean of k1 or k3 under pi is KL(pi || pi_ref), not KL(pi_ref || pi). It runs over a whole small vocabulary."""
    logp, logq = randn(50, seed=1).log_softmax(-1), randn(50, seed=2).log_softmax(-1)
    kl = (logp.exp() * (logp - logq)).sum().item()
    other = (logq.exp() * (logq - logp)).sum().item()
    for name in ("k1", "k3"):
        assert (logp.exp() * kl_penalty(logp, logq, name)).sum().item() == pytest.approx(kl, abs=1e-12)
    assert abs(kl - other) > 1e-2


def enumerated_gradients(estimator, beta=0.2, V=4, length=3):
    """Returns two gradients of J = E[s(y)] - beta KL(pi || pi_ref) over all responses y of a tiny language model: by PPO's own
    functions before the first update (rewards, advantages, loss), and of J itself by autograd. Id V-1 is EOS."""
    policy, reference = (Transformer(ModelConfig(vocab_size=V, context=6, width=8, layers=1, heads=2, kv_heads=2, head_dim=4,
                                                 ffn=16, init_std=0.6), seed).double() for seed in (1, 2))
    words = range(V - 1)
    texts = [[*y, V - 1] for n in range(length) for y in itertools.product(words, repeat=n)]
    texts += [list(y) for y in itertools.product(words, repeat=length)]                # truncated: no EOS
    batch = collate([Example([0, *y], 1) for y in texts], 0)
    scores = randn(len(texts), seed=3)
    logp, ref = policy.logprobs(batch.tokens, batch.mask), reference.logprobs(batch.tokens, batch.mask).detach()
    p = logp.sum(1).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-12)                               # they are all responses
    J = (p * (scores - beta * (logp - ref).sum(1))).sum()
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(J, policy.parameters(), retain_graph=True)])
    old = logp.detach()
    rewards = token_rewards(scores, kl_penalty(old, ref, estimator), batch.mask, beta)
    adv, returns = advantages(rewards, torch.zeros_like(old), batch.mask, gamma=1.0, lam=1.0)
    zeros = torch.zeros_like(old)
    loss, _ = ppo_loss(logp, old, adv * p.detach()[:, None], zeros, zeros, zeros, batch.mask, count=1)
    ours = torch.cat([-g.flatten() for g in torch.autograd.grad(loss, policy.parameters())])
    return ours, exact


def test_only_k1_in_the_reward_has_the_gradient_of_kl():
    """The gradient of PPO's first update equals that of E[s] - beta KL, enumerated, for k1 alone; k2 and k3 point elsewhere."""
    ours, exact = enumerated_gradients("k1")
    assert (ours - exact).norm() < 1e-12 * max(1, exact.norm())
    for estimator in ("k2", "k3"):
        ours, exact = enumerated_gradients(estimator)
        assert (ours - exact).norm() > 0.02 * exact.norm()


def test_what_k2_and_k3_in_the_reward_push_towards():
    """For one token: E[k3 grad log pi] = grad KL(pi || ref) - grad KL(ref || pi), and E[k2 grad log pi] vanishes to first order
    at the reference, where E[k1 grad log pi] = grad KL does not."""
    logits, logq = randn(7, seed=1, grad=True), randn(7, seed=2).log_softmax(-1)

    def pushed(estimator, logits, logq):
        logp = logits.log_softmax(-1)
        weight = (logp.exp() * kl_penalty(logp, logq, estimator)).detach()
        return torch.autograd.grad((weight * logp).sum(), logits)[0]
    logp = logits.log_softmax(-1)
    forward_kl = torch.autograd.grad((logp.exp() * (logp - logq)).sum(), logits, retain_graph=True)[0]
    reverse_kl = torch.autograd.grad((logq.exp() * (logq - logp)).sum(), logits)[0]
    assert torch.allclose(pushed("k1", logits, logq), forward_kl, atol=1e-14)
    assert torch.allclose(pushed("k3", logits, logq), forward_kl - reverse_kl, atol=1e-14)
    near = (logq + 1e-4 * randn(7, seed=3)).detach().requires_grad_()
    size = pushed("k1", near, logq).norm()
    assert pushed("k2", near, logq).norm() < 1e-3 * size and pushed("k3", near, logq).norm() < 1e-3 * size


def test_token_rewards_put_the_score_on_the_last_response_token():
    """Trap 2: the score is on EOS or, if truncated, on the last token; never one position later, never on padding."""
    scores, kl, beta = randn(4, seed=3), randn(4, T, seed=4), 0.3
    rewards = token_rewards(scores, kl, MASK, beta)
    for b, (a, e) in enumerate(SPANS):
        for t in range(T):
            expected = (-beta * kl[b, t].item() + (scores[b].item() if t == e - 1 else 0.0)) if a <= t < e else 0.0
            assert rewards[b, t].item() == pytest.approx(expected, abs=1e-15)


def test_token_rewards_of_a_batch_put_the_score_on_eos():
    """The same for a collated batch: if a row has ended, the rewarded position holds the EOS id."""
    rows = [Example([1, 2, 3, 4, 11], 2), Example([1, 5, 6], 1), Example([1, 2, 3, 11], 3)]
    batch = collate(rows, 12)
    rewards = token_rewards(torch.ones(3), torch.zeros(batch.tokens.shape), batch.mask, 0.1)
    assert rewards.nonzero().tolist() == [[0, 4], [1, 2], [2, 3]]
    assert batch.tokens[rewards.bool()].tolist() == [11, 6, 11]


def test_rewards_by_sentence_are_what_each_sentence_adds_and_sum_to_the_score():
    """" It is fine. It is bad." + EOS scores 3 after the first sentence and 1 after both; the second response has one sentence and
    no EOS. With KL 0 the rewards are 3, then 1 - 3, and nothing is left for EOS."""
    tokenizer = load_tokenizer("reviews")
    texts = [tokenizer.encode(" The plot was fine. The plot was bad.") + [tokenizer.eos_id], tokenizer.encode(" The plot was fine. The")]
    queries = [tokenizer.encode("Review of"), tokenizer.encode("Review")]
    stops = [[t for t, i in enumerate(y) if tokenizer.decode([i], start=False) == "."] for y in texts]
    asked = []

    def reward(prompts, responses, records):
        asked.extend((r, tokenizer.decode(y, start=False)) for r, y in zip(records, responses))
        assert all(y[-1] == tokenizer.eos_id for y in responses)
        return torch.tensor([{1: 3.0, 2: 1.0}[tokenizer.decode(y).count(".")] for y in responses])

    mask = collate([Example(q + y, len(q)) for q, y in zip(queries, texts)], tokenizer.pad_id).mask
    phi = potentials(reward, queries, texts, ["a", "b"], mask, tokenizer)
    assert [r for r, _ in asked] == ["a", "a", "b"] and asked[0][1].startswith(" The plot was fine.")
    rewards = token_rewards(torch.tensor([1.0, 7.0]), torch.zeros(mask.shape), mask, 0.1) + shaping_rewards(phi, mask)
    expected = torch.zeros(mask.shape)
    for b, sums in enumerate(([3.0, -2.0], [3.0])):
        for stop, value in zip(stops[b], sums):
            expected[b, len(queries[b]) + stop] = value
    expected[1, len(queries[1]) + len(texts[1]) - 1] = 7.0 - 3.0              # the truncated one: what is left, at its last token
    assert torch.equal(rewards, expected) and rewards.sum(1).tolist() == [1.0, 7.0]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_shaping_rewards_change_no_difference_between_two_actions_values(gamma):
    """Ng 1999: with shaping, the discounted return from every state is lower by Phi of that state, whatever follows."""
    phi = randn(4, T, seed=5) * MASK
    plain = randn(4, T, seed=1) * MASK
    zeros = torch.zeros(4, T, dtype=plain.dtype)
    to_go = advantages(plain, zeros, MASK, gamma, 1.0)[1]
    shaped = advantages(plain + shaping_rewards(phi, MASK, gamma), zeros, MASK, gamma, 1.0)[1]
    assert torch.allclose(shaped, (to_go - phi) * MASK, atol=1e-12)


def gae_by_hand(rewards, values, gamma, lam):
    """Returns (advantages, returns) of one response. A_t is the sum over l of (gamma lam)^l delta_{t+l}."""
    n = len(rewards)
    delta = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    adv = [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]
    return adv, [a + v for a, v in zip(adv, values)]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 0.0), (0.99, 1.0), (1.0, 1.0)])
def test_advantages_equal_a_scalar_sum_and_ignore_garbage_outside_the_mask(gamma, lam):
    rewards, values = randn(4, T, seed=1) * MASK, randn(4, T, seed=2)  # values keep garbage outside
    adv, returns = advantages(rewards, values, MASK, gamma, lam)
    for b, (a, e) in enumerate(SPANS):
        want_adv, want_returns = gae_by_hand(rewards[b, a:e].tolist(), values[b, a:e].tolist(), gamma, lam)
        assert adv[b, a:e].tolist() == pytest.approx(want_adv, abs=1e-12)
        assert returns[b, a:e].tolist() == pytest.approx(want_returns, abs=1e-12)
    assert (adv[~MASK] == 0).all() and (returns[~MASK] == 0).all()
    garbage = values.masked_fill(~MASK, 1e6)
    assert torch.equal(advantages(rewards, garbage, MASK, gamma, lam)[0], adv)


def test_gae_with_gamma_and_lambda_1_is_the_sum_of_rewards_minus_the_value():
    rewards, values = randn(4, T, seed=1) * MASK, randn(4, T, seed=2)
    adv, returns = advantages(rewards, values, MASK, 1.0, 1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1) * MASK
    assert torch.allclose(returns, to_go, atol=1e-12) and torch.allclose(adv, (to_go - values) * MASK, atol=1e-12)


def test_the_advantage_at_eos_is_score_minus_value():
    """With the score on EOS, the last advantage is s - V. One position later, it would be V + lam (s - V) - V."""
    adv, _ = advantages(
        token_rewards(torch.tensor([2.0]), torch.zeros(1, 4), MASK[:1, :4], 0.1), torch.full((1, 4), 0.5), MASK[:1, :4], 1.0, 0.95
    )
    assert adv[0, 2].item() == pytest.approx(1.5) and adv[0, 1].item() == pytest.approx(0.95 * 1.5)


def test_whiten_uses_masked_mean_and_biased_variance_and_can_keep_the_mean():
    """Trap 17: padding is not in the statistics, the variance is divided by n, and shift_mean=False keeps the mean."""
    values = 3 + 2 * randn(4, T)
    inside = values[MASK].tolist()
    mean = sum(inside) / len(inside)
    var = sum((v - mean) ** 2 for v in inside) / len(inside)
    for shift in (True, False):
        out = whiten(values.masked_fill(~MASK, 1e9), MASK, shift_mean=shift)
        expected = [(v - mean) / math.sqrt(var + 1e-8) + (0.0 if shift else mean) for v in inside]
        assert out[MASK].tolist() == pytest.approx(expected, abs=1e-9)
        assert (out[~MASK] == 0).all()
        assert out[MASK].mean().item() == pytest.approx(0.0 if shift else mean, abs=1e-9)
        assert out[MASK].var(correction=0).item() == pytest.approx(1.0, abs=1e-6)


def test_returns_are_computed_before_whitening():
    """Trap 17: advantages() returns A + V of the raw A, so whitening A afterwards cannot change the value target."""
    rewards, values = randn(4, T, seed=1) * MASK, randn(4, T, seed=2)
    adv, returns = advantages(rewards, values, MASK)
    before = returns.clone()
    whiten(adv, MASK)
    assert torch.equal(returns, before) and torch.allclose(returns, (adv + values) * MASK)


def ppo_by_hand(logp, old, adv, v, old_v, ret, spans, clip, clip_v, vf_coef):
    pg = vf = kl = fraction = v_fraction = ratios = n = 0
    for b, (a, e) in enumerate(spans):
        for t in range(a, e):
            ratio, A = math.exp(logp[b][t] - old[b][t]), adv[b][t]
            one, two = -A * ratio, -A * min(max(ratio, 1 - clip), 1 + clip)
            pg += max(one, two)
            fraction += two > one
            near = old_v[b][t] + min(max(v[b][t] - old_v[b][t], -clip_v), clip_v)
            losses = (v[b][t] - ret[b][t]) ** 2, (near - ret[b][t]) ** 2
            vf += 0.5 * max(losses)
            v_fraction += losses[1] > losses[0]
            kl += 0.5 * (logp[b][t] - old[b][t]) ** 2
            ratios += ratio
            n += 1
    return (pg + vf_coef * vf) / n, {
        "loss/policy": pg / n,
        "loss/value": vf / n,
        "policy/approxkl": kl / n,
        "policy/clipfrac": fraction / n,
        "val/clipfrac": v_fraction / n,
        "val/ratio": ratios / n,
    }


@pytest.mark.parametrize("clip, clip_v, vf_coef", [(0.2, 0.2, 0.1), (0.05, 0.4, 1.0), (0.5, 0.01, 0.0)])
def test_ppo_loss_and_stats_equal_a_scalar_loop_with_both_clips(clip, clip_v, vf_coef):
    tensors = [0.5 * randn(4, T, seed=s) for s in range(6)]
    loss, stats = ppo_loss(*tensors, MASK, MASK.sum(), clip, clip_v, vf_coef)
    expected, expected_stats = ppo_by_hand(*[x.tolist() for x in tensors], SPANS, clip, clip_v, vf_coef)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert stats == pytest.approx(expected_stats, abs=1e-7)  # fractions of counts are float32
    assert stats["policy/clipfrac"] > 0 and stats["val/clipfrac"] > 0  # both clips are active
    logp, values = tensors[0].requires_grad_(), tensors[3].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, v: ppo_loss(a, tensors[1], tensors[2], v, tensors[4], tensors[5], MASK, 15, clip, clip_v, vf_coef)[0],
        (logp, values),
    )


def test_ppo_at_the_rollout_policy_has_ratio_1_no_clipping_and_the_policy_gradient():
    """Trap 7. If the minibatch is the whole whitened batch, L_pi is 0 as well."""
    logp = randn(4, T).requires_grad_()
    adv = whiten(randn(4, T, seed=1), MASK)
    values = randn(4, T, seed=2)
    loss, stats = ppo_loss(logp, logp.detach(), adv, values, values, values, MASK, MASK.sum())
    assert stats == pytest.approx(
        {"loss/policy": 0, "loss/value": 0, "policy/approxkl": 0, "policy/clipfrac": 0, "val/clipfrac": 0, "val/ratio": 1},
        abs=1e-12,
    )
    (gradient,) = torch.autograd.grad(loss, logp)
    assert torch.allclose(gradient, -adv * MASK / MASK.sum(), atol=1e-14)


def test_ppo_clip_stops_the_gradient_only_on_the_improving_side():
    mask, one = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1, dtype=F64)
    for advantage, logratio, moves in ((1, 0.5, False), (1, -0.5, True), (-1, -0.5, False), (-1, 0.5, True), (1, 0.1, True)):
        logp = (logratio * one).requires_grad_()
        loss, _ = ppo_loss(logp, 0 * one, advantage * one, one, one, one, mask, 1)
        assert (torch.autograd.grad(loss, logp)[0].item() != 0) == moves


def test_ppo_loss_ignores_padding_row_order_and_micro_batches():
    """Traps 16 and 18: the parts of a minibatch add up, and nothing outside the mask is read."""
    tensors = [0.5 * randn(4, T, seed=s) for s in range(6)]
    loss, stats = ppo_loss(*tensors, MASK, MASK.sum())
    garbage = [x.masked_fill(~MASK, 50.0 + i) for i, x in enumerate(tensors)]
    assert ppo_loss(*garbage, MASK, MASK.sum())[0].item() == pytest.approx(loss.item(), abs=1e-12)
    order = torch.tensor([2, 0, 3, 1])
    assert ppo_loss(*[x[order] for x in tensors], MASK[order], MASK.sum())[0].item() == pytest.approx(loss.item(), abs=1e-12)
    parts = [ppo_loss(*[x[b : b + 1] for x in tensors], MASK[b : b + 1], MASK.sum()) for b in range(4)]
    assert sum(p.item() for p, _ in parts) == pytest.approx(loss.item(), abs=1e-12)
    assert {k: sum(s[k].item() for _, s in parts) for k in stats} == pytest.approx({k: v.item() for k, v in stats.items()}, abs=1e-12)


@pytest.mark.parametrize("kl, factor", [(6.0, 1.0), (6.6, 1.1), (60.0, 1.2), (5.4, 0.9), (0.0, 0.8), (-3.0, 0.8)])
def test_the_adaptive_kl_coefficient_follows_zieglers_formula(kl, factor):
    """beta <- beta (1 + clip(KL/target - 1, +-0.2) n / horizon)."""
    assert adapt_kl_coef(0.15, kl, 6.0, 10000, 10000.0) == pytest.approx(0.15 * factor, rel=1e-12)
    assert adapt_kl_coef(0.15, kl, 6.0, 512, 10000.0) == pytest.approx(0.15 * (1 + (factor - 1) * 512 / 10000), rel=1e-12)


def test_the_value_of_a_token_is_read_one_position_earlier():
    """V_t is read at index P-1+t, before y_t. It cannot depend on y_t, but the next value does."""
    torch.manual_seed(0)
    rm = reward_model()
    model = ValueModel(rm.trunk, rm.head.weight.detach(), 0.25)
    tokens = torch.tensor([[1, 2, 3, 4, 5, 11]])
    found, raw = values_before(model, tokens), model(tokens)
    assert found[0, 0] == 0 and torch.equal(found[0, 1:], raw[0, :-1])
    changed = tokens.clone()
    changed[0, 3] = 9
    other = values_before(model, changed)
    assert torch.equal(found[0, :4], other[0, :4]) and not torch.equal(found[0, 4:], other[0, 4:])


# ---- Other implementations ------------------------------------------------------------------------------------------


def trl_self(**fields):
    """Returns the attributes of a trainer that TRL's loss methods read."""
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    metrics = SimpleNamespace(append=lambda value: None)

    class Metrics(dict):
        def __missing__(self, key):
            return metrics

    return SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=accelerator,
        _metrics={"eval": Metrics()},
        _total_train_tokens=0,
        aux_loss_enabled=False,
        **fields,
    )


@pytest.mark.parametrize("loss, batch", [("sigmoid", 5), ("ipo", 5), ("robust", 5), ("aot", 1)])
def test_dpo_losses_agree_with_trl(loss, batch):
    """Calls TRL's own method on given token log-probabilities. Its ipo averages per token (ours sums, like the DPO
    repository), so ours gets means. `robust` is ((1-e) L(h) - e L(-h)) / (1-2e), and `aot` of one pair is cDPO."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="needs trl (the `parity` extra)").DPOTrainer
    B, n, beta, e = batch, 7, 0.3, 0.1
    completion = torch.cat(
        [response_mask([(1 + b % 3, 4 + b % 3) for b in range(B)], n), response_mask([(2, 3 + b % 5) for b in range(B)], n)]
    )
    logp = -randn(2 * B, n - 1).abs().float() * completion[:, 1:]
    ref = -randn(2 * B, seed=1).abs().float() * 5
    outputs = SimpleNamespace(log_probs=logp, entropy=logp, mean_logits=logp, is_top1=logp > 0)
    inputs = dict(
        completion_mask=completion.long(),
        input_ids=torch.zeros_like(completion).long(),
        attention_mask=torch.ones_like(completion),
        ref_chosen_logps=ref[:B],
        ref_rejected_logps=ref[B:],
    )
    this = trl_self(
        beta=beta,
        label_smoothing=e,
        loss_types=[loss],
        loss_weights=[1.0],
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        f_alpha_divergence_coef=1.0,
        use_weighting=False,
        args=SimpleNamespace(),
    )
    try:
        theirs = trainer._compute_loss(this, lambda **kwargs: outputs, inputs, False)
    except (AttributeError, KeyError, TypeError) as error:
        pytest.skip(f"this version of trl computes its DPO loss otherwise ({error})")
    chosen, rejected = logp.sum(1).chunk(2)
    if loss == "ipo":
        lengths = completion.sum(1).chunk(2)
        chosen, rejected, ref_chosen, ref_rejected = (
            chosen / lengths[0],
            rejected / lengths[1],
            ref[:B] / lengths[0],
            ref[B:] / lengths[1],
        )
        ours = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, loss="ipo")
    elif loss == "robust":
        flipped = dpo_loss(rejected, chosen, ref[B:], ref[:B], beta)
        ours = ((1 - e) * dpo_loss(chosen, rejected, ref[:B], ref[B:], beta) - e * flipped) / (1 - 2 * e)
    else:
        ours = dpo_loss(chosen, rejected, ref[:B], ref[B:], beta, label_smoothing=e if loss == "aot" else 0.0)
    assert ours.mean().item() == pytest.approx(theirs.item(), rel=1e-5)


def test_preference_loss_agrees_with_trl():
    trainer = pytest.importorskip("trl.trainer.reward_trainer", reason="needs trl (the `parity` extra)").RewardTrainer
    rewards = randn(12)
    this = trl_self(args=SimpleNamespace(center_rewards_coefficient=None))
    try:
        theirs = trainer.compute_loss(this, lambda **kwargs: SimpleNamespace(logits=rewards[:, None]), {})
    except (AttributeError, KeyError, TypeError) as error:
        pytest.skip(f"this version of trl computes its reward loss otherwise ({error})")
    assert preference_loss(rewards[:6], rewards[6:]).mean().item() == pytest.approx(theirs.item(), rel=1e-12)


def test_sft_loss_agrees_with_torch_cross_entropy_and_transformers(model, tmp_path):
    """Labels are -100 outside the response, as usual in SFT. Compares with torch's cross entropy and with transformers' loss
    on the saved checkpoint."""
    batch = collate(make_rows(5), 12)
    labels = batch.tokens.masked_fill(~batch.mask, -100)
    ours = sft_loss(model.logprobs(batch.tokens, batch.mask), batch.mask, int(batch.mask.sum())).item()
    logits = model.logits(model(batch.tokens))
    by_torch = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert ours == pytest.approx(by_torch.item(), rel=1e-12)
    transformers = pytest.importorskip("transformers", reason="needs transformers (the `parity` extra)")
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=F64).double().eval()
    with torch.no_grad():
        loss = theirs(input_ids=batch.tokens, labels=labels).loss.item()
    assert ours == pytest.approx(loss, rel=1e-5)
