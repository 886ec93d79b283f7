"""Chooses how a matrix moves along the directions of its difference: small steps toward refusals, held back elsewhere.

For a matrix with the leading directions s_i u_i v_i^T of (source - target), i = 1 ... r, the candidate's linear layer
adds U S^1/2 A S^1/2 V^T x to its output. A, the *core*, is r x r: its element (i, j) says how much of what direction j
reads is written along direction i. A core of zero is the target, and the identity the transplant of the directions.
(A LoRA with both factors fixed, as in K. Balazy et al., arXiv 2405.17604, but of the difference of two models instead
of a weight.) The derivative by all of A costs r (m + n) + r^2 a token, and no gradient of a weight is formed. (Where a
parameter is not the weight of a linear layer, such as the experts of a mixture in one tensor, its gradient is formed,
contracted and freed.)

Every step moves the cores down the gradient of

    push x mean over prompts and tokens of the refusal of max(0, margin - (logit of the token - largest other logit))
    + keep x mean over tokens of KL(target || candidate) at a temperature, on the target's own answers to keep and
      harmless prompts, those to harmless prompts times pull

where push and pull are 1 at first. Push rises from round to round as long as refusals would not be said, and pull as
long as harmless prompts would be answered otherwise. The steps are Adam's
(D. Kingma and J. Ba, arXiv 1412.6980, algorithm 1). After each, the Frobenius norm of every core shrinks by a constant
(the proximal step of a group lasso, M. Yuan and Y. Lin 2006), so that matrices that are not needed stay as they are,
and no singular value of a core exceeds a bound. Nothing else of the model is changed: rows and columns of every change
lie in the spans of leading singular vectors of (source - target).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import torch
from torch.nn import Linear, Parameter

from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.determinism import is_slow
from dapa_merge.measure.divergence import ReferenceRow, divergences
from dapa_merge.measure.live import LiveModel, Slot
from dapa_merge.measure.packed import reader
from dapa_merge.measure.perplexity import ScoredText
from dapa_merge.plan.directions import MAX_WEIGHT, FactorTable, quantize
from dapa_merge.search.attribution import Side, each_gradient
from dapa_merge.search.spectrum import MAX_RANK, MORE_RANK, Spectrum

if TYPE_CHECKING:
    pass

Row = TypeVar("Row")
# The refusing and the complying side of a contrast.
Sides = tuple[Side, Side]
# Rows that are differentiated at once in a model beyond that size, so that more workers have something to share. In
# smaller models chunks cost up to 15 % of a step, and three workers are enough.
MAX_CHUNK, MIN_CHUNKED = 3, 2_000_000_000
# Decay rates of Adam's two moments; a short memory of the second, because there are few steps.
BETAS = (0.9, 0.99)
# The share of the largest possible step that sparsity may take back: a core of rank 1 must be able to leave zero.
MAX_LOSS = 0.25
# A direction along which less than this share of the most is read is left out of what is stored.
MIN_SHARE = 1e-4


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


class Chunk(NamedTuple):
    """Rows of a step that are differentiated at once.

    Attributes:
        group: Of the target's own answers; None for contrasts.
        rows: Their numbers.
    """

    group: int | None
    rows: tuple[int, ...]


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


@dataclass(frozen=True)
class Progress:
    """Outcome of a round, on the prompts of the choice.

    Attributes:
        margin: Of refusals, the mean of their smallest margins in the second half of the round, in logits.
        divergence: Mean KL per token over the rows of the same steps, in nats.
        harmless: Share of the harmless prompts whose answers begin with another token, at the end of the round.
    """

    margin: float
    divergence: float
    harmless: float = 0.0


class Ascent:
    """The cores of all matrices, one after another in `weights`, and the steps that move them.

    Attributes:
        weights: The elements of all cores, on the CPU.
        slopes: Computes the gradient.
    """

    def __init__(
        self,
        live: LiveModel,
        spectra: Sequence[Spectrum],
        contrasts: Sequence[Sides],
        keep: Sequence[Sequence[ReferenceRow]],
        settings: Settings,
        batch_limit: int,
        slopes: Slopes | None = None,
    ) -> None:
        """Begin at the target.

        Args:
            live: The target, with nothing transplanted; see `widened`.
            spectra: Directions of its plan's units.
            contrasts: The refusing and the complying side of each harmful prompt.
            keep: Groups of the target's own answers, of each of which `num_keep` rows are taken a step; the first is to
                harmless prompts.
            settings: How to step.
            batch_limit: Sequences at once.
            slopes: Computes the gradient, with the same arguments; None for the live target.
        """
        self._plan, self._settings, self._keep_rows = live.plan, settings, keep
        self.slopes = slopes or LiveSlopes(live, spectra, contrasts, keep, settings, batch_limit)
        is_large = live.plan.target.num_parameters > MIN_CHUNKED
        self._chunk_rows = MAX_CHUNK if is_large else max(settings.num_contrasts, settings.num_keep)
        self.weights = torch.zeros(sum(one.rank**2 for one in spectra))
        self._moments = torch.zeros(2, len(self.weights))
        # Where the elements of the cores are, `[cores, r^2]` for each rank: those of one rank are bounded together.
        by_rank: dict[int, list[torch.Tensor]] = {}
        for one, place in zip(spectra, places_of(spectra), strict=True):
            by_rank.setdefault(one.rank, []).append(torch.arange(place.start, place.stop))
        self._places = {rank: torch.stack(places) for rank, places in by_rank.items()}
        self._num_steps = 0
        self._push = self._pull = 1.0
        generator = torch.Generator().manual_seed(settings.seed)
        self._contrasts = _cycle(len(contrasts), settings.num_contrasts, generator)
        self._keep = [
            (number, _cycle(len(group), settings.num_keep, generator)) for number, group in enumerate(keep) if group
        ]

    def round(
        self, on_step: Callable[[], None] = lambda: None, *, slows: bool = False, insists: bool = False
    ) -> Progress:
        """Make the steps of one round.

        Args:
            on_step: Called after each.
            slows: Whether the steps become shorter, down to nothing.
            insists: Whether refusals weigh more from the start of this round on, and harmless prompts less, whatever
                comes of it: for who has measured that the candidate refuses too little and violates no other limit.
        """
        if insists:
            self._push *= self._settings.escalation
            self._pull /= self._settings.escalation
        found = []
        num_steps = self._settings.num_steps
        for number in range(num_steps):
            gradient, progress = self._gradient()
            found.append(progress)
            self._step(gradient, 1 - number / num_steps if slows else 1.0)
            on_step()
        # The end of the round, over several steps: each has other prompts.
        last = found[len(found) // 2 :]
        ended = Progress(fmean(one.margin for one in last), fmean(one.divergence for one in last), self._strayed())
        if insists:
            return ended
        if ended.margin < 0:
            self._push *= self._settings.escalation
        if ended.harmless > self._settings.max_harmless:
            self._pull *= self._settings.escalation
        return ended

    @property
    def state(self) -> torch.Tensor:
        """Everything that the next step depends on, as float32 on the CPU.

        Returns:
            `[5, elements]`: cores, both moments, and the weights of refusals and of harmless prompts, the same in every
            column.
        """
        same = [torch.full_like(self.weights, one) for one in (self._push, self._pull)]
        return torch.stack([self.weights, *self._moments, *same])

    def go_on(self, state: torch.Tensor, num_rounds: int) -> None:
        """Take the `state` of an ascent with the same arguments after some rounds, and go on with its next prompts."""
        # Copies: steps are made in place.
        self.weights.copy_(state[0])
        self._moments.copy_(state[1:3])
        self._push, self._pull = float(state[3, 0]), float(state[4, 0])
        self._num_steps = num_rounds * self._settings.num_steps
        for _ in range(self._num_steps):
            self._draw()

    def _step(self, gradient: torch.Tensor, share: float = 1.0) -> None:
        if not bool(gradient.isfinite().all()):
            raise CheckpointError(
                f"gradients along the directions of {self._plan.source.name} - {self._plan.target.name} are not finite "
                f"numbers: a model is damaged, or its dtype is too narrow for gradients"
            )
        self._num_steps += 1
        scaled = []
        for moment, beta, value in zip(self._moments, BETAS, (gradient, gradient * gradient), strict=True):
            moment.mul_(beta).add_((1 - beta) * value)
            scaled.append(moment / (1 - beta**self._num_steps))
        rate = share * self._settings.rate
        self.weights -= rate * scaled[0] / (scaled[1].sqrt() + 1e-8)
        for rank, places in self._places.items():
            cores = self.weights[places].view(-1, rank, rank)
            loss = rate * min(self._settings.sparsity, MAX_LOSS * rank)
            shrunk = _shrunk(cores, loss, self._settings.max_weight)
            self.weights[places] = shrunk.view(len(places), -1)

    def _draw(self) -> list[Chunk]:
        """The rows of the next step, contrasts first, always in this order: they share one generator.

        They are divided in the same way however many workers there are, so that sums are rounded in the same way.
        """
        drawn = [(None, next(self._contrasts)), *((number, next(group)) for number, group in self._keep)]
        chunks = []
        for group, rows in drawn:
            size = math.ceil(len(rows) / math.ceil(len(rows) / self._chunk_rows))
            chunks += [Chunk(group, tuple(rows[start : start + size])) for start in range(0, len(rows), size)]
        return chunks

    def _gradient(self) -> tuple[torch.Tensor, Progress]:
        """The gradient of the loss at the current weights, over the next prompts."""
        chunks = self._draw()
        num_contrasts = sum(len(rows) for group, rows in chunks if group is None)
        kept = [self._keep_rows[group][row] for group, rows in chunks if group is not None for row in rows]
        num_tokens = sum(row.num_counted for row in kept)
        step = Step(self.weights, self._push, self._pull, num_contrasts, num_tokens)
        gradient = torch.zeros_like(self.weights)
        margins: list[float] = []
        divergence = 0.0
        for part in self.slopes.parts(step, chunks):
            gradient += part.gradient
            margins += part.margins
            divergence += part.divergence
        return gradient, Progress(sum(margins) / max(len(margins), 1), divergence)

    def _strayed(self) -> float:
        """The share of harmless prompts whose answers would begin with another token; 0 without any."""
        harmless = self._keep_rows[0] if self._keep_rows else ()
        answered = [number for number, row in enumerate(harmless) if row.num_counted]
        return fmean(self.slopes.strayed(self.weights, answered)) if answered else 0.0


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
        settings = self._settings
        margins: list[float] = []
        divergence = 0.0

        def refuse(batch: Sequence[Sides]) -> torch.Tensor:
            loss, found = self.refusal(batch)
            margins.extend(found)
            return step.push * loss / step.num_contrasts

        def stay(batch: Sequence[ReferenceRow]) -> torch.Tensor:
            nonlocal divergence
            found = self._divergences(batch).sum() / step.num_tokens
            divergence += float(found.detach())
            return settings.keep * (1.0 if chunk.group else step.pull) * found

        gradient = torch.zeros_like(step.weights)
        rows = self._contrasts if chunk.group is None else self._keep[chunk.group]
        for part in differentiate(refuse if chunk.group is None else stay, [rows[number] for number in chunk.rows]):
            gradient += part.cpu()
        return Part(gradient, margins, divergence)

    def strayed(self, weights: torch.Tensor, rows: Sequence[int]) -> list[bool]:
        """Of each of these answers of the first group, whether it would begin with another token."""

        def strays(batch: Sequence[ReferenceRow]) -> list[bool]:
            own = [row.text.ids[row.text.num_context] for row in batch]
            texts = [ScoredText(row.text.ids[: row.text.num_context + 1], row.text.num_context) for row in batch]
            found = self._read(self._live.model, self._padding, texts)
            return [int(logits[0].argmax()) != token for logits, token in zip(found, own, strict=True)]

        with self._candidate(weights), torch.no_grad():
            return list(self._batch_size.map(strays, [self._keep[0][number] for number in rows]))

    def _divergences(self, batch: Sequence[ReferenceRow]) -> torch.Tensor:
        return divergences(self._live.model, self._padding, batch, self._settings.temperature, self._read)

    def refusal(self, batch: Sequence[Sides]) -> tuple[torch.Tensor, list[float]]:
        """The loss of some contrasts, summed, and the smallest margin of each: of the refusal's tokens, in logits."""
        rows = [refusing.row for refusing, _ in batch]
        losses, smallest = [], []
        for row, logits in zip(rows, self._read(self._live.model, self._padding, rows), strict=True):
            wanted = torch.tensor(row.ids[row.num_context :], device=logits.device)[:, None]
            values = logits.float()
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


