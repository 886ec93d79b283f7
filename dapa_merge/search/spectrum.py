"""The leading singular directions of (source - target), matrix by matrix.

Exact for small matrices; for others by randomized subspace iteration (N. Halko et al., "Finding Structure with
Randomness", SIAM Review 2011, algorithm 4.4), repeated until each direction that is kept passes the check
that `verify` makes too. One matrix's difference is in memory at a time, beside the factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dapa_merge.checkpoint.region import Region
from dapa_merge.checkpoint.units import Unit
from dapa_merge.errors import CheckpointError, DapaError
from dapa_merge.files import replace_file
from dapa_merge.measure.live import mapped_values
from dapa_merge.plan.directions import TOLERANCE, Place
from dapa_merge.plan.edit import MODELS, not_finite
from dapa_merge.plan.plan import Plan
from dapa_merge.progress import LOG, advance

# The most directions of a matrix, the most where the difference decays slowly, as that of siblings and of a training of
# all weights does, and the share of the squared Frobenius norm that is enough.
MAX_RANK, MORE_RANK = 16, 64
SHARE = 0.99
# Matrices whose smaller side is at most this are decomposed exactly: it takes less than the iteration.
EXACT_SIDE = 320
OVERSAMPLING = 16
MAX_ITERATIONS = 12
# Directions far more exact than what is allowed lose nothing by being rounded when they are stored.
RESIDUAL = TOLERANCE / 4


@dataclass(frozen=True)
class Spectrum:
    """The leading directions of one matrix.

    Attributes:
        unit: The unit that holds the matrix.
        region: The matrix in the target's files.
        left: `[m, r]`, float32: singular value times left singular vector.
        right: `[r, n]`, float32: right singular vectors.
        values: `[r]`, float32: singular values, the largest first.
        share: The share of ||source - target||_F^2 that they hold, in (0, 1].
    """

    unit: Unit
    region: Region
    left: torch.Tensor
    right: torch.Tensor
    values: torch.Tensor
    share: float

    @property
    def rank(self) -> int:
        """Number of directions."""
        return len(self.values)

    @property
    def place(self) -> Place:
        """The matrix's name in a file of factors."""
        return _place(self.region)


def _place(region: Region) -> Place:
    whole = region.is_whole and len(region.shape) == 2
    return Place(region.tensor.name, None if whole else region.box)


def kept_spectra(
    plan: Plan,
    units: Sequence[Unit],
    device: torch.device,
    path: Path | None,
    max_rank: int = MAX_RANK,
    find: Callable[[Sequence[Unit]], Iterable[Spectrum]] | None = None,
) -> list[Spectrum]:
    """Decompose as `spectra_of` does, or read what an earlier run of the same models kept.

    Args:
        plan: The models.
        units: Whose matrices.
        device: Where to decompose.
        path: The file to keep, named by what decides its content; None to keep nothing.
        max_rank: The most directions of a matrix.
        find: Decomposes in its own way, to the same directions; None for `spectra_of`.
    """
    regions = {
        str(_place(found["target"])): (unit, found["target"]) for unit in units for found in plan.regions((unit,))
    }
    if path is not None and (found := _read(path, regions)) is not None:
        return found
    spectra = list(spectra_of(plan, units, device, max_rank) if find is None else find(units))
    if path is not None and spectra:
        arrays = {f"{one.place}.{name}": getattr(one, name).cpu().contiguous() for one in spectra for name in _PARTS}
        shares = {str(one.place): repr(one.share) for one in spectra}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, save(arrays, shares))
        except (OSError, DapaError) as error:
            LOG.info(f"the directions are not kept for another run: {error}")
    return spectra


