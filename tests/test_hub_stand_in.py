"""The unmodified client against the stand-in for the Hub, or against the server that DAPA_HUB_ENDPOINT names."""

import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import hub_stand_in
import pytest
from hub_client import IGNORED_WARNING, commit, connect, fetch, reaching_servers, status_of
from hub_stand_in import some_hub
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

pytestmark = pytest.mark.filterwarnings(IGNORED_WARNING)
CARD = "---\nlicense: mit\nbase_model: someone/base\n---\n# A model\n"
copies_between_repositories = pytest.mark.skipif(
    not hasattr(CommitOperationCopy, "src_repo_id"), reason="this huggingface_hub copies within a repository only"
)


@pytest.fixture(autouse=True)
def connection(monkeypatch):
    with reaching_servers(monkeypatch):
        yield


@pytest.fixture
def any_api(tmp_path, monkeypatch):
    """The client of either server."""
    with some_hub(tmp_path / "hub") as hub:
        yield connect(hub, monkeypatch)


@pytest.fixture
def any_repository(any_api):
    """A repository of its own on either server."""
    namespace = os.environ.get("DAPA_HUB_NAMESPACE", "alice")
    name = any_api.create_repo(f"{namespace}/stand-in-{secrets.token_hex(4)}").repo_id
    yield name
    any_api.delete_repo(name)


def make_folder(folder: Path) -> dict[str, bytes]:
    files = {
        "README.md": CARD.encode(),
        "model.safetensors": secrets.token_bytes(200_000),
        "sub folder/picture of it.png": b"\x89PNG\0" + secrets.token_bytes(50),
        "sub folder/config.json": b"{}",
        "empty.txt": b"",
    }
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return files


