"""The commands as a user meets them: answers, messages, exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import warm
import yaml
from conftest import answer, call, change_tensor, fail_in_swap
from rich.console import Console

from dapa_merge import miniature
from dapa_merge.cli import COMMANDS, main, run
from dapa_merge.cli.run import _aside
from dapa_merge.errors import (
    CannotRepair,
    CheckpointError,
    DapaError,
    HubError,
    RecipeError,
    Stopped,
    UnsupportedArchitecture,
    UsageError,
    ValueDoesNotFit,
)
from dapa_merge.hub_client import Moved
from dapa_merge.measure.figures import Figures, SkillFigure
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parse import load_recipe
from dapa_merge.report.tables import figures_table

ROOT = Path(__file__).parent.parent


def last_line(result) -> str:
    return result.stderr.strip().splitlines()[-1]


def skill(figures: dict) -> float:
    (only,) = figures["skills"]
    return only["score"]


@pytest.fixture
def small(few) -> dict:
    """Parameters of a short search; the miniature's answers show whether they refuse by the eighth token."""
    return {"prompts": few, "max_new_tokens": 8, "batch_size": 128}


def test_the_demo_repairs_the_miniature(demo):
    _, report = demo
    assert report["before"]["dsr"] < 0.1
    assert report["after"]["dsr"] > 0.9
    assert report["after"]["over_refusal"] < 0.02
    assert skill(report["after"]) > skill(report["before"]) - 0.15
    assert skill(report["source_alone"]) < 0.1
    assert set(report["layers"]) <= {3, 4, 5, 6}
    assert report["one_minimal"]
    assert set(report["certificate"]) == set(report["units"])


def test_the_result_holds_the_report_and_a_recipe_that_replays_it(demo, tmp_path):
    out, report = demo
    assert json.loads((out / "dapa_report.json").read_text()) == report
    again = answer("run", out / "mergekit_config.yml", tmp_path / "again", "--no-evaluate", "--json")
    assert again["units"] == report["units"]
    assert again["before"] is None
    for path in out.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_verify_proves_the_result_and_notices_a_changed_byte(demo, tmp_path):
    out, report = demo
    verdict = answer("verify", out, "--json")
    gates = {f"model.layers.{layer}.mlp.gate_proj.weight": "source" for layer in report["layers"]}
    assert verdict == {
        "correct": True, "num_tensors": 93, "units": report["units"], "changed": gates, "manifest": True,
        "num_changed": {"source": len(gates)}, "faults": [], "notes": [], "rests_on": {},
    }  # fmt: skip
    broken = shutil.copytree(out, tmp_path / "broken")
    shard = broken / "model-00003-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    result = call("verify", broken)
    assert result.exit_code == 4
    assert "differs from the target" in result.stdout
    assert "WRONG: 93 tensors compared" in result.stdout


def test_verify_notices_layers_that_the_recipe_does_not_name(demo, tmp_path, write_recipe):
    out, _ = demo
    recipe = write_recipe(miniature.path("target"), miniature.path("source"), layers=9)
    result = call("verify", out, "--recipe", recipe)
    assert result.exit_code == 4
    assert "the recipe says 9.gate, but the result has" in result.stdout


def test_search_finds_the_planted_layers_and_writes_a_recipe_that_replays_them(write_recipe, tmp_path, small):
    recipe = write_recipe(miniature.path("target"), miniature.path("source"), **small)
    found = answer("search", recipe, "--json", "--out", tmp_path / "found.yml")
    assert {int(unit.split(".")[0]) for unit in found["units"]} <= {3, 4, 5, 6}
    replayed = load_recipe(tmp_path / "found.yml")
    assert [choice.layer for choice in replayed.layers] == [int(unit.split(".")[0]) for unit in found["units"]]
    assert (replayed.prompts, replayed.max_new_tokens) == (str(small["prompts"]), 8)
    shown = call("search", recipe)
    assert "needed: " in shown.stdout
    assert "The recipe that replays it:" in shown.stdout
    assert "searching among 10 units" in shown.stderr


