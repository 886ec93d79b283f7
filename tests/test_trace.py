"""`dapa-merge trace`, from a recipe to the page, on real models; and the pictures beside a repaired one."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import direction_files
import numpy
import pytest
import transformers
import warm
from conftest import SHAPE, answer, call, save_random, write_few

from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.errors import UsageError
from dapa_merge.measure import expected as expecting
from dapa_merge.measure.expected import Expected
from dapa_merge.measure.live import mapped_values
from dapa_merge.plan.directions import FILE_NAME, FactorTable
from dapa_merge.plan.edit import Directions
from dapa_merge.plan.plan import plan_transplant
from dapa_merge.plan.selection import make_plan, plan_of_all
from dapa_merge.progress import duration
from dapa_merge.recipe.parse import load_recipe
from dapa_merge.report import drawing
from dapa_merge.search import journal as journals
from dapa_merge.search.bench import Bench
from dapa_merge.trace.causal import Trace
from dapa_merge.trace.charts import CHARTS, _example
from dapa_merge.trace.edits import curve_sizes
from dapa_merge.trace.influence import influence, squared_norms
from dapa_merge.trace.store import check_folder
from dapa_merge.trace.summary import is_planted
from dapa_merge.trace.trace import spread, units_apart

QUICK = ("--num-prompts", 3, "--samples", 2, "--controls", 2)
QUICKER = ("--num-prompts", 1, "--samples", 1, "--controls", 0)
KINDS = ("hidden", "mlp", "attention", "gate", "up", "down")
PLANTED = ("3.gate", "4.gate", "5.gate", "6.gate")
GIVEN = ("--refusal", "I'm sorry, but I can't help with that.", "--answer", "Sure, here is how to do it.")


def planted_recipe(folder: Path, number: int = 24, **parameters) -> Path:
    """A recipe for the miniature pair, with a few prompts."""
    prompts = folder / "prompts"
    if not prompts.exists():
        write_few(prompts, number)
    settings = {"layers": "auto", "prompts": prompts, "max_new_tokens": 12, "batch_size": 64, **parameters}
    lines = [f"merge_method: dapa\nbase_model: {miniature.path('target')}", "models:"]
    lines += [f"  - model: {miniature.path('source')}", "parameters:"]
    lines += [f"  {key}: {value}" for key, value in settings.items()]
    path = folder / "recipe.yml"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> tuple[Path, Path, dict]:
    """A recipe, the folder of its trace, and the answer of the command."""
    folder = tmp_path_factory.mktemp("traced")
    recipe = planted_recipe(folder)
    with small_pictures():
        return recipe, folder / "out", answer("trace", recipe, folder / "out", *QUICK, "--json")


@contextlib.contextmanager
def small_pictures():
    """Pictures of fewer dots, where only that they are drawn is looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "DOTS_PER_INCH", 50)
        yield


def without_time(summary: dict) -> dict:
    passes = {name: value for name, value in summary["passes"].items() if not name.endswith("seconds_per_prompt")}
    return {**summary, "passes": passes}


def test_the_summary_is_what_the_command_answers_and_says_that_the_planted_gates_come_first(traced):
    _, out, summary = traced
    assert json.loads((out / "summary.json").read_text()) == summary
    assert set(summary["planted"]) == {
        "attribution", "influence on refusing", "influence on the hidden state", "tracing of MLPs, by layer",
    }  # fmt: skip
    for name, one in summary["planted"].items():
        assert one["num_common"] == 4, name
        assert one["spearman"] == pytest.approx(one["spearman_at_best"]), name
    gates = [f"{layer}.gate" for layer in (3, 4, 5, 6)]
    assert sorted(summary["planted"]["influence on refusing"]["top"]) == gates
    assert sorted(summary["planted"]["tracing of MLPs, by layer"]["top"]) == ["3", "4", "5", "6"]
    known = "Of these models the answer is known: gate of layers 3-6. "
    assert [sentence.removeprefix(known) for sentence in summary["findings"] if sentence.startswith(known)] == [
        "By attribution, influence on refusing and influence on the hidden state, 4 of the first 4 are right, rank "
        "correlation 0.52 of at most 0.52.",
        "By tracing of MLPs, by layer, 4 of the first 4 are right, rank correlation 0.85 of at most 0.85.",
    ]


def test_gates_and_middle_layers_are_sufficient_and_necessary_and_attention_is_neither(traced):
    _, _, summary = traced
    groups = {one["group"]: one for one in summary["groups"]["groups"]}
    assert summary["groups"]["target"] == 0
    for name, expected in (("gate", 1), ("middle", 1), ("up", 0), ("down", 0), ("attention", 0), ("early", 0)):
        assert groups[name]["sufficiency"] == pytest.approx(expected, abs=0.1), name
        assert groups[name]["necessity"] == pytest.approx(expected, abs=0.1), name
    assert groups["selection"]["sufficiency"] > 0.9
    assert groups["gate"]["num_units"] == 10
    assert all(len(one["random_inserted"]) == len(one["random_reverted"]) == 2 for one in groups.values())


