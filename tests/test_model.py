"""Tests of model.py against goldens, a float64 loop, transformers and a trained checkpoint; saved and damaged files."""

import contextlib
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import shard
from golden.make_goldens import CASES, TOKENS, weights_of
from nanorlhf.data import Example, collate
from nanorlhf.errors import UserError
from nanorlhf.formats.checkpoints import FAMILIES, tensor_layout
from nanorlhf.generate import generate
from nanorlhf.model import ModelConfig, RewardModel, Transformer, ValueModel, freeze, freeze_layers, rope_frequencies, rotate

GOLDENS = json.loads((Path(__file__).parent / "golden" / "model.json").read_text())
DATA = Path(__file__).parents[2] / "shared" / "data"
needs_stories = pytest.mark.skipif(not (DATA / "checkpoints" / "stories260K").is_dir(),
                                   reason=f"the public checkpoint stories260K is not in {DATA}")


def write_folder(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: torch.as_tensor(v).clone() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def case_folder(tmp_path, name):
    return write_folder(tmp_path / "case", CASES[name], weights_of(GOLDENS[name]["shapes"]))


def small(family="gpt2", **fields):
    return ModelConfig.for_family(family, 24, **(dict(vocab_size=48, context=32, layers=2, heads=4, kv_heads=4, head_dim=6,
                                                      bos_id=0, eos_id=1, pad_id=2) | fields))


def transformers_or_skip():
    return pytest.importorskip("transformers", reason="needs transformers (the `parity` extra)")


# ---- Mathematics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_committed_logits_of_transformers(tmp_path, name):
    model = Transformer.from_pretrained(case_folder(tmp_path, name))
    logits = model.logits(model(torch.tensor(TOKENS)))[:, [0, 5, 11]]
    torch.testing.assert_close(logits, torch.tensor(GOLDENS[name]["logits"]), atol=1e-5, rtol=0)


def loop_forward(config, w, tokens):
    """Returns logits [T, V] in float64, computed one token and one head at a time from the tensors of the files."""
    llama = config["model_type"] == "llama"
    D, H = (config["hidden_size"], config["num_attention_heads"]) if llama else (config["n_embd"], config["n_head"])
    K, E = (config["num_key_value_heads"], config.get("head_dim", D // H)) if llama else (H, D // H)
    w = {k: v.astype(np.float64) for k, v in w.items()}

    def norm(x, name):
        if llama:
            return x / np.sqrt((x * x).mean() + config["rms_norm_eps"]) * w[f"{name}.weight"]
        x = x - x.mean()
        return x / np.sqrt((x * x).mean() + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(x, name):                                   # GPT-2 stores [in, out], Llama [out, in]
        return (w[f"{name}.weight"] @ x if llama else x @ w[f"{name}.weight"]) + w.get(f"{name}.bias", 0.0)

    def turn(x, t):                                       # rotates pair (i, i + E/2) by t * theta^(-2i/E)
        if llama:
            x = x.copy()
            for i in range(E // 2):
                a, b, angle = x[i], x[i + E // 2], t * config["rope_theta"] ** (-2 * i / E)
                x[i], x[i + E // 2] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
        return x
    layers = config["num_hidden_layers"] if llama else config["n_layer"]
    keys, values, out = [[[] for _ in range(layers)] for _ in range(2)] + [[]]
    for t, token in enumerate(tokens):
        x = w["model.embed_tokens.weight"][token] if llama else w["transformer.wte.weight"][token] + w["transformer.wpe.weight"][t]
        for n in range(layers):
            at = f"model.layers.{n}." if llama else f"transformer.h.{n}."
            h = norm(x, at + ("input_layernorm" if llama else "ln_1"))
            if llama:
                q, k, v = (dense(h, f"{at}self_attn.{p}_proj") for p in "qkv")
            else:
                q, k, v = np.split(dense(h, at + "attn.c_attn"), 3)
            keys[n].append([turn(k[i * E:(i + 1) * E], t) for i in range(K)])
            values[n].append([v[i * E:(i + 1) * E] for i in range(K)])
            heads = []
            for i in range(H):
                g = i * K // H
                score = np.array([key[g] @ turn(q[i * E:(i + 1) * E], t) for key in keys[n]]) / math.sqrt(E)
                p = np.exp(score - score.max())
                heads.append(sum(a * value[g] for a, value in zip(p / p.sum(), values[n])))
            x = x + dense(np.concatenate(heads), at + ("self_attn.o_proj" if llama else "attn.c_proj"))
            h = norm(x, at + ("post_attention_layernorm" if llama else "ln_2"))
            if llama:
                gate = dense(h, at + "mlp.gate_proj")
                x = x + dense(gate / (1 + np.exp(-gate)) * dense(h, at + "mlp.up_proj"), at + "mlp.down_proj")
            else:
                h = dense(h, at + "mlp.c_fc")
                x = x + dense(0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))), at + "mlp.c_proj")
        head = w.get("lm_head.weight", w.get("transformer.wte.weight", w.get("model.embed_tokens.weight")))
        out.append(head @ norm(x, "model.norm" if llama else "transformer.ln_f"))
    return np.array(out)


@pytest.mark.parametrize("name", ["gpt2", "gpt2 untied", "llama grouped queries", "llama tied, biases, own head width"])
def test_logits_equal_a_loop_over_tokens_and_heads(tmp_path, name):
    want = loop_forward(CASES[name], weights_of(GOLDENS[name]["shapes"]), TOKENS[0])
    model = Transformer.from_pretrained(case_folder(tmp_path, name)).double()
    got = model.logits(model(torch.tensor(TOKENS[:1])))[0].detach().numpy()
    assert np.abs(got - want).max() < 1e-6                                             # rotary tables are float32


@pytest.mark.parametrize("family, kv_heads", [("gpt2", 4), ("llama", 2)])
def test_a_position_does_not_depend_on_later_ones(family, kv_heads):
    model = Transformer(small(family, kv_heads=kv_heads)).double()
    tokens = torch.randint(48, (3, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 7:] = (tokens[:, 7:] + 11) % 48                                         # later tokens, or garbage padding
    a, b = model(tokens), model(changed)
    assert torch.equal(a[:, :7], b[:, :7]) and not torch.equal(a[:, 7:], b[:, 7:])
    torch.testing.assert_close(model(tokens[1:2, :7]), a[1:2, :7], atol=1e-12, rtol=0)  # the same without padding


def test_rotary_embedding_equals_a_calculation_by_hand():
    config = small("llama", head_dim=4, rope_theta=100.0)                              # frequencies 1 and 100^(-1/2) = 0.1
    angle = torch.arange(6.0)[:, None] * rope_frequencies(config)
    cos, sin = torch.cat([angle.cos()] * 2, 1), torch.cat([-angle.sin(), angle.sin()], 1)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    y = rotate(x, cos[5].view(1, 1, 1, 4), sin[5].view(1, 1, 1, 4)).flatten().tolist()
    c, s, c1, s1 = math.cos(5), math.sin(5), math.cos(0.5), math.sin(0.5)
    assert y == pytest.approx([c - 3 * s, 2 * c1 - 4 * s1, 3 * c + s, 4 * c1 + 2 * s1], abs=1e-6)


def test_logprobs_are_at_their_tokens_and_zero_elsewhere():
    model = Transformer(small("llama")).double()
    tokens = torch.randint(48, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.rand(3, 9, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[:, 0] = False
    with torch.no_grad():
        got, entropy = model.logprobs(tokens, mask, temperature=0.7, entropy=True)
        everything = (model.logits(model(tokens)) / 0.7).log_softmax(-1)
    for b in range(3):
        for t in range(9):
            want = float(everything[b, t - 1, tokens[b, t]]) if mask[b, t] else 0.0    # logits at t-1 predict token t
            assert float(got[b, t]) == pytest.approx(want, abs=1e-12)
            h = float(-(everything[b, t - 1].exp() * everything[b, t - 1]).sum()) if mask[b, t] else 0.0
            assert float(entropy[b, t]) == pytest.approx(h, abs=1e-12)
    assert (model.logprobs(tokens, torch.zeros_like(mask)) == 0).all()                 # an empty mask is allowed
    where = mask.flatten().nonzero()[:, 0]                                             # as collate gives it
    assert torch.equal(model.logprobs(tokens, mask, where=where), model.logprobs(tokens, mask))
    mask[:, 0] = True                                                                  # nothing predicts the first token
    assert torch.equal(model.logprobs(tokens, mask, where=where), model.logprobs(tokens, mask))


def test_initial_weights_are_a_function_of_the_seed():
    a, b, c = Transformer(small(), 1), Transformer(small(), 1), Transformer(small(), 2)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.embed.weight, c.embed.weight)


def test_a_sequence_longer_than_the_context_is_a_user_error():
    with pytest.raises(UserError, match="33 tokens do not fit this model's context of 32"):
        Transformer(small())(torch.zeros(1, 33, dtype=torch.long))


# ---- Reward and value heads -----------------------------------------------------------------------------------------


def test_the_reward_is_read_at_the_last_real_token():
    """Trap 3: it is read neither at the padding nor one token early."""
    rm = RewardModel(small("llama"))
    rows = [[5, 6, 7, 1], [9, 1], [4, 8, 3, 30, 12, 1]]
    lengths = torch.tensor([len(r) for r in rows])
    alone = torch.stack([rm(torch.tensor([r]))[0, -1] for r in rows])
    for garbage in (2, 40):
        tokens = torch.tensor([r + [garbage] * (8 - len(r)) for r in rows])
        torch.testing.assert_close(rm.score(tokens, lengths), alone, atol=1e-6, rtol=0)
    rm.reward_mean, rm.reward_std = 1.5, 4.0
    torch.testing.assert_close(rm.score(tokens, lengths), (alone - 1.5) / 4, atol=1e-6, rtol=0)


def test_a_fresh_reward_head_has_the_published_scale():
    width = 400
    heads = torch.stack([RewardModel(ModelConfig(5, width=width, layers=0, context=4), seed).head.weight for seed in range(20)])
    assert float(heads.detach().std()) == pytest.approx(1 / math.sqrt(width + 1), rel=0.03)
    assert RewardModel(small()).head.bias is None


def test_a_saved_reward_model_keeps_its_constants(tmp_path):
    rm = RewardModel(small("llama", tied=False), seed=3)
    rm.reward_mean, rm.reward_std = -0.25, 1.75
    rm.save_pretrained(tmp_path / "rm")
    back = RewardModel.from_pretrained(tmp_path / "rm")
    assert (back.reward_mean, back.reward_std, back.config) == (-0.25, 1.75, rm.config)
    assert all(torch.equal(p, q) for p, q in zip(rm.parameters(), back.parameters()))


def test_a_reward_model_from_a_language_model_gets_a_fresh_head(tmp_path):
    model = Transformer(small("llama", tied=False))
    model.save_pretrained(tmp_path / "lm")
    with pytest.raises(UserError, match="no reward model"):
        RewardModel.from_pretrained(tmp_path / "lm")
    a, b = (RewardModel.from_pretrained(tmp_path / "lm", fresh_head=True, seed=s) for s in (0, 1))
    tokens = torch.tensor([[3, 4, 5]])
    assert torch.equal(a.trunk(tokens), model(tokens)) and not torch.equal(a.head.weight, b.head.weight)
    assert all(p.requires_grad for p in a.parameters())


def test_a_value_model_starts_as_the_normalised_reward_or_as_zero(tmp_path):
    rm = RewardModel(small("llama"), seed=1)
    rm.reward_mean, rm.reward_std = 0.7, 2.5
    rm.save_pretrained(tmp_path / "rm")
    tokens = torch.randint(48, (2, 9))
    value = ValueModel.from_pretrained(tmp_path / "rm")
    torch.testing.assert_close(value(tokens)[:, -1], rm.score(tokens, torch.tensor([9, 9])), atol=1e-6, rtol=0)
    Transformer(small()).save_pretrained(tmp_path / "lm")
    assert (ValueModel.from_pretrained(tmp_path / "lm")(tokens) == 0).all()


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


VARIANTS = {
    "gpt2": small(), "gpt2 untied": small(tied=False), "gpt2 gelu": small(activation="gelu", ffn=40, norm_eps=1e-3),
    "llama": small("llama"), "llama untied, grouped": small("llama", tied=False, kv_heads=2),
    "llama biases, head width": small("llama", head_dim=10, qkv_bias=True, out_bias=True, mlp_bias=True, rope_theta=300.0),
    "llama3 scaling": small("llama", rope_scaling=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                                       original_max_position_embeddings=64)),
    "gptj": small("gptj", rotary_dim=4), "gptj whole head": small("gptj", ffn=40, vocab_size=51),
    "gpt_neox": small("gpt_neox", rotary_dim=2), "gpt_neox sequential": small("gpt_neox", residual="sequential", tied=True),
    "gpt_neox no biases": small("gpt_neox", qkv_bias=False, out_bias=False, activation="gelu_tanh", rope_theta=300.0),
    "opt": small("opt"), "opt untied": small("opt", tied=False, activation="gelu", vocab_size=51),
    "mistral": small("mistral", tied=False, kv_heads=2, head_dim=10), "qwen2": small("qwen2", kv_heads=1, rope_theta=1e6),
    "qwen2 untied": small("qwen2", tied=False), "qwen3": small("qwen3", tied=False, kv_heads=2, head_dim=14),
    "qwen3 tied, biases": small("qwen3", qkv_bias=True, out_bias=True, vocab_size=51),
    "phi3": small("phi3", tied=False), "phi3 tied, grouped, partial rotary": small("phi3", kv_heads=2, head_dim=10, rotary_dim=6),
    "starcoder2": small("starcoder2", kv_heads=2, rope_theta=300.0), "stablelm": small("stablelm", rotary_dim=2, tied=False),
    "starcoder2 untied, no biases": small("starcoder2", tied=False, qkv_bias=False, out_bias=False, mlp_bias=False, head_dim=10),
    "stablelm parallel, biases": small("stablelm", residual="parallel, one norm", qkv_bias=True, kv_heads=2),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_saved_and_loaded_model_is_bit_identical(tmp_path, name):
    model = Transformer(VARIANTS[name], seed=1)
    with torch.no_grad():
        for p in model.parameters():                                                   # biases and norms too
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    model.save_pretrained(tmp_path / "out")
    back = Transformer.from_pretrained(tmp_path / "out")
    assert back.config == model.config
    assert all(torch.equal(p, q) and q.requires_grad for p, q in zip(model.parameters(), back.parameters()))
    tokens = torch.tensor(TOKENS)
    assert torch.equal(model(tokens), back(tokens))


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_survive_a_round_trip_through_transformers(tmp_path, name):
    transformers = transformers_or_skip()
    model = Transformer(VARIANTS[name], seed=2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    model.save_pretrained(tmp_path / "ours")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    tokens = torch.tensor(TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(tokens)), theirs(tokens).logits, atol=1e-5, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs")                                        # config.json as transformers 5 has it
    back = Transformer.from_pretrained(tmp_path / "theirs")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), back.parameters()))
    torch.testing.assert_close(back(tokens), model(tokens), atol=1e-6, rtol=0)
    assert (back.config.eos_id, back.config.bos_id, back.config.tied) == (1, 0, model.config.tied)


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_greedy_texts_equal_those_of_transformers(tmp_path, name):
    transformers = transformers_or_skip()
    folder, tokens = case_folder(tmp_path, name), torch.tensor(TOKENS)
    tokens[tokens == CASES[name].get("pad_token_id", -1)] = 6     # transformers does not train the embedding of the pad id
    model, theirs = Transformer.from_pretrained(folder), transformers.AutoModelForCausalLM.from_pretrained(folder)
    mask = torch.arange(tokens.shape[1])[None] >= torch.tensor([[3], [1]])
    model.logprobs(tokens, mask).sum().backward()
    logprobs = theirs(tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    (logprobs * mask[:, 1:]).sum().backward()
    ours, want = dict(model.named_parameters()), dict(theirs.named_parameters())
    family = FAMILIES[model.config.family]
    for their_name, _, our_name, rows, transposed in tensor_layout(model, "lm_head", family.prefix):
        got, grad = ours[our_name].grad[rows], want[their_name].grad
        assert float(((got.T if transposed else got) - grad).norm() / grad.norm()) < 1e-4 or float(grad.norm()) < 1e-5, their_name

    # Their context is the 16 tokens of the golden configs (a window of 12 in one case).
    prompts, new = [TOKENS[0][:3], TOKENS[1][:5]], min(model.config.context, 16) - 5
    found = generate(model, prompts, new, temperature=0).responses()
    for prompt, response in zip(prompts, found):
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, pad_token_id=model.config.pad_id or 0)
        assert out[0, len(prompt):].tolist() == response


@pytest.mark.parametrize("family", FAMILIES)
def test_reward_models_score_the_same_in_transformers(tmp_path, family):
    transformers = transformers_or_skip()
    rm = RewardModel(small(family), seed=4)
    rm.reward_mean, rm.reward_std = 3.0, 2.0                                           # transformers ignores these
    rm.save_pretrained(tmp_path / "rm")
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", output_loading_info=True)
    assert theirs.config.num_labels == 1 and not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    rows = [[5, 6, 7, 1], [9, 1], [4, 8, 3, 30, 12, 1]]
    tokens = torch.tensor([r + [2] * (7 - len(r)) for r in rows])                      # right padding with pad_id
    with torch.no_grad():
        want = theirs(tokens, attention_mask=(tokens != 2).long()).logits[:, 0]
        got = rm.score(tokens, torch.tensor([len(r) for r in rows])) * 2 + 3
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_gpt2_files_load_as_the_hub_has_them(tmp_path):
    """The hub's gpt2 has no `transformer.` prefix, and stores causal masks as tensors."""
    tensors = {k.removeprefix("transformer."): v for k, v in weights_of(GOLDENS["gpt2"]["shapes"]).items()}
    for n in range(2):
        tensors[f"h.{n}.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), dtype=np.float32))
        tensors[f"h.{n}.attn.masked_bias"] = np.array(-1e4, dtype=np.float32)
    model = Transformer.from_pretrained(write_folder(tmp_path / "hub", CASES["gpt2"], tensors))
    want = Transformer.from_pretrained(case_folder(tmp_path, "gpt2"))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), want.parameters()))


def test_other_tensor_names_of_published_files_load(tmp_path):
    """OPT without `model.`; Pythia and GPT-J with stored causal masks and rotary tables; GPT-NeoX's head by a newer name."""
    opt, neox, gptj = (weights_of(GOLDENS[n]["shapes"]) for n in ("opt", "gpt_neox", "gptj"))
    masks = {"bias": np.tril(np.ones((1, 1, 16, 16), dtype=bool)), "masked_bias": np.array(-1e9, dtype=np.float32),
             "rotary_emb.inv_freq": np.ones(2, dtype=np.float32)}
    stale = {f"gpt_neox.layers.{n}.attention.{k}": v for n in range(2) for k, v in masks.items()}
    spelt = {
        "opt": [{k.removeprefix("model."): v for k, v in opt.items()}, {**opt, "lm_head.weight": opt["model.decoder.embed_tokens.weight"]}],
        "gpt_neox": [neox | stale, {k.replace("embed_out", "lm_head"): v for k, v in neox.items()}],
        "gptj": [gptj | {f"transformer.h.{n}.attn.{k}": masks[k] for n in range(2) for k in ("bias", "masked_bias")}]}
    for name, variants in spelt.items():
        want = Transformer.from_pretrained(case_folder(tmp_path, name))
        for k, tensors in enumerate(variants):
            model = Transformer.from_pretrained(write_folder(tmp_path / f"{name}{k}", CASES[name], tensors))
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), want.parameters()))


