"""The whole chain, without a network: repair, publish, download, verify; a model moves, and the job redoes it."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import warm
from action_runner import run_action
from conftest import change_tensor, write_few
from hub_server import dapa_merge
from hub_stand_in import serve
from huggingface_hub import HfApi, snapshot_download
from publish.conftest import CARD, connect, reaching_servers

import dapa_merge as dapa_merge_package
from dapa_merge import miniature
from dapa_merge.publish.parents import metadata_of

ACTION = Path(__file__).parent.parent / ".github" / "actions" / "remerge"
TARGET, SOURCE, REPAIRED = "alice/target", "alice/source", "alice/repaired"


def recipe_text(prompts: Path) -> str:
    return f"""\
merge_method: dapa
base_model: {TARGET}
models:
  - model: {SOURCE}
parameters:
  layers: auto
  prompts: {prompts}
  max_new_tokens: 12
  batch_size: 128
"""


GATES = {"min-dsr": "0.9", "max-over-refusal": "0.05", "max-perplexity-ratio": "1.1"}


class Job:
    """A job's machine: a workspace with the recipe, and a cache that outlives it."""

    def __init__(self, folder: Path, hub, recipe: str):
        self.folder, self.hub, self.number = folder, hub, 0
        self.work = folder / "work"
        self.work.mkdir(parents=True)
        (self.work / "recipe.yml").write_text(recipe)
        self.bin = folder / "bin"
        self.bin.mkdir()

    def run(self, **inputs: str):
        with warm.program(self.bin / "dapa-merge", "from dapa_merge.cli import main; main()"):
            return self._run(**inputs)

    def _run(self, **inputs: str):
        self.number += 1
        temp = self.folder / f"temp{self.number}"
        temp.mkdir()
        env = {
            "PATH": os.pathsep.join([str(self.bin), str(Path(sys.executable).parent), os.defpath]),
            "HOME": str(temp),
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "XDG_CACHE_HOME": str(temp / "cache"),
            "OMP_NUM_THREADS": "1",
            # The package that is tested, wherever it is imported from.
            "PYTHONPATH": str(Path(dapa_merge_package.__file__).parents[1]),
        }
        given = {"recipe": "recipe.yml", "repository": REPAIRED, "token": self.hub.token("alice"), **GATES, **inputs}
        where = {"workspace": self.work, "temp": temp}
        return run_action(ACTION, given, env, self.uses, skip=("install",), **where)

    def uses(self, reference: str, inputs: dict[str, str]) -> None:
        """What the cache of GitHub does; its actions are not here."""
        kept = self.folder / "kept"
        if reference.startswith("actions/cache/restore") and kept.is_dir():
            shutil.copytree(kept, inputs["path"], dirs_exist_ok=True)
        elif reference.startswith("actions/cache/save"):
            shutil.copytree(inputs["path"], kept, dirs_exist_ok=True)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with reaching_servers(monkeypatch), serve(tmp_path / "hub") as hub:
        yield hub


def upload(api: HfApi, name: str, folder: Path) -> None:
    (folder / "README.md").write_text(CARD)
    api.create_repo(name, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=folder)


def test_a_repaired_model_is_published_and_redone_when_its_target_moves(hub, tmp_path, monkeypatch):
    api = connect(hub, monkeypatch)
    target = shutil.copytree(miniature.path("target"), tmp_path / "target")
    upload(api, TARGET, target)
    upload(api, SOURCE, shutil.copytree(miniature.path("source"), tmp_path / "source"))
    recipe, home, token = (
        tmp_path / "recipe.yml",
        tmp_path / "home",
        {"HF_TOKEN": hub.token("alice"), "OMP_NUM_THREADS": "1"},
    )
    recipe.write_text(recipe_text(write_few(tmp_path / "prompts", 16)))

    # Repair and publish.
    ran = dapa_merge(hub.endpoint, home, "run", recipe, tmp_path / "out", "--push", REPAIRED, **token)
    assert ran.returncode == 0, ran.stderr
    card = metadata_of(hub.store.read(hub.store.repositories[REPAIRED].files()["README.md"]).decode())
    assert card["base_model"] == [TARGET, SOURCE]
    assert card["license"] == "apache-2.0"
    assert (tmp_path / "out" / "dapa_responses.html").is_file()
    assert not {"dapa_responses.jsonl", "dapa_responses.html"} & {*hub.store.repositories[REPAIRED].files()}

    # A stranger downloads and verifies it.
    downloaded = snapshot_download(REPAIRED, local_dir=tmp_path / "downloaded")
    ran = dapa_merge(hub.endpoint, tmp_path / "elsewhere", "verify", downloaded)
    assert ran.returncode == 0, ran.stderr
    assert "correct: 93 tensors compared" in ran.stdout

    # Nothing moved: the job has nothing to do.
    job = Job(tmp_path / "job", hub, recipe.read_text())
    done = job.run()
    assert done.exit_code == 0, done.steps["outdated"].log
    assert done.outputs == {"outdated": "false", "gate": "", "url": ""}
    assert dapa_merge(hub.endpoint, home, "outdated", recipe).returncode == 0

    # A new revision of the target appears.
    change_tensor(target, "model.norm.weight", lambda values: values[:1].mul_(1.1))
    upload(api, TARGET, target)
    assert dapa_merge(hub.endpoint, home, "outdated", recipe).returncode == 10
    before = hub.store.repositories[REPAIRED].branches["main"]
    refused = job.run(**{"max-perplexity-ratio": "0.5"})
    assert refused.exit_code == 6, {name: step.log[-900:] for name, step in refused.steps.items()}
    assert refused.outputs["gate"] == "failed"
    assert "**fails**" in refused.summary
    assert not hub.store.repositories[REPAIRED].pull_requests
    done = job.run()
    assert done.exit_code == 0, {name: step.log[-2000:] for name, step in done.steps.items()}
    assert done.outputs == {"outdated": "true", "gate": "passed", "url": f"{hub.endpoint}/{REPAIRED}/discussions/1"}
    assert "tests, by the journal" in done.steps["run"].log
    assert hub.store.repositories[REPAIRED].branches["main"] == before

    # While it waits, and when it was merged, there is nothing to do.
    assert job.run().outputs["outdated"] == "false"
    api.merge_pull_request(REPAIRED, 1)
    assert job.run().outputs["outdated"] == "false"
    downloaded = snapshot_download(REPAIRED, local_dir=tmp_path / "again")
    assert dapa_merge(hub.endpoint, tmp_path / "elsewhere", "verify", downloaded).returncode == 0
    for step in (*done.steps.values(), *refused.steps.values()):
        assert hub.token("alice") not in step.log