def test_influences_add_up_by_module_and_by_third_of_the_layers(traced):
    _, _, summary = traced
    sums, units = summary["influence_sums"], summary["units"]
    assert list(sums) == ["gate", "up", "down", "attention", "early", "middle", "late"]
    for names in (("gate", "up", "down", "attention"), ("early", "middle", "late")):
        whole = sum(one["influence_on_refusing"]["mean"] for one in units)
        assert sum(sums[name]["mean"] for name in names) == pytest.approx(whole, rel=1e-4)
    assert sums["gate"]["low"] > 50 > sums["up"]["high"]
    assert sums["middle"]["low"] > 50 > sums["late"]["high"]


def test_the_curve_goes_from_nothing_to_every_unit_and_has_the_selection_on_it(traced):
    _, _, summary = traced
    curve = summary["curve"]
    assert [len(point["units"]) for point in curve] == curve_sizes(10, len(summary["selection"]))
    assert summary["selection"] in [point["units"] for point in curve]
    assert (curve[0]["share"], curve[0]["dsr"][0]) == (0, 0)
    assert curve[-1]["dsr"][0] > 0.9
    assert [point["share"] for point in curve] == sorted(point["share"] for point in curve)
    for point in curve:
        low, high = point["dsr"][1]
        assert low <= point["dsr"][0] <= high


def test_the_selection_is_held_against_every_way_to_tell(traced):
    _, _, summary = traced
    overlaps = summary["overlap"]["with_selection"]
    assert set(overlaps) == {
        "attribution", "influence on refusing", "influence on the hidden state", "tracing of single projections",
        "tracing of MLPs",
    }  # fmt: skip
    # With so few prompts the search may do without another of the four than the one that attribution puts last.
    assert overlaps["attribution"]["jaccard"] >= 0.5 > overlaps["attribution"]["jaccard_by_chance"]
    assert all(len(one["top"]) == len(summary["selection"]) for one in overlaps.values())
    assert len(summary["overlap"]["rank_correlations"]) == 10


def test_the_folder_holds_a_trace_for_each_prompt_that_numpy_reads(traced):
    _, out, summary = traced
    paths = sorted((out / "traces").iterdir())
    # Of 12 that can be traced, evenly.
    assert [path.name for path in paths] == ["0001.npz", "0005.npz", "0009.npz"]
    with numpy.load(paths[0], allow_pickle=False) as arrays:
        num_tokens = len(arrays["tokens"])
        for kind in KINDS:
            assert arrays[f"restored_{kind}"].shape == (10, num_tokens)
        assert arrays["corrupted"].shape == (2,)
        first, stop = arrays["subject"]
        assert summary["trace"]["prompts"][0]["subject"] == list(arrays["tokens"][first:stop])
        assert str(arrays["prompt"]) == summary["trace"]["prompts"][0]["prompt"]
    with numpy.load(out / "influence.npz", allow_pickle=False) as arrays:
        assert arrays["refusing"].shape == (12, 40)


def test_every_picture_is_there_as_png_and_svg(traced):
    _, out, _ = traced
    names = {path.stem for path in (out / "figures").iterdir()}
    examples = {f"example_1_{kind}" for kind in ("hidden", "mlp", "attention")}
    assert names == {"influence", "groups", "search", "edit_size", *(f"trace_{kind}" for kind in KINDS), *examples}
    for name in names:
        assert (out / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / "figures" / f"{name}.svg").read_text()


def test_the_page_opens_without_anything_else(traced):
    _, out, summary = traced
    page = (out / "index.html").read_text()
    sources = re.findall(r"""(?:src|href)=["']?([^"'> ]+)""", page)
    assert len(sources) == len(list((out / "figures").glob("*.png")))
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in re.sub(r"base64,[^\"]+", "", page)
    assert "In progress" not in page
    for sentence in summary["findings"]:
        assert sentence.replace("'", "&#39;") in page
    assert "for each of 3 prompts" in page


def test_the_same_command_draws_again_without_tracing_anything(traced, tmp_path, monkeypatch):
    recipe, out, summary = traced
    # One picture stands for all.
    monkeypatch.setattr("dapa_merge.trace.trace.CHARTS", [chart for chart in CHARTS if chart.name == "influence"])
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    shutil.rmtree(copy / "figures")
    (copy / "index.html").unlink()
    times = {path.name: path.stat().st_mtime_ns for path in (copy / "traces").iterdir()}
    with small_pictures():
        again = answer("trace", recipe, copy, *QUICK, "--json")
    # Also the seconds: nothing was run.
    assert again == summary
    assert {path.name: path.stat().st_mtime_ns for path in (copy / "traces").iterdir()} == times
    for name in ("influence.png", "influence.svg"):
        assert (copy / "figures" / name).read_bytes() == (out / "figures" / name).read_bytes()


