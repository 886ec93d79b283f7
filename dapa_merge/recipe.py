"""mergekit's YAML, read once into a frozen `Recipe`; every error names the key, its line and what is allowed.

The same file feeds `mergekit-yaml` and `dapa-merge`. mergekit's parameters are scalars, and a list there means a
gradient over layers, so a set of layers is a string: `"3-6,9"`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from dapa_merge.errors import RecipeError

METHOD = "dapa"
ALLOWED_KEYS = (
    "merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "tokenizer", "tokenizer_source",
)  # fmt: skip
# Meaningful to mergekit, but not for a method that changes nothing but weights of one model.
REFUSED_KEYS = {
    "slices": "DAPA repairs one whole model; name the source under `models`",
    "modules": "DAPA repairs one whole model; to choose what is transplanted use `parameters: modules:`",
    "chat_template": "the result keeps the target's own chat template",
}
MODULES = ("gate", "up", "down", "mlp", "attention")
AUTO_MODULES = ("gate", "up", "down", "attention")
EVALUATORS = ("refusal",)
SEARCHES = ("ddmin",)
DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class Location:
    """A model: a folder, or a Hub id, with an optional revision."""

    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


@dataclass(frozen=True)
class LayerChoice:
    """One entry of `layers`: a layer, and the module of it if one was named (`"4.down"`)."""

    layer: int
    module: str | None = None


@dataclass(frozen=True)
class Recipe:
    """What to repair, with what, and how well; immutable.

    Attributes:
        target: mergekit's `base_model`.
        source: The one other model.
        dtype: mergekit's `dtype`, which must be the target's own.
        layers: What to transplant, or None to search.
        modules: Which modules of a layer are units.
        evaluator: Name of what scores a candidate.
        prompts: Name or path of the prompt set.
        retain: Share of the full transplant's gain in DSR that must be kept, in (0, 1].
        max_over_refusal: Rise of over-refusal allowed over the target's own, in [0, 1].
        max_perplexity: Perplexity allowed, as a ratio to the target's own, at least 1.
        search: Name of the algorithm.
        max_new_tokens: Where responses are cut off.
        batch_size: Prompts that are answered at once.
        text: The YAML as it was read.
    """

    target: Location
    source: Location
    dtype: str | None = None
    layers: tuple[LayerChoice, ...] | None = None
    modules: tuple[str, ...] = ("gate",)
    evaluator: str = "refusal"
    prompts: str = "builtin"
    retain: float = 0.95
    max_over_refusal: float = 0.05
    max_perplexity: float = 1.05
    search: str = "ddmin"
    max_new_tokens: int = 100
    batch_size: int = 32
    text: str = field(default="", compare=False)
    _lines: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def where(self, key: str) -> str:
        """The place of a key for messages: the file and line if they are known, and the key."""
        return f"{self._lines[key]}: {key}" if key in self._lines else key


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        RecipeError: If it cannot be read, is no YAML, or is not a recipe that can be followed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise RecipeError(f"cannot read the recipe {path}: {reason}") from error
    return parse_recipe(text, str(path))


def parse_recipe(text: str, name: str = "recipe") -> Recipe:
    """Parse the text of a recipe; `name` stands for the file in messages.

    Raises:
        RecipeError: If it is no YAML, or not a recipe that can be followed.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        content = loader.construct_document(node) if node is not None else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{name}{line} is no YAML: {problem}") from error
    lines: dict[str, str] = {}
    _collect_lines(node, "", name, lines)
    return recipe_from(content, lines=lines, text=text, name=name)


def recipe_from(content: object, *, lines: Mapping[str, str] | None = None, text: str = "", name: str = "") -> Recipe:
    """Build a recipe from parsed YAML.

    Args:
        content: What the YAML held.
        lines: For each key, as `models[0].model`, where it stands.
        text: The YAML itself.
        name: The file, for messages about the recipe as a whole.

    Raises:
        RecipeError: If it is not a recipe that can be followed.
    """
    return _Reader(dict(lines or {}), name or "the recipe").recipe(content, text)


def parse_layers(text: str) -> tuple[LayerChoice, ...]:
    """Parse `"3-6,9"` or `"4.down,5.gate"`; sorted, without repetition.

    Raises:
        ValueError: If it is neither.
    """
    choices: set[LayerChoice] = set()
    for item in text.split(","):
        span, _, module = item.strip().partition(".")
        first, dash, last = span.partition("-")
        if not first.strip().isdigit() or (dash and not last.strip().isdigit()) or (module and module not in MODULES):
            raise ValueError(item.strip())
        start, stop = int(first), int(last) if dash else int(first)
        if stop < start or stop - start > 10_000:
            raise ValueError(item.strip())
        choices |= {LayerChoice(layer, module or None) for layer in range(start, stop + 1)}
    return tuple(sorted(choices, key=lambda choice: (choice.layer, choice.module or "")))


