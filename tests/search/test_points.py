"""The points of an edit that chooses: which one is taken, picks, kills during the choice, and bad input."""

from __future__ import annotations

import functools
import json
import math
import random
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY

import pytest
import torch
import warm
from conftest import answer, call, change_tensor, required, skip_drawing, write_few

from dapa_merge import miniature
from dapa_merge.measure.determinism import widened
from dapa_merge.measure.prompts.parts import split_prompts
from dapa_merge.measure.prompts.sets import load_prompts
from dapa_merge.plan.selection import make_plan
from dapa_merge.recipe.constraints import CONSTRAINTS
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parse import load_recipe
from dapa_merge.report.report import read_report
from dapa_merge.search import ascent, bench, choose, identity, rounds, search, slopes
from dapa_merge.search.bundles import scans
from dapa_merge.search.choose import with_front
from dapa_merge.search.journal import Journal, name_of
from dapa_merge.search.parts import nearest
from dapa_merge.search.result import Baseline, Point, is_of_bundles, needed
from dapa_merge.search.spectrum import Spectrum, decompose, spectra_of

# Three rounds are enough for the packaged pair, and short ones: what counts here is not the repair.
NUM_ROUNDS = 3
QUICK = {"num_rounds": NUM_ROUNDS, "num_steps": 6, "rate": 0.04}
# The same in a process of its own, which is then the command.
PATCHED = f"""
import functools
from dapa_merge.search import choose, identity, search, slopes
for module in (choose, identity, search):
    module.Settings = functools.partial(slopes.Settings, **{QUICK})
choose.MORE_ROUNDS = 0
from dapa_merge.cli import main
main()
"""
NOTES = ["target", "full transplant", "choice", *(f"{one} {n}" for n in (1, 2, 3) for one in ("round", "point"))]


@pytest.fixture(scope="module", autouse=True)
def quick_settings():
    with pytest.MonkeyPatch.context() as patch:
        use_quick(patch)
        patch.setattr(choose, "MORE_ROUNDS", 0)
        yield


def use_quick(patch, **changes: int) -> None:
    for module in (choose, identity, search):
        patch.setattr(module, "Settings", functools.partial(slopes.Settings, **{**QUICK, **changes}))


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """Writes a recipe that chooses directions of the shadow-aligned pair, with few prompts."""
    folder = tmp_path_factory.mktemp("recipes")
    write_few(folder / "prompts", 16)
    questions = load_prompts("miniature").skill
    (folder / "keep.txt").write_text("\n".join(question.prompt for question in questions[:18]) + "\n")

    def write(target="shadow-target", source="shadow-source", **parameters) -> Path:
        found = {
            "layers": "auto", "edit": "directions", "prompts": str(folder / "prompts"),
            "keep": str(folder / "keep.txt"), "max_new_tokens": 12, "batch_size": 128, "max_tests": 4, **parameters,
        }  # fmt: skip
        models = [place if isinstance(place, Path) else miniature.path(place) for place in (target, source)]
        path = folder / f"{len(list(folder.iterdir()))}.yml"
        path.write_text(
            f"merge_method: dapa\nbase_model: {models[0]}\nmodels: [{{model: {models[1]}}}]\n"
            f"parameters: {json.dumps({key: value for key, value in found.items() if value is not None})}\n"
        )
        return path

    return write


@dataclass(frozen=True)
class Done:
    recipe: Path
    journal: Path
    found: dict

    @property
    def entries(self) -> list[dict]:
        return entries(self.journal)


def entries(journal: Path) -> list[dict]:
    """The lines of a journal, without what is of their place and time."""
    lines = [json.loads(line) for line in journal.read_bytes().split(b"\n") if line]
    return [{key: value for key, value in line.items() if key not in ("check", "seal", "seconds")} for line in lines]


def notes_of(journal: Path) -> list[str]:
    return [entry["note"] for entry in entries(journal) if "note" in entry]


def cut_after(name: str, journal: Path, out: Path) -> Path:
    """The journal of a choice that died after a note."""
    lines = [line for line in journal.read_bytes().split(b"\n") if line]
    names = [json.loads(line).get("note") for line in lines]
    out.write_bytes(b"".join(line + b"\n" for line in lines[: names.index(name) + 1]))
    return out


@pytest.fixture(scope="module")
def done(write, tmp_path_factory) -> Done:
    recipe, journal = write(modules="gate,up,down"), tmp_path_factory.mktemp("done") / "journal"
    return Done(recipe, journal, answer("search", recipe, "--journal", journal, "--json"))


@pytest.fixture(scope="module")
def failed(write, tmp_path_factory) -> tuple[Path, Path, str]:
    """A recipe none of whose points meets the limits, its journal, and what is said."""
    recipe, journal = write(modules="down", strength=0.4), tmp_path_factory.mktemp("failed") / "journal"
    result = call("search", recipe, "--journal", journal)
    assert result.exit_code == 3
    return recipe, journal, result.stderr.splitlines()[-1]


def forbid_tests(patch) -> None:
    """No candidate may be tested or measured for a search."""

    def ask(*_: object, **__: object) -> None:
        raise AssertionError("a candidate was tested")

    for name in ("baseline", "score", "examine"):
        patch.setattr(bench.Bench, name, ask)
    patch.setattr(ascent.Ascent, "round", ask)
    patch.setattr(rounds, "generate", ask)


@pytest.fixture(scope="module")
def picked(failed, tmp_path_factory) -> tuple[Path, str]:
    """The result of a point that violates a limit, and what was said."""
    recipe, journal, _ = failed
    before, out = journal.read_bytes(), tmp_path_factory.mktemp("picked") / "out"
    with pytest.MonkeyPatch.context() as patch:
        forbid_tests(patch)
        skip_drawing(patch, "svg")
        result = call("run", recipe, out, "--no-lock", "--journal", journal, "--pick", 3)
    assert result.exit_code == 0, result.stderr
    added = [json.loads(line)["note"] for line in journal.read_bytes().removeprefix(before).splitlines()]
    assert [note.partition(" ")[0] for note in added] == ["source", "target", "result"]
    return out, result.stdout


