"""Runs of a model from any layer on, with outputs of its modules read or replaced.

A run in which something changes only from layer l on need not compute the layers before l again: it enters l with the
states of an earlier run. Hooks and stand-ins are on the model within a `with` block only. "Rows" are sequences of one
batch; "states" are those of the residual stream, `[rows, positions, hidden]`.

The sites of outputs are found by a model's parameters, with the units of `checkpoint.units`. The output of an MLP or an
attention is that of its last projection (some modules add the residual stream to it); with experts, it is that of the
layer's parts that hold them, including a router or a shared expert.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from dapa_merge.checkpoint.region import whole_box
from dapa_merge.checkpoint.units import ATTENTION, Unit, layer_path
from dapa_merge.errors import CheckpointError, UnsupportedArchitecture, UsageError
from dapa_merge.measure.live import units_in
from dapa_merge.trace.options import SITE_KINDS

# Tolerance between the likelihoods of a run from the middle and of the whole run, in nats or relative.
TOLERANCE = 1e-3


class Replay:
    """A model that can be run from any of its layers on."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Find the layers.

        Raises:
            CheckpointError: If they are not found.
        """
        self.model = model
        self.layers = [model.get_submodule(path) for path in layer_paths(model)]
        # The length of the tuple that each layer returns; 0 if it returns the states alone.
        self._num_outputs = [0] * len(self.layers)

    @contextmanager
    def recorded_states(self) -> Iterator[list[torch.Tensor]]:
        """Record a run's own tensors: the states that enter each layer, and those that leave the last."""
        states: list[torch.Tensor] = []

        def enter(_module: object, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            states.append(self._checked(arguments[0] if arguments else named["hidden_states"]))

        def leave(index: int, _module: object, _arguments: object, output: Any) -> None:
            self._num_outputs[index] = len(output) if isinstance(output, tuple) else 0
            if index == len(self.layers) - 1:
                states.append(self._checked(_first(output)))

        with ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(functools.partial(leave, index)).remove)
            yield states

    @contextmanager
    def entered_at(self, start: int, states: torch.Tensor) -> Iterator[None]:
        """Let a run skip the layers before `start`, and enter that layer with `states`, which it never changes.

        Needs an earlier run with `recorded_states`. If `start` is the number of layers, all are skipped.
        """

        def enter(_module: object, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
            if arguments:
                return (states, *arguments[1:]), named
            return arguments, {**named, "hidden_states": states}

        with ExitStack() as stack:
            # The first layer is given the states, even if it is skipped; the others hand them on.
            stack.callback(self.layers[0].register_forward_pre_hook(enter, with_kwargs=True).remove)
            for layer, num_outputs in zip(self.layers[:start], self._num_outputs, strict=False):
                stack.enter_context(_replaced_forward(layer, functools.partial(_pass_by, num_outputs)))
            yield

    @contextmanager
    def recorded_outputs(
        self, sites: Sequence[Site], num_rows: int, num_positions: int
    ) -> Iterator[list[torch.Tensor]]:
        """Fill a list, by a run of `num_rows`, with the outputs of its first row, `[num_positions, features]`."""
        found = [torch.empty(0)] * len(sites)

        def take(index: int, output: torch.Tensor) -> None:
            found[index] = output[0, :num_positions].clone()

        with ExitStack() as stack:
            for index, site in enumerate(sites):
                stack.callback(self._hook(site, num_rows, functools.partial(take, index)))
            yield found

    @contextmanager
    def replaced_outputs(self, values: Mapping[Site, torch.Tensor], positions: torch.Tensor) -> Iterator[None]:
        """Replace a run's outputs at one position of each row.

        Args:
            values: For each site, `[positions, features]`, the same for all rows.
            positions: The position in each row, `[rows]`.
        """
        rows = torch.arange(len(positions), device=positions.device)

        def put(value: torch.Tensor, output: torch.Tensor) -> None:
            # The layers of a model may be spread over devices.
            at = positions.to(output.device)
            output[rows.to(output.device), at] = value[at]

        with ExitStack() as stack:
            for site, value in values.items():
                stack.callback(self._hook(site, len(positions), functools.partial(put, value)))
            yield

    def _hook(self, site: Site, num_rows: int, act: Callable[[torch.Tensor], None]) -> Callable[..., None]:
        """Call `act` with the output at a site, `[rows, positions, features]`; returns the remover of the hook."""

        def hook(_module: object, _arguments: object, output: Any) -> None:
            states = _first(output)
            # Some modules of experts put the tokens of all rows into one dimension.
            states = states.view(num_rows, -1, states.shape[-1])
            act(states if site.features is None else states[..., slice(*site.features)])

        module: torch.nn.Module = self.model.get_submodule(site.module)
        return module.register_forward_hook(hook).remove

    @contextmanager
    def noisy_embeddings(self, noise: torch.Tensor, first: int) -> Iterator[None]:
        """Add noise, `[rows, tokens, hidden]`, to a run's embeddings from position `first` on."""

        def add(_module: object, _arguments: object, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[:, first : first + noise.shape[1]] += noise.to(output.device, output.dtype)
            return output

        handle = self.model.get_input_embeddings().register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()

    def check(self, run: Callable[[], torch.Tensor], states: Sequence[torch.Tensor], expected: torch.Tensor) -> None:
        """Check that runs from later layers return the same as the whole run.

        Raises:
            UnsupportedArchitecture: If the model passes more than states from layer to layer.
        """
        num_layers = len(self.layers)
        if len(states) != num_layers + 1:
            raise self._unsupported()
        for start in sorted({num_layers // 2, num_layers - 1, num_layers}):
            try:
                with self.entered_at(start, states[start]):
                    found = run()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                # A layer may lack data of any kind that a skipped one would have passed on.
                raise self._unsupported() from error
            if not torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE):
                raise self._unsupported()

    def check_numbers(self, values: torch.Tensor) -> None:
        """Raise `CheckpointError` if values are not finite."""
        if not values.isfinite().all():
            raise CheckpointError(
                f"{type(self.model).__name__} computes infinities or NaN; its weights are damaged, or "
                f"the noise is too strong for its dtype"
            )

    def _checked(self, states: torch.Tensor) -> torch.Tensor:
        if not isinstance(states, torch.Tensor) or states.dim() != 3:
            raise self._unsupported()
        return states

    def _unsupported(self) -> UnsupportedArchitecture:
        return UnsupportedArchitecture(
            f"{type(self.model).__name__} passes more than one state per token from layer to layer; it cannot be "
            f"traced yet"
        )


def _first(output: Any) -> torch.Tensor:
    states: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _pass_by(num_outputs: int, *arguments: Any, **named: Any) -> Any:
    """Stand in for a skipped layer: return the states in the layer's own form."""
    states = arguments[0] if arguments else named["hidden_states"]
    return (states, *[None] * (num_outputs - 1)) if num_outputs else states


@contextmanager
def _replaced_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = module.__dict__.get("forward")
    # Set on the instance, where it hides the class's own.
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


@dataclass(frozen=True)
class Site:
    """A part of a module's output.

    Attributes:
        features: The first feature and the one after the last; None for all.
    """

    module: str
    features: tuple[int, int] | None = None


def layer_paths(model: PreTrainedModel) -> list[str]:
    """The paths of a model's layers, in order.

    Raises:
        CheckpointError: If they are not found.
    """
    # Every known MLP has a down projection.
    return [layer_path(unit.tensors[0]) for unit in units_in(model, ("down",))]


def find_sites(model: PreTrainedModel, kind: str) -> list[tuple[Site, ...]]:
    """The sites of a kind in each layer; empty for a layer with another mixer in place of attention.

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
    """The kinds in `SITE_KINDS` that a model has."""
    return tuple(kind for kind in SITE_KINDS if _has(model, kind))


def telling_kind(module: str, kinds: Collection[str]) -> str | None:
    """The kind that tells of a unit's module: its own or, if that is not traced, that of the whole that it is in."""
    whole = "attention" if module in ATTENTION else "mlp"
    return next((kind for kind in (module, whole) if kind in kinds), None)


def _has(model: PreTrainedModel, kind: str) -> bool:
    try:
        return any(find_sites(model, kind))
    except UsageError:
        return False


def _sites_of(model: PreTrainedModel, unit: Unit, kind: str, path: str) -> Iterator[Site]:
    weights = [part for part in unit.parts if not part.tensor.endswith(("bias", ".scale"))]
    modules = [part.tensor.rpartition(".")[0] for part in weights]
    if kind == "attention":
        # The last projection makes the output; some modules add the residual stream to it.
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
            f"{type(model).__name__} has no {kind} to trace: in layer {unit.layer} it belongs to experts, which see "
            f"only some of the tokens; leave {kind} out, or trace mlp"
        )