def test_the_stored_head_of_a_tied_model_must_equal_the_embedding(tmp_path):
    tensors = weights_of(GOLDENS["llama grouped queries"]["shapes"])
    tied = {**CASES["llama grouped queries"], "tie_word_embeddings": True}
    assert "lm_head.weight is another matrix" in refusal(write_folder(tmp_path / "a", tied, tensors))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    Transformer.from_pretrained(write_folder(tmp_path / "b", tied, tensors))


def test_saving_over_shards_removes_them(tmp_path):
    folder = case_folder(tmp_path, "qwen2")
    files = shard(folder)
    model = Transformer.from_pretrained(folder)
    model.save_pretrained(folder)
    assert not any((folder / f).exists() for f in [*files, "model.safetensors.index.json"])
    assert torch.equal(Transformer.from_pretrained(folder).embed.weight, model.embed.weight)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name, tensor, dtype", [
    ("llama grouped queries", "model.layers.1.self_attn.k_proj.weight", torch.float32), ("gpt2", "transformer.h.0.mlp.c_fc.bias", torch.float16),
    ("gpt_neox", "embed_out.weight", torch.bfloat16), ("opt", "model.decoder.embed_positions.weight", torch.float64),
    ("qwen3", "model.embed_tokens.weight", torch.float32)])
