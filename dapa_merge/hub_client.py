"""Asking the Hub through huggingface_hub: again where that helps, and with one sentence where it does not."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from dapa_merge.errors import DapaError, HubError, UsageError, one_line

T = TypeVar("T")

# Seconds before each further attempt; the Hub's rate limits are counted over five minutes, but rarely used up.
WAITS = (1.0, 2.0, 4.0, 8.0)
MAX_WAIT = 60.0
RETRIED = (429, 500, 502, 503, 504)
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


class Moved(HubError):
    """The branch has another commit than the one that was looked at."""


def api() -> Any:
    """huggingface_hub's client, for the endpoint and with the token that it finds itself."""
    from huggingface_hub import HfApi

    return HfApi(library_name="dapa-merge")


def require_token() -> None:
    """Make sure that there is a token: of the environment, of a login, or of a CI job by OIDC.

    Raises:
        HubError: If there is none, or the one of OIDC is not given.
    """
    if ask("get a token", _token) is None:
        raise HubError(f"there is no token for the Hub; {LOG_IN}")


def check_id(repository: str) -> str:
    """The id of a repository, as `namespace/name`.

    Raises:
        UsageError: If it is none.
    """
    if not is_id(repository):
        raise UsageError(f"{repository!r} is no id of a repository; write namespace/name")
    if "/" not in repository:
        raise UsageError(f"{repository!r} lacks its namespace; write namespace/name, as in you/{repository}")
    return repository


def is_id(text: str) -> bool:
    """Whether a text may be the id of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def ask(what: str, call: Callable[[], T], settle: Callable[[Exception], T | None] = lambda _: None) -> T:
    """What a function of huggingface_hub answers, asked again after faults that pass.

    Args:
        what: What is asked for, to go behind "cannot".
        call: Asks once; it must do no harm to ask again.
        settle: Called with each fault; what it gives, if it is not None, is the answer all the same.

    Raises:
        HubError: If the Hub says no, or does not answer.
    """
    for attempt, wait in enumerate((*WAITS, None)):
        try:
            return call()
        except DapaError:
            raise
        except Exception as error:
            if (answer := settle(error)) is not None:
                return answer
            if wait is None or not passes(error) or (attempt > 0 and _is_out_of_reach(error)):
                raise fault(what, error) from error
            time.sleep(max(wait, _asked_to_wait(error)))
    raise AssertionError("the last attempt returns or raises")


def find(repository: str, revision: str | None = None) -> Any:
    """What the Hub says of a repository that may not be there; None if it is not, or the token may not see it.

    Args:
        repository: Its id.
        revision: A branch, tag or commit; None for the default branch.

    Raises:
        HubError: If the token is not accepted, or the Hub does not answer.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    def call() -> Any:
        try:
            return api().model_info(repository, revision=revision)
        except RepositoryNotFoundError as error:
            if status_of(error) == 401 and _token() is not None:
                # Said of the token: it is not accepted, not even for what is public.
                raise HubError(f"the Hub does not accept the token; {LOG_IN}") from error
            return None

    return ask(f"look at {repository}", call)


def cause_of(error: Exception) -> Exception:
    """The fault itself, where huggingface_hub says only which file was sent when it came."""
    cause = error.__cause__
    return cause if type(error) is RuntimeError and isinstance(cause, Exception) else error


def passes(error: Exception) -> bool:
    """Whether the same question may be answered a little later."""
    error = cause_of(error)
    status = status_of(error)
    return status in RETRIED if status is not None else _is_of_network(error) and not _is_offline(error)


def status_of(error: Exception) -> int | None:
    """The HTTP status that an error came with."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def fault(what: str, error: Exception) -> HubError:
    """The sentence for a fault of huggingface_hub; never with the token in it."""
    from huggingface_hub.errors import RepositoryNotFoundError

    error = cause_of(error)
    status, said = status_of(error), _said(error)
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return HubError(f"cannot {what}: the Hub does not accept the token{said}; {LOG_IN}")
    if status == 403:
        return HubError(f"cannot {what}: the token may not do that{said}; use one that may")
    if isinstance(error, RepositoryNotFoundError):
        return HubError(f"cannot {what}: there is no such repository, or the token may not see it{said}")
    if status == 412:
        return Moved(f"cannot {what}: somebody else committed meanwhile{said}; look at it, and run the command again")
    if isinstance(error, ValueError) and "metadata" in str(error):
        # Of several lines, of which only the others say what.
        return HubError(f"cannot {what}: the Hub's rules refuse the card: {' '.join(str(error).split())[:400]}")
    if isinstance(error, (KeyError, TypeError, AttributeError, ValueError)) and status is None:
        return HubError(f"cannot {what}: the Hub's answer makes no sense ({_without_token(one_line(error))})")
    if passes(error):
        why = f"it answers {status}" if status else one_line(error)
        return HubError(f"cannot {what}: the Hub does not do it now ({_without_token(why)}); run the command again")
    return HubError(f"cannot {what}: {_without_token(one_line(error)) if status is None else f'{status}{said}'}")


def _said(error: Exception) -> str:
    message = str(getattr(error, "server_message", None) or "").strip().partition("\n")[0]
    return f" ({_without_token(message[:200])})" if message else ""


def _without_token(text: str) -> str:
    # No server should repeat it, and no library; but whoever does must not bring it into a log.
    try:
        token = _token()
    except Exception:
        return text
    return text.replace(token, "***") if token else text


def _token() -> str | None:
    from huggingface_hub import get_token

    token = get_token()
    return token if isinstance(token, str) else None


def _is_out_of_reach(error: Exception) -> bool:
    """Whether there is no connection at all, which seconds rarely mend."""
    return type(error).__name__ == "ConnectError"


def _is_offline(error: Exception) -> bool:
    """Whether the user told huggingface_hub not to ask."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    return isinstance(error, OfflineModeIsEnabled)


def _is_of_network(error: Exception) -> bool:
    """Whether the request had no answer at all; the HTTP library's name is huggingface_hub's own matter."""
    from huggingface_hub.errors import HfHubHTTPError

    of_http = HfHubHTTPError.__bases__[0]
    return isinstance(error, (of_http, ConnectionError, TimeoutError)) and status_of(error) is None


def _asked_to_wait(error: Exception) -> float:
    """The seconds that the answer asks to wait, at most a minute."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    value = str(headers.get("Retry-After", ""))
    if not value.isdecimal():
        # The Hub's own: how many requests are left, and the seconds until there are more.
        left = re.search(r"\bt=(\d+)", str(headers.get("RateLimit", "")))
        value = left.group(1) if left and status_of(error) == 429 else "0"
    return min(float(value), MAX_WAIT)
