"""Checks a result against its manifest, its target and its source, as far as these are available."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

from dapa_merge import __version__
from dapa_merge.checkpoint.contents import named_classes, named_code
from dapa_merge.checkpoint.digest import ALGORITHM, Digests, Span, hash_file, settings_files
from dapa_merge.checkpoint.folder import WEIGHTS, is_clutter, refuse_stray_link
from dapa_merge.checkpoint.header import read_header, read_json
from dapa_merge.checkpoint.location import Location, parse_location
from dapa_merge.checkpoint.open import Checkpoint, find_model, open_checkpoint
from dapa_merge.checkpoint.region import Box, remainder, whole_box
from dapa_merge.checkpoint.units import Unit
from dapa_merge.errors import CheckpointError, UsageError, some_of
from dapa_merge.files import nearest_here, new_file
from dapa_merge.imports import Shown
from dapa_merge.plan.plan import Plan, join, reduced, sparing
from dapa_merge.plan.selection import RECIPE_NAME, confirm_units, fetch_units, given_selection, make_plan, models_of
from dapa_merge.progress import task
from dapa_merge.recipe.parameters import spans
from dapa_merge.recipe.parse import load_recipe
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.transplant.manifest import (
    MANIFEST_NAME,
    PRIVATE,
    ChangedTensor,
    File,
    Manifest,
    files_in,
    foreign_files,
    is_for_other_programs,
    is_listed,
    manifest_text,
    may_be_added,
    may_be_part,
    origins,
    read_manifest,
)
from dapa_merge.verify.tensors import Verification, verify

# Number of differing keys of a settings file, or of files, that a message names.
MAX_KEYS = 8


@dataclass(frozen=True)
class Check(Shown):
    """The outcome of checking a result.

    Attributes:
        verification: The comparison of all tensors; None if only the manifest was checked.
        faults: One sentence per fault.
        notes: One sentence per difference that may be intended.
        has_manifest: Whether there is a `dapa.json`.
        rests_on: For each model that is on the Hub, its name there, its commit, and by what its bytes are the Hub's.
    """

    verification: Verification | None
    faults: tuple[str, ...]
    notes: tuple[str, ...]
    has_manifest: bool
    rests_on: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_correct(self) -> bool:
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        """The verdict and everything that is not the target's, as JSON data."""
        answer: dict[str, Any] = {"correct": not self.faults, "faults": list(self.faults), "notes": list(self.notes)}
        answer["manifest"] = self.has_manifest
        if self.verification is not None or self.rests_on:
            answer["rests_on"] = dict(self.rests_on)
        if self.verification is not None:
            changed = dict(sorted(self.verification.origins.items()))
            answer |= {
                "num_tensors": self.verification.num_tensors,
                "units": list(map(str, self.verification.transplanted)),
                "changed": changed,
                "num_changed": dict(Counter(changed.values())),
            }
        return answer

    def lines(self) -> Iterator[str]:
        """The outcome as text."""
        yield from self.faults
        yield from (f"note: {note}" for note in self.notes)
        yield from (f"the proof rests on the {model}: {what}" for model, what in self.rests_on.items())
        verdict = "WRONG" if self.faults else "correct"
        if self.verification is not None:
            found, of_whom = spans(self.verification.transplanted), self.verification.edit.provenance
            yield f"{verdict}: {self.verification.num_tensors} tensors compared; {of_whom}: {found}"
        if self.has_manifest:
            yield f"{verdict}: the files and dapa.json"


