"""The public functions, called as a program calls them: by texts and paths, without a command line."""

from __future__ import annotations

import html
import inspect
import json
import logging
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click
import pytest
import warm
from conftest import answer, call

import dapa_merge
from dapa_merge import api, miniature
from dapa_merge.cli import main
from dapa_merge.errors import RecipeError, UsageError
from dapa_merge.inspect.inspection import Inspection
from dapa_merge.publish.commit import Difference, Published
from dapa_merge.report.report import read_report
from dapa_merge.report.tables import figure_rows
from dapa_merge.search.result import Search
from dapa_merge.verify.result import Check

PAIR = (miniature.path("target"), miniature.path("source"))
HOSTILE = "<script>alert(1)</script>&\u202e[bold]x"


@pytest.fixture
def recipe(write_recipe, few) -> Path:
    return write_recipe(*PAIR, layers="3-5", prompts=few, max_new_tokens=4, batch_size=16)


def test_a_model_is_repaired_verified_and_measured_by_the_names_of_files(recipe, few, tmp_path, no_pictures, capfd):
    capfd.readouterr()
    report = dapa_merge.repair(str(recipe), str(tmp_path / "out"))
    assert isinstance(report, dapa_merge.Report)
    assert report.layers == (3, 4, 5)
    assert read_report(tmp_path / "out").units == report.units
    check = dapa_merge.verify(tmp_path / "out")
    assert isinstance(check, dapa_merge.Check)
    assert check.is_correct
    assert dapa_merge.verify(str(tmp_path / "out"), files_only=True).is_correct
    found = dapa_merge.evaluate(tmp_path / "out", str(PAIR[0]), prompts=few, limit=4, max_new_tokens=4, device="cpu")
    assert isinstance(found, dapa_merge.Evaluated)
    assert list(found.models) == [str(tmp_path / "out"), str(PAIR[0])]
    assert all(one.figures.num_harmful == 4 for one in found.models.values())
    # What happens is logged.
    assert capfd.readouterr().out == ""


def test_steps_are_logged_for_whoever_listens(recipe, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "dapa_merge"):
        dapa_merge.repair(recipe, tmp_path / "out", evaluate=False)
    assert f"wrote {tmp_path / 'out'}" in caplog.text


def test_a_repair_needs_no_recipe_and_is_the_commands(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(
        "dapa_merge.flow.repair", lambda recipe, out, **settings: seen.update(recipe=recipe, **settings)
    )
    names = {"keep": "k.jsonl", "pretrained": "a/b", "max_tests": 3, "prompts": "borderline"}
    api.repair(target=PAIR[0], source=str(PAIR[1]), out="out", **names, workers=2, device="cpu", journal="j.jsonl")
    ours, options = seen["recipe"], seen["options"]
    assert (str(ours.target), str(ours.source)) == tuple(map(str, PAIR))
    assert (ours.keep, str(ours.pretrained), ours.max_tests, ours.prompts) == ("k.jsonl", "a/b", 3, "borderline")
    assert (options.uses_ray, options.num_workers, options.journal) == (True, 2, Path("j.jsonl"))

    def run_recipe(recipe, path, out, **settings):
        assert recipe == ours
        raise UsageError("as far as needed")

    monkeypatch.setattr("dapa_merge.flow.run_recipe", run_recipe)
    typed = [f"--{name.replace('_', '-')}={value}" for name, value in names.items()]
    assert "as far as needed" in call("repair", *PAIR, tmp_path / "out", *typed).stderr


def test_what_cannot_be_asked_for_is_one_sentence(recipe, tmp_path):
    out = tmp_path / "out"
    for wrong, named in (
        (lambda: dapa_merge.repair(recipe), "out"),
        (lambda: dapa_merge.repair(out=out), "target and source"),
        (lambda: dapa_merge.repair(out=out, target="a/b"), "target and source"),
        (lambda: dapa_merge.repair(recipe, out, keep="x"), "keep"),
        (lambda: dapa_merge.repair(recipe, out, target="a/b", source="c/d"), "target"),
        (lambda: dapa_merge.evaluate(), "no model"),
        (lambda: dapa_merge.evaluate("a/b", top_p=0.5), "temperature"),
        (lambda: dapa_merge.verify(out, files_only=True, target="a/b"), "--files-only"),
        (lambda: dapa_merge.push(out, "a/b", license_name="mine"), "--license"),
        (lambda: dapa_merge.inspect("a/b@c@d", "e/f"), "target"),
    ):
        with pytest.raises(UsageError, match=named) as caught:
            wrong()
        assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match=r"nothing\.yml"):
        dapa_merge.search("nothing.yml")
    with pytest.raises(TypeError):
        dapa_merge.search(recipe, devcie="cpu")
    assert not out.exists()


def test_a_search_writes_the_recipe_that_replays_it(write_recipe, few, tmp_path):
    recipe = write_recipe(*PAIR, layers="auto", prompts="miniature", max_new_tokens=16, batch_size=64, max_tests=1)
    found = dapa_merge.search(recipe, out=tmp_path / "found.yml", device="cpu")
    assert isinstance(found, Search)
    units = sorted(map(str, found.minimum.units))
    assert sorted(f"{one.layer}.gate" for one in dapa_merge.load_recipe(tmp_path / "found.yml").layers) == units
    text = found._repr_html_()
    for unit in units:
        assert unit in text
    with pytest.raises(UsageError, match=r"found\.yml"):
        dapa_merge.search(recipe, out=str(tmp_path / "found.yml"))


