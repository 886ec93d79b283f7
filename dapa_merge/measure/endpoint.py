"""Asks a language model behind an OpenAI-compatible endpoint, many requests at once.

The client retries transient failures (408, 409, 429, 5xx, a lost connection): 0.5 to 8 seconds apart, or as Retry-After
asks, up to two minutes. An endpoint that gives no usable answers gets a fault and no more requests. The key is read
from OPENAI_API_KEY whenever a client is made and is never stored.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.parse import urlsplit

from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAI, OpenAIError, Timeout
from openai import DefaultHttpxClient as HttpClient

from dapa_merge.errors import UsageError
from dapa_merge.progress import advance
from dapa_merge.recipe.options import check_url

KEY, BASE_URL = "OPENAI_API_KEY", "OPENAI_BASE_URL"
# Failures in a row, after retries, that make an endpoint dead; the second number if it never answered.
MAX_FAILURES, MAX_FIRST_FAILURES = 8, 3
CONNECT_SECONDS = 5.0
# The names of the parameter that limits an answer's length in tokens, old and new.
LENGTHS = ("max_tokens", "max_completion_tokens")

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class NotSent(OpenAIError):
    """A request was held back; as a subclass of the client's own error, it is neither retried nor wrapped."""


class Reply(NamedTuple):
    """An endpoint's reply.

    Attributes:
        content: The text.
        thought: What it gave apart as a thought.
        is_cut: Whether a limit cut it off: that of the request, or the endpoint's own.
        num_tokens: Its length in tokens; None if the endpoint does not count them.
        num_prompt_tokens: Tokens of the conversation with its template; None if the endpoint does not count them.
    """

    content: str
    thought: str
    is_cut: bool
    num_tokens: int | None = None
    num_prompt_tokens: int | None = None


