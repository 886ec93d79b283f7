"""Knowledge of architectures: names of the projections in a layer, and the meaning of their shapes.

A gated MLP computes down(activation(gate(x)) * up(x)). Its gate is a separate tensor, or half of a fused tensor. A
mixture of experts has one such tensor per expert, or a three-dimensional tensor for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from dapa_merge.checkpoint.region import Rows, Shapes, TensorBox, whole_box

# Gate, up and down, side by side under one parent. The gate is the projection whose output goes through the activation.
# (Qwen 1 activates w2, Jais c_fc2; InternLM2, Mixtral and LFM2 activate w1; DBRX w1, with v1 for up.)
GATED = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("w2", "w1", "c_proj"),
    ("c_fc_0", "c_fc_1", "c_proj"),
    ("c_fc2", "c_fc", "c_proj"),
    ("w1", "v1", "w2"),
)
# Gate and up fused in one tensor, the gate's rows first; then down. (Phi-3 and GLM-4; ChatGLM; Granite's experts.)
FUSED = (("gate_up_proj", "down_proj"), ("dense_h_to_4h", "dense_4h_to_h"), ("input_linear", "output_linear"))
# Up and down of an MLP without a gate.
PLAIN = (
    ("up_proj", "down_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("c_fc", "c_proj"),
    ("fc1", "fc2"),
    ("fc_in", "fc_out"),
)
ATTENTIONS = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "dense"),
    ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    ("qkv_proj", "o_proj"),
    ("query_key_value", "dense"),
    ("c_attn", "c_proj"),
    ("Wqkv", "out_proj"),
    ("wqkv", "wo"),
    ("W_pack", "o_proj"),
)
# The modules of attention: queries, keys, values and output. Which of them a projection holds, by its name.
ATTENTION_MODULES = ("q", "k", "v", "o")
_HOLDS = {
    **dict.fromkeys(("q_proj", "q_a_proj", "q_b_proj"), "q"),
    "k_proj": "k",
    "v_proj": "v",
    **dict.fromkeys(("o_proj", "out_proj", "dense", "c_proj", "wo"), "o"),
    # The rows of q, then those of k, then those of v. (Phi-3; Baichuan; MPT and DBRX; GPT-2, whose rows are columns.)
    **dict.fromkeys(("qkv_proj", "W_pack", "Wqkv", "c_attn"), "qkv"),
}
# In all others, rows of k and v, or of all three, alternate by head, or their order differs from model to model.
# (DeepSeek's latent attention; GPT-NeoX, BLOOM and Falcon; InternLM2.)
# Models with `Conv1D`, whose weights are stored as [inputs, outputs].
CONV1D = ("clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt")
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
HEADS = ("lm_head", "embed_out", "output", "output_layer")
# A tensor of all experts that transformers 5 makes of one per expert: the names in the files, whose rows are joined.
FUSED_EXPERTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
# Modules around the language model: some versions of transformers have more of them than others, and than the files.
_WRAPPERS = ("model", "language_model", "transformer")
_NUMBER = re.compile(r"\d+")


class LackingTensor(Exception):
    """A layer lacks a projection of an MLP or attention that other layers have; the message names it."""


class NoSuchModule(Exception):
    """The requested module is absent or cannot be located; the message says why, and what to request instead."""


class Kind(Enum):
    """How an MLP stores its gate."""

    GATED = "in a tensor of its own"
    FUSED = "in the first half of one that holds up too"
    INTERLEAVED = "in every second row of one that holds up too"
    PLAIN = "it has none"


@dataclass(frozen=True)
class Spelling:
    """An MLP's kind, and the names of its projections: gate, up and down, or gate-and-up and down, or up and down."""

    kind: Kind
    names: tuple[str, ...]


@dataclass(frozen=True)
class Mlp:
    """One MLP of a layer: the only one, an expert's, or one that holds all experts.

    Attributes:
        spelling: Its kind, and the names of its projections.
        weights: Names of its weights within the layer, in the order of the spelling.
        biases: Names of their biases, None where absent.
        is_routed: Whether it belongs to experts that a router chooses from.
    """

    spelling: Spelling
    weights: tuple[str, ...]
    biases: tuple[str | None, ...]
    is_routed: bool


