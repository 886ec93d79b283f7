"""Mistyped names: what a command says then, and what it suggests."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import call

from dapa_merge.files import nearest_here


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with what a user might have there."""
    for name in ("target", "source", "out", "models/tuned"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("recipe.yml", "my_prompts.jsonl", "tarred"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


MISTYPED = {
    ("inspect", "targte", "source"): (5, "there is no folder 'targte' here (did you mean 'target'?), and it cannot be"),
    ("inspect", "./targte", "source"): (4, "there is no folder './targte' here (did you mean './target'?), and it is"),
    ("repair", "models/tunde", "source", "new"): (5, "'models/tunde' here (did you mean 'models/tuned'?), and it"),
    ("evaluate", "someone/target"): (5, "there is no folder 'someone/target' here, and it cannot be fetched"),
    ("run", "recpie.yml", "new"): (2, "recpie.yml: No such file or directory (did you mean 'recipe.yml'?)"),
    ("push", "outt", "me/it"): (2, "there is no folder outt here (did you mean 'out'?); name that of a result"),
    ("card", "outt"): (2, "there is no folder outt here (did you mean 'out'?); name that of a result"),
    ("verify", "outt"): (4, "there is no folder outt here (did you mean 'out'?); name that of a result"),
    ("gate", "outt"): (4, "the report outt does not exist (did you mean 'out'?)"),
    ("page", "my_promts.jsonl"): (4, "No such file or directory (did you mean 'my_prompts.jsonl'?)"),
    ("chat", "outt"): (5, "there is no folder 'outt' here (did you mean 'out'?), and it cannot be fetched"),
}


@pytest.mark.parametrize("words", MISTYPED, ids=" ".join)
def test_a_mistyped_name_is_told_first_with_the_nearest(words, folder, own_cache):
    exit_code, told = MISTYPED[words]
    result = call(*words)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert told in result.stderr.splitlines()[-1]


def test_mistyped_prompts_are_told_with_the_nearest_file_or_set(folder):
    for given, meant in (("my_promts.jsonl", "my_prompts.jsonl"), ("builtins", "builtin"), ("xtest", "xstest")):
        result = call("evaluate", "target", "--prompts", given)
        assert result.exit_code == 2
        assert f"no such file or folder (did you mean {meant!r}?)" in result.stderr


def test_a_cached_model_may_have_been_meant(folder, monkeypatch):
    (folder / "hub" / "models--someone--big-model-chat").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    for given in ("someone/big-modle-chat", "big-model-chat", "big-model-caht"):
        told = f"there is no folder {given!r} here (did you mean 'someone/big-model-chat'?), and it cannot be fetched"
        assert told in call("inspect", given, "source").stderr


def test_nothing_is_suggested_that_is_not_near_or_not_of_the_kind(folder):
    assert nearest_here("elephant") == ""
    assert nearest_here("tarre") != ""
    assert nearest_here("tarred_", is_folder=True) in ("", " (did you mean 'target'?)")
    assert nearest_here("nowhere/target") == ""
    assert nearest_here("a\0b") == ""
