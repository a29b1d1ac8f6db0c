"""Tests of a user's reward function: it gets the columns of the data by name, in every script that uses a reward."""

import json
import math
import os
import re
import sys

import pytest
import torch

import sample_bon
import train_dpo
import train_ppo
import train_rm
import train_rrhf
import train_sft
from nanorlhf.data import load_records
from nanorlhf.errors import UserError
from nanorlhf.evaluate import Options, evaluate_policies
from nanorlhf.files import read_jsonl
from nanorlhf.model import RewardModel, Transformer
from nanorlhf.options import main, parse_options
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


# ---- A reward file is a Python file ---------------------------------------------------------------------------------

IDS = [[1], [2, 3], [4, 5, 6]]


def rewards_of(spec, ids=IDS):
    return load_reward(str(spec), load_tokenizer("reviews"), torch.device("cpu"))(ids, ids)


def refused(spec):
    with pytest.raises(UserError) as error:
        rewards_of(spec)
    assert str(error.value).startswith(f"--reward {spec}: ") and "\n" not in str(error.value)
    return str(error.value)


DATACLASS = """
from __future__ import annotations
import dataclasses
import pickle
import typing

@dataclasses.dataclass
class Weights:
    length: float = 0.5
    kind: typing.ClassVar[str] = "x"

def f(prompts, completions):
    assert typing.get_type_hints(Weights)["length"] is float and Weights(3.0) == pickle.loads(pickle.dumps(Weights(3.0)))
    return [Weights().length] * len(prompts)
"""


def test_a_reward_file_may_define_dataclasses_and_is_an_importable_module(tmp_path):
    (tmp_path / "mine.py").write_text(DATACLASS)
    assert rewards_of(f"{tmp_path}/mine.py:f").tolist() == [0.5] * 3
    assert sys.modules["mine"].__file__ == str(tmp_path / "mine.py") and not list(tmp_path.glob("__pycache__"))


def test_a_reward_file_called_like_a_library_or_a_module_of_ours_works_and_replaces_nothing(tmp_path):
    import random
    for name in ("random", "torch", "sample_bon"):
        (tmp_path / f"{name}.py").write_text(DATACLASS)
        assert rewards_of(f"{tmp_path}/{name}.py:f").tolist() == [0.5] * 3
    assert sys.modules["random"] is random and sys.modules["torch"] is torch and sys.modules["sample_bon"] is sample_bon


POOL = """
import multiprocessing
import neighbour

def one(completion):
    return neighbour.number(completion)

def f(prompts, completions):
    from package.part import WEIGHT
    with multiprocessing.get_context("{start}").Pool(1) as pool:
        return [[x * WEIGHT] for x in pool.map(one, completions)]
"""


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_pools_and_neighbouring_files_work_for_two_reward_files_of_the_same_names(start, tmp_path):
    """A process of the pool imports the file by its name. Each reward uses its own neighbours, imported early and late."""
    found, tokenizer = [], load_tokenizer("reviews")
    for weight, name in ((1, "a"), (10, "b")):
        folder = tmp_path / start / name
        (folder / "package").mkdir(parents=True)
        (folder / "package" / "part.py").write_text(f"WEIGHT = {weight}")
        (folder / "neighbour.py").write_text("def number(text):\n    import late\n    return late.VALUE")
        (folder / "late.py").write_text(f"VALUE = {weight + 1}")
        (folder / "mine.py").write_text(POOL.replace("{start}", start))
        found.append(load_reward(f"{folder}/mine.py:f", tokenizer, torch.device("cpu")))
    for k in (0, 1, 0):
        assert found[k](IDS, IDS).tolist() == [[2.0] * 3, [110.0] * 3][k]


def test_a_file_that_fails_leaves_no_module_and_a_changed_one_is_read_again(tmp_path):
    file = tmp_path / "changing.py"
    for code, says in (("def f(:", "SyntaxError"), ("1 / 0", "ZeroDivisionError"), ("import sys\nsys.exit()", "SystemExit"),
                       ("import no_such_module_here", "No module named 'no_such_module_here'")):
        file.write_text(code)
        assert says in refused(f"{file}:f") and "changing" not in sys.modules
    for value in (1, 2):                          # the same size, in the same second
        file.write_text(f"def f(p, c): return [{value}] * 3")
        assert rewards_of(f"{file}:f").tolist() == [float(value)] * 3


CHANGES = """
import os, torch
os.makedirs("words", exist_ok=True)
os.chdir("words")                                 # the file's own folder, for its relative paths
open("word", "w").close()
def score(prompts, completions, completion_ids, answer):
    assert os.path.exists("word")
    for values in (completion_ids, answer, *completion_ids, *answer, prompts, completions):
        values.pop()
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    return [1.0, 2.0]
"""


