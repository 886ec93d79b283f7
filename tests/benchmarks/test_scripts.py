"""Every script of this folder runs to its end with `--tiny`, so that none goes stale."""

from __future__ import annotations

import csv
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm

SCRIPTS = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if "\ndef main(argv" in path.read_text())
ROOT = Path(__file__).parents[2]
RECIPE = """\
merge_method: dapa
base_model: {models}/target
models: [{{model: {models}/source}}]
parameters: {{prompts: {prompts}, max_new_tokens: 12, batch_size: 128}}
"""


class Warm(warm.Process):
    """As `subprocess.Popen`."""

    def wait(self, timeout: float = 120) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a script's process", timeout)
            time.sleep(0.002)
        return self.returncode


@pytest.fixture(autouse=True)
def warm_processes(monkeypatch) -> None:
    """Processes of Python that a script starts need not load torch."""
    popen, run = subprocess.Popen, subprocess.run

    def is_python(command) -> bool:
        return isinstance(command, list | tuple) and tuple(command[:2]) == (sys.executable, "-c")

    def start(command, *arguments, **options):
        if is_python(command):
            return Warm(command, env=options.get("env"))
        return popen(command, *arguments, **options)

    def run_whole(command, *arguments, check=False, **options):
        if not is_python(command):
            return run(command, *arguments, check=check, **options)
        done = warm.run(command, env=options.get("env"))
        assert not check or done.returncode == 0, done.stderr
        return done

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(subprocess, "run", run_whole)


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """The arguments that a script cannot do without."""
    # Recipes name their models from there.
    monkeypatch.chdir(ROOT)

    def completions() -> str:
        rows = [json.loads(line) for line in (ROOT / "tests/benchmarks/responses.jsonl").read_text().splitlines()]
        with (tmp_path / "completions.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion", "final_label", "type"], extrasaction="ignore")
            writer.writeheader()
            for number, row in enumerate(rows[5::100]):
                writer.writerow({**row, "completion": row["completion"][:100], "type": f"type{number % 2}"})
        return str(tmp_path / "completions.csv")

    def recipe() -> str:
        from tiny import few_prompts

        from dapa_merge import miniature

        models, prompts = miniature.path("target").parent, few_prompts(tmp_path)
        (tmp_path / "recipe.yml").write_text(RECIPE.format(models=models, prompts=prompts))
        return str(tmp_path / "recipe.yml")

    return {
        "compare_table": lambda: [str(tmp_path / "out")],
        "refusal_agreement": lambda: [completions()],
        "refusal_sft": lambda: ["recipes/miniature.yml"],
        "refusal_training": lambda: [completions()],
        "speculative": lambda: [recipe()],
    }


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_script_runs(name, arguments, capsys):
    if name == "search_cost":
        pytest.importorskip("picire", reason="of the extra dev", exc_type=ImportError)
    main = importlib.import_module(name).main
    more = arguments[name]() if name in arguments else []
    try:
        code = main([*more, "--tiny"])
    except SystemExit as end:
        code = end.code
    assert not code
    assert capsys.readouterr().out
