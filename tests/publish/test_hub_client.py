"""The Hub's faults, each one sentence: what it names, and which error it becomes."""

import errno
import sys

import pytest
from huggingface_hub import constants
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


def answered(
    status: int, kind=HfHubHTTPError, said: str | None = None, host: str | None = None, headers=None, **fields: str
) -> HfHubHTTPError:
    place = constants.ENDPOINT if host is None else host
    request = http.Request("GET", f"{place}/api/models/me/model")
    response = http.Response(status, request=request, headers=headers or {})
    error = kind(f"{status} from the server", response=response, server_message=said)
    for name, value in fields.items():
        setattr(error, name, value)
    return error


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


FAULTS = {
    "a bad token": (answered(401), HubError, ("HF_TOKEN", "expired")),
    "no right": (answered(403, said="read only"), HubError, ("token", "read only", "right")),
    "no room": (answered(403, said="Private repository storage limit reached"), HubError, ("storage", "delete")),
    "an unpaid bill": (answered(402, said="no credit"), HubError, ("pay", "no credit")),
    "an old link of an upload": (
        answered(403, host="https://storage.example"),
        HubError,
        ("link", "run the command again"),
    ),
    "no such file": (answered(404), HubError, ("not there", "revision")),
    "a name that is taken": (answered(409, said="exists"), HubError, ("409", "exists", "choose another")),
    "a file that is too large": (answered(413), HubError, ("413", "smaller")),
    "a content that it refuses": (answered(422, said="bad path"), HubError, ("422", "bad path", "correct")),
    "a request that it refuses": (answered(400, said="bad name"), HubError, ("400", "bad name", "correct")),
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
    "too many requests": (answered(429), NoAnswer, ("429", "five minutes", "run the command again")),
    "too many requests for a while": (
        answered(429, headers={"Retry-After": "30"}),
        NoAnswer,
        ("429", "30 seconds", "run the command again"),
    ),
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


def test_an_expired_token_is_told_where_the_hub_denies_that_a_repository_exists(monkeypatch):
    denied = answered(401, RepositoryNotFoundError)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "no such repository" in str(fault("fetch me/model", denied))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    assert "expired" in str(fault("fetch me/model", denied))


def test_to_run_it_again_is_the_advice_only_where_that_may_help():
    again = {what for what, (error, *_) in FAULTS.items() if "run the command again" in str(fault("ask", error))}
    assert again == {
        "an old link of an upload", "moved", "too many requests", "too many requests for a while",
        "the Hub's own fault", "no connection", "slow", "a cache without it", "an upload that broke",
    }  # fmt: skip


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
