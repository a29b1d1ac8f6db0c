"""Tests of a user's reward function: it gets the columns of the data by name, in every script that uses a reward."""

import json
import re
import sys

import pytest
import torch

import sample_bon
import train_ppo
import train_rrhf
from nanorlhf.data import load_records
from nanorlhf.errors import UserError
from nanorlhf.evaluate import Options, evaluate_policies
from nanorlhf.files import read_jsonl
from nanorlhf.model import ModelConfig, Transformer
from nanorlhf.options import main
from nanorlhf.rewards import load_reward
from nanorlhf.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

# The most common reward of this kind: is the last number of the completion the row's answer? It also checks that every row
# comes with its own prompt.
MATH = """
import re

def correct(prompts, completions, answer, **kwargs):
    assert len(prompts) == len(completions) == len(answer) == len(kwargs["level"]) and "answer" not in kwargs
    for prompt, right, level in zip(prompts, answer, kwargs["level"]):
        a, b = map(int, re.findall(r"[0-9]+", prompt)[-2:])
        assert (a + b, a % 3) == (right, level), (prompt, right, level)
    numbers = [re.findall(r"[0-9]+", c) for c in completions]
    return [float(found[-1:] == [str(right)]) for found, right in zip(numbers, answer)]
"""


def sums(kind):
    """Returns rows of additions with their answers, as strings or conversations; some questions occur twice."""
    rows = []
    for a in (3, 14, 15, 9, 3):
        for b in (26, 5):
            question = f"What is {a} + {b}?"
            prompt = question if kind == "text" else [{"role": "user", "content": question}]
            rows.append({"prompt": prompt, "answer": a + b, "level": a % 3, "completion": f" It is {a + b}."})
            if kind == "messages":
                rows[-1]["completion"] = [{"role": "assistant", "content": f"It is {a + b}."}]
    return rows


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("base"), load_tokenizer("reviews")
    Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, context=96, width=16, layers=1, heads=2, kv_heads=2, head_dim=8,
                            ffn=32, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)).save_pretrained(folder)
    tokenizer.save(folder)
    return str(folder)


@pytest.fixture(params=["text", "messages"])
def task(request, base, tmp_path):
    """Writes the data and the reward function; returns (options that all scripts share, rows of the data)."""
    rows = sums(request.param)
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "mine.py").write_text(MATH)
    return dict(init=base, data=str(tmp_path / "sums.jsonl"), reward=f"{tmp_path}/mine.py:correct", device="cpu",
                response_length=4), rows


def test_ppo_and_rrhf_pass_each_row_with_its_prompt_in_training_and_evaluation(task, tmp_path):
    shared, _ = task
    more = dict(shared, eval_prompts=shared["data"], eval_reward=shared["reward"], max_steps=2, batch_size=4, eval_every=1)
    train_ppo.train(train_ppo.Config(**more, out=str(tmp_path / "ppo")))
    train_rrhf.train(train_rrhf.Config(**more, out=str(tmp_path / "rrhf"), num_samples=2))
    candidates = read_jsonl(tmp_path / "rrhf" / "candidates-000000.jsonl")
    assert all(c["scores"][-1] == 1.0 for c in candidates)                             # the data's own completion is right
    rows = read_jsonl(tmp_path / "ppo" / "metrics.jsonl")
    assert rows[-1].keys() >= {"eval/reward", "eval/eval_reward"}


def test_best_of_n_and_evaluation_pass_each_row_with_its_prompt_and_keep_other_columns(task, tmp_path):
    shared, rows = task
    sample_bon.sample(sample_bon.Config(**shared, out=str(tmp_path / "bon"), n=3, label_temperature=0.0, keep_unfinished=True))
    for name in ("best", "ranked", "comparisons"):
        written = read_jsonl(tmp_path / "bon" / f"{name}.jsonl")
        assert written and all(r.keys() >= {"prompt", "answer", "level"} for r in written)
    assert [r["answer"] for r in read_jsonl(tmp_path / "bon" / "best.jsonl")] == [r["answer"] for r in rows]
    train_rrhf.train(train_rrhf.Config(**shared | dict(data=str(tmp_path / "bon" / "ranked.jsonl")), kind="ranked",
                                       out=str(tmp_path / "rrhf"), sampling="none", max_steps=1, batch_size=4))
    table, _ = evaluate_policies({"again": shared["init"] + "/."}, Options(
        reference=shared["init"], reward=shared["reward"], data=f"sums={shared['data']}", bon=2, num_prompts=8,
        diversity_prompts=2, num_samples=2, response_length=4, device="cpu"))
    assert table[0]["win_reference"][0] < 0.1                                          # the data's own answers are right


