"""Where the units of a model live: from its architecture to the names of its tensors.

No table of model names. mergekit ships a definition of each architecture that it knows (JSON, read here without
importing mergekit's code, which would load torch); for the others the layers are read off the checkpoint. In either
case a gated MLP is recognized by the three projections that stand side by side in it, and every tensor named here is
one that the checkpoint really has. So a mixture-of-experts router (`mlp.gate`), a gate inside attention
(`self_attn.gate_proj`) or a vision tower is never mistaken for a gate projection.

Reference: N. Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202, for gate, up and down.
"""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from dapa_merge.errors import CheckpointError, UnsupportedArchitecture

MODULES = ("gate", "up", "down", "mlp", "attention")
# What `modules: auto` in a recipe offers to the search, as separate units.
AUTO_MODULES = ("gate", "up", "down")
# Modules of which every row is one neuron's, so that a block of rows can be a unit. (A row of down is no neuron's: it
# is one feature of the residual stream, to which all neurons write.)
DIVISIBLE_MODULES = ("gate", "up")
# The first row of a range, and the row after its last.
Rows = tuple[int, int]

# How a gated MLP is spelled: gate, up and down, side by side under one parent. The gate is the projection whose output
# goes through the activation. (Qwen 1 activates w2, Jais c_fc2; InternLM2 and LFM2 activate w1.)
GATED_MLPS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("w2", "w1", "c_proj"),
    ("c_fc_0", "c_fc_1", "c_proj"),
    ("c_fc2", "c_fc", "c_proj"),
)
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
# Signs of what a later version will handle, each with the words that refuse it.
MIXTURE_OF_EXPERTS = re.compile(r"\.(experts|shared_experts?)\.")
FUSED_GATES = ("gate_up_proj", "dense_h_to_4h", "input_linear")

LAYER = "${layer_index}"
_LAYER_NUMBER = re.compile(r"\.(\d{1,6})\.")


@dataclass(frozen=True)
class Unit:
    """The smallest thing that is transplanted or left: one module of one layer, or a block of its rows.

    Attributes:
        layer: Layer number, from 0.
        module: One of `MODULES`.
        tensors: Names of its tensors in the checkpoint: weights `[out, in]` and, where there are any, biases `[out]`.
        rows: Which rows of these tensors it is, for one of `DIVISIBLE_MODULES`; None for all of them.
    """

    layer: int
    module: str
    tensors: tuple[str, ...]
    rows: Rows | None = None

    def __str__(self) -> str:
        return f"{self.layer}.{self.module}{rows_text(self.rows)}"

    @property
    def whole(self) -> Unit:
        """The unit of all rows that this one is a part of."""
        return self if self.rows is None else replace(self, rows=None)


def rows_text(rows: Rows | None) -> str:
    """Rows as recipes write them behind a module: `[64:128]`, or nothing for all of them."""
    return "" if rows is None else f"[{rows[0]}:{rows[1]}]"


def join_ranges(ranges: Iterable[Rows]) -> list[Rows]:
    """The same rows in as few ranges as can be, in order: those that touch or overlap become one."""
    joined: list[Rows] = []
    for first, stop in sorted(ranges):
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((first, stop))
    return joined


def find_units(
    config: Mapping[str, Any], tensor_names: Collection[str], modules: Sequence[str] = ("gate",)
) -> tuple[Unit, ...]:
    """All units of the given modules, by layer and then in the order of `modules`.

    Args:
        config: The checkpoint's `config.json`.
        tensor_names: The names of the tensors in the checkpoint.
        modules: Some of `MODULES`, without repetition.

    Raises:
        UnsupportedArchitecture: If this architecture has no separate projections of that kind.
        CheckpointError: If a layer lacks a tensor that the others have, or the count of layers is not the config's.
    """
    architecture = architecture_name(config)
    layers = _language_layers(config, frozenset(tensor_names), architecture)
    parts = _parts_of_a_layer(layers.templates, modules, architecture)
    units = []
    for layer in range(layers.count):
        for module in modules:
            names = [_place(template, layer) for template in parts[module]]
            missing = [name for name in names if name not in tensor_names]
            if missing:
                raise CheckpointError(
                    f"the checkpoint lacks tensor {missing[0]}, which {architecture} with {layers.count} layers "
                    f"must have; download the model again"
                )
            biases = [name.removesuffix(".weight") + ".bias" for name in names]
            units.append(Unit(layer, module, (*names, *(bias for bias in biases if bias in tensor_names))))
    return tuple(units)


