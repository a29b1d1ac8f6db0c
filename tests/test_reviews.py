"""Tests of the built-in task: the parser inverts the generator, and the gold reward is what its docstring says."""

import math
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanorlhf import reviews
from nanorlhf.reviews import (
    DOMAINS,
    FAR_DOMAINS,
    ID_DOMAINS,
    IT,
    MISSING_PENALTY,
    REPEAT_PENALTY,
    REWARD_MAX,
    REWARD_MIN,
    SLIP_PENALTY,
    SPLITS,
    UNASKED_PENALTY,
    UNFINISHED_PENALTY,
    UNPARSED_PENALTY,
    asked_of,
    aspects,
    corpus,
    domain_of,
    generate_review,
    gold_reward,
    parse,
    plan,
    records,
    relation,
    render,
)
from sample_bon import label_ceiling, prefers

FILM = "Review of the film Silent River:"


def film_reward(text):
    return gold_reward(FILM, text)


def words(texts):
    return set(re.findall(r"\w+", " ".join(texts)))


def title_words(rows):
    return {word for row in rows for word in title(row["prompt"]).split()}


def title(prompt):
    return " ".join(prompt.split(":")[0].split()[-2:])


@pytest.fixture(scope="module")
def demonstrations():
    return records("train", 4000, seed=1)


@pytest.fixture(scope="module")
def rewards(demonstrations):
    return np.array([gold_reward(**row) for row in demonstrations])


# ---- Writer and reader ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", DOMAINS)
def test_parse_inverts_render(domain):
    rng, strayed = np.random.default_rng(0), 0
    for i in range(1000):
        asked = tuple(rng.permutation(DOMAINS[domain])[: i % 4].tolist())
        prompt = reviews.make_prompt(domain, "Silent River", asked)
        assert domain_of(prompt) == domain and asked_of(prompt) == asked
        clauses = plan(rng, domain, asked=asked)
        text = render(rng, clauses)
        parsed = parse(text)
        assert parsed.clauses == clauses and parsed.unparsed == parsed.slips == 0 and parsed.finished, text
        assert text.startswith(" ") and text.endswith(".") and 1 <= len(clauses) <= 5
        spoken_of = {clause.aspect for clause in clauses}
        assert len(spoken_of) == len(clauses) and spoken_of <= {*aspects(domain), IT}
        missing, unasked = set(asked) - spoken_of, spoken_of - {*asked, domain, IT} if asked else set()
        assert len(missing) == len(unasked) <= 1
        strayed += len(missing) * 4 / 3 / 1000  # of the three quarters of the prompts that ask for something
        mean = sum(clause.sentiment for clause in clauses) / max(len(clauses), 3)
        penalty = (MISSING_PENALTY + UNASKED_PENALTY) * len(missing)
        assert gold_reward(prompt, text) == pytest.approx(max(mean - penalty, REWARD_MIN))
    assert strayed == pytest.approx(reviews.STRAY, abs=0.05)


def test_every_phrase_of_the_world_parses():
    for aspect, phrases in reviews.SENTIMENT.items():
        for phrase, sentiment in phrases.items():
            if aspect == IT:
                text = f" {phrase[0].upper()}{phrase[1:]}."
            else:
                text = f" {phrase} the {aspect}." if phrase in reviews.VERBS else f" The {aspect} is {phrase}."
            assert parse(text).clauses == [(aspect, sentiment, phrase)]
            assert 0 < abs(sentiment) <= 1


def test_mood_sets_the_reward_of_the_whole_text():
    rng = np.random.default_rng(0)
    for domain in DOMAINS:
        prompt = reviews.make_prompt(domain, "Silent River")
        low, middle, high = (
            np.mean([gold_reward(prompt, generate_review(rng, domain, mood)) for _ in range(100)])
            for mood in (-1, 0, 1)
        )
        assert low < -0.4 and -0.25 < middle < 0.25 and high > 0.4


@pytest.mark.parametrize(
    "text, expected",
    [
        (" The plot is gripping and the acting was very good.", [("plot", 0.85), ("acting", 0.75)]),
        (" I found the music a bit dull, but the ending is superb.", [("music", -0.25), ("ending", 1.0)]),
        (" Although the camera work was crisp, I found the plot poor.", [("camera work", 0.65), ("plot", -0.65)]),
        (" I loved the camera work. Overall, the film was fine.", [("camera work", 0.9), ("film", 0.35)]),
        (" Sadly, the script was not great. I would not recommend it.", [("script", -0.4), ("it", -0.6)]),
        (" The plot is not bad, yet I did not like the cover.", [("plot", 0.35), ("cover", -0.5)]),
    ],
)
def test_sentences_parse_to_the_expected_clauses(text, expected):
    parsed = parse(text)
    assert [(clause.aspect, clause.sentiment) for clause in parsed.clauses] == expected
    assert parsed.unparsed == 0 and parsed.finished


