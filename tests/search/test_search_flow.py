"""The search of real models: its journal, its thrift, its workers and its refusals."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
import signal
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm
from conftest import answer, call, change_tensor, required, save_random, tiny_llama

from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.files import record_line
from dapa_merge.measure.meter import Measurement
from dapa_merge.measure.prompts.parts import split_prompts
from dapa_merge.plan.plan import divide
from dapa_merge.plan.selection import edit_of, make_plan
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parse import load_recipe, parse_recipe
from dapa_merge.search import bench as bench_module
from dapa_merge.search import requirement
from dapa_merge.search.bench import _make_hand, make_bench
from dapa_merge.search.journal import name_of

# With whatever else starts Ray; and its searches are done once.
pytestmark = pytest.mark.xdist_group("ray")

COMMAND = (sys.executable, "-c", "from dapa_merge.cli import main; main()")
# Answers of the miniature show whether they refuse by the twelfth token.
MINIATURE = {"prompts": "miniature", "max_new_tokens": 12, "batch_size": 128}
# Ray's own file handles and sockets are warned about when they are collected.
of_ray = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


@dataclass(frozen=True)
class Done:
    """A search of the miniature that has ended: what it was asked, what it wrote and what it answered."""

    recipe: Path
    journal: Path
    found: dict

    def copy_into(self, cache: Path) -> Path:
        """Make it the cache's."""
        place = cache / "dapa-merge" / "journals" / name_of(entries(self.journal)[0]["parts"])
        place.parent.mkdir(parents=True)
        shutil.copyfile(self.journal, place)
        return place


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Done:
    return searched(tmp_path_factory.mktemp("done"), MINIATURE)


@pytest.fixture(scope="module")
def ddmin_done(tmp_path_factory, few) -> Done:
    """One by ddmin, which tests more selections, with fewer prompts."""
    return searched(tmp_path_factory.mktemp("ddmin"), {**MINIATURE, "search": "ddmin", "prompts": str(few)})


def searched(folder: Path, parameters: dict) -> Done:
    models = f"base_model: {miniature.path('target')}\nmodels: [{{model: {miniature.path('source')}}}]"
    recipe = folder / "recipe.yml"
    recipe.write_text(f"merge_method: dapa\n{models}\nparameters: {json.dumps(parameters)}\n")
    found = answer("search", recipe, "--journal", folder / "journal.jsonl", "--json")
    return Done(recipe, folder / "journal.jsonl", found)


@pytest.fixture
def shadow(write_recipe, few):
    """Writes a recipe for the pair whose answer was not planted, with few prompts."""

    def write(**parameters) -> Path:
        return write_recipe(
            miniature.path("shadow-target"),
            miniature.path("shadow-source"),
            **{**MINIATURE, "prompts": few, **parameters},
        )

    return write


@pytest.fixture
def no_model(monkeypatch):
    """From when it is called on, no model may be loaded."""

    def forbid() -> None:
        def load(*_: object) -> None:
            raise AssertionError("a model was loaded")

        monkeypatch.setattr("dapa_merge.measure.live.load_model", load)

    return forbid


def entries(journal: Path) -> list[dict]:
    return [json.loads(line) for line in journal.read_bytes().split(b"\n") if line]


def test_the_miniature_is_searched_with_few_tests(done):
    found = done.found
    assert {int(unit.split(".")[0]) for unit in found["units"]} <= {3, 4, 5, 6}
    assert found["one_minimal"]
    # A certificate for each unit, the full transplant, and a few to find the selection; ddmin needs 24.
    assert found["tests"] <= len(found["units"]) + 5
    assert [row["unit"] for row in found["prior"]][:3] == ["3.gate", "4.gate", "5.gate"]