def test_a_checkpoint_with_nan_or_infinity_is_refused_by_the_name_of_the_tensor(tmp_path, name, tensor, dtype, value):
    folder = case_folder(tmp_path, name)
    tensors = {k: v.to(dtype) for k, v in load_file(folder / "model.safetensors").items()}
    tensors[tensor].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors")
    assert f"model.safetensors: {tensor} holds NaN or infinity" in refusal(folder)


def test_a_reward_model_with_nan_and_weights_beyond_float32_are_refused(tmp_path):
    model = RewardModel(small())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "score.weight": tensors["score.weight"] * math.nan}, tmp_path / "model.safetensors")
    for load in (RewardModel.from_pretrained, ValueModel.from_pretrained):
        assert "score.weight holds NaN" in refusal(tmp_path, load)
    save_file({**tensors, "score.weight": tensors["score.weight"].double() + 1e39}, tmp_path / "model.safetensors")
    assert "score.weight holds NaN or infinity" in refusal(tmp_path, RewardModel.from_pretrained)


@pytest.mark.parametrize("Model", [Transformer, RewardModel])
def test_a_model_with_nan_is_not_saved(tmp_path, Model):
    model = Model(small())
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with torch.no_grad():
        next(model.parameters())[0] = math.nan
    assert "wte.weight holds NaN" in refusal(tmp_path, model.save_pretrained)
    if Model is RewardModel:
        model = Model(small())
        model.reward_std = math.nan
        assert "reward_std holds NaN" in refusal(tmp_path, model.save_pretrained)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("constants, says", [
    ({"reward_mean": "0"}, "reward_mean '0'"), ({"reward_mean": float("inf")}, "reward_mean inf"),
    ({"reward_std": 0.0}, "reward_std 0.0"), ({"reward_std": "1"}, "reward_std '1'"), ({"reward_std": float("nan")}, "reward_std nan")])
