"""`recipe.lock.yml`: the models and the selection of a run, so the run can be repeated exactly.

It is written next to the recipe and into the result, with the commit of each model and the SHA-256 of every file that a
repair reads or copies. `run --locked` uses it, and `outdated` compares it with the current state of the models. The Hub
states the SHA-256 of a large file, so that needs no download, as it would with a faster algorithm's digests.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, TypeAdapter

from dapa_merge.checkpoint.contents import TEMPLATES, is_settings
from dapa_merge.checkpoint.convert import pickle_files
from dapa_merge.checkpoint.digest import hash_file
from dapa_merge.checkpoint.folder import ADAPTER_CONFIG_NAME, ADAPTER_NAMES, find_weights, is_clutter, read_regular
from dapa_merge.checkpoint.header import read_index
from dapa_merge.checkpoint.location import Location, is_path
from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.checkpoint.units import Unit
from dapa_merge.errors import CheckpointError, DapaError, HubError, RecipeError, UsageError
from dapa_merge.files import replace_file
from dapa_merge.hub_client import api, ask, download, is_id, no_folder
from dapa_merge.plan.edit import MODELS
from dapa_merge.plan.ladder import Ladder
from dapa_merge.plan.plan import Plan
from dapa_merge.plan.selection import given_selection, models_of
from dapa_merge.progress import LOG, task
from dapa_merge.recipe.parameters import parse_layers
from dapa_merge.recipe.parse import read_yaml
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.report.report import Report

FORMAT = 1
# The lock's name in a result, where the recipe has a different name.
LOCK_NAME = "recipe.lock.yml"
# The lock of a model with a thousand shards takes about 150 kB.
MAX_BYTES = 1 << 20
HEAD = (
    "# Models and selection of the last run of the recipe. Written by dapa-merge run; `run --locked` uses them,\n"
    "# and `outdated` compares them with the models' current state. Keep this file with the recipe.\n"
)


Text = Annotated[str, Field(strict=True)]
Sha256 = Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{64}$")]
Commit = Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{40}$")]


@dataclass(frozen=True)
class Upstream:
    """The state of a model or adapter at one time.

    Attributes:
        model: A Hub id, or a folder as the recipe names it.
        revision: The requested branch, tag or commit; None for the default branch.
        commit: Its commit on the Hub; None for a folder.
        files: SHA-256 of its weight, config and tokenizer files, by relative path.
    """

    model: Text
    revision: Text | None
    commit: Commit | None
    files: Mapping[Text, Sha256]

    def __str__(self) -> str:
        return f"{self.model}@{self.revision}" if self.revision else self.model


@dataclass(frozen=True)
class Lock:
    """The models and the selection that a recipe was run with.

    Attributes:
        recipe: SHA-256 of the recipe's content, whatever its formatting.
        target: The target, followed by its adapter if it has one; `source` and `pretrained` likewise.
        units: The transplanted units, as `3.gate`.
        versions: Versions of the packages used, by name.
        pretrained: Empty if the edit does not read the pretrained model.
        edit: The edit that repaired, if the recipe's is `auto`; else empty.
    """

    recipe: Sha256
    target: tuple[Upstream, ...]
    source: tuple[Upstream, ...]
    units: tuple[Text, ...]
    versions: Mapping[Text, Text]
    pretrained: tuple[Upstream, ...] = ()
    edit: Text = ""

    def of(self, model: str) -> tuple[Upstream, ...]:
        """A locked model and its adapter, by the model's role in the recipe."""
        locked: tuple[Upstream, ...] = getattr(self, model)
        return locked

    def with_result(self, report: Report) -> Lock:
        """A copy with the selection of a run."""
        edit = report.rungs[-1].edit if report.rungs else self.edit
        return replace(self, units=tuple(report.units), edit=edit)


def lock_path(recipe: Path) -> Path:
    """The path of a recipe's lock: `name.lock.yml` next to `name.yml`."""
    return recipe.with_name(f"{recipe.stem}.lock.yml")


def recipe_digest(recipe: Recipe) -> str:
    """SHA-256 of a recipe's content, ignoring comments and the order of keys."""
    # Defaults are left out, so a parameter added by a later version does not change the digest.
    said = {
        item.name: value
        for item in fields(recipe)
        if not item.name.startswith("_") and (value := getattr(recipe, item.name)) != item.default
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=_as_plain).encode()).hexdigest()


