"""Converts pickles, LoRA adapters and odd names to standard safetensors; `open_location` opens any model.

Converted models are kept in the user's cache and then opened like any other folder. A pickle can run code when it is
loaded, so it is read only on request, by torch's weights-only reader, which accepts only tensors.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapa_merge.checkpoint.contents import TEMPLATES, left_behind, parts_of
from dapa_merge.checkpoint.fetch import open_snapshot
from dapa_merge.checkpoint.folder import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_NAMES,
    INDEX_NAME,
    SINGLE_NAME,
    WEIGHTS,
    Layout,
    find_weights,
    refuse_pointer,
    refuse_stray_link,
)
from dapa_merge.checkpoint.header import read_json
from dapa_merge.checkpoint.location import Location
from dapa_merge.checkpoint.open import Checkpoint, find_model, open_checkpoint, pickles_refused, read_tensors
from dapa_merge.errors import CheckpointError, UsageError, one_line
from dapa_merge.files import cache_folder, file_state, held

if TYPE_CHECKING:
    import torch


def derived_folder(kind: str, origin: object, make: Callable[[Path], None]) -> Path:
    """Return the cached folder made from `origin`, making it first if absent; it is always complete.

    Raises:
        UsageError: If the cache cannot be written, or its disk is full.
    """
    key = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_folder(kind) / key
    unfinished = folder.with_name(f"{key}.unfinished")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # The kernel's lock ends with its process, so an unfinished folder found here was abandoned.
        with held(folder.with_name(f"{key}.lock")):
            if not folder.exists():
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                try:
                    make(unfinished)
                    for path in unfinished.rglob("*"):
                        _flush(path)
                except BaseException:
                    shutil.rmtree(unfinished, ignore_errors=True)
                    raise
                unfinished.rename(folder)
    except OSError as error:
        raise UsageError(f"cannot write {folder}, in the cache folder: {error.strerror}") from error
    return folder


def link_files(origin: Path, folder: Path, names: Iterable[str]) -> None:
    """Link the weights among the named files of `origin` into a derived folder, and copy the others.

    Dangling links in the folder are removed. Names are paths within `origin`.

    Raises:
        CheckpointError: If a file to be copied is a link out of `origin`.
    """
    for path in folder.iterdir():
        if path.is_symlink() and not path.exists():
            path.unlink(missing_ok=True)
    for name in names:
        is_weight = name.endswith(".safetensors")
        if not is_weight:
            refuse_stray_link(origin / name, origin)
        elif _link(origin / name, folder / name):
            continue
        # Under a temporary name first: another process may be reading the current file.
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        copy = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        shutil.copy(origin / name, copy)
        copy.replace(path)


def _link(origin: Path, path: Path) -> bool:
    try:
        os.symlink(origin.absolute(), path)
    except FileExistsError:
        return True
    except OSError:  # Windows gives links to administrators only.
        return False
    return True


def stamps(paths: Iterable[Path]) -> list[tuple[str, list[int]]]:
    """Paths and states of files, which change when the files do."""
    return [(str(path.absolute()), file_state(path)) for path in paths]


def _flush(path: Path) -> None:
    """Flush a file to disk, so that a power cut cannot leave an incomplete folder under its final name."""
    if path.is_file() and not path.is_symlink():
        with path.open("r+b") as file:
            os.fsync(file.fileno())


def open_model(
    path: str, revision: str | None = None, *, partial: bool = False, allow_pickle: bool = False
) -> Checkpoint:
    """Open a model like `open_checkpoint`, including one that has only pickles.

    Args:
        path: A folder, or a Hub id; a folder wins.
        revision: Branch, tag or commit on the Hub.
        partial: If a Hub model is not cached, fetch its safetensors only as they are read.
        allow_pickle: Read weights that exist only as pickles, accepting only tensors.

    Raises:
        CheckpointError: If the files are not a valid checkpoint, or are pickles without `allow_pickle`.
        HubError: If it is not a folder and cannot be fetched from the Hub.
    """
    found = find_model(path, revision)
    if not found.layout.pickled:
        return found.read(partial=partial)
    checkpoint = found.checkpoint
    if not allow_pickle:
        raise pickles_refused(checkpoint.name)
    if found.snapshot is not None:
        found.snapshot.fetch(pickle_files(found.snapshot.folder, found.layout))
    folder = as_safetensors(checkpoint.folder, found.layout)
    return read_tensors(replace(checkpoint, folder=folder), find_weights(os.listdir(folder), checkpoint.name))


def open_location(location: Location, *, partial: bool = False, allow_pickle: bool = False) -> Checkpoint:
    """Open the checkpoint that a recipe or a command names, with its adapter merged in if it has one."""
    if location.adapter is None:
        return open_model(location.path, location.revision, partial=partial, allow_pickle=allow_pickle)
    base = replace(location, adapter=None)
    return open_merged(base, location.adapter, allow_pickle=allow_pickle)


# Prefixes and suffixes of tokenizer file names.
_TOKENIZER_STARTS = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template")
_TOKENIZER_ENDS = (".model", ".tiktoken", ".jinja")
# Settings that make the sum another one, and what they do.
_REFUSED = {
    "layer_replication": "repeats layers of its base",
    "megatron_config": "is split over devices by Megatron",
    "alora_invocation_tokens": "acts only after certain tokens (aLoRA)",
    "arrow_config": "chooses among adapters for each token (Arrow)",
    "use_bdlora": "has block-diagonal factors (BD-LoRA)",
    "use_qalora": "is for quantized groups of inputs (QALoRA)",
    "velora_config": "is a VeLoRA",
    "monteclora_config": "samples its factors (MonteCLoRA)",
    "kasa_config": "cuts singular values out of its base (KaSA)",
}
# How factors may start without changing the base. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) subtract from it.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Settings that are followed, or that change nothing in a merge. Others may be of a newer peft.
_KNOWN = (
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "target_parameters", "task_type", "trainable_token_indices",
    "use_dora", "use_rslora",
)  # fmt: skip
# The types of settings that are not single numbers or words.
_KINDS: dict[str, tuple[object, ...]] = {
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "target_modules": (str, [str]),
    "exclude_modules": (str, [str]),
    "modules_to_save": ([str],),
    "target_parameters": ([str],),
    "layers_to_transform": (int, [int]),
    "layers_pattern": (str, [str]),
}
# Changed whenever the same adapter would be merged to other values.
_MERGE_VERSION = 1


def open_merged(base: Location, adapter: Location, *, allow_pickle: bool = False) -> Checkpoint:
    """Merge an adapter into its base, unless that was done before, and open the result.

    Its files are the base's, except weights that the adapter changes, and the tokenizer if the adapter has its own.

    Args:
        base: The model.
        adapter: The adapter.
        allow_pickle: Read weights that exist only as pickles, accepting only tensors.

    Raises:
        CheckpointError: If `adapter` is not a LoRA adapter, or cannot be merged exactly into this base.
        DapaError: If either cannot be opened, or the cache cannot be written.
    """
    adapter_folder, weights, adapter_commit = _open_adapter(adapter, allow_pickle)
    config = read_json(adapter_folder / ADAPTER_CONFIG_NAME)
    _check_adapter(config, str(adapter))
    model = open_model(base.path, base.revision, allow_pickle=allow_pickle)

    def make(folder: Path) -> None:
        # torch is slow to import, and only an adapter needs it here.
        from dapa_merge.checkpoint.adapter import Merge

        merge = Merge(model, config, weights, str(adapter))
        _check_space(f"merging {adapter}", (model.path(shard) for shard in merge.shards), folder)
        merge.write(folder)
        _add_other_files(model, adapter_folder, folder, merge.shards)

    origin = [_MERGE_VERSION, stamps(_files(model.folder)), stamps(_files(adapter_folder))]
    opened = open_checkpoint(str(derived_folder("merged", origin, make)))
    return replace(opened, name=f"{base}+{adapter}", merged_from=(model.commit, adapter_commit))


def _open_adapter(adapter: Location, allow_pickle: bool) -> tuple[Path, Path, str | None]:
    """The adapter's folder, its weights as safetensors, and its commit if it is from the Hub."""
    folder, commit = Path(adapter.path), None
    files = {path.name for path in _files(folder)} if folder.is_dir() else set()
    snapshot = None
    if not folder.is_dir():
        snapshot = open_snapshot(adapter.path, adapter.revision)
        folder, commit, files = snapshot.folder, snapshot.commit, set(snapshot.files)
    if ADAPTER_CONFIG_NAME not in files:
        raise CheckpointError(f"{adapter} is not a LoRA adapter: it has no {ADAPTER_CONFIG_NAME}")
    weights = next((name for name in ADAPTER_NAMES if name in files), None)
    if weights is None:
        raise CheckpointError(f"{adapter} is not a LoRA adapter: it has no {ADAPTER_NAMES[0]}")
    is_safe = weights.endswith(".safetensors")
    if not is_safe and not allow_pickle:
        raise pickles_refused(str(adapter))
    if snapshot is not None:
        snapshot.fetch([weights])
    path = folder / weights
    if not is_safe:
        converted = derived_folder("converted", stamps([path]), lambda to: _write(_load(path), to / ADAPTER_NAMES[0]))
        path = converted / ADAPTER_NAMES[0]
    return folder, path, commit


