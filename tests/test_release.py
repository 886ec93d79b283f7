"""What is checked before a release, the workflow that makes one, and the documents as a site."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from action_runner import run_steps

import dapa_merge

ROOT = Path(__file__).parent.parent
VERSION = dapa_merge.__version__
RELEASE = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))
CI = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
SITE = yaml.safe_load((ROOT / ".ci" / "mkdocs.yml").read_text(encoding="utf-8"))
METADATA = f"Metadata-Version: 2.4\nName: dapa-merge\nVersion: {VERSION}\n\n# dapa-merge\n\n[a](https://a)\n"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sources(tmp_path) -> Path:
    """The files that a release is checked by, as they are when it is made."""
    for name in ("dapa_merge/__init__.py", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", ".ci/mkdocs.yml"):
        text = (ROOT / name).read_text(encoding="utf-8").replace("OWNER", "somebody")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text.replace(f"[{VERSION}] - unreleased", f"[{VERSION}] - 2030-01-31"))
    return tmp_path


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_finished_release_has_no_findings(sources):
    assert list(script("check_release").findings_of_sources(f"v{VERSION}", sources)) == []


@pytest.mark.parametrize(
    ("name", "old", "new", "named"),
    [
        ("dapa_merge/__init__.py", f'"{VERSION}"', '"9.9.9"', "has version '9.9.9'"),
        ("CHANGELOG.md", f"## [{VERSION}]", "## [9.9.9]", "CHANGELOG.md is '9.9.9'"),
        ("CHANGELOG.md", "2030-01-31", "unreleased", "says 'unreleased'"),
        ("CITATION.cff", f"version: {VERSION}", "version: 9.9.9", "CITATION.cff has version '9.9.9'"),
        ("pyproject.toml", "github.com/somebody/", "github.com/OWNER/", "pyproject.toml still has"),
        (".ci/mkdocs.yml", "somebody.github.io", "OWNER.github.io", ".ci/mkdocs.yml still has"),
    ],
)
def test_what_does_not_agree_with_the_tag_is_found(sources, name, old, new, named):
    replace(sources / name, old, new)
    assert any(named in line for line in script("check_release").findings_of_sources(f"v{VERSION}", sources))


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        (METADATA, ""),
        (METADATA.replace(VERSION, "9.9.9"), "has version 9.9.9"),
        (METADATA.replace("https://a", "docs/a.md"), "docs/a.md"),
        (METADATA + '<img src="docs/a.png">\n', "docs/a.png"),
        (METADATA.partition("# ")[0], "without a link"),
    ],
)
def test_a_build_with_other_metadata_is_found(tmp_path, metadata, named):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("dapa_merge.dist-info/METADATA", metadata)
    (tmp_path / "PKG-INFO").write_text(metadata)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as sdist:
        sdist.add(tmp_path / "PKG-INFO", "dapa_merge/PKG-INFO")
    (tmp_path / "PKG-INFO").unlink()
    found = list(script("check_release").findings_of_builds(f"v{VERSION}", tmp_path))
    assert len(found) == (2 if named else 0)
    assert all(named in line for line in found)


def test_a_folder_without_both_builds_is_found(tmp_path):
    (found,) = script("check_release").findings_of_builds(f"v{VERSION}", tmp_path)
    assert "one wheel and one sdist" in found


def test_only_the_job_that_publishes_may_log_in_and_it_waits_for_the_others():
    assert RELEASE[True] == {"push": {"tags": ["v*"]}}
    assert RELEASE["permissions"] == {"contents": "read"}
    jobs = RELEASE["jobs"]
    assert {name for name, job in jobs.items() if "permissions" in job} == {"publish"}
    assert jobs["publish"]["permissions"] == {"contents": "read", "id-token": "write", "attestations": "write"}
    assert (jobs["publish"]["environment"], jobs["publish"]["needs"], jobs["try"]["needs"]) == ("pypi", "try", "build")
    # What builds and what runs the package comes before; this job runs no script.
    assert not any("run" in step for step in jobs["publish"]["steps"])
    assert all("timeout-minutes" in job for job in (*jobs.values(), *CI["jobs"].values()))


def test_every_system_and_the_oldest_and_newest_python_are_tried():
    oldest, newest = re.search(
        r'requires-python = ">=([\d.]+),<3\.(\d+)"', (ROOT / "pyproject.toml").read_text()
    ).groups()
    ends = [oldest, f"3.{int(newest) - 1}"]
    for job in (RELEASE["jobs"]["try"], CI["jobs"]["test"], CI["jobs"]["elsewhere"]):
        assert job["strategy"]["matrix"]["python-version"] == ends
    systems = {"ubuntu-latest", "macos-latest", "windows-latest"}
    assert {*RELEASE["jobs"]["try"]["strategy"]["matrix"]["os"]} == systems
    assert {CI["jobs"]["test"]["runs-on"], *CI["jobs"]["elsewhere"]["strategy"]["matrix"]["os"]} == systems
    assert "lowest-direct" in str(CI["jobs"]["oldest"]["steps"])


def test_what_a_job_tests_exists():
    (tested,) = (step["run"] for step in CI["jobs"]["oldest"]["steps"] if "pytest" in step.get("run", ""))
    names = [word for word in tested.split() if word.startswith("tests/")]
    assert names
    assert [name for name in names if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    ("shown", "passes"), [(f"dapa-merge, version {VERSION}", True), (f"dapa-merge, version 9{VERSION}", False)]
)
def test_an_installed_package_is_tried_by_its_version_a_demo_and_gates(tmp_path, shown, passes):
    (tmp_path / "temp").mkdir()
    program = tmp_path / "dapa-merge"
    program.write_text(f'#!/usr/bin/env bash\necho "$*" >> "{tmp_path}/calls"\necho "{shown}"\n')
    program.chmod(0o755)
    (use,) = (step for step in RELEASE["jobs"]["try"]["steps"] if step.get("id") == "use")
    contexts = {"github": {"ref_name": f"v{VERSION}"}, "steps": {}}
    use = {**use, "env": {**use["env"], "BIN": str(tmp_path)}}
    env = {"PATH": "/usr/bin:/bin"}
    result = run_steps([use], env, workspace=tmp_path, temp=tmp_path / "temp", contexts=contexts)
    assert (result.exit_code == 0) is passes
    called = [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()]
    assert called == (["--version", "demo", "verify", "gate"] if passes else ["--version"])


@pytest.fixture(scope="module")
def description(tmp_path_factory) -> str:
    """The description in a wheel of a README with every form of link."""
    folder = tmp_path_factory.mktemp("described")
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "dapa_merge").mkdir()
    shutil.copy(ROOT / "dapa_merge" / "__init__.py", folder / "dapa_merge" / "__init__.py")
    (folder / "README.md").write_text(
        "[a](docs/a.md#x) ![b](docs/b.png) [c](https://c.org/c) [d](#d) [![e](./docs/e.svg)](docs/e.md)\n"
        '<picture><source srcset="docs/f.png"><img alt="f" src="docs/f.svg"></picture> <a href="docs/g.md">g</a>\n'
    )
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    metadata = script("check_release").metadata_of(next(folder.glob("*.whl")))
    return metadata.partition("\n\n")[2].strip()


def test_links_and_pictures_of_the_readme_are_whole_on_an_index(description):
    page = f"https://github.com/OWNER/dapa-merge/blob/v{VERSION}"
    file = f"https://raw.githubusercontent.com/OWNER/dapa-merge/v{VERSION}"
    assert description.splitlines() == [
        f"[a]({page}/docs/a.md#x) ![b]({file}/docs/b.png) [c](https://c.org/c) [d](#d) "
        f"[![e]({file}/docs/e.svg)]({page}/docs/e.md)",
        f'<picture><source srcset="{file}/docs/f.png"><img alt="f" src="{file}/docs/f.svg"></picture> '
        f'<a href="{page}/docs/g.md">g</a>',
    ]


def pages_of(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for one in (nav.values() if isinstance(nav, dict) else nav) for page in pages_of(one)]


def test_the_site_has_every_page_once():
    there = [str(path.relative_to(ROOT).as_posix()) for path in (ROOT / "docs").glob("**/*.md")]
    assert sorted(pages_of(SITE["nav"])) == sorted([*there, *script("site_pages").PAGES])
    assert pages_of(SITE["nav"])[0] == "README.md"


@pytest.mark.parametrize(
    ("page", "text", "expected"),
    [
        ("docs/a.md", "[x](../recipes/README.md#y)", "[x](../recipes/README.md#y)"),
        ("docs/a.md", "[x](../LICENSE)", "[x](https://hub/blob/main/LICENSE)"),
        ("README.md", "[x](recipes/miniature.yml#L3)", "[x](https://hub/blob/main/recipes/miniature.yml#L3)"),
        ("README.md", "[x](recipes)", "[x](https://hub/tree/main/recipes)"),
        ("README.md", "[`x`](LICENSE) `[y](LICENSE)`", "[`x`](https://hub/blob/main/LICENSE) `[y](LICENSE)`"),
        ("README.md", "```\n[x](LICENSE)\n```", "```\n[x](LICENSE)\n```"),
        ("README.md", "[x](#y) [x](https://a) [x](nowhere.md)", "[x](#y) [x](https://a) [x](nowhere.md)"),
    ],
)
def test_a_link_of_the_site_leads_to_github_where_the_site_has_no_page(page, text, expected):
    on_site = {"README.md", "docs/a.md", "recipes/README.md"}
    assert script("site_pages").to_repository(text, page, on_site, "https://hub") == expected


def test_the_container_has_what_the_build_needs_and_runs_as_nobody_in_particular():
    text = (ROOT / ".ci" / "Containerfile").read_text(encoding="utf-8")
    copied = [name for line in re.findall(r"^COPY (?!--)(.*) \S+$", text, re.MULTILINE) for name in line.split()]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    builders = re.findall(r'"([\w-]+)>=', project.partition("requires = [")[2].partition("]")[0])
    assert f"pip install {' '.join(builders)} " in text
    assert {"pyproject.toml", "README.md", "LICENSE", "dapa_merge"} <= {*copied}
    last = text.rpartition("\nFROM ")[2]
    assert re.search(r"^USER \d+:\d+$", last, re.MULTILINE)
    assert 'ENTRYPOINT ["dapa-merge"]' in last
    # The cache is a volume, and everything that is kept is in it.
    assert 'VOLUME ["/cache"]' in last
    assert all(f"{name}=/cache" in last for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME"))
