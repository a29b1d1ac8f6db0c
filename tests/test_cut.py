"""Tests of --cut_at: a response ends where the next speaker's mark begins, as text and as token ids, wherever it is measured."""

import random
import sys

import numpy as np
import pytest
import torch

import sample_bon
from nanorlhf import evaluate, judge
from nanorlhf.data import cut_response, cut_text, encode_response, marks_of
from nanorlhf.evaluate import Evaluation, Options, evaluate_policies, sampled_kl
from nanorlhf.files import read_jsonl, write_records
from nanorlhf.generate import generate
from nanorlhf.metrics import mean_and_interval
from nanorlhf.model import ModelConfig, Transformer
from nanorlhf.tokenizer import load_tokenizer, train_bpe
from test_ends import chat_checkpoint
from test_tokenizer import GOLDENS, sentencepiece, variant_of

pytestmark = pytest.mark.usefixtures("one_thread")
MARKS = ["\n\nHuman:", "\n\nAssistant:"]


def test_marks_are_read_from_the_option():
    assert marks_of(r"\n\nHuman:,\n\nAssistant:") == MARKS and marks_of("") == [] and marks_of("###,") == ["###"]


@pytest.mark.parametrize("text, left", [
    (" Yes.\n\nHuman: Why?\n\nAssistant: So.", " Yes."), (" Yes.\n\nAssistant: So.\n\nHuman: Why?", " Yes."), ("\n\nHuman: Hi", ""),
    (" Yes.", " Yes."), (" Human: no blank line", " Human: no blank line"), ("", ""), (" a\n\n\n\nHuman:", " a\n\n")])
def test_a_text_ends_before_the_first_mark(text, left):
    assert cut_text(text, MARKS) == left and cut_text(text, []) == text and cut_text(left, MARKS) == left


@pytest.fixture(scope="module")
def tokenizers(tiny, tmp_path_factory):
    """Byte-level tokenizers: the built-in one, a small one, one with tokens that straddle a mark's beginning; and SentencePiece's."""
    straddling = train_bpe([" yes.\n\nHuman: why.\n\nAssistant: so."] * 50, 290, pattern=r"[^\n]+\n|[\s\S]+?\.|[\s\S]")
    return [load_tokenizer("reviews"), tiny, straddling, sentencepiece(tmp_path_factory.mktemp("sp"), variant_of(GOLDENS["spec"], "llama"))]


TEXTS = [" yes.\n\nHuman: why.", "\n\nHuman: why.", " the cat sat.\n\nAssistant: so.\n\nHuman: it", " ééé 語🙂\n\nHuman: é", " so",
         " yes.\n\n\nHuman:", " no mark\n\nhere"]


def test_ids_are_cut_as_their_text_is_and_end_with_eos(tokenizers):
    for tokenizer in tokenizers:
        for text in TEXTS:
            ids = tokenizer.encode(text, start=False)
            for sampled in (ids, ids + [tokenizer.eos_id]):
                cut, left = cut_response(tokenizer, sampled, MARKS), cut_text(text, MARKS)
                if left == text:
                    assert cut is sampled
                    continue
                assert tokenizer.decode(cut, start=False) == left and cut.count(tokenizer.eos_id) == 1
                assert cut[-1] == tokenizer.eos_id and cut_response(tokenizer, cut, MARKS) == cut
                same = next((i for i, (a, b) in enumerate(zip(cut, sampled)) if a != b), len(cut))
                assert left.startswith(tokenizer.decode(cut[:same], start=False)) and same >= len(cut) - 8


def test_a_token_that_holds_the_marks_beginning_keeps_what_stands_before_it(tokenizers):
    straddling = next(t for t in tokenizers if t.encode(".\n") == t.encode(" yes.\n")[-1:] or len(t.encode(" yes.\n")) == 1)
    ids = straddling.encode(" yes.\n") + straddling.encode("\nHuman: why.")
    cut = cut_response(straddling, ids, MARKS)
    assert straddling.decode(cut) == " yes." and cut[:-1] != ids[:len(cut) - 1]
    assert cut_response(straddling, ids, MARKS, longest=1) == [straddling.eos_id]