def bare_name(name: str) -> str:
    """A tensor's or module's name without the wrappers that it starts with, such as `model.language_model`."""
    first, _, rest = name.partition(".")
    while rest and first in _WRAPPERS:
        name = rest
        first, _, rest = name.partition(".")
    return name


def spell(layers: Sequence[Shapes]) -> dict[str, Spelling]:
    """The spelling of each MLP in a stack of layers, by its parent's name with `*` for numbers.

    The first spelling of the tables that is complete in any layer counts for all: a layer that lacks its gate is not
    mistaken for a plain MLP.
    """
    found: dict[str, tuple[int, Spelling]] = {}
    for layer in layers:
        for parent, leaves in _by_parent(layer).items():
            generic = _NUMBER.sub("*", parent)
            known = range(found[generic][0] if generic in found else len(_TABLE))
            for rank in known:
                names = _TABLE[rank]
                if leaves.keys() >= set(names) and (kind := _kind(names, leaves, layer)):
                    found[generic] = rank, Spelling(kind, names)
                    break
    return {generic: spelling for generic, (_, spelling) in found.items()}


def find_mlps(layer: Shapes, spellings: Mapping[str, Spelling]) -> list[Mlp]:
    """The MLPs of one layer, routed experts first.

    Raises:
        LackingTensor: If a projection or a numbered expert is missing.
    """
    mlps: dict[str, Mlp] = {}
    for parent, leaves in _by_parent(layer).items():
        spelling = spellings.get(_NUMBER.sub("*", parent))
        if spelling is None or leaves.keys().isdisjoint(spelling.names):
            continue
        if lacking := [name for name in spelling.names if name not in leaves]:
            raise LackingTensor(_under(parent, f"{lacking[0]}.weight"))
        weights = tuple(leaves[name] for name in spelling.names)
        biases = tuple(_bias_of(weight, layer) for weight in weights)
        is_routed = parent[-1:].isdecimal() or len(layer[weights[0]]) == 3
        mlps[parent] = Mlp(spelling, weights, biases, is_routed)
    _check_numbering(mlps)
    return [mlps[parent] for parent in sorted(mlps, key=lambda parent: (not mlps[parent].is_routed, _natural(parent)))]


def parts_of(mlps: Iterable[Mlp], module: str, layer: Shapes) -> tuple[TensorBox, ...]:
    """The boxes of one module of a layer, in the weights and biases of all its MLPs.

    Raises:
        NoSuchModule: If an MLP lacks the module, or interleaves it with another.
    """
    mlps = tuple(mlps)
    if module == "mlp":
        # Module by module over all experts, the same order as in tensors that hold all experts.
        return tuple(part for name in _modules_of(mlps) for part in parts_of(mlps, name, layer))
    parts: list[TensorBox] = []
    row = 0
    for mlp in mlps:
        index, half = _place(mlp.spelling, module)
        for strip in _strips(mlp, index, half, layer):
            parts += [replace(part, first_row=row) for part in strip]
            row += strip[0].num_rows
    return tuple(parts)


def attention_parts(layers: Sequence[Shapes], modules: Iterable[str]) -> list[dict[str, tuple[TensorBox, ...]]]:
    """The boxes of each layer's attention projections, by module; empty for a layer with another mixer instead.

    Args:
        layers: The layers.
        modules: `attention`, all of its projections, or some of `ATTENTION_MODULES`.

    Raises:
        LackingTensor: If a layer has only some of them; the message begins with the layer's number.
        NoSuchModule: If no layer has a known attention, or a module cannot be told apart from others.
    """
    modules = tuple(modules)
    if not modules:
        return [{} for _ in layers]
    by_layer = [_by_parent(layer) for layer in layers]
    found = next(
        (
            (parent, names)
            for names in ATTENTIONS
            for by_parent in by_layer
            for parent, leaves in by_parent.items()
            if leaves.keys() >= set(names)
        ),
        None,
    )
    if found is None:
        raise NoSuchModule("has no attention with known projection names")
    parent, names = found
    result: list[dict[str, tuple[TensorBox, ...]]] = []
    for number, layer in enumerate(layers):
        leaves = by_layer[number].get(parent, {})
        lacking = [name for name in names if name not in leaves]
        if lacking and len(lacking) < len(names):
            if any(leaves.keys() >= set(others) for others in ATTENTIONS):
                raise NoSuchModule(f"has attention of another kind in layer {number} than in others")
            raise LackingTensor(f"{number}.{_under(parent, lacking[0])}.weight")
        weights = {} if lacking else {name: leaves[name] for name in names}
        result.append({module: tuple(_of_attention(weights, module, layer)) for module in modules})
    return result


