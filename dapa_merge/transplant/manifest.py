"""`dapa.json` in a result: its origin, and the digests of its files and changed tensors.

A result can be checked against it without the target and the source; with them, it can be proved to be the target plus
exactly the parts that the manifest lists.

Format 2 names the algorithm of its digests, BLAKE3 unless an older manifest is published anew. Format 1, of versions
before it, has SHA-256s under that name; it is read, not written.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, AliasChoices, Field, TypeAdapter, ValidationError

from dapa_merge import __version__
from dapa_merge.checkpoint.contents import is_licence, is_settings, parts_of
from dapa_merge.checkpoint.digest import ALGORITHM, HASHES, Digests, hash_bytes
from dapa_merge.checkpoint.folder import INDEX_NAME, OTHER_PROGRAMS, is_clutter
from dapa_merge.checkpoint.header import read_json
from dapa_merge.checkpoint.open import find_model
from dapa_merge.checkpoint.region import Box, remainder, whole_box
from dapa_merge.errors import CheckpointError, fault_of
from dapa_merge.plan.edit import Edit, make_edit
from dapa_merge.plan.plan import Plan
from dapa_merge.transplant.shard import RegionEdit

MANIFEST_NAME = "dapa.json"
CARD_NAME = "README.md"
FORMAT = 2
# What an entry calls its digest, by format.
_KEYS = {1: "sha256", 2: "digest"}
# A 70 B model's manifest has 200 kB, that of all experts of a mixture of 671 B with every matrix changed 11 MB. Python
# takes thirty times the size of a file of nothing but brackets.
MAX_BYTES = 16 << 20
RESPONSES_NAME = "dapa_responses.jsonl"
PAGE_NAME = "dapa_responses.html"
# The chat template that the models were asked with, if not their own; by its suffix no part of a model.
TEMPLATE_NAME = "dapa_chat_template.txt"
# The models' responses, including harmful ones: not published, so a result may lack them.
PRIVATE = (RESPONSES_NAME, PAGE_NAME)
# Files that commands write next to a result's weights.
WRITTEN = (
    MANIFEST_NAME, CARD_NAME, *PRIVATE, "mergekit_config.yml", "recipe.lock.yml", "dapa_report.json",
    "dapa_directions.dat", TEMPLATE_NAME,
)  # fmt: skip
# Files that may be added next to a model afterwards, besides licences: its card, notes and pictures.
_ADDED_ENDS = (".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".pdf")


@dataclass(frozen=True)
class Origin:
    """A model that a result was made of.

    Attributes:
        model: As the user wrote it: a folder or a Hub id.
        commit: Hub commit; None for a local folder.
    """

    model: str
    commit: str | None


def _inside(name: str) -> str:
    """Check that every part of a path is a plain name, so it cannot lead out of the folder on any system."""
    if any(part in ("", ".", "..") for part in name.split("/")) or not name.isprintable() or set("\\:") & set(name):
        raise ValueError("not a path inside the folder")
    return name


def _filled(boxes: tuple[Box, ...] | None) -> tuple[Box, ...] | None:
    if not boxes or any(not 0 <= first < stop < 1 << 62 for box in boxes for first, stop in box):
        raise ValueError("not parts of a tensor")
    return boxes


Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$", validation_alias=AliasChoices("digest", "sha256"))]


@dataclass(frozen=True)
class File:
    """Expected size and digest of a file of a result."""

    num_bytes: Annotated[int, Field(alias="bytes", ge=0, lt=1 << 62)]
    digest: Digest


@dataclass(frozen=True)
class ChangedTensor:
    """Expected content of a result's tensor that differs from the target's.

    Attributes:
        file: The result's file that holds it.
        digest: Of all its bytes in the result.
        boxes: The changed parts; None if all of it is changed.
    """

    file: str
    digest: Digest
    boxes: Annotated[tuple[Box, ...] | None, AfterValidator(_filled), Field(alias="changed")] = None


@dataclass(frozen=True)
class Manifest:
    """The content of a result's `dapa.json`.

    Attributes:
        version: The dapa-merge that made it.
        models: The models it was made of, by their names in a recipe.
        edit: How new values were computed.
        units: The transplanted units, such as `3.gate`.
        files: Every listed file (`is_listed`), by its path in the result with slashes.
        tensors: Every changed tensor by name.
        algorithm: That of all digests, a name in `HASHES`.
    """

    version: str
    models: Mapping[str, Origin]
    edit: Edit
    units: tuple[str, ...]
    files: Mapping[str, File]
    tensors: Mapping[str, ChangedTensor]
    algorithm: str = ALGORITHM


def make_manifest(
    plan: Plan, units: Sequence[str], changes: Mapping[str, Sequence[RegionEdit]], files: Mapping[str, Digests]
) -> Manifest:
    """The manifest of a result, whose files' digests are by `ALGORITHM`."""
    parts: dict[tuple[str, str], list[RegionEdit]] = {}
    for file, of_file in changes.items():
        for change in of_file:
            parts.setdefault((change.tensor.name, file), []).append(change)
    tensors: dict[str, ChangedTensor] = {}
    for (name, file), of_tensor in sorted(parts.items()):
        is_whole = not remainder(whole_box(of_tensor[0].tensor.shape), (change.box for change in of_tensor))
        boxes = None if is_whole else tuple(sorted(change.box for change in of_tensor))
        tensors[name] = ChangedTensor(file, files[file].spans[name], boxes)
    return Manifest(
        version=__version__,
        models=origins(plan),
        edit=plan.edit,
        units=tuple(units),
        files={name: File(found.num_bytes, found.digest) for name, found in sorted(files.items()) if is_listed(name)},
        tensors=tensors,
    )


