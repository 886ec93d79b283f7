"""Copies of a result's recipe, report, lock, manifest and settings as they are published: without local paths.

A model becomes the id under which it is published, or `./` and its folder's name, which nobody takes for a repository;
prompts, texts and questions become the names of their files, and so do paths that transformers wrote into the settings.
Nothing else of the files changes, but for the digests of these files in the manifest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dapa_merge.checkpoint.folder import is_clutter, read_regular
from dapa_merge.checkpoint.header import read_json, read_metadata
from dapa_merge.checkpoint.location import is_path, without_paths
from dapa_merge.errors import CheckpointError
from dapa_merge.plan.edit import MODELS
from dapa_merge.plan.selection import RECIPE_NAME, models_of
from dapa_merge.publish.lock import LOCK_NAME, base_and_adapter
from dapa_merge.publish.parents import Parent
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.report.replay import SEARCH_ONLY
from dapa_merge.report.report import REPORT_NAME
from dapa_merge.transplant.manifest import MANIFEST_NAME, entry_of, files_in

# The parameters of a recipe, and fields of a report, that name files of prompts, texts or questions.
FILES = ("prompts", "keep", "text", "skills", "attacks", "directions", "chat_template")
# The keys whose values name a model or such files.
NAMING = ("base_model", "model", *MODELS, *FILES)
MAX_BYTES = 64 << 20
# The keys of settings that may name a file or folder, such as transformers' `_name_or_path`, and what a path is there.
_PLACE_KEY = re.compile(r"(path|file|dir|folder)s?$")
_ABSOLUTE = re.compile(r"(/|~|[A-Za-z]:[\\/]|\\\\).+")
# A path within the header of a weight file.
_PATH = re.compile(r"(?<![\w/.])(?:~?/|[A-Za-z]:\\)[\w .-]+[/\\][^\"']*")


def public_places(parents: Sequence[Parent], role: str) -> tuple[str, ...]:
    """The names under which a model, and its adapter if it has one, are published: `./` and the folder's if not."""
    own = [parent for parent in parents if parent.role.startswith(role)]
    others = {parent.name for parent in parents if not parent.role.startswith(role) and parent.public_name is None}
    # Two folders of one name are two models.
    return tuple(
        parent.public_name or (f"./{role}/{parent.name}" if parent.name in others else f"./{parent.name}")
        for parent in own
    )


def public_recipe(path: Path, parents: Sequence[Parent], named: Mapping[str, str]) -> str:
    """The recipe of a result without paths of this machine: a folder becomes `./` and its name.

    The bare name would point to a Hub repository of that name.

    Args:
        path: The recipe.
        parents: The models.
        named: Parameters that name the units, in place of those of a search; empty to keep the recipe's.
    """
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["base_model"] = "+".join(public_places(parents, "target"))
    content["models"] = [{"model": "+".join(public_places(parents, "source"))}]
    parameters: dict[str, Any] = content.get("parameters") or {}
    if named:
        parameters = {**named, **{key: value for key, value in parameters.items() if key not in SEARCH_ONLY}}
    if pretrained := "+".join(public_places(parents, "pretrained")):
        parameters["pretrained"] = pretrained
    content["parameters"] = {
        key: without_paths(value) if key in FILES and isinstance(value, str) else value
        for key, value in parameters.items()
    }
    text = str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    # Escapes of YAML only where a character could deceive a reader.
    return text if text.replace("\n", "").isprintable() else str(yaml.safe_dump(content, sort_keys=False))


def public_files(out: Path, recipe: Recipe, parents: Sequence[Parent]) -> dict[str, bytes]:
    """The files in a result that are published otherwise than they are here, by name.

    Args:
        out: The result.
        recipe: Its recipe.
        parents: Its models, as their cards describe them.

    Raises:
        CheckpointError: If one of the files cannot be read.
    """
    contents: dict[str, tuple[Any, Callable[[Any], str]]] = {}
    for name in (RECIPE_NAME, LOCK_NAME, REPORT_NAME, MANIFEST_NAME):
        if (out / name).is_file():
            text = _text(out / name)
            is_yaml = name.endswith(".yml")
            try:
                content = yaml.safe_load(text) if is_yaml else json.loads(text)
            except (ValueError, yaml.YAMLError) as error:
                raise CheckpointError(f"{out / name} cannot be read: {str(error)[:120]}") from None
            contents[name] = content, _yaml(text) if is_yaml else _json(1 if name == MANIFEST_NAME else 2)
    names = _names([content for content, _ in contents.values()], recipe, parents)
    found = dict(_settings(out))
    for name, (content, write) in contents.items():
        public = _public(content, names)
        if name == MANIFEST_NAME:
            for file, new in found.items():
                if file in public["files"]:
                    public["files"][file] = entry_of(out / name, content, new)
        if public != content:
            found[name] = write(public).encode()
    return found