def test_invalid_reward_constants_are_rejected(tmp_path, constants, says):
    RewardModel(small()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **constants}))
    assert says in refusal(tmp_path, RewardModel.from_pretrained)


def test_pickles_and_quantized_weights_are_rejected(tmp_path):
    folder = case_folder(tmp_path, "qwen2")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, folder / "model.safetensors")
    assert f"{name} holds torch.int8" in refusal(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle" in refusal(folder)


def test_the_lowest_layers_and_the_embeddings_are_frozen():
    model = Transformer(small(layers=5))
    freeze_layers(model, 0.8)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(("embed", "positions"))
                      or name.startswith("blocks.") and not name.startswith("blocks.4.")}


def test_sharded_files_load_like_a_single_file(tmp_path):
    folder = case_folder(tmp_path, "llama grouped queries")
    whole = Transformer.from_pretrained(folder)
    shard(folder)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), Transformer.from_pretrained(folder).parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_as_float32(tmp_path, dtype):
    folder = case_folder(tmp_path, "llama grouped queries")
    tensors = {k: v.to(dtype) for k, v in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    model = Transformer.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.embed.weight, tensors["model.embed_tokens.weight"].float())


def test_a_pad_id_of_minus_one_is_none(tmp_path):
    """As in the first Llama's files."""
    folder = case_folder(tmp_path, "llama grouped queries")
    (folder / "config.json").write_text(json.dumps({**CASES["llama grouped queries"], "pad_token_id": -1}))
    assert Transformer.from_pretrained(folder).config.pad_id is None


