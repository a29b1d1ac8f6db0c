"""Encodes texts with the `tokenizers` library and a small SentencePiece-style vocabulary, so that the check runs without the
library: `python tests/golden/make_tokenizer_goldens.py` rewrites tokenizer.json beside it.

The vocabulary is learnt here by byte-pair encoding over characters, with spaces written "▁". Every way to split a token is a
merge, as in converted LLaMA files. The variants are the ways in which such files say where a space goes.
"""

import collections
import json
from pathlib import Path

HERE = Path(__file__).parent
CORPUS = ("the cat sat on the mat and the other cat sat there ; is this the end of it or not ? there is nothing in this hat . "
          "naïve café, naïve idea: 12 345 , 2024 . 中文 中文字 日本語 привет мир привет 😀😀 aaaa aaaaaa ======== ==== '' '' ' '' "
          "singing and ringing the things , a thing is a thing")
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE]}
BACK = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def metaspace(**options):
    return {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", **options}}


VARIANTS = {  # changes to the spec; "added" adds non-special tokens, "normalized" is a flag of the special ones
    "llama": {},
    "llama 1": {"normalized": True},
    "plain added tokens": {"added": True},
    "metaspace first": metaspace(prepend_scheme="first", split=False),
    "metaspace first, added": {**metaspace(prepend_scheme="first", split=False), "added": True},
    "metaspace always": metaspace(prepend_scheme="always", split=True),
    "metaspace always, one piece, added": {**metaspace(prepend_scheme="always", split=False), "added": True},
    "metaspace never": metaspace(prepend_scheme="never", split=False),
    "metaspace of old": metaspace(add_prefix_space=True),
    "metaspace of old without prefix": metaspace(add_prefix_space=False, prepend_scheme="never"),
    "gemma": {"normalizer": REPLACE, "decoder": {"type": "Sequence", "decoders": BACK}, "pre_tokenizer": {
        "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}},
    "tokens across spaces": {"across": True},
}
TEXTS = ["", " ", "  ", "the cat", " the cat", "the  cat   sat ", "cat\nsat\n\n there,  the \n  ", "\tthe", "aaaaaaaaaaa",
         "=====", "= == ===", "naïve café", "nai\u0308ve", "中文字 中", "日", "привет, мир",
         "😀😀 👨\u200d👩\u200d👧", "▁the▁▁cat",
         "x\u00a0y\u2003z", "\0\x1b[0m", "\ufeffthe", "the</s>cat", "<s>the cat</s> the", "</s><s>", " <s> the ",
         "<unk>the<|x|> cat<|x|><|xy|>the", "the <|x|>", "<0x41><0x0A>", "'' ''''", "12 345,2024",
         "\u0bb5\u0ba3\u0b95\u0bcd", "🇩🇪\U000e0041", "singing,thing , a thing is, the"]


def learnt_spec():
    """Returns the tokenizer.json, with everything as in LLaMA's."""
    words = [("▁" + w) for w in CORPUS.split(" ")]
    counts = collections.Counter(map(tuple, map(list, words)))
    tokens = ["▁▁", "▁▁▁▁"]
    while any(len(word) > 1 for word in counts):
        pairs = collections.Counter()
        for word, n in counts.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        tokens.append(left + right)
        merged = collections.Counter()
        for word, n in counts.items():
            parts, k = [], 0
            while k < len(word):
                both = word[k:k + 2] == (left, right)
                parts.append(left + right if both else word[k])
                k += 1 + both
            merged[tuple(parts)] += n
        counts = merged
    chars = [c for c, _ in collections.Counter("".join(words)).most_common() if c not in "字語😀"]
    tokens = [t for t in tokens if set(t) <= set(chars)]
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *tokens, *chars])}
    merges = [[t[:n], t[n:]] for t in tokens for n in range(1, len(t)) if t[:n] in vocab and t[n:] in vocab]
    first, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, "content": t, **FLAGS, "special": True} for i, t in enumerate(("<unk>", "<s>", "</s>"))],
            "normalizer": PREPEND, "pre_tokenizer": None,
            "post_processor": {"type": "TemplateProcessing", "single": [first, text], "pair": [first, text, {
                "Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
            "decoder": {"type": "Sequence", "decoders": [*BACK, STRIP]},
            "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                      "vocab": vocab, "merges": merges}}


def variant_of(spec, name):
    spec, changes = json.loads(json.dumps(spec)), dict(VARIANTS[name])
    n, model = len(spec["model"]["vocab"]), spec["model"]
    if changes.pop("normalized", False):
        for token in spec["added_tokens"]:
            token["normalized"] = True
    if changes.pop("added", False):
        spec["added_tokens"] += [{"id": n + k, "content": t, **FLAGS, "special": False}
                                 for k, t in enumerate(("<|x|>", "<|x|><|xy|>", "cat", "  "))]
    if changes.pop("across", False):
        model["vocab"] |= {",▁": n, ",▁a": n + 1, ",▁▁": n + 2, "\n": n + 3, "\n▁": n + 4, "\n▁▁": n + 5}
        model["merges"] += [[",", "▁"], [",▁", "▁"], [",", "▁▁"], [",▁", "a"], [",", "▁a"], ["\n", "▁"], ["\n", "▁▁"]]
    return spec | changes


def main():
    from tokenizers import Tokenizer
    spec, cases = learnt_spec(), {}
    for name in VARIANTS:
        theirs = Tokenizer.from_str(json.dumps(variant_of(spec, name)))
        marked = [theirs.encode(t, add_special_tokens=False).ids for t in TEXTS]
        theirs.encode_special_tokens = True
        ids = [theirs.encode(t, add_special_tokens=False).ids for t in TEXTS]
        cases[name] = {"ids": ids, "marked": {k: m for k, (m, i) in enumerate(zip(marked, ids)) if m != i},
                       "decoded": [theirs.decode(i) for i in ids]}
    text = ",\n".join(f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in cases.items())
    (HERE / "tokenizer.json").write_text('{"spec": ' + json.dumps(spec, ensure_ascii=False, separators=(",", ":"))
                                         + ',\n"cases": {' + text + "}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
