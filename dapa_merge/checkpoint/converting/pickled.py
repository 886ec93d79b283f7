"""Pickled weights (`pytorch_model.bin`), read as tensors only and kept as safetensors.

A pickle can run code when it is loaded. torch's own reader for weights refuses whatever is no tensor before it is made;
it is used on request only, and once: what it gives is written as safetensors into the user's cache.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapa_merge.checkpoint.converting.derived import derived_folder, link_files, stamps
from dapa_merge.checkpoint.header import read_json
from dapa_merge.checkpoint.weights import INDEX_NAME, SINGLE_NAME, Layout
from dapa_merge.errors import CheckpointError, UsageError, one_line

if TYPE_CHECKING:
    import torch

ALLOW_VARIABLE = "DAPA_ALLOW_PICKLE"
# What other forms of the weights end with: a derived folder has them as safetensors.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".safetensors", ".index.json", ".ckpt", ".h5", ".msgpack", ".gguf")
_WRITTEN_BYTES = 64 << 20
# safetensors' names of the types that torch can store.
_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32", "uint32": "U32",
    "int64": "I64", "uint64": "U64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


def refusal(name: str) -> CheckpointError:
    """What is said of pickles that nobody allowed."""
    return CheckpointError(
        f"{name} has pickled weights only, which can run code when loaded; save it again as safetensors, or have them "
        f"read as nothing but tensors with --allow-pickle (or {ALLOW_VARIABLE}=1)"
    )


def pickle_files(folder: Path, layout: Layout) -> tuple[str, ...]:
    """The names of the pickles, in order.

    Raises:
        CheckpointError: If their index is none, or names anything but pickles of its own folder.
    """
    if layout.index is None:
        return layout.shards
    path = folder / layout.index
    owners = read_json(path).get("weight_map")
    if not isinstance(owners, dict) or not owners or not all(isinstance(file, str) for file in owners.values()):
        raise CheckpointError(f"{path} has no weight_map from tensor names to file names")
    for file in set(owners.values()):
        if Path(file).name != file or "\\" in file or not file.isprintable() or not file.endswith(".bin"):
            raise CheckpointError(f"{path} names {file!r}, which is no pickle file inside its own folder")
    return tuple(sorted(set(owners.values())))


def as_safetensors(folder: Path, layout: Layout) -> Path:
    """The same model as safetensors, in the user's cache: converted once, and again when the pickles change.

    Raises:
        CheckpointError: If a file is no pickle of tensors, or is one that would run code.
        UsageError: If the cache cannot be written.
    """
    pickles = [folder / name for name in pickle_files(folder, layout)]
    try:
        origin = stamps(pickles)
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from error
    made = derived_folder("converted", origin, lambda unfinished: _convert(pickles, unfinished))
    names = [path.name for path in folder.iterdir() if not path.name.endswith(_OTHER_WEIGHTS)]
    link_files(folder, made, names)
    return made


def _convert(pickles: list[Path], folder: Path) -> None:
    needed, free = sum(path.stat().st_size for path in pickles), shutil.disk_usage(folder).free
    if free < needed:
        raise UsageError(
            f"converting pickles needs {needed / 1e9:.2f} GB in {folder}, where {free / 1e9:.2f} GB are left"
        )
    owners: dict[str, str] = {}
    for number, path in enumerate(pickles, 1):
        shard = f"model-{number:05d}-of-{len(pickles):05d}.safetensors" if len(pickles) > 1 else SINGLE_NAME
        tensors = _load(path)
        for name in tensors:
            if name in owners:
                raise CheckpointError(f"{path.parent} holds {name} twice, also in {path.name}; save it again")
            owners[name] = shard
        _write(tensors, folder / shard)
    if len(pickles) > 1:
        (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": owners}), encoding="utf-8")


def _load(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one pickle, mapped rather than read."""
    import torch

    try:
        # The format before torch 1.6 is no archive, and cannot be mapped.
        with path.open("rb") as file:
            is_archive = file.read(2) == b"PK"
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:
        # Damaged archives fail in ways of their own, and so do pickles that hold more than tensors.
        raise CheckpointError(
            f"{path} is no pickle of nothing but tensors, and was not read: {one_line(error)}"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__} where tensors by name were expected")
    for name, tensor in content.items():
        _check(path, name, tensor)
    return content


def _check(path: Path, name: object, tensor: object) -> None:
    import torch

    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise CheckpointError(
            f"{path} holds {str(name)[:120]!r}, a {type(tensor).__name__}, which is no tensor by name"
        )
    if tensor.layout is not torch.strided or _dtype(tensor) not in _DTYPES or tensor.device.type != "cpu":
        raise CheckpointError(
            f"{path} holds {name[:120]!r} as {tensor.dtype} ({tensor.layout}), which cannot be converted"
        )
    if math.prod(tensor.shape) * tensor.element_size() > tensor.untyped_storage().nbytes():
        # A few bytes that stand for many: no weights are stored like that, and a disk would soon be full.
        raise CheckpointError(f"{path} holds {name[:120]!r}, which is larger than the bytes behind it; save it again")


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file, tensor by tensor; what shares memory is written as often as it has names."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        stop = position + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[_dtype(tensor)], "shape": list(tensor.shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            for start in range(0, len(content), _WRITTEN_BYTES):
                file.write(content[start : start + _WRITTEN_BYTES].numpy().data)
