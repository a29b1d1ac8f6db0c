"""Tests of the scripts on public data: film reviews, HH and TL;DR comparisons, ranked answers.

The data is not part of the repository; without it, every test here is skipped. Models are tiny and steps few. The tests
check that the files are read correctly, that splits do not leak, and that the logs report what happened.
"""

import gzip
import json
import math
from pathlib import Path

import pytest
import torch

import sample_bon
import train_dpo
import train_ppo
import train_rm
import train_rrhf
import train_sft
from nanorlhf.data import encode_prompt, encode_response, load_records, make_examples, split_records, truncate_tldr
from nanorlhf.files import read_jsonl
from nanorlhf.model import RewardModel, Transformer
from nanorlhf.tokenizer import load_tokenizer

DATA = Path(__file__).parents[2] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the public data in {DATA}")
IMDB = DATA / "sentiment" / "imdb_train_6000.jsonl.gz"
HH = DATA / "preferences" / "hh_helpful-base_test.jsonl.gz"
TLDR = DATA / "preferences" / "tldr_comparisons_batch13.jsonl"
CAI = DATA / "ranked" / "cai_samples_PALMS_HHRLHF.jsonl"

REWARD = '''
import json
from pathlib import Path

def reward(prompts, completions):
    values = [completion.count("e") / (1 + len(completion)) for completion in completions]
    with open(Path(__file__).with_name("calls.jsonl"), "a") as f:
        f.write(json.dumps([prompts, completions, values]) + "\\n")
    return values
'''


