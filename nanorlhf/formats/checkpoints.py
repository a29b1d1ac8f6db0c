"""Reads and writes checkpoint folders: what each family of models calls its options and its tensors. Only model.py and run.py use
it.

Reading is strict: an error names any missing, extra or misshaped tensor, and any option that we do not compute. A family is
one entry of FAMILIES. The spellings of transformers 4 and 5 are both read; transformers 4's is written, and both load it.
"""

import dataclasses
import errno
import math
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanorlhf import ranks
from nanorlhf.errors import NotFinite, UserError, one_line
from nanorlhf.files import atomic_write, local_folder, read_json, write_json

ACTIVATION_NAMES = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu",
                    "relu": "relu", "silu": "silu", "swish": "silu"}


@dataclasses.dataclass
class Family:
    causal: str                 # class name in transformers, as in `architectures`
    classifier: str             # the same for the class with a scalar head
    style: dict                 # fields of ModelConfig that all models of the family share, if not its defaults
    keys: dict                  # fields that vary between models: our name -> config.json's
    defaults: dict              # their values when the key is absent (transformers' defaults)
    prefix: str                 # starts the names of the trunk's tensors
    block: str                  # name of the list of layers
    names: dict                 # our module -> theirs; several are stacked parts of one of our matrices
    head: str = "lm_head"       # name of the output head
    transposed: bool = False    # GPT-2's Conv1D stores [in, out]
    order: str = ""             # row order of queries, keys and values: see qkv_order
    only: dict = dataclasses.field(default_factory=dict)      # options with one supported value
    constant: dict = dataclasses.field(default_factory=dict)  # other keys to write


SIZES = dict(context="max_position_embeddings", width="hidden_size", layers="num_hidden_layers", heads="num_attention_heads")
GPT_KEYS = dict(context="n_positions", width="n_embd", layers="n_layer", heads="n_head", ffn="n_inner",
                norm_eps="layer_norm_epsilon", activation="activation_function")
GPT_DEFAULTS = dict(norm_eps=1e-5, activation="gelu_new")
NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
LLAMA_STYLE = dict(norm="rmsnorm", norm_eps=1e-6, positions="rotary", activation="silu", gated=True, qkv_bias=False,
                   out_bias=False, mlp_bias=False)
LLAMA_KEYS = SIZES | dict(kv_heads="num_key_value_heads", head_dim="head_dim", ffn="intermediate_size",
                          norm_eps="rms_norm_eps", activation="hidden_act")
LLAMA_DEFAULTS = dict(norm_eps=1e-6, activation="silu", qkv_bias=False, out_bias=False, mlp_bias=False, tied=False)
LLAMA_NAMES = {"embed": ["embed_tokens"], "norm": ["norm"], "norm1": ["input_layernorm"],
               "norm2": ["post_attention_layernorm"], "attn.out": ["self_attn.o_proj"],
               "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
               "attn.q_norm": ["self_attn.q_norm"], "attn.k_norm": ["self_attn.k_norm"],
               "mlp.up": ["mlp.gate_proj", "mlp.up_proj"], "mlp.down": ["mlp.down_proj"]}
ATTENTION_BIAS = dict(qkv_bias="attention_bias", out_bias="attention_bias")
NO_WINDOW = dict(use_sliding_window=False)

FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel", "GPT2ForSequenceClassification", style={}, keys=GPT_KEYS, defaults=GPT_DEFAULTS,
        prefix="transformer.", block="h", transposed=True, constant=NO_DROPOUT,
        only=dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False),
        names={"embed": ["wte"], "positions": ["wpe"], "norm": ["ln_f"], "norm1": ["ln_1"], "norm2": ["ln_2"],
               "attn.qkv": ["attn.c_attn"], "attn.out": ["attn.c_proj"],
               "mlp.up": ["mlp.c_fc"], "mlp.down": ["mlp.c_proj"]}),
    "gptj": Family(
        "GPTJForCausalLM", "GPTJForSequenceClassification", keys=GPT_KEYS | dict(rotary_dim="rotary_dim"),
        style=dict(positions="rotary", residual="parallel, one norm", qkv_bias=False, out_bias=False, tied=False,
                   head_bias=True),
        defaults=GPT_DEFAULTS | dict(tied=False, rotary_dim=64), prefix="transformer.", block="h", order="pairs",
        constant=NO_DROPOUT, only=dict(tie_word_embeddings=False),
        names={"embed": ["wte"], "norm": ["ln_f"], "norm1": ["ln_1"],
               "attn.qkv": ["attn.q_proj", "attn.k_proj", "attn.v_proj"], "attn.out": ["attn.out_proj"],
               "mlp.up": ["mlp.fc_in"], "mlp.down": ["mlp.fc_out"]}),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM", "GPTNeoXForSequenceClassification",
        style=dict(positions="rotary", residual="parallel", activation="gelu", tied=False),
        keys=SIZES | ATTENTION_BIAS | dict(ffn="intermediate_size", norm_eps="layer_norm_eps", activation="hidden_act"),
        defaults=dict(norm_eps=1e-5, activation="gelu", qkv_bias=True, out_bias=True, tied=False),
        prefix="gpt_neox.", block="layers", head="embed_out", order="heads",
        constant=dict(attention_dropout=0.0, hidden_dropout=0.0),
        names={"embed": ["embed_in"], "norm": ["final_layer_norm"], "norm1": ["input_layernorm"],
               "norm2": ["post_attention_layernorm"], "attn.qkv": ["attention.query_key_value"],
               "attn.out": ["attention.dense"], "mlp.up": ["mlp.dense_h_to_4h"], "mlp.down": ["mlp.dense_4h_to_h"]}),
    "opt": Family(
        "OPTForCausalLM", "OPTForSequenceClassification", style=dict(position_offset=2, activation="relu"),
        keys=SIZES | dict(ffn="ffn_dim", activation="activation_function"), defaults=dict(activation="relu"),
        prefix="model.decoder.", block="layers", constant=dict(dropout=0.0, attention_dropout=0.0),
        only=dict(do_layer_norm_before=True,  # False in OPT-350M
                  enable_bias=True, layer_norm_elementwise_affine=True, _remove_final_layer_norm=False),
        names={"embed": ["embed_tokens"], "positions": ["embed_positions"], "norm": ["final_layer_norm"],
               "norm1": ["self_attn_layer_norm"], "norm2": ["final_layer_norm"], "attn.out": ["self_attn.out_proj"],
               "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
               "mlp.up": ["fc1"], "mlp.down": ["fc2"]}),
    "llama": Family(
        "LlamaForCausalLM", "LlamaForSequenceClassification", style=LLAMA_STYLE,
        keys=LLAMA_KEYS | ATTENTION_BIAS | dict(mlp_bias="mlp_bias"), defaults=LLAMA_DEFAULTS,
        prefix="model.", block="layers", names=LLAMA_NAMES),
    "mistral": Family(
        "MistralForCausalLM", "MistralForSequenceClassification", style=LLAMA_STYLE, keys=LLAMA_KEYS,
        defaults=LLAMA_DEFAULTS, prefix="model.", block="layers", names=LLAMA_NAMES, constant=dict(sliding_window=None)),
    "qwen2": Family(
        "Qwen2ForCausalLM", "Qwen2ForSequenceClassification", style=LLAMA_STYLE | dict(qkv_bias=True), only=NO_WINDOW,
        keys={k: v for k, v in LLAMA_KEYS.items() if k != "head_dim"}, defaults=LLAMA_DEFAULTS | dict(qkv_bias=True),
        prefix="model.", block="layers", names=LLAMA_NAMES, constant=NO_WINDOW),
    "qwen3": Family(
        "Qwen3ForCausalLM", "Qwen3ForSequenceClassification", style=LLAMA_STYLE | dict(qk_norm=True), only=NO_WINDOW,
        keys=LLAMA_KEYS | ATTENTION_BIAS, defaults=LLAMA_DEFAULTS | dict(head_dim=128),
        prefix="model.", block="layers", names=LLAMA_NAMES, constant=NO_WINDOW),
    "phi3": Family(
        "Phi3ForCausalLM", "Phi3ForSequenceClassification", style=LLAMA_STYLE, keys=LLAMA_KEYS,
        defaults=LLAMA_DEFAULTS | dict(norm_eps=1e-5), prefix="model.", block="layers", constant=dict(sliding_window=None),
        names=LLAMA_NAMES | {"attn.qkv": ["self_attn.qkv_proj"], "mlp.up": ["mlp.gate_up_proj"]}),
    "starcoder2": Family(
        "Starcoder2ForCausalLM", "Starcoder2ForSequenceClassification", style=dict(positions="rotary"),
        keys=LLAMA_KEYS | dict(norm_eps="norm_epsilon", qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias"),
        defaults=dict(norm_eps=1e-5, activation="gelu_pytorch_tanh", kv_heads=2), prefix="model.", block="layers",
        only=dict(norm_type="layer_norm", mlp_type="default"), constant=dict(sliding_window=None),
        names=LLAMA_NAMES | {"mlp.up": ["mlp.c_fc"], "mlp.down": ["mlp.c_proj"]}),
    "stablelm": Family(
        "StableLmForCausalLM", "StableLmForSequenceClassification", style=LLAMA_STYLE | dict(norm="layernorm", norm_eps=1e-5),
        keys=SIZES | dict(kv_heads="num_key_value_heads", ffn="intermediate_size", norm_eps="layer_norm_eps",
                          activation="hidden_act", qkv_bias="use_qkv_bias"),
        defaults=LLAMA_DEFAULTS | dict(norm_eps=1e-5, kv_heads=32), only=dict(qk_layernorm=False),
        prefix="model.", block="layers", names=LLAMA_NAMES),
}
PARTIAL_ROTARY = ("gpt_neox", "phi3", "stablelm")                 # may rotate a share of each head
STALE = (".attn.bias", ".attention.bias", ".masked_bias", ".rotary_emb.inv_freq", ".embed_positions")  # buffers in old files
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_rope(name, raw):
    """Returns (base, scaling or None, share of each head that is rotated), from the spelling of transformers 4 or 5."""
    top = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    rope = {k: raw[k] for k in top if raw.get(k) is not None}
    if name == "gpt_neox":                        # has its own names
        rope = {"rope_theta": raw.get("rotary_emb_base", 10000.0)} | rope | {
            "partial_rotary_factor": raw.get("rotary_pct", 0.25)}
    if name == "stablelm":
        rope = {"partial_rotary_factor": 0.25} | rope
    rope = {"rope_theta": 10000.0} | rope | (raw.get("rope_scaling") or {}) | (raw.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"rope type {kind!r} is not one that nanorlhf computes: default, llama3")
    scaling = {k: rope[k] for k in LLAMA3_ROPE} if kind == "llama3" else None
    share = rope.get("partial_rotary_factor")
    share = 1.0 if share is None else share
    for key, value in {"rope_theta": rope["rope_theta"], "partial_rotary_factor": share, **(scaling or {})}.items():
        check_positive(key, value)
    return rope["rope_theta"], scaling, share


