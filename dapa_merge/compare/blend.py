"""Blends of source and target by mergekit's own methods, in the resident target, which is restored bit for bit.

Mergekit plans and computes a blend as `mergekit-yaml` does, tensor by tensor, from the files of its models. Instead of
being written, a tensor goes into the resident target's parameter: neither the source nor the result is in memory as a
model. Afterwards the target's values are read back from its files.

Merging into a temporary folder and loading the result is simpler, but takes three to six times as long for each blend
on the miniature. It is used only if the loaded model has other tensors than mergekit writes (a mixture whose experts
transformers fuses).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mergekit.architecture import get_architecture_info
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import LoaderCache, SaveTensor
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dapa_merge.checkpoint.contents import is_settings, parts_of
from dapa_merge.checkpoint.convert import link_files, open_location, standard_folder
from dapa_merge.checkpoint.header import TORCH_NAMES, Tensor
from dapa_merge.checkpoint.open import Checkpoint, open_checkpoint
from dapa_merge.checkpoint.region import Region
from dapa_merge.checkpoint.units import architecture_name, is_sibling
from dapa_merge.errors import CheckpointError, DapaError, UsageError, one_line
from dapa_merge.measure.live import LiveModel, free, load_model, mapped_values
from dapa_merge.progress import quiet
from dapa_merge.recipe.recipe import Recipe


class Blender:
    """Blends a source into the target that is in memory.

    Where the models' tokens differ, mergekit matches them by name to the target's, whose tokens the result keeps.

    Attributes:
        live: The resident target.
        why_not: The reason if blends are loaded from temporary folders, which takes the target's memory twice; empty if
            they are made in the resident target.
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
        """Find the parameter for each tensor that mergekit writes. Reads all of the target once.

        The live target must match its files; temporary folders are made in `dir`, by default the system's folder.

        Raises:
            CheckpointError: If mergekit cannot merge these models.
            HubError: If weights cannot be fetched from the Hub.
        """
        self.live = live
        self._target, self._source = target.whole(), source.whole()
        self._pretrained = pretrained and pretrained.whole()
        self._device, self._dir = device, dir
        self._vocabularies: dict[str, bool] = {}
        self._places: dict[str, torch.Tensor] = {}
        self._is_blended = False
        self.why_not = self._find_places()

    @contextmanager
    def blended(self, blend: MergekitBlend) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
        """The blend as a model, with the target's tokenizer, for the length of a `with` block. Blends do not nest.

        Each tensor is what mergekit writes, in the target's dtype. If mergekit matches tokens, it leaves out rows
        without a token, and these stay the target's. Afterwards the target is restored, however the block ends.

        Raises:
            CheckpointError: If mergekit cannot merge these models, or its result cannot be loaded.
            UsageError: If the method is unknown, or does not fit in memory.
            RuntimeError: If something is blended already.
        """
        if self._is_blended:
            raise RuntimeError("something is blended already; leave its `with` block first")
        self._is_blended = True
        try:
            blended = self._written if self.why_not else self._blended_live
            with blended(blend) as found, quiet("transformers"):
                yield found
        finally:
            self._is_blended = False

    @contextmanager
    def _blended_live(self, blend: MergekitBlend) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
        changed: list[str] = []
        try:
            with self._prepared(blend) as merge:
                for name, value in merge.tensors():
                    if name in self._places:
                        # Recorded first, so that a partly written tensor is restored too.
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
    def _written(self, blend: MergekitBlend) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
        target = self._target
        with tempfile.TemporaryDirectory(prefix="dapa-merge-", dir=self._dir) as folder:
            with self._prepared(blend) as merge:
                merge.write(Path(folder), target)
            written = replace(
                open_checkpoint(folder),
                name=f"the {blend.name} of {target.name} and {self._source.name}",
                chat_template=target.chat_template,
            )
            model, tokenizer = load_model(written, self.live.where)
            try:
                yield model, tokenizer
            finally:
                free(model)

    def _prepared(self, blend: MergekitBlend) -> AbstractContextManager[Merge]:
        models = [self._target, self._source]
        if blend.method not in BETWEEN and self._pretrained is not None:
            models.append(self._pretrained)
        keeps_tokenizer = any(self._has_other_vocabulary(other) for other in models[1:])
        return prepared(blend, models, keeps_tokenizer=keeps_tokenizer, device=self._device)

    def _has_other_vocabulary(self, other: Checkpoint) -> bool:
        """Whether tokens or the number of their rows differ from the target's, so that mergekit has to match them."""
        if other.name not in self._vocabularies:
            num_rows = len(self.live.model.get_input_embeddings().weight)
            tensors = [name for name, shape in self._target.shapes.items() if shape[:1] == (num_rows,)]
            has_other_rows = any(other.shapes.get(name, (num_rows,))[:1] != (num_rows,) for name in tensors)
            tokens = _vocabulary(other)
            has_other_tokens = tokens is not None and tokens != self.live.tokenizer.get_vocab()
            self._vocabularies[other.name] = has_other_rows or has_other_tokens
        return self._vocabularies[other.name]

    def _find_places(self) -> str:
        """Find the live tensor for every tensor that mergekit writes; returns the reason if that fails."""
        # The tensors do not depend on the method.
        with self._prepared(MergekitBlend("linear", 1.0)) as merge:
            outputs = {task.output_weight.name for task in merge.tasks()}
        target, model = self._target, self.live.model
        kind = f"transformers loads {target.name} as a {type(model).__name__}"
        # Tied weights have several names, one of them in files.
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
        """The target's own values of a tensor, read-only."""
        return mapped_values(self._target, Region.of(self._target.tensors[name]))

    def _put(self, name: str, value: torch.Tensor) -> None:
        """Set a live tensor to a value in the dtype of the target's file."""
        place = self._places[name]
        if value.ndim and value.shape[1:] == place.shape[1:]:
            # If mergekit matches tokens, it writes no rows without a token.
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
    """Whether a live tensor has the bits of a loaded value."""
    if place.shape != value.shape:
        return False
    loaded = value.to(place.device, place.dtype)
    return torch.equal(*(one.detach().reshape(-1).view(torch.uint8) for one in (place, loaded)))


