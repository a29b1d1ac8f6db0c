"""The data file: records in, batches out; it hands on what records.py, chat.py and tokenizer.py have for others.

    load_tokenizer(name_or_path) -> Tokenizer            text <-> ids, one tiktoken.Encoding inside
    load_records(name_or_path, kind) -> list of dicts    JSON lines of any known layout, as the kind asked for
    make_examples / pack_texts / collate                 records -> token rows -> right-padded tensors
    epoch_order / batch_indices / micro_batches          which rows make step k (no state: a resumed run replays it)

Everything wrong with a file is a DataError whose message is one line: `file:line: what is wrong`.
"""

import collections
import functools
import gzip
import hashlib
import json
import re
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nanorlhf.chat import (ASSISTANT, around_answers, conversation, encode_turns, encode_waiting, messages_of,  # noqa: F401
                           without_oldest)
from nanorlhf.records import CNNDM_PROMPT, FIELDS, TLDR_PROMPT, convert, records_of  # noqa: F401
from nanorlhf.run import DataError
from nanorlhf.tokenizer import Tokenizer, load_tokenizer, need_same_ids, one_line, tokenizer_of, train_bpe  # noqa: F401


# ------------------------------------------------------------------------------------------------------------ records
def load_records(path_or_name, kind, split="train", limit=None, skip_bad=False, seed=0, tokenizer=None):
    """Records of one kind from a file, or from the built-in task `reviews`.

    path_or_name  JSON lines (plain or gzip) or a JSON array, rows as in records.READERS; or "reviews".
    kind          a key of FIELDS. Rows of another kind are converted where that makes sense (records.convert). A "prompt"
                  record carries the file's answer, if there is one, as "completion".
    split, seed   for `reviews` only (train, test, ood_near, ood_far); a file holds one split.
    limit         at most so many records; for `reviews` 4000 (train) or 500 when None.
    skip_bad      pass over bad rows and print one line about them on stderr, instead of raising DataError at the first.
    tokenizer     a conversation that its chat template refuses is a bad row, too.

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
            found = records_of(row, kind)
            if tokenizer and found and (messages := conversation(tokenizer, found[0].get("prompt", ""))):
                encode_waiting(tokenizer, messages)
            records += found
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
    return [r for row in reviews.records(split, n, seed) for r in convert("completion", row, kind)]


def _rows(path):
    """(number, row) pairs: the lines of a file as bytes still to be parsed, or the elements of a JSON array, counted
    from 1 (the one case where the number in an error is not a line's)."""
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as e:
            raise DataError(f"{path}: broken gzip file ({one_line(e)})") from None
    content = content.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark
    if content.lstrip()[:1] == b"[":
        try:
            return list(enumerate(json.loads(content.decode()), 1))
        except (ValueError, RecursionError) as e:
            raise DataError(f"{path}: bad JSON array ({one_line(e)})") from None
    lines = enumerate(content.split(b"\n"), 1)  # at \n only: texts contain U+0085, a line end to str.splitlines
    return [(number, line) for number, line in lines if line.strip()]


def split_records(records, fraction, seed=0):
    """(train, held_out): about `fraction` of the groups (posts; else prompts or texts) are held out, each with all its
    records. A hash of the group decides, so the side of a post depends on nothing but the post, fraction and seed."""
    def is_held_out(record):
        key = record.get("group", record.get("prompt", record.get("text")))
        digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < fraction * 2**64
    sides = [is_held_out(r) for r in records]
    if 0 < fraction < 1 and len(set(sides)) < 2:
        raise DataError(f"{len(records)} records are too few, or too alike, to hold out {fraction:g} of their prompts: "
                        f"change --eval_fraction (0 holds out none) or give --eval_data")
    return [r for r, held in zip(records, sides) if not held], [r for r, held in zip(records, sides) if held]


# ----------------------------------------------------------------------------------------------- examples and batches
class Example(NamedTuple):
    tokens: list        # prompt ids, then response ids
    prompt_length: int  # >= 1: the first token is always a condition, never a target
    given: tuple = ()   # (first, last) of later stretches that are not the model's: other speakers' turns


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
    """str -> ids of a prompt, BOS first where the family has one; a transcript goes through the tokenizer's chat template, if
    it has one. An empty prompt becomes [EOS]: a model needs a token to condition on. Longer than max_prompt_length tokens
    (BOS counted): cut to its "end" or "start", or with "tldr" by `truncate_tldr` first; a templated conversation loses its
    oldest exchanges first."""
    if keep not in ("end", "start", "tldr"):
        raise DataError(f"keep={keep!r}: want end, start or tldr")
    messages = conversation(tokenizer, prompt)
    ids = encode_waiting(tokenizer, messages) if messages else tokenizer.encode(prompt)
    while messages and max_prompt_length and len(ids) > max_prompt_length and (fewer := without_oldest(messages)):
        messages, ids = fewer, encode_waiting(tokenizer, fewer)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    if messages:                                                                       # a template puts BOS itself, or none
        bos, ids = (bos, ids[1:]) if bos and ids[:1] == bos else ([], ids)
    if max_prompt_length is not None and len(bos) + len(ids) > max_prompt_length:
        room = max_prompt_length - len(bos)
        if room < 1:
            raise DataError(f"max_prompt_length {max_prompt_length} leaves no room for a prompt")
        if keep == "tldr" and not messages:
            ids = tokenizer.encode(truncate_tldr(tokenizer, prompt, room))
        ids = ids[:room] if keep == "start" else ids[-room:]
    return bos + ids or [tokenizer.eos_id]


def encode_response(tokenizer, response, prompt=None):
    """str -> ids of a response to this prompt, EOS at the end. Apart from the prompt, so that no token straddles the border."""
    if prompt and (messages := conversation(tokenizer, prompt)):
        last = {"role": "assistant", "content": response.removeprefix(" ")}
        return encode_turns(tokenizer, [*messages, last], every=False)[-1][0]
    return tokenizer.encode(response, start=prompt == "") + [tokenizer.eos_id]


def decode_response(tokenizer, ids, prompt=None):
    """ids -> str, as records hold it; encode_response's inverse."""
    text = tokenizer.decode(ids, start=prompt == "")
    if prompt and conversation(tokenizer, prompt):
        before, after = around_answers(tokenizer)
        return " " + text.removeprefix(before).removesuffix(after)                     # the space is that of "Assistant: "
    return text


def make_examples(tokenizer, prompt, responses, max_length=None, max_prompt_length=None, keep="end"):
    """K responses to one prompt -> K Examples with the same prompt ids, each at most max_length tokens.

    The DPO authors' rule: only if the longest response does not fit is the prompt cut, to max_prompt_length; only then
    are responses cut, and lose their EOS. Here they may use all that the prompt leaves (DPO's code: max_length -
    max_prompt_length even after a short prompt). Raises DataError if nothing is left of a response."""
    prompt_ids = encode_prompt(tokenizer, prompt)
    rows = [encode_response(tokenizer, response, prompt) for response in responses]
    if max_length is not None and len(prompt_ids) + max(map(len, rows)) > max_length:
        prompt_ids = encode_prompt(tokenizer, prompt, max_prompt_length, keep)
        if len(prompt_ids) >= max_length:
            raise DataError(f"a prompt of {len(prompt_ids)} tokens leaves no room for a response within max_length "
                            f"{max_length}: set max_prompt_length lower")
        rows = [row[:max_length - len(prompt_ids)] for row in rows]
    return [Example(prompt_ids + row, len(prompt_ids)) for row in rows]


def make_turns_example(tokenizer, prompt, response, max_length=None, max_prompt_length=None, keep="end"):
    """A conversation as one Example in which every turn of the assistant counts. Another text, and a conversation that is too
    long, is `make_example`'s: of it the response alone counts."""
    if (messages := messages_of(prompt)) is not None:
        pieces = encode_turns(tokenizer, [*messages, {"role": "assistant", "content": response.removeprefix(" ")}])
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
    """Documents, each followed by EOS, as one stream cut into Examples of `length` tokens (the last may be shorter).
    The stream starts with EOS, or every document with BOS where the family has one. prompt_length is 1."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    stream = [] if bos else [tokenizer.eos_id]
    for text in texts:
        stream += bos + encode_response(tokenizer, text, prompt="")
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
    for row, example in zip(mask, examples):
        for first, last in example.given:
            row[first:last] = False
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


def steps_of(epochs, n, batch_size):
    """Number of steps that make these epochs of batch_indices (at least 1)."""
    return max(1, round(epochs * max(1, n // batch_size)))


def micro_batches(examples, micro_batch_size, length=lambda example: len(example.tokens)):
    """Lists of at most micro_batch_size examples of similar length, so that little is padding. Their order is free
    because a loss is summed over the whole batch and divided by the count of the whole batch."""
    ordered = sorted(examples, key=length)
    return [ordered[i:i + micro_batch_size] for i in range(0, len(ordered), micro_batch_size)]
