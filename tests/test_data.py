"""Tests of data.py: every layout of row, every kind of bad row, and truncation and masks worked out by hand."""

import gzip
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import train_sft
from nanorlhf import data, training
from nanorlhf.data import Example, load_records
from nanorlhf.errors import DataError
from nanorlhf.formats.chat import messages_of
from nanorlhf.formats.records import ALPACA_PROMPT, CNNDM_PROMPT, TLDR_PROMPT, columns_of, other_columns

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the public data files are not at {DATA}")


# ---- Records --------------------------------------------------------------------------------------------------------


def file_of(tmp_path, *rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return path


PAIR = {"prompt": "p", "chosen": " a", "rejected": " b"}
RANKED = {"prompt": "p", "responses": [" a", " b", " c", " d"], "scores": [1, 3, 1, 2.5]}
USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}


@pytest.mark.parametrize("row, kind, record", [
    ({"text": "a"}, "text", {"text": "a"}),
    ({"prompt": ""}, "prompt", {"prompt": ""}),
    ({"prompt": "p", "completion": " c", "x": 1}, "completion", {"prompt": "p", "completion": " c"}),
    ({"prompt": "p", "completion": "c"}, "completion", {"prompt": "p", "completion": "c"}),  # no space is added
    ({**PAIR, "group": 7}, "preference", {**PAIR, "group": 7}),
    ({"query": "p", "responses": ["a", "b"], "scores": [1, 2]}, "ranked",
     {"prompt": "p", "responses": ["a", "b"], "scores": [1.0, 2.0]}),
    ({"prompt": [USER], "completion": [BOT]}, "completion",
     {"prompt": "\n\nHuman: hi\n\nAssistant:", "completion": " yes"}),
    ({"prompt": [{"role": "system", "content": "s"}, USER, BOT, USER]}, "prompt", {
        "prompt": "\n\nSystem: s\n\nHuman: hi\n\nAssistant: yes\n\nHuman: hi\n\nAssistant:"}),
    ({"prompt": [USER], "chosen": [BOT], "rejected": [NO]}, "preference",
     {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " yes", "rejected": " no"}),
    ({"prompt": "hi", "chosen": [USER, BOT], "rejected": [USER, NO]}, "preference",  # a string and whole conversations
     {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " yes", "rejected": " no"}),
    ({"chosen": [USER, BOT], "rejected": [USER, NO]}, "preference",
     {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " yes", "rejected": " no"}),
    ({"prompt": [USER], "responses": ["yes", [NO]], "scores": [1, 0]}, "ranked",
     {"prompt": "\n\nHuman: hi\n\nAssistant:", "responses": [" yes", " no"], "scores": [1.0, 0.0]}),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
      "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e"}, "preference",
     {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "chosen": " d", "rejected": " e", "group": "\n\nHuman: a"}),
    ({"info": {"id": "t3", "subreddit": "s", "title": "t", "post": "x {y}", "article": None}, "choice": 1,
      "summaries": [{"text": " a"}, {"text": " b"}]}, "preference",
     {"prompt": "SUBREDDIT: r/s\n\nTITLE: t\n\nPOST: x {y}\n\nTL;DR:", "chosen": " b", "rejected": " a",
      "group": "t3"}),
    ({"info": {"id": "c", "article": "x"}, "choice": 0, "summaries": [{"text": " a"}, {"text": " b"}]}, "preference",
     {"prompt": "ARTICLE: x\nTL;DR:", "chosen": " a", "rejected": " b", "group": "c"}),
    ({"rl_prompt": "p", "sampled_answers": [{"sampled_string": " a\n\nHuman:", "pm_scores": [{"pm_score": 2}]},
                                            {"sampled_string": " b", "pm_scores": [{"pm_score": 1}]}]}, "ranked",
     {"prompt": "p", "responses": [" a", " b"], "scores": [2.0, 1.0]}),
])
def test_every_row_layout_gives_its_record(row, kind, record, tmp_path):
    assert load_records(file_of(tmp_path, row), kind) == [record]


SYSTEM, Q = {"role": "system", "content": "s"}, {"role": "user", "content": "q"}
TOLD, ASKED = "\n\nSystem: s\n\nHuman: hi\n\nAssistant:", "\n\nHuman: hi\n\nAssistant:"
TWO, FOUR = {"chosen": "yes", "rejected": "no"}, {"chosen": [USER, BOT], "rejected": [USER, NO]}
PARIS, HELLO = {"role": "assistant", "content": "Paris"}, [["q", "a"], ["r", "b"]]
LATER = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: b\n\nHuman: hi\n\nAssistant:"