def test_other_options_trace_anew_and_keep_what_they_do_not_change(traced, tmp_path, no_pictures):
    recipe, out, summary = traced
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    options = (
        "--num-prompts",
        2,
        "--samples",
        1,
        "--controls",
        2,
        "--noise",
        0,
        "--kinds",
        "mlp,gate",
        "--examples",
        2,
    )
    result = call("trace", recipe, copy, *options, "--json")
    assert result.exit_code == 0, result.stderr
    other = json.loads(result.stdout)
    assert other["groups"] == summary["groups"]
    assert other["units"] == summary["units"]
    assert set(other["trace"]["kinds"]) == {"mlp", "gate"}
    # Without noise nothing is lost and nothing comes back.
    assert other["trace"]["total_effect"]["mean"] == pytest.approx(0, abs=1e-4)
    for kind in other["trace"]["kinds"].values():
        assert max(abs(value) for row in kind["mean"] for value in row if value is not None) < 1e-4
    # What was made with other options stays where nothing takes its place.
    names = [path.name for path in sorted((copy / "traces").iterdir())]
    assert names == ["0001.npz", "0005.npz", "0007.npz", "0009.npz"]
    names = {path.stem for path in (copy / "figures").iterdir()}
    assert {"example_1_mlp", "example_2_mlp", "trace_gate"} <= names
    assert not {"trace_hidden", "example_1_hidden"} & names


def test_only_the_stages_that_were_asked_for_are_made_and_those_that_compare_nothing_ask_no_model(
    traced, tmp_path, no_pictures
):
    recipe, out, summary = traced
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    only = answer("trace", recipe, copy, *QUICK, "--stages", "traces,influence", "--json")
    assert only["stages"] == {"done": ["influence", "traces"], "follow": []}
    assert (only["trace"], only["units"]) == (
        summary["trace"],
        [{**unit, "selected": None} for unit in summary["units"]],
    )
    assert (only["groups"], only["curve"], only["search"], only["overlap"]["with_selection"]) == (None, [], None, {})
    assert not {"groups", "search", "edit_size"} & {path.stem for path in (copy / "figures").iterdir()}
    # Nothing is compared, and nobody is asked for it.
    named = planted_recipe(tmp_path, 4, layers="3", max_new_tokens=4)
    groups = answer("trace", named, tmp_path / "new", *QUICKER, "--stages", "groups", "--json")
    assert groups["stages"]["done"] == ["groups"]
    assert groups["num_contrasts"] == 0
    assert len(groups["groups"]["groups"]) == 18