def read_fields(name, raw):
    """Returns the fields of a ModelConfig that config.json determines."""
    family = FAMILIES[name]
    given = {ours: raw[key] for ours, key in {**family.keys, "tied": "tie_word_embeddings"}.items()
             if raw.get(key) is not None}
    fields = family.style | family.defaults | given
    needed = [key for ours, key in family.keys.items() if ours in ("context", "width", "layers", "heads", "ffn")]
    if missing := [k for k in [*needed, "vocab_size"] if raw.get(k) is None and k != "n_inner"]:
        raise UserError(f"{missing[0]} is missing")
    fields["vocab_size"] = raw["vocab_size"]
    fields.setdefault("kv_heads", fields["heads"])
    fields.setdefault("head_dim", fields["width"] // fields["heads"])
    fields.setdefault("ffn", 4 * fields["width"])
    if name == "gptj":
        fields["rotary_dim"] = read_rotary(fields, fields["rotary_dim"])
    elif fields.get("positions") == "rotary":
        fields["rope_theta"], fields["rope_scaling"], share = read_rope(name, raw)
        if share != 1 and name not in PARTIAL_ROTARY:
            raise UserError(f"partial_rotary_factor {share!r} is not supported in {name}")
        fields["rotary_dim"] = read_rotary(fields, int(fields["head_dim"] * share))
    if name == "gpt_neox":
        fields["residual"] = "parallel" if raw.get("use_parallel_residual") in (None, True) else "sequential"
    if name == "stablelm":
        fields["residual"] = "parallel, one norm" if raw.get("use_parallel_residual") else "sequential"
    if "sliding_window" in family.constant:       # within its window, sliding attention is plain attention: go no further
        window = raw.get("sliding_window", 4096 if name == "mistral" else None)
        fields["context"] = min(fields["context"], window or fields["context"])
    if name == "opt" and raw.get("word_embed_proj_dim") not in (None, fields["width"]):
        raise UserError(f"word_embed_proj_dim {raw['word_embed_proj_dim']!r} other than hidden_size (OPT-350M) "
                        "is not supported")
    if "sliding_attention" in (raw.get("layer_types") or []):
        raise UserError("layer_types with sliding_attention is not supported")
    return fields


def read_rotary(fields, R):
    """Returns ModelConfig.rotary_dim for a head with R rotary dimensions."""
    E = fields["head_dim"]
    if R % 2 or not 0 < R <= E:
        raise UserError(f"{R} rotary dimensions with head width {E} are not supported (an even number from 2 to {E} is)")
    return R if R != E else 0


def read_config(folder):
    """Reads config.json. Returns (fields of a ModelConfig, the raw dictionary)."""
    path = local_folder(folder) / "config.json"
    try:
        raw = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{folder} is no checkpoint folder: it has no config.json")
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}")
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{path}: model_type {kind!r} is not one that nanorlhf reads: {', '.join(FAMILIES)}")
    if wrong := [f"{k} {raw[k]!r}" for k, only in FAMILIES[kind].only.items() if raw.get(k) not in (only, None)]:
        raise UserError(f"{path}: {wrong[0]} is not supported")
    if raw.get("pad_token_id") == -1:             # the first Llama's files say so that they have none
        raw["pad_token_id"] = None
    try:
        fields = read_fields(kind, raw)
        check_values(fields, raw)
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing")
    except UserError as error:
        raise UserError(f"{path}: {error}")
    except (TypeError, AttributeError, ArithmeticError, ValueError) as error:
        raise UserError(f"{path}: a value is of the wrong kind: {error}")
    fields["activation"] = ACTIVATION_NAMES[fields["activation"]]
    ends = read_end_ids(path.parent)
    return dict(fields, family=kind, bos_id=raw.get("bos_token_id"), pad_id=raw.get("pad_token_id"),
                eos_id=ends[0] if ends else None, end_ids=ends if len(ends) > 1 else ()), raw


