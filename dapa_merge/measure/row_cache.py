"""A key-value cache whose rows can leave, join and take tokens back while a batch is decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Columns that a buffer has to spare when it is made: copying it for every new token would cost more than a step.
ROOM = 32


def is_understood(model: PreTrainedModel) -> bool:
    """Whether all that the model remembers of a text are keys and values of its tokens, one row for each text.

    Recurrent and convolution states cannot take a token back, and a model with its own way of preparing its inputs may
    expect what only `generate` gives.
    """
    kind = type(model)
    if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
        return False
    for name in (
        "prepare_inputs_for_generation",
        "_update_model_kwargs_for_generation",
        "_prepare_cache_for_generation",
    ):
        if getattr(kind, name, None) is not getattr(GenerationMixin, name, None):
            return False
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


class RowLayer(DynamicLayer):  # type: ignore[misc]
    """The keys and values of one layer, `[rows, heads, columns, width]`, at the front of buffers with room to grow.

    A sliding window is left to the attention mask: a column may yet be taken back, and uncover an older one.
    """

    is_croppable = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._columns = 0
        self._buffers = [_buffer(states, states.shape[0], states.shape[2]) for states in (key_states, value_states)]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, stop = self._columns, self._columns + key_states.shape[2]
        for index, states in enumerate((key_states, value_states)):
            if stop > self._buffers[index].shape[2]:
                wider = _buffer(states, states.shape[0], stop)
                wider[:, :, :start] = self._buffers[index][:, :, :start]
                self._buffers[index] = wider
            self._buffers[index][:, :, start:stop] = states
        self._show(stop)
        return self.keys, self.values

    def replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Hold copies of other keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self._buffers = [_buffer(states, states.shape[0], states.shape[2]) for states in (keys, values)]
        for buffer, states in zip(self._buffers, (keys, values), strict=True):
            buffer[:, :, : states.shape[2]] = states
        self._show(keys.shape[2])

    def keep(self, columns: int) -> None:
        """Forget the columns behind."""
        self._show(columns)

    def _show(self, columns: int) -> None:
        self._columns = columns
        self.keys, self.values = (buffer[:, :, :columns] for buffer in self._buffers)


class RowCache(Cache):  # type: ignore[misc]
    """The cache of a batch; each row's tokens stand together at its right end, and what is left of them is masked.

    Only so do the distances between columns stay those between tokens, of which sliding windows and ALiBi are made.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=RowLayer)

    @property
    def columns(self) -> int:
        """How many there are, the masked ones too."""
        return int(self.get_seq_length()) if self.layers else 0

    def copy(self) -> RowCache:
        """Another cache that holds the same."""
        other = RowCache()
        for layer in self.layers:
            theirs = RowLayer()
            theirs.replace(layer.keys, layer.values)
            other.layers.append(theirs)
        return other

    def arrange(self, rows: list[int], stops: list[int], columns: int) -> None:
        """Keep some rows, in any order and number, each only up to a column of its own.

        Args:
            rows: Which to keep; one may come several times.
            stops: For each, the column before which its last token stands, which becomes the last column.
            columns: How many to keep at least.
        """
        if not self.layers:
            return
        if rows == list(range(self.layers[0].keys.shape[0])) and set(stops) == {stops[0]}:
            # Only at the right end is there something to take away; what is too much at the left end is masked.
            for layer in self.layers:
                layer.keep(stops[0])
            return
        device = self.layers[0].device
        chosen = torch.tensor(rows, device=device)
        alike = len(set(stops)) == 1
        places = (torch.tensor(stops, device=device)[:, None] - columns + torch.arange(columns, device=device)).clamp(0)
        for layer in self.layers:
            pair = []
            for states in (layer.keys, layer.values):
                if alike:
                    pair.append(states[:, :, stops[0] - columns : stops[0]].index_select(0, chosen))
                else:
                    pair.append(states[chosen[:, None], :, places].transpose(1, 2))
            layer.replace(*pair)

    def join(self, other: RowCache) -> None:
        """Put the rows of another cache below these."""
        columns = max(self.columns, other.columns)
        for layer, theirs in zip(self.layers, other.layers, strict=True):
            pair = []
            for ours, others in ((layer.keys, theirs.keys), (layer.values, theirs.values)):
                # Zeros: what is masked must still be a number.
                wide = [
                    torch.nn.functional.pad(states, (0, 0, columns - states.shape[2], 0)) for states in (ours, others)
                ]
                pair.append(torch.cat(wide))
            layer.replace(*pair)


def _buffer(like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return like.new_empty((rows, like.shape[1], columns + ROOM, like.shape[3]))