def read_all(folder: str | Path) -> dict[str, bytes]:
    folder = Path(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_comes_back_as_it_was(any_api, any_repository, tmp_path):
    files = make_folder(tmp_path / "folder")
    first = any_api.upload_folder(repo_id=any_repository, folder_path=tmp_path / "folder")
    snapshot = any_api.snapshot_download(any_repository, cache_dir=tmp_path / "cache")
    found = read_all(snapshot)
    assert b"sub" in found.pop(".gitattributes")
    assert found == files
    info = any_api.model_info(any_repository, files_metadata=True)
    assert info.sha == first.oid
    assert info.card_data.license == "mit"
    assert {one.rfilename: one.size for one in info.siblings if one.rfilename != ".gitattributes"} == {
        path: len(content) for path, content in files.items()
    }
    # What is there already makes no commit.
    again = any_api.upload_folder(repo_id=any_repository, folder_path=tmp_path / "folder")
    assert again.oid == first.oid
    assert len(any_api.list_repo_commits(any_repository)) == 2


def test_ranges_are_answered(any_api, any_repository):
    content = secrets.token_bytes(5000)
    commit(any_api, any_repository, content, text=b"a text")
    middle = fetch(any_api, any_repository, "model.safetensors", Range="bytes=100-199")
    assert (middle.status_code, middle.content) == (206, content[100:200])
    assert middle.headers["Content-Range"] == "bytes 100-199/5000"
    assert fetch(any_api, any_repository, "model.safetensors", Range="bytes=4990-").content == content[4990:]
    assert fetch(any_api, any_repository, "text.txt", Range="bytes=-4").content == b"text"
    assert fetch(any_api, any_repository, "model.safetensors", Range="bytes=5000-").status_code == 416
    assert fetch(any_api, any_repository, "model.safetensors").content == content


def test_refs_come_and_go(any_api, any_repository):
    first = commit(any_api, any_repository, one=b"1")
    any_api.create_branch(any_repository, branch="side")
    any_api.create_tag(any_repository, tag="v1", revision="side")
    any_api.create_commit(any_repository, [CommitOperationDelete("one.txt")], commit_message="less", revision="side")
    assert any_api.file_exists(any_repository, "one.txt", revision="v1")
    assert not any_api.file_exists(any_repository, "one.txt", revision="side")
    assert status_of(any_api.create_branch, any_repository, branch="side") == 409
    assert status_of(any_api.create_tag, any_repository, tag="v1") == 409
    refs = any_api.list_repo_refs(any_repository)
    assert {branch.name for branch in refs.branches} == {"main", "side"}
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", first.oid)]
    any_api.delete_branch(any_repository, branch="side")
    any_api.delete_tag(any_repository, tag="v1")
    for revision in ("side", "v1"):
        with pytest.raises(RevisionNotFoundError):
            any_api.model_info(any_repository, revision=revision)


def test_a_stale_parent_is_refused(any_api, any_repository):
    first = commit(any_api, any_repository, one=b"1")
    second = commit(any_api, any_repository, two=b"2", parent=first.oid)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        commit(any_api, any_repository, three=b"3", parent=first.oid)
    assert caught.value.response.status_code == 412
    assert any_api.model_info(any_repository).sha == second.oid


def test_a_pull_request_is_made_added_to_and_merged(any_api, any_repository):
    before = commit(any_api, any_repository, one=b"1")
    addition = [CommitOperationAdd("model.safetensors", b"\0" * 3000)]
    made = any_api.create_commit(any_repository, addition, commit_message="a model", create_pr=True)
    any_api.create_commit(
        any_repository, [CommitOperationAdd("two.txt", b"2")], commit_message="more", revision=made.pr_revision
    )
    assert any_api.model_info(any_repository).sha == before.oid
    assert set(any_api.list_repo_files(any_repository, revision=made.pr_revision)) >= {"model.safetensors", "two.txt"}
    (listed,) = any_api.get_repo_discussions(
        any_repository, discussion_type="pull_request", discussion_status="open", author=any_api.whoami()["name"]
    )
    assert (listed.num, listed.title, listed.git_reference) == (made.pr_num, "a model", made.pr_revision)
    assert any_api.comment_discussion(any_repository, made.pr_num, comment="Good").content == "Good"
    any_api.merge_pull_request(any_repository, made.pr_num)
    details = any_api.get_discussion_details(any_repository, made.pr_num)
    assert details.status == "merged"
    assert details.merge_commit_oid == any_api.model_info(any_repository).sha
    assert set(any_api.list_repo_files(any_repository)) >= {"one.txt", "model.safetensors", "two.txt"}


@copies_between_repositories
def test_files_are_copied_without_their_bytes(any_api, any_repository):
    content = secrets.token_bytes(4000)
    commit(any_api, any_repository, content, text=b"a text")
    other = any_api.create_repo(f"{any_repository}-copy").repo_id
    operations = [
        CommitOperationCopy(path, path, src_repo_id=any_repository, src_repo_type="model")
        for path in ("model.safetensors", "text.txt")
    ]
    any_api.create_commit(other, operations, commit_message="copies")
    within = [CommitOperationCopy("model.safetensors", "again.safetensors")]
    any_api.create_commit(other, within, commit_message="a copy")
    any_api.delete_repo(any_repository)
    any_api.create_repo(any_repository)
    assert fetch(any_api, other, "again.safetensors").content == content
    assert fetch(any_api, other, "text.txt").content == b"a text"
    any_api.delete_repo(other)


GOOD = [
    "license: apache-2.0\nlanguage: [en, es]\ntags: [merge]\ndatasets: [a/b]\npipeline_tag: text-generation",
    "license: other\nlicense_name: my-license\nlicense_link: LICENSE\nlanguage: code",
    "base_model: [a/b, gpt2]\nbase_model_relation: merge",
    "model-index:\n- name: m\n  results:\n  - task: {type: text-generation}\n    dataset: {type: d, name: D}\n"
    "    metrics: [{type: accuracy, value: 0.5}]",
]
BAD = {
    "license: my-license": '"license" must be one of',
    "- a\n- b": "must be",
    "a: 1\na: 2": "duplicated mapping key",
    "a: [1": "Invalid YAML",
    "base_model: ./out/model": '"base_model" with value',
    "base_model: a/b\nbase_model_relation: copy": '"base_model_relation" must be one of',
    "language: english": "ISO 639",
    "tags: merge": '"tags" must be an array',
    "model-index:\n- name: m": r'"model-index\[0\].results" is required',
    "model-index:\n- name: m\n  results:\n  - task: {type: t}\n    dataset: {type: d}\n    metrics: []": "dataset.name",
    "model-index:\n- name: m\n  results:\n  - task: {type: t}\n    dataset: {type: d, name: D}\n"
    "    metrics: [{type: accuracy}]": r'metrics\[0\].value" is required',
}


@pytest.mark.parametrize("metadata", GOOD)
def test_good_cards_are_taken(any_api, any_repository, metadata):
    card = f"---\n{metadata}\n---\n# A model\n"
    any_api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=any_repository)
    assert fetch(any_api, any_repository, "README.md").text == card


@pytest.mark.parametrize(("metadata", "message"), BAD.items())
def test_bad_cards_are_refused(any_api, metadata, message):
    with pytest.raises(ValueError, match=message):
        any_api._validate_yaml(f"---\n{metadata}\n---\n# A model\n")


def test_what_is_only_odd_in_a_card_is_warned_of(any_api):
    with pytest.warns(UserWarning, match="empty or missing yaml metadata") as caught:
        any_api._validate_yaml("# A model\n")
    assert len(caught) == 1


def test_it_can_be_started_by_hand(tmp_path):
    process = subprocess.Popen([sys.executable, hub_stand_in.__file__, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        endpoint = process.stdout.readline().strip()
        tokens = dict(process.stdout.readline().split() for _ in range(3))
        assert HfApi(endpoint=endpoint, token=tokens["reader"]).whoami()["name"] == "alice"
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 0
