"""Conversations: records hold them as Anthropic-HH transcripts; a checkpoint's own chat template renders them.

    "\\n\\nHuman: Hi.\\n\\nAssistant:"   <->   [{"role": "user", "content": "Hi."}]

If the tokenizer has a chat template (from tokenizer_config.json or chat_template.jinja), it renders such a prompt. Otherwise
the model reads the transcript as it is. The words of a message never become a special token; what the template writes does.
"""

import functools
import itertools
import json
import os
import re
import time

from nanorlhf.errors import DataError, one_line

ASSISTANT = "\n\nAssistant:"  # ends a prompt; the response then begins with a space
ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}
NAMES = {"user": "Human", "human": "Human", "assistant": "Assistant", "gpt": "Assistant", "system": "System",
         "developer": "System"}
TURN = re.compile(r"\n\n(Human|Assistant):")  # a system message is always the first: elsewhere, "System:" is somebody's words
SURROGATE = re.compile("[\ud800-\udfff]")
UNREAD = ("tool_calls", "tool_call_id", "function_call", "reasoning_content", "reasoning", "thinking", "image", "images", "video",
          "videos", "audio", "audios", "train_detail", "training_detail")


def string(value, field):
    """Returns a text, or the joined text parts of a list of them. Raises a DataError for anything else."""
    if isinstance(value, list) and value and all(isinstance(p, dict) and "type" in p for p in value):
        if other := [p["type"] for p in value if p["type"] != "text"]:
            raise DataError(f"{field} holds a part of type {one_line(repr(other[0]))}: only text parts are read")
        value = "".join(string(p.get("text"), field) for p in value)
    if not isinstance(value, str):
        raise DataError(f"{field} is not a string")
    if SURROGATE.search(value):
        raise DataError(f"unpaired surrogate in {field}")
    return value


def name_of(message, field):
    """Returns whose turn a message is: Human, Assistant or System. OpenAI writes {role, content}, ShareGPT {from, value}."""
    if not isinstance(message, dict):
        raise DataError(f"{field} holds {one_line(repr(message))}, which is no message {{role, content}} or {{from, value}}")
    role = message.get("role") or message.get("from")
    if not isinstance(role, str) or role not in NAMES:
        raise DataError(f"{field} holds a message whose role is {one_line(repr(role))}, not one of user, assistant, system")
    return NAMES[role]


def content_of(message, field):
    """Returns the text of a message. Raises a DataError if the text is not all that the message says."""
    if unread := [key for key in UNREAD if message.get(key)]:
        raise DataError(f"{field} holds a message with {unread[0]}, which is not read")
    content = [message[key] for key in ("content", "value") if key in message]
    if content and all(c is None for c in content):
        raise DataError(f"{field} holds a message with null as its content")
    return string(next((c for c in content if c is not None), None), f"a message of {field}")


def transcript(messages, field):
    """Turns [{role, content}, ...] into "\\n\\nHuman: ...\\n\\nAssistant: ...". Raises a DataError for what it cannot express."""
    text = ""
    for m in messages:
        name, content = name_of(m, field), content_of(m, field)
        if match := TURN.search(content.replace("\r\n", "\n")):         # records._tidy reads line ends so, too
            raise DataError(f"{field} holds a message with {match[0]!r} in it, which would begin another turn")
        if name == "Assistant" and not content.strip():
            raise DataError(f"{field} holds an empty assistant message")
        if name == "System" and text:
            raise DataError(f"{field} holds a system message that is not the first message")
        text += f"\n\n{name}: {content}"
    return text


def messages_of(prompt):
    """Returns the messages of a transcript that ends with ASSISTANT (and perhaps a space), or with the beginning of an answer,
    which is then the last message; None for any other text. Consecutive messages of one role are merged. The blank lines before
    a first "Human:" may be missing, and those before a first "System:" if a "Human:" with blank lines follows."""
    bare = prompt.lstrip()
    begins = bare.startswith("Human:") or bare.startswith("System:") and "\n\nHuman:" in bare
    before, *turns = TURN.split("\n\n" + bare if begins else prompt)
    if before.startswith("\n\nSystem:"):
        turns = ["System", before.removeprefix("\n\nSystem:"), *turns]
    elif before:
        return None
    if turns[-2:-1] != ["Assistant"]:
        return None
    messages = []
    for name, content in zip(turns[::2], turns[1::2]):
        if messages and messages[-1]["role"] == ROLES[name]:
            messages[-1]["content"] += "\n\n" + content.removeprefix(" ")
        else:
            messages.append({"role": ROLES[name], "content": content.removeprefix(" ")})
    if not messages[-1]["content"].strip():
        messages.pop()
    return messages or None


def is_open(messages):
    """True if the conversation ends inside an answer, which a response continues."""
    return messages[-1]["role"] == "assistant"


def without_oldest(messages):
    """Returns the conversation without its oldest exchange; the system message stays. None if only the question is left."""
    system = [m for m in messages[:1] if m["role"] == "system"]
    asked = [k for k, m in enumerate(messages) if m["role"] == "user"]
    return system + messages[asked[1]:] if len(asked) > 1 else None