class _Reader:
    """Reads one recipe; knows where each key stands."""

    def __init__(self, lines: dict[str, str], name: str) -> None:
        self.lines = lines
        self.name = name

    def fail(self, key: str, message: str) -> RecipeError:
        place = self.lines.get(key, self.name)
        return RecipeError(f"{place}: {message}")

    def recipe(self, content: object, text: str) -> Recipe:
        if not isinstance(content, Mapping):
            raise self.fail("", f"a recipe is a mapping of keys, not {_kind(content)}")
        self.check_keys(content, "", ALLOWED_KEYS, REFUSED_KEYS)
        if content.get("merge_method") != METHOD:
            raise self.fail(
                "merge_method", f"merge_method is {content.get('merge_method')!r}; dapa-merge follows {METHOD!r} only"
            )
        target = self.location(content.get("base_model"), "base_model", "the target, the model to repair")
        source = self.source(content, target)
        dtype = self.dtype(content)
        self.check_tokenizer(content)
        parameters = content.get("parameters")
        if parameters is None:
            parameters = {}
        if not isinstance(parameters, Mapping):
            raise self.fail("parameters", f"parameters must be a mapping, not {_kind(parameters)}")
        self.check_keys(parameters, "parameters.", tuple(PARAMETERS), {})
        values: dict[str, Any] = {}
        for key, value in parameters.items():
            if isinstance(value, (list, Mapping)):
                raise self.fail(
                    f"parameters.{key}",
                    f"{key} is {_kind(value)}, which mergekit takes for a gradient or a filter over tensors; "
                    f"{PARAMETERS[key].allowed}",
                )
            try:
                values[key] = PARAMETERS[key].read(value)
            except (ValueError, TypeError, OverflowError):
                raise self.fail(f"parameters.{key}", f"{key} is {value!r}; {PARAMETERS[key].allowed}") from None
        values.pop("strength", None)
        if values.get("layers") and any(choice.module for choice in values["layers"]):
            if not all(choice.module for choice in values["layers"]) or "modules" in values:
                raise self.fail(
                    "parameters.layers",
                    "layers names modules; then every entry must name one, and `modules` must be left out",
                )
            values["modules"] = tuple(
                module for module in MODULES if module in {choice.module for choice in values["layers"]}
            )
        return Recipe(target=target, source=source, dtype=dtype, text=text, _lines=self.lines, **values)

    def check_keys(
        self, mapping: Mapping[Any, Any], prefix: str, known: Sequence[str], refused: Mapping[str, str]
    ) -> None:
        for key in mapping:
            if key in refused:
                raise self.fail(f"{prefix}{key}", f"{prefix}{key} cannot be used with {METHOD}: {refused[key]}")
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ";"
                raise self.fail(f"{prefix}{key}", f"unknown key {prefix}{key}{hint} known are {', '.join(known)}")

    def location(self, value: object, key: str, what: str) -> Location:
        if isinstance(value, Mapping) and isinstance(value.get("model"), (str, Mapping)) and not value.get("lora"):
            value = value["model"]
        if isinstance(value, Mapping) and isinstance(value.get("path"), str):
            return Location(value["path"], value.get("revision"))
        if not isinstance(value, str) or not value.strip():
            found = "is missing" if value is None else f"is {value!r}"
            raise self.fail(key, f"{key} {found}; it must name {what}: a folder or a Hub id")
        if "+" in value:
            raise self.fail(key, f"{key} is {value!r}: merge the LoRA into its model first")
        path, at, revision = value.partition("@")
        if "@" in revision or (at and not (path and revision)):
            raise self.fail(key, f"{key} is {value!r}; write it as path or path@revision")
        return Location(path, revision or None)

    def source(self, content: Mapping[str, Any], target: Location) -> Location:
        models = content.get("models")
        what = "models must hold exactly one entry, `- model: SOURCE`, the aligned model"
        if models is None:
            raise self.fail("models", f"there is no source: {what}")
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
            raise self.fail("models", f"there is no source: {what}")
        return sources[0]

    def dtype(self, content: Mapping[str, Any]) -> str | None:
        dtype, out_dtype = content.get("dtype"), content.get("out_dtype")
        for key, value in (("dtype", dtype), ("out_dtype", out_dtype)):
            if value is not None and value not in DTYPES:
                raise self.fail(key, f"{key} is {value!r}; allowed are {', '.join(DTYPES)}")
        if dtype and out_dtype and dtype != out_dtype:
            raise self.fail("out_dtype", f"out_dtype is {out_dtype} but dtype is {dtype}; DAPA never converts a target")
        return dtype or out_dtype

    def check_tokenizer(self, content: Mapping[str, Any]) -> None:
        tokenizer = content.get("tokenizer")
        source = tokenizer.get("source") if isinstance(tokenizer, Mapping) else tokenizer
        if content.get("tokenizer_source") is not None:
            source = content["tokenizer_source"]
        if source not in (None, "base"):
            key = "tokenizer_source" if "tokenizer_source" in content else "tokenizer"
            raise self.fail(
                key, f"{key} is {source!r}; the result keeps the target's tokenizer, so only 'base' is allowed"
            )


