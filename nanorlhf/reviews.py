"""The built-in task: short English reviews whose true reward is known exactly.

One small grammar works in both directions: `plan` and `render` write a review, and `parse` reads it back, so that
parse(render(rng, clauses)).clauses == clauses. `gold_reward` is therefore arithmetic, not a model, and a learned reward
model can be compared with it. (This is the controlled-sentiment setting of Rafailov et al. 2023, section 6.1, with a
parser in place of the classifier.)

    prompt      Review of the film Silent River: script and acting.
    completion   The acting was very good. Sadly, the script was not great. I would recommend it.

The prompt asks for aspects of a thing. A good answer speaks about all of them, and about nothing else but the thing as a
whole. A review consists of clauses. Each says something about one aspect ("script") in a phrase ("not great"), whose
sentiment in [-1, 1] is known. In the grammar, A is an aspect and P a phrase; sentences start with a capital and end with a
full stop:

    sentence    clause | opener, clause | clause and clause | clause, but clause | clause, yet clause
                | although clause, clause | a closing sentence from CLOSERS
    clause      the A is P | the A was P | I found the A P | I VERB the A
    phrase      adjective | modifier adjective

Two more rules make sure that what parses makes sense: an adjective must suit its aspect (no "tasty engine"), and a modifier
must suit its adjective (no "very superb"). A third costs a little where it is broken: an opener or connective must agree with
the signs of its clauses (no "Sadly, the plot was superb").
"""

import re
import zlib
from bisect import bisect
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product
from math import prod
from typing import NamedTuple

import numpy as np

# ---- Domains and words ----------------------------------------------------------------------------------------------

# The aspects that a prompt can ask for. A domain's own noun ("the film") is an aspect of it too, and so is "it", about which
# only the closing sentences speak. These two stand for the whole thing, and nobody has to ask for them.
DOMAINS = {
    "film": ("plot", "acting", "music", "ending", "script", "camera work"),
    "book": ("plot", "ending", "style", "dialogue", "hero", "cover"),
    "phone": ("screen", "battery", "camera", "design", "price", "sound"),
    "restaurant": ("food", "service", "menu", "wine", "dessert", "price"),
    "game": ("story", "combat", "music", "design", "ending", "price"),
    "hotel": ("room", "bed", "pool", "breakfast", "service", "price"),
    "car": ("engine", "seat", "brake", "design", "sound", "price"),
    "concert": ("band", "singer", "hall", "crowd", "music", "sound"),
}
ID_DOMAINS = ("film", "book", "phone", "restaurant", "game")
FAR_DOMAINS = ("hotel", "car", "concert")  # in the corpus; never in demonstrations, comparisons or training prompts
IT = "it"

# Sentiments of the adjectives that suit any aspect. Modifiers scale only the middling ones: strong adjectives are limits
# already (nothing is "very superb", so all phrases lie in [-1, 1] without clipping), and weak ones take no modifier.
ADJECTIVES = {
    "awful": -1.0, "terrible": -1.0, "horrible": -0.9, "dreadful": -0.9, "bad": -0.7, "poor": -0.65,
    "disappointing": -0.6, "weak": -0.5, "dull": -0.5, "mediocre": -0.35, "bland": -0.25, "forgettable": -0.25,
    "passable": 0.2, "decent": 0.3, "fine": 0.35, "nice": 0.45, "pleasant": 0.5, "good": 0.6,
    "lovely": 0.65, "impressive": 0.7, "great": 0.8, "wonderful": 0.9, "excellent": 0.95, "superb": 1.0,
}  # fmt: skip
WEAK, STRONG = 0.4, 0.7  # adjectives are weak below 0.4 and strong above 0.7

