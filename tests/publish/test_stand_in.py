"""Behaviour of the stand-in for the Hub without which tests of publishing would pass for nothing."""

import hashlib
import json
import secrets

import pytest
from hub_card import check_card
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session

MODEL = secrets.token_bytes(3000)
SHA256 = hashlib.sha256(MODEL).hexdigest()


@pytest.fixture
def repository(hub):
    hub.api.create_repo("alice/model")
    commit(hub, MODEL)
    return hub.store.repositories["alice/model"]


def commit(hub, content: bytes, parent: str | None = None) -> None:
    operation = CommitOperationAdd("model.safetensors", content)
    hub.api.create_commit("alice/model", [operation], commit_message="a model", parent_commit=parent)


def post(hub, path: str, content: str):
    headers = {"Authorization": f"Bearer {hub.api.token}"}
    return get_session().post(f"{hub.endpoint}{path}", content=content.encode(), headers=headers)


def test_a_stale_parent_is_refused(hub, repository):
    first = repository.branches["main"]
    commit(hub, b"\0", first)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        commit(hub, b"\1", first)
    assert hub.store.read(repository.files()["model.safetensors"]) == b"\0"


def test_objects_of_other_repositories_do_not_count(hub, repository):
    hub.api.create_repo("alice/other")
    lines = [
        {"key": "header", "value": {"summary": "a file"}},
        {"key": "lfsFile", "value": {"path": "a.safetensors", "algo": "sha256", "oid": SHA256}},
    ]
    body = "\n".join(map(json.dumps, lines))
    assert post(hub, "/api/models/alice/other/commit/main", body).status_code == 404
    assert set(hub.store.repositories["alice/other"].files()) == {".gitattributes"}
    assert post(hub, "/api/models/alice/model/commit/main", body).status_code == 200


def test_other_bytes_than_the_promised_ones_are_refused(hub, repository):
    promised = {"oid": hashlib.sha256(b"promised").hexdigest(), "size": 8}
    asked = json.dumps({"operation": "upload", "transfers": ["basic"], "objects": [promised]})
    (found,) = post(hub, "/alice/model.git/info/lfs/objects/batch", asked).json()["objects"]
    href = found["actions"]["upload"]["href"]
    assert get_session().put(href, content=b"promises").status_code == 400
    assert get_session().put(href.replace("size=8", "size=9"), content=b"promised!").status_code == 403
    assert promised["oid"] not in repository.objects


def test_a_commit_whose_answer_is_lost_was_made(hub, repository):
    hub.faults.add(method="POST", path="/commit/", lose_answer=True, times=1)
    with pytest.raises(Exception, match="disconnected"):
        commit(hub, b"\0")
    assert hub.store.read(repository.files()["model.safetensors"]) == b"\0"


GOOD = "license: other\nlicense_name: my-license\nlanguage: [en, code]\nbase_model: [a/b, gpt2]\ndatasets: [a/b]"
INDEX = "model-index:\n- name: m\n  results:\n  - task: {type: t}\n    dataset: {type: d, name: D}\n    metrics: "
BAD = {
    "license: my-license": "license",
    "license: other": "license_name",
    "- a\n- b": "valid dictionary",
    "a: 1\na: 2": "duplicated mapping key",
    "a: [1": "Invalid YAML",
    "base_model: ./out/model": "base_model",
    "base_model: a/b\nbase_model_relation: copy": "base_model_relation",
    "language: english": "ISO 639",
    "tags: merge": "tags",
    "model-index:\n- name: m": "model-index.0.results",
    f"{INDEX}[{{type: accuracy}}]": "metrics.0.value",
}


def test_a_good_card_is_taken():
    assert check_card(f"---\n{GOOD}\n{INDEX}[{{type: accuracy, value: 0.5}}]\n---\n# A model\n") == []


@pytest.mark.parametrize("metadata", BAD)
def test_a_bad_card_is_refused_for_what_is_wrong_with_it(metadata):
    assert BAD[metadata] in " ".join(check_card(f"---\n{metadata}\n---\n# A model\n"))
