"""The unmodified client of the Hub, in the process of a test."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session

# The client's own way to upload a file.
IGNORED_WARNING = "ignore:Use 'content=:DeprecationWarning"


@contextlib.contextmanager
def reaching_servers(monkeypatch) -> Iterator[None]:
    """Let this process's client ask servers, without Xet; the connections that it keeps are closed afterwards."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    yield
    huggingface_hub.close_session()


def connect(hub, monkeypatch, name: str = "alice") -> HfApi:
    # Some versions of the client understand addresses of repositories at the default endpoint only.
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    return HfApi(endpoint=hub.endpoint, token=hub.token(name))


def commit(api: HfApi, name: str, model: bytes = b"", parent: str | None = None, **files: bytes):
    """Commit model.safetensors and text files, which are named without their suffix."""
    operations = [CommitOperationAdd("model.safetensors", model)] if model else []
    operations += [CommitOperationAdd(f"{path}.txt", content) for path, content in files.items()]
    return api.create_commit(name, operations, commit_message="some files", parent_commit=parent)


def fetch(api: HfApi, name: str, path: str, **headers: str):
    """Get a file as it is asked for, whatever the answer."""
    url = hf_hub_url(name, path, endpoint=api.endpoint)
    return get_session().get(url, headers={"Authorization": f"Bearer {api.token}", **headers})


def status_of(call: Callable, *arguments: object, **options: object) -> int:
    """The status of the refusal that a call ends with."""
    with pytest.raises(HfHubHTTPError) as caught:
        call(*arguments, **options)
    return caught.value.response.status_code
