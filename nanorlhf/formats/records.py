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
from nanorlhf.files import parse_json
from nanorlhf.formats.chat import ASSISTANT, TURN, content_of, messages_of, name_of, string, transcript

FIELDS = {"text": ("text",), "prompt": ("prompt",), "completion": ("prompt", "completion"),
          "preference": ("prompt", "chosen", "rejected"), "ranked": ("prompt", "responses", "scores"),
          "candidates": ("prompt", "responses")}       # of one prompt, not scored yet
TLDR_PROMPT = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"  # Stiennon et al. 2020
CNNDM_PROMPT = "ARTICLE: {article}\nTL;DR:"
ALPACA_PROMPT = ("Below is an instruction that describes a task. Write a response that appropriately completes the "
                 "request.\n\n### Instruction:\n{instruction}\n\n### Response:")
ALPACA_INPUT_PROMPT = ("Below is an instruction that describes a task, paired with an input that provides further "
                       "context. Write a response that appropriately completes the request.\n\n"
                       "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:")

# Fields that change what the others mean, besides those in READERS:
BEFORE = ("system", "system_prompt", "history")    # read: what comes before the prompt
TRAINED = ("weight", "train", "training", "loss")  # read, in a message: 0 or false if nothing is learned from this turn
LABELS = ("label", "kto_tag", "weight")            # read: NO for an answer that is not to be imitated (KTO), as text as well
NO, YES = ("false", "0", "0.0"), ("true", "1", "1.0")
REFUSED = ("tools", "functions", "documents", "image", "images", "video", "videos", "audio", "audios",
           "chat_template_kwargs")                 # unless they are empty
SCORES = ("score", "score_chosen", "score_rejected")   # beside a choice that was made by them
# Fields that mean something in a row with a prompt and responses, so other_columns leaves them out:
MEANT = {"prompt", "completion", "chosen", "rejected", "responses", "scores", "finished", "messages", "conversations",
         "instruction", "group", *SCORES, *BEFORE}


class Record(dict):
    """A dict with the fields of one kind. `row` is the JSON object that a prompt, a ranking or candidates were read from, with
    all its fields, and `read` names those that identified it; None and () for other records. `line` is its place in the file."""
    row, read, line = None, (), 0


def columns_of(records):
    """Returns {name: [value in each record's row, or None]} for all fields that the rows of these records have."""
    rows = [r if getattr(r, "row", None) is None else r.row for r in records]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def with_input(fields):
    """Returns the fields that a layout reads: besides those that identify it, an instruction's input, by either of its names."""
    return {*fields, "input", "context"} if "instruction" in fields else set(fields)


def other_columns(records):
    """Returns for each record its group and the fields of its row that were not read, such as `answer`: they may be written
    beside new fields. A value that JSON cannot hold (NaN, half of a surrogate pair) is left out; one line on stderr says so."""
    columns, left_out = [], set()
    for record in records:
        read = with_input(record.read)
        others = {name: value for name, value in (record.row or {}).items() if name not in MEANT and name not in read
                  and not (name in LABELS and isinstance(value, (int, float)))}
        others |= {name: record[name] for name in ("group",) if name in record}
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


