"""Text <-> token ids: one tiktoken.Encoding for every BPE tokenizer file.

    load_tokenizer(name_or_path) -> Tokenizer     checkpoint folders, tokenizer.json, GPT-2's files, tiktoken ranks,
                                                  SentencePiece models, names (tokenizer_files.py reads the files)
    train_bpe(texts, vocab_size) -> Tokenizer     a new one, such as the built-in task's
"""

import base64
import collections
import functools
import itertools
import json
import re
import sys
import unicodedata
from pathlib import Path

import tiktoken

from nanorlhf.errors import DataError, one_line
from nanorlhf.files import local_folder, parse_json
from nanorlhf.formats.chat import other_end
from nanorlhf.formats.checkpoints import read_end_ids
from nanorlhf.formats.tokenizer_files import (BYTE_LEVEL, FLAGS, GPT2_PATTERN, TOKENIZER_FILES, bos_template, byte_symbols,
                                              encoding_of, from_sentencepiece, from_spec, from_tekken, from_vocab_and_merges,
                                              parse_regex, pieces_of, read_companion_files, read_json, regex_source,
                                              spec_of, unread_flags)

LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_NAMED = ("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
                "finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id",
                "python_tag", "image")  # ids 128000 ... 128011, then reserved_special_token_2 ... 245
SPACE = re.compile(r"[^\S\x1c-\x1f]*")  # white space as Unicode and `tokenizers` have it; Python adds the separators
VOCAB_AND_MERGES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))  # OpenAI's names, Hugging Face's names


