"""Questions for an outside judge, such as a person or a language model behind an API, and its answers as a win rate.

    python -m nanorlhf.judge ask SAMPLES.jsonl --a dpo --b SFT --out out/judge      writes questions.jsonl and key.jsonl
    python -m nanorlhf.judge read ANSWERS.jsonl --out out/judge                     prints and writes table.md and table.json

SAMPLES.jsonl is what `python -m nanorlhf.evaluate` writes; --a and --b name two methods in it. Or give two record files, the
first for a: rows with a prompt and a completion, both strings, and perhaps method and split. Texts for the same prompt and split
are a pair; several texts for one prompt pair up in order. One evaluation draws all methods' texts with the same random numbers,
so that similar methods write some texts alike; those of two evaluations with different --seed are independent.

questions.jsonl has records {id, question}. The judge answers each with a record {id, answer}, its words as they are. Ask each
question on its own, a language model at temperature 0. It first compares the texts in one sentence and then writes a line with
only A or B. Each pair is asked in both orders, because judges favour a place. No judge may see key.jsonl, which tells who is who.

The built-in questions follow Rafailov 2023 (appendix C.2) in other words; for theirs, write a template (--question FILE).
`simple`, their (S), asks which summary tells the most important points better. `concise`, their (C), wants no unimportant detail
besides. In the paper GPT-4 with (S) liked longer texts more than people did, and with (C) it agreed better with people. `helpful`
asks which answer in a dialogue helps more. `read --help` lists the options of read, `--help` those of ask.
"""

import dataclasses
import hashlib
import json
import operator
import random
import re
import sys
from pathlib import Path

from nanorlhf.data import cut_text, marks_of
from nanorlhf.errors import DataError, UserError
from nanorlhf.evaluate import markdown_table
from nanorlhf.files import parse_json, read_jsonl, remove, require_file, write_json, write_records, write_text
from nanorlhf.formats.chat import string
from nanorlhf.formats.sources import rows_in
from nanorlhf.metrics import mean_and_interval, share_interval, within
from nanorlhf.options import check_options, leading_words, one_line_errors, parse_options
from nanorlhf.training import seed_for

FORM = """
First compare A and B in one sentence. Then name the better one on a line of its own, with the letter only, in this form:
Comparison: <one sentence>
Preferred: <A or B>
"""
SUMMARIES = "\n\nPost:\n{prompt}\n\nSummary A:\n{a}\n\nSummary B:\n{b}\n" + FORM
QUESTIONS = {
    "simple": "Which of these two summaries of a post tells its most important points better?" + SUMMARIES,
    "concise": "Which of these two summaries of a post tells its most important points better, and leaves out what does not "
               "matter or is beside the point? A good summary is precise: each unimportant detail counts against it." + SUMMARIES,
    "helpful": "Which of these two responses of an assistant is more helpful to the person who asks?"
               "\n\nDialogue:\n{prompt}\n\nResponse A:\n{a}\n\nResponse B:\n{b}\n" + FORM}


@dataclasses.dataclass
class Ask:
    a: str = ""                      # method whose win rate is measured; '' = the only one of the first file
    b: str = ""                      # method that it is compared with; '' = the only one of the second file
    question: str = "concise"        # simple, concise, helpful, or a template file with {prompt}, {a} and {b}
    cut_at: str = ""                 # end texts before the first of these, comma-separated; \n is a newline
    seed: int = 0                    # of the order of the questions
    out: str = "out/judge"           # folder for questions.jsonl and key.jsonl
    overwrite: bool = False          # overwrite the questions, and delete the table, in --out


@dataclasses.dataclass
class Read:
    out: str = "out/judge"           # folder with key.jsonl, for table.md and table.json
    overwrite: bool = False          # overwrite the table in --out