def test_a_damaged_trace_is_made_again_and_another_models_folder_is_refused(traced, tmp_path, no_pictures):
    recipe, out, summary = traced
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    content = (copy / "traces" / "0005.npz").read_bytes()
    (copy / "traces" / "0005.npz").write_bytes(content[: len(content) // 2])
    # A flipped byte in the middle of compressed values.
    content = bytearray((copy / "traces" / "0009.npz").read_bytes())
    content[1500] ^= 0xFF
    (copy / "traces" / "0009.npz").write_bytes(content)
    (copy / "influence.npz").write_bytes(b"")
    (copy / "figures" / "holiday.png").write_bytes(b"mine")
    assert without_time(answer("trace", recipe, copy, *QUICK, "--json")) == without_time(summary)
    assert (copy / "figures" / "holiday.png").read_bytes() == b"mine"
    other = planted_recipe(tmp_path, max_new_tokens=11)
    result = call("trace", other, copy, *QUICK)
    assert result.exit_code == 2
    assert "belongs to another trace: generation, recipe differ; name another folder, or remove it" in result.stderr
    assert (copy / "summary.json").exists()


def test_a_killed_trace_leaves_what_its_stages_found_and_goes_on_to_end_as_one_that_was_not(
    traced, tmp_path, own_cache, no_pictures
):
    recipe, whole, summary = traced
    out = tmp_path / "out"
    out.mkdir()
    # A killed search is the matter of other tests.
    shutil.copy(whole / "journal.jsonl", out)
    command = [
        sys.executable,
        "-c",
        "from dapa_merge.cli import main; main()",
        "--quiet",
        "trace",
        str(recipe),
        str(out),
    ]
    command += [*map(str, QUICK), "--json"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(own_cache)}
    child = warm.Process(command, env=environment)
    deadline = time.monotonic() + 120
    while not (out / "traces" / "0001.npz").exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, child.stderr
    assert (out / "traces" / "0001.npz").exists()
    left, stages = json.loads((out / "summary.json").read_text()), ["search", "influence", "groups", "edits"]
    assert left["stages"] == {"done": stages, "follow": ["traces"]}
    assert (left["trace"], left["units"], left["groups"]) == (None, summary["units"], summary["groups"])
    page = (out / "index.html").read_text()
    assert "In progress" in page
    assert "traces (causal tracing)" in page
    drawn = {path.stem for path in (out / "figures").glob("*.png")}
    assert drawn == {"influence", "groups", "search", "edit_size"}
    assert page.count("<img ") == len(drawn)
    assert without_time(answer("trace", recipe, out, *QUICK, "--json")) == without_time(summary)
    assert not list(out.rglob(".dapa-merge-*"))


@pytest.mark.parametrize(
    ("name", "config", "extra"),
    [("Gemma", "GemmaConfig", {"head_dim": 8}), ("Mistral", "MistralConfig", {"sliding_window": 16})],
)
def test_random_models_of_other_families_are_traced_with_given_responses(
    name, config, extra, tmp_path, write_recipe, no_pictures
):
    shape = {**SHAPE, "vocab_size": 200, **extra}
    target, source = (
        save_random(tmp_path / f"{name}-{seed}", getattr(transformers, config)(**shape), seed=seed) for seed in (1, 2)
    )
    prompts = write_few(tmp_path / "few", 4)
    recipe = write_recipe(target, source, layers="1-2", prompts=prompts, max_new_tokens=4)
    summary = answer("trace", recipe, tmp_path / "out", *QUICKER, *GIVEN, "--json")
    assert summary["planted"] is None
    assert set(summary["trace"]["kinds"]) == set(KINDS)
    assert summary["trace"]["total_effect"]["mean"] != 0
    assert len(summary["units"]) == 16
    assert summary["selection"] == ["1.gate", "2.gate"]
    assert any("do not raise the DSR" in sentence for sentence in summary["findings"])
    assert (tmp_path / "out" / "figures" / "trace_mlp.png").exists()


def test_the_target_can_be_traced_and_experts_and_models_without_gates_are(tmp_path, write_recipe, no_pictures):
    shape = {**SHAPE, "vocab_size": 200}
    config = transformers.MixtralConfig(**shape, num_local_experts=2)
    pair = [save_random(tmp_path / f"m{seed}", config, seed=seed) for seed in (1, 2)]
    prompts = write_few(tmp_path / "few", 4)
    recipe = write_recipe(*pair, prompts=prompts, max_new_tokens=4)
    summary = answer("trace", recipe, tmp_path / "out", *QUICKER, *GIVEN, "--no-search", "--model", "target", "--json")
    assert set(summary["trace"]["kinds"]) == {"hidden", "mlp", "attention"}
    assert summary["trace"]["model"] == "target"
    assert {unit["unit"].split(".")[1] for unit in summary["units"]} == {"gate", "up", "down", "attention"}
    assert summary["selection"] is None
    assert summary["no_selection_because"] == "no search was wanted"
    pair = [
        save_random(
            tmp_path / f"g{seed}", transformers.GPT2Config(n_layer=3, n_embd=32, n_head=4, vocab_size=200), seed=seed
        )
        for seed in (1, 2)
    ]
    recipe = write_recipe(*pair, modules="up", layers="1", prompts=prompts, max_new_tokens=4)
    refused = call("trace", recipe, tmp_path / "gpt", *QUICK, *GIVEN, "--kinds", "hidden,gate")
    assert refused.exit_code == 2
    assert "GPT2LMHeadModel has no gate to trace" in refused.stderr
    summary = answer("trace", recipe, tmp_path / "gpt", *QUICKER, *GIVEN, "--json")
    assert set(summary["trace"]["kinds"]) == {"hidden", "mlp", "attention", "up", "down"}


def test_where_the_source_cannot_repair_there_is_a_trace_and_no_selection(tmp_path, no_pictures):
    prompts = write_few(tmp_path / "few", 12)
    recipe = tmp_path / "shadow.yml"
    recipe.write_text(
        f"merge_method: dapa\nbase_model: {miniature.path('shadow-target')}\n"
        f"models:\n  - model: {miniature.path('shadow-source')}\n"
        f"parameters:\n  prompts: {prompts}\n  max_new_tokens: 12\n"
    )
    summary = answer("trace", recipe, tmp_path / "out", *QUICKER, "--kinds", "mlp", "--json")
    assert summary["selection"] is None
    assert "cannot repair this target through its modules gate" in summary["no_selection_because"]
    groups = {one["group"]: one for one in summary["groups"]["groups"]}
    # What the search cannot say: where it is.
    assert groups["gate"]["sufficiency"] < 0.1
    assert groups["down"]["sufficiency"] > 0.9
    assert summary["overlap"]["with_selection"] == {}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (99.4, "99 s"), (99.6, "2 min"), (7139, "119 min"), (7500, "2 h 5 min")]
)
def test_a_length_of_time_is_said_as_people_say_it(seconds, text):
    assert duration(seconds) == text


def test_influence_goes_on_after_the_prompts_that_are_known(traced, tmp_path, no_pictures, monkeypatch):
    recipe, out, summary = traced
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    with numpy.load(copy / "influence.npz", allow_pickle=False) as arrays:
        whole = dict(arrays)
    assert len(whole["before"]) == 12
    first = {name: whole[name][:8] for name in ("hidden", "refusing", "before")}
    numpy.savez(copy / "influence.npz", **{**whole, **first})
    measured = []

    def few(live, pairs, *arguments, **named):
        measured.append(len(pairs))
        return influence(live, pairs, *arguments, **named)

    monkeypatch.setattr("dapa_merge.trace.trace.influence", few)
    again = answer("trace", recipe, copy, *QUICK, "--stages", "influence", "--json")
    assert measured == [4]
    for one, before in zip(again["units"], summary["units"], strict=True):
        assert one["influence_on_refusing"] == pytest.approx(before["influence_on_refusing"], abs=1e-4)


