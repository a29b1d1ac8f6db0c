"""The data file: tokenizer, templates, record kinds, readers, batches.

    load_tokenizer(name_or_path) -> Tokenizer            text <-> ids, one tiktoken.Encoding inside
    load_records(name_or_path, kind) -> list of dicts    JSON lines of any known layout, as the kind asked for
    make_examples / pack_texts / collate                 records -> token rows -> right-padded tensors
    epoch_order / batch_indices / micro_batches          which rows make step k (no state: a resumed run replays it)

Everything wrong with a file is a DataError whose message is one line: `file:line: what is wrong`.
"""

import base64
import collections
import functools
import gzip
import hashlib
import itertools
import json
import re
import sys
import unicodedata
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

from nanorlhf.run import UserError


class DataError(UserError):
    """A file, row or text that cannot be used; the message is one line fit to be printed as it is."""


# ---------------------------------------------------------------------------------------------------------- tokenizer
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# the same after a pre-tokenizer that cuts out every digit: each digit alone, and a digit ends a run of spaces
GPT2_DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_NAMED = ("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
                "finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id",
                "python_tag", "image")  # ids 128000 ... 128011, then reserved_special_token_2 ... 245
VOCAB_AND_MERGES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))  # OpenAI's names, Hugging Face's names
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "chat_template.jinja", "tokenizer.model")


class Tokenizer:
    """Text <-> ids around one tiktoken.Encoding, plus what an Encoding does not know of: eos, pad, bos, normaliser.

    eos_id      ends every response.
    pad_id      fills rows on the right; never eos (a model trained with pad = eos never learns to stop).
    bos_id      the id this family puts before a text, or None when it puts none (GPT-2, Qwen, Pythia).
    vocab_size  highest id + 1, special tokens included; a checkpoint's embedding may be larger, never smaller.
    """

    def __init__(self, encoding, eos, pad=None, bos=None, plain=(), normal_form=None, files=None):
        """eos, pad, bos: names of special tokens; plain: special tokens that are matched inside text all the same
        (added tokens marked `special: false`); normal_form: "NFC" and such; files: {name: bytes} that `save` writes."""
        special = dict(encoding._special_tokens)
        self.encoding, self.normal_form, self.files = encoding, normal_form, files or {}
        self.ranks, self.special, self.plain = encoding._mergeable_ranks, special, {t: special[t] for t in plain}
        self.vocab_size = max([*self.ranks.values(), *special.values()]) + 1
        for name in filter(None, (eos, pad, bos)):
            if name not in special:
                raise DataError(f"tokenizer {encoding.name}: {name!r} is not one of its special tokens")
        self.eos_id, self.bos_id = special[eos], special[bos] if bos else None
        if pad is None or special[pad] == self.eos_id:
            spare = sorted(("pad" not in t, i) for t, i in special.items() if t not in (eos, bos, *plain))
            # Without a spare special token any row of the embedding will do, because masks come from lengths and never
            # from pad ids. GPT-2 is such a case: its pad is id 0, "!".
            self.pad_id = spare[0][1] if spare else int(self.eos_id == 0)
        else:
            self.pad_id = special[pad]
        self._bytes = {i: b for b, i in self.ranks.items()} | {i: t.encode() for t, i in self.plain.items()}
        # tiktoken matches overlapping special tokens in hash order, so the split is ours: the longest first.
        longest_first = sorted(self.plain, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if plain else None

    def encode(self, text):
        """str -> list of ids. Ordinary text throughout: special-token strings in it are spelt out; no BOS, no EOS."""
        try:
            text.encode()  # tiktoken would quietly encode U+FFFD in place of an unpaired surrogate
        except UnicodeEncodeError as e:
            raise DataError(f"text with an unpaired surrogate (position {e.start}) is not Unicode") from None
        if len(text) > 100_000 and re.search(r"\s{100000}", text):  # overflows the stack of tiktoken's regex engine
            raise DataError("text with more than 100,000 whitespace characters in a row")
        if self.normal_form:
            text = unicodedata.normalize(self.normal_form, text)
        if not self._split:
            return self.encoding.encode_ordinary(text)
        parts = enumerate(self._split.split(text))  # odd places hold the separators, i.e. the plain added tokens
        return [i for k, p in parts for i in ([self.plain[p]] if k % 2 else self.encoding.encode_ordinary(p))]

    def decode(self, ids):
        """ids (list or 1-D tensor) -> str. Special tokens and ids beyond the vocabulary vanish; bytes that are not
        UTF-8 become U+FFFD."""
        return b"".join(self._bytes.get(int(i), b"") for i in ids).decode("utf-8", errors="replace")

    def save(self, folder):
        """Writes the tokenizer files of a Hugging Face checkpoint: the very bytes it was loaded from, or new ones."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = {i: t for t, i in self.special.items()}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for token, i in (("eos_token", self.eos_id), ("pad_token", self.pad_id), ("bos_token", self.bos_id)):
            if i in names:
                config[token] = names[i]
        new = {"tokenizer_config.json": json.dumps(config, indent=2).encode()}
        if "tokenizer.json" not in self.files:
            new["tokenizer.json"] = json.dumps(_to_tokenizer_json(self, names), ensure_ascii=False).encode()
        for name, content in (new | self.files).items():
            (folder / name).write_bytes(content)


def load_tokenizer(name_or_path):
    """Tokenizer from `reviews` (the built-in task), a checkpoint folder (tokenizer.json, encoder.json + vocab.bpe, or a
    tiktoken rank file), one of these files, or a tiktoken name such as "gpt2". Raises DataError for anything else."""
    path = Path(name_or_path)
    try:
        if name_or_path == "reviews":  # a folder of that name is ./reviews
            return _reviews_tokenizer()
        if path.is_dir():
            pairs = [path / vocab for vocab, merges in VOCAB_AND_MERGES if (path / merges).exists()]
            candidates = [path / "tokenizer.json", *pairs, *sorted([*path.glob("*.model"), *path.glob("*.tiktoken")])]
            found = [c for c in candidates if c.exists()]
            if not found:
                raise DataError(f"{path}: no tokenizer.json, encoder.json + vocab.bpe, *.model or *.tiktoken in it")
            path = found[0]
        if path.is_file():
            for vocab, merges in VOCAB_AND_MERGES:
                if path.name.endswith(vocab):
                    return _from_vocab_and_merges(path, path.with_name(path.name[:-len(vocab)] + merges))
            return _from_rank_file(path) if path.suffix in (".model", ".tiktoken") else _from_tokenizer_json(path)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OSError) as e:
        if isinstance(e, DataError):
            raise
        raise DataError(f"{path}: not a tokenizer file this can read ({type(e).__name__}: {_one_line(e)})") from None
    if str(name_or_path) not in tiktoken.list_encoding_names():
        raise DataError(f"{name_or_path}: neither `reviews`, nor a folder or file, nor one of tiktoken's names "
                        f"({', '.join(tiktoken.list_encoding_names())})")
    try:
        encoding = tiktoken.get_encoding(str(name_or_path))
    except (OSError, ValueError) as e:  # tiktoken downloads the ranks on first use
        raise DataError(f"{name_or_path}: tiktoken could not fetch it ({type(e).__name__}); offline, give a folder "
                        "with tokenizer.json or encoder.json + vocab.bpe instead") from None
    return Tokenizer(encoding, "<|endoftext|>")


@functools.lru_cache(1)
def _byte_symbols():
    """GPT-2's printable stand-in for each byte, {symbol: byte}: itself when it shows as a Latin-1 character,
    else the next code point from 256 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + k): b for k, b in enumerate(hidden)}


