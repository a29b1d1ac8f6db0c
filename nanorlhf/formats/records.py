"""Reads every common layout of preference data. A record is a dict of one kind of FIELDS (field names as in TRL).

    records_of(row, kind) -> list of records       recognises a JSON row by its fields; returns records of the kind asked for

If a record has a "group", it names the post that the record is about. Prompts and responses are strings; a conversation is
a transcript (chat.py).
"""

import itertools
import json
import re
import sys

from nanorlhf.errors import DataError, one_line
from nanorlhf.formats.chat import ASSISTANT, string, transcript

FIELDS = {"text": ("text",), "prompt": ("prompt",), "completion": ("prompt", "completion"),
          "preference": ("prompt", "chosen", "rejected"), "ranked": ("prompt", "responses", "scores")}
TLDR_PROMPT = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"  # Stiennon et al. 2020
CNNDM_PROMPT = "ARTICLE: {article}\nTL;DR:"
ALPACA_PROMPT = ("Below is an instruction that describes a task. Write a response that appropriately completes the "
                 "request.\n\n### Instruction:\n{instruction}\n\n### Response:")
ALPACA_INPUT_PROMPT = ("Below is an instruction that describes a task, paired with an input that provides further "
                       "context. Write a response that appropriately completes the request.\n\n"
                       "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:")


class Record(dict):
    """A dict with the fields of one kind. `row` is the JSON object that a prompt or a ranking was read from, with all its
    fields; None for other records."""
    row = None


def columns_of(records):
    """Returns {name: [value in each record's row, or None]} for all fields that the rows of these records have."""
    rows = [r if getattr(r, "row", None) is None else r.row for r in records]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def other_columns(records):
    """Returns for each record the fields of its row that no reader here takes, such as `answer`: they may be written beside new
    fields. A value that JSON cannot hold (NaN, half of a surrogate pair) is left out, which one line on stderr says."""
    taken = {name for fields, _, _ in READERS for name in fields} | {"input", "system", "group", "score", "score_chosen",
                                                                     "score_rejected"}
    columns, left_out = [], set()
    for record in records:
        others = {name: value for name, value in (record.row or {}).items() if name not in taken}
        bad = {name for name, value in others.items() if not is_json({name: value})}
        columns.append({name: value for name, value in others.items() if name not in bad})
        left_out |= bad
    if left_out:
        print(f"columns with values that JSON cannot hold are not written: {one_line(ascii(sorted(left_out)))}", file=sys.stderr)
    return columns


