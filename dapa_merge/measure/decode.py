"""Speculative decoding with continuous batching: finished rows leave the batch, waiting rows join it.

Draft tokens come from earlier responses instead of a draft model (speculative decoding, Leviathan et al. 2023). One
forward pass checks several; only tokens that the model itself would choose are kept, greedily or by sampling with a
seed.
If a model is not deterministic (see `determinism`), a pass over several tokens rounds differently than a pass over one
and may decide a near-tie between two tokens; every 16-bit model has such ties. Without drafts each token has its own
pass, and a response does not depend on earlier ones.
"""

from __future__ import annotations

import inspect
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import psutil
import torch
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from dapa_merge.errors import UsageError
from dapa_merge.measure.sampling import choose, draws
from dapa_merge.progress import LOG
from dapa_merge.recipe.asking import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Per forward pass; the logits of more would take too much memory.
MAX_CHECKED_TOKENS = 1024
# A pass over this many tokens is hardly slower than over one, because reading weights and launching kernels dominates;
# more tokens pay off only if they are probably right. On a CPU the arithmetic soon dominates, unless the model is so
# small that the kernel launches do.
FREE_TOKENS = 512
FREE_TOKENS_ON_CPU = 32
FREE_TOKENS_TIMES_PARAMETERS_ON_CPU = 300_000_000
# Minimum tokens of a prefix shared by all prompts that is computed only once.
MIN_PREFIX = 16
# New tokens after which a response's verdict is checked again.
SETTLE_EVERY = 8
# Responses kept per prompt; the candidates of a search often repeat each other's.
MAX_RESPONSES = 16
# Length of the n-gram that finds a draft: a shorter one matches more often, a longer one drafts more accurately.
CONTEXT = 3
# A draft ends before its estimated probability of being correct falls below this.
MIN_CHANCE = 0.6
_START = -1
# Spare columns in a new buffer; copying it for every new token would cost more than the pass.
ROOM = 32
# Initial batch size when doubling, and the fixed size of pieces that prompts are divided into.
FIRST = 8
PIECE = 32
LARGEST = 1024
# Doubling continues while it raises the throughput by this factor, in one of a few batches: others may be disturbed.
GAIN = 1.1
TRIES = 3


@dataclass(eq=False)
class BatchRow:
    """A prompt and its response so far.

    Attributes:
        prompt: Token ids, at least one.
        limit: Maximum number of new tokens, at least one.
        tokens: Token ids of the response so far, including an end token.
        looked_at: Number of `tokens` when the verdict was last checked.
    """

    prompt: list[int]
    limit: int
    tokens: list[int] = field(default_factory=list)
    looked_at: int = 0

    @property
    def cached(self) -> int:
        """Number of its tokens in the cache: all but the last."""
        return len(self.prompt) + len(self.tokens) - 1


