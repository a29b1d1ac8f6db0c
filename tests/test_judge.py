"""Tests of judge.py: questions for an outside judge, and what its answers become, against numbers worked out by hand."""

import json
import random
import sys

import pytest

from nanorlhf import judge
from nanorlhf.errors import UserError
from nanorlhf.files import read_jsonl, write_records
from nanorlhf.judge import Ask, Read, ask, fill, preference, read
from nanorlhf.metrics import mean_and_interval, share_interval

# Prompt, words of dpo's text, words of SFT's: the longer text is dpo's 3 times, SFT's once, and two are of one length.
LENGTHS = [("p0", 5, 2), ("p1", 6, 1), ("p2", 4, 3), ("p3", 1, 7), ("p4", 2, 2)]


def words(n, letter):
    return " " + " ".join(f"{letter}{i}" for i in range(n))


@pytest.fixture
def samples(tmp_path):
    """A file as evaluate.py writes it."""
    rows = [dict(method=method, split="test", prompt=prompt, completion=words(n, letter), gold=0.5)
            for method, letter, k in (("SFT", "s", 1), ("dpo", "d", 0)) for prompt, *counts in LENGTHS for n in [counts[k]]]
    write_records(tmp_path / "samples.jsonl", rows)
    return str(tmp_path / "samples.jsonl")


@pytest.fixture
def asked(samples, tmp_path, capsys):
    """Asks about dpo and SFT. Returns the function (judge's answer to a question, or None to leave it out) -> the table's row."""
    def answered(answer, **options):
        out = str(tmp_path / "judge")
        ask([samples], Ask(a="dpo", b="sft", out=out, overwrite=True))
        answers = [(q["id"], answer(q["question"])) for q in read_jsonl(tmp_path / "judge" / "questions.jsonl")]
        write_records(tmp_path / "answers.jsonl", [dict(id=i, answer=a) for i, a in answers if a is not None])
        capsys.readouterr()
        read([str(tmp_path / "answers.jsonl")], Read(out=out, **options))
        return json.loads((tmp_path / "judge" / "table.json").read_text())[0]
    return answered


def shown(question):
    """Returns the two texts of a built-in question about summaries."""
    a = question.partition("Summary A:\n")[2].partition("\n\nSummary B:\n")
    return a[0], a[2].partition("\n\nFirst compare")[0]


def longer(question):
    a, b = (len(text.split()) for text in shown(question))
    return f"Comparison: one is longer.\nPreferred: {'A' if a > b else 'B'}"   # of the same length: the second


# ---- Asking ---------------------------------------------------------------------------------------------------------


def test_each_pair_is_asked_in_both_orders_and_the_key_tells_which(samples, tmp_path):
    ask([samples], Ask(a="dpo", b="SFT", out=str(tmp_path / "judge")))
    questions, key = (read_jsonl(tmp_path / "judge" / f"{name}.jsonl") for name in ("questions", "key"))
    assert [set(q) for q in questions] == [{"id", "question"}] * 10
    assert [q["id"] for q in questions] == [k["id"] for k in key] and len({k["id"] for k in key}) == 10
    for k, q in zip(key, questions):
        (_, n, m) = LENGTHS[k["pair"]]
        texts = words(n, "d").strip(), words(m, "s").strip()
        assert shown(q["question"]) == (texts if k["first"] == "a" else texts[::-1])
        assert (k["a"], k["b"], k["words_a"], k["words_b"], k["split"]) == ("dpo", "SFT", n, m, "test")
        assert f"Post:\n{k['prompt']}\n" in q["question"] and "dpo" not in json.dumps(q) and "SFT" not in json.dumps(q)
    assert sorted((k["pair"], k["first"]) for k in key) == [(i, side) for i in range(5) for side in "ab"]


def test_neither_the_ids_nor_the_order_of_the_questions_tell_whose_text_comes_first(tmp_path):
    rows = [dict(method=m, prompt=f"p{i}", completion=f"{m} {i}") for m in "xy" for i in range(200)]
    write_records(tmp_path / "many.jsonl", rows)

    def keys(**options):
        ask([str(tmp_path / "many.jsonl")], Ask(a="x", b="y", out=str(tmp_path / "out"), overwrite=True, **options))
        return read_jsonl(tmp_path / "out" / "key.jsonl")
    key = keys()
    firsts = [k["first"] for k in key]
    assert 0.4 < sum(a == b for a, b in zip(firsts, firsts[1:])) / 399 < 0.6
    by_id = [k["first"] for k in sorted(key, key=lambda k: k["id"])]
    assert 80 < sum(first == "a" for first in by_id[:200]) < 120 and all(len(k["id"]) == 16 for k in key)
    assert sum(abs(k["pair"] - j["pair"]) == 0 for k, j in zip(key, key[1:])) < 10      # the two orders lie apart
    assert keys() == key and [k["pair"] for k in keys(seed=1)] != [k["pair"] for k in key]


