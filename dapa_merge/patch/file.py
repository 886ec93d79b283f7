"""The patch file: a safetensors file of changed rows, with metadata on their places and the rows they replace.

`__metadata__` holds only strings, as the format requires:

- `dapa_patch`: the version of this format, `1`, or `2` with an edit; `tool`: the program that wrote it.
- `base`, `base_commit`: the base's name, and its commit if it came from the Hub; both are only informative.
- `base_layout`: `layout_digest` of the base; `base_rest`: its `rest_digest`, of everything that is not replaced (absent
  from an undo file, because other patches may follow).
- `entries`: a JSON list. Each has the `key` of its bytes in this file; `tensor`, `dtype` and `shape` of the base's
  tensor; `rows`, the first and the one after the last, of the tensor as a matrix of its last dimension (a tensor of
  one dimension, or none, is one row); `num_changed`, the number of rows that differ; `base_sha256` and `new_sha256` of
  their bytes.
- `edit`: in format `2`, the settings of an edit (`make_edit`) that reads nothing but the base; each of its files is a
  tensor of bytes. An entry whose `key` is not in this file is computed by it from the base's rows.
- `recipe`: the recipe that the result was made by, if known.
- `undo_of`: in an undo file, the `identity` of the patch that it reverts.

No entry depends on how the base is divided into files. Whole tensors are stored under their own name and shape, rows
under `name[first:stop]` and as a matrix.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from dapa_merge.checkpoint.header import DTYPE_BITS, TORCH_NAMES, Tensor, read_header
from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.errors import CheckpointError, UsageError, fault_of
from dapa_merge.patch.computed import computed_pieces, held_edit
from dapa_merge.plan.directions import MAX_FILE_BYTES
from dapa_merge.plan.edit import Edit
from dapa_merge.progress import advance


def check_space(path: Path, needed: int, what: str) -> None:
    """Raise `UsageError` unless `needed` bytes fit on the disk of `path`."""
    free = shutil.disk_usage(path.absolute().parent).free
    if free < needed:
        raise UsageError(
            f"{what} needs {needed / 1e9:.3f} GB on the disk of {path}, which has {free / 1e9:.3f} GB left"
        )


FORMAT_VERSION = "1"
# Older programs refuse a patch that computes rows.
FORMAT_WITH_EDIT = "2"
# Small enough that several threads need little memory, and a piece stays in the processor's cache.
PIECE_BYTES = 1 << 20
# Not the manifest's algorithm: every version of this program can check and apply every patch.
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def _known(dtype: str) -> str:
    if dtype not in DTYPE_BITS:
        raise ValueError("not a dtype of safetensors")
    return dtype


_Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Entry:
    """Some rows of one tensor of the base and their replacement; the attributes are the metadata's own."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    key: str
    tensor: str
    dtype: Annotated[str, AfterValidator(_known)]
    shape: tuple[_Count, ...]
    rows: tuple[_Count, _Count]
    num_changed: _Count
    base_sha256: Sha256
    new_sha256: Sha256

    @property
    def num_row_bytes(self) -> int:
        return row_bytes(self.dtype, self.shape)

    @property
    def num_bytes(self) -> int:
        return (self.rows[1] - self.rows[0]) * self.num_row_bytes

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of its rows in the patch."""
        first, stop = self.rows
        whole = (stop - first) * row_elements(self.dtype, self.shape) == math.prod(self.shape)
        return self.shape if whole else (stop - first, self.shape[-1])

    @property
    def as_tensor(self) -> Tensor:
        """The base's tensor, as if it were alone in a file."""
        return Tensor(self.tensor, "", self.dtype, self.shape, 0, math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8)

    def place(self, tensor: Tensor) -> tuple[int, int]:
        """The byte range of its rows in the file of the base's tensor; the end is exclusive."""
        return tuple(tensor.start + row * self.num_row_bytes for row in self.rows)  # type: ignore[return-value]


@dataclass(frozen=True)
class Patch:
    """A patch file whose header and metadata were read and validated, but not its rows.

    Attributes:
        path: The file.
        contents: The place of each entry's bytes in it, by key.
        entries: The changes, by position in the file.
        metadata: All of `__metadata__`.
        edit: Computes the entries that `contents` lacks, if any.
        old: Yields the base's bytes of an entry, for these; set it with `reading`.
    """

    path: Path
    contents: Mapping[str, Tensor]
    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]
    edit: Edit | None = None
    old: Callable[[Entry], Iterator[bytes]] | None = field(default=None, compare=False, repr=False)

    @property
    def identity(self) -> str:
        """A digest of the base's layout and the changes; equal for all files with the same changes."""
        return identity(self.metadata["base_layout"], self.entries)

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries)

    @property
    def num_stored_bytes(self) -> int:
        """Bytes of the rows that the file itself holds."""
        return sum(entry.num_bytes for entry in self.entries if entry.key in self.contents)

    def reading(self, old: Callable[[Entry], Iterator[bytes]]) -> Patch:
        """The same patch, which computes from these bytes of the base."""
        return replace(self, old=old)

    def pieces(self, entry: Entry) -> Iterator[bytes]:
        """The new bytes of one entry, in pieces of at most 1 MiB."""
        if entry.key not in self.contents:
            assert self.edit is not None
            assert self.old is not None
            start, _ = entry.place(entry.as_tensor)
            return computed_pieces(self.edit, entry.as_tensor, start, self.old(entry))
        return self._stored(entry.key)

    def _stored(self, key: str) -> Iterator[bytes]:
        tensor = self.contents[key]
        holder = Checkpoint(str(self.path), self.path.parent, {}, self.contents, (self.path.name,))
        return iterate_range(holder, tensor.file, tensor.start, tensor.stop)