def architecture_name(config: Mapping[str, Any]) -> str:
    """The one class name in `architectures` of a `config.json`.

    Raises:
        CheckpointError: If there is not exactly one.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise CheckpointError(f"config.json must name exactly one architecture, but says {names!r}")
    return names[0]


@dataclass(frozen=True)
class _Layers:
    """The stack of layers of a language model: its tensor names with `LAYER` for the number, and how many."""

    templates: tuple[str, ...]
    count: int


def _language_layers(config: Mapping[str, Any], tensor_names: frozenset[str], architecture: str) -> _Layers:
    if any(MIXTURE_OF_EXPERTS.search(name) for name in tensor_names):
        raise UnsupportedArchitecture(
            f"{architecture} is a mixture of experts; only dense models can be repaired so far"
        )
    definition = _definition(architecture, config.get("model_type"))
    stacks = _stacks(tensor_names)
    if definition is None:
        gated = [stack for stack in stacks if _gated_mlp(stack.templates) is not None]
        if len(gated) != 1:
            raise UnsupportedArchitecture(
                f"{architecture} is not defined in mergekit, and its checkpoint has {len(gated)} stacks of layers "
                f"with separate gate projections where one was expected; it cannot be repaired so far"
            )
        templates, count = gated[0].templates, config.get("num_hidden_layers", gated[0].count)
    else:
        if "modules" in definition:
            raise UnsupportedArchitecture(
                f"{architecture} has several towers ({', '.join(definition['modules'])}); "
                f"only text-only decoders can be repaired so far"
            )
        templates = tuple(weight["name"] for weight in definition["layer_templates"]["weights"])
        key = definition["num_layers_config_key"]
        if key not in config:
            raise CheckpointError(f"config.json of this {architecture} lacks {key}, its number of layers")
        count = config[key]
    if type(count) is not int:
        raise CheckpointError(f"config.json of this {architecture} says {count!r} layers, which is no whole number")
    found = max((stack.count for stack in stacks if set(stack.templates) & set(templates)), default=0)
    if found != count:
        raise CheckpointError(
            f"config.json of this {architecture} says {count} layers, but the tensors are those of {found}"
        )
    return _Layers(templates, count)


def _stacks(tensor_names: Iterable[str]) -> list[_Layers]:
    """The numbered stacks that a checkpoint's tensor names form, by what stands before the first number."""
    templates: dict[str, set[str]] = {}
    counts: dict[str, int] = {}
    for name in tensor_names:
        if match := _LAYER_NUMBER.search(name):
            prefix = name[: match.start()]
            template = f"{prefix}.{LAYER}.{name[match.end() :]}"
            templates.setdefault(prefix, set()).add(template)
            counts[prefix] = max(counts.get(prefix, 0), int(match.group(1)) + 1)
    return [_Layers(tuple(sorted(templates[prefix])), counts[prefix]) for prefix in sorted(templates)]


def _parts_of_a_layer(
    templates: Sequence[str], modules: Sequence[str], architecture: str
) -> dict[str, tuple[str, ...]]:
    """For each module, the templates of its weights."""
    parts: dict[str, tuple[str, ...]] = {}
    if any(module != "attention" for module in modules):
        gated = _gated_mlp(templates)
        if gated is None:
            fused = any(name in template.split(".") for template in templates for name in FUSED_GATES)
            reason = "fuses its gate and up projections" if fused else "has no separate gate projection in its MLP"
            raise UnsupportedArchitecture(f"{architecture} {reason}; it cannot be repaired so far")
        gate, up, down = gated
        parts.update(gate=(gate,), up=(up,), down=(down,), mlp=(gate, up, down))
    if "attention" in modules:
        attention = _siblings(templates, ATTENTION_PROJECTIONS)
        if attention is None:
            raise UnsupportedArchitecture(
                f"{architecture} has no separate {', '.join(ATTENTION_PROJECTIONS)}; "
                f"`modules: attention` cannot be used with it so far"
            )
        parts["attention"] = attention
    return parts


def _gated_mlp(templates: Sequence[str]) -> tuple[str, ...] | None:
    found = (_siblings(templates, spelling) for spelling in GATED_MLPS)
    return next((names for names in found if names is not None), None)


def _siblings(templates: Sequence[str], names: tuple[str, ...]) -> tuple[str, ...] | None:
    """The weight templates called `names` under one common parent, if there is exactly one such parent."""
    parents = {template.removesuffix(f".{names[0]}.weight") for template in templates}
    groups = [tuple(f"{parent}.{name}.weight" for name in names) for parent in parents]
    complete = [group for group in groups if set(group) <= set(templates)]
    return complete[0] if len(complete) == 1 else None


def _place(template: str, layer: int) -> str:
    return template.replace(LAYER, str(layer))


def _definition(architecture: str, model_type: object) -> dict[str, Any] | None:
    """Mergekit's own definition of an architecture, or None if it has none.

    Several definitions may share a class name; then the model type decides, as in mergekit.
    """
    candidates = _definitions().get(architecture, [])
    if len(candidates) <= 1:
        return candidates[0] if candidates else None
    return next((candidate for candidate in candidates if candidate["model_type"] == model_type), None)


@lru_cache(maxsize=1)
def _definitions() -> dict[str, list[dict[str, Any]]]:
    by_name: dict[str, list[dict[str, Any]]] = {}
    folder = importlib.resources.files("mergekit._data.architectures")
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".json"):
            definition = json.loads(file.read_text(encoding="utf-8"))
            for name in definition["architectures"]:
                by_name.setdefault(name, []).append(definition)
    return by_name
