"""Arithmetic of 16-bit models on a CPU: deterministic for any batch, and fast without 16-bit instructions.

Deterministic here means batch-invariant: a token's values do not depend on how many tokens and texts are computed with
it. Speculative decoding then cannot change a response.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch.nn.functional import linear
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from dapa_merge.measure.placement import device_types
from dapa_merge.measure.quantized import is_quantized
from dapa_merge.progress import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Eager attention, unlike fused attention, stores values for every pair of a text's tokens.
MAX_TOKENS = 512
# Numbers of tokens to test a linear layer with, and of values that it computes: one in some thousands may differ.
NUMBERS = (1, 2, 3, 16)
NUM_VALUES = 1 << 16
# Rows of a test's weight that are drawn; a larger weight repeats them.
NUM_DRAWN = 1 << 12
NAME = "dapa_deterministic"
EAGER = "eager_attention_forward"


def is_deterministic(model: PreTrainedModel, num_tokens: int) -> bool:
    """Whether a model's choices are known not to depend on how many tokens are computed at once.

    In float32 the difference decides between two tokens once in a million times. In 16 bits some tokens tie. There, a
    CPU rounds each token independently in linear layers that are not large and `batch_invariant`, which is tested, but
    not in attention, which `deterministic_attention` replaces. Experts and accelerators are not trusted. (In a few
    architectures the number of texts still changes the rounding of layers that are slices of one matrix.) Nor are
    quantized layers: in 8 bits, activations are rounded too. `num_tokens` is the length of the longest text, including
    the response.
    """
    if is_quantized(model):
        return False
    if model.dtype == torch.float32:
        return True
    if device_types(model) != {"cpu"} or num_tokens > MAX_TOKENS or not _is_replaceable(model):
        return False
    shapes = {tuple(module.weight.shape) for module in model.modules() if isinstance(module, torch.nn.Linear)}
    packs = _packs(_layers(model))
    return all(_layer_repeats(shape, model.dtype, torch.get_num_threads(), packs) for shape in shapes)


@contextmanager
def deterministic_attention(model: PreTrainedModel, num_tokens: int) -> Iterator[None]:
    """Compute attention in float64 inside a `with` block, if a 16-bit model `is_deterministic`.

    Sums in a different order, such as with more padding before a text, then round to the same value.
    """
    if model.dtype == torch.float32 or not is_deterministic(model, num_tokens):
        yield
        return
    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, eager_mask)
    with quiet("transformers"):
        model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        with quiet("transformers"):
            model.set_attn_implementation(before)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The model's own eager attention, in float64."""
    eager = getattr(sys.modules[type(module).__module__], EAGER)
    mask = None if attention_mask is None else attention_mask.double()
    if _is_plain(eager):
        return _grouped(query.double(), key.double(), value.double(), mask, options["scaling"]).to(query.dtype), None
    attended, weights = eager(module, query.double(), key.double(), value.double(), mask, **options)
    return attended.to(query.dtype), weights


@functools.cache
def _is_plain(eager: Callable[..., Any]) -> bool:
    """Whether a function does what Llama's does: most models have a copy of it."""
    code, plain = eager.__code__, modeling_llama.eager_attention_forward.__code__
    return all(getattr(code, name) == getattr(plain, name) for name in ("co_code", "co_names", "co_consts"))