def as_list(ids):
    """eos_token_id is an id, a list of ids or null; returns a list."""
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def read_end_ids(folder):
    """Returns all ids that end a response, a tuple: the eos_token_id of config.json and of generation_config.json."""
    ids = []
    for file in (Path(folder) / "config.json", Path(folder) / "generation_config.json"):
        if file.is_file():
            try:
                ids += as_list(read_json(file).get("eos_token_id"))
            except (ValueError, AttributeError):
                raise UserError(f"{file}: not JSON, or no object")
            if wrong := [i for i in ids if type(i) is not int or not 0 <= i < 2**31]:
                raise UserError(f"{file}: eos_token_id {wrong[0]!r} is not a token id")
    return tuple(dict.fromkeys(ids))


def check_values(fields, raw):
    """Rejects values that would load but make no sense."""
    for k in ("vocab_size", "context", "width", "layers", "heads", "kv_heads", "head_dim", "ffn"):
        if type(fields[k]) is not int or not 0 < fields[k] < 2**31:
            raise UserError(f"{k} {fields[k]!r} is not a positive number")
    check_positive("norm_eps", fields.get("norm_eps", 1e-5))
    for k in ("tie_word_embeddings", "use_parallel_residual", "attention_bias", "mlp_bias", "use_bias", "use_qkv_bias"):
        if raw.get(k) not in (None, True, False):
            raise UserError(f"{k} {raw[k]!r} is not true or false")
    for k in ("bos_token_id", "pad_token_id"):
        if type(raw.get(k)) not in (int, type(None)) or not 0 <= (raw.get(k) or 0) < 2**31:
            raise UserError(f"{k} {raw[k]!r} is not a token id (null is none)")
    if str(fields["activation"]) not in ACTIVATION_NAMES:
        raise UserError(f"activation {fields['activation']!r} is not one that nanorlhf computes: "
                        f"{', '.join(ACTIVATION_NAMES)}")
    if fields["heads"] % fields["kv_heads"]:
        raise UserError(f"{fields['heads']} heads, {fields['kv_heads']} key-value heads: the second must divide the first")


