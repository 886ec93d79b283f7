"""The documents: everything that a user can type is in them, and they name nothing that does not exist."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from conftest import call

import dapa_merge
from dapa_merge import load_recipe, miniature
from dapa_merge.cli import main
from dapa_merge.measure.prompts.sets import PACKAGED, SHORT_NAMES
from dapa_merge.recipe.parameters import PARAMETERS

ROOT = Path(__file__).parent.parent
MAX_LINES = 150
DOCS = sorted((ROOT / "docs").glob("*.md"))
FOR_USERS = [ROOT / "README.md", *DOCS]
PAGES = [
    *FOR_USERS,
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "recipes/README.md")),
]
# Options in the documents that belong to other programs.
FOREIGN_OPTIONS = {
    *("--check", "--lora-merge-cache", "--quick"),
    *("--constraint", "--no-build-isolation", "--resolution", "--nonblock", "--config-file"),
    *("--alias", "--ctx-size", "--no-prefill-assistant", "--outfile", "--outtype", "--parallel", "--port"),
    *("--build-arg", "--env", "--file", "--rm", "--tag", "--user", "--volume"),
}
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# A script of the benchmarks and what follows it on its line.
SCRIPT = re.compile(r"tests/benchmarks/(\w+)\.py\b([^`\n]*)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
NAMES = main.list_commands(click.Context(main))

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def commands(name: str, group: click.Group = main) -> Iterator[tuple[str, click.Command]]:
    """Yields a command of a group and the command's own commands, each with what a user types for it."""
    command = group.get_command(click.Context(group), name)
    yield name, command
    if isinstance(command, click.Group):
        for inner in command.list_commands(click.Context(command)):
            yield from ((f"{name} {typed}", one) for typed, one in commands(inner, command))


def options(command: click.Command) -> list[click.Option]:
    return [parameter for parameter in command.params if isinstance(parameter, click.Option)]


def spellings(option: click.Option) -> list[str]:
    return [text for text in (*option.opts, *option.secondary_opts) if text.startswith("--")]


def all_options() -> list[click.Option]:
    return [*options(main), *(option for name in NAMES for _, command in commands(name) for option in options(command))]


def mentions(text: str, option: str) -> bool:
    return re.search(rf"(?<![\w-]){option}(?![\w-])", text) is not None


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", without_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_help_and_is_in_the_documents_with_every_option(name):
    for typed, command in commands(name):
        assert command.help
        assert call(*typed.split(), "--help").exit_code == 0
        # A page is about a command if it shows how to type it; running.md has what many commands share.
        about = [page.read_text() for page in FOR_USERS if f"dapa-merge {name}" in page.read_text()]
        assert len(about) > 1, f"only the list of all commands mentions {name}"
        text = "".join([*about, (ROOT / "docs" / "running.md").read_text()])
        for option in options(command):
            assert option.help, (typed, option.name)
            for spelling in spellings(option):
                assert mentions(text, spelling), (typed, spelling)


def test_the_options_before_a_command_are_in_the_documents():
    text = (ROOT / "docs" / "running.md").read_text()
    for option in options(main):
        assert all(mentions(text, spelling) for spelling in spellings(option)), option.name


def test_every_variable_of_an_option_is_in_the_documents():
    text = "".join(page.read_text() for page in FOR_USERS)
    names = {str(option.envvar) for option in all_options() if option.envvar}
    assert names
    assert [name for name in sorted(names) if f"`{name}" not in text] == []


@each_page
def test_a_page_names_no_option_and_no_command_that_does_not_exist(page):
    known = {"--help", *FOREIGN_OPTIONS, *(text for option in all_options() for text in spellings(option))}
    code = SCRIPT.sub("", "\n".join(CODE.findall(page.read_text())))
    assert set(OPTION.findall(code)) <= known
    assert set(re.findall(r"dapa-merge ([a-z]+)", code)) <= {*NAMES}


@each_page
def test_a_page_names_scripts_and_their_options_as_they_are(page):
    for name, typed in SCRIPT.findall(page.read_text()):
        script = (ROOT / "tests" / "benchmarks" / f"{name}.py").read_text()
        named = {*OPTION.findall(typed)} - {"--help", "--tiny"}
        assert [option for option in sorted(named) if f'"{option}"' not in script] == [], name