@pytest.mark.parametrize("row, kind, record", [
    # a system message or a history beside the other fields
    ({"system": "s", "messages": [USER, BOT]}, "completion", {"prompt": TOLD, "completion": " yes"}),
    ({"system_prompt": "s", "messages": [SYSTEM, USER, BOT]}, "completion", {"prompt": TOLD, "completion": " yes"}),
    ({"system": "s", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}, "completion",
     {"prompt": TOLD, "completion": " yes"}),
    ({"system": "s", "instruction": "hi", "input": "", "output": "yes"}, "completion", {"prompt": TOLD, "completion": " yes"}),
    ({"system": "s", "instruction": "hi", "input": "x"}, "prompt", {"prompt": TOLD.replace("hi", "hi\nx")}),
    ({"history": HELLO, "instruction": "hi", "output": "yes"}, "completion", {"prompt": LATER, "completion": " yes"}),
    ({"system": "s", "history": HELLO, "prompt": "hi"}, "prompt", {"prompt": "\n\nSystem: s" + LATER}),
    ({"history": HELLO, "prompt": [SYSTEM, USER]}, "prompt", {"prompt": "\n\nSystem: s" + LATER}),
    ({"system": "", "system_prompt": None, "history": [], "prompt": "hi"}, "prompt", {"prompt": "hi"}),
    ({"system": "s", "prompt": "hi", "completion": "yes"}, "completion", {"prompt": TOLD, "completion": " yes"}),
    ({"system": "s", "prompt": ASKED, "completion": " yes"}, "completion", {"prompt": TOLD, "completion": " yes"}),
    ({"system": "s", "prompt": [USER]}, "prompt", {"prompt": TOLD}),
    ({"system": "s", "prompt": [USER], **TWO}, "preference", {"prompt": TOLD, "chosen": " yes", "rejected": " no"}),
    ({"system": "s", "prompt": "hi", **FOUR}, "preference", {"prompt": TOLD, "chosen": " yes", "rejected": " no"}),
    ({"system": "s", "instruction": "hi", **TWO}, "preference", {"prompt": TOLD, "chosen": " yes", "rejected": " no"}),
    ({"system": "s", "chosen": ASKED + " yes", "rejected": ASKED + " no"}, "preference",
     {"prompt": TOLD, "chosen": " yes", "rejected": " no", "group": "\n\nHuman: hi"}),
    ({"system": "s", "query": "hi", "responses": ["yes", "no"], "scores": [2, 1]}, "ranked",
     {"prompt": TOLD, "responses": [" yes", " no"], "scores": [2.0, 1.0]}),
    ({"messages": [{"role": "developer", "content": "s"}, USER, BOT]}, "completion", {"prompt": TOLD, "completion": " yes"}),
    # whole conversations beside a prompt that has something they lack
    ({"prompt": [SYSTEM, USER], **FOUR}, "preference", {"prompt": TOLD, "chosen": " yes", "rejected": " no"}),
    ({"prompt": [Q], "chosen": [Q, PARIS, USER, BOT], "rejected": [Q, PARIS, USER, NO]}, "preference",
     {"prompt": "\n\nHuman: q\n\nAssistant: Paris" + ASKED, "chosen": " yes", "rejected": " no"}),
    ({"prompt": "hi", "chosen": [Q, PARIS, USER, BOT], "rejected": [Q, PARIS, USER, NO]}, "preference",  # its last question
     {"prompt": "\n\nHuman: q\n\nAssistant: Paris" + ASKED, "chosen": " yes", "rejected": " no"}),
    ({"prompt": ASKED, **FOUR}, "preference", {"prompt": ASKED, "chosen": " yes", "rejected": " no"}),
    # messages beside chosen and rejected are the prompt; they may end with the chosen answer
    ({"messages": [USER], **TWO}, "preference", {"prompt": ASKED, "chosen": " yes", "rejected": " no"}),
    ({"messages": [USER], "chosen": BOT, "rejected": [NO]}, "preference", {"prompt": ASKED, "chosen": " yes", "rejected": " no"}),
    ({"messages": [USER, BOT], **TWO}, "preference", {"prompt": ASKED, "chosen": " yes", "rejected": " no"}),
    ({"messages": [USER, BOT], **FOUR}, "preference", {"prompt": ASKED, "chosen": " yes", "rejected": " no"}),
    ({"prompt": "hi", "messages": [USER, BOT], **FOUR}, "completion", {"prompt": ASKED, "completion": " yes"}),  # UltraFeedback
    # an answer that has begun
    ({"prompt": [USER, {"role": "assistant", "content": "The sky is"}], "completion": [{"role": "assistant", "content": " blue."}]},
     "completion", {"prompt": ASKED + " The sky is", "completion": " blue."}),
    ({"prompt": [USER, {"role": "assistant", "content": "The sky is"}], "chosen": " blue.", "rejected": " red."}, "preference",
     {"prompt": ASKED + " The sky is", "chosen": " blue.", "rejected": " red."}),
    ({"prompt": [USER, {"role": "assistant", "content": "The sky is"}]}, "prompt", {"prompt": ASKED + " The sky is"}),
    # the user has the last word; null; a transcript's white space
    ({"messages": [USER]}, "prompt", {"prompt": ASKED}), ({"conversations": [USER]}, "prompt", {"prompt": ASKED}),
    ({"text": None, "prompt": "p", "completion": " c"}, "completion", {"prompt": "p", "completion": " c"}),
    ({"prompt": "p", "completion": None}, "prompt", {"prompt": "p"}),
    ({"messages": [{**USER, "tool_calls": None, "weight": None}, BOT], "prompt": None}, "completion",
     {"prompt": ASKED, "completion": " yes"}),
    ({"messages": [{"role": None, "content": None, "from": "human", "value": "hi"}, BOT]}, "completion",
     {"prompt": ASKED, "completion": " yes"}),
    ({"prompt": ASKED + " "}, "prompt", {"prompt": ASKED}),
    ({"prompt": ASKED + " ", "completion": "yes"}, "completion", {"prompt": ASKED, "completion": " yes"}),
    ({"prompt": ASKED.lstrip(), "completion": " yes"}, "completion", {"prompt": ASKED, "completion": " yes"}),
    ({"prompt": "p ", "completion": "yes"}, "completion", {"prompt": "p ", "completion": "yes"}),         # no conversation
    ({"prompt": TOLD.lstrip(), "completion": " yes"}, "completion", {"prompt": TOLD, "completion": " yes"}),
    ({"prompt": ASKED.replace("\n", "\r\n"), "completion": " yes"}, "completion", {"prompt": ASKED, "completion": " yes"}),
    *(({"prompt": user + end, "completion": answer}, "completion", {"prompt": asked, "completion": " yes"})    # the user's turn ends it
      for user, asked in (("\n\nHuman: hi", ASKED), (TOLD.removesuffix("\n\nAssistant:"), TOLD),
                          (LATER.removesuffix("\n\nAssistant:").lstrip(), LATER), ("\r\n\r\nHuman: hi", ASKED))
      for end, answer in (("", " yes"), ("", "yes"), ("\n\n", "Assistant: yes"), ("", "\n\nAssistant: yes"))),
    ({"prompt": "\n\nHuman: hi"}, "prompt", {"prompt": ASKED}),
    ({"prompt": "\n\nHuman: hi", "chosen": [BOT], "rejected": "no"}, "preference", {"prompt": ASKED, "chosen": " yes", "rejected": " no"}),
    ({"system": "s", "prompt": "\n\nHuman: hi"}, "prompt", {"prompt": TOLD}),
    *(({"prompt": p, "completion": "yes"}, "completion", {"prompt": p, "completion": "yes"}) for p in (
        "Human: hi", "Human: hi\nAssistant:", "System: up.\nHuman: hi", "a\r\nb", "x\n\nHuman: hi")),           # no conversations
    # weights, and labels of KTO
    ({"messages": [Q, {**PARIS, "weight": 0}, USER, {**BOT, "weight": 1}]}, "completion",
     {"prompt": "\n\nHuman: q\n\nAssistant: Paris" + ASKED, "completion": " yes", "given": [0]}),
    ({"messages": [Q, {**PARIS, "weight": 0}, USER, BOT]}, "prompt",
     {"prompt": "\n\nHuman: q\n\nAssistant: Paris" + ASKED, "completion": " yes"}),
    ({"messages": [USER, BOT, Q, {**PARIS, "train": False}]}, "completion", {"prompt": ASKED, "completion": " yes"}),
    ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes", "weight": 0}]}, "prompt",
     {"prompt": ASKED}),
    ({"prompt": [USER, {**BOT, "weight": 0}], "completion": [PARIS]}, "completion", {"prompt": ASKED + " yes", "completion": "Paris"}),
    ({"messages": [SYSTEM, SYSTEM, USER, USER, BOT, PARIS]}, "completion",                       # neighbours of one role
     {"prompt": "\n\nSystem: s\n\ns\n\nHuman: hi\n\nhi\n\nAssistant:", "completion": " yes\n\nParis"}),
    ({"prompt": [USER], "completion": [BOT, PARIS]}, "completion", {"prompt": ASKED, "completion": " yes\n\nParis"}),
    ({"prompt": "p", "completion": " c", "label": True}, "completion", {"prompt": "p", "completion": " c"}),
    ({"prompt": "p", "completion": " c", "label": False}, "prompt", {"prompt": "p"}),
    ({"text": "a", "label": 0}, "text", {"text": "a"}),
    ({"prompt": "p", "completion": " c", "instruction": "other"}, "completion", {"prompt": "p", "completion": " c"}),
])
def test_fields_beside_the_others_are_read(row, kind, record, tmp_path):
    assert load_records(file_of(tmp_path, row), kind) == [record]