def _encoding(name, pattern, ranks, special):
    """A checked tiktoken.Encoding: tiktoken itself panics (not even an Exception) on a missing byte."""
    if any(bytes([b]) not in ranks for b in range(256)):
        raise DataError(f"{name}: not a byte-level vocabulary (not all 256 bytes are tokens)")
    ids = [*ranks.values(), *special.values()]
    if len(set(ids)) < len(ids) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise DataError(f"{name}: token ids are not distinct non-negative integers")
    return tiktoken.Encoding(str(name), pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def _byte_level(name, pattern, vocab, merges, special, ignore_merges=False):
    """Encoding from a byte-level BPE {token: id} and its merges [(left, right)]: ids serve as tiktoken's ranks, which
    is the same algorithm provided that ids increase along the merges."""
    symbols = _byte_symbols()
    made = [vocab[left + right] for left, right in merges]
    if made != sorted(made):
        raise DataError(f"{name}: token ids do not increase along the merges, so they cannot serve as ranks")
    reachable, ranks, special = set(made), {}, dict(special)
    for token, i in vocab.items():
        if token in special:
            continue
        if set(token) <= symbols.keys() and (len(token) == 1 or ignore_merges or i in reachable):
            ranks[bytes(symbols[c] for c in token)] = i
        else:
            special[token] = i  # no merge leads to it: it keeps its id and is never produced
    return _encoding(name, pattern, ranks, special)


def _from_tokenizer_json(path):
    """Hugging Face `tokenizer.json`, with the names in the tokenizer_config.json or config.json next to it."""
    spec, folder = _read_json(path), path.parent
    model, added = spec["model"], spec.get("added_tokens") or []
    kind = model.get("type", "BPE")  # old files do not say
    unsupported = [k for k in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix") if model.get(k)]
    if kind != "BPE" or unsupported:  # the place to call a reader for another family (SentencePiece: byte_fallback)
        raise DataError(f"{path}: {' '.join([kind, *unsupported])} is not supported (byte-level BPE is)")
    forms = [n["type"] for n in _steps(spec.get("normalizer"), "normalizers")]
    if len(forms) > 1 or not set(forms) <= {"NFC", "NFD", "NFKC", "NFKD"}:
        raise DataError(f"{path}: normalizer {' + '.join(forms)} is not supported")
    plain = [t["content"] for t in added if not t.get("special")]
    if any(t.get(k) for t in added if t["content"] in plain for k in ("lstrip", "rstrip", "single_word")):
        raise DataError(f"{path}: added tokens that strip or need whole words are not supported")
    pattern = _pattern(path, _steps(spec.get("pre_tokenizer"), "pretokenizers"))
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    special = {t["content"]: t["id"] for t in added}
    encoding = _byte_level(path, pattern, model["vocab"], merges, special, model.get("ignore_merges"))

    beside = [folder / "tokenizer_config.json", folder / "config.json"]
    names, ids = [_read_json(file) if file.exists() else {} for file in beside]
    token_of = {i: t for t, i in encoding._special_tokens.items()}

    def named(key):
        token, i = names.get(key), ids.get(key + "_id")
        if token is None:
            return token_of.get(i[0] if isinstance(i, list) and i else i)  # a list: the first is the text's end
        return token["content"] if isinstance(token, dict) else token

    eos, pad = named("eos_token") or ("<|endoftext|>" if "<|endoftext|>" in special else None), named("pad_token")
    if eos is None:
        raise DataError(f"{path}: no eos_token in tokenizer_config.json and no eos_token_id in config.json")
    # A family has a BOS only if its own tokenizer prepends it: GPT-2 names one and never uses it.
    templates = [s for s in _steps(spec.get("post_processor"), "processors") if s["type"] == "TemplateProcessing"]
    first = [t["single"][0].get("SpecialToken", {}).get("id") for t in templates]
    bos = first[0] if any(first) else named("bos_token") if names.get("add_bos_token") else None
    files = {n: (folder / n).read_bytes() for n in TOKENIZER_FILES if (folder / n).exists()}
    files["tokenizer.json"] = path.read_bytes()  # in memory: the source may be gone when a long run saves
    pad = pad if pad in encoding._special_tokens else None
    return Tokenizer(encoding, eos, pad, bos, plain, forms[0] if forms else None, files)


def _steps(step, field):
    """A tokenizer.json stage (None, one step, or nested Sequences) as a flat list of steps."""
    if not step:
        return []
    return [s for inner in step[field] for s in _steps(inner, field)] if step["type"] == "Sequence" else [step]


def _pattern(path, steps):
    """The regex that tiktoken needs for these pre-tokenizer steps."""
    types = [s["type"] for s in steps]
    last = steps[-1] if steps else {}
    if types[-1:] == ["ByteLevel"] and not last.get("add_prefix_space"):
        if types == ["ByteLevel"] and last.get("use_regex", True):
            return GPT2_PATTERN
        if types == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and last.get("use_regex", True):
            return GPT2_DIGITS_PATTERN
        same_pieces = (("Isolated", False), ("Removed", True))  # two ways to write: the matches are the pieces
        if types == ["Split", "ByteLevel"] and not last.get("use_regex", True) and "Regex" in steps[0]["pattern"] \
                and (steps[0]["behavior"], bool(steps[0].get("invert"))) in same_pieces:
            return steps[0]["pattern"]["Regex"]
    raise DataError(f"{path}: pre-tokenizer {' + '.join(types) or 'None'} is not supported with these options "
                    "(Split by a regex, then ByteLevel without a prefix space, is)")


def _from_vocab_and_merges(vocab_path, merges_path):
    """GPT-2's own files: {token: id}, and a version line followed by two symbols a line."""
    if not merges_path.exists():
        raise DataError(f"{vocab_path}: {merges_path.name} must lie next to it")
    vocab, lines = _read_json(vocab_path), merges_path.read_text(encoding="utf-8").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    special = {"<|endoftext|>": vocab.get("<|endoftext|>", len(vocab))}
    return Tokenizer(_byte_level(vocab_path, GPT2_PATTERN, vocab, merges, special), "<|endoftext|>")


def _from_rank_file(path):
    """tiktoken's rank file: `base64(token) rank` a line. Parsed here because tiktoken's loader may return an older
    content of the same path. All such files get Llama-3's pattern; Llama-3's own gets its special tokens too."""
    ranks, content = {}, path.read_bytes()
    if content[:1] == b"\n":  # field 1 of a protobuf
        raise DataError(f"{path}: a SentencePiece model is not supported (byte-level BPE is)")
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError:
                raise DataError(f"{path}:{number}: not `base64 rank`") from None
    n, names = max(ranks.values(), default=0) + 1, ["endoftext", "pad"]
    if n == len(ranks) == 128000:
        names = [*LLAMA3_NAMED, *(f"reserved_special_token_{k}" for k in range(2, 246))]
    special = {f"<|{name}|>": n + k for k, name in enumerate(names)}
    encoding = _encoding(path, LLAMA3_PATTERN, ranks, special)
    if len(names) == 2:
        return Tokenizer(encoding, "<|endoftext|>", "<|pad|>")
    return Tokenizer(encoding, "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|begin_of_text|>")


def _to_tokenizer_json(tokenizer, names):
    """The same tokenizer as Hugging Face's tokenizer.json; ids in its vocabulary, merges recovered from the ranks."""
    ranks, symbol = tokenizer.ranks, {b: s for s, b in _byte_symbols().items()}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:  # byte-pair encode the token with what came before it: two parts must be left
            best = min((ranks.get(a + b, rank), k) for k, (a, b) in enumerate(itertools.pairwise(parts)))
            if best[0] >= rank:
                break
            parts[best[1]:best[1] + 2] = [parts[best[1]] + parts[best[1] + 1]]
        if len(parts) == 2:
            merges.append(" ".join("".join(symbol[b] for b in p) for p in parts))
    # Tokens that no merge reaches (Llama-3 has some) occur only as a whole pre-token, which tiktoken looks up first.
    unreachable = len(merges) < sum(len(t) > 1 for t in ranks)
    vocab = {"".join(symbol[b] for b in token): rank for token, rank in ranks.items()} | tokenizer.special
    # tiktoken's own patterns have possessive quantifiers and `$`, which mean other things in Hugging Face's engine.
    pattern = re.sub(r"([+*?]|\{[\d,]+\})\+", r"\1", tokenizer.encoding._pat_str).replace("+$", r"+\z")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    bos = names.get(tokenizer.bos_id)
    template = bos and {"type": "TemplateProcessing", "single": [
        {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [
        {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}}}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, "content": t, **flags, "special": True} for i, t in sorted(names.items())],
            "normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, byte_level]},
            "post_processor": template, "decoder": byte_level | {"use_regex": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                      "ignore_merges": unreachable, "vocab": vocab, "merges": merges}}


def train_bpe(texts, vocab_size, pattern=GPT2_PATTERN, name="bpe"):
    """Byte-pair encoding (Sennrich et al. 2016) learnt from texts: 256 bytes, merges, then <|endoftext|> and <|pad|>.

    The most frequent pair is merged first, ties going to the larger pair of ids, so that the result depends on nothing
    but the counts. Fewer than vocab_size tokens come out when no pair occurs twice."""
    import regex  # tiktoken's own dependency; Python's re does not know \p{L}
    if vocab_size < 258:
        raise DataError(f"vocab_size {vocab_size} is too small: 256 bytes and 2 special tokens are always there")
    counts = collections.Counter(word for text in texts for word in regex.findall(pattern, text))
    words = [(list(word.encode()), n) for word, n in counts.items()]
    tokens = [bytes([b]) for b in range(256)]
    pairs, where = collections.Counter(), collections.defaultdict(set)  # pair -> count, pair -> words that have had it
    for k, (ids, n) in enumerate(words):
        for pair in itertools.pairwise(ids):
            pairs[pair] += n
            where[pair].add(k)
    while len(tokens) < vocab_size - 2 and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] < 2:
            break
        for k in where.pop(best):
            ids, n = words[k]
            pairs.subtract({p: n * c for p, c in collections.Counter(itertools.pairwise(ids)).items()})
            i = 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) == best:
                    ids[i:i + 2] = [len(tokens)]
                i += 1
            for pair in itertools.pairwise(ids):
                pairs[pair] += n
                where[pair].add(k)
        del pairs[best]
        tokens.append(tokens[best[0]] + tokens[best[1]])
    special = {"<|endoftext|>": len(tokens), "<|pad|>": len(tokens) + 1}
    encoding = _encoding(name, pattern, {t: i for i, t in enumerate(tokens)}, special)
    return Tokenizer(encoding, "<|endoftext|>", "<|pad|>")


