"""Greedy decoding of many prompts in one ever-changing batch: who has finished leaves, who waits joins.

Drafted tokens are checked many in one run through the model, and kept as far as the model itself would have said them:
the result is greedy decoding's own. Where a model is not `steady`, a run of several tokens is rounded otherwise than a
run of one, and may decide a near-tie between two tokens, of which there are some in every 16-bit model. Without drafts
every token is said in a run of its own, and what is said depends on nothing that was said before.

How many texts a model is given at once: as many as fit and pay, and fewer when the memory runs out.

What models of one search said before: guesses at the next tokens, which a model then checks many at a time.

A guess is never believed: `decode` keeps a drafted token only where the model itself would have said it (speculative
decoding, Leviathan et al. 2023, with earlier responses in place of a small model). Standard library only.
"""

from __future__ import annotations

import inspect
import os
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch

from dapa_merge.errors import UsageError
from dapa_merge.measure.row_cache import RowCache
from dapa_merge.progress import LOG

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Of one run through the model: the logits of more would take too much memory.
MAX_CHECKED_TOKENS = 1024
# A run of so many tokens takes hardly longer than one of a single token, because weights have to be read and kernels
# called all the same; more are worth it only where they will probably be right. On a CPU the arithmetic is soon what
# counts, but for a model so small that the calls do.
FREE_TOKENS = 512
FREE_TOKENS_OF_CPU = 32
FREE_TOKENS_TIMES_PARAMETERS_OF_CPU = 300_000_000
# A beginning that all prompts share is computed once if it has at least as many tokens.
MIN_PREFIX = 16
# A text is looked at for its verdict when it has grown by as many tokens.
SETTLE_EVERY = 8


@dataclass(eq=False)
class BatchRow:
    """A prompt and what was said to it so far.

    Attributes:
        prompt: Token ids, at least one.
        limit: How many new tokens at most, at least one.
        tokens: The response's so far, with the end token if there was one.
        looked_at: How many of them there were when it was last asked whether they settle the verdict.
    """

    prompt: list[int]
    limit: int
    tokens: list[int] = field(default_factory=list)
    looked_at: int = 0

    @property
    def cached(self) -> int:
        """How many of its tokens are in the cache: all but the last."""
        return len(self.prompt) + len(self.tokens) - 1