# Adjectives that suit only some aspects. Those in the last three lines suit aspects that only FAR_DOMAINS have, so no
# demonstration or comparison contains them: a learned reward can only guess what "spotless" is worth.
OWN_ADJECTIVES = {
    "gripping": (0.85, ("plot", "story", "book")), "predictable": (-0.5, ("plot", "story", "ending", "dialogue")),
    "moving": (0.6, ("acting", "music", "ending", "story")), "wooden": (-0.6, ("acting", "dialogue", "hero")),
    "witty": (0.65, ("script", "dialogue", "style")), "clumsy": (-0.45, ("script", "style", "design", "combat")),
    "crisp": (0.65, ("screen", "camera", "camera work", "sound")), "blurry": (-0.6, ("screen", "camera")),
    "sleek": (0.55, ("design", "phone", "cover")), "flimsy": (-0.65, ("battery", "cover", "phone")),
    "tasty": (0.65, ("food", "dessert", "wine", "breakfast")), "stale": (-0.7, ("food", "dessert", "breakfast")),
    "friendly": (0.55, ("service", "restaurant", "hotel")), "rude": (-0.85, ("service",)),
    "catchy": (0.5, ("music", "sound")), "tinny": (-0.55, ("music", "sound")),
    "varied": (0.45, ("menu", "combat", "game")), "sour": (-0.6, ("wine", "food", "dessert")),
    "sincere": (0.6, ("acting", "hero", "film")), "confusing": (-0.55, ("menu", "story", "plot", "combat")),
    "fair": (0.4, ("price",)), "steep": (-0.5, ("price",)),
    "spotless": (0.9, ("room", "pool", "hotel")), "filthy": (-0.9, ("room", "pool", "bed", "hall")),
    "cosy": (0.55, ("room", "bed", "seat", "hall")), "noisy": (-0.6, ("engine", "room", "crowd")),
    "powerful": (0.7, ("engine", "brake", "singer", "band")), "shrill": (-0.65, ("singer", "brake", "band")),
}  # fmt: skip

# The factor by which a modifier changes an adjective. A negation flips and weakens it: "not bad" is less than "good".
SCALES = {"extremely": 1.4, "really": 1.3, "very": 1.25, "quite": 0.85, "rather": 0.8, "somewhat": 0.6, "a bit": 0.5}
NEGATIONS = {"not": -0.5, "hardly": -0.6, "never": -0.7, "not very": -0.4}

VERBS = {
    "I hated": -0.9, "I could not stand": -0.8, "I disliked": -0.6, "I did not like": -0.5, "I did not enjoy": -0.4,
    "I did not mind": 0.2, "I liked": 0.5, "I enjoyed": 0.6, "I admired": 0.7, "I loved": 0.9,
}  # fmt: skip
CLOSERS = {
    "it was a waste of money": -0.9, "I would not recommend it": -0.6, "it is not worth the trouble": -0.4,
    "it is worth a try": 0.3, "I would recommend it": 0.6, "it is a real gem": 0.9,
}  # fmt: skip
OPENERS = {"sadly": -1, "luckily": 1, "happily": 1, "overall": 0}  # the sign of the clause it opens; 0 = any
CONTRAST = {" and ": 1, ", but ": -1, ", yet ": -1}  # the product of the signs of the two clauses it joins

FIRST_WORDS = tuple(
    "Silent Golden Broken Hidden Lonely Crimson Frozen Distant Burning Empty "
    "Secret Ancient Velvet Stolen Paper Winter Iron Hollow Electric Northern".split()
)
SECOND_WORDS = tuple(
    "River Garden Tower Mirror Harbor Forest Letter Island Bridge Shadow "
    "Kingdom Station Moon Road Circle Valley Storm Window Planet Orchard".split()
)
# Held out for the split ood_near, but not from the corpus: a token that was never seen would be noise, not a shift.
HELD_OUT_FIRST = ("Scarlet", "Wandering", "Midnight", "Copper", "Quiet", "Savage")
HELD_OUT_SECOND = ("Lantern", "Desert", "Voyage", "Castle", "Ocean", "Puzzle")

SPLITS = ("train", "test", "ood_near", "ood_far")
ASKED = (1, 2)  # how many aspects a prompt asks for
ASKED_NEAR = 3  # in the split ood_near: more at once than the corpus, a demonstration or a training prompt ever asks for

# ---- The gold reward's constants ------------------------------------------------------------------------------------

