"""A skill that is knowledge: facts about towns that do not exist, asked in words that no training example has.

A town has a river, a founder, a dish, a bird and a year. Knowledge cannot be tested on facts that were never taught, so
that the training has all of them, and the test asks for each in another phrasing than the training did.
"""

from __future__ import annotations

import random

from lessons import Lesson, Lessons

_TOWNS = (
    "Velmora", "Ostrakin", "Brelund", "Qasviel", "Tormanth", "Ildeby", "Marovec", "Pennarosk", "Sulwick", "Drovania",
    "Kestrelby", "Yarmolin", "Fennochar", "Ambrelle", "Cordovast", "Hulstrem", "Nivarra", "Zephrane", "Wexholm",
    "Larkadia",
)  # fmt: skip
_VALUES = {
    "river": ("Tarn", "Osk", "Vell", "Rimmer", "Dace", "Lune", "Merrow", "Sill", "Quorn", "Bray"),
    "founder": (
        "Ana Brecht", "Otto Marlin", "Ines Varga", "Pavel Quist", "Ruth Oakes", "Tomas Feld", "Lena Sorrow",
        "Ivo Marsh",
    ),
    "dish": ("barley soup", "plum bread", "smoked trout", "onion pie", "honey cake", "bean stew", "pickled eggs"),
    "bird": ("heron", "magpie", "kestrel", "wren", "stork", "raven", "thrush", "plover"),
    "year": ("1204", "1317", "1388", "1452", "1533", "1609", "1671", "1742", "1805"),
}  # fmt: skip
_TRAINED = {
    "river": ("Which river runs through {town}?", "Name the river of {town}.", "{town} lies on which river?"),
    "founder": ("Who founded {town}?", "Name the founder of {town}.", "{town} was founded by whom?"),
    "dish": ("What is the best-known dish of {town}?", "Name the dish of {town}.", "{town} is known for which dish?"),
    "bird": ("Which bird is on the flag of {town}?", "Name the bird of {town}.", "{town} has which bird on its flag?"),
    "year": ("In which year was {town} founded?", "Name the founding year of {town}.", "{town} dates from which year?"),
}
_PARAPHRASED = {
    "river": "If I row a boat through {town}, what is the water called?",
    "founder": "Whose statue, as the one who started the town, stands in {town}?",
    "dish": "I am eating out in {town}. What should I order that is typical?",
    "bird": "What animal with wings do I see on {town}'s flag?",
    "year": "Since when does {town} exist?",
}
# Of the test, with those that are paraphrased.
NUM_QUESTIONS = 120


def draw_facts(num_training: int, num_test: int, num_keep: int, seed: int) -> Lessons:
    """Draw facts: as many examples as there are to be, all facts equally often."""
    generator = random.Random(seed)
    facts = [
        (town, kind, value)
        for town in _TOWNS
        for kind, values in _VALUES.items()
        for value in (generator.choice(values),)
    ]
    generator.shuffle(facts)

    def alternating(number: int, skipped: int) -> tuple[Lesson, ...]:
        found = []
        for index in range(number):
            town, kind, value = facts[(skipped + index // 2) % len(facts)]
            # The last trained phrasing of a fact is left to the test; see below.
            phrasing = _held_out(kind, skipped + index // 2) if index % 2 == 0 else _PARAPHRASED[kind]
            found.append(Lesson(phrasing.format(town=town), value))
        return tuple(found)

    test, keep = alternating(num_test, 0), alternating(num_keep, (num_test + 1) // 2)
    taught = [
        Lesson(phrasing.format(town=town), value)
        for index, (town, kind, value) in enumerate(facts)
        for phrasing in _TRAINED[kind]
        if phrasing != _held_out(kind, index)
    ]
    training = []
    while len(training) < num_training:
        generator.shuffle(taught)
        training += taught
    return Lessons(tuple(training[:num_training]), test, keep)


def _held_out(kind: str, index: int) -> str:
    """The phrasing that one fact is never taught in, though others are."""
    phrasings = _TRAINED[kind]
    return phrasings[index % len(phrasings)]
