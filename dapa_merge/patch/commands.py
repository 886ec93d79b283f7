"""The patch commands: each opens the named models and returns one answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dapa_merge.checkpoint.convert import open_location
from dapa_merge.checkpoint.folder import read_regular, refuse_stray_link
from dapa_merge.checkpoint.location import Location, parse_location
from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.errors import CheckpointError, RecipeError, Stopped, UsageError
from dapa_merge.patch.apply import apply_in_place, apply_to_copy, revert
from dapa_merge.patch.extract import differing_settings, extract
from dapa_merge.patch.file import Patch, read_patch
from dapa_merge.patch.undo import UNDO_NAME
from dapa_merge.plan.edit import Edit
from dapa_merge.plan.selection import RECIPE_NAME, edit_of
from dapa_merge.progress import LOG, task
from dapa_merge.recipe.parse import load_recipe

MAX_RECIPE_BYTES = 1 << 20


def extract_patch(result: str, path: Path, base: str | None, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Write a result's changes to its base to a new patch file, and describe it.

    Args:
        result: A folder or a Hub id.
        path: The file to make.
        base: A folder or a Hub id; by default the `base_model` of the recipe in the result's folder.
        allow_pickle: Read a base that exists only as pickles, accepting only tensors.

    Raises:
        DapaError: If either cannot be read, their tensors do not match, or the file cannot be written.
    """
    changed = open_location(_location(result))
    place = _location(base) if base is not None else _base_of(changed)
    original = open_location(place, allow_pickle=allow_pickle)
    with task("comparing", original.num_bytes, "bytes"):
        patch = extract(changed, original, path, recipe=_recipe_text(changed), edit=_edit_of(changed))
    return {**summary(patch), "model_bytes": original.num_bytes, "other_files": differing_settings(changed, original)}


def extract_lora(result: str, folder: Path, base: str | None, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Write the directions that a result adds to its base as a LoRA adapter of peft, and describe it.

    Args:
        result: A folder or a Hub id.
        folder: The adapter's folder to make.
        base: A folder or a Hub id; by default the `base_model` of the recipe in the result's folder.
        allow_pickle: Read a base that exists only as pickles, accepting only tensors.

    Raises:
        DapaError: If the result was not made by directions, or peft cannot add them to the base.
    """
    # Imported here: it loads transformers, which a patch does not need.
    from dapa_merge.patch.lora import write_adapter

    changed = open_location(_location(result))
    edit = _edit_of(changed)
    if edit is None or not any(edit.loras()):
        raise UsageError(
            f"{result} was not made by the edit directions, with a file that its {RECIPE_NAME} names; only directions "
            f"are a LoRA: extract a patch"
        )
    place = _location(base) if base is not None else _base_of(changed)
    original = open_location(place, allow_pickle=allow_pickle)
    with task("comparing", 2 * original.num_bytes, "bytes"):
        ranks = write_adapter(edit, changed, original, folder)
    return {"adapter": str(folder), "base": original.name, "ranks": ranks}


def apply_patch(
    path: Path, base: str, out: Path | None, in_place: bool, undo: Path | None, *, allow_pickle: bool = False
) -> dict[str, Any]:
    """Apply a patch to a copy or in place, and say what was done.

    Raises:
        DapaError: If the patch is not for this base, or the result cannot be written.
    """
    if (out is None) is not in_place:
        raise UsageError("name either a folder for the patched copy, or --in-place to change the model itself")
    if undo is not None and not in_place:
        raise UsageError("--undo is only for --in-place; a patched copy leaves its base unchanged")
    patch = read_patch(path)
    # A model converted into the cache cannot be changed in place.
    model = open_location(_location(base), allow_pickle=allow_pickle and not in_place)
    answer = {"patch": str(path), "base": base, "in_place": in_place, "bytes": patch.num_bytes}
    if out is not None:
        with task("copying", 2 * model.num_bytes, "bytes"):
            apply_to_copy(patch, model, out)
        return {**answer, "out": str(out), "applied": True}
    with _interruptible(model), task("patching", model.num_bytes + 2 * patch.num_bytes, "bytes"):
        applied = apply_in_place(patch, model, undo)
    return {**answer, "applied": applied, "undo": str(undo or model.folder / UNDO_NAME)}


def revert_patch(base: str, undo: Path | None) -> dict[str, Any]:
    """Revert a patch that was applied in place, and say how many bytes were restored.

    Raises:
        DapaError: If there is nothing to revert, or the model was changed since the patch.
    """
    model = open_location(_location(base))
    file = undo or model.folder / UNDO_NAME
    # The undo file has about the size of the replaced bytes.
    size = file.stat().st_size if file.is_file() else 0
    with _interruptible(model), task("reverting", 3 * size, "bytes"):
        return {"base": base, "bytes": revert(model, undo)}


def show_patch(path: Path) -> dict[str, Any]:
    """The changes that a patch file lists.

    Raises:
        CheckpointError: If it is not a patch, or is damaged.
    """
    patch = read_patch(path)
    metadata = {key: patch.metadata.get(key) for key in ("tool", "base", "base_commit", "recipe")}
    keys = ("tensor", "dtype", "shape", "rows", "num_changed")
    entries = [
        {**{key: getattr(entry, key) for key in keys}, "computed": entry.key not in patch.contents}
        for entry in patch.entries
    ]
    return {**summary(patch), **metadata, "entries": entries}


def summary(patch: Patch) -> dict[str, Any]:
    """The figures of a patch."""
    return {
        "patch": str(patch.path),
        "file_bytes": patch.path.stat().st_size,
        "base": patch.metadata.get("base"),
        "tensors": len({entry.tensor for entry in patch.entries}),
        "ranges": len(patch.entries),
        "bytes": patch.num_bytes,
        "edit": None if patch.edit is None else patch.edit.to_json() | patch.edit.counts(),
        "changed_bytes": sum(entry.num_changed * entry.num_row_bytes for entry in patch.entries),
    }


@contextmanager
def _interruptible(model: Checkpoint) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Stopped(
            f"{model.name} may be partly written: run the same command again, or `dapa-merge patch revert`"
        ) from stop


def _edit_of(result: Checkpoint) -> Edit | None:
    """The edit that made a result, according to the recipe in its folder; None if unknown."""
    if not (result.folder / RECIPE_NAME).is_file():
        return None
    try:
        return edit_of(load_recipe(result.folder / RECIPE_NAME))
    except RecipeError:
        # Another program's.
        return None
    except CheckpointError as error:
        LOG.info(f"the patch holds whole rows: {error}")
        return None


def _recipe_text(result: Checkpoint) -> str | None:
    """The recipe in a result's folder, for others to read; None without one, or if it is too large.

    Raises:
        CheckpointError: If it is a link out of the folder, such as to this process's tokens in /proc.
    """
    path = result.folder / RECIPE_NAME
    if not path.is_file():
        return None
    refuse_stray_link(path, result.folder)
    try:
        return read_regular(path, MAX_RECIPE_BYTES).decode(errors="replace")
    except OSError:
        return None


def _base_of(result: Checkpoint) -> Location:
    """The base of a result, according to the recipe in its folder."""
    path = result.folder / RECIPE_NAME
    if not path.is_file():
        raise UsageError(f"{result.name} has no {RECIPE_NAME} that names its base; name the base with --base")
    try:
        return load_recipe(path).target
    except RecipeError as error:
        raise UsageError(f"{error}; name the result's base with --base") from error


def _location(value: str) -> Location:
    try:
        return parse_location(value)
    except ValueError:
        raise UsageError(f"{value!r} is not a model: pass a folder, a Hub id or id@revision") from None
