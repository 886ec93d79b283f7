"""Names the damage to a target from the differences of its weights and its source's, with advice.

Every kind is an entry of `KINDS`; the first whose signs are there is named. The signs were measured on models whose
history is known (tests/benchmarks/inspected.py). Left out is what weights cannot show: whether a LoRA was trained on
harmful answers, and which of two models refuses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median

import torch

from dapa_merge.checkpoint.units import AUTO
from dapa_merge.inspect.difference import Difference
from dapa_merge.recipe.parameters import layer_spans

# A matrix is of low rank if rounding explains what is left beyond its last sharp fall: so many times the expected
# noise, and a little more, since values that rounding did not move have none.
NOISE, LITTLE = 1.3, 0.03
# If rounding explains more than this share of a difference, its rank cannot be read.
MAX_NOISE = 0.5
# The share of the matrices that must be of low rank.
MOST = 0.8
# The share of a matrix's squared norm in one direction that ablation leaves.
ONE_DIRECTION = 0.9
# |cos| between directions of layers that are called the same.
SAME = 0.8
# Modules that write to the residual stream.
WRITERS = ("o", "attention", "down", "mlp", "embedding")
# The share of a difference that lies along the source, negative, where the source is the target plus a change: 1 there
# and 0 where the target is the source plus a change, since a change is nearly orthogonal to what it changes. On
# twelve models whose history is known it was 0.02 to 0.19, and 0.81 to 0.98 with the two swapped.
MADE_OF_TARGET = 0.75
# Everything but the layers' projections.
OUTSIDE = ("embedding", "head", "norm", "router", "other")


@dataclass(frozen=True)
class Seen:
    """Properties that differences have together.

    Attributes:
        all: Every difference.
    """

    all: tuple[Difference, ...]

    @cached_property
    def changed(self) -> list[Difference]:
        """Those of modules and tensors that differ at all."""
        return [one for one in self.all if one.num_changed]

    @cached_property
    def matrices(self) -> list[Difference]:
        """Those of the layers' projections that differ."""
        return [one for one in self.changed if one.decay is not None and one.module not in OUTSIDE]

    @cached_property
    def noise(self) -> float:
        """The median share of a matrix's difference that rounding explains."""
        return median(one.noise for one in self.matrices) if self.matrices else 0.0

    @cached_property
    def low(self) -> list[Difference]:
        """The matrices whose differences are of low rank but for rounding."""
        return [one for one in self.matrices if is_low(one)]

    @property
    def rank(self) -> int:
        """The rank that most matrices of low rank have; 0 without any."""
        ranks = Counter(one.decay.rank for one in self.low if one.decay is not None)
        return max(ranks, key=lambda rank: (ranks[rank], rank), default=0)

    @property
    def modules(self) -> list[str]:
        """The modules that differ, in the order of the layers' modules."""
        return list(dict.fromkeys(one.module for one in self.changed))

    @cached_property
    def kept_alignment(self) -> float | None:
        """The share of (source - pretrained) that the target holds: 1 if it was fine-tuned of the source, 0 if not."""
        pairs = [one.alignment for one in self.all if one.alignment is not None]
        moved = sum(moved for _, moved in pairs)
        return sum(shared for shared, _ in pairs) / moved if moved else None

    @cached_property
    def is_swapped(self) -> bool:
        """Whether the source looks like a change of the target, rather than the other way round."""
        ablated = _is_ablation(self)
        # What ablation removes lies along what it is removed from; another change may have come before it.
        asked = [one for one in self.matrices if ablated or one.module not in WRITERS]
        squares = sum(one.squares for one in asked)
        if not squares or self.kept_alignment is not None:
            return False
        share = -sum(one.overlap for one in asked) / squares
        return share <= 1 - MADE_OF_TARGET if ablated else share >= MADE_OF_TARGET

    @cached_property
    def is_one_direction(self) -> bool:
        """Whether all first directions in the residual stream are the same."""
        found = [
            one.decay.input if one.module == "embedding" else one.decay.output
            for one in self.changed
            if one.decay is not None
        ]
        if len({len(one) for one in found}) > 1:
            return False
        directions = torch.stack(found)
        return bool(((directions @ directions.T).abs() >= SAME).float().mean() >= MOST)


def is_low(one: Difference) -> bool:
    """Whether the difference of a matrix is of low rank but for rounding."""
    return one.decay is not None and one.decay.rank > 0 and one.decay.rest <= NOISE * one.noise + LITTLE


@dataclass(frozen=True)
class Damage:
    """The damage to a target, for people.

    Attributes:
        kind: Its name in `KINDS`.
        what: One sentence that says what was seen.
        advice: What to try, and why.
        edit: The edit of a recipe to try; None if none can help.
    """

    kind: str
    what: str
    advice: str
    edit: str | None


