"""The most memory that a piece of work used, where the system says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Written there, it sets the process's peak back to what is in use; proc(5).
RESET_PEAK = "5"


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, int]]:
    """Yields what is filled in at the end: bytes by place; `host` is resident (Linux), `device` allocated (CUDA)."""
    import torch

    peak: dict[str, int] = {}
    was_reset = False
    with suppress(OSError):
        RESET.write_text(RESET_PEAK)
        was_reset = True
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        yield peak
    finally:
        if was_reset and (num_bytes := _peak_resident()) is not None:
            peak["host"] = num_bytes
        if device.type == "cuda":
            peak["device"] = torch.cuda.max_memory_allocated(device)


def _peak_resident() -> int | None:
    with suppress(OSError, ValueError):
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None