@functools.lru_cache(1)
def _reviews_tokenizer():
    from nanorlhf import reviews
    return train_bpe(reviews.corpus(4000, seed=0), 640, name="reviews")


def _one_line(e):
    return " ".join(str(e).split())[:200]


def _read_json(path):
    try:
        value = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(f"{path}: not JSON ({_one_line(e)})") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object")
    return value


# ------------------------------------------------------------------------------------------------------------ records
# A record is a dict of one of these kinds (fields as in TRL); "group", where a row has one, names the post it is about.
FIELDS = {"text": ("text",), "prompt": ("prompt",), "completion": ("prompt", "completion"),
          "preference": ("prompt", "chosen", "rejected"), "ranked": ("prompt", "responses", "scores")}
ASSISTANT = "\n\nAssistant:"  # Anthropic HH: a prompt ends with it and a response begins with a space
TLDR_PROMPT = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"  # Stiennon et al. 2020
CNNDM_PROMPT = "ARTICLE: {article}\nTL;DR:"
ALPACA_PROMPT = ("Below is an instruction that describes a task. Write a response that appropriately completes the "
                 "request.\n\n### Instruction:\n{instruction}\n\n### Response:")
ALPACA_INPUT_PROMPT = ("Below is an instruction that describes a task, paired with an input that provides further "
                       "context. Write a response that appropriately completes the request.\n\n"
                       "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:")


