"""All arithmetic on weights: `EDITS` declares how new values are computed, `LADDER` which edits `auto` tries.

The transplant on disk, the merge method, the model in memory and `verify` call the same `Edit` and therefore agree bit
for bit. The plan says which values change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy

from dapa_merge.checkpoint.header import TORCH_NAMES, Tensor
from dapa_merge.checkpoint.open import TILE, Checkpoint, read_tiles
from dapa_merge.checkpoint.region import Box, Region, Shapes, whole_box
from dapa_merge.checkpoint.units import AUTO
from dapa_merge.errors import CheckpointError
from dapa_merge.plan.directions import FILE_NAME, FactorTable, Place, factors_in, misfit, unfit
from dapa_merge.plan.values import EXPONENTS, Rounding, Shift, numbers

if TYPE_CHECKING:
    import torch


# The models that an edit may read: their names in a recipe and in messages.
MODELS = {"target": "target", "source": "source", "pretrained": "pretrained model"}


@dataclass(frozen=True)
class Edit(ABC):
    """Computes new values from those of several models: target + strength * change, rounded once.

    A new edit is a subclass and its entry in `EDITS`.

    Attributes:
        name: The value of a recipe's `edit`; `verify` also reports it as the origin of new values.
        inputs: The models that it reads, from `MODELS`; the plan opens them.
        copies: The model to copy values from unchanged, if any; equal dtypes are copied as bytes, without torch.
        verb: Participle for changed parameters, in a card.
        done: Participle for edited units, in messages, charts and cards.
        unit: Description of a unit, in messages.
        divides: Whether a unit can be divided into blocks of rows.
        brings: Names of the values that the edit brings itself, besides those of the models.
        chooses: Whether a search first chooses what the edit adds, on prompts of its own.
        strength: In (0, 2].
    """

    name: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]] = ("target", "source")
    copies: ClassVar[str | None] = None
    verb: ClassVar[str] = "changed"
    done: ClassVar[str] = "moved"
    unit: ClassVar[str] = "a module of a layer, or a block of its rows"
    divides: ClassVar[bool] = True
    brings: ClassVar[tuple[str, ...]] = ()
    chooses: ClassVar[bool] = False
    strength: float = 1.0

    @abstractmethod
    def change(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The difference that a strength of 1 adds to the target.

        Args:
            values: By model, including the target, and what the edit `brings`: float32 or float64, of one shape.
                Borrowed; do not write to them.
        """

    @abstractmethod
    def how(self, models: Mapping[str, str]) -> str:
        """A participle phrase for a card, such as "copied from ...", with the names or links of `models`."""

    @property
    def origin(self) -> str:
        """The origin that `verify` reports for values that this edit made."""
        return self.name

    @property
    def result(self) -> str:
        """Phrase for the new values in messages, as opposed to "the target's"."""
        return f"the {self.name}"

    @property
    def provenance(self) -> str:
        """Phrase for changed units in the output of `verify`."""
        return f"by the edit {self.name}"

    @property
    def note(self) -> str:
        """A sentence for the comparison page; empty for the default edit."""
        models = {name: f"the {word}" for name, word in MODELS.items()}
        return f"Edit {self.name}: whatever is edited is {self.how(models)}, as the recipe has it."

    def to_json(self) -> dict[str, Any]:
        """The settings that determine the new values, for manifest and journal; `make_edit` reads them back."""
        return {"edit": self.name, "strength": self.strength}

    @classmethod
    def from_json(cls, strength: float, said: Mapping[str, Any], files: Mapping[str, bytes]) -> Edit:
        """The edit of these settings, as `to_json` wrote them, and of the `files` that are at hand."""
        return cls(strength)

    def own_values(self, region: Region, start: int = 0, stop: int | None = None) -> dict[str, numpy.ndarray]:
        """What the edit `brings` for elements of a target's region.

        Args:
            region: Of the target, as its files have it.
            start: Number of the first element, in row-major order.
            stop: After the last one; None for all.

        Returns:
            By name, float32, `[stop - start]`.
        """
        return {}

    def changes(self, regions: Iterable[Region]) -> bool:
        """Whether the edit may change one of these regions of the target."""
        return True

    def reduced(self, regions: Iterable[Region]) -> Edit:
        """The same edit with only what it `brings` for these regions."""
        return self

    def regions_in(self, tensor: Tensor) -> Iterator[Region]:
        """Yield the regions of a target's tensor for which the edit `brings` values."""
        return iter(())

    def unfit(self, shapes: Shapes) -> str | None:
        """Say what it `brings` for tensors that a target of these shapes does not have; None if nothing."""
        return None

    def faults(self, models: Mapping[str, Checkpoint], regions: Iterable[Mapping[str, Region]]) -> Iterator[str]:
        """Yield a sentence for each fault of what the edit `brings`, judged by the models; `verify` asks.

        Args:
            models: The plan's, the source among them.
            regions: Of the selected units, by model.
        """
        return iter(())

    def unused(self, regions: Iterable[Region]) -> Iterator[str]:
        """Yield the names of what the edit `brings` for other regions of the target than these."""
        return iter(())

    def counts(self) -> dict[str, int]:
        """What it `brings`, in numbers: `directions`, and their `degrees_of_freedom`; empty if nothing."""
        return {}

    def loras(self) -> Iterator[tuple[str, Box | None, numpy.ndarray, numpy.ndarray]]:
        """Yield what it adds to the target as LoRAs of scale 1, if it can be written so.

        Yields:
            The target's tensor, the matrix's box in it (None for all), B `[m, r]` and A `[r, n]`, both float32.
        """
        return iter(())

    def files(self) -> dict[str, bytes]:
        """Small files that hold what the edit `brings`, to be written into a result, by name."""
        return {}

    def parameters(self) -> dict[str, str]:
        """The keys of a recipe that name those files, to replay a result."""
        return {}

    def exact(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The new values before rounding."""
        # Separate operations: fused ones, such as `lerp` or `add(alpha=...)`, differ between GPU and CPU.
        change = self.change(values)
        return values["target"] + (change if self.strength == 1 else change * self.strength)

    def new_values(
        self, values: Mapping[str, torch.Tensor], dtype: torch.dtype, rounding: Rounding | None = None
    ) -> torch.Tensor:
        """The new values, computed in float32 (float64 if an input is) and rounded once, to nearest.

        Args:
            values: The values of `inputs` as stored, and of what the edit `brings`; of one shape.
            dtype: The target's.
            rounding: Counts losses. A value that overflows becomes the dtype's largest value.

        Returns:
            A new tensor of `dtype`, or an input that is copied unchanged.
        """
        torch = _torch()
        if self.copies is not None and values[self.copies].dtype == dtype:
            return values[self.copies]
        is_double = any(values[name].dtype == torch.float64 for name in self.inputs)
        precise = torch.float64 if is_double else torch.float32
        inputs = {name: values[name].to(precise) for name in (*self.inputs, *self.brings)}
        exact = self.exact(inputs)
        result = exact.to(dtype)
        limits, tiny = torch.finfo(dtype), torch.finfo(exact.dtype).tiny
        num_overflowed = 0
        # One pass over the values, where nearly always all are in range; NaN is not.
        if exact.numel() and not all(-limits.max <= end <= limits.max for end in map(float, exact.aminmax())):
            overflowed = result.isinf()
            for value in inputs.values():
                overflowed &= value.isfinite()
            num_overflowed = int(overflowed.sum())
        if num_overflowed:
            result = torch.where(overflowed, torch.sign(exact).to(dtype) * limits.max, result)
        if rounding is not None:
            # Without a dtype whose smallest normal number is larger, none can be lost.
            lost = (exact.abs() >= tiny) & (result.abs() < limits.tiny) if tiny < limits.tiny else exact.new_zeros(0)
            rounding.add(num_overflowed, int(lost.sum()))
        return result

    def tiles(
        self, models: Mapping[str, Checkpoint], regions: Mapping[str, Region], rounding: Rounding | None = None
    ) -> Iterator[tuple[bytes, dict[str, bytes]]]:
        """Yield a region's new bytes in tiles, each with the bytes of the inputs by model.

        Imports torch only to compute.

        Args:
            models: The plan's.
            regions: By model, of equal size; includes the target's.
            rounding: Counts losses.

        Raises:
            CheckpointError: If a file changes while it is read.
        """
        dtype = regions["target"].tensor.dtype
        if self.copies is not None and regions[self.copies].tensor.dtype == dtype:
            for tile in read_tiles(models[self.copies], regions[self.copies]):
                yield tile, {self.copies: tile}
            return
        dtypes = {name: region.tensor.dtype for name, region in regions.items()}
        start = 0
        for tiles in zip(*(read_tiles(models[name], regions[name]) for name in self.inputs), strict=True):
            inputs = dict(zip(self.inputs, tiles, strict=True))
            new = self.new_bytes(inputs, dtypes, regions["target"], start, rounding)
            start += len(new) // regions["target"].num_element_bytes
            yield new, inputs

    def new_bytes(
        self,
        tiles: Mapping[str, bytes],
        dtypes: Mapping[str, str],
        ours: Region,
        start: int,
        rounding: Rounding | None = None,
    ) -> bytes:
        """Compute the new bytes of elements of the target's region; imports torch.

        Args:
            tiles: The bytes of these elements in each of `inputs`.
            dtypes: As safetensors spells them, by model; the target's included.
            ours: The target's region.
            start: Number of the first element in it, in row-major order.
            rounding: Counts losses.
        """
        torch = _torch()
        values = {
            name: torch.frombuffer(bytearray(tile), dtype=getattr(torch, TORCH_NAMES[dtypes[name]]))
            for name, tile in tiles.items()
        }
        own = self.own_values(ours, start, start + len(values[self.inputs[0]]))
        values |= {name: torch.from_numpy(array) for name, array in own.items()}
        result = self.new_values(values, getattr(torch, TORCH_NAMES[dtypes["target"]]), rounding)
        return bytes(result.view(torch.uint8).numpy().tobytes())

    def differs(self, models: Mapping[str, Checkpoint], regions: Mapping[str, Region]) -> bool:
        """Whether a region's new values are not those that the target has; takes the arguments of `tiles`."""
        return any(shift.number for shift in self._shifts(models, regions))

    def shift(self, models: Mapping[str, Checkpoint], regions: Mapping[str, Region]) -> Shift:
        """How many of a region's values become others, and by how much; takes the arguments of `tiles`."""
        return Shift.total(self._shifts(models, regions))

    def _shifts(self, models: Mapping[str, Checkpoint], regions: Mapping[str, Region]) -> Iterator[Shift]:
        """Yield what becomes of each tile; of copied values only how many change, since that takes less time."""
        dtype = regions["target"].tensor.dtype
        ours = read_tiles(models["target"], regions["target"])
        for tile, (new, _) in zip(ours, self.tiles(models, regions), strict=True):
            if self.copies is None:
                yield Shift.between(tile, new, dtype)
            elif tile == new:
                yield Shift()
            else:
                width, _ = EXPONENTS[dtype]
                before, after = (numpy.frombuffer(one, dtype=width) for one in (tile, new))
                yield Shift(int(numpy.count_nonzero(before != after)))

    def checked_tiles(
        self, models: Mapping[str, Checkpoint], regions: Mapping[str, Region], rounding: Rounding
    ) -> Iterator[bytes]:
        """Yield a region's new bytes in tiles.

        Raises:
            CheckpointError: If a value is infinite or not a number, or a file changes while it is read.
            ValueDoesNotFit: If more values overflow the target's dtype than `rounding` allows.
        """
        ours = regions["target"]
        for tile, inputs in self.tiles(models, regions, rounding):
            for name, read in inputs.items():
                if name != "target" and _has_not_finite(read, regions[name]):
                    raise not_finite(regions[name].name, models, name)
            rounding.check(regions["source"].name, models["source"], ours.tensor.dtype)
            if "target" in inputs and _has_not_finite(tile, ours):
                # Overflows were clamped, so this is the target's own.
                raise CheckpointError(
                    f"{ours.name} of the target {models['target'].name} holds values that are infinite or not a "
                    f"number, which cannot be edited; `edit: copy` with `strength: 1` replaces them"
                )
            yield tile


class Blend(Edit):
    """Moves the target's values towards the source's."""

    name = "blend"
    provenance = "a blend with the source"

    def change(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return values["source"] - values["target"]

    def how(self, models: Mapping[str, str]) -> str:
        return f"moved by {self.strength:g} of the way to that of {models['source']}"

    @property
    def note(self) -> str:
        return f"Whatever is edited moves {self.strength:g} of the way to the source, as the recipe has it."

    def to_json(self) -> dict[str, Any]:
        return {"strength": self.strength}


class Copy(Blend):
    """Takes the source's values unchanged."""

    name = "copy"
    inputs = ("source",)
    copies = "source"
    verb = "replaced"
    done = "copied"
    origin = "source"
    result = "the source's"
    provenance = "from the source"
    note = ""

    def how(self, models: Mapping[str, str]) -> str:
        return f"copied from {models['source']}"

    def exact(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return values["source"]


class Difference(Edit):
    """Adds to the target what was trained into the source: the difference from what both were fine-tuned from.

    Reference: G. Ilharco et al., "Editing Models with Task Arithmetic", arXiv 2212.04089, section 4, here in selected
    units only.
    """

    name = "difference"
    inputs = ("target", "source", "pretrained")
    result = "the target's plus the difference"
    provenance = "the target plus the difference of source and pretrained model"

    def change(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return values["source"] - values["pretrained"]

    def how(self, models: Mapping[str, str]) -> str:
        return f"moved by {self.strength:g} times the difference from {models['pretrained']} to {models['source']}"


@dataclass(frozen=True)
class Directions(Edit):
    """Adds chosen directions of (source - target) to the target.

    Attributes:
        digest: The SHA-256 of the stored factors; empty before any are chosen.
        factors: By matrix of the target.
    """

    name = "directions"
    inputs = ("target",)
    brings = ("directions",)
    chooses = True
    divides = False
    unit = "the chosen directions of one matrix of a layer"
    result = "the target's plus directions"
    provenance = "along directions of the difference to the source"

    digest: str = ""
    factors: FactorTable = field(default=FactorTable(), compare=False, repr=False)

    @classmethod
    def of(cls, factors: FactorTable, strength: float = 1.0) -> Directions:
        """The edit of these factors."""
        return cls(strength, factors.digest, factors)

    @classmethod
    def from_json(cls, strength: float, said: Mapping[str, Any], files: Mapping[str, bytes]) -> Directions:
        if FILE_NAME in files:
            return cls.of(factors_in(files[FILE_NAME], FILE_NAME), strength)
        return cls(strength, str(said.get("directions", "")))

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "directions": self.digest}

    def own_values(self, region: Region, start: int = 0, stop: int | None = None) -> dict[str, numpy.ndarray]:
        stop = region.num_parameters if stop is None else stop
        return {"directions": self.factors.values(region, start, stop)}

    def changes(self, regions: Iterable[Region]) -> bool:
        return any(self.factors.find(region) is not None for region in regions)

    def reduced(self, regions: Iterable[Region]) -> Directions:
        return Directions.of(self.factors.selected(regions), self.strength)

    def regions_in(self, tensor: Tensor) -> Iterator[Region]:
        for place, _ in self.factors.by_tensor.get(tensor.name, ()):
            yield Region(tensor, place.box or whole_box(tensor.shape))

    def unfit(self, shapes: Shapes) -> str | None:
        return unfit(self.factors, shapes)

    def faults(self, models: Mapping[str, Checkpoint], regions: Iterable[Mapping[str, Region]]) -> Iterator[str]:
        for found in regions:
            ours = found["target"]
            factors = self.factors.of.get(Place(ours.tensor.name, None if ours.is_whole else ours.box))
            if factors is None and self.factors.find(ours) is not None:
                yield f"{ours.name} is not one matrix, but {FILE_NAME} holds directions of it as if it were"
            elif factors is not None and (what := misfit(factors, _difference(models, found, factors.right.shape[1]))):
                yield f"{ours.name}: {what}"

    def unused(self, regions: Iterable[Region]) -> Iterator[str]:
        used = {place for region in regions for place in _places(region)}
        return iter(sorted(str(place) for place in self.factors.of if place not in used))

    def loras(self) -> Iterator[tuple[str, Box | None, numpy.ndarray, numpy.ndarray]]:
        return ((place.tensor, place.box, left, right) for place, left, right in self.factors.loras(self.strength))

    def counts(self) -> dict[str, int]:
        return {"directions": self.factors.num_directions, "degrees_of_freedom": self.factors.num_values}

    def files(self) -> dict[str, bytes]:
        return {FILE_NAME: self.factors.content()}

    def parameters(self) -> dict[str, str]:
        return {"directions": FILE_NAME}

    def change(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return values["directions"]

    def how(self, models: Mapping[str, str]) -> str:
        return f"moved along {self.factors.num_directions} directions of its difference to {models['source']}"


EDITS: dict[str, type[Edit]] = {edit.name: edit for edit in (Copy, Blend, Difference, Directions)}


@dataclass(frozen=True)
class Rung:
    """One try of `edit: auto`.

    Attributes:
        edit: Its name in `EDITS`; the rung is left out if the recipe lacks a model that the edit reads.
        modules: Those of a recipe that names none.
    """

    edit: str
    modules: tuple[str, ...]

    def can_try(self, models: Collection[str]) -> bool:
        """Whether these models, from `MODELS`, are all that the edit reads."""
        return set(EDITS[self.edit].inputs) <= set(models)


# What `edit: auto` tries, in order, until a result meets the limits: the smallest changes first. All units of
# the last rung together say what is possible, and thereby what DSR every rung must reach.
LADDER = (Rung(Copy.name, ("gate",)), Rung(Difference.name, (AUTO,)), Rung(Directions.name, (AUTO,)))


def may_choose(edit: str) -> bool:
    """Whether an edit, or a rung of `auto`, first chooses what it adds, on prompts of its own."""
    return edit == AUTO or EDITS.get(edit, Edit).chooses


def make_edit(
    edit: str = "copy",
    strength: float = 1.0,
    said: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Edit:
    """Make an edit from its name and settings; a blend of strength 1 is a copy, any other copy a blend.

    Args:
        edit: Its name in `EDITS`.
        strength: In (0, 2].
        said: Further settings, as the edit's `to_json` gave them.
        files: What it brings, as its `files` gave them, if at hand.

    Raises:
        ValueError: If `EDITS` does not have it.
        CheckpointError: If a file is damaged.
    """
    if edit not in EDITS:
        raise ValueError(f"{edit!r:.80} is not an edit; known are {', '.join(EDITS)}")
    kind = EDITS[edit]
    if kind in (Copy, Blend):
        kind = Copy if strength == 1 else Blend
    return kind.from_json(strength, said or {}, files or {})


def _torch() -> Any:
    """Load torch where values are computed: a copy on disk does not need it."""
    import torch

    return torch


def _places(region: Region) -> list[Place]:
    """The names that a region may have in a file of factors."""
    boxed = Place(region.tensor.name, region.box)
    return [boxed, Place(region.tensor.name, None)] if region.is_whole else [boxed]


def _difference(models: Mapping[str, Checkpoint], regions: Mapping[str, Region], width: int) -> Iterator[numpy.ndarray]:
    """Yield source - target of a matrix in float32, in blocks of whole rows, each of `width` elements."""
    num_elements = max(TILE // width, 1) * width
    read = (read_tiles(models[name], regions[name], num_elements) for name in ("source", "target"))
    for tiles in zip(*read, strict=True):
        theirs, ours = (
            numbers(tile, regions[name].tensor.dtype) for name, tile in zip(("source", "target"), tiles, strict=True)
        )
        with numpy.errstate(invalid="ignore", over="ignore"):
            yield (theirs - ours).reshape(-1, width)


def not_finite(name: str, models: Mapping[str, Checkpoint], model: str) -> CheckpointError:
    """The error for a model's tensor that holds infinite values or NaN."""
    return CheckpointError(
        f"{name} of the {MODELS[model]} {models[model].name} holds values that are infinite or not a number; "
        f"it is damaged"
    )


def _has_not_finite(tile: bytes, region: Region) -> bool:
    """Whether a value in a tile is infinite or not a number: all bits of its exponent are set."""
    width, exponent = EXPONENTS[region.tensor.dtype]
    return bool(((numpy.frombuffer(tile, dtype=width) & exponent) == exponent).any())