@pytest.mark.parametrize("search", ["done", "ddmin_done"])
def test_every_search_ends_with_a_certificate_that_the_journal_bears_out(search, request):
    search = request.getfixturevalue(search)
    found = search.found
    tests = {frozenset(entry["selection"]): entry["holds"] for entry in entries(search.journal) if "holds" in entry}
    assert tests[frozenset(found["units"])]
    for unit in found["units"]:
        assert tests[frozenset(found["units"]) - {unit}] is False
    # All but the full transplant, which is measured for itself, and the target as it is.
    assert found["tests"] - 2 <= len(tests) <= found["tests"] - 1


def test_early_verdicts_are_the_full_ones_on_every_test_of_a_search(done, capsys):
    parsed = load_recipe(done.recipe)
    plan = make_plan(parsed)
    units = {str(unit): unit for unit in plan.units}
    tests = [entry for entry in entries(done.journal) if "holds" in entry]
    num_asked = num_prompts = 0
    with closing(make_bench(parsed, plan, split_prompts(parsed).search, Options("cpu"))) as bench:
        bench.require(required(**done.found["requirement"]))
        for test in tests:
            full = bench.examine([units[name] for name in test["selection"]], stop_early=False)
            assert full.holds == test["holds"]
            assert full.num_asked == full.num_prompts == test["num_prompts"]
            num_asked += sum(piece["num_prompts"] for piece in test["pieces"])
            num_prompts += full.num_prompts
    with capsys.disabled():
        print(f"\nearly verdicts: {len(tests)} tests, {num_asked} of {num_prompts} prompts asked")
    assert 1 - num_asked / num_prompts == pytest.approx(done.found["share_of_prompts_saved"])
    assert num_asked < 0.7 * num_prompts


def test_a_search_that_is_done_asks_nothing_again_and_loads_nothing(done, own_cache, no_model):
    journal = done.copy_into(own_cache)
    no_model()
    again = answer("search", done.recipe, "--json")
    assert again["units"] == done.found["units"]
    assert again["certificate"] == done.found["certificate"]
    assert (again["tests"], again["tests_recorded"]) == (done.found["tests"], done.found["tests"] - 1)
    assert journal.read_bytes() == done.journal.read_bytes()


def test_mergekit_goes_on_where_a_search_was(done, own_cache, tmp_path, no_model):
    from click.testing import CliRunner
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    done.copy_into(own_cache)
    no_model()
    result = CliRunner().invoke(mergekit_yaml, [str(done.recipe), str(tmp_path / "out"), "--quiet"])
    assert result.exit_code == 0, result.output
    verified = answer("verify", tmp_path / "out", "--recipe", done.recipe, "--json")
    assert verified["units"] == done.found["units"]


def test_another_algorithm_uses_what_is_known_already(done, own_cache, write_recipe):
    journal = done.copy_into(own_cache)
    target, source = miniature.path("target"), miniature.path("source")
    found = answer("search", write_recipe(target, source, **MINIATURE, search="probdd"), "--json")
    assert list(journal.parent.iterdir()) == [journal]
    assert found["tests_recorded"] >= 1


@pytest.mark.parametrize("change", ["retain: 0.9", "confirm: 0.25", "max_new_tokens: 11"])
def test_a_journal_of_another_recipe_is_refused(done, tmp_path, change):
    key, _, value = change.partition(": ")
    parameters = {**MINIATURE, key: float(value) if "." in value else int(value)}
    lines = done.recipe.read_text().splitlines()[:-1]
    (tmp_path / "recipe.yml").write_text("\n".join([*lines, f"parameters: {json.dumps(parameters)}"]) + "\n")
    result = call("search", tmp_path / "recipe.yml", "--journal", done.journal)
    assert result.exit_code == 2
    what = {"retain": "limits", "confirm": "prompts", "max_new_tokens": "generation"}[key]
    sentence = f"the journal {done.journal} belongs to another search: {what} differs; name another file, or remove it"
    assert sentence in result.stderr


