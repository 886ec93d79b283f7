"""Opening a model without torch: a local folder or a snapshot from the Hub, and the bytes of its tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapa_merge.checkpoint.folder import Layout, find_weights, open_regular
from dapa_merge.checkpoint.header import Tensor, read_header, read_index, read_json
from dapa_merge.errors import CheckpointError

if TYPE_CHECKING:
    from dapa_merge.checkpoint.fetch import FileRange, PartialWeights, Snapshot

# Chat templates beyond the first lie in a folder of this name.
TEMPLATES = "additional_chat_templates"
CHUNK_BYTES = 8 << 20
ALLOW_VARIABLE = "DAPA_ALLOW_PICKLE"


@dataclass(frozen=True)
class Checkpoint:
    """A model folder whose headers were read and found valid.

    Attributes:
        name: What the user called it: a path or a Hub id, with the revision if one was given.
        folder: Where its files are; for pickles, a folder in the user's cache that has them as safetensors.
        config: `config.json`.
        tensors: Every tensor by name, in the order of the files.
        shards: The weight files, in order.
        commit: The commit on the Hub that the folder is a snapshot of; None for a local folder.
        merged_from: The commits of base and adapter, where it is a LoRA merged into its base; None for those that are
            local folders.
        partial: Weights on the Hub that are fetched as they are read, and lie elsewhere than in the folder; None if all
            weights are in the folder.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    shards: tuple[str, ...]
    commit: str | None = None
    merged_from: tuple[str | None, str | None] | None = None
    partial: PartialWeights | None = field(default=None, compare=False, repr=False)

    def path(self, shard: str) -> Path:
        """Where a weight file is; of a partial one, bytes must not be read before `ensure`."""
        return (self.folder if self.partial is None else self.partial.folder) / shard

    def open(self, shard: str, start: int = 0, stop: int | None = None) -> BufferedReader:
        """Open one weight file at `start`, for reading only, and to be read no further than to `stop`.

        Raises:
            CheckpointError: If it is gone or unreadable.
            HubError: If the bytes have to be fetched, and the Hub does not give them.
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
        """Make the bytes of a weight file from `start` to before `stop` present here.

        Raises:
            HubError: If they have to be fetched, and the Hub does not give them; what came is kept.
        """
        self.ensure_all([(shard, start, stop)])

    def ensure_all(self, ranges: Iterable[FileRange]) -> None:
        """Make many ranges of bytes of the weight files present here, at once and faster than one by one.

        Args:
            ranges: Weight file, first byte, and the byte after the last; they may overlap.

        Raises:
            HubError: If they have to be fetched, and the Hub does not give them; what came is kept.
        """
        if self.partial is not None:
            self.partial.ensure(ranges)

    def num_missing(self, ranges: Iterable[FileRange]) -> int:
        """How many bytes of these ranges have to be fetched."""
        return 0 if self.partial is None else sum(stop - start for _, start, stop in self.partial.missing(ranges))

    def whole(self) -> Checkpoint:
        """The same checkpoint with all its weights in its folder.

        Raises:
            HubError: If they have to be fetched, and the Hub does not give them.
        """
        if self.partial is None:
            return self
        return replace(open_checkpoint(self.partial.repository, self.partial.commit), name=self.name)

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
    """A model whose weight files are named but not yet read."""

    checkpoint: Checkpoint
    layout: Layout
    snapshot: Snapshot | None

    def read(self, *, partial: bool = False) -> Checkpoint:
        """Read the headers of the safetensors; weights on the Hub are fetched now, or as they are read if `partial`."""
        checkpoint, layout, snapshot = self.checkpoint, self.layout, self.snapshot
        if snapshot is None:
            return read_tensors(checkpoint, layout)
        # huggingface_hub is slow to import, and a local model does not need it.
        from dapa_merge.checkpoint.fetch import PartialWeights, RangesIgnored, mirror_folder

        shards = _shards(checkpoint, layout)
        if partial and snapshot.lacks(shards):
            weights = PartialWeights(
                snapshot.repository, snapshot.commit, mirror_folder(snapshot.repository, snapshot.commit)
            )
            try:
                weights.open_headers(shards)
                return read_tensors(replace(checkpoint, partial=weights), layout)
            except RangesIgnored:
                pass
        snapshot.fetch(shards)
        return read_tensors(checkpoint, layout)


def find_model(path: str, revision: str | None = None) -> FoundModel:
    """Look for a model's config and weight files in a local folder or a Hub repository; a folder wins.

    Raises:
        CheckpointError: If it has no weights of a known form.
        HubError: If it is not a folder and the Hub does not give it.
    """
    name = f"{path}@{revision}" if revision else path
    if os.path.isdir(path):
        folder = Path(path)
        checkpoint = Checkpoint(name, folder, _read_config(folder), {}, ())
        return FoundModel(checkpoint, find_weights(os.listdir(folder), name), None)
    # huggingface_hub is slow to import, and a local model does not need it.
    from dapa_merge.checkpoint.fetch import open_snapshot

    snapshot = open_snapshot(path, revision)
    # Before gigabytes are fetched in vain.
    config = _read_config(snapshot.folder)
    layout = find_weights(snapshot.files, name)
    return FoundModel(Checkpoint(name, snapshot.folder, config, {}, (), snapshot.commit), layout, snapshot)


def open_checkpoint(path: str, revision: str | None = None, *, partial: bool = False) -> Checkpoint:
    """Open the safetensors of a local model folder, or of a snapshot of a Hub repository.

    `checkpoint.convert.open_model` also opens models that have pickles only.

    Args:
        path: A folder, or a Hub id; a folder wins.
        revision: Branch, tag or commit on the Hub.
        partial: Of a Hub repository that is not here yet, fetch the headers, and weights only as they are read. Where
            the server has no ranges, everything is fetched all the same.

    Raises:
        CheckpointError: If the files are not a valid safetensors checkpoint.
        HubError: If it is not a folder and the Hub does not give it.
    """
    found = find_model(path, revision)
    if found.layout.pickled:
        raise pickles_refused(found.checkpoint.name)
    return found.read(partial=partial)


def pickles_refused(name: str) -> CheckpointError:
    """The error for pickles that nobody allowed."""
    return CheckpointError(
        f"{name} has pickled weights only, which can run code when loaded; save it again as safetensors, or have them "
        f"read as nothing but tensors with --allow-pickle (or {ALLOW_VARIABLE}=1)"
    )


def _read_config(folder: Path) -> dict[str, Any]:
    """`config.json`; or what Mistral AI's `params.json` says of the layers, for weights in its own form."""
    params = folder / "params.json"
    if (folder / "config.json").exists() or not params.is_file():
        return read_json(folder / "config.json")
    # mergekit and transformers know no class of this name, so that the layers are read off the tensors' names.
    config: dict[str, Any] = {"architectures": ["MistralConsolidated"]}
    if (num_layers := read_json(params).get("n_layers")) is not None:
        config["num_hidden_layers"] = num_layers
    return config


def _shards(checkpoint: Checkpoint, layout: Layout) -> tuple[str, ...]:
    if layout.index is None:
        return layout.shards
    return tuple(sorted(set(read_index(checkpoint.folder / layout.index).values())))


def read_tensors(checkpoint: Checkpoint, layout: Layout) -> Checkpoint:
    """The checkpoint with its tensors, from the headers of its weight files."""
    name, shards = checkpoint.name, _shards(checkpoint, layout)
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        for tensor in read_header(checkpoint.path(shard)):
            if tensor.name in tensors:
                # transformers loads the last of the two, others ask the index: it would not be one model.
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
