"""Opens local folders and Hub snapshots without torch, and reads the bytes of their tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

from dapa_merge.checkpoint.contents import refuse_other_weights
from dapa_merge.checkpoint.fetch import (
    FileRange,
    PartialWeights,
    RangesIgnored,
    Snapshot,
    mirror_folder,
    open_snapshot,
)
from dapa_merge.checkpoint.folder import Layout, cached_sha256, find_weights, open_regular, refuse_other_bytes
from dapa_merge.checkpoint.header import Tensor, read_header, read_index, read_json
from dapa_merge.checkpoint.region import Region
from dapa_merge.errors import CheckpointError

CHUNK_BYTES = 8 << 20
ALLOW_VARIABLE = "DAPA_ALLOW_PICKLE"

# Number of elements to read, compute and write at once.
TILE = 1 << 21


@dataclass(frozen=True)
class Checkpoint:
    """A model whose headers were read and validated.

    Attributes:
        name: As the user wrote it: a path or a Hub id, with the revision if one was given.
        folder: Its files; for pickles, a folder of converted safetensors in the user's cache.
        config: `config.json`.
        tensors: All tensors by name, in file order.
        shards: The weight files, in order.
        commit: Hub commit of a snapshot; None for a local folder.
        merged_from: Hub commits of base and adapter for a merged LoRA, each None for a local folder.
        partial: Weights that are fetched from the Hub as they are read, into another folder; None if all are in
            `folder`.
        chat_template: The text of a chat template that it is asked with in place of its own, empty for none; None for
            its own.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    shards: tuple[str, ...]
    commit: str | None = None
    merged_from: tuple[str | None, str | None] | None = None
    partial: PartialWeights | None = field(default=None, compare=False, repr=False)
    chat_template: str | None = None

    def path(self, shard: str) -> Path:
        """Path of a weight file; call `ensure` before reading bytes of a partial one."""
        return (self.folder if self.partial is None else self.partial.folder) / shard

    def open(self, shard: str, start: int = 0, stop: int | None = None) -> BufferedReader:
        """Open one weight file for reading at `start`; do not read beyond `stop`.

        Raises:
            CheckpointError: If it is gone or unreadable.
            HubError: If missing bytes cannot be fetched.
        """
        path = self.path(shard)
        try:
            self.ensure(shard, start, path.stat().st_size if stop is None else stop)
            file = open_regular(path)
            file.seek(start)
            return file
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error

    def ensure(self, shard: str, start: int, stop: int) -> None:
        """Fetch the missing bytes in `[start, stop)` of a weight file.

        Raises:
            HubError: If they cannot be fetched; bytes that arrived are kept.
        """
        self.ensure_all([(shard, start, stop)])

    def ensure_all(self, ranges: Iterable[FileRange]) -> None:
        """Fetch the missing bytes of many ranges at once, which is faster than one by one.

        Args:
            ranges: Weight file, first byte, end (exclusive); they may overlap.

        Raises:
            HubError: If they cannot be fetched; bytes that arrived are kept.
        """
        if self.partial is not None:
            self.partial.ensure(ranges)

    def num_missing(self, ranges: Iterable[FileRange]) -> int:
        """Number of bytes in these ranges that have to be fetched."""
        return 0 if self.partial is None else sum(stop - start for _, start, stop in self.partial.missing(ranges))

    def whole(self) -> Checkpoint:
        """The same checkpoint with all its weights in its folder.

        Raises:
            HubError: If missing weights cannot be fetched.
        """
        if self.partial is None:
            return self
        whole = open_checkpoint(self.partial.repository, self.partial.commit)
        return replace(whole, name=self.name, chat_template=self.chat_template)

    def has_hubs_sha256(self, files: Iterable[str]) -> bool:
        """Whether cached files of a model on the Hub have the Hub's SHA-256s; false also where these are not known.

        Raises:
            HubError: If one has another; it is removed from the cache.
        """
        expected = {file: cached_sha256(self.folder / file) for file in files}
        known = {file: sha256 for file, sha256 in expected.items() if sha256 is not None}
        refuse_other_bytes(self.folder, known, f"{self.name} at commit {str(self.commit)[:12]}")
        return known.keys() == expected.keys()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def num_parameters(self) -> int:
        return sum(tensor.num_parameters for tensor in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class FoundModel:
    """A model whose weight files are known but not yet read."""

    checkpoint: Checkpoint
    layout: Layout
    snapshot: Snapshot | None

    def shards(self) -> tuple[str, ...]:
        """The weight files, in order; reads the index, if any."""
        return _shards(self.checkpoint, self.layout)

    def read(self, *, partial: bool = False) -> Checkpoint:
        """Read the safetensors headers; Hub weights are fetched now, or as they are read if `partial`."""
        checkpoint, layout, snapshot = self.checkpoint, self.layout, self.snapshot
        if snapshot is None:
            return read_tensors(checkpoint, layout)
        shards = _shards(checkpoint, layout)
        if partial and snapshot.lacks(shards):
            weights = PartialWeights(
                snapshot.repository,
                snapshot.commit,
                mirror_folder(snapshot.repository, snapshot.commit),
                snapshot.known,
            )
            with suppress(RangesIgnored):
                for is_last in (False, True):
                    weights.open_headers(shards)
                    try:
                        return read_tensors(replace(checkpoint, partial=weights), layout)
                    except CheckpointError:
                        # An unsound header may be a bad answer, which must not stay.
                        weights.drop()
                        if is_last:
                            raise
        snapshot.fetch(shards)
        return read_tensors(checkpoint, layout)


def find_model(path: str, revision: str | None = None) -> FoundModel:
    """Look for a model's config and weight files in a local folder or a Hub repository; a folder wins.

    Raises:
        CheckpointError: If it has no weights in a known format, or transformers would load others.
        HubError: If it is not a folder and cannot be fetched from the Hub.
    """
    name = f"{path}@{revision}" if revision else path
    if os.path.isdir(path):
        folder = Path(path)
        checkpoint = Checkpoint(name, folder, _read_config(folder), {}, ())
        layout = find_weights(os.listdir(folder), name)
        refuse_other_weights(checkpoint.config, layout, name)
        return FoundModel(checkpoint, layout, None)
    if os.path.isfile(path):
        raise CheckpointError(f"{path} is a file; name the folder of a model in the format of transformers")
    snapshot = open_snapshot(path, revision)
    # Read first, before gigabytes are fetched in vain.
    config = _read_config(snapshot.folder)
    layout = find_weights(snapshot.files, name)
    refuse_other_weights(config, layout, name)
    return FoundModel(Checkpoint(name, snapshot.folder, config, {}, (), snapshot.commit), layout, snapshot)


def open_checkpoint(path: str, revision: str | None = None, *, partial: bool = False) -> Checkpoint:
    """Open the safetensors of a local model folder or a Hub repository.

    `checkpoint.convert.open_model` also opens models that have only pickles.

    Args:
        path: A folder, or a Hub id; a folder wins.
        revision: Branch, tag or commit on the Hub.
        partial: If a Hub model is not cached, fetch the headers now, and weights only as they are read. Without
            support for range requests on the server, everything is fetched now.

    Raises:
        CheckpointError: If the files are not a valid safetensors checkpoint.
        HubError: If it is not a folder and cannot be fetched from the Hub.
    """
    found = find_model(path, revision)
    if found.layout.pickled:
        raise pickles_refused(found.checkpoint.name)
    return found.read(partial=partial)


def pickles_refused(name: str) -> CheckpointError:
    """The error for pickles that the user did not allow."""
    return CheckpointError(
        f"{name} has pickled weights only, which can run code when loaded; save it again as safetensors, or allow a "
        f"reader that accepts only tensors with --allow-pickle (or {ALLOW_VARIABLE}=1)"
    )


def _read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json`, or derive a minimal config from the `params.json` of Mistral AI's own format."""
    params = folder / "params.json"
    if (folder / "config.json").exists() or not params.is_file():
        inside = sorted(path.parent for path in folder.glob("*/config.json"))
        if inside and not (folder / "config.json").exists():
            raise CheckpointError(f"{folder} has no config.json, but a folder in it has; name {inside[-1]}")
        return read_json(folder / "config.json")
    # mergekit and transformers do not know this class, so the layers are found by tensor names.
    config: dict[str, Any] = {"architectures": ["MistralConsolidated"]}
    if (num_layers := read_json(params).get("n_layers")) is not None:
        config["num_hidden_layers"] = num_layers
    return config


def _shards(checkpoint: Checkpoint, layout: Layout) -> tuple[str, ...]:
    if layout.index is None:
        return layout.shards
    return tuple(sorted(set(read_index(checkpoint.folder / layout.index).values())))


def read_tensors(checkpoint: Checkpoint, layout: Layout) -> Checkpoint:
    """Add the tensors to a checkpoint, from the headers of its weight files."""
    name, shards = checkpoint.name, _shards(checkpoint, layout)
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        for tensor in read_header(checkpoint.path(shard)):
            if tensor.name in tensors:
                # transformers would load the last of the two, other programs the one in the index.
                both = f"{tensors[tensor.name].file} and {shard}"
                raise CheckpointError(f"{name} holds {tensor.name} twice, in {both}; save it again")
            tensors[tensor.name] = tensor
    if layout.index is not None:
        index = checkpoint.folder / layout.index
        for tensor_name, shard in read_index(index).items():
            if tensor_name not in tensors or tensors[tensor_name].file != shard:
                raise CheckpointError(f"{index} says that {shard} holds {tensor_name[:120]!r}, but it does not")
    return replace(checkpoint, tensors=tensors, shards=shards)


def read_bytes(checkpoint: Checkpoint, tensor: Tensor) -> bytes:
    """All bytes of one tensor."""
    return b"".join(iterate_bytes(checkpoint, tensor))


def iterate_bytes(checkpoint: Checkpoint, tensor: Tensor) -> Iterator[bytes]:
    """The bytes of one tensor in pieces of at most 8 MiB.

    Raises:
        CheckpointError: If the file ends early, because it changed since its header was read.
    """
    with checkpoint.open(tensor.file, tensor.start, tensor.stop) as file:
        remaining = tensor.num_bytes
        while remaining:
            piece = file.read(min(CHUNK_BYTES, remaining))
            if not piece:
                raise CheckpointError(f"{checkpoint.path(tensor.file)} became shorter while it was read")
            remaining -= len(piece)
            yield piece


def read_tiles(checkpoint: Checkpoint, region: Region, num_elements: int = TILE) -> Iterator[bytes]:
    """Yield the bytes of a region in order, in tiles of `num_elements`; the last may be shorter.

    Raises:
        CheckpointError: If the file ends early, because it changed since its header was read.
    """
    num_tile_bytes = num_elements * region.num_element_bytes
    tile = bytearray()
    checkpoint.ensure_all((region.tensor.file, start, start + num_bytes) for start, num_bytes in region.runs())
    with checkpoint.open(region.tensor.file, region.tensor.start, region.tensor.start) as file:
        for start, num_bytes in region.runs():
            file.seek(start)
            while num_bytes:
                piece = file.read(min(num_bytes, num_tile_bytes - len(tile)))
                if not piece:
                    raise CheckpointError(f"{checkpoint.path(region.tensor.file)} became shorter while it was read")
                num_bytes -= len(piece)
                if len(piece) == num_tile_bytes:
                    yield piece
                    continue
                tile += piece
                if len(tile) == num_tile_bytes:
                    yield bytes(tile)
                    tile.clear()
    if tile:
        yield bytes(tile)