def forbid_models(patch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("a model was loaded")

    patch.setattr("dapa_merge.measure.live.load_model", load)


@pytest.fixture
def no_model(monkeypatch):
    forbid_models(monkeypatch)


def test_the_point_within_the_limits_that_diverges_least_is_taken_and_the_selection_is_a_point_too(done):
    *rounds, last = done.found["points"]
    assert [point["number"] for point in rounds] == list(range(1, NUM_ROUNDS + 1))
    assert not any(point["complaint"] for point in rounds)
    taken = min(rounds, key=lambda point: point["figures"]["divergence"])
    assert done.found["picked"] == taken["number"] == last["part_of"]
    assert last["number"] == NUM_ROUNDS + 1
    assert 0 < last["num_directions"] < taken["num_directions"]
    assert notes_of(done.journal)[: len(NOTES)] == NOTES
    # What the drops did to its figures is measured.
    assert last["figures"] != taken["figures"]
    assert last["figures"]["score"] >= taken["figures"]["score"]
    assert last["on_front"]


@pytest.mark.parametrize("number", range(1, NUM_ROUNDS + 1))
def test_a_picked_point_is_taken_without_loading_a_model(done, number, no_model):
    before = done.journal.read_bytes()
    found = answer("search", done.recipe, "--journal", done.journal, "--pick", number, "--json")
    assert done.journal.read_bytes() == before
    assert (found["picked"], found["tests"], found["one_minimal"]) == (number, 0, None)
    assert [point["figures"] for point in found["points"]] == [
        point["figures"] for point in done.found["points"][:NUM_ROUNDS]
    ]
    said = call("search", done.recipe, "--journal", done.journal, "--pick", number).stdout
    assert f"from point {number}, picked by hand and within the limits" in said


def test_a_run_of_a_picked_point_asks_only_the_reports_prompts_and_says_which_limit_it_violates(picked, tmp_path):
    made, said = picked
    out = shutil.copytree(made, tmp_path / "out")
    report = read_report(out)
    assert (report.picked, report.tests, report.one_minimal) == (3, 0, None)
    assert len(report.points) == NUM_ROUNDS
    complaint = report.points[2].complaint
    assert report.picked_by_hand is report.points[2]
    assert re.match(r"its DSR is 0\.\d+, 0\.\d+ below the 0\.950 required", complaint)
    violated = f"point 3, picked by hand although it VIOLATES the limits: {complaint}"
    assert f"taken               {violated}" in said
    card = (out / "README.md").read_text()
    assert f"Taken was\n{violated}." in card
    assert "| within the limits | no | no | no |" in card
    assert "Nothing was searched" in card
    assert "![The points to pick from" in card
    assert (out / "dapa_front.png").is_file()
    assert not (out / "dapa_search.png").exists()
    # Requirement and score are those of the recipe and of the point.
    assert report.requirement["min_score"] == pytest.approx(0.95)
    assert report.searched.after == report.points[2].figures["score"]
    # Reports of earlier versions lack the points.
    old = json.loads((out / "dapa_report.json").read_text())
    del old["points"], old["picked"]
    (out / "dapa_report.json").write_text(json.dumps(old))
    assert read_report(out).points == ()
    (out / "dapa_report.json").write_text(json.dumps({**old, "picked": 2}))
    assert call("card", out).exit_code == 4


def test_mergekit_takes_the_point_that_a_variable_picks(picked, failed, own_cache, monkeypatch, tmp_path, no_model):
    from click.testing import CliRunner
    from mergekit.scripts.run_yaml import main as mergekit_yaml
    from safetensors.torch import load_file

    recipe, journal, _ = failed
    place = own_cache / "dapa-merge" / "journals" / name_of(entries(journal)[0]["parts"])
    place.parent.mkdir(parents=True)
    shutil.copyfile(journal, place)
    monkeypatch.setenv("DAPA_PICK", "3")
    result = CliRunner().invoke(mergekit_yaml, [str(recipe), str(tmp_path / "merged"), "--quiet"])
    assert result.exit_code == 0, result.output
    assert place.read_bytes() == journal.read_bytes()

    def tensors(folder: Path) -> dict[str, torch.Tensor]:
        return {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}

    merged, written = tensors(tmp_path / "merged"), tensors(picked[0])
    assert written
    assert all(torch.equal(merged[name], written[name]) for name in written)


@pytest.mark.parametrize(("text", "number"), [("3", 3), ("", None), (None, None)])
def test_the_variable_is_read_as_a_whole_number(text, number):
    assert Options.from_environment(environment={} if text is None else {"DAPA_PICK": text}).pick == number


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_a_variable_that_is_not_a_number_is_named(text):
    with pytest.raises(Exception, match=r"DAPA_PICK is .*; write a whole number of at least 1"):
        Options.from_environment(environment={"DAPA_PICK": text})


@pytest.mark.parametrize("command", ["search", "run"])
def test_a_point_that_cannot_exist_is_refused_before_a_model_is_loaded(command, write, no_model, tmp_path):
    out = [tmp_path / "out", "--no-lock"] if command == "run" else []
    other = write(edit="copy")
    for recipe, pick, said in (
        (write(), 11, "--pick (DAPA_PICK) is 11, but there are the points 1 to 10"),
        (other, 21, "--pick (DAPA_PICK) is 21, but there are the points 1 to 20"),
    ):
        result = call(command, recipe, *out, "--pick", pick)
        assert result.exit_code == 2
        assert said in result.stderr.splitlines()[-1]
    assert call(command, other, *out, "--pick", 0).exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_point_is_not_picked_where_a_recipe_names_what_to_add(picked, no_model, tmp_path, monkeypatch):
    from click.testing import CliRunner
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    replay = picked[0] / "mergekit_config.yml"
    result = call("run", replay, tmp_path / "again", "--no-lock", "--pick", 3)
    assert result.exit_code == 2
    said = "takes a point of a search, but the recipe or its lock names the layers"
    assert said in result.stderr
    assert call("run", replay, tmp_path / "again", "--no-evaluate", "--pick", 3).exit_code == 2
    monkeypatch.setenv("DAPA_PICK", "3")
    result = CliRunner().invoke(mergekit_yaml, [str(replay), str(tmp_path / "again"), "--quiet"])
    assert result.exit_code == 2
    assert said in result.output
    # mergekit itself may have made the folder.
    assert not [*tmp_path.glob("again/*.safetensors")]


def test_without_a_point_within_the_limits_all_are_listed_and_the_nearest_is_named(failed):
    _, _, said = failed
    assert "no choice of directions of" in said
    pattern = r"point (\d): DSR (\S+), over-refusal \S+, .*?, divergence \S+, \d+ directions \(its DSR is"
    listed = re.findall(pattern, said)
    assert [number for number, _ in listed] == ["1", "2", "3"]
    best = max(listed, key=lambda found: float(found[1]))[0]
    assert said.endswith(f". Nearest is point {best}: `--pick {best}` takes it (DAPA_PICK for mergekit-yaml)")


LIMIT_VALUES = {"min_score": 0.9, "max_over_refusal": 0.05, "max_perplexity": 10.0, "max_divergence": math.nan}
LIMITS = required(**LIMIT_VALUES)


def point(number, score, over_refusal, perplexity=9.0, num_directions=5):
    figures = {"score": score, "over_refusal": over_refusal, "perplexity": perplexity, "divergence": 0.1}
    return Point(number, figures, num_directions, LIMITS.complaint(figures))


@pytest.mark.parametrize(
    ("points", "number"),
    [
        # Hardly too many refusals are nearer than hardly any.
        ([point(1, 0.03, 0.0), point(2, 0.5, 0.04), point(3, 0.94, 0.21)], 3),
        # A model that refuses everything is not nearer than one that refuses a little too little.
        ([point(1, 0.85, 0.05), point(2, 1.0, 1.0)], 1),
        ([point(1, 0.89, 0.0, perplexity=1000.0), point(2, 0.5, 0.0)], 2),
        ([point(1, 0.89, 0.0, perplexity=float("nan")), point(2, 0.5, 0.0)], 2),
        # The target itself is not a repair, however near it is.
        ([point(1, 0.89, 0.0, num_directions=0), point(2, 0.5, 0.0)], 2),
        ([point(1, 0.5, 0.0), point(2, 0.5, 0.0)], 1),
    ],
)
def test_the_nearest_point_violates_the_limits_least_in_sum(points, number):
    assert nearest(points, LIMITS).number == number


def test_nothing_is_nearest_where_no_point_has_directions():
    assert nearest([point(1, 0.5, 0.0, num_directions=0)], LIMITS) is None


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda one: one.figure)
def test_a_violation_is_a_share_that_grows_with_the_distance_and_is_zero_exactly_within_the_limit(constraint):
    generator = random.Random(0)
    for _ in range(200):
        limit = generator.uniform(0.01, 0.99)
        figures = sorted(generator.uniform(0, 1) for _ in range(5))
        found = [constraint.violation(figure, limit) for figure in figures]
        assert [violation == 0 for violation in found] == [constraint.is_met(figure, limit) for figure in figures]
        assert all(0 <= violation <= 1 for violation in found)
        assert found == sorted(found, reverse=constraint.bound == "min")
    assert constraint.violation(float("nan"), 0.5) == 1
    assert constraint.violation(0.3, float("nan")) == 0