def test_an_inspection_says_what_the_command_says():
    found = dapa_merge.inspect(PAIR[0], str(PAIR[1]))
    assert isinstance(found, Inspection)
    assert json.loads(json.dumps(found.to_json())) == answer("inspect", *PAIR, "--json")


@pytest.mark.parametrize("name", ["repair", "evaluate", "inspect", "search", "verify", "push"])
def test_a_function_has_the_words_of_its_command(name):
    command = main.get_command(click.Context(main), name)
    function = getattr(api, name)
    parameters = inspect.signature(function).parameters
    known = {*parameters, *api.Settings.__annotations__} - {"settings"}
    # What is printed is the command line's, also in a dry run, and a judge's options are the settings'.
    apart = {
        "as_json", "debug", "quiet", "dry_run", "write", "chart", "responses", "served_names",
        "private", "create_pr", "branch", "tag", "replaces", "push", "license", "license_name", "license_link",
        "manifest", "task_files", "workers",
    }  # fmt: skip
    # `repair` has arguments of these names; where models are published is of the card.
    words = {parameter.name.removeprefix("published_") for parameter in command.params}
    assert words - known - apart == set()
    assert function.__doc__
    assert "```python" in function.__doc__


def test_a_package_that_is_called_is_the_function_whatever_was_imported_before():
    code = (
        "{}\nimport inspect, dapa_merge\nfrom dapa_merge import search, verify\n"
        "from dapa_merge.search.result import Search\n"
        "assert dapa_merge.search is search and dapa_merge.Search is Search\n"
        "assert 'recipe' in inspect.signature(dapa_merge.search).parameters\n"
        "try: dapa_merge.search('nothing.yml')\nexcept dapa_merge.DapaError as error: print(error)\n"
        "try: verify('nothing')\nexcept dapa_merge.DapaError as error: print(error)\n"
    )
    for before in ("", "import dapa_merge.search.result", "import dapa_merge.api", "from dapa_merge import search"):
        ran = warm.run([sys.executable, "-c", code.format(before)])
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.splitlines() == [
            "cannot read the recipe nothing.yml: No such file or directory",
            "there is no folder nothing here; name that of a result",
        ]


def test_what_checks_and_pushes_loads_no_torch():
    code = "import sys\nfrom dapa_merge import verify, push, repair, load_recipe, Report, Check, Published\n"
    code += "try: verify('nothing')\nexcept Exception: pass\nprint({'torch', 'scipy'} & {*sys.modules})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout == "set()\n", ran.stderr


# Notebooks.


def cells(text: str) -> list[list[str]]:
    """The cells of every row of every table."""
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    found = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    return [[html.unescape(cell).strip("\u2003 ") for cell in row] for row in found]


@pytest.mark.xdist_group("demo")
def test_a_report_in_a_notebook_has_the_rows_of_the_terminal(demo):
    report = read_report(demo[0])
    found = cells(report._repr_html_())
    assert found[0] == ["held-out prompts", "before", "after", "source"]
    rows = figure_rows([report.before, report.after, report.source_alone])
    assert found[1:] == [[label.strip(), *values] for label, values in rows]
    assert "copied" in report._repr_html_()
    assert cells(report.after._repr_html_())[1] == ["DSR (64 harmful)", f"{report.after.dsr:.3f}"]


@pytest.mark.xdist_group("demo")
def test_strangers_names_are_text_in_a_notebook(demo):
    report = read_report(demo[0])
    after = replace(report.after, text=HOSTILE, skills=tuple(replace(one, name=HOSTILE) for one in report.after.skills))
    difference = Difference((HOSTILE,), (HOSTILE,), (HOSTILE,))
    results = [
        replace(report, target=HOSTILE, source=HOSTILE, after=after, before=None, source_alone=None),
        after,
        Check(None, (HOSTILE,), (HOSTILE,), True, {HOSTILE: HOSTILE}),
        Published(HOSTILE, HOSTILE, HOSTILE, True, difference, tag=HOSTILE),
    ]
    found = dapa_merge.inspect(*PAIR)
    models = {role: replace(one, name=HOSTILE) for role, one in found.models.items()}
    results.append(replace(found, models=models, notes=(HOSTILE,)))
    for result in results:
        text = result._repr_html_()
        assert html.escape("<script>alert(1)</script>&") in text
        assert "<script" not in text
        assert "\u202e" not in text
        assert "[bold]" in text


def test_measured_models_in_a_notebook_have_a_column_each(few):
    found = dapa_merge.evaluate(*PAIR, prompts=few, limit=2, max_new_tokens=2, batch_size=4)
    text = found._repr_html_()
    head, *rows = cells(text)
    assert head == ["", "target", "source"]
    assert all(len(row) == 3 for row in rows if row[0].startswith("DSR"))
    assert "DSR" in text
    one = found.models[str(PAIR[0])]
    assert cells(one._repr_html_())[0] == ["", "model"]