def records_of(row, kind, unread=None):
    """Returns the records of `kind` that one row makes. Raises a DataError that says what is wrong with the row. unread: a set
    that takes the names of fields that say something and had no part in it."""
    if isinstance(row, bytes):
        try:
            row = parse_json(row.decode())
        except UnicodeDecodeError:
            raise DataError("bad UTF-8: save the file as UTF-8") from None
        except ValueError:
            raise DataError("bad JSON") from None
    if not isinstance(row, dict):
        raise DataError("row is not a JSON object")
    names = one_line(", ".join(name if value is not None else f"{name} (null)" for name, value in row.items()))
    whole, row = row, {name: value for name, value in row.items() if value is not None}
    if refused := [name for name in REFUSED if row.get(name) and row[name] != "[]"]:
        raise DataError(f"{refused[0]} is not read: leave the field out if the rows are right without it")
    fits = [reader for reader in READERS if set(reader[0]) <= row.keys() and (reader[1] != "candidates" or kind == "candidates")]
    fits = [reader for reader in fits if reader[1] == "candidates" or not any(set(reader[0]) < set(o[0]) for o in fits)]
    if not fits:
        raise DataError(f"no known record in the fields {names or '(none)'}")
    # Prefer the kind asked for, else the first that fits. A prompt is read by the fullest layout: it has a reference answer.
    fields, row_kind, read = min(fits, key=lambda reader: reader[1] == "text" if kind == "prompt" else reader[1] != kind)
    if row_kind == "text" and (before := [name for name in BEFORE if row.get(name)]):
        raise DataError(f"{before[0]} beside text is not read: put it into the text")
    record = read(row, *fields)
    unfit = record.pop("unfit", None)              # why only the prompt is of use
    if row_kind == "completion" and (labels := [n for n in LABELS if str(row.get(n)).lower() in NO]):
        unfit = f"{labels[0]} is {row[labels[0]]}: the answer is not to be imitated"
    elif row_kind == "completion" and str(row.get("weight", 1)).lower() not in YES:
        unfit = f"weight is {one_line(repr(row['weight']))}, neither 0 nor 1"
    if unfit and kind != "prompt":
        raise DataError(unfit)
    if unfit:
        record = {"prompt": record["prompt"]}
    if kind != "completion":
        record.pop("given", None)
    compared = kind in ("preference", "ranked")    # for the others, any rejected response will do
    for field in ("text", "completion", "chosen", *["rejected"] * compared):
        if field in record and not record[field].strip():
            raise DataError(f"empty {field}")
        if read is _read_transcripts and field in record and TURN.search(record[field]):
            raise DataError(f"{field} goes on after the answer")
    if row_kind == "preference" and compared and record["chosen"] == record["rejected"]:
        raise DataError("chosen equals rejected")
    if compared and not all(response.strip() for response in record.get("responses", [])):
        raise DataError("empty response")
    if isinstance(row.get("group"), (str, int)):
        record["group"] = row["group"]
    if isinstance(record.get("group"), str):
        string(record["group"], "group")
    converted = convert(row_kind, record, kind)
    if converted is None:
        raise DataError(f"no {kind} record ({', '.join(FIELDS[kind])}) can be made of a {row_kind} record, "
                        f"fields {names}")
    converted = [Record(r) for r in converted]
    for r in converted if kind in ("prompt", "ranked", "candidates") else ():          # a reward sees these; others need no row
        r.row, r.read = whole, fields
    if unread is not None:
        heeded = {*with_input(fields), *SCORES, "group", *(BEFORE if read is not _read_summaries else ()),
                  *(LABELS if row_kind == "completion" else ()), *(("finished",) if row_kind == "candidates" else ())}
        unread |= {name for name, value in row.items() if name not in heeded and value not in ("", [], {})}
        unread |= {f"{name} of a message" for value in row.values() if isinstance(value, list) for m in value
                   if isinstance(m, dict) and {"role", "from"} & m.keys() for name, said in m.items()
                   if name not in ("role", "from", "content", "value", *TRAINED) and said not in (None, "", [], {})}
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
    if kind == "preference" and found == "ranked":  # every pair of different texts, unless it is a tie or the texts change places
        pairs = itertools.permutations(zip(record["responses"], record["scores"]), 2)
        pairs = dict.fromkeys((a, b) for (a, s), (b, t) in pairs if s > t and a != b)
        return [{"prompt": record["prompt"], "chosen": a, "rejected": b, **group} for a, b in pairs if (b, a) not in pairs]
    if kind == "prompt" and found == "preference":
        return convert(found, record, "completion")
    if kind == "prompt" and found == "ranked":
        return [{"prompt": record["prompt"], **group}]
    if kind == "text" and found != "prompt":
        return [{"text": r["prompt"] + r["completion"], **group} for r in convert(found, record, "completion")]
    return None