def test_while_prompts_are_traced_the_page_shows_those_that_are_done(traced, tmp_path, no_pictures, monkeypatch):
    recipe, out, summary = traced
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    monkeypatch.setattr("dapa_merge.trace.trace.SECONDS_BETWEEN_PAGES", -1)
    pages = []

    def page(summary, pictures):
        pages.append((summary["stages"]["follow"], summary["trace"] and summary["trace"]["num_prompts"], len(pictures)))
        return ""

    monkeypatch.setattr("dapa_merge.trace.trace.page", page)
    assert answer("trace", recipe, copy, *QUICK, "--stages", "traces", "--json")["trace"] == summary["trace"]
    # Six means, and three kinds of one example.
    assert pages == [(["traces"], None, 0), *((["traces"], number, 9) for number in (1, 2, 3)), ([], 3, 9)]


@pytest.fixture(scope="module")
def of_directions(tmp_path_factory) -> tuple[Path, Path, dict]:
    """A recipe with the leading directions of four gates and one down projection, its trace, and the answer."""
    folder = tmp_path_factory.mktemp("directions")
    pair = miniature.path("target"), miniature.path("source")
    gates = direction_files.chosen(*pair, "3-6", (1.0,) * 32, modules="gate")
    down = direction_files.chosen(*pair, "1", (0.5,), modules="down")
    direction_files.saved(folder, FactorTable({**gates.of, **down.of}))
    layers = ",".join((*PLANTED, "1.down"))
    recipe = planted_recipe(folder, 12, layers=layers, edit="directions", directions=FILE_NAME, batch_size=32)
    options = (*QUICKER, "--kinds", "mlp", "--stages", "influence,directions,traces")
    with small_pictures():
        summary = answer("trace", recipe, folder / "out", *options, "--json")
    return recipe, folder / "out", summary


def test_what_directions_put_back_is_held_against_every_measure(of_directions):
    _, out, summary = of_directions
    found = summary["directions"]
    assert found["num_directions"] == 4 * 32 + 1
    # As the gates themselves: they put back nearly all of what was planted there.
    assert found["score"] > 0.9
    units = {one["unit"]: one for one in found["units"]}
    # Directions are chosen among the projections of the attention, one by one.
    assert len(units) == 70
    assert sum(one["share_of_change"] for one in units.values()) == pytest.approx(1)
    assert {name for name, one in units.items() if one["share_of_change"]} == {*PLANTED, "1.down"}
    assert set(found["top"]) <= set(PLANTED)
    assert units["5.gate"]["gain"] > 0 == units["5.up"]["gain"]
    assert sum(found["by_module"].values()) == pytest.approx(1) == sum(found["by_third"].values())
    assert found["by_module"]["gate"] > 0.9
    by_change, by_share = (found["agreement"][name] for name in ("put_back", "share_of_difference"))
    assert set(by_change) == set(by_share) == {
        "gain of the directions", "size of the difference", "attribution", "influence on refusing",
        "influence on the hidden state", "causal tracing",
    }  # fmt: skip
    best = by_change["influence on refusing"]
    assert best["low"] < best["spearman"] < best["high"]
    assert best["jaccard"] > best["jaccard_by_chance"]
    # Copied whole they are not a selection: no group, and no overlap.
    assert summary["overlap"]["with_selection"] == {}
    assert (out / "figures" / "directions.png").exists()
    assert "Would other measures have found the directions?" in (out / "index.html").read_text()


def test_the_squared_norms_of_directions_are_those_of_the_matrices_they_change(of_directions):
    recipe, _, summary = of_directions
    plan = make_plan(load_recipe(recipe))
    assert isinstance(plan.edit, Directions)
    changes, differences = squared_norms(plan, plan.units, plan.edit.factors)
    for unit, change, difference in zip(plan.units, changes, differences, strict=True):
        (regions,) = plan.regions((unit,))
        ours = regions["target"]
        added = plan.edit.factors.values(ours, 0, ours.num_parameters)
        source, target = (mapped_values(plan.models[name], regions[name]).double() for name in ("source", "target"))
        assert change == pytest.approx(float((added.astype(float) ** 2).sum()), rel=1e-5)
        assert difference == pytest.approx(float((source - target).square().sum()), rel=1e-5)
        shares = {one["unit"]: one["share_of_difference"] for one in summary["directions"]["units"]}
        assert shares[str(unit)] == pytest.approx(change / difference, rel=1e-4)


def test_a_search_for_directions_is_left_out_with_what_it_would_choose(tmp_path, write_recipe):
    recipe = write_recipe(miniature.path("target"), miniature.path("source"), edit="directions")
    result = call("trace", recipe, tmp_path / "out", "--stages", "directions")
    assert result.exit_code == 2
    assert "directions are chosen by the stage search" in result.stderr
    assert not (tmp_path / "out").exists()


