"""Responses to many prompts, greedy or sampled with a seed, in their order."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, StoppingCriteria

from dapa_merge.errors import CheckpointError, DapaError, UsageError, one_line
from dapa_merge.measure.confined import Unfinished, render
from dapa_merge.measure.decode import SETTLE_EVERY, BatchRow, BatchSize, Decoder, LookupCache, is_batchable
from dapa_merge.measure.determinism import batch_invariant, deterministic_attention, is_deterministic
from dapa_merge.measure.prompts.conversation import (
    SYSTEM,
    USER,
    Message,
    messages_of,
    opening_of,
    request_of,
    with_system,
)
from dapa_merge.measure.refusal.classify import closing_tag, is_thought_token, opened_thought
from dapa_merge.measure.sampling import Sampled
from dapa_merge.progress import LOG, advance
from dapa_merge.recipe.asking import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Characters at the end of a text that later tokens may change, if no space marks its last word.
UNSTABLE_CHARACTERS = 16
# Characters of a prompt that an error shows.
SHOWN_CHARACTERS = 60
# A prompt like no other text of a template.
_PROBE = "How does one paint the 7 garden gates?"
# Tokens that a text may have for each character: 18 characters in place of one (NFKD), 3 bytes each, and some more.
MAX_TOKENS_PER_CHARACTER = 64
MAX_TOKENS_BESIDES = 1000

Settle = Callable[[str, str], object]
IsSettled = Callable[[list[int], str], bool]


def prepare_for_greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make `model.generate` deterministic and the same for every member of a family.

    A checkpoint's `generation_config.json` may set sampling, a repetition penalty or suppressed tokens, which
    transformers applies despite explicit arguments; only its end tokens are kept. The tokenizer's own end token also
    ends a response, because a fine-tune may change it in the tokenizer alone.
    """
    stored = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = {*(stored if isinstance(stored, list) else [stored]), tokenizer.eos_token_id} - {None}
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise CheckpointError("the tokenizer has no padding, end or unknown token, but batches need one of them")
    tokenizer.padding_side = "left"
    model.generation_config = GenerationConfig(
        do_sample=False, num_beams=1, eos_token_id=sorted(ends) or None, pad_token_id=tokenizer.pad_token_id
    )


def chat_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Format the messages of a prompt with the model's chat template; a text stays as it is without a template.

    The beginning of the answer, if the prompt has one, is left out.

    Thinking is switched off if the template can do so, because only the answer is judged. A template that does not show
    a plain text gets it as a list of one part, as those of LLaVA and SmolVLM want it.

    Raises:
        CheckpointError: If the template fails, takes too long, or does not show a message of the user or the system, or
            if a conversation meets a model without a template.
    """
    messages = messages_of(prompt)
    if not tokenizer.chat_template:
        _warn_without_template(tokenizer.name_or_path)
        if len(messages) > 1:
            raise CheckpointError(
                f"{tokenizer.name_or_path} has no chat template, so it cannot be asked with a system message or a "
                f"conversation; ask single texts, or add a chat template"
            )
        return request_of(prompt)
    with tokenizing(tokenizer, "chat template"):
        template, variables = tokenizer.get_chat_template(), {**tokenizer.special_tokens_map, "enable_thinking": False}
    # Cached by their text, because a dict cannot be.
    has_parts = _takes_parts(tokenizer.name_or_path, template, json.dumps(variables, default=str))
    text = _rendered(tokenizer.name_or_path, template, variables, messages, has_parts)
    for role, content in messages:
        # Templates may leave out the thoughts of earlier answers.
        if role in (SYSTEM, USER) and _folded(content) not in _folded(text):
            shown = repr(content if len(content) <= SHOWN_CHARACTERS else f"{content[:SHOWN_CHARACTERS]}...")
            what = "the prompt" if role == USER else "the system message"
            raise CheckpointError(
                f"the chat template of {tokenizer.name_or_path} changes or omits {what} {shown}; use the template of "
                f"its base model, or leave it out"
            )
    return text


def _rendered(
    name: str, template: str, variables: Mapping[str, object], messages: Sequence[Message], has_parts: bool
) -> str:
    given = [
        {"role": role, "content": [{"type": "text", "text": text}] if has_parts else text} for role, text in messages
    ]
    try:
        return render(template, given, variables)
    except Unfinished as error:
        asked = "one user message" if len(messages) == 1 else f"messages of {', '.join(one.role for one in messages)}"
        raise CheckpointError(f"the chat template of {name} fails on {asked}: {error}") from error


@functools.lru_cache
def _takes_parts(name: str, template: str, variables: str) -> bool:
    """Whether a template shows a prompt only as a list of parts.

    Raises:
        CheckpointError: If it shows it in neither form.
    """
    fault = None
    for has_parts in (False, True):
        try:
            text = _rendered(name, template, json.loads(variables), messages_of(_PROBE), has_parts)
        except CheckpointError as error:
            # Most templates want a text, and fail on parts.
            fault = fault if has_parts else error
        else:
            # A template that joins texts shows parts as Python writes them.
            if _folded(_PROBE) in _folded(text) and (not has_parts or repr(_PROBE) not in text):
                return has_parts
    if fault:
        raise fault
    raise CheckpointError(f"the chat template of {name} omits the prompt; use the template of its base model")


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


@functools.lru_cache
def _warn_without_template(name: str) -> None:
    """Warn once per tokenizer."""
    LOG.warning("the tokenizer of %s has no chat template; prompts are given to the model as plain text", name)


def has_system_role(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model has a chat template that shows it a system message."""
    try:
        return "Be brief." in chat_prompt(tokenizer, with_system("How?", "Be brief."))
    except CheckpointError:
        # As templates do that have no such role, or know only users and assistants in turn.
        return False


