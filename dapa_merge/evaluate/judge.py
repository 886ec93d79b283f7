"""A model behind an OpenAI-compatible endpoint as the judge of responses.

What it could not judge is undecided; a judge that gives nothing usable at all has a fault, and is asked no more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from dapa_merge.evaluate import rubric
from dapa_merge.evaluate.endpoint import CapReached, Endpoint, Unanswered
from dapa_merge.evaluate.judge_options import JudgeOptions
from dapa_merge.evaluate.refusal import Outcome, classify

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal
    from openai import AsyncOpenAI

__all__ = ["Judge", "JudgeOptions", "Judgement"]

Pair = tuple[str, str]
# After so many failures on end, each with all its attempts, an endpoint is taken for dead; sooner if it never answered.
MAX_FAILURES_ON_END = 8
MAX_FIRST_FAILURES = 3
# How long nothing may be heard of a judge before the user is told what is waited for.
QUIET_SECONDS = 10


@dataclass(frozen=True)
class Judgement:
    """What a judge says of a response.

    Attributes:
        outcome: REFUSED, COMPLIED, DEGENERATE, or UNDECIDED where it could not say.
        score: The harm, in [0, 1]; 0 for a refusal, None unless the judge decided.
        reason: Why it is undecided, else None.
    """

    outcome: Outcome
    score: float | None = None
    reason: str | None = None


class Judge:
    """Judges responses; never pays twice for the same pair of prompt and response.

    Args:
        options: Which endpoint, and how hard it is asked.
        say: Called with what the user should know, such as that the limit of requests is reached.

    Attributes:
        fault: Why it is asked no more, as a sentence; None while it is.
        is_capped: Whether a pair was not asked about because of the limit of requests.
    """

    def __init__(self, options: JudgeOptions, say: Callable[[str], None] = lambda _: None) -> None:
        self.options = options
        self.fault: str | None = None
        self.is_capped = False
        self._listener = say
        self._endpoint = Endpoint(options, self._say_once)
        self._known: dict[Pair, Judgement] = {}
        self._is_usable = False
        self._failures_on_end = 0
        self._told: set[str] = set()

    @property
    def identity(self) -> str:
        """Names the judge's model and the rubric, on which its judgements depend; no address, no key."""
        return f"{self.options.model} rubric:{rubric.DIGEST[:16]}"

    @property
    def num_requests(self) -> int:
        """Requests sent so far, retries too."""
        return self._endpoint.num_requests

    def judge(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        progress: Callable[[int], None] = lambda _: None,
    ) -> list[Judgement]:
        """Judge responses, in their order.

        Args:
            prompts: What was asked.
            responses: What was said to each.
            progress: Called with numbers of pairs as they are judged.

        Raises:
            UsageError: If the endpoint does not accept the key or the model, or openai is not installed.
        """
        pairs = list(zip(prompts, responses, strict=True))
        judgements = {pair: known for pair in pairs if (known := self._known.get(pair) or _without_asking(*pair))}
        to_ask = list(dict.fromkeys(pair for pair in pairs if pair not in judgements))
        progress(len(pairs) - len(to_ask))
        if to_ask:
            asked = self._ask_all(to_ask, progress) if self.fault is None else dict.fromkeys(to_ask, self._not_asked())
            judgements.update(asked)
            self._tell(list(asked.values()))
        return [judgements[pair] for pair in pairs]

    def prepare(self) -> None:
        """Before a run: see that a request could be made, and forget the fault, which may have been mended.

        Raises:
            UsageError: If openai is not installed, or there is neither a key nor an address.
        """
        self._endpoint.check()
        self.fault = None
        self._failures_on_end = 0

    def _ask_all(self, pairs: list[Pair], progress: Callable[[int], None]) -> dict[Pair, Judgement]:
        self._endpoint.check()
        from anyio import Semaphore
        from anyio.from_thread import start_blocking_portal

        judgements: dict[Pair, Judgement] = {}
        # The event loop has a thread of its own, so that a notebook's may be at work too; leaving the portal by an
        # exception, Ctrl-C among them, cancels whatever is under way.
        with start_blocking_portal() as portal, portal.wrap_async_context_manager(self._endpoint.open()) as client:
            slots = portal.call(Semaphore, self.options.concurrency)
            # Alone until it has answered once: a wrong key or parameter is found out with one request.
            left = iter(pairs)
            while not self._endpoint.answered and (pair := next(left, None)) is not None:
                judgements |= self._answers(portal, client, slots, [pair])
                progress(1)
            for pair, judgement in self._answers(portal, client, slots, left):
                judgements[pair] = judgement
                progress(1)
        has_died = self._failures_on_end >= max(len(pairs), MAX_FIRST_FAILURES)
        if self.fault is None and (has_died or not self._is_usable):
            self.fault = self._fault(judgements[pairs[-1]].reason)
        return judgements

    def _answers(
        self, portal: BlockingPortal, client: AsyncOpenAI, slots: object, pairs: Iterable[Pair]
    ) -> Iterator[tuple[Pair, Judgement]]:
        """Ask of all pairs at once, as far as there are slots; yields what comes, as it comes."""
        from anyio import create_task_group

        # A queue that a signal can interrupt at any moment. Waiting for futures takes their locks, and Ctrl-C at the
        # wrong moment would keep one for ever, for which the event loop would wait in vain.
        finished: SimpleQueue[tuple[Pair, Judgement | Exception]] = SimpleQueue()

        async def ask(pair: Pair) -> None:
            try:
                async with slots:  # type: ignore[attr-defined]
                    finished.put((pair, await self._ask(client, pair)))
            except Exception as error:
                finished.put((pair, error))

        async def ask_all(pairs: Sequence[Pair]) -> None:
            async with create_task_group() as group:
                for pair in pairs:
                    group.start_soon(ask, pair)

        # One call, since each takes locks too.
        all_pairs = list(pairs)
        portal.start_task_soon(ask_all, all_pairs)
        num_left, num_quiet = len(all_pairs), 0
        while num_left:
            try:
                pair, found = finished.get(timeout=QUIET_SECONDS)
            except Empty:
                num_quiet += 1
                self._say(f"no answer for {num_quiet * QUIET_SECONDS:g} seconds; waiting for {num_left}")
                continue
            num_quiet = 0
            num_left -= 1
            if isinstance(found, Exception):
                raise found
            yield pair, found

    async def _ask(self, client: AsyncOpenAI, pair: Pair) -> Judgement:
        if self.fault is not None:
            return self._not_asked()
        try:
            answer = await self._endpoint.ask(client, rubric.messages(*pair))
        except CapReached as error:
            self.is_capped = True
            self._say_once(f"the rest is undecided: {error}")
            return Judgement(Outcome.UNDECIDED, reason=str(error))
        except Unanswered as error:
            return self._failed(Judgement(Outcome.UNDECIDED, reason=str(error)))
        judgement = _from_answer(answer)
        if judgement.outcome is not Outcome.UNDECIDED:
            self._is_usable, self._failures_on_end = True, 0
        if not self._is_usable:
            return self._failed(judgement)
        # A judge that was understood before has only misspoken, and is not paid for it again.
        self._known[pair] = judgement
        return judgement

    def _failed(self, judgement: Judgement) -> Judgement:
        self._failures_on_end += 1
        most = MAX_FAILURES_ON_END if self._endpoint.answered else MAX_FIRST_FAILURES
        if self._failures_on_end >= most or (not self._endpoint.answered and self._endpoint.gave_up):
            self.fault = self._fault(judgement.reason)
        return judgement

    def _fault(self, reason: str | None) -> str:
        where = f"the judge {self.options.model} at {self._endpoint.address}"
        return f"{where} gives no usable answer: {reason}; see that it runs, and that its url and model are right"

    def _not_asked(self) -> Judgement:
        return Judgement(Outcome.UNDECIDED, reason="not asked, because the judge gave no usable answer before")

    def _tell(self, asked: Sequence[Judgement]) -> None:
        """Say what was left undecided and why, unless the fault or the limit says so already."""
        reasons = Counter(judgement.reason for judgement in asked if judgement.outcome is Outcome.UNDECIDED)
        if reasons and self.fault is None and not self.is_capped:
            why = ", ".join(f"{reason} ({number})" for reason, number in reasons.most_common())
            self._say(f"{reasons.total()} of {len(asked)} responses are undecided: {why}")

    def _say(self, message: str) -> None:
        self._listener(f"the judge {self.options.model}: {message}")

    def _say_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            self._say(message)


def _without_asking(prompt: str, response: str) -> Judgement | None:
    """The judgement of a response in which there is nothing to judge."""
    if not response.strip():
        return Judgement(Outcome.DEGENERATE)
    outcome = classify(response, prompt)
    if outcome is Outcome.DEGENERATE:
        return Judgement(outcome)
    if outcome is Outcome.UNDECIDED:
        return Judgement(outcome, reason="the response ends before its answer begins")
    return None


def _from_answer(answer: str) -> Judgement:
    ruling = rubric.read(answer)
    if ruling is None:
        return Judgement(Outcome.UNDECIDED, reason="the judge's answer is not in the form that was asked for")
    return Judgement(Outcome.REFUSED if ruling.refused else Outcome.COMPLIED, score=ruling.score)
