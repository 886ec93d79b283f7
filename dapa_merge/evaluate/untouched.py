"""That an evaluator of the user's own leaves the candidate as it was, for whatever is asked next.

Its substance (weights, buffers, modules, hooks, vocabulary) is compared, so that a change can be refused by name. Modes
and settings, which well-meant code changes as it goes, are put back.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Substance = Mapping[tuple[str, str], Any]
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# A text that every tokenizer has something to do with.
SAMPLE = "Is it 1 or 2?\n"


def substance(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Substance:
    """What of a candidate may not change, by kind and name; reads every weight once."""
    found: dict[tuple[str, str], Any] = {}
    for name, parameter in model.named_parameters():
        # The object too: a transplant is put in place, and undone, in the one that was there at first.
        found["weights", name] = (id(parameter), *_sums(parameter))
    for name, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if not _is_its_own(module):
                found["buffers", f"{name}.{key}".lstrip(".")] = _sums(buffer)
        found["modules", name] = (module, vars(module).get("forward"))
        found["hooks", name] = _hooks(module)
    if tokenizer is not None:
        found["vocabulary", "of the tokenizer"] = (len(tokenizer), list(tokenizer(SAMPLE)["input_ids"]))
    return found


def changed(before: Substance, after: Substance) -> str | None:
    """What differs first, in words; None if nothing does."""
    for kind, name in {**before, **after}:
        if before.get((kind, name)) != after.get((kind, name)):
            return f"{kind} ({name or 'the model itself'})"
    return None


@contextmanager
def settings_kept(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[None]:
    """Put modes, gradients, configurations and the tokenizer's settings back, however the `with` block ends."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    own = {name: vars(model)[name] for name in ("config", "generation_config") if name in vars(model)}
    configs = (getattr(module, "config", None) for module in model.modules())
    holders = {id(one): one for one in (*configs, *own.values(), tokenizer) if hasattr(one, "__dict__")}.values()
    saved = [(holder, {name: _copied(value) for name, value in vars(holder).items()}) for holder in holders]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires, gradient in gradients:
            parameter.requires_grad_(requires).grad = gradient
        vars(model).update(own)
        for holder, settings in saved:
            vars(holder).clear()
            vars(holder).update(settings)


def _sums(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape, and a sum over the bits that one changed bit changes."""
    import torch

    values = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = len(values) - len(values) % 8
    # The sum wraps around, which loses nothing.
    words = values[:whole].view(torch.int64).sum() if whole else values.new_zeros((), dtype=torch.int64)
    return (*tensor.shape, int(words), int(values[whole:].long().sum()))


def _is_its_own(module: torch.nn.Module) -> bool:
    """Whether a module sets its buffers anew as the model is asked: rotary embeddings that grow with the text."""
    return any(kind in str(getattr(module, "rope_type", "")) for kind in ("dynamic", "longrope"))


def _hooks(module: torch.nn.Module) -> tuple[object, ...]:
    hooks = itertools.chain.from_iterable(getattr(module, name).values() for name in HOOKS)
    # transformers leaves hooks of its own when a model is asked for its hidden states; they do nothing unless asked.
    return tuple(hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("transformers."))


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list, set)) else value
