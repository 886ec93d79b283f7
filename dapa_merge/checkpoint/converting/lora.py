"""A LoRA adapter and its base as one model, merged by mergekit's own function, so that both entrances agree.

It needs memory for the whole base, as in mergekit. The merged model is kept in the user's cache.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dapa_merge.checkpoint.converting.derived import derived_folder, link_files, stamps
from dapa_merge.checkpoint.converting.pickled import refusal
from dapa_merge.checkpoint.converting.standard import standard_folder
from dapa_merge.checkpoint.files import TEMPLATES, Checkpoint, open_checkpoint
from dapa_merge.checkpoint.header import read_header, read_json
from dapa_merge.checkpoint.weights import ADAPTER_CONFIG_NAME, ADAPTER_NAMES
from dapa_merge.errors import CheckpointError, one_line

# How the files of a tokenizer begin, or end.
_TOKENIZER_STARTS = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template")
_TOKENIZER_ENDS = (".model", ".tiktoken", ".jinja")
# What peft says, and no more, of an adapter that is for another model.
_ADAPTER_UNUSED = "missing adapter keys"


@dataclass(frozen=True)
class Reference:
    """A model or an adapter: a folder, or a Hub id with an optional revision."""

    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


@dataclass(frozen=True)
class MergeCache:
    """Where a running mergekit keeps what it merges, and the dtype that it merges in; None for the model's own."""

    folder: Path
    dtype: str | None = None


def open_merged(
    base: Reference, adapter: Reference, *, allow_pickle: bool = False, cache: MergeCache | None = None
) -> Checkpoint:
    """Merge an adapter into its base, unless that was done before, and open the result.

    Args:
        base: The model.
        adapter: The adapter.
        allow_pickle: Read weights that there are as pickles only, as nothing but tensors.
        cache: Where mergekit keeps merged models; None for the user's cache folder.

    Raises:
        CheckpointError: If the adapter is none, or does not belong to this base.
        DapaError: If one of them cannot be opened, or the cache not be written.
    """
    adapter_folder, adapter_commit = _open_adapter(adapter, allow_pickle)
    model = open_checkpoint(base.path, base.revision, allow_pickle=allow_pickle)
    names = f"{adapter} into {base}"
    if cache is None:
        origin: Any = [stamps(_files(model.folder)), stamps(_files(adapter_folder)), _versions()]

        def make(folder: Path) -> None:
            with standard_folder(model) as path:
                made = _merge(Reference(str(path)), Reference(str(adapter_folder)), folder / "merging", None, names)
            for file in made.iterdir():
                file.rename(folder / file.name)
            shutil.rmtree(folder / "merging")
            _add_small_files(folder, model.folder, adapter_folder)

    else:
        # By the names in the recipe, which mergekit's names of its folders are made of.
        made = _merge(base, adapter, cache.folder, cache.dtype, names)
        origin = [stamps(_files(made)), stamps(_files(model.folder)), stamps(_files(adapter_folder))]

        def make(folder: Path) -> None:
            link_files(made, folder, [file.name for file in _files(made)])
            _add_small_files(folder, model.folder, adapter_folder)

    opened = open_checkpoint(str(derived_folder("merged", origin, make)))
    return replace(opened, name=f"{base}+{adapter}", merged_from=(model.commit, adapter_commit))


def _open_adapter(adapter: Reference, allow_pickle: bool) -> tuple[Path, str | None]:
    """The adapter's folder, and its commit if it is from the Hub."""
    folder, commit = Path(adapter.path), None
    files = {path.name for path in _files(folder)} if folder.is_dir() else set()
    snapshot = None
    if not folder.is_dir():
        from dapa_merge.checkpoint.remote.hub import open_snapshot

        snapshot = open_snapshot(adapter.path, adapter.revision)
        folder, commit, files = snapshot.folder, snapshot.commit, set(snapshot.files)
    if ADAPTER_CONFIG_NAME not in files:
        raise CheckpointError(f"{adapter} is no LoRA adapter: it has no {ADAPTER_CONFIG_NAME}")
    read_json(folder / ADAPTER_CONFIG_NAME)
    weights = next((name for name in ADAPTER_NAMES if name in files), None)
    if weights is None:
        raise CheckpointError(f"{adapter} is no LoRA adapter: it has no {ADAPTER_NAMES[0]}")
    is_safe = weights.endswith(".safetensors")
    if not is_safe and not allow_pickle:
        raise refusal(str(adapter))
    if snapshot is not None:
        snapshot.fetch([weights])
    if is_safe:
        read_header(folder / weights)
    return folder, commit


def _merge(base: Reference, adapter: Reference, folder: Path, dtype: str | None, names: str) -> Path:
    """Call mergekit, which writes a new folder inside of `folder`, or finds it there."""
    from mergekit.common import ModelPath, ModelReference

    from dapa_merge.evaluate.quiet import quiet_transformers

    reference = ModelReference(
        model=ModelPath(path=base.path, revision=base.revision),
        lora=ModelPath(path=adapter.path, revision=adapter.revision),
    )
    try:
        with warnings.catch_warnings(record=True) as caught, quiet_transformers():
            warnings.simplefilter("always")
            merged = reference.merged(cache_dir=str(folder), trust_remote_code=False, lora_merge_dtype=dtype)
    except Exception as error:
        # Whatever transformers or peft raise; there is no common class.
        raise CheckpointError(f"mergekit cannot merge {names}: {one_line(error)}") from error
    if any(_ADAPTER_UNUSED in str(warning.message) for warning in caught):
        raise CheckpointError(
            f"mergekit cannot merge {names}: the adapter lacks weights that its {ADAPTER_CONFIG_NAME} asks for in this "
            f"base; name the base that it was trained on"
        )
    return Path(merged.model.path)


def _add_small_files(folder: Path, base: Path, adapter: Path) -> None:
    """Give a merged model its tokenizer: the adapter's if it has one, else the base's."""
    own = [path for path in _files(adapter) if _is_of_tokenizer(path.name)]
    has_tokenizer = any(path.name.startswith("tokenizer") for path in own)
    for path in own if has_tokenizer else filter(lambda path: _is_of_tokenizer(path.name), _files(base)):
        shutil.copy(path, folder / path.name)
    templates = (adapter if has_tokenizer else base) / TEMPLATES
    if templates.is_dir():
        shutil.copytree(templates, folder / TEMPLATES)


def _is_of_tokenizer(name: str) -> bool:
    return name.startswith(_TOKENIZER_STARTS) or name.endswith(_TOKENIZER_ENDS)


def _files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def _versions() -> list[str]:
    """What may merge otherwise in another version."""
    from importlib.metadata import version

    return [f"{name} {version(name)}" for name in ("mergekit", "peft", "torch", "transformers")]
