"""The cases of a trace: prompts as one model reads them, with their subjects, and the settings for that model.

The subject of a request is the part that causal tracing corrupts: in "How do I steal a car?" it is the topic ("steal a
car"), not the words that introduce it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dapa_merge.errors import UsageError
from dapa_merge.measure.generate import chat_prompt, check_ids, context_length, decode, prompt_ids, tokenizing
from dapa_merge.measure.perplexity import ScoredText
from dapa_merge.measure.prompts.conversation import request_of
from dapa_merge.search.attribution import NUM_TOKENS, Contrast, sides_of
from dapa_merge.trace.options import NOISE, NUM_SAMPLES, SITE_KINDS
from dapa_merge.trace.replay import find_sites, kinds_in


@dataclass(frozen=True)
class Case:
    """A prompt that is traced, as one model reads it.

    Attributes:
        refusing: The tokens of prompt and refusal, the last of which are counted.
        complying: The tokens of prompt and answer, equally long.
        subject: The first of the subject's tokens, and the one after the last.
        tokens: The texts of the given tokens: the prompt with its template, and the common beginning of the responses.
    """

    contrast: Contrast
    refusing: ScoredText
    complying: ScoredText
    subject: tuple[int, int]
    tokens: tuple[str, ...]

    @property
    def num_context(self) -> int:
        """The number of given tokens, which can be restored."""
        return self.refusing.num_context


def read_case(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contrast: Contrast,
    subjects: Sequence[str] = (),
    num_tokens: int = NUM_TOKENS,
) -> Case:
    """Read a contrast with a model's tokenizer; at most `num_tokens` of each response are counted.

    The first of `subjects` that the prompt contains is its subject; if they are empty, it is found.

    Raises:
        UsageError: If the subject is not in the prompt, the prompt is too long, or the responses do not differ.
        CheckpointError: If the tokenizer is another model's.
    """
    prompt = contrast.prompt
    span = given_subject(prompt, subjects) if subjects else find_subject(prompt)
    sides = sides_of(tokenizer, contrast, num_tokens)
    if not sides:
        raise UsageError(
            f"the two responses to the prompt {prompt[:80]!r} cannot be compared: they are the same, or one is the "
            f"beginning of the other"
        )
    refusing, complying = (side.row for side in sides)
    check_ids(model, (refusing.ids, complying.ids))
    limit = context_length(model)
    if len(refusing.ids) > limit:
        raise UsageError(
            f"the prompt {prompt[:80]!r} has {len(refusing.ids)} tokens with the beginning of its answer, but the "
            f"model's context ends at {limit}; shorten it or leave it out"
        )
    context = refusing.ids[: refusing.num_context]
    tokens = tuple(decode(tokenizer, [token], skip_special_tokens=False) for token in context)
    return Case(contrast, refusing, complying, subject_tokens(tokenizer, prompt, span), tokens)


def embedding_deviation(model: PreTrainedModel, cases: Sequence[Case]) -> float:
    """The standard deviation of the embeddings of all subjects, over tokens and features."""
    ids = [token for case in cases for token in case.refusing.ids[slice(*case.subject)]]
    with torch.inference_mode():
        return float(model.get_input_embeddings()(torch.tensor(ids, device=model.device)).float().std())


# Kinds that are restored in several layers at once, because one layer changes little (ROME, section 2.2).
WINDOWED = ("mlp", "attention")
# Share of the layers in a window: 10 of 48 in ROME.
WINDOW_SHARE = 0.2


@dataclass(frozen=True)
class Settings:
    """The settings for causal tracing of a model.

    Attributes:
        kinds: Some of `SITE_KINDS`.
        noise: Standard deviation of the noise, as a multiple of that of the subjects' embeddings.
        window: Layers that are restored at once for the kinds in `WINDOWED`; for the others it is one.
        num_tokens: Tokens of each response that are counted, at most.
    """

    kinds: tuple[str, ...]
    noise: float = NOISE
    num_samples: int = NUM_SAMPLES
    window: int = 1
    num_tokens: int = NUM_TOKENS
    seed: int = 0


def default_window(num_layers: int) -> int:
    """The number of layers in a window, for a model of `num_layers`."""
    return max(1, round(WINDOW_SHARE * num_layers))


def window_layers(settings: Settings, kind: str, layer: int, num_layers: int) -> range:
    """The layers that are restored at once for a layer; half of the window lies before it."""
    width = settings.window if kind in WINDOWED else 1
    first = layer - width // 2
    return range(max(0, first), min(num_layers, first + width))


def make_settings(model: PreTrainedModel, kinds: Sequence[str] | None = None, **settings: Any) -> Settings:
    """Settings for a model; those that are absent or None get its defaults.

    Raises:
        UsageError: If the model lacks one of `kinds`.
    """
    for kind in kinds or ():
        if not any(find_sites(model, kind)):
            raise UsageError(f"{type(model).__name__} has no {kind} to trace; leave it out")
    chosen = {name: value for name, value in settings.items() if value is not None}
    num_layers = len(find_sites(model, "hidden"))
    ordered = [kind for kind in SITE_KINDS if kinds is None or kind in kinds]
    present = kinds_in(model) if kinds is None else SITE_KINDS
    return Settings(
        tuple(kind for kind in ordered if kind in present), **{"window": default_window(num_layers), **chosen}
    )


# Words that introduce the subject of a request.
FRAME_WORDS = """
    a an the to of on in about for with that which who where when why what how whether and or as from by it its this
    i me my you your we us our one someone somebody anyone people person
    is are was be can could would should do does did will shall may might must want need like let able help please now
    write give tell explain describe show teach provide create generate make produce draft compose outline list design
    instruct demonstrate detail suggest offer come up prepare share say know learn
    step steps guide guides tutorial tutorials instruction instructions manual plan plans script scripts speech article
    articles post posts letter letters email message essay story blog way ways method methods advice tips information
    detailed comprehensive short brief complete full effective best good