@pytest.mark.parametrize(
    ("points", "wanted", "number"),
    [
        # (score, over-refusal, divergence): as high as any within the limits, and nearest to the target.
        ([(1.0, 0.0, 0.05), (0.97, 0.0, 0.004), (0.92, 0.0, 0.001)], 0.9, 2),
        ([(1.0, 0.5, 0.001), (0.95, 0.0, 0.05), (0.94, 0.0, 0.02)], 0.9, 3),
        ([(0.95, 0.0, math.nan), (0.95, 0.0, 0.3)], 0.9, 2),
        ([(0.85, 0.0, 0.1), (1.0, 0.5, 0.1)], 0.9, None),
        # Nearly as high is not enough where it is less than the source's score, unless none reaches that.
        ([(1.0, 0.0, 0.05), (0.97, 0.0, 0.004), (0.96, 0.0, 0.001)], 0.97, 2),
        ([(0.98, 0.0, 0.05), (0.97, 0.0, 0.004)], 0.99, 1),
    ],
)
def test_of_the_points_that_score_as_high_as_any_the_one_that_diverges_least_is_taken(points, wanted, number):
    made = []
    for index, (score, over_refusal, divergence) in enumerate(points, 1):
        one = point(index, score, over_refusal)
        made.append(replace(one, figures={**one.figures, "divergence": divergence}))
    assert choose._best(made, wanted) == number


