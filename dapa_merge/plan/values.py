"""The values of weights: their bytes as numbers, how far an edit moves them, and what a narrower dtype loses."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from threading import Lock
from typing import NamedTuple

import numpy

from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.errors import ValueDoesNotFit

# For each float dtype, the unsigned integer of its width and the bits of its exponent (IEEE 754, and bfloat16).
EXPONENTS = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000), "F64": ("<u8", 0x7FF << 52)}


def numbers(tile: bytes, dtype: str) -> numpy.ndarray:
    """The values in some bytes of a float dtype, as float32."""
    width, _ = EXPONENTS[dtype]
    if dtype == "BF16":
        return (numpy.frombuffer(tile, dtype=width).astype("<u4") << 16).view("<f4")
    return numpy.frombuffer(tile, dtype=width.replace("u", "f")).astype(numpy.float32)


class Shift(NamedTuple):
    """The effect of an edit on some values of the target.

    Attributes:
        number: Number of values that become others.
        moved: Sum of the squares of the differences between new and old values; 0, as `size`, for an edit that copies.
        size: Sum of the squares of the old values, changed or not.
    """

    number: int = 0
    moved: float = 0.0
    size: float = 0.0

    @classmethod
    def between(cls, before: bytes, after: bytes, dtype: str) -> Shift:
        """The effect on computed values, from their old and new bytes. Bits are compared, so that NaN equals itself."""
        width, _ = EXPONENTS[dtype]
        one, other = (numpy.frombuffer(each, dtype=width) for each in (before, after))
        # A computed zero may have another sign: all bits but that are 0.
        is_changed = (one != other) & (((one | other) << 1) != 0)
        old, moved = numbers(before, dtype), numbers(after, dtype)
        with numpy.errstate(invalid="ignore", over="ignore"):
            moved -= old
            squares = (float(numpy.vdot(values, values)) for values in (moved, old))
            return cls(int(numpy.count_nonzero(is_changed)), *squares)

    @property
    def share(self) -> float | None:
        """By how much of their size (Frobenius norm) the values move; None if that was not computed."""
        share = math.sqrt(self.moved / self.size) if self.size > 0 else math.nan
        return share if math.isfinite(share) else None

    @classmethod
    def total(cls, shifts: Iterable[Shift]) -> Shift:
        """The sum of some shifts."""
        found = cls()
        for one in shifts:
            found = cls(found.number + one.number, found.moved + one.moved, found.size + one.size)
        return found


@dataclass
class Rounding:
    """Losses from storing values in a narrower dtype; counted by several threads.

    Attributes:
        max_overflow: Number of overflows allowed.
        overflowed: Number of values that overflowed; each became the dtype's largest value.
        subnormal: Number of values below the dtype's normal numbers, which lost digits or became zero.
    """

    max_overflow: int = 0
    overflowed: int = 0
    subnormal: int = 0
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def add(self, overflowed: int, subnormal: int) -> None:
        """Count more."""
        with self._lock:
            self.overflowed += overflowed
            self.subnormal += subnormal

    def check(self, name: str, source: Checkpoint, dtype: str) -> None:
        """Raise `ValueDoesNotFit` if too many values overflowed; `name` is the tensor of the last one."""
        if self.overflowed > self.max_overflow:
            raise ValueDoesNotFit(
                f"{name} of the source {source.name} leads to values that {dtype}, the target's dtype, cannot hold: at "
                f"least {self.overflowed} overflow, but only {self.max_overflow} are allowed; `max_overflow` under "
                f"`parameters` allows more, which become the largest value that fits"
            )