def load_records(path_or_name, kind, split="train", limit=None, skip_bad=False, seed=0):
    """Records of one kind from a file, or from the built-in task `reviews`.

    path_or_name  JSON lines (plain or gzip) or a JSON array, rows as in READERS below; or "reviews".
    kind          a key of FIELDS. Rows of another kind are converted where that makes sense (see `_convert`). A
                  "prompt" record carries the file's answer, if there is one, as "completion".
    split, seed   for `reviews` only (train, test, ood_near, ood_far); a file holds one split.
    limit         at most so many records; for `reviews` 4000 (train) or 500 when None.
    skip_bad      pass over bad rows and print one line about them on stderr, instead of raising DataError at the first.

    Text is taken as it stands. In particular no space is put between prompt and completion: the completion carries its
    own leading space where one is wanted (HH and TL;DR files do so).
    """
    if kind not in FIELDS:
        raise DataError(f"unknown record kind {kind!r}: want one of {', '.join(FIELDS)}")
    path = Path(path_or_name)
    if path_or_name == "reviews":
        return _review_records(kind, split, limit if limit is not None else 4000 if split == "train" else 500, seed)
    if not path.is_file():
        raise DataError(f"{path}: no such file (and the only built-in name is `reviews`)")
    records, bad, seen = [], collections.Counter(), 0
    for line, row in _rows(path):
        seen += 1
        try:
            records += _records_of(row, kind)
        except DataError as e:
            if not skip_bad:
                raise DataError(f"{path}:{line}: {e}") from None
            bad[str(e)] += 1
        if limit is not None and len(records) >= limit:
            break
    reasons = ", ".join(f"{n} {reason}" for reason, n in bad.most_common(5))
    if not records:
        raise DataError(f"{path}: no {kind} records in {seen} rows" + (f" ({reasons})" if bad else ""))
    if bad:
        print(f"{path}: skipped {sum(bad.values())} of {seen} rows ({reasons})", file=sys.stderr)
    return records[:limit]