def verify_result(
    out: Path,
    recipe_path: Path | None,
    *,
    target: Location | None = None,
    source: Location | None = None,
    write: bool = False,
    allow_pickle: bool = False,
    name: str | None = None,
) -> Check:
    """Compare a result, possibly written by `mergekit-yaml`, with its target, its source and its manifest.

    If the recipe names no layers, any selection of units is right, except an empty one.

    Args:
        out: The result's folder.
        recipe_path: The recipe that it was made by; by default the one in the folder.
        target: The target's location, if other than in the recipe.
        source: The source's location, if other than in the recipe.
        write: Write the missing manifest of a correct result.
        allow_pickle: Read weights that exist only as pickles, accepting only tensors.
        name: What messages call the result; by default its folder.

    Raises:
        DapaError: If the result, its recipe, the target or the source cannot be read.
    """
    name = name or str(out)
    manifest = _manifest(out)
    if recipe_path is None and not (out / RECIPE_NAME).is_file():
        raise UsageError(f"{name} has no {RECIPE_NAME}; name the recipe that it was made by with --recipe")
    recipe = load_recipe(recipe_path or out / RECIPE_NAME)
    recipe = replace(recipe, target=target or recipe.target, source=source or recipe.source)
    _refuse_private(name, recipe)
    plan = make_plan(recipe, allow_pickle=allow_pickle)
    given = [plan.models[role] for role, place in (("target", target), ("source", source)) if place is not None]
    if any(out.samefile(checkpoint.folder) for checkpoint in given):
        raise UsageError(f"{name} is the target or the source itself, not a result made of them")
    selection = given_selection(recipe, plan)
    unused: list[str] = []
    if selection is not None:
        unused += plan.edit.unused(found["target"] for found in plan.regions(selection))
        plan = reduced(sparing(plan, selection), selection)
    fetch_units(plan, plan.units)
    result = open_checkpoint(str(out))
    with task("verifying", result.num_bytes, "bytes"):
        verification = verify(out, plan, ALGORITHM if manifest is None else manifest.algorithm)
    # What the result has of them; or all, where a bad answer would make a fault of what is right.
    rests_on = confirm_units(plan, plan.units if verification.differences else verification.transplanted, whole=True)
    faults = [f"{tensor} {what}" for tensor, what in verification.differences]
    if not faults and selection is None and not verification.transplanted and len(verification.alike) < len(plan.units):
        faults.append("nothing was edited: it is the unchanged target")
    if not faults and selection is not None and not verification.is_exactly(selection):
        found = " ".join(map(str, join(plan, verification.transplanted))) or "nothing"
        faults.append(f"the recipe says {' '.join(map(str, selection))}, but the result has {found}")
    units = verification.transplanted if selection is None else selection
    faults += plan.edit.faults(plan.models, plan.regions(units))
    faults += _extra_loaded_files(result, plan.target)
    notes = [*_differing_settings(result, plan.target), *_unpublished(out)]
    if unused:
        notes.append(f"the recipe does not use what it brings for {some_of(unused, MAX_KEYS)}")
    if manifest is not None:
        faults += _manifest_faults(out, manifest, verification, result)
        faults += _false_claims(manifest, plan, verification, selection)
    if write and not faults:
        if manifest is not None:
            raise UsageError(f"{out} has a {MANIFEST_NAME} already; leave out --write-manifest")
        content = manifest_text(manifest_of(result, plan, verification))
        with new_file(out / MANIFEST_NAME) as keep:
            keep(content)
        manifest = read_manifest(out)
    on = {
        model: f"{plan.models[model].name} at commit {plan.models[model].commit}, by {how}"
        for model, how in rests_on.items()
    }
    return Check(verification, tuple(dict.fromkeys(faults)), tuple(notes), manifest is not None, on)


def _refuse_private(name: str, recipe: Recipe) -> None:
    """Refuse a recipe that was published with models of which it names only the folders, as `push` writes them."""
    for role, location in models_of(recipe).items():
        if location.path.startswith("./") and not os.path.exists(location.path):
            raise CheckpointError(
                f"the {role} that {name} was made of, {location.path}, was a folder of whoever published it; name the "
                f"same model with --target or --source, or compare the files alone with --files-only"
            )


def check_manifest(out: Path, name: str | None = None) -> Check:
    """Compare a result's files with its manifest alone, without its target and source.

    Args:
        out: The result's folder.
        name: What messages call it; by default the folder.

    Raises:
        CheckpointError: If the manifest is absent or cannot be read.
    """
    manifest = _manifest(out)
    if manifest is None:
        raise CheckpointError(f"{name or out} has no {MANIFEST_NAME} to check its files against")
    with task("hashing", sum(file.num_bytes for file in manifest.files.values()), "bytes"):
        faults = check(out, manifest)
    if faults:
        return Check(None, tuple(faults), (), True)
    try:
        # Each file may be as it was written, and programs may still load others than those.
        find_model(str(out)).shards()
        return Check(None, (), tuple(_unpublished(out)), True)
    except CheckpointError as error:
        return Check(None, (str(error),), (), True)


@overload
def location_option(value: str, option: str) -> Location: ...


@overload
def location_option(value: str | None, option: str) -> Location | None: ...


def location_option(value: str | None, option: str) -> Location | None:
    """The model that an option of the command line names.

    Raises:
        UsageError: If the value is not a model's location.
    """
    try:
        return None if value is None else parse_location(value)
    except ValueError:
        raise UsageError(f"{option} is {value!r}; pass a folder, a Hub id or id@revision") from None


def _manifest(out: Path) -> Manifest | None:
    if not out.is_dir():
        raise CheckpointError(no_result(out))
    return read_manifest(out) if (out / MANIFEST_NAME).exists() else None


def no_result(out: Path) -> str:
    """The sentence on a result whose folder does not exist, with the nearest name of one that does."""
    return f"there is no folder {out} here{nearest_here(str(out), is_folder=True)}; name that of a result"


