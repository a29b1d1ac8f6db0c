"""Openings of stories, and short stories that end: `python prepare.py CHECKPOINT OUT`.

demos.jsonl     prompt, completion    what the checkpoint writes after an opening, up to the end of a sentence
prompts.jsonl   prompt                the same openings: for comparisons, PPO and RRHF
heldout.jsonl   prompt, completion    openings about somebody (girl Ella, dog Max, ...) whom no other is about: ID test
far.jsonl       prompt, completion    openings of another shape: about a thing

The checkpoint was trained on stories that follow one another: it never ends one. The demonstrations teach it to.
"""

import itertools
import random
import sys
from pathlib import Path

from nanorlhf.data import encode_prompt
from nanorlhf.tokenizer import load_tokenizer
from nanorlhf.generate import generate
from nanorlhf.model import Transformer
from nanorlhf.files import write_records

NAMES = dict(girl="Lily Mia Sara Anna Lucy Emma Amy Sue Jane Ella Molly Kate".split(),
             boy="Tim Tom Ben Sam Max Jack Bob Joe Mike Billy Fred John".split(),
             dog="Spot Rex Buddy Max".split(), cat="Kitty Tom Lucy Fluffy".split(), bird="Bobby Tweet Sue Blue".split())
OPENINGS = ("Once upon a time, there was a {little} {kind} named {name}. {They}",
            "One day, a {little} {kind} named {name} went to the {place}. {They}",
            "There was a {little} {kind} called {name}. One day, {they}")
FAR = ("One day, a big {thing} was in the {place}. It", "Once upon a time, there was a {thing}. The {thing}",
       "The {thing} was very {mood}. It")
WORDS = dict(little=["little", "big", "small", "young"], place=["park", "forest", "beach", "garden", "store"])
THINGS = dict(thing=["tree", "car", "boat", "ball", "house", "truck"], mood=["old", "new", "red", "big"], place=WORDS["place"])


def openings(first, last):
    """All openings whose name is one of a kind's names number first ... last - 1."""
    found = []
    for opening, (kind, names), little, place in itertools.product(OPENINGS, NAMES.items(), WORDS["little"], WORDS["place"]):
        if "{place}" in opening or place == "park":
            they = dict(girl="she", boy="he").get(kind, "it")
            share = slice(first * len(names) // 4, last * len(names) // 4)
            found += [opening.format(little=little, kind=kind, name=name, place=place, they=they, They=they.capitalize())
                      for name in names[share]]
    return found


def short_stories(checkpoint, prompts, tokens, seed):
    """prompt, completion: a sample cut after its last sentence that ends within so many tokens; without one, none."""
    tokenizer, model = load_tokenizer(checkpoint), Transformer.from_pretrained(checkpoint)
    ids = [encode_prompt(tokenizer, p) for p in prompts]
    samples = generate(model, ids, tokens, temperature=0.8, seed=seed, tokenizer=tokenizer)
    for prompt, ids in zip(prompts, samples.responses()):
        text = tokenizer.decode(ids, start=False).split("\n")[0]
        end = max(text.rfind(mark) for mark in (". ", "! "))
        if end > 30:
            yield dict(prompt=prompt, completion=text[:end + 1])


def main(checkpoint, out):
    out = Path(out)
    rng = random.Random(0)
    train, held_out = openings(0, 3), openings(3, 4)
    far = [f.format(thing=t, mood=m, place=p) for f, t, m, p in itertools.product(FAR, *THINGS.values())]
    far = list(dict.fromkeys(far))
    for rows in (train, held_out, far):
        rng.shuffle(rows)
    write_records(out / "demos.jsonl", short_stories(checkpoint, train * 4, 72, seed=0))
    write_records(out / "prompts.jsonl", [dict(prompt=p) for p in train * 4])
    write_records(out / "heldout.jsonl", short_stories(checkpoint, held_out, 72, seed=1))
    write_records(out / "far.jsonl", short_stories(checkpoint, far, 72, seed=2))
    for name in ("demos", "prompts", "heldout", "far"):
        print(name, sum(1 for _ in open(out / f"{name}.jsonl")), open(out / f"{name}.jsonl").readline().strip())


if __name__ == "__main__":
    main(*sys.argv[1:])
