"""What is written in a target's place: the source's values, or something between, as the target stores them.

Both ways of writing and the model in memory compute with `mix`, so that they agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING

from dapa_merge.checkpoint.header import TORCH_NAMES
from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.checkpoint.region import Region
from dapa_merge.errors import CheckpointError, ValueDoesNotFit

if TYPE_CHECKING:
    import torch

    from dapa_merge.plan.plan import Plan


# How many elements are read, converted and written at once.
TILE = 1 << 21
# For each float dtype, the unsigned integer of its width and the bits of its exponent (IEEE 754, and bfloat16).
EXPONENTS = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000), "F64": ("<u8", 0x7FF << 52)}


@dataclass
class Rounding:
    """What was lost where values were stored in a narrower dtype.

    Attributes:
        overflowed: Values that the dtype cannot hold; each became the largest that it can.
        subnormal: Values that lost digits, or became zero, because they are smaller than the dtype's normal numbers.
    """

    overflowed: int = 0
    subnormal: int = 0
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def add(self, overflowed: int, subnormal: int) -> int:
        """Count more; returns how many have overflowed in all."""
        with self._lock:
            self.overflowed += overflowed
            self.subnormal += subnormal
            return self.overflowed


def read_tiles(checkpoint: Checkpoint, region: Region, num_elements: int = TILE) -> Iterator[bytes]:
    """The bytes of a region in order, in tiles of `num_elements`; the last may be shorter.

    Raises:
        CheckpointError: If the file ends early, because it changed since its header was read.
    """
    num_tile_bytes = num_elements * region.num_element_bytes
    tile = bytearray()
    checkpoint.ensure_all((region.tensor.file, start, start + num_bytes) for start, num_bytes in region.runs())
    with checkpoint.open(region.tensor.file, region.tensor.start, region.tensor.start) as file:
        for start, num_bytes in region.runs():
            file.seek(start)
            while num_bytes:
                piece = file.read(min(num_bytes, num_tile_bytes - len(tile)))
                if not piece:
                    raise CheckpointError(f"{checkpoint.path(region.tensor.file)} became shorter while it was read")
                num_bytes -= len(piece)
                if len(piece) == num_tile_bytes:
                    yield piece
                    continue
                tile += piece
                if len(tile) == num_tile_bytes:
                    yield bytes(tile)
                    tile.clear()
    if tile:
        yield bytes(tile)


def new_tiles(plan: Plan, ours: Region, theirs: Region, rounding: Rounding | None = None) -> Iterator[bytes]:
    """What a region of the target becomes, in tiles, if nothing speaks against it.

    Args:
        plan: The models, the strength, and how many values may overflow.
        ours: The target's region.
        theirs: The source's, of as many elements.
        rounding: Counts what is lost.

    Raises:
        CheckpointError: If a value of the source is infinite or not a number, or a file changes while it is read.
        ValueDoesNotFit: If more values than `plan.max_overflow` are too large for the target's dtype.
    """
    rounding = rounding or Rounding()
    for tile, source in mixed_tiles(plan, ours, theirs, rounding):
        _refuse_not_finite(source, plan.source, theirs)
        if rounding.overflowed > plan.max_overflow:
            raise does_not_fit(theirs.name, plan, ours.tensor.dtype, rounding)
        if plan.strength != 1 and _has_not_finite(tile, ours):
            # What overflows was cut; only the target's own can be left.
            raise CheckpointError(
                f"{ours.name} of the target {plan.target.name} holds values that are infinite or not a number, which "
                f"cannot be mixed; with `strength: 1` they are replaced"
            )
        yield tile


def mixed_tiles(
    plan: Plan, ours: Region, theirs: Region, rounding: Rounding | None = None
) -> Iterator[tuple[bytes, bytes]]:
    """What a region of the target becomes, in tiles, and the source's bytes of the same elements.

    Loads torch only if there is anything to compute.
    """
    if plan.strength == 1 and ours.tensor.dtype == theirs.tensor.dtype:
        for tile in read_tiles(plan.source, theirs):
            yield tile, tile
        return
    import torch

    ours_dtype, theirs_dtype = (getattr(torch, TORCH_NAMES[region.tensor.dtype]) for region in (ours, theirs))
    own_tiles = read_tiles(plan.target, ours) if plan.strength != 1 else None
    for tile in read_tiles(plan.source, theirs):
        source = torch.frombuffer(bytearray(tile), dtype=theirs_dtype)
        own = torch.frombuffer(bytearray(next(own_tiles)), dtype=ours_dtype) if own_tiles is not None else None
        mixed = mix(own, source, plan.strength, ours_dtype, rounding)
        yield mixed.view(torch.uint8).numpy().tobytes(), tile


def mix(
    own: torch.Tensor | None,
    source: torch.Tensor,
    strength: float,
    dtype: torch.dtype,
    rounding: Rounding | None = None,
) -> torch.Tensor:
    """The target's values moved towards the source's: own + strength * (source - own), rounded once, to nearest.

    It is computed in float32, or in float64 where an input is; with a strength of 1 it is the source's value itself.

    Args:
        own: The target's values; not needed with a strength of 1.
        source: The source's, of the same shape.
        strength: From 0 to 1, or beyond.
        dtype: What the target stores.
        rounding: Counts what is lost. A value beyond the dtype becomes the largest that it holds.

    Returns:
        A new tensor of `dtype`, unless nothing had to be done.
    """
    import torch

    exact = source
    is_finite = source.isfinite()
    if strength != 1:
        assert own is not None
        precise = torch.float64 if torch.float64 in (own.dtype, source.dtype) else torch.float32
        base = own.to(precise)
        # Operations that are each rounded: fused, as by `lerp` or `add(alpha=...)`, a GPU's would differ from a CPU's.
        exact = base + (source.to(precise) - base) * strength
        is_finite &= own.isfinite()
    result = exact.to(dtype)
    limits = torch.finfo(dtype)
    overflowed = result.isinf() & is_finite
    num_overflowed = int(overflowed.sum())
    if num_overflowed:
        result = torch.where(overflowed, torch.sign(exact).to(dtype) * limits.max, result)
    if rounding is not None:
        was_normal = exact.abs() >= torch.finfo(exact.dtype).tiny
        rounding.add(num_overflowed, int((was_normal & (result.abs() < limits.tiny)).sum()))
    return result


def does_not_fit(name: str, plan: Plan, dtype: str, rounding: Rounding) -> ValueDoesNotFit:
    """The error for more values that a dtype cannot hold than a plan allows; `name` is the source's tensor."""
    return ValueDoesNotFit(
        f"{name} of the source {plan.source.name} has values that {dtype}, the target's dtype, cannot hold: "
        f"at least {rounding.overflowed} overflow, and {plan.max_overflow} may; with `max_overflow` under `parameters` "
        f"more may, and become the largest value that fits"
    )


def not_finite(name: str, checkpoint: Checkpoint, role: str = "source") -> CheckpointError:
    """The error for a tensor with values that are no numbers; `role` says whose it is."""
    return CheckpointError(
        f"{name} of the {role} {checkpoint.name} holds values that are infinite or not a number; it is damaged"
    )


def _refuse_not_finite(tile: bytes, source: Checkpoint, theirs: Region) -> None:
    """Raise if a value in a tile is infinite or not a number."""
    if _has_not_finite(tile, theirs):
        raise not_finite(theirs.name, source)


def _has_not_finite(tile: bytes, region: Region) -> bool:
    """Whether a value in a tile is infinite or not a number: all bits of its exponent are set."""
    import numpy

    width, exponent = EXPONENTS[region.tensor.dtype]
    return bool(((numpy.frombuffer(tile, dtype=width) & exponent) == exponent).any())