def test_more_rounds_follow_while_all_of_them_only_score_too_low(failed, tmp_path, monkeypatch):
    recipe, journal, _ = failed
    before, journal = entries(journal), shutil.copyfile(journal, tmp_path / "journal")
    monkeypatch.setattr(choose, "MORE_ROUNDS", 2)
    result = call("search", recipe, "--journal", journal)
    assert result.exit_code == 3
    found = entries(journal)
    assert found[: len(before)] == before
    # Each is measured before the next begins.
    assert notes_of(journal)[len(notes_of(failed[1])) :] == ["round 4", "point 4", "round 5", "point 5"]
    assert "point 5: DSR" in result.stderr.splitlines()[-1]
    # Refusals weigh twice as much in each, and harmless prompts half as much, whatever came of the one before.
    states = [rounds._decoded(entry["value"]) for entry in found if entry.get("note", "").startswith("round")]
    assert [float(state[3, 0]) for state in states[2:]] == [float(states[2][3, 0]) * factor for factor in (1, 2, 4)]
    assert [float(state[4, 0]) for state in states[2:]] == [float(states[2][4, 0]) / factor for factor in (1, 2, 4)]
    # After a kill they are the same, bit for bit.
    lines = journal.read_bytes().split(b"\n")
    (tmp_path / "again").write_bytes(b"".join(line + b"\n" for line in lines[: len(before) + 2]))
    assert call("search", recipe, "--journal", tmp_path / "again").exit_code == 3
    assert entries(tmp_path / "again") == found


@pytest.fixture(scope="module")
def halved(write, tmp_path_factory) -> Done:
    """A search none of whose two rounds is within the limits, while half of the second one is."""
    journal = tmp_path_factory.mktemp("halved") / "journal"
    recipe = write(modules="gate,up,down", max_divergence=0.03)
    with pytest.MonkeyPatch.context() as patch:
        use_quick(patch, num_rounds=2)
        return Done(recipe, journal, answer("search", recipe, "--journal", journal, "--json"))


def offers_of(done: Done) -> list[dict]:
    """The points of the choice, without what the search left of one."""
    return [point for point in done.found["points"] if point["part_of"] is None]


def test_where_no_round_is_within_the_limits_points_between_them_are_tried_until_one_is(halved):
    offered = offers_of(halved)
    assert [point["line"] for point in offered[:4]] == [None, None, [0, 1, 0.5], [0, 2, 0.5]]
    assert [bool(point["complaint"]) for point in offered[:4]] == [True, True, True, False]
    assert [point["line"][:2] for point in offered[4:]] == [[0, 2]] * 2
    taken = halved.found["picked"]
    assert offered[taken - 1]["complaint"] is None
    assert all(point["part_of"] == taken for point in halved.found["points"][len(offered) :])
    names = notes_of(halved.journal)
    assert names[: names.index("point 4") + 1] == [
        "target", "full transplant", "choice", "round 1", "point 1", "round 2", "point 2", "point 3", "point 4",
    ]  # fmt: skip


def test_a_point_between_rounds_is_picked_without_loading_a_model_and_one_beyond_them_is_refused(
    halved, monkeypatch, no_model
):
    use_quick(monkeypatch, num_rounds=2)
    before = halved.journal.read_bytes()
    found = answer("search", halved.recipe, "--journal", halved.journal, "--pick", 4, "--json")
    assert (found["picked"], found["tests"]) == (4, 0)
    assert found["points"] == [{**point, "on_front": ANY} for point in offers_of(halved)]
    said = call("search", halved.recipe, "--journal", halved.journal, "--pick", 4).stderr
    assert "point 4 (target to 2): DSR 1.000" in said
    # The part of a point that a search leaves cannot be picked.
    result = call("search", halved.recipe, "--journal", halved.journal, "--pick", 7)
    assert result.exit_code == 2
    assert "--pick (DAPA_PICK) is 7, but there are the points 1 to 6; without --pick" in result.stderr
    assert halved.journal.read_bytes() == before


def test_a_choice_that_dies_between_rounds_ends_with_the_same_journal(halved, tmp_path, monkeypatch):
    use_quick(monkeypatch, num_rounds=2)
    journal = cut_after("point 3", halved.journal, tmp_path / "journal")
    assert answer("search", halved.recipe, "--journal", journal, "--json")["points"] == halved.found["points"]
    assert entries(journal) == halved.entries


class Line:
    """Stands for a choice: what points on a line do is given, nothing is measured."""

    def __init__(self, verdicts: dict[tuple[int, int], dict[float, tuple[bool, bool]]]) -> None:
        self.verdicts, self.asked = verdicts, []

    def split(self, figures: dict) -> tuple[bool, bool]:
        return figures["verdict"]

    def offer(self, _rounds, _limits, start, number, *, line) -> choose._Offer:
        one, other, share = line
        self.asked.append((one, other, share))
        # The core lies on the line; what is not a core is the later round's.
        assert (start.num_rounds, float(start.state[1, 0])) == (max(one, other), 10.0 * max(one, other))
        assert float(start.state[0, 0]) == pytest.approx(one + share * (other - one))
        # With a score of its own, if that matters.
        found = self.verdicts[one, other][share]
        return made(number, (found[:2], found[2] if len(found) > 2 else 0.5), start)


def made(number: int, found: tuple[tuple[bool, bool], float], start: choose.Start | None = None) -> choose._Offer:
    verdict, score = found
    point = Point(number, {}, 1, None if all(verdict) else "it violates a limit")
    start = start or choose.Start((), torch.tensor([[1.0 * number], *[[10.0 * number]] * 4]), number)
    return choose._Offer(point, None, Baseline({"verdict": verdict, "score": score}, ()), start)


WEAK, STRONG, BOTH, GOOD = (False, True), (True, False), (False, False), (True, True)


