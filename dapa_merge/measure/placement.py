"""Spreads a model that does not fit on one device over all accelerators and the CPU, a layer on each.

Every layer is computed where its weights are, and only activations move. (The usual alternative leaves weights in the
CPU's memory, moves them to the accelerator for each pass, and shows `meta` tensors in their place, which no edit could
be written to.)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import CustomDtype, get_max_memory, infer_auto_device_map
from transformers import PreTrainedModel

from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.checkpoint.units import layer_number
from dapa_merge.errors import UsageError, one_line
from dapa_merge.progress import LOG, quiet
from dapa_merge.recipe.options import QUANTIZATIONS, Where

# Of an accelerator's free memory; batches need the rest.
SHARE = 0.9
# Bytes of a 4-bit weight's scales: a float32 for 64 of them.
SCALE_BYTES = 4 / 64
CPU = torch.device("cpu")


def weight_bytes(checkpoint: Checkpoint, where: Where) -> int:
    """Bytes that a checkpoint's weights take in memory, about: of quantized matrices, those of the layers count."""
    total = 0.0
    for name, tensor in checkpoint.tensors.items():
        size = tensor.num_bytes / max(tensor.num_parameters, 1)
        if where.dtype is not None:
            size = getattr(torch, where.dtype).itemsize
        if where.quantize is not None and len(tensor.shape) == 2 and layer_number(name) is not None:
            bits = QUANTIZATIONS[where.quantize]
            # In 8 bits, a row has one scale.
            size = bits / 8 + (SCALE_BYTES if bits == 4 else 4 / tensor.shape[1])
        total += size * tensor.num_parameters
    return round(total)


def is_spread(checkpoint: Checkpoint, where: Where) -> bool:
    """Whether a checkpoint must be spread over several devices: if limits are given, or it does not fit on one."""
    if where.device != "auto" or where.max_memory:
        return bool(where.max_memory)
    device = accelerator()
    # Apple's accelerator shares the CPU's memory.
    return device is not None and device.type != "mps" and weight_bytes(checkpoint, where) > free_on(device)


def accelerator() -> torch.device | None:
    """The present accelerator, with its number; None without any."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device and torch.device(device.type, torch.accelerator.current_device_index())


def free_on(device: torch.device) -> int:
    """Bytes that weights may take on one device, whose others are left alone."""
    look = getattr(getattr(torch, device.type, None), "mem_get_info", None)
    if look is not None:
        return int(SHARE * look(device)[0])
    return free_memory().get(device, 1 << 62)


def free_memory() -> dict[torch.device, int]:
    """Bytes that weights may take, by device: all accelerators, and last the CPU."""
    present = accelerator()
    found = {}
    for key, number in get_max_memory().items():
        if present is not None and isinstance(key, int):
            found[torch.device(present.type, key)] = int(number * SHARE)
        elif key in ("cpu", "mps"):
            found[torch.device(key)] = int(number * SHARE)
    return found or {CPU: 1 << 62}


def fits(checkpoint: Checkpoint, where: Where, device: torch.device) -> bool:
    """Whether a checkpoint's weights fit in what is free now of a device or, with `auto`, of all of them together."""
    free = usable_memory(where) if where.device == "auto" else {device: free_on(device)}
    return weight_bytes(checkpoint, where) <= sum(free.values())


def spread_over(checkpoint: Checkpoint, where: Where) -> str | None:
    """The devices that a checkpoint is spread over, for a journal; None if it is on one."""
    return " and ".join(sorted(map(str, usable_memory(where)))) if is_spread(checkpoint, where) else None


def usable_memory(where: Where) -> dict[torch.device, int]:
    """Bytes of each device that a model may be spread over.

    Raises:
        UsageError: If a device that a limit names is absent.
    """
    if not where.max_memory:
        return free_memory()
    found = {}
    for name, number in where.max_memory:
        try:
            found[torch.ones(1, device=name).cpu().new_empty(0, device=name).device] = number
        except Exception as error:
            # Each missing backend raises a different error.
            raise UsageError(
                f"--max-memory names {name!r}, which cannot be used here: {one_line(error)}; name devices of this "
                f"machine"
            ) from error
    return found


def device_map(model: PreTrainedModel, name: str, where: Where, dtype: torch.dtype) -> dict[str, torch.device]:
    """Where each part of a model goes: as much as fits on the first device, the next layers on the second, and so on.

    Args:
        model: Without values.
        name: The checkpoint's, for messages.
        where: The devices.
        dtype: Of weights that are not quantized.

    Returns:
        Devices by the names of modules; a layer is never divided.

    Raises:
        UsageError: If a device is absent, or it does not fit on all of them together.
    """
    memory = usable_memory(where)
    # The CPU comes last: it is the slowest.
    devices = sorted(memory, key=lambda device: device.type == "cpu")
    keys: dict[int | str, torch.device] = {
        "cpu" if device.type == "cpu" else number: device for number, device in enumerate(devices)
    }
    # Scales are not counted there.
    share = 0.5 / (0.5 + SCALE_BYTES) if where.quantize == "4bit" else 1.0
    found = infer_auto_device_map(
        model,
        max_memory={key: int(memory[device] * share) for key, device in keys.items()},
        no_split_module_classes=list(model._no_split_modules or ()),
        dtype=dtype,
        special_dtypes=_quantized_dtypes(model, where),
        # Buffers are where their layers are.
        offload_buffers=True,
    )
    if "disk" in found.values():
        limits = ", ".join(f"{device} with {number / 1e9:.3g} GB" for device, number in memory.items())
        raise UsageError(
            f"{name} does not fit in {limits} together; allow more with --max-memory, use --quantize 8bit or 4bit, or "
            f"a machine with more memory"
        )
    return {name: keys[key] for name, key in found.items()}


def _quantized_dtypes(model: PreTrainedModel, where: Where) -> dict[str, torch.dtype | CustomDtype]:
    if where.quantize is None:
        return {}
    head = model.get_output_embeddings()
    dtype = torch.int8 if where.quantize == "8bit" else CustomDtype.INT4
    return {
        f"{name}.weight": dtype
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def spread(model: PreTrainedModel, where: Mapping[str, torch.device]) -> None:
    """Have each part of a model, whose weights are there already, get its inputs where it is."""
    devices = list(dict.fromkeys(where.values()))
    # What the model itself computes between its parts takes indices on the CPU, wherever the rest is.
    main = CPU if CPU in devices else devices[0]
    skipped = model._skip_keys_device_placement or ()
    skipped = [skipped] if isinstance(skipped, str) else skipped
    with quiet("transformers"):
        remove_hook_from_module(model, recurse=True)
        # Caches hold every layer's keys where the layer is.
        keys = list(dict.fromkeys((*skipped, "past_key_values", "cache")))
        dispatch_model(model, where, main_device=main, skip_keys=keys, force_hooks=True)
    places = ", ".join(map(str, devices))
    LOG.info(f"the model is spread over {places}; each layer is computed where it is")


def device_types(model: torch.nn.Module) -> set[str]:
    """The kinds of devices that a model's parameters are on."""
    return {parameter.device.type for parameter in model.parameters()}