def test_how_long_stages_take_is_said_before_they_begin(tmp_path, no_pictures):
    recipe = planted_recipe(tmp_path, 8, layers="3-5", max_new_tokens=8)
    options = ("--num-prompts", 2, "--samples", 1, "--controls", 0, "--kinds", "mlp", "--stages", "influence,traces")
    result = call("trace", recipe, tmp_path / "out", *options)
    assert result.exit_code == 0, result.stderr
    steps = result.stderr.splitlines()
    for stage, size in (("influence", r"40 units x \d prompts"), ("traces", "2 prompts x 10 layers x 1 kinds")):
        assert sum(bool(re.match(f"about .* s for {stage} \\({size}\\)", step)) for step in steps) == 1, result.stderr


def test_what_was_searched_before_is_not_searched_again(own_cache, tmp_path, no_pictures, monkeypatch):
    recipe, baseline, measured = planted_recipe(tmp_path, 8), Bench.baseline, []
    found = answer("search", recipe, "--json")
    (journal,) = (own_cache / "dapa-merge" / "journals").iterdir()
    before = journal.read_bytes()
    monkeypatch.setattr(Bench, "examine", None)
    # By another process of the same user: of the baselines none is measured again, only the selection is.
    monkeypatch.setattr(journals, "_written_here", set())
    monkeypatch.setattr(Bench, "baseline", lambda self, units, **more: measured.append(units) or baseline(self, units))
    summary = answer("trace", recipe, tmp_path / "out", "--stages", "search", "--json")
    assert [list(map(str, units)) for units in measured] == [found["units"]]
    assert summary["selection"] == found["units"]
    assert journal.read_bytes() == before


def test_a_trace_says_beforehand_how_long_it_takes_and_counts_what_it_asks(tmp_path, no_pictures, monkeypatch):
    recipe, asked, lines = planted_recipe(tmp_path, 8, max_new_tokens=8), [0], []
    monkeypatch.setattr(expecting, "TOLD_SECONDS", 0)
    monkeypatch.setattr(
        "dapa_merge.measure.generate.advance", lambda number, _: asked.__setitem__(0, asked[0] + number)
    )
    told = Expected.tell
    monkeypatch.setattr(Expected, "tell", lambda self: (lines.append(self), told(self)))
    result = call("trace", recipe, tmp_path / "out", *QUICKER)
    assert result.exit_code == 0, result.stderr
    assert re.search(r"this takes about .* on cpu, about \d+ tests, .* GB of its memory and the batches", result.stderr)
    (first,) = lines
    assert list(first.parts) == ["search", "answers", "influence", "groups", "edits", "traces"]
    # Those of groups are counted by the edit.
    total = sum(part.get("prompts", 0) for part in first.parts.values()) + first.parts["groups"]["edits"] * 4
    assert asked[0] / 2 <= total <= 2 * asked[0]
    assert call("trace", recipe, tmp_path / "out", *QUICKER).exit_code == 0
    again = lines[1].parts
    assert (again["answers"]["prompts"], again["traces"]["runs"]) == (0, 0)
    assert again["groups"]["edits"] < first.parts["groups"]["edits"] / 4


def test_where_no_prompt_tells_the_models_apart_the_exit_code_is_3(tmp_path, write_recipe):
    prompts = write_few(tmp_path / "few", 4)
    recipe = write_recipe(miniature.path("source"), miniature.path("target"), layers="1", prompts=prompts)
    result = call("trace", recipe, tmp_path / "out", *QUICK)
    assert result.exit_code == 3
    assert re.search(
        r"of 4 harmful prompts the source refuses 0 and the target 4, .* --refusal and --answer", result.stderr
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--subject", "bomb"), r"none of 12 harmful prompts contains the subject 'bomb'; give one that some do"),
        (
            ("--kinds", "mlp,head"),
            r"--kinds: unknown kind 'head'; known are hidden, mlp, attention, gate, up, down",
        ),
        (("--stages", "traces,tests"), r"--stages: unknown stage 'tests'; known are search, influence, directions, "),
        (("--stages", "directions"), r"the stage directions is not one of this recipe, which has the edit copy"),
        (("--stages", "search", "--no-search"), r"unknown stage 'search'"),
        (("--refusal", "No."), r"give both or neither"),
        (("--refusal", " ", "--answer", "Sure"), r"must be texts that differ, and neither may be empty"),
        (("--refusal", "No.", "--answer", "No."), r"must be texts that differ"),
        (
            ("--refusal", "No. I", "--answer", "No.", "--no-search"),
            r"cannot be compared: they are the same, or one is the beginning of the other",
        ),
        (("--noise", "nan"), r"--noise is nan; write a number of at least 0"),
        (("--subject", " "), r"--subject is empty; give words of the prompts, or leave it out"),
    ],
)
def test_bad_options_are_refused_before_anything_takes_long(traced, tmp_path, options, said):
    recipe, _, _ = traced
    result = call("trace", recipe, tmp_path / "out", *QUICK, *options)
    assert result.exit_code == 2
    assert re.search(said, result.stderr)
    assert not (tmp_path / "out" / "influence.npz").exists()