def test_the_ids_before_a_mark_stay_as_sampled_even_where_no_encoder_would_choose_them(tokenizers):
    tokenizer = tokenizers[0]
    spelt = [i for byte in b" The plot" for i in tokenizer.encode(chr(byte))]
    assert cut_response(tokenizer, spelt + tokenizer.encode("\n\nHuman: x"), MARKS) == spelt + [tokenizer.eos_id]
    broken = tokenizer.encode("é")[:1] if len(tokenizer.encode("é")) > 1 else []          # half a character
    assert cut_response(tokenizer, broken + tokenizer.encode("\n\nHuman: x"), MARKS)[:-1] == broken


def test_random_ids_are_cut_as_their_text_is(tokenizers):
    rng = random.Random(0)
    for tokenizer in tokenizers[:3]:
        for _ in range(100):
            ids = [rng.randrange(256) for _ in range(rng.randrange(12))] + tokenizer.encode(rng.choice(MARKS)) + [rng.randrange(256)]
            cut = cut_response(tokenizer, ids, MARKS)
            assert tokenizer.decode(cut) == cut_text(tokenizer.decode(ids), MARKS) and ids[:len(cut) - 1] == cut[:-1]


def test_a_cut_answer_of_a_chat_ends_as_the_template_ends_it(tmp_path):
    _, tokenizer = chat_checkpoint(tmp_path)
    prompt = "\n\nHuman: Hi\n\nAssistant:"
    ids = encode_response(tokenizer, " The plot is good.", prompt)
    assert ids[-1] == tokenizer.special["<|eot_id|>"]
    assert cut_response(tokenizer, ids[:-1] + tokenizer.encode("\n\nHuman: Why", start=False), MARKS, prompt) == ids
    other = [tokenizer.special["<|start_header_id|>"], *tokenizer.encode("user")]             # a mark may be a special token
    assert cut_response(tokenizer, ids[:-1] + other, ["<|start_header_id|>"], prompt) == ids
    assert cut_response(tokenizer, ids, ["eot", "<|", "|>"], prompt) == ids                    # EOS is no text


# ---- Where it is measured -------------------------------------------------------------------------------------------

MARK = "e"                                        # a random model writes it often


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """A folder with a random policy, another one, and a reward that is a text's length."""
    folder, tokenizer = tmp_path_factory.mktemp("cut"), load_tokenizer("reviews")
    for name, seed in (("sft", 0), ("other", 1)):
        Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, context=64, width=16, layers=1, heads=2, kv_heads=2, head_dim=8,
                                ffn=32, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id), seed).save_pretrained(folder / name)
        tokenizer.save(folder / name)
    (folder / "reward.py").write_text("def chars(prompts, completions): return [len(c) for c in completions]\n")
    return folder


def table(at, **changed):
    reward = f"{at}/reward.py:chars"
    options = Options(**dict(reference=f"{at}/sft", reward=reward, gold=reward, num_prompts=6, diversity_prompts=2, num_samples=2,
                             response_length=20, device="cpu") | changed)
    rows, samples = evaluate_policies({"other": f"{at}/other"}, options)
    return {row["method"]: row for row in rows}, samples, options


@pytest.fixture(scope="module")
def uncut(at):
    return table(at)


