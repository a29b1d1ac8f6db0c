"""Tests of tokenizer.py: every family against the `tokenizers` library, its goldens and transformers; unsupported files."""

import base64
import json
import random
import struct
import sys
import unicodedata
from pathlib import Path

import pytest
import torch

from golden.make_tokenizer_goldens import TEXTS, VARIANTS, variant_of
from nanorlhf import data, tokenizer as tokenizer_file
from nanorlhf.data import load_records
from nanorlhf.errors import DataError
from nanorlhf.formats.tokenizer_files import pieces_of
from nanorlhf.tokenizer import load_tokenizer

DATA = Path(__file__).parents[2] / "shared" / "data"
GOLDENS = json.loads((Path(__file__).parent / "golden" / "tokenizer.json").read_text(encoding="utf-8"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the public data files are not at {DATA}")
SPECIALS = "<|endoftext|><|pad|><|begin_of_text|><|eot_id|>"


@pytest.fixture(scope="module")
def gpt2():
    if not DATA.is_dir():
        pytest.skip(f"the public data files are not at {DATA}")
    return load_tokenizer(DATA / "tokenizers" / "gpt2_encoder.json")


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("tokenizers", reason="needs tokenizers (the `parity` extra)")


@pytest.fixture(scope="module")
def many():
    """10,000 varied strings: characters that stress the regexes, grapheme clusters, any code points, long runs, English."""
    rng = random.Random(1)
    alphabet = list("  \n\n\t\r'sSdDtTlL09aeiou\u0130\u017fée\u0301中文😀\u200d\u0085\u00a0\u2003.,!?<|>１２\u0660½\ufeffZz▁")
    clusters = ["👨\u200d👩\u200d👧", "🇩🇪", "👍🏽", "e\u0323\u0301", "\u212b", "\u1112\u1161\u11ab", "한국어", "日本語", "ไทย", "Привет",
                "\u0627\u0644\u0639", "\u05e9\u05dc\u05d5", "\u0939\u093f\u0928", "https://a.b/c?d=1",
                "def f(x):\n    return", "3.14", "0x1F", "\0", "\x1b[0m", "\u2028", "\u200b", "\ufeff", " " * 9,
                "\n" * 4, "</s>", "<s>", " the", "The", "the", "cat", "is"]

    def code_point():
        low, high = rng.choice([(1, 0x250), (1, 0xd800), (0xe000, 0x110000)])
        return chr(rng.randrange(low, high))
    made = ["".join(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(4000)]
    made += ["".join(code_point() for _ in range(rng.randrange(30))) for _ in range(2000)]
    made += ["".join(rng.choices(clusters, k=rng.randrange(1, 12))) for _ in range(2500)]
    made += [rng.choice(clusters + alphabet) * rng.randrange(40) + rng.choice(clusters) for _ in range(500)]
    words = "The I'll 2024 don't   WE'VE naïve (sic) -- e.g. x=1;\n\n\tdef f(): \r\n".split(" ")
    return made + [" ".join(rng.choices(words, k=12)) for _ in range(1000)]


@pytest.fixture(scope="module")
def strings(many):
    """Every fourth of these strings, for tests that do not compare families."""
    return many[::4]


def test_decode_inverts_encode_for_any_text(tiny):
    hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis (the `test` extra)")

    @hypothesis.settings(max_examples=300, deadline=None, database=None)
    @hypothesis.given(hypothesis.strategies.text(hypothesis.strategies.characters(exclude_categories=["Cs"])))
    def check(text):
        ids = tiny.encode(text)
        assert tiny.decode(ids) == text
        assert all(0 <= i < tiny.eos_id for i in ids)
    check()


def test_special_token_strings_in_text_are_ordinary_text(tiny):
    ids = tiny.encode(SPECIALS)
    assert tiny.decode(ids) == SPECIALS
    assert not {tiny.eos_id, tiny.pad_id} & set(ids)


def test_trap_1_pad_is_never_eos(tiny):
    n = len(tiny.ranks)
    assert (tiny.eos_id, tiny.pad_id, tiny.bos_id, tiny.vocab_size) == (n, n + 1, None, n + 2)
    import tiktoken
    for special, pad in (({"<|endoftext|>": 256}, 0), ({"<|endoftext|>": 300, "<|other|>": 299}, 299),
                         ({"<|endoftext|>": 256, "<|x|>": 257, "<|my_pad|>": 258}, 258)):
        encoding = tiktoken.Encoding("t", pat_str=tokenizer_file.GPT2_PATTERN, special_tokens=special,
                                     mergeable_ranks={bytes([b]): b for b in range(256)})
        tokenizer = tokenizer_file.Tokenizer(encoding, "<|endoftext|>", "<|endoftext|>")  # asks for pad = eos
        assert tokenizer.pad_id == pad != tokenizer.eos_id
    low = tiktoken.Encoding("t", pat_str=tokenizer_file.GPT2_PATTERN, special_tokens={"<|endoftext|>": 0},
                            mergeable_ranks={bytes([b]): b + 1 for b in range(256)})
    assert tokenizer_file.Tokenizer(low, "<|endoftext|>").pad_id == 1


def test_decode_never_fails(tiny):
    cat = tiny.encode(" cat")
    assert tiny.decode([tiny.eos_id, *cat, tiny.pad_id, 10**6, -1]) == " cat"
    assert tiny.decode(torch.tensor(cat)) == " cat"
    assert tiny.decode([0xff, 0x41]) == "\ufffdA"
    assert tiny.decode([]) == "" and tiny.encode("") == []


def test_hostile_text_gives_a_one_line_error(tiny):
    for text in ("ok\ud800", "\udfff", " " * 200_000):
        with pytest.raises(DataError) as e:
            tiny.encode(text)
        assert "\n" not in str(e.value)
    assert len(tiny.encode("a" * 200_000)) >= 1


def test_bpe_training_depends_on_counts_only():
    texts = ["low lower lowest", "new newer newest", "wide wider"] * 3
    a, b = tokenizer_file.train_bpe(texts, 270), tokenizer_file.train_bpe(texts[::-1], 270)
    assert a.ranks == b.ranks and len(a.ranks) == 268 and a.vocab_size == 270
    assert tokenizer_file.train_bpe(["abab abab"], 10_000).vocab_size < 270  # then no pair occurs twice
    for word, ids in (("abab", [257]), ("ab", [256]), ("abc", [256, 99])):
        assert tokenizer_file.train_bpe(["abab"] * 4, 260).encode(word) == ids
    with pytest.raises(DataError, match="too small"):
        tokenizer_file.train_bpe(texts, 257)


def same(a, b):
    fields = ("ranks", "ids", "special", "plain", "eos_id", "pad_id", "bos_id", "vocab_size", "normal_form", "spaces", "strip",
              "chat_template", "_bytes")
    return a.same_ids(b) and all(getattr(a, f) == getattr(b, f) for f in fields)


def test_saving_and_loading_keeps_the_tokenizer_and_its_bytes(tiny, strings, tmp_path):
    tiny.save(tmp_path / "a")
    again = load_tokenizer(tmp_path / "a")
    assert same(again, tiny) and all(again.encode(s) == tiny.encode(s) for s in strings)
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    own = load_tokenizer(str(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "gone")  # the source may be deleted during a long run
    own.save(tmp_path / "b")
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {p.name for p in (tmp_path / "b").iterdir()} == names
    assert all((tmp_path / "b" / n).read_bytes() == (tmp_path / "gone" / n).read_bytes() for n in names)


def saved_as_transformers_reads_it(tokenizer, strings, folder):
    transformers = pytest.importorskip("transformers", reason="needs transformers (the `parity` extra)")
    tokenizer.save(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.encode(s) for s in strings]
    assert [theirs.encode(s, add_special_tokens=False) for s in strings] == ids
    assert [theirs.decode(i) for i in ids] == strings
    assert (theirs.eos_token_id, theirs.bos_token_id, len(theirs)) == (
        tokenizer.eos_id, tokenizer.bos_id, tokenizer.vocab_size)
    assert theirs.pad_token_id == (tokenizer.pad_id if tokenizer.pad_id in tokenizer.special.values() else None)
    again = load_tokenizer(folder)
    assert same(again, tokenizer) and [again.encode(s) for s in strings] == ids
    return theirs


def test_transformers_reads_a_saved_trained_tokenizer(tiny, strings, tmp_path):
    saved_as_transformers_reads_it(tiny, strings, tmp_path)


def test_transformers_reads_a_saved_gpt2_tokenizer(gpt2, strings, tmp_path):
    assert (gpt2.vocab_size, gpt2.eos_id, gpt2.pad_id, gpt2.bos_id) == (50257, 50256, 0, None)
    assert gpt2.encode("Hello world") == [15496, 995]
    saved_as_transformers_reads_it(gpt2, strings, tmp_path)


@needs_data
def test_transformers_reads_a_saved_rank_file(strings, tmp_path):
    small = load_tokenizer(DATA / "tokenizers" / "tiktoken_small.model")
    assert (small.vocab_size, small.eos_id, small.pad_id) == (2002, 2000, 2001)
    saved_as_transformers_reads_it(small, strings, tmp_path)


@needs_data
def test_llama3_has_its_published_ids_in_transformers_too(strings, tmp_path):
    llama = load_tokenizer(DATA / "tokenizers" / "llama3_tokenizer.model")
    assert (llama.vocab_size, llama.bos_id, llama.eos_id, llama.pad_id) == (128256, 128000, 128001, 128004)
    assert llama.special["<|eot_id|>"] == 128009 and llama.special["<|reserved_special_token_245|>"] == 128255
    assert data.encode_prompt(llama, "") == [128000]
    theirs = saved_as_transformers_reads_it(llama, strings, tmp_path)
    assert theirs.encode("hi") == data.encode_prompt(llama, "hi")


def test_tiktoken_patterns_survive_saving(tiny, strings, tmp_path):
    import tiktoken
    import tiktoken_ext.openai_public as public
    cl100k = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
              r"|\s*[\r\n]|\s+(?!\S)|\s")
    for k, pattern in enumerate((getattr(public, "r50k_pat_str", tokenizer_file.GPT2_PATTERN), cl100k)):
        encoding = tiktoken.Encoding("t", pat_str=pattern, mergeable_ranks=tiny.ranks,
                                     special_tokens={"<|endoftext|>": 400, "<|fim|>": 405})  # ids with gaps
        tokenizer = tokenizer_file.Tokenizer(encoding, "<|endoftext|>")
        tokenizer.save(tmp_path / str(k))
        again = load_tokenizer(tmp_path / str(k))
        assert (again.eos_id, again.pad_id) == (400, 405)
        assert all(again.encode(s) == tokenizer.encode(s) for s in strings)
        if k == 1 and sys.modules.get("transformers"):
            theirs = sys.modules["transformers"].AutoTokenizer.from_pretrained(tmp_path / str(k))
            assert all(theirs.encode(s, add_special_tokens=False) == tokenizer.encode(s) for s in strings)


def written(folder, spec, config=None, **more):
    folder.mkdir(exist_ok=True)
    for name, value in {"tokenizer.json": spec, "tokenizer_config.json": config, **more}.items():
        if value is not None:
            (folder / name.replace("__", ".")).write_text(json.dumps(value))
    return folder


def spec_of(tokenizer, added=()):
    """Returns the tokenizer.json of `tokenizer`, its special tokens replaced by `added`: [(id, content, special)]."""
    spec = tokenizer_file._to_tokenizer_json(tokenizer.encoding, None, {})
    spec["model"]["vocab"] = {t: i for t, i in spec["model"]["vocab"].items() if t not in tokenizer.special}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec["added_tokens"] = [{"id": i, "content": t, "special": s, **flags} for i, t, s in added]
    return spec


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
FAMILIES = ("gpt2", "gptj", "pythia", "qwen", "llama3", "opt", "smollm", "any order")


def shuffled(vocab, seed):
    ids = list(vocab.values())
    random.Random(seed).shuffle(ids)
    return dict(zip(vocab, ids))


def family_spec(family, tiny):
    """Returns a tokenizer.json with the options of this family and the small vocabulary."""
    n = len(tiny.ranks)
    spec = spec_of(tiny, [(n, "<|endoftext|>", True)])
    spec["pre_tokenizer"] = BYTE_LEVEL
    vocab, merges, added = spec["model"]["vocab"], spec["model"]["merges"], spec["added_tokens"]
    if family == "qwen":  # NFC, a Split regex, and added tokens that are matched inside ordinary text
        spec = spec_of(tiny, [(n, "<|endoftext|>", True), (n + 1, "<tool_call>", False), (n + 2, "<tool", False)])
        spec["normalizer"] = {"type": "NFC"}
        spec["model"]["merges"] = [m.split(" ") for m in merges]
    if family == "pythia":  # special tokens at ids 0 and 1; runs of spaces as overlapping added tokens, found after NFC
        spec = spec_of(tiny, [(0, "<|endoftext|>", True), (1, "<|padding|>", True),
                              *((n + 2 + k, " " * (24 - k), False) for k in range(23)), (n + 25, "K!", False)])
        for token in spec["added_tokens"][2:]:
            token["normalized"] = True
        spec["model"]["vocab"] = {"<|endoftext|>": 0, "<|padding|>": 1} | {t: i + 2 for t, i in vocab.items()}
        spec["normalizer"], spec["pre_tokenizer"] = {"type": "NFC"}, BYTE_LEVEL
    if family == "gptj":
        added += [{**added[0], "id": n + 1 + k, "content": f"<|extratoken_{k}|>", "special": False, "normalized": True}
                  for k in range(12)]
    if family == "llama3":  # every split of a token is a merge; a token that no merge reaches matches as a whole pre-token
        parts = {t: i for t, i in vocab.items() if len(t) > 1}
        spec["model"]["merges"] = [[t[:k], t[k:]] for t in parts for k in range(1, len(t)) if t[:k] in vocab and t[k:] in vocab]
        vocab["Ġsitcat"], added[0]["id"], spec["model"]["ignore_merges"] = n, n + 1, True
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": tokenizer_file.LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False},
            {**BYTE_LEVEL, "use_regex": False}]}
    if family == "opt":  # fairseq's ids; special tokens are in the vocabulary but are not added tokens
        vocab |= {"<s>": n, "<pad>": n + 1, "</s>": n + 2, "madeupword0000": n + 3}
        spec["model"]["vocab"], spec["added_tokens"] = shuffled(vocab, 0), []
    if family == "any order":  # merges in an order that was never learnt: some tokens cannot be reached
        random.Random(0).shuffle(merges)
    if family == "smollm":
        spec["pre_tokenizer"] = {
            "type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}
    return spec


def compare(library, ours, folder, texts):
    """Compares ordinary text, text with special tokens, and the decoding of each id with the library."""
    theirs = library.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def ids(encode_special_tokens):
        theirs.encode_special_tokens = encode_special_tokens
        return [e.ids for e in theirs.encode_batch(texts, add_special_tokens=False)]
    assert [ours.encode_marked(t) for t in texts] == ids(False)
    ordinary = [ours.encode(t) for t in texts]
    assert ordinary == ids(True)
    assert [ours.decode(i) for i in ordinary] == theirs.decode_batch(ordinary)
    special = set(ours.special.values()) - set(ours.plain.values())
    assert all(ours.decode([i]) == ("" if i in special else theirs.decode([i])) for i in range(ours.vocab_size))
    return theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_byte_level_files_agree_with_the_tokenizers_library(family, tiny, many, library, tmp_path):
    names = {"eos_token": "</s>", "pad_token": "<pad>"} if family == "opt" else {"eos_token": "<|endoftext|>"}
    folder = written(tmp_path / family, family_spec(family, tiny), names)
    ours = load_tokenizer(folder)
    texts = many + ["a <tool_call> b<tool><tool_call", "x" + " " * 50 + "y", "  1  23 \n4", "e\u0301 \u212b",
                    "a<|extratoken_1|>0", "a<|extratoken_11|> b<|endoftext|>", " sitcat sitcats sitcatsitcat", "a\u212a! K!",
                    "<|padding|> <|endoftext|>"]
    if family == "opt":  # only transformers tells the library which tokens are special
        spec, n = family_spec(family, tiny), ours.special
        spec["added_tokens"] = [{**tokenizer_file.FLAGS, "id": n[t], "content": t, "special": True} for t in ("</s>", "<pad>")]
        written(folder, spec)
    theirs = compare(library, ours, folder, texts)
    assert ours.vocab_size == theirs.get_vocab_size() and ours.pad_id != ours.eos_id
    assert (ours.ids is None) == (family not in ("opt", "any order"))
    if family == "pythia":
        assert (ours.eos_id, ours.pad_id) == (0, 1)


def split(pattern, behavior="Isolated", invert=False):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


def with_splits(tiny, *splits):
    """Returns a tokenizer.json with these pre-tokenizers, and merges across the ends of all usual pieces."""
    rng = random.Random(0)
    mixed = tokenizer_file.train_bpe(["".join(rng.choices("ab12960 x\n's", k=6)) for _ in range(500)], 500, pattern=r"[\s\S]+")
    spec = spec_of(mixed, [(len(mixed.ranks), "<|endoftext|>", True)])
    steps = [*splits, {**BYTE_LEVEL, "use_regex": False}]
    return spec | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}


@pytest.mark.parametrize("unk, fuse", [(None, False), ("<unk>", False), ("<unk>", True)])
@pytest.mark.parametrize("family", ["gpt2", "smollm", "opt", "deepseek"])
def test_bytes_that_the_vocabulary_lacks(family, unk, fuse, tiny, many, library, tmp_path):
    """They vanish, or become the unknown token, between splitting and merging. SmolLM lacks 21 of the 256 bytes."""
    spec, symbols = family_spec("gpt2" if family == "deepseek" else family, tiny), tokenizer_file.byte_symbols()
    if family == "deepseek":
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*map(split, DEEPSEEK), {**BYTE_LEVEL, "use_regex": False}]}
    gone = {c for c, b in symbols.items() if b in (4, 0x21, 0xa9, 0xc0, 0xc3, 0xe4, 0xf0, 0xff)}
    spec["model"]["vocab"] = {t: i for t, i in spec["model"]["vocab"].items() if t not in gone}
    if unk:
        spec["model"]["vocab"][unk] = 900
    spec["model"] |= {"unk_token": unk, "fuse_unk": fuse}
    eos = "</s>" if family == "opt" else "<|endoftext|>"
    if family == "opt":
        spec["added_tokens"] = [{**tokenizer_file.FLAGS, "id": spec["model"]["vocab"][eos], "content": eos, "special": True}]
    ours = load_tokenizer(written(tmp_path, spec, {"eos_token": eos, "unk_token": unk}))
    texts = many + ["the\x04 cat", "th\u00e9e cat", "\u00e9\u00e9t", "!!", "\u4e2d!\u4e2d \u00e9!", "\x04"]
    theirs = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    assert [ours.encode(t) for t in texts] == [theirs.encode(t, add_special_tokens=False).ids for t in texts]
    assert ours.vocab_size == 1 + max(*spec["model"]["vocab"].values(), *ours.special.values())  # nothing stands for those bytes
    if unk:
        assert ours.encode("th\u00e9\u00e9e").count(900) == (1 if fuse else 4) and ours.pad_id != 900
    else:
        assert ours.encode("th\u00e9e cat") == ours.encode("the cat") and ours.encode("!\x04") == []
    ours.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert same(again, ours) and again.encode("a!b\x04") == ours.encode("a!b\x04")
    spec["model"]["unk_token"] = "<nowhere>"
    with pytest.raises(DataError, match="its unk_token '<nowhere>' too"):
        load_tokenizer(written(tmp_path, spec, {"eos_token": eos}))


