"""How the weights of a target differ from its source's: module by module, read once, without loading a model.

The leading singular values of (target - source) are those of a randomized sketch (N. Halko et al., "Finding Structure
with Randomness", SIAM Review 2011, algorithm 4.4, one iteration). What a 16-bit format cannot hold shows in them as
noise of full rank, whose size is known: a rounded value is off by a twelfth of its last digit's square, on average.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from dapa_merge.checkpoint.header import TORCH_NAMES
from dapa_merge.checkpoint.region import Region, TensorBox
from dapa_merge.checkpoint.units import layer_number
from dapa_merge.errors import CheckpointError
from dapa_merge.measure.live import mapped_values
from dapa_merge.plan.edit import not_finite
from dapa_merge.plan.plan import Plan
from dapa_merge.progress import advance
from dapa_merge.search.spectrum import EXACT_SIDE, subspace_iterations

# A LoRA of up to this rank is recognized; beyond, singular values are not told apart.
MAX_RANK = 128
# More columns of the sketch, whose own values are not exact.
OVERSAMPLING = 24
# A singular value falls off sharply if the one before it is so many times as large. Those of noise fall by a hundredth.
FALL = 1.2
# The share of the squared norm that the effective number of directions holds.
SHARE = 0.9
# Values that are in memory as floats at once: those of larger matrices are read in parts, and the first is decomposed.
MAX_VALUES = 1 << 26
# Modules of other tensors than a layer's projections, by their names; the first that fits.
_OTHERS = (
    ("embedding", re.compile(r"embed|wte|wpe|word_embeddings")),
    ("head", re.compile(r"lm_head|^output\.|embed_out")),
    ("norm", re.compile(r"norm|ln_|layernorm|\.ln")),
    ("router", re.compile(r"router|\.gate\.weight$")),
)
# The bits of a float32's exponent.
_EXPONENT = 0x7F800000


@dataclass(frozen=True)
class Decay:
    """How the singular values of one matrix's difference decay.

    Attributes:
        rank: Number of singular values before the last sharp fall; 0 without one.
        rest: The share of the squared Frobenius norm beyond them, in [0, 1].
        first: The share of the first direction, in (0, 1].
        num_directions: Number of directions that hold nine tenths; None if more than `MAX_RANK`.
        output: `[m]`, float32: the first direction in the space of the outputs.
        input: `[n]`, float32: the same in that of the inputs.
    """

    rank: int
    rest: float
    first: float
    num_directions: int | None
    output: torch.Tensor
    input: torch.Tensor


@dataclass(frozen=True)
class Difference:
    """How one module of one layer differs, or one tensor that belongs to none.

    Attributes:
        layer: From 0; None outside of the layers.
        module: A module of the layer (`gate`, `q`, ...), or `embedding`, `head`, `norm`, `router` or `other`.
        tensor: The first of the target's tensors that hold it, or the part of that tensor: `name[0:64]`.
        num_values: Number of values that both have.
        num_changed: Number of those that differ.
        num_beyond: Number of those that differ by more than half of the last digit of the coarser of their dtypes.
        squares: The squared Frobenius norm of target - source.
        source_squares: That of the source.
        overlap: The inner product <source, target - source>.
        rounding: The part of `squares` that rounding explains: a twelfth of the square of each value's last digit, or
            the mean square of the difference where that is less, since such a value did not move.
        decay: Of its first matrix that differs; None if none does.
        added: Number of values that only the target has: rows of a larger vocabulary.
        alignment: <target - pretrained, source - pretrained> and ||source - pretrained||^2; None without that model.
    """

    layer: int | None
    module: str
    tensor: str
    num_values: int
    num_changed: int = 0
    num_beyond: int = 0
    squares: float = 0.0
    source_squares: float = 0.0
    overlap: float = 0.0
    rounding: float = 0.0
    decay: Decay | None = None
    added: int = 0
    alignment: tuple[float, float] | None = None

    @property
    def norm(self) -> float:
        """||target - source|| as a share of ||source||."""
        return math.sqrt(self.squares / self.source_squares) if self.source_squares else float(self.squares > 0)

    @property
    def noise(self) -> float:
        """The share of the squared norm that rounding alone explains, in [0, 1]."""
        return self.rounding / self.squares if self.squares else 0.0


def differences(plan: Plan) -> Iterator[Difference]:
    """Compare every tensor of a target with its source's: first the plan's units, then all others by their names.

    Args:
        plan: The models, with the units of all modules that can be told apart.

    Raises:
        CheckpointError: If a model has values that are infinite or not a number.
    """
    held: set[str] = set()
    for unit in plan.units:
        held.update(unit.tensors)
        yield _joined(unit.layer, unit.module, [_compared(plan, regions) for regions in plan.regions((unit,))])
    for name, tensor in plan.target.tensors.items():
        twins = {role: checkpoint.tensors.get(name) for role, checkpoint in plan.models.items()}
        if name in held or tensor.dtype not in TORCH_NAMES or twins["source"] is None:
            continue
        found = {role: twin for role, twin in twins.items() if twin is not None}
        if any(len(twin.shape) != len(tensor.shape) for twin in found.values()):
            continue
        shape = [min(sizes) for sizes in zip(*(twin.shape for twin in found.values()), strict=True)]
        part = TensorBox(name, tuple((0, size) for size in shape))
        compared = _compared(plan, {role: Region.of(twin, part) for role, twin in found.items()})
        module = next((module for module, names in _OTHERS if names.search(name)), "other")
        added = tensor.num_parameters - compared.num_values
        yield replace(compared, layer=layer_number(name), module=module, added=added)


def _joined(layer: int | None, module: str, parts: list[Difference]) -> Difference:
    """The differences of a unit's parts as one."""
    alignments = [part.alignment for part in parts if part.alignment is not None]
    return Difference(
        layer,
        module,
        parts[0].tensor,
        num_values=sum(part.num_values for part in parts),
        num_changed=sum(part.num_changed for part in parts),
        num_beyond=sum(part.num_beyond for part in parts),
        squares=math.fsum(part.squares for part in parts),
        source_squares=math.fsum(part.source_squares for part in parts),
        overlap=math.fsum(part.overlap for part in parts),
        rounding=math.fsum(part.rounding for part in parts),
        decay=next((part.decay for part in parts if part.decay is not None), None),
        alignment=(math.fsum(one for one, _ in alignments), math.fsum(one for _, one in alignments))
        if alignments
        else None,
    )


