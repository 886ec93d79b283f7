"""How often, and after how long a wait, a request to an endpoint is tried again. Standard library only.

A server that is not there, or hangs, is soon given up; one that is busy (429, 5xx) is asked again after longer and
longer waits, or after its own Retry-After, until nothing was answered for a minute.
"""

from __future__ import annotations

import email.utils
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# Since the last answer; no request is tried again later than that.
PATIENCE_SECONDS = 60
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 8.0
# Attempts at a server that is not there, or does not answer in time.
FEW_ATTEMPTS = 2
_BUSY = (408, 409, 429)


@dataclass(frozen=True)
class Failure:
    """Why a request came to nothing.

    Attributes:
        reason: In a few words without a key.
        status: The HTTP status, if there was one.
        headers: What came with it.
    """

    reason: str
    status: int | None = None
    headers: Mapping[str, str] | None = None


class Patience:
    """Counts from the last answer."""

    def __init__(self, max_attempts: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_attempts = max_attempts
        self._clock = clock
        self._quiet_since = clock()

    def renew(self) -> None:
        """Something was answered, or is asked for the first time in a while."""
        self._quiet_since = self._clock()

    @property
    def is_over(self) -> bool:
        """Whether nothing was answered for too long."""
        return self._clock() - self._quiet_since >= PATIENCE_SECONDS

    def wait(self, failure: Failure, num_attempts: int) -> float | None:
        """Seconds to wait before the next attempt; None to give up."""
        if failure.status is not None and failure.status not in _BUSY and failure.status < 500:
            return None
        most = self._max_attempts if failure.status is not None else min(FEW_ATTEMPTS, self._max_attempts)
        if num_attempts >= most:
            return None
        asked_for = retry_after(failure.headers or {})
        backoff = min(FIRST_WAIT_SECONDS * 2 ** (num_attempts - 1), LONGEST_WAIT_SECONDS)
        # Spread out, so that requests that failed together do not come again together.
        seconds = asked_for if asked_for is not None else backoff * random.uniform(0.75, 1)
        return seconds if self._clock() + seconds - self._quiet_since <= PATIENCE_SECONDS else None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that an answer's headers ask to wait; None if they do not say."""
    for name, per_second in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            seconds = float(headers.get(name, "")) / per_second
        except ValueError:
            continue
        if seconds >= 0:
            return seconds if math.isfinite(seconds) else None
    date = email.utils.parsedate_tz(headers.get("retry-after", ""))
    return None if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())
