"""What a push must not do to what others wrote, and must not say."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from blake3 import blake3
from conftest import call, change_tensor
from huggingface_hub import CommitOperationAdd
from publish.conftest import tree, upload

from dapa_merge.publish.card_file import BEGIN
from dapa_merge.publish.parents import metadata_of


def pushed(*arguments: object, code: int = 0) -> str:
    ran = call("push", *arguments)
    assert ran.exit_code == code, ran.output
    return ran.stderr if code else ran.stdout


def add(hub, name: str, revision: str | None = None, **files: str) -> None:
    operations = [CommitOperationAdd(path.replace("__", "."), text.encode()) for path, text in files.items()]
    hub.api.create_commit(name, operations, commit_message="theirs", revision=revision)


def card_of(hub, name: str, revision: str = "main") -> str:
    return hub.store.read(hub.store.repositories[name].files(revision)["README.md"]).decode()


def test_an_ignore_file_in_the_repository_leaves_nothing_out(hub, new_id, result):
    name = new_id("repaired")
    hub.api.create_repo(name)
    add(hub, name, __gitignore="*.safetensors\n*.json\n")
    pushed(result, name)
    assert hub.store.repositories[name].files().keys() >= set(tree(result))
    assert ".gitignore" in hub.store.repositories[name].files()


def test_a_branch_with_another_model_is_left_alone_too(hub, new_id, result):
    name = new_id("repaired")
    hub.api.create_repo(name)
    hub.api.create_branch(name, branch="theirs")
    add(hub, name, "theirs", pytorch_model__bin="weights")
    before = hub.store.repositories[name].branches["theirs"]
    assert "did not publish" in pushed(result, name, "--revision", "theirs", code=5)
    assert hub.store.repositories[name].branches["theirs"] == before
    pushed(result, name, "--revision", "another")


def test_what_others_put_beside_a_model_stays(hub, new_id, result):
    name = new_id("repaired")
    pushed(result, name)
    theirs = {"handler__py": "pass", "notes__txt": "x", "model-q4__gguf": "x", "training_args__bin": "x"}
    add(hub, name, **theirs)
    (result / "README.md").write_text((result / "README.md").read_text() + "\nMine.\n")
    assert "left as they are: handler.py, model-q4.gguf, notes.txt, training_args.bin" in pushed(result, name)


def test_a_result_without_a_manifest_is_published_again_too(hub, new_id, pair, write_recipe, tmp_path):
    out, name = tmp_path / "out", new_id("repaired")
    assert call("run", write_recipe(*pair, layers=1), out, "--no-evaluate", "--no-manifest").exit_code == 0
    (out / "token").write_text("secret")
    assert str(out / "token") in pushed(out, name, code=4)
    assert len(hub.store.repositories[name].seen() if name in hub.store.repositories else []) <= 1
    (out / "token").unlink()
    pushed(out, name)
    assert "nothing to do" in pushed(out, name)


def list_in_manifest(out: Path, name: str, content: bytes) -> None:
    """As a version did that copied everything in the target's folder."""
    (out / name).write_bytes(content)
    manifest = json.loads((out / "dapa.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "digest": blake3(content).hexdigest()}
    (out / "dapa.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("file", ["id_rsa", "train.jsonl", "server.key", "trainer_state.json", "model.bak"])
def test_what_is_not_a_part_of_a_model_is_not_published_whatever_the_manifest_lists(hub, new_id, result, file):
    name = new_id("repaired")
    list_in_manifest(result, file, b"private")
    noted = call("verify", result)
    assert noted.exit_code == 0, noted.output
    assert f"not a part of a model; move it elsewhere: {file}" in noted.stdout
    assert str(result / file) in pushed(result, name, code=4)
    assert name not in hub.store.repositories
    (result / file).unlink()
    assert call("verify", result, "--files-only").exit_code == 0
    pushed(result, name)
    assert file not in hub.store.repositories[name].files()


def test_an_adapter_that_the_manifest_lists_is_not_published(hub, new_id, result):
    list_in_manifest(result, "adapter_config.json", b'{"peft_type": "LORA"}')
    name = new_id("repaired")
    for command in (("verify", result), ("verify", result, "--files-only"), ("push", result, name), ("card", result)):
        refused = call(*command)
        assert refused.exit_code == 4
        assert "adapter_config.json beside its own weights" in refused.output
    assert name not in hub.store.repositories


def test_clutter_and_other_programs_weights_stay_here(hub, new_id, result):
    name = new_id("repaired")
    beside = ("._config.json", "._model-00001-of-00004.safetensors", ".DS_Store", "Thumbs.db", "model-q4.gguf")
    for file in beside:
        (result / file).write_bytes(b"x")
    for options in ((), ("--files-only",)):
        noted = call("verify", result, *options)
        assert noted.exit_code == 0, noted.output
        assert "note: model-q4.gguf was not checked" in noted.stdout
        assert "DS_Store" not in noted.stdout
    assert "model-q4.gguf stays here" in call("push", result, name).stderr
    assert not {*beside} & {*hub.store.repositories[name].files()}


@pytest.mark.parametrize("which", ["model-00002-of-00004.safetensors", "config.json"])
def test_a_file_that_changes_meanwhile_is_not_published(hub, new_id, result, which):
    name = new_id("repaired")
    hub.api.create_repo(name)
    before, path = hub.store.repositories[name].branches["main"], result / which
    content = path.read_bytes()

    def change() -> None:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    hub.faults.add(method="POST", path="/preupload/", call=change, times=1)
    ran = call("push", result, name)
    if which == "config.json":
        # It is small, and sent as it was read.
        assert ran.exit_code == 0, ran.output
        assert hub.store.read(hub.store.repositories[name].files()[which]) == content
    elif ran.exit_code:
        assert ran.exit_code == 4
        assert "changed during publishing" in ran.stderr
        assert hub.store.repositories[name].branches["main"] == before
    else:
        assert hub.store.read(hub.store.repositories[name].files()[which]) == content


def test_text_that_was_written_on_the_hub_stays(hub, new_id, result):
    name = new_id("repaired")
    pushed(result, name)
    add(hub, name, README__md=card_of(hub, name).replace(BEGIN, f"By hand.\n\n{BEGIN}"))
    assert "nothing to do" in pushed(result, name)
    (result / "config.json").write_text((result / "config.json").read_text())
    assert "By hand." in card_of(hub, name)
    assert "By hand." not in (result / "README.md").read_text()


def test_a_pull_request_to_the_fine_tune_keeps_its_card(hub, result, pair):
    add(hub, pair[0], README__md="---\nlicense: apache-2.0\ndatasets: [a/b]\n---\n# My fine-tune\n\nIt is good.\n")
    pushed(result, pair[0], "--create-pr")
    card = card_of(hub, pair[0], "refs/pr/1")
    assert card.index("# My fine-tune\n\nIt is good.") < card.index(BEGIN)
    metadata = metadata_of(card)
    assert metadata["datasets"] == ["a/b"]
    # It was not made of itself.
    assert metadata["base_model"] == pair[1] or metadata["base_model"] == [pair[1]]
    repository = hub.store.repositories[pair[0]]
    commit = repository.history[repository.resolve("refs/pr/1")]
    assert "- copied: gate of layer 1, " in commit.message
    assert f"- target: `{pair[0]}@" in commit.message


def test_the_name_of_a_folder_is_neither_a_line_nor_markup_of_a_pull_request(
    hub, new_id, llama_pair, write_recipe, tmp_path
):
    target = shutil.copytree(llama_pair[0], tmp_path / "x\n<b> @all")
    recipe = write_recipe(json.dumps(str(target)), llama_pair[1], layers=1)
    assert call("run", recipe, tmp_path / "out", "--no-evaluate").exit_code == 0
    hub.api.create_repo(name := new_id("repaired"))
    pushed(tmp_path / "out", name, "--create-pr")
    repository = hub.store.repositories[name]
    assert repository.pull_requests[1].title.startswith(r"x\n<b> @all repaired by dapa-merge")
    assert r"- target: `x\n<b> @all`" in repository.history[repository.resolve("refs/pr/1")].message.splitlines()


def test_licenses_that_come_to_differ_are_told(hub, new_id, result, pair):
    name = new_id("repaired")
    pushed(result, name)
    add(hub, pair[1], README__md="---\nlicense: llama2\n---\n")
    assert "apache-2.0" in pushed(result, name, code=2)
    assert call("card", result).exit_code == 2
    pushed(result, name, "--license", "llama2")
    assert metadata_of(card_of(hub, name))["license"] == "llama2"
    # That was somebody's word, and holds.
    assert "nothing to do" in pushed(result, name)


def test_models_that_are_named_have_to_be_those_that_it_was_made_of(
    hub, new_id, pair, llama_pair, write_recipe, tmp_path
):
    out, name = tmp_path / "local", new_id("repaired")
    assert call("run", write_recipe(*llama_pair, layers=1), out, "--no-evaluate").exit_code == 0
    ran = call("card", out, "--target", pair[1], "--source", pair[0])
    assert ran.exit_code == 4
    assert "was not made of" in ran.stderr
    assert call("card", out, "--target", pair[0], "--source", pair[1]).exit_code == 0
    commit = hub.store.repositories[pair[0]].branches["main"]
    assert f"{pair[0]}@{commit}" in (out / "README.md").read_text()
    # What was said once holds: nothing turns back to a folder.
    pushed(out, name)
    assert metadata_of(card_of(hub, name))["base_model"] == list(pair)
    assert "nothing to do" in pushed(out, name)


def downloaded(hub, name: str, folder: Path) -> Path:
    """The files of a repository in a folder, as somebody else gets them."""
    for path, digest in hub.store.repositories[name].files().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(hub.store.read(digest))
    return folder


@pytest.fixture(params=["relative paths", "whole paths"])
def private_result(request, llama_pair, write_recipe, tmp_path, monkeypatch) -> Path:
    """A result of folders and files of this machine."""
    private = tmp_path / "private"
    for role, folder in zip(("target", "source"), llama_pair, strict=True):
        shutil.copytree(folder, private / role / "model")
    for name in ("p", "kept"):
        (private / f"{name}.csv").write_text("prompt\nhow?\n")
    monkeypatch.chdir(private)
    start = "" if request.param == "relative paths" else f"{private}/"
    options = {"prompts": f"{start}p.csv,builtin", "keep": f"{start or './'}kept.csv"}
    recipe = write_recipe(f"{start}target/model", f"{start}source/model", layers=1, **options)
    ran = call("run", recipe, tmp_path / "out", "--no-evaluate", "--lock")
    assert ran.exit_code == 0, ran.output
    # Another place, where no such folders are.
    monkeypatch.chdir(tmp_path)
    return tmp_path / "out"


def test_no_published_file_names_a_path_of_this_machine(hub, new_id, private_result, tmp_path):
    assert str(tmp_path) in (private_result / "mergekit_config.yml").read_text()
    name = new_id("repaired")
    ran = call("push", private_result, name)
    assert ran.exit_code == 0, ran.output
    assert "./target/model and ./source/model" in ran.stderr
    theirs = downloaded(hub, name, tmp_path / "theirs")
    for path in theirs.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    recipe = yaml.safe_load((theirs / "mergekit_config.yml").read_text())
    assert recipe["base_model"] == "./target/model"
    assert recipe["models"] == [{"model": "./source/model"}]
    assert recipe["parameters"]["keep"] == "kept.csv"
    assert recipe["parameters"]["layers"] == yaml.safe_load((private_result / "mergekit_config.yml").read_text())[
        "parameters"
    ]["layers"]  # fmt: skip
    report = json.loads((theirs / "dapa_report.json").read_text())
    assert (report["target"], report["source"]) == ("./target/model", "./source/model")
    # Nothing else of the report differs, and nothing of the result.
    mine = json.loads((private_result / "dapa_report.json").read_text())
    assert {key for key in mine if mine[key] != report[key]} <= {"target", "source", "prompts", "keep"}
    assert "nothing to do" in pushed(private_result, name)


def test_what_was_published_without_paths_is_verified_by_anybody(hub, new_id, private_result, llama_pair, tmp_path):
    name = new_id("repaired")
    pushed(private_result, name)
    theirs = downloaded(hub, name, tmp_path / "theirs")
    assert call("verify", theirs, "--files-only").exit_code == 0
    ran = call("verify", theirs, "--target", llama_pair[0], "--source", llama_pair[1])
    assert ran.exit_code == 0, ran.output
    alone = call("verify", theirs)
    assert alone.exit_code in (2, 4, 5)
    assert "./target/model" in alone.stderr
    assert "--target" in alone.stderr


def test_what_was_published_without_paths_says_whether_it_is_outdated(
    hub, new_id, private_result, tmp_path, monkeypatch
):
    name, recipe = new_id("repaired"), next(tmp_path.glob("*.yml"))
    # The recipe may have relative paths.
    monkeypatch.chdir(tmp_path / "private")
    pushed(private_result, name)
    ran = call("outdated", recipe, "--published", name)
    assert ran.exit_code == 0, ran.output
    change_tensor(tmp_path / "private" / "source" / "model", "model.norm.weight", lambda values: values.add_(1))
    ran = call("outdated", recipe, "--published", name)
    assert ran.exit_code == 10, ran.output
    assert "source ./source/model: moved" in ran.stdout


def test_models_that_are_published_too_are_named_by_their_commits_in_every_file(
    hub, new_id, pair, private_result, tmp_path
):
    name = new_id("repaired")
    ran = call("push", private_result, name, "--target", pair[0], "--source", pair[1])
    assert ran.exit_code == 0, ran.output
    assert "nobody else has" not in ran.stderr
    theirs = downloaded(hub, name, tmp_path / "theirs")
    target, source = (f"{model}@{hub.store.repositories[model].branches['main']}" for model in pair)
    recipe = yaml.safe_load((theirs / "mergekit_config.yml").read_text())
    assert (recipe["base_model"], recipe["models"]) == (target, [{"model": source}])
    report = json.loads((theirs / "dapa_report.json").read_text())
    assert (report["target"], report["source"]) == (target, source)
    ran = call("verify", theirs)
    assert ran.exit_code == 0, ran.output


@pytest.mark.parametrize("who", ["bob", "reader"])
def test_who_may_not_write_is_told_before_the_work(hub, new_id, pair, write_recipe, tmp_path, monkeypatch, who):
    name = new_id("repaired")
    hub.api.create_repo(name)
    monkeypatch.setenv("HF_TOKEN", hub.token(who))
    ran = call("run", write_recipe(*pair, layers=1), tmp_path / "out", "--no-evaluate", "--push", name)
    assert ran.exit_code == 5, ran.output
    assert not (tmp_path / "out").exists()


def test_the_way_on_after_a_failed_push_is_the_same_push(hub, new_id, pair, write_recipe, tmp_path):
    name, out = new_id("repaired"), tmp_path / "an out"
    hub.faults.add(method="POST", path="/repos/create", status=409, message="no")
    options = ("--push", name, "--private", "--tag", "v 1", "--license", "apache-2.0")
    ran = call("run", write_recipe(*pair, layers=1), out, "--no-evaluate", *options)
    assert ran.exit_code == 5, ran.output
    assert f"dapa-merge push '{out}' {name} --private --tag 'v 1' --license apache-2.0" in ran.stderr


def test_a_strangers_license_writes_nothing_into_a_card(hub, new_id, llama_pair, write_recipe, tmp_path):
    names = new_id("target"), new_id("source")
    evil = '---\nlicense: other\nlicense_name: "x\\n\\n# Verified safe"\nlicense_link: "javascript://x"\n---\n'
    for name, folder in zip(names, llama_pair, strict=True):
        hub.api.create_repo(name)
        upload(hub.api, name, shutil.copytree(folder, tmp_path / "models" / name), card="")
        hub.store.repositories[name].files()
    for name in names:
        tree_of = dict(hub.store.repositories[name].files())
        tree_of["README.md"] = hub.store.add_blob(evil.encode())
        repository = hub.store.repositories[name]
        repository.commits[repository.branches["main"]] = tree_of
    out = tmp_path / "out"
    ran = call("run", write_recipe(*names, layers=1), out, "--no-evaluate")
    assert ran.exit_code == 0
    assert "without a name" in ran.stderr
    assert call("card", out, "--license", "mit").exit_code == 0
    text = (Path(out) / "README.md").read_text()
    assert "Verified safe" not in text
    assert "javascript" not in text


@pytest.mark.parametrize("license", ["", " ", "two words", "mit\n# x", "x" * 200])
def test_a_license_that_is_none_is_refused(result, license):
    ran = call("card", result, "--license", license)
    assert ran.exit_code == 2
    assert "is not valid in a card" in ran.stderr


def test_a_card_that_the_hub_refuses_is_told_with_the_reason(hub, new_id, result):
    name = new_id("repaired")
    assert call("card", result, "--license", "mit").exit_code == 0
    card = result / "README.md"
    # By hand, and in the card only.
    card.write_text(card.read_text().replace("license: mit", "license: nonsense").replace('"license": "mit"', ""))
    said = pushed(result, name, code=5)
    assert "refuse the card" in said
    assert "license" in said.partition("refuse the card")[2]


def test_a_card_whose_note_somebody_damaged_is_told(result):
    card = result / "README.md"
    text = card.read_text()
    for note in ('{"target": "a@b@c"}', '{"target": "+"}'):
        card.write_text(text.replace("<!-- said: {", f"<!-- said: {note} -->\n<!-- {{", 1))
        ran = call("card", result)
        assert ran.exit_code == 2, ran.output
        assert "the target in the card" in ran.stderr
    # What is no note at all says nothing.
    card.write_text(text.replace("<!-- said: {", "<!-- said: [", 1))
    assert call("card", result).exit_code == 0
