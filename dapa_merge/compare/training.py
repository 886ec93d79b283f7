"""Learns from prompts and answers: adapters of a target, and how a source's refusals look inside it.

The answers are the models' own, so that no data is needed but prompts: a source's refusals of harmful prompts, and a
target's answers to harmless and keep prompts, which it shall go on giving (self-distillation). An adapter is a LoRA (Hu
et al. 2021, arXiv 2106.09685, section 4.1) on every linear layer of attention and MLP, in float32 beside the target's
weights, which stay as they are until it is added to them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dapa_merge.compare.peers import Place, Weights, inverse
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.measure.generate import check_ids, encode, prompt_ids, thought_before
from dapa_merge.measure.live import units_in
from dapa_merge.measure.perplexity import ScoredText, counted_logits, losses, only_logits
from dapa_merge.measure.quantized import is_transposed
from dapa_merge.progress import advance

RANK = 16
BATCH_SIZE = 8
BETAS = (0.9, 0.98)
WARMUP_STEPS = 5
MAX_NORM = 1.0
# The unit of progress: a step of a choice of directions takes another time.
TRAINING_STEPS = "training steps"
# Of the residual stream from which a direction of refusing is taken, as a share of the layers.
DEPTH = 0.6
# Second moments are kept in memory until Safe Delta's settings are tried; more of them are refused.
MAX_MOMENT_BYTES = 32 << 30

Adapters = Mapping[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Answer:
    """A prompt and a model's own answer to it."""

    prompt: str
    response: str


def rows_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answers: Sequence[Answer], max_new_tokens: int
) -> list[ScoredText]:
    """Encode answers as a model says them; those shorter than `max_new_tokens` end with the end token."""
    rows = []
    for answer in answers:
        context, opened = prompt_ids(tokenizer, answer.prompt), thought_before(tokenizer, answer.prompt)
        ids = encode(tokenizer, answer.response.removeprefix(opened))
        if len(ids) < max_new_tokens and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        if ids:
            rows.append(ScoredText(context + ids, len(context)))
    if rows:
        check_ids(model, [row.ids for row in rows])
    return rows


def linear_layers(model: PreTrainedModel, weights: Weights) -> dict[int, Linear]:
    """The linear layers of a target whose weights are wholly matrices of attention and MLP, by the weight's id."""
    sizes: dict[int, int] = {}
    for place in weights.layers:
        sizes[id(place.parameter)] = sizes.get(id(place.parameter), 0) + place.num_elements
    modules = (module for module in model.modules() if isinstance(module, Linear) and not is_transposed(module))
    return {id(one.weight): one for one in modules if sizes.get(id(one.weight)) == one.out_features * one.in_features}


def train_adapters(
    model: PreTrainedModel,
    padding: int,
    layers: Mapping[int, Linear],
    groups: Sequence[Sequence[ScoredText]],
    *,
    rate: float,
    marks: Sequence[int],
    seed: int = 0,
) -> dict[int, Adapters]:
    """Train adapters by the mean cross-entropy of the answers' tokens: AdamW at a constant rate after a warm-up.

    Args:
        model: The target; its weights stay as they are.
        padding: Any token id.
        layers: What is adapted, by the weight's id.
        groups: Kinds of answers; each batch has as many of each, in a random order that repeats.
        rate: The learning rate.
        marks: Numbers of steps whose adapters are returned.
        seed: Of the order, and of the adapters' first values.

    Returns:
        For each mark, B `[m, r]` and A `[r, n]` in float32, by the weight's id; their product is added to the weight.

    Raises:
        CheckpointError: If the loss is not finite.
        UsageError: If the model has no linear layer to adapt, or a group has no answers.
    """
    if not layers:
        raise UsageError("the model has no linear layers of attention and MLP that an adapter could be added to")
    if not groups or not all(groups):
        raise UsageError("there are no answers to train on")
    generator = torch.Generator().manual_seed(seed)
    adapters = {key: _new_adapter(layer, generator) for key, layer in layers.items()}
    trained = [one for pair in adapters.values() for one in pair]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=BETAS, weight_decay=0.0)
    orders = [_repeated(group, generator) for group in groups]
    found: dict[int, Adapters] = {}
    with _adapted(layers, adapters), torch.enable_grad():
        for step in range(1, max(marks) + 1):
            each = BATCH_SIZE // len(orders)
            batch = [row for order in orders for row in itertools.islice(order, each)]
            number = sum(len(row.ids) - row.num_context for row in batch)
            loss = losses(model, padding, batch).sum() / number
            if not bool(loss.isfinite()):
                raise CheckpointError(f"the loss of the training is not finite at step {step} with the rate {rate:g}")
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
            for settings in optimizer.param_groups:
                settings["lr"] = rate * min(1.0, step / WARMUP_STEPS)
            optimizer.step()
            advance(1, TRAINING_STEPS)
            if step in marks:
                found[step] = {key: (b.detach().clone(), a.detach().clone()) for key, (b, a) in adapters.items()}
    return found


