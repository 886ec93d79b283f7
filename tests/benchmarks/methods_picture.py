"""Draws the picture of docs/real-models.md: `python tests/benchmarks/methods_picture.py [FILE]`.

DSR against skill from the recorded rows of `real_table.py`: every method as a mark with the interval of its DSR, a
panel for each pair whose skill was measured. The same drawing as the clouds of `dapa-merge compare`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from recorded_tables import ALL, read_rows
from tiny import parse

from dapa_merge.compare.charts import clouds_figure
from dapa_merge.compare.methods import LABELS
from dapa_merge.report.charts import render

# Methods that make a panel: target, source and gates alone show nothing.
LEAST = 5
# What goes before a pair's name.
MODELS = {"aligned-qwen": "Qwen ", "aligned-smollm2": "SmolLM2 ", "siblings-smollm2": ""}


def main(argv: Sequence[str] | None = None) -> None:
    """Draw what is recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("docs/figures/real_methods.svg"))
    arguments = parse(parser, argv)
    panels = [panel for file in ALL for panel in panels_of(file) if len(panel.arms) >= LEAST]
    print(f"{len(panels)} panels, {sum(len(panel.arms) for panel in panels)} methods")
    drawn = render(clouds_figure(panels), arguments.out.suffix[1:])
    if not arguments.tiny:
        arguments.out.write_bytes(drawn)


def panels_of(file: str) -> list[SimpleNamespace]:
    """The pairs of a file as rows of a comparison, as far as they are drawn."""
    rows, found = read_rows(file), []
    for name in (name for name in ALL[file][1] if (name, "target") in rows):
        arms = [arm_of(row) for (pair, _), row in rows.items() if pair == name and "dsr" in row]
        found.append(SimpleNamespace(name=f"{MODELS[file]}{name}", arms=arms, before=arms[0].figures, curve=()))
    return found


def arm_of(row: dict[str, object]) -> SimpleNamespace:
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
