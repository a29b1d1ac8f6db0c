"""Tests of the file formats of data (formats/sources.py), of --columns, and of the preview."""

import builtins
import gzip
import json
import sys
import types

import pytest

import train_dpo
from nanorlhf import data
from nanorlhf.data import load_records
from nanorlhf.errors import DataError, UserError
from nanorlhf.formats.sources import column_names, data_sha256, local_files, renamed, rows_in

PAIRS = [dict(prompt="Is it good?", chosen=' Yes,\nit is "good".', rejected=" No.\u0085"), dict(prompt="A, b?", chosen=" a", rejected=" b")]
CSV = 'prompt,chosen,rejected\r\nIs it good?," Yes,\nit is ""good"".", No.\u0085\r\n"A, b?", a, b\r\n'


def rows_of(path):
    return [row for _, row in rows_in(path)]


# ---- CSV ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, content", [
    ("a.csv", CSV.encode()), ("A.CSV", CSV.encode("utf-8-sig")), ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
    ("a.tsv", CSV.replace("prompt,chosen,rejected", "prompt\tchosen\trejected").replace('?,"', '?\t"').replace('", No', '"\t No')
     .replace('?", a, b', '?"\t a\t b').encode())])
def test_csv_is_read_by_its_header(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert load_records(tmp_path / name, "preference") == PAIRS
    assert [number for number, _ in rows_in(tmp_path / name)] == [3, 4]                # the first row stands in two lines
    assert load_records(tmp_path / name, "preference", limit=1) == PAIRS[:1]


def test_cells_of_csv_hold_lists_truth_and_nothing(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text('prompt,responses,scores,label,system,,note\nQ,"["" a"", "" b""]","[1, -0.5]",false,,7,[draft\n')
    assert rows_of(file) == [dict(prompt="Q", responses=[" a", " b"], scores=[1, -0.5], label=False, system=None, note="[draft")]
    assert load_records(file, "ranked")[0] == dict(prompt="Q", responses=[" a", " b"], scores=[1, -0.5])
    file.write_text('prompt,completion,label\n"[{""role"": ""user"", ""content"": ""Hi""}]", Hello,1\n[1] is a list?, Yes.,0\n,,\n')
    assert [r["label"] for r in rows_of(file)] == [1.0, 0.0]
    assert load_records(file, "completion", limit=1) == [dict(prompt="\n\nHuman: Hi\n\nAssistant:", completion=" Hello")]
    with pytest.raises(DataError, match="a.csv:3: label is 0.0: the answer is not to be imitated"):
        load_records(file, "completion")
    assert load_records(file, "prompt")[1]["prompt"] == "[1] is a list?"
    file.write_text("prompt,label,loss\np,pos,0.5\nq,False,\n,0,\n")                  # a word is no truth; nothing is passed over
    assert rows_of(file) == [dict(prompt="p", label="pos", loss="0.5"), dict(prompt="q", label=False, loss=None),
                             dict(prompt="", label=0.0, loss=None)]


@pytest.mark.parametrize("content, message", [
    (b"prompt,chosen,rejected\na,b\n", r"a.csv:2: 2 cells under a header of 3"),
    (b"prompt,chosen,rejected\na,b,c\na,b,c,d\n", r"a.csv:3: 4 cells under a header of 3"),
    (b"prompt,chosen,chosen\na,b,c\n", r"a.csv: the header names 'chosen' twice"),
    (b'prompt,chosen,rejected\na,b,"c\nd,e,f\n', r"a.csv:3: bad CSV \(unexpected end of data\)"),
    (b"prompt,chosen,rejected\na,b,\xff\n", r"a.csv: bad UTF-8 after line 0|a.csv: bad UTF-8 after line 1"),
    (b"prompt,chosen,rejected\na,b,\n", r"a.csv:2: empty rejected"),
    (b"prompt,good,rejected\na,b,c\n", r"a.csv:2: no preference record .* of a prompt record"),
    ("prompt,chosen\n".encode("utf-16"), r"a.csv: UTF-16 text, not JSON"),
    (b"", "no preference records in 0 rows")])
def test_bad_csv_is_named(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_records(tmp_path / "a.csv", "preference")


# ---- JSON lines are streamed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_json_lines_are_read_as_they_are_asked_for(tmp_path, pack):
    """What lies behind the rows that are used is not read: a damaged end does not matter then."""
    file = tmp_path / "a.jsonl"
    lines = b"\xef\xbb\xbf\n" + b"".join(json.dumps(dict(text=f"row {i} \u0085")).encode() + b"\n" for i in range(50_000))
    file.write_bytes(pack(lines)[:-9])
    assert [r["text"] for r in load_records(file, "text", limit=3)] == ["row 0 \u0085", "row 1 \u0085", "row 2 \u0085"]
    with pytest.raises(DataError, match="broken gzip" if pack is gzip.compress else "a.jsonl:50001: bad JSON"):
        load_records(file, "text")


# ---- Parquet and the Hub --------------------------------------------------------------------------------------------


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `data` brings pyarrow")
    from pyarrow import parquet
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_parquet(tmp_path):
    file, talk = tmp_path / "a.parquet", [dict(role="user", content="Hi"), dict(role="assistant", content="Hello", weight=1)]
    write_parquet(file, PAIRS)
    assert load_records(file, "preference") == PAIRS
    write_parquet(file, [dict(messages=talk, source="x"), dict(messages=talk[:1], source=None)])
    assert load_records(file, "completion", skip_bad=True) == [dict(prompt="\n\nHuman: Hi\n\nAssistant:", completion=" Hello")]
    content = file.read_bytes()
    file.write_bytes(content[:len(content) // 2])
    with pytest.raises(DataError, match="a.parquet: broken parquet file"):
        load_records(file, "preference")


@pytest.mark.parametrize("package, name", [("pyarrow", "a.parquet"), ("huggingface_hub", "hub:somebody/pairs")])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, package, name):
    real = builtins.__import__

    def without(module, *rest):
        if module.split(".")[0] == package:
            raise ImportError(module)
        return real(module, *rest)
    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"extra `data`: pip install -e '.\[data\]'"):
        load_records(name if ":" in name else tmp_path / name, "preference")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with one data set of two configs, in the layout that the Hub keeps of all data sets."""
    files = {"default/train/0000.parquet": PAIRS[:1], "default/train/0001.parquet": PAIRS[1:], "default/test/0000.parquet": PAIRS[1:],
             "hard/train/0000.parquet": PAIRS[:1]}
    for file, rows in files.items():
        (tmp_path / "hub" / file).parent.mkdir(parents=True, exist_ok=True)
        write_parquet(tmp_path / "hub" / file, rows)
    asked = []

    class Api:
        def list_repo_files(self, repository, repo_type, revision):
            assert (repo_type, revision) == ("dataset", "refs/convert/parquet")
            if repository != "somebody/pairs":
                raise FileNotFoundError("404")
            return ["README.md", *files]

    def download(repository, file, repo_type, revision):
        asked.append(file)
        return str(tmp_path / "hub" / file)
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=Api, hf_hub_download=download))
    return asked


def test_a_data_set_of_the_hub(hub):
    assert load_records("hub:somebody/pairs", "preference") == PAIRS and hub == ["default/train/0000.parquet", "default/train/0001.parquet"]
    assert load_records("hub:somebody/pairs:default:test", "preference") == PAIRS[1:]
    assert load_records("hub:somebody/pairs::test", "preference") == PAIRS[1:]
    assert load_records("hub:somebody/pairs:hard", "preference") == PAIRS[:1]
    assert data_sha256("hub:somebody/pairs") != data_sha256("hub:somebody/pairs:hard") != data_sha256("hub:somebody/pairs::test")
    with pytest.raises(UserError, match="no such data set; the Hub has hub:somebody/pairs:default:test, hub:somebody/pairs:default:train"):
        local_files("hub:somebody/pairs:default:validation")
    with pytest.raises(UserError, match="the Hub did not give it .FileNotFoundError: 404"):
        local_files("hub:nobody/nothing")


# ---- --columns ------------------------------------------------------------------------------------------------------


def test_columns_have_other_names(tmp_path, capsys):
    assert column_names("prompt=question,chosen=good answer") == {"prompt": "question", "chosen": "good answer"}
    for bad in ("prompt", "prompt=", "=x", "prompt=a,prompt=b"):
        with pytest.raises(UserError, match="want OURS=THEIRS"):
            column_names(bad)
    swap = {"chosen": "rejected", "rejected": "chosen"}
    assert renamed(json.dumps(dict(prompt="p", chosen="a", rejected="b")).encode(), swap) == dict(prompt="p", chosen="b", rejected="a")
    assert renamed(dict(prompt="old", question="new"), {"prompt": "question"}) == dict(prompt="new")
    assert renamed(b"no json", swap) == b"no json" and renamed(dict(text="t"), swap) == dict(text="t")
    file = tmp_path / "a.csv"
    file.write_text("question,good,bad\nQ?, yes, no\n")
    assert load_records(file, "preference", columns="prompt=question,chosen=good,rejected=bad") == [
        dict(prompt="Q?", chosen=" yes", rejected=" no")]
    assert capsys.readouterr().err == ""
    load_records(file, "prompt", columns="prompt=question,answer=solution")
    assert capsys.readouterr().err == (
        f"{file}: no row has the column solution, which --columns names for answer\n"
        f"{file}: fields that are not read, but a reward function may take them: bad, good\n")


def test_a_wrong_name_is_said_where_the_run_stops(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("question,good,bad\nQ?, yes,\n")
    with pytest.raises(DataError, match=r"a.csv:2: no known record in the fields question, good, bad .*\(--columns gives them other"):
        load_records(file, "preference")
    with pytest.raises(DataError, match=r"no column questoin, which --columns names for prompt"):
        load_records(file, "preference", columns="prompt=questoin,chosen=good,rejected=bad")
    named = "prompt=question,chosen=good,rejected=bad"
    with pytest.raises(DataError, match="a.csv:2: empty rejected"):                    # an empty cell under our name
        load_records(file, "preference", columns=named)
    assert load_records(file, "completion", columns=named) == [dict(prompt="Q?", completion=" yes")]
    file.write_text("prompt,chosen,rejected\nQ?, a, b\n")
    assert load_records(file, "preference", columns="chosen=rejected,rejected=chosen") == [dict(prompt="Q?", chosen=" b", rejected=" a")]


def test_a_script_reads_csv_with_other_columns(base, tmp_path):
    """The same comparisons as JSON lines and as CSV with other names: the same weights."""
    rows = [dict(question=f"Number {i}?", good=" yes", bad=" no") for i in range(30)]
    (tmp_path / "a.csv").write_text("question,good,bad\n" + "".join(f"{r['question']},{r['good']},{r['bad']}\n" for r in rows))
    (tmp_path / "a.jsonl").write_text("".join(
        json.dumps(dict(prompt=r["question"], chosen=r["good"], rejected=r["bad"])) + "\n" for r in rows))
    for name, columns in (("a.csv", "prompt=question,chosen=good,rejected=bad"), ("a.jsonl", "")):
        train_dpo.train(train_dpo.Config(init=str(base), data=str(tmp_path / name), columns=columns, eval_fraction=0.2, max_steps=2,
                                         batch_size=4, eval_every=0, out=str(tmp_path / f"out {name}"), device="cpu"))
    a, b = ((tmp_path / f"out {name}" / "model.safetensors").read_bytes() for name in ("a.csv", "a.jsonl"))
    assert a == b


# ---- The preview ----------------------------------------------------------------------------------------------------


def test_the_preview_shows_tokens_masks_lengths_and_every_bad_row(base, tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    good = [dict(prompt=f"The film {i}", chosen=" is good.", rejected=" is bad.") for i in range(5)]
    bad = [dict(prompt="p", chosen="same", rejected="same")] * 2 + [dict(prompt="p", chosen="", rejected="x")]
    file.write_text("".join(json.dumps(r) + "\n" for r in bad + good))
    capsys.readouterr()
    data.preview(str(file), data.Options(init=str(base), show=2))
    out = capsys.readouterr().out
    assert out.count("\nrecord ") + out.startswith("record ") == 2
    assert "  prompt, not learned, 5 tokens: T|he| film| |0\n  chosen, learned, 4 tokens:  is| good|.|<|endoftext|>\n" in out
    assert "5 records; prompt + response in tokens: " in out and "0 of 10 are cut" in out
    assert f"2 bad rows: chosen equals rejected (the first: {file}:1)" in out
    assert f"1 bad row: empty chosen (the first: {file}:3)" in out
    data.preview(str(file), data.Options(init=str(base), kind="prompt", show=1))
    out = capsys.readouterr().out                                                      # nothing is learned of a prompt
    assert "  prompt, not learned, 1 tokens: p\n" in out and ", learned" not in out and "7 records" in out