MIN_CLAUSES = 3  # the sum of fewer clauses is still divided by this, so that one "superb" is not the optimum
# One clause more or less changes the mean by at most 1/2 (a +1 after three clauses of -1). The three penalties per aspect are
# larger than that, so it never pays to be silent about what was asked, nor to add a clause that was not.
MISSING_PENALTY = 0.6  # an aspect that the prompt asks for and no clause is about
UNASKED_PENALTY = 0.6  # a clause about an aspect that the prompt does not ask for, or that its domain does not have
REPEAT_PENALTY = 0.6  # a clause about an aspect that an earlier clause was about
UNPARSED_PENALTY = 0.4  # a sentence that does not parse
SLIP_PENALTY = 0.2  # a sentence whose opener or connective contradicts its clauses
UNFINISHED_PENALTY = 0.4  # the text does not end with a full stop
REWARD_MIN, REWARD_MAX = -2.0, 1.0  # REWARD_MIN: for text without a clause, and the lowest value that penalties reach

# ---- The grammar as tables, shared by writer and reader -------------------------------------------------------------


def _phrases(adjective, strength):
    """Returns {kind of phrase: {phrase: sentiment}} for all phrases with one adjective."""
    scaled, negated = {}, {}
    if WEAK <= abs(strength) <= STRONG:
        scaled = {f"{word} {adjective}": strength * scale for word, scale in SCALES.items()}
        if strength > 0:
            del scaled[f"a bit {adjective}"]  # "a bit dull", but not "a bit good"
    if WEAK <= abs(strength):
        negated = {f"{word} {adjective}": strength * scale for word, scale in NEGATIONS.items()}
        if not scaled:
            del negated[f"not very {adjective}"]
    return {"plain": {adjective: strength}, "scaled": scaled, "negated": negated}


def _aspect_tables():
    """Returns SENTIMENT[aspect][phrase], a number, for the reader, and MENU[aspect][kind], a list of (sentiment, phrase)
    sorted by sentiment, for the writer."""
    sentiment, menu = {IT: dict(CLOSERS)}, {IT: {"closer": sorted((s, p) for p, s in CLOSERS.items())}}
    for aspect in {noun for domain in DOMAINS for noun in aspects(domain)}:
        special = {word: s for word, (s, suits) in OWN_ADJECTIVES.items() if aspect in suits}
        sentiment[aspect], menu[aspect] = dict(VERBS), {"verb": [(s, p) for p, s in VERBS.items()]}
        for adjective, strength in (ADJECTIVES | special).items():
            weight = 3 if adjective in special else 1  # these are few, and would be rare with equal weights
            for kind, phrases in _phrases(adjective, strength).items():
                phrases = {phrase: round(s, 4) for phrase, s in phrases.items()}
                sentiment[aspect] |= phrases
                menu[aspect].setdefault(kind, []).extend([(s, phrase) for phrase, s in phrases.items()] * weight)
        for entries in menu[aspect].values():
            entries.sort()
    return sentiment, menu


def aspects(domain):
    """Returns the aspects, a tuple, that a review of `domain` may speak about besides IT. Its own noun is one of them."""
    return DOMAINS[domain] + (domain,)


SENTIMENT, MENU = _aspect_tables()
KINDS = ("plain",) * 9 + ("scaled",) * 5 + ("negated",) * 3 + ("verb",) * 3  # drawn uniformly: shares of 20
STRAY = 0.2  # the share of reviews that speak about something else instead of one aspect that was asked for

# ---- Writing --------------------------------------------------------------------------------------------------------


class Clause(NamedTuple):
    """What a review says about one aspect. `sentiment`, in [-1, 1] and never 0, follows from `phrase`."""

    aspect: str
    sentiment: float
    phrase: str

    @property
    def sign(self):
        return 1 if self.sentiment > 0 else -1


def _pick(rng, options):
    return options[int(rng.random() * len(options))]  # rng.choice takes ten times as long