class Tokenizer:
    """Text <-> ids: a tiktoken.Encoding, plus what an Encoding lacks (eos, pad, bos, normaliser).

    eos_id      what training appends to every response. end_ids: all ids that end a sampled one, eos_id first; a checkpoint may
                name several in config.json or generation_config.json.
    pad_id      fills rows on the right; never eos (a model trained with pad = eos never learns to stop).
    bos_id      the id that this family puts before a text, or None if it puts none (GPT-2, Qwen, Pythia).
    vocab_size  highest id + 1, special tokens included; a checkpoint's embedding may be larger, never smaller.
    special     {token: id} of all added tokens; plain: only those that are matched in any text (`special: false`).
    chat_template, special_text    Jinja source or None; those of its variables bos_token, eos_token, ... that are known.
    """

    def __init__(self, encoding, eos, pad=None, bos=None, *, added=None, ids=None, texts=None, normal_form=None, spaces=None,
                 strip=False, splits=(), lacks=b"", unknown=None, files=None, special_text=None, chat_template=None, ends=()):
        """eos, pad, bos: names of added tokens.

        added    Hugging Face's entries {id, content, special, normalized, ...}; None: the encoding's special tokens
        ids      rank -> id, or the list of ids that a rank stands for; None: ranks are ids
        texts    {id: bytes} that `decode` writes; None: the encoding's
        spaces   when SentencePiece puts a space before a text: "prepend" (always), "always" or "first" (if there is none
                 yet: also after every added token, or only before the whole text), "never"; None: not SentencePiece
        strip    whether decoding a text removes that space
        splits   what pieces_of needs, if the encoding's regex alone does not make the pieces
        lacks    bytes without an id: left out of a text, or replaced by `unknown`: (id, one for all neighbours?)
        files    {name: bytes} that `save` writes; normal_form: "NFC", "NFD", "NFKC", "NFKD" or None
        ends     more ids that end a response. Only special tokens count, since a checkpoint's configuration that was copied from
                 another model may name any id
        """
        if added is None:
            added = [{**FLAGS, "content": t, "id": i, "special": True} for t, i in encoding._special_tokens.items()]
        self.encoding, self.ids, self.splits, self.lacks, self.unknown = encoding, ids, splits, lacks, unknown
        lacking = {bytes([b]) for b in lacks}
        self.ranks = {b: r for b, r in encoding._mergeable_ranks.items() if b not in lacking}
        self.normal_form, self.spaces, self.strip = normal_form, spaces, strip
        self.files, self.chat_template = files or {}, chat_template
        self.special = special = {t["content"]: t["id"] for t in added}
        self.plain = {t["content"]: t["id"] for t in added if not t["special"]}
        self._plain_ids = set(self.plain.values())
        self._in_steps, lack = len(splits) > 1 or bool(lacks), re.escape(lacks)
        self._with_gaps = re.compile(b"([%b]+)|([^%b]+)" % (lack, lack)) if lacks else None
        self._several = {r: i for r, i in enumerate(ids or ()) if isinstance(i, list)}
        self._id = ids and [None if isinstance(i, list) else i for i in ids]
        texts = {i: b for b, i in self.ranks.items()} if texts is None else texts
        self.vocab_size = max([*texts, *special.values()]) + 1
        for name in filter(None, (eos, pad, bos)):
            if name not in special:
                raise DataError(f"tokenizer {encoding.name}: {name!r} is not one of its special tokens")
        self.eos_id, self.bos_id = special[eos], special[bos] if bos else None
        self.end_ids = tuple(dict.fromkeys([self.eos_id, *(i for i in ends if i in set(special.values()) - self._plain_ids)]))
        self.special_text = {"eos_token": eos} | ({"bos_token": bos} if bos else {}) | (special_text or {})
        # A pad with another role would mislead whoever finds the end of a row by it. <unk> has none if every text can be
        # encoded without it: LLaMA has no other spare token.
        unused = None if lacks else self.special_text.get("unk_token")
        roles = {role: t for role, t in self.special_text.items() if role not in ("pad_token", *["unk_token"] * (not lacks))}
        taken = {eos, bos, *roles.values()}
        spare = sorted(("pad" not in t, not re.search("reserved|unused|control", t), t != unused, i) for t, i in special.items()
                       if t not in taken and i not in self.end_ids and t not in self.plain and t not in (chat_template or ""))
        if pad is not None and pad not in taken:
            self.pad_id = special[pad]
        else:
            # Without a spare special token any row of the embedding will do, because masks come from lengths and never
            # from pad ids. GPT-2 is such a case: its pad is id 0, "!".
            self.pad_id = spare[0][-1] if spare else min(texts.keys() - special.values())
        self._bytes = {i: t.encode() for t, i in self.plain.items()} | texts
        self._names = {special[token]: token.encode() for token in special.keys() - self.plain.keys()}
        for i in self._names:
            self._bytes.pop(i, None)
        # tiktoken matches overlapping special tokens in hash order, so we match them ourselves, the longest first. As in
        # `tokenizers`, a `normalized` token is searched for in the normalised text; without a normaliser that is the text.
        late = {t["content"] for t in added if t["normalized"] and (normal_form or spaces == "prepend")}
        self._early, self._late = (
            (tokens, _any_of(tokens)) for tokens in ({t: i for t, i in special.items() if t and t not in late},
                                                     {self._normal(t, "text"): special[t] for t in late if t}))
        self._unread = {t["id"] for t in added if unread_flags(t)}
        self._rstrip = {t["id"] for t in added if t["rstrip"]}

    def encode(self, text, start=True):
        """Returns the ids of a text. Strings of special tokens in it are treated as ordinary text; no BOS, no EOS.

        start=False: the text continues another one, so a SentencePiece family puts no space before it."""
        return self._encode(text, start, self._plain_ids)

    def encode_marked(self, text, start=True, mark=""):
        """Does the same, but strings of special tokens become their ids: for text from a chat template. `mark` is removed
        from the text after these strings have been found, so a `mark` inside such a string keeps it ordinary text."""
        return self._encode(text, start, None, mark)

    def _encode(self, text, start, known, mark=""):
        try:
            text.encode()  # tiktoken would silently encode U+FFFD in place of an unpaired surrogate
        except UnicodeEncodeError as e:
            raise DataError(f"text with an unpaired surrogate (position {e.start}) is not Unicode") from None
        if not self.spaces and len(text) > 100_000 and re.search(r"(?<!\s)\s{100001}", text):
            # The lookbehind keeps the search linear. Longer runs are too deep for tiktoken's regex engine.
            raise DataError("text with more than 100,000 whitespace characters in a row")
        ids, where = [], "text" if start else "rest"
        try:
            for part, i in self._cut(text, self._early, known):
                if i is None:
                    for piece, i in self._cut(self._normal(part, where), self._late, known):
                        ids += self._ordinary(piece.replace(mark, "") if mark else piece) if i is None else [i]
                else:
                    ids.append(i)
                where = "later"
        except BaseException as e:
            if type(e).__name__ != "PanicException":  # tiktoken's, which is not even an Exception
                raise
            raise DataError(f"{self.encoding.name}: its regex cannot split a text of {len(text)} characters") from None
        return ids

    def _cut(self, text, finder, known):
        """Yields (piece of text, None) and (token, id) in text order; only tokens with `known` ids count (None: all)."""
        (tokens, regex), done = finder, 0
        if tokens and known != set():
            for match in regex.finditer(text):
                token, i = match[0], tokens[match[0]]
                if known is None or i in known:
                    if i in self._unread:
                        raise DataError(f"{token!r} strips the space around it or needs a whole word, "
                                        "which is not supported")
                    if match.start() > done:
                        yield text[done:match.start()], None
                    yield token, i
                    done = (SPACE.match(text, match.end()) if i in self._rstrip else match).end()
        if done < len(text):
            yield text[done:] if done else text, None

    def _normal(self, text, where):
        """Returns the normalised text. where: at its start ("text"), after an added token ("later"), continued ("rest")."""
        if self.normal_form:
            # normalize sorts the marks on a character by insertion, in quadratic time: a long run of them we sort first
            if len(text) > 1000 and not unicodedata.is_normalized(self.normal_form, text):
                text = _long_runs_of_marks().sub(_sorted_marks, text)
            return unicodedata.normalize(self.normal_form, text)
        if self.spaces:
            text = text.replace("▁", " ")  # the ranks have a space for each "▁"
            if text and where != "rest" and (self.spaces == "prepend" or text[0] != " " and (
                    self.spaces == "always" or self.spaces == "first" and where == "text")):
                return " " + text
        return text

    def _ordinary(self, text):
        if self._in_steps:
            return [i for piece in pieces_of(text, self.splits[:-1]) for i in self._without_missing_bytes(piece)]
        return self._ids_of(self.encoding.encode_ordinary(text))

    def _without_missing_bytes(self, text):
        """Returns the ids of a text that only the last of the splits remains to split. Bytes without an id disappear after
        the splitting and before the merging, so their neighbours may be merged."""
        raw = text.encode()
        if len(raw.translate(None, self.lacks)) == len(raw) and len(text) <= 100_000:  # tiktoken gives up on long gaps
            return self._ids_of(self.encoding.encode_ordinary(text))
        ids, merged = [], self.encoding._encode_single_piece
        for raw in (piece.encode() for piece in pieces_of(text, self.splits[-1:])):
            if raw in self.ranks:  # a token with such bytes in it: ignore_merges finds whole pieces
                ids += self._ids_of([self.ranks[raw]])
            elif self.unknown is None:
                kept = raw.translate(None, self.lacks)
                ids += self._ids_of(merged(kept)) if kept else []
            else:
                unknown, fused = self.unknown
                for gone, kept in self._with_gaps.findall(raw):
                    ids += [unknown] * (1 if fused else len(gone)) if gone else self._ids_of(merged(kept))
        return ids

    def _ids_of(self, ranks):
        if self.ids is None:
            return ranks
        ids = [self._id[r] for r in ranks]
        if None in ids:  # a character outside the vocabulary, or a part of one: several byte ids
            return [i for r in ranks for i in self._several.get(r) or [self._id[r]]]
        return ids

    def decode(self, ids, start=True, special=False):
        """Returns the text of ids (list or 1-D tensor). Special tokens vanish, unless special=True; ids beyond the vocabulary
        vanish. Bytes that are not UTF-8 become U+FFFD: one per maximal part, while `tokenizers` writes one per byte for
        SentencePiece.

        start=False: the ids continue others that are decoded already, so a SentencePiece family's first space stays."""
        names = self._names if special else {}
        text = b"".join(names.get(i) or self._bytes.get(i, b"") for i in map(int, ids)).decode("utf-8", errors="replace")
        return text[1:] if start and self.strip and text[:1] == " " else text

    def same_ids(self, other):
        """Returns whether two tokenizers give every token the same id."""
        mine, theirs = (t.ranks if t.ids is None else {b: t.ids[r] for b, r in t.ranks.items()} for t in (self, other))
        return mine == theirs and self.eos_id == other.eos_id and self.special == other.special

    def save(self, folder):
        """Writes the tokenizer files of a Hugging Face checkpoint: new ones, or the exact bytes that were loaded, except for
        a pad token that is not ours (such as EOS)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = {i: t for t, i in self.special.items()}
        pad, new = names.get(self.pad_id), {}
        if "tokenizer_config.json" not in self.files:
            config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                      **self.special_text}
            config.pop("pad_token", None)
            for token, i in (("eos_token", self.eos_id), ("pad_token", self.pad_id), ("bos_token", self.bos_id)):
                if i in names:
                    config[token] = names[i]
            new["tokenizer_config.json"] = json.dumps(config, indent=2).encode()
        # transformers pads with this token, and reads a reward before config.json's pad: all must be the same.
        for name in {"tokenizer_config.json", "special_tokens_map.json"} & self.files.keys():
            config = parse_json(self.files[name])
            named = config.pop("pad_token", None)
            named = named["content"] if isinstance(named, dict) else named
            if named != pad and (named or self.special_text.get("pad_token") != pad):
                config |= {"pad_token": pad} if pad else {}
                new[name] = json.dumps(config, indent=2, ensure_ascii=False).encode()
        if "tokenizer.json" not in self.files:
            spec = _to_tokenizer_json(self.encoding, names.get(self.bos_id), self.special)
            new["tokenizer.json"] = json.dumps(spec, ensure_ascii=False).encode()
        for name, content in (self.files | new).items():
            (folder / name).write_bytes(content)


def _any_of(tokens):
    """Returns a regex for the longest of these tokens, grouped by first character: Python tries alternatives one by one."""
    endings = collections.defaultdict(list)
    for token in sorted(tokens, key=len, reverse=True):
        endings[token[0]].append(re.escape(token[1:]))
    return re.compile("|".join(f"{re.escape(first)}(?:{'|'.join(others)})" for first, others in endings.items()))


@functools.lru_cache(1)
def _long_runs_of_marks():
    marks = [c for c in map(chr, range(0x110000)) if unicodedata.combining(c)]
    low, high = ("".join(c for c in marks if (c < "\U00010000") == below) for below in (True, False))
    return re.compile(f"(?:[{low}]|(?=[\U00010000-\U0010ffff])[{high}]){{300,}}")  # re is slow for large classes above U+FFFF


def _sorted_marks(run):
    marks = [mark for c in run[0] for mark in unicodedata.normalize("NFD", c)]
    return "".join(sorted(marks, key=unicodedata.combining))


def tokenizer_of(folder, known):
    """Returns the tokenizer of a checkpoint folder, or `known` if the files are identical: reading some takes seconds."""
    folder = local_folder(folder)
    files = {n: (folder / n).read_bytes() for n in TOKENIZER_FILES if (folder / n).is_file()}
    return known if "tokenizer_config.json" in files and files == known.files else load_tokenizer(folder)


def check_same_ids(option, folder, tokenizer):
    if not tokenizer_of(folder, tokenizer).same_ids(tokenizer):
        raise DataError(f"{option} {folder}: its tokenizer gives other ids than the policy's")


def load_tokenizer(name_or_path):
    """Returns the Tokenizer of `reviews` (the built-in task), a checkpoint folder, one of its tokenizer files
    (tokenizer.json, encoder.json + vocab.bpe, vocab.json + merges.txt, tiktoken ranks, a SentencePiece model, tekken.json),
    a tiktoken name such as "gpt2", or a hub name. Raises DataError for anything else."""
    if name_or_path == "reviews":  # a folder of that name is ./reviews
        return _reviews_tokenizer()
    path = Path(name_or_path)
    try:
        exists = path.is_dir() or path.is_file()
    except (ValueError, OSError):  # a name that no file can have
        exists = False
    if exists:
        return _of_checkpoint(path)
    if str(name_or_path) not in tiktoken.list_encoding_names():
        if (folder := local_folder(name_or_path)).is_dir():                            # downloaded from the hub
            return _of_checkpoint(folder)
        if isinstance(name_or_path, Path) or "/" in name_or_path:
            raise DataError(f"{name_or_path}: no such folder or file")
        raise DataError(f"{name_or_path}: neither `reviews`, nor a folder or file, nor one of tiktoken's names "
                        f"({', '.join(tiktoken.list_encoding_names())})")
    try:
        encoding = tiktoken.get_encoding(str(name_or_path))
    except (OSError, ValueError) as e:  # tiktoken downloads the ranks on first use
        raise DataError(f"{name_or_path}: tiktoken could not fetch it ({type(e).__name__}); offline, give a folder "
                        "with tokenizer.json or vocab.json + merges.txt instead") from None
    return Tokenizer(encoding, "<|endoftext|>")


def _of_checkpoint(path):
    """Returns the Tokenizer of a folder or file. Prints one line if config.json or generation_config.json name other EOS ids,
    and one if the chat template ends an answer with none of them."""
    ends = read_end_ids(path if path.is_dir() else path.parent)
    tokenizer = Tokenizer(**_read(path), ends=ends)
    if ends and tokenizer.eos_id not in ends:
        configured, used = (", ".join(map(str, ids)) for ids in (ends, tokenizer.end_ids))
        _say_once(f"{path}: the tokenizer's EOS is id {tokenizer.eos_id}, the eos_token_id of its configuration {configured}. "
                  f"Training appends the tokenizer's; {used} end a sampled response"
                  + ("" if set(ends) <= {*tokenizer.end_ids} else " (other ids are no special tokens)"))
    if tokenizer.chat_template and (end := other_end(tokenizer)) is not None:
        token, ends = tokenizer.decode([end], start=False, special=True), tokenizer.end_ids
        _say_once(f"{path}: the chat template ends an answer with {token!r}, id {end}, but only {', '.join(map(str, ends))} ends "
                  f"a response: answers run on. If that is not meant, write \"eos_token_id\": {[end, *ends]} into config.json")
    return tokenizer


@functools.cache
def _say_once(line):
    print(line, file=sys.stderr)


def _read(path):
    """Reads Tokenizer's arguments from a checkpoint folder or one of its tokenizer files; DataError for any other."""
    try:
        if path.is_dir():
            pairs = [path / vocab for vocab, merges in VOCAB_AND_MERGES if (path / merges).exists()]
            ranks = [p for end in ("*.model", "*.model.v*", "*.tiktoken") for p in sorted(path.glob(end))]
            candidates = [path / "tokenizer.json", *pairs, *ranks, path / "tekken.json"]
            existing = [c for c in candidates if c.exists()]
            if not existing:
                raise DataError(f"{path}: no tokenizer.json, encoder.json + vocab.bpe, *.model, *.tiktoken or tekken.json "
                                "in it")
            path = existing[0]
        for vocab, merges in VOCAB_AND_MERGES:
            if path.name.endswith(vocab):
                return from_vocab_and_merges(path, vocab, merges)
        if path.suffix == ".tiktoken" or ".model" in path.suffixes:  # Mistral adds a version: tokenizer.model.v3
            content = path.read_bytes()
            return from_sentencepiece(path, content) if content[:1] == b"\n" else _from_rank_file(path, content)
        spec = read_json(path)
        if "config" in spec and "model" not in spec:
            return from_tekken(path, spec)
        return from_spec(path, spec, read_companion_files(path.parent), {"tokenizer.json": path.read_bytes()})
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OSError, RecursionError) as e:
        raise DataError(f"{path}: not a tokenizer file this can read ({type(e).__name__}: {one_line(e)})") from None