def _review_records(kind, split, n, seed):
    from nanorlhf import reviews
    if split not in ("train", "test", "ood_near", "ood_far"):
        raise DataError(f"reviews has no split {split!r}: want train, test, ood_near or ood_far")
    if kind not in ("text", "prompt", "completion"):
        raise DataError(f"reviews has no {kind} records: they are made from a model's own samples")
    if kind == "text" and split == "train":
        return [{"text": text} for text in reviews.corpus(n, seed)]
    return [r for row in reviews.records(split, n, seed) for r in _convert("completion", row, kind)]


def _rows(path):
    """(number, row) pairs: the lines of a file as bytes still to be parsed, or the elements of a JSON array, counted
    from 1 (the one case where the number in an error is not a line's)."""
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as e:
            raise DataError(f"{path}: broken gzip file ({_one_line(e)})") from None
    content = content.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark
    if content.lstrip()[:1] == b"[":
        try:
            return list(enumerate(json.loads(content.decode()), 1))
        except (ValueError, RecursionError) as e:
            raise DataError(f"{path}: bad JSON array ({_one_line(e)})") from None
    lines = enumerate(content.split(b"\n"), 1)  # at \n only: texts contain U+0085, a line end to str.splitlines
    return [(number, line) for number, line in lines if line.strip()]


def _records_of(row, kind):
    """Records of `kind` made from one row; a DataError says what is wrong with it."""
    if isinstance(row, bytes):
        try:
            row = json.loads(row.decode())
        except UnicodeDecodeError:
            raise DataError("bad UTF-8") from None
        except (ValueError, RecursionError):
            raise DataError("bad JSON") from None
    if not isinstance(row, dict):
        raise DataError("row is not a JSON object")
    fits = [reader for reader in READERS if set(reader[0]) <= row.keys()]
    if not fits:
        raise DataError(f"no known record in the fields {_one_line(', '.join(row)) or '(none)'}")
    # The kind asked for, else the first that fits; a prompt from the fullest reading, which has a reference answer.
    _, found, read = min(fits, key=lambda reader: reader[1] == "text" if kind == "prompt" else reader[1] != kind)
    record = read(row)
    for field in ("text", "completion", "chosen", "rejected"):
        if field in record and not record[field].strip():
            raise DataError(f"empty {field}")
    if found == "preference" and record["chosen"] == record["rejected"]:
        raise DataError("chosen equals rejected")
    if isinstance(row.get("group"), (str, int)):
        record["group"] = row["group"]
    converted = _convert(found, record, kind)
    if converted is None:
        raise DataError(f"no {kind} record ({', '.join(FIELDS[kind])}) can be made of a {found} record, "
                        f"fields {_one_line(', '.join(row))}")
    return converted