def test_a_reward_function_changes_neither_its_inputs_nor_the_process(tmp_path, monkeypatch):
    """Its copies of the inputs and its working folder are its own: the ids are trained on afterwards, and --out is relative."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CHANGES)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": [1, 2]}\n{"prompt": "b", "answer": [3, 4]}\n')
    records, responses = load_records("rows.jsonl", "prompt"), [[70, 71], [72, 73]]
    reward = load_reward("mine.py:score", load_tokenizer("reviews"), torch.device("cpu"), records, "rows.jsonl")
    for _ in range(2):
        assert reward([[70], [71]], responses, records).tolist() == [1, 2]
        assert responses == [[70, 71], [72, 73]] and [r.row["answer"] for r in records] == [[1, 2], [3, 4]]
        assert os.getcwd() == str(tmp_path) and torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32


RETURNED = {  # {what a function returns for three responses: the rewards, or what the error says}
    "[1, 2.5, True]": [1, 2.5, 1], "(1, 2, 3)": [1, 2, 3], "[10**30, -10**30, 2**70]": [1e30, -1e30, 2.0**70],
    "np.arange(3.0)": [0, 1, 2], "np.ones((3, 1))": [1, 1, 1], "[[1], (2,), [[3]]]": [1, 2, 3], "torch.ones(3, 1, requires_grad=True)": [1, 1, 1],
    "torch.tensor([1, 2, 3], dtype=torch.bfloat16)": [1, 2, 3], "[torch.tensor(2.0), torch.tensor([3.0]), np.float16(4)]": [2, 3, 4],
    "[np.array([[5]]), np.bool_(True), np.int64(7)]": [5, 1, 7], "iter([1, 2, 3])": [1, 2, 3], "(i / 2 for i in range(3))": [0, 0.5, 1],
    "map(len, p)": None, "[Fraction(1, 2)] * 3": [0.5] * 3, "{0: 1, 1: 2, 2: 3}.values()": [1, 2, 3], "[np.array([torch.tensor(1.0)])] * 3": [1] * 3,
    "[1, None, 3]": "did not return a list of numbers, got None for response 1", "[1, 2, math.nan]": "got nan for response 2",
    "[1, 2, -math.inf]": "got -inf for response 2", "np.array([1, np.nan, 2])": "got nan for response 1",
    "[10**400, 1, 2]": "got 10000", "[1, 10**5000, 2]": "got a huge int for response 1", "[1e39, 1, 2]": "got 1e+39 for response 0",
    "['1', '2', '3']": "got '1' for response 0", "[1, [2, 3], 4]": "got [2, 3] for response 1", "[1, [], 4]": "got [] for response 1",
    "[1, 2j, 3]": "got 2j for response 1", "[1, {2: 3}, 3]": "got {2: 3} for response 1", "np.ones((1, 3))": "3 finite numbers expected, got 1",
    "[1, 2]": "3 finite numbers expected, got 2", "[1] * 4": "3 finite numbers expected, got more", "itertools.repeat(1)": "got more",
    "'123'": "did not return a list of numbers", "{0: 1, 1: 2, 2: 3}": "did not return a list of numbers", "None": "did not return a list",
    "1.0": "did not return a list", "torch.tensor(1.0)": "did not return a list", "(1 / (1 - i) for i in range(3))": "ZeroDivisionError",
    "g()": "an async function is not supported", "sys.exit(3)": "SystemExit: 3"}


@pytest.mark.parametrize("value", RETURNED)
def test_what_a_reward_function_may_return(value, tmp_path):
    (tmp_path / "mine.py").write_text("import itertools, math, sys, torch\nimport numpy as np\nfrom fractions import Fraction\n"
                                      f"async def g(): return [1]\ndef f(p, c): return {value}")
    want = RETURNED[value]
    if isinstance(want, str):
        assert want in refused(f"{tmp_path}/mine.py:f")
        return
    rewards, tokenizer = rewards_of(f"{tmp_path}/mine.py:f"), load_tokenizer("reviews")
    assert rewards.dtype == torch.float32 and rewards.tolist() == torch.tensor(want or [len(tokenizer.decode(i)) for i in IDS]).tolist()


def test_a_reward_model_that_gives_nan_names_itself(base, tmp_path):
    model = RewardModel(Transformer.from_pretrained(base).config)
    model.reward_std, model.reward_mean = 1e-30, -1e30
    model.save_pretrained(tmp_path)
    load_tokenizer("reviews").save(tmp_path)
    assert "the reward model gives inf" in refused(tmp_path)
    with pytest.raises(UserError, match=f"--reward {tmp_path}: the reward model gives inf"):
        evaluate_policies({}, Options(reference=base, reward=str(tmp_path), num_prompts=2, diversity_prompts=2, num_samples=2,
                                      response_length=4, device="cpu"))


# ---- Numbers that would spoil a run ---------------------------------------------------------------------------------


def stops(monkeypatch, module, *argv):
    """Runs the script's main in this process; returns its error, which must be one line."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        main(module.Config, getattr(module, "train", None) or module.sample, "")
    assert stop.value.code.startswith("error: ") and "\n" not in stop.value.code
    return stop.value.code