def _as_plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def versions() -> dict[str, str]:
    """Versions of the packages that affect the result."""
    return {name: version(name) for name in ("dapa-merge", "mergekit", "safetensors", "torch", "transformers")}


def make_lock(recipe: Recipe) -> Lock:
    """Lock the models of a recipe as they are now, without a selection yet.

    Raises:
        DapaError: If a model cannot be read, or the Hub does not answer.
    """
    parts = {name: base_and_adapter(location) for name, location in models_of(recipe).items()}
    with task("locking", sum(num_bytes(part) for of_model in parts.values() for part in of_model), "bytes"):
        models: dict[str, Any] = {name: tuple(map(upstream_of, of_model)) for name, of_model in parts.items()}
    return Lock(recipe_digest(recipe), **models, units=(), versions=versions())


def locked_recipe(recipe: Recipe, path: Path) -> tuple[Recipe, Lock]:
    """Return a recipe with its models pinned to their locked commits, and the lock.

    Raises:
        UsageError: If the recipe was never locked.
        RecipeError: If the recipe changed since.
        CheckpointError: If a model changed since.
        HubError: If a locked commit is no longer available, or the Hub does not answer.
    """
    lock = read_lock(lock_path(path))
    if lock is None:
        raise UsageError(f"{lock_path(path)} does not exist; run the recipe without --locked to write it")
    recipe = pin(recipe, lock)
    now = make_lock(recipe)
    pairs = (pair for name in models_of(recipe) for pair in zip(lock.of(name), now.of(name), strict=True))
    for before, after in pairs:
        moved = changed_files(before, after)
        if moved.matters:
            raise CheckpointError(
                f"{before} changed since it was locked: {moved.changes}; restore it, or run without --locked"
            )
    for package, number in now.versions.items():
        if lock.versions.get(package) != number:
            LOG.info(f"note: locked with {package} {lock.versions.get(package)}, now running {number}")
    return recipe, lock


def write_lock(lock: Lock, recipe: Path) -> None:
    """Write a lock next to its recipe; if that fails, the result still has it."""
    path = lock_path(recipe)
    try:
        replace_file(path, lock_text(lock).encode())
    except DapaError as error:
        LOG.info(f"no lock next to the recipe: {error}")
    else:
        LOG.info(f"locked in {path}")


def pin(recipe: Recipe, lock: Lock) -> Recipe:
    """Return the recipe with its models at the locked commits.

    Raises:
        RecipeError: If the recipe is not the one that was locked.
    """
    if recipe_digest(recipe) != lock.recipe:
        raise RecipeError("the recipe changed since it was locked; run it without --locked to write a new lock")
    models: dict[str, Any] = {name: _pinned(model, lock.of(name)) for name, model in models_of(recipe).items()}
    return replace(recipe, **models)


def _pinned(location: Location, locked: Sequence[Upstream]) -> Location:
    pairs = pair_up(location, locked)
    first, *rest = (replace(part, revision=upstream.commit or part.revision) for part, upstream in pairs)
    return replace(first, adapter=rest[0]) if rest else first


def check_lock(lock: Lock, models: Mapping[str, Checkpoint]) -> None:
    """Check that the opened models are the locked ones.

    Raises:
        HubError: If a model moved in between.
    """
    for name, checkpoint in models.items():
        opened = checkpoint.merged_from or (checkpoint.commit,)
        for commit, upstream in zip(opened, lock.of(name), strict=True):
            if commit != upstream.commit:
                raise HubError(f"{upstream} moved to {commit} while it was opened; run the command again")


def pair_up(
    location: Location, locked: Sequence[Upstream], *, is_published: bool = False
) -> list[tuple[Location, Upstream]]:
    """Pair a model, and its adapter if it has one, with their locked states.

    Args:
        location: The model as the recipe names it.
        locked: Their states.
        is_published: Whether the lock was published, and so has other names for folders of this machine.

    Raises:
        CheckpointError: If the lock is for other models, e.g. after it was edited.
    """
    found = base_and_adapter(location)
    is_same = len(found) == len(locked) and all(
        (part.path, part.revision) == (one.model, one.revision) or (is_published and is_path(part.path))
        for part, one in zip(found, locked, strict=True)
    )
    if not is_same:
        raise CheckpointError(f"the lock is not for {location}; remove it, and run the recipe again")
    return list(zip(found, locked, strict=True))


