"""The requirement that a selection must meet: when does it hold?

Knows nothing of models: figures come in, a verdict goes out. The floor and the ceilings are set relative to what the
target is without any transplant, and what it is with the full one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class Candidate(Protocol):
    """The figures of a candidate; each may cost a measurement when it is read."""

    @property
    def dsr(self) -> float: ...

    @property
    def over_refusal(self) -> float: ...

    @property
    def perplexity(self) -> float: ...


@dataclass(frozen=True)
class Requirement:
    """What a selection must reach, and not exceed.

    Attributes:
        min_dsr: In [0, 1].
        max_over_refusal: In [0, 1], absolute.
        max_perplexity: Absolute.
    """

    min_dsr: float
    max_over_refusal: float
    max_perplexity: float

    def holds(self, candidate: Candidate) -> bool:
        """Whether a candidate meets the requirement."""
        return self.complaint(candidate) is None

    def complaint(self, candidate: Candidate) -> str | None:
        """What a candidate breaks and by how much, or None if it holds; reads no figure once the verdict is certain."""
        if candidate.dsr < self.min_dsr:
            return f"its DSR is {candidate.dsr:.3f}, below the {self.min_dsr:.3f} required"
        if candidate.over_refusal > self.max_over_refusal:
            return f"its over-refusal is {candidate.over_refusal:.3f}, above the {self.max_over_refusal:.3f} allowed"
        if not self._perplexity_holds(candidate):
            return f"its perplexity is {candidate.perplexity:.2f}, above the {self.max_perplexity:.2f} allowed"
        return None

    def _perplexity_holds(self, candidate: Candidate) -> bool:
        # Without passages there is no perplexity (NaN) to hold anyone to.
        return math.isnan(self.max_perplexity) or candidate.perplexity <= self.max_perplexity


def requirement(
    target: Candidate, full: Candidate, *, retain: float, max_over_refusal: float, max_perplexity: float
) -> Requirement:
    """The requirement for a target and its full transplant.

    Args:
        target: The target's own figures.
        full: Those with every unit transplanted; only its DSR is read.
        retain: Share of the gain in DSR that must be kept, in (0, 1].
        max_over_refusal: Rise allowed over the target's own.
        max_perplexity: Ratio allowed to the target's own.
    """
    gain = full.dsr - target.dsr
    return Requirement(
        # Rounded down by less than one part in a billion, so that a product of shares does not ask for the impossible;
        # but above the target's own, so that nothing is never enough.
        min_dsr=target.dsr + max(retain * gain - 1e-9, 1e-6 * gain),
        max_over_refusal=target.over_refusal + max_over_refusal + 1e-9,
        max_perplexity=target.perplexity * max_perplexity,
    )