def _of_attention(weights: Mapping[str, str], module: str, layer: Shapes) -> Iterator[TensorBox]:
    """The boxes of a module in the weights of a layer's attention, by projection, and in their biases."""
    if not weights:
        return
    held = {one for name in weights for one in _HOLDS.get(name, "")}
    if module in ATTENTION_MODULES and module not in held:
        raise _not_apart(weights, module)
    for name, weight in weights.items():
        tensors = [weight, *filter(None, [_bias_of(weight, layer)])]
        holds = _HOLDS.get(name, "")
        if module in ("attention", holds):
            yield from (TensorBox(tensor, whole_box(layer[tensor])) for tensor in tensors)
        elif module in holds:
            output = layer[weights[next(other for other in weights if _HOLDS.get(other) == "o")]]
            axis, rows = _third(name, layer[weight], output, module) or (0, None)
            if rows is None:
                raise _not_apart(weights, module)
            for tensor in tensors:
                box = list(whole_box(layer[tensor]))
                box[axis if len(box) > 1 else 0] = rows
                yield TensorBox(tensor, tuple(box), axis if len(box) > 1 else 0)


def _third(name: str, fused: tuple[int, ...], output: tuple[int, ...], module: str) -> tuple[int, Rows] | None:
    """The dimension and the rows of q, k or v in a projection that holds the three in turn; None if they are not told.

    q has as many rows as the output projection has inputs, and k and v share the rest.
    """
    if len(fused) != 2 or len(output) != 2:
        return None
    # Layers like GPT-2's store the transpose.
    axis = 0 if fused[1] == output[0] else 1
    num_queries = output[1 - axis]
    num_keys, odd = divmod(fused[axis] - num_queries, 2)
    if fused[1 - axis] != output[axis] or odd or num_keys < 1 or num_queries % num_keys:
        return None
    if name == "c_attn" and axis == 0 and num_keys == num_queries:
        # GPTBigCode without multi-query attention alternates by head; Qwen 1, of the same names and shapes, does not.
        return None
    first = {"q": 0, "k": num_queries, "v": num_queries + num_keys}[module]
    return axis, (first, first + (num_queries if module == "q" else num_keys))


def _not_apart(weights: Iterable[str], module: str) -> NoSuchModule:
    shared = [name for name in weights if _HOLDS.get(name, "") not in ATTENTION_MODULES]
    return NoSuchModule(
        f"has {module} in a projection that it shares with others ({shared[0]}), where its rows cannot be told apart, "
        f"so `modules: {module}` cannot be used with it; write `modules: attention`"
    )


_TABLE = (*GATED, *FUSED, *PLAIN)


def _by_parent(layer: Shapes) -> dict[str, dict[str, str]]:
    """Names of a layer's weights, by parent and then by the last part of the name."""
    weights: dict[str, dict[str, str]] = {}
    for name in layer:
        if not name.endswith(("bias", ".scale")):
            parent, _, leaf = name.removesuffix(".weight").rpartition(".")
            weights.setdefault(parent, {})[leaf] = name
    return weights


