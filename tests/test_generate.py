"""Tests of sampling and beam search against full forward passes, other batches, enumeration and transformers."""

import itertools

import pytest
import torch

from nanorlhf.errors import UserError
from nanorlhf.formats.checkpoints import FAMILIES, PARTIAL_ROTARY
from nanorlhf.generate import Decoding, beam_search, generate, prefill
from nanorlhf.kernels import packed_linear, sample
from nanorlhf.model import Linear, ModelConfig, Transformer

PROMPTS = [[5, 9, 3, 22, 17, 30, 8], [4], [11, 2, 19], [6, 6, 40, 33, 12]]


def tiny(family="gpt2", seed=0, **fields):
    """A random model whose logits are far enough apart that samples differ and EOS (id 1) is drawn now and then."""
    grouped = "kv_heads" in FAMILIES[family].keys
    defaults = dict(vocab_size=48, context=40, layers=2, heads=4, kv_heads=2 if grouped else 4, head_dim=6, eos_id=1, pad_id=0,
                    rotary_dim=2 if family in ("gptj", *PARTIAL_ROTARY) else 0, init_std=0.3)
    fields = defaults | dict(width=24) | fields
    return Transformer(ModelConfig.for_family(family, fields.pop("width"), **fields), seed)


class Letters:
    """A stand-in for a tokenizer in which each id is one letter."""
    def __init__(self, vocab_size):
        self.vocab_size, self.eos_id, self.end_ids = vocab_size, -1, (-1,)

    def decode(self, ids, start=True, special=False):
        return "".join(chr(97 + i) for i in ids)


def rows_of(samples):
    return list(zip(samples.responses(), samples.finished.tolist()))


@pytest.fixture(params=["looks", "static"])
def shapes(request, monkeypatch):
    """A decoding step as on a CPU, which looks at its number, and as on a GPU, where its shapes are the same at any time."""
    monkeypatch.setattr("nanorlhf.generate.static_shapes", lambda device: request.param == "static")