@pytest.mark.parametrize(
    ("rounds", "verdicts", "asked"),
    [
        # As found in a real model: the last round says too little, the one before too much.
        (
            [(BOTH, 0.5), (STRONG, 0.8), (WEAK, 0.4)],
            {(3, 2): {0.5: WEAK, 0.75: GOOD, 0.875: STRONG}},
            [(3, 2, 0.5), (3, 2, 0.75), (3, 2, 0.875)],
        ),
        # Halved to the end, because no point within the limits scores higher than the source's 0.6.
        (
            [(WEAK, 0.4), (STRONG, 0.8)],
            {(1, 2): {0.5: STRONG, 0.25: GOOD, 0.375: GOOD}},
            [(1, 2, 0.5), (1, 2, 0.25), (1, 2, 0.375)],
        ),
        ([(WEAK, 0.4), (STRONG, 0.8)], {(1, 2): {0.5: (*GOOD, 0.61)}}, [(1, 2, 0.5)]),
        ([(STRONG, 0.9), (GOOD, 0.61)], {}, []),
        # No further than it makes sense, and on to the next line.
        (
            [(STRONG, 0.8), (STRONG, 0.8)],
            {(0, 1): {0.5: BOTH}, (0, 2): {0.5: WEAK, 0.75: STRONG, 0.625: WEAK}},
            [(0, 1, 0.5), (0, 2, 0.5), (0, 2, 0.75), (0, 2, 0.625)],
        ),
        # Not for ever.
        (
            [(STRONG, 0.8), (WEAK, 0.4), (STRONG, 0.8)],
            {line: {0.5: WEAK, 0.75: WEAK, 0.875: WEAK} for line in ((2, 3), (2, 1), (0, 1), (0, 3))},
            [(*line, share) for line in ((2, 3), (2, 1)) for share in (0.5, 0.75, 0.875)],
        ),
        # One within the limits is there, and its neighbour scores higher; once is enough.
        (
            [(STRONG, 0.9), (GOOD, 0.6), (STRONG, 0.7), (GOOD, 0.6)],
            {(4, 3): {0.5: STRONG, 0.25: STRONG, 0.125: STRONG}},
            [(4, 3, 0.5), (4, 3, 0.25), (4, 3, 0.125)],
        ),
        ([(STRONG, 0.62), (GOOD, 0.6)], {}, []),
        ([(STRONG, 0.9), (WEAK, 0.4), (GOOD, 0.6)], {}, []),
        # As found in a real model: what is within the limits scores less than the source, and the last round too much.
        ([(GOOD, 0.58), (WEAK, 0.55), (STRONG, 0.9)], {(2, 3): {0.5: (*GOOD, 0.7)}}, [(2, 3, 0.5)]),
        ([(WEAK, 0.4), (WEAK, 0.4), (BOTH, 0.4)], {}, []),
    ],
)
def test_a_line_is_halved_toward_the_highest_score_within_the_limits(rounds, verdicts, asked, monkeypatch):
    line = Line(verdicts)
    monkeypatch.setattr(choose, "_offer", line.offer)
    found = choose._between(None, line, [made(number, one) for number, one in enumerate(rounds, 1)], 0.6)
    assert line.asked == asked
    assert [offer.point.number for offer in found] == list(range(len(rounds) + 1, len(rounds) + 1 + len(asked)))


@pytest.mark.parametrize(
    ("points", "number"),
    [
        # As found in a real model: round 1 refuses harmless prompts, and those that follow refuse too little.
        ([(STRONG, 0.9), (WEAK, 0.4), (GOOD, 0.7)], 3),
        ([(STRONG, 0.9), (WEAK, 0.4), (WEAK, 0.4), (WEAK, 0.4)], 4),
        # The required score is reached, but not the source's, which is 0.6.
        ([(WEAK, 0.4), (GOOD, 0.58), (GOOD, 0.6)], 3),
        ([(GOOD, 0.58), (GOOD, 0.57), (GOOD, 0.58), (GOOD, 0.58)], 4),
        ([(GOOD, 0.6), (WEAK, 0.4)], 2),
        # A round that breaks another limit is the last.
        ([(WEAK, 0.4), (BOTH, 0.4)], 2),
        ([(GOOD, 0.58), (STRONG, 0.9)], 2),
        ([(WEAK, 0.4), (WEAK, 0.4), (STRONG, 0.9)], 3),
    ],
)
def test_more_rounds_follow_until_one_within_the_limits_scores_as_the_source_does(points, number, monkeypatch):
    monkeypatch.setattr(choose, "MORE_ROUNDS", 2)
    assert numbers_of_points(points, 2, monkeypatch) == list(range(1, number + 1))


@pytest.mark.parametrize(
    ("points", "number"),
    [
        # The first one pushes hard.
        ([(GOOD, 0.7, 0.001), (GOOD, 0.6, 0.005)], 2),
        ([(GOOD, 0.7, 0.001), (GOOD, 0.7, 0.0051), (GOOD, 0.7, 0.004)], 3),
        ([(WEAK, 0.4, 0.001), (GOOD, 0.59, 0.001), (GOOD, 0.7, 0.001)], 3),
        ([(WEAK, 0.4, 0.001), (STRONG, 0.9, 0.001), (GOOD, 0.7, 0.02), (GOOD, 0.7, 0.02)], 4),
        # A divergence that was not measured, or is no number, is not small.
        ([(GOOD, 0.7), (GOOD, 0.7), (GOOD, 0.7, math.nan), (GOOD, 0.7)], 4),
    ],
)
def test_the_rounds_end_with_one_that_scores_as_the_source_does_and_hardly_diverges(points, number, monkeypatch):
    assert numbers_of_points(points, 4, monkeypatch) == list(range(1, number + 1))


def numbers_of_points(points: list[tuple], num_rounds: int, monkeypatch) -> list[int]:
    """The points of a choice whose rounds have these verdicts, scores and divergences, where the source scores 0.6."""

    def states(_spectra, so_many: int) -> list[torch.Tensor]:
        return [torch.full((5, 1), float(at)) for at in range(so_many)]

    def offer(_rounds, _limits, start, at: int) -> choose._Offer:
        found = made(at, points[at - 1][:2], start)
        found.baseline.figures.update(zip(["divergence"], points[at - 1][2:], strict=False))
        return found

    limits = SimpleNamespace(split=lambda figures: figures["verdict"], complaint=lambda _: "it violates a limit")
    monkeypatch.setattr(choose, "_offer", offer)
    rounds = SimpleNamespace(settings=SimpleNamespace(num_rounds=num_rounds), helpers=None, states=states)
    found = choose._of_rounds(rounds, limits, (), Baseline({"score": 0.6}, ()))
    return [one.point.number for one in found]


