"""Published repairs that rewrite what a fine-tune changed, matrix by matrix in the resident target.

Their papers know three models: an aligned one, which is the source here; the fine-tune of it, which is the target; and
the unaligned model that the aligned one was made from, which is `pretrained`. The fine-tune's *delta* is target -
source; the *safety vector* is source - pretrained. They rewrite the matrices of attention and MLP in every layer, as
their published code does; RESTA also all other tensors that have one shape in the three models. Nothing else changes: a
vocabulary that grew stays the target's. All arithmetic is in float32 and rounded once, to the dtype of the target's
file, and the target is restored from its files bit for bit.

- Safe LoRA: Hsu et al. 2024, arXiv 2405.16833, sections 3.1 and 3.2.
- SafeMERGE: Djuhera et al. 2025, arXiv 2503.17239, and its published code.
- RESTA: Bhardwaj et al. 2024, arXiv 2402.11746, with DARE (Yu et al. 2023, arXiv 2311.03099, section 3). Its authors
  make an unaligned model by training on harmful answers. Without `pretrained`, it is here the source, abliterated
  (Arditi et al. 2024, arXiv 2406.11717, section 4.1): the direction of refusing is removed from all that is written.
- Safe Delta: Lu et al. 2025, arXiv 2505.12038, section 4.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dapa_merge.checkpoint.header import TORCH_NAMES
from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.checkpoint.region import Region
from dapa_merge.measure.live import LiveModel, Piece, mapped_values
from dapa_merge.measure.quantized import stored_shape
from dapa_merge.plan.plan import Plan, plan_transplant
from dapa_merge.progress import quiet

# What is added to the diagonal of a matrix of second moments, as a share of its mean; `percdamp` of the authors' code.
DAMPING = 0.01
# The modules whose rows are features of the residual stream.
WRITERS = ("down", "o")


def projected(delta: Tensor, safety: Tensor) -> Tensor:
    """Project a delta as Safe LoRA does: C delta with C = V V^T / ||V||_F, for the safety vector V.

    This is the paper's fast substitute for the projection on the columns of V, V (V^T V)^-1 V^T, which for most of the
    matrices of a model would be the identity. C also scales: by the square of each singular value over the norm of all.

    Args:
        delta: `[m, n]`.
        safety: `[m, n]`; if it is zero, so is the projection.
    """
    norm = torch.linalg.matrix_norm(safety)
    return torch.zeros_like(delta) if norm == 0 else safety @ (safety.T @ delta) / norm


def cosine(delta: Tensor, other: Tensor) -> float:
    """The cosine of two matrices: 1 if the first is zero, with nothing to project; 0 if only the other is."""
    norms = torch.linalg.matrix_norm(delta), torch.linalg.matrix_norm(other)
    if norms[0] == 0:
        return 1.0
    return 0.0 if norms[1] == 0 else float((delta * other).sum() / (norms[0] * norms[1]))


def dropped(delta: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """DARE: drop each element with a probability of `rate`, in [0, 1), and rescale the others by 1 / (1 - rate)."""
    if rate == 0:
        return delta
    kept = torch.rand(delta.shape, generator=generator) >= rate
    return delta * kept.to(delta.device) / (1 - rate)


def inverse(moment: Tensor) -> Tensor:
    """Invert the damped matrix of second moments of a layer's inputs, `[n, n]`: Safe Delta's H^-1.

    Inputs that are always zero get a moment of 1, as in the authors' code: changing their weights costs little.
    """
    diagonal = moment.diagonal()
    diagonal = torch.where(diagonal == 0, 1, diagonal)
    diagonal = diagonal + DAMPING * diagonal.mean()
    damped = moment - torch.diag(moment.diagonal()) + torch.diag(diagonal)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


def safe_delta(source: Tensor, target: Tensor, inverted: Tensor, share: float) -> Tensor:
    """Keep the elements of the delta that cost little safety, and move the others to make up for them.

    The safety loss of an element w_m is delta_m^2 / (2 [H^-1]_mm), its utility delta_m^2. Elements are kept in the
    order of utility over loss, that is by [H^-1]_mm, as long as their losses add up to at most `share` of the loss of
    the whole delta. (The authors' scale s is a budget in units of 1 / [H^-1]_mm, which depends on the size of a matrix
    and of its delta; both describe one sequence of choices.) The compensation is that of the Optimal Brain Surgeon for
    all kept elements at once: of all changes of the other elements of a row, the one with the least loss.

    Args:
        source: `[m, n]`.
        target: `[m, n]`.
        inverted: `[n, n]`, H^-1 as `inverse` gives it.
        share: In [0, 1].
    """
    delta = target - source
    sensitivity = inverted.diagonal()
    order = torch.argsort(sensitivity, descending=True, stable=True)
    # Column by column, in their order: all elements of a column have one ratio.
    losses = (delta[:, order].T ** 2 / (2 * sensitivity[order, None])).flatten().cumsum(0)
    num_kept = int((losses <= share * losses[-1]).sum()) if losses[-1] > 0 else 0
    num_columns, num_rows = divmod(num_kept, len(delta))
    parts = [(slice(num_rows), order[: num_columns + 1]), (slice(num_rows, None), order[:num_columns])]
    result = source.clone()
    for rows, kept in parts:
        if len(kept) and len(result[rows]):
            changed = delta[rows][:, kept]
            # Zero where nothing is kept, `changed` itself in the kept columns.
            result[rows] += torch.linalg.solve(inverted[kept][:, kept], changed, left=False) @ inverted[kept]
            result[rows, kept] = target[rows][:, kept]
    return result


@dataclass(frozen=True)
class Place:
    """A tensor of the target, or a part of one.

    Attributes:
        name: Unique in the model.
        tensor: The name in memory of the parameter that it is a part of.
        parameter: That parameter, which may be quantized.
        slices: Where it is in `parameter`, as that is without quantization.
        regions: Where it is on disk, by model.
        writes: Whether it is a matrix that writes to the residual stream.
    """

    name: str
    tensor: str
    parameter: torch.nn.Parameter
    slices: tuple[slice, ...]
    regions: Mapping[str, Region]
    writes: bool = False

    @property
    def shape(self) -> list[int]:
        """Its shape without dimensions of one element, as of a single expert; at least one dimension."""
        return [size for size in self.regions["target"].shape if size != 1] or [1]

    @property
    def num_elements(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix, not a bias or a norm."""
        return len(self.shape) == 2


