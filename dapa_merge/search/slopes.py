"""How the loss of an ascent changes with the cores, read off a target in memory; see `ascent.py`."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch.nn import Linear, Parameter

from dapa_merge.errors import UsageError
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.determinism import is_slow
from dapa_merge.measure.divergence import ReferenceRow, divergences
from dapa_merge.measure.live import LiveModel, Slot
from dapa_merge.measure.packed import packed_logits, reader
from dapa_merge.measure.perplexity import ScoredText
from dapa_merge.plan.directions import MAX_WEIGHT
from dapa_merge.search.attribution import Side, each_gradient
from dapa_merge.search.spectrum import MAX_RANK, MORE_RANK, Spectrum

Row = TypeVar("Row")


# The refusing and the complying side of a contrast.
Sides = tuple[Side, Side]


@dataclass(frozen=True)
class Settings:
    """Settings of an ascent; one recipe for all pairs (tests/benchmarks/directions_table.py has the ablation).

    Attributes:
        num_rounds: Rounds, each of which ends with a candidate that is measured.
        num_steps: Steps of a round.
        rate: Adam's step size, in units of an element of a core.
        margin: Logits by which a token of the refusal must exceed all others before it counts no more; with any
            positive margin, greedy generation says it.
        num_tokens: Tokens of a refusal, from the first in which it differs from the answer.
        num_keep_tokens: Leading tokens of the target's answers to keep prompts that are compared.
        escalation: Factor by which refusals weigh more in the next round if a round ends below a margin of zero, and
            harmless prompts if too many are answered otherwise.
        max_harmless: Share of harmless prompts whose answers may begin with another token than the target's own.
        keep: Weight of the divergence.
        temperature: Of both distributions of the divergence; above 1, the target's less likely tokens count more.
        sparsity: What the norm of a core loses in a step, in steps of one element; at most a quarter of its rank, as no
            step is larger than the rank.
        max_weight: The largest singular value of a core: how many times as far as in the transplant a matrix may move.
        max_rank: The most directions of a matrix.
        more_rank: The same where these hold less than half of the models' difference.
        num_contrasts: Contrasts of a step.
        num_keep: Keep prompts of a step, and harmless prompts as many.
        seed: Of the order of prompts.
    """

    num_rounds: int = 4
    num_steps: int = 20
    rate: float = 0.02
    margin: float = 4.0
    num_tokens: int = 16
    num_keep_tokens: int = 32
    escalation: float = 2.0
    max_harmless: float = 0.05
    keep: float = 20.0
    temperature: float = 2.0
    sparsity: float = 3.0
    max_weight: float = MAX_WEIGHT
    max_rank: int = MAX_RANK
    more_rank: int = MORE_RANK
    num_contrasts: int = 4
    num_keep: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Axis:
    """The directions of one matrix in the model in memory, and where their core is.

    Attributes:
        left: `[m, r]`, in the model's dtype, or in float32 where a CPU is slow in that: left singular vectors, times
            the roots of the singular values.
        right: `[n, r]`, likewise.
        place: The slice of the core's elements, row by row.
    """

    slot: Slot
    left: torch.Tensor
    right: torch.Tensor
    place: slice

    def core(self, weights: torch.Tensor) -> torch.Tensor:
        """`[r, r]`: its part of the elements of all cores."""
        return weights[self.place].view(self.left.shape[1], self.right.shape[1])


class Step(NamedTuple):
    """The parts that all chunks of a step share.

    Attributes:
        weights: The elements of all cores, on the CPU.
        push: How much refusals weigh.
        pull: How much harmless prompts weigh.
        num_contrasts: Contrasts of the step.
        num_tokens: Tokens of the target's answers that are compared.
    """

    weights: torch.Tensor
    push: float
    pull: float
    num_contrasts: int
    num_tokens: int


class Section(NamedTuple):
    """Rows of one kind in a step.

    Attributes:
        group: Of the target's own answers; None for contrasts.
        rows: Their numbers.
    """

    group: int | None
    rows: tuple[int, ...]


# What is differentiated at once.
Chunk = tuple[Section, ...]


class Part(NamedTuple):
    """The contribution of a chunk to a step.

    Attributes:
        gradient: Of the loss, `[elements]`, float32 on the CPU.
        margins: The smallest of each contrast.
        divergence: Its share of the mean.
    """

    gradient: torch.Tensor
    margins: Sequence[float]
    divergence: float


class Slopes(Protocol):
    """Reads off a target how losses change with the cores: here, or in workers with a target each."""

    def parts(self, step: Step, chunks: Sequence[Chunk]) -> Iterable[Part]:
        """The parts of a step, in the order of its chunks."""

    def strayed(self, weights: torch.Tensor, rows: Sequence[int]) -> Sequence[bool]:
        """Of each of these answers of the first group, whether it would begin with another token."""


class LiveSlopes:
    """The slopes of a target in memory; see `Ascent` for the arguments."""

    def __init__(
        self,
        live: LiveModel,
        spectra: Sequence[Spectrum],
        contrasts: Sequence[Sides],
        keep: Sequence[Sequence[ReferenceRow]],
        settings: Settings,
        batch_limit: int,
    ) -> None:
        """Find the matrices of the directions."""
        self._live, self._settings = live, settings
        self._contrasts, self._keep = contrasts, keep
        self._batch_size = BatchSize(batch_limit)
        self._padding = live.tokenizer.pad_token_id
        texts = [side.row for side, _ in contrasts] + [row.text for group in keep for row in group]
        texts.sort(key=lambda text: len(text.ids))
        self._read = reader(live.model, self._padding, [*texts[:1], *texts[-1:]])
        self.axes = list(_axes(live, spectra))
        layers = {id(module.weight): module for module in live.model.modules() if isinstance(module, Linear)}
        self._linear = {id(axis): layers[id(axis.slot.parameter)] for axis in self.axes if _is_linear(axis, layers)}

    def parts(self, step: Step, chunks: Sequence[Chunk]) -> Iterator[Part]:
        """Yield the parts of a step, in the order of its chunks."""
        with self._candidate(step.weights) as differentiate:
            for chunk in chunks:
                yield self._part(step, chunk, differentiate)

    def _part(self, step: Step, chunk: Chunk, differentiate: Callable[..., Iterator[torch.Tensor]]) -> Part:
        # Of contrasts the smallest margin, of answers the divergence. A batch that did not fit is computed again.
        seen: dict[tuple[int | None, int], float] = {}

        def loss(batch: Sequence[tuple[int | None, int]]) -> torch.Tensor:
            found = iter(self._logits([self._text(*one) for one in batch]))
            terms = []
            for group, some in itertools.groupby(batch, operator.itemgetter(0)):
                part = list(some)
                numbers = [number for _, number in part]
                logits = list(itertools.islice(found, len(part)))
                if group is None:
                    term, margins = self.refusal([self._contrasts[number] for number in numbers], logits)
                    seen.update(zip(part, margins, strict=True))
                    terms.append(step.push * term / step.num_contrasts)
                else:
                    each = self._divergences([self._keep[group][number] for number in numbers], logits)
                    seen.update(zip(part, each.detach().tolist(), strict=True))
                    pull = 1.0 if group else step.pull
                    terms.append(self._settings.keep * pull * each.sum() / step.num_tokens)
            return torch.stack(terms).sum()

        gradient = torch.zeros_like(step.weights)
        sections = [[(group, number) for number in rows] for group, rows in chunk]
        # Padded, rows of one kind are more alike.
        for rows in [list(itertools.chain(*sections))] if self._read is packed_logits else sections:
            for part in differentiate(loss, rows):
                gradient += part.cpu()
        margins = [value for (group, _), value in seen.items() if group is None]
        divergence = math.fsum(value for (group, _), value in seen.items() if group is not None)
        return Part(gradient, margins, divergence / max(step.num_tokens, 1))

    def _text(self, group: int | None, number: int) -> ScoredText:
        """The text of a row: the refusing side of a contrast, or the target's own answer."""
        return self._contrasts[number][0].row if group is None else self._keep[group][number].text

    def strayed(self, weights: torch.Tensor, rows: Sequence[int]) -> list[bool]:
        """Of each of these answers of the first group, whether it would begin with another token."""

        def strays(batch: Sequence[ReferenceRow]) -> list[bool]:
            own = [row.text.ids[row.text.num_context] for row in batch]
            texts = [ScoredText(row.text.ids[: row.text.num_context + 1], row.text.num_context) for row in batch]
            found = self._logits(texts)
            return [int(logits[0].argmax()) != token for logits, token in zip(found, own, strict=True)]

        with self._candidate(weights), torch.no_grad():
            return list(self._batch_size.map(strays, [self._keep[0][number] for number in rows]))

    def _logits(self, texts: Sequence[ScoredText]) -> list[torch.Tensor]:
        return self._read(self._live.model, self._padding, texts)

    def _divergences(self, batch: Sequence[ReferenceRow], logits: list[torch.Tensor]) -> torch.Tensor:
        return divergences(self._live.model, self._padding, batch, self._settings.temperature, lambda *_: logits)

    def refusal(self, batch: Sequence[Sides], logits: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[float]]:
        """The loss of some contrasts, summed, and the smallest margin of each: of the refusal's tokens, in logits.

        `logits` are those of each refusal, `[counted tokens, vocabulary]`.
        """
        losses, smallest = [], []
        for (refusing, _), found in zip(batch, logits, strict=True):
            row = refusing.row
            wanted = torch.tensor(row.ids[row.num_context :], device=found.device)[:, None]
            values = found.float()
            others = values.scatter(1, wanted, -math.inf).max(1).values
            margins = values.gather(1, wanted)[:, 0] - others
            smallest.append(float(margins.detach().min()))
            losses.append((self._settings.margin - margins).relu().mean())
        return torch.stack(losses).sum(), smallest

    @contextmanager
    def _candidate(self, cores: torch.Tensor) -> Iterator[Callable[..., Iterator[torch.Tensor]]]:
        """Inside the block the model computes the candidate; the block gets what differentiates a loss by the weights.

        That function takes a loss of a batch and all rows; it yields the gradients of batches.
        """
        weights = cores.to(self._live.model.device, copy=True).requires_grad_()
        others = [axis for axis in self.axes if id(axis) not in self._linear]
        if fixed := [axis for axis in others if not axis.slot.parameter.is_floating_point()]:
            raise UsageError(
                f"{fixed[0].slot.regions['target'].name} is not the weight of a linear layer, along which directions "
                f"cannot be chosen with --quantize; leave that out, or use a recipe with edit: copy"
            )
        of_parameter: dict[Parameter, list[Axis]] = {}
        for axis in others:
            of_parameter.setdefault(axis.slot.parameter, []).append(axis)
        contracted = torch.zeros_like(weights, requires_grad=False)

        def contract(parameter: Parameter, gradient: torch.Tensor) -> None:
            for axis in of_parameter[parameter]:
                part = gradient[axis.slot.slices].reshape(len(axis.left), len(axis.right))
                found = axis.left.T.float() @ part.float() @ axis.right.float()
                axis.core(contracted).add_(found.to(contracted.device))

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
            for axis in self.axes:
                if (layer := self._linear.get(id(axis))) is not None:
                    handle = layer.register_forward_hook(_adding(axis, weights, called))
                    stack.callback(handle.remove)
            if others:
                stack.enter_context(_written(others, weights.detach()))
                stack.enter_context(each_gradient(self._live.model, of_parameter, contract))
            yield differentiate
        # Some models use a layer's weight without calling it; from the next step on its gradient is formed.
        self._linear = {key: layer for key, layer in self._linear.items() if key in called}