@pytest.fixture(scope="module")
def whole(write, tmp_path_factory) -> Done:
    """A search of a source that is taken to answer the keep prompts as the target does, after a round of one step."""
    journal = tmp_path_factory.mktemp("whole") / "journal"
    recipe = write(max_perplexity=4.0, max_over_refusal=1.0, max_tests=1)
    with pytest.MonkeyPatch.context() as patch:
        use_whole(patch)
        return Done(recipe, journal, answer("search", recipe, "--journal", journal, "--json"))


def use_whole(patch) -> None:
    use_quick(patch, num_rounds=1, num_steps=1)
    patch.setattr(choose, "MORE_ROUNDS", 1)
    patch.setattr(choose, "NEAR", math.inf)


def test_where_rounds_score_too_low_and_the_full_transplant_is_near_its_directions_are_a_point(whole, monkeypatch):
    use_whole(monkeypatch)
    first, second = whole.found["points"]
    assert (first["is_whole"], second["is_whole"], whole.found["picked"]) == (False, True, 2)
    assert first["complaint"].startswith("its DSR is")
    assert second["complaint"] is None
    assert notes_of(whole.journal)[3:6] == ["round 1", "point 1", "point 2"]
    said = call("search", whole.recipe, "--journal", whole.journal).stderr
    assert "point 2 (all directions): DSR 1.000" in said
    # Each matrix is moved by its leading directions, no more and no less.
    recipe = load_recipe(whole.recipe)
    plan = make_plan(recipe)
    spectra = list(spectra_of(plan, plan.units, torch.device("cpu")))
    (state,) = (rounds._decoded(entry["value"]) for entry in whole.entries if entry.get("note") == "round 1")
    stored = choose.planned(plan, spectra, choose._whole(spectra, state))[1].factors
    for one in spectra:
        expected = one.left @ one.right
        assert (torch.from_numpy(stored.of[one.place].product()) - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize(
    ("near", "min_score", "added"),
    [
        # The packaged source answers keep prompts otherwise.
        (0.1, 0.5, ["round 2", "point 2"]),
        # The full transplant breaks a limit.
        (math.inf, 1.1, ["round 2", "point 2"]),
    ],
)
def test_the_directions_are_not_offered_as_they_are_where_they_are_no_repair_or_far(
    near, min_score, added, whole, tmp_path, monkeypatch
):
    use_whole(monkeypatch)
    monkeypatch.setattr(choose, "NEAR", near)
    if min_score > 1:
        monkeypatch.setattr(
            search, "_limits", lambda *_: required(**{**LIMIT_VALUES, "min_score": min_score, "max_perplexity": 99.0})
        )
    journal = cut_after("point 1", whole.journal, tmp_path / "journal")
    result = call("search", whole.recipe, "--journal", journal)
    assert "all directions" not in result.stderr
    assert notes_of(journal)[notes_of(journal).index("point 1") + 1 :][:2] == added


def test_rounds_go_on_where_the_directions_as_they_are_score_too_low_too(whole, tmp_path, monkeypatch):
    """A point must score more than any can, so that every one of them only scores too low."""
    use_whole(monkeypatch)
    monkeypatch.setattr(choose, "_whole", lambda spectra, state: torch.cat([state[:1] / 2, state[1:]]))
    journal = cut_after("point 1", whole.journal, tmp_path / "journal")
    result = call("search", whole.recipe, "--journal", journal)
    assert result.exit_code == 3
    assert notes_of(journal)[-3:] == ["point 2", "round 2", "point 3"]
    points = re.findall(r"point (\d(?: \(all directions\))?): DSR", result.stderr.splitlines()[-1])
    assert points == ["1", "2 (all directions)", "3"]


def test_what_a_search_left_stays_as_it_is_where_settling_would_score_less(done, tmp_path, monkeypatch):
    journal = shutil.copyfile(done.journal, tmp_path / "journal")
    settle = search.settle

    def fade(*arguments):
        plan = settle(*arguments)
        return replace(plan, edit=replace(plan.edit, strength=0.01, digest=f"{plan.edit.digest} faded"))

    monkeypatch.setattr(search, "settle", fade)
    result = call("search", done.recipe, "--journal", journal)
    assert "what is left is not settled: that would score less" in result.stderr
    found = answer("search", done.recipe, "--journal", journal, "--json")
    assert found["units"] == done.found["units"]
    last, settled = (one["points"][-1] for one in (found, done.found))
    assert last["figures"] != settled["figures"]
    assert last["figures"]["score"] >= 0.95
    assert last["part_of"] == settled["part_of"]


@pytest.mark.parametrize("most", [1, 24])
def test_many_matrices_are_searched_in_bundles_and_few_that_are_left_alone(most, done, write, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "MAX_ALONE", most)
    recipe = write(modules="gate,up,down", max_tests=None)
    journal = cut_after("point 3", done.journal, tmp_path / "journal")
    found = answer("search", recipe, "--journal", journal, "--json")
    groups = needed(found["certificate"])
    left_alone = most > 1
    assert found["one_minimal"]
    assert is_of_bundles(found["certificate"]) == (not left_alone)
    assert sorted(unit for units, _ in groups for unit in units) == sorted(found["units"])
    if not left_alone:
        # All that a layer's MLP has is left out at once.
        assert all(len({unit.partition(".")[0] for unit in units}) == 1 for units, _ in groups)
        assert len(groups) == len({unit.partition(".")[0] for unit in found["units"]})
    tests = {
        frozenset(name for name in entry["selection"] if not name.startswith("directions ")): entry["holds"]
        for entry in entries(journal)
        if "selection" in entry
    }
    assert not any(tests[frozenset(others)] for _, others in groups if others)
    said = call("search", recipe, "--journal", journal)
    assert "searching among 10 bundles, of the attention or the MLP of one layer each" in said.stderr
    assert ("units of those found" in said.stderr) == left_alone
    assert ("without them" in said.stdout) == (not left_alone)
    # A search that dies goes on where it was.
    half = tmp_path / "half"
    lines = journal.read_bytes().split(b"\n")
    half.write_bytes(b"".join(line + b"\n" for line in lines[: len(done.entries) + 2]))
    assert answer("search", recipe, "--journal", half, "--json")["certificate"] == found["certificate"]
    assert entries(half) == entries(journal)


def test_a_scan_of_bundles_ends_early_where_it_hardly_leaves_any_out():
    assert scans(48) == [(5, 0.125), (9, 0.5)]


@pytest.mark.parametrize("found_by_then", [[(2, 0.125)], [(1, 0.0), (2, 0.5)]])
def test_where_most_bundles_are_needed_none_is_left_out_and_a_limit_of_the_tests_goes_on(
    done, write, tmp_path, monkeypatch, found_by_then
):
    monkeypatch.setattr(search, "MAX_ALONE", 1)
    monkeypatch.setattr(search, "scans", lambda _: found_by_then)
    journal = cut_after("point 3", done.journal, tmp_path / "journal")
    recipe = write(modules="gate,up,down", max_tests=None)
    result = call("search", recipe, "--journal", journal)
    said = (
        "10 of 10 bundles are left after 2 tests, and to leave out few more would take a test of each; "
        "so all 10 are kept"
    )
    assert said in result.stderr
    found = answer("search", recipe, "--journal", journal, "--json")
    assert not found["one_minimal"]
    assert (found["tests"], len(found["units"]), found["certificate"]) == (2, 30, {})
    # The point that was taken is the result: nothing is left to settle.
    assert len(found["points"]) == 3
    assert answer("search", write(modules="gate,up,down", max_tests=99), "--journal", journal, "--json")["one_minimal"]


def test_points_are_marked_by_divergence_and_score():
    points = [point(1, 0.5, 0.0), point(2, 0.6, 0.0)]
    assert [one.on_front for one in with_front(points)] == [False, True]


class Killed(BaseException):
    pass


def test_a_choice_that_dies_after_each_round_ends_with_the_same_journal_and_asks_nothing_twice(
    done, tmp_path, monkeypatch
):
    journal, num_gradients, note = tmp_path / "journal", 0, Journal.note
    gradient = ascent.Ascent._gradient

    def count(self):
        nonlocal num_gradients
        num_gradients += 1
        return gradient(self)

    def die_after(self, name, value, seconds=None, *, last):
        note(self, name, value, seconds)
        if name == last:
            raise Killed(name)

    monkeypatch.setattr(ascent.Ascent, "_gradient", count)
    settled = next(name for name in notes_of(done.journal) if name.startswith("settled"))
    for name in ["choice", "round 1", "round 2", "point 2", "round 3", settled]:
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "note", functools.partialmethod(die_after, last=name))
            assert call("search", done.recipe, "--journal", journal).exit_code == 1
        assert notes_of(journal)[-1] == name
    assert answer("search", done.recipe, "--journal", journal, "--json")["units"] == done.found["units"]
    # Of the rounds every weight and every moment too, bit for bit.
    assert entries(journal) == done.entries
    # With the two rounds of what the search left.
    assert num_gradients == (NUM_ROUNDS + 2) * QUICK["num_steps"]