def _convert(found, record, kind):
    """[record, ...] of another kind, or None where there is no honest way."""
    group = {"group": record["group"]} if "group" in record else {}
    if kind == found or (kind, found) == ("prompt", "completion"):
        return [record]
    if kind == "completion" and found == "preference":  # Preferred-FT (DPO, section 6)
        return [{"prompt": record["prompt"], "completion": record["chosen"], **group}]
    if kind == "completion" and found == "ranked":  # best of n
        best = max(range(len(record["scores"])), key=record["scores"].__getitem__)
        if not record["responses"][best].strip():
            raise DataError("empty best response")
        return [{"prompt": record["prompt"], "completion": record["responses"][best], **group}]
    if kind == "ranked" and found == "preference":
        return [{"prompt": record["prompt"], "responses": [record["chosen"], record["rejected"]],
                 "scores": [1.0, 0.0], **group}]
    if kind == "preference" and found == "ranked":  # every pair that is not a tie
        pairs = itertools.permutations(zip(record["responses"], record["scores"]), 2)
        return [{"prompt": record["prompt"], "chosen": a, "rejected": b, **group}
                for (a, s), (b, t) in pairs if s > t and a != b]
    if kind == "prompt" and found == "preference":
        return _convert(found, record, "completion")
    if kind == "prompt" and found == "ranked":
        return [{"prompt": record["prompt"], **group}]
    if kind == "text" and found != "prompt":
        return [{"text": r["prompt"] + r["completion"], **group} for r in _convert(found, record, "completion")]
    return None


def _string(value, field):
    if not isinstance(value, str):
        raise DataError(f"{field} is not a string")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise DataError(f"unpaired surrogate in {field}")
    return value


def _render(messages, field):
    """[{role, content}, ...] as an HH transcript: "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    for m in messages:
        if not isinstance(m, dict) or m.get("role") not in names:
            raise DataError(f"{field} holds a message without a role of {', '.join(names)}")
    return "".join(f"\n\n{names[m['role']]}: {_string(m.get('content'), field)}" for m in messages)


def _dialogue(prompt, response, field):
    """(prompt, response) as strings. Lists of messages become a transcript; next to a list, a string is one turn; a
    response that begins with another role than the assistant's is a whole conversation and carries its own prompt."""
    if not isinstance(prompt, list) and not isinstance(response, list):
        return _string(prompt, "prompt"), _string(response, field)
    prompt = prompt if isinstance(prompt, list) else [{"role": "user", "content": _string(prompt, "prompt")}]
    if not isinstance(response, list):
        response = [{"role": "assistant", "content": _string(response, field)}]
    shown = _render(response, field)
    if not shown.startswith(ASSISTANT):
        prompt, shown = response[:-1], _render(response[-1:], field)
    if not shown.startswith(ASSISTANT):
        raise DataError(f"{field} does not end with an assistant message")
    return _render(prompt, "prompt") + ASSISTANT, shown.removeprefix(ASSISTANT)


def _prompt(row):
    """The prompt of a row: a string, or a list of messages."""
    if "instruction" in row:
        instruction, extra = _string(row["instruction"], "instruction"), _string(row.get("input") or "", "input")
        template = ALPACA_INPUT_PROMPT if extra else ALPACA_PROMPT
        return template.format(instruction=instruction, input=extra)
    return row["prompt"] if "prompt" in row else row["query"]


def _read_prompt(row):
    prompt = _prompt(row)
    return {"prompt": _render(prompt, "prompt") + ASSISTANT if isinstance(prompt, list) else _string(prompt, "prompt")}


def _read_completion(row):
    field = "output" if "instruction" in row else "completion"
    prompt, completion = _dialogue(_prompt(row), row[field], field)
    return {"prompt": prompt, "completion": completion}


def _read_preference(row):
    prompt, chosen = _dialogue(_prompt(row), row["chosen"], "chosen")
    other, rejected = _dialogue(_prompt(row), row["rejected"], "rejected")
    if prompt != other:
        raise DataError("prompts differ")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _read_transcripts(row):
    """Two whole conversations; the prompt is what they share up to and including the last "\\n\\nAssistant:"."""
    if isinstance(row["chosen"], list):
        return _read_preference({"prompt": [], **row})
    texts = [_string(row[field], field) for field in ("chosen", "rejected")]
    for field, text in zip(("chosen", "rejected"), texts):
        if ASSISTANT not in text:
            raise DataError(f"{field} has no {ASSISTANT!r}")
    (head, _, chosen), (other, _, rejected) = [text.rpartition(ASSISTANT) for text in texts]
    if head != other:
        raise DataError("prompts differ")
    return {"prompt": head + ASSISTANT, "chosen": chosen, "rejected": rejected}


def _read_ranked(row):
    responses, scores = row["responses"], row["scores"]
    if not isinstance(responses, list) or not isinstance(scores, list):
        raise DataError("responses or scores is not a list")
    if len(responses) != len(scores):
        raise DataError("responses and scores differ in number")
    if len(responses) < 2:
        raise DataError("fewer than 2 responses")
    if any(isinstance(s, bool) or not isinstance(s, (int, float)) for s in scores):
        raise DataError("scores are not all numbers")
    if not all(-sys.float_info.max <= s <= sys.float_info.max for s in scores):  # NaN compares false
        raise DataError("scores are not all finite")
    pairs = [_dialogue(_prompt(row), r, "responses") for r in responses]
    return {"prompt": pairs[0][0], "responses": [r for _, r in pairs], "scores": [float(s) for s in scores]}