def check_positive(name, value):
    if type(value) not in (int, float) or not 0 < value < 1e12:
        raise UserError(f"{name} {value!r} is not a positive number")


def read_constants(folder, raw):
    """Returns the mean and standard deviation of a reward model's rewards, which are kept in config.json."""
    mean, std = raw.get("reward_mean", 0.0), raw.get("reward_std", 1.0)
    if type(mean) not in (int, float) or not math.isfinite(mean):
        raise UserError(f"{folder}: reward_mean {mean!r} is not a number")
    check_positive(f"{folder}: reward_std", std)
    return float(mean), float(std)


def tensor_index(folder):
    """Returns {tensor name: (its file, its shape)} for a folder's model.safetensors, or for the shards in its index."""
    folder = local_folder(folder)
    files = [folder / "model.safetensors"]
    if (index := folder / "model.safetensors.index.json").exists() and not files[0].exists():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
            outside = [n for n in names if Path(n).name != n or not n.endswith(".safetensors")]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: not an index of tensors ({type(error).__name__}: {error})")
        if outside:
            raise UserError(f"{index}: {outside[0]!r} is not a safetensors file of this folder")
        files = [folder / n for n in names]
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                for name in f.keys():
                    if name in tensors:
                        raise UserError(f"{file}: {name} is in {tensors[name][0].name} too")
                    tensors[name] = file, list(f.get_slice(name).get_shape())
        except FileNotFoundError:
            pickled = [p.name for p in folder.glob("pytorch_model*.bin")]
            raise UserError(f"{file} is missing" + (
                f"; {pickled[0]} is a pickle, which could run any code, and is not read: "
                f"convert it (transformers' save_pretrained writes safetensors)" if pickled else ""))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged: {error}")
    return tensors


def qkv_order(config):
    """Returns the file's row for each of our rows of stacked queries, keys and values [3 * H * E]; None if they agree."""
    order, (H, E, R) = FAMILIES[config.family].order, (config.heads, config.head_dim, config.rotary_dim or config.head_dim)
    rows = torch.arange(3 * H * E) if order else None
    if order == "heads":                          # GPT-NeoX stores query, key and value of each head together
        return rows.view(H, 3, E).transpose(0, 1).flatten()
    if order == "pairs":                          # GPT-J rotates dimensions (2i, 2i+1), we (i, i + R/2): same products
        halves = torch.cat([torch.arange(0, R, 2), torch.arange(1, R, 2), torch.arange(R, E)])
        rows = rows.view(3, H, E)
        return torch.cat([rows[:2, :, halves], rows[2:]]).flatten()
    return rows


