"""What only the stand-in for the Hub can show: several users, switches, and everything that can be told to fail."""

import hashlib
import json
import secrets
from types import SimpleNamespace

import pytest
from hub_client import IGNORED_WARNING, commit, connect, fetch, reaching_servers, status_of
from hub_git import ATTRIBUTES
from hub_stand_in import serve
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, HfApi, __version__, get_token
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import get_session

pytestmark = pytest.mark.filterwarnings(IGNORED_WARNING)
needs_retries = pytest.mark.skipif(__version__.startswith("1."), reason="this huggingface_hub gives up at once")
MODEL = secrets.token_bytes(300_000)


@pytest.fixture(autouse=True)
def connection(monkeypatch):
    with reaching_servers(monkeypatch):
        yield


@pytest.fixture
def waits(monkeypatch):
    """How long the client wants to wait before it asks again; it does not wait."""
    waits = []
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=waits.append))
    return waits


@pytest.fixture
def hub(tmp_path):
    with serve(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def api(hub, monkeypatch):
    return connect(hub, monkeypatch)


@pytest.fixture
def repository(hub, api):
    """The stand-in's repository alice/model, with a model in it."""
    api.create_repo("alice/model")
    commit(api, "alice/model", MODEL)
    return hub.store.repositories["alice/model"]


@pytest.fixture
def bob(hub):
    return HfApi(endpoint=hub.endpoint, token=hub.token("bob"))


def test_names_and_rights_are_checked(hub, api, repository, bob):
    assert status_of(api.create_repo, "alice/model") == 409
    assert api.create_repo("alice/model", exist_ok=True).repo_id == "alice/model"
    assert status_of(api.create_repo, "bob/model") == 403
    assert status_of(api.create_repo, "alice/other", token=hub.token("reader")) == 403
    assert status_of(api.create_repo, "alice/other", token=False) == 401
    assert status_of(api.whoami, token="hf_nobody") == 401
    with pytest.raises(HfHubHTTPError, match="create_pr=1"):
        commit(bob, "alice/model", one=b"1")
    assert list(hub.store.repositories) == ["alice/model"]


def test_private_and_gated_repositories_are_kept_from_strangers(hub, api, repository, bob):
    api.update_repo_settings("alice/model", private=True)
    for stranger in (bob.token, False):
        with pytest.raises(RepositoryNotFoundError) as caught:
            bob.model_info("alice/model", token=stranger)
        assert caught.value.response.status_code == 404
    assert api.model_info("alice/model", token=hub.token("reader")).private
    repository.private, repository.gated = False, "manual"
    assert bob.model_info("alice/model").gated == "manual"
    with pytest.raises(GatedRepoError):
        bob.auth_check("alice/model")
    assert fetch(bob, "alice/model", "model.safetensors").headers["X-Error-Code"] == "GatedRepo"
    repository.granted.add("bob")
    assert fetch(bob, "alice/model", "model.safetensors").content == MODEL


def test_another_user_proposes_changes(api, repository, bob):
    addition = [CommitOperationAdd("more.safetensors", b"\0" * 500)]
    made = bob.create_commit("alice/model", addition, commit_message="more", create_pr=True)
    assert repository.pull_requests[made.pr_num].author == "bob"
    assert status_of(bob.merge_pull_request, "alice/model", made.pr_num) == 403
    commit(api, "alice/model", one=b"1")
    api.merge_pull_request("alice/model", made.pr_num)
    assert set(repository.files()) == {".gitattributes", "model.safetensors", "more.safetensors", "one.txt"}
    closed = api.create_pull_request("alice/model", title="Nothing")
    assert closed.status == "draft"
    api.change_discussion_status("alice/model", closed.num, new_status="closed", comment="No")
    assert repository.pull_requests[closed.num].status == "closed"
    assert status_of(api.merge_pull_request, "alice/model", closed.num) == 400


def test_pull_requests_in_conflict_are_not_merged(api, repository):
    addition = [CommitOperationAdd("one.txt", b"theirs")]
    made = api.create_commit("alice/model", addition, commit_message="one", create_pr=True)
    commit(api, "alice/model", one=b"ours")
    assert api.get_discussion_details("alice/model", made.pr_num).conflicting_files == ["one.txt"]
    assert status_of(api.merge_pull_request, "alice/model", made.pr_num) == 409


def commit_lfs(api: HfApi, name: str, sha256: str):
    lines = [
        {"key": "header", "value": {"summary": "a file"}},
        {"key": "lfsFile", "value": {"path": "a.safetensors", "algo": "sha256", "oid": sha256}},
    ]
    body = "".join(json.dumps(line) + "\n" for line in lines).encode()
    headers = {"Authorization": f"Bearer {api.token}", "Content-Type": "application/x-ndjson"}
    return get_session().post(f"{api.endpoint}/api/models/{name}/commit/main", headers=headers, content=body)


def test_objects_of_other_repositories_do_not_count(hub, api, repository):
    api.create_repo("alice/other")
    sha256 = hashlib.sha256(MODEL).hexdigest()
    refused = commit_lfs(api, "alice/other", sha256)
    assert refused.status_code == 404
    assert "a.safetensors" in refused.json()["error"]
    assert commit_lfs(api, "alice/model", sha256).status_code == 200
    assert set(hub.store.repositories["alice/other"].files()) == {".gitattributes"}


@pytest.mark.skipif(not hasattr(CommitOperationCopy, "src_repo_id"), reason="this huggingface_hub cannot copy so")
def test_copies_between_repositories_can_be_refused(hub, api, repository):
    from huggingface_hub.errors import FileDuplicationError

    api.create_repo("alice/other")

    def copy():
        name = "model.safetensors"
        operation = CommitOperationCopy(name, name, src_repo_id="alice/model", src_repo_type="model")
        return api.create_commit("alice/other", [operation], commit_message="a copy")

    hub.no_xet_hashes = True
    with pytest.raises(ValueError, match="no xet hash"):
        copy()
    hub.no_xet_hashes, hub.no_duplication = False, True
    assert status_of(copy) == 404
    hub.no_duplication, hub.refused_duplicates = False, {"model.safetensors"}
    with pytest.raises(FileDuplicationError):
        copy()
    assert not hub.store.repositories["alice/other"].objects
    hub.refused_duplicates.clear()
    copy()
    assert fetch(api, "alice/other", "model.safetensors").content == MODEL


def test_large_files_are_uploaded_in_parts(hub, api, repository):
    hub.multipart_over = 100_000
    content = secrets.token_bytes(250_001)
    commit(api, "alice/model", content)
    assert fetch(api, "alice/model", "model.safetensors").content == content
    parts = [request.num_bytes for request in hub.requests if request.path.startswith("/lfs/parts/")]
    assert parts == [100_000, 100_000, 50_001]


def test_other_bytes_than_the_promised_ones_are_refused(api, repository):
    promised = {"oid": hashlib.sha256(b"promised").hexdigest(), "size": 8}
    asked = {"operation": "upload", "transfers": ["basic"], "objects": [promised], "hash_algo": "sha256"}
    url, headers = f"{api.endpoint}/alice/model.git/info/lfs/objects/batch", {"Authorization": f"Bearer {api.token}"}
    (found,) = get_session().post(url, json=asked, headers=headers).json()["objects"]
    href = found["actions"]["upload"]["href"]
    assert get_session().put(href, content=b"promises").status_code == 400
    assert get_session().put(href.replace("size=8", "size=9"), content=b"promised!").status_code == 403
    assert promised["oid"] not in repository.objects
    assert get_session().put(href, content=b"promised").status_code == 200
    assert repository.objects[promised["oid"]] == 8


def test_files_that_no_pattern_covers_are_added_to_gitattributes(hub, api, repository):
    addition = [CommitOperationAdd("a plot.png", b"\x89PNG\0")]
    api.create_commit("alice/model", addition, commit_message="a plot")
    text = fetch(api, "alice/model", ".gitattributes").content
    assert text == ATTRIBUTES + b"a[[:space:]]plot.png filter=lfs diff=lfs merge=lfs -text\n"
    hub.tracks_lfs = False
    api.create_commit("alice/model", [CommitOperationAdd("b.png", b"\x89PNG\0")], commit_message="another")
    assert fetch(api, "alice/model", ".gitattributes").content == text


def test_lfs_files_may_lie_at_another_address(hub, api, repository, tmp_path):
    hub.has_cdn = True
    path = api.hf_hub_download("alice/model", "model.safetensors", cache_dir=tmp_path / "cache")
    with open(path, "rb") as file:
        assert file.read() == MODEL
    assert {request.user for request in hub.requests if request.path.startswith("/cdn/")} == {""}


def test_listings_come_in_pages(hub, api, repository):
    commit(api, "alice/model", one=b"1", two=b"2", three=b"3")
    hub.page_size = 2
    assert len(api.list_repo_files("alice/model")) == 5
    assert len(api.list_repo_commits("alice/model")) == 3
    for number in range(3):
        api.create_discussion("alice/model", title=f"Question {number}")
    assert [one.num for one in api.get_repo_discussions("alice/model")] == [3, 2, 1]


def test_a_workflow_gets_a_token_for_one_repository(hub, api, repository, monkeypatch):
    pytest.importorskip("huggingface_hub._oidc")
    monkeypatch.setattr("huggingface_hub.utils._auth._OIDC_TOKEN_CACHE", None)
    for name, value in hub.workflow_environment("alice/model").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(HfHubHTTPError, match="invalid_grant"):
        get_token()
    hub.trusted.add("alice/model")
    workflow = HfApi(endpoint=hub.endpoint, token=get_token())
    commit(workflow, "alice/model", one=b"1")
    assert repository.history[repository.branches["main"]].author == "[OIDC]"
    assert status_of(workflow.create_repo, "alice/other") == 401
    api.create_repo("alice/other")
    assert status_of(commit, workflow, "alice/other", one=b"1") == 403


@needs_retries
def test_busy_servers_are_asked_again(hub, api, repository, waits):
    for status in (429, 500, 503):
        hub.faults.add(method="POST", path="/preupload/", status=status, times=1)
    commit(api, "alice/model", one=b"1")
    assert len(waits) == 3
    statuses = [request.status for request in hub.requests if "/preupload/" in request.path]
    assert statuses[-4:] == [429, 500, 503, 200]
    hub.faults.add(method="POST", path="/commit/", status=503)
    assert status_of(commit, api, "alice/model", two=b"2") == 503
    hub.faults.clear()
    commit(api, "alice/model", two=b"2")
    assert set(repository.files()) >= {"one.txt", "two.txt"}


@needs_retries
def test_uploads_that_break_off_are_sent_again(hub, api, repository, waits):
    fault = hub.faults.add(method="PUT", path="/lfs/objects/", cut_request_after=100_000, times=2)
    content = secrets.token_bytes(2_000_000)
    commit(api, "alice/model", content)
    assert fetch(api, "alice/model", "model.safetensors").content == content
    sizes = [request.num_bytes for request in hub.requests if request.method == "PUT"]
    assert sizes[-3:] == [100_000, 100_000, 2_000_000]
    assert (fault.hits, len(waits)) == (2, 2)


@needs_retries
def test_downloads_that_break_off_go_on(hub, api, repository, waits, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=waits.append))
    # A piece that did not come whole is not kept.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.faults.add(method="GET", path="/resolve/.*model.safetensors", cut_answer_after=100_000, times=1)
    path = api.hf_hub_download("alice/model", "model.safetensors", cache_dir=tmp_path / "cache")
    with open(path, "rb") as file:
        assert file.read() == MODEL
    downloads = [request.status for request in hub.requests if request.method == "GET" and "/resolve/" in request.path]
    assert downloads == [200, 206]