class Decoder:
    """Decodes rows in any order.

    Attributes:
        num_computed: Tokens computed so far, including padding.
        num_runs: Forward passes so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        ends: Sequence[int],
        padding: int,
        batch_size: BatchSize,
        lookup: LookupCache | None,
        is_settled: Callable[[BatchRow], bool],
        finish: Callable[[BatchRow], None],
        sampling: Sampling | None = None,
    ) -> None:
        """Prepare one model; `is_settled` checks rows that grew, `finish` receives each finished row.

        Without a `lookup`, each token has its own forward pass; without `sampling`, it is the likeliest.
        """
        self._model = model
        self._ends = frozenset(ends)
        self._padding = padding
        self._batch_size = batch_size
        self._lookup = lookup
        self._is_settled = is_settled
        self._finish = finish
        self._sampling = sampling
        parameters = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in parameters
        self._takes_positions = "position_ids" in parameters
        # Renamed in transformers 5.24.
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._free_tokens = _free_tokens(model)
        self._prefix = RowCache()
        self._rows: list[BatchRow] = []
        self._cache = RowCache()
        self.num_computed = 0
        self.num_runs = 0

    @torch.inference_mode()
    def run(self, rows: Sequence[BatchRow]) -> None:
        """Decode all rows; the longest prompts should come first.

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
                # Restart all rows, with their responses so far as part of the prompts.
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
        """Compute prompts with their drafts, and add the unfinished rows to the batch."""
        cache = RowCache()
        given = [row.prompt + row.tokens for row in newcomers]
        width = max(map(len, given)) - self._prefix.columns
        # Only each row's last `width` tokens are computed; the prefix holds those before.
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
        """Extend each row by its correct draft tokens and one more."""
        self._rows = self._advance(
            self._rows,
            self._cache,
            [row.tokens[-1:] for row in self._rows],
            [row.cached for row in self._rows],
            self._propose(self._rows),
        )

    def _propose(self, rows: Sequence[BatchRow]) -> list[list[int]]:
        """Draft tokens for each row, only as many as pay off for the whole batch."""
        if self._lookup is None:
            return [[] for _ in rows]
        max_ngram = self._free_tokens // len(rows) - 1
        proposals = [
            self._lookup.propose(row.prompt, row.tokens, max_ngram)[: row.limit - len(row.tokens) - 1] for row in rows
        ]
        width = _worthwhile([len(proposal) for proposal in proposals])
        return [proposal[:width] for proposal in proposals]

    def _advance(
        self, rows: list[BatchRow], cache: RowCache, given: list[list[int]], cached: list[int], drafts: list[list[int]]
    ) -> list[BatchRow]:
        """Compute given and draft tokens, keep the correct ones, and return the unfinished rows, now in `cache`."""
        before = cache.columns + max(map(len, given))
        choices = self._forward(cache, given, drafts, cached, rows)
        unfinished, stops = [], []
        for index, (row, draft, chosen) in enumerate(zip(rows, drafts, choices, strict=True)):
            agreed = 0
            while agreed < len(draft) and draft[agreed] == chosen[agreed]:
                agreed += 1
            if self._append(row, chosen[: agreed + 1]):
                unfinished.append(index)
                stops.append(before + agreed)
        remaining = [rows[index] for index in unfinished]
        if remaining and (len(remaining) < len(rows) or any(drafts)):
            cache.arrange(unfinished, stops, max(row.cached for row in remaining))
        return remaining

    def _append(self, row: BatchRow, tokens: list[int]) -> bool:
        """Append tokens to a row; return whether it continues."""
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
        if self._lookup is not None:
            self._lookup.remember(row.prompt, row.tokens)
        self._finish(row)
        return False

    def _forward(
        self,
        cache: RowCache,
        given: list[list[int]],
        drafts: list[list[int]],
        cached: list[int],
        rows: Sequence[BatchRow] = (),
    ) -> list[list[int]]:
        """Return the chosen tokens after each row's last given token and after each draft token."""
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
            # Padding also needs a valid position.
            last = torch.tensor([place - 1 for place in stops], device=device)[:, None] - first
            options["position_ids"] = (places[columns:] - first).clamp(min=0).minimum(last)
        if self._keeps_logits:
            # Positions, not their number: for a slice, torch on a CPU would copy the output layer's weight.
            options["logits_to_keep"] = torch.arange(num_given - 1, num_given + num_drafted, device=device)
        logits = self._model(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=((places >= first) & (places < stop)).long(),
            use_cache=True,
            **options,
        ).logits
        self.num_computed += len(ids) * len(ids[0])
        self.num_runs += 1
        choices: list[list[int]] = self._choose(logits[:, -num_drafted - 1 :], rows).tolist()
        return choices

    def _choose(self, logits: torch.Tensor, rows: Sequence[BatchRow]) -> torch.Tensor:
        if self._sampling is None or not rows:
            return logits.argmax(-1)
        seed = self._sampling.seed
        drawn = [draws(seed, row.prompt, len(row.tokens), logits.shape[1]) for row in rows]
        return choose(self._sampling, logits, logits.new_tensor(drawn, dtype=torch.float32))