def row_elements(dtype: str, shape: Sequence[int]) -> int:
    """Elements per row: the last dimension, or all if there is only one dimension or rows would end within a byte."""
    last = shape[-1] if len(shape) > 1 else math.prod(shape)
    return last if last * DTYPE_BITS[dtype] % 8 == 0 else math.prod(shape)


def row_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of one row."""
    return row_elements(dtype, shape) * DTYPE_BITS[dtype] // 8


def iterate_range(checkpoint: Checkpoint, name: str, start: int, stop: int) -> Iterator[bytes]:
    """Yields the bytes in `[start, stop)` of a weight file, in pieces of 1 MiB; only the last may be shorter.

    Raises:
        CheckpointError: If the file ends early, because it changed since its header was read.
    """
    with checkpoint.open(name, start, stop) as file:
        for position in range(start, stop, PIECE_BYTES):
            size = min(PIECE_BYTES, stop - position)
            piece = file.read(size)
            if len(piece) != size:
                raise CheckpointError(f"{checkpoint.folder / name} became shorter while it was read")
            yield piece


def layout_digest(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of a JSON list of `[name, dtype, shape]` for every tensor of a model, sorted by name."""
    layout = sorted((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
    return hashlib.sha256(json.dumps(layout, separators=(",", ":")).encode()).hexdigest()


def identity(layout: str, entries: Sequence[Entry]) -> str:
    """A digest of a base's layout and of a patch's entries, independent of their order and keys."""
    changes = sorted((entry.tensor, entry.rows, entry.base_sha256, entry.new_sha256) for entry in entries)
    return hashlib.sha256(json.dumps([layout, changes]).encode()).hexdigest()


def unique_key(name: str, taken: Mapping[str, Any]) -> str:
    """A key like `name` that is not taken; a model may have a tensor with the name of another's rows."""
    while name in taken:
        name += "'"
    return name


def lay_out(
    contents: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file, and the offset of each tensor's bytes in the file.

    Args:
        contents: Key, dtype and shape of each tensor. Larger dtypes come first in the file, which aligns all.
        metadata: `__metadata__`. Its values may be replaced by others of the same length afterwards.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offsets: dict[str, int] = {}
    position = 0
    for key, dtype, shape in sorted(contents, key=lambda content: -DTYPE_BITS[content[1]]):
        size = math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        offsets[key] = position
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    prefix = len(text).to_bytes(8, "little") + text
    return prefix, {key: len(prefix) + offset for key, offset in offsets.items()}


def entries_text(entries: Sequence[Entry]) -> str:
    """The entries in the metadata's format."""
    return json.dumps([asdict(entry) for entry in entries], separators=(",", ":"))


_ENTRIES, _DIGESTS = TypeAdapter(list[Entry]), TypeAdapter(dict[str, Sha256])


def read_patch(path: Path, *, further: str | None = None) -> Patch:
    """Read a patch's header and validate it.

    Args:
        path: The file.
        further: Metadata key that names one more tensor of the file, which belongs to no entry.

    Raises:
        CheckpointError: If it is not a patch, is damaged, or contradicts itself.
    """
    contents = {tensor.name: tensor for tensor in read_header(path)}
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        metadata = header.get("__metadata__")
        if not isinstance(metadata, dict) or "dapa_patch" not in metadata:
            raise CheckpointError(f"{path} is not a patch; `dapa-merge patch extract` writes one")
        known = {FORMAT_VERSION: False, FORMAT_WITH_EDIT: True}
        found = metadata["dapa_patch"]
        if found not in known:
            raise CheckpointError(
                f"{path} is a patch of format {str(found)[:20]!r}, not {' or '.join(known)}; update dapa-merge"
            )
        if ("edit" in metadata) is not known[found]:
            raise ValueError(f"an edit does not go with format {found}")
        if further is None and "undo_of" in metadata:
            raise CheckpointError(f"{path} is an undo file; use it with `dapa-merge patch revert`")
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are not all strings")
        digests = ("base_layout",) if further else ("base_layout", "base_rest")
        _DIGESTS.validate_python({name: metadata[name] for name in digests})
        entries = _ENTRIES.validate_json(metadata["entries"], strict=True)
        others = {metadata[further]} if further in metadata else set()
        patch = Patch(path, contents, tuple(entries), metadata)
        if further is None and "edit" in metadata:
            others = contents.keys() - {entry.key for entry in entries}
            patch = replace(patch, edit=_edit(patch, others))
        _check_entries(entries, contents, others, patch.edit)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        raise CheckpointError(f"{path} is a damaged patch ({fault_of(error)}); get it again") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is a damaged patch ({str(error)[:200]}); get it again") from error
    entries.sort(key=lambda entry: contents[entry.key].start if entry.key in contents else -1)
    return replace(patch, entries=tuple(entries))


def _edit(patch: Patch, files: Iterable[str]) -> Edit:
    """The edit that a patch holds; raises `ValueError` unless it fits the patch's entries."""
    if sum(patch.contents[name].num_bytes for name in files) > MAX_FILE_BYTES:
        raise ValueError("its edit is too large")
    edit = held_edit(patch.metadata["edit"], {name: b"".join(patch._stored(name)) for name in files})
    if what := edit.unfit({entry.tensor: entry.shape for entry in patch.entries}):
        raise ValueError(f"its edit {what}")
    return edit


def _check_entries(
    entries: Sequence[Entry], contents: Mapping[str, Tensor], others: AbstractSet[str], edit: Edit | None
) -> None:
    """Raise `ValueError` unless each tensor of the file belongs to one entry, and entries do not overlap.

    With an edit, entries may be absent from the file.
    """
    keys = [entry.key for entry in entries]
    if not entries or len(set(keys)) != len(keys) or not {*keys, *others} >= set(contents) or others & set(keys):
        raise ValueError("its entries are not those of its header")
    for entry in entries:
        if entry.key not in contents and (
            edit is None or entry.dtype not in TORCH_NAMES or not any(edit.regions_in(entry.as_tensor))
        ):
            raise ValueError("its entries are not those of its header")
    previous: Entry | None = None
    for entry in sorted(entries, key=lambda entry: (entry.tensor, entry.rows)):
        first, stop = entry.rows
        if not first < stop or stop * row_elements(entry.dtype, entry.shape) > math.prod(entry.shape):
            raise ValueError(
                f"the entry {entry.key[:120]!r} has rows {first} to {stop}, which its tensor does not have"
            )
        if not 0 < entry.num_changed <= stop - first or entry.base_sha256 == entry.new_sha256:
            raise ValueError(f"the entry {entry.key[:120]!r} does not change the rows that it says")
        stored = contents.get(entry.key)
        if stored is not None and (
            (stored.dtype, stored.shape) != (entry.dtype, entry.stored_shape) or stored.num_bytes != entry.num_bytes
        ):
            raise ValueError(f"the entry {entry.key[:120]!r} is not what its header says")
        if previous is not None and previous.tensor == entry.tensor:
            if (previous.dtype, previous.shape) != (entry.dtype, entry.shape):
                raise ValueError(f"{entry.tensor[:120]!r} has two shapes or dtypes")
            if entry.rows[0] < previous.rows[1]:
                raise ValueError(f"{entry.tensor[:120]!r} has the same rows twice")
        previous = entry


THREADS = 4


def rest_digest(model: Checkpoint, entries: Iterable[Entry]) -> str:
    """One SHA-256 of all values of a model except the entries' rows, independent of the division into files."""
    left_out: dict[str, list[tuple[int, int]]] = {}
    for entry in entries:
        left_out.setdefault(entry.tensor, []).append(entry.place(model.tensors[entry.tensor]))

    def digest(name: str) -> str:
        tensor = model.tensors[name]
        ends = [tensor.start, *(end for span in sorted(left_out.get(name, ())) for end in span), tensor.stop]
        pieces = (
            piece
            for start, stop in zip(ends[::2], ends[1::2], strict=True)
            for piece in iterate_range(model, tensor.file, start, stop)
        )
        return digest_of(pieces)

    names = sorted(model.tensors)
    with ThreadPoolExecutor(THREADS) as pool:
        return hashlib.sha256("".join(pool.map(digest, names)).encode()).hexdigest()


def digest_of(pieces: Iterable[bytes]) -> str:
    """The SHA-256 of bytes given in pieces."""
    state = hashlib.sha256()
    for piece in pieces:
        state.update(piece)
        advance(len(piece), "bytes")
    return state.hexdigest()


def check_content(patch: Patch) -> None:
    """Raise `CheckpointError` unless the patch's bytes have the digests that it records."""

    def check(entry: Entry) -> None:
        if digest_of(patch.pieces(entry)) != entry.new_sha256:
            raise content_fault(patch, entry)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(check, patch.entries))


def checked_pieces(patch: Patch, entry: Entry) -> Iterator[bytes]:
    """Yields the new bytes of one entry, the last piece only if all have the recorded digest.

    Raises:
        CheckpointError: Before the last piece, if they do not.
    """
    state = hashlib.sha256()
    remaining = entry.num_bytes
    for piece in patch.pieces(entry):
        state.update(piece)
        remaining -= len(piece)
        if not remaining and state.hexdigest() != entry.new_sha256:
            raise content_fault(patch, entry)
        yield piece


def content_fault(patch: Patch, entry: Entry) -> CheckpointError:
    """The error for an entry whose bytes in the patch do not have the recorded digest."""
    return CheckpointError(
        f"{patch.path} is damaged: its bytes for {entry.key[:120]!r} are not the recorded ones; get it again"
    )
