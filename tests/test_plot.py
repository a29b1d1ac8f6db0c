"""Tests of `python -m nanorlhf.plot`: which runs are one line and what its band is, what differs, and the page."""

import html
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from nanorlhf.files import read_jsonl, write_json, write_records
from nanorlhf.plot import curve, keys_of, lines_of, main, panels, read_log, report_page

LOSSES = [[3.0, 2.0, 1.0], [5.0, 2.5, 0.0], [1.0, 0.0, 8.0]]       # of three seeds at steps 1, 2, 3


def make_run(folder, losses=(1.0, 0.5), script="dpo", samples=(), inputs=None, data_sha256=None, **options):
    """Writes a run folder with a loss for each step."""
    options = dict(seed=0, lr=0.1, out=str(folder), resume=False, overwrite=False) | options
    write_json(folder / "run.json", dict(script=script, finished=True, options=options, inputs=inputs or {}, device="a CPU",
                                         data_sha256=data_sha256, commit="abc"))
    write_records(folder / "metrics.jsonl", [{"step": i, "time": 1.0, "loss": loss} for i, loss in enumerate(losses, 1)])
    write_records(folder / "samples.jsonl", samples)
    return folder


def plot(monkeypatch, capsys, *words):
    """Runs the command here; returns (what it printed, its error)."""
    monkeypatch.setattr(sys, "argv", ["plot", *map(str, words)])
    try:
        main()
        error = None
    except SystemExit as exit:
        error = exit.code
    return capsys.readouterr().out, error


