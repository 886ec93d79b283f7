from __future__ import annotations

import io
import json

from rich.console import Console

from dapa_merge.checkpoint.units import Unit
from dapa_merge.report.tables import print_prior, prior_rows

SCORES = {Unit(layer, "gate", ()): score for layer, score in enumerate((0.5, -1.25, 19.7, 0.5))}


def shown(selection):
    text = io.StringIO()
    print_prior(SCORES, selection, Console(file=text, width=60))
    return [line.replace("│", " ").split() for line in text.getvalue().splitlines() if ".gate" in line]


def test_the_units_are_ranked_by_score_and_ties_by_their_place():
    rows = json.loads(json.dumps(prior_rows(SCORES)))
    assert [(row["rank"], row["unit"], row["score"]) for row in rows] == [
        (1, "2.gate", 19.7),
        (2, "0.gate", 0.5),
        (3, "3.gate", 0.5),
        (4, "1.gate", -1.25),
    ]
    assert {row["kept"] for row in rows} == {None}


def test_the_table_has_a_line_for_each_unit():
    assert shown(None) == [
        ["1", "2.gate", "+19.700"],
        ["2", "0.gate", "+0.500"],
        ["3", "3.gate", "+0.500"],
        ["4", "1.gate", "-1.250"],
    ]


def test_the_table_tells_what_the_search_kept():
    kept = [unit for unit in SCORES if unit.layer == 2]
    assert [line[3:] for line in shown(kept)] == [["yes"], [], [], []]
    assert [row["kept"] for row in prior_rows(SCORES, kept)] == [True, False, False, False]
