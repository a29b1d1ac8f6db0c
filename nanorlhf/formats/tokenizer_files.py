"""Reads tokenizer files into the arguments of a Tokenizer: tokenizer.json, GPT-2's two files, SentencePiece's model,
Mistral's tekken.json.

    from_spec, from_vocab_and_merges, from_sentencepiece, from_tekken -> dict of Tokenizer's arguments

tiktoken does all the merging. It merges the neighbours whose joined bytes have the lowest rank, while the `tokenizers`
library merges the pair that comes first in a list. The two agree if the ranked tokens are those that the list makes out of
their own characters, each with the rank of its last merge. The reason: a piece of text that becomes one token is merged as
if it stood alone, because nothing outside reaches into it. So its last merge is always the same one; `merge_ranks` finds it.
"""

import base64
import functools
import itertools
import json
import re
from pathlib import Path

import tiktoken

from nanorlhf.errors import DataError, one_line
from nanorlhf.files import parse_json

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# the same after a pre-tokenizer that splits off every digit: one digit per piece, and a digit ends a run of spaces
GPT2_DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "chat_template.jinja", "tokenizer.model")
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
TEKKEN_SPECIAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
                  "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
                  "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")
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
    try:
        return tiktoken.Encoding(str(name), pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    except ValueError as e:
        raise DataError(f"{name}: tiktoken cannot read the regex {pattern!r} ({one_line(e)})") from None


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
    for token in beside["added"]:                  # tokenizer_config.json has the last word on the flags, as in transformers
        known = added.setdefault(token["content"], {**FLAGS, **token})
        special = known["special"] or token.get("special")
        known.update({flag: token[flag] for flag in FLAGS if flag in token}, special=bool(special))
    for token in added.values():
        token["id"] = vocab.get(token["content"], token["id"])
    token_of = {i: t for t, i in vocab.items()} | {t["id"]: t["content"] for t in added.values()}

    of_text = {*map("".join, merges), *(t for t in vocab if len(t) == 1)} - added.keys()

    def named(role):
        i = beside["ids"].get(role)
        token = token_of.get(i[0] if isinstance(i, list) and i else i)  # of a list, the first
        # A configuration that was copied from another model may name any id. Texts need the tokens that merges make.
        return names.get(role) or (None if token in of_text else token)
    # A family has a BOS only if its own tokenizer prepends it: GPT-2 names one and never uses it.
    templates = [s for s in _steps(spec.get("post_processor"), "processors") if s["type"] == "TemplateProcessing"]
    first = [t["single"][0].get("SpecialToken", {}).get("id") for t in templates]
    bos = first[0] if any(first) else named("bos_token") if beside["settings"].get("add_bos_token") else None
    special = [t for t in names.get("additional_special_tokens", ()) if isinstance(t, str)]
    for content in (bos, *map(named, ROLES), *special):
        if content in vocab and content not in added:
            added[content] = {**FLAGS, "id": vocab[content], "content": content, "special": True}
    for content in added.keys() & {bos, named("eos_token"), *map(names.get, ROLES)}:  # whatever the file says, as in transformers
        added[content]["special"] = True
    _check_ids(path, [*vocab.values(), *(t["id"] for t in added.values() if t["content"] not in vocab)])
    # Special tokens may have such flags: plain `encode` never matches one.
    if any(unread_flags(t) for t in added.values() if not t["special"]):
        raise DataError(f"{path}: added tokens that strip or need whole words are not supported")

    if model.get("byte_fallback"):
        pieces = _byte_fallback(path, spec, vocab, merges)
        if pieces["spaces"] == "prepend" and any(t["normalized"] for t in added.values() if not t["special"]):
            raise DataError(f"{path}: added tokens that are normalized are not supported next to a Prepend normalizer")
    else:
        pieces = _byte_level(path, spec, vocab, merges, {t: a["id"] for t, a in added.items()})

    eos, pad = named("eos_token") or ("<|endoftext|>" if "<|endoftext|>" in added else None), named("pad_token")
    if eos is None:
        raise DataError(f"{path}: no eos_token in tokenizer_config.json and no eos_token_id of a special token in config.json")
    files = {**beside["files"], **files}
    if "tokenizer.json" not in files:
        made = {**spec, "added_tokens": sorted(added.values(), key=lambda t: t["id"])}
        if bos and not templates:
            made["post_processor"] = bos_template(bos, added[bos]["id"])
        files["tokenizer.json"] = json.dumps(made, ensure_ascii=False).encode()
    return dict(pieces, eos=eos, pad=pad if pad in added else None, bos=bos, added=list(added.values()), files=files,
                special_text={role: names[role] for role in ROLES if names.get(role)},
                chat_template=beside["chat_template"])


def unread_flags(token):
    """True if an added token has a flag whose effect next to a match is not implemented. That of `rstrip` is (Phi-3)."""
    return token["lstrip"] or token["single_word"] or token["rstrip"] and token["normalized"]


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
    return dict(names=names, ids={r: model.get(r + "_id") for r in ROLES[:4]}, added=added, settings=config,
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


def from_tekken(path, spec):
    """Returns Tokenizer's arguments from Mistral's tekken.json: special tokens have the first ids, the ranks follow. Its
    vocabulary is longer than the model's, and older files do not name their special tokens."""
    config, named = spec["config"], spec.get("special_tokens")
    first = config["default_num_special_tokens"]
    size = config["default_vocab_size"] - first
    if named is None:
        named = [{"rank": i, "token_str": t} for i, t in enumerate(TEKKEN_SPECIAL)]
    special = {t["rank"]: t["token_str"] for t in named}
    special = {special.get(i, f"<SPECIAL_{i}>"): i for i in range(max(first, *special, 0))}
    ranks = {base64.b64decode(t["token_bytes"], validate=True): t["rank"] + first for t in spec["vocab"][:size]}
    if len(ranks) != size or set(ranks.values()) != set(range(first, first + size)) or len(special) != first:
        raise DataError(f"{path}: the ranks of the first {size} tokens are not 0 ... {size - 1}, or its special tokens are not "
                        f"default_num_special_tokens = {first} different ones")
    beside = read_companion_files(path.parent)
    return dict(encoding=encoding_of(path, config["pattern"], ranks, special), eos="</s>", bos="<s>",
                pad="<pad>" if "<pad>" in special else None, chat_template=beside["chat_template"],
                files=beside["files"], special_text={"unk_token": "<unk>"} if "<unk>" in special else {})


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
        if len(parts) > 2000:
            raise DataError(f"{path}: a token of {len(parts)} characters is not supported (at most 2000)")
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
    splits, symbols = _splits(path, _steps(spec.get("pre_tokenizer"), "pretokenizers")), byte_symbols()
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
    lacks, unknown = bytes(b for c, b in symbols.items() if c not in vocab), spec["model"].get("unk_token")
    if lacks and whole and len(made) < len(tokens):
        raise DataError(f"{path}: ignore_merges with tokens that no merge makes is not supported if the vocabulary lacks bytes")
    if lacks and unknown is not None and unknown not in vocab:
        raise DataError(f"{path}: the vocabulary lacks bytes, and its unk_token {unknown!r} too")
    for pattern, _ in splits[:-1]:
        try:
            python_regex(pattern)
        except (ValueError, re.error) as e:
            raise DataError(f"{path}: the regex {pattern!r} is not supported ({one_line(e)})") from None
    ranks |= {bytes([b]): max(ranks.values(), default=0) + 1 + k for k, b in enumerate(lacks)}  # tiktoken wants all; unused
    return dict(encoding=encoding_of(path, tiktoken_pattern(*splits[-1]), ranks), ids=ids, texts=texts, splits=splits,
                normal_form=forms[0] if forms else None, lacks=lacks,
                unknown=None if unknown is None else (vocab.get(unknown), bool(spec["model"].get("fuse_unk"))))


def _splits(path, steps):
    """Returns the splits that pre-tokenizer steps do one after another: [(regex, what becomes a piece)]. The pieces are the
    matches and the text between them ("all"), or only one of both ("matches", "gaps")."""
    types = [s["type"] for s in steps]
    if types[-1:] != ["ByteLevel"] or steps[-1].get("add_prefix_space") or not {"Split", "Digits"} >= set(types[:-1]):
        raise DataError(f"{path}: pre-tokenizer {' + '.join(types) or 'None'} is not supported with these options "
                        "(Split or Digits, then ByteLevel without a prefix space, are)")
    if types == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return [(GPT2_DIGITS_PATTERN, "matches")]
    splits = []
    for step in steps[:-1]:
        if step["type"] == "Digits":
            splits.append((r"\p{N}" if step.get("individual_digits") else r"\p{N}+", "all"))
            continue
        behavior, inverted = step["behavior"], bool(step.get("invert"))
        if behavior not in ("Isolated", "Removed"):
            raise DataError(f"{path}: a Split with behavior {behavior} is not supported (Isolated and Removed are)")
        pattern = step["pattern"].get("Regex")
        if pattern is None:
            pattern = re.sub(r"[!-/:;=?@\[-`{-~]", r"\\\g<0>", step["pattern"]["String"])
        node = parse_regex(path, pattern)
        if may_be_empty(node):
            raise DataError(f"{path}: a Split by the regex {pattern!r}, which matches empty text, is not supported")
        splits.append((regex_source(node), "all" if behavior == "Isolated" else "matches" if inverted else "gaps"))
    if steps[-1].get("use_regex", True):
        splits.append((GPT2_PATTERN, "matches"))
    elif not splits or splits[-1][1] == "gaps":
        splits.append((r"[\s\S]+", "matches"))
    return splits


def tiktoken_pattern(pattern, kept):
    """Returns the regex whose matches are the pieces. Text that `pattern` does not match is matched up to its next match."""
    return pattern if kept == "matches" else rf"{pattern}|(?:(?!{pattern})[\s\S])+"


def pieces_of(text, splits):
    """Yields the pieces of a text after `splits`, done by Python: tiktoken knows one regex only."""
    if not splits:
        yield text
        return
    (pattern, kept), *later = splits
    done, pieces = 0, []
    for match in python_regex(pattern).finditer(text):
        pieces += [text[done:match.start()]] * (kept != "matches") + [match[0]] * (kept != "gaps")
        done = match.end()
    pieces += [text[done:]] * (kept != "matches")
    for piece in filter(None, pieces):
        yield from pieces_of(piece, later)


# ---- Regexes --------------------------------------------------------------------------------------------------------
# `tokenizers` runs them with Oniguruma and tiktoken with fancy-regex, which read some constructs differently. So we accept
# only constructs that mean the same in both, or that we can write so that they do. A parsed regex is nested tuples:
# ("any", branches), ("all", parts), ("char", source, ignore case), ("group", opening, inside),
# ("repeat", part, quantifier, possessive).

CLASSES = ("L Lu Ll Lt Lm Lo M Mn Mc Me N Nd Nl No P Pc Pd Ps Pe Pi Pf Po S Sm Sc Sk So Z Zs Zl Zp C Cc Cf Co Cn Letter Number "
           "Mark Punctuation Symbol Separator Alphabetic Uppercase Lowercase White_Space Han Latin Greek Cyrillic Armenian "
           "Hebrew Arabic Devanagari Bengali Gurmukhi Gujarati Tamil Telugu Kannada Malayalam Sinhala Thai Lao Tibetan Myanmar "
           "Georgian Hangul Ethiopic Khmer Mongolian Hiragana Katakana Bopomofo Common Inherited").replace(" ", "|")
CHAR = r"[^\\\[\](){}|*+?^$.]"
ESCAPE = rf"\\(?:[sSdDrntfv]|[pP]\{{\^?(?:{CLASSES})\}}|u[0-9a-fA-F]{{4}}|[!-/:;=?@\[-`{{-~])"
ONE = r"(?:\\(?:[rntfv]|u[0-9a-fA-F]{4}|[!-/:;=?@\[-`{-~])|(?!&&|~~)[^\\\[\]-])"  # one character, in a class
QUANTIFIER = re.compile(r"(?:[*+?]|\{(\d+)(?:,(\d*))?\})")


def parse_regex(path, pattern, engine="oniguruma"):
    """Parses a regex written for `tokenizers` ("oniguruma") or "tiktoken". DataError if it contains anything else than what
    is known to mean the same in both, once regex_source has written it."""
    at = 0

    def refuse(why):
        raise DataError(f"{path}: the regex {pattern!r} is not supported: {why} at position {at}")

    def take(regex):
        nonlocal at
        match = re.compile(regex).match(pattern, at)
        at = match.end() if match else at
        return match and match[0]

    def branches(fold):
        found = [[]]
        while at < len(pattern) and pattern[at] != ")":
            if take(r"\|"):
                found.append([])
            else:
                found[-1].append(repeated(part(fold), fold))
        return "any", [("all", parts) for parts in found]

    def repeated(node, fold):
        nonlocal at
        match = QUANTIFIER.match(pattern, at)
        if not match:
            return node
        if may_be_empty(node):
            refuse("a repeat of what may be empty")
        if match[2] and int(match[2]) < int(match[1]):
            refuse("an interval that goes backwards")
        at, braces = match.end(), match[1] is not None
        if braces and match[2] is None and pattern[at:at + 1] == "?":
            refuse("`{n}?`, which engines read differently,")
        lazy = take(r"\?") or ""
        node = "repeat", node, match[0] + lazy, False
        if not lazy and take(r"\+"):
            if braces and engine == "oniguruma":  # only there, {1,3}+ repeats the interval once more
                node = "repeat", ("group", "(?:", node), "+", False
            else:
                node = *node[:3], True
        if QUANTIFIER.match(pattern, at):
            refuse("a quantifier after a quantifier")
        return node

    def part(fold):
        nonlocal at
        begin = at
        if opening := take(r"\((?!\?)|\(\?(?:[:=!>]|<[=!]|i:)"):
            inside = branches(fold or opening == "(?i:")
            source = pattern[begin:at]
            if opening == "(?i:" and re.search(r"(?i)s[st]|f[fil]", re.sub(r"\[.*?\]", "|", re.sub(r"\(\?i?:|\)", "", source))):
                refuse("letters that are also one character, such as ss and \u00df, when case is ignored,")
            if not take(r"\)"):
                refuse("an unclosed group")
            return "group", "(?:" if opening == "(" else opening, inside
        if take(r"\$"):
            return "group", "(?!", ("char", r"[^\n]" if engine == "oniguruma" else r"[\s\S]", False)
        if take(r"\\z"):
            return "group", "(?!", ("char", r"[\s\S]", False)
        if fold:
            found = take(r"[A-Za-z' ]|\[[A-Za-z' ]+\]")
        else:
            found = take(rf"{CHAR}|\.|{ESCAPE}") or char_class()
        if not found:
            refuse(f"`{pattern[at:at + 2]}`, which is not known to mean the same in tiktoken,")
        return "char", found, fold

    def char_class():
        begin = at
        if not take(r"\[(?!:)\^?"):
            return None
        take(r"\]|-")
        while not take("-?\\]"):
            if not (take(rf"{ONE}-{ONE}|{ONE}|{ESCAPE}|&&(?!&)") or char_class()):
                refuse(f"`{pattern[at:at + 2]}` in a class")
        return pattern[begin:at]

    node = branches(False)
    if at < len(pattern):
        refuse("an unopened group")
    return node


def may_be_empty(node):
    kind = node[0]
    if kind in ("any", "all"):
        return (any if kind == "any" else all)(map(may_be_empty, node[1]))
    if kind == "group":
        return node[1] in ("(?=", "(?!", "(?<=", "(?<!") or may_be_empty(node[2])
    return kind == "repeat" and (node[2][0] in "*?" or node[2].startswith("{0"))


def regex_source(node, char=lambda source, fold: source, atomic="(?>{})".format):
    """Returns a parsed regex as text for both engines."""
    kind, inner = node[0], lambda n: regex_source(n, char, atomic)
    if kind in ("any", "all"):
        return ("|" if kind == "any" else "").join(map(inner, node[1]))
    if kind == "char":
        return char(*node[1:])
    if kind == "group":
        return atomic(inner(node[2])) if node[1] == "(?>" else f"{node[1]}{inner(node[2])})"
    repeat = inner(node[1]) + node[2]
    return atomic(repeat) if node[3] else repeat


@functools.lru_cache(64)
def _class_of(source, fold):
    """Returns the characters that `source` matches, as a class for Python's own regexes: asked from tiktoken itself, whose
    version of Unicode is that of `tokenizers`, while Python's may be another."""
    encoding = tiktoken.Encoding("", pat_str=f"(?i:{source})" if fold else source, special_tokens={},
                                 mergeable_ranks={bytes([b]): b for b in range(256)})
    codes = list(map(ord, bytes(encoding.encode_ordinary(_every_character())).decode()))
    if not codes:
        return r"[^\s\S]"
    breaks = [k for k in range(1, len(codes)) if codes[k] != codes[k - 1] + 1]
    return "[" + "".join(rf"\U{codes[a]:08x}-\U{codes[b - 1]:08x}" for a, b in zip([0, *breaks], [*breaks, len(codes)])) + "]"


@functools.lru_cache(1)
def _every_character():
    return "".join(map(chr, [*range(0xd800), *range(0xe000, 0x110000)]))


@functools.lru_cache(64)
def python_regex(pattern):
    """Returns a regex of `regex_source` as a compiled one of Python's."""
    names = itertools.count()

    def char(source, fold):
        return re.escape(source) if len(source) == 1 and not fold and source != "." else _class_of(source, fold)

    def atomic(source):  # Python 3.10 has no other spelling
        name = f"n{next(names)}"
        return f"(?:(?=(?P<{name}>{source}))(?P={name}))"
    return re.compile(regex_source(parse_regex("", pattern, "tiktoken"), char, atomic).replace("(?i:", "(?:"))


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
    # A byte's token may be missing if no text needs it: its character has a token (Gemma's tab), or UTF-8 never has this byte.
    never = {0xc0, 0xc1, *range(0xf5, 0x100)} | {b for b in range(128) if ("▁" if b == 32 else chr(b)) in vocab}
    if missing := [n for b, n in enumerate(names) if n not in vocab and b not in never]:
        raise DataError(f"{path}: byte_fallback without {' '.join(missing[:3])} in the vocabulary is not supported")
    byte, order = [vocab.get(n) for n in names], pair_ranks(path, vocab, merges)
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
    texts = {i: t.replace("▁", " ").encode() for t, i in vocab.items()} | {
        i: bytes([b]) for b, i in enumerate(byte) if i is not None}
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
        elif type_ == 4:       # user-defined: found in any text, as non-special added tokens are
            added.append({"id": i, "content": text, **FLAGS})
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
        value = parse_json(content)
    except ValueError as e:
        raise DataError(f"{path}: not JSON ({one_line(e)})") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object")
    return value


def read_json(path):
    try:
        return _json_object(path, Path(path).read_bytes())
    except OSError as e:
        raise DataError(f"{path}: not JSON ({one_line(e)})") from None