def _manifest_faults(out: Path, manifest: Manifest, verification: Verification, result: Checkpoint) -> list[str]:
    """The faults of a result according to its manifest; weight files are not read again."""
    known = {
        name: Digests(result.path(name).stat().st_size, digest, verification.tensors)
        for name, digest in verification.files.items()
    }
    faults = check(out, manifest, known=known)
    for name in sorted({re.sub(r"\[[0-9:,]*\]$", "", name) for name in verification.origins} - manifest.tensors.keys()):
        faults.append(f"{name} is not the target's, but {MANIFEST_NAME} does not say so")
    return faults


def _false_claims(
    manifest: Manifest, plan: Plan, verification: Verification, selection: Sequence[Unit] | None
) -> Iterator[str]:
    """Yields the manifest's false statements about the edit and the transplanted units."""
    if manifest.edit != plan.edit:
        yield f"{MANIFEST_NAME} says {_edit_text(manifest)}, but the recipe says {_edit_text(plan)}"
    units = (*verification.transplanted, *verification.alike) if selection is None else selection
    allowed = {name for unit in units for name in unit.tensors}
    for name in sorted(manifest.tensors.keys() - allowed):
        yield f"{MANIFEST_NAME} says that {name} was changed, but it is the target's"
    if selection is not None:
        try:
            said = spans(manifest.units)
        except ValueError:
            said = " ".join(manifest.units)[:200]
        if said != (meant := spans(join(plan, selection))):
            yield f"{MANIFEST_NAME} says that {said} was edited, but the recipe says {meant}"


def _edit_text(of: Manifest | Plan) -> str:
    return ", ".join(f"{key} {value}" for key, value in of.edit.to_json().items())


def _extra_loaded_files(result: Checkpoint, target: Checkpoint) -> Iterator[str]:
    """Yields faults for files that programs would load besides the compared weights, and the target lacks."""
    for path in sorted(result.folder.iterdir()):
        name = path.name
        if is_clutter(name) or is_for_other_programs(name):
            continue
        if name.startswith("adapter_") or (name.endswith(WEIGHTS) and name not in result.shards):
            yield f"{name} holds other weights, which programs may load instead or on top"
        elif name.endswith(".py"):
            theirs = target.folder / name
            if not theirs.is_file() or theirs.read_bytes() != path.read_bytes():
                yield f"{name} is code that the target does not have"
        elif name.endswith("config.json") and (code := _code(path) - _own_code(target, name)):
            yield f"{name} names code that the target's does not: {', '.join(sorted(code))}"


def _own_code(target: Checkpoint, name: str) -> set[str]:
    """The code that a target's settings file names, also in transformers' form with its origin as a prefix."""
    path = target.folder / name
    own = _code(path) if path.is_file() else set()
    return own | {f"{place}--{code}" for place in (target.name, target.folder) for code in own}


def _code(path: Path) -> set[str]:
    """The classes that a settings file tells programs to load from code next to it or on the Hub."""
    return named_classes(read_json(path))


def _unpublished(out: Path) -> Iterator[str]:
    """Yields notes on files in a result that are not parts of it: `push` refuses them, or leaves them here."""
    names = list(files_in(out))
    if others := foreign_files(out, names):
        yield f"`push` refuses what is not a part of a model; move it elsewhere: {some_of(others, MAX_KEYS)}"
    for name in names:
        if is_for_other_programs(name):
            yield f"{name} was not checked, and `push` leaves it here"
        elif name not in (*others, *PRIVATE):
            try:
                refuse_stray_link(out / name, out)
            except CheckpointError as error:
                yield f"`push` refuses {error}"
            else:
                if not (out / name).is_file():
                    yield f"`push` refuses {name}: it cannot be read as a file"


def _differing_settings(result: Checkpoint, target: Checkpoint) -> Iterator[str]:
    """Yields notes on config and tokenizer files of a result that differ from the target's."""
    ours, theirs = settings_files(result), settings_files(target)
    for name in sorted({*ours, *theirs}):
        if name not in ours:
            yield f"the target's {name} is not in the result"
        elif name in theirs and ours[name].read_bytes() != theirs[name].read_bytes():
            yield f"{name} is not the target's, byte for byte{_differing_keys(ours[name], theirs[name])}"


def _differing_keys(ours: Path, theirs: Path) -> str:
    """The end of a sentence that names the differing keys of two settings files; empty if they are not JSON objects."""
    try:
        one, other = read_json(ours), read_json(theirs)
    except CheckpointError:
        return ""
    keys = sorted(key for key in one.keys() | other.keys() if one.get(key, ...) != other.get(key, ...))
    return f"; it differs in {some_of([key[:60] for key in keys], MAX_KEYS)}" if keys else ", but says the same"


