"""A source blended into the resident target by mergekit's own methods, and put back, bit for bit.

Mergekit plans and computes the blend as `mergekit-yaml` does, tensor by tensor, from the files of its models. Where
`mergekit-yaml` would write a tensor, the resident target's parameter gets it: neither the source nor the result is in
memory as a model. What a blend replaces is read back from the target's files. (`Blender` says when that cannot be.)
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoTokenizer

from dapa_merge.checkpoint.converting.standard import standard_folder
from dapa_merge.checkpoint.files import Checkpoint, open_checkpoint
from dapa_merge.checkpoint.header import TORCH_NAMES, Tensor
from dapa_merge.checkpoint.region import Region
from dapa_merge.compare.mergekit_merge import Blend as Blend
from dapa_merge.compare.mergekit_merge import Merge, prepared
from dapa_merge.compare.mergekit_merge import merge_config as merge_config
from dapa_merge.errors import CheckpointError
from dapa_merge.evaluate.live import LiveModel, load_model, mapped_values
from dapa_merge.evaluate.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Blender:
    """Blends a source into the target that is in memory.

    Where the models' tokens differ, mergekit matches them by name to the target's, whose tokens the result keeps.

    Where the loaded model has other tensors than mergekit writes (a mixture whose experts transformers fuses), mergekit
    writes each blend to a temporary folder, and it is loaded from there, beside the resident target, which keeps its
    memory: twice the target's size, for as long as a blend lasts.

    Attributes:
        live: The resident target.
        why_not: Why blends are not live; empty if they are.
    """

    def __init__(
        self,
        live: LiveModel,
        target: Checkpoint,
        source: Checkpoint,
        pretrained: Checkpoint | None,
        *,
        device: str = "cpu",
        dir: Path | None = None,
    ) -> None:
        """Find the model's parameter for each tensor that mergekit writes. Reads all of the target once.

        Args:
            live: The resident target, as it is in its files.
            target: Its checkpoint.
            source: The aligned model.
            pretrained: What both were fine-tuned from, if it is known.
            device: What mergekit computes on, as with `mergekit-yaml --device`.
            dir: Where models are written that cannot be blended live; None for the system's place.

        Raises:
            CheckpointError: If mergekit cannot merge these models.
            HubError: If weights have to be fetched, and the Hub does not give them.
        """
        self.live = live
        self._target, self._source = target.whole(), source.whole()
        self._pretrained = pretrained and pretrained.whole()
        self._device, self._dir = device, dir
        self._vocabularies: dict[str, bool] = {}
        self._places: dict[str, torch.Tensor] = {}
        self._is_blended = False
        self.why_not = self._find_places()

    @property
    def is_live(self) -> bool:
        """Whether blends are made in the resident target."""
        return not self.why_not

    @contextmanager
    def blended(self, blend: Blend) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
        """The blend as a model, and its tokenizer, which is the target's, for the length of a `with` block.

        Each tensor is what mergekit writes, as the target stores it; where it matches tokens, it leaves out rows that
        are no token's, and these are the target's. Afterwards the target is as it was, bit for bit, however the `with`
        block ends. These do not nest.

        Raises:
            CheckpointError: If mergekit cannot merge these models, or writes what cannot be loaded.
            UsageError: If there is no such method, or not the memory for it.
            RuntimeError: If something is blended already.
        """
        if self._is_blended:
            raise RuntimeError("something is blended already; leave its `with` block first")
        self._is_blended = True
        try:
            with self._blended_live(blend) if self.is_live else self._written(blend) as found, quiet_transformers():
                yield found
        finally:
            self._is_blended = False

    @contextmanager
    def _blended_live(self, blend: Blend) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
        changed: list[str] = []
        try:
            with self._prepared(blend) as merge:
                for name, value in merge.tensors():
                    if name in self._places:
                        # Before the first byte: what breaks off is undone like what is finished.
                        changed.append(name)
                        self._put(name, value)
            if left_out := self._places.keys() - changed:
                raise CheckpointError(
                    f"mergekit leaves {min(left_out)} out of its {blend.name} of {self._target.name} and "
                    f"{self._source.name}"
                )
            yield self.live.model, self.live.tokenizer
        finally:
            for name in changed:
                self._put(name, self._own(name))

    @contextmanager
    def _written(self, blend: Blend) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
        target = self._target
        with tempfile.TemporaryDirectory(prefix="dapa-merge-", dir=self._dir) as folder:
            with self._prepared(blend) as merge:
                merge.write(Path(folder), target)
            written = replace(
                open_checkpoint(folder), name=f"the {blend.name} of {target.name} and {self._source.name}"
            )
            model, tokenizer = load_model(written, self.live.model.device)
            try:
                yield model, tokenizer
            finally:
                # At once, though whoever asked for the model may still hold it.
                model.to("meta")
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    def _prepared(self, blend: Blend) -> AbstractContextManager[Merge]:
        models = [self._target, self._source]
        if blend.method != "linear" and self._pretrained is not None:
            models.append(self._pretrained)
        keeps_tokenizer = any(self._has_other_vocabulary(other) for other in models[1:])
        return prepared(blend, models, keeps_tokenizer=keeps_tokenizer, device=self._device)

    def _has_other_vocabulary(self, other: Checkpoint) -> bool:
        """Whether tokens, or their number of rows, differ from the target's: mergekit has to match token by token."""
        if other.name not in self._vocabularies:
            num_rows = len(self.live.model.get_input_embeddings().weight)
            tensors = [name for name, shape in self._target.shapes.items() if shape[:1] == (num_rows,)]
            has_other_rows = any(other.shapes.get(name, (num_rows,))[:1] != (num_rows,) for name in tensors)
            tokens = _vocabulary(other)
            has_other_tokens = tokens is not None and tokens != self.live.tokenizer.get_vocab()
            self._vocabularies[other.name] = has_other_rows or has_other_tokens
        return self._vocabularies[other.name]

    def _find_places(self) -> str:
        """Find the live tensor for every tensor that mergekit writes; or say which there is none for."""
        # Which tensors there are does not depend on the method.
        with self._prepared(Blend("linear", 1.0)) as merge:
            outputs = {task.output_weight.name for task in merge.tasks()}
        target, model = self._target, self.live.model
        kind = f"transformers loads {target.name} as a {type(model).__name__}"
        # Tied weights have several names, and one of them in files.
        names: dict[int, list[str]] = {}
        state = model.state_dict(keep_vars=True)
        for name, value in state.items():
            names.setdefault(id(value), []).append(name)
        for aliases in names.values():
            places = [name for name in aliases if name in outputs and name in target.tensors]
            if not places:
                return f"{kind} with {aliases[0]}, which is not a tensor of its files that mergekit merges"
            if len(places) > 1:
                return f"{kind} in which {' and '.join(places)} are one"
            self._places[places[0]] = state[places[0]]
        for name, place in self._places.items():
            if target.tensors[name].dtype not in TORCH_NAMES or not _is_same(place, self._own(name)):
                return f"{kind} in which {name} is not as in its files"
        return ""

    def _own(self, name: str) -> torch.Tensor:
        """The target's own values of a tensor, not to be written to."""
        return mapped_values(self._target, Region.of(self._target.tensors[name]))

    def _put(self, name: str, value: torch.Tensor) -> None:
        """Set a live tensor to a value as the target stores it."""
        place = self._places[name]
        if value.ndim and value.shape[1:] == place.shape[1:]:
            # Where mergekit matches tokens, it writes a row for each, and leaves out rows that are no token's.
            place = place[: len(value)]
        if value.shape != place.shape:
            raise CheckpointError(
                f"mergekit makes {name} {list(value.shape)}, but {self._target.name} has {list(place.shape)}"
            )
        with torch.no_grad():
            place.copy_(value.to(_dtype(self._target.tensors[name])))


def _dtype(tensor: Tensor) -> torch.dtype:
    return getattr(torch, TORCH_NAMES[tensor.dtype])  # type: ignore[no-any-return]


def _is_same(place: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a live tensor has the bits that loading a value gives."""
    if place.shape != value.shape:
        return False
    loaded = value.to(place.device, place.dtype)
    return torch.equal(*(one.detach().reshape(-1).view(torch.uint8) for one in (place, loaded)))


def _vocabulary(checkpoint: Checkpoint) -> dict[str, int] | None:
    """The ids of a checkpoint's tokens; None where it has no tokenizer, which mergekit takes for the target's."""
    try:
        with quiet_transformers(), standard_folder(checkpoint) as folder:
            return dict(AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab())
    except Exception:
        # As many ways to fail as there are tokenizers.
        return None