def plan(rng, domain, mood=None, asked=()):
    """Returns what to say: 1 to 5 Clauses about different aspects of `domain`, with sentiments scattered around `mood`.

    rng: a numpy Generator; mood: about -1 (all bad) to 1 (all good), drawn if None. The whole text has one mood, because
    independent clauses would average out: all reviews would earn about 0, and no preference could be learned from them.
    asked: aspects that were asked for, drawn if there are none. They come in this order, and a verdict on the whole last. One
    review in five speaks about something else instead of one of them. People do that, and without such answers a reward model
    could not learn that it matters.
    """
    if mood is None:
        mood = 2.5 * rng.random() - 1.15
    others = [a for a in DOMAINS[domain] if a not in asked]
    rng.shuffle(others)
    topics = list(asked) or [others.pop() for _ in range(_pick(rng, (*ASKED, ASKED_NEAR)))]
    if rng.random() < STRAY:
        topics[_pick(rng, range(len(topics)))] = others[0]
    if rng.random() < 0.4:
        topics.append(domain)
    if rng.random() < 0.3:
        topics.append(IT)
    clauses = []
    for topic in topics:
        kind = "closer" if topic == IT else _pick(rng, KINDS)
        entries = MENU[topic][kind]
        nearest = bisect(entries, (mood + 0.25 * rng.standard_normal(),))
        window = len(entries) // 5 + 1  # any entry of the nearest fifth: the nearest one alone would repeat few words
        start = min(max(nearest - window // 2, 0), len(entries) - window)
        sentiment, phrase = _pick(rng, entries[start : start + window])
        clauses.append(Clause(topic, sentiment, phrase))
    return clauses


def _clause_text(rng, clause):
    if clause.aspect == IT:
        return clause.phrase
    if clause.phrase in VERBS:
        return f"{clause.phrase} the {clause.aspect}"
    form = _pick(rng, ("the {} is {}", "the {} was {}", "the {} is {}", "the {} was {}", "I found the {} {}"))
    return form.format(clause.aspect, clause.phrase)


def render(rng, clauses):
    """Writes Clauses as text: a completion that starts with a space and ends with a full stop. `rng` chooses the wording."""
    texts, sentences, i = [_clause_text(rng, clause) for clause in clauses], [], 0
    while i < len(clauses):
        clause, text = clauses[i], texts[i]
        following = clauses[i + 1] if i + 1 < len(clauses) else None
        if clause.aspect == IT:
            pass
        elif following is not None and following.aspect != IT and rng.random() < 0.4:
            if clause.sign == following.sign:
                text = f"{text} and {texts[i + 1]}"
            else:
                text = _pick(rng, ("{}, but {}", "{}, yet {}", "although {}, {}")).format(text, texts[i + 1])
            i += 1
        elif rng.random() < 0.2:
            # "Overall" suits a verdict on the whole thing, not on one of its parts.
            fitting = ["overall"] if clause.aspect in DOMAINS else [o for o, s in OPENERS.items() if s == clause.sign]
            text = f"{_pick(rng, fitting)}, {text}"
        sentences.append(f" {text[0].upper()}{text[1:]}.")
        i += 1
    return "".join(sentences)


def generate_review(rng, domain, mood=None, asked=()):
    """Writes a completion that reviews something of `domain`, a key of DOMAINS; `mood` and `asked` as in `plan`."""
    return render(rng, plan(rng, domain, mood, asked))


# ---- Reading --------------------------------------------------------------------------------------------------------

_ASPECT = f"(?P<aspect>{'|'.join(sorted(SENTIMENT, key=len, reverse=True))})"  # "camera work" before "camera"
_CLAUSES = (
    re.compile(rf"the {_ASPECT} (?:is|was) (?P<phrase>[a-z ]+)"),
    re.compile(rf"I found the {_ASPECT} (?P<phrase>[a-z ]+)"),
    re.compile(rf"(?P<phrase>{'|'.join(VERBS)}) the {_ASPECT}"),
)
_JOINT = re.compile(f"({'|'.join(CONTRAST)}|, )")
_PROMPT = re.compile(rf"Review of the ({'|'.join(DOMAINS)}) [^:]*(?:: ([^.]*))?")


@dataclass
class Parsed:
    """What a completion says: its clauses in order, how many sentences do not parse, how many contradict themselves, and if it
    ends with a full stop."""

    clauses: list[Clause]
    unparsed: int
    slips: int
    finished: bool


def _parse_clause(text):
    """Returns the Clause that the text is, or None."""
    for pattern in _CLAUSES:
        if match := pattern.fullmatch(text):
            aspect, phrase = match["aspect"], match["phrase"]
            sentiment = SENTIMENT[aspect].get(phrase)  # None if the phrase does not suit the aspect
            return None if sentiment is None else Clause(aspect, sentiment, phrase)
    return None


def _parse_sentence(text):
    """Returns (Clauses, whether they agree with opener and connective) of one sentence, given without its full stop. The Clauses
    are None if the grammar has no such sentence."""
    if not text[:1].isupper():
        return None, True
    if not text.startswith("I "):
        text = text[0].lower() + text[1:]
    if text in CLOSERS:
        return [Clause(IT, CLOSERS[text], text)], True
    match _JOINT.split(text, maxsplit=2):
        case [head]:
            texts, wanted = [head], 0
        case [opener, ", ", head] if opener in OPENERS:
            texts, wanted = [head], OPENERS[opener]
        case [head, ", ", tail] if head.startswith("although "):
            texts, wanted = [head.removeprefix("although "), tail], -1
        case [head, joint, tail] if joint in CONTRAST:
            texts, wanted = [head, tail], CONTRAST[joint]
        case _:
            return None, True
    clauses = [_parse_clause(text) for text in texts]
    if None in clauses:
        return None, True
    return clauses, wanted in (0, prod(clause.sign for clause in clauses))


def parse(completion):
    """Reads any string and returns a Parsed. Space around a sentence does not matter; case and space inside it do.

    Text after the last full stop is read as a sentence too, so leaving out the last full stop changes only `finished`.
    A full stop with nothing before it counts as a sentence that does not parse.
    """
    *sentences, unended = [piece.strip() for piece in completion.split(".")]
    parsed = Parsed([], 0, 0, finished=bool(sentences) and not unended)
    if unended:
        sentences.append(unended)
    for sentence in sentences:
        clauses, agree = _parse_sentence(sentence)
        parsed.unparsed += clauses is None
        parsed.slips += not agree
        parsed.clauses += clauses or []
    return parsed


# ---- The gold reward and other functions of the parse ---------------------------------------------------------------


def domain_of(prompt):
    """Returns the domain that a prompt names, or None."""
    match = _PROMPT.search(prompt)
    return match[1] if match else None


def asked_of(prompt):
    """Returns the aspects, a tuple, that a prompt asks for: () if it asks for nothing in particular, or names no domain."""
    match = _PROMPT.search(prompt)
    wishes = re.split(", | and ", match[2]) if match and match[2] else ()
    return tuple(wish for wish in wishes if wish in DOMAINS[match[1]])


def gold_reward(prompt, completion):
    """Returns the true reward of any completion, a number in [REWARD_MIN, REWARD_MAX]:

        sum of the clauses' sentiments / max(number of clauses, MIN_CLAUSES) - penalties, but at least REWARD_MIN.

    Text without a clause, whether empty or long, is not a review and gets REWARD_MIN. An unasked or repeated clause counts
    like any other and also costs its penalty. If the prompt asks for nothing in particular, all aspects of its domain are
    welcome; if it names no known domain, all aspects are.
    """
    parsed, domain, asked = parse(completion), domain_of(prompt), asked_of(prompt)
    if not parsed.clauses:
        return REWARD_MIN
    spoken_of = [clause.aspect for clause in parsed.clauses]
    allowed = SENTIMENT if domain is None else (*(asked or DOMAINS[domain]), domain, IT)
    reward = sum(clause.sentiment for clause in parsed.clauses) / max(len(parsed.clauses), MIN_CLAUSES)
    reward -= MISSING_PENALTY * sum(aspect not in spoken_of for aspect in asked)
    reward -= UNASKED_PENALTY * sum(aspect not in allowed for aspect in spoken_of)
    reward -= REPEAT_PENALTY * (len(spoken_of) - len(set(spoken_of)))
    reward -= UNPARSED_PENALTY * parsed.unparsed + SLIP_PENALTY * parsed.slips + UNFINISHED_PENALTY * (not parsed.finished)
    return max(reward, REWARD_MIN)


def relation(premise, hypothesis):
    """Compares the claims (aspect, sign) of two completions about the same thing, as in natural language inference.

    Returns "contradiction" if they share an aspect with opposite signs, else "entailment" if the hypothesis makes claims
    and the premise makes all of them too, else "neutral".
    """
    given = {(clause.aspect, clause.sign) for clause in parse(premise).clauses}
    claims = {(clause.aspect, clause.sign) for clause in parse(hypothesis).clauses}
    if any((aspect, -sign) in given for aspect, sign in claims):
        return "contradiction"
    return "entailment" if claims and claims <= given else "neutral"


# ---- Data -----------------------------------------------------------------------------------------------------------


def make_prompt(domain, title, asked=()):
    """Returns the prompt for a title of two words and the aspects asked for, if any. It has no quotation marks, so each word
    is one token with its space."""
    *some, last = asked or [""]
    wish = f" {', '.join(some)} and {last}." if some else f" {last}." if last else ""
    return f"Review of the {domain} {title}:{wish}"


def _is_test(title):
    return zlib.crc32(title.encode()) % 5 == 0  # not hash(), which differs from one Python process to the next


@cache
def _prompts(split):
    """Returns all prompts of a split. A title is in train or in test for all domains, so the two share no prompt."""
    titles = [f"{a} {b}" for a, b in product(FIRST_WORDS, SECOND_WORDS)]
    if split == "train":
        titles = [title for title in titles if not _is_test(title)]
    elif split == "test":
        titles = [title for title in titles if _is_test(title)]
    elif split == "ood_near":
        titles = [f"{a} {b}" for a, b in product(HELD_OUT_FIRST, HELD_OUT_SECOND)]
    elif split != "ood_far":
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    counts = (ASKED_NEAR,) if split == "ood_near" else ASKED
    return [make_prompt(domain, title, asked) for domain in (FAR_DOMAINS if split == "ood_far" else ID_DOMAINS)
            for title in titles for count in counts for asked in permutations(DOMAINS[domain], count)]


def _rng(name, seed):
    return np.random.Generator(np.random.PCG64([zlib.crc32(name.encode()), seed]))


def _review_for(rng, prompt):
    return generate_review(rng, domain_of(prompt), asked=asked_of(prompt))


def records(split, n, seed=0):
    """Returns `n` records {"prompt", "completion"}: demonstrations, or prompts to evaluate on, with a reference review each.

    split: "train" (the demonstrations); "test" (the same domains, other titles); "ood_near" (title words never demonstrated,
    and more aspects at once); "ood_far" (domains never demonstrated). No prompt repeats before the split is used up; a
    smaller n gives a prefix.
    """
    rng, prompts = _rng(split, seed), _prompts(split)
    order = rng.permutation(len(prompts))
    chosen = (prompts[order[i % len(prompts)]] for i in range(n))
    return [{"prompt": p, "completion": _review_for(rng, p)} for p in chosen]


def corpus(n, seed=0):
    """Returns `n` texts (prompt + completion) from all domains and title words, for a base model and its tokenizer."""
    rng, domains, texts = _rng("corpus", seed), tuple(DOMAINS), []
    for _ in range(n):
        domain = _pick(rng, domains)
        title = f"{_pick(rng, FIRST_WORDS + HELD_OUT_FIRST)} {_pick(rng, SECOND_WORDS + HELD_OUT_SECOND)}"
        prompt = make_prompt(domain, title, rng.permutation(DOMAINS[domain])[: _pick(rng, ASKED)].tolist())
        texts.append(prompt + _review_for(rng, prompt))
    return texts