def _check_adapter(config: Mapping[str, Any], name: str) -> None:
    """Refuse an adapter that is not a LoRA, or a variant whose result is not a sum of base and factors."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"the adapter {name} is not a LoRA: peft_type in its {ADAPTER_CONFIG_NAME} is {kind!r}; only LORA can be "
            f"merged exactly; merge it with peft, and name the merged model"
        )
    for key, what in _REFUSED.items():
        if config.get(key):
            raise CheckpointError(
                f"the adapter {name} cannot be merged: by {key} in its {ADAPTER_CONFIG_NAME} it {what}"
            )
    if unknown := [key for key, value in config.items() if value and key not in (*_KNOWN, *_REFUSED)]:
        raise CheckpointError(
            f"the adapter {name} cannot be merged: {unknown[0][:60]!r} in its {ADAPTER_CONFIG_NAME} is not a known "
            f"setting of LoRA; merge it with peft, and name the merged model"
        )
    start = config.get("init_lora_weights", True)
    if not any(start is known or (isinstance(start, str) and start == known) for known in _STARTS):
        raise CheckpointError(
            f"the adapter {name} cannot be merged: by init_lora_weights in its {ADAPTER_CONFIG_NAME}, {start!r}, it "
            f"was trained on a changed base; convert it with peft's path_initial_model_for_weight_conversion"
        )
    for key, kinds in _KINDS.items():
        value = config.get(key)
        if value and not any(_is_of(kind, value) for kind in kinds):
            raise CheckpointError(
                f"{key} in {ADAPTER_CONFIG_NAME} of {name} is {str(value)[:60]!r}, which peft never writes"
            )


def _is_of(kind: object, value: object) -> bool:
    """Whether a value is of a type, or a list of such values if the type is in a list."""
    if isinstance(kind, list):
        return isinstance(value, list) and all(type(item) is kind[0] for item in value)
    return type(value) is kind


def _add_other_files(base: Checkpoint, adapter: Path, folder: Path, written: Collection[str]) -> None:
    """Complete a merged model: the base's other files, and the tokenizer of the adapter if it has one."""
    index = find_weights(os.listdir(base.folder), base.name).index
    names = {*parts_of(base.folder), *base.shards, *filter(None, [index])} - set(written)
    own = set(filter(_is_of_tokenizer, parts_of(adapter)))
    if any(name.startswith("tokenizer") for name in own):
        names = set(itertools.filterfalse(_is_of_tokenizer, names))
        link_files(adapter, folder, sorted(own))
    link_files(base.folder, folder, sorted(names))