def check_ids(model: PreTrainedModel, rows: Iterable[Sequence[int]]) -> None:
    """Raise `CheckpointError` if the model lacks an embedding for a token; an accelerator would crash."""
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    largest = max(map(max, rows))
    if largest >= num_embeddings:
        raise CheckpointError(
            f"the tokenizer gives token {largest}, but the model has only {num_embeddings} embeddings; "
            f"they do not belong together"
        )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Encode a prompt formatted by `chat_prompt`; a template adds its own special tokens.

    The ids of a prompt with the beginning of an answer end with `opening_ids`.
    """
    return list(_prompt_ids(tokenizer, str(tokenizer.chat_template), prompt))


def opening_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Encode the opening that a prompt puts into the model's mouth; on a line of its own without a chat template."""
    opening = opening_of(prompt)
    return encode(tokenizer, opening if tokenizer.chat_template or not opening else f"\n{opening}")


# A search repeats the same prompts in every test.
@functools.lru_cache(maxsize=4096)
def _prompt_ids(tokenizer: PreTrainedTokenizerBase, _template: str, prompt: str) -> tuple[int, ...]:
    text, _ = _prompt_text(tokenizer, _template, prompt)
    return (
        *encode(tokenizer, text, add_special_tokens=not tokenizer.chat_template),
        *opening_ids(tokenizer, prompt),
    )


@functools.lru_cache(maxsize=4096)
def _prompt_text(tokenizer: PreTrainedTokenizerBase, _template: str, prompt: str) -> tuple[str, str]:
    """Format a prompt, and find the thought that it leaves open; the opening of an answer follows a closed one."""
    text = chat_prompt(tokenizer, prompt)
    opened = opened_thought(text, request_of(prompt) if tokenizer.chat_template else "")
    if opened and opening_of(prompt):
        # The opening of an answer would not be part of the answer inside a thought.
        return f"{text}{closing_tag(opened)}\n\n", ""
    return text, opened


