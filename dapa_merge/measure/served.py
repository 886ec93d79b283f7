"""Asks a model that runs elsewhere, behind an OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, Ollama and others.

So a quantized or converted deployment of a result can be measured, too. The server applies its own chat template. What
needs the model itself is left out: perplexity, tasks of lm-evaluation-harness. The beginning of an answer is only
given to a server that is seen to go on with it: others close it and begin a new answer, and say nothing.
Answers are kept until all are there, so that a stopped or failed measurement goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from typing import Any

from openai import APIStatusError, OpenAI

from dapa_merge.errors import UsageError
from dapa_merge.files import Record, cache_folder, held
from dapa_merge.measure.endpoint import Endpoint, Reply
from dapa_merge.measure.prompts.conversation import (
    ASSISTANT,
    USER,
    Conversation,
    Message,
    messages_of,
    opening_of,
)
from dapa_merge.progress import LOG, advance, duration
from dapa_merge.recipe.asking import Sampling

# As for local models: thinking is switched off where the template can do so, because only the answer is judged.
NO_THOUGHT = {"chat_template_kwargs": {"enable_thinking": False}}
# Kept answers that are older may be of another model under the same name.
MAX_AGE_SECONDS = 24 * 3600


# Makes vLLM go on with an assistant's last message; llama.cpp's server does of itself.
CONTINUED = {"add_generation_prompt": False, "continue_final_message": True}
# The same conversation with the end of that message, and without the beginning of another.
ENDED = {"add_generation_prompt": False, "continue_final_message": False}
# Twice as many of these words have twice as many tokens, and no model says all three in one.
WORDS = "the the the"


@dataclass(frozen=True)
class Continuation:
    """How a server is made to go on with the beginning of an answer.

    Attributes:
        body: Further keys of the request.
        repeats: Whether its answer begins with that beginning.
    """

    body: Mapping[str, Any]
    repeats: bool


@dataclass(frozen=True)
class Said:
    """A response; None and a reason if the request failed.

    Attributes:
        text: The response, or None.
        reason: Why the request failed.
        is_short: Whether the server's own limit cut the response off before it had the length that was asked for.
    """

    text: str | None
    reason: str | None = None
    is_short: bool = False


class Served(Endpoint[str, Said]):
    """A model that is served elsewhere.

    Attributes:
        num_failed: Number of requests that failed so far; a later run asks them again.
    """

    what, unit = "the served model", "prompts"
    # A model on a CPU may take minutes for the first long answer.
    first_seconds = 600.0
    quiet_seconds, max_quiet_seconds = 60.0, 1200.0

    def __init__(
        self,
        model: str,
        url: str,
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        concurrency: int = 8,
        say: Callable[[str], None] = LOG.warning,
    ) -> None:
        """Prepare requests; nothing is sent yet."""
        drawn = {"temperature": 0, "seed": 0} if sampling is None else asdict(sampling)
        super().__init__(
            model,
            url,
            say,
            {"max_tokens": max_new_tokens, **drawn, "extra_body": NO_THOUGHT},
            max_requests=None,
            concurrency=concurrency,
            timeout_seconds=600.0,
            max_retries=4,
        )
        self.num_failed = 0
        self._max_new_tokens = max_new_tokens
        self._is_kept = False
        identity = json.dumps([url, model, self._parameters], sort_keys=True)
        name = hashlib.sha256(identity.encode()).hexdigest()[:32]
        self._record = Record(cache_folder("served") / f"{name}.jsonl")
        # How answers are continued, or why they cannot be; None until it was tried.
        self._continuation: Continuation | str | None = None
        # Of an earlier measurement, by digests of the prompts.
        self._stored: dict[str, Said] = {}
        self._hold = ExitStack()

    def __enter__(self) -> Served:
        """Go on with the answers of an earlier measurement that was not completed."""
        try:
            self._record.path.parent.mkdir(parents=True, exist_ok=True)
            self._hold.enter_context(held(self._record.path.with_suffix(".lock"), "busy"))
        except (OSError, UsageError):
            # Another process measures the same model, or the folder cannot be written: nothing is kept.
            return self
        self._is_kept = True
        self._resume()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Forget the answers once a measurement is complete; keep them if it or any request failed."""
        if self._is_kept and kind is None and not self.num_failed:
            with suppress(OSError):
                self._record.path.unlink()
        elif self.num_failed:
            self._say("the same command asks again what failed, and goes on with the other answers")
        self._hold.close()

    def ask(self, prompts: Sequence[str]) -> list[str | None]:
        """Return the response to each prompt; None where the request failed.

        A thought that the server gives apart is put before the answer, in its tags.

        Raises:
            UsageError: If the endpoint rejects the key or the model, or gives no usable answer at all.
        """
        known = {prompt: self._known.get(prompt) or self._stored.get(_digest(prompt)) for prompt in prompts}
        asked = {prompt: found for prompt, found in known.items() if found is not None}
        to_ask = list(dict.fromkeys(prompt for prompt in prompts if prompt not in asked))
        advance(len(prompts) - len(to_ask), self.unit)
        if to_ask:
            asked |= self._ask_all(to_ask)
        if self.fault is not None:
            more = "; the same command goes on with the answers so far" if self._known or self._stored else ""
            raise UsageError(f"{self.fault}{more}")
        said = [asked.get(prompt) or self._not_asked() for prompt in prompts]
        if failed := [one.reason or "" for one in said if one.text is None]:
            self.num_failed += len(failed)
            # Those that differ in a number only, such as of tokens, are of one kind.
            kinds = Counter(map(_without_numbers, failed))
            first = {_without_numbers(reason): reason for reason in reversed(failed)}
            why = ", ".join(f"{first[kind]} ({number})" for kind, number in kinds.most_common())
            self._say(f"{len(failed)} of {len(said)} requests failed, and their prompts are undecided: {why}")
        if num_short := sum(one.is_short for one in said):
            self._say(
                f"{num_short} of {len(said)} answers were cut off before {self._max_new_tokens} tokens; give its "
                f"server a longer context"
            )
        return [one.text for one in said]

    def why_not_continued(self) -> str | None:
        """Why the server cannot be given the beginning of an answer; None if it is seen to go on with one.

        Raises:
            UsageError: If the endpoint rejects the key or the model, or does not answer.
        """
        if self._continuation is None:
            client = self._client(lambda _: None)
            try:
                self._continuation = self._find_continuation(client)
            except UsageError:
                raise
            except Exception as error:
                self._give_up(self._reason(error))
                raise UsageError(str(self.fault)) from None
            finally:
                client.close()
        return self._continuation if isinstance(self._continuation, str) else None

    def _find_continuation(self, client: OpenAI) -> Continuation | str:
        """How the server is made to go on with the beginning of an answer, or why it cannot be.

        It does if nothing follows the beginning, which shows in how many tokens it counts: no more than the beginning
        itself has, or fewer than with the end of an answer behind it.
        """
        if not (without := self._begun(client, "").num_prompt_tokens or 0):
            return "its server does not count the tokens of a conversation"
        why = "its server ends that, and begins a new one"
        try:
            begun, longer = (self._begun(client, words) for words in (WORDS, f"{WORDS} {WORDS}"))
            more = (longer.num_prompt_tokens or 0) - (begun.num_prompt_tokens or 0)
            # A server that leaves it out adds nothing either.
            if 0 < more >= (begun.num_prompt_tokens or 0) - without:
                return Continuation({}, begun.content.strip().startswith(WORDS))
        except APIStatusError as error:
            why = f"its server rejects that ({self._reason(error)})"
        with suppress(APIStatusError):
            begun, ended = (self._begun(client, WORDS, body) for body in (CONTINUED, ENDED))
            if (begun.num_prompt_tokens or 0) < (ended.num_prompt_tokens or 0):
                return Continuation(CONTINUED, begun.content.strip().startswith(WORDS))
        return why

    def _begun(self, client: OpenAI, opening: str, body: Mapping[str, Any] | None = None) -> Reply:
        """The reply of one token after the beginning of an answer."""
        prompt = Conversation([Message(USER, "Hello."), *([Message(ASSISTANT, opening)] if opening else [])])
        return self._complete(client, _sent(prompt), body=body, max_tokens=1)

    def _answer(self, client: OpenAI, item: str) -> Said:
        opening, continuation = opening_of(item), self._continuation
        if not opening:
            reply = self._complete(client, _sent(item))
            content = reply.content
        else:
            assert isinstance(continuation, Continuation), "ask why_not_continued first"
            reply = self._complete(client, _sent(item), body=continuation.body)
            content = reply.content if continuation.repeats else opening + reply.content
        if reply.thought:
            # The thought of an answer that was cut off inside it has no end.
            content = f"<think>{reply.thought}</think>{content}" if content else f"<think>{reply.thought}"
        return Said(content, is_short=reply.is_cut and 0 < (reply.num_tokens or 0) < self._max_new_tokens)

    def _unanswered(self, reason: str) -> Said:
        return Said(None, reason)

    def _fault_in(self, answer: Said) -> str | None:
        return answer.reason

    def _keep(self, item: str, answer: Said) -> None:
        # A full disk must not end a measurement.
        if self._is_kept:
            with suppress(OSError):
                self._record.append({"prompt": _digest(item), "text": answer.text})

    def _resume(self) -> None:
        path = self._record.path
        try:
            age = time.time() - path.stat().st_mtime
            lines = self._record.read() if age < MAX_AGE_SECONDS else []
        except OSError:
            lines = []
        if not lines:
            self._record.forget()
            return
        self._say(
            f"going on with {len(lines)} answers of a measurement that was not completed, the last one "
            f"{duration(max(age, 0))} ago; if another model has this name by now, delete {path}"
        )
        self._stored = {line["prompt"]: Said(line["text"]) for line in lines}


def _without_numbers(reason: str) -> str:
    return re.sub(r"\d+", "", reason)


def _digest(prompt: str) -> str:
    return hashlib.sha256(json.dumps(_messages(prompt)).encode()).hexdigest()


def _messages(prompt: str) -> tuple[Message, ...]:
    """The messages of a prompt, with the beginning of the answer."""
    opening = opening_of(prompt)
    return (*messages_of(prompt), *([Message(ASSISTANT, opening)] if opening else []))


def _sent(prompt: str) -> list[dict[str, str]]:
    # Lone surrogates cannot be sent.
    return [{"role": role, "content": content.encode(errors="replace").decode()} for role, content in _messages(prompt)]
