"""Causal tracing: find the outputs that bring refusing back if restored at one layer and token of a corrupted run.

After K. Meng, D. Bau, A. Andonian, Y. Belinkov, "Locating and Editing Factual Associations in GPT" (ROME), NeurIPS
2022, section 2. There are three kinds of runs: *clean*; *corrupted*, with Gaussian noise on the embeddings of the
subject's tokens; and *restored*, the corrupted run with one module's output of the clean run at one layer and token.
They are compared not by one token's probability but by a difference: log p(refusal) - log p(answer), in nats.

A restored run equals the corrupted one up to its layer, so it is entered there and costs only the later layers. Tokens
before the subject need no restored runs, because clean and corrupted run are the same there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.perplexity import losses
from dapa_merge.progress import advance
from dapa_merge.trace.case import Case, Settings, window_layers
from dapa_merge.trace.replay import Replay, Site, find_sites


@dataclass(frozen=True)
class Trace:
    """The trace of one prompt; figures are differences log p(refusal) - log p(answer), in nats.

    Attributes:
        subject: The first corrupted token, and the one after the last.
        clean: The figure of the clean run.
        corrupted: The figures of the corrupted run, for each sample of noise, `[samples]`.
        restored: The figures of the restored runs by kind, averaged over samples, `[layers, tokens]`; NaN in a layer
            without such a module.
        num_passes: The cost of the runs, in passes through all layers.
    """

    prompt: str
    tokens: tuple[str, ...]
    subject: tuple[int, int]
    clean: float
    corrupted: NDArray[numpy.float32]
    restored: Mapping[str, NDArray[numpy.float32]]
    num_runs: int
    num_passes: float

    @property
    def total_effect(self) -> float:
        """The loss caused by the noise, in nats."""
        return self.clean - float(self.corrupted.mean())

    def effect(self, kind: str) -> NDArray[numpy.float32]:
        """The gain from restoring, in nats, `[layers, tokens]`: ROME's indirect effect."""
        return numpy.asarray(self.restored[kind] - self.corrupted.mean(), numpy.float32)