def _is_of_tokenizer(name: str) -> bool:
    return name.startswith(_TOKENIZER_STARTS) or name.endswith(_TOKENIZER_ENDS)


def _files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in (*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*")) if path.is_file())


_WRITTEN_BYTES = 64 << 20
# safetensors' names of the types that torch can store.
_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32", "uint32": "U32",
    "int64": "I64", "uint64": "U64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


def pickle_files(folder: Path, layout: Layout) -> tuple[str, ...]:
    """The names of the pickles, in order.

    Raises:
        CheckpointError: If their index is invalid, or names anything but pickles in its own folder.
    """
    if layout.index is None:
        return layout.shards
    path = folder / layout.index
    owners = read_json(path).get("weight_map")
    if not isinstance(owners, dict) or not owners or not all(isinstance(file, str) for file in owners.values()):
        raise CheckpointError(f"{path} has no weight_map from tensor names to file names")
    for file in set(owners.values()):
        if Path(file).name != file or "\\" in file or not file.isprintable() or not file.endswith(".bin"):
            raise CheckpointError(f"{path} names {file!r}, which is not a pickle file inside its own folder")
    return tuple(sorted(set(owners.values())))


def as_safetensors(folder: Path, layout: Layout) -> Path:
    """Convert a model to safetensors in the user's cache, once, and again when the pickles change.

    Raises:
        CheckpointError: If a file is not a pickle of tensors, or would run code.
        UsageError: If the cache cannot be written.
    """
    pickles = [folder / name for name in pickle_files(folder, layout)]
    try:
        origin = stamps(pickles)
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from error
    made = derived_folder("converted", origin, lambda unfinished: _convert(pickles, unfinished))
    names = parts_of(folder)
    for path in made.rglob("*"):
        # What the model had when its pickles were converted, and has no longer; hidden are copies of another process.
        name = path.relative_to(made).as_posix()
        is_own = name in names or name == INDEX_NAME or name.endswith(".safetensors")
        if not (is_own or path.is_dir() or path.name.startswith(".")):
            path.unlink(missing_ok=True)
    link_files(folder, made, names)
    return made


def _convert(pickles: list[Path], folder: Path) -> None:
    _check_space("converting pickles", pickles, folder)
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


def _check_space(what: str, files: Iterable[Path], folder: Path) -> None:
    """Raise `UsageError` if a disk does not have as many bytes left as some files have."""
    needed, free = sum(path.stat().st_size for path in files), shutil.disk_usage(folder).free
    if free < needed:
        raise UsageError(f"{what} needs {needed / 1e9:.2f} GB in {folder}, where {free / 1e9:.2f} GB are left")


def _load(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one pickle, memory-mapped if possible."""
    import torch

    try:
        refuse_pointer(path)
        # The format before torch 1.6 is not an archive and cannot be memory-mapped.
        with path.open("rb") as file:
            is_archive = file.read(2) == b"PK"
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except CheckpointError:
        raise
    except Exception as error:
        # Damaged archives and pickles that hold more than tensors raise many kinds of errors.
        raise CheckpointError(
            f"{path} holds more than tensors, or is damaged, and was not read: {one_line(error)}"
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
            f"{path} holds {str(name)[:120]!r}, a {type(tensor).__name__}, which is not a named tensor"
        )
    if tensor.layout is not torch.strided or _dtype(tensor) not in _DTYPES or tensor.device.type != "cpu":
        raise CheckpointError(
            f"{path} holds {name[:120]!r} as {tensor.dtype} ({tensor.layout}), which cannot be converted"
        )
    if math.prod(tensor.shape) * tensor.element_size() > tensor.untyped_storage().nbytes():
        # A few bytes expanded to a large tensor: weights are not stored like that, and it could fill the disk.
        raise CheckpointError(f"{path} holds {name[:120]!r}, which is larger than the bytes behind it; save it again")


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file, tensor by tensor; tensors that share memory are each written in full."""
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


@contextmanager
def standard_folder(checkpoint: Checkpoint) -> Iterator[Path]:
    """Yields the checkpoint's folder, or a temporary one of links to those of its files that make the model.

    Links are needed if the weights have neither an index nor the name `model.safetensors`, or if other weights or
    settings lie beside them: what is loaded is what a result holds.

    Raises:
        CheckpointError: If links cannot be made.
    """
    folder = checkpoint.folder
    own = {*parts_of(folder), *checkpoint.shards}
    has_standard_names = (folder / INDEX_NAME).is_file() or (folder / SINGLE_NAME).is_file()
    if has_standard_names and not any(name.endswith((*WEIGHTS, ".json")) for name in left_behind(folder, own)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="dapa-merge-") as temporary:
        try:
            for name in {name.partition("/")[0] for name in own}:
                os.symlink((folder / name).absolute(), Path(temporary, name))
        except OSError as error:
            if has_standard_names:
                yield folder
                return
            raise CheckpointError(
                f"{checkpoint.name} has neither {SINGLE_NAME} nor {INDEX_NAME}, and links to its files cannot be made "
                f"({error.strerror}); give its weights one of these names"
            ) from error
        if not has_standard_names:
            index = {"metadata": {}, "weight_map": {name: tensor.file for name, tensor in checkpoint.tensors.items()}}
            Path(temporary, INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
        yield Path(temporary)