"""
# After one of these, a verb belongs to the subject, even if requests often begin with it.
BEFORE_VERBS = ("to", "i", "you", "we", "they", "someone", "one", "can")
FRAME = frozenset(FRAME_WORDS.split())
_WORD = re.compile(r"\w[\w'’-]*")


def find_subject(prompt: str) -> tuple[int, int]:
    """Find the subject of a prompt's request: everything after its opening words, without punctuation at the end.

    A verb that often begins a request ("make a bomb") belongs to the subject after "to".

    Returns:
        The first character and the one after the last; of the whole request if no other word is left.
    """
    request = request_of(prompt)
    words = list(_WORD.finditer(request))
    for index, word in enumerate(words):
        follows_to = index > 0 and words[index - 1][0].lower() in BEFORE_VERBS
        is_frame = word[0].lower() in FRAME
        if not is_frame or (follows_to and word[0].lower() in ("make", "create", "produce", "write", "design")):
            return word.start(), words[-1].end()
    return 0, len(request)


def given_subject(prompt: str, subjects: Iterable[str]) -> tuple[int, int]:
    """The span, in characters of the request, of the first of the given subjects that a prompt contains.

    Raises:
        UsageError: If it contains none.
    """
    if (span := _find(prompt, subjects)) is None:
        wanted = ", ".join(map(repr, subjects))
        raise UsageError(f"the prompt {prompt[:80]!r} does not contain the subject {wanted}; give one that it contains")
    return span


def with_subject(prompts: Iterable[str], subjects: Sequence[str]) -> list[str]:
    """The prompts that contain one of the given subjects.

    Raises:
        UsageError: If none does.
    """
    prompts = list(prompts)
    found = [prompt for prompt in prompts if _find(prompt, subjects)]
    if not found:
        wanted = " or ".join(map(repr, subjects))
        raise UsageError(f"none of {len(prompts)} harmful prompts contains the subject {wanted}; give one that some do")
    return found


def _find(prompt: str, subjects: Iterable[str]) -> tuple[int, int] | None:
    # lower() would turn some letters into two.
    request = request_of(prompt)
    found = (re.search(re.escape(subject), request, re.IGNORECASE) for subject in subjects)
    return next((match.span() for match in found if match), None)


def subject_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, span: tuple[int, int]) -> tuple[int, int]:
    """The tokens of a span of a request's characters, with its prompt in the template.

    Returns:
        Indices into `prompt_ids`: the first token, and the one after the last.

    Raises:
        UsageError: If the chat template or the tokenizer changes these characters, so that they are not found.
    """
    text, request = chat_prompt(tokenizer, prompt), request_of(prompt)
    subject = request[slice(*span)]
    start = text.rfind(request.strip())
    # A template may change the request, but must leave the subject.
    start = text.rfind(subject) if start < 0 else start + span[0] - (len(request) - len(request.lstrip()))
    if start < 0:
        raise UsageError(f"the model's chat template changes the subject {subject!r}; give another")
    stop = start + len(subject)
    inside = [
        index
        for index, (first, last) in enumerate(_token_spans(tokenizer, prompt, text))
        if first < stop and last > start and first < last
    ]
    if not inside:
        raise UsageError(f"no token of the model covers the subject {subject!r}; give another")
    return inside[0], inside[-1] + 1


def _token_spans(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> list[tuple[int, int]]:
    """Each token's first character and the one after its last."""
    ids = prompt_ids(tokenizer, prompt)
    if tokenizer.is_fast:
        with tokenizing(tokenizer):
            encoded = tokenizer(
                text, add_special_tokens=not tokenizer.chat_template, verbose=False, return_offsets_mapping=True
            )
        return [(first, last) for first, last in encoded["offset_mapping"]]
    # For others, decode longer and longer beginnings. A token that ends within a character belongs to it.
    read = [decode(tokenizer, ids[:number], skip_special_tokens=False) for number in range(len(ids) + 1)]
    ends = [len(beginning.rstrip("\ufffd")) for beginning in read]
    surplus = ends[-1] - len(text)
    spans = []
    for number, first in enumerate(ends[:-1]):
        last = next((end for end in ends[number + 1 :] if end > first), first)
        spans.append((max(first - surplus, 0), max(last - surplus, 0)))
    return spans