class Weights:
    """The tensors of a resident target, with their values in all models, to be rewritten and restored.

    Attributes:
        layers: The parts of attention and MLP.
        others: All other tensors that have one shape in all models.
        num_changed: Elements that differ from the target's, within `rewritten`.
    """

    def __init__(self, live: LiveModel, plan: Plan, pretrained: Checkpoint | None = None) -> None:
        """Find the places.

        Args:
            live: The target.
            plan: With all units of target and source.
            pretrained: What both were fine-tuned from, if known.

        Raises:
            CheckpointError: If the pretrained model's layers are not the target's.
        """
        self._live = live
        if pretrained is not None:
            plan = plan_transplant(plan.target, plan.source, plan.modules, pretrained=pretrained.whole())
        self.models = plan.models
        names = {id(value): name for name, value in live.model.named_parameters()}
        slots = zip(live.slots(plan.units), plan.regions(plan.units), strict=True)
        self.layers = tuple(
            Place(
                f"{slot.unit} {index}", names[id(slot.parameter)], slot.parameter, slot.slices, regions,
                slot.unit.module in WRITERS and len(regions["target"].shape) > 1,
            )
            for index, (slot, regions) in enumerate(slots)
        )  # fmt: skip
        covered = {id(place.parameter) for place in self.layers}
        self.others = tuple(
            Place(name, name, value, (), regions)
            for name, value in live.model.named_parameters()
            if id(value) not in covered and (regions := self._regions(name, value)) is not None
        )
        self.num_changed = 0

    def _regions(self, name: str, value: torch.nn.Parameter) -> dict[str, Region] | None:
        """A tensor's regions if all models have it in the same shape, as a float."""
        quantized = self._live.quantized.get(value)
        shape = value.shape if quantized is None else stored_shape(quantized)
        found = {model: checkpoint.tensors.get(name) for model, checkpoint in self.models.items()}
        regions = {model: Region.of(tensor) for model, tensor in found.items() if tensor is not None}
        fits = all(region.shape == shape and region.tensor.dtype in TORCH_NAMES for region in regions.values())
        return regions if fits and len(regions) == len(self.models) else None

    def values(self, place: Place, model: str) -> Tensor:
        """A model's values at a place, in float32 on the target's device; float64 if its file has that."""
        stored = mapped_values(self.models[model], place.regions[model]).reshape(place.shape)
        return stored.to(place.parameter.device, torch.promote_types(stored.dtype, torch.float32))

    @contextmanager
    def rewritten(self, places: Sequence[Place], new: Callable[[Place], Tensor | None]) -> Iterator[PreTrainedModel]:
        """Rewrite places inside a `with` block, which gets the model; afterwards the target is restored bit for bit.

        Args:
            places: What to rewrite.
            new: Computes the new values of one, shaped as its `shape`; None leaves it as it is.
        """
        changed: list[Place] = []
        self.num_changed = 0
        # Quantized weights are written one at a time, and whole.
        of_parameter: dict[torch.nn.Parameter, list[Place]] = {}
        for place in places:
            of_parameter.setdefault(place.parameter, []).append(place)
        try:
            for parameter, parts in of_parameter.items():
                pieces: list[Piece] = []
                for place in parts:
                    values = new(place)
                    if values is None:
                        continue
                    own = self._stored(place)
                    rounded = values.to(own.dtype).reshape(own.shape)
                    self.num_changed += int((rounded.cpu() != own).sum())
                    if parameter in self._live.quantized:
                        pieces.append((place.slices, place.regions["target"], rounded))
                        continue
                    # Recorded first, so that a place that is written partly is restored too.
                    changed.append(place)
                    self._put(place, rounded)
                if pieces:
                    self._live.quantize_anew(parameter, pieces)
            with quiet("transformers"):
                yield self._live.model
        finally:
            self._live.restore_quantized()
            for place in changed:
                self._put(place, self._stored(place))
            self.num_changed = 0

    def _stored(self, place: Place) -> Tensor:
        return mapped_values(self.models["target"], place.regions["target"])

    def _put(self, place: Place, values: Tensor) -> None:
        with torch.no_grad():
            box = place.parameter[place.slices]
            box.copy_(values.reshape(box.shape))


