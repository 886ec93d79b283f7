"""Averages, tables and sentences, of rows whose figures are known."""

from __future__ import annotations

import csv
import io
import itertools
import math
from dataclasses import replace

import pytest

from dapa_merge.compare import charts
from dapa_merge.compare.methods import METHODS
from dapa_merge.compare.page import (
    LATEX,
    MARKDOWN,
    Table,
    arms_csv,
    arms_table,
    latex,
    methods_table,
    page,
    paper_table,
    points_csv,
)
from dapa_merge.compare.result import Arm, Cost, Point, Row, averages, mean_of
from dapa_merge.compare.sentences import choices, sentences
from dapa_merge.measure.figures import Figures, SkillFigure
from dapa_merge.measure.statistics import interval
from dapa_merge.plan.edit import Copy

NUMBER = 20
SETTINGS = {"retain": 0.95, "max_over_refusal": 0.05, "max_perplexity": 1.05}


def figures(refused: int, *, over: int = 0, skill: float | None = 0.5, perplexity: float = 2.0) -> Figures:
    skills = () if skill is None else (SkillFigure("skill", skill, NUMBER, (0.0, 1.0)),)
    return Figures(
        NUMBER, refused / NUMBER, interval(refused, NUMBER), 1 - refused / NUMBER, 0.0, 0.0, NUMBER, over / NUMBER,
        interval(over, NUMBER), (), (), None, perplexity, "a text", skills,
    )  # fmt: skip


def arm(key: str, refused: int | None, *, share: float = 0.1, cost: Cost | None = None, **more) -> Arm:
    method = key.split(" ")[0]
    if refused is None:
        return Arm(key, method, key, "nothing", why_not="nothing repairs it", cost=cost)
    seen = tuple(number < refused for number in range(NUMBER))
    label = key.split(" seed")[0]
    what = "gate of layers 1-2"
    none = (False,) * NUMBER
    return Arm(key, method, label, what, figures(refused, **more), None, share, 100, seen, none, 1.0, cost)


COST = Cost(6, 2.0, {"host": 5_000_000})


def row(name: str, *arms: Arm, curve: tuple[Point, ...] = (), before: int = 0) -> Row:
    whole = (arm("target", before, share=0.0, skill=0.9), arm("source", NUMBER, share=1.0, skill=0.0))
    return Row(
        name, "the/target", "the/source", "LlamaForCausalLM", "gate", "refusal", Copy(), 1000, "some", SETTINGS,
        (*whole, *arms), curve, None, "dapa", 0.1,
    )  # fmt: skip


REPAIRED = row("one", arm("dapa", 20, skill=0.8, cost=COST), arm("auto", 20, skill=0.7, cost=COST))
FAILING = row("two", arm("dapa", None, cost=COST), arm("auto", 19, skill=0.4, cost=COST))


def test_a_row_without_a_repair_counts_as_its_target():
    by_group = {average.group: average for average in averages([REPAIRED, FAILING])}
    dapa = by_group["dapa"]
    assert (dapa.num_rows, dapa.num_repaired) == (2, 1)
    assert dapa.gain.value == pytest.approx(0.5)
    assert dapa.skill is not None
    assert dapa.skill.value == pytest.approx(-0.05)
    assert dapa.share.value == pytest.approx(0.05)
    assert dapa.tests is not None
    assert dapa.tests.value == 6
    assert by_group["target"].gain.value == 0


def test_what_cannot_be_applied_to_a_row_does_not_count_there():
    rows = [row("one", arm("ties 0.5", 10)), row("two", arm("ties 0.5", None))]
    (ties,) = [average for average in averages(rows) if average.group == "ties 0.5"]
    assert (ties.num_rows, ties.gain.value) == (1, 0.5)


def test_random_seeds_count_as_one_method():
    rows = [row("one", *(arm(f"random seed {seed}", refused) for seed, refused in enumerate((0, 4, 8))))]
    (random,) = [average for average in averages(rows) if average.group == "random"]
    assert (random.num_rows, random.num_repaired, random.gain.value) == (1, 0, pytest.approx(0.2))
    assert "3 seeds" in arms_table(rows[0]).text(MARKDOWN)
    assert "range 0.000-0.400" in arms_table(rows[0]).text(MARKDOWN)