def metrics(folder):
    return read_jsonl(Path(folder) / "metrics.jsonl")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Returns the folder of a tiny model, pretrained for 25 steps on 300 reviews with the 2,000-token vocabulary."""
    out = tmp_path_factory.mktemp("real") / "base"
    train_sft.train(train_sft.Config(
        init="scratch", kind="text", data=str(IMDB), limit=300, tokenizer=str(DATA / "tokenizers" / "tiktoken_small.model"),
        family="llama", width=32, layers=1, heads=2, context=192, batch_size=8, max_steps=25, lr=5e-3, eval_every=25,
        device="cpu", out=str(out)))
    return str(out)


@pytest.fixture
def reward(tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    return f"{tmp_path}/reward.py:reward", lambda: [json.loads(line) for line in (tmp_path / "calls.jsonl").open()]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Writes the first words of test reviews, which `base` never saw; returns the file."""
    rows = load_records(IMDB.with_name("imdb_test_2000.jsonl.gz"), "text", limit=12)
    rows = [{"prompt": " ".join(r["text"].split()[:6])} for r in rows]
    return write_rows(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", rows)


# ---- Film reviews ---------------------------------------------------------------------------------------------------


def test_each_film_review_is_read_as_one_record():
    """One record per JSON line. Texts contain U+0085, which ends a line for str.splitlines but not in JSON lines."""
    records = load_records(IMDB, "text")
    rows = [json.loads(line) for line in gzip.decompress(IMDB.read_bytes()).split(b"\n") if line]
    assert [r["text"] for r in records] == [r["text"] for r in rows]
    assert len(records) == 6000 and any("\x85" in r["text"] for r in records)


def test_pretraining_on_film_reviews_lowers_the_loss(base):
    log = metrics(base)
    assert log[0]["loss"] == pytest.approx(math.log(2002), abs=0.3)           # an untrained model is nearly uniform
    assert log[-1]["loss"] < log[0]["loss"] - 0.7 and log[-1]["eval/loss"] < log[0]["loss"] - 0.7
    for file in ("config.json", "model.safetensors", "tokenizer.json", "run.json"):
        assert (Path(base) / file).exists()
    text = load_records(IMDB, "text", limit=1)[0]["text"]
    own, first = load_tokenizer(base), load_tokenizer(str(DATA / "tokenizers" / "tiktoken_small.model"))
    assert own.encode(text) == first.encode(text) and own.decode(own.encode(text)) == text


def test_ppo_logs_the_values_of_the_reward_function(base, reward, prompts, tmp_path):
    spec, calls = reward
    train_ppo.train(train_ppo.Config(
        init=base, reward=spec, data=prompts, eval_prompts=prompts, num_eval_prompts=5, response_length=12, batch_size=6,
        max_steps=3, missing_eos="none", eval_every=2, device="cpu", out=str(tmp_path / "ppo")))
    log, said = metrics(tmp_path / "ppo"), calls()
    rollouts, evaluations = [c for c in said if len(c[0]) == 6], [c for c in said if len(c[0]) == 5]
    assert len(rollouts) == 3 and len(evaluations) == 2                       # after step 2 and after the last
    for row, (_, _, values) in zip(log, rollouts):
        assert row["objective/scores"] == pytest.approx(sum(values) / 6, abs=1e-6)
    for row, (_, completions, values) in zip(log[1:], evaluations):
        assert row["eval/reward"] == pytest.approx(sum(values) / 5, abs=1e-6)
        shown = [s for s in read_jsonl(tmp_path / "ppo" / "samples.jsonl") if s["step"] == row["step"]]
        assert [s["completion"] for s in shown] == completions
    known = {json.loads(line)["prompt"] for line in open(prompts)}
    assert all(p in known for c in said for p in c[0])                        # whole prompts, nothing cut or added
    assert log[0]["objective/kl"] == pytest.approx(0, abs=1e-4) and log[-1]["objective/kl"] != 0
    assert all(math.isfinite(v) for row in log for v in row.values())


def test_best_of_n_then_dpo_and_rrhf_use_the_reward_function(base, reward, prompts, tmp_path):
    spec, calls = reward
    sample_bon.sample(sample_bon.Config(init=base, reward=spec, data=prompts, n=4, label_temperature=0.0, response_length=12,
                                       keep_unfinished=True, device="cpu", out=str(tmp_path / "bon")))
    best, ranked, pairs = (read_jsonl(tmp_path / "bon" / f"{n}.jsonl") for n in ("best", "ranked", "comparisons"))
    (asked, answers, values), = calls()
    assert len(best) == len(ranked) == 12 and asked[::4] == [r["prompt"] for r in best]
    assert [y for r in ranked for y in r["responses"]] == answers
    for k, (b, r) in enumerate(zip(best, ranked)):
        assert r["scores"] == pytest.approx(values[4 * k:4 * k + 4]) and b["score"] == max(r["scores"])
        assert b["completion"] == r["responses"][r["scores"].index(b["score"])]
    untied = [p for p in pairs if p["score_chosen"] != p["score_rejected"]]
    assert len(untied) > 20 and all(p["score_chosen"] > p["score_rejected"] for p in untied)

    train_dpo.train(train_dpo.Config(init=base, data=str(tmp_path / "bon" / "comparisons.jsonl"), batch_size=8, max_steps=4,
                                     lr=2e-3, warmup_steps=0, eval_fraction=0.2, device="cpu", out=str(tmp_path / "dpo")))
    log = metrics(tmp_path / "dpo")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and log[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert log[-1]["rewards/margins"] > 0

    train_rrhf.train(train_rrhf.Config(init=base, data=prompts, reward=spec, num_samples=3, response_length=12, batch_size=6,
                                       max_steps=2, device="cpu", out=str(tmp_path / "rrhf")))
    assert metrics(tmp_path / "rrhf")[0]["scores/best"] >= metrics(tmp_path / "rrhf")[0]["scores/mean"] > 0


# ---- Human comparisons ----------------------------------------------------------------------------------------------


def test_splits_by_post_do_not_leak():
    """TL;DR has several rows per post. A post is on one side only, whatever else is in the file and in whatever order."""
    records = load_records(TLDR, "preference")
    assert len(records) == 1097 and len({r["group"] for r in records}) == 905
    train, held_out = split_records(records, 0.2, seed=1)
    assert len(train) + len(held_out) == 1097 and 150 < len(held_out) < 290
    posts = [{r["prompt"].split("\n\nPOST: ")[1] for r in side} for side in (train, held_out)]
    assert not posts[0] & posts[1] and not {r["group"] for r in train} & {r["group"] for r in held_out}
    again = split_records(records[::-1][:400], 0.2, seed=1)[1]
    assert again and {r["group"] for r in again} <= {r["group"] for r in held_out}
    assert {r["group"] for r in split_records(records, 0.2, seed=2)[1]} != {r["group"] for r in held_out}


def test_bad_hh_rows_are_reported_or_skipped(capsys):
    with pytest.raises(ValueError, match=r"hh_helpful-base_test.jsonl.gz:\d+: "):
        load_records(HH, "preference")
    records = load_records(HH, "preference", skip_bad=True)
    assert len(records) == 2354 - 15 and "skipped 15 of 2354" in capsys.readouterr().err
    assert all(r["prompt"].endswith("\n\nAssistant:") and "\n\nAssistant:" not in r["chosen"] for r in records)
    train, held_out = split_records(records, 0.2)
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}


def test_the_logged_accuracy_on_tldr_is_that_of_the_saved_reward_model(base, tmp_path):
    """The accuracy logged on held-out posts is that of the saved model, which is loaded and evaluated again here."""
    config = train_rm.Config(init=base, data=str(TLDR), limit=120, keep="tldr", max_length=160, max_prompt_length=64,
                             batch_size=8, max_steps=6, lr=2e-3, eval_fraction=0.2, eval_every=6, device="cpu",
                             out=str(tmp_path / "rm"))
    train_rm.train(config)
    log = metrics(tmp_path / "rm")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=0.1) and all(math.isfinite(r["loss"]) for r in log)

    _, held_out = split_records(load_records(TLDR, "preference", limit=120), 0.2, config.seed)
    tokenizer, model = load_tokenizer(tmp_path / "rm"), RewardModel.from_pretrained(tmp_path / "rm")
    rewards = []
    with torch.no_grad():
        for r in held_out:
            pair = make_examples(tokenizer, r["prompt"], [r["chosen"], r["rejected"]], 160, 64, "tldr")
            rewards.append([float(model.score(torch.tensor([e.tokens]), torch.tensor([len(e.tokens)]))) for e in pair])
    assert log[-1]["eval/held_out/pairs"] == len(held_out) > 10
    assert log[-1]["eval/held_out/accuracy"] == pytest.approx(sum(a > b for a, b in rewards) / len(rewards))
    rewards = torch.tensor(rewards)
    assert float(rewards.mean()) == pytest.approx(0, abs=1e-3) and float(rewards.std(correction=0)) == pytest.approx(1, abs=1e-3)