def check_unused(out, names, overwrite):
    """Raises UserError if the folder has a file of one of these names, unless it may be overwritten."""
    for file in (out / name for name in names):
        if file.exists() and not overwrite:
            raise UserError(f"{file} is there already: name another --out, or replace it with --overwrite")


def read_rows(file, **fields):
    """Yields ("file:line", row) for each JSON object of a file. fields: those that are strings, and what stands for a missing one
    or a null (None: there must be one)."""
    for line, content in rows_in(Path(require_file(file, "", ""))):
        try:
            row = parse_json(content) if isinstance(content, bytes) else content
            for field, default in fields.items():
                row[field] = string(default if row.get(field) is None else row[field], field)
        except DataError as error:
            raise DataError(f"{file}:{line}: {error}")
        except (ValueError, AttributeError):
            raise DataError(f"{file}:{line}: no JSON object")
        yield f"{file}:{line}", row


# ---- Asking ---------------------------------------------------------------------------------------------------------


def texts_of(file, option, name, marks):
    """Returns (method, {(split, prompt): [its texts, cut at marks]}) of the method called `name` in a file; the case of letters
    is free. A file whose rows name no method has one, which gets the name, or else the file's. option: --a or --b, for errors."""
    found = {}
    for _, row in read_rows(file, prompt=None, completion=None, method="", split=""):
        texts = found.setdefault(row["method"], {}).setdefault((row["split"], row["prompt"]), [])
        texts.append(cut_text(row["completion"], marks))
    if found.keys() <= {""}:
        return name or Path(file).stem, found.get("", {})
    fits = [m for m in found if m == name] or [m for m in found if name.lower() in (m.lower(), "")]
    if len(fits) != 1:
        raise UserError(f"{option} {name}: {file} has the methods {', '.join(found)}: name one of them")
    return fits[0], found[fits[0]]


def pairs_of(files, options):
    """Returns (name of a, name of b, [(split, prompt, text of a, text of b)]). Prints one line about texts without a partner."""
    marks = marks_of(options.cut_at)
    a, of_a = texts_of(files[0], "--a", options.a, marks)
    b, of_b = texts_of(files[-1], "--b", options.b, marks)
    if a == b and Path(files[0]) == Path(files[-1]):
        raise UserError(f"--a and --b are both {a}: name two methods, or two files")
    if a == b:
        a, b = f"{a} ({files[0]})", f"{b} ({files[-1]})"
    pairs = [(*key, x, y) for key, texts in of_a.items() for x, y in zip(texts, of_b.get(key, []))]
    if not pairs:
        raise UserError(f"no prompt of a split has texts of both {a} and {b}")
    left_a, left_b = (sum(map(len, texts.values())) - len(pairs) for texts in (of_a, of_b))
    if left_a or left_b:
        print(f"{left_a} texts of {a} and {left_b} of {b} have no partner and are not asked about", flush=True)
    return a, b, pairs


def template_of(question):
    """Returns the template that --question names: a built-in one, or a file's content."""
    try:
        template = QUESTIONS.get(question) or Path(question).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--question {question}: neither {', '.join(QUESTIONS)}, nor a text file in UTF-8")
    if missing := [field for field in ("{prompt}", "{a}", "{b}") if field not in template]:
        raise UserError(f"--question {question}: the template has no {missing[0]}")
    return template


def fill(template, **texts):
    """Returns the template with its fields replaced by texts, all at once: braces in the texts mean nothing."""
    return re.sub(r"\{(prompt|a|b)\}", lambda match: texts[match[1]].strip(), template)