class Endpoint(ABC, Generic[Item, Answer]):
    """Turns items into answers by asking a model; subclasses say what is asked, and what a usable answer is.

    `fault` says why the endpoint was given up, or is None; `is_capped` is true if the request limit left an item out.
    """

    # The endpoint's part in messages, and what its answers count as in progress.
    what: str
    unit: str
    # The timeout until the first answer, long enough to load a model.
    first_seconds = 30.0
    # Interval of warnings about a silence, and its limit: a server that drips bytes never reaches the read timeout.
    quiet_seconds, max_quiet_seconds = 10.0, 300.0

    def __init__(
        self,
        model: str,
        url: str | None,
        say: Callable[[str], None],
        parameters: Mapping[str, Any],
        *,
        max_requests: int | None,
        concurrency: int,
        timeout_seconds: float,
        max_retries: int,
    ) -> None:
        """Prepare requests; nothing is sent yet.

        Args:
            model: Its name at the endpoint.
            url: The endpoint; None for OPENAI_BASE_URL, or else the client's own.
            say: Receives warnings, such as about long waits.
            parameters: Of every request; those that the endpoint rejects before its first answer are left out.
            max_requests: Most HTTP requests to send, including retries and redirects; None for no limit.
            concurrency: Most requests under way at once.
            timeout_seconds: Of a request.
            max_retries: Of a request.
        """
        self.model, self.url, self.max_requests = model, url, max_requests
        self.fault: str | None = None
        self.is_capped = False
        self.num_requests = 0
        self._say: Callable[[str], None] = lambda message: say(f"{self.what} {model}: {message}")
        self._concurrency, self._timeout_seconds, self._max_retries = concurrency, timeout_seconds, max_retries
        self._parameters: Mapping[str, Any] = dict(parameters)
        self._known: dict[Item, Answer] = {}
        # Answered: key, model and parameters are accepted. Usable: an answer was also valid.
        self._has_answered = self._is_usable = False
        self._is_name_told = False
        self._num_failures = 0
        self._lock = threading.RLock()

    @abstractmethod
    def _answer(self, client: OpenAI, item: Item) -> Answer:
        """Ask about an item; runs in several threads at once."""

    @abstractmethod
    def _unanswered(self, reason: str) -> Answer:
        """The answer that stands for a request that failed or was not sent."""

    @abstractmethod
    def _fault_in(self, answer: Answer) -> str | None:
        """Why an answer is not usable; None if it is."""

    def prepare(self) -> None:
        """Raise `UsageError` if key or address are missing or invalid; clear the fault, which may be fixed by now."""
        _key_for(self.what, self.url)
        self.fault, self._num_failures = None, 0

    def _ask_all(self, items: Sequence[Item]) -> dict[Item, Answer]:
        """Ask in parallel threads, up to the concurrency limit."""
        waiting, is_over = iter(items), threading.Event()
        finished: SimpleQueue[tuple[Item, Answer | Exception]] = SimpleQueue()

        def count(_request: object) -> None:
            with self._lock:
                if is_over.is_set():
                    raise NotSent
                if self.max_requests is not None and self.num_requests >= self.max_requests:
                    limit = f"the limit of {self.max_requests} requests is reached"
                    if not self.is_capped:
                        self._say(f"the rest is undecided: {limit}")
                    self.is_capped = True
                    raise NotSent(limit)
                self.num_requests += 1

        def work() -> None:
            while not is_over.is_set():
                with self._lock:
                    item = next(waiting, None)
                if item is None:
                    return
                try:
                    finished.put((item, self._ask(client, item)))
                except Exception as error:
                    is_over.set()
                    finished.put((item, error))

        client = self._client(count)
        answers: dict[Item, Answer] = {}
        num_threads, quiet = 0, 0.0
        try:
            while len(answers) < len(items):
                # One until the first answer: a wrong key or parameter costs one request. Daemons, because Python waits
                # for an executor's threads at exit, but Ctrl-C must end it at once.
                while num_threads < min(self._concurrency if self._has_answered else 1, len(items)):
                    threading.Thread(target=work, daemon=True).start()
                    num_threads += 1
                try:
                    item, found = finished.get(timeout=self.quiet_seconds)
                except Empty:
                    quiet += self.quiet_seconds
                    self._say(f"no answer for {quiet:g} seconds; waiting for {len(items) - len(answers)}")
                    if quiet >= self.max_quiet_seconds:
                        self._give_up(f"no answer for {quiet:g} seconds")
                        return answers
                    continue
                quiet = 0.0
                if isinstance(found, Exception):
                    raise found
                answers[item] = found
                advance(1, self.unit)
        finally:
            is_over.set()
            client.close()
        if self._num_failures >= max(len(items), MAX_FIRST_FAILURES) or not self._is_usable:
            self._give_up(self._fault_in(answers[items[-1]]))
        return answers

    def _ask(self, client: OpenAI, item: Item) -> Answer:
        if self.fault is not None:
            return self._not_asked()
        failure: Exception | None = None
        try:
            answer = self._answer(client, item)
        except UsageError:
            raise
        except NotSent as error:
            return self._unanswered(str(error))
        except Exception as error:
            answer, failure = self._unanswered(self._reason(error)), error
        with self._lock:
            if self._fault_in(answer) is None:
                self._is_usable, self._num_failures = True, 0
            if failure is None and self._is_usable:
                # An endpoint with valid answers has only slipped once; do not pay for the item again.
                self._known[item] = answer
                self._keep(item, answer)
                return answer
            self._num_failures += 1
            is_unreachable = isinstance(failure, APIConnectionError) and not self._has_answered
            if is_unreachable or self._num_failures >= (MAX_FAILURES if self._has_answered else MAX_FIRST_FAILURES):
                self._give_up(self._fault_in(answer))
        return answer

    def _not_asked(self) -> Answer:
        return self._unanswered(f"not asked, because {self.what} gave no usable answer before")

    def _keep(self, item: Item, answer: Answer) -> None:
        """Called with each answer that is not asked for again, by one thread at a time."""

    def _complete(
        self,
        client: OpenAI,
        messages: Sequence[Mapping[str, str]],
        *,
        body: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
    ) -> Reply:
        """Return the reply to a conversation, without parameters that the endpoint rejects.

        Drops the parameters that the rejection names, or else all; only until the first answer, because a later
        rejection is about the conversation.

        Args:
            client: The client to ask with.
            messages: The conversation.
            body: Further keys of this request alone.
            max_tokens: Length of this reply alone.
        """
        seconds = self._timeout_seconds if self._has_answered else min(self.first_seconds, self._timeout_seconds)
        request: dict[str, Any] = {"model": self.model, "messages": messages}
        request["timeout"] = Timeout(seconds, connect=CONNECT_SECONDS)
        parameters = self._parameters
        while True:
            try:
                completion: Any = client.chat.completions.create(**request, **_of_one(parameters, body, max_tokens))
            except APIStatusError as error:
                self._check_access(error)
                rejected = [name for name in parameters if _is_named(name, parameters[name], _said(error))]
                rejected = rejected or list(parameters)
                if self._has_answered or not rejected or error.status_code not in (400, 422):
                    raise
                limit = {"max_completion_tokens": parameters["max_tokens"]} if "max_tokens" in rejected else {}
                parameters = {key: value for key, value in parameters.items() if key not in rejected} | limit
                continue
            choice = completion.choices[0]
            thought = getattr(choice.message, "reasoning_content", None) or getattr(choice.message, "reasoning", None)
            self._has_answered, self._parameters = True, parameters
            self._tell_name(completion)
            return Reply(
                choice.message.content or "",
                str(thought or ""),
                choice.finish_reason == "length",
                getattr(completion.usage, "completion_tokens", None),
                getattr(completion.usage, "prompt_tokens", None),
            )

    def _tell_name(self, completion: Any) -> None:
        """Warn once of an answer under another name: llama.cpp's server answers with what it has, whatever is named."""
        name = getattr(completion, "model", None)
        with self._lock:
            if self._is_name_told or not isinstance(name, str) or _is_of(name, self.model):
                return
            self._is_name_told = True
        self._say(f"its server answers as {name[:100]!r}; if that is another model, correct the name")

    def _client(self, count: Callable[[object], None]) -> OpenAI:
        key, http = _key_for(self.what, self.url), HttpClient(event_hooks={"request": [count]})
        try:
            return OpenAI(api_key=key, base_url=self.url, max_retries=self._max_retries, http_client=http)
        except Exception as error:
            # Any other fault in the address, or a proxy's; the client's message may contain a password.
            raise UsageError(f"{self.what} at {self._address} cannot be asked: {type(error).__name__}") from None

    @property
    def _address(self) -> str:
        """Host and port, without user and password."""
        return urlsplit(self.url or os.environ.get(BASE_URL, "")).netloc.rpartition("@")[2] or "the default address"

    def _give_up(self, reason: str | None) -> None:
        where = f"{self.what} {self.model} at {self._address} gives no usable answer"
        self.fault = self.fault or f"{where}: {reason}; check that it runs and that its url and model are right"

    def _check_access(self, error: APIStatusError) -> None:
        """Raise `UsageError` if key or model are rejected before the first answer."""
        key = f"does not accept the key; set {KEY} to one that it accepts"
        path = f"has no model {self.model!r}, or its url lacks a path such as /v1; correct its model or url"
        why = {401: key, 403: key, 404: path}.get(error.status_code)
        if why and not self._has_answered:
            raise UsageError(f"{self.what} at {self._address} answered {error.status_code}: it {why}") from None

    def _reason(self, error: Exception) -> str:
        """Describe why a request failed, without a key or an address."""
        if isinstance(error, APIStatusError):
            said = _said(error).replace(os.environ.get(KEY, "").strip() or "\0", "***")
            wait = error.response.headers.get("retry-after", "")
            more = f": {said[:200]}" if error.status_code in (400, 422, 503) else ""
            return f"HTTP {error.status_code}{more}" + (f", asking to wait {wait} seconds" if wait.isdecimal() else "")
        if not isinstance(error, APIConnectionError):
            return f"the answer is not a chat completion ({type(error).__name__})"
        # The message may contain addresses; the class name is enough.
        cause = type(error.__cause__).__name__
        if "Redirect" in cause or "Connect" in cause:
            return "it redirects without end" if "Redirect" in cause else "no connection"
        return "no answer in time" if isinstance(error, APITimeoutError) else "the connection was lost"


