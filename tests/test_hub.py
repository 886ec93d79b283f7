"""Models from the Hub, against a real HTTP server on this machine."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hub_server import SHA, dapa_merge, hub
from safetensors.torch import load_file


@pytest.fixture
def repositories(llama_pair, tmp_path):
    """The random pair as repositories, with files beside the model that must not be fetched."""
    target = shutil.copytree(llama_pair[0], tmp_path / "served" / "target")
    (target / "pytorch_model.bin").write_bytes(b"pickle")
    # Mistral AI publishes the weights in a second form, which nobody reads.
    (target / "consolidated.safetensors").write_bytes(b"weights")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling_evil.X"}}))
    for name in ("modeling_evil.py", "train.py"):
        (target / name).write_text("raise SystemExit")
    return {"someone/target": target, "someone/source": llama_pair[1]}


def test_a_recipe_may_name_repositories_and_revisions(repositories, write_recipe, tmp_path):
    recipe = write_recipe("someone/target@v1", "someone/source", layers=2)
    with hub(repositories) as (endpoint, log):
        result = dapa_merge(endpoint, tmp_path / "home", "run", recipe, tmp_path / "out", "--no-evaluate", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["target"], report["source"]) == ("someone/target@v1", "someone/source")
    assert any(f"/resolve/{SHA}/config.json" in line for line in log)
    assert not [line for line in log if "pytorch_model.bin" in line or "consolidated" in line]
    replayed = (tmp_path / "out" / "mergekit_config.yml").read_text()
    assert f"base_model: someone/target@{SHA}" in replayed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        {
            *(path.name for path in repositories["someone/source"].iterdir()),
            "modeling_evil.py",  # a part of the target, which its config names, carried over and never run
            "dapa.json",
            "dapa_report.json",
            "mergekit_config.yml",
            "README.md",
        }
    )
    # The cache is links to shared blobs; the result is not.
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_a_source_that_is_the_target_under_another_revisions_name_is_told(
    repositories, write_recipe, tmp_path, call_at_hub
):
    recipe = write_recipe("someone/target", "someone/target@v1", layers=2)
    with hub(repositories) as (endpoint, _):
        result = call_at_hub(endpoint, tmp_path / "home", "run", recipe, tmp_path / "out", "--no-evaluate")
    assert result.exit_code == 2
    assert "the source is the target itself, someone/target; name its aligned sibling" in result.stderr


CASES = {
    "no such repository": ("someone/nothing", {}, "someone/nothing"),
    "no such revision": ("someone/target@v9", {}, "someone/target"),
    "forbidden": ("someone/gated", {"someone/gated": 403}, "someone/gated"),
    "the Hub's own fault": ("someone/target", {"someone/target": 500}, "someone/target"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_hub_that_says_no_is_one_sentence_and_exit_5(repositories, tmp_path, case, call_at_hub):
    model, statuses, name = CASES[case]
    with hub(repositories, statuses) as (endpoint, _):
        result = call_at_hub(endpoint, tmp_path / "home", "evaluate", model)
    assert result.exit_code == 5, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"Error: there is no folder {name!r} here, and it cannot be fetched from the Hub: ")


def test_pickles_are_not_fetched_unless_they_are_allowed(llama_pair, write_recipe, tmp_path, call_at_hub):
    source = tmp_path / "served" / "source"
    shutil.copytree(llama_pair[1], source, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights = {}
    for path in llama_pair[1].glob("*.safetensors"):
        weights |= load_file(path)
    torch.save(weights, source / "pytorch_model.bin")
    recipe = write_recipe(llama_pair[0], "someone/source", layers=2)
    arguments = ("run", recipe, tmp_path / "out", "--no-evaluate")
    with hub({"someone/source": source}) as (endpoint, log):
        refused = call_at_hub(endpoint, tmp_path / "home", *arguments)
        assert refused.exit_code == 4
        assert "someone/source has pickled weights only" in refused.stderr
        assert not [line for line in log if ".bin" in line]
        result = call_at_hub(endpoint, tmp_path / "home", *arguments, "--allow-pickle")
    assert result.exit_code == 0, result.stderr
    assert f"- model: someone/source@{SHA}" in (tmp_path / "out" / "mergekit_config.yml").read_text()