def test_tldr_prompts_lose_only_the_end_of_the_post(base):
    tokenizer = load_tokenizer(base)
    longest = max(load_records(TLDR, "prompt"), key=lambda r: len(r["prompt"]))["prompt"]
    cut = truncate_tldr(tokenizer, longest, 128)
    head = longest.split("\n\nPOST: ")[0] + "\n\nPOST: "
    assert cut.startswith(head) and cut.endswith("\n\nTL;DR:") and longest.startswith(cut.removesuffix("\n\nTL;DR:"))
    assert len(encode_prompt(tokenizer, longest, 128, "tldr")) <= 128


def test_dpo_on_hh_starts_at_ln_2_and_raises_the_margin(base, tmp_path):
    """At the start, policy and reference agree on every pair. After a few steps on few pairs, the margin is positive."""
    train_dpo.train(train_dpo.Config(init=base, data=str(HH), skip_bad=True, limit=40, max_length=160, batch_size=8, epochs=4,
                                     lr=3e-3, warmup_steps=0, eval_fraction=0.2, eval_every=4, device="cpu",
                                     out=str(tmp_path / "dpo")))
    log = metrics(tmp_path / "dpo")
    _, held_out = split_records(load_records(HH, "preference", skip_bad=True, limit=40), 0.2)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert sum(r["loss"] for r in log[-4:]) < sum(r["loss"] for r in log[:4]) and log[-1]["rewards/margins"] > 0
    right = log[-1]["eval/accuracy"] * len(held_out)
    assert right == pytest.approx(round(right), abs=1e-6)                     # a fraction of all held-out pairs
    moved = Transformer.from_pretrained(tmp_path / "dpo").state_dict()
    assert any(not torch.equal(moved[k], v) for k, v in Transformer.from_pretrained(base).state_dict().items())


# ---- Ranked answers -------------------------------------------------------------------------------------------------


def test_rrhf_on_ranked_answers_lowers_the_ranking_loss(base, tmp_path):
    """The given scores rank the 17 answers per prompt, the stray next turn is removed, and L_rank falls."""
    train_rrhf.train(train_rrhf.Config(init=base, data=str(CAI), kind="ranked", reward="given", sampling="none", limit=4,
                                       batch_size=4, max_steps=10, lr=3e-3, warmup_steps=0, max_length=128, rrhf_weight=10.0,
                                       device="cpu", out=str(tmp_path / "rrhf")))
    log, records = metrics(tmp_path / "rrhf"), load_records(CAI, "ranked", limit=4)
    assert all(len(r["responses"]) == len(r["scores"]) == 17 for r in records)
    assert not any(y.rstrip().endswith("Human:") for r in records for y in r["responses"])
    best = sum(max(r["scores"]) for r in records) / 4
    assert all(row["scores/best"] == pytest.approx(best, abs=1e-5) for row in log)
    assert log[-1]["loss/rank"] < 0.95 * log[0]["loss/rank"] and log[-1]["loss/ft"] < log[0]["loss/ft"]

    tokenizer = load_tokenizer(base)
    drawn, = (tmp_path / "rrhf").glob("candidates-*.jsonl")
    for row, record in zip(read_jsonl(drawn), records):
        room = 128 - len(row["prompt"])
        assert row["prompt"] == encode_prompt(tokenizer, record["prompt"]) and row["scores"] == record["scores"]
        assert row["responses"] == [encode_response(tokenizer, y)[:room] for y in record["responses"]]