def places_of(spectra: Sequence[Spectrum]) -> Iterator[slice]:
    """Where the elements of each matrix' core are, among those of all."""
    start = 0
    for spectrum in spectra:
        yield slice(start, start + spectrum.rank**2)
        start += spectrum.rank**2


def _axes(live: LiveModel, spectra: Sequence[Spectrum]) -> Iterator[Axis]:
    slots: dict[tuple[str, object], Slot] = {}
    for slot in live.slots(dict.fromkeys(spectrum.unit for spectrum in spectra)):
        region = slot.regions["target"]
        slots[region.tensor.name, region.box] = slot
    for spectrum, place in zip(spectra, places_of(spectra), strict=True):
        slot = slots[spectrum.region.tensor.name, spectrum.region.box]
        parameter = slot.parameter
        # The bits of quantized weights are no dtype to compute in.
        dtype = parameter.dtype if parameter.is_floating_point() else live.model.dtype
        if parameter.device.type == "cpu" and dtype != torch.float32 and is_slow(dtype):
            dtype = torch.float32
        roots = spectrum.values.sqrt()
        left, right = (
            part.to(parameter.device, dtype).contiguous() for part in (spectrum.left / roots, spectrum.right.T * roots)
        )
        yield Axis(slot, left, right, place)


def _is_linear(axis: Axis, layers: dict[int, Linear]) -> bool:
    """Whether the matrix is a linear layer's weight, or a range of its rows with all columns."""
    layer, (rows, *columns) = layers.get(id(axis.slot.parameter)), axis.slot.slices
    if layer is None or len(columns) != 1 or columns[0] != slice(0, layer.in_features):
        return False
    return bool(rows.stop - rows.start == len(axis.left))


