"""Text <-> token ids: one tiktoken.Encoding for every byte-level BPE file there is. data.py hands on what others call.

    load_tokenizer(name_or_path) -> Tokenizer     checkpoint folders, tokenizer.json, GPT-2's files, tiktoken ranks, names
    train_bpe(texts, vocab_size) -> Tokenizer     a new one; the built-in task's is made so
"""

import base64
import collections
import functools
import itertools
import json
import re
import unicodedata
from pathlib import Path

import tiktoken

from nanorlhf.run import UserError


class DataError(UserError):
    """A file, row or text that cannot be used; the message is one line fit to be printed as it is."""


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

    def same_ids(self, other):
        """Whether two tokenizers give every token the same id."""
        return self.ranks == other.ranks and self.eos_id == other.eos_id

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


def need_same_ids(option, folder, tokenizer):
    if not load_tokenizer(folder).same_ids(tokenizer):
        raise DataError(f"{option} {folder}: its tokenizer gives other ids than --init's")


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
        raise DataError(f"{path}: not a tokenizer file this can read ({type(e).__name__}: {one_line(e)})") from None
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


def one_line(e):
    return " ".join(str(e).split())[:200]


def _read_json(path):
    try:
        value = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(f"{path}: not JSON ({one_line(e)})") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object")
    return value
