"""THE data file: JSON line -> record -> Example and Group -> Batch.

    load_records(path_or_name, kind)       reads a file of any format (formats/sources.py) and layout (formats/records.py) as
                                           records of one kind
    make_group / pack_texts                record -> token rows: Example is prompt + response, Group the K answers to a prompt
    collate / micro_batches                token rows -> right-padded tensors with a mask of response tokens

    python -m nanorlhf.data FILE           shows records as the model will read them, and counts bad rows by reason

Every problem with a file is a DataError whose message is one line: `file:line: what is wrong`.
"""

import bisect
import dataclasses
import hashlib
import re
import sys
import time
import unicodedata
from typing import Literal, NamedTuple

import torch

from nanorlhf import ranks, reviews
from nanorlhf.errors import DataError, UserError, one_line
from nanorlhf.files import local_folder
from nanorlhf.formats.chat import (ASSISTANT, answer_affixes, conversation, encode_for_reply, encode_turns, is_open,
                                   messages_of, without_oldest)
from nanorlhf.formats.records import FIELDS, Record, convert, records_of
from nanorlhf.formats.sources import column_names, local_files, rows_in
from nanorlhf.options import check_options, leading_words, one_line_errors, parse_options
from nanorlhf.tokenizer import load_tokenizer as load_tokenizer  # callers may import it from here

# ---- Records --------------------------------------------------------------------------------------------------------


def load_records(path_or_name, kind, split="train", limit=None, skip_bad=False, seed=0, tokenizer=None, columns="", bad=None,
                 rows=True):
    """Reads records of one kind from a file, or from the built-in task `reviews`.

    path_or_name  a file of any format (formats.sources) with rows as in formats.records.READERS; "hub:NAME:CONFIG:SPLIT"; or
                  "reviews".
    kind          a key of FIELDS. Rows of another kind are converted if there is an honest way (records.convert). A "prompt"
                  record carries the file's answer, if there is one, as "completion".
    split, seed   only for `reviews` (train, test, ood_near, ood_far); a file holds one split.
    limit         use at most this many records; None: all of a file, 4000 (train) or 500 of `reviews`.
    skip_bad      skip bad rows and print one line about them on stderr, instead of raising DataError at the first.
    tokenizer     a conversation that its chat template rejects is a bad row, too; so are responses that it makes one text.
    columns       --columns: other names of the file's columns.
    rows          False: forget the rows that records were read from, which takes half of the memory.
    bad           a dict that takes {what is wrong with a skipped row: (number of such rows, place of the first)}.

    A record is a dict of the kind's fields; the attribute `row` of prompts, rankings and candidates is the JSON object they were
    read from. Text is taken as it stands. In particular, no space is put between prompt and completion: the completion carries
    its own leading space where one is wanted (HH and TL;DR files do so). A completion may have "given": numbers of earlier
    turns of the assistant (0: the first) that nothing is learned from.
    """
    if kind not in FIELDS:
        raise DataError(f"unknown record kind {kind!r}: want one of {', '.join(FIELDS)}")
    if path_or_name == "reviews":
        return _review_records(kind, split, limit if limit is not None else 4000 if split == "train" else 500, seed)
    records, seen, unread, bad, columns = [], 0, set(), {} if bad is None else bad, column_names(columns)
    missing = set(columns)
    for path in local_files(path_or_name):
        if not path.is_file():
            raise DataError(f"{path}: a folder, not a file: name a file in it" if path.is_dir() else
                            f"{path}: no such file (and the only built-in name is `reviews`)")
        for line, row in with_progress(rows_in(path, columns), f"rows of {path} read"):
            if limit is not None and len(records) >= limit:
                break
            seen += 1
            try:
                missing -= row.keys() if missing and isinstance(row, dict) else set()
                found = records_of(row, kind, unread)
                for record in found if kind == "candidates" or not rows else ():
                    record.line, record.row = line, record.row if rows else None
                records += rendered(tokenizer, found, kind) if tokenizer and found else found
            except DataError as e:
                if not skip_bad:
                    raise DataError(f"{path}:{line}: {e}{hint(e, columns, missing)}") from None
                count, first = bad.get(str(e), (0, f"{path}:{line}"))
                bad[str(e)] = count + 1, first
    most = sorted(bad.items(), key=lambda item: -item[1][0])[:5]
    reasons = ", ".join(f"{count} {reason}" for reason, (count, _) in most)
    if not records:
        raise DataError(f"{path_or_name}: no {kind} records in {seen} rows" + (f" ({reasons})" if bad else ""))
    if bad:
        print(f"{path_or_name}: skipped {sum(count for count, _ in bad.values())} of {seen} rows ({reasons})", file=sys.stderr)
    for name in sorted(missing):
        print(f"{path_or_name}: no row has the column {columns[name]}, which --columns names for {name}", file=sys.stderr)
    if unread:
        purpose = ", but a reward function may take them" if rows and kind in ("prompt", "ranked", "candidates") else ""
        print(f"{path_or_name}: fields that are not read{purpose}: {one_line(', '.join(sorted(unread)))}", file=sys.stderr)
    if tokenizer:
        warn_if_words_are_glued(path_or_name, records, tokenizer)
        warn_if_turns_are_plain(path_or_name, records, tokenizer)
    return records[:limit]