def tensor_layout(model, head, prefix):
    """Yields (their name, their shape, our name, our rows, transposed) for each tensor of the family's files. `head` is
    their name of the output or scalar head; `prefix` starts the names of the trunk's tensors."""
    config, family, order = model.config, FAMILIES[model.config.family], qkv_order(model.config)
    for name, parameter in model.named_parameters():
        module, leaf = name.removeprefix("trunk.").rsplit(".", 1)
        if module == "head" and not name.startswith("trunk."):
            yield f"{head}.{leaf}", list(parameter.shape), name, slice(None), False
            continue
        block = ""
        if module.startswith("blocks."):
            _, number, module = module.split(".", 2)
            block = f"{family.block}.{number}."
        rows, parts = torch.arange(len(parameter)), family.names[module]
        if module == "attn.qkv":
            rows = rows if order is None else order.argsort()
            kv = config.kv_heads * config.head_dim
            split = rows.split([len(rows) - 2 * kv, kv, kv] if len(parts) == 3 else [len(rows)])
        else:
            split = rows.chunk(len(parts))
        transposed = family.transposed and module.startswith(("attn", "mlp")) and leaf == "weight"
        for part, part_rows in zip(parts, split):
            shape = [len(part_rows), *parameter.shape[1:]]
            if transposed:
                shape.reverse()
            start, stop = int(part_rows[0]), int(part_rows[-1]) + 1
            if torch.equal(part_rows, torch.arange(start, stop)):
                part_rows = slice(start, stop)                                         # neighbouring rows: a view, no copy
            yield f"{prefix}{block}{part}.{leaf}", shape, name, part_rows, transposed


def load_weights(model, folder, head):
    """Fills a model built on the meta device from a folder, one file and one tensor at a time, through a memory map. head:
    `causal`, `score` (a reward model's) or None (only the trunk). With --shard only the first rank's model is filled."""
    config, family, index = model.config, FAMILIES[model.config.family], tensor_index(folder)
    # Some files on the hub lack the prefix (GPT-2's `wte.weight`) or a part of it (OPT's `decoder.embed_tokens.weight`).
    # From version 5.24 on, transformers calls every family's head lm_head.
    prefixes = (family.prefix, family.prefix.removeprefix("model."))
    prefix = next((p for p in prefixes if p and any(n.startswith(p) for n in index)), "")
    head_names = {"score": "score", "causal": family.head if f"{family.head}.weight" in index else "lm_head", None: ""}
    places = {theirs: place for theirs, *place in tensor_layout(model, head_names[head], prefix)}
    unused = {f"{h}.{leaf}" for h in ("lm_head", family.head) for leaf in ("weight", "bias") if head is None or config.tied}
    extra = sorted(n for n in index.keys() - places.keys() - unused if not n.endswith(STALE))
    if "score.weight" in extra:
        raise UserError(f"{folder} is a reward model, not a language model")
    wrong = {"missing": sorted(places.keys() - index.keys()), "not expected": extra,
             "misshaped": [f"{n} has shape {index[n][1]}, config.json asks for {shape}" for n, (shape, *_) in places.items()
                           if n in index and index[n][1] != shape]}
    if any(wrong.values()):
        parts = [f"{what} {', '.join(names[:5])}{' ...' if len(names) > 5 else ''} ({len(names)})"
                 for what, names in wrong.items() if names]
        raise UserError(f"{folder}: tensors do not fit its config.json: {'; '.join(parts)}")
    if not ranks.reads_weights():
        return
    model.to_empty(device="cpu")
    parameters = dict(model.named_parameters())
    for file in sorted({index[n][0] for n in places}):
        with safe_open(file, framework="pt") as f, torch.no_grad():
            for n, (_, ours, rows, transposed) in places.items():
                if index[n][0] == file:
                    tensor = f.get_tensor(n)
                    if not tensor.is_floating_point():
                        raise UserError(f"{folder}: {n} holds {tensor.dtype}: quantized weights are not supported")
                    tensor = tensor.float()
                    check_finite({n: tensor}, file)
                    parameters[ours][rows] = tensor.T if transposed else tensor
    if head == "causal" and config.tied:
        check_tied(folder, index, prefix + family.names["embed"][0] + ".weight", unused)
    getattr(model, "trunk", model).make_rope()