def _new_adapter(layer: Linear, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """B, which is zero, and a random A, as the paper begins."""
    rows, columns = layer.out_features, layer.in_features
    rank = min(RANK, rows, columns)
    a = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
    pair = torch.zeros(rows, rank), a
    return tuple(one.to(layer.weight.device).requires_grad_() for one in pair)  # type: ignore[return-value]


def _repeated(rows: Sequence[ScoredText], generator: torch.Generator) -> Iterator[ScoredText]:
    while True:
        for index in torch.randperm(len(rows), generator=generator).tolist():
            yield rows[index]


@contextmanager
def _adapted(layers: Mapping[int, Linear], adapters: Adapters) -> Iterator[None]:
    """Add the adapters to the outputs of the layers inside a `with` block."""

    def hook(key: int) -> Callable[..., Tensor]:
        def add(_: object, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            b, a = adapters[key]
            return output + torch.nn.functional.linear(inputs[0].float() @ a.T, b).to(output.dtype)

        return add

    with ExitStack() as stack:
        for key, layer in layers.items():
            stack.callback(layer.register_forward_hook(hook(key)).remove)
        yield


@contextmanager
def adapted(weights: Weights, adapters: Adapters) -> Iterator[PreTrainedModel]:
    """Add adapters to the target's weights inside a `with` block, rounded once; restored bit for bit afterwards."""

    def new(place: Place) -> Tensor | None:
        if id(place.parameter) not in adapters:
            return None
        b, a = adapters[id(place.parameter)]
        product = (b @ a)[place.slices].reshape(place.shape)
        return weights.values(place, "target") + product

    with weights.rewritten(weights.layers, new) as model:
        yield model


@torch.inference_mode()
def refusal_direction(source: PreTrainedModel, harmful: Sequence[list[int]], harmless: Sequence[list[int]]) -> Tensor:
    """The direction of refusing: the difference of the mean residual streams after harmful and harmless prompts.

    As Arditi et al. 2024, arXiv 2406.11717, section 2.3, have it, but at a fixed depth of three fifths, where theirs is
    chosen by validation.

    Args:
        source: The aligned model.
        harmful: Prompts as token ids, in the chat template.
        harmless: The same.

    Returns:
        `[hidden]`, float32 on the CPU, of length 1.
    """

    def mean(prompts: Sequence[list[int]]) -> Tensor:
        total = torch.zeros(())
        for ids in prompts:
            given = torch.tensor([ids], device=source.device)
            # The logits are not needed, and those of all tokens would take a third of the time.
            last = only_logits(source, given.new_tensor([len(ids) - 1]))
            states = source(input_ids=given, output_hidden_states=True, **last).hidden_states
            total = total + states[round(DEPTH * (len(states) - 1))][0, -1].float().cpu()
            advance(1, "prompts")
        return total / len(prompts)

    return torch.nn.functional.normalize(mean(harmful) - mean(harmless), dim=0)


@torch.inference_mode()
def inverted_moments(
    source: PreTrainedModel, padding: int, modules: Sequence[str], rows: Sequence[ScoredText]
) -> dict[str, Tensor]:
    """Safe Delta's H^-1 for each linear layer: H = (2 / N) sum x x^T over the tokens of a source's N refusals.

    Layers that read the same tensor share one matrix. It takes 4 n^2 bytes for each tensor of n features that is read:
    2.5 GB for a model of 0.5 billion parameters, 22 GB for one of 7 billion.

    Args:
        source: The aligned model.
        padding: Any token id.
        modules: Which modules of a layer count.
        rows: Prompts with refusals; all of their tokens count but the last.

    Returns:
        `[n, n]` on the CPU, by the name of the layer's weight.

    Raises:
        UsageError: If the matrices do not fit in memory, or there are no refusals or no such layers.
    """
    if not rows:
        raise UsageError("the source refuses none of the prompts, so that nothing says what its safety rests on")
    parts = {part.tensor for unit in units_in(source, modules) for part in unit.whole_parts}
    layers = {
        name: one for name, one in source.named_modules() if isinstance(one, Linear) and f"{name}.weight" in parts
    }
    if not layers:
        raise UsageError("the source has no linear layers of attention and MLP whose inputs could be read")
    sizes = {_reads(name): 4 * layer.in_features**2 for name, layer in layers.items()}
    if sum(sizes.values()) > MAX_MOMENT_BYTES:
        raise UsageError(
            f"the second moments of the layers' inputs take {sum(sizes.values()) / 1e9:.0f} GB, more than the "
            f"{MAX_MOMENT_BYTES / 1e9:.0f} GB that are allowed"
        )
    moments: dict[str, Tensor] = {}
    first_of: dict[str, str] = {}
    # The tensor that was read last, and by whom first.
    last: list[Any] = [None, ""]

    def hook(name: str) -> Callable[..., None]:
        def add(_: object, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0] is not last[0]:
                last[:] = inputs[0], name
                features = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
                moment = (2 / len(rows)) * (features.T @ features).cpu()
                moments[name] = moments[name] + moment if name in moments else moment
            first_of[name] = last[1]

        return add

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(hook(name)).remove)
        for row in rows:
            # One at a time, so that no padding is counted.
            counted_logits(source, padding, [row])
            advance(1, "refusals")
    inverted = {name: inverse(moments.pop(name)) for name in tuple(moments)}
    return {f"{name}.weight": inverted[first] for name, first in first_of.items()}


def _reads(name: str) -> str:
    """A name for the tensor that a layer reads: in a block of attention or MLP all but the last layer read the same."""
    block, _, own = name.rpartition(".")
    return name if own.startswith(("o", "down")) else block
