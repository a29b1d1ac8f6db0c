"""Tests of sample_bon.py --responses: what another engine has drawn is scored, ranked and written as own samples are."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import sample_bon
from conftest import ROOT
from nanorlhf.data import load_candidates, load_records
from nanorlhf.errors import DataError
from nanorlhf.files import read_jsonl
from nanorlhf.options import main
from nanorlhf.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
OUTPUTS = ("best.jsonl", "ranked.jsonl", "comparisons.jsonl", "curve.json")
REWARDS = """
import time, zlib

def mixed(prompts, completions, answer, **kwargs):
    assert answer == [len(p) for p in prompts] and "stray" in kwargs
    return [zlib.crc32((p + c).encode()) % 9973 / 100 for p, c in zip(prompts, completions)]

def length(completions, **kwargs):
    return [float(len(c)) for c in completions]

def slow(completions, **kwargs):
    time.sleep(0.2)
    return length(completions)
"""
ROW = dict(prompt="p", responses=[" a", " b"])


def write_rows(file, rows):
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return str(file)


@pytest.fixture
def go(base, tmp_path):
    """Returns the function that runs the script in TMP/NAME with these options and returns the rows of a file it wrote."""
    (tmp_path / "rewards.py").write_text(REWARDS)

    def run(name, file="ranked", **options):
        options = dict(init=str(base), reward=f"{tmp_path}/rewards.py:length", device="cpu") | options
        sample_bon.sample(sample_bon.Config(**options, out=str(tmp_path / name)))
        return read_jsonl(tmp_path / name / f"{file}.jsonl")
    return run


@pytest.fixture
def own(go, tmp_path, monkeypatch):
    """Runs the script with samples of its own; returns the options of a run with --responses on a file of the same samples."""
    prompts = [f"Review of the film number {k}: plot and music." for k in range(7)]
    rows = [dict(prompt=p, answer=len(p), stray=[k], group=k // 2) for k, p in enumerate(prompts)]
    options = dict(reward=f"{tmp_path}/rewards.py:mixed", eval_reward=f"{tmp_path}/rewards.py:length", label_temperature=0.0)
    drawn = []
    with monkeypatch.context() as patch:
        patch.setattr(sample_bon, "remove", lambda file: (drawn.extend(read_jsonl(file)), file.unlink()))
        go("own", data=write_rows(tmp_path / "prompts.jsonl", rows), n=5, response_length=24, batch_size=3, cut_at="w", **options)
    assert {True, False} == {f for r in drawn for f in r["finished"]} and len(drawn) == 7
    rows = [dict(prompt=r["prompt"], responses=r["responses"], finished=r["finished"], **r["columns"]) for r in drawn]
    return options | dict(responses=write_rows(tmp_path / "given.jsonl", rows))


def same_outputs(tmp_path, name):
    for file in OUTPUTS:
        assert (tmp_path / name / file).read_bytes() == (tmp_path / "own" / file).read_bytes(), file
        assert len((tmp_path / name / file).read_text().splitlines()) > 3, file


def test_given_responses_are_ranked_as_own_samples_are(go, own, base, tmp_path):
    """And the policy's weights are not read. The number of tokens is another, because texts are encoded anew."""
    shutil.copytree(base, tmp_path / "bare")
    (tmp_path / "bare/model.safetensors").unlink()
    rows = go("given", "metrics", init=str(tmp_path / "bare"), batch_size=3, **own)
    times = ("time", "tokens", "tokens_per_second")
    assert [{k: v for k, v in r.items() if k not in times} for r in rows] == [
        {k: v for k, v in r.items() if k not in times} for r in read_jsonl(tmp_path / "own/metrics.jsonl")]
    same_outputs(tmp_path, "given")
    assert all(r.keys() == {"prompt", "responses", "scores", "answer", "stray", "group"} for r in read_jsonl(tmp_path / "given/ranked.jsonl"))
    assert json.loads((tmp_path / "given/curve.json").read_text())[-1].keys() >= {"reward", "eval_reward"}


