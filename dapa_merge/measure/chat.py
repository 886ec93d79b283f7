"""Conversations with models: whole turns through their chat templates, and answers as they come.

An answer is what `generate` says to the same prompt, with the same arithmetic, unless a temperature is given. Where a
result and its target do not both fit, they need the memory of one model: the target is resident, and the selection is
applied while the result speaks, which takes seconds for each message. Only the selected units are compared with the
result's files for that; `verify` compares everything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers.generation.streamers import BaseStreamer

from dapa_merge.checkpoint.convert import open_location
from dapa_merge.checkpoint.digest import settings_files
from dapa_merge.checkpoint.location import Location
from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.checkpoint.region import Region
from dapa_merge.errors import CheckpointError, DapaError, UsageError
from dapa_merge.measure.decode import is_batchable
from dapa_merge.measure.determinism import batch_invariant, deterministic_attention
from dapa_merge.measure.generate import (
    UNSTABLE_CHARACTERS,
    chat_prompt,
    check_ids,
    context_length,
    encode,
    has_system_role,
    text_of,
)
from dapa_merge.measure.live import LiveModel, choose_device, load_model, mapped_values
from dapa_merge.measure.placement import free_on, is_spread, weight_bytes
from dapa_merge.measure.prompts.conversation import ASSISTANT, SYSTEM, USER, Conversation, Message
from dapa_merge.measure.refusal.classify import final_answer, opened_thought, thought_parts, without_cut_tag
from dapa_merge.measure.sampling import Sampled
from dapa_merge.plan.plan import reduced
from dapa_merge.plan.selection import RECIPE_NAME, fetch_units, given_selection, make_plan
from dapa_merge.progress import LOG, quiet
from dapa_merge.recipe.asking import Sampling
from dapa_merge.recipe.options import Where
from dapa_merge.recipe.parse import load_recipe
from dapa_merge.recipe.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Of the free memory, the most that two models may take.
SHARE = 0.8
# Gets each new piece of an answer, and whether it belongs to a thought.
Tell = Callable[[str, bool], object]


@dataclass(frozen=True)
class Manner:
    """How models answer.

    Attributes:
        max_new_tokens: Maximum length of an answer, which the model's context may shorten.
        temperature: Of sampling; 0 for the likeliest token each time.
        seed: Of the first message's sampling; each further one takes the next.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0