def factors_of(spectra: Sequence[Spectrum], weights: torch.Tensor) -> FactorTable:
    """Stored factors of the change that cores make; `weights` are those of all matrices, one after another."""
    found = {}
    for spectrum, place in zip(spectra, places_of(spectra), strict=True):
        # On the CPU, because some accelerators lack float64.
        core = weights[place].view(spectrum.rank, spectrum.rank).cpu().double()
        roots = spectrum.values.cpu().double().sqrt()
        scaled = roots[:, None] * core * roots
        # What is read along a direction that counts next to nothing would be lost in rounding. Then nothing is written
        # along it either: the rows that are stored tell all directions that there are.
        used = torch.arange(spectrum.rank)
        while len(used):
            sizes = scaled[used][:, used].norm(dim=0)
            if bool((kept := sizes > sizes.max() * MIN_SHARE).all()):
                break
            used = used[kept]
        if len(used):
            vectors = (spectrum.left.cpu().double() / spectrum.values.cpu().double())[:, used]
            left = vectors @ scaled[used][:, used]
            found[spectrum.place] = quantize(left.numpy(), spectrum.right.cpu()[used].numpy())
    return FactorTable(found)


def _shrunk(cores: torch.Tensor, loss: float, max_weight: float) -> torch.Tensor:
    """Cores, `[k, r, r]`, each with a smaller Frobenius norm, or zero, and no singular value above the bound."""
    norms = torch.linalg.matrix_norm(cores)
    shares = (1 - loss / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_min(0)
    cores = cores * shares[:, None, None]
    # No singular value exceeds the Frobenius norm.
    large = norms * shares > max_weight
    if bool(large.any()):
        left, values, right = torch.linalg.svd(cores[large])
        cores[large] = (left * values.clamp(max=max_weight)[:, None]) @ right
    return cores


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


def _cycle(number: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield numbers below a limit, `size` at a time, in random orders, each as often as any other."""

    def shuffled() -> Iterator[int]:
        while True:
            yield from torch.randperm(number, generator=generator).tolist()

    stream = shuffled()
    while True:
        yield list(itertools.islice(stream, min(size, number)))