def _vocabulary(checkpoint: Checkpoint) -> dict[str, int] | None:
    """The ids of a checkpoint's tokens; None without a tokenizer, in which case mergekit uses the target's."""
    try:
        with quiet("transformers"), standard_folder(checkpoint) as folder:
            return dict(AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab())
    except Exception:
        # Tokenizers fail in many ways.
        return None


# Methods that go from the target to the source, and know no pretrained model.
BETWEEN = ("linear", "slerp")
# Number of parameters that mergekit holds in memory before it writes a file.
MAX_SHARD_PARAMETERS = 500_000_000


@dataclass(frozen=True)
class MergekitBlend:
    """One of mergekit's methods, with its settings.

    Attributes:
        method: `linear`, `slerp`, `task_arithmetic` or `ties`.
        density: Share of the entries of each difference that `ties` keeps, in (0, 1].
    """

    method: str
    weight: float
    density: float = 1.0

    @property
    def name(self) -> str:
        """For people, e.g. `linear 0.25`."""
        return f"{self.method.replace('_', ' ')} {self.weight:g}"


def merge_config(
    blend: MergekitBlend,
    target: str,
    source: str,
    pretrained: str | None,
    *,
    keeps_tokenizer: bool,
    out_dtype: str | None = None,
) -> MergeConfiguration:
    """Write a blend as mergekit's own configuration, of folders or other names of models.

    `linear` gives the target the rest of the weight, and so does `slerp`, on a great circle. The other two subtract the
    pretrained model or, without one, the target, so that only the source's difference is added. (TIES then takes its
    weight as `lambda`, because normalization would cancel a single weight.) With `keeps_tokenizer` the source's tokens
    are matched to the target's.
    Without `out_dtype` mergekit writes the widest of its models' dtypes.

    Raises:
        UsageError: If the method is unknown.
    """
    ours, theirs = _reference(target), _reference(source)
    base, given = ours, {"weight": blend.weight}
    shared: dict[str, float] = {}
    models = [{"model": theirs, "parameters": given}]
    if blend.method == "linear":
        models.insert(0, {"model": ours, "parameters": {"weight": 1 - blend.weight}})
    elif blend.method == "slerp":
        models, shared = [{"model": ours}, {"model": theirs}], {"t": blend.weight}
    elif blend.method in ("task_arithmetic", "ties"):
        if blend.method == "ties":
            given["density"] = blend.density
        if pretrained is not None:
            base = _reference(pretrained)
            models.insert(0, {"model": ours, "parameters": {**given, "weight": 1.0}})
        elif blend.method == "ties":
            given["weight"], shared = 1.0, {"lambda": blend.weight}
    else:
        raise UsageError(f"{blend.method!r} is not a method of a blend; known are linear, slerp, task_arithmetic, ties")
    tokenizer = {"source": "base" if base == ours else ours} if keeps_tokenizer else None
    return MergeConfiguration(
        merge_method=blend.method,
        base_model=base,
        models=models,
        parameters=shared or None,
        tokenizer=tokenizer,
        out_dtype=out_dtype,
    )


def _reference(model: str) -> ModelReference:
    """A model for mergekit; a folder's name may have characters that otherwise mark a revision or an adapter."""
    if os.path.isdir(model):
        return ModelReference(model=ModelPath(path=model))
    return ModelReference.parse(model)