@pytest.mark.parametrize("words, says", [(["--eval_every", 0], "step 1, model: embed.weight holds NaN or infinity"),
                                         (["--eval_every", 0, "--save_every", 0], "step 1: embed.weight holds NaN or infinity"),
                                         (["--lr", "1e10", "--eval_every", 0, "--save_every", 0], "step 1: the model's output"),
                                         ([], "step 1: eval/loss, eval/loss_se not finite")])
def test_a_run_that_diverges_in_its_last_step_is_not_done(base, tmp_path, monkeypatch, words, says):
    shared = ["--init", base, "--limit", 80, "--max_steps", 1, "--lr", "1e38", "--device", "cpu", "--out", tmp_path / "x"]
    assert says in stops(monkeypatch, train_sft, *shared, *words)
    assert json.loads((tmp_path / "x" / "run.json").read_text())["finished"] is False
    assert not list((tmp_path / "x").rglob("*.safetensors"))


def test_temperature_0_measures_greedy_responses_with_the_kl_at_temperature_1(base, tmp_path, monkeypatch):
    other = tmp_path / "other"
    torch.manual_seed(0)
    policy = Transformer.from_pretrained(base)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.02 * torch.randn_like(p))
    policy.save_pretrained(other)
    load_tokenizer("reviews").save(other)
    options = Options(reference=base, reward="gold", num_prompts=4, diversity_prompts=2, num_samples=2, response_length=4,
                      temperature=0.0, device="cpu")
    rows, _ = evaluate_policies({"other": str(other)}, options)
    assert rows[0]["kl"][0] == pytest.approx(0, abs=1e-5) and 0 < rows[1]["kl"][0] < math.inf
    shared = ["--init", base, "--device", "cpu", "--temperature", 0, "--response_length", 4]
    train_dpo.train(parse_options(train_dpo.Config, "", list(map(str, [
        *shared, "--data", pairs(tmp_path), "--eval_fraction", 0, "--eval_prompts", "reviews", "--num_eval_prompts", 2, "--max_steps", 1,
        "--eval_every", 1, "--out", tmp_path / "dpo"]))))
    assert read_jsonl(tmp_path / "dpo/metrics.jsonl")[-1]["eval/kl"] < math.inf
    rrhf = [*shared, "--limit", 4, "--reward", "gold", "--num_eval_prompts", 2, "--max_steps", 1, "--eval_every", 1]
    train_rrhf.train(parse_options(train_rrhf.Config, "", list(map(str, [*rrhf, "--out", tmp_path / "rrhf"]))))
    assert read_jsonl(tmp_path / "rrhf/metrics.jsonl")[-1]["eval/kl"] < math.inf
    for sampling in ("beam", "diverse_beam"):
        assert f"--temperature 0: --sampling {sampling} needs one above 0" in stops(
            monkeypatch, train_rrhf, *rrhf, "--sampling", sampling, "--out", tmp_path / "x")
    assert "--temperature 0.0: PPO needs samples" in stops(monkeypatch, train_ppo, *shared, "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def pairs(folder):
    (folder / "pairs.jsonl").write_text("".join(json.dumps(dict(prompt=f"p{i}", chosen=" a", rejected=" b")) + "\n" for i in range(4)))
    return folder / "pairs.jsonl"


def test_train_rm_and_evaluate_read_files_whose_paths_hold_an_equals_sign(base, tmp_path):
    folder = tmp_path / "lr=1,seed=2"
    folder.mkdir()
    file = pairs(folder)
    train_rm.train(train_rm.Config(init=base, data=str(file), eval_data=f"{file},again={file}", eval_fraction=0.0, max_steps=1,
                                   batch_size=2, device="cpu", out=str(tmp_path / "rm")))
    assert read_jsonl(tmp_path / "rm/metrics.jsonl")[-1].keys() >= {"eval/pairs/loss", "eval/again/loss"}
    rows, _ = evaluate_policies({}, Options(reference=base, reward=str(tmp_path / "rm"), data=str(file), num_prompts=2,
                                            diversity_prompts=2, num_samples=2, response_length=4, device="cpu"))
    assert "reward/pairs" in rows[0]