def thought_before(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Return the end of a prompt's template from an opened thought on, with which `generate` begins its response."""
    return _prompt_text(tokenizer, str(tokenizer.chat_template), prompt)[1]


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decode tokens without special ones, except for the tags of thoughts."""
    special, tags = _special_ids(tokenizer)
    if not tags:
        return decode(tokenizer, ids)
    return decode(
        tokenizer, [token for token in ids if token in tags or token not in special], skip_special_tokens=False
    )


@functools.lru_cache(maxsize=16)
def _special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[frozenset[int], frozenset[int]]:
    """The ids of the special tokens, and those of them that are tags of thoughts."""
    added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    tags = frozenset(index for index, token in added.items() if is_thought_token(token))
    return frozenset((*added, *tokenizer.all_special_ids)), tags


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Encode a text of any length.

    Raises:
        CheckpointError: If the tokenizer fails, or makes very many tokens of it.
    """
    if not text and not add_special_tokens:
        return []
    with tokenizing(tokenizer):
        # Not verbose: transformers warns about texts longer than the context, which callers reject or divide.
        ids = list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
    if len(ids) > MAX_TOKENS_BESIDES + MAX_TOKENS_PER_CHARACTER * len(text):
        raise CheckpointError(
            f"the tokenizer of {tokenizer.name_or_path} makes {len(ids):,} tokens of {len(text)} characters; use the "
            f"tokenizer of its base model"
        )
    return ids


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """Decode tokens; raises `CheckpointError` if the tokenizer fails."""
    with tokenizing(tokenizer):
        return str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))


@contextmanager
def tokenizing(tokenizer: PreTrainedTokenizerBase, what: str = "tokenizer") -> Iterator[None]:
    """Turn whatever a stranger's tokenizer raises inside the `with` block into a `CheckpointError`."""
    try:
        yield
    except (DapaError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        # Panics of its Rust code are not of the class Exception.
        raise CheckpointError(f"the {what} of {tokenizer.name_or_path} fails: {one_line(error)}") from error


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: BatchSize,
    settle: Settle | None = None,
    lookup: LookupCache | None = None,
    deterministic: bool = False,
    sampling: Sampling | None = None,
) -> list[str]:
    """Answer every prompt as the model's own `generate` would, but faster.

    If the model `is_deterministic`, a response does not depend on other prompts or on `lookup`. Otherwise the number of
    tokens in a forward pass may decide a near-tie between two tokens.

    Args:
        model: Prepared by `prepare_for_greedy`.
        tokenizer: The model's.
        prompts: Texts or conversations, without template.
        max_new_tokens: Maximum length of a response, which the model's context may shorten.
        batch_size: Number of prompts at once.
        settle: Called with the beginning of a response and its request; any result but None ends the response there.
        lookup: Earlier responses of models with this tokenizer, for speculative decoding; new ones are added. None
            disables drafts.
        deterministic: Whether to ignore `lookup` if it might change a response.
        sampling: How tokens are drawn; None for greedy decoding.

    Returns:
        One response per prompt. Special tokens are removed, except for the tags of thoughts. It begins with the thought
        that the chat template opens or with the prompt's opening of an answer, if there is one.

    Raises:
        UsageError: If a prompt is empty, or too long for the model.
        CheckpointError: If the tokenizer is not the model's.
    """
    answers = generate_ids(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        settle=settle,
        lookup=lookup,
        deterministic=deterministic,
        sampling=sampling,
    )
    return [
        thought_before(tokenizer, prompt) + text_of(tokenizer, opening_ids(tokenizer, prompt) + answer)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: BatchSize,
    settle: Settle | None = None,
    lookup: LookupCache | None = None,
    deterministic: bool = False,
    sampling: Sampling | None = None,
) -> list[list[int]]:
    """Answer every prompt as `generate` does, and return token ids, including the end token of a finished answer.

    A prompt's opening of an answer is not among them.
    """
    if not prompts:
        return []
    rows = _rows(model, tokenizer, prompts, max_new_tokens)
    asked = dict(zip(map(id, rows), prompts, strict=True))
    is_settled = None if settle is None else functools.partial(_is_settled, tokenizer, settle)
    # Longest first: if a batch does not fit in memory, it is the first one.
    order = sorted(rows, key=lambda row: -len(row.prompt))
    longest = max(len(row.prompt) + row.limit for row in rows)
    if is_batchable(model):
        decoder = Decoder(
            model,
            ends=_ends(model),
            padding=tokenizer.pad_token_id,
            batch_size=batch_size,
            lookup=None if deterministic and not is_deterministic(model, longest) else lookup,
            is_settled=lambda row: is_settled is not None and is_settled(row.tokens, asked[id(row)]),
            finish=lambda _: advance(1, "prompts"),
            sampling=sampling,
        )
        with batch_invariant(model), deterministic_attention(model, longest):
            decoder.run(order)
    else:
        answers = batch_size.map(
            lambda batch: _generate_plainly(model, tokenizer, batch, is_settled, sampling),
            [(row, asked[id(row)]) for row in order],
        )
        for row, tokens in zip(order, answers, strict=True):
            row.tokens = tokens
    return [row.tokens for row in rows]