def check(folder: Path, manifest: Manifest | None = None, known: Mapping[str, Digests] | None = None) -> list[str]:
    """Read every file of a result and compare it, and its changed tensors, with the manifest.

    Args:
        folder: The result.
        manifest: Its expected content; by default its own `dapa.json`.
        known: Digests of files that were just read, by the manifest's algorithm, including those of all tensors that
            may have been changed.

    Returns:
        A sentence for each fault: a file that is missing, has a wrong size or wrong bytes, or is not in the manifest; a
        changed tensor that is missing or has wrong bytes.

    Raises:
        CheckpointError: If the manifest cannot be read.
    """
    manifest = manifest or read_manifest(folder)
    inside = folder.resolve()
    code = named_code(folder)

    def faults(name: str) -> list[str]:
        # Earlier versions listed all that lay in the target's folder, which `push` wants to be taken out again.
        if not os.path.lexists(folder / name) and (name in PRIVATE or not may_be_part(name, code)):
            return []
        changed = {tensor: entry for tensor, entry in manifest.tensors.items() if entry.file == name}
        return _faults(inside, name, manifest, changed, (known or {}).get(name))

    # Reading and hashing both let other threads run.
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = [fault for of_file in pool.map(faults, manifest.files) for fault in of_file]
    strays = [
        name
        for name in files_in(folder)
        if is_listed(name) and name not in manifest.files and not (may_be_added(name) or is_for_other_programs(name))
    ]
    return found + [f"{name} is not in {MANIFEST_NAME}" for name in strays]


def manifest_of(result: Checkpoint, plan: Plan, verification: Verification) -> Manifest:
    """The manifest of a result that was verified by `ALGORITHM`, which any program may have written.

    Raises:
        CheckpointError: If a changed tensor has another name than in the target.
    """
    boxes: dict[str, list[Box]] = {}
    for unit in verification.transplanted:
        for part in unit.parts:
            boxes.setdefault(part.tensor, []).append(part.box)
    tensors = {}
    for name, of_tensor in sorted(boxes.items()):
        if name not in result.tensors:
            raise CheckpointError(
                f"{result.name} has no tensor {name}, but has its values in another; no {MANIFEST_NAME} can be written"
            )
        tensor = result.tensors[name]
        is_whole = not remainder(whole_box(tensor.shape), of_tensor)
        parts = None if is_whole else tuple(sorted(of_tensor))
        tensors[name] = ChangedTensor(tensor.file, verification.tensors[name], parts)
    files = {}
    for name in filter(is_listed, files_in(result.folder)):
        path = result.folder / name
        files[name] = File(path.stat().st_size, verification.files.get(name) or hash_file(path, ALGORITHM).digest)
    return Manifest(
        version=__version__,
        models=origins(plan),
        edit=plan.edit,
        units=tuple(map(str, verification.transplanted)),
        files=files,
        tensors=tensors,
    )


def _faults(
    folder: Path, name: str, manifest: Manifest, changed: Mapping[str, ChangedTensor], known: Digests | None
) -> list[str]:
    path, expected = folder / name, manifest.files[name]
    try:
        # A file may be a link, as in a Hub cache; a folder may not lead elsewhere.
        if not path.is_file() or not path.parent.resolve().is_relative_to(folder):
            return [f"{name} is missing"]
        size = path.stat().st_size
        if size != expected.num_bytes:
            return [f"{name} has {size} bytes, not {expected.num_bytes}"]
        found = {tensor.name: tensor for tensor in read_header(path)} if changed else {}
        spans: dict[str, Span] = {
            tensor: (found[tensor].start, found[tensor].stop) for tensor in changed if tensor in found
        }
        is_known = known is not None and known.spans.keys() >= spans.keys()
        digests = known if known is not None and is_known else hash_file(path, manifest.algorithm, spans)
    except (CheckpointError, OSError, RuntimeError) as error:
        return [f"{name} cannot be read: {error}"]
    faults = [f"{name} does not match its digest in {MANIFEST_NAME}"] if digests.digest != expected.digest else []
    for tensor, entry in changed.items():
        if tensor not in found:
            faults.append(f"{tensor} is not in {name}")
        elif digests.spans[tensor] != entry.digest:
            faults.append(f"{tensor} does not match its digest in {MANIFEST_NAME}")
        elif entry.boxes is not None and not all(_fits(box, found[tensor].shape) for box in entry.boxes):
            faults.append(f"{tensor} does not have the changed parts recorded in {MANIFEST_NAME}")
    return faults


def _fits(box: tuple[tuple[int, int], ...], shape: tuple[int, ...]) -> bool:
    return len(box) == len(shape) and all(stop <= size for (_, stop), size in zip(box, shape, strict=True))
