"""A Hub on this machine, or the one that DAPA_HUB_ENDPOINT names, with a pair of models in it."""

from __future__ import annotations

import contextlib
import copy
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
from conftest import call, without_certificates
from hub_protocol import Hub
from hub_stand_in import serve, some_hub
from hub_store import Repository
from huggingface_hub import HfApi

CARD = "---\nlicense: apache-2.0\nlanguage: [en]\n---\n# A model\n"


@contextlib.contextmanager
def reaching_servers(monkeypatch) -> Iterator[None]:
    """Let this process's client ask servers, without Xet; the connections that it keeps are closed afterwards."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    if "DAPA_HUB_ENDPOINT" not in os.environ:
        without_certificates(monkeypatch)
    yield
    huggingface_hub.close_session()


def connect(hub, monkeypatch) -> HfApi:
    """The unmodified client of the Hub, as alice, in the process of a test."""
    # Some versions of the client understand addresses of repositories at the default endpoint only.
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    return HfApi(endpoint=hub.endpoint, token=hub.token("alice"))


def ready(hub, monkeypatch, folder: Path) -> HfApi:
    """Have this process ask that hub, as alice, with an empty cache and without waiting."""
    api = connect(hub, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", hub.token("alice"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub-cache"))
    monkeypatch.setattr("dapa_merge.hub_client.WAITS", (0.0, 0.0, 0.0))
    return api


@pytest.fixture
def any_hub(tmp_path, monkeypatch) -> Iterator[object]:
    """Either server; tests that ask no more of it run against the real Hub as well."""
    with reaching_servers(monkeypatch), some_hub(tmp_path / "hub") as hub:
        hub.api = ready(hub, monkeypatch, tmp_path)
        yield hub


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[object]:
    """The stand-in, whose inside a test sees, and which fails when told to."""
    with reaching_servers(monkeypatch), serve(tmp_path / "hub") as hub:
        hub.api = ready(hub, monkeypatch, tmp_path)
        yield hub


@pytest.fixture
def new_id(request) -> Iterator[Callable[[str], str]]:
    """Makes ids of repositories, which are removed afterwards."""
    hub = request.getfixturevalue("any_hub" if "any_hub" in request.fixturenames else "hub")
    made = []

    def new(name: str) -> str:
        made.append(f"{hub.namespace}/{name}-{secrets.token_hex(4)}")
        return made[-1]

    yield new
    for name in made:
        hub.api.delete_repo(name, missing_ok=True)


def upload(api: HfApi, repository: str, folder: Path, card: str = CARD) -> str:
    """Publish a model as anybody does; gives the commit."""
    copy = shutil.copytree(folder, folder.parent / f"upload-{secrets.token_hex(4)}")
    if card:
        (copy / "README.md").write_text(card)
    api.create_repo(repository, exist_ok=True)
    return api.upload_folder(repo_id=repository, folder_path=copy).oid


@dataclass
class Made:
    """A stand-in with the random pair and the result of a run with them: made once, and copied by the tests.

    Attributes:
        folder: With `hub`, `hub-cache`, `out`, the recipe and its lock, as in the folder of a test.
        pair: The names of target and source.
        repositories: The stand-in's.
    """

    folder: Path
    pair: tuple[str, str]
    repositories: dict[str, Repository]


@pytest.fixture(scope="session")
def made(llama_pair, tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch, reaching_servers(patch), serve(folder / "hub") as hub:
        hub.api = ready(hub, patch, folder)
        names = tuple(f"{hub.namespace}/{role}-{secrets.token_hex(4)}" for role in ("target", "source"))
        for name, model in zip(names, llama_pair, strict=True):
            upload(hub.api, name, shutil.copytree(model, folder / "models" / name))
        recipe_of(names, folder)
        run_recipe(folder)
        return Made(folder, names, copy.deepcopy(hub.store.repositories))


def recipe_of(pair: tuple[str, str], folder: Path) -> None:
    """As `write_recipe` writes it, with the gate of layer 1."""
    (folder / "recipe.yml").write_text(
        f"merge_method: dapa\nbase_model: {pair[0]}\nmodels:\n  - model: {pair[1]}\nparameters:\n  layers: 1\n"
    )


def run_recipe(folder: Path) -> None:
    ran = call("run", folder / "recipe.yml", folder / "out", "--no-evaluate", "--lock")
    assert ran.exit_code == 0, ran.output


@pytest.fixture
def pair(request, llama_pair, tmp_path) -> tuple[str, str]:
    """A target and a source in the hub."""
    hub = request.getfixturevalue("any_hub" if "any_hub" in request.fixturenames else "hub")
    if isinstance(hub, Hub):
        made = request.getfixturevalue("made")
        hub.store.repositories |= copy.deepcopy(made.repositories)
        shutil.copytree(made.folder / "hub", hub.store.folder, dirs_exist_ok=True)
        return made.pair
    new_id = request.getfixturevalue("new_id")
    names = new_id("target"), new_id("source")
    for name, folder in zip(names, llama_pair, strict=True):
        upload(hub.api, name, shutil.copytree(folder, tmp_path / "models" / name))
    return names


@pytest.fixture
def result(pair, request, tmp_path) -> Path:
    """One of that pair, with the gate of layer 1; the recipe and its lock are beside it."""
    recipe_of(pair, tmp_path)
    if "DAPA_HUB_ENDPOINT" in os.environ and "any_hub" in request.fixturenames:
        run_recipe(tmp_path)
    else:
        made = request.getfixturevalue("made").folder
        for name in ("out", "hub-cache"):
            shutil.copytree(made / name, tmp_path / name, symlinks=True)
        shutil.copy(made / "recipe.lock.yml", tmp_path)
    return tmp_path / "out"


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder that is not hidden."""
    found = {}
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                path = Path(parent) / name
                found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found