def test_missing_bytes_without_the_library(tiny, tmp_path):
    spec = family_spec("gpt2", tiny)
    e_acute = {c for c, b in tokenizer_file.byte_symbols().items() if b in "\u00e9".encode()}
    spec["model"]["vocab"] = {t: i for t, i in spec["model"]["vocab"].items() if t not in e_acute}
    ours = load_tokenizer(written(tmp_path, spec))
    assert ours.encode("th\u00e9e cat") == ours.encode("the cat") == tiny.encode("the cat")
    assert ours.encode("\u00e9") == [] and ours.decode(ours.encode("\u00e8")) == "\ufffd" and ours.vocab_size == tiny.vocab_size - 1
    spec["model"] |= {"vocab": spec["model"]["vocab"] | {"<unk>": 900}, "unk_token": "<unk>"}
    for fuse in (False, True):
        spec["model"]["fuse_unk"] = fuse
        ids = load_tokenizer(written(tmp_path, spec)).encode("th\u00e9e cat")
        assert ids == [*tiny.encode("th"), *[900] * (1 if fuse else 2), *tiny.encode("e"), *tiny.encode(" cat")]


DEEPSEEK = (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
            "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
            "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SPLITS = {  # regexes of published tokenizers, then what engines read differently, then several splits and their options
    "gpt2": [split(tokenizer_file.GPT2_PATTERN)], "llama3": [split(tokenizer_file.LLAMA3_PATTERN)], "o200k": [split(O200K)],
    "o200k removed": [split(O200K, "Removed", True)], "deepseek": [*map(split, DEEPSEEK)],
    "deepseek coder": [*map(split, ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}"))],
    "trailing spaces": [split(r"\s+$"), split(r"\p{N}+")],
    "bloom": [split(" ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+")],
    "kimi": [split(r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{M}&&[^\p{Han}]]+|\p{N}{1,3}|\s+(?!\S)|\s+")],
    "cl100k as transformers writes it": [split(
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s")],
    "interval plus": [split(r"[0-9]{1,3}+|[a-z]{2}+")], "line ends": [split(r" $|[a-z]$")], "any but newline": [split("1.|.+?b")],
    "atomic": [split(r"(?>a|ab)b?|[0-9]++9|\p{^L}?+ ")], "lookaround": [split(r"(?<=\s)\S|(?<!1)9(?=6)|x(?!y)")],
    "gaps": [split("[0-9]")], "gaps removed": [split("[0-9]", "Removed", True)], "removed": [split(r"\s|9", "Removed")],
    "removed, then isolated": [split(" ", "Removed"), split("1|b")], "removed, then removed": [split("6"), split("1", "Removed")],
    "nothing": [], "string": [{**split(""), "pattern": {"String": "1."}}, split("[19]+", invert=True)],
    "digits": [{"type": "Digits", "individual_digits": False}, split(r"\s+|\S")]}


@pytest.mark.parametrize("name", SPLITS)
def test_splits_agree_with_the_tokenizers_library(name, tiny, many, library, tmp_path):
    rng = random.Random(0)
    texts = ["".join(rng.choices("ab1960 x\n's.\u4e2d\u30ab\u00e9\u0301\r", k=rng.randrange(24))) for _ in range(3000)]
    ours = load_tokenizer(written(tmp_path, with_splits(tiny, *SPLITS[name])))
    compare(library, ours, tmp_path, many + texts)


def test_pieces_of_several_splits():
    splits = [(r"\p{N}{1,3}", "all"), (" ", "gaps"), (r"\p{L}", "all")]
    assert list(pieces_of("ab12345 \u4e2dc", splits)) == ["a", "b", "123", "45", "\u4e2d", "c"]
    assert list(pieces_of("a1b", [("[0-9]", "matches")])) == ["1"] and list(pieces_of("", splits)) == []
    assert list(pieces_of("1960 'S", [("(?>[0-9]{1,3})|(?i:'s)", "all")])) == ["196", "0", " ", "'S"]


def test_a_split_without_the_library(tiny, tmp_path):
    """Text between matches stays; `{1,3}+` repeats the interval; `$` ends a line; a split's pieces end where the next one's do."""
    differ = 0
    for k, (splits, text, pieces) in enumerate((
            ([split("[a-z]+")], "ab 12", ["ab", " 12"]), ([split("[0-9]{1,3}+")], "1960", ["1960"]),
            ([split(r"\s+$")], "b \nb", ["b", " ", "\nb"]), ([split("[0-9]"), split(r"\s+(?!\S)")], "b  1", ["b", "  ", "1"]),
            ([split("1", "Removed")], "ab12", ["ab", "2"]))):
        ours = load_tokenizer(written(tmp_path / str(k), with_splits(tiny, *splits)))
        whole = load_tokenizer(written(tmp_path / "w", with_splits(tiny)))
        assert ours.encode(text) == sum(map(whole.encode, pieces), [])
        differ += ours.encode(text) != whole.encode(text)
    assert differ >= 2


@pytest.mark.parametrize("pattern, why", [
    (r"\w+", r"`\\w`"), (r"\bx", r"`\\b`"), ("^x", r"`\^x`"), (r"\Ax", r"`\\A`"), (r"x\Z", r"`\\Z`"), ("[[:alpha:]]", r"`\[:` in a"),
    (r"[\w]", r"`\\w` in a"), ("[a--b]", "`--` in a"), ("[a~~b]", "`~~` in a"), (r"\h", r"`\\h`"), (r"\p{Word}", r"`\\p`"),
    (r"(a)\1", r"`\\1`"), (r"a\K", r"`\\K`"), ("(?i)a", r"`\(\?`"), ("(?<n>a)", r"`\(\?`"), ("(?i:ss)", "ss and"),
    (r"(?i:\u00e9)", r"`\\u`"), ("a{2}?", "{n}"), ("a{3,1}", "backwards"), ("a{,2}", "`{,`"), ("a**", "after a quantifier"),
    ("(?:a*)+", "may be empty"), ("a*", "matches empty text"), (r"(?=\p{N})", "matches empty text"), ("a|", "matches empty"),
    ("a)", "unopened"), ("(a", "unclosed"), ("[a", "in a class"), ("*", r"`\*`"), ("[b-a]", "tiktoken cannot read"),
    (r"\pL", r"`\\p`"), (r"\x{41}", r"`\\x`")])
def test_a_regex_that_may_mean_something_else_is_refused(pattern, why, tiny, tmp_path):
    with pytest.raises(DataError, match=why) as e:
        load_tokenizer(written(tmp_path, with_splits(tiny, split(pattern))))
    assert str(e.value).startswith(str(tmp_path)) and "\n" not in str(e.value)
    with pytest.raises(DataError, match=why if pattern != "[b-a]" else "is not supported"):  # a split that is not the last
        load_tokenizer(written(tmp_path, with_splits(tiny, split(pattern), split("a"))))


def test_other_behaviors_and_endless_regexes_give_a_one_line_error(tiny, tmp_path):
    with pytest.raises(DataError, match="behavior MergedWithNext is not"):
        load_tokenizer(written(tmp_path, with_splits(tiny, split("a", "MergedWithNext"))))
    slow = load_tokenizer(written(tmp_path, with_splits(tiny, split(r"(?:a+(?!b))+c|[\s\S]"))))
    assert len(slow.encode("aac")) >= 1
    with pytest.raises(DataError, match="cannot split a text of 60 characters") as e:
        slow.encode("a" * 60)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("names", ["plain", "map", "config", "added"])
def test_a_folder_of_vocab_and_merges_loads_and_saves(names, tiny, strings, library, tmp_path):
    """OPT and GPT-2 folders have no tokenizer.json; special tokens are named in one of several small files, or in none."""
    spec, folder = family_spec("opt", tiny), tmp_path / "opt"
    vocab = dict(spec["model"]["vocab"])
    if names == "plain":
        vocab = spec_of(tiny)["model"]["vocab"]
    files = {"map": dict(special_tokens_map__json={"eos_token": {"content": "</s>"}, "bos_token": "</s>", "pad_token": "<pad>"},
                         tokenizer_config__json={"add_bos_token": True, "eos_token": None, "tokenizer_class": "GPT2Tokenizer"}),
             "config": dict(config__json={"eos_token_id": vocab.get("</s>"), "bos_token_id": vocab.get("</s>"),
                                          "pad_token_id": vocab.get("<pad>")}),
             "added": dict(added_tokens__json={"<tool>": len(vocab)}, tokenizer_config__json={
                 "eos_token": "</s>", "bos_token": "</s>", "pad_token": "<pad>", "add_bos_token": True,
                 "tokenizer_class": "GPT2Tokenizer"})}.get(names, {})
    written(folder, None, vocab__json=vocab, **files)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(spec["model"]["merges"]) + "\n", encoding="utf-8")
    ours = load_tokenizer(folder)
    if names == "plain":
        assert (ours.eos_id, ours.bos_id, ours.vocab_size) == (len(vocab), None, len(vocab) + 1) and ours.ids is None
    else:
        assert (ours.eos_id, ours.pad_id) == (vocab["</s>"], vocab["<pad>"])
        assert ours.bos_id == (None if names == "config" else vocab["</s>"])
    assert set(ours.plain) == ({"<tool>"} if names == "added" else set())
    ours.save(tmp_path / "saved")
    assert all((tmp_path / "saved" / p.name).read_bytes() == p.read_bytes() for p in folder.iterdir() if p.name != "config.json")
    again = load_tokenizer(tmp_path / "saved")
    assert all(getattr(again, f) == getattr(ours, f) for f in ("ranks", "ids", "special", "plain", "eos_id", "pad_id", "bos_id"))
    compare(library, ours, tmp_path / "saved", strings + ["</s>a<tool>b</s>"])


def test_transformers_reads_a_saved_opt_folder(tiny, strings, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers (the `parity` extra)")
    test_names = {"eos_token": "</s>", "bos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>", "add_bos_token": True,
                  "tokenizer_class": "GPT2Tokenizer", "clean_up_tokenization_spaces": False}
    spec, folder = family_spec("opt", tiny), tmp_path / "opt"
    written(folder, None, test_names, vocab__json=spec["model"]["vocab"], config__json={"model_type": "opt"})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(spec["model"]["merges"]), encoding="utf-8")
    ours = load_tokenizer(folder)
    ours.save(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_bytes((folder / "config.json").read_bytes())
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == (ours.eos_id, ours.bos_id, ours.pad_id)
    ids = [ours.encode(s) for s in strings if "</s>" not in s]
    assert [theirs.encode(s, add_special_tokens=False) for s in strings if "</s>" not in s] == ids
    assert theirs.encode("the cat") == data.encode_prompt(ours, "the cat")


# ---- SentencePiece --------------------------------------------------------------------------------------------------


def sentencepiece(folder, spec, **more):
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    return load_tokenizer(written(folder, spec, names | more))


@pytest.mark.parametrize("name", VARIANTS)
def test_sentencepiece_variants_equal_their_goldens(name, tmp_path):
    ours, golden = sentencepiece(tmp_path, variant_of(GOLDENS["spec"], name)), GOLDENS["cases"][name]
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 2, 0)
    assert [ours.encode(t) for t in TEXTS] == golden["ids"]
    assert [ours.encode_marked(t) for t in TEXTS] == [golden["marked"].get(str(k), i) for k, i in enumerate(golden["ids"])]
    assert [ours.decode(i) for i in golden["ids"]] == golden["decoded"]


@pytest.mark.parametrize("name", [*VARIANTS, "any order"])
def test_sentencepiece_files_agree_with_the_tokenizers_library(name, many, library, tmp_path):
    spec = variant_of(GOLDENS["spec"], "llama" if name == "any order" else name)
    if name == "any order":
        random.Random(0).shuffle(spec["model"]["merges"])
    ours = sentencepiece(tmp_path, spec)
    compare(library, ours, tmp_path, many + ["<|x|>" * 3 + "cat<|x|><|xy|>", "a<s>", "<s> </s>  a", "▁<s>x<s> <unk>"])


@pytest.mark.parametrize("seed", range(4))
def test_any_list_of_merges_agrees_with_the_tokenizers_library(seed, library, tmp_path):
    """Random lists: any order, several ways to make a token, repeated merges, unreachable tokens, ids in any order."""
    rng, refused = random.Random(seed), 0
    for k in range(40):
        fallback = bool(k % 2)
        spec = variant_of(GOLDENS["spec"], "llama") if fallback else {**GOLDENS["spec"], "normalizer": None, **dict.fromkeys(
            ("pre_tokenizer", "decoder"), BYTE_LEVEL)}
        letters = rng.choice(["ab", "abc", "é中a"] if fallback else ["ab", "abc"]) + "▁Ġ"[1 - fallback]
        vocab = {t: i for t, i in spec["model"]["vocab"].items() if i < 259} if fallback else {
            t: i for i, t in enumerate(tokenizer_file.byte_symbols())}
        if fallback:
            vocab |= {c: 259 + i for i, c in enumerate(letters[rng.randrange(2):])}
        tokens, merges = [c for c in letters if c in vocab], []
        for _ in range(rng.randrange(1, 14)):
            left, right = rng.choice(tokens), rng.choice(tokens)
            if len(left + right) < 10:
                tokens += [left + right] * (left + right not in vocab)
                vocab.setdefault(left + right, len(vocab))
                merges.append([left, right])
        if rng.random() < 0.4:
            merges = [[t[:n], t[n:]] for t in tokens for n in range(1, len(t)) if t[:n] in vocab and t[n:] in vocab]
        if rng.random() < 0.5:
            rng.shuffle(merges)
        eos = {**tokenizer_file.FLAGS, "id": vocab.get("</s>", len(vocab)), "content": "</s>", "special": True}
        whole = not fallback and rng.random() < 0.3
        spec |= {"added_tokens": [eos], "post_processor": None, "model": {
            **spec["model"], "vocab": vocab, "merges": merges, "byte_fallback": fallback, "ignore_merges": whole,
            "unk_token": "<unk>" if fallback else None}}
        if not fallback and rng.random() < 0.3:
            spec["model"]["vocab"] = shuffled(vocab, k)
        letters = letters.replace("▁", " ").replace("Ġ", " ")
        texts = ["".join(rng.choices(letters, k=rng.randrange(1, 30))) for _ in range(60)] + [c * 25 for c in letters]
        try:
            ours = load_tokenizer(written(tmp_path / str(k), spec, {"eos_token": "</s>"}))
        except DataError as e:
            refused += 1
            assert whole and "ignore_merges" in str(e)
            continue
        compare(library, ours, tmp_path / str(k), texts)
    assert refused < 12


@needs_data
def test_the_stories260k_tokenizer_agrees_with_both_libraries(many, library, strings, tmp_path):
    ours = load_tokenizer(DATA / "checkpoints" / "stories260K")
    assert data.encode_prompt(ours, "Once upon a time") == [1, 403, 407, 261, 378]
    assert (ours.eos_id, ours.vocab_size) == (2, 512)
    compare(library, ours, DATA / "checkpoints" / "stories260K", many)
    ours.save(tmp_path)
    before, after = ({n: (folder / n).read_bytes() for n in ("tokenizer.json", "tokenizer_config.json")}
                     for folder in (DATA / "checkpoints" / "stories260K", tmp_path))
    assert after["tokenizer.json"] == before["tokenizer.json"]    # only the config changes: a batch needs a pad token
    assert json.loads(after["tokenizer_config.json"]) == json.loads(before["tokenizer_config.json"]) | {"pad_token": "<unk>"}
    transformers = pytest.importorskip("transformers", reason="needs transformers (the `parity` extra)")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    # transformers 5 builds its own LLaMA tokenizer, which adds no space if the text begins with one
    texts = [s for s in strings if "<s>" not in s and "</s>" not in s and s[:1] not in (" ", "▁")]
    assert [theirs.encode(s) for s in texts] == [[1, *ours.encode(s)] for s in texts]


@pytest.mark.parametrize("name", [v for v in VARIANTS if "added" not in v])  # a space after them is lost, as in the library
def test_a_response_continues_where_its_prompt_ended(name, strings, tmp_path):
    ours = sentencepiece(tmp_path, variant_of(GOLDENS["spec"], name))
    rng = random.Random(0)
    for prompt in ["the cat", "", *strings]:
        prompt, response = prompt.replace("▁", ""), rng.choice(strings).replace("▁", "")
        if "metaspace" in name:  # it adds no space before an existing one, but still removes one when decoding
            prompt = prompt.lstrip(" ")
        first, then = ours.encode(prompt), ours.encode(response, start=False)
        both = first + then
        assert ours.decode(first) + ours.decode(then, start=False) == prompt + response
        assert ours.decode(both) == prompt + response or not prompt
    cat = ours.encode("a cat")[len(ours.encode("a")):]
    assert ours.encode(" cat", start=False) == cat and ours.decode(cat, start=False) == " cat"
    assert ours.decode(ours.encode("cat", start=False), start=False) == "cat"


def test_byte_level_tokenizers_ignore_start(tiny):
    for text in (" the cat", "the cat", ""):
        assert tiny.encode(text, start=False) == tiny.encode(text) == tiny.encode_marked(text, start=False)
        assert tiny.decode(tiny.encode(text), start=False) == text


@pytest.mark.parametrize("text", ["a" * 100_000, " " * 100_000, "中" * 50_000, " \n" * 50_000, "the cat" * 20_000, "\0" * 50_000])
def test_long_pieces_are_encoded_in_seconds(text, tmp_path):
    import time
    for name in ("llama", "tokens across spaces"):
        ours, begin = sentencepiece(tmp_path, variant_of(GOLDENS["spec"], name)), time.perf_counter()
        ids = ours.encode(text)
        assert time.perf_counter() - begin < 10 and ours.decode(ids) == text


@pytest.mark.parametrize("text", [
    (" " * 50_000 + "x") * 20, " " * 99_999, "\t \n" * 33_000 + "x", "\n" * 99_999, "a" * 10**6, "7" * 10**6, "!" * 10**6, "Aa" * 500_000,
    "\u4e2d" * 300_000, "a" + "\u0323\u0301" * 200_000, "'" * 10**6, "\0" * 10**6], ids=lambda text: f"{len(text)} {text[:2]!r}")
def test_long_runs_are_encoded_in_linear_time(text, tiny, tmp_path):
    import time
    folders = [written(tmp_path / f, family_spec(f, tiny), {"eos_token": "<|endoftext|>"}) for f in ("qwen", "smollm")]
    folders.append(written(tmp_path / "d", with_splits(tiny, *SPLITS["deepseek"])))
    for ours in [tiny, *map(load_tokenizer, folders)]:
        ours.encode("a1 ")
        begin = time.perf_counter()
        ids = ours.encode(text)
        assert time.perf_counter() - begin < 30
        if not ours.normal_form or "\u0323" not in text:  # unicodedata alone takes minutes for the other one
            assert ours.decode(ids) == text


def test_long_runs_of_marks_are_normalized_as_unicodedata_does(tiny, tmp_path):
    rng, spec = random.Random(0), family_spec("qwen", tiny)
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        ours = load_tokenizer(written(tmp_path, {**spec, "normalizer": {"type": form}}, {"eos_token": "<|endoftext|>"}))
        for n in (299, 301, 700):
            text = "x" * 700 + "\u00e9" + "".join(rng.choices("\u0323\u0301\u0344\u0f71\u0f72\u0315\u0334\u3099", k=n)) + "\u1eafy\u0301"
            assert ours.encode(text) == ours.encode(unicodedata.normalize(form, text)) == tiny.encode(unicodedata.normalize(form, text))


def test_encode_marked_finds_special_tokens_unless_they_are_broken(tiny, tmp_path):
    eos = tiny.eos_id
    assert tiny.encode_marked("the<|endoftext|> cat") == [*tiny.encode("the"), eos, *tiny.encode(" cat")]
    assert tiny.encode_marked("<\ue000|endoftext|><|endoftext|>", mark="\ue000") == [*tiny.encode("<|endoftext|>"), eos]
    ours = sentencepiece(tmp_path / "a", GOLDENS["spec"])
    assert ours.encode_marked("<\ue000s>cat", mark="\ue000") == ours.encode("<s>cat")
    assert ours.encode_marked("<s>cat</s>", start=False) == [1, *ours.encode("cat"), 2]
    assert ours.encode_marked("cat</s>", start=False) == [*ours.encode("cat", start=False), 2]
    spec = variant_of(GOLDENS["spec"], "llama")
    spec["added_tokens"][1]["lstrip"] = True  # the library's stripping on the left is not supported
    strips = sentencepiece(tmp_path / "b", spec)
    assert strips.encode("<s> cat") == ours.encode("<s> cat") and strips.encode_marked("a") == ours.encode("a")
    with pytest.raises(DataError, match="'<s>' strips the space"):
        strips.encode_marked("<s> cat")


@pytest.mark.parametrize("form", ["byte level", "sentencepiece"])
def test_added_tokens_that_strip_the_space_behind_them(form, tiny, many, library, tmp_path):
    """Phi-3's do, </s> among them, which is no special token there."""
    spec = variant_of(GOLDENS["spec"], "llama") if form == "sentencepiece" else family_spec("gpt2", tiny)
    n = max(*spec["model"]["vocab"].values(), *(t["id"] for t in spec["added_tokens"])) + 1
    added = [t for t in spec["added_tokens"] if t["content"] != "</s>"]
    stripping = [("<|user|>", n, True), ("<|end|>", n + 1, True), ("</s>", spec["model"]["vocab"].get("</s>", n + 2), False)]
    flags = {**tokenizer_file.FLAGS, "rstrip": True}
    spec["added_tokens"] = [*added, *({**flags, "content": t, "id": i, "special": s} for t, i, s in stripping)]
    folder = written(tmp_path, spec, {"eos_token": "<|end|>"})
    rng, pieces = random.Random(2), ["</s>", "<|user|>", "<|end|>", " ", "\n", "\t", "\x1c", "\x1f", "\x85", "\u3000", "the", "\u200b", "▁"]
    texts = ["".join(rng.choices(pieces, k=9)) for _ in range(2000)] + many[::4]
    ours, theirs = load_tokenizer(folder), library.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for encode, special in ((ours.encode, True), (ours.encode_marked, False)):
        theirs.encode_special_tokens = special
        assert [encode(t) for t in texts] == [e.ids for e in theirs.encode_batch(texts, add_special_tokens=False)]


def test_the_chat_template_and_its_variables_are_read_and_saved(tiny, tmp_path):
    spec, names = family_spec("gpt2", tiny), {"eos_token": "<|endoftext|>", "bos_token": None, "unk_token": {"content": "<u>"}}
    lists = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    for k, (template, found) in enumerate([(None, None), ("{{ x }}", "{{ x }}"), (lists, "yes"), (lists[:1], None)]):
        ours = load_tokenizer(written(tmp_path / str(k), spec, {**names, "chat_template": template}))
        assert ours.chat_template == found
        assert ours.special_text == {"eos_token": "<|endoftext|>", "unk_token": "<u>"}
    (tmp_path / "2" / "chat_template.jinja").write_text("é wins", encoding="utf-8")
    ours = load_tokenizer(tmp_path / "2")
    ours.save(tmp_path / "saved")
    assert ours.chat_template == load_tokenizer(tmp_path / "saved").chat_template == "é wins"
    assert tiny.chat_template is None and tiny.special_text == {"eos_token": "<|endoftext|>"}


def test_same_ids_compares_the_id_of_every_token(tiny, tmp_path):
    def opt(seed):
        spec = family_spec("opt", tiny)
        vocab = {t: i for t, i in spec["model"]["vocab"].items() if t not in ("</s>", "<pad>")}
        kept = {t: i for t, i in spec["model"]["vocab"].items() if t not in vocab}
        spec["model"]["vocab"] = kept | (shuffled(vocab, seed) if seed else vocab)
        return load_tokenizer(written(tmp_path / str(seed), spec, {"eos_token": "</s>"}))
    a, b = opt(0), opt(1)
    assert a.ranks == b.ranks and a.same_ids(opt(0)) and not a.same_ids(b) and not a.same_ids(tiny) and not tiny.same_ids(a)
    llama, across = (sentencepiece(tmp_path / n, variant_of(GOLDENS["spec"], n)) for n in ("llama", "tokens across spaces"))
    assert llama.same_ids(sentencepiece(tmp_path / "m", variant_of(GOLDENS["spec"], "metaspace first")))
    assert not llama.same_ids(across)


def protobuf(fields):
    """Returns [(number, value)] as a protobuf message; values are ints, bytes and floats."""
    def varint(n):
        return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])

    def one(number, value):
        if isinstance(value, int):
            return varint(8 * number) + varint(value % 2**64)
        if isinstance(value, float):
            return varint(8 * number + 5) + struct.pack("<f", value)
        return varint(8 * number + 2) + varint(len(value)) + value
    return b"".join(one(*f) for f in fields)


def model_file(path, kind=2, prefix=1, fallback=1, extra=0, chars=b"", user=()):
    """Writes the golden vocabulary as SentencePiece does: an earlier token has a higher score. Returns the path."""
    vocab = GOLDENS["spec"]["model"]["vocab"]
    pieces = []
    for t, i in vocab.items():
        type_ = 4 if t in user else (2, 3, 3)[i] if i < 3 else 6 if i < 259 else 1
        pieces.append((1, protobuf([(1, t.encode()), (2, float(-i)), (3, type_)])))
    trainer = protobuf([(3, kind), (35, fallback), (40, 0), (41, 1), (42, 2), (43, -1)])
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(protobuf([*pieces, (2, trainer), (3, protobuf([(1, b"identity"), (2, chars), (3, prefix), (4, extra)]))]))
    return path


def test_mistrals_model_files(strings, tmp_path):
    """Their names end in a version, and some pieces are user-defined: found in any text."""
    ours = load_tokenizer(model_file(tmp_path / "tokenizer.model.v3", user=("th",)).parent)
    plain = load_tokenizer(model_file(tmp_path / "plain" / "tokenizer.model"))
    i = ours.plain["th"]
    assert set(ours.plain) == {"th"} and ours.encode("cat") == plain.encode("cat")
    assert ours.encode("xth") == [*ours.encode("x"), i] and ours.encode("cat th")[-1] == i
    ours.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert same(again, ours) and [again.encode(s) for s in strings] == [ours.encode(s) for s in strings]


def tekken(tiny, **changes):
    """Returns a tekken.json with the small vocabulary and one token too many."""
    n = len(tiny.ranks)
    tokens = [*sorted(tiny.ranks, key=tiny.ranks.get), b"not in the model"]
    vocab = [{"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for i, t in enumerate(tokens)]
    config = {"pattern": tiny.encoding._pat_str, "num_vocab_tokens": n + 1, "default_vocab_size": n + 30,
              "default_num_special_tokens": 30, "version": "v3"}
    return {"config": config, "vocab": vocab, **changes}


def test_mistrals_tekken(tiny, strings, tmp_path):
    ours = load_tokenizer(written(tmp_path, None, tekken__json=tekken(tiny)))
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size) == (1, 2, 11, len(tiny.ranks) + 30)
    assert ours.special["[INST]"] == 3 and ours.special["<SPECIAL_29>"] == 29 and len(ours.special) == 30
    assert all(ours.encode(s) == [i + 30 for i in tiny.encode(s)] for s in strings)
    assert ours.encode_marked("[INST]the") == [3, *ours.encode("the")]
    ours.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert same(again, ours) and all(again.encode(s) == ours.encode(s) for s in strings)
    named = [{"rank": i, "token_str": t, "is_control": True} for i, t in enumerate(("<unk>", "<s>", "</s>", "[X]"))]
    other = load_tokenizer(written(tmp_path, None, tekken__json=tekken(tiny, special_tokens=named)) / "tekken.json")
    assert other.special["[X]"] == 3 and other.pad_id == 0 and "[INST]" not in other.special
    for change, message in (({"vocab": tekken(tiny)["vocab"][1:]}, "ranks of the first"), ({"special_tokens": named[1:]}, None),
                            ({"special_tokens": [*named, {"rank": 40, "token_str": "a"}]}, "special tokens are not"),
                            ({"config": {}}, "KeyError")):
        folder = written(tmp_path, None, tekken__json=tekken(tiny, **change))
        if message is None:  # the missing ones are filled in
            assert load_tokenizer(folder).special["<SPECIAL_0>"] == 0
            continue
        with pytest.raises(DataError, match=message) as e:
            load_tokenizer(folder)
        assert str(e.value).startswith(str(tmp_path)) and "\n" not in str(e.value)


def test_a_byte_token_that_no_text_needs_may_be_missing(strings, tmp_path):
    """Gemma has a token for the tab, and none for its byte; bytes such as 0xFF never occur in UTF-8."""
    full, spec = GOLDENS["spec"], json.loads(json.dumps(GOLDENS["spec"]))
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    tab, ff = vocab.pop("<0x09>"), vocab.pop("<0xFF>")
    with pytest.raises(DataError, match="without <0x09> in"):
        sentencepiece(tmp_path, spec)
    vocab["\t"] = tab
    ours, other = sentencepiece(tmp_path, spec), sentencepiece(tmp_path / "full", full)
    assert [ours.encode(s) for s in strings] == [other.encode(s) for s in strings] and ours.decode([tab]) == "\t"
    assert ours.decode([ff]) == "" and merges == full["model"]["merges"]


def test_a_sentencepiece_model_file_equals_its_tokenizer_json(strings, tmp_path):
    """Old LLaMA folders have no other tokenizer file."""
    ours = load_tokenizer(model_file(tmp_path / "a" / "tokenizer.model").parent)
    spec = sentencepiece(tmp_path / "b", GOLDENS["spec"])
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 2, spec.vocab_size) and ours.same_ids(spec)
    assert [ours.encode(s) for s in strings] == [spec.encode(s) for s in strings]
    bare = load_tokenizer(model_file(tmp_path / "c.model", prefix=0))
    assert bare.encode(" cat") == spec.encode("cat") and bare.decode(bare.encode(" cat")) == " cat"
    ours.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.model").read_bytes() == (tmp_path / "a" / "tokenizer.model").read_bytes()
    assert same(load_tokenizer(tmp_path / "saved" / "tokenizer.json"), load_tokenizer(tmp_path / "saved"))
    for options, message in ((dict(kind=1), "a Unigram model is not"), (dict(fallback=0), "without byte_fallback"),
                             (dict(extra=1), "remove_extra_whitespaces"), (dict(chars=b"x"), "character map"),
                             (dict(kind=3), "a Word model")):
        with pytest.raises(DataError, match=message):
            load_tokenizer(model_file(tmp_path / "d" / "tokenizer.model", **options))
    whole = (tmp_path / "a" / "tokenizer.model").read_bytes()
    for n in (1, 2, 40, 3000, len(whole) - 3):
        (tmp_path / "cut.model").write_bytes(whole[:n])
        with pytest.raises(DataError) as e:
            load_tokenizer(tmp_path / "cut.model")
        assert "\n" not in str(e.value)
    theirs = pytest.importorskip("sentencepiece", reason="needs sentencepiece").SentencePieceProcessor(
        model_file=str(tmp_path / "a" / "tokenizer.model"))
    assert [theirs.encode(s) for s in strings] == [ours.encode(s) for s in strings]
    assert [theirs.decode(ours.encode(s)) for s in strings] == [ours.decode(ours.encode(s)) for s in strings]


# ---- Special tokens by name, and unsupported files ------------------------------------------------------------------


def test_special_tokens_are_found_by_name_or_id(tiny, tmp_path):
    n = len(tiny.ranks)
    added = [(n, "<s>", True), (n + 1, "</s>", True), (n + 2, "<p>", True), (n + 3, "<|endoftext|>", True)]
    spec = spec_of(tiny, added)
    by_name = load_tokenizer(written(tmp_path / "a", spec, {
        "eos_token": {"content": "</s>"}, "pad_token": "<p>", "bos_token": "<s>"}))
    assert (by_name.eos_id, by_name.pad_id, by_name.bos_id) == (n + 1, n + 2, None)  # BOS is named but not used, as in GPT-2
    config = {"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": True}
    flag = load_tokenizer(written(tmp_path / "a", spec, config))
    assert flag.bos_id == n and data.encode_prompt(flag, "the") == [n, *tiny.encode("the")]
    config = {"eos_token_id": [n + 1, n], "pad_token_id": n + 1}
    by_id = load_tokenizer(written(tmp_path / "b", spec, config__json=config))
    assert (by_id.eos_id, by_id.pad_id) == (n + 1, n + 2)  # the file's pad is EOS, and n ends responses, too
    by_id.save(tmp_path / "c")
    assert same(load_tokenizer(tmp_path / "c"), by_id)
    assert load_tokenizer(written(tmp_path / "d", spec)).eos_id == n + 3
    with pytest.raises(DataError, match="eos_token"):
        load_tokenizer(written(tmp_path / "e", spec_of(tiny, added[:3])))


def damaged(spec, where, value):
    spec = json.loads(json.dumps(spec))
    *parents, last = where.split(".")
    inner = spec
    for p in parents:
        inner = inner[p]
    inner[last] = value
    return spec


def test_an_unsupported_file_gives_a_one_line_error(tiny, tmp_path):
    spec = family_spec("gpt2", tiny)
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    for where, value, message in (
            ("model.type", "Unigram", "Unigram is not supported"), ("model.type", "WordPiece", "WordPiece"),
            ("model.type", "WordLevel", "WordLevel is not"), ("model.byte_fallback", True, "None with pre-tokenizer ByteLevel"),
            ("model.dropout", 0.1, "dropout"), ("model.end_of_word_suffix", "</w>", "end_of_word_suffix"),
            ("normalizer", {"type": "Lowercase"}, "normalizer Lowercase"),
            ("pre_tokenizer", {"type": "Whitespace"}, "pre-tokenizer Whitespace"), ("pre_tokenizer", None, "None"),
            ("pre_tokenizer", {**BYTE_LEVEL, "add_prefix_space": True}, "prefix space"),
            ("model.vocab", {t: i for t, i in vocab.items() if t != "a"}, "not in the vocabulary"),
            ("model.merges", [*merges, "a"], "ValueError"), ("model.merges", [*merges, "a zz"], "not in the vocabulary"),
            ("model.ignore_merges", "any", "two parts and no merge"),
            ("model.vocab", {**vocab, "!": 5}, "distinct"), ("model.vocab", {**vocab, "!": "x"}, "distinct"),
            ("model", 3, "AttributeError"), ("model.merges", 7, "TypeError"), ("added_tokens", [{}], "KeyError")):
        with pytest.raises(DataError, match=message) as e:
            changed = damaged(spec, where, value)
            if where == "model.ignore_merges":  # "!" and "?" would be merged anywhere, not only as a whole word
                changed["model"]["vocab"] |= {"!?": 700}
            load_tokenizer(written(tmp_path / "t", changed))
        assert str(e.value).startswith(str(tmp_path)) and "\n" not in str(e.value)
    (tmp_path / "t" / "tokenizer.json").write_text("{")
    (tmp_path / "s.model").write_bytes(b"\n\x07\n\x05<unk>")
    (tmp_path / "r.tiktoken").write_bytes(b"AA== 0\nAQ==\n")
    (tmp_path / "p.tiktoken").write_bytes(b"AA== 0\nAQ== 1\n")
    (tmp_path / "empty").mkdir()
    for name, message in (("t", "not JSON"), ("s.model", "SentencePiece"), ("r.tiktoken", "r.tiktoken:2: not"),
                          ("p.tiktoken", "256 bytes"), ("empty", "no tokenizer.json"), ("nowhere", "no such folder or file")):
        with pytest.raises(DataError, match=message):
            load_tokenizer(tmp_path / name)


def test_a_tiktoken_name_offline_gives_a_one_line_error(monkeypatch):
    import tiktoken

    def offline(name):
        raise OSError("no network\nat all")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(DataError, match="^cl100k_base: tiktoken could not fetch it .*folder") as e:
        load_tokenizer("cl100k_base")
    assert "\n" not in str(e.value)


def test_an_unsupported_sentencepiece_file_gives_a_one_line_error(tmp_path):
    spec = GOLDENS["spec"]
    vocab, merges, added = spec["model"]["vocab"], spec["model"]["merges"], spec["added_tokens"]
    plain = {**added[1], "id": len(vocab), "content": "<x>", "special": False}
    for where, value, message in (
            ("model.vocab", {t: i for t, i in vocab.items() if t != "<0x80>"}, "byte_fallback without <0x80> in"),
            ("model.vocab", {**vocab, "e": 5}, "distinct"), ("model.ignore_merges", True, "ignore_merges"),
            ("model.merges", [*merges, ["<0x0A>", "<0x0A>"]], "not in the vocabulary"),
            ("model.vocab", {**vocab, "<0x0A>a": len(vocab)}, "merges of byte tokens"),
            ("normalizer", {"type": "NFKC"}, "normalizer NFKC with pre-tokenizer None"), ("normalizer", None, "None with"),
            ("pre_tokenizer", {"type": "Whitespace"}, "Prepend . Replace with pre-tokenizer Whitespace"),
            ("decoder", None, "decoder None"), ("decoder", {"type": "ByteFallback"}, "decoder ByteFallback"),
            ("added_tokens", [*added, {**plain, "normalized": True}], "normalized"),
            ("added_tokens", [*added, {**plain, "lstrip": True}], "strip"), ("added_tokens", added[:2], "eos_token")):
        changed = damaged(spec, where, value)
        if "byte tokens" in message:
            changed["model"]["merges"].append(["<0x0A>", "a"])
        changed["model"]["vocab"].pop("</s>" if message == "eos_token" else None, None)
        with pytest.raises(DataError, match=message) as e:
            load_tokenizer(written(tmp_path / "t", changed, {"eos_token": None if message == "eos_token" else "</s>"}))
        assert str(e.value).startswith(str(tmp_path)) and "\n" not in str(e.value)


def test_the_built_in_tokenizer_is_cached_lossless_and_compact(strings, tmp_path):
    tokenizer = load_tokenizer("reviews")
    assert tokenizer is load_tokenizer("reviews") and tokenizer.vocab_size == 640
    assert all(tokenizer.decode(tokenizer.encode(s)) == s for s in strings)
    text = load_records("reviews", "text", limit=1)[0]["text"]
    assert len(tokenizer.encode(text)) < len(text.split()) * 2.5
    saved_as_transformers_reads_it(tokenizer, strings, tmp_path)


def test_a_pad_that_is_eos_is_replaced_when_saved(tiny, tmp_path):
    """transformers pads with tokenizer_config.json's pad, but its classifiers read before config.json's: both must agree."""
    n, template = len(tiny.ranks), "{{ '<|im_start|>' }}"
    added = [(n, "<|endoftext|>", True), (n + 1, "<|im_start|>", True), (n + 2, "<|unused|>", True)]
    for some, pad in ((added, "<|unused|>"), (added[:2], None), (added[:1], None)):  # never one that the template uses
        folder = written(tmp_path / "a", spec_of(tiny, some), dict(
            eos_token="<|endoftext|>", pad_token={"content": "<|endoftext|>"}, chat_template=template))
        tokenizer = load_tokenizer(folder)
        tokenizer.save(tmp_path / "b")
        config = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
        assert config.get("pad_token") == pad and config["chat_template"] == template
        assert tokenizer.pad_id == (tokenizer.special[pad] if pad else 0) == load_tokenizer(tmp_path / "b").pad_id


def test_a_pad_that_we_choose_has_no_other_role(tiny, tmp_path):
    n = len(tiny.ranks)
    roles = {"eos_token": "<e>", "bos_token": "<b>", "sep_token": "<s>", "cls_token": "<c>", "mask_token": "<m>"}
    added = [(n + k, t, True) for k, t in enumerate([*roles.values(), "<|im_start|>"])]
    template = {"chat_template": "<|im_start|>"}
    for pad in (None, "<e>", "<b>", "<m>", "<s>"):
        folder = written(tmp_path / "a", spec_of(tiny, added), roles | {"pad_token": pad} | template)
        assert load_tokenizer(folder).pad_id == 0  # as in GPT-2: some row of the embedding
    folder = written(tmp_path / "a", spec_of(tiny, [*added, (n + 9, "<x>", True)]), roles | {"pad_token": "<e>"} | template,
                     special_tokens_map__json={"pad_token": {"content": "<e>"}, "eos_token": "<e>"})
    ours = load_tokenizer(folder)
    assert ours.pad_id == n + 9
    ours.save(tmp_path / "b")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        assert json.loads((tmp_path / "b" / name).read_text())["pad_token"] == "<x>"
    unknown = load_tokenizer(written(tmp_path / "c", spec_of(tiny, added[:2] + [(n + 2, "<unk>", True)]), {
        "eos_token": "<e>", "bos_token": "<b>", "unk_token": "<unk>"}))
    assert unknown.pad_id == n + 2  # no text needs <unk>, for all 256 bytes are there
    own = load_tokenizer(written(tmp_path / "d", spec_of(tiny, added), roles | {"pad_token": "<|im_start|>"} | template))
    assert own.pad_id == n + 5      # the file says so, and no role forbids it
    (tmp_path / "b" / "tokenizer_config.json").unlink()  # then only the map names tokens
    written(tmp_path / "b", None, special_tokens_map__json={"pad_token": "<e>", "eos_token": "<e>"})
    load_tokenizer(tmp_path / "b").save(tmp_path / "e")
    maps = [json.loads((tmp_path / "e" / f"{f}.json").read_text())["pad_token"] for f in ("tokenizer_config", "special_tokens_map")]
    assert maps[0] == maps[1] != "<e>"


def test_flags_and_roles_of_the_configuration_outweigh_tokenizer_json(tiny, tmp_path):
    """Equal to transformers', which reads tokenizer_config.json last."""
    n = len(tiny.ranks)
    spec = spec_of(tiny, [(n, "</s>", False), (n + 1, "<pad>", False), (n + 2, "<tool>", False), (n + 3, "<call>", True)])
    flags = {**tokenizer_file.FLAGS, "rstrip": True}
    ours = load_tokenizer(written(tmp_path / "a", spec, {
        "eos_token": "</s>", "pad_token": "<pad>", "added_tokens_decoder": {
            str(n + 2): {**flags, "content": "<tool>"}, str(n + 3): {**tokenizer_file.FLAGS, "content": "<call>"}}}))
    assert ours.plain == {"<tool>": n + 2}
    assert n not in ours.encode("a</s>") and ours.decode([*tiny.encode("a"), n]) == "a"
    assert ours.encode("a<tool>  b") == [*tiny.encode("a"), n + 2, *tiny.encode("b")]


def test_an_id_of_the_configuration_never_makes_a_words_token_special(tiny, tmp_path):
    spec = spec_of(tiny, [(len(tiny.ranks), "<|endoftext|>", True)])
    config = {"bos_token_id": tiny.encode('"')[0], "eos_token_id": tiny.encode(" the")[0], "pad_token_id": tiny.encode("!")[0]}
    ours = load_tokenizer(written(tmp_path / "a", spec, None, config__json=config))
    assert [*ours.special] == ["<|endoftext|>"] and ours.decode(ours.encode('"the the!"')) == '"the the!"'
    spec["added_tokens"] = []
    with pytest.raises(DataError, match="no eos_token_id of a special token"):
        load_tokenizer(written(tmp_path / "b", spec, None, config__json=config))