def _grouped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Softmax attention in which queries share heads of keys, without a copy of these for each query.

    Args:
        query: `[texts, heads, tokens, width]`.
        key: `[texts, key heads, columns, width]`.
        value: `[texts, key heads, columns, width]`.
        mask: Is added to the scores; `[texts or 1, heads or 1, tokens, columns]`.
        scaling: Of the scores.

    Returns:
        `[texts, tokens, heads, width]`.
    """
    texts, heads, tokens, _ = query.shape
    key_heads, columns = key.shape[1:3]
    scores = torch.matmul(query.reshape(texts, key_heads, -1, query.shape[-1]), key.transpose(2, 3)) * scaling
    if mask is not None:
        scores = scores.view(texts, heads, tokens, columns) + mask
    weights = scores.softmax(-1).view(texts, key_heads, -1, columns)
    return torch.matmul(weights, value).view(texts, heads, tokens, -1).transpose(1, 2).contiguous()


def _is_replaceable(model: PreTrainedModel) -> bool:
    """Whether a model's attention can be replaced, and only linear layers sum over weights."""
    if not model._can_set_attn_implementation() or any(parameter.dim() > 2 for parameter in model.parameters()):
        return False
    kinds = {type(module) for module in model.modules() if type(module).__name__.endswith("Attention")}
    return bool(kinds) and all(hasattr(sys.modules[kind.__module__], EAGER) for kind in kinds)


@functools.cache
def _layer_repeats(shape: tuple[int, int], dtype: torch.dtype, _num_threads: int, packs: bool = False) -> bool:
    """Whether a linear layer computes the same bits for a token in any batch; the same answer in every process."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = max(*NUMBERS, math.ceil(NUM_VALUES / shape[0]))
    states = torch.randn(num_tokens, shape[1], generator=generator).to(dtype)
    drawn = torch.randn(min(shape[0], NUM_DRAWN), shape[1], generator=generator).to(dtype)
    layer = torch.nn.Linear(shape[1], shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(drawn[torch.arange(shape[0]) % len(drawn)])
    with torch.no_grad(), batch_invariant(layer, packs=packs):
        expected = layer(states)
        return all(
            torch.equal(layer(states[start : start + number]), expected[start : start + number])
            for number in NUMBERS
            for start in range(0, num_tokens, number)
        )


# With fewer tokens, torch's own kernel reads a 16-bit weight faster than it can be upcast.
MIN_TOKENS = 4
# What accelerate's hooks call, where a model is spread over devices.
FORWARD = "_old_forward"
# Number of elements of a weight to upcast, or of float32 results to have, at once; a whole output layer would take
# gigabytes.
PIECE = 1 << 24
# Where a layer keeps its packed weight.
PACKED = "_dapa_packed"
# Of all memory, the most that the packed weights of a model may take; not of what is free at the moment, since the two
# ways of computing round differently.
SHARE = 0.25
# Smaller weights are not packed, since calling that kernel takes a tenth of a millisecond, but computed in float64, in
# which the order of a sum does not matter either.
MIN_PACKED = 1 << 16
# Rows for which weights are packed.
NUM_ROWS = 16


@contextmanager
def batch_invariant(model: torch.nn.Module, *, packs: bool | None = None) -> Iterator[None]:
    """Compute the linear layers of a 16-bit model on a CPU alike for any number of tokens, inside a `with` block.

    On a CPU with 16-bit arithmetic, torch's kernel for a single vector sums in another order than those for matrices: a
    single token is computed as two. On one without, the kernels for 16-bit matrices are about ten times slower than
    those for float32, to which a weight is upcast exactly. As in those kernels, sums are in float32 and rounded to 16
    bits once; only their order differs. Upcast weights are kept, packed as oneDNN reads them fastest, where they take
    at most `SHARE` of the memory, until they change or `drop_copies`; elsewhere they are upcast for each pass, one
    layer at a time. Other models are not changed. Weights may change inside the block, in place, but not through
    `.data`, which torch does not count as a change. What is computed in the block can be differentiated after it.

    Args:
        model: The model, or a layer.
        packs: Whether to keep packed weights; None for where all of `model` fits.
    """
    all_layers = _layers(model)
    layers = [layer for layer in all_layers if "forward" not in layer.__dict__ or FORWARD in layer.__dict__]
    if packs is None:
        packs = _packs(all_layers)
    before = {layer: layer.__dict__[FORWARD] for layer in layers if FORWARD in layer.__dict__}
    try:
        for layer in layers:
            # An attribute of the instance takes precedence over the class's.
            name = FORWARD if FORWARD in layer.__dict__ else "forward"
            compute = functools.partial(_upcast, packs) if is_slow(layer.weight.dtype) else _paired
            layer.__dict__[name] = functools.partial(compute, layer)
        yield
    finally:
        for layer in layers:
            if layer in before:
                layer.__dict__[FORWARD] = before[layer]
            else:
                layer.__dict__.pop("forward", None)


def _layers(model: torch.nn.Module) -> list[torch.nn.Linear]:
    return [
        module
        for module in model.modules()
        if type(module) is torch.nn.Linear
        and module.weight.device.type == "cpu"
        and module.weight.dtype in (torch.bfloat16, torch.float16)
    ]


def _packs(layers: Sequence[torch.nn.Linear]) -> bool:
    is_upcast = any(is_slow(dtype) for dtype in {layer.weight.dtype for layer in layers})
    return is_upcast and can_pack(sum(layer.weight.numel() for layer in layers))


def can_pack(num_weights: int) -> bool:
    """Whether packed copies of so many weights may be kept."""
    return _may_keep(num_weights) and _has_packed_kernel()


def _may_keep(num_weights: int) -> bool:
    """Whether so many weights may be kept in float32 beside a model, whatever else the memory is used for now."""
    return 4 * num_weights <= SHARE * _memory()


@functools.cache
def _memory() -> int:
    """Bytes of all memory of this machine."""
    return int(psutil.virtual_memory().total)


@functools.cache
def _has_packed_kernel() -> bool:
    try:
        # The answer is kept, and must not depend on the dtype or device that torch uses by default when it is asked.
        ones = torch.ones(2, 3, dtype=torch.float32, device="cpu")
        return bool((_product(ones, _pack(ones), None) == 3).all())
    except (AttributeError, RuntimeError):
        # Not a public function of torch; other versions and platforms may lack it.
        return False


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, NUM_ROWS)
    return packed


def _product(states: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(states, packed, bias, "none", [], "")
    return result


@dataclass
class _Packed:
    """A layer's packed weight, and what tells whether it is of the weight as it is now."""

    state: tuple[int, int]
    weight: torch.Tensor

    def __deepcopy__(self, _: object) -> None:
        """Nothing: torch cannot copy packed weights, and packs those of a copy anew."""