def test_a_prompt_longer_than_the_context_is_named(tmp_path, write_recipe):
    shape = {**SHAPE, "vocab_size": 200, "max_position_embeddings": 12}
    pair = [save_random(tmp_path / f"s{seed}", transformers.LlamaConfig(**shape), seed=seed) for seed in (1, 2)]
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    # Not one of those that are traced.
    (prompts / "harmful.txt").write_text("How do I steal a car?\nHow do I steal a car and a boat and a car?\n")
    (prompts / "harmless.txt").write_text("How?\n")
    recipe = write_recipe(*pair, layers="1", prompts=prompts, max_new_tokens=4)
    result = call("trace", recipe, tmp_path / "out", *GIVEN, "--num-prompts", 1)
    assert result.exit_code == 2
    assert re.search(r"the prompt 'How do I steal .* has \d+ tokens .* context ends at 12; shorten it", result.stderr)


def test_a_folder_that_holds_something_else_is_left_alone(traced, tmp_path):
    recipe, _, _ = traced
    for name in ("full", "file", "journal"):
        out = tmp_path / name
        if name == "file":
            out.write_text("mine")
        else:
            out.mkdir()
            (out / ("mine.txt" if name == "full" else "journal.jsonl")).write_text("mine")
        result = call("trace", recipe, out, *QUICK)
        assert result.exit_code == 2
        assert f"{out} exists and is not the folder of a trace; name another or remove it" in result.stderr
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert [path.name for path in (tmp_path / "journal").iterdir()] == ["journal.jsonl"]
    missing = call("trace", tmp_path / "none.yml", tmp_path / "new", *QUICK)
    assert missing.exit_code == 2
    assert not (tmp_path / "new").exists()


def test_without_matplotlib_it_says_what_to_install(traced, tmp_path, monkeypatch):
    recipe, _, _ = traced
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = call("trace", recipe, tmp_path / "out", *QUICK)
    assert result.exit_code == 2
    assert "plots need matplotlib; install it with: pip install matplotlib" in result.stderr
    assert not (tmp_path / "out").exists()
    # A repair goes on without.
    named = planted_recipe(tmp_path, layers="3-5")
    result = call("run", named, tmp_path / "model")
    assert result.exit_code == 0, result.stderr
    assert "no pictures next to the model: plots need matplotlib" in result.stderr
    assert not list((tmp_path / "model").glob("*.png"))


def test_a_repaired_model_has_the_searchs_path_and_before_and_after_beside_it(demo):
    out, _ = demo
    manifest = json.loads((out / "dapa.json").read_text())
    for name in ("dapa_search.png", "dapa_search.svg", "dapa_figures.png", "dapa_figures.svg"):
        assert (out / name).stat().st_size > 10_000
        assert name in manifest["files"]
    assert call("verify", out).exit_code == 0


def test_a_search_that_its_first_test_ended_has_no_path_to_show(shadow_demo):
    out, report = shadow_demo
    assert report["tests"] == 1
    assert not list(out.glob("dapa_search*"))
    assert (out / "dapa_front.png").is_file()