@dataclass(frozen=True)
class Deltas:
    """The deltas and safety vectors of a target's weights.

    Attributes:
        inverted: For Safe Delta, H^-1 of a linear layer's inputs, `[n, n]`, by the name of its weight.
        direction: Of refusing in the source's residual stream, `[hidden]`, of length 1, for want of a pretrained model.
        seed: Of what DARE drops.
    """

    weights: Weights
    inverted: Mapping[str, Tensor] | None = None
    direction: Tensor | None = None
    seed: int = 0

    def delta(self, place: Place) -> Tensor:
        """The fine-tune's delta, target - source."""
        return self.weights.values(place, "target") - self.weights.values(place, "source")

    def safety(self, place: Place) -> Tensor:
        """The safety vector, source - pretrained or, without that, source - abliterated source."""
        source = self.weights.values(place, "source")
        if "pretrained" in self.weights.models:
            return source - self.weights.values(place, "pretrained")
        if self.direction is None or not place.writes or len(source) != len(self.direction):
            return torch.zeros_like(source)
        direction = self.direction.to(source)
        return torch.outer(direction, direction @ source)

    @cached_property
    def matrices(self) -> tuple[Place, ...]:
        """The matrices of attention and MLP."""
        return tuple(place for place in self.weights.layers if place.is_matrix)

    @cached_property
    def cosines(self) -> dict[str, float]:
        """How far each matrix' delta keeps to the safety vector: its cosine with its own projection."""
        found = {}
        for place in self.matrices:
            delta = self.delta(place)
            found[place.name] = cosine(delta, projected(delta, self.safety(place)))
        return found

    def least_safe(self, share: float) -> set[str]:
        """The share of the matrices with the lowest cosines, rounded up: Safe LoRA's choice by number of layers."""
        ranked = sorted(self.cosines, key=self.cosines.__getitem__)
        return set(ranked[: math.ceil(share * len(ranked))])

    @contextmanager
    def safe_lora(self, share: float) -> Iterator[PreTrainedModel]:
        """Safe LoRA: project the delta of the least safe matrices."""
        chosen = self.least_safe(share)

        def new(place: Place) -> Tensor | None:
            if place.name not in chosen:
                return None
            return self.weights.values(place, "source") + projected(self.delta(place), self.safety(place))

        with self.weights.rewritten(self.matrices, new) as model:
            yield model

    @contextmanager
    def safemerge(self, share: float, weight: float) -> Iterator[PreTrainedModel]:
        """SafeMERGE: blend the least safe matrices with those of the safe model.

        The paper's safe model was trained on safety data. Here it is the source, whose delta is zero.
        """
        chosen = self.least_safe(share)

        def new(place: Place) -> Tensor | None:
            if place.name not in chosen:
                return None
            return self.weights.values(place, "source") + self.delta(place) * (1 - weight)

        with self.weights.rewritten(self.matrices, new) as model:
            yield model

    @contextmanager
    def resta(self, rate: float, gamma: float) -> Iterator[PreTrainedModel]:
        """RESTA: drop a share of the delta, rescale the rest, and add gamma times the safety vector."""

        def new(place: Place) -> Tensor:
            # A generator for each tensor, so that what is dropped does not depend on their order.
            digest = hashlib.sha256(f"{self.seed} {place.name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
            kept = dropped(self.delta(place), rate, generator)
            return self.weights.values(place, "source") + kept + gamma * self.safety(place)

        with self.weights.rewritten((*self.weights.layers, *self.weights.others), new) as model:
            yield model

    @contextmanager
    def safe_delta(self, share: float) -> Iterator[PreTrainedModel]:
        """Safe Delta: keep what costs at most a share of the whole delta's safety loss, and compensate for it."""
        inverted = self.inverted or {}

        def new(place: Place) -> Tensor | None:
            if place.tensor not in inverted:
                return None
            source, target = (self.weights.values(place, name) for name in ("source", "target"))
            return safe_delta(source, target, inverted[place.tensor].to(source), share)

        with self.weights.rewritten(self.matrices, new) as model:
            yield model
