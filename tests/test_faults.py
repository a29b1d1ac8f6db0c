"""Tests with damaged and hostile files: whatever is done to one, the answer is a result or one line, soon, and never a traceback.

    python tests/test_faults.py [--times 400] > results/faults/files.md

Every trial changes one file at random: a flipped bit, a cut, inserted bytes, or in JSON a value replaced, removed or nested. The
seeds are fixed, so a failure comes again.
"""

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest

TIMES, SECONDS = 12, 20
HOSTILE = [None, True, -1, 0, 10**400, 1e308, 5e-324, "", "x" * 5000, "\ud800", "\x00", "../../../etc/passwd", "/dev/zero", [], {}, [[]],
           {"": ""}, "(a+)+$", "(?:a|aa)+$", "[", "{{ 0 }}", "{% for i in range(10**9) %}x{% endfor %}", [1] * 100, {"a": {"a": {"a": 1}}}]


def changed_json(value, rng):
    """Returns the value with one node replaced, removed or doubled."""
    value, node = json.loads(json.dumps(value)), None
    path = []
    node = value
    while isinstance(node, (dict, list)) and node and (not path or rng.random() < 0.8):
        path.append((node, rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))))
        node = path[-1][0][path[-1][1]]
    if not path:
        return rng.choice(HOSTILE)
    holder, key = path[-1]
    how = rng.random()
    if how < 0.7:
        holder[key] = rng.choice(HOSTILE)
    elif how < 0.85:
        del holder[key]
    elif isinstance(holder, list):
        holder.append(holder[key])
    else:
        holder[str(key) + "_"] = holder[key]
    return value


def damaged(content, rng, is_json):
    """Returns the bytes of a file after one change."""
    how = rng.random()
    if is_json and how < 0.6:
        lines = content.decode().splitlines() if is_json == "lines" else [content.decode()]
        i = rng.randrange(len(lines))
        lines[i] = json.dumps(changed_json(json.loads(lines[i]), rng))
        return "\n".join(lines).encode()
    at = rng.randrange(len(content))
    if how < 0.65:
        return content[:at] + b"[" * 200000 + content[at:]
    if how < 0.75:
        return content[:at]
    if how < 0.85:
        return content[:at] + rng.randbytes(rng.randint(1, 9)) + content[at:]
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1:]


def write_inputs(folder):
    """Writes a checkpoint in two shards, its tokenizer with a chat template, an unfinished run with a checkpoint, and records."""
    import torch

    import train_sft
    from conftest import shard
    from nanorlhf.files import write_records
    from nanorlhf.model import Transformer
    from nanorlhf.tokenizer import load_tokenizer

    torch.set_num_threads(1)
    run = folder / "run"
    train_sft.train(train_sft.Config(init="scratch", kind="text", limit=40, width=16, layers=1, heads=2, context=96, max_steps=2,
                                     batch_size=4, save_every=2, out=str(run), device="cpu"))
    state = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(dict(state, finished=False)))
    model = folder / "model"
    Transformer.from_pretrained(run).save_pretrained(model)
    load_tokenizer(run).save(model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}assistant:"
    (model / "tokenizer_config.json").write_text(json.dumps(dict(config, chat_template=template)))
    shard(model)
    talk = [{"role": "user", "content": "Hello"}]
    kinds = {"completion": {"prompt": "What is 3 + 4?", "completion": " It is 7."},
             "preference": {"prompt": talk, "chosen": "Yes.", "rejected": "No.", "group": "a"},
             "ranked": {"prompt": "Which?", "responses": [" One.", " Two."], "scores": [0.5, 1]},
             "prompt": {"prompt": talk, "answer": 7}, "text": {"text": "Once upon a time."}}
    for kind, row in kinds.items():
        write_records(folder / f"{kind}.jsonl", [row] * 3)


def read_model(folder):
    from nanorlhf.data import encode_prompt
    from nanorlhf.model import Transformer, check_fit
    from nanorlhf.tokenizer import load_tokenizer
    tokenizer, model = load_tokenizer(folder / "model"), Transformer.from_pretrained(folder / "model")
    check_fit(model, tokenizer)
    tokenizer.decode(tokenizer.encode("The style was superb, isn't it? 12 aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!"))
    [record] = read_records(folder, "prompt")[:1]
    encode_prompt(tokenizer, record["prompt"])


def resume_run(folder):
    import train_sft
    from nanorlhf.options import parse_options
    train_sft.train(parse_options(train_sft.Config, "", ["--out", str(folder / "run"), "--resume"]))


def read_records(folder, kind):
    from nanorlhf.data import load_records
    return load_records(str(folder / f"{kind}.jsonl"), kind)


TARGETS = {                          # file: what reads it
    "model/config.json": read_model, "model/model.safetensors.index.json": read_model,
    "model/model-00001-of-00002.safetensors": read_model, "model/tokenizer.json": read_model,
    "model/tokenizer_config.json": read_model, "run/run.json": resume_run,
    "run/checkpoints/step-0000002/state.json": resume_run, "run/checkpoints/step-0000002/model.safetensors": resume_run,
    "run/checkpoints/step-0000002/optimizer.safetensors": resume_run,
    **{f"{kind}.jsonl": lambda folder, kind=kind: read_records(folder, kind)
       for kind in ("completion", "preference", "ranked", "prompt", "text")}}


def trial(folder, target, number):
    """Damages the file and reads it. Returns "read", "refused" or what went wrong; the folder is as before."""
    from nanorlhf.errors import UserError
    rng, file = random.Random(f"{target} {number}"), folder / target
    content = file.read_bytes()
    kind = "lines" if file.suffix == ".jsonl" else file.suffix == ".json"
    file.write_bytes(damaged(content, rng, kind))

    def late(*_):
        raise TimeoutError
    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    whole = {p: p.read_bytes() for p in (folder / "run").rglob("*") if p.is_file() and p != file}
    try:
        TARGETS[target](folder)
        return "read"
    except (UserError, SystemExit) as error:
        return "refused" if "\n" not in str(error) else f"two lines: {error!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
        file.write_bytes(content)
        if target.startswith("run/"):
            for path in [p for p in (folder / "run").rglob("*") if p.is_file() and p != file and p not in whole]:
                path.unlink()
            for path, was in whole.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(was)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    write_inputs(folder)
    return folder


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="POSIX signals")
@pytest.mark.parametrize("target", TARGETS)
def test_a_damaged_or_hostile_file_gives_a_result_or_one_line(inputs, target, capsys):
    found = {number: trial(inputs, target, number) for number in range(TIMES)}
    wrong = {number: answer for number, answer in found.items() if answer not in ("read", "refused")}
    assert not wrong and "refused" in found.values()


def main(times):
    import tempfile
    folder = Path(tempfile.mkdtemp())
    stdout, sys.stdout = sys.stdout, open(os.devnull, "w")
    write_inputs(folder)
    rows = []
    for target in TARGETS:
        answers = [trial(folder, target, number) for number in range(times)]
        wrong = [f"{i}: {a}" for i, a in enumerate(answers) if a not in ("read", "refused")]
        rows.append((target, times, answers.count("refused"), answers.count("read"), len(wrong)))
        for line in wrong[:20]:
            print(target, line, file=sys.stderr, flush=True)
    sys.stdout = stdout
    print("| file | damaged | refused in one line | read all the same | anything else |\n|---|---:|---:|---:|---:|")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main(int(sys.argv[sys.argv.index("--times") + 1]) if "--times" in sys.argv else 400)