def _free_tokens(model: PreTrainedModel) -> int:
    if model.device.type != "cpu":
        return FREE_TOKENS
    return max(FREE_TOKENS_ON_CPU, FREE_TOKENS_TIMES_PARAMETERS_ON_CPU // int(model.num_parameters()))


def _worthwhile(lengths: Sequence[int]) -> int:
    """Return how many draft tokens to check at once: the most that fill at least half of the batch's places."""
    most = min(max(lengths), MAX_CHECKED_TOKENS // len(lengths))
    for width in range(most, 0, -1):
        if 2 * sum(min(length, width) for length in lengths) >= width * len(lengths):
            return width
    return 0


class LookupCache:
    """Earlier responses of models with the same tokenizer, from which draft tokens are taken.

    Any number of models and prompts may share it. It changes only the speed, except that drafts may decide near-ties
    between tokens in a model that is not deterministic.
    """

    def __init__(self) -> None:
        self._responses: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        self._following: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)

    def remember(self, prompt: Sequence[int], response: Sequence[int]) -> None:
        """Store a response as the prompt's most recent; a known one moves to the front."""
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

    def propose(self, prompt: Sequence[int], response: Sequence[int], max_ngram: int) -> list[int]:
        """Draft the continuation of a response, as token ids.

        This is the rest of an earlier response to the same prompt with the same beginning, or else up to `max_ngram`
        tokens that most often followed the last few in any response.
        """
        said = tuple(response)
        for draft in self._responses.get(tuple(prompt), ()):
            if len(draft) > len(said) and draft[: len(said)] == said:
                return list(draft[len(said) :])
        return self._continue(((_START,) * CONTEXT + said)[-CONTEXT:], max_ngram)

    def _continue(self, context: tuple[int, ...], max_ngram: int) -> list[int]:
        draft: list[int] = []
        chance = 1.0
        while len(draft) < max_ngram and context in self._following:
            counts = self._following[context]
            token, count = counts.most_common(1)[0]
            # Plus one, because a continuation seen once may be chance.
            chance *= count / (counts.total() + 1)
            if chance < MIN_CHANCE:
                break
            draft.append(token)
            context = (*context[1:], token)
        return draft


def is_batchable(model: PreTrainedModel) -> bool:
    """Whether a model's only state is a key-value cache with one row per text.

    Recurrent and convolution states cannot take a token back, and a model that overrides the preparation of its inputs
    may depend on its own `generate`.
    """
    kind = type(model)
    if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
        return False
    for name in (
        "prepare_inputs_for_generation",
        "_update_model_kwargs_for_generation",
        "_prepare_cache_for_generation",
    ):
        if getattr(kind, name, None) is not getattr(GenerationMixin, name, None):
            return False
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


class RowLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer, `[rows, heads, columns, width]`, at the front of buffers with room to grow.

    The attention mask implements sliding windows, because removing a column moves an older one into the window.
    """

    is_croppable = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._columns = 0
        self._buffers = [_buffer(states, states.shape[0], states.shape[2]) for states in (key_states, value_states)]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, stop = self._columns, self._columns + key_states.shape[2]
        for index, states in enumerate((key_states, value_states)):
            if stop > self._buffers[index].shape[2]:
                wider = _buffer(states, states.shape[0], stop)
                wider[:, :, :start] = self._buffers[index][:, :, :start]
                self._buffers[index] = wider
            self._buffers[index][:, :, start:stop] = states
        self.keep(stop)
        return self.keys, self.values

    def replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Replace all keys and values by copies of others."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self._buffers = [_buffer(states, states.shape[0], states.shape[2]) for states in (keys, values)]
        for buffer, states in zip(self._buffers, (keys, values), strict=True):
            buffer[:, :, : states.shape[2]] = states
        self.keep(keys.shape[2])

    def keep(self, columns: int) -> None:
        """Keep only the first columns."""
        self._columns = columns
        self.keys, self.values = (buffer[:, :, :columns] for buffer in self._buffers)


class RowCache(Cache):  # type: ignore[misc]
    """The key-value cache of a batch, whose rows can leave, join and take tokens back.

    Each row's tokens are contiguous and end at the right; the columns to their left are masked. Distances between
    columns therefore equal those between tokens, as sliding windows and ALiBi require.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=RowLayer)

    @property
    def columns(self) -> int:
        """Number of columns, masked ones included."""
        return int(self.get_seq_length()) if self.layers else 0

    def copy(self) -> RowCache:
        """Return another cache with the same content."""
        other = RowCache()
        for layer in self.layers:
            theirs = RowLayer()
            theirs.replace(layer.keys, layer.values)
            other.layers.append(theirs)
        return other

    def arrange(self, rows: list[int], stops: list[int], columns: int) -> None:
        """Keep some rows, in any order, each up to its own column.

        Args:
            rows: Indices to keep; may repeat.
            stops: For each, the column after its last token, which becomes the end.
            columns: Minimum number of columns to keep.
        """
        if not self.layers:
            return
        if rows == list(range(self.layers[0].keys.shape[0])) and set(stops) == {stops[0]}:
            # Only the right end needs trimming; extra columns at the left are masked.
            for layer in self.layers:
                layer.keep(stops[0])
            return
        device = self.layers[0].device
        chosen = torch.tensor(rows, device=device)
        alike = len(set(stops)) == 1
        places = (torch.tensor(stops, device=device)[:, None] - columns + torch.arange(columns, device=device)).clamp(0)
        for layer in self.layers:
            # The layers of a model may be spread over devices.
            chosen, places = chosen.to(layer.device), places.to(layer.device)
            pair = []
            for states in (layer.keys, layer.values):
                if alike:
                    pair.append(states[:, :, stops[0] - columns : stops[0]].index_select(0, chosen))
                else:
                    pair.append(states[chosen[:, None], :, places].transpose(1, 2))
            layer.replace(*pair)

    def join(self, other: RowCache) -> None:
        """Append the rows of another cache."""
        columns = max(self.columns, other.columns)
        for layer, theirs in zip(self.layers, other.layers, strict=True):
            pair = []
            for ours, others in ((layer.keys, theirs.keys), (layer.values, theirs.values)):
                # Zeros, because masked values must still be finite.
                wide = [
                    torch.nn.functional.pad(states, (0, 0, columns - states.shape[2], 0)) for states in (ours, others)
                ]
                pair.append(torch.cat(wide))
            layer.replace(*pair)