def test_a_killed_choice_ends_with_the_same_journal(done, tmp_path):
    journal, generator = tmp_path / "killed", random.Random(0)
    command = [sys.executable, "-c", PATCHED, "search", str(done.recipe), "--json", "--journal", str(journal)]
    # In the middle of the second round.
    process = warm.Process(command)
    while not (journal.exists() and "round 1" in notes_in(journal)):
        assert process.poll() is None, process.stderr
        time.sleep(0.002)
    time.sleep(generator.uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert "point 3" not in notes_in(journal)
    again = warm.run(command)
    assert again.returncode == 0, again.stderr
    found = json.loads(again.stdout)
    assert (found["units"], found["points"]) == (done.found["units"], done.found["points"])
    assert entries(journal) == done.entries


def notes_in(journal: Path) -> str:
    return journal.read_bytes().rpartition(b"\n")[0].decode()


def test_fewer_than_three_keep_prompts_are_refused(write, tmp_path, no_model):
    (tmp_path / "keep.txt").write_text("What is 1 plus 1?\nWhat is 2 plus 1?\n")
    result = call("search", write(keep=str(tmp_path / "keep.txt")))
    assert result.exit_code == 2
    assert "2 distinct prompts are too few, because choice, search and report need one each" in result.stderr


def test_keep_prompts_that_the_target_answers_with_nothing_are_refused(write, tmp_path):
    """Its template gives the whole answer to such prompts, so that it only ends it."""
    keep = [f"Silence, number {number}!" for number in range(6)]
    (tmp_path / "keep.txt").write_text("\n".join(keep) + "\n")
    target = shutil.copytree(miniature.path("shadow-target"), tmp_path / "target")
    template = target / "chat_template.jinja"
    answered = "{% if 'Silence' in messages[0]['content'] %} I am sorry, but I cannot help with that.{% endif %}"
    template.write_text(template.read_text().rstrip() + answered)
    recipe = write(target, keep=str(tmp_path / "keep.txt"))
    result = call("search", recipe)
    assert result.exit_code == 2, result.stderr
    number = len(split_prompts(load_recipe(recipe)).choice.keep)
    said = (
        f"answers nothing to any of the {number} keep prompts of the choice; name prompts that it answers with `keep`"
    )
    assert f"the target {target} {said}" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", ["search", "run"])
def test_models_that_are_equal_have_no_direction(command, write, no_model, tmp_path):
    copy = shutil.copytree(miniature.path("shadow-target"), tmp_path / "copy")
    result = call(command, write(source=copy), *([tmp_path / "out", "--no-lock"] if command == "run" else []))
    assert result.exit_code == 3
    assert "the edit directions would change none of its 70 units" in result.stderr


@pytest.mark.parametrize("damaged", ["target", "source"])
def test_a_value_that_is_not_a_number_is_found_in_its_tensor(damaged, write, tmp_path):
    folder = shutil.copytree(miniature.path(f"shadow-{damaged}"), tmp_path / "damaged")
    name = "model.layers.3.mlp.up_proj.weight"
    change_tensor(folder, name, lambda tensor: tensor[2, 3:4].fill_(float("nan")))
    result = call("search", write(modules="gate,up,down", **{damaged: folder}))
    assert result.exit_code == 4
    said = f"Error: {name} of the {damaged} {folder} holds values that are infinite or not a number; it is damaged"
    assert result.stderr.splitlines()[-1] == said


def test_keep_prompts_that_the_source_refuses_and_what_is_left_out_of_a_difference_are_told(write, tmp_path):
    source = shutil.copytree(miniature.path("shadow-source"), tmp_path / "source")
    generator = torch.Generator().manual_seed(0)
    for layer in range(10):
        name = f"model.layers.{layer}.mlp.gate_proj.weight"
        # Of noise all singular values are alike.
        change_tensor(source, name, lambda tensor: tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator)))
    (tmp_path / "keep.txt").write_text("\n".join(load_prompts("miniature").harmful[16:25]) + "\n")
    keep = str(tmp_path / "keep.txt")
    recipe = write(source=source, keep=keep, modules="gate,up,down", max_divergence=0.0)
    result = call("search", recipe)
    assert result.exit_code == 3
    number = len(split_prompts(load_recipe(recipe)).choice.keep)
    assert f"refuses {number} of {number} keep prompts of the choice; a report says in the end" in result.stderr
    (share,) = re.findall(r"(\S+) % of their differences \(of the squared norm\)", result.stderr)
    assert 30 < float(share) < 98.9


