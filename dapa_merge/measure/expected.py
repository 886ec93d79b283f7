"""Estimates of a job, before it begins: seconds on this device, memory, and bytes to fetch; no model is loaded.

Seconds come from a short calibration: matrices of the shapes and dtype of the target's first layer, with random values,
are multiplied as in an answer and as in a step of a choice. Attention, and what Python does between, are estimated. So
it is a rough figure, for the question whether to wait or to come back tomorrow (tests/benchmarks/forecasts.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import psutil
import torch

from dapa_merge.checkpoint.header import Tensor
from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.checkpoint.units import layer_number
from dapa_merge.measure.decode import PIECE
from dapa_merge.measure.determinism import batch_invariant, can_pack
from dapa_merge.progress import LOG, duration, expect, job

# Tokens of an answer, on the average: refusals are short.
TOKENS_OF_ANSWER = 60
# What Python and the launches of kernels take for a layer, in seconds.
OVERHEAD = 4e-4
# A load of this share of the processors, in the last minute, is that of other programs: a job has just begun.
BUSY = 0.75
# What takes longer is told beforehand.
TOLD_SECONDS = 60
# Of the trial of one product, which is at least six runs.
TRIAL_SECONDS = 0.05
MAX_ROWS = 4096
# Rows of a trial's matrix that are drawn; a larger one repeats them.
NUM_DRAWN = 256


@dataclass(frozen=True)
class Expected:
    """The estimate of a job.

    Attributes:
        parts: How much each part of the job does, by the part's name and by unit.
        rates: Seconds that a unit takes, where that is known.
        memory_bytes: On the device, beside activations.
        fetch_bytes: That are not on this machine yet.
        device: Where the seconds were calibrated.
        tests: Of delta debugging, in number; 0 without it.
    """

    parts: Mapping[str, Mapping[str, float]]
    rates: Mapping[str, float]
    memory_bytes: int
    fetch_bytes: int
    device: str
    tests: int = 0

    @property
    def total_seconds(self) -> float:
        """About how long all parts take."""
        return sum(map(self.seconds, self.parts.values()))

    def seconds(self, amounts: Mapping[str, float]) -> float:
        """About how long so much of each unit takes."""
        return sum(amount * self.rates.get(unit, 0.0) for unit, amount in amounts.items())

    @property
    def place(self) -> str:
        """Where the seconds were calibrated, for people."""
        return self.device

    @contextmanager
    def told(self) -> Iterator[None]:
        """Show the job inside the `with` block as one work, and tell the user beforehand if it takes long."""
        with job(self.rates):
            for part, amounts in self.parts.items():
                expect(part, **amounts)
            self.tell()
            yield

    def tell(self) -> None:
        """Tell the user what the job takes, if that is long."""
        if self.total_seconds >= TOLD_SECONDS:
            LOG.info(f"this takes {self}")

    def __str__(self) -> str:
        found = [f"about {duration(self.total_seconds)} on {self.place}"]
        if self.tests:
            found.append(f"about {self.tests} tests")
        found.append(f"{self.memory_bytes / 1e9:.1f} GB of its memory and the batches")
        if self.fetch_bytes:
            found.append(f"{self.fetch_bytes / 1e9:.1f} GB to fetch")
        return ", ".join(found) + _busy_text()


def _busy_text() -> str:
    """That other programs slow the calibration down, as the rest of a sentence; empty on a machine that is idle."""
    load, number = psutil.getloadavg()[0], psutil.cpu_count() or 1
    if load < BUSY * number:
        return ""
    return f" (now, at a load of {load:.1f} on {number} processors; less without other programs)"


def bytes_to_fetch(models: Iterable[Checkpoint]) -> int:
    """Bytes of these models' weights that are not on this machine yet."""
    return sum(map(_missing, models))


def _missing(model: Checkpoint) -> int:
    if model.partial is None:
        return 0
    ends: dict[str, int] = {}
    for tensor in model.tensors.values():
        ends[tensor.file] = max(ends.get(tensor.file, 0), tensor.stop)
    return model.num_missing([(file, 0, stop) for file, stop in ends.items()])


@dataclass(frozen=True)
class Calibration:
    """How long passes through a model take on a device, by multiplying matrices like its own.

    Attributes:
        dtype: The arithmetic, as in `Where`; None for the model's own.
    """

    model: Checkpoint
    device: torch.device
    dtype: str | None = None
    # Of the products that were tried: many matrices have the same shape.
    _tried: dict[tuple[object, ...], float] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def inner(self) -> list[Tensor]:
        """The matrices of the first layer."""
        return [tensor for tensor in self._matrices if layer_number(tensor.name) == 0]

    @cached_property
    def num_layers(self) -> int:
        """The number of layers."""
        layers = [layer_number(name) for name in self.model.tensors]
        return max((number for number in layers if number is not None), default=0) + 1

    @cached_property
    def _matrices(self) -> list[Tensor]:
        return [tensor for tensor in self.model.tensors.values() if len(tensor.shape) == 2]

    def pass_seconds(self, num_tokens: int, num_outputs: int) -> float:
        """Of a pass of so many tokens through all layers, and of some of them through the output layer."""
        layer = sum(self._product_seconds(tensor, num_tokens) for tensor in self.inner) + OVERHEAD
        head = max(self._matrices, key=lambda tensor: tensor.num_parameters, default=None)
        return self.num_layers * layer + (0.0 if head is None else self._product_seconds(head, num_outputs))

    def answer_seconds(self, max_new_tokens: int | None) -> float:
        """Of an answer, in a batch of them."""
        tokens = min(TOKENS_OF_ANSWER, max_new_tokens or TOKENS_OF_ANSWER)
        return self.pass_seconds(PIECE, PIECE) * tokens / PIECE

    def _product_seconds(self, tensor: Tensor, num_tokens: int) -> float:
        """Of a product of so many rows with a matrix; of a large one, some of its rows are tried."""
        own = torch.bfloat16 if tensor.num_bytes == 2 * tensor.num_parameters else torch.float32
        dtype = own if self.dtype is None else getattr(torch, self.dtype)
        rows, columns = tensor.shape
        tried = (min(rows, MAX_ROWS), columns, dtype, num_tokens)
        if tried not in self._tried:
            self._tried[tried] = _of_product(*tried, self.device, can_pack(self.model.num_parameters))
        return self._tried[tried] * rows / tried[0]


def _of_product(
    rows: int, columns: int, dtype: torch.dtype, num_tokens: int, device: torch.device, packs: bool
) -> float:
    layer = torch.nn.Linear(columns, rows, bias=False, device="meta")
    drawn = torch.randn(min(rows, NUM_DRAWN), columns, device=device).to(dtype)
    layer.weight = torch.nn.Parameter(drawn[torch.arange(rows, device=device) % len(drawn)], requires_grad=False)
    inputs = torch.randn(num_tokens, columns, device=device).to(dtype)
    # As measurements compute it.
    with torch.no_grad(), batch_invariant(layer, packs=packs):
        return timed(lambda: layer(inputs), device)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of a short work on a device."""

    def synchronize() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    # The fastest of some: the first warms up, and other processes may disturb. Both matter less in a long one.
    spent: list[float] = []
    while len(spent) < 6 or (sum(spent) < TRIAL_SECONDS and len(spent) < 30):
        start = time.perf_counter()
        work()
        synchronize()
        spent.append(time.perf_counter() - start)
    return min(spent)