class Decoder:
    """Decodes the rows that it is given, in an order of its own.

    Attributes:
        num_computed: How many tokens went through the model so far, padding too.
        num_runs: How often it ran.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        ends: Sequence[int],
        padding: int,
        batch_size: BatchSize,
        drafts: Drafts | None,
        is_settled: Callable[[BatchRow], bool],
        finish: Callable[[BatchRow], None],
    ) -> None:
        """For one model; `is_settled` is asked of rows that grew, and `finish` is told of each that is done.

        `drafts` None has every token said in a run of its own.
        """
        self._model = model
        self._ends = frozenset(ends)
        self._padding = padding
        self._batch_size = batch_size
        self._drafts = drafts
        self._is_settled = is_settled
        self._finish = finish
        parameters = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in parameters
        self._takes_positions = "position_ids" in parameters
        # transformers 5.24 gave it a new name.
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._free_tokens = _free_tokens(model)
        self._prefix = RowCache()
        self._rows: list[BatchRow] = []
        self._cache = RowCache()
        self.num_computed = 0
        self.num_runs = 0

    @torch.inference_mode()
    def run(self, rows: Sequence[BatchRow]) -> None:
        """Decode all rows; those with the longest prompts should come first.

        Raises:
            DoesNotFit: If one row alone does not fit in memory.
        """
        waiting = deque(rows)
        self._compute_prefix(rows)
        while waiting or self._rows:
            newcomers: list[BatchRow] = []
            room = self._batch_size.size - len(self._rows)
            if waiting and (not self._rows or 2 * room >= self._batch_size.size):
                newcomers = [waiting.popleft() for _ in range(min(room, len(waiting)))]
            number = len(self._rows) + len(newcomers)
            fits = True
            start = time.perf_counter()
            try:
                self._enter(newcomers) if newcomers else self._step()
            except torch.OutOfMemoryError as error:
                self._batch_size.check(number, error)
                fits = False
            if fits and not newcomers:
                self._batch_size.observe(number, time.perf_counter() - start)
            if not fits:
                # All begin anew, with what they have said as part of the prompt.
                waiting.extendleft(reversed(self._rows + [row for row in newcomers if row not in self._rows]))
                self._rows, self._cache = [], RowCache()
                self._batch_size.halve(number)

    def _compute_prefix(self, rows: Sequence[BatchRow]) -> None:
        first, last = min(row.prompt for row in rows), max(row.prompt for row in rows)
        shared = 0
        while shared < min(len(first), len(last)) - 1 and first[shared] == last[shared]:
            shared += 1
        if shared >= MIN_PREFIX and len(rows) > 1:
            self._forward(self._prefix, [first[:shared]], [[]], [0])

    def _enter(self, newcomers: list[BatchRow]) -> None:
        """Run prompts through the model, with what was drafted for them, and let those that go on join the batch."""
        cache = RowCache()
        given = [row.prompt + row.tokens for row in newcomers]
        width = max(map(len, given)) - self._prefix.columns
        # Every row's last `width` tokens are run; what is before them is in the prefix.
        cached = [max(len(tokens) - width, 0) for tokens in given]
        if max(cached):
            cache = self._prefix.copy()
            cache.arrange([0] * len(newcomers), cached, max(cached))
        given = [tokens[start:] for tokens, start in zip(given, cached, strict=True)]
        remaining = self._advance(newcomers, cache, given, cached, self._propose(newcomers))
        if remaining and self._rows:
            self._cache.join(cache)
        elif remaining:
            self._cache = cache
        self._rows = self._rows + remaining

    def _step(self) -> None:
        """Say one more token in every row, and as many more as were drafted rightly."""
        self._rows = self._advance(
            self._rows,
            self._cache,
            [row.tokens[-1:] for row in self._rows],
            [row.cached for row in self._rows],
            self._propose(self._rows),
        )

    def _propose(self, rows: Sequence[BatchRow]) -> list[list[int]]:
        """A draft for each row, of any length; the longest is no longer than what pays in a batch of all of them."""
        if self._drafts is None:
            return [[] for _ in rows]
        max_guess = self._free_tokens // len(rows) - 1
        proposals = [
            self._drafts.propose(row.prompt, row.tokens, max_guess)[: row.limit - len(row.tokens) - 1] for row in rows
        ]
        width = _worthwhile([len(proposal) for proposal in proposals])
        return [proposal[:width] for proposal in proposals]

    def _advance(
        self, rows: list[BatchRow], cache: RowCache, given: list[list[int]], cached: list[int], drafts: list[list[int]]
    ) -> list[BatchRow]:
        """Run given tokens and drafted ones, keep what is right; return the rows that go on, which `cache` keeps."""
        before = cache.columns + max(map(len, given))
        choices = self._forward(cache, given, drafts, cached)
        going_on, stops = [], []
        for index, (row, draft, chosen) in enumerate(zip(rows, drafts, choices, strict=True)):
            agreed = 0
            while agreed < len(draft) and draft[agreed] == chosen[agreed]:
                agreed += 1
            if self._say(row, chosen[: agreed + 1]):
                going_on.append(index)
                stops.append(before + agreed)
        remaining = [rows[index] for index in going_on]
        if remaining and (len(remaining) < len(rows) or any(drafts)):
            cache.arrange(going_on, stops, max(row.cached for row in remaining))
        return remaining

    def _say(self, row: BatchRow, tokens: list[int]) -> bool:
        """Add tokens to a row; whether it goes on."""
        for token in tokens:
            row.tokens.append(token)
            if token in self._ends or len(row.tokens) == row.limit:
                break
        else:
            if len(row.tokens) < row.looked_at + SETTLE_EVERY:
                return True
            row.looked_at = len(row.tokens)
            if not self._is_settled(row):
                return True
        if self._drafts is not None:
            self._drafts.remember(row.prompt, row.tokens)
        self._finish(row)
        return False

    def _forward(
        self, cache: RowCache, given: list[list[int]], drafts: list[list[int]], cached: list[int]
    ) -> list[list[int]]:
        """The model's choices after the last given token of each row, and after each drafted one."""
        num_given, num_drafted = max(map(len, given)), max(map(len, drafts))
        ids = [
            [self._padding] * (num_given - len(tokens)) + tokens + draft + [self._padding] * (num_drafted - len(draft))
            for tokens, draft in zip(given, drafts, strict=True)
        ]
        device, columns = self._model.device, cache.columns
        firsts = [columns + num_given - len(tokens) - start for tokens, start in zip(given, cached, strict=True)]
        stops = [columns + num_given + len(draft) for draft in drafts]
        places = torch.arange(columns + num_given + num_drafted, device=device)
        first, stop = torch.tensor([firsts, stops], device=device)[:, :, None]
        options: dict[str, object] = {self._cache_name: cache}
        if self._takes_positions:
            # A padded place needs some position, and one that the model has.
            last = torch.tensor([place - 1 for place in stops], device=device)[:, None] - first
            options["position_ids"] = (places[columns:] - first).clamp(min=0).minimum(last)
        if self._keeps_logits:
            # Positions rather than their number: of a slice, torch's CPU would copy the output layer's weight.
            options["logits_to_keep"] = torch.arange(num_given - 1, num_given + num_drafted, device=device)
        logits = self._model(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=((places >= first) & (places < stop)).long(),
            use_cache=True,
            **options,
        ).logits
        self.num_computed += len(ids) * len(ids[0])
        self.num_runs += 1
        choices: list[list[int]] = logits[:, -num_drafted - 1 :].argmax(-1).tolist()
        return choices


