"""Chooses weights of directions: projected ascent on refusals, held back by divergence and sparsity.

For a matrix with directions s_i u_i v_i^T the candidate's linear layer adds sum_i a_i (v_i . x) s_i u_i to its output,
so the derivative along every direction costs r (m + n) a token, and no gradient of a weight is formed. (Where a
parameter is not the weight of a linear layer, such as the experts of a mixture in one tensor, its gradient is formed,
contracted and freed.)

Every step moves the weights a, in [0, max_weight], down the gradient of

    push x mean over prompts and tokens of the refusal of max(0, margin - (logit of the token - largest other logit))
    + keep x mean over tokens of KL(target || candidate), on the target's own answers to keep and harmless prompts
    + sparsity x sum of a / 100

where push is 1 at first, and rises from round to round as long as refusals would not be said. The steps are Adam's
(D. Kingma and J. Ba, arXiv 1412.6980, algorithm 1) with a projection. Nothing else of the model is changed, and every
direction is one of (source - target).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, TypeVar

import torch
from torch.nn import Linear, Parameter

from dapa_merge.errors import CheckpointError
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.divergence import ReferenceRow, divergences
from dapa_merge.measure.live import LiveModel, Slot
from dapa_merge.measure.perplexity import counted_logits
from dapa_merge.plan.directions import FactorTable, quantize
from dapa_merge.search.attribution import Side, each_gradient
from dapa_merge.search.spectrum import Spectrum

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Row = TypeVar("Row")
# The refusing and the complying side of a contrast.
Sides = tuple[Side, Side]
# On a CPU, 16-bit kernels are slow for small matrices; a model up to this size is computed in float32 meanwhile.
MAX_WIDENED = 60_000_000
# Decay rates of Adam's two moments; a short memory of the second, because there are few steps.
BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class Settings:
    """Settings of an ascent; one recipe for all pairs (tests/benchmarks/directions_table.py has the ablation).

    Attributes:
        num_rounds: Rounds, each of which ends with a candidate that is measured.
        num_steps: Steps of a round.
        rate: Adam's step size, in units of a weight.
        margin: Logits by which a token of the refusal must exceed all others before it counts no more; with any
            positive margin, greedy generation says it.
        num_tokens: Tokens of a refusal, from the first in which it differs from the answer.
        num_keep_tokens: Leading tokens of the target's answers to keep prompts that are compared.
        escalation: Factor by which refusals weigh more in the next round if a round ends below a margin of zero.
        keep: Weight of the divergence.
        sparsity: Weight of the sum of all weights.
        max_weight: The largest weight of a direction.
        min_weight: Smaller weights are dropped from a candidate.
        num_contrasts: Contrasts of a step.
        num_keep: Keep prompts of a step, and harmless prompts as many.
        seed: Of the order of prompts.
    """

    num_rounds: int = 4
    num_steps: int = 20
    rate: float = 0.05
    margin: float = 2.0
    num_tokens: int = 16
    num_keep_tokens: int = 32
    escalation: float = 2.0
    keep: float = 5.0
    sparsity: float = 0.1
    max_weight: float = 1.0
    min_weight: float = 0.02
    num_contrasts: int = 8
    num_keep: int = 10
    seed: int = 0


@dataclass(frozen=True)
class Axis:
    """The directions of one matrix in the model in memory, and where their weights are.

    Attributes:
        left: `[m, r]`, in the model's dtype: singular value times left singular vector.
        right: `[n, r]`, likewise: right singular vectors.
        place: The weights' slice.
    """

    slot: Slot
    left: torch.Tensor
    right: torch.Tensor
    place: slice


@dataclass(frozen=True)
class Progress:
    """Outcome of a round, on the prompts of the choice.

    Attributes:
        margin: Of refusals, the mean of their smallest margins in the second half of the round, in logits.
        divergence: Mean KL per token over the rows of the same steps, in nats.
    """

    margin: float
    divergence: float


class Ascent:
    """The weights of all directions, and the steps that move them."""

    def __init__(
        self,
        live: LiveModel,
        spectra: Sequence[Spectrum],
        contrasts: Sequence[Sides],
        keep: Sequence[Sequence[ReferenceRow]],
        settings: Settings,
        batch_limit: int,
    ) -> None:
        """Begin at the target.

        Args:
            live: The target, with nothing transplanted; see `widened`.
            spectra: Directions of its plan's units.
            contrasts: The refusing and the complying side of each harmful prompt.
            keep: Groups of the target's own answers, of each of which `num_keep` rows are taken a step.
            settings: How to step.
            batch_limit: Sequences at once.
        """
        self._live, self._settings = live, settings
        self._batch_size = BatchSize(batch_limit)
        self._padding = live.tokenizer.pad_token_id
        self._axes = list(_axes(live, spectra))
        self.weights = torch.zeros(sum(one.rank for one in spectra), device=live.model.device)
        self._moments = torch.zeros(2, len(self.weights), device=live.model.device)
        self._num_steps = 0
        self._push = 1.0
        generator = torch.Generator().manual_seed(settings.seed)
        self._contrasts = _cycle(contrasts, settings.num_contrasts, generator)
        self._keep = [_cycle(group, settings.num_keep, generator) for group in keep if group]
        layers = {id(module.weight): module for module in live.model.modules() if isinstance(module, Linear)}
        self._linear = {id(axis): layers[id(axis.slot.parameter)] for axis in self._axes if _is_linear(axis, layers)}

    def round(self, on_step: Callable[[], None] = lambda: None) -> Progress:
        """Make the steps of one round."""
        found = []
        for _ in range(self._settings.num_steps):
            gradient, progress = self._gradient()
            found.append(progress)
            self._step(gradient)
            on_step()
        # The end of the round, over several steps: each has other prompts.
        last = found[len(found) // 2 :]
        ended = Progress(fmean(one.margin for one in last), fmean(one.divergence for one in last))
        if ended.margin < 0:
            self._push *= self._settings.escalation
        return ended

    @property
    def state(self) -> torch.Tensor:
        """Everything that the next step depends on, as float32 on the CPU.

        Returns:
            `[4, directions]`: weights, both moments, and the weight of refusals, the same in every column.
        """
        return torch.stack([self.weights, *self._moments, torch.full_like(self.weights, self._push)]).cpu()

    def go_on(self, state: torch.Tensor, num_rounds: int) -> None:
        """Take the `state` of an ascent with the same arguments after some rounds, and go on with its next prompts."""
        # Copies: steps are made in place.
        self.weights.copy_(state[0])
        self._moments.copy_(state[1:3])
        self._push = float(state[3, 0])
        self._num_steps = num_rounds * self._settings.num_steps
        for _ in range(self._num_steps):
            self._draw()

    def _step(self, gradient: torch.Tensor) -> None:
        if not bool(gradient.isfinite().all()):
            raise CheckpointError(
                f"gradients along the directions of {self._live.plan.source.name} - {self._live.plan.target.name} are "
                f"not finite numbers: a model is damaged, or its dtype is too narrow for gradients"
            )
        self._num_steps += 1
        scaled = []
        for moment, beta, value in zip(self._moments, BETAS, (gradient, gradient * gradient), strict=True):
            moment.mul_(beta).add_((1 - beta) * value)
            scaled.append(moment / (1 - beta**self._num_steps))
        self.weights -= self._settings.rate * scaled[0] / (scaled[1].sqrt() + 1e-8)
        self.weights.clamp_(0, self._settings.max_weight)

    def _draw(self) -> tuple[list[Sides], list[list[ReferenceRow]]]:
        """The contrasts and the rows of the next step, always in this order: they share one generator."""
        return next(self._contrasts), [next(group) for group in self._keep]

    def _gradient(self) -> tuple[torch.Tensor, Progress]:
        """The gradient of the loss at the current weights, over the next prompts."""
        settings = self._settings
        gradient = torch.full_like(self.weights, settings.sparsity / 100)
        contrasts, rows = self._draw()
        num_tokens = sum(row.num_counted for group in rows for row in group)
        margins: list[float] = []
        divergence = 0.0

        def refuse(batch: Sequence[Sides]) -> torch.Tensor:
            loss, found = self.refusal(batch)
            margins.extend(found)
            return self._push * loss / len(contrasts)

        def stay(batch: Sequence[ReferenceRow]) -> torch.Tensor:
            nonlocal divergence
            found = divergences(self._live.model, self._padding, batch).sum() / num_tokens
            divergence += float(found.detach())
            return settings.keep * found

        with self._candidate() as differentiate:
            for part in differentiate(refuse, contrasts):
                gradient += part
            for group in rows:
                for part in differentiate(stay, group):
                    gradient += part
        return gradient, Progress(sum(margins) / max(len(margins), 1), divergence)

    def refusal(self, batch: Sequence[Sides]) -> tuple[torch.Tensor, list[float]]:
        """The loss of some contrasts, summed, and the smallest margin of each: of the refusal's tokens, in logits."""
        rows = [refusing.row for refusing, _ in batch]
        losses, smallest = [], []
        for row, logits in zip(rows, counted_logits(self._live.model, self._padding, rows), strict=True):
            wanted = torch.tensor(row.ids[row.num_context :], device=logits.device)[:, None]
            values = logits.float()
            others = values.scatter(1, wanted, -math.inf).max(1).values
            margins = values.gather(1, wanted)[:, 0] - others
            smallest.append(float(margins.detach().min()))
            losses.append((self._settings.margin - margins).relu().mean())
        return torch.stack(losses).sum(), smallest

    @contextmanager
    def _candidate(self) -> Iterator[Callable[..., Iterator[torch.Tensor]]]:
        """Inside the block the model computes the candidate; the block gets what differentiates a loss by the weights.

        That function takes a loss of a batch and all rows; it yields the gradients of batches.
        """
        weights = self.weights.clone().requires_grad_()
        others = [axis for axis in self._axes if id(axis) not in self._linear]
        of_parameter: dict[Parameter, list[Axis]] = {}
        for axis in others:
            of_parameter.setdefault(axis.slot.parameter, []).append(axis)
        contracted = torch.zeros_like(self.weights)

        def contract(parameter: Parameter, gradient: torch.Tensor) -> None:
            for axis in of_parameter[parameter]:
                part = gradient[axis.slot.slices].reshape(len(axis.left), len(axis.right))
                contracted[axis.place] += ((axis.left.T.float() @ part.float()) * axis.right.T.float()).sum(1)

        def differentiate(loss: Callable[[Sequence[Row]], torch.Tensor], rows: Sequence[Row]) -> Iterator[torch.Tensor]:
            def work(batch: Sequence[Row]) -> list[torch.Tensor]:
                contracted.zero_()
                weights.grad = None
                with torch.enable_grad():
                    torch.autograd.backward(loss(batch))
                found = contracted.clone() if weights.grad is None else weights.grad + contracted
                return [found, *[torch.zeros(())] * (len(batch) - 1)]

            yield from self._batch_size.map(work, rows)

        called: set[int] = set()
        with ExitStack() as stack:
            for axis in self._axes:
                if (layer := self._linear.get(id(axis))) is not None:
                    handle = layer.register_forward_hook(_adding(axis, weights, called))
                    stack.callback(handle.remove)
            if others:
                stack.enter_context(_written(others, self.weights))
                stack.enter_context(each_gradient(self._live.model, of_parameter, contract))
            yield differentiate
        # Some models use a layer's weight without calling it; from the next step on its gradient is formed.
        self._linear = {key: layer for key, layer in self._linear.items() if key in called}