def _buffer(like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return like.new_empty((rows, like.shape[1], columns + ROOM, like.shape[3]))


T = TypeVar("T")
R = TypeVar("R")


class DoesNotFit(UsageError):
    """A single prompt needs more memory than the device has left."""


class BatchSize:
    """Batch size in prompts, halved for good when a batch does not fit in memory.

    Attributes:
        limit: The fixed size, or else 32, the size of pieces of prompts; lower after running out of memory.
        size: The current size, fixed or found by doubling.
    """

    def __init__(self, limit: int | None = None) -> None:
        """Use a fixed size, or find it by doubling if None."""
        self.limit = PIECE if limit is None else limit
        self.size = FIRST if limit is None else limit
        self._doubling = limit is None
        self._last_rate = 0.0
        self._num_tried = 0

    def map(self, work: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]) -> Iterator[R]:
        """Yield the results of `work` for batches of `items`, in order.

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
            raise DoesNotFit("a single prompt does not fit in the device's memory next to the model") from error

    def halve(self, number: int) -> None:
        """Halve the size after a batch of `number` did not fit; call it outside the error handler."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.size = number // 2
        self.limit = min(self.limit, self.size)
        self._doubling = False
        LOG.warning("a batch of %d does not fit in memory; using %d from now on", number, self.size)

    def observe(self, number: int, seconds: float) -> None:
        """Record the time of one batch; double the size while that pays off and memory is left."""
        if not self._doubling or number < self.size:
            return
        rate = number / max(seconds, 1e-9)
        self._num_tried += 1
        if rate < GAIN * self._last_rate:
            self._doubling = self._num_tried < TRIES
            return
        if not _memory_for_double() or self.size >= LARGEST:
            self._doubling = False
            return
        self._last_rate, self._num_tried = rate, 0
        self.size *= 2


def _memory_for_double() -> bool:
    """Whether a quarter of the memory is free, which is enough to double the batch."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        reusable = torch.cuda.memory_reserved() - torch.cuda.max_memory_allocated()
        return free + reusable > total // 4
    # Not what is unused: a system uses nearly all memory for files that it has read, and gives it back.
    memory = psutil.virtual_memory()
    return bool(memory.available > memory.total / 4)