def origins(plan: Plan) -> dict[str, Origin]:
    """The models that a result is made of, by their names in a recipe."""
    return {name: Origin(checkpoint.name, checkpoint.commit) for name, checkpoint in plan.models.items()}


def may_be_added(name: str) -> bool:
    """Whether a file may be added to a result, since no program loads it as part of the model."""
    last = name.rpartition("/")[2]
    return last.lower().endswith(_ADDED_ENDS) or is_licence(last)


def is_of_result(name: str) -> bool:
    """Whether commands write a file of this name next to a model, or it may be added to one."""
    return name in WRITTEN or may_be_added(name)


def may_be_part(name: str, code: Collection[str]) -> bool:
    """Whether a file of this name, which may be absent, can be of a result; `code` is what its settings name."""
    is_weight = name == INDEX_NAME or name.endswith(".safetensors")
    return is_weight or is_settings(name) or is_of_result(name) or name in code


def is_for_other_programs(name: str) -> bool:
    """Whether a file holds weights in a form that is loaded only by name, such as GGUF: they are not checked."""
    return name.lower().endswith(OTHER_PROGRAMS)


def foreign_files(folder: Path, names: Iterable[str]) -> list[str]:
    """The named files in a model's folder that are neither parts of it nor of its description, by their paths.

    Raises:
        CheckpointError: If the folder is not a model.
    """
    own = {*parts_of(folder), *find_model(str(folder)).shards()}
    return [name for name in names if not (name in own or is_of_result(name) or is_for_other_programs(name))]


def files_in(folder: Path) -> Iterator[str]:
    """Yields the paths of the files in a folder, without hidden ones and clutter; links to folders count as files."""
    for parent, folders, files in os.walk(folder):
        here = Path(parent)
        links = [name for name in folders if (here / name).is_symlink()]
        folders[:] = sorted(name for name in folders if not is_clutter(name) and name not in links)
        for name in sorted([*files, *links]):
            if not is_clutter(name):
                yield (here / name).relative_to(folder).as_posix()


def is_listed(name: str) -> bool:
    """Whether a manifest lists a file: not itself, the card, which may be renewed, or unpublished files."""
    return name not in (MANIFEST_NAME, CARD_NAME, *PRIVATE)


def manifest_text(manifest: Manifest) -> str:
    """The text of `dapa.json`."""
    content = {
        "format": FORMAT,
        "version": manifest.version,
        "algorithm": manifest.algorithm,
        **{name: vars(origin) for name, origin in manifest.models.items()},
        **manifest.edit.to_json(),
        "units": list(manifest.units),
        "files": {name: {"bytes": file.num_bytes, "digest": file.digest} for name, file in manifest.files.items()},
        "tensors": {
            name: {"file": tensor.file, "digest": tensor.digest}
            | ({} if tensor.boxes is None else {"changed": tensor.boxes})
            for name, tensor in manifest.tensors.items()
        },
    }
    return json.dumps(content, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read and validate the manifest of a result; its paths cannot lead out of the folder.

    Raises:
        CheckpointError: If it is absent, damaged or of another format.
    """
    path = folder / MANIFEST_NAME
    raw = read_json(path, max_bytes=MAX_BYTES)
    algorithm = _algorithm(path, raw)
    try:
        content = _content_adapter().validate_json(json.dumps(raw), strict=True)
        edit = make_edit(content.edit, content.strength, raw)
        names = dict.fromkeys(("target", "source", *edit.inputs))
        models = _models_adapter().validate_json(json.dumps({name: raw.get(name) for name in names}), strict=True)
    except ValidationError as error:
        raise _wrong(path, f"is damaged: {fault_of(error)}") from None
    except ValueError as error:
        raise _wrong(path, f"is damaged: edit: {error}") from None
    for name, tensor in content.tensors.items():
        if tensor.file not in content.files:
            raise _wrong(path, f"is damaged: tensors.{name[:60]}.file: {tensor.file[:60]!r} is not among the files")
    return Manifest(content.version, models, edit, content.units, content.files, content.tensors, algorithm)


def _algorithm(path: Path, raw: Mapping[str, Any]) -> str:
    """The algorithm of a manifest's digests."""
    found = raw.get("format")
    if not isinstance(found, int) or found not in _KEYS:
        raise _unknown(path, f"is of format {found!r:.40}, not one of {', '.join(map(str, _KEYS))}")
    algorithm = "sha256" if found == 1 else raw.get("algorithm")
    if not isinstance(algorithm, str) or algorithm not in HASHES:
        raise _unknown(path, f"has digests by {algorithm!r:.40}, not by one of {', '.join(HASHES)}")
    return algorithm


def entry_of(path: Path, raw: Mapping[str, Any], content: bytes) -> dict[str, Any]:
    """The entry of a file in a manifest as its JSON data, of whatever format, for other content of the file.

    Raises:
        CheckpointError: If the manifest's format or algorithm is unknown.
    """
    return {"bytes": len(content), _KEYS[raw["format"]]: hash_bytes(content, _algorithm(path, raw))}


def _unknown(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} {what}; install a newer dapa-merge, or download it again")


def _wrong(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} {what}; download it again from where the model was published")


@dataclass(frozen=True)
class _Content:
    """The content of `dapa.json` except the models."""

    version: str
    strength: Annotated[float, Field(allow_inf_nan=False)]
    units: tuple[str, ...]
    files: Mapping[Annotated[str, AfterValidator(_inside)], File]
    tensors: Mapping[str, ChangedTensor]
    edit: str = "copy"


_content_adapter = functools.cache(lambda: TypeAdapter(_Content))
_models_adapter = functools.cache(lambda: TypeAdapter(dict[str, Origin]))
