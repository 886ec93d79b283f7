"""`recipe.lock.yml`: what a recipe was followed with, so that it can be followed again with exactly that.

It lies beside the recipe, and in the result. `run --locked` goes by it, and `outdated` compares it with what is now.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dapa_merge.checkpoint.plain_values import sha256_of, text_of
from dapa_merge.checkpoint.plan import Plan
from dapa_merge.checkpoint.untrusted import read_regular
from dapa_merge.errors import CheckpointError, HubError, RecipeError
from dapa_merge.hub.upstream import Upstream, parts
from dapa_merge.recipe import Location, Recipe

FORMAT = 1
# In a result, whose own recipe has another name.
FILE_NAME = "recipe.lock.yml"
# A lock of a model in a thousand shards has some 150 kB.
MAX_BYTES = 16 << 20
HEAD = (
    "# What the recipe beside this file was followed with. Written by dapa-merge run; `run --locked` goes by it,\n"
    "# and `outdated` compares it with what its models are now. Keep it with the recipe.\n"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Lock:
    """What a recipe was followed with.

    Attributes:
        recipe: The SHA-256 of what the recipe says, however it is written.
        target: The target, and its adapter behind it if it has one.
        source: The same of the source.
        units: What was transplanted, as `3.gate`.
        versions: Of the packages that took part, by name.
    """

    recipe: str
    target: tuple[Upstream, ...]
    source: tuple[Upstream, ...]
    units: tuple[str, ...]
    versions: Mapping[str, str]

    def with_units(self, units: Iterable[object]) -> Lock:
        """The same with another selection."""
        return replace(self, units=tuple(map(str, units)))


def lock_path(recipe: Path) -> Path:
    """Where the lock of a recipe is: `name.lock.yml` beside `name.yml`."""
    return recipe.with_name(f"{recipe.stem}.lock.yml")


def recipe_digest(recipe: Recipe) -> str:
    """The SHA-256 of what a recipe says; comments and the order of keys do not count."""
    # A parameter that another version adds does not change what was said without it.
    said = {
        item.name: value
        for item in fields(recipe)
        if not item.name.startswith("_") and (value := getattr(recipe, item.name)) != item.default
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=_as_plain).encode()).hexdigest()


def _as_plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def versions() -> dict[str, str]:
    """The versions of the packages that decide what comes out."""
    from importlib.metadata import version

    return {name: version(name) for name in ("dapa-merge", "mergekit", "safetensors", "torch", "transformers")}


def pin(recipe: Recipe, lock: Lock) -> Recipe:
    """The recipe with its models at the locked commits.

    Raises:
        RecipeError: If the recipe is not the one that was locked.
    """
    if recipe_digest(recipe) != lock.recipe:
        raise RecipeError(
            "the recipe does not say what it said when it was locked; run it without --locked, which locks it anew"
        )
    return replace(recipe, target=_pinned(recipe.target, lock.target), source=_pinned(recipe.source, lock.source))


def _pinned(location: Location, locked: Sequence[Upstream]) -> Location:
    pairs = pair_up(location, locked)
    first, *rest = (replace(part, revision=upstream.commit or part.revision) for part, upstream in pairs)
    return replace(first, adapter=rest[0]) if rest else first


def check_lock(lock: Lock, plan: Plan) -> None:
    """Make sure that the models that were opened are those that were locked just before.

    Raises:
        HubError: If one of them moved in between.
    """
    for checkpoint, locked in ((plan.target, lock.target), (plan.source, lock.source)):
        opened = checkpoint.merged_from or (checkpoint.commit,)
        for commit, upstream in zip(opened, locked, strict=True):
            if commit != upstream.commit:
                raise HubError(f"{upstream} moved to {commit} while it was opened; run the command again")


def pair_up(location: Location, locked: Sequence[Upstream]) -> list[tuple[Location, Upstream]]:
    """A model, and its adapter if it has one, with what they were.

    Raises:
        CheckpointError: If the lock is of other models, as after an edit.
    """
    found = parts(location)
    if [(part.path, part.revision) for part in found] != [(one.model, one.revision) for one in locked]:
        raise CheckpointError(f"the lock does not say what {location} was; remove it, and run the recipe again")
    return list(zip(found, locked, strict=True))


def lock_text(lock: Lock) -> str:
    """What is written into the file."""
    content = {
        "format": FORMAT,
        "recipe": lock.recipe,
        "target": [_plain(upstream) for upstream in lock.target],
        "source": [_plain(upstream) for upstream in lock.source],
        "selection": ",".join(lock.units),
        "versions": dict(lock.versions),
    }
    return HEAD + str(yaml.safe_dump(content, sort_keys=False, width=1000))


def _plain(upstream: Upstream) -> dict[str, Any]:
    return {**vars(upstream), "files": dict(sorted(upstream.files.items()))}


def read_lock(path: Path) -> Lock | None:
    """The lock in a file; None if there is no such file.

    Raises:
        CheckpointError: If it is none.
    """
    try:
        text = read_regular(path, MAX_BYTES).decode()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read the lock {path}: {error}") from error
    return parse_lock(text, str(path))


def parse_lock(text: str, name: str) -> Lock:
    """The lock that a text is, which may be a stranger's.

    Raises:
        CheckpointError: If it is none.
    """
    try:
        content = yaml.safe_load(text)
        if content["format"] != FORMAT:
            raise ValueError(f"it is of format {content['format']!r:.40}, not {FORMAT}")
        return Lock(
            recipe=sha256_of(content["recipe"]),
            target=tuple(map(_upstream, content["target"])),
            source=tuple(map(_upstream, content["source"])),
            units=tuple(text_of(content["selection"]).split(",")) if content["selection"] else (),
            versions={text_of(package): text_of(number) for package, number in content["versions"].items()},
        )
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        what = " ".join(f"{type(error).__name__} {error}".split())[:160]
        raise CheckpointError(f"{name} is no lock of a recipe ({what}); remove it, and run the recipe again") from None


def _upstream(entry: Mapping[str, Any]) -> Upstream:
    revision, commit = entry["revision"], entry["commit"]
    return Upstream(
        model=text_of(entry["model"]),
        revision=None if revision is None else text_of(revision),
        commit=None if commit is None else _commit(commit),
        files={text_of(name): sha256_of(sha256) for name, sha256 in entry["files"].items()},
    )


def _commit(value: object) -> str:
    commit = text_of(value)
    if not _COMMIT.fullmatch(commit):
        raise ValueError(f"{commit!r:.80} is no commit")
    return commit