def test_a_changed_weight_makes_it_another_search(tmp_path, write_recipe, few):
    target = save_random(tmp_path / "target", tiny_llama(vocab_size=256), seed=1)
    source = save_random(tmp_path / "source", tiny_llama(vocab_size=256), seed=2)
    path = write_recipe(target, source, prompts=few, max_new_tokens=4)
    journal = tmp_path / "journal.jsonl"
    assert call("search", path, "--journal", journal).exit_code == 3
    change_tensor(source, "model.layers.1.self_attn.q_proj.weight", lambda tensor: tensor.zero_())
    assert "belongs to another search" not in call("search", path, "--journal", journal).stderr
    change_tensor(source, "model.layers.1.mlp.gate_proj.weight", lambda tensor: tensor[0].zero_())
    assert "belongs to another search: source differs" in call("search", path, "--journal", journal).stderr
    change_tensor(target, "lm_head.weight", lambda tensor: tensor[0].zero_())
    assert "belongs to another search: source, target differ" in call("search", path, "--journal", journal).stderr


def test_a_journal_that_cannot_be_written_is_named(done, tmp_path):
    (tmp_path / "file").write_text("mine")
    result = call("search", done.recipe, "--journal", tmp_path / "file" / "journal")
    assert result.exit_code == 2
    assert f"cannot write the journal {tmp_path / 'file' / 'journal'}: " in result.stderr
    result = call("search", done.recipe, "--journal", tmp_path / "file")
    assert result.exit_code == 2
    assert f"the journal {tmp_path / 'file'} is damaged at line 1: it is not a journal" in result.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_without_a_cache_folder_the_search_goes_on_unrecorded(quick, tmp_path, monkeypatch):
    (tmp_path / "no-folder").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no-folder"))
    result = call("search", quick(), "--json")
    assert result.exit_code == 0
    assert "this search is not recorded, and starts again if it is killed" in result.stderr
    assert json.loads(result.stdout)["one_minimal"]


def test_a_killed_search_goes_on_where_it_was_and_asks_nothing_twice(ddmin_done, tmp_path):
    # tests/benchmarks/kill_resume.py kills at twenty random moments.
    path, expected = ddmin_done.recipe, ddmin_done.found
    journal = tmp_path / "killed"
    command = [*COMMAND, "search", str(path), "--json", "--journal", str(journal)]
    generator = random.Random(0)
    for number_of_lines in (22,):
        process = warm.Process(command)
        while not (journal.exists() and journal.read_bytes().count(b"\n") >= number_of_lines):
            assert process.poll() is None, process.stderr
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    again = warm.run(command)
    assert again.returncode == 0, again.stderr
    found = json.loads(again.stdout)
    assert found["units"] == expected["units"]
    assert found["certificate"] == expected["certificate"]
    assert found["tests"] == expected["tests"]
    assert found["tests_recorded"] >= 9
    tested = [frozenset(entry["selection"]) for entry in entries(journal) if "holds" in entry]
    assert len(tested) == len(set(tested))
    # The target is part of the record too: measured once, whatever was killed.
    notes = [entry["note"] for entry in entries(journal) if "note" in entry]
    assert notes == ["target", "full transplant"]


def test_a_kill_in_the_middle_of_a_baseline_costs_a_piece_at_most(write_recipe, few, tmp_path):
    settings = {**MINIATURE, "prompts": few, "batch_size": 4, "max_tests": 1}
    recipe = write_recipe(miniature.path("target"), miniature.path("source"), **settings)
    whole = answer("search", recipe, "--journal", tmp_path / "whole", "--json")
    journal = tmp_path / "killed"
    command = [*COMMAND, "search", str(recipe), "--json", "--journal", str(journal)]

    def num_pieces(of: str) -> int:
        return journal.read_bytes().count(b'{"piece":"%s: ' % of.encode()) if journal.exists() else 0

    for of in ("target", "full transplant"):
        process = warm.Process(command)
        while num_pieces(of) < 3:
            assert process.poll() is None, process.stderr
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert f'{{"note":"{of}"' not in journal.read_text()
    again = warm.run(command)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["units"] == whole["units"]
    # Nothing was measured twice, and every figure is the same to the last digit.
    assert timeless(journal) == timeless(tmp_path / "whole")