def _settings(out: Path) -> Iterator[tuple[str, bytes]]:
    """Yields settings files in which a model or file was named by its path: nothing but the path changes."""
    for path in sorted(path for path in out.glob("*config.json") if not is_clutter(path.name)):
        text = public = _text(path)
        for value in {*_places(read_json(path))}:
            name = value.replace("\\", "/").rstrip("/").rpartition("/")[2]
            for is_ascii in (True, False):
                written, new = (json.dumps(one, ensure_ascii=is_ascii) for one in (value, name))
                public = public.replace(written, new)
        if public != text:
            yield path.name, public.encode()


def _places(value: Any, key: str = "") -> Iterator[str]:
    """Yields the absolute paths in settings."""
    if isinstance(value, Mapping):
        for name, one in value.items():
            yield from _places(one, str(name))
    elif isinstance(value, list):
        for one in value:
            yield from _places(one, key)
    elif isinstance(value, str) and _PLACE_KEY.search(key) and _ABSOLUTE.fullmatch(value):
        yield value


def paths_in_headers(out: Path) -> Iterator[tuple[str, str]]:
    """Yields weight files whose headers, which stay the target's, name a path; with the path."""
    for name in files_in(out):
        if name.endswith(".safetensors"):
            texts = " ".join(read_metadata(out / name).values())
            if found := _PATH.search(texts):
                yield name, found.group()[:80]


def private_models(recipe: Recipe, parents: Sequence[Parent]) -> list[str]:
    """The names in the published files of models that only this machine has."""
    return [place for role in models_of(recipe) for place in public_places(parents, role) if place.startswith("./")]


def _text(path: Path) -> str:
    try:
        return read_regular(path, MAX_BYTES).decode()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is not UTF-8; write the result again") from None


def _json(indent: int) -> Callable[[Any], str]:
    return lambda content: json.dumps(content, indent=indent) + "\n"


def _yaml(text: str) -> Callable[[Any], str]:
    """Writes YAML under the comments that a text begins with."""
    comments = [line for line in text.splitlines(keepends=True) if line.startswith("#")]
    return lambda content: "".join(comments) + str(yaml.safe_dump(content, sort_keys=False))


def _names(contents: Sequence[Any], recipe: Recipe, parents: Sequence[Parent]) -> dict[str, str]:
    """Return the public names of models and files, by their names on this machine, the longest first."""
    names: dict[str, str] = {}
    for role, location in models_of(recipe).items():
        places = public_places(parents, role)
        parts = base_and_adapter(location)
        if not any(is_path(part.path) for part in parts):
            continue
        # The report and the lock have what was typed, perhaps a relative path that looks like an id.
        told = [str(location), *(one for content in contents for one in _named(content, role))]
        names |= dict.fromkeys(told, "+".join(places))
        if len(parts) == len(places):
            names |= {part.path: place for part, place in zip(parts, places, strict=True) if is_path(part.path)}
    for content in (*contents, *(content.get("parameters") for content in contents)):
        if isinstance(content, Mapping):
            texts = [content[key] for key in FILES if isinstance(content.get(key), str)]
            parts = [part.strip() for text in texts for part in text.split(",")]
            names |= {text: public for text in (*texts, *parts) if (public := without_paths(text)) != text}
    return dict(sorted(names.items(), key=lambda pair: -len(pair[0])))


def _named(content: Mapping[str, Any], role: str) -> Iterator[str]:
    """Yields a file's names of a role's model: texts, or the `model` of objects."""
    found = content.get(role)
    for one in found if isinstance(found, list) else [found]:
        text = one.get("model") if isinstance(one, Mapping) else one
        if isinstance(text, str):
            yield text


def _public(value: Any, names: Mapping[str, str], key: str = "") -> Any:
    """Replace names in a value: absolute paths also within sentences, others only under keys in `NAMING`."""
    if isinstance(value, Mapping):
        return {name: _public(one, names, str(name)) for name, one in value.items()}
    if isinstance(value, list):
        return [_public(one, names, key) for one in value]
    if not isinstance(value, str):
        return value
    if value in names and key in NAMING:
        return names[value]
    for path, public in names.items():
        # A relative path may be an ordinary word.
        if Path(path.partition("+")[0]).is_absolute():
            value = value.replace(path, public)
    return value
