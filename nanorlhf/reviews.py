"""The built-in task: short English reviews whose true reward is known exactly.

One small grammar, read in both directions: `plan` and `render` write a review, `parse` reads it back, and they invert
each other: parse(render(rng, clauses)).clauses == clauses. `gold_reward` is therefore arithmetic, not a model, and what
a learned reward model believes can be held against it. (The controlled-sentiment setting of Rafailov et al. 2023,
section 6.1, with the classifier replaced by a parser.)

    prompt      Review of the film Silent River:
    completion   The plot is gripping and the acting was very good. Sadly, the script was not great.

A review makes clauses; a clause says of one aspect ("script") a phrase ("not great") of known sentiment in [-1, 1].
The grammar, where A is an aspect and P a phrase; sentences start with a capital and end with a full stop:

    sentence    clause | opener, clause | clause and clause | clause, but clause | clause, yet clause
                | although clause, clause | a closing sentence from CLOSERS
    clause      the A is P | the A was P | I found the A P | I VERB the A
    phrase      adjective | modifier adjective

It is stricter than its words, so that what parses makes sense: an opener or connective must agree with the signs
(no "Sadly, the plot was superb"), an adjective suit its aspect (no "tasty engine"), a modifier its adjective (no "very
superb").
"""

import re
import zlib
from bisect import bisect
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import NamedTuple

import numpy as np

# ---- The world ------------------------------------------------------------------------------------------------------

# A domain's own noun ("the film") is an aspect of it too, and so is "it", which only the closing sentences speak about.
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

# Sentiment of an adjective that any aspect can take. Modifiers scale the middling ones only: the strong are limits
# already (nothing is "very superb"; so all phrases lie in [-1, 1] with no clipping), and the weak take no modifier.
ADJECTIVES = {
    "awful": -1.0, "terrible": -1.0, "horrible": -0.9, "dreadful": -0.9, "bad": -0.7, "poor": -0.65,
    "disappointing": -0.6, "weak": -0.5, "dull": -0.5, "mediocre": -0.35, "bland": -0.25, "forgettable": -0.25,
    "passable": 0.2, "decent": 0.3, "fine": 0.35, "nice": 0.45, "pleasant": 0.5, "good": 0.6,
    "lovely": 0.65, "impressive": 0.7, "great": 0.8, "wonderful": 0.9, "excellent": 0.95, "superb": 1.0,
}  # fmt: skip
WEAK, STRONG = 0.4, 0.7  # below WEAK, and above STRONG

# Adjectives of some aspects only. The last three lines suit only aspects that FAR domains alone have, so no
# demonstration or comparison ever contains them: what a learned reward makes of "spotless" is its own guess.
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

# What a modifier multiplies an adjective by. A negation flips it and damps it: "not bad" is less than good.
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
OPENERS = {"sadly": -1, "luckily": 1, "happily": 1, "overall": 0}  # the sign of the clause it opens; 0: any
CONTRAST = {" and ": 1, ", but ": -1, ", yet ": -1}  # the product of the signs it joins

FIRST_WORDS = tuple(
    "Silent Golden Broken Hidden Lonely Crimson Frozen Distant Burning Empty "
    "Secret Ancient Velvet Stolen Paper Winter Iron Hollow Electric Northern".split()
)
SECOND_WORDS = tuple(
    "River Garden Tower Mirror Harbor Forest Letter Island Bridge Shadow "
    "Kingdom Station Moon Road Circle Valley Storm Window Planet Orchard".split()
)
# Held out for the split ood_near. They may occur in the corpus (a token never seen would be noise, not a shift).
HELD_OUT_FIRST = ("Scarlet", "Wandering", "Midnight", "Copper", "Quiet", "Savage")
HELD_OUT_SECOND = ("Lantern", "Desert", "Voyage", "Castle", "Ocean", "Puzzle")

SPLITS = ("train", "test", "ood_near", "ood_far")

# ---- The gold reward's constants ------------------------------------------------------------------------------------