@dataclass
class Speaker:
    """A model and its conversation.

    Attributes:
        name: Its label.
        tokenizer: The model's.
        speaking: Yields the model for the time of an answer.
        turns: What was said so far, without the system message.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    speaking: Callable[[], AbstractContextManager[PreTrainedModel]]
    turns: list[Message] = field(default_factory=list)
    _num_before: int = 0

    @property
    def has_system_role(self) -> bool:
        """Whether the model can be told a system message."""
        return has_system_role(self.tokenizer)

    def ask(self, message: str, system: str, manner: Manner, tell: Tell) -> str:
        """Put a message to the model, and return its answer, which `tell` has got piece by piece.

        Both are turns of the conversation afterwards, unless the answer is empty. A thought is left out of it, as
        models expect their own turns.

        Raises:
            UsageError: If the conversation is too long for the model.
            CheckpointError: If its template or tokenizer fails.
            KeyboardInterrupt: As it came; what was said until then is in the conversation.
        """
        self._num_before = len(self.turns)
        asked = [*([Message(SYSTEM, system)] if system else []), *self.turns, Message(USER, message)]
        stream = _Stream(self.tokenizer, tell)
        try:
            with self.speaking() as model:
                _generate(model, self.tokenizer, asked, manner, stream)
        finally:
            if said := stream.finish():
                self.turns += [Message(USER, message), Message(ASSISTANT, final_answer(said) or said)]
        return said

    def forget_last(self) -> None:
        """Take back the last message and its answer, if it was taken into the conversation."""
        del self.turns[self._num_before :]


class _Stream(BaseStreamer):  # type: ignore[misc]
    """Tells an answer as it grows, as far as further tokens do not change it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tell: Tell) -> None:
        self._tokenizer = tokenizer
        self._tell = tell
        self._tokens: list[int] = []
        self._is_prompt = True
        self._told = ""
        self.opened = ""

    def put(self, value: torch.Tensor) -> None:
        """Take the next tokens; the first are those of the prompt."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._tokens += value.reshape(-1).tolist()
        text = without_cut_tag(self._text())
        # As in `generate`: the next token may change the last word.
        self._show(text[: max(text.rfind(" "), text.rfind("\n"), len(text) - UNSTABLE_CHARACTERS, 0)])

    def end(self) -> None:
        """Nothing: `finish` tells the rest, of stopped answers too."""

    def finish(self) -> str:
        """Tell the rest, and return the whole answer."""
        text = self._text() if self._tokens else ""
        self._show(text)
        return text

    def _text(self) -> str:
        return self.opened + text_of(self._tokenizer, self._tokens)

    def _show(self, text: str) -> None:
        # A decoder may take a space back that it has given; then the rest waits until the texts agree.
        if len(text) <= len(self._told) or not text.startswith(self._told):
            return
        start, end = len(self._told), 0
        # First, so that nothing is told twice after Ctrl-C.
        self._told = text
        for part, is_thought in thought_parts(text):
            end += len(part)
            if end > start:
                self._tell(text[start:end], is_thought)
                start = end


def _formatted(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message]) -> str:
    """A conversation in the chat template; without one, the texts of both follow each other in lines."""
    if tokenizer.chat_template:
        return chat_prompt(tokenizer, Conversation(turns))
    return "\n".join(content for role, content in turns if role != SYSTEM)


@torch.inference_mode()
def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Message],
    manner: Manner,
    stream: _Stream,
) -> None:
    text = _formatted(tokenizer, turns)
    stream.opened = opened_thought(text, turns[-1].content if tokenizer.chat_template else "")
    ids = encode(tokenizer, text, add_special_tokens=not tokenizer.chat_template)
    context = context_length(model)
    if not ids:
        raise UsageError("the message is empty, and no chat template adds to it; write something")
    if len(ids) >= context:
        raise UsageError(
            f"the conversation has {len(ids)} tokens, but the model's context ends at {context} and leaves no room for "
            f"an answer; begin a new one"
        )
    check_ids(model, [ids])
    limit = min(manner.max_new_tokens, context - len(ids))
    sampling = Sampling(manner.temperature, seed=manner.seed) if manner.temperature else None
    inputs = torch.tensor([ids], device=model.device)
    with ExitStack() as stack:
        if is_batchable(model):
            # As in `generate`.
            stack.enter_context(batch_invariant(model))
            stack.enter_context(deterministic_attention(model, len(ids) + limit))
        stack.enter_context(quiet("transformers"))
        model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=limit,
            streamer=stream,
            logits_processor=sampling and [Sampled(sampling, [ids], len(ids))],
        )


@contextmanager
def speakers(
    location: Location,
    where: Where,
    *,
    with_target: bool = False,
    target: Location | None = None,
    allow_pickle: bool = False,
) -> Iterator[tuple[Speaker, ...]]:
    """Load a model inside a `with` block and, before it, the target that it was made of.

    Args:
        location: The model: any, or a result.
        where: Where it speaks, and in which arithmetic.
        with_target: Whether the target speaks too, first.
        target: Where that is, if not where the result's recipe says.
        allow_pickle: Read weights that exist only as pickles, accepting only tensors.

    Raises:
        UsageError: If nothing names the target, or the device lacks memory.
        DapaError: If a model cannot be opened or loaded.
    """
    LOG.info(f"loading {location}{' and its target' if with_target else ''}, which takes a while")
    if not with_target:
        yield (_loaded("model", open_location(location, allow_pickle=allow_pickle), where),)
        return
    recipe = _recipe(location, target)
    checkpoint = open_location(location, allow_pickle=allow_pickle)
    named = target or (recipe.target if recipe else None)
    assert named is not None
    if _both_fit(checkpoint, where):
        yield _both(named, checkpoint, where, allow_pickle)
        return
    try:
        if recipe is None:
            raise UsageError(f"{location} has no {RECIPE_NAME}")
        live, applied = _resident(checkpoint, recipe, where, allow_pickle)
    except DapaError as error:
        LOG.info(f"target and result are both loaded, which takes the memory of two models: {error}")
        yield _both(named, checkpoint, where, allow_pickle)
        return
    LOG.info("target and result take turns in the memory of one model, which takes seconds for each message")
    try:
        yield (
            Speaker("before", live.tokenizer, lambda: nullcontext(live.model)),
            Speaker("after", live.tokenizer, applied),
        )
    finally:
        live.close()


def _loaded(name: str, checkpoint: Checkpoint, where: Where) -> Speaker:
    model, tokenizer = load_model(checkpoint, where)
    return Speaker(name, tokenizer, lambda: nullcontext(model))


def _both(named: Location, result: Checkpoint, where: Where, allow_pickle: bool) -> tuple[Speaker, Speaker]:
    before = _loaded("before", open_location(named, allow_pickle=allow_pickle), where)
    return before, _loaded("after", result, where)


def _both_fit(model: Checkpoint, where: Where) -> bool:
    """Whether two models of this size fit in what is free of a device, with room for what computing takes."""
    device = choose_device(where.device)
    if is_spread(model, where):
        return False
    # A CPU without 16-bit arithmetic keeps copies in float32.
    copies = 4 * model.num_parameters if device.type == "cpu" else 0
    return 2 * (weight_bytes(model, where) + copies) <= SHARE * free_on(device)


def _recipe(location: Location, target: Location | None) -> Recipe | None:
    """The recipe of a result, with the target where it is; None if it has none and `target` is given."""
    path = Path(location.path) / RECIPE_NAME
    if not path.is_file():
        if target is None:
            raise UsageError(f"{location} has no {RECIPE_NAME}, which would name its target; name it with --target")
        return None
    recipe = load_recipe(path)
    named = recipe.target
    if target is None and named.path.startswith("./") and not os.path.exists(named.path):
        raise UsageError(
            f"the target that {location} was made of, {named}, was a folder of whoever published it; name the same "
            f"model with --target"
        )
    # It speaks with its own template, as if it were alone.
    return replace(recipe, target=target or named, chat_template=None)


def _resident(
    result: Checkpoint, recipe: Recipe, where: Where, allow_pickle: bool
) -> tuple[LiveModel, Callable[[], AbstractContextManager[PreTrainedModel]]]:
    """The resident target, and what makes it the result for a while.

    Raises:
        DapaError: If the result is not the target with the selection of its recipe applied, as far as that is compared:
            settings, tokenizer and the selected units.
    """
    plan = make_plan(recipe, allow_pickle=allow_pickle)
    selection = given_selection(recipe, plan)
    if selection is None:
        raise UsageError(f"the recipe of {result.name} names no layers")
    ours, theirs = settings_files(result), settings_files(plan.target)
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs or ours[name].read_bytes() != theirs[name].read_bytes():
            raise CheckpointError(f"{name} of {result.name} is not its target's")
    if result.shapes != plan.target.shapes:
        raise CheckpointError(f"{result.name} has other tensors than its target")
    fetch_units(plan, selection)
    plan = reduced(plan, selection)
    live = LiveModel(plan, where)
    try:
        for slot in live.slots(selection):
            region = slot.regions["target"]
            written = mapped_values(result, Region(result.tensors[region.tensor.name], region.box))
            # As they are in files: in memory they may be quantized.
            if not torch.equal(written.reshape(-1), live.new_values(slot).reshape(-1)):
                raise CheckpointError(f"{region.name} of {result.name} is not what its recipe makes")
    except BaseException:
        live.close()
        raise
    return live, lambda: live.transplanted(selection)