def _read_summaries(row):
    """openai/summarize_from_feedback: `choice` is the index of the better summary."""
    info, summaries = row["info"], row["summaries"]
    if not isinstance(info, dict) or not isinstance(summaries, list) or len(summaries) != 2:
        raise DataError("info is not an object or summaries is not a list of two")
    if type(row["choice"]) is not int or row["choice"] not in (0, 1):
        raise DataError("choice is neither 0 nor 1")
    template, fields = (TLDR_PROMPT, ("subreddit", "title", "post")) if info.get("post") is not None else (
        CNNDM_PROMPT, ("article",))
    prompt = template.format(**{f: _string(info.get(f), f"info.{f}") for f in fields})
    texts = [_string(s.get("text") if isinstance(s, dict) else None, "summaries.text") for s in summaries]
    group = {"group": info["id"]} if isinstance(info.get("id"), str) else {}
    return {"prompt": prompt, "chosen": texts[row["choice"]], "rejected": texts[1 - row["choice"]], **group}


def _read_sampled_answers(row):
    """Anthropic's scored samples. They are sorted by score, so their order gives the score away: never let a model see
    it. Most end with the next turn's stray "Human:", which is cut."""
    try:
        strings = [_string(a["sampled_string"], "sampled_string") for a in row["sampled_answers"]]
        scores = [a["pm_scores"][0]["pm_score"] for a in row["sampled_answers"]]
    except (KeyError, TypeError, IndexError):
        raise DataError("sampled_answers need a sampled_string and pm_scores[].pm_score each") from None
    responses = [re.sub(r"\n\n?Human:\s*$", "", s) for s in strings]
    return _read_ranked({"prompt": row["rl_prompt"], "responses": responses, "scores": scores})


READERS = (  # fields that make a row what it is -> kind, reader; earlier ones first
    (("info", "summaries", "choice"), "preference", _read_summaries),
    (("rl_prompt", "sampled_answers"), "ranked", _read_sampled_answers),
    (("prompt", "chosen", "rejected"), "preference", _read_preference),
    (("instruction", "chosen", "rejected"), "preference", _read_preference),
    (("chosen", "rejected"), "preference", _read_transcripts),
    (("prompt", "responses", "scores"), "ranked", _read_ranked),
    (("query", "responses", "scores"), "ranked", _read_ranked),
    (("prompt", "completion"), "completion", _read_completion),
    (("instruction", "output"), "completion", _read_completion),
    (("text",), "text", lambda row: {"text": _string(row["text"], "text")}),
    (("prompt",), "prompt", _read_prompt),
    (("instruction",), "prompt", _read_prompt),
)


def split_records(records, fraction, seed=0):
    """(train, held_out): about `fraction` of the groups (posts; else prompts or texts) are held out, each with all its
    records. A hash of the group decides, so the side of a post depends on nothing but the post, fraction and seed."""
    def is_held_out(record):
        key = record.get("group", record.get("prompt", record.get("text")))
        digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < fraction * 2**64
    sides = [is_held_out(r) for r in records]
    if 0 < fraction < 1 and len(set(sides)) < 2:
        raise DataError(f"{len(records)} records are too few, or too alike, to hold out {fraction:g} of their prompts")
    return [r for r, held in zip(records, sides) if not held], [r for r, held in zip(records, sides) if held]


# ----------------------------------------------------------------------------------------------- examples and batches
class Example(NamedTuple):
    tokens: list        # prompt ids, then response ids
    prompt_length: int  # >= 1: the first token is always a condition, never a target


class Batch(NamedTuple):
    tokens: torch.Tensor   # [B, T] int64, right-padded
    mask: torch.Tensor     # [B, T] bool, true on response tokens, EOS included; false on prompt and padding
    lengths: torch.Tensor  # [B] int64, prompt + response


