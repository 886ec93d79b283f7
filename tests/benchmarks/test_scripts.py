"""Every script of this folder runs to its end with `--tiny`, so that none goes stale."""

from __future__ import annotations

import csv
import importlib
import json
from contextlib import ExitStack
from pathlib import Path

import pytest
from judge_server import Reply, judge_server, prompt_in

from dapa_merge import miniature

SCRIPTS = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if "\ndef main(argv" in path.read_text())
ROOT = Path(__file__).parents[2]
RECIPE = """\
merge_method: dapa
base_model: {models}/target
models: [{{model: {models}/source}}]
parameters: {{prompts: {prompts}, max_new_tokens: 4, batch_size: 128}}
"""


pytestmark = pytest.mark.usefixtures("warm_processes")


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

        models, prompts = miniature.path("target").parent, few_prompts(tmp_path)
        (tmp_path / "recipe.yml").write_text(RECIPE.format(models=models, prompts=prompts))
        return str(tmp_path / "recipe.yml")

    def chooses() -> list[str]:
        models = miniature.path("target").parent
        text = RECIPE.format(models=f"{models}/shadow-", prompts="miniature").replace("/shadow-/", "/shadow-")
        (tmp_path / "recipe.yml").write_text(
            text.replace("max_new_tokens: 4", "max_new_tokens: 2, layers: auto, edit: directions, max_tests: 1")
        )
        return [str(tmp_path / "out"), str(tmp_path / "recipe.yml")]

    def damaged() -> list[str]:
        (tmp_path / "openings.csv").write_text("goal,target\nSing a song,Sure here is a song\n")
        return [
            str(miniature.path("source")), str(tmp_path / "out"), "--harmful", str(tmp_path / "openings.csv"),
        ]  # fmt: skip

    def aligned() -> list[str]:
        (tmp_path / "harmful.csv").write_text("goal\nSing a song\nTell a story\n")
        (tmp_path / "harmless.csv").write_text("text\nName a bird\nName a tree\n")
        return [
            str(miniature.path("target")), str(tmp_path / "out"), "--harmful", str(tmp_path / "harmful.csv"),
            "--harmless", str(tmp_path / "harmless.csv"),
        ]  # fmt: skip

    def served() -> list[str]:
        url, _ = stack.enter_context(judge_server(lambda *_: Reply("Sure, sing."), prompt_in))
        return [str(miniature.path("target")), f"m={url}"]

    stack = ExitStack()
    yield {
        "ascent_table": lambda: [*chooses()[::-1], "max_rank=2"],
        "compare_table": lambda: [str(tmp_path / "out")],
        "forecasts": lambda: [str(tmp_path / "out")],
        "real_answers": lambda: [str(tmp_path / "out"), str(miniature.path("target"))],
        "real_base_families": aligned,
        "real_families": damaged,
        "real_table": chooses,
        "refusal_agreement": lambda: [completions()],
        "refusal_sft": lambda: ["recipes/miniature.yml"],
        "refusal_training": lambda: [completions()],
        "served_beside": served,
        "speculative": lambda: [recipe()],
        "upcast": lambda: [str(miniature.path("target"))],
    }
    stack.close()


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_script_runs(name, arguments, capsys):
    if name == "search_cost":
        pytest.importorskip("picire")
    main = importlib.import_module(name).main
    more = arguments[name]() if name in arguments else []
    try:
        code = main([*more, "--tiny"])
    except SystemExit as end:
        code = end.code
    assert not code
    assert capsys.readouterr().out