def test_braces_and_backslashes_in_texts_mean_nothing():
    texts = dict(prompt="{a} {0} \\1 \\n", a="{b}{prompt}", b=" {{x}} ")
    assert fill("{prompt}|{a}|{b}|{c}|{}", **texts) == "{a} {0} \\1 \\n|{b}{prompt}|{{x}}|{c}|{}"


def test_a_template_of_the_users_own_needs_all_three_fields(samples, tmp_path):
    mine, out = tmp_path / "mine.txt", str(tmp_path / "judge")
    mine.write_text("Q {prompt}\n1) {a}\n2) {b}\nfirst: {a}")
    ask([samples], Ask(a="dpo", b="SFT", out=out, question=str(mine)))
    key, questions = (read_jsonl(tmp_path / "judge" / f"{name}.jsonl") for name in ("key", "questions"))
    one = next(q["question"] for k, q in zip(key, questions) if (k["pair"], k["first"]) == (4, "b"))
    assert one == "Q p4\n1) s0 s1\n2) d0 d1\nfirst: s0 s1"
    mine.write_text("{prompt} {a} B")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Quel résumé ? {prompt} {a} {b}".encode("latin-1"))
    for question, says in ((str(mine), "the template has no {b}"), ("clever", "neither simple, concise, helpful, nor a text file"),
                           (str(latin), "nor a text file in UTF-8")):
        with pytest.raises(UserError, match=says):
            ask([samples], Ask(a="dpo", b="SFT", out=str(tmp_path / "other"), question=question))
    for question in judge.QUESTIONS:
        template = judge.template_of(question)
        assert all(template.count(field) == 1 for field in ("{prompt}", "{a}", "{b}")) and "Preferred: <A or B>" in template


def test_texts_pair_up_by_prompt_split_and_turn_and_one_line_names_those_left_over(tmp_path, capsys):
    def record(method, split, prompt, completion):
        return dict(method=method, split=split, prompt=prompt, completion=completion)
    rows = [record("x", "s", "p", "1"), record("x", "s", "p", "2"), record("x", "t", "p", "3"), record("x", "s", "q", ""),
            record("x", "s", "alone", "4"), record("y", "s", "q", "8"), record("y", "t", "p", "7"), record("y", "s", "p", "5"),
            record("y", "s", "p", "6"), record("y", "s", "p", "9"), record("z", "s", "p", "0")]
    write_records(tmp_path / "rows.jsonl", rows)
    a, b, pairs = judge.pairs_of([str(tmp_path / "rows.jsonl")], Ask(a="x", b="Y"))
    assert (a, b) == ("x", "y")
    assert pairs == [("s", "p", "1", "5"), ("s", "p", "2", "6"), ("t", "p", "3", "7"), ("s", "q", "", "8")]
    assert capsys.readouterr().out == "1 texts of x and 1 of y have no partner and are not asked about\n"


def test_two_record_files_are_two_sides(tmp_path):
    for name, text in (("mine", "one"), ("theirs", "two")):
        write_records(tmp_path / f"{name}.jsonl", [dict(prompt="p", completion=text), dict(prompt="q", completion=text)])
    (tmp_path / "other").mkdir()
    write_records(tmp_path / "other" / "mine.jsonl", [dict(prompt="p", completion="three", method="only")])
    mine, theirs, other = (str(tmp_path / f) for f in ("mine.jsonl", "theirs.jsonl", "other/mine.jsonl"))
    assert judge.pairs_of([mine, theirs], Ask()) == ("mine", "theirs", [("", "p", "one", "two"), ("", "q", "one", "two")])
    assert judge.pairs_of([mine, theirs], Ask(a="we"))[:2] == ("we", "theirs")
    assert judge.pairs_of([mine, other], Ask()) == ("mine", "only", [("", "p", "one", "three")])
    assert judge.pairs_of([mine, theirs], Ask(a="n", b="n"))[:2] == (f"n ({mine})", f"n ({theirs})")


@pytest.mark.parametrize("rows, options, says", [
    ([dict(method="x", prompt="p", completion="c"), dict(method="y", prompt="p", completion="c")], dict(a="x"), "has the methods x, y"),
    ([dict(method="x", prompt="p", completion="c"), dict(method="y", prompt="p", completion="c")], dict(a="x", b="z"), "--b z"),
    ([dict(method="x", prompt="p", completion="c"), dict(method="y", prompt="q", completion="c")], dict(a="x", b="y"), "no prompt"),
    ([dict(method="x", prompt="p", completion="c")], dict(a="x", b="x"), "both x"),
    ([dict(method="x", prompt="p", completion="c"), dict(method="x", prompt="p")], {}, "rows.jsonl:2: completion is not a string"),
    ([dict(method=3, prompt="p", completion="c")], {}, "rows.jsonl:1: method is not a string"),
    ([[1]], {}, "rows.jsonl"), ([dict(prompt="\ud800", completion="")], {}, "rows.jsonl:1: unpaired surrogate")])