def hint(error, columns, missing):
    """What --columns has to do with an error; missing: our names of columns that no row has had."""
    if missing:
        return f" (no column {columns[min(missing)]}, which --columns names for {min(missing)})"
    strange = str(error).startswith(("no known record in the fields ", "there is no prompt")) and not columns
    return " (--columns gives them other names: --columns prompt=question,completion=answer)" if strange else ""


def with_progress(items, what):
    """Yields the items, and prints a line about every five seconds."""
    printed, total = time.monotonic(), f" of {len(items):,}" if hasattr(items, "__len__") else ""
    for i, item in enumerate(items):
        if i % 256 == 0 and time.monotonic() > printed + 5 and ranks.mine() == 0:
            printed = time.monotonic()
            print(f"{i:,}{total} {what}", flush=True)
        yield item


def load_candidates(path, n, limit=None, skip_bad=False, tokenizer=None, columns=""):
    """load_records of kind "candidates", with the same number of responses each: the first n of every row, or as many as the rows
    have. A row with fewer than the others is a bad row, unless it has n."""
    records = load_records(path, "candidates", limit=limit, skip_bad=skip_bad, tokenizer=tokenizer, columns=columns)
    counts = [len(r["responses"]) for r in records]
    fewest, most = min(counts), max(counts)
    n = min(n, most)
    few = [r for r in records if len(r["responses"]) < n]
    if few and not skip_bad:
        raise DataError(f"{path}:{few[0].line}: {len(few[0]['responses'])} responses, where other rows have {most} (--n {fewest} "
                        f"uses the first {fewest} of each row, --skip_bad skips rows with fewer)")
    if few:
        print(f"{path}: skipped {len(few)} of {len(records)} rows (fewer than {n} responses)", file=sys.stderr)
    if most > n:
        print(f"{path}: of up to {most} responses to a prompt the first {n} are used (--n)", flush=True)
    records = [r for r in records if len(r["responses"]) >= n]
    for r in records:
        r["responses"], r["finished"] = r["responses"][:n], r["finished"][:n]
    return records


def rendered(tokenizer, records, kind):
    """Returns the records of one row, which share a prompt, without the comparisons of responses that have the same tokens.
    Raises a DataError if the chat template rejects the prompt or a response, or if no comparison is left."""
    messages = conversation(tokenizer, records[0].get("prompt", ""))
    if messages and kind == "prompt":
        encode_for_reply(tokenizer, messages)
    if not messages or kind == "prompt":
        return records
    texts = [r.get("responses") or [r[field] for field in ("completion", "chosen", "rejected") if field in r] for r in records]
    ids = {text: encode_turns(tokenizer, messages, text, all_turns=False)[-1][0] for text in dict.fromkeys(sum(texts, []))}
    kept = [r for r, ys in zip(records, texts) if len(ys) == 1 or kind == "candidates" or any(ids[y] != ids[ys[0]] for y in ys)]
    if not kept:
        raise DataError("the responses are one text under the chat template")
    return kept


