"""Finds the boxes of each unit of a model, from the names and shapes of its tensors.

There is no table of model names and no code per architecture: the layers are found in the checkpoint itself. An MLP is
recognized by its set of projections (`spelling`), so a mixture's router (`mlp.gate`), a gate inside attention
(`self_attn.gate_proj`) or a vision tower is never mistaken for a gate projection. The same code serves a checkpoint's
files and a model in memory, which may name and fuse the same weights differently.

Quantized checkpoints are refused: their bytes are not floats that could be replaced.

Reference: N. Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202, for gate, up and down.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.checkpoint.region import Rows, Shapes, TensorBox
from dapa_merge.checkpoint.spelling import (
    ATTENTION_MODULES,
    LackingTensor,
    NoSuchModule,
    attention_parts,
    find_mlps,
    parts_of,
    spell,
)
from dapa_merge.errors import CheckpointError, UnsupportedArchitecture

MODULES = ("gate", "up", "down", "mlp", *ATTENTION_MODULES, "attention")
# Modules that consist of others.
WHOLES = {"mlp": ("gate", "up", "down"), "attention": ATTENTION_MODULES}
# The modules that are a layer's attention or a part of it; the others are of its MLP.
ATTENTION = ("attention", *ATTENTION_MODULES)
# In a recipe, the modules that the model turns out to have: `auto_modules`.
AUTO = "auto"
# Of MLP and attention, what `auto` stands for: the first that a model has, as separate units.
_AUTO_MLP = (("gate", "up", "down"), ("up", "down"), ("mlp",))
_AUTO_ATTENTION = (ATTENTION_MODULES, ("attention",))
# Modules that do not overlap, and together make up a layer except for its norms.
SEPARATE_MODULES = ("gate", "up", "down", "attention")
# Modules whose rows belong to one neuron each, so a block of rows can be a unit. (A row of down is a feature of the
# residual stream, to which all neurons write.)
DIVISIBLE_MODULES = ("gate", "up")

# Stacks of layers that do not generate the text. (`transformer.encoder` is missing: it is ChatGLM's only stack.)
OTHER_TOWERS = re.compile(r"vision|visual|image|vit(_|\.|$)|audio|speech|video|talker|(^|\.)mtp|projector|resampler")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
LANGUAGE_CONFIGS = ("text_config", "llm_config", "language_config")
# transformers classes for tasks other than text generation.
OTHER_HEADS = re.compile(r"For(?!CausalLM|ConditionalGeneration)[A-Z]")
_LAYER_NUMBER = re.compile(r"\.(\d{1,6})\.")


@dataclass(frozen=True)
class Unit:
    """The smallest part of a model that can be transplanted: one module of one layer, or a block of its rows.

    Units are equal if their layers, modules and rows are, whichever tensors hold them.

    Attributes:
        layer: Layer number, from 0.
        module: One of `MODULES`.
        whole_parts: The boxes of the weights, and of any biases, that hold all rows of the module.
        rows: The block's rows, for `DIVISIBLE_MODULES`; None for all rows. A mixture's rows are numbered expert by
            expert, a shared expert last.
    """

    layer: int
    module: str
    whole_parts: tuple[TensorBox, ...] = field(compare=False, repr=False)
    rows: Rows | None = None

    def __str__(self) -> str:
        return f"{self.layer}.{self.module}{rows_text(self.rows)}"

    @property
    def whole(self) -> Unit:
        """The unit of all rows of this module."""
        return self if self.rows is None else replace(self, rows=None)

    @property
    def parts(self) -> tuple[TensorBox, ...]:
        """The boxes of tensors that hold it."""
        if self.rows is None:
            return self.whole_parts
        narrowed = (part.narrow(self.rows) for part in self.whole_parts)
        return tuple(part for part in narrowed if part is not None)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the tensors that hold it, each once."""
        return tuple(dict.fromkeys(part.tensor for part in self.parts))

    @property
    def num_rows(self) -> int:
        """Number of rows of the whole module."""
        return max(part.first_row + part.num_rows for part in self.whole_parts)


def rows_text(rows: Rows | None) -> str:
    """Rows as recipes write them after a module: `[64:128]`, or nothing for all rows."""
    return "" if rows is None else f"[{rows[0]}:{rows[1]}]"


def join_ranges(ranges: Iterable[Rows]) -> list[Rows]:
    """Sort ranges of rows, and merge those that touch or overlap."""
    joined: list[Rows] = []
    for first, stop in sorted(ranges):
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((first, stop))
    return joined


