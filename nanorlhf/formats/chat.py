"""Conversations: records hold them as Anthropic-HH transcripts; a checkpoint's own chat template renders them.

    "\\n\\nHuman: Hi.\\n\\nAssistant:"   <->   [{"role": "user", "content": "Hi."}]

If the tokenizer has a chat template (from tokenizer_config.json or chat_template.jinja), it renders such a prompt. Otherwise
the model reads the transcript as it is. The words of a message never become a special token; what the template writes does.
"""

import functools
import json
import re
import time

from nanorlhf.errors import DataError, one_line

ASSISTANT = "\n\nAssistant:"  # ends a prompt; the response then begins with a space
ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}
TURN = re.compile(r"\n\n(Human|Assistant|System):")


def string(value, field):
    if isinstance(value, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        value = "".join(string(p.get("text"), field) for p in value)                   # content in parts
    if not isinstance(value, str):
        raise DataError(f"{field} is not a string")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise DataError(f"unpaired surrogate in {field}")
    return value


def transcript(messages, field):
    """Turns [{role, content}, ...] into "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    names, text = {role: name for name, role in ROLES.items()}, ""
    for m in messages:
        if not isinstance(m, dict) or m.get("role") not in list(names):                # a list: a role may be unhashable
            role = m.get("role") if isinstance(m, dict) else m
            raise DataError(f"{field} holds a message whose role is {one_line(repr(role))}, not one of {', '.join(names)}")
        content = string(m.get("content"), f"a message of {field}")
        if match := TURN.search(content):
            raise DataError(f"{field} holds a message with {match[0]!r} in it, which would begin another turn")
        text += f"\n\n{names[m['role']]}: {content}"
    return text


def messages_of(prompt):
    """Returns the messages of a transcript that ends with ASSISTANT; None for any other text. Consecutive messages of one
    role are merged."""
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
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals |= dict(raise_exception=raise_exception, strftime_now=lambda form: time.strftime(form))
    # transformers finds the assistant's words by {% generation %}; encode_turns does not need it.
    template = re.sub(r"(\{%-?\s*)generation(\s*-?%\})", r"\1if true\2", template)
    return environment.from_string(re.sub(r"(\{%-?\s*)endgeneration(\s*-?%\})", r"\1endif\2", template))


def _render(tokenizer, messages, add_generation_prompt):
    """Returns the text of a conversation. With add_generation_prompt it ends where the assistant's reply begins."""
    if not tokenizer.chat_template:
        return transcript(messages, "messages") + (ASSISTANT if add_generation_prompt else "")
    try:
        return _compiled(tokenizer.chat_template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None,
            **tokenizer.special_text)
    except DataError:
        raise
    except Exception as error:                    # a template may raise anything
        raise DataError(f"the chat template fails: {type(error).__name__}: {one_line(error)}") from None


def _break_specials(tokenizer, messages):
    """Returns (messages, mark). Special-token strings in the messages are broken by `mark`, a character that no message has.
    encode_marked removes it again, after it has found the special tokens that the template wrote."""
    mark = next(chr(c) for c in range(0xE000, 0xF8FF) if not any(chr(c) in m["content"] for m in messages))
    longest_first = sorted((t for t in tokenizer.special if len(t) > 1), key=len, reverse=True)

    def spell(role, text):
        for t in longest_first:
            # Non-special added tokens (e.g. </think>) stay in the assistant's text, and in other roles' unless the template
            # uses them (white space does not count as used). EOS never stays.
            template = (tokenizer.chat_template or "") if role != "assistant" and t.strip() else ""
            may_stay = t in tokenizer.plain and tokenizer.special[t] != tokenizer.eos_id and t not in template
            text = text if may_stay else text.replace(t, t[0] + mark + t[1:])
        return text
    return [{"role": m["role"], "content": spell(m["role"], m["content"])} for m in messages], mark


def encode_for_reply(tokenizer, messages):
    """Returns the ids of a conversation up to where the assistant's reply begins. BOS is left to the template."""
    messages, mark = _break_specials(tokenizer, messages)
    return tokenizer.encode_marked(_render(tokenizer, messages, True), mark=mark)


def encode_turns(tokenizer, messages, all_turns=True):
    """Returns a conversation, whose last turn is the assistant's, as [(ids, whether the assistant says them), ...]. With
    all_turns=False, everything before the last turn is one piece.

    The assistant's turn is what the template adds to its own generation prompt, up to and including EOS. The last turn ends
    with EOS even if the template writes none. A turn is tokenised apart from what it answers, as everywhere.
    """
    messages, mark = _break_specials(tokenizer, messages)
    eos = next(t for t, i in tokenizer.special.items() if i == tokenizer.eos_id)
    turns = [k for k, m in enumerate(messages) if m["role"] == "assistant" and k > 0]
    pieces, done, end = [], "", ""                # done: the text so far; end: the EOS at its end, or ""
    for k in turns if all_turns else turns[-1:]:
        before, after = _render(tokenizer, messages[:k], True), _render(tokenizer, messages[:k + 1], False)
        if not before.startswith(done):
            raise DataError("the chat template changes earlier turns as the conversation grows: train on the last turn only")
        if not after.startswith(before):
            raise DataError("the chat template does not continue its own generation prompt")
        # Encoded with the EOS before it: SentencePiece may put a space after EOS (LLaMA 1 also needs one before EOS).
        context = tokenizer.encode_marked(end + before[len(done):], start=not done, mark=mark)
        if end and context[:1] == [tokenizer.eos_id]:
            context = context[1:]
        elif end:
            context = tokenizer.encode_marked(before[len(done):], start=False, mark=mark)
        answer, end, _ = after[len(before):].partition(eos)
        pieces += [(context, False), (tokenizer.encode_marked(answer + end, start=False, mark=mark), True)]
        done = before + answer + end
    if pieces[-1][0][-1:] != [tokenizer.eos_id]:
        pieces[-1][0].append(tokenizer.eos_id)
    return pieces


@functools.lru_cache(8)
def answer_affixes(tokenizer):
    """Returns what the chat template puts around the assistant's words, once decoded: spaces, or its own end of turn."""
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "§"}]
    try:
        ids, _ = encode_turns(tokenizer, talk, all_turns=False)[-1]
    except DataError:                             # this template rejects the probe conversation
        return "", ""
    before, _, after = tokenizer.decode(ids, start=False).partition("§")
    return before, after
