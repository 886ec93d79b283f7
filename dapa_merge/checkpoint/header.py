"""Reads safetensors headers, shard indices and other JSON files without torch, and validates all of them.

Format: https://huggingface.co/docs/safetensors, section "Format": eight bytes little-endian header length, the JSON
header, then the tensors' bytes without holes. Everything that the safetensors library refuses is refused here too, so
JSON is read more strictly than by Python's default. Also refused is ambiguous or deceptive content that no program
writes: duplicate or unprintable names, and keys that are not in the format.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dapa_merge.checkpoint.folder import open_regular, read_regular, refuse_pointer, refuse_stray_link
from dapa_merge.errors import CheckpointError

# Bits, because sub-byte types exist in the format.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
# Names in mergekit's recipes and in torch of the dtypes of unquantized checkpoints.
FLOAT_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
TORCH_NAMES = {dtype: name for name, dtype in FLOAT_NAMES.items()}
# Header bytes of one file, enough for a hundred thousand tensors; the safetensors library reads up to 100 MB. JSON can
# take thirty times its size in memory, and a file of nothing but brackets does.
MAX_HEADER_BYTES = 16_000_000
MAX_CONFIG_BYTES = 8_000_000
# For all files of a model together: 0.2 million tensors, as in the largest mixtures of experts, take 22 MB.
MAX_INDEX_BYTES = 32_000_000
MAX_NAME_LENGTH = 1000
MAX_DIMENSIONS = 64
# Nesting depth of a config, far below what Python can still print in a message.
MAX_DEPTH = 50


@dataclass(frozen=True)
class Tensor:
    """A tensor's type and place on disk.

    Attributes:
        name: Name in the checkpoint.
        file: Name of its file in the checkpoint's folder.
        dtype: As safetensors spells it, e.g. `BF16`.
        shape: Its dimensions.
        start: Offset of its first byte in the file.
        stop: Offset after its last byte.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start

    @property
    def num_parameters(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> list[Tensor]:
    """The tensors of one safetensors file, by position.

    Raises:
        CheckpointError: If the file is missing, truncated, or its header does not describe its bytes exactly.
    """
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            num_header_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or num_header_bytes > size - 8:
                refuse_pointer(path)
                raise CheckpointError(f"{path} is not a safetensors file, or is truncated ({size} bytes)")
            if num_header_bytes > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} has a header of {num_header_bytes / 1e6:.0f} MB, but at most "
                    f"{MAX_HEADER_BYTES / 1e6:.0f} MB are read; save it again in more shards"
                )
            raw = file.read(num_header_bytes)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    try:
        header = _strict_json(raw)
        if not isinstance(header, dict):
            raise ValueError("it is not a JSON object")
        _check_metadata(header.pop("__metadata__", None))
        tensors = [_tensor(path, name, entry, 8 + num_header_bytes) for name, entry in header.items()]
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged safetensors header ({str(error)[:120]})") from error
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    position = 8 + num_header_bytes
    for tensor in tensors:
        if tensor.start != position:
            raise CheckpointError(
                f"{path} has a damaged safetensors header: {tensor.name[:120]!r} is at the wrong offset"
            )
        position = tensor.stop
    if position != size:
        what = "truncated" if size < position else "longer than its header says"
        raise CheckpointError(f"{path} is {what}: the header describes {position} bytes, the file has {size}")
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a weight file that `read_header` accepts, by their keys."""
    with open_regular(path) as file:
        size = int.from_bytes(file.read(8), "little")
        found = json.loads(file.read(min(size, MAX_HEADER_BYTES))).get("__metadata__")
    return dict(found or {})


def _tensor(path: Path, name: str, entry: object, data_start: int) -> Tensor:
    if not name.isprintable() or len(name) > MAX_NAME_LENGTH:
        raise ValueError(f"{name[:60]!r} is not a valid tensor name")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} must have exactly a dtype, a shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"{name} has unknown dtype {dtype!r}")
    if not _are_counts(shape) or not _are_counts(offsets):
        raise ValueError(f"{name} has a shape or offsets that are not counts")
    if len(shape) > MAX_DIMENSIONS or len(offsets) != 2:
        raise ValueError(f"{name} has {len(shape)} dimensions and {len(offsets)} offsets")
    # Also for an empty tensor: its other dimensions must not overflow in programs that count in 64 bits.
    if math.prod(max(size, 1) for size in shape) * DTYPE_BITS[dtype] >= 1 << 64:
        raise ValueError(f"{name} has an impossible shape")
    begin, end = offsets
    if math.prod(shape) * DTYPE_BITS[dtype] != 8 * (end - begin):
        raise ValueError(f"{name} has {end - begin} bytes, which do not fit {dtype} {shape}")
    return Tensor(name, path.name, dtype, tuple(shape), data_start + begin, data_start + end)


def _are_counts(numbers: object) -> bool:
    return isinstance(numbers, list) and all(type(number) is int for number in numbers)


def _check_metadata(metadata: object) -> None:
    """Raise if the safetensors library could not load the metadata, although its content is not used."""
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its __metadata__ does not map strings to strings")
    for text in (*metadata, *metadata.values()):
        text.encode()  # Raises a ValueError for half a surrogate pair.


def _strict_json(raw: bytes) -> object:
    """Parse JSON of objects, lists, strings and counts, without duplicate keys.

    Raises:
        ValueError: If it is anything else, including UTF-16 and JSON with a byte order mark.
        RecursionError: If it is nested too deeply.
    """
    return json.loads(
        raw.decode(), object_pairs_hook=_unique, parse_int=_count, parse_float=_refuse, parse_constant=_refuse
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        numbers = Counter(key for key, _ in pairs)
        raise ValueError(f"{numbers.most_common(1)[0][0][:60]!r} occurs twice")
    return content


def _count(digits: str) -> int:
    # Checked before the conversion, which takes quadratic time in some versions of Python.
    if len(digits) > 20 or not digits.isdigit() or int(digits) >= 1 << 64:
        _refuse(digits)
    return int(digits)


def _refuse(number: str) -> NoReturn:
    raise ValueError(f"{number[:30]} is not a count")


def read_json(
    path: Path,
    *,
    max_bytes: int = MAX_CONFIG_BYTES,
    make_object: Callable[[list[tuple[str, Any]]], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """Read a JSON object from a small file of a model folder.

    Args:
        path: The file.
        max_bytes: Largest accepted size.
        make_object: Makes an object from its keys and values; by default a key's last value counts, as in transformers.

    Raises:
        CheckpointError: If the file is absent, is too large, holds anything else, or is a link out of its folder.
    """
    try:
        refuse_stray_link(path, path.parent)
        content = json.loads(read_regular(path, max_bytes).decode(), object_pairs_hook=make_object)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is not a model folder: it has no {path.name}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        refuse_pointer(path)
        raise CheckpointError(f"{path} is not JSON: {str(error)[:120]}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    level: list[Any] = [content]
    for _ in range(MAX_DEPTH):
        level = [child for node in level if isinstance(node, (dict, list)) for child in _children(node)]
    if level:
        raise CheckpointError(f"{path} has lists or objects {MAX_DEPTH} levels deep, which no such file needs")
    return content


def _children(node: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node


def read_index(path: Path) -> dict[str, str]:
    """Read a shard index: the name of the weight file of each tensor.

    Raises:
        CheckpointError: If it is not an index, or names anything but safetensors files in its own folder.
    """
    owners = read_json(path, max_bytes=MAX_INDEX_BYTES, make_object=_unique).get("weight_map")
    if not isinstance(owners, dict) or not owners or not all(isinstance(shard, str) for shard in owners.values()):
        raise CheckpointError(f"{path} has no weight_map from tensor names to file names")
    for shard in set(owners.values()):
        if Path(shard).name != shard or "\\" in shard or not shard.isprintable() or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{path} names {shard!r}, which is not a safetensors file inside its own folder")
    return owners
