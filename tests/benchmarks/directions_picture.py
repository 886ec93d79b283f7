"""Draws the picture of docs/directions.md: `python tests/benchmarks/directions_picture.py [FILE]`.

Left, the matrix of the shadow pair that changed most: the singular values of its difference, in colour those that the
edit works with. Middle, its core: how much of what each direction reads is written along each. Right, refusal and skill
of the target, of copied modules (`modules: auto`), of the chosen directions and of the source, on prompts that nothing
was chosen by.
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

from dapa_merge.plan.directions import Factors
from dapa_merge.plan.edit import Directions
from dapa_merge.plan.selection import make_plan
from dapa_merge.recipe.options import Options
from dapa_merge.search.search import search_plan
from dapa_merge.search.spectrum import Spectrum, spectra_of

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
        spectra = {
            one.place: one for one in spectra_of(make_plan(chosen), found.plan.units, torch.device("cpu"), max_rank=48)
        }
        cores = {place: _core(factors, spectra[place]) for place, factors in found.plan.edit.factors.of.items()}
        place = max(cores, key=lambda one: numpy.linalg.norm(cores[one]))
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
        _draw(out, str(place), spectra[place].values.numpy(), cores[place], rows)
        print(f"{place}: {len(cores[place])} of {spectra[place].rank} directions; {rows}")


def _core(factors: Factors, spectrum: Spectrum) -> numpy.ndarray:
    """`[r, r]`: what direction j reads, by column, is so much written along direction i, by row."""
    rank = factors.rank
    values, right = spectrum.values.double().numpy()[:rank], spectrum.right.double().numpy()[:rank]
    left = spectrum.left.double().numpy()[:, :rank] / values
    change = factors.product().astype(float)
    return (left.T @ change @ right.T) / numpy.sqrt(values)[:, None] / numpy.sqrt(values)


def _draw(out: Path, name: str, values: numpy.ndarray, core: numpy.ndarray, rows: dict[str, dict[str, float]]) -> None:
    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(14, 3.9), width_ratios=(1.1, 1, 1.1), layout="constrained"
    )
    numbers, rank = numpy.arange(1, len(values) + 1), len(core)
    left.bar(numbers[:rank], values[:rank], color="#c44e00", label="the edit works with these")
    left.bar(numbers[rank:], values[rank:], color="0.82", label="left alone")
    left.set(xlabel="direction, the largest first", ylabel="size in source - target")
    left.set_title(f"The directions of one matrix\n({name})", fontsize=10)
    left.legend(frameon=False)
    most = numpy.abs(core).max()
    shown = middle.imshow(core, cmap="PuOr_r", vmin=-most, vmax=most, extent=(0.5, rank + 0.5, rank + 0.5, 0.5))
    middle.set_xticks(range(2, rank + 1, 2))
    middle.set(xlabel="read along direction", ylabel="written along direction")
    middle.set_title("Its core: how much of what is read\nis written where (source: 1 on the diagonal)", fontsize=10)
    figure.colorbar(shown, ax=middle, shrink=0.85)
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