def truncate_tldr(tokenizer, prompt, max_tokens=512):
    """A TL;DR (or ARTICLE) prompt of at most max_tokens: the post loses its end from the last newline on, again and
    again, and single characters where no newline is left (Stiennon et al. 2020, released code). Text -> text; prompts
    of another shape come back as they are."""
    match = re.fullmatch(r"(SUBREDDIT: .*?\n\nPOST: |ARTICLE: )(.*?)(\n\nTL;DR:|\nTL;DR:)", prompt, re.DOTALL)
    if not match:
        return prompt
    head, post, tail = match.groups()
    while post and (excess := len(tokenizer.encode(head + post + tail)) - max_tokens) > 0:
        newline = post.rfind("\n")
        # A character is at most 4 tokens, so a quarter of the excess may go at once: same result, fewer steps.
        post = post[:newline] if newline >= 0 else post[:-max(1, excess // 4)]
    return head + post + tail


def encode_prompt(tokenizer, prompt, max_prompt_length=None, keep="end"):
    """str -> ids of a prompt, BOS first where the family has one. An empty prompt becomes [EOS]: a model needs a token
    to condition on. Longer than max_prompt_length tokens (BOS counted): cut to its "end" or "start", or with "tldr" by
    `truncate_tldr` first."""
    if keep not in ("end", "start", "tldr"):
        raise DataError(f"keep={keep!r}: want end, start or tldr")
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = tokenizer.encode(prompt)
    if max_prompt_length is not None and len(bos) + len(ids) > max_prompt_length:
        room = max_prompt_length - len(bos)
        if room < 1:
            raise DataError(f"max_prompt_length {max_prompt_length} leaves no room for a prompt")
        if keep == "tldr":
            ids = tokenizer.encode(truncate_tldr(tokenizer, prompt, room))
        ids = ids[:room] if keep == "start" else ids[-room:]
    return bos + ids or [tokenizer.eos_id]


def encode_response(tokenizer, response):
    """str -> ids of a response, EOS at the end. Apart from the prompt, so that no token straddles the border."""
    return tokenizer.encode(response) + [tokenizer.eos_id]


def make_examples(tokenizer, prompt, responses, max_length=None, max_prompt_length=None, keep="end"):
    """K responses to one prompt -> K Examples with the same prompt ids, each at most max_length tokens.

    The DPO authors' rule: only if the longest response does not fit is the prompt cut, to max_prompt_length; only then
    are responses cut, and lose their EOS. Here they may use all that the prompt leaves (DPO's code: max_length -
    max_prompt_length even after a short prompt). Raises DataError if nothing is left of a response."""
    prompt_ids = encode_prompt(tokenizer, prompt)
    rows = [encode_response(tokenizer, response) for response in responses]
    if max_length is not None and len(prompt_ids) + max(map(len, rows)) > max_length:
        prompt_ids = encode_prompt(tokenizer, prompt, max_prompt_length, keep)
        if len(prompt_ids) >= max_length:
            raise DataError(f"a prompt of {len(prompt_ids)} tokens leaves no room for a response within max_length "
                            f"{max_length}: set max_prompt_length lower")
        rows = [row[:max_length - len(prompt_ids)] for row in rows]
    return [Example(prompt_ids + row, len(prompt_ids)) for row in rows]


def make_example(tokenizer, prompt, response, max_length=None, max_prompt_length=None, keep="end"):
    """`make_examples` for one response."""
    return make_examples(tokenizer, prompt, [response], max_length, max_prompt_length, keep)[0]


def pack_texts(tokenizer, texts, length):
    """Documents, each followed by EOS, as one stream cut into Examples of `length` tokens (the last may be shorter).
    The stream starts with EOS, or every document with BOS where the family has one. prompt_length is 1."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    stream = [] if bos else [tokenizer.eos_id]
    for text in texts:
        stream += bos + encode_response(tokenizer, text)
    blocks = [stream[i:i + length] for i in range(0, len(stream), length)]
    return [Example(block, 1) for block in blocks if len(block) > 1]


def collate(examples, pad_id, device="cpu"):
    """Examples -> Batch. The mask comes from lengths, never from comparing tokens with pad_id. Logits at position t - 1
    predict token t: pair tokens[:, 1:] with mask[:, 1:]."""
    lengths = torch.tensor([len(e.tokens) for e in examples])                       # [B]
    starts = torch.tensor([e.prompt_length for e in examples])                      # [B]
    tokens = torch.full((len(examples), int(lengths.max())), pad_id)                # [B, T]
    for row, example in zip(tokens, examples):
        row[:len(example.tokens)] = torch.tensor(example.tokens)
    t = torch.arange(tokens.shape[1])                                               # [T]
    mask = (t >= starts[:, None]) & (t < lengths[:, None])                          # [B, T]
    return Batch(tokens.to(device), mask.to(device), lengths.to(device))


@functools.lru_cache(2)
def epoch_order(n, seed, epoch):
    """Permutation of range(n) for one epoch, a function of (n, seed, epoch) only: nothing to store for a resume."""
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    order = np.random.Generator(np.random.Philox(key=key)).permutation(n)
    order.flags.writeable = False  # it is cached
    return order


def batch_indices(n, batch_size, step, seed):
    """Rows (list of ints) of global step `step` = 0, 1, ...: step after step through one epoch order after another. The
    n % batch_size rows at an epoch's end are left out (others each epoch); if n < batch_size, a batch is all n rows."""
    epoch, k = divmod(step, max(1, n // batch_size))
    return epoch_order(n, seed, epoch)[k * batch_size:(k + 1) * batch_size].tolist()


def micro_batches(examples, micro_batch_size, length=lambda example: len(example.tokens)):
    """Lists of at most micro_batch_size examples of similar length, so that little is padding. Their order is free
    because a loss is summed over the whole batch and divided by the count of the whole batch."""
    ordered = sorted(examples, key=length)
    return [ordered[i:i + micro_batch_size] for i in range(0, len(ordered), micro_batch_size)]