@torch.no_grad()
def test_evaluate_scores_and_writes_cut_responses_and_takes_the_kl_of_whole_ones(at, uncut):
    whole, texts, _ = uncut
    cut, left, options = table(at, cut_at=MARK, bon=3)
    assert [s["completion"] for s in left if s["method"] != "best-of-3"] == [cut_text(s["completion"], [MARK]) for s in texts]
    assert sum(MARK in s["completion"] for s in texts) > 10 and not any(MARK in s["completion"] for s in left)
    assert all(s["gold"] == s["reward"] == len(s["completion"]) for s in left)
    for method in ("SFT", "other"):
        for column in ("kl", "heed"):
            assert cut[method][column] == whole[method][column]
        for column in ("length", "gold/test", "ead_across", "ead_per_input"):
            assert cut[method][column][0] != whole[method][column][0]
    assert cut["other"]["ended"][0] > whole["other"]["ended"][0]
    e, model = Evaluation(options), Transformer.from_pretrained(at / "other")
    sampled = [y for y, in e.draw(model, "test", 1, 1, "samples", whole=True)]
    assert cut["other"]["length"][0] == np.mean([len(y) for y in e.cut(sampled, e.records["test"])])
    kl = sampled_kl(model, e.reference, e.tokenizer, e.prompts["test"], sampled, 1.0)
    assert cut["other"]["kl"][0] == pytest.approx(mean_and_interval(kl)[0])
    best = e.draw(e.reference, "test", 1, 3, "samples")                                   # the longest of three, once cut
    pool = generate(e.reference, e.prompts["test"], 20, num_samples=3, tokenizer=e.tokenizer,
                    seed=evaluate.seed_for(0, "table", "samples", "test", 3)).responses()
    lengths = [len(cut_text(e.tokenizer.decode(y), [MARK])) for y in pool]
    assert [len(e.tokenizer.decode(y)) for y, in best] == [max(lengths[i:i + 3]) for i in range(0, len(lengths), 3)]


def test_a_mark_that_never_occurs_changes_nothing(at, uncut):
    assert table(at, cut_at=r"\n\nHuman:")[:2] == uncut[:2]


def test_the_command_says_what_is_cut_and_what_is_not(at, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [
        "evaluate", "--reference", f"{at}/sft", "--num_prompts", "3", "--reward", f"{at}/reward.py:chars", "--diversity_prompts", "1",
        "--num_samples", "2", "--response_length", "6", "--device", "cpu", "--out", str(at / "out"), "--cut_at", r"\n\nHuman:,e"])
    evaluate.main()
    assert r"ends before the first of '\n\nHuman:', 'e' (--cut_at) and has ended then; KL and heed are of whole samples." in capsys.readouterr().out


def test_sample_bon_scores_and_writes_cut_responses(at, tmp_path):
    def ranked(name, **options):
        config = sample_bon.Config(init=f"{at}/sft", reward=f"{at}/reward.py:chars", out=str(tmp_path / name), n=4, limit=8,
                                   response_length=20, device="cpu", **options)
        sample_bon.sample(config)
        return {r["prompt"]: r for r in read_jsonl(tmp_path / name / "ranked.jsonl")}
    whole, cut, finished = ranked("whole", keep_unfinished=True), ranked("cut", cut_at=MARK, keep_unfinished=True), ranked("f", cut_at=MARK)
    for prompt, record in cut.items():
        assert record["responses"] == [y for y in (cut_text(y, [MARK]) for y in whole[prompt]["responses"]) if y.strip()]
        assert record["scores"] == list(map(len, record["responses"]))
    for prompt, record in finished.items():                                               # a cut response has ended
        assert {y for y in (cut_text(y, [MARK]) for y in whole[prompt]["responses"] if MARK in y) if y.strip()} <= {*record["responses"]}
    assert sum(len(r["responses"]) for r in finished.values()) > 8


def test_judge_asks_about_cut_texts(tmp_path):
    rows = [dict(method=m, prompt="p", completion=c) for m, c in (("x", " yes.\n\nHuman: why"), ("y", " no"))]
    write_records(tmp_path / "rows.jsonl", rows)
    judge.ask([str(tmp_path / "rows.jsonl")], judge.Ask(a="x", b="y", cut_at=r"\n\nHuman:", out=str(tmp_path)))
    questions, keys = (read_jsonl(tmp_path / f"{name}.jsonl") for name in ("questions", "key"))
    assert all("yes.\n\nSummary" in q["question"] or "yes.\n\nFirst" in q["question"] for q in questions)
    assert [k["words_a"] for k in keys] == [1, 1]