def _packed_weight(layer: torch.nn.Linear) -> torch.Tensor:
    """A layer's weight in float32, packed; packed anew if it changed."""
    weight = layer.weight
    state = weight.data_ptr(), weight._version
    kept: _Packed | None = layer.__dict__.get(PACKED)
    if kept is None or kept.state != state:
        # What is made in inference mode could not be used where there is a graph.
        with torch.inference_mode(False), torch.no_grad():
            layer.__dict__[PACKED] = kept = _Packed(state, _pack(weight.detach().float()))
    return kept.weight


def drop_copies(model: torch.nn.Module) -> None:
    """Free the packed weights that `batch_invariant` keeps."""
    for module in model.modules():
        module.__dict__.pop(PACKED, None)


def _paired(layer: torch.nn.Linear, states: torch.Tensor) -> torch.Tensor:
    if states.numel() != states.shape[-1]:
        return torch.nn.Linear.forward(layer, states)
    result = torch.nn.Linear.forward(layer, states.reshape(1, -1).repeat(2, 1))
    return result[:1].reshape(*states.shape[:-1], -1)


def _upcast(packs: bool, layer: torch.nn.Linear, states: torch.Tensor) -> torch.Tensor:
    weight, bias = layer.weight, layer.bias
    tokens = states.numel() // states.shape[-1]
    has_graph = torch.is_grad_enabled() and (states.requires_grad or weight.requires_grad)
    # Of a weight of inference mode, nothing tells whether it changed.
    packs = packs and not weight.is_inference()
    if states.dtype != weight.dtype or (tokens < MIN_TOKENS and not has_graph and not packs):
        return linear(states, weight, bias)
    if not has_graph:
        return _wide(states, layer, packs=packs)
    found: torch.Tensor = _Upcast.apply(states, weight, bias, layer, packs)  # type: ignore[no-untyped-call]
    return found


