"""Models from the Hub, against a real HTTP server on this machine and in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from hub_server import SHA, hub


def dapa_merge(endpoint, home, *arguments):
    code = "import sys\nfrom dapa_merge.cli import main\nmain(sys.argv[1:])"
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**environment, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"},
    )


@pytest.fixture
def repositories(llama_pair, tmp_path):
    """The random pair as repositories, with files beside the model that must not be fetched."""
    target = shutil.copytree(llama_pair[0], tmp_path / "served" / "target")
    (target / "pytorch_model.bin").write_bytes(b"pickle")
    (target / "modeling_evil.py").write_text("raise SystemExit")
    return {"someone/target": target, "someone/source": llama_pair[1]}


def test_a_recipe_may_name_repositories_and_revisions(repositories, write_recipe, tmp_path):
    recipe = write_recipe("someone/target@v1", "someone/source", layers=2)
    with hub(repositories) as (endpoint, log):
        result = dapa_merge(endpoint, tmp_path / "home", "run", recipe, tmp_path / "out", "--no-evaluate", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["target"], report["source"]) == ("someone/target@v1", "someone/source")
    assert any(f"/resolve/{SHA}/config.json" in line for line in log)
    assert not [line for line in log if "pytorch_model.bin" in line]
    replayed = (tmp_path / "out" / "mergekit_config.yml").read_text()
    assert f"base_model: someone/target@{SHA}" in replayed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        {
            *(path.name for path in repositories["someone/source"].iterdir()),
            "modeling_evil.py",  # a part of the target, carried over and never run
            "dapa.json",
            "dapa_report.json",
            "mergekit_config.yml",
        }
    )
    # The cache is links to shared blobs; the result is not.
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


CASES = {
    "no such repository": ("someone/nothing", {}, "someone/nothing"),
    "no such revision": ("someone/target@v9", {}, "someone/target"),
    "forbidden": ("someone/gated", {"someone/gated": 403}, "someone/gated"),
    "the Hub's own fault": ("someone/target", {"someone/target": 500}, "someone/target"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_hub_that_says_no_is_one_sentence_and_exit_5(repositories, tmp_path, case):
    model, statuses, name = CASES[case]
    with hub(repositories, statuses) as (endpoint, _):
        result = dapa_merge(endpoint, tmp_path / "home", "evaluate", model)
    assert result.returncode == 5, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"Error: {name} is no folder here, and the Hub does not give it: ")