def warn_if_words_are_glued(path, records, tokenizer):
    """Prints one line if responses begin without a space behind their prompts. "Review:Good" has other tokens than any text that
    a model has read, and a far lower log-probability. A chat template puts something between the two; Alpaca's prompt format
    does not."""
    glued = []
    for record in records:
        prompt, responses = record.get("prompt", ""), record.get("responses", [])
        response = record.get("completion") or record.get("chosen") or "".join(responses[:1])
        before, after = prompt[-1:], response[:1]
        words = (before.isalnum() or before in tuple(":.,;!?")) and after.isalnum()
        alpaca = prompt.startswith("Below is an instruction") and prompt.endswith("\n\n### Response:")
        if words and not alpaca and unicodedata.east_asian_width(after) not in "WF" and not conversation(tokenizer, prompt):
            glued.append(prompt[-12:] + response[:12])
    if glued:
        print(f"{path}: in {len(glued)} of {len(records)} records no space stands between prompt and response, as in "
              f"{glued[0]!r}: if they are one text, begin the response with a space", flush=True)


def warn_if_turns_are_plain(path, records, tokenizer):
    """Prints one line if prompts look like conversations, but are none, so that the chat template does not render them."""
    prompts = [r.get("prompt", "") for r in records] if tokenizer.chat_template else []
    plain = [p for p in prompts if re.search(r"^Human:", p, re.MULTILINE) and not messages_of(p)]
    if plain:
        print(f"{path}: {len(plain)} of {len(records)} prompts have 'Human:' at the beginning of a line but are no conversation, "
              f"as {plain[0][:40]!r}: the chat template does not render them; it would if they had the form "
              f"{'Human: Hi.' + ASSISTANT!r}", flush=True)


def _review_records(kind, split, n, seed):
    if split not in ("train", "test", "ood_near", "ood_far"):
        raise DataError(f"reviews has no split {split!r}: want train, test, ood_near or ood_far")
    if kind not in ("text", "prompt", "completion"):
        raise DataError(f"reviews has no {kind} records: they are made from a model's own samples")
    if kind == "text" and split == "train":
        return [Record(text=text) for text in reviews.corpus(n, seed)]
    return [Record(r) for row in reviews.records(split, n, seed) for r in convert("completion", row, kind)]


def load_and_hold_out(config, kind, tokenizer, default_limit=None):
    """Reads --data and --eval_data: returns (training records, held-out records). Without --eval_data, --eval_fraction of --data
    is held out. default_limit: how many records of --data to use if --limit is 0."""
    records = load_records(config.data, kind, limit=config.limit or default_limit, skip_bad=config.skip_bad,
                           tokenizer=tokenizer, columns=config.columns)
    if config.eval_data:
        return records, load_records(config.eval_data, kind, skip_bad=config.skip_bad, tokenizer=tokenizer,
                                     columns=config.columns)
    return split_records(records, config.eval_fraction, config.seed)


def post_of(record):
    """Returns what a record is about, as a string: its "group" (any JSON value), else its prompt or text."""
    return str(record.get("group", record.get("prompt", record.get("text"))))


