"""Rows that a patch does not hold: it computes them from the base's, with an edit that it holds instead.

Only an edit that reads no model but the target can be held. The one of directions has some MB where the rows that it
changes have GB.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import accumulate

import numpy

from dapa_merge.checkpoint.header import Tensor
from dapa_merge.checkpoint.open import Checkpoint, iterate_bytes
from dapa_merge.checkpoint.region import Region
from dapa_merge.plan.edit import Edit, make_edit
from dapa_merge.progress import advance


def can_be_held(edit: Edit, base: Checkpoint) -> bool:
    """Whether a patch can hold an edit instead of the rows that it changes in a base."""
    return bool(edit.files()) and set(edit.inputs) == {"target"} and edit.unfit(base.shapes) is None


def edit_text(edit: Edit) -> str:
    """An edit's settings, for a patch's metadata; `held_edit` reads them back."""
    return json.dumps(edit.to_json())


def held_edit(text: str, files: Mapping[str, bytes]) -> Edit:
    """The edit that a patch holds, given its settings and the content of its files.

    Raises:
        ValueError: If it is not one that a patch can hold.
        CheckpointError: If a file is damaged.
    """
    said = json.loads(text)
    if not isinstance(said, dict) or type(said.get("strength")) not in (int, float) or not 0 < said["strength"] <= 2:
        raise ValueError("its edit has no strength from 0 to 2")
    edit = make_edit(str(said.get("edit")), said["strength"], said, files)
    if set(edit.inputs) != {"target"} or edit.files() != files or edit.to_json() != said:
        raise ValueError("its edit is not what its files hold")
    return edit


def computed_pieces(edit: Edit, tensor: Tensor, start: int, old: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the new bytes of a range of a base's tensor.

    Args:
        edit: Reads no model but the target.
        tensor: Of the base.
        start: Where the range begins, in bytes from the start of the tensor.
        old: The base's bytes, in pieces of whole elements.
    """
    # Places within the tensor, wherever its file has it.
    tensor = replace(tensor, start=0, stop=tensor.num_bytes)
    regions = [Region(tensor, region.box) for region in edit.regions_in(tensor)]
    for piece in old:
        values = numpy.frombuffer(piece, dtype=f"u{regions[0].num_element_bytes}").copy() if regions else None
        for region in regions:
            assert values is not None
            _rewrite(edit, region, start, values)
        yield piece if values is None else values.tobytes()
        start += len(piece)


def find_misfit(edit: Edit, result: Checkpoint, base: Checkpoint) -> str | None:
    """Find a tensor of a result that is not the base's with what the edit adds; None if absent.

    Both models have the same tensors.
    """
    for name, tensor in base.tensors.items():
        new = computed_pieces(edit, tensor, 0, iterate_bytes(base, tensor))
        if any(mine != theirs for mine, theirs in zip(new, iterate_bytes(result, result.tensors[name]), strict=True)):
            return name
        advance(2 * tensor.num_bytes, "bytes")
    return None


def _rewrite(edit: Edit, region: Region, start: int, values: numpy.ndarray) -> None:
    """Replace a region's values among those of its tensor that begin at a byte, as unsigned integers."""
    size = region.num_element_bytes
    runs = [(first // size, num_bytes // size) for first, num_bytes in region.runs()]
    # The number of each run's first element within the region.
    numbers = [0, *accumulate(length for _, length in runs)]
    offset = start // size
    found = []
    for number, (first, length) in zip(numbers, runs, strict=False):
        low, high = max(first, offset), min(first + length, offset + len(values))
        if low < high:
            found.append((number + low - first, low - offset, high - low))
    if not found:
        return
    places = numpy.concatenate([numpy.arange(low, low + length) for _, low, length in found])
    new = edit.new_bytes({"target": values[places].tobytes()}, {"target": region.tensor.dtype}, region, found[0][0])
    values[places] = numpy.frombuffer(new, dtype=values.dtype)
