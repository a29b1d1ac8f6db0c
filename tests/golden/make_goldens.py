"""Logits of tiny models computed by transformers: `python tests/golden/make_goldens.py` rewrites model.json beside it.

The weights come from a seeded numpy generator (weights_of), so only names, shapes and logits are committed, and the parity
of the model file is tested where transformers is not installed.
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
CASES = {  # config.json as it stands on disk
    "gpt2": GPT2,
    "gpt2 other inner width, exact gelu, eps": {**GPT2, "n_inner": 56, "activation_function": "gelu", "layer_norm_epsilon": 1e-3},
    "gpt2 untied": {**GPT2, "tie_word_embeddings": False},
    "llama grouped queries": LLAMA,
    "llama tied, biases, own head width": {**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
                                           "head_dim": 10, "num_key_value_heads": 4},
    "llama3 scaling, spelt as transformers 4": {**LLAMA, "head_dim": 8, "rope_theta": 10000.0, "torch_dtype": "float32",
                                                "rope_scaling": {"rope_type": "llama3", **SCALING}},
    "llama3 scaling, spelt as transformers 5": {**{k: v for k, v in LLAMA.items() if k != "rope_theta"}, "head_dim": 8, "dtype":
                                                "float32", "rope_parameters": {"rope_type": "llama3", "rope_theta": 300.0, **SCALING}},
}


def weights_of(shapes, seed=0):
    """{name: float32 array} for {name: shape}: norm scales near 1, everything else around 0."""
    random, out = np.random.default_rng(seed), {}
    for name in sorted(shapes):
        scale = name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight", "norm.weight"))
        out[name] = (scale + 0.2 * random.standard_normal(shapes[name])).astype(np.float32)
    return out


def main():
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM
    goldens = {}
    for name, config in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(config))
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
            tied = config.get("tie_word_embeddings", True)
            shapes = {k: list(v.shape) for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
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
