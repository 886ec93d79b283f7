"""What must hold of every hostile file: readers refuse it in one sentence, or read what the safetensors library does.

Each check returns a short reason, for counting, and raises AssertionError where something does not hold.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hostile_files import Object, dump, tensor, weight_file
from safetensors import SafetensorError, deserialize

from dapa_merge.checkpoint.header import Tensor, read_header
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.errors import DapaError

# What a refusal says, in the order in which it is looked for.
REASONS = (
    "occurs twice", "is not a valid tensor name", "must have exactly a dtype", "is not a count", "unknown dtype",
    "that are not counts", "impossible shape", "dimensions and", "do not fit", "is at the wrong offset",
    "is longer than its header says", "is not a safetensors file, or is truncated", "is truncated", "__metadata__",
    "it is not a JSON object", "codec can't", "surrogates not allowed", "recursion", "is not JSON",
    "must hold a JSON object", "has no weight_map", "inside its own folder", "twice, in", "but it does not",
    "header of", "damaged safetensors header", "exactly one architecture", "layers", "of the target's own family",
    "levels deep", "cannot read", "infinite or not a number", "size", "only one of", "can be transplanted",
)  # fmt: skip
# Refused although the library reads it: it could be read in two ways, or no program writes it.
STRICTER = (
    "occurs twice", "is not a valid tensor name", "must have exactly a dtype", "is not a count", "unknown dtype",
    "impossible shape", "dimensions and",
)  # fmt: skip
# What `trap_folder` should say of its tensors.
SOUND_INDEX = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors", "d": "two.safetensors"}

Contents = dict[str, tuple[str, tuple[int, ...], bytes]]


def reason(error: DapaError) -> str:
    """Which kind of refusal it is, after a look at its form."""
    text = str(error)
    assert text.isprintable(), text
    assert 20 < len(text) < 2100, text
    return next((known for known in REASONS if known in text), f"other: {text}")


def library_reads(raw: bytes) -> Contents | None:
    """What the safetensors library finds in a weight file; None if it refuses it."""
    try:
        return {name: (found["dtype"], tuple(found["shape"]), bytes(found["data"])) for name, found in deserialize(raw)}
    except SafetensorError:
        return None


def check_header(path: Path, raw: bytes) -> str:
    """Read a weight file, which is written to `path` first."""
    path.write_bytes(raw)
    expected = library_reads(raw)
    try:
        tensors = read_header(path)
    except DapaError as error:
        why = reason(error)
        assert expected is None or why in STRICTER, f"refused ({error}), but the library reads it: {raw!r}"
        return f"{why} (the library reads it)" if expected is not None else why
    assert expected is not None, f"read, but the library refuses it: {raw!r}"
    assert contents(tensors, raw) == expected, raw
    assert len(tensors) == len(expected), raw
    ends = [8 + int.from_bytes(raw[:8], "little"), *(found.stop for found in tensors)]
    assert [found.start for found in tensors] == ends[:-1], raw
    assert ends[-1] == len(raw), raw
    return "read"


def contents(tensors: Iterable[Tensor], raw: bytes) -> Contents:
    """What tensors say of a file's bytes."""
    return {found.name: (found.dtype, found.shape, raw[found.start : found.stop]) for found in tensors}


def small_file(names: Iterable[str]) -> bytes:
    """A sound weight file with a tensor of two bytes for each name."""
    header = Object([name, tensor("BF16", [1], 2 * index, 2 * index + 2)] for index, name in enumerate(names))
    return weight_file(dump(header), bytes(range(2 * len(header))))


def trap_folder(folder: Path) -> None:
    """Make a sharded model without an index, with every kind of file that an index may lure a reader into."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "one.safetensors").write_bytes(small_file("ab"))
    (folder / "two.safetensors").write_bytes(small_file("cd"))
    (folder.parent / "outside.safetensors").write_bytes(small_file("e"))
    (folder / "outside.safetensors").symlink_to("../outside.safetensors")
    (folder / "same.safetensors").symlink_to("one.safetensors")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    (folder / "folder.safetensors").mkdir()
    (folder / ".safetensors").write_bytes(small_file("f"))
    os.mkfifo(folder / "pipe.safetensors")


def check_index(folder: Path, raw: bytes) -> str:
    """Open a model of which `raw` is the index; compare with what the library reads from the files that it names."""
    (folder / "model.safetensors.index.json").write_bytes(raw)
    try:
        checkpoint = open_checkpoint(str(folder))
    except DapaError as error:
        return reason(error)
    owners = json.loads(raw)["weight_map"]
    assert set(owners.values()) == set(checkpoint.shards), raw
    found: dict[str, Any] = {}
    for shard in checkpoint.shards:
        assert os.path.basename(shard) == shard, raw
        content = (folder / shard).read_bytes()
        expected = library_reads(content)
        assert expected is not None, raw
        assert contents((t for t in checkpoint.tensors.values() if t.file == shard), content) == expected, raw
        assert found.keys().isdisjoint(expected), raw
        found |= dict.fromkeys(expected, shard)
    assert owners.items() <= found.items(), raw
    assert found.keys() == checkpoint.tensors.keys(), raw
    return "read"
