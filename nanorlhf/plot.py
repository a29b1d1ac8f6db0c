"""Curves of runs over each other, the options in which they differ, and one page with tables, curves and samples.

    python -m nanorlhf.plot RUN [RUN...]                         draws curves.png from each metrics.jsonl
    python -m nanorlhf.plot RUN RUN [RUN...] --options           prints in what the runs differ
    python -m nanorlhf.plot RUN [RUN...] --report report.html    writes one page, which needs no server and no network

A run may still be going on. Runs that differ in --seed and --out only are one line: the mean over the steps that all of them have
logged, with a band from the lowest to the highest. In a path, seed-N counts as the same if N is the run's own seed. Of
sample_bon.py a step is a prompt. For the page, a RUN may also be a folder with the table of an evaluation or of the pipeline.
"""

import base64
import collections
import dataclasses
import fnmatch
import functools
import html
import io
import itertools
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanorlhf.errors import UserError
from nanorlhf.files import atomic_write, read_jsonl, similar, write_text
from nanorlhf.options import HOW_TO_BEGIN, leading_words, one_line_errors, parse_options, read_run

KEYS = ("loss", "eval/loss", "eval/gold", "eval/reward", "eval/eval_reward", "objective/scores", "scores/mean", "scores/best",
        "eval/kl", "objective/kl", "accuracy", "rewards/accuracies", "eval/accuracy", "eval/*/accuracy", "eval/length",
        "objective/length")          # a * stands for any text


@dataclasses.dataclass
class Options:
    out: str = "curves.png"          # picture: .png, .svg or .pdf
    keys: str = ""                   # names in metrics.jsonl, comma-separated; * stands for any text; '' = a choice
    options: bool = False            # print in what the runs differ, instead
    report: str = ""                 # write this page, .html, instead


class Log(NamedTuple):
    folder: Path
    info: dict                       # run.json
    rows: list                       # metrics.jsonl


def read_log(folder):
    """Returns the Log of a run folder; UserError if it is none."""
    folder = Path(folder)
    if not (folder / "run.json").exists():
        raise UserError(f"{folder} is no run: it holds no run.json{similar(folder)}")
    return Log(folder, read_run(folder), read_jsonl(folder / "metrics.jsonl"))


def names_of(logs):
    """Returns a name for each: the shortest end of its path that no other path has."""
    paths = [log.folder.resolve().parts for log in logs]
    ends = [[path[-n:] for path in paths] for n in range(1, max(map(len, paths)) + 1)]
    return ["/".join(next((end[i] for end in ends if end.count(end[i]) == 1), paths[i])) for i in range(len(paths))]


def lines_of(logs):
    """Returns {name: [Log of each seed]}. Two runs with the same seed are never one line."""
    lines, count = {}, collections.Counter()
    for log in logs:
        options, content = log.info["options"], {**(log.info.get("inputs") or {}), "data": log.info.get("data_sha256")}
        seed = options.get("seed")
        same = {k: re.sub(rf"\bseed-{seed}\b", "seed-N", str(v)) for k, v in options.items() if k not in ("seed", *HOW_TO_BEGIN)}
        content = {k: v for k, v in content.items() if "seed-N" not in same.get(k, "")}
        line = json.dumps([log.info.get("script"), same, content], sort_keys=True)
        count[line, seed] += 1
        lines.setdefault((line, count[line, seed]), []).append(log)
    return dict(zip(names_of([line[0] for line in lines.values()]), lines.values()))


def curve(logs, key):
    """Returns (steps, mean, lowest, highest, number of runs) of the runs with this key, at the steps that all of them have."""
    found = [values for log in logs if (values := {row["step"]: row[key] for row in log.rows if key in row})]
    steps = sorted(set.intersection(*map(set, found))) if found else []
    values = np.array([[run[step] for step in steps] for run in found]) if steps else np.empty((1, 0))
    return steps, values.mean(0), values.min(0), values.max(0), len(found)


