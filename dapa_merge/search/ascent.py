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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from dapa_merge.errors import CheckpointError
from dapa_merge.measure.divergence import ReferenceRow
from dapa_merge.measure.live import LiveModel
from dapa_merge.plan.directions import FactorTable, quantize
from dapa_merge.search.attribution import MIN_LARGE
from dapa_merge.search.slopes import Chunk, LiveSlopes, Section, Settings, Sides, Slopes, Step, places_of
from dapa_merge.search.spectrum import Spectrum

# Rows that are differentiated at once in a large model, so that workers have something to share. In others all rows of
# a step are, which takes a third less time, if they have at most so many tokens.
MAX_CHUNK = 3
MAX_TOGETHER = 1024
# Decay rates of Adam's two moments; a short memory of the second, because there are few steps.
BETAS = (0.9, 0.99)
# The share of the largest possible step that sparsity may take back: a core of rank 1 must be able to leave zero.
MAX_LOSS = 0.25
# A direction along which less than this share of the most is read is left out of what is stored.
MIN_SHARE = 1e-4


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
        self._num_tokens = {None: [len(side.row.ids) for side, _ in contrasts]} | {
            number: [len(row.text.ids) for row in group] for number, group in enumerate(keep)
        }
        self.slopes = slopes or LiveSlopes(live, spectra, contrasts, keep, settings, batch_limit)
        self._is_large = live.plan.target.num_parameters > MIN_LARGE
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
        drawn = [Section(None, tuple(next(self._contrasts)))]
        drawn += [Section(number, tuple(next(group))) for number, group in self._keep]
        if not self._is_large:
            num_tokens = sum(self._num_tokens[group][row] for group, rows in drawn for row in rows)
            return [tuple(drawn)] if num_tokens <= MAX_TOGETHER else [(section,) for section in drawn]
        chunks: list[Chunk] = []
        for group, rows in drawn:
            size = math.ceil(len(rows) / math.ceil(len(rows) / MAX_CHUNK))
            chunks += [(Section(group, rows[start : start + size]),) for start in range(0, len(rows), size)]
        return chunks

    def _gradient(self) -> tuple[torch.Tensor, Progress]:
        """The gradient of the loss at the current weights, over the next prompts."""
        chunks = self._draw()
        sections = [section for chunk in chunks for section in chunk]
        num_contrasts = sum(len(rows) for group, rows in sections if group is None)
        kept = [self._keep_rows[group][row] for group, rows in sections if group is not None for row in rows]
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


def _cycle(number: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield numbers below a limit, `size` at a time, in random orders, each as often as any other."""

    def shuffled() -> Iterator[int]:
        while True:
            yield from torch.randperm(number, generator=generator).tolist()

    stream = shuffled()
    while True:
        yield list(itertools.islice(stream, min(size, number)))