def test_the_interval_of_a_mean_is_students_and_three_recipes_are_the_least():
    assert mean_of([None, None]) is None
    mean = mean_of([1.0, 2.0, 3.0, None])
    assert mean is not None
    # t = 4.3027 with two degrees of freedom.
    assert mean.interval == pytest.approx((2 - 4.30265 / math.sqrt(3), 2 + 4.30265 / math.sqrt(3)), abs=1e-4)
    pair = mean_of([1.0, 2.0])
    assert pair is not None
    assert pair.interval is None


def test_no_interval_of_a_change_goes_beyond_all():
    rows = [row(name, arm("dapa", refused, cost=COST)) for name, refused in (("a", 0), ("b", 20), ("c", 20))]
    (dapa,) = [average for average in averages(rows) if average.group == "dapa"]
    assert dapa.gain.interval is not None
    assert dapa.gain.interval[0] < 0
    assert dapa.gain.interval[1] == 1


def test_of_recipes_that_are_all_alike_no_interval_is_shown():
    (dapa,) = [one for one in averages([row(name, arm("dapa", 20)) for name in "abc"]) if one.group == "dapa"]
    assert (dapa.gain.points, dapa.gain.span) == ("+100.00", None)


@pytest.mark.parametrize(
    ("more", "repairs"),
    [
        ({"refused": 19}, True),
        ({"refused": 18}, False),
        ({"refused": 20, "over": 1}, True),
        ({"refused": 20, "over": 2}, False),
        ({"refused": 20, "perplexity": 2.1}, True),
        ({"refused": 20, "perplexity": 2.11}, False),
        # As a journal gives back what was not finite.
        ({"refused": 20, "perplexity": math.nan}, False),
        ({"refused": 20, "perplexity": math.inf}, False),
    ],
)
def test_a_method_repairs_if_it_brings_the_gain_within_the_limits(more, repairs):
    tried = row("one", found := arm("dapa", more.pop("refused"), **more))
    assert tried.repairs(found) is repairs


def test_where_the_source_is_no_safer_nothing_is_repaired_and_a_sentence_says_so():
    safe = row("safe", arm("dapa", None, cost=COST), before=NUMBER)
    assert not safe.repairs(safe.arms[0])
    assert "safe: nothing to repair; the target's DSR is 1.000, the source's 1.000." in sentences([safe])


def test_sentences_say_what_gates_cannot_and_what_auto_finds_instead():
    said = sentences([REPAIRED, FAILING])
    assert said[0].startswith("dapa repairs 1 of 2 targets: DSR +50.00 points on average")
    assert said[0].endswith("a row in which nothing was found counts as its target.")
    assert (
        "two: gate alone cannot repair it; `modules: auto` finds gate of layers 1-2 (DSR 0.950, skill 0.900 -> 0.400)."
    ) in said
    nothing = row("three", arm("dapa", None), arm("auto", None))
    assert "three: gate alone cannot repair it; `modules: auto` finds nothing either." in sentences([nothing])


def test_the_choice_is_what_repairs_and_keeps_most_skill_and_never_the_source_or_a_random_one():
    tried = row(
        "one", arm("dapa", 20, skill=0.7), arm("gates", 20, skill=0.6), arm("linear 0.5", 19, skill=0.8),
        arm("ties 0.5", 10, skill=0.9), arm("random seed 0", 20, skill=0.9),
    )  # fmt: skip
    assert [found.key for found in choices(tried)] == ["linear 0.5", "dapa", "gates"]
    best = "keeps most skill, and at least half of it: linear 0.5 in 1, of the one row with something to repair."
    assert any(best in said for said in sentences([tried]))


def test_a_result_without_half_of_the_skill_is_no_choice():
    tried = row("one", arm("dapa", 20, skill=0.4), arm("gates", 20, skill=0.44))
    assert "None of these methods repairs one and keeps half of the skill (single random draws aside)." in sentences(
        [tried]
    )


def test_a_gain_within_noise_is_called_so_and_none_at_all_is_not():
    weak, none = row("weak", arm("dapa", 3, cost=COST)), row("none", arm("dapa", 0, cost=COST))
    assert "DAPA's gain is within noise (McNemar, p >= 0.05) in weak." in sentences([weak, none])


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"refused": 10}, "its DSR is 0.500, 0.450 below the 0.950 required"),
        ({"refused": 20, "over": 4}, "its over-refusal is 0.200, 0.150 above the 0.050 allowed"),
        ({"refused": 20, "perplexity": 3.0}, "its perplexity is 3.000, 0.900 above the 2.100 allowed"),
        ({"refused": 20, "perplexity": math.nan}, "its perplexity is not finite; 2.100 is allowed"),
    ],
)
def test_a_sentence_names_the_limit_that_is_broken(more, why):
    tried = row("one", arm("dapa", more.pop("refused"), cost=COST, **more))
    assert f"one: gate alone does not repair it, because {why}." in sentences([tried])