class Tracer:
    """Traces prompts of one model, each in batches of runs."""

    def __init__(
        self, model: PreTrainedModel, padding: int, settings: Settings, deviation: float, batch_size: BatchSize
    ) -> None:
        """Find the modules of a decoder-only language model in evaluation mode, which is restored after each run.

        `padding` may be any of its token ids, and `deviation` comes from `embedding_deviation`.

        Raises:
            UsageError: If the model lacks one of the kinds.
            CheckpointError: If its layers are not found.
        """
        self.settings = settings
        self._replay = Replay(model)
        self._sites = {kind: find_sites(model, kind) for kind in settings.kinds}
        self._padding = padding
        self._scale = settings.noise * deviation
        self.batch_size = batch_size
        self._is_checked = False

    def num_runs(self, case: Case) -> int:
        """The number of runs that a case needs."""
        per_cell = 2 * self.settings.num_samples
        num_cells = sum(1 for _ in self._restorations()) * (case.num_context - case.subject[0])
        return 2 + per_cell * (1 + num_cells)

    def num_passes(self, case: Case) -> float:
        """The cost of these runs, in passes of one row through all layers."""
        num_layers = len(self._replay.layers)
        starts = (at + 1 if kind == "hidden" else window[0] for kind, at, window in self._restorations())
        per_token = sum(1 - start / num_layers for start in starts)
        return 2 + 2 * self.settings.num_samples * (1 + per_token * (case.num_context - case.subject[0]))

    def noise(self, case: Case, number: int) -> torch.Tensor:
        """The noise on the embeddings of a case's subject, `[samples, tokens, hidden]`, float32."""
        first, stop = case.subject
        # Drawn on the CPU, for the same noise on every device.
        entropy = numpy.random.SeedSequence((self.settings.seed, number)).generate_state(1, numpy.uint64)
        generator = torch.Generator().manual_seed(int(entropy[0]) >> 1)
        width = self._replay.model.get_input_embeddings().weight.shape[1]
        return self._scale * torch.randn(self.settings.num_samples, stop - first, width, generator=generator)

    @torch.inference_mode()
    def trace(self, case: Case, number: int) -> Trace:
        """Trace one case; the noise depends on its number and the seed.

        Raises:
            UsageError: If not even one run fits in the device's memory.
            UnsupportedArchitecture: If the model passes more than states from layer to layer.
        """
        work = _CaseRuns(self._replay, self._padding, case, self.settings.num_samples, self.batch_size)
        clean, values, clean_states = self._run_clean(case, work)
        corrupted, states = self._run_corrupted(case, number, work)
        num_layers = len(self._replay.layers)
        means = corrupted.mean(0)
        restored = {}
        for kind in self.settings.kinds:
            # Before the subject, restoring changes nothing.
            restored[kind] = torch.full((num_layers, case.num_context), float(means))
            for layer, sites in enumerate(self._sites[kind]):
                if not sites:
                    restored[kind][layer] = math.nan
        for kind, layer, restoring in self._restorations():
            if kind == "hidden":
                found = work.restore_states(layer + 1, states[layer + 1], clean_states[layer + 1])
            else:
                chosen = {site: values[site] for one in restoring for site in self._sites[kind][one]}
                found = work.restore_outputs(restoring[0], states[restoring[0]], chosen)
            restored[kind][layer, case.subject[0] :] = found.mean(1)
        return Trace(
            prompt=case.contrast.prompt,
            tokens=case.tokens,
            subject=case.subject,
            clean=clean,
            corrupted=corrupted.numpy(),
            restored={kind: found.numpy() for kind, found in restored.items()},
            num_runs=work.num_runs,
            num_passes=work.num_passes,
        )

    def _restorations(self) -> Iterator[tuple[str, int, range]]:
        """Yield each kind, layer and window of layers that is restored at each token."""
        for kind, by_layer in self._sites.items():
            for layer in range(len(by_layer)):
                if by_layer[layer]:
                    yield kind, layer, window_layers(self.settings, kind, layer, len(by_layer))

    def _run_clean(self, case: Case, work: _CaseRuns) -> tuple[float, dict[Site, torch.Tensor], list[torch.Tensor]]:
        """The clean difference, the output at every site, and the states that entered each layer."""
        sites = [site for kind in self.settings.kinds if kind != "hidden" for of in self._sites[kind] for site in of]
        sites = list(dict.fromkeys(sites))
        found: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []

        def run(items: Sequence[_Item]) -> list[float]:
            nonlocal found
            with (
                self._replay.recorded_states() as states,
                self._replay.recorded_outputs(sites, len(items), case.num_context) as outputs,
            ):
                lost = work.run(items).tolist()
            # Both sides have the same given tokens.
            found = outputs, [one[0] for one in states]
            return lost

        refusing, complying = self.batch_size.map(run, [_Item(0, 0, side) for side in (0, 1)])
        outputs, states = found
        return complying - refusing, dict(zip(sites, outputs, strict=True)), states

    def _run_corrupted(self, case: Case, number: int, work: _CaseRuns) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The corrupted difference for each sample, and the states that entered each layer, by sample and side."""
        noise = self.noise(case, number)
        chunks: list[list[torch.Tensor]] = []

        def run(items: Sequence[_Item]) -> Sequence[float]:
            chosen = noise[[item.sample for item in items]]
            with self._replay.recorded_states() as states, self._replay.noisy_embeddings(chosen, case.subject[0]):
                lost = work.run(items)
            if not self._is_checked:
                self._replay.check(lambda: work.run(items, count=False), states, lost)
                self._is_checked = True
            chunks.append(states)
            return lost.tolist()

        # Nothing is restored, so any token will do.
        found = work.differences([0], run)
        return found[0], [torch.cat(pieces) for pieces in zip(*chunks, strict=True)]


class _Item(NamedTuple):
    """One run: the restored token, the sample of noise, and the side (0 refuses, 1 complies)."""

    token: int
    sample: int
    side: int


class _CaseRuns:
    """Runs of one case, in batches."""

    def __init__(self, replay: Replay, padding: int, case: Case, num_samples: int, batch_size: BatchSize) -> None:
        self._replay = replay
        self._padding = padding
        self._case = case
        self._num_samples = num_samples
        self._batch_size = batch_size
        self._device = replay.model.device
        self.num_runs = 0
        self.num_passes = 0.0

    def run(self, items: Sequence[_Item], start: int = 0, *, count: bool = True) -> torch.Tensor:
        """The negative log-likelihoods of items, `[items]`, with the hooks that are in place."""
        rows = [self._case.complying if item.side else self._case.refusing for item in items]
        lost = losses(self._replay.model, self._padding, rows).cpu()
        self._replay.check_numbers(lost)
        if count:
            num_layers = len(self._replay.layers)
            self.num_runs += len(items)
            self.num_passes += len(items) * (num_layers - start) / num_layers
            advance(len(items), "runs")
        return lost

    def differences(self, tokens: Sequence[int], run: Callable[[Sequence[_Item]], Sequence[float]]) -> torch.Tensor:
        """The differences of runs with every sample of noise, `[tokens, samples]`."""
        items = [
            _Item(token, sample, side) for token in tokens for sample in range(self._num_samples) for side in (0, 1)
        ]
        lost = torch.tensor(list(self._batch_size.map(run, items)))
        refusing, complying = lost.view(len(tokens), self._num_samples, 2).unbind(-1)
        return complying - refusing

    def restore_states(self, start: int, states: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """The differences with one token's state restored, for each token from the subject on, `[tokens, samples]`.

        Args:
            start: The layer that the states enter.
            states: The entering states of the corrupted run, `[samples * 2, positions, hidden]`.
            clean: The entering states of the clean run, `[positions, hidden]`.
        """

        def run(items: Sequence[_Item]) -> list[float]:
            entering = states[self._rows(items)]
            positions = torch.tensor([item.token for item in items], device=entering.device)
            entering[torch.arange(len(items), device=entering.device), positions] = clean[positions]
            with self._replay.entered_at(start, entering):
                return self.run(items, start).tolist()

        return self.differences(self._tokens, run)

    def restore_outputs(self, start: int, states: torch.Tensor, values: Mapping[Site, torch.Tensor]) -> torch.Tensor:
        """The differences with one token's outputs restored at some sites, `[tokens, samples]`."""

        def run(items: Sequence[_Item]) -> list[float]:
            positions = torch.tensor([item.token for item in items], device=self._device)
            with ExitStack() as stack:
                stack.enter_context(self._replay.entered_at(start, states[self._rows(items)]))
                stack.enter_context(self._replay.replaced_outputs(values, positions))
                return self.run(items, start).tolist()

        return self.differences(self._tokens, run)

    @property
    def _tokens(self) -> range:
        return range(self._case.subject[0], self._case.num_context)

    def _rows(self, items: Sequence[_Item]) -> list[int]:
        return [2 * item.sample + item.side for item in items]
