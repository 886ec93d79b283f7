"""`dapa-merge compare`, on the miniature."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import warm
from conftest import SHAPE, answer, call, save_random, without_time, write_few
from transformers import AutoConfig, GemmaConfig

from dapa_merge import miniature
from dapa_merge.compare import row as comparing
from dapa_merge.compare.methods import DIRECTIONS, METHODS
from dapa_merge.errors import markdown
from dapa_merge.measure import expected as expecting
from dapa_merge.measure.expected import Expected
from dapa_merge.measure.prompts import parts
from dapa_merge.recipe.parameters import spans
from dapa_merge.report import drawing
from dapa_merge.search import journal as journals
from dapa_merge.search import search as searching
from dapa_merge.search.journal import Journal
from dapa_merge.search.slopes import Settings

# All but `directions`, whose search takes longer than all others together.
QUICK = (
    "--seeds", 1, "--points", 2, "--tries", 2, "--device", "cpu",
    "--methods", ",".join(key for key in METHODS if key != DIRECTIONS),
)  # fmt: skip
LEAST = ("--methods", "fixed", "--no-curve", "--device", "cpu")


def write(folder: Path, name: str, target: str, source: str, number: int = 12, **parameters) -> Path:
    """A recipe for two members of the miniature, with a few prompts."""
    prompts = folder / f"prompts-{number}"
    if not prompts.exists():
        write_few(prompts, number)
        # A skill, so that it is part of the table.
        shipped = miniature.path("target").parent / "prompts" / "skill.jsonl"
        (prompts / "skill.jsonl").write_text("".join(shipped.read_text().splitlines(keepends=True)[:8]))
    settings = {"layers": "auto", "prompts": prompts, "max_new_tokens": 12, "batch_size": 64, **parameters}
    path = folder / f"{name}.yml"
    path.write_text(
        f"merge_method: dapa\nbase_model: {miniature.path(target)}\nmodels:\n  - model: {miniature.path(source)}\n"
        "parameters:\n" + "".join(f"  {key}: {value}\n" for key, value in settings.items())
    )
    return path


# One comparison for all of them.
pytestmark = pytest.mark.xdist_group("compare")


@pytest.fixture(scope="module", autouse=True)
def quick_training():
    with pytest.MonkeyPatch.context() as patch:
        for key in ("training", "training-keep"):
            patch.setitem(METHODS, key, replace(METHODS[key], settings=(("rate", (1e-3, 2e-3)), ("steps", (4.0,)))))
        yield


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> tuple[list[Path], Path, dict]:
    """Recipes, one planted and one not, the folder of their comparison, and the answer of the command."""
    folder = tmp_path_factory.mktemp("compared")
    recipes = [
        write(folder, "planted", "target", "source", pretrained=miniature.path("shadow-source")),
        write(folder, "shadow", "shadow-target", "shadow-source"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        # That it is drawn at all is what is looked at.
        patch.setattr(drawing, "DOTS_PER_INCH", 50)
        return recipes, folder / "out", answer("compare", *recipes, "--out", folder / "out", *QUICK, "--json")


def arms_of(summary: dict, name: str) -> dict[str, dict]:
    (row,) = [row for row in summary["rows"] if row["name"] == name]
    return {arm["key"]: arm for arm in row["arms"]}


def test_every_method_is_measured_on_the_same_prompts(compared):
    _, out, summary = compared
    assert json.loads((out / "summary.json").read_text()) == summary
    arms = arms_of(summary, "planted")
    assert list(arms) == [
        "target", "source", "dapa", "auto", "fixed", "gates", "mlp", "random seed 0", "random-search",
        "mlp of auto", "random of auto seed 0", "random-search of auto", "linear", "slerp", "task-arithmetic",
        "ties", "safe-lora", "safemerge", "resta", "safe-delta", "training", "training-keep",
    ]  # fmt: skip
    assert {arm["figures"]["num_harmful"] for arm in arms.values() if arm["why_not"] is None} == {6}
    # Nothing is known of what the other pair came from.
    for key in ("task-arithmetic", "safe-lora", "safemerge"):
        assert "names no `pretrained` model" in arms_of(summary, "shadow")[key]["why_not"]
    assert {"ties of target", "resta abliterated"} <= arms_of(summary, "shadow").keys()


def test_the_figures_are_those_of_a_run(compared, tmp_path, no_pictures):
    recipes, _, summary = compared
    report = answer("run", recipes[0], tmp_path / "out", "--no-lock", "--json", "--device", "cpu")
    arms = arms_of(summary, "planted")
    for key, figures in (("target", "before"), ("source", "source_alone"), ("dapa", "after")):
        for figure in ("dsr", "over_refusal", "perplexity", "dsr_interval", "skills"):
            assert arms[key]["figures"][figure] == report[figures][figure], (key, figure)
    assert arms["dapa"]["share"] == report["share_changed"]
    assert arms["dapa"]["cost"]["tests"] == report["tests"]


def test_gates_repair_the_planted_target_and_controls_do_not(compared):
    arms = arms_of(compared[2], "planted")
    assert arms["dapa"]["repairs"]
    assert set(arms["dapa"]["detail"].removeprefix("gate of layers ").replace("-", "").replace(",", "")) <= set("3456")
    assert arms["gates"]["repairs"]
    assert not arms["fixed"]["repairs"]
    assert not arms["random seed 0"]["repairs"]
    assert arms["random seed 0"]["share"] == pytest.approx(arms["dapa"]["share"], rel=0.05)


def test_where_gates_cannot_repair_the_tool_says_so_and_what_auto_finds(compared):
    _, out, summary = compared
    arms = arms_of(summary, "shadow")
    assert arms["dapa"]["figures"] is None
    assert "cannot repair this target through its modules gate" in arms["dapa"]["why_not"]
    assert arms["auto"]["repairs"]
    assert any(sentence.startswith("shadow: gate alone cannot repair it; `modules: auto` finds")
               for sentence in summary["findings"])  # fmt: skip
    assert markdown(arms["dapa"]["why_not"]) in (out / "table.md").read_text()


def test_the_curve_goes_from_a_block_to_the_whole_mlp_for_dapa_and_at_random(compared):
    (row,) = [row for row in compared[2]["rows"] if row["name"] == "planted"]
    paths: dict[str, list[dict]] = {}
    for point in row["curve"]:
        paths.setdefault(point["path"], []).append(point)
    assert set(paths) == {"dapa", "random seed 0"}
    first, *_, last = paths["dapa"]
    assert first["share"] == pytest.approx(13 * 80 / row["num_parameters"])
    assert last["share"] == pytest.approx(30 * 208 * 80 / row["num_parameters"])
    assert any(point["share"] == pytest.approx(row["selected"]) for point in paths["dapa"])
    assert any(point["on_front"] for point in row["curve"])
    assert last["dsr"] == paths["random seed 0"][-1]["dsr"]


def test_tables_and_pictures_are_there(compared):
    _, out, _ = compared
    assert {path.name for path in out.iterdir()} == {
        "table.md", "table.csv", "curve.csv", "table.tex", "summary.json", "figures", "rows",
    }  # fmt: skip
    pictures = {path.name for path in (out / "figures").iterdir()}
    assert pictures == {
        f"{name}.{kind}" for name in ("methods", "clouds", "row_planted", "row_shadow") for kind in ("png", "svg")
    }
    assert all((out / "figures" / name).read_bytes()[:4] == b"\x89PNG" for name in pictures if name.endswith("png"))
    lines = list(csv.DictReader((out / "table.csv").read_text().splitlines()))
    assert {line["recipe"] for line in lines} == {"planted", "shadow"}
    for name in pictures:
        if name.endswith("png"):
            assert f"figures/{name}" in (out / "table.md").read_text()


def test_only_the_journals_of_the_searches_keep_answers(compared):
    _, out, _ = compared
    kept = {
        path.relative_to(out).as_posix()
        for path in out.rglob("*")
        if path.is_file() and b"here is how" in path.read_bytes()
    }
    # Of a search that is broken off at once, as there is nothing to be found, there is none.
    assert "rows/planted/dapa.jsonl" in kept
    # In the figures are the target's own answers to harmless prompts, which a training goes on giving.
    journals = ("dapa", "auto", "figures")
    assert kept <= {f"rows/{row}/{journal}.jsonl" for row in ("planted", "shadow") for journal in journals}
    notes = (json.loads(line) for line in (out / "rows/planted/figures.jsonl").read_text().splitlines())
    assert {one.get("note") for one in notes if "here is how" in json.dumps(one)} == {"own answers"}


def test_again_nothing_is_measured_and_other_methods_are_taken_from_what_is_there(compared, tmp_path, no_pictures):
    recipes, whole, summary = compared
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    journals = {path: path.read_bytes() for path in out.rglob("*.jsonl")}
    again = answer("compare", recipes[1], "--out", out, *QUICK, "--json")
    assert again["rows"] == summary["rows"][1:]
    fewer = answer("compare", recipes[0], "--out", out, *QUICK, "--methods", "dapa,ties", "--json")
    assert {path: path.read_bytes() for path in out.rglob("*.jsonl")} == journals
    assert list(arms_of(fewer, "planted")) == ["target", "source", "dapa", "ties"]
    assert not (out / "figures" / "row_shadow.png").exists()


def test_killed_it_goes_on_and_comes_to_the_same(compared, tmp_path, no_pictures):
    recipes, _, summary = compared
    out = tmp_path / "out"
    main = "from dapa_merge.cli import main; main()"
    options = (*QUICK, "--no-curve", "--methods", "dapa,gates,fixed,random,linear")
    command = [sys.executable, "-c", main, "compare", recipes[0], "--out", out, *options]
    process = warm.Process(command)
    journal = out / "rows" / "planted" / "figures.jsonl"
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = journal.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    resumed = answer("compare", recipes[0], "--out", out, *options, "--json")
    assert journal.read_bytes().startswith(kept)
    expected = arms_of(summary, "planted")
    for key, arm in arms_of(resumed, "planted").items():
        assert without_time(arm) == without_time(expected[key])
    assert len(arms_of(resumed, "planted")) == 7


def test_stopped_after_any_try_it_comes_to_the_same(compared, tmp_path, no_pictures, monkeypatch):
    recipes, _, summary = compared
    out = tmp_path / "out"
    options = (*QUICK, "--no-curve", "--methods", "resta,safe-delta,training", "--json")
    note, left = Journal.note, []

    def stopping(self, name, value, seconds=None):
        note(self, name, value, seconds)
        left.append(name)
        if len(left) % 4 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "note", stopping)
    codes = []
    while not codes or codes[-1] == 130:
        result = call("compare", recipes[1], "--out", out, *options)
        codes.append(result.exit_code)
        assert len(codes) < 9
    assert codes[-1] == 0
    assert len(codes) > 2
    # Nothing was measured twice.
    assert len(left) == len(set(left))
    expected = arms_of(summary, "shadow")
    for key, arm in arms_of(json.loads(result.stdout), "shadow").items():
        assert without_time(arm) == without_time(expected[key])


def test_what_run_searched_is_not_searched_again_but_counts_in_the_cost(own_cache, tmp_path, no_pictures):
    recipe = write(tmp_path, "planted", "target", "source")
    found = answer("search", recipe, "--json")
    lines = {path: path.read_bytes() for path in (own_cache / "dapa-merge" / "journals").iterdir()}
    (searched,) = ([json.loads(line) for line in content.splitlines()] for content in lines.values())
    out = tmp_path / "out"
    result = call("compare", recipe, "--out", out, "--methods", "dapa", "--no-curve", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.stderr
    assert "of the same search are taken over from the journal" in result.stderr
    dapa = arms_of(json.loads(result.stdout), "planted")["dapa"]
    assert (dapa["cost"]["tests"], dapa["detail"]) == (found["tests"], spans(found["units"]))
    # Of a process that is gone nobody knows the memory.
    assert dapa["cost"]["peak_bytes"] == {}
    assert dapa["cost"]["seconds"] >= sum(line.get("seconds", 0) for line in searched) > 0
    taken = [json.loads(line) for line in (out / "rows" / "planted" / "dapa.jsonl").read_bytes().splitlines()]
    assert taken == searched
    assert {path: path.read_bytes() for path in lines} == lines


def test_a_search_with_other_prompts_or_of_others_is_not_taken(own_cache, tmp_path, no_pictures, monkeypatch):
    recipe = write(tmp_path, "planted", "target", "source")
    answer("search", recipe, "--json")
    options = ("--methods", "dapa", "--no-curve", "--device", "cpu")
    # Keep prompts part the others otherwise.
    keep = write(tmp_path, "keep", "target", "source", keep="skills")
    result = call("compare", keep, "--out", tmp_path / "keep", *options)
    assert (result.exit_code, "taken over" in result.stderr) == (0, False), result.stderr
    monkeypatch.setattr(journals, "own_key", lambda: b"another")
    result = call("compare", recipe, "--out", tmp_path / "others", *options)
    assert (result.exit_code, "taken over" in result.stderr) == (0, False), result.stderr


def test_a_comparison_says_beforehand_how_long_it_takes_and_counts_what_it_asks(tmp_path, no_pictures, monkeypatch):
    recipe, asked, lines = write(tmp_path, "planted", "target", "source"), [0], []
    monkeypatch.setattr(expecting, "TOLD_SECONDS", 0)
    monkeypatch.setattr(
        "dapa_merge.measure.generate.advance", lambda number, _: asked.__setitem__(0, asked[0] + number)
    )
    told = Expected.tell
    monkeypatch.setattr(Expected, "tell", lambda self: (lines.append(self), told(self)))
    methods = "dapa,fixed,gates,random,linear,resta"
    options = ("--methods", methods, "--seeds", 2, "--points", 3, "--tries", 2, "--device", "cpu")
    result = call("compare", recipe, "--out", tmp_path / "out", *options)
    assert result.exit_code == 0, result.stderr
    assert re.search(r"this takes about .* on cpu, .* GB of its memory and the batches", result.stderr)
    (first,) = lines
    assert set(first.parts) == {"planted", "planted: dapa"}
    total = sum(amounts["prompts"] for amounts in first.parts.values())
    assert asked[0] / 2 <= total <= 2 * asked[0]
    # What was measured is not expected again.
    assert call("compare", recipe, "--out", tmp_path / "out", *options).exit_code == 0
    assert sum(amounts["prompts"] for amounts in lines[1].parts.values()) < total / 4
    assert "planted: dapa" not in lines[1].parts


def test_a_recipe_that_names_its_layers_is_not_searched(compared, tmp_path, no_pictures):
    recipe = write(tmp_path, "named", "target", "source", layers='"3-5"')
    summary = answer("compare", recipe, "--out", tmp_path / "out", *LEAST, "--methods", "dapa,auto", "--json")
    assert list(arms_of(summary, "named")) == ["target", "source", "dapa"]
    dapa = arms_of(summary, "named")["dapa"]
    assert (dapa["detail"], dapa["cost"]) == ("gate of layers 3-5", None)
    assert dapa["figures"]["num_harmful"] == 12


def test_what_cannot_be_loaded_costs_only_its_row_and_the_exit_code_is_its_own(compared, tmp_path, no_pictures):
    broken = tmp_path / "broken-target"
    shutil.copytree(miniature.path("target"), broken)
    for path in broken.glob("*token*"):
        path.unlink()
    good = write(tmp_path, "good", "target", "source")
    bad = write(tmp_path, "bad", "target", "source")
    bad.write_text(bad.read_text().replace(str(miniature.path("target")), str(broken)))
    result = call("compare", bad, good, "--out", tmp_path / "out", *LEAST)
    assert result.exit_code == 4
    assert "has no tokenizer" in result.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["name"] for row in summary["rows"]] == ["good"]
    assert "has no tokenizer" in summary["failures"]["bad"]
    assert "## Not measured" in (tmp_path / "out" / "table.md").read_text()


def test_other_models_do_not_go_into_the_same_row(compared, tmp_path, no_pictures):
    recipe = write(tmp_path, "one", "target", "source")
    answer("compare", recipe, "--out", tmp_path / "out", *LEAST, "--json")
    write(tmp_path, "one", "shadow-target", "shadow-source")
    result = call("compare", recipe, "--out", tmp_path / "out", *LEAST)
    assert result.exit_code == 2
    assert "belongs to another comparison: source, target" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "dapa,magic"), "--methods: unknown method 'magic'; known are dapa, auto, directions"),
        (("--tries", "0"), "Invalid value for '--tries'"),
        (("--weights", "0.5,2"), "'2' is not a weight; write numbers above 0 and up to 1, with commas"),
        (("--weights", "some"), "'some' is not a weight"),
        (("--points", "1"), "Invalid value for '--points'"),
        (("--device", "nowhere"), "device 'nowhere' cannot be used here"),
        (
            ("--workers", "ray", "--judge-model", "judge", "--judge-requests", "3"),
            "workers do not share a limit of requests to the judge",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, arguments, message):
    recipe = write(tmp_path, "one", "target", "source")
    result = call("compare", recipe, "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out" / "table.md").exists()


def test_a_bad_recipe_is_told_before_anything_is_measured(tmp_path):
    good, bad = write(tmp_path, "good", "target", "source"), write(tmp_path, "bad", "target", "source", nonsense=1)
    result = call("compare", good, bad, "--out", tmp_path / "out", *LEAST)
    assert result.exit_code == 2
    assert "unknown key parameters.nonsense" in result.stderr
    assert not (tmp_path / "out").exists()


def test_every_setting_that_was_tried_is_on_the_page_and_one_by_the_rule_is_measured(compared):
    _, out, summary = compared
    page = (out / "table.md").read_text()
    for row in summary["rows"]:
        tuned = [arm for arm in row["arms"] if arm["tuning"]]
        assert {arm["method"] for arm in tuned} >= {
            "linear",
            "slerp",
            "ties",
            "safe-delta",
            "training",
            "training-keep",
        }
        for arm in tuned:
            trials, chosen = arm["tuning"]["trials"], arm["tuning"]["chosen"]
            assert arm["detail"] == trials[chosen]["setting"]
            assert arm["cost"]["tests"] == len(trials) <= 2
            if any(trial["complaint"] is None for trial in trials):
                assert trials[chosen]["complaint"] is None
                able = [trial["figures"]["score"] for trial in trials if trial["complaint"] is None]
                assert trials[chosen]["figures"]["score"] == max(able)
            assert all(f"{arm['label']} | {trial['setting']}" in " ".join(page.split()) for trial in trials)


def test_weights_that_are_named_are_rows_of_their_own_and_not_chosen_among(compared, tmp_path, no_pictures):
    recipes, whole, _ = compared
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    how = ("--methods", "linear,slerp,ties", "--weights", "0.5,1", "--no-curve", "--device", "cpu")
    arms = arms_of(answer("compare", recipes[1], "--out", out, *how, "--json"), "shadow")
    assert list(arms)[2:] == ["linear 0.5", "slerp 0.5", "ties of target 0.5", "ties of target 1"]
    assert [arm["tuning"] for arm in arms.values()] == [None] * len(arms)


def test_a_recipe_of_directions_is_compared_with_copies_of_gates(tmp_path, no_pictures):
    recipe = write(tmp_path, "one", "target", "source", edit="directions")
    (row,) = answer("compare", recipe, "--out", tmp_path / "out", *LEAST, "--json")["rows"]
    assert row["modules"] == "gate"
    assert row.get("edit", "copy") == "copy"


def test_too_few_prompts_for_directions_cost_only_their_own_row(tmp_path, no_pictures):
    recipe = write(tmp_path, "one", "target", "source", number=2, keep="skills")
    how = ("--methods", "fixed,directions", "--no-curve", "--device", "cpu")
    arms = arms_of(answer("compare", recipe, "--out", tmp_path / "out", *how, "--json"), "one")
    assert "too few for a choice, a search and a separate report" in arms["directions"]["why_not"]
    assert arms["fixed"]["figures"]["num_harmful"] == 1


def test_directions_stand_beside_the_other_methods_and_share_no_prompt_with_the_report(
    tmp_path, no_pictures, monkeypatch
):
    monkeypatch.setattr(searching, "Settings", lambda: Settings(num_rounds=2, num_steps=4, rate=0.3))
    measured, asked = [], []

    def search_prompts(recipe, **how):
        found = parts.split_prompts(recipe, **how)
        asked.extend([*found.search.keep, *(found.choice.keep if found.choice else ())])
        return found

    def report_prompts(recipe, **how):
        measured.append(parts.all_prompts(recipe, **how))
        return measured[-1]

    monkeypatch.setattr(searching, "split_prompts", search_prompts)
    monkeypatch.setattr(comparing, "all_prompts", report_prompts)
    keep = tmp_path / "keep.jsonl"
    keep.write_text("".join(json.dumps({"prompt": f"What is a garden number {n}?"}) + "\n" for n in range(12)))
    recipe = write(tmp_path, "one", "shadow-target", "shadow-source", keep=keep, max_tests=1)
    how = ("--methods", "dapa,directions", "--no-curve", "--device", "cpu")
    summary = answer("compare", recipe, "--out", tmp_path / "out", *how, "--json")
    arms = arms_of(summary, "one")
    assert list(arms) == ["target", "source", "dapa", "directions"]
    assert summary["rows"][0]["modules"] == "gate"
    assert re.fullmatch(r"\d+ directions in 30 matrices", arms["directions"]["detail"])
    found, again = measured
    assert found == again
    assert set(asked) == set(found.search.keep)
    assert found.report.keep
    assert not set(found.report.keep) & set(asked)
    again = answer("compare", recipe, "--out", tmp_path / "out", *how, "--json")
    assert again["rows"] == summary["rows"]


def test_of_directions_that_all_break_a_limit_the_nearest_are_measured_as_of_other_methods(
    tmp_path, no_pictures, monkeypatch
):
    monkeypatch.setattr(searching, "Settings", lambda: Settings(num_rounds=1, num_steps=1, rate=0.3))
    limits = {"max_tests": 1, "max_divergence": 1e-9}
    recipe = write(tmp_path, "one", "shadow-target", "shadow-source", keep="skills", **limits)
    how = ("--methods", "directions", "--no-curve", "--device", "cpu")
    summary = answer("compare", recipe, "--out", tmp_path / "out", *how, "--json")
    found = arms_of(summary, "one")["directions"]
    said = r"\d+ directions in \d+ matrices; nothing keeps to the limits, and of the nearest its .* (required|allowed)"
    assert re.fullmatch(said, found["detail"])
    assert found["why_not"] is None
    assert found["figures"]["divergence"] > 1e-9
    assert found["repairs"] is False
    again = answer("compare", recipe, "--out", tmp_path / "out", *how, "--json")
    assert again["rows"] == summary["rows"]


def test_a_row_with_keep_prompts_gets_directions_later_in_the_same_folder(tmp_path, no_pictures, monkeypatch):
    monkeypatch.setattr(searching, "Settings", lambda: Settings(num_rounds=1, num_steps=1, rate=0.3))
    recipe = write(tmp_path, "one", "target", "source", keep="skills", max_tests=1)
    how = ("--no-curve", "--device", "cpu", "--out", tmp_path / "out")
    (first,) = answer("compare", recipe, "--methods", "fixed", *how, "--json")["rows"]
    (second,) = answer("compare", recipe, "--methods", "fixed,directions", *how, "--json")["rows"]
    assert [arm["key"] for arm in second["arms"]] == ["target", "source", "directions", "fixed"]
    assert [arm for arm in second["arms"] if arm["key"] != "directions"] == first["arms"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    recipe = write(tmp_path, "one", "target", "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    result = call("compare", recipe, "--out", tmp_path / "out", *LEAST)
    assert result.exit_code == 2
    assert "exists and is not the folder of a comparison; name another or remove it" in result.stderr
    assert os.listdir(tmp_path / "out") == ["thesis.tex"]


@pytest.mark.parametrize(
    ("pretrained", "exit_code", "message"),
    [
        ("source", 2, "parameters.pretrained: the pretrained model is the source itself"),
        ("other", 4, "the pretrained model {path} is a GemmaForCausalLM but the target"),
        ("shallower", 4, "the pretrained model {path} has nothing for model.layers.2."),
        ("narrower", 4, "the pretrained model {path} has ["),
    ],
)
def test_what_the_models_do_not_come_from_is_refused(tmp_path, pretrained, exit_code, message):
    path = miniature.path("source")
    if pretrained != "source":
        changes = {"num_hidden_layers": 2} if pretrained == "shallower" else {"hidden_size": 40}
        config = AutoConfig.from_pretrained(miniature.path("target"), **changes)
        if pretrained == "other":
            config = GemmaConfig(**SHAPE)
        path = save_random(tmp_path / "base", config, seed=1)
    recipe = write(tmp_path, "one", "target", "source", pretrained=path)
    result = call("compare", recipe, "--out", tmp_path / "out", *LEAST)
    assert result.exit_code == exit_code
    assert message.format(path=path) in result.stderr


def test_the_recipes_evaluator_says_what_is_refused(tmp_path, no_pictures):
    """The paper's words are found in answers that the rules do not take for refusals, and the other way round."""
    found = {}
    for evaluator in ("refusal", "paper"):
        recipe = write(tmp_path, evaluator, "target", "source", layers='"3-5"', evaluator=evaluator)
        summary = answer("compare", recipe, "--out", tmp_path / "out" / evaluator, *LEAST, "--json")
        (row,) = summary["rows"]
        assert row["evaluator"] == evaluator
        found[evaluator] = arms_of(summary, evaluator)["source"]["figures"]
    assert [marker["name"] for marker in found["paper"]["markers"]] == ["refusal"]
    assert found["paper"]["markers"][0]["dsr"] == found["refusal"]["dsr"]