def test_other_columns_are_those_that_are_not_read(tmp_path):
    row = {"prompt": "hi", "system": "s", "history": [], "answer": 4, "label": False, "kto_tag": "x", "context": None, "messages": None}
    records = load_records(file_of(tmp_path, row), "prompt")
    assert other_columns(records) == [{"answer": 4, "kto_tag": "x", "context": None}]
    dolly = {"instruction": "i", "context": "c", "response": "r", "category": "qa"}
    assert other_columns(load_records(file_of(tmp_path, dolly), "prompt")) == [{"category": "qa"}]
    assert columns_of(records) == {name: [value] for name, value in row.items()}
    for label in (0, 1, 0.0, -1.5, True):
        assert other_columns(load_records(file_of(tmp_path, {"prompt": "hi", "label": label, "kto_tag": label}), "prompt")) == [{}]


def test_other_columns_may_have_the_name_of_another_layouts_field(tmp_path):
    mine = {"text": "t", "info": 1, "query": "q", "choice": "B", "input": "x", "sampled_answers": 2, "output": "z"}
    for row in ({"prompt": "p"}, {"prompt": "p", "completion": " c"}, PAIR):
        record = load_records(file_of(tmp_path, {**row, **mine}), "prompt")
        assert other_columns(record) == [mine]
        written = {"prompt": "p", "chosen": " y", "rejected": " n", **mine}            # and they change nothing when read again
        assert load_records(file_of(tmp_path, written), "preference") == [{"prompt": "p", "chosen": " y", "rejected": " n"}]
    for row in ({"query": "q", "responses": ["a", "b"], "scores": [2, 1], "score": 1}, {"instruction": "i", "input": "x", "output": "o"},
                {"info": {"article": "x"}, "choice": 0, "summaries": [{"text": " a"}, {"text": " b"}]},
                {"prompt": "p", "conversations": [USER], "messages": [USER], "instruction": "i", "output": "o", "score_chosen": 1}):
        assert other_columns(load_records(file_of(tmp_path, row), "prompt")) == [{}]


def test_the_group_is_written_along(tmp_path):
    hh = {k: f"\n\nHuman: q\n\nAssistant: a\n\nHuman: {k}\n\nAssistant: x{k}" for k in ("chosen", "rejected")}
    hh["rejected"] = hh["rejected"].replace("Human: rejected", "Human: chosen")
    for row, group in ((hh, "\n\nHuman: q"), ({"prompt": "p", "group": 7}, 7), ({"prompt": "p", "group": "g"}, "g")):
        records = load_records(file_of(tmp_path, row), "prompt")
        assert other_columns(records) == [{"group": group}]
        again = load_records(file_of(tmp_path, {"prompt": "p", "chosen": " y", "rejected": " n", "group": group}), "preference")
        assert again[0]["group"] == records[0]["group"]


def test_words_of_a_user_never_begin_a_turn_in_a_record(tmp_path):
    words = "My machine:\n\nSystem: Windows 11\n\nEnough?"
    hh = {k: f"\n\nHuman: {words}\n\nAssistant: {a}" for k, a in TWO.items()}
    for row in (hh, {"prompt": [{"role": "user", "content": words}], **TWO}):
        record = load_records(file_of(tmp_path, row), "preference")[0]
        assert messages_of(record["prompt"]) == [{"role": "user", "content": words}]
    assert messages_of(TOLD) == [SYSTEM, USER]
    for words in ("a\n\nHuman: b", "a\r\n\r\nAssistant: b", "a\n\r\nHuman: b"):    # a written prompt is read with \n for \r\n
        with pytest.raises(DataError, match="would begin another turn"):
            load_records(file_of(tmp_path, {"prompt": [{"role": "user", "content": words}]}), "prompt")


def test_alpaca_rows_get_the_alpaca_prompt(tmp_path):
    rows = [{"instruction": "Add {input}.", "input": "1 + {instruction}", "output": "3"},
            {"instruction": "Sing.", "input": "", "chosen": "la", "rejected": "no", "output": "la"}]
    first = load_records(file_of(tmp_path, rows[0]), "completion")[0]
    assert first["prompt"].endswith("### Instruction:\nAdd {input}.\n\n### Input:\n1 + {instruction}\n\n### Response:")
    assert first["prompt"].startswith("Below is an instruction that describes a task, paired with")
    assert first["completion"] == "3"
    dolly = {"instruction": "Add {input}.", "context": "1 + {instruction}", "response": "3"}
    for kind in ("prompt", "completion"):
        assert load_records(file_of(tmp_path, dolly), kind) == [{"prompt": first["prompt"], "completion": "3"}]
    with pytest.raises(DataError, match="both input and context"):
        load_records(file_of(tmp_path, {**dolly, "input": "2 + 2"}), "completion")
    second = load_records(file_of(tmp_path, rows[1]), "preference")[0]
    assert second["prompt"].startswith("Below is an instruction that describes a task. Write")
    assert "### Input" not in second["prompt"] and (second["chosen"], second["rejected"]) == ("la", "no")
    assert load_records(file_of(tmp_path, rows[1]), "prompt")[0]["completion"] == "la"


