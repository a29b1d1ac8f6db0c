"""Computes logits of tiny models with transformers: `python tests/golden/make_goldens.py` rewrites model.json beside it.

The weights come from a seeded numpy generator (weights_of), so only names, shapes and logits are committed, and parity with
transformers is tested even if it is not installed.
"""

import json
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
TOKENS = [[3, 17, 42, 5, 5, 29, 11, 0, 36, 8, 21, 47], [40, 2, 2, 9, 33, 1, 18, 25, 7, 44, 13, 30]]
GPT2 = dict(model_type="gpt2", vocab_size=48, n_positions=16, n_embd=24, n_layer=2, n_head=3, bos_token_id=0, eos_token_id=0)
LLAMA = dict(model_type="llama", vocab_size=48, max_position_embeddings=16, hidden_size=24, intermediate_size=40,
             num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=500.0,
             tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
SCALING = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
GPTJ = dict(model_type="gptj", vocab_size=48, n_positions=16, n_embd=36, n_layer=2, n_head=3, rotary_dim=8, bos_token_id=0,
            eos_token_id=0, tie_word_embeddings=False)
NEOX = dict(model_type="gpt_neox", vocab_size=48, max_position_embeddings=16, hidden_size=36, intermediate_size=52,
            num_hidden_layers=2, num_attention_heads=3, rotary_pct=0.34, rotary_emb_base=300, bos_token_id=0, eos_token_id=0)
OPT = dict(model_type="opt", vocab_size=48, max_position_embeddings=16, hidden_size=24, word_embed_proj_dim=24, ffn_dim=40,
           num_hidden_layers=2, num_attention_heads=3, bos_token_id=2, eos_token_id=2, pad_token_id=1)
MISTRAL = {**LLAMA, "model_type": "mistral", "num_attention_heads": 6, "sliding_window": None}
QWEN2 = {**LLAMA, "model_type": "qwen2", "num_attention_heads": 6, "use_sliding_window": False, "max_window_layers": 1}
QWEN3 = {**LLAMA, "model_type": "qwen3", "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 6, "attention_bias": True}
PHI3 = {**LLAMA, "model_type": "phi3", "sliding_window": None, "original_max_position_embeddings": 16, "rope_scaling": None,
        "pad_token_id": None}
STARCODER2 = dict(model_type="starcoder2", vocab_size=48, max_position_embeddings=16, hidden_size=24, intermediate_size=40,
                  num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, norm_epsilon=1e-3, rope_theta=500.0,
                  sliding_window=12, norm_type="layer_norm", mlp_type="default", bos_token_id=0, eos_token_id=0)
STABLELM = dict(model_type="stablelm", vocab_size=48, max_position_embeddings=16, hidden_size=32, intermediate_size=40,
                num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, layer_norm_eps=1e-3, rope_theta=500.0)
V5_LLAMA = {k: v for k, v in LLAMA.items() if k != "rope_theta"} | {"dtype": "float32"}
V5_NEOX = {k: v for k, v in NEOX.items() if k not in ("rotary_pct", "rotary_emb_base")} | {"dtype": "float32"}
CASES = {  # name -> config.json
    "gpt2": GPT2,
    "gpt2 other inner width, exact gelu, eps": {**GPT2, "n_inner": 56, "activation_function": "gelu", "layer_norm_epsilon": 1e-3},
    "gpt2 untied": {**GPT2, "tie_word_embeddings": False},
    "gptj": GPTJ,
    "gptj whole head rotary, other inner width": {**GPTJ, "rotary_dim": 12, "n_inner": 40},
    "gpt_neox": NEOX,
    "gpt_neox sequential, tied, no attention biases, gelu_fast": {**NEOX, "use_parallel_residual": False, "attention_bias": False,
                                                                  "tie_word_embeddings": True, "hidden_act": "gelu_fast",
                                                                  "rotary_pct": 1.0},
    "gpt_neox spelt as transformers 5": {**V5_NEOX, "rope_parameters": {"rope_type": "default", "rope_theta": 200.0,
                                                                        "partial_rotary_factor": 0.5}},
    "gpt_neox by transformers 5 without a share": {**V5_NEOX, "hidden_size": 48, "rope_parameters": {"rope_type": "default", "rope_theta": 200.0}},
    "gptj with a base that is not read": {**GPTJ, "rope_theta": 77.0},
    "opt": OPT,
    "opt untied, gelu": {**OPT, "tie_word_embeddings": False, "activation_function": "gelu"},
    "llama grouped queries": LLAMA,
    "llama tied, biases, own head width": {**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
                                           "head_dim": 10, "num_key_value_heads": 4},
    "llama3 scaling, spelt as transformers 4": {**LLAMA, "head_dim": 8, "rope_theta": 10000.0, "torch_dtype": "float32",
                                                "rope_scaling": {"rope_type": "llama3", **SCALING}},
    "llama3 scaling, spelt as transformers 5": {**V5_LLAMA, "head_dim": 8, "rope_parameters": {"rope_type": "llama3",
                                                                                               "rope_theta": 300.0, **SCALING}},
    "llama base beside rope_parameters": {**LLAMA, "rope_parameters": {"rope_type": "default"}},
    "mistral": MISTRAL,
    "mistral with a window, own head width": {**MISTRAL, "sliding_window": 12, "head_dim": 10, "num_attention_heads": 4},
    "qwen2": QWEN2,
    "qwen2 tied, spelt as transformers 5": {**V5_LLAMA, "model_type": "qwen2", "tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "default", "rope_theta": 700.0}, "layer_types": ["full_attention"] * 2, "sliding_window": None},
    "qwen3": QWEN3,
    "qwen3 tied": {**QWEN3, "tie_word_embeddings": True, "attention_bias": False},
    "phi3": PHI3,
    "phi3 with a window, tied, partial rotary, own head width": {**PHI3, "sliding_window": 12, "tie_word_embeddings": True, "head_dim": 10,
                                                                 "partial_rotary_factor": 0.6},
    "starcoder2": STARCODER2,
    "starcoder2 untied, no biases, exact gelu": {**STARCODER2, "use_bias": False, "tie_word_embeddings": False, "hidden_act": "gelu"},
    "stablelm": STABLELM,
    "stablelm parallel, tied, biases, spelt as transformers 5": {
        **{k: v for k, v in STABLELM.items() if k != "rope_theta"}, "use_parallel_residual": True, "tie_word_embeddings": True,
        "use_qkv_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5}},
    "stablelm by transformers 5 without a share": {**STABLELM, "rope_parameters": {"rope_type": "default", "rope_theta": 200.0}},
}


def weights_of(shapes, seed=0):
    """Returns {name: float32 array} for {name: shape}: norm scales near 1, everything else around 0."""
    random, out = np.random.default_rng(seed), {}
    for name in sorted(shapes):
        scale = len(shapes[name]) == 1 and name.endswith("weight")
        out[name] = (scale + 0.2 * random.standard_normal(shapes[name])).astype(np.float32)
    return out


def main():
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM
    goldens = {}
    for name, config in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(config))
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
            model.save_pretrained(folder)             # for the tensor names in its files, not always the modules'
            shapes = {k: list(v.shape) for k, v in load_file(Path(folder, "model.safetensors")).items()}
            Path(folder, "config.json").write_text(json.dumps(config))
            save_file({k: torch.from_numpy(v) for k, v in weights_of(shapes).items()}, Path(folder, "model.safetensors"),
                      metadata={"format": "pt"})
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        with torch.no_grad():
            logits = model(torch.tensor(TOKENS)).logits[:, [0, 5, 11]]
        goldens[name] = dict(shapes=shapes, logits=[[[float(f"{x:.8g}") for x in t] for t in row] for row in logits.tolist()])
    text = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in goldens.items())
    (HERE / "model.json").write_text("{" + text + "}\n")


if __name__ == "__main__":
    main()