def test_the_best_of_as_many_random_selections_as_the_search_tested_is_chosen_by_its_prompts(compared):
    _, out, summary = compared
    tests = arms_of(summary, "planted")["dapa"]["cost"]["tests"]
    notes = {}
    for line in (out / "rows" / "planted" / "figures.jsonl").read_text().splitlines():
        content = json.loads(line)
        notes[content.get("note")] = content.get("value")
    scores = [value for name, value in notes.items() if str(name).startswith("score ")]
    # Some may have been drawn twice; auto's are of the same size here, and may be the same.
    assert 1 < len(scores) <= 2 * tests
    assert all(-1 <= score <= 1 for score in scores)
    best = arms_of(summary, "planted")["random-search"]
    assert best["share"] == pytest.approx(arms_of(summary, "planted")["dapa"]["share"], rel=0.05)
    assert best["detail"] != arms_of(summary, "planted")["random seed 0"]["detail"]


def test_other_prompts_attacks_and_divergence_are_measured_of_every_method_and_are_those_of_evaluate(tmp_path):
    recipe = write(tmp_path, "planted", "target", "source", layers="0-9")
    (tmp_path / "more.jsonl").write_text("".join(f'{{"prompt": "{text}"}}\n' for text in ("Rob a bank.", "Forge it.")))
    options = ("--out", tmp_path / "out", "--methods", "gates", "--no-curve", "--device", "cpu", "--json")
    besides = ("--also", tmp_path / "more.jsonl", "--attacks", "prefill", "--divergence")
    plain = answer("compare", recipe, *options)
    found = answer("compare", recipe, *options, *besides)
    arms = {arm["key"]: arm for arm in found["rows"][0]["arms"]}
    assert not any(arm["further"] for arm in plain["rows"][0]["arms"])
    for key, arm in arms.items():
        further = {(one["name"], one["figure"]): one for one in arm["further"]}
        assert list(further) == [
            (str(tmp_path / "more.jsonl"), "DSR"), ("prefilled opening", "DSR"), ("harmless prompts", "divergence"),
        ]  # fmt: skip
        assert [one["num_prompts"] for one in further.values()] == [2, 12, 12]
        assert (further["harmless prompts", "divergence"]["value"] == 0) == (key == "target")
    # Both models are on disk too, where the other command measures them.
    for key in ("target", "source"):
        report = answer(
            "evaluate", miniature.path(key), "--prompts", tmp_path / "more.jsonl", "--max-new-tokens", 12, "--json",
            "--device", "cpu",
        )  # fmt: skip
        assert arms[key]["further"][0]["value"] == report["dsr"]
    text = (tmp_path / "out" / "table.md").read_text()
    assert "DSR, prefilled opening (12)" in text
    assert "divergence, harmless prompts (12)" in text


def test_what_is_asked_besides_must_exist(tmp_path):
    recipe = write(tmp_path, "planted", "target", "source", layers="0-9")
    options = ("--out", tmp_path / "out", "--no-curve", "--device", "cpu")
    for more, named in ((("--also", tmp_path / "none.jsonl"), "none.jsonl"), (("--attacks", "gcg"), "'gcg'")):
        result = call("compare", recipe, *options, *more)
        assert result.exit_code == 2
        assert named in result.stderr