def _from_rank_file(path, content):
    """Reads tiktoken's rank file: `base64(token) rank` per line. We parse it because tiktoken's loader may return older
    content of the same path. All such files get Llama-3's pattern; Llama-3's own file also gets its special tokens."""
    ranks = {}
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
    encoding = encoding_of(path, LLAMA3_PATTERN, ranks, special)
    if len(names) == 2:
        return dict(encoding=encoding, eos="<|endoftext|>", pad="<|pad|>")
    return dict(encoding=encoding, eos="<|end_of_text|>", pad="<|finetune_right_pad_id|>", bos="<|begin_of_text|>")


def _to_tokenizer_json(encoding, bos, special):
    """Returns the tokenizer.json of an encoding whose ranks are its ids, with merges recovered from the ranks. bos: a name
    or None; special: {token: id}."""
    ranks, symbol = encoding._mergeable_ranks, {b: s for s, b in byte_symbols().items()}
    merges, never = [], max(ranks.values()) + 1
    for token in sorted(ranks, key=ranks.get):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:  # BPE of the token itself: if a merge makes it, then of the last two parts
            best = min((ranks.get(a + b, never), k) for k, (a, b) in enumerate(zip(parts, parts[1:])))
            if best[0] == never:
                break
            parts[best[1]:best[1] + 2] = [parts[best[1]] + parts[best[1] + 1]]
        if len(parts) == 2:
            merges.append(" ".join("".join(symbol[b] for b in p) for p in parts))
    # Tokens that no merge reaches (Llama-3 has some) occur only as a whole pre-token, which tiktoken looks up first.
    unreachable = len(merges) < sum(len(t) > 1 for t in ranks)
    vocab = {"".join(symbol[b] for b in token): rank for token, rank in ranks.items()} | special
    pattern = regex_source(parse_regex(encoding.name, encoding._pat_str, "tiktoken"))
    added = [{"id": i, "content": t, **FLAGS, "special": True} for t, i in sorted(special.items(), key=lambda item: item[1])]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return spec_of(vocab, merges, added, {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL | {"use_regex": False}]},
                   BYTE_LEVEL, post_processor=bos_template(bos, special[bos]) if bos else None,
                   model={"ignore_merges": unreachable})