@pytest.mark.parametrize(
    "sentence",
    [
        "The plot is good, the acting is superb",
        "The plot is good and the acting is superb and the music is fine",
        "The plot is tasty",  # an adjective for other aspects
        "The plot is very superb",  # superb takes no intensifier
        "The plot is a bit good",
        "The plot is",
        "The weather is good",
        "the plot is good",
        "The  plot is good",
        "The plot is I loved",
        "Although the plot is good",
        "Sadly",
        "",
    ],
)
def test_ungrammatical_sentences_do_not_parse(sentence):
    parsed = parse(f" {sentence}. The music is good.")
    assert parsed.unparsed == 1 and parsed.finished and [clause.aspect for clause in parsed.clauses] == ["music"]


@pytest.mark.parametrize(
    "sentence, slip",
    [
        ("Sadly, the plot was superb", True),  # the opener contradicts the sentiment
        ("Sadly, the plot was dull", False),
        ("Overall, the film was superb", False),
        ("The plot is bad, but the acting is awful", True),  # "but" without a contrast
        ("The plot is bad, but the acting is superb", False),
        ("The plot is good and the acting is awful", True),
        ("Although the plot is good, the acting is superb", True),
    ],
)
def test_an_opener_or_connective_that_contradicts_its_clauses_costs_a_little(sentence, slip):
    parsed = parse(f" {sentence}.")
    clauses = parsed.clauses
    assert parsed.slips == slip and parsed.unparsed == 0 and parsed.finished
    assert film_reward(f" {sentence}.") == pytest.approx(sum(c.sentiment for c in clauses) / 3 - SLIP_PENALTY * slip)


# ---- Gold reward ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        (" The plot is superb.", 1 / 3),  # one clause is not the optimum
        (" The plot is superb and the acting is superb. I loved the music.", 2.9 / 3),
        (" The plot is superb. The acting is bad. I liked the music. The script is fine.", (1 - 0.7 + 0.5 + 0.35) / 4),
        (" The plot is superb. The plot is superb. The plot is superb.", 1 - 2 * REPEAT_PENALTY),
        (" The plot is superb. The battery is superb. The music is superb.", 1 - UNASKED_PENALTY),
        (" The plot is superb. What a film.", 1 / 3 - UNPARSED_PENALTY),
        (" The plot is superb", 1 / 3 - UNFINISHED_PENALTY),
        (" The plot is superb. The acting is ver", 1 / 3 - UNPARSED_PENALTY - UNFINISHED_PENALTY),
        (" The plot is superb..", 1 / 3 - UNPARSED_PENALTY),
        ("", REWARD_MIN),
        (" What a film.", REWARD_MIN),
        (" The plot is superb." * 1000, REWARD_MIN),
    ],
)
def test_the_gold_reward_has_the_expected_value(text, expected):
    assert film_reward(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    "asked, penalties",
    [
        ("plot", UNASKED_PENALTY),
        ("acting", UNASKED_PENALTY),
        ("acting and plot", 0),
        ("music", 2 * UNASKED_PENALTY + MISSING_PENALTY),
        ("music, plot and acting", MISSING_PENALTY),
        ("music, ending and script", 2 * UNASKED_PENALTY + 3 * MISSING_PENALTY),
    ],
)
def test_what_was_asked_must_be_delivered_and_nothing_else(asked, penalties):
    prompt = f"Review of the film Silent River: {asked}."
    assert asked_of(prompt) == tuple(asked.replace(" and ", ", ").split(", "))
    text = " The plot is superb and the acting is superb. I loved the film. It is a real gem."
    assert gold_reward(prompt, text) == pytest.approx(max(3.8 / 4 - penalties, REWARD_MIN))


@pytest.mark.parametrize("prompt", [FILM, "Review of the film Silent River: weather.", "Is the plot good?", "", "the plot and music."])
def test_a_prompt_can_ask_for_nothing(prompt):
    assert asked_of(prompt) == ()


def test_answering_another_prompt_of_the_domain_costs_more_than_a_unit(demonstrations):
    """What a policy that ignores the wish loses: the reward of each demonstration after another prompt of its domain."""
    loss = []
    for domain in ID_DOMAINS:
        rows = [row for row in demonstrations if domain_of(row["prompt"]) == domain]
        loss += [gold_reward(**row) - gold_reward(other["prompt"], row["completion"]) for row, other in zip(rows, rows[1:])]
    assert 1.0 < np.mean(loss) < 1.3


