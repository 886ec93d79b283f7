"""When a request is tried again, by a clock of the test's own."""

from __future__ import annotations

import email.utils
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapa_merge.measure.judge import FEW_ATTEMPTS, PATIENCE_SECONDS, Failure, Patience, retry_after


def waits(failure: Failure, max_attempts: int = 5) -> list[float]:
    """The waits until it gives up; each attempt takes no time."""
    clock = [0.0]
    patience = Patience(max_attempts, lambda: clock[0])
    found: list[float] = []
    while (seconds := patience.wait(failure, len(found) + 1)) is not None:
        found.append(seconds)
        clock[0] += seconds
    return found


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_a_busy_server_is_asked_again_after_longer_and_longer_waits(status):
    found = waits(Failure("busy", status))
    assert len(found) == 4
    assert all(0.75 * bound <= seconds <= bound for seconds, bound in zip(found, (0.5, 1, 2, 4), strict=True))


@pytest.mark.parametrize("status", [200, 302, 400, 401, 404, 422])
def test_what_another_attempt_would_not_mend_is_not_tried_again(status):
    assert waits(Failure("wrong", status)) == []


def test_a_server_that_is_not_there_is_soon_given_up():
    assert len(waits(Failure("no connection"))) == FEW_ATTEMPTS - 1


@given(st.floats(0, 1000), st.integers(1, 1000))
def test_nobody_waits_longer_than_patience_lasts(seconds, max_attempts):
    assert sum(waits(Failure("busy", 429, {"retry-after": str(seconds or 1)}), max_attempts)) <= PATIENCE_SECONDS


def test_an_answer_renews_patience():
    clock = [0.0]
    patience = Patience(5, lambda: clock[0])
    clock[0] = PATIENCE_SECONDS
    assert patience.is_over
    assert patience.wait(Failure("busy", 500), 1) is None
    patience.renew()
    assert not patience.is_over
    assert patience.wait(Failure("busy", 500), 1) is not None


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None), ({"retry-after": "1.5"}, 1.5), ({"retry-after-ms": "5", "retry-after": "9"}, 0.005),
        ({"retry-after": "soon"}, None), ({"retry-after": "-1"}, None), ({"retry-after": "inf"}, None),
        ({"retry-after": "nan"}, None), ({"retry-after": email.utils.formatdate(0)}, 0),
    ],
)  # fmt: skip
def test_retry_after_is_read_in_each_of_its_forms(headers, seconds):
    assert retry_after(headers) == seconds


def test_retry_after_may_be_a_date():
    assert 50 < retry_after({"retry-after": email.utils.formatdate(time.time() + 60)}) <= 61