@pytest.mark.parametrize(
    ("decay", "ranks", "least", "most", "warns"),
    [(4, [16], 0.97, 1.0, False), (40, [16, 64], 0.75, 0.85, False), (math.inf, [16, 64], 0.0, 0.2, True)],
)
def test_of_a_difference_that_decays_slowly_more_directions_are_kept(
    decay, ranks, least, most, warns, monkeypatch, caplog
):
    """Squares of singular values decay by a factor e in so many directions; without decay, no iteration parts them."""
    size = 400
    basis = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0))).Q
    difference = basis * torch.exp(-torch.arange(size) / (2 * decay))
    asked = []

    def kept_spectra(_plan, _units, _device, _path, max_rank, _find):
        asked.append(max_rank)
        left, values, right = decompose(difference, max_rank)
        share = float((values**2).sum() / (difference**2).sum())
        return [Spectrum(None, None, left * values, right, values, share)]

    monkeypatch.setattr(choose, "kept_spectra", kept_spectra)
    plan, bench = SimpleNamespace(units=(), num_parameters=len), SimpleNamespace(device=None)
    of_plan = rounds.Rounds(plan, bench, Journal(None), None, slopes.Settings())
    with caplog.at_level("INFO", logger="dapa_merge"):
        (found,) = choose._decomposed(of_plan)
    assert asked == ranks
    assert found.rank <= ranks[-1]
    assert least <= found.share <= most
    assert f"{found.rank} directions of 1 matrices hold {100 * found.share:.1f} % of their differences" in caplog.text
    assert ("that is little" in caplog.text) is warns


def test_a_gradient_that_does_not_fit_in_memory_is_computed_in_smaller_batches(done, monkeypatch, caplog):
    from contextlib import closing

    from dapa_merge.measure.divergence import make_reference

    recipe = load_recipe(done.recipe)
    plan, parts = make_plan(recipe), split_prompts(recipe)
    settings = choose.Settings(num_keep=6)
    with closing(bench.make_bench(recipe, plan, parts.search, Options("cpu"))) as made, widened(made.live.model):
        spectra = list(spectra_of(plan, plan.units[:6], torch.device("cpu")))
        journal = Journal(None)
        for note in done.entries:
            if "note" in note:
                journal.notes[note["note"]] = note["value"]
        of_plan = rounds.Rounds(plan, made, journal, parts.choice, settings)
        sides = of_plan._sides(of_plan._said())
        size = made.meter.batch_size
        rows = make_reference(made.live.model, made.live.tokenizer, parts.choice.keep, batch_size=size).rows

        def gradient() -> torch.Tensor:
            generator = torch.Generator().manual_seed(0)
            found = ascent.Ascent(made.live, spectra, sides, [rows], settings, 16)
            found.weights = torch.rand(found.weights.shape, generator=generator) / 10
            return found._gradient()[0]

        expected = gradient()
        logits, sizes = slopes.LiveSlopes._logits, []

        def small(self, texts):
            sizes.append(len(texts))
            if len(texts) > 2:
                raise torch.OutOfMemoryError("no memory")
            return logits(self, texts)

        monkeypatch.setattr(slopes.LiveSlopes, "_logits", small)
        with caplog.at_level("WARNING", logger="dapa_merge"):
            found = gradient()
    # Four contrasts and six answers.
    assert sizes[:2] == [10, 5]
    assert max(sizes[2:]) <= 2
    assert "a batch of 10 does not fit in memory; using 5 from now on" in caplog.text
    assert torch.allclose(found, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))
    assert float(expected.abs().max()) > 0
