"""Opening a model without torch: a local folder or a snapshot from the Hub, and the bytes of its tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapa_merge.checkpoint.header import Tensor, read_header, read_index, read_json
from dapa_merge.checkpoint.untrusted import open_regular
from dapa_merge.checkpoint.weights import INDEX_NAME as INDEX_NAME
from dapa_merge.checkpoint.weights import Layout, find_weights
from dapa_merge.errors import CheckpointError

if TYPE_CHECKING:
    from dapa_merge.checkpoint.remote.partial import FileRange, PartialWeights

# Chat templates beyond the first lie in a folder of this name.
TEMPLATES = "additional_chat_templates"
CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A model folder whose headers were read and found sound.

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

    def ensure_all(self, ranges: Iterable[FileRange], progress: Callable[[int], None] = lambda _: None) -> None:
        """Make many ranges of bytes of the weight files present here, at once and faster than one by one.

        Args:
            ranges: Weight file, first byte, and the byte after the last; they may overlap.
            progress: Called with numbers of bytes as they are fetched.

        Raises:
            HubError: If they have to be fetched, and the Hub does not give them; what came is kept.
        """
        if self.partial is not None:
            self.partial.ensure(ranges, progress)

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


def open_checkpoint(
    path: str, revision: str | None = None, *, partial: bool = False, allow_pickle: bool = False
) -> Checkpoint:
    """Open a local model folder, or a snapshot of a Hub repository.

    Args:
        path: A folder, or a Hub id; a folder wins.
        revision: Branch, tag or commit on the Hub.
        partial: Of a Hub repository that is not here yet, fetch the headers, and weights only as they are read. Where
            the server has no ranges, everything is fetched all the same.
        allow_pickle: Read weights that there are as pickles only, as nothing but tensors.

    Raises:
        CheckpointError: If the files are not a sound safetensors checkpoint.
        HubError: If it is no folder and the Hub does not give it.
    """
    name = f"{path}@{revision}" if revision else path
    if not os.path.isdir(path):
        return _open_repository(path, revision, name, partial, allow_pickle)
    folder = Path(path)
    checkpoint = Checkpoint(name, folder, _read_config(folder), {}, ())
    layout = find_weights(os.listdir(folder), name)
    if layout.pickled:
        return _read_pickled(checkpoint, layout, allow_pickle)
    return _read(checkpoint, layout)


def _open_repository(repository: str, revision: str | None, name: str, partial: bool, allow_pickle: bool) -> Checkpoint:
    from dapa_merge.checkpoint.converting import pickled
    from dapa_merge.checkpoint.remote.hub import mirror_folder, open_snapshot
    from dapa_merge.checkpoint.remote.partial import PartialWeights
    from dapa_merge.checkpoint.remote.ranges import RangesIgnored

    snapshot = open_snapshot(repository, revision)
    # Before gigabytes are fetched in vain.
    config = _read_config(snapshot.folder)
    layout = find_weights(snapshot.files, name)
    checkpoint = Checkpoint(name, snapshot.folder, config, {}, (), snapshot.commit)
    if layout.pickled:
        if allow_pickle:
            snapshot.fetch(pickled.pickle_files(snapshot.folder, layout))
        return _read_pickled(checkpoint, layout, allow_pickle)
    shards = _shards(checkpoint, layout)
    if partial and snapshot.lacks(shards):
        weights = PartialWeights(repository, snapshot.commit, mirror_folder(repository, snapshot.commit))
        try:
            weights.open_headers(shards)
            return _read(replace(checkpoint, partial=weights), layout)
        except RangesIgnored:
            pass
    snapshot.fetch(shards)
    return _read(checkpoint, layout)


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


def _read_pickled(checkpoint: Checkpoint, layout: Layout, allow_pickle: bool) -> Checkpoint:
    from dapa_merge.checkpoint.converting import pickled

    if not allow_pickle:
        raise pickled.refusal(checkpoint.name)
    folder = pickled.as_safetensors(checkpoint.folder, layout)
    return _read(replace(checkpoint, folder=folder), find_weights(os.listdir(folder), checkpoint.name))


def _read(checkpoint: Checkpoint, layout: Layout) -> Checkpoint:
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