def _said(error: APIStatusError) -> str:
    """The reason that a server gives for rejecting a request, in one line."""
    told = error.body.get("message") if isinstance(error.body, Mapping) else None
    # Older versions of the client quote the whole body.
    text = told if isinstance(told, str) else str(error).removeprefix(f"Error code: {error.status_code} - ")
    return " ".join(text.split())


def _of_one(parameters: Mapping[str, Any], body: Mapping[str, Any] | None, max_tokens: int | None) -> dict[str, Any]:
    """The parameters of a request with another length and further keys of its body."""
    changed: dict[str, Any] = {
        key: max_tokens if max_tokens and key in LENGTHS else value for key, value in parameters.items()
    }
    return changed if not body else {**changed, "extra_body": {**changed.get("extra_body", {}), **body}}


def _is_of(name: str, model: str) -> bool:
    """Whether a name is the model's, perhaps without its owner or folder, or with a version behind it."""
    told, asked = (one.lower().rpartition("/")[2] for one in (name, model))
    return told.startswith(asked)


def _is_named(name: str, value: object, text: str) -> bool:
    """Whether a rejection names a parameter, or a key of one that holds the server's own parameters."""
    return name in text or (isinstance(value, Mapping) and any(key in text for key in value))


def _key_for(what: str, url: str | None) -> str:
    """The key in the environment, or a placeholder: local servers do not need a key, but the client does."""
    if url is None and os.environ.get(BASE_URL):
        check_url(os.environ[BASE_URL], BASE_URL)
    key = os.environ.get(KEY, "").strip()
    if not key and url is None and BASE_URL not in os.environ:
        raise UsageError(f"{what} has no key and no address: set {KEY}, or name its url")
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"{KEY} has a character that is not allowed in a key; set it again")
    return key or "none"
