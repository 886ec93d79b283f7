"""Requests to the Hub, repeated where that helps; the one place that turns the Hub's errors into messages.

huggingface_hub loads its client at the first request: importing this module costs a local repair nothing.
"""

from __future__ import annotations

import errno
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants

from dapa_merge.errors import DapaError, HubError, UsageError, one_line
from dapa_merge.files import nearest_here

T = TypeVar("T")

# Seconds before each further attempt; the Hub's rate limits cover five minutes, but are rarely used up.
WAITS = (1.0, 2.0, 4.0, 8.0)
MAX_WAIT = 60.0
RETRIED = (429, 500, 502, 503, 504)
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
REJECTED = f"the Hub does not accept the token, which may have expired or been revoked; make a new one, and {LOG_IN}"
# Answers that stay the same however often a command is run, with what was found and what to do.
REFUSALS = {
    400: ("the Hub does not understand the request", "correct what it names"),
    402: ("the account has to pay for this", "settle that with the Hub, or use another account"),
    404: ("it is not there", "check the name and the revision"),
    409: ("the Hub has something else of that name already, or it changed meanwhile", "look at it, and choose another"),
    410: ("the Hub has removed it", "name another"),
    413: ("it is larger than the Hub accepts", "publish it in smaller files"),
    422: ("the Hub does not accept the content", "correct what it names"),
}
# How the Hub says that an account's or an organization's storage is used up, mostly with 403.
_FULL = re.compile(r"(?i)storage (limit|quota)|quota exceeded|out of storage|storage is full")


class NoAnswer(HubError):
    """The Hub does not answer now; a cached copy may be used instead."""


class Moved(HubError):
    """The branch moved since it was read."""


def api() -> huggingface_hub.HfApi:
    """huggingface_hub's client, with its default endpoint and token."""
    return huggingface_hub.HfApi(library_name="dapa-merge")


def hub_errors() -> Any:
    """huggingface_hub's exceptions; their module imports an HTTP client."""
    from huggingface_hub import errors

    return errors


def hub_utils() -> Any:
    """huggingface_hub's further functions; their package imports an HTTP client."""
    from huggingface_hub import utils

    return utils


def require_token() -> None:
    """Check that there is a token: from the environment, a login, or a CI job's OIDC.

    Raises:
        HubError: If no token is found, or OIDC does not yield one.
    """
    if ask("get a token", huggingface_hub.get_token) is None:
        raise HubError(f"no token for the Hub was found; {LOG_IN}")


def check_id(repository: str) -> str:
    """Check that a repository's id has the form `namespace/name`, and return it.

    Raises:
        UsageError: If it has another form.
    """
    if not is_id(repository):
        raise UsageError(f"{repository!r} is not a repository id; write namespace/name")
    if "/" not in repository:
        raise UsageError(f"{repository!r} lacks its namespace; write namespace/name, as in you/{repository}")
    return repository


def is_id(text: str) -> bool:
    """Whether a text may be the id of a repository."""
    try:
        hub_utils().validate_repo_id(text)
    except hub_errors().HFValidationError:
        return False
    return True


class Absent(str):
    """A model that is not a folder here, in place of what is asked: errors then tell first what is near it."""


def ask(what: str, call: Callable[[], T], settle: Callable[[Exception], T | None] = lambda _: None) -> T:
    """Call a function of huggingface_hub, and repeat the call after temporary errors.

    Args:
        what: The request, worded to follow "cannot", or `Absent`.
        call: Makes one request, and must be safe to repeat.
        settle: Called with each error; if it returns a value other than None, that is the answer.

    Raises:
        HubError: If the Hub refuses, or does not answer.
    """
    for attempt, wait in enumerate((*WAITS, None)):
        try:
            return call()
        except DapaError:
            raise
        except Exception as error:
            if (answer := settle(error)) is not None:
                return answer
            # Waiting for seconds rarely restores a missing connection.
            if wait is None or not passes(error) or (attempt > 0 and type(error).__name__ == "ConnectError"):
                raise fault(what, error) from error
            time.sleep(max(wait, _asked_to_wait(error)))
    raise AssertionError("the last attempt returns or raises")