def _wide(states: torch.Tensor, layer: torch.nn.Linear, *, packs: bool) -> torch.Tensor:
    if packs and layer.weight.numel() < MIN_PACKED:
        exact = linear(states.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
        return exact.to(states.dtype)
    weight, bias = layer.weight, None if layer.bias is None else layer.bias.float()
    wide = states.float().reshape(-1, states.shape[-1])
    result = states.new_empty((len(wide), weight.shape[0]))
    if packs:
        packed, tokens = _packed_weight(layer), max(PIECE // weight.shape[0], 1)
        for start in range(0, len(wide), tokens):
            some = slice(start, start + tokens)
            result[some] = _product(wide[some], packed, bias)
    else:
        for part, rows in _rows_of(weight):
            result[:, part] = linear(wide, rows, None if bias is None else bias[part])
    return result.view(*states.shape[:-1], -1)


def _rows_of(weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """The rows of a weight in float32, some at a time."""
    number = max(PIECE // weight.shape[1], 1)
    for start in range(0, weight.shape[0], number):
        part = slice(start, start + number)
        yield part, weight[part].float()


class _Upcast(torch.autograd.Function):
    """A linear layer whose weight is upcast again for the backward pass: kept, the copies would be twice the model."""

    @staticmethod
    def forward(
        context: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        _bias: torch.Tensor | None,
        layer: torch.nn.Linear,
        packs: bool,
    ) -> torch.Tensor:
        context.save_for_backward(states if context.needs_input_grad[1] else None, weight)
        return _wide(states, layer, packs=packs)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        states, weight = context.saved_tensors
        wide = gradient.float()
        of_states = of_weight = of_bias = None
        if context.needs_input_grad[0]:
            terms = [wide[..., part] @ rows for part, rows in _rows_of(weight)]
            of_states = sum(terms[1:], terms[0]).to(gradient.dtype)
        if context.needs_input_grad[1]:
            flat = states.reshape(-1, states.shape[-1]).float()
            of_weight = (wide.reshape(-1, wide.shape[-1]).T @ flat).to(weight.dtype)
        if context.needs_input_grad[2]:
            of_bias = wide.reshape(-1, wide.shape[-1]).sum(0).to(weight.dtype)
        return of_states, of_weight, of_bias, None, None


def is_slow(dtype: torch.dtype) -> bool:
    """Whether the CPU lacks arithmetic of a 16-bit type."""
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return not torch.ops.mkldnn._is_mkldnn_fp16_supported()


# On a CPU, 16-bit kernels are slow for small matrices; a model up to this size is computed in float32 meanwhile.
MAX_WIDENED = 60_000_000


@contextmanager
def widened(model: PreTrainedModel) -> Iterator[None]:
    """Compute a 16-bit model on a CPU in float32 inside a `with` block, if that is faster there.

    It is for small models, and for those whose weights a CPU without 16-bit arithmetic would upcast in both directions
    of every pass, if a copy in float32 fits; packed copies make room for it. Its own tensors come back on exit, bit for
    bit; what is written to it in the block is lost.
    """
    parameters = list(model.parameters())
    before = [one.data for one in parameters] if _is_faster_in_float32(model) else []
    if before:
        drop_copies(model)
    try:
        for parameter, data in zip(parameters, before, strict=False):
            if data.dtype in (torch.bfloat16, torch.float16):
                parameter.data = data.float()
        yield
    finally:
        for parameter, data in zip(parameters, before, strict=False):
            parameter.data = data


def _is_faster_in_float32(model: PreTrainedModel) -> bool:
    if device_types(model) != {"cpu"} or is_quantized(model):
        return False
    parameters = list(model.parameters())
    number = sum(one.numel() for one in parameters)
    is_upcast = any(map(is_slow, {one.dtype for one in parameters} & {torch.bfloat16, torch.float16}))
    return number <= MAX_WIDENED or (is_upcast and _may_keep(number))
