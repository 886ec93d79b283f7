"""What is written in a target's place: the source's values, as the target stores them."""

from __future__ import annotations

from collections.abc import Iterator

from dapa_merge.checkpoint.files import Checkpoint, iterate_bytes
from dapa_merge.checkpoint.header import TORCH_NAMES, Tensor
from dapa_merge.errors import CheckpointError, ValueDoesNotFit

# For each float dtype, the unsigned integer of its width and the bits of its exponent (IEEE 754, and bfloat16).
EXPONENTS = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000), "F64": ("<u8", 0x7FF << 52)}


def source_bytes(source: Checkpoint, tensor: Tensor, dtype: str) -> Iterator[bytes]:
    """A source tensor's bytes as the target stores it, in pieces; the same bytes where the dtypes agree.

    A conversion rounds to nearest, once, as torch does.

    Raises:
        ValueDoesNotFit: If a finite value becomes infinite in the target's dtype.
    """
    if tensor.dtype == dtype:
        yield from iterate_bytes(source, tensor)
        return
    import torch

    from_dtype, to_dtype = (getattr(torch, TORCH_NAMES[name]) for name in (tensor.dtype, dtype))
    for piece in iterate_bytes(source, tensor):
        values = torch.frombuffer(bytearray(piece), dtype=from_dtype)
        converted = values.to(to_dtype)
        if num_lost := int((converted.isinf() & values.isfinite()).sum()):
            raise ValueDoesNotFit(
                f"{tensor.name} of the source {source.name} has at least {num_lost} values that {tensor.dtype} holds "
                f"but {dtype}, the target's dtype, does not"
            )
        yield converted.view(torch.uint8).numpy().tobytes()


def refuse_not_finite(piece: bytes, source: Checkpoint, theirs: Tensor, dtype: str) -> None:
    """Raise if a value in a piece of a source tensor is infinite or not a number: all bits of its exponent are set."""
    import numpy

    width, exponent = EXPONENTS[dtype]
    values = numpy.frombuffer(piece, dtype=width)
    if ((values & exponent) == exponent).any():
        raise CheckpointError(
            f"{theirs.name} of the source {source.name} holds values that are infinite or not a number; it is damaged"
        )
