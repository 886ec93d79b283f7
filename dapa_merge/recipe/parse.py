"""Parses mergekit's YAML into a frozen `Recipe`; errors name the key, its line and the allowed values.

`mergekit-yaml` and `dapa-merge` read the same file. mergekit's parameters are scalars, and a list is a gradient over
layers; a set of layers is therefore a string: `"3-6,9"`.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent

from dapa_merge.checkpoint.folder import read_regular
from dapa_merge.checkpoint.header import FLOAT_NAMES, MAX_DEPTH
from dapa_merge.checkpoint.location import Location, parse_location
from dapa_merge.checkpoint.units import AUTO, DIVISIBLE_MODULES, MODULES
from dapa_merge.errors import RecipeError, nearest_of, one_line, why_unreadable
from dapa_merge.files import nearest_here
from dapa_merge.recipe.parameters import MODULES_OF_EDITS, PARAMETERS, WHOLES_TEXT, overlap, rows_fault, task_file_in
from dapa_merge.recipe.recipe import METHOD, Recipe

ALLOWED_KEYS = (
    "merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "tokenizer", "tokenizer_source",
)  # fmt: skip
# mergekit's keys without meaning for a method that changes only weights of one model.
REFUSED_KEYS = {
    "slices": "DAPA repairs one whole model; name the source under `models`",
    "modules": "DAPA repairs one whole model; to choose what is edited use `parameters: modules:`",
    "chat_template": "the result keeps the target's own chat template; to ask with another, name it under `parameters`",
}


MAX_RECIPE_BYTES = 1 << 20
# Merge keys (`<<`) can make the content of an alias grow by a factor with each further alias; so few are harmless.
MAX_ALIASES = 20
# A number to the base 60, such as 1:30:00, takes time that grows with the square of its digits.
MAX_SEXAGESIMAL = 100
# The C library's parser is ten times as fast, and not everywhere.
_FAST: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(text: str) -> object:
    """Read the YAML of a stranger's card or lock, which has neither aliases nor deep nesting nor a key twice.

    Raises:
        ValueError: If it is not such YAML; says why in a few words.
    """
    try:
        _check_shape(text, _FAST, max_aliases=0)
        loader = _FAST(text)
        try:
            node = loader.get_single_node()
            _collect_lines(node, "", "it", {}, set())
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except Exception as error:
        # Values that contradict their tags raise various errors; yaml has no common class for them.
        is_told = isinstance(error, (ValueError, RecipeError))
        raise ValueError(getattr(error, "problem", None) or (str(error) if is_told else one_line(error))) from error


def _check_shape(text: str, loader: Any, max_aliases: int) -> None:
    """Raise `ValueError` if YAML is so deep, or has so many aliases or digits, that reading it would not end."""
    depth = num_aliases = 0
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        num_aliases += isinstance(event, AliasEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
        if num_aliases > max_aliases:
            raise ValueError(f"it has more than {max_aliases} aliases" if max_aliases else "it has an alias")
        if isinstance(event, ScalarEvent) and _is_long_sexagesimal(event.value):
            raise ValueError(f"it has a number of more than {MAX_SEXAGESIMAL} digits to the base 60")


def _is_long_sexagesimal(text: str) -> bool:
    return text.count(":") >= MAX_SEXAGESIMAL and not any(map(str.isalpha, text))


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe file.

    Raises:
        RecipeError: If the file cannot be read, is not YAML, or is not a valid recipe.
    """
    path = Path(path)
    try:
        text = read_regular(path, MAX_RECIPE_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        near = nearest_here(str(path)) if isinstance(error, FileNotFoundError) else ""
        raise RecipeError(f"cannot read the recipe {path}: {why_unreadable(error)}{near}") from error
    return replace(parse_recipe(text, str(path)), _folder=path.parent)


def parse_recipe(text: str, name: str = "recipe") -> Recipe:
    """Parse a recipe's text; messages call it `name`.

    Raises:
        RecipeError: If it is not YAML, or not a valid recipe.
    """
    lines: dict[str, str] = {}
    try:
        _check_shape(text, yaml.SafeLoader, MAX_ALIASES)
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        # First: constructing the document resolves merge keys inside the nodes.
        _collect_lines(node, "", name, lines, set())
        _refuse_other_bases(node, name, set())
        content = loader.construct_document(node) if node is not None else None
    except RecipeError:
        raise
    except Exception as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or one_line(error)
        raise RecipeError(f"{name}{line} is not YAML: {problem}") from error
    return recipe_from(content, lines=lines, name=name)


# Of YAML 1.1: `010` is 8, `0x10` is 16, and `3:30` is 210.
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9_]*)")