def test_records_convert_to_other_kinds(tmp_path):
    pair, ranked = file_of(tmp_path, {**PAIR, "group": "g"}, name="p"), file_of(tmp_path, RANKED, name="r")
    assert load_records(pair, "completion") == [{"prompt": "p", "completion": " a", "group": "g"}]
    assert load_records(pair, "prompt") == [{"prompt": "p", "completion": " a", "group": "g"}]
    assert load_records(pair, "text") == [{"text": "p a", "group": "g"}]
    longer = file_of(tmp_path, {"chosen": ASKED + " a", "rejected": ASKED + " b\n\nHuman: no"}, name="l")
    assert load_records(longer, "completion") == [{"prompt": ASKED, "completion": " a", "group": "\n\nHuman: hi"}]
    for rejected in (" a", ""):                    # a demonstration needs no other response
        same = file_of(tmp_path, {**PAIR, "rejected": rejected}, name="d")
        assert load_records(same, "completion") == [{"prompt": "p", "completion": " a"}]
    assert load_records(pair, "ranked") == [
        {"prompt": "p", "responses": [" a", " b"], "scores": [1.0, 0.0], "group": "g"}]
    assert load_records(ranked, "completion") == [{"prompt": "p", "completion": " b"}]
    assert load_records(ranked, "prompt") == [{"prompt": "p"}]
    found = {(r["chosen"], r["rejected"]) for r in load_records(ranked, "preference")}
    assert found == {(" b", " a"), (" b", " c"), (" b", " d"), (" d", " a"), (" d", " c")}  # the tie of a and c is dropped
    twice = file_of(tmp_path, {"prompt": "p", "responses": ["a", "a", "b"], "scores": [2, 3, 1]}, name="t")
    assert load_records(twice, "preference") == [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    around = file_of(tmp_path, {"prompt": "p", "responses": ["a", "b", "a"], "scores": [3, 2, 1]}, name="u")
    with pytest.raises(DataError, match="no preference records"):
        load_records(around, "preference")
    same_text = file_of(tmp_path, {"prompt": "p", "responses": ["a", "a"], "scores": [1, 2]}, RANKED, name="s")
    assert len(load_records(same_text, "preference")) == 5 and len(load_records(same_text, "preference", limit=3)) == 3
    both = file_of(tmp_path, {"text": "t", "prompt": "p"}, name="b")  # a row of two kinds is read as the requested one
    assert load_records(both, "text") == [{"text": "t"}] and load_records(both, "prompt") == [{"prompt": "p"}]


@pytest.mark.parametrize("row, kind", [
    ({"text": "a"}, "prompt"), ({"text": "a"}, "preference"), ({"prompt": "a"}, "completion"),
    ({"prompt": "a"}, "text"),
    ({"prompt": "a", "completion": "b"}, "preference"), ({"prompt": "a", "completion": "b"}, "ranked")])
def test_an_impossible_conversion_gives_an_error_that_names_the_fields(row, kind, tmp_path):
    for skip_bad in (False, True):
        with pytest.raises(DataError, match=f"no {kind} record.* fields {', '.join(row)}"):
            load_records(file_of(tmp_path, row), kind, skip_bad=skip_bad)


BAD = [  # row, kind, error message
    (b'{"text": "\xff"}', "text", "bad UTF-8: save the file as UTF-8"), (b'{"text": ', "text", "bad JSON"),
    (b"3", "text", "row is not a JSON object"),
    (b"[" * 100_000, "text", "bad JSON"),
    ({"a": 1, "b": 2}, "text", "no known record in the fields a, b"),
    ({}, "text", "no known record in the fields (none)"),
    ({"text": 3}, "text", "text is not a string"), ({"text": None}, "text", "no known record in the fields text (null)"),
    ({"text": " \n"}, "text", "empty text"), ({"text": "\ud83d"}, "text", "unpaired surrogate in text"),
    ({"prompt": 1}, "prompt", "prompt is not a string"),
    ({"prompt": "p", "completion": " "}, "completion", "empty completion"),
    ({"prompt": "p", "completion": {}}, "completion", "completion is not a string"),
    ({**PAIR, "chosen": ""}, "preference", "empty chosen"),
    ({**PAIR, "rejected": "\n"}, "preference", "empty rejected"),
    ({**PAIR, "rejected": " a"}, "preference", "chosen equals rejected"),
    ({"prompt": "p", "chosen": "c"}, "preference",
     "no preference record (prompt, chosen, rejected) can be made of a prompt record, fields prompt, chosen"),
    ({"chosen": "x", "rejected": "\n\nAssistant: y"}, "preference", "there is no prompt, and chosen has no '\\n\\nAssistant:'"),
    ({"system": "s", "question": "q", "chosen": "x", "rejected": "y"}, "preference",
     "there is no prompt, and chosen has no '\\n\\nAssistant:'"),
    ({"chosen": "a\n\nAssistant: x", "rejected": "b\n\nAssistant: y"}, "preference", "prompts differ"),
    ({"chosen": [USER, BOT], "rejected": [USER, BOT, USER, NO]}, "preference", "prompts differ"),
    ({"chosen": [USER, BOT], "rejected": [USER]}, "preference", "rejected does not end with an assistant message"),
    ({"prompt": [{"role": "wizard", "content": "x"}]}, "prompt",
     "prompt holds a message whose role is 'wizard', not one of user, assistant, system"),
    ({"prompt": [{"role": "user"}]}, "prompt", "a message of prompt is not a string"),
    ({**RANKED, "scores": [1, 2]}, "ranked", "responses and scores differ in number"),
    ({**RANKED, "responses": ["a"], "scores": [1]}, "ranked", "fewer than 2 responses"),
    ({**RANKED, "scores": [1, 2, 3, float("nan")]}, "ranked", "scores are not all finite"),
    ({**RANKED, "scores": [1, 2, 3, float("inf")]}, "ranked", "scores are not all finite"),
    ({**RANKED, "scores": [1, 2, 3, 10**400]}, "ranked", "scores are not all finite"),
    ({**RANKED, "scores": [1, 2, 3, True]}, "ranked", "scores are not all numbers"),
    ({**RANKED, "scores": "abcd"}, "ranked", "responses or scores is not a list"),
    ({**RANKED, "responses": ["a", "b", "c", 4]}, "ranked", "responses is not a string"),
    ({**RANKED, "responses": [""] * 4}, "completion", "empty best response"),
    ({"instruction": 1, "output": "x"}, "completion", "instruction is not a string"),
    ({"info": {}, "summaries": [{"text": "a"}], "choice": 0}, "preference",
     "info is not an object or summaries is not a list of two"),
    ({"info": {"article": "a"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 2}, "preference",
     "choice is neither 0 nor 1"),
    ({"info": {"article": "a"}, "summaries": [{"text": "a"}, 3], "choice": 0}, "preference",
     "summaries.text is not a string"),
    ({"info": {}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}, "preference",
     "info.article is not a string"),
    ({"messages": [USER]}, "completion", "messages does not end with an assistant message"),
    ({"messages": []}, "prompt", "messages is empty"), ({"prompt": []}, "prompt", "prompt is empty"),
    ({"messages": [BOT]}, "completion", "messages has no message before the answer"),
    ({"chosen": [BOT], "rejected": [NO]}, "preference", "chosen has no message before the answer"),
    ({"messages": [USER, {**BOT, "content": ""}, USER, BOT]}, "completion", "messages holds an empty assistant message"),
    ({"messages": [USER, BOT, SYSTEM, USER, BOT]}, "completion", "messages holds a system message that is not the first message"),
    ({"messages": [USER, {**BOT, "content": None}]}, "completion", "messages holds a message with null as its content"),
    ({"messages": [{**USER, "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}, BOT]}, "completion",
     "a message of messages holds a part of type 'image_url': only text parts are read"),
    ({"messages": [USER, {**BOT, "tool_calls": [{"id": "1"}]}]}, "completion", "messages holds a message with tool_calls, which is not read"),
    ({"messages": [USER, {"role": "tool", "content": "x"}, BOT]}, "completion",
     "messages holds a message whose role is 'tool', not one of user, assistant, system"),
    ({"messages": [USER, {**BOT, "weight": 0}]}, "completion", "the answer is not to be learned: its weight is 0, or train is false"),
    ({"prompt": "hi", "chosen": {**BOT, "weight": 0}, "rejected": NO}, "preference",
     "the answer is not to be learned: its weight is 0, or train is false"),
    ({"messages": [USER, {**BOT, "weight": 0.5}]}, "completion",
     "weight of a message is 0.5, neither 0 nor 1"),
    ({"messages": [USER, {**BOT, "weight": 0}, BOT]}, "completion",
     "messages holds messages of one role in a row, of which some have weight 0"),
    ({"prompt": "p", "completion": "c", "label": False}, "completion", "label is False: the answer is not to be imitated"),
    ({"messages": [USER, BOT], "kto_tag": False}, "completion", "kto_tag is False: the answer is not to be imitated"),
    ({"prompt": "p", "completion": "c", "label": "False"}, "completion", "label is False: the answer is not to be imitated"),
    ({"messages": [USER, BOT], "weight": 0}, "completion", "weight is 0: the answer is not to be imitated"),
    ({"messages": [USER, BOT], "tools": [{"type": "function"}]}, "completion",
     "tools is not read: leave the field out if the rows are right without it"),
    ({"system": "a", "messages": [SYSTEM, USER, BOT]}, "completion", "two system messages that differ"),
    ({"system": "a", "system_prompt": "b", "prompt": "p"}, "prompt", "two system messages that differ"),
    ({"system": "a", "text": "t"}, "text", "system beside text is not read: put it into the text"),
    *(({"prompt": "p", "completion": "c", "weight": weight}, "completion", f"weight is {weight!r}, neither 0 nor 1")
      for weight in (0.5, 2, "0.5")),
    ({"history": [USER], "prompt": "p"}, "prompt", "history is not a list of [user, assistant] pairs"),
    ({"prompt": [Q], **FOUR}, "preference", "prompt is not the beginning of chosen"),
    ({"prompt": "q", **FOUR}, "preference", "prompt is not the beginning of chosen"),
    ({"messages": [USER, NO], **TWO}, "preference", "messages ends with an answer that is not the chosen one"),
    ({"prompt": [USER, BOT], "completion": [NO, USER, BOT]}, "completion",
     "prompt ends inside an answer, but completion is more than the rest of it"),
    ({"prompt": "hi", "responses": [[USER, BOT], [USER, PARIS, Q, NO]], "scores": [2, 1]}, "ranked", "prompts differ"),
    ({**PAIR, "group": "\ud83d"}, "preference", "unpaired surrogate in group"),
    ({"info": {"id": "\ud83d", "article": "x"}, "choice": 0, "summaries": [{"text": " a"}, {"text": " b"}]}, "preference",
     "unpaired surrogate in group"),
    *(({"prompt": "p", name: "x"}, "prompt", f"{name} is not read: leave the field out if the rows are right without it")
      for name in ("audio", "video", "documents")),
    *(({"messages": [USER, {**BOT, name: ["x"]}]}, "completion", f"messages holds a message with {name}, which is not read")
      for name in ("image", "video", "videos", "audios", "train_detail")),
    ({"chosen": ASKED + " a\n\nHuman: thanks", "rejected": ASKED + " b"}, "preference", "chosen goes on after the answer"),
    ({"chosen": ASKED + " a", "rejected": ASKED + " b\n\nHuman:"}, "preference", "rejected goes on after the answer"),
    ({"chosen": ASKED + " a\n\nHuman: thanks", "rejected": ASKED + " b"}, "completion", "chosen goes on after the answer"),
    ({"prompt": "p", "responses": ["a", "", "b"], "scores": [2, 1, 0]}, "preference", "empty response"),
    ({"prompt": "p", "responses": ["a", " \n"], "scores": [2, 1]}, "ranked", "empty response"),
    ({"rl_prompt": "p", "sampled_answers": [{"sampled_string": "a", "pm_scores": []}] * 2}, "ranked",
     "sampled_answers need a sampled_string and pm_scores[].pm_score each"),
]
GOOD = {"text": {"text": "t"}, "prompt": {"prompt": "p"}, "completion": {"prompt": "p", "completion": "c"},
        "preference": PAIR, "ranked": RANKED}


@pytest.mark.parametrize("row, kind, message", BAD, ids=range(len(BAD)))
def test_bad_rows_raise_with_file_and_line_or_are_skipped_and_counted(row, kind, message, tmp_path, capsys):
    path = file_of(tmp_path, GOOD[kind], b"", row, GOOD[kind])
    with pytest.raises(DataError) as e:
        load_records(path, kind)
    hint = " (--columns gives them other names: --columns prompt=question,completion=answer)"
    hint = hint if re.match("no known record|there is no prompt", message) else ""
    assert str(e.value) == f"{path}:3: {message}{hint}"
    assert len(load_records(path, kind, skip_bad=True)) == 2
    assert capsys.readouterr().err == f"{path}: skipped 1 of 3 rows (1 {message})\n"


def test_fields_that_are_not_read_are_named_once(tmp_path, capsys):
    rows = [{"prompt": "p", "completion": "c", "input": "x", "id": 3, "lang": None, "label": True, "group": "g", "system": "s"},
            {"prompt": "p", "completion": "c", "id": 4, "source": "web", "note": "", "score": 1.0},
            {"prompt": "p", "completion": "", "skipped": 1}]
    path = file_of(tmp_path, *rows)
    for kind, rest in (("completion", ""), ("prompt", ", but a reward function may take them")):
        load_records(path, kind, skip_bad=True)
        assert f"{path}: fields that are not read{rest}: id, input, source\n" in capsys.readouterr().err
    for row in (dict(instruction="i", output="o", input="x"), dict(instruction="i", response="o", context="x"), PAIR, RANKED):
        load_records(file_of(tmp_path, row), "completion")
        assert capsys.readouterr().err == ""
    load_records(file_of(tmp_path, {"messages": [{**USER, "name": "Ann", "id": None}, {**BOT, "mask": 1, "weight": 1}]}), "completion")
    assert "not read: mask of a message, name of a message\n" in capsys.readouterr().err
    info = {"info": {"post": "p", "title": "t", "subreddit": "s"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}
    load_records(file_of(tmp_path, {**info, "system": "s", "worker": "w"}), "preference")
    assert "not read: system, worker\n" in capsys.readouterr().err


def test_only_a_newline_ends_a_line_and_gzip_arrays_and_boms_are_read(tmp_path):
    rows = [{"text": "one\u0085two\u2028three"}, {"text": "tab\x0bformfeed\x0c"}, {"text": "\u00e9"}]
    lines = b"\r\n".join(json.dumps(r, ensure_ascii=False).encode() for r in rows)
    for name, content in (("a.jsonl", lines), ("b.jsonl.gz", gzip.compress(lines)), ("c", b"\xef\xbb\xbf" + lines),
                          ("d.json", json.dumps(rows, indent=1).encode()), ("e.json", b"\n\n" + lines)):
        (tmp_path / name).write_bytes(content)
        assert load_records(tmp_path / name, "text") == rows
        assert load_records(str(tmp_path / name), "text", limit=2) == rows[:2]
    (tmp_path / "f.json").write_text(json.dumps([rows[0], {"text": 1}]))
    with pytest.raises(DataError, match="f.json:2: text is not a string"):
        load_records(tmp_path / "f.json", "text")


def test_an_unreadable_file_gives_a_one_line_error(tmp_path):
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b'{"text": "a"}' * 999)[:-20])
    (tmp_path / "cut.json").write_bytes(b'[{"text": "a"}')
    (tmp_path / "empty").write_bytes(b"\n")
    row = '{"text": "a"}\n'
    for name, content in (("a.txt", b'text,label\n"a",0\n'), ("a.xlsx", b"PK\x03\x04\x14"),
                          ("16", row.encode("utf-16")), ("16le", row.encode("utf-16-le")), ("1.zst", b"\x28\xb5\x2f\xfd\x24")):
        (tmp_path / name).write_bytes(content)
    for name, message in (("cut.gz", "broken gzip"), ("cut.json", "bad JSON array"),
                          ("empty", "no text records in 0 rows"),
                          ("nowhere.jsonl", "no such file"), (".", "a folder, not a file"), ("a.txt", r"csv \(name it .csv or .tsv\) or other text, not JSON"),
                          ("a.xlsx", "zip or xlsx, not JSON"), ("16", "UTF-16 text, not JSON"),
                          ("16le", "UTF-16 or binary, not JSON"), ("1.zst", "zstd, not JSON")):
        with pytest.raises(DataError, match=message) as e:
            load_records(tmp_path / name, "text")
        assert "\n" not in str(e.value)
    with pytest.raises(DataError, match="unknown record kind 'pairs'"):
        load_records(tmp_path / "empty", "pairs")


@needs_data
@pytest.mark.parametrize("name, rows, differ, empty, equal, longer", [
    ("helpful-base", 2354, 9, 4, 2, 0), ("harmless-base", 2312, 5, 4, 0, 0), ("helpful-online", 1137, 0, 3, 2, 2)])
def test_hh_files_have_the_documented_bad_rows(name, rows, differ, empty, equal, longer, capsys):
    """The data's README counts 9 / 5 / 0 rows whose number of turns differs. Rows with different prefixes are among them."""
    path = DATA / "preferences" / f"hh_{name}_test.jsonl.gz"
    records = load_records(path, "preference", skip_bad=True)
    report = capsys.readouterr().err
    assert len(records) == rows - differ - empty - equal - longer
    assert all(f"{n} {what}" in report for n, what in (
        (differ, "prompts differ"), (empty, "empty"), (equal, "chosen equals rejected")) if n)
    assert report.count("goes on after the answer") == (longer > 0)
    assert all(r["prompt"].endswith("\n\nAssistant:") for r in records)
    assert all(r[k].startswith(" ") for r in records for k in ("chosen", "rejected"))
    with pytest.raises(DataError, match=rf"{path.name}:\d+: "):
        load_records(path, "preference")


@needs_data
def test_summary_and_ranked_files_give_the_expected_records():
    tldr = load_records(DATA / "preferences" / "tldr_comparisons_batch13.jsonl", "preference", skip_bad=True)
    assert len(tldr) == 1097 and all(r["prompt"].startswith("SUBREDDIT: r/") for r in tldr)
    assert all(r["prompt"].endswith("\n\nTL;DR:") and r["chosen"].startswith(" ") for r in tldr)
    cnndm = load_records(DATA / "preferences" / "cnndm_comparisons_cnndm0.jsonl", "preference", skip_bad=True)
    assert len(cnndm) == 437 - 12 and len({r["group"] for r in cnndm}) == 45  # 12 rejected summaries are empty
    train, held_out = data.split_records(cnndm, 0.2, seed=1)
    assert len(train) + len(held_out) == 425
    assert held_out and not {r["group"] for r in train} & {r["group"] for r in held_out}
    for name, n in (("PALMS", 40), ("INSTRUCTGPT", 13)):
        ranked = load_records(DATA / "ranked" / f"cai_samples_{name}_HHRLHF.jsonl", "ranked")
        assert len(ranked) == n and all(len(r["responses"]) == 17 for r in ranked)
        assert not any(s.endswith("Human:") for r in ranked for s in r["responses"])
    assert len(load_records(DATA / "sft" / "alpaca_en_demo.json", "completion")) == 999
    polite = DATA / "preferences" / "instruction-data-with-preference.json"
    assert len(load_records(polite, "preference", skip_bad=True)) == 1094
    assert len(load_records(DATA / "sentiment" / "imdb_test_2000.jsonl.gz", "text")) == 2000


@pytest.mark.parametrize("split", ["train", "test", "ood_near", "ood_far"])
def test_the_built_in_task_has_records_in_every_split(split):
    rows = load_records("reviews", "completion", split, limit=20)
    assert len(rows) == 20 and all(set(r) >= {"prompt", "completion"} and r["completion"][0] == " " for r in rows)
    assert load_records("reviews", "completion", split, limit=20) == rows
    assert all(len(load_records("reviews", kind, split, limit=5)) == 5 for kind in ("text", "prompt"))


def test_the_built_in_task_rejects_unknown_splits_and_kinds():
    with pytest.raises(DataError, match="no split 'dev'"):
        load_records("reviews", "prompt", "dev")
    with pytest.raises(DataError, match="no preference records"):
        load_records("reviews", "preference")


def test_split_keeps_a_group_together_whatever_the_other_records():
    records = [{"prompt": f"p{i % 300}", "completion": str(i)} for i in range(900)]
    train, held_out = data.split_records(records, 0.1, seed=3)
    assert len(train) + len(held_out) == 900 and 30 <= len(held_out) <= 180
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}
    assert data.split_records(records[:300], 0.1, seed=3)[1] == held_out[:len(held_out) // 3]
    assert data.split_records(records, 0.1, seed=4)[1] != held_out
    grouped = [{"prompt": str(i), "group": "g"} for i in range(9)]
    assert data.split_records(grouped, 0) == (grouped, [])
    with pytest.raises(DataError, match="too few"):
        data.split_records(grouped, 0.5)


# ---- Examples and batches -------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer with one token per character, so that the lengths in these tests can be counted by hand."""
    eos_id, pad_id, bos_id, chat_template = 1, 0, None, None

    def encode(self, text, start=True):
        return [ord(c) for c in text]


class LettersWithBos(Letters):
    bos_id = 2


def ids(text):
    return [ord(c) for c in text]


def test_encode_prompt_truncates_and_adds_bos():
    assert data.encode_prompt(Letters(), "abcdef") == ids("abcdef")
    assert data.encode_prompt(Letters(), "abcdef", 4) == ids("cdef")
    assert data.encode_prompt(Letters(), "abcdef", 4, keep="start") == ids("abcd")
    assert data.encode_prompt(Letters(), "abcdef", 6) == ids("abcdef")
    assert data.encode_prompt(Letters(), "") == [1]
    assert data.encode_prompt(LettersWithBos(), "") == [2]
    assert data.encode_prompt(LettersWithBos(), "abcdef", 4) == [2, *ids("def")]
    assert data.encode_prompt(LettersWithBos(), "abcdef", 4, keep="start") == [2, *ids("abc")]
    for length, tokenizer in ((0, Letters()), (1, LettersWithBos())):
        with pytest.raises(DataError, match="no room"):
            data.encode_prompt(tokenizer, "ab", length)
    with pytest.raises(DataError, match="keep='middle'"):
        data.encode_prompt(Letters(), "ab", keep="middle")


def test_tldr_truncation_drops_lines_from_the_end_of_the_post():
    prompt = TLDR_PROMPT.format(subreddit="s", title="t", post="one\ntwo\nthree")
    frame = len(prompt) - len("one\ntwo\nthree")

    def post(max_tokens, text=prompt):
        return data.truncate_tldr(Letters(), text, max_tokens).partition("POST: ")[2].removesuffix("\n\nTL;DR:")
    assert post(frame + 13) == "one\ntwo\nthree"
    assert post(frame + 12) == "one\ntwo"          # cut at the last newline
    assert post(frame + 6) == "one"
    assert post(frame + 2) == "on"                 # no newline left: single characters
    assert post(frame) == post(frame - 5) == ""    # nothing of the post is left: encode_prompt cuts the rest
    assert len(data.encode_prompt(Letters(), prompt, frame - 5, keep="tldr")) == frame - 5
    assert data.encode_prompt(Letters(), prompt, frame + 12, keep="tldr") == ids(prompt.replace("\nthree", ""))
    article = CNNDM_PROMPT.format(article="one\ntwo")
    assert data.truncate_tldr(Letters(), article, len(article) - 1) == "ARTICLE: one\nTL;DR:"
    assert data.truncate_tldr(Letters(), "x" * 99, 9) == "x" * 99


def test_tldr_truncation_in_large_steps_equals_one_character_at_a_time(tiny):
    rng = random.Random(0)
    post = "".join(rng.choices("the cat sat on é中 ", k=900))
    prompt, shorter = TLDR_PROMPT.format(subreddit="s", title="t", post=post), post
    while len(tiny.encode(TLDR_PROMPT.format(subreddit="s", title="t", post=shorter))) > 300:
        shorter = shorter[:-1]
    assert data.truncate_tldr(tiny, prompt, 300) == TLDR_PROMPT.format(subreddit="s", title="t", post=shorter)


def test_trap_14_prompt_and_response_are_tokenised_and_cut_apart(tiny):
    assert data.make_example(Letters(), "abcd", "xy", 7) == Example([*ids("abcdxy"), 1], 4)       # fits: 4 + 3
    assert data.make_example(Letters(), "abcd", "xy", 7, 4) == Example([*ids("abcdxy"), 1], 4)
    assert data.make_example(Letters(), "abcd", "xy", 7, 2) == Example([*ids("cdxy"), 1], 2, prompt_cut=True)  # whatever the response
    assert data.make_example(Letters(), "abcd", "xyz", 4, 2) == Example(ids("cdxy"), 2, (), True, True)  # the response loses its EOS
    assert data.make_example(Letters(), "abcd", "xyz", 4, 2, keep="start") == Example(ids("abxy"), 2, (), True, True)
    assert data.make_example(Letters(), "ab", "xyz", 4, 3) == Example(ids("abxy"), 2, (), False, True)          # the room that is left
    for limits in ((4, None), (4, 4), (2, 3)):
        with pytest.raises(DataError, match="no room for a response"):
            data.make_example(Letters(), "abcd", "x", *limits)
    a, b = data.make_examples(Letters(), "abcd", ["x", "xyz"], 5, 2)
    assert a == Example([*ids("cdx"), 1], 2, (), True) and b == Example(ids("cdxyz"), 2, (), True, True)
    joined = data.make_example(tiny, "the c", "at")  # " cat" is one token, but none may straddle the border
    assert joined.tokens == tiny.encode("the c") + tiny.encode("at") + [tiny.eos_id]
    assert tiny.encode("the cat") != joined.tokens[:-1]


def test_pack_texts_joins_documents_and_cuts_blocks():
    blocks = data.pack_texts(Letters(), ["abc", "de"], 3)
    assert blocks == [Example([1, *ids("ab")], 1), Example([*ids("c"), 1, *ids("d")], 1), Example([*ids("e"), 1], 1)]
    lone = data.pack_texts(Letters(), ["abc", "d"], 3)  # a last block of one token is dropped: nothing to predict
    assert lone[-1] == Example([*ids("c"), 1, *ids("d")], 1)
    assert data.pack_texts(LettersWithBos(), ["a", "b"], 9) == [Example([2, *ids("a"), 1, 2, *ids("b"), 1], 1)]


def test_without_packing_every_text_begins_a_row_and_a_long_one_takes_several():
    config = train_sft.Config(kind="text", packing=False, max_length=3)
    groups = train_sft.to_groups([{"text": "ab"}, {"text": "cdef"}], Letters(), config, 9)
    blocks = [[1, *ids("ab")], [1, *ids("cd")], [*ids("ef"), 1]]
    assert [[e.tokens for e in g.examples] for g in groups] == [[block] for block in blocks]


def test_traps_1_and_10_the_mask_includes_eos_and_excludes_padding():
    """This holds even if the pad id occurs in a row, as with GPT-2, because masks come from lengths."""
    examples = [Example([5, 6, 7, 1], 2), Example([5, 9, 9, 9, 9, 1], 1), Example([9, 1], 1)]
    for pad_id in (0, 9, 1):
        batch = data.collate(examples, pad_id)
        assert batch.tokens.tolist() == [[5, 6, 7, 1] + [pad_id] * 2, [5, 9, 9, 9, 9, 1], [9, 1] + [pad_id] * 4]
        assert batch.mask.int().tolist() == [[0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0]]
        assert batch.lengths.tolist() == [4, 6, 2] and not batch.mask[:, 0].any()
        assert batch.where.tolist() == [i for i, counts in enumerate(batch.mask.flatten().tolist()) if counts]
        assert batch.tokens.dtype == batch.lengths.dtype == torch.long and batch.mask.dtype == torch.bool
    assert batch.mask.sum() == sum(len(e.tokens) - e.prompt_length for e in examples)


def test_trap_1_every_response_ends_with_one_eos(tiny):
    example = data.make_example(tiny, "the cat", " sat<|endoftext|>")
    assert example.tokens[-1] == tiny.eos_id and example.tokens.count(tiny.eos_id) == 1


def test_epoch_order_depends_on_its_arguments_only():
    before = np.random.get_state()[1].copy()
    orders = [training.epoch_order(50, seed, epoch) for seed in (0, 1, -1) for epoch in (0, 1, 2)]
    assert all(sorted(o) == list(range(50)) for o in orders)
    assert len({tuple(o) for o in orders}) == 9
    training.epoch_order.cache_clear()
    assert (training.epoch_order(50, 0, 0) == orders[0]).all()
    assert (np.random.get_state()[1] == before).all()


def test_batches_cover_an_epoch_and_do_not_depend_on_history():
    steps = [training.batch_indices(10, 3, step, seed=5) for step in range(9)]
    for epoch in range(3):
        rows = [i for batch in steps[3 * epoch:3 * epoch + 3] for i in batch]
        assert len(rows) == len(set(rows)) == 9  # the tenth row is left out of this epoch
    training.epoch_order.cache_clear()
    assert training.batch_indices(10, 3, 8, seed=5) == steps[8] and all(type(i) is int for i in steps[8])
    assert [sorted(training.batch_indices(2, 8, step, seed=5)) for step in range(3)] == [[0, 1]] * 3


def test_micro_batches_keep_every_row_with_little_padding():
    rng = random.Random(0)
    examples = [Example([1] * rng.randrange(2, 60), 1) for _ in range(50)]
    parts = data.micro_batches(examples, 8)
    assert sorted(map(id, (e for p in parts for e in p))) == sorted(map(id, examples))
    assert [len(p) for p in parts] == [8] * 6 + [2]
    assert sum(len(p) * len(p[-1].tokens) for p in parts) < 1.2 * sum(len(e.tokens) for e in examples)
    pairs = [(examples[i], examples[i + 1]) for i in range(0, 50, 2)]
    parts = data.micro_batches(pairs, 4, length=lambda pair: max(len(e.tokens) for e in pair))
    assert sum(map(len, parts)) == 25


# ---- What the scripts say about their data --------------------------------------------------------------------------


def test_responses_without_a_space_behind_their_prompts_are_counted(tmp_path, capsys, tiny):
    def said(*rows, kind="completion"):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
        data.load_records(str(file), kind, tokenizer=tiny)
        return capsys.readouterr().out
    good = [dict(prompt=p, completion=c) for p, c in (
        ("Review:", " Good."), ("Review:\n", "Good."), ("Review: ", "Good."), ("", "Good."), ("(", "Good)"), ("Translate:", "好的"),
        ("Review:", "\nGood."), (ALPACA_PROMPT.format(instruction="Sing."), "La la."), ("\n\nHuman: Hi\n\nAssistant:", " Good."))]
    assert said(*good) == ""
    glued = dict(prompt="Review of Up:", completion="Good."), dict(prompt="The plot is", completion="good.")
    assert "in 2 of 11 records no space stands between prompt and response, as in 'eview of Up:Good.'" in said(*good, *glued)
    assert "in 1 of 1 records" in said(dict(prompt="A:", chosen="Yes", rejected=" No"), kind="preference")
    assert "in 1 of 1 records" in said(dict(prompt="A:", responses=["Yes", " No"], scores=[1, 2]), kind="ranked")


def test_prompts_that_look_like_conversations_but_are_none_are_counted(tmp_path, capsys, tiny, monkeypatch):
    rows = [{"prompt": p, "completion": " yes"} for p in (
        "Human: hi", "Human: hi\nAssistant:", "A talk.\n\nHuman: hi\n\nAssistant:", ASKED, "hi", "A Human: hi")]
    load_records(file_of(tmp_path, *rows), "completion", tokenizer=tiny)
    assert capsys.readouterr().out == ""           # without a template all are plain text
    monkeypatch.setattr(tiny, "chat_template", "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    load_records(file_of(tmp_path, *rows), "completion", tokenizer=tiny)
    assert "3 of 6 prompts have 'Human:' at the beginning of a line but are no conversation" in capsys.readouterr().out
    load_records(file_of(tmp_path, *rows[3:]), "completion", tokenizer=tiny)
    assert capsys.readouterr().out == ""


def test_describe_shows_the_first_example_and_counts_what_was_cut(capsys, tiny):
    rows = data.make_examples(tiny, "the cat sat", [" on the mat", " on the mat and the dog sat too"], 8, 3)
    data.describe("sft", tiny, rows)
    said = capsys.readouterr().out
    assert "sft: the first example as the model reads it, prompt 'the cat sat', response ' on the mat<|endoftext|>'" in said
    assert "1 of 2 responses are cut and have no EOS" in said and "prompt (" not in said
    data.describe("ppo", tiny, data.make_examples(tiny, "the cat sat on the mat", [" too"], 8, 3))
    said = capsys.readouterr().out
    assert "prompt ' on the mat'" in said and "1 of 1 examples have a cut prompt" in said and "no EOS" not in said
