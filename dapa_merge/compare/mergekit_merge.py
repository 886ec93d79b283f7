"""What mergekit is told when it blends a source into a target, and how it is run without a word."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import mergekit.tokenizer.build
import torch
from mergekit.architecture import get_architecture_info
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import LoaderCache, SaveTensor
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from dapa_merge.checkpoint.converting.derived import link_files
from dapa_merge.checkpoint.converting.standard import standard_folder
from dapa_merge.checkpoint.files import TEMPLATES, Checkpoint
from dapa_merge.checkpoint.header import TORCH_NAMES
from dapa_merge.errors import CheckpointError, DapaError, UsageError, one_line
from dapa_merge.evaluate.quiet import quiet_transformers

# Of one file: mergekit holds so many in memory before it writes them.
MAX_SHARD_PARAMETERS = 500_000_000
# Beside weights and config: tokenizers, chat templates, and how to generate.
_COMPANIONS = (".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True)
class Blend:
    """One of mergekit's methods, with its settings.

    Attributes:
        method: `linear`, `task_arithmetic` or `ties`.
        weight: Of the source.
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
    blend: Blend,
    target: str,
    source: str,
    pretrained: str | None,
    *,
    keeps_tokenizer: bool,
    out_dtype: str | None = None,
) -> MergeConfiguration:
    """What mergekit is told, as its own object.

    `linear` gives the target the weight that the source leaves over. The other two subtract what both were fine-tuned
    from; without it, they subtract the target, and the source's difference is all that there is to add. (TIES then has
    its weight as `lambda`, because a single weight is divided out again when it is normalized.)

    Args:
        blend: The method and its settings.
        target: A folder, or what mergekit takes for a model.
        source: Likewise.
        pretrained: What both were fine-tuned from, if it is known.
        keeps_tokenizer: Whether vocabularies differ, so that mergekit has to match the source's tokens to the target's.
        out_dtype: What mergekit writes; None for the widest of its models.

    Raises:
        UsageError: If there is no such method here.
    """
    ours, theirs = _reference(target), _reference(source)
    base, shared, given = ours, {}, {"weight": blend.weight}
    models = [{"model": theirs, "parameters": given}]
    if blend.method == "linear":
        models.insert(0, {"model": ours, "parameters": {"weight": 1 - blend.weight}})
    elif blend.method in ("task_arithmetic", "ties"):
        if blend.method == "ties":
            given["density"] = blend.density
        if pretrained is not None:
            base = _reference(pretrained)
            models.insert(0, {"model": ours, "parameters": {**given, "weight": 1.0}})
        elif blend.method == "ties":
            given["weight"], shared = 1.0, {"lambda": blend.weight}
    else:
        raise UsageError(f"{blend.method!r} is no method of a blend; there are linear, task_arithmetic and ties")
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
    """A model of mergekit's; the name of a folder may have what means a revision or an adapter elsewhere."""
    if os.path.isdir(model):
        return ModelReference(model=ModelPath(path=model))
    return ModelReference.parse(model)


class Merge(NamedTuple):
    """A merge that mergekit can be asked for, for as long as `prepared` lasts.

    Attributes:
        config: The whole of it; mergekit rewrites it while it plans.
        options: How mergekit runs.
    """

    config: MergeConfiguration
    options: MergeOptions

    def tasks(self) -> list[Any]:
        """Mergekit's plan: one task for each tensor of the result, named by its `output_weight`."""
        LoaderCache().setup(self.options)
        architecture = get_architecture_info(self.config, self.options)
        out_config = self.config.base_model.config(trust_remote_code=False)
        planner = MergePlanner(self.config, architecture, self.options, out_config)
        # A plan to write is only a plan: nothing is written but by tasks that are left out here.
        plan = planner.plan_to_disk(out_path="")
        return [task.tensor_task for task in plan if isinstance(task, SaveTensor)]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the result, with its name; none is held after the next is asked for."""
        for task, value in Executor(self.tasks(), math_device=self.options.device).run(quiet=True):
            # An optional one that mergekit leaves out.
            if value is not None:
                yield task.output_weight.name, value

    def write(self, folder: Path, target: Checkpoint) -> None:
        """Let mergekit write the result, and put the target's own config and tokenizer beside the tensors.

        Mergekit would take them from the pretrained model, and the result would not know where a response ends.
        """
        run_merge(self.config, str(folder), self.options)
        written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = dict(target.config)
        if "vocab_size" in config and "vocab_size" in written:
            config["vocab_size"] = written["vocab_size"]
        names = [
            path.name
            for path in target.folder.iterdir()
            if path.suffix in _COMPANIONS and path.name != "config.json" and not path.name.endswith(".index.json")
        ]
        link_files(target.folder, folder, [*names, *([TEMPLATES] if (target.folder / TEMPLATES).is_dir() else [])])
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@contextmanager
def prepared(blend: Blend, models: Sequence[Checkpoint], *, keeps_tokenizer: bool, device: str) -> Iterator[Merge]:
    """A blend as a merge of folders that mergekit can read, which says nothing while it works.

    Args:
        blend: The method and its settings.
        models: The whole target, the whole source, and what both were fine-tuned from if it is known.
        keeps_tokenizer: Whether vocabularies differ, so that mergekit has to match the source's tokens to the target's.
        device: What mergekit computes on, as with `mergekit-yaml --device`.

    Raises:
        CheckpointError: For whatever mergekit raises in the `with` block: it cannot merge these models.
        UsageError: If the memory of the device is not enough.
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
            with quiet_transformers(), _quiet_mergekit():
                yield Merge(config, options)
        except DapaError:
            raise
        except torch.OutOfMemoryError as error:
            raise UsageError(f"mergekit's {blend.name} does not fit in the memory of {device}") from error
        except Exception as error:
            # Whatever the models make it raise; there is no common class.
            names = ", ".join(checkpoint.name for checkpoint in models)
            raise CheckpointError(f"mergekit cannot merge {names}: {one_line(error)}") from error
        finally:
            # It would keep their files open, and believe what it knows of a folder that is made anew.
            for model in config.referenced_models():
                LoaderCache().loaders.pop(model, None)


def _common_dtype(checkpoint: Checkpoint) -> str | None:
    """What a checkpoint stores all of its tensors as; None if not all alike."""
    dtypes = {TORCH_NAMES.get(tensor.dtype) for tensor in checkpoint.tensors.values()}
    return dtypes.pop() if len(dtypes) == 1 else None


@contextmanager
def _quiet_mergekit() -> Iterator[None]:
    """No progress bars and no log of mergekit's; whoever calls us has their own settings back."""
    root, logger, building = logging.getLogger(), logging.getLogger("mergekit"), mergekit.tokenizer.build
    # It logs through the root logger, too, which would get a handler for good if it had none.
    handler, level, bars = logging.NullHandler(), logger.level, building.tqdm
    root.addHandler(handler)
    root.addFilter(_drop)
    logger.setLevel(logging.CRITICAL + 1)
    # This one bar has no switch.
    building.tqdm = SimpleNamespace(tqdm=lambda models, **_: models)
    try:
        yield
    finally:
        building.tqdm = bars
        logger.setLevel(level)
        root.removeFilter(_drop)
        root.removeHandler(handler)


def _drop(record: logging.LogRecord) -> bool:
    """A filter of a logger drops what is logged on that logger itself, and nothing that comes from others."""
    return False