def _compared(plan: Plan, regions: Mapping[str, Region]) -> Difference:
    """Compare one region with its twins."""
    target, source = (mapped_values(plan.models[role], regions[role]) for role in ("target", "source"))
    extents = regions["target"].extents
    advance(regions["target"].num_parameters, "parameters")
    is_matrix = len(extents) == 2
    num_rows = max(1, MAX_VALUES // max(1, math.prod(extents[1:])))
    flat = [values.reshape(extents) if extents else values.reshape(1) for values in (target, source)]
    base = None
    if "pretrained" in regions:
        base = mapped_values(plan.models["pretrained"], regions["pretrained"]).reshape(flat[0].shape)
    # A value between two powers of two has a last digit of eps times the lower one, in the coarser of the two dtypes.
    eps = max(torch.finfo(values.dtype).eps for values in flat)
    changed = beyond = 0
    squares, source_squares, overlaps, rounding, shared, moved = [], [], [], [], [], []
    decay: Decay | None = None
    for start in range(0, len(flat[0]), num_rows):
        stored = [values[start : start + num_rows] for values in flat]
        ours, theirs = (values.float() for values in stored)
        source_squares.append(_squares(theirs))
        if base is not None:
            before = base[start : start + num_rows].float()
            alignment = theirs - before
            shared.append(float(((ours - before).double() * alignment.double()).sum()))
            moved.append(_squares(alignment))
        if stored[0].dtype == stored[1].dtype and torch.equal(*stored):
            continue
        difference = ours - theirs
        squares.append(_squares(difference))
        if not math.isfinite(squares[-1]):
            raise _not_finite(plan, regions)
        overlaps.append((_squares(ours) - source_squares[-1] - squares[-1]) / 2)
        differs = difference != 0
        digits = eps * _powers(ours)
        changed += int(differs.sum())
        beyond += int((difference.abs() > digits / 2).sum())
        rounding.append(float((digits.square() / 12).clamp_max(squares[-1] / difference.numel()).sum()))
        if is_matrix and decay is None and squares[-1]:
            decay = decay_of(difference)
    return Difference(
        None,
        "",
        regions["target"].name,
        regions["target"].num_parameters,
        changed,
        beyond,
        math.fsum(squares),
        math.fsum(source_squares),
        math.fsum(overlaps),
        math.fsum(rounding),
        decay,
        alignment=None if base is None else (math.fsum(shared), math.fsum(moved)),
    )


def _squares(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64) ** 2)


def _powers(values: torch.Tensor) -> torch.Tensor:
    """The largest powers of two that are not above the magnitudes of float32 values; 0 for subnormal ones."""
    return (values.view(torch.int32) & _EXPONENT).view(torch.float32)


def decay_of(difference: torch.Tensor) -> Decay:
    """How the singular values of a matrix decay.

    Args:
        difference: `[m, n]`, float32, not all zero.
    """
    if min(difference.shape) <= EXACT_SIDE:
        left, values, right = torch.linalg.svd(difference.double(), full_matrices=False)
        # The last values of a square matrix of noise fall sharply, too.
        num_told = min(MAX_RANK, len(values) // 2)
    else:
        left, values, right = next(subspace_iterations(difference, MAX_RANK + OVERSAMPLING))
        num_told = MAX_RANK
    shares = values.double() ** 2 / _squares(difference)
    floor = float(values[0]) * torch.finfo(torch.float32).eps
    falls = values[:num_told] >= FALL * values[1 : num_told + 1].clamp_min(floor)
    falls &= values[:num_told] > floor
    rank = int(falls.nonzero().max()) + 1 if bool(falls.any()) else 0
    held = shares.cumsum(0)[:MAX_RANK]
    enough = (held >= SHARE).nonzero()
    return Decay(
        rank,
        max(0.0, 1.0 - float(held[rank - 1])) if rank else 1.0,
        min(1.0, float(shares[0])),
        int(enough.min()) + 1 if len(enough) else None,
        left[:, 0].float(),
        right[0].float(),
    )


def _not_finite(plan: Plan, regions: Mapping[str, Region]) -> CheckpointError:
    for role, region in regions.items():
        if not bool(mapped_values(plan.models[role], region).isfinite().all()):
            return not_finite(region.name, plan.models, role)
    return CheckpointError(f"{regions['target'].name}: the difference of the models is too large for float32")