MIN_CLAUSES = 3  # a review of fewer clauses is divided by this all the same, so that one "superb" is not the optimum
# One more clause raises the mean by 1/2 at the most (from three times -1 to a +1 beside them). The two penalties
# charged per clause lie above that: adding a clause that is foreign or a repetition never pays.
FOREIGN_PENALTY = 0.6  # a clause about an aspect that the prompt's domain does not have
REPEAT_PENALTY = 0.6  # a clause about an aspect already spoken of
UNPARSED_PENALTY = 0.4  # a sentence that does not parse
UNFINISHED_PENALTY = 0.4  # the text does not end with a full stop
REWARD_MIN, REWARD_MAX = -2.0, 1.0  # REWARD_MIN: empty or clauseless text, and the floor under piled-up penalties

# ---- The grammar as tables, shared by writer and reader -------------------------------------------------------------


def _phrases(adjective: str, strength: float) -> dict[str, dict[str, float]]:
    """Kind of phrase -> {phrase: sentiment}, for all that can be said with one adjective."""
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


def _aspect_tables() -> tuple[dict, dict]:
    """SENTIMENT[aspect][phrase] for the reader; MENU[aspect][kind], lists sorted by sentiment, for the writer."""
    sentiment, menu = {IT: dict(CLOSERS)}, {IT: {"closer": sorted((s, p) for p, s in CLOSERS.items())}}
    for aspect in {noun for domain in DOMAINS for noun in aspects(domain)}:
        own = {word: s for word, (s, suits) in OWN_ADJECTIVES.items() if aspect in suits}
        sentiment[aspect], menu[aspect] = dict(VERBS), {"verb": [(s, p) for p, s in VERBS.items()]}
        for adjective, strength in (ADJECTIVES | own).items():
            weight = 3 if adjective in own else 1  # an aspect's own words are few, and would be rare with equal weights
            for kind, phrases in _phrases(adjective, strength).items():
                phrases = {phrase: round(s, 4) for phrase, s in phrases.items()}
                sentiment[aspect] |= phrases
                menu[aspect].setdefault(kind, []).extend([(s, phrase) for phrase, s in phrases.items()] * weight)
        for entries in menu[aspect].values():
            entries.sort()
    return sentiment, menu


def aspects(domain: str) -> tuple[str, ...]:
    """The aspects that a review of `domain` may speak about, its own noun included (and besides them always IT)."""
    return DOMAINS[domain] + (domain,)


SENTIMENT, MENU = _aspect_tables()
KINDS = ("plain",) * 9 + ("scaled",) * 5 + ("negated",) * 3 + ("verb",) * 3  # drawn uniformly: shares of twenty

# ---- Writing --------------------------------------------------------------------------------------------------------


class Clause(NamedTuple):
    """What a review says of one aspect. `sentiment` in [-1, 1], never 0, follows from `phrase`."""

    aspect: str
    sentiment: float
    phrase: str

    @property
    def sign(self) -> int:
        return 1 if self.sentiment > 0 else -1


def _pick(rng: np.random.Generator, options):
    return options[int(rng.random() * len(options))]  # rng.choice costs ten times as much


