"""A target that is loaded when it is first needed, and stays until it is closed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from dapa_merge.evaluate.live import LiveModel

if TYPE_CHECKING:
    import torch

    from dapa_merge.checkpoint.plan import Plan


class Resident:
    """Owns a live target.

    Attributes:
        plan: Target and source.
        device: Where the target is asked.
    """

    def __init__(self, plan: Plan, device: torch.device, on_load: Callable[[], None] = lambda: None) -> None:
        """Loads nothing yet; `on_load` is called before that is done."""
        self.plan = plan
        self.device = device
        self._on_load = on_load

    @cached_property
    def live(self) -> LiveModel:
        """The resident target.

        Raises:
            CheckpointError: If it cannot be loaded.
        """
        self._on_load()
        return LiveModel(self.plan, self.device)

    def close(self) -> None:
        """Give the target's memory back, if it was ever loaded."""
        if "live" in self.__dict__:
            self.live.close()
            del self.__dict__["live"]
