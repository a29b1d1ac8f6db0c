"""Reads tokenizer files into the arguments of a Tokenizer: tokenizer.json, GPT-2's two files, SentencePiece's model.

    from_spec, from_vocab_and_merges, from_sentencepiece -> dict of Tokenizer's arguments

tiktoken does all the merging. It merges the neighbours whose joined bytes have the lowest rank, while the `tokenizers`
library merges the pair that comes first in a list. The two agree if the ranked tokens are those that the list makes out of
their own characters, each with the rank of its last merge. The reason: a piece of text that becomes one token is merged as
if it stood alone, because nothing outside reaches into it. So its last merge is always the same one; `merge_ranks` finds it.
"""

import functools
import json
import re
from pathlib import Path

import tiktoken

from nanorlhf.errors import DataError, one_line

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# the same after a pre-tokenizer that splits off every digit: one digit per piece, and a digit ends a run of spaces
GPT2_DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "chat_template.jinja", "tokenizer.model")
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)  # flags of an added token
PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
DECODERS = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}  # one more decoder, which undoes PREPEND


def encoding_of(name, pattern, ranks, special=()):
    """Returns a tiktoken.Encoding of checked tokens: tiktoken itself panics (not even an Exception) on a missing byte."""
    if any(bytes([b]) not in ranks for b in range(256)):
        raise DataError(f"{name}: not a byte-level vocabulary (not all 256 bytes are tokens)")
    special = dict(special)
    _check_ids(name, [*ranks.values(), *special.values()])
    return tiktoken.Encoding(str(name), pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def _check_ids(name, ids):
    if not all(type(i) is int and 0 <= i < 2**31 for i in ids) or len(set(ids)) < len(ids):
        raise DataError(f"{name}: token ids are not distinct non-negative integers")


# ---- Hugging Face ---------------------------------------------------------------------------------------------------

def from_spec(path, spec, beside, files):
    """Returns Tokenizer's arguments from a tokenizer.json, read or made from another format. beside: read_companion_files'
    result; files: {name: bytes} that saving writes; a tokenizer.json made here is added to them."""
    model = spec["model"]
    kind = model.get("type") or "BPE"  # old files have no type
    unsupported = [k for k in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(k)]
    if kind != "BPE" or unsupported:
        raise DataError(f"{path}: {' '.join([kind, *unsupported])} is not supported "
                        "(BPE over bytes or with byte_fallback is)")
    vocab, names = dict(model["vocab"]), beside["names"]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    added = {t["content"]: {**FLAGS, **t} for t in spec.get("added_tokens") or []}
    for token in beside["added"]:
        added.setdefault(token["content"], {**FLAGS, **token})
    for token in added.values():
        token["id"] = vocab.get(token["content"], token["id"])
    token_of = {i: t for t, i in vocab.items()} | {t["id"]: t["content"] for t in added.values()}

    def named(role):
        i = beside["ids"].get(role)
        return names.get(role) or token_of.get(i[0] if isinstance(i, list) and i else i)  # of a list, the first
    # A family has a BOS only if its own tokenizer prepends it: GPT-2 names one and never uses it.
    templates = [s for s in _steps(spec.get("post_processor"), "processors") if s["type"] == "TemplateProcessing"]
    first = [t["single"][0].get("SpecialToken", {}).get("id") for t in templates]
    bos = first[0] if any(first) else named("bos_token") if beside["settings"].get("add_bos_token") else None
    special = [t for t in names.get("additional_special_tokens", ()) if isinstance(t, str)]
    for content in (bos, *map(named, ROLES), *special):
        if content in vocab and content not in added:
            added[content] = {**FLAGS, "id": vocab[content], "content": content, "special": True}
    _check_ids(path, [*vocab.values(), *(t["id"] for t in added.values() if t["content"] not in vocab)])
    # What these flags do next to a match is not implemented. Special tokens may have them: plain `encode` never matches one.
    if any(t[k] for t in added.values() if not t["special"] for k in ("lstrip", "rstrip", "single_word")):
        raise DataError(f"{path}: added tokens that strip or need whole words are not supported")

    if model.get("byte_fallback"):
        pieces = _byte_fallback(path, spec, vocab, merges)
        if pieces["spaces"] == "prepend" and any(t["normalized"] for t in added.values() if not t["special"]):
            raise DataError(f"{path}: added tokens that are normalized are not supported next to a Prepend normalizer")
    else:
        pieces = _byte_level(path, spec, vocab, merges, {t: a["id"] for t, a in added.items()})

    eos, pad = named("eos_token") or ("<|endoftext|>" if "<|endoftext|>" in added else None), named("pad_token")
    if eos is None:
        raise DataError(f"{path}: no eos_token in tokenizer_config.json and no eos_token_id in config.json")
    files = {**beside["files"], **files}
    if "tokenizer.json" not in files:
        made = {**spec, "added_tokens": sorted(added.values(), key=lambda t: t["id"])}
        if bos and not templates:
            made["post_processor"] = bos_template(bos, added[bos]["id"])
        files["tokenizer.json"] = json.dumps(made, ensure_ascii=False).encode()
    return dict(pieces, eos=eos, pad=pad if pad in added else None, bos=bos, added=list(added.values()), files=files,
                special_text={role: names[role] for role in ROLES if names.get(role)},
                chat_template=beside["chat_template"])


def read_companion_files(folder):
    """Reads a checkpoint's small files about its tokenizer: {names: {role: token}, ids: {role: id}, added: [added tokens],
    settings: tokenizer_config.json, chat_template, files: {name: bytes}}. The values are empty if folder is None."""
    files = {n: (folder / n).read_bytes() for n in TOKENIZER_FILES if folder and (folder / n).is_file()}
    config, special, ids = (_json_object(folder / n, files[n]) if n in files else {} for n in
                            ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"))
    model = read_json(folder / "config.json") if folder and (folder / "config.json").is_file() else {}
    names = {role: token["content"] if isinstance(token, dict) else token for source in (special, config)
             for role in (*ROLES, "additional_special_tokens") if (token := source.get(role)) is not None}
    added = [{**t, "id": int(i)} for i, t in (config.get("added_tokens_decoder") or {}).items()]
    extra = [t for t in names.get("additional_special_tokens", ()) if isinstance(t, str)]
    added += [{"id": i, "content": t, "special": t in extra or t in (names.get(r) for r in ROLES)} for t, i in ids.items()]
    template = config.get("chat_template")
    if isinstance(template, list):
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    if "chat_template.jinja" in files:
        template = files["chat_template.jinja"].decode()
    if not isinstance(template, str | None) or not all(isinstance(names.get(role, ""), str) for role in ROLES):
        raise DataError(f"{folder}/tokenizer_config.json: a chat_template or the name of a token is not a string")
    return dict(names=names, ids={r: model.get(r + "_id") for r in ROLES}, added=added, settings=config,
                chat_template=template, files=files)


def from_vocab_and_merges(path, vocab_name, merges_name):
    """Reads GPT-2's own files: {token: id}, and a version line followed by two symbols per line."""
    prefix = path.name[:-len(vocab_name)]
    merges_path = path.with_name(prefix + merges_name)
    if not merges_path.exists():
        raise DataError(f"{path}: {merges_path.name} must lie next to it")
    vocab, lines = read_json(path), merges_path.read_text(encoding="utf-8").split("\n")
    merges = [line.rstrip("\r").split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    beside = read_companion_files(None if prefix else path.parent)  # gpt2_encoder.json: other files are not its own
    added = []
    if not beside["names"].get("eos_token") and beside["ids"]["eos_token"] is None:
        added = [{"id": vocab.get("<|endoftext|>", len(vocab)), "content": "<|endoftext|>", **FLAGS, "special": True}]
    prefix_space = {"add_prefix_space": bool(beside["settings"].get("add_prefix_space"))}
    spec = spec_of(vocab, merges, added, BYTE_LEVEL | prefix_space, BYTE_LEVEL)
    return from_spec(path, spec, beside, {})


def spec_of(vocab, merges, added, pre_tokenizer, decoder, **more):
    """Returns the content of a tokenizer.json. `more` replaces entries of it, or is merged into its `model`."""
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": vocab, "merges": merges}
    spec = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": decoder, "model": model}
    return {k: v | more.get(k, {}) if k == "model" else more.get(k, v) for k, v in spec.items()}


def bos_template(bos, i):
    """Returns the post-processor that puts BOS first."""
    one = {"SpecialToken": {"id": bos, "type_id": 0}}
    a, b = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    return {"type": "TemplateProcessing", "single": [one, a], "pair": [one, a, b],
            "special_tokens": {bos: {"id": bos, "ids": [i], "tokens": [bos]}}}


def _steps(step, field):
    """Returns a tokenizer.json stage (None, one step, or nested Sequences) as a flat list of steps."""
    if not step:
        return []
    return [s for inner in step[field] for s in _steps(inner, field)] if step["type"] == "Sequence" else [step]


def merge_ranks(path, order, tokens):
    """Merges each token's characters by `order`, {(left, right): rank}, lowest rank first. Returns ({token: rank of its last
    merge}, [tokens that end as two parts]). A token that these merges do not complete never occurs in a text either."""
    made, in_two, never = {}, [], max(order.values(), default=0) + 1
    for token in tokens:
        parts = list(token)
        if len(parts) > 1000:
            raise DataError(f"{path}: a token of {len(parts)} characters is not supported (at most 1000)")
        while len(parts) > 1:
            ranks = [order.get(pair, never) for pair in zip(parts, parts[1:])]
            rank = min(ranks)
            if rank == never:
                break
            k = ranks.index(rank)
            parts[k:k + 2] = [parts[k] + parts[k + 1]]
        else:
            made[token] = rank
        if len(parts) == 2:
            in_two.append(token)
    return made, in_two


def pair_ranks(path, vocab, merges):
    order = {}
    for k, (left, right) in enumerate(merges):
        if not (left in vocab and right in vocab and left + right in vocab):
            raise DataError(f"{path}: merge {left!r} + {right!r} is of tokens that are not in the vocabulary")
        order[left, right] = k  # the last of several equal merges counts, as in `tokenizers`
    return order


# ---- Byte level -----------------------------------------------------------------------------------------------------

@functools.lru_cache(1)
def byte_symbols():
    """Returns GPT-2's printable symbol for each byte, {symbol: byte}: the byte itself if it is a visible Latin-1 character,
    else the next code point from 256 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + k): b for k, b in enumerate(hidden)}


def from_symbols(token):
    """Returns the bytes of a byte-level token. A token that is not written in GPT-2's symbols stands for itself."""
    symbols = byte_symbols()
    return bytes(symbols[c] for c in token) if symbols.keys() >= set(token) else token.encode()


def _byte_level(path, spec, vocab, merges, special):
    """Returns Tokenizer's arguments. Ids that grow along the merges serve as ranks; others get a map (fairseq's OPT)."""
    forms = [n["type"] for n in _steps(spec.get("normalizer"), "normalizers")]
    if len(forms) > 1 or not set(forms) <= {"NFC", "NFD", "NFKC", "NFKD"}:
        raise DataError(f"{path}: normalizer {' + '.join(forms)} is not supported")
    pattern, symbols = _pattern(path, _steps(spec.get("pre_tokenizer"), "pretokenizers")), byte_symbols()
    whole = spec["model"].get("ignore_merges")  # a pre-token in the vocabulary is one token, whatever the merges
    order = pair_ranks(path, vocab, merges)
    tokens = {left + right for left, right in order}
    if whole:
        tokens |= {t for t in vocab if t not in special and len(t) > 1 and symbols.keys() >= set(t)}
    made, in_two = merge_ranks(path, order, tokens)
    if whole and in_two:
        raise DataError(f"{path}: ignore_merges with token {in_two[0]!r}, which has two parts and no merge, "
                        "is not supported")
    ranked = [t for t in symbols if t in vocab] + [t for t in tokens if whole and t not in made] + sorted(made, key=made.get)
    along, ids = [vocab[left + right] for left, right in merges], None
    if along == sorted(along):
        ranks = {from_symbols(t): vocab[t] for t in ranked}
        _check_ids(path, ranks.values())
    elif whole:
        raise DataError(f"{path}: ignore_merges with ids that do not increase along the merges is not supported")
    else:
        ranks, ids = {from_symbols(t): k for k, t in enumerate(ranked)}, [vocab[t] for t in ranked]
    texts = {i: from_symbols(t) for t, i in [*vocab.items(), *special.items()]}
    return dict(encoding=encoding_of(path, pattern, ranks), ids=ids, texts=texts, normal_form=forms[0] if forms else None)


def _pattern(path, steps):
    """Returns the regex that tiktoken needs for these pre-tokenizer steps."""
    types = [s["type"] for s in steps]
    last = steps[-1] if steps else {}
    if types[-1:] == ["ByteLevel"] and not last.get("add_prefix_space"):
        if types == ["ByteLevel"] and last.get("use_regex", True):
            return GPT2_PATTERN
        if types == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and last.get("use_regex", True):
            return GPT2_DIGITS_PATTERN
        same_pieces = (("Isolated", False), ("Removed", True))  # two ways to say: the matches are the pieces
        if types == ["Split", "ByteLevel"] and not last.get("use_regex", True) and "Regex" in steps[0]["pattern"] \
                and (steps[0]["behavior"], bool(steps[0].get("invert"))) in same_pieces:
            return steps[0]["pattern"]["Regex"]
    raise DataError(f"{path}: pre-tokenizer {' + '.join(types) or 'None'} is not supported with these options "
                    "(Split by a regex, then ByteLevel without a prefix space, is)")


# ---- SentencePiece --------------------------------------------------------------------------------------------------

def _byte_fallback(path, spec, vocab, merges):
    """Returns Tokenizer's arguments for SentencePiece's BPE, which merges characters, writes a space as "▁", and writes a
    character that is not in the vocabulary as its bytes.

    tiktoken starts from bytes. So the lowest ranks build the vocabulary's characters, through helpers (a character's first
    two or three bytes); the merges follow. "▁" is kept as a space here, which makes pieces shorter and decoding simple.
    """
    normal, pre = _steps(spec.get("normalizer"), "normalizers"), _steps(spec.get("pre_tokenizer"), "pretokenizers")
    spaces, split = _spaces(path, normal, pre)
    decoders = _steps(spec.get("decoder"), "decoders")
    strip = decoders[-1:] == [STRIP]
    if (decoders[:-1] if strip else decoders) != DECODERS:
        types = " + ".join(d["type"] for d in decoders) or "None"
        raise DataError(f"{path}: decoder {types} is not supported with these options and byte_fallback")
    if spec["model"].get("ignore_merges"):
        raise DataError(f"{path}: byte_fallback with ignore_merges is not supported")
    names = [f"<0x{b:02X}>" for b in range(256)]
    if not all(n in vocab for n in names):
        raise DataError(f"{path}: byte_fallback without all of <0x00> ... <0xFF> in the vocabulary is not supported")
    byte, order = [vocab[n] for n in names], pair_ranks(path, vocab, merges)
    if not {t for pair in order for t in pair}.isdisjoint(names):
        raise DataError(f"{path}: merges of byte tokens are not supported")
    made, _ = merge_ranks(path, order, {left + right for left, right in order})
    made = {t: rank for t, rank in made.items() if " " not in t}  # by then every space of a text is "▁"

    ids = [vocab.get(chr(b) if b < 128 and b != 32 else "▁" if b == 32 else None, byte[b]) for b in range(256)]
    if "▁" not in vocab:
        ids[32] = [byte[b] for b in "▁".encode()]
    ranks = {bytes([b]): b for b in range(256)}
    for char in sorted(t for t in vocab if len(t) == 1 and t not in " ▁"):
        raw = char.encode()
        for n in range(2, len(raw) + 1):
            if raw[:n] not in ranks:
                ranks[raw[:n]] = len(ids)
                ids.append([byte[b] for b in raw[:n]])
        if len(raw) > 1:
            ids[-1] = vocab[char]
    for token in sorted(made, key=made.get):
        ranks[token.replace("▁", " ").encode()] = len(ids)
        ids.append(vocab[token])
    # tiktoken is fastest on short pieces. If words are not pieces already, we split before the spaces that no token reaches
    # from the left. Few characters are ever followed by a space inside a token (none in LLaMA's vocabulary).
    pattern = r" [^ ]*|[^ ]+" if split else r" *[^ ]+| +"
    before = "".join(rf"\x{{{ord(c):x}}}" for c in sorted({c for t in made for c in re.findall("(?s)([^▁])▁", t)}))
    if before and not split:
        pattern = rf" *(?:[^ ]*[{before}] +)+[^ ]*|{pattern}"
    texts = {i: t.replace("▁", " ").encode() for t, i in vocab.items()} | {i: bytes([b]) for b, i in enumerate(byte)}
    return dict(encoding=encoding_of(path, pattern, ranks), ids=ids, texts=texts, spaces=spaces, strip=strip)


def _spaces(path, normal, pre):
    """Returns (when a space is put before a text, whether every word is a piece). Tokenizer explains the first."""
    types = [s["type"] for s in pre]
    no_effect = types == ["Split"] and pre[0]["pattern"] == {"String": " "}  # no spaces are left by then (Gemma)
    if normal in ([PREPEND, REPLACE], [REPLACE, PREPEND]) and (not pre or no_effect):
        return "prepend", False
    if normal == [REPLACE] and (not pre or no_effect):
        return "never", False
    if not normal and types == ["Metaspace"] and pre[0]["replacement"] == "▁":
        scheme = pre[0].get("prepend_scheme", "always")
        scheme = "never" if pre[0].get("add_prefix_space") is False else scheme
        if scheme in ("always", "first", "never"):
            return scheme, pre[0].get("split", True)
    raise DataError(f"{path}: normalizer {' + '.join(s['type'] for s in normal) or 'None'} with pre-tokenizer "
                    f"{' + '.join(types) or 'None'} is not supported with byte_fallback")


def _fields(content):
    """Parses a protobuf message into [(field number, value)]: ints, and bytes for a field with a length or a fixed size."""
    fields, at = [], 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            value |= (content[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if content[at - 1] < 128:
                return value
    while at < len(content):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            fields.append((number, varint()))
        else:
            size = {1: 8, 2: None, 5: 4}[wire]
            size = varint() if size is None else size
            if at + size > len(content):
                raise ValueError("a protobuf that ends early")
            fields.append((number, content[at:at + size]))
            at += size
    return fields


def from_sentencepiece(path, content):
    """Returns Tokenizer's arguments from SentencePiece's own model file, which is first turned into a tokenizer.json."""
    import struct
    model = _fields(content)
    trainer, normalizer = (dict(_fields(dict(model).get(number, b""))) for number in (2, 3))
    kind = {1: "Unigram", 2: "BPE", 3: "Word", 4: "Char"}.get(trainer.get(3, 1))
    checks = {f"a {kind} model": kind != "BPE", "a model without byte_fallback": not trainer.get(35),
              "a character map": normalizer.get(2), "remove_extra_whitespaces": normalizer.get(4, 1),
              "treat_whitespace_as_suffix": trainer.get(24)}
    if unsupported := [name for name, present in checks.items() if present]:
        raise DataError(f"{path}: SentencePiece with {', '.join(unsupported)} is not supported (BPE with byte_fallback is)")
    vocab, scores, added, roles = {}, {}, [], {}
    for i, piece in enumerate(dict(_fields(value)) for number, value in model if number == 1):
        text, type_ = piece[1].decode(), piece.get(3, 1)
        vocab[text] = i
        if type_ == 1:
            scores[text] = struct.unpack("<f", piece.get(2, bytes(4)))[0]
        elif type_ in (2, 3):  # unknown, control
            added.append({"id": i, "content": text, **FLAGS, "special": True})
        elif type_ == 4:
            raise DataError(f"{path}: SentencePiece with user-defined symbols ({text!r}) is not supported")
    for role, number, default in (("unk_token", 40, 0), ("bos_token", 41, 1), ("eos_token", 42, 2)):
        roles[role] = next((t["content"] for t in added if t["id"] == trainer.get(number, default)), None)
    best_first = sorted((t for t in scores if len(t) > 1), key=lambda t: (-scores[t], vocab[t]))
    merges = [[t[:n], t[n:]] for t in best_first for n in range(1, len(t)) if t[:n] in scores and t[n:] in scores]
    beside = read_companion_files(path.parent)
    beside["names"] = {r: t for r, t in roles.items() if t} | beside["names"]
    bos = roles["bos_token"]
    puts_bos = bos and beside["settings"].get("add_bos_token", True)
    normalizers, decoders = [REPLACE], DECODERS
    if normalizer.get(3, 1):                      # add_dummy_prefix
        normalizers, decoders = [PREPEND, REPLACE], [*DECODERS, STRIP]
    spec = spec_of(vocab, merges, added, None, {"type": "Sequence", "decoders": decoders},
                   normalizer={"type": "Sequence", "normalizers": normalizers},
                   post_processor=bos_template(bos, vocab[bos]) if puts_bos else None,
                   model={"byte_fallback": True, "unk_token": roles["unk_token"], "fuse_unk": True})
    return from_spec(path, spec, beside, {})


def _json_object(path, content):
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}: not JSON ({one_line(e)})") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object")
    return value


def read_json(path):
    try:
        return _json_object(path, Path(path).read_bytes())
    except OSError as e:
        raise DataError(f"{path}: not JSON ({one_line(e)})") from None