def test_an_answer_may_be_lost_after_the_commit(hub, api, repository):
    before = repository.branches["main"]
    hub.faults.add(method="POST", path="/commit/", lose_answer=True, times=1)
    with pytest.raises(Exception, match="disconnected"):
        commit(api, "alice/model", one=b"1", parent=before)
    assert set(repository.files()) == {".gitattributes", "model.safetensors", "one.txt"}
    assert status_of(commit, api, "alice/model", two=b"2", parent=before) == 412


def test_a_branch_may_move_before_the_commit(hub, api, repository):
    before = repository.branches["main"]
    hub.faults.add(path="/commit/", times=1, call=lambda: commit(api, "alice/model", mine=b"1"))
    assert status_of(commit, api, "alice/model", yours=b"2", parent=before) == 412
    seen = [set(tree) - {".gitattributes"} for tree in repository.seen("main")]
    assert seen == [set(), {"model.safetensors"}, {"model.safetensors", "mine.txt"}]


def test_answers_may_be_slow(hub, api, repository, monkeypatch):
    slept = []
    monkeypatch.setattr("hub_stand_in.time", SimpleNamespace(sleep=slept.append))
    hub.faults.add(method="GET", path="/resolve/", delay_seconds=7)
    assert fetch(api, "alice/model", "model.safetensors").content == MODEL
    assert slept == [7] * 5
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("alice/model", "nothing.txt")