def find_units(config: Mapping[str, Any], shapes: Shapes, modules: Sequence[str] = ("gate",)) -> tuple[Unit, ...]:
    """All units of the given modules, by layer and then in the order of `modules`.

    Raises:
        UnsupportedArchitecture: If this architecture lacks such projections, or they cannot be located.
        CheckpointError: If a layer lacks a tensor that others have, or the number of layers is not the config's.
    """
    architecture = architecture_name(config)
    stack = _language_stack(config, shapes, architecture)
    try:
        by_layer = _parts_by_layer(stack, modules)
    except LackingTensor as lacking:
        raise CheckpointError(
            f"the checkpoint lacks tensor {stack.prefix}.{lacking}, which {architecture} with {len(stack.layers)} "
            f"layers must have; download the model again"
        ) from None
    except NoSuchModule as absent:
        raise UnsupportedArchitecture(f"{architecture} {absent}") from None
    return tuple(
        Unit(layer, module, parts)
        for layer, by_module in enumerate(by_layer)
        for module, parts in by_module.items()
        # A layer may have another mixer instead of attention.
        if parts
    )


def auto_modules(config: Mapping[str, Any], shapes: Shapes) -> tuple[str, ...]:
    """The modules that `modules: auto` stands for: the smallest that can be told apart in a model.

    Raises:
        CheckpointError: If its MLPs are not found; `UnsupportedArchitecture` if it is of an unknown kind.
    """
    for mlp in _AUTO_MLP:
        try:
            find_units(config, shapes, mlp)
            break
        except UnsupportedArchitecture:
            if mlp == _AUTO_MLP[-1]:
                raise
    for attention in _AUTO_ATTENTION:
        # Where layers differ in their attention, some seem to lack a projection.
        with contextlib.suppress(CheckpointError):
            find_units(config, shapes, attention)
            return (*mlp, *attention)
    return mlp


def parts_of_modules(modules: Iterable[str]) -> set[str]:
    """The modules that others consist of: gate, up and down for mlp, and a module itself where it has no parts."""
    return {part for module in modules for part in WHOLES.get(module, (module,))}


def architecture_name(config: Mapping[str, Any], name: str = "") -> str:
    """The one class name in `architectures` of a `config.json`; messages call the model `name`.

    Raises:
        CheckpointError: If there is not exactly one.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        whose = f"the config.json of {name}" if name else "config.json"
        raise CheckpointError(f"{whose} must name exactly one architecture, but says {names!r}")
    return names[0]


def is_sibling(config: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two models are of one family: of one class, or of two that generate text by the same kind of tower.

    A fine-tune of the language tower alone (Gemma3ForCausalLM) is a sibling of the multimodal model
    (Gemma3ForConditionalGeneration), whose config describes the same tower. Sizes are not compared here.

    Raises:
        CheckpointError: If one does not name exactly one architecture.
    """
    names = [architecture_name(one) for one in (config, other)]
    if names[0] == names[1]:
        return True
    towers = [_language_config(one) for one in (config, other)]
    kind, other_kind = (tower.get("model_type") for tower in towers)
    # Two models of text alone, such as a classifier and its base, are told apart by their classes.
    has_other_towers = towers[0] is not config or towers[1] is not other
    is_same_kind = isinstance(kind, str) and kind == other_kind
    return has_other_towers and is_same_kind and not any(map(OTHER_HEADS.search, names))


def _language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language tower: all of it for a model of text alone."""
    return next((config[key] for key in LANGUAGE_CONFIGS if isinstance(config.get(key), Mapping)), config)


def layer_number(tensor: str) -> int | None:
    """The number of the layer that a tensor's name tells; None without one."""
    match = _LAYER_NUMBER.search(tensor)
    return None if match is None else int(match[1])


def layer_path(tensor: str) -> str:
    """The beginning of a tensor's name, up to and including the layer's number."""
    match = _LAYER_NUMBER.search(tensor)
    assert match is not None
    return tensor[: match.end() - 1]


@dataclass(frozen=True)
class _Stack:
    """A stack of layers: the prefix of its tensors' names before the number, and each layer's tensors without it."""

    prefix: str
    layers: tuple[Shapes, ...]


def _language_stack(config: Mapping[str, Any], shapes: Shapes, architecture: str) -> _Stack:
    """The layers that generate the text, as many as the config says."""
    count, num_additional = _num_layers(config, architecture)
    stacks = [stack for stack in _stacks(shapes) if spell(stack.layers)]
    if len(stacks) > 1:
        stacks = [stack for stack in stacks if not OTHER_TOWERS.search(stack.prefix)]
    if len(stacks) > 1:
        stacks = [stack for stack in stacks if len(stack.layers) == count]
    if not stacks:
        raise UnsupportedArchitecture(f"{architecture} has no MLP with known projection names; it is not supported yet")
    if len(stacks) > 1:
        prefixes = ", ".join(stack.prefix for stack in stacks)
        raise UnsupportedArchitecture(
            f"{architecture} has {len(stacks)} stacks of layers with an MLP ({prefixes}), and the language model's "
            f"cannot be told apart; it is not supported yet"
        )
    found = len(stacks[0].layers)
    if found not in (count, count + num_additional):
        raise CheckpointError(f"config.json of this {architecture} says {count} layers, but the tensors have {found}")
    return replace(stacks[0], layers=stacks[0].layers[:count])