def test_a_matplotlib_that_cannot_be_loaded_is_one_sentence():
    command = [sys.executable, "-c", "from dapa_merge.report.drawing import plotting; plotting()"]
    environment = {**os.environ, "MPLBACKEND": "no-such-backend"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert re.search(r"UsageError: plots need matplotlib, which fails here: ValueError: ", done.stderr)


def test_a_picture_that_fails_costs_a_sentence_and_not_the_model(tmp_path, monkeypatch):
    def fail(_figure, _kind):
        raise RuntimeError("no room for this picture")

    monkeypatch.setattr(drawing, "render", fail)
    result = call("run", planted_recipe(tmp_path, 8, layers="3-5"), tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "no pictures next to the model: RuntimeError: no room for this picture" in result.stderr
    assert (tmp_path / "out" / "dapa_report.json").exists()


def test_of_a_long_prompt_the_picture_shows_the_subject_and_the_end():
    tokens = tuple(f"t{index}" for index in range(500))
    effect = numpy.random.default_rng(0).normal(size=(3, 500)).astype(numpy.float32)
    trace = Trace("", tokens, (100, 103), 1.0, numpy.zeros(2, numpy.float32), {"mlp": effect}, 0, 0.0)
    axes = _example(trace, "mlp", "long").axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(labels) == 81
    assert (labels[0], labels[39], labels[40], labels[41], labels[-1]) == (
        "t100",
        "t139",
        "(320 not shown)",
        "t460",
        "t499",
    )
    shown = numpy.asarray(axes.images[0].get_array())
    assert shown[-1] == pytest.approx(effect[:, -1])
    assert shown[0] == pytest.approx(effect[:, 100])


def test_a_long_beginning_before_the_subject_is_left_out_without_a_gap():
    effect = numpy.random.default_rng(0).normal(size=(3, 50)).astype(numpy.float32)
    trace = Trace("", tuple(map(str, range(50))), (30, 33), 1.0, numpy.zeros(2, numpy.float32), {"mlp": effect}, 0, 0.0)
    axes = _example(trace, "mlp", "long").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(map(str, range(30, 50)))
    assert axes.get_yticklabels()[2].get_fontweight() == "bold"
    assert axes.get_yticklabels()[3].get_fontweight() == "normal"


def test_another_evaluator_of_the_same_name_does_not_go_on_with_what_was_scored(tmp_path, no_pictures):
    recipe = planted_recipe(tmp_path, 4, layers="3-5", evaluator="mine")
    options = (*QUICKER, *GIVEN, "--kinds", "mlp", "--evaluator-file", tmp_path / "mine.py")
    for value in (0.25, 0.75):
        (tmp_path / "mine.py").write_text(
            f"import dapa_merge\n\n@dapa_merge.evaluator('mine')\ndef mine(candidate):\n    return {value}\n"
        )
        done = call("trace", recipe, tmp_path / "out", *options, "--json")
        if value == 0.25:
            assert done.exit_code == 0, done.stderr
            assert json.loads(done.stdout)["groups"]["target"] == 0.25
    assert done.exit_code == 2
    assert re.search(r"belongs to another trace: evaluator differs; name another folder, or remove it", done.stderr)


def test_copies_of_the_packaged_models_are_known_and_others_of_their_size_are_not(tmp_path):
    copies = [shutil.copytree(miniature.path(member), tmp_path / member) for member in ("target", "source")]
    target, source = (open_checkpoint(str(folder)) for folder in copies)
    assert is_planted(plan_transplant(target, source, ("gate",)))
    assert not is_planted(plan_transplant(source, target, ("gate",)))


def test_where_gate_and_up_are_in_one_tensor_the_whole_mlp_is_a_unit(tmp_path):
    config = transformers.GptOssConfig(**{**SHAPE, "vocab_size": 200, "num_local_experts": 2, "head_dim": 8})
    pair = [save_random(tmp_path / f"o{seed}", config, seed=seed) for seed in (1, 2)]
    plan = plan_transplant(*(open_checkpoint(str(folder)) for folder in pair), ("mlp",))
    units = units_apart(plan_of_all(plan))
    assert {unit.module for unit in units} == {"mlp", "attention"}
    assert len(units) == 8


def test_a_folder_whose_journal_a_kill_left_empty_is_ours(tmp_path):
    for content, fault in ((b"", None), (b'{"jour', None), (b"other", "is not the folder of a trace")):
        (tmp_path / "journal.jsonl").write_bytes(content)
        with pytest.raises(UsageError, match=fault) if fault else contextlib.nullcontext():
            check_folder(tmp_path)
    (tmp_path / "journal.jsonl").write_bytes(b"")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not the folder of a trace"):
        check_folder(tmp_path)


def test_tracing_of_mlps_ranks_no_attention(tmp_path, no_pictures):
    recipe = planted_recipe(tmp_path, 8, layers="3-5", modules="attention")
    summary = answer("trace", recipe, tmp_path / "out", *QUICKER, "--json")
    assert set(summary["overlap"]["with_selection"]) == {
        "attribution", "influence on refusing", "influence on the hidden state",
        "tracing of single projections",
    }  # fmt: skip
    groups = {one["group"]: one for one in summary["groups"]["groups"]}
    # Left out of what it was selected from: attention alone, which does nothing.
    assert (groups["selection"]["full"], groups["selection"]["necessity"]) == (0, None)
    assert groups["gate"]["full"] > 0.9
    assert any(
        "All units that it was selected from together do not raise the DSR" in one for one in summary["findings"]
    )


@pytest.mark.parametrize(
    ("total", "kept", "sizes"),
    [(10, 3, [0, 1, 2, 3, 4, 6, 8, 10]), (1, 0, [0, 1]), (32, 5, [0, 1, 2, 3, 4, 5, 6, 8, 11, 16, 23, 32])],
)
def test_edits_grow_in_steps_and_one_is_the_selection(total, kept, sizes):
    assert curve_sizes(total, kept) == sizes


def test_a_full_disk_ends_with_a_sentence_and_what_was_found_is_kept(traced, small_disk, monkeypatch):
    recipe, out, _ = traced
    # Pictures of their usual size, of nothing.
    monkeypatch.setattr(drawing, "render", lambda figure, kind: bytes(40_000))
    shutil.copytree(out, small_disk / "out", ignore=shutil.ignore_patterns("*.png", "*.svg", "*.html"))
    with (small_disk / "ballast").open("wb") as file, contextlib.suppress(OSError):
        file.write(bytes(850_000))
    result = call("trace", recipe, small_disk / "out", *QUICK)
    assert result.exit_code == 1
    assert re.search(r"cannot be written: No space left on device; the previous content is kept", result.stderr)
    assert (small_disk / "out" / "traces" / "0009.npz").exists()
    assert not list((small_disk / "out").rglob(".dapa-merge-*"))


@pytest.mark.parametrize(("total", "number"), [(64, 63), (64, 32), (64, 33), (3, 10), (10, 3), (1, 1)])
def test_as_many_prompts_are_taken_as_are_wanted_and_evenly(total, number):
    chosen = spread(range(total), number)
    assert len(chosen) == min(total, number)
    assert chosen[0] == 0
    gaps = {later - earlier for earlier, later in itertools.pairwise(chosen)}
    assert len(gaps) <= 2
