"""Conversations: Anthropic-HH transcripts, which are how records hold them, and a checkpoint's own chat template.

    "\\n\\nHuman: Hi.\\n\\nAssistant:"   <->   [{"role": "user", "content": "Hi."}]

A tokenizer with a chat template (of tokenizer_config.json or chat_template.jinja) has such a prompt rendered by it, another
reads the transcript as it stands. What somebody says never becomes a special token; the template's own marks do. records.py
and data.py are the only users.
"""

import functools
import json
import re
import time

from nanorlhf.errors import DataError, one_line

ASSISTANT = "\n\nAssistant:"  # a prompt ends with it, and a response begins with a space
ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}
TURN = re.compile(r"\n\n(Human|Assistant|System):")


def string(value, field):
    if isinstance(value, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        value = "".join(string(p.get("text"), field) for p in value)                   # a message in parts
    if not isinstance(value, str):
        raise DataError(f"{field} is not a string")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise DataError(f"unpaired surrogate in {field}")
    return value


def transcript(messages, field):
    """[{role, content}, ...] -> "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    names, text = {role: name for name, role in ROLES.items()}, ""
    for m in messages:
        if not isinstance(m, dict) or m.get("role") not in list(names):                # a list: a role may be no string
            role = m.get("role") if isinstance(m, dict) else m
            raise DataError(f"{field} holds a message whose role is {one_line(repr(role))}, not one of {', '.join(names)}")
        content = string(m.get("content"), f"a message of {field}")
        if found := TURN.search(content):
            raise DataError(f"{field} holds a message with {found[0]!r} in it, which would begin another turn")
        text += f"\n\n{names[m['role']]}: {content}"
    return text


def messages_of(prompt):
    """The messages of a transcript that waits for the assistant; None for any other text. Neighbours of one role are one."""
    before, *turns = TURN.split(prompt.removesuffix(ASSISTANT))
    if before or not turns or not prompt.endswith(ASSISTANT):
        return None
    messages = []
    for name, content in zip(turns[::2], turns[1::2]):
        if messages and messages[-1]["role"] == ROLES[name]:
            messages[-1]["content"] += "\n\n" + content.removeprefix(" ")
        else:
            messages.append({"role": ROLES[name], "content": content.removeprefix(" ")})
    return messages


def without_oldest(messages):
    """The conversation without its oldest exchange, the system's message kept; None if only the question is left."""
    system = [m for m in messages[:1] if m["role"] == "system"]
    asked = [k for k, m in enumerate(messages) if m["role"] == "user"]
    return system + messages[asked[1]:] if len(asked) > 1 else None


def conversation(tokenizer, prompt):
    """The messages of a prompt that the tokenizer's chat template has to render, or None."""
    return messages_of(prompt) if tokenizer.chat_template else None


@functools.lru_cache(8)
def _compiled(template):
    """A Jinja template as transformers sets one up, in a sandbox: a checkpoint is somebody else's file."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise DataError(f"the chat template refuses the conversation: {one_line(message)}")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals |= dict(raise_exception=raise_exception, strftime_now=lambda form: time.strftime(form))
    # {% generation %} marks the assistant's words for transformers; ours are found without it.
    template = re.sub(r"(\{%-?\s*)generation(\s*-?%\})", r"\1if true\2", template)
    return environment.from_string(re.sub(r"(\{%-?\s*)endgeneration(\s*-?%\})", r"\1endif\2", template))


def _render(tokenizer, messages, waits):
    """Text of a conversation; waits: it ends where the assistant is about to speak."""
    if not tokenizer.chat_template:
        return transcript(messages, "messages") + ASSISTANT * waits
    try:
        return _compiled(tokenizer.chat_template).render(
            messages=messages, add_generation_prompt=waits, tools=None, documents=None, **tokenizer.special_text)
    except DataError:
        raise
    except Exception as error:                    # whatever a template may do
        raise DataError(f"the chat template fails: {type(error).__name__}: {one_line(error)}") from None


def _break_specials(tokenizer, messages):
    """(messages, mark): strings of special tokens in what was said are broken by a character that nobody used, to be taken out
    again once the template's own marks have been found."""
    mark = next(chr(c) for c in range(0xE000, 0xF8FF) if not any(chr(c) in m["content"] for m in messages))
    longest_first = sorted((t for t in tokenizer.special if len(t) > 1), key=len, reverse=True)

    def spell(role, text):
        for t in longest_first:
            # What the tokenizer matches in any text (`special: false`) an assistant may say, such as </think>, and others as
            # far as it is no mark of the template; EOS nobody.
            template = (tokenizer.chat_template or "") if role != "assistant" and t.strip() else ""
            may_stay = t in tokenizer.plain and tokenizer.special[t] != tokenizer.eos_id and t not in template
            text = text if may_stay else text.replace(t, t[0] + mark + t[1:])
        return text
    return [{"role": m["role"], "content": spell(m["role"], m["content"])} for m in messages], mark


def encode_for_reply(tokenizer, messages):
    """ids of a conversation up to where the assistant is about to speak; BOS is the template's business."""
    messages, mark = _break_specials(tokenizer, messages)
    return tokenizer.encode_marked(_render(tokenizer, messages, True), mark=mark)


def encode_turns(tokenizer, messages, all_turns=True):
    """[(ids, whether the assistant says them), ...]: the turns of a conversation whose last one is the assistant's, or only
    that last one and all before it.

    What the assistant says is what the template adds to its own generation prompt, up to and including EOS; the last turn ends
    with EOS whatever the template does. What is said is tokenised apart from what it answers, as everywhere.
    """
    messages, mark = _break_specials(tokenizer, messages)
    eos = next(t for t, i in tokenizer.special.items() if i == tokenizer.eos_id)
    turns = [k for k, m in enumerate(messages) if m["role"] == "assistant" and k > 0]
    pieces, done, end = [], "", ""
    for k in turns if all_turns else turns[-1:]:
        told, said = _render(tokenizer, messages[:k], True), _render(tokenizer, messages[:k + 1], False)
        if not told.startswith(done):
            raise DataError("the chat template changes earlier turns as the conversation goes on: train on the last one only")
        if not said.startswith(told):
            raise DataError("the chat template does not go on from where it lets the assistant speak")
        # Together with the EOS before it, since SentencePiece may put a space after one (LLaMA 1 also wants one before it).
        context = tokenizer.encode_marked(end + told[len(done):], start=not done, mark=mark)
        if end and context[:1] == [tokenizer.eos_id]:
            context = context[1:]
        elif end:
            context = tokenizer.encode_marked(told[len(done):], start=False, mark=mark)
        answer, end, _ = said[len(told):].partition(eos)
        pieces += [(context, False), (tokenizer.encode_marked(answer + end, start=False, mark=mark), True)]
        done = told + answer + end
    if pieces[-1][0][-1:] != [tokenizer.eos_id]:
        pieces[-1][0].append(tokenizer.eos_id)
    return pieces


@functools.lru_cache(8)
def answer_affixes(tokenizer):
    """What the chat template puts around the assistant's words, as far as it decodes: spaces, or its own end of turn."""
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "§"}]
    try:
        before, _, after = tokenizer.decode(encode_turns(tokenizer, talk, all_turns=False)[-1][0], start=False).partition("§")
    except DataError:                             # it wants another conversation than this
        return "", ""
    return before, after