class Reader(HTMLParser):
    """The page as a browser would take it apart: text of each section of a prompt, and all tags with their attributes."""

    def __init__(self, page):
        super().__init__()
        self.sections, self.tags, self.inside = [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self.sections.append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "section"

    def handle_data(self, data):
        if self.inside:
            self.sections[-1] += data


# ---- Lines and bands ------------------------------------------------------------------------------------------------


def test_runs_that_differ_in_the_seed_only_are_one_line_with_a_band(tmp_path):
    """Of the runs, one was resumed and one replaced another, which changes nothing."""
    flags = [dict(), dict(resume=True), dict(overwrite=True)]
    logs = [read_log(make_run(tmp_path / f"dpo_{k}", losses, seed=k, **flags[k])) for k, losses in enumerate(LOSSES)]
    logs.append(read_log(make_run(tmp_path / "other", [9.0], lr=0.2)))
    lines = lines_of(logs)
    assert {name: [log.folder.name for log in line] for name, line in lines.items()} == {
        "dpo_0": ["dpo_0", "dpo_1", "dpo_2"], "other": ["other"]}
    steps, mean, low, high, count = curve(lines["dpo_0"], "loss")
    assert steps == [1, 2, 3] and count == 3
    assert mean.tolist() == [3.0, 1.5, 3.0] and low.tolist() == [1.0, 0.0, 0.0] and high.tolist() == [5.0, 2.5, 8.0]


def test_the_picture_shows_the_mean_and_the_band(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    logs = [read_log(make_run(tmp_path / f"dpo_{k}", losses, seed=k)) for k, losses in enumerate(LOSSES)]
    curves, _ = panels(lines_of([*logs, read_log(make_run(tmp_path / "empty", [], lr=0.2))]), ["loss"])
    figure, axes = plt.subplots()
    curves["loss"](axes)
    line, = axes.get_lines()
    assert line.get_xydata().tolist() == [[1, 3.0], [2, 1.5], [3, 3.0]] and line.get_label() == "dpo_0, 3 seeds"
    corners = axes.collections[0].get_paths()[0].vertices
    for step, low, high in ((1, 1.0, 5.0), (2, 0.0, 2.5), (3, 0.0, 8.0)):
        ys = corners[corners[:, 0] == step, 1]
        assert (ys.min(), ys.max()) == (low, high)
    plt.close(figure)


def test_a_line_of_several_seeds_has_the_steps_that_all_of_them_have(tmp_path):
    """One run is behind; one has not logged a row, and counts once it has."""
    logs = [read_log(make_run(tmp_path / f"dpo_{k}", losses, seed=k)) for k, losses in enumerate(([1.0, 2.0, 3.0], [3.0, 4.0], []))]
    line, = lines_of(logs).values()
    assert len(line) == 3
    steps, mean, _, _, count = curve(line, "loss")
    assert steps == [1, 2] and mean.tolist() == [2.0, 3.0] and count == 2
    assert curve(line, "eval/kl")[0] == [] and curve(line, "eval/kl")[4] == 0


@pytest.mark.parametrize("change", [dict(seed=0), dict(lr=0.2), dict(script="ppo"), dict(data_sha256="other"), dict(data="other.jsonl"),
                                    dict(inputs={"init": "other"})], ids=str)
def test_other_runs_are_lines_of_their_own(tmp_path, change):
    """Also a second run of the same seed, and one whose data or models have the same path and another content."""
    same = dict(init="sft", data="pairs.jsonl", data_sha256="one", inputs={"init": "one"})
    first = read_log(make_run(tmp_path / "a", **same))
    assert len(lines_of([first, read_log(make_run(tmp_path / "b", **same | dict(seed=1)))])) == 1
    assert len(lines_of([first, read_log(make_run(tmp_path / "b", **same | dict(seed=1) | change))])) == 2


def test_the_folders_of_a_pipeline_with_several_seeds_are_one_line(tmp_path):
    """Their inputs are made by the same seed. The folder of seed 10 is not that of seed 1."""
    def log(seed, reads):
        return read_log(make_run(tmp_path / f"seed-{seed}" / "dpo", seed=seed, init=f"out/seed-{reads}/sft", inputs={"init": f"{seed}"}))
    assert list(lines_of([log(1, 1), log(10, 10)])) == ["dpo"]
    assert list(lines_of([log(1, 10), log(2, 20)])) == ["seed-1/dpo", "seed-2/dpo"]


def test_keys_are_chosen_by_name_or_pattern(tmp_path):
    make_run(tmp_path / "a")
    write_records(tmp_path / "a" / "metrics.jsonl", [{"step": 1, "lr": 1, "loss": 2, "eval/kl": 1, "eval/test/accuracy": 1, "eval/ece": 1}])
    logs = [read_log(tmp_path / "a")]
    assert keys_of(logs) == ["loss", "eval/kl", "eval/test/accuracy"]
    assert keys_of(logs, "eval/*,lr") == ["eval/kl", "eval/test/accuracy", "eval/ece", "lr"]


# ---- The command ----------------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_is_drawn_without_its_torn_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    run, bon = make_run(tmp_path / "a"), make_run(tmp_path / "bon", script="bon", lr=0.3)
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 3, "loss": 0.2')
    said, error = plot(monkeypatch, capsys, run, bon, "--out", tmp_path / "curves.png")
    assert error is None and said.startswith(f"{tmp_path}/curves.png: loss;")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [row["step"] for row in read_log(run).rows] == [1, 2]


def test_the_options_that_differ_are_listed(tmp_path, monkeypatch, capsys):
    """All but --out, --resume and --overwrite; an option that a run has not is -, and an empty text ''."""
    a = make_run(tmp_path / "a", data="x.jsonl", beta=0.5, note="", data_sha256="0123456789abcdef", resume=True)
    b = make_run(tmp_path / "b", data="x.jsonl", seed=1, note="y", data_sha256="fedcba9876543210", script="ppo")
    said, error = plot(monkeypatch, capsys, a, b, "--options")
    assert error is None and [line.split() for line in said.splitlines()] == [
        ["differs", "a", "b"], ["script", "dpo", "ppo"], ["data_sha256", "0123456789ab", "fedcba987654"], ["--seed", "0", "1"],
        ["--beta", "0.5", "-"], ["--note", "''", "y"]]
    assert len({line.rindex(line.split()[2]) for line in said.splitlines()}) == 1                  # a column


def test_without_matplotlib_one_line_says_so(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "a", samples=[{"step": 1, "prompt": "Why?", "completion": "So."}])
    monkeypatch.setitem(sys.modules, "matplotlib", None)                               # as if it were not installed
    said, error = plot(monkeypatch, capsys, run, "--out", tmp_path / "curves.png")
    assert said == "no plot: it needs the extra `plot` (pip install -e '.[plot]')\n" and error == 1
    assert not (tmp_path / "curves.png").exists()
    said, error = plot(monkeypatch, capsys, run, "--report", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert error is None and "<img" not in page and "matplotlib is missing" in page and Reader(page).sections == ["Why? \na, step 1 So."]


@pytest.mark.parametrize("words, message", [
    ([], "name a run folder or more"),
    (["a", "--options"], "name two run folders or more"),
    (["a", "nothing"], "nothing is no run: it holds no run.json"),
    (["runs"], "runs is no run"),
    (["runz"], "did you mean runs?"),
    (["evaluation"], "evaluation is no run"),
    (["damaged"], "run.json is damaged"),
    (["empty"], "have logged none of"),
    (["a", "--keys", "loss,gold"], "--keys gold: not in these runs, which have step, time, loss"),
    (["a", "--out", "a/metrics.jsonl"], "--out a/metrics.jsonl: must end in .png or .svg or .pdf"),
    (["a", "--report", "a/run.json"], "--report a/run.json: must end in .html"),
    (["evaluation", "runs", "--report", "r.html"], "runs is no run")], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_an_error_is_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a")
    make_run(tmp_path / "empty", [])
    (tmp_path / "runs").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text("{")
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "table.md").write_text("")
    before = (tmp_path / "a" / "metrics.jsonl").read_bytes()
    said, error = plot(monkeypatch, capsys, *words)
    assert error.startswith("error: ") and message in error and "\n" not in error and said == ""
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == before


# ---- The page -------------------------------------------------------------------------------------------------------
NASTY = '</script><b>"1 < 2" & \'x\'</b>\n\nHuman: <!-- {BODY} &amp;'


def make_evaluation(folder, texts):
    """Writes the folder of an evaluation. texts: {method: {prompt: completion}}."""
    folder.mkdir()
    (folder / "table.md").write_text("The judge is `gold`.\n\n| method | gold |\n|---|---:|\n| <i> | 0.50 ± 0.10 |\n\n- gold: a mean\n")
    write_json(folder / "table.json", [])
    write_records(folder / "samples.jsonl", [dict(method=method, split="test", prompt=prompt, completion=text, gold=0.5)
                                             for method, found in texts.items() for prompt, text in found.items()])
    return folder


def test_the_page_shows_what_every_method_wrote_for_a_prompt_once(tmp_path):
    """A run's is its last, a method's of an evaluation its first. Best-of-n has its own file."""
    asked = ["What is up?", "And down?"]
    texts = {m: {p: f" {m} says {p[:3]}" for p in asked} for m in ("SFT", "PPO", "<b>DPO</b>")}
    table = make_evaluation(tmp_path / "table", texts)
    write_records(table / "samples.jsonl", [*read_jsonl(table / "samples.jsonl"),
                                            dict(method="PPO", prompt=asked[0], completion="of another seed")])
    steps = [{"step": s, "prompt": asked[1], "completion": f"sampled at {s}", "gold": -0.25} for s in (1, 2)]
    runs = [make_run(tmp_path / "ppo", samples=steps), make_run(tmp_path / "ppo_1", seed=1, samples=steps),
            make_run(tmp_path / "best", script="bon")]
    write_records(tmp_path / "best" / "best.jsonl", [{"prompt": asked[1], "completion": "the best", "score": 1.5}])
    page = Reader(report_page([table, *runs], plots=False))
    first, second = page.sections                                                      # the one that most answered comes first
    for method, found in texts.items():
        for part, prompt in ((first, asked[1]), (second, asked[0])):
            assert part.count(prompt) == 1 and part.count(method + " gold 0.50") == 1 and part.count(found[prompt].strip()) == 1
    assert first.count("sampled at 2") == 1 and "sampled at 1" not in first and first.count("ppo, step 2 gold -0.25") == 1
    assert first.count("best score 1.50the best") == 1 and "ppo_1" not in first and "another seed" not in second
    assert len(Reader(report_page([table, *runs], plots=False, of_runs=False)).sections[0]) < len(first)


def test_texts_of_prompts_and_methods_are_only_text(tmp_path):
    """They cannot end the script or add a tag; a browser shows them as they are, with their line breaks."""
    table = make_evaluation(tmp_path / "table", {"<img src=x>": {NASTY: f"said: {NASTY}"}})
    run = make_run(tmp_path / "<u>&", samples=[{"step": 1, "prompt": "plain", "completion": NASTY}])
    page = report_page([table, run], plots=False)
    plain = Reader(report_page([make_evaluation(tmp_path / "plain", {"a": {"b": "c"}}),
                                make_run(tmp_path / "v", samples=[{"step": 1, "prompt": "d", "completion": "e"}])], plots=False))
    read = Reader(page)
    assert [tag for tag, _ in read.tags] == [tag for tag, _ in plain.tags]             # not one more
    assert NASTY not in page and html.escape(NASTY) in page and page.count("</script>") == 1
    nasty, other = read.sections
    assert nasty.startswith(NASTY) and f"said: {NASTY}" in nasty and "<img src=x>" in nasty
    assert NASTY in other and "<u>&, step 1" in other and ".text { white-space: pre-wrap }" in page


def test_the_page_has_the_tables_and_needs_nothing_else(tmp_path):
    table = make_evaluation(tmp_path / "table", {"PPO": {"a": "b"}})
    runs = [make_run(tmp_path / f"dpo_{k}", losses[:3 - k], seed=k) for k, losses in enumerate(LOSSES[:2])]
    page = report_page([table, *runs], plots=False)
    assert "<p>The judge is <code>gold</code>.</p>" in page and "<li> gold: a mean</li>" in page
    assert "<th>method</th><th>gold</th>" in page and "<td>&lt;i&gt;</td><td>0.50 ± 0.10</td>" in page and "---" not in page
    row = re.search(r"<tr><td>dpo_0</td>(.*?)</tr>", page)[1]
    assert re.findall("<td>(.*?)</td>", row) == ["dpo", "0, 1", "2 to 3", "yes", format(np.mean([1.0, 2.5]), ".4g")]
    for tag, attributes in Reader(page).tags:
        assert tag not in ("link", "iframe", "object", "base") and attributes.get("href", "#").startswith("#")
        assert attributes.get("src", "data:").startswith("data:")
    assert "http" not in page and "@import" not in page and "url(" not in page


def test_the_pictures_are_in_the_page(tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    page = report_page([make_run(tmp_path / "a")], draws={'"of <mine>': lambda axes: axes.plot([1, 2])})
    pictures = [attributes for tag, attributes in Reader(page).tags if tag == "img"]
    assert [p["alt"] for p in pictures] == ['"of <mine>', "loss"]
    assert all(p["src"].startswith("data:image/svg+xml;base64,") and len(p["src"]) > 1000 for p in pictures)