def conversation(tokenizer, prompt):
    """Returns the messages of a prompt that the tokenizer's chat template has to render, or None."""
    return messages_of(prompt) if tokenizer.chat_template else None


@functools.lru_cache(8)
def _compiled(template):
    """Compiles a Jinja template with transformers' settings, in a sandbox, because a checkpoint is somebody else's file."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise DataError(f"the chat template refuses the conversation: {one_line(message)}")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals |= dict(raise_exception=raise_exception, strftime_now=lambda form: time.strftime(form))
    # transformers finds the assistant's words by {% generation %}; encode_turns does not need it.
    template = re.sub(r"(\{%-?\s*)generation(\s*-?%\})", r"\1if true\2", template)
    return environment.from_string(re.sub(r"(\{%-?\s*)endgeneration(\s*-?%\})", r"\1endif\2", template))


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """transformers' filter: Jinja's own escapes <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Parts(list):
    """A message's content as a list of one text part, for templates that loop over parts. Printed whole, it is its text."""

    def __init__(self, text):
        super().__init__([{"type": "text", "text": text}])

    def __str__(self):
        return self[0]["text"]


def _render(tokenizer, messages, add_generation_prompt):
    """Returns the text of a conversation. With add_generation_prompt it ends where the assistant's reply begins: behind the
    template's generation prompt, or behind the words of an open answer. Raises a DataError if a message's words are lost."""
    cut = add_generation_prompt and bool(messages) and is_open(messages)
    if not tokenizer.chat_template:
        text = "".join(f"\n\n{NAMES[m['role']]}: {m['content']}" for m in messages)
        return text + (ASSISTANT if add_generation_prompt and not cut else "")
    # A character that no message has marks the end of each message's words. A template may change the space around them, and
    # drop the reasoning at the beginning of an assistant's earlier message. The last one is trained on or continued: all of it
    # has to arrive, in whatever spacing.
    end = _unused(messages)
    words = [m["content"].rstrip() for m in messages]
    if cut:
        words[-1] = messages[-1]["content"]
    marked = [w + end + m["content"][len(w):] if w else m["content"] for w, m in zip(words, messages)]
    real = [m["content"] for m in messages[:len(messages) - cut]] + marked[-1:] * cut  # a template may ask how a message ends
    errors = []
    for form in (str, _Parts):
        try:
            text, plain = (_compiled(tokenizer.chat_template).render(
                messages=[{"role": m["role"], "content": form(c)} for m, c in zip(messages, contents)],
                add_generation_prompt=add_generation_prompt and not cut, tools=None, documents=None, **tokenizer.special_text)
                for contents in (marked, real))
        except DataError as error:
            errors.append(error)
        except Exception as error:                # a template may raise anything
            errors.append(DataError(f"the chat template fails: {type(error).__name__}: {one_line(error)}"))
        else:
            lost = [f"{m['role']}'s messages" for w, m in zip(words, messages)
                    if w and m["role"] != "assistant" and w.lstrip() + end not in text]
            said, answer = text.rpartition(end)[0], words[-1] if messages and is_open(messages) else ""
            if not "".join(said.split()).endswith("".join(answer.split())):
                lost.append("answer")
            if text.count(end) < sum(map(bool, words)):
                lost.append("assistant's messages")
            if not lost:
                return plain.rpartition(end)[0] if cut else plain
            errors.append(DataError(f"the chat template leaves out words of the {lost[0]}"))
    raise errors[0] from None


def _unused(messages):
    """Returns a character that no message has."""
    return next(chr(c) for c in range(0xE000, 0xF8FF) if not any(chr(c) in m["content"] for m in messages))


def _break_specials(tokenizer, messages):
    """Returns (messages, mark). Special-token strings in the messages are broken by `mark`, a character that no message has.
    encode_marked removes it again, after it has found the special tokens that the template wrote."""
    mark = _unused(messages)
    longest_first = sorted((t for t in tokenizer.special if len(t) > 1), key=len, reverse=True)

    def spell(role, text):
        for t in longest_first:
            # Non-special added tokens (e.g. </think>) stay in the assistant's text, and in other roles' unless the template
            # uses them (white space does not count as used). EOS never stays.
            template = (tokenizer.chat_template or "") if role != "assistant" and t.strip() else ""
            may_stay = t in tokenizer.plain and tokenizer.special[t] not in tokenizer.end_ids and t not in template
            text = text if may_stay else text.replace(t, t[0] + mark + t[1:])
        return text
    return [{"role": m["role"], "content": spell(m["role"], m["content"])} for m in messages], mark


def encode_for_reply(tokenizer, messages):
    """Returns the ids of a conversation up to where the assistant's reply begins. BOS is left to the template."""
    messages, mark = _break_specials(tokenizer, messages)
    return tokenizer.encode_marked(_render(tokenizer, messages, True), mark=mark)


