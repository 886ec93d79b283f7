"""What goes wrong in a stand-in for the Hub, by rules that a test makes."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Fault:
    """What happens to requests of a kind.

    Attributes:
        method: A regular expression for all of the method.
        path: A regular expression for some of the path and query, as sent.
        times: How many requests it still happens to; None for all.
        skip: How many requests pass before it begins.
        status: The answer, in place of the proper one.
        headers: What else stands in that answer.
        message: What it says.
        cut_request_after: The connection breaks when so many bytes of the body were read, or all: nothing is done.
        cut_answer_after: The connection breaks when so many bytes of the answer's body were sent.
        lose_answer: All is done, and the connection breaks without an answer.
        delay_seconds: How long every begun 64 KiB of the body and of the answer take.
        call: Called before anything else, without arguments. What it asks of this hub is not subject to this rule.
        hits: How many requests it happened to.
    """

    method: str = ".*"
    path: str = ""
    times: int | None = None
    skip: int = 0
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "told to fail"
    cut_request_after: int | None = None
    cut_answer_after: int | None = None
    lose_answer: bool = False
    delay_seconds: float = 0.0
    call: Callable[[], object] | None = None
    hits: int = 0
    is_calling: bool = False

    def matches(self, method: str, path: str) -> bool:
        return not self.is_calling and bool(re.fullmatch(self.method, method) and re.search(self.path, path))


NO_FAULT = Fault()


class Faults:
    """The rules, of which the first that matches a request holds for it."""

    def __init__(self):
        self._rules: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, **rule: object) -> Fault:
        """Add a rule; the arguments are those of `Fault`."""
        fault = Fault(**rule)
        with self._lock:
            self._rules.append(fault)
        return fault

    def clear(self) -> None:
        with self._lock:
            self._rules.clear()

    def take(self, method: str, path: str) -> Fault:
        """The rule that holds for a request, counted down."""
        with self._lock:
            for fault in self._rules:
                if fault.times == 0 or not fault.matches(method, path):
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times = fault.times and fault.times - 1
                fault.hits += 1
                fault.is_calling = fault.call is not None
                return fault
        return NO_FAULT


def refusal_headers(fault: Fault) -> dict[str, str]:
    """What the Hub sends with a refusal: when to come again."""
    waits = {"Retry-After": "0"} if fault.status in (429, 503) else {}
    if fault.status == 429:
        waits |= {"RateLimit": '"api";r=0;t=0', "RateLimit-Policy": '"fixed window";"api";q=1000;w=300'}
    return {**waits, **fault.headers}
