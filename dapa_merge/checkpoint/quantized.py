"""Recognizing quantized checkpoints, in which a weight's bytes are no floats that could be replaced."""

from __future__ import annotations

import re

from dapa_merge.checkpoint.files import Checkpoint
from dapa_merge.errors import CheckpointError

# What each method leaves beside a weight, for checkpoints whose config does not say it.
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
    """Raise `CheckpointError` if a checkpoint says that it is quantized, or its tensors do."""
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