# ---- Cache and log-probabilities ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", [1, 3])
def test_cached_logits_equal_a_full_forward_pass_on_ragged_prompts(family, n, shapes):
    model = tiny(family)
    new = torch.randint(48, (len(PROMPTS) * n, 10), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        cache, logits = prefill(model, PROMPTS, n, 10)
        steps = [logits.repeat_interleave(n, 0)]
        for t in range(9):
            steps.append(model.logits(model(new[:, t:t + 1], cache)[:, 0]))
        for row in range(len(new)):
            prompt = PROMPTS[row // n]
            full = model.logits(model(torch.tensor([prompt + new[row, :9].tolist()])))[0, len(prompt) - 1:]
            torch.testing.assert_close(torch.stack([s[row] for s in steps]), full, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_sampling_is_close_to_the_full_forward_pass(family, shapes):
    """Under autocast the cache holds bfloat16, and the dtypes fit together in every family."""
    model = tiny(family)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out = generate(model, PROMPTS, 6, num_samples=2, seed=1)
        for row, (response, logp) in enumerate(zip(out.responses(), out.logprobs)):
            tokens = torch.tensor([PROMPTS[row // 2] + response])
            fresh = model.logprobs(tokens, torch.arange(tokens.shape[1])[None] >= len(PROMPTS[row // 2]))[0, -len(response):]
            assert float((logp[:len(response)] - fresh).abs().max()) < 0.3


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_packed_weights_sample_as_plain_ones_and_are_made_anew_for_each_call(family, monkeypatch):
    """Every matrix of this model but the attention's output is large enough to be packed."""
    monkeypatch.setattr("nanorlhf.kernels.packing_rule", lambda: (range(1, 2**31), 2**18))
    model = tiny(family, width=320, ffn=900, heads=5, kv_heads=5, head_dim=64, vocab_size=900, init_std=0.05)
    seen = []
    monkeypatch.setattr("nanorlhf.model.packed_linear", lambda x, w, b, p: (seen.append(p), packed_linear(x, w, b, p))[1])
    for change in (0.0, 0.5):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + change)                                                     # as an optimizer does, in place
        seen.clear()
        out = generate(model, PROMPTS, 16, num_samples=3, seed=1)
        assert len([p for p in seen if p is not None]) > 15 * 2 * 3                    # qkv, up and down of both layers
        assert unpacked(model)
        for row, (response, logp) in enumerate(zip(out.responses(), out.logprobs)):
            tokens = torch.tensor([PROMPTS[row // 3] + response])
            with torch.no_grad():
                fresh = model.logprobs(tokens, torch.arange(tokens.shape[1])[None] >= len(PROMPTS[row // 3]))[0, -len(response):]
            torch.testing.assert_close(logp[:len(response)], fresh, atol=1e-4, rtol=0)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        seen.clear()
        generate(model, PROMPTS, 16)
        assert not any(p is not None for p in seen)
    with pytest.raises(RuntimeError, match="stop here"), model.packed():
        raise RuntimeError("stop here")
    assert unpacked(model)


def unpacked(model):
    return model.packed_head is None and all(m.packed is None for m in model.modules() if isinstance(m, Linear))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_cached_logits_stay_right_after_rows_are_removed(family, shapes):
    model = tiny(family)
    with torch.no_grad():
        cache, _ = prefill(model, PROMPTS, 2, 6)
        history = [p + [7 + i] for p in PROMPTS for i in range(2)]
        model(torch.tensor([[h[-1]] for h in history]), cache)
        prompts, rows = torch.tensor([0, 2, 3]), torch.tensor([1, 4, 7])               # keep one sample of three prompts
        cache.keep(prompts, rows, 1)
        history = [history[r] + [20] for r in rows]
        logits = model.logits(model(torch.full((3, 1), 20), cache)[:, 0])
        for row, h in zip(logits, history):
            torch.testing.assert_close(row, model.logits(model(torch.tensor([h])))[0, -1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_logprobs_equal_those_of_a_fresh_forward_pass_at_the_same_temperature(family, temperature, shapes):
    """Traps 6 and 7: PPO's first ratio compares these two."""
    model = tiny(family)
    out = generate(model, PROMPTS, 12, temperature=temperature, num_samples=3, seed=5)
    assert 0 < int(out.finished.sum()) < len(out.finished)                             # both endings occur
    for row, (response, logp) in enumerate(zip(out.responses(), out.logprobs)):
        prompt = PROMPTS[row // 3]
        tokens = torch.tensor([prompt + response])
        fresh = model.logprobs(tokens, torch.arange(tokens.shape[1])[None] >= len(prompt), temperature)[0, len(prompt):]
        torch.testing.assert_close(logp[:len(response)], fresh.detach(), atol=1e-5, rtol=0)
        assert (logp[len(response):] == 0).all()


def test_logprobs_are_those_of_the_filtered_distribution():
    """Trap 8: sampling with top-k or top-p but scoring without them makes the KL negative."""
    model, prompt = tiny(), PROMPTS[0]
    out = generate(model, [prompt], 8, temperature=0.9, top_k=6, top_p=0.8, num_samples=4, seed=2)
    for response, logp in zip(out.responses(), out.logprobs):
        logits = model.logits(model(torch.tensor([prompt + response])))[0, len(prompt) - 1:-1] / 0.9
        for t, token in enumerate(response):
            p = torch.where(logits[t] >= logits[t].topk(6).values[-1], logits[t], -torch.inf).softmax(-1)
            order = p.argsort(descending=True)
            kept = order[:int((p[order].cumsum(0) < 0.8).sum()) + 1]
            assert token in kept
            assert float(logp[t]) == pytest.approx(float((p[token] / p[kept].sum()).log().detach()), abs=1e-5)


# ---- Independence of rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_row_depends_on_its_prompt_the_seed_and_its_index_only(family, shapes):
    model = tiny(family)
    prompts = PROMPTS * 3
    whole = rows_of(generate(model, prompts, 12, seed=7))
    for batch_size in (1, 3, 5):
        assert rows_of(generate(model, prompts, 12, seed=7, batch_size=batch_size)) == whole
    assert rows_of(generate(model, prompts[:1], 12, seed=7)) == whole[:1]              # alone
    others = [[1 + i % 7] * (1 + i) for i in range(11)]
    assert rows_of(generate(model, prompts[:1] + others, 12, seed=7))[0] == whole[0]   # other neighbours
    assert rows_of(generate(model, prompts, 12, seed=8)) != whole
    assert len({tuple(r) for r, _ in whole[::4]}) > 1                        # one prompt in three rows: different draws


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_static_step_could_be_captured_as_a_graph(family, n, dtype, monkeypatch):
    """At two step numbers it does the same operations on tensors of the same shapes, strides, offsets and numbers, in the same
    places if they outlive the step, and never asks for a value. The control is the step that looks at its number."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_flatten

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            leaves = tree_flatten((args, kwargs or {}))[0]
            self.calls.append((str(function), *((tuple(x.shape), x.stride(), x.storage_offset(), x.dtype)
                                                if isinstance(x, torch.Tensor) else x for x in leaves)))
            return function(*args, **(kwargs or {}))

    def records(static):
        monkeypatch.setattr("nanorlhf.generate.static_shapes", lambda device: static)
        model, calls, R = tiny(family, init_std=0.02), [], len(PROMPTS) * n
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            cache, logits = prefill(model, PROMPTS, n, 12)
            uniform = torch.rand(R, 12, generator=torch.Generator().manual_seed(0))
            batch = Decoding(model, cache, torch.arange(R), uniform, ([1], 48), dict(temperature=0.7, top_k=9, top_p=0.9))
            batch.draw(logits.repeat_interleave(n, 0))

            def places():
                tensors, _ = tree_flatten([cache.own, cache.prefix, list(vars(cache).values()), list(vars(batch).values())])
                return [x.data_ptr() for x in tensors if isinstance(x, torch.Tensor)]
            first_places = places()
            for _ in range(4):
                with Recorder() as recorder:
                    recorder.calls = []
                    batch.step()
                calls.append(recorder.calls)
            assert places() == first_places
        return calls[1], calls[3]
    first, second = records(static=True)
    assert len(first) > 50 and first == second
    waits = ("_local_scalar_dense", "nonzero", "equal.default", "masked_select", "is_nonzero", "item")
    assert not [call[0] for call in first if any(wait in call[0] for wait in waits)]
    first, second = records(static=False)
    assert first != second and any("_local_scalar_dense" in call[0] for call in first)


@pytest.mark.slow
def test_a_compiled_decoding_step_draws_the_same_tokens():
    """--compile on a CPU; skipped where there is no compiler."""
    import shutil
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler")
    model = tiny("llama")
    options = dict(max_new_tokens=12, num_samples=2, seed=3, tokenizer=Letters(48))
    wanted = generate(model, PROMPTS, **options)
    model.compile_layers()
    ours = generate(model, PROMPTS, **options)
    assert ours.tokens.tolist() == wanted.tokens.tolist()
    torch.testing.assert_close(ours.logprobs, wanted.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("free, shapes", [(10**9, [(4, 3)]), (20_000, [(1, 3)] * 4), (12_000, [(1, 2), (1, 1)] * 4), (0, [(1, 1)] * 12)])
def test_rows_that_do_not_fit_in_memory_are_decoded_in_turns(free, shapes, monkeypatch):
    from nanorlhf import generate as file
    model, decoded, decode = tiny(), [], file._decode
    wanted = generate(model, PROMPTS, 6, num_samples=3)

    def spy(model, prompts, rows, uniform, n, *rest):
        decoded.append((len(prompts), n))
        return decode(model, prompts, rows, uniform, n, *rest)
    monkeypatch.setattr(file, "_decode", spy)
    monkeypatch.setattr(file, "free_memory", lambda device: free)
    assert rows_of(generate(model, PROMPTS, 6, num_samples=3)) == rows_of(wanted)
    assert decoded == shapes


def test_num_samples_equals_repeating_the_prompt(shapes):
    model = tiny()
    together = rows_of(generate(model, PROMPTS, 12, num_samples=4, seed=3))
    repeated = rows_of(generate(model, [p for p in PROMPTS for _ in range(4)], 12, seed=3))
    assert together == repeated and len(together) == 16
    for batch_size in (1, 6):                                                          # also fewer than num_samples
        assert rows_of(generate(model, PROMPTS, 12, num_samples=4, seed=3, batch_size=batch_size)) == together


def test_removing_finished_rows_does_not_change_the_others(shapes):
    """Compares with and without compaction: without an EOS id no row is removed, and each must be the same up to its EOS."""
    model, open_ended = tiny(vocab_size=16), tiny(vocab_size=16)
    open_ended.config.eos_id = None
    prompts = [[p % 16 for p in prompt] for prompt in PROMPTS * 2]
    ended, whole = (generate(m, prompts, 20, num_samples=3, seed=1) for m in (model, open_ended))
    assert 0.3 < float(ended.finished.float().mean()) and not whole.finished.any()
    for row, response in enumerate(ended.responses()):
        assert response == whole.tokens[row, :len(response)].tolist()
        assert bool(ended.finished[row]) == (response[-1] == 1) and response[:-1].count(1) == 0
        torch.testing.assert_close(ended.logprobs[row, :len(response)], whole.logprobs[row, :len(response)], atol=1e-5, rtol=0)


def test_the_mask_includes_eos_and_padding_follows_it():
    """Trap 1: EOS is inside the mask, and the pad id is not EOS."""
    model = tiny(pad_id=3)
    out = generate(model, PROMPTS, 15, num_samples=4, seed=0)
    lengths = out.mask.sum(1)
    assert torch.equal(out.mask, torch.arange(out.mask.shape[1]) < lengths[:, None])
    assert (out.tokens[~out.mask] == 3).all() and (out.logprobs[~out.mask] == 0).all()
    last = out.tokens.gather(1, lengths[:, None] - 1)[:, 0]
    assert torch.equal(last == 1, out.finished)
    assert (lengths[~out.finished] == 15).all() and out.tokens.shape[1] == lengths.max()


def test_greedy_decoding_is_the_argmax_of_a_full_forward_pass():
    model = tiny("llama")
    out = generate(model, PROMPTS, 10, temperature=0)
    for prompt, response in zip(PROMPTS, out.responses()):
        best = model.logits(model(torch.tensor([prompt + response])))[0].argmax(-1)
        assert response == best[len(prompt) - 1:-1].tolist()
    assert (out.logprobs == 0).all()


def test_a_stop_string_ends_its_row():
    model, letters = tiny(vocab_size=20, eos_id=None), Letters(20)
    free = [letters.decode(r) for r in generate(model, PROMPTS[1:2] * 8, 20, seed=4, tokenizer=letters).responses()]
    stops = (free[0][3:5], free[1][6])                                                 # the first one spans two tokens
    out = generate(model, PROMPTS[1:2] * 8, 20, seed=4, stop=stops, tokenizer=letters)
    for text, response, finished in zip(free, out.responses(), out.finished.tolist()):
        ends = [text.find(s) + len(s) for s in stops if s in text]
        assert letters.decode(response) == (text[:min(ends)] if ends else text)
        assert finished == bool(ends)
    assert out.finished.any()
    with pytest.raises(ValueError, match="need a tokenizer"):
        generate(model, PROMPTS[1:2], 4, stop=("a",))


def test_ids_beyond_the_tokenizer_are_never_drawn_or_scored():
    model = tiny()
    with torch.no_grad():
        model.embed.weight[20:] *= 5                                                   # ids above 19 would win
    letters, prompts = Letters(20), [[3, 4], [7]]
    assert max(max(r) for r in generate(model, prompts, 10, num_samples=8).responses()) >= 20
    out = generate(model, prompts, 10, num_samples=8, tokenizer=letters)
    assert max(max(r) for r in out.responses()) < 20
    assert max(max(r) for h in beam_search(model, prompts, 5, tokenizer=letters) for r in h) < 20
    with torch.no_grad():
        logits = prefill(model, prompts, 1, 1)[1][:, :20].log_softmax(-1)
    torch.testing.assert_close(out.logprobs[::8, 0], logits.gather(1, out.tokens[::8, :1])[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_whose_finite_weights_overflow_is_named_and_draws_nothing(temperature):
    model = tiny()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1e25)
    for draw in (lambda: generate(model, [[1, 2]], 4, temperature), lambda: beam_search(model, [[1, 2]], 4)):
        with pytest.raises(UserError, match="weights are too large, or it diverged in training: its output holds NaN"):
            draw()


def test_empty_and_overlong_prompts_are_rejected():
    model = tiny()
    for function in (generate, beam_search):
        with pytest.raises(UserError, match="prompt 1 is empty"):
            function(model, [[3], []], 4)
        with pytest.raises(UserError, match="prompt 1 has 37 tokens: with 4 new ones it does not fit the context of 40"):
            function(model, [[3], [3] * 37], 4)
    assert generate(tiny(eos_id=None), [[3] * 36], 4).tokens.shape == (1, 4)           # a full context is allowed
    out = generate(model, [], 4)
    assert out.tokens.shape == (0, 0) and out.responses() == []


def test_first_tokens_follow_the_models_distribution():
    model = tiny()
    out = generate(model, [PROMPTS[0]], 1, num_samples=8000, batch_size=8000, seed=11)
    with torch.no_grad():
        p = prefill(model, PROMPTS[:1], 1, 1)[1].double().softmax(-1)[0]
    expected, seen = 8000 * p, torch.bincount(out.tokens[:, 0], minlength=48).double()
    common = expected >= 5
    e, s = (torch.cat([x[common], x[~common].sum()[None]]) for x in (expected, seen))
    chi2 = ((s - e) ** 2 / e.clamp(min=1e-9)).sum()
    assert torch.special.gammaincc(torch.tensor((len(e) - 1) / 2, dtype=torch.float64), chi2 / 2) > 1e-3


def left_padded(prompts, pad):
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
    return ids, torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]), longest


def twin(model, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers (the `parity` extra)")
    model.save_pretrained(tmp_path / "m")
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()


def until_eos(row, eos=1):
    row = row.tolist()
    return row[:row.index(eos) + 1] if eos in row else row


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_greedy_decoding_equals_transformers(tmp_path, family):
    model = tiny(family, seed=1)
    theirs = twin(model, tmp_path)
    ids, attend, longest = left_padded(PROMPTS, 0)
    want = theirs.generate(ids, attention_mask=attend, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=1)
    assert generate(model, PROMPTS, 20, temperature=0).responses() == [until_eos(r) for r in want[:, longest:]]


# ---- Beam search ----------------------------------------------------------------------------------------------------


def score(model, prompt, response, length_penalty=1.0, temperature=1.0):
    tokens = torch.tensor([prompt + response])
    with torch.no_grad():
        logp = model.logprobs(tokens, torch.arange(tokens.shape[1])[None] >= len(prompt), temperature)
    return float(logp.sum()) / len(response) ** length_penalty


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("eos", [1, None])
def test_a_wide_enough_beam_returns_every_hypothesis_in_order(length_penalty, eos):
    V, T, prompts = 4, 3, [[2, 3], [0]]
    model = tiny("llama", vocab_size=V, eos_id=eos, init_std=0.5)
    found = beam_search(model, prompts, T, num_beams=V**T, length_penalty=length_penalty)
    everything = [list(s) for n in range(1, T + 1) for s in itertools.product(range(V), repeat=n)
                  if eos not in s[:-1] and (n == T or s[-1] == eos)]
    for prompt, hypotheses in zip(prompts, found):
        assert sorted(hypotheses) == sorted(everything)
        scores = [score(model, prompt, h, length_penalty) for h in hypotheses]
        assert scores == pytest.approx(sorted(scores, reverse=True), abs=1e-5)


def test_one_beam_is_greedy_and_prompts_do_not_affect_each_other(shapes):
    model = tiny(seed=1)
    assert beam_search(model, PROMPTS, 12, num_beams=1) == [[r] for r in generate(model, PROMPTS, 12, temperature=0).responses()]
    model = tiny("llama", seed=2, vocab_size=12)
    prompts = [[p % 12 for p in prompt] for prompt in PROMPTS]
    together = beam_search(model, prompts, 20, num_beams=4)
    assert together == [beam_search(model, [p], 20, num_beams=4)[0] for p in prompts]
    assert together == beam_search(model, prompts, 20, num_beams=4, batch_size=8)
    assert any(h[-1] == 1 for hypotheses in together for h in hypotheses)


def test_diverse_beams_pay_the_hamming_penalty_group_by_group():
    """With one beam per group, each is greedy on log p - penalty * (earlier groups that took the token at this step)."""
    model, prompt, T = tiny("llama", eos_id=None), PROMPTS[0], 6
    for penalty, temperature in ((0.0, 1.0), (0.5, 0.8), (1.0, 0.8), (50.0, 1.0)):
        groups = [[] for _ in range(4)]
        for _ in range(T):
            taken = torch.zeros(48)
            for g in groups:
                with torch.no_grad():
                    logits = model.logits(model(torch.tensor([prompt + g])))[0, -1]
                token = int(((logits / temperature).log_softmax(-1) - penalty * taken).argmax())
                g.append(token)
                taken[token] += 1
        found = beam_search(model, [prompt], T, 4, num_groups=4, diversity_penalty=penalty, temperature=temperature)[0]
        assert sorted(found) == sorted(groups)
        scores = [score(model, prompt, h, 1.0, temperature) for h in found]            # the score leaves the penalty out
        assert scores == sorted(scores, reverse=True)
        if penalty == 0:
            assert all(h == found[0] for h in found)
        if penalty == 50:
            assert all(len({h[t] for h in found}) == 4 for t in range(T))              # no token occurs twice
    with pytest.raises(UserError, match="4 beams do not divide into 3 groups"):
        beam_search(model, [prompt], T, 4, num_groups=3)


def test_without_penalty_each_group_is_its_own_beam_search():
    model = tiny("llama", seed=2, vocab_size=12)
    prompts = [[p % 12 for p in prompt] for prompt in PROMPTS]
    grouped = beam_search(model, prompts, 10, num_beams=4, num_groups=2)
    for got, pair in zip(grouped, beam_search(model, prompts, 10, num_beams=2)):
        assert sorted(got) == sorted(pair + pair)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_beam_search_equals_transformers(tmp_path, family, length_penalty):
    """The conventions are the same: sum / length^penalty, EOS counted, hypotheses only from the best num_beams of a step.

    They differ at the last step only: transformers accepts an unfinished beam only if it is among the best num_beams of all
    candidates, EOS included; we accept the best num_beams unfinished ones. So theirs are never better.
    """
    model = tiny(family, seed=2, vocab_size=14)
    prompts = [[p % 14 for p in prompt] for prompt in PROMPTS]
    theirs = twin(model, tmp_path)
    ids, attend, longest = left_padded(prompts, 0)
    want = theirs.generate(ids, attention_mask=attend, max_new_tokens=12, do_sample=False, num_beams=4, num_return_sequences=4,
                           length_penalty=length_penalty, early_stopping=False, pad_token_id=0, eos_token_id=1)
    want = [[until_eos(r) for r in rows] for rows in want[:, longest:].view(len(prompts), 4, -1)]
    got = beam_search(model, prompts, 12, num_beams=4, length_penalty=length_penalty)
    for prompt, a, b in zip(prompts, got, want):
        assert a[0] == b[0]
        for ours, other in zip(a, b):
            assert score(model, prompt, ours, length_penalty) >= score(model, prompt, other, length_penalty) - 1e-5
    assert sum(a == b for a, b in zip(got, want)) >= 3
    assert any(h[-1] == 1 for rows in got for h in rows)


def test_sampling_is_the_kernel_with_the_rows_own_random_stream():
    import numpy as np
    model = tiny(eos_id=None)
    out = generate(model, PROMPTS, 3, num_samples=2, seed=9)
    with torch.no_grad():
        logits = prefill(model, PROMPTS, 1, 1)[1]
    for row in range(8):
        u = np.random.Generator(np.random.Philox(key=[9, row])).random(3, dtype=np.float32)
        token, logp = sample(logits[row // 2][None], torch.from_numpy(u[:1]))
        assert int(token) == int(out.tokens[row, 0]) and float(logp) == pytest.approx(float(out.logprobs[row, 0]), abs=1e-6)


@pytest.mark.parametrize("options", [dict(num_samples=0), dict(temperature=-1.0), dict(top_p=-0.5), dict(max_new_tokens=0)])
def test_meaningless_options_are_rejected(options):
    config = ModelConfig.for_family("gpt2", 16, vocab_size=20, context=16, layers=1, heads=2, kv_heads=2, head_dim=8)
    with pytest.raises(UserError):
        generate(Transformer(config), [[1, 2]], **{"max_new_tokens": 4, **options})