def test_a_perplexity_that_is_not_finite_spoils_no_average_and_no_order():
    rows = [row(name, arm("dapa", 20, perplexity=found)) for name, found in (("a", math.nan), ("b", 2.02))]
    (dapa,) = [average for average in averages(rows) if average.group == "dapa"]
    assert dapa.perplexity is not None
    assert (dapa.num_repaired, dapa.perplexity.value) == (1, pytest.approx(1.01))
    only = averages(rows[:1])[-1]
    assert only.perplexity is None
    assert "nan" not in methods_table(rows[:1]).text(MARKDOWN)
    assert "nan" not in paper_table(rows).text(MARKDOWN)
    bare = row("bare", arm("dapa", 20, skill=None, perplexity=2.05), arm("gates", 20, skill=None, perplexity=2.01))
    assert [found.key for found in choices(bare)] == ["gates", "dapa"]


def test_a_recipes_own_score_says_what_repairs_and_not_the_rules():
    def scored(key: str, refused: int, score: float) -> Arm:
        found = arm(key, refused)
        assert found.figures is not None
        return replace(found, figures=replace(found.figures, score=score))

    target, source = scored("target", 0, 0.1), scored("source", 10, 0.9)
    weak, strong = scored("dapa", 20, 0.5), scored("gates", 2, 0.9)
    tried = replace(row("one"), arms=(target, source, weak, strong), evaluator="mine")
    assert [found.key for found in choices(tried)] == ["gates"]
    assert any("its mine is 0.500, 0.360 below the 0.860 required" in said for said in sentences([tried]))


def test_each_selection_has_random_ones_of_its_own_size_to_be_compared_with():
    def random(whose: str, *refused: int) -> list[Arm]:
        return [arm(f"random{whose} seed {seed}", number) for seed, number in enumerate(refused)]

    tried = row("one", arm("dapa", 20), *random("", 1, 2, 3), arm("auto", 20), *random(" of auto", 20, 20, 0))
    by_group = {average.group: average for average in averages([tried])}
    assert by_group["random"].gain.value == pytest.approx(0.1)
    assert by_group["random of auto"].gain.value == pytest.approx(2 / 3)
    assert (by_group["random"].num_repaired, by_group["random of auto"].num_repaired) == (0, 1)
    # As `arm` describes them all alike, these are the selection itself, and say nothing.
    said = "Most random selections as large as auto's repair one as well: there the choice of units does not matter."
    assert said not in sentences([tried])
    apart = [replace(one, detail=one.key) if one.method == "random" else one for one in tried.arms]
    assert said in sentences([replace(tried, arms=tuple(apart))])


def test_where_the_source_breaks_a_limit_itself_it_is_not_said_to_repair():
    helpless = replace(row("one"), arms=(arm("target", 0), arm("source", 20, over=9), arm("dapa", 3)))
    assert "None of these methods repairs one within the limits, nor does the source itself." in sentences([helpless])
    assert "nor does the source itself: its over-refusal is 0.450, 0.400 above the 0.050 allowed." in page(
        [helpless], {}, set()
    )


def test_averages_over_fewer_rows_say_so():
    rows = [row("a", arm("gates", 20)), row("b", arm("gates", 10)), row("c", arm("all", 10))]
    assert any("all gates +75.00 (skill -40.00) in 2 rows" in said for said in sentences(rows))


def test_the_papers_table_has_a_line_for_each_recipe_and_the_average():
    text = paper_table([REPAIRED, FAILING]).text(MARKDOWN)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert lines[2][:5] == ["one", "0.000", "1.000", "0.839-1.000", "+100.00"]
    assert lines[2][6:] == ["2.000 -> 2.000", "0.900 -> 0.800", "10.00 %", "6", "2.0"]
    assert lines[3][:5] == ["two", "0.000", "no repair", "-", "+0.00"]
    assert lines[4][0] == "average of 2"
    assert lines[4][4] == "+50.00"
    assert all(len(line) == len(lines[0]) for line in lines)


