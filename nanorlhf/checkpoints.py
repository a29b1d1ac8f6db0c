"""Checkpoint folders in and out: what each family of models calls its options and its tensors. model.py is the only user.

Reading is strict: a missing, extra or misshaped tensor, and an option whose mathematics we do not compute, is named. A family
is one entry of FAMILIES; transformers 4's and 5's spellings are read, 4's is written, which both load.
"""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanorlhf.run import UserError, write_json, written_whole

ACTIVATION_NAMES = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu",
                    "silu": "silu", "swish": "silu"}


def read_gpt2(j):
    D, H = j["n_embd"], j["n_head"]
    return dict(context=j["n_positions"], width=D, layers=j["n_layer"], heads=H, kv_heads=H, head_dim=D // H,
                ffn=j.get("n_inner") or 4 * D, norm_eps=j.get("layer_norm_epsilon", 1e-5),
                activation=j.get("activation_function", "gelu_new"), tied=j.get("tie_word_embeddings", True))


def write_gpt2(c):
    return dict(n_positions=c.context, n_embd=c.width, n_layer=c.layers, n_head=c.heads, n_inner=c.ffn,
                layer_norm_epsilon=c.norm_eps, activation_function=c.activation, resid_pdrop=0.0, embd_pdrop=0.0,
                attn_pdrop=0.0)


def read_llama(j):
    rope = j.get("rope_parameters") or {**(j.get("rope_scaling") or {}), "rope_theta": j.get("rope_theta", 10000.0)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"rope type {kind!r} is not one that nanorlhf computes: default, llama3")
    D, H = j["hidden_size"], j["num_attention_heads"]
    return dict(context=j["max_position_embeddings"], width=D, layers=j["num_hidden_layers"], heads=H,
                kv_heads=j.get("num_key_value_heads") or H, head_dim=j.get("head_dim") or D // H, ffn=j["intermediate_size"],
                norm="rmsnorm", norm_eps=j.get("rms_norm_eps", 1e-6), positions="rotary", rope_theta=rope["rope_theta"],
                rope_scaling={k: rope[k] for k in LLAMA3_ROPE} if kind == "llama3" else None,
                activation=j.get("hidden_act", "silu"), gated=True, qkv_bias=j.get("attention_bias", False),
                out_bias=j.get("attention_bias", False), mlp_bias=j.get("mlp_bias", False),
                tied=j.get("tie_word_embeddings", False))


LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def write_llama(c):
    return dict(max_position_embeddings=c.context, hidden_size=c.width, num_hidden_layers=c.layers,
                num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim, intermediate_size=c.ffn,
                rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, hidden_act=c.activation,
                rope_scaling={"rope_type": "llama3", **c.rope_scaling} if c.rope_scaling else None,
                attention_bias=c.qkv_bias, mlp_bias=c.mlp_bias)


# A family: how config.json is read and written, and what its files call our modules. Several names are the parts of one of
# our matrices, stacked; `transposed` marks GPT-2's Conv1D, which stores [in, out]; `only` are options with one value we compute.
FAMILIES = {
    "gpt2": dict(
        causal="GPT2LMHeadModel", classifier="GPT2ForSequenceClassification", read=read_gpt2, write=write_gpt2,
        transposed=True, prefix="transformer.",
        only=dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False),
        names={"embed": ["wte"], "positions": ["wpe"], "norm": ["ln_f"], "norm1": ["ln_1"], "norm2": ["ln_2"],
               "attn.qkv": ["attn.c_attn"], "attn.out": ["attn.c_proj"], "mlp.up": ["mlp.c_fc"], "mlp.down": ["mlp.c_proj"]},
        block="h"),
    "llama": dict(
        causal="LlamaForCausalLM", classifier="LlamaForSequenceClassification", read=read_llama, write=write_llama,
        transposed=False, prefix="model.", only={},
        names={"embed": ["embed_tokens"], "norm": ["norm"], "norm1": ["input_layernorm"], "norm2": ["post_attention_layernorm"],
               "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "attn.out": ["self_attn.o_proj"],
               "mlp.up": ["mlp.gate_proj", "mlp.up_proj"], "mlp.down": ["mlp.down_proj"]},
        block="layers"),
}
STALE = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")                    # buffers that old files carry