def _under(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name


def _bias_of(weight: str, layer: Shapes) -> str | None:
    stem = weight.removesuffix(".weight")
    return next((name for name in (f"{stem}.bias", f"{stem}_bias") if name in layer), None)


def _kind(names: tuple[str, ...], leaves: Mapping[str, str], layer: Shapes) -> Kind | None:
    """The kind of an MLP with weights of these names, judged by their shapes; None if the shapes do not fit."""
    if len(names) == 3:
        return Kind.GATED
    up, down = (layer[leaves[name]] for name in names)
    is_wide = _fused_axis(up, down) is not None
    if names in FUSED and is_wide:
        # A fused bias next to three-dimensional experts means GPT-OSS, whose gate and up rows alternate.
        alternates = f"{leaves[names[0]]}_bias" in layer
        return Kind.INTERLEAVED if alternates else Kind.FUSED
    if names in PLAIN:
        # Phi-3-small has one tensor of double width before the activation, whose rows alternate.
        return Kind.INTERLEAVED if is_wide else Kind.PLAIN
    return None


def _fused_axis(up: tuple[int, ...], down: tuple[int, ...]) -> int | None:
    """The dimension along which gate and up are fused, twice the width that `down` reads; None if they are not."""
    if len(up) not in (2, 3) or len(up) != len(down):
        return None
    *experts, rows, columns = up
    *others, outputs, inputs = down
    if experts != others:
        return None
    if (rows, columns) == (2 * inputs, outputs):
        return len(experts)
    # Llama 4 and GPT-OSS store the transpose of each expert.
    return 2 if experts and (rows, columns) == (inputs, 2 * outputs) else None


# The index of each module's weight in a spelling, and which half of it; None for all of it.
_PLACES: dict[Kind, dict[str, tuple[int, int | None]]] = {
    Kind.GATED: {"gate": (0, None), "up": (1, None), "down": (2, None)},
    Kind.FUSED: {"gate": (0, 0), "up": (0, 1), "down": (1, None)},
    Kind.INTERLEAVED: {"gate and up": (0, None), "down": (1, None)},
    Kind.PLAIN: {"up": (0, None), "down": (1, None)},
}


def _modules_of(mlps: Iterable[Mlp]) -> list[str]:
    """The modules of a layer's MLPs, in the order of the computation."""
    order = ("gate", "gate and up", "up", "down")
    names = {name for mlp in mlps for name in _PLACES[mlp.spelling.kind]}
    return [name for name in order if name in names]


def _place(spelling: Spelling, module: str) -> tuple[int, int | None]:
    places = _PLACES[spelling.kind]
    if module not in places:
        alternatives = " or ".join(f"`modules: {name}`" for name in ("up", "down", "mlp") if name in (*places, "mlp"))
        why = (
            "has no gate projection in its MLP"
            if spelling.kind is Kind.PLAIN
            else f"interleaves the rows of gate and up in one tensor ({spelling.names[0]})"
        )
        raise NoSuchModule(f"{why}, so `modules: {module}` cannot be used with it; write {alternatives}")
    return places[module]


def _strips(mlp: Mlp, index: int, half: int | None, layer: Shapes) -> list[list[TensorBox]]:
    """The boxes of a weight and its bias that share rows, one list per expert, or one for all of it."""
    weight, bias = mlp.weights[index], mlp.biases[index]
    shape = layer[weight]
    axis = max(len(shape) - 2, 0)
    if half is not None:
        axis = _fused_axis(shape, layer[mlp.weights[1]]) or 0
    elif bias is not None and layer[bias][-1] == shape[-1] != shape[axis]:
        # Layers like GPT-2's store the transpose.
        axis = len(shape) - 1
    size = shape[axis]
    rows = (0, size) if half is None else (half * size // 2, (half + 1) * size // 2)
    experts = [[(expert, expert + 1)] for expert in range(shape[0])] if len(shape) == 3 else [[]]
    strips = []
    for expert in experts:
        box = [*expert, *whole_box(shape)[len(expert) :]]
        box[axis] = rows
        strip = [TensorBox(weight, tuple(box), axis)]
        if bias is not None:
            strip.append(TensorBox(bias, (*expert, rows), len(expert)))
        strips.append(strip)
    return strips


def _check_numbering(parents: Iterable[str]) -> None:
    """Raise `LackingTensor` unless experts are numbered from 0 without a gap."""
    numbers: dict[str, set[int]] = {}
    for parent in parents:
        stem, _, last = parent.rpartition(".")
        if last.isdecimal():
            numbers.setdefault(stem, set()).add(int(last))
    for stem, found in numbers.items():
        if holes := set(range(len(found))) - found:
            raise LackingTensor(f"{stem}.{min(holes)}.*")


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts names by the numbers in them."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"(\d+)", name)]