def _adding(axis: Axis, weights: torch.Tensor, called: set[int]) -> Callable[..., torch.Tensor]:
    """A forward hook that adds what the core makes of a linear layer's input, and notes that it was called."""

    def add(_layer: Linear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        called.add(id(axis))
        along = (inputs[0].to(axis.right) @ axis.right).float()
        along = along @ axis.core(weights).to(along.device).T
        change = (along.to(axis.left.dtype) @ axis.left.T).to(output.dtype)
        rows = axis.slot.slices[0]
        if rows.stop - rows.start == output.shape[-1]:
            return output + change
        return output + torch.nn.functional.pad(change, (rows.start, output.shape[-1] - rows.stop))

    return add


@contextmanager
@torch.no_grad()
def _written(axes: Sequence[Axis], weights: torch.Tensor) -> Iterator[None]:
    """Write what cores change into parameters that are not linear layers' inside a `with` block."""
    before = [axis.slot.parameter[axis.slot.slices].clone() for axis in axes]
    try:
        for axis in axes:
            change = axis.left.float() @ axis.core(weights).to(axis.left.device) @ axis.right.T.float()
            box = axis.slot.parameter[axis.slot.slices]
            box.copy_(box.float() + change.reshape(box.shape))
        yield
    finally:
        for axis, values in zip(axes, before, strict=True):
            axis.slot.parameter[axis.slot.slices].copy_(values)