def _read(path: Path, regions: Mapping[str, tuple[Unit, Region]]) -> list[Spectrum] | None:
    """The spectra in a file, in the order of their matrices; None if it is absent or not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            shares = file.metadata() or {}
            found = []
            for place, (unit, region) in regions.items():
                if place in shares:
                    left, right, values = (file.get_tensor(f"{place}.{name}") for name in _PARTS)
                    found.append(Spectrum(unit, region, left, right, values, float(shares[place])))
            return found
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


_PARTS = ("left", "right", "values")


def spectra_of(plan: Plan, units: Iterable[Unit], device: torch.device, max_rank: int = MAX_RANK) -> Iterator[Spectrum]:
    """Decompose the difference of every matrix of some units; matrices that do not differ, and biases, are left out.

    Raises:
        CheckpointError: If a model has values that are infinite or not a number.
    """
    # Apple's accelerator lacks float64 and most decompositions.
    device = torch.device("cpu") if device.type == "mps" else device
    for unit in units:
        for regions in plan.regions((unit,)):
            if len(regions["target"].extents) == 2:
                difference = difference_of(plan, regions, device)
                if bool(difference.any()):
                    left, values, right = decompose(difference, max_rank)
                    share = float((values.double() ** 2).sum() / (difference.double() ** 2).sum())
                    yield Spectrum(unit, regions["target"], left * values, right, values, min(share, 1.0))
            advance(regions["target"].num_parameters, "parameters")


def difference_of(plan: Plan, regions: dict[str, Region], device: torch.device) -> torch.Tensor:
    """Subtract the target's matrix from the source's: `[m, n]`, float32; raises `CheckpointError` if not finite."""
    shape = regions["target"].extents
    values = {}
    for name in ("source", "target"):
        values[name] = mapped_values(plan.models[name], regions[name]).reshape(shape).to(device, torch.float32)
        if not bool(values[name].isfinite().all()):
            raise not_finite(regions[name].name, plan.models, name)
    difference = values["source"] - values["target"]
    if not bool(difference.isfinite().all()):
        raise CheckpointError(
            f"{regions['target'].name}: the difference of the {MODELS['source']} {plan.source.name} and the target "
            f"{plan.target.name} is too large for float32; one of them is damaged"
        )
    return difference


def decompose(
    difference: torch.Tensor, max_rank: int = MAX_RANK, share: float = SHARE
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The leading singular directions: as many as hold `share` of the squared norm, at most `max_rank`.

    Deterministic for one device. Directions that the iteration cannot find exactly enough, because the singular values
    beyond hardly decay, are left out.

    Args:
        difference: `[m, n]`, float32.
        max_rank: The most directions.
        share: Of the squared Frobenius norm, in (0, 1].

    Returns:
        Left vectors `[m, r]`, values `[r]` and right vectors `[r, n]`; at least one direction.
    """
    if min(difference.shape) <= max(EXACT_SIDE, 2 * (max_rank + OVERSAMPLING)):
        # LAPACK's faster divide-and-conquer algorithm fails on some matrices; float64 converges on those too.
        left, values, right = torch.linalg.svd(difference.double(), full_matrices=False)
        left, values, right = (part.float() for part in (left, values, right))
    else:
        left, values, right = _iterate(difference, max_rank)
    total = (difference.double() ** 2).sum()
    held = (values.double() ** 2).cumsum(0)
    rank = min(int((held < share * total).sum()) + 1, max_rank, len(values))
    return left[:, :rank].contiguous(), values[:rank].contiguous(), right[:rank].contiguous()


def subspace_iterations(
    difference: torch.Tensor, size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield approximations of the leading singular directions, each after one more iteration; deterministic.

    Args:
        difference: `[m, n]`, float32.
        size: Number of directions; the last few are the least exact.

    Yields:
        Left vectors `[m, size]`, values `[size]` and right vectors `[size, n]`.
    """
    generator = torch.Generator(difference.device).manual_seed(0)
    basis = torch.randn((difference.shape[1], size), generator=generator, device=difference.device)
    while True:
        basis = torch.linalg.qr(difference @ basis).Q
        basis = torch.linalg.qr(difference.T @ basis).Q
        left, values, inner = torch.linalg.svd(difference @ basis, full_matrices=False)
        yield left, values, (basis @ inner.T).T


def _iterate(difference: torch.Tensor, max_rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    found = subspace_iterations(difference, max_rank + OVERSAMPLING)
    for left, values, right in islice(found, MAX_ITERATIONS):
        residuals = torch.linalg.vector_norm(difference.T @ left - right.T * values, dim=0) / values.clamp_min(1e-30)
        if bool((residuals[:max_rank] <= RESIDUAL).all()):
            break
    exact = residuals <= RESIDUAL
    # The leading one converges first; a matrix without any decay still has that one.
    exact[0] = True
    return left[:, exact], values[exact], right[exact]