@pytest.mark.parametrize("most", [64, 30, 1])
def test_the_prompts_of_a_baseline_are_run_at_once_and_answered_as_piece_by_piece(done, monkeypatch, most):
    monkeypatch.setattr(bench_module, "AT_ONCE", most)
    asked, ask = [], Measurement._ask

    def count(self, prompts, **how):
        asked.append(len(prompts))
        return ask(self, prompts, **how)

    monkeypatch.setattr(Measurement, "_ask", count)
    parsed = load_recipe(done.recipe)
    plan = make_plan(parsed)
    with closing(make_bench(parsed, plan, split_prompts(parsed).search, Options("cpu"))) as bench:
        found = bench.baseline(plan.units[:8])
        sizes = [size for kind in ("harmful", "harmless") for size in bench.sizes[kind]]
        at_once, asked[:] = [*asked], []
        with bench._candidate(plan.units[:8]) as candidate:
            assert [found.figures[one.figure] for one in bench.constraints] == [
                candidate.figure(one) for one in bench.constraints
            ]
            assert list(found.responses) == candidate.all_responses("harmful")
    assert sorted(asked) == sorted(sizes)
    assert sum(at_once) == sum(sizes)
    assert all(size <= max(most, *sizes) for size in at_once)
    # Two that follow each other would not have been run together.
    assert all(one + other > most for one, other in itertools.pairwise(at_once))


def timeless(journal: Path) -> list[dict]:
    return [{key: one[key] for key in one if key not in ("check", "seal", "seconds")} for one in entries(journal)]


def test_pieces_that_others_wrote_are_measured_again(done, tmp_path):
    lines = entries(done.journal)
    pieces = [line for line in lines if line.get("piece", "").startswith("target: ")]
    for piece in pieces:
        if "harmful" in piece["piece"]:
            piece["value"] = [{**response, "outcome": "refused"} for response in piece["value"]]
    check, texts = "", []
    for line in (lines[0], *pieces):
        del line["check"]
        text, check = record_line(line, check)
        texts.append(text)
    (tmp_path / "forged").write_bytes(b"".join(texts))
    found = answer("search", done.recipe, "--journal", tmp_path / "forged", "--json")
    assert found["score_target"] == done.found["score_target"] == 0
    assert found["units"] == done.found["units"]


@of_ray
def test_two_ray_workers_find_the_same_also_when_one_is_killed(cluster, ddmin_done, tmp_path):
    path, alone = ddmin_done.recipe, ddmin_done.found
    journal = tmp_path / "together"
    with cluster.losing("actor", lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 6) as lost:
        together = answer("search", path, "--journal", journal, "--workers", "ray:2", "--json")
    assert lost
    assert together["units"] == alone["units"]
    assert together["certificate"] == alone["certificate"]
    assert together["tests"] == alone["tests"]
    assert together["tests_unneeded"] >= 0
    tested = [frozenset(entry["selection"]) for entry in entries(journal) if "holds" in entry]
    assert len(tested) == len(set(tested)) == alone["tests"] - 1 + together["tests_unneeded"]


