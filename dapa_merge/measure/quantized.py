"""Linear layers whose weights bitsandbytes quantizes, and how the weight of one is replaced and put back.

A quantized matrix cannot be edited in part: its new values are computed in the target's dtype and quantized as those of
a loaded model are. The old ones are kept as they were, so that they come back bit for bit. (8 bits: a scale for each
row, T. Dettmers et al., arXiv 2208.07339; 4 bits: NF4, a scale for 64 values, T. Dettmers et al., arXiv 2305.14314.)
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.nn import Linear
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dapa_merge.errors import UsageError, one_line

# Devices whose kernels come with bitsandbytes; for Apple's they are code that is fetched from the Hub.
DEVICES = ("cpu", "cuda", "xpu", "hpu")


def import_bitsandbytes() -> Any:
    """Import bitsandbytes, which is an extra; raises `UsageError` if it is not installed."""
    name = "kernels"
    # On some CPUs it would fetch code from the Hub and run it.
    hidden = {} if name in sys.modules else {name: None}
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        sys.modules.update(hidden)  # type: ignore[arg-type]
        import bitsandbytes
    except ImportError as error:
        raise UsageError("--quantize needs bitsandbytes; install it with: pip install bitsandbytes") from error
    except Exception as error:
        raise UsageError(f"--quantize needs bitsandbytes, which is installed but broken: {one_line(error)}") from error
    finally:
        for key in hidden:
            sys.modules.pop(key, None)
    return bitsandbytes


def configuration(quantize: str, device: torch.device) -> BitsAndBytesConfig:
    """The setting by which transformers quantizes a model's linear layers but the last.

    Raises:
        UsageError: If bitsandbytes is absent, or has no kernels for a kind of device.
    """
    import_bitsandbytes()
    if device.type not in DEVICES:
        raise UsageError(
            f"--quantize cannot be used on {device}: bitsandbytes has kernels for {', '.join(DEVICES)}; choose another "
            f"--device, or leave out --quantize"
        )
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def prepare(model: PreTrainedModel) -> None:
    """Have quantized layers compute in the model's dtype, and keep their weights as they are stored."""
    for _, layer in quantized_layers(model):
        if hasattr(layer, "compute_dtype"):
            layer.compute_dtype, layer.compute_type_is_set = model.dtype, True
            # Otherwise some CPUs would rearrange a weight when it is first used.
            layer.support_avx512bf16_for_cpu = False


def quantized_layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the quantized layers, and the names of their weights."""
    for name, module in model.named_modules():
        if isinstance(module, Linear) and not module.weight.is_floating_point():
            yield f"{name}.weight", module


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether any layer is quantized."""
    return any(True for _ in quantized_layers(model))


def is_transposed(layer: Any) -> bool:
    """Whether a layer's weight is transposed in the files."""
    return issubclass(getattr(layer, "source_cls", Linear), Conv1D)


def stored_shape(layer: Any) -> tuple[int, int]:
    """The shape of a layer's weight in the files."""
    shape = layer.out_features, layer.in_features
    return (shape[1], shape[0]) if is_transposed(layer) else shape


class State(NamedTuple):
    """The weight of a quantized layer.

    Attributes:
        data: The weight's bits.
        scales: With which they are values: bitsandbytes' state of 4 bits, or the scales of 8 bits by row.
    """

    data: torch.Tensor
    scales: Any


def state_of(layer: Any) -> State:
    """The present weight; a later `put` of it restores every bit."""
    weight = layer.weight
    if hasattr(weight, "quant_state"):
        return State(weight.data, weight.quant_state)
    scales = layer.state.SCB if weight.SCB is None else weight.SCB
    return State(weight.data, scales)


def put(layer: Any, state: State) -> None:
    """Replace the weight; the parameter stays the same object."""
    weight = layer.weight
    weight.data = state.data
    if hasattr(weight, "quant_state"):
        weight.quant_state = layer.quant_state = state.scales
    else:
        # The layer takes them over when it is next called.
        weight.CB, weight.SCB = state.data, state.scales


def quantize(layer: Any, values: torch.Tensor, dtype: torch.dtype) -> State:
    """Quantize new values for a layer as transformers does when it loads them.

    Args:
        layer: A quantized one.
        values: `stored_shape(layer)`, on any device.
        dtype: Of the model.
    """
    weight = layer.weight
    device = weight.device
    values = (values.T if is_transposed(layer) else values).to(device, dtype, copy=True)
    bitsandbytes = import_bitsandbytes()
    if hasattr(weight, "quant_state"):
        made = bitsandbytes.nn.Params4bit(
            values,
            requires_grad=False,
            blocksize=weight.blocksize,
            compress_statistics=weight.compress_statistics,
            quant_type=weight.quant_type,
            quant_storage=weight.quant_storage,
        ).to(device)
        return State(made.data, made.quant_state)
    made = bitsandbytes.nn.Int8Params(values.contiguous(), requires_grad=False, has_fp16_weights=False).to(device)
    return State(made.data, made.SCB)
