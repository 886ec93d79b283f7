"""Commands that read a result where it was published, and what they say where the Hub refuses."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import call
from huggingface_hub import CommitOperationAdd

import dapa_merge
from dapa_merge.errors import HubError, UsageError


@pytest.fixture
def published(hub, new_id, result) -> str:
    """The Hub id of a result of the random pair."""
    name = new_id("repaired")
    ran = call("push", result, name)
    assert ran.exit_code == 0, ran.output
    return name


def spoil(hub, name: str, path: str, content: bytes) -> None:
    hub.api.create_commit(name, [CommitOperationAdd(path, content)], commit_message="other bytes")


def test_a_published_result_is_verified_by_its_id_and_says_what_the_proof_rests_on(hub, published, pair):
    commit = hub.store.repositories[published].branches["main"]
    for name in (published, f"{published}@{commit}", f"{published}@main"):
        ran = call("verify", name, "--json")
        assert ran.exit_code == 0, ran.output
        found = json.loads(ran.stdout)
        assert found["correct"]
        assert found["units"] == ["1.gate"]
        assert found["rests_on"]["result"] == f"{name} at commit {commit}, by the Hub's SHA-256s"
        assert pair[0] in found["rests_on"]["target"]
    ran = call("verify", published)
    assert f"the proof rests on the result: {published} at commit {commit}" in ran.stdout
    assert "correct: the files and dapa.json" in ran.stdout
    assert "note:" not in ran.stdout


def test_the_files_of_a_published_result_are_compared_alone(hub, published):
    num_requests = len(hub.requests)
    ran = call("verify", published, "--files-only", "--json")
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["rests_on"].keys() == {"result"}
    # No other model is asked for.
    assert {one.path for one in hub.requests[num_requests:] if published not in one.path} <= {"/api/whoami-v2"}


def test_a_published_result_that_somebody_changed_is_wrong(hub, published, result):
    config = json.loads((result / "config.json").read_text()) | {"rope_theta": 1.0}
    spoil(hub, published, "config.json", json.dumps(config).encode())
    ran = call("verify", published, "--files-only")
    assert ran.exit_code == 4
    assert "config.json" in ran.stdout
    shard = next(path for path in sorted(result.iterdir()) if path.suffix == ".safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    spoil(hub, published, shard.name, bytes(content))
    ran = call("verify", published)
    assert ran.exit_code == 4
    assert "WRONG" in ran.stdout


def test_what_nothing_checks_of_a_published_result_is_not_fetched(hub, published):
    for path in ("model.gguf", "dapa_responses.jsonl", ".hidden/x.json"):
        spoil(hub, published, path, b"large")
    num_requests = len(hub.requests)
    assert call("verify", published).exit_code == 0
    fetched = [one.path for one in hub.requests[num_requests:] if "/resolve/" in one.path]
    assert any("config.json" in path for path in fetched)
    assert not [path for path in fetched if "gguf" in path or "responses" in path or "hidden" in path]


def test_nothing_is_written_into_a_published_result(published):
    ran = call("verify", published, "--write-manifest")
    assert ran.exit_code == 2
    assert ran.stderr.count("\n") == 1
    for part in (published, "--write-manifest", "download"):
        assert part in ran.stderr
    with pytest.raises(UsageError, match="on the Hub"):
        dapa_merge.verify(published, write_manifest=True)


def test_what_is_no_published_result_is_told(hub, published, pair):
    assert call("verify", f"{published}@main@main").exit_code == 2
    ran = call("verify", pair[0])
    assert (ran.exit_code, "mergekit_config.yml" in ran.stderr, pair[0] in ran.stderr) == (2, True, True)
    ran = call("verify", pair[0], "--files-only")
    assert (ran.exit_code, f"{pair[0]} has no dapa.json" in ran.stderr) == (4, True)
    ran = call("verify", f"{hub.namespace}/nothing")
    assert (ran.exit_code, "no such repository" in ran.stderr) == (5, True)
    # A path that does not exist is no id.
    for place in ("./nothing/here", "nothing", "/nothing/here"):
        ran = call("verify", place)
        assert (ran.exit_code, f"there is no folder {place.removeprefix('./')} here" in ran.stderr) == (4, True), (
            ran.stderr
        )


@pytest.mark.xdist_group("demo")
def test_the_figures_of_a_published_result_are_held_to_limits(hub, new_id, demo, tmp_path):
    name = new_id("repaired")
    # A push writes a card into the result.
    assert call("push", shutil.copytree(demo[0], tmp_path / "measured"), name).exit_code == 0
    num_requests = len(hub.requests)
    assert call("gate", name, "--min-dsr", "0.9").exit_code == 0
    assert call("gate", f"{name}@main", "--min-dsr", "1.0").exit_code == 6
    fetched = {one.path.rpartition("/")[2] for one in hub.requests[num_requests:] if "/resolve/" in one.path}
    assert fetched == {"dapa_report.json"}


def test_a_model_without_a_report_passes_no_gate(hub, published, pair):
    ran = call("gate", pair[0], "--min-dsr", "0.9")
    assert (ran.exit_code, f"{pair[0]} has no dapa_report.json" in ran.stderr) == (4, True)
    # It was written without an evaluation.
    assert call("gate", published, "--min-dsr", "0.9").exit_code == 6
    ran = call("gate", "out/dapa_report.json", "--min-dsr", "0.9")
    assert (ran.exit_code, "does not exist" in ran.stderr) == (4, True)


@pytest.mark.parametrize("status", [400, 402, 403, 404, 409, 410, 413, 422])
@pytest.mark.parametrize("path", ["/preupload/", "/commit/"])
def test_what_the_hub_refuses_at_a_push_is_not_asked_again_and_no_advice_either(hub, new_id, result, status, path):
    rule = hub.faults.add(path=path, status=status, message="no, not this")
    ran = call("--quiet", "push", result, new_id("repaired"))
    assert ran.exit_code == 5, ran.output
    assert ran.stderr.count("\n") == 1
    assert "no, not this" in ran.stderr
    assert "run the command again" not in ran.stderr
    assert rule.hits == 1


@pytest.mark.parametrize(("status", "said"), [(429, "too many requests"), (503, "not available now")])
def test_what_passes_later_says_to_run_the_command_again(hub, new_id, result, monkeypatch, status, said):
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.faults.add(path="/commit/", status=status)
    ran = call("--quiet", "push", result, new_id("repaired"))
    assert (ran.exit_code, said in ran.stderr, "run the command again" in ran.stderr) == (5, True, True), ran.stderr


def test_used_up_storage_is_told_as_that(hub, new_id, result):
    hub.faults.add(path="/commit/", status=403, message="Private repository storage limit reached, upgrade your plan")
    ran = call("--quiet", "push", result, new_id("repaired"))
    assert (ran.exit_code, "storage on the Hub is used up" in ran.stderr) == (5, True)


def test_from_python_the_same_errors_come_as_exceptions(hub, new_id, result):
    hub.faults.add(path="/commit/", status=403, message="read only")
    with pytest.raises(HubError, match="may not do that"):
        dapa_merge.push(result, new_id("repaired"))
    hub.faults.clear()
    name = new_id("repaired")
    done = dapa_merge.push(str(result), name, private=True, tag="v1", license="mit")
    assert (done.tag, done.changed) == ("v1", True)
    assert hub.api.model_info(name).card_data.license == "mit"
    assert dapa_merge.verify(name).is_correct