def check_finite(tensors, what):
    """Raises UserError that names the first of these tensors, {name: tensor}, that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not tensor.numel():                    # a rank's part of a small tensor
            continue
        low, high = torch.aminmax(tensor.detach())                                     # both pass NaN on; no copy is made
        if not (math.isfinite(low) and math.isfinite(high)):
            raise NotFinite(f"{what}: {name} holds NaN or infinity")


def write_tensors(tensors, file, metadata=None):
    """Calls safetensors' save_file. What the disk refuses, because it is full for instance, is an OSError, as it is elsewhere."""
    try:
        save_file(tensors, file, metadata)
    except SafetensorError as error:
        found = re.search(r"(?:os error|code:) (\d+)", str(error))                    # new and old versions of safetensors
        code = int(found[1]) if found else errno.EIO
        raise OSError(code, os.strerror(code) if found else one_line(error), str(file)) from None


def check_tied(folder, index, embed, heads):
    """Checks that a head stored next to a tied model's embedding equals it. If not, one of the two files is wrong."""
    for head in heads & index.keys():
        with safe_open(index[head][0], framework="pt") as f, safe_open(index[embed][0], framework="pt") as g:
            if not torch.equal(f.get_tensor(head), g.get_tensor(embed)):
                raise UserError(f"{folder}: tie_word_embeddings makes the head the embedding, but {head} is another matrix")


def save_weights(model, folder, classifier=False, extra=None):
    """Writes model.safetensors and config.json. UserError, and nothing is written, if a weight is NaN or infinite. All ranks must
    call it, and the first writes."""
    config, family, tensors = model.config, FAMILIES[model.config.family], {}
    parameters = ranks.whole_on_first(dict(ranks.shard_again(model).named_parameters()))
    if ranks.mine() > 0:
        return
    for theirs, _, ours, rows, transposed in tensor_layout(model, "score" if classifier else family.head, family.prefix):
        part = parameters[ours].detach()[rows].cpu()
        tensors[theirs] = (part.T if transposed else part).contiguous()
    folder = Path(folder)
    check_finite(tensors | {k: torch.tensor(v) for k, v in (extra or {}).items() if isinstance(v, float)}, folder)
    with atomic_write(folder / "model.safetensors") as temporary:
        write_tensors(tensors, temporary, {"format": "pt"})
    if (index := folder / "model.safetensors.index.json").exists():                    # an older checkpoint's shards, which
        index.unlink()                                                                 # some readers would prefer
        for shard in folder.glob("model-*-of-*.safetensors"):
            shard.unlink()
    write_json(folder / "config.json", dict(
        model_type=config.family, architectures=[family.classifier if classifier else family.causal],
        vocab_size=config.vocab_size, tie_word_embeddings=config.tied, bos_token_id=config.bos_id,
        eos_token_id=list(config.end_ids) if len(config.end_ids) > 1 else config.eos_id, pad_token_id=config.pad_id,
        torch_dtype="float32", initializer_range=config.init_std, **family.constant,
        **written_fields(config, family), **(extra or {})))


def written_fields(config, family):
    """Returns the family's keys of config.json in transformers 4's spelling."""
    fields = {key: getattr(config, ours) for ours, key in family.keys.items()}
    activation = next(k for k, v in ACTIVATION_NAMES.items() if v == config.activation)
    fields |= {family.keys["activation"]: activation}
    if config.family == "gptj":
        fields["rotary_dim"] = config.rotary_dim or config.head_dim
    elif config.positions == "rotary":
        fields["rope_scaling"] = {"rope_type": "llama3", **config.rope_scaling} if config.rope_scaling else None
        if config.family in PARTIAL_ROTARY:
            share = (config.rotary_dim or config.head_dim) / config.head_dim
            if int(config.head_dim * share) < config.rotary_dim:                       # rounded down: 49 * (2 / 49) < 2
                share = math.nextafter(share, 1)
            fields["rotary_pct" if config.family == "gpt_neox" else "partial_rotary_factor"] = share
        fields["rotary_emb_base" if config.family == "gpt_neox" else "rope_theta"] = config.rope_theta
        if config.family in ("gpt_neox", "stablelm"):
            fields["use_parallel_residual"] = config.residual != "sequential"
    return fields