def is_json(value):
    """True if a value can be written as UTF-8 JSON."""
    try:
        return bool(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
    except ValueError:
        return False


def records_of(row, kind):
    """Returns the records of `kind` that one row makes. Raises a DataError that says what is wrong with the row."""
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
    fits = [reader for reader in fits if not any(set(reader[0]) < set(other[0]) for other in fits)]
    if not fits:
        raise DataError(f"no known record in the fields {one_line(', '.join(row)) or '(none)'}")
    # Prefer the kind asked for, else the first that fits. A prompt is read by the fullest layout: it has a reference answer.
    _, row_kind, read = min(fits, key=lambda reader: reader[1] == "text" if kind == "prompt" else reader[1] != kind)
    record = read(row)
    for field in ("text", "completion", "chosen", "rejected"):
        if field in record and not record[field].strip():
            raise DataError(f"empty {field}")
    if row_kind == "preference" and record["chosen"] == record["rejected"]:
        raise DataError("chosen equals rejected")
    if isinstance(row.get("group"), (str, int)):
        record["group"] = row["group"]
    converted = convert(row_kind, record, kind)
    if converted is None:
        raise DataError(f"no {kind} record ({', '.join(FIELDS[kind])}) can be made of a {row_kind} record, "
                        f"fields {one_line(', '.join(row))}")
    converted = [Record(r) for r in converted]
    for r in converted if kind in ("prompt", "ranked") else ():         # the kinds that a reward sees; others need not hold it
        r.row = row
    return converted


def convert(found, record, kind):
    """Converts one record of kind `found` to a list of records of `kind`. Returns None if there is no honest way."""
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
    if kind == "preference" and found == "ranked":  # every pair of different texts that is not a tie
        pairs = itertools.permutations(zip(record["responses"], record["scores"]), 2)
        return [{"prompt": record["prompt"], "chosen": a, "rejected": b, **group}
                for (a, s), (b, t) in pairs if s > t and a != b]
    if kind == "prompt" and found == "preference":
        return convert(found, record, "completion")
    if kind == "prompt" and found == "ranked":
        return [{"prompt": record["prompt"], **group}]
    if kind == "text" and found != "prompt":
        return [{"text": r["prompt"] + r["completion"], **group} for r in convert(found, record, "completion")]
    return None


def _dialogue(prompt, response, field):
    """Returns (prompt, response) as strings. Lists of messages become a transcript, whose last turn is the response. A
    string beside a list is one turn. A response that begins with another role than the assistant's contains its prompt."""
    response = [response] if isinstance(response, dict) and "role" in response else response
    if not isinstance(prompt, list) and not isinstance(response, list):
        return string(prompt, "prompt"), string(response, field)
    prompt = prompt if isinstance(prompt, list) else [{"role": "user", "content": string(prompt, "prompt")}]
    if not isinstance(response, list):            # transcript() adds the space
        response = [{"role": "assistant", "content": string(response, field).removeprefix(" ")}]
    if not transcript(response[:1], field).startswith(ASSISTANT):
        prompt = []
    prompt, last = prompt + response[:-1], transcript(response[-1:], field)
    if not last.startswith(ASSISTANT):
        raise DataError(f"{field} does not end with an assistant message")
    return transcript(prompt, "prompt") + ASSISTANT, last.removeprefix(ASSISTANT)


def _prompt(row):
    """Returns the prompt of a row: a string or a list of messages."""
    if "instruction" in row:
        instruction, extra = string(row["instruction"], "instruction"), string(row.get("input") or "", "input")
        template = ALPACA_INPUT_PROMPT if extra else ALPACA_PROMPT
        return template.format(instruction=instruction, input=extra)
    return row["prompt"] if "prompt" in row else row["query"]


def _read_prompt(row):
    prompt = _prompt(row)
    return {"prompt": transcript(prompt, "prompt") + ASSISTANT if isinstance(prompt, list) else string(prompt, "prompt")}


def _read_completion(row):
    field = "output" if "instruction" in row else "completion"
    prompt, completion = _dialogue(_prompt(row), row[field], field)
    return {"prompt": prompt, "completion": completion}


def _read_messages(row):
    """Reads a whole conversation in OpenAI's layout. The last message is the response."""
    if not isinstance(row["messages"], list):
        raise DataError("messages is not a list")
    prompt, completion = _dialogue([], row["messages"], "messages")
    return {"prompt": prompt, "completion": completion}


def _sharegpt(row):
    """Reads a whole conversation in ShareGPT's layout. `chosen` and `rejected`, if present, are its next turn."""
    def message(turn):
        roles = {"human": "user", "gpt": "assistant"}
        return {"role": roles.get(turn.get("from"), turn.get("from")), "content": turn.get("value")}
    try:
        turns = {k: message(row[k]) for k in ("chosen", "rejected") if k in row}
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        turns["messages"] = system + [message(turn) for turn in row["conversations"]]
    except (AttributeError, TypeError):
        raise DataError("conversations are not lists of {from, value}") from None
    if len(turns) == 3:
        return _read_preference({"prompt": turns["messages"], "chosen": [turns["chosen"]], "rejected": [turns["rejected"]]})
    return _read_messages(turns)


def _read_preference(row):
    prompt, chosen = _dialogue(_prompt(row), row["chosen"], "chosen")
    other, rejected = _dialogue(_prompt(row), row["rejected"], "rejected")
    if prompt != other:
        raise DataError("prompts differ")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _read_transcripts(row):
    """Reads two whole conversations. The prompt is what they share, up to and including the last "\\n\\nAssistant:"."""
    if isinstance(row["chosen"], list):
        return _read_preference({"prompt": [], **row})
    texts = [string(row[field], field) for field in ("chosen", "rejected")]
    for field, text in zip(("chosen", "rejected"), texts):
        if ASSISTANT not in text:
            raise DataError(f"{field} has no {ASSISTANT!r}")
    (head, _, chosen), (other, _, rejected) = [text.rpartition(ASSISTANT) for text in texts]
    if head != other:
        raise DataError("prompts differ")
    # Rows that open with the same question are often one conversation at different lengths, so they form one group.
    question = (head + ASSISTANT).partition(ASSISTANT)[0]
    return {"prompt": head + ASSISTANT, "chosen": chosen, "rejected": rejected, "group": question}


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
    if not all(-sys.float_info.max <= s <= sys.float_info.max for s in scores):  # NaN compares false, so it fails
        raise DataError("scores are not all finite")
    pairs = [_dialogue(_prompt(row), r, "responses") for r in responses]
    return {"prompt": pairs[0][0], "responses": [r for _, r in pairs], "scores": [float(s) for s in scores]}


def _read_summaries(row):
    """Reads openai/summarize_from_feedback. `choice` is the index of the better summary."""
    info, summaries = row["info"], row["summaries"]
    if not isinstance(info, dict) or not isinstance(summaries, list) or len(summaries) != 2:
        raise DataError("info is not an object or summaries is not a list of two")
    if type(row["choice"]) is not int or row["choice"] not in (0, 1):
        raise DataError("choice is neither 0 nor 1")
    template, fields = (TLDR_PROMPT, ("subreddit", "title", "post")) if info.get("post") is not None else (
        CNNDM_PROMPT, ("article",))
    prompt = template.format(**{f: string(info.get(f), f"info.{f}") for f in fields})
    texts = [string(s.get("text") if isinstance(s, dict) else None, "summaries.text") for s in summaries]
    group = {"group": info["id"]} if isinstance(info.get("id"), str) else {}
    return {"prompt": prompt, "chosen": texts[row["choice"]], "rejected": texts[1 - row["choice"]], **group}


def _read_sampled_answers(row):
    """Reads Anthropic's scored samples. They are sorted by score, so their order reveals the score: never let a model
    see it. Most end with a stray "Human:" of the next turn, which is removed."""
    try:
        strings = [string(a["sampled_string"], "sampled_string") for a in row["sampled_answers"]]
        scores = [a["pm_scores"][0]["pm_score"] for a in row["sampled_answers"]]
    except (KeyError, TypeError, IndexError):
        raise DataError("sampled_answers need a sampled_string and pm_scores[].pm_score each") from None
    responses = [re.sub(r"\n\n?Human:\s*$", "", s) for s in strings]
    return _read_ranked({"prompt": row["rl_prompt"], "responses": responses, "scores": scores})


READERS = (  # (fields that identify a row, its kind, its reader); earlier ones first
    (("info", "summaries", "choice"), "preference", _read_summaries),
    (("rl_prompt", "sampled_answers"), "ranked", _read_sampled_answers),
    (("conversations", "chosen", "rejected"), "preference", _sharegpt),
    (("prompt", "chosen", "rejected"), "preference", _read_preference),
    (("instruction", "chosen", "rejected"), "preference", _read_preference),
    (("chosen", "rejected"), "preference", _read_transcripts),
    (("prompt", "responses", "scores"), "ranked", _read_ranked),
    (("query", "responses", "scores"), "ranked", _read_ranked),
    (("prompt", "completion"), "completion", _read_completion),
    (("instruction", "output"), "completion", _read_completion),
    (("messages",), "completion", _read_messages),
    (("conversations",), "completion", _sharegpt),
    (("text",), "text", lambda row: {"text": string(row["text"], "text")}),
    (("prompt",), "prompt", _read_prompt),
    (("instruction",), "prompt", _read_prompt),
)