def keys_of(logs, asked=""):
    """Returns the names in metrics.jsonl to show, of those that the runs have."""
    there = list(dict.fromkeys(key for log in logs for row in log.rows for key in row))
    found = {p: fnmatch.filter(there, p) for p in (asked.split(",") if asked else KEYS)}
    if missing := [pattern for pattern, keys in found.items() if asked and not keys]:
        raise UserError(f"--keys {missing[0]}: not in these runs, which have {', '.join(there) or 'logged nothing yet'}")
    return list(dict.fromkeys(itertools.chain(*found.values())))


def differences(logs):
    """Returns {what: [text of each run]}: all in run.json that differs, but for --out; "-" where a run has no such entry."""
    found = []
    for log in logs:
        entries = {k: v for k, v in log.info.items() if k not in ("options", "inputs", "finished")}
        entries |= {f"content of --{k}": v[:12] for k, v in (log.info.get("inputs") or {}).items()}
        entries |= {f"--{k}": v for k, v in log.info["options"].items() if k not in HOW_TO_BEGIN}
        found.append({k: str(v)[:12 if k == "data_sha256" else None] or "''" for k, v in entries.items()})
    table = {k: [entries.get(k, "-") for entries in found] for k in dict.fromkeys(itertools.chain(*found))}
    return {k: values for k, values in table.items() if len(set(values)) > 1}


def can_plot():
    """True if matplotlib is there; else says how to get it."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: it needs the extra `plot` (pip install -e '.[plot]')")
        return False
    matplotlib.use("Agg")                                                              # without a display
    return True


def picture(draws, kind, size=(8, 5)):
    """Returns a file with axes of this size in inches, three in a row, each drawn by draw(axes). kind: png, svg or pdf."""
    import matplotlib.pyplot as plt
    columns, file = min(3, len(draws)), io.BytesIO()
    rows = -(-len(draws) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False, layout="constrained")
    for draw, axes in itertools.zip_longest(draws, grid.flat):
        draw(axes) if draw else axes.set_axis_off()
    figure.savefig(file, format=kind, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return file.getvalue()


def save_plot(draws, file, size=(8, 5)):
    """Saves a picture; see there."""
    with atomic_write(file) as temporary:
        temporary.write_bytes(picture(draws, Path(file).suffix[1:], size))


def panels(lines, keys):
    """Returns ({key: function of axes that draws it for all runs that have it}, size in inches with room for the legend).
    lines: as lines_of returns them."""
    columns = max(1, min(3, 48 // (max(map(len, lines), default=0) + 9)))

    def draw(key, axes):
        for i, (name, logs) in enumerate(lines.items()):
            steps, mean, low, high, count = curve(logs, key)
            if steps:
                style = dict(linestyle=("-", "--", ":", "-.")[i // 10 % 4], marker="." if len(steps) < 20 else "", linewidth=1)
                axes.plot(steps, mean, color=f"C{i % 10}", label=name + f", {count} seeds" * (count > 1), **style)
                axes.fill_between(steps, low, high, color=f"C{i % 10}", alpha=0.2, linewidth=0)
        axes.set_title(key, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=7, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)
    return {key: functools.partial(draw, key) for key in keys}, (4.4, 2.7 + 0.15 * -(-len(lines) // columns))


def html_table(head, *rows):
    """head, rows: lists of HTML."""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    head = "".join(f"<th>{cell}</th>" for cell in head)
    return f"<div class=scroll tabindex=0><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def html_of(markdown):
    """Returns a table.md as HTML: its headings, tables, lists and paragraphs."""
    parts, lines = [], [re.sub("`(.+?)`", r"<code>\1</code>", html.escape(line)) for line in markdown.splitlines()]
    for kind, block in itertools.groupby(lines, lambda line: line[:1] if line[:1] in "|-" else "text"):
        if kind == "|":
            head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block)
            parts.append(html_table(head, *rows))
        elif kind == "-":
            items = "".join(f"<li>{line[1:]}</li>" for line in block)
            parts.append(f"<details><summary>What the columns mean</summary><ul>{items}</ul></details>")
        elif kind:
            parts += [f"<p>{line.lstrip('# ')}</p>" for line in block]
    return "\n".join(parts)


def html_of_runs(lines, keys):
    """Returns a table of the runs, with the last value of each key; of several seeds the mean."""
    rows = []
    for name, logs in lines.items():
        steps = sorted(log.rows[-1]["step"] if log.rows else 0 for log in logs)
        last = [[next((row[key] for row in reversed(log.rows) if key in row), None) for log in logs] for key in keys]
        rows.append([name, logs[0].info.get("script", "-"), ", ".join(str(log.info["options"].get("seed", "-")) for log in logs),
                     " to ".join(map(str, dict.fromkeys([steps[0], steps[-1]]))),
                     "yes" if all(log.info.get("finished") for log in logs) else "no",
                     *("-" if None in values else format(np.mean(values), ".4g") for values in last)])
    return html_table(*(map(html.escape, row) for row in [["run", "script", "seeds", "steps", "finished", *keys], *rows]))


def samples_of(lines, evaluations):
    """Returns {prompt: {method: record}}, first the prompts that most methods answered. A record is the first that the method has
    in an evaluation, or the last of a run; of several seeds, of the first one's."""
    records, found = [(r.get("method"), r) for folder in evaluations for r in read_jsonl(folder / "samples.jsonl")], {}
    for name, (log, *_) in lines.items():
        file = "best.jsonl" if log.info.get("script") == "bon" else "samples.jsonl"
        last = {record.get("prompt"): record for record in read_jsonl(log.folder / file)}
        records += [(f"{name}, step {r['step']}" if "step" in r else name, r) for r in last.values()]
    for method, record in records:
        if {"prompt", "completion"} <= record.keys():
            found.setdefault(record["prompt"], {}).setdefault(method, record)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def html_of_sample(method, record):
    scores = ", ".join(f"{k} {v:.2f}" for k, v in record.items() if isinstance(v, float))
    return (f"<div class=card><b>{html.escape(str(method))}</b> <small>{html.escape(scores)}</small>"
            f"<div class=text>{html.escape(record['completion'].strip())}</div></div>")


