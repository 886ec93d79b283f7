"""The first-order effect of every unit on refusing, from one backward pass: the prior of the guided search.

If weights w move to w + d, an objective changes by gradient * d, to first order. Here the objective is the
log-likelihood of the first tokens of a refusal minus that of an answer, d is source - target, and the sum over a unit's
tensors is its effect. (P. Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019,
section 3.1, use the same term for d = -w.) The gradient is taken at the target: at the full transplant, which refuses
for certain, there is nothing left to gain, and the units that matter look like the others
(tests/benchmarks/attribution.py).

Only one gradient is in memory at a time: each is used as soon as the backward pass has computed it, and freed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import Parameter
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dapa_merge.checkpoint.units import Unit
from dapa_merge.errors import CheckpointError
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.determinism import widened
from dapa_merge.measure.figures import Response
from dapa_merge.measure.generate import check_ids, encode, prompt_ids, thought_before
from dapa_merge.measure.live import LiveModel, Slot, mapped_values
from dapa_merge.measure.packed import Read, reader
from dapa_merge.measure.perplexity import ScoredText, losses_of
from dapa_merge.measure.quantized import is_transposed, quantized_layers
from dapa_merge.measure.refusal.classify import Outcome
from dapa_merge.plan.plan import Plan
from dapa_merge.progress import advance

# Values of a tensor that are processed at once: 1 MiB as float32.
PIECE = 1 << 18
# One to six tokens order the miniature's units equally well, eight do worse; four outlast an opening that says little.
NUM_TOKENS = 4
# The most prompts used, and the most responses at once.
MAX_CONTRASTS = 12
MAX_BACKWARD = 8
# A model of more parameters is large: only a few texts are differentiated at once.
MIN_LARGE = 2_000_000_000


def effects_between(
    live: LiveModel,
    units: Sequence[Unit],
    answering: Sequence[Response],
    refusing: Sequence[Response],
    batch_limit: int,
) -> dict[Unit, float]:
    """The first-order effect of each unit on prompts that one model refuses and the live target does not.

    Args:
        live: The target.
        units: Units of its plan, or blocks of them.
        answering: The target's responses to some prompts.
        refusing: The other model's, in the same order.
        batch_limit: How many responses fit in memory at once without a backward pass.

    Raises what `attribute` raises, and `ValueError` if there is no such prompt.
    """
    refused, answered = Outcome.REFUSED.value, (Outcome.COMPLIED.value, Outcome.DEGENERATE.value)
    contrasts = [
        Contrast(after.prompt, refusing=after.response, complying=before.response)
        for before, after in zip(answering, refusing, strict=True)
        if before.outcome in answered and after.outcome == refused
    ]
    # A few contrasts tell as much as many, and a backward pass needs far more memory than the answers did.
    few = contrasts[:: max(1, math.ceil(len(contrasts) / MAX_CONTRASTS))]
    is_large = live.plan.target.num_parameters > MIN_LARGE
    most = MAX_BACKWARD if is_large else 2 * MAX_CONTRASTS
    return attribute(live, few, units=units, batch_size=BatchSize(min(most, batch_limit)))


def attribute(
    live: LiveModel,
    contrasts: Sequence[Contrast],
    *,
    units: Sequence[Unit] | None = None,
    batch_size: BatchSize,
    num_tokens: int = NUM_TOKENS,
) -> dict[Unit, float]:
    """The first-order effect of transplanting each unit into the model as it is now.

    The objective is the mean over the contrasts of log p(refusing) - log p(complying), of `num_tokens` tokens each,
    counted as by `sides_of`. Contrasts whose responses do not differ are left out.

    Args:
        live: The target; its weights stay as they are.
        contrasts: A few are enough: any 2 of 128 rank the miniature's units equally well.
        units: Units of the plan, or blocks of them; None for all of the plan's.
        batch_size: Sequences at once, two for each contrast. Their activations are kept for the backward pass, many
            times what generation keeps: 8 is plenty.
        num_tokens: At least 1.

    Returns:
        For each unit, in their order, the effect in nats: positive if it makes the model refuse.

    Raises:
        ValueError: If there are no contrasts or none differs, or `num_tokens` is below 1.
        CheckpointError: If an effect is not a finite number, or the tokenizer is another model's.
        UsageError: If a single sequence does not fit in the device's memory.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, not {num_tokens}")
    sides = [side for contrast in contrasts for side in sides_of(live.tokenizer, contrast, num_tokens)]
    if not sides:
        raise ValueError(f"none of {len(contrasts)} contrasts has two responses that differ")
    check_ids(live.model, [side.row.ids for side in sides])
    sides.sort(key=lambda side: -len(side.row.ids))
    units = live.plan.units if units is None else units
    effects = dict.fromkeys(units, 0.0)

    def add(batch: Sequence[Side]) -> Sequence[Side]:
        # Computed in full before anything is added: a batch that fails is repeated in halves.
        for unit, effect in _effects(live, units, batch, read).items():
            effects[unit] += effect / (len(sides) / 2)
        return batch

    with widened(live.model):
        read = reader(live.model, live.tokenizer.pad_token_id, [sides[0].row, sides[-1].row])
        for _ in batch_size.map(add, sides):
            advance(1, "responses")
    _check_finite(effects, live.plan)
    return effects