@contextmanager
def asking(what: str) -> Iterator[None]:
    """Turn every error in the block, which must only call the Hub, into a `HubError`.

    Errors of any class, because those of huggingface_hub and its HTTP library have none in common.
    """
    try:
        yield
    except DapaError:
        raise
    except Exception as error:
        raise fault(what, error) from error


def find(repository: str, revision: str | None = None) -> Any:
    """Return the Hub's `ModelInfo` of a repository; None if it does not exist, or the token may not see it.

    Raises:
        HubError: If the token is not accepted, or the Hub does not answer.
    """

    def call() -> Any:
        try:
            return api().model_info(repository, revision=revision)
        except hub_errors().RepositoryNotFoundError as error:
            if _is_rejected(error):
                raise HubError(REJECTED) from error
            return None

    return ask(f"look at {repository}", call)


def download(repository: str, name: str, commit: str) -> Path:
    """Fetch one file of a repository into huggingface_hub's cache; returns its path there."""
    fetch = partial(huggingface_hub.hf_hub_download, repository, name, revision=commit)
    return Path(ask(f"get {name} of {repository}", fetch))


def fault(what: str, error: BaseException) -> HubError:
    """Return the error to raise: what failed, and the reason; it never contains the token."""
    kind, why = _explained(cause_of(error))
    is_absent = isinstance(what, Absent)
    failed = f"{no_folder(what)}, and it cannot be fetched from the Hub" if is_absent else f"cannot {what}"
    return kind(f"{failed}: {why}")


def no_folder(place: str) -> str:
    """The beginning of an error about a model that is not a folder, with what may have been meant."""
    return f"there is no folder {place!r:.200} here{nearest_here(place, cached_models(), is_folder=True)}"


def cached_models() -> list[str]:
    """The ids of models of which huggingface_hub has cached something."""
    with suppress(OSError):
        names = [name.removeprefix("models--") for name in os.listdir(constants.HF_HUB_CACHE) if "models--" in name]
        return sorted(name.replace("--", "/", 1) for name in names)
    return []


def _explained(error: BaseException) -> tuple[type[HubError], str]:
    hub, status, said, summary = hub_errors(), status_of(error), _said(error), _without_token(one_line(error))
    if isinstance(error, DapaError):
        return HubError, str(error)
    if isinstance(error, hub.GatedRepoError):
        return HubError, f"it is gated; accept its terms{_page_of(error)}, and {LOG_IN}"
    if status == 401 and (_is_rejected(error) or not isinstance(error, hub.RepositoryNotFoundError)):
        return HubError, REJECTED.replace(";", f"{said};", 1)
    if isinstance(error, hub.RepositoryNotFoundError):
        return HubError, f"there is no such repository, or the token may not see it{said}; check the name, or {LOG_IN}"
    if isinstance(error, hub.RevisionNotFoundError):
        return HubError, f"there is no such revision{said}; name a branch, tag or commit"
    if _FULL.search(said):
        return HubError, f"the storage on the Hub is used up{said}; delete what is not needed there, or get more"
    if status == 403 and not _is_of_hub(error):
        return HubError, f"the link for the transfer has expired{said}; run the command again, which gets a new one"
    if status == 403:
        return HubError, f"the token may not do that{said}; give it that right in the Hub's settings, or use another"
    if status == 412:
        return Moved, f"somebody else committed meanwhile{said}; look at it, and run the command again"
    if isinstance(error, ValueError) and "metadata" in str(error):
        # The reason follows in further lines.
        return HubError, f"the Hub's rules refuse the card: {_without_token(' '.join(str(error).split()))[:400]}"
    if isinstance(error, hub.OfflineModeIsEnabled):
        return NoAnswer, "HF_HUB_OFFLINE is set; unset it"
    if status == 429:
        return (
            NoAnswer,
            f"the Hub had too many requests (it answers 429{said}); {_pause(error)}, then run the command again",
        )
    if status in RETRIED:
        return NoAnswer, f"the Hub is not available now (it answers {status}{said}); run the command again"
    if _is_of_network(error):
        return NoAnswer, f"the Hub is out of reach ({summary}); check the network, and run the command again"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return HubError, f"the disk with huggingface_hub's cache is full ({summary}); make room, or set HF_HOME"
    if status in REFUSALS:
        what, advice = REFUSALS[status]
        return HubError, f"{what} (it answers {status}{said}); {advice}"
    if isinstance(error, (KeyError, TypeError, AttributeError, ValueError)) and status is None:
        return HubError, f"the Hub's answer makes no sense ({summary})"
    return HubError, summary if status is None else f"it answers {status}{said}"