def factors_of(spectra: Sequence[Spectrum], weights: torch.Tensor, min_weight: float) -> FactorTable:
    """Stored factors of weighted directions; `weights` are those of all matrices, one after another."""
    found = {}
    start = 0
    for spectrum in spectra:
        part = weights[start : start + spectrum.rank].cpu()
        start += spectrum.rank
        kept = part >= min_weight
        if bool(kept.any()):
            left = (spectrum.left.cpu() * part)[:, kept]
            factors = quantize(left.numpy(), spectrum.right.cpu()[kept].numpy())
            if factors.rank:
                found[spectrum.place] = factors
    return FactorTable(found)


@contextmanager
def widened(model: PreTrainedModel) -> Iterator[None]:
    """Compute a small 16-bit model on a CPU in float32 inside a `with` block, which is faster there.

    Its own tensors come back on exit, bit for bit; what is written to it in the block is lost.
    """
    parameters = list(model.parameters())
    is_small = model.device.type == "cpu" and sum(one.numel() for one in parameters) <= MAX_WIDENED
    before = [one.data for one in parameters] if is_small else []
    try:
        for parameter, data in zip(parameters, before, strict=False):
            if data.dtype in (torch.bfloat16, torch.float16):
                parameter.data = data.float()
        yield
    finally:
        for parameter, data in zip(parameters, before, strict=False):
            parameter.data = data