def split_records(records, fraction, seed=0):
    """Returns (train, held_out). About `fraction` of the posts (records with one "group", else one prompt or text) are held out,
    each with all its records. A hash decides, so the side of a post depends on the post, fraction and seed only."""
    def is_held_out(record):
        digest = hashlib.sha256(f"{seed}:{post_of(record)}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < fraction * 2**64
    sides = [is_held_out(r) for r in records]
    if 0 < fraction < 1 and len(set(sides)) < 2:
        prompts = len(set(map(post_of, records)))
        raise DataError(f"{len(records)} records of {prompts} different prompts are too few to hold out {fraction:g} of the "
                        f"prompts: change --eval_fraction (0 holds out none) or --seed, or give --eval_data")
    return [r for r, held in zip(records, sides) if not held], [r for r, held in zip(records, sides) if held]


# ---- Examples, groups and batches -----------------------------------------------------------------------------------


class Example(NamedTuple):
    """One prompt and one response as token ids."""
    tokens: list        # prompt ids, then response ids
    prompt_length: int  # at least 1: the first token is always a condition, never a target
    given: tuple = ()   # (first, last) of later stretches that the model did not say: other speakers' turns
    prompt_cut: bool = False    # the prompt was too long and lost a part
    response_cut: bool = False  # the response was too long and lost its end, so it has no EOS

    @property
    def length(self):
        return len(self.tokens)

    @property
    def count(self):
        """Number of tokens that are trained on: the True entries of its row in Batch.mask."""
        return len(self.tokens) - self.prompt_length - sum(last - first for first, last in self.given)


class Group(NamedTuple):
    """The K responses to one prompt and one number for each: its score, or its log-probability under the reference."""
    examples: list      # K Examples with the same prompt
    numbers: list = ()  # K floats
    post: str = ""      # what they are about (post_of): groups about one post are not independent

    @property
    def length(self):     # of the longest
        return max(len(e.tokens) for e in self.examples)

    @property
    def tokens(self):     # of all, prompts included
        return sum(len(e.tokens) for e in self.examples)


class Packed(NamedTuple):
    """Examples of a Batch, [prompt, response 1, response 2, ...] per row: a response sees the prompt and itself."""
    tokens: torch.Tensor     # [P, T] int64, right-padded
    positions: torch.Tensor  # [P, T] int64, of the token in its example
    segments: torch.Tensor   # [P, T] int64, 0 on the prompt, k on response k, -1 on padding
    before: torch.Tensor     # [N] int64, where in tokens.flatten() the token before each of Batch.where is


class Batch(NamedTuple):
    tokens: torch.Tensor   # [B, T] int64, right-padded
    mask: torch.Tensor     # [B, T] bool, True on response tokens, EOS included; False on prompt and padding
    lengths: torch.Tensor  # [B] int64, prompt + response
    where: torch.Tensor    # [N] int64, where mask.flatten() is True; finding out on a GPU would make its host wait
    packed: Packed | None = None  # the same examples with each shared prompt once


def truncate_tldr(tokenizer, prompt, max_tokens=512):
    """Cuts a TL;DR (or ARTICLE) prompt to max_tokens as Stiennon 2020's code does: the post loses its end from the last newline
    on, again and again, and single characters where no newline is left. Text -> text; other prompts come back unchanged."""
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
    """str -> token ids of a prompt, with BOS first if the family has one. A conversation goes through the tokenizer's chat
    template, if there is one. An empty prompt becomes [EOS], because a model needs a token to condition on.

    A prompt longer than max_prompt_length tokens (BOS counted) keeps its "end" or its "start"; "tldr" applies `truncate_tldr`
    first. A templated conversation loses its oldest exchanges before that.
    """
    return _prompt_ids(tokenizer, prompt, conversation(tokenizer, prompt), max_prompt_length, keep)[0]


def _prompt_ids(tokenizer, prompt, messages, max_prompt_length=None, keep="end"):
    """encode_prompt, once it is known whether the prompt is a conversation (messages) or not (None). Returns (ids, whether the
    prompt was cut)."""
    if keep not in ("end", "start", "tldr"):
        raise DataError(f"keep={keep!r}: want end, start or tldr")
    ids, cut = encode_for_reply(tokenizer, messages) if messages else tokenizer.encode(prompt), False
    while messages and max_prompt_length and len(ids) > max_prompt_length and (fewer := without_oldest(messages)):
        messages, ids, cut = fewer, encode_for_reply(tokenizer, fewer), True
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    if messages:                                                        # a template writes BOS itself, or none
        bos, ids = (bos, ids[1:]) if bos and ids[:1] == bos else ([], ids)
    if max_prompt_length is not None and len(bos) + len(ids) > max_prompt_length:
        room = max_prompt_length - len(bos)
        if room < 1:
            raise DataError(f"max_prompt_length {max_prompt_length} leaves no room for a prompt")
        if keep == "tldr" and not messages:
            ids = tokenizer.encode(truncate_tldr(tokenizer, prompt, room))
        ids, cut = ids[:room] if keep == "start" else ids[-room:], True
    return bos + ids or [tokenizer.eos_id], cut


def encode_response(tokenizer, response, prompt=None):
    """str -> token ids of a response to this prompt, with EOS at the end. It is tokenised apart from the prompt, so that no
    token straddles the border."""
    return _response_ids(tokenizer, response, prompt, conversation(tokenizer, prompt) if prompt else None)


def _response_ids(tokenizer, response, prompt, messages):
    if messages:
        return encode_turns(tokenizer, messages, response, all_turns=False)[-1][0]
    return tokenizer.encode(response, start=prompt == "") + [tokenizer.eos_id]


def decode_response(tokenizer, ids, prompt=None):
    """Token ids -> str, as records hold it; the inverse of encode_response."""
    text = tokenizer.decode(ids, start=prompt == "")
    if prompt and (messages := conversation(tokenizer, prompt)):
        before, after = answer_affixes(tokenizer)
        text = text.removesuffix(after)
        return text if is_open(messages) else " " + text.removeprefix(before)   # the space is the one behind "Assistant:"
    return text


def marks_of(cut_at):
    """Returns the texts that the option --cut_at names: comma-separated, with \\n for a newline."""
    return [mark for mark in cut_at.replace("\\n", "\n").split(",") if mark]


def cut_text(text, marks):
    """Returns what of a text stands before the first mark. A model of dialogues may go on with the user's "\\n\\nHuman:"."""
    return text[:min((text.find(mark) for mark in marks if mark in text), default=len(text))]


def cut_response(tokenizer, ids, marks, prompt=None, longest=None):
    """cut_text for the token ids of a response to this prompt: the same ids if no mark is in its text, to which special tokens
    belong, but EOS does not. Else EOS stands where the mark began, since the answer is complete, and the ids before it stay those
    sampled; only what stood before the mark within one token is encoded anew. longest: of the result, in tokens."""
    def decoded(n):
        return tokenizer.decode([i for i in ids[:n] if i not in tokenizer.end_ids], start=False, special=True)
    whole = decoded(len(ids))
    text = cut_text(whole, marks)
    if text == whole:
        return ids
    n = bisect.bisect_right(range(len(ids)), len(text), key=lambda n: len(decoded(n))) - 1
    while not text.startswith(decoded(n)):        # the bytes of a character may be parted
        n -= 1
    kept = ids[:n] + tokenizer.encode(text[len(decoded(n)):], start=False)
    return kept[:longest and longest - 1] + encode_response(tokenizer, " x", prompt)[-1:]


def length_limits(config, context):
    """Returns (longest prompt + response, longest prompt) in tokens, of the options --max_length (0: the model's context) and
    --max_prompt_length (0: half of it). Training, sampling and evaluation share this rule, so that they read the same prompts
    (but make_all_turns_example keeps a conversation that fits)."""
    max_length = config.max_length or context
    max_prompt_length = config.max_prompt_length or max_length // 2
    if max_length > context:
        raise UserError(f"--max_length {max_length}: the model's context is {context}")
    if max_prompt_length >= max_length:
        raise UserError(f"--max_prompt_length {max_prompt_length} leaves no room for a response in {max_length} tokens "
                        f"(--max_length, else the model's context)")
    return max_length, max_prompt_length


def encode_prompts(tokenizer, records, config, context, response_length=None):
    """Returns the prompts of records as lists of ids, for sampling: each is cut as a training prompt is (`length_limits`,
    --keep). UserError if the longest leaves no room for a response of --response_length tokens."""
    max_length, max_prompt_length = length_limits(config, context)
    response_length = response_length or config.response_length
    encoded = [_prompt_ids(tokenizer, r["prompt"], conversation(tokenizer, r["prompt"]), max_prompt_length, config.keep)
               for r in records]
    prompts, cut = [ids for ids, _ in encoded], sum(cut for _, cut in encoded)
    if cut:
        print(f"{cut} of {len(prompts)} prompts are cut to at most {max_prompt_length} tokens (--max_prompt_length, "
              f"--keep {config.keep})", flush=True)
    if (longest := max(map(len, prompts))) + response_length > max_length:
        raise UserError(f"a prompt of {longest} tokens leaves no room for --response_length {response_length} in {max_length} "
                        f"tokens (--max_length, else the model's context): lower one of them, or --max_prompt_length")
    return prompts


def make_examples(tokenizer, prompt, responses, max_length=None, max_prompt_length=None, keep="end"):
    """K responses to one prompt -> K Examples with the same prompt ids, each at most max_length tokens.

    A prompt longer than max_prompt_length is cut to it, whatever the responses: when the model is asked, there is no response
    yet. (The DPO authors' code cuts prompts only in rows that are too long.) A response that is longer than what the prompt
    leaves of max_length loses its end, and so its EOS. Raises DataError if nothing is left of a response.
    """
    messages = conversation(tokenizer, prompt)
    prompt_ids, cut = _prompt_ids(tokenizer, prompt, messages, max_prompt_length, keep)
    if max_length is not None and len(prompt_ids) >= max_length:
        raise DataError(f"a prompt of {len(prompt_ids)} tokens leaves no room for a response within max_length "
                        f"{max_length}: set max_prompt_length lower")
    rows = [_response_ids(tokenizer, response, prompt, messages) for response in responses]
    room = max_length - len(prompt_ids) if max_length else max(map(len, rows))
    share = IDS.setdefault
    return [Example([share(i, i) for i in prompt_ids + row[:room]], len(prompt_ids), (), cut, len(row) > room) for row in rows]


IDS = {}  # each id once: as an object of its own it would take 28 bytes wherever it stands


def describe(name, tokenizer, examples):
    """Prints the first example as the model reads it, prompt and response apart, and how many prompts and responses were cut."""
    def shown(ids):
        text = tokenizer.decode(ids, start=False, special=True)
        return repr(text if len(text) <= 600 else text[:300] + " ... " + text[-300:])
    tokens, prompt_length = examples[0][:2]
    print(f"{name}: the first example as the model reads it, prompt {shown(tokens[:prompt_length])}"
          + (f", response {shown(tokens[prompt_length:])}" if tokens[prompt_length:] else ""), flush=True)
    if prompts := sum(e.prompt_cut for e in examples):
        print(f"{name}: {prompts} of {len(examples)} examples have a cut prompt (--max_prompt_length, --keep)", flush=True)
    if responses := sum(e.response_cut for e in examples):
        print(f"{name}: {responses} of {len(examples)} responses are cut and have no EOS (--max_length)", flush=True)


def make_group(tokenizer, prompt, responses, numbers, config, context, post=""):
    """K responses to one prompt and their numbers -> Group, cut by `length_limits` and the option --keep."""
    return Group(make_examples(tokenizer, prompt, responses, *length_limits(config, context), config.keep), numbers, post)


def make_all_turns_example(tokenizer, prompt, response, max_length=None, max_prompt_length=None, keep="end", given=()):
    """A conversation as one Example that trains on every turn of the assistant, except on those of the prompt whose numbers
    (0: the first) are in `given`. Other texts and overlong conversations fall back to make_example, which trains on the last
    response only."""
    if (messages := messages_of(prompt)) is not None:
        pieces = encode_turns(tokenizer, messages, response, given=given)
        tokens = [] if tokenizer.chat_template or tokenizer.bos_id is None else [tokenizer.bos_id]
        spans = []
        for ids, said in pieces:
            spans.append((len(tokens), len(tokens) + len(ids), said))
            tokens += ids
        if spans[0][1] and (max_length is None or len(tokens) <= max_length):
            return Example(tokens, spans[0][1], tuple((a, b) for a, b, said in spans[1:] if not said))
    return make_example(tokenizer, prompt, response, max_length, max_prompt_length, keep)


def make_example(tokenizer, prompt, response, max_length=None, max_prompt_length=None, keep="end"):
    """`make_examples` for one response."""
    return make_examples(tokenizer, prompt, [response], max_length, max_prompt_length, keep)[0]


def pack_texts(tokenizer, texts, length):
    """Joins documents, each followed by EOS, into one stream and cuts it into Examples of `length` tokens (the last may be
    shorter). The stream starts with EOS; if the family has a BOS, every document starts with it instead."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    stream = [] if bos else [tokenizer.eos_id]
    for text in texts:
        stream += bos + encode_response(tokenizer, text, prompt="")
    blocks = [stream[i:i + length] for i in range(0, len(stream), length)]
    return [Example(block, 1) for block in blocks if len(block) > 1]


def collate(examples, pad_id, device="cpu", shared=None):
    """Examples -> Batch. The mask comes from lengths, never from comparing tokens with pad_id. Logits at position t - 1
    predict token t: pair tokens[:, 1:] with mask[:, 1:]. shared: lists of the numbers of examples with the same prompt, which
    are also packed (None: they are not)."""
    lengths = torch.tensor([len(e.tokens) for e in examples])                       # [B]
    starts = torch.tensor([e.prompt_length for e in examples])                      # [B]
    tokens = torch.full((len(examples), int(lengths.max())), pad_id)                # [B, T]
    for row, example in zip(tokens, examples):
        row[:len(example.tokens)] = torch.tensor(example.tokens)
    t = torch.arange(tokens.shape[1])                                               # [T]
    mask = (t >= starts[:, None]) & (t < lengths[:, None])                          # [B, T]
    for row, example in zip(mask, examples):
        for first, last in example.given:
            row[first:last] = False
    where = mask.flatten().nonzero()[:, 0]                                          # [N]
    packed = pack_prompts(examples, shared, pad_id, device) if shared else None
    return Batch(*(to_device(x, device) for x in (tokens, mask, lengths, where)), packed)


def pack_prompts(examples, shared, pad_id, device):
    """Examples -> Packed, one row per list of `shared`."""
    rows, before = [], [None] * len(examples)
    for group in shared:
        prompt, start = examples[group[0]].tokens[:examples[group[0]].prompt_length], examples[group[0]].prompt_length
        tokens, positions, segments = list(prompt), list(range(start)), [0] * start
        for k, i in enumerate(group, 1):
            response = examples[i].tokens[start:]
            assert examples[i].tokens[:start] == prompt and examples[i].prompt_length == start and not examples[i].given
            first = len(tokens)                   # the token before the response's first is the prompt's last
            before[i] = [(len(rows), t) for t in [start - 1, *range(first, first + len(response) - 1)][:len(response)]]
            tokens += response
            positions += range(start, start + len(response))
            segments += [k] * len(response)
        rows.append((tokens, positions, segments))
    T = max(len(tokens) for tokens, _, _ in rows)
    columns = [torch.tensor([row + [fill] * (T - len(row)) for row in column])
               for column, fill in zip(zip(*rows), (pad_id, 0, -1))]
    before = torch.tensor([row * T + t for places in before for row, t in places])
    return Packed(*(to_device(x, device) for x in (*columns, before)))


def to_device(values, device):
    """Numbers or a tensor of the host -> tensor on the device. The host does not wait for what a GPU still has to do, except on
    Apple's (mps), which would read the host's memory too late."""
    return torch.as_tensor(values).to(device, non_blocking=torch.device(device).type != "mps")


def micro_batches(items, micro_batch_size, length=lambda item: item.length):
    """Splits items into lists of at most micro_batch_size of similar length, so that little is padding."""
    ordered = sorted(items, key=length)
    return [ordered[i:i + micro_batch_size] for i in range(0, len(ordered), micro_batch_size)]


def of_each(items, size, function, length=lambda item: item.length):
    """Returns function's result for each item, in the order of the items. function: a list of items -> as many results. Each rank
    calls it for its share of the items, in lists of at most `size` of similar length."""
    items, found = list(items), []
    parts = micro_batches(ranks.deal(range(len(items)), lambda i: length(items[i])), size, lambda i: length(items[i]))
    for part, counts in ranks.in_step(parts, spare=[0]):
        results = function([items[i] for i in part])
        found += zip(part, results) if counts else []
    return ranks.collect(found)


# ---- python -m nanorlhf.data ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Options:
    init: str = "out/sft"            # folder of the model whose tokenizer and chat template read the records
    kind: Literal["text", "prompt", "completion", "preference", "ranked"] = "preference"  # what a script asks for
    columns: str = ""                # other names of the file's columns, OURS=THEIRS: prompt=question,chosen=good
    split: str = "train"             # of reviews: train, test, ood_near or ood_far
    limit: int = 0                   # read at most this many records; 0 = all
    show: int = 3                    # records to show
    max_length: int = 0              # longest prompt + response in tokens; 0 = the model's context
    max_prompt_length: int = 0       # cut longer prompts to this; 0 = half of max_length
    keep: Literal["end", "start", "tldr"] = "end"  # what an overlong prompt keeps (tldr: Stiennon's rule)


def show_tokens(tokenizer, name, ids, width=40):
    """Prints a stretch of token ids as their texts, the middle of a long one left out."""
    shown = [tokenizer.decode([i], start=False, special=True) for i in ids]
    if len(shown) > width:
        shown = shown[:width // 2] + [f"... {len(ids) - width} tokens ..."] + shown[-width // 2:]
    print(f"  {name}, {len(ids)} tokens: " + "|".join(repr(text)[1:-1] for text in shown))


def preview(file, options):
    """Prints the first records as the model will read them, what is learned and what is not, the lengths of all, and why rows
    are bad."""
    from nanorlhf.formats.checkpoints import read_config
    check_options(options)
    tokenizer = load_tokenizer(local_folder(options.init))
    limits, bad = length_limits(options, read_config(options.init)[0]["context"]), {}
    try:
        records = load_records(file, options.kind, options.split, options.limit or None, skip_bad=True, tokenizer=tokenizer,
                               columns=options.columns, bad=bad)
    except DataError as error:
        raise DataError(f"{error} (--kind {options.kind}; there are {', '.join(FIELDS)})") if bad else error
    lengths, cut = [], 0
    for i, record in enumerate(with_progress(records, "records tokenised")):
        fields = [field for field in FIELDS[options.kind] if field not in ("prompt", "scores")]
        texts = sum((record[f] if f == "responses" else [record[f]] for f in fields if f in record), [])
        names = [f"response with score {s:g}" for s in record["scores"]] if "scores" in record else fields
        prompt = record.get("prompt", "")
        if texts:
            examples = make_examples(tokenizer, prompt, texts, *limits, options.keep)
        else:
            ids = encode_prompt(tokenizer, prompt, limits[1], options.keep)
            examples = [Example(ids, len(ids))]
        lengths += [len(e.tokens) for e in examples]
        cut += sum(e.prompt_cut or e.response_cut for e in examples)
        if i < options.show:
            print(f"record {i + 1}")
            show_tokens(tokenizer, "prompt, not learned", examples[0].tokens[:examples[0].prompt_length])
            for name, example in zip(names, examples if texts else []):
                show_tokens(tokenizer, f"{name}, learned", example.tokens[example.prompt_length:])
    lengths.sort()
    print(f"{len(records):,} records; prompt + response in tokens: {lengths[0]} to {lengths[-1]}, half of them at most "
          f"{lengths[len(lengths) // 2]}; {cut:,} of {len(lengths):,} are cut")
    for reason, (count, place) in sorted(bad.items(), key=lambda item: -item[1][0]):
        print(f"{count:,} bad row{'s' if count > 1 else ''}: {reason} (the first: {place})")


def main():
    files = leading_words()
    if len(files) != 1 and not {"-h", "--help"} & set(sys.argv):
        raise SystemExit("error: want python -m nanorlhf.data FILE --kind KIND --init FOLDER (--help lists the options)")
    options = parse_options(Options, "Shows what a model will read of a file of records.", sys.argv[1 + len(files):],
                            prog="python -m nanorlhf.data FILE")
    with one_line_errors(options, lambda: "give the same command again"):
        preview(files[0], options)


if __name__ == "__main__":
    main()
