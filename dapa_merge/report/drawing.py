"""The common parts of all charts: the class that declares one, style, sheets, labels, and maps of layers.

`run` and the model card have their charts in `report/charts.py`; `trace`, `compare` and `inspect` declare theirs with
the same class.

Colours are those of M. Okabe and K. Ito ("Color Universal Design", 2008) and matplotlib's `PuOr`, which all kinds of
colour vision can tell apart; important differences also show in shape or pattern. Figures are `CARD_WIDTH` inches wide,
readable in the column of a model card.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from dapa_merge.errors import UsageError, one_line
from dapa_merge.files import PICTURES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

CARD_WIDTH = 8.0
DOTS_PER_INCH = 200
BLACK, ORANGE, BLUE, GREEN, VERMILION, PURPLE, GREY = (
    "#222222", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#999999",
)  # fmt: skip
COLOURS = {
    "gate": ORANGE, "up": BLUE, "down": GREEN, "attention": PURPLE, "q": PURPLE, "k": VERMILION, "v": BLACK, "o": GREY,
}  # fmt: skip
PATTERNS = {"gate": "", "up": "//", "down": "..", "attention": "xx", "q": "", "k": "//", "v": "..", "o": "xx"}
# Seven lines of one picture all look different.
LINES = (
    (BLUE, "o", "-"), (VERMILION, "s", "--"), (GREEN, "^", "-."), (PURPLE, "D", ":"), (ORANGE, "v", "-"),
    (BLACK, "P", "--"), (GREY, "X", "-."),
)  # fmt: skip
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    # Names may have dollar signs.
    "text.parse_math": False,
    # Makes the file the same for the same data.
    "svg.hashsalt": "dapa-merge",
}
# Letters of the font that fit side by side into a figure.
CARD_LETTERS = 90
MAX_LABEL = 24
# Height of a line of text, in inches.
LINE_HEIGHT = 0.15
# With more layers, only some are labelled.
MAX_TICKS = 24
MAPS_IN_A_ROW = 2

# Settings of matplotlib that do not affect the look of a picture.
OTHER_SETTINGS = (
    "backend", "interactive", "toolbar", "webagg.", "tk.", "timezone", "datapath", "keymap.", "docstring.",
)  # fmt: skip


class Picture(NamedTuple):
    """A drawn chart.

    Attributes:
        files: The contents of its files, by ending: `.png` and `.svg`.
    """

    name: str
    caption: str
    files: Mapping[str, bytes]


@dataclass(frozen=True)
class Chart:
    """One kind of picture.

    Attributes:
        name: The name of its files without their ending; `{}` stands for the key if there are several pictures.
        caption: The text under it, or a function that writes the text for the data shown.
        draw: Draws the data; returns None if there is nothing to see.
        parts: Splits the data into the parts that the pictures show, by key; by default one picture shows all.
    """

    name: str
    caption: str | Callable[[Any], str]
    draw: Callable[[Any], Figure | None]
    parts: Callable[[Any], Mapping[str, Any]] | None = None

    @property
    def beginning(self) -> str:
        """The beginning of the names of its files and no others."""
        return f"{self.name}." if self.parts is None else self.name.partition("{}")[0]

    def names(self, keys: Iterable[str]) -> list[str]:
        """The names of its pictures with these keys."""
        return [self.name] if self.parts is None else [self.name.format(key) for key in keys]

    def shown(self, found: Any) -> dict[str, Any]:
        """The part that each picture shows, by the picture's name."""
        parts = {"": found} if self.parts is None else self.parts(found)
        return dict(zip(self.names(parts), parts.values(), strict=True))

    def caption_of(self, shown: Any) -> str:
        """The text under a picture."""
        return self.caption if isinstance(self.caption, str) else self.caption(shown)

    def picture(self, name: str, shown: Any) -> Picture | None:
        """Draw one of `shown`; None if there is nothing to see."""
        if (figure := self.draw(shown)) is None:
            return None
        return Picture(name, self.caption_of(shown), {ending: render(figure, ending[1:]) for ending in PICTURES})


def draw_all(charts: Sequence[Chart], found: Any) -> list[Picture]:
    """Draw the pictures of all charts, in their order.

    Raises:
        UsageError: If matplotlib is missing or fails.
    """
    drawn = [chart.picture(name, shown) for chart in charts for name, shown in chart.shown(found).items()]
    return [picture for picture in drawn if picture is not None]


def plotting() -> Any:
    """Import matplotlib, which is an extra, with its modules that charts use.

    Raises:
        UsageError: If it is not installed, or fails.
    """
    try:
        import matplotlib
        from matplotlib import colors, figure, font_manager, layout_engine, patches, ticker  # noqa: F401
        from matplotlib.backends import backend_agg, backend_svg  # noqa: F401
    except ImportError as error:
        raise UsageError("plots need matplotlib; install it with: pip install matplotlib") from error
    except Exception as error:
        # Because of a setting of the user's, such as MPLBACKEND.
        raise UsageError(f"plots need matplotlib, which fails here: {one_line(error)}") from error
    return matplotlib


