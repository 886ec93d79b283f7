"""Draws the picture of docs/real-models.md: `python tests/benchmarks/methods_picture.py [FILE]`.

DSR against skill from the recorded rows of `real_table.py`: every method as a mark with the interval of its DSR, a
panel for each pair whose skill was measured. The same drawing as the clouds of `dapa-merge compare`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from recorded_tables import Pair, all_pairs
from tiny import parse

from dapa_merge.compare.charts import clouds_figure
from dapa_merge.compare.methods import LABELS
from dapa_merge.report.drawing import render

# Methods that make a panel: target, source and gates alone show nothing.
LEAST = 5
# What goes before a pair's name.
MODELS = {"aligned-qwen": "Qwen ", "aligned-smollm2": "SmolLM2 ", "siblings-smollm2": ""}


def main(argv: Sequence[str] | None = None) -> None:
    """Draw what is recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("docs/figures/real_methods.svg"))
    arguments = parse(parser, argv)
    panels = [panel_of(pair) for pair in all_pairs() if len(pair.measured) >= LEAST]
    print(f"{len(panels)} panels, {sum(len(panel.arms) for panel in panels)} methods")
    drawn = render(clouds_figure(panels), arguments.out.suffix[1:])
    if not arguments.tiny:
        arguments.out.write_bytes(drawn)


def panel_of(pair: Pair) -> SimpleNamespace:
    """A pair as a row of a comparison, as far as it is drawn."""
    arms = [arm_of(row) for row in pair.measured.values()]
    return SimpleNamespace(name=f"{MODELS[pair.file]}{pair.name}", arms=arms, before=arms[0].figures, curve=())


def arm_of(row: Mapping[str, Any]) -> SimpleNamespace:
    """A recorded row as one of a comparison."""
    # RESTA with and without a base has one mark.
    method = str(row["method"]).replace("resta abliterated", "resta")
    skills = [SimpleNamespace(score=score) for score in row["skills"]]
    figures = SimpleNamespace(dsr=row["dsr"], dsr_interval=row["dsr_interval"], skills=skills)
    return SimpleNamespace(
        method=method, group=method, label=LABELS.get(method, method), detail=row["setting"], skill=row["skill"],
        figures=figures,
    )  # fmt: skip


if __name__ == "__main__":
    main()