def _free_tokens(model: PreTrainedModel) -> int:
    if model.device.type != "cpu":
        return FREE_TOKENS
    return max(FREE_TOKENS_OF_CPU, FREE_TOKENS_TIMES_PARAMETERS_OF_CPU // int(model.num_parameters()))


def _worthwhile(lengths: Sequence[int]) -> int:
    """How many drafted tokens are checked at once: as many as keep at least half of the batch's places filled."""
    most = min(max(lengths), MAX_CHECKED_TOKENS // len(lengths))
    for width in range(most, 0, -1):
        if 2 * sum(min(length, width) for length in lengths) >= width * len(lengths):
            return width
    return 0


T = TypeVar("T")
R = TypeVar("R")

# Where no size was given: what is tried first, and what fixed pieces of prompts are made of.
FIRST = 8
PIECE = 32
LARGEST = 1024
# A doubled batch has to do this much more in a second, or doubling ends.
GAIN = 1.1


class DoesNotFit(UsageError):
    """One prompt alone needs more memory than the device has left."""


class BatchSize:
    """How many prompts are asked at once: halved, for good, when a batch does not fit in memory.

    Attributes:
        limit: The largest number at present, where one was fixed; else what fixed pieces of prompts are made of, 32
            or what a shortage of memory left of it.
        size: How many at once now; below a fixed limit never anything but it, else found by doubling.
    """

    def __init__(self, limit: int | None = None) -> None:
        """With a fixed limit, or, for None, a size that is found by doubling."""
        self.limit = PIECE if limit is None else limit
        self.size = FIRST if limit is None else limit
        self._doubling = limit is None
        self._last_rate = 0.0

    def map(self, work: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]) -> Iterator[R]:
        """The results of `work` for batches of `items`, in order.

        Raises:
            DoesNotFit: If a single item does not fit.
        """
        position = 0
        while position < len(items):
            batch = items[position : position + self.size]
            results: Sequence[R] | None = None
            start = time.perf_counter()
            try:
                results = work(batch)
            except torch.OutOfMemoryError as error:
                self.check(len(batch), error)
            if results is None:
                # Outside the handler, whose traceback would keep the batch's tensors alive.
                self.halve(len(batch))
                continue
            self.observe(len(batch), time.perf_counter() - start)
            yield from results
            position += len(batch)

    def check(self, number: int, error: BaseException) -> None:
        """Raise `DoesNotFit` if a batch that did not fit cannot be made smaller."""
        if number == 1:
            raise DoesNotFit("one prompt alone does not fit in the device's memory beside the model") from error

    def halve(self, number: int) -> None:
        """From now on at most half of a number that did not fit; call it outside the handler of the error."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.size = number // 2
        self.limit = min(self.limit, self.size)
        self._doubling = False
        LOG.warning("a batch of %d does not fit in memory; %d from now on", number, self.size)

    def observe(self, number: int, seconds: float) -> None:
        """Learn from one batch how long it took; the size doubles while that pays and memory is left."""
        if not self._doubling or number < self.size:
            return
        rate = number / max(seconds, 1e-9)
        if rate < GAIN * self._last_rate or not _memory_for_double() or self.size >= LARGEST:
            self._doubling = False
            return
        self._last_rate = rate
        self.size *= 2


def _memory_for_double() -> bool:
    """Whether the free memory is more than all that is in use by tensors beside it: then twice the batch fits."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        reusable = torch.cuda.memory_reserved() - torch.cuda.max_memory_allocated()
        return free + reusable > total // 4
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") / os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return True
    return available > 0.25


# Responses kept for each prompt: candidates of a search often say what some earlier one said.
MAX_RESPONSES = 16
# How many tokens say where one is in a response: fewer guess more often, more guess better.
CONTEXT = 3
# A token is not guessed if it, and all that were guessed before it, would be right less often than this.
MIN_CHANCE = 0.6
_START = -1


class Drafts:
    """A memory of responses, as token ids with their end token, of models with the same tokenizer.

    It may be shared by any number of models and prompts. What it holds changes how soon responses come and, where two
    tokens nearly tie in a model that is not `steady`, what they are.
    """

    def __init__(self) -> None:
        self._responses: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        self._following: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)

    def remember(self, prompt: Sequence[int], response: Sequence[int]) -> None:
        """Keep a response, the most recent first; one that was known already only moves to the front."""
        known = self._responses.setdefault(tuple(prompt), [])
        tokens = tuple(response)
        if tokens in known:
            known.remove(tokens)
        else:
            padded = (_START,) * CONTEXT + tokens
            for position, token in enumerate(tokens):
                self._following[padded[position : position + CONTEXT]][token] += 1
        known.insert(0, tokens)
        del known[MAX_RESPONSES:]

    def propose(self, prompt: Sequence[int], response: Sequence[int], max_guess: int) -> list[int]:
        """A guess at how a response to a prompt goes on.

        The rest of an earlier response to the prompt that began alike; where there is none, the tokens that mostly
        followed the last few in any response.

        Args:
            prompt: Token ids.
            response: What was said so far; may be empty.
            max_guess: How long a guess may be that no earlier response to the same prompt supports.

        Returns:
            Any number of token ids.
        """
        said = tuple(response)
        for draft in self._responses.get(tuple(prompt), ()):
            if len(draft) > len(said) and draft[: len(said)] == said:
                return list(draft[len(said) :])
        return self._continue(((_START,) * CONTEXT + said)[-CONTEXT:], max_guess)

    def _continue(self, context: tuple[int, ...], max_guess: int) -> list[int]:
        guess: list[int] = []
        chance = 1.0
        while len(guess) < max_guess and context in self._following:
            counts = self._following[context]
            token, count = counts.most_common(1)[0]
            # What was seen once may well have been chance.
            chance *= count / (counts.total() + 1)
            if chance < MIN_CHANCE:
                break
            guess.append(token)
            context = (*context[1:], token)
        return guess
