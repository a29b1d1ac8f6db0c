"""Tests of checkpoints whose configuration lists several EOS ids, as chat models do: any of them ends a response."""

import json
from pathlib import Path

import pytest
import torch

import sample_bon
import train_ppo
import train_rrhf
from nanorlhf.data import encode_prompt, encode_response, make_example
from nanorlhf.evaluate import Options, evaluate_policies
from nanorlhf.files import read_jsonl
from nanorlhf.generate import beam_search, generate
from nanorlhf.model import ModelConfig, Transformer
from nanorlhf.tokenizer import load_tokenizer

ADDED = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TEMPLATE = ("{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + "
            "'<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
            "{% endif %}")


def chat_checkpoint(folder, says="<|eot_id|>", ends=("<|endoftext|>", "<|eot_id|>"), template=TEMPLATE):
    """Writes a checkpoint as Llama 3 Instruct's: the tokenizer's EOS is <|endoftext|>, generation_config.json lists two ends, and
    the template ends turns with the other one. The model says the token `says` and nothing else. Returns (folder, tokenizer)."""
    load_tokenizer("reviews").save(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    first = max(t["id"] for t in spec["added_tokens"]) + 1
    spec["added_tokens"] += [dict(spec["added_tokens"][0], id=first + k, content=t) for k, t in enumerate(ADDED)]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    special = load_tokenizer(folder).special
    model = Transformer(ModelConfig(vocab_size=first + len(ADDED), context=96, width=8, layers=1, heads=2, kv_heads=2, head_dim=4,
                                    ffn=16, eos_id=special["<|endoftext|>"]))
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias[0] = 1.0                                            # the last hidden state, whatever the input
        model.embed.weight[:, 0] = 0.0
        model.embed.weight[special[says], 0] = 100.0
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [special[t] for t in ends]}))
    return folder, load_tokenizer(folder)


def test_any_eos_of_the_configuration_ends_a_response(tmp_path):
    for says in ("<|eot_id|>", "<|endoftext|>"):
        folder, tokenizer = chat_checkpoint(tmp_path / says[2:5], says)
        model, prompt = Transformer.from_pretrained(folder), encode_prompt(tokenizer, "\n\nHuman: Hi\n\nAssistant:")
        for out in (generate(model, [prompt], 5, tokenizer=tokenizer), generate(model, [prompt], 5)):
            assert out.responses() == [[tokenizer.special[says]]] and out.finished.all()
        for groups in (1, 2):
            (found,) = beam_search(model, [prompt], 3, num_beams=2, num_groups=groups, tokenizer=tokenizer)
            assert [tokenizer.special[says]] in found
    folder, tokenizer = chat_checkpoint(tmp_path / "one", ends=["<|endoftext|>"])      # not listed: it does not end
    out = generate(Transformer.from_pretrained(folder), [prompt], 5, tokenizer=tokenizer)
    assert out.responses() == [[tokenizer.special["<|eot_id|>"]] * 5] and not out.finished.any()


def test_a_stop_string_matches_a_special_token(tmp_path):
    folder, tokenizer = chat_checkpoint(tmp_path, ends=["<|endoftext|>"])
    for stop, length in (("<|eot_id|>", 1), ("id|><|eot", 2), ("<|eos_id|>", 5)):
        out = generate(Transformer.from_pretrained(folder), [[1, 2]], 5, stop=[stop], tokenizer=tokenizer)
        assert len(out.responses()[0]) == length and bool(out.finished) == (length < 5)


