"""The Hub's faults, each one sentence: what it names, and which error it becomes."""

import errno
import sys

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dapa_merge.errors import CheckpointError, HubError
from dapa_merge.hub_client import Moved, NoAnswer, ask, asking, fault, hub_cause

TOKEN = "hf_secret"
# The HTTP library is huggingface_hub's choice.
http = sys.modules[HfHubHTTPError.__bases__[0].__module__.partition(".")[0]]


def answered(status: int, kind=HfHubHTTPError, said: str | None = None, **fields: str) -> HfHubHTTPError:
    response = http.Response(status, request=http.Request("GET", "https://hub.example/api/models/me/model"))
    error = kind(f"{status} from the server", response=response, server_message=said)
    for name, value in fields.items():
        setattr(error, name, value)
    return error


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


FAULTS = {
    "a bad token": (answered(401), HubError, ("HF_TOKEN",)),
    "no right": (answered(403, said="read only"), HubError, ("token", "read only")),
    "no repository": (answered(404, RepositoryNotFoundError), HubError, ("no such repository", "HF_TOKEN")),
    "no revision": (answered(404, RevisionNotFoundError), HubError, ("no such revision",)),
    "a gated model": (
        answered(403, GatedRepoError, repo_id="me/model", repo_type="model"),
        HubError,
        ("gated", "/me/model", "HF_TOKEN"),
    ),
    "a gated dataset": (
        answered(403, GatedRepoError, repo_id="me/data", repo_type="dataset"),
        HubError,
        ("/datasets/me/data",),
    ),
    "gone": (answered(410, said="removed"), HubError, ("410", "removed")),
    "moved": (answered(412), Moved, ("somebody else committed",)),
    "too many requests": (answered(429), NoAnswer, ("429", "run the command again")),
    "the Hub's own fault": (answered(503), NoAnswer, ("503", "run the command again")),
    "no connection": (http.ConnectError("refused"), NoAnswer, ("out of reach", "ConnectError")),
    "slow": (http.ReadTimeout("timed out"), NoAnswer, ("out of reach", "ReadTimeout")),
    "a cache without it": (
        caused(LocalEntryNotFoundError("not here"), http.ConnectError("refused")),
        NoAnswer,
        ("ConnectError",),
    ),
    "an upload that broke": (caused(RuntimeError("while sending a.bin"), answered(502)), NoAnswer, ("502",)),
    "offline": (OfflineModeIsEnabled("offline"), NoAnswer, ("HF_HUB_OFFLINE",)),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device"), HubError, ("disk", "HF_HOME")),
    "a full disk by Xet": (RuntimeError("IO: No space left on device (os error 28)"), HubError, ("disk", "HF_HOME")),
    "nonsense": (KeyError("sha"), HubError, ("makes no sense", "sha")),
    "a card that it refuses": (
        ValueError("Invalid metadata in README.md.\n- license is wrong"),
        HubError,
        ("license",),
    ),
}


@pytest.mark.parametrize("what", FAULTS)
def test_each_fault_is_one_sentence_that_names_what_was_asked_and_what_to_do(what):
    error, kind, named = FAULTS[what]
    with pytest.raises(kind) as caught, asking("fetch me/model"):
        raise error
    sentence = str(caught.value)
    assert type(caught.value) is kind
    assert sentence.startswith("cannot fetch me/model: ")
    assert "\n" not in sentence
    for part in named:
        assert part in sentence


def test_an_error_of_ours_passes_as_it_is():
    with pytest.raises(CheckpointError, match=r"^ours$"), asking("fetch me/model"):
        raise CheckpointError("ours")


def test_the_token_is_in_no_sentence(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for error in (answered(403, said=f"no right for {TOKEN}"), http.ConnectError(f"with {TOKEN}"), KeyError(TOKEN)):
        assert TOKEN not in str(fault("ask", error))


def test_a_fault_that_passes_is_asked_again_and_one_that_stays_is_not(monkeypatch):
    monkeypatch.setattr("dapa_merge.hub_client.WAITS", (0.0, 0.0))
    errors = [answered(503), answered(429)]

    def call() -> str:
        if errors:
            raise errors.pop(0)
        return "answer"

    assert ask("ask", call) == "answer"
    errors[:] = [answered(403), answered(503)]
    with pytest.raises(HubError, match="token"):
        ask("ask", call)
    assert len(errors) == 1


def test_the_hubs_part_in_another_librarys_fault_is_found_among_its_causes():
    refused = http.ConnectError("refused")
    assert hub_cause(caused(ValueError("no data"), refused)) is refused
    assert hub_cause(caused(ValueError("no data"), FileNotFoundError("data.csv"))) is None