def test_silence_about_what_was_asked_never_pays(demonstrations):
    for row in demonstrations[:500]:
        prompt, clauses = row["prompt"], parse(row["completion"]).clauses
        if set(asked_of(prompt)) <= {clause.aspect for clause in clauses}:
            rng, reward = np.random.default_rng(0), gold_reward(prompt, row["completion"])
            for i, clause in enumerate(clauses):
                if clause.aspect in asked_of(prompt):
                    assert gold_reward(prompt, render(rng, clauses[:i] + clauses[i + 1:])) < reward


def test_each_penalty_lowers_the_reward(demonstrations):
    for row in demonstrations[:500]:
        prompt, text = row["prompt"], row["completion"]
        reward, domain = gold_reward(prompt, text), domain_of(prompt)
        named = parse(text).clauses[0].aspect
        foreign = next(a for d in DOMAINS for a in aspects(d) if a not in aspects(domain))
        repeated = " It is a real gem." if named == IT else f" The {named} is superb."
        if reward < REWARD_MIN + 0.6:
            continue  # no room for another penalty
        assert gold_reward(prompt, text[:-1]) == pytest.approx(reward - UNFINISHED_PENALTY)
        assert gold_reward(prompt, text + " Blah blah.") == pytest.approx(reward - UNPARSED_PENALTY)
        assert gold_reward(prompt, text + repeated) < reward
        assert gold_reward(prompt, text + f" The {foreign} is superb.") < reward
        assert gold_reward("No prompt known", text + f" The {foreign} is superb.") > reward - UNASKED_PENALTY


def test_adding_to_the_worst_review_never_pays():
    worst = " The plot is awful. The acting is awful. The music is awful."
    assert film_reward(worst) == -1
    for added in (" The plot is superb.", " The battery is superb.", " Blah."):
        assert film_reward(worst + added) < -1


def test_a_stronger_adjective_earns_more():
    ladder = [film_reward(f" The plot is {word}. The music is good.") for word in reviews.ADJECTIVES]
    assert ladder == sorted(ladder) and ladder[0] < ladder[-1]  # the table is in ascending order
    scaled = [film_reward(f" The plot is {word} good.") for word in ("somewhat", "quite", "very", "extremely")]
    assert scaled == sorted(scaled) and len(set(scaled)) == 4


@pytest.mark.parametrize("adjective", ["awful", "bad", "good", "superb", "gripping"])
@pytest.mark.parametrize("negation", ["not", "hardly", "never"])
def test_negation_flips_and_weakens_the_sentiment(adjective, negation):
    plain, negated = film_reward(f" The plot is {adjective}."), film_reward(f" The plot is {negation} {adjective}.")
    assert plain * negated < 0 and abs(negated) < abs(plain)


NEARLY_GRAMMATICAL = st.lists(
    st.sampled_from(
        sorted(
            {"The ", "the ", " is ", " and ", ", but ", ", ", ".", "I found ", "I loved ", "Although ", "Sadly, ", " "}
            | {"plot", "acting", "battery", "good", "superb", "very good", "not", "It is a real gem", "\n", "İ", "\x00"}
        )
    ),
    max_size=40,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.text() | NEARLY_GRAMMATICAL, st.text() | st.just(FILM))
@example(" The plot is superb." * 20000, FILM)
@example("." * 100000, FILM)
@example("The plot is " + "very " * 50000, FILM)
@example("I" + " and " * 50000, FILM)
@example("\ud800", FILM)
def test_any_string_has_a_reward_in_range(text, prompt):
    reward = gold_reward(prompt, text)
    assert isinstance(reward, float) and math.isfinite(reward) and REWARD_MIN <= reward <= REWARD_MAX
    assert gold_reward(prompt, "") <= reward
    assert relation(text, text) in ("entailment", "contradiction", "neutral")


# ---- Relation and labels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "premise, hypothesis, expected",
    [
        (" The plot is good. The acting was superb.", " I loved the plot.", "entailment"),
        (" I loved the plot.", " The plot is good. The acting was superb.", "neutral"),
        (" The plot is good.", " The plot is not good.", "contradiction"),
        (" The plot is good. The music was bad.", " The music is lovely. The ending is fine.", "contradiction"),
        (" The plot is not bad.", " The plot is superb.", "entailment"),
        (" The plot is good.", " The music is good.", "neutral"),
        (" I would recommend it.", " It was a waste of money.", "contradiction"),
        (" The plot is good.", "", "neutral"),
        ("", " The plot is good.", "neutral"),
    ],
)
def test_relation_is_entailment_contradiction_or_neutral(premise, hypothesis, expected):
    assert relation(premise, hypothesis) == expected