def context_length(model: PreTrainedModel) -> int:
    """Context length of a model in tokens; a huge number if its config does not give one."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 1 << 30


def _rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
) -> list[BatchRow]:
    """Encode and check the prompts, and limit their responses to the model's context."""
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    context = context_length(model)
    _check_lengths(prompts, ids, context)
    check_ids(model, ids)
    return [BatchRow(tokens, min(max_new_tokens, context - len(tokens))) for tokens in ids]


def _ends(model: PreTrainedModel) -> list[int]:
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def _check_lengths(prompts: Sequence[str], ids: Sequence[Sequence[int]], context: int) -> None:
    for number, (prompt, tokens) in enumerate(zip(prompts, ids, strict=True), 1):
        which = f"prompt {number} of {len(ids)}"
        # The number alone does not identify it: prompts come from several files and are deduplicated.
        beginning = repr(prompt if len(prompt) <= SHOWN_CHARACTERS else f"{prompt[:SHOWN_CHARACTERS]}...")
        if not tokens:
            raise UsageError(f"{which} is empty, and no chat template adds to it; leave it out: {beginning}")
        if len(tokens) >= context:
            raise UsageError(
                f"{which} has {len(tokens)} tokens, but the model's context ends at {context} and leaves no "
                f"room for an answer; shorten the prompt or leave it out: {beginning}"
            )


def _is_settled(tokenizer: PreTrainedTokenizerBase, settle: Settle, tokens: list[int], prompt: str) -> bool:
    """Whether the verdict on a response that begins with these tokens, after the prompt's opening, is certain."""
    said = text_of(tokenizer, opening_ids(tokenizer, prompt) + tokens).rstrip("\ufffd")
    text = thought_before(tokenizer, prompt) + said
    # The next token may change the last word: its apostrophe or full stop may remove a space.
    beginning = text[: max(text.rfind(" "), len(text) - UNSTABLE_CHARACTERS, 0)]
    return bool(beginning) and settle(beginning, request_of(prompt)) is not None


class _AllSettled(StoppingCriteria):  # type: ignore[misc]
    """Ends rows of the model's own `generate` once their verdict is certain."""

    def __init__(self, is_settled: IsSettled, prompts: Sequence[str], start: int) -> None:
        self._is_settled = is_settled
        self._prompts = prompts
        self._start = start

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        said = input_ids[:, self._start :].tolist()
        due = len(said[0]) % SETTLE_EVERY == 0
        return torch.tensor(
            [due and self._is_settled(tokens, prompt) for tokens, prompt in zip(said, self._prompts, strict=True)],
            device=input_ids.device,
        )


@torch.inference_mode()
def _generate_plainly(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[tuple[BatchRow, str]],
    is_settled: IsSettled | None,
    sampling: Sampling | None,
) -> list[list[int]]:
    """Decode a batch of a model that is not batchable with its own `generate`."""
    inputs = tokenizer.pad({"input_ids": [row.prompt for row, _ in batch]}, padding_side="left", return_tensors="pt")
    inputs = inputs.to(model.device)
    start = inputs["input_ids"].shape[1]
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        # The first row has the longest prompt.
        max_new_tokens=batch[0][0].limit,
        logits_processor=sampling and [Sampled(sampling, [row.prompt for row, _ in batch], start)],
        stopping_criteria=is_settled and [_AllSettled(is_settled, [prompt for _, prompt in batch], start)],
    )
    advance(len(batch), "prompts")
    ends = set(_ends(model))
    return [
        _finished(tokens[: row.limit], ends) for tokens, (row, _) in zip(output[:, start:].tolist(), batch, strict=True)
    ]


def _finished(tokens: list[int], ends: Collection[int]) -> list[int]:
    """Drop the padding after the first end token."""
    stop = next((index for index, token in enumerate(tokens, 1) if token in ends), len(tokens))
    return tokens[:stop]