class Merge(NamedTuple):
    """A merge by mergekit, valid within `prepared`.

    Attributes:
        config: Its configuration, which mergekit rewrites while it plans.
    """

    config: MergeConfiguration
    options: MergeOptions

    def tasks(self) -> list[Any]:
        """Plan one task for each tensor of the result, named by its `output_weight`."""
        LoaderCache().setup(self.options)
        architecture = get_architecture_info(self.config, self.options)
        out_config = self.config.base_model.config(trust_remote_code=False)
        planner = MergePlanner(self.config, architecture, self.options, out_config)
        # The tasks that would write are left out.
        plan = planner.plan_to_disk(out_path="")
        return [task.tensor_task for task in plan if isinstance(task, SaveTensor)]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor of the result with its name; none is held once the next is requested."""
        for task, value in Executor(self.tasks(), math_device=self.options.device).run(quiet=True):
            # Mergekit leaves out optional tensors.
            if value is not None:
                yield task.output_weight.name, value

    def write(self, folder: Path, target: Checkpoint) -> None:
        """Let mergekit write the result, and add the target's config and tokenizer.

        Mergekit would take those of the pretrained model, which do not define where a response ends.
        """
        run_merge(self.config, str(folder), self.options)
        written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = dict(target.config)
        if "vocab_size" in config and "vocab_size" in written:
            config["vocab_size"] = written["vocab_size"]
        names = [name for name in parts_of(target.folder) if is_settings(name) and name != "config.json"]
        link_files(target.folder, folder, names)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@contextmanager
def prepared(
    blend: MergekitBlend, models: Sequence[Checkpoint], *, keeps_tokenizer: bool, device: str
) -> Iterator[Merge]:
    """Prepare a blend of target, source and, if known, pretrained model, and keep mergekit silent within.

    Raises:
        CheckpointError: For any error of mergekit's in the `with` block.
        UsageError: If it does not fit in the device's memory.
    """
    options = MergeOptions(
        quiet=True, device=device, write_model_card=False, copy_tokenizer=False, out_shard_size=MAX_SHARD_PARAMETERS
    )
    with ExitStack() as stack:
        folders = [str(stack.enter_context(standard_folder(checkpoint))) for checkpoint in models]
        config = merge_config(
            blend,
            folders[0],
            folders[1],
            folders[2] if len(folders) > 2 else None,
            keeps_tokenizer=keeps_tokenizer,
            out_dtype=_common_dtype(models[0]),
        )
        try:
            with quiet("transformers", "mergekit"):
                yield Merge(config, options)
        except DapaError:
            raise
        except torch.OutOfMemoryError as error:
            raise UsageError(f"mergekit's {blend.name} does not fit in the memory of {device}") from error
        except Exception as error:
            # Mergekit's errors have no common class.
            names = ", ".join(checkpoint.name for checkpoint in models)
            raise CheckpointError(f"mergekit cannot merge {names}: {one_line(error)}") from error
        finally:
            # Mergekit would keep their files open, and not notice that a folder was made again.
            for model in config.referenced_models():
                LoaderCache().loaders.pop(model, None)


def _common_dtype(checkpoint: Checkpoint) -> str | None:
    """The dtype of all of a checkpoint's tensors; None if they differ."""
    dtypes = {TORCH_NAMES.get(tensor.dtype) for tensor in checkpoint.tensors.values()}
    return dtypes.pop() if len(dtypes) == 1 else None


def open_pretrained(
    recipe: Recipe, target: Checkpoint, source: Checkpoint, *, partial: bool = False, allow_pickle: bool = False
) -> Checkpoint | None:
    """Open the recipe's `pretrained` model; with `partial`, its headers are enough.

    Returns:
        None if the recipe does not set it, or names the target itself: task arithmetic would be the linear blend.

    Raises:
        UsageError: If it is the source.
        CheckpointError: If its architecture or size differs from the target's.
        HubError: If it cannot be fetched from the Hub.
    """
    if recipe.pretrained is None:
        return None
    found = open_location(recipe.pretrained, partial=partial, allow_pickle=allow_pickle)
    if found.folder.samefile(target.folder):
        return None
    if found.folder.samefile(source.folder):
        raise UsageError(f"{recipe.where('parameters.pretrained')}: the pretrained model is the source itself")
    ours, theirs = architecture_name(target.config), architecture_name(found.config)
    if not is_sibling(target.config, found.config):
        raise CheckpointError(
            f"the pretrained model {found.name} is a {theirs} but the target {target.name} is a {ours}; name the "
            "model that target and source were both fine-tuned from"
        )
    for name, shape in target.shapes.items() if ours == theirs else ():
        # mergekit itself says that it does not blend models of two classes, whose tensors have other names.
        other = found.shapes.get(name)
        # The vocabulary may have grown, and the output layer may be the embedding.
        if (other is None and ".layers." in name) or (other is not None and other[1:] != shape[1:]):
            raise CheckpointError(
                f"the pretrained model {found.name} has {list(other) if other else 'nothing'} for {name} but the "
                f"target {target.name} has {list(shape)}; name the model that both were fine-tuned from"
            )
    return found
