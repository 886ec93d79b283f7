"""What a recipe was followed with, and what became of that."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import call, change_tensor, save_random, sha256_of, tiny_llama
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from publish.conftest import CARD, recipe_of, run_recipe, upload

from dapa_merge.checkpoint.digest import settings_files
from dapa_merge.checkpoint.location import Location
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.errors import CheckpointError
from dapa_merge.publish.lock import lock_path, lock_text, parse_lock, read_lock, recipe_digest
from dapa_merge.recipe.parse import load_recipe, parse_recipe


def outdated(*arguments: object, code: int) -> dict:
    ran = call("outdated", *arguments, "--json")
    assert ran.exit_code == code, ran.output
    return json.loads(ran.stdout)


@pytest.fixture
def local_pair(llama_pair, tmp_path) -> tuple[Path, Path]:
    """Copies that a test may change."""
    return tuple(shutil.copytree(folder, tmp_path / name) for folder, name in zip(llama_pair, "ts", strict=True))


@pytest.fixture
def locked(local_pair, write_recipe, tmp_path) -> Path:
    """A recipe for folders that was run."""
    recipe = write_recipe(*local_pair, layers=1)
    assert call("run", recipe, tmp_path / "out", "--no-evaluate", "--lock").exit_code == 0
    return recipe


def test_a_lock_has_every_file_that_decides(locked, local_pair, tmp_path):
    lock = read_lock(lock_path(locked))
    assert lock == read_lock(tmp_path / "out" / "recipe.lock.yml")
    assert lock.units == ("1.gate",)
    for folder, (upstream,) in zip(local_pair, (lock.target, lock.source), strict=True):
        checkpoint = open_checkpoint(str(folder))
        names = {*settings_files(checkpoint), *checkpoint.shards, "model.safetensors.index.json"}
        assert dict(upstream.files) == {name: sha256_of(folder / name) for name in names}
        assert (upstream.commit, upstream.revision, upstream.model) == (None, None, str(folder))
    assert {"dapa-merge", "torch", "transformers"} <= lock.versions.keys()
    assert parse_lock(lock_text(lock), "lock") == lock


def test_comments_do_not_change_a_recipe_but_every_key_does():
    text = "merge_method: dapa\nbase_model: a\nmodels:\n  - model: b\n"
    recipe = parse_recipe(text)
    assert recipe_digest(parse_recipe("# why\n" + text)) == recipe_digest(recipe)
    others = [
        replace(recipe, target=Location("a", "v2")),
        replace(recipe, source=Location("b", None, Location("lora"))),
        replace(recipe, retain=0.9),
        replace(recipe, strength=0.5),
    ]
    assert len({recipe_digest(one) for one in (recipe, *others)}) == 5


def test_nothing_changed_in_folders(locked):
    news = outdated(locked, code=0)
    assert not news["outdated"]
    assert [model["role"] for model in news["models"]] == ["target", "source"]
    assert "up to date" in call("outdated", locked).stdout


def test_a_recipe_that_was_never_run_is_outdated(local_pair, write_recipe):
    assert outdated(write_recipe(*local_pair, layers=1), code=10)["lock"] is None


def test_a_changed_recipe_is_outdated_and_cannot_be_followed_as_locked(locked, tmp_path):
    locked.write_text(locked.read_text().replace("layers: 1", "layers: 2"))
    assert outdated(locked, code=10)["recipe_changed"]
    ran = call("run", locked, tmp_path / "again", "--no-evaluate", "--locked")
    assert ran.exit_code == 2
    assert "the recipe changed since it was locked" in ran.stderr
    assert not (tmp_path / "again").exists()


CHANGES = {
    "weights": lambda folder: change_tensor(folder, "model.norm.weight", lambda values: values.zero_()),
    "config": lambda folder: (folder / "config.json").write_text((folder / "config.json").read_text() + " "),
    "a new template": lambda folder: (folder / "chat_template.jinja").write_text("{{ 1 }}"),
    "a lost file": lambda folder: (folder / "generation_config.json").unlink(),
}


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("what", CHANGES)
def test_a_folder_that_changed_is_outdated_and_not_what_was_locked(locked, local_pair, tmp_path, what, which):
    CHANGES[what](local_pair[which])
    news = outdated(locked, code=10)
    assert [model["outdated"] for model in news["models"]] == [which == 0, which == 1]
    ran = call("run", locked, tmp_path / "again", "--no-evaluate", "--locked")
    assert ran.exit_code == 4
    assert f"{local_pair[which]} changed since it was locked" in ran.stderr
    assert not (tmp_path / "again").exists()


def test_a_card_does_not_count(locked, local_pair):
    (local_pair[0] / "README.md").write_text("# Another card\n")
    assert not outdated(locked, code=0)["outdated"]


def test_a_locked_run_gives_the_same_files(locked, tmp_path):
    assert call("run", locked, tmp_path / "again", "--no-evaluate", "--locked").exit_code == 0
    for path in (tmp_path / "out").iterdir():
        if path.name not in ("README.md", "dapa_report.json", "dapa.json"):
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    lock = lock_path(locked)
    before = lock.read_bytes()
    assert call("run", locked, tmp_path / "third", "--no-evaluate", "--locked", "--no-lock").exit_code == 2
    lock.unlink()
    ran = call("run", locked, tmp_path / "third", "--no-evaluate", "--locked")
    assert ran.exit_code == 2
    assert "recipe.lock.yml" in ran.stderr
    lock.write_bytes(before.replace(b"format: 1", b"format: 9"))
    assert call("run", locked, tmp_path / "third", "--no-evaluate", "--locked").exit_code == 4


def test_a_mere_transplant_locks_only_if_asked(local_pair, write_recipe, tmp_path):
    recipe = write_recipe(*local_pair, layers=1)
    assert call("run", recipe, tmp_path / "out", "--no-evaluate").exit_code == 0
    assert not lock_path(recipe).exists()
    assert not (tmp_path / "out" / "recipe.lock.yml").exists()


BAD = {
    "no yaml": "a: [",
    "a list": "- 1",
    "nothing": "",
    "more than any model has": "#" * (1 << 20),
    "another format": "format: 2",
    "a short hash": "recipe: abc",
    "a path for a hash": "files: {config.json: ../../x}",
    "a number": "selection: 3",
}


AS_IT_IS = ("no yaml", "a list", "nothing", "more than any model has")


@pytest.mark.parametrize("what", BAD)
def test_a_damaged_lock_is_told(locked, what):
    path = lock_path(locked)
    content = yaml.safe_load(path.read_text())
    damage = yaml.safe_load(BAD[what]) if what not in AS_IT_IS else None
    if damage is None:
        path.write_text(BAD[what])
    else:
        content["target"][0].update(damage) if "files" in damage else content.update(damage)
        path.write_text(yaml.safe_dump(content))
    with pytest.raises(CheckpointError, match=path.name):
        read_lock(path)
    ran = call("outdated", locked)
    assert ran.exit_code == 4
    assert ran.stderr.count("\n") == 1


EDITS = {
    "another model": ({"target": {"model": "bob/evil"}}, 4, "the lock is not for "),
    "a forged line": ({"source": {"model": "x\n::warning::y"}}, 4, "the lock is not for "),
    "other units": ({"selection": "2.gate"}, 2, "names other units than the lock"),
    "no units": ({"selection": ""}, 2, "names no units"),
    "no such units": ({"selection": "9.gate"}, 2, "outside the target"),
    "nonsense": ({"selection": "gates"}, 2, "are not units"),
}


@pytest.mark.parametrize("what", EDITS)
def test_a_lock_that_somebody_edited_is_not_followed(locked, tmp_path, what):
    edit, code, said = EDITS[what]
    content = yaml.safe_load(lock_path(locked).read_text())
    for key, value in edit.items():
        content[key] = [{**content[key][0], **value}] if isinstance(value, dict) else value
    lock_path(locked).write_text(yaml.safe_dump(content))
    ran = call("run", locked, tmp_path / "again", "--no-evaluate", "--locked")
    assert ran.exit_code == code, ran.output
    assert said in ran.stderr
    assert "::warning::" not in [line[:11] for line in ran.output.splitlines()]
    assert not (tmp_path / "again").exists()


def test_code_counts_and_notes_do_not(locked, local_pair):
    (local_pair[0] / "requirements.txt").write_text("torch\n")
    outdated(locked, code=0)
    (local_pair[0] / "modeling_x.py").write_text("pass\n")
    assert outdated(locked, code=10)["models"][0]["added"] == ["modeling_x.py"]


@pytest.fixture
def hub_recipe(pair, result, tmp_path) -> Path:
    """A recipe for that pair in the hub, which was run."""
    assert result.is_dir()
    return tmp_path / "recipe.yml"


def test_the_hub_says_the_digests_of_weights_that_were_never_fetched(hub, pair, llama_pair, tmp_path):
    recipe_of(pair, tmp_path)
    run_recipe(tmp_path)
    lock = read_lock(lock_path(tmp_path / "recipe.yml"))
    for name, folder, (upstream,) in zip(pair, llama_pair, (lock.target, lock.source), strict=True):
        assert upstream.commit == hub.store.repositories[name].branches["main"]
        assert dict(upstream.files) == {path: sha256_of(folder / path) for path in upstream.files}
    assert load_recipe(tmp_path / "out" / "mergekit_config.yml").target.revision == lock.target[0].commit
    fetched = [one.path for one in hub.requests if one.method == "GET" and f"{pair[1]}/resolve" in one.path]
    whole = [one for one in fetched if one.endswith(".safetensors")]
    # Ranges for the gates and the headers; nothing for the lock.
    assert len(whole) <= 2 * len(lock.source[0].files)
    assert not outdated(tmp_path / "recipe.yml", code=0)["outdated"]


def test_a_commit_counts_if_it_changes_a_file_that_decides(any_hub, hub_recipe, pair):
    any_hub.api.create_commit(
        pair[0], [CommitOperationAdd("README.md", f"{CARD}Better.\n".encode())], commit_message="card"
    )
    news = outdated(hub_recipe, code=0)
    target = news["models"][0]
    assert target["commit"] != target["locked_commit"]
    assert "no relevant file differs" in call("outdated", hub_recipe).stdout
    any_hub.api.create_commit(pair[1], [CommitOperationAdd("config.json", b"{}")], commit_message="config")
    assert outdated(hub_recipe, code=10)["models"][1]["changed"] == ["config.json"]


def test_new_weights_are_outdated_and_a_locked_run_still_has_the_old(any_hub, hub_recipe, pair, tmp_path):
    newer = save_random(tmp_path / "newer", tiny_llama(), seed=9)
    upload(any_hub.api, pair[0], newer)
    news = outdated(hub_recipe, code=10)
    assert any(name.endswith(".safetensors") for name in news["models"][0]["changed"])
    ran = call("run", hub_recipe, tmp_path / "again", "--no-evaluate", "--locked")
    assert ran.exit_code == 0, ran.output
    shard = "model-00001-of-00004.safetensors"
    assert (tmp_path / "again" / shard).read_bytes() == (tmp_path / "out" / shard).read_bytes()
    ran = call("run", hub_recipe, tmp_path / "new", "--no-evaluate", "--lock")
    assert ran.exit_code == 0, ran.output
    assert (tmp_path / "new" / shard).read_bytes() != (tmp_path / "out" / shard).read_bytes()
    assert not outdated(hub_recipe, code=0)["outdated"]


def test_a_locked_commit_that_is_gone_is_told(hub, hub_recipe, pair, tmp_path, monkeypatch):
    lock = read_lock(lock_path(hub_recipe))
    del hub.store.repositories[pair[0]].commits[lock.target[0].commit]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    ran = call("run", hub_recipe, tmp_path / "again", "--no-evaluate", "--locked")
    assert ran.exit_code == 5
    assert pair[0] in ran.stderr


@pytest.mark.parametrize("how", ["down", "500", "gone", "a wrong token"])
def test_a_hub_that_does_not_tell_is_an_error_and_never_up_to_date(hub, hub_recipe, pair, monkeypatch, how):
    if how == "down":
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    elif how == "500":
        hub.faults.add(path="/api/models/", status=500)
    elif how == "gone":
        del hub.store.repositories[pair[0]]
    else:
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    ran = call("outdated", hub_recipe, "--json")
    assert ran.exit_code == 5, ran.output
    assert ran.stdout == ""
    assert ran.stderr.count("\n") == 1


def test_a_revision_that_moves_between_lock_and_opening_is_told(hub, pair, write_recipe, tmp_path):
    def move() -> None:
        hub.api.create_commit(pair[0], [CommitOperationDelete("generation_config.json")], commit_message="less")

    # The first question about it is the lock's.
    hub.faults.add(method="GET", path=f"/api/models/{pair[0]}", call=move, times=1, skip=1)
    ran = call("run", write_recipe(*pair, layers=1), tmp_path / "out", "--no-evaluate", "--lock")
    assert ran.exit_code == 5
    assert "while it was opened" in ran.stderr
    assert not (tmp_path / "out").exists()


def test_what_is_published_says_whether_it_is_outdated(hub, hub_recipe, pair, new_id, result):
    name = new_id("repaired")
    ran = call("outdated", hub_recipe, "--published", name)
    assert ran.exit_code == 5
    assert "does not exist, or the token may not see it" in ran.stderr
    hub.api.create_repo(name)
    assert outdated(hub_recipe, "--published", name, code=10)["lock"] is None
    assert call("push", result, name, "--create-pr").exit_code == 0
    # A pull request that waits is enough; a stranger's is not.
    assert "/discussions/1" in outdated(hub_recipe, "--published", name, code=0)["lock"]
    hub.store.repositories[name].pull_requests[1].author = "bob"
    outdated(hub_recipe, "--published", name, code=10)
    hub.store.repositories[name].pull_requests[1].author = "alice"
    hub.api.merge_pull_request(name, 1)
    assert outdated(hub_recipe, "--published", name, code=0)["lock"] == f"{name}/recipe.lock.yml"
    upload(hub.api, pair[0], result)
    outdated(hub_recipe, "--published", name, code=10)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_is_locked_too(local_pair, write_recipe, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(local_pair[0])
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(tmp_path / "lora")
    recipe = write_recipe(f"{local_pair[0]}+{tmp_path / 'lora'}", local_pair[1], layers=1)
    assert call("run", recipe, tmp_path / "out", "--no-evaluate", "--lock").exit_code == 0
    assert [model["role"] for model in outdated(recipe, code=0)["models"]] == ["target", "target's adapter", "source"]
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    assert outdated(recipe, code=10)["models"][1]["changed"] == ["adapter_config.json"]