def ask(files, options):
    """Writes the questions about each pair in both orders, shuffled, and the key to them. An id is a hash that depends on the
    texts, so that answers to other questions are noticed, and tells nothing about the order."""
    out, written = Path(options.out), ("questions.jsonl", "key.jsonl", "table.md", "table.json")
    check_unused(out, written, options.overwrite)
    template, questions = template_of(options.question), []
    a, b, pairs = pairs_of(files, options)
    for number, (split, prompt, x, y) in enumerate(pairs):
        for first, shown in (("a", (x, y)), ("b", (y, x))):
            text = fill(template, prompt=prompt, a=shown[0], b=shown[1])
            name = hashlib.sha256(json.dumps([options.seed, number, first, text]).encode()).hexdigest()[:16]
            key = dict(id=name, pair=number, split=split, prompt=prompt, a=a, b=b, first=first, words_a=len(x.split()),
                       words_b=len(y.split()), asked=options.question)
            questions.append((dict(id=name, question=text), key))
    random.Random(seed_for(options.seed, "judge")).shuffle(questions)
    for name in written:
        remove(out / name)
    write_records(out / "key.jsonl", [key for _, key in questions])
    write_records(out / "questions.jsonl", [question for question, _ in questions])
    print(f"{a} against {b}: {len(pairs)} pairs, {len(questions)} questions in {out / 'questions.jsonl'}; then: "
          f"python -m nanorlhf.judge read ANSWERS.jsonl --out {out}")


# ---- Reading the answers --------------------------------------------------------------------------------------------


def preference(answer):
    """Returns the "A" or "B" that an answer ends with, or None if that is not clear.

    It stands alone on its line, or behind a colon; quotes, brackets and the like do not matter. Of several such lines the last
    counts, unless one with the same words before the letter names the other letter.
    """
    matches = [re.fullmatch(r"(.*[:：])?[\W_]*(?:(?:response|summary|answer|option)[\W_]+)?([ab])[\W_]*", line)
               for line in answer.lower().splitlines()]
    found = [((match[1] or "").strip("*_ "), match[2].upper()) for match in matches if match]
    letters = {letter for label, letter in found if label == found[-1][0]}
    return letters.pop() if len(letters) == 1 else None


def read_answers(file, key):
    """Returns {id: "A", "B" or None} of a file of answers. key: {id: its record}. UserError for an unknown or repeated id."""
    answers = {}
    for place, row in read_rows(file, id=None, answer=""):
        if row["id"] not in key:
            raise UserError(f"{place}: no question has the id {row['id']!r}")
        if row["id"] in answers:
            raise UserError(f"{place}: a second answer to the id {row['id']!r}")
        answers[row["id"]] = preference(row["answer"])
    return answers


COLUMNS = {                                       # {column: (heading, format, meaning)}
    "unanswered": ("unanswered", "d", "questions without an answer, or with one that names neither A nor B clearly"),
    "prompts": ("prompts", "d", "prompts with a pair whose two questions have a clear answer; the columns behind are of these"),
    "win": ("win rate", ".0%", "share of pairs that a wins; a pair whose two orders disagree is a tie, half a win"),
    "disagree": ("orders disagree", ".0%", "share of pairs where the judge prefers another text when the texts change places"),
    "first": ("first wins", ".0%", "share of answers that prefer the text shown first; 50% = no bias to a place"),
    "words_a": ("words of a", ".1f", "mean length of a's texts"), "words_b": ("words of b", ".1f", "mean length of b's texts"),
    "longer": ("longer wins", ".0%", "share of pairs that the longer text wins, without ties and texts of the same length"),
    "win_longer": ("win rate, a longer", ".0%", "a's win rate in pairs where its text is the longer one"),
    "win_shorter": ("win rate, a shorter", ".0%", "likewise, the shorter one; a judge of length only would give 100% and 0%")}


def over_prompts(pairs, value):
    """Returns the mean of value(pair) over the pairs of each prompt: pairs of one prompt are not independent."""
    of = {}
    for pair in pairs:
        of.setdefault(pair["prompt"], []).append(value(pair))
    return [sum(values) / len(values) for values in of.values()]


def share(pairs, value):
    """Returns (share, low end, high end) over the prompts of pairs; None if there are no pairs."""
    values = over_prompts(pairs, value)
    return share_interval(sum(values) / len(values), len(values)) if values else None


