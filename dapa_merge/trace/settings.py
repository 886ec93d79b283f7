"""How a model is traced causally, and what of it a model is able to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dapa_merge.errors import UsageError
from dapa_merge.trace.contrast import NUM_TOKENS
from dapa_merge.trace.sites import find_sites, kinds_in
from dapa_merge.trace_options import KINDS, NOISE, NUM_SAMPLES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Kinds whose outputs are restored in several layers at once: one layer's changes little (ROME, section 2.2).
WINDOWED = ("mlp", "attention")
# Of all layers, how many a window has: 10 of 48 in ROME.
WINDOW_SHARE = 0.2


@dataclass(frozen=True)
class Settings:
    """How a model is traced.

    Attributes:
        kinds: Some of `KINDS`.
        noise: Standard deviation of the noise, as a multiple of that of the subjects' embeddings.
        num_samples: Samples of noise for each prompt.
        window: Layers that are restored at once for the MLP and the attention; the other kinds have one.
        num_tokens: Of each response, how many tokens are counted, at most.
        seed: Of the noise.
    """

    kinds: tuple[str, ...]
    noise: float = NOISE
    num_samples: int = NUM_SAMPLES
    window: int = 1
    num_tokens: int = NUM_TOKENS
    seed: int = 0


def default_window(num_layers: int) -> int:
    """Layers of a window for a model of so many."""
    return max(1, round(WINDOW_SHARE * num_layers))


def window_layers(settings: Settings, kind: str, layer: int, num_layers: int) -> range:
    """The layers that are restored at once for a layer, of which half of the window lies before it."""
    width = settings.window if kind in WINDOWED else 1
    first = layer - width // 2
    return range(max(0, first), min(num_layers, first + width))


def make_settings(model: PreTrainedModel, kinds: Sequence[str] | None = None, **settings: Any) -> Settings:
    """Settings for a model, of which those that are not given, or None, are its defaults.

    Raises:
        UsageError: If the model lacks one of `kinds`.
    """
    for kind in kinds or ():
        if not any(find_sites(model, kind)):
            raise UsageError(f"{type(model).__name__} has no {kind} to trace; leave it out")
    chosen = {name: value for name, value in settings.items() if value is not None}
    num_layers = len(find_sites(model, "hidden"))
    ordered = [kind for kind in KINDS if kinds is None or kind in kinds]
    present = kinds_in(model) if kinds is None else KINDS
    return Settings(
        tuple(kind for kind in ordered if kind in present), **{"window": default_window(num_layers), **chosen}
    )