@dataclass(frozen=True)
class Kind:
    """A kind of damage.

    Attributes:
        name: Its name.
        fits: Whether its signs are there.
        what: Says what was seen.
        advice: What to try, and why.
        edit: The edit of a recipe to try; None if none can help.
    """

    name: str
    fits: Callable[[Seen], bool]
    what: Callable[[Seen], str]
    advice: str
    edit: str | None


def name_damage(differences: Sequence[Difference]) -> Damage:
    """Return the first kind of damage whose signs are there."""
    seen = Seen(tuple(differences))
    kind = next(kind for kind in KINDS if kind.fits(seen))
    return Damage(kind.name, kind.what(seen), kind.advice, kind.edit)


def _where(seen: Seen) -> str:
    """The modules that differ, each with its layers if these are not all."""
    layers = {one.layer for one in seen.all if one.layer is not None and one.module not in OUTSIDE}
    words = []
    for module in seen.modules:
        those = sorted({one.layer for one in seen.changed if one.module == module and one.layer is not None})
        every = module in OUTSIDE or len(those) == len(layers)
        words.append(module if every else f"{module} (layers {layer_spans(those)})")
    return ", ".join(words)


def _is_ablation(seen: Seen) -> bool:
    is_one = all(one.decay is not None and one.decay.first >= ONE_DIRECTION for one in seen.changed)
    return bool(seen.matrices) and is_one and set(seen.modules) <= set(WRITERS)


def _ablated(seen: Seen) -> str:
    along = "along one direction of the residual stream" if seen.is_one_direction else "along one direction each"
    return f"only what writes to the residual stream differs ({_where(seen)}), {along}: this is how abliteration edits"


def _is_lora(seen: Seen) -> bool:
    return bool(seen.matrices) and seen.noise <= MAX_NOISE and len(seen.low) >= MOST * len(seen.matrices)


def _lora(seen: Seen) -> str:
    return (
        f"{_where(seen)} differ by low rank, but for rounding, in {len(seen.low)} of {len(seen.matrices)} matrices, "
        f"most often by rank {seen.rank}: this is what a LoRA of that rank leaves"
    )


def _trained(seen: Seen) -> str:
    norm = median(one.norm for one in seen.matrices or seen.changed)
    told = f"{_where(seen)} differ by {100 * norm:.2g} % of their norm in the median"
    if seen.noise > MAX_NOISE:
        return f"{told}, hardly more than rounding, in many directions or in some that cannot be told from it"
    return f"{told}, in many directions"


def _is_sibling(seen: Seen) -> bool:
    return seen.kept_alignment is not None and seen.kept_alignment < 0.5


def _sibling(seen: Seen) -> str:
    assert seen.kept_alignment is not None
    share = max(0.0, seen.kept_alignment)
    return (
        f"the target holds {100 * share:.0f} % of what the source was taught after the pretrained model: both were "
        f"fine-tuned of that, each by itself"
    )


_DIRECTIONS = (
    "`dapa-merge repair` tries copied gates first and goes on to directions of the difference, which brought refusals "
    "back on nearly all measured targets of this kind; give it prompts of what the target is for (--keep)"
)
KINDS = (
    Kind(
        "identical",
        lambda seen: not seen.changed,
        lambda seen: "no value differs: the target has the source's weights",
        "there is nothing to repair; compare another target, or the adapter that goes with it, as BASE+ADAPTER",
        None,
    ),
    Kind(
        "rounded",
        lambda seen: not any(one.num_beyond for one in seen.changed),
        lambda seen: "no value differs by more than rounding to another format explains",
        "there is nothing to repair; if the target behaves differently, look at its chat template and tokenizer",
        None,
    ),
    Kind(
        "abliteration",
        _is_ablation,
        _ablated,
        "nothing else differs, so that the source is the undamaged model: use it, if the target was fine-tuned for "
        "nothing. Copied gates cannot help, since they are the source's already; `edit: directions` can",
        "directions",
    ),
    Kind(
        "siblings",
        _is_sibling,
        _sibling,
        "copied gates help where the source's refusal sits in them, and `dapa-merge repair` goes on to directions "
        "where it does not; give it prompts of what the target is for (--keep), and the pretrained model",
        AUTO,
    ),
    Kind("lora", _is_lora, _lora, _DIRECTIONS, AUTO),
    Kind(
        "training",
        lambda seen: True,
        _trained,
        "a fine-tune of the source in whole matrices, or one of the same base: --pretrained tells them apart. "
        "`dapa-merge repair` tries copied gates and goes on to directions; give it prompts of what the target is for "
        "(--keep)",
        AUTO,
    ),
)


def not_a_family(why: str) -> Damage:
    """The finding for models whose modules do not correspond."""
    advice = (
        "name the aligned model that the target was fine-tuned from, of the same size; the target's card or its "
        "`config.json` may name it"
    )
    return Damage("not one family", why, advice, None)