PAGE = """<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1"><title>Report</title>
<style>
:root { color-scheme: light dark; --back: #fff; --card: #f3f4f6; --text: #1b1f24; --faint: #57606a; --line: #d0d7de }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171b; --card: #20252b; --text: #e6e8eb; --faint: #a0a8b1; --line: #3a424b } }
body { margin: 0 auto; padding: 0 16px 48px; max-width: 1600px; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
a { color: inherit; margin-right: 1em } h3 { font-size: 16px; margin: 24px 0 8px } .text { white-space: pre-wrap }
small { color: var(--faint); font-size: 14px; font-weight: normal }
.scroll { overflow-x: auto; margin: 12px 0 } table { border-collapse: collapse; font-size: 14px; white-space: nowrap }
th, td { padding: 4px 10px; border-bottom: 1px solid var(--line); text-align: right }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--back) }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--width)), 1fr)); gap: 8px }
img { width: 100%; background: #fff; border-radius: 6px } .card { background: var(--card); border-radius: 6px; padding: 8px 12px }
.find { position: sticky; top: 0; z-index: 1; background: var(--back); padding: 8px 0 }
input { font: inherit; box-sizing: border-box; width: min(100%, 400px); padding: 6px 10px; margin-right: 1em }
.prompt { content-visibility: auto; contain-intrinsic-size: auto 300px } .prompt[hidden] { display: none }
</style>
BODY
<script>
const box = document.querySelector("input"), plain = text => text.toLowerCase().replace(/\\s+/g, " ");
const prompts = [...document.querySelectorAll(".prompt")].map(part => [part, plain(part.textContent)]);
(box.oninput = () => {
  for (const [part, text] of prompts) part.hidden = !text.includes(plain(box.value.trim()));
  const shown = prompts.filter(([part]) => !part.hidden).length;
  document.querySelector("output").textContent = `${shown} of ${prompts.length} prompts`;
})();
</script>
"""