def test_the_shadow_pair_needs_another_module_than_the_gate(write_recipe, tmp_path, no_pictures, small):
    """Its alignment was not planted: gates alone repair nothing, the search over modules finds what does."""
    pair = miniature.path("shadow-target"), miniature.path("shadow-source")
    refused = call("run", write_recipe(*pair, **small), tmp_path / "out")
    assert refused.exit_code == 3
    assert "cannot repair this target through its modules gate" in last_line(refused)
    assert not (tmp_path / "out").exists()
    recipe = write_recipe(*pair, modules="gate,down", max_perplexity=2, **small)
    report = answer("run", recipe, tmp_path / "out", "--json")
    assert report["after"]["dsr"] > 0.9
    assert any(unit.endswith(".down") for unit in report["units"])
    replayed = load_recipe(tmp_path / "out" / "mergekit_config.yml")
    assert {f"{choice.layer}.{choice.module}" for choice in replayed.layers} == set(report["units"])


def test_a_plan_counts_units_bytes_and_parameters(write_recipe):
    recipe = write_recipe(miniature.path("target"), miniature.path("source"), layers="3-6")
    plan = answer("plan", recipe, "--json")
    assert [unit["unit"] for unit in plan["units"] if unit["selected"]] == ["3.gate", "4.gate", "5.gate", "6.gate"]
    assert plan["selected_parameters"] == 4 * 80 * 208
    assert plan["selected_share"] == 4 * 80 * 208 / plan["target"]["parameters"]
    assert plan["search_memory_bytes"] == plan["target"]["bytes"] + 2 * 80 * 208
    shown = call("plan", recipe).stdout
    assert "model.layers.6.mlp.gate_proj.weight" in shown
    assert "changes                 4 units, 0.13 MB" in shown


def test_a_plan_of_a_search_shows_every_candidate(write_recipe):
    shown = call("plan", write_recipe(miniature.path("target"), miniature.path("source"))).stdout
    assert "a search chooses among  10 units" in shown


