"""The merge method `dapa`; importing this module registers it with mergekit.

`mergekit-yaml` needs no import: see `pydantic_hook`. Written against mergekit 0.1.5.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from mergekit import merge_methods
from mergekit.merge_methods import (
    BasePolicy,
    BatchOptions,
    InputContract,
    MergeMethod,
    MergeMethodSpec,
    OptionalTensorPolicy,
    TensorGroup,
)
from mergekit.merge_methods.base import ParameterScope, ParameterSpec

from dapa_merge.errors import DapaError
from dapa_merge.progress import ConsoleReporter
from dapa_merge.recipe import METHOD, PARAMETERS, Recipe, load_recipe, recipe_from
from dapa_merge.report import spans
from dapa_merge.run import given_selection, make_plan, search_recipe

SPEC = MergeMethodSpec(
    name=METHOD,
    pretty_name="DAPA",
    reference_url="https://arxiv.org/abs/2406.01514",
    parameters=tuple(ParameterSpec(name, Any, ParameterScope.SHARED, default=None) for name in PARAMETERS),
    contract=InputContract(base=BasePolicy.REQUIRED, min_inputs=2, max_inputs=2),
    # A weight that only the target has is the target's.
    optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
    # Tensors are handed through; moving them to an accelerator and back would only cost time.
    uses_accelerator=False,
)


class MergeRefused(DapaError, click.ClickException):
    """A fault inside mergekit; its command line shows the sentence and takes over the exit code."""

    def __init__(self, error: DapaError) -> None:
        click.ClickException.__init__(self, str(error))
        self.exit_code = error.exit_code


@dataclass(frozen=True)
class _Selected:
    """What was selected, and what the weight files were then, so that a replaced model is not taken for the old one."""

    tensor_names: frozenset[str]
    files: tuple[Path, ...]
    stamps: tuple[tuple[int, int], ...]

    def is_stale(self) -> bool:
        return _stamps(self.files) != self.stamps


class DapaMerge(MergeMethod):  # type: ignore[misc]  # mergekit is not typed
    """Hands through the target's tensors, and the source's where a unit was selected.

    The selection is found once per recipe, however many threads ask, and before mergekit writes anything if the recipe
    was announced by `accept`.
    """

    spec = SPEC

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._announced: dict[tuple[str, str], Recipe] = {}
        self._selected: dict[Recipe, _Selected] = {}

    def announce(self, recipe: Recipe) -> None:
        """Remember a recipe, so that its search can start when mergekit plans the merge of its models."""
        self._announced[str(recipe.target), str(recipe.source)] = recipe

    def validate_inputs(
        self, input_ids: Sequence[Hashable], base_id: Hashable | None = None, *, group_name: str | None = None
    ) -> None:
        super().validate_inputs(input_ids, base_id, group_name=group_name)
        others = [str(input_id) for input_id in input_ids if input_id != base_id]
        # mergekit validates the inputs of the whole merge while it plans, before there is an output folder.
        if len(others) == 1 and (recipe := self._announced.get((str(base_id), others[0]))) is not None:
            self.selected_tensors(recipe)

    def selected_tensors(self, recipe: Recipe) -> frozenset[str]:
        """Names of the tensors to take from the source; searched for once if the recipe asks for it."""
        with self._lock:
            selected = self._selected.get(recipe)
            if selected is None or selected.is_stale():
                try:
                    selected = self._selected[recipe] = _select(recipe)
                except DapaError as error:
                    raise MergeRefused(error) from error
            return selected.tensor_names

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """One tensor per group, in the target's own dtype; `input_dtypes`, the promoted ones, are not used."""
        results = []
        for group, given in zip(groups, parameters, strict=True):
            base, (other,) = group.base, group.non_base
            assert base is not None
            recipe = self._recipe_of(str(base.id), str(other.id), given)
            name = group.metadata.name
            tensor = base.tensor
            if name in self.selected_tensors(recipe):
                tensor = other.tensor.to(tensor.dtype)
            results.append(tensor if out_dtype is None else tensor.to(out_dtype))
        return tuple(results)

    def _recipe_of(self, target: str, source: str, given: Mapping[str, Any]) -> Recipe:
        announced = self._announced.get((target, source))
        if announced is not None:
            return announced
        content = {
            "merge_method": METHOD,
            "base_model": target,
            "models": [{"model": source}],
            "parameters": {name: value for name, value in given.items() if value is not None},
        }
        try:
            return recipe_from(content)
        except DapaError as error:
            raise MergeRefused(error) from error


def accept(raw: Mapping[str, Any]) -> None:
    """Check a merge configuration before mergekit does, and announce it to the method.

    Args:
        raw: What mergekit is about to validate, with `merge_method: dapa`.

    Raises:
        MergeRefused: If it is not a recipe that can be followed; names the line if mergekit's command line reads it.
    """
    try:
        file = _file_being_read()
        METHOD_INSTANCE.announce(load_recipe(file) if file is not None else recipe_from(_plain(raw)))
    except DapaError as error:
        raise MergeRefused(error) from error


def register() -> None:
    """Make `dapa` known to mergekit; a second call does nothing."""
    if all(method.spec.name != METHOD for method in merge_methods.registered_methods()):
        merge_methods.register(METHOD_INSTANCE)


def _select(recipe: Recipe) -> _Selected:
    plan = make_plan(recipe)
    files = tuple(checkpoint.folder / shard for checkpoint in (plan.target, plan.source) for shard in checkpoint.shards)
    stamps = _stamps(files)
    reporter = ConsoleReporter()
    selection = given_selection(recipe, plan)
    if selection is None:
        selection = search_recipe(recipe, "auto", reporter).minimum.units
    reporter.say(f"dapa: transplanting {spans(list(map(str, selection)))} from {recipe.source}")
    return _Selected(frozenset(name for unit in selection for name in unit.tensors), files, stamps)


def _stamps(files: Sequence[Path]) -> tuple[tuple[int, int], ...]:
    return tuple((status.st_size, status.st_mtime_ns) for status in map(Path.stat, files))


def _file_being_read() -> Path | None:
    """The recipe file of a running `mergekit-yaml`, whose lines its parsed content no longer knows."""
    context = click.get_current_context(silent=True)
    if context is None or context.info_name is None or "config_file" not in context.params:
        return None
    path = Path(context.params["config_file"])
    return path if path.is_file() else None


def _plain(value: object) -> Any:
    """Mergekit's own objects as the YAML that they stand for."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    dump = getattr(value, "model_dump", None)
    return _plain(dump(mode="json", exclude_none=True)) if dump is not None else value


METHOD_INSTANCE = DapaMerge()
register()