def test_label_ceiling_is_the_accuracy_of_a_perfect_judge(rewards):
    rng = np.random.default_rng(0)
    a, b = rewards[::2], rewards[1::2]
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x != y]
    agreement = [prefers(x, y, 0.2, rng) == (x > y) for x, y in pairs * 5]
    apart = a != b
    ceiling = label_ceiling(a[apart], b[apart], 0.2)
    assert np.mean(agreement) == pytest.approx(ceiling, abs=0.015)
    assert 0.80 < label_ceiling(a, b, 0.2) < 0.90
    assert label_ceiling([0.3], [0.3], 1.0) == 0.5
    assert label_ceiling([1.0], [0.0], 1.0) == pytest.approx(1 / (1 + math.exp(-1)))
    assert label_ceiling([1.0], [-2.0], 1e-6) == 1.0  # no overflow


# ---- Data -----------------------------------------------------------------------------------------------------------


def test_rewards_of_demonstrations_are_widely_spread(demonstrations, rewards):
    assert 0.6 < rewards.std() < 0.75 and -0.25 < rewards.mean() < -0.1
    clauses = [parse(row["completion"]).clauses for row in demonstrations]
    spreads = np.array([np.std([c.sentiment for c in cs]) for cs in clauses if len(cs) > 1])
    assert np.mean(spreads < 0.05) < 0.25  # few reviews have a single strength
    assert 10 < np.mean([len(row["completion"].split()) for row in demonstrations]) < 20


@pytest.mark.parametrize("split", SPLITS)
def test_records_depend_on_split_and_seed_only(split):
    rows = records(split, 300, seed=3)
    assert rows == records(split, 300, seed=3) and rows[:100] == records(split, 100, seed=3)
    assert rows != records(split, 300, seed=4) and all(set(row) == {"prompt", "completion"} for row in rows)
    assert {domain_of(row["prompt"]) for row in rows} == set(FAR_DOMAINS if split == "ood_far" else ID_DOMAINS)
    assert len({row["prompt"] for row in rows[:150]}) == 150  # no prompt repeats while unused ones are left
    assert corpus(50, seed=3) == corpus(50, seed=3) != corpus(50, seed=4)


def test_another_process_makes_the_same_data():
    code = "from nanorlhf.reviews import records, corpus; print(records('test', 20, 7), corpus(20, 7))"
    runs = {
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": path},
                       capture_output=True, text=True, check=True).stdout
        for seed in ("1", "2") for path in [":".join(sys.path)]
    }  # fmt: skip
    assert runs == {f"{records('test', 20, 7)} {corpus(20, 7)}\n"}


def test_an_unknown_split_is_rejected():
    with pytest.raises(ValueError, match="unknown split 'valid'.*train"):
        records("valid", 1)


def test_splits_are_disjoint():
    rows = {split: records(split, 5000, seed=0) for split in SPLITS}
    prompts = {split: {row["prompt"] for row in rows[split]} for split in SPLITS}
    titles = {split: {title(prompt) for prompt in prompts[split]} for split in SPLITS}
    assert titles["train"].isdisjoint(titles["test"])  # hence no (domain, title) in both
    assert 0.1 < len(titles["test"]) / len(titles["train"] | titles["test"]) < 0.3
    assert title_words(rows["test"]) <= title_words(rows["train"])
    assert title_words(rows["ood_near"]).isdisjoint(title_words(rows["train"]))
    assert title_words(rows["ood_far"]) <= title_words(rows["train"])
    asked = {split: {len(asked_of(prompt)) for prompt in prompts[split]} for split in SPLITS}
    assert asked == {"train": {1, 2}, "test": {1, 2}, "ood_near": {3}, "ood_far": {1, 2}}


def test_far_words_occur_only_in_far_domains_and_the_vocabulary_is_small(demonstrations):
    everything = words(corpus(20000, seed=0))
    assert 180 <= len(everything) <= 260
    near = words(row["prompt"] + row["completion"] for s in ("train", "test") for row in records(s, 20000, seed=0))
    held_out = set(reviews.HELD_OUT_FIRST + reviews.HELD_OUT_SECOND)
    assert near <= everything and held_out <= everything and near.isdisjoint(held_out)
    far_only = everything - near - held_out
    assert {"spotless", "filthy", "cosy", "noisy", "powerful", "shrill", "engine", "hotel"} <= far_only
    assert far_only <= {w for d in FAR_DOMAINS for a in aspects(d) for w in a.split()} | set(reviews.OWN_ADJECTIVES)
