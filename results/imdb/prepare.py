"""Film reviews -> the record files of this run: `python prepare.py $DATA $OUT [TOKENIZER]`.

text.jsonl          text                            training reviews without <br />, to pretrain on
sft.jsonl           prompt, completion, group       a sentence's first 8 words; what follows, to a sentence's end, in 44 tokens
prompts.jsonl       prompt, completion, group       the first of each training review: for PPO, RRHF and the comparisons
heldout.jsonl       prompt, completion, group       the same of the 2,000 test reviews, of which nothing else is used
"""

import gzip
import json
import re
import sys
from pathlib import Path

from nanorlhf.tokenizer import load_tokenizer

WORDS, TOKENS = 8, 44


def reviews(path):
    seen = set()
    for line in gzip.decompress(Path(path).read_bytes()).split(b"\n"):
        if line.strip():
            row = json.loads(line)
            row["text"] = re.sub(r"\s+", " ", row["text"].replace("<br />", " ")).strip()
            if row["text"] not in seen:                       # a few reviews stand there twice
                seen.add(row["text"])
                yield row


def pieces(text, tokenizer):
    """(prompt, completion) of each sentence long enough: cut at a sentence's end, so that EOS can be learnt."""
    sentences = re.split(r"(?<=[a-z)\"'][.!?]) (?=[A-Z])", text)
    for i in range(len(sentences)):
        words = sentences[i].split(" ")
        if len(words) < WORDS + 4:
            continue
        prompt, completion = " ".join(words[:WORDS]), " " + " ".join(words[WORDS:])
        if len(tokenizer.encode(completion)) > TOKENS:
            continue
        for following in sentences[i + 1:]:                   # whole further sentences, as long as there is room
            if len(tokenizer.encode(completion + " " + following)) > TOKENS:
                break
            completion += " " + following
        yield prompt, completion


def main(data, out, tokenizer=None):
    tokenizer = load_tokenizer(tokenizer or f"{data}/tokenizers/tiktoken_small.model")
    train, test = (list(reviews(f"{data}/sentiment/imdb_{s}.jsonl.gz")) for s in ("train_6000", "test_2000"))
    known = {r["text"] for r in train}
    test = [r for r in test if r["text"] not in known]

    def records(rows, each):
        return [dict(prompt=p, completion=c, group=f"{r['label']}/{r['id']}", label=r["label"])
                for r in rows for p, c in list(pieces(r["text"], tokenizer))[:each]]
    made = dict(text=[dict(text=r["text"]) for r in train], sft=records(train, 4), prompts=records(train, 1),
                heldout=records(test, 1))
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, rows in made.items():
        Path(out, f"{name}.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
        print(name, len(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