def _axes(live: LiveModel, spectra: Sequence[Spectrum]) -> Iterator[Axis]:
    start = 0
    slots: dict[tuple[str, object], Slot] = {}
    for slot in live.slots(dict.fromkeys(spectrum.unit for spectrum in spectra)):
        region = slot.regions["target"]
        slots[region.tensor.name, region.box] = slot
    for spectrum in spectra:
        slot = slots[spectrum.region.tensor.name, spectrum.region.box]
        parameter = slot.parameter
        left, right = (part.to(parameter.device, parameter.dtype) for part in (spectrum.left, spectrum.right.T))
        yield Axis(slot, left, right.contiguous(), slice(start, start + spectrum.rank))
        start += spectrum.rank


def _is_linear(axis: Axis, layers: dict[int, Linear]) -> bool:
    """Whether the matrix is a linear layer's weight, or a range of its rows with all columns."""
    layer, (rows, *columns) = layers.get(id(axis.slot.parameter)), axis.slot.slices
    if layer is None or len(columns) != 1 or columns[0] != slice(0, layer.in_features):
        return False
    return bool(rows.stop - rows.start == len(axis.left))


def _adding(axis: Axis, weights: torch.Tensor, called: set[int]) -> Callable[..., torch.Tensor]:
    """A forward hook that adds the weighted directions to a linear layer's output, and notes that it was called."""

    def add(_layer: Linear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        called.add(id(axis))
        along = (inputs[0] @ axis.right).float() * weights[axis.place]
        change = along.to(output.dtype) @ axis.left.T
        rows = axis.slot.slices[0]
        if rows.stop - rows.start == output.shape[-1]:
            return output + change
        return output + torch.nn.functional.pad(change, (rows.start, output.shape[-1] - rows.stop))

    return add


@contextmanager
@torch.no_grad()
def _written(axes: Sequence[Axis], weights: torch.Tensor) -> Iterator[None]:
    """Write weighted directions into parameters that are not linear layers' inside a `with` block."""
    before = [axis.slot.parameter[axis.slot.slices].clone() for axis in axes]
    try:
        for axis in axes:
            change = (axis.left.float() * weights[axis.place]) @ axis.right.T.float()
            box = axis.slot.parameter[axis.slot.slices]
            box.copy_(box.float() + change.reshape(box.shape))
        yield
    finally:
        for axis, values in zip(axes, before, strict=True):
            axis.slot.parameter[axis.slot.slices].copy_(values)


def _cycle(rows: Sequence[Row], number: int, generator: torch.Generator) -> Iterator[list[Row]]:
    """Yield rows, `number` at a time, in random orders, each row as often as any other."""

    def shuffled() -> Iterator[Row]:
        while True:
            yield from (rows[index] for index in torch.randperm(len(rows), generator=generator).tolist())

    stream = shuffled()
    while True:
        yield list(itertools.islice(stream, min(number, len(rows))))
