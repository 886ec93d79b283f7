"""How all pictures look: colours, sizes, labels; and what makes a file of one.

Colours are those of M. Okabe and K. Ito ("Color Universal Design", 2008) and matplotlib's `PuOr`, which all kinds of
colour vision can tell apart; what matters differs in shape or pattern too. Figures are `CARD_WIDTH` inches wide,
readable in the column of a model card.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dapa_merge.errors import UsageError, one_line

try:
    from matplotlib import rc_context, rcParams, rcParamsDefault
    from matplotlib.font_manager import FontProperties, findfont, get_font
except ImportError as error:
    raise UsageError("plots need matplotlib; install it with pip install 'dapa-merge[plot]'") from error
except Exception as error:
    # Of a setting of the user's, such as MPLBACKEND.
    raise UsageError(f"plots need matplotlib, which fails here: {one_line(error)}") from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CARD_WIDTH = 8.0
DOTS_PER_INCH = 200
BLACK, ORANGE, BLUE, GREEN, VERMILION, PURPLE, GREY = (
    "#222222", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#999999",
)  # fmt: skip
COLOURS = {"gate": ORANGE, "up": BLUE, "down": GREEN, "attention": PURPLE}
PATTERNS = {"gate": "", "up": "//", "down": "..", "attention": "xx"}
# Of seven lines in one picture no two look alike.
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
    # The same file for the same data.
    "svg.hashsalt": "dapa-merge",
}
# How many letters of the font fit side by side into a figure.
CARD_LETTERS = 90
MAX_LABEL = 24
# Of a line of text, in inches.
LINE_HEIGHT = 0.15
# Above so many bars their values are written upright.
MAX_BARS = 15
# Above so many layers not every one is labelled.
MAX_TICKS = 24


# What of matplotlib's settings is not about how a picture looks.
OTHER_SETTINGS = (
    "backend",
    "interactive",
    "toolbar",
    "webagg.",
    "tk.",
    "timezone",
    "datapath",
    "keymap.",
    "docstring.",
)


@contextmanager
def styled() -> Iterator[None]:
    """Within, pictures look the same for every user, whatever settings their matplotlib has."""
    with rc_context():
        rcParams.update(
            {name: value for name, value in rcParamsDefault.items() if not name.startswith(OTHER_SETTINGS)} | STYLE
        )
        yield


def render(figure: Figure, kind: str) -> bytes:
    """A figure as a file of the kind png or svg."""
    buffer = io.BytesIO()
    with styled():
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(buffer, format=kind, dpi=DOTS_PER_INCH, metadata=metadata)
    return buffer.getvalue()


def readable(label: str) -> str:
    """A label that can be drawn: control characters and signs that the font lacks as escapes, and not too long."""
    has = get_font(findfont(FontProperties())).get_char_index
    text = "".join(
        character if character.isprintable() and has(ord(character)) else character.encode("unicode_escape").decode()
        for character in label
    )
    text = text if text.strip() else f"{text!r}"
    return text if len(text) <= MAX_LABEL else f"{text[: MAX_LABEL - 1]}…"


def marker_of(axes: Axes, marker: str, colour: str, label: str) -> Any:
    """What a legend shows for a marker."""
    return axes.plot([], [], marker=marker, color=colour, linestyle="none", label=label, markeredgewidth=1.5)[0]


def layer_ticks(axes: Axes, num_layers: int) -> None:
    """Label layers along the horizontal axis."""
    axes.set_xticks(every_few(num_layers))


def spread_places(first: Sequence[int], others: Sequence[int], distance: int) -> list[int]:
    """As many places as have so much room to each other; those that come first, first."""
    chosen: list[int] = []
    for place in (*first, *others):
        if all(abs(place - other) >= distance for other in chosen):
            chosen.append(place)
    return sorted(chosen)


def every_few(number: int) -> list[int]:
    """So many of the first numbers that their labels have room, evenly spread."""
    return list(range(0, number, math.ceil(number / MAX_TICKS)))
