"""What a model is where it comes from: its commit, and the SHA-256 of every file that a repair reads or copies."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapa_merge.checkpoint.converting.pickled import pickle_files
from dapa_merge.checkpoint.digest import is_settings
from dapa_merge.checkpoint.files import TEMPLATES
from dapa_merge.checkpoint.header import read_index
from dapa_merge.checkpoint.streams import hash_file
from dapa_merge.checkpoint.weights import ADAPTER_CONFIG_NAME, ADAPTER_NAMES, find_weights
from dapa_merge.errors import CheckpointError, HubError
from dapa_merge.hub.client import api, ask, is_id
from dapa_merge.recipe import Location

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Upstream:
    """A model, or an adapter, as it is or was at one time.

    Attributes:
        model: A Hub id, or a folder as the recipe names it.
        revision: The branch, tag or commit that was asked for; None for the default branch.
        commit: The commit on the Hub that this was; None for a folder.
        files: The SHA-256 of its weight, config and tokenizer files, by their paths in it.
    """

    model: str
    revision: str | None
    commit: str | None
    files: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.model}@{self.revision}" if self.revision else self.model


@dataclass(frozen=True)
class Movement:
    """How a model differs from what it was.

    Attributes:
        before: What it was.
        commit: Its commit now; None for a folder.
        changed: Files that have another content.
        added: Files that it did not have.
        removed: Files that it has no more.
    """

    before: Upstream
    commit: str | None
    changed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    @property
    def matters(self) -> bool:
        """Whether a repair of it may come out otherwise; a new commit alone, as of a card, does not matter."""
        return bool(self.changed or self.added or self.removed)


def parts(location: Location) -> list[Location]:
    """A model and its LoRA adapter, if it has one, each alone."""
    model = Location(location.path, location.revision)
    return [model] if location.adapter is None else [model, *parts(location.adapter)]


def named_parts(role: str, location: Location) -> list[tuple[str, Location]]:
    """The same, each with what it is in a recipe."""
    return list(zip((role, f"{role}'s adapter"), parts(location), strict=False))


def look_at(location: Location, progress: Progress = lambda _: None) -> Upstream:
    """What a model or an adapter, without another adapter on it, is now.

    Args:
        location: A folder or a Hub id.
        progress: Called with numbers of bytes as files of a folder are read.

    Raises:
        CheckpointError: If there are no weights.
        HubError: If it is no folder and the Hub does not tell.
    """
    if os.path.isdir(location.path):
        return Upstream(location.path, location.revision, None, _of_folder(Path(location.path), progress))
    info = _info(location, files=True)
    files = _of_repository(location.path, str(info.sha), {file.rfilename: file for file in info.siblings or ()})
    return Upstream(location.path, location.revision, str(info.sha), files)


def movement(before: Upstream, location: Location, progress: Progress = lambda _: None) -> Movement:
    """How a model at a location differs from what it was; of one on the Hub whose commit is the same, nothing is read.

    Raises:
        CheckpointError: If there are no weights any more.
        HubError: If it is no folder and the Hub does not tell.
    """
    if before.commit is not None and not os.path.isdir(location.path):
        sha = str(_info(location, files=False).sha)
        if sha == before.commit:
            return Movement(before, sha)
    now = look_at(location, progress)
    return difference(before, now)


def difference(before: Upstream, now: Upstream) -> Movement:
    """Which files differ between two times."""
    both = before.files.keys() & now.files.keys()
    return Movement(
        before,
        now.commit,
        changed=tuple(sorted(name for name in both if before.files[name] != now.files[name])),
        added=tuple(sorted(now.files.keys() - before.files.keys())),
        removed=tuple(sorted(before.files.keys() - now.files.keys())),
    )


def num_bytes(location: Location) -> int:
    """How much there is to read of a model in a folder to know it; 0 on the Hub."""
    folder = Path(location.path)
    return sum((folder / name).stat().st_size for name in _names_in(folder)) if folder.is_dir() else 0


def _names_in(folder: Path) -> list[str]:
    templates = [f"{TEMPLATES}/{path.name}" for path in folder.glob(f"{TEMPLATES}/*.jinja")]
    return _chosen([*os.listdir(folder), *templates], str(folder), lambda name: folder / name)


def _of_folder(folder: Path, progress: Progress) -> dict[str, str]:
    names = _names_in(folder)
    # Reading and hashing both let other threads run.
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return dict(zip(names, pool.map(lambda name: _digest(folder / name, progress), names), strict=True))


def _digest(path: Path, progress: Progress = lambda _: None) -> str:
    try:
        return hash_file(path, progress=progress).sha256
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def _of_repository(repository: str, commit: str, files: Mapping[str, Any]) -> dict[str, str]:
    """The Hub knows the SHA-256 of large files; small ones are fetched."""

    def fetched(name: str) -> Path:
        from huggingface_hub import hf_hub_download

        what = f"get {name} of {repository}"
        return Path(ask(what, lambda: hf_hub_download(repository, name, revision=commit)))

    def sha256(name: str) -> str:
        lfs = files[name].lfs
        return str(lfs.sha256) if lfs is not None else _digest(fetched(name))

    names = _chosen(list(files), f"{repository}@{commit}", fetched)
    if missing := [name for name in names if name not in files]:
        raise HubError(f"{repository}@{commit} has no {missing[0]}, which its index names; ask its owner to mend it")
    return {name: sha256(name) for name in names}


def _chosen(names: Collection[str], model: str, fetch: Callable[[str], Path]) -> list[str]:
    """Which of a model's files decide what a repair of it is: weights, config, tokenizer and chat templates."""
    top = [name for name in names if "/" not in name]
    chosen = {name for name in top if _decides(name)}
    chosen |= {name for name in names if name.startswith(f"{TEMPLATES}/") and name.endswith(".jinja")}
    if ADAPTER_CONFIG_NAME in top:
        return sorted(chosen | {name for name in ADAPTER_NAMES if name in top})
    layout = find_weights(top, model)
    if layout.index is None:
        return sorted(chosen | set(layout.shards))
    path = fetch(layout.index)
    shards = pickle_files(path.parent, layout) if layout.pickled else tuple(read_index(path).values())
    return sorted(chosen | {layout.index, *shards})


def _decides(name: str) -> bool:
    """Whether a file is config, tokenizer or code; of plain texts, only vocabularies are."""
    if name.endswith(".txt"):
        return name.startswith(("vocab", "merges"))
    return is_settings(name) or name.endswith(".py")


def _info(location: Location, *, files: bool) -> Any:
    if not is_id(location.path):
        raise CheckpointError(
            f"{location.path} is no folder here and no id on the Hub; relative paths start at the folder you are in"
        )
    what = f"ask the Hub about {location}"
    return ask(what, lambda: api().model_info(location.path, revision=location.revision, files_metadata=files))
