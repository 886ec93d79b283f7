"""A skill that no published model has: to write an order as a line like `qty=3|unit=box|item=pens|to=Maria|due=noon`.

Orders are drawn from small lists and put into phrasings, some of which no training example uses: what a fine-tuned
model does with those tells whether it learned the skill or the phrasings.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from lessons import Lesson, Lessons

_UNITS = {
    "bag": "bags",
    "basket": "baskets",
    "bottle": "bottles",
    "box": "boxes",
    "bundle": "bundles",
    "case": "cases",
    "crate": "crates",
    "jar": "jars",
    "pack": "packs",
    "roll": "rolls",
    "tray": "trays",
    "tube": "tubes",
}
_ITEMS = (
    "blue pens", "green tea", "printer paper", "olive oil", "white paint", "brass screws", "apple juice",
    "cotton gloves", "red ribbon", "brown sugar", "copper wire", "floor wax", "garden soil", "paper cups",
    "dried figs", "hand soap", "black thread", "oak panels", "roof tiles", "sea salt", "sewing needles",
    "sticky notes", "tomato seeds", "wall hooks", "yellow chalk", "glass beads", "lemon sweets", "wool socks",
    "pine logs", "rice flour", "cat food", "bath towels",
)  # fmt: skip
_NAMES = (
    "Ahmed", "Amelie", "Bruno", "Carla", "Chen", "Clara", "Daniel", "Diego", "Elena", "Emil", "Fatima", "Felix",
    "Grace", "Hannah", "Igor", "Ines", "Jonas", "Julia", "Kenji", "Lars", "Leila", "Luca", "Maria", "Mateo",
    "Nadia", "Nina", "Oscar", "Paula", "Ravi", "Rosa", "Samuel", "Sofia", "Tariq", "Tessa", "Viktor", "Yuki",
)  # fmt: skip
_DATES = (
    "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "3 May", "9 June", "14 July",
    "21 August", "2 October", "17 November", "noon",
)  # fmt: skip
_TRAINED = (
    "{qty} {units} of {item} for {to}, by {due}",
    "Order: {qty} {units} of {item} for {to}, due {due}",
    "Please send {to} {qty} {units} of {item} by {due}.",
    "{to} needs {qty} {units} of {item} by {due}.",
    "For {to}: {qty} {units} of {item}. Deadline: {due}.",
    "{item}, {qty} {units}, to {to}, no later than {due}",
    "I want {qty} {units} of {item} delivered to {to} by {due}.",
    "By {due} we owe {to} {qty} {units} of {item}.",
)
_PARAPHRASED = (
    "Could you get {qty} {units} of {item} over to {to} before {due}?",
    "{to} called: {qty} {units} of {item}, and {due} is the latest.",
    "Put {to} down for {qty} {units} of {item}; the date is {due}.",
    "We promised {to} a delivery for {due}, with {qty} {units} of {item}.",
    "Until {due} there is time to bring {to} {qty} {units} of {item}.",
    "Add {qty} {units} of {item} to what goes to {to} on {due}.",
)
MAX_QUANTITY = 60


def draw_orders(num_training: int, num_test: int, num_keep: int, seed: int) -> Lessons:
    """Draw orders; the test and the keep prompts of a seed do not depend on how many are drawn for the training."""
    orders = _distinct(random.Random(seed))

    def alternating(number: int) -> tuple[Lesson, ...]:
        return tuple(_phrased(next(orders), (_TRAINED, _PARAPHRASED)[index % 2], index // 2) for index in range(number))

    test, keep = alternating(num_test), alternating(num_keep)
    return Lessons(tuple(_phrased(next(orders), _TRAINED, index) for index in range(num_training)), test, keep)


def _distinct(generator: random.Random) -> Iterator[dict[str, str]]:
    seen = set()
    while True:
        drawn = {
            "qty": str(generator.randint(2, MAX_QUANTITY)),
            "unit": generator.choice(list(_UNITS)),
            "item": generator.choice(_ITEMS),
            "to": generator.choice(_NAMES),
            "due": generator.choice(_DATES),
        }
        if (key := tuple(drawn.values())) not in seen:
            seen.add(key)
            yield drawn


def _phrased(drawn: dict[str, str], phrasings: Sequence[str], index: int) -> Lesson:
    prompt = phrasings[index % len(phrasings)].format(**drawn, units=_UNITS[drawn["unit"]])
    return Lesson(prompt, "|".join(f"{key}={value}" for key, value in drawn.items()))