def test_scripts_and_evaluation_know_every_end_and_keep_them_in_what_they_save(tmp_path):
    folder, tokenizer = chat_checkpoint(tmp_path / "init")
    both = [tokenizer.special[t] for t in ("<|endoftext|>", "<|eot_id|>")]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "\n\nHuman: Hi\n\nAssistant:", "completion": " Yes."}) + "\n")
    (tmp_path / "reward.py").write_text("def one(prompts, completions, **columns):\n    return [1.0 for _ in completions]\n")
    shared = dict(init=str(folder), data=str(tmp_path / "prompts.jsonl"), reward=f"{tmp_path}/reward.py:one", response_length=5,
                  device="cpu")
    train_ppo.train(train_ppo.Config(**shared, max_steps=1, eval_prompts=shared["data"], eval_every=1, out=str(tmp_path / "ppo")))
    (row,) = read_jsonl(tmp_path / "ppo" / "metrics.jsonl")
    assert row["objective/ended"] == row["eval/ended"] == row["objective/scores"] == row["objective/length"] == 1.0
    assert json.loads((tmp_path / "ppo" / "config.json").read_text())["eos_token_id"] == both
    assert list(load_tokenizer(tmp_path / "ppo").end_ids) == list(Transformer.from_pretrained(tmp_path / "ppo").config.end_ids) == both
    train_rrhf.train(train_rrhf.Config(**shared, max_steps=1, num_samples=2, eval_every=0, out=str(tmp_path / "rrhf")))
    (candidates,) = read_jsonl(tmp_path / "rrhf" / "candidates-000000.jsonl")
    assert candidates["responses"][:2] == [both[1:], both[1:]]
    sample_bon.sample(sample_bon.Config(**shared, n=2, keep_unfinished=False, out=str(tmp_path / "bon")))
    policies = {"ppo": str(tmp_path / "ppo")}
    rows, _ = evaluate_policies(policies, Options(reference=str(folder), reward=shared["reward"], data=f"x={shared['data']}",
                                                  response_length=5, num_samples=2, device="cpu", out=str(tmp_path / "e")))
    assert rows[1]["ended"][0] == 1.0 and rows[1]["length"][0] == 1.0


def test_training_appends_the_templates_end_or_the_tokenizers_and_never_both(tmp_path):
    _, tokenizer = chat_checkpoint(tmp_path / "a")
    eot, eos = tokenizer.special["<|eot_id|>"], tokenizer.eos_id
    chat = encode_response(tokenizer, " Yes.", "\n\nHuman: Hi\n\nAssistant:")
    assert chat == tokenizer.encode("Yes.") + [eot]
    assert encode_response(tokenizer, " Yes.", "Review:") == tokenizer.encode(" Yes.") + [eos]           # no conversation
    _, tokenizer = chat_checkpoint(tmp_path / "b", ends=["<|endoftext|>"])             # <|eot_id|> ends a turn, not a response
    chat = encode_response(tokenizer, " Yes.", "\n\nHuman: Hi\n\nAssistant:")
    assert chat == tokenizer.encode("Yes.") + [eot, eos]
    two = "\n\nHuman: Hi\n\nAssistant: Yes.\n\nHuman: Why?\n\nAssistant:"
    assert make_example(tokenizer, two, " So.").tokens.count(eos) == 1


def test_a_pad_that_is_chosen_ends_no_response(tmp_path):
    folder, tokenizer = chat_checkpoint(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] in ("<|endoftext|>", "<|eot_id|>")]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(folder)                                                 # no other special token is left
    assert len(tokenizer.end_ids) == 2 and tokenizer.pad_id not in tokenizer.special.values()


def test_a_disagreement_of_tokenizer_and_configuration_is_one_line(tmp_path, capsys):
    folder, tokenizer = chat_checkpoint(tmp_path)
    assert "EOS" not in capsys.readouterr().err                                        # they agree on one of the two
    config = json.loads((folder / "config.json").read_text())
    (folder / "generation_config.json").unlink()
    eot, word = tokenizer.special["<|eot_id|>"], 7
    (folder / "config.json").write_text(json.dumps(dict(config, eos_token_id=[eot, word])))
    tokenizer = load_tokenizer(folder)
    load_tokenizer(folder)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"EOS is id {tokenizer.eos_id}" in line and f"{eot}, {word}" in line and str(folder) in line
    assert tokenizer.end_ids == (tokenizer.eos_id, eot)                                # an ordinary word ends nothing


@pytest.mark.parametrize("value", ["2", [2, "x"], -1, {"a": 1}, [2.5], True])
def test_an_eos_that_is_no_id_is_refused(tmp_path, value):
    folder, _ = chat_checkpoint(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    for load in (Transformer.from_pretrained, load_tokenizer):
        with pytest.raises(ValueError, match="generation_config.json: eos_token_id .* is not a token id"):
            load(Path(folder))