def read_config(folder):
    """config.json -> (fields of a ModelConfig, the raw dictionary)."""
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is no checkpoint folder: it has no config.json")
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}")
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{path}: model_type {kind!r} is not one that nanorlhf reads: {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    if wrong := [f"{k} {raw[k]!r}" for k, only in family["only"].items() if raw.get(k) not in (only, None)]:
        raise UserError(f"{path}: {wrong[0]} is not supported")
    try:
        fields = family["read"](raw)
        fields["vocab_size"] = raw["vocab_size"]
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing")
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: a value is of the wrong kind: {error}")
    if str(fields["activation"]) not in ACTIVATION_NAMES:
        raise UserError(f"{path}: activation {fields['activation']!r} is not one that nanorlhf computes: "
                        f"{', '.join(ACTIVATION_NAMES)}")
    fields["activation"] = ACTIVATION_NAMES[fields["activation"]]
    eos = raw.get("eos_token_id")
    sizes = ("vocab_size", "context", "width", "layers", "heads", "kv_heads", "head_dim", "ffn")
    if wrong := [f"{k} {fields[k]!r}" for k in sizes if type(fields[k]) is not int or fields[k] < 1]:
        raise UserError(f"{path}: {wrong[0]} is not a positive number")
    heads, kv_heads, head_dim = fields["heads"], fields["kv_heads"], fields["head_dim"]
    if heads % kv_heads or head_dim % 2 and fields.get("positions") == "rotary":
        raise UserError(f"{path}: {heads} heads, {kv_heads} key-value heads and head width {head_dim} do not make an "
                        f"attention layer")
    return dict(fields, family=kind, bos_id=raw.get("bos_token_id"), pad_id=raw.get("pad_token_id"),
                eos_id=eos[0] if isinstance(eos, list) else eos), raw


def tensor_index(folder):
    """Name of each tensor of a folder -> the file that holds it: model.safetensors, or the shards of its index."""
    folder = Path(folder)
    files = [folder / "model.safetensors"]
    if (index := folder / "model.safetensors.index.json").exists() and not files[0].exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            outside = [n for n in names if Path(n).name != n or not n.endswith(".safetensors")]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: not an index of tensors ({type(error).__name__}: {error})")
        if outside:
            raise UserError(f"{index}: {outside[0]!r} is not a safetensors file of this folder")
        files = [folder / n for n in names]
    found = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                for name in f.keys():
                    if name in found:
                        raise UserError(f"{file}: {name} is in {found[name].name} too")
                    found[name] = file
        except FileNotFoundError:
            raise UserError(f"{file} is missing")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged: {error}")
    return found


def their_names(config, name, head_name, prefix):
    """Names in the family's files for one of our parameters, and whether it is stored transposed there."""
    if name == "head.weight":
        return [head_name], False
    family = FAMILIES[config.family]
    module, leaf = name.removeprefix("trunk.").rsplit(".", 1)
    block = ""
    if module.startswith("blocks."):
        _, number, module = module.split(".", 2)
        block = f"{family['block']}.{number}."
    names = [f"{prefix}{block}{part}.{leaf}" for part in family["names"][module]]
    return names, family["transposed"] and module.startswith(("attn", "mlp")) and leaf == "weight"


def part_sizes(config, name, rows, parts):
    """Rows of each stored part of one of our stacked matrices."""
    if parts == 3:
        kv = config.kv_heads * config.head_dim
        return [rows - 2 * kv, kv, kv]
    return [rows // parts] * parts


def load_weights(model, folder, head_name):
    """Fills a model built on the meta device from a folder. One tensor is read at a time, from a memory map."""
    config, index = model.config, tensor_index(folder)
    prefix = FAMILIES[config.family]["prefix"]
    if not any(n.startswith(prefix) for n in index):                                   # the hub's gpt2 files
        prefix = ""
    wanted = {name: their_names(config, name, head_name, prefix) for name, _ in model.named_parameters()}
    known = {n for names, _ in wanted.values() for n in names}
    missing = sorted(known - index.keys())
    ignored = {"lm_head.weight"} if head_name is None or config.tied else set()
    extra = sorted(n for n in index.keys() - known - ignored if not n.endswith(STALE))
    if "score.weight" in extra:
        raise UserError(f"{folder} is a reward model, not a language model")
    if missing or extra:
        parts = [f"{what} {', '.join(names[:5])}{' ...' if len(names) > 5 else ''} ({len(names)})"
                 for what, names in (("missing", missing), ("not expected", extra)) if names]
        raise UserError(f"{folder}: tensors do not fit its config.json: {'; '.join(parts)}")
    handles = {file: safe_open(file, framework="pt") for file in set(index.values())}
    state = {}
    for name, parameter in model.named_parameters():
        names, transposed = wanted[name]
        sizes = part_sizes(config, name, parameter.shape[0], len(names))
        tensors = []
        for n, size in zip(names, sizes):
            tensor = handles[index[n]].get_tensor(n)
            shape = [size, *parameter.shape[1:]][::-1 if transposed else 1]
            if list(tensor.shape) != shape:
                raise UserError(f"{folder}: {n} has shape {list(tensor.shape)}, config.json asks for {shape}")
            tensors.append((tensor.T if transposed else tensor).float())
        state[name] = (torch.cat(tensors) if len(tensors) > 1 else tensors[0]).contiguous()
    model.load_state_dict(state, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    getattr(model, "trunk", model).make_rope()


def save_weights(model, folder, head_name, architecture, extra):
    """Writes model.safetensors and config.json; architecture is a key of the family, `causal` or `classifier`."""
    config = model.config
    family = FAMILIES[config.family]
    tensors = {}
    for name, parameter in model.named_parameters():
        names, transposed = their_names(config, name, head_name, family["prefix"])
        parts = parameter.detach().cpu().split(part_sizes(config, name, parameter.shape[0], len(names)))
        tensors.update({n: (p.T if transposed else p).contiguous() for n, p in zip(names, parts)})
    folder = Path(folder)
    with written_whole(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    fields = family["write"](dataclasses.replace(
        config, activation=next(k for k, v in ACTIVATION_NAMES.items() if v == config.activation)))
    write_json(folder / "config.json", dict(
        model_type=config.family, architectures=[family[architecture]], vocab_size=config.vocab_size,
        tie_word_embeddings=config.tied, bos_token_id=config.bos_id, eos_token_id=config.eos_id, pad_token_id=config.pad_id,
        torch_dtype="float32", initializer_range=config.init_std, **fields, **extra))