@contextmanager
def styled() -> Iterator[None]:
    """Make pictures in the block look the same, whatever the user's settings of matplotlib."""
    matplotlib = plotting()
    defaults = matplotlib.rcParamsDefault
    with matplotlib.rc_context():
        matplotlib.rcParams.update(
            {name: value for name, value in defaults.items() if not name.startswith(OTHER_SETTINGS)} | STYLE
        )
        yield


@contextmanager
def sheet(height: float) -> Iterator[Figure]:
    """An empty figure, as wide as a card and `height` inches high, to be drawn on within the block."""
    with styled():
        yield plotting().figure.Figure(figsize=(CARD_WIDTH, height), layout="constrained")


def render(figure: Figure, kind: str) -> bytes:
    """The content of a `png` or `svg` file of a figure."""
    buffer = io.BytesIO()
    with styled():
        backends = plotting().backends
        figure.set_dpi(DOTS_PER_INCH)
        if isinstance(engine := figure.get_layout_engine(), plotting().layout_engine.ConstrainedLayoutEngine):
            # The layout takes a third of the time, and is the same for the next format.
            backends.backend_agg.FigureCanvasAgg(figure)
            engine.execute(figure)
            figure.set_layout_engine("none")
        # Not by `savefig`, which would draw everything once more beforehand.
        if kind == "svg":
            backends.backend_svg.FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
        else:
            backends.backend_agg.FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def readable(label: str) -> str:
    """A label that can be drawn: shortened, with escapes for control characters and those that the font lacks."""
    fonts = plotting().font_manager
    has = fonts.get_font(fonts.findfont(fonts.FontProperties())).get_char_index
    text = "".join(
        character if character.isprintable() and has(ord(character)) else character.encode("unicode_escape").decode()
        for character in label
    )
    text = text if text.strip() else f"{text!r}"
    return text if len(text) <= MAX_LABEL else f"{text[: MAX_LABEL - 1]}…"


def marker_of(axes: Axes, marker: str, colour: str, label: str) -> Any:
    """The entry of a marker in a legend."""
    return axes.plot([], [], marker=marker, color=colour, linestyle="none", label=label, markeredgewidth=1.5)[0]


def spread_places(first: Sequence[int], others: Sequence[int], distance: int) -> list[int]:
    """Places at least `distance` apart; earlier ones are preferred."""
    chosen: list[int] = []
    for place in (*first, *others):
        if all(abs(place - other) >= distance for other in chosen):
            chosen.append(place)
    return sorted(chosen)


def every_few(number: int) -> list[int]:
    """Evenly spread indices below `number`, few enough for their labels."""
    return list(range(0, number, math.ceil(number / MAX_TICKS)))


class Panel(NamedTuple):
    """A measure of units: its name, and a score for each module and layer, `[modules, layers]`; NaN for no unit."""

    title: str
    scores: NDArray[numpy.floating]


def layer_maps(panels: Sequence[Panel], modules: Sequence[str]) -> Figure:
    """Draw measures of units side by side, each as shares of its own largest score."""
    colours, least = ("PuOr_r", -1) if any((panel.scores < 0).any() for panel in panels) else ("Oranges", 0)
    num_rows, num_layers = -(-len(panels) // MAPS_IN_A_ROW), panels[0].scores.shape[1]
    # A map has half the room of a chart for the labels of layers.
    ticks = every_few(num_layers)[:: 1 if num_layers <= MAX_TICKS // 2 else 2]
    with sheet(max(2.2, 0.4 + num_rows * (0.6 + 0.16 * len(modules)))) as figure:
        grid = figure.subplots(num_rows, MAPS_IN_A_ROW, sharey=True, squeeze=False)
        for axes, panel in itertools.zip_longest(grid.flat, panels):
            if panel is None:
                axes.set_visible(False)
                continue
            shares = panel.scores / (float(numpy.nanmax(numpy.abs(panel.scores), initial=0.0)) or 1.0)
            axes.imshow(shares, aspect="auto", cmap=colours, vmin=least, vmax=1, interpolation="nearest")
            axes.set_facecolor("#dddddd")
            axes.set_yticks(range(len(modules)), modules, parse_math=False)
            axes.set_xticks(ticks)
            axes.tick_params(labelsize=8)
            axes.set_title(panel.title, parse_math=False, fontsize=10)
            axes.spines[:].set_visible(True)
        figure.supxlabel("layer", fontsize=10)
        bar = figure.colorbar(grid.flat[0].images[0], ax=grid, fraction=0.03, pad=0.02, aspect=50)
        bar.set_label("share of the largest")
        bar.outline.set_edgecolor("#666666")
    return figure
