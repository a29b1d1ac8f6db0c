"""What several test files share: the scripts, found automatically, and small fixtures."""

import dataclasses
import importlib
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
# Every script at the top level, so a copy with another loss is tested as soon as it is written.
SCRIPTS = {p.stem: importlib.import_module(p.stem) for p in sorted([*ROOT.glob("train_*.py"), *ROOT.glob("sample_*.py")])}
TRAINERS = {name: module for name, module in SCRIPTS.items() if hasattr(module, "train")}


def entry_of(module):
    """Returns the function that the script calls with its Config."""
    return module.train if hasattr(module, "train") else module.sample


def loss_of(module):
    """Returns the name of the script's loss: its own function that ends in _loss."""
    (name,) = [n for n, f in vars(module).items() if n.endswith("_loss") and f.__module__ == module.__name__]
    return name


def known_options(module, options):
    """Returns those options that the script's Config has."""
    fields = {f.name for f in dataclasses.fields(module.Config)}
    return {k: v for k, v in options.items() if k in fields}


def shard(folder):
    """Splits model.safetensors in two, with an index; returns the names of the parts."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file({k: v for k, v in tensors.items() if where[k] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return sorted(set(where.values()))


@pytest.fixture(scope="session")
def tiny():
    """A small tokenizer, trained here, so it needs no files."""
    from nanorlhf.tokenizer import train_bpe
    words = "the cat sat on the mat and the dog sat too ; isn't it 12 34 nice , we've seen it all".split()
    rng = random.Random(0)
    return train_bpe([" ".join(rng.choices(words, k=200)) for _ in range(20)], 320)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny policy that has learned nothing, with the built-in task's tokenizer."""
    from nanorlhf.model import ModelConfig, Transformer
    from nanorlhf.tokenizer import load_tokenizer
    folder, tokenizer = tmp_path_factory.mktemp("base"), load_tokenizer("reviews")
    Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, context=96, width=16, layers=1, heads=2, kv_heads=2, head_dim=8,
                            ffn=32, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)).save_pretrained(folder)
    tokenizer.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def one_thread():
    """Limits torch to one thread: bits must not depend on how many cores are free, and tiny matrices run faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