def test_the_csv_has_every_arm_and_figures_as_numbers():
    lines = list(csv.DictReader(io.StringIO(arms_csv([REPAIRED, FAILING]))))
    assert len(lines) == len(REPAIRED.arms) + len(FAILING.arms)
    dapa = next(line for line in lines if line["method"] == "dapa")
    assert (float(dapa["dsr"]), float(dapa["dsr_gain"]), float(dapa["skill"])) == (1, 1, 0.8)
    assert (dapa["repairs"], dapa["search_tests"], dapa["search_peak_host_bytes"]) == ("True", "6", "5000000")
    assert float(dapa["dsr_p_value"]) < 1e-5
    failing = next(line for line in lines if line["recipe"] == "two" and line["method"] == "dapa")
    assert (failing["why_not"], failing["dsr"], failing["search_tests"]) == ("nothing repairs it", "", "6")


def points() -> tuple[Point, ...]:
    def point(path: str, share: float, dsr: float, skill: float) -> Point:
        return Point(path, share, 1, dsr, (0.0, 1.0), 0.0, skill, 2.0)

    return point("dapa", 0.1, 0.9, 0.8), point("dapa", 0.2, 0.9, 0.7), point("random seed 0", 0.1, 0.2, 0.8)


def test_the_csv_of_the_curve_marks_the_pareto_front():
    lines = list(csv.DictReader(io.StringIO(points_csv([row("one", curve=points())]))))
    assert [line["on_front"] for line in lines] == ["True", "False", "False"]
    assert [line["path"] for line in lines] == ["dapa", "dapa", "random seed 0"]


def test_no_cell_breaks_out_of_its_place():
    table = Table(("a", "b"), [["x|y\nz", "50 % & more_so"]])
    assert table.text(MARKDOWN).splitlines()[-1].count("\\|") == 1
    assert len(table.text(MARKDOWN).splitlines()) == 3
    assert "50 \\% \\& more\\_so" in table.text(LATEX)
    assert "0.1 $\\rightarrow$ 0.2" in Table(("a",), [["0.1 -> 0.2"]]).text(LATEX)


def test_no_name_is_a_formula_in_a_spreadsheet():
    lines = list(csv.reader(io.StringIO(arms_csv([row("=1+1", arm("dapa", 20))]))))
    assert {line[0] for line in lines[1:]} == {"'=1+1"}


def test_without_a_search_there_is_no_table_of_it():
    text = page([row("one", arm("gates", 20))], {}, set())
    assert "Before and after" not in text
    assert "\\toprule" not in latex([row("one")]).split("averaged")[0]


def test_the_latex_holds_whole_tabulars():
    text = latex([REPAIRED, FAILING])
    assert text.count("\\begin{tabular}") == text.count("\\end{tabular}") == 3
    assert text.count("\\toprule") == 3


def test_the_page_names_what_failed_and_shows_only_pictures_that_are_there():
    drawn = replace(REPAIRED, curve=points())
    text = page([drawn], {"broken": "the file\nis <gone>"}, {"row_one.png"})
    assert "- broken: the file" in text
    assert "<gone>" not in text
    assert "(figures/row_one.png)" in text
    assert "methods.png" not in text
    assert methods_table([REPAIRED]).text(MARKDOWN) in text


def test_in_the_clouds_every_method_has_a_mark_of_its_own_that_covers_no_other():
    arms = [arm(key, 20, skill=0.0) for key in METHODS if key not in ("auto", "random")]
    figure = charts.clouds_figure([row("one", *arms), row("two", *arms[:3])])
    first, second = figure.axes
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert len(labels) == len(set(labels)) == len(arms) + 2
    looks = [charts.look(one.group) for one in (*REPAIRED.arms[:2], *arms)]
    assert len(set(looks)) == len(looks)
    for axes, number in ((first, len(arms) + 2), (second, 5)):
        drawn = [one for one in axes.collections if not one.get_label().startswith("_")]
        places = [tuple(one.get_offsets()[0]) for one in drawn]
        assert len(places) == number
        assert not any(charts._covers(one, other) for one, other in itertools.combinations(places, 2))
    assert charts.clouds_figure([row("none", before=0)]) is not None
    assert charts.clouds_figure([]) is None