def plan(rng: np.random.Generator, domain: str, mood: float | None = None) -> list[Clause]:
    """What to say: 2 to 5 clauses about different aspects of `domain`, their sentiments scattered about `mood`.

    mood: about -1 (all bad) to 1 (all good); drawn if None. The mood belongs to the whole text: clauses drawn
    independently would average out, all reviews would earn about 0 and no preference could be learned from them.
    """
    if mood is None:
        mood = 2.5 * rng.random() - 1.15
    topics = list(aspects(domain))
    rng.shuffle(topics)
    topics = topics[: _pick(rng, (2, 3, 3, 4, 4, 5))]
    if rng.random() < 0.3:
        topics = topics[:4] + [IT]
    clauses = []
    for topic in topics:
        kind = "closer" if topic == IT else _pick(rng, KINDS)
        entries = MENU[topic][kind]
        nearest = bisect(entries, (mood + 0.35 * rng.standard_normal(),))
        window = len(entries) // 5 + 1  # any of the fifth about the target, or few words would do all the work
        start = min(max(nearest - window // 2, 0), len(entries) - window)
        sentiment, phrase = _pick(rng, entries[start : start + window])
        clauses.append(Clause(topic, sentiment, phrase))
    return clauses


def _clause_text(rng: np.random.Generator, clause: Clause) -> str:
    if clause.aspect == IT:
        return clause.phrase
    if clause.phrase in VERBS:
        return f"{clause.phrase} the {clause.aspect}"
    form = _pick(rng, ("the {} is {}", "the {} was {}", "the {} is {}", "the {} was {}", "I found the {} {}"))
    return form.format(clause.aspect, clause.phrase)


def render(rng: np.random.Generator, clauses: list[Clause]) -> str:
    """Clauses as text: a completion that starts with a space and ends with a full stop. `rng` chooses the wording."""
    texts, sentences, i = [_clause_text(rng, clause) for clause in clauses], [], 0
    while i < len(clauses):
        clause, text = clauses[i], texts[i]
        following = clauses[i + 1] if i + 1 < len(clauses) else None
        if clause.aspect == IT:
            pass
        elif following is not None and following.aspect != IT and rng.random() < 0.5:
            if clause.sign == following.sign:
                text = f"{text} and {texts[i + 1]}"
            else:
                text = _pick(rng, ("{}, but {}", "{}, yet {}", "although {}, {}")).format(text, texts[i + 1])
            i += 1
        elif rng.random() < 0.25:
            # "Overall" suits a verdict on the whole thing, not on one of its parts.
            fitting = ["overall"] if clause.aspect in DOMAINS else [o for o, s in OPENERS.items() if s == clause.sign]
            text = f"{_pick(rng, fitting)}, {text}"
        sentences.append(f" {text[0].upper()}{text[1:]}.")
        i += 1
    return "".join(sentences)


def generate_review(rng: np.random.Generator, domain: str, mood: float | None = None) -> str:
    """A review of something of `domain` (a key of DOMAINS), as a completion; `mood` as in `plan`."""
    return render(rng, plan(rng, domain, mood))


# ---- Reading --------------------------------------------------------------------------------------------------------

_ASPECT = f"(?P<aspect>{'|'.join(sorted(SENTIMENT, key=len, reverse=True))})"  # "camera work" before "camera"
_CLAUSES = (
    re.compile(rf"the {_ASPECT} (?:is|was) (?P<phrase>[a-z ]+)"),
    re.compile(rf"I found the {_ASPECT} (?P<phrase>[a-z ]+)"),
    re.compile(rf"(?P<phrase>{'|'.join(VERBS)}) the {_ASPECT}"),
)
_JOINT = re.compile(f"({'|'.join(CONTRAST)}|, )")
_PROMPT = re.compile(rf"Review of the ({'|'.join(DOMAINS)}) ")


@dataclass
class Parsed:
    """What a completion says: its clauses in order, the number of sentences that do not parse, and whether it ends."""

    clauses: list[Clause]
    unparsed: int
    finished: bool


def _parse_clause(text: str) -> Clause | None:
    for pattern in _CLAUSES:
        if match := pattern.fullmatch(text):
            aspect, phrase = match["aspect"], match["phrase"]
            sentiment = SENTIMENT[aspect].get(phrase)  # None where the words do not suit each other
            return None if sentiment is None else Clause(aspect, sentiment, phrase)
    return None


def _parse_sentence(text: str) -> list[Clause] | None:
    """The clauses of one sentence (without its full stop), or None if it is not a sentence of the grammar."""
    if not text[:1].isupper():
        return None
    if not text.startswith("I "):
        text = text[0].lower() + text[1:]
    if text in CLOSERS:
        return [Clause(IT, CLOSERS[text], text)]
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
            return None
    clauses = [_parse_clause(text) for text in texts]
    if None in clauses or wanted not in (0, prod(clause.sign for clause in clauses)):
        return None
    return clauses


def parse(completion: str) -> Parsed:
    """Read any string. Space around a sentence does not matter; case and space inside it do.

    Text after the last full stop is read as a sentence too, so that to leave out the last full stop changes nothing but
    `finished`. A full stop with nothing before it counts as a sentence that does not parse.
    """
    *sentences, rest = [piece.strip() for piece in completion.split(".")]
    parsed = Parsed([], 0, finished=bool(sentences) and not rest)
    for sentence in sentences + [rest] * bool(rest):
        clauses = _parse_sentence(sentence)
        if clauses is None:
            parsed.unparsed += 1
        else:
            parsed.clauses += clauses
    return parsed


# ---- The gold reward, and what else follows from the parse ----------------------------------------------------------


def domain_of(prompt: str) -> str | None:
    """The domain that a prompt names, or None."""
    match = _PROMPT.search(prompt)
    return match[1] if match else None


def gold_reward(prompt: str, completion: str) -> float:
    """The true reward of any completion, in [REWARD_MIN, REWARD_MAX]:

        sum of the clauses' sentiments / max(number of clauses, MIN_CLAUSES) - penalties, but REWARD_MIN at the least.

    Text without a single clause is no review and gets REWARD_MIN, be it empty or long. A foreign or repeated clause
    counts like any other and pays besides. No aspect is foreign to a prompt that names no known domain.
    """
    parsed, domain = parse(completion), domain_of(prompt)
    if not parsed.clauses:
        return REWARD_MIN
    spoken_of = [clause.aspect for clause in parsed.clauses]
    own = SENTIMENT if domain is None else (*aspects(domain), IT)
    reward = sum(clause.sentiment for clause in parsed.clauses) / max(len(parsed.clauses), MIN_CLAUSES)
    reward -= FOREIGN_PENALTY * sum(aspect not in own for aspect in spoken_of)
    reward -= REPEAT_PENALTY * (len(spoken_of) - len(set(spoken_of)))
    reward -= UNPARSED_PENALTY * parsed.unparsed + UNFINISHED_PENALTY * (not parsed.finished)
    return max(reward, REWARD_MIN)


def relation(premise: str, hypothesis: str) -> str:
    """How the claims (aspect, sign) of two completions about the same thing relate, as in natural language inference.

    "contradiction" if they share an aspect with opposite signs, else "entailment" if the hypothesis makes claims and
    the premise makes all of them too, else "neutral".
    """
    given = {(clause.aspect, clause.sign) for clause in parse(premise).clauses}
    claims = {(clause.aspect, clause.sign) for clause in parse(hypothesis).clauses}
    if any((aspect, -sign) in given for aspect, sign in claims):
        return "contradiction"
    return "entailment" if claims and claims <= given else "neutral"


# ---- Data -----------------------------------------------------------------------------------------------------------


def make_prompt(domain: str, title: str) -> str:
    """The prompt for a title of two words. It has no quotation marks, so that each word is one token with its space."""
    return f"Review of the {domain} {title}:"


def _is_test(title: str) -> bool:
    return zlib.crc32(title.encode()) % 5 == 0  # not hash(), which differs from one Python process to the next


def _prompts(split: str) -> list[str]:
    """All prompts of a split. A title is in train or in test, whatever the domain, so the two share no prompt."""
    titles = [f"{a} {b}" for a, b in product(FIRST_WORDS, SECOND_WORDS)]
    if split == "train":
        titles = [title for title in titles if not _is_test(title)]
    elif split == "test":
        titles = [title for title in titles if _is_test(title)]
    elif split == "ood_near":
        titles = [f"{a} {b}" for a, b in product(HELD_OUT_FIRST, HELD_OUT_SECOND)]
    elif split != "ood_far":
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    return [make_prompt(d, title) for d in (FAR_DOMAINS if split == "ood_far" else ID_DOMAINS) for title in titles]


def _rng(name: str, seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([zlib.crc32(name.encode()), seed]))


def records(split: str, n: int, seed: int = 0) -> list[dict[str, str]]:
    """`n` records {"prompt", "completion"}: demonstrations ("train"), or prompts to evaluate on and a reference review.

    split: "train"; "test" (same domains, other titles); "ood_near" (title words never demonstrated); "ood_far" (domains
    never demonstrated). Prompts do not repeat before all of the split have been used; a smaller n gives a prefix.
    """
    rng, prompts = _rng(split, seed), _prompts(split)
    rng.shuffle(prompts)
    chosen = (prompts[i % len(prompts)] for i in range(n))
    return [{"prompt": p, "completion": generate_review(rng, domain_of(p))} for p in chosen]


def corpus(n: int, seed: int = 0) -> list[str]:
    """`n` texts (prompt + completion) of all domains and all title words, for a base model and its tokenizer."""
    rng, domains, texts = _rng("corpus", seed), tuple(DOMAINS), []
    for _ in range(n):
        domain = _pick(rng, domains)
        title = f"{_pick(rng, FIRST_WORDS + HELD_OUT_FIRST)} {_pick(rng, SECOND_WORDS + HELD_OUT_SECOND)}"
        texts.append(make_prompt(domain, title) + generate_review(rng, domain))
    return texts