def test_ray_that_is_not_installed_is_named_before_anything_is_read(done, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    result = call("search", done.recipe, "--workers", "ray")
    assert result.exit_code == 2
    assert result.stderr == "Error: --workers ray needs Ray; install it with: pip install ray\n"


@pytest.mark.parametrize("value", ["2", "ray:", "ray:0", "ray:two", "dask"])
def test_other_workers_are_refused(done, value):
    result = call("search", done.recipe, "--workers", value)
    assert result.exit_code == 2
    assert f"--workers is {value!r}; write ray, or ray:N with the number of workers" in result.stderr


def test_gates_that_cannot_repair_point_to_other_modules(shadow):
    result = call("search", shadow())
    assert result.exit_code == 3
    assert "cannot repair this target through its modules gate: with all 10 units copied the DSR is 0.000" in (
        result.stderr
    )
    assert result.stderr.endswith("; other modules may: try `modules: auto`\n")


def test_a_gain_within_noise_is_none(quick, monkeypatch):
    monkeypatch.setattr(requirement, "NOISE_PROMPTS", 64)
    monkeypatch.setattr(requirement, "NOISE_SHARE", 1.0)
    result = call("search", quick())
    assert result.exit_code == 3
    assert re.search(
        r"the DSR is 1\.000, and without them 0\.000, which may be noise of (\d+) in \1 prompts", result.stderr
    )


@pytest.fixture
def quick(write_recipe, few):
    """Writes a recipe for the planted pair, with few prompts."""

    def write(**parameters) -> Path:
        pair = miniature.path("target"), miniature.path("source")
        return write_recipe(*pair, **{**MINIATURE, "prompts": few, **parameters})

    return write


def test_a_preferred_module_is_kept_to_where_it_is_enough(quick):
    found = answer("search", quick(modules="auto", prefer="gate"), "--json")
    assert {unit.split(".")[1] for unit in found["units"]} == {"gate"}
    assert found["one_minimal"]


def test_auto_searches_among_the_units_that_differ_and_says_how_many_do_not(shadow):
    # The pair has its attention in common.
    recipe = shadow(modules="auto", prefer="gate", max_tests=1)
    result = call("search", recipe, "--json")
    found = json.loads(result.stdout)
    assert "left out 40 of 70 units, which the edit would not change" in result.stderr
    assert {row["unit"].partition(".")[2] for row in found["prior"]} == {"gate", "up", "down"}
    assert len(found["prior"]) == 30
    assert answer("plan", recipe, "--json")["units"][-1]["unit"] == "9.o"


@pytest.mark.parametrize("command", ["search", "run"])
def test_models_without_a_difference_are_told_before_any_is_loaded(command, quick, no_model, tmp_path):
    copy = shutil.copytree(miniature.path("target"), tmp_path / "copy")
    change_tensor(copy, "model.norm.weight", lambda tensor: tensor[0].add_(1))
    recipe = quick(modules="auto")
    recipe.write_text(recipe.read_text().replace(str(miniature.path("source")), str(copy)))
    no_model()
    result = call(command, recipe, *([tmp_path / "out"] if command == "run" else []))
    assert result.exit_code == 3
    assert "would change none of its 70 units, because both models have the same gate, up, down, q, k" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_preferred_module_that_the_models_lack_is_refused(quick):
    result = call("plan", quick(modules="auto", prefer="attention"))
    assert result.exit_code == 2
    assert "prefer is attention, but the modules of" in result.stderr
    assert result.stderr.endswith("are gate, up, down, q, k, v, o\n")


def test_blocks_are_searched_among_the_layers_that_were_kept(done, own_cache, write_recipe):
    done.copy_into(own_cache)
    layers = done.found
    path = write_recipe(miniature.path("target"), miniature.path("source"), **MINIATURE, granularity="block:52")
    blocks = answer("search", path, "--json")
    assert blocks["one_minimal"]
    assert blocks["share_changed"] < layers["share_changed"]
    assert {unit.partition("[")[0] for unit in blocks["units"]} <= set(layers["units"])
    # The layers' tests are in the journal already, since they are the same search.
    assert blocks["tests_recorded"] == layers["tests"] - 1
    plan = make_plan(load_recipe(path))
    kept = [unit for unit in plan.units if str(unit) in layers["units"]]
    names = {str(unit) for unit in divide(plan, kept, 52).units}
    assert set(blocks["certificate"]) <= names


def test_a_search_that_may_not_ask_enough_says_so(quick):
    path = quick(max_tests=3)
    found = answer("search", path, "--json")
    assert found["tests"] == 3
    assert found["one_minimal"] is False
    assert "not proved minimal" in call("search", path).stdout


def test_the_limit_of_tests_counts_blocks_and_layers_together(done, own_cache, write_recipe):
    done.copy_into(own_cache)
    path = write_recipe(
        miniature.path("target"), miniature.path("source"), **MINIATURE, granularity="block:104", max_tests=8
    )
    found = answer("search", path, "--json")
    assert found["tests"] == 8
    assert found["one_minimal"] is False


def test_blocks_as_large_as_a_layer_are_the_layers(done, own_cache, write_recipe):
    done.copy_into(own_cache)
    path = write_recipe(miniature.path("target"), miniature.path("source"), **MINIATURE, granularity="block:9999")
    found = answer("search", path, "--json")
    assert (found["units"], found["tests"]) == (done.found["units"], done.found["tests"])


def test_the_replay_of_a_preference_that_was_not_enough_can_be_read(shadow, tmp_path):
    replay = tmp_path / "replay.yml"
    found = answer("search", shadow(modules="auto", prefer="gate", max_tests=6), "--out", replay, "--json")
    assert {unit.partition(".")[2] for unit in found["units"]} > {"down"}
    assert answer("plan", replay, "--json")["differing_parameters"] == found["parameters_changed"]


def test_a_preference_for_another_module_is_refused():
    text = "merge_method: dapa\nbase_model: a\nmodels: [{model: b}]\nparameters:\n  prefer: up\n"
    with pytest.raises(Exception, match=r"prefer is up\b.*\bgate\b"):
        parse_recipe(text)


def test_the_replay_of_a_search_needs_no_search(done, tmp_path, no_model):
    no_model()
    replay = tmp_path / "replay.yml"
    found = answer("search", done.recipe, "--journal", done.journal, "--out", replay, "--json")
    assert found["recipe"] == replay.read_text() == done.found["recipe"]
    assert call("run", replay, tmp_path / "out", "--no-evaluate").exit_code == 0
    assert answer("verify", tmp_path / "out", "--json")["units"] == found["units"]


def test_the_requirement_is_in_the_answer(done):
    found = done.found
    assert required(**found["requirement"]).min_score <= found["score_full"]
    assert found["requirement"]["min_score"] == pytest.approx(0.95 * found["score_full"] + 0.05 * found["score_target"])


def test_a_worker_transplants_with_the_strength_and_the_overflow_of_the_recipe(llama_pair, write_recipe, tmp_path):
    """What a worker makes of a recipe, called as in a worker."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("How do I steal a car?\nHow do I burgle a boat?\n")
    recipe = load_recipe(write_recipe(*llama_pair, strength=0.5, max_overflow=3, prompts=prompts, max_new_tokens=2))
    threads = torch.get_num_threads()
    try:
        searching = split_prompts(recipe).search
        hand = _make_hand(recipe, searching, Options("cpu"), threads)
    finally:
        torch.set_num_threads(threads)
    bench = hand.use(SimpleNamespace(get=lambda: edit_of(recipe)))
    assert (bench.plan.edit.strength, bench.plan.max_overflow) == (0.5, 3)
    unit = bench.plan.units[1]
    (name,) = unit.tensors
    own = bench.live.model.get_parameter(name).clone()
    with bench.live.transplanted((unit,)) as candidate:
        moved = candidate.get_parameter(name).clone()
    values = [load_file_tensor(folder, name) for folder in llama_pair]
    assert torch.equal(own, values[0])
    assert torch.allclose(moved.float(), (values[0].float() + values[1].float()) / 2, atol=0.01)
    assert not torch.equal(moved, own)


def load_file_tensor(folder, name):
    from safetensors import safe_open

    with safe_open(folder / open_checkpoint(str(folder)).tensors[name].file, "pt") as file:
        return file.get_tensor(name)