def encode_turns(tokenizer, messages, response, all_turns=True, given=()):
    """Returns a conversation and its response as [(ids, whether the assistant says them), ...]. With all_turns=False, everything
    before the response is one piece. given: numbers of the assistant's turns (0: the first) that do not count as said.

    The assistant's turn is what the template adds to its own generation prompt, up to and including EOS (any of the tokenizer's
    end_ids); to an open answer, it is the rest. The last turn ends with EOS even if the template writes none. A turn is
    tokenised apart from what it answers, as everywhere.
    """
    continues = is_open(messages)
    last = {"role": "assistant", "content": response if continues else response.removeprefix(" ")}
    (*asked, last), mark = _break_specials(tokenizer, [*messages, last])
    whole = [*asked, last]
    if continues:
        whole[-2:] = [{"role": "assistant", "content": asked[-1]["content"] + last["content"]}]
    ends = sorted((t for t, i in tokenizer.special.items() if i in tokenizer.end_ids), key=len, reverse=True)
    ends = re.compile("|".join(map(re.escape, ends)))
    turns = [k for k, m in enumerate(whole) if m["role"] == "assistant"]
    pieces, done, end = [], "", ""                # done: the text so far; end: the EOS at its end, or ""
    for number, k in enumerate(turns):
        if k < turns[-1] and (k == 0 or not all_turns):
            continue
        before = _render(tokenizer, asked if k == turns[-1] else whole[:k], True)
        after = _render(tokenizer, whole[:k + 1], False)
        if not before.startswith(done):
            raise DataError("the chat template changes earlier turns as the conversation grows: train on the last turn only")
        if not after.startswith(before):
            raise DataError("the chat template does not continue its own generation prompt")
        # Encoded with the EOS before it: SentencePiece may put a space after EOS (LLaMA 1 also needs one before EOS).
        context = tokenizer.encode_marked(end + before[len(done):], start=not done, mark=mark)
        if end and context[:1] == [tokenizer.special[end]]:
            context = context[1:]
        elif end:
            context = tokenizer.encode_marked(before[len(done):], start=False, mark=mark)
        answer, end = after[len(before):], ""
        if match := ends.search(answer):
            answer, end = answer[:match.start()], match[0]
        else:
            answer = answer.removesuffix(_next_header(tokenizer))
        # SentencePiece may put a space after any added token, such as Phi-3's <|assistant|>.
        start = tokenizer.spaces in ("prepend", "always") and not {*context[-1:]}.isdisjoint(tokenizer.special.values())
        pieces += [(context, False), (tokenizer.encode_marked(answer + end, start=start, mark=mark), number not in given)]
        done = before + answer + end
    if not pieces[-1][0] or pieces[-1][0][-1] not in tokenizer.end_ids:
        pieces[-1][0].append(tokenizer.eos_id)
    return pieces


PROBE = "xyzzy"  # an answer that no template writes


def _opening(tokenizer):
    """Returns the first of these conversations that the chat template accepts before an answer, else the first."""
    user, bot, system = [{"role": role, "content": "Hi"} for role in ("user", "assistant", "system")]
    for talk in ([user], [system, user], [user, bot, user], [system, user, bot, user]):
        try:
            _render(tokenizer, talk, True), _render(tokenizer, [*talk, {"role": "assistant", "content": PROBE}], False)
            return talk
        except DataError:
            pass
    return [user]


@functools.lru_cache(8)
def _next_header(tokenizer):
    """Returns the generation prompt that a template writes after every conversation, whatever add_generation_prompt says; ""
    for other templates. Without messages, such a template writes nothing else."""
    talk = _opening(tokenizer)
    try:
        if not tokenizer.chat_template or (asked := _render(tokenizer, talk, True)) != _render(tokenizer, talk, False):
            return ""
    except DataError:                             # it wants an answer or its generation prompt at the end
        return ""
    try:
        header = _render(tokenizer, [], True).removeprefix(tokenizer.special_text.get("bos_token", ""))
        if asked.endswith(header):
            return header
    except DataError:                             # it needs a message
        pass
    answered = _render(tokenizer, [*talk, {"role": "assistant", "content": PROBE}], False)
    tails = asked.rpartition("Hi")[2], answered.rpartition(PROBE)[2]
    if os.path.commonprefix([t.rstrip()[::-1] for t in tails]):
        raise DataError("the chat template does not heed add_generation_prompt, so the end of an answer cannot be found")
    return ""


def other_end(tokenizer):
    """Returns the id of the special token by which the chat template ends an answer, if it is none of those that end a response;
    else None."""
    try:
        ids, _ = encode_turns(tokenizer, _opening(tokenizer), " " + PROBE, all_turns=False)[-1]
    except DataError:                             # no response to this template can be read
        return None
    behind = itertools.takewhile(lambda i: not tokenizer.decode([i], start=False).strip(), reversed(ids[:-1]))
    return next((i for i in reversed([*behind]) if i in tokenizer.special.values()), None)


@functools.lru_cache(8)
def answer_affixes(tokenizer):
    """Returns what the chat template puts around the assistant's words, once decoded: spaces, or its own end of turn."""
    try:
        ids, _ = encode_turns(tokenizer, _opening(tokenizer), " " + PROBE, all_turns=False)[-1]
    except DataError:                             # no response to this template can be read
        return "", ""
    before, _, after = tokenizer.decode(ids, start=False).partition(PROBE)
    return before, after
