"""Draws the picture of docs/directions.md: `python tests/benchmarks/directions_picture.py [FILE]`.

Left, the matrix of the shadow pair with the most chosen directions: its singular values, in colour by the weight that
was chosen. Right, refusal and skill of the target, of copied modules (`modules: auto`), of the chosen directions and of
the source, on prompts that nothing was chosen by.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy
import torch
from directions_table import EDITS, edited, packaged, quick_choice
from tiny import parse

from dapa_merge.plan.edit import Directions
from dapa_merge.plan.selection import make_plan
from dapa_merge.recipe.options import Options
from dapa_merge.search.search import search_plan
from dapa_merge.search.spectrum import spectra_of

matplotlib.use("Agg")
from matplotlib import pyplot


def main(argv: Sequence[str] | None = None) -> None:
    """Search, measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("docs/figures/directions.png"))
    arguments = parse(parser, argv)
    torch.set_num_threads(1)
    recipe = replace(dict(packaged())["shadow"], keep="skills")
    if arguments.tiny:
        recipe = replace(recipe, max_new_tokens=2, max_tests=1)
    chosen = replace(recipe, **EDITS["directions"])
    with tempfile.TemporaryDirectory() as folder, quick_choice() if arguments.tiny else nullcontext():
        out = Path(folder) / "picture.png" if arguments.tiny else arguments.out
        found = search_plan(chosen, make_plan(chosen), Options(device="cpu", journal=Path(folder) / "journal.jsonl"))
        assert isinstance(found.plan.edit, Directions)
        place, factors = max(found.plan.edit.factors.of.items(), key=lambda item: item[1].rank)
        (spectrum,) = (
            one for one in spectra_of(make_plan(chosen), found.plan.units, torch.device("cpu")) if one.place == place
        )
        made = {
            "target": (recipe, "target"),
            "copied modules\n(auto)": (replace(recipe, **EDITS["auto"]), "auto"),
            "directions": (chosen, "directions"),
            "source": (recipe, "source"),
        }
        rows = {
            name: edited(*made["target" if arguments.tiny else name])
            for name in list(made)[: 1 if arguments.tiny else 4]
        }
        # Which of the singular directions the stored factors are, by their right vectors.
        stored = factors.right / numpy.linalg.norm(factors.right, axis=1, keepdims=True)
        which = numpy.abs(stored @ spectrum.right.numpy().T).argmax(axis=1)
        sizes = numpy.linalg.norm(factors.left, axis=0) * numpy.linalg.norm(factors.right, axis=1)
        weights = numpy.zeros(spectrum.rank)
        weights[which] = sizes * numpy.exp2(factors.exponents.astype(float)) / spectrum.values.numpy()[which]
        _draw(out, str(place), spectrum.values.numpy(), weights, rows)
        print(f"{place}: {factors.rank} of {spectrum.rank} directions; {rows}")


def _draw(
    out: Path, name: str, values: numpy.ndarray, weights: numpy.ndarray, rows: dict[str, dict[str, float]]
) -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.8), width_ratios=(1.25, 1), layout="constrained")
    numbers = numpy.arange(1, len(values) + 1)
    left.bar(numbers, values, color="0.82", label="left alone")
    left.bar(numbers, values * weights, color="#c44e00", label="taken back (weight x size)")
    left.set(xlabel="direction, the largest first", ylabel="size in source - target")
    left.set_title(f"The directions of one matrix\n({name})", fontsize=10)
    left.legend(frameon=False)
    places = numpy.arange(len(rows))
    for offset, key, label, colour in (
        (-0.2, "dsr", "refuses harmful requests", "#1f5a96"),
        (0.2, "skill", "has its skill", "#7fb069"),
    ):
        bars = right.bar(places + offset, [row[key] for row in rows.values()], 0.38, label=label, color=colour)
        right.bar_label(bars, fmt="%.2f", fontsize=8)
    right.set_xticks(places, rows)
    right.set_ylim(0, 1.32)
    right.set_title("What came of it", fontsize=10)
    right.legend(frameon=False, ncols=2, loc="upper center")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