def _page_of(error: Any) -> str:
    folder = "" if error.repo_type in (None, "model") else f"{error.repo_type}s/"
    return f" at {constants.ENDPOINT}/{folder}{error.repo_id}" if error.repo_id else ""


def _is_rejected(error: BaseException) -> bool:
    """Whether there is a token, and the Hub rejects it: then it denies that public repositories exist, too."""
    try:
        return status_of(error) == 401 and huggingface_hub.get_token() is not None
    except Exception:
        return False


def _is_of_hub(error: BaseException) -> bool:
    """Whether the Hub itself answered, rather than the storage that it sent the client to."""
    # The HTTP library raises RuntimeError if there was no request.
    with suppress(RuntimeError, AttributeError):
        return urlsplit(str(error.response.request.url)).netloc in ("", urlsplit(constants.ENDPOINT).netloc)  # type: ignore[attr-defined]
    return True


def _pause(error: BaseException) -> str:
    seconds = _asked_to_wait(error)
    return f"wait {math.ceil(seconds)} seconds" if seconds else "wait five minutes"


def _said(error: BaseException) -> str:
    message = str(getattr(error, "server_message", None) or "").strip().partition("\n")[0]
    return f" ({_without_token(message[:200])})" if message else ""


def _without_token(text: str) -> str:
    # No server or library should repeat the token, but if one does, it must not reach a log.
    try:
        token = huggingface_hub.get_token()
    except Exception:
        return text
    return text.replace(token, "***") if token else text


def cause_of(error: BaseException) -> BaseException:
    """The underlying error, where huggingface_hub wraps it in an error about a file."""
    wraps = type(error) is RuntimeError or isinstance(error, hub_errors().LocalEntryNotFoundError)
    return error.__cause__ if wraps and isinstance(error.__cause__, Exception) else error


def hub_cause(error: BaseException) -> BaseException | None:
    """The Hub's error among an error and its causes; None for other errors, such as those of local files."""
    hub = hub_errors()
    cause: BaseException | None = error
    while cause is not None:
        known = isinstance(cause, (hub.HfHubHTTPError, hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError))
        # datasets raises this one without its cause.
        if known or _is_of_network(cause) or type(cause).__name__ == "DatasetNotFoundError":
            return cause
        cause = cause.__cause__
    return None


def passes(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    error = cause_of(error)
    status = status_of(error)
    return status in RETRIED if status is not None else _is_of_network(error)


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an error, if any."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_of_network(error: BaseException) -> bool:
    """Whether the request was sent but got no answer at all."""
    hub = hub_errors()
    # The HTTP library depends on the version of huggingface_hub.
    of_http = isinstance(error, hub.HfHubHTTPError.__bases__[0]) or "http" in type(error).__module__
    is_unanswered = of_http or isinstance(error, (ConnectionError, TimeoutError))
    return is_unanswered and status_of(error) is None and not isinstance(error, hub.OfflineModeIsEnabled)


def _asked_to_wait(error: BaseException) -> float:
    """Seconds to wait according to the answer's headers, at most a minute."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    value = str(headers.get("Retry-After", ""))
    if not value.isdecimal():
        # The Hub's own header: requests left, and the seconds until there are more.
        left = re.search(r"\bt=(\d+)", str(headers.get("RateLimit", "")))
        value = left.group(1) if left and status_of(error) == 429 else "0"
    return min(float(value), MAX_WAIT)