def _num_layers(config: Mapping[str, Any], architecture: str) -> tuple[int, int]:
    """The config's number of layers, and of additional layers for multi-token prediction that may follow."""
    inner = [config[key] for key in LANGUAGE_CONFIGS if isinstance(config.get(key), Mapping)]
    for part in (*inner, config):
        for key in LAYER_COUNTS:
            if key in part:
                count, additional = part[key], part.get("num_nextn_predict_layers", 0)
                if type(count) is not int:
                    raise CheckpointError(
                        f"config.json of this {architecture} says {count!r} layers, which is not a whole number"
                    )
                return count, additional if type(additional) is int else 0
    raise CheckpointError(f"config.json of this {architecture} lacks num_hidden_layers, its number of layers")


def _stacks(shapes: Shapes) -> Iterator[_Stack]:
    """Yields the stacks of numbered layers in a checkpoint, by the prefix before the first number."""
    by_prefix: dict[str, dict[int, dict[str, tuple[int, ...]]]] = {}
    for name, shape in shapes.items():
        if match := _LAYER_NUMBER.search(name):
            layers = by_prefix.setdefault(name[: match.start()], {})
            layers.setdefault(int(match[1]), {})[name[match.end() :]] = shape
    for prefix, layers in sorted(by_prefix.items()):
        # A number far beyond the others is not a layer's, and must not create a million layers.
        count = max(layers) + 1 if max(layers) < 2 * len(layers) + 8 else len(layers)
        yield _Stack(prefix, tuple(layers.get(layer, {}) for layer in range(count)))


def _parts_by_layer(stack: _Stack, modules: Sequence[str]) -> list[dict[str, tuple[TensorBox, ...]]]:
    """The boxes of each layer's modules, in the order of `modules`.

    Raises:
        LackingTensor: If a layer lacks a tensor that others have; the message begins with the layer's number.
        NoSuchModule: If a module is absent or cannot be located.
    """
    spellings = spell(stack.layers)
    attention = attention_parts(stack.layers, [name for name in modules if name in ATTENTION])
    by_layer = []
    for number, layer in enumerate(stack.layers):
        try:
            mlps = find_mlps(layer, spellings)
        except LackingTensor as lacking:
            raise LackingTensor(f"{number}.{lacking}") from None
        if not mlps:
            raise NoSuchModule(f"has no MLP in layer {number}, unlike other layers; it is not supported yet")
        mixer = attention[number]
        parts = {module: mixer[module] if module in mixer else parts_of(mlps, module, layer) for module in modules}
        by_layer.append({module: _placed(found, f"{stack.prefix}.{number}.") for module, found in parts.items()})
    return by_layer


def _placed(parts: Sequence[TensorBox], prefix: str) -> tuple[TensorBox, ...]:
    """The same boxes, with a prefix to their tensors' names."""
    return tuple(replace(part, tensor=prefix + part.tensor) for part in parts)


# Tensors that each method stores next to a weight, for checkpoints whose config does not name the method.
TENSOR_SIGNS = (
    ("bitsandbytes", re.compile(r"\.(SCB|absmax|quant_map|nested_absmax|quant_state\.bitsandbytes__\w+)$")),
    ("GPTQ", re.compile(r"\.g_idx$")),
    ("AWQ or GPTQ", re.compile(r"\.(qweight|qzeros)$")),
    ("compressed-tensors", re.compile(r"\.weight_(packed|shape|zero_point)$")),
    ("FP8 with scales", re.compile(r"\.(weight_scale|weight_scale_inv|input_scale|activation_scale)$")),
    ("MXFP4", re.compile(r"_proj_(blocks|scales)$")),
    ("HQQ", re.compile(r"\.W_q$")),
)


def check_not_quantized(checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` if a checkpoint's config or tensors show that it is quantized."""
    if method := _method(checkpoint):
        raise CheckpointError(
            f"{checkpoint.name} is quantized ({method}); repair the unquantized model and quantize the result"
        )


def _method(checkpoint: Checkpoint) -> str | None:
    for config in (checkpoint.config, checkpoint.config.get("text_config")):
        if isinstance(config, dict) and (said := config.get("quantization_config")):
            name = said.get("quant_method") if isinstance(said, dict) else None
            return str(name or "by its config.json")
    for name in checkpoint.tensors:
        for method, sign in TENSOR_SIGNS:
            if sign.search(name):
                return f"{method}, by its tensor {name}"
    return None
