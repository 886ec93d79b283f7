"""Publishing, against a real server."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml
from conftest import call
from direction_files import chosen, saved
from hub_server import dapa_merge
from huggingface_hub import CommitOperationAdd, snapshot_download
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from publish.conftest import tree, upload

from dapa_merge.plan.directions import FILE_NAME

WITH_XET = {"HF_HUB_DISABLE_XET": "0"}


def push(*arguments: object) -> dict:
    ran = call("--quiet", "push", *arguments, "--json")
    assert ran.exit_code == 0, ran.output
    return json.loads(ran.stdout)


def refused(*arguments: object) -> tuple[int, str]:
    ran = call("--quiet", "push", *arguments)
    assert ran.exit_code != 0, ran.output
    assert ran.stderr.count("\n") == 1, ran.stderr
    return ran.exit_code, ran.stderr


def test_what_is_published_is_the_folder_in_one_commit(any_hub, new_id, result, tmp_path):
    name = new_id("repaired")
    published = push(result, name, "--private", "--tag", "v1")
    assert published["changed"]
    assert published["tag"] == "v1"
    info = any_hub.api.model_info(name)
    assert info.sha == published["commit"]
    assert info.private
    assert info.card_data.base_model_relation == "merge"
    downloaded = snapshot_download(name, revision="v1", local_dir=tmp_path / "downloaded")
    assert tree(Path(downloaded)) == tree(result)
    assert call("verify", downloaded).exit_code == 0
    # The one that makes a repository, and ours.
    assert len(any_hub.api.list_repo_commits(name)) == 2
    again = push(result, name, "--private", "--tag", "v1")
    assert not again["changed"]
    assert not again["tag"]
    assert again["commit"] == published["commit"]
    assert len(any_hub.api.list_repo_commits(name)) == 2


def test_a_dry_run_shows_the_commit_that_a_push_makes_and_neither_writes_nor_asks_for_a_token(
    hub, new_id, result, tmp_path, monkeypatch
):
    before = tree(result)
    name, requests = new_id("repaired"), len(hub.requests)
    with monkeypatch.context() as patch:
        patch.delenv("HF_TOKEN")
        shown = call("push", result, name, "--dry-run", "--json")
        told = call("push", result, name, "--dry-run", "--create-pr")
    assert shown.exit_code == told.exit_code == 0, shown.stderr
    assert tree(result) == before
    assert not any(one.method not in ("GET", "HEAD") for one in hub.requests[requests:])
    said = json.loads(shown.stdout)
    published = push(result, name)
    (commit, *_) = hub.api.list_repo_commits(name)
    assert (said["repository"], said["message"]) == (name, commit.title)
    assert set(said["files"]) == set(published["written"])
    downloaded = tree(Path(snapshot_download(name, local_dir=tmp_path / "downloaded")))
    assert said["files"] == {path: len(content) for path, content in downloaded.items()}
    assert f"{name} would get {len(downloaded)} files of " in told.stdout
    assert " in a pull request:" in told.stdout
    assert "\nits licence: apache-2.0\n" in told.stdout
    assert told.stdout.endswith(
        "nothing was sent, and no token was read; what the repository has already was not compared\n"
    )


@pytest.mark.parametrize("options", [(), ("--no-manifest",)])
def test_the_directions_of_a_result_are_published_with_it(options, hub, new_id, llama_pair, tmp_path):
    target, source = llama_pair
    file = saved(tmp_path, chosen(target, source, "1"))
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: dapa\nbase_model: {target}\nmodels: [{{model: {source}}}]\n"
        f"parameters: {{layers: 1, modules: gate, edit: directions, directions: {file}}}\n"
    )
    assert call("run", recipe, tmp_path / "out", "--no-evaluate", *options).exit_code == 0
    name = new_id("repaired")
    push(tmp_path / "out", name)
    downloaded = snapshot_download(name, local_dir=tmp_path / "downloaded")
    assert (Path(downloaded) / FILE_NAME).read_bytes() == file.read_bytes()
    assert call("verify", downloaded, "--target", target, "--source", source).exit_code == 0


def test_what_the_target_has_is_copied_on_the_hub_and_not_sent(hub, new_id, result, pair):
    name = new_id("repaired")
    target = hub.store.repositories[pair[0]].files()
    unchanged = {
        path for path, content in tree(result).items() if path.endswith(".safetensors") if path in target
        if hub.store.read(target[path]) == content
    }  # fmt: skip
    assert unchanged
    num_requests = len(hub.requests)
    published = push(result, name)
    assert set(published["copied"]) == unchanged
    sent = [one for one in hub.requests[num_requests:] if one.method == "PUT"]
    assert len(sent) == len([one for one in published["written"] if one.endswith(".safetensors")]) - len(unchanged)
    assert {path: hub.store.read(entry) for path, entry in hub.store.repositories[name].files().items()}.items() >= (
        tree(result).items()
    )


@pytest.mark.parametrize("how", ["no hashes", "no endpoint", "refused one by one"])
def test_where_the_hub_copies_nothing_everything_is_sent(hub, new_id, result, how):
    hub.no_xet_hashes, hub.no_duplication = how == "no hashes", how == "no endpoint"
    if how == "refused one by one":
        hub.refused_duplicates |= set(tree(result))
    name = new_id("repaired")
    published = push(result, name)
    assert not published["copied"]
    assert len(hub.store.repositories[name].seen()) == 2
    assert not push(result, name)["changed"]


def test_only_what_changed_is_sent_and_what_is_stale_goes(any_hub, new_id, result, tmp_path):
    name = new_id("repaired")
    push(result, name)
    stale = {"pytorch_model.bin": b"old", "old/notes.md": b"# Ours", "LICENSE": b"ours", "images/us.png": b"\x89PNG"}
    operations = [CommitOperationAdd(path, content) for path, content in stale.items()]
    any_hub.api.create_commit(name, operations, commit_message="more")
    (result / "README.md").write_text((result / "README.md").read_text() + "\nMine.\n")
    published = push(result, name)
    assert published["written"] == ["README.md"]
    assert published["deleted"] == ["pytorch_model.bin"]
    assert published["kept"] == ["LICENSE", "images/us.png", "old/notes.md"]
    downloaded = snapshot_download(name, local_dir=tmp_path / "downloaded")
    assert call("verify", downloaded, "--files-only").exit_code == 0
    assert (Path(downloaded) / "README.md").read_text().endswith("\nMine.\n")


def test_a_pull_request_is_opened_once(hub, new_id, result, pair):
    first = push(result, pair[0], "--create-pr")
    assert first["pull_request"].endswith("/discussions/1")
    assert first["changed"]
    before = hub.store.repositories[pair[0]].branches["main"]
    again = push(result, pair[0], "--create-pr")
    assert again["pull_request"] == first["pull_request"]
    assert not again["changed"]
    assert len(hub.store.repositories[pair[0]].pull_requests) == 1
    assert hub.store.repositories[pair[0]].branches["main"] == before
    # Whoever opened it, it offers the same.
    hub.store.repositories[pair[0]].pull_requests[1].author = "bob"
    assert not push(result, pair[0], "--create-pr")["changed"]
    (result / "README.md").write_text((result / "README.md").read_text() + "\nMine.\n")
    assert push(result, pair[0], "--create-pr")["pull_request"].endswith("/discussions/2")


def test_a_branch_is_made(any_hub, new_id, result):
    name = new_id("repaired")
    published = push(result, name, "--revision", "repaired")
    branches = {one.name: one.target_commit for one in any_hub.api.list_repo_refs(name).branches}
    assert branches["repaired"] == published["commit"] != branches["main"]


def test_a_repository_with_another_model_is_left_alone_unless_asked(any_hub, new_id, result, pair):
    before = any_hub.api.model_info(pair[1]).sha
    code, said = refused(result, pair[1])
    assert code == 5
    assert "holds a model that dapa-merge did not publish" in said
    assert any_hub.api.model_info(pair[1]).sha == before
    assert push(result, pair[1], "--replace")["changed"]


def test_options_that_do_not_fit_are_told_before_anything_is_done(hub, new_id, result):
    name = new_id("repaired")
    push(result, name)
    num_requests = len(hub.requests)
    for options, what in {
        ("--private",): "exists and is public",
        ("--create-pr", "--tag", "v1"): "has no use for --tag",
        ("--create-pr", "--revision", "b"): "has no use for --revision",
        ("--license", "other"): "--license other needs --license-name",
        ("--license-link", "x"): "--license-link need --license",
    }.items():
        code, said = refused(result, name, *options)
        assert (code, what in said) == (2, True), said
    assert refused(result, "nowhere")[0] == 2
    assert refused(result, "a b/c")[0] == 2
    assert not [one for one in hub.requests[num_requests:] if one.method != "GET"]


def test_a_tag_that_is_another_commits_is_refused_before_anything_is_sent(any_hub, new_id, result):
    name = new_id("repaired")
    before = push(result, name, "--tag", "v1")["commit"]
    (result / "README.md").write_text((result / "README.md").read_text() + "\nMine.\n")
    code, said = refused(result, name, "--tag", "v1")
    assert code == 2
    assert "already has the tag v1, on commit" in said
    assert any_hub.api.model_info(name).sha == before


USERS = {
    "no token": (None, "no token for the Hub was found; log in"),
    "a wrong one": ("hf_wrong", "does not accept the token"),
    "a stranger's": ("bob", "may not do that"),
    "one that may only read": ("reader", "may not do that"),
}


@pytest.mark.parametrize("who", USERS)
def test_who_may_not_write_is_told_and_no_token_shows(hub, new_id, result, monkeypatch, who):
    name, (user, said) = new_id("repaired"), USERS[who]
    hub.api.create_repo(name)
    monkeypatch.delenv("HF_TOKEN")
    token = "hf_wrong" if user == "hf_wrong" else user and hub.token(user)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    code, message = refused(result, name)
    assert code == 5
    assert said in message
    assert not token or token not in message
    for path, content in tree(result).items():
        assert not token or token.encode() not in content, path
    assert len(hub.store.repositories[name].seen()) == 1


def test_a_result_that_is_wrong_is_not_published(hub, new_id, result):
    shard = next(path for path in sorted(result.iterdir()) if path.suffix == ".safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    name = new_id("repaired")
    code, said = refused(result, name)
    assert code == 4
    assert "was not published, because it is wrong" in said
    assert name not in hub.store.repositories


def test_a_link_that_leads_out_is_not_published(hub, new_id, result, tmp_path):
    (tmp_path / "secret.md").write_text("secret")
    (result / "notes.md").symlink_to(tmp_path / "secret.md")
    code, said = refused(result, new_id("repaired"))
    assert code == 4
    assert "leads out of its folder" in said


def test_what_is_no_result_is_told(hub, new_id, llama_pair, tmp_path):
    assert refused(llama_pair[0], new_id("repaired"))[0] == 2
    assert refused(tmp_path / "nothing", new_id("repaired"))[0] in (2, 4)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("path", ["/api/repos/create", "/preupload/", "/objects/batch", "/commit/", "/tree/"])
def test_passing_faults_pass(hub, new_id, result, monkeypatch, path, status):
    # The client waits for a second before it asks again.
    monkeypatch.setattr("time.sleep", lambda _: None)
    name = new_id("repaired")
    rule = hub.faults.add(path=path, status=status, times=1, headers={"Retry-After": "0"})
    push(result, name)
    assert rule.hits == 1
    assert len(hub.store.repositories[name].seen()) == 2


@pytest.mark.parametrize("create_pr", [False, True])
def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, new_id, result, pair, create_pr):
    rule = hub.faults.add(method="POST", path="/commit/", lose_answer=True, times=1)
    name = pair[0] if create_pr else new_id("repaired")
    published = push(result, name, *(["--create-pr"] if create_pr else []))
    assert rule.hits == 1
    repository = hub.store.repositories[name]
    assert len(repository.pull_requests) == create_pr
    assert published["changed"]
    if not create_pr:
        assert len(repository.seen()) == 2
        assert published["commit"] == repository.branches["main"]


def test_an_upload_that_breaks_off_goes_on(hub, new_id, result):
    rule = hub.faults.add(method="PUT", path=".", cut_request_after=3000, times=1)
    name = new_id("repaired")
    push(result, name)
    assert rule.hits == 1
    assert not push(result, name)["changed"]


def test_a_hub_that_goes_down_in_the_middle_leaves_nothing_half(hub, new_id, result):
    name = new_id("repaired")
    hub.faults.add(method="POST", path="/commit/", status=503)
    code, said = refused(result, name)
    assert code == 5
    assert "503" in said
    assert "run the command again" in said
    assert len(hub.store.repositories[name].seen()) == 1
    hub.faults.clear()
    num_requests = len(hub.requests)
    push(result, name)
    # What was sent before is not sent again.
    assert not [one for one in hub.requests[num_requests:] if one.method == "PUT"]


def test_who_commits_meanwhile_is_not_overwritten(hub, new_id, result):
    name = new_id("repaired")
    push(result, name)
    (result / "README.md").write_text((result / "README.md").read_text() + "\nMine.\n")

    def commit() -> None:
        hub.api.create_commit(name, [CommitOperationAdd("notes.txt", b"theirs")], commit_message="theirs")

    hub.faults.add(method="POST", path="/commit/", call=commit, times=1)
    code, said = refused(result, name)
    assert code == 5
    assert "meanwhile" in said
    assert "notes.txt" in hub.store.repositories[name].files()
    assert push(result, name)["changed"]


def test_a_hub_that_has_other_bytes_afterwards_is_not_believed(hub, new_id, result, monkeypatch):
    name = new_id("repaired")

    def swap() -> None:
        repository = hub.store.repositories[name]
        files = dict(repository.files())
        files["config.json"] = hub.store.add_blob(b"{}")
        repository.commits[repository.branches["main"]] = files

    hub.faults.add(method="GET", path=f"{name}/tree/", call=swap, times=1, skip=1)
    code, said = refused(result, name)
    assert code == 5
    assert "differs from the local files" in said
    assert "config.json" in said


def test_a_job_publishes_without_a_secret(hub, new_id, result, monkeypatch):
    name = new_id("repaired")
    hub.api.create_repo(name)
    hub.trusted.add(name)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.utils._auth._OIDC_TOKEN_CACHE", None)
    for key, value in {
        "GITHUB_ACTIONS": "true",
        "HF_OIDC_RESOURCE": name,
        "ACTIONS_ID_TOKEN_REQUEST_URL": f"{hub.endpoint}/github/id-token",
        "ACTIONS_ID_TOKEN_REQUEST_TOKEN": hub.store.sign("workflow"),
    }.items():
        monkeypatch.setenv(key, value)
    assert push(result, name)["changed"]


def test_a_result_of_mergekits_is_published_too(hub, new_id, pair, llama_pair, write_recipe, tmp_path):
    out = tmp_path / "merged"
    configuration = yaml.safe_load(write_recipe(*llama_pair, layers=1).read_text())
    run_merge(
        MergeConfiguration.model_validate(configuration),
        str(out),
        MergeOptions(quiet=True),
        config_source=yaml.safe_dump(configuration),
    )
    name = new_id("repaired")
    published = push(out, name, "--target", pair[0], "--source", pair[1])
    assert published["changed"]
    card = hub.store.read(hub.store.repositories[name].files()["README.md"]).decode()
    assert "**Not measured.**" in card
    assert f"- {pair[0]}\n- {pair[1]}\n" in card
    assert "gate of layer 1" in card
    assert str(llama_pair[0]) not in card


def test_everything_that_a_reader_ever_saw_was_whole(hub, new_id, result):
    name = new_id("repaired")
    upload(hub.api, name, result)
    first = hub.store.repositories[name].files()
    (result / "config.json").write_text((result / "config.json").read_text() + "\n")
    call("push", result, name)
    for state in hub.store.repositories[name].seen()[1:]:
        assert state == first or state.keys() >= set(tree(result))


def test_xet_uploads_where_the_client_has_it(hub, new_id, llama_pair, write_recipe, tmp_path):
    name, result = new_id("repaired"), tmp_path / "out"
    assert call("run", write_recipe(*llama_pair, layers=1), result, "--no-evaluate").exit_code == 0
    hub.xet_folder = tmp_path / "xet"
    # The client is imported with Xet in a process of its own only.
    ran = dapa_merge(hub.endpoint, tmp_path / "home", "push", result, name, HF_TOKEN=hub.token("alice"), **WITH_XET)
    assert ran.returncode == 0, ran.stderr
    there = hub.store.repositories[name].files()
    weights = {path: content for path, content in tree(result).items() if path.endswith(".safetensors")}
    assert {path: there[path].sha256 for path in weights} == {
        path: hashlib.sha256(content).hexdigest() for path, content in weights.items()
    }
    assert not [one for one in hub.requests if "/lfs/objects" in one.path and name in one.path]
    stored = sum(path.stat().st_size for path in hub.xet_folder.rglob("*") if path.is_file())
    assert stored > 0
