"""Where what is traced comes out of a model: modules by their paths, read off its parameters.

The gate, up and down projections and the attention are those of `checkpoint.architecture`. What an MLP or an attention
puts out is what its last projection does (some modules add the residual stream to that); with experts, it is the output
of the parts of the layer that hold them, whatever is beside them there (a router, a shared expert).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dapa_merge.checkpoint.architecture import Unit, layer_path
from dapa_merge.checkpoint.region import whole_box
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.evaluate.live import units_in
from dapa_merge.trace_options import KINDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Site:
    """A part of what one module puts out.

    Attributes:
        module: The module's path in the model.
        features: The first feature of its output and the one after the last; None for all of them.
    """

    module: str
    features: tuple[int, int] | None = None


def layer_paths(model: PreTrainedModel) -> list[str]:
    """The paths of a model's layers, in order.

    Raises:
        CheckpointError: If they are not found.
    """
    # Every MLP that is known has a down projection.
    return [layer_path(unit.tensors[0]) for unit in units_in(model, ("down",))]


def find_sites(model: PreTrainedModel, kind: str) -> list[tuple[Site, ...]]:
    """For each layer where one of `KINDS` comes out; nowhere in a layer that has another mixer in place of attention.

    Raises:
        UsageError: If the model has no such outputs.
        CheckpointError: If its layers are not found.
    """
    paths = layer_paths(model)
    if kind == "hidden":
        return [(Site(path),) for path in paths]
    name = "down" if kind == "mlp" else kind
    try:
        units = units_in(model, (name,))
    except CheckpointError as error:
        raise UsageError(
            f"{type(model).__name__} has no {kind} to trace: it has no {name} projections of its own; leave {kind} out"
        ) from error
    sites: list[tuple[Site, ...]] = [()] * len(paths)
    for unit in units:
        sites[unit.layer] = tuple(dict.fromkeys(_sites_of(model, unit, kind, paths[unit.layer])))
    return sites


def kinds_in(model: PreTrainedModel) -> tuple[str, ...]:
    """Those of `KINDS` that a model has."""
    return tuple(kind for kind in KINDS if _has(model, kind))


def _has(model: PreTrainedModel, kind: str) -> bool:
    try:
        return any(find_sites(model, kind))
    except UsageError:
        return False


def _sites_of(model: PreTrainedModel, unit: Unit, kind: str, path: str) -> Iterator[Site]:
    weights = [part for part in unit.parts if not part.tensor.endswith(("bias", ".scale"))]
    modules = [part.tensor.rpartition(".")[0] for part in weights]
    if kind == "attention":
        # The last of its projections is the one to the output; some modules add the residual stream to that.
        yield Site(modules[-1])
    elif len(weights) == 1 and weights[0].tensor.endswith(".weight"):
        part = weights[0]
        shape = tuple(model.get_parameter(part.tensor).shape)
        yield Site(modules[0], None if part.box == whole_box(shape) else part.box[part.axis])
    elif kind == "mlp":
        for module in modules:
            child = module.removeprefix(f"{path}.").partition(".")[0]
            yield Site(f"{path}.{child}")
    else:
        raise UsageError(
            f"{type(model).__name__} has no {kind} to trace: in layer {unit.layer} it is that of experts, which see "
            f"some of the tokens only; leave {kind} out, or trace mlp"
        )
