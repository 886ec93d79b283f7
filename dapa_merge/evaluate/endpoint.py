"""An OpenAI-compatible chat endpoint: one question, one answer, through the official client.

Retries are ours (see `patience`), because the client's own would wait for minutes in silence. The key comes from
OPENAI_API_KEY when a connection is opened, and is kept in no object of ours.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from dapa_merge.errors import UsageError
from dapa_merge.evaluate.judge_options import BASE_URL, KEY, JudgeOptions, check_url, host_of, key_for
from dapa_merge.evaluate.patience import Failure, Patience, retry_after

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

# A ruling needs some 25; a judge that thinks before it answers gets the second limit.
ANSWER_TOKENS, THINKING_TOKENS = 64, 4096
CONNECT_SECONDS = 5
# How long an endpoint may take that never answered before: long enough to load a model, but not for each of many.
FIRST_SECONDS = 30
# Shorter waits before another attempt are not worth a word.
TOLD_SECONDS = 5


class Unanswered(Exception):
    """A request that came to nothing; says why, in a few words without a key."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


class CapReached(Unanswered):
    """A request that was not sent, because as many were as may be."""


class Endpoint:
    """A judge's endpoint; remembers which parameters it takes, and how many requests it got.

    Attributes:
        num_requests: Sent so far, retries too.
        answered: Whether it ever answered, so that key, model and parameters are right.
    """

    def __init__(self, options: JudgeOptions, say: Callable[[str], None] = lambda _: None) -> None:
        self.options = options
        self.num_requests = 0
        self.answered = False
        self._say = say
        self._patience = Patience(options.max_attempts)
        self._parameters: dict[str, Any] = {
            "temperature": 0,
            "max_tokens": ANSWER_TOKENS,
            "seed": 0,
            "response_format": {"type": "json_object"},
        }

    @property
    def gave_up(self) -> bool:
        """Whether nothing was answered for so long that nothing is tried again."""
        return self._patience.is_over

    @property
    def address(self) -> str:
        """Host and port, for people."""
        return host_of(self.options.url or os.environ.get(BASE_URL)) or "the default address"

    def check(self) -> None:
        """See, without a request, that there is all that is needed for one.

        Raises:
            UsageError: If openai is not installed, or there is neither a key nor an address, or one cannot be meant.
        """
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise UsageError("a judge needs the package openai; install dapa-merge[judge]") from error
        if self.options.url is None and os.environ.get(BASE_URL):
            check_url(os.environ[BASE_URL], BASE_URL)
        key_for(self.options.url)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[AsyncOpenAI]:
        """A client for the event loop that asks; its connections are closed at the end.

        Raises:
            UsageError: As `check`, or if the client cannot be made.
        """
        self.check()
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError, Timeout

        class NotSent(OpenAIError):
            """Of the client's own family, because only such an error is not taken for a lost connection."""

        async def count(_request: object) -> None:
            if self._is_spent():
                raise NotSent
            self.num_requests += 1

        self._patience.renew()
        timeout = Timeout(self.options.timeout_seconds, connect=CONNECT_SECONDS)
        try:
            client = AsyncOpenAI(
                api_key=key_for(self.options.url),
                base_url=self.options.url,
                timeout=timeout,
                max_retries=0,
                http_client=DefaultAsyncHttpxClient(event_hooks={"request": [count]}, timeout=timeout),
            )
        except Exception as error:
            # Whatever else of an address, or of a proxy's, the client does not take; its words may hold a password.
            raise UsageError(f"the judge at {self.address} cannot be asked: {type(error).__name__}") from None
        async with client:
            yield client

    async def ask(self, client: AsyncOpenAI, messages: list[dict[str, str]]) -> str:
        """The endpoint's answer to a conversation.

        Parameters that the endpoint rejects, as far as it names them, else all, are left out from then on; that is
        tried only until it has answered once, because later a rejection is about the conversation.

        Raises:
            Unanswered: If there is none.
            UsageError: If the endpoint refuses key or model before it ever answered.
        """
        from openai import APIStatusError

        parameters, num_attempts = self._parameters, 0
        while True:
            try:
                num_attempts += 1
                answer, cut_off = await self._complete(client, messages, parameters)
            except APIStatusError as error:
                if not self.answered and error.status_code in (401, 403, 404):
                    raise UsageError(self._refusal(error)) from None
                fewer = _without_rejected(parameters, str(error))
                if not self.answered and error.status_code in (400, 422) and fewer != parameters:
                    parameters, num_attempts = fewer, 0
                    continue
                await self._wait(Failure(_reason(error), error.status_code, error.response.headers), num_attempts)
                continue
            except Unanswered as error:
                if isinstance(error, CapReached):
                    raise
                await self._wait(error.failure, num_attempts)
                continue
            self.answered, self._parameters = True, parameters
            self._patience.renew()
            if not cut_off or THINKING_TOKENS in parameters.values():
                return answer
            parameters = {key: THINKING_TOKENS if "tokens" in key else value for key, value in parameters.items()}

    async def _wait(self, failure: Failure, num_attempts: int) -> None:
        """Wait before another attempt, or raise `Unanswered`."""
        import anyio

        seconds = self._patience.wait(failure, num_attempts)
        if seconds is None:
            asked_for = retry_after(failure.headers or {})
            more = f", with a Retry-After of {asked_for:.0f} seconds" if asked_for and asked_for >= 1 else ""
            raise Unanswered(Failure(failure.reason + more))
        if seconds >= TOLD_SECONDS:
            self._say(f"{failure.reason}; asking again in {seconds:.0f} seconds")
        await anyio.sleep(seconds)

    async def _complete(
        self, client: AsyncOpenAI, messages: list[dict[str, str]], parameters: dict[str, Any]
    ) -> tuple[str, bool]:
        """An answer, and whether the limit of tokens cut it off in a thought."""
        import anyio
        from openai import APIConnectionError, APIError, APIStatusError, APITimeoutError, OpenAIError

        seconds = self.options.timeout_seconds if self.answered else min(FIRST_SECONDS, self.options.timeout_seconds)
        try:
            # The client's own limits are for each read: a server that sends a byte now and then would never end.
            with anyio.fail_after(seconds):
                completion: Any = await client.chat.completions.create(
                    model=self.options.model,
                    messages=messages,  # type: ignore[arg-type]
                    **parameters,
                )
        except APIStatusError:
            raise
        except (APITimeoutError, TimeoutError) as error:
            if "Connect" in type(error.__cause__).__name__:
                raise Unanswered(Failure("no connection")) from None
            raise Unanswered(Failure(f"no answer within {seconds:g} seconds")) from None
        except APIConnectionError as error:
            raise Unanswered(Failure(_why_lost(error.__cause__))) from None
        except Exception as error:
            # The client's own faults are of narrower classes.
            if isinstance(error, OpenAIError) and not isinstance(error, APIError):
                raise CapReached(Failure(f"the limit of {self.options.max_requests} requests is reached")) from None
            raise Unanswered(Failure(f"the answer is no chat completion ({type(error).__name__})", 200)) from None
        try:
            choice = completion.choices[0]
            content, is_long = choice.message.content or "", choice.finish_reason == "length"
        except (AttributeError, IndexError, TypeError):
            content = None
        if not isinstance(content, str):
            raise Unanswered(Failure("the answer is no chat completion", 200))
        thinks = not content.strip() or (content.lstrip().startswith("<think") and "</think" not in content)
        return content, is_long and thinks

    def _is_spent(self) -> bool:
        return self.options.max_requests is not None and self.num_requests >= self.options.max_requests

    def _refusal(self, error: APIStatusError) -> str:
        where = f"the judge at {self.address}"
        if error.status_code == 404:
            return (
                f"{where} answered 404: it has no model {self.options.model!r}, or its address lacks a path such as "
                "/v1; correct the judge's model or url"
            )
        return f"{where} answered {error.status_code}: it does not accept the key; set {KEY} to one that it accepts"


def _without_rejected(parameters: dict[str, Any], message: str) -> dict[str, Any]:
    rejected = [name for name in parameters if name in message] or list(parameters)
    fewer = {name: value for name, value in parameters.items() if name not in rejected}
    if "max_tokens" in rejected:
        fewer["max_completion_tokens"] = parameters["max_tokens"]
    return fewer


def _reason(error: APIStatusError) -> str:
    """Why a request was turned down; what the endpoint says itself only where it cannot speak of the key."""
    if error.status_code in (400, 422):
        said = " ".join(str(error).split()).replace(os.environ.get(KEY, "").strip() or "\0", "***")
        return f"HTTP {error.status_code}: {said[:200]}"
    return f"HTTP {error.status_code}"


def _why_lost(cause: BaseException | None) -> str:
    """Why there was no answer at all; the cause's own words may hold addresses."""
    kind = type(cause).__name__
    if "Redirect" in kind:
        return "it redirects without end"
    return "no connection" if "Connect" in kind else "the connection was lost"