def train_bpe(texts, vocab_size, pattern=GPT2_PATTERN, name="bpe"):
    """Learns byte-pair encoding (Sennrich et al. 2016) from texts: 256 bytes, merges, then <|endoftext|> and <|pad|>.

    The most frequent pair is merged first. Ties go to the larger pair of ids, so the result depends only on the counts. If
    no pair occurs twice any more, fewer than vocab_size tokens come out."""
    import regex  # tiktoken's own dependency; Python's re does not know \p{L}
    if vocab_size < 258:
        raise DataError(f"vocab_size {vocab_size} is too small: 256 bytes and 2 special tokens are always there")
    counts = collections.Counter(word for text in texts for word in regex.findall(pattern, text))
    words = [(list(word.encode()), n) for word, n in counts.items()]
    tokens = [bytes([b]) for b in range(256)]
    pairs, where = collections.Counter(), collections.defaultdict(set)  # pair -> count, pair -> words that have or had it
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
    encoding = encoding_of(name, pattern, {t: i for i, t in enumerate(tokens)}, special)
    return Tokenizer(encoding, "<|endoftext|>", "<|pad|>")


@functools.lru_cache(1)
def _reviews_tokenizer():
    from nanorlhf import reviews
    return train_bpe(reviews.corpus(4000, seed=0), 640, name="reviews")