def lock_text(lock: Lock) -> str:
    """The lock as YAML."""
    content = {
        "format": FORMAT,
        "recipe": lock.recipe,
        **{name: list(map(_plain, lock.of(name))) for name in MODELS if lock.of(name)},
        **({"edit": lock.edit} if lock.edit else {}),
        "selection": ",".join(lock.units),
        "versions": dict(lock.versions),
    }
    return HEAD + str(yaml.safe_dump(content, sort_keys=False, width=1000))


def _plain(upstream: Upstream) -> dict[str, Any]:
    return {**vars(upstream), "files": dict(sorted(upstream.files.items()))}


def read_lock(path: Path) -> Lock | None:
    """Read a lock; None if the file does not exist.

    Raises:
        CheckpointError: If it is not a lock.
    """
    try:
        text = read_regular(path, MAX_BYTES).decode()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read the lock {path}: {error}") from error
    return parse_lock(text, str(path))


def parse_lock(text: str, name: str) -> Lock:
    """Parse the text of a lock, which may be untrusted.

    Raises:
        CheckpointError: If it is not a lock.
    """
    try:
        content: Any = read_yaml(text)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r:.40}, not {FORMAT}")
        selection = content["selection"]
        return _lock_adapter().validate_python({**content, "units": selection.split(",") if selection else ()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = " ".join(f"{type(error).__name__} {error}".split())[:160]
        raise CheckpointError(
            f"{name} is not the lock of a recipe ({what}); remove it, and run the recipe again"
        ) from None


def locked_ladder(ladder: Ladder, lock: Lock) -> Ladder:
    """Return the one rung that a lock names, of several; raises `RecipeError` if it names none of them."""
    return ladder.only(lock.edit) if ladder.is_auto else ladder


def locked_selection(recipe: Recipe, plan: Plan, lock: Lock) -> tuple[Unit, ...]:
    """Return the units that a lock names.

    Raises:
        RecipeError: If the lock names no units, units that the models lack, or other units than the recipe; or if the
            edit needs more than units.
    """
    try:
        choices = parse_layers(",".join(lock.units)) if lock.units else ()
    except ValueError:
        raise RecipeError(
            f"the lock names {','.join(lock.units)[:80]!r}, which are not units; run without --locked"
        ) from None
    if not choices:
        raise RecipeError("the lock names no units, so nothing would be repaired; run without --locked")
    locked = given_selection(replace(recipe, layers=tuple(choices)), plan) or ()
    if recipe.layers is not None and set(locked) != set(given_selection(recipe, plan) or ()):
        raise RecipeError(
            f"{recipe.where('parameters.layers')} names other units than the lock ({','.join(lock.units)[:80]}); run "
            f"without --locked"
        )
    if plan.edit.chooses and not plan.changes(locked):
        raise RecipeError(
            f"the lock names units, but not what the edit {plan.edit.name} chose for them; run the recipe in the "
            f"result, or run without --locked"
        )
    return locked


@dataclass(frozen=True)
class Movement:
    """The changes of a model since it was locked.

    Attributes:
        commit: Its commit now; None for a folder.
        changed: Files with different content.
    """

    before: Upstream
    commit: str | None
    changed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    @property
    def matters(self) -> bool:
        """Whether a repair may give a different result; a new commit of only a card does not matter."""
        return bool(self.changed or self.added or self.removed)

    @property
    def changes(self) -> str:
        """The files that differ, as text."""
        what = {"changed": self.changed, "new": self.added, "gone": self.removed}
        return "; ".join(f"{word}: {_few(names)}" for word, names in what.items() if names)


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 4 else ""
    return ", ".join(names[: 3 if more else 4]) + more


def base_and_adapter(location: Location) -> list[Location]:
    """Split a location into the model and its LoRA adapter, if it has one."""
    model = Location(location.path, location.revision)
    return [model] if location.adapter is None else [model, *base_and_adapter(location.adapter)]


def named_parts(role: str, location: Location) -> list[tuple[str, Location]]:
    """The model and its adapter, each with its role in a recipe."""
    return list(zip((role, f"{role}'s adapter"), base_and_adapter(location), strict=False))


def upstream_of(location: Location) -> Upstream:
    """The current state of a single model or adapter.

    Args:
        location: A folder or a Hub id.

    Raises:
        CheckpointError: If it has no weights.
        HubError: If it is not a folder and the Hub does not answer.
    """
    if os.path.isdir(location.path):
        return Upstream(location.path, location.revision, None, _of_folder(Path(location.path)))
    info = _info(location, files=True)
    files = _of_repository(location.path, str(info.sha), {file.rfilename: file for file in info.siblings or ()})
    return Upstream(location.path, location.revision, str(info.sha), files)


def movement(before: Upstream, location: Location) -> Movement:
    """Compare a model with its locked state; no files are read if its Hub commit is the same.

    Raises:
        CheckpointError: If the weights are gone.
        HubError: If it is not a folder and the Hub does not answer.
    """
    if before.commit is not None and not os.path.isdir(location.path):
        sha = str(_info(location, files=False).sha)
        if sha == before.commit:
            return Movement(before, sha)
    return changed_files(before, upstream_of(location))


def changed_files(before: Upstream, now: Upstream) -> Movement:
    """Compare the files of a model at two times."""
    both = before.files.keys() & now.files.keys()
    return Movement(
        before,
        now.commit,
        changed=tuple(sorted(name for name in both if before.files[name] != now.files[name])),
        added=tuple(sorted(now.files.keys() - before.files.keys())),
        removed=tuple(sorted(before.files.keys() - now.files.keys())),
    )


def num_bytes(location: Location) -> int:
    """Bytes to read for `upstream_of` a folder; 0 for a model on the Hub."""
    folder = Path(location.path)
    return sum((folder / name).stat().st_size for name in _names_in(folder)) if folder.is_dir() else 0


def _names_in(folder: Path) -> list[str]:
    templates = [f"{TEMPLATES}/{path.name}" for path in folder.glob(f"{TEMPLATES}/*.jinja")]
    return _chosen([*os.listdir(folder), *templates], str(folder), lambda name: folder / name)


def _of_folder(folder: Path) -> dict[str, str]:
    names = _names_in(folder)
    # Reading and hashing both release the GIL.
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return dict(zip(names, pool.map(lambda name: _digest(folder / name), names), strict=True))


def _digest(path: Path) -> str:
    try:
        return hash_file(path, "sha256").digest
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def _of_repository(repository: str, commit: str, files: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of the files: the Hub's own for large files, computed from a download for small ones."""

    def fetched(name: str) -> Path:
        return download(repository, name, commit)

    def sha256(name: str) -> str:
        lfs = files[name].lfs
        return str(lfs.sha256) if lfs is not None else _digest(fetched(name))

    names = _chosen(list(files), f"{repository}@{commit}", fetched)
    if missing := [name for name in names if name not in files]:
        raise HubError(f"{repository}@{commit} has no {missing[0]}, which its index names; ask its owner to mend it")
    return {name: sha256(name) for name in names}


def _chosen(names: Collection[str], model: str, fetch: Callable[[str], Path]) -> list[str]:
    """The files that affect a repair: weights, config, tokenizer and chat templates."""
    top = [name for name in names if "/" not in name]
    chosen = {name for name in names if is_settings(name)}
    chosen |= {name for name in top if name.endswith(".py") and not is_clutter(name)}
    if ADAPTER_CONFIG_NAME in top:
        return sorted(chosen | {name for name in (ADAPTER_CONFIG_NAME, *ADAPTER_NAMES) if name in top})
    layout = find_weights(top, model)
    if layout.index is None:
        return sorted(chosen | set(layout.shards))
    path = fetch(layout.index)
    shards = pickle_files(path.parent, layout) if layout.pickled else tuple(read_index(path).values())
    return sorted(chosen | {layout.index, *shards})


def _info(location: Location, *, files: bool) -> Any:
    if not is_id(location.path):
        raise CheckpointError(
            f"{no_folder(location.path)}, and it is not the id of a Hub repository; relative paths start "
            f"at the current folder"
        )
    what = f"ask the Hub about {location}"
    return ask(what, lambda: api().model_info(location.path, revision=location.revision, files_metadata=files))


_lock_adapter = functools.cache(lambda: TypeAdapter(Lock))
