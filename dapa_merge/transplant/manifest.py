"""`dapa.json` in a result: what it was made of, and what each of its files and changed tensors must be.

A result can be checked against it without the target and the source; with them, it can be proved to be the target plus
exactly the parts that the manifest says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from dapa_merge import __version__
from dapa_merge.checkpoint.digest import Digests
from dapa_merge.checkpoint.header import read_json
from dapa_merge.checkpoint.region import Box, remainder, whole_box
from dapa_merge.errors import CheckpointError, fault_of
from dapa_merge.plan.edit import Edit, make_edit
from dapa_merge.plan.plan import Plan
from dapa_merge.transplant.shard import RegionEdit

MANIFEST_NAME = "dapa.json"
CARD_NAME = "README.md"
FORMAT = 1
# A 70 B model's has 200 kB; a much larger file is not a manifest.
MAX_BYTES = 64 << 20
# What the models said, harmful answers among it: not published, so a result may lack it.
PRIVATE = ("dapa_responses.jsonl",)
# What is put next to a model afterwards and does not belong to it: its card, licences, notes and pictures.
_ADDED_ENDS = (".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".pdf")
_ADDED_STARTS = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")


@dataclass(frozen=True)
class Origin:
    """A model that a result was made of.

    Attributes:
        model: What the user called it: a folder or a Hub id.
        commit: Its commit on the Hub; None for a local folder.
    """

    model: str
    commit: str | None


def _inside(name: str) -> str:
    """A path whose every part is a plain name: none leads out of the folder, on any system."""
    if any(part in ("", ".", "..") for part in name.split("/")) or not name.isprintable() or set("\\:") & set(name):
        raise ValueError("not a path inside the folder")
    return name


def _filled(boxes: tuple[Box, ...] | None) -> tuple[Box, ...] | None:
    if not boxes or any(not 0 <= first < stop < 1 << 62 for box in boxes for first, stop in box):
        raise ValueError("not parts of a tensor")
    return boxes


Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class File:
    """What a file of a result must be."""

    num_bytes: Annotated[int, Field(alias="bytes", ge=0, lt=1 << 62)]
    sha256: Sha256


@dataclass(frozen=True)
class ChangedTensor:
    """What a tensor of a result must be that is not all the target's.

    Attributes:
        file: The result's file that it is in.
        sha256: Of all its bytes in the result.
        boxes: The parts of it that are the source's, by dimension; None if all of it is.
    """

    file: str
    sha256: Sha256
    boxes: Annotated[tuple[Box, ...] | None, AfterValidator(_filled), Field(alias="changed")] = None


@dataclass(frozen=True)
class Manifest:
    """What a result is.

    Attributes:
        version: The dapa-merge that made it.
        models: What was repaired and what its new values came from, by what a recipe calls them.
        edit: How new values were computed.
        units: What was transplanted, as `3.gate`.
        files: Every file that is listed (`is_listed`), by its path in the result with slashes.
        tensors: Every changed tensor by name.
    """

    version: str
    models: Mapping[str, Origin]
    edit: Edit
    units: tuple[str, ...]
    files: Mapping[str, File]
    tensors: Mapping[str, ChangedTensor]


def make_manifest(
    plan: Plan, units: Sequence[str], changes: Mapping[str, Sequence[RegionEdit]], files: Mapping[str, Digests]
) -> Manifest:
    """The manifest of a result."""
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
        files={name: File(found.num_bytes, found.sha256) for name, found in sorted(files.items()) if is_listed(name)},
        tensors=tensors,
    )


def origins(plan: Plan) -> dict[str, Origin]:
    """The models that a result is made of, by what a recipe calls them."""
    return {name: Origin(checkpoint.name, checkpoint.commit) for name, checkpoint in plan.models.items()}


def may_be_added(name: str) -> bool:
    """Whether a file next to a model is not loaded as a part of it."""
    last = name.rpartition("/")[2]
    return last.lower().endswith(_ADDED_ENDS) or last.startswith(_ADDED_STARTS)


def is_listed(name: str) -> bool:
    """Whether a manifest lists a file: not the card, which is renewed, nor what is not published."""
    return name not in (MANIFEST_NAME, CARD_NAME, *PRIVATE)


def manifest_text(manifest: Manifest) -> str:
    """What is written into `dapa.json`."""
    content = {
        "format": FORMAT,
        "version": manifest.version,
        **{name: vars(origin) for name, origin in manifest.models.items()},
        **manifest.edit.to_json(),
        "units": list(manifest.units),
        "files": {name: {"bytes": file.num_bytes, "sha256": file.sha256} for name, file in manifest.files.items()},
        "tensors": {
            name: {"file": tensor.file, "sha256": tensor.sha256}
            | ({} if tensor.boxes is None else {"changed": tensor.boxes})
            for name, tensor in manifest.tensors.items()
        },
    }
    return json.dumps(content, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a result, believed in nothing that could lead out of its folder.

    Raises:
        CheckpointError: If it is absent, or not of this format.
    """
    path = folder / MANIFEST_NAME
    raw = read_json(path, max_bytes=MAX_BYTES)
    if raw.get("format") != FORMAT:
        raise _wrong(path, f"is of format {raw.get('format')!r:.40}, not {FORMAT}")
    try:
        content = _CONTENT.validate_json(json.dumps(raw), strict=True)
        edit = make_edit(content.edit, content.strength)
        names = dict.fromkeys(("target", "source", *edit.inputs))
        models = _MODELS.validate_json(json.dumps({name: raw.get(name) for name in names}), strict=True)
    except ValidationError as error:
        raise _wrong(path, f"is damaged: {fault_of(error)}") from None
    except ValueError as error:
        raise _wrong(path, f"is damaged: edit: {error}") from None
    for name, tensor in content.tensors.items():
        if tensor.file not in content.files:
            raise _wrong(path, f"is damaged: tensors.{name[:60]}.file: {tensor.file[:60]!r} is not among the files")
    return Manifest(content.version, models, edit, content.units, content.files, content.tensors)


def _wrong(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} {what}; take it from where the model was published")


@dataclass(frozen=True)
class _Content:
    """What `dapa.json` holds, but for its models."""

    version: str
    strength: Annotated[float, Field(allow_inf_nan=False)]
    units: tuple[str, ...]
    files: Mapping[Annotated[str, AfterValidator(_inside)], File]
    tensors: Mapping[str, ChangedTensor]
    edit: str = "copy"


_CONTENT, _MODELS = TypeAdapter(_Content), TypeAdapter(dict[str, Origin])