def report_page(folders, keys="", plots=None, draws=(), of_runs=True):
    """Returns the page. folders: of runs and evaluations; plots: whether there is matplotlib (None: found out here); draws:
    {title: function of axes} of more pictures; of_runs: whether it shows the runs' own samples, beside those of the
    evaluations."""
    evaluations = [Path(folder) for folder in folders if (Path(folder) / "table.md").exists()]
    logs = [read_log(folder) for folder in folders if Path(folder) not in evaluations]
    lines, shown = lines_of(logs), keys_of(logs, keys)
    plots = can_plot() if plots is None else plots
    parts = ["<h1>Report</h1><nav><a href=#tables>Tables</a><a href=#curves>Curves</a><a href=#samples>Samples</a></nav>",
             "<h2 id=tables>Tables</h2>", *(html_of((folder / "table.md").read_text(encoding="utf-8")) for folder in evaluations)]
    if logs:
        parts.append(f"<p>The last values of each run; of several seeds their mean.</p>\n{html_of_runs(lines, shown)}")
    about = ("Of several seeds a line is the mean, and its band reaches from the lowest to the highest." if plots else
             "Not drawn, for matplotlib is missing.")
    parts.append(f'<h2 id=curves>Curves</h2>\n<p>{about}</p>\n<div class=grid style="--width: 400px">')
    curves, size = panels(lines, shown)
    for title, draw in (dict(draws) | curves).items() if plots else ():
        image = base64.b64encode(picture([draw], "svg", size if title in curves else (6, 4))).decode()
        parts.append(f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{image}">')
    parts.append('</div>\n<h2 id=samples>Samples</h2>\n'
                 '<div class=find><input type=search placeholder="Find in prompts and answers"><output></output></div>')
    for prompt, answers in samples_of(lines if of_runs else {}, evaluations).items():
        split = html.escape(next(iter(answers.values())).get("split", ""))
        parts.append(f"<section class=prompt><h3 class=text>{html.escape(prompt)} <small>{split}</small></h3>\n<div class=grid "
                     f'style="--width: 230px">{"".join(map(html_of_sample, answers, answers.values()))}</div></section>')
    return PAGE.replace("BODY", "\n".join(parts), 1)


def main():
    words = leading_words()
    o = parse_options(Options, __doc__, sys.argv[1 + len(words):], prog="python -m nanorlhf.plot RUN [RUN ...]")
    folders = list(dict.fromkeys(map(Path, words)))
    with one_line_errors(o, lambda: "give the same command again"):
        if len(folders) < 1 + o.options:
            raise UserError(f"name {'two run folders' if o.options else 'a run folder'} or more, before the options")
        for option, file, kinds in (("out", o.out, (".png", ".svg", ".pdf")), ("report", o.report or ".html", (".html",))):
            if not file.endswith(kinds):                                               # so no file of a run is replaced
                raise UserError(f"--{option} {file}: must end in {' or '.join(kinds)}")
        if o.report:
            write_text(o.report, report_page(folders, o.keys))
            print(o.report)
            return
        logs = [read_log(folder) for folder in folders]
        if o.options:
            rows = [["differs", *names_of(logs)], *([what, *values] for what, values in differences(logs).items())]
            widths = [max(map(len, column)) for column in zip(*rows)]
            print("\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows))
            return
        if not (keys := keys_of(logs, o.keys)):
            raise UserError(f"these runs have logged none of {', '.join(KEYS)}: --keys names others")
        if not can_plot():
            raise SystemExit(1)
        curves, size = panels(lines_of(logs), keys)
        save_plot(curves.values(), o.out, size)
        print(f"{o.out}: {', '.join(keys)}; of several seeds the mean, and a band from the lowest to the highest")


if __name__ == "__main__":
    main()