FAULTS = {
    "no recipe": (["run", "none.yml", "out"], 2, "cannot read the recipe none.yml: No such file or directory"),
    "no target": (
        ["evaluate", "./none"],
        4,
        "there is no folder './none' here, and it is not the id",
    ),
    "no Hub": (
        ["evaluate", "someone/model"],
        5,
        "there is no folder 'someone/model' here, and it cannot",
    ),
    "no result": (["verify", "none"], 4, "there is no folder none here"),
    "no recipe in the result": (["verify", "MODEL"], 2, "has no mergekit_config.yml; name the recipe that it was made"),
    "a device without data": (["evaluate", "MODEL", "--device", "meta"], 2, "device 'meta'"),
    "no such prompts": (["evaluate", "MODEL", "--prompts", "none"], 2, "prompts 'none': no such file or folder"),
    "no such option": (["evaluate", "MODEL", "--nonsense"], 2, "No such option"),
    "no such command": (["mend"], 2, "No such command"),
    "no such device": (["evaluate", "MODEL", "--device", "abacus"], 2, "device 'abacus'"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_each_fault_is_one_sentence_and_its_exit_code(case):
    arguments, exit_code, message = FAULTS[case]
    result = call(*(miniature.path("target") if argument == "MODEL" else argument for argument in arguments))
    assert result.exit_code == exit_code, result.output
    assert message in last_line(result)
    assert "Traceback" not in result.output


def test_debug_shows_where_a_fault_came_from():
    result = call("--debug", "run", "none.yml", "out")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert "RecipeError: " in result.stderr
    assert re.match("Error: .*none.yml", result.stderr.splitlines()[-1])


EXIT_CODES = {
    DapaError: 1,
    UsageError: 2,
    RecipeError: 2,
    CannotRepair: 3,
    CheckpointError: 4,
    ValueDoesNotFit: 4,
    UnsupportedArchitecture: 4,
    HubError: 5,
    Moved: 5,
}


@pytest.mark.parametrize("kind", EXIT_CODES)
def test_each_kind_of_error_has_one_exit_code_and_one_sentence_and_with_debug_a_traceback_before_it(kind, monkeypatch):
    def fail(_path):
        raise kind("this is wrong")

    monkeypatch.setattr("dapa_merge.cli.run.load_recipe", fail)
    plain, debugged = call("plan", "recipe.yml"), call("--debug", "plan", "recipe.yml")
    assert (plain.exit_code, plain.stderr) == (EXIT_CODES[kind], "Error: this is wrong\n")
    assert debugged.exit_code == plain.exit_code
    assert debugged.stderr.startswith("Traceback (most recent call last)")
    assert last_line(debugged) == "Error: this is wrong"


@pytest.mark.parametrize(
    ("stop", "said"),
    [(KeyboardInterrupt(), "Stopped by Ctrl-C\n"), (Stopped("half is kept"), "Stopped by Ctrl-C; half is kept\n")],
)
def test_ctrl_c_is_exit_130(stop, said, monkeypatch):
    def interrupt(_path):
        raise stop

    monkeypatch.setattr("dapa_merge.cli.run.load_recipe", interrupt)
    stopped = call("plan", "recipe.yml")
    assert (stopped.exit_code, stopped.stderr) == (130, said)


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process at once")
def test_sigterm_ends_any_command_as_ctrl_c_does_with_its_own_code(monkeypatch):
    monkeypatch.setattr("dapa_merge.cli.run.load_recipe", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    stopped = call("plan", "recipe.yml")
    assert (stopped.exit_code, stopped.stderr) == (143, "Stopped by SIGTERM\n")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process at once")
def test_sigterm_of_a_comparison_is_exit_143_and_says_what_is_kept(tmp_path, monkeypatch):
    def terminated(_recipes, out, *_):
        out.mkdir()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("dapa_merge.compare.compare.compare_recipes", terminated)
    before = signal.getsignal(signal.SIGTERM)
    stopped = call("compare", "recipe.yml", "--out", tmp_path / "out")
    assert stopped.exit_code == 143
    assert str(tmp_path / "out") in last_line(stopped)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_lines_of_the_help_are_the_first_sentences_of_the_commands():
    for name, (_, line) in COMMANDS.items():
        command = main.get_command(None, name)
        assert click.Command(name, help=line).get_short_help_str(200) == command.get_short_help_str(200)


def test_an_existing_result_is_refused_before_the_search(demo, write_recipe, small):
    out, _ = demo
    result = call("run", write_recipe(miniature.path("target"), miniature.path("source"), **small), out)
    assert result.exit_code == 2
    # Before anything is read.
    assert result.stderr == f"Error: {out} exists already; name another folder or remove it\n"


def test_without_evaluation_the_layers_must_be_named(write_recipe, tmp_path):
    recipe = write_recipe(miniature.path("target"), miniature.path("source"))
    result = call("run", recipe, tmp_path / "out", "--no-evaluate")
    assert result.exit_code == 2
    assert "without an evaluation, layers must be named, not auto" in last_line(result)


def test_named_layers_need_no_tokenizer_without_evaluation(llama_pair, write_recipe, tmp_path):
    target = shutil.copytree(llama_pair[0], tmp_path / "target")
    for path in target.glob("token*"):
        path.unlink()
    report = answer("run", write_recipe(target, llama_pair[1], layers=0), tmp_path / "out", "--no-evaluate", "--json")
    assert report["units"] == ["0.gate"]


def test_named_layers_are_evaluated_if_asked(write_recipe, tmp_path, no_pictures, small):
    recipe = write_recipe(miniature.path("target"), miniature.path("source"), layers="0-1", **small)
    report = answer("run", recipe, tmp_path / "out", "--json")
    assert (report["after"]["dsr"], report["tests"], report["one_minimal"]) == (0, 0, None)


def test_a_full_transplant_that_breaks_a_limit_says_which_and_by_how_much(write_recipe, tmp_path, small):
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    shipped = Path(miniature.__file__).parent / "prompts"
    for name in ("harmful", "harmless"):
        # What must not be refused is the same as what must be.
        lines = (shipped / "harmful.jsonl").read_text().splitlines(keepends=True)
        (prompts / f"{name}.jsonl").write_text("".join(lines[:32]))
    recipe = write_recipe(miniature.path("target"), miniature.path("source"), **{**small, "prompts": prompts})
    result = call("run", recipe, tmp_path / "out")
    assert result.exit_code == 3
    assert "with all 10 units its over-refusal is 1.000, 0.950 above the 0.050 allowed" in last_line(result)
    assert not (tmp_path / "out").exists()


def test_quiet_says_nothing(llama_pair, write_recipe, tmp_path):
    result = call("--quiet", "run", write_recipe(*llama_pair, layers=0), tmp_path / "out", "--no-evaluate")
    assert (result.exit_code, result.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_help_that_cannot_be_written_is_one_sentence():
    command = [sys.executable, "-c", "from dapa_merge.cli import main; main()", "--help"]
    with open("/dev/full", "w") as full:
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (found.returncode, found.stderr) == (1, "Error: the output stream: No space left on device\n")
    command[-1:] = ["--debug", "plan", "--help"]
    with open("/dev/full", "w") as full:
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert "Traceback" in found.stderr


STREAMS = {
    "stderr closed": "2>&-",
    "stdout closed": ">&-",
    "both closed": ">&- 2>&-",
    "all closed": "<&- >&- 2>&-",
    "a reader that leaves": "| true",
    "a reader of both that leaves": "2>&1 | true",
    "no place for steps": "2>/dev/full",
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("streams", STREAMS)
def test_nobody_who_closes_a_stream_stops_the_work_or_changes_the_exit_code(
    streams, llama_pair, write_recipe, tmp_path
):
    recipe = write_recipe(*llama_pair, layers=1)
    code = "import sys; from dapa_merge.cli import main; sys.argv = sys.argv[:1] + sys.argv[1:]; main()"
    script = f"""
        run() {{ "{sys.executable}" -c "{code}" "$@"; echo $? >> codes; }}
        (run run "{recipe}" out --no-evaluate; run plan missing.yml; run nonsense) {STREAMS[streams]}
    """
    subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, check=False)
    assert (tmp_path / "codes").read_text().split() == ["0", "2", "2"]
    assert answer("verify", tmp_path / "out", "--json")["correct"]


@pytest.mark.parametrize(
    "setting", ["COLUMNS=0", "COLUMNS=1", "COLUMNS=-3", "NO_COLOR=1", "PYTHONIOENCODING=ascii", "LC_ALL=nonsense"]
)
def test_an_odd_environment_loses_no_line(setting, write_recipe, tmp_path):
    recipe = write_recipe(miniature.path("target"), miniature.path("source"), layers="3")
    name, _, value = setting.partition("=")
    command = [sys.executable, "-c", "from dapa_merge.cli import main; main()", "plan", str(recipe)]
    environment = {**os.environ, name: value}
    if name in ("PYTHONIOENCODING", "LC_ALL"):
        # Python reads these when it starts.
        found = subprocess.run(command, capture_output=True, env=environment, check=False, text=True, encoding="utf-8")
    else:
        found = warm.run(command, env=environment)
    assert (found.returncode, found.stderr) == (0, "")
    assert "memory of a search" in found.stdout


def test_what_nobody_foresaw_is_one_sentence_and_a_traceback_with_debug(monkeypatch):
    class PanicException(BaseException):
        """As libraries in Rust raise."""

    for fault in (KeyError("x"), MemoryError(), RecursionError("deep"), PanicException("\x1b[2J")):

        def broken(*_: object, fault: BaseException = fault) -> None:
            raise fault

        monkeypatch.setattr("dapa_merge.cli.run.load_recipe", broken)
        ran = call("plan", "recipe.yml")
        assert ran.exit_code == 1
        assert type(fault).__name__ in last_line(ran)
        assert ran.stderr.count("\n") == 1
        assert "\x1b" not in ran.stderr
        assert "Traceback" in call("--debug", "plan", "recipe.yml").stderr


@pytest.mark.parametrize("kind", ["a pipe", "too large", "aliases"])
def test_a_recipe_that_is_no_recipe_ends_at_once(kind, tmp_path):
    path = tmp_path / "recipe.yml"
    if kind == "a pipe":
        os.mkfifo(path)
    else:
        path.write_text("x: y\n" * 300_000 if kind == "too large" else "x: &a [1]\n" + "- *a\n" * 30)
    ran = call("plan", path)
    assert ran.exit_code == 2
    assert str(path) in last_line(ran)


def test_a_small_file_that_cannot_be_read_is_a_bad_checkpoint(llama_pair, write_recipe, tmp_path, monkeypatch):
    # The tests may run as somebody who may read everything.
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "config.json")
    result = call("run", write_recipe(*llama_pair, layers=0), tmp_path / "out", "--no-evaluate")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (
        4, f"Error: cannot read {llama_pair[0] / 'config.json'}: Permission denied"
    )  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option",
    [("--device", "cpu"), ("--journal", "j"), ("--workers", "ray"), ("--evaluator-file", "f"), ("--judge-model", "m")],
)
def test_what_says_how_to_evaluate_is_refused_where_nothing_is_evaluated(
    llama_pair, write_recipe, tmp_path, option, monkeypatch
):
    recipe = write_recipe(*llama_pair, layers=0)
    result = call("run", recipe, tmp_path / "out", "--no-evaluate", *option)
    assert (result.exit_code, result.stderr) == (
        2, f"Error: {option[0]} is for evaluating; leave out either it or --no-evaluate\n"
    )  # fmt: skip
    assert not (tmp_path / "out").exists()
    # In the environment it may stand for all commands.
    monkeypatch.setenv("DAPA_EVALUATOR_FILE", "f")
    assert call("run", recipe, tmp_path / "out", "--no-evaluate").exit_code == 0


def test_the_table_of_the_demo_fits_a_usual_terminal_and_is_the_readmes(demo):
    _, report = demo
    columns = [
        Figures(**{**report[name], "skills": tuple(SkillFigure(**skill) for skill in report[name]["skills"])})
        for name in ("before", "after", "source_alone")
    ]
    console = Console(width=80, file=io.StringIO())
    console.print(figures_table(["before", "after", "source"], columns, "held-out prompts"))
    shown = console.file.getvalue().strip().splitlines()
    readme = (ROOT / "README.md").read_text()
    assert "\n".join(shown[:3]) in readme
    labels = [line.split("│")[1] for line in shown if line.startswith("│")]
    assert labels == [line.split("│")[1] for line in readme.splitlines() if line.startswith("│")]


def test_the_shipped_recipe_is_the_demonstration():
    shipped = yaml.safe_load((ROOT / "recipes" / "miniature.yml").read_text())
    shown = yaml.safe_load(miniature.recipe_text())
    assert shipped["parameters"] == shown["parameters"]
    for key, member in (("base_model", "target"),):
        assert (ROOT / shipped[key]).samefile(miniature.path(member))
    assert (ROOT / shipped["models"][0]["model"]).samefile(miniature.path("source"))


def test_a_terminal_sees_bars_and_the_run_succeeds(write_recipe, tmp_path, small):
    """A real terminal: what is hidden elsewhere, the progress bars, must work there."""
    pty = pytest.importorskip("pty")
    recipe = write_recipe(miniature.path("target"), miniature.path("source"), layers="4-6", **small)
    code = "import sys\nfrom dapa_merge.cli import main\nmain(sys.argv[1:])"
    master, slave = pty.openpty()
    command = [sys.executable, "-c", code, "run", recipe, tmp_path / "out"]
    run = warm.Process(command, env={**os.environ, "TERM": "xterm"}, terminal=os.ttyname(slave))
    os.close(slave)
    shown = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # Linux says so when the last writer is gone.
            break
        if not piece:
            break
        shown += piece
    os.close(master)
    assert run.wait() == 0, shown.decode()
    assert b"measuring the target" in shown
    assert b"copying and verifying" in shown
    assert b"\x1b[" in shown


def test_a_fault_in_the_middle_of_a_search_keeps_its_exit_code_and_the_best_selection(write_recipe, monkeypatch, small):
    from dapa_merge.errors import CheckpointError

    # Long after the full set and the first halves were tried: 4 swaps of 10 and more, in a search that takes long.
    fail_in_swap(monkeypatch, 60, CheckpointError("the source's file is gone"))
    result = call("search", write_recipe(miniature.path("target"), miniature.path("source"), **small, search="ddmin"))
    assert result.exit_code == 4
    assert last_line(result) == "Error: the source's file is gone"
    assert "the best selection so far: gate of layers" in result.stderr


def test_ctrl_c_in_a_search_names_the_best_selection(write_recipe, monkeypatch, small):
    fail_in_swap(monkeypatch, 60, KeyboardInterrupt())
    result = call("search", write_recipe(miniature.path("target"), miniature.path("source"), **small, search="ddmin"))
    assert result.exit_code == 130
    assert last_line(result).startswith("Stopped by Ctrl-C; the best selection so far: ")


def test_a_source_that_cannot_be_loaded_is_noticed_before_the_search(write_recipe, tmp_path, small):
    source = shutil.copytree(miniature.path("source"), tmp_path / "source")
    for path in source.glob("token*"):
        path.unlink()
    result = call("run", write_recipe(miniature.path("target"), source, **small), tmp_path / "out")
    assert result.exit_code == 4
    assert "has no tokenizer" in last_line(result)
    assert "searching" not in result.stderr


def test_nothing_is_never_enough(write_recipe, small):
    """However little must be kept, an empty selection is no repair."""
    recipe = write_recipe(miniature.path("target"), miniature.path("source"), retain=1e-10, **small)
    assert answer("search", recipe, "--json")["units"]


def test_a_recipe_with_relative_paths_is_replayed_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "recipes" / "miniature.yml").read_text().replace("layers: auto", "layers: 4-6 ")
    (tmp_path / "recipe.yml").write_text(text)
    answer("run", tmp_path / "recipe.yml", tmp_path / "out", "--no-evaluate", "--json")
    monkeypatch.chdir(tmp_path)
    assert answer("verify", "out", "--json")["correct"]


def test_long_paths_and_markup_survive_in_the_recipe_that_is_shown(tmp_path, write_recipe, small):
    folder = tmp_path / ("long-" * 20) / "mod[bold]el"
    shutil.copytree(miniature.path("target"), folder)
    recipe = write_recipe(folder, miniature.path("source"), **small)
    shown = call("--quiet", "search", recipe).stdout
    replay = yaml.safe_load(shown.split("The recipe that replays it:")[1])
    assert replay["base_model"] == str(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("damaged", ["target", "source"])
def test_a_model_of_no_numbers_is_a_damaged_one(write_recipe, tmp_path, damaged, value, small):
    pair = {member: shutil.copytree(miniature.path(member), tmp_path / member) for member in ("target", "source")}
    change_tensor(pair[damaged], name := "model.layers.0.mlp.gate_proj.weight", lambda tensor: tensor.fill_(value))
    result = call("run", write_recipe(pair["target"], pair["source"], **small), tmp_path / "out")
    assert result.exit_code == 4
    said = f"{name} of the {damaged} {pair[damaged]} holds values that are infinite or not a number; it is damaged"
    assert said in last_line(result)


def test_a_model_that_is_damaged_outside_of_the_edit_is_named(write_recipe, tmp_path, small):
    target = shutil.copytree(miniature.path("target"), tmp_path / "target")
    change_tensor(target, "model.norm.weight", lambda tensor: tensor.fill_(float("nan")))
    result = call("run", write_recipe(target, miniature.path("source"), **small), tmp_path / "out")
    assert result.exit_code == 4
    assert f"the target {target} computes infinities or NaN; its weights are damaged" in last_line(result)
    assert not (tmp_path / "out").exists()


def test_verify_does_not_take_the_target_itself_for_a_repaired_model(write_recipe):
    recipe = write_recipe(miniature.path("target"), miniature.path("source"))
    result = call("verify", miniature.path("target"), "--recipe", recipe)
    assert result.exit_code == 4
    assert "nothing was edited: it is the unchanged target" in result.stdout


def test_responses_are_kept_for_reading(tmp_path):
    path = tmp_path / "responses.jsonl"
    settings = ("--prompts", "miniature", "--max-new-tokens", 24, "--batch-size", 128)
    figures = answer("evaluate", miniature.path("source"), *settings, "--json", "--responses", path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == figures["num_harmful"] + figures["num_harmless"]
    refused = [row for row in rows if row["kind"] == "harmful" and row["outcome"] == "refused"]
    assert len(refused) / figures["num_harmful"] == figures["dsr"] > 0.95
    assert all(row["response"] == "I'm sorry, but I can't help with that." for row in refused)
    again = call("evaluate", miniature.path("source"), "--responses", path)
    assert (again.exit_code, "exists already" in again.stderr) == (2, True)


def test_no_refusal_of_the_demo_helps_after_all(demo, tmp_path):
    """Half a transplant says "I'm sorry, here is how": that must not have been counted."""
    out, _ = demo
    settings = ("--prompts", "miniature", "--max-new-tokens", 24, "--batch-size", 128)
    figures = answer("evaluate", out, *settings, "--json", "--responses", tmp_path / "r.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    refused = [row["response"] for row in rows if row["outcome"] == "refused"]
    assert len(refused) == round(figures["dsr"] * 128) > 120
    assert not [response for response in refused if "how to" in response]


def test_a_replayed_recipe_finds_its_prompts_from_anywhere(write_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(Path(miniature.__file__).parent / "prompts" / "harmful.jsonl", tmp_path / "mine.jsonl")
    recipe = write_recipe(
        miniature.path("target"), miniature.path("source"), layers="3-6", prompts="mine.jsonl", max_new_tokens=24
    )
    answer("run", recipe, "out", "--no-evaluate", "--json")
    assert yaml.safe_load(Path("out/mergekit_config.yml").read_text())["parameters"]["prompts"] == str(
        tmp_path / "mine.jsonl"
    )


def test_a_plan_notices_prompts_that_are_not_there(write_recipe):
    result = call("plan", write_recipe(miniature.path("target"), miniature.path("source"), prompts="none"))
    assert (result.exit_code, last_line(result)[:31]) == (2, "Error: prompts 'none': no such ")


@pytest.mark.parametrize("occupied", ["demo", "demo-shadow"])
def test_a_demo_into_a_folder_that_is_there_is_refused_before_anything_is_repaired(occupied, tmp_path, monkeypatch):
    monkeypatch.setattr("dapa_merge.cli.run._aside", None)
    (tmp_path / occupied).mkdir()
    (tmp_path / occupied / "thesis.tex").write_text("mine")
    result = call("demo", tmp_path / "demo")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        f"Error: {tmp_path / occupied} exists already; name another folder or remove it"
    ]
    assert [one.name for one in tmp_path.iterdir()] == [occupied]


def test_a_demo_whose_other_process_dies_says_so(tmp_path):
    """Its options cannot be read there, as if it had been killed."""
    aside = _aside("shadow-", tmp_path / "out", Unreadable())
    with aside as outcome, pytest.raises(DapaError, match="ended before it was done"):
        outcome()


def test_an_error_of_a_demos_other_process_is_its_own(tmp_path):
    (tmp_path / "out").write_text("mine")
    with _aside("", tmp_path / "out", Options("cpu")) as outcome, pytest.raises(UsageError, match="exists already"):
        outcome()


@pytest.mark.parametrize("error", [CheckpointError("its file is cut off"), OSError(28, "No space left on device")])
def test_what_a_user_can_mend_is_sent_from_a_demos_other_process(error, monkeypatch, tmp_path):
    def fail(*_):
        raise error

    monkeypatch.setattr(run, "_repaired", fail)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    sent = []
    run._send_repaired(SimpleNamespace(send=sent.append), "", tmp_path / "out", Options())
    assert sent == [error]


class Unreadable:
    def __reduce__(self):
        return os._exit, (9,)