def test_a_missing_column_gives_a_one_line_error_that_lists_the_columns(task, tmp_path, monkeypatch):
    shared, rows = task
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps({k: v for k, v in r.items() if k != "answer"}) + "\n" for r in rows))
    says = "needs a column 'answer'; .*bare.jsonl has prompt, level, completion"
    for module in (train_ppo, train_rrhf, sample_bon):
        words = [w for k, v in (shared | dict(data=str(tmp_path / "bare.jsonl"))).items() for w in (f"--{k}", str(v))]
        monkeypatch.setattr(sys, "argv", [module.__name__, *words, "--out", str(tmp_path / "x")])
        with pytest.raises(SystemExit) as stop:
            main(module.Config, getattr(module, "train", None) or module.sample, "")
        assert re.search(says, stop.value.code) and "\n" not in stop.value.code and not (tmp_path / "x").exists()
    with pytest.raises(UserError, match=says):                                         # prompts used only in evaluation
        train_ppo.train(train_ppo.Config(**shared, eval_prompts=str(tmp_path / "bare.jsonl"), out=str(tmp_path / "x")))
    with pytest.raises(UserError, match=says):
        evaluate_policies({}, Options(reference=shared["init"], reward=shared["reward"], data=str(tmp_path / "bare.jsonl"),
                                      response_length=4, device="cpu"))
    assert not (tmp_path / "x").exists()


FORMS = {  # {source of a function f: what it must return for two rows}
    "def f(prompts, completions): return [len(c) for c in completions]": [3, 4],
    "def f(p, c): return [len(x) for x in p]": [1, 2],
    "def f(completions, **kwargs): return [len(c) + a for c, a in zip(completions, kwargs['answer'])]": [13, 24],
    "def f(completions, prompts): return [len(c) - len(p) for c, p in zip(completions, prompts)]": [2, 2],
    "def f(prompts, completions, answer): return answer": [10, 20],
    "def f(prompts, completions, answer=None, missing=7): return [a + missing for a in answer]": [17, 27],
    "def f(prompts, answer, completions): return [a + len(c) for a, c in zip(answer, completions)]": [13, 24],
    "def f(*, completions, answer): return [len(c) + a for c, a in zip(completions, answer)]": [13, 24],
    "def f(**kwargs): return [len(p) + a for p, a in zip(kwargs['prompts'], kwargs['answer'])]": [11, 22],
    "def f(*args): return [len(c) for c in args[1]]": [3, 4],
    "def g(p, c): return [len(x) for x in c]\ndef f(*args, **kwargs): return g(*args, **kwargs)": [3, 4],       # a wrapper
    "import torch\nclass F(torch.nn.Module):\n    def forward(self, p, c): return torch.ones(len(c))\nf = F()": [1, 1],
    "def f(prompts, completion_ids, **kwargs): return [len(i) + a for i, a in zip(completion_ids, kwargs['answer'])]": [14, 24],
    "def f(completion_ids, answer, **kwargs): return [a + (i[-1] == 638) for i, a in zip(completion_ids, answer)]": [11, 20],
    "def f(prompts, **kwargs): return [len(p) + len(c) for p, c in zip(prompts, kwargs['completions'])]": [4, 6],
    "def f(prompts, completions, completion_ids): return [len(i) for i in completion_ids]": [4, 4],
    "def f(completions, prompts, /): return [len(c) for c in completions]": [1, 2],      # by position: the names do not count
    "import functools\nf = functools.partial(lambda p, c, answer: [answer] * 2, answer=3)": [3, 3],
    "class F:\n    def __call__(self, p, c, **kwargs): return [len(kwargs)] * 2\nf = F()": [4, 4],
    "def f(prompts, completions, prompt): return [len(p) for p in prompt]": [1, 2],      # the column named prompt
    "def f(prompts, completions, rare): return [r or 5 for r in rare]": [5, 8],         # None where a row lacks it
    "import functools\ndef g(scale, prompts, completions): return [scale] * 2\nf = functools.partial(g, 3)": [3, 3],
    "class F:\n    def __call__(self, prompts, completions, answer): return answer\nf = F()": [10, 20],
}


@pytest.mark.parametrize("code", FORMS)
def test_a_reward_function_may_have_any_of_these_forms(code, tmp_path):
    tokenizer = load_tokenizer("reviews")
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": 10}\n{"prompt": "bc", "answer": 20, "rare": 8}\n')
    records = load_records(tmp_path / "rows.jsonl", "prompt")
    reward = load_reward(f"{tmp_path}/mine.py:f", tokenizer, torch.device("cpu"), records)
    ids = [tokenizer.encode(r["prompt"]) for r in records]
    responses = [tokenizer.encode(" xy") + [tokenizer.eos_id], tokenizer.encode(" xyz")]
    assert reward(ids, responses, records).tolist() == FORMS[code]


def test_converted_records_keep_all_fields_of_their_row(tmp_path):
    rows = [{"prompt": "p", "chosen": " a", "rejected": " b", "source": "x", "n": [1, {"k": None}]},
            {"prompt": "q", "responses": [" a", " b"], "scores": [1, 2], "source": "y"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for kind in ("prompt", "ranked"):                                                  # what a reward sees
        assert [r.row for r in load_records(tmp_path / "rows.jsonl", kind)] == rows