@pytest.mark.parametrize("key", PARAMETERS)
def test_every_parameter_of_a_recipe_has_a_row(key):
    assert f"\n| `{key}` |" in (ROOT / "docs" / "recipes.md").read_text()


def test_every_short_name_of_prompts_is_in_the_help_and_in_the_documents():
    # A long line is wrapped after a hyphen too.
    shown = re.sub(r"-\n +", "-", call("evaluate", "--help").stdout)
    page = (ROOT / "docs" / "recipes.md").read_text()
    for name in (*PACKAGED, *SHORT_NAMES):
        assert re.search(rf"\b{name}\b", shown), name
        assert f"`{name}`" in page


def test_every_input_of_the_workflow_is_in_the_documents():
    # YAML 1.1 reads the key "on" as true.
    called = yaml.safe_load((ROOT / ".github" / "workflows" / "remerge.yml").read_text())[True]["workflow_call"]
    page = (ROOT / "docs" / "ci.md").read_text()
    for name in (*called["inputs"], *called["outputs"], *called["secrets"]):
        assert re.search(rf"`{name}`|\b{name}: ", page), name


@pytest.mark.parametrize("page", FOR_USERS, ids=lambda page: page.name)
def test_every_recipe_in_the_documents_can_be_read(page, tmp_path):
    for number, text in enumerate(blocks(page, "yaml")):
        if "merge_method" in text:
            path = tmp_path / f"{number}.yml"
            path.write_text(text)
            assert load_recipe(path).layers is None


def test_the_examples_in_python_run(tmp_path, monkeypatch, write_recipe, capsys):
    monkeypatch.chdir(tmp_path)
    for role in ("target", "source"):
        shutil.copytree(miniature.path(role), tmp_path / role)
    asked = {"prompts": "miniature", "max_new_tokens": 16, "batch_size": 64, "max_tests": 1}
    write_recipe(tmp_path / "target", tmp_path / "source", layers="3-5", **asked)
    for text in blocks(ROOT / "docs" / "python.md", "python"):
        exec(compile(text, "docs/python.md", "exec"), {})
        shown = capsys.readouterr().out.splitlines()
        # A comment beside a call is what it prints, where that is always the same.
        expected = re.findall(r"\)  +# ([A-Z]+)$", text, re.MULTILINE)
        assert expected in ([], shown)


@each_page
def test_every_relative_link_resolves(page):
    for link in LINK.findall(re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_the_readme_links_every_page():
    linked = {(ROOT / link).resolve() for link in LINK.findall((ROOT / "README.md").read_text())}
    assert {page.resolve() for page in PAGES} - {(ROOT / "README.md").resolve()} <= linked


@each_page
def test_a_page_is_short(page):
    assert len(page.read_text().splitlines()) < MAX_LINES


def test_nothing_tells_to_install_by_a_name_that_no_index_has():
    by_name = re.compile(r"pip install (?:-\S+ )*['\"]?dapa-merge|dapa-merge\[")
    pages = [*PAGES, *(ROOT / "dapa_merge").rglob("*.py")]
    assert [page.name for page in pages if by_name.search(page.read_text(encoding="utf-8"))] == []


def test_the_changelog_is_of_this_version():
    (newest, *_) = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest == dapa_merge.__version__


def test_the_citation_is_of_this_version_and_of_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == dapa_merge.__version__
    assert f'Repository = "{citation["repository-code"]}"' in (ROOT / "pyproject.toml").read_text()
    (paper,) = citation["references"]
    assert {"type": "other", "value": "arXiv:2406.01514"} in paper["identifiers"]


@pytest.mark.parametrize("name", ["bug.yml", "feature.yml"])
def test_a_form_for_issues_is_one_that_github_reads(name):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / name).read_text())
    assert form["name"]
    assert form["description"]
    for field in form["body"]:
        assert field["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        assert field["attributes"].get("value" if field["type"] == "markdown" else "label")
    named = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(named) == len({*named}) > 0
