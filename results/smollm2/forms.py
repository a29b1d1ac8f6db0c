"""A reward that can be checked: does the answer have the form that the prompt asked for? Used as --reward forms.py:reward.

Each prompt ends with one sentence of ASK and names it in its columns `form` and `amount`. The reward is in [0, 1]; a part of
the form earns a part of it, and an answer of fewer than three words earns nothing.
"""

import re

ASK = {"words": "Answer in at most {} words.", "sentences": "Use exactly {} sentence(s).",
       "list": 'Answer with a list of exactly {} lines, each beginning with "- ".', "lower": "Write in lower-case letters only."}
FORMS = {"words": (10, 20), "sentences": (1, 2, 3), "list": (2, 3, 4), "lower": (0,)}    # form -> amounts that are asked for


def near(found, wanted):
    return max(0.0, 1 - abs(found - wanted) / wanted)


def score(text, form, amount):
    text = text.strip()
    words = text.split()
    if len(words) < 3:
        return 0.0
    if form == "words":
        return min(1.0, amount / len(words))
    if form == "sentences":
        return near(len(re.findall(r"[.!?](?=\s|$)", text)), amount)
    if form == "list":
        lines = [line for line in text.split("\n") if line.strip()]
        return near(len(lines), amount) * sum(line.startswith("- ") for line in lines) / len(lines)
    letters = [c for c in text if c.isalpha()]
    return sum(c.islower() for c in letters) / len(letters) if letters else 0.0


def reward(prompts, completions, form, amount):
    return [score(*row) for row in zip(completions, form, amount)]