def _refuse_other_bases(node: yaml.Node | None, name: str, seen: set[int]) -> None:
    """Raise `RecipeError` for a number to another base than 10, which nobody means who writes layers."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        if node.tag == "tag:yaml.org,2002:int" and _DECIMAL.fullmatch(node.value) is None:
            raise RecipeError(
                f"{name}, line {node.start_mark.line + 1}: YAML reads {node.value[:40]} as a number to another base; "
                f"write a decimal number without leading zeros, or put it in quotes"
            )
        return
    pairs = node.value if isinstance(node, yaml.MappingNode) else [node.value]
    for part in (part for pair in pairs for part in pair):
        _refuse_other_bases(part, name, seen)


def pair_recipe(target: str, source: str, parameters: Mapping[str, object]) -> Recipe:
    """Build the recipe of a repair that tries one edit after the other.

    Args:
        target: The fine-tune.
        source: The aligned model.
        parameters: Further parameters.

    Raises:
        RecipeError: If it is not a valid recipe.
    """
    content: dict[str, object] = {"merge_method": METHOD, "base_model": target, "models": [{"model": source}]}
    # No file: messages begin with the name of the option itself.
    lines = dict.fromkeys((f"parameters.{name}" for name in parameters), "")
    return recipe_from({**content, "parameters": {"layers": AUTO, "edit": AUTO, **parameters}}, lines=lines)


def recipe_from(content: object, *, lines: Mapping[str, str] | None = None, name: str = "") -> Recipe:
    """Build a recipe from parsed YAML.

    Args:
        content: The document.
        lines: The place of each key, such as `models[0].model`, for messages; empty for none.
        name: The file, for messages about the recipe as a whole.

    Raises:
        RecipeError: If it is not a valid recipe.
    """
    return _Reader(dict(lines or {}), name or "the recipe").recipe(content)


class _Reader:
    """Reads one recipe; knows the line of each key."""

    def __init__(self, lines: dict[str, str], name: str) -> None:
        self.lines = lines
        self.name = name

    def fail(self, key: str, message: str) -> RecipeError:
        place = self.lines.get(key, self.name)
        return RecipeError(f"{place}: {message}" if place else message)

    def recipe(self, content: object) -> Recipe:
        if not isinstance(content, Mapping):
            raise self.fail("", f"a recipe is a mapping of keys, not {_kind(content)}")
        self.check_keys(content, "", ALLOWED_KEYS, REFUSED_KEYS)
        if content.get("merge_method") != METHOD:
            raise self.fail(
                "merge_method",
                f"merge_method is {_shown(content.get('merge_method'))}; dapa-merge reads only {METHOD!r}",
            )
        target = self.location(content.get("base_model"), "base_model", "the target, the model to repair")
        source = self.source(content, target)
        dtype = self.dtype(content)
        keeps_tokenizer = self.keeps_tokenizer(content)
        values = self.parameters(content.get("parameters"))
        recipe = Recipe(target, source, dtype, keeps_tokenizer=keeps_tokenizer, _lines=self.lines, **values)
        if recipe.granularity != "layer" and (whole := sorted(set(recipe.modules) - set(DIVISIBLE_MODULES))):
            raise self.fail(
                "parameters.granularity",
                f"granularity is {recipe.granularity}, but {' and '.join(whole)} cannot be divided; "
                f"only rows of {' and '.join(DIVISIBLE_MODULES)} are neurons",
            )
        if recipe.prefer not in (None, *recipe.modules) and recipe.modules and not recipe.is_auto:
            modules = ", ".join(recipe.modules)
            raise self.fail("parameters.prefer", f"prefer is {recipe.prefer}, but the recipe's modules are {modules}")
        return recipe

    def parameters(self, parameters: object) -> dict[str, Any]:
        if parameters is None:
            return {}
        if not isinstance(parameters, Mapping):
            raise self.fail("parameters", f"parameters must be a mapping, not {_kind(parameters)}")
        self.check_keys(parameters, "parameters.", tuple(PARAMETERS), {})
        values: dict[str, Any] = {}
        for key, value in parameters.items():
            if isinstance(value, (list, Mapping)):
                raise self.fail(
                    f"parameters.{key}",
                    f"{key} is {_kind(value)}, which is a gradient or a filter over tensors to mergekit; "
                    f"{PARAMETERS[key].allowed}",
                )
            try:
                values[key] = PARAMETERS[key].read(value)
            except (ValueError, TypeError, OverflowError):
                raise self.fail(f"parameters.{key}", f"{key} is {_shown(value)}; {PARAMETERS[key].allowed}") from None
        for key in ("skills", "evaluator"):
            if (file := task_file_in(values.get(key))) is not None:
                raise self.fail(
                    f"parameters.{key}",
                    f"{key} names the task file {_shown(file)}, which would run; write the task's name here, and "
                    f"name the file with --task-file (DAPA_TASK_FILE)",
                )
        if values.get("layers") and any(choice.module for choice in values["layers"]):
            values["modules"] = self.modules_of(values)
        elif values.get("edit") in MODULES_OF_EDITS and "modules" not in values:
            values["modules"] = MODULES_OF_EDITS[values["edit"]]
        return values

    def modules_of(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        named = {choice.module for choice in values["layers"]}
        if None in named or "modules" in values:
            raise self.fail(
                "parameters.layers",
                "layers names modules; then every entry must name one, and `modules` must be absent",
            )
        modules = tuple(module for module in MODULES if module in named)
        if fault := rows_fault(values["layers"]):
            raise self.fail("parameters.layers", f"layers names {fault}")
        if overlap(modules):
            raise self.fail("parameters.layers", f"layers names a module and a part of it; {WHOLES_TEXT}")
        return modules

    def check_keys(
        self, mapping: Mapping[Any, Any], prefix: str, known: Sequence[str], refused: Mapping[str, str]
    ) -> None:
        for key in mapping:
            if key in refused:
                raise self.fail(f"{prefix}{key}", f"{prefix}{key} cannot be used with {METHOD}: {refused[key]}")
            if key not in known:
                near = nearest_of(str(key), known)
                raise self.fail(
                    f"{prefix}{key}", f"unknown key {prefix}{str(key)[:80]}{near}; known are {', '.join(known)}"
                )

    def location(self, value: object, key: str, what: str) -> Location:
        adapter = None
        if isinstance(value, Mapping) and "model" in value and set(value) <= {"model", "lora"}:
            # mergekit's long forms: {model: id}, {model: {path: id, revision: main}}, and `lora:` next to `model:`.
            if value.get("lora") is not None:
                adapter = self.location({"model": value["lora"]}, key, "a LoRA adapter")
            value = value["model"]
            if isinstance(value, Mapping) and set(value) <= {"path", "revision"}:
                path, revision = value.get("path"), value.get("revision")
                if isinstance(path, str) and isinstance(revision, (str, type(None))):
                    return Location(path, revision, adapter)
        if not isinstance(value, str) or not value.strip():
            found = "is missing" if value is None else f"is {_shown(value)}"
            raise self.fail(key, f"{key} {found}; it must name {what}: a folder or a Hub id")
        try:
            location = parse_location(value)
        except ValueError:
            how = "path or path@revision, followed by +path for a LoRA"
            raise self.fail(key, f"{key} is {value!r}; write it as {how}") from None
        if adapter is None:
            return location
        if location.adapter is not None or adapter.adapter is not None:
            raise self.fail(key, f"{key} names two LoRAs, {location} and {adapter}; merge one into its model first")
        return replace(location, adapter=adapter)

    def source(self, content: Mapping[str, Any], target: Location) -> Location:
        models = content.get("models")
        what = "models must hold exactly one entry, `- model: SOURCE`, the aligned model"
        if models is None:
            raise self.fail("models", f"the source is missing: {what}")
        if not isinstance(models, list):
            raise self.fail("models", f"models is {_kind(models)}; {what}")
        found = []
        for index, entry in enumerate(models):
            key = f"models[{index}]"
            if not isinstance(entry, Mapping) or "model" not in entry:
                raise self.fail(key, f"{key} is {_kind(entry)}; {what}")
            if entry.get("parameters"):
                raise self.fail(f"{key}.parameters", f"{key} has parameters of its own; put them at the top level")
            self.check_keys(entry, f"{key}.", ("model", "parameters"), {})
            found.append(self.location(entry["model"], f"{key}.model", "the source, the aligned model"))
        sources = [location for location in found if location != target]
        if len(sources) > 1:
            names = ", ".join(map(str, sources))
            raise self.fail("models", f"there are {len(sources)} sources ({names}); {what}")
        if (found and not sources) or (sources and _same_folder(sources[0], target)):
            raise self.fail("models[0].model", f"the source is the target itself, {target}; name its aligned sibling")
        if not sources:
            raise self.fail("models", f"the source is missing: {what}")
        return sources[0]

    def dtype(self, content: Mapping[str, Any]) -> str | None:
        dtype, out_dtype = content.get("dtype"), content.get("out_dtype")
        for key, value in (("dtype", dtype), ("out_dtype", out_dtype)):
            if value is not None and not (isinstance(value, str) and value in FLOAT_NAMES):
                raise self.fail(key, f"{key} is {_shown(value)}; allowed are {', '.join(FLOAT_NAMES)}")
        if dtype and out_dtype and dtype != out_dtype:
            raise self.fail("out_dtype", f"out_dtype is {out_dtype} but dtype is {dtype}; DAPA never converts a target")
        return dtype or out_dtype

    def keeps_tokenizer(self, content: Mapping[str, Any]) -> bool:
        """Whether the recipe tells mergekit to keep the target's tokenizer; other settings are rejected."""
        for key, kept in (("tokenizer_source", "base"), ("tokenizer", {"source": "base"})):
            if content.get(key) not in (None, kept):
                allowed = "base" if key == "tokenizer_source" else "{source: base}"
                why = f"the result keeps the target's tokenizer, so only {allowed} is allowed"
                raise self.fail(key, f"{key} is {_shown(content[key])}; {why}")
        return content.get("tokenizer_source") is not None or content.get("tokenizer") is not None


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def _same_folder(one: Location, other: Location) -> bool:
    if one.adapter != other.adapter and not (
        one.adapter and other.adapter and _same_folder(one.adapter, other.adapter)
    ):
        return False
    folders = Path(one.path), Path(other.path)
    is_one = all(folder.is_dir() for folder in folders) and folders[0].samefile(folders[1])
    return is_one or (one.path, one.revision) == (other.path, other.revision)


def _kind(value: object) -> str:
    names = {list: "a list", dict: "a mapping", str: "a text", bool: "true or false", type(None): "empty"}
    return names.get(type(value)) or _shown(value)


def _shown(value: object) -> str:
    """A value in a message, shortened."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # A whole number of thousands of digits, which Python refuses to print.
        return "a very large number"


def _collect_lines(node: yaml.Node | None, key: str, name: str, lines: dict[str, str], seen: set[int]) -> None:
    """Record the line of every key below `node`; refuse repeated keys, which YAML allows."""
    # An alias is the node itself; without visiting each only once, a few lines of YAML could take forever.
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    lines.setdefault(key, f"{name}, line {node.start_mark.line + 1}")
    if isinstance(node, yaml.MappingNode):
        here = set()
        for key_node, value in node.value:
            child = f"{key}.{key_node.value}" if key else str(key_node.value)
            place = f"{name}, line {key_node.start_mark.line + 1}"
            if child in here:
                raise RecipeError(f"{place}: {child} is repeated")
            here.add(child)
            lines[child] = place
            _collect_lines(value, child, name, lines, seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _collect_lines(item, f"{key}[{index}]", name, lines, seen)
