"""Ranges of bytes of files on the Hub, by HTTP (RFC 9110, section 14), continued where a connection broke off.

URLs, headers, waiting and the client are huggingface_hub's, so that tokens, mirrors and proxies work as they do there.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

from dapa_merge import __version__
from dapa_merge.errors import HubError, one_line

# How often in a row a request may bring nothing before the download is given up.
MAX_FAILURES = 6
MAX_WAIT_SECONDS = 8.0
TIMEOUT_SECONDS = 60.0
RETRIED_STATUSES = (408, 429, 500, 502, 503, 504)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class RangesIgnored(HubError):
    """The server answers a request for a range with the whole file."""


class RemoteFile:
    """One file of a repository, at one commit.

    Attributes:
        name: Its name there.
        num_bytes: Its size; None until a first answer told it.
    """

    def __init__(self, repository: str, name: str, commit: str, num_bytes: int | None = None) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        self.name = name
        self.num_bytes = num_bytes
        self._url = hf_hub_url(repository, name, revision=commit)
        headers = build_hf_headers(library_name="dapa-merge", library_version=__version__)
        # A compressed answer would have other ranges.
        self._headers = headers | {"Accept-Encoding": "identity"}

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from `start` to before `stop`, in pieces as they come.

        Raises:
            RangesIgnored: If the server does not answer with ranges.
            HubError: If it refuses, or is not reached several times in a row.
        """
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        position, num_failures = start, 0
        while position < stop:
            before = position
            try:
                for piece in self._answer(position, stop):
                    position += len(piece)
                    yield piece
                if position == before:
                    raise HubError("the answer was empty")
            except RangesIgnored:
                raise
            except (OfflineModeIsEnabled, HfHubHTTPError) as error:
                # Statuses that may pass were waited for already.
                raise self._fault(error) from error
            except Exception as error:
                # Its HTTP library's faults are of no common class; whatever it was, the rest is asked for again.
                num_failures = 0 if position > before else num_failures + 1
                if num_failures > MAX_FAILURES:
                    raise self._fault(error) from error
                if num_failures:
                    time.sleep(min(0.25 * 2**num_failures, MAX_WAIT_SECONDS))

    def _answer(self, start: int, stop: int) -> Iterator[bytes]:
        """What one request brings of a range, which may be less than all of it."""
        from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff

        with http_stream_backoff(
            "GET",
            self._url,
            headers=self._headers | {"Range": f"bytes={start}-{stop - 1}"},
            timeout=TIMEOUT_SECONDS,
            base_wait_time=0.5,
            # A broken connection is continued by the caller, who knows how far it came.
            retry_on_exceptions=(),
            retry_on_status_codes=RETRIED_STATUSES,
        ) as response:
            hf_raise_for_status(response)
            self._check(response, start, stop)
            left = stop - start
            # As they come: what is gathered into larger pieces is lost when the connection breaks.
            for piece in response.iter_raw():
                if len(piece) > left:
                    raise HubError("the answer was longer than what was asked for")
                left -= len(piece)
                yield piece

    def _check(self, response: Any, start: int, stop: int) -> None:
        """Raise unless the answer is from the start of the range, no longer, and of a file of the known size."""
        if response.status_code == 200:
            raise RangesIgnored(
                f"{self._url} was answered with the whole file where a range of bytes was asked for; "
                f"download the model first, with `hf download`"
            )
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if response.status_code != 206 or match is None:
            raise HubError(
                f"the answer to a request for a range had status {response.status_code} and no Content-Range"
            )
        first, last, size = map(int, match.groups())
        if self.num_bytes is None:
            self.num_bytes = size
        if first != start or last >= stop or size != self.num_bytes:
            raise HubError(f"bytes {start} to {stop - 1} of {self.num_bytes} were asked for, but {match.string!r} came")

    def _fault(self, error: Exception) -> HubError:
        return HubError(f"{self._url} could not be read: {one_line(error)}; run the same again to go on")
