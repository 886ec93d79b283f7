"""Which bytes of a result's files are the source's: the one place where units become spans of files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from dapa_merge.checkpoint.architecture import Unit
from dapa_merge.checkpoint.header import Tensor
from dapa_merge.checkpoint.plan import Plan
from dapa_merge.checkpoint.region import Box, Region, whole_box
from dapa_merge.checkpoint.streams import Span
from dapa_merge.checkpoint.values import Rounding, new_tiles


@dataclass(frozen=True)
class Change:
    """A part of a target's tensor that a result has from the source.

    Attributes:
        tensor: The target's tensor, whole.
        box: The part of it, by its dimensions.
        spans: Where the part lies in the file, in order.
        origin: What decides its bytes, in words: where the part lies in the source, and its dtype there.
        source_file: The source's file that it is read from.
        pieces: Yields its bytes, as the target stores them, in order; raises `CheckpointError` if they do not fit or
            are not finite.
    """

    tensor: Tensor
    box: Box
    spans: tuple[Span, ...]
    origin: str
    source_file: str
    pieces: Callable[[], Iterator[bytes]]

    @property
    def is_whole(self) -> bool:
        return self.box == whole_box(self.tensor.shape)


def find_changes(plan: Plan, selection: Sequence[Unit], rounding: Rounding | None = None) -> dict[str, list[Change]]:
    """The changes of each weight file of the target, by their place in it.

    Raises:
        CheckpointError: If a tensor lacks rows of a block.
    """
    found: dict[str, list[Change]] = {name: [] for name in plan.target.shards}
    rounding = rounding or Rounding()
    for ours, theirs in plan.regions(selection):
        found[ours.tensor.file].append(_change(plan, ours, theirs, rounding))
    for changes in found.values():
        changes.sort(key=lambda change: change.spans)
    return found


def _change(plan: Plan, ours: Region, theirs: Region, rounding: Rounding) -> Change:
    tensor = theirs.tensor
    origin = (
        f"{tensor.file} {tensor.dtype} {tensor.start}:{tensor.stop} {theirs.box} {plan.strength} {plan.max_overflow}"
    )
    spans = tuple((start, start + num_bytes) for start, num_bytes in ours.runs())
    pieces = partial(new_tiles, plan, ours, theirs, rounding)
    return Change(ours.tensor, ours.box, spans, origin, tensor.file, pieces)


def digest_of(changes: Sequence[Change]) -> str:
    """What tells changes of a file from others: a SHA-256 over where they are and where they come from."""
    lines = (f"{change.tensor.name}\0{change.tensor.dtype}\0{change.spans}\0{change.origin}\n" for change in changes)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
