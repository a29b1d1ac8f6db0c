"""How happy a story is, by its words: used as --reward happy.py:reward. In [-1, 1]; each word counts once, however often it
is said, so that saying it again gains nothing."""

import re

HAPPY = set("happy happily smile smiled smiling laugh laughed laughing love loved loves hug hugged fun friend friends play "
            "played playing kind nice good great best glad thank thanked share shared sharing proud excited enjoy enjoyed gift "
            "cake dance danced sing sang safe help helped beautiful pretty warm yummy wonderful hooray yay".split())
SAD = set("sad sadly cry cried crying scared afraid angry mad bad mean hurt hurts lost fell broke broken sick sorry alone dark "
          "fight fought hit pain tears worried upset dirty cold hungry tired stole scary hard wrong never stop stopped".split())


def reward(prompts, completions):
    def score(text):
        words = set(re.findall(r"[a-z]+", text.lower()))
        good, bad = len(words & HAPPY), len(words & SAD)
        return (good - bad) / (good + bad + 2)
    return [score(c) for c in completions]
