"""Comparisons -> the two sides of a split made before anything is trained: `python prepare.py $DATA $OUT`.

hh_train.jsonl, hh_heldout.jsonl        prompt, chosen, rejected, group     group: the conversation's first question
tldr_train.jsonl, tldr_heldout.jsonl    prompt, chosen, rejected, group     group: the post, which several rows may share
text.jsonl                              text                                prompt + chosen, training sides only: to pretrain on
"""

import json
import sys
from pathlib import Path

from nanorlhf.data import load_records, split_records

HELD_OUT = 0.2


def main(data, out):
    hh = load_records(f"{data}/preferences/hh_helpful-base_test.jsonl.gz", "preference", skip_bad=True)
    for r in hh:
        r["group"] = r["prompt"].split("\n\nAssistant:")[0]
    tldr = load_records(f"{data}/preferences/tldr_comparisons_batch13.jsonl", "preference")
    Path(out).mkdir(parents=True, exist_ok=True)

    def write(name, rows):
        Path(out, f"{name}.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
        print(name, len(rows), "rows", len({r.get("group") for r in rows}), "groups")
    text = []
    for name, records in (("hh", hh), ("tldr", tldr)):
        train, held_out = split_records(records, HELD_OUT, seed=0)
        assert not {r["group"] for r in train} & {r["group"] for r in held_out}
        assert not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}
        write(f"{name}_train", train)
        write(f"{name}_heldout", held_out)
        text += sorted({r["prompt"] + r["chosen"] for r in train})
        longer = [len(r["chosen"]) > len(r["rejected"]) for r in held_out if len(r["chosen"]) != len(r["rejected"])]
        p, n = sum(longer) / len(longer), len(longer)
        interval = 1.96 * (p * (1 - p) / n) ** 0.5
        print(f"{name}_heldout: the longer answer is the chosen one in {p:.1%} ± {interval:.1%} of {n} (characters)")
    write("text", [{"text": t} for t in text])


if __name__ == "__main__":
    main(*sys.argv[1:])
