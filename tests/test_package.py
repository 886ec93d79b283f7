"""What a stranger's environment notices of the package: import cost, entry points, the wheel."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import warm

from dapa_merge.imports import lasting

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "mergekit", "pydantic", "numpy", "pandas", "scipy")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    "code",
    [
        "import dapa_merge",
        "import dapa_merge.pydantic_hook",
        "from dapa_merge import load_recipe, minimize, classify, DapaError",
        "from dapa_merge.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    ],
)
def test_nothing_heavy_is_imported(code):
    result = run_python(f"{code}\nimport sys\nprint('loaded', [name for name in {HEAVY!r} if name in sys.modules])")
    assert result.stdout.splitlines()[-1] == "loaded []", result.stderr


def test_the_help_of_no_command_loads_torch_or_asks_the_hub():
    code = "import sys\nfrom dapa_merge.cli import COMMANDS, main\nfor name in COMMANDS:\n"
    code += "    try: main([name, '--help'])\n    except SystemExit: pass\n"
    result = run_python(code + "print({'torch', 'transformers', 'mergekit', 'huggingface_hub.utils'} & {*sys.modules})")
    assert result.stdout.splitlines()[-1] == "set()", result.stderr


def test_a_plan_loads_no_model(llama_pair, write_recipe):
    recipe = write_recipe(*llama_pair)
    code = "import transformers\nfrom dapa_merge.cli import main\ntransformers.PreTrainedModel.from_pretrained = None\n"
    code += f"main(['plan', {str(recipe)!r}])"
    result = warm.run([sys.executable, "-c", code])
    assert "a run takes" in result.stdout, result.stderr


def test_a_transplant_of_named_layers_needs_no_torch(llama_pair, write_recipe, tmp_path):
    recipe = write_recipe(*llama_pair, layers=2)
    arguments = ["run", str(recipe), str(tmp_path / "out"), "--no-evaluate"]
    code = f"import sys\nfrom dapa_merge.cli import main\ntry: main({arguments!r})\nexcept SystemExit: pass\n"
    result = run_python(code + "print({'torch', 'scipy', 'pandas', 'huggingface_hub.hf_api'} & {*sys.modules})")
    assert result.stdout.splitlines()[-1] == "set()", result.stderr
    assert (tmp_path / "out" / "config.json").exists()


def test_a_client_of_the_hub_that_is_loaded_late_draws_no_bars_without_a_terminal(llama_pair, write_recipe):
    code = "import os\nfrom dapa_merge.cli import main\nfrom dapa_merge.progress import quiet\n"
    code += f"try: main(['plan', {str(write_recipe(*llama_pair))!r}])\nexcept SystemExit: pass\n"
    code += "with quiet('huggingface_hub', bars=True):\n    from huggingface_hub import utils\n"
    code += "    print(utils.are_progress_bars_disabled(), utils.logging.get_verbosity())\n"
    code += "print('HF_HUB_VERBOSITY' in os.environ)"
    result = run_python(code)
    assert result.stdout.splitlines()[-2:] == [f"True {logging.ERROR}", "False"], result.stderr


@pytest.fixture
def collecting():
    """The garbage collector as it is in a new process."""
    before = gc.isenabled()
    gc.unfreeze()
    gc.enable()
    yield
    gc.unfreeze()
    (gc.enable if before else gc.disable)()


def test_what_is_imported_to_last_is_not_looked_at_for_garbage_any_more(collecting, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with lasting():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 1000
    gc.unfreeze()

    def fail() -> None:
        with lasting():
            raise ImportError

    with pytest.raises(ImportError):
        fail()
    # Of an import that failed there is nothing to keep.
    assert (gc.isenabled(), gc.get_freeze_count()) == (True, 0)


def test_a_program_that_has_torch_is_left_as_it_is(collecting, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", sys)
    with lasting():
        assert gc.isenabled()
    assert (gc.isenabled(), gc.get_freeze_count()) == (True, 0)


def test_a_program_that_collects_no_garbage_is_left_as_it_is(collecting, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    gc.disable()
    with lasting():
        assert not gc.isenabled()
    assert (gc.isenabled(), gc.get_freeze_count()) == (False, 0)


def test_the_package_runs_as_a_module():
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "dapa_merge", *arguments], capture_output=True, text=True, check=False
        )

    shown, failed = run("--help"), run("plan", "no-such-recipe.yml")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("Usage: python -m dapa_merge ")
    assert failed.returncode == 2
    assert "no-such-recipe.yml" in failed.stderr


def test_the_public_names_exist():
    import dapa_merge

    assert all(getattr(dapa_merge, name) is not None for name in dapa_merge.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        dapa_merge.nonsense  # noqa: B018


def test_the_hook_is_registered_once():
    (ours,) = (entry for entry in entry_points(group="pydantic") if entry.name == "dapa-merge")
    assert ours.value == "dapa_merge.pydantic_hook:plugin"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_models_prompts_and_nothing_of_the_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for member in ("source", "target", "shadow-source", "shadow-target"):
        shards = [name for name in names if name.startswith(f"dapa_merge/miniature/{member}/model-0")]
        assert len(shards) == 3
    assert "dapa_merge/prompt_sets/builtin/harmful.jsonl" in names
    read = ("py.typed", "publish/card.md.jinja", "cli/outlines.json")
    assert {f"dapa_merge/{name}" for name in read} <= {*names}
    assert {f"dapa_merge/report/page.{kind}" for kind in ("html.jinja", "css", "js")} <= {*names}
    assert not [name for name in names if "tests" in name or "benchmarks" in name]
    weights = sum(item.file_size for item in zipfile.ZipFile(wheel).infolist() if "miniature" in item.filename)
    assert weights < 8_000_000


def test_the_sdist_holds_the_documents_and_what_their_tests_read(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    pages = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", "LICENSE")
    assert {*pages, ".github/workflows/remerge.yml", ".github/ISSUE_TEMPLATE/bug.yml"} <= names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.*")} <= names


def test_mergekit_finds_the_method_of_an_installed_wheel(wheel, llama_pair, write_recipe, tmp_path):
    """Nothing is imported by hand: a bare `mergekit-yaml` in another process, the package only as a wheel."""
    site = tmp_path / "site"
    # What pip does with a wheel that has no scripts to place.
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    recipe = write_recipe(*llama_pair, layers=2)
    code = (
        "import sys\nfrom mergekit.scripts.run_yaml import main\n"
        f"sys.argv = ['mergekit-yaml', {str(recipe)!r}, {str(tmp_path / 'out')!r}, '--quiet']\n"
        "try: main()\nexcept SystemExit as stop: code = stop.code\n"
        "import dapa_merge\nprint(code, dapa_merge.__file__)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    assert result.stdout.splitlines()[-1] == f"0 {site / 'dapa_merge' / '__init__.py'}", result.stderr
    assert "dapa: editing gate of layer 2 " in result.stderr
    assert (tmp_path / "out" / "model.safetensors").exists() or list((tmp_path / "out").glob("model-*"))


def test_every_module_is_imported_where_modules_of_posix_are_missing():
    """As on Windows: of the modules of one operating system none is needed to import the package."""
    missing = ("fcntl", "resource", "pwd", "grp", "termios", "pty")
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "dapa_merge").rglob("*.py")
        if path.name != "__main__.py"
    ]
    assert len(modules) > 100
    # Libraries that are imported before may use theirs.
    code = (
        "import importlib, sys\n"
        "import datasets, filelock, huggingface_hub, mergekit.graph, platformdirs, rich.console, torch, transformers\n"
        "import mergekit.plan, scipy.stats, pandas, jinja2, peft, lm_eval.api.task, transformers.trainer\n"
        f"for name in {missing!r}: sys.modules[name] = None\n"
        f"for name in {sorted(modules)!r}: importlib.import_module(name)\n"
        "print('all of them')"
    )
    result = warm.run([sys.executable, "-c", code])
    assert result.stdout.splitlines()[-1:] == ["all of them"], result.stderr