def table_row(name, pairs):
    """Returns {"method": name, column: (value, low end, high end)} of pairs {prompt, words_a, words_b, letters}. letters:
    {"a" or "b", whose text was shown first: the clear answer, "A" or "B"}."""
    def win(pair):
        return ((pair["letters"]["a"] == "A") + (pair["letters"]["b"] == "B")) / 2

    def a_is_longer(pair):
        return pair["words_a"] > pair["words_b"]
    both = [p for p in pairs if len(p["letters"]) == 2]
    unlike = [p for p in both if p["words_a"] != p["words_b"]]
    row = {"method": name, "prompts": (len({p["prompt"] for p in both}), None, None),
           "unanswered": (sum(2 - len(p["letters"]) for p in pairs), None, None),
           "win": share(both, win), "disagree": share(both, lambda p: win(p) == 0.5),
           "first": share(both, lambda p: [*p["letters"].values()].count("A") / 2),
           "longer": share([p for p in unlike if win(p) != 0.5], lambda p: win(p) == a_is_longer(p)),
           "win_longer": share([p for p in unlike if a_is_longer(p)], win),
           "win_shorter": share([p for p in unlike if not a_is_longer(p)], win)}
    for side in ("words_a", "words_b"):
        row[side] = within(*mean_and_interval(over_prompts(both, operator.itemgetter(side))), 0) if both else None
    return row


def read(files, options):
    """Prints the table of a file of answers, one row for all pairs and one per split, and writes it."""
    out = Path(options.out)
    check_unused(out, ("table.md", "table.json"), options.overwrite)
    key = {k["id"]: k for k in read_jsonl(require_file(out / "key.jsonl", "python -m nanorlhf.judge ask"))}
    answers, pairs = read_answers(files[0], key), {}
    for name, k in sorted(key.items(), key=lambda item: item[1]["pair"]):
        pair = pairs.setdefault(k["pair"], k | {"letters": {}})
        if letter := answers.get(name):
            pair["letters"][k["first"]] = letter
    unclear, absent = [name for name, letter in answers.items() if letter is None], len(key) - len(answers)
    if unclear or absent:
        print(f"{absent} of {len(key)} questions have no answer, and {len(unclear)} answers name neither A nor B clearly"
              + (f", such as that to {unclear[0]}" if unclear else ""), flush=True)
    of_split = {}
    for pair in pairs.values():
        of_split.setdefault(pair["split"], []).append(pair)
    rows = [table_row("all", pairs.values()), *(table_row(*item) for item in of_split.items() if len(of_split) > 1)]
    if not rows[0]["win"]:
        raise UserError(f"{files[0]}: no pair has a clear answer in both orders")
    of, legend = pairs[0], "\n".join(f"- {heading}: {meaning}" for heading, _, meaning in COLUMNS.values())
    table = (f"a is {of['a']}, b is {of['b']}. The question was `{of['asked']}`.\n\n{markdown_table(rows, COLUMNS, 'pairs')}\n\n"
             f"{legend}\n- ±: half of a 95% interval over the prompts, of shares by Wilson, of words by Student's t. Where it is "
             f"not symmetric, its two ends stand in brackets.\n")
    print(table)
    write_text(out / "table.md", table)
    write_json(out / "table.json", rows)


def main():
    words = leading_words()
    command, files = "".join(words[:1]), words[1:]
    options = parse_options(Read if command == "read" else Ask, __doc__, sys.argv[1 + len(words):])
    with one_line_errors(options, lambda: "nothing was saved: give the same command again"):
        check_options(options)
        if (command, len(files)) not in (("ask", 1), ("ask", 2), ("read", 1)):
            raise UserError("say `ask` and one file or two, or `read` and one file, before the options (--help tells more)")
        (ask if command == "ask" else read)(files, options)


if __name__ == "__main__":
    main()