def _prompt(row, field):
    """Returns the prompt of a row, after what BEFORE names: a string or a list of messages."""
    prompt, is_chat = row.get(field, []), any(row.get(name) for name in BEFORE)
    if field == "instruction":
        prompt, extra = string(prompt, field), string(row.get("input") or row.get("context") or "", "input")
        if row.get("input") and row.get("context") and row["input"] != row["context"]:
            raise DataError("an instruction has both input and context: only one of them is its input")
        if is_chat:
            prompt += f"\n{extra}" if extra else ""
        else:
            prompt = (ALPACA_INPUT_PROMPT if extra else ALPACA_PROMPT).format(instruction=prompt, input=extra)
    if isinstance(prompt, list):
        return _before(row, prompt, field)
    if field in ("messages", "conversations"):
        raise DataError(f"{field} is not a list")
    prompt = string(prompt, field)
    return _before(row, _turns(prompt), field) if is_chat else prompt


def _before(row, messages, field):
    """Returns the messages after those of the row's system message and history. A system message may be given twice."""
    systems = [string(row[name], name) for name in ("system", "system_prompt") if row.get(name)]
    if messages and name_of(messages[0], field) == "System":
        systems, messages = [*systems, content_of(messages[0], field)], messages[1:]
    if len(set(systems)) > 1:
        raise DataError("two system messages that differ")
    pairs = row.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise DataError("history is not a list of [user, assistant] pairs")
    history = [{"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair)]
    return _joined([{"role": "system", "content": text} for text in systems[:1]] + history + messages, field)


def _joined(messages, field):
    """Returns the messages; neighbours of one role become one message, unless the model is to learn some of them only."""
    joined = []
    for name, same in itertools.groupby(messages, lambda m: name_of(m, field)):
        same = list(same)
        if name == "Assistant" and len(set(map(_is_learned, same))) > 1:
            raise DataError(f"{field} holds messages of one role in a row, of which some have weight 0")
        joined.append({**same[-1], "content": "\n\n".join(content_of(m, field) for m in same)} if len(same) > 1 else same[0])
    return joined


def _turns(prompt):
    """Returns a prompt as messages. A string that is no transcript is one message of the user's."""
    if isinstance(prompt, list):
        return prompt
    return messages_of(_tidy(prompt)) or [{"role": "user", "content": prompt}] * bool(prompt.strip())


def _is_open(messages):
    return bool(messages) and name_of(messages[-1], "prompt") == "Assistant"


def _tidy(prompt):
    """Returns a prompt string; a transcript without a space at its end, which belongs to the answer, with blank lines before it,
    and with ASSISTANT at its end if the user had the last turn."""
    text = prompt.replace("\r\n", "\n")
    if not messages_of(text):
        asked = text.rstrip() + ASSISTANT
        if not TURN.search(text) or not messages_of(asked):
            return prompt
        text = asked
    text = "\n\n" + text.lstrip()
    return text.rstrip() if text.rstrip().endswith(ASSISTANT) else text


def _transcripts(messages, response, field, where="prompt"):
    """Returns a list of messages and the assistant's next one as (prompt, response). The response continues an open answer."""
    answer = transcript([response], field).removeprefix(ASSISTANT)
    if not messages:
        raise DataError(f"{field} has no message before the answer")
    prompt = transcript(messages, where)
    return (prompt, answer[1:]) if _is_open(messages) else (prompt + ASSISTANT, answer)


def _dialogue(prompt, response, field):
    """Returns (prompt, response, messages): two strings, and the messages that they are made of ([] for two strings). Lists of
    messages become a transcript, whose last turn is the response. A string beside a list is one turn. A response that begins
    with another role than the assistant's repeats its prompt."""
    response = [response] if isinstance(response, dict) and {"role", "from"} & response.keys() else response
    if isinstance(prompt, str) and not isinstance(response, list):
        tidy, response = _tidy(prompt), string(response, field)
        if tidy.endswith(ASSISTANT) and not prompt.replace("\r\n", "\n").endswith(ASSISTANT):
            response = " " + re.sub(r"^\s*Assistant:", "", response).removeprefix(" ")
        return tidy, response, []
    messages = _turns(prompt)
    if not isinstance(response, list):            # the space in front is added by transcript()
        words = string(response, field)
        response = [{"role": "assistant", "content": words if _is_open(messages) else words.removeprefix(" ")}]
    response = _joined(response, field)
    if not response or name_of(response[-1], field) != "Assistant":
        raise DataError(f"{field} does not end with an assistant message")
    if name_of(response[0], field) != "Assistant":
        messages, response = _repeated(messages, response[:-1], field, isinstance(prompt, str)), response[-1:]
    elif _is_open(messages) and len(response) > 1:
        raise DataError(f"prompt ends inside an answer, but {field} is more than the rest of it")
    messages = messages + response
    return *_transcripts(messages[:-1], messages[-1], field), messages


def _repeated(messages, head, field, is_text):
    """Returns the messages that come before a response which repeats its prompt: `head`, with the prompt's system message. A
    prompt that is a string may be any of the user's messages."""
    asked, repeated = ([(name_of(m, field), content_of(m, field).strip()) for m in some] for some in (messages, head))
    system = [] if "System" in (name for name, _ in repeated[:1]) else messages[:sum(name == "System" for name, _ in asked)]
    asked = asked[len(system):]
    if repeated[:len(asked)] != asked and not (is_text and asked[-1] in repeated):
        raise DataError(f"prompt is not the beginning of {field}")
    return system + head


def _learned(messages):
    """Returns what `weight` and its like say: {"unfit": why the last message is no demonstration}, or {"given": [numbers of the
    assistant's earlier turns (0: the first) that nothing is learned from]}, or {}."""
    if messages and not _is_learned(messages[-1]):
        return {"unfit": "the answer is not to be learned: its weight is 0, or train is false"}
    earlier = [m for m in messages[:-2] if name_of(m, "prompt") == "Assistant"]    # messages[-2] is the user's, or an open answer
    given = [k for k, m in enumerate(earlier) if not _is_learned(m)]
    return {"given": given} if given else {}


def _is_learned(message):
    values = {name: message[name] for name in TRAINED if message.get(name) is not None}
    for name, value in values.items():
        if value not in (0, 1):                    # True equals 1
            raise DataError(f"{name} of a message is {one_line(repr(value))}, neither 0 nor 1")
    return all(values.values())


def _read_prompt(row, field):
    prompt = _prompt(row, field)
    if isinstance(prompt, str):
        return {"prompt": _tidy(prompt)}
    if not prompt:
        raise DataError(f"{field} is empty")
    return {"prompt": transcript(prompt, field) + ("" if _is_open(prompt) else ASSISTANT)}


def _read_completion(row, field, completion):
    prompt, response, messages = _dialogue(_prompt(row, field), row[completion], completion)
    return {"prompt": prompt, "completion": response, **_learned(messages)}


def _read_messages(row, field):
    """Reads a whole conversation. The last message that the model is to learn is the response; what follows it is left out."""
    messages = _prompt(row, field)
    speakers = [name_of(m, field) for m in messages]
    if speakers[-1:] != ["Assistant"]:
        return {**_read_prompt(row, field), "unfit": f"{field} does not end with an assistant message"}
    learned = [k for k, name in enumerate(speakers) if name == "Assistant" and _is_learned(messages[k])]
    last = learned[-1] if learned else len(messages) - 1
    prompt, response = _transcripts(messages[:last], messages[last], field, field)
    return {"prompt": prompt, "completion": response, **_learned(messages[:last + 1])}


def _read_preference(row, field, chosen, rejected):
    """Reads two responses. `messages` and `conversations` may end with the chosen one, too."""
    asked = _prompt(row, field)
    if field in ("messages", "conversations") and _is_open(asked):
        answer = row[chosen][-1] if isinstance(row[chosen], list) and row[chosen] else row[chosen]
        answer = content_of(answer, chosen) if isinstance(answer, dict) else string(answer, chosen)
        if content_of(asked.pop(), field).strip() != answer.strip():
            raise DataError(f"{field} ends with an answer that is not the chosen one")
    (prompt, chosen, messages), (other, rejected, _) = [_dialogue(asked, row[name], name) for name in (chosen, rejected)]
    if prompt != other:
        raise DataError("prompts differ")
    if unfit := _learned(messages).get("unfit"):
        raise DataError(unfit)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _read_transcripts(row, *fields):
    """Reads two whole conversations. The prompt is what they share, up to and including the last "\\n\\nAssistant:"."""
    if isinstance(row["chosen"], list):
        return _read_preference(row, None, *fields)
    texts = [string(row[field], field) for field in fields]
    for field, text in zip(fields, texts):
        if ASSISTANT not in text:
            raise DataError(f"there is no prompt, and {field} has no {ASSISTANT!r}")
    (head, _, chosen), (other, _, rejected) = [text.rpartition(ASSISTANT) for text in texts]
    if head != other:
        raise DataError("prompts differ")
    record = _read_preference({**row, "prompt": head + ASSISTANT, "chosen": chosen, "rejected": rejected}, "prompt", *fields)
    # Rows that open with the same question are often one conversation at different lengths, so they form one group.
    return {**record, "group": (head + ASSISTANT).partition(ASSISTANT)[0]}


def _read_ranked(row, field, *_):
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
    prompt = _prompt(row, field)
    prompts, responses, _ = zip(*(_dialogue(prompt, r, "responses") for r in responses))
    if len(set(prompts)) > 1:
        raise DataError("prompts differ")
    return {"prompt": prompts[0], "responses": list(responses), "scores": [float(s) for s in scores]}


def _read_candidates(row, field, _):
    """Reads responses that are to be scored. A string is a sample, and may be empty or hold anything; "finished" says which ended
    by themselves (not given: all)."""
    if not isinstance(row["responses"], list) or not row["responses"]:
        raise DataError(f"responses is {'empty' if row['responses'] == [] else 'not a list'}")
    finished = row.get("finished", [True] * len(row["responses"]))
    if not isinstance(finished, list) or [type(f) for f in finished] != [bool] * len(row["responses"]):
        raise DataError("finished is not a list of true or false, one for each response")
    asked, prompt = _prompt(row, field), _read_prompt(row, field)["prompt"]

    def read(response):
        if isinstance(asked, list) and isinstance(response, str):
            response = string(response, "a response")
            return prompt, response if _is_open(asked) else " " + response.removeprefix(" ")
        return _dialogue(asked, response, "a response")[:2]
    prompts, responses = zip(*map(read, row["responses"]))
    if len(set(prompts)) > 1:
        raise DataError("prompts differ")
    return {"prompt": prompts[0], "responses": list(responses), "finished": finished}


def _read_summaries(row, *_):
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


def _read_sampled_answers(row, field, _):
    """Reads Anthropic's scored samples. They are sorted by score, so their order reveals the score: never let a model
    see it. Most end with a stray "Human:" of the next turn, which is removed."""
    try:
        strings = [string(a["sampled_string"], "sampled_string") for a in row["sampled_answers"]]
        scores = [a["pm_scores"][0]["pm_score"] for a in row["sampled_answers"]]
    except (KeyError, TypeError, IndexError):
        raise DataError("sampled_answers need a sampled_string and pm_scores[].pm_score each") from None
    responses = [re.sub(r"\n\n?Human:\s*$", "", s) for s in strings]
    return _read_ranked({**row, "responses": responses, "scores": scores}, field)


READERS = (  # (fields that identify a row, its kind, its reader); earlier ones first
    (("info", "summaries", "choice"), "preference", _read_summaries),
    (("rl_prompt", "sampled_answers"), "ranked", _read_sampled_answers),
    (("conversations", "chosen", "rejected"), "preference", _read_preference),
    (("prompt", "chosen", "rejected"), "preference", _read_preference),
    (("messages", "chosen", "rejected"), "preference", _read_preference),
    (("instruction", "chosen", "rejected"), "preference", _read_preference),
    (("chosen", "rejected"), "preference", _read_transcripts),
    (("prompt", "responses", "scores"), "ranked", _read_ranked),
    (("query", "responses", "scores"), "ranked", _read_ranked),
    (("prompt", "completion"), "completion", _read_completion),
    (("instruction", "output"), "completion", _read_completion),
    (("instruction", "response"), "completion", _read_completion),
    (("messages",), "completion", _read_messages),
    (("conversations",), "completion", _read_messages),
    (("prompt", "responses"), "candidates", _read_candidates),          # only if asked for: else the row is a prompt
    (("text",), "text", lambda row, field: {"text": string(row[field], field)}),
    (("prompt",), "prompt", _read_prompt),
    (("instruction",), "prompt", _read_prompt),
)
