"""How a target's values change: `EDITS`, and all arithmetic on weights.

The transplant on disk, the merge method, the model in memory and `verify` compute with one `Edit`, so that they agree
bit for bit. Which values change is the plan's business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar

import numpy

from dapa_merge.checkpoint.header import TORCH_NAMES
from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.checkpoint.region import Region
from dapa_merge.errors import CheckpointError, ValueDoesNotFit

if TYPE_CHECKING:
    import torch

    from dapa_merge.plan.plan import Plan


# Elements that are read, computed and written at once.
TILE = 1 << 21
# For each float dtype, the unsigned integer of its width and the bits of its exponent (IEEE 754, and bfloat16).
EXPONENTS = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000), "F64": ("<u8", 0x7FF << 52)}
# The models that an edit may read, as a recipe names them, and the words for them.
MODELS = {"target": "target", "source": "source", "pretrained": "pretrained model"}


@dataclass(frozen=True)
class Edit(ABC):
    """How a region's new values follow from those of the models: target + strength * change, rounded once.

    A subclass in `EDITS` is all that a new edit takes.

    Attributes:
        name: A recipe's `edit`.
        inputs: The models whose values it reads, of `MODELS`; the plan opens them.
        copies: The model whose values it takes unchanged: bytes of the same dtype are then copied without torch.
        verb: What it does to parameters, as a card says it.
        unit: What one unit is, for messages.
        divides: Whether a unit may be cut into blocks of rows.
        strength: In (0, 2].
    """

    name: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]] = ("target", "source")
    copies: ClassVar[str | None] = None
    verb: ClassVar[str] = "changed"
    unit: ClassVar[str] = "a module of a layer, or a block of its rows"
    divides: ClassVar[bool] = True
    strength: float = 1.0

    @abstractmethod
    def change(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What is added to the target at a strength of 1.

        Args:
            values: By model, the target among them: float32 or float64, of one shape. Borrowed; not to be written to.
        """

    @abstractmethod
    def how(self, models: Mapping[str, str]) -> str:
        """How values come about, after "the gates of layers 3-4, "; `models` are names or links to show."""

    @property
    def origin(self) -> str:
        """The word of `verify` for values that this edit made."""
        return self.name

    @property
    def result(self) -> str:
        """These values in a sentence, beside "the target's"."""
        return f"the {self.name}"

    @property
    def note(self) -> str:
        """A sentence for a page that compares methods; empty if nothing needs saying."""
        return f"Edit {self.name}: whatever is transplanted is {self.how(MODELS_IN_WORDS)}, as the recipe has it."

    def to_json(self) -> dict[str, Any]:
        """What decides the new values, for manifest and journal; `make_edit` makes it an edit again."""
        return {"edit": self.name, "strength": self.strength}

    @property
    def identity(self) -> str:
        """The same on one line."""
        return " ".join(map(str, self.to_json().values()))

    def exact(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The new values before they are rounded."""
        # Operations that are each rounded: fused, as by `lerp` or `add(alpha=...)`, a GPU's would differ from a CPU's.
        return values["target"] + self.change(values) * self.strength

    def new_values(
        self, values: Mapping[str, torch.Tensor], dtype: torch.dtype, rounding: Rounding | None = None
    ) -> torch.Tensor:
        """The new values, computed in float32 (float64 where an input is) and rounded once, to nearest.

        Args:
            values: Those of `inputs`, as stored, of one shape.
            dtype: What the target stores.
            rounding: Counts what is lost. A value beyond the dtype becomes the largest that it holds.

        Returns:
            A new tensor of `dtype`, or the input itself if it is copied as it is.
        """
        import torch

        if self.copies is not None and values[self.copies].dtype == dtype:
            return values[self.copies]
        precise = torch.float64 if any(value.dtype == torch.float64 for value in values.values()) else torch.float32
        inputs = {name: values[name].to(precise) for name in self.inputs}
        exact = self.exact(inputs)
        result = exact.to(dtype)
        limits = torch.finfo(dtype)
        overflowed = result.isinf()
        for value in inputs.values():
            overflowed &= value.isfinite()
        num_overflowed = int(overflowed.sum())
        if num_overflowed:
            result = torch.where(overflowed, torch.sign(exact).to(dtype) * limits.max, result)
        if rounding is not None:
            was_normal = exact.abs() >= torch.finfo(exact.dtype).tiny
            rounding.add(num_overflowed, int((was_normal & (result.abs() < limits.tiny)).sum()))
        return result


class Blend(Edit):
    """Move the target's values towards the source's."""

    name = "blend"

    def change(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return values["source"] - values["target"]

    def how(self, models: Mapping[str, str]) -> str:
        return f"moved by {self.strength:g} of the way to that of {models['source']}"

    @property
    def note(self) -> str:
        return f"Whatever is transplanted moves {self.strength:g} of the way to the source, as the recipe has it."

    def to_json(self) -> dict[str, Any]:
        return {"strength": self.strength}


class Copy(Blend):
    """Take the source's values as they are: all of the way, exactly."""

    name = "copy"
    inputs = ("source",)
    copies = "source"
    verb = "replaced"
    origin = "source"
    result = "the source's"
    note = ""

    def how(self, models: Mapping[str, str]) -> str:
        return f"copied from {models['source']}"

    def exact(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return values["source"]


EDITS: dict[str, type[Edit]] = {edit.name: edit for edit in (Copy, Blend)}
MODELS_IN_WORDS = {name: f"the {word}" for name, word in MODELS.items()}


def make_edit(edit: str = "copy", strength: float = 1.0) -> Edit:
    """The edit that a recipe means: a copy of another strength than 1 is a blend, and a blend of strength 1 a copy.

    Raises:
        ValueError: If it is not one of `EDITS`.
    """
    if edit not in EDITS:
        raise ValueError(f"{edit!r:.80} is not an edit; known are {', '.join(EDITS)}")
    kind = EDITS[edit]
    if kind in (Copy, Blend):
        kind = Copy if strength == 1 else Blend
    return kind(strength)


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
    """Yield the bytes of a region in order, in tiles of `num_elements`; the last may be shorter.

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


def new_tiles(plan: Plan, regions: Mapping[str, Region], rounding: Rounding | None = None) -> Iterator[bytes]:
    """Yield the new bytes of a region in tiles, as long as nothing is wrong with them.

    Args:
        plan: The models, the edit, and how many values may overflow.
        regions: By model, where the values are; as many in each.
        rounding: Counts what is lost.

    Raises:
        CheckpointError: If a value is infinite or not a number, or a file changes while it is read.
        ValueDoesNotFit: If more values than `plan.max_overflow` are too large for the target's dtype.
    """
    rounding = rounding or Rounding()
    ours = regions["target"]
    for tile, inputs in edited_tiles(plan, regions, rounding):
        for name, read in inputs.items():
            if name != "target" and _has_not_finite(read, regions[name]):
                raise not_finite(regions[name].name, plan, name)
        if rounding.overflowed > plan.max_overflow:
            raise does_not_fit(regions["source"].name, plan, ours.tensor.dtype, rounding)
        if "target" in inputs and _has_not_finite(tile, ours):
            # What overflows was cut; only the target's own can be left.
            raise CheckpointError(
                f"{ours.name} of the target {plan.target.name} holds values that are infinite or not a number, which "
                f"cannot be mixed; with `edit: copy` and `strength: 1` they are replaced"
            )
        yield tile


def edited_tiles(
    plan: Plan, regions: Mapping[str, Region], rounding: Rounding | None = None
) -> Iterator[tuple[bytes, dict[str, bytes]]]:
    """Yield the new bytes of a region in tiles, and by model the bytes that they were made of.

    Loads torch only if there is anything to compute.
    """
    edit, dtype = plan.edit, regions["target"].tensor.dtype
    if edit.copies is not None and regions[edit.copies].tensor.dtype == dtype:
        for tile in read_tiles(plan.models[edit.copies], regions[edit.copies]):
            yield tile, {edit.copies: tile}
        return
    import torch

    dtypes = {name: getattr(torch, TORCH_NAMES[region.tensor.dtype]) for name, region in regions.items()}
    for tiles in zip(*(read_tiles(plan.models[name], regions[name]) for name in edit.inputs), strict=True):
        inputs = dict(zip(edit.inputs, tiles, strict=True))
        values = {name: torch.frombuffer(bytearray(tile), dtype=dtypes[name]) for name, tile in inputs.items()}
        result = edit.new_values(values, dtypes["target"], rounding)
        yield result.view(torch.uint8).numpy().tobytes(), inputs


def does_not_fit(name: str, plan: Plan, dtype: str, rounding: Rounding) -> ValueDoesNotFit:
    """The error for more values that a dtype cannot hold than a plan allows; `name` is the source's tensor."""
    return ValueDoesNotFit(
        f"{name} of the source {plan.source.name} has values that {dtype}, the target's dtype, cannot hold: "
        f"at least {rounding.overflowed} overflow, and {plan.max_overflow} may; with `max_overflow` under `parameters` "
        f"more may, and become the largest value that fits"
    )


def not_finite(name: str, plan: Plan, model: str) -> CheckpointError:
    """The error for a tensor of one of a plan's models with values that are infinite or not a number."""
    return CheckpointError(
        f"{name} of the {MODELS[model]} {plan.models[model].name} holds values that are infinite or not a number; "
        f"it is damaged"
    )


def _has_not_finite(tile: bytes, region: Region) -> bool:
    """Whether a value in a tile is infinite or not a number: all bits of its exponent are set."""
    width, exponent = EXPONENTS[region.tensor.dtype]
    return bool(((numpy.frombuffer(tile, dtype=width) & exponent) == exponent).any())