def test_what_cannot_be_asked_gives_a_one_line_error(rows, options, says, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as error:
        ask([str(file)], Ask(out=str(tmp_path / "out"), **options))
    assert says in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


# ---- Reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer, letter", [
    ("Comparison: A says more.\nPreferred: A", "A"), ("B", "B"), (" (B) ", "B"), ('Preferred: "B".', "B"), ("**Preferred:** B", "B"),
    ("Preferred: **A**", "A"), ("Better: [[A]]", "A"), ("More helpful: <A>", "A"), ("preferred: b", "B"), ("Preferred: Summary B", "B"),
    ("Response A", "A"), ("Comparison: A is short. Preferred: B\n\n", "B"), ("_B_", "B"), ("Preferred：A", "A"), ("A\r\n", "A"),
    ("Comparison: B is longer, but vague.\nPreferred: A\nBoth are fine texts.", "A"), ("Longer: A\nPreferred: B", "B"),
    ("Preferred: B\nPreferred: B", "B"),
    ("", None), ("A or B", None), ("Preferred: A or B", None), ("Preferred: A/B", None), ("Both are good.", None), ("A\nB", None),
    ("Preferred: A\nPreferred: B", None), ("Preferred: neither", None), ("Preferred:", None), ("A plan is needed", None),
    ("C", None), ("AB", None), ("I cannot say which. Preferred: <A or B>", None), ("Comparison: B is a", None)])
def test_the_preference_is_read_from_free_text_or_not_at_all(answer, letter):
    assert preference(answer) == letter


def test_a_judge_that_prefers_the_longer_text(asked):
    """dpo wins the 3 pairs where it is longer and loses 1. The judge takes the second of equal texts: a tie."""
    row = asked(longer)
    assert row["win"] == list(share_interval(3.5 / 5, 5)) and row["disagree"] == list(share_interval(1 / 5, 5))
    assert row["longer"] == list(share_interval(1.0, 4)) and row["first"] == list(share_interval(4 * 0.5 / 5, 5))
    assert row["win_longer"] == list(share_interval(1.0, 3)) and row["win_shorter"] == list(share_interval(0.0, 1))
    assert row["prompts"][0] == 5 and row["unanswered"][0] == 0
    mean, half = mean_and_interval([5, 6, 4, 1, 2])
    assert row["words_a"] == pytest.approx([mean, mean - half, mean + half]) and row["words_b"][0] == 3.0


def test_a_judge_that_always_answers_a_makes_ties_only(asked):
    row = asked(lambda question: "A")
    assert row["win"][0] == 0.5 and row["disagree"][0] == 1.0 and row["first"][0] == 1.0 and row["longer"] is None
    assert asked(lambda question: "B", overwrite=True)["first"][0] == 0.0


def test_a_judge_that_knows_the_methods_gives_every_win_to_one(asked, tmp_path):
    row = asked(lambda question: "Preferred: " + "AB"["d0" not in shown(question)[0]])
    assert row["win"] == list(share_interval(1.0, 5)) and row["longer"][0] == 3 / 4 and row["first"][0] == 0.5
    table = (tmp_path / "judge" / "table.md").read_text(encoding="utf-8")
    assert table.startswith("a is dpo, b is SFT. The question was `concise`.") and "| all | 0 | 5 | 100% [57%, 100%] |" in table
    assert all(f"\n- {heading}: " in table for heading, *_ in judge.COLUMNS.values())


def test_unanswered_questions_are_counted_and_their_pairs_left_out(asked, tmp_path, capsys):
    def shy(question):
        if "p0" in question and shown(question)[0].startswith("d"):
            return None
        return "Both." if "p3" in question else longer(question)
    row = asked(shy)
    said = capsys.readouterr().out
    assert "1 of 10 questions have no answer, and 2 answers name neither A nor B clearly, such as that to " in said
    assert row["unanswered"][0] == 3 and row["prompts"][0] == 3 and row["win"] == list(share_interval(2.5 / 3, 3))
    with pytest.raises(UserError, match="no pair has a clear answer in both orders"):
        asked(lambda question: "Both.")