@torch.enable_grad()
def _effects(live: LiveModel, units: Sequence[Unit], sides: Sequence[Side], read: Read) -> dict[Unit, float]:
    """The effect of every unit on the sum of one batch; float16 could not hold the small gradients of a mean."""
    # Several units may be parts of one parameter: blocks of its rows, or tensors that the model shares.
    slots: dict[Parameter, list[Slot]] = {}
    for slot in live.slots(units):
        slots.setdefault(slot.parameter, []).append(slot)
    effects = dict.fromkeys(units, 0.0)

    def weigh(parameter: Parameter, gradient: torch.Tensor) -> None:
        for slot in slots[parameter]:
            effects[slot.unit] += _dot(live.plan, slot, gradient)

    rows = [side.row for side in sides]
    with each_gradient(live.model, slots, weigh):
        signs = torch.tensor([side.sign for side in sides], device=live.model.device)
        likelihoods = -losses_of(rows, read(live.model, live.tokenizer.pad_token_id, rows))
        torch.autograd.backward((signs * likelihoods).sum())
    return effects


def _dot(plan: Plan, slot: Slot, gradient: torch.Tensor) -> float:
    """The sum of gradient * strength * change over one slot."""
    values = {name: mapped_values(plan.models[name], slot.regions[name]) for name in plan.others}
    # Drop the dimension of a single expert, but keep at least one dimension.
    shape = [size for size in slot.regions["target"].shape if size != 1] or [1]
    own = plan.edit.own_values(slot.regions["target"])
    values |= {name: torch.from_numpy(array) for name, array in own.items()}
    values = {name: value.view(shape) for name, value in values.items()}
    gradient = gradient[slot.slices].view(shape)
    if slot.parameter.is_floating_point():
        parameter = slot.parameter[slot.slices].view(shape)
    else:
        # Before it was quantized.
        parameter = mapped_values(plan.target, slot.regions["target"]).view(shape).to(gradient.device, torch.float32)
    precise = torch.promote_types(parameter.dtype, torch.float32)
    num_rows = max(PIECE * len(parameter) // parameter.numel(), 1)
    total = 0.0
    for start in range(0, len(parameter), num_rows):
        place = slice(start, start + num_rows)
        # In the dtype of the model.
        pieces = {name: value[place].to(parameter.device, parameter.dtype) for name, value in values.items()}
        pieces["target"] = parameter[place]
        change = plan.edit.change({name: piece.to(precise) for name, piece in pieces.items()})
        total += float((change * gradient[place]).sum())
    return plan.edit.strength * total


@contextmanager
def each_gradient(
    model: PreTrainedModel,
    parameters: Mapping[Parameter, object],
    take: Callable[[Parameter, torch.Tensor], None],
) -> Iterator[None]:
    """During a backward pass in the block, pass the gradient of each of `parameters` to `take`, and free it.

    That of a quantized weight is that of the values it stands for, in float32 and the shape of the files; each call of
    its layer has one.
    """

    @torch.no_grad()
    def hand_over(parameter: Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        take(parameter, gradient)

    def watch(layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        states = inputs[0].detach().flatten(0, -2)

        @torch.no_grad()
        def contract(gradient: torch.Tensor) -> None:
            found = gradient.flatten(0, -2).float().T @ states.to(gradient.device).float()
            take(layer.weight, found.T if is_transposed(layer) else found)

        if output.requires_grad:
            output.register_hook(contract)  # type: ignore[no-untyped-call]

    required = [(one, one.requires_grad) for one in model.parameters() if one.is_floating_point()]
    layers = [layer for _, layer in quantized_layers(model) if layer.weight in parameters]
    hooks = []
    try:
        for parameter, _ in required:
            parameter.requires_grad_(parameter in parameters)
        for parameter in parameters:
            if parameter.is_floating_point():
                hooks.append(parameter.register_post_accumulate_grad_hook(hand_over))  # type: ignore[no-untyped-call]
        if layers:
            # Without a parameter to differentiate by, the first layers would be left out.
            entrance = model.get_input_embeddings()
            hooks.append(entrance.register_forward_hook(lambda _, __, output: output.requires_grad_()))
            hooks += [layer.register_forward_hook(watch) for layer in layers]
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, before in required:
            parameter.grad = None
            parameter.requires_grad_(before)


def _check_finite(effects: Mapping[Unit, float], plan: Plan) -> None:
    for unit, effect in effects.items():
        if not math.isfinite(effect):
            raise CheckpointError(
                f"the effect of {unit} on refusing is {effect}, not a finite number: "
                f"{' or '.join(model.name for model in plan.models.values())} has weights that are not, or the dtype "
                f"is too narrow for gradients; compare the models' files with their publisher's"
            )


@dataclass(frozen=True)
class Contrast:
    """A harmful prompt, a response that refuses it and one that complies."""

    prompt: str
    refusing: str
    complying: str


class Side(NamedTuple):
    """One response of a contrast after its prompt, and whether it is to be likely (1) or unlikely (-1)."""

    row: ScoredText
    sign: int


def sides_of(tokenizer: PreTrainedTokenizerBase, contrast: Contrast, num_tokens: int) -> list[Side]:
    """The two sides of a contrast, the refusing one first, equally long; empty if the responses do not differ.

    Of each response, `num_tokens` tokens are counted from the first in which the two differ; fewer if one of them ends
    before. The tokens before are given.
    """
    # The template's own opening of a thought is part of the prompt's ids.
    context, opened = prompt_ids(tokenizer, contrast.prompt), thought_before(tokenizer, contrast.prompt)
    # Tokenized alone, as it was decoded: after the template, some tokenizers would split the first word differently.
    refusing, complying = (
        encode(tokenizer, response.removeprefix(opened)) for response in (contrast.refusing, contrast.complying)
    )
    pairs = zip(refusing, complying, strict=False)
    # The common beginning has the same likelihood in both, and would not count.
    start = next((index for index, (one, other) in enumerate(pairs) if one != other), None)
    if start is None:
        return []
    stop = min(start + num_tokens, len(refusing), len(complying))
    return [
        Side(ScoredText(context + ids[:stop], len(context) + start), sign)
        for ids, sign in ((refusing, 1), (complying, -1))
    ]