@dataclass(frozen=True)
class Parameter:
    """How one entry of `parameters` is read, and the words for what it may be."""

    read: Callable[[Any], Any]
    allowed: str


def _number(low: float, high: float, *, above: bool = False) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
        if not (low < number if above else low <= number) or not number <= high or math.isnan(number):
            raise ValueError
        return number

    return read


def _count(value: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value) or int(value) < 1:
        raise ValueError
    return int(value)


def _name(known: Sequence[str] = ()) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if not isinstance(value, str) or not value.strip() or (known and value not in known):
            raise ValueError
        return value

    return read


def _layers(value: Any) -> tuple[LayerChoice, ...] | None:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise TypeError
    return None if value == "auto" else parse_layers(str(value))


def _modules(value: Any) -> tuple[str, ...]:
    if value == "auto":
        return AUTO_MODULES
    names = tuple(name.strip() for name in str(value).split(","))
    overlapping = "mlp" in names and {"gate", "up", "down"} & set(names)
    if len(set(names)) != len(names) or not set(names) <= set(MODULES) or overlapping:
        raise ValueError
    return names


def _strength(value: Any) -> float:
    if isinstance(value, bool) or float(value) != 1.0:
        raise ValueError
    return 1.0


PARAMETERS: dict[str, Parameter] = {
    "layers": Parameter(_layers, 'write a string: auto to search, or layers as in "3-6,9" or "4.down,5.gate"'),
    "modules": Parameter(
        _modules, f"write auto, or a comma list of {', '.join(MODULES)} (mlp is gate, up and down together)"
    ),
    "strength": Parameter(_strength, "only 1.0, a plain copy, is available in this version"),
    "evaluator": Parameter(_name(EVALUATORS), f"available in this version: {', '.join(EVALUATORS)}"),
    "prompts": Parameter(_name(), "write the name of a packaged set (builtin, miniature), or a file or folder"),
    "retain": Parameter(_number(0, 1, above=True), "write a share above 0 and up to 1"),
    "max_over_refusal": Parameter(_number(0, 1), "write a share from 0 to 1"),
    "max_perplexity": Parameter(_number(1, math.inf), "write a ratio of at least 1"),
    "search": Parameter(_name(SEARCHES), f"available in this version: {', '.join(SEARCHES)}"),
    "max_new_tokens": Parameter(_count, "write a whole number of at least 1"),
    "batch_size": Parameter(_count, "write a whole number of at least 1"),
}
DEFAULTS = {item.name: item.default for item in fields(Recipe) if item.name in PARAMETERS}


def _same_folder(one: Location, other: Location) -> bool:
    if one == other:
        return True
    folders = Path(one.path), Path(other.path)
    return all(folder.is_dir() for folder in folders) and folders[0].samefile(folders[1])


def _kind(value: object) -> str:
    names = {list: "a list", dict: "a mapping", str: "a text", bool: "true or false", type(None): "empty"}
    return names.get(type(value), f"{value!r}")


def _collect_lines(node: yaml.Node | None, key: str, name: str, lines: dict[str, str]) -> None:
    """Note the line of every key below `node`, refusing a key that stands twice, which YAML would let pass."""
    if node is None:
        return
    lines.setdefault(key, f"{name}, line {node.start_mark.line + 1}")
    if isinstance(node, yaml.MappingNode):
        for key_node, value in node.value:
            child = f"{key}.{key_node.value}" if key else str(key_node.value)
            place = f"{name}, line {key_node.start_mark.line + 1}"
            if child in lines:
                raise RecipeError(f"{place}: {child} stands here a second time")
            lines[child] = place
            _collect_lines(value, child, name, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _collect_lines(item, f"{key}[{index}]", name, lines)