def test_they_are_resumed_after_a_kill_unless_the_file_has_changed(own, base, tmp_path):
    def start(*words):
        return subprocess.Popen([sys.executable, str(ROOT / "sample_bon.py"), "--out", "given", *map(str, words)], cwd=tmp_path,
                                env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    options = own | dict(eval_reward=f"{tmp_path}/rewards.py:slow", init=base, batch_size=1, device="cpu")
    process = start(*[w for k, v in options.items() for w in (f"--{k}", v)])
    while process.poll() is None and len(read_jsonl(tmp_path / "given/drawn.jsonl")) < 2:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (tmp_path / "given/best.jsonl").exists()
    file = Path(own["responses"])
    text = file.read_text()
    file.write_text(text + text.splitlines()[0] + "\n")
    process = start("--resume")
    assert f"--responses {file} has changed since" in process.communicate()[1]
    file.write_text(text)
    process = start("--resume")
    out, err = process.communicate()
    assert process.returncode == 0 and "bon resumes given after step" in out and "after step 0" not in out, err
    same_outputs(tmp_path, "given")
    assert [r["step"] for r in read_jsonl(tmp_path / "given/metrics.jsonl")] == list(range(1, 8))


def stops(monkeypatch, words):
    """Returns the error of the script with these words, which must be one line."""
    monkeypatch.setattr(sys, "argv", ["sample_bon.py", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main(sample_bon.Config, sample_bon.sample, "")
    assert stop.value.code.startswith("error: ") and "\n" not in stop.value.code
    return stop.value.code


@pytest.mark.parametrize("row, says", [
    (dict(prompt="p"), "no candidates record (prompt, responses) can be made of a prompt record, fields prompt"),
    (dict(responses=[" a", " b"]), "no known record in the fields responses"),
    (ROW | dict(responses=None), "responses (null)"), (ROW | dict(responses=" a"), "responses is not a list"),
    (ROW | dict(responses=[]), "responses is empty"), (ROW | dict(responses=[" a", 3]), "a response is not a string"),
    (ROW | dict(responses=[" a", None]), "a response is not a string"), (ROW | dict(prompt=7), "prompt is not a string"),
    (ROW | dict(responses=[" a"]), "1 responses, where other rows have 2 (--n 1 uses the first 1 of each row"),
    (ROW | dict(finished=[True]), "finished is not a list of true or false"),
    (ROW | dict(finished=[True, "length"]), "finished is not a list of true or false"),
    (ROW | dict(responses=[[dict(role="user", content="q")], " b"]), "a response does not end with an assistant message"),
    ("not json", "bad JSON")], ids=lambda x: x if isinstance(x, str) else "")
def test_a_bad_row_is_named_by_file_and_line_or_skipped(go, base, tmp_path, monkeypatch, capsys, row, says):
    file = write_rows(tmp_path / "rows.jsonl", [ROW, ROW, row, ROW])
    message = stops(monkeypatch, ["--init", base, "--responses", file, "--reward", f"{tmp_path}/rewards.py:length", "--out", tmp_path / "x"])
    assert f"{file}:3: " in message and says in message and not (tmp_path / "x").exists()
    assert len(go("x", responses=file, skip_bad=True)) == 3 and "skipped 1 of 4 rows" in capsys.readouterr().err


@pytest.mark.parametrize("words, says", [
    (["--temperature", "0.7"], "--temperature 0.7 has no effect with --responses"), (["--top_p", "0.9"], "--top_p 0.9 has"),
    (["--top_k", "5"], "--top_k 5 has"), (["--response_length", "9"], "--response_length 9 has"), (["--compile"], "--compile True has"),
    (["--data", "x.jsonl"], "--data x.jsonl has"), (["--split", "train"], "--split train has"),
    (["--n", "1", "--label_temperature", "0"], "two to compare"), (["--label_temperature", "0"], "it takes two to compare"),
    (["--responses", "nowhere.jsonl"], "nowhere.jsonl: no such file"), (["--max_length", "97"], "the model's context is 96"),
    (["--responses", "reviews"], "reviews has no candidates records")], ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_options_that_have_no_effect_are_refused(base, go, tmp_path, monkeypatch, words, says):
    file = write_rows(tmp_path / "rows.jsonl", [ROW | dict(responses=[" a"])])
    given = ["--init", base, "--responses", file, "--reward", f"{tmp_path}/rewards.py:length", "--out", tmp_path / "x"]
    assert says in stops(monkeypatch, given + words) and not (tmp_path / "x").exists()


def test_n_is_that_of_the_rows_or_less(go, tmp_path, capsys):
    file = write_rows(tmp_path / "rows.jsonl", [ROW | dict(responses=[" a", " b", " c"]), ROW | dict(responses=list("abcd")), ROW])
    with pytest.raises(DataError, match="rows.jsonl:1: 3 responses, where other rows have 4 .--n 2 "):
        go("x", responses=file)
    assert [r["responses"] for r in go("2", responses=file, n=2)] == [[" a", " b"], ["a", "b"], [" a", " b"]]
    assert "of up to 4 responses to a prompt the first 2 are used (--n)" in capsys.readouterr().out
    assert [len(r["responses"]) for r in go("3", responses=file, n=3, skip_bad=True)] == [3, 3]
    assert [c["n"] for c in json.loads((tmp_path / "3/curve.json").read_text())] == [1, 2, 3]
    assert len(go("4", responses=file, n=2, limit=1)) == 1


def test_what_is_written_of_them(go, tmp_path, capsys):
    """Empty and unfinished responses are not. A cut one is finished; one that leaves --max_length is not, and loses its end."""
    mark, message = "\n\nHuman: so", dict(role="assistant", content="yes")
    rows = [dict(prompt="Review:", responses=[" good." + mark, "", " plot" * 200, " fine", " fine"], finished=[False, True, True, True, False]),
            dict(prompt=[dict(role="user", content="Hi")], responses=["yes" + mark, message, [message], "", " yes"], scores=["unread"])]
    file, talk = write_rows(tmp_path / "rows.jsonl", rows), "\n\nHuman: Hi\n\nAssistant:"
    plain, cut, kept = go("1", responses=file), go("2", responses=file, cut_at=r"\n\nHuman:"), go("3", responses=file, keep_unfinished=True)
    assert plain[0] == dict(prompt=talk, responses=[" yes" + mark, " yes", " yes", " yes"], scores=[4.0 + len(mark), 4, 4, 4])
    said = capsys.readouterr().out
    assert all(f"{k} of 10 responses are unfinished or empty" in said for k in (5, 4, 2))
    assert [r["responses"] for r in cut] == [[" good.", " fine"], [" yes"] * 4]
    long = kept[0]["responses"][1]
    assert [*kept[0]["responses"]] == [" good." + mark, long, " fine", " fine"]
    assert (" plot" * 200).startswith(long) and 10 < len(long) < 96 * 5
    tokenizer = load_tokenizer("reviews")
    assert len(tokenizer.encode(long)) + len(tokenizer.encode("Review:")) == 96


def test_other_readers_see_a_prompt_or_a_ranking(tmp_path):
    (tmp_path / "x").mkdir()
    def load(row, kind):
        return load_records(write_rows(tmp_path / "rows.jsonl", [row]), kind)
    assert load(ROW | dict(responses=7), "prompt") == [{"prompt": "p"}]
    assert load(ROW | dict(scores=[1, 2]), "ranked") == [{**ROW, "scores": [1.0, 2.0]}]
    assert load(ROW | dict(scores=[1, 2], finished=[True, False]), "candidates") == [{**ROW, "finished": [True, False]}]
    with pytest.raises(DataError, match="no ranked record .* of a prompt record"):
        load(ROW, "ranked")
    assert load_candidates(tmp_path / "rows.jsonl", 1)[0] == dict(prompt="p", responses=[" a"], finished=[True])


@pytest.mark.parametrize("prompt, answers", [
    ([dict(role="user", content="Hi")], [" yes", "", "yes"]), ("\n\nHuman: Hi\n\nAssistant:", [" yes", " ", " yes"]),
    ([dict(role="user", content="Hi"), dict(role="assistant", content="It is")], [" good.", "", "."])])
def test_conversations_go_through_the_chat_template(tmp_path, prompt, answers):
    from test_ends import chat_checkpoint
    folder, _ = chat_checkpoint(tmp_path / "chat")
    (tmp_path / "rewards.py").write_text(REWARDS)
    file = write_rows(tmp_path / "rows.jsonl", [dict(prompt=prompt, responses=answers)])
    sample_bon.sample(sample_bon.Config(init=str(folder), reward=f"{tmp_path}/rewards.py:length", responses=file, device="cpu",
                                       out=str(tmp_path / "x")))
    (row,) = read_jsonl(tmp_path / "x/ranked.jsonl")
    want = [" yes", " yes"] if "It is" not in str(prompt) else [" good.", "."]
    assert row["responses"] == want and row["scores"] == list(map(len, want)) and row["prompt"].startswith("\n\nHuman: Hi\n\nAssistant:")


def test_the_readme_s_lines_draw_candidates(go, tmp_path, monkeypatch):
    """With a stand-in for vLLM, which has the names that the lines use."""
    code = re.search(r"```python\n(import json, vllm\n.*?)```", (ROOT / "nanorlhf/README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    made = [SimpleNamespace(text=text, finish_reason=why) for text, why in ((" a", "stop"), (" é", "length"), (" c", "stop"))]
    llm = SimpleNamespace(generate=lambda prompts, how: [SimpleNamespace(outputs=made[:how["n"]]) for _ in prompts])
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=lambda folder, dtype: llm, SamplingParams=lambda **given: given))
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "prompts.jsonl", [dict(prompt="p", answer=1), dict(prompt="q", answer=2)])
    exec(code, {})
    rows = go("x", responses="drawn.jsonl")
    assert [(r["prompt"], r["responses"], r["answer"]) for r in rows] == [("p", [" a", " c"], 1), ("q", [" a", " c"], 2)]
