"""Module influence: the effect of each unit of the source, alone in the target, on harmful prompts.

As in DAPA (arXiv 2406.01514), figure 4, the change of the last token's hidden state is averaged over prompts. Because a
state can change without more refusing, the change of log p(refusal) - log p(answer) is measured too: the first shows
how sensitive the model is to a unit, the second the unit's effect on refusing. Where a recipe's edit chose directions,
what they put back of each unit can be held against both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
from numpy.typing import NDArray

from dapa_merge.checkpoint.region import Region
from dapa_merge.checkpoint.units import Unit
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.live import LiveModel, mapped_values
from dapa_merge.measure.perplexity import losses
from dapa_merge.plan.directions import FactorTable
from dapa_merge.plan.plan import Plan
from dapa_merge.progress import advance
from dapa_merge.search.attribution import Side
from dapa_merge.trace.replay import Replay


@dataclass(frozen=True)
class Influence:
    """The effects of units of the source in the target, for each prompt.

    Attributes:
        hidden: Change of the last token's state after the last layer, relative to its length, `[prompts, units]`.
        refusing: Rise of log p(refusal) - log p(answer), in nats, `[prompts, units]`.
        before: The same difference in the target, `[prompts]`.
        num_passes: The cost, in passes of one row through all layers.
    """

    units: tuple[Unit, ...]
    hidden: NDArray[numpy.float32]
    refusing: NDArray[numpy.float32]
    before: NDArray[numpy.float32]
    num_passes: float


@torch.inference_mode()
def influence(
    live: LiveModel,
    pairs: Sequence[Sequence[Side]],
    units: Sequence[Unit],
    *,
    batch_size: BatchSize,
) -> Influence:
    """Transplant each unit alone, and measure its effect on each prompt, given by both sides from `sides_of`.

    A batch has two sequences for each prompt.

    Raises:
        UsageError: If a single prompt does not fit in the device's memory.
        CheckpointError: If the model's layers are not found.
    """
    # Longest first, so that the rows of a batch have similar lengths.
    order = sorted(range(len(pairs)), key=lambda index: -len(pairs[index][0].row.ids))
    work = _UnitByUnit(live, units)
    rows = list(batch_size.map(lambda numbers: work.measure([pairs[number] for number in numbers]), order))
    in_order = [row for _, row in sorted(zip(order, rows, strict=True), key=lambda one: one[0])]
    return Influence(
        units=tuple(units),
        hidden=numpy.stack([row.hidden for row in in_order]),
        refusing=numpy.stack([row.refusing for row in in_order]),
        before=numpy.array([row.before for row in in_order], numpy.float32),
        num_passes=work.num_passes,
    )


def share(unit: Unit, num_layers: int) -> float:
    """The share of a model's layers that a unit's run computes, in [0, 1]: nothing changes before its own."""
    return 1 - unit.layer / num_layers


class _Influences(NamedTuple):
    """The effects on one prompt, `[units]`."""

    before: float
    hidden: NDArray[numpy.float32]
    refusing: NDArray[numpy.float32]


class _UnitByUnit:
    """Transplants every unit, for each batch of prompts in turn."""

    def __init__(self, live: LiveModel, units: Sequence[Unit]) -> None:
        self._live = live
        self._units = units
        self._replay = Replay(live.model)
        self._is_checked = False
        self.num_passes = 0.0

    def measure(self, pairs: Sequence[Sequence[Side]]) -> list[_Influences]:
        live, replay = self._live, self._replay
        rows = [side.row for pair in pairs for side in pair]
        # Both sides of a prompt have the same last token.
        last = torch.tensor([row.num_context - 1 for row in rows[::2]], device=live.model.device)

        def run() -> torch.Tensor:
            lost = losses(live.model, live.tokenizer.pad_token_id, rows)
            replay.check_numbers(lost)
            return lost

        def last_states(states: Sequence[torch.Tensor]) -> torch.Tensor:
            at = last.to(states[-1].device)
            return states[-1][::2][torch.arange(len(at), device=at.device), at].float()

        with replay.recorded_states() as states:
            lost = run()
        if not self._is_checked:
            replay.check(run, states, lost)
            self._is_checked = True
        before, own_states = _difference(lost), last_states(states)
        self.num_passes += len(rows)
        moved, raised = [], []
        for unit in self._units:
            with (
                live.transplanted((unit,)),
                # Nothing changes before the unit's layer.
                replay.entered_at(unit.layer, states[unit.layer]),
                replay.recorded_states() as changed,
            ):
                raised.append(_difference(run()) - before)
            moved.append((last_states(changed) - own_states).norm(dim=-1) / own_states.norm(dim=-1))
            self.num_passes += len(rows) * share(unit, len(replay.layers))
            advance(1, "units")
        hidden, refusing = (torch.stack(columns, 1).cpu().numpy() for columns in (moved, raised))
        return [_Influences(*row) for row in zip(before.tolist(), hidden, refusing, strict=True)]


def _difference(lost: torch.Tensor) -> torch.Tensor:
    """The log p(refusal) - log p(answer) of each prompt, from the losses of its two sides."""
    refusing, complying = lost.view(-1, 2).unbind(-1)
    return complying - refusing


@dataclass(frozen=True)
class PutBack:
    """What chosen directions put back of the difference between source and target.

    Attributes:
        changes: The squared Frobenius norm of what is added, `[units]`.
        differences: The squared Frobenius norm of source - target, `[units]`.
        num_directions: The rank of what is added, in all matrices together.
        gains: The first-order effect of what is added on refusing, in nats, `[units]`.
        score: The target's score with the directions, in [0, 1].
    """

    units: tuple[Unit, ...]
    changes: NDArray[numpy.float64]
    differences: NDArray[numpy.float64]
    num_directions: int
    gains: NDArray[numpy.float64]
    score: float


def squared_norms(
    plan: Plan, units: Sequence[Unit], factors: FactorTable
) -> tuple[NDArray[numpy.float64], NDArray[numpy.float64]]:
    """The squared norms of what directions add to each unit, and of source - target, both `[units]`."""
    changes, differences = [], []
    for unit in units:
        regions = list(plan.regions((unit,)))
        changes.append(sum(_squared_change(factors, of["target"]) for of in regions))
        differences.append(sum(_squared_difference(plan, of) for of in regions))
        advance(1, "units")
    return numpy.array(changes, numpy.float64), numpy.array(differences, numpy.float64)


def _squared_change(factors: FactorTable, region: Region) -> float:
    if (found := factors.find(region)) is None:
        return 0.0
    of, rows, columns = found
    left = of.left[rows] * numpy.exp2(of.exponents.astype(numpy.float64))
    right = of.right[:, columns].astype(numpy.float64)
    # |L R|^2 = tr(L^T L R R^T), without forming L R.
    return float(((left.T @ left) * (right @ right.T)).sum())


def _squared_difference(plan: Plan, regions: Mapping[str, Region]) -> float:
    source, target = (mapped_values(plan.models[name], regions[name]).float() for name in ("source", "target"))
    return float((source - target.view_as(source)).square().sum(dtype=torch.float64))