def test_the_first_id_of_an_eos_list_is_used(tmp_path):
    folder = case_folder(tmp_path, "llama grouped queries")
    (folder / "config.json").write_text(json.dumps({**CASES["llama grouped queries"], "eos_token_id": [7, 8]}))
    assert Transformer.from_pretrained(folder).config.eos_id == 7


def refusal(folder, load=Transformer.from_pretrained):
    with pytest.raises(UserError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_extra_and_misshaped_tensors_are_named(tmp_path):
    tensors = weights_of(GOLDENS["llama grouped queries"]["shapes"])
    name = "model.layers.1.mlp.up_proj.weight"

    def message(changed):
        return refusal(write_folder(tmp_path / "bad", CASES["llama grouped queries"], changed))
    assert f"missing {name} (1)" in message({k: v for k, v in tensors.items() if k != name})
    third = "model.layers.2.mlp.up_proj.weight"                                        # there are two layers
    assert f"not expected {third} (1)" in message({**tensors, third: tensors[name].copy()})
    assert f"{name} has shape [39, 24], config.json asks for [40, 24]" in message({**tensors, name: tensors[name][:39].copy()})
    query = "model.layers.0.self_attn.q_proj.weight"                                   # a part of our stacked qkv
    assert f"{query} has shape [12, 24]" in message({**tensors, query: tensors[query][:12].copy()})
    assert "missing lm_head.weight (1)" in message({k: v for k, v in tensors.items() if k != "lm_head.weight"})
    short = {k: v[:1].copy() if "layernorm" in k else v for k, v in tensors.items() if k != name}
    assert f"missing {name} (1); misshaped " in message({**short, third: tensors[name]}).replace(f"not expected {third} (1); ", "")
    assert "(20)" in message({"lm_head.weight": tensors["lm_head.weight"]})            # long lists are shortened
    gpt2 = weights_of(GOLDENS["gpt2"]["shapes"])
    gpt2["transformer.h.0.mlp.c_fc.weight"] = gpt2["transformer.h.0.mlp.c_fc.weight"].T.copy()
    folder = write_folder(tmp_path / "bad", CASES["gpt2"], gpt2)
    assert "c_fc.weight has shape [96, 24], config.json asks for [24, 96]" in refusal(folder)


def test_damaged_and_hostile_files_are_rejected(tmp_path):
    folder = case_folder(tmp_path, "llama grouped queries")
    whole = (folder / "model.safetensors").read_bytes()
    for part in (whole[:-5], whole[:len(whole) // 2], whole[:100], whole[:4], b"", b"\xff" * 64):
        (folder / "model.safetensors").write_bytes(part)
        assert "damaged" in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert "model.safetensors is missing" in refusal(folder)
    (folder / "model.safetensors").write_bytes(whole)
    files = shard(folder)
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    tensors = load_file(folder / files[1])
    save_file({**tensors, "model.norm.weight": torch.ones(24), "lm_head.weight": torch.ones(48, 24)}, folder / files[1])
    assert "is in" in refusal(folder)                                                  # a tensor in two shards
    save_file(tensors, folder / files[1])
    for bad in ("../case/" + files[0], "/etc/passwd", "..", ""):
        index.write_text(json.dumps({"weight_map": {**good["weight_map"], "model.norm.weight": bad}}))
        refusal(folder)
    for bad in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index.write_text(bad)
        assert "index.json" in refusal(folder)
    index.write_text(json.dumps(good))
    (folder / files[0]).unlink()
    assert f"{files[0]} is missing" in refusal(folder)


@pytest.mark.parametrize("name, change, message", [
    ("gpt2", {"model_type": "bert"}, "model_type 'bert'"), ("gpt2", {"model_type": None}, "model_type None"),
    ("gpt2", {"model_type": ["gpt2"]}, "model_type"),
    ("gpt2", {"activation_function": "tanhshrink"}, "activation 'tanhshrink'"),
    ("gpt2", {"n_embd": None}, "n_embd is missing"), ("gpt2", {"n_head": 0}, "wrong kind"), ("gpt2", {"n_head": "3"}, "wrong kind"),
    ("gpt2", {"n_layer": -1}, "layers -1 is not a positive"), ("gpt2", {"vocab_size": "48"}, "vocab_size '48' is not a positive"),
    ("gpt2", {"n_head": 5}, "config.json"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"), ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ("llama grouped queries", {"num_key_value_heads": 3}, "4 heads, 3 key-value heads"),
    ("llama grouped queries", {"head_dim": 7}, "head width 7"),
    ("llama grouped queries", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
    ("llama grouped queries", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
    ("llama grouped queries", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
    ("llama grouped queries", {"rope_scaling": "llama3"}, "config.json"),
    ("llama grouped queries", {"rope_theta": "10"}, "rope_theta '10' is not a pos"),
    ("llama grouped queries", {"rope_theta": float("nan")}, "rope_theta nan"), ("gpt_neox", {"rotary_pct": "all"}, "'all' is not a pos"),
    ("gpt_neox", {"rotary_pct": float("inf")}, "factor inf"), ("llama grouped queries", {"head_dim": float("inf")}, "wrong kind|head_dim"),
    ("llama grouped queries", {"rms_norm_eps": "1e-5"}, "norm_eps '1e-5'"), ("gpt2", {"layer_norm_epsilon": -1.0}, "norm_eps -1.0"),
    ("llama grouped queries", {"vocab_size": 10**12}, "vocab_size"), ("gpt2", {"n_positions": 2**70}, "context"),
    ("gpt2", {"pad_token_id": "0"}, "pad_token_id '0'"), ("gpt2", {"eos_token_id": ["1"]}, "eos_token_id '1'"),
    ("gpt2", {"bos_token_id": -1}, "bos_token_id -1"), ("gpt2", {"pad_token_id": -2}, "pad_token_id -2"),
    ("gpt2", {"eos_token_id": -2}, "eos_token_id -2"), ("gpt2", {"eos_token_id": [7, -1]}, "eos_token_id -1"),
    ("gpt2", {"eos_token_id": [7, [8]]}, "eos_token_id"), ("gpt2", {"eos_token_id": 2**31}, "eos_token_id"),
    ("llama grouped queries", {"tie_word_embeddings": "false"}, "tie_word_embeddings 'false'"),
    ("llama grouped queries", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ("llama grouped queries", {"model_type": "gemma2"}, "model_type 'gemma2' is not one that nanorlhf reads: gpt2, gptj"),
    ("gptj", {"rotary_dim": 7}, "7 rotary"), ("gptj", {"rotary_dim": 14}, "14 rotary"),
    ("gptj", {"tie_word_embeddings": True}, "tie_word_embeddings True"),
    ("gpt_neox", {"rotary_pct": 0.05}, "0 rotary"), ("gpt_neox", {"rotary_pct": 2.0}, "24 rotary"), ("gptj", {"rotary_dim": 0}, "0 rotary"),
    ("gpt_neox", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before False"), ("opt", {"enable_bias": False}, "enable_bias False"),
    ("opt", {"word_embed_proj_dim": 12}, "word_embed_proj_dim 12"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine False"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window True"),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window True"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}}, "rope type 'longrope'"),
    ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}}, "rope type 'su'"),
    ("phi3", {"partial_rotary_factor": 0.1}, "0 rotary"), ("phi3", {"sliding_window": -1}, "context -1"),
    ("starcoder2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"), ("starcoder2", {"use_bias": 1.5}, "use_bias 1.5"),
    ("starcoder2", {"norm_type": "rms_norm"}, "norm_type 'rms_norm'"), ("starcoder2", {"mlp_type": "gated"}, "mlp_type 'gated'"),
    ("stablelm", {"qk_layernorm": True}, "qk_layernorm True"), ("stablelm", {"use_qkv_bias": "no"}, "use_qkv_bias 'no'"),
    ("stablelm", {"use_parallel_residual": "no"}, "use_parallel_residual 'no'")])
def test_an_unsupported_config_gives_a_one_line_error(tmp_path, name, change, message):
    folder = case_folder(tmp_path, name)
    (folder / "config.json").write_text(json.dumps({**CASES[name], **change}))
    assert re.search(message.replace("(", "\\("), refusal(folder))


def test_invalid_config_files_are_rejected(tmp_path):
    folder = case_folder(tmp_path, "gpt2")
    for key in ("n_embd", "n_head", "n_layer", "n_positions", "vocab_size"):
        (folder / "config.json").write_text(json.dumps({k: v for k, v in CASES["gpt2"].items() if k != key}))
        assert f"{key} is missing" in refusal(folder)
    for text in ("", "{", "[1]", "null", "\x00", '"gpt2"'):
        (folder / "config.json").write_text(text)
        refusal(folder)
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    refusal(folder)
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(folder)
    assert "no checkpoint folder" in refusal(tmp_path / "nowhere")


def test_a_reward_model_is_rejected_as_a_language_model(tmp_path):
    RewardModel(small("llama", tied=False)).save_pretrained(tmp_path / "rm")
    message = refusal(tmp_path / "rm")
    assert "is a reward model" in message


def test_saving_over_a_folder_replaces_the_old_weights(tmp_path):
    a, b = Transformer(small(), 1), Transformer(small(layers=1), 2)
    a.save_pretrained(tmp_path / "m")
    b.save_pretrained(tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(Transformer.from_pretrained(tmp_path / "m").embed.weight, b.embed.weight)


# ---- A trained checkpoint -------------------------------------------------------------------------------------------


@needs_stories
def test_stories260k_generates_its_known_story(tmp_path):
    folder = DATA / "checkpoints" / "stories260K"
    model = Transformer.from_pretrained(folder)
    ids = generate(model, [[1, 403, 407, 261, 378]], 60, temperature=0).responses()[0]
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers (the `parity` extra) to read the continuation")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    story = ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball."
    told = tokenizer.decode([1, 403, 407, 261, 378] + ids)
    assert told.strip().removeprefix("Once upon a time").startswith(story), told

    stories = (DATA / "text" / "tinystories_sample.txt").read_text(encoding="utf-8").split("<|endoftext|>")[0].strip()
    drama = (DATA / "text" / "tiny_shakespeare.txt").read_text(encoding="utf-8")[:1200]
    for text, count, loss in ((stories, 374, 1.316), (drama, 400, 3.919)):
        tokens = [i for i in tokenizer.encode(text, add_special_tokens=False).ids if i != 1]
        tokens = torch.tensor([[1] + tokens])[:, :count]
        assert tokens.shape[1] == count
        logp = model.logprobs(tokens, torch.arange(count)[None] > 0).detach()
        assert float(-logp.sum() / (count - 1)) == pytest.approx(loss, abs=1e-3)
    shutil.copytree(folder, tmp_path / "copy")
    model.save_pretrained(tmp_path / "copy")
    a, b = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "copy"))
    assert a.keys() == b.keys() and all(torch.equal(a[k].float(), b[k]) for k in a)


def test_trap_9_there_is_no_dropout(tmp_path):
    """A model whose config.json asks for dropout computes the same in training mode, so policy and reference agree."""
    model = Transformer(ModelConfig.for_family("gpt2", 32, vocab_size=50, context=16, layers=2, heads=2, kv_heads=2, head_dim=16))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "resid_pdrop": 0.1, "attn_pdrop": 0.1, "embd_pdrop": 0.1}))
    model, tokens = Transformer.from_pretrained(tmp_path), torch.arange(12).view(2, 6)
    assert not any("dropout" in type(m).__name__.lower() for m in model.modules())
    assert torch.equal(model.train()(tokens), model.eval()(tokens))


def test_logits_under_autocast_do_not_depend_on_a_common_offset():
    """Pretrained models have logits around -100. Rounded to bf16 they lose the differences that matter."""
    config = ModelConfig.for_family("gpt_neox", 16, vocab_size=60, context=32, layers=1, heads=2, kv_heads=2, head_dim=8,
                                    rotary_dim=2, head_bias=True, tied=False)
    model = Transformer(config, seed=1)
    tokens = torch.randint(60, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model.logits(model(tokens)).log_softmax(-1)
        model.head.bias -= 100
        after = model.logits(model(tokens))
    assert after.dtype == torch.float32
    torch.testing.assert_close(after.log_softmax(-1), before, atol=1e-4, rtol=0)


# ---- What saves time or memory and changes no result ----------------------------------------------------------------


def shared_prompt_examples():
    """Groups of 1 to 4 responses to one prompt each, as examples in a mixed order, and the lists of their numbers."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 48, n).tolist() for n in (5, 1, 9)]
    order = [0, 1, 0, 2, 2, 0, 2, 2]              # the prompt of each example
    examples = [Example(prompts[p] + rng.integers(3, 48, rng.integers(1, 8)).tolist() + [1], len(prompts[p])) for p in order]
    return examples, [[i for i, p in enumerate(order) if p == group] for group in (1, 0, 2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prompt_computed_once_gives_the_same_logprobs_and_gradients(family):
    """In float64: what differs is the order of sums only; but rotary embedding, and qwen3's norms of queries and keys, calculate
    in float32. Grouped heads in the families that have them."""
    model = Transformer(small(family, kv_heads=2 if "kv_heads" in FAMILIES[family].keys else 4)).double()
    examples, shared = shared_prompt_examples()
    results = []
    for groups in (None, shared):
        batch = collate(examples, pad_id=2, shared=groups)
        model.zero_grad()
        logp, entropy = model.logprobs(batch.tokens, batch.mask, 0.7, entropy=True, where=batch.where, packed=batch.packed)
        (logp * torch.arange(logp.numel()).view_as(logp)).sum().backward()
        results.append([logp, entropy, *(p.grad for p in model.parameters())])
    assert batch.packed.tokens.numel() < batch.tokens.numel()
    for apart, packed in zip(*results):
        torch.testing.assert_close(packed, apart, **(dict(atol=1e-9, rtol=1e-9) if model.positions else dict(atol=1e-4, rtol=1e-4)))


def test_the_packed_rows_of_shared_prompts_are_what_they_should_be():
    batch = collate([Example([5, 6, 7, 1], 2), Example([5, 6, 8, 1], 2), Example([9, 1], 1)], pad_id=2, shared=[[0, 1], [2]])
    assert batch.packed.tokens.tolist() == [[5, 6, 7, 1, 8, 1], [9, 1, 2, 2, 2, 2]]
    assert batch.packed.positions.tolist() == [[0, 1, 2, 3, 2, 3], [0, 1, 0, 0, 0, 0]]
    assert batch.packed.segments.tolist() == [[0, 0, 1, 1, 2, 2], [0, 1, -1, -1, -1, -1]]
    assert batch.packed.before.tolist() == [1, 2, 1, 4, 6]                             # a first token follows the prompt's last
    with pytest.raises(AssertionError):
        collate([Example([5, 6, 1], 2), Example([5, 7, 1], 2)], pad_id=2, shared=[[0, 1]])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_checkpointing_changes_no_gradient_and_keeps_less(family):
    examples, _ = shared_prompt_examples()
    batch, gradients, kept = collate(examples, pad_id=2), [], []
    for checkpointing in (False, True):
        model, saved = Transformer(small(family)), []
        model.checkpointing = checkpointing
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):   # noqa: B023
            loss = model.logprobs(batch.tokens, batch.mask).sum()
        loss.backward()
        kept.append(sum(saved))
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert kept[1] < 0.3 * kept[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_model_in_bfloat16_gives_what_autocast_gives(family):
    """To the bit: autocast rounds the same weights, in every pass."""
    tokens = torch.randint(3, 48, (3, 9), generator=torch.Generator().manual_seed(0))
    mask, model = torch.arange(9).expand(3, -1) > 2, Transformer(small(family, init_std=0.3))
    reward, outputs = RewardModel(small(family)), []
    for dtype in ("float32", "bfloat16"):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            outputs.append([freeze(model, dtype).logprobs(tokens, mask), freeze(reward, dtype).score(tokens, mask.sum(1)),
                            generate(model, [[5, 6, 7], [9]], 6, seed=1).logprobs])
    assert model.blocks[0].mlp.up.weight.dtype == torch.bfloat16 and not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(*outputs))


def test_autocast_rounds_each_weight_once_per_update():
    """However many micro-batches an update has, with the gradients of contexts of their own."""
    from torch.utils._python_dispatch import TorchDispatchMode
    model = Transformer(small(tied=False))
    weight = model.blocks[0].mlp.up.weight
    examples, _ = shared_prompt_examples()

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "_to_copy" in str(function) and args[0].data_ptr() == weight.data_ptr():
                casts.append(function)
            return function(*args, **(kwargs or {}))
    gradients, counts = [], []
    for outer in (False, True):
        casts = []
        model.zero_grad()
        with Casts(), torch.autocast("cpu", torch.bfloat16) if outer else contextlib.nullcontext():
            for example in examples:
                batch = collate([example], pad_id=2)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model.logprobs(batch.tokens, batch.mask).sum()
                loss.backward()
        counts.append(len(casts))
        gradients.append([p.grad for p in model.parameters()])
    assert counts == [len(examples), 1]
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