def test_pairs_of_one_prompt_count_as_one_case_and_splits_have_rows_of_their_own(tmp_path):
    rows = [dict(method=m, split=s, prompt=p, completion=f"{m}{i}") for m in "xy" for s, p, n in
            (("s", "p", 3), ("s", "q", 1), ("t", "r", 1)) for i in range(n)]
    write_records(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out"
    ask([str(tmp_path / "rows.jsonl")], Ask(a="x", b="y", out=str(out)))
    key, wins = read_jsonl(out / "key.jsonl"), [1, 1, 0, 0, 1]                        # of x in each pair
    answers = [dict(id=k["id"], answer="AB"[(k["first"] == "a") != wins[k["pair"]]]) for k in key]
    random.Random(0).shuffle(answers)
    write_records(tmp_path / "answers.jsonl", answers)
    read([str(tmp_path / "answers.jsonl")], Read(out=str(out)))
    table = {row["method"]: row for row in json.loads((out / "table.json").read_text())}
    assert list(table) == ["all", "s", "t"]
    assert table["s"]["win"] == pytest.approx(share_interval((2 / 3 + 0) / 2, 2)) and table["t"]["win"][0] == 1.0
    assert table["all"]["win"] == pytest.approx(share_interval((2 / 3 + 0 + 1) / 3, 3)) and table["all"]["win_longer"] is None


def test_repeated_and_unknown_ids_are_errors_that_name_the_line(samples, tmp_path):
    out, file = str(tmp_path / "judge"), tmp_path / "answers.jsonl"
    ask([samples], Ask(a="dpo", b="SFT", out=out))
    one = read_jsonl(tmp_path / "judge" / "key.jsonl")[0]["id"]
    for rows, says in (([dict(id=one, answer="A"), dict(id=one, answer="A")], f"answers.jsonl:2: a second answer to the id '{one}'"),
                       ([dict(id="x", answer="A")], "answers.jsonl:1: no question has the id 'x'"),
                       ([dict(id=one, answer={"text": "A"})], "answers.jsonl:1: answer is not a string"),
                       ([dict(answer="A")], "answers.jsonl:1: id is not a string")):
        write_records(file, rows)
        with pytest.raises(UserError) as error:
            read([str(file)], Read(out=out))
        assert says in str(error.value) and "\n" not in str(error.value)
    ask([samples], Ask(a="SFT", b="dpo", out=out, overwrite=True))                     # other questions: no id is the same
    assert one not in {k["id"] for k in read_jsonl(tmp_path / "judge" / "key.jsonl")}


def test_an_answer_may_be_null_or_a_list_of_text_parts(samples, tmp_path):
    ask([samples], Ask(a="dpo", b="SFT", out=str(tmp_path)))
    key = {k["id"]: k for k in read_jsonl(tmp_path / "key.jsonl")}
    one, two, *_ = key
    write_records(tmp_path / "answers.jsonl", [dict(id=one, answer=[{"type": "text", "text": "A"}]), dict(id=two, answer=None)])
    assert judge.read_answers(str(tmp_path / "answers.jsonl"), key) == {one: "A", two: None}


def test_the_command_overwrites_nothing_unless_asked_and_explains_itself(samples, tmp_path, monkeypatch, capsys):
    out = tmp_path / "judge"

    def run(*words):
        """Runs the command here; returns what it printed, or its error."""
        monkeypatch.setattr(sys, "argv", ["judge", *words])
        try:
            judge.main()
        except SystemExit as error:
            if error.code:
                return str(error)
        return capsys.readouterr().out

    question = ["ask", samples, "--a", "dpo", "--b", "SFT", "--out", str(out)]
    answers = ["read", str(tmp_path / "answers.jsonl"), "--out", str(out)]
    assert "key.jsonl is missing; first run: python -m nanorlhf.judge ask" in run(*answers)
    assert "5 pairs, 10 questions" in run(*question)
    assert "answers.jsonl: no such file" in run(*answers)
    write_records(answers[1], [dict(id=k["id"], answer="A") for k in read_jsonl(out / "key.jsonl")])
    printed = run(*answers)
    assert (out / "table.md").read_text(encoding="utf-8").strip() in printed
    assert "table.md is there already" in run(*answers) and "a is dpo" in run(*answers, "--overwrite")
    before = (out / "key.jsonl").read_text()
    assert "questions.jsonl is there already" in run(*question) and (out / "key.jsonl").read_text() == before
    assert "10 questions" in run(*question, "--seed", "1", "--overwrite") and not (out / "table.md").exists()
    assert "--cut_at" in run("--help") and "usage" in run("read", "--help") and "--cut_at" not in run("read", "--help")
    for wrong in (["ask"], ["ask", "a", "b", "c"], ["read", "a", "b"], ["tell", "x"], []):
        assert run(*wrong).startswith("error: say `ask` and one file or two, or `read` and one file")
    assert run("ask", samples, "--seed", "-1").startswith("error: --seed -1")
