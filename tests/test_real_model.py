"""Two steps of each script on a published model of 135 million parameters: the folder that results/smollm2/prepare.py makes, named
by the variable NANORLHF_SMOLLM2. About a minute per script on two CPU cores."""

import json
import os
from pathlib import Path

import pytest

from conftest import SCRIPTS, entry_of, known_options
from nanorlhf.data import load_records, make_example
from nanorlhf.generate import generate
from nanorlhf.model import Transformer
from nanorlhf.tokenizer import load_tokenizer

FOLDER = Path(os.environ.get("NANORLHF_SMOLLM2", "none"))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not (FOLDER / "config.json").exists(), reason="NANORLHF_SMOLLM2 names no folder made by results/smollm2/prepare.py")]


def test_it_answers():
    tokenizer, model = load_tokenizer(FOLDER), Transformer.from_pretrained(FOLDER)
    example = make_example(tokenizer, "\n\nHuman: What is the capital of France?\n\nAssistant:", " ?")
    found = generate(model, [example.tokens[:example.prompt_length]], 12, temperature=0, tokenizer=tokenizer)
    assert tokenizer.decode(found.responses()[0], start=False) == "The capital of France is Paris." and found.finished.all()


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    return two_steps("train_rm", tmp_path_factory.mktemp("rm"), "")


def two_steps(name, folder, reward):
    module, file = SCRIPTS[name], folder / "rows.jsonl"
    file.write_text("".join(json.dumps(dict(prompt=[dict(role="user", content=f"Say {i}.")], chosen=f"It is {i}.", rejected="No."))
                            + "\n" for i in range(12)))
    options = known_options(module, dict(init=str(FOLDER), data=str(file), reward=reward, max_steps=2, batch_size=2, limit=4, n=2,
                                         num_samples=2, response_length=6, eval_every=0, save_every=0, eval_fraction=0.4,
                                         frozen_layers=0.8, keep_unfinished=True, device="cpu", out=str(folder / "out")))
    entry_of(module)(module.Config(**options))
    assert json.loads((folder / "out/run.json").read_text())["finished"]
    return str(folder / "out")


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_steps_of_each_script(name, reward_model, tmp_path):
    out = Path(two_steps(name, tmp_path, reward_model))
    if name == "sample_bon":
        rows = load_records(out / "ranked.jsonl", "ranked")
        assert len(rows) == 4 and all(len(r["responses"]) == 2 for r in rows)
        return
    before, after = (dict(Transformer.from_pretrained(f).named_parameters()) for f in (FOLDER, out)) if name != "train_rm" else ({}, {})
    assert all((before[k] == after[k]).all() == k.startswith(("embed", *(f"blocks.{i}." for i in range(24)))) for k in before)
